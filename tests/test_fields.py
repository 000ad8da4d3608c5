"""Annotated fields: the constructor, the checks, what help and repr show, and what a type checker is told."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
from torch import nn

from chunked_embed.checks import POSITIVE, UNIT
from chunked_embed.fields import KW_ONLY, Fields, choice, flag, integer, number


class Base(Fields, nn.Module):
    family: ClassVar[str] = "base"
    _: KW_ONLY
    temperature: float = number(1.0, POSITIVE, by_position=True)
    softcap: float | None = number(None, POSITIVE)
    ignore_index: int = integer(-100)


class Loss(Base):
    """A loss."""

    beta: float = number(0.5, UNIT, "share of the teacher")
    kernel: str = choice("linear", ("linear", "delta"))
    _: KW_ONLY
    detach: bool = flag(False, "no gradient through the mixture")
    weights: Sequence[float] | None = None

    def setup(self) -> None:
        self.register_buffer("seen", None)

    def check(self) -> None:
        super().check()
        if self.beta == 1 and self.kernel == "delta":
            raise ValueError(f'expected beta below 1 with kernel="delta", got {self.beta}')


class Own(Loss):
    def __init__(self, terms: Sequence[str], temperature: float = 2.0, **options: Any) -> None:
        super().__init__(temperature=temperature, **options)
        self.terms = tuple(terms)


def test_the_constructor():
    """Own fields, those of a base that go by position, then keywords."""
    names = ["beta", "kernel", "temperature", "detach", "weights", "softcap", "ignore_index"]
    assert list(inspect.signature(Loss).parameters) == list(Loss.fields) == names
    kinds = {name: p.kind is p.KEYWORD_ONLY for name, p in inspect.signature(Loss).parameters.items()}
    assert [name for name in names if kinds[name]] == names[3:]
    assert str(inspect.signature(Loss.__init__)).startswith("(self, beta: 'float' = 0.5")
    loss = Loss(0, "delta", 3, detach=True)
    assert (loss.beta, loss.kernel, loss.temperature, loss.detach, loss.softcap) == (0.0, "delta", 3.0, True, None)
    assert type(loss.beta) is float and loss.seen is None
    assert list(inspect.signature(Own).parameters) == ["terms", "temperature", "options"]
    assert Own(["a"], beta=0.2).beta == 0.2 and Own(["a"]).temperature == 2.0


def test_it_is_told():
    assert repr(Loss(0.3, softcap=2.0)) == "Loss(beta=0.3, kernel='linear', softcap=2.0)"
    assert Loss.__doc__ is not None and "Args:\n    beta: share of the teacher; a number in [0, 1]." in Loss.__doc__
    assert "detach: no gradient through the mixture." in Loss.__doc__
    assert "kernel: 'linear' or 'delta'." in Loss.__doc__

    class More(Loss):
        """A loss.

        Args:
            power: stands here.
        """

        power: float = number(2.0, POSITIVE)
        floor: float = number(0.0, doc="least value")

    options = ["floor: least value.", "power: stands here.", "others: those of ``Loss``."]
    assert More.__doc__ == "\n    ".join(["A loss.\n\nArgs:", *options]) + "\n"


def test_a_class_may_change_a_default():
    class Changed(Loss):
        beta = 0.25

    assert Changed().beta == 0.25 and list(Changed.fields) == list(Loss.fields) and Loss().beta == 0.5


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))])
def test_copies(copied):
    assert repr(copied(Loss(0.3))) == repr(Loss(0.3))


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: Loss(gamma=1.0), TypeError, r"expected options of Loss among \['beta', .*'gamma'"),
        (lambda: Loss(0.1, "linear", 1.0, True), TypeError, "too many positional"),
        (lambda: Loss(1.5), ValueError, r"expected beta to be a number in \[0, 1\], got 1.5"),
        (lambda: Loss("half"), TypeError, "beta"),
        (lambda: Loss(True), TypeError, "beta"),
        (lambda: Loss(None), TypeError, "beta"),
        (lambda: Loss(kernel="rbf"), ValueError, "kernel"),
        (lambda: Loss(detach="no"), TypeError, "detach"),
        (lambda: Loss(ignore_index=0.5), TypeError, "ignore_index"),
        (lambda: Loss(softcap=-1), ValueError, "or None"),
        (lambda: Loss(1.0, "delta"), ValueError, "below 1"),
    ],
)
def test_what_means_nothing_is_refused(make, kind, message):
    with pytest.raises(kind, match=message):
        make()


def test_attributes_are_checked_again():
    loss = Loss()
    loss.beta = 7
    with pytest.raises(ValueError, match="beta"):
        loss.check()


class Listed(Base):
    weights: Sequence[float] | None = None
    name: Any = None


def test_what_stays_is_not_checked_again():
    loss = Listed(weights=[1.0, 2.0])
    assert [loss.recheck() for _ in range(3)] == [True, False, False]
    for change in (
        lambda: setattr(loss, "temperature", 2.0),
        lambda: setattr(loss, "softcap", 3.0),
        lambda: loss.weights.append(3.0),
        lambda: loss.weights.__setitem__(0, 4.0),
        lambda: setattr(loss, "weights", (4.0,)),
    ):
        change()
        assert [loss.recheck() for _ in range(2)] == [True, False]
    for copied in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert [copied.recheck() for _ in range(2)] == [True, False]
    loss.temperature = -1.0
    for _ in range(2):
        with pytest.raises(ValueError, match="temperature"):
            loss.recheck()
    loss.temperature = True  # equal to one, and no number
    with pytest.raises(TypeError, match="temperature"):
        loss.recheck()


def test_what_may_change_unseen_is_checked_each_time():
    assert [loss.recheck() for loss in [Listed(name={"a": 1})] * 2] == [True, True]
    assert [loss.recheck() for loss in [Loss()] * 2] == [True, True]  # a check of the user's

    class Scheduled(Base):
        step = 0

        @property
        def softcap(self):
            return None if self.step == 0 else -1.0

        @softcap.setter
        def softcap(self, value):
            pass

    loss = Scheduled()
    loss.recheck()
    loss.step = 1
    with pytest.raises(ValueError, match="softcap"):
        loss.recheck()
