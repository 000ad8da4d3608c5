"""Embedding losses on plain tensors, without a model. A projection ``weight (D, H)``, ``bias (D,)``, where one is
given, is applied to every side inside the chunk, followed by ``activation`` and, with ``normalize=True``, by an L2
normalisation. Everything is chunked: what is held is the embeddings, their gradients and O(N) scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .engine import FlexChunkLoss, Projection
from .engine.compile import outside_compile

Activation = Callable[[Tensor], Tensor]
Rows = dict[str, Tensor]


# --- pairwise similarities: (R, D), (R, D) -> (R,) -------------------------------------------------------------------


def inverse_norm(x: Tensor) -> Tensor:
    """(R,), with the floor of ``F.normalize``. It divides sums, not vectors: nothing of size (R, D) is left behind."""
    return 1 / torch.linalg.vector_norm(x, dim=1).clamp_min(1e-12)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1) * inverse_norm(a) * inverse_norm(b)


def angle_similarity(a: Tensor, b: Tensor) -> Tensor:
    """``|cos + sin|`` of unit vectors read as complex ones, i paired with i + D/2 (AnglE, arXiv 2309.12871)."""
    if a.shape[1] % 2:
        a, b = F.pad(a, (0, 1)), F.pad(b, (0, 1))
    a_re, a_im = a.chunk(2, dim=1)
    b_re, b_im = b.chunk(2, dim=1)
    both = ((a_re * b_re + a_im * b_im) + (a_im * b_re - a_re * b_im)).sum(1)  # cos + sin
    return (both * inverse_norm(a) * inverse_norm(b)).abs()


def dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1)


def negative_euclidean(a: Tensor, b: Tensor) -> Tensor:
    return -torch.linalg.vector_norm(a - b, dim=1)


def negative_manhattan(a: Tensor, b: Tensor) -> Tensor:
    return -(a - b).abs().sum(1)


SIMILARITIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": cosine,
    "angle": angle_similarity,
    "dot": dot,
    "euclidean": negative_euclidean,
    "manhattan": negative_manhattan,
}
DISTANCES = ("euclidean", "cosine", "manhattan")


# --- the losses as the engine sees them ------------------------------------------------------------------------------


class _Embedding(FlexChunkLoss):
    """Outputs are embeddings, behind an activation and a normalisation where the caller has those."""

    def __init__(self, activation: Activation | None = None, normalize: bool = False, **options: Any) -> None:
        super().__init__(**options)
        if activation is not None and not callable(activation):
            raise TypeError(f"expected activation to be callable, got {activation!r}")
        self.activation = activation
        self.normalize = bool(normalize)

    def embed(self, outputs: Tensor) -> Tensor:
        if self.activation is not None:
            outputs = self.activation(outputs)
        return F.normalize(outputs, dim=1) if self.normalize else outputs


class PairwiseScores(_Embedding):
    """The similarity of row i of ``a`` and row i of ``b``."""

    def __init__(self, similarity: str = "cosine", **options: Any) -> None:
        super().__init__(**options)
        self.similarity = _one_of("similarity", similarity, tuple(SIMILARITIES))
        self.static_widths = similarity == "angle"  # it cuts rows in half

    def score_fn(self, outputs: Rows, rows: Rows, hp: Any) -> Rows:
        return {"score": SIMILARITIES[self.similarity](self.embed(outputs["a"]), self.embed(outputs["b"]))}


class Triplet(_Embedding):
    """``relu(d(anchor, positive) - d(anchor, negative) + margin)``"""

    def __init__(self, margin: float = 5.0, distance: str = "euclidean", **options: Any) -> None:
        super().__init__(**options)
        self.margin = _finite("margin", margin)
        self.distance = _one_of("distance", distance, DISTANCES)

    def loss_fn(self, outputs: Rows, rows: Rows, hp: Any) -> Tensor:
        similarity = SIMILARITIES[self.distance]
        anchor = self.embed(outputs["anchor"])
        # A distance is a negated similarity, up to a constant that the difference loses.
        closer = similarity(anchor, self.embed(outputs["positive"]))
        farther = similarity(anchor, self.embed(outputs["negative"]))
        return F.relu(farther - closer + hp.margin)


@lru_cache(maxsize=64)
def _loss(kind: type[FlexChunkLoss], **options: Any) -> FlexChunkLoss:
    """A loss has no state: one instance serves every call with the same options."""
    return kind(**options)


# --- public functions ------------------------------------------------------------------------------------------------


@outside_compile
def pairwise_scores(
    a: Tensor,  # (N, H)
    b: Tensor,  # (N, H)
    *,
    similarity: str = "cosine",
    weight: Tensor | None = None,  # (D, H)
    bias: Tensor | None = None,  # (D,)
    activation: Activation | None = None,
    normalize: bool = False,
    chunk_size: int | None = None,
    max_chunk_bytes: int | None = None,
    compiled: bool = True,
) -> Tensor:  # (N,)
    """Similarity of each pair: "cosine", "angle", "dot", or a negated "euclidean" or "manhattan" distance.

    Differentiable in everything that requires grad; float32 (float64 for float64 inputs). Backward forms the chunks
    again, so that nothing but the scores is kept.

    Raises:
        ValueError: shapes or devices that differ, an unknown similarity.
        TypeError: mixed dtypes.
    """
    loss = _loss(
        PairwiseScores,
        similarity=similarity,
        activation=activation,
        normalize=normalize,
        chunk_size=chunk_size,
        max_chunk_bytes=max_chunk_bytes,
        compiled=compiled,
    )
    return loss.scores(_project({"a": a, "b": b}, weight, bias))["score"]


@outside_compile
def cosent(a: Tensor, b: Tensor, labels: Tensor, *, scale: float = 20.0, **options: Any) -> Tensor:
    """CoSENT: ``log(1 + sum over pairs with y_i < y_j of exp(s_i - s_j))`` with ``s = scale * cos(a, b)``.

    Exact in O(N log N) time and O(N) memory, ties and huge scores included. Source: J. Su, "CoSENT" (2022), as in
    ``sentence_transformers.losses.CoSENTLoss``.

    Args:
        a, b: ``(N, H)``, floating point.
        labels: ``(N,)``, real or integer; only their order counts.
        scale: the inverse temperature.
        options: ``weight``, ``bias``, ``activation``, ``normalize``, ``chunk_size``, ``max_chunk_bytes``, ``compiled``,
            as for :func:`pairwise_scores`.

    Returns:
        A scalar, float32 (float64 for float64 inputs).
    """
    return _ranked(a, b, labels, scale, "cosine", options)


@outside_compile
def angle(a: Tensor, b: Tensor, labels: Tensor, *, scale: float = 20.0, **options: Any) -> Tensor:
    """AnglE: CoSENT over the angle similarity. Source: Li and Li, "AnglE-optimized Text Embeddings", arXiv 2309.12871.

    Arguments as for :func:`cosent`.
    """
    return _ranked(a, b, labels, scale, "angle", options)


def _ranked(a: Tensor, b: Tensor, labels: Tensor, scale: float, similarity: str, options: dict[str, Any]) -> Tensor:
    scores = pairwise_scores(a, b, similarity=similarity, **options)
    return cosent_from_scores(scores, labels, scale=scale)


@outside_compile
def triplet(
    anchor: Tensor,  # (N, H)
    positive: Tensor,  # (N, H)
    negative: Tensor,  # (N, H)
    *,
    margin: float = 5.0,
    distance: str = "euclidean",
    weight: Tensor | None = None,  # (D, H)
    bias: Tensor | None = None,  # (D,)
    activation: Activation | None = None,
    normalize: bool = False,
    chunk_size: int | None = None,
    max_chunk_bytes: int | None = None,
    compiled: bool = True,
) -> Tensor:
    """``mean relu(d(anchor, positive) - d(anchor, negative) + margin)``, with a "euclidean", "cosine" (1 - cos) or
    "manhattan" distance. Source: Schroff et al., "FaceNet", arXiv 1503.03832.

    Raises:
        ValueError: shapes or devices that differ, an unknown distance, a margin that is not finite.
        TypeError: mixed dtypes.
    """
    loss = _loss(
        Triplet,
        margin=margin,
        distance=distance,
        activation=activation,
        normalize=normalize,
        chunk_size=chunk_size,
        max_chunk_bytes=max_chunk_bytes,
        compiled=compiled,
    )
    return loss(_project({"anchor": anchor, "positive": positive, "negative": negative}, weight, bias)).loss


@outside_compile
def cosent_from_scores(scores: Tensor, labels: Tensor, *, scale: float = 1.0) -> Tensor:
    """CoSENT of given scores: ``log(1 + sum over pairs with y_i < y_j of exp(s_i - s_j))`` with ``s = scale * scores``.

    Sorted by label, the double sum is one running logsumexp over the scores of strictly higher labels and one logsumexp
    over all; its gradient is analytic, so nothing is kept but itself. Sums run in float64.

    Args:
        scores: ``(N,)`` floating point.
        labels: ``(N,)``.
    """
    if scores.dim() != 1 or not scores.is_floating_point():
        raise ValueError(f"expected scores (N,) in floating point, got {tuple(scores.shape)} {scores.dtype}")
    _check_labels(labels, scores)
    if _finite("scale", scale) < 0:
        raise ValueError(f"expected scale to be at least 0, got {scale}: a negative one ranks the labels backwards")
    return _CoSENT.apply(scores, labels, float(scale))


class _CoSENT(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, labels: Tensor, scale: float) -> Tensor:
        n = len(scores)
        labels, order = (labels.byte() if labels.dtype == torch.bool else labels).sort()
        s = scores.detach().index_select(0, order).double() * scale
        # Ties count on neither side: from the first strictly higher label on, up to the last strictly lower one.
        higher = torch.searchsorted(labels, labels, right=True)
        above = _running_logsumexp(-s.flip(0)).index_select(0, n - higher)  # log sum exp(-s_j), y_j > y_i
        exponents = s + above
        loss = torch.logaddexp(exponents.logsumexp(0), s.new_zeros(()))
        if ctx.needs_input_grad[0]:
            lower = torch.searchsorted(labels, labels)
            below = _running_logsumexp(s).index_select(0, lower)  # log sum exp(s_j), y_j < y_i
            grad = (torch.exp(exponents - loss) - torch.exp(below - s - loss)) * scale
            ctx.save_for_backward(torch.empty_like(scores).index_copy_(0, order, grad.to(scores.dtype)))
        return loss if scores.dtype == torch.float64 else loss.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * grad_loss.to(grad.dtype), None, None


def _running_logsumexp(x: Tensor) -> Tensor:
    """(N + 1,): entry k is the logsumexp of the first k, -inf for none."""
    running = x.new_full((len(x) + 1,), -torch.inf)
    torch.logcumsumexp(x, 0, out=running[1:])
    return running


# --- arguments -------------------------------------------------------------------------------------------------------


def _project(sides: dict[str, Tensor], weight: Tensor | None, bias: Tensor | None) -> dict[str, Projection]:
    shapes = {name: tuple(side.shape) for name, side in sides.items()}
    if len(set(shapes.values())) > 1 or any(len(shape) != 2 for shape in shapes.values()):
        raise ValueError(f"expected embeddings of one shape (N, H), got {shapes}")
    dtypes = {name: side.dtype for name, side in sides.items()}
    if weight is None and len(set(dtypes.values())) > 1:
        raise TypeError(f"expected embeddings of one dtype, got {dtypes}")
    return {name: Projection(side, weight, bias) for name, side in sides.items()}


def _check_labels(labels: Tensor, rows: Tensor) -> None:
    if labels.shape != rows.shape[:1] or labels.device != rows.device or labels.is_complex():
        raise ValueError(
            f"expected one label per row, ({rows.shape[0]},) on {rows.device}, "
            f"got {tuple(labels.shape)} on {labels.device}"
        )
    if labels.is_floating_point() and bool(labels.isnan().any()):
        raise ValueError("expected labels without NaN")


def _finite(name: str, value: float) -> float:
    if isinstance(value, Tensor) or not math.isfinite(value):
        raise ValueError(f"expected {name} to be finite, got {value}")
    return float(value)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"expected {name} to be one of {list(allowed)}, got {value!r}")
    return value
