"""InfoNCE: each query picks its own document out of those of the whole batch, and the other way round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import FlexChunkLoss, Projection, Step, checks
from ..checks import NOT_NEGATIVE, POSITIVE
from ..chunking import Chunking
from ..engine.call import operand_dtype
from ..engine.compile import outside_compile
from ..engine.types import accumulator_dtype
from ..gather import Ranks, ranks
from .arguments import Activation, Rows, check_embeddings, shared
from .attention_steps import AttentionRows, AttentionStep, TwoSidedAttention
from .by_rows import Similarity, mean_by_rows
from .kernel_steps import CrossEntropyRows, TwoSidedScore
from .known import known_pairs, make_ids
from .product_steps import CrossEntropyProduct, TwoSidedProduct
from .projected import embedded, of_formed

DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
TWO_SIDED = {"query_to_doc", "doc_to_query"}
WITHOUT_OWN = ("query_to_query", "doc_to_doc")  # a query is no candidate for itself, nor are its documents for another
HARDNESS_MODES = ("in_batch_negatives", "hard_negatives", "all_negatives")
LOWEST = -1e30  # of a similarity that does not count: finite, so that a row without any has a gradient of zero


# --- the losses as the engine sees them ------------------------------------------------------------------------------


class Contrast(FlexChunkLoss):
    """Blocks of similarities of a query (or its document) to all documents, or to all queries.

    A row knows the index ``target`` of its query. Documents come as ``documents`` lists of one document a query, end to
    end: the positives, then the hard negatives.
    """

    def __init__(
        self,
        scale: float | None = 20.0,  # None: rows have one
        documents: int = 1,
        masked: bool = False,
        shared_ids: bool = False,
        hardness_mode: str | None = None,
        hardness: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(targets=(), **options)
        self.scale = scale
        self.documents = documents
        self.masked = masked
        self.shared_ids = shared_ids
        self.hardness_mode = hardness_mode
        self.hardness = hardness

    @property
    def plain(self) -> bool:
        """Nothing but similarities, which the kernels take."""
        return not self.masked and self.hardness_mode is None

    def step(self, kind: type[AttentionStep]) -> Step:
        return kind(self.scale, self.masked, self.shared_ids, self.hardness_mode is not None)

    def scale_of(self, rows: Rows) -> Any:  # () or (R, 1)
        return rows["scale"][:, None] if self.scale is None else self.scale

    def positive(self, outputs: Tensor, rows: Rows) -> Tensor:  # (R,)
        own = torch.where(_index(outputs) == rows["target"][:, None], outputs, 0.0)
        return (own * self.scale_of(rows)).sum(1)

    def logits(self, block: str, outputs: Tensor, rows: Rows, columns: Rows | None) -> Tensor:  # (R, V)
        """A block's scaled similarities, with what does not count at ``LOWEST``."""
        z = outputs * self.scale_of(rows)
        if self.plain and block not in WITHOUT_OWN:
            return z
        column, target = _index(outputs), rows["target"][:, None]
        positive = column == target
        own = column % (outputs.shape[1] // self.documents) == target if block.endswith("doc") else positive
        if block == "query_to_doc" and self.hardness_mode:
            harder = self.hardness * outputs.detach()
            z = z + torch.where(self._harder(own, positive), harder, 0.0)
        out = own if block in WITHOUT_OWN else torch.zeros_like(own)
        if self.masked:
            out = out | (known_pairs(block, rows, columns or {}, self.shared_ids) & ~positive)
        return torch.where(out, LOWEST, z) if self.masked or block in WITHOUT_OWN else z

    def _harder(self, own: Tensor, positive: Tensor) -> Tensor:
        """Which documents are weighed up by their similarity."""
        if self.hardness_mode == "in_batch_negatives":
            return ~own
        return own & ~positive if self.hardness_mode == "hard_negatives" else ~positive


class InfoNCE(Contrast):
    """Row-wise: log-sum-exp over the candidates of every block, minus the positive."""

    def __init__(self, partition_mode: str = "joint", **options: Any) -> None:
        super().__init__(**options)
        self.partition_mode = partition_mode

    def loss_fn(self, outputs: Mapping[str, Tensor], rows: Rows, columns: Rows | None = None) -> Tensor:
        if self.plain and (len(outputs) == 1 or self.partition_mode == "per_direction"):  # where no digits cancel
            scale, target = self.scale_of(rows), rows["target"]
            losses = [F.cross_entropy(o * scale, target, reduction="none") for o in outputs.values()]
            return losses[0] if len(losses) == 1 else torch.stack(losses).mean(0)
        lses = [self.logits(name, o, rows, columns).logsumexp(1) for name, o in outputs.items()]
        total = lses[0] if len(lses) == 1 else _partition(torch.stack(lses), self.partition_mode)
        return total - self.positive(outputs["query_to_doc"], rows)

    def make_step(self, projections: tuple[str, ...]) -> Sequence[Step]:
        if projections != ("query_to_doc",):
            return ()
        plain = (CrossEntropyProduct(self.scale), CrossEntropyRows(self.scale)) if self.plain else ()
        return (self.step(AttentionRows), *plain)


class TwoSided(Contrast):
    """Both log-sum-exps of one similarity matrix, over documents and over queries, and its diagonal."""

    def __init__(self, **options: Any) -> None:
        super().__init__(
            couples_batch=True,
            row_totals={"over_documents": "logsumexp"},
            column_totals={"over_queries": "logsumexp"},
            **options,
        )

    def score_fn(self, outputs: Tensor, rows: Rows, columns: Rows | None = None) -> Rows:
        return {"positive": self.positive(outputs, rows)}

    def element_fn(self, outputs: Tensor, rows: Rows, columns: Rows | None = None) -> Rows:
        of_query = of_document = self.logits("query_to_doc", outputs, rows, columns)
        if self.hardness_mode is not None:  # which raises the logits of a query alone
            of_document = outputs * self.scale_of(rows)
            if self.masked:
                of_document = torch.where(of_query == LOWEST, LOWEST, of_document)
        return {"over_documents": of_query, "over_queries": of_document}

    def make_step(self, projections: tuple[str, ...]) -> Sequence[Step]:
        plain = (TwoSidedProduct(self.scale), TwoSidedScore(self.scale)) if self.plain else ()
        return (self.step(TwoSidedAttention), *plain)


def _partition(lses: Tensor, mode: str) -> Tensor:  # (directions, N) -> (N,)
    return lses.logsumexp(0) if mode == "joint" else lses.mean(0)


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
    shared_ids: bool = False,
    false_negatives: Tensor | None = None,  # (N, K)
    gather_across_devices: bool = False,
    weight: Tensor | None = None,  # (D, H)
    bias: Tensor | None = None,  # (D,)
    activation: Activation | None = None,
    normalize: bool = False,
    chunk_size: int | None = None,
    max_chunk_bytes: int | None = None,
    compiled: bool | None = None,
    float32_outputs: bool = True,
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
    column sums of one matrix), all four twelve. No N x N matrix is ever held; nor a chunk of one, where many
    half-precision embeddings of up to 256 numbers are compared on a GPU, in one direction (four products) or in those
    two (six).
    Embeddings that are formed here (``weight``, ``activation``, ``normalize``) in half precision are two operands each,
    a high and a low half: seven products instead of three. ``float32_outputs=False`` rounds them instead.

    Ids leave candidates out of Z, never the positive. With ``q_i`` for the id of query i, ``d_i`` for that of its
    document, and ``c`` for that of a candidate document of row j, its own or a hard negative (an id of either kind that
    is not there equals none)::

                        candidate     left out where                   with shared_ids also where
        query_to_doc    document c    c = d_i  or  q_j = q_i, j != i   c = q_i
        doc_to_query    query j       d_j = d_i  or  q_j = q_i         q_j = d_i
        query_to_query  query j       d_j = d_i  or  q_j = q_i         q_j = d_i  or  d_j = q_i
        doc_to_doc      document c    c = d_i  or  q_j = q_i           c = q_i  or  (q_j = d_i  and  c = d_j)

    The first two are the same pairs, seen from both sides; the last two leave a pair out of both of its rows. A
    document in ``false_negatives`` of query i is left out of row i as though it had the id ``d_i``, and in
    ``doc_to_query`` query i of that document's row.

    Args:
        hard_negatives: tensors like ``documents``, or one tensor (N, K, H) of K of them: row i of each is a negative of
            query i (and of all others).
        scale: the inverse temperature, above 0; a tensor of one may require grad. One on a GPU is not looked at: a
            scale below zero makes the loss NaN there.
        similarity: "cosine" (normalises, after the projection) or "dot"; or a function of a chunk of rows and all
            candidates, ``(R, D), (V, D) -> (R, V)``, which runs by ordinary autograd, twice for each chunk.
        hardness_mode: "in_batch_negatives" (arXiv 2503.04812, eq. 5), "hard_negatives" (arXiv 2509.20354) or
            "all_negatives": adds ``hardness_strength * similarity``, detached, to the logits of those documents.
        query_ids, document_ids: which queries are the same, and which documents: their pairs are no negatives, and left
            out (above). Any integers, negative ones too; only equality counts. Unless ``shared_ids``, they are two
            numberings: no query's id is compared with a document's. Queries without ids all differ, and so do
            documents, and hard negatives beside ``document_ids`` of the shape (N,).
        shared_ids: ``query_ids`` and ``document_ids``, both of them, are one numbering of texts: a candidate that is
            the row's own query or document is left out, whichever of the two it is itself.
        false_negatives: ids of documents that are no negatives of query i either, padded with -1, which here stands for
            no document, one of the id -1 included. Without ``document_ids`` they are positions in this process's batch,
            ``k * N + j`` for row j of the k-th list. Every process has the same K.
        gather_across_devices: candidates of all processes. Each returns the loss of its own rows; they average to
            the loss of the whole batch, and so do the gradients. Uneven batches are fine.
        weight, bias, activation, normalize: a projection of all embeddings; the activation may learn.
        chunk_size, max_chunk_bytes, compiled, float32_outputs: as for ``FlexChunkLoss``.

    Returns:
        A scalar, float32 (float64 for float64 embeddings).

    Raises:
        ValueError: shapes or devices that differ, unknown options, numbers or ids that do not fit.
        TypeError: mixed dtypes, ids that are not integers.

    Example:
        >>> import torch
        >>> from chunked_embed import functional as CF
        >>> queries, documents = (torch.randn(8, 16, requires_grad=True) for _ in range(2))
        >>> loss = CF.info_nce(queries, documents, scale=20.0)
        >>> loss.backward()
        >>> two = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
        >>> CF.info_nce(queries, documents, **two).backward()  # CLIP's symmetric loss
        >>> ids = torch.tensor([0, 0, 1, 2, 3, 4, 5, 6])  # rows 0 and 1 are the same query: no negatives of each other
        >>> CF.info_nce(queries, documents, query_ids=ids) <= loss
        tensor(True)
    """
    chunking = Chunking(chunk_size, max_chunk_bytes, compiled, float32_outputs)
    lists = [documents, *_negatives(hard_negatives)]
    names = ["queries", "documents", *(f"hard_negatives[{i}]" for i in range(len(lists) - 1))]
    check_embeddings(dict(zip(names, (queries, *lists))), "H")
    _check_projection(queries, weight, bias)
    directions = check_directions(directions, partition_mode)
    checks.choice("hardness_mode", hardness_mode, (None, *HARDNESS_MODES))
    hardness = checks.number("hardness_strength", hardness_strength, NOT_NEGATIVE)
    if not callable(similarity):
        checks.choice("similarity", similarity, ("cosine", "dot"))
    checks.function_or_none("activation", activation)
    checks.flag("shared_ids", shared_ids)

    scale = checks.scalar("scale", scale, POSITIVE)
    two_sided = set(directions) == TWO_SIDED and not callable(similarity)
    one_product = two_sided or directions == ("query_to_doc",)
    n, processes = len(queries), ranks(queries, gather_across_devices)
    known = (query_ids, document_ids, false_negatives)
    ids = make_ids(n, len(lists), processes, queries.device, *known, shared_ids)
    formed = weight is not None or activation is not None or normalize
    dtype = operand_dtype(queries.dtype, queries.device)
    if formed or callable(similarity) or not one_product:  # else the embeddings are operands as they are
        queries, *lists = (embedded(x, weight, bias, activation, normalize) for x in (queries, *lists))
    documents = lists[0]
    # Two directions over one matrix have no block with queries for columns.
    of_queries = not two_sided and bool(set(directions) & {"query_to_query", "doc_to_query"})
    lists = processes.gather(*lists)
    (all_queries,) = processes.gather(queries) if of_queries else (queries,)
    bank = lists[0] if len(lists) == 1 else torch.cat(lists)
    sides = {
        "query_to_doc": (queries, bank),
        "query_to_query": (queries, all_queries),
        "doc_to_query": (documents, all_queries),
        "doc_to_doc": (documents, bank),
    }
    target = torch.arange(processes.offset, processes.offset + n, device=queries.device)
    rows = {"target": target, **row_scale(scale, n, queries)}
    columns = None
    if ids is not None:
        rows |= ids.rows()
        columns = ids.columns(len(lists), of_queries, processes)
    options: dict[str, Any] = {
        "scale": None if isinstance(scale, Tensor) else scale,
        "documents": len(lists),
        "masked": ids is not None,
        "shared_ids": shared_ids,
        "hardness_mode": hardness_mode if hardness > 0 else None,
        "hardness": hardness,
    }

    def projection(name: str) -> Projection:
        if formed and float32_outputs:
            return of_formed(*sides[name], cosine=similarity == "cosine", dtype=dtype)
        return Projection(*sides[name], cosine=similarity == "cosine", dtype=dtype)

    if callable(similarity):
        plain = InfoNCE(partition_mode, **options)
        loss = mean_by_rows(
            lambda blocks, part: plain.loss_fn(blocks, part, columns),
            similarity,
            {name: sides[name] for name in directions},
            rows,
            chunking,
            swapped=("doc_to_query", "doc_to_doc"),
        )
        return processes.share(loss)
    projections = {name: projection(name) for name in (("query_to_doc",) if two_sided else directions)}
    return over_blocks(projections, directions, partition_mode, rows, columns, processes, chunking, options)


def over_blocks(
    projections: Mapping[str, Projection],
    directions: tuple[str, ...],
    partition_mode: str,
    rows: Rows,
    columns: Rows | None,
    processes: Ranks,
    chunking: Chunking,
    options: Mapping[str, Any],
) -> Tensor:
    """The loss of this process's rows, of blocks of similarities. Both directions between queries and documents take
    one, or one each."""
    if set(directions) == TWO_SIDED and len(projections) == 1:
        over_both = shared(TwoSided, chunking, **options)
        scores = over_both.scores(projections["query_to_doc"], rows, columns=columns)
        (parts,) = processes.stack(scores["over_queries"])  # log-sum-exps over each process's own queries
        mine = slice(processes.offset, processes.offset + len(rows["target"]))
        both = torch.stack([scores["over_documents"], parts[:, mine].logsumexp(0)])
        loss = (_partition(both, partition_mode) - scores["positive"]).mean()
    else:
        row_wise = shared(InfoNCE, chunking, partition_mode=partition_mode, **options)
        loss = row_wise(projections, rows, columns=columns).loss
    return processes.share(loss)


def row_scale(scale: float | Tensor, n: int, like: Tensor) -> Rows:
    """One that may learn, as a row argument."""
    if not isinstance(scale, Tensor):
        return {}
    return {"scale": scale.to(like.device, accumulator_dtype(like.dtype)).expand(n)}


# --- arguments -------------------------------------------------------------------------------------------------------


def _negatives(given: Sequence[Tensor] | Tensor) -> list[Tensor]:
    if isinstance(given, Tensor):
        return list(given.unbind(1)) if given.dim() == 3 else [given]
    return checks.sequence("hard_negatives", given)


def check_directions(directions: Sequence[str], partition_mode: str) -> tuple[str, ...]:
    chosen = (directions,) if isinstance(directions, str) else tuple(dict.fromkeys(directions))
    for direction in chosen:
        checks.choice("directions", direction, DIRECTIONS)
    if "query_to_doc" not in chosen:
        raise ValueError(f'expected directions with "query_to_doc", which holds the positive pair, got {chosen}')
    checks.choice("partition_mode", partition_mode, ("joint", "per_direction"))
    if partition_mode == "per_direction" and not TWO_SIDED.issuperset(chosen):
        raise ValueError(
            'expected partition_mode="joint" with query_to_query or doc_to_doc, which hold no positive pair, got '
            f"per_direction with {chosen}"
        )
    return tuple(name for name in DIRECTIONS if name in chosen)


def _check_projection(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    if weight is None:
        if bias is not None:
            raise ValueError(f"expected a weight of shape (D, {x.shape[1]}) with the bias, got None")
        return
    checks.tensor("weight", weight, ("D", x.shape[1]), device=x.device, kind="floating")
    dtypes = {"embeddings": x.dtype, "weight": weight.dtype}
    if bias is not None:
        checks.tensor("bias", bias, (len(weight),), device=x.device, kind="floating")
        dtypes["bias"] = bias.dtype
    if not torch.is_autocast_enabled(x.device.type):
        checks.one_dtype("embeddings and their projection", dtypes)
