"""Matryoshka: one loss at several widths of the same embeddings."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chunked_embed.functional.arguments import check_embeddings, widened
from chunked_embed.losses._around import Around
from chunked_embed.losses._attach import attach, gradients, leaves_behind
from chunked_embed.losses._base import OF_MINI_BATCHES, OPTIONS, ChunkedLoss
from chunked_embed.losses._compat import SentenceTransformer, is_plain, library, shrink, uses_gradient_cache
from chunked_embed.losses._kinds import (
    ForACall,
    check_embeds_tokens,
    check_model,
    check_wrapped,
    is_ordinary,
    of_tokens,
    replaced,
)


class MatryoshkaLoss(Around, library.MatryoshkaLoss):
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

    Of a MultiVectorEncoder each token's embedding is cut: around the losses of ``chunked_embed.multi_vector.losses``,
    and around the library's cached one. Mini-batches are the wrapped loss's there.

    Inputs: those of the wrapped loss.

    Reference: https://huggingface.co/papers/2205.13147

    Example:
        >>> from sentence_transformers import SentenceTransformer
        >>> from chunked_embed import losses
        >>> model = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")
        >>> inner = losses.MultipleNegativesRankingLoss(model)
        >>> loss = losses.MatryoshkaLoss(model, inner, [384, 128], mini_batch_size=2)
        >>> texts = ["A plane.", "A flute.", "Bread.", "A dog."], ["An aircraft.", "Music.", "A loaf.", "A puppy."]
        >>> loss([model.preprocess(list(column)) for column in texts], labels=None).backward()
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
        self._check_model(model, loss)
        check_wrapped(loss)
        calculate_loss = vars(loss).get("calculate_loss")
        super().__init__(model, loss, matryoshka_dims, matryoshka_weights, n_dims_per_step)
        vars(loss).pop("calculate_loss", None)  # which the library has wrapped for good; we do so per call
        if calculate_loss is not None:
            loss.calculate_loss = calculate_loss
        self._set_options(**options)
        self._check_inner()

    def _check_model(self, model: Any, loss: Any = None) -> None:
        (check_embeds_tokens if of_tokens(vars(self).get("_modules", {}).get("loss", loss)) else check_model)(model)

    def _check_inner(self) -> None:
        name, caches = type(self.loss).__name__, uses_gradient_cache(self.loss)
        if caches and isinstance(self.loss, library.MatryoshkaLoss):
            raise ValueError(f"expected mini-batches on the outermost MatryoshkaLoss alone, got a {name} that has them")
        if of_tokens(self.loss) and not (caches or isinstance(self.loss, ChunkedLoss)):
            raise ValueError(
                f"expected {name} of chunked_embed.multi_vector.losses inside of MatryoshkaLoss, or one with gradient "
                "caching, got the library's, whose embeddings no loss around it can cut"
            )
        if not self._in_mini_batches:
            return
        if of_tokens(self.loss):
            raise ValueError(f"expected mini-batches of a loss of tokens on that loss, Cached{name}, not around it")
        if caches:
            raise ValueError(f"mini_batch_size is set on the wrapped {name} already: set it on one of the two")
        embeds = isinstance(getattr(self.loss, "model", None), nn.Module)
        if not (embeds and hasattr(self.loss, "compute_loss_from_embeddings")):
            raise ValueError(f"mini_batch_size: {name} has no compute_loss_from_embeddings")

    @property
    def uses_gradient_cache(self) -> bool:
        """Follows from the mini-batches of this loss, or of the wrapped one."""
        return self._in_mini_batches or uses_gradient_cache(self.loss)

    @uses_gradient_cache.setter
    def uses_gradient_cache(self, value: bool) -> None:
        if value != self.uses_gradient_cache:
            raise ValueError(f"expected mini_batch_size to be set, or None, got uses_gradient_cache={value}")

    def get_config_dict(self) -> dict[str, Any]:
        extras = {name: value for name, value in self._changed_options().items() if name in OF_MINI_BATCHES}
        return {**library.MatryoshkaLoss.get_config_dict(self), **extras}

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        features = list(sentence_features)
        self._check_inner()
        caches, tokens = uses_gradient_cache(self.loss), of_tokens(self.loss)
        if self._in_mini_batches or (not caches and not tokens and self._is_ours()):
            return super().forward(features, labels)
        if not caches and not tokens:
            return library.MatryoshkaLoss.forward(self, features, labels)
        whole = isinstance(self.loss, ChunkedLoss) and not replaced(self.loss, "calculate_loss")
        name = "compute_loss_from_embeddings" if whole else "calculate_loss"
        over: Callable[..., Tensor] = self._over_widths if whole else self._over_minibatches
        with _set_on(self.loss, name, ForACall(over, getattr(self.loss, name))):
            return self.loss(features, labels)

    def _is_ours(self) -> bool:
        """Whether a call of the wrapped loss is this package's loss of its embeddings, and nothing else."""
        own = replaced(self.loss, "forward", "__call__") or not is_plain(self.loss)
        return isinstance(self.loss, ChunkedLoss) and not own

    def _loss(self, embeddings: list[Tensor], labels: Tensor | None, **projection: Any) -> Tensor:
        ours = cast(ChunkedLoss, self.loss)
        inner = ours.compute_loss_from_embeddings if self._is_ours() else self._by_forward
        return self._over_widths(inner, embeddings, labels)

    def _over_widths(self, inner: Callable, embeddings: list[Tensor], labels: Any, *masks: Any) -> Tensor:
        ordinary = is_ordinary(embeddings)
        if not ordinary and not of_tokens(self.loss):
            for i, column in enumerate(embeddings):
                check_embeddings({f"embeddings[{i}]": column})

        def at_width(columns: list[Tensor], dim: int) -> Tensor:
            return inner(columns, _cut(labels, embeddings, dim), *masks)

        small = ordinary and isinstance(self.loss, ChunkedLoss) and self.loss._is_small(embeddings, labels)
        if small and not replaced(self.loss, "compute_loss_from_embeddings"):
            return self._plain_sum([widened(column) for column in embeddings], at_width)
        return self._one_by_one(embeddings, at_width)

    def _by_forward(self, columns: list[Tensor], labels: Any) -> Tensor:
        """The wrapped loss of embeddings, whose forward knows what it does with labels. A model that hands its features
        on gives it the embeddings."""
        with _set_on(self.loss, "model", nn.Identity()):
            return self.loss([{"sentence_embedding": column} for column in columns], labels)

    def _over_minibatches(
        self, calculate_loss: Callable, reps: list[list[Tensor]], *args: Any, with_backward: bool = False, **kwargs: Any
    ) -> Tensor:
        """``calculate_loss`` of a gradient-caching loss of the library, at every width."""
        flat = [part for column in reps for part in column]

        def at_width(shrunk: list[Tensor], dim: int) -> Tensor:
            cut = [_cut(arg, flat, dim) for arg in args]
            each = iter(shrunk)
            parts = [[next(each) for _ in column] for column in reps]
            if not torch.is_grad_enabled():
                return calculate_loss(parts, *cut, **kwargs)
            leaves = [[part.detach().requires_grad_() for part in column] for column in parts]
            value = calculate_loss(leaves, *cut, with_backward=True, **kwargs)
            return attach(value.detach(), shrunk, [_grad(leaf) for column in leaves for leaf in column])

        loss = self._one_by_one(flat, at_width)
        if with_backward:
            loss.backward()
        return loss.detach() if with_backward else loss

    def _narrowed(self) -> Callable[[Tensor, int], Tensor]:
        """From a column (N, D) and a width to its first dimensions, as unit vectors."""
        if not isinstance(self.loss, ChunkedLoss):
            return shrink
        seen = replaced(self.loss, "forward", "compute_loss_from_embeddings", "calculate_loss")
        return _first if self.loss._normalizes and not seen else _first_of_unit_length

    def _widths(self) -> list[tuple[int, float]]:
        indices: Sequence[int] = range(len(self.matryoshka_dims))
        if 0 < self.n_dims_per_step < len(indices):
            indices = sorted(random.sample(indices, self.n_dims_per_step))
        return [(self.matryoshka_dims[i], self.matryoshka_weights[i]) for i in indices]

    def _plain_sum(self, columns: list[Tensor], at_width: Callable[[list[Tensor], int], Tensor]) -> Tensor:
        narrowed = self._narrowed()
        terms = [w * at_width([narrowed(column, dim) for column in columns], dim) for dim, w in self._widths()]
        return torch.stack(terms).sum()

    def _one_by_one(self, columns: list[Tensor], at_width: Callable[[list[Tensor], int], Tensor]) -> Tensor:
        """The weighted sum over widths, holding the graph of one width at a time."""
        if not torch.is_grad_enabled() or not any(column.requires_grad for column in columns):
            return self._plain_sum(columns, at_width)
        terms, narrowed = [], self._narrowed()
        grads = [torch.zeros_like(c, dtype=torch.promote_types(c.dtype, torch.float32)) for c in columns]
        of_own: dict[Tensor, Tensor] = {}
        for dim, weight in self._widths():
            narrow = [column.detach()[..., :dim] for column in columns]
            # Float16 gradients would underflow: what a GradScaler scales comes in only at backward.
            narrow = [(x.float() if x.dtype == torch.float16 else x).requires_grad_() for x in narrow]
            loss = weight * at_width([narrowed(x, dim) for x in narrow], dim)
            own = leaves_behind(loss, narrow)
            found = gradients(loss, [*narrow, *own])
            for grad, part in zip(grads, found):
                if part is not None:
                    grad[..., :dim] += part
            for leaf, part in zip(own, found[len(narrow) :]):
                if part is not None:
                    of_own[leaf] = of_own[leaf] + part if leaf in of_own else part
            terms.append(loss.detach())
        return attach(torch.stack(terms).sum(), [*columns, *of_own], [*grads, *of_own.values()])


class Matryoshka2dLoss(library.Matryoshka2dLoss):
    """The library's ``AdaptiveLayerLoss`` around our :class:`MatryoshkaLoss`, one width at a time.

    Args:
        options: Of :class:`MatryoshkaLoss`. All else is as in the library.

    Reference: https://huggingface.co/papers/2402.14776

    Example:
        >>> import torch
        >>> from sentence_transformers import SentenceTransformer
        >>> from chunked_embed import losses
        >>> model = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")
        >>> loss = losses.Matryoshka2dLoss(model, losses.CoSENTLoss(model), [384, 128])
        >>> texts = ["A plane.", "A flute."], ["An aircraft.", "Bread."]
        >>> loss([model.preprocess(list(column)) for column in texts], torch.tensor([1.0, 0.2])).backward()
    """

    def __init__(
        self,
        model: SentenceTransformer,
        loss: nn.Module,
        matryoshka_dims: list[int],
        matryoshka_weights: list[float | int] | None = None,
        n_layers_per_step: int = 1,
        n_dims_per_step: int = 1,
        last_layer_weight: float = 1.0,
        prior_layers_weight: float = 1.0,
        kl_div_weight: float = 1.0,
        kl_temperature: float = 0.3,
        layer_weighting: Literal["uniform", "log", "linear"] | Callable[[int], float] = "uniform",
        **options: Any,
    ) -> None:
        if options.get("mini_batch_size") or options.get("mini_batch_num_tokens"):
            raise ValueError(
                "expected no mini-batches in Matryoshka2dLoss, whose layers are those of one forward pass, got "
                f"{ {name: options[name] for name in OF_MINI_BATCHES if name in options} }"
            )
        if of_tokens(loss):
            raise ValueError(f"expected a loss of texts' embeddings in Matryoshka2dLoss, got {type(loss).__name__}")
        newer = {} if layer_weighting == "uniform" else {"layer_weighting": layer_weighting}  # not in 5.x
        library.AdaptiveLayerLoss.__init__(
            self,
            model,
            MatryoshkaLoss(model, loss, matryoshka_dims, matryoshka_weights, n_dims_per_step, **options),
            n_layers_per_step=n_layers_per_step,
            last_layer_weight=last_layer_weight,
            prior_layers_weight=prior_layers_weight,
            kl_div_weight=kl_div_weight,
            kl_temperature=kl_temperature,
            **newer,
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name in OF_MINI_BATCHES and value:
            raise ValueError(f"expected no mini-batches in Matryoshka2dLoss, got {name}={value!r}")
        if name in OPTIONS:
            setattr(self.loss, name, value)
        else:
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:  # of what is not found elsewhere
        return getattr(self.loss, name) if name in OPTIONS else super().__getattr__(name)


def _first(column: Tensor, dim: int) -> Tensor:
    width = column.shape[-1]
    if dim > width:
        raise ValueError(f"matryoshka_dims cannot be greater than the embeddings' width, {width}: got {dim}")
    return column if dim == width else column[..., :dim]


def _first_of_unit_length(column: Tensor, dim: int) -> Tensor:
    narrow = _first(column, dim)
    return F.normalize(narrow if narrow.dtype is torch.float32 else widened(narrow), dim=-1)


def _grad(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _cut(labels: Any, columns: list[Tensor], dim: int) -> Any:
    """Labels that are embeddings (a teacher's) are cut to the width; any others stay."""
    is_embedding = isinstance(labels, Tensor) and labels.is_floating_point() and labels.ndim in (2, 3)
    return labels[..., :dim] if is_embedding and labels.shape[-1] == columns[0].shape[-1] else labels


@contextmanager
def _set_on(loss: nn.Module, name: str, value: Any) -> Iterator[None]:
    """An attribute of the loss itself, or a submodule, for a while."""
    own = name in (*vars(loss), *loss._modules) or isinstance(getattr(type(loss), name, None), property)
    before = getattr(loss, name)
    setattr(loss, name, value)
    try:
        yield
    finally:
        if own:
            setattr(loss, name, before)
        else:
            delattr(loss, name)
