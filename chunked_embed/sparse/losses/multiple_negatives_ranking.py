"""InfoNCE over sparse embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor

from chunked_embed.losses._compat import SparseEncoder, sparse_library, util
from chunked_embed.losses.multiple_negatives_ranking import Direction, HardnessMode, MultipleNegativesRankingLoss
from chunked_embed.sparse.losses._inside import Inside


class SparseMultipleNegativesRankingLoss(
    Inside, MultipleNegativesRankingLoss, sparse_library.SparseMultipleNegativesRankingLoss
):
    """``mean over i of  log Z_i - s(q_i, d_i)`` with ``s = scale * similarity``, and Z the sum of exp(s) over the
    candidates in the batch: :class:`chunked_embed.losses.MultipleNegativesRankingLoss` with other defaults, inside of
    :class:`SpladeLoss` or :class:`CSRLoss`.

    Args:
        model: The SparseEncoder to train.
        scale: Factor on the similarity.
        similarity_fct, gather_across_devices, directions, partition_mode, hardness_mode, hardness_strength,
            learnable_scale, false_negatives: As there.
        options: ``gather_across_devices`` and those of chunks: see :class:`~chunked_embed.losses.Options`.

    Inputs: an anchor, a positive and any number of hard negatives. Labels are ignored, but for ``false_negatives``.

    Example:
        >>> import torch
        >>> from sentence_transformers import SparseEncoder
        >>> from chunked_embed.sparse import losses
        >>> model = SparseEncoder("sentence-transformers/all-MiniLM-L6-v2")
        >>> loss = losses.SparseMultipleNegativesRankingLoss(model)
        >>> a, b = (torch.rand(8, 512, requires_grad=True) for _ in range(2))  # embeddings, as a model gives them
        >>> loss.compute_loss_from_embeddings([a, b]).backward()
    """

    def __init__(
        self,
        model: SparseEncoder,
        scale: float = 1.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = util.dot_score,
        gather_across_devices: bool = False,
        directions: tuple[Direction, ...] = ("query_to_doc",),
        partition_mode: Literal["joint", "per_direction"] = "joint",
        hardness_mode: HardnessMode | None = None,
        hardness_strength: float = 0.0,
        *,
        learnable_scale: bool = False,
        false_negatives: Literal["text", "labels"] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            model,
            scale,
            similarity_fct,
            gather_across_devices,
            directions,
            partition_mode,
            hardness_mode,
            hardness_strength,
            learnable_scale=learnable_scale,
            false_negatives=false_negatives,
            **options,
        )

    def _size(self, rows: int, width: int, columns: int) -> float:
        # The library copies all embeddings, which are wider than there are rows.
        return max(super()._size(rows, width, columns), rows * width * columns)
