"""``FlexChunkLoss`` as a user meets it: prepare, plan and run, what ``self`` is in a function, means of metrics."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from chunked_embed import FlexChunkLoss, Projection
from chunked_embed.engine import compile as cache

WAYS = pytest.mark.parametrize("compiled", [None, False, True])


@pytest.fixture(autouse=True)
def steps_are_traced(monkeypatch):
    monkeypatch.setattr(cache, "BACKEND", "eager")
    cache.clear()
    yield
    cache.clear()


class Margin(FlexChunkLoss):
    margin = 0.5  # a default of the class

    def loss_fn(self, outputs, rows):
        value = (self.margin + outputs).relu().sum(1)
        return value, {"value": value}


def head(m=6, h=4, v=9) -> Projection:
    torch.manual_seed(0)
    return Projection(*(torch.randn(n, h, dtype=torch.float64, requires_grad=True) for n in (m, v)))


def margin_loss(projection: Projection, margin: float) -> torch.Tensor:
    return (margin + projection.input @ projection.weight.T).relu().sum(1).mean()


# --- prepare, plan, run ----------------------------------------------------------------------------------------------


@WAYS
def test_a_prepared_call_has_a_plan_and_runs(compiled):
    x, loss = head(), Margin(compiled=compiled)
    prepared = loss.prepare(x)
    assert prepared.plan.used_rows == 6 and prepared.plan.products == 3
    assert str(prepared.plan) == str(loss.plan(x))
    loss.margin = 7.0  # belongs to the next call
    output = prepared.run()
    torch.testing.assert_close(output.loss, margin_loss(x, 0.5))
    torch.testing.assert_close(loss(x).loss, margin_loss(x, 7.0))


def test_a_prepared_call_follows_its_tensors():
    """As any differentiable call does: it reads them when it runs."""
    x = head()
    prepared = Margin().prepare(x)
    with torch.no_grad():
        x.weight.mul_(2)
    torch.testing.assert_close(prepared.run().loss, margin_loss(x, 0.5))


# --- what functions see ----------------------------------------------------------------------------------------------


@WAYS
def test_a_default_of_the_class_changes_on_the_instance(compiled):
    x, first, second = head(), Margin(compiled=compiled), Margin(compiled=compiled)
    for margin in (2.0, 3.0, -1.0):
        second.margin = margin
        torch.testing.assert_close(first(x).loss, margin_loss(x, 0.5))
        torch.testing.assert_close(second(x).loss, margin_loss(x, margin))


@WAYS
def test_a_method_that_is_replaced_is_the_one_that_runs(compiled, monkeypatch):
    x, loss = head(), Margin(compiled=compiled)
    torch.testing.assert_close(loss(x).loss, margin_loss(x, 0.5))
    monkeypatch.setattr(Margin, "loss_fn", lambda self, outputs, rows: self.margin * outputs.sum(1))
    total = (x.input @ x.weight.T).sum(1).mean()
    torch.testing.assert_close(loss(x).loss, 0.5 * total)
    loss.loss_fn = lambda outputs, rows: 3 * outputs.sum(1)
    torch.testing.assert_close(loss(x).loss, 3 * total)
    torch.testing.assert_close(Margin(compiled=compiled)(x).loss, 0.5 * total)
    monkeypatch.undo()
    torch.testing.assert_close(Margin(compiled=compiled)(x).loss, margin_loss(x, 0.5))


@WAYS
def test_numbers_of_one_call(compiled):
    x, loss = head(), Margin(compiled=compiled)
    given = torch.tensor(4.0, dtype=torch.float64)
    torch.testing.assert_close(loss(x, numbers={"margin": given}).loss, margin_loss(x, 4.0))
    torch.testing.assert_close(loss(x).loss, margin_loss(x, 0.5))
    assert loss.margin == 0.5


def test_what_a_function_writes_is_lost():
    class Counting(Margin):
        calls = 0

        def loss_fn(self, outputs, rows):
            self.calls += 1
            return super().loss_fn(outputs, rows)

    x, loss = head(), Counting()
    torch.testing.assert_close(loss(x).loss, margin_loss(x, 0.5))
    assert loss.calls == Counting.calls == 0


class Sides(FlexChunkLoss):
    """Each projection scored in its own way."""

    def __init__(self, gains, **options):
        super().__init__(separate_outputs=True, **options)
        self.gains = gains

    def score_fn(self, outputs, rows):
        return {"s": self.gains[self.projection] * outputs.sum(1)}

    def loss_fn(self, scores, groups):
        return sum(scores[name]["s"] for name in self.gains)[:, 0].square()


@WAYS
def test_a_score_knows_its_projection(compiled):
    sides, gains = {"a": head(), "b": head(v=5)}, {"a": 2.0, "b": -3.0}
    a, b = ((p.input @ p.weight.T).sum(1) for p in sides.values())
    torch.testing.assert_close(Sides(gains, compiled=compiled)(sides).loss, (2 * a - 3 * b).square().mean())


@WAYS
def test_plain_functions_get_the_numbers_that_they_name(compiled):
    def score_fn(outputs, rows, gain):
        return {"s": gain * outputs.sum(1)}

    def loss_fn(scores, groups, *, power, scale=2.0):
        return scale * scores["s"][:, 0].pow(power)

    x = head()
    loss = FlexChunkLoss(loss_fn, score_fn, gain=3.0, power=2, compiled=compiled)
    for loss.power in (2, 3):
        expected = 2 * (3 * (x.input @ x.weight.T).sum(1)).pow(loss.power).mean()
        torch.testing.assert_close(loss(x).loss, expected)


# --- metrics ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [False, True])
def test_means_are_over_the_rows_that_count(weight):
    class CrossEntropy(FlexChunkLoss):
        def loss_fn(self, outputs, rows):
            nll = F.cross_entropy(outputs, rows["target"], reduction="none")
            return nll, {"nll": nll, "right": outputs.argmax(1) == rows["target"], "wide": outputs}

    x, target = head(), torch.tensor([[0, -100, 3], [-100, -100, 8]])
    projection = Projection(x.input.view(2, 3, 4), x.weight)
    row_weight = torch.tensor([[2.0, 1.0, 0.0], [1.0, 1.0, 3.0]]) if weight else None
    output = CrossEntropy(chunk_size=2)(projection, {"target": target}, row_weight=row_weight)
    used = (target != -100) & (torch.ones(2, 3) if row_weight is None else row_weight).bool()
    z = (x.input @ x.weight.T).detach().view(2, 3, -1)
    nll = F.cross_entropy(z[used], target[used], reduction="none")
    assert output.metrics["nll"].shape == (2, 3) and not output.metrics["nll"][~used].any()
    torch.testing.assert_close(output.means["nll"], nll.mean())
    torch.testing.assert_close(output.means["right"], (z[used].argmax(-1) == target[used]).float().mean())
    torch.testing.assert_close(output.means["wide"], z[used].mean())


def test_means_of_groups_and_of_nothing():
    def loss_fn(scores, groups):
        return scores["s"][:, 0], {"s": scores["s"][:, 0]}

    loss = FlexChunkLoss(loss_fn, lambda outputs, rows: {"s": outputs.sum(1)})
    x = head()
    torch.testing.assert_close(loss(x).means["s"], (x.input @ x.weight.T).sum(1).mean().detach())
    output = Margin()(x, {"target": torch.full((6,), -100)})
    assert output.loss == 0 and output.means["value"] == 0


# --- a module --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda loss: pickle.loads(pickle.dumps(loss))])
def test_a_loss_that_has_run_can_be_copied(copied):
    x, loss = head(), Margin()
    loss(x)
    other = copied(loss)
    other.margin = 2.0
    torch.testing.assert_close(other(x).loss, margin_loss(x, 2.0))
    torch.testing.assert_close(loss(x).loss, margin_loss(x, 0.5))
