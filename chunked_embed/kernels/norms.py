"""Norms of rows, for cosines: their inverses, and what of a gradient is at right angles to its row.

With ``u = x / max(|x|, 1e-12)`` and a gradient g of u, the gradient of x is ``(g - u (u . g)) / |x|``. Here g comes
with the inverse norm in it already, from a product of the scaled gradient of cosines, and the projection is left to do.
Below the floor the norm is a constant, and nothing is projected out.

Computed wide: in float32, or float64 for that.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from chunked_embed.kernels import available

FLOOR = 1e-12  # of a norm, as in F.normalize
AT_FLOOR = (1 - 1e-6) / FLOOR  # of an inverse: from here on the norm is the floor, rounding aside
BLOCK = 1 << 20  # numbers that the plain twins hold wide at a time


def inverse_norms(x: Tensor) -> Tensor:  # (N, D) -> (N,)
    """``1 / max(|x|, 1e-12)`` of each row, in float32 (float64 for float64)."""
    if _use_triton(x):
        from chunked_embed.kernels import _triton_norms as kernels

        return kernels.inverse_norms(x)[0]
    return inverse_norms_reference(x)


def inverse_norms_of_both(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:  # (N, D), (M, D) -> (N,), (M,)
    """The same of two sides, in one launch where they are alike."""
    if _use_triton(x) and _use_triton(y) and (x.dtype, x.shape[1]) == (y.dtype, y.shape[1]):
        from chunked_embed.kernels import _triton_norms as kernels

        of_x, of_y = kernels.inverse_norms(x, y)
        assert of_y is not None
        return of_x, of_y
    return inverse_norms(x), inverse_norms(y)


def inverse_norms_reference(x: Tensor) -> Tensor:
    out = x.new_empty(len(x), dtype=_wide(x))
    for part in _blocks(x):
        torch.linalg.vector_norm(x[part].to(out.dtype), dim=1, out=out[part])
    return out.clamp_min_(FLOOR).reciprocal_()


def of_length_one(x: Tensor) -> Tensor:  # (N, D) -> (N,)
    """The power of two that brings each row to a length of 1/2 to 2; one where the norm is at its floor."""
    inverse = inverse_norms(x)
    return torch.where(inverse < AT_FLOOR, torch.exp2(torch.floor(torch.log2(inverse))), 1.0)


def through_norms_(
    grad: Tensor,  # (N, D), float32 or float64; changed in place
    x: Tensor,  # (N, D)
    inverse: Tensor,  # (N,), of `inverse_norms`
) -> Tensor:
    """``grad -= x * inverse^2 * (grad . x)``, row by row, but where the norm is at its floor."""
    if grad.dtype == torch.float32 and _use_triton(grad) and _use_triton(x):
        from chunked_embed.kernels import _triton_norms as kernels

        kernels.through_norms_(grad, x, inverse)
        return grad
    return through_norms_reference_(grad, x, inverse)


def through_norms_reference_(grad: Tensor, x: Tensor, inverse: Tensor) -> Tensor:
    inverse = inverse.to(grad.dtype)
    for part in _blocks(x):
        wide, g, scale = x[part].to(grad.dtype), grad[part], inverse[part]
        along = torch.where(scale < AT_FLOOR, torch.linalg.vecdot(g, wide) * scale * scale, 0.0)
        g.addcmul_(wide, along[:, None], value=-1)
    return grad


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _use_triton(x: Tensor) -> bool:
    return x.dtype != torch.float64 and x.stride(1) == 1 and available(x.device)


def _blocks(x: Tensor) -> Iterator[slice]:
    rows = max(1, BLOCK // max(1, x.shape[1]))
    return (slice(start, start + rows) for start in range(0, len(x), rows))
