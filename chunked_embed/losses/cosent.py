"""CoSENT: order the pairs of a batch by their labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from chunked_embed import functional as CF
from chunked_embed.gather import gather_rows
from chunked_embed.losses._base import ChunkedLoss
from chunked_embed.losses._compat import SentenceTransformer, callable_name, library, util

_FUSED = (
    (util.pairwise_cos_sim, "cosine"),
    (util.pairwise_angle_sim, "angle"),
    (util.pairwise_dot_score, "dot"),
    (util.pairwise_euclidean_sim, "euclidean"),
    (util.pairwise_manhattan_sim, "manhattan"),
)


class CoSENTLoss(ChunkedLoss, library.CoSENTLoss):
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
        self._set_options(**options)

    @property
    def _similarity(self) -> str | None:
        return next((name for function, name in _FUSED if function is self.similarity_fct), None)

    @property
    def _fusable(self) -> bool:
        return self._similarity is not None

    def _pairs(self, embeddings: list[Tensor], labels: Tensor | None) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        if len(embeddings) < 2:
            raise ValueError(f"{type(self).__name__} expects two columns of embeddings, got {len(embeddings)}")
        return [(embeddings[0], embeddings[1])], self._check_labels(labels, len(embeddings[0]))

    def _check_labels(self, labels: Tensor | None, rows: int) -> Tensor:
        if labels is None:
            raise ValueError(f"{type(self).__name__} requires labels, one for each pair, got None")
        if labels.numel() != rows:
            raise ValueError(
                f"{type(self).__name__} expects {rows} labels (one for each pair), got {labels.numel()} in a tensor "
                f"of shape {tuple(labels.shape)}"
            )
        return labels.reshape(-1).int() if labels.dtype == torch.bool else labels.reshape(-1)

    def _scores(self, a: Tensor, b: Tensor, projection: dict[str, Any]) -> Tensor:
        if self._similarity:
            return CF.pairwise_scores(a, b, similarity=self._similarity, **projection, **self._chunking)
        scores = self.similarity_fct(a, b)
        if scores.shape != a.shape[:1]:
            raise ValueError(
                f"similarity_fct must return one score for each pair: expected shape {tuple(a.shape[:1])}, "
                f"got {tuple(scores.shape)}"
            )
        return scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores

    def _loss(self, embeddings: list[Tensor], labels: Tensor | None, **projection: Any) -> Tensor:
        pairs, labels = self._pairs(embeddings, labels)
        scores = torch.cat([self._scores(a, b, projection) for a, b in pairs])
        if self.gather_across_devices:
            scores, labels = gather_rows(scores, labels)
        return CF.cosent_from_scores(scores * self.scale, labels)

    def get_config_dict(self) -> dict[str, Any]:
        return {"scale": self.scale, "similarity_fct": callable_name(self.similarity_fct), **self._changed_options()}
