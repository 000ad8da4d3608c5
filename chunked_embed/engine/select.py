"""Which rows a call uses, in which order, and the checks that need the rows' values: one host sync for all of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .problem import Problem


@dataclass
class Selection:
    """The used rows in the order in which chunks walk over them.

    ``order``: positions of the used rows, or None where all rows are used as they come.
    ``segment``: the segment id of each used row, ascending, or None where each row is a segment of its own.
    ``lengths``: rows of each segment (on the CPU), or None likewise.
    """

    n_rows: int
    order: Tensor | None = None
    segment: Tensor | None = None
    lengths: Tensor | None = None
    n_groups: int = 0
    segments_per_group: int = 1

    def group_lengths(self) -> Tensor | None:
        return None if self.lengths is None else self.lengths.view(-1, self.segments_per_group).sum(1)


def select(
    problem: Problem,
    *,
    index_rows: Sequence[str] = (),
    row_weight: Tensor | None = None,
    segments: Tensor | None = None,
    n_groups: int | None = None,
    segments_per_group: int = 1,
) -> Selection:
    """Drop the rows that no term uses and order the rest by segment.

    Args:
        index_rows: names of row arguments that index the columns; on used rows they must lie in [0, V).
        row_weight: ``(M,)``; a row of weight zero is dropped.
        segments: ``(M,)`` integers, the segment of each row: segment ``g * segments_per_group + k`` is the k-th of
            group g; negative ids drop the row.
        n_groups: how many groups there are; without it the largest id tells, and then no group may be empty.

    Raises:
        ValueError: an index out of range, a weight that is not finite, segment ids that overrun or skip.
    """
    for name in index_rows:
        index = problem.tensors[problem.rows[name]]
        if index.is_floating_point() or index.dtype == torch.bool or index.dim() != 1:
            raise TypeError(
                f"expected rows[{name!r}] to be one integer per row, got {index.dtype} {tuple(index.shape)}"
            )
    if segments is not None:
        return _by_segment(problem, index_rows, segments, n_groups, segments_per_group)
    if row_weight is not None:
        return _by_weight(problem, index_rows, row_weight)
    _raise_on_indices(problem, index_rows, _fetch(_ranges(problem, index_rows, None)), None)
    return Selection(n_rows=problem.n_rows, n_groups=problem.n_rows)


# Few and plain operations: until the first product is on its way, a GPU that has nothing else to do waits for these.


def _by_weight(problem: Problem, index_rows: Sequence[str], weight: Tensor) -> Selection:
    used = weight != 0
    # A sum is finite if all are.
    counted = [used.sum(), weight.sum(dtype=torch.float64), *_ranges(problem, index_rows, used)]
    n_used, total, *ranges = _fetch(counted)
    if not math.isfinite(total):
        raise ValueError("expected finite row weights, got NaN or infinity")
    _raise_on_indices(problem, index_rows, ranges, used)
    n = int(n_used)
    order = None if n == problem.n_rows else torch.nonzero_static(used, size=n)[:, 0]
    return Selection(n_rows=n, order=order, n_groups=problem.n_rows)


def _by_segment(
    problem: Problem, index_rows: Sequence[str], segments: Tensor, given_groups: int | None, per_group: int
) -> Selection:
    # Without a number of groups the largest id tells: the one case that costs a second sync.
    n_groups = int(segments.max()) // per_group + 1 if given_groups is None else given_groups
    n_segments = n_groups * per_group
    place = segments.clamp(-1, n_segments) + 1  # the first is of unused rows, the last of those that overrun
    counts = torch.zeros(n_segments + 2, dtype=torch.int64, device=problem.device)
    counts.scatter_add_(0, place, torch.ones_like(place))
    in_order = (segments[1:] >= segments[:-1]).all()
    used = segments >= 0 if index_rows else None
    ranges = _ranges(problem, index_rows, used)
    fetched = _fetch([in_order, *ranges, counts])
    n_unused, *per_segment, n_over = map(int, fetched[1 + len(ranges) :])
    lengths = torch.tensor(per_segment, dtype=torch.int64, device="cpu")
    if n_over:
        raise ValueError(
            f"expected segment ids below {n_segments} ({n_groups} groups of {per_group}), "
            f"got {int(segments.max())} among others"
        )
    _raise_on_indices(problem, index_rows, fetched[1 : 1 + len(ranges)], used)
    of_group = lengths.view(-1, per_group).sum(1)
    if given_groups is None and bool((of_group == 0).any()):
        raise ValueError(
            f"expected segment ids without gaps, got no row for group {int(of_group.argmin())} of {n_groups}; where a "
            "group may be empty, say how many there are by group arguments or a group_weight"
        )
    order = None if fetched[0] and not n_unused else torch.argsort(place, stable=True)[n_unused:]
    segment = segments if order is None else segments.index_select(0, order)
    return Selection(problem.n_rows - n_unused, order, segment, lengths, n_groups, per_group)


def _fetch(values: Sequence[Tensor]) -> list[float]:
    """All of them on the host, in one transfer."""
    if not values:
        return []
    return torch.cat([v.reshape(-1) for v in values]).tolist()


def _columns(problem: Problem) -> int:
    return min(p.width for p in problem.projections.values())


def _ranges(problem: Problem, names: Sequence[str], used: Tensor | None) -> list[Tensor]:
    """The least and the largest value of each of these row arguments on used rows (zero counts as there)."""
    found: list[Tensor] = []
    for name in names:
        index = problem.tensors[problem.rows[name]]
        found += torch.aminmax(index if used is None else torch.where(used, index, 0))
    return found


def _raise_on_indices(problem: Problem, names: Sequence[str], ranges: Sequence[float], used: Tensor | None) -> None:
    columns = _columns(problem)
    for name, least, most in zip(names, ranges[::2], ranges[1::2], strict=True):
        if least < 0 or most >= columns:
            index = problem.tensors[problem.rows[name]]
            index = index if used is None else index[used]
            outside = int(((index < 0) | (index >= columns)).sum())
            raise ValueError(
                f"expected rows[{name!r}] in [0, {columns}) on used rows, got {outside} outside "
                f"(values from {int(index.min())} to {int(index.max())})"
            )
