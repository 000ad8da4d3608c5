"""What the losses share: checks of what a caller gives, and the projection that is applied to every side."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

import torch.nn.functional as F
from torch import Tensor

from ..engine import FlexChunkLoss, Projection
from ..engine.types import accumulator_dtype

Activation = Callable[[Tensor], Tensor]
Rows = dict[str, Tensor]
L = TypeVar("L", bound=FlexChunkLoss)


class Embedding(FlexChunkLoss):
    """Outputs are embeddings, behind an activation and a normalisation where the caller has those."""

    def __init__(self, activation: Activation | None = None, normalize: bool = False, **options: Any) -> None:
        super().__init__(**options)
        if activation is not None and not callable(activation):
            raise TypeError(f"expected activation to be callable, got {activation!r}")
        self.activation = activation
        self.normalize = bool(normalize)

    def embed(self, outputs: Tensor) -> Tensor:
        if self.activation is not None:
            outputs = self.activation(outputs)
        return F.normalize(outputs, dim=1) if self.normalize else outputs


@lru_cache(maxsize=256)
def shared(kind: type[L], **options: Any) -> L:
    """A loss has no state: one instance serves every call with the same options."""
    return kind(**options)


def project(sides: dict[str, Tensor], weight: Tensor | None, bias: Tensor | None) -> dict[str, Projection]:
    shapes = {name: tuple(side.shape) for name, side in sides.items()}
    if len(set(shapes.values())) > 1 or any(len(shape) != 2 for shape in shapes.values()):
        raise ValueError(f"expected embeddings of one shape (N, H), got {shapes}")
    dtypes = {name: side.dtype for name, side in sides.items()}
    if weight is None and len(set(dtypes.values())) > 1:
        raise TypeError(f"expected embeddings of one dtype, got {dtypes}")
    return {name: Projection(side, weight, bias) for name, side in sides.items()}


def check_labels(labels: Tensor, rows: Tensor) -> None:
    if labels.shape != rows.shape[:1] or labels.device != rows.device or labels.is_complex():
        raise ValueError(
            f"expected one label per row, ({rows.shape[0]},) on {rows.device}, "
            f"got {tuple(labels.shape)} on {labels.device}"
        )
    if labels.is_floating_point() and bool(labels.isnan().any()):
        raise ValueError("expected labels without NaN")


def finite(name: str, value: float) -> float:
    if isinstance(value, Tensor) or not math.isfinite(value):
        raise ValueError(f"expected {name} to be finite, got {value}")
    return float(value)


def scalar(name: str, value: Tensor, like: Tensor) -> Tensor:  # -> ()
    """A tensor of one number, where and as wide as sums over ``like`` are."""
    if value.numel() != 1 or not value.is_floating_point():
        raise ValueError(
            f"expected {name} to be a number or a floating-point tensor of one element, "
            f"got {value.dtype} {tuple(value.shape)}"
        )
    return value.reshape(()).to(device=like.device, dtype=accumulator_dtype(like.dtype))


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"expected {name} to be one of {list(allowed)}, got {value!r}")
    return value
