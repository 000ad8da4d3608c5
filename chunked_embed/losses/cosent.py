"""CoSENT: order the pairs of a batch by their labels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from chunked_embed import checks
from chunked_embed import functional as CF
from chunked_embed.gather import gather_rows
from chunked_embed.losses._compat import SentenceTransformer, callable_name, library, util
from chunked_embed.losses._pairwise import SimilarityLoss


class CoSENTLoss(SimilarityLoss, library.CoSENTLoss):
    """``log(1 + sum over y_i < y_j of exp(s_i - s_j))`` with ``s = scale * similarity(a, b)``.

    O(N log N) time and O(N) memory beyond the embeddings, exact for ties and any spread of scores.

    Args:
        model: The SentenceTransformer to train.
        scale: Factor on the similarity, an inverse temperature.
        similarity_fct: Similarity of two aligned batches, (N, D), (N, D) -> (N,). The ``pairwise_*`` functions of
            ``sentence_transformers.util`` run fused and chunked, any other callable through ordinary autograd.
        options: See :class:`~chunked_embed.losses.Options`.

    Inputs: two columns and a label per pair, (N,), any numbers that can be ordered.

    Reference: https://penghao-bdsc.github.io/papers/CoSENT_TASLP2024.pdf

    Example:
        >>> import torch
        >>> from sentence_transformers import SentenceTransformer
        >>> from chunked_embed import losses
        >>> model = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")
        >>> loss = losses.CoSENTLoss(model, mini_batch_size=64)
        >>> a, b = (torch.randn(8, 384, requires_grad=True) for _ in range(2))  # embeddings, as a model gives them
        >>> loss.compute_loss_from_embeddings([a, b], torch.rand(8)).backward()
    """

    def __init__(
        self,
        model: SentenceTransformer,
        scale: float = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = util.pairwise_cos_sim,
        **options: Any,
    ) -> None:
        # Not super(): AnglELoss has the library's AnglELoss, of another signature, in between.
        library.CoSENTLoss.__init__(self, model, scale, similarity_fct)
        checks.scalar("scale", scale)
        self._set_options(**options)

    def _pairs(self, embeddings: list[Tensor], labels: Tensor | None) -> tuple[Tensor, list[Tensor], Tensor]:
        """-> anchors, columns that are compared with them, and labels: those of one column after the other."""
        anchor, other = self._two_columns(embeddings)
        return anchor, [other], self._row_labels(labels, len(anchor))

    def _size(self, rows: int, width: int, columns: int) -> float:
        return max(width, rows) * rows if columns >= 2 and self._similarity else math.inf

    def _for_library(self, columns: list[Tensor], labels: Tensor | None) -> Any:
        return self._row_labels(labels, columns[0].shape[0])

    def _loss(self, embeddings: list[Tensor], labels: Tensor | None, **projection: Any) -> Tensor:
        anchor, others, labels = self._pairs(embeddings, labels)
        # In one call: what the columns pull an anchor to nearly cancels, and is added up before it is rounded.
        scores = self._candidate_scores(anchor, others, projection).t().flatten()
        if self.gather_across_devices:
            scores, labels = gather_rows(scores, labels)
        return CF.cosent_from_scores(scores * self.scale, labels)

    def get_config_dict(self) -> dict[str, Any]:
        return {"scale": self.scale, "similarity_fct": callable_name(self.similarity_fct), **self._changed_options()}
