"""A loss whose gradients were taken early, while what they need was still at hand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from chunked_embed.engine.call import autocast_dtype


class _Attach(Function):
    @staticmethod
    def forward(ctx, loss: Tensor, count: int, *tensors: Tensor) -> Tensor:
        ctx.dtypes = [tensor.dtype for tensor in tensors[:count]]
        ctx.save_for_backward(*tensors[count:])
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [(grad * upstream).to(dtype) for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes)]
        return (upstream, None, *scaled, *[None] * len(scaled))


def leaves_behind(loss: Tensor, but: Iterable[Tensor]) -> list[Tensor]:
    """What learns in a loss of embeddings beside these, and would have a gradient: a temperature, a module that the
    user handed in, parameters of the model where the user's loss reads them."""
    given = list(but)
    known = {id(tensor) for tensor in given}
    seen = {tensor.grad_fn for tensor in given}  # what is behind them is not looked at
    nodes: list[Any] = [loss.grad_fn]
    leaves: list[Tensor] = []
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "AccumulateGrad":
            leaf = node.variable
            leaves += [] if id(leaf) in known else [leaf]
        nodes += [behind for behind, _ in node.next_functions]
    return leaves


def gradients(loss: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Of a loss that is still in its forward pass: as outside of autocast, which would round what goes back, too."""
    if autocast_dtype(loss.device) is None:
        return torch.autograd.grad(loss, tensors, allow_unused=True)
    with torch.autocast(loss.device.type, enabled=False):
        return torch.autograd.grad(loss, tensors, allow_unused=True)


def attach(loss: Tensor, tensors: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
    """The loss, with these gradients for these tensors beside those that it has."""
    return _Attach.apply(loss, len(tensors), *tensors, *grads)
