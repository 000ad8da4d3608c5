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

    takes_factors = True

    def needs(self, shape: Shape) -> Needs:
        return Needs(refusal=kernel_refusal(shape), overwrites=True)


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
    """Softmax over a row, of its outputs times ``scale``; None: each row has its own, which may learn."""

    scale: float | None

    def run(self, chunk: Chunk, weight: Tensor | None, into: Into | None) -> Tensor:
        x, target = chunk.outputs(), chunk.rows["target"]
        rows, columns = scaled_factors(chunk, self.scale)
        if into is None:
            return cross_entropy_(x, target, rows=rows, columns=columns)
        place, learns = into.place(), into.wants("scale")
        found = cross_entropy_(x, target, weight, rows=rows, columns=columns, moment=learns, out=place)
        loss, moment = found if learns else (found, None)
        if moment is not None:
            into.rows("scale", moment / chunk.rows["scale"])
        into.outputs(place)
        return loss


@dataclass(frozen=True)
class SigmoidRows(RowKernel):
    """Sigmoid losses of a row, whose scale and bias may learn."""

    def run(self, chunk: Chunk, weight: Tensor | None, into: Into | None) -> Tensor:
        x, rows = chunk.outputs(), chunk.rows
        given = (x, rows["target"], rows["scale"], rows["bias"])
        of_rows, of_columns = chunk.factors() or (None, None)
        if into is None:
            return sigmoid_pairs_(*given, rows=of_rows, columns=of_columns)[0]
        place = into.place()
        loss, g_scale, g_bias = sigmoid_pairs_(*given, weight, rows=of_rows, columns=of_columns, out=place)
        into.outputs(place)
        into.rows("scale", g_scale)
        into.rows("bias", g_bias)
        return loss


@dataclass(frozen=True)
class TwoSidedScore(KernelStep):
    """Row and column log-sum-exps in one pass over the outputs, their gradient in another."""

    scale: float | None
    row_wise = False
    column_parts = {"over_queries": "logsumexp"}

    def score(self, chunk: Chunk) -> tuple[Rows, None]:
        x, target = chunk.outputs(), chunk.rows["target"]
        rows, columns = scaled_factors(chunk, self.scale)
        over_documents, over_queries = both_logsumexps(x, rows=rows, columns=columns)
        positive = x.gather(1, target[:, None]).squeeze(1).float()
        positive = (positive if columns is None else positive * columns[target]) * rows  # as the kernels multiply
        return {"positive": positive, "over_documents": over_documents, "over_queries": over_queries}, None

    def pull(self, chunk: Chunk, kept: None, parts: Rows, upstream: Rows, into: Into) -> None:
        learns = into.wants("scale")
        totals = ("over_documents", "over_queries")
        row, column, own = (upstream.get(name, torch.zeros_like(parts[name])) for name in (*totals, "positive"))
        lses = (parts["over_documents"], parts["over_queries"])
        x, target = chunk.outputs(), chunk.rows["target"]
        rows, columns = scaled_factors(chunk, self.scale)
        place = into.place()
        given = (x, target, lses, (row, column, own))
        found = both_gradients_(*given, rows=rows, columns=columns, moment=learns, out=place)
        if learns:
            into.rows("scale", found[1] / chunk.rows["scale"])
        into.outputs(place)


def scaled_factors(chunk: Chunk, scale: float | None) -> tuple[Tensor, Tensor | None]:
    """What a row's outputs are multiplied by, the scale among it, and a column's."""
    factors = chunk.factors()
    device = chunk.rows["target"].device
    of_rows = chunk.rows["scale"] if scale is None else torch.full((chunk.size,), scale, device=device)
    return (of_rows, None) if factors is None else (of_rows * factors[0], factors[1])
