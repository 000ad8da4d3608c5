"""A loss whose gradients were taken early, while what they need was still at hand."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


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


def attach(loss: Tensor, tensors: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
    """The loss, with these gradients for these tensors beside those that it has."""
    return _Attach.apply(loss, len(tensors), *tensors, *grads)
