"""What the losses share that stand inside of another one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from chunked_embed.chunking import NAMES
from chunked_embed.losses._base import ChunkedLoss
from chunked_embed.losses._compat import sparse_library


class Inside:
    """Mixed in before a loss of embeddings that another loss makes: it has the options that say how it is computed, and
    none of those that say how embeddings are."""

    _takes = _own_options = ("gather_across_devices", *NAMES)

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        name = type(self).__name__
        raise AttributeError(
            f"expected {name} inside of another loss, got a call of its own, where nothing keeps embeddings sparse: "
            f"SpladeLoss(model, {name}(model), ...), or CSRLoss(model, {name}(model))"
        )


def check_inner(loss: Any, outer: str) -> None:
    """A loss that another one can call with embeddings."""
    if not (isinstance(loss, nn.Module) and hasattr(loss, "compute_loss_from_embeddings")):
        raise ValueError(
            f"expected a loss with a compute_loss_from_embeddings(embeddings, labels) inside of {outer}, got "
            f"{_name(loss)}"
        )
    if isinstance(loss, (sparse_library.SpladeLoss, sparse_library.FlopsLoss)):
        raise ValueError(f"expected a loss that has to do with no regulariser inside of {outer}, got {_name(loss)}")
    if isinstance(loss, ChunkedLoss) and loss._in_mini_batches:
        raise ValueError(
            f"expected no mini-batches of the loss inside of {outer}, which embeds for it, got a {type(loss).__name__} "
            "that has them"
        )


def check_regularizer(name: str, regularizer: Any) -> None:
    """None stands for FLOPS."""
    if regularizer is None:
        return
    if isinstance(regularizer, type) or not hasattr(regularizer, "compute_loss_from_embeddings"):
        raise ValueError(
            f"expected {name} to be a loss with a compute_loss_from_embeddings(embeddings), or None, got "
            f"{_name(regularizer)}"
        )


def _name(loss: Any) -> str:
    return loss.__name__ if isinstance(loss, type) else type(loss).__name__
