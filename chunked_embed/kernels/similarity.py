"""Steps on a chunk of a similarity matrix: softmax over its rows, over rows and columns at once, and sigmoid pairs.

With ``z_ij = (x_ij * columns_j) * rows_i`` of outputs x ``(R, V)``, where the factors are a scale and inverse norms,
and the column ``t`` that is a row's own:

    cross_entropy_     lse_j z_j - z_t                                      and its gradient, in one kernel
    sigmoid_pairs_     sum_j softplus(z_j) - z_t, of scale * z + bias       and its gradients, in one pass
    both_logsumexps    lse over columns (R,) and over rows (V,)             in one pass
    both_gradients_    the gradient of those, and of z_t

The gradients are those of x, factors included. A `moment` is ``sum_j dL/dz_j z_j`` of a row: what a scale learns from.
The sigmoid pairs have a scale and a bias for every row, so that both may learn.

All of it in float32. A gradient goes over x, or into `out`: any other tensor, or the first half of x's own rows, where
the gradient is narrower than the outputs. The `..._reference` functions are the same in plain torch: where Triton does
not run, and float64.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from chunked_embed.kernels import available, in_own_rows


def cross_entropy_(
    x: Tensor,  # (R, V), contiguous columns; overwritten by its gradient unless `out` is given
    target: Tensor,  # (R,) int64
    weight: Tensor | None = None,  # (R,): the gradient is that of sum(weight * loss); None: no gradient
    *,
    rows: Tensor,  # (R,)
    columns: Tensor | None = None,  # (V,), ones by default
    moment: bool = False,
    out: Tensor | None = None,
) -> Any:  # loss (R,); or loss and moment, each (R,)
    if moment and weight is None:
        raise ValueError("a moment is one of the gradient, which needs a weight")
    out = _place(x, out)
    total: Tensor | None
    if use_triton(x):
        from chunked_embed.kernels import _triton_similarity as kernels

        loss, total = kernels.cross_entropy_(x, target, weight, rows, columns, moment, out)
    else:
        loss, gradient, total = cross_entropy_reference(x, target, weight, rows=rows, columns=columns)
        if gradient is not None:
            out.copy_(gradient)
    return (loss, total) if moment else loss


def cross_entropy_reference(
    x: Tensor, target: Tensor, weight: Tensor | None = None, *, rows: Tensor, columns: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # loss, gradient, moment
    z = _scores(x, rows, columns)
    loss = F.cross_entropy(z, target, reduction="none")
    if weight is None:
        return loss, None, None
    # The row sums to zero, and the target is what the others leave: p - 1 has no digits where p is close to 1.
    own = target[:, None]
    slope = z.softmax(1).scatter(1, own, 0.0)
    weight = weight.to(z.dtype)
    moment = (slope * (z - z.gather(1, own))).sum(1) * weight
    slope = slope.scatter(1, own, -slope.sum(1, keepdim=True))
    return loss, _pulled(slope * weight[:, None], rows, columns), moment


def sigmoid_pairs_(
    x: Tensor,  # (R, V), contiguous columns; overwritten by its gradient unless `out` is given
    target: Tensor,  # (R,) int64
    scale: Tensor,  # (R,)
    bias: Tensor,  # (R,)
    weight: Tensor | None = None,  # (R,): the gradients are those of sum(weight * loss); None: no gradients
    *,
    rows: Tensor | None = None,  # (R,), ones by default
    columns: Tensor | None = None,  # (V,), ones by default
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # loss, gradient of scale, of bias, each (R,)
    out = _place(x, out)
    if use_triton(x):
        from chunked_embed.kernels import _triton_similarity as kernels

        return kernels.sigmoid_pairs_(x, target, scale, bias, weight, rows, columns, out)
    loss, gradient, g_scale, g_bias = sigmoid_pairs_reference(
        x, target, scale, bias, weight, rows=rows, columns=columns
    )
    if gradient is not None:
        out.copy_(gradient)
    return loss, g_scale, g_bias


def sigmoid_pairs_reference(
    x: Tensor,
    target: Tensor,
    scale: Tensor,
    bias: Tensor,
    weight: Tensor | None = None,
    *,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    y = _scores(x, rows, columns)
    scale, bias = scale.to(y.dtype), bias.to(y.dtype)
    sign = 1 - 2 * (torch.arange(x.shape[1], device=x.device) == target[:, None]).to(y.dtype)
    z = sign * (y * scale[:, None] + bias[:, None])
    loss = F.softplus(z).sum(1)
    if weight is None:
        return loss, None, torch.zeros_like(loss), torch.zeros_like(loss)
    slope = sign * z.sigmoid() * weight.to(y.dtype)[:, None]
    return loss, _pulled(slope * scale[:, None], rows, columns), (slope * y).sum(1), slope.sum(1)


def both_logsumexps(x: Tensor, *, rows: Tensor, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:  # (R,), (V,)
    if use_triton(x):
        from chunked_embed.kernels import _triton_similarity as kernels

        return kernels.both_logsumexps(x, rows, columns)
    return both_logsumexps_reference(x, rows=rows, columns=columns)


def both_logsumexps_reference(x: Tensor, *, rows: Tensor, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
    z = _scores(x, rows, columns)
    return z.logsumexp(1), z.logsumexp(0)


def both_gradients_(
    x: Tensor,  # (R, V), contiguous columns; overwritten by its gradient unless `out` is given
    target: Tensor,  # (R,) int64
    lses: tuple[Tensor, Tensor],  # (R,) over columns, (V,) over rows, of this chunk or of all
    upstream: tuple[Tensor, Tensor, Tensor],  # of the two, and of the own output z_t (R,)
    *,
    rows: Tensor,  # (R,)
    columns: Tensor | None = None,  # (V,), ones by default
    moment: bool = False,
    out: Tensor | None = None,
) -> Any:  # out; or out and the moment (R,)
    out = _place(x, out)
    if use_triton(x):
        from chunked_embed.kernels import _triton_similarity as kernels

        total = kernels.both_gradients_(x, target, lses, upstream, rows, columns, moment, out)
    else:
        gradient, total = both_gradients_reference(x, target, lses, upstream, rows=rows, columns=columns)
        out.copy_(gradient)
    return (out, total) if moment else out


def both_gradients_reference(
    x: Tensor,
    target: Tensor,
    lses: tuple[Tensor, Tensor],
    upstream: tuple[Tensor, Tensor, Tensor],
    *,
    rows: Tensor,
    columns: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # gradient, moment
    z = _scores(x, rows, columns)
    over_columns, over_rows, g_row, g_column, g_own = (t.to(z.dtype) for t in (*lses, *upstream))
    slope = g_row[:, None] * (z - over_columns[:, None]).exp() + g_column * (z - over_rows).exp()
    slope = slope.scatter_add(1, target[:, None], g_own[:, None])
    return _pulled(slope, rows, columns), (slope * z).sum(1)


def use_triton(x: Tensor) -> bool:
    return x.dtype != torch.float64 and x.stride(1) == 1 and available(x.device)


def _place(x: Tensor, out: Tensor | None) -> Tensor:
    if out is None:
        return x
    in_own_rows(x, out)  # refuses one at the address of x that is not
    return out


def _scores(x: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    z = x if x.dtype == torch.float64 else x.float()
    return _pulled(z, rows, columns)


def _pulled(grad: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """Multiplied by the factors: outputs into scores, and gradients of scores into those of outputs."""
    grad = grad if columns is None else grad * columns.to(grad.dtype)
    return grad if rows is None else grad * rows.to(grad.dtype)[:, None]
