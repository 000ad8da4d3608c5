"""Steps of in-batch contrast at narrow widths: no similarities in memory, products and softmaxes in one kernel."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import Chunk, Into, Needs, Shape, Step
from ..kernels.contrast import HALF, WIDEST, Pairs, Similarities, Slopes, logsumexps, shifted, softmaxes, weighted_sums
from ..tokens import kernel_refusal
from .arguments import Rows
from .kernel_steps import RowKernel
from .known import NOTHING

OTHERS = "others_over_queries"
FEWEST_ROWS = 4096  # below, both ways wait for the host
FEWEST_BOTH = 8192  # of two directions, which launch more
ROUNDING = 4 * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class AttentionStep(Step):
    """Takes the operands of one projection, the column of each row that is its own, and ids by which other pairs do not
    count."""

    scale: float | None  # None: each row has its own, which may learn
    masked: bool = False
    shared_ids: bool = False
    hardness: bool = False

    takes_factors = True

    @property
    def key(self) -> Hashable:
        return type(self), self.scale is None, self.masked, self.shared_ids, self.hardness

    def refusal(self, shape: Shape) -> str | None:
        refusal = kernel_refusal(shape._replace(columns=shape.columns and not self.masked))
        if refusal is not None:
            return refusal
        if shape.operands not in HALF:
            return f"{str(shape.operands).removeprefix('torch.')} operands take other products"
        if shape.depth > WIDEST:
            return f"embeddings of {shape.depth} numbers are wider than {WIDEST}"
        fewest = FEWEST_ROWS if self.row_wise else FEWEST_BOTH
        if shape.rows < fewest:
            return f"fewer than {fewest} rows take products that write their outputs"
        if self.hardness:
            return "weights by hardness take the plain functions"
        if shape.terms > 1 or shape.bias != "none":
            return "a sum of products, or one with a bias, takes other products"
        return None

    def similarities(self, chunk: Chunk) -> Similarities:
        ((x, y),), _ = chunk.operands()
        assert y is not None
        scale = chunk.rows["scale"] if self.scale is None else self.scale
        return Similarities(x, y, self.pairs(chunk), scale, chunk.factors())

    def pairs(self, chunk: Chunk) -> Pairs:
        rows, columns = chunk.rows, chunk.columns
        if not self.masked:
            return Pairs(rows["target"])
        documents, queries, listed = list[Tensor](), list[Tensor](), None
        if "document_id" in rows:
            documents = [rows["document_id"], columns["document_id"]]
        if "false_negatives" in rows:  # ids of documents, which are there too
            documents.append(rows["false_negatives"].t())
        if "query_id" in rows:
            queries = [rows["query_id"], columns["document_query"]]
        if self.shared_ids:
            together = ranks(*documents, *queries)
            documents, queries = together[: len(documents)], together[len(documents) :]
        else:
            documents, queries = ranks(*documents), ranks(*queries)
        if "false_negatives" in rows:
            listed = torch.where(rows["false_negatives"].t() == NOTHING, -2, documents.pop())
        if "document_has_id" in columns:
            documents[1] = torch.where(columns["document_has_id"], documents[1], -1)
        return Pairs(
            rows["target"],
            documents=(documents[0], documents[1]) if documents else None,
            queries=(queries[0], queries[1], columns["document_query_index"].int()) if queries else None,
            listed=listed,
            shared=self.shared_ids,
        )


def ranks(*ids: Tensor) -> list[Tensor]:
    """The same in int32: a comparison costs half of what that of int64 does."""
    if not ids:
        return []
    order = torch.cat([x.flatten() for x in ids]).sort().values
    return [torch.searchsorted(order, x.contiguous(), out_int32=True) for x in ids]


class AttentionRows(AttentionStep, RowKernel):
    """Softmax over documents: in two kernels, of which each has two products. The second, for the documents, knows
    every softmax from the first."""

    def needs(self, shape: Shape) -> Needs:
        return Needs(refusal=self.refusal(shape), forms_outputs=False, products=4 if shape.trains else 1)

    def run(self, chunk: Chunk, weight: Tensor | None, into: Into | None) -> Tensor:
        s = self.similarities(chunk)
        if into is None or weight is None:
            return softmaxes(s).loss
        found = softmaxes(s, weight, gradient=into.wants_input(), moment=into.wants("scale"))
        if found.moment is not None:
            into.rows("scale", found.moment / chunk.rows["scale"])
        if found.gradient is not None:
            into.inputs(found.gradient, through_norms=True)
        if into.wants_weight() and found.slopes is not None:
            into.weight(weighted_sums(s, found.slopes, over_rows=True)[0], through_norms=True)
        return found.loss


class TwoSidedAttention(AttentionStep):
    """Both log-sum-exps, a product each; and with those known, two kernels of two products each for the gradients. No
    two rows have the same column for their own."""

    row_wise = False
    column_parts = {"over_queries": "logsumexp", OTHERS: "logsumexp"}

    def needs(self, shape: Shape) -> Needs:
        return Needs(refusal=self.refusal(shape), forms_outputs=False, products=6 if shape.trains else 2)

    def score(self, chunk: Chunk) -> tuple[Rows, Tensor]:
        s = self.similarities(chunk)
        found = softmaxes(s)
        others = logsumexps(s)
        own = torch.full_like(others, -torch.inf).scatter_(0, s.pairs.target, found.positive)
        parts = {
            "positive": found.positive,
            "over_documents": found.positive + found.loss,
            "over_queries": torch.logaddexp(others, own),
            OTHERS: others,
        }
        return parts, found.rest

    def pull(self, chunk: Chunk, kept: Tensor, parts: Rows, upstream: Rows, into: Into) -> None:
        s = self.similarities(chunk)
        names = ("over_documents", "over_queries", "positive")
        of_rows, of_columns, of_own = (upstream.get(name, torch.zeros_like(parts[name])) for name in names)
        # Of one's own pair: g_own + g_row p + g_column q, by 1 - p and 1 - q, which are what the others leave. The g of
        # a loss of differences add up to zero, but for what was rounded of scores.
        rest = (parts[OTHERS] - parts["over_queries"]).exp()[s.pairs.target]
        of_column = of_columns[s.pairs.target]
        left = of_own + of_rows + of_column
        left = torch.where(left.abs() > ROUNDING * (1 + parts["positive"].abs()) * of_own.abs(), left, 0.0)
        own = left - of_rows * kept - of_column * rest
        slopes = Slopes(*shifted(parts["over_documents"], of_rows), own)
        across = shifted(parts["over_queries"], of_columns)
        learns = into.wants("scale")
        if into.wants_input() or learns:
            gradient, moment = weighted_sums(s, slopes, across, over_rows=False, moment=learns)
            into.inputs(gradient, through_norms=True)
            if moment is not None:
                into.rows("scale", moment / chunk.rows["scale"])
        if into.wants_weight():
            into.weight(weighted_sums(s, slopes, across, over_rows=True)[0], through_norms=True)
