"""What every loss here shares: the options, the three ways to embed a batch, gradient caching, what a user replaces."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, fields
from itertools import repeat
from operator import is_not
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from chunked_embed import checks
from chunked_embed.chunking import Chunking
from chunked_embed.functional.arguments import widened
from chunked_embed.gather import is_distributed
from chunked_embed.losses._attach import attach, gradients, leaves_behind
from chunked_embed.losses._bags import bag_slice, is_bag, with_row_ends
from chunked_embed.losses._card import sign_cards
from chunked_embed.losses._compat import LEAVES_SMALL, CachedLossMixin, RandContext, embed_columns
from chunked_embed.losses._kinds import check_columns, check_model, is_ordinary, replaced
from chunked_embed.losses._tail import NO_TAIL, Tail, find_tail

sign_cards()


@dataclass(frozen=True, kw_only=True)
class Options:
    """The keyword-only options of every loss.

    Args:
        mini_batch_size: Embed the batch in mini-batches of this many rows, twice, and hold the activations of one only
            (gradient caching). The loss still sees the whole batch. None embeds it at once.
        mini_batch_num_tokens: The same, in mini-batches of at most this many tokens.
        show_progress_bar: Show one while mini-batches are embedded.
        gather_across_devices: Compute the loss of the global batch. Losses over aligned rows gather scores and labels
            (N numbers), those that compare all rows with all gather the embeddings. Under DistributedDataParallel the
            gradient is the one that a single process with the whole batch would have.
        chunk_size: Rows per chunk of the loss; None derives them from ``max_chunk_bytes``.
        max_chunk_bytes: Byte budget of one chunk; None takes the package's default.
        compiled: Compile the step of a chunk; None: where the batch is large enough for it to pay. The numbers are the
            same either way.
        float32_outputs: Products of half-precision embeddings write float32 similarities. False rounds them, for less
            time and memory, and at a cost in digits: see ``FlexChunkLoss``.
        fuse_projection: Run the model's trailing ``Dense`` and ``Normalize`` inside the chunk, not on the whole batch.
            "auto" does so for many rows where it is known to be safe, True raises a ValueError with the reason where it
            is not. With mini-batches they stay in the model, where a mini-batch bounds them already: True is refused
            there.

    Without ``chunk_size``, ``max_chunk_bytes``, ``compiled`` and ``float32_outputs=False`` small batches are left to
    the library's own computation, where that is the faster one. Each of them asks for ours, whatever the size.

    All of them may be set on the loss afterwards, and are checked then as in the constructor.

    Example:
        >>> from sentence_transformers import SentenceTransformer
        >>> from chunked_embed import losses
        >>> model = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")
        >>> loss = losses.CoSENTLoss(model, mini_batch_size=64, chunk_size=1024)
        >>> loss.mini_batch_size = None  # counts from the next call on
        >>> loss.get_config_dict()
        {'scale': 20.0, 'similarity_fct': 'pairwise_cos_sim', 'chunk_size': 1024}
    """

    mini_batch_size: int | None = None
    mini_batch_num_tokens: int | None = None
    show_progress_bar: bool = False
    gather_across_devices: bool = False
    chunk_size: int | None = None
    max_chunk_bytes: int | None = None
    compiled: bool | None = None
    float32_outputs: bool = True
    fuse_projection: bool | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        checks.integer_or_none("mini_batch_size", self.mini_batch_size, low=1)
        checks.integer_or_none("mini_batch_num_tokens", self.mini_batch_num_tokens, low=1)
        Chunking.of(self)
        if not (isinstance(self.fuse_projection, bool) or self.fuse_projection == "auto"):
            raise ValueError(f'expected fuse_projection to be True, False or "auto", got {self.fuse_projection!r}')
        if self.fuse_projection is True and (self.mini_batch_size or self.mini_batch_num_tokens):
            raise ValueError(
                "expected fuse_projection=True without mini-batches, which give the loss finished embeddings, got "
                f"mini_batch_size={self.mini_batch_size}, mini_batch_num_tokens={self.mini_batch_num_tokens}"
            )


@dataclass(frozen=True)
class Small:
    """The size up to which a batch is left to the library: numbers in the largest tensor that its computation makes,
    or in several that it makes one after the other, four bytes each. It holds three to ten times as much, for
    BatchSemiHard eighteen. Measured: up to there it is the faster one.

    Args:
        cpu, gpu: By where the embeddings are.
        autocast: On a GPU under autocast, where the library multiplies in half precision, but not for us.
    """

    cpu: int
    gpu: int
    autocast: int

    def on_gpu(self) -> int:
        return self.autocast if torch.is_autocast_enabled("cuda") else self.gpu


BY_ROWS = Small(cpu=1 << 20, gpu=1 << 22, autocast=1 << 22)
"""Of embeddings of aligned rows: rows x width, times what each is compared with."""
BY_SIMILARITIES = Small(cpu=1 << 21, gpu=1 << 22, autocast=1 << 20)
"""Of similarities of all rows with all, of which logarithms of sums are taken: rows x rows."""
BY_DISTANCES = Small(cpu=1 << 17, gpu=1 << 22, autocast=1 << 22)
"""Of similarities or distances among which a few are looked for, or a few sums taken: rows x rows."""
BY_TRIPLETS = Small(cpu=1 << 22, gpu=1 << 22, autocast=1 << 22)
"""Of triplets: rows x rows x rows, if all have one label."""
BY_PRODUCTS = Small(cpu=1 << 15, gpu=1 << 22, autocast=1 << 22)
"""Of cosines that are summed up from products: rows x rows x width x candidates."""
_LABELS = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float32, torch.float64}
"""Of labels in ordinary batches: all of torch's operations know these."""
_NOTHING = repeat(object())  # of which nothing is one
FEW_ROWS = 4096
"""Up to so many the model's last modules run in the model, unless the options say otherwise."""


class _Parts(torch.autograd.Function):
    """What a total is the sum of, where a gradient is known for the total alone."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
        return tuple(part.clone() for part in parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if not all(torch.allclose(grad, grads[0], rtol=0, atol=0, equal_nan=True) for grad in grads):
            raise RuntimeError(
                "expected the terms of a loss with gradient caching to be added up as they are, got gradients "
                f"{[grad.item() for grad in grads]}: weigh them in the loss (mean_weight and second_moment_weight, or "
                "document_regularizer_weight and its like)"
            )
        return (grads[0], *[None] * len(grads))


OPTIONS = tuple(field.name for field in fields(Options))
OF_MINI_BATCHES = ("mini_batch_size", "mini_batch_num_tokens", "show_progress_bar")


class ChunkedLoss(CachedLossMixin):
    """Mixed in before a loss of sentence-transformers: its constructor, config and citation, our computation.

    A subclass states ``_loss(embeddings, labels, **projection)``, and says in ``_fusable`` whether it can take a
    projection (weight, bias, activation, normalize) along. Without one the loss goes through
    ``compute_loss_from_embeddings``, cached or not, so that a user's own counts; with a user's own nothing is fused.

    A small batch is left to the library: where ``_size`` of it is within ``_small``, no option of chunks is given, and
    no other process takes part. Half-precision embeddings are widened for it, and autocast ends there, so that numbers
    are no less exact than those of ``_loss``. ``_for_library`` refuses the labels that ``_loss`` refuses.

    Example:
        >>> import torch
        >>> from sentence_transformers import SentenceTransformer
        >>> from chunked_embed import losses
        >>> from chunked_embed import functional as CF
        >>> from sentence_transformers.sentence_transformer import losses as library
        >>> class MeanSquares(losses.ChunkedLoss, library.CosineSimilarityLoss):
        ...     def __init__(self, model, **options):
        ...         super().__init__(model)
        ...         self._set_options(**options)
        ...     def _loss(self, embeddings, labels):
        ...         a, b = embeddings
        ...         return (CF.pairwise_scores(a, b) - labels).square().mean()
        >>> model = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")
        >>> loss = MeanSquares(model, mini_batch_size=64)
        >>> a, b = (torch.randn(8, 384, requires_grad=True) for _ in range(2))  # embeddings, as a model gives them
        >>> loss.compute_loss_from_embeddings([a, b], torch.rand(8)).backward()
    """

    _small: ClassVar[Small] = BY_ROWS
    _library: ClassVar[Callable[..., Any] | None] = None  # the library's computation from embeddings
    _of_tokens: ClassVar[bool] = False  # embeddings are (N, T, D), and have masks
    _watch: checks.NaNWatch | None = None
    _settings: ClassVar[tuple[str, ...]] = ()  # attributes that some values are refused of

    def __init_subclass__(cls, **kwargs: Any) -> None:
        with warnings.catch_warnings():
            if cls.__module__.startswith(
                f"{__package__}."
            ):  # ours stay, where the library deprecates what they replace
                warnings.simplefilter("ignore", DeprecationWarning)
            super().__init_subclass__(**kwargs)
        behind = cls.__mro__[cls.__mro__.index(ChunkedLoss) + 1 :]
        theirs = [vars(base) for base in behind if base.__module__.startswith("sentence_transformers.")]
        if "_library" not in vars(cls):
            name = "compute_loss_from_embeddings"
            cls._library = next((members[name] for members in theirs if name in members), cls._library)
        # The options are written once, above; help() and inspect still see them one by one.
        own = list(inspect.signature(cls.__init__).parameters.values())[1:]
        if own and own[-1].kind is inspect.Parameter.VAR_KEYWORD:
            names = {parameter.name for parameter in own}
            options = [p for name, p in inspect.signature(Options).parameters.items() if name in {*cls._takes} - names]
            cls.__signature__ = inspect.Signature([*own[:-1], *options])

    mini_batch_size: int | None
    _takes: ClassVar[tuple[str, ...]] = OPTIONS  # the options that it has
    _own_options: ClassVar[tuple[str, ...]] = OPTIONS  # of these, what is its own and no other loss's

    def _set_options(self, **options: Any) -> None:
        """In every constructor, last."""
        for name in options:
            self._check_taken(name)
        self._check_model(getattr(self, "model", None))
        Options(**options)  # together, before any of them is set
        defaults = {name: getattr(Options, name) for name in self._own_options}
        for name, value in {**defaults, **options}.items():
            setattr(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in OPTIONS:
            self._check_taken(name)
            Options(**{**self._options(), name: value})
        super().__setattr__(name, value)

    def _check_model(self, model: Any) -> None:
        check_model(model)

    def _check_taken(self, option: str) -> None:
        if option not in self._takes:
            raise TypeError(f"expected options of {type(self).__name__} among {list(self._takes)}, got {option!r}")

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in OPTIONS}

    @property
    def uses_gradient_cache(self) -> bool:
        """Whether the batch is embedded in mini-batches, twice. Set to False, it is not, whatever their size."""
        return self._in_mini_batches and not vars(self).get("_at_once", False)

    @uses_gradient_cache.setter
    def uses_gradient_cache(self, value: bool) -> None:
        if value and not self._in_mini_batches:
            raise ValueError("expected a mini_batch_size before uses_gradient_cache=True, got None")
        self._at_once = not value and self._in_mini_batches

    @property
    def _in_mini_batches(self) -> bool:
        return self.mini_batch_size is not None or self.mini_batch_num_tokens is not None

    def _changed_options(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in OPTIONS if name != "show_progress_bar"}
        return {name: value for name, value in values.items() if value != getattr(Options, name)}

    @property
    def _chunking(self) -> Chunking:
        return Chunking.of(self)

    def get_config_dict(self) -> dict[str, Any]:
        return {**super().get_config_dict(), **self._changed_options()}

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        features = list(sentence_features)
        if self.uses_gradient_cache:
            return self._cached(features, labels)
        tail = self._tail(features)
        labels = self._targets(features, labels)
        if tail is NO_TAIL:
            return self.compute_loss_from_embeddings(embed_columns(self.model, features), labels)
        with tail.skipped():
            embeddings = embed_columns(self.model, features)
        return self._loss(check_columns(embeddings), labels, **tail.projection)

    def _cached(self, features: list[dict[str, Tensor]], labels: Any) -> Any:
        if self.fuse_projection is True:
            Options(**self._options())  # refuses it, which a loss inside may have been given
        self._own_grads: list[tuple[Tensor, Tensor]] = []
        labels = self._targets(features, labels)
        loss = self.forward_cached([with_row_ends(column) for column in features], labels)
        # These were taken along with the embeddings': backward scales both by what comes from above.
        own, self._own_grads = self._own_grads, []
        loss = attach(loss, *zip(*own)) if own else loss
        terms: dict[str, Tensor] | None = self.__dict__.pop("_terms", None)
        if terms is None:
            return loss
        parts = [term.detach() for term in terms.values()]
        return dict(zip(terms, _Parts.apply(loss, *parts) if loss.requires_grad else parts))

    def compute_loss_from_embeddings(self, embeddings: Iterable[Tensor], labels: Tensor | None = None) -> Tensor:
        """The loss of embeddings (one tensor (N, D) a column) and labels (N,): a scalar, differentiable once."""
        if not is_ordinary(embeddings):
            return self._loss(check_columns(embeddings), labels)
        small = self._is_small(embeddings, labels)
        return self._left(embeddings, labels) if small else self._loss(embeddings, labels)

    # --- small batches, which are the library's ---

    def _is_small(self, columns: list[Tensor], labels: Any) -> bool:
        """Of ordinary columns: whether they are left to the library."""
        if not LEAVES_SMALL or self._has_chunks or (self.gather_across_devices and is_distributed()):
            return False
        first, small = columns[0], self._small
        if type(labels) is Tensor and not (labels.dtype in _LABELS and labels.device == first.device):
            return False
        bound = small.cpu if first.is_cpu else small.on_gpu() if first.is_cuda else -1  # of others none is known
        rows, width = first.shape
        return self._size(rows, width, len(columns)) <= bound

    @property
    def _has_chunks(self) -> bool:
        """Whether an option asks for our computation."""
        return not (
            self.chunk_size is None
            and self.max_chunk_bytes is None
            and self.compiled is None
            and self.float32_outputs is True
            and self.fuse_projection is not True
        )

    def _left(self, columns: list[Tensor], labels: Any) -> Any:
        """The loss of a small batch."""
        if self._settings:
            settings = [getattr(self, name) for name in self._settings]
            if any(map(is_not, settings, vars(self).get("_settings_before", _NOTHING))):
                self._check_settings()
                self._settings_before = settings
        labels = self._for_library(columns, labels)
        device, dtype = "cpu" if columns[0].is_cpu else "cuda", columns[0].dtype
        if dtype is torch.bfloat16 or dtype is torch.float16:
            columns = [widened(column) for column in columns]
        if not torch.is_autocast_enabled(device):
            return self._by_library(columns, labels)
        with torch.autocast(device, enabled=False):
            return self._by_library(columns, labels)

    def _size(self, rows: int, width: int, columns: int) -> float:
        """Of a batch, what ``_small`` bounds. Infinity, where ours is another computation, or has something to
        refuse."""
        return math.inf

    def _for_library(self, columns: list[Tensor], labels: Any) -> Any:
        """The labels, checked, in the form that the library's computation takes."""
        return labels

    def _check_settings(self) -> None:
        """Refuses the values of ``_settings`` that ``_loss`` refuses: they may have been set later."""

    def _by_library(self, columns: list[Tensor], labels: Any) -> Any:
        return (self._library or self._loss)(columns, labels)

    # --- gradient caching ---

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """The loss of mini-batches of embeddings, as :class:`CachedLossMixin` asks for it."""
        columns = [column[0] if len(column) == 1 else torch.cat(column) for column in reps]
        loss = self._total(self.compute_loss_from_embeddings(columns, labels))
        return self._pulled(loss, [leaf for column in reps for leaf in column]) if with_backward else loss

    def _pulled(self, loss: Tensor, leaves: list[Tensor]) -> Tensor:
        """The number, with the gradients of it added to the embeddings', and those of what else learns kept."""
        own = leaves_behind(loss, leaves)
        grads = gradients(loss, [*leaves, *own])
        parts = [(leaf, grad) for leaf, grad in zip(leaves, grads) if grad is not None]
        # A user's calculate_loss may hand in what it made of the embeddings, or have pulled at them before.
        further = [(leaf, grad) for leaf, grad in parts if not leaf.is_leaf or leaf.grad is not None]
        for leaf, grad in parts:
            if leaf.is_leaf and leaf.grad is None:
                leaf.grad = grad
        if further:
            torch.autograd.backward([leaf for leaf, _ in further], [grad for _, grad in further])
        found = [(parameter, grad) for parameter, grad in zip(own, grads[len(leaves) :]) if grad is not None]
        self._own_grads = [*vars(self).get("_own_grads", ()), *found]
        return loss.detach()

    def _total(self, loss: Any) -> Tensor:
        """One number of what ``compute_loss_from_embeddings`` gave, which may be a dict of terms."""
        if not isinstance(loss, dict):
            return loss
        self._terms = loss  # for _cached, which takes it away
        return torch.stack(list(loss.values())).sum()

    def embed_minibatch(
        self,
        sentence_feature: dict[str, Tensor],
        begin: int,
        end: int,
        with_grad: bool,
        copy_random_state: bool,
        random_state: RandContext | None = None,
    ) -> tuple[Tensor, RandContext | None]:
        if not is_bag(sentence_feature):
            return super().embed_minibatch(
                sentence_feature, begin, end, with_grad, copy_random_state, random_state=random_state
            )
        part = bag_slice(sentence_feature, begin, end)
        with random_state or nullcontext(), nullcontext() if with_grad else torch.no_grad():
            state = RandContext(*part.values()) if copy_random_state else None
            return self.model(part)["sentence_embedding"], state

    def _targets(self, features: list[dict[str, Tensor]], labels: Any) -> Any:
        """What goes to the loss in the place of labels: what it knows from the texts themselves, say."""
        return labels

    def _without_nan(self, labels: Tensor) -> None:
        if self._watch is None:
            self._watch = checks.NaNWatch()
        self._watch.no_nan("labels", labels)

    def _tail(self, features: list[dict[str, Tensor]] | None = None) -> Tail:
        """Of the model, for a batch."""
        fuse = self.fuse_projection
        if fuse is False:
            return NO_TAIL
        if fuse is not True and not (self._fusable and (features is None or self._has_chunks or _many(features))):
            return NO_TAIL
        found: Tail | str = "this score has no fused form"
        if replaced(self, "compute_loss_from_embeddings"):
            found = f"{type(self).__name__} has a compute_loss_from_embeddings of its own, which takes what they give"
        elif self._fusable:
            found = find_tail(self.model)
        if isinstance(found, Tail):
            return found
        if fuse is True:
            raise ValueError(f"fuse_projection=True, but the projection can't run in the loss: {found}")
        return NO_TAIL

    @property
    def _normalizes(self) -> bool:
        """The length of embeddings is nothing to this loss: it takes unit vectors itself."""
        return False

    @property
    def _fusable(self) -> bool:
        raise NotImplementedError

    def _loss(self, embeddings: list[Tensor], labels: Tensor | None, **projection: Any) -> Tensor:
        raise NotImplementedError


for _option in fields(Options):  # of a loss whose subclass did without our constructor
    setattr(ChunkedLoss, _option.name, _option.default)


def _many(features: list[dict[str, Tensor]]) -> bool:
    """Whether the batch has more than a few rows, as far as its first column shows."""
    column = features[0] if features else {}
    for name in ("offsets", "cu_seq_lens_q", "input_ids", "attention_mask"):
        if name in column:
            return len(column[name]) > FEW_ROWS
    return any(isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] > FEW_ROWS for value in column.values())
