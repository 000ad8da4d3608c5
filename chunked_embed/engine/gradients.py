"""Where gradients are gathered while the chunks pass by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.scale import scale_
from .plan import Chunk
from .problem import Problem
from .products import addmm_, mm
from .select import Selection
from .types import accumulator_dtype

BLOCK = 1 << 25  # elements cast at a time: where a device casts through a copy, the copy is small


class Gradients:
    """Gradients of all tensors of a problem that want one, in their accumulators.

    Weights and columns are summed over chunks in float32 (float64); row-aligned gradients are written once per chunk.
    A weight that a single product contributes to needs no accumulator.
    """

    def __init__(self, problem: Problem, selection: Selection, operands: Sequence[Tensor], n_chunks: int) -> None:
        self.problem = problem
        self.selection = selection
        self.operands = operands
        self.buffers: dict[int, Tensor] = {}
        self.fresh: set[int] = set()  # weights whose first product overwrites instead of adding
        terms = [term for p in problem.projections.values() for term in p.terms]
        self.uses = Counter(weight for _, weight in terms if weight is not None)
        self.row_uses = Counter(row for row, _ in terms)
        self.n_chunks = n_chunks

    def row_buffer(self, i: int) -> Tensor:
        """``(M, ...)`` for a row-aligned tensor; zero where rows are dropped."""
        if i not in self.buffers:
            operand = self.operands[i]
            # float16 waits in float32 for its scale; a float32 parameter under autocast gets float32.
            wide = operand.dtype == torch.float16 or self.problem.dtypes[i] != operand.dtype
            dtype = accumulator_dtype(operand.dtype) if wide else operand.dtype
            make = torch.empty_like if self.selection.n_rows == len(operand) else torch.zeros_like
            self.buffers[i] = make(operand, dtype=dtype, memory_format=torch.contiguous_format)
        return self.buffers[i]

    def destination(self, i: int, chunk: Chunk, rows: int) -> Tensor:
        """Where a step may write the gradient of an identity's rows: the gradient itself if nothing else goes there."""
        buffer = self.row_buffer(i)
        if self.selection.order is None and self.row_uses[i] == 1 and rows == chunk.rows:
            return buffer[chunk.start : chunk.stop]
        return torch.empty(rows, *buffer.shape[1:], dtype=buffer.dtype, device=buffer.device)

    def add_rows(self, i: int, chunk: Chunk, value: Tensor, written: set[int]) -> None:
        """The gradient of a chunk's rows; a second contribution to the same rows adds."""
        buffer = self.row_buffer(i)
        order = self.selection.order
        if order is None:
            place = buffer[chunk.start : chunk.stop]
            if i in written:
                place.add_(value)
            elif value.data_ptr() != place.data_ptr():
                place.copy_(value)
        else:
            index = order[chunk.start : chunk.stop]
            value = value.to(buffer.dtype)
            if i in written:
                buffer.index_add_(0, index, value)
            else:
                buffer.index_copy_(0, index, value)
        written.add(i)

    def add_input(self, i: int, chunk: Chunk, grad_outputs: Tensor, weight: Tensor, written: set[int]) -> None:
        """``grad_outputs @ weight`` for a chunk's rows."""
        buffer = self.row_buffer(i)
        if self.selection.order is None:
            place = buffer[chunk.start : chunk.stop]
            if i in written:
                addmm_(place, grad_outputs, weight)
            else:
                mm(grad_outputs, weight, out=place)
            written.add(i)
        else:
            shape = (chunk.rows, weight.shape[1])
            product = mm(grad_outputs, weight, out=torch.empty(shape, dtype=buffer.dtype, device=buffer.device))
            self.add_rows(i, chunk, product, written)

    def add_weight(self, i: int, grad_outputs: Tensor, input: Tensor) -> None:
        """``grad_outputs.T @ input``, summed over chunks."""
        operand = self.operands[i]
        if i not in self.buffers:
            once = self.n_chunks * self.uses[i] == 1 and operand.dtype != torch.float16
            # A float32 parameter under autocast takes its gradient straight from the float32 product.
            dtype = self.problem.dtypes[i] if once else accumulator_dtype(operand.dtype)
            self.buffers[i] = torch.empty(operand.shape, dtype=dtype, device=operand.device)
            self.fresh.add(i)
        if i in self.fresh:
            mm(grad_outputs.t(), input, out=self.buffers[i])
            self.fresh.discard(i)
        else:
            addmm_(self.buffers[i], grad_outputs.t(), input)

    def add(self, i: int, value: Tensor) -> None:
        """A column's or a bias's gradient, summed over chunks."""
        if i not in self.buffers:
            operand = self.operands[i]
            self.buffers[i] = torch.zeros(operand.shape, dtype=accumulator_dtype(operand.dtype), device=operand.device)
        self.buffers[i].add_(value)

    def finish(self) -> list[Tensor | None]:
        """The sums as they were gathered, perhaps wider than their tensors, in the order of the problem's tensors."""
        missing = (i for i, wants in enumerate(self.problem.wants_grad) if wants and i not in self.buffers)
        for i in missing:  # no row was used
            operand = self.operands[i]
            self.buffers[i] = torch.zeros_like(operand, dtype=accumulator_dtype(operand.dtype))
        return [self.buffers.pop(i, None) for i in range(len(self.problem.dtypes))]


def scaled(grad: Tensor, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``grad * factor`` in ``dtype``, rounded once, without a wide copy. Out of place unless there is nothing to do."""
    if factor is None:
        return grad.to(dtype)
    result = torch.empty_like(grad, dtype=dtype, memory_format=torch.contiguous_format)
    rows = grad.shape[0] if grad.numel() < BLOCK else max(1, BLOCK * grad.shape[0] // grad.numel())
    for part, out in zip(grad.contiguous().split(rows), result.split(rows), strict=True):
        scale_(part, factor, out)
    return result
