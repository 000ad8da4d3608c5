"""InfoNCE: each query picks its own document out of those of the whole batch, and the other way round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine import FlexChunkLoss, Projection
from ..engine.compile import outside_compile
from ..engine.steps import RowStep, Score
from ..engine.walk import Call
from ..gather import Ranks, ranks
from .arguments import Activation, Rows, finite, one_of, scalar, shared
from .by_rows import Similarity, mean_by_rows
from .kernel_steps import CrossEntropyRows, TwoSidedScore, has_kernel
from .normalize import scaled, unit

DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
TWO_SIDED = {"query_to_doc", "doc_to_query"}
HARDNESS_MODES = ("in_batch_negatives", "hard_negatives", "all_negatives")
LOWEST = -1e30  # of a similarity that does not count: finite, so that a row without any has a gradient of zero


# --- the losses as the engine sees them ------------------------------------------------------------------------------


class _Contrast(FlexChunkLoss):
    """Blocks of similarities of a query (or its document) to all documents, or to all queries.

    A row knows the index ``target`` of its query. Documents come as ``documents`` lists of one document a query, end to
    end: the positives, then the hard negatives.
    """

    static_numbers = ("documents",)

    def __init__(
        self,
        scale: float = 20.0,
        documents: int = 1,
        masked: bool = False,
        hardness_mode: str | None = None,
        hardness: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.scale = scale
        self.documents = documents
        self.masked = masked
        self.hardness_mode = hardness_mode
        self.hardness = hardness

    @property
    def plain(self) -> bool:
        return not self.masked and self.hardness_mode is None

    def positive(self, similarities: Tensor, rows: Rows) -> Tensor:
        return torch.where(_index(similarities) == rows["target"][:, None], similarities, 0.0).sum(1)

    def logits(self, block: str, outputs: Tensor, rows: Rows, columns: Rows, hp: Any) -> Tensor:
        """A block's scaled similarities, with what does not count at ``LOWEST``."""
        z = outputs * hp.scale
        column, target = _index(outputs), rows["target"][:, None]
        own = column % (outputs.shape[1] // self.documents) == target if block.endswith("doc") else column == target
        if block == "query_to_doc" and self.hardness_mode:
            harder = hp.hardness * outputs.detach() * hp.unscaled
            z = z + torch.where(self._harder(own, column == target), harder, 0.0)
        # A query is no candidate for itself, nor are a query's documents for one another.
        out = own if block in ("query_to_query", "doc_to_doc") else torch.zeros_like(own)
        if self.masked:
            known = self._known(block, rows, columns)
            out = out | (known & ~(column == target))
        return torch.where(out, LOWEST, z) if self.masked or block in ("query_to_query", "doc_to_doc") else z

    def _harder(self, own: Tensor, positive: Tensor) -> Tensor:
        """Which documents are weighed up by their similarity."""
        if self.hardness_mode == "in_batch_negatives":
            return ~own
        return own & ~positive if self.hardness_mode == "hard_negatives" else ~positive

    @staticmethod
    def _known(block: str, rows: Rows, columns: Rows) -> Tensor:
        """Which candidates are known to belong to the row: the same query, the same document, or listed as such."""
        query, document = ("document_query", "document_id") if block.endswith("doc") else ("query_id", "query_document")
        same_document = columns[document] == rows["document_id"][:, None]
        # One's own hard negatives share one's query and are none the less negatives.
        same_query = (columns[query] == rows["query_id"][:, None]) & (
            columns[query + "_index"] != rows["target"][:, None]
        )
        known = same_document | same_query
        if block == "doc_to_query":  # listed by the other query
            for ids in columns["query_false_negatives"].unbind(1):
                known = known | (ids == rows["document_id"][:, None])
            return known
        for ids in rows["false_negatives"].unbind(1):
            known = known | (columns[document] == ids[:, None])
        return known


class InfoNCE(_Contrast):
    """Row-wise: log-sum-exp over the candidates of every block, minus the positive."""

    def __init__(self, partition_mode: str = "joint", **options: Any) -> None:
        super().__init__(**options)
        self.partition_mode = partition_mode

    def loss_fn(self, outputs: Mapping[str, Tensor], rows: Rows, hp: Any, columns: Rows | None = None) -> Tensor:
        blocks = {name: self.logits(name, o, rows, columns or {}, hp) for name, o in outputs.items()}
        lses = [z.logsumexp(1) for z in blocks.values()]
        if len(lses) == 1:
            (total,) = lses
        elif self.partition_mode == "joint":
            total = torch.stack(lses).logsumexp(0)
        else:
            total = torch.stack(lses).mean(0)
        return total - hp.scale * self.positive(outputs["query_to_doc"], rows)

    def _row_loss(self, call: Call) -> RowStep:
        one = tuple(call.problem.projections) == ("query_to_doc",)
        if one and self.plain and has_kernel(self, call):
            return CrossEntropyRows(self.scale)
        return super()._row_loss(call)


class TwoSided(_Contrast):
    """Both log-sum-exps of one similarity matrix, over documents and over queries, and its diagonal."""

    couples_batch = True
    row_totals = {"over_documents": "logsumexp"}
    column_totals = {"over_queries": "logsumexp"}

    def score_fn(self, outputs: Tensor, rows: Rows, hp: Any, columns: Rows | None = None) -> Rows:
        return {"positive": hp.scale * self.positive(outputs, rows)}

    def element_fn(self, outputs: Tensor, rows: Rows, hp: Any, columns: Rows | None = None) -> Rows:
        of_query = self.logits("query_to_doc", outputs, rows, columns or {}, hp)
        if self.hardness_mode is None:
            return {"over_documents": of_query, "over_queries": of_query}
        of_document = outputs * hp.scale
        if self.masked:
            of_document = torch.where(of_query == LOWEST, LOWEST, of_document)
        return {"over_documents": of_query, "over_queries": of_document}

    def _score(self, call: Call, names: tuple[str, ...]) -> Score:
        if self.plain and has_kernel(self, call):
            return TwoSidedScore(self.scale)
        return super()._score(call, names)


def _index(outputs: Tensor) -> Tensor:
    return torch.arange(outputs.shape[1], device=outputs.device)


# --- the public function ---------------------------------------------------------------------------------------------


@outside_compile
def info_nce(
    queries: Tensor,  # (N, H)
    documents: Tensor,  # (N, H), row i belongs to query i
    *,
    hard_negatives: Sequence[Tensor] | Tensor = (),  # of (N, H), or (N, K, H)
    scale: float | Tensor = 20.0,
    similarity: str | Similarity = "cosine",
    directions: Sequence[str] = ("query_to_doc",),
    partition_mode: str = "joint",
    hardness_mode: str | None = None,
    hardness_strength: float = 0.0,
    query_ids: Tensor | None = None,  # (N,)
    document_ids: Tensor | None = None,  # (N,), or (N, 1 + hard negatives)
    false_negatives: Tensor | None = None,  # (N, K)
    gather_across_devices: bool = False,
    weight: Tensor | None = None,  # (D, H)
    bias: Tensor | None = None,  # (D,)
    activation: Activation | None = None,
    normalize: bool = False,
    chunk_size: int | None = None,
    max_chunk_bytes: int | None = None,
    compiled: bool = True,
) -> Tensor:
    """In-batch contrastive loss: ``mean over i of  log Z_i - s(q_i, d_i)``, with ``s = scale * similarity``.

    ``Z_i`` sums ``exp(s)`` over candidates, of the chosen directions::

        query_to_doc     s(q_i, d_j), all documents, hard negatives included
        doc_to_query     s(q_j, d_i), all queries
        query_to_query   s(q_i, q_j), j != i
        doc_to_doc       s(d_i, d_j), no documents of the same query

    "joint" takes one Z over all of them (the four of them together are the loss of GTE, arXiv 2308.03281); with
    "per_direction" ``log Z_i`` is the mean of theirs (two directions: CLIP's symmetric loss, arXiv 2103.00020). One
    direction takes three products of the size N x N x D, ``query_to_doc`` and ``doc_to_query`` together four (row and
    column sums of one matrix), all four twelve. No N x N matrix is ever held.

    Args:
        hard_negatives: tensors like ``documents``, or one tensor (N, K, H) of K of them: row i of each is a negative of
            query i (and of all others).
        scale: the inverse temperature, above 0; a tensor of one may require grad.
        similarity: "cosine" (normalises, after the projection) or "dot"; or a function of a chunk of rows and all
            candidates, ``(R, D), (V, D) -> (R, V)``, which runs by ordinary autograd, twice for each chunk.
        hardness_mode: "in_batch_negatives" (arXiv 2503.04812, eq. 5), "hard_negatives" (arXiv 2509.20354) or
            "all_negatives": adds ``hardness_strength * similarity``, detached, to the logits of those documents.
        query_ids, document_ids: integers. Candidates with the same id as the row's own query or document are no
            negatives: they are left out.
        false_negatives: ids of documents that are no negatives of query i either, padded with -1; the pair counts in no
            direction. Without ``document_ids`` they are positions in this process's batch, ``k * N + j`` for row j of
            the k-th list. Every process has the same K.
        gather_across_devices: candidates of all processes. Each returns the loss of its own rows; they average to
            the loss of the whole batch, and so do the gradients. Uneven batches are fine.
        weight, bias, activation, normalize: a projection of all embeddings.
        chunk_size, max_chunk_bytes, compiled: as for ``FlexChunkLoss``.

    Returns:
        A scalar, float32 (float64 for float64 embeddings).

    Raises:
        ValueError: shapes or devices that differ, unknown options, ids that do not fit.
        TypeError: mixed dtypes, ids that are not integers.
    """
    negatives = _negatives(hard_negatives)
    directions = check_directions(directions, partition_mode)
    if hardness_mode is not None:
        one_of("hardness_mode", hardness_mode, HARDNESS_MODES)
    if finite("hardness_strength", hardness_strength) < 0:
        raise ValueError(f"expected hardness_strength to be at least 0, got {hardness_strength}")
    if not callable(similarity):
        one_of("similarity", similarity, ("cosine", "dot"))
    _check_embeddings(queries, documents, *negatives)
    _check_projection(queries, weight, bias)
    root, number = _scale(scale, queries)

    def embed(x: Tensor) -> Tensor:
        if weight is not None:
            x = F.linear(x, weight, bias)
        x = x if activation is None else activation(x)
        x = unit(x, compiled=compiled) if normalize else x
        if similarity == "cosine":
            return unit(x, root, compiled=compiled)
        return x if root is None or callable(similarity) else scaled(x, root, compiled=compiled)

    queries, *lists = (embed(x) for x in (queries, documents, *negatives))
    documents, n = lists[0], len(queries)
    processes = ranks(queries, gather_across_devices)
    ids = _ids(n, len(lists), processes, queries.device, query_ids, document_ids, false_negatives)
    two_sided = set(directions) == TWO_SIDED and not callable(similarity)
    # Two directions over one matrix have no block with queries for columns.
    of_queries = not two_sided and bool(set(directions) & {"query_to_query", "doc_to_query"})
    lists = processes.gather(*lists)
    (all_queries,) = processes.gather(queries) if of_queries else (queries,)
    bank = lists[0] if len(lists) == 1 else torch.cat(lists)
    mine = slice(processes.offset, processes.offset + n)
    rows = {"target": torch.arange(mine.start, mine.stop, device=queries.device)}
    columns: dict[str, Tensor] = {}
    if ids is not None:
        rows |= {"query_id": ids.queries, "document_id": ids.documents[0], "false_negatives": ids.false_negatives}
        columns = ids.columns(of_queries, processes)
    # A scale that learns is in the outputs already.
    unscaled = torch.ones((), dtype=torch.float64) if root is None else root.detach().square().reciprocal()
    numbers = {"unscaled": unscaled}
    options = dict(
        scale=number,
        documents=len(lists),
        masked=ids is not None,
        hardness_mode=hardness_mode if hardness_strength > 0 else None,
        hardness=hardness_strength,
        chunk_size=chunk_size,
        max_chunk_bytes=max_chunk_bytes,
        compiled=compiled,
    )
    sides = {
        "query_to_doc": (queries, bank),
        "query_to_query": (queries, all_queries),
        "doc_to_query": (documents, all_queries),
        "doc_to_doc": (documents, bank),
    }
    if callable(similarity):
        kind, hp = InfoNCE(partition_mode, **options), _Numbers(scale, hardness_strength, 1.0)
        loss = mean_by_rows(
            lambda blocks, part: kind.loss_fn(blocks, part, hp, columns),
            similarity,
            {name: sides[name] for name in directions},
            rows,
            chunk_size=chunk_size,
            max_chunk_bytes=max_chunk_bytes,
            swapped=("doc_to_query", "doc_to_doc"),
        )
    elif two_sided:
        scores = shared(TwoSided, **options).scores(
            Projection(queries, bank), rows, columns=columns or None, numbers=numbers
        )
        (parts,) = processes.stack(scores["over_queries"])  # log-sum-exps over each process's own queries
        both = torch.stack([scores["over_documents"], parts[:, mine].logsumexp(0)])
        total = both.logsumexp(0) if partition_mode == "joint" else both.mean(0)
        loss = (total - scores["positive"]).mean()
    else:
        blocks = {name: Projection(*sides[name]) for name in directions}
        row_wise = shared(InfoNCE, partition_mode=partition_mode, **options)
        loss = row_wise(blocks, rows, columns=columns or None, numbers=numbers).loss
    return processes.share(loss)


class _Numbers(NamedTuple):
    scale: float | Tensor
    hardness: float
    unscaled: float


# --- arguments -------------------------------------------------------------------------------------------------------


class _Ids(NamedTuple):
    queries: Tensor  # (N,)
    documents: Tensor  # (lists, N)
    false_negatives: Tensor  # (N, K)

    def columns(self, of_queries: bool, processes: Ranks) -> dict[str, Tensor]:
        """What the columns of blocks of documents know about themselves, and those of blocks of queries."""
        queries, listed, *documents = processes.gather(self.queries, self.false_negatives, *self.documents)
        index = torch.arange(len(queries), device=queries.device)
        columns = {
            "document_id": torch.cat(documents),
            "document_query": queries.repeat(len(documents)),
            "document_query_index": index.repeat(len(documents)),
        }
        if of_queries:
            columns |= {"query_id": queries, "query_id_index": index, "query_document": documents[0]}
            columns |= {"query_false_negatives": listed}
        return columns


def _ids(
    n: int,
    lists: int,
    processes: Ranks,
    device: torch.device,
    query_ids: Tensor | None,
    document_ids: Tensor | None,
    false_negatives: Tensor | None,
) -> _Ids | None:
    if query_ids is None and document_ids is None and false_negatives is None:
        return None
    positions = torch.arange(lists * n, device=device).view(lists, n)
    positions = positions + (processes.index << 40)  # unlike any other process's
    queries = positions[0] if query_ids is None else _integers("query_ids", query_ids, (n,), device)
    if document_ids is None:
        documents = positions
    elif document_ids.dim() == 1:
        # Hard negatives without an id are documents of their own.
        documents = torch.cat([_integers("document_ids", document_ids, (n,), device)[None], -2 - positions[1:]])
    else:
        documents = _integers("document_ids", document_ids, (n, lists), device).t()
    if false_negatives is None:
        false = positions.new_empty(n, 0)
    else:
        if false_negatives.dim() != 2:
            raise ValueError(f"expected false_negatives of shape ({n}, K), got {tuple(false_negatives.shape)}")
        false = _integers("false_negatives", false_negatives, (n, false_negatives.shape[1]), device)
        if document_ids is None:  # positions in this process's own lists
            false = torch.where(false >= 0, false + positions[0, 0], false)
    return _Ids(queries, documents, false)


def _integers(name: str, given: Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
    if given.is_floating_point() or given.dtype == torch.bool or given.is_complex():
        raise TypeError(f"expected {name} to hold integers, got {given.dtype}")
    if tuple(given.shape) != shape or given.device != device:
        raise ValueError(f"expected {name} of shape {shape} on {device}, got {tuple(given.shape)} on {given.device}")
    return given.long()


def _negatives(given: Sequence[Tensor] | Tensor) -> list[Tensor]:
    if isinstance(given, Tensor):
        return list(given.unbind(1)) if given.dim() == 3 else [given]
    return list(given)


def check_directions(directions: Sequence[str], partition_mode: str) -> tuple[str, ...]:
    chosen = (directions,) if isinstance(directions, str) else tuple(dict.fromkeys(directions))
    for direction in chosen:
        one_of("directions", direction, DIRECTIONS)
    if "query_to_doc" not in chosen:
        raise ValueError(f'expected directions with "query_to_doc", which holds the positive pair, got {chosen}')
    one_of("partition_mode", partition_mode, ("joint", "per_direction"))
    if partition_mode == "per_direction" and not TWO_SIDED.issuperset(chosen):
        raise ValueError(
            'expected partition_mode="joint" with query_to_query or doc_to_doc, which hold no positive pair, got '
            f"per_direction with {chosen}"
        )
    return tuple(name for name in DIRECTIONS if name in chosen)


def _check_embeddings(queries: Tensor, *documents: Tensor) -> None:
    for x in (queries, *documents):
        if not isinstance(x, Tensor):
            raise TypeError(f"expected embeddings to be tensors, got {type(x).__name__}")
    shapes = [tuple(x.shape) for x in (queries, *documents)]
    if len(set(shapes)) > 1 or len(shapes[0]) != 2 or 0 in shapes[0]:
        raise ValueError(f"expected queries, documents and hard negatives of one shape (N, H), got {shapes}")
    dtypes = [x.dtype for x in (queries, *documents)]
    if len(set(dtypes)) > 1 or not queries.is_floating_point():
        raise TypeError(f"expected embeddings of one floating-point dtype, got {dtypes}")
    devices = {str(x.device) for x in (queries, *documents)}
    if len(devices) > 1:
        raise ValueError(f"expected embeddings on one device, got {sorted(devices)}")


def _check_projection(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    given = {"weight": weight, "bias": bias}
    shapes = {name: tuple(t.shape) for name, t in given.items() if t is not None}
    if shapes and (weight is None or weight.dim() != 2 or weight.shape[1] != x.shape[1]):
        raise ValueError(f"expected a weight of shape (D, {x.shape[1]}), got {shapes}")
    if bias is not None and shapes["bias"] != shapes["weight"][:1]:
        raise ValueError(f"expected a bias of shape {shapes['weight'][:1]}, got {shapes['bias']}")
    dtypes = {"embeddings": x.dtype} | {name: t.dtype for name, t in given.items() if t is not None}
    if len(set(dtypes.values())) > 1 and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"expected embeddings and projection of one dtype (or autocast), got {dtypes}")


def _scale(scale: float | Tensor, like: Tensor) -> tuple[Tensor | None, float]:
    """-> what both sides are multiplied by (the root of a tensor), and the factor on their product (a number)."""
    if not isinstance(scale, Tensor):
        if finite("scale", scale) <= 0:
            raise ValueError(f"expected scale to be positive, got {scale}")
        return None, float(scale)
    return scalar("scale", scale, like).sqrt(), 1.0
