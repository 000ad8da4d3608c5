"""One graph for a loss and a row count, in any number of ragged batches; changing numbers recompile nothing."""

from __future__ import annotations

import random
import warnings

import pytest
import torch
import torch.nn.functional as F
from engine_zoo import CASES, CrossEntropy, make
from torch._dynamo.utils import counters

from chunked_embed import FlexChunkLoss, Projection
from chunked_embed.engine import compile as cache


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    """A fresh cache, and a backend that traces but generates no code: what is counted is graphs."""
    torch._dynamo.reset()
    cache.clear()
    counters.clear()
    monkeypatch.setattr(cache, "BACKEND", "eager")
    yield lambda: counters["stats"]["unique_graphs"]
    cache.clear()


def step(name, x, **options):
    CASES[name].call(CASES[name].loss(**options), x).loss.backward()


@pytest.mark.parametrize("wide", [False, True], ids=["dynamic rows", "fixed sizes"])
def test_twelve_losses_over_thirty_ragged_batches(graphs, monkeypatch, wide):
    if wide:
        monkeypatch.setattr("chunked_embed.engine.plan.NARROW", 0)
    assert len(CASES) >= 12
    sizes = random.Random(0).choices(range(2, 120), k=30)
    steps = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # falling back to eager warns
        for name, case in CASES.items():
            counts = []
            for batch, size in enumerate(sizes):
                before = graphs()
                step(name, make(name, m=size, seed=batch, dtype=torch.float32), chunk_size=64)
                counts.append(graphs() - before)
            # A grouped loss has two steps for each projection that it scores apart: scores, and their gradient.
            loss = case.loss()
            steps = 1 if loss._function("score_fn") is None else 3 if loss.separate_outputs else 2
            if name == "identity":
                steps = 2  # value in forward, gradient in backward
            # In "self" and "two_sided" the columns are the batch, too, and turn dynamic on each rung.
            coupled = name in ("self", "two_sided")
            assert sum(counts) <= 3 * steps * (4 if coupled else 1), (name, counts)
            assert coupled or sum(counts[20:]) == 0, (name, counts)


def test_numbers_that_change_recompile_nothing(graphs):
    x = make("cross_entropy", dtype=torch.float32)
    for scale in (1.0, 2, 0.3, 17.0):
        step("cross_entropy", x, scale=scale)
    loss = CrossEntropy()
    for scale in (3.0, 4.0):
        loss.scale = scale
        CASES["cross_entropy"].call(loss, x)
    assert graphs() == 1


def test_a_changed_number_counts(graphs):
    """The number is an argument of the step: no instance's value is baked into another's."""
    x = make("cross_entropy", dtype=torch.float32)
    first = CASES["cross_entropy"].call(CrossEntropy(1.0), x).loss
    second = CASES["cross_entropy"].call(CrossEntropy(5.0), x).loss
    logits = x["hidden"] @ x["weight"].T + x["bias"]
    weight = x["used"] / x["used"].sum()
    for loss, scale in ((first, 1.0), (second, 5.0)):
        expected = (F.cross_entropy(scale * logits, x["target"], reduction="none") * weight).sum()
        torch.testing.assert_close(loss, expected)


class Moody(FlexChunkLoss):
    def __init__(self, power="one", margin=1.0, **options):
        super().__init__(**options)
        self.power = power
        self.margin = margin

    def loss_fn(self, outputs, rows, hp):
        z = outputs if self.power == "one" else outputs.square()
        return (z * hp.margin).sum(1)


class Forgetful(FlexChunkLoss):
    def __init__(self, margin=1.0, **options):
        super().__init__(**options)
        self.margin = margin

    def loss_fn(self, outputs, rows, hp):
        return outputs.sum(1) * self.margin


class Listed(Moody):
    def __init__(self, **options):
        super().__init__(**options)
        self.layers = [1, 2]


def test_a_static_option_has_a_step_of_its_own(graphs):
    x = Projection(torch.randn(4, 3), torch.randn(5, 3))
    values = {power: Moody(power)(x).loss for power in ("one", "two")}
    z = x.input @ x.weight.T
    torch.testing.assert_close(values["one"], z.sum(1).mean())
    torch.testing.assert_close(values["two"], z.square().sum(1).mean())
    assert graphs() == 2


@pytest.mark.parametrize("compiled", [False, True])
def test_reading_a_number_from_self_is_refused(compiled):
    with pytest.raises(AttributeError, match=r"hp\.margin"):
        Forgetful(compiled=compiled)(Projection(torch.randn(4, 3)))


class Powered(FlexChunkLoss):
    static_numbers = ("power",)

    def __init__(self, power, **options):
        super().__init__(**options)
        self.power = power

    def loss_fn(self, outputs, rows, hp):
        assert not hasattr(hp, "power")
        for _ in range(self.power):  # a loop that only a Python number can end
            outputs = outputs * outputs
        return outputs.sum(1)


def test_a_static_number_is_read_from_self(graphs):
    x = torch.full((3, 2), 2.0)
    for power, value in ((1, 8.0), (2, 32.0), (1, 8.0)):
        assert Powered(power)(Projection(x)).loss.item() == value
    assert graphs() == 2
    with pytest.raises(ValueError, match="NaN"):
        Powered(float("nan"))(Projection(x))


def test_unhashable_options_are_refused():
    with pytest.raises(TypeError, match="layers"):
        Listed()(Projection(torch.randn(4, 3)))


def untraceable(outputs, rows, hp):
    if float(outputs.detach().sum()) > 1e9:  # depends on data: cannot be traced in one graph
        return outputs.sum(1)
    return outputs.mean(1)


def test_what_cannot_be_compiled_runs_eagerly_after_one_warning():
    loss, x = FlexChunkLoss(untraceable), torch.randn(6, 5)
    with pytest.warns(RuntimeWarning, match="could not be compiled") as seen:
        values = [loss(Projection(x)).loss for _ in range(3)]
    assert len([w for w in seen if "could not be compiled" in str(w.message)]) == 1
    torch.testing.assert_close(values[0], x.mean())


def test_without_a_compiler_the_numbers_are_the_same(monkeypatch):
    def no_compiler(*args):
        from torch._inductor.exc import InvalidCxxCompiler

        raise InvalidCxxCompiler

    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: no_compiler)
    x = make("cross_entropy")
    with pytest.warns(RuntimeWarning, match="does not work on this machine") as seen:
        for _ in range(2):
            output = CASES["cross_entropy"].call(CrossEntropy(), x)
        CASES["divergence"].call(CASES["divergence"].loss(), make("divergence"))
    assert len(seen) == 1
    torch.testing.assert_close(output.loss, CASES["cross_entropy"].reference(x))


def test_outside_torch_compile():
    x = make("cross_entropy", dtype=torch.float32)
    loss = CrossEntropy(compiled=False)

    def outer(hidden):
        return CASES["cross_entropy"].call(loss, x | {"hidden": hidden * 2}).loss + 1

    expected = torch.autograd.grad(outer(x["hidden"]), x["hidden"])[0]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*grad attribute of a Tensor that is not a leaf.*")  # dynamo's own
        found = torch.autograd.grad(torch.compile(outer, backend="eager")(x["hidden"]), x["hidden"])[0]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap, torch.func.jacrev])
def test_functional_transforms_are_refused(transform):
    loss = CrossEntropy(compiled=False)
    target, weight = torch.zeros(3, dtype=torch.long), torch.randn(5, 4)

    def function(hidden):
        return loss(Projection(hidden.reshape(3, 4), weight), {"target": target}).loss

    with pytest.raises(RuntimeError, match=r"torch\.func"):
        transform(function)(torch.randn(3, 4) if transform is not torch.func.vmap else torch.randn(2, 3, 4))


def test_export_is_refused():
    class Module(torch.nn.Module):
        def forward(self, x):
            return CrossEntropy(compiled=False)(Projection(x), {"target": torch.zeros(3, dtype=torch.long)}).loss

    with pytest.raises(RuntimeError, match="exported"):
        torch.export.export(Module(), (torch.randn(3, 4),))
