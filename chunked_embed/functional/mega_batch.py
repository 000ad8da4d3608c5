"""MegaBatchMargin: each anchor against its positive and the nearest other positive of a large batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import FlexChunkLoss, Projection, checks
from ..chunking import Chunking
from ..engine.compile import outside_compile
from .arguments import Rows, check_embeddings, shared, widened
from .pairwise import cosine


class NearestOther(FlexChunkLoss):
    """Outputs are cosines of anchors and positives: the position of the nearest that is not the anchor's own."""

    def __init__(self, **options: Any) -> None:
        super().__init__(targets=(), **options)

    def score_fn(self, outputs: Tensor, rows: Rows) -> Rows:
        own = rows["index"][:, None] == torch.arange(outputs.shape[1], device=outputs.device)
        return {"negative": torch.where(own, -torch.inf, outputs).argmax(1)}


class MegaBatchMargin(FlexChunkLoss):
    """Outputs are aligned embeddings: ``anchor``, ``positive`` and, in a batch of more than one, ``negative``."""

    def __init__(self, positive_margin: float = 0.8, negative_margin: float = 0.3, **options: Any) -> None:
        super().__init__(targets=(), **options)
        self.positive_margin = checks.number("positive_margin", positive_margin)
        self.negative_margin = checks.number("negative_margin", negative_margin)

    def loss_fn(self, outputs: Rows, rows: Rows) -> Tensor:
        loss = F.relu(self.positive_margin - cosine(outputs["anchor"], outputs["positive"]))
        if "negative" not in outputs:
            return loss
        return loss + F.relu(cosine(outputs["anchor"], outputs["negative"]) - self.negative_margin)


def margin_against(
    anchors: Tensor,  # (R, D)
    positives: Tensor,  # (R, D)
    candidates: Tensor,  # (V, D), the positives of all processes
    offset: int,  # of the first row's positive among them
    positive_margin: float,
    negative_margin: float,
    chunking: Chunking,
    dtype: torch.dtype,  # of the product's operands
) -> Tensor:
    """Mean over the rows."""
    loss = shared(MegaBatchMargin, chunking, positive_margin=positive_margin, negative_margin=negative_margin)
    sides = {"anchor": anchors, "positive": positives}
    if len(candidates) > 1:
        with torch.no_grad():
            found = shared(NearestOther, chunking).scores(
                Projection(anchors, candidates, cosine=True, dtype=dtype),
                {"index": torch.arange(offset, offset + len(anchors), device=anchors.device)},
            )
        sides["negative"] = candidates.index_select(0, found["negative"])
    return loss({name: Projection(side) for name, side in sides.items()}).loss


@outside_compile
def mega_batch_margin(
    anchors: Tensor,  # (N, D)
    positives: Tensor,  # (N, D)
    *,
    positive_margin: float = 0.8,
    negative_margin: float = 0.3,
    chunk_size: int | None = None,
    max_chunk_bytes: int | None = None,
    compiled: bool | None = None,
    float32_outputs: bool = True,
) -> Tensor:
    """``mean(relu(positive_margin - cos(a_i, p_i)) + relu(max_{j != i} cos(a_i, p_j) - negative_margin))``.

    One product finds the nearest other positive of every anchor; the two cosines are then taken of N pairs each. A
    single pair has no negative and takes the first term alone.

    Source: Wieting and Gimpel, "ParaNMT-50M" (ACL 2018), as in ``sentence_transformers.losses.MegaBatchMarginLoss``.

    Args:
        anchors, positives: floating point, of one dtype.
        chunk_size, max_chunk_bytes, compiled, float32_outputs: as for :class:`~chunked_embed.FlexChunkLoss`.

    Returns:
        A scalar, float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes or devices that differ, a margin that is not finite.
        TypeError: embeddings that are not floating point, or of two dtypes.

    Example:
        >>> import torch
        >>> from chunked_embed import functional as CF
        >>> anchors, positives = (torch.randn(8, 16, requires_grad=True) for _ in range(2))
        >>> CF.mega_batch_margin(anchors, positives).backward()
        >>> CF.mega_batch_margin(torch.eye(4), torch.eye(4))  # positives at 1, negatives at 0: nothing to do
        tensor(0.)
    """
    check_embeddings({"anchors": anchors, "positives": positives})
    chunking = Chunking(chunk_size, max_chunk_bytes, compiled, float32_outputs)
    dtype, anchors, positives = anchors.dtype, widened(anchors), widened(positives)
    return margin_against(anchors, positives, positives, 0, positive_margin, negative_margin, chunking, dtype)
