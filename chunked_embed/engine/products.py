"""The matrix products. Half-precision operands may write and accumulate in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from .types import HALF


def mm(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """``out = a @ b``; a float32 ``out`` of half-precision operands is never rounded to half precision on the way."""
    if out.dtype == a.dtype:
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def addmm_(accumulator: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``accumulator += a @ b``, in the accumulator's dtype."""
    if accumulator.dtype == a.dtype:
        return torch.addmm(accumulator, a, b, out=accumulator)  # counters of FLOPs know it, and not the method
    if a.is_cuda and a.dtype in HALF:
        return torch.addmm(accumulator, a, b, out_dtype=accumulator.dtype, out=accumulator)
    return torch.addmm(accumulator, a.to(accumulator.dtype), b.to(accumulator.dtype), out=accumulator)
