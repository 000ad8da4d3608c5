"""What the losses of token embeddings share: columns with masks, how they are embedded, gradient caching."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from chunked_embed import checks
from chunked_embed import functional as CF
from chunked_embed.functional.arguments import check_trained
from chunked_embed.functional.scored import gather_tokens
from chunked_embed.gather import ranks
from chunked_embed.losses._base import ChunkedLoss
from chunked_embed.losses._kinds import check_embeds_tokens, replaced
from chunked_embed.multi_vector.losses._compat import (
    cat_padded_token_embeddings,
    embed_columns_padded,
    library,
    stack_padded_token_embeddings,
)
from chunked_embed.multi_vector.losses._scores import Known, Layout, known

_CACHED: Any = library.CachedMultiVectorMultipleNegativesRankingLoss
Features = dict[str, Any]


class MultiVectorLoss(ChunkedLoss):
    """Mixed in before a loss of the library's module. A subclass states ``_masked_loss(embeddings, masks, labels)``.

    ``mini_batch_size`` is the library's: rows of a forward pass, all of whose activations are held. A class with
    ``_caches`` embeds twice instead.
    """

    _takes: ClassVar[tuple[str, ...]] = ("mini_batch_size", "gather_across_devices", "max_chunk_bytes")
    _own_options: ClassVar[tuple[str, ...]] = _takes
    _of_tokens = True
    _caches: ClassVar[bool] = False
    _layout: ClassVar[Layout]
    _columns: ClassVar[tuple[int, str]]  # how many there are at least, and which
    _labels_of_call: Any = None

    def _check_model(self, model: Any) -> None:
        check_embeds_tokens(model)

    @property
    def _in_mini_batches(self) -> bool:
        return self._caches and super()._in_mini_batches

    @property
    def uses_gradient_cache(self) -> bool:
        """Whether the batch is embedded in mini-batches, twice. Set to False, it is not, whatever their size."""
        return ChunkedLoss.uses_gradient_cache.fget(self)  # type: ignore[attr-defined]

    @uses_gradient_cache.setter
    def uses_gradient_cache(self, value: bool) -> None:
        if value and not self._caches:
            name = type(self).__name__
            raise ValueError(f"expected Cached{name} for gradient caching, got {name} and uses_gradient_cache=True")
        ChunkedLoss.uses_gradient_cache.fset(self, value)  # type: ignore[attr-defined]

    @property
    def _fusable(self) -> bool:
        return False

    @property
    def _known(self) -> Known | None:
        """What ``similarity_fct`` is of the library's."""
        return known(self.similarity_fct, self._layout)

    # --- embedding ---

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | None = None) -> Tensor:
        features = [dict(column) for column in sentence_features]
        self._check_count(len(features), "columns")
        if self.uses_gradient_cache:
            return self._cached(features, labels)
        labels = self._targets(features, labels)
        query, *documents = features
        first = self.model(query, task=query.get("task", "query"))
        rows = None if self._caches else self.mini_batch_size
        others, masks = embed_columns_padded(self.model, documents, rows, task_default="document")
        embeddings = [first["token_embeddings"], *others]
        return self.compute_loss_from_embeddings(embeddings, labels, [first["attention_mask"].bool(), *masks])

    def compute_loss_from_embeddings(
        self,
        embeddings: Iterable[Tensor],
        labels: Tensor | None = None,
        masks: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """The loss of embeddings of tokens, (N, T, H) a column, of labels, and of masks, (N, T) a column, of the tokens
        that count (None: all of them): a scalar, differentiable once."""
        return self._masked_loss(*self._checked(embeddings, masks), labels)

    def _checked(self, embeddings: Any, masks: Any) -> tuple[list[Tensor], list[Tensor]]:
        columns = checks.sequence("embeddings", embeddings if isinstance(embeddings, Sequence) else list(embeddings))
        self._check_count(len(columns), "columns of embeddings")
        for i, x in enumerate(columns):
            check_trained(f"embeddings[{i}]", x)
            shape = ("N", "T", "H") if i == 0 else (columns[0].shape[0], "T", columns[0].shape[2])
            checks.tensor(f"embeddings[{i}]", x, shape, device=columns[0].device)
        if not torch.is_autocast_enabled(columns[0].device.type):
            checks.one_dtype("the embeddings", {f"embeddings[{i}]": x.dtype for i, x in enumerate(columns)})
        if masks is None:
            return columns, [torch.ones_like(x[..., 0], dtype=torch.bool) for x in columns]
        found = checks.sequence("masks", masks)
        if len(found) != len(columns):
            raise ValueError(f"expected a mask for each of {len(columns)} columns of embeddings, got {len(found)}")
        for i, (x, mask) in enumerate(zip(columns, found)):
            checks.tensor(f"masks[{i}]", mask, tuple(x.shape[:2]), device=x.device, kind="real")
        return columns, [mask.bool() for mask in found]

    def _check_count(self, count: int, of: str) -> None:
        least, which = self._columns
        if count < least:
            raise ValueError(f"{type(self).__name__} expects at least {least} {of} ({which}), got {count}")

    def _masked_loss(self, embeddings: list[Tensor], masks: list[Tensor], labels: Tensor | None) -> Tensor:
        raise NotImplementedError

    # --- gradient caching: the library's, which knows of masks and tasks ---

    embed_minibatch = _CACHED.embed_minibatch
    embed_minibatch_iter = _CACHED.embed_minibatch_iter
    calculate_loss_and_cache_gradients = _CACHED.calculate_loss_and_cache_gradients

    def forward_cached(self, sentence_features: Iterable[Features], labels: Any = None) -> Tensor:
        self._labels_of_call = labels
        try:
            return _CACHED.forward(self, sentence_features)
        finally:
            self._labels_of_call = None

    def calculate_loss(  # type: ignore[override]
        self, reps: list[list[Tensor]], masks_chunks: list[list[Tensor]], *, with_backward: bool = False
    ) -> Tensor:
        """The loss of mini-batches of embeddings and their masks, as the library's cached class asks for it."""
        columns, masks = zip(*(cat_padded_token_embeddings(*column) for column in zip(reps, masks_chunks)))
        leaves = [leaf for column in reps for leaf in column]
        terms = []
        for part in self._parts(list(columns), list(masks), self._labels_of_call):
            terms.append(self._pulled(part, leaves) if with_backward else part)
        return torch.stack(terms).sum()

    def _parts(self, embeddings: list[Tensor], masks: list[Tensor], labels: Any) -> Iterator[Tensor]:
        """What the loss is the sum of, each with a graph of its own."""
        yield self.compute_loss_from_embeddings(embeddings, labels, masks)

    # --- scores ---

    def _chunk_bytes(self, score: Known) -> int | None:
        return score.max_chunk_bytes if self.max_chunk_bytes is None else self.max_chunk_bytes

    def _all_xtr(self, score: Known, queries: Tensor, query_mask: Tensor, documents: Tensor, mask: Tensor) -> Tensor:
        """Of queries with stacked documents (M, K, T, H), in the order in which the library has them: (N, M * K)."""
        return CF.xtr_scores(
            queries,
            documents.flatten(0, 1),
            query_mask,
            mask.flatten(0, 1),
            top_k=score.top_k or 1,
            max_chunk_bytes=self._chunk_bytes(score),
        )

    def _own_xtr(self, score: Known, embeddings: list[Tensor], masks: list[Tensor]) -> Tensor:  # (N, K)
        """Of queries with their own documents, tokens being retrieved among those of all documents."""
        (queries, *documents), (query_mask, *document_masks) = embeddings, masks
        processes = ranks(queries, self.gather_across_devices)
        pairs = [gather_tokens(processes, *pair) for pair in zip(documents, document_masks)]
        stacked, mask = stack_padded_token_embeddings([x for x, _ in pairs], [m for _, m in pairs])
        scores = self._all_xtr(score, queries, query_mask, stacked, mask)
        own = torch.arange(len(queries), device=queries.device) + processes.offset
        return scores.unflatten(1, (-1, len(documents)))[torch.arange(len(queries), device=queries.device), own]

    def _own_max_sim(self, score: Known, embeddings: list[Tensor], masks: list[Tensor]) -> Tensor:  # (N, K)
        (queries, *documents), (query_mask, *document_masks) = embeddings, masks
        options: dict[str, Any] = {"max_chunk_bytes": self._chunk_bytes(score)}
        options["length_normalize"] = score.length_normalize
        columns = [CF.max_sim_pairs(queries, x, query_mask, m, **options) for x, m in zip(documents, document_masks)]
        return torch.stack(columns, dim=1)

    def _replaced(self, name: str) -> bool:
        return replaced(self, name)


def check_scores(scores: Any, shape: tuple[int, ...], asked: str) -> Tensor:
    """What a ``similarity_fct`` of the user's own gave."""
    if not isinstance(scores, Tensor) or tuple(scores.shape) != shape:
        got = tuple(scores.shape) if isinstance(scores, Tensor) else checks.kind_of(scores)
        raise ValueError(f"expected similarity_fct to return {asked}, {shape}, got {got}")
    return scores


def start(loss: nn.Module, model: Any, similarity_fct: Any, default: Any) -> None:
    """What every constructor begins with."""
    nn.Module.__init__(loss)
    checks.function_or_none("similarity_fct", similarity_fct)
    loss.model = model
    loss.similarity_fct = default if similarity_fct is None else similarity_fct
