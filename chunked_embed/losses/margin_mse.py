"""MarginMSE: the teacher's margins between a positive and its negatives."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from chunked_embed.engine.types import accumulator_dtype
from chunked_embed.gather import gather_rows
from chunked_embed.losses._compat import SentenceTransformer, callable_name, library, util
from chunked_embed.losses._pairwise import SimilarityLoss


class MarginMSELoss(SimilarityLoss, library.MarginMSELoss):
    """``mean((s(query, positive) - s(query, negative_k) - margin_k)^2)`` over queries and negatives.

    Args:
        model: The SentenceTransformer to train.
        similarity_fct: Similarity of two aligned batches, (N, D), (N, D) -> (N,). The ``pairwise_*`` functions of
            ``sentence_transformers.util`` run fused and chunked, any other callable through ordinary autograd.
        options: See :class:`~chunked_embed.losses.Options`.

    Inputs: a query, a positive and K negatives; labels are the teacher's margins, (N, K) or, for one negative, (N,), or
    its scores of the positive and the negatives, (N, K + 1).

    Reference: https://huggingface.co/papers/2010.02666

    Example:
        >>> import torch
        >>> from sentence_transformers import SentenceTransformer
        >>> from chunked_embed import losses
        >>> model = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")
        >>> loss = losses.MarginMSELoss(model)
        >>> anchor, positive, negative = (torch.randn(8, 384, requires_grad=True) for _ in range(3))
        >>> loss.compute_loss_from_embeddings([anchor, positive, negative], torch.rand(8)).backward()
    """

    def __init__(
        self,
        model: SentenceTransformer,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = util.pairwise_dot_score,
        **options: Any,
    ) -> None:
        super().__init__(model, similarity_fct)
        self._set_options(**options)

    def _margins(self, labels: Tensor | None, rows: int, negatives: int) -> Tensor:  # (N, K)
        labels = self._teacher(labels, rows, negatives)
        if labels.ndim == 1:
            return labels[:, None]
        return labels if labels.shape[1] == negatives else labels[:, :1] - labels[:, 1:]

    def _teacher(self, labels: Tensor | None, rows: int, negatives: int) -> Tensor:  # (N, K), (N, K + 1) or (N,)
        labels = self._labels(labels)
        in_a_row = negatives == 1 and labels.shape == (rows,)
        if not (in_a_row or labels.shape == (rows, negatives) or labels.shape == (rows, negatives + 1)):
            raise ValueError(
                f"{type(self).__name__} expects labels of shape {(rows, negatives)} (margins between the positive and "
                f"each negative) or {(rows, negatives + 1)} (scores of all of them), got {tuple(labels.shape)}"
            )
        return labels

    def _size(self, rows: int, width: int, columns: int) -> float:
        known = self._similarity and type(self.loss_fct) is nn.MSELoss
        return rows * width * (columns - 2) if columns >= 3 and known else math.inf

    def _for_library(self, columns: list[Tensor], labels: Tensor | None) -> Tensor:
        rows, negatives, dtype = columns[0].shape[0], len(columns) - 2, accumulator_dtype(columns[0].dtype)
        given = self._teacher(labels, rows, negatives)
        return given if given.dtype is dtype else self._margins(given, rows, negatives).to(dtype)

    def _loss(self, embeddings: list[Tensor], labels: Tensor | None, **projection: Any) -> Tensor:
        if len(embeddings) < 3:
            raise ValueError(
                f"{type(self).__name__} expects a query, a positive and one or more negatives, "
                f"got {len(embeddings)} columns"
            )
        query, *candidates = embeddings
        expected = self._margins(labels, len(query), len(candidates) - 1)
        scores = self._candidate_scores(query, candidates, projection)
        margins, expected = scores[:, :1] - scores[:, 1:], expected.to(scores.dtype)
        if self.gather_across_devices:
            margins, expected = gather_rows(margins, expected)
        return self.loss_fct(margins, expected)

    def get_config_dict(self) -> dict[str, Any]:
        return {"similarity_fct": callable_name(self.similarity_fct), **self._changed_options()}
