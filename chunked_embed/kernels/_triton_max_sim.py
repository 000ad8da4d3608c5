"""MaxSim on a GPU, of half-precision tokens of up to 256 numbers.

The largest products: a program keeps a tile of the queries' tokens and goes through the documents, tile by tile, with a
running maximum and its token; nothing else of a product leaves it. A document begins with a tile, and its last token
comes again up to the end of its last.

Gradients: that of a query's token is a sum of documents' tokens, one of each document, read where they are; that of a
document's tokens a product of the queries' tokens with a matrix of one entry a column, formed in registers. Both go
through all others in their order: nothing is atomic, and a result is the same to the last bit.

Which tokens count is known on the device alone: the host does not wait for it. Batches of any lengths have the same
kernels, but for the width of a token, of its place, and of a document's tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from chunked_embed.kernels._launch import Launched, cdiv, multiprocessors, next_power_of_2, on_device
from chunked_embed.kernels.max_sim import EMPTY_DOCUMENT, Pairs, Wanted
from chunked_embed.kernels.splade import power_of

QUERIES, DOCUMENTS = 128, 128  # tokens of a tile of the products
WARPS, STAGES = 4, 3
GATHERED, TOGETHER = 16, 4  # tokens of queries of a program, and documents that it reads at once
OWN, COLUMNS = 256, 128  # tokens of a document of a program, and of queries at a time
OWN_WARPS, OWN_STAGES = 8, 2
SUMMED = 64  # documents of a program that sums up
PACKED = 1024  # tokens at a time
PROGRAMS = 8  # of the products, for each multiprocessor, about


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@Launched
@triton.jit(do_not_specialize=["L"])
def _survey_kernel(
    mask_ptr,  # (N, L) uint8
    count_ptr,  # (N,), tiles of MULTIPLE of the tokens that count
    last_ptr,  # (N,), the last of them; -1
    L,
    MULTIPLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    text = tl.program_id(0)
    count = tl.full((), 0, tl.int32)
    last = tl.full((), -1, tl.int32)
    for first in range(0, L, BLOCK):
        each = first + tl.arange(0, BLOCK)
        there = tl.load(mask_ptr + text.to(tl.int64) * L + each, mask=each < L, other=0) != 0
        count += tl.sum(there.to(tl.int32), 0)
        last = tl.maximum(last, tl.max(tl.where(there, each, -1), 0))
    tl.store(count_ptr + text, tl.cdiv(count, MULTIPLE))
    tl.store(last_ptr + text, last)


@Launched
@triton.jit(do_not_specialize=["L"])
def _pack_kernel(
    mask_ptr,  # (N, L) uint8
    start_ptr,  # (N + 1,), where the tokens of each text begin, in tiles of MULTIPLE
    last_ptr,  # (N,)
    out_ptr,  # the tokens that count; a text's last one comes again up to the end of its last tile
    L,
    MULTIPLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    text = tl.program_id(0)
    start = tl.load(start_ptr + text) * MULTIPLE
    stop = tl.load(start_ptr + text + 1) * MULTIPLE
    count = tl.full((), 0, tl.int32)
    for first in range(0, L, BLOCK):
        each = first + tl.arange(0, BLOCK)
        there = (tl.load(mask_ptr + text.to(tl.int64) * L + each, mask=each < L, other=0) != 0).to(tl.int32)
        place = start + count + tl.cumsum(there, 0) - 1
        tl.store(out_ptr + place, text * L + each, mask=there != 0)
        count += tl.sum(there, 0)
    if MULTIPLE > 1:
        each = start + count + tl.arange(0, MULTIPLE)
        tl.store(out_ptr + each, tl.zeros_like(each) + text * L + tl.load(last_ptr + text), mask=each < stop)


@Launched
@triton.jit(do_not_specialize=["first", "stop", "M", "D"])
def _best_kernel(
    q_ptr,  # (N x Q, H)
    d_ptr,  # (M x D, H)
    columns_ptr,  # (N x Q,), tokens of queries that count
    query_start_ptr,  # (N + 1,), in columns
    rows_ptr,  # (tiles x DOCUMENTS,), tokens of documents
    tile_start_ptr,  # (M + 1,)
    best_ptr,  # (M, width)
    at_ptr,  # (M, width)
    first,
    stop,
    M,
    D,
    H,
    width,
    VALUES: tl.constexpr,
    PLACES: tl.constexpr,
    QUERIES: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    begin, end = tl.load(query_start_ptr + first), tl.load(query_start_ptr + stop)
    own = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    there = own < end - begin
    numbers = tl.arange(0, WIDTH)
    token = tl.load(columns_ptr + begin + own, mask=there, other=0)
    q_at = q_ptr + token.to(tl.int64)[:, None] * H + numbers[None, :]
    q = tl.load(q_at, mask=there[:, None] & (numbers < H)[None, :], other=0.0)
    best = tl.full((QUERIES,), -float("inf"), tl.float32)
    at = tl.zeros((QUERIES,), tl.int32)
    share, shares = tl.program_id(1), tl.num_programs(1)
    first_tile = tl.load(tile_start_ptr + (M * share.to(tl.int64)) // shares)
    last_tile = tl.load(tile_start_ptr + (M * (share.to(tl.int64) + 1)) // shares)
    if tl.program_id(0) * QUERIES >= end - begin:
        last_tile = first_tile
    for tile in tl.range(first_tile, last_tile, num_stages=STAGES):
        row = tl.load(rows_ptr + tile * DOCUMENTS + tl.arange(0, DOCUMENTS))
        following = tl.load(rows_ptr + (tile + 1) * DOCUMENTS) // D
        d_at = d_ptr + row.to(tl.int64)[:, None] * H + numbers[None, :]
        d = tl.load(d_at, mask=(numbers < H)[None, :], other=0.0)
        z = tl.dot(q, tl.trans(d))
        document = tl.max(row, 0) // D
        largest = tl.reduce(z, 1, _larger)
        found = largest > best
        if PLACES:
            place = row - document * D
            place = tl.min(tl.where(z == largest[:, None], place[None, :], D - 1), 1)
            at = tl.where(found, place, at)
        best = tl.where(found | (largest != largest), largest, best)
        following = tl.where(tile + 1 < last_tile, following, -1)
        ends = tl.full((QUERIES,), following, tl.int32) != document
        element = document.to(tl.int64) * width + own
        if VALUES:
            tl.store(best_ptr + element, best, mask=there & ends)
        if PLACES:
            tl.store(at_ptr + element, at.to(at_ptr.dtype.element_ty), mask=there & ends)
        best = tl.where(ends, -float("inf"), best)
        at = tl.where(ends, 0, at)


@Launched
@triton.jit(do_not_specialize=["out_ptr", "first", "M"])
def _sums_kernel(
    best_ptr,  # (M, width)
    query_start_ptr,  # (N + 1,)
    last_ptr,  # (M,)
    out_ptr,  # (queries, M)
    first,
    M,
    width,
    EMPTY: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    query = first + tl.program_id(0)
    document = tl.program_id(1) * DOCUMENTS + tl.arange(0, DOCUMENTS)
    begin = tl.load(query_start_ptr + first)
    start, end = tl.load(query_start_ptr + query) - begin, tl.load(query_start_ptr + query + 1) - begin
    total = tl.zeros((DOCUMENTS, TOKENS), tl.float32)
    for token in range(start, end, TOKENS):
        each = token + tl.arange(0, TOKENS)
        best_at = best_ptr + document.to(tl.int64)[:, None] * width + each[None, :]
        total += tl.load(best_at, mask=(document < M)[:, None] & (each < end)[None, :], other=0.0)
    has_tokens = tl.load(last_ptr + document, mask=document < M, other=-1) >= 0
    score = tl.where(has_tokens, tl.sum(total, 1), EMPTY)
    tl.store(out_ptr + (query - first).to(tl.int64) * M + document, score, mask=document < M)


@Launched
@triton.jit(do_not_specialize=["g_ptr", "first", "stop", "g_row", "M", "Q", "D"])
def _of_queries_kernel(
    g_ptr,  # (queries, M) float32
    at_ptr,  # (M, width)
    d_ptr,  # (M x D, H)
    columns_ptr,  # (N x Q,)
    query_start_ptr,  # (N + 1,)
    last_ptr,  # (M,)
    out_ptr,  # (N x Q, H)
    first,
    stop,
    g_row,
    M,
    Q,
    D,
    H,
    width,
    GATHERED: tl.constexpr,
    TOGETHER: tl.constexpr,
    WIDTH: tl.constexpr,
):
    begin, end = tl.load(query_start_ptr + first), tl.load(query_start_ptr + stop)
    own = tl.program_id(0) * GATHERED + tl.arange(0, GATHERED)
    there = own < end - begin
    if tl.program_id(0) * GATHERED < end - begin:
        numbers = tl.arange(0, WIDTH)
        token = tl.load(columns_ptr + begin + own, mask=there, other=0)
        query = (token // Q - first).to(tl.int64)
        total = tl.zeros((GATHERED, WIDTH), tl.float32)
        for document in range(0, M, TOGETHER):
            for n in tl.static_range(TOGETHER):
                each = tl.full((GATHERED,), document + n, tl.int64)
                here = there & (each < M)
                here = here & (tl.load(last_ptr + each, mask=here, other=-1) >= 0)
                g = tl.load(g_ptr + query * g_row + each, mask=here, other=0.0)
                at = tl.load(at_ptr + each * width + own, mask=here, other=0).to(tl.int64)
                d_at = d_ptr + (each * D + at)[:, None] * H + numbers[None, :]
                d = tl.load(d_at, mask=here[:, None] & (numbers < H)[None, :], other=0.0)
                total += d.to(tl.float32) * g[:, None]
        out_at = out_ptr + token.to(tl.int64)[:, None] * H + numbers[None, :]
        tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=there[:, None] & (numbers < H)[None, :])


@Launched
@triton.jit(do_not_specialize=["g_ptr", "power_ptr", "first", "stop", "g_row", "Q", "D"])
def _of_documents_kernel(
    g_ptr,  # (queries, M) float32
    at_ptr,  # (M, width)
    q_ptr,  # (N x Q, H)
    columns_ptr,  # (N x Q,)
    query_start_ptr,  # (N + 1,)
    last_ptr,  # (M,), the last token of each document that counts; -1
    power_ptr,  # ()
    out_ptr,  # (M x D, H)
    first,
    stop,
    g_row,
    Q,
    D,
    H,
    width,
    SCALED: tl.constexpr,
    ADDS: tl.constexpr,
    OWN: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    document = tl.program_id(0)
    place = tl.program_id(1) * OWN + tl.arange(0, OWN)
    numbers = tl.arange(0, WIDTH)
    begin, end = tl.load(query_start_ptr + first), tl.load(query_start_ptr + stop)
    count = end - begin
    if tl.program_id(1) * OWN > tl.load(last_ptr + document):
        count = 0
    g_ptr += document
    at_ptr += document.to(tl.int64) * width
    total = tl.zeros((OWN, WIDTH), tl.float32)
    for column in tl.range(0, count, COLUMNS, num_stages=STAGES):
        each = column + tl.arange(0, COLUMNS)
        there = each < count
        token = tl.load(columns_ptr + begin + each, mask=there, other=0)
        g = tl.load(g_ptr + (token // Q - first).to(tl.int64) * g_row, mask=there, other=0.0)
        if SCALED:
            g *= tl.load(power_ptr)
        at = tl.load(at_ptr + each, mask=there, other=0).to(tl.int32)
        q_at = q_ptr + token.to(tl.int64)[:, None] * H + numbers[None, :]
        q = tl.load(q_at, mask=there[:, None] & (numbers < H)[None, :], other=0.0)
        entries = tl.where(place[:, None] == at[None, :], g[None, :], 0.0).to(q.dtype)
        total = tl.dot(entries, q, total)
    if SCALED:
        total /= tl.load(power_ptr)
    stored = (place < D)[:, None] & (numbers < H)[None, :]
    out_at = out_ptr + (document.to(tl.int64) * D + place)[:, None] * H + numbers[None, :]
    if ADDS:
        total += tl.load(out_at, mask=stored, other=0.0)
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=stored)


class FusedPairs(Pairs):
    def __init__(self, query_mask: Tensor, document_mask: Tensor, dtype: torch.dtype) -> None:
        (self.n, self.q), (self.m, self.d) = query_mask.shape, document_mask.shape
        self.dtype, self.device = dtype, query_mask.device
        self.columns, self.query_start, _ = _packed(query_mask, 1)
        self.rows, self.tile_start, self.last = _packed(document_mask, DOCUMENTS)

    def prepared(self, queries: Tensor, documents: Tensor) -> tuple[Tensor, Tensor]:
        return queries.to(self.dtype).contiguous(), documents.to(self.dtype).contiguous()

    @property
    def place_dtype(self) -> torch.dtype:
        return torch.uint8 if self.d <= 2**8 else torch.int16 if self.d <= 2**15 else torch.int32

    @property
    def place_bytes(self) -> int:
        return self.n * self.q * self.m * self.place_dtype.itemsize

    def chunks(self, budget: int) -> list[tuple[int, int]]:
        size = max(budget // (self.q * self.m * (4 + self.place_dtype.itemsize)), 1)
        return [(first, min(first + size, self.n)) for first in range(0, self.n, size)]

    def score(
        self, sides: tuple[Tensor, Tensor], chunk: tuple[int, int], out: Tensor | None, keep: bool
    ) -> Tensor | None:
        q, d = sides
        first, stop = chunk
        columns = (stop - first) * self.q
        width = cdiv(columns, 16) * 16
        best = torch.empty(self.m, width, device=self.device) if out is not None else None
        at = torch.empty(self.m, width, dtype=self.place_dtype, device=self.device) if keep else None
        tiles = cdiv(columns, QUERIES)
        shares = max(1, min(self.m, cdiv(PROGRAMS * multiprocessors(self.device), tiles)))
        with on_device(q):
            _best_kernel[tiles, shares](
                *(q, d, self.columns, self.query_start, self.rows, self.tile_start),
                *(d if best is None else best, d if at is None else at),
                *(first, stop, self.m, self.d, q.shape[1], width),
                VALUES=best is not None,
                PLACES=keep,
                QUERIES=QUERIES,
                DOCUMENTS=DOCUMENTS,
                WIDTH=_padded(q.shape[1]),
                STAGES=STAGES,
                num_warps=WARPS,
            )
            if out is not None:
                _sums_kernel[stop - first, cdiv(self.m, SUMMED)](
                    *(best, self.query_start, self.last, out, first, self.m, width),
                    EMPTY=EMPTY_DOCUMENT,
                    DOCUMENTS=SUMMED,
                    TOKENS=32,
                    num_warps=4,
                )
        return at

    def outs(
        self, queries: Tensor, documents: Tensor, dtypes: tuple[torch.dtype, torch.dtype], wanted: Wanted
    ) -> list[Tensor | None]:
        found = super().outs(queries, documents, dtypes, (wanted[0], False))
        return [found[0], documents.new_empty(documents.shape, dtype=dtypes[1]) if wanted[1] else None]

    def pull(
        self,
        grad: Tensor,
        places: Tensor,
        sides: tuple[Tensor, Tensor],
        chunk: tuple[int, int],
        queries_out: Tensor | None,
        documents_out: Tensor | None,
    ) -> None:
        q, d = sides
        (first, stop), width, depth = chunk, places.shape[1], q.shape[1]
        g = grad.contiguous()
        with on_device(q):
            if queries_out is not None:
                _of_queries_kernel[(cdiv((stop - first) * self.q, GATHERED),)](
                    *(g, places, d, self.columns, self.query_start, self.last, queries_out),
                    *(first, stop, self.m, self.m, self.q, self.d, depth, width),
                    GATHERED=GATHERED,
                    TOGETHER=TOGETHER,
                    WIDTH=_padded(depth),
                    num_warps=4,
                )
            if documents_out is not None:
                scaled = self.dtype == torch.float16
                own = min(OWN, max(16, next_power_of_2(self.d)))
                _of_documents_kernel[self.m, cdiv(self.d, own)](
                    *(g, places, q, self.columns, self.query_start, self.last, power_of(g) if scaled else g),
                    *(documents_out, first, stop, self.m, self.q, self.d, depth, width),
                    SCALED=scaled,
                    ADDS=first > 0,
                    OWN=own,
                    COLUMNS=COLUMNS,
                    WIDTH=_padded(depth),
                    STAGES=OWN_STAGES,
                    num_warps=OWN_WARPS if own * _padded(depth) > 2**14 else 4,
                )


def _packed(mask: Tensor, multiple: int) -> tuple[Tensor, Tensor, Tensor]:
    """-> tokens that count, where each text begins among them, in tiles of so many (N + 1,), and its last one (N,)."""
    (n, length), device = mask.shape, mask.device
    given = mask.contiguous().view(torch.uint8)
    counts, last = (torch.empty(n, dtype=torch.int32, device=device) for _ in range(2))
    start = torch.zeros(n + 1, dtype=torch.int32, device=device)
    # A tile more, which is nobody's, behind the last.
    out = torch.empty((n * cdiv(length, multiple) + 1) * multiple, dtype=torch.int32, device=device)
    with on_device(mask):
        _survey_kernel[(n,)](given, counts, last, length, MULTIPLE=multiple, BLOCK=PACKED, num_warps=4)
        torch.cumsum(counts, 0, dtype=torch.int32, out=start[1:])
        _pack_kernel[(n,)](given, start, last, out, length, MULTIPLE=multiple, BLOCK=PACKED, num_warps=4)
    return out, start, last


def _padded(width: int) -> int:
    return max(16, next_power_of_2(width))
