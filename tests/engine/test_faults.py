"""Ways in which a loss could be wrong without a word: kept outputs, saved tensors, modes around a call, randomness,
what a call leaves behind, stray ids, ignored targets."""

from __future__ import annotations

import gc
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from engine_zoo import CASES, gradients, make
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from chunked_embed import FlexChunkLoss, LossOutput, Projection, linear_logps
from chunked_embed.engine import compile as cache

ALL = pytest.mark.parametrize("name", list(CASES))
M, H, V = 8, 6, 4


@pytest.fixture
def steps_are_traced(monkeypatch):
    """Compiled steps without generated code."""
    monkeypatch.setattr(cache, "BACKEND", "aot_eager")
    cache.clear()
    yield
    cache.clear()


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def call(name: str, x: dict, **options) -> LossOutput:
    return CASES[name].call(CASES[name].loss(**options), x)


def assert_same(found, expected, leaves, **tolerance) -> None:
    torch.testing.assert_close(found, expected, **tolerance)
    for mine, theirs in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(mine, theirs, **tolerance)


# --- outputs that are kept for backward ------------------------------------------------------------------------------


class Contrast(FlexChunkLoss):
    """Two projections, scored one after the other, and a loss over the batch."""

    def __init__(self, **options):
        super().__init__(couples_batch=True, separate_outputs=True, **options)

    def score_fn(self, outputs, rows):
        return {"s": outputs.tanh().sum(1)}

    def loss_fn(self, scores, groups):
        return (scores["a"]["s"] - scores["b"]["s"])[:, 0].logsumexp(0)


def two_sides(**changes):
    torch.manual_seed(0)
    x = {"xa": randn(M, H), "xb": randn(M, H), "wa": randn(V, H), "wb": randn(V, H)} | changes
    sides = {"a": Projection(x["xa"], x["wa"]), "b": Projection(x["xb"], x["wb"])}
    a, b = ((x[f"x{side}"] @ x[f"w{side}"].T).tanh().sum(1) for side in "ab")
    return sides, a, b, list(x.values())


@pytest.mark.parametrize("chunk_size", [None, 3, M])
@pytest.mark.parametrize("compiled", [None, False])
def test_each_projection_keeps_its_own_outputs(chunk_size, compiled):
    sides, a, b, leaves = two_sides()
    loss = Contrast(chunk_size=chunk_size, compiled=compiled)
    assert loss.plan(sides).keeps_outputs == (chunk_size != 3)
    assert_same(loss(sides).loss, (a - b).logsumexp(0), leaves)


@pytest.mark.parametrize("chunk_size", [None, 3, M])
def test_each_projection_keeps_its_own_outputs_for_scores(chunk_size):
    sides, a, b, leaves = two_sides()
    scores = Contrast(chunk_size=chunk_size, compiled=False).scores(sides)
    assert_same((scores["a/s"] * scores["b/s"]).sum(), (a * b).sum(), leaves)


def test_outputs_that_are_kept_are_not_the_users():
    """A score that is the outputs themselves, changed by its owner between forward and backward."""

    class Own(FlexChunkLoss):
        def score_fn(self, outputs, rows):
            return {"s": outputs[:, 0]}

    x, w = randn(M, H), randn(1, H)
    scores = Own(compiled=False).scores(Projection(x, w))
    scores["s"].detach().zero_()
    (grad,) = torch.autograd.grad(scores["s"].sum(), x)
    torch.testing.assert_close(grad, w.expand_as(x))


# --- saved tensors ---------------------------------------------------------------------------------------------------


class Once:
    """Saved-tensor hooks that give each tensor back one time, as recomputing and offloading ones do."""

    def __init__(self) -> None:
        self.held: list[torch.Tensor | None] = []
        self.hooks = saved_tensors_hooks(self.pack, self.unpack)

    def pack(self, tensor: torch.Tensor) -> int:
        self.held.append(tensor)
        return len(self.held) - 1

    def unpack(self, n: int) -> torch.Tensor:
        tensor, self.held[n] = self.held[n], None
        assert tensor is not None, "saved tensors were read twice"
        return tensor


@ALL
@pytest.mark.parametrize("compiled", [None, False])
def test_saved_tensors_are_read_once(name, compiled):
    x = make(name)
    with Once().hooks:
        found = call(name, x, compiled=compiled, chunk_size=None if compiled is None else 5).loss
    expected = CASES[name].reference(x)
    torch.testing.assert_close(found, expected)
    for mine, theirs in zip(gradients(found, x), gradients(expected, x), strict=True):
        torch.testing.assert_close(mine, theirs)


@ALL
def test_inside_a_checkpoint(name):
    x = make(name)
    found = checkpoint(lambda: call(name, x, compiled=False, chunk_size=5).loss, use_reentrant=False)
    expected = CASES[name].reference(x)
    torch.testing.assert_close(found, expected)
    for mine, theirs in zip(gradients(found, x), gradients(expected, x), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("compiled", [None, False])
def test_scores_inside_a_checkpoint(compiled):
    torch.manual_seed(0)
    hidden, weight, target = randn(M, H), randn(V, H), torch.randint(0, V, (M,))

    def logps():
        return linear_logps(hidden, weight, target, compiled=compiled).logps

    expected = (hidden @ weight.T).log_softmax(1)[torch.arange(M), target]
    assert_same(checkpoint(logps, use_reentrant=False).square().sum(), expected.square().sum(), [hidden, weight])


# --- modes and hooks around a call -----------------------------------------------------------------------------------


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


AROUND = {
    "saved-tensor hooks": torch.autograd.graph.save_on_cpu,
    "dispatch mode": Watching,
    "counted": lambda: FlopCounterMode(display=False),
}


@pytest.mark.slow
@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("name", ["cross_entropy", "preference", "ranked_dense"])
def test_what_surrounds_the_first_call_does_not_stay(name, around, steps_are_traced):
    """It may run uncompiled inside. Outside it is compiled afterwards, as if nothing had been."""
    from torch._dynamo.utils import counters

    x = make(name)
    expected = CASES[name].reference(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with AROUND[around]():
            inside = call(name, x, compiled=True, chunk_size=7).loss
            within = gradients(inside, x)
        counters.clear()
        outside = call(name, x, compiled=True, chunk_size=7).loss
        after = gradients(outside, x)
    assert counters["stats"]["unique_graphs"] > 0
    torch.testing.assert_close(inside, expected)
    torch.testing.assert_close(outside, expected)
    for mine, again, theirs in zip(within, after, gradients(expected, x), strict=True):
        torch.testing.assert_close(mine, theirs)
        torch.testing.assert_close(again, theirs)


@pytest.mark.parametrize("chunk_size", [None, 4])
def test_flops_are_those_of_the_plan(chunk_size):
    hidden, weight = randn(M, H), randn(V, H)
    loss = FlexChunkLoss(lambda outputs, rows: outputs.square().sum(1), compiled=False, chunk_size=chunk_size)
    products = loss.plan(Projection(hidden, weight)).products
    loss(Projection(hidden, weight))  # the functions have been looked at
    with FlopCounterMode(display=False) as counted:
        loss(Projection(hidden, weight)).loss.backward()
    assert counted.get_total_flops() == products * 2 * M * H * V == 3 * 2 * M * H * V


# --- random numbers --------------------------------------------------------------------------------------------------


def dropped(outputs, rows):
    return F.dropout(outputs, 0.5).sum(1)


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_a_row_wise_loss_may_draw(chunk_size):
    """It runs once: linear in the input, the loss is the product of input and gradient."""
    torch.manual_seed(0)
    x, w = randn(M, H), randn(V, H).detach()
    out = FlexChunkLoss(dropped, chunk_size=chunk_size, compiled=False)(Projection(x, w)).loss
    (grad,) = torch.autograd.grad(out, x)
    torch.testing.assert_close(out.detach(), (grad * x).sum().detach())


@pytest.mark.parametrize("options", [{}, {"chunk_size": 3}, {"couples_batch": True}])
def test_scores_may_not_draw(options):
    class Drawing(FlexChunkLoss):
        def score_fn(self, outputs, rows):
            return {"s": dropped(outputs, rows)}

        def loss_fn(self, scores, groups):
            return scores["s"][:, 0]

    x, w = randn(M, H), randn(V, H)
    loss = Drawing(compiled=False, **options)
    for scored in (loss, loss.scores):
        with pytest.raises(ValueError, match="score_fn to give the same values when it runs again"):
            scored(Projection(x, w))


def test_a_group_may_draw():
    class Drawing(FlexChunkLoss):
        def score_fn(self, outputs, rows):
            return {"s": outputs.sum(1)}

        def loss_fn(self, scores, groups):
            return F.dropout(scores["s"], 0.5)[:, 0]

    torch.manual_seed(0)
    x, w = randn(M, H), randn(V, H).detach()
    out = Drawing(compiled=False)(Projection(x, w)).loss
    (grad,) = torch.autograd.grad(out, x)
    torch.testing.assert_close(out.detach(), (grad * x).sum().detach())


# --- what a call leaves behind ---------------------------------------------------------------------------------------


def masked_by(mask):
    return lambda outputs, rows: (outputs * mask).sum(1)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [None, False, True])
def test_a_closure_does_not_keep_its_batch(compiled, steps_are_traced):
    """Made anew in each step, around that step's mask: some may stay compiled, and none keeps more than that."""
    alive, x, w = [], randn(M, H), randn(V, H)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for n in range(30):
            mask = torch.full((V,), float(n), dtype=torch.float64)
            alive.append(weakref.ref(mask))
            loss = FlexChunkLoss(masked_by(mask), compiled=compiled)
            assert_same(loss(Projection(x, w)).loss, (x @ w.T * mask).sum(1).mean(), [x, w])
    del mask, loss
    gc.collect()
    assert sum(ref() is not None for ref in alive) <= (10 if compiled else 0)
    assert len(told) == (1 if compiled else 0)
    assert all("once, at module level" in str(warning.message) for warning in told)


@pytest.mark.slow
@ALL
@pytest.mark.parametrize("compiled", [None, False])
def test_a_loss_does_not_keep_its_batches(name, compiled):
    loss, alive = CASES[name].loss(compiled=compiled), []
    for m in range(5, 50):  # a layout each
        x = make(name, m=m)
        CASES[name].call(loss, x).loss.backward()
        alive += [weakref.ref(t) for t in x.values()]
    del x
    gc.collect()
    assert not any(ref() is not None for ref in alive)


# --- ids and targets -------------------------------------------------------------------------------------------------


class Sums(FlexChunkLoss):
    def score_fn(self, outputs, rows):
        return {"s": outputs.sum(1)}

    def loss_fn(self, scores, groups):
        return scores["s"][:, 0]


@pytest.mark.parametrize("stray", [9, 10**7, 2**40, 2**62])
@pytest.mark.parametrize("told", [False, True])
def test_a_stray_segment_id_costs_nothing(stray, told):
    """A hash, say, or the id of a document in a corpus: nothing is made of its size."""
    segments = torch.tensor([0, 1, 2, 3, 4, 5, 5, stray])
    groups = {"label": torch.ones(6)} if told else None
    with pytest.raises(ValueError, match=f"expected segment ids .*got (id )?{stray} among"):
        Sums(compiled=False)(Projection(randn(M, H), randn(V, H)), segments=segments, groups=groups)


def test_an_infinite_group_is_infinite():
    class Infinite(Sums):
        def loss_fn(self, scores, groups):
            return torch.where(groups["which"] == 1, torch.inf, scores["s"][:, 0])

    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        x, w = (t.detach().to(dtype).requires_grad_() for t in (randn(M, H), randn(V, H)))
        which = torch.arange(M)
        out = Infinite(compiled=False)(Projection(x, w), groups={"which": which})
        assert out.loss == torch.inf


class CrossEntropy(FlexChunkLoss):
    """As a newcomer writes it."""

    def loss_fn(self, outputs, rows):
        hit = torch.arange(outputs.shape[1]) == rows["target"][:, None]
        return outputs.logsumexp(1) - torch.where(hit, outputs, 0).sum(1)


class OfLabels(CrossEntropy):
    def __init__(self, **options):
        super().__init__(targets=("label",), ignore_index=-1, **options)

    def loss_fn(self, outputs, rows):
        return super().loss_fn(outputs, {"target": rows["label"]})


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_ignored_targets_count_for_nothing(chunk_size):
    torch.manual_seed(0)
    x, w, target = randn(M, H), randn(V, H), torch.randint(0, V, (M,))
    target[1:4] = -100
    out = CrossEntropy(chunk_size=chunk_size, compiled=False)(Projection(x, w), {"target": target})
    assert_same(out.loss, F.cross_entropy(x @ w.T, target), [x, w])
    label = torch.where(target == -100, -1, target)
    out = OfLabels(chunk_size=chunk_size, compiled=False)(Projection(x, w), {"label": label})
    assert_same(out.loss, F.cross_entropy(x @ w.T, target), [x, w])


@pytest.mark.parametrize(("loss", "name", "label"), [(CrossEntropy, "target", -1), (OfLabels, "label", -100)])
def test_another_label_than_the_ignored_one_is_no_target(loss, name, label):
    target = torch.tensor([0, 1, 2, 3, 0, 1, 2, label])
    with pytest.raises(ValueError, match=rf"rows\['{name}'\] in \[0, 4\) .*got 1 outside"):
        loss(compiled=False)(Projection(randn(M, H), randn(V, H)), {name: target})


def test_all_targets_ignored_is_zero():
    x, w = randn(M, H), randn(V, H)
    out = CrossEntropy(compiled=False)(Projection(x, w), {"target": torch.full((M,), -100)})
    assert out.loss == 0
    assert not any(grad.any() for grad in torch.autograd.grad(out.loss, [x, w]))
