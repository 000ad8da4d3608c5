"""Two doors into autograd. ``ChunkedLoss`` takes gradients in the forward pass (three products for each trainable
projection) and scales them in backward. ``ChunkedScores`` returns differentiable scores and walks again in backward
(four products, or three where few outputs stay), for losses that need all scores first, for a few groups whose small
loss may as well be differentiated along with what follows, and for code behind the scores that we do not know.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from .formula import is_users
from .gradients import FEW, in_places, scaled, scaled_both
from .layout import Layout
from .losses import GroupLoss, RowLoss, by_segment, in_user_order, to_rows
from .sweep import Call, Scored, Sweep
from .types import Named
from .values import frozen


def once_only(backward: Callable) -> Callable:
    """Refuse ``create_graph=True``: gradients that are built once have no graph; a penalty on them would be lost."""

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("a chunked loss has no second derivative: expected backward without create_graph=True")
        return backward(ctx, *grads)

    return checked


ScoreName = tuple[str | None, str]
"""The unit of a score (None: of columns), and its name."""


class Watch:
    """What backward reads again beside saved tensors: the loss's own tensors and containers, and segment ids. Changed
    in place since forward, they would give the gradient of another loss."""

    def __init__(self, call: Call) -> None:
        own = call.loss.__dict__
        named = {**own, **own.get("_buffers", {}), **own.get("_parameters", {})}
        self.call = call
        self.tensors = [(name, value, value._version) for name, value in named.items() if _counts_versions(value)]
        self.containers = [(n, v, frozen(v)) for n, v in own.items() if type(v) in CONTAINERS and is_users(n)]
        segment = call.selection.segment
        self.segment = (segment, segment._version) if _counts_versions(segment) else None

    def check(self) -> None:
        changed = [name for name, tensor, version in self.tensors if tensor._version != version]
        changed += [name for name, value, before in self.containers if frozen(value) != before]
        loss = type(self.call.loss).__name__
        read = [f"{loss}.{name}" for name in changed if any(step.reads(name) for step in self.call.steps.values())]
        if self.segment is not None and self.segment[0]._version != self.segment[1]:
            read.append("segments")
        if read:
            raise RuntimeError(
                f"expected {read[0]} to stay as it was in the forward pass until backward has run, got it changed in "
                "place: assign a new one instead, or change it after backward"
            )


CONTAINERS = (list, dict, set)


def _counts_versions(value: Any) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and not value.is_inference()


class ChunkedLoss(torch.autograd.Function):
    """Gradients in forward, scaled in backward. ``metrics`` are put into the dict that it is given.

    Half-precision weight gradients stay in their float32 sums until backward scales and rounds them, once.
    """

    @staticmethod
    def forward(ctx: Any, call: Call, loss: RowLoss | GroupLoss, metrics: Named, *tensors: Tensor) -> Tensor:
        wanted = call.layout.any_grad
        ctx.put = _Put(call.layout)
        with call.layout.no_autocast():
            value, found, grads, ctx.scale = loss.run(call, tensors, wanted)
        metrics.update(found)
        if wanted:
            ctx.save_for_backward(call.selection.order, *grads)
        return value

    @staticmethod
    @once_only
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        # Out of place: a second backward over a retained graph must not see scaled gradients. Else each sum is let go
        # once it is scaled.
        order, *grads = ctx.saved_tensors
        ctx.maybe_clear_saved_tensors()
        factor = grad_loss if ctx.scale is None else grad_loss * ctx.scale
        return (None, None, None, *ctx.put(grads, factor, order))


class ChunkedScores(torch.autograd.Function):
    """Differentiable scores: one per row ``(M,)``, sums of a segment ``(G, segments)``, and column scores ``(V,)``.
    Their ``names`` are put into the list that it is given.

    Nothing but the scores is kept for backward, which walks over the chunks again; except for the outputs of one chunk,
    where they are few or no larger than the inputs, which autograd holds anyway (``ChunkPlan.keeps_outputs``).
    """

    @staticmethod
    def forward(ctx: Any, call: Call, names: list[ScoreName], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # what nothing depends on has no upstream
        (block,) = call.plan.blocks
        keep = call.plan.keeps_outputs and call.layout.any_grad
        with call.layout.no_autocast():
            scored = Sweep(call, tensors, holds=keep).score(block.spans, keep)
        results, rowlike = [], []
        of_segments = by_segment(scored.rows, call, block)
        for label, named in scored.rows.items():
            for name, value in named.items():
                names.append((label, name))
                whole = call.layout.unit(label).needs.rows == "whole segments"
                by_row = call.selection.bounds is None and (value.dim() == 1 or not whole)
                rowlike.append(by_row)
                found = value if by_row else of_segments[label][name]
                if call.selection.bounds is None or whole:  # what is kept for backward must not hold a result
                    found = found.clone()
                results.append(in_user_order(call, found, flat=True) if by_row else found)
        for name, value in scored.columns.items():
            names.append((None, name))
            results.append(value.clone())
        ctx.call, ctx.names, ctx.rowlike = call, tuple(names), (*rowlike, *(False for _ in scored.columns))
        ctx.watched = Watch(call) if call.layout.any_grad else None
        ctx.scored = Scored({}, scored.columns, scored.parts, scored.chunks)
        if call.layout.any_grad:
            # Autograd saves no tensor of inference mode; nobody can write to one outside of it either.
            ctx.of_inference = {i: t for i, t in enumerate(tensors) if t.is_inference()}
            ctx.save_for_backward(*[None if i in ctx.of_inference else t for i, t in enumerate(tensors)])
        return tuple(results)

    @staticmethod
    @once_only
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        call, scored = ctx.call, ctx.scored
        saved = enumerate(ctx.saved_tensors)  # which can be read once
        tensors = [ctx.of_inference.get(i) if t is None else t for i, t in saved]
        ctx.watched.check()
        layout, selection = call.layout, call.selection
        (block,) = call.plan.blocks
        upstream: dict[str, Named] = {unit.label: {} for unit in layout.units}
        of_columns: Named = {}
        with torch.autocast(layout.device.type, enabled=False):
            sweep = Sweep(call, tensors, holds=True)
            scale = sweep.scale_for([g for g in grads if g is not None])
            if scale is not None:
                grads = tuple(None if g is None else g / scale for g in grads)
            for (label, name), by_row, grad in zip(ctx.names, ctx.rowlike, grads):
                if grad is None:
                    continue
                if label is None:
                    of_columns[name] = grad.to(layout.dtype)
                elif by_row:
                    upstream[label][name] = grad if selection.order is None else grad.index_select(0, selection.order)
                else:
                    upstream[label] |= to_rows({name: grad}, call, block, label)
            sweep.pull(block.spans, scored, upstream, of_columns)
            # Gradients took the outputs' place: a second backward forms them again.
            ctx.scored = Scored({}, scored.columns, scored.parts, [{} for _ in scored.chunks])
            del scored
            found = sweep.finish()
            for i in layout.groups.values():
                if layout.wants_grad[i]:  # what the loss makes of it is added
                    found[i] = torch.zeros_like(tensors[i])
            return (None, None, *_Put(layout)(found, scale, selection.order))


class _Put:
    """Gradients as they were gathered -> of the tensors: scaled, in their dtypes, used rows in their places."""

    def __init__(self, layout: Layout) -> None:
        self.dtypes, self.rowlike, self.n_rows = layout.dtypes, layout.rowlike, layout.n_rows

    def __call__(self, grads: list[Tensor | None], factor: Tensor | None, order: Tensor | None) -> list[Tensor | None]:
        """Lets go of ``grads`` one by one; of sums first, which take less where they are returned."""
        found: list[Tensor | None] = [None] * len(grads)
        if factor is not None and order is None and _are_two_of_few(grads):
            i, j = [n for n, grad in enumerate(grads) if grad is not None]
            found[i], found[j] = scaled_both(grads[i], grads[j], factor, (self.dtypes[i], self.dtypes[j]))
            return found
        for i in sorted(range(len(grads)), key=lambda i: i in self.rowlike):
            grad, grads[i] = grads[i], None
            if grad is None:
                continue
            if order is None or i not in self.rowlike:
                found[i] = scaled(grad, factor, self.dtypes[i])
            else:
                found[i] = in_places(grad, factor, self.dtypes[i], order, self.n_rows)
        return found


def _are_two_of_few(grads: list[Tensor | None]) -> TypeGuard[list[Any]]:
    """Nothing of them is held on to."""
    sizes = [grad.numel() for grad in grads if grad is not None]
    return len(sizes) == 2 and sum(sizes) <= FEW


class _Beside(torch.autograd.Function):
    """A value beside tensors that it need not depend on: they have gradients all the same, of zero."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *others: Tensor) -> Tensor:
        ctx.others = others
        return value.clone()

    @staticmethod
    @once_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (grad, *[torch.zeros_like(t) for t in ctx.others])


def with_gradients(value: Tensor, tensors: Sequence[Tensor], *, always: bool = False) -> Tensor:
    """``always``: also where the value has a gradient, of something else."""
    return value if not tensors or (value.requires_grad and not always) else _Beside.apply(value, *tensors)
