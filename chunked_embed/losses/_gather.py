"""The global batch's scores and labels, from those of every process."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class _GatherRows(torch.autograd.Function):
    """(n,) per process -> (sum of n,); backward sums over processes what each wants from this one's rows.

    Every process returns the same global loss, so that sum is world-size times the gradient; the mean that
    DistributedDataParallel takes over processes cancels it.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        padded = F.pad(rows, (0, max(sizes) - len(rows)))  # a last batch may be shorter on some process
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes)])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.split(ctx.sizes)[dist.get_rank()], None


def gather_rows(*tensors: Tensor) -> list[Tensor]:
    """Each (n,) tensor with the rows of all processes, in rank order; unchanged in a single process."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return list(tensors)
    own = torch.tensor([len(tensors[0])], device=tensors[0].device)
    sizes = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, own)
    counts = torch.cat(sizes).tolist()
    return [_GatherRows.apply(tensor, counts) for tensor in tensors]


def global_mean(mean: Tensor, rows: int) -> Tensor:
    """The mean over the rows of all processes, from this process's mean over its own."""
    count = torch.tensor([rows], device=mean.device)
    means, counts = gather_rows(mean.reshape(1), count)
    return (means * counts).sum() / counts.sum()
