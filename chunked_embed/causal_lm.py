"""Losses inside a causal language model's own forward: ``attach(model)``, then ``model(**inputs, head_fn=...)``.

A chunked loss wants hidden states and the head's weight, not logits. Taking them from outside of the model goes past
whatever wraps it: DDP then leaves gradients unsynchronised, FSDP and ZeRO-3 hold shards, PEFT's adapter on the head is
missed. Here the loss runs where the head would, so all of them see an ordinary forward::

    causal_lm.attach(model)
    causal_lm.check(model, {"input_ids": ids, "attention_mask": mask})  # once: the head is all that makes its logits
    model = DistributedDataParallel(model)  # or accelerate, FSDP, PEFT, ...
    loss = CPOLoss()  # of ``alignment`` and ``distill``, each takes a head
    out = model(input_ids=ids, attention_mask=mask, head_fn=lambda head: loss(head.shifted(), target=ids[:, 1:]))
    out.value.loss.backward()

Works on models of transformers by their attributes; imports none of it.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import checks
from .engine.compile import outside_compile
from .head import Head

__all__ = ["Head", "HeadOutput", "attach", "capture", "check", "logit_transform"]

HeadFn = Callable[[Head], Any]


class HeadOutput(NamedTuple):
    """What ``model(**inputs, head_fn=...)`` returns: ``value`` and ``aux_loss``, to the last digit.

    What leaves a wrapped forward is not left alone: FSDP2 casts it to its policy's ``output_dtype``, in every unit that
    it leaves, and accelerate's bf16 sets that to bfloat16. A sum of log-probabilities then has three digits. Yet a
    wrapper must see the graph: FSDP2 and ZeRO-3 hook the gradients of outputs to gather what backward needs, DDP looks
    behind them for parameters that were not used.

    So each tensor that requires grad is represented by a zero of its graph, its *carrier*, and that is all that
    wrappers see. The tensors go past them, and so do their gradients, which come through the carriers' hooks as zeros
    and are handed over behind. What requires no grad has no carrier.
    """

    carriers: Tensor | tuple[Tensor, ...]
    contents: Callable[[], Any]
    """A function, since wrappers look into containers and complain of classes that they do not know."""

    @property
    def value(self) -> Any:
        """The function's result; tensors that require grad are found in tuples, lists, dicts and dataclasses."""
        return _unpacked(self.carriers, self.contents()[0])

    @property
    def aux_loss(self) -> Tensor | None:
        """The load-balancing loss of a mixture of experts, if router logits were asked for."""
        return _unpacked(self.carriers, self.contents()[1])


def attach(model: Any) -> None:
    """Let ``model(**inputs, head_fn=fn)`` return ``HeadOutput(fn(head))`` instead of logits; else nothing changes.

    Before the model is wrapped, except by PEFT. Attaching twice is attaching once. A model that is not attached may
    swallow ``head_fn`` and return logits; ``check`` finds that, too.

    Raises:
        TypeError: not a causal language model with a linear head.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT's
    if getattr(base.forward, "takes_head_fn", False):
        return
    for name in ("base_model", "get_output_embeddings", "config"):
        if not hasattr(base, name):
            raise TypeError(f"expected a causal language model of transformers, got {type(base).__name__}: no {name}")
    if getattr(base.config, "is_encoder_decoder", False):
        raise TypeError(f"expected a decoder-only model, got {type(base).__name__}, an encoder-decoder")
    if base.base_model is base:
        raise TypeError(f"expected a causal language model with a backbone, got {type(base).__name__} without one")
    _linear(base.get_output_embeddings())
    base._forward_without_head_fn = base.forward  # on the model, so that a copy of it has a copy of this

    @functools.wraps(type(base).forward)  # generate() reads the signature
    def forward(self: Any, *args: Any, head_fn: HeadFn | None = None, **kwargs: Any) -> Any:
        if head_fn is None:
            return self._forward_without_head_fn(*args, **kwargs)
        return _forward(self, head_fn, *args, **kwargs)

    forward.takes_head_fn = True  # type: ignore[attr-defined]
    base.forward = MethodType(forward, base)


def _forward(model: Any, head_fn: HeadFn, *args: Any, **kwargs: Any) -> HeadOutput:
    kwargs = {**kwargs, "use_cache": False}
    kwargs.pop("labels", None)
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        kwargs.setdefault("output_router_logits", True)
    backbone = model.base_model(*args, **kwargs)
    module = model.get_output_embeddings()
    scale, softcap = logit_transform(model.config)
    aux_loss = _aux_loss(model, backbone, kwargs)
    contents: list[Any] = []

    def instead(hidden: Tensor) -> Tensor | tuple[Tensor, ...]:
        value = head_fn(_head(module, hidden, scale, softcap))
        carriers, packed = _packed((value, aux_loss), hidden)
        contents.append(packed)
        return carriers

    # In place of the head's forward, not beside it: what its hooks do (gather a shard, say) is done around the loss.
    own = module.__dict__.get("forward")
    module.forward = instead
    try:
        carriers = module(backbone.last_hidden_state)
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
    (packed,) = contents
    return HeadOutput(carriers, lambda: packed)


def capture(model: nn.Module, inputs: Mapping[str, Any]) -> Head:
    """The head and hidden states of a frozen model to which ``attach`` was applied: a teacher, or a reference.

    No gradients; nothing is kept of them.
    """
    found: list[Head] = []

    def keep(head: Head) -> None:
        head = head.detach()
        if any(hasattr(module, "unshard") for module in model.modules()):  # FSDP
            bias = None if head.bias is None else head.bias.clone()
            head = replace(head, weight=head.weight.clone(), bias=bias)  # they go back to shards behind the forward
        found.append(head)

    with torch.no_grad():
        model(**inputs, head_fn=keep)
    _refuse_unattached(model, found)
    return found[0]


def _refuse_unattached(model: nn.Module, found: list[Any]) -> None:
    """A model of transformers takes any argument, and does nothing with those that it does not know."""
    if not found:
        raise ValueError(
            f"expected a model to which causal_lm.attach was applied, got {type(model).__name__} as it was"
        )


# --- past a model's outputs -------------------------------------------------------------------------------------------


class _Lane:
    """A tensor's way past the outputs, and its gradient's way back."""

    def __init__(self, tensor: Tensor, index: int, taken: list[bool]) -> None:
        self.tensor = tensor.detach()
        self.index = index
        self.grad: Tensor | None = None
        self.taken = taken  # whether any tensor of the same value was: that list holds something then


class _Carrier(torch.autograd.Function):
    """Inside of the model: a zero in the place of the tensor. Backward: the gradient that arrived beside its own."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, lane: _Lane) -> Tensor:
        ctx.lane = lane
        return tensor.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        found, ctx.lane.grad = ctx.lane.grad, None
        if not ctx.lane.taken:
            raise RuntimeError(
                "expected backward through the .value of what the model returned, got it through the zeros in its place"
            )
        return found, None


class _Exact(torch.autograd.Function):
    """Outside of it: the tensor, in the graph of its carrier. Backward: a zero, which runs the hooks on the way."""

    @staticmethod
    def forward(ctx: Any, carrier: Tensor, lane: _Lane) -> Tensor:
        lane.taken.append(True)
        ctx.lane, ctx.zero = lane, torch.zeros_like(carrier)
        return lane.tensor.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        lane = ctx.lane
        lane.grad = grad if lane.grad is None else lane.grad + grad  # a value may have been read twice
        return ctx.zero, None


@outside_compile
def _packed(value: Any, hidden: Tensor) -> tuple[Tensor | tuple[Tensor, ...], Any]:
    """-> carriers, one or several; and the value with lanes for the tensors that they stand for."""
    carriers: list[Tensor] = []
    taken: list[bool] = []

    def pack(leaf: Any) -> Any:
        if not (isinstance(leaf, Tensor) and leaf.requires_grad and torch.is_grad_enabled()):
            return leaf
        lane = _Lane(leaf, len(carriers), taken)
        carriers.append(_Carrier.apply(leaf, lane))
        return lane

    packed = _map(pack, value)
    if len(carriers) > 1:
        return tuple(carriers), packed
    return (carriers[0] if carriers else hidden.new_zeros(())), packed  # a tensor, as hooks on a head expect


@outside_compile
def _unpacked(carriers: Tensor | tuple[Tensor, ...], packed: Any) -> Any:
    each = (carriers,) if isinstance(carriers, Tensor) else carriers
    return _map(lambda leaf: _Exact.apply(each[leaf.index], leaf) if isinstance(leaf, _Lane) else leaf, packed)


def _map(fn: Callable[[Any], Any], value: Any) -> Any:
    """``fn`` of everything in tuples, lists, dicts and dataclasses: the containers in which FSDP2 finds tensors."""
    if isinstance(value, (tuple, list)):
        made = [_map(fn, item) for item in value]
        return value._make(made) if hasattr(value, "_make") else type(value)(made)
    if isinstance(value, dict):
        value = copy.copy(value)
        for key in value:
            value[key] = _map(fn, value[key])
        return value
    if is_dataclass(value) and not isinstance(value, type):
        value = copy.copy(value)
        for field in fields(value):
            object.__setattr__(value, field.name, _map(fn, getattr(value, field.name)))
        return value
    return fn(value)


# --- what a head is --------------------------------------------------------------------------------------------------


def logit_transform(config: Any) -> tuple[float, float | None]:
    """Scale and soft-cap of a model's logits, under the names that transformers' configs have for them."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config

    def first(*names: str) -> float | None:
        return next((value for name in names if (value := getattr(text, name, None)) is not None), None)

    scale = first("logit_scale", "output_multiplier", "lm_head_multiplier")
    divisor = first("logits_scaling")
    if scale is None and divisor is not None:
        scale = divisor if text.model_type == "hyperclovax" else 1 / divisor
    softcap = first("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    return (1.0 if scale is None else float(scale)), (None if softcap is None else float(softcap))


def _linear(module: Any) -> nn.Linear:
    """The linear layer in a head, under PEFT's wrappers."""
    if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
        active = module.active_adapters
        if module.disable_adapters or not active:
            return _linear(module.original_module)
        return _linear(module.modules_to_save[active[0]])
    layer = module.base_layer if hasattr(module, "base_layer") else module
    if not isinstance(layer, nn.Linear) or not layer.weight.is_floating_point():
        raise TypeError(f"expected an LM head that is a Linear layer of floating weights, got {type(layer).__name__}")
    return layer


def _head(module: Any, hidden: Tensor, scale: float, softcap: float | None) -> Head:
    layer = _linear(module)
    weight, bias = (None if p is None else _whole(p) for p in (layer.weight, layer.bias))
    assert weight is not None
    if weight.is_meta:
        raise ValueError("expected an LM head in memory, got one on the meta device (offloaded)")
    hidden = hidden.to(weight.device)
    return Head(hidden, weight, bias, _lora(module, hidden, weight.dtype), scale, softcap)


def _whole(parameter: Tensor) -> Tensor:
    """A sharded head that nothing has gathered: once, with gradients averaged over the processes as FSDP does."""
    if "torch.distributed.tensor" not in sys.modules:  # nobody has made one, and its import is slow
        return parameter
    from torch.distributed.tensor import DTensor, Partial

    if not isinstance(parameter, DTensor):
        return parameter
    if "tp" in (parameter.device_mesh.mesh_dim_names or ()):
        raise ValueError("expected an LM head that is whole or sharded by FSDP, got one sharded for tensor parallelism")
    return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)


def _lora(module: Any, hidden: Tensor, dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor], ...]:
    """LoRA adapters on the head, as further terms of its product: ``(hidden @ A.T, scale * B)``."""
    if not hasattr(module, "base_layer") or module.disable_adapters or module.merged:
        return ()
    if not hasattr(module, "lora_A"):
        raise TypeError(f"expected an adapter on the LM head to be LoRA, got {type(module).__name__}")
    found = []
    for name in module.active_adapters:
        if name not in module.lora_A:
            continue
        down, up = module.lora_A[name], module.lora_B[name]
        if name in getattr(module, "lora_variant", {}) or up.bias is not None or type(down) is not nn.Linear:
            raise ValueError(f"expected plain LoRA without bias on the LM head, got another kind: adapter {name!r}")
        x = down(module.lora_dropout[name](hidden.to(down.weight.dtype)))
        found.append((x.to(hidden.dtype), (module.scaling[name] * up.weight).to(dtype)))
    return tuple(found)


def _aux_loss(model: Any, backbone: Any, kwargs: Mapping[str, Any]) -> Tensor | None:
    if not kwargs.get("output_router_logits"):
        return None
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    text = model.config.get_text_config()
    experts = getattr(text, "num_experts", None) or text.num_local_experts
    mask = kwargs.get("attention_mask")
    return load_balancing_loss_func(backbone.router_logits, experts, text.num_experts_per_tok, mask)


# --- the check at start ----------------------------------------------------------------------------------------------

SAMPLE_ROWS, SAMPLE_TOKENS = 2, 128
TOLERANCE = {torch.float64: 1e-8, torch.float32: 2e-3, torch.bfloat16: 2e-2, torch.float16: 5e-3}


def check(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Compare logits as a ``Head`` describes them with the model's own, on a corner of a batch.

    A model may do something to its logits that nobody knows of here: a soft-cap under a name of its own, a mask of
    image tokens. ``inputs`` are those of the model's forward, ``input_ids`` among them.

    Raises:
        ValueError: they differ by more than rounding.
    """
    if "input_ids" not in checks.named("inputs", inputs):
        raise ValueError(f"expected input_ids among the inputs, got {list(inputs)}")
    if {k for k, v in inputs.items() if isinstance(v, Tensor)} <= {"input_ids", "attention_mask"}:  # may be cut
        inputs = {k: v[:SAMPLE_ROWS, :SAMPLE_TOKENS] if isinstance(v, Tensor) else v for k, v in inputs.items()}
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    used = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask > 0
    used &= used.flatten().cumsum(0).view_as(used) <= SAMPLE_ROWS * SAMPLE_TOKENS
    dtypes: list[torch.dtype] = []
    described: list[Tensor] = []

    def describe(head: Head) -> None:
        device = head.hidden.device.type
        dtypes.append(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.hidden.dtype)
        described.append(head[:, -ids.shape[1] :][used.to(head.hidden.device)].logits())

    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            model(**inputs, head_fn=describe)
            _refuse_unattached(model, described)
            logits = model(**inputs).logits[:, -ids.shape[1] :]
    finally:
        for module, training in modes:
            module.training = training
    (found,) = described
    if not len(found):
        return
    dtypes.append(logits.dtype)  # FSDP2 may have cast them
    expected = logits[used.to(logits.device)].to(found)
    difference = ((found - expected).abs().max() / (1 + found.abs().max())).item()
    if not difference <= max(TOLERANCE[dtype] for dtype in dtypes):
        raise ValueError(
            f"expected the logits of {type(model).__name__} to follow from its hidden states and LM head, got a "
            f"difference of {difference:.1e} times their size: it does something to its logits that is not known here "
            "(a soft-cap, a scale, a mask), so a loss on them would be wrong"
        )
