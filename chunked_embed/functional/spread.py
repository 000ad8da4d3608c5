"""Global orthogonal regularisation: embeddings spread over the sphere like random directions."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..engine.autograd import once_only
from ..engine.compile import outside_compile
from ..engine.types import accumulator_dtype
from .arguments import check_embeddings

BLOCK = 2**22
"""Numbers of a block of rows: what is converted and normalised at a time."""


class OrthogonalTerms(NamedTuple):
    """Scalars, float32 (float64 for float64 inputs).

    Example:
        >>> import torch
        >>> from chunked_embed import functional as CF
        >>> terms = CF.OrthogonalTerms(mean=torch.tensor(0.1), second_moment=torch.tensor(0.02))
        >>> terms.mean + terms.second_moment
        tensor(0.1200)
    """

    mean: Tensor
    second_moment: Tensor


class Moments(NamedTuple):
    """Of N rows u, in float64. They add up over blocks of rows, and over processes."""

    total: Tensor  # (D,) sum of u
    gram: Tensor  # (D, D) sum of u u^T
    squares: Tensor  # () sum of |u|^2
    fourths: Tensor  # () sum of |u|^4


class _Moments(torch.autograd.Function):
    """Moments of rows, normalised or not, a block of rows at a time in both directions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, normalize: bool) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x)
        ctx.normalize = normalize
        n, d = x.shape
        # Similarities of a row to itself are summed along and taken off again. In a few rows they outweigh the rest.
        ctx.dtype = torch.float64 if n <= d else accumulator_dtype(x.dtype)
        sums = [torch.zeros(shape, dtype=ctx.dtype, device=x.device) for shape in ((d,), (d, d))]
        norms = []
        for block in _blocks(x):
            u, _ = _unit(block, ctx)
            sums[0] += u.sum(0)
            sums[1].addmm_(u.t(), u)
            norms.append((u * u).sum(1).double())
        squared = torch.cat(norms)
        return sums[0].double(), sums[1].double(), squared.sum(), (squared * squared).sum()

    @staticmethod
    @once_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        total, gram, squares, fourths = (grad.to(ctx.dtype) for grad in grads)
        gram = gram + gram.t()
        result = torch.empty_like(x)
        for block, out in zip(_blocks(x), _blocks(result)):
            u, length = _unit(block, ctx)
            squared = (u * u).sum(1, keepdim=True)
            grad = torch.addmm(total, u, gram) + (2 * squares + 4 * fourths * squared) * u
            if ctx.normalize:  # the floor of F.normalize has no gradient
                along = torch.where(length > 1e-12, (u * grad).sum(1, keepdim=True), 0.0)
                grad = (grad - along * u) / length.clamp_min(1e-12)
            out.copy_(grad)
        return result, None


def _blocks(x: Tensor) -> tuple[Tensor, ...]:
    return x.split(max(BLOCK // x.shape[1], 1))


def _unit(block: Tensor, ctx: Any) -> tuple[Tensor, Tensor]:
    u = block.to(ctx.dtype)
    length = torch.linalg.vector_norm(u, dim=1, keepdim=True)
    return (u / length.clamp_min(1e-12) if ctx.normalize else u), length


def moments(embeddings: Tensor, similarity: str) -> Moments:
    with torch.autocast(embeddings.device.type, enabled=False):
        return Moments(*_Moments.apply(embeddings, similarity == "cosine"))


def terms(of: Moments, rows: int, dtype: torch.dtype) -> OrthogonalTerms:
    """From the moments of ``rows`` rows."""
    total, squares = of.total @ of.total - of.squares, (of.gram * of.gram).sum() - of.fourths
    return _terms(total, squares, rows, len(of.total), dtype)


def terms_of_matrix(similarities: Tensor, width: int, dtype: torch.dtype) -> OrthogonalTerms:
    """From all similarities, (N, N), of rows of some width."""
    n = len(similarities)
    itself = torch.eye(n, dtype=torch.bool, device=similarities.device)
    others = similarities.masked_fill(itself, 0.0)
    return _terms(others.sum(), others.square().sum(), n, width, dtype)


def _terms(total: Tensor, squares: Tensor, rows: int, width: int, dtype: torch.dtype) -> OrthogonalTerms:
    share = 1 / (rows * (rows - 1)) if rows > 1 else 0.0  # one row has no pairs, and what is left of it is rounding
    return OrthogonalTerms((total * share).square().to(dtype), F.relu(squares * share - 1 / width).to(dtype))


@outside_compile
def orthogonal_regularization(
    embeddings: Tensor,  # (N, D)
    *,
    similarity: str = "cosine",
) -> OrthogonalTerms:
    """Two terms over the similarities of all pairs of different rows: the square of their mean, and how far the mean of
    their squares is above ``1 / D``, which is that of random directions. One row has no pairs: zeros.

    The sum of all similarities is ``|sum of u|^2``, that of their squares ``|U^T U|_F^2``: O(N D^2) time and O(D^2)
    memory beyond the embeddings and their gradient, no similarity is ever formed.

    Source: Zhang et al., "Learning Spread-out Local Feature Descriptors", arXiv 1708.06320, as in
    ``sentence_transformers.losses.GlobalOrthogonalRegularizationLoss``.

    Args:
        embeddings: floating point.
        similarity: "cosine" or "dot".

    Returns:
        ``OrthogonalTerms(mean, second_moment)``.

    Raises:
        ValueError: a shape other than (N, D), an unknown similarity.
        TypeError: embeddings that are not floating point.

    Example:
        >>> import torch
        >>> from chunked_embed import functional as CF
        >>> CF.orthogonal_regularization(torch.eye(4))  # at right angles: nothing to pay
        OrthogonalTerms(mean=tensor(0.), second_moment=tensor(0.))
        >>> CF.orthogonal_regularization(torch.ones(4, 4))  # all alike: 1, and 1 - 1/4
        OrthogonalTerms(mean=tensor(1.), second_moment=tensor(0.7500))
    """
    check_embeddings({"embeddings": embeddings})
    checks.choice("similarity", similarity, ("cosine", "dot"))
    return terms(moments(embeddings, similarity), len(embeddings), accumulator_dtype(embeddings.dtype))
