"""Unit vectors, and scaled ones, once for the whole batch: what similarity matrices are products of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..engine.compile import compiled_step, outside_compile
from ..engine.types import accumulator_dtype

FLOOR = 1e-12  # of a norm, as in F.normalize
SMALL = 1 << 20  # numbers from which on a compiled step pays


@outside_compile
def unit(x: Tensor, scale: Tensor | None = None, *, compiled: bool | None = None) -> Tensor:  # (N, D)
    """``scale * x / max(|x|, 1e-12)``, in the dtype of ``x``, computed wide and rounded once.

    ``scale`` is a 0-d tensor, which may require grad. Nothing is kept but the result and a number a row.
    """
    if scale is None:
        scale = torch.ones((), dtype=accumulator_dtype(x.dtype), device=x.device)
    return _Unit.apply(x, scale, compiled)


@outside_compile
def scaled(x: Tensor, scale: Tensor, *, compiled: bool | None = None) -> Tensor:  # (N, D)
    """``scale * x``, computed wide and rounded once; nothing is kept but the result."""
    return _Scaled.apply(x, scale, compiled)


class _Unit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, compiled: bool | None) -> Tensor:
        result, inverse = _step(_divide, x, compiled)(x.detach(), scale.detach())
        ctx.save_for_backward(result, inverse, scale)
        ctx.compiled = compiled
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        result, inverse, scale = (saved.detach() for saved in ctx.saved_tensors)
        grad_x, along = _step(_gradient, result, ctx.compiled)(result, inverse, scale, grad.detach())
        return grad_x, along.sum() / scale if ctx.needs_input_grad[1] else None, None


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, compiled: bool | None) -> Tensor:
        result = _step(_multiply, x, compiled)(x.detach(), scale.detach())
        ctx.save_for_backward(result, scale)
        ctx.compiled = compiled
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        result, scale = (saved.detach() for saved in ctx.saved_tensors)
        grad_x, along = _step(_multiplied_gradient, result, ctx.compiled)(result, scale, grad.detach())
        return grad_x, along.sum() / scale if ctx.needs_input_grad[1] else None, None


def _step(factory: Callable, x: Tensor, compiled: bool | None) -> Callable:
    compiled = x.numel() >= SMALL if compiled is None else compiled
    return compiled_step(factory, (), x.dtype, x.device, rows_vary=True) if compiled and len(x) else factory()


def _divide() -> Callable:
    def step(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        wide = x.to(accumulator_dtype(x.dtype))
        inverse = 1 / torch.linalg.vector_norm(wide, dim=1).clamp_min(FLOOR)
        return (wide * (inverse * scale)[:, None]).to(x.dtype), inverse

    return step


def _gradient() -> Callable:
    def step(result: Tensor, inverse: Tensor, scale: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        wide, g = result.to(inverse.dtype), grad.to(inverse.dtype)
        along = (wide * g).sum(1)
        # Below the floor the norm is a constant, and nothing is projected out.
        part = torch.where(inverse < 1 / FLOOR, along / scale, 0.0)
        return ((g * scale - wide * part[:, None]) * inverse[:, None]).to(result.dtype), along

    return step


def _multiply() -> Callable:
    def step(x: Tensor, scale: Tensor) -> Tensor:
        return (x.to(accumulator_dtype(x.dtype)) * scale).to(x.dtype)

    return step


def _multiplied_gradient() -> Callable:
    def step(result: Tensor, scale: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        wide, g = result.to(scale.dtype), grad.to(scale.dtype)
        return (g * scale).to(result.dtype), (wide * g).sum(1)

    return step
