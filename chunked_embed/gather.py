"""The global batch's rows, from those of every process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .engine.types import accumulator_dtype


class _GatherRows(torch.autograd.Function):
    """(n, ...) per process -> (sum of n, ...); backward sums over processes what each wants from this one's rows.

    The mean that DistributedDataParallel takes over processes cancels a loss that all of them return, or one that is
    ``world_size`` times their share of it: see :meth:`Ranks.share`.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: tuple[int, ...]) -> Tensor:
        ctx.sizes = sizes
        longest = max(sizes)  # a last batch may be shorter on some process
        every = rows.new_empty(len(sizes) * longest, *rows.shape[1:])
        _collective("all_gather_single")(every, _level(rows, (len(rows),), longest, rows.dtype))
        if min(sizes) == longest:
            return every
        return torch.cat([block[:size] for block, size in zip(every.split(longest), sizes)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # Half precision is added up in float32, and rounded once.
        longest, dtype = max(ctx.sizes), accumulator_dtype(grad.dtype)
        own = grad.new_empty(longest, *grad.shape[1:], dtype=dtype)
        _collective("reduce_scatter_single")(own, _level(grad, ctx.sizes, longest, dtype))
        return own[: ctx.sizes[dist.get_rank()]].to(grad.dtype), None


class _SumOverRanks(torch.autograd.Function):
    """A tensor of one shape everywhere -> its sum over processes; backward sums what each wants from it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _SumOverRanks.forward(ctx, grad)


def _level(rows: Tensor, sizes: tuple[int, ...], longest: int, dtype: torch.dtype) -> Tensor:  # (L * sizes, ...)
    """Rows in blocks of these sizes, each block with zeros below it up to the longest; contiguous."""
    if min(sizes) == longest:
        return rows.to(dtype).contiguous()
    level = rows.new_zeros(len(sizes), longest, *rows.shape[1:], dtype=dtype)
    for place, block in zip(level, rows.split(list(sizes))):
        place[: len(block)] = block
    return level.flatten(0, 1)


def _collective(name: str) -> Callable[[Tensor, Tensor], Any]:
    """One of all of torch's backends, of one tensor in and one out: before torch 2.13 it has another name."""
    before = {"all_gather_single": "all_gather_into_tensor", "reduce_scatter_single": "reduce_scatter_tensor"}
    return getattr(dist, name if hasattr(dist, name) else before[name])


@dataclass(frozen=True)
class Ranks:
    """The processes that share a batch: how many rows each has. A single one is this process alone."""

    sizes: tuple[int, ...]
    index: int = 0  # this process among them

    @property
    def alone(self) -> bool:
        return len(self.sizes) == 1

    @property
    def offset(self) -> int:
        """Of this process's first row among all rows."""
        return sum(self.sizes[: self.index])

    def gather(self, *tensors: Tensor) -> list[Tensor]:
        """Each (n, ...) tensor with the rows of all processes, in rank order, with gradients."""
        return list(tensors) if self.alone else [_GatherRows.apply(tensor, self.sizes) for tensor in tensors]

    def stack(self, *tensors: Tensor) -> list[Tensor]:
        """Each tensor, of one shape everywhere, as (processes, ...), with gradients."""
        each = Ranks((1,) * len(self.sizes), self.index)
        return each.gather(*(tensor[None] for tensor in tensors))

    def sum(self, *tensors: Tensor) -> list[Tensor]:
        """Each tensor, of one shape everywhere and no half precision, added up over processes, with gradients."""
        return list(tensors) if self.alone else [_SumOverRanks.apply(tensor) for tensor in tensors]

    def share(self, mean: Tensor) -> Tensor:
        """From a mean over this process's rows, what averages over processes to the mean over all rows."""
        own = self.sizes[self.index]
        return mean if self.alone else mean * (own * len(self.sizes) / sum(self.sizes))


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def ranks(rows: Tensor, together: bool = True) -> Ranks:
    """The processes that share the batch of these rows (n, ...): all of them, or this one alone."""
    if not (together and is_distributed()):
        return Ranks((len(rows),))
    own = torch.tensor([len(rows)], device=rows.device)
    sizes = own.new_empty(dist.get_world_size())
    _collective("all_gather_single")(sizes, own)
    return Ranks(tuple(sizes.tolist()), dist.get_rank())


def gather_rows(*tensors: Tensor) -> list[Tensor]:
    """Each (n, ...) tensor with the rows of all processes, in rank order; unchanged in a single process."""
    return ranks(tensors[0]).gather(*tensors)


def global_mean(mean: Tensor, rows: int) -> Tensor:
    """The mean over the rows of all processes, from this process's mean over its own."""
    count = torch.tensor([rows], device=mean.device)
    means, sizes = gather_rows(mean.reshape(1), count)
    return (means * sizes).sum() / sizes.sum()
