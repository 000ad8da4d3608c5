"""Parameters of a loss itself, such as a temperature, under several processes.

DistributedDataParallel wraps the model alone. With gradient caching, ``ChunkedLoss`` sees to them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from chunked_embed.gather import is_distributed


class _Averaged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad / dist.get_world_size()


def averaged(parameter: Tensor) -> Tensor:
    """The parameter, with a gradient that is averaged over processes, as DistributedDataParallel does for a model's.

    Each backward pass averages what it adds, so that steps may be accumulated; every process must run it.
    """
    if is_distributed() and parameter.requires_grad and torch.is_grad_enabled():
        return _Averaged.apply(parameter)
    return parameter
