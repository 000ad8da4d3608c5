"""SPLADE: a loss of sparse embeddings, and what keeps them sparse."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from chunked_embed import checks
from chunked_embed.losses._around import Around
from chunked_embed.losses._base import OF_MINI_BATCHES, OPTIONS, ChunkedLoss
from chunked_embed.losses._compat import RandContext, SparseEncoder, embed_columns, sparse_library
from chunked_embed.losses._kinds import check_columns, check_model, is_ordinary, replaced
from chunked_embed.sparse.losses._inside import check_inner, check_regularizer
from chunked_embed.sparse.losses._places import Places, column, keeps_zeros, rows_of
from chunked_embed.sparse.losses.flops import FlopsLoss

_CACHED: Any = getattr(sparse_library, "CachedSpladeLoss", sparse_library.SpladeLoss)


class SpladeLoss(Around, sparse_library.SpladeLoss):
    """``loss + document_regularizer_weight * R(documents) + query_regularizer_weight * R(queries)``, R being FLOPS.

    No copy of the embeddings is made beside those that the loss makes. Of a mini-batch, its embeddings and their
    gradients are kept as the numbers that are not zero, where the model ends in a ``SpladePooling`` or
    ``SparseAutoEncoder`` and at most half of them are such.

    Args:
        model: The SparseEncoder to train.
        loss: A loss of embeddings: one of this module, or of the library's.
        document_regularizer_weight: Of all columns but the first.
        query_regularizer_weight: Of the first; None: it is left alone, as an inference-free query side is.
        document_regularizer: A loss of embeddings, (N, V) -> a number; None is :class:`FlopsLoss`.
        query_regularizer: Likewise.
        document_regularizer_threshold: Of the FlopsLoss that None stands for.
        query_regularizer_threshold: Likewise.
        use_document_regularizer_only: All columns are documents.
        options: See :class:`~chunked_embed.losses.Options`. Mini-batches are this loss's, all others those of the loss
            inside, which must then be one of ours. ``gather_across_devices`` is one of our regularisers as well.
            ``fuse_projection`` is none: a SparseEncoder ends in no Dense.

    Inputs: those of the loss inside. Returns a dict of terms, which the trainer adds up: "base_loss" (or the terms of
    the loss inside), "document_regularizer_loss", "query_regularizer_loss". With gradient caching they must be added up
    as they are: their gradients are taken together.

    Reference: https://huggingface.co/papers/2205.04733

    Example:
        >>> from sentence_transformers import SparseEncoder
        >>> from chunked_embed.sparse import losses
        >>> model = SparseEncoder("sentence-transformers/all-MiniLM-L6-v2")
        >>> inner = losses.SparseMultipleNegativesRankingLoss(model)
        >>> loss = losses.SpladeLoss(model, inner, 3e-5, 5e-5, mini_batch_size=64)
        >>> texts = ["A plane.", "A flute."], ["An aircraft.", "Music."]
        >>> terms = loss([model.preprocess(list(column)) for column in texts])
        >>> sum(terms.values()).backward()
        >>> sorted(terms)
        ['base_loss', 'document_regularizer_loss', 'query_regularizer_loss']
    """

    document_regularizer: Any
    query_regularizer: Any
    _takes = tuple(name for name in OPTIONS if name != "fuse_projection")
    _places: list[Places | None] | None = None  # of the mini-batches of a call, as they are embedded

    def __init__(
        self,
        model: SparseEncoder,
        loss: nn.Module,
        document_regularizer_weight: float,
        query_regularizer_weight: float | None = None,
        document_regularizer: nn.Module | None = None,
        query_regularizer: nn.Module | None = None,
        document_regularizer_threshold: int | None = None,
        query_regularizer_threshold: int | None = None,
        use_document_regularizer_only: bool = False,
        **options: Any,
    ) -> None:
        check_model(model)
        check_inner(loss, type(self).__name__)
        check_regularizer("document_regularizer", document_regularizer)
        check_regularizer("query_regularizer", query_regularizer)
        super().__init__(
            model,
            loss,
            checks.number("document_regularizer_weight", document_regularizer_weight),
            checks.number_or_none("query_regularizer_weight", query_regularizer_weight),
            _regularizer("document", model, document_regularizer, document_regularizer_threshold),
            _regularizer("query", model, query_regularizer, query_regularizer_threshold, use_document_regularizer_only),
            use_document_regularizer_only=use_document_regularizer_only,
        )
        self._set_options(**options)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "gather_across_devices":
            for regularizer in (self.document_regularizer, getattr(self, "query_regularizer", None)):
                if isinstance(regularizer, FlopsLoss):
                    regularizer.gather_across_devices = value

    def forward(  # type: ignore[override]
        self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        features = list(sentence_features)
        check_inner(self.loss, type(self).__name__)
        if self.uses_gradient_cache:
            return self._cached(features, labels)
        labels = self._targets(features, labels)
        embeddings = embed_columns(self.model, features, separate_first=not self.use_document_regularizer_only)
        return self.compute_loss_from_embeddings(embeddings, labels)

    def compute_loss_from_embeddings(  # type: ignore[override]
        self, embeddings: Iterable[Tensor], labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The terms of embeddings (one tensor (N, V) a column) and labels: a dict of scalars, differentiable once."""
        columns: list[Tensor] = list(embeddings) if is_ordinary(embeddings) else check_columns(embeddings)
        documents = columns if self.use_document_regularizer_only else columns[1:]
        if not documents:
            raise ValueError(
                f"{type(self).__name__} expects a query and its documents, got {len(columns)} columns: where all are "
                "documents, use_document_regularizer_only=True"
            )
        # Before the loss: then backward has its gradient first, and adds this one to it in place.
        of_documents = _regularized(self.document_regularizer, documents) * self.document_regularizer_weight
        of_queries = None
        if self.query_regularizer_weight is not None:
            of_queries = _regularized(self.query_regularizer, columns[:1]) * self.query_regularizer_weight
        found = cast(Any, self.loss).compute_loss_from_embeddings(columns, labels)
        terms = dict(found) if isinstance(found, dict) else {"base_loss": found}
        terms["document_regularizer_loss"] = of_documents
        if of_queries is not None:
            terms["query_regularizer_loss"] = of_queries
        return terms

    def get_config_dict(self) -> dict[str, Any]:
        extras = {name: value for name, value in self._changed_options().items() if name in OF_MINI_BATCHES}
        return {**super(ChunkedLoss, self).get_config_dict(), **extras}

    # --- gradient caching ---

    def _cached(self, features: list[dict[str, Tensor]], labels: Any) -> Any:
        own = replaced(self, "calculate_loss", "embed_minibatch", "embed_minibatch_iter")
        self._places = [] if torch.is_grad_enabled() and keeps_zeros(self.model) and not own else None
        try:
            return super()._cached(features, labels)
        finally:
            self._places = None

    def embed_minibatch(
        self,
        sentence_feature: dict[str, Tensor],
        begin: int,
        end: int,
        with_grad: bool,
        copy_random_state: bool,
        random_state: RandContext | None = None,
    ) -> tuple[Tensor, RandContext | None]:
        embeddings, state = super().embed_minibatch(
            sentence_feature, begin, end, with_grad, copy_random_state, random_state
        )
        places = getattr(random_state, "places", None)  # of the first pass, which the second one is given again
        if self._places is not None and state is not None:  # the first pass
            places = state.places = Places.of(embeddings)
            self._places.append(places)
        return (embeddings if places is None else places.read(embeddings)), state

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        if not any(self._places or ()):
            return super().calculate_loss(reps, labels, with_backward=with_backward)
        each = iter(self._places or ())
        places = [[next(each) for _ in parts] for parts in reps]
        columns = [column(parts, at).requires_grad_() for parts, at in zip(reps, places)]
        loss = super().calculate_loss([[whole] for whole in columns], labels, with_backward=with_backward)
        for whole, parts, at in zip(columns, reps, places):
            if whole.grad is not None:
                for part, grad in zip(parts, rows_of(whole.grad, at, parts)):
                    part.grad = grad
                whole.grad = None
        return loss


class CachedSpladeLoss(SpladeLoss, _CACHED):
    """:class:`SpladeLoss` with gradient caching by default. The mini-batches are the encoder's alone: the loss inside
    takes as large a chunk as memory allows.

    Args:
        mini_batch_size, mini_batch_num_tokens, show_progress_bar: See :class:`~chunked_embed.losses.Options`.
        model, loss, document_regularizer_weight, query_regularizer_weight, document_regularizer, query_regularizer,
            document_regularizer_threshold, query_regularizer_threshold, use_document_regularizer_only, options: As
            there.

    References: https://huggingface.co/papers/2205.04733, https://huggingface.co/papers/2101.06983

    Example:
        >>> from sentence_transformers import SparseEncoder
        >>> from chunked_embed.sparse import losses
        >>> model = SparseEncoder("sentence-transformers/all-MiniLM-L6-v2")
        >>> inner = losses.SparseMultipleNegativesRankingLoss(model)
        >>> loss = losses.CachedSpladeLoss(model, inner, 3e-5, 5e-5, mini_batch_size=2)
        >>> texts = ["A plane.", "A flute.", "Bread.", "A dog."], ["An aircraft.", "Music.", "A loaf.", "A puppy."]
        >>> terms = loss([model.preprocess(list(column)) for column in texts])
        >>> sum(terms.values()).backward()
    """

    def __init__(
        self,
        model: SparseEncoder,
        loss: nn.Module,
        document_regularizer_weight: float,
        query_regularizer_weight: float | None = None,
        document_regularizer: nn.Module | None = None,
        query_regularizer: nn.Module | None = None,
        document_regularizer_threshold: int | None = None,
        query_regularizer_threshold: int | None = None,
        use_document_regularizer_only: bool = False,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        show_progress_bar: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(
            model,
            loss,
            document_regularizer_weight,
            query_regularizer_weight,
            document_regularizer,
            query_regularizer,
            document_regularizer_threshold,
            query_regularizer_threshold,
            use_document_regularizer_only,
            mini_batch_size=mini_batch_size,
            mini_batch_num_tokens=mini_batch_num_tokens,
            show_progress_bar=show_progress_bar,
            **options,
        )


def _regularizer(
    side: str, model: Any, given: nn.Module | None, threshold: float | None, absent: bool = False
) -> nn.Module | None:
    """Of the documents or the queries: the one that is given, or FLOPS."""
    if threshold is not None and (given is not None or absent):
        instead = f"{side}_regularizer={type(given).__name__}" if given else "use_document_regularizer_only=True"
        raise ValueError(
            f"expected {side}_regularizer_threshold for the FlopsLoss that is there by default, got {threshold} beside "
            f"{instead}"
        )
    return FlopsLoss(model, threshold) if given is None and not absent else given


def _regularized(regularizer: Any, columns: list[Tensor]) -> Tensor:
    if isinstance(regularizer, FlopsLoss) and not replaced(regularizer, "compute_loss_from_embeddings"):
        return regularizer.compute_loss_from_embeddings(columns)
    return regularizer.compute_loss_from_embeddings(columns[0] if len(columns) == 1 else torch.cat(columns))
