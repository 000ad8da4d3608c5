"""What an LM head is: a linear layer, and the wrappers that adapters, FSDP and accelerate put around it.

A head is what its forward computes, so only modules whose forward is known are read: ``nn.Linear``, and of PEFT plain
LoRA and DoRA, copies to save, and trainable tokens. All else is refused, when a model is attached.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .engine.compile import outside_compile
from .head import Head

# PEFT's classes, by their modules: there is none of them where those are not imported.
LORA = ("peft.tuners.lora.layer", "Linear")
DORA = ("peft.tuners.lora.dora", "DoraLinearLayer")
SAVED = ("peft.utils.other", "ModulesToSaveWrapper")
TOKENS = ("peft.utils.other", "TrainableTokensWrapper")
TOKEN_LAYER = ("peft.tuners.trainable_tokens.layer", "TrainableTokensLayer")
DORA_VARIANT = "DoraLinearVariant"
VARIANTS = (DORA_VARIANT, "MiCALinearVariant")  # the second is plain LoRA with B frozen


class Terms(NamedTuple):
    """Of the logits: ``hidden @ weight.T + bias``, and products of other inputs."""

    weight: Tensor
    bias: Tensor | None
    extra: tuple[tuple[Tensor, Tensor], ...] = ()


# --- which modules ---------------------------------------------------------------------------------------------------


def check(module: Any) -> None:
    """Refuse a head that is none of the known kinds, with any of its adapters.

    Raises:
        TypeError: another module, or a forward of its own.
        ValueError: a known adapter in a setting that is not; a weight that is not in memory.
    """
    module = bare(module)
    if _is(module, SAVED):
        for each in (module.original_module, *module.modules_to_save.values()):
            check(each)
        return
    inner = _inside(module)
    if inner is None:
        _check_linear(module)
        return
    if _is(module, TOKEN_LAYER) and not isinstance(bare(inner), nn.Linear):
        raise TypeError(f"expected trainable tokens on a plain LM head, got them on {type(inner).__name__}")
    if _is(module, LORA):
        _check_lora(module)
    check(inner)


def _check_lora(module: Any) -> None:
    for name in module.lora_A:
        variant = _variant(module, name)
        plain = all(type(bare(part[name])).forward is nn.Linear.forward for part in (module.lora_A, module.lora_B))
        if variant not in ("", *VARIANTS) or not plain:
            kind = variant or type(bare(module.lora_A[name])).__name__
            raise ValueError(f"expected plain LoRA or DoRA on the LM head, got {kind}: adapter {name!r}")
        if variant != DORA_VARIANT:
            continue
        magnitude, base = bare(module.lora_magnitude_vector[name]), bare(module.base_layer)
        if not (_is(magnitude, DORA) and isinstance(base, nn.Linear)):
            raise ValueError(f"expected DoRA on a plain LM head, got it on {type(base).__name__}: adapter {name!r}")


def _variant(module: Any, name: str) -> str:
    """Of LoRA; empty: plain."""
    variants = getattr(module, "lora_variant", {})
    return type(variants[name]).__name__ if name in variants else ""


def _check_linear(module: Any) -> None:
    name = type(module).__name__
    if hasattr(module, "base_layer"):
        raise TypeError(
            "expected an adapter on the LM head to be LoRA, DoRA, modules_to_save or trainable_token_indices, got "
            f"{type(module).__module__}.{name}"
        )
    if not isinstance(module, nn.Linear) or not module.weight.is_floating_point():
        raise TypeError(f"expected an LM head that is a Linear layer of floating weights, got {name}")
    if nn.Linear.forward not in forwards(module):
        raise TypeError(f"expected an LM head whose forward is nn.Linear's, got {name} with a forward of its own")
    hook = getattr(module, "_hf_hook", None)
    if any(getattr(one, "offload", False) for one in (hook, *getattr(hook, "hooks", ()))):
        raise ValueError("expected an LM head in memory, got an offloaded one: keep it on a device in the device_map")


def forwards(module: Any) -> Iterator[Any]:
    """A module's forward, and what that is around: wrappers say what they wrap, accelerate's hooks keep what it was."""
    forward = module.forward
    while forward is not None:
        yield forward
        if isinstance(forward, functools.partial) and "_old_forward" in vars(module):
            forward = module._old_forward
        else:
            forward = getattr(forward, "__func__", None) or getattr(forward, "__wrapped__", None)


def bare(module: Any) -> Any:
    """The module in units of FSDP1."""
    while "_fsdp_wrapped_module" in getattr(module, "_modules", ()):
        module = module._fsdp_wrapped_module
    return module


def linear(module: Any) -> nn.Linear:
    """The layer inside of all wrappers."""
    *_, last = nested(module)
    return bare(last)


def _is(module: Any, path: tuple[str, str]) -> bool:
    """Of a class, or of one that FSDP2 made of it: not with a forward of its own."""
    known = getattr(sys.modules.get(path[0]), path[1], None)
    return known is not None and isinstance(module, known) and type(module).forward is known.forward


def _inside(module: Any) -> Any:
    """What a wrapper of PEFT adds to; None: nothing, the module is the layer itself."""
    if _is(module, SAVED):
        return _saved(module)
    if _is(module, TOKENS):
        return module.token_adapter
    return module.base_layer if _is(module, TOKEN_LAYER) or _is(module, LORA) else None


def nested(module: Any) -> Iterator[Any]:
    """A head's modules, from the outermost to the layer."""
    while module is not None:
        yield module
        module = _inside(bare(module))


def _read(module: Any) -> Iterator[Any]:
    """The modules whose parameters have a part in the logits now, wrappers in front of what they are around."""
    for wrapper in nested(module):
        yield wrapper
        if _is(lora := bare(wrapper), LORA):
            for name in _active(lora):
                parts = (lora.lora_A, lora.lora_B, lora.lora_magnitude_vector)
                yield from (part[name] for part in parts if name in part)


def _saved(module: Any) -> Any:
    """The copy that is trained, or what it was copied from."""
    active = module.active_adapters
    if module.disable_adapters or not active or any(name not in module.modules_to_save for name in active):
        return module.original_module
    return module.modules_to_save[active[0]]


def _active(module: Any) -> list[str]:
    """A layer's adapters that have a part in its output now."""
    if module.disable_adapters or module.merged:
        return []
    own = module.lora_A if _is(module, LORA) else module.trainable_tokens_delta
    return [name for name in module.active_adapters if name in own]


# --- inside of their forwards ----------------------------------------------------------------------------------------


@outside_compile
def run_inside(module: Any, hidden: Tensor, fn: Callable[[Tensor], Any], *, called: bool = False) -> Any:
    """``fn(hidden)`` in place of the forwards of all modules that the head reads, one in another; if the outermost was
    ``called`` already, of those inside of it.

    In place, not beside: what hooks and wrappers of each do (gather a shard, say) is done around it.
    """
    for each in reversed(list(_read(module))[called:]):
        fn = functools.partial(_as_forward, each, fn)
    return fn(hidden)


def _as_forward(module: Any, fn: Callable[[Tensor], Any], hidden: Tensor) -> Any:
    """A call of the module whose forward is ``fn``."""
    with forward_of(module, fn):
        return module(hidden)


@contextmanager
def forward_of(module: Any, fn: Callable[[Tensor], Any]) -> Iterator[None]:
    """While open, the module's forward is ``fn``."""
    inner = bare(module)
    own = inner.__dict__.get("forward")
    inner.forward = fn
    try:
        yield
    finally:
        if own is None:
            del inner.forward
        else:
            inner.forward = own


# --- what they compute -----------------------------------------------------------------------------------------------


def head(module: Any, hidden: Tensor, scale: float, softcap: float | None) -> Head:
    """All that turns hidden states into logits, as the module would now; they go to its device."""
    layer = linear(module)
    if layer.weight.is_meta:
        raise ValueError("expected an LM head in memory, got one on the meta device (offloaded)")
    hidden = hidden.to(layer.weight.device)
    weight, bias, extra = _terms(module, hidden)
    dtype = hidden.dtype
    if not torch.is_autocast_enabled(hidden.device.type):
        # A float32 head on bfloat16 states, or the reverse, which would not run alone: neither loses digits.
        dtype = torch.promote_types(dtype, weight.dtype)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    bias = None if bias is None else bias.to(weight.dtype)
    extra = tuple((x.to(dtype), more.to(weight.dtype)) for x, more in extra)
    return Head(hidden, weight, bias, extra, scale, softcap)


def _terms(module: Any, hidden: Tensor) -> Terms:
    module = bare(module)
    inner = _inside(module)
    if inner is None:
        return Terms(_whole(module.weight), None if module.bias is None else _whole(module.bias))
    adapts = _is(module, LORA) or _is(module, TOKEN_LAYER)
    if adapts and module.disable_adapters and module.merged:
        module.unmerge()  # as its forward does
    terms = _terms(inner, hidden)
    for name in _active(module) if adapts else ():
        terms = (_with_lora if _is(module, LORA) else _with_tokens)(module, name, terms, hidden)
    return terms


def _with_tokens(module: Any, name: str, base: Terms, hidden: Tensor) -> Terms:
    """Rows of its own for some tokens. The layer's bias has no part in it then."""
    index = torch.tensor(module.token_indices[name], device=base.weight.device)
    rows = _whole(module.trainable_tokens_delta[name]).to(base.weight)
    return Terms(base.weight.index_copy(0, index, rows), None)


def _with_lora(module: Any, name: str, base: Terms, hidden: Tensor) -> Terms:
    """An adapter as a further term: ``(hidden @ A.T, scale * B)``; of DoRA also a factor for each token."""
    down, up, dropout = bare(module.lora_A[name]), bare(module.lora_B[name]), module.lora_dropout[name]
    low, high = _whole(down.weight), module.scaling[name] * _whole(up.weight)
    more = None if up.bias is None else module.scaling[name] * _whole(up.bias)
    x = dropout(hidden.to(low.dtype))
    states = F.linear(x, low)
    weight, bias, extra = base
    if _variant(module, name) == DORA_VARIANT:
        layer = linear(module)
        own, own_bias = _whole(layer.weight).to(x.dtype), None if layer.bias is None else _whole(layer.bias)
        magnitude = _whole(bare(module.lora_magnitude_vector[name]).weight)
        factor = magnitude / _norms(own, low, high).to(magnitude.dtype)
        high = factor[:, None] * high  # and PEFT has no bias beside it
        if module.training and not isinstance(dropout, nn.Identity):
            extra = (*extra, (x, (factor - 1)[:, None] * own))  # the layer on dropped states, and no other term
        else:
            weight = factor[:, None] * weight
            extra = tuple((z, factor[:, None] * w) for z, w in extra)
            bias = None if bias is None else factor * bias - (0 if own_bias is None else (factor - 1) * own_bias)
    if more is not None:
        bias = more if bias is None else bias + more
    return Terms(weight, bias, (*extra, (states, high)))


@torch.no_grad()
def _norms(weight: Tensor, low: Tensor, high: Tensor) -> Tensor:  # -> (V,)
    """Of the rows of the adapted weight: constants for the gradient, as DoRA defines it."""
    return torch.linalg.norm(weight + (high @ low).to(weight.dtype), dim=1)


def _whole(parameter: Tensor) -> Tensor:
    """A sharded parameter that nothing has gathered: once, with gradients averaged over the processes as FSDP does."""
    if "torch.distributed.tensor" not in sys.modules:  # nobody has made one, and its import is slow
        return parameter
    from torch.distributed.tensor import DTensor, Partial

    if not isinstance(parameter, DTensor):
        return parameter
    if "tp" in (parameter.device_mesh.mesh_dim_names or ()):
        raise ValueError("expected an LM head that is whole or sharded by FSDP, got one sharded for tensor parallelism")
    return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)
