"""MegaBatchMargin: the nearest other positive of a large batch as each anchor's negative."""

from __future__ import annotations

import math
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from chunked_embed import checks
from chunked_embed.functional.arguments import check_embeddings, widened
from chunked_embed.functional.mega_batch import margin_against
from chunked_embed.gather import ranks
from chunked_embed.losses._base import BY_DISTANCES, ChunkedLoss
from chunked_embed.losses._compat import SentenceTransformer, embed_columns, library


class MegaBatchMarginLoss(ChunkedLoss, library.MegaBatchMarginLoss):
    """``mean(relu(positive_margin - cos(a_i, p_i)) + relu(max_{j != i} cos(a_i, p_j) - negative_margin))``.

    One product finds the negatives, a chunk of anchors at a time, whatever the encoder's mini-batch is.

    Args:
        model: The SentenceTransformer to train.
        positive_margin: Positives are pushed to at least this similarity.
        negative_margin: The nearest negative is pushed to at most this one.
        use_mini_batched_version: Embed the batch in mini-batches (gradient caching). False embeds it at once.
        mini_batch_size: Rows of a mini-batch.
        mini_batch_num_tokens: Instead of ``mini_batch_size``, the most tokens of one.
        show_progress_bar: Show one while mini-batches are embedded.
        options: See :class:`~chunked_embed.losses.Options`. With ``gather_across_devices`` the positives of all
            processes are candidates.

    Inputs: two columns (anchor, positive); labels are ignored.

    Reference: https://aclanthology.org/P18-1042

    Example:
        >>> import torch
        >>> from sentence_transformers import SentenceTransformer
        >>> from chunked_embed import losses
        >>> model = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")
        >>> loss = losses.MegaBatchMarginLoss(model)
        >>> a, b = (torch.randn(8, 384, requires_grad=True) for _ in range(2))  # embeddings, as a model gives them
        >>> loss.compute_loss_from_embeddings([a, b]).backward()
    """

    def __init__(
        self,
        model: SentenceTransformer,
        positive_margin: float = 0.8,
        negative_margin: float = 0.3,
        use_mini_batched_version: bool = True,
        mini_batch_size: int | None = 50,
        mini_batch_num_tokens: int | None = None,
        show_progress_bar: bool = False,
        **options: Any,
    ) -> None:
        # The library's mini-batches refuse a StaticEmbedding, ours do not; and it binds one of two forwards for good.
        library.MegaBatchMarginLoss.__init__(self, model, positive_margin, negative_margin, False)
        del self.forward
        checks.number("positive_margin", positive_margin)
        checks.number("negative_margin", negative_margin)
        self._set_options(
            mini_batch_size=mini_batch_size,
            mini_batch_num_tokens=mini_batch_num_tokens,
            show_progress_bar=show_progress_bar,
            **options,
        )
        self.uses_gradient_cache = bool(use_mini_batched_version) and self._in_mini_batches

    _small = BY_DISTANCES
    _settings = ("positive_margin", "negative_margin")

    def _size(self, rows: int, width: int, columns: int) -> float:
        return rows * rows if columns == 2 else math.inf

    def _check_settings(self) -> None:
        checks.number("positive_margin", self.positive_margin)
        checks.number("negative_margin", self.negative_margin)

    def _by_library(self, columns: list[Tensor], labels: Any) -> Tensor:
        of = SimpleNamespace(mini_batch_size=len(columns[0]))  # of the similarities, whole
        of.positive_margin, of.negative_margin = self.positive_margin, self.negative_margin
        return library.MegaBatchMarginLoss.calculate_loss(of, [[column] for column in columns])

    @property
    def _fusable(self) -> bool:
        return False  # candidates are needed whole

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        features = list(sentence_features)
        self._validate_input(features)  # before they are embedded
        return (self.forward_mini_batched if self.uses_gradient_cache else self.forward_non_mini_batched)(
            features, labels
        )

    def forward_mini_batched(self, sentence_features: list[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        return super().forward(sentence_features, labels)

    def forward_non_mini_batched(
        self, sentence_features: list[dict[str, Tensor]], labels: Tensor | None = None
    ) -> Tensor:
        return self.calculate_loss([[column] for column in embed_columns(self.model, sentence_features)], labels)

    def _loss(self, embeddings: list[Tensor], labels: Tensor | None, **projection: Any) -> Tensor:
        if len(embeddings) != 2:
            raise ValueError(
                f"MegaBatchMarginLoss expects two columns, anchors and positives, got {len(embeddings)}: it finds the "
                "negatives among the other positives"
            )
        anchors, positives = embeddings
        check_embeddings({"anchors": anchors, "positives": positives})
        dtype, anchors, positives = anchors.dtype, widened(anchors), widened(positives)
        processes = ranks(anchors, self.gather_across_devices)
        (candidates,) = processes.gather(positives)
        margins = (self.positive_margin, self.negative_margin)
        mean = margin_against(anchors, positives, candidates, processes.offset, *margins, self._chunking, dtype)
        return processes.share(mean)
