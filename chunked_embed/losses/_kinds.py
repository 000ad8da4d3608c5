"""What a user hands in: models of other kinds, embeddings that no training puts out, losses that are several, and
methods of the user's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from chunked_embed import checks
from chunked_embed.functional.arguments import TRAINED, check_embeddings, check_trained  # noqa: F401  # for distill, too
from chunked_embed.losses._compat import (
    CrossEncoder,
    Pooling,
    SparseEncoder,
    library,
    multi_vector_library,
    sentence_transformers,
    sparse_library,
)

_OTHERS = {
    "MultiVectorEncoder": "embeds tokens: its losses are those of chunked_embed.multi_vector.losses",
    "CrossEncoder": "scores pairs of texts: its losses are those of sentence_transformers.cross_encoder",
}
"""Models without an embedding of a text, unless they pool one: what they do, and where to go with them."""
_SPARSE = "embeds texts: its losses are those of chunked_embed.sparse.losses"


def check_model(model: Any, name: str = "model") -> None:
    """A model, as far as that shows: anything may embed, and a loss of given embeddings asks for nothing."""
    inner = _inside(model, name, "SentenceTransformer")
    for kind, does in _OTHERS.items():
        other = getattr(sentence_transformers, kind, None)  # there is no MultiVectorEncoder in 5.x
        if other is not None and isinstance(inner, other) and not any(isinstance(m, Pooling) for m in inner.modules()):
            raise TypeError(f"expected a SentenceTransformer as {name}, got a {type(inner).__name__}, which {does}")


def check_embeds_tokens(model: Any, name: str = "model") -> None:
    """The same of a model whose embeddings are those of tokens."""
    inner = _inside(model, name, "MultiVectorEncoder")
    if isinstance(inner, (CrossEncoder, SparseEncoder)):
        does = _OTHERS["CrossEncoder"] if isinstance(inner, CrossEncoder) else _SPARSE
        raise TypeError(f"expected a MultiVectorEncoder as {name}, got a {type(inner).__name__}, which {does}")


def of_tokens(loss: Any) -> bool:
    """Whether it is a loss of a MultiVectorEncoder, ours or the library's."""
    names = () if multi_vector_library is None else multi_vector_library.__all__
    theirs = tuple(getattr(multi_vector_library, name) for name in names)
    return getattr(loss, "_of_tokens", False) or isinstance(loss, theirs)


def _inside(model: Any, name: str, expected: str) -> Any:
    if isinstance(model, (type, str)):
        got = f"the class {model.__name__}" if isinstance(model, type) else repr(model)
        raise TypeError(f"expected a {expected} as {name}, got {got}")
    inner = model.module if isinstance(model, (DataParallel, DistributedDataParallel)) else model
    return getattr(inner, "_orig_mod", inner)  # of a compiled one


def check_columns(embeddings: Any) -> list[Tensor]:
    """Embeddings of a batch, one tensor a column. Whether there is one a row is for the loss to check: a function of
    the user's own may score tokens."""
    if not isinstance(embeddings, Iterable) or isinstance(embeddings, (str, Mapping)):
        raise TypeError(f"expected embeddings as tensors, one a column, got {checks.kind_of(embeddings)}")
    columns = list(embeddings)
    for i, column in enumerate(columns):
        check_trained(f"embeddings[{i}]", column)
        checks.tensor(f"embeddings[{i}]", column, ("N", "D", ...))
    return columns


def is_ordinary(columns: Any) -> TypeGuard[list[Tensor]]:
    """Whether these are what models put out in most steps: a list or tuple of dense embeddings, (N, D) and not empty,
    of one shape, dtype and device. In them there is nothing to refuse, and little time goes into seeing that."""
    if not (type(columns) is list or type(columns) is tuple) or not columns:
        return False
    shape = dtype = device = None
    for column in columns:
        kind = type(column)
        if not (kind is Tensor or kind is nn.Parameter) or column.layout is not torch.strided or column.is_nested:
            return False
        if shape is None:
            shape, dtype, device = column.shape, column.dtype, column.device
            if len(shape) != 2 or 0 in shape or dtype not in TRAINED or column.is_meta:
                return False
        elif column.dtype is not dtype or column.shape != shape or column.device != device:
            return False
    return True


def check_wrapped(loss: nn.Module) -> None:
    """A loss that a sum over widths can be taken of: of the model's embeddings, one number."""
    if isinstance(loss, (library.DenoisingAutoEncoderLoss, library.ContrastiveTensionLossInBatchNegatives)):
        raise ValueError(f"expected a loss of the model's embeddings, got {type(loss).__name__}")
    own = replaced(loss, "forward", "compute_loss_from_embeddings")
    if isinstance(loss, (library.GlobalOrthogonalRegularizationLoss, sparse_library.SpladeLoss)) and not own:
        raise ValueError(
            f"expected a loss that returns a scalar, got {type(loss).__name__}, which returns a dict of terms: add it "
            "to the wrapping loss, not inside of it"
        )


_PACKAGES = ("chunked_embed", "distill", "sentence_transformers", "torch")


class ForACall(partial):
    """What a loss around another one sets on that for a call: a function of its own, and what the method was."""


def replaced(loss: nn.Module, *names: str) -> bool:
    """Whether one of these methods is a user's own: of a subclass, put into one of our classes, or set on the loss."""
    return any(_by_user(loss, name) for name in names)


def _by_user(loss: nn.Module, name: str) -> bool:
    own = vars(loss).get(name)
    if isinstance(own, ForACall):
        own = own.args[0] if getattr(own.args[0], "__self__", None) is not loss else None
    if own is not None:
        return True
    owner = next((base for base in type(loss).__mro__ if name in vars(base)), None)
    if owner is None:
        return False
    module = getattr(vars(owner)[name], "__globals__", {}).get("__name__", owner.__module__)
    return module.partition(".")[0] not in _PACKAGES
