"""Retrieval on held-out pairs: does a query find its own document, among thousands of others?

Ranks are counted a block of queries at a time, so that queries x documents is never held. A tie counts against the
model: one that maps every text to the same point gets the last rank everywhere, not the first.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from rich.table import Table
from sentence_transformers.sentence_transformer.evaluation import SentenceEvaluator
from torch import Tensor

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

BLOCK = 1 << 22  # scores held at a time: 16 MiB
BATCH = 256  # pairs that compete in the in-batch accuracy, whatever the batch of the training: runs compare
CUTOFFS = (1, 5, 10)
METRICS = ("query to document", "document to query", *(f"recall@{k}" for k in CUTOFFS), "MRR")
HEADINGS = {"query to document": "top-1\nq to d", "document to query": "top-1\nd to q"}


def ranks(queries: Tensor, documents: Tensor) -> Tensor:  # (N, D), (M, D), M >= N -> (N,)
    """The place of document i among all documents for query i: 1 is best, ties count against it, so does a NaN."""
    step = max(1, BLOCK // len(documents))
    found = []
    for start in range(0, len(queries), step):
        scores = queries[start : start + step] @ documents.T
        own = scores.diagonal(start).clone()
        found.append(len(documents) - (scores < own[:, None]).sum(1))
    return torch.cat(found)


def in_batch_accuracy(queries: Tensor, documents: Tensor) -> float:
    """How many queries find their own document first among those of their batch of 256, a smaller rest left out."""
    size = min(BATCH, len(queries))
    starts = range(0, len(queries) - size + 1, size)
    first = [(ranks(queries[s : s + size], documents[s : s + size]) == 1).float().mean() for s in starts]
    return torch.stack(first).mean().item()


def scores(queries: Tensor, documents: Tensor) -> dict[str, float]:
    """METRICS of unit vectors: queries (N, D), documents (M, D), of which the first N belong to the queries."""
    own, places = documents[: len(queries)], ranks(queries, documents)
    values = [
        in_batch_accuracy(queries, own),
        in_batch_accuracy(own, queries),
        *((places <= k).float().mean().item() for k in CUTOFFS),
        places.double().reciprocal().mean().item(),
    ]
    return dict(zip(METRICS, values))


class RetrievalEvaluator(SentenceEvaluator):
    """`scores` of held-out columns (query, document, and more documents: hard negatives), at each width."""

    def __init__(self, columns: list[list[str]], widths: list[int], batch_size: int = 64) -> None:
        super().__init__()
        self.columns, self.widths, self.batch_size = columns, widths, batch_size
        self.primary_metric = key("recall@1", max(widths))

    def __call__(
        self, model: SentenceTransformer, output_path: str | None = None, epoch: float = -1, steps: int = -1
    ) -> dict[str, float]:
        queries, *others = (
            model.encode(texts, batch_size=self.batch_size, convert_to_tensor=True, show_progress_bar=False).float()
            for texts in self.columns
        )
        documents, found = torch.cat(others), {}
        for width in self.widths:
            cut = [F.normalize(side[:, :width], dim=1) for side in (queries, documents)]
            found |= {key(name, width): value for name, value in scores(*cut).items()}
        self.store_metrics_in_model_card_data(model, found, epoch, steps)
        return found


def key(metric: str, width: int) -> str:
    return f"{metric}, {width} dimensions"


# ---- what the trainer logged


def history(log: list[dict[str, Any]], widths: list[int]) -> dict[str, list[dict[str, Any]]]:
    """{"loss": [{step, loss, learning rate}], "retrieval": [{step, dimensions, metrics}]} of a trainer's log."""
    losses = [
        {"step": entry["step"], "loss": entry["loss"], "learning rate": entry["learning_rate"]}
        for entry in log
        if "loss" in entry
    ]
    evaluated = [entry for entry in log if "eval_" + key(METRICS[0], widths[0]) in entry]
    retrieval = [
        {"step": entry["step"], "dimensions": width, **{m: entry["eval_" + key(m, width)] for m in METRICS}}
        for entry in evaluated
        for width in widths
    ]
    return {"loss": losses, "retrieval": retrieval}


def table(retrieval: list[dict[str, Any]], pairs: int, documents: int) -> Table:
    title = f"Held out: {pairs:,} queries, {documents:,} documents; top-1 of {min(BATCH, pairs)}"
    several = len({row["dimensions"] for row in retrieval}) > 1
    result = Table("step", *(["width"] if several else []), title=title)
    for metric in METRICS:
        result.add_column(HEADINGS.get(metric, metric), justify="right")
    steps = [row["step"] for row in retrieval]
    for row, following in zip(retrieval, [*steps[1:], None]):
        width = [str(row["dimensions"])] if several else []
        values = [f"{row[metric]:.4f}" for metric in METRICS]
        result.add_row(str(row["step"]), *width, *values, end_section=several and row["step"] != following)
    return result


def save(result: dict[str, Any], folder: Path) -> None:
    """results.json and results.png."""
    (folder / "results.json").write_text(json.dumps(result, indent=1))
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (recall_axis, loss_axis) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    widths = sorted({row["dimensions"] for row in result["retrieval"]}, reverse=True)
    # At full width all metrics; of several widths recall@1 alone, or nobody could tell the lines apart.
    lines = [(metric, widths[0]) for metric in METRICS[2:]] + [("recall@1", width) for width in widths[1:]]
    for metric, width in lines:
        rows = [row for row in result["retrieval"] if row["dimensions"] == width]
        label = metric if width == widths[0] else f"{metric}, {width} dimensions"
        recall_axis.plot([row["step"] for row in rows], [row[metric] for row in rows], marker="o", label=label)
    loss_axis.plot([row["step"] for row in result["loss"]], [row["loss"] for row in result["loss"]], marker=".")
    recall_axis.set(xlabel="step", ylabel="held-out pairs")
    recall_axis.legend()
    loss_axis.set(xlabel="step", ylabel="training loss")
    for axis in (recall_axis, loss_axis):
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    figure.suptitle(result["title"])
    figure.savefig(folder / "results.png", dpi=150)
    pyplot.close(figure)
