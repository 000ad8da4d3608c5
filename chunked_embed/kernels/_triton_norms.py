"""The Triton side of `norms`: one program a row. Its plain twins are in norms.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from chunked_embed.kernels._launch import Launched, cdiv, next_power_of_2, on_device
from chunked_embed.kernels.norms import AT_FLOOR, FLOOR

BLOCK, EACH = 4096, 8  # columns at a time, and of them a thread's

_FLOOR = tl.constexpr(FLOOR)
_AT_FLOOR = tl.constexpr(AT_FLOOR)


@Launched
@triton.jit(do_not_specialize=["N"])
def _inverse_norms_kernel(
    x_ptr,  # (N, D)
    x_stride,
    y_ptr,  # (M, D), or None
    y_stride,
    out_ptr,  # (N,), and (M,) from the next multiple of 4 on
    N,
    D,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if y_ptr is not None and row >= N:
        x_ptr = y_ptr
        x_stride = y_stride
        row -= N
        out_ptr += tl.cdiv(N, 4) * 4
    x_ptr += row * x_stride
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, D, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < D, other=0.0).to(tl.float32)
        total += x * x
    norm = tl.sqrt(tl.sum(total, 0))
    # Not tl.maximum, which drops a NaN.
    tl.store(out_ptr + row, 1.0 / tl.where(norm < _FLOOR, _FLOOR, norm))


@Launched
@triton.jit
def _project_kernel(
    grad_ptr,  # (N, D)
    grad_stride,
    x_ptr,  # (N, D)
    x_stride,
    inverse_ptr,  # (N,)
    D,
    BLOCK: tl.constexpr,
):
    """Reads a row twice: the second time from the cache."""
    row = tl.program_id(0).to(tl.int64)
    grad_ptr += row * grad_stride
    x_ptr += row * x_stride
    inverse = tl.load(inverse_ptr + row)
    if inverse < _AT_FLOOR:
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, D, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + at, mask=at < D, other=0.0).to(tl.float32)
            total += x * tl.load(grad_ptr + at, mask=at < D, other=0.0)
        along = tl.sum(total, 0) * inverse * inverse
        for start in range(0, D, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + at, mask=at < D, other=0.0).to(tl.float32)
            tl.store(grad_ptr + at, tl.load(grad_ptr + at, mask=at < D, other=0.0) - x * along, mask=at < D)


def inverse_norms(x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Of two tensors of one width, in one launch."""
    n, rows = len(x), 0 if y is None else len(y)
    whole = cdiv(n, 4) * 4
    out = torch.empty(whole + rows, device=x.device, dtype=torch.float32)
    if n + rows:
        with on_device(x):
            _inverse_norms_kernel[(n + rows,)](
                *(x, x.stride(0), y, 0 if y is None else y.stride(0), out, n, x.shape[1]), **_launch(x)
            )
    if y is None:
        return out[:n], None
    of_x, of_y = out.split([whole, rows])
    return (of_x if whole == n else of_x[:n]), of_y


def through_norms_(grad: Tensor, x: Tensor, inverse: Tensor) -> None:
    if len(x):
        inverse = inverse.float().contiguous()
        with on_device(x):
            _project_kernel[(len(x),)](grad, grad.stride(0), x, x.stride(0), inverse, x.shape[1], **_launch(x))


def _launch(x: Tensor) -> dict[str, int]:
    block = min(BLOCK, max(32, next_power_of_2(x.shape[1])))
    return {"BLOCK": block, "num_warps": max(1, block // (32 * EACH)), "enable_fp_fusion": True}
