"""Batch triplets: positives and negatives of every row are the batch's other rows, told apart by labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from chunked_embed import checks
from chunked_embed.functional.arguments import check_embeddings, widened
from chunked_embed.functional.batch_triplets import Labelled, mean_over_triplets
from chunked_embed.gather import Ranks, ranks
from chunked_embed.losses._base import BY_DISTANCES, BY_TRIPLETS, ChunkedLoss
from chunked_embed.losses._compat import SentenceTransformer, library
from chunked_embed.losses._kinds import replaced

BatchHardTripletLossDistanceFunction = library.BatchHardTripletLossDistanceFunction
EUCLIDEAN = BatchHardTripletLossDistanceFunction.euclidean_distance
COSINE = BatchHardTripletLossDistanceFunction.cosine_distance


def known_distance(function: Any) -> str | None:
    """The name of a distance matrix of the library's; None for any other callable."""
    if isinstance(function, partial) and function.func is EUCLIDEAN and not function.args:
        squared = function.keywords.get("squared", False)
        return ("squared_euclidean" if squared else "euclidean") if function.keywords.keys() <= {"squared"} else None
    return "euclidean" if function is EUCLIDEAN else "cosine" if function is COSINE else None


class BatchTripletLoss(ChunkedLoss):
    """What these losses share: one column, a label for each row, a distance matrix or its name."""

    distance_metric: Callable[[Tensor], Tensor]
    sentence_embedder: nn.Module
    _small = BY_DISTANCES
    _step: str  # the library's method that has its computation

    # The trainer puts its wrapped model where a loss has a child "model". These of the library have it by another name,
    # and are not wrapped; ours keep that name in their state, and answer to both.

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__("sentence_embedder" if name == "model" else name, value)

    @property
    def model(self) -> Any:
        return self.sentence_embedder

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        for name, child in super().named_children():
            yield "model" if name == "sentence_embedder" else name, child

    @property
    def _fusable(self) -> bool:
        return False  # distances need all rows embedded

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        return super().forward(list(sentence_features)[:1], labels)  # like the library, the first column alone

    def _size(self, rows: int, width: int, columns: int) -> float:
        return rows * rows if known_distance(self.distance_metric) else math.inf

    def _check_settings(self) -> None:
        for name in self._settings:
            checks.number("margin", getattr(self, name))

    def _for_library(self, columns: list[Tensor], labels: Tensor | None) -> Tensor:
        return self._class_labels(columns[0], labels)

    def _loss(self, embeddings: list[Tensor], labels: Tensor | None, **projection: Any) -> Tensor:
        embedding, labels = self._checked(embeddings, labels)
        dtype, embedding = embedding.dtype, widened(embedding)
        processes = ranks(embedding, self.gather_across_devices)
        candidates, candidate_labels = processes.gather(embedding, labels)
        distance = None if replaced(self, self._step) else known_distance(self.distance_metric)
        if distance is None:
            return self._plain(candidates, candidate_labels)
        of_all = (candidates, candidate_labels, processes.offset, distance, self._chunking, dtype)
        return self._mined(Labelled(embedding, labels, *of_all), processes)

    def _checked(self, embeddings: list[Tensor], labels: Tensor | None) -> tuple[Tensor, Tensor]:
        if not embeddings:
            raise ValueError(f"{type(self).__name__} expects a column of embeddings, got none")
        check_embeddings({"embeddings": embeddings[0]})
        return embeddings[0], self._class_labels(embeddings[0], labels)

    def _class_labels(self, embedding: Tensor, labels: Tensor | None) -> Tensor:  # (N,)
        name = type(self).__name__
        if labels is None:
            raise ValueError(f"{name} requires labels, one per example, got None")
        checks.tensor("labels", labels)
        if labels.numel() != embedding.shape[0]:
            raise ValueError(
                f"{name} expects {len(embedding)} labels (one per example), got {labels.numel()} in a tensor of shape "
                f"{tuple(labels.shape)}"
            )
        labels = labels if labels.ndim == 1 else labels.reshape(-1)
        labels = labels.detach() if labels.requires_grad else labels
        checks.tensor("labels", labels, device=embedding.device, kind="real")
        self._without_nan(labels)
        return labels

    def _plain(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The library's own computation, for a distance that we do not know and a step that a user replaces."""
        return self._by_library([embeddings], labels)

    def _mined(self, batch: Labelled, processes: Ranks) -> Tensor:
        """What averages over processes to the loss."""
        raise NotImplementedError


class BatchHardTripletLoss(BatchTripletLoss, library.BatchHardTripletLoss):
    """``mean(relu(max_p d(a, p) - min_n d(a, n) + margin))``: the farthest positive and the nearest negative of a row.

    One product finds them, a chunk of rows at a time; nothing N x N is held.

    Args:
        model: The SentenceTransformer to train.
        distance_metric: From embeddings (N, D) to all their distances (N, N). Those of
            ``BatchHardTripletLossDistanceFunction`` run chunked, any other callable as in the library.
        margin: By how much the negative must be further away than the positive.
        options: See :class:`~chunked_embed.losses.Options`. With ``gather_across_devices`` the embeddings are gathered,
            and the positives and negatives of a row are those of all processes.

    Inputs: one column and a class per row, (N,).

    Reference: https://arxiv.org/abs/1703.07737

    Example:
        >>> import torch
        >>> from sentence_transformers import SentenceTransformer
        >>> from chunked_embed import losses
        >>> model = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")
        >>> loss = losses.BatchHardTripletLoss(model, margin=1.0)
        >>> embeddings, labels = torch.randn(8, 384, requires_grad=True), torch.arange(8) // 2
        >>> loss.compute_loss_from_embeddings([embeddings], labels).backward()
    """

    _step = "batch_hard_triplet_loss"
    _settings = ("triplet_margin",)

    def __init__(
        self,
        model: SentenceTransformer,
        distance_metric: Callable[[Tensor], Tensor] = EUCLIDEAN,
        margin: float = 5,
        **options: Any,
    ) -> None:
        library.BatchHardTripletLoss.__init__(self, model, distance_metric, margin)
        checks.number("margin", margin)
        self._set_options(**options)

    def _mined(self, batch: Labelled, processes: Ranks) -> Tensor:
        return processes.share(batch.hard(self.triplet_margin, soft=False))


class BatchHardSoftMarginTripletLoss(BatchTripletLoss, library.BatchHardSoftMarginTripletLoss):
    """``mean(softplus(max_p d(a, p) - min_n d(a, n)))``: :class:`BatchHardTripletLoss` without a margin to choose.

    Args:
        model: The SentenceTransformer to train.
        distance_metric: As for :class:`BatchHardTripletLoss`.
        options: See :class:`~chunked_embed.losses.Options`, and :class:`BatchHardTripletLoss`.

    Inputs: one column and a class per row, (N,).

    Reference: https://arxiv.org/abs/1703.07737

    Example:
        >>> import torch
        >>> from sentence_transformers import SentenceTransformer
        >>> from chunked_embed import losses
        >>> model = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")
        >>> loss = losses.BatchHardSoftMarginTripletLoss(model)
        >>> embeddings, labels = torch.randn(8, 384, requires_grad=True), torch.arange(8) // 2
        >>> loss.compute_loss_from_embeddings([embeddings], labels).backward()
    """

    _step = "batch_hard_triplet_soft_margin_loss"

    def __init__(
        self,
        model: SentenceTransformer,
        distance_metric: Callable[[Tensor], Tensor] = EUCLIDEAN,
        **options: Any,
    ) -> None:
        library.BatchHardSoftMarginTripletLoss.__init__(self, model, distance_metric)
        self._set_options(**options)

    def _mined(self, batch: Labelled, processes: Ranks) -> Tensor:
        return processes.share(batch.hard(0.0, soft=True))


class BatchSemiHardTripletLoss(BatchTripletLoss, library.BatchSemiHardTripletLoss):
    """``mean relu(d(a, p) - d(a, n) + margin)`` over all pairs of one label, n the nearest negative beyond p, or the
    farthest where none is beyond.

    Args:
        model: The SentenceTransformer to train.
        distance_metric: As for :class:`BatchHardTripletLoss`.
        margin: By how much the negative must be further away than the positive.
        options: See :class:`~chunked_embed.losses.Options`, and :class:`BatchHardTripletLoss`.

    Inputs: one column and a class per row, (N,).

    Reference: https://arxiv.org/abs/1503.03832

    Example:
        >>> import torch
        >>> from sentence_transformers import SentenceTransformer
        >>> from chunked_embed import losses
        >>> model = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")
        >>> loss = losses.BatchSemiHardTripletLoss(model, margin=1.0)
        >>> embeddings, labels = torch.randn(8, 384, requires_grad=True), torch.arange(8) // 2
        >>> loss.compute_loss_from_embeddings([embeddings], labels).backward()
    """

    _step = "batch_semi_hard_triplet_loss"
    _settings = ("margin",)

    def __init__(
        self,
        model: SentenceTransformer,
        distance_metric: Callable[[Tensor], Tensor] = EUCLIDEAN,
        margin: float = 5,
        **options: Any,
    ) -> None:
        library.BatchSemiHardTripletLoss.__init__(self, model, distance_metric, margin)
        checks.number("margin", margin)
        self._set_options(**options)

    def _mined(self, batch: Labelled, processes: Ranks) -> Tensor:
        return batch.semi_hard(self.margin) * len(processes.sizes)  # divided by the pairs of all processes already


class BatchAllTripletLoss(BatchTripletLoss, library.BatchAllTripletLoss):
    """The mean of ``d(a, p) - d(a, n) + margin`` over all triplets in which it is positive; zero where it is in none.

    A row's N^2 triplets take O(N log N).

    Args:
        model: The SentenceTransformer to train.
        distance_metric: As for :class:`BatchHardTripletLoss`.
        margin: By how much the negative must be further away than the positive.
        options: See :class:`~chunked_embed.losses.Options`, and :class:`BatchHardTripletLoss`.

    Inputs: one column and a class per row, (N,).

    Reference: https://arxiv.org/abs/1703.07737

    Example:
        >>> import torch
        >>> from sentence_transformers import SentenceTransformer
        >>> from chunked_embed import losses
        >>> model = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")
        >>> loss = losses.BatchAllTripletLoss(model, margin=1.0)
        >>> embeddings, labels = torch.randn(8, 384, requires_grad=True), torch.arange(8) // 2
        >>> loss.compute_loss_from_embeddings([embeddings], labels).backward()
    """

    _small = BY_TRIPLETS
    _step = "batch_all_triplet_loss"
    _settings = ("triplet_margin",)

    def _size(self, rows: int, width: int, columns: int) -> float:
        return super()._size(rows, width, columns) * rows

    def __init__(
        self,
        model: SentenceTransformer,
        distance_metric: Callable[[Tensor], Tensor] = EUCLIDEAN,
        margin: float = 5,
        **options: Any,
    ) -> None:
        library.BatchAllTripletLoss.__init__(self, model, distance_metric, margin)
        checks.number("margin", margin)
        self._set_options(**options)

    def _mined(self, batch: Labelled, processes: Ranks) -> Tensor:
        total, count = batch.all(self.triplet_margin)
        (count,) = processes.sum(count)
        return mean_over_triplets(total * len(processes.sizes), count)
