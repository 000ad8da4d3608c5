"""A model's trailing ``Dense`` and ``Normalize``, found where they can run inside the loss's chunk.

Without a chunk they run on the whole batch and keep two or three copies of it. Anything unusual about them (a hook, an
adapter, a residual, a patched forward) would be skipped along with them, so each of these is a reason to leave them be.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.parallel import DistributedDataParallel

from chunked_embed.functional.arguments import FUNCTIONS, as_function
from chunked_embed.losses._compat import Dense, Normalize, SentenceTransformer, is_plain

_KEY = "sentence_embedding"


@dataclass(frozen=True)
class Tail:
    """Modules to skip, and the projection that stands for them."""

    modules: tuple[nn.Module, ...]
    projection: dict[str, Any]
    touched: tuple[Tensor, ...] = ()

    @contextmanager
    def skipped(self) -> Iterator[None]:
        """While open, the model hands its features through these modules unchanged."""
        try:
            for module in self.modules:
                module.forward = partial(_pass_through, touched=self.touched)
            yield
        finally:
            for module in self.modules:
                vars(module).pop("forward", None)


NO_TAIL = Tail((), {})


def _pass_through(features: dict[str, Tensor], touched: tuple[Tensor, ...] = ()) -> dict[str, Tensor]:
    # DistributedDataParallel takes a parameter that no output depends on for unused, and would not wait for the
    # gradient that the loss gives it. An empty slice ties it to the outputs and adds exactly nothing.
    if touched and torch.is_grad_enabled():
        return {**features, "touched": torch.cat([parameter.flatten()[:0] for parameter in touched]).sum()}
    return features


def find_tail(model: nn.Module) -> Tail | str:
    """The model's fusable tail, or the reason why there is none."""
    inner = model.module if type(model) is DistributedDataParallel else model
    # FSDP shards the parameters, compiled and otherwise wrapped models hide the module list or hold a copy of it.
    if not isinstance(inner, SentenceTransformer) or type(inner).forward is not SentenceTransformer.forward:
        return f"{type(model).__name__} is not a plain or DDP-wrapped SentenceTransformer"
    if _has_any_global_hook() or not (is_plain(model) and is_plain(inner)):
        return "the model has hooks, a patched forward (as mixed precision sets) or a compiled one"
    children = list(inner.children())
    normalize = len(children) > 1 and type(children[-1]) is Normalize
    modules = [children.pop()] if normalize else []
    dense = children.pop() if len(children) > 1 and type(children[-1]) is Dense else None
    if dense is not None:
        modules.insert(0, dense)
    if not modules:
        return f"the last module is a {type(children[-1]).__name__}, not Dense or Normalize"
    for module in modules:
        if not is_plain(module):
            return f"{type(module).__name__} has hooks or a patched forward"
        if {getattr(module, f"module_{end}_name", _KEY) for end in ("input", "output")} != {_KEY}:
            return f"{type(module).__name__} does not map {_KEY} to {_KEY}"
    if dense is None:
        return Tail(tuple(modules), {"normalize": True})
    reason = _why_not(dense)
    if reason:
        return reason
    linear = dense.linear
    touched = () if inner is model else tuple(p for p in linear.parameters() if p.requires_grad)
    projection = {"weight": linear.weight, "bias": linear.bias, "activation": _activation(dense.activation_function)}
    return Tail(tuple(modules), {**projection, "normalize": normalize}, touched)


def _why_not(dense: Dense) -> str | None:
    linear, activation = dense.linear, dense.activation_function
    # Adapters and parametrisations replace the class or the parameter: ``weight`` is then not what is multiplied.
    if type(linear) is not nn.Linear or any(type(p) is not nn.Parameter for p in linear.parameters()):
        return f"Dense.linear is not a plain nn.Linear but a {type(linear).__name__}"
    if getattr(dense, "use_residual", False):
        return "Dense has a residual connection"
    if not is_plain(linear) or (isinstance(activation, nn.Module) and not is_plain(activation)):
        return "a part of Dense has hooks or a patched forward"
    if _activation(activation) is _UNKNOWN:
        return f"unknown activation {activation!r}"
    return None


_UNKNOWN = object()


def _activation(activation: Any) -> Any:
    if activation is None or type(activation) is nn.Identity:
        return None
    if isinstance(activation, nn.Module):
        return as_function(activation) or _UNKNOWN
    return next((function for function in FUNCTIONS.values() if function is activation), _UNKNOWN)
