"""Two doors into autograd. ``ChunkedLoss`` takes gradients in the forward pass (three products for each trainable
projection) and scales them in backward. ``ChunkedScores`` returns differentiable scores and walks again in backward
(four products), for losses that need all scores first and for code behind the scores that we do not know.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .gradients import scaled
from .passes import grouped, in_user_order, power_of_two, row_wise, segment_sums, to_rows
from .steps import Named
from .walk import Call, Scored, Walk, pull_chunks, score_chunks


def once_only(backward: Callable) -> Callable:
    """Refuse ``create_graph=True``: gradients that are built once have no graph; a penalty on them would be lost."""

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("a chunked loss has no second derivative: expected backward without create_graph=True")
        return backward(ctx, *grads)

    return checked


class ChunkedLoss(torch.autograd.Function):
    """Gradients in forward, scaled in backward; or, where no product can be saved by that, both in backward.

    Half-precision weight gradients stay in their float32 sums until backward scales and rounds them, once.
    """

    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor) -> Tensor:
        wanted = call.problem.any_grad or bool(call.group_loss and call.group_loss.wanted)
        ctx.call = call
        ctx.dtypes = [t.dtype for t in tensors]
        with torch.autocast(call.problem.device.type, enabled=False):
            if call.row_loss is not None:
                assert call.row_weight is not None
                loss, grads, ctx.scale = row_wise(call, tensors, call.row_weight, wanted and not call.plan.deferred)
            else:
                loss, grads, ctx.scale = grouped(call, tensors, wanted)
        if wanted:
            ctx.save_for_backward(*(tensors if call.plan.deferred else grads))
        return loss

    @staticmethod
    @once_only
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        call = ctx.call
        if call.plan.deferred:
            with torch.autocast(call.problem.device.type, enabled=False):
                _, grads, factor = row_wise(call, ctx.saved_tensors, call.row_weight * grad_loss, True)
        else:
            # Out of place: a second backward over a retained graph must not see scaled gradients.
            grads, factor = ctx.saved_tensors, grad_loss if ctx.scale is None else grad_loss * ctx.scale
        return (None, *_cast(grads, factor, ctx.dtypes))


def _cast(
    grads: Sequence[Tensor | None], factor: Tensor | None, dtypes: Sequence[torch.dtype]
) -> Iterator[Tensor | None]:
    return (None if g is None else scaled(g, factor, dtype) for g, dtype in zip(grads, dtypes, strict=True))


class ChunkedScores(torch.autograd.Function):
    """Differentiable scores: sums of a segment ``(G, segments)``, or one per row ``(M,)``, and column scores ``(V,)``.

    Nothing but the scores is kept for backward, which walks over the chunks again; except for outputs that are no
    larger than the inputs, which autograd holds anyway.
    """

    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        (block,) = call.plan.blocks
        ctx.kept = {} if call.plan.keeps_outputs and call.problem.any_grad else None
        with torch.autocast(call.problem.device.type, enabled=False):
            scored = score_chunks(Walk(call, tensors, with_grad=False), block.chunks, ctx.kept)
        ctx.call, ctx.scored = call, Scored({}, scored.columns, scored.saved)
        if call.problem.any_grad:
            ctx.save_for_backward(*tensors)
        results = []
        call.layout = []
        for unit in call.units:
            for name, value in scored.rows[unit.key].items():
                call.layout.append((unit.key, name))
                by_segment = call.selection.lengths is not None
                # A copy: what is kept for backward must not hold a result, which holds what is kept.
                value = segment_sums(value, call.selection, block) if by_segment else value.clone()
                results.append(value if by_segment else in_user_order(call, value, flat=True))
        for name, value in scored.columns.items():
            call.layout.append((None, name))
            results.append(value.clone())
        return tuple(results)

    @staticmethod
    @once_only
    def backward(ctx: Any, *grad_scores: Tensor) -> tuple[Tensor | None, ...]:
        call, scored = ctx.call, ctx.scored
        problem, selection = call.problem, call.selection
        (block,) = call.plan.blocks
        scale = None
        if problem.has_float16:
            scale = power_of_two(torch.stack([g.abs().amax() for g in grad_scores]))
            grad_scores = tuple(g / scale for g in grad_scores)
        upstream: dict[str, Named] = {unit.key: {} for unit in call.units}
        columns: Named = {}
        for (key, name), grad in zip(call.layout, grad_scores, strict=True):
            if key is None:
                columns[name] = grad.to(problem.dtype)
            elif selection.lengths is not None:
                upstream[key][name] = to_rows(grad, selection, block, call.problem.dtype)
            else:
                upstream[key][name] = grad if selection.order is None else grad.index_select(0, selection.order)
        with torch.autocast(problem.device.type, enabled=False):
            walk = Walk(call, ctx.saved_tensors, with_grad=True)
            kept, ctx.kept = ctx.kept, None  # gradients take the outputs' place: a second backward forms them again
            pull_chunks(walk, block.chunks, scored, upstream, columns, kept)
            del kept
            return (None, *_cast(walk.finish(), scale, [t.dtype for t in ctx.saved_tensors]))
