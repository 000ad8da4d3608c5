"""The one loop: outputs of a chunk, a step on them, gradients folded into their accumulators; then the next chunk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .gradients import Gradients
from .plan import Chunk, ChunkPlan, gradient_in_place, padded_rows
from .problem import Problem, ProjectionSpec
from .products import addmm_, mm
from .select import Selection
from .steps import ChunkData, Named, RowStep, Runner, Score, combine_parts, join

ALIGNMENT = 256  # bytes, of buffers that share a space: whatever their dtypes, and for the matrix products


@dataclass
class Unit:
    """Projections that are scored together, and how."""

    names: tuple[str, ...]
    score: Score
    rows: tuple[str, ...]  # the row arguments that the score reads

    @property
    def key(self) -> str:
        return "/".join(self.names)


@dataclass
class GroupLoss:
    """A grouped loss over the scores of some groups, differentiated by ordinary autograd: its tensors are small."""

    call: Callable[[dict[str, Any], Named, NamedTuple], tuple[Tensor, Named]]
    groups: tuple[str, ...]  # names of the group arguments
    weight: Tensor  # (G,)
    weighted: bool  # by the user
    separate: bool
    wanted: tuple[str, ...]  # group arguments that want a gradient

    def arrange(self, scores: dict[str, Named], units: Sequence[Unit], counts: Tensor) -> dict[str, Any]:
        """Scores as the loss sees them: by projection where those are scored apart."""
        taken = [unit.names[0] for unit in units] if self.separate else list(scores[units[0].key])
        if "count" in taken:
            raise ValueError('expected no score or projection called "count": the engine adds the rows of each segment')
        if self.separate:
            return {unit.names[0]: scores[unit.key] for unit in units} | {"count": counts}
        return scores[units[0].key] | {"count": counts}


@dataclass
class Call:
    """One call, ready to run: everything but the tensors, which travel through autograd."""

    problem: Problem
    selection: Selection
    plan: ChunkPlan
    runner: Runner
    hp: NamedTuple
    units: list[Unit] = field(default_factory=list)
    row_loss: RowStep | None = None
    row_weight: Tensor | None = None  # (M,), in the loss's dtype
    group_loss: GroupLoss | None = None
    metrics: Named = field(default_factory=dict)
    layout: list[tuple[str | None, str]] = field(default_factory=list)  # what the results of ChunkedScores are

    def trainable(self, unit: Unit) -> bool:
        return any(self.problem.projections[name].wants_grad for name in unit.names)


def make_runner(plan: ChunkPlan, problem: Problem, static_widths: bool) -> Runner:
    return Runner(plan.compiled, plan.rungs, static_widths, problem.device, problem.dtype)


class Walk:
    """Forms the outputs of chunks in reused buffers and folds their gradients back."""

    def __init__(self, call: Call, tensors: Sequence[Tensor], with_grad: bool) -> None:
        self.call = call
        self.problem = call.problem
        self.selection = call.selection
        self.operands = call.problem.operands(tensors)
        self.with_grad = with_grad
        chunks = [chunk for block in call.plan.blocks for chunk in block.chunks]
        self.capacity = max((self.padded(chunk.rows) for chunk in chunks), default=0)
        self.gradients = Gradients(self.problem, self.selection, self.operands, len(chunks))
        self.chunk: Chunk | None = None
        self.gathered: dict[int, Tensor] = {}
        self.written: set[int] = set()

    def padded(self, rows: int) -> int:
        return padded_rows(rows, self.call.runner.rungs)

    @cached_property
    def buffers(self) -> Named:
        """Output buffers, made with the first outputs. Units without gradient are scored one after the other through
        the space of the first that has one, before it is filled."""

        def size(name: str) -> int:
            spec = self.problem.projections[name]
            n_bytes = 0 if spec.identity else self.capacity * spec.width * spec.output_dtype.itemsize
            return -(-n_bytes // ALIGNMENT) * ALIGNMENT

        units = [unit.names for unit in self.call.units] or [tuple(self.problem.projections)]
        trains = [self.with_grad and any(self.problem.projections[n].wants_grad for n in names) for names in units]
        frozen = [names for names, train in zip(units, trains, strict=True) if not train]
        lasting = [names for names, train in zip(units, trains, strict=True) if train]
        shared = max((sum(map(size, names)) for names in frozen), default=0)
        buffers: Named = {}
        spaces = [(frozen, shared)]
        if lasting:
            spaces = [(([*frozen, lasting[0]]), max(shared, sum(map(size, lasting[0]))))]
            spaces += [([names], sum(map(size, names))) for names in lasting[1:]]
        for members, n_bytes in spaces:
            space = torch.empty(n_bytes, dtype=torch.uint8, device=self.problem.device)
            for names in members:
                offset = 0
                for name in names:
                    spec = self.problem.projections[name]
                    if not spec.identity:
                        piece = space[offset : offset + size(name)].view(spec.output_dtype)
                        buffers[name] = piece[: self.capacity * spec.width].view(self.capacity, spec.width)
                        offset += size(name)
        return buffers

    def finish(self) -> list[Tensor | None]:
        """Let go of the buffers; the gradients, in the order of the call's tensors."""
        self.__dict__.pop("buffers", None)
        self.gathered.clear()
        return self.gradients.finish() if self.with_grad else []

    def begin(self, chunk: Chunk) -> None:
        """Turn to a chunk; a second time in a row changes nothing."""
        if chunk != self.chunk:
            self.gathered.clear()
        self.chunk = chunk
        self.written.clear()

    @property
    def here(self) -> Chunk:
        if self.chunk is None:
            raise RuntimeError("no chunk has begun")
        return self.chunk

    def rows_of(self, i: int) -> Tensor:
        """The chunk's rows of a row-aligned tensor; a view where rows are taken as they come."""
        if self.selection.order is None:
            return self.operands[i][self.here.start : self.here.stop]
        if i not in self.gathered:
            index = self.selection.order[self.here.start : self.here.stop]
            self.gathered[i] = self.operands[i].index_select(0, index)
        return self.gathered[i]

    def outputs(self, names: Sequence[str]) -> Named:
        return {name: self._outputs(self.problem.projections[name]) for name in names}

    def _outputs(self, spec: ProjectionSpec) -> Tensor:
        rows = self.here.rows
        if spec.identity:
            given = self.rows_of(spec.terms[0][0])
            if self.padded(rows) == rows:
                return given
            padded = given.new_empty(self.padded(rows), spec.width)
            padded[:rows] = given
            return padded
        buffer = self.buffers[spec.name]
        for n, (i, w) in enumerate(spec.terms):
            weight = self.operands[w].t()  # type: ignore[index]
            if n:
                addmm_(buffer[:rows], self.rows_of(i), weight)
            elif spec.bias is not None and spec.output_dtype == spec.operand_dtype:
                torch.addmm(self.operands[spec.bias], self.rows_of(i), weight, out=buffer[:rows])
            else:
                mm(self.rows_of(i), weight, out=buffer[:rows])
        if spec.bias is not None and spec.output_dtype != spec.operand_dtype:
            buffer[:rows] += self.operands[spec.bias]
        return buffer

    def data(self, names: Sequence[str], rows: Sequence[str], outputs: Named | None = None) -> ChunkData:
        outputs = self.outputs(names) if outputs is None else outputs
        return ChunkData(
            rows=self.here.rows,
            outputs=outputs,
            destinations={},
            row_args={name: self.rows_of(self.problem.rows[name]) for name in rows},
            columns={name: self.operands[i] for name, i in self.problem.columns.items()},
        )

    def aim(self, data: ChunkData) -> ChunkData:
        """Say where the gradients of the outputs go."""
        for name in data.outputs:
            spec = self.problem.projections[name]
            if not spec.wants_grad:
                continue
            if gradient_in_place(spec):
                data.destinations[name] = None
            elif spec.identity:
                i = spec.terms[0][0]
                data.destinations[name] = self.gradients.destination(i, self.here, self.padded(self.here.rows))
            else:
                shape = (self.padded(self.here.rows), spec.width)
                data.destinations[name] = torch.empty(shape, dtype=spec.operand_dtype, device=self.problem.device)
        return data

    def fold(self, data: ChunkData, row_grads: Named, column_grads: Named) -> None:
        """Fold the chunk's gradients into the accumulators: the two products of each trainable term."""
        problem, rows = self.problem, self.here.rows
        for name, destination in data.destinations.items():
            spec = problem.projections[name]
            grad = (data.outputs[name] if destination is None else destination)[:rows]
            for i, w in spec.terms:
                if w is None:
                    self.gradients.add_rows(i, self.here, grad, self.written)
                    continue
                if problem.wants_grad[i]:
                    self.gradients.add_input(i, self.here, grad, self.operands[w], self.written)
                if problem.wants_grad[w]:
                    self.gradients.add_weight(w, grad, self.rows_of(i))
            if spec.bias is not None and problem.wants_grad[spec.bias]:
                self.gradients.add(spec.bias, grad.sum(0, dtype=problem.dtype))
        for name, value in row_grads.items():
            self.gradients.add_rows(problem.rows[name], self.here, value, self.written)
        for name, value in column_grads.items():
            self.gradients.add(problem.columns[name], value)


# --- scores ----------------------------------------------------------------------------------------------------------


@dataclass
class Scored:
    """Scores of some chunks: per used row, per column, and what a gradient may reuse."""

    rows: dict[str, Named]  # by unit
    columns: Named
    saved: list[dict[str, Named]]  # by chunk, by unit


def score_chunks(walk: Walk, chunks: Sequence[Chunk], keep: dict[str, ChunkData] | None = None) -> Scored:
    """Scores of the chunks' rows. ``keep`` receives the outputs of the units that want a gradient (of one chunk)."""
    call = walk.call
    units = sorted(call.units, key=call.trainable)  # frozen ones first: they share the buffer of the first that trains
    pieces: dict[str, list[Named]] = {unit.key: [] for unit in units}
    columns: Named = {}
    saved: list[dict[str, Named]] = []
    for chunk in chunks:
        walk.begin(chunk)
        saved.append({})
        for unit in units:
            data = walk.data(unit.names, unit.rows)
            scores, parts, reuse = unit.score.values(data, call.hp)
            pieces[unit.key].append(scores)
            saved[-1][unit.key] = reuse
            for name, part in parts.items():
                columns[name] = combine_parts(unit.score.combine[name], columns.get(name), part)
            if keep is not None and call.trainable(unit):
                keep[unit.key] = data
    return Scored({key: join(named) for key, named in pieces.items()}, columns, saved)


def pull_chunks(
    walk: Walk,
    chunks: Sequence[Chunk],
    scored: Scored,
    upstream: dict[str, Named],
    column_upstream: Named,
    kept: dict[str, ChunkData] | None = None,
) -> None:
    """Gradients of ``sum(scores * upstream)``, with the outputs formed again unless ``kept`` from the scores."""
    call = walk.call
    offset = chunks[0].start if chunks else 0
    for chunk, saved in zip(chunks, scored.saved, strict=True):
        if chunk.rows == 0:
            continue
        walk.begin(chunk)
        # Those that train first: a frozen one that is formed again takes the buffer of the first of them.
        for unit in sorted(call.units, key=call.trainable, reverse=True):
            if not (call.trainable(unit) or _wants_arguments(call, unit)):
                continue
            key = unit.key
            data = kept[key] if kept and key in kept else walk.data(unit.names, unit.rows)
            part = slice(chunk.start - offset, chunk.stop - offset)
            named = {name: value[part] for name, value in upstream[key].items()} | column_upstream
            grads = unit.score.gradients(walk.aim(data), call.hp, saved[key], named, scored.columns)
            walk.fold(data, *grads)


def _wants_arguments(call: Call, unit: Unit) -> bool:
    problem = call.problem
    return bool(problem.wanting({n: problem.rows[n] for n in unit.rows}) or problem.wanting(problem.columns))
