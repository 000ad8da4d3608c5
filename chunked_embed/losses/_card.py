"""What the model card of sentence-transformers says of a loss: the library's name and link, and our version."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import sentence_transformers
from torch import nn

from chunked_embed import __version__
from chunked_embed.losses._compat import library, multi_vector_library, sparse_library

_LIBRARIES = {
    "chunked_embed.losses.": library,
    "chunked_embed.sparse.losses.": sparse_library,
    "chunked_embed.multi_vector.losses.": multi_vector_library,
}
"""Whose classes those of our modules take the place of."""


def sign_cards() -> None:
    """Cards of models that are trained from here on show ours as ``_Shown``; of other losses nothing changes.

    A card links to a loss by the module of its class, and that of ours stays what it is, since pickling goes by it. The
    version stands among the parameters of a dataset's loss: there it says which of several losses it computed, and of a
    loss that wraps ours, be it the library's or a user's, that ours is in it.
    """
    # What writes the name and the parameters of a loss. A library without it has cards with our names, unsigned.
    for kind in ("SentenceTransformer", "SparseEncoder", "MultiVectorEncoder"):  # the last one since 6.0
        data: Any = getattr(sentence_transformers, f"{kind}ModelCardData", None)
        original = getattr(data, "compute_dataset_metrics", None)
        if original is not None and not hasattr(original, "_signs"):
            data.compute_dataset_metrics = _signing(original)


def _signing(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def signed(*args: Any, **kwargs: Any) -> Any:
        return original(*map(_shown, args), **{name: _shown(value) for name, value in kwargs.items()})

    signed._signs = True  # type: ignore[attr-defined]
    return signed


class _Shown:
    """A loss as a card reads it: its class gives the name, its config the parameters; all else is the loss's own."""

    def __init__(self, loss: Any) -> None:
        self._loss = loss

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return _namesake(type(self._loss)) or type(self._loss)

    def get_config_dict(self) -> dict[str, Any]:
        config = self._loss.get_config_dict() if hasattr(self._loss, "get_config_dict") else {}
        return {**config, "chunked_embed": __version__}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loss, name)


def _shown(argument: Any) -> Any:
    if not isinstance(argument, nn.Module):
        return argument
    ours = any(_library_of(base) for module in argument.modules() for base in type(module).__mro__)
    return _Shown(argument) if ours else argument


def _namesake(cls: type) -> type | None:
    """The library's class that one of ours takes the place of. That is what a shared name means in this package, and
    here alone: ``distill.sentence_transformers.EmbedDistillLoss`` is a loss of another meaning."""
    return getattr(_library_of(cls), cls.__name__, None)


def _library_of(cls: type) -> ModuleType | None:
    return next((found for ours, found in _LIBRARIES.items() if cls.__module__.startswith(ours)), None)
