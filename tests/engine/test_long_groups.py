"""Groups longer than a chunk: the gradient of one score is taken by segment, before the small loss says its factor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from chunked_embed import FlexChunkLoss, Projection, Step
from chunked_embed.engine import plan as plans
from chunked_embed.engine.chunk import Chunk
from chunked_embed.engine.gradients import Gradients

H, V = 5, 11
LENGTHS = (9, 7, 1, 2, 0, 12, 3, 0, 0, 0, 2, 1)  # of the segments, two to a pair
PAIRS = len(LENGTHS) // 2
CHUNKS = pytest.mark.parametrize("chunk_size", [1, 3, 5, 100])


@dataclass
class Problem:
    """Pairs of completions: rows out of order, some of none."""

    dtype: torch.dtype = torch.float64
    leaves: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(0)
        ids = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
        ids = torch.cat([ids, torch.full((6,), -1)])
        self.segments = ids[torch.randperm(len(ids), generator=g)]
        n = len(ids)
        self.target = torch.randint(0, V, (n,), generator=g)
        shapes = {"hidden": (n, H), "weight": (V, H), "bias": (V,), "gain": (n,), "shift": (V,), "margin": (PAIRS,)}
        shapes |= {"down": (2, H), "up": (V, 2), "other": (n, H - 2), "other_weight": (V, H - 2)}
        for name, shape in shapes.items():
            self.leaves[name] = torch.randn(*shape, dtype=torch.float64, generator=g).to(self.dtype)

    def learning(self, *names: str) -> list[Tensor]:
        return [self.leaves[name].requires_grad_() for name in names]

    def __getattr__(self, name: str) -> Tensor:
        return self.__dict__["leaves"][name]

    def sums(self, values: Tensor) -> Tensor:  # (rows,) -> (PAIRS, 2)
        used = self.segments >= 0
        return values.new_zeros(2 * PAIRS).index_add(0, self.segments[used], values[used]).view(PAIRS, 2)


class Contrast(FlexChunkLoss):
    """A policy against a live reference."""

    def __init__(self, form: str = "sigmoid", **options: Any) -> None:
        super().__init__(segments_per_group=2, separate_outputs=True, compiled=False, **options)
        self.form = form

    def score_fn(self, outputs, rows):
        return {"logps": logps(outputs, rows["target"])}

    def loss_fn(self, scores, groups):
        ratio = scores["policy"]["logps"] - scores["reference"]["logps"]
        return FORMS[self.form](ratio[:, 0], ratio[:, 1], groups["margin"]), {"ratio": ratio}


FORMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "sigmoid": lambda a, b, m: -F.logsigmoid(0.3 * (a - b) - m),
    "apart": lambda a, b, m: (0.2 * a - m).square() + (0.1 * b).sigmoid(),  # two gradients that are no negatives
    "hinge": lambda a, b, m: (m - a + b).relu(),  # zero for some pairs
    "first": lambda a, b, m: a.tanh() * m,
}


def logps(outputs: Tensor, target: Tensor) -> Tensor:
    return -F.cross_entropy(outputs, target, reduction="none")


def contrast(
    x: Problem, chunk_size: int | None, form: str = "sigmoid", **how: Any
) -> tuple[FlexChunkLoss, tuple, dict]:
    sides = {"policy": Projection(x.hidden, x.weight, x.bias), "reference": Projection(x.other, x.other_weight)}
    named = {"segments": x.segments, "groups": {"margin": x.margin}, **how}
    return Contrast(form, chunk_size=chunk_size), (sides, {"target": x.target}), named


def expected_contrast(x: Problem, form: str, weight: Tensor | None = None) -> Tensor:
    mine = x.sums(logps(x.hidden @ x.weight.T + x.bias, x.target))
    ratio = mine - x.sums(logps(x.other @ x.other_weight.T, x.target))
    value = FORMS[form](ratio[:, 0], ratio[:, 1], x.margin)
    return value.mean() if weight is None else (value * weight).sum()


def assert_same(found: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    """Values, and gradients of a backward that comes twice."""
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    wanted = torch.autograd.grad(expected, leaves)
    for factor in (-1.5, 2.0):
        got = torch.autograd.grad(found, leaves, torch.tensor(factor, dtype=found.dtype), retain_graph=True)
        for mine, theirs in zip(got, wanted, strict=True):
            torch.testing.assert_close(mine, factor * theirs, rtol=1e-10, atol=1e-12)


# --- what comes out --------------------------------------------------------------------------------------------------


@CHUNKS
@pytest.mark.parametrize("form", FORMS)
def test_pairs(chunk_size, form):
    x = Problem()
    leaves = x.learning("hidden", "weight", "bias", "margin")
    loss, arguments, named = contrast(x, chunk_size, form)
    plan = loss.plan(*arguments, **named)
    assert (plan.passes, plan.products) == (1, 4)
    assert plan.ahead == ("logps" if chunk_size < 19 else None)
    assert_same(loss(*arguments, **named).loss, expected_contrast(x, form), leaves)


@CHUNKS
@pytest.mark.parametrize("learns", [("hidden",), ("weight",), ("bias",), ("margin",), ("hidden", "bias")])
def test_what_is_frozen(chunk_size, learns):
    x = Problem()
    leaves = x.learning(*learns)
    loss, arguments, named = contrast(x, chunk_size)
    assert_same(loss(*arguments, **named).loss, expected_contrast(x, "sigmoid"), leaves)


@CHUNKS
def test_two_passes_give_the_same(chunk_size, monkeypatch):
    found = []
    for bound in (plans.GROUP_BYTES, {}):
        monkeypatch.setattr(plans, "GROUP_BYTES", bound)
        x = Problem()
        leaves = x.learning("hidden", "weight", "bias", "margin")
        loss, arguments, named = contrast(x, chunk_size)
        plan = loss.plan(*arguments, **named)
        out = loss(*arguments, **named)
        found.append([out.loss, out.metrics["ratio"], *torch.autograd.grad(out.loss, leaves)])
    assert (plan.passes, plan.products) == ((2, 5) if chunk_size < 19 else (1, 4))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)


@CHUNKS
def test_what_counts_for_nothing_may_be_infinite(chunk_size):
    x = Problem()
    leaves = x.learning("hidden", "weight")
    more = torch.where(torch.isin(x.segments, torch.tensor([0, 1, 5])), torch.inf, 0.0)
    weight = torch.tensor([0, 0.5, 0, -0.25, 2, 1], dtype=torch.float64)

    def score(outputs, rows):
        return {"s": outputs.sin().sum(1) + rows["more"]}

    how = {"segments_per_group": 2, "compiled": False, "chunk_size": chunk_size}
    loss = FlexChunkLoss(lambda scores, groups: scores["s"][:, 0] - 0.3 * scores["s"][:, 1], score, **how)
    out = loss(Projection(*leaves), {"more": more}, segments=x.segments, group_weight=weight)
    s = x.sums((x.hidden @ x.weight.T).sin().sum(1))
    assert_same(out.loss, ((s[:, 0] - 0.3 * s[:, 1]) * weight).sum(), leaves)


@pytest.mark.parametrize("chunk_size", [3, 100])
def test_nan_stays_nan(chunk_size):
    x = Problem()
    leaves = x.learning("hidden", "weight")
    with torch.no_grad():
        x.margin[0] = torch.nan
    loss, arguments, named = contrast(x, chunk_size)
    of_hidden, of_weight = torch.autograd.grad(loss(*arguments, **named).loss, leaves)
    long = (x.segments == 0) | (x.segments == 1)
    assert torch.equal(of_hidden.isnan().all(1), long) and of_weight.isnan().all()


class Arguments(FlexChunkLoss):
    """Rows, columns and two terms that learn; a metric beside the score, which the loss may read or not."""

    def __init__(self, reads: bool, **options: Any) -> None:
        super().__init__(segments_per_group=2, compiled=False, **options)
        self.reads = reads

    def score_fn(self, outputs, rows, columns):
        z = outputs * rows["gain"][:, None] + columns["shift"]
        return {"logps": logps(z, rows["target"]), "size": z.detach().square().mean(1)}

    def loss_fn(self, scores, groups):
        return of_arguments(scores["logps"], scores["size"] if self.reads else None, groups["margin"])


def of_arguments(logps: Tensor, size: Tensor | None, margin: Tensor) -> Tensor:
    value = -F.logsigmoid(0.3 * (logps[:, 0] - 2 * logps[:, 1]) - margin)
    return value if size is None else value * size.sum(1).sigmoid()


@CHUNKS
@pytest.mark.parametrize("reads", [False, True])
def test_arguments_that_learn(chunk_size, reads):
    x = Problem()
    leaves = x.learning("hidden", "weight", "bias", "gain", "shift", "margin", "down", "up")
    head = Projection(x.hidden, x.weight, x.bias, extra=((x.hidden @ x.down.T, x.up),))
    loss = Arguments(reads, chunk_size=chunk_size)
    out = loss(
        head, {"target": x.target, "gain": x.gain}, columns={"shift": x.shift}, segments=x.segments,
        groups={"margin": x.margin},
    )  # fmt: skip
    outputs = x.hidden @ x.weight.T + x.bias + x.hidden @ x.down.T @ x.up.T
    z = outputs * x.gain[:, None] + x.shift
    size = x.sums(z.detach().square().mean(1)) if reads else None
    assert_same(out.loss, of_arguments(x.sums(logps(z, x.target)), size, x.margin).mean(), leaves)


class Mood(FlexChunkLoss):
    """A second score that the loss reads, and that learns as a list says, which may change."""

    def __init__(self, **options: Any) -> None:
        super().__init__(segments_per_group=2, compiled=False, **options)
        self.learns = [False]

    def score_fn(self, outputs, rows):
        size = outputs.square().mean(1)
        return {"logps": logps(outputs, rows["target"]), "size": size if self.learns[0] else size.detach()}

    def loss_fn(self, scores, groups):
        return of_arguments(scores["logps"], scores["size"], groups["margin"])


@pytest.mark.parametrize("chunk_size", [1, 3])
def test_what_is_read_beside_the_score(chunk_size, monkeypatch):
    """Outputs are formed once where it is constant, and again where the functions have changed their mind."""
    x, formed = Problem(), list[int]()
    leaves = x.learning("hidden", "weight", "margin")
    form = Chunk._form
    monkeypatch.setattr(Chunk, "_form", lambda chunk, spec: [formed.append(chunk.size), form(chunk, spec)][1])
    loss = Mood(chunk_size=chunk_size)
    arguments = Projection(x.hidden, x.weight), {"target": x.target}
    named = {"segments": x.segments, "groups": {"margin": x.margin}}
    for learns in (False, True, True, False):
        loss.learns[0] = learns
        formed.clear()
        out = loss(*arguments, **named)
        assert (sum(formed) > sum(LENGTHS)) is (learns or len(loss.plan(*arguments, **named).blocks[0].segments) == 0)
        z = x.hidden @ x.weight.T
        size = z.square().mean(1) if learns else z.detach().square().mean(1)
        assert_same(out.loss, of_arguments(x.sums(logps(z, x.target)), x.sums(size), x.margin).mean(), leaves)


def test_a_step_that_names_its_one_score_has_no_other(monkeypatch):
    x, formed = Problem(), list[int]()
    leaves = x.learning("hidden", "weight")
    form = Chunk._form
    monkeypatch.setattr(Chunk, "_form", lambda chunk, spec: [formed.append(chunk.size), form(chunk, spec)][1])
    loss = FlexChunkLoss(lambda s, g: s["s"].prod(1) * s["size"].sum(1), segments_per_group=2, chunk_size=3)
    loss.make_step = lambda projections: SinesAndSizes()
    found = loss(Projection(*leaves), segments=x.segments, group_weight=torch.ones(PAIRS)).loss
    assert sum(formed) == sum(LENGTHS)
    z = x.hidden @ x.weight.T
    expected = x.sums(z.sin().sum(1)).prod(1) * x.sums(z.detach().square().sum(1)).sum(1)
    assert_same(found, expected.sum(), leaves)


@CHUNKS
def test_cosines_of_a_tensor_with_itself(chunk_size):
    x = Problem()
    (hidden,) = x.learning("hidden")

    def similar(outputs, rows):
        return {"s": outputs.sigmoid().sum(1)}

    loss = FlexChunkLoss(
        lambda s, g: s["s"].tanh().prod(1), similar, segments_per_group=2, compiled=False, chunk_size=chunk_size
    )
    out = loss(Projection(hidden, hidden, cosine=True), segments=x.segments, group_weight=torch.ones(PAIRS))
    unit = F.normalize(hidden)
    assert_same(out.loss.double(), x.sums((unit @ unit.T).sigmoid().sum(1)).tanh().prod(1).sum(), [hidden])


@CHUNKS
def test_identities(chunk_size):
    x = Problem()
    leaves = x.learning("hidden", "gain")

    def energy(outputs, rows):
        return {"s": rows["gain"] * outputs.exp().sum(1)}

    loss = FlexChunkLoss(
        lambda s, g: s["s"].tanh().prod(1), energy, segments_per_group=2, compiled=False, chunk_size=chunk_size
    )
    weight = torch.linspace(-1, 1, PAIRS, dtype=torch.float64)
    out = loss(Projection(x.hidden), {"gain": x.gain}, segments=x.segments, group_weight=weight)
    assert_same(out.loss, (x.sums(x.gain * x.hidden.exp().sum(1)).tanh().prod(1) * weight).sum(), leaves)


# --- steps -----------------------------------------------------------------------------------------------------------


class Squares(Step):
    """Keeps what its gradient needs, and says that it has one score."""

    row_wise = False
    differentiable = ("size",)

    def score(self, chunk):
        z = chunk.outputs()
        return {"size": z.square().sum(1)}, z.clone()

    def pull(self, chunk, kept, parts, upstream, into):
        into.outputs(2 * kept * upstream["size"][:, None])


class OfSquares(FlexChunkLoss):
    def make_step(self, projections):
        return Squares()

    def loss_fn(self, scores, groups):
        return (0.01 * scores["size"]).sigmoid().prod(1)


@CHUNKS
def test_a_step_of_the_users(chunk_size):
    x = Problem()
    leaves = x.learning("hidden", "weight")
    loss = OfSquares(segments_per_group=2, chunk_size=chunk_size)
    named = {"segments": x.segments, "group_weight": torch.linspace(-1, 1, PAIRS, dtype=torch.float64)}
    head = Projection(x.hidden, x.weight)
    plan = loss.plan(head, **named)
    assert (plan.passes, plan.products) == (1, 3)
    value = (0.01 * x.sums((x.hidden @ x.weight.T).square().sum(1))).sigmoid().prod(1)
    assert_same(loss(head, **named).loss, (value * named["group_weight"]).sum(), leaves)


def test_two_scores_take_two_passes():
    x = Problem()
    leaves = x.learning("hidden", "weight")

    def two(outputs, rows):
        return {"a": outputs.square().sum(1), "b": outputs.sin().sum(1)}

    def product(scores, groups):
        return (0.01 * scores["a"]).tanh().sum(1) * scores["b"].sum(1)

    loss = FlexChunkLoss(product, two, segments_per_group=2, compiled=False, chunk_size=3)
    head, weight = Projection(x.hidden, x.weight), torch.full((PAIRS,), 0.5, dtype=torch.float64)
    plan = loss.plan(head, segments=x.segments, group_weight=weight)
    assert (plan.passes, plan.products, plan.ahead) == (2, 4, None)
    z = x.hidden @ x.weight.T
    scores = {"a": x.sums(z.square().sum(1)), "b": x.sums(z.sin().sum(1))}
    out = loss(head, segments=x.segments, group_weight=weight)
    assert_same(out.loss, 0.5 * product(scores, {}).sum(), leaves)


# --- fewer digits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("share", [1.0, 2.0**-30, 2.0**20])
@pytest.mark.parametrize("chunk_size", [3, 100])
def test_half_precision(dtype, share, chunk_size):
    """A gradient is off by its own rounding and that of the outputs' gradient, whatever the weights."""
    x = Problem(dtype)
    leaves = x.learning("hidden", "weight")
    weight, step = share * torch.linspace(0.5, 1, PAIRS), Sines()
    loss = FlexChunkLoss(lambda scores, groups: scores["s"][:, 0] - 0.5 * scores["s"][:, 1])
    loss.make_step = lambda projections: step
    loss.segments_per_group, loss.chunk_size = 2, chunk_size
    named = {"segments": x.segments, "group_weight": weight}
    assert loss.plan(Projection(*leaves), **named).ahead == ("s" if chunk_size == 3 else None)
    found = torch.autograd.grad(loss(Projection(*leaves), **named).loss, leaves, torch.tensor(1 / share))
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    value = x.sums((wide[0] @ wide[1].T).sin().sum(1)) @ torch.tensor([1.0, -0.5], dtype=torch.float64)
    wanted = torch.autograd.grad((value * weight.double()).sum() / share, wide)
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.dtype == dtype
        assert (mine.double() - theirs).norm() < 0.4 * torch.finfo(dtype).eps * theirs.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_are_rounded_once(dtype):
    x, g = Problem(), torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(n, 99, generator=g).to(dtype) for n in (len(x.segments), V))
    step = Sums()
    loss = FlexChunkLoss(lambda scores, groups: scores["s"][:, 0] / 3 - scores["s"][:, 1] / 7)
    loss.make_step = lambda projections: step
    loss.segments_per_group, loss.chunk_size = 2, 3
    head, named = Projection(hidden.requires_grad_(), weight), {"group_weight": torch.full((PAIRS,), 1.1)}
    (found,) = torch.autograd.grad(loss(head, segments=x.segments, **named).loss, hidden)
    long = torch.isin(x.segments, torch.tensor([0, 1, 5]))  # of others the outputs' gradient is rounded too
    factor = torch.where(x.segments % 2 == 0, 1.1 / 3, -1.1 / 7).double()
    truth = (factor[:, None] * weight.double().sum(0))[long]
    error = (found.double()[long] - truth).abs()
    assert bool((error <= 0.501 * torch.finfo(dtype).eps * truth.abs() + 1e-6).all())


class Sums(Step):
    row_wise = False
    differentiable = ("s",)

    def score(self, chunk):
        return {"s": chunk.outputs().sum(1)}, None

    def pull(self, chunk, kept, parts, upstream, into):
        into.outputs(upstream["s"][:, None].expand(chunk.size, V))


class Sines(Step):
    row_wise = False
    differentiable = ("s",)

    def score(self, chunk):
        return {"s": chunk.outputs().sin().sum(1)}, None

    def pull(self, chunk, kept, parts, upstream, into):
        into.outputs(chunk.outputs().cos() * upstream["s"][:, None])


class SinesAndSizes(Sines):
    def score(self, chunk):
        return super().score(chunk)[0] | {"size": chunk.outputs().square().sum(1)}, None


def test_float16_of_plain_functions_takes_two_passes():
    x = Problem(torch.float16)
    x.learning("hidden")
    loss, arguments, named = contrast(x, 3)
    assert loss.plan(*arguments, **named).passes == 2


# --- the plan --------------------------------------------------------------------------------------------------------


def test_the_plan_says_what_is_apart(monkeypatch):
    x = Problem(torch.bfloat16)
    x.learning("hidden", "weight", "bias")
    loss, arguments, named = contrast(x, 5)
    plan = loss.plan(*arguments, **named)
    assert [block.segments for block in plan.blocks if block.segments] == [(0, 0, 1, 1), (1, 1, 1)]
    assert all(span.rows <= 5 for block in plan.blocks for span in block.spans)
    assert plan.apart_bytes == 4 * (V * H + V)  # two segments of the first pair, one of which needs no room of its own
    assert plan.gathered_bytes == 4 * (V * H + V) + 4 * sum(LENGTHS) * H
    assert "by segment" in str(plan)
    monkeypatch.setitem(plans.GROUP_BYTES, "cpu", plan.apart_bytes - 1)
    less = loss.plan(*arguments, **named)
    assert less.ahead is None and less.passes == 2 and "by segment" not in str(less)


def test_long_groups_come_first(monkeypatch):
    """Their first segment's sums take the place of the call's."""
    x, before = Problem(), list[int]()
    x.learning("hidden", "weight", "bias")
    x.segments = torch.where(x.segments < 0, -1, len(LENGTHS) - 1 - x.segments)  # the longest pair is the last
    fold = Gradients.fold

    def spied(self: Gradients, *arguments: Any) -> None:
        before.append(len(self.sums))
        fold(self, *arguments)

    monkeypatch.setattr(Gradients, "fold", spied)
    loss, arguments, named = contrast(x, 5)
    out = loss(*arguments, **named)
    assert before == [0, 2]
    assert_same(out.loss, expected_contrast(x, "sigmoid"), [x.hidden, x.weight, x.bias])


def test_a_bound_of_the_callers_holds_for_sums_by_segment():
    x = Problem()
    x.learning("hidden", "weight", "bias")
    loss, arguments, named = contrast(x, None)
    loss.max_chunk_bytes = 400  # below a second sum of the weight's gradient
    assert loss.plan(*arguments, **named).passes == 2
    loss.max_chunk_bytes = 1100
    assert loss.plan(*arguments, **named).passes == 1
