"""Embeddings that a loss forms itself, as operands of its products: in float32, where what they come from is not."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import Projection
from ..engine.call import operand_dtype
from ..engine.products import mm
from ..engine.types import HALF, accumulator_dtype
from .arguments import Activation, widened


def embedded(
    x: Tensor,  # (N, H)
    weight: Tensor | None,  # (D, H)
    bias: Tensor | None,  # (D,)
    activation: Activation | None,
    normalize: bool,
) -> Tensor:  # (N, D), float32 or float64
    x = widened(x) if weight is None else _Linear.apply(x, weight, bias, operand_dtype(x.dtype, x.device))
    x = x if activation is None else activation(x)
    return F.normalize(x, dim=1) if normalize else x


def of_formed(x: Tensor, w: Tensor, *, cosine: bool, dtype: torch.dtype) -> Projection:
    """Similarities of embeddings that have more digits than the products' operands. Half-precision operands come in
    two, ``x = high + low``, for twice as many digits of similarities and gradients: seven products instead of three."""
    if dtype not in HALF:
        return Projection(x, w, cosine=cosine, dtype=dtype)
    if cosine:
        x, w = F.normalize(x, dim=1), F.normalize(w, dim=1)
    low_x, low_w = ((t - t.to(dtype).to(t.dtype)).detach() for t in (x, w))
    return Projection(x, w, extra=((x, low_w), (low_x, w)), dtype=dtype)


class _Linear(torch.autograd.Function):
    """``x @ weight.T + bias`` with operands of ``dtype``, in float32 where that is half precision."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        operands = x.to(dtype), weight.to(dtype)
        ctx.save_for_backward(*operands)
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        out = x.new_empty(len(x), len(weight), dtype=accumulator_dtype(dtype))
        mm(operands[0], operands[1].t(), out=out)
        return out if bias is None else out.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.dtypes
        if x.dtype == torch.float16:  # whose range a gradient leaves: 1e12 times another's, of a row of zeros
            x, weight = x.float(), weight.float()
        rounded = grad.to(x.dtype)
        pairs = ((rounded, weight, of_x), (rounded.t(), x, of_weight))
        found = (_product(*pair) if wanted else None for pair, wanted in zip(pairs, ctx.needs_input_grad))
        return *found, grad.sum(0).to(of_bias) if ctx.needs_input_grad[2] else None, None


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``a @ b``, summed wide and rounded once to the dtype of a gradient."""
    return mm(a, b, out=a.new_empty(len(a), b.shape[1], dtype=accumulator_dtype(a.dtype))).to(dtype)
