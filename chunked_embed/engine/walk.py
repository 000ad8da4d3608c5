"""The one loop: outputs of a chunk, a step on them, gradients folded into their accumulators; then the next chunk.

Two autograd functions stand on it. ``ChunkedLoss`` takes gradients in the forward pass (three products for each
trainable projection) and scales them in backward. ``ChunkedScores`` returns differentiable scores and walks again in
backward (four products), for losses that need all scores first and for code behind the scores that we do not know.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .gradients import Gradients
from .plan import Block, Chunk, ChunkPlan, gradient_in_place, padded_rows
from .problem import Problem, ProjectionSpec
from .products import addmm_, mm
from .select import Selection
from .steps import ChunkData, Named, RowLoss, Runner, Score, combine_parts, join


@dataclass
class Unit:
    """Projections that are scored together, and how."""

    names: tuple[str, ...]
    score: Score
    rows: tuple[str, ...]  # the row arguments that the score reads


@dataclass
class Call:
    """One call, ready to run: everything but the tensors, which travel through autograd."""

    problem: Problem
    selection: Selection
    plan: ChunkPlan
    runner: Runner
    hp: NamedTuple
    units: list[Unit] = field(default_factory=list)
    row_loss: RowLoss | None = None
    row_weight: Tensor | None = None  # (M,), in the loss's dtype
    group_loss: GroupLoss | None = None
    metrics: Named = field(default_factory=dict)
    layout: list[tuple[str | None, str]] = field(default_factory=list)  # what the results of ChunkedScores are

    def trainable(self, unit: Unit) -> bool:
        return any(self.problem.projections[name].wants_grad for name in unit.names)


def make_runner(plan: ChunkPlan, problem: Problem) -> Runner:
    return Runner(plan.compiled, plan.rungs, problem.device, problem.dtype)


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
        self.buffers = self._allocate()
        self.gathered: dict[int, Tensor] = {}
        self.written: set[int] = set()

    def padded(self, rows: int) -> int:
        return padded_rows(rows, self.call.runner.rungs)

    def _allocate(self) -> Named:
        """Output buffers. Units without gradient are scored one after the other through the space of the first that
        has one, before it is filled."""

        def size(name: str) -> int:
            spec = self.problem.projections[name]
            return 0 if spec.identity else self.capacity * spec.width * spec.output_dtype.itemsize

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
                        buffers[name] = piece.view(self.capacity, spec.width)
                        offset += size(name)
        return buffers

    def free(self) -> None:
        """Let go of the buffers before gradients are cast."""
        self.buffers.clear()
        self.gathered.clear()

    def begin(self, chunk: Chunk) -> None:
        self.chunk = chunk
        self.gathered.clear()
        self.written.clear()

    def rows_of(self, i: int) -> Tensor:
        """The chunk's rows of a row-aligned tensor; a view where rows are taken as they come."""
        if self.selection.order is None:
            return self.operands[i][self.chunk.start : self.chunk.stop]
        if i not in self.gathered:
            index = self.selection.order[self.chunk.start : self.chunk.stop]
            self.gathered[i] = self.operands[i].index_select(0, index)
        return self.gathered[i]

    def outputs(self, names: Sequence[str]) -> Named:
        return {name: self._outputs(self.problem.projections[name]) for name in names}

    def _outputs(self, spec: ProjectionSpec) -> Tensor:
        rows = self.chunk.rows
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
            rows=self.chunk.rows,
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
                data.destinations[name] = self.gradients.destination(i, self.chunk, self.padded(self.chunk.rows))
            else:
                shape = (self.padded(self.chunk.rows), spec.width)
                data.destinations[name] = torch.empty(shape, dtype=spec.operand_dtype, device=self.problem.device)
        return data

    def fold(self, data: ChunkData, row_grads: Named, column_grads: Named) -> None:
        """Fold the chunk's gradients into the accumulators: the two products of each trainable term."""
        problem, rows = self.problem, self.chunk.rows
        for name, destination in data.destinations.items():
            spec = problem.projections[name]
            grad = (data.outputs[name] if destination is None else destination)[:rows]
            for i, w in spec.terms:
                if w is None:
                    self.gradients.add_rows(i, self.chunk, grad, self.written)
                    continue
                if problem.wants_grad[i]:
                    self.gradients.add_input(i, self.chunk, grad, self.operands[w], self.written)
                if problem.wants_grad[w]:
                    self.gradients.add_weight(w, grad, self.rows_of(i))
            if spec.bias is not None and problem.wants_grad[spec.bias]:
                self.gradients.add(spec.bias, grad.sum(0, dtype=problem.dtype))
        for name, value in row_grads.items():
            self.gradients.add_rows(problem.rows[name], self.chunk, value, self.written)
        for name, value in column_grads.items():
            self.gradients.add(problem.columns[name], value)


# --- scores ----------------------------------------------------------------------------------------------------------


@dataclass
class Scored:
    """Scores of some chunks: per used row, per column, and what a gradient may reuse."""

    rows: dict[str, Named]  # by unit, see unit_key
    columns: Named
    saved: list[dict[str, Named]]  # by chunk, by unit


def unit_key(unit: Unit) -> str:
    return "\0".join(unit.names)


def score_chunks(walk: Walk, chunks: Sequence[Chunk], keep: dict[str, ChunkData] | None = None) -> Scored:
    """Scores of the chunks' rows. ``keep`` receives the outputs of the units that want a gradient (of one chunk)."""
    call = walk.call
    units = sorted(call.units, key=call.trainable)  # frozen ones first: they share the buffer of the first that trains
    pieces: dict[str, list[Named]] = {unit_key(unit): [] for unit in units}
    columns: Named = {}
    saved: list[dict[str, Named]] = []
    for chunk in chunks:
        walk.begin(chunk)
        saved.append({})
        for unit in units:
            data = walk.data(unit.names, unit.rows)
            scores, parts, reuse = unit.score.values(data, call.hp)
            pieces[unit_key(unit)].append(scores)
            saved[-1][unit_key(unit)] = reuse
            for name, part in parts.items():
                columns[name] = combine_parts(unit.score.combine[name], columns.get(name), part)
            if keep is not None and call.trainable(unit):
                keep[unit_key(unit)] = data
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
        if kept is None:
            walk.begin(chunk)
        for unit in call.units:
            if not (call.trainable(unit) or _wants_arguments(call, unit)):
                continue
            key = unit_key(unit)
            data = kept[key] if kept and key in kept else walk.data(unit.names, unit.rows)
            part = slice(chunk.start - offset, chunk.stop - offset)
            named = {name: value[part] for name, value in upstream[key].items()} | column_upstream
            grads = unit.score.gradients(walk.aim(data), call.hp, saved[key], named, scored.columns)
            walk.fold(data, *grads)


def _wants_arguments(call: Call, unit: Unit) -> bool:
    problem = call.problem
    return bool(problem.wanting({n: problem.rows[n] for n in unit.rows}) or problem.wanting(problem.columns))


def segment_sums(values: Tensor, selection: Selection, block: Block) -> Tensor:
    """(rows of the block,) -> (groups, segments): rows of a segment added up; empty segments are zero."""
    per_group = selection.segments_per_group
    if selection.lengths is None:
        return values.view(-1, per_group)
    lengths = selection.lengths[block.start * per_group : block.stop * per_group].to(values.device, non_blocking=True)
    return torch.segment_reduce(values, "sum", lengths=lengths, unsafe=True, initial=0).view(-1, per_group)


def to_rows(values: Tensor, selection: Selection, block: Block) -> Tensor:
    """(groups, segments) -> (rows of the block,): the gradient of ``segment_sums``."""
    flat = values.reshape(-1)
    if selection.segment is None:
        return flat
    first = block.chunks[0].start if block.chunks else 0
    last = block.chunks[-1].stop if block.chunks else 0
    return flat.index_select(0, selection.segment[first:last] - block.start * selection.segments_per_group)


# --- grouped losses --------------------------------------------------------------------------------------------------


@dataclass
class GroupLoss:
    """A grouped loss over the scores of some groups, differentiated by ordinary autograd: its tensors are small."""

    call: Callable[[dict[str, Any], Named, NamedTuple], tuple[Tensor, Named]]
    groups: Named  # (G, ...)
    weight: Tensor  # (G,)
    separate: bool
    wanted: tuple[str, ...]  # group arguments that want a gradient

    def arrange(self, scores: dict[str, Named], units: Sequence[Unit], counts: Tensor) -> dict[str, Any]:
        """Scores as the loss sees them: by projection where those are scored apart."""
        if self.separate:
            return {unit.names[0]: scores[unit_key(unit)] for unit in units} | {"count": counts}
        return scores[unit_key(units[0])] | {"count": counts}


def group_counts(selection: Selection, block: Block, dtype: torch.dtype, device: torch.device) -> Tensor:
    per_group = selection.segments_per_group
    if selection.lengths is None:
        return torch.ones(block.stop - block.start, per_group, dtype=dtype, device=device)
    lengths = selection.lengths[block.start * per_group : block.stop * per_group]
    return lengths.view(-1, per_group).to(device, dtype, non_blocking=True)


# --- autograd --------------------------------------------------------------------------------------------------------


def power_of_two(weight: Tensor) -> Tensor:
    """The scale that brings the largest weight to (1/2, 1]: exact in any dtype. Zero and non-finite weights: one."""
    largest = weight.abs().amax() if weight.numel() else weight.new_ones(())
    exponent = torch.ceil(torch.log2(largest))
    return torch.exp2(torch.where(torch.isfinite(exponent), exponent, 0.0))


class ChunkedLoss(torch.autograd.Function):
    """Gradients in forward, scaled in backward; or, where no product can be saved by that, both in backward."""

    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor) -> Tensor:
        wanted = call.problem.any_grad or bool(call.group_loss and call.group_loss.wanted)
        ctx.call = call
        with torch.autocast(call.problem.device.type, enabled=False):
            if call.row_loss is not None:
                assert call.row_weight is not None
                loss, ctx.grads = _row_wise(call, tensors, call.row_weight, wanted and not call.plan.deferred)
            else:
                loss, ctx.grads = _grouped(call, tensors, wanted)
        ctx.dtypes = [t.dtype for t in tensors]
        if wanted and call.plan.deferred:
            ctx.save_for_backward(*tensors)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        call = ctx.call
        if call.plan.deferred:
            with torch.autocast(call.problem.device.type, enabled=False):
                _, grads = _row_wise(call, ctx.saved_tensors, call.row_weight * grad_loss, True, keep_wide=False)
            return (None, *grads)
        grads = zip(ctx.grads, ctx.dtypes, strict=True)
        # Out of place: a second backward over a retained graph must not see scaled gradients.
        return (None, *(None if g is None else (g * grad_loss).to(dtype) for g, dtype in grads))


class ChunkedScores(torch.autograd.Function):
    """Differentiable scores: sums of a segment ``(G, segments)``, or one per row ``(M,)``, and column scores ``(V,)``.

    Nothing but the scores is kept for backward, which walks over the chunks again.
    """

    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        (block,) = call.plan.blocks
        with torch.autocast(call.problem.device.type, enabled=False):
            scored = score_chunks(Walk(call, tensors, with_grad=False), block.chunks)
        ctx.call, ctx.scored = call, scored
        if call.problem.any_grad:
            ctx.save_for_backward(*tensors)
        results = []
        call.layout = []
        for unit in call.units:
            for name, value in scored.rows[unit_key(unit)].items():
                call.layout.append((unit_key(unit), name))
                by_segment = call.selection.lengths is not None
                results.append(
                    segment_sums(value, call.selection, block) if by_segment else _in_user_order(call, value, flat=True)
                )
        for name, value in scored.columns.items():
            call.layout.append((None, name))
            results.append(value.clone())
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_scores: Tensor) -> tuple[Tensor | None, ...]:
        call, scored = ctx.call, ctx.scored
        problem, selection = call.problem, call.selection
        (block,) = call.plan.blocks
        scale = None
        if problem.has_half:
            scale = power_of_two(torch.stack([g.abs().amax() for g in grad_scores]))
            grad_scores = tuple(g / scale for g in grad_scores)
        upstream: dict[str, Named] = {unit_key(unit): {} for unit in call.units}
        columns: Named = {}
        for (key, name), grad in zip(call.layout, grad_scores, strict=True):
            if key is None:
                columns[name] = grad.to(problem.dtype)
            elif selection.lengths is not None:
                upstream[key][name] = to_rows(grad, selection, block)
            else:
                upstream[key][name] = grad if selection.order is None else grad.index_select(0, selection.order)
        with torch.autocast(problem.device.type, enabled=False):
            walk = Walk(call, ctx.saved_tensors, with_grad=True)
            pull_chunks(walk, block.chunks, scored, upstream, columns)
            walk.free()
            return (None, *walk.gradients.finish(scale, keep_wide=False))


def _row_wise(
    call: Call, tensors: Sequence[Tensor], weight: Tensor, with_grad: bool, keep_wide: bool = True
) -> tuple[Tensor, list[Tensor | None]]:
    """One fused step for each chunk."""
    problem, selection, row_loss = call.problem, call.selection, call.row_loss
    assert row_loss is not None
    walk = Walk(call, tensors, with_grad)
    names, rows = tuple(problem.projections), tuple(problem.rows)
    weight = weight if selection.order is None else weight.index_select(0, selection.order)
    scale = power_of_two(weight) if with_grad and problem.has_half else None
    if scale is not None:
        weight = weight / scale
    total = torch.zeros((), dtype=problem.dtype, device=problem.device)
    metrics = []
    for block in call.plan.blocks:
        for chunk in block.chunks:
            walk.begin(chunk)
            data = walk.data(names, rows)
            part = weight[chunk.start : chunk.stop]
            if with_grad:
                value, named, *grads = row_loss.gradients(walk.aim(data), part, call.hp)
                walk.fold(data, *grads)
            else:
                value, named = row_loss.values(data, part, call.hp)
            total += value
            metrics.append(named)
    call.metrics.update({name: _in_user_order(call, value) for name, value in join(metrics).items()})
    walk.free()
    loss = total if scale is None else total * scale
    return loss, walk.gradients.finish(scale, keep_wide)


def _grouped(call: Call, tensors: Sequence[Tensor], with_grad: bool) -> tuple[Tensor, list[Tensor | None]]:
    """For each block of groups: scores, the small loss and its gradient, and the scores' gradient."""
    problem, selection, group_loss = call.problem, call.selection, call.group_loss
    assert group_loss is not None
    walk = Walk(call, tensors, with_grad)
    scale = power_of_two(group_loss.weight) if with_grad and problem.has_half else None
    weight = group_loss.weight if scale is None else group_loss.weight / scale
    total = torch.zeros((), dtype=problem.dtype, device=problem.device)
    metrics = []
    n = len(problem.tensors)
    group_tensors = dict(zip(group_loss.groups, tensors[n:], strict=True))
    group_grads: dict[str, list[Tensor]] = {name: [] for name in group_loss.wanted}
    for block in call.plan.blocks:
        keep: dict[str, ChunkData] | None = {} if with_grad and len(block.chunks) == 1 else None
        scored = score_chunks(walk, block.chunks, keep)
        sums = {
            key: {name: segment_sums(v, selection, block) for name, v in named.items()}
            for key, named in scored.rows.items()
        }
        leaves = {key: {k: v.requires_grad_(with_grad) for k, v in named.items()} for key, named in sums.items()}
        groups = {name: t.detach()[block.start : block.stop] for name, t in group_tensors.items()}
        for name in group_loss.wanted:
            groups[name] = groups[name].requires_grad_(with_grad)
        counts = group_counts(selection, block, problem.dtype, problem.device)
        with torch.set_grad_enabled(with_grad):
            loss, named = group_loss.call(group_loss.arrange(leaves, call.units, counts), groups, call.hp)
            part = weight[block.start : block.stop]
            value = (loss * part).sum()
        total += value.detach()
        metrics.append({name: v.detach() for name, v in named.items()})
        if with_grad:
            flat = [v for named in leaves.values() for v in named.values()] + [groups[n] for n in group_loss.wanted]
            found = _grad_or_zero(value, flat)
            upstream: dict[str, Named] = {}
            for key, scores in leaves.items():
                upstream[key] = {name: to_rows(found.pop(0), selection, block) for name in scores}
            for name in group_loss.wanted:
                group_grads[name].append(found.pop(0))
            pull_chunks(walk, block.chunks, scored, upstream, {}, keep)
    call.metrics.update(join(metrics))
    walk.free()
    grads = walk.gradients.finish(scale, keep_wide=True)
    for name in group_loss.groups:
        pieces = group_grads.get(name)
        grad = torch.cat(pieces) if pieces else None
        grads.append(grad if grad is None or scale is None else grad * scale)
    return total if scale is None else total * scale, grads


def _grad_or_zero(value: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    if not value.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    found = torch.autograd.grad(value, leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]


def _in_user_order(call: Call, value: Tensor, flat: bool = False) -> Tensor:
    """(used rows, ...) -> the shape of the user's rows, zero where a row was dropped."""
    selection = call.selection
    if selection.order is not None:
        full = value.new_zeros(call.problem.n_rows, *value.shape[1:])
        full.index_copy_(0, selection.order, value)
        value = full
    return value if flat else value.reshape(*call.problem.leading, *value.shape[1:])
