"""What the losses share: embeddings behind a projection and an activation, and losses that are kept for all calls."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import FlexChunkLoss, Projection, checks
from ..chunking import Chunking
from ..engine.call import autocast_dtype, operand_dtype
from ..engine.types import accumulator_dtype
from ..engine.values import PLAIN
from ..signatures import Seen, signature

Activation = Callable[[Tensor], Tensor]
Rows = dict[str, Tensor]
L = TypeVar("L", bound=FlexChunkLoss)

TRAINED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
QUANTISED = re.compile(r"\bu?int8|float[48]_")  # in the name of a dtype, of torch or of NumPy


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


FUNCTIONS: Mapping[type[nn.Module], Activation] = {
    nn.Tanh: torch.tanh,
    nn.ReLU: torch.relu,
    nn.ReLU6: F.relu6,
    nn.Sigmoid: torch.sigmoid,
    nn.SiLU: F.silu,
    nn.Mish: F.mish,
    nn.Softsign: F.softsign,
    nn.Tanhshrink: F.tanhshrink,
    nn.LogSigmoid: F.logsigmoid,
}
"""The same function for all modules of a kind: it is part of what a step is compiled for."""


def as_function(module: nn.Module) -> Activation | None:
    """What a module computes that has no options; None of one that is not known."""
    if type(module) is nn.GELU:
        return F.gelu if module.approximate == "none" else gelu_tanh
    return FUNCTIONS.get(type(module))


class Embedding(FlexChunkLoss):
    """Outputs are embeddings, behind an activation and a normalisation where the caller has those."""

    def __init__(self, activation: Activation | None = None, normalize: bool = False, **options: Any) -> None:
        super().__init__(targets=(), **options)
        self.activation = frozen_activation(activation)
        self.normalize = checks.flag("normalize", normalize)

    def embed(self, outputs: Tensor) -> Tensor:
        if self.activation is not None:
            outputs = self.activation(outputs)
        return F.normalize(outputs, dim=1) if self.normalize else outputs


def frozen_activation(activation: Activation | None) -> Activation | None:
    """One that runs inside of a step, where its parameters would get no gradient."""
    checks.function_or_none("activation", activation)
    if not isinstance(activation, nn.Module):
        return activation
    if learning := [name for name, parameter in activation.named_parameters() if parameter.requires_grad]:
        raise ValueError(
            f"expected an activation without parameters that learn, got {type(activation).__name__} with {learning}: "
            "apply it to the embeddings before the call, and it will have its gradients"
        )
    if type(activation) is nn.Identity:
        return None
    return as_function(activation) or activation


def shared(kind: type[L], chunking: Chunking, **options: Any) -> L:
    """A loss has no state, so that one serves every call with the same options, and its plans with it. What may hold a
    batch alive is not kept: a function with a closure, say."""
    if all([type(value) in PLAIN or _holds_nothing(value) for value in options.values()]):
        return cast(L, _kept(cast(Any, kind), chunking, **options))
    return kind(**options, **chunking.keywords)


def _holds_nothing(value: Any) -> bool:
    """Whether it is a function, and has no closure, object or default that may hold a batch alive."""
    if isinstance(value, FunctionType):
        defaults = (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
        return value.__closure__ is None and all(type(default) in PLAIN for default in defaults)
    if isinstance(value, BuiltinFunctionType):
        return value.__self__ is None or isinstance(value.__self__, ModuleType)  # else a method of an object
    return False


@lru_cache(maxsize=256, typed=True)  # making modules takes longer than using them
def _kept(kind: Any, chunking: Chunking, **options: Any) -> Any:
    return kind(**options, **chunking.keywords)


def widened(x: Tensor) -> Tensor:
    """Half-precision embeddings in float32: parts of their gradient add up there, and are rounded once. Their products
    take operands in the dtype that they had, ``Projection(..., dtype=x.dtype)``."""
    return x.to(accumulator_dtype(x.dtype))


def project(sides: Mapping[str, Tensor], weight: Tensor | None, bias: Tensor | None) -> dict[str, Projection]:
    check_embeddings(sides, "H", one_dtype=weight is None)
    return {name: Projection(side, weight, bias) for name, side in sides.items()}


def check_embeddings(sides: Mapping[str, Tensor], width: str = "D", one_dtype: bool = True) -> None:
    """Embeddings of one shape (N, D) that is not empty, on one device."""
    told = signature(*sides.values())
    key = None if told is None else (told, one_dtype)
    if key in _SEEN.calls:
        return
    device = None
    for name, side in sides.items():
        check_trained(name, side, device)
        if side.dim() == 3:
            raise ValueError(
                f"expected {name} of shape (N, {width}), one embedding a row, got {tuple(side.shape)}: those of tokens "
                "must be pooled first"
            )
        checks.tensor(name, side, ("N", width))
        device = side.device
    shape = checks.one_shape("embeddings", sides)
    if 0 in shape:
        raise ValueError(f"expected embeddings (N, {width}) with at least one row and one column, got {shape}")
    if one_dtype:
        checks.one_dtype("embeddings", {name: side.dtype for name, side in sides.items()})
    _SEEN.keep(key)


_SEEN = Seen()  # embeddings that were checked, by shapes and dtypes


def check_trained(name: str, value: Any, device: torch.device | None = None) -> Tensor:
    """What a model in training puts out: a dense tensor of floating-point numbers. Quantised ones are for search."""
    if not (isinstance(value, Tensor) and value.dtype in TRAINED):
        found = str(value.dtype) if isinstance(value, Tensor) else checks.kind_of(value)
        if QUANTISED.search(found):
            raise TypeError(
                f"expected {name} to be floating point, got {found}: quantised embeddings can't be trained on"
            )
    return checks.tensor(name, value, device=device, kind="floating")


def token_operands(queries: Tensor, documents: Tensor) -> torch.dtype:
    """In which both are multiplied: autocast's, or the one that they have."""
    if autocast_dtype(queries.device) is None or torch.float64 in (queries.dtype, documents.dtype):
        checks.one_dtype("queries and documents", {"queries": queries.dtype, "documents": documents.dtype})
    return operand_dtype(queries.dtype, queries.device)


def token_mask(name: str, mask: Tensor | None, tokens: Tensor) -> Tensor | None:  # (..., L) of (..., L, H)
    """As bool, where there is one."""
    if mask is None:
        return None
    check_mask(name, mask, tuple(tokens.shape[:-1]), tokens.device)
    return mask if mask.dtype == torch.bool else mask != 0


def check_mask(name: str, mask: Any, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Bool or integers, one for each token."""
    checks.tensor(name, mask, shape, device=device)
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(f"expected {name} to be bool or hold integers, got {mask.dtype}")
    return mask


def check_labels(labels: Tensor, rows: Tensor) -> None:
    """One real number a row. Waits for the device where labels may be NaN."""
    checks.tensor("labels", labels, (len(rows),), device=rows.device, kind="real")
    checks.no_nan("labels", labels)
