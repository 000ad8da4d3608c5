"""Matryoshka: one loss at several widths of the same embeddings."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chunked_embed.functional.arguments import widened
from chunked_embed.losses._attach import attach
from chunked_embed.losses._base import ChunkedLoss
from chunked_embed.losses._compat import SentenceTransformer, library, shrink, uses_gradient_cache

_OWN_OPTIONS = ("mini_batch_size", "mini_batch_num_tokens", "show_progress_bar")


class MatryoshkaLoss(ChunkedLoss, library.MatryoshkaLoss):
    """``sum over d of weight_d * loss(normalize(embeddings[:, :d]))``.

    Around a loss of this package, cached or not, and around cached losses of sentence-transformers, one width at a time
    is computed and differentiated, so that the memory is that of the widest. Around other losses of
    sentence-transformers it does what the library's class does. The wrapped loss is left as it was.

    Args:
        model: The SentenceTransformer to train.
        loss: The loss to compute at every width.
        matryoshka_dims: The widths.
        matryoshka_weights: A weight for each width, 1 by default.
        n_dims_per_step: Draw this many of the widths in every step; -1 takes all.
        options: See :class:`~chunked_embed.losses.Options`. ``mini_batch_size`` caches gradients around any loss that
            can be computed from embeddings and does not cache by itself. All but the mini-batch options are set on the
            wrapped loss, which must then be one of this package.

    Inputs: those of the wrapped loss.

    Reference: https://huggingface.co/papers/2205.13147
    """

    def __init__(
        self,
        model: SentenceTransformer,
        loss: nn.Module,
        matryoshka_dims: Sequence[int],
        matryoshka_weights: Sequence[float] | Sequence[int] | None = None,
        n_dims_per_step: int = -1,
        **options: Any,
    ) -> None:
        calculate_loss = vars(loss).get("calculate_loss")
        super().__init__(model, loss, matryoshka_dims, matryoshka_weights, n_dims_per_step)
        vars(loss).pop("calculate_loss", None)  # which the library has wrapped for good; we do so per call
        if calculate_loss is not None:
            loss.calculate_loss = calculate_loss
        handed_on = {name: value for name, value in options.items() if name not in _OWN_OPTIONS}
        self._set_options(**options)
        if handed_on and not isinstance(loss, ChunkedLoss):
            raise ValueError(f"{', '.join(handed_on)}: {type(loss).__name__}, the wrapped loss, has no such options")
        for name, value in handed_on.items():
            setattr(loss, name, value)
        self._caches = self.uses_gradient_cache
        if self._caches and uses_gradient_cache(loss):
            raise ValueError(
                f"mini_batch_size is set on the wrapped {type(loss).__name__} already: set it on one of the two"
            )
        if self._caches and not hasattr(loss, "compute_loss_from_embeddings"):
            raise ValueError(f"mini_batch_size: {type(loss).__name__} has no compute_loss_from_embeddings")
        self.uses_gradient_cache = self._caches or uses_gradient_cache(loss)

    def get_config_dict(self) -> dict[str, Any]:
        extras = {name: value for name, value in self._changed_options().items() if name in _OWN_OPTIONS}
        return {**library.MatryoshkaLoss.get_config_dict(self), **extras}

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        features = list(sentence_features)
        if self._caches or (isinstance(self.loss, ChunkedLoss) and not uses_gradient_cache(self.loss)):
            return super().forward(features, labels)
        if not uses_gradient_cache(self.loss):
            return library.MatryoshkaLoss.forward(self, features, labels)
        if isinstance(self.loss, ChunkedLoss):
            replaced = _replaced(self.loss, "_loss", partial(self._over_widths, self.loss._loss))
        else:
            of_parts = partial(self._over_minibatches, self.loss.calculate_loss)
            replaced = _replaced(self.loss, "calculate_loss", of_parts)
        with replaced:
            return self.loss(features, labels)

    def _targets(self, features: list[dict[str, Tensor]], labels: Any) -> Any:
        return self.loss._targets(features, labels) if isinstance(self.loss, ChunkedLoss) else labels

    @property
    def _fusable(self) -> bool:
        return False  # the widths are cut from the finished embedding

    def _loss(self, embeddings: list[Tensor], labels: Tensor | None, **projection: Any) -> Tensor:
        return self._over_widths(self._inner, embeddings, labels)

    def _over_widths(self, inner: Callable, embeddings: list[Tensor], labels: Any) -> Tensor:
        def at_width(columns: list[Tensor], dim: int) -> Tensor:
            return inner(columns, _cut(labels, embeddings, dim))

        # The widths' gradients are taken one by one, which would miss parameters of the loss itself.
        return self._plain_sum(embeddings, at_width) if self._learns() else self._one_by_one(embeddings, at_width)

    def _learns(self) -> bool:
        if isinstance(self.loss, ChunkedLoss):
            return bool(self.loss._own_parameters())
        named = self.loss.named_parameters()
        return any(parameter.requires_grad and name.split(".")[0] != "model" for name, parameter in named)

    def _inner(self, columns: list[Tensor], labels: Tensor | None) -> Tensor:
        if hasattr(self.loss, "compute_loss_from_embeddings"):
            return self.loss.compute_loss_from_embeddings(columns, labels)
        if hasattr(self.loss, "calculate_loss"):
            return self.loss.calculate_loss([[column] for column in columns], labels)
        raise TypeError(f"{type(self.loss).__name__}, the wrapped loss, can't be computed from embeddings alone")

    def _over_minibatches(
        self, calculate_loss: Callable, reps: list[list[Tensor]], *args: Any, with_backward: bool = False, **kwargs: Any
    ) -> Tensor:
        """``calculate_loss`` of a gradient-caching loss of the library, at every width."""
        columns = [torch.cat(column) for column in reps]
        sizes = [[len(part) for part in column] for column in reps]

        def at_width(shrunk: list[Tensor], dim: int) -> Tensor:
            cut = [_cut(arg, columns, dim) for arg in args]
            parts = [column.split(size) for column, size in zip(shrunk, sizes)]
            if not torch.is_grad_enabled():
                return calculate_loss(parts, *cut, **kwargs)
            leaves = [[part.detach().requires_grad_() for part in column] for column in parts]
            value = calculate_loss(leaves, *cut, with_backward=True, **kwargs)
            return attach(value.detach(), shrunk, [torch.cat([_grad(leaf) for leaf in column]) for column in leaves])

        loss = self._one_by_one(columns, at_width)
        if with_backward:
            loss.backward()
        return loss.detach() if with_backward else loss

    def _narrow(self, column: Tensor, dim: int) -> Tensor:
        """The first ``dim`` dimensions, as unit vectors."""
        if not isinstance(self.loss, ChunkedLoss):
            return shrink(column, dim)
        if dim > column.shape[1]:
            raise ValueError(
                f"matryoshka_dims cannot be greater than the embeddings' width, {column.shape[1]}: got {dim}"
            )
        narrow = column[:, :dim]
        return narrow if self.loss._normalizes else F.normalize(widened(narrow), dim=1)

    def _widths(self) -> list[tuple[int, float]]:
        indices: Sequence[int] = range(len(self.matryoshka_dims))
        if 0 < self.n_dims_per_step < len(indices):
            indices = sorted(random.sample(indices, self.n_dims_per_step))
        return [(self.matryoshka_dims[i], self.matryoshka_weights[i]) for i in indices]

    def _plain_sum(self, columns: list[Tensor], at_width: Callable[[list[Tensor], int], Tensor]) -> Tensor:
        terms = [w * at_width([self._narrow(column, dim) for column in columns], dim) for dim, w in self._widths()]
        return torch.stack(terms).sum()

    def _one_by_one(self, columns: list[Tensor], at_width: Callable[[list[Tensor], int], Tensor]) -> Tensor:
        """The weighted sum over widths, holding the graph of one width at a time."""
        if not torch.is_grad_enabled() or not any(column.requires_grad for column in columns):
            return self._plain_sum(columns, at_width)
        terms = []
        grads = [torch.zeros_like(c, dtype=torch.promote_types(c.dtype, torch.float32)) for c in columns]
        for dim, weight in self._widths():
            narrow = [column.detach()[:, :dim] for column in columns]
            # Float16 gradients would underflow: what a GradScaler scales comes in only at backward.
            narrow = [(x.float() if x.dtype == torch.float16 else x).requires_grad_() for x in narrow]
            loss = weight * at_width([self._narrow(x, dim) for x in narrow], dim)
            for grad, part in zip(grads, torch.autograd.grad(loss, narrow, allow_unused=True)):
                if part is not None:
                    grad[:, :dim] += part
            terms.append(loss.detach())
        return attach(torch.stack(terms).sum(), columns, grads)


def _grad(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _cut(labels: Any, columns: list[Tensor], dim: int) -> Any:
    """Labels that are embeddings (a teacher's) are cut to the width; any others stay."""
    is_embedding = isinstance(labels, Tensor) and labels.is_floating_point() and labels.ndim in (2, 3)
    return labels[..., :dim] if is_embedding and labels.shape[-1] == columns[0].shape[-1] else labels


@contextmanager
def _replaced(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    before = vars(module).get(name)
    setattr(module, name, value)
    try:
        yield
    finally:
        vars(module).pop(name)
        if before is not None:
            setattr(module, name, before)
