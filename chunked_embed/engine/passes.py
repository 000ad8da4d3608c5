"""Passes over the chunks: a row-wise loss, and a grouped one, each with its gradients.

Functions on one chunk or block stand apart, so that no local name holds on to a buffer when the gradients are cast.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .plan import Block, Chunk
from .select import Selection
from .steps import ChunkData, Named, grad_or_zero, join, weighted
from .walk import Call, Walk, pull_chunks, score_chunks

Result = tuple[Tensor, list[Tensor | None], Tensor | None]  # loss, gradients of the call's tensors, their common scale


def row_wise(call: Call, tensors: Sequence[Tensor], weight: Tensor, with_grad: bool) -> Result:
    """One fused step for each chunk."""
    problem, selection = call.problem, call.selection
    walk = Walk(call, tensors, with_grad)
    weight = weight if selection.order is None else weight.index_select(0, selection.order)
    scale = power_of_two(weight) if with_grad and problem.has_float16 else None
    if scale is not None:
        weight = weight / scale
    results = [_row_chunk(walk, chunk, weight) for block in call.plan.blocks for chunk in block.chunks]
    metrics = join([named for _, named in results])
    for name, value in metrics.items():
        call.metrics.setdefault(name, in_user_order(call, value))  # a deferred backward leaves the user's dict alone
    total = _sum([value for value, _ in results])
    return total if scale is None else total * scale, walk.finish(), scale


def _row_chunk(walk: Walk, chunk: Chunk, weight: Tensor) -> tuple[Tensor, Named]:
    call, problem = walk.call, walk.problem
    assert call.row_loss is not None
    walk.begin(chunk)
    data = walk.data(tuple(problem.projections), tuple(problem.rows))
    part = weight[chunk.start : chunk.stop]
    if not walk.with_grad:
        return call.row_loss.values(data, part, call.hp)
    value, metrics, rows, columns = call.row_loss.gradients(walk.aim(data), part, call.hp)
    walk.fold(data, rows, columns)
    return value, metrics


def grouped(call: Call, tensors: Sequence[Tensor], with_grad: bool) -> Result:
    """For each block of groups: scores, the small loss and its gradient, and the scores' gradient."""
    group_loss = call.group_loss
    assert group_loss is not None
    walk = Walk(call, tensors, with_grad)
    scale = power_of_two(group_loss.weight) if with_grad and call.problem.has_float16 else None
    weight = group_loss.weight if scale is None else group_loss.weight / scale
    groups = dict(zip(group_loss.groups, tensors[len(call.problem.dtypes) :], strict=True))
    results = [_block(walk, block, groups, weight) for block in call.plan.blocks]
    call.metrics.update(join([metrics for _, metrics, _ in results]))
    total = _sum([value for value, _, _ in results])
    grads = walk.finish()
    for name in groups:
        wanted = with_grad and name in group_loss.wanted
        grads.append(torch.cat([found[name] for _, _, found in results]) if wanted else None)
    return total if scale is None else total * scale, grads, scale


def _block(walk: Walk, block: Block, groups: Named, weight: Tensor) -> tuple[Tensor, Named, Named]:
    """-> loss, metrics and gradients of group arguments of a block."""
    call, selection, with_grad = walk.call, walk.selection, walk.with_grad
    group_loss = call.group_loss
    assert group_loss is not None
    keep: dict[str, ChunkData] | None = {} if with_grad and len(block.chunks) == 1 else None
    scored = score_chunks(walk, block.chunks, keep)
    scores = {
        unit: {name: segment_sums(v, selection, block).requires_grad_(with_grad) for name, v in named.items()}
        for unit, named in scored.rows.items()
    }
    here = {name: t.detach()[block.start : block.stop] for name, t in groups.items()}
    wanted = [here[name].requires_grad_() for name in group_loss.wanted] if with_grad else []
    counts = group_counts(call, block)
    with torch.set_grad_enabled(with_grad):
        loss, metrics = group_loss.call(group_loss.arrange(scores, call.units, counts), here, call.hp)
        value = weighted(narrowed(loss, call.problem.dtype), weight[block.start : block.stop])
    metrics = as_metrics(metrics, call.problem.dtype)
    if not with_grad:
        return value, metrics, {}
    leaves = [score for named in scores.values() for score in named.values()]
    grads = grad_or_zero(value, leaves + wanted)
    flat = iter(to_rows(grad, selection, block, call.problem.dtype) for grad in grads[: len(leaves)])
    upstream = {unit: {name: next(flat) for name in named} for unit, named in scores.items()}
    pull_chunks(walk, block.chunks, scored, upstream, {}, keep)
    return value.detach(), metrics, dict(zip(group_loss.wanted, grads[len(leaves) :], strict=True))


def narrowed(loss: Tensor, dtype: torch.dtype) -> Tensor:
    """What float64 can hold may be too much for float32: the largest number then, which has no gradient, not inf."""
    most = torch.finfo(dtype).max
    return loss.clamp(-most, most).to(dtype)


def as_metrics(metrics: Named, dtype: torch.dtype) -> Named:
    return {name: v.detach().to(dtype) if v.is_floating_point() else v.detach() for name, v in metrics.items()}


def segment_sums(values: Tensor, selection: Selection, block: Block) -> Tensor:
    """(rows of the block,) -> (groups, segments): rows of a segment added up; empty segments are zero.

    Sums are float64, as is the small loss on them: it takes differences of log-probabilities of thousands of tokens.
    """
    per_group = selection.segments_per_group
    if selection.lengths is None:
        return values.view(-1, per_group)
    lengths = selection.lengths[block.start * per_group : block.stop * per_group].to(values.device, non_blocking=True)
    return torch.segment_reduce(values.double(), "sum", lengths=lengths, unsafe=True, initial=0).view(-1, per_group)


def to_rows(values: Tensor, selection: Selection, block: Block, dtype: torch.dtype) -> Tensor:
    """(groups, segments) -> (rows of the block,): the gradient of ``segment_sums``."""
    flat = values.reshape(-1).to(dtype)
    if selection.segment is None:
        return flat
    first = block.chunks[0].start if block.chunks else 0
    last = block.chunks[-1].stop if block.chunks else 0
    return flat.index_select(0, selection.segment[first:last] - block.start * selection.segments_per_group)


def group_counts(call: Call, block: Block) -> Tensor:
    """(groups, segments) rows of each segment."""
    selection, dtype, device = call.selection, call.problem.dtype, call.problem.device
    per_group = selection.segments_per_group
    if selection.lengths is None:
        return torch.ones(block.stop - block.start, per_group, dtype=dtype, device=device)
    lengths = selection.lengths[block.start * per_group : block.stop * per_group]
    return lengths.view(-1, per_group).to(device, dtype, non_blocking=True)


def power_of_two(weight: Tensor) -> Tensor:
    """The scale that brings the largest weight to (1/2, 1]: exact in any dtype. Zero and non-finite weights: one."""
    largest = weight.abs().amax() if weight.numel() else weight.new_ones(())
    exponent = torch.ceil(torch.log2(largest))
    return torch.exp2(torch.where(torch.isfinite(exponent), exponent, 0.0))


def _sum(values: list[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack(values).sum()


def in_user_order(call: Call, value: Tensor, flat: bool = False) -> Tensor:
    """(used rows, ...) -> the shape of the user's rows, zero where a row was dropped."""
    selection = call.selection
    if selection.order is not None:
        full = value.new_zeros(call.problem.n_rows, *value.shape[1:])
        full.index_copy_(0, selection.order, value)
        value = full
    return value if flat else value.reshape(*call.problem.leading, *value.shape[1:])
