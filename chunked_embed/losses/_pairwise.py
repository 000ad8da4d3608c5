"""What the losses over aligned rows share: which functions run fused, how any other one runs, labels by row."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from chunked_embed import checks
from chunked_embed import functional as CF
from chunked_embed.functional.arguments import widened
from chunked_embed.losses._base import ChunkedLoss
from chunked_embed.losses._compat import SiameseDistanceMetric, TripletDistanceMetric, util

_SIMILARITIES = (
    (util.pairwise_cos_sim, "cosine"),
    (util.pairwise_angle_sim, "angle"),
    (util.pairwise_dot_score, "dot"),
    (util.pairwise_euclidean_sim, "euclidean"),
    (util.pairwise_manhattan_sim, "manhattan"),
)
_TRIPLET_DISTANCES = (
    (TripletDistanceMetric.EUCLIDEAN, "euclidean"),
    (TripletDistanceMetric.COSINE, "cosine"),
    (TripletDistanceMetric.MANHATTAN, "manhattan"),
)
_SIAMESE_DISTANCES = (
    (SiameseDistanceMetric.EUCLIDEAN, "euclidean"),
    (SiameseDistanceMetric.COSINE_DISTANCE, "cosine"),
    (SiameseDistanceMetric.MANHATTAN, "manhattan"),
)
# The eps of torch.cosine_similarity and F.pairwise_distance, which SiameseDistanceMetric is made of.
COSINE_EPS, DISTANCE_EPS = 1e-8, 1e-6


def _known(function: object, table: Sequence[tuple[object, str]]) -> str | None:
    return next((name for candidate, name in table if candidate is function), None)


def known_similarity(function: object) -> str | None:
    """The name by which ``CF.pairwise_scores`` has a similarity of ``sentence_transformers.util``."""
    return _known(function, _SIMILARITIES)


def known_triplet_distance(function: object) -> str | None:
    return _known(function, _TRIPLET_DISTANCES)


def known_siamese_distance(function: object) -> str | None:
    return _known(function, _SIAMESE_DISTANCES)


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
        if labels.is_floating_point() and bool(labels.isnan().any()):
            raise ValueError(f"{type(self).__name__} expects labels without NaN")
        return labels.detach().int() if labels.dtype == torch.bool else labels.detach()

    def _row_labels(self, labels: Tensor | None, rows: int) -> Tensor:  # (N,)
        labels = self._labels(labels)
        if labels.numel() != rows:
            raise ValueError(
                f"{type(self).__name__} expects {rows} labels (one for each pair), got {labels.numel()} in a tensor "
                f"of shape {tuple(labels.shape)}"
            )
        return labels.reshape(-1)

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
        return known_similarity(self.similarity_fct)

    @property
    def _fusable(self) -> bool:
        return self._similarity is not None

    def _candidate_scores(self, a: Tensor, candidates: list[Tensor], projection: dict[str, Any]) -> Tensor:  # (N, K)
        if self._similarity:
            return self._known_scores(a, candidates, self._similarity, projection)
        return torch.stack([plain_scores("similarity_fct", self.similarity_fct, a, b) for b in candidates], dim=1)


class SiameseLoss(AlignedLoss):
    """Such a loss on ``self.distance_metric``."""

    distance_metric: Callable[[Tensor, Tensor], Tensor]

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

    def _warn_unless_binary(self, labels: Tensor, consequence: str) -> None:
        """Once, since it waits for the device."""
        if vars(self).get("_checked_labels"):
            return
        self._checked_labels = True
        if bool(((labels != 0) & (labels != 1)).any()):
            warnings.warn(f"{type(self).__name__} got labels other than 0 and 1: {consequence}", stacklevel=3)
