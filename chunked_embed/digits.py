"""What keeps the digits of a difference: of two distributions near each other, of a sum whose terms nearly cancel."""

from __future__ import annotations

import torch
from torch import Tensor

from .engine.products import addmm_, mm
from .engine.types import HALF

TINY = 1e-30


def excess(a: Tensor, b: Tensor, r: Tensor) -> Tensor:
    """``a log(a/b) - a + b`` from ``r = log(a/b)``: its sum is KL(a|b) where a and b are distributions.

    No term is negative, and each is formed from ``r`` alone and the larger of a and b: of order ``r^2`` for a small
    ``r``, where ``a log(a/b)`` would be of order ``r`` and cancel in the sum.

    Example:
        >>> import torch
        >>> from chunked_embed import digits
        >>> p = torch.tensor([0.5, 0.3, 0.2])
        >>> q = p + torch.tensor([1e-4, -1e-4, 0.0])
        >>> digits.excess(p, q, (p / q).log()).sum()  # KL(p | q), about 2.7e-8
        tensor(2.6667e-08)
    """
    up = r > 0
    x = torch.where(up, -r, r)
    e = torch.expm1(x)
    return torch.where(up, a * (e - x), b * (x * (1 + e) - e))


def product(a: Tensor, b: Tensor, transposed: bool = False) -> Tensor:
    """``a @ b``, or ``a @ b.T``, in the dtype of ``a``; its gradient is not followed.

    Where ``b`` is in half precision it is an operand as it is, and ``a`` comes in two, ``high + low``: two products of
    half-precision operands that write float32, where a float32 copy of ``b`` would be ten times as slow on a GPU. That
    has 16 bits of ``a`` in bfloat16, and 22 in float16.

    Example:
        >>> import torch
        >>> from chunked_embed import digits
        >>> a, b = torch.tensor([[1.0, 2.0]]), torch.eye(2, dtype=torch.bfloat16)
        >>> digits.product(a, b)
        tensor([[1., 2.]])
    """
    a, b = a.detach(), b.detach()
    if b.dtype not in HALF:
        return (a.to(b.dtype) @ (b.t() if transposed else b)).to(a.dtype)
    # A compiler sees one operation: it would take a round trip through half precision for none, and low for zero.
    function = _traced if torch.compiler.is_compiling() else _in_two
    return function(a, b, transposed).to(a.dtype)


def _in_two(a: Tensor, b: Tensor, transposed: bool) -> Tensor:
    """In float32."""
    b = b.t() if transposed else b
    scale = None
    if b.dtype == torch.float16:  # its range, for low halves of small numbers: up from half of the largest that it has
        scale = torch.exp2(torch.ceil(torch.log2(a.abs().amax(1, keepdim=True).clamp_min(TINY))) - 15)
        a = a / scale
    half = a.to(b.dtype)
    out = mm(half, b, out=torch.empty(len(a), b.shape[1], dtype=torch.float32, device=a.device))
    torch.sub(a, half, out=half)
    addmm_(out, half, b)
    return out if scale is None else out.mul_(scale)


_traced = torch.library.custom_op(
    "chunked_embed::product_in_two", _in_two, mutates_args=(), schema="(Tensor a, Tensor b, bool transposed) -> Tensor"
)


@_traced.register_fake
def _(a: Tensor, b: Tensor, transposed: bool) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0 if transposed else 1], dtype=torch.float32)
