"""The direct way of a small problem: its outputs whole, its functions by ordinary autograd. No plan, no chunks, nothing
compiled.

It means what chunks mean. One autograd function stands in front (``_Gate``): behind it tensors are detached, in the
dtype in which functions see them, and it sees to it that a tensor without a part in the loss has a gradient of zero,
that each gradient is rounded once, and that there is no second derivative. Rows that count for nothing are dropped
before any product, and operands are rounded as autocast says; the products themselves are float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .autograd import ScoreName, once_only, with_gradients
from .formula import Formula
from .functions import Form
from .layout import Layout, Spec
from .losses import GroupLoss, RowLoss, as_metrics, by_segment, in_user_order, mean_or_weighted, rows_of_segments
from .pack import Block, Selection, Span
from .step import LOSS, METRIC
from .types import Named, in_dtype
from .values import out_of_inference


@dataclass
class Direct:
    """A call that goes the direct way: its layout, the rows that it uses, its functions, its tensors.

    It runs outside of autocast (``Layout.no_autocast``).
    """

    layout: Layout
    selection: Selection
    form: Form
    formulas: Mapping[str, Formula]  # by unit
    tensors: list[Tensor]  # as autograd sees them

    # --- what comes out ---

    def row_loss(self, loss: RowLoss) -> tuple[Tensor, Named]:
        """The loss of a row-wise call, and its metrics in the user's order."""
        given = self._given()
        ((values, _),) = self._values(given).values()
        value = in_dtype(mean_or_weighted(values.pop(LOSS), loss.weight), self.layout.dtype)
        of_rows = given.own({name.removeprefix(METRIC): v.detach() for name, v in values.items()})
        named = {name: in_user_order(self, v) for name, v in of_rows.items()}
        return with_gradients(value, given.gated), named

    def group_loss(self, loss: GroupLoss) -> tuple[Tensor, Named]:
        """The loss of a grouped call, and its metrics."""
        given, block, dtype = self._given(), self.block, self.layout.dtype
        found = self._values(given)
        scores = by_segment({label: given.own(values) for label, (values, _) in found.items()}, self, block)
        of_columns = {name: total for _, totals in found.values() for name, total in totals.items()}
        groups = {name: given.tensors[i] for name, i in loss.groups.items()}
        value, metrics = loss.call(scores, groups, rows_of_segments(self, block), of_columns)
        value = mean_or_weighted(value, loss.weight) if value.dim() else value
        return with_gradients(in_dtype(value, dtype), given.gated), as_metrics(metrics, dtype)

    def scores(self) -> list[tuple[ScoreName, Tensor]]:
        """One a row ``(M,)``, sums of a segment ``(G, segments)``, column scores ``(V,)``."""
        given, found = self._given(), list[tuple[ScoreName, Tensor]]()
        values = self._values(given)
        own = {label: given.own(of_rows) for label, (of_rows, _) in values.items()}
        if self.selection.bounds is None:
            own = {
                label: {n: in_user_order(self, v, flat=True) for n, v in named.items()} for label, named in own.items()
            }
        else:
            own = by_segment(own, self, self.block)
        found += [((label, name), v) for label, named in own.items() for name, v in named.items()]
        found += [((None, name), v) for _, totals in values.values() for name, v in totals.items()]
        return [(name, with_gradients(v, given.gated) if v.is_floating_point() else v) for name, v in found]

    # --- on the way ---

    @property
    def block(self) -> Block:
        """All groups at once."""
        groups = (0, self.selection.n_groups)
        return Block(*groups, (Span(0, self.selection.n_rows, groups),))

    def _given(self) -> _Given:
        layout, order = self.layout, self.selection.order
        tensors = [out_of_inference(t) for t in self.tensors] if layout.learning else list(self.tensors)
        gated: Sequence[Tensor] = ()
        if layout.learning:
            gated = _Gate.apply(layout, *[tensors[i] for i in layout.learning])
            for i, t in zip(layout.learning, gated):
                tensors[i] = t
        for i in layout.frozen_but_widened:
            tensors[i] = layout.seen(i, tensors[i])
        if order is not None:
            for i in layout.rowlike:
                tensors[i] = tensors[i].index_select(0, order)
        return _Given(tensors, gated)

    def _values(self, given: _Given) -> dict[str, tuple[Named, Named]]:
        """By unit: values of the used rows, and of the columns."""
        layout, tensors = self.layout, given.tensors
        rows = {name: tensors[i] for name, i in layout.rows.items()}
        columns = {name: tensors[i] for name, i in layout.columns.items()}
        units: dict[int, Tensor] = {}
        found = {}
        for unit in layout.units:
            bound = self.formulas[unit.label].bind(names=self.form.names)
            outputs = {name: _outputs(layout.specs[name], tensors, units) for name in unit.names}
            found[unit.label] = self.form.whole(bound, outputs, rows, columns)
        return found


@dataclass
class _Given:
    """Tensors by position as the functions see them, and those of them that learn."""

    tensors: list[Tensor]
    gated: Sequence[Tensor]

    def own(self, values: Named) -> Named:
        """A value that is part of all outputs, which it would keep, or one of the user's tensors, is a copy."""
        if not values:
            return values
        theirs = {t.untyped_storage()._cdata for t in self.tensors}
        return {name: v.clone() if _is_shared(v, theirs) else v for name, v in values.items()}


def _is_shared(value: Tensor, storages: Set[int]) -> bool:
    storage = value.untyped_storage()
    return storage.nbytes() > value.nbytes or storage._cdata in storages


def _outputs(spec: Spec, tensors: Sequence[Tensor], units: dict[int, Tensor]) -> Tensor:  # (R, V)
    """``units``: rows of length one by position, formed once for all projections."""
    total: Any = None
    for term in spec.terms:
        x = tensors[term.input]
        if term.weight is None:
            return x
        weight = tensors[term.weight]
        if spec.cosine:
            x, weight = (_unit(i, t, spec.operand_dtype, units) for i, t in ((term.input, x), (term.weight, weight)))
        if total is None:
            total = F.linear(x, weight, None if spec.bias is None else tensors[spec.bias])
        else:
            total = torch.addmm(total, x, weight.t())
    return total


def _unit(i: int, x: Tensor, operand: torch.dtype, units: dict[int, Tensor]) -> Tensor:
    if i not in units:
        if operand == torch.float16:  # which cannot hold the gradient of a row of zeros: it gets none
            x = torch.where(x.detach().any(1, keepdim=True), x, 0.0)
        units[i] = F.normalize(x, dim=1)
    return units[i]


# --- autograd --------------------------------------------------------------------------------------------------------


class _Gate(torch.autograd.Function):
    """Tensors that learn, as the functions see them."""

    @staticmethod
    def forward(ctx: Any, layout: Layout, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.dtypes = [t.dtype for t in tensors] if layout.widened else None
        seen = [t.detach() for t in tensors]
        if layout.widened:
            seen = [layout.seen(i, t) if i in layout.widened else t for i, t in zip(layout.learning, seen)]
        return tuple(seen)

    @staticmethod
    @once_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.dtypes is not None:
            grads = tuple([grad.to(dtype) for grad, dtype in zip(grads, ctx.dtypes)])
        return None, *grads
