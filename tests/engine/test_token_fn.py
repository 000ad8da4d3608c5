"""Scores that are elementwise functions of token statistics: against ordinary autograd in float64, through plain
functions and through the kernels' steps (on a CPU by the kernels' plain twins)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from chunked_embed import FlexChunkLoss, Projection, TokenStatistics, tokens

H, V = 5, 23
LENGTHS = (9, 1, 7, 3)  # of the segments


class Penalised(TokenStatistics):
    """Several scores: of one statistic, of two, of a row that learns, a constant."""

    def __init__(self, beta: float = 0.3, **options: Any) -> None:
        super().__init__(("logps", "entropy"), **options)
        self.beta = beta

    def token_fn(self, statistics, rows):
        logps, lead = statistics["logps"], rows["reference"] - statistics["logps"]
        return {
            "loss": self.beta * (lead.expm1() - lead) - rows["advantage"] * logps,
            "spread": statistics["entropy"] * logps,
            "kl": (lead.expm1() - lead).detach(),
        }

    def loss_fn(self, scores, groups):
        return of_scores(scores["loss"][:, 0], scores["spread"][:, 0]), {"kl": scores["kl"][:, 0]}


def of_scores(loss: Tensor, spread: Tensor) -> Tensor:
    return (loss / 20).tanh() + (spread / 50).square()


class Ratio(TokenStatistics):
    """One score with a gradient, and a loss that reads a constant beside it."""

    def token_fn(self, statistics, rows):
        ratio = (statistics["logps"] - rows["reference"]).exp()
        return {"ratio": ratio, "far": (ratio > 2).detach().float()}

    def loss_fn(self, scores, groups):
        return (scores["ratio"] / 9).square()[:, 0] + scores["far"].detach()[:, 0]


class Problem:
    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        g = torch.Generator().manual_seed(0)
        ids = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
        self.segments = torch.cat([ids, torch.full((4,), -1)])[torch.randperm(len(ids) + 4, generator=g)]
        n = len(self.segments)
        self.hidden, self.weight = (
            (torch.randn(size, H, dtype=torch.float64, generator=g) / 2).to(dtype).requires_grad_() for size in (n, V)
        )
        self.rows = {
            "target": torch.randint(0, V, (n,), generator=g),
            "reference": -2 - torch.rand(n, dtype=torch.float64, generator=g),
            "advantage": torch.randn(n, dtype=torch.float64, generator=g),
        }
        if dtype != torch.float64:
            self.rows |= {name: self.rows[name].float() for name in ("reference", "advantage")}

    @property
    def call(self) -> tuple[Any, Any]:
        return Projection(self.hidden, self.weight), self.rows

    def truth(self) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """-> leaves in float64, log-probabilities and entropies."""
        leaves = {name: getattr(self, name).detach().double().requires_grad_() for name in ("hidden", "weight")}
        z = (leaves["hidden"] @ leaves["weight"].T).log_softmax(1)
        return leaves, z.gather(1, self.rows["target"][:, None])[:, 0], -(z.exp() * z).sum(1)

    def sums(self, value: Tensor) -> Tensor:
        used = self.segments >= 0
        return value.new_zeros(len(LENGTHS)).index_add(0, self.segments[used], value[used])


def penalised(x: Problem, advantage: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
    """-> leaves, the loss, the metric."""
    leaves, logps, entropy = x.truth()
    lead = x.rows["reference"].double() - logps
    kl = lead.expm1() - lead
    value = of_scores(x.sums(0.3 * kl - advantage * logps), x.sums(entropy * logps))
    return [*leaves.values(), advantage], value.mean(), x.sums(kl)


WAYS = [
    {},
    *({"chunk_size": size, "compiled": False} for size in (4, 100)),
    # Compilation takes seconds: where one slow case of a file is run, it is the other one.
    *(pytest.param({"chunk_size": n, "compiled": n > 1}, marks=pytest.mark.slow) for n in (1, 4)),
]


@pytest.mark.parametrize("how", WAYS)
def test_scores_of_segments(how):
    x = Problem()
    advantage = x.rows["advantage"].requires_grad_()
    out = Penalised(**how)(*x.call, segments=x.segments)
    leaves, loss, kl = penalised(x, advantage)
    torch.testing.assert_close(out.loss, loss, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(out.metrics["kl"], kl, rtol=1e-11, atol=1e-12)
    found = torch.autograd.grad(out.loss, [x.hidden, x.weight, advantage])
    for mine, theirs in zip(found, torch.autograd.grad(loss, leaves), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("chunk_size", [None, 5])
def test_each_row_a_group(chunk_size):
    x = Problem()
    loss = Penalised(chunk_size=chunk_size, compiled=False)
    found = torch.autograd.grad(loss(*x.call).loss, [x.hidden, x.weight])
    leaves, logps, entropy = x.truth()
    lead = x.rows["reference"] - logps
    value = of_scores(0.3 * (lead.expm1() - lead) - x.rows["advantage"] * logps, entropy * logps).mean()
    for mine, theirs in zip(found, torch.autograd.grad(value, list(leaves.values())), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("chunk_size", [None, 5])
def test_scores_for_code_behind(chunk_size):
    x = Problem()
    found = Penalised(chunk_size=chunk_size, compiled=False).scores(*x.call, segments=x.segments)
    assert found.keys() == {"loss", "spread", "kl"}
    value = of_scores(found["loss"][:, 0], found["spread"][:, 0]).mean()
    leaves, loss, _ = penalised(x, x.rows["advantage"])
    expected = torch.autograd.grad(loss, leaves[:2])
    for mine, theirs in zip(torch.autograd.grad(value, [x.hidden, x.weight]), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


# --- kernels' steps --------------------------------------------------------------------------------------------------


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of kernels are taken, whose plain twins run where there is no Triton."""
    monkeypatch.setattr(tokens, "FEW_OUTPUTS", 0)
    monkeypatch.setattr(tokens, "available", lambda device: True)
    monkeypatch.setattr("chunked_embed.kernels.linear_scores.available", lambda device: False)
    monkeypatch.setattr("chunked_embed.kernels.token_scores.available", lambda device: False)


STEPS = [("TokenKernel", torch.float32, 2e-5), ("ScaledExponentials", torch.bfloat16, 4e-3)]


@pytest.mark.parametrize("chunk_size", [4, 100])
@pytest.mark.parametrize(("step", "dtype", "tolerance"), STEPS)
@pytest.mark.usefixtures("kernels")
def test_behind_a_kernel(step, dtype, tolerance, chunk_size):
    x = Problem(dtype)
    advantage = x.rows["advantage"].requires_grad_()
    gradients_of = ("logps",) if step == "ScaledExponentials" else ("logps", "entropy")
    loss = Penalised(chunk_size=chunk_size, gradients_of=gradients_of)
    plan = loss.plan(*x.call, segments=x.segments)
    assert step in str(plan) and plan.products == (3 if chunk_size == 100 else 4)
    out = loss(*x.call, segments=x.segments)
    leaves, logps, entropy = x.truth()
    wide = advantage.detach().double().requires_grad_()
    lead = x.rows["reference"].double() - logps
    spread = entropy.detach() if step == "ScaledExponentials" else entropy
    value = of_scores(x.sums(0.3 * (lead.expm1() - lead) - wide * logps), x.sums(spread * logps)).mean()
    torch.testing.assert_close(out.loss.double(), value, rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad(out.loss, [x.hidden, x.weight, advantage])
    for mine, theirs in zip(found, torch.autograd.grad(value, [*leaves.values(), wide]), strict=True):
        assert (mine.double() - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize(("step", "dtype", "tolerance"), [("", torch.float64, 1e-10), *STEPS])
def test_groups_longer_than_a_chunk_of_one_score(step, dtype, tolerance, request):
    """The outputs are formed once: the step's functions say that the other score is constant."""
    if step:
        request.getfixturevalue("kernels")
    x = Problem(dtype)
    loss = Ratio(gradients_of=("logps",), chunk_size=4, compiled=None if step else False)
    plan = loss.plan(*x.call, segments=x.segments)
    assert (plan.ahead, plan.passes, plan.products) == ("ratio", 1, 3) and step in str(plan)
    found = torch.autograd.grad(loss(*x.call, segments=x.segments).loss, [x.hidden, x.weight])
    leaves, logps, _ = x.truth()
    value = (x.sums((logps - x.rows["reference"].double()).exp()) / 9).square().mean()
    for mine, theirs in zip(found, torch.autograd.grad(value, list(leaves.values())), strict=True):
        assert (mine.double() - theirs).norm() <= tolerance * theirs.norm()


# --- what it may be --------------------------------------------------------------------------------------------------


def focal(statistics, rows):
    return {"focal": -(1 - statistics["logps"].exp()).square() * statistics["logps"]}


def total(scores, groups):
    return scores["focal"].sum(1)


@pytest.mark.parametrize("chunk_size", [None, 4])
def test_a_plain_function_and_one_that_is_set_later(chunk_size):
    x = Problem()
    loss = TokenStatistics(token_fn=focal, loss_fn=total, chunk_size=chunk_size, compiled=False)
    _, logps, _ = x.truth()
    expected = -(1 - logps.exp()).square() * logps
    torch.testing.assert_close(loss(*x.call).loss, expected.mean())
    loss.token_fn = lambda statistics, rows: {"focal": statistics["logps"]}
    torch.testing.assert_close(loss(*x.call).loss, logps.mean())


@pytest.mark.parametrize("chunk_size", [None, 4])
def test_numbers_that_change(chunk_size):
    x = Problem()
    loss = Penalised(chunk_size=chunk_size, compiled=False)
    first = loss(*x.call, segments=x.segments).loss
    loss.beta = 3.0
    assert loss(*x.call, segments=x.segments).loss > first
    loss.beta = 0.3
    torch.testing.assert_close(loss(*x.call, segments=x.segments).loss, first)


def test_each_projection_by_its_name():
    class Sides(TokenStatistics):
        def token_fn(self, statistics, rows):
            return {"value": (2 if self.projection == "first" else 3) * statistics["logps"]}

        def loss_fn(self, scores, groups):
            return scores["first"]["value"][:, 0] - scores["second"]["value"][:, 0]

    x = Problem()
    projection, rows = x.call
    for chunk_size in (None, 4):
        loss = Sides(separate_outputs=True, chunk_size=chunk_size, compiled=False)
        torch.testing.assert_close(loss({"first": projection, "second": projection}, rows).loss, -x.truth()[1].mean())


@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("where", ["functions", "kernel"])
def test_refusals(where, chunk_size, request):
    if where == "kernel":
        request.getfixturevalue("kernels")
    x = Problem(torch.float32)
    learned = torch.ones(1, requires_grad=True)
    compiled = None if where == "kernel" and chunk_size else False

    def refused(token_fn: Any, message: str) -> None:
        loss = TokenStatistics(token_fn=token_fn, loss_fn=total, chunk_size=chunk_size, compiled=compiled)
        with pytest.raises(ValueError, match=message):
            loss(*x.call)

    refused(lambda s, rows: {"focal": s["logps"] - s["logps"].mean()}, "each row a value of its own")
    refused(lambda s, rows: {"focal": s["logps"] * learned}, "what learns to be an argument")
    refused(lambda s, rows: {"focal": s["logps"].sum()}, "one value per row")
    refused(lambda s, rows: s["logps"], "token_fn to return a dict of scores by name, got Tensor")
    refused(lambda s, rows: {"focal": s["logps"] + rows["reference"].mul_(2)}, "leave its arguments as they are")
    with pytest.raises(TypeError, match="token_fn to be callable or None"):
        TokenStatistics(token_fn="logps")


def test_a_score_fn_of_ones_own_goes_past_it():
    """And so it does past the statistics."""

    class Own(TokenStatistics):
        def score_fn(self, outputs, rows):
            return {"focal": outputs.sum(1)}

    x = Problem()
    loss = Own(token_fn=focal, loss_fn=total, chunk_size=4, compiled=False)
    torch.testing.assert_close(loss(*x.call).loss, (x.hidden @ x.weight.T).sum(1).mean())
    assert isinstance(loss, FlexChunkLoss)
