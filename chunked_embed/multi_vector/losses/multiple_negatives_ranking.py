"""InfoNCE of late interaction: every other document of the batch is a negative."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from chunked_embed import checks
from chunked_embed import functional as CF
from chunked_embed.checks import POSITIVE
from chunked_embed.functional.scored import ScoredContrast, check_two_sided, gather_tokens
from chunked_embed.gather import is_distributed, ranks
from chunked_embed.losses._learnable import LearnableScale, averaged
from chunked_embed.losses._texts import text_ids
from chunked_embed.losses.multiple_negatives_ranking import MultipleNegativesRankingLoss
from chunked_embed.multi_vector.losses._base import MultiVectorLoss, check_scores, start
from chunked_embed.multi_vector.losses._compat import (
    MultiVectorEncoder,
    library,
    scoring,
    stack_padded_token_embeddings,
)

Direction = Literal["query_to_doc", "doc_to_query"]
OURS: dict[str, Any] = {
    "directions": ("query_to_doc",),
    "partition_mode": "joint",
    "learnable_scale": False,
    "false_negatives": None,
}
"""Settings that the library lacks."""


class Ranking(LearnableScale, MultiVectorLoss):
    """What both classes are."""

    _takes: ClassVar[tuple[str, ...]] = ("mini_batch_size", "gather_across_devices", "chunk_size", "max_chunk_bytes")
    _own_options: ClassVar[tuple[str, ...]] = _takes
    _layout = "all"
    _columns = 2, "a query, its document, hard negatives"
    false_negatives: Literal["text", "labels"] | None = None
    score_mini_batch_size: int | None

    def _set(
        self,
        model: Any,
        scale: Any,
        similarity_fct: Any,
        directions: Any,
        partition_mode: Any,
        learnable_scale: bool,
        false_negatives: Any,
    ) -> None:
        start(self, model, similarity_fct, scoring.colbert_scores)
        checks.scalar("scale", scale, POSITIVE)
        checks.choice("false_negatives", false_negatives, (None, "text", "labels"))
        check_two_sided(directions, partition_mode)
        self.directions = (directions,) if isinstance(directions, str) else tuple(directions)
        self.partition_mode = partition_mode
        self.false_negatives = false_negatives
        self._set_scale(scale, learnable_scale)

    def get_config_dict(self) -> dict[str, Any]:
        ours = {name: getattr(self, name) for name, default in OURS.items() if getattr(self, name) != default}
        found = {**super().get_config_dict(), **ours}
        return found | {name: value for name, value in self._changed_options().items() if name not in found}

    def _targets(self, features: list[dict[str, Any]], labels: Any) -> Any:
        return text_ids(features, self.model) if self.false_negatives == "text" else labels

    _ids = MultipleNegativesRankingLoss._ids

    def _contrast(self, labels: Any, rows: int, columns: int) -> dict[str, Any]:
        """What there is to a contrast beside scores."""
        return {
            "scale": averaged(self.log_scale).exp() if self.learnable_scale else self.scale,
            "directions": self.directions,
            "partition_mode": self.partition_mode,
            **self._ids(labels, columns, rows),
        }

    def _masked_loss(self, embeddings: list[Tensor], masks: list[Tensor], labels: Tensor | None) -> Tensor:
        score = self._known
        if score is None or score.top_k is not None:
            return torch.stack([*self._scored(embeddings, masks, labels)]).sum()
        (queries, documents, *negatives), (query_mask, document_mask, *others) = embeddings, masks
        return CF.max_sim_info_nce(
            queries,
            documents,
            query_mask,
            document_mask,
            hard_negatives=negatives,
            hard_negative_masks=others,
            length_normalize=score.length_normalize,
            gather_across_devices=self.gather_across_devices,
            chunk_size=self._score_rows() if self.chunk_size is None else self.chunk_size,
            max_chunk_bytes=self._chunk_bytes(score),
            **self._contrast(labels, len(queries), len(embeddings)),
        )

    def _parts(self, embeddings: list[Tensor], masks: list[Tensor], labels: Any) -> Iterator[Tensor]:
        score = self._known
        name = "compute_loss_from_embeddings"
        own = name in vars(self) or self._replaced(name)  # of the user, or of a loss around this one
        # Gathered documents go back once: each part's way back would be a collective, and ranks have unlike numbers of
        # parts.
        together = self.gather_across_devices and is_distributed()
        if score is None and not (own or together):
            yield from self._scored(*self._checked(embeddings, masks), labels)
        else:
            yield from super()._parts(embeddings, masks, labels)

    def _scored(self, embeddings: list[Tensor], masks: list[Tensor], labels: Any) -> Iterator[Tensor]:
        """Shares of the loss, of scores that are formed and held: XTR's, or those of any other callable, which is
        called as the library calls it, with ``score_mini_batch_size`` queries at a time."""
        (queries, *documents), (query_mask, *document_masks) = embeddings, masks
        n, lists = len(queries), len(documents)
        processes = ranks(queries, self.gather_across_devices)
        contrast = ScoredContrast(queries, lists, processes, **self._contrast(labels, n, len(embeddings)))
        pairs = [gather_tokens(processes, *pair) for pair in zip(documents, document_masks)]
        stacked, mask = stack_padded_token_embeddings([x for x, _ in pairs], [m for _, m in pairs])
        score, step = self._known, self.score_mini_batch_size
        if score is not None or step is None or contrast.both_ways:
            step = len(queries)
        for begin in range(0, len(queries), step):
            part = slice(begin, min(begin + step, len(queries)))
            if score is None:
                scores = self.similarity_fct(queries[part], stacked, queries_mask=query_mask[part], documents_mask=mask)
                shape = (part.stop - begin, len(stacked) * lists)
                scores = check_scores(scores, shape, "a score of each query with each document")
            else:
                scores = self._all_xtr(score, queries[part], query_mask[part], stacked, mask)
            # From the documents of one query after those of another, to one list after another.
            scores = scores.unflatten(1, (-1, lists)).transpose(1, 2).flatten(1) if lists > 1 else scores
            yield contrast.loss(scores, None if step == len(queries) else part)

    def _score_rows(self) -> int | None:
        """Queries of a chunk, where the user has asked for some."""
        return self.score_mini_batch_size


class MultiVectorMultipleNegativesRankingLoss(Ranking, library.MultiVectorMultipleNegativesRankingLoss):
    """``mean over i of  log Z_i - s(q_i, d_i)`` with ``s = scale * MaxSim``, and Z the sum of exp(s) over all documents
    of the batch. See :func:`chunked_embed.functional.max_sim_info_nce`.

    Args:
        model: The MultiVectorEncoder to train.
        scale: Factor on the score, an inverse temperature.
        similarity_fct: Scores of all queries with all documents, (N, Q, H), (N, K, D, H) -> (N, N * K), as the library
            calls it. None is ``scoring.colbert_scores``. That, ``mean_colbert_scores``, ``xtr_scores`` and
            ``XTRScores``, and a ``functools.partial`` of settings of these, are computed here; any other callable is
            called.
        mini_batch_size: Rows of a forward pass, all of whose activations are held.
        score_mini_batch_size: Queries that are scored at a time. Of MaxSim it stands for ``chunk_size``.
        gather_across_devices: Compare with the documents of all processes (and queries, with "doc_to_query").
        directions: Which scores Z sums over: "query_to_doc", and "doc_to_query" beside it.
        partition_mode: "joint", one Z, or "per_direction", one for each.
        learnable_scale: Train the scale: ``log_scale`` is a parameter of the loss, which the trainer finds and which is
            averaged over processes. A checkpoint of the model does not hold it.
        false_negatives: What is known to be no negative: "text" leaves out candidates whose text is that of the row's
            own query or document, and those of rows with the row's query; "labels" those of rows with the row's label
            (integers). Texts are equal whose inputs are, prompts included.
        options: ``chunk_size`` and ``max_chunk_bytes``: see :class:`~chunked_embed.losses.Options`.

    Inputs: a query, its document and any number of hard negatives. Labels are ignored, but for ``false_negatives``.

    References: https://huggingface.co/papers/1705.00652, https://huggingface.co/papers/2004.12832

    Example:
        >>> import torch
        >>> from chunked_embed.multi_vector import losses
        >>> loss = losses.MultiVectorMultipleNegativesRankingLoss(model=None)  # of given embeddings; else an encoder
        >>> queries = torch.randn(8, 5, 16, requires_grad=True)  # tokens, as a model gives them
        >>> documents = torch.randn(8, 9, 16, requires_grad=True)
        >>> masks = [torch.ones(8, 5), torch.arange(9) < torch.randint(1, 9, (8, 1))]
        >>> loss.compute_loss_from_embeddings([queries, documents], masks=masks).backward()
    """

    def __init__(
        self,
        model: MultiVectorEncoder,
        *,
        scale: float = 1.0,
        similarity_fct: Callable[..., Tensor] | None = None,
        mini_batch_size: int | None = None,
        score_mini_batch_size: int | None = None,
        gather_across_devices: bool = False,
        directions: tuple[Direction, ...] = ("query_to_doc",),
        partition_mode: Literal["joint", "per_direction"] = "joint",
        learnable_scale: bool = False,
        false_negatives: Literal["text", "labels"] | None = None,
        **options: Any,
    ) -> None:
        self._set(model, scale, similarity_fct, directions, partition_mode, learnable_scale, false_negatives)
        self.score_mini_batch_size = checks.integer_or_none("score_mini_batch_size", score_mini_batch_size, low=1)
        self._set_options(mini_batch_size=mini_batch_size, gather_across_devices=gather_across_devices, **options)


class CachedMultiVectorMultipleNegativesRankingLoss(Ranking, library.CachedMultiVectorMultipleNegativesRankingLoss):
    """:class:`MultiVectorMultipleNegativesRankingLoss` with gradient caching: the batch is embedded in mini-batches,
    twice, and the activations of one are held. The mini-batches are the encoder's alone: MaxSim takes as large a chunk
    as memory allows.

    Args:
        mini_batch_size: Rows of a mini-batch. None, set later, embeds at once.
        mini_batch_num_tokens: The same, in mini-batches of at most this many tokens.
        score_mini_batch_size: Queries that are scored at a time, by default ``mini_batch_size``; of MaxSim it stands
            for ``chunk_size``, but for that default.
        show_progress_bar: Show one while mini-batches are embedded.
        model, scale, similarity_fct, gather_across_devices, directions, partition_mode, learnable_scale,
            false_negatives, options: As there.

    References: https://huggingface.co/papers/1705.00652, https://huggingface.co/papers/2101.06983

    Example:
        >>> import torch
        >>> from chunked_embed.multi_vector import losses
        >>> loss = losses.CachedMultiVectorMultipleNegativesRankingLoss(model=None, mini_batch_size=64)
        >>> queries = torch.randn(8, 5, 16, requires_grad=True)  # tokens, as a model gives them
        >>> documents = torch.randn(8, 9, 16, requires_grad=True)
        >>> loss.compute_loss_from_embeddings([queries, documents]).backward()
        >>> loss.mini_batch_size = 128  # counts from the next call on
    """

    _takes: ClassVar[tuple[str, ...]] = (*Ranking._takes, "mini_batch_num_tokens", "show_progress_bar")
    _own_options: ClassVar[tuple[str, ...]] = _takes
    _caches = True

    def __init__(
        self,
        model: MultiVectorEncoder,
        *,
        scale: float = 1.0,
        similarity_fct: Callable[..., Tensor] | None = None,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        score_mini_batch_size: int | None = None,
        gather_across_devices: bool = False,
        show_progress_bar: bool = False,
        directions: tuple[Direction, ...] = ("query_to_doc",),
        partition_mode: Literal["joint", "per_direction"] = "joint",
        learnable_scale: bool = False,
        false_negatives: Literal["text", "labels"] | None = None,
        **options: Any,
    ) -> None:
        self._set(model, scale, similarity_fct, directions, partition_mode, learnable_scale, false_negatives)
        checks.integer_or_none("score_mini_batch_size", score_mini_batch_size, low=1)
        self.score_mini_batch_size = mini_batch_size if score_mini_batch_size is None else score_mini_batch_size
        self._set_options(
            mini_batch_size=mini_batch_size,
            mini_batch_num_tokens=mini_batch_num_tokens,
            show_progress_bar=show_progress_bar,
            gather_across_devices=gather_across_devices,
            **options,
        )

    def _score_rows(self) -> int | None:
        return None if self.score_mini_batch_size == self.mini_batch_size else self.score_mini_batch_size
