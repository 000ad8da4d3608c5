"""The used rows of a call, ordered by their segments, and what the host asks of them, in one transfer.

Of few rows, whose call is bound by launches, in one launch too: a kernel that compares each row with all. For many a
sort is faster: the plain twin.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from chunked_embed.kernels import available

ROWS = 4096  # and segments, of the kernel, at most: together as many programs, which look at all rows each


class Selected(NamedTuple):
    order: Tensor | None  # positions of the used rows; None: all rows as they come
    segment: Tensor  # of each used row, ascending
    offsets: Tensor  # (segments + 1,), the used rows before each segment
    bounds: list[int]  # the same, on the host
    over: int  # how many rows name a segment beyond the last
    ranges: list[int]  # the least and the largest value of each target on used rows (zero counts as there)


def serves(segments: Tensor | None, targets: Sequence[Tensor], n_segments: int) -> bool:
    """Whether the kernel does: of segments, a target, or both."""
    given = [*targets] if segments is None else [segments, *targets]
    few = 0 < len(given[0]) <= ROWS - n_segments and len(targets) < 2
    return few and available(given[0].device) and all(t.dim() == 1 and t.is_contiguous() for t in given)


def selected(
    segments: Tensor | None, targets: Sequence[Tensor], ignored: int, n_segments: int, *, kernel: bool = True
) -> Selected:
    """
    Args:
        segments: ``(R,)`` integers, a negative one drops the row; None, of the kernel alone: all rows are of one.
        targets: ``(R,)`` integers each, ``ignored`` drops the row.
        kernel: where it serves.
    """
    if kernel and serves(segments, targets, n_segments):
        from chunked_embed.kernels import _triton_selection as kernels

        return kernels.selected(segments, targets[0] if targets else None, ignored, n_segments)
    assert segments is not None
    return selected_reference(segments, targets, ignored, n_segments)


def selected_reference(segments: Tensor, targets: Sequence[Tensor], ignored: int, n_segments: int) -> Selected:
    for target in targets:
        segments = segments.masked_fill(is_ignored(target, ignored), -1)
    place = segments.clamp(-1, n_segments) + 1  # the first is of unused rows, the last of those that overrun
    counts = torch.zeros(n_segments + 2, dtype=torch.int64, device=segments.device)
    before = counts.scatter_add_(0, place, torch.ones_like(place)).cumsum(0)
    in_order = (segments[1:] >= segments[:-1]).all()
    ordered, *found = fetch([in_order, before, *(ranges_of(targets, segments < 0) if targets else ())])
    counted, ranges = found[: n_segments + 2], found[n_segments + 2 :]
    unused = int(counted[0])
    order = None if ordered and not unused else torch.argsort(place, stable=True)[unused:]
    return Selected(
        order=order,
        segment=segments if order is None else segments.index_select(0, order),
        offsets=before[:-1] - unused if unused else before[:-1],
        bounds=[int(n) - unused for n in counted[:-1]],
        over=int(counted[-1] - counted[-2]),
        ranges=list(map(int, ranges)),
    )


def is_ignored(target: Tensor, ignored: int) -> Tensor:
    """(R,) where a target is the ignored one. One that the dtype cannot hold would wrap around."""
    span = torch.iinfo(target.dtype)
    return target == ignored if span.min <= ignored <= span.max else torch.zeros_like(target, dtype=torch.bool)


def ranges_of(targets: Sequence[Tensor], unused: Tensor) -> list[Tensor]:
    """The least and the largest value of each on used rows (zero counts as there)."""
    found: list[Tensor] = []
    for target in targets:  # filled, since a number beside a tensor in torch.where is a tensor first, and a launch
        found += torch.aminmax(target.masked_fill(unused, 0))
    return found


def fetch(values: Sequence[Tensor]) -> list[float]:
    """All of them on the host, in one transfer."""
    return torch.cat([v.reshape(-1) for v in values]).tolist()
