"""The contract of a step: what happens to the outputs of one chunk. The engine knows steps; steps know a loss.

A loss of plain functions gets a step from ``functions.py``. One with a kernel, or with products of its own, returns a
``Step`` from ``make_step`` instead, or several, the best first: that is all there is to it. docs/design.md draws how
the engine calls them.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch

from .formula import mentions
from .types import Named

if TYPE_CHECKING:
    from .chunk import Chunk, Into

LOSS = "loss"
"""The name of a row-wise loss among the values of its step.

Example:
    >>> from chunked_embed import LOSS
    >>> LOSS
    'loss'
"""
METRIC = "metrics/"  # goes before the names of its metrics


class Shape(NamedTuple):
    """What a step is asked to serve.

    Example:
        >>> import torch
        >>> from chunked_embed import FlexChunkLoss, Needs, Projection, Shape, Step
        >>> class Halves(Step):
        ...     def needs(self, shape: Shape) -> Needs:
        ...         odd = [width for width in shape.widths if width % 2]
        ...         return Needs(refusal=f"{odd[0]} columns are odd" if odd else None)
        >>> loss = FlexChunkLoss(lambda outputs, rows: outputs.sum(1), chunk_size=4)
        >>> loss.make_step = lambda projections: Halves()
        >>> loss.plan(Projection(torch.randn(6, 4), torch.randn(9, 4))).refusals
        ('Halves: 9 columns are odd',)
    """

    rows: int  # of the call, dropped ones included
    widths: tuple[int, ...]  # the columns of each projection that the step sees
    operands: torch.dtype  # of the products
    outputs: torch.dtype  # that the engine would form
    cosine: bool  # norms are factors of the outputs: see ``Chunk.factors``
    device: torch.device
    compiled: bool  # False: the user asked for plain torch, or the problem is too small to compile for
    columns: bool  # the call has column arguments
    grad: tuple[str, ...]  # row and column arguments that want a gradient
    learns: bool  # anything of the call wants one
    trains: bool  # the outputs do
    terms: int  # products that a projection sums, at most: none, of outputs as they are given
    depth: int  # of an input's rows, the widest
    bias: str  # of the projections: "none", "frozen" or "learns"


class Needs(NamedTuple):
    """What a step asks of the plan, from the shape alone.

    Example:
        >>> from chunked_embed import Needs
        >>> Needs(multiple=64, scratch=4)  # chunks of whole blocks, four bytes an output beside the outputs
        Needs(refusal=None, rows='any', multiple=64, scratch=4, forms_outputs=True, overwrites=False, products=None)
    """

    refusal: str | None = None
    """Why it does not serve: a sentence, printed with the plan. The loss's next step, or its plain functions, run
    instead."""
    rows: Literal["any", "whole segments", "all"] = "any"
    """Which rows a chunk must hold. A step of whole segments returns values for each of them, ``(segments, ...)``."""
    multiple: int = 1
    """A chunk's rows, but for the last chunk's, are a multiple of this."""
    scratch: int = 0
    """Bytes for each output while a chunk is worked on, beyond the outputs that the engine forms."""
    forms_outputs: bool = True
    """The engine forms the outputs, in a buffer that the plan counts. False: the step brings products of its own."""
    overwrites: bool = False
    """It goes through a row of outputs in order, and writes each gradient after it has read what lies up to twice as
    far in the row: a half-precision one may take the first half of its float32 outputs, and no room of its own."""
    products: int | None = None
    """How many matrix products a chunk takes, of a step that brings its own. None: as many as the engine would."""


class Step:
    """How a chunk's outputs become values, and an upstream of those gradients.

    ``score`` forms the chunk's parts; ``merge`` puts together parts of the same rows that came in pieces (of columns,
    of projections with one total, of ranks); ``values`` says what they amount to; ``pull`` takes the gradient of
    ``sum(values * upstream)``. Where the upstream is known beforehand, ``both`` does it all in one pass.

    Example:
        >>> import torch
        >>> from chunked_embed import FlexChunkLoss, LOSS, Projection, Step
        >>> class Squares(Step):
        ...     def score(self, chunk):
        ...         return {LOSS: chunk.outputs().square().sum(1)}, None
        ...     def pull(self, chunk, kept, parts, upstream, into):
        ...         into.outputs(2 * chunk.outputs() * upstream[LOSS][:, None])
        >>> class SquaresLoss(FlexChunkLoss):
        ...     def make_step(self, projections):
        ...         return Squares()
        >>> hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4)
        >>> loss = SquaresLoss(chunk_size=2)(Projection(hidden, weight)).loss
        >>> loss.backward()
        >>> torch.allclose(hidden.grad, 2 / 6 * hidden @ weight.T @ weight, atol=1e-5)
        True
    """

    @property
    def name(self) -> str:
        """As the plan tells of it."""
        return type(self).__name__

    @property
    def key(self) -> Hashable:
        """Steps of one key compute the same, whatever their numbers."""
        return type(self).__qualname__, type(self).__module__

    row_wise: ClassVar[bool] = True
    """Its values are a row-wise loss, under ``LOSS``, and metrics; else scores."""

    runs_functions: ClassVar[bool] = False
    """It runs functions of the loss, which are looked at as plain ones are, and say which scores have a gradient."""

    takes_factors: ClassVar[bool] = False
    """It multiplies the outputs that it reads by ``chunk.factors()``, so that it serves cosines; their gradient is that
    of the outputs as they are formed."""

    merges: ClassVar[bool] = False
    """It sees its projections one by one, as pieces of one row, and merges their parts."""

    column_parts: Mapping[str, str] = {}
    """Parts ``(V,)`` that run over all rows: name -> how those of several chunks add up, "sum" or "logsumexp"."""

    @property
    def constants(self) -> Collection[str]:
        """Scores without a gradient, such as metrics: a loss over groups is not asked for theirs."""
        return ()

    @property
    def differentiable(self) -> Collection[str] | None:
        """The scores that have a gradient, where that is known before a chunk is scored. Of one alone, a group longer
        than a chunk has its outputs formed once: ``pull`` is linear in the upstream, takes ones, and what it hands on
        is multiplied later. (Of float16 outputs that gradient must not leave the range.)"""
        return None

    def needs(self, shape: Shape) -> Needs:
        return Needs()

    def reads(self, name: str) -> bool:
        """Whether it may read this attribute of the loss in ``pull``, by its code: one that changes in place between
        forward and backward is refused."""
        return mentions(type(self), list(vars(type(self)).values()), name)

    def score(self, chunk: Chunk) -> tuple[Named, Any]:
        """-> parts of the chunk by name, ``(rows, ...)``, ``(segments, ...)`` or column parts; what ``pull`` reuses."""
        raise NotImplementedError

    def merge(self, parts: Sequence[Named]) -> Named:
        """One set of parts from several of the same rows, piece by piece."""
        if len(parts) != 1:
            raise ValueError(f"expected the outputs in one piece, got {len(parts)}: {type(self).__name__} merges none")
        return parts[0]

    def values(self, parts: Named, chunk: Chunk) -> Named:
        """-> the scores ``(rows,)`` by name; a row-wise loss is called ``LOSS``."""
        return {name: part for name, part in parts.items() if name not in self.column_parts}

    def pull(self, chunk: Chunk, kept: Any, parts: Named, upstream: Named, into: Into) -> None:
        """Hand the gradients of ``sum over names of (values * upstream).sum()`` to ``into``.

        ``parts`` are merged, and column parts those of all chunks. A value that nothing depends on has no upstream.
        """
        raise NotImplementedError

    def both(self, chunk: Chunk, upstream: Named, into: Into) -> Named:
        """Values and gradients at once, of steps that need no merging; override it where one pass does both."""
        parts, kept = self.score(chunk)
        parts = self.merge([parts])
        self.pull(chunk, kept, parts, upstream, into)
        return self.values(parts, chunk)
