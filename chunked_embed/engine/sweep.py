"""The one loop: outputs of a chunk, a step on them, gradients folded into their sums; then the next chunk.

    row-wise   the upstream of a row is its weight: ``both`` in one pass                      3 products
    grouped    for each block: ``score``; the small loss by autograd; ``pull``                3, or 4 beyond a chunk
               beyond a chunk, of one score: ``score`` and ``pull`` by segment; the small loss  3
    scores     ``score`` in forward, ``pull`` in backward (autograd.py)                       4, or 3 with outputs kept

The products are those of a trainable projection: outputs, and the gradients of its input and its weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..kernels.norms import AT_FLOOR, inverse_norms, inverse_norms_of_both
from .chunk import Chunk, Visit
from .functions import cat, combine
from .gradients import BySegment, Gradients, power_of_two
from .layout import Layout, Unit
from .pack import Block, Selection, Span
from .plan import ChunkPlan, padded_rows, places, tiles
from .step import Step
from .types import Named


@dataclass
class Call:
    """One call, ready to run: everything but the tensors that autograd sees."""

    layout: Layout
    selection: Selection
    plan: ChunkPlan
    steps: dict[str, Step]  # by the label of their unit
    loss: Any  # as it was when the call was made
    differentiable: Callable[[list[Tensor]], Collection[str]] = lambda tensors: ()
    """Of the call's tensors: the scores with a gradient, looked at anew, of the one unit that is pulled."""


@dataclass
class Scored:
    """The scores of some chunks: per used row (or segment), per column, and what a gradient reuses."""

    rows: dict[str, Named]  # by unit
    columns: Named = field(default_factory=dict)
    parts: list[dict[str, tuple[Named, list[Any]]]] = field(default_factory=list)  # by chunk, by unit
    chunks: list[dict[str, list[Chunk]]] = field(default_factory=list)  # whose outputs are still there


class Sweep:
    """Walks over chunks. ``holds``: outputs of units that train stay from score to pull, or are pulled at once."""

    def __init__(self, call: Call, tensors: Sequence[Tensor], holds: bool) -> None:
        self.call = call
        self.layout, self.selection, self.plan = call.layout, call.selection, call.plan
        powers = call.layout.powers(tensors)
        self.operands = call.layout.operands(tensors, powers)
        self.inverse_norms = self._inverse_norms()
        self.gradients = Gradients(
            call.layout, call.selection, self.operands, call.plan.sums, self.inverse_norms, powers
        )
        spans = [span for block in call.plan.blocks for span in block.spans]
        self.capacity = max((self.padded(span.rows) for span in spans), default=0)
        self.places, self.sizes = places(call.layout, self.capacity, holds)
        self.spaces: dict[int, Tensor] = {}

    # --- the loop ---

    def both(self, spans: Sequence[Span], upstream: Named) -> Named:
        """Values of a row-wise loss, and its gradients for this upstream of its rows."""
        (unit,) = self.layout.units
        step, found = self.call.steps[unit.label], []
        for span in spans:
            chunks = self._pieces(Visit(self, span), unit, keep=True)
            of_rows = upstream
            if len(spans) > 1:
                of_rows = {name: u[span.start : span.stop] for name, u in upstream.items()}
            if len(chunks) == 1:
                found.append(step.both(chunks[0], of_rows, chunks[0].into()))
                continue
            parts, reused = zip(*(step.score(chunk) for chunk in chunks))
            merged = step.merge(parts)
            found.append(step.values(merged, chunks[0]))
            for chunk, kept in zip(chunks, reused):
                step.pull(chunk, kept, merged, of_rows, chunk.into())
        return join(found)

    def score(self, spans: Sequence[Span], keep: bool = False) -> Scored:
        """Scores of the spans' rows. ``keep``: the outputs of units that train stay for ``pull`` (of one span)."""
        scored = Scored({})
        found: dict[str, list[Named]] = {unit.label: [] for unit in self.layout.units}
        for span in spans:
            visit = Visit(self, span)
            scored.parts.append({})
            scored.chunks.append({})
            for unit in sorted(self.layout.units, key=lambda unit: unit.trains):  # frozen ones share another's buffer
                step, chunks = self.call.steps[unit.label], self._pieces(visit, unit, keep and unit.trains)
                parts, reused = zip(*(step.score(chunk) for chunk in chunks))
                merged = step.merge(parts)
                for name, how in step.column_parts.items():
                    scored.columns[name] = combine(how, scored.columns.get(name), merged.pop(name))
                found[unit.label].append(step.values(merged, chunks[0]))
                scored.parts[-1][unit.label] = merged, list(reused)
                if keep and unit.trains:
                    scored.chunks[-1][unit.label] = chunks
        scored.rows = {label: join(named) for label, named in found.items()}
        return scored

    def pull(self, spans: Sequence[Span], scored: Scored, upstream: dict[str, Named], of_columns: Named) -> None:
        """Gradients of ``sum(scores * upstream)``; outputs that are not there any more are formed again."""
        for n, span in enumerate(spans):
            visit = Visit(self, span)
            # Those that train first: a frozen one that is formed again takes the buffer of the first of them.
            for unit in sorted(self.layout.units, key=lambda unit: not unit.trains):
                if not unit.pulled or span.rows == 0:
                    continue
                part = self.values_of(unit, span, spans[0])
                merged, reused = scored.parts[n][unit.label]
                chunks = scored.chunks[n].get(unit.label) or self._pieces(visit, unit)
                named = {name: value[part] for name, value in upstream[unit.label].items()} | of_columns
                for chunk, kept in zip(chunks, reused):
                    chunk.visit = visit
                    self.call.steps[unit.label].pull(chunk, kept, merged | scored.columns, named, chunk.into())

    def ahead(self, block: Block, name: str) -> tuple[Scored, list[BySegment]]:
        """Scores of a group whose chunks are of one segment each, and by segment the gradient of one score's sum, for
        ``Gradients.fold``: a gradient is linear in its upstream, which may come later."""
        label = next(unit.label for unit in self.layout.units if unit.pulled)
        scored, found, before = Scored({}), dict[int, BySegment](), self.gradients.sums
        rows: dict[str, list[Named]] = {unit.label: [] for unit in self.layout.units}
        for span, segment in zip(block.spans, block.segments, strict=True):
            one = self.score([span], keep=True)
            for unit, named in one.rows.items():
                rows[unit].append(named)
            scored.parts += one.parts
            scored.chunks.append({})
            part, self.gradients.sums = found.get(segment, (span, {}))
            found[segment] = Span(part.start, span.stop), self.gradients.sums
            ones = torch.ones(span.rows, dtype=self.layout.dtype, device=self.layout.device)
            self.pull([span], one, {label: {name: ones}}, {})
        self.gradients.sums = before
        scored.rows = {unit: join(named) for unit, named in rows.items()}
        return scored, list(found.values())

    # --- what chunks ask for ---

    def _pieces(self, visit: Visit, unit: Unit, keep: bool = False) -> list[Chunk]:
        widths = [sum(self.layout.specs[name].width for name in names) for names in unit.pieces]
        return [Chunk(visit, names, sum(widths[:n]), keep) for n, names in enumerate(unit.pieces)]

    def values_of(self, unit: Unit, span: Span, first: Span) -> slice:
        """Where the values of a span are among those of all spans: one a row, or one a segment."""
        if unit.needs.rows != "whole segments" or span.groups is None or first.groups is None:
            return slice(span.start - first.start, span.stop - first.start)
        k = self.selection.segments_per_group
        return slice((span.groups[0] - first.groups[0]) * k, (span.groups[1] - first.groups[0]) * k)

    def padded(self, rows: int) -> int:
        return padded_rows(rows, self.plan.rungs)

    def tiles(self, rows: int) -> list[tuple[int, int, int]]:
        return [(0, rows, rows)] if self.plan.rungs is None or rows == 0 else list(tiles(rows, self.plan.rungs))

    def buffer(self, name: str) -> Tensor:
        """``(capacity, V)``: the space of a projection's outputs, made when the first of them are formed."""
        (space, offset), spec = self.places[name], self.layout.specs[name]
        if space not in self.spaces:
            self.spaces[space] = torch.empty(self.sizes[space], dtype=torch.uint8, device=self.layout.device)
        n_bytes = self.capacity * spec.row * spec.output_dtype.itemsize
        place = self.spaces[space][offset : offset + n_bytes].view(spec.output_dtype)
        return place.view(self.capacity, spec.row)[:, : spec.width]

    def _inverse_norms(self) -> dict[int, Tensor]:
        given = {i: self.operands[i] for i in sorted(self.layout.normed)}
        if len(given) == 2:  # a query and a document, mostly
            found = dict(zip(given, inverse_norms_of_both(*given.values())))
        else:
            found = {i: inverse_norms(operand) for i, operand in given.items()}
        for i, operand in given.items():
            if operand.dtype == torch.float16:  # which cannot hold the gradient of a row of zeros: it gets none
                found[i] = torch.where(found[i] < AT_FLOOR, found[i], 0.0)
        return found

    def scale_for(self, upstream: Sequence[Tensor]) -> Tensor | None:
        """The power of two by which an upstream is divided, and gradients multiplied at the end, so that those of
        float16 outputs neither underflow nor overflow: as large as the upstream, and as the loss says that a gradient
        is beside it. None: there are no such."""
        if not self.layout.has_float16:
            return None
        return power_of_two(upstream) * 2.0 ** math.ceil(math.log2(self.call.loss.gradient_size))

    def finish(self) -> list[Tensor | None]:
        """Let go of the buffers; the gradients, in the order of the call's tensors."""
        self.spaces.clear()
        return self.gradients.finish()


def join(named: Sequence[Named]) -> Named:
    """Concatenate the pieces of several chunks."""
    return {name: cat([piece[name] for piece in named]) for name in (named[0] if named else {})}
