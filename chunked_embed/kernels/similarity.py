"""Steps on a chunk of a similarity matrix: softmax over its rows, over rows and columns at once, and sigmoid pairs.

With ``z = scale * x`` of outputs x ``(R, V)`` and the column ``t`` that is a row's own:

    cross_entropy_     lse_j z_j - z_t                                      and its gradient, in one kernel
    sigmoid_pairs_     sum_j softplus(z_j + bias) - (z_t + bias)            and its gradients, in one pass
    both_logsumexps    lse over columns (R,) and over rows (V,)             in one pass
    both_gradients_    the gradient of those, and of z_t

The sigmoid pairs have a scale and a bias for every row, so that both may learn.
All of it in float32. The `..._reference` functions are the same in plain torch: where Triton does not run, and float64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from chunked_embed.kernels import available


def cross_entropy_(
    x: Tensor,  # (R, V), contiguous columns; overwritten by its gradient unless `out` is given
    target: Tensor,  # (R,) int64
    weight: Tensor | None = None,  # (R,): the gradient is that of sum(weight * loss); None: no gradient
    *,
    scale: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:  # (R,)
    out = x if out is None else out
    if use_triton(x):
        from chunked_embed.kernels import _triton_similarity as kernels

        return kernels.cross_entropy_(x, target, weight, scale, out)
    loss, gradient = cross_entropy_reference(x, target, weight, scale=scale)
    if gradient is not None:
        out.copy_(gradient)
    return loss


def cross_entropy_reference(
    x: Tensor, target: Tensor, weight: Tensor | None = None, *, scale: float = 1.0
) -> tuple[Tensor, Tensor | None]:
    z = _wide(x) * scale
    loss = F.cross_entropy(z, target, reduction="none")
    if weight is None:
        return loss, None
    return loss, (z.softmax(1) - _own(z, target)) * (weight * scale)[:, None]


def sigmoid_pairs_(
    x: Tensor,  # (R, V), contiguous columns; overwritten by its gradient unless `out` is given
    target: Tensor,  # (R,) int64
    scale: Tensor,  # (R,)
    bias: Tensor,  # (R,)
    weight: Tensor | None = None,  # (R,): the gradients are those of sum(weight * loss); None: no gradients
    *,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # loss, gradient of scale, of bias, each (R,)
    out = x if out is None else out
    if use_triton(x):
        from chunked_embed.kernels import _triton_similarity as kernels

        return kernels.sigmoid_pairs_(x, target, scale, bias, weight, out)
    loss, gradient, g_scale, g_bias = sigmoid_pairs_reference(x, target, scale, bias, weight)
    if gradient is not None:
        out.copy_(gradient)
    return loss, g_scale, g_bias


def sigmoid_pairs_reference(
    x: Tensor, target: Tensor, scale: Tensor, bias: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    wide = _wide(x)
    z = wide * scale[:, None] + bias[:, None]
    own = _own(z, target)
    loss = (F.softplus(z) - own * z).sum(1)
    if weight is None:
        return loss, None, torch.zeros_like(loss), torch.zeros_like(loss)
    slope = (z.sigmoid() - own) * weight[:, None]
    return loss, slope * scale[:, None], (slope * wide).sum(1), slope.sum(1)


def both_logsumexps(x: Tensor, *, scale: float = 1.0) -> tuple[Tensor, Tensor]:  # (R,), (V,)
    if use_triton(x):
        from chunked_embed.kernels import _triton_similarity as kernels

        return kernels.both_logsumexps(x, scale)
    return both_logsumexps_reference(x, scale=scale)


def both_logsumexps_reference(x: Tensor, *, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    z = _wide(x) * scale
    return z.logsumexp(1), z.logsumexp(0)


def both_gradients_(
    x: Tensor,  # (R, V), contiguous columns; overwritten by its gradient unless `out` is given
    target: Tensor,  # (R,) int64
    lses: tuple[Tensor, Tensor],  # (R,) over columns, (V,) over rows, of this chunk or of all
    upstream: tuple[Tensor, Tensor, Tensor],  # of the two, and of the own output z_t (R,)
    *,
    scale: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    out = x if out is None else out
    if use_triton(x):
        from chunked_embed.kernels import _triton_similarity as kernels

        kernels.both_gradients_(x, target, lses, upstream, scale, out)
        return out
    return out.copy_(both_gradients_reference(x, target, lses, upstream, scale=scale))


def both_gradients_reference(
    x: Tensor,
    target: Tensor,
    lses: tuple[Tensor, Tensor],
    upstream: tuple[Tensor, Tensor, Tensor],
    *,
    scale: float = 1.0,
) -> Tensor:
    z = _wide(x) * scale
    g_row, g_column, g_own = upstream
    softmaxes = g_row[:, None] * (z - lses[0][:, None]).exp() + g_column * (z - lses[1]).exp()
    return (softmaxes + _own(z, target) * g_own[:, None]) * scale


def use_triton(x: Tensor) -> bool:
    return x.dtype != torch.float64 and x.stride(1) == 1 and available(x.device)


def _own(z: Tensor, target: Tensor) -> Tensor:
    return (torch.arange(z.shape[1], device=z.device) == target[:, None]).to(z.dtype)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
