"""What every loss here shares: the options, the three ways to embed a batch, gradient caching, what a user replaces."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from chunked_embed import checks
from chunked_embed.chunking import Chunking
from chunked_embed.losses._attach import attach
from chunked_embed.losses._bags import bag_slice, is_bag, with_row_ends
from chunked_embed.losses._card import sign_cards
from chunked_embed.losses._compat import CachedLossMixin, RandContext, embed_columns
from chunked_embed.losses._kinds import check_columns, check_model, replaced
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
            "auto" does so where it is known to be safe, True raises a ValueError with the reason where it is not.
            With mini-batches they stay in the model, where a mini-batch bounds them already: True is refused there.

    All of them may be set on the loss afterwards, and are checked then as in the constructor.
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
                f"{[grad.item() for grad in grads]}: weigh them in the loss (mean_weight, second_moment_weight)"
            )
        return (grads[0], *[None] * len(grads))


OPTIONS = tuple(field.name for field in fields(Options))
OF_MINI_BATCHES = ("mini_batch_size", "mini_batch_num_tokens", "show_progress_bar")


class ChunkedLoss(CachedLossMixin):
    """Mixed in before a loss of sentence-transformers: its constructor, config and citation, our computation.

    A subclass states ``_loss(embeddings, labels, **projection)``, and says in ``_fusable`` whether it can take a
    projection (weight, bias, activation, normalize) along. Without one the loss goes through
    ``compute_loss_from_embeddings``, cached or not, so that a user's own counts; with a user's own nothing is fused.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        with warnings.catch_warnings():
            if cls.__module__.startswith(
                f"{__package__}."
            ):  # ours stay, where the library deprecates what they replace
                warnings.simplefilter("ignore", DeprecationWarning)
            super().__init_subclass__(**kwargs)
        # The options are written once, above; help() and inspect still see them one by one.
        own = list(inspect.signature(cls.__init__).parameters.values())[1:]
        if own and own[-1].kind is inspect.Parameter.VAR_KEYWORD:
            names = {parameter.name for parameter in own}
            options = [p for name, p in inspect.signature(Options).parameters.items() if name not in names]
            cls.__signature__ = inspect.Signature([*own[:-1], *options])

    mini_batch_size: int | None
    _own_options = OPTIONS

    def _set_options(self, **options: Any) -> None:
        """In every constructor, last."""
        if unknown := [name for name in options if name not in OPTIONS]:
            raise TypeError(f"expected options of {type(self).__name__} among {list(OPTIONS)}, got {unknown[0]!r}")
        check_model(getattr(self, "model", None))
        Options(**options)  # together, before any of them is set
        defaults = {name: getattr(Options, name) for name in self._own_options}
        for name, value in {**defaults, **options}.items():
            setattr(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in OPTIONS:
            Options(**{**self._options(), name: value})
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:  # of what is not found elsewhere
        if name in OPTIONS:  # of a loss whose subclass did without our constructor
            return getattr(Options, name)
        return super().__getattr__(name)

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
        tail = self._tail()
        labels = self._targets(features, labels)
        with tail.skipped():
            embeddings = embed_columns(self.model, features)
        if tail is NO_TAIL:
            return self.compute_loss_from_embeddings(embeddings, labels)
        return self._loss(check_columns(embeddings), labels, **tail.projection)

    def _cached(self, features: list[dict[str, Tensor]], labels: Any) -> Any:
        Options(**self._options())  # a loss inside may have been given one that goes with none of ours
        self._own_grads: list[tuple[nn.Parameter, Tensor]] = []
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
        return self._loss(check_columns(embeddings), labels)

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """The loss of mini-batches of embeddings, as :class:`CachedLossMixin` asks for it."""
        loss = self._total(self.compute_loss_from_embeddings([torch.cat(column) for column in reps], labels))
        if not with_backward:
            return loss
        leaves, own = [leaf for column in reps for leaf in column], self._own_parameters()
        grads = torch.autograd.grad(loss, [*leaves, *own], allow_unused=True)
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

    def _own_parameters(self) -> list[nn.Parameter]:
        """What a loss of embeddings may read apart from them: a temperature, a module that the user handed in. The
        model may hold it, as CLIP does its scale."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

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

    def _tail(self) -> Tail:
        if self.fuse_projection is False:
            return NO_TAIL
        found: Tail | str = "this score has no fused form"
        if replaced(self, "compute_loss_from_embeddings"):
            found = f"{type(self).__name__} has a compute_loss_from_embeddings of its own, which takes what they give"
        elif self._fusable:
            found = find_tail(self.model)
        if isinstance(found, Tail):
            return found
        if self.fuse_projection is True:
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
