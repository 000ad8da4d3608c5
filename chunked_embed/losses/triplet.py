"""Triplet: the anchor nearer to its positive than to its negative, by a margin."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from chunked_embed import checks
from chunked_embed import functional as CF
from chunked_embed.functional.arguments import widened
from chunked_embed.gather import global_mean
from chunked_embed.losses._base import ChunkedLoss
from chunked_embed.losses._compat import SentenceTransformer, TripletDistanceMetric, library
from chunked_embed.losses._pairwise import known_triplet_distance


class TripletLoss(ChunkedLoss, library.TripletLoss):
    """``mean(relu(d(anchor, positive) - d(anchor, negative) + margin))``.

    Args:
        model: The SentenceTransformer to train.
        distance_metric: Distance of two aligned batches, (N, D), (N, D) -> (N,). Those of ``TripletDistanceMetric`` run
            fused and chunked, any other callable through ordinary autograd.
        triplet_margin: By how much the negative must be further away than the positive.
        options: See :class:`~chunked_embed.losses.Options`.

    Inputs: three columns (anchor, positive, negative); labels are ignored.

    Reference: https://arxiv.org/abs/1703.07737

    Example:
        >>> import torch
        >>> from sentence_transformers import SentenceTransformer
        >>> from chunked_embed import losses
        >>> model = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")
        >>> loss = losses.TripletLoss(model, triplet_margin=1.0, mini_batch_size=64)
        >>> anchor, positive, negative = (torch.randn(8, 384, requires_grad=True) for _ in range(3))
        >>> loss.compute_loss_from_embeddings([anchor, positive, negative]).backward()
    """

    def __init__(
        self,
        model: SentenceTransformer,
        distance_metric: Callable[[Tensor, Tensor], Tensor] = TripletDistanceMetric.EUCLIDEAN,
        triplet_margin: float = 5,
        **options: Any,
    ) -> None:
        super().__init__(model, distance_metric, triplet_margin)
        checks.number("triplet_margin", triplet_margin)
        self._set_options(**options)

    _settings = ("triplet_margin",)

    @property
    def _distance(self) -> str | None:
        return known_triplet_distance(self.distance_metric)

    @property
    def _fusable(self) -> bool:
        return self._distance is not None

    def _size(self, rows: int, width: int, columns: int) -> float:
        return rows * width if columns == 3 and self._distance else math.inf

    def _check_settings(self) -> None:
        checks.number("margin", self.triplet_margin)

    def _loss(self, embeddings: list[Tensor], labels: Tensor | None, **projection: Any) -> Tensor:
        if len(embeddings) != 3:
            raise ValueError(
                f"TripletLoss expects anchor, positive and negative columns, got {len(embeddings)} columns"
            )
        if self._distance:
            options = {**projection, **self._chunking.keywords}
            loss = CF.triplet(*embeddings, margin=self.triplet_margin, distance=self._distance, **options)
        else:
            loss = self._plain(*embeddings)
        return global_mean(loss, len(embeddings[0])) if self.gather_across_devices else loss

    def _plain(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        difference = self.distance_metric(anchor, positive) - self.distance_metric(anchor, negative)
        return F.relu(widened(difference) + self.triplet_margin).mean()
