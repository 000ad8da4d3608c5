"""Which rows a call uses, in which order, in which chunks; and the checks that need the rows' values.

All that is asked of the device comes in one transfer; the rest is plain integers.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from .layout import Layout


@dataclass
class Selection:
    """The used rows in the order in which chunks walk over them."""

    n_rows: int
    n_groups: int
    segments_per_group: int = 1
    order: Tensor | None = None  # positions of the used rows; None: all rows as they come
    segment: Tensor | None = None  # the segment of each used row, ascending; None: each row is one of its own
    lengths: list[int] | None = None  # rows of each segment; None likewise
    offsets: Tensor | None = None  # (segments + 1,), the rows before each segment, on the device

    def offsets_of(self, block: Block) -> Tensor:
        """(segments of the block + 1,): the rows of the block before each."""
        assert self.offsets is not None
        k = self.segments_per_group
        if not block.start:
            return self.offsets[: block.stop * k + 1]
        return self.offsets[block.start * k : block.stop * k + 1] - self.offsets[block.start * k]

    def group_ends(self) -> list[int]:
        """The row behind each group."""
        assert self.lengths is not None
        k = self.segments_per_group
        return list(accumulate(sum(self.lengths[i : i + k]) for i in range(0, len(self.lengths), k)))


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

    One chunk: a single pass. Several: scores first, then every chunk again.
    """

    start: int
    stop: int
    spans: tuple[Span, ...]

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
    targets = [tensors[layout.rows[name]] for name in layout.targets]
    if segments is not None:
        return _by_segment(layout, targets, segments, n_groups)
    used = None if row_weight is None else row_weight != 0
    for target in targets:
        kept = _counts(target, layout.options.ignore_index)
        used = kept if used is None else used & kept
    if used is None:
        return Selection(layout.n_rows, layout.n_rows)
    finite = [] if row_weight is None else [row_weight.sum(dtype=torch.float64)]  # a sum is finite if all are
    ranges = _ranges(targets, used)
    n, *found = _fetch([used.sum(), *finite, *ranges])
    if finite and not math.isfinite(found.pop(0)):
        raise ValueError("expected finite row weights, got NaN or infinity")
    _check_targets(layout, targets, found, used)
    order = None if n == layout.n_rows else torch.nonzero_static(used, size=int(n))[:, 0]
    return Selection(int(n), layout.n_rows, order=order)


def _by_segment(layout: Layout, targets: Sequence[Tensor], segments: Tensor, known_groups: int | None) -> Selection:
    per_group = layout.options.segments_per_group
    for target in targets:
        segments = torch.where(_counts(target, layout.options.ignore_index), segments, -1)
    n_groups = known_groups
    if n_groups is None:  # the largest id tells: the one case that costs a second transfer
        n_groups = max(int(segments.max()) // per_group + 1, 0)
        if n_groups > layout.n_rows:
            raise ValueError(
                f"expected segment ids without gaps, got id {int(segments.max())} among {layout.n_rows} rows; where a "
                "group may be empty, say how many there are by group arguments or a group_weight"
            )
    n_segments = n_groups * per_group
    place = segments.clamp(-1, n_segments) + 1  # the first is of unused rows, the last of those that overrun
    counts = torch.zeros(n_segments + 2, dtype=torch.int64, device=layout.device)
    counts.scatter_add_(0, place, torch.ones_like(place))
    in_order = (segments[1:] >= segments[:-1]).all()
    used = segments >= 0 if targets else None
    ranges = _ranges(targets, used)
    ordered, *found = _fetch([in_order, *ranges, counts])
    n_unused, *lengths, n_over = map(int, found[len(ranges) :])
    if n_over:
        raise ValueError(
            f"expected segment ids below {n_segments} ({n_groups} groups of {per_group}), "
            f"got {int(segments.max())} among others"
        )
    _check_targets(layout, targets, found[: len(ranges)], used)
    if known_groups is None:
        for g in range(n_groups):
            if not any(lengths[g * per_group : (g + 1) * per_group]):
                raise ValueError(
                    f"expected segment ids without gaps, got no row for group {g} of {n_groups}; where a group may be "
                    "empty, say how many there are by group arguments or a group_weight"
                )
    order = None if ordered and not n_unused else torch.argsort(place, stable=True)[n_unused:]
    segment = segments if order is None else segments.index_select(0, order)
    offsets = counts[:-1].cumsum(0) - n_unused
    return Selection(layout.n_rows - n_unused, n_groups, per_group, order, segment, lengths, offsets)


def _counts(target: Tensor, ignored: int) -> Tensor:
    """(M,) where a target is not the ignored one. One that the dtype cannot hold would wrap around."""
    span = torch.iinfo(target.dtype)
    return target != ignored if span.min <= ignored <= span.max else torch.ones_like(target, dtype=torch.bool)


def _fetch(values: Sequence[Tensor]) -> list[float]:
    """All of them on the host, in one transfer."""
    return torch.cat([v.reshape(-1) for v in values]).tolist()


def _ranges(targets: Sequence[Tensor], used: Tensor | None) -> list[Tensor]:
    """The least and the largest value of each on used rows (zero counts as there)."""
    found: list[Tensor] = []
    for target in targets:
        found += torch.aminmax(target if used is None else torch.where(used, target, 0))
    return found


def _check_targets(layout: Layout, targets: Sequence[Tensor], ranges: Sequence[float], used: Tensor | None) -> None:
    for n, (name, target) in enumerate(zip(layout.targets, targets)):
        columns = layout.columns_of(name)
        if ranges[2 * n] < 0 or ranges[2 * n + 1] >= columns:
            given = target if used is None else target[used]
            outside = int(((given < 0) | (given >= columns)).sum())
            raise ValueError(
                f"expected rows[{name!r}] in [0, {columns}) on used rows (or {layout.options.ignore_index}, which "
                f"drops the row), got {outside} outside (values from {int(given.min())} to {int(given.max())})"
            )


# --- packing ---------------------------------------------------------------------------------------------------------


def pack(layout: Layout, selection: Selection, size: int, together: bool) -> tuple[Block, ...]:
    """Whole groups into chunks of ``size`` rows, in order; a group longer than a chunk spreads over several.

    ``together``: all groups are one block, since a loss couples them or scores alone are wanted.
    """
    n, groups = selection.n_rows, selection.n_groups
    whole = any(unit.needs.rows == "whole segments" for unit in layout.units)
    if any(unit.needs.rows == "all" for unit in layout.units):
        return (Block(0, groups, (Span(0, n, (0, groups)),)),)
    if selection.lengths is None:
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
        blocks.append(Block(group, stop, (Span(row, end, (group, stop)),) if whole else _split(row, end, size)))
        group, row = stop, end
    if not blocks:
        return (Block(0, 0, (Span(0, 0, (0, 0)),)),)
    return (Block(0, groups, tuple(b.spans[0] for b in blocks)),) if together else tuple(blocks)


def _split(start: int, stop: int, size: int) -> tuple[Span, ...]:
    """Spans of at most ``size`` rows; no rows are one empty span, which still tells what the scores are called."""
    if start == stop:
        return (Span(start, stop),)
    return tuple(Span(s, min(s + size, stop)) for s in range(start, stop, size))
