"""Preference losses on a GPU, where a Triton kernel scores the tokens, against the plain path in float64 on a CPU."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from preference_zoo import CASES, Batch, make_batch

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
