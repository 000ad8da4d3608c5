"""Numbers in a loss behave as numbers, however they are used and changed: compiled as uncompiled, and nothing stale."""

from __future__ import annotations

import abc
import dataclasses
import enum
import functools
import math
import types
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from step_parts import Loss, call, check, compilations, forget
from torch import nn

from chunked_embed.engine import compile as cache


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """A backend that traces and generates no code: what is tested is the trace, what is counted is graphs."""
    forget()
    monkeypatch.setattr(cache, "BACKEND", "aot_eager")
    yield
    forget()


def outputs(rows=4, columns=6, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def quiet():
    """Numbers that stay constants say so; tests of the words are apart."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*the chunk steps are compiled for each.*")
        yield


# --- ways to use a number ---------------------------------------------------------------------------------------------

ones = torch.ones
IDIOMS = {
    # arithmetic
    "times and plus": lambda m, x: (x * m + m).sum(1),
    "tensor to a power": lambda m, x: (x.abs() + 0.1).pow(m).sum(1),
    "number to a power": lambda m, x: torch.pow(m, x).sum(1),
    "square of one minus": lambda m, x: x.sum(1) * ((1 - m) ** 2),
    "remainder": lambda m, x: x.sum(1) * (m % 0.3),
    "reciprocal": lambda m, x: (x * (1 / m)).sum(1),
    "times a mean": lambda m, x: x.sum(1) * (x.detach().mean() * m),
    "sum of a list": lambda m, x: x.sum(1) * sum([m] * 2),
    "in a loop": lambda m, x: sum(x.roll(i, 1)[:, 0] * m for i in range(3)),
    "in place on a copy": lambda m, x: x.clone().mul_(m).sum(1),
    "temperature of a softmax": lambda m, x: (x / m).softmax(1)[:, 0],
    "soft cap": lambda m, x: (m * torch.tanh(x / m)).sum(1),
    "hinge": lambda m, x: torch.relu(m - x).sum(1),
    # Python
    "math.log": lambda m, x: (x + math.log(m)).sum(1),
    "math.sqrt and exp": lambda m, x: (x * math.sqrt(m) + math.exp(-m)).sum(1),
    "max": lambda m, x: (x * max(m, 0.1)).sum(1),
    "min": lambda m, x: (x * min(1.0, m)).sum(1),
    "round": lambda m, x: x.sum(1) * round(m * 4),
    "int of a share of the width": lambda m, x: x.topk(max(1, int(m * x.shape[1])), 1).values.sum(1),
    "is_integer": lambda m, x: x.sum(1) * (2 if m.is_integer() else 1),
    "isclose": lambda m, x: x.sum(1) * (1 if math.isclose(m, 0.5) else 2),
    "formatted": lambda m, x: {f"acc@{m}": x.sum(1)}[f"acc@{m}"],
    "looked up": lambda m, x: x.sum(1) * {0.5: 1.0, 0.9: 3.0}.get(m, 2.0),
    # branches
    "if positive": lambda m, x: (x * m if m > 0 else x).sum(1),
    "if zero": lambda m, x: (x if m == 0 else x * m).sum(1),
    "if not": lambda m, x: (x if not m else x * m).sum(1),
    "if in": lambda m, x: (x if m in (0.0, 1.0, 0.9) else x * m).sum(1),
    "if None": lambda m, x: (x if m is None else x.clamp_max(m)).sum(1),
    "if a float": lambda m, x: x.sum(1) * (m if isinstance(m, float) and m > 0.6 else 2),
    "asserted": lambda m, x: asserted(m) * x.sum(1),
    # a scalar argument of an operation
    "where": lambda m, x: torch.where(x > 0, m, x).sum(1),
    "clamp on both sides": lambda m, x: x.clamp(-m, m).sum(1),
    "clamp beside a constant": lambda m, x: x.clamp(m, 5.0).sum(1),
    "clamp_min": lambda m, x: x.clamp_min(m).sum(1),
    "add with alpha": lambda m, x: torch.add(x, x.sin(), alpha=m).sum(1),
    "addmm with beta": lambda m, x: torch.addmm(x, x, ones(x.shape[1], x.shape[1]), beta=m, alpha=1.0).sum(1),
    "lerp": lambda m, x: torch.lerp(x, x.sin(), m).sum(1),
    "quantile": lambda m, x: torch.quantile(x, m / 2, dim=1),
    "norm of an order": lambda m, x: torch.linalg.vector_norm(x, 1 + m, dim=1),
    "masked_fill": lambda m, x: x.masked_fill(x > 0, m).sum(1),
    "nan_to_num": lambda m, x: torch.nan_to_num(x, nan=m).sum(1),
    "logit": lambda m, x: torch.logit(x.sigmoid(), eps=m / 10).sum(1),
    # a scalar option of a function
    "huber": lambda m, x: F.huber_loss(x, torch.zeros_like(x), reduction="none", delta=m).sum(1),
    "smooth_l1": lambda m, x: F.smooth_l1_loss(x, torch.zeros_like(x), reduction="none", beta=m).sum(1),
    "softplus": lambda m, x: F.softplus(x, beta=m).sum(1),
    "leaky_relu": lambda m, x: F.leaky_relu(x, m).sum(1),
    "elu": lambda m, x: F.elu(x, alpha=m).sum(1),
    "threshold": lambda m, x: F.threshold(x, m, 0.0).sum(1),
    "label smoothing": lambda m, x: F.cross_entropy(
        x, torch.zeros(len(x), dtype=torch.long), reduction="none", label_smoothing=m / 10
    ),
    "margin_ranking_loss": lambda m, x: F.margin_ranking_loss(
        x[:, 0], x[:, 1], ones(len(x)), margin=m, reduction="none"
    ),
    "triplet_margin_loss": lambda m, x: F.triplet_margin_loss(x, x.sin(), x.cos(), margin=m, reduction="none"),
    "cosine_embedding_loss": lambda m, x: F.cosine_embedding_loss(
        x, x.cos(), -ones(len(x)), margin=m, reduction="none"
    ),
    "normalize with eps": lambda m, x: F.normalize(x, dim=1, eps=m).sum(1),
    "normalize with p": lambda m, x: F.normalize(x, p=1 + m, dim=1).sum(1),
    "layer_norm": lambda m, x: F.layer_norm(x, x.shape[1:], eps=m).square().sum(1),
    "pad": lambda m, x: F.pad(x, (0, 1), value=m).sum(1),
    "dropout that is off": lambda m, x: F.dropout(x, m / 2, training=False).sum(1),
    "dropout of which nothing is left": lambda m, x: (F.dropout(x, m / 2) * 0 + x * m).sum(1),
    # a tensor made of it
    "full": lambda m, x: x.sum(1) + torch.full((len(x),), m),
    "full_like": lambda m, x: (x * torch.full_like(x, m)).sum(1),
    "tensor of a list": lambda m, x: x[:, :2] @ torch.tensor([m, 1.0]),
    "linspace": lambda m, x: x @ torch.linspace(0, m, x.shape[1]),
    "as_tensor": lambda m, x: (x + torch.log(torch.as_tensor(m))).sum(1),
    "new_tensor": lambda m, x: (x * x.new_tensor(m)).sum(1),
    # changed where it is read
    "doubled in place": lambda m, x: (x * doubled(m) + m).sum(1),
}
VALUES = (0.5, 0.7, 0.9, 0.6, 0.8)


def asserted(m):
    assert 0 < m < 2
    return m


def doubled(m):
    m *= 2
    return m


class Idiom(Loss):
    def __init__(self, idiom, m):
        super().__init__()
        self.idiom = idiom
        self.m = m

    def loss_fn(self, outputs, rows):
        return IDIOMS[self.idiom](self.m, outputs)


@pytest.mark.slow
@pytest.mark.parametrize("idiom", IDIOMS)
def test_each_way_to_use_a_number(idiom, quiet):
    loss, x = Idiom(idiom, 0.0), outputs(6, 9)
    for value in VALUES:
        loss.m = value
        value_, metrics, grad = check(loss, x)
        leaf = x.clone().requires_grad_()
        plain = IDIOMS[idiom](value, leaf)
        torch.testing.assert_close(metrics["loss"], plain.detach(), rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(grad, torch.autograd.grad(plain.mean(), leaf)[0], rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(value_, plain.mean().detach(), rtol=2e-5, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("idiom", ["times and plus", "huber", "int of a share of the width", "if None", "math.log"])
def test_with_generated_code(idiom, quiet, monkeypatch):
    monkeypatch.setattr(cache, "BACKEND", "inductor")
    for value in VALUES[:4]:
        check(Idiom(idiom, value), outputs(6, 9))


# --- how often it is compiled ----------------------------------------------------------------------------------------


class Scaled(Loss):
    def __init__(self, m=0.5):
        super().__init__()
        self.m = m

    def loss_fn(self, outputs, rows):
        return (outputs * self.m).sum(1)


class TopK(Loss):
    def __init__(self, k=5):
        super().__init__()
        self.k = k

    def loss_fn(self, outputs, rows):
        return outputs.topk(self.k, 1).values.logsumexp(1)


@pytest.mark.parametrize("first", [0.3, np.float64(0.3), np.float32(0.3)], ids=lambda v: type(v).__name__)
def test_fifty_values_of_a_float(first):
    for i in range(50):
        check(Scaled(first + type(first)(i)), outputs())
    assert compilations() == 2


@pytest.mark.parametrize("start", [1, 5])
def test_fifty_values_of_an_int(start):
    x = outputs(3, 80)
    for k in range(start, start + 50):
        check(TopK(k), x)
    assert compilations() == 2


def test_an_int_that_is_computed_with():
    for m in (3, 4, -7, 0, 1, np.int64(5), 10**6):
        check(Scaled(m), outputs())
    assert compilations() == 2


def test_several_numbers_change_together():
    class Several(Loss):
        def loss_fn(self, outputs, rows):
            return (outputs.topk(self.k, 1).values * self.a + self.b).sum(1)

    loss = Several()
    for i in range(6):
        loss.a, loss.b, loss.k = 0.5 + i, 2.0 - i, 2 + i
        check(loss, outputs(4, 40))
    assert compilations() == 2


def test_what_can_be_promoted_is_beside_what_cannot(quiet):
    class Mixed(Loss):
        def loss_fn(self, outputs, rows):
            return (outputs * self.a).sum(1) * (1 if self.c > 0.05 else 2)

    loss = Mixed()
    for a, c in ((1.0, 0.1), (2.0, 0.1), (3.0, 0.1), (4.0, 0.0), (5.0, 0.0), (6.0, 0.1)):
        loss.a, loss.c = a, c
        check(loss, outputs())
    assert compilations() <= 4


def test_types_are_told_apart():
    for m in (1, True, 1.0, 0.0, -0.0, 0, False, float("nan"), float("inf"), float("nan")):
        check(Scaled(m), outputs())


def test_none_or_a_number():
    class Capped(Loss):
        cap = None

        def loss_fn(self, outputs, rows):
            return (outputs if self.cap is None else outputs.clamp_max(self.cap)).sum(1)

    loss = Capped()
    for cap in (None, 0.5, 0.7, None, 0.9, None, 1, 0.1):
        loss.cap = cap
        check(loss, outputs())
    assert compilations() == 4  # None, a float, floats, an int


def test_an_attribute_that_is_not_read_is_in_no_key():
    loss = Scaled()
    for epoch in range(5):
        loss.epoch, loss.history = epoch, [0] * epoch
        check(loss, outputs())
    assert compilations() == 1


def test_tensors_are_arguments():
    class Weighted(Scaled):
        def __init__(self):
            super().__init__()
            self.register_buffer("w", torch.ones(6))
            self.parts = [torch.ones(6)]

        def loss_fn(self, outputs, rows):
            return (outputs * self.w * self.parts[0]).sum(1) * self.m

    loss = Weighted()
    for i in range(4):
        check(loss, outputs())
        loss.w.add_(i)
        loss.parts[0].add_(1)
        if i == 2:
            loss.w, loss.parts = torch.randn(6), [torch.randn(6)]
    assert compilations() == 1


def test_numbers_of_one_call():
    for value in (0.1, 0.2, 0.3):
        found = check(Scaled(), outputs(), extra={"m": torch.tensor(value)})
        torch.testing.assert_close(found[1]["loss"], outputs().sum(1) * value)
    assert compilations() == 1


def test_two_instances_share_a_step():
    for m in (0.5, 2.0, 0.5, 3.0, 2.0):
        torch.testing.assert_close(check(Scaled(m), outputs())[1]["loss"], outputs().sum(1) * m)
    assert compilations() == 2


def test_outputs_that_are_overwritten():
    """A trial of a promotion runs on arguments of its own."""
    for m in (0.5, 0.7, 0.9):
        check(Scaled(m), outputs(), in_place=True)
    assert compilations() == 2


def test_what_stays_a_constant_says_so_once():
    loss = Idiom("if positive", 0.0)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for m in (0.5, 0.7, 0.9, 0.6, 0.8):
            loss.m = m
            check(loss, outputs())
            assert len(seen) == (0 if m in (0.5, 0.7) else 1)
    line = Idiom.loss_fn.__code__.co_firstlineno + 1
    assert f"Idiom.m (read at test_numbers.py:{line}) has taken 3 values" in str(seen[0].message)
    assert "numbers=" in str(seen[0].message)


def test_a_class_attribute_is_named_with_its_line():
    class Branching(Loss):
        m = 0.5

        def loss_fn(self, outputs, rows):
            return outputs.sum(1) * (2 if self.m > 0.6 else 1)

    loss = Branching()
    line = Branching.loss_fn.__code__.co_firstlineno + 1
    with pytest.warns(RuntimeWarning, match=rf"Branching\.m \(read at test_numbers\.py:{line}\)"):
        for m in (0.5, 0.7, 0.9):
            loss.m = m
            check(loss, outputs())


# --- where people keep numbers ---------------------------------------------------------------------------------------


class Options:
    def __init__(self, m):
        self.m = m


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


class ClassDefault(Loss):
    m = 0.5

    def loss_fn(self, outputs, rows):
        return (outputs * self.m).sum(1)


class Property(Loss):
    _t = 0.5

    @property
    def m(self):
        return 1 / self._t

    def loss_fn(self, outputs, rows):
        return (outputs * self.m).sum(1)


class Cached(Loss):
    t = 0.5

    @functools.cached_property
    def m(self):
        return 1 / self.t

    def loss_fn(self, outputs, rows):
        return (outputs * self.m).sum(1)


@dataclasses.dataclass
class Data(Loss):  # has an __eq__, so it has no hash
    m: float = 0.5
    k: int = 2

    def __post_init__(self):
        Loss.__init__(self)

    def loss_fn(self, outputs, rows):
        return (outputs * self.m).topk(self.k, 1).values.sum(1)


class Slotted(Loss):
    __slots__ = ("m",)

    def __init__(self):
        super().__init__()
        self.m = 0.5

    def loss_fn(self, outputs, rows):
        return (outputs * self.m).sum(1)


class Answering(Loss):
    def __init__(self):
        super().__init__()
        self.options = types.MappingProxyType({"m": 0.5})

    def __getattr__(self, name):
        if name != "options" and name in self.options:
            return self.options[name]
        return super().__getattr__(name)

    def loss_fn(self, outputs, rows):
        return (outputs * self.m).sum(1)


class Holding(Loss):
    """Reads something out of ``self.options``."""

    def __init__(self, options, read):
        super().__init__()
        self.options = options
        self.read = read

    def loss_fn(self, outputs, rows):
        return self.read(self.options, outputs).sum(1)


class Inherited(Scaled):
    def loss_fn(self, outputs, rows):
        return 2 * super().loss_fn(outputs, rows)


class Abstract(Scaled, abc.ABC):
    @abc.abstractmethod
    def further(self): ...


class Concrete(Abstract):
    def further(self):
        return self.m

    def loss_fn(self, outputs, rows):
        return super().loss_fn(outputs, rows) + self.further() * (1 if type(self) is Concrete else 3)


class Made(Scaled):
    def __new__(cls, m, **options):
        return super().__new__(cls)


class Writing(Scaled):
    calls = 0

    def loss_fn(self, outputs, rows):
        self.last = outputs.detach()
        self.calls += 1
        return super().loss_fn(outputs, rows)


class Having(Loss):
    def loss_fn(self, outputs, rows):
        cap = getattr(self, "cap", None)
        return (outputs if cap is None else outputs.clamp_max(cap)).sum(1) * (2 if hasattr(self, "twice") else 1)


class Whole(Loss):
    def loss_fn(self, outputs, rows):
        return outputs.sum(1) * (1 + sum(v for name, v in vars(self).items() if name.startswith("w_")))


def weights_of(loss):
    return sum(v for name, v in vars(loss).items() if name.startswith("w_"))


class WholeElsewhere(Loss):
    w_first = 0.0

    def loss_fn(self, outputs, rows):
        return outputs.sum(1) * (1 + weights_of(self))


class Modes(Loss):
    """Which attributes are read depends on another."""

    def __init__(self):
        super().__init__()
        self.mode, self.a, self.b = "one", 1.0, 2.0

    def loss_fn(self, outputs, rows):
        return (outputs * self.a).sum(1) if self.mode == "one" else (outputs * self.b).square().sum(1)


class ByRows(Loss):
    """Reads more where there are more rows than a trial has."""

    a, b = 1.0, 2.0

    def loss_fn(self, outputs, rows):
        return outputs.sum(1) * (self.extra if len(outputs) > 2 else 1)


class BySize(Loss):
    """Reads more for larger numbers, which a step for a symbol finds out late."""

    def __init__(self):
        super().__init__()
        self.k, self.z = 3, 2.0

    def loss_fn(self, outputs, rows):
        return outputs[:, : self.k].sum(1) * (self.z if self.k > 5 else 1)


class Closing(Loss):
    def __init__(self):
        super().__init__()
        self.m = 0.5
        self.transform = lambda x: x * self.m

    def loss_fn(self, outputs, rows):
        return self.transform(outputs).sum(1)


class Bounded(Loss):
    def __init__(self):
        super().__init__()
        self.m = 0.5
        self.transform = self.scaled

    def scaled(self, x):
        return x * self.m

    def loss_fn(self, outputs, rows):
        return self.transform(outputs).sum(1)


def attribute(name, *values):
    return [lambda loss, v=v: setattr(loss, name, v) for v in values]


def on_class(cls, name, *values):
    return [lambda loss, v=v: setattr(cls, name, v) for v in values]


CHANGES = {
    "class default, on the instance": (ClassDefault, attribute("m", 0.6, 0.7, 0.8)),
    "class default, on the class": (ClassDefault, on_class(ClassDefault, "m", 0.6, 0.7, 0.5)),
    "property": (Property, attribute("_t", 0.6, 0.7, 0.8)),
    "cached property": (Cached, attribute("t", 0.6, 0.7, 0.8)),
    "dataclass": (Data, [*attribute("m", 0.6, 0.7), *attribute("k", 3, 4)]),
    "slots": (Slotted, attribute("m", 0.6, 0.7, 0.8)),
    "__getattr__": (Answering, attribute("options", *(types.MappingProxyType({"m": m}) for m in (0.6, 0.7)))),
    "super": (Inherited, attribute("m", 0.6, 0.7, 0.8)),
    "abstract": (Concrete, attribute("m", 0.6, 0.7, 0.8)),
    "__new__": (lambda: Made(0.5), attribute("m", 0.6, 0.7)),
    "writes": (Writing, attribute("m", 0.6, 0.7)),
    "hasattr": (Having, [*attribute("cap", 0.3), *attribute("twice", 1), lambda loss: delattr(loss, "cap")]),
    "vars": (Whole, [*attribute("w_a", 1.0, 2.0), *attribute("w_b", 3.0)]),
    "vars in a helper": (WholeElsewhere, [*attribute("w_a", 1.0, 2.0), *attribute("w_b", 3.0)]),
    "modes": (
        Modes,
        [*attribute("mode", "two"), *attribute("b", 4.0), *attribute("mode", "one")],
    ),
    "more rows": (lambda: having(ByRows(), extra=2.0), attribute("extra", 3.0, 4.0)),
    "larger numbers": (BySize, [*attribute("k", 4, 5, 6), *attribute("z", 3.0), *attribute("k", 2)]),
    "closure over self": (Closing, attribute("m", 0.6, 0.7)),
    "method kept as an attribute": (Bounded, attribute("m", 0.6, 0.7)),
    "config object, its field": (
        lambda: Holding(Options(0.5), lambda o, x: x * o.m),
        [lambda loss, m=m: setattr(loss.options, "m", m) for m in (0.6, 0.7, 0.5)],
    ),
    "config object, another": (
        lambda: Holding(Options(0.5), READ),
        attribute("options", Options(0.6), Options(0.5), Options(0.7)),
    ),
    "list, changed in place": (
        lambda: Holding([0.5, 0.25], lambda o, x: x * o[0] * len(o)),
        [lambda loss: loss.options.append(1.0), lambda loss: loss.options.__setitem__(0, 2.0)],
    ),
    "dict, changed in place": (
        lambda: Holding({"a": 0.5}, lambda o, x: x * sum(o.values())),
        [lambda loss: loss.options.update(b=2.0), lambda loss: loss.options.pop("a")],
    ),
    "tuple": (lambda: Holding((0.5, 2), lambda o, x: x * o[0]), attribute("options", (0.6, 2), (0.7, 2))),
    "set": (lambda: Holding({1, 2}, lambda o, x: x * len(o)), [lambda loss: loss.options.add(3)]),
    "string": (lambda: Holding("a", lambda o, x: x if o == "a" else 2 * x), attribute("options", "b", "a")),
    "enum": (lambda: Holding(Colour.RED, lambda o, x: x * o.value), attribute("options", Colour.BLUE, Colour.RED)),
    "dtype": (
        lambda: Holding(torch.float32, lambda o, x: x.to(o)),
        attribute("options", torch.float64, torch.float32),
    ),
    "function": (lambda: Holding(torch.tanh, lambda o, x: o(x)), attribute("options", torch.relu, torch.sin)),
    "module, its option": (
        lambda: Holding(nn.LeakyReLU(0.1), lambda o, x: o(x)),
        [lambda loss, s=s: setattr(loss.options, "negative_slope", s) for s in (0.2, 0.3)],
    ),
    "array": (
        lambda: Holding(np.arange(6.0), lambda o, x: x * torch.as_tensor(o)),
        attribute("options", np.arange(6.0) + 1, np.arange(6.0) + 2),
    ),
}


def READ(options, x):
    return x * options.m


def having(loss, **attributes):
    for name, value in attributes.items():
        setattr(loss, name, value)
    return loss


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
def test_nothing_is_stale(name, quiet):
    make, changes = CHANGES[name]
    loss, x = make(), outputs()
    check(loss, x)
    for change in changes:
        change(loss)
        check(loss, x)
        check(loss, x)  # and once more, from the cache


def test_a_list_that_changed_and_another_like_it_was():
    """The first list's step must not be traced again with what that list holds now."""
    read = lambda o, x: x * o[0]  # noqa: E731
    first = Holding([0.5], read)
    check(first, outputs())
    first.options[0] = 3.0
    check(first, outputs())
    found = check(Holding([0.5], read), outputs())
    torch.testing.assert_close(found[1]["loss"], outputs().sum(1) * 0.5)


def test_what_a_function_writes_is_lost():
    loss = Writing()
    for _ in range(3):
        check(loss, outputs())
    assert loss.calls == 0 and not hasattr(loss, "last")
    assert compilations() == 1


def test_a_trial_draws_no_numbers():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    check(Idiom("times and plus", 0.5), outputs())
    check(Idiom("times and plus", 0.6), outputs())
    torch.testing.assert_close(torch.rand(2), expected)


# --- functions that are replaced -------------------------------------------------------------------------------------


def test_a_method_is_replaced_on_the_class():
    class Replaced(Scaled):
        pass

    loss = Replaced()
    check(loss, outputs())
    for function in (lambda self, o, r: o.sum(1) * 2, lambda self, o, r: o.sum(1) * 3):
        Replaced.loss_fn = function
        torch.testing.assert_close(check(loss, outputs())[1]["loss"], function(loss, outputs(), {}))
    del Replaced.loss_fn
    torch.testing.assert_close(check(loss, outputs())[1]["loss"], outputs().sum(1) * 0.5)


def test_a_helper_and_its_code_are_replaced():
    class Helped(Loss):
        def loss_fn(self, outputs, rows):
            return self.helper(outputs)

        def helper(self, x):
            return x.sum(1)

    loss = Helped()
    check(loss, outputs())
    Helped.helper.__code__ = (lambda self, x: x.sum(1) * 2).__code__  # as a notebook's autoreload does
    torch.testing.assert_close(check(loss, outputs())[1]["loss"], outputs().sum(1) * 2)


def test_a_method_is_replaced_on_the_instance():
    loss = Scaled()
    check(loss, outputs())
    loss.loss_fn = types.MethodType(lambda self, o, r: (o * self.m).sum(1) * 3, loss)
    for m in (0.5, 0.7, 0.9):
        loss.m = m
        torch.testing.assert_close(check(loss, outputs())[1]["loss"], outputs().sum(1) * m * 3)
    assert compilations() == 3  # another step, and that with a promoted number


# --- plain functions -------------------------------------------------------------------------------------------------


def scaled(outputs, rows, margin, k=3):
    return (outputs.topk(k, 1).values * margin).sum(1)


def capped(outputs, rows, cap=None):
    return (outputs if cap is None else outputs * cap).sum(1)


def test_plain_functions_take_numbers_by_keyword():
    loss = Loss(scaled, margin=0.5, k=2)
    for i in range(8):
        loss.margin, loss.k = 0.5 + i, 2 + i
        check(loss, outputs(4, 20))
    assert compilations() == 2


def test_plain_functions_with_options():
    loss = Loss(capped, cap=None)
    for cap in (None, 0.5, 0.7, None, 0.9):
        loss.cap = cap
        check(loss, outputs())
    assert compilations() == 3


def test_partials_and_methods():
    for function in (functools.partial(capped, cap=2.0), functools.partial(capped, cap=3.0), Scaled(0.5).loss_fn):
        check(Loss(function), outputs())


def test_the_row_arguments_count():
    class Targets(Loss):
        m = 2.0

        def loss_fn(self, outputs, rows):
            return outputs.gather(1, rows["target"][:, None])[:, 0] * self.m

    for seed in range(3):
        target = torch.randint(6, (4,), generator=torch.Generator().manual_seed(seed))
        found = call(Targets(), outputs(), rows={"target": target})
        torch.testing.assert_close(found[1]["loss"], outputs()[torch.arange(4), target] * 2)
    assert compilations() == 1
