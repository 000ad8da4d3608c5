"""Triplets from labels: every row of a batch is an anchor, its positives share its label, its negatives do not.

Distances between all rows are formed a chunk at a time. What is mined from them (indices, counts) has no gradient, so
nothing N x N is held, nor an autograd graph of that size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import FlexChunkLoss, Projection, checks
from ..chunking import Chunking
from ..engine.compile import outside_compile
from .arguments import Rows, check_embeddings, check_labels, shared, widened
from .pairwise import cosine

BATCH_DISTANCES = ("euclidean", "squared_euclidean", "cosine")
ZERO = 8
"""A squared distance of fewer than so many rounding errors of the two squared norms is zero, and has no gradient: of
equal rows, a difference of products leaves only those."""


# --- a chunk of the distance matrix ----------------------------------------------------------------------------------


def squared_norms(x: Tensor) -> Tensor:
    """(N, D) -> (N,): what turns inner products into euclidean distances, differentiable."""
    return (x * x).sum(1)


class Mining(FlexChunkLoss):
    """Outputs are inner products of rows and candidates, or cosines; rows and columns carry ``label``, rows ``index``,
    and both ``norm``, the squared one, of euclidean distances."""

    def __init__(self, distance: str = "euclidean", **options: Any) -> None:
        super().__init__(targets=(), **options)
        self.distance = checks.choice("distance", distance, BATCH_DISTANCES)

    def distances(self, outputs: Tensor, rows: Rows, columns: Rows) -> Tensor:  # (R, V)
        if self.distance == "cosine":
            return 1 - outputs
        squared = columns["norm"] - 2 * outputs + rows["norm"][:, None]
        floor = ZERO * torch.finfo(outputs.dtype).eps * (rows["norm"][:, None] + columns["norm"]).detach()
        some = ~(squared <= floor)  # NaN passes on
        if self.distance == "squared_euclidean":
            return torch.where(some, squared, 0.0)
        return torch.where(some, torch.where(some, squared, 1.0).sqrt(), 0.0)


def masks(outputs: Tensor, rows: Rows, columns: Rows) -> tuple[Tensor, Tensor]:
    """(R, V) positives: of one label, without the row itself; negatives: of another."""
    same = rows["label"][:, None] == columns["label"]
    itself = rows["index"][:, None] == torch.arange(outputs.shape[1], device=outputs.device)
    return same & ~itself, ~same


class HardestPairs(Mining):
    """Positions of each row's farthest positive and nearest negative, -1 where it has none."""

    def score_fn(self, outputs: Tensor, rows: Rows, columns: Any = None) -> Rows:
        positive, negative = masks(outputs, rows, columns)
        # Ordered like the distances of a row, which differ by what all of them share.
        order = -outputs if self.distance == "cosine" else columns["norm"] - 2 * outputs
        farthest = torch.where(positive, order, -torch.inf).argmax(1)
        nearest = torch.where(negative, order, torch.inf).argmin(1)
        return {
            "positive": torch.where(positive.any(1), farthest, -1),
            "negative": torch.where(negative.any(1), nearest, -1),
        }


class HardTriplet(FlexChunkLoss):
    """Outputs are aligned embeddings: ``anchor``, ``positive``, ``negative``; rows say which of the latter exist."""

    def __init__(self, margin: float = 5.0, soft: bool = False, distance: str = "euclidean", **options: Any) -> None:
        super().__init__(targets=(), **options)
        self.margin = checks.number("margin", margin)
        self.soft = checks.flag("soft", soft)
        self.distance = checks.choice("distance", distance, BATCH_DISTANCES)

    def between(self, a: Tensor, b: Tensor) -> Tensor:
        if self.distance == "cosine":
            return 1 - cosine(a, b)
        difference = a - b
        if self.distance == "squared_euclidean":
            return (difference * difference).sum(1)
        return torch.linalg.vector_norm(difference, dim=1)

    def loss_fn(self, outputs: Rows, rows: Rows) -> Tensor:
        anchor = outputs["anchor"]
        near = torch.where(rows["has_positive"], self.between(anchor, outputs["positive"]), 0.0)
        # Without a negative the library takes the row's largest distance, which is that of its farthest positive.
        difference = torch.where(rows["has_negative"], near - self.between(anchor, outputs["negative"]), 0.0)
        if self.soft:
            return F.softplus(difference)
        loss = difference + self.margin
        return torch.where(loss < 0, 0.0, loss)


class SemiHardTriplet(Mining):
    """A row's sum over its positives of ``relu(d(a, p) - d(a, n) + margin)``, n the nearest negative beyond p, or the
    farthest where there is none beyond."""

    def __init__(self, margin: float = 5.0, **options: Any) -> None:
        # The sort and its index, positions found in it, the chosen distances and their gradient.
        super().__init__(workspace_bytes=48, **options)
        self.margin = checks.number("margin", margin)

    def loss_fn(self, outputs: Tensor, rows: Rows, columns: Any = None) -> Tensor:
        distances = self.distances(outputs, rows, columns)
        positive, negative = masks(outputs, rows, columns)
        fixed = distances.detach()
        ordered, place = torch.where(negative, fixed, torch.inf).sort(1)
        beyond = torch.searchsorted(ordered, fixed, right=True, out_int32=True)
        count = negative.sum(1, keepdim=True)
        chosen = distances.gather(1, place.gather(1, torch.minimum(beyond, count - 1).clamp_min(0)))
        # Without a negative the library compares with the row's smallest distance: to itself, zero.
        triplets = distances - torch.where(count > 0, chosen, 0.0) + self.margin
        return torch.where(positive, torch.maximum(triplets, torch.zeros_like(triplets)), 0.0).sum(1)


class AllTriplets(Mining):
    """A row's sum over its positives and negatives of ``relu(d(a, p) - d(a, n) + margin)``, and the count of those
    above zero.

    Sorted once by each side, a distance knows how many of the other side it forms such a triplet with. That number is
    its coefficient in the sum, which is linear otherwise.
    """

    def __init__(self, margin: float = 5.0, **options: Any) -> None:
        super().__init__(workspace_bytes=72, **options)  # two sorts, three searches, counts and sums in float64
        self.margin = checks.number("margin", margin)

    def loss_fn(self, outputs: Tensor, rows: Rows, columns: Any = None) -> tuple[Tensor, Rows]:
        distances = self.distances(outputs, rows, columns)
        positive, negative = masks(outputs, rows, columns)
        fixed = distances.detach()
        reach = fixed + self.margin  # of a positive: up to here a negative counts
        negatives = torch.where(negative, fixed, torch.inf).sort(1).values
        reaches = torch.where(positive, reach, -torch.inf).sort(1).values
        # A triplet of exactly zero has a gradient in the library, but is not counted.
        within = torch.searchsorted(negatives, reach, right=True, out_int32=True)
        beyond = outputs.shape[1] - torch.searchsorted(reaches, fixed, out_int32=True)
        counted = torch.searchsorted(negatives, reach - 1e-16, out_int32=True)
        coefficient = torch.where(positive, within, torch.where(negative, -beyond, 0))
        value = (coefficient * torch.where(positive, reach, fixed).double()).sum(1)
        # Zero, with the gradient of the sum.
        slope = (coefficient.to(fixed.dtype) * (distances - fixed)).sum(1)
        return value.to(fixed.dtype) + slope, {"count": torch.where(positive, counted, 0).sum(1)}


# --- rows against candidates: of one process, or of all -------------------------------------------------------------


@dataclass(frozen=True)
class Labelled:
    """Anchors, and the candidates among which they are: all rows of a batch, or those of all processes."""

    rows: Tensor  # (R, D)
    labels: Tensor  # (R,)
    candidates: Tensor  # (V, D)
    candidate_labels: Tensor  # (V,)
    offset: int = 0  # row i is candidate i + offset
    distance: str = "euclidean"
    chunking: Chunking = field(default_factory=Chunking)
    dtype: torch.dtype | None = None  # of the products' operands, where rows and candidates are wider

    def call(self, kind: Any, **options: Any) -> tuple[FlexChunkLoss, dict[str, Any]]:
        """A :class:`Mining` loss over the inner products, and its arguments."""
        mining = shared(kind, self.chunking, distance=self.distance, **options)
        is_cosine = self.distance == "cosine"
        index = torch.arange(self.offset, self.offset + len(self.rows), device=self.rows.device)
        rows, columns = {"label": self.labels, "index": index}, {"label": self.candidate_labels}
        if not is_cosine:
            columns["norm"] = squared_norms(self.candidates)
            rows["norm"] = columns["norm"] if self.rows is self.candidates else squared_norms(self.rows)
        projection = Projection(self.rows, self.candidates, cosine=is_cosine, dtype=self.dtype or self.rows.dtype)
        return mining, {"projections": projection, "rows": rows, "columns": columns}

    def hard(self, margin: float, soft: bool) -> Tensor:
        """Mean over the rows."""
        mined = shared(HardTriplet, self.chunking, margin=margin, soft=soft, distance=self.distance)
        with torch.no_grad():
            loss, arguments = self.call(HardestPairs)
            found = loss.scores(**arguments)
        sides = {name: self.candidates.index_select(0, index.clamp_min(0)) for name, index in found.items()}
        return mined(
            {name: Projection(side) for name, side in {"anchor": self.rows, **sides}.items()},
            {f"has_{name}": index >= 0 for name, index in found.items()},
        ).loss

    def semi_hard(self, margin: float) -> Tensor:
        """Sum over the rows, divided by the pairs of equal label among all candidates."""
        loss, arguments = self.call(SemiHardTriplet, margin=margin)
        _, sizes = self.candidate_labels.unique(return_counts=True)
        pairs = (sizes * (sizes - 1)).sum().clamp_min(1)
        weight = (1 / pairs.double()).to(self.rows.dtype)
        return loss(**arguments, row_weight=weight.expand(len(self.rows))).loss

    def all(self, margin: float) -> tuple[Tensor, Tensor]:
        """Sum over the rows, and how many triplets are above zero."""
        # Coefficients of 1 to V: the middle of that, as a power of two, so that few losses serve ragged batches.
        size = 2.0 ** (len(self.candidates).bit_length() // 2)
        loss, arguments = self.call(AllTriplets, margin=margin, gradient_size=size)
        result = loss(**arguments, row_weight=torch.ones_like(self.rows[:, 0]))
        return result.loss, result.metrics["count"].sum()


def mean_over_triplets(total: Tensor, count: Tensor) -> Tensor:
    """Zero, without gradient, where no triplet counts."""
    return total * torch.where(count > 0, 1 / count.double(), 0.0).to(total.dtype)


def labelled(embeddings: Tensor, labels: Tensor, distance: str, chunking: Chunking) -> Labelled:
    check_embeddings({"embeddings": embeddings})
    check_labels(labels, embeddings)
    checks.choice("distance", distance, BATCH_DISTANCES)
    wide = widened(embeddings)
    return Labelled(wide, labels, wide, labels, distance=distance, chunking=chunking, dtype=embeddings.dtype)


# --- public functions ------------------------------------------------------------------------------------------------


@outside_compile
def batch_hard_triplet(
    embeddings: Tensor,  # (N, D)
    labels: Tensor,  # (N,)
    *,
    margin: float = 5.0,
    soft: bool = False,
    distance: str = "euclidean",
    chunk_size: int | None = None,
    max_chunk_bytes: int | None = None,
    compiled: bool | None = None,
    float32_outputs: bool = True,
) -> Tensor:
    """``mean relu(max_p d(a, p) - min_n d(a, n) + margin)`` over all anchors, p of the anchor's label, n of others.

    With ``soft`` the mean of ``softplus(max_p d(a, p) - min_n d(a, n))``. Without a positive the first distance is
    zero, without a negative the difference is. One product finds the triplets; their distances are then taken from
    differences of embeddings, so that equal rows are at exactly zero.

    Source: Hermans et al., "In Defense of the Triplet Loss", arXiv 1703.07737, as in
    ``sentence_transformers.losses.BatchHardTripletLoss`` and ``BatchHardSoftMarginTripletLoss``.

    Args:
        embeddings: floating point.
        labels: equal ones are of one class.
        distance: "euclidean", "squared_euclidean" or "cosine" (1 - cos).
        chunk_size, max_chunk_bytes, compiled, float32_outputs: as for :class:`~chunked_embed.FlexChunkLoss`.

    Returns:
        A scalar, float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes, labels or devices that do not fit, an unknown distance, a margin that is not finite.
        TypeError: embeddings that are not floating point.

    Example:
        >>> import torch
        >>> from chunked_embed import functional as CF
        >>> embeddings, labels = torch.randn(8, 16, requires_grad=True), torch.arange(8) // 2
        >>> CF.batch_hard_triplet(embeddings, labels, soft=True).backward()
    """
    batch = labelled(embeddings, labels, distance, Chunking(chunk_size, max_chunk_bytes, compiled, float32_outputs))
    return batch.hard(margin, soft)


@outside_compile
def batch_semi_hard_triplet(
    embeddings: Tensor,  # (N, D)
    labels: Tensor,  # (N,)
    *,
    margin: float = 5.0,
    distance: str = "euclidean",
    chunk_size: int | None = None,
    max_chunk_bytes: int | None = None,
    compiled: bool | None = None,
    float32_outputs: bool = True,
) -> Tensor:
    """``mean relu(d(a, p) - d(a, n) + margin)`` over all pairs of one label, n the nearest negative that is farther
    from the anchor than p, or the farthest negative where none is. Zero without such pairs.

    A row's negatives are sorted, so a chunk takes O(V log V) for each of its rows.

    Source: Schroff et al., "FaceNet", arXiv 1503.03832, as in
    ``sentence_transformers.losses.BatchSemiHardTripletLoss``. Arguments and errors as for :func:`batch_hard_triplet`.
    Distances are differences of products: those below about ``4 * sqrt(eps)`` times the rows' norms count as zero.

    Example:
        >>> import torch
        >>> from chunked_embed import functional as CF
        >>> embeddings, labels = torch.randn(8, 16, requires_grad=True), torch.arange(8) // 2
        >>> CF.batch_semi_hard_triplet(embeddings, labels, margin=5.0).backward()
    """
    batch = labelled(embeddings, labels, distance, Chunking(chunk_size, max_chunk_bytes, compiled, float32_outputs))
    return batch.semi_hard(margin)


@outside_compile
def batch_all_triplet(
    embeddings: Tensor,  # (N, D)
    labels: Tensor,  # (N,)
    *,
    margin: float = 5.0,
    distance: str = "euclidean",
    chunk_size: int | None = None,
    max_chunk_bytes: int | None = None,
    compiled: bool | None = None,
    float32_outputs: bool = True,
) -> Tensor:
    """``sum relu(d(a, p) - d(a, n) + margin)`` over all triplets, divided by how many of them are above 1e-16.

    N^3 triplets in O(N log N) for each anchor: sorting its distances tells how often each of them counts. Where no
    triplet is above zero, loss and gradient are zero.

    Source: Hermans et al., "In Defense of the Triplet Loss", arXiv 1703.07737, as in
    ``sentence_transformers.losses.BatchAllTripletLoss``. Arguments and errors as for :func:`batch_hard_triplet`,
    distances as for :func:`batch_semi_hard_triplet`.

    Example:
        >>> import torch
        >>> from chunked_embed import functional as CF
        >>> embeddings, labels = torch.randn(8, 16, requires_grad=True), torch.arange(8) // 2
        >>> CF.batch_all_triplet(embeddings, labels, distance="cosine", margin=0.2).backward()
    """
    batch = labelled(embeddings, labels, distance, Chunking(chunk_size, max_chunk_bytes, compiled, float32_outputs))
    return mean_over_triplets(*batch.all(margin))
