"""Selecting rows against plain Python: the plain twin anywhere, the kernel on a GPU or through Triton's interpreter."""

import pytest
import torch

from chunked_embed.kernels import available
from chunked_embed.kernels.selection import selected, selected_reference, serves

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
IGNORED = -100


def expected(segments, target, n_segments):
    """-> order, segments of those rows, offsets, rows beyond, the range of targets"""
    rows = range(len(segments))
    used = [i for i in rows if segments[i] >= 0 and (target is None or target[i] != IGNORED)]
    order = sorted(used, key=lambda i: segments[i])
    bounds = [sum(segments[i] < s for i in used) for s in range(n_segments + 1)]
    values = [0, *(target[i] for i in used)] if target is not None else [0]
    over = sum(segments[i] >= n_segments for i in used)
    return order, [segments[i] for i in order], bounds, over, [min(values), max(values)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [None, torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize("kind", ["mixed", "in order", "beyond", "none used", "one segment"])
@pytest.mark.parametrize("rows, n_segments", [(1, 1), (70, 3), (200, 70)])
def test_rows(rows, n_segments, kind, dtype, device):
    g = torch.Generator().manual_seed(rows)
    segments = torch.randint(-1 if kind == "mixed" else 0, n_segments + (kind == "beyond"), (rows,), generator=g)
    if kind == "in order":
        segments = segments.sort().values
    if kind == "none used":
        segments = torch.full_like(segments, -3)
    if kind == "one segment":
        segments = torch.full_like(segments, n_segments - 1)
    target = None
    if dtype is not None:
        target = torch.randint(0, 200, (rows,), generator=g)
        if dtype != torch.uint8:  # which cannot hold what is ignored
            target[::3] = IGNORED if kind != "in order" else -1
    order, of_rows, bounds, over, values = expected(
        segments.tolist(), None if target is None else target.tolist(), n_segments
    )
    given = segments.to(device), [] if target is None else [target.to(device, dtype)]
    for function in (selected, selected_reference):
        found = function(*given, IGNORED, n_segments)
        assert found.over == over
        if over:
            continue  # refused by who asked
        assert found.bounds == found.offsets.tolist() == bounds
        assert found.segment.tolist() == of_rows
        assert (list(range(rows)) if found.order is None else found.order.tolist()) == order
        assert target is None or [min(0, found.ranges[0]), max(0, found.ranges[1])] == values
        assert (found.order is None) == (order == list(range(rows)))


@pytest.mark.parametrize("device", DEVICES if available("cpu") else DEVICES[1:])  # of the kernel alone
def test_rows_of_no_segments(device):
    target = torch.tensor([3, IGNORED, 8, 0, IGNORED], device=device)
    found = selected(None, [target], IGNORED, 1)
    assert found.order.tolist() == [0, 2, 3] and found.bounds == [0, 3] and found.ranges == [0, 8]
    assert selected(None, [target[[0, 2]]], IGNORED, 1).order is None


@pytest.mark.parametrize("device", DEVICES)
def test_many_rows_are_sorted(device):
    few, many = (torch.zeros(n, dtype=torch.int64, device=device) for n in (4000, 4001))
    assert not serves(many, [], 96) and not serves(few, [], 97) and not serves(few, [few, few], 1)
    assert serves(few, [few], 96) == available(device)
