"""The global batch's rows, from those of every process."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


class _GatherRows(torch.autograd.Function):
    """(n, ...) per process -> (sum of n, ...); backward sums over processes what each wants from this one's rows.

    The mean that DistributedDataParallel takes over processes cancels a loss that all of them return, or one that is
    ``world_size`` times their share of it: see :func:`share`.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        longest = max(sizes)  # a last batch may be shorter on some process
        padded = rows.contiguous()
        if len(rows) < longest:
            padded = torch.cat([rows, rows.new_zeros(longest - len(rows), *rows.shape[1:])])
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.split(ctx.sizes)[dist.get_rank()], None


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def counts(rows: Tensor) -> list[int]:
    """How many rows each process has, in rank order."""
    if not is_distributed():
        return [len(rows)]
    own = torch.tensor([len(rows)], device=rows.device)
    sizes = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, own)
    return torch.cat(sizes).tolist()


def gather_rows(*tensors: Tensor) -> list[Tensor]:
    """Each (n, ...) tensor with the rows of all processes, in rank order; unchanged in a single process."""
    if not is_distributed():
        return list(tensors)
    sizes = counts(tensors[0])
    return [_GatherRows.apply(tensor, sizes) for tensor in tensors]


def share(mean: Tensor, sizes: list[int]) -> Tensor:
    """From a mean over this process's rows, what averages over processes to the mean over all rows."""
    return mean * (sizes[rank()] * len(sizes) / sum(sizes))


def global_mean(mean: Tensor, rows: int) -> Tensor:
    """The mean over the rows of all processes, from this process's mean over its own."""
    count = torch.tensor([rows], device=mean.device)
    means, sizes = gather_rows(mean.reshape(1), count)
    return (means * sizes).sum() / sizes.sum()
