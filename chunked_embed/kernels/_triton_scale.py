"""The Triton side of `scale`. Its plain twin is in scale.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from chunked_embed.kernels._launch import Launched, cdiv, on_device

BLOCK, WARPS = 8192, 8


@Launched
@triton.jit
def _scale_kernel(x_ptr, factor_ptr, out_ptr, n, y_ptr, out_y_ptr, m, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    factor = tl.load(factor_ptr)
    if y_ptr is not None:
        of_x = tl.cdiv(n, BLOCK) * BLOCK
        if first >= of_x:
            _scale(y_ptr, factor, out_y_ptr, first - of_x + tl.arange(0, BLOCK), m)
        else:
            _scale(x_ptr, factor, out_ptr, first + tl.arange(0, BLOCK), n)
    else:
        _scale(x_ptr, factor, out_ptr, first + tl.arange(0, BLOCK), n)


@triton.jit
def _scale(x_ptr, factor, out_ptr, at, n):
    x = tl.load(x_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, x * factor, mask=at < n)


def scale_(x: Tensor, factor: Tensor, out: Tensor, y: Tensor | None = None, out_y: Tensor | None = None) -> None:
    """Of one tensor or two, in one launch."""
    n, m = x.numel(), 0 if y is None else y.numel()
    if n + m:
        factor = factor if factor.dtype == torch.float32 else factor.to(torch.float32)
        with on_device(x):
            _scale_kernel[(cdiv(n, BLOCK) + cdiv(m, BLOCK),)](
                *(x, factor, out, n, y, out_y, m), BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=True
            )


@Launched
@triton.jit
def _combine_kernel(
    total_ptr, factor_ptr, x_ptr, of_x_ptr, n, SCALES: tl.constexpr, ADDS: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(total_ptr + at, mask=at < n, other=0.0)
    if SCALES:
        factor = tl.load(factor_ptr)
        total = tl.where(factor == 0, 0.0, total * factor)
    if ADDS:
        of_x = tl.load(of_x_ptr)
        x = tl.load(x_ptr + at, mask=at < n, other=0.0)
        total += tl.where(of_x == 0, 0.0, x * of_x)
    tl.store(total_ptr + at, total, mask=at < n)


def combine_(total: Tensor, factor: Tensor | None, x: Tensor | None, of_x: Tensor | None) -> Tensor:
    n = total.numel()
    if n:
        given = [total if t is None else t.to(torch.float32) for t in (factor, x, of_x)]
        constants = {"SCALES": factor is not None, "ADDS": x is not None}
        with on_device(total):
            _combine_kernel[(cdiv(n, BLOCK),)](
                total, *given, n, **constants, BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=True
            )
    return total
