"""What a loss trains under names that no wrapper looks for, over several processes.

The trainer wraps a loss's ``model`` in DistributedDataParallel and nothing else. An encoder or a decoder that is called
otherwise would start and learn on each process by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel

from chunked_embed.gather import is_distributed
from chunked_embed.lm_heads import bare


def in_step(loss: nn.Module) -> list[nn.Parameter]:
    """The parameters that :func:`averaged_behind` is to see to, at the beginning of a forward pass; none without
    gradients or in a single process. In a loss's first pass they become those of process 0."""
    if not (is_distributed() and torch.is_grad_enabled()):
        return []
    parameters = _unwrapped(loss)
    if "_in_step" not in vars(loss):
        for parameter in parameters:
            _everywhere(parameter.detach(), partial(dist.broadcast, src=0))
        vars(loss)["_in_step"] = True
    return parameters


def averaged_behind(loss: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    """The loss, whose backward pass ends with the mean of the processes' gradients in each parameter.

    A gradient that is the same everywhere stays what it is, so that steps may be accumulated. Every process must run
    it.
    """
    if not (parameters and loss.requires_grad):
        return loss
    return _Behind.apply(loss, partial(_average, parameters))


class _Behind(torch.autograd.Function):
    """Calls a function when the backward pass is through, and all gradients are in their places."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, function: Callable[[], None]) -> Tensor:
        ctx.function = function
        return loss.view_as(loss)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        Variable._execution_engine.queue_callback(ctx.function)
        return grad, None


@torch.no_grad()
def _average(parameters: list[nn.Parameter]) -> None:
    have = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device)
    dist.all_reduce(have, dist.ReduceOp.MAX)
    if any(p.grad is None for p in parameters):  # of no use on this process, or on any
        for parameter, anywhere in zip(parameters, have.tolist()):
            if anywhere and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
    for parameter in parameters:
        if parameter.grad is not None:
            _everywhere(parameter.grad.div_(dist.get_world_size()), dist.all_reduce)


def _everywhere(tensor: Tensor, collective: Callable[[Tensor], Any]) -> None:
    dense = tensor.contiguous()
    collective(dense)
    if dense is not tensor:
        tensor.copy_(dense)


def _unwrapped(loss: nn.Module) -> list[nn.Parameter]:
    """Parameters that neither DDP nor FSDP nor DeepSpeed synchronises, around a part of the loss or around it all."""
    if getattr(DistributedDataParallel, "_active_ddp_module", None) is not None:
        return []
    wrapped: set[int] = set()
    for module in loss.modules():
        if isinstance(module, DistributedDataParallel) or bare(module) is not module:
            wrapped.update(id(parameter) for parameter in module.parameters())

    def is_left(parameter: nn.Parameter) -> bool:
        sharded = hasattr(parameter, "placements") or hasattr(parameter, "ds_id")
        return parameter.requires_grad and not sharded and id(parameter) not in wrapped

    return [parameter for parameter in loss.parameters() if is_left(parameter)]
