"""The matrix products. Half-precision operands may write and accumulate in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from .types import HALF

BLOCK = 1 << 22  # numbers of an operand that are cast at a time, on devices whose products do not write wider


def mm(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """``out = a @ b``; a float32 ``out`` of half-precision operands is never rounded to half precision on the way."""
    if out.dtype == a.dtype:
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return _cast_in_blocks(out, a, b, adds=False)


def addmm_(accumulator: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``accumulator += a @ b``, in the accumulator's dtype."""
    if accumulator.dtype == a.dtype:
        return torch.addmm(accumulator, a, b, out=accumulator)  # counters of FLOPs know it, and not the method
    if a.is_cuda and a.dtype in HALF:
        return torch.addmm(accumulator, a, b, out_dtype=accumulator.dtype, out=accumulator)
    return _cast_in_blocks(accumulator, a, b, adds=True)


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
