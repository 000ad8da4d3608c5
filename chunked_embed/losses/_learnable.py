"""Parameters of a loss itself, such as a temperature, under several processes.

DistributedDataParallel wraps the model alone. With gradient caching, ``ChunkedLoss`` sees to them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from chunked_embed import checks
from chunked_embed.checks import POSITIVE
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


class LearnableScale(nn.Module if TYPE_CHECKING else object):  # type: ignore[misc]
    """Mixed in before a loss with a ``scale``: a number, or, as ``exp(log_scale)``, a parameter of the loss."""

    learnable_scale = False
    scale: Any

    def _set_scale(self, scale: float | Tensor, learnable: bool) -> None:
        """In the constructor."""
        self.learnable_scale = bool(learnable)
        if learnable:
            self.log_scale = nn.Parameter(torch.tensor(math.log(scale), dtype=torch.float32))
        else:
            self.scale = scale

    def __getattr__(self, name: str) -> Any:
        if name == "scale" and vars(self).get("learnable_scale"):  # as it is now
            return float(self.log_scale.detach().exp())
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "scale" and vars(self).get("learnable_scale"):
            with torch.no_grad():
                self.log_scale.fill_(math.log(checks.number("scale", value, POSITIVE)))
        else:
            super().__setattr__(name, value)
