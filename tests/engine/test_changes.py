"""What changes between the steps of a call, what kinds of values functions may return, and what a first call leaves."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from chunked_embed import FlexChunkLoss, LossOutput, Needs, Projection, Step
from chunked_embed.engine import compile as steps
from chunked_embed.engine import plan as plans

M, H, V = 8, 6, 5


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


@pytest.fixture
def head():
    torch.manual_seed(0)
    x, w = randn(M, H), randn(V, H)
    return x, w, Projection(x, w), x @ w.T


def assert_same(found, expected, leaves):
    torch.testing.assert_close(found, expected)
    for mine, theirs in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(mine, theirs)


def cross_entropy(outputs, rows):
    return F.cross_entropy(outputs, rows["target"].long(), reduction="none")


# --- what changes between forward and backward -----------------------------------------------------------------------


class Scaled(FlexChunkLoss):
    """A loss whose backward forms the scores again."""

    def __init__(self, **options):
        super().__init__(couples_batch=True, compiled=False, chunk_size=3, **options)
        self.register_buffer("center", torch.ones((), dtype=torch.float64))
        self.scale = 1.0
        self.scales = [1.0]

    def score_fn(self, outputs, rows):
        return {"s": (outputs * self.center * self.scale * self.scales[0]).tanh().sum(1)}

    def loss_fn(self, scores, groups):
        return (scores["s"].sum(1) * torch.arange(len(scores["s"]))).logsumexp(0)


def coupled(outputs):
    return (outputs.tanh().sum(1) * torch.arange(M)).logsumexp(0)


def test_what_is_assigned_after_the_forward_pass_counts_from_the_next_call_on(head):
    x, w, projection, outputs = head
    loss = Scaled()
    found = loss(projection).loss
    loss.scale, loss.scales, loss.center = 2.0, [3.0], loss.center * 4
    assert_same(found, coupled(outputs), [x, w])
    assert_same(loss(projection).loss, coupled(24 * (x @ w.T)), [x, w])


@pytest.mark.parametrize("name", ["center", "scales"])
def test_what_changes_in_place_before_backward_is_refused(head, name):
    _, _, projection, _ = head
    loss = Scaled()
    found = loss(projection).loss
    loss.center.mul_(2) if name == "center" else loss.scales.append(1.0)
    with pytest.raises(RuntimeError, match=rf"expected Scaled\.{name} to stay as it was"):
        found.backward()


def test_what_only_a_method_beside_the_functions_changes_may_change(head):
    """A log; and a running mean that only the loss over scores reads, by ordinary autograd."""

    class Logged(Scaled):
        def __init__(self):
            super().__init__()
            self.seen = []
            self.register_buffer("mean", torch.zeros((), dtype=torch.float64))

        def forward(self, *arguments, **keywords):
            found = super().forward(*arguments, **keywords)
            self.seen.append(found.loss.item())
            self.mean.add_(1)
            return found

        def loss_fn(self, scores, groups):
            return super().loss_fn(scores, groups) + self.mean

    x, w, projection, outputs = head
    loss = Logged()
    assert_same(loss(projection).loss, coupled(outputs), [x, w])
    assert_same(loss(projection).loss, coupled(x @ w.T) + 1, [x, w])


def test_a_helper_of_the_functions_counts_as_they_do(head):
    class Helped(Scaled):
        def score_fn(self, outputs, rows):
            return super().score_fn(self.scaled(outputs), rows)

        def scaled(self, outputs):
            return outputs * self.shift

    _, _, projection, _ = head
    for name in ("center", "shift", "unread"):
        loss = Helped()
        loss.shift, loss.unread = torch.ones(()), torch.ones(())
        found = loss(projection).loss
        getattr(loss, name).mul_(2)
        if name == "unread":
            found.backward()
            continue
        with pytest.raises(RuntimeError, match=rf"expected Helped\.{name} to stay as it was"):
            found.backward()


def test_segment_ids_that_change_in_place_before_backward_are_refused(head):
    _, _, projection, _ = head
    segments = torch.arange(M) // 2
    found = Scaled()(projection, segments=segments).loss
    segments.zero_()
    with pytest.raises(RuntimeError, match="expected segments to stay as it was"):
        found.backward()


# --- prepared calls --------------------------------------------------------------------------------------------------


def test_a_prepared_call_runs_again_on_other_values(head):
    x, w, projection, outputs = head
    target = torch.arange(M) % V
    call = FlexChunkLoss(cross_entropy, compiled=False).prepare(projection, {"target": target})
    assert_same(call.run().loss + 2 * call.run().loss, 3 * F.cross_entropy(outputs, target), [x, w])
    with torch.no_grad():
        w.mul_(2)
        assert not call.run().loss.requires_grad
    assert_same(call.run().loss, F.cross_entropy(x @ w.T, target), [x, w])


def test_a_prepared_call_is_refused_where_its_plan_is_of_other_rows_or_gradients(head):
    _, w, projection, _ = head
    target = torch.arange(M) % V
    loss = FlexChunkLoss(cross_entropy, compiled=False)
    call = loss.prepare(projection, {"target": target})
    target[3] = -100
    with pytest.raises(ValueError, match=r"expected rows\['target'\] as it was in prepare\(\)"):
        call.run()
    with torch.no_grad():
        call = loss.prepare(projection, {"target": target})
    with pytest.raises(ValueError, match=r"expected the gradients that were wanted in prepare\(\)"):
        call.run()
    w.requires_grad_(False)
    call = loss.prepare(projection, {"target": target})
    w.requires_grad_()
    with pytest.raises(ValueError, match=r"expected the gradients that were wanted in prepare\(\)"):
        call.run()


# --- what functions return -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [lambda o: o.argmax(1) != 0, lambda o: o.argmax(1)])
def test_values_that_are_no_floats_have_a_mean(head, count):
    _, _, projection, outputs = head

    class OfGroups(FlexChunkLoss):
        def score_fn(self, outputs, rows):
            return {"s": count(outputs)}

        def loss_fn(self, scores, groups):
            return scores["s"][:, 0]

    expected = count(outputs).double().mean()
    for options in ({}, {"compiled": False}, {"chunk_size": 3, "compiled": False}):
        of_rows = FlexChunkLoss(lambda o, rows: count(o), **options)
        for loss in (of_rows, OfGroups(**options)):
            torch.testing.assert_close(loss(projection).loss, expected)


@pytest.mark.parametrize("options", [{}, {"couples_batch": True}])
@pytest.mark.parametrize("segments", [None, torch.arange(M) // 2])
def test_scores_that_are_no_floats_go_beside_those_that_train(head, options, segments):
    x, w, projection, outputs = head

    class Counted(FlexChunkLoss):
        def score_fn(self, outputs, rows):
            return {"s": outputs.tanh().sum(1), "hit": outputs.argmax(1) == 0}

        def loss_fn(self, scores, groups):
            return scores["s"].sum(1).square(), {"hit": scores["hit"].sum(1)}

    found = Counted(compiled=False, **options)(projection, segments=segments)
    groups = M if segments is None else M // 2
    assert_same(found.loss, outputs.tanh().sum(1).view(groups, -1).sum(1).square().mean(), [x, w])
    hits = (outputs.argmax(1) == 0).view(groups, -1).sum(1)
    torch.testing.assert_close(found.metrics["hit"].double(), hits.double())


def test_metrics_of_several_numbers_a_row_where_gradients_wait_for_backward(monkeypatch):
    monkeypatch.setattr(plans, "SMALL_BYTES", 0)
    torch.manual_seed(0)
    x, weight = randn(2, 4, H), torch.tensor([[0, 1, 0, 2], [3, 0, 1, 1.0]], dtype=torch.float64)

    def values(outputs, rows):
        return outputs.tanh().sum(1), {"first": outputs[:, :3], "best": outputs.argmax(1)}

    loss = FlexChunkLoss(values, compiled=False)
    assert loss.plan(Projection(x)).deferred
    found = loss(Projection(x), row_weight=weight)
    assert_same(found.loss, (x.tanh().sum(2) * weight).sum(), [x])
    torch.testing.assert_close(found.metrics["first"], torch.where(weight[..., None] != 0, x[..., :3], 0).detach())
    torch.testing.assert_close(found.metrics["best"], torch.where(weight != 0, x.argmax(2), 0))
    torch.testing.assert_close(loss(Projection(x)).metrics["first"], x[..., :3].detach())


# --- rows that count -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "ignored", "token"), [(torch.uint8, -100, 156), (torch.int8, 256, 0)])
def test_an_ignored_target_that_the_dtype_cannot_hold_ignores_none(dtype, ignored, token):
    torch.manual_seed(0)
    x, w = randn(3, H), randn(200, H)
    target = torch.tensor([token, 3, 4], dtype=dtype)
    found = FlexChunkLoss(cross_entropy, compiled=False, ignore_index=ignored)(Projection(x, w), {"target": target})
    assert_same(found.loss, F.cross_entropy(x @ w.T, target.long()), [x, w])


@pytest.mark.parametrize("stray", [-1, -5, -7])
@pytest.mark.parametrize("segments_per_group", [1, 2])
def test_no_segment_at_all(head, stray, segments_per_group):
    x, w, projection, _ = head

    class Sum(FlexChunkLoss):
        def score_fn(self, outputs, rows):
            return {"s": outputs.sum(1)}

        def loss_fn(self, scores, groups):
            return scores["s"].sum(1)

    loss = Sum(compiled=False, segments_per_group=segments_per_group)
    found = loss(projection, segments=torch.full((M,), stray)).loss
    assert found == 0
    assert all(not grad.any() for grad in torch.autograd.grad(found, [x, w]))


def test_means_of_groups_that_are_rows_leave_out_dropped_ones(head):
    _, _, projection, outputs = head
    target = torch.tensor([0, 1, -100, -100, -100, -100, -100, 2])

    class Each(FlexChunkLoss):
        def score_fn(self, outputs, rows):
            return {"s": outputs.sum(1)}

        def loss_fn(self, scores, groups):
            return scores["s"][:, 0], {"s": scores["s"][:, 0]}

    found = Each(compiled=False)(projection, {"target": target})
    expected = outputs.sum(1)[target != -100].mean()
    torch.testing.assert_close(found.loss, expected)
    torch.testing.assert_close(found.means["s"], expected.detach())


def test_what_a_metric_stands_for_stays_with_a_copy():
    counts = {"a": torch.tensor([1, 0, 2])}
    given = LossOutput(torch.tensor(1.0), {"a": torch.tensor([2.0, 0.0, 5.0])}, counts)
    copies = given._replace(loss=torch.tensor(2.0)), copy.copy(given), copy.deepcopy(given)
    for found in (*copies, pickle.loads(pickle.dumps(given))):
        torch.testing.assert_close(found.means["a"], torch.tensor(4.0))


# --- what a first call leaves ----------------------------------------------------------------------------------------


def test_a_first_call_of_few_rows_has_not_seen_all(head):
    x, w, projection, _ = head
    loss = FlexChunkLoss(lambda outputs, rows: outputs.sum(1) - outputs.mean(), compiled=False)
    loss(Projection(x[:1], w))
    with pytest.raises(ValueError, match="to give each row a value of its own"):
        loss(projection)

    scale = nn.Parameter(torch.ones((), dtype=torch.float64))
    loss = FlexChunkLoss(lambda outputs, rows: outputs.sum(1) * scale, compiled=False)
    loss(projection, {"target": torch.full((M,), -100)})
    with pytest.raises(ValueError, match="expected what learns to be an argument of loss_fn"):
        loss(projection, {"target": torch.zeros(M, dtype=torch.long)})


def test_a_first_call_of_one_group_has_not_seen_all(head):
    _, _, projection, _ = head

    class Centred(FlexChunkLoss):
        def score_fn(self, outputs, rows):
            return {"s": outputs.sum(1)}

        def loss_fn(self, scores, groups):
            return scores["s"][:, 0] - scores["s"].mean()

    loss = Centred(compiled=False)
    loss(projection, segments=torch.zeros(M, dtype=torch.long))
    with pytest.raises(ValueError, match="to give each group a value of its own"):
        loss(projection, segments=torch.arange(M) // 2)


def test_a_new_function_at_the_address_of_an_old_one_is_looked_at(head):
    _, _, projection, _ = head
    loss = FlexChunkLoss(lambda outputs, rows, act: act(outputs).sum(1), act=None, compiled=False)
    scale = nn.Parameter(torch.ones((), dtype=torch.float64))
    plain = lambda outputs: outputs.tanh()  # noqa: E731
    address = id(plain)
    loss.act = plain
    loss(projection)
    del plain
    loss.act = None
    for _ in range(100):
        learns = lambda outputs: outputs * scale  # noqa: E731
        if id(learns) == address:
            break
    else:
        pytest.skip("the address was not taken again")
    loss.act = learns
    with pytest.raises(ValueError, match="expected what learns to be an argument of loss_fn"):
        loss(projection)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_module_in_the_place_of_another_is_looked_at(head, compiled, monkeypatch):
    monkeypatch.setattr(steps, "BACKEND", "eager")
    _, _, projection, _ = head
    loss = FlexChunkLoss(lambda outputs, rows, act: act(outputs).sum(1), act=nn.Tanh(), compiled=compiled)
    loss(projection)
    loss.act = nn.ReLU()  # a submodule now, as the next is
    loss(projection)
    loss.act = nn.PReLU().double()
    with pytest.raises(ValueError, match="expected what learns to be an argument of loss_fn"):
        loss(projection)


def test_what_begins_to_learn_is_looked_at(head):
    _, _, projection, _ = head

    class Bent(nn.Module):
        def __init__(self):
            super().__init__()
            self.slope = nn.Parameter(torch.ones((), dtype=torch.float64), requires_grad=False)

        def values(self, outputs, rows):
            return (outputs * self.slope).sum(1)

    class Own(FlexChunkLoss):
        def loss_fn(self, outputs, rows):
            return self.bent.values(outputs, rows)

    class Parameter(FlexChunkLoss):
        def loss_fn(self, outputs, rows):
            return (outputs * self.slope).sum(1)

    for make in (lambda bent: FlexChunkLoss(bent.values, compiled=False), lambda bent: Own(compiled=False), None):
        bent = Bent()
        loss = Parameter(compiled=False) if make is None else make(bent)
        loss.bent, loss.slope = bent, bent.slope
        loss(projection)
        bent.slope.requires_grad_()
        with pytest.raises(ValueError, match="expected what learns to be an argument of loss_fn"):
            loss(projection)


def test_a_step_that_fails_to_say_what_it_needs_leaves_nothing_behind(head):
    _, _, projection, _ = head

    class Failing(Step):
        def needs(self, shape):
            raise KeyError("needs")

    class Loss(FlexChunkLoss):
        def loss_fn(self, outputs, rows):
            return outputs.sum(1)

        def make_step(self, projections):
            return Failing()

    loss = Loss(compiled=False)
    for _ in range(2):
        with pytest.raises(KeyError, match="needs"):
            loss(projection)


# --- steps alone -----------------------------------------------------------------------------------------------------


class SegmentEnergy(Step):
    """A number for each whole segment: the sum of its rows' outputs, squared."""

    row_wise = False

    def needs(self, shape):
        return Needs(rows="whole segments")

    def score(self, chunk):
        of_row, n = chunk.segments
        pooled = chunk.outputs().new_zeros(n, V).index_add_(0, of_row, chunk.outputs())
        return {"energy": pooled.square().sum(1)}, pooled

    def pull(self, chunk, kept, parts, upstream, into):
        of_row, _ = chunk.segments
        into.outputs((2 * kept * upstream["energy"][:, None]).index_select(0, of_row))


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("couples_batch", [False, True])
@pytest.mark.parametrize("segments_per_group", [1, 2])
def test_a_step_of_whole_segments_may_give_one_number_for_each(head, chunk_size, couples_batch, segments_per_group):
    x, w, projection, outputs = head

    class Energy(FlexChunkLoss):
        def make_step(self, projections):
            return SegmentEnergy()

        def loss_fn(self, scores, groups):
            return scores["energy"].sqrt().sum(1)

    segments = torch.tensor([1, 0, -1, 1, 3, 3, 0, 2])
    weight = torch.arange(1, 1 + 4 // segments_per_group, dtype=torch.float64)
    used = segments >= 0
    pooled = torch.zeros(4, V, dtype=torch.float64).index_add(0, segments[used], outputs[used])
    energy = pooled.square().sum(1).view(-1, segments_per_group)
    options = {"chunk_size": chunk_size, "couples_batch": couples_batch, "segments_per_group": segments_per_group}
    loss = Energy(compiled=False, **options)
    found = loss(projection, segments=segments, group_weight=weight).loss
    expected = (energy.sqrt().sum(1) * weight).sum()
    torch.testing.assert_close(found, expected)
    for mine, theirs in zip(
        torch.autograd.grad(found, [x, w]), torch.autograd.grad(expected, [x, w], retain_graph=True), strict=True
    ):
        torch.testing.assert_close(mine, theirs)
    assert_same(loss.scores(projection, segments=segments)["energy"].sqrt().sum(), energy.sqrt().sum(), [x, w])


def test_a_step_alone_that_refuses_has_nothing_in_its_place(head):
    _, _, projection, _ = head

    class Refusing(SegmentEnergy):
        def needs(self, shape):
            return Needs(refusal="not on Sundays")

    class Energy(FlexChunkLoss):
        def make_step(self, projections):
            return Refusing()

        def loss_fn(self, scores, groups):
            return scores["energy"].sum(1)

    loss = Energy(compiled=False)
    for _ in range(2):
        with pytest.raises(NotImplementedError, match="has no score_fn for where its step refuses: Refusing: not on"):
            loss(projection)
