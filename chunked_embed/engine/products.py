"""The matrix products. Half-precision operands may write and accumulate in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from .types import HALF

BLOCK = 1 << 22  # numbers of an operand that are cast at a time, on devices whose products do not write wider
VECTORS = {"cuda": 8}
"""Half-precision numbers that are read at once. Products over other numbers of columns, those of a vocabulary of 32,001
say, take four times as long: what is beyond whole vectors is multiplied apart."""
FEWEST = 1 << 31  # multiplications, above those of a launch


def whole(n: int, device: torch.device) -> int:
    """So many numbers in whole vectors."""
    vector = VECTORS.get(device.type, 1)
    return -(-n // vector) * vector


def mm(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """``out = a @ b``; a float32 ``out`` of half-precision operands is never rounded to half precision on the way."""
    if (parts := _uneven(a, b)) is not None:
        return _in_parts(out, a, b, *parts, adds=False)
    if out.dtype == a.dtype:
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return _cast_in_blocks(out, a, b, adds=False)


def addmm_(accumulator: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``accumulator += a @ b``, in the accumulator's dtype."""
    if (parts := _uneven(a, b)) is not None:
        return _in_parts(accumulator, a, b, *parts, adds=True)
    if accumulator.dtype == a.dtype:
        return torch.addmm(accumulator, a, b, out=accumulator)  # counters of FLOPs know it, and not the method
    if a.is_cuda and a.dtype in HALF:
        return torch.addmm(accumulator, a, b, out_dtype=accumulator.dtype, out=accumulator)
    return _cast_in_blocks(accumulator, a, b, adds=True)


def _uneven(a: Tensor, b: Tensor) -> tuple[str, int] | None:
    """Which side of a product is no whole number of vectors, and how much of it is; where rows begin with vectors."""
    vector = VECTORS.get(a.device.type, 1)
    if vector == 1 or a.dtype not in HALF or a.shape[0] * a.shape[1] * b.shape[1] < FEWEST:
        return None
    rows, depth, columns = a.shape[0], a.shape[1], b.shape[1]
    if columns % vector and columns > vector:
        return "columns", columns - columns % vector
    if rows % vector and rows > vector and a.stride(0) == 1 and a.stride(1) % vector == 0:
        return "rows", rows - rows % vector
    if depth % vector and depth > vector and a.stride(1) == 1 and a.stride(0) % vector == 0:
        return "depth", depth - depth % vector
    return None


def _in_parts(out: Tensor, a: Tensor, b: Tensor, side: str, size: int, adds: bool) -> Tensor:
    def part_of(out: Tensor, a: Tensor, b: Tensor, adds: bool) -> None:
        addmm_(out, a, b) if adds else mm(a, b, out)

    for part in (slice(0, size), slice(size, None)):
        if side == "columns":
            part_of(out[:, part], a, b[:, part], adds)
        elif side == "rows":
            part_of(out[part], a[part], b, adds)
    if side == "depth":
        total = out
        if out.dtype in HALF:  # which is rounded once
            total = torch.empty_like(out, dtype=torch.float32) if not adds else out.float()
        part_of(total, a[:, :size], b[:size], adds)
        part_of(total, a[:, size:], b[size:], True)
        if total is not out:
            out.copy_(total)
    return out


def _cast_in_blocks(out: Tensor, a: Tensor, b: Tensor, adds: bool) -> Tensor:
    """Of operands cast to the dtype of ``out``, no more of them at a time than a block: a head has gigabytes."""
    sizes = (*a.shape, b.shape[1])
    largest = max(range(3), key=lambda i: sizes[i])
    piece = max(1, BLOCK // max(sum(sizes) - sizes[largest], 1))
    starts = range(0, sizes[largest], piece)
    for start in starts:
        part = slice(start, start + piece)
        left = a[part] if largest == 0 else a[:, part] if largest == 1 else a
        right = b[part] if largest == 1 else b[:, part] if largest == 2 else b
        place = out[part] if largest == 0 else out[:, part] if largest == 2 else out
        left, right = left.to(out.dtype), right.to(out.dtype)
        if adds or (largest == 1 and start):
            torch.addmm(place, left, right, out=place)
        else:
            torch.mm(left, right, out=place)
    return out
