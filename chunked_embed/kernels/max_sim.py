"""MaxSim of tokens: of each token of the queries and each document, the largest product and the document's token that
has it; sums of those over a query's tokens; and gradients, which that token alone has.

On a GPU, half-precision embeddings of up to 256 numbers have kernels of their own. Others go the way of the SPLADE head
(`splade`), with tokens of queries for columns and no floor at zero: by its kernels, or by chunks of torch's operations.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from chunked_embed.kernels.splade import Texts, max_gradients, product, serves, texts_of, wide

EMPTY_DOCUMENT = -1e9
"""The score of a document without tokens, below that of any other: sentence-transformers' number."""

WIDEST = 256  # numbers of a token, in the kernels


Wanted = tuple[bool, bool]  # whether the gradients of queries and of documents are


class Pairs(ABC):
    """All queries with all documents, by chunks of queries. Tokens are (N x Q, H) and (M x D, H), padding included."""

    n: int  # queries
    m: int  # documents
    dtype: torch.dtype  # of the products' operands

    def scores(
        self, queries: Tensor, documents: Tensor, budget: int, most_kept: int
    ) -> tuple[Tensor, list[Tensor]]:  # (N, M)
        """-> and where the maxima are, by chunks, where that is no more bytes than ``most_kept``. ``budget``: of what
        is formed at a time."""
        sides = self.prepared(queries, documents)
        out = queries.new_empty(self.n, self.m, dtype=wide(self.dtype))
        keep = self.place_bytes <= most_kept
        found = [self.score(sides, chunk, out[slice(*chunk)], keep) for chunk in self.chunks(budget)]
        return out, [places for places in found if places is not None]

    def gradients(
        self, grad: Tensor, kept: list[Tensor], queries: Tensor, documents: Tensor, budget: int, wanted: Wanted
    ) -> list[Tensor | None]:
        """Of queries and documents; what has not been kept is found again."""
        sides, chunks = self.prepared(queries, documents), self.chunks(budget)
        # Documents' parts by chunk add up before they are rounded.
        dtypes = queries.dtype, documents.dtype if len(chunks) == 1 else grad.dtype
        outs = self.outs(queries, documents, dtypes, wanted)
        for n, chunk in enumerate(chunks):
            places = kept[n] if kept else self.score(sides, chunk, None, keep=True)
            assert places is not None
            self.pull(grad[slice(*chunk)], places, sides, chunk, *outs)
        return [outs[0], None if outs[1] is None else outs[1].to(documents.dtype)]

    @abstractmethod
    def prepared(self, queries: Tensor, documents: Tensor) -> tuple[Tensor, Tensor]:
        """In the order, and the dtype, in which the others take them."""

    @abstractmethod
    def chunks(self, budget: int) -> list[tuple[int, int]]:
        """Queries, so many at a time that what is formed of them is within the budget."""

    @property
    @abstractmethod
    def place_bytes(self) -> int:
        """Of the places of all maxima."""

    @abstractmethod
    def score(
        self, sides: tuple[Tensor, Tensor], chunk: tuple[int, int], out: Tensor | None, keep: bool
    ) -> Tensor | None:
        """Into ``out (queries, M)``; -> to ``keep``, where the maxima are."""

    def outs(
        self, queries: Tensor, documents: Tensor, dtypes: tuple[torch.dtype, torch.dtype], wanted: Wanted
    ) -> list[Tensor | None]:
        """For gradients, contiguous whatever the embeddings are, of zeros where ``pull`` does not write."""
        given = zip((queries, documents), dtypes, wanted)
        return [torch.zeros(x.shape, dtype=dtype, device=x.device) if wants else None for x, dtype, wants in given]

    @abstractmethod
    def pull(
        self,
        grad: Tensor,  # (queries, M), of scores
        places: Tensor,
        sides: tuple[Tensor, Tensor],
        chunk: tuple[int, int],
        queries_out: Tensor | None,  # (N x Q, H), of which the chunk's tokens are written
        documents_out: Tensor | None,  # (M x D, H), to which a chunk but the first adds
    ) -> None: ...


def pairs(
    query_mask: Tensor,  # (N, Q) bool
    document_mask: Tensor,  # (M, D)
    dtype: torch.dtype,
    width: int,
    budget: int,
) -> Pairs:
    """A document without tokens scores ``EMPTY_DOCUMENT``, and has no gradient."""
    if width <= WIDEST and serves(dtype, query_mask.device):
        from chunked_embed.kernels._triton_max_sim import FusedPairs

        return FusedPairs(query_mask, document_mask, dtype)
    return ColumnPairs(query_mask, document_mask, dtype, budget)


# --- by columns ------------------------------------------------------------------------------------------------------

ENTRY_BYTES = 16  # of a token of a query and a document: its maximum, where that is, and their gradient
MARK_BYTES = 15  # of a tile of documents' tokens besides, in the kernels: what it says, and is asked
BLOCK_BYTES = {"cuda": 1 << 28}  # of products at a time, where they are formed
CPU_BLOCK_BYTES = 1 << 25


class ColumnPairs(Pairs):
    """Tokens of queries are the columns of a product, those of documents its rows; neither has padding."""

    def __init__(self, query_mask: Tensor, document_mask: Tensor, dtype: torch.dtype, budget: int) -> None:
        device = query_mask.device
        self.n, self.m, self.dtype = len(query_mask), len(document_mask), dtype
        self.queries = texts_of(query_mask)
        self.documents = texts_of(document_mask, grouped=serves(dtype, device))
        self.budget = min(budget, BLOCK_BYTES.get(device.type, CPU_BLOCK_BYTES))

    def prepared(self, queries: Tensor, documents: Tensor) -> tuple[Tensor, Tensor]:
        return self.queries.rows_of(queries).to(self.dtype), self.documents.rows_of(documents).to(self.dtype)

    def chunks(self, budget: int) -> list[tuple[int, int]]:
        of_column = ENTRY_BYTES * self.m
        if self.documents.grouped:
            of_column += MARK_BYTES * (self.documents.bounds[-1] // 128 + self.m)
        most = budget // of_column
        if not self.documents.grouped:  # products with a document at least are formed
            most = min(most, self.budget // (max(1, *self.documents.lengths) * wide(self.dtype).itemsize))
        bounds, found, first = self.queries.bounds, [], 0
        for query in range(1, self.n + 1):
            if query == self.n or bounds[query + 1] - bounds[first] > most:
                found.append((first, query))
                first = query
        return found

    @property
    def place_bytes(self) -> int:
        return self.queries.bounds[-1] * self.m * self.documents.position_dtype.itemsize

    def _columns(self, chunk: tuple[int, int]) -> slice:
        return slice(self.queries.bounds[chunk[0]], self.queries.bounds[chunk[1]])

    def score(
        self, sides: tuple[Tensor, Tensor], chunk: tuple[int, int], out: Tensor | None, keep: bool
    ) -> Tensor | None:
        columns = self._columns(chunk)
        best, at = best_tokens(sides[0][columns], sides[1], self.documents, self.budget, keep)
        if out is not None:
            text = self.queries.text[columns] - chunk[0]
            lengths = self.queries.lengths[slice(*chunk)]
            if lengths[0] and lengths.count(lengths[0]) == len(lengths):
                torch.sum(best.unflatten(1, (-1, lengths[0])).transpose(0, 1), 2, out=out)
            else:
                _add_columns(out.zero_(), text, best)
            out.masked_fill_(self.documents.length == 0, EMPTY_DOCUMENT)
        return at

    def pull(
        self,
        grad: Tensor,
        places: Tensor,
        sides: tuple[Tensor, Tensor],
        chunk: tuple[int, int],
        queries_out: Tensor | None,
        documents_out: Tensor | None,
    ) -> None:
        columns = self._columns(chunk)
        own = sides[0][columns]
        if not len(own):
            return
        grad = grad.masked_fill(self.documents.length == 0, 0.0)
        g = grad.t().index_select(1, self.queries.text[columns] - chunk[0])
        rows = None if queries_out is None else queries_out.new_empty(own.shape)
        part = documents_out if chunk[0] == 0 or documents_out is None else torch.zeros_like(documents_out)
        max_gradients(g, places, sides[1], own, self.documents, self.budget, part, rows)
        if documents_out is not None and part is not None and part is not documents_out:
            documents_out += part
        if queries_out is not None and rows is not None:
            if self.queries.source is None:
                queries_out[columns] = rows
            else:
                queries_out.index_copy_(0, self.queries.source[columns], rows)


def _add_columns(out: Tensor, text: Tensor, values: Tensor) -> None:  # (queries, M), (V,), (M, V)
    """Column by column of a text, in their order: a sum in parallel has another order each time."""
    if not values.is_cuda:
        out.index_add_(0, text, values.t())
        return
    start = torch.searchsorted(text, torch.arange(len(out), device=text.device))
    within = torch.arange(len(text), device=text.device) - start[text]
    for n in range(int(within.max()) + 1 if len(within) else 0):
        column = torch.nonzero(within == n)[:, 0]
        out[text[column]] += values[:, column].t()


def best_tokens(
    queries: Tensor,  # (V, H)
    documents: Tensor,  # (R, H), rows of texts
    of: Texts,
    budget: int,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:  # (M, V), (M, V)
    """The largest product of each token of a query with the tokens of a document, float32 of half-precision operands;
    to ``keep``, also where the first token stands in its document that has it. Of a document without tokens, anything.
    """
    if of.grouped and len(queries):
        from chunked_embed.kernels import _triton_splade as kernels

        return kernels.max_pool(documents, queries, None, of, keep, signed=True)
    shape = len(of.lengths), len(queries)
    best = torch.zeros(shape, dtype=wide(queries.dtype), device=queries.device)
    at = torch.zeros(shape, dtype=of.position_dtype, device=queries.device) if keep else None
    for numbers, rows in _blocks(of, budget // (len(queries) * best.element_size() or 1)):
        z = product(queries, documents[rows].flatten(0, 1).t()).unflatten(1, rows.shape)  # (V, texts, tokens)
        if at is None:
            best[numbers] = z.amax(2).t()
        else:
            value, index = z.max(2)
            best[numbers], at[numbers] = value.t(), index.t().to(at.dtype)
    return best, at


def _blocks(of: Texts, tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Documents of about the same length, and their rows, up to so many: (texts,), (texts, length). The last row of a
    shorter one comes again, and is not the first of its size."""
    order = sorted((i for i, length in enumerate(of.lengths) if length), key=of.lengths.__getitem__)
    device = of.start.device
    while order:
        first, longest = len(order) - 1, of.lengths[order[-1]]
        shortest = longest - longest // 8
        while first and of.lengths[order[first - 1]] >= shortest and (len(order) - first + 1) * longest <= tokens:
            first -= 1
        numbers = torch.tensor(order[first:], device=device)
        within = torch.arange(longest, device=device).minimum(of.length[numbers, None] - 1)
        yield numbers, of.start[numbers, None] + within
        order = order[:first]
