"""XTR: queries scored by those tokens of documents alone that an index would retrieve for them."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..engine.autograd import once_only
from ..engine.call import refuse_transforms
from ..engine.compile import outside_compile
from ..engine.products import mm
from ..kernels.max_sim import EMPTY_DOCUMENT
from ..kernels.splade import Texts, texts_of, wide
from ..kernels.weighted_sums import weighted_sums
from .arguments import check_trained, token_mask, token_operands

BUDGET = {"cuda": 1 << 28}  # bytes of similarities at a time
CPU_BUDGET = 1 << 26
ENTRY_BYTES = 64  # of a retrieved token, or of a document, and what is formed beside it


class _How(NamedTuple):
    top_k: int  # at most the number of tokens
    operands: torch.dtype
    budget: int
    learns: bool


class _Xtr(torch.autograd.Function):
    """Kept is, of each query token, the token of each document that counts."""

    @staticmethod
    def forward(
        ctx: Any, how: _How, of_queries: Texts, of_documents: Texts, queries: Tensor, documents: Tensor
    ) -> Tensor:
        ctx.how, ctx.texts = how, (of_queries, of_documents)
        ctx.given = [(t.shape, t.dtype) for t in (queries, documents)]
        with torch.autocast(queries.device.type, enabled=False):
            x, y = of_queries.rows_of(queries).to(how.operands), of_documents.rows_of(documents).to(how.operands)
            totals, counts, at = _retrieve(x, y, of_queries, of_documents, how)
            counts.clamp_min_(1)
            if how.learns:
                ctx.save_for_backward(x, y, counts, at)
            return totals.div_(counts).masked_fill_(of_documents.length == 0, EMPTY_DOCUMENT)

    @staticmethod
    @once_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y, counts, at = ctx.saved_tensors
        of_queries, of_documents = ctx.texts
        outs = [
            torch.zeros(shape, dtype=dtype, device=x.device) if wanted else None
            for (shape, dtype), wanted in zip(ctx.given, ctx.needs_input_grad[3:], strict=True)
        ]
        if at.numel() and x.numel():
            with torch.autocast(grad.device.type, enabled=False):
                _gradients(grad / counts, at, x, y, of_queries, of_documents, ctx.how.budget, *outs)
        return None, None, None, *outs


@outside_compile
def xtr_scores(
    queries: Tensor,  # (N, Q, H)
    documents: Tensor,  # (M, D, H), or (G, K, D, H)
    query_mask: Tensor | None = None,  # (N, Q)
    document_mask: Tensor | None = None,  # (M, D), or (G, K, D)
    *,
    top_k: int = 256,
    pairs: bool = False,
    max_chunk_bytes: int | None = None,
) -> Tensor:  # (N, M); of pairs (N,), or (N, K)
    """Late interaction with what is retrieved (XTR): each query token retrieves the ``top_k`` most similar ones of all
    documents' tokens, and the score of a document is

        s(i, j) = sum over tokens t of query i of  max over retrieved tokens u of document j of  q_it . d_ju,  / Z(i, j)

    where the maximum is 0 if t retrieved no token of j, and ``Z(i, j)`` is how many tokens of query i retrieved one, at
    least 1.

    Similarities are formed for a few query tokens at a time and never held; padding is dropped before the product. Kept
    for backward are the tokens of the maxima, at most ``min(top_k, M)`` a query token. Gradients fall on those alone,
    the first of equal ones within a document, and are sums in an order that is always the same.

    Source: Lee et al., "Rethinking the Role of Token Retrieval in Multi-Vector Retrieval", arXiv 2304.01982, as in
    ``sentence_transformers.multi_vector_encoder.scoring``: ``xtr_scores``; with ``pairs=True`` ``xtr_kd_scores`` (of
    ``(N, K, D, H)``) and ``xtr_scores_pairwise`` (of ``(N, D, H)``).

    Args:
        queries, documents: embeddings of tokens. Similarities and sums of half-precision ones are float32; autocast
            rounds operands of the product to its dtype.
        documents: of ``(G, K, D, H)`` the order is that of ``documents.flatten(0, 1)``.
        query_mask, document_mask: bool or integers; a token that has False or zero is dropped, wherever it stands.
            None takes all tokens. A query without tokens scores 0, and a document without tokens -1e9, whatever the
            query is; neither has a gradient.
        top_k: how many tokens each query token retrieves. From the number of all tokens on, all are.
        pairs: only the scores of each query with its own documents, ``documents[i]``. Tokens are retrieved from all
            documents as ever.
        max_chunk_bytes: of similarities at a time, and what is formed beside them; those of one query token at least.
            None: 256 MiB on a GPU, 64 MiB on a CPU.

    Returns:
        Float32 (float64 for float64 embeddings).

    Raises:
        ValueError: shapes or devices that do not fit, a ``top_k`` below 1.
        TypeError: embeddings that are not floating point or of mixed dtypes, masks that are floating point, a ``top_k``
            that is not an integer.

    Example:
        >>> import torch
        >>> from chunked_embed import functional as CF
        >>> queries, documents = torch.randn(4, 6, 16, requires_grad=True), torch.randn(4, 3, 20, 16)
        >>> mask = torch.arange(20) < torch.randint(1, 21, (4, 3, 1))
        >>> scores = CF.xtr_scores(queries, documents, document_mask=mask, top_k=32)
        >>> scores.shape
        torch.Size([4, 12])
        >>> torch.nn.functional.cross_entropy(scores, torch.arange(0, 12, 3)).backward()  # of three, the first is right
        >>> own = CF.xtr_scores(queries, documents, document_mask=mask, top_k=32, pairs=True)
        >>> own.shape, torch.equal(own[1], scores[1, 3:6])
        (torch.Size([4, 3]), True)
    """
    refuse_transforms()
    checks.integer("top_k", top_k, low=1)
    checks.flag("pairs", pairs)
    checks.integer_or_none("max_chunk_bytes", max_chunk_bytes, low=1)
    operands = _checked(queries, documents, pairs)
    device = queries.device
    of_queries = _texts("query_mask", query_mask, queries)
    of_documents = _texts("document_mask", document_mask, documents)
    how = _How(
        top_k=min(top_k, of_documents.tokens),
        operands=operands,
        budget=max_chunk_bytes or BUDGET.get(device.type, CPU_BUDGET),
        learns=torch.is_grad_enabled() and (queries.requires_grad or documents.requires_grad),
    )
    scores = _Xtr.apply(how, of_queries, of_documents, queries.flatten(0, -2), documents.flatten(0, -2))
    if not pairs:
        return scores
    own = scores.unflatten(1, documents.shape[:-2]) if documents.dim() == 4 else scores[..., None]
    own = own.diagonal().t().contiguous()  # (N, K), and nothing of the others is held
    return own if documents.dim() == 4 else own[:, 0]


def _checked(queries: Tensor, documents: Tensor, pairs: bool) -> torch.dtype:
    """-> of the product's operands."""
    checks.tensor("queries", check_trained("queries", queries), ("N", "Q", "H"))
    check_trained("documents", documents, queries.device)
    width = queries.shape[-1]
    if documents.dim() not in (3, 4) or documents.shape[-1] != width:
        raise ValueError(
            f"expected documents of shape (M, D, {width}), or (G, K, D, {width}), got {tuple(documents.shape)}"
        )
    if pairs and len(documents) != len(queries):
        raise ValueError(
            f"expected documents of shape ({len(queries)}, D, {width}), or ({len(queries)}, K, D, {width}), with "
            f"pairs=True, got {tuple(documents.shape)}"
        )
    return token_operands(queries, documents)


def _texts(name: str, mask: Tensor | None, tokens: Tensor) -> Texts:
    """Which rows count, one text after the other. Waits for the device."""
    known = token_mask(name, mask, tokens)
    return texts_of(torch.ones(tokens.shape[:-1], dtype=torch.bool, device=tokens.device) if known is None else known)


def _retrieve(
    x: Tensor,  # (T, H), all tokens of queries
    y: Tensor,  # (R, H), of documents
    queries: Texts,
    documents: Texts,
    how: _How,
) -> tuple[Tensor, Tensor, Tensor | None]:  # (N, M), (N, M), (T, min(top_k, M)) int32
    """Sums of maxima, and how many there are. To learn, also the tokens that have them, ascending but for -1: none."""
    n, m, kept = len(queries.lengths), len(documents.lengths), min(how.top_k, len(documents.lengths))
    dtype, device = wide(x.dtype), x.device
    totals, counts = (torch.zeros(n, m, dtype=dtype, device=device) for _ in range(2))
    at = torch.empty(len(x), kept, dtype=torch.int32, device=device) if how.learns else None
    if not (len(x) and len(y)):
        return totals, counts, at
    owner, offsets = documents.text.long(), F.pad(queries.start.long(), (0, 1), value=len(x))
    row_bytes = len(y) * dtype.itemsize + (how.top_k + m) * ENTRY_BYTES
    size = min(max(how.budget // row_bytes, 1), len(x))
    buffer = torch.empty(size, len(y), dtype=dtype, device=device)
    for first in range(0, len(x), size):
        stop = min(first + size, len(x))
        similarity = mm(x[first:stop], y.t(), buffer[: stop - first])
        if how.top_k < len(y):
            similarity, index = similarity.topk(how.top_k, dim=1, sorted=False)
        else:
            index = torch.arange(len(y), device=device).expand_as(similarity)
        document = owner[index]
        best, token = _first_maxima(similarity, index, document, m, len(y))
        missing = token == len(y)
        low, high = bisect_right(queries.bounds, first) - 1, bisect_left(queries.bounds, stop)
        inside = offsets[low : high + 1].clamp(first, stop) - first
        totals[low:high] += _sums(best.masked_fill_(missing, 0.0), inside)
        counts[low:high] += _sums((~missing).to(dtype), inside)
        if at is not None and kept == m:
            at[first:stop] = token.masked_fill_(missing, -1)
        elif at is not None:
            at[first:stop] = torch.where(token.gather(1, document) == index, index, -1).sort(dim=1).values
    return totals, counts, at


def _first_maxima(
    similarity: Tensor,  # (C, K)
    index: Tensor,  # (C, K), the tokens
    document: Tensor,  # (C, K), whose each is
    m: int,
    none: int,
) -> tuple[Tensor, Tensor]:  # (C, M), (C, M) int32
    """The largest similarity of each document, and the first token that has it: ``none`` of one without."""
    best = similarity.new_full((len(similarity), m), -torch.inf).scatter_reduce_(1, document, similarity, "amax")
    has = (similarity == best.gather(1, document)) | similarity.isnan()
    token = torch.full(best.shape, none, dtype=torch.int32, device=best.device)
    token.scatter_reduce_(1, document, torch.where(has, index, none).int(), "amin")
    return best, token


def _sums(rows: Tensor, offsets: Tensor) -> Tensor:  # (C, M), (B + 1,) -> (B, M)
    """Of rows that lie side by side, in their order."""
    every = torch.arange(len(rows), device=rows.device)
    return F.embedding_bag(every, rows, offsets, mode="sum", include_last_offset=True)


def _gradients(
    g: Tensor,  # (N, M), of the sums of maxima
    at: Tensor,  # (T, K)
    x: Tensor,  # (T, H)
    y: Tensor,  # (R, H)
    queries: Texts,
    documents: Texts,
    budget: int,
    queries_out: Tensor | None,
    documents_out: Tensor | None,
) -> None:
    """Sums over entries whose weight is not zero, float32 of half-precision operands, and rounded once."""
    size = max(budget // (ENTRY_BYTES * at.shape[1]), 1)
    weights = torch.empty(at.shape, dtype=g.dtype, device=g.device)
    for first in range(0, len(at), size):
        stop = first + size
        token = at[first:stop]
        weight = g[queries.text[first:stop, None], documents.text[token.clamp_min(0)]]
        weights[first:stop] = weight.masked_fill_(token < 0, 0.0)
    if queries_out is not None:
        table, rows_out = y.to(g.dtype), torch.empty(x.shape, dtype=queries_out.dtype, device=x.device)
        for first in range(0, len(at), size):
            part = weights[first : first + size]
            row, entry = part.nonzero(as_tuple=True)
            token = at[first + row, entry].long()
            rows_out[first : first + size] = weighted_sums(table, token, part[row, entry], row, len(part))
        queries.put_rows(rows_out, queries_out)
    if documents_out is not None:
        table, rows_out = x.to(g.dtype), torch.empty(y.shape, dtype=documents_out.dtype, device=y.device)
        size = max(len(y) * size // len(at), 1)
        for first in range(0, len(y), size):
            stop = min(first + size, len(y))
            row, entry = ((at >= first) & (at < stop) & (weights != 0)).nonzero(as_tuple=True)
            token, order = (at[row, entry] - first).sort(stable=True)
            row, weight = row[order], weights[row, entry][order]
            rows_out[first:stop] = weighted_sums(table, row, weight, token.long(), stop - first)
        documents.put_rows(rows_out, documents_out)
