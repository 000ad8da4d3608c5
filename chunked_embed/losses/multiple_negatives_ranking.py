"""InfoNCE over the batch: every other text's document is a negative."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn

from chunked_embed import checks
from chunked_embed import functional as CF
from chunked_embed.checks import NOT_NEGATIVE, POSITIVE
from chunked_embed.functional.contrastive import HARDNESS_MODES, check_directions
from chunked_embed.losses._around import Around
from chunked_embed.losses._base import BY_SIMILARITIES, ChunkedLoss
from chunked_embed.losses._compat import SentenceTransformer, callable_name, known_matrix, library, util
from chunked_embed.losses._learnable import LearnableScale, averaged
from chunked_embed.losses._texts import text_ids

Direction = Literal["query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"]
HardnessMode = Literal["in_batch_negatives", "hard_negatives", "all_negatives"]
HYPERPARAMETERS = ("scale", "similarity_fct", "directions", "partition_mode", "hardness_mode", "hardness_strength")
BOTH_WAYS: dict[str, Any] = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}

# Deprecated in the library, which may drop them.
_SYMMETRIC: Any = getattr(library, "MultipleNegativesSymmetricRankingLoss", library.MultipleNegativesRankingLoss)
_CACHED_SYMMETRIC: Any = getattr(
    library, "CachedMultipleNegativesSymmetricRankingLoss", library.CachedMultipleNegativesRankingLoss
)

logger = logging.getLogger(__name__)


class MultipleNegativesRankingLoss(LearnableScale, ChunkedLoss, library.MultipleNegativesRankingLoss):
    """``mean over i of  log Z_i - s(q_i, d_i)`` with ``s = scale * similarity``, and Z the sum of exp(s) over the
    candidates in the batch. See :func:`chunked_embed.functional.info_nce`.

    Args:
        model: The SentenceTransformer to train.
        scale: Factor on the similarity, an inverse temperature.
        similarity_fct: Similarity of every row of one batch with every row of another, (N, D), (M, D) -> (N, M).
            ``util.cos_sim`` and ``util.dot_score`` run fused and chunked, any other callable chunked, through ordinary
            autograd.
        gather_across_devices: Compare with the rows of all processes, in both ways: the loss of the global batch.
        directions: Which similarities Z sums over; "query_to_doc" is one of them.
        partition_mode: "joint", one Z, or "per_direction", one for each of "query_to_doc" and "doc_to_query".
        hardness_mode: Which documents' logits are raised by ``hardness_strength * similarity``, detached.
        hardness_strength: See there.
        learnable_scale: Train the scale: ``log_scale`` is a parameter of the loss, which the trainer finds and which is
            averaged over processes. A checkpoint of the model does not hold it.
        false_negatives: What is known to be no negative: "text" leaves out candidates whose text is that of the row's
            own query or document, and those of rows with the row's query; "labels" those of rows with the row's label
            (integers). Texts are equal whose inputs are: tokens, prompt and special tokens included, and images or
            sound. An input that does not say which rows it belongs to is refused. Columns whose routes (of a Router)
            have unlike vocabularies have no texts in common.
        options: See :class:`~chunked_embed.losses.Options`.

    Inputs: an anchor, a positive and any number of hard negatives. Labels are ignored, but for ``false_negatives``.

    Example:
        >>> import torch
        >>> from sentence_transformers import SentenceTransformer
        >>> from chunked_embed import losses
        >>> model = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")
        >>> loss = losses.MultipleNegativesRankingLoss(model, directions=("query_to_doc", "doc_to_query"))
        >>> a, b = (torch.randn(8, 384, requires_grad=True) for _ in range(2))  # embeddings, as a model gives them
        >>> loss.compute_loss_from_embeddings([a, b]).backward()
    """

    _small = BY_SIMILARITIES
    _settings = ("scale", "directions", "partition_mode", "hardness_mode", "hardness_strength")
    false_negatives: Literal["text", "labels"] | None = None

    def __init__(
        self,
        model: SentenceTransformer,
        scale: float = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = util.cos_sim,
        gather_across_devices: bool = False,
        directions: tuple[Direction, ...] = ("query_to_doc",),
        partition_mode: Literal["joint", "per_direction"] = "joint",
        hardness_mode: HardnessMode | None = None,
        hardness_strength: float = 0.0,
        *,
        learnable_scale: bool = False,
        false_negatives: Literal["text", "labels"] | None = None,
        **options: Any,
    ) -> None:
        nn.Module.__init__(self)  # not the library's constructor, whose arguments grew from version to version
        checks.scalar("scale", scale, POSITIVE)
        checks.function("similarity_fct", similarity_fct)
        checks.choice("hardness_mode", hardness_mode, (None, *HARDNESS_MODES))
        checks.number("hardness_strength", hardness_strength, NOT_NEGATIVE)
        checks.choice("false_negatives", false_negatives, (None, "text", "labels"))
        check_directions(directions, partition_mode)
        if hardness_mode is not None and hardness_strength == 0:
            logger.warning("hardness_mode=%r has no effect without a hardness_strength above 0", hardness_mode)
        self.model = model
        self.similarity_fct = similarity_fct
        self.directions = (directions,) if isinstance(directions, str) else tuple(directions)
        self.partition_mode = partition_mode
        self.hardness_mode = hardness_mode
        self.hardness_strength = hardness_strength
        self.false_negatives = false_negatives
        self._set_scale(scale, learnable_scale)
        self._set_options(gather_across_devices=gather_across_devices, **options)

    @property
    def _similarity(self) -> str | None:
        return known_matrix(self.similarity_fct)

    @property
    def _fusable(self) -> bool:
        return self._similarity is not None

    @property
    def _normalizes(self) -> bool:
        return self._similarity == "cosine"

    def _targets(self, features: list[dict[str, Tensor]], labels: Tensor | None) -> Tensor | None:
        return text_ids(features, self.model) if self.false_negatives == "text" else labels

    def _size(self, rows: int, width: int, columns: int) -> float:
        ours = self.learnable_scale or self.false_negatives is not None or isinstance(self.scale, Tensor)
        if ours or columns < 2 or self._similarity is None:
            return math.inf
        return rows * rows * (columns - 1) * len(self.directions)

    def _check_settings(self) -> None:
        checks.scalar("scale", self.scale, POSITIVE)
        check_directions(self.directions, self.partition_mode)
        checks.choice("hardness_mode", self.hardness_mode, (None, *HARDNESS_MODES))
        checks.number("hardness_strength", self.hardness_strength, NOT_NEGATIVE)

    def _loss(self, embeddings: list[Tensor], labels: Tensor | None, **projection: Any) -> Tensor:
        if len(embeddings) < 2:
            raise ValueError(f"{type(self).__name__} expects at least 2 columns of embeddings, got {len(embeddings)}")
        queries, documents, *negatives = embeddings
        return CF.info_nce(
            queries,
            documents,
            hard_negatives=negatives,
            scale=averaged(self.log_scale).exp() if self.learnable_scale else self.scale,
            similarity=self._similarity or self.similarity_fct,
            directions=self.directions,
            partition_mode=self.partition_mode,
            hardness_mode=self.hardness_mode,
            hardness_strength=self.hardness_strength,
            gather_across_devices=self.gather_across_devices,
            **self._ids(labels, len(embeddings), len(queries)),
            **projection,
            **self._chunking.keywords,
        )

    def _ids(self, labels: Tensor | None, columns: int, rows: int) -> dict[str, Any]:
        """What ``_targets`` or the labels say about the texts: which are the same."""
        if self.false_negatives is None:
            return {}
        shape = (rows, columns) if self.false_negatives == "text" else (rows,)
        if labels is not None:
            checks.tensor("labels", labels, kind="real")
        if labels is None or labels.is_floating_point() or tuple(labels.shape) not in {shape, (*shape, 1)}:
            got = "None" if labels is None else f"{tuple(labels.shape)}, {labels.dtype}"
            what = "an id for each text" if self.false_negatives == "text" else "a label for each row"
            raise ValueError(f"false_negatives={self.false_negatives!r} needs {what}, integers {shape}, got {got}")
        if self.false_negatives == "labels":
            return {"query_ids": labels.view(rows).long()}
        ids = labels.view(shape)
        return {"query_ids": ids[:, 0], "document_ids": ids[:, 1:], "shared_ids": True}

    def get_config_dict(self) -> dict[str, Any]:
        config = {
            "scale": self.scale,
            "similarity_fct": callable_name(self.similarity_fct),
            "gather_across_devices": self.gather_across_devices,
            "directions": self.directions,
            "partition_mode": self.partition_mode,
            "hardness_mode": self.hardness_mode,
            "hardness_strength": self.hardness_strength,
        }
        ours = {"learnable_scale": self.learnable_scale, "false_negatives": self.false_negatives}
        return config | {name: value for name, value in ours.items() if value} | self._changed_options()


class MultipleNegativesSymmetricRankingLoss(MultipleNegativesRankingLoss, _SYMMETRIC):
    """MultipleNegativesRankingLoss in both directions, each with a softmax of its own (CLIP's loss): row and column
    sums of one similarity matrix.

    Example:
        >>> import torch
        >>> from sentence_transformers import SentenceTransformer
        >>> from chunked_embed import losses
        >>> model = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")
        >>> loss = losses.MultipleNegativesSymmetricRankingLoss(model)
        >>> a, b = (torch.randn(8, 384, requires_grad=True) for _ in range(2))  # embeddings, as a model gives them
        >>> loss.compute_loss_from_embeddings([a, b]).backward()
    """

    def __init__(
        self,
        model: SentenceTransformer,
        scale: float = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = util.cos_sim,
        gather_across_devices: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(model, scale, similarity_fct, gather_across_devices, **BOTH_WAYS, **options)


class CachedMultipleNegativesRankingLoss(Around, library.CachedMultipleNegativesRankingLoss):
    """MultipleNegativesRankingLoss with gradient caching by default. The mini-batches are the encoder's alone: the loss
    takes as large a chunk as memory allows.

    Like the library's class it holds the loss without mini-batches, ``self.loss``, and shows that one's attributes.

    Example:
        >>> import torch
        >>> from sentence_transformers import SentenceTransformer
        >>> from chunked_embed import losses
        >>> model = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")
        >>> loss = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=64)
        >>> a, b = (torch.randn(8, 384, requires_grad=True) for _ in range(2))  # embeddings, as a model gives them
        >>> loss.compute_loss_from_embeddings([a, b]).backward()
        >>> loss.scale = 30.0  # counts from the next call on
    """

    loss: MultipleNegativesRankingLoss
    _shown = (*HYPERPARAMETERS, "temperature", "learnable_scale", "log_scale", "false_negatives")
    _defaults = {"learnable_scale": (False,), "false_negatives": (None,)}

    def __init__(
        self,
        model: SentenceTransformer,
        scale: float = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = util.cos_sim,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        gather_across_devices: bool = False,
        directions: tuple[Direction, ...] = ("query_to_doc",),
        partition_mode: Literal["joint", "per_direction"] = "joint",
        show_progress_bar: bool = False,
        hardness_mode: HardnessMode | None = None,
        hardness_strength: float = 0.0,
        **options: Any,
    ) -> None:
        nn.Module.__init__(self)
        self.model = model
        self.loss = MultipleNegativesRankingLoss(
            model,
            scale,
            similarity_fct,
            gather_across_devices,
            directions,
            partition_mode,
            hardness_mode,
            hardness_strength,
            **options,
        )
        self._set_options(
            mini_batch_size=mini_batch_size,
            mini_batch_num_tokens=mini_batch_num_tokens,
            show_progress_bar=show_progress_bar,
        )

    # Of what this class shows, so that a subclass's attributes count.
    _small = BY_SIMILARITIES
    _library = library.MultipleNegativesRankingLoss.compute_loss_from_embeddings
    _settings = MultipleNegativesRankingLoss._settings
    _check_settings = MultipleNegativesRankingLoss._check_settings
    _size = MultipleNegativesRankingLoss._size
    _loss = MultipleNegativesRankingLoss._loss
    _ids = MultipleNegativesRankingLoss._ids
    _similarity = MultipleNegativesRankingLoss._similarity

    def get_config_dict(self) -> dict[str, Any]:
        return library.CachedMultipleNegativesRankingLoss.get_config_dict(self) | self.loss.get_config_dict()


class CachedMultipleNegativesSymmetricRankingLoss(CachedMultipleNegativesRankingLoss, _CACHED_SYMMETRIC):
    """MultipleNegativesSymmetricRankingLoss with gradient caching by default.

    Example:
        >>> import torch
        >>> from sentence_transformers import SentenceTransformer
        >>> from chunked_embed import losses
        >>> model = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")
        >>> loss = losses.CachedMultipleNegativesSymmetricRankingLoss(model, mini_batch_size=64)
        >>> a, b = (torch.randn(8, 384, requires_grad=True) for _ in range(2))  # embeddings, as a model gives them
        >>> loss.compute_loss_from_embeddings([a, b]).backward()
    """

    def __init__(
        self,
        model: SentenceTransformer,
        scale: float = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = util.cos_sim,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        gather_across_devices: bool = False,
        show_progress_bar: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(
            model,
            scale,
            similarity_fct,
            mini_batch_size,
            mini_batch_num_tokens,
            gather_across_devices,
            show_progress_bar=show_progress_bar,
            **BOTH_WAYS,
            **options,
        )
