"""What goes into the engine and what comes out of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

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
        cosine: outputs are cosines, ``x . w / (max(|x|, 1e-12) max(|w|, 1e-12))``: products of the rows as they are,
            times their inverse norms. No rounded unit vector enters a product, nor a gradient. With a weight, and
            neither bias nor extra terms.
        dtype: of the product's operands, which are cast to it. None: their own, or that of autocast. Gradients have the
            dtype of the tensors: ``Projection(x.float(), w.float(), dtype=torch.bfloat16)`` sums them in float32.

    A tensor that does not require grad is frozen: its gradient product is skipped. The same tensor may serve several
    projections, or be input and weight at once; gradients add.

    Example:
        >>> import torch
        >>> from chunked_embed import FlexChunkLoss, Projection
        >>> hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4)
        >>> A, B = torch.randn(2, 4), torch.randn(9, 2)  # a LoRA adapter on the head
        >>> projection = Projection(hidden, weight, extra=((hidden @ A.T, 0.5 * B),))
        >>> loss = FlexChunkLoss(lambda outputs, rows: outputs.logsumexp(1))
        >>> loss(projection).loss.backward()
        >>> hidden.grad.shape
        torch.Size([6, 4])
    """

    input: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    extra: tuple[tuple[Tensor, Tensor], ...] = field(default=())
    cosine: bool = False
    dtype: torch.dtype | None = None


class LossOutput(NamedTuple):
    """``loss``: a scalar that requires grad. ``metrics``: detached tensors by name, in the order of the user's rows,
    zero where a row was dropped.

    ``counts`` says by a metric's name how many units each of its entries stands for: tokens that are ignored count 0,
    a mean over 40 tokens counts 40. Where a metric has none, each entry counts 1.

    A tuple, so that DDP and FSDP find the loss in what a forward returns, and all three come out of their wrappers.

    Example:
        >>> import torch
        >>> from chunked_embed import LossOutput
        >>> kl, valid = torch.tensor([3.0, 0.0]), torch.tensor([1, 0])
        >>> LossOutput(torch.tensor(2.0), {"kl": kl}, {"kl": valid}).means
        {'kl': tensor(3.)}
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    counts: dict[str, Tensor] | None = None

    @property
    def sums(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Each metric's sum over the units that count, and their number: what adds up over batches and processes."""
        counts = self.counts or {}
        alike: dict[tuple, list[str]] = {}
        for name, value in self.metrics.items():
            count = counts.get(name)
            kind = None if count is None else (count.shape, count.dtype)
            alike.setdefault((value.shape, value.dtype, value.device, kind), []).append(name)
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for names in alike.values():
            first = names[0]
            if len(names) < MANY or (first in counts and counts[first].shape != self.metrics[first].shape):
                for name in names:
                    value = self.metrics[name]
                    count = counts[name] if name in counts else torch.ones_like(value)
                    found[name] = (value * count).sum(), count.sum()
                continue
            values = torch.stack([self.metrics[name] for name in names])  # those of a kind: each operation is a launch
            if first in counts:
                of_each = torch.stack([counts[name] for name in names])
                values, numbers = values * of_each, _sum_each(of_each)
            else:
                dtype = values.dtype if values.is_floating_point() else torch.int64
                numbers = torch.full((), values[0].numel(), dtype=dtype, device=values.device).expand(len(names))
            found |= zip(names, zip(_sum_each(values).unbind(0), numbers.unbind(0)))
        return {name: found[name] for name in self.metrics}

    @property
    def means(self) -> dict[str, Tensor]:
        """Each metric's mean over the units that count; zero where there are none."""
        sums = self.sums
        if len(sums) < MANY or len({total.dtype for total, _ in sums.values()}) > 1:
            return {name: total / count.clamp_min(1) for name, (total, count) in sums.items()}
        totals, counts = (torch.stack(column) for column in zip(*sums.values()))
        return dict(zip(sums, (totals / counts.clamp_min(1)).unbind(0)))


MANY = 4
"""Metrics from which on it pays to sum them together."""


def _sum_each(tensors: Tensor) -> Tensor:  # (tensors, ...) -> (tensors,)
    return tensors if tensors.dim() == 1 else tensors.sum(tuple(range(1, tensors.dim())))


Projections: TypeAlias = Projection | Mapping[str, Projection]
Tensors: TypeAlias = Mapping[str, Tensor]
Named: TypeAlias = dict[str, Tensor]

HALF = (torch.float16, torch.bfloat16)


def in_dtype(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Without a word to torch where it is so: as dear as a small operation."""
    return value if value.dtype == dtype else value.to(dtype)


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums of half-precision products are kept in float32; float32 and float64 are their own accumulators."""
    return torch.float32 if dtype in HALF else dtype
