"""A loss and a step with which the compile cache is tested alone: no chunks, no products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from chunked_embed.engine import compile as cache
from chunked_embed.engine import formula, specialize
from chunked_embed.engine.formula import Formula


class Loss(nn.Module):
    """What the cache needs of a loss: attributes, functions, and the attribute hook."""

    score_fn: Any = None
    element_fn: Any = None
    __getattr__ = formula.attribute

    def __init__(self, loss_fn: Any = None, **numbers: Any) -> None:
        super().__init__()
        self._functions = {"loss_fn": loss_fn}
        self._numbers = tuple(numbers)
        for name, value in numbers.items():
            setattr(self, name, value)

    def loss_fn(self, outputs: Any, rows: Any) -> Any:
        raise NotImplementedError


formula.BASES.add(Loss)


def values_and_gradients(functions: formula.Bound, in_place: bool) -> Any:
    """-> the weighted sum, each row's loss and metrics, the gradient of the outputs: returned, or in their place."""

    def step(outputs: Tensor, rows: dict[str, Tensor], weight: Tensor) -> tuple[Tensor, dict[str, Tensor], Any]:
        def total(o: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            loss = functions.loss_fn(o, rows)
            loss, metrics = loss if isinstance(loss, tuple) else (loss, {})
            metrics = {"loss": loss, **metrics}
            return (loss * weight).sum(), {name: metric.detach().clone() for name, metric in metrics.items()}

        if torch.compiler.is_compiling():
            grad, (value, metrics) = torch.func.grad_and_value(total, has_aux=True)(outputs)
            return value, metrics, grad
        with torch.enable_grad():
            leaf = outputs.detach().requires_grad_()
            value, metrics = total(leaf)
            grad = torch.zeros_like(leaf)
            if value.requires_grad:
                (found,) = torch.autograd.grad(value, (leaf,), allow_unused=True)
                grad = grad if found is None else found
        if in_place:
            return value.detach(), metrics, outputs.copy_(grad)
        return value.detach(), metrics, grad

    return step


@torch.no_grad()
def call(
    loss: Loss,
    x: Tensor,
    compiled: bool = True,
    *,
    extra: Any = None,
    rows: Any = None,
    shape_key: Any = None,
    in_place: bool = False,
) -> Any:
    """``loss`` on outputs ``x``, as a call of the engine in one chunk."""
    rows = rows or {}
    weight = torch.full((len(x),), 1 / len(x), dtype=x.dtype)
    snapshot = Formula.snapshot(loss, extra)
    args = (x.clone(), rows, weight)
    if not compiled:
        return values_and_gradients(snapshot.bind(), in_place)(*args)

    def probe() -> tuple:
        return x[:2].clone(), {name: row[:2].clone() for name, row in rows.items()}, weight[:2].clone()

    key = len(x) if shape_key is None else shape_key
    return specialize.run(values_and_gradients, snapshot, (in_place,), key, x.device, args, probe)


def check(loss: Loss, x: Tensor, **options: Any) -> Any:
    """The compiled call gives what the uncompiled one gives: values, gradients, metrics by name, dtypes."""
    found, expected = call(loss, x, **options), call(loss, x, compiled=False, **options)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5, equal_nan=True)
    return found


def compilations() -> int:
    """Graphs that dynamo has made since the cache was cleared."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def forget() -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    cache.clear()
    counters.clear()
