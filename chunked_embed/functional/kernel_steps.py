"""Steps on a similarity matrix with kernels of their own, in the place of compiled ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..engine import FlexChunkLoss
from ..engine.steps import ChunkData, Named, weighted
from ..engine.walk import Call
from ..kernels import available
from ..kernels.similarity import both_gradients_, both_logsumexps, cross_entropy_, sigmoid_pairs_


def has_kernel(loss: FlexChunkLoss, call: Call) -> bool:
    """Uncompiled runs and float64 take the plain functions."""
    return loss.compiled and call.problem.dtype != torch.float64 and available(call.problem.device)


def _only(data: ChunkData) -> tuple[Tensor, Tensor, Tensor | None, bool]:
    """-> the outputs' real rows, their targets, where the gradient goes (None: in place), whether it is wanted."""
    ((name, outputs),) = data.outputs.items()
    x = outputs[: data.rows]
    out = data.destinations.get(name)
    return x, data.row_args["target"], None if out is None else out[: data.rows], name in data.destinations


class CrossEntropyRows:
    """Softmax over a row and its gradient in one kernel."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def values(self, data: ChunkData, weight: Tensor, hp: NamedTuple) -> tuple[Tensor, Named]:
        x, target, _, _ = _only(data)
        return weighted(cross_entropy_(x, target, scale=self.scale), weight), {}

    def gradients(self, data: ChunkData, weight: Tensor, hp: NamedTuple) -> tuple[Tensor, Named, Named, Named]:
        x, target, out, wanted = _only(data)
        loss = cross_entropy_(x, target, weight if wanted else None, scale=self.scale, out=out)
        return weighted(loss, weight), {}, {}, {}


class SigmoidRows:
    """Sigmoid losses of a row; their gradient, and the scale's and the bias's, in the same pass."""

    def __init__(self, wanted: tuple[str, ...]) -> None:
        self.wanted = wanted

    def values(self, data: ChunkData, weight: Tensor, hp: NamedTuple) -> tuple[Tensor, Named]:
        x, target, _, _ = _only(data)
        loss, _, _ = sigmoid_pairs_(x, target, data.row_args["scale"], data.row_args["bias"])
        return weighted(loss, weight), {}

    def gradients(self, data: ChunkData, weight: Tensor, hp: NamedTuple) -> tuple[Tensor, Named, Named, Named]:
        x, target, out, wanted = _only(data)
        out = out if wanted else torch.empty_like(x)
        loss, *grads = sigmoid_pairs_(x, target, data.row_args["scale"], data.row_args["bias"], weight, out=out)
        found = dict(zip(("scale", "bias"), grads, strict=True))
        return weighted(loss, weight), {}, {name: found[name] for name in self.wanted}, {}


class TwoSidedScore:
    """Row and column log-sum-exps in one pass over the outputs, their gradient in another."""

    combine: Mapping[str, str] = {"over_queries": "logsumexp"}

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def values(self, data: ChunkData, hp: NamedTuple) -> tuple[Named, Named, Named]:
        x, target, _, _ = _only(data)
        rows, columns = both_logsumexps(x, scale=self.scale)
        positive = x.gather(1, target[:, None]).squeeze(1).float() * self.scale
        return {"positive": positive, "over_documents": rows}, {"over_queries": columns}, {"over_documents": rows}

    def gradients(
        self, data: ChunkData, hp: NamedTuple, saved: Named, upstream: Named, totals: Named
    ) -> tuple[Named, Named]:
        x, target, out, wanted = _only(data)
        if wanted:
            given = (upstream["over_documents"], upstream["over_queries"], upstream["positive"])
            lses = (saved["over_documents"], totals["over_queries"])
            both_gradients_(x, target, lses, given, scale=self.scale, out=out)
        return {}, {}
