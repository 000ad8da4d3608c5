"""Preference losses on a GPU, where a Triton kernel scores the tokens, against the plain path in float64 on a CPU."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from preference_zoo import CASES, Batch, make_batch

from alignment import GRPOLoss
from chunked_embed import linear_logps

pytestmark = pytest.mark.gpu


def moved(batch: Batch, device: str, dtype: torch.dtype) -> Batch:
    tensors = {f.name: value for f in fields(batch) if isinstance(value := getattr(batch, f.name), torch.Tensor)}
    return replace(
        batch,
        **{
            name: t.detach().to(device, dtype if t.is_floating_point() else t.dtype).requires_grad_(t.requires_grad)
            for name, t in tensors.items()
        },
    )


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-1)])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_plain_path(name: str, dtype: torch.dtype, bound: float) -> None:
    case = CASES[name]
    here = moved(make_batch(pairs=6, tokens=40, scale=0.15), "cuda", dtype)
    there = moved(here, "cpu", torch.float64)
    options = {"kl": torch.tensor(0.5)} if name.startswith("kto") else {}
    ours = case.call(case.loss(chunk_size=96), here, **options)
    truth = case.call(case.loss(compiled=False), there, **options)
    torch.testing.assert_close(ours.loss.double().cpu(), truth.loss, rtol=bound, atol=bound)
    found, expected = (torch.autograd.grad(out.loss, b.leaves) for out, b in ((ours, here), (truth, there)))
    for grad, right in zip(found, expected, strict=True):
        assert (grad.double().cpu() - right).norm() <= bound * right.norm()
    for metric, value in truth.metrics.items():
        if "accurac" not in metric:  # which rounding may turn
            torch.testing.assert_close(
                ours.metrics[metric].double().cpu(), value.double(), rtol=bound, atol=40 * bound, msg=metric
            )


@pytest.mark.parametrize("name", ["dpo_sigmoid", "orpo", "kto"])
def test_a_vocabulary_of_an_llm_in_ragged_batches(name: str) -> None:
    """Real widths, autocast over float32 parameters, several chunks, a last one with few rows."""
    generator = torch.Generator().manual_seed(0)
    base = make_batch(pairs=3, tokens=150)
    sizes = {"hidden": 64, "ref_hidden": 32}
    wide = {name: torch.randn(6, 150, width, generator=generator) for name, width in sizes.items()}
    wide |= {f"{side}weight": torch.randn(32_003, w, generator=generator) / 8 for side, w in (("", 64), ("ref_", 32))}
    wide |= {name: torch.zeros(32_003) for name in ("bias", "ref_bias")}
    batch = replace(base, **wide)
    for t in batch.leaves:
        t.requires_grad_()
    here, there = moved(batch, "cuda", torch.float32), moved(batch, "cpu", torch.float64)
    case = CASES[name]
    options = {"kl": torch.tensor(0.5)} if name == "kto" else {}
    with torch.autocast("cuda", torch.bfloat16):
        ours = case.call(case.loss(chunk_size=128), here, **options)
    truth = case.call(case.loss(compiled=False), there, **options)
    torch.testing.assert_close(ours.loss.double().cpu(), truth.loss, rtol=4e-2, atol=1e-3)
    found, expected = (torch.autograd.grad(out.loss, b.leaves) for out, b in ((ours, here), (truth, there)))
    for grad, right in zip(found, expected, strict=True):
        assert grad.dtype == torch.float32
        assert (grad.double().cpu() - right).norm() <= 4e-2 * right.norm()


POLICY = [
    {"beta": 0.1},
    {"loss_type": "grpo", "importance_sampling_level": "sequence", "beta": 0.1},
    {"loss_type": "cispo"},
    {"loss_type": "sapo", "off_policy_threshold": 0.05},
    {"entropy_coef": 0.1},
    {"top_entropy_quantile": 0.3},
]


@pytest.mark.parametrize("chunks", [{}, {"chunk_size": 256}, {"compiled": False}], ids=str)
@pytest.mark.parametrize("options", POLICY, ids=str)
def test_policy_gradients_are_float64_of_the_same_inputs(options: dict[str, Any], chunks: dict[str, Any]) -> None:
    """Functions behind kernels, beside plain ones. One completion is empty, others are longer than a chunk."""
    torch.manual_seed(0)
    hidden = torch.randn(4, 400, 512, device="cuda").bfloat16()
    weight = (0.1 * torch.randn(32000, 512, device="cuda")).bfloat16()
    target, advantages = torch.randint(0, 32000, (4, 400), device="cuda"), torch.randn(4, device="cuda")
    target[1, 100:], target[2] = -100, -100
    with torch.no_grad():
        old = linear_logps(hidden.double(), weight.double(), target, chunk_size=400, compiled=False).logps
    given = {"old_logps": (old + 0.1 * torch.randn_like(old)).float()}
    if "beta" in options:
        given["ref_logps"] = given["old_logps"] - 0.05

    def run(dtype: torch.dtype, **more: Any) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        leaves = [x.to(dtype).detach().requires_grad_() for x in (hidden, weight)]
        out = GRPOLoss(**options, **more)(*leaves, target, advantages, **given)
        return out.loss, torch.autograd.grad(out.loss, leaves)

    expected, true_gradients = run(torch.float64, chunk_size=400, compiled=False)
    loss, gradients = run(torch.bfloat16, **chunks)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    for found, true in zip(gradients, true_gradients):
        assert (found.double() - true).norm() <= 4e-3 * true.norm()
