"""FLOPS: the regulariser of SPLADE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from chunked_embed import checks
from chunked_embed import functional as CF
from chunked_embed.gather import is_distributed
from chunked_embed.losses._base import Small
from chunked_embed.losses._compat import LEAVES_SMALL, SparseEncoder, sparse_library
from chunked_embed.losses._kinds import check_model, is_ordinary

SMALL = Small(cpu=1 << 20, gpu=1 << 24, autocast=1 << 24)


class FlopsLoss(sparse_library.FlopsLoss):
    """``sum over j of (mean over i of x_ij)^2``, inside of :class:`SpladeLoss`: see
    :func:`chunked_embed.functional.flops`.

    Nothing of the embeddings' size is made, forward or, without a threshold, backward. A small batch is left to the
    library: float32 or float64, of up to ``SMALL`` numbers.

    Args:
        model: The SparseEncoder to train.
        threshold: Texts with at most so many numbers other than zero count as zeros.
        gather_across_devices: The mean is that of the texts of all processes. The library's is that of one process's.

    Inputs: embeddings, (N, V), or several such columns.

    References: https://huggingface.co/papers/2004.05665, with a threshold https://huggingface.co/papers/2504.14839

    Example:
        >>> import torch
        >>> from sentence_transformers import SparseEncoder
        >>> from chunked_embed.sparse import losses
        >>> model = SparseEncoder("sentence-transformers/all-MiniLM-L6-v2")
        >>> regularizer = losses.FlopsLoss(model, threshold=100)
        >>> regularizer.compute_loss_from_embeddings(torch.rand(8, 512, requires_grad=True)).backward()
        >>> inner = losses.SparseMultipleNegativesRankingLoss(model)
        >>> loss = losses.SpladeLoss(model, inner, 3e-5, 5e-5, document_regularizer=regularizer)
    """

    def __init__(
        self, model: SparseEncoder, threshold: float | None = None, *, gather_across_devices: bool = False
    ) -> None:
        check_model(model)
        checks.number_or_none("threshold", threshold)
        super().__init__(model, threshold)
        self.gather_across_devices = checks.flag("gather_across_devices", gather_across_devices)

    def compute_loss_from_embeddings(self, embeddings: Tensor | Sequence[Tensor]) -> Tensor:
        """Of one tensor (N, V), or of the rows of several: a scalar, differentiable once."""
        columns = [embeddings] if isinstance(embeddings, Tensor) else embeddings
        if is_ordinary(columns) and self._is_small(columns):
            return super().compute_loss_from_embeddings(columns[0] if len(columns) == 1 else torch.cat(columns))
        return CF.flops(embeddings, threshold=self.threshold, gather_across_devices=self.gather_across_devices)

    def _is_small(self, columns: list[Tensor]) -> bool:
        first = columns[0]
        exact = first.dtype is torch.float32 or first.dtype is torch.float64
        if not (LEAVES_SMALL and exact) or (self.gather_across_devices and is_distributed()):
            return False
        bound = SMALL.cpu if first.is_cpu else SMALL.gpu if first.is_cuda else -1
        return first.numel() * len(columns) <= bound

    def get_config_dict(self) -> dict[str, Any]:
        ours = {"gather_across_devices": True} if self.gather_across_devices else {}
        return {**super().get_config_dict(), **ours}
