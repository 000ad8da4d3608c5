"""Random calls of the engine, and the same loss by plain autograd over whole outputs.

A ``Draft`` is plain data that hypothesis draws, shrinks and prints. ``Tensors.of`` makes its tensors, ``engine_loss``
and ``arguments`` call the engine with them, ``plain`` holds all outputs at once. Both sides share the formulas below:
what is compared is how the engine selects rows, cuts chunks, pads, adds up and differentiates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import hypothesis.strategies as st
import torch
import torch.nn.functional as F
from torch import Tensor

from chunked_embed import FlexChunkLoss, Projection

SHARPNESS = 0.7
IGNORED = -100
TOTALS = {"row_lse": "logsumexp", "row_sum": "sum", "column_lse": "logsumexp", "column_sum": "sum"}

# --- formulas --------------------------------------------------------------------------------------------------------


def energies(outputs: Any, rows: dict[str, Tensor], columns: dict[str, Tensor] | None, sharpness: float) -> Tensor:
    """One number a row, which depends on all outputs and arguments: (R,)."""
    seen = [tilted(z, rows, columns or {}) for z in in_order(outputs)]
    total = torch.zeros_like(seen[0][:, 0])
    for z in seen:
        total = total + sharpness * F.cross_entropy(z, rows["target"], reduction="none") + 0.1 * z.tanh().sum(1)
    for a, b in pairwise(seen):
        if a.shape == b.shape:
            total = total + 0.05 * (a * b).sum(1)
    return total + 0.2 * rows["mix"].square().sum(1) if "mix" in rows else total


def tilted(z: Tensor, rows: dict[str, Tensor], columns: dict[str, Tensor]) -> Tensor:
    """Outputs with row and column arguments applied; a column argument applies where it has the width."""
    if "gain" in rows:
        z = z * rows["gain"][:, None]
    if "shift" in columns and len(columns["shift"]) == z.shape[1]:
        z = z + columns["shift"]
    if "mix" in rows and "basis" in columns and len(columns["basis"]) == z.shape[1]:
        z = z + 0.3 * rows["mix"].to(z.dtype) @ columns["basis"].to(z.dtype).T  # in half precision only one may learn
    return z


def in_order(outputs: Any) -> list[Tensor]:
    return [outputs[name] for name in sorted(outputs)] if isinstance(outputs, dict) else [outputs]


def row_values(outputs, rows, columns=None, *, sharpness):
    energy = energies(outputs, rows, columns, sharpness)
    return energy.sin() + 0.5 * energy, {"energy": energy, "target": rows["target"]}


def row_scores(outputs, rows, columns=None, *, sharpness, wave):
    energy = energies(outputs, rows, columns, sharpness)
    if wave == "none":
        return {"energy": energy}
    return {"energy": energy, "wave": energy.sin() if wave == "learns" else energy.detach().sin()}


def elements_of(outputs, rows, columns=None, *, totals):
    z = tilted(in_order(outputs)[0], rows, columns or {})
    found = {"row_lse": 1.3 * z + 0.2, "row_sum": z.sin(), "column_lse": 0.7 * z, "column_sum": z.cos()}
    return {name: found[name] for name in totals}


def group_values(scores, groups, *, coupling, names):
    """(G,), or with ``coupling="scalar"`` a scalar of the whole batch. ``names``: what must be among the scores."""
    assert set(scores) == {*names, "count"}
    flat = {}
    for name, value in sorted(scores.items()):
        flat |= {f"{name}/{k}": v for k, v in sorted(value.items())} if isinstance(value, dict) else {name: value}
    count = flat.pop("count")
    of_columns = [flat.pop(name) for name in ("column_lse", "column_sum") if name in flat]
    total = torch.zeros_like(count[:, 0])
    for value in flat.values():
        total = total + (0.2 * value).tanh().sum(1) + 0.01 * value.sum(1)
    total = total * (1 + 0.1 * count.sum(1))
    if "gain" in groups:
        total = total * groups["gain"]
    metrics = {"before": total}
    if coupling:
        total = total - 0.5 * total.mean() + 0.3 * total.logsumexp(0)
        for value in of_columns:
            total = total + value.sigmoid().mean()  # of no rows at all, a logsumexp is -inf
    return total.mean() if coupling == "scalar" else total, metrics


class RowWise(FlexChunkLoss):
    def __init__(self, sharpness, **options):
        super().__init__(**options)
        self.sharpness = sharpness

    def loss_fn(self, outputs, rows, columns=None):
        return row_values(outputs, rows, columns, sharpness=self.sharpness)


class Grouped(FlexChunkLoss):
    def __init__(self, sharpness, wave, coupling, names, **options):
        super().__init__(**options)
        self.sharpness = sharpness
        self.wave = wave
        self.coupling = coupling
        self.names = names

    def score_fn(self, outputs, rows, columns=None):
        return row_scores(outputs, rows, columns, sharpness=self.sharpness, wave=self.wave)

    def loss_fn(self, scores, groups):
        return group_values(scores, groups, coupling=self.coupling, names=self.names)


class WithTotals(Grouped):
    def __init__(self, totals, **options):
        super().__init__(**options)
        self.totals = totals

    def element_fn(self, outputs, rows, columns=None):
        return elements_of(outputs, rows, columns, totals=self.totals)


# --- what is drawn ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Side:
    """A projection."""

    identity: bool
    shares: tuple[str, ...]  # with the projection before it: "input", "weight", "bias", "extra"
    bias: bool
    extra: tuple[str, ...]  # "own": a LoRA term of its own; "again": input and weight once more
    wider: int  # columns beyond the draft's width


@dataclass(frozen=True)
class Draft:
    kind: str  # "row-wise", "grouped", "coupled", "scores"
    leading: tuple[int, ...]  # the shape of the rows
    hidden: int
    width: int
    sides: tuple[Side, ...]
    alone: bool  # one projection, not in a dict
    against_itself: bool  # the first input is its weight, where it can be
    memory: str  # "contiguous", "transposed", "every other", "expanded"
    learns: str  # "1" or "0" for each leaf, over and over
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    targets: str  # "all", "some", "none" count
    weight: str  # of rows or groups: "default", "positive", "signed", "some zero", "zero"
    segments: str  # "rows", "every" (no group is empty), "ragged", "unused" (all of them)
    per_group: int
    group_gain: bool
    separate: bool
    totals: tuple[str, ...]
    scalar: bool
    wave: str  # the second score: "learns", "constant", "none"
    functions: bool  # plain functions instead of a class
    chunk_size: int | None
    max_chunk_bytes: int | None
    upstream: float
    twice: bool
    seed: int

    @property
    def n_rows(self) -> int:
        return math.prod(self.leading)

    @property
    def couples(self) -> bool:
        return self.kind == "coupled" or any(name.startswith("column") for name in self.totals)

    @property
    def n_groups(self) -> int:
        return self.n_rows if self.segments == "rows" else max(1, self.n_rows // 2)


CHUNKS = st.sampled_from([None, 1, 2, 3, 4, 5, 8])
BYTES = st.sampled_from([None, 1, 500])


def subsets(*names: str) -> st.SearchStrategy[tuple[str, ...]]:
    return st.tuples(*[st.sampled_from([(), (name,)]) for name in names]).map(lambda parts: sum(parts, ()))


SIDES = st.builds(
    Side,
    identity=st.sampled_from([False, False, False, True]),
    shares=subsets("input", "weight", "bias", "extra"),
    bias=st.booleans(),
    extra=st.sampled_from([(), ("own",), ("again",), ("own", "own"), ("own", "again")]),
    wider=st.sampled_from([0, 0, 0, 2]),
)


@st.composite
def drafts(draw: st.DrawFn, kinds: tuple[str, ...], chunked: bool) -> Draft:
    kind = draw(st.sampled_from(kinds))
    sides = draw(st.lists(SIDES, min_size=1, max_size=3))
    alone = len(sides) == 1 and draw(st.booleans())
    grouped = kind != "row-wise"
    segments = "rows"
    if grouped:  # scores() is told of groups by its segments alone: none may be empty
        segments = draw(
            st.sampled_from(
                ["rows", "every"] if kind == "scores" else ["rows", "every", "every", "ragged", "ragged", "unused"]
            )
        )
    separate = grouped and not alone and draw(st.booleans())
    totals: tuple[str, ...] = ()
    if grouped and not separate:
        totals = draw(subsets("row_lse", "row_sum") if kind == "grouped" else subsets(*TOTALS))
    scalar = kind == "coupled" and draw(st.booleans())
    weights = ["default"]
    if kind in ("row-wise", "grouped") or (kind == "coupled" and not scalar):
        weights += ["positive", "signed", "some zero", "zero"]
    elif kind == "scores" and segments == "rows":
        weights += ["some zero", "zero"]
    return Draft(
        kind=kind,
        leading=draw(st.sampled_from([(1,), (3,), (7,), (13,), (2, 3), (3, 4), (1, 5), (2, 2, 3)])),
        hidden=draw(st.integers(1, 6)),
        width=draw(st.integers(1, 9)),
        sides=tuple(sides),
        alone=alone,
        against_itself=draw(st.sampled_from([False, False, False, True])),
        memory=draw(st.sampled_from(["contiguous", "contiguous", "transposed", "every other", "expanded"])),
        learns=draw(st.text("01", min_size=11, max_size=11)),
        rows=draw(subsets("gain", "mix")),
        columns=draw(subsets("shift", "basis")),
        targets=draw(st.sampled_from(["all", "all", "all", "some", "some", "none"])),
        weight=draw(st.sampled_from(weights)),
        segments=segments,
        per_group=1 if segments == "rows" else draw(st.integers(1, 3)),
        group_gain=kind in ("grouped", "coupled") and draw(st.booleans()),
        separate=separate,
        totals=totals,
        scalar=scalar,
        wave=draw(st.sampled_from(["learns", "constant", "none"])) if kind == "grouped" else "learns",
        functions=draw(st.booleans()),
        chunk_size=draw(CHUNKS) if chunked else None,
        max_chunk_bytes=draw(BYTES) if chunked else None,
        upstream=draw(st.sampled_from([1.0, -2.5])),
        twice=draw(st.booleans()),
        seed=draw(st.integers(0, 10**6)),
    )


# --- its tensors -----------------------------------------------------------------------------------------------------


@dataclass
class Tensors:
    """The arguments of a call."""

    projections: dict[str, Projection]
    rows: dict[str, Tensor]
    columns: dict[str, Tensor]
    row_weight: Tensor | None = None
    segments: Tensor | None = None
    groups: dict[str, Tensor] = field(default_factory=dict)
    group_weight: Tensor | None = None
    leaves: list[Tensor] = field(default_factory=list)

    @property
    def learning(self) -> list[Tensor]:
        return [leaf for leaf in self.leaves if leaf.requires_grad]

    @classmethod
    def of(cls, draft: Draft, device: str = "cpu", dtype: torch.dtype = torch.float64) -> Tensors:
        return _Maker(draft, device, dtype).made


class _Maker:
    def __init__(self, draft: Draft, device: str, dtype: torch.dtype) -> None:
        self.draft = draft
        self.device = device
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(draft.seed)
        self.made = made = Tensors({}, {}, {})
        for side in draft.sides:
            self.projection(side)
        self.row_arguments()
        width = width_of(made.projections["p0"])
        if "shift" in draft.columns:
            made.columns["shift"] = self.leaf(width)
        if "basis" in draft.columns:
            made.columns["basis"] = self.leaf(width, 2)
        if draft.kind == "row-wise" or (draft.kind == "scores" and draft.segments == "rows"):
            weight = self.weights(draft.n_rows)
            made.row_weight = None if weight is None else weight.view(draft.leading)
        else:
            self.group_arguments()

    def leaf(self, *shape: int) -> Tensor:
        """A tensor that may learn, as it lies in memory."""
        memory = self.draft.memory if len(shape) > 1 else "contiguous"
        stored = {
            "transposed": (*shape[:-2], *shape[:-3:-1]),
            "every other": (*shape[:-1], 2 * shape[-1]),
            "expanded": (1, *shape[1:]),
        }.get(memory, shape)
        values = torch.randn(stored, generator=self.generator, dtype=torch.float64).to(self.device, self.dtype)
        learns = self.draft.learns[len(self.made.leaves) % len(self.draft.learns)]
        leaf = values.requires_grad_(learns == "1")
        self.made.leaves.append(leaf)
        if memory == "transposed":
            return leaf.transpose(-1, -2)
        if memory == "every other":
            return leaf[..., ::2]
        return leaf.expand(shape)

    def projection(self, side: Side) -> None:
        draft, before = self.draft, list(self.made.projections.values())
        name, width = f"p{len(before)}", draft.width + side.wider
        of_inputs = [p for p in before if p.weight is not None]
        if side.identity:
            self.made.projections[name] = Projection(self.leaf(*draft.leading, width))
            return
        last = of_inputs[-1] if of_inputs else None
        shared = side.shares if last is not None else ()
        x = last.input if last and "input" in shared else self.leaf(*draft.leading, draft.hidden)
        if last and "weight" in shared:
            weight = last.weight
        elif draft.against_itself and last is None and x.dim() == 2 and len(x) >= draft.width:
            weight = x
        else:
            weight = self.leaf(width, draft.hidden)
        assert weight is not None
        width = len(weight)
        bias = None
        if side.bias:
            same = last and "bias" in shared and last.bias is not None and len(last.bias) == width
            bias = last.bias if last and same else self.leaf(width)
        if last and "extra" in shared and last.extra and len(last.extra[0][1]) == width:
            extra = last.extra
        else:
            extra = tuple(
                (x, weight) if how == "again" else (self.leaf(*draft.leading, 2), self.leaf(width, 2))
                for how in side.extra
            )
        self.made.projections[name] = Projection(x, weight, bias, extra)

    def row_arguments(self) -> None:
        draft, rows = self.draft, self.made.rows
        narrowest = min(width_of(p) for p in self.made.projections.values())
        target = torch.randint(0, narrowest, (draft.n_rows,), generator=self.generator)
        if draft.targets != "all":
            dropped = self.chance(0.3) if draft.targets == "some" else torch.ones(draft.n_rows, dtype=torch.bool)
            if draft.segments == "every":
                dropped[: draft.n_groups] = False  # or a group would be empty
            target = torch.where(dropped, IGNORED, target)
        rows["target"] = target.view(draft.leading).to(self.device)
        if "gain" in draft.rows:
            rows["gain"] = self.leaf(*draft.leading)
        if "mix" in draft.rows:
            rows["mix"] = self.leaf(*draft.leading, 2)

    def group_arguments(self) -> None:
        draft, made = self.draft, self.made
        n, groups, k = draft.n_rows, draft.n_groups, draft.per_group
        if draft.segments != "rows":
            inside = torch.randint(0, k, (n,), generator=self.generator)
            if draft.segments == "every":
                group = torch.arange(n) % groups
            else:
                group = torch.randint(0, groups, (n,), generator=self.generator)
            segments = group * k + inside
            if draft.segments == "unused":
                segments = torch.full((n,), -3)
            elif draft.segments == "ragged":
                segments = torch.where(self.chance(0.3), -segments - 1, segments)
            made.segments = segments.view(draft.leading).to(self.device)
        if draft.group_gain:
            made.groups["gain"] = self.leaf(groups)
        made.group_weight = self.weights(groups)
        if draft.segments in ("ragged", "unused") and not made.groups and made.group_weight is None:
            made.groups["told"] = torch.zeros(groups, device=self.device)  # how many groups there are

    def chance(self, p: float, n: int | None = None) -> Tensor:
        return torch.rand(self.draft.n_rows if n is None else n, generator=self.generator) < p

    def weights(self, n: int) -> Tensor | None:
        how = self.draft.weight
        drawn = torch.rand(n, generator=self.generator, dtype=torch.float64)
        factor = {"signed": 2 * drawn - 1, "some zero": drawn * self.chance(0.5, n), "zero": 0 * drawn}
        return None if how == "default" else factor.get(how, drawn).to(self.device)


def width_of(projection: Projection) -> int:
    return projection.input.shape[-1] if projection.weight is None else len(projection.weight)


# --- the engine's side -----------------------------------------------------------------------------------------------


def engine_loss(draft: Draft, compiled: bool | None) -> FlexChunkLoss:
    how = dict(chunk_size=draft.chunk_size, max_chunk_bytes=draft.max_chunk_bytes, compiled=compiled)
    options: dict[str, Any] = how | {"targets": ("target",)}
    if draft.kind == "row-wise":
        if draft.functions:
            return FlexChunkLoss(row_values, sharpness=SHARPNESS, **options)
        return RowWise(SHARPNESS, **options)
    options |= dict(
        segments_per_group=draft.per_group,
        couples_batch=draft.couples,
        separate_outputs=draft.separate,
        row_totals={name: TOTALS[name] for name in draft.totals if name.startswith("row")},
        column_totals={name: TOTALS[name] for name in draft.totals if name.startswith("column")},
    )
    numbers: dict[str, Any] = {"sharpness": SHARPNESS, "wave": draft.wave}
    numbers |= {"coupling": coupling_of(draft), "names": names_of(draft)}
    if draft.totals:
        numbers["totals"] = draft.totals
    if draft.functions:
        element_fn = elements_of if draft.totals else None
        return FlexChunkLoss(group_values, row_scores, element_fn, **numbers, **options)
    return (WithTotals if draft.totals else Grouped)(**numbers, **options)


def coupling_of(draft: Draft) -> str:
    return "" if draft.kind != "coupled" else "scalar" if draft.scalar else "vector"


def names_of(draft: Draft) -> tuple[str, ...]:
    """Of the scores of a group."""
    if draft.separate:
        return tuple(f"p{n}" for n in range(len(draft.sides)))
    return ("energy", *(() if draft.wave == "none" else ("wave",)), *draft.totals)


def arguments(draft: Draft, made: Tensors) -> tuple[tuple, dict[str, Any]]:
    projections: Any = made.projections["p0"] if draft.alone else made.projections
    named = {"columns": made.columns or None, "segments": made.segments}
    if draft.kind in ("row-wise", "scores"):
        named["row_weight"] = made.row_weight
    if draft.kind in ("grouped", "coupled"):
        named |= {"groups": made.groups or None, "group_weight": made.group_weight}
    return (projections, made.rows), {name: value for name, value in named.items() if value is not None}


# --- the plain side --------------------------------------------------------------------------------------------------


@dataclass
class Expected:
    """A loss with its metrics; or scores by name, of ``scores()``."""

    values: dict[str, Tensor]
    metrics: dict[str, Tensor]


def plain(draft: Draft, made: Tensors) -> Expected:
    n = draft.n_rows
    rows = {name: value.flatten(0, len(draft.leading) - 1) for name, value in made.rows.items()}
    used = rows["target"] != IGNORED
    if made.segments is not None:
        used = used & (made.segments.flatten() >= 0)
    if made.row_weight is not None:
        used = used & (made.row_weight.flatten() != 0)
    outputs = {name: whole(p, n)[used] for name, p in made.projections.items()}
    kept = {name: value[used] for name, value in rows.items()}

    def spread(values: Tensor) -> Tensor:
        """Of the used rows, in the user's order and shape; zero elsewhere."""
        return values.new_zeros(n, *values.shape[1:]).index_put((used.nonzero()[:, 0],), values).view(draft.leading)

    if draft.kind == "row-wise":
        values, metrics = row_values(outputs, kept, made.columns, sharpness=SHARPNESS)
        share = torch.full_like(values, 1 / max(len(values), 1))
        weight = share if made.row_weight is None else made.row_weight.flatten()[used]
        return Expected({"loss": (values * weight).sum()}, {name: spread(value) for name, value in metrics.items()})

    groups, k = draft.n_groups, draft.per_group
    ids = torch.arange(n, device=used.device) if made.segments is None else made.segments.flatten()

    def by_segment(values: Tensor) -> Tensor:
        return values.new_zeros(groups * k).index_add(0, ids[used], values).view(groups, k)

    by_row: dict[str, Any] = {}
    if draft.separate:
        for name, z in outputs.items():
            by_row[name] = row_scores(z, kept, made.columns, sharpness=SHARPNESS, wave=draft.wave)
    else:
        by_row = row_scores(outputs, kept, made.columns, sharpness=SHARPNESS, wave=draft.wave)
    of_columns = {}
    for name, x in elements_of(outputs, kept, made.columns, totals=draft.totals).items():
        dim = 1 if name.startswith("row") else 0
        total = x.logsumexp(dim) if TOTALS[name] == "logsumexp" else x.sum(dim)
        (by_row if dim else of_columns)[name] = total

    if draft.kind == "scores":
        flat: dict[str, Tensor] = {}
        for name, value in by_row.items():
            flat |= {f"{name}/{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
        how = spread if made.segments is None else by_segment
        return Expected({name: how(value) for name, value in flat.items()} | of_columns, {})

    def sums(value: Any) -> Any:
        return {name: sums(v) for name, v in value.items()} if isinstance(value, dict) else by_segment(value)

    count = by_segment(torch.ones_like(next(iter(outputs.values()))[:, 0]))
    given = sums(by_row) | of_columns | {"count": count}
    value, metrics = group_values(given, made.groups, coupling=coupling_of(draft), names=names_of(draft))
    if value.dim():
        if made.group_weight is not None:
            weight = made.group_weight
        elif draft.segments == "rows":  # a row that is dropped is a group that counts for nothing
            weight = used.to(value.dtype) / used.sum().clamp_min(1)
        else:
            weight = torch.full_like(value, 1 / groups)
        value = (value * weight).sum()
    return Expected({"loss": value}, metrics)


def whole(projection: Projection, n: int) -> Tensor:
    """The outputs, all at once: (M, V)."""
    x = projection.input.reshape(n, -1)
    if projection.weight is None:
        return x
    z = x @ projection.weight.T
    for a, b in projection.extra:
        z = z + a.reshape(n, -1) @ b.T
    return z if projection.bias is None else z + projection.bias
