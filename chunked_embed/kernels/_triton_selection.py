"""The Triton side of `selection`: one launch. A row's place is how many rows go before it, counted: a program for each
row, one for each segment's offset, and one for what else the host asks for."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from chunked_embed.kernels._launch import Launched, on_device
from chunked_embed.kernels.selection import Selected

BLOCK = 512  # rows at a time
FACTS = 4  # rows beyond the last segment, whether all are in order, the least and the largest target


@triton.jit
def _segment(segments_ptr, target_ptr, ignored, S, at, inside, SEGMENTS: tl.constexpr, TARGET: tl.constexpr):
    """-1 where a row is not used, S where its segment is none."""
    found = tl.where(inside, 0, -1).to(tl.int64)
    if SEGMENTS:
        found = tl.load(segments_ptr + at, mask=inside, other=-1).to(tl.int64)
        found = tl.minimum(tl.maximum(found, -1), S)
    if TARGET:
        target = tl.load(target_ptr + at, mask=inside, other=0).to(tl.int64)
        found = tl.where(target == ignored, -1, found)
    return found


@Launched
@triton.jit
def _selection_kernel(
    out_ptr,  # facts, offsets (S + 1,), order (R,), segment (R,)
    segments_ptr,  # (R,)
    target_ptr,  # (R,)
    ignored,
    R,
    S,
    SEGMENTS: tl.constexpr,
    TARGET: tl.constexpr,
    FACTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offsets, order = FACTS, FACTS + S + 1
    program = tl.program_id(0)
    if program <= R + S:  # how many rows go before a row, or are used and of segments before one
        preceding = tl.zeros((BLOCK,), tl.int32)
        is_row = program < R
        at = tl.where(is_row, program, 0)
        own = _segment(segments_ptr, target_ptr, ignored, S, at, is_row, SEGMENTS, TARGET)
        own = tl.where(is_row, own, program - R)
        lowest = tl.where(is_row, -1, 0)
        for start in range(0, R, BLOCK):
            there = start + tl.arange(0, BLOCK)
            other = _segment(segments_ptr, target_ptr, ignored, S, there, there < R, SEGMENTS, TARGET)
            goes_before = (other < own) | ((other == own) & (there < at))
            preceding += (goes_before & (other >= lowest) & (there < R)).to(tl.int32)
        before = tl.sum(preceding, 0)
        place = tl.where(is_row, order + before, offsets + program - R)
        tl.store(out_ptr + place, tl.where(is_row, program, before).to(tl.int64))
        tl.store(out_ptr + order + R + before, own, mask=is_row)
    else:
        beyond = tl.zeros((BLOCK,), tl.int32)
        misplaced = tl.zeros((BLOCK,), tl.int32)  # not used, or of a segment before the last row's
        least = tl.zeros((BLOCK,), tl.int64)
        most = tl.zeros((BLOCK,), tl.int64)
        for start in range(0, R, BLOCK):
            there = start + tl.arange(0, BLOCK)
            own = _segment(segments_ptr, target_ptr, ignored, S, there, there < R, SEGMENTS, TARGET)
            behind = (there < R) & (there > 0)
            last = _segment(segments_ptr, target_ptr, ignored, S, there - 1, behind, SEGMENTS, TARGET)
            beyond += ((there < R) & (own == S)).to(tl.int32)
            misplaced += ((there < R) & ((own < 0) | (behind & (own < last)))).to(tl.int32)
            if TARGET:
                target = tl.load(target_ptr + there, mask=(there < R) & (own >= 0), other=0).to(tl.int64)
                least, most = tl.minimum(least, target), tl.maximum(most, target)
        tl.store(out_ptr, tl.sum(beyond, 0).to(tl.int64))
        tl.store(out_ptr + 1, (tl.sum(misplaced, 0) == 0).to(tl.int64))
        tl.store(out_ptr + 2, tl.min(least, 0))
        tl.store(out_ptr + 3, tl.max(most, 0))


def selected(segments: Tensor | None, target: Tensor | None, ignored: int, n_segments: int) -> Selected:
    given = target if segments is None else segments
    assert given is not None
    rows, behind = len(given), FACTS + n_segments + 1
    out = torch.empty(behind + 2 * rows, dtype=torch.int64, device=given.device)
    with on_device(given):
        _selection_kernel[(rows + n_segments + 2,)](
            out,
            given if segments is None else segments,
            given if target is None else target,
            ignored,
            rows,
            n_segments,
            SEGMENTS=segments is not None,
            TARGET=target is not None,
            FACTS=FACTS,
            BLOCK=BLOCK,
        )
    over, in_order, least, most, *offsets = out[:behind].tolist()
    order, segment = out[behind:].chunk(2)
    unused = rows - offsets[-1] - over
    return Selected(
        order=None if in_order else order[unused:],
        segment=segment[unused:],
        offsets=out[FACTS:behind],
        bounds=offsets,
        over=over,
        ranges=[least, most],
    )
