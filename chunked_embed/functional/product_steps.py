"""Steps on a similarity matrix that is never written: products of their own, where operands are half precision."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import Chunk, Into, Needs, Shape, Step
from ..kernels.similarity_product import linear_both_gradients, linear_both_logsumexps, linear_cross_entropy, serves
from ..tokens import kernel_refusal
from .arguments import Rows
from .kernel_steps import RowKernel, scaled_factors

# 16,384 of both are quicker than outputs that are written, 4096 rows are not.
FEWEST_ROWS, FEWEST_COLUMNS = 8192, 4096


class ProductStep(Step):
    """Takes the operands of one projection, and the column of each row that is its own."""

    takes_factors = True

    def needs(self, shape: Shape) -> Needs:
        return Needs(refusal=product_refusal(shape), forms_outputs=False, scratch=2)


@dataclass(frozen=True)
class CrossEntropyProduct(ProductStep, RowKernel):
    """Softmax over a row, of its similarities times ``scale``; None: each row has its own, which may learn."""

    scale: float | None

    def run(self, chunk: Chunk, weight: Tensor | None, into: Into | None) -> Tensor:
        rows, columns = scaled_factors(chunk, self.scale)
        given = (*sides(chunk), chunk.rows["target"])
        if into is None:
            return linear_cross_entropy(*given, rows=rows, columns=columns)[0]
        loss, slope, moment = linear_cross_entropy(
            *given,
            weight,
            rows=rows,
            columns=columns,
            gradient=into.wants(chunk.names[0]),
            moment=into.wants("scale"),
        )
        if moment is not None:
            into.rows("scale", moment / chunk.rows["scale"])
        if slope is not None:
            into.outputs(slope)
        return loss


@dataclass(frozen=True)
class TwoSidedProduct(ProductStep):
    """Row and column log-sum-exps of one product, their gradient of another."""

    scale: float | None
    row_wise = False
    column_parts = {"over_queries": "logsumexp"}

    def score(self, chunk: Chunk) -> tuple[Rows, None]:
        rows, columns = scaled_factors(chunk, self.scale)
        found = linear_both_logsumexps(*sides(chunk), chunk.rows["target"], rows=rows, columns=columns)
        over_documents, over_queries, positive = found
        return {"positive": positive, "over_documents": over_documents, "over_queries": over_queries}, None

    def pull(self, chunk: Chunk, kept: None, parts: Rows, upstream: Rows, into: Into) -> None:
        names = ("over_documents", "over_queries", "positive")
        row, column, own = (upstream.get(name, torch.zeros_like(parts[name])) for name in names)
        rows, columns = scaled_factors(chunk, self.scale)
        slope, moment = linear_both_gradients(
            *sides(chunk),
            chunk.rows["target"],
            (parts["over_documents"], parts["over_queries"]),
            (row, column, own),
            rows=rows,
            columns=columns,
            gradient=into.wants(chunk.names[0]),
            moment=into.wants("scale"),
        )
        if moment is not None:
            into.rows("scale", moment / chunk.rows["scale"])
        if slope is not None:
            into.outputs(slope)


def product_refusal(shape: Shape) -> str | None:
    """Why products of a kernel do not serve here."""
    if (refusal := kernel_refusal(shape)) is not None:
        return refusal
    if not serves(shape.operands, shape.device):
        return f"there are no products for {str(shape.operands).removeprefix('torch.')} on {shape.device}"
    if shape.terms > 1 or shape.bias != "none":
        return "outputs are formed where they have extra terms or a bias"
    if shape.rows < FEWEST_ROWS or min(shape.widths) < FEWEST_COLUMNS:
        return f"fewer than {FEWEST_ROWS} rows or {FEWEST_COLUMNS} columns take the product that writes its outputs"
    return None


def sides(chunk: Chunk) -> tuple[Tensor, Tensor]:  # (size, H), (V, H)
    ((x, bank),), _ = chunk.operands()
    assert bank is not None
    return x, bank
