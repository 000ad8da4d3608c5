"""The Triton side of `contrast`: similarities that never leave the chip. Its plain twins are beside it."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from chunked_embed.kernels._launch import Launched, can_be_described, cdiv, lines, next_power_of_2, on_device
from chunked_embed.kernels.contrast import Found, Pairs, Similarities, Slopes
from chunked_embed.kernels.norms import AT_FLOOR

# By the width of a row, padded: rows of a program, rows of the other side at a time, warps, stages. The quickest of
# those that were tried on an H100 at 65,536 x 65,536; and for devices of little shared memory.
Launches = dict[int, tuple[int, int, int, int]]
LAUNCHES: Launches = {
    16: (64, 128, 4, 3),
    32: (64, 128, 4, 3),
    64: (64, 128, 4, 3),
    128: (64, 128, 4, 2),
    256: (128, 64, 8, 3),
}
SHARED_MEMORY = 160 << 10  # bytes to a program
LITTLE: Launches = {
    16: (64, 64, 4, 2),
    32: (64, 64, 4, 2),
    64: (64, 64, 4, 2),
    128: (64, 32, 4, 2),
    256: (64, 16, 4, 2),
}
SCAN = 2048  # targets that a program reads at a time, to find those among its rows
LINES = 6  # of what the kernel says of a row
FEW_LISTS = 8  # of documents that do not count: compared without a loop

_START = tl.constexpr(-1e15)  # of a running maximum: below all scores, above what does not count
_NOTHING = tl.constexpr(-2e38)  # a log-sum-exp
_LEAST = tl.constexpr(-120.0)  # of one below which all is nothing
_LOWEST = tl.constexpr(-1e23)  # of a product that does not count: times any factor it is far below all, and finite
_LEAST_FACTOR = tl.constexpr(1e-18)  # in place of zero, by which nothing would tell what does not count
_NEVER = tl.constexpr(1e38)  # a shift
_AT_FLOOR = tl.constexpr(AT_FLOOR)
_TINY = tl.constexpr(1e-37)
_LOG2E = tl.constexpr(1.4426950408889634)  # exponents are taken to base 2: one instruction


@triton.jit
def _rows(side_ptr, rows, size, D, stride, DEPTH: tl.constexpr):
    depth = tl.arange(0, DEPTH)
    there = (rows < size)[:, None] & (depth < D)[None, :]
    return tl.load(side_ptr + rows.to(tl.int64)[:, None] * stride + depth[None, :], mask=there, other=0.0)


@triton.jit
def _tile(side, at, size, D, stride, DESCRIBED: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr):
    """Rows from `at` on; zeros beyond the side's size and width."""
    if DESCRIBED:
        return side.load([at, 0])
    else:
        return _rows(side, at + tl.arange(0, BLOCK), size, D, stride, DEPTH)


@triton.jit
def _vector(ptr, at, size, beyond, PART: tl.constexpr):
    return tl.load(ptr + at, mask=at < size, other=beyond) if PART else tl.load(ptr + at)


@triton.jit
def _factors(norms_ptr, scale_ptr, scale, at, SWAPPED: tl.constexpr):
    """-> what the sums of my rows are multiplied by, and what their scores are, beside factors of the other side."""
    factor = tl.full(at.shape, 1.0, tl.float32)
    if norms_ptr is not None:
        factor = tl.load(norms_ptr + at)
    of_scores = factor * (scale if scale_ptr is None else tl.load(scale_ptr + at))
    return factor if SWAPPED else of_scores, of_scores


@triton.jit
def _through_norms(gradient, x, norms_ptr, at):
    """The gradient of rows, from that of rows of length one over their norms."""
    if norms_ptr is not None:
        inverse, wide = tl.load(norms_ptr + at), x.to(tl.float32)
        along = tl.sum(gradient * wide, 1) * inverse * inverse
        gradient -= wide * tl.where(inverse < _AT_FLOOR, along, 0.0)[:, None]
    return gradient


@triton.jit
def _store(out_ptr, value, rows, size, D, DEPTH: tl.constexpr):
    depth = tl.arange(0, DEPTH)
    to = out_ptr + rows.to(tl.int64)[:, None] * D + depth[None, :]
    tl.store(to, value, mask=(rows < size)[:, None] & (depth < D)[None, :])


@triton.jit
def _tiles_apart(
    target_ptr,
    first_mine,
    A,
    B,
    SWAPPED: tl.constexpr,
    MINE: tl.constexpr,
    OTHER: tl.constexpr,
    SCAN: tl.constexpr,
):
    """Which tiles of the other side need a look at each pair: those that may hold a query and its own document, from
    `low` on, `between` of them, and the last where it is not whole. -> low, between, how many are whole."""
    if SWAPPED:
        first, last = B, -1
        for start in range(0, B, SCAN):
            at = start + tl.arange(0, SCAN)
            target = tl.load(target_ptr + at, mask=at < B, other=-1).to(tl.int32)
            here = (target >= first_mine) & (target < first_mine + MINE)
            first = tl.minimum(first, tl.min(tl.where(here, at, B), 0))
            last = tl.maximum(last, tl.max(tl.where(here, at, -1), 0))
    else:
        at = tl.minimum(first_mine + tl.arange(0, MINE), A - 1)
        target = tl.load(target_ptr + at).to(tl.int32)
        first, last = tl.min(target, 0), tl.max(target, 0)
    whole = B // OTHER
    low = tl.minimum(first // OTHER, whole)
    between = tl.maximum(tl.minimum(last // OTHER + 1, whole) - low, 0)
    return low, between, whole


@triton.jit
def _spread(vector, DOWN: tl.constexpr):
    return vector[:, None] if DOWN else vector[None, :]


@triton.jit
def _own(target_ptr, mine, other, A, B, SWAPPED: tl.constexpr):
    """Pairs of a query and its own document. Mine are queries; `SWAPPED`: documents."""
    if SWAPPED:
        target = tl.load(target_ptr + tl.minimum(other, B - 1)).to(tl.int32)
        return (target[None, :] == mine[:, None]) & (other < B)[None, :]
    else:
        target = tl.load(target_ptr + tl.minimum(mine, A - 1)).to(tl.int32)
        return target[:, None] == other[None, :]


@triton.jit
def _known(
    target_ptr,
    document_ptr,
    candidate_ptr,
    listed_ptr,
    query_ptr,
    its_query_ptr,
    place_ptr,
    mine,
    other,
    A,
    B,
    lists,
    SWAPPED: tl.constexpr,
    SHARED: tl.constexpr,
    LISTS: tl.constexpr,
):
    """Pairs that do not count by their ids, some of one's own among them. What is not there takes no time; a loop in
    here, which many lists are, keeps that over tiles from being pipelined."""
    row, column, queries, documents = mine, other, A, B
    if SWAPPED:
        row, column, queries, documents = other, mine, B, A
    row, column = tl.minimum(row, queries - 1), tl.minimum(column, documents - 1)
    if query_ptr is not None:
        query = _spread(tl.load(query_ptr + row), not SWAPPED)
    if document_ptr is not None:
        candidate = _spread(tl.load(candidate_ptr + column), SWAPPED)
        known = candidate == _spread(tl.load(document_ptr + row), not SWAPPED)
        if SHARED:
            known |= candidate == query
        for k in tl.static_range(LISTS):
            at = tl.minimum(k, lists - 1) * queries + row
            known |= candidate == _spread(tl.load(listed_ptr + at), not SWAPPED)
        if listed_ptr is not None and LISTS == 0:
            for k in range(lists):
                known |= candidate == _spread(tl.load(listed_ptr + k * queries + row), not SWAPPED)
    if query_ptr is not None:
        target = _spread(tl.load(target_ptr + row).to(tl.int32), not SWAPPED)
        place = _spread(tl.load(place_ptr + column), SWAPPED)
        of_query = (query == _spread(tl.load(its_query_ptr + column), SWAPPED)) & (place != target)
        if document_ptr is not None:
            known |= of_query
        else:
            known = of_query
    return known


@Launched
@triton.jit(do_not_specialize=["A", "B", "lists"])
def _softmax_kernel(
    x_ptr,  # (A, D), mine
    y,  # (B, D), the other side, or its descriptor
    y_ptr,  # the other side
    target_ptr,  # (queries,)
    rows_ptr,  # (A,), inverse norms
    columns_ptr,  # (B,), inverse norms, times the scale where that is a query's own
    scale_ptr,  # (A,), of queries, in place of `scale`
    weight_ptr,  # (A,)
    document_ptr,  # (queries,) int32, and so are the next ones; none of it, or all but the lists
    candidate_ptr,  # (documents,)
    listed_ptr,  # (lists, queries)
    query_ptr,  # (queries,); none of this and the next two, or all
    its_query_ptr,  # (documents,)
    place_ptr,  # (documents,)
    found_ptr,  # (LINES, A), lines at multiples of 16 bytes
    gradient_ptr,  # (A, D)
    moment_ptr,  # (A,)
    A,
    B,
    D,
    x_stride,
    y_stride,
    lists,
    scale,
    SLOPES: tl.constexpr,
    GRADIENT: tl.constexpr,
    MOMENT: tl.constexpr,
    SWAPPED: tl.constexpr,
    MASKED: tl.constexpr,
    SHARED: tl.constexpr,
    LISTS: tl.constexpr,
    DESCRIBED: tl.constexpr,
    DEPTH: tl.constexpr,
    MINE: tl.constexpr,
    OTHER: tl.constexpr,
    SCAN: tl.constexpr,
):
    """A program has some rows and goes through the other side, with a running maximum, relative to which all sums are.
    `SWAPPED`: mine are documents, and log-sum-exps are all that is found.

    Weights of the second product are rounded. Of dot products, what that takes is the difference of two sums, of which
    the second is a product with ones, that loses what the product beside it loses. It goes to the row's own document,
    which is subtracted in the end: what is off multiplies differences of documents, which may be near duplicates. Of
    cosines the norm projects it away."""
    first_mine = tl.program_id(0) * MINE
    mine = first_mine + tl.arange(0, MINE)
    there, at_most = mine < A, tl.minimum(mine, A - 1)
    x = _rows(x_ptr, mine, A, D, x_stride, DEPTH)
    factor, inner = _factors(rows_ptr, scale_ptr, scale, at_most, SWAPPED)
    inner = tl.where(inner == 0, _LEAST_FACTOR, inner) * _LOG2E

    top = tl.full((MINE,), _START, tl.float32)
    total = tl.zeros((MINE,), tl.float32)
    moment = tl.zeros((MINE,), tl.float32)
    acc = tl.zeros((MINE, DEPTH), tl.float32)
    sums, ones = tl.zeros((MINE, 16), tl.float32), tl.full((OTHER, 16), 1.0, x.dtype)
    low, between, whole = _tiles_apart(target_ptr, first_mine, A, B, SWAPPED, MINE, OTHER, SCAN)
    for part in tl.static_range(0, 2):  # whole tiles without a look at pairs, then those with
        count = between + tl.cdiv(B, OTHER) - whole if part == 1 else whole - between
        for n in range(0, count):
            if part == 1:
                at = tl.where(n < between, low + n, whole) * OTHER
            else:
                at = tl.where(n < low, n, n + between) * OTHER
            other = at + tl.arange(0, OTHER)
            tile = _tile(y, at, B, D, y_stride, DESCRIBED, OTHER, DEPTH)
            z = tl.dot(x, tile.T)
            if columns_ptr is not None:
                column = _vector(columns_ptr, other, B, 0.0, part == 1)
                z *= column[None, :]
            if MASKED:
                out = _known(
                    *(target_ptr, document_ptr, candidate_ptr, listed_ptr, query_ptr, its_query_ptr, place_ptr),
                    *(mine, other, A, B, lists, SWAPPED, SHARED, LISTS),
                )
                z = tl.where(out, _LOWEST, z)
            if part == 1:
                out = _own(target_ptr, mine, other, A, B, SWAPPED) | (other >= B)[None, :]
                z = tl.where(out, _LOWEST, z)
            above = tl.maximum(top, tl.max(z, 1) * inner)
            exponent = z * inner[:, None] - above[:, None]
            e = tl.exp2(exponent)
            keep = tl.exp2(top - above)
            top = above
            total = total * keep + tl.sum(e, 1)
            if MOMENT:
                moment = moment * keep + tl.sum(e * z, 1)
            if GRADIENT:
                if columns_ptr is not None:
                    e *= column[None, :]
                rounded = e.to(tile.dtype)
                acc = tl.dot(rounded, tile, acc * keep[:, None])
                if columns_ptr is None:
                    sums = tl.dot(rounded, ones, sums * keep[:, None])

    none = total == 0
    others = tl.where(none, _NOTHING, top + tl.log2(tl.where(none, 1.0, total)))
    found_ptr += mine
    line = (tl.cdiv(A, 4) * 4).to(tl.int64)
    if SWAPPED:
        tl.store(found_ptr, others / _LOG2E, mask=there)
    else:
        target = tl.load(target_ptr + at_most).to(tl.int32)
        document = _rows(y_ptr, target, B, D, y_stride, DEPTH).to(tl.float32)
        column = tl.full((MINE,), 1.0, tl.float32)
        if columns_ptr is not None:
            column = tl.load(columns_ptr + target)
        positive = tl.sum(x.to(tl.float32) * document, 1) * column
        apart = others - positive * inner
        e = tl.exp2(-tl.abs(apart))
        series = e * (1.0 - e * (0.5 - e * (1.0 / 3.0 - e * 0.25)))
        loss = tl.maximum(apart, 0.0) / _LOG2E + tl.where(e < 0.03, series, tl.log(1.0 + e))
        rest = tl.where(apart >= 0, 1.0, e) / (1.0 + e)
        tl.store(found_ptr, loss, mask=there)
        tl.store(found_ptr + line, positive * factor, mask=there)
        tl.store(found_ptr + 2 * line, rest, mask=there)
        if SLOPES:
            slope = tl.load(weight_ptr + at_most) * rest
            value = slope * factor
            # A row as good as zero has a factor of 1e12: nothing as part of a sum, but not what is rounded of it.
            floor = tl.sum(x.to(tl.float32) * x.to(tl.float32), 1) < 1e-24 if rows_ptr is not None else value < value
            size = tl.where(floor, 0.0, tl.abs(value))
            shift = tl.where(size == 0, _NEVER, others - tl.log2(tl.where(size == 0, 1.0, size)))  # NaN stays NaN
            tl.store(found_ptr + 3 * line, shift, mask=there)
            tl.store(found_ptr + 4 * line, tl.where(value < 0, -1.0, 1.0), mask=there)
            tl.store(found_ptr + 5 * line, tl.where(floor, 0.0, -value), mask=there)
            over = 1.0 / tl.where(none, 1.0, total)
            if MOMENT:
                tl.store(moment_ptr + mine, value * (moment * over - positive), mask=there)
            if GRADIENT:
                if columns_ptr is None:
                    column -= (total - tl.max(sums, 1)) * over
                away = acc * over[:, None] - column[:, None] * document
                away = _through_norms(away * value[:, None], x, rows_ptr, at_most)
                _store(gradient_ptr, away, mine, A, D, DEPTH)


@Launched
@triton.jit(do_not_specialize=["A", "B", "lists"])
def _sum_kernel(
    a_ptr,  # (A, D), mine
    b,  # (B, D), the other side, or its descriptor
    b_ptr,  # the other side
    target_ptr,  # (queries,)
    rows_ptr,  # (A,), inverse norms
    columns_ptr,  # (B,), inverse norms, times the scale where that is a query's own
    scale_ptr,  # (A,), of queries, in place of `scale`
    shift_ptr,  # (B,)
    sign_ptr,  # (B,)
    own_ptr,  # (queries,)
    row_shift_ptr,  # (A,)
    row_sign_ptr,  # (A,)
    document_ptr,  # (queries,) int32, and so are the next ones; none of it, or all but the lists
    candidate_ptr,  # (documents,)
    listed_ptr,  # (lists, queries)
    query_ptr,  # (queries,); none of this and the next two, or all
    its_query_ptr,  # (documents,)
    place_ptr,  # (documents,)
    out_ptr,  # (A, D)
    moment_ptr,  # (A,)
    A,
    B,
    D,
    a_stride,
    b_stride,
    lists,
    scale,
    BOTH: tl.constexpr,
    MOMENT: tl.constexpr,
    ONLINE: tl.constexpr,
    SWAPPED: tl.constexpr,
    MASKED: tl.constexpr,
    SHARED: tl.constexpr,
    LISTS: tl.constexpr,
    DESCRIBED: tl.constexpr,
    DEPTH: tl.constexpr,
    MINE: tl.constexpr,
    OTHER: tl.constexpr,
    SCAN: tl.constexpr,
):
    """Sums of rows of the other side, by slopes whose softmax is known. `BOTH`: of two softmaxes, and with factors of
    the other side, which else are in the shift. `ONLINE`: relative to a running maximum, for a dtype of little range.

    What rounding takes from slopes goes to one row of the other side: of a query its own document, of a document its
    own query, or one of its batch where it is no query's own. Of cosines the norm projects it away, but for tiles with
    own pairs, whose slopes are the largest."""
    first_mine = tl.program_id(0) * MINE
    mine = first_mine + tl.arange(0, MINE)
    at_most = tl.minimum(mine, A - 1)
    a = _rows(a_ptr, mine, A, D, a_stride, DEPTH)
    factor, inner = _factors(rows_ptr, scale_ptr, scale, at_most, SWAPPED)
    if BOTH:
        factor = inner
    inner *= _LOG2E
    if BOTH:
        row_shift, row_sign = tl.load(row_shift_ptr + at_most), tl.load(row_sign_ptr + at_most)
    nearest = tl.full((MINE,), -1, tl.int32)
    if not SWAPPED:
        nearest = tl.load(target_ptr + at_most).to(tl.int32)

    top = tl.full((MINE,), _LEAST, tl.float32)
    total = tl.zeros((MINE,), tl.float32)
    moment = tl.zeros((MINE,), tl.float32)
    acc = tl.zeros((MINE, DEPTH), tl.float32)
    sums, ones = tl.zeros((MINE, 16), tl.float32), tl.full((OTHER, 16), 1.0, a.dtype)
    low, between, whole = _tiles_apart(target_ptr, first_mine, A, B, SWAPPED, MINE, OTHER, SCAN)
    for part in tl.static_range(0, 2):
        count = between + tl.cdiv(B, OTHER) - whole if part == 1 else whole - between
        for n in range(0, count):
            if part == 1:
                at = tl.where(n < between, low + n, whole) * OTHER
            else:
                at = tl.where(n < low, n, n + between) * OTHER
            other = at + tl.arange(0, OTHER)
            tile = _tile(b, at, B, D, b_stride, DESCRIBED, OTHER, DEPTH)
            z = tl.dot(a, tile.T)
            if columns_ptr is not None:
                column = _vector(columns_ptr, other, B, 0.0, part == 1)
                z *= column[None, :]
            z *= inner[:, None]
            exponent = z - _vector(shift_ptr, other, B, _NEVER, part == 1)[None, :]
            if BOTH:
                row_exponent = z - row_shift[:, None]
            if MASKED:
                out = _known(
                    *(target_ptr, document_ptr, candidate_ptr, listed_ptr, query_ptr, its_query_ptr, place_ptr),
                    *(mine, other, A, B, lists, SWAPPED, SHARED, LISTS),
                )
                exponent = tl.where(out, _LOWEST, exponent)
                if BOTH:
                    row_exponent = tl.where(out, _LOWEST, row_exponent)
            if part == 1:
                own = _own(target_ptr, mine, other, A, B, SWAPPED)
                out = own | (other >= B)[None, :]
                exponent = tl.where(out, _LOWEST, exponent)
                if BOTH:
                    row_exponent = tl.where(out, _LOWEST, row_exponent)
                if SWAPPED:
                    nearest = tl.maximum(nearest, tl.max(tl.where(own, other[None, :], -1), 1))
                    of_own = _vector(own_ptr, other, B, 0.0, True)[None, :]
                else:
                    of_own = tl.load(own_ptr + at_most)[:, None]
            if ONLINE:
                highest = tl.maximum(exponent, row_exponent) if BOTH else exponent
                if part == 1:
                    highest = tl.where(own, tl.log2(tl.abs(of_own) + _TINY), highest)
                above = tl.maximum(top, tl.max(highest, 1))
                keep = tl.exp2(top - above)
                top = above
                total *= keep
                moment *= keep
                acc *= keep[:, None]
                sums *= keep[:, None]
                exponent -= above[:, None]
                if BOTH:
                    row_exponent -= above[:, None]
                if part == 1:
                    of_own = of_own * tl.exp2(-above)[:, None]
            slope = tl.exp2(exponent) * _vector(sign_ptr, other, B, 0.0, part == 1)[None, :]
            if BOTH:
                slope += tl.exp2(row_exponent) * row_sign[:, None]
            if part == 1:
                slope = tl.where(own, of_own, slope)
            if MOMENT:
                moment += tl.sum(slope * z, 1)
            if BOTH and columns_ptr is not None:
                # A row as good as zero is nothing as part of a sum, but not what is rounded of its factor.
                slope *= (tl.where(column < _AT_FLOOR, column, 0.0) if part == 1 else column)[None, :]
            rounded = slope.to(tile.dtype)
            acc = tl.dot(rounded, tile, acc)
            if part == 1 or rows_ptr is None:
                total += tl.sum(slope, 1)
                sums = tl.dot(rounded, ones, sums)

    nearest = tl.where(nearest < 0, mine % B, nearest)
    lost = total - tl.max(sums, 1)
    acc += lost[:, None] * _rows(b_ptr, nearest, B, D, b_stride, DEPTH).to(tl.float32)
    size = tl.exp2(top) if ONLINE else tl.full((MINE,), 1.0, tl.float32)
    if MOMENT:
        tl.store(moment_ptr + mine, moment * (size / _LOG2E), mask=mine < A)
    _store(out_ptr, _through_norms(acc * (size * factor)[:, None], a, rows_ptr, at_most), mine, A, D, DEPTH)


def softmaxes(s: Similarities, weight: Tensor | None, gradient: bool, moment: bool) -> Found:
    (loss, positive, rest, *slopes), of_x, moments = _softmaxes(s, weight, gradient, moment, False)
    return Found(loss, positive, rest, None if weight is None else Slopes(*slopes), of_x, moments)


def logsumexps(s: Similarities) -> Tensor:
    return _softmaxes(s, None, False, False, True)[0][0]


def _softmaxes(
    s: Similarities,
    weight: Tensor | None,  # (A,)
    gradient: bool,
    moment: bool,
    swapped: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    x, y, factors, scale = _sides_of(s, swapped)
    (n, width), others, pairs = x.shape, len(y), s.pairs
    found = lines(1 if swapped else 3 if weight is None else LINES, n, x)
    of_x, moments = _empty(x, (n, width) if gradient else None, (n,) if moment else None)
    if n and others:
        depth = _depth(width)
        launch = _launch(depth, x)
        with on_device(x):
            _softmax_kernel[(cdiv(n, launch["MINE"]),)](
                *(x, *_described(y, launch["OTHER"], depth), pairs.target.contiguous(), *factors),
                *(_vector_of(weight), *_ids(pairs), found, of_x, moments),
                *(n, others, width, x.stride(0), y.stride(0), _lists(pairs), scale),
                SLOPES=weight is not None,
                GRADIENT=gradient,
                MOMENT=moment,
                SWAPPED=swapped,
                **_known_of(pairs),
                DESCRIBED=can_be_described(y),
                DEPTH=depth,
                **launch,
            )
    return found, of_x, moments


def weighted_sums(
    s: Similarities, slopes: Slopes, of_columns: tuple[Tensor, Tensor] | None, over_rows: bool, moment: bool
) -> tuple[Tensor, Tensor | None]:
    a, b, factors, scale = _sides_of(s, over_rows)
    of_mine: tuple[Tensor | None, Tensor | None] = (slopes.shift, slopes.sign)
    of_other: tuple[Tensor | None, Tensor | None] = of_columns or (None, None)
    if over_rows:
        of_mine, of_other = of_other, of_mine
    (n, width), others, both, pairs = a.shape, len(b), of_columns is not None, s.pairs
    out, moments = _empty(a, (n, width), (n,) if moment else None)
    if not others:
        return out.zero_(), moments
    depth = _depth(width)
    launch = _launch(depth, a)
    with on_device(a):
        _sum_kernel[(cdiv(n, launch["MINE"]),)](
            *(a, *_described(b, launch["OTHER"], depth), pairs.target.contiguous(), *factors),
            *map(_vector_of, (*of_other, slopes.own, *of_mine)),
            *(*_ids(pairs), out, moments, n, others, width, a.stride(0), b.stride(0), _lists(pairs), scale),
            BOTH=both,
            MOMENT=moment,
            ONLINE=a.dtype == torch.float16,
            SWAPPED=over_rows,
            **_known_of(pairs),
            DESCRIBED=can_be_described(b),
            DEPTH=depth,
            **launch,
        )
    return out, moments


# --- launches --------------------------------------------------------------------------------------------------------


def _depth(width: int) -> int:
    return max(16, next_power_of_2(width))


def _launch(depth: int, x: Tensor) -> dict[str, Any]:
    little = _shared_memory(x.device) < SHARED_MEMORY
    mine, other, warps, stages = (LITTLE if little else LAUNCHES)[depth]
    constants = {"MINE": mine, "OTHER": other, "SCAN": SCAN}
    return {**constants, "num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


def _empty(x: Tensor, *shapes: tuple[int, ...] | None) -> list[Any]:
    return [None if s is None else torch.empty(s, device=x.device, dtype=torch.float32) for s in shapes]


def _sides_of(s: Similarities, swapped: bool) -> tuple[Tensor, Tensor, list[Tensor | None], float]:
    """Mine and the other side, rows of numbers side by side, however far apart they are; factors of mine, of the other
    side, and a scale of mine or of all."""
    x, y = [side if side.stride(1) == 1 else side.contiguous() for side in (s.x, s.y)]
    of_x, of_y = s.inverse_norms or (None, None)
    if not isinstance(s.scale, Tensor):
        factors, number = [of_x, of_y, None], float(s.scale)
    else:
        factors, number = [s.rows if swapped else of_x, of_y, None if swapped else s.scale], 1.0
    if swapped:
        x, y, factors = y, x, [factors[1], factors[0], None]
    return x, y, [*map(_vector_of, factors)], number


def _ids(pairs: Pairs) -> list[Tensor | None]:
    lists = [
        *(pairs.documents or (None, None)),
        pairs.listed if _lists(pairs) else None,
        *(pairs.queries or (None,) * 3),
    ]
    return [None if ids is None else ids.contiguous() for ids in lists]


def _lists(pairs: Pairs) -> int:
    return 0 if pairs.listed is None else len(pairs.listed)


def _known_of(pairs: Pairs) -> dict[str, Any]:
    lists = _lists(pairs)
    at_once = next_power_of_2(lists) if 0 < lists <= FEW_LISTS else 0  # a few kernels serve any number of them
    return {"MASKED": pairs.masked, "SHARED": pairs.shared, "LISTS": at_once}


def _vector_of(given: Tensor | None) -> Tensor | None:
    return None if given is None else given.float().contiguous()


def _described(y: Tensor, rows: int, depth: int) -> tuple[Any, Tensor]:
    return (TensorDescriptor.from_tensor(y, [rows, depth]) if can_be_described(y) else y), y


@cache
def _shared_memory(device: torch.device) -> int:  # bytes to a program
    if device.type != "cuda":
        return SHARED_MEMORY
    return triton.runtime.driver.active.utils.get_device_properties(device.index or 0)["max_shared_mem"]
