"""Where gradients are gathered while the chunks pass by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..kernels.norms import through_norms_
from ..kernels.scale import combine_, scale_, scale_both_
from .layout import Layout
from .pack import Selection, Span
from .products import addmm_, mm
from .types import in_dtype

if TYPE_CHECKING:
    from .chunk import Visit

FEW = 1 << 22  # elements of two gradients, whose launches take longer than they do
BLOCK = 1 << 25  # elements cast at a time: where a device casts through a copy, the copy is small

BySegment = tuple[Span, dict[int, Tensor]]
"""The rows of a segment, and what is summed over them."""


class Gradients:
    """Gradients of all tensors of a call that want one, in the dtypes that the plan has chosen.

    Weights and columns are summed over chunks; those of the used rows are written once per chunk, in their order.
    """

    def __init__(
        self,
        layout: Layout,
        selection: Selection,
        operands: Sequence[Tensor],
        sums: Sequence[torch.dtype | None],
        inverse_norms: Mapping[int, Tensor],
        powers: Mapping[int, Tensor],
    ) -> None:
        self.layout = layout
        self.selection = selection
        self.operands = operands
        self.dtypes = sums
        self.inverse_norms = inverse_norms
        self.powers = powers
        self.rows: dict[int, Tensor] = {}  # (used rows, ...)
        self.sums: dict[int, Tensor] = {}
        self.before_norms: set[int] = set()  # those that are not gradients of cosines' operands yet

    def _dtype(self, i: int) -> torch.dtype:
        dtype = self.dtypes[i]
        assert dtype is not None, "a gradient that nobody wants"
        return dtype

    def row_buffer(self, i: int) -> Tensor:
        """``(used rows, ...)`` for a row-aligned tensor."""
        if i not in self.rows:
            operand = self.operands[i]
            shape = self.selection.n_rows, *operand.shape[1:]
            self.rows[i] = torch.empty(shape, dtype=self._dtype(i), device=operand.device)
        return self.rows[i]

    def destination(self, i: int, span: Span, rows: int) -> Tensor:
        """Where a step may write the gradient of an identity's rows: the gradient itself if nothing else goes there."""
        buffer = self.row_buffer(i)
        if self.layout.input_uses[i] == 1 and rows == span.rows:
            return buffer[span.start : span.stop]
        return torch.empty(rows, *buffer.shape[1:], dtype=buffer.dtype, device=buffer.device)

    def add_rows(self, i: int, visit: Visit, value: Tensor, *, through_norms: bool = False, mine: bool = False) -> None:
        """The gradient of a chunk's rows; a second contribution to the same rows adds. ``mine``: the tensor is given
        away, and is the gradient of all rows where the chunk is."""
        if not through_norms:
            self.before_norms.add(i)
        if mine and i not in self.rows and len(value) == self.selection.n_rows:
            self.rows[i] = in_dtype(value, self._dtype(i))
            visit.written.add(i)
            return
        place = self.row_buffer(i)[visit.span.start : visit.span.stop]
        if i in visit.written:
            place.add_(value)
        elif value.data_ptr() != place.data_ptr():
            place.copy_(value)
        visit.written.add(i)

    def add_input(self, i: int, visit: Visit, grad_outputs: Tensor, weight: Tensor) -> None:
        """``grad_outputs @ weight`` for a chunk's rows."""
        self.before_norms.add(i)
        place = self.row_buffer(i)[visit.span.start : visit.span.stop]
        if i in visit.written:
            addmm_(place, grad_outputs, weight)
        else:
            mm(grad_outputs, weight, out=place)
            visit.written.add(i)

    def add_product(self, i: int, a: Tensor, b: Tensor) -> None:
        """``a.T @ b``, summed over chunks: a weight's gradient from those of the outputs, and the input."""
        self.before_norms.add(i)
        if i in self.sums:
            addmm_(self.sums[i], a.t(), b)
        else:  # the first overwrites instead of adding
            operand = self.operands[i]
            self.sums[i] = torch.empty(operand.shape, dtype=self._dtype(i), device=operand.device)
            mm(a.t(), b, out=self.sums[i])

    def add(self, i: int, value: Tensor, *, through_norms: bool = False, mine: bool = False) -> None:
        """A gradient summed over chunks: a column's, a bias's, or a weight's that a step has formed itself."""
        if not through_norms:
            self.before_norms.add(i)
        if i not in self.sums:
            if mine:
                self.sums[i] = in_dtype(value, self._dtype(i))
                return
            operand = self.operands[i]
            self.sums[i] = torch.zeros(operand.shape, dtype=self._dtype(i), device=operand.device)
        self.sums[i].add_(value)

    def fold(self, segments: Sequence[BySegment], factors: Sequence[Tensor]) -> None:
        """Gradients that were taken before their factors were known: rows in their places, sums by segment. A factor of
        zero makes nothing of anything; the segments' sums are used up."""
        of_segments = list(zip(segments, factors, strict=True))
        for (part, _), factor in of_segments:
            for rows in self.rows.values():
                combine_(rows[part.start : part.stop], factor)
        for i in {i: None for _, sums in segments for i in sums}:
            terms: list[Any] = [(sums.pop(i), factor) for (_, sums), factor in of_segments if i in sums]
            of_sum = None
            if i not in self.sums:
                self.sums[i], of_sum = terms.pop(0)
                terms = terms or [(None, None)]
            for x, of_x in terms:
                combine_(self.sums[i], of_sum, x, of_x)
                of_sum = None

    def finish(self) -> list[Tensor | None]:
        """The sums as they were gathered, perhaps wider than their tensors, in the order of the layout's tensors; of
        row-aligned ones those of used rows."""
        found = self.rows | self.sums
        self.rows, self.sums = {}, {}
        for i, dtype in enumerate(self.dtypes):
            if dtype is None:
                continue
            rowlike, operand = i in self.layout.rowlike, self.operands[i]
            if i not in found:  # nothing was added
                length = self.selection.n_rows if rowlike else len(operand)
                found[i] = torch.zeros((length, *operand.shape[1:]), dtype=dtype, device=operand.device)
            if i in self.inverse_norms:
                self._through_norms_(i, found[i], self.selection.order if rowlike else None)
            if i in self.layout.room:
                found[i] = found[i][..., : self.layout.shapes[i][-1]]
        return [found.pop(i, None) for i in range(len(self.dtypes))]

    def _through_norms_(self, i: int, grad: Tensor, order: Tensor | None) -> None:
        """``order``: the rows of the tensor that the gradient's belong to; None: all."""
        operand, inverse, power = self.operands[i], self.inverse_norms[i], self.powers.get(i)
        if i not in self.before_norms:
            pass
        elif order is None:
            through_norms_(grad, operand, inverse)
        else:
            for part, index in zip(*(t.split(_rows_of_block(grad)) for t in (grad, order)), strict=True):
                through_norms_(part, operand.index_select(0, index), inverse.index_select(0, index))
        if power is not None:
            grad *= (power if order is None else power.index_select(0, order))[:, None]


def power_of_two(weights: Sequence[Tensor]) -> Tensor:
    """The scale that brings the largest weight to (1/2, 1]: exact in any dtype. Zero and non-finite weights: one."""
    largest = torch.stack([w.abs().amax() if w.numel() else w.new_ones(()) for w in weights]).amax()
    exponent = torch.ceil(torch.log2(largest))
    return torch.exp2(torch.where(torch.isfinite(exponent), exponent, 0.0))


def scaled(grad: Tensor, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``grad * factor`` in ``dtype``, rounded once, without a wide copy. Out of place unless there is nothing to do."""
    if factor is None:
        return in_dtype(grad, dtype).contiguous()
    result = torch.empty_like(grad, dtype=dtype, memory_format=torch.contiguous_format)
    if grad.numel() < BLOCK:
        scale_(grad.contiguous(), factor, result)
        return result
    rows = _rows_of_block(grad)
    for part, out in zip(grad.split(rows), result.split(rows), strict=True):
        scale_(part.contiguous(), factor, out)
    return result


def scaled_both(x: Tensor, y: Tensor, factor: Tensor, dtypes: tuple[torch.dtype, torch.dtype]) -> list[Tensor]:
    """Of two in one launch, where those are what takes the time."""
    results = [
        torch.empty_like(grad, dtype=dtype, memory_format=torch.contiguous_format)
        for grad, dtype in zip((x, y), dtypes)
    ]
    scale_both_(x.contiguous(), y.contiguous(), factor, *results)
    return results


def in_places(
    grad: Tensor,  # (used rows, ...)
    factor: Tensor | None,
    dtype: torch.dtype,
    order: Tensor,  # (used rows,)
    rows: int,
) -> Tensor:
    """``scaled``, each row in its place among ``rows``, and zeros elsewhere."""
    result = torch.zeros((rows, *grad.shape[1:]), dtype=dtype, device=grad.device)
    n = _rows_of_block(grad)
    for part, index in zip(grad.split(n), order.split(n), strict=True):
        result.index_copy_(0, index, scaled(part, factor, dtype))
    return result


def _rows_of_block(t: Tensor) -> int:
    return max(1, BLOCK * len(t) // max(t.numel(), 1))
