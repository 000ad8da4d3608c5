"""One chunk in a step's hands: what it may ask for, and where its gradients go."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .call import Term
from .layout import Spec
from .pack import Span
from .products import addmm_, mm
from .types import Named

if TYPE_CHECKING:
    from .sweep import Sweep


class Visit:
    """One visit of the sweep to a span: its rows, gathered once for all steps that see them."""

    def __init__(self, sweep: Sweep, span: Span) -> None:
        self.sweep = sweep
        self.span = span
        self.gathered: dict[int, Tensor] = {}
        self.written: set[int] = set()  # row gradients that have their first contribution

    def rows_of(self, i: int) -> Tensor:
        """The span's rows of a row-aligned tensor; a view where rows are taken as they come."""
        if i not in self.gathered:
            self.gathered[i] = self.take(self.sweep.operands[i])
        return self.gathered[i]

    def take(self, given: Tensor) -> Tensor:
        """The span's rows of what is aligned with the user's."""
        order = self.sweep.selection.order
        if order is None:
            whole = self.span.rows == self.sweep.layout.n_rows
            return given if whole else given[self.span.start : self.span.stop]
        return given.index_select(0, order[self.span.start : self.span.stop])


class Chunk:
    """Rows of a call as a step sees them, for the projections that it is asked about.

    Attributes:
        size: how many rows.
        loss: the loss as it was when the call was made; its numbers are plain attributes.
        rows: row arguments by name, ``(size, ...)``.
        columns: column arguments by name, ``(V, ...)``.
        names: the projections.
        first_column: of a piece, where all pieces of a row are one after the other.
        keeps: whether this chunk is there again in ``pull``, with what ``score`` puts into ``held``. Else it is made
            anew, and ``held`` is empty.
        held: tensors of the outputs' size that a step with products of its own needs once more, by any name.

    Example:
        >>> import torch
        >>> from chunked_embed import Chunk, FlexChunkLoss, LOSS, Projection, Step
        >>> class Largest(Step):
        ...     def score(self, chunk: Chunk):
        ...         outputs, target = chunk.outputs(), chunk.rows["target"]  # (size, V), (size,)
        ...         return {LOSS: outputs.amax(1) - outputs.gather(1, target[:, None])[:, 0]}, None
        >>> class LargestLoss(FlexChunkLoss):
        ...     def make_step(self, projections):
        ...         return Largest()
        >>> call = Projection(torch.eye(4), torch.eye(4)), {"target": torch.tensor([0, 1, 2, 0])}
        >>> LargestLoss(chunk_size=2)(*call).loss  # three of four targets are the largest
        tensor(0.2500)
    """

    def __init__(self, visit: Visit, names: tuple[str, ...], first_column: int = 0, keeps: bool = False) -> None:
        self.visit = visit
        self.names = names
        self.first_column = first_column
        self.keeps = keeps
        self.held: Named = {}
        self.size = visit.span.rows
        self.loss = visit.sweep.call.loss
        layout = self.sweep.layout
        self.rows: Named = {name: visit.rows_of(i) for name, i in layout.rows.items()}
        self.columns: Named = {name: self.sweep.operands[i] for name, i in layout.columns.items()}
        self.formed: Named = {}

    @property
    def sweep(self) -> Sweep:
        return self.visit.sweep

    @property
    def segments(self) -> tuple[Tensor, int]:
        """-> the segment of each row, counted from the chunk's first, and how many there are: of a chunk that holds
        whole segments, or where each row is a segment of its own."""
        selection, span = self.sweep.selection, self.visit.span
        if selection.segment is None:
            return torch.arange(self.size, device=self.sweep.layout.device), self.size
        if span.groups is None:
            raise RuntimeError("expected a step whose needs are whole segments, got one that takes any rows")
        first, last = (group * selection.segments_per_group for group in span.groups)
        return selection.segment[span.start : span.stop] - first, last - first

    def spec(self, name: str | None = None) -> Spec:
        return self.sweep.layout.specs[self.names[0] if name is None else name]

    @property
    def forms_outputs(self) -> bool:
        """Whether the plan counts them: ``Needs.forms_outputs`` of the step."""
        return next(unit for unit in self.sweep.layout.units if self.names[0] in unit.names).needs.forms_outputs

    def operands(self, name: str | None = None) -> tuple[tuple[tuple[Tensor, Tensor | None], ...], Tensor | None]:
        """-> the ``(input, weight)`` terms of a projection, the chunk's rows of the inputs, and its bias: for steps
        with products of their own."""
        spec = self.spec(name)
        terms = tuple(
            (self.visit.rows_of(term.input), None if term.weight is None else self.sweep.operands[term.weight])
            for term in spec.terms
        )
        return terms, None if spec.bias is None else self.sweep.operands[spec.bias]

    def factors(self, name: str | None = None) -> tuple[Tensor, Tensor] | None:
        """``(size,)`` and ``(V,)``: what the outputs of a row and of a column are to be multiplied by, where the
        projection has such; inverse norms, of cosines. The gradient that ``into`` takes is that of the outputs as
        they are formed."""
        spec = self.spec(name)
        if not spec.cosine:
            return None
        ((x, weight),) = spec.terms
        assert weight is not None
        return self.visit.take(self.sweep.inverse_norms[x]), self.sweep.inverse_norms[weight]

    def outputs(self, name: str | None = None) -> Tensor:
        """``(size, V)``: formed on the first demand, in a buffer of the plan; overwritten by what is formed later,
        unless the step's gradient is taken in the same pass."""
        return self.buffer(name)[: self.size]

    def buffer(self, name: str | None = None) -> Tensor:
        """The outputs, with room behind them for rows that pad a compiled step."""
        spec = self.spec(name)
        if spec.name not in self.formed:
            self.formed[spec.name] = self._form(spec)
        return self.formed[spec.name]

    def _form(self, spec: Spec) -> Tensor:
        rows = self.size
        if spec.identity:
            given = self.visit.rows_of(spec.terms[0].input)
            if self.sweep.padded(rows) == rows:
                return given
            padded = given.new_empty(self.sweep.padded(rows), spec.width)
            padded[:rows] = given
            return padded
        buffer = self.sweep.buffer(spec.name)
        terms, bias = self.operands(spec.name)
        for n, (x, weight) in enumerate(terms):
            assert weight is not None
            if n:
                addmm_(buffer[:rows], x, weight.t())
            elif bias is not None and spec.output_dtype == spec.operand_dtype:
                torch.addmm(bias, x, weight.t(), out=buffer[:rows])
            else:
                mm(x, weight.t(), out=buffer[:rows])
        if bias is not None and spec.output_dtype != spec.operand_dtype:
            buffer[:rows] += bias
        return buffer

    def into(self) -> Into:
        return Into(self)


class Into:
    """Where a step hands its gradients. One that nobody wants is dropped here.

    Example:
        >>> import torch
        >>> from chunked_embed import FlexChunkLoss, Into, LOSS, Projection, Step
        >>> class Sums(Step):
        ...     def score(self, chunk):
        ...         return {LOSS: chunk.outputs().sum(1) * chunk.rows["scale"]}, None
        ...     def pull(self, chunk, kept, parts, upstream, into: Into):
        ...         g = upstream[LOSS]
        ...         into.rows("scale", g * chunk.outputs().sum(1))
        ...         into.outputs((g * chunk.rows["scale"])[:, None].expand(chunk.outputs().shape))
        >>> class SumsLoss(FlexChunkLoss):
        ...     def make_step(self, projections):
        ...         return Sums()
        >>> hidden, scale = torch.ones(4, 2, requires_grad=True), torch.full((4,), 2.0, requires_grad=True)
        >>> SumsLoss(chunk_size=2)(Projection(hidden, torch.ones(3, 2)), rows={"scale": scale}).loss.backward()
        >>> scale.grad, hidden.grad[0]
        (tensor([1.5000, 1.5000, 1.5000, 1.5000]), tensor([1.5000, 1.5000]))
    """

    def __init__(self, chunk: Chunk) -> None:
        self.chunk = chunk
        self.visit = chunk.visit
        self.layout = chunk.sweep.layout
        self.gradients = chunk.sweep.gradients
        self.places: Named = {}

    def wants(self, name: str) -> bool:
        """Whether the gradient of a projection's outputs, of a row or of a column argument is wanted."""
        if name in self.chunk.names:
            return self.layout.specs[name].wants_grad
        return name in self.layout.wanted

    def place(self, name: str | None = None) -> Tensor:
        """``(size, V)``: where the gradient of the outputs may be written, in the place of the outputs where dtypes
        allow; then ``outputs(place)`` copies nothing."""
        return self.room(name)[: self.chunk.size]

    def room(self, name: str | None = None) -> Tensor:
        """The same, with room for the rows that pad a compiled step."""
        spec = self.chunk.spec(name)
        if spec.name not in self.places:
            rows = self.chunk.sweep.padded(self.chunk.size)
            if spec.in_place:
                place = self.chunk.buffer(spec.name)
                if spec.output_dtype != spec.operand_dtype:  # the first half of each row
                    place = place.view(spec.operand_dtype)[:, : spec.width]
                self.places[spec.name] = place
            elif spec.identity:
                self.places[spec.name] = self.gradients.destination(spec.terms[0].input, self.visit.span, rows)
            else:
                place = torch.empty((rows, spec.row), dtype=spec.operand_dtype, device=self.layout.device)
                self.places[spec.name] = place[:, : spec.width]
        return self.places[spec.name]

    def outputs(self, grad: Tensor, name: str | None = None, bias: Tensor | None = None) -> None:
        """The gradient of a projection's outputs: the engine takes the products with inputs and weights, and the
        bias, unless that comes with it: as the sum of a gradient that had more digits."""
        spec = self.chunk.spec(name)
        if not spec.wants_grad:
            return
        if not spec.identity:
            grad = grad.to(spec.operand_dtype)
        for term in spec.terms:
            if term.weight is None:
                self.gradients.add_rows(term.input, self.visit, grad)
                continue
            if self.layout.wants_grad[term.input]:
                weight = self.chunk.sweep.operands[term.weight]
                self.gradients.add_input(term.input, self.visit, grad, weight)
            if self.layout.wants_grad[term.weight]:
                self.gradients.add_product(term.weight, grad, self.visit.rows_of(term.input))
        if spec.bias is not None and self.layout.wants_grad[spec.bias]:
            self.gradients.add(spec.bias, grad.sum(0, dtype=self.layout.dtype) if bias is None else bias)

    def rows(self, name: str, value: Tensor) -> None:
        """The gradient of a row argument, ``(size, ...)``."""
        i = self.layout.rows[name]
        if self.layout.wants_grad[i]:
            self.gradients.add_rows(i, self.visit, value)

    def columns(self, name: str, value: Tensor) -> None:
        """The chunk's part of a column argument's gradient, ``(V, ...)``."""
        self._add(self.layout.columns[name], value)

    # For steps with products of their own. Tensors are given away: the engine may keep them, and write to them.

    def wants_input(self, name: str | None = None, term: int = 0) -> bool:
        return self.layout.wants_grad[self._term(name, term).input]

    def wants_weight(self, name: str | None = None, term: int = 0) -> bool:
        i = self._term(name, term).weight
        return i is not None and self.layout.wants_grad[i]

    def inputs(self, value: Tensor, name: str | None = None, term: int = 0, *, through_norms: bool = False) -> None:
        """The gradient of a projection's input, ``(size, H)``. Of cosines that is one of outputs as they are formed;
        ``through_norms``: of the cosines themselves, at right angles to the input's rows."""
        i = self._term(name, term).input
        if self.layout.wants_grad[i]:
            self.gradients.add_rows(i, self.visit, value, through_norms=through_norms, mine=True)

    def product(self, a: Tensor, b: Tensor, name: str | None = None, term: int = 0) -> None:
        """The chunk's part of a weight's gradient as a product, ``a.T @ b``."""
        i = self._term(name, term).weight
        if i is not None and self.layout.wants_grad[i]:
            self.gradients.add_product(i, a, b)

    def weight(self, value: Tensor, name: str | None = None, term: int = 0, *, through_norms: bool = False) -> None:
        """The chunk's part of a weight's gradient, ``(V, H)``; likewise."""
        i = self._term(name, term).weight
        if i is not None and self.layout.wants_grad[i]:
            self.gradients.add(i, value, through_norms=through_norms, mine=True)

    def bias(self, value: Tensor, name: str | None = None) -> None:
        i = self.chunk.spec(name).bias
        if i is not None:
            self._add(i, value)

    def _term(self, name: str | None, term: int) -> Term:
        return self.chunk.spec(name).terms[term]

    def _add(self, i: int, value: Tensor) -> None:
        if self.layout.wants_grad[i]:
            self.gradients.add(i, value)
