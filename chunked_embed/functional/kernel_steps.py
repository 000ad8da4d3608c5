"""Steps on a similarity matrix with kernels of their own, in the place of compiled ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import LOSS, Chunk, Into, Needs, Shape, Step
from ..kernels.similarity import both_gradients_, both_logsumexps, cross_entropy_, sigmoid_pairs_
from ..tokens import kernel_refusal
from .arguments import Rows


class KernelStep(Step):
    """Takes the outputs of one projection, and the column of each row that is its own."""

    def needs(self, shape: Shape) -> Needs:
        return Needs(refusal=kernel_refusal(shape))


class RowKernel(KernelStep):
    """A row-wise loss, and its gradient in the same pass."""

    def run(self, chunk: Chunk, weight: Tensor | None, into: Into | None) -> Tensor:  # (rows,)
        """Without a weight: the loss alone. Otherwise gradients of ``sum(weight * loss)`` go to ``into``."""
        raise NotImplementedError

    def score(self, chunk: Chunk) -> tuple[Rows, None]:
        return {LOSS: self.run(chunk, None, None)}, None

    def both(self, chunk: Chunk, upstream: Rows, into: Into) -> Rows:
        return {LOSS: self.run(chunk, upstream[LOSS], into)}

    def pull(self, chunk: Chunk, kept: None, parts: Rows, upstream: Rows, into: Into) -> None:
        self.run(chunk, upstream[LOSS], into)


@dataclass(frozen=True)
class CrossEntropyRows(RowKernel):
    """Softmax over a row, of its outputs times ``scale``."""

    scale: float

    def run(self, chunk: Chunk, weight: Tensor | None, into: Into | None) -> Tensor:
        x, target = chunk.outputs(), chunk.rows["target"]
        if into is None or not into.wants(chunk.names[0]):
            return cross_entropy_(x, target, scale=self.scale)
        loss = cross_entropy_(x, target, weight, scale=self.scale, out=into.place())
        into.outputs(into.place())
        return loss


@dataclass(frozen=True)
class SigmoidRows(RowKernel):
    """Sigmoid losses of a row, whose scale and bias may learn."""

    def run(self, chunk: Chunk, weight: Tensor | None, into: Into | None) -> Tensor:
        x, rows = chunk.outputs(), chunk.rows
        given = (x, rows["target"], rows["scale"], rows["bias"])
        if into is None:
            return sigmoid_pairs_(*given)[0]
        wanted = into.wants(chunk.names[0])
        place = into.place() if wanted else torch.empty_like(x)
        loss, g_scale, g_bias = sigmoid_pairs_(*given, weight, out=place)
        if wanted:
            into.outputs(place)
        into.rows("scale", g_scale)
        into.rows("bias", g_bias)
        return loss


@dataclass(frozen=True)
class TwoSidedScore(KernelStep):
    """Row and column log-sum-exps in one pass over the outputs, their gradient in another."""

    scale: float
    row_wise = False
    column_parts = {"over_queries": "logsumexp"}

    def score(self, chunk: Chunk) -> tuple[Rows, None]:
        x, target = chunk.outputs(), chunk.rows["target"]
        over_documents, over_queries = both_logsumexps(x, scale=self.scale)
        positive = x.gather(1, target[:, None]).squeeze(1).float() * self.scale
        return {"positive": positive, "over_documents": over_documents, "over_queries": over_queries}, None

    def pull(self, chunk: Chunk, kept: None, parts: Rows, upstream: Rows, into: Into) -> None:
        if not into.wants(chunk.names[0]):
            return
        totals = ("over_documents", "over_queries")
        row, column, own = (upstream.get(name, torch.zeros_like(parts[name])) for name in (*totals, "positive"))
        lses = (parts["over_documents"], parts["over_queries"])
        x, target = chunk.outputs(), chunk.rows["target"]
        both_gradients_(x, target, lses, (row, column, own), scale=self.scale, out=into.place())
        into.outputs(into.place())
