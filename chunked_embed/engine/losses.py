"""From the values of steps to a loss: weighted rows, or sums over segments and a small loss on those.

Functions on one block stand apart, so that no local name holds on to a buffer when the gradients are cast.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels.segment_sums import segment_sums
from .functions import grad_or_none, split_metrics, weighted
from .gradients import BySegment
from .pack import Block, Packed
from .step import LOSS, METRIC, Step
from .sweep import Call, Sweep, join
from .types import HALF, Named, in_dtype
from .values import out_of_inference

Found = tuple[Tensor, Named, list[Tensor | None], Tensor | None]
"""Loss, metrics, gradients of the call's tensors, and the scale that those have in common."""


@dataclass
class RowLoss:
    """A row-wise loss: the weight of each used row."""

    weight: Tensor | None  # (used rows,); None: their mean

    def run(self, call: Call, tensors: Sequence[Tensor], with_grad: bool) -> Found:
        """One pass over the chunks."""
        sweep = Sweep(call, tensors, with_grad)
        spans = [span for block in call.plan.blocks for span in block.spans]
        weight, scale = _weights(self.weight, call.selection.n_rows, sweep, with_grad)
        if with_grad:
            values, grads = sweep.both(spans, {LOSS: weight}), sweep.finish()
        else:
            (values,), grads = sweep.score(spans).rows.values(), []
        loss, metrics = self.of(values, call)
        return loss, metrics, grads, scale

    def of(self, values: Named, call: Call) -> tuple[Tensor, Named]:
        """The loss of the used rows' values, and metrics in the user's order."""
        loss = in_dtype(mean_or_weighted(values[LOSS], self.weight), call.layout.dtype)
        named = {name: value for name, value in values.items() if name != LOSS}
        return loss, {name.removeprefix(METRIC): in_user_order(call, v.detach()) for name, v in named.items()}


@dataclass
class GroupLoss:
    """A loss over the scores of groups, differentiated by ordinary autograd: its tensors are small."""

    loss_fn: Callable[[Any, Named], Any]  # (scores, groups)
    weight: Tensor | None  # (G,); None: their mean
    weighted: bool  # by the user
    of_rows: bool  # each row is a group of its own
    couples: bool
    by_unit: bool  # scores come by projection
    groups: dict[str, int]  # positions of the group arguments

    def run(self, call: Call, tensors: Sequence[Tensor], with_grad: bool) -> Found:
        """For each block of groups: scores, the small loss and its gradient, and the scores' gradient."""
        sweep = Sweep(call, tensors, with_grad)
        weight, scale = _weights(self.weight, call.selection.n_groups, sweep, with_grad)
        groups = {name: tensors[i] for name, i in self.groups.items()}
        blocks = list(enumerate(call.plan.blocks))
        # Those that are pulled by segment first: sums of the first segment take the place of the call's.
        blocks.sort(key=lambda told: not told[1].segments)
        by_block = {n: self._block(sweep, block, groups, weight, with_grad) for n, block in blocks}
        results = [by_block[n] for n in range(len(blocks))]
        metrics = join([named for _, named, _ in results])
        loss = total([value for value, _, _ in results], call.layout.dtype)
        grads = sweep.finish() if with_grad else []
        for name in results[0][2]:
            grads[self.groups[name]] = torch.cat([found[name] for _, _, found in results])
        return loss if scale is None else loss * scale, metrics, grads, scale

    def _block(
        self, sweep: Sweep, block: Block, groups: Named, weight: Tensor, with_grad: bool
    ) -> tuple[Tensor, Named, Named]:
        """-> loss, metrics and gradients of group arguments of a block."""
        call, layout = sweep.call, sweep.layout
        ahead, in_parts = call.plan.ahead, list[BySegment]()
        if ahead is not None and block.segments:
            scored, in_parts = sweep.ahead(block, ahead)
        else:
            scored = sweep.score(block.spans, keep=with_grad and len(block.spans) == 1)
        scores = by_segment(scored.rows, call, block)
        trained = {
            unit.label: [
                name
                for name, v in scores[unit.label].items()
                if unit.pulled and v.is_floating_point() and _may_learn(call.steps[unit.label], name)
            ]
            for unit in layout.units
        }
        leaves = {(label, n): scores[label][n].requires_grad_(with_grad) for label in trained for n in trained[label]}
        here = widened({name: t.detach()[block.start : block.stop] for name, t in groups.items()})
        wanted = {name: here[name] for name in here if layout.wants_grad[self.groups[name]]}
        for leaf in wanted.values():
            leaf.requires_grad_()
        with torch.set_grad_enabled(with_grad):
            loss, metrics = self.call(scores, here, rows_of_segments(call, block))
            value = weighted(loss, weight[block.start : block.stop])
        metrics = as_metrics(metrics, layout.dtype)
        if not with_grad:
            return value, metrics, {}
        taken = grad_or_none(value, [*leaves.values(), *wanted.values()])
        of_leaves = {leaf: g for leaf, g in zip(leaves, taken) if g is not None}
        of_ahead = [g for (_, name), g in of_leaves.items() if name == ahead]
        # What the loss reads beside that is constant, unless the functions have changed their mind.
        if in_parts and (len(of_ahead) == len(of_leaves) or {*call.differentiable(sweep.operands)} == {ahead}):
            (g,) = of_ahead or [torch.zeros(1, call.selection.segments_per_group, device=layout.device)]
            sweep.gradients.fold(in_parts, [g[0, segment] for segment in dict.fromkeys(block.segments)])
        else:
            zeros = {leaf: torch.zeros_like(t) for leaf, t in leaves.items()} | of_leaves
            upstream = {
                label: to_rows({name: zeros[label, name] for name in names}, call, block, label)
                for label, names in trained.items()
            }
            in_parts.clear()
            sweep.pull(block.spans, scored, upstream, {})
        of_groups = zip(wanted, taken[len(leaves) :])
        return value.detach(), metrics, {n: torch.zeros_like(wanted[n]) if g is None else g for n, g in of_groups}

    def call(
        self, scores: Mapping[str, Named], groups: Named, count: Tensor, of_columns: Mapping[str, Tensor] = {}
    ) -> tuple[Tensor, Named]:
        """The user's function on scores as it sees them, and what it returns, checked."""
        given: dict[str, Any] = dict(scores) if self.by_unit else dict(*scores.values())
        if "count" in given:
            raise ValueError('expected no score or projection called "count": the engine adds the rows of each segment')
        loss, metrics = split_metrics(self.loss_fn({**given, **of_columns, "count": count}, widened(groups)))
        size = len(count)
        scalar = self.couples and isinstance(loss, Tensor) and loss.dim() == 0
        if not isinstance(loss, Tensor) or not (scalar or tuple(loss.shape) == (size,)):
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"expected loss_fn to return one value per group, ({size},), got {got}")
        if scalar and self.weighted:
            raise ValueError("expected no group_weight: loss_fn returned a scalar, one value for the whole batch")
        for name, value in metrics.items():
            if not self.couples and (value.dim() == 0 or len(value) != size):
                raise ValueError(f"expected metric {name!r} of shape ({size}, ...), got {tuple(value.shape)}")
        return loss, metrics


def _may_learn(step: Step, score: str) -> bool:
    return score not in step.constants and (step.differentiable is None or score in step.differentiable)


def _weights(given: Tensor | None, n: int, sweep: Sweep, with_grad: bool) -> tuple[Tensor, Tensor | None]:
    """The weights of n rows or groups, divided by the scale that gradients have in common; and that."""
    layout = sweep.layout
    weight = torch.full((n,), 1 / max(n, 1), dtype=layout.dtype, device=layout.device) if given is None else given
    scale = sweep.scale_for([weight]) if with_grad else None
    return (weight if scale is None else weight / scale), scale


def widened(groups: Named) -> Named:
    """In float32: gradients of groups add up, and take their scale, before they are rounded."""
    return {name: t.float() if t.dtype in HALF else t for name, t in groups.items()}


def mean_or_weighted(values: Tensor, weight: Tensor | None) -> Tensor:
    """One number of the values of rows or groups."""
    if weight is not None:
        return weighted(values, weight)
    if not values.is_floating_point() or values.dtype in HALF:  # of counts torch has no mean, and rounds that of these
        values = values.double()
    return values.mean() if len(values) else values.sum()


def as_metrics(metrics: Named, dtype: torch.dtype) -> Named:
    found = {name: v.detach() for name, v in metrics.items()}
    alike: dict[Any, list[str]] = {}
    for name, v in found.items():
        if v.is_floating_point() and v.dtype != dtype:
            alike.setdefault((v.shape, v.dtype, v.device), []).append(name)
    for names in alike.values():  # in one operation
        together = torch.stack([found[name] for name in names]) if len(names) > 1 else found[names[0]][None]
        found.update(zip(names, together.to(dtype)))
    return found


# --- rows and segments -----------------------------------------------------------------------------------------------


def by_segment(rows: Mapping[str, Named], call: Packed, block: Block) -> dict[str, Named]:
    """By unit: (rows of the block,) -> (groups, segments): rows of a segment added up; empty segments are zero.

    Sums are float64, as is the small loss on them: it takes differences of log-probabilities of thousands of tokens.
    Values of whole segments come as such.
    """
    selection = call.selection
    per_group = selection.segments_per_group
    found: dict[str, Named] = {}
    summed: dict[tuple[str, str], Tensor] = {}
    for label, named in rows.items():
        if selection.bounds is None or call.layout.unit(label).needs.rows == "whole segments":
            found[label] = {name: v.reshape(-1, per_group, *v.shape[1:]) for name, v in named.items()}
        else:
            found[label] = {}
            summed |= {(label, name): v for name, v in named.items()}
    if summed:
        offsets, values = selection.offsets_of(block), list(summed.values())
        if call.layout.direct:
            sums = _Sums.apply(offsets, selection.segment, *values)
        else:
            sums = segment_sums(_together(values), offsets).unbind(0)
        for (label, name), value in zip(summed, sums):
            found[label][name] = value.view(-1, per_group)
    return found


def _together(values: Sequence[Tensor]) -> Tensor:  # (K, rows)
    """Of one dtype as they are, else in float64: an integer beside a float32 would be one."""
    alike = len({v.dtype for v in values}) == 1
    return torch.stack(tuple(values) if alike else [v.double() for v in values])


class _Sums(torch.autograd.Function):
    """The sums of the direct way, with gradients: of all rows, whose ``segment`` is given. It builds no kernel."""

    @staticmethod
    def forward(ctx: Any, offsets: Tensor, segment: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(out_of_inference(segment))  # it may be the user's, who may write to it
        ctx.dtypes = [v.dtype for v in values]
        sums = segment_sums(_together(values), offsets, kernel=False).unbind(0)
        ctx.mark_non_differentiable(*[s for s, needed in zip(sums, ctx.needs_input_grad[2:]) if not needed])
        return sums

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (segment,), given = ctx.saved_tensors, zip(grads, ctx.dtypes)
        of_rows = [None if g is None else g.to(dtype).index_select(0, segment) for g, dtype in given]
        return None, None, *of_rows


def to_rows(named: Named, call: Packed, block: Block, label: str) -> Named:
    """(groups, segments) -> (rows of the block,): the gradient of ``by_segment``. Of whole segments, one for each."""
    selection, dtype = call.selection, call.layout.dtype
    if not named or selection.segment is None or call.layout.unit(label).needs.rows == "whole segments":
        return {name: value.reshape(-1, *value.shape[2:]).to(dtype) for name, value in named.items()}
    rows, first = block.rows, block.start * selection.segments_per_group
    segment = selection.segment[rows.start : rows.stop]
    together = torch.stack([value.reshape(-1) for value in named.values()]).to(dtype)
    return dict(zip(named, together.index_select(1, segment - first if first else segment)))


def rows_of_segments(call: Packed, block: Block) -> Tensor:
    """(groups, segments): how many rows each has."""
    selection, layout = call.selection, call.layout
    per_group = selection.segments_per_group
    if selection.bounds is None:
        return torch.ones(block.stop - block.start, per_group, dtype=layout.dtype, device=layout.device)
    return selection.offsets_of(block).diff().view(-1, per_group).to(layout.dtype)


def in_user_order(call: Packed, value: Tensor, flat: bool = False) -> Tensor:
    """(used rows, ...) -> the shape of the user's rows, zero where a row was dropped."""
    order, layout = call.selection.order, call.layout
    if order is not None:
        full = value.new_zeros(layout.n_rows, *value.shape[1:])
        full.index_copy_(0, order, value)
        value = full
    return value if flat else value.reshape(*layout.leading, *value.shape[1:])


def total(values: list[Tensor], dtype: torch.dtype) -> Tensor:
    """The sum, as wide as the losses of groups are, then in the loss's dtype: infinity stays infinity."""
    return (values[0] if len(values) == 1 else torch.stack(values).sum()).to(dtype)
