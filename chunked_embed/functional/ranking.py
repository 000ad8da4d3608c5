"""CoSENT and AnglE: order pairs by their labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import checks
from ..checks import NOT_NEGATIVE
from ..engine.compile import outside_compile
from ..kernels.ranking import cosent as double_sum
from .arguments import check_labels
from .pairwise import pairwise_scores


@outside_compile
def cosent(a: Tensor, b: Tensor, labels: Tensor, *, scale: float | Tensor = 20.0, **options: Any) -> Tensor:
    """CoSENT: ``log(1 + sum over pairs with y_i < y_j of exp(s_i - s_j))`` with ``s = scale * cos(a, b)``.

    Exact in O(N log N) time and O(N) memory, ties and huge scores included. Source: J. Su, "CoSENT" (2022), as in
    ``sentence_transformers.losses.CoSENTLoss``.

    Args:
        a, b: ``(N, H)``, floating point.
        labels: ``(N,)``, real or integer; only their order counts.
        scale: the inverse temperature, zero or more; a tensor of one may require grad.
        options: ``weight``, ``bias``, ``activation``, ``normalize``, ``chunk_size``, ``max_chunk_bytes``, ``compiled``,
            ``float32_outputs``, as for :func:`pairwise_scores`.

    Returns:
        A scalar, float32 (float64 for float64 inputs).

    Example:
        >>> import torch
        >>> from chunked_embed import functional as CF
        >>> a, b = (torch.randn(8, 16, requires_grad=True) for _ in range(2))
        >>> dense = torch.nn.Linear(16, 4)  # runs on a chunk of rows at a time
        >>> CF.cosent(a, b, torch.rand(8), weight=dense.weight, bias=dense.bias).backward()
        >>> dense.weight.grad.shape
        torch.Size([4, 16])
    """
    return _ranked(a, b, labels, scale, "cosine", options)


@outside_compile
def angle(a: Tensor, b: Tensor, labels: Tensor, *, scale: float | Tensor = 20.0, **options: Any) -> Tensor:
    """AnglE: CoSENT over the angle similarity. Source: Li and Li, "AnglE-optimized Text Embeddings", arXiv 2309.12871.

    Arguments as for :func:`cosent`.

    Example:
        >>> import torch
        >>> from chunked_embed import functional as CF
        >>> a, b = (torch.randn(8, 16, requires_grad=True) for _ in range(2))
        >>> CF.angle(a, b, torch.rand(8), scale=20.0).backward()
    """
    return _ranked(a, b, labels, scale, "angle", options)


def _ranked(
    a: Tensor, b: Tensor, labels: Tensor, scale: float | Tensor, similarity: str, options: dict[str, Any]
) -> Tensor:
    scores = pairwise_scores(a, b, similarity=similarity, **options)
    return cosent_from_scores(scores, labels, scale=scale)


@outside_compile
def cosent_from_scores(scores: Tensor, labels: Tensor, *, scale: float | Tensor = 1.0) -> Tensor:
    """CoSENT of given scores: ``log(1 + sum over pairs with y_i < y_j of exp(s_i - s_j))`` with ``s = scale * scores``.

    Sorted by label, the double sum is one running logsumexp over the scores of strictly higher labels and one logsumexp
    over all; its gradient is analytic, so nothing is kept but itself. Sums run in float64.

    Args:
        scores: ``(N,)`` floating point.
        labels: ``(N,)``, real or integer, without NaN.
        scale: a factor on the scores, as for :func:`cosent`.

    Example:
        >>> import torch
        >>> from chunked_embed import functional as CF
        >>> scores = torch.tensor([0.9, 0.2, 0.6])
        >>> CF.cosent_from_scores(scores, torch.tensor([2, 0, 1]), scale=20.0)  # in order, far apart: almost nothing
        tensor(0.0028)
        >>> CF.cosent_from_scores(scores, torch.tensor([0, 2, 1]), scale=20.0)  # in reverse
        tensor(14.0028)
    """
    checks.tensor("scores", scores, ("N",), kind="floating")
    check_labels(labels, scores)
    factor = checks.scalar("scale", scale, NOT_NEGATIVE)  # a negative one would rank the labels backwards
    if isinstance(factor, Tensor):
        scores, factor = scores * factor.to(scores.device, scores.dtype), 1.0
    ordered, order = (labels.byte() if labels.dtype == torch.bool else labels.detach()).sort()
    return _CoSENT.apply(scores, ordered, order, factor)


class _CoSENT(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, labels: Tensor, order: Tensor, scale: float) -> Tensor:
        loss, grad = double_sum(scores.detach(), labels, order, scale, gradient=ctx.needs_input_grad[0])
        if grad is not None:
            ctx.save_for_backward(grad)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * grad_loss.to(grad.dtype), None, None, None
