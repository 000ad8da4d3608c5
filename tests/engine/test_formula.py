"""The snapshot that a loss's functions get as ``self``, its key, and what is noted of their reading."""

from __future__ import annotations

import gc
import time
import types
import weakref

import pytest
import torch
from step_parts import Loss
from torch import nn

from chunked_embed.engine.formula import UNREAD, Formula, Notes, assemble, keywords, line_of, notes_all
from chunked_embed.engine.values import MISSING, frozen


class Margin(Loss):
    limit = 3.0

    def __init__(self, margin=1.0):
        super().__init__()
        self.margin = margin
        self.register_buffer("w", torch.ones(2))
        self.act = nn.Tanh()

    def loss_fn(self, outputs, rows):
        return self.act(outputs * self.w).sum(1) * self.margin

    def other(self):
        return 1


def test_a_snapshot_keeps_what_was():
    loss = Margin(2.0)
    snapshot = Formula.snapshot(loss, {"extra": torch.tensor(1.0)})
    view = snapshot.view
    loss.margin, loss.w, loss.act = 5.0, torch.zeros(2), nn.ReLU()
    assert type(view) is Margin and view is not loss
    assert view.margin == 2.0 and view.extra == 1.0 and not hasattr(loss, "extra")
    assert torch.equal(view.w, torch.ones(2)) and isinstance(view.act, nn.Tanh)
    view.margin, view.w = 7.0, torch.full((2,), 7.0)
    assert loss.margin == 5.0 and torch.equal(loss.w, torch.zeros(2))


def test_functions_are_bound_to_the_view():
    loss = Margin(2.0)
    snapshot = Formula.snapshot(loss)
    loss.margin = 5.0
    x = torch.randn(3, 2)
    bound = snapshot.bind()
    torch.testing.assert_close(bound.loss_fn(x, {}), x.tanh().sum(1) * 2)
    assert bound.score_fn is None and bound.element_fn is None
    loss.loss_fn = types.MethodType(lambda self, o, r: o.sum(1) * self.margin, loss)
    replaced = Formula.snapshot(loss)
    loss.margin = 6.0
    torch.testing.assert_close(replaced.bind().loss_fn(x, {}), x.sum(1) * 5)


def test_columns_come_where_there_are_any():
    class Columns(Loss):
        def loss_fn(self, outputs, rows, columns=None):
            return 0 if columns is None else columns["c"]

    bound = Formula.snapshot(Columns()).bind()
    assert bound.loss_fn(None, {}) == 0 and bound.loss_fn(None, {}, {}) == 0
    assert bound.loss_fn(None, {}, {"c": 4}) == 4


def test_plain_functions_get_their_numbers():
    def loss_fn(scores, groups, beta):
        return ("loss", beta)

    def score_fn(outputs, rows, *, margin=0.0, **more):
        return ("score", margin, more)

    loss = Loss(beta=1.0, margin=2.0)
    loss._functions = {"loss_fn": loss_fn, "score_fn": score_fn}
    bound = Formula.snapshot(loss, {"t": 3}).bind()
    assert bound.loss_fn({}, {}) == ("loss", 1.0)
    assert bound.score_fn({}, {}) == ("score", 2.0, {"beta": 1.0, "t": 3})
    assert keywords(max, ("a",)) == ("a",)


def test_the_key_names_the_functions_and_no_number():
    key = lambda loss: Formula.snapshot(loss).key  # noqa: E731

    class Changed(Margin):
        def helper(self):
            return 1

    first = key(Changed(1.0))
    assert first == key(Changed(2.0)) and hash(first) == hash(key(Changed(2.0)))
    Changed.limit = 9.0
    assert first == key(Changed())
    assert first != key(Margin())
    Changed.helper = lambda self: 2
    second = key(Changed())
    assert first != second
    Changed.helper.__code__ = (lambda self: 3).__code__
    assert second != key(Changed())
    replaced = Changed()
    replaced.loss_fn = types.MethodType(lambda self, o, r: o, replaced)
    assert key(replaced) != key(Changed())

    plain = lambda o, r: o  # noqa: E731
    assert key(Loss(plain)) == key(Loss(plain)) != key(Loss(lambda o, r: o))
    method = Changed()
    assert key(Loss(method.loss_fn)) == key(Loss(method.loss_fn)) != key(Loss(Changed().loss_fn))


def test_reads_are_noted_with_their_lines():
    class Reading(Loss):
        given = 1.0
        absent_too = None

        @property
        def half(self):
            return self.whole / 2

        def loss_fn(self, outputs, rows):
            if getattr(self, "cap", None) is None:
                return outputs.sum(1) * self.half
            return outputs

    loss = Reading()
    loss.whole, loss.unread = 3.0, 4.0
    snapshot = Formula.snapshot(loss)
    assert notes_all(snapshot)
    notes = Notes(snapshot)
    snapshot.bind(notes.view).loss_fn(torch.ones(2, 2), {})
    line = Reading.half.fget.__code__.co_firstlineno + 2
    assert notes.names["whole"] == f"test_formula.py:{line}" == line_of(snapshot, "whole")
    assert set(notes.names) == {"whole", "given", "absent_too"}  # class attributes count as read
    assert set(notes.absent) == {"cap"}

    view = assemble(snapshot.functions, {"whole": 3.0}, ("cap",))
    torch.testing.assert_close(snapshot.bind(view).loss_fn(torch.ones(2, 2), {}), torch.full((2,), 3.0))
    assert not hasattr(view, "cap")
    with pytest.raises(RuntimeError, match=f"{UNREAD}: unread"):
        _ = view.unread


def of_all(loss):
    return vars(loss)


def test_what_cannot_be_noted():
    class Asking(Loss):
        def __getattr__(self, name):
            return super().__getattr__(name)

    class Whole(Loss):
        def loss_fn(self, outputs, rows):
            return self.__dict__

    class Elsewhere(Loss):
        def loss_fn(self, outputs, rows):
            return of_all(self)

    class Descriptor:
        def __get__(self, instance, owner):
            return instance and instance.__dict__["_d"]

    class Described(Loss):
        d = Descriptor()

    for cls in (Asking, Whole, Elsewhere, Described):
        assert not notes_all(Formula.snapshot(cls())), cls
    assert notes_all(Formula.snapshot(Margin()))


@pytest.mark.parametrize(
    "equal, other",
    [
        ((1, 1), 1.0),
        ((1, 1), True),
        ((0.0, 0.0), -0.0),
        ((float("nan"), float("nan")), 0.0),
        (([1, (2.0, "a")], [1, (2.0, "a")]), [1, (2.0, "b")]),
        (({"a": 1, "b": {2}}, {"a": 1, "b": {2}}), {"b": {2}, "a": 1}),
        ((torch.zeros(2), torch.ones(3)), 2),
        ((torch.relu, torch.relu), torch.tanh),
        ((torch.float32, torch.float32), torch.float64),
        ((types.SimpleNamespace(m=1), types.SimpleNamespace(m=1)), types.SimpleNamespace(m=2)),
        ((MISSING, MISSING), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_as_keys(equal, other):
    first, second = map(frozen, equal)
    assert first == second and hash(first) == hash(second) and first != frozen(other)


def test_keys_of_what_refers_to_itself():
    options = types.SimpleNamespace(m=1.0)
    options.me, options.more = options, [options]
    before = frozen(options)
    assert before == frozen(options)
    options.m = 2.0
    assert before != frozen(options)


def test_a_snapshot_keeps_nothing_alive():
    def local(mask):
        class Local(Loss):
            def loss_fn(self, outputs, rows):
                return outputs.sum(1) + mask[0]

        for loss in (Local(), Loss(lambda o, r: o.sum(1) + mask[0])):
            Formula.snapshot(loss).bind().loss_fn(torch.ones(2, 2), {})
        return weakref.ref(mask)

    seen = local(torch.zeros(3))
    gc.collect()
    assert seen() is None


def test_a_snapshot_is_cheap():
    """Some microseconds; the bound is for a busy machine."""
    loss, best = Margin(), 1.0
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(20):
            Formula.snapshot(loss)
        best = min(best, (time.perf_counter() - start) / 20)
    assert best < 60e-6
