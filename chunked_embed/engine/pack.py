"""Which rows a call uses, in which order, in which chunks; and the checks that need the rows' values.

All that is asked of the device comes in one transfer; the rest is plain integers.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import sub
from typing import Protocol

import torch
from torch import Tensor

from ..kernels.selection import fetch, is_ignored, ranges_of, selected, serves
from .layout import Layout


@dataclass
class Selection:
    """The used rows in the order in which chunks walk over them."""

    n_rows: int
    n_groups: int
    segments_per_group: int = 1
    order: Tensor | None = None  # positions of the used rows; None: all rows as they come
    segment: Tensor | None = None  # the segment of each used row, ascending; None: each row is one of its own
    bounds: list[int] | None = None  # (segments + 1), the rows before each segment; None likewise
    offsets: Tensor | None = None  # (segments + 1,), the rows before each segment, on the device

    def offsets_of(self, block: Block) -> Tensor:
        """(segments of the block + 1,): the rows of the block before each."""
        assert self.offsets is not None
        k = self.segments_per_group
        if not block.start:
            return self.offsets[: block.stop * k + 1]
        return self.offsets[block.start * k : block.stop * k + 1] - self.offsets[block.start * k]

    def segment_lengths(self, group: int) -> list[int]:
        assert self.bounds is not None
        bounds = self.bounds[group * self.segments_per_group : (group + 1) * self.segments_per_group + 1]
        return list(map(sub, bounds[1:], bounds))

    def group_ends(self) -> list[int]:
        """The row behind each group."""
        assert self.bounds is not None
        return self.bounds[self.segments_per_group :: self.segments_per_group]


class Packed(Protocol):
    """A call whose rows are selected."""

    layout: Layout
    selection: Selection


@dataclass(frozen=True)
class Span:
    """Rows ``[start, stop)`` of the selection: those of one chunk."""

    start: int
    stop: int
    groups: tuple[int, int] | None = None  # [start, stop), where the chunk holds whole ones

    @property
    def rows(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Block:
    """Groups ``[start, stop)`` whose loss is computed together, and the chunks that hold their rows.

    One chunk: a single pass. Several: scores first, then every chunk again; or, where each chunk is of one segment,
    a single pass.
    """

    start: int
    stop: int
    spans: tuple[Span, ...]
    segments: tuple[int, ...] = ()  # of the group, that each span belongs to

    @property
    def rows(self) -> Span:
        return Span(self.spans[0].start, self.spans[-1].stop)


# --- selecting -------------------------------------------------------------------------------------------------------
# Few and plain operations: until the first product is on its way, a GPU that has nothing else to do waits for these.


def select(
    layout: Layout,
    tensors: Sequence[Tensor],
    row_weight: Tensor | None,
    segments: Tensor | None,
    n_groups: int | None,
) -> Selection:
    """Drop the rows that no term uses and order the rest by segment.

    Args:
        tensors: of the layout, flat.
        row_weight: ``(M,)``; a row of weight zero is dropped, and one whose target is the loss's ``ignore_index``.
        segments: ``(M,)`` integers, the segment of each row: segment ``g * segments_per_group + k`` is the k-th of
            group g; a negative id drops the row.
        n_groups: how many groups there are; without it the largest id tells, and then no group may be empty.

    Raises:
        ValueError: an index out of range, a weight that is not finite, segment ids that overrun or skip.
    """
    rows = _Rows(layout, [tensors[layout.rows[name]] for name in layout.targets], row_weight, segments)
    if segments is not None:
        return _by_segment(rows, segments, n_groups)
    if row_weight is None and (not rows.targets or rows.all_count()):
        return Selection(layout.n_rows, layout.n_rows)
    if row_weight is None and not layout.direct and serves(None, rows.targets, 1):  # the direct way builds no kernel
        found = selected(None, rows.targets, layout.options.ignore_index, 1)
        rows.check_targets(found.ranges)
        return Selection(found.bounds[-1], layout.n_rows, order=found.order)
    unused = rows.unused()
    finite = [] if row_weight is None else [row_weight.sum(dtype=torch.float64)]  # a sum is finite if all are
    n_unused, *fetched = fetch([unused.sum(), *finite, *ranges_of(rows.targets, unused)])
    if finite and not math.isfinite(fetched.pop(0)):
        raise ValueError("expected finite row weights, got NaN or infinity")
    rows.check_targets(fetched)
    n = layout.n_rows - int(n_unused)
    order = None if n == layout.n_rows else torch.nonzero_static(~unused, size=n)[:, 0]
    return Selection(n, layout.n_rows, order=order)


def _by_segment(rows: _Rows, segments: Tensor, known_groups: int | None) -> Selection:
    layout = rows.layout
    per_group = layout.options.segments_per_group
    n_groups = known_groups
    if n_groups is None:  # the largest id tells: the one case that costs a second transfer
        largest = int(segments.masked_fill(rows.unused(), -1).max())
        n_groups = max(largest // per_group + 1, 0)
        if n_groups > layout.n_rows:
            raise ValueError(
                f"expected segment ids without gaps, got id {largest} among {layout.n_rows} rows; where a group may be "
                "empty, say how many there are by group arguments or a group_weight"
            )
    n_segments = n_groups * per_group
    found = selected(segments, rows.targets, layout.options.ignore_index, n_segments, kernel=not layout.direct)
    if found.over:
        raise ValueError(
            f"expected segment ids below {n_segments} ({n_groups} groups of {per_group}), "
            f"got {int(segments.masked_fill(rows.unused(), -1).max())} among others"
        )
    rows.check_targets(found.ranges)
    bounds = found.bounds
    if known_groups is None:
        for g in range(n_groups):
            if bounds[g * per_group] == bounds[(g + 1) * per_group]:
                raise ValueError(
                    f"expected segment ids without gaps, got no row for group {g} of {n_groups}; where a group may be "
                    "empty, say how many there are by group arguments or a group_weight"
                )
    return Selection(bounds[-1], n_groups, per_group, found.order, found.segment, bounds, found.offsets)


@dataclass
class _Rows:
    """What says which rows a call uses."""

    layout: Layout
    targets: list[Tensor]
    weight: Tensor | None
    segments: Tensor | None

    def unused(self) -> Tensor:  # (M,)
        found = [is_ignored(target, self.layout.options.ignore_index) for target in self.targets]
        found += [] if self.weight is None else [self.weight == 0]
        found += [] if self.segments is None else [self.segments < 0]
        return reduce(torch.logical_or, found)

    def all_count(self) -> bool:
        """Whether every target is a column and none is ignored, as far as that is told at once: on a CPU, where reading
        the largest and the least of them is nothing."""
        if self.layout.device.type != "cpu":
            return False
        ignored = self.layout.options.ignore_index
        for name, target in zip(self.layout.targets, self.targets):
            columns, (low, high) = self.layout.columns_of(name), torch.aminmax(target)
            if 0 <= ignored < columns or int(low) < 0 or int(high) >= columns:
                return False
        return True

    def check_targets(self, ranges: Sequence[float]) -> None:
        """``ranges``: the least and the largest value of each on used rows."""
        for n, (name, target) in enumerate(zip(self.layout.targets, self.targets)):
            columns = self.layout.columns_of(name)
            if ranges[2 * n] < 0 or ranges[2 * n + 1] >= columns:
                given = target[~self.unused()]
                outside = int(((given < 0) | (given >= columns)).sum())
                raise ValueError(
                    f"expected rows[{name!r}] in [0, {columns}) on used rows (or {self.layout.options.ignore_index}, "
                    f"which drops the row), got {outside} outside (values from {int(given.min())} to "
                    f"{int(given.max())})"
                )


# --- packing ---------------------------------------------------------------------------------------------------------


def pack(
    layout: Layout, selection: Selection, size: int, together: bool, by_segment: bool = False
) -> tuple[Block, ...]:
    """Whole groups into chunks of ``size`` rows, in order; a group longer than a chunk spreads over several.

    Args:
        together: all groups are one block, since a loss couples them or scores alone are wanted.
        by_segment: chunks of a longer group end where its segments end.
    """
    n, groups = selection.n_rows, selection.n_groups
    whole = any(unit.needs.rows == "whole segments" for unit in layout.units)
    if any(unit.needs.rows == "all" for unit in layout.units):
        return (Block(0, groups, (Span(0, n, (0, groups)),)),)
    if selection.bounds is None:
        spans = _split(0, n, size)
        return (Block(0, groups, spans),) if together else tuple(Block(s.start, s.stop, (s,)) for s in spans)
    ends = selection.group_ends()
    if together and not whole:
        return (Block(0, groups, _split(0, n, size)),)
    blocks: list[Block] = []
    group, row = 0, 0
    while group < groups:
        stop = max(bisect_right(ends, row + size), group + 1)
        end = ends[stop - 1]
        if whole:
            blocks.append(Block(group, stop, (Span(row, end, (group, stop)),)))
        elif by_segment and end - row > size:
            blocks.append(_of_segments(selection, group, row, size))
        else:
            blocks.append(Block(group, stop, _split(row, end, size)))
        group, row = stop, end
    if not blocks:
        return (Block(0, 0, (Span(0, 0, (0, 0)),)),)
    return (Block(0, groups, tuple(b.spans[0] for b in blocks)),) if together else tuple(blocks)


def _of_segments(selection: Selection, group: int, row: int, size: int) -> Block:
    """The block of one group from ``row`` on."""
    spans: list[Span] = []
    segments: list[int] = []
    for n, length in enumerate(selection.segment_lengths(group)):
        pieces = _split(row, row + length, size) if length else ()
        spans += pieces
        segments += [n] * len(pieces)
        row += length
    return Block(group, group + 1, tuple(spans), tuple(segments))


def _split(start: int, stop: int, size: int) -> tuple[Span, ...]:
    """Spans of at most ``size`` rows; no rows are one empty span, which still tells what the scores are called."""
    if start == stop:
        return (Span(start, stop),)
    return tuple(Span(s, min(s + size, stop)) for s in range(start, stop, size))
