"""The fused SPLADE head inside of a `SparseEncoder`: ``attach(model)``.

The library's encoder hands logits, tokens x vocabulary, to a pooling module. Here the pooling runs as the forward of
the head's last layer, inside of the masked language model's own forward, so that DDP, FSDP, adapters and hooks see what
they would; and the pooling module hands on what is pooled already.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .. import lm_heads
from ..engine.compile import outside_compile
from ..functional import splade_pool

__all__ = ["attach"]

Features = dict[str, Any]


@dataclass
class _Call:
    """What the head's last layer is to know of the call that it is in."""

    head: Any
    pooling: Any
    features: Features
    pooled: Tensor | None = None


_CALL: ContextVar[_Call] = ContextVar("call")
_LOCKS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
"""Of each masked language model: threads that share one take turns, since its head's forward is another meanwhile."""


def attach(model: Any) -> None:
    """Let a ``SparseEncoder`` pool the outputs of its head as :func:`~chunked_embed.functional.splade_pool` does, in
    training and in ``encode``: logits of tokens are never formed, and padding is dropped before the product.

    Embeddings are the library's, up to rounding: float32 until they are, once, in the dtype that the library gives
    them. Names, arguments, options of ``SpladePooling`` (but ``chunk_size``, of which there is no need), what is saved
    and the model card are the library's own. ``token_embeddings``, the logits, are no longer among what a forward
    returns.

    Each masked language model that a ``SpladePooling`` follows is attached, in routes of a ``Router`` too, before or
    after adapters are added, with tied heads and others: a linear layer last, of PEFT LoRA, DoRA and modules to save
    on it. Attaching twice is attaching once; a copy of an attached model is attached.

    Args:
        model: a ``SparseEncoder``, not yet wrapped (DDP, FSDP, compile).

    Raises:
        TypeError: no model of sentence-transformers with such modules, or a head that is no linear layer.
        ValueError: a head that is offloaded, known adapters in a setting that is not, or one language model in front of
            several modules.
        RuntimeError: in a forward, where a model does more to its logits than its last layer does.

    Example:
        >>> from sentence_transformers import SparseEncoder
        >>> from sentence_transformers.base.modules import Transformer
        >>> from sentence_transformers.sparse_encoder.modules import SpladePooling
        >>> from chunked_embed import sparse
        >>> encoder = Transformer("sentence-transformers/all-MiniLM-L6-v2", transformer_task="fill-mask")
        >>> model = SparseEncoder(modules=[encoder, SpladePooling("max")])
        >>> sparse.attach(model)
        >>> model.encode(["A text.", "Another one."]).shape
        torch.Size([2, 30522])
    """
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sparse_encoder.modules import SpladePooling

    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a SparseEncoder of sentence-transformers, got {type(model).__name__}")
    neighbours = list(_neighbours(model))
    pairs = [pair for pair in neighbours if isinstance(pair[0], Transformer) and isinstance(pair[1], SpladePooling)]
    if not pairs:
        told = [type(module).__name__ for module in model.children()]
        raise TypeError(
            f"expected a SparseEncoder with a masked language model and SpladePooling, one behind the other, got "
            f"{type(model).__name__} of {told}"
        )
    for encoder, pooling in pairs:
        _check(encoder, Transformer, SpladePooling, pooling)
        if others := [type(b).__name__ for a, b in neighbours if a is encoder and b is not pooling]:
            raise ValueError(
                f"expected each masked language model in front of one SpladePooling, got one in front of another "
                f"{', '.join(others)} too: let routes that share the one share the other"
            )
    for encoder, pooling in pairs:
        encoder.forward = partial(_encode, encoder, pooling)
        pooling.forward = partial(_hand_on, pooling)


def _neighbours(model: nn.Module) -> Iterator[tuple[Any, Any]]:
    for module in model.modules():
        if isinstance(module, nn.Sequential):
            yield from pairwise(module.children())


def _check(encoder: Any, transformer: Any, splade_pooling: Any, pooling: Any) -> None:
    for module, kind, ours in ((encoder, transformer, _encode), (pooling, splade_pooling, _hand_on)):
        own = vars(module).get("forward")
        attached = getattr(own, "func", None) is ours
        if type(module).forward is not kind.forward or not (own is None or attached):
            raise TypeError(f"expected a {kind.__name__} with the library's forward, got {type(module).__name__}")
    _check_head(encoder.model)


def _check_head(model: Any) -> Any:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        raise TypeError(f"expected a masked language model of transformers with a head, got {type(model).__name__}")
    lm_heads.check(head)
    return head


def _encode(encoder: Any, pooling: Any, features: Features, **kwargs: Any) -> Features:
    """The forward of the library's Transformer, whose head pools."""
    with _LOCKS.setdefault(encoder.model, RLock()):
        return _encode_alone(encoder, pooling, features, **kwargs)


def _encode_alone(encoder: Any, pooling: Any, features: Features, **kwargs: Any) -> Features:
    head = _check_head(encoder.model)
    _refuse_replicas(encoder.model, head, features)
    call = _Call(head, pooling, features)
    token = _CALL.set(call)
    try:
        with lm_heads.forward_of(head, _pool_instead):
            features = type(encoder).forward(encoder, features, **kwargs)
    finally:
        _CALL.reset(token)
    found = features.pop(encoder.module_output_name)
    # What leaves a wrapped forward may be cast; then it is looked at.
    if call.pooled is None or (found is not call.pooled and not _is_cast(found, call.pooled)):
        raise RuntimeError(
            f"expected logits that are the outputs of the model's last layer, got {type(encoder.model).__name__}, "
            "which does something else to them: its SPLADE head can't be attached"
        )
    features["sentence_embedding"] = found
    return features


def _refuse_replicas(model: Any, head: Any, features: Features) -> None:
    """Those of nn.DataParallel would run the original's forward, which is on another GPU."""
    own = lm_heads.linear(head).weight.device
    given = {value.device for value in features.values() if isinstance(value, Tensor)}
    if own.type == "cuda" and any(d.type == "cuda" and d != own for d in given) and not hasattr(model, "hf_device_map"):
        raise ValueError(
            f"expected features on {own}, where the attached encoder is: nn.DataParallel makes copies that are not "
            "attached, so start a process for each GPU (torchrun, accelerate launch)"
        )


def _is_cast(found: Any, pooled: Tensor) -> bool:
    return isinstance(found, Tensor) and found.shape == pooled.shape and torch.equal(found, pooled.to(found))


@outside_compile
def _pool_instead(hidden: Tensor) -> Tensor:  # (N, L, H) -> (N, V)
    """The forward of the head's last layer."""
    call = _CALL.get()
    call.pooled = lm_heads.run_inside(call.head, hidden, partial(_pooled, call), called=True)
    return call.pooled


def _pooled(call: _Call, hidden: Tensor) -> Tensor:
    head = lm_heads.head(call.head, hidden, 1.0, None)
    hidden, weight = head.hidden, head.weight
    if head.extra:  # one product of all terms, side by side
        hidden = torch.cat([hidden, *(x for x, _ in head.extra)], -1)
        weight = torch.cat([weight, *(more for _, more in head.extra)], -1)
    options = {"pooling": call.pooling.pooling_strategy, "activation": call.pooling.activation_function}
    bounds = call.features.get("cu_seq_lens_q")
    if bounds is None:
        mask = call.features["attention_mask"].to(hidden.device)
        return splade_pool(hidden, weight, head.bias, mask=mask, **options)
    rows = hidden.flatten(0, -2)  # without padding, one text behind the other
    places = torch.arange(len(rows), device=rows.device, dtype=bounds.dtype)
    text = torch.searchsorted(bounds[1:].to(rows.device), places, right=True)
    return splade_pool(rows, weight, head.bias, text, n_texts=len(bounds) - 1, **options)


def _hand_on(pooling: Any, features: Features) -> Features:
    """The forward of SpladePooling, where there is something left to pool."""
    if "token_embeddings" in features or "sentence_embedding" not in features:
        return type(pooling).forward(pooling, features)
    if pooling.embedding_dimension is None:
        pooling.embedding_dimension = features["sentence_embedding"].shape[1]
    return features
