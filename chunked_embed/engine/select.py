"""Which rows a call uses, in which order, and the checks that need the rows' values: one host sync for all of it."""

from __future__ import annotations

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
    _raise_on_indices(problem, index_rows, _fetch([_out_of_range(problem, name, None) for name in index_rows]))
    return Selection(n_rows=problem.n_rows, n_groups=problem.n_rows)


def _by_weight(problem: Problem, index_rows: Sequence[str], weight: Tensor) -> Selection:
    used = weight != 0
    broken = ~torch.isfinite(weight).all()
    checks = [used.sum(), broken, *(_out_of_range(problem, name, used) for name in index_rows)]
    n_used, bad_weights, *bad = _fetch(checks)
    if bad_weights:
        raise ValueError("expected finite row weights, got NaN or infinity")
    _raise_on_indices(problem, index_rows, bad)
    order = None if n_used == problem.n_rows else torch.argsort((~used).to(torch.int8), stable=True)[:n_used]
    return Selection(n_rows=n_used, order=order, n_groups=problem.n_rows)


def _by_segment(
    problem: Problem, index_rows: Sequence[str], segments: Tensor, given_groups: int | None, per_group: int
) -> Selection:
    # Without a number of groups the largest id tells: the one case that costs a second sync.
    n_groups = int(segments.max()) // per_group + 1 if given_groups is None else given_groups
    n_segments = n_groups * per_group
    used = segments >= 0
    inside = torch.where(used & (segments < n_segments), segments, n_segments)
    counts = torch.zeros(n_segments + 1, dtype=torch.int64, device=problem.device)
    counts.scatter_add_(0, inside, torch.ones_like(inside))
    in_order = used.all() & (segments[1:] >= segments[:-1]).all()
    overrun = (segments >= n_segments).sum()
    checks = [overrun, in_order, *(_out_of_range(problem, name, used) for name in index_rows)]
    fetched = _fetch([*checks, counts[:-1]])
    n_over, sorted_already, *bad = fetched[: len(checks)]
    lengths = torch.tensor(fetched[len(checks) :], dtype=torch.int64, device="cpu")
    if n_over:
        raise ValueError(
            f"expected segment ids below {n_segments} ({n_groups} groups of {per_group}), "
            f"got {int(segments.max())} among others"
        )
    _raise_on_indices(problem, index_rows, bad)
    empty = (lengths.view(-1, per_group).sum(1) == 0).nonzero()
    if given_groups is None and len(empty):
        raise ValueError(
            f"expected segment ids without gaps, got no row for group {int(empty[0])} of {n_groups}; where a group may "
            "be empty, say how many there are by group arguments or a group_weight"
        )
    n_used = int(lengths.sum())
    order = None if sorted_already else torch.argsort(inside, stable=True)[:n_used]
    segment = segments if order is None else segments.index_select(0, order)
    return Selection(n_used, order, segment, lengths, n_groups, per_group)


def _fetch(values: Sequence[Tensor]) -> list[int]:
    """All of them on the host, in one transfer."""
    if not values:
        return []
    return torch.cat([v.reshape(-1).to(torch.int64) for v in values]).tolist()


def _columns(problem: Problem) -> int:
    return min(p.width for p in problem.projections.values())


def _out_of_range(problem: Problem, name: str, used: Tensor | None) -> Tensor:
    index = problem.tensors[problem.rows[name]]
    bad = (index < 0) | (index >= _columns(problem))
    return (bad if used is None else bad & used).sum()


def _raise_on_indices(problem: Problem, names: Sequence[str], counts: Sequence[int]) -> None:
    for name, count in zip(names, counts, strict=True):
        if count:
            index = problem.tensors[problem.rows[name]]
            raise ValueError(
                f"expected rows[{name!r}] in [0, {_columns(problem)}) on used rows, got {count} outside "
                f"(values from {int(index.min())} to {int(index.max())})"
            )
