"""Losses over aligned rows: the similarity of row i of one side and row i of another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.compile import outside_compile
from .arguments import Activation, Embedding, Rows, finite, one_of, project, shared

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


class PairwiseScores(Embedding):
    """The similarity of row i of ``a`` and row i of ``b``."""

    def __init__(self, similarity: str = "cosine", **options: Any) -> None:
        super().__init__(**options)
        self.similarity = one_of("similarity", similarity, tuple(SIMILARITIES))
        self.static_widths = similarity == "angle"  # it cuts rows in half

    def score_fn(self, outputs: Rows, rows: Rows, hp: Any) -> Rows:
        return {"score": SIMILARITIES[self.similarity](self.embed(outputs["a"]), self.embed(outputs["b"]))}


class Triplet(Embedding):
    """``relu(d(anchor, positive) - d(anchor, negative) + margin)``"""

    def __init__(self, margin: float = 5.0, distance: str = "euclidean", **options: Any) -> None:
        super().__init__(**options)
        self.margin = finite("margin", margin)
        self.distance = one_of("distance", distance, DISTANCES)

    def loss_fn(self, outputs: Rows, rows: Rows, hp: Any) -> Tensor:
        similarity = SIMILARITIES[self.distance]
        anchor = self.embed(outputs["anchor"])
        # A distance is a negated similarity, up to a constant that the difference loses.
        closer = similarity(anchor, self.embed(outputs["positive"]))
        farther = similarity(anchor, self.embed(outputs["negative"]))
        return F.relu(farther - closer + hp.margin)


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
    loss = shared(
        PairwiseScores,
        similarity=similarity,
        activation=activation,
        normalize=normalize,
        chunk_size=chunk_size,
        max_chunk_bytes=max_chunk_bytes,
        compiled=compiled,
    )
    return loss.scores(project({"a": a, "b": b}, weight, bias))["score"]


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
    loss = shared(
        Triplet,
        margin=margin,
        distance=distance,
        activation=activation,
        normalize=normalize,
        chunk_size=chunk_size,
        max_chunk_bytes=max_chunk_bytes,
        compiled=compiled,
    )
    return loss(project({"anchor": anchor, "positive": positive, "negative": negative}, weight, bias)).loss
