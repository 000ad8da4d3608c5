"""AnglE: CoSENT's ordering with a similarity of angles in complex space."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from chunked_embed.losses._compat import SentenceTransformer, library, util
from chunked_embed.losses.cosent import CoSENTLoss


class AnglELoss(CoSENTLoss, library.AnglELoss):
    """``log(1 + sum over y_i < y_j of exp(s_i - s_j))`` with ``s = scale * angle similarity(a, b)``.

    Args:
        model: The SentenceTransformer to train.
        scale: Factor on the similarity, an inverse temperature.
        options: See :class:`~chunked_embed.losses.Options`.

    Inputs: two columns and a label per pair; or an anchor, a positive and one or more negatives, each of them compared
    with the anchor, labelled 1 and 0 (given labels y: y and 1 - y).

    Reference: https://huggingface.co/papers/2309.12871

    Example:
        >>> import torch
        >>> from sentence_transformers import SentenceTransformer
        >>> from chunked_embed import losses
        >>> model = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")
        >>> loss = losses.AnglELoss(model, mini_batch_size=64)
        >>> a, b = (torch.randn(8, 384, requires_grad=True) for _ in range(2))  # embeddings, as a model gives them
        >>> loss.compute_loss_from_embeddings([a, b], torch.rand(8)).backward()
    """

    def __init__(self, model: SentenceTransformer, scale: float = 20.0, **options: Any) -> None:
        super().__init__(model, scale, util.pairwise_angle_sim, **options)

    def _pairs(self, embeddings: list[Tensor], labels: Tensor | None) -> tuple[Tensor, list[Tensor], Tensor]:
        if len(embeddings) <= 2:
            return super()._pairs(embeddings, labels)
        anchor, *others = embeddings
        if labels is None:
            labels = torch.ones(len(anchor), device=anchor.device)
        labels = self._row_labels(labels, len(anchor))
        return anchor, others, torch.cat([labels, (1 - labels).repeat(len(others) - 1)])

    def _size(self, rows: int, width: int, columns: int) -> float:
        return super()._size(rows * max(columns - 1, 1), width, columns)

    def _for_library(self, columns: list[Tensor], labels: Tensor | None) -> Any:
        return None if labels is None and len(columns) > 2 else super()._for_library(columns, labels)
