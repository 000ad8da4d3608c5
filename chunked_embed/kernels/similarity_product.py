"""Steps on a chunk of a similarity matrix that is never written: softmax over its rows, or over rows and columns.

As `similarity`, of outputs ``x @ bank.T`` that a kernel forms tile by tile and takes further where they are formed:

    linear_cross_entropy      the product leaves exponentials in half precision, and what a row's tiles add up to; one
                              pass over the exponentials turns them into the gradient, in their place
    linear_both_logsumexps    the product leaves row and column log-sum-exps, and the own outputs
    linear_both_gradients     the product once more, which leaves the gradient

Half-precision operands, float32 outputs: nothing is rounded but the gradient, which is an operand of two products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chunked_embed.kernels import available
from chunked_embed.kernels._launch import before_hopper
from chunked_embed.kernels.similarity import (
    both_gradients_reference,
    both_logsumexps_reference,
    cross_entropy_reference,
)


def serves(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether there is a kernel for operands of this dtype, quicker than the product and what reads its outputs."""
    return dtype in (torch.bfloat16, torch.float16) and available(device) and not before_hopper(device)


def linear_cross_entropy(
    x: Tensor,  # (R, H)
    bank: Tensor,  # (V, H)
    target: Tensor,  # (R,) int64
    weight: Tensor | None = None,  # (R,): the gradient is that of sum(weight * loss)
    *,
    rows: Tensor,  # (R,)
    columns: Tensor | None = None,  # (V,), ones by default
    gradient: bool = False,
    moment: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # loss (R,); what is asked for: (R, V) like x, (R,)
    if weight is None and (gradient or moment):
        raise ValueError("a gradient and its moment need a weight")
    slope: Tensor | None
    total: Tensor | None
    if serves(x.dtype, x.device):
        from chunked_embed.kernels import _triton_similarity_product as kernels

        loss, slope, total = kernels.cross_entropy(x, bank, target, weight, rows, columns, gradient, moment)
        return loss, slope, total if moment else None
    loss, slope, total = cross_entropy_reference(_outputs(x, bank), target, weight, rows=rows, columns=columns)
    return loss, slope.to(x.dtype) if gradient and slope is not None else None, total if moment else None


def linear_both_logsumexps(
    x: Tensor,  # (R, H)
    bank: Tensor,  # (V, H)
    target: Tensor,  # (R,) int64
    *,
    rows: Tensor,  # (R,)
    columns: Tensor | None = None,  # (V,), ones by default
) -> tuple[Tensor, Tensor, Tensor]:  # over columns (R,), over rows (V,), and the own score (R,)
    if serves(x.dtype, x.device):
        from chunked_embed.kernels import _triton_similarity_product as kernels

        return kernels.both_logsumexps(x, bank, target, rows, columns)
    outputs = _outputs(x, bank)
    own = outputs.gather(1, target[:, None])[:, 0] * rows
    lses = both_logsumexps_reference(outputs, rows=rows, columns=columns)
    return *lses, own if columns is None else own * columns[target]


def linear_both_gradients(
    x: Tensor,  # (R, H)
    bank: Tensor,  # (V, H)
    target: Tensor,  # (R,) int64
    lses: tuple[Tensor, Tensor],  # (R,) over columns, (V,) over rows, of this chunk or of all
    upstream: tuple[Tensor, Tensor, Tensor],  # of the two, and of the own score (R,)
    *,
    rows: Tensor,  # (R,)
    columns: Tensor | None = None,  # (V,), ones by default
    gradient: bool = True,
    moment: bool = False,
) -> tuple[Tensor | None, Tensor | None]:  # what is asked for: (R, V) like x, (R,)
    if serves(x.dtype, x.device):
        from chunked_embed.kernels import _triton_similarity_product as kernels

        return kernels.both_gradients(x, bank, target, lses, upstream, rows, columns, gradient, moment)
    slope, total = both_gradients_reference(_outputs(x, bank), target, lses, upstream, rows=rows, columns=columns)
    return slope.to(x.dtype) if gradient else None, total if moment else None


def _outputs(x: Tensor, bank: Tensor) -> Tensor:  # (R, V), float32; float64 of such
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.to(dtype) @ bank.to(dtype).t()
