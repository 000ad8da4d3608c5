"""Where gradients are gathered while the chunks pass by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels.norms import through_norms_
from ..kernels.scale import scale_
from .layout import Layout
from .pack import Selection, Span
from .products import addmm_, mm

if TYPE_CHECKING:
    from .chunk import Visit

BLOCK = 1 << 25  # elements cast at a time: where a device casts through a copy, the copy is small


class Gradients:
    """Gradients of all tensors of a call that want one, in the dtypes that the plan has chosen.

    Weights and columns are summed over chunks; row-aligned gradients are written once per chunk.
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
        self.sums = sums
        self.inverse_norms = inverse_norms
        self.powers = powers
        self.buffers: dict[int, Tensor] = {}
        self.fresh: set[int] = set()  # sums whose first product overwrites instead of adding

    def _dtype(self, i: int) -> torch.dtype:
        dtype = self.sums[i]
        assert dtype is not None, "a gradient that nobody wants"
        return dtype

    def row_buffer(self, i: int) -> Tensor:
        """``(M, ...)`` for a row-aligned tensor; zero where rows are dropped."""
        if i not in self.buffers:
            operand = self.operands[i]
            make = torch.empty_like if self.selection.n_rows == len(operand) else torch.zeros_like
            self.buffers[i] = make(operand, dtype=self._dtype(i), memory_format=torch.contiguous_format)
        return self.buffers[i]

    def destination(self, i: int, span: Span, rows: int) -> Tensor:
        """Where a step may write the gradient of an identity's rows: the gradient itself if nothing else goes there."""
        buffer = self.row_buffer(i)
        if self.selection.order is None and self.layout.input_uses[i] == 1 and rows == span.rows:
            return buffer[span.start : span.stop]
        return torch.empty(rows, *buffer.shape[1:], dtype=buffer.dtype, device=buffer.device)

    def add_rows(self, i: int, visit: Visit, value: Tensor) -> None:
        """The gradient of a chunk's rows; a second contribution to the same rows adds."""
        buffer, order = self.row_buffer(i), self.selection.order
        span, written = visit.span, visit.written
        if order is None:
            place = buffer[span.start : span.stop]
            if i in written:
                place.add_(value)
            elif value.data_ptr() != place.data_ptr():
                place.copy_(value)
        else:
            index = order[span.start : span.stop]
            value = value.to(buffer.dtype)
            if i in written:
                buffer.index_add_(0, index, value)
            else:
                buffer.index_copy_(0, index, value)
        written.add(i)

    def add_input(self, i: int, visit: Visit, grad_outputs: Tensor, weight: Tensor) -> None:
        """``grad_outputs @ weight`` for a chunk's rows."""
        buffer, span = self.row_buffer(i), visit.span
        if self.selection.order is not None:
            shape = (span.rows, weight.shape[1])
            product = mm(grad_outputs, weight, out=torch.empty(shape, dtype=buffer.dtype, device=buffer.device))
            self.add_rows(i, visit, product)
        elif i in visit.written:
            addmm_(buffer[span.start : span.stop], grad_outputs, weight)
        else:
            mm(grad_outputs, weight, out=buffer[span.start : span.stop])
            visit.written.add(i)

    def add_product(self, i: int, a: Tensor, b: Tensor) -> None:
        """``a.T @ b``, summed over chunks: a weight's gradient from those of the outputs, and the input."""
        if i not in self.buffers:
            operand = self.operands[i]
            self.buffers[i] = torch.empty(operand.shape, dtype=self._dtype(i), device=operand.device)
            self.fresh.add(i)
        if i in self.fresh:
            mm(a.t(), b, out=self.buffers[i])
            self.fresh.discard(i)
        else:
            addmm_(self.buffers[i], a.t(), b)

    def add(self, i: int, value: Tensor) -> None:
        """A gradient summed over chunks: a column's, a bias's, or a weight's that a step has formed itself."""
        if i not in self.buffers:
            operand = self.operands[i]
            self.buffers[i] = torch.zeros(operand.shape, dtype=self._dtype(i), device=operand.device)
        self.buffers[i].add_(value)

    def finish(self) -> list[Tensor | None]:
        """The sums as they were gathered, perhaps wider than their tensors, in the order of the layout's tensors."""
        for i, wants in enumerate(self.layout.wants_grad):
            if wants and i not in self.buffers and self.sums[i] is not None:  # no row was used
                self.buffers[i] = torch.zeros_like(self.operands[i], dtype=self.sums[i])
            if wants and i in self.inverse_norms:
                through_norms_(self.buffers[i], self.operands[i], self.inverse_norms[i])
                if i in self.powers:
                    self.buffers[i] *= self.powers[i][:, None]
        return [self.buffers.pop(i, None) for i in range(len(self.layout.dtypes))]


def power_of_two(weights: Sequence[Tensor]) -> Tensor:
    """The scale that brings the largest weight to (1/2, 1]: exact in any dtype. Zero and non-finite weights: one."""
    largest = torch.stack([w.abs().amax() if w.numel() else w.new_ones(()) for w in weights]).amax()
    exponent = torch.ceil(torch.log2(largest))
    return torch.exp2(torch.where(torch.isfinite(exponent), exponent, 0.0))


def scaled(grad: Tensor, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``grad * factor`` in ``dtype``, rounded once, without a wide copy. Out of place unless there is nothing to do."""
    if factor is None:
        return grad.to(dtype)
    result = torch.empty_like(grad, dtype=dtype, memory_format=torch.contiguous_format)
    grad = grad.contiguous()
    if grad.numel() < BLOCK:
        scale_(grad, factor, result)
        return result
    rows = max(1, BLOCK * grad.shape[0] // grad.numel())
    for part, out in zip(grad.split(rows), result.split(rows), strict=True):
        scale_(part, factor, out)
    return result
