"""Contrastive tension: two encoders that start as one agree about a text, and disagree about all others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from chunked_embed import checks
from chunked_embed import functional as CF
from chunked_embed.checks import POSITIVE
from chunked_embed.gather import gather_rows
from chunked_embed.losses._base import BY_SIMILARITIES, ChunkedLoss
from chunked_embed.losses._compat import (
    RandContext,
    SentenceTransformer,
    is_mean_cross_entropy,
    known_matrix,
    library,
    util,
)
from chunked_embed.losses._kinds import check_model
from chunked_embed.losses._unwrapped import averaged_behind, in_step


class ContrastiveTensionLossInBatchNegatives(ChunkedLoss, library.ContrastiveTensionLossInBatchNegatives):
    """``mean over i of  (log sum_j exp(s_ij) + log sum_j exp(s_ji)) / 2 - s_ii``  with
    ``s_ij = exp(logit_scale) * similarity(model1(t_i), model2(t_j))``.

    ``model2`` is the model, ``model1`` a copy of it that is trained beside it. Row and column sums of the similarities
    come from one product, a chunk of rows at a time; nothing N x N is held.

    Over several processes the gradients of both encoders and of ``logit_scale`` are averaged at the end of each
    backward pass, and process 0's parameters are what all of them start from: the trainer wraps neither encoder. What
    is wrapped in DistributedDataParallel or sharded all the same is left to the wrapper.

    Args:
        model: The SentenceTransformer to train, and to use afterwards.
        scale: What the similarities are multiplied by at first: ``logit_scale`` is its logarithm, and learns.
        similarity_fct: Similarity of every row of one batch with every row of another, (N, D), (M, D) -> (N, M).
            ``util.cos_sim`` and ``util.dot_score`` run fused and chunked, any other callable chunked, through ordinary
            autograd.
        options: See :class:`~chunked_embed.losses.Options`. Mini-batches are embedded by one encoder after the other;
            ``fuse_projection=True`` is refused: each encoder ends in a projection of its own.

    Inputs: one column of texts, which both models embed; labels and further columns are ignored. With a
    ``cross_entropy_loss`` other than a plain ``nn.CrossEntropyLoss`` all similarities are held, as in the library.

    Reference: https://openreview.net/pdf?id=Ov_sMNau-PF

    Example:
        >>> from sentence_transformers import SentenceTransformer
        >>> from chunked_embed import losses
        >>> model = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")
        >>> loss = losses.ContrastiveTensionLossInBatchNegatives(model, mini_batch_size=2)
        >>> features = [model.preprocess(["A plane.", "A flute.", "Bread.", "A dog."])]
        >>> loss(features, labels=None).backward()
        >>> loss.logit_scale.grad.shape
        torch.Size([])
    """

    model1: nn.Module
    model2: nn.Module
    similarity_fct: Callable[[Tensor, Tensor], Tensor]
    cross_entropy_loss: nn.Module
    logit_scale: Tensor
    gather_across_devices: bool

    def __init__(
        self,
        model: SentenceTransformer,
        scale: float = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = util.cos_sim,
        **options: Any,
    ) -> None:
        check_model(model)
        checks.number("scale", scale, POSITIVE)
        checks.function("similarity_fct", similarity_fct)
        library.ContrastiveTensionLossInBatchNegatives.__init__(self, model, scale, similarity_fct)
        self._set_options(**options)

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        columns = list(sentence_features)[:1]  # like the library, the first alone
        if not columns:
            raise ValueError(f"{type(self).__name__} expects a column of texts, got none")
        parameters = in_step(self)
        if self.uses_gradient_cache:
            loss = super().forward(columns, labels)
        else:
            self._tail()
            embeddings = [model(columns[0])["sentence_embedding"] for model in (self.model1, self.model2)]
            loss = self.compute_loss_from_embeddings(embeddings, labels)
        return averaged_behind(loss, parameters)

    def forward_cached(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        (column,) = sentence_features
        return _Encoders(self).forward_cached([_Column(column, self.model1), _Column(column, self.model2)], labels)

    _small = BY_SIMILARITIES

    def _size(self, rows: int, width: int, columns: int) -> float:
        known = columns == 2 and self._similarity and is_mean_cross_entropy(self.cross_entropy_loss)
        return rows * rows if known else math.inf

    def _by_library(self, columns: list[Tensor], labels: Any) -> Tensor:
        return self._whole(*columns)  # which the library's forward has in it

    @property
    def _similarity(self) -> str | None:
        return known_matrix(self.similarity_fct)

    @property
    def _fusable(self) -> bool:
        return False  # the encoders end in a projection each

    @property
    def _normalizes(self) -> bool:
        return self._similarity == "cosine"

    def _loss(self, embeddings: list[Tensor], labels: Tensor | None, **projection: Any) -> Tensor:
        if len(embeddings) != 2:
            raise ValueError(
                f"{type(self).__name__} expects the embeddings of one column by model1 and by model2, got "
                f"{len(embeddings)} of them"
            )
        a, b = embeddings
        if not is_mean_cross_entropy(self.cross_entropy_loss):
            return self._whole(a, b)
        return CF.info_nce(
            a,
            b,
            scale=self.logit_scale.exp(),
            similarity=self._similarity or self.similarity_fct,
            directions=("query_to_doc", "doc_to_query"),
            partition_mode="per_direction",
            gather_across_devices=self.gather_across_devices,
            **self._chunking.keywords,
        )

    def _whole(self, a: Tensor, b: Tensor) -> Tensor:
        """By all similarities at once, as ``cross_entropy_loss`` takes them."""
        if self.gather_across_devices:
            a, b = gather_rows(a, b)
        scores = self.logit_scale.exp() * self.similarity_fct(a, b)
        own = torch.arange(len(scores), device=scores.device)
        return (self.cross_entropy_loss(scores, own) + self.cross_entropy_loss(scores.T, own)) / 2


class _Column(dict[str, Any]):
    """Features, and who embeds them."""

    def __init__(self, features: dict[str, Any], encoder: nn.Module) -> None:
        super().__init__(features)
        self.encoder = encoder


class _Encoders(ChunkedLoss):
    """A loss to :class:`CachedLossMixin`, which knows of one model: each column brings its own."""

    def __init__(self, loss: ContrastiveTensionLossInBatchNegatives) -> None:
        self.loss = loss
        self.model = loss.model2
        self.mini_batch_size = loss.mini_batch_size
        self.mini_batch_num_tokens = loss.mini_batch_num_tokens
        self.show_progress_bar = loss.show_progress_bar

    def embed_minibatch(
        self,
        sentence_feature: dict[str, Tensor],
        begin: int,
        end: int,
        with_grad: bool,
        copy_random_state: bool,
        random_state: RandContext | None = None,
    ) -> tuple[Tensor, RandContext | None]:
        self.model = sentence_feature.encoder  # type: ignore[attr-defined]
        return super().embed_minibatch(sentence_feature, begin, end, with_grad, copy_random_state, random_state)

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        return self.loss.calculate_loss(reps, labels, with_backward=with_backward)
