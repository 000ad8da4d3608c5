"""Late interaction: each token of a query finds its best token in a document, and their products are summed up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..engine.autograd import once_only
from ..engine.call import autocast_dtype, refuse_transforms
from ..engine.compile import outside_compile
from ..gather import ranks
from ..kernels import max_sim as kernels
from ..kernels import splade
from ..kernels.max_sim import EMPTY_DOCUMENT, Pairs
from .arguments import check_trained, token_mask, token_operands
from .scored import ScoredContrast, gather_tokens

BUDGET = {"cuda": 1 << 30}  # bytes of what is formed of a chunk of queries and all documents
KEPT = {"cuda": 1 << 30}  # bytes of places that stay for backward; more are found again there
CPU_BUDGET, CPU_KEPT = 1 << 26, 1 << 28


class _How(NamedTuple):
    operands: torch.dtype
    budget: int
    kept: int
    learns: bool


# --- all queries with all documents ----------------------------------------------------------------------------------


class _AllPairs(torch.autograd.Function):
    """(N, M), by chunks of queries. What stays for backward is where the maxima are."""

    @staticmethod
    def forward(ctx: Any, how: _How, pairs: Pairs, queries: Tensor, documents: Tensor) -> Tensor:
        scores, kept = pairs.scores(queries, documents, how.budget, how.kept if how.learns else -1)
        ctx.how, ctx.pairs = how, pairs
        if how.learns:
            ctx.save_for_backward(queries, documents, *kept)
        return scores

    @staticmethod
    @once_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        queries, documents, *kept = ctx.saved_tensors
        grad, wanted = grad.to(splade.wide(ctx.how.operands)), ctx.needs_input_grad[2:]
        return None, None, *ctx.pairs.gradients(grad, kept, queries, documents, ctx.how.budget, wanted)


@outside_compile
def max_sim(
    queries: Tensor,  # (N, Q, H)
    documents: Tensor,  # (M, D, H)
    query_mask: Tensor | None = None,  # (N, Q)
    document_mask: Tensor | None = None,  # (M, D)
    *,
    length_normalize: bool = False,
    max_chunk_bytes: int | None = None,
) -> Tensor:  # (N, M)
    """``s(i, j) = sum over t of  max over u of  q_it . d_ju``: scores of all queries with all documents by the best
    token of the document for each of the query's. Nothing of the size of all tokens with all is held: what stays for
    backward is where the maxima are, a byte or two for each token of a query and document, and beyond a GiB of them
    (a quarter on a CPU) not even that. Padding is dropped before any product.

    Gradients fall on the tokens of the maxima alone, the first of equal ones, as torch's do, and are summed in an order
    that is always the same.

    Source: Khattab and Zaharia, "ColBERT", arXiv 2004.12832; as in ``sentence_transformers.util.maxsim``.

    Args:
        queries, documents: embeddings of tokens, as they are: cosines are products of normalised ones.
        query_mask, document_mask: bool or integers; a token that has False or zero does not count. None: all do. A
            query without tokens scores zero; a document without tokens scores -1e9 and has no gradient.
        length_normalize: divides by the number of the query's tokens (MeanMaxSim).
        max_chunk_bytes: of what is formed of a chunk of queries.

    Returns:
        Float32 (float64 for float64 embeddings). Half-precision products are not rounded before the maximum.

    Raises:
        ValueError: shapes or devices that do not fit.
        TypeError: embeddings that are not floating point or of mixed dtypes, masks that are floating point.

    Example:
        >>> import torch
        >>> from chunked_embed import functional as CF
        >>> queries, documents = torch.randn(4, 8, 16, requires_grad=True), torch.randn(6, 20, 16)
        >>> mask = torch.arange(20) < torch.tensor([20, 3, 7, 5, 20, 1])[:, None]
        >>> scores = CF.max_sim(queries, documents, document_mask=mask)
        >>> scores.shape
        torch.Size([4, 6])
        >>> plain = (queries[0] @ documents[1, :3].T).amax(1).sum()
        >>> torch.allclose(scores[0, 1], plain, atol=1e-5)
        True
    """
    refuse_transforms()
    operands = _checked(queries, documents)
    checks.flag("length_normalize", length_normalize)
    checks.integer_or_none("max_chunk_bytes", max_chunk_bytes, low=1)
    told = {"query_mask": (query_mask, queries), "document_mask": (document_mask, documents)}
    masks = [token_mask(name, *given) for name, given in told.items()]
    return _all_pairs(queries, masks[0], [(documents, masks[1])], operands, length_normalize, max_chunk_bytes)


def _all_pairs(
    queries: Tensor,
    mask: Tensor | None,
    documents: Sequence[tuple[Tensor, Tensor | None]],  # end to end
    operands: torch.dtype,
    length_normalize: bool,
    max_chunk_bytes: int | None,
) -> Tensor:  # (N, M)
    device = queries.device
    own, (bank, there) = _whole(queries, mask), (documents[0][0], _whole(*documents[0]))
    if len(documents) > 1:
        longest = max(x.shape[1] for x, _ in documents)
        more = [longest - x.shape[1] for x, _ in documents]
        bank = torch.cat([F.pad(x, (0, 0, 0, n)) for (x, _), n in zip(documents, more)])
        there = torch.cat([F.pad(_whole(*given), (0, n)) for given, n in zip(documents, more)])
    how = _How(
        operands,
        max_chunk_bytes or BUDGET.get(device.type, CPU_BUDGET),
        KEPT.get(device.type, CPU_KEPT),
        torch.is_grad_enabled() and (queries.requires_grad or bank.requires_grad),
    )
    with torch.autocast(device.type, enabled=False):
        pairs = kernels.pairs(own, there, operands, queries.shape[-1], how.budget)
        scores = _AllPairs.apply(how, pairs, queries.flatten(0, 1), bank.flatten(0, 1))
        return scores / own.sum(1).clamp_min(1)[:, None] if length_normalize else scores


def _whole(x: Tensor, mask: Tensor | None) -> Tensor:
    return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask


# --- each query with its own documents -------------------------------------------------------------------------------


class _OwnPairs(torch.autograd.Function):
    """(N, K), by chunks of queries: products of a few tokens each. What stays is where the maxima are."""

    @staticmethod
    def forward(
        ctx: Any,
        how: _How,
        masks: tuple[Tensor | None, Tensor | None],
        queries: Tensor,  # (N, Q, H)
        documents: Tensor,  # (N, K, D, H)
    ) -> Tensor:
        query_mask, document_mask = masks
        n, k, length, _ = documents.shape
        scores = queries.new_zeros(n, k, dtype=splade.wide(how.operands))
        at = queries.new_zeros(n, queries.shape[1], k, dtype=torch.int16 if length < 2**15 else torch.int32)
        for part in _parts(how, queries, documents):
            z = _bmm(_to(how, queries[part]), _to(how, documents[part].flatten(1, 2)).mT).unflatten(2, (k, length))
            if document_mask is not None:
                z.masked_fill_(~document_mask[part, None], -torch.inf)
            value, index = z.max(3)
            at[part] = index.to(at.dtype)
            if query_mask is not None:
                value.masked_fill_(~query_mask[part, :, None], 0.0)
            scores[part] = value.sum(1)
        ctx.how = how
        if how.learns:
            ctx.save_for_backward(queries, documents, at, *masks)
        return scores if document_mask is None else scores.masked_fill_(~document_mask.any(2), EMPTY_DOCUMENT)

    @staticmethod
    @once_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        how = ctx.how
        queries, documents, at, query_mask, document_mask = ctx.saved_tensors
        if document_mask is not None:
            grad = grad.masked_fill(~document_mask.any(2), 0.0)
        grad = grad.to(splade.wide(how.operands))
        power = splade.power_of(grad) if how.operands == torch.float16 else None
        given, wants = (queries, documents), ctx.needs_input_grad[2:]
        found = [torch.empty_like(x) if wanted else None for x, wanted in zip(given, wants)]
        for part in _parts(how, queries, documents):
            q, d = _to(how, queries[part]), _to(how, documents[part].flatten(1, 2))
            g = grad[part, None].expand(at[part].shape)
            if query_mask is not None:
                g = g.masked_fill(~query_mask[part, :, None], 0.0)
                q = q.masked_fill(~query_mask[part, :, None], 0.0)  # zero times infinity is no number
            if document_mask is not None:
                d = d.masked_fill(~document_mask[part].flatten(1)[..., None], 0.0)
            g = g if power is None else g * power
            slopes = q.new_zeros(*g.shape, documents.shape[2])
            slopes.scatter_(3, at[part, ..., None].long(), g[..., None].to(q.dtype))
            slopes = slopes.flatten(2)
            with torch.autocast(grad.device.type, enabled=False):
                for out, a, b in zip(found, (slopes, slopes.mT), (d, q)):
                    if out is not None:
                        product = _bmm(a, b).view(out[part].shape)
                        out[part] = product if power is None else product / power
        return None, None, *found


def _parts(how: _How, queries: Tensor, documents: Tensor) -> list[slice]:
    n, k, length, _ = documents.shape
    outputs = queries.shape[1] * k * length * 3 * splade.wide(how.operands).itemsize  # with their slopes
    size = max(how.budget // max(outputs, 1), 1)
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def _to(how: _How, x: Tensor) -> Tensor:
    return x.to(how.operands)


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    """Float32 of half-precision operands."""
    if a.is_cuda and a.dtype in splade.HALF:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return a.to(splade.wide(a.dtype)) @ b.to(splade.wide(b.dtype))


@outside_compile
def max_sim_pairs(
    queries: Tensor,  # (N, Q, H)
    documents: Tensor,  # (N, D, H), or (N, K, D, H)
    query_mask: Tensor | None = None,  # (N, Q)
    document_mask: Tensor | None = None,  # (N, D), or (N, K, D)
    *,
    length_normalize: bool = False,
    max_chunk_bytes: int | None = None,
) -> Tensor:  # (N,), or (N, K)
    """``s(i, k) = sum over t of  max over u of  q_it . d_iku``: :func:`max_sim` of each query with its own document, or
    with its own K of them, as losses of distillation ask for.

    Args:
        queries, documents, query_mask, document_mask, length_normalize, max_chunk_bytes: As there.

    Returns:
        Float32 (float64 for float64 embeddings).

    Raises:
        ValueError: shapes or devices that do not fit.
        TypeError: embeddings that are not floating point or of mixed dtypes, masks that are floating point.

    Example:
        >>> import torch
        >>> from chunked_embed import functional as CF
        >>> queries, documents = torch.randn(4, 8, 16), torch.randn(4, 3, 20, 16, requires_grad=True)
        >>> scores = CF.max_sim_pairs(queries, documents)
        >>> scores.shape
        torch.Size([4, 3])
        >>> torch.allclose(scores[:, 1], CF.max_sim(queries, documents[:, 1]).diagonal(), atol=1e-5)
        True
    """
    refuse_transforms()
    operands = _checked(queries, documents, own=True)
    checks.flag("length_normalize", length_normalize)
    checks.integer_or_none("max_chunk_bytes", max_chunk_bytes, low=1)
    mask, own_mask = (
        token_mask("query_mask", query_mask, queries),
        token_mask("document_mask", document_mask, documents),
    )
    single = documents.dim() == 3
    if single:
        documents, own_mask = documents[:, None], None if own_mask is None else own_mask[:, None]
    device = queries.device
    learns = torch.is_grad_enabled() and (queries.requires_grad or documents.requires_grad)
    how = _How(operands, max_chunk_bytes or BUDGET.get(device.type, CPU_BUDGET), 0, learns)
    with torch.autocast(device.type, enabled=False):
        scores = _OwnPairs.apply(how, (mask, own_mask), queries, documents)
        if length_normalize:
            count = queries.new_full((len(queries),), queries.shape[1]) if mask is None else mask.sum(1)
            scores = scores / count.clamp_min(1).to(scores.dtype)[:, None]
    return scores[:, 0] if single else scores


# --- contrast --------------------------------------------------------------------------------------------------------


@outside_compile
def max_sim_info_nce(
    queries: Tensor,  # (N, Q, H)
    documents: Tensor,  # (N, D, H), row i belongs to query i
    query_mask: Tensor | None = None,  # (N, Q)
    document_mask: Tensor | None = None,  # (N, D)
    *,
    hard_negatives: Sequence[Tensor] | Tensor = (),  # of (N, D_k, H), or (N, K, D, H)
    hard_negative_masks: Sequence[Tensor | None] | Tensor | None = None,  # of (N, D_k), or (N, K, D)
    scale: float | Tensor = 1.0,
    length_normalize: bool = False,
    directions: Sequence[str] = ("query_to_doc",),
    partition_mode: str = "joint",
    query_ids: Tensor | None = None,  # (N,)
    document_ids: Tensor | None = None,  # (N,), or (N, 1 + hard negatives)
    shared_ids: bool = False,
    false_negatives: Tensor | None = None,  # (N, K)
    gather_across_devices: bool = False,
    chunk_size: int | None = None,
    max_chunk_bytes: int | None = None,
) -> Tensor:
    """In-batch contrast of :func:`max_sim` scores: ``mean over i of  log Z_i - scale s(i, i)``, where ``Z_i`` sums up
    ``exp(scale s(i, j))`` over the documents j of the batch, hard negatives included. :func:`info_nce` with another
    similarity; three products of all tokens with all, or less: of gradients only what falls on a maximum is multiplied.

    Args:
        queries, documents, query_mask, document_mask, length_normalize: as for :func:`max_sim`.
        hard_negatives, hard_negative_masks: tensors like ``documents``, of any lengths, and theirs; or one of each.
        scale: above 0; a tensor of one may require grad. MaxSim is a sum over tokens, so that 1 is much already.
        directions: "query_to_doc", and "doc_to_query" beside it, in which a document picks its query.
        partition_mode, query_ids, document_ids, shared_ids, false_negatives, gather_across_devices: as for
            :func:`info_nce`.
        chunk_size: rows of scores at a time, in the loss behind them.
        max_chunk_bytes: of what is formed of a chunk of queries.

    Returns:
        A scalar, float32 (float64 for float64 embeddings).

    Raises:
        ValueError: shapes or devices that differ, unknown options, numbers or ids that do not fit.
        TypeError: mixed dtypes, masks that are floating point, ids that are not integers.

    Example:
        >>> import torch
        >>> from chunked_embed import functional as CF
        >>> queries, documents = torch.randn(4, 8, 16, requires_grad=True), torch.randn(4, 20, 16, requires_grad=True)
        >>> loss = CF.max_sim_info_nce(queries, documents, hard_negatives=torch.randn(4, 2, 12, 16))
        >>> loss.backward()
        >>> queries.grad.shape
        torch.Size([4, 8, 16])
    """
    refuse_transforms()
    lists = [documents, *_listed("hard_negatives", hard_negatives, 4)]
    masks = [
        document_mask,
        *_listed("hard_negative_masks", () if hard_negative_masks is None else hard_negative_masks, 3),
    ]
    if len(masks) == 1:
        masks += [None] * (len(lists) - 1)
    if len(masks) != len(lists):
        raise ValueError(f"expected {len(lists) - 1} hard_negative_masks, one for each, got {len(masks) - 1}")
    operands = _checked(queries, documents)
    names = ["documents", *(f"hard_negatives[{k}]" for k in range(len(lists) - 1))]
    for name, x in zip(names, lists):
        checks.tensor(name, x, (len(queries), "D", queries.shape[-1]), device=queries.device, kind="floating")
    if autocast_dtype(queries.device) is None or any(x.dtype == torch.float64 for x in lists):
        checks.one_dtype("documents", {name: x.dtype for name, x in zip(names, lists)})
    told = ["document_mask", *(f"hard_negative_masks[{k}]" for k in range(len(lists) - 1))]
    masks = [token_mask(name, mask, x) for name, mask, x in zip(told, masks, lists)]
    mask = token_mask("query_mask", query_mask, queries)
    checks.flag("length_normalize", length_normalize)
    checks.integer_or_none("max_chunk_bytes", max_chunk_bytes, low=1)
    processes = ranks(queries, gather_across_devices)
    contrast = ScoredContrast(
        queries,
        len(lists),
        processes,
        scale=scale,
        directions=directions,
        partition_mode=partition_mode,
        query_ids=query_ids,
        document_ids=document_ids,
        shared_ids=shared_ids,
        false_negatives=false_negatives,
        chunk_size=chunk_size,
    )
    candidates = list(zip(lists, masks))
    if not processes.alone:
        candidates = [gather_tokens(processes, x, _whole(x, own)) for x, own in candidates]
    return contrast.loss(_all_pairs(queries, mask, candidates, operands, length_normalize, max_chunk_bytes))


def _listed(name: str, given: Any, dim: int) -> list[Any]:
    """Of one tensor (N, K, ...), K."""
    if isinstance(given, Tensor):
        return list(given.unbind(1)) if given.dim() == dim else [given]
    return checks.sequence(name, given)


# --- arguments -------------------------------------------------------------------------------------------------------


def _checked(queries: Tensor, documents: Tensor, own: bool = False) -> torch.dtype:
    """-> of the products' operands."""
    check_trained("queries", queries)
    if queries.dim() != 3 or 0 in queries.shape:
        raise ValueError(f"expected queries of shape (N, Q, H) with at least one token, got {tuple(queries.shape)}")
    check_trained("documents", documents, queries.device)
    n, width = len(queries), queries.shape[-1]
    shapes = ("(N, D, H)", "(N, K, D, H)") if own else ("(M, D, H)",)
    fits = documents.dim() in (3, 4)[: len(shapes)] and documents.shape[-1] == width and 0 not in documents.shape
    if not fits or (own and len(documents) != n):
        expected = " or ".join(shapes).replace("H", str(width)).replace("N", str(n) if own else "N")
        raise ValueError(f"expected documents of shape {expected}, got {tuple(documents.shape)}")
    return token_operands(queries, documents)
