"""GISTEmbed: in-batch negatives, less those that a guide model finds nearer than the positive."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor

from chunked_embed import checks
from chunked_embed import functional as CF
from chunked_embed.checks import POSITIVE
from chunked_embed.functional.arguments import widened
from chunked_embed.functional.guided import MARGIN_STRATEGIES
from chunked_embed.losses._bags import with_row_ends
from chunked_embed.losses._base import BY_PRODUCTS, ChunkedLoss
from chunked_embed.losses._compat import (
    SentenceTransformer,
    embed_columns,
    is_cosine,
    is_mean_cross_entropy,
    library,
    util,
)
from chunked_embed.losses._kinds import check_model, is_ordinary, replaced

Guide = Sequence[Tensor | Sequence[Tensor]]  # for each column its embeddings, whole or in mini-batches

# What the library's computation reads.
_READ = (
    *("temperature", "margin_strategy", "margin", "contrast_anchors", "contrast_positives", "gather_across_devices"),
    *("sim_matrix", "cross_entropy_loss"),
)


class _Guided(ChunkedLoss):
    """The guide's embeddings go where other losses have their labels, so that every path hands them on."""

    _small = BY_PRODUCTS
    _settings = ("temperature", "margin_strategy", "margin")
    model: Any
    guide: Any
    must_retokenize: bool
    temperature: float
    margin_strategy: str
    margin: float
    contrast_anchors: bool
    contrast_positives: bool
    similarity_fct: Callable[[Tensor, Tensor], Tensor]
    cross_entropy_loss: Callable[[Tensor, Tensor], Tensor]
    sim_matrix: Callable[[Tensor, Tensor], Tensor]

    def compute_loss_from_embeddings(self, embeddings: Iterable[Tensor], guide_embeddings: Any = None) -> Tensor:
        """The loss of embeddings and the guide's embeddings, one tensor (N, D) a column each."""
        return super().compute_loss_from_embeddings(embeddings, guide_embeddings)

    def _is_small(self, columns: list[Tensor], labels: Any) -> bool:
        one_each = is_ordinary(labels) and len(labels) == len(columns) and len(labels[0]) == len(columns[0])
        if not (one_each and labels[0].device == columns[0].device):
            return False
        wider = max(columns, labels, key=lambda side: side[0].shape[1])  # the guide's have a width of their own
        return super()._is_small(wider, None)

    def _size(self, rows: int, width: int, columns: int) -> float:
        return rows * rows * width * (columns - 1) if columns >= 2 and self._known else math.inf

    def _check_settings(self) -> None:
        checks.number("temperature", self.temperature, POSITIVE)
        checks.choice("margin_strategy", self.margin_strategy, MARGIN_STRATEGIES)
        checks.number("margin", self.margin)

    def _by_library(self, columns: list[Tensor], labels: list[Tensor]) -> Tensor:
        reps, guide = ([[column] for column in side] for side in (columns, [widened(x.detach()) for x in labels]))
        return self._plain(reps, guide, len(columns[0]))

    @property
    def _fusable(self) -> bool:
        return False

    @torch.no_grad()
    def _targets(self, features: list[dict[str, Tensor]], labels: Any) -> Any:
        """The guide's embeddings of all columns; in mini-batches where the model's are."""
        columns = [self._for_guide(column) for column in features]
        if not self.uses_gradient_cache:
            return embed_columns(self.guide, columns)
        return [_MiniBatches(self.guide, self).embed(column) for column in columns]

    def _for_guide(self, column: dict[str, Tensor]) -> dict[str, Tensor]:
        if not self.must_retokenize:
            return dict(column)  # a copy: models write their results into what they are given
        rows: Any = column["input_ids"]
        if "cu_seq_lens_q" in column:  # one sequence, which holds all rows
            bounds = column["cu_seq_lens_q"].tolist()
            tokens = rows[0].tolist()
            rows = [tokens[begin:end] for begin, end in itertools.pairwise(bounds)]
        texts = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return util.batch_to_device(self.guide.preprocess(texts), self.guide.device)

    @property
    def _known(self) -> bool:
        """Whether all that the library would call is what its constructor sets."""
        plain = is_mean_cross_entropy(self.cross_entropy_loss) and is_cosine(self.similarity_fct)
        return plain and not replaced(self, "sim_matrix")

    def _loss(self, embeddings: list[Tensor], labels: Any, **projection: Any) -> Tensor:
        guide = self._guide_columns(embeddings, labels)
        if not self._known:
            return self._plain([[column] for column in embeddings], [[column] for column in guide], len(embeddings[0]))
        return CF.guided_info_nce(
            *embeddings[:2],
            *guide[:2],
            hard_negatives=embeddings[2:],
            guide_hard_negatives=guide[2:],
            temperature=self.temperature,
            margin_strategy=self.margin_strategy,
            margin=self.margin,
            contrast_anchors=self.contrast_anchors,
            contrast_positives=self.contrast_positives,
            gather_across_devices=self.gather_across_devices,
            **self._chunking.keywords,
        )

    def calculate_loss(self, reps: Any, labels: Any = None, *, with_backward: bool = False) -> Tensor:
        if self._known or replaced(self, "compute_loss_from_embeddings"):
            return super().calculate_loss(reps, labels, with_backward=with_backward)
        guide = self._guide_columns(reps, labels)
        rows = self.mini_batch_size or len(guide[0])
        return self._plain(reps, [[column] for column in guide], rows, with_backward)

    def _guide_columns(self, embeddings: Sequence[Any], labels: Any) -> list[Tensor]:
        name = type(self).__name__
        if len(embeddings) < 2:
            raise ValueError(f"{name} expects an anchor, a positive and any negatives, got {len(embeddings)} columns")
        if labels is None or isinstance(labels, Tensor) or len(labels) != len(embeddings):
            got = type(labels).__name__ if labels is None or isinstance(labels, Tensor) else f"{len(labels)} of them"
            raise ValueError(
                f"{name} needs the guide's embeddings beside the model's, one tensor for each of the "
                f"{len(embeddings)} columns: compute_loss_from_embeddings(embeddings, guide_embeddings); got {got}"
            )
        return [column if isinstance(column, Tensor) else torch.cat(list(column)) for column in labels]

    def _plain(self, reps: Any, guide: Any, rows: int, with_backward: bool = False) -> Tensor:
        """The library's own computation, ``rows`` rows at a time, of a user's similarity or cross-entropy."""
        of = SimpleNamespace(**{name: getattr(self, name) for name in _READ})
        of.mini_batch_size, of.show_progress_bar = rows, self.show_progress_bar
        return library.CachedGISTEmbedLoss.calculate_loss(of, reps, guide, with_backward=with_backward)


class _MiniBatches(ChunkedLoss):
    """Embeds with another model in the mini-batches of a loss."""

    def __init__(self, model: Any, loss: ChunkedLoss) -> None:
        self.model = model
        self.mini_batch_size = loss.mini_batch_size
        self.mini_batch_num_tokens = loss.mini_batch_num_tokens
        self.show_progress_bar = loss.show_progress_bar

    def embed(self, column: dict[str, Tensor]) -> Tensor:
        parts = self.embed_minibatch_iter(with_row_ends(column), with_grad=False, copy_random_state=False)
        return torch.cat([embeddings for embeddings, *_ in parts])


class GISTEmbedLoss(_Guided, library.GISTEmbedLoss):
    """``-log(exp(s_ii) / sum of exp(s))`` with ``s = cos / temperature`` over the positive and those in-batch
    negatives that the guide does not find nearer than the positive.

    In memory of a chunk of rows, where the library's class holds N x N x D. Takes any number of negatives. With another
    ``similarity_fct`` or ``cross_entropy_loss``, set on the loss, it does what the library's class does.

    Args:
        model: The SentenceTransformer to train.
        guide: A SentenceTransformer that stays as it is. Where it reads other tokens, the texts are decoded for it.
        temperature: Divides the cosine similarities.
        margin_strategy: Negatives are left out whose similarity to the anchor under the guide is above that of the
            positive less ``margin`` ("absolute"), or less ``margin`` times its size ("relative").
        margin: See there.
        contrast_anchors: Compare anchors with anchors, too.
        contrast_positives: Compare positives with positives, too.
        gather_across_devices: Compare with the rows of all processes: the loss of the global batch. Anchors are
            gathered as well, which the library's class leaves out.
        options: See :class:`~chunked_embed.losses.Options`.

    Inputs: an anchor, a positive and any number of negatives; labels are ignored. ``compute_loss_from_embeddings``
    takes the guide's embeddings where other losses take labels.

    Reference: https://huggingface.co/papers/2402.16829

    Example:
        >>> import torch
        >>> from sentence_transformers import SentenceTransformer
        >>> from chunked_embed import losses
        >>> model = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")
        >>> guide = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")
        >>> loss = losses.GISTEmbedLoss(model, guide, margin=0.05)
        >>> a, b = (torch.randn(8, 384, requires_grad=True) for _ in range(2))  # embeddings, as a model gives them
        >>> of_guide = list(torch.randn(2, 8, 384))
        >>> loss.compute_loss_from_embeddings([a, b], of_guide).backward()
    """

    def __init__(
        self,
        model: SentenceTransformer,
        guide: SentenceTransformer,
        temperature: float = 0.01,
        margin_strategy: Literal["absolute", "relative"] = "absolute",
        margin: float = 0.0,
        contrast_anchors: bool = True,
        contrast_positives: bool = True,
        gather_across_devices: bool = False,
        **options: Any,
    ) -> None:
        check_model(model)
        check_model(guide, "guide")
        super().__init__(
            model,
            guide,
            temperature,
            margin_strategy=margin_strategy,
            margin=margin,
            contrast_anchors=contrast_anchors,
            contrast_positives=contrast_positives,
            gather_across_devices=gather_across_devices,
        )
        self._set_options(gather_across_devices=gather_across_devices, **options)


class CachedGISTEmbedLoss(_Guided, library.CachedGISTEmbedLoss):
    """:class:`GISTEmbedLoss`, embedded in mini-batches, by the guide as well.

    ``mini_batch_size`` bounds the models' memory and nothing else: the loss goes by ``chunk_size`` and
    ``max_chunk_bytes``.

    Args:
        mini_batch_size, mini_batch_num_tokens, show_progress_bar: See :class:`~chunked_embed.losses.Options`.
        model, guide, temperature, margin_strategy, margin, contrast_anchors, contrast_positives, options: As there.

    References: https://huggingface.co/papers/2402.16829, https://huggingface.co/papers/2101.06983

    Example:
        >>> from sentence_transformers import SentenceTransformer
        >>> from chunked_embed import losses
        >>> model = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")
        >>> guide = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")
        >>> loss = losses.CachedGISTEmbedLoss(model, guide, mini_batch_size=2)
        >>> texts = ["A plane.", "A flute.", "Bread.", "A dog."], ["An aircraft.", "Music.", "A loaf.", "A puppy."]
        >>> features = [model.preprocess(list(column)) for column in texts]
        >>> loss(features, labels=None).backward()
    """

    citation = library.GISTEmbedLoss.citation

    def __init__(
        self,
        model: SentenceTransformer,
        guide: SentenceTransformer,
        temperature: float = 0.01,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        show_progress_bar: bool = False,
        margin_strategy: Literal["absolute", "relative"] = "absolute",
        margin: float = 0.0,
        contrast_anchors: bool = True,
        contrast_positives: bool = True,
        gather_across_devices: bool = False,
        **options: Any,
    ) -> None:
        check_model(model)
        check_model(guide, "guide")
        super().__init__(
            model,
            guide,
            temperature,
            margin_strategy=margin_strategy,
            margin=margin,
            contrast_anchors=contrast_anchors,
            contrast_positives=contrast_positives,
            gather_across_devices=gather_across_devices,
        )
        self._set_options(
            mini_batch_size=mini_batch_size,
            mini_batch_num_tokens=mini_batch_num_tokens,
            show_progress_bar=show_progress_bar,
            gather_across_devices=gather_across_devices,
            **options,
        )

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        if replaced(self, "calculate_loss_and_cache_gradients"):
            raise TypeError(
                f"expected {type(self).__name__} to replace calculate_loss or compute_loss_from_embeddings, got a "
                "calculate_loss_and_cache_gradients of its own, which nothing calls"
            )
        return super().forward(sentence_features, labels)
