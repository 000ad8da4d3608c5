"""What every loss here shares: the options, the three ways to embed a batch, gradient caching."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn

from chunked_embed import checks
from chunked_embed.chunking import Chunking
from chunked_embed.losses._attach import attach
from chunked_embed.losses._bags import bag_slice, is_bag, with_row_ends
from chunked_embed.losses._compat import CachedLossMixin, RandContext, embed_columns
from chunked_embed.losses._tail import NO_TAIL, Tail, find_tail


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
            With mini-batches they stay in the model, where a mini-batch bounds them already.
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
        if self.fuse_projection not in (True, False, "auto"):
            raise ValueError(f'expected fuse_projection to be True, False or "auto", got {self.fuse_projection!r}')


class ChunkedLoss(CachedLossMixin):
    """Mixed in before a loss of sentence-transformers: its constructor, config and citation, our computation.

    A subclass states ``_loss(embeddings, labels, **projection)``, and says in ``_fusable`` whether it can take a
    projection (weight, bias, activation, normalize) along.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # The options are written once, above; help() and inspect still see them one by one.
        own = list(inspect.signature(cls.__init__).parameters.values())[1:]
        if own and own[-1].kind is inspect.Parameter.VAR_KEYWORD:
            names = {parameter.name for parameter in own}
            options = [p for name, p in inspect.signature(Options).parameters.items() if name not in names]
            cls.__signature__ = inspect.Signature([*own[:-1], *options])

    def _set_options(self, **options: Any) -> None:
        known = [field.name for field in fields(Options)]
        if unknown := [name for name in options if name not in known]:
            raise TypeError(f"expected options of {type(self).__name__} among {known}, got {unknown[0]!r}")
        values = Options(**options)
        for field in fields(Options):
            setattr(self, field.name, getattr(values, field.name))
        self.uses_gradient_cache = self.mini_batch_size is not None or self.mini_batch_num_tokens is not None

    def _changed_options(self) -> dict[str, Any]:
        values = {
            field.name: getattr(self, field.name) for field in fields(Options) if field.name != "show_progress_bar"
        }
        return {name: value for name, value in values.items() if value != getattr(Options, name)}

    @property
    def _chunking(self) -> Chunking:
        return Chunking.of(self)

    def get_config_dict(self) -> dict[str, Any]:
        return {**super().get_config_dict(), **self._changed_options()}

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        features = list(sentence_features)
        labels = self._targets(features, labels)
        if self.uses_gradient_cache:
            self._own_grads: list[tuple[nn.Parameter, Tensor]] = []
            loss = self.forward_cached([with_row_ends(column) for column in features], labels)
            # These were taken along with the embeddings': backward scales both by what comes from above.
            own, self._own_grads = self._own_grads, []
            return attach(loss, *zip(*own)) if own else loss
        tail = self._tail()
        with tail.skipped():
            embeddings = embed_columns(self.model, features)
        return self._loss(embeddings, labels, **tail.projection)

    def compute_loss_from_embeddings(self, embeddings: Iterable[Tensor], labels: Tensor | None = None) -> Tensor:
        """The loss of embeddings (one tensor (N, D) a column) and labels (N,): a scalar, differentiable once."""
        return self._loss(list(embeddings), labels)

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """The loss of mini-batches of embeddings, as :class:`CachedLossMixin` asks for it."""
        loss = self._loss([torch.cat(column) for column in reps], labels)
        if not with_backward:
            return loss
        leaves, own = [leaf for column in reps for leaf in column], self._own_parameters()
        grads = torch.autograd.grad(loss, [*leaves, *own], allow_unused=True)
        for leaf, grad in zip(leaves, grads):
            leaf.grad = grad
        found = [(parameter, grad) for parameter, grad in zip(own, grads[len(leaves) :]) if grad is not None]
        self._own_grads = [*vars(self).get("_own_grads", ()), *found]
        return loss.detach()

    def _own_parameters(self) -> list[nn.Parameter]:
        """What learns in the loss itself: a temperature, a module that the user handed in."""
        encoder = {id(parameter) for parameter in self.model.parameters()}
        return [p for p in self.parameters() if p.requires_grad and id(p) not in encoder]

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
        found = find_tail(self.model) if self._fusable else "this score has no fused form"
        if isinstance(found, Tail):
            return found
        if self.fuse_projection is True:
            raise ValueError(f"fuse_projection=True, but the model's last modules can't run in the loss: {found}")
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
