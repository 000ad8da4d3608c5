"""What the losses over aligned rows share: which functions run fused, how any other one runs, labels by row."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from chunked_embed import checks
from chunked_embed import functional as CF
from chunked_embed.functional.arguments import widened
from chunked_embed.losses._base import ChunkedLoss
from chunked_embed.losses._compat import SiameseDistanceMetric, TripletDistanceMetric, util

# By id: the library's own functions live as long as it does, and a user's callable need not have a hash.
_SIMILARITIES = {
    id(util.pairwise_cos_sim): "cosine",
    id(util.pairwise_angle_sim): "angle",
    id(util.pairwise_dot_score): "dot",
    id(util.pairwise_euclidean_sim): "euclidean",
    id(util.pairwise_manhattan_sim): "manhattan",
}
_TRIPLET_DISTANCES = {
    id(TripletDistanceMetric.EUCLIDEAN): "euclidean",
    id(TripletDistanceMetric.COSINE): "cosine",
    id(TripletDistanceMetric.MANHATTAN): "manhattan",
}
_SIAMESE_DISTANCES = {
    id(SiameseDistanceMetric.EUCLIDEAN): "euclidean",
    id(SiameseDistanceMetric.COSINE_DISTANCE): "cosine",
    id(SiameseDistanceMetric.MANHATTAN): "manhattan",
}
# The eps of torch.cosine_similarity and F.pairwise_distance, which SiameseDistanceMetric is made of.
COSINE_EPS, DISTANCE_EPS = 1e-8, 1e-6


def known_similarity(function: object) -> str | None:
    """The name by which ``CF.pairwise_scores`` has a similarity of ``sentence_transformers.util``."""
    return _SIMILARITIES.get(id(function))


def known_triplet_distance(function: object) -> str | None:
    return _TRIPLET_DISTANCES.get(id(function))


def known_siamese_distance(function: object) -> str | None:
    return _SIAMESE_DISTANCES.get(id(function))


def plain_scores(name: str, function: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:  # (N,)
    """What a callable of the user's own says about each pair, by ordinary autograd."""
    scores = function(a, b)
    if scores.shape != a.shape[:1]:
        raise ValueError(
            f"expected {name} to return one score for each pair, {tuple(a.shape[:1])}, got {tuple(scores.shape)}"
        )
    return widened(scores)


class AlignedLoss(ChunkedLoss):
    """A loss over pairs of aligned rows: checks of its columns and labels."""

    def _labels(self, labels: Tensor | None) -> Tensor:
        if labels is None:
            raise ValueError(f"{type(self).__name__} requires labels, got None")
        checks.tensor("labels", labels, kind="real")
        if labels.is_floating_point() or labels.is_cuda:
            self._without_nan(labels)
        elif labels.dtype is torch.bool:
            labels = labels.int()
        return labels.detach() if labels.requires_grad else labels

    def _row_labels(self, labels: Tensor | None, rows: int) -> Tensor:  # (N,)
        labels = self._labels(labels)
        if labels.numel() != rows:
            raise ValueError(
                f"{type(self).__name__} expects {rows} labels (one for each pair), got {labels.numel()} in a tensor "
                f"of shape {tuple(labels.shape)}"
            )
        return labels if labels.ndim == 1 else labels.reshape(-1)

    def _two_columns(self, embeddings: list[Tensor]) -> tuple[Tensor, Tensor]:
        if len(embeddings) < 2:
            raise ValueError(f"{type(self).__name__} expects two columns of embeddings, got {len(embeddings)}")
        return embeddings[0], embeddings[1]

    def _known_scores(
        self,
        a: Tensor,  # (N, H)
        b: Tensor | list[Tensor],
        similarity: str,
        projection: dict[str, Any],
        eps: float | None = None,
    ) -> Tensor:  # (N,), or (N, K)
        """Of a similarity that the engine knows, fused and chunked."""
        options = {**projection, **self._chunking.keywords}
        return CF.pairwise_scores(a, b, similarity=similarity, eps=eps, **options)


class SimilarityLoss(AlignedLoss):
    """Such a loss on ``self.similarity_fct``."""

    similarity_fct: Callable[[Tensor, Tensor], Tensor]

    @property
    def _similarity(self) -> str | None:
        return _SIMILARITIES.get(id(self.similarity_fct))

    @property
    def _fusable(self) -> bool:
        return self._similarity is not None

    @property
    def _normalizes(self) -> bool:
        return self._similarity in ("cosine", "angle")

    def _candidate_scores(self, a: Tensor, candidates: list[Tensor], projection: dict[str, Any]) -> Tensor:  # (N, K)
        if self._similarity:
            return self._known_scores(a, candidates, self._similarity, projection)
        return torch.stack([plain_scores("similarity_fct", self.similarity_fct, a, b) for b in candidates], dim=1)


class SiameseLoss(AlignedLoss):
    """Such a loss on ``self.distance_metric``."""

    distance_metric: Callable[[Tensor, Tensor], Tensor]
    _others: str  # what becomes of pairs with other labels than 0 and 1

    @property
    def _fusable(self) -> bool:
        return known_siamese_distance(self.distance_metric) is not None

    def _distances(self, a: Tensor, b: Tensor, projection: dict[str, Any]) -> Tensor:  # (N,)
        name = known_siamese_distance(self.distance_metric)
        if name is None:
            return plain_scores("distance_metric", self.distance_metric, a, b)
        eps = COSINE_EPS if name == "cosine" else DISTANCE_EPS
        scores = self._known_scores(a, b, name, projection, eps)
        return 1 - scores if name == "cosine" else -scores

    def _for_library(self, columns: list[Tensor], labels: Tensor | None) -> Tensor:
        labels = self._row_labels(labels, columns[0].shape[0])
        self._warn_unless_binary(labels)
        return labels

    def _warn_unless_binary(self, labels: Tensor) -> None:
        """Once, since it waits for the device."""
        if vars(self).get("_checked_labels"):
            return
        self._checked_labels = True
        if bool(((labels != 0) & (labels != 1)).any()):
            warnings.warn(f"{type(self).__name__} got labels other than 0 and 1: {self._others}", stacklevel=4)
