"""Online contrastive: of the batch's pairs, only the hard ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from chunked_embed import checks
from chunked_embed.gather import gather_rows
from chunked_embed.losses._compat import SentenceTransformer, SiameseDistanceMetric, library
from chunked_embed.losses._pairwise import SiameseLoss


class OnlineContrastiveLoss(SiameseLoss, library.OnlineContrastiveLoss):
    """``sum over hard positives of d^2 + sum over hard negatives of relu(margin - d)^2``.

    A positive is hard if it is further apart than the nearest negative, a negative if it is nearer than the furthest
    positive. In a batch without pairs of the other kind, one is hard beyond the mean of its own kind.

    Args:
        model: The SentenceTransformer to train.
        distance_metric: Distance of two aligned batches, (N, D), (N, D) -> (N,). Those of ``SiameseDistanceMetric`` run
            fused and chunked, any other callable through ordinary autograd.
        margin: How far apart the negatives should be.
        options: See :class:`~chunked_embed.losses.Options`. With ``gather_across_devices``, which pairs are hard is
            decided over the global batch.

    Inputs: two columns and a label per pair, (N,): 1 for a positive, 0 for a negative; pairs with any other are left
    out.

    Example:
        >>> import torch
        >>> from sentence_transformers import SentenceTransformer
        >>> from chunked_embed import losses
        >>> model = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")
        >>> loss = losses.OnlineContrastiveLoss(model)
        >>> a, b = (torch.randn(8, 384, requires_grad=True) for _ in range(2))  # embeddings, as a model gives them
        >>> loss.compute_loss_from_embeddings([a, b], torch.arange(8) % 2).backward()
    """

    _others = "those pairs are left out"

    def __init__(
        self,
        model: SentenceTransformer,
        distance_metric: Callable[[Tensor, Tensor], Tensor] = SiameseDistanceMetric.COSINE_DISTANCE,
        margin: float = 0.5,
        **options: Any,
    ) -> None:
        super().__init__(model, distance_metric, checks.number("margin", margin))
        self._set_options(**options)

    def forward(
        self,
        sentence_features: Iterable[dict[str, Tensor]],
        labels: Tensor | None = None,
        size_average: bool = False,  # the library's, which ignores it
    ) -> Tensor:
        return super().forward(sentence_features, labels)

    def _size(self, rows: int, width: int, columns: int) -> float:
        return rows * width if columns >= 2 and self._fusable else math.inf

    def _loss(self, embeddings: list[Tensor], labels: Tensor | None, **projection: Any) -> Tensor:
        a, b = self._two_columns(embeddings)
        labels = self._row_labels(labels, len(a))
        self._warn_unless_binary(labels)
        distances = self._distances(a, b, projection)
        if self.gather_across_devices:
            distances, labels = gather_rows(distances, labels)
        near, far = distances[labels == 1], distances[labels == 0]
        hard_near = near[near > (far.min() if len(far) else near.mean())]
        hard_far = far[far < (near.max() if len(near) else far.mean())]
        return hard_near.square().sum() + F.relu(self.margin - hard_far).square().sum()
