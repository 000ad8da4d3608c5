"""Cosine similarity against a label, by any loss of torch's."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from chunked_embed.gather import gather_rows
from chunked_embed.losses._compat import SentenceTransformer, library
from chunked_embed.losses._pairwise import COSINE_EPS, AlignedLoss


class CosineSimilarityLoss(AlignedLoss, library.CosineSimilarityLoss):
    """``loss_fct(cos_score_transformation(cos(a, b)), labels)``, by default the mean squared error.

    Both modules see (N,) numbers, no embeddings; parameters of theirs are trained, also with mini-batches.

    Args:
        model: The SentenceTransformer to train.
        loss_fct: What compares the similarities (N,) with the labels (N,).
        cos_score_transformation: Applied to the similarities before.
        options: See :class:`~chunked_embed.losses.Options`.

    Inputs: two columns and a number per pair, (N,), often in [0, 1].

    Example:
        >>> import torch
        >>> from sentence_transformers import SentenceTransformer
        >>> from chunked_embed import losses
        >>> model = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")
        >>> loss = losses.CosineSimilarityLoss(model)
        >>> a, b = (torch.randn(8, 384, requires_grad=True) for _ in range(2))  # embeddings, as a model gives them
        >>> loss.compute_loss_from_embeddings([a, b], torch.rand(8)).backward()
    """

    def __init__(
        self,
        model: SentenceTransformer,
        loss_fct: nn.Module = nn.MSELoss(),  # noqa: B008 (the library's own defaults)
        cos_score_transformation: nn.Module = nn.Identity(),  # noqa: B008
        **options: Any,
    ) -> None:
        super().__init__(model, loss_fct, cos_score_transformation)
        self._set_options(**options)

    @property
    def _fusable(self) -> bool:
        return True

    def _size(self, rows: int, width: int, columns: int) -> float:
        known = type(self.loss_fct) is nn.MSELoss and type(self.cos_score_transformation) is nn.Identity
        return rows * width if columns >= 2 and known else math.inf

    def _for_library(self, columns: list[Tensor], labels: Tensor | None) -> Tensor:
        return self._row_labels(labels, columns[0].shape[0])

    def _loss(self, embeddings: list[Tensor], labels: Tensor | None, **projection: Any) -> Tensor:
        a, b = self._two_columns(embeddings)
        labels = self._row_labels(labels, len(a)).float()  # as the library rounds them
        scores = self._known_scores(a, b, "cosine", projection, COSINE_EPS)
        if self.gather_across_devices:
            scores, labels = gather_rows(scores, labels)
        return self.loss_fct(self.cos_score_transformation(scores), labels.to(scores.dtype))
