"""Similarities of row i of one side and row i of another, and their gradients.

With ``t = sum_j a_j B(b)_j``, where B is the identity ("cosine", "dot"), or for "angle" reads a row as complex numbers,
i paired with i + D/2, and ``1/|x|`` with a floor on the norm::

    score    t, t / (|a| |b|), or |t| / (|a| |b|)
    grad_a   across * B(b) - along_a * a          across = sign / (|a| |b|)
    grad_b   across * B^T(a) - along_b * b        along_x = score / |x|^2, 0 where the norm is at its floor

The factors are kept from the first pass to the second, three numbers a row (a dot product has none): with them the
gradient reduces nothing, and reads and writes each element once. All of it in float32, or float64 for that.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from chunked_embed.kernels import available
from chunked_embed.kernels.norms import FLOOR

SIMILARITIES = ("cosine", "angle", "dot")


Factors = Tensor | None


def pair_scores(  # -> scores (N,), and factors (3, N)
    a: Tensor,  # (N, D)
    b: Tensor,  # (N, D)
    similarity: str,
    floor: float = FLOOR,  # of norms
) -> tuple[Tensor, Factors]:
    if use_triton(a, b):
        from chunked_embed.kernels import _triton_pairwise as kernels

        return kernels.pair_scores(a, b, similarity, floor)
    return pair_scores_reference(a, b, similarity, floor)


def pair_scores_reference(a: Tensor, b: Tensor, similarity: str, floor: float = FLOOR) -> tuple[Tensor, Factors]:
    a, b = _wide(a), _wide(b)
    t = (a * (_turned(b, -1) if similarity == "angle" else b)).sum(1)
    if similarity == "dot":
        return t, None
    norms = [torch.linalg.vector_norm(x, dim=1) for x in (a, b)]
    of_a, of_b = (1 / norm.clamp_min(floor) for norm in norms)
    across = of_a * of_b
    scores = t * across
    if similarity == "angle":
        scores, across = scores.abs(), across * t.sign()
    along = [torch.where(norm >= floor, scores * one * one, 0.0) for norm, one in zip(norms, (of_a, of_b))]
    return scores, torch.stack((across, *along))


def pair_gradients_(
    a: Tensor,  # (N, D)
    b: Tensor,  # (N, D)
    factors: Factors,  # (3, N)
    upstream: Tensor,  # (N,)
    similarity: str,
    out_a: Tensor | None,  # (N, D), may be a; None: not wanted
    out_b: Tensor | None,  # (N, D), may be b
) -> None:
    if use_triton(a, b):
        from chunked_embed.kernels import _triton_pairwise as kernels

        kernels.pair_gradients_(a, b, factors, upstream, similarity, out_a, out_b)
        return
    for out, grad in zip((out_a, out_b), pair_gradients_reference(a, b, factors, upstream, similarity)):
        if out is not None:
            out.copy_(grad)


def pair_gradients_reference(
    a: Tensor, b: Tensor, factors: Factors, upstream: Tensor, similarity: str
) -> tuple[Tensor, Tensor]:
    a, b = _wide(a), _wide(b)
    turned_a, turned_b = (_turned(a, 1), _turned(b, -1)) if similarity == "angle" else (a, b)
    if factors is None:
        return upstream[:, None] * turned_b, upstream[:, None] * turned_a
    across, along_a, along_b = (factors * upstream)[:, :, None]
    return across * turned_b - along_a * a, across * turned_a - along_b * b


def summed_gradients(  # -> (D,), (D,)
    a: Tensor, b: Tensor, factors: Factors, upstream: Tensor, similarity: str
) -> tuple[Tensor, Tensor]:
    """The gradients summed over rows, as of a bias: by products of vectors, from which nothing is rounded before."""
    a, b = _wide(a), _wide(b)
    across = upstream if factors is None else upstream * factors[0]
    of_a, of_b = across @ b, across @ a
    if similarity == "angle":
        of_a, of_b = _turned(of_a[None], -1)[0], _turned(of_b[None], 1)[0]
    if factors is None:
        return of_a, of_b
    return of_a - (upstream * factors[1]) @ a, of_b - (upstream * factors[2]) @ b


def use_triton(a: Tensor, b: Tensor) -> bool:
    return torch.float64 not in (a.dtype, b.dtype) and available(a.device)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _turned(x: Tensor, sign: int) -> Tensor:
    """``(re + sign im, im - sign re)``; the last of an odd width has no other half."""
    width = x.shape[1]
    re, im = F.pad(x, (0, width % 2)).chunk(2, dim=1)
    return torch.cat((re + sign * im, im - sign * re), dim=1)[:, :width]
