"""What goes into the engine and what comes out of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Projection:
    """``outputs = input @ weight.T + bias``, computed a chunk of rows at a time and never held whole.

    Args:
        input: ``(..., H)``. Every leading dimension is a dimension of rows.
        weight: ``(V, H)``: an LM head, a Dense layer, or a bank of candidate embeddings. None is the identity: the
            outputs are the input.
        bias: ``(V,)``, only with a weight.
        extra: further ``(input, weight)`` terms of the same sum. A LoRA head is
            ``Projection(h, W, extra=((h @ A.T, s * B),))``: no copy of ``W``, no gradient for it when it is frozen.

    A tensor that does not require grad is frozen: its gradient product is skipped. The same tensor may serve several
    projections, or be input and weight at once; gradients add.
    """

    input: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    extra: tuple[tuple[Tensor, Tensor], ...] = field(default=())


class LossOutput(NamedTuple):
    """``loss``: a scalar that requires grad. ``metrics``: detached tensors by name, in the order of the user's rows.

    A tuple, so that DDP and FSDP find the loss in what a forward returns.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


Projections: TypeAlias = Projection | Mapping[str, Projection]
Tensors: TypeAlias = Mapping[str, Tensor]

HALF = (torch.float16, torch.bfloat16)


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums of half-precision products are kept in float32; float32 and float64 are their own accumulators."""
    return torch.float32 if dtype in HALF else dtype


def is_number(value: Any) -> bool:
    """A real number that is no boolean. Asked of every attribute in every call: ``Real`` takes its time to answer."""
    kind = type(value)
    return kind is float or kind is int or (kind not in (bool, str, tuple, type(None)) and isinstance(value, Real))
