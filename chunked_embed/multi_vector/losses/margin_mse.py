"""MarginMSE of late interaction: the teacher's margins between a positive and its negatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from chunked_embed import checks
from chunked_embed.functional.arguments import widened
from chunked_embed.gather import gather_rows
from chunked_embed.losses._base import OF_MINI_BATCHES
from chunked_embed.losses._pairwise import AlignedLoss
from chunked_embed.losses.margin_mse import MarginMSELoss
from chunked_embed.multi_vector.losses._base import MultiVectorLoss, check_scores
from chunked_embed.multi_vector.losses._compat import MultiVectorEncoder, library


class MultiVectorMarginMSELoss(MultiVectorLoss, AlignedLoss, library.MultiVectorMarginMSELoss):
    """``mean((s(query, positive) - s(query, negative_k) - margin_k)^2)`` over queries and negatives, ``s`` MaxSim. See
    :func:`chunked_embed.functional.max_sim_pairs`.

    Args:
        model: The MultiVectorEncoder to train.
        similarity_fct: Scores of queries with a document each, (N, Q, H), (N, D, H) -> (N,), as the library calls it.
            None is ``scoring.colbert_scores_pairwise``. That, ``mean_colbert_scores_pairwise`` and
            ``xtr_scores_pairwise``, and a ``functools.partial`` of settings of these, are computed here; any other
            callable is called.
        mini_batch_size: Rows of a forward pass, all of whose activations are held.
        options: ``gather_across_devices`` (XTR retrieves from the documents of all processes, then) and
            ``max_chunk_bytes``: see :class:`~chunked_embed.losses.Options`.

    Inputs: a query, a positive and K negatives; labels are the teacher's margins, (N, K) or, for one negative, (N,), or
    its scores of the positive and the negatives, (N, K + 1).

    Reference: https://huggingface.co/papers/2010.02666

    Example:
        >>> import torch
        >>> from chunked_embed.multi_vector import losses
        >>> loss = losses.MultiVectorMarginMSELoss(model=None)  # of given embeddings; else an encoder
        >>> query, positive, negative = (torch.randn(8, t, 16, requires_grad=True) for t in (5, 9, 12))
        >>> loss.compute_loss_from_embeddings([query, positive, negative], torch.rand(8)).backward()
    """

    _layout = "pairs"
    _columns = 3, "a query, a positive, negatives"

    def __init__(
        self,
        model: MultiVectorEncoder,
        *,
        similarity_fct: Callable[..., Tensor] | None = None,
        mini_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        checks.function_or_none("similarity_fct", similarity_fct)
        super().__init__(model, similarity_fct=similarity_fct)
        self._set_options(mini_batch_size=mini_batch_size, **options)

    _margins = MarginMSELoss._margins
    _teacher = MarginMSELoss._teacher

    def _masked_loss(self, embeddings: list[Tensor], masks: list[Tensor], labels: Tensor | None) -> Tensor:
        expected = self._margins(labels, len(embeddings[0]), len(embeddings) - 2)
        scores = self._candidates(embeddings, masks)
        margins, expected = scores[:, :1] - scores[:, 1:], expected.to(scores.dtype)
        if self.gather_across_devices:
            margins, expected = gather_rows(margins, expected)
        return self.loss_function(margins, expected)

    def _candidates(self, embeddings: list[Tensor], masks: list[Tensor]) -> Tensor:  # (N, 1 + K)
        score = None if self._replaced("_score") else self._known
        if score is not None and score.top_k is None:
            return self._own_max_sim(score, embeddings, masks)
        (query, *documents), (query_mask, *document_masks) = embeddings, masks
        columns = []
        for x, mask in zip(documents, document_masks):
            if score is not None:  # of one column's documents, as the library has it
                columns.append(self._own_xtr(score, [query, x], [query_mask, mask])[:, 0])
            else:
                found = self._score(query, x, query_mask, mask)
                columns.append(widened(check_scores(found, (len(query),), "a score of each pair")))
        return torch.stack(columns, dim=1)


class CachedMultiVectorMarginMSELoss(MultiVectorMarginMSELoss):
    """:class:`MultiVectorMarginMSELoss` with gradient caching, which the library has for none of its losses of
    teachers: the batch is embedded in mini-batches, twice, and the activations of one are held.

    Args:
        mini_batch_size: Rows of a mini-batch. None, set later, embeds at once.
        mini_batch_num_tokens: The same, in mini-batches of at most this many tokens.
        show_progress_bar: Show one while mini-batches are embedded.
        model, similarity_fct, options: As there.

    References: https://huggingface.co/papers/2010.02666, https://huggingface.co/papers/2101.06983

    Example:
        >>> import torch
        >>> from chunked_embed.multi_vector import losses
        >>> loss = losses.CachedMultiVectorMarginMSELoss(model=None, mini_batch_size=16)
        >>> query, positive, negative = (torch.randn(8, t, 16, requires_grad=True) for t in (5, 9, 12))
        >>> loss.compute_loss_from_embeddings([query, positive, negative], torch.rand(8)).backward()
    """

    _takes: ClassVar[tuple[str, ...]] = (*MultiVectorLoss._takes, *OF_MINI_BATCHES[1:])
    _own_options: ClassVar[tuple[str, ...]] = _takes
    _caches = True

    def __init__(
        self,
        model: MultiVectorEncoder,
        *,
        similarity_fct: Callable[..., Tensor] | None = None,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        show_progress_bar: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(
            model,
            similarity_fct=similarity_fct,
            mini_batch_size=mini_batch_size,
            mini_batch_num_tokens=mini_batch_num_tokens,
            show_progress_bar=show_progress_bar,
            **options,
        )
