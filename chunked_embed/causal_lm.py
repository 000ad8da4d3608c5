"""Losses inside a causal language model's own forward: ``attach(model)``, then ``model(**inputs, head_fn=...)``.

A chunked loss wants hidden states and the head's weight, not logits. Taking them from outside of the model goes past
whatever wraps it: DDP then leaves gradients unsynchronised, FSDP and ZeRO-3 hold shards, PEFT's adapter on the head is
missed. Here the loss runs where the head would, so all of them see an ordinary forward::

    causal_lm.attach(model)
    causal_lm.check(model, {"input_ids": ids, "attention_mask": mask})  # once: the head is all that makes its logits
    model = DistributedDataParallel(model)  # or accelerate, FSDP, PEFT, ...
    loss = CPOLoss()  # of ``alignment``; all of theirs and of ``distill`` take heads
    out = model(input_ids=ids, attention_mask=mask, head_fn=lambda head: loss(head.shifted(), target=ids[:, 1:]))
    out.value.loss.backward()

Works on models of transformers by their attributes; imports none of it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import checks, lm_heads
from .engine.compile import outside_compile
from .engine.types import accumulator_dtype
from .head import Head
from .kernels.token_scores import transform_logits

__all__ = ["Head", "HeadOutput", "attach", "capture", "check", "evaluating", "logit_transform", "unwrapped"]

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

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from chunked_embed import causal_lm
        >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
        >>> causal_lm.attach(model)
        >>> ids = torch.randint(0, 64, (2, 8))
        >>> out = model(input_ids=ids, head_fn=lambda head: {"logps": head.shifted().logps(ids[:, 1:])})
        >>> out.value["logps"].shape, out.aux_loss
        (torch.Size([2, 7]), None)
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

    Before or after the model is wrapped, split over devices or given adapters. Attaching twice is attaching once, and
    restores what another library replaced. A model that is not attached may swallow ``head_fn`` and return logits;
    ``check`` finds that, too.

    Raises:
        TypeError: not a causal language model with a linear head, or with an adapter on it of a kind that is not known.
        ValueError: a head that is offloaded, or known adapters in a setting that is not.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from chunked_embed import causal_lm
        >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
        >>> causal_lm.attach(model)
        >>> ids = torch.randint(0, 64, (2, 8))
        >>> out = model(input_ids=ids, head_fn=lambda head: -head.shifted().logps(ids[:, 1:]).mean())
        >>> out.value.backward()
        >>> model.lm_head.weight.grad.shape
        torch.Size([64, 16])
    """
    base = unwrapped(model)
    for name in ("base_model", "get_output_embeddings", "config"):
        if not hasattr(base, name):
            raise TypeError(f"expected a causal language model of transformers, got {type(base).__name__}: no {name}")
    if getattr(base.config, "is_encoder_decoder", False):
        raise TypeError(f"expected a decoder-only model, got {type(base).__name__}, an encoder-decoder")
    backbone, head = _backbone(base), base.get_output_embeddings()
    if backbone is base:
        raise TypeError(f"expected a causal language model with a backbone, got {type(base).__name__} without one")
    lm_heads.check(head)
    if any(getattr(forward, "takes_head_fn", False) for forward in lm_heads.forwards(base)):
        return
    if any(module is head for module in backbone.modules()):
        raise TypeError(
            f"expected a head beside the backbone, got {type(base).__name__} with its head in {type(backbone).__name__}"
        )
    # Inside of accelerate's hooks, which move inputs; what it replaces stays on the model, so that a copy has a copy.
    hooked = any(isinstance(forward, functools.partial) for forward in lm_heads.forwards(base))
    name = "_old_forward" if hooked and "_old_forward" in vars(base) else "forward"
    kept = base.__dict__.setdefault("_forwards_without_head_fn", [])
    kept.append(getattr(base, name))
    setattr(base, name, MethodType(_with_head_fn(type(base), len(kept) - 1, _autocast(base)), base))


def _with_head_fn(kind: type, k: int, autocast: torch.autocast | None) -> Callable[..., Any]:
    """A forward around the ``k``-th that a model had: one of the others may call this one."""

    def forward(self: Any, *args: Any, head_fn: HeadFn | None = None, **kwargs: Any) -> Any:
        if head_fn is None:
            return self._forwards_without_head_fn[k](*args, **kwargs)
        with copy.copy(autocast) if autocast else contextlib.nullcontext():  # it keeps what was before it
            return _forward(self, head_fn, *args, **kwargs)

    # generate() reads it. Without __wrapped__: accelerate's unwrapping would go on to what that names.
    forward.__signature__ = inspect.signature(kind.forward)  # type: ignore[attr-defined]
    forward.takes_head_fn = True  # type: ignore[attr-defined]
    return forward


def _autocast(model: Any) -> torch.autocast | None:
    """That of a wrapper around a model's forward, accelerate's for one: ours may come to stand outside of it."""
    for forward in lm_heads.forwards(model):
        for cell in getattr(forward, "__closure__", None) or ():
            found = None
            with contextlib.suppress(ValueError):  # an empty one
                found = cell.cell_contents
            if isinstance(found, torch.autocast):
                return found
    return None


def unwrapped(model: Any) -> Any:
    """The causal language model in wrappers: of torch (DDP, FSDP1, compile), DeepSpeed, PEFT.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from chunked_embed import causal_lm
        >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
        >>> causal_lm.unwrapped(torch.compile(model)) is model
        True
    """
    *_, last = _wrappers(model)
    return last


def _wrappers(model: Any) -> Iterator[Any]:
    """From the outermost to the causal language model."""
    while model is not None:
        yield model
        inner = getattr(model, "_orig_mod", getattr(model, "module", None))
        if inner is None and hasattr(model, "get_base_model"):
            inner = model.get_base_model()
        model = None if inner is model else inner


def _backbone(model: Any) -> Any:
    """What turns all inputs into hidden states: by transformers' prefix, or where that names nothing (Llama 4's)."""
    found = model.base_model
    return getattr(model, "model", model) if found is model else found


def _forward(model: Any, head_fn: HeadFn, *args: Any, **kwargs: Any) -> HeadOutput:
    kwargs = {**kwargs, "use_cache": False}
    kwargs.pop("labels", None)
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        kwargs.setdefault("output_router_logits", True)
    backbone = _backbone(model)(*args, **kwargs)
    module = model.get_output_embeddings()
    scale, softcap = logit_transform(model.config)
    aux_loss = _aux_loss(model, backbone, kwargs)
    contents: list[Any] = []

    def instead(hidden: Tensor) -> Tensor | tuple[Tensor, ...]:
        value = head_fn(lm_heads.head(module, hidden, scale, softcap))
        carriers, packed = _packed((value, aux_loss), hidden)
        contents.append(packed)
        return carriers

    carriers = lm_heads.run_inside(module, backbone.last_hidden_state, instead)
    (packed,) = contents
    return HeadOutput(carriers, lambda: packed)


def capture(model: nn.Module, inputs: Mapping[str, Any]) -> Head:
    """The head and hidden states of a frozen model to which ``attach`` was applied: a teacher, or a reference.

    Without gradients. Hidden states are those of all tokens, (B, T, H). Of a sharded model (FSDP, ZeRO-3) the head's
    weight is copied, since it goes back to shards after the forward.

    Raises:
        ValueError: a model that was not attached.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from chunked_embed import causal_lm
        >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
        >>> causal_lm.attach(model)
        >>> head = causal_lm.capture(model, {"input_ids": torch.randint(0, 64, (2, 8))})
        >>> head
        Head(hidden=(2, 8, 16), weight=(64, 16), logit_scale=1.0, logit_softcap=None)
        >>> head.hidden.requires_grad
        False
    """
    found: list[Head] = []
    sharded = _is_sharded(model)

    def keep(head: Head) -> None:
        head = head.detach()
        if sharded:
            bias = None if head.bias is None else head.bias.clone()
            head = replace(head, weight=head.weight.clone(), bias=bias)  # they go back to shards behind the forward
        found.append(head)

    with torch.no_grad():
        model(**inputs, head_fn=keep)
    _refuse_unattached(model, found)
    return found[0]


def _is_sharded(model: nn.Module) -> bool:
    """The head, by FSDP1, FSDP2 or ZeRO-3: in a unit of its own, or in one of those that the model is in."""
    head = unwrapped(model).get_output_embeddings()
    units = [*_wrappers(model), *lm_heads.nested(head)]
    by_fsdp = any(hasattr(unit, "unshard") or unit is not lm_heads.bare(unit) for unit in units)
    return by_fsdp or any(hasattr(p, "ds_id") or hasattr(p, "placements") for p in head.parameters())


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
    """Scale and soft-cap of a model's logits, under the names that transformers' configs have for them.

    Example:
        >>> from transformers import Gemma2Config, LlamaConfig
        >>> from chunked_embed import causal_lm
        >>> causal_lm.logit_transform(LlamaConfig())
        (1.0, None)
        >>> causal_lm.logit_transform(Gemma2Config())
        (1.0, 30.0)
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config

    def first(*names: str) -> float | None:
        return next((value for name in names if (value := getattr(text, name, None)) is not None), None)

    scale = first("logit_scale", "output_multiplier", "lm_head_multiplier")
    divisor = first("logits_scaling")
    if scale is None and divisor is not None:
        scale = divisor if text.model_type == "hyperclovax" else 1 / divisor
    softcap = first("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    return (1.0 if scale is None else float(scale)), (None if softcap is None else float(softcap))


def _aux_loss(model: Any, backbone: Any, kwargs: Mapping[str, Any]) -> Tensor | None:
    if not kwargs.get("output_router_logits"):
        return None
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    text = model.config.get_text_config()
    experts = getattr(text, "num_experts", None) or text.num_local_experts
    mask = kwargs.get("attention_mask")
    return load_balancing_loss_func(backbone.router_logits, experts, text.num_experts_per_tok, mask)


# --- the check at start ----------------------------------------------------------------------------------------------

SAMPLE_ROWS, SAMPLE_TOKENS = 2, 128  # of a batch that may be cut
POSITIONS = 32
# One rounding has a root mean square of a fifth of eps. The worst of real models is 0.6 (capped logits, LoRA in float32
# on a head in bfloat16), and among single logits 1.5.
ROUNDINGS, LARGEST = 0.8, 4.0


def check(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Compare logits as a ``Head`` describes them with the model's own, at a few positions of a batch.

    A model may do something to its logits that nobody knows of here: a soft-cap under a name of its own, a mask of
    image tokens. Both forwards form logits at these positions only; the backbone runs on a corner of the batch, or on
    all of it where there is more than text. ``inputs`` are those of the model's forward, ``input_ids`` among them.

    Raises:
        ValueError: they differ by more than rounding; no ``input_ids``; a model that was not attached.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from chunked_embed import causal_lm
        >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
        >>> causal_lm.attach(model)
        >>> causal_lm.check(model, {"input_ids": torch.randint(0, 64, (2, 8))})  # nothing to say
    """
    if "input_ids" not in checks.named("inputs", inputs):
        raise ValueError(f"expected input_ids among the inputs, got {list(inputs)}")
    model = getattr(model, "_orig_mod", model)  # compiled, for the sake of two calls
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    if all(v.shape == ids.shape for v in inputs.values() if isinstance(v, Tensor)):  # text, which may be cut
        inputs = {k: v[:SAMPLE_ROWS, :SAMPLE_TOKENS] if isinstance(v, Tensor) else v for k, v in inputs.items()}
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    used = mask > 0 if isinstance(mask, Tensor) and mask.shape == ids.shape else torch.ones_like(ids, dtype=torch.bool)
    places = used.nonzero()
    compared = len(places) > 0
    if not compared:  # other processes may have something to compare, and shards want all of them
        places = torch.zeros_like(ids[:1, :1]).expand(1, 2)
    places = places[torch.linspace(0, len(places) - 1, min(POSITIONS, len(places))).long().unique()]
    rows, columns = places[:, 0], places[:, 1] - ids.shape[1]  # from the end: virtual tokens are in front

    def few(states: Tensor) -> Tensor:
        if states.dim() != 3 or states.shape[1] < ids.shape[1]:
            return states  # not those of all tokens
        device = states.device
        return states[rows.to(device), columns.to(device)][None]

    dtypes: list[torch.dtype] = []
    described: list[Tensor] = []

    def describe(head: Head) -> None:
        device = head.hidden.device
        auto = torch.is_autocast_enabled(device.type)
        dtypes.append(torch.get_autocast_dtype(device.type) if auto else head.hidden.dtype)
        described.append(_logits(head[rows.to(device), columns.to(device)][None]))

    with torch.no_grad(), evaluating(model):
        model(**inputs, head_fn=describe)
        _refuse_unattached(model, described)
        with _head_at(model, few):
            logits = model(**inputs).logits
    if not compared:
        return
    if logits.shape[:2] != (1, len(places)):  # a head that is not called as a module
        logits = few(logits)
    dtypes.append(logits.dtype)  # FSDP2 may have cast them
    (found,) = described
    coarsest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    _compare(type(model).__name__, found, logits, coarsest)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A model in eval mode, and each module in its own mode afterwards.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from chunked_embed import causal_lm
        >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
        >>> with causal_lm.evaluating(model):
        ...     print(model.training)
        False
        >>> model.training
        True
    """
    # At every step, of modules by the thousand: modules() and setting attributes would take ten times as long.
    modules = [model]
    for module in modules:  # which grow by those inside
        if module._modules:
            modules += [inner for inner in module._modules.values() if inner is not None]
    states = [module.__dict__ for module in modules]
    training = [state for state in states if state.get("training")]  # of a compiled model it is a property
    for state in training:
        state["training"] = False
    try:
        yield
    finally:
        for state in training:
            state["training"] = True


@contextlib.contextmanager
def _head_at(model: nn.Module, few: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The model's head sees a few of its states, in the dtype of its weight: it may be wider than the rest."""
    head = unwrapped(model).get_output_embeddings()

    def cast(module: Any, args: tuple[Tensor, ...]) -> Any:
        (states,) = args
        return states if torch.is_autocast_enabled(states.device.type) else states.to(module.weight.dtype)

    hooks = [
        lm_heads.linear(head).register_forward_pre_hook(cast),
        head.register_forward_pre_hook(lambda _, args: (few(args[0]), *args[1:]), prepend=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _logits(head: Head) -> Tensor:
    """The product as the model takes it; what follows in float32, since it need not be rounded as the model's."""
    product = replace(head, logit_scale=1.0, logit_softcap=None).logits()
    scale, softcap = head.transform
    return transform_logits(product.to(accumulator_dtype(product.dtype)), logit_scale=scale, softcap=softcap)


def _compare(name: str, found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Of each position's logits the root mean square of the difference, and the largest: few may differ, or all."""
    size = found.square().mean(-1, keepdim=True).sqrt().clamp_min(torch.finfo(found.dtype).tiny)
    difference = found - expected.to(found)
    overall = difference.square().mean(-1, keepdim=True).sqrt() / size
    largest = difference.abs() / (found.abs() + size)
    tolerance = max(ROUNDINGS * torch.finfo(dtype).eps, 1e-8 if dtype == torch.float64 else 1e-3)
    worst = torch.stack([overall.max(), largest.max() / LARGEST]).max().item()
    if not worst <= tolerance:  # or nobody knows
        raise ValueError(
            f"expected the logits of {name} to follow from its hidden states and LM head, got a difference of "
            f"{worst:.1e} times their size: it does something to its logits that is not known here (a soft-cap, a "
            "scale, a mask), so a loss on them would be wrong"
        )
