"""Global orthogonal regularisation: embeddings of different rows like random directions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from chunked_embed.functional.arguments import check_embeddings
from chunked_embed.functional.spread import Moments, moments, terms, terms_of_matrix
from chunked_embed.gather import ranks
from chunked_embed.losses._base import BY_DISTANCES, ChunkedLoss
from chunked_embed.losses._compat import SentenceTransformer, callable_name, known_matrix, library, util
from chunked_embed.losses._kinds import check_columns, is_ordinary


class GlobalOrthogonalRegularizationLoss(ChunkedLoss, library.GlobalOrthogonalRegularizationLoss):
    """``gor_mean``: the squared mean of all similarities of different rows. ``gor_second_moment``: how far the mean of
    their squares is above ``1 / D``. Of each column apart, then the columns' mean or sum.

    Both follow from sums over rows, a vector and a D x D matrix: no similarity is formed.

    Args:
        model: The SentenceTransformer to train.
        similarity_fct: From two batches (N, D) to all their similarities (N, N). ``cos_sim`` and ``dot_score`` of
            ``sentence_transformers.util`` take O(N D^2) time and O(D^2) memory, any other callable is run on
            the whole batch.
        mean_weight: Factor of the first term; None or 0 leaves it out.
        second_moment_weight: Factor of the second one, likewise.
        aggregation: "mean" or "sum", over columns.
        options: See :class:`~chunked_embed.losses.Options`. With ``gather_across_devices`` the sums of all processes
            are added up; another similarity gathers the embeddings.

    Inputs: any columns; labels are ignored. Returns a dict of terms, which the trainer adds up. With gradient caching
    they must be added up as they are: their gradients are taken together.

    Reference: https://arxiv.org/abs/1708.06320

    Example:
        >>> import torch
        >>> from sentence_transformers import SentenceTransformer
        >>> from chunked_embed import losses
        >>> model = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")
        >>> loss = losses.GlobalOrthogonalRegularizationLoss(model)
        >>> a, b = (torch.randn(8, 384, requires_grad=True) for _ in range(2))  # embeddings, as a model gives them
        >>> terms = loss.compute_loss_from_embeddings([a, b])
        >>> sum(terms.values()).backward()
        >>> sorted(terms)
        ['gor_mean', 'gor_second_moment']
    """

    def __init__(
        self,
        model: SentenceTransformer,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = util.cos_sim,
        mean_weight: float | None = 1.0,
        second_moment_weight: float | None = 1.0,
        aggregation: Literal["mean", "sum"] = "mean",
        **options: Any,
    ) -> None:
        super().__init__(model, similarity_fct, mean_weight, second_moment_weight, aggregation)
        self._set_options(**options)

    _small = BY_DISTANCES

    @property
    def _fusable(self) -> bool:
        return False  # a tail applies to all rows before they are summed

    def compute_loss_from_embeddings(  # type: ignore[override]  # likewise
        self, embeddings: Sequence[Tensor], labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The terms of embeddings, one tensor (N, D) a column: a dict of scalars, differentiable once."""
        if not is_ordinary(embeddings):
            embeddings = check_columns(embeddings)
            if not embeddings:
                raise ValueError("GlobalOrthogonalRegularizationLoss expects a column of embeddings at least, got none")
            for embedding in embeddings:
                check_embeddings({"embeddings": embedding})
        return library.GlobalOrthogonalRegularizationLoss.compute_loss_from_embeddings(self, embeddings, labels)

    def compute_gor(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """The two terms of one column, (N, D), without their weights."""
        if is_ordinary([embeddings]) and self._is_small([embeddings], None):
            return self._left([embeddings], None)
        dtype = torch.float64 if embeddings.dtype == torch.float64 else torch.float32
        similarity = known_matrix(self.similarity_fct)
        processes = ranks(embeddings, self.gather_across_devices)
        if similarity is None:
            (candidates,) = processes.gather(embeddings)
            wide = candidates.to(dtype)
            return terms_of_matrix(self.similarity_fct(wide, wide), wide.shape[1], dtype)
        found = Moments(*processes.sum(*moments(embeddings, similarity)))
        return terms(found, sum(processes.sizes), dtype)

    def _size(self, rows: int, width: int, columns: int) -> float:
        return rows * rows if rows > 1 and known_matrix(self.similarity_fct) else math.inf

    def _by_library(self, columns: list[Tensor], labels: Any) -> tuple[Tensor, Tensor]:
        return library.GlobalOrthogonalRegularizationLoss.compute_gor(self, *columns)

    def get_config_dict(self) -> dict[str, Any]:
        return {
            "similarity_fct": callable_name(self.similarity_fct),
            "mean_weight": self.mean_weight,
            "second_moment_weight": self.second_moment_weight,
            "aggregation": self.aggregation,
            **self._changed_options(),
        }
