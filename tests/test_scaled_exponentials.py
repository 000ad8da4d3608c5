"""Token losses through scaled exponentials, which no logits are written for: against float64 of the same inputs. On a
CPU the step takes the kernels' plain twins; on a GPU the kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("trl")  # whose functions are the truth of preference losses

from precision_parts import BF16, errors_of, inputs_of
from precision_tokens import CASES, REFERRING, is_own_reference, metrics_of

from chunked_embed import Projection, TokenStatistics, linear_logps, tokens

TRANSFORMS = [{}, {"logit_scale": 0.3, "temperature": 1.7}, {"logit_softcap": 12.0, "logit_scale": 0.5}]
# A hidden state's gradient rounds twice, as in all losses (precision_parts.py): exponentials and the result. A weight's
# rounds once more: the hidden states, times a number each.
HIDDEN, WEIGHT = 3e-3, 3e-3 * 1.4
CHUNKS = pytest.mark.parametrize("chunk_size", [None, 7, 16])


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where the step is taken however few outputs there are, and that it was."""
    monkeypatch.setattr(tokens, "FEW_OUTPUTS", 0)
    if request.param == "cpu":
        monkeypatch.setattr(tokens, "available", lambda device: True)
        monkeypatch.setattr("chunked_embed.kernels.linear_scores.available", lambda device: False)
        monkeypatch.setattr("chunked_embed.kernels.token_scores.available", lambda device: False)
    taken: list[int] = []

    def spy(name: str) -> None:
        original: Callable[..., Any] = getattr(tokens, name)

        def counted(x: Tensor, *rest: Any, **options: Any) -> Any:
            taken.append(len(x))
            return original(x, *rest, **options)

        monkeypatch.setattr(tokens, name, counted)

    for name in ("scaled_exponentials_", "scaled_exponentials_again_"):
        spy(name)
    yield request.param
    assert taken


def draw(device: str, rows: int = 40, h: int = 48, v: int = 301) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, bias, targets: some of all probability, some hopeless, some ignored."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, h, generator=generator)
    weight = torch.randn(v, h, generator=generator) * 8 / h**0.5
    bias = torch.randn(v, generator=generator)
    z = hidden @ weight.T
    target = torch.randint(v, (rows,), generator=generator)
    target[::2] = z.argmax(1)[::2]
    target[4::8] = z.argmin(1)[4::8]
    target[5::8] = -100
    hidden, weight, bias = (t.to(device, BF16) for t in (hidden, weight, bias))
    return hidden.requires_grad_(), weight.requires_grad_(), bias, target.to(device)


def exact(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, **transform: Any) -> Tensor:
    """The log-probabilities in float64."""
    z = (hidden.double() @ weight.double().T + (0 if bias is None else bias.double())) * transform.get("logit_scale", 1)
    if cap := transform.get("logit_softcap"):
        z = cap * torch.tanh(z / cap)
    z = z / transform.get("temperature", 1)
    return -F.cross_entropy(z, target, reduction="none", ignore_index=-100)


def off(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


# --- linear_logps: scores in forward, exponentials in backward -------------------------------------------------------


@CHUNKS
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_scores(device: str, chunk_size: int | None, biased: bool, transform: dict[str, float]) -> None:
    hidden, weight, bias, target = draw(device)
    given = bias if biased else None
    scored = TokenStatistics(
        ("logps", "entropy", "is_top1") if biased else ("logps",),
        transform.get("logit_scale", 1.0),
        transform.get("logit_softcap"),
        transform.get("temperature", 1.0),
        ("logps",),
        chunk_size=chunk_size,
        compiled=True,
    )
    found = scored.scores(Projection(hidden, weight, given), {"target": target})["logps"]
    expected = exact(hidden, weight, given, target, **transform)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    upstream = torch.randn(len(target), generator=torch.Generator().manual_seed(1)).to(device)
    wanted = torch.autograd.grad(expected, (hidden, weight), upstream.double())
    for factor in (1, 2):  # the second forms exponentials again
        got = torch.autograd.grad(found, (hidden, weight), factor * upstream, retain_graph=True)
        for mine, theirs, tolerance in zip(got, wanted, (HIDDEN, WEIGHT), strict=True):
            assert mine.dtype == BF16
            assert off(mine, factor * theirs) < tolerance


@CHUNKS
@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_side(device: str, frozen: str, chunk_size: int | None) -> None:
    hidden, weight, _, target = draw(device)
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    learning = weight if frozen == "hidden" else hidden
    found = linear_logps(hidden, weight, target, chunk_size=chunk_size, compiled=True).logps
    (mine,) = torch.autograd.grad(found.sum(), learning)
    (theirs,) = torch.autograd.grad(exact(hidden, weight, None, target).sum(), learning)
    assert off(mine, theirs) < WEIGHT


def test_without_a_gradient_they_are_the_same(device: str) -> None:
    """An old policy, scored without exponentials, has the log-probabilities of the policy, to the last bit."""
    hidden, weight, bias, target = draw(device)
    learning = linear_logps(hidden, weight, target, bias, compiled=True).logps
    with torch.no_grad():
        before = linear_logps(hidden, weight, target, bias, compiled=True).logps
    assert torch.equal(learning, before)
    learning.sum().backward()


@CHUNKS
def test_no_row_is_used(device: str, chunk_size: int | None) -> None:
    hidden, weight, _, target = draw(device)
    linear_logps(hidden, weight, target, compiled=True).logps.sum().backward()
    hidden.grad = weight.grad = None
    none = torch.full_like(target, -100)
    linear_logps(hidden, weight, none, chunk_size=chunk_size, compiled=True).logps.sum().backward()
    assert not hidden.grad.any() and not weight.grad.any()


# --- preference losses -----------------------------------------------------------------------------------------------

PREFERENCES = ("dpo_sigmoid", "dpo_ipo", "orpo", "simpo", "kto", "cpo_sigmoid", "irpo", "ld_dpo")
OF_LOGPS = [f"alignment {name}" for name in PREFERENCES if f"alignment {name}" in CASES] + ["linear_logps"]


@CHUNKS
@pytest.mark.parametrize("name", OF_LOGPS)
def test_losses_are_float64_of_the_same_inputs(device: str, name: str, chunk_size: int | None) -> None:
    """Under the tolerances of all losses: tests/test_precision.py."""
    case = replace(CASES[name], learns=("hidden", "weight"), slack={"weight": WEIGHT / HIDDEN})
    errors = errors_of(case, f"{name}, frozen bias", BF16, device, compiled=True, chunk_size=chunk_size)
    assert all(e.error <= e.tolerance for e in errors), "\n".join(map(str, errors))


@pytest.mark.parametrize("chunk_size", [None, 7])
@pytest.mark.parametrize("name", [name for name in REFERRING if name in PREFERENCES])
def test_a_policy_that_is_its_reference_has_margins_of_zero(device: str, name: str, chunk_size: int | None) -> None:
    case = replace(CASES[f"alignment {name}"], learns=("hidden", "weight"))
    x = is_own_reference(inputs_of(case, BF16, device))
    margins = metrics_of(name, x, compiled=True, chunk_size=chunk_size)["rewards/margins"]
    assert not margins.any(), margins


def test_a_loss_that_a_user_writes_on_scores(device: str) -> None:
    def focal(scores: Any, groups: Any) -> Tensor:
        logps = scores["logps"][:, 0]
        return -(1 - logps.exp()).square() * logps

    hidden, weight, _, target = draw(device)
    loss = TokenStatistics(loss_fn=focal, gradients_of=("logps",), chunk_size=16, compiled=True)
    found = loss(Projection(hidden, weight), {"target": target}).loss
    logps = exact(hidden, weight, None, target)[target != -100]
    expected = (-(1 - logps.exp()).square() * logps).mean()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    wanted = torch.autograd.grad(expected, (hidden, weight))
    for mine, theirs in zip(torch.autograd.grad(found, (hidden, weight)), wanted, strict=True):
        assert off(mine, theirs) < WEIGHT


# --- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [1, 8, 64])
def test_a_weights_gradient_beside_one_product(device: str, chunks: int) -> None:
    """At most twice the error of torch's own: half-precision logits, one product."""
    hidden, weight, _, target = draw(device, rows=512, h=96, v=500)
    target = target.clamp_min(0)
    found = linear_logps(hidden, weight, target, chunk_size=512 // chunks, compiled=True).logps.sum()
    (mine,) = torch.autograd.grad(found, weight)
    (theirs,) = torch.autograd.grad(-F.cross_entropy(hidden @ weight.T, target, reduction="sum"), weight)
    (expected,) = torch.autograd.grad(exact(hidden, weight, None, target).sum(), weight)
    assert off(mine, expected) < 2 * off(theirs, expected)


# --- where it serves -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({}, None),
        ({"names": ("logps", "entropy")}, None),
        ({"names": ("logps", "entropy"), "gradients_of": ("logps", "entropy")}, "the gradient of entropy takes logits"),
        ({"names": ("lse",), "gradients_of": ("lse",)}, "the gradient of lse takes logits"),
        ({"float32_outputs": False}, "outputs in half precision are asked for"),
        ({"compiled": False}, "steps run uncompiled"),
        ({"bias": True}, None),
        ({"bias": "learns"}, "the gradient of a bias takes that of the outputs"),
        ({"dtype": torch.float16}, "exponentials need the range of bfloat16"),
        ({"dtype": torch.float32}, "exponentials need the range of bfloat16"),
        ({"terms": 2}, "outputs are to be one product, not the sum of 2"),
        ({"terms": 0}, "outputs are to be one product, not the sum of 0"),
        ({"few": 1 << 23}, "few outputs are formed sooner"),
    ],
    ids=str,
)
def test_where_it_serves(change: dict[str, Any], why: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "available", lambda device: True)
    monkeypatch.setattr(tokens, "FEW_OUTPUTS", change.pop("few", 0))
    dtype, bias = change.pop("dtype", BF16), change.pop("bias", None)
    hidden, weight, b, target = (t.to(dtype) if t.is_floating_point() else t for t in draw("cpu"))
    hidden, weight = (t.detach().requires_grad_() for t in (hidden, weight))
    given = None if bias is None else b.detach().requires_grad_(bias == "learns")
    terms = change.pop("terms", 1)
    extra = ((hidden[:, :4], weight[:, :4]),) if terms == 2 else ()
    options = {"gradients_of": ("logps",), "chunk_size": 16, "compiled": True, **change}
    loss = TokenStatistics(loss_fn=lambda scores, groups: -scores["count"][:, 0], **options)
    target = target if terms else target.clamp_max(hidden.shape[1] - 1)
    plan = loss.plan(Projection(hidden, weight if terms else None, given, extra), {"target": target})
    if why is None:
        assert plan.steps == ("ScaledExponentials",) and not plan.refusals
    else:
        assert "ScaledExponentials" not in plan.steps
        assert f"ScaledExponentials: {why}" in " ".join(plan.refusals)
