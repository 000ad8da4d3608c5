"""Contrastive: positives together, negatives further apart than a margin."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from chunked_embed import checks
from chunked_embed.gather import gather_rows
from chunked_embed.losses._compat import SentenceTransformer, SiameseDistanceMetric, library
from chunked_embed.losses._pairwise import SiameseLoss


class ContrastiveLoss(SiameseLoss, library.ContrastiveLoss):
    """``mean((y * d^2 + (1 - y) * relu(margin - d)^2) / 2)`` with the distance ``d`` of a pair and its label ``y``.

    Args:
        model: The SentenceTransformer to train.
        distance_metric: Distance of two aligned batches, (N, D), (N, D) -> (N,). Those of ``SiameseDistanceMetric`` run
            fused and chunked, any other callable through ordinary autograd.
        margin: How far apart the negatives should be.
        size_average: The mean over pairs; False takes their sum.
        options: See :class:`~chunked_embed.losses.Options`.

    Inputs: two columns and a label per pair, (N,): 1 for a positive, 0 for a negative. A label in between weighs both
    terms.

    Reference: Hadsell, Chopra and LeCun, "Dimensionality Reduction by Learning an Invariant Mapping" (2006)

    Example:
        >>> import torch
        >>> from sentence_transformers import SentenceTransformer
        >>> from chunked_embed import losses
        >>> model = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")
        >>> loss = losses.ContrastiveLoss(model, margin=0.5)
        >>> a, b = (torch.randn(8, 384, requires_grad=True) for _ in range(2))  # embeddings, as a model gives them
        >>> loss.compute_loss_from_embeddings([a, b], torch.randint(0, 2, (8,))).backward()
    """

    _others = "each weighs the positive term by y and the negative one by 1 - y"

    def __init__(
        self,
        model: SentenceTransformer,
        distance_metric: Callable[[Tensor, Tensor], Tensor] = SiameseDistanceMetric.COSINE_DISTANCE,
        margin: float = 0.5,
        size_average: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(model, distance_metric, checks.number("margin", margin), size_average)
        self._set_options(**options)

    def _size(self, rows: int, width: int, columns: int) -> float:
        return rows * width if columns == 2 and self._fusable else math.inf

    def _loss(self, embeddings: list[Tensor], labels: Tensor | None, **projection: Any) -> Tensor:
        if len(embeddings) != 2:
            raise ValueError(f"ContrastiveLoss expects two columns of embeddings, got {len(embeddings)}")
        a, b = embeddings
        labels = self._row_labels(labels, len(a))
        self._warn_unless_binary(labels)
        distances = self._distances(a, b, projection)
        if self.gather_across_devices:
            distances, labels = gather_rows(distances, labels)
        together, apart = distances.square(), F.relu(self.margin - distances).square()
        losses = 0.5 * (labels.float() * together + (1 - labels).float() * apart)
        return losses.mean() if self.size_average else losses.sum()
