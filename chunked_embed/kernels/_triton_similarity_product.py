"""The Triton side of `similarity_product`: products whose tiles become what a loss needs where they are formed. Its
plain twins are beside it.

Scores are to base 2 here: an exponential is one instruction. Kernels that read vectors along the columns are compiled
for multiples of 16 of them and for others; none is for a number of rows: batches are ragged."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from chunked_embed.kernels._launch import Launched, cdiv, lines, next_power_of_2, on_device, room
from chunked_embed.kernels._triton_product import (
    destination,
    halves,
    log1p,
    own_columns,
    position,
    product,
    programs,
    sources,
)
from chunked_embed.kernels._triton_similarity import _LOG2E, _START, _TINY, _logsumexp, _vectors

ROWS, COLUMNS, DEPTH = 128, 256, 64
WARPS, STAGES = 8, 3
TOGETHER = 16  # tiles of rows that share what they read of the columns' side in the L2 cache
PASS = 16, 16  # tiles of a row at a time, of the pass that makes gradients of exponentials, and its warps

_LARGE = tl.constexpr(32768.0)  # the largest exponential of a tile's row: float16 has 44 binary places below it
_LOWEST = tl.constexpr(-1e30)  # in place of -inf, where a zero multiplies it


@triton.jit
def _scaled(z, rows_ptr, columns_ptr, rows, columns, R, V, FACTORS: tl.constexpr):
    """Outputs times their factors; gradients of scores likewise."""
    if FACTORS:
        z *= tl.load(columns_ptr + columns, mask=columns < V, other=0.0)[None, :]
    return z * tl.load(rows_ptr + rows, mask=rows < R, other=0.0)[:, None]


@triton.jit
def _store(
    out, value, first_row, first, R, V, out_row, DESCRIBED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    if DESCRIBED:
        out.store([first_row, first], value.to(out.dtype))
    else:
        rows, columns = first_row + tl.arange(0, ROWS), first + tl.arange(0, WIDTH)
        out_ptr = out + rows.to(tl.int64)[:, None] * out_row + columns[None, :]
        tl.store(out_ptr, value.to(out.dtype.element_ty), mask=(rows < R)[:, None] & (columns < V)[None, :])


# --- one direction ---------------------------------------------------------------------------------------------------


@Launched
@triton.jit(do_not_specialize=["R", "V", "tiles"])
def _exponentials_kernel(
    target_ptr,  # (R,)
    x,  # (R, H), or its descriptor
    bank,  # (V, H), likewise
    rows_ptr,  # (R,)
    columns_ptr,  # (V,)
    parts_ptr,  # (3, R, tiles): of a tile's row, without its own column, the maximum m, sum e, sum e (z - m)
    own_ptr,  # (R,), the scores of own columns
    out,  # (R, V), or its descriptor: e = exp(z - m), times a large number
    R,
    V,
    H,
    x_row,
    x_column,
    bank_row,
    bank_column,
    out_row,
    tiles,
    FACTORS: tl.constexpr,
    STORE: tl.constexpr,
    MOMENT: tl.constexpr,
    DESCRIBED: tl.constexpr,
    STORE_DESCRIBED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """Relative to the maximum of their own tile, exponentials have all digits of float16, wherever the row's others
    and its own column are."""
    row_tiles = tl.cdiv(R, ROWS)
    for index in tl.range(tl.program_id(0), row_tiles * tiles, tl.num_programs(0), flatten=True):
        row_tile, tile = position(index, row_tiles, tiles, TOGETHER)
        z = product(
            *(x, bank, row_tile, tile, R, V, H, x_row, x_column, bank_row, bank_column),
            *(DESCRIBED, ROWS, COLUMNS, DEPTH),
        )
        rows, columns = row_tile * ROWS + tl.arange(0, ROWS), tile * COLUMNS + tl.arange(0, COLUMNS)
        there = rows < R
        z = _scaled(z, rows_ptr, columns_ptr, rows, columns, R, V, FACTORS) * _LOG2E
        # Few tiles hold an own column, or end beyond the columns: the others are spared the comparisons.
        here, is_own = own_columns(target_ptr, rows, tile * COLUMNS, R, COLUMNS)
        if (tl.max(here.to(tl.int32), 0) != 0) | (tile * COLUMNS + COLUMNS > V):
            tl.store(own_ptr + rows, tl.sum(tl.where(is_own, z, 0.0), 1), mask=here)
            z = tl.where((columns < V)[None, :] & ~is_own, z, float("-inf"))
        m = tl.maximum(tl.max(z, 1), _START)
        y = z - m[:, None]
        e = tl.exp2(y)
        part_ptr = parts_ptr + rows.to(tl.int64) * tiles + tile
        line = R.to(tl.int64) * tiles
        tl.store(part_ptr, m, mask=there)
        tl.store(part_ptr + line, tl.sum(e, 1), mask=there)
        if MOMENT:
            tl.store(part_ptr + 2 * line, tl.sum(e * tl.maximum(y, _LOWEST), 1), mask=there)
        if STORE:
            e *= _LARGE
            first_row, first = row_tile * ROWS, tile * COLUMNS
            left, right = halves(e, ROWS, COLUMNS)
            _store(out, left, first_row, first, R, V, out_row, STORE_DESCRIBED, ROWS, COLUMNS // 2)
            first += COLUMNS // 2
            _store(out, right, first_row, first, R, V, out_row, STORE_DESCRIBED, ROWS, COLUMNS // 2)


@Launched
@triton.jit(do_not_specialize=["R", "tiles"])
def _rows_kernel(
    parts_ptr,  # (3, R, tiles)
    own_ptr,  # (R,)
    target_ptr,  # (R,), and so are the next two
    weight_ptr,
    rows_ptr,
    columns_ptr,  # (V,)
    loss_ptr,  # (R,)
    moment_ptr,  # (R,)
    e_ptr,  # (R, V), and room up to whole vectors
    out_ptr,  # the same place
    R,
    V,
    out_row,
    tiles,
    FACTORS: tl.constexpr,
    STORE: tl.constexpr,
    MOMENT: tl.constexpr,
    COLUMNS: tl.constexpr,  # of a tile
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,  # of a row at a time
    VECTOR: tl.constexpr,
):
    """The loss of a row from what its tiles say, then its exponentials, read and written once."""
    row = tl.program_id(0)
    tile = tl.arange(0, BLOCK)
    parts_ptr += row.to(tl.int64) * tiles
    line = R.to(tl.int64) * tiles
    m = tl.load(parts_ptr + tile, mask=tile < tiles, other=_START)
    s = tl.load(parts_ptr + line + tile, mask=tile < tiles, other=0.0)
    own = tl.load(own_ptr + row)
    top = tl.max(m, 0)
    keep = tl.exp2(m - top)
    total = tl.sum(keep * s, 0)
    total = tl.where(total < _TINY, _TINY, total)  # of a row without others; NaN stays NaN
    distance = top + tl.log2(total) - own
    smaller = tl.exp2(-tl.abs(distance))
    tl.store(loss_ptr + row, tl.maximum(distance, 0.0) / _LOG2E + log1p(smaller))
    if STORE or MOMENT:
        weight = tl.load(weight_ptr + row)
        others = tl.where(distance >= 0, 1.0, smaller) / (1.0 + smaller)  # their probability: 1 - p has no digits
        factor = weight * others / total
        if MOMENT:
            u = tl.load(parts_ptr + 2 * line + tile, mask=tile < tiles, other=0.0)
            tl.store(moment_ptr + row, factor * tl.sum(keep * (u + s * (m - own)), 0) / _LOG2E)
    if STORE:
        inner = tl.load(rows_ptr + row)
        target = tl.load(target_ptr + row).to(tl.int32)
        at_own = -weight * others * inner
        if FACTORS:
            at_own *= tl.load(columns_ptr + target)
        factor *= inner / _LARGE
        e_ptr += row.to(tl.int64) * out_row
        out_ptr += row.to(tl.int64) * out_row
        for start in range(0, tiles, TILES):
            part = start + tl.arange(0, TILES)
            of_tile = factor * tl.exp2(tl.load(parts_ptr + part, mask=part < tiles, other=_START) - top)
            at = part[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
            inside = at // VECTOR * VECTOR < V
            grad = tl.load(e_ptr + at, mask=inside, other=0.0).to(tl.float32) * of_tile[:, None]
            if FACTORS:
                grad *= tl.load(columns_ptr + at, mask=at < V, other=0.0, eviction_policy="evict_last")
            grad = tl.where(at == target, at_own, grad)
            tl.store(out_ptr + at, grad.to(out_ptr.dtype.element_ty), mask=inside)


def cross_entropy(
    x: Tensor,  # (R, H)
    bank: Tensor,  # (V, H)
    target: Tensor,  # (R,)
    weight: Tensor | None,  # (R,)
    rows: Tensor,  # (R,)
    columns: Tensor | None,  # (V,)
    gradient: bool,
    moment: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:  # the last says nothing unless `moment`
    R, V = len(x), len(bank)
    tiles = cdiv(V, COLUMNS)
    loss, moments, own = lines(3, R, x)
    e = room(R, V, x, torch.float16) if gradient else None
    grad = None if e is None else e.view(x.dtype)
    place = loss if e is None else e
    if R:
        parts = torch.empty(2 + moment, R, tiles, device=x.device, dtype=torch.float32)
        weight, rows, columns = _vectors(loss, weight, rows, columns)
        wanted = {"FACTORS": columns is not loss, "STORE": gradient, "MOMENT": moment}
        target = target.contiguous()
        with on_device(x):
            given, launch = _product(x, bank)
            out, described = (loss, False) if e is None else destination(e, ROWS, COLUMNS)
            _exponentials_kernel[programs(cdiv(R, ROWS), tiles, x.device)](
                *(target, *given, rows, columns, parts, own, out),
                *(R, V, x.shape[1], *x.stride(), *bank.stride(), place.stride(0), tiles),
                **wanted,
                STORE_DESCRIBED=described,
                **launch,
            )
            at_once, warps = PASS
            _rows_kernel[(R,)](
                *(parts, own, target, weight, rows, columns, loss, moments, place, place if grad is None else grad),
                *(R, V, place.stride(0), tiles),
                **wanted,
                COLUMNS=COLUMNS,
                BLOCK=max(32, next_power_of_2(tiles)),
                TILES=at_once,
                VECTOR=8,
                num_warps=warps,
                enable_fp_fusion=True,
            )
    return loss, grad, moments


# --- two directions --------------------------------------------------------------------------------------------------


@Launched
@triton.jit(do_not_specialize=["R", "V", "tiles"])
def _both_sums_kernel(
    target_ptr,  # (R,)
    x,  # (R, H), or its descriptor
    bank,  # (V, H), likewise
    rows_ptr,  # (R,)
    columns_ptr,  # (V,)
    own_ptr,  # (R,), the scores of own columns
    row_ptr,  # (R, tiles), log-sum-exps of a tile over its columns
    column_ptr,  # (row tiles, V), and over its rows
    again_ptr,  # (1 + row tiles * tiles,), of how many tiles columns are to be added up again, and which
    R,
    V,
    H,
    x_row,
    x_column,
    bank_row,
    bank_column,
    tiles,
    FACTORS: tl.constexpr,
    AGAIN: tl.constexpr,
    DESCRIBED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """Exponentials are relative to their row's maximum. For the columns they are weighed back, relative to the largest
    of those maxima; a tile with a column that is smaller by so much that its sum vanishes is formed again, and its
    columns are added up on their own terms."""
    row_tiles = tl.cdiv(R, ROWS)
    last = row_tiles * tiles
    if AGAIN:
        last = tl.load(again_ptr)
    for n in tl.range(tl.program_id(0), last, tl.num_programs(0), flatten=not AGAIN):
        index = n
        if AGAIN:
            index = tl.load(again_ptr + 1 + n)
        row_tile, tile = position(index, row_tiles, tiles, TOGETHER)
        z = product(
            *(x, bank, row_tile, tile, R, V, H, x_row, x_column, bank_row, bank_column),
            *(DESCRIBED, ROWS, COLUMNS, DEPTH),
        )
        rows, columns = row_tile * ROWS + tl.arange(0, ROWS), tile * COLUMNS + tl.arange(0, COLUMNS)
        there, inside = rows < R, columns < V
        z = _scaled(z, rows_ptr, columns_ptr, rows, columns, R, V, FACTORS) * _LOG2E
        if not AGAIN:
            here, is_own = own_columns(target_ptr, rows, tile * COLUMNS, R, COLUMNS)
            if tl.max(here.to(tl.int32), 0) != 0:
                tl.store(own_ptr + rows, tl.sum(tl.where(is_own, z, 0.0), 1) / _LOG2E, mask=here)
        if (tile * COLUMNS + COLUMNS > V) | (row_tile * ROWS + ROWS > R):
            z = tl.where(there[:, None] & inside[None, :], z, float("-inf"))
        if AGAIN:
            tops = tl.maximum(tl.max(z, 0), _START)
            total = tl.sum(tl.exp2(z - tops[None, :]), 0)
        else:
            m = tl.maximum(tl.max(z, 1), _START)
            e = tl.exp2(z - m[:, None])
            row_lse = (m + tl.log2(tl.where(there, tl.sum(e, 1), 1.0))) / _LOG2E
            tl.store(row_ptr + rows.to(tl.int64) * tiles + tile, row_lse, mask=there)
            top = tl.max(m, 0)
            total = tl.where(inside, tl.sum(e * tl.exp2(m - top)[:, None], 0), 1.0)
            if tl.min(total, 0) < _TINY:
                tl.store(again_ptr + 1 + tl.atomic_add(again_ptr, 1), index)
            total = tl.where(total < _TINY, _TINY, total)  # NaN stays NaN
            tops = tl.full((COLUMNS,), 0.0, tl.float32) + top
        column_lse = (tops + tl.log2(tl.where(inside, total, 1.0))) / _LOG2E
        tl.store(column_ptr + V.to(tl.int64) * row_tile + columns, column_lse, mask=inside)


@triton.jit
def _slopes(
    y,
    target_ptr,
    rows_ptr,
    columns_ptr,
    row_lse_ptr,
    column_lse_ptr,
    g_row_ptr,
    g_column_ptr,
    g_own_ptr,
    rows,
    first,
    R,
    V,
    FACTORS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """-> the gradient of outputs y, and what a scale learns from their rows."""
    columns = first + tl.arange(0, WIDTH)
    there, inside = rows < R, columns < V
    z = _scaled(y, rows_ptr, columns_ptr, rows, columns, R, V, FACTORS) * _LOG2E
    row_lse = tl.load(row_lse_ptr + rows, mask=there, other=0.0) * _LOG2E
    grad = tl.exp2(z - row_lse[:, None]) * tl.load(g_row_ptr + rows, mask=there, other=0.0)[:, None]
    column_lse = tl.load(column_lse_ptr + columns, mask=inside, other=0.0) * _LOG2E
    g_column = tl.load(g_column_ptr + columns, mask=inside, other=0.0)
    grad += tl.exp2(z - column_lse[None, :]) * g_column[None, :]
    here, is_own = own_columns(target_ptr, rows, first, R, WIDTH)
    if tl.max(here.to(tl.int32), 0) != 0:
        g_own = tl.load(g_own_ptr + rows, mask=here, other=0.0)
        grad += tl.where(is_own, g_own[:, None], 0.0)
    moment = tl.sum(grad * z, 1) / _LOG2E  # scores beyond the columns are zero
    return _scaled(grad, rows_ptr, columns_ptr, rows, columns, R, V, FACTORS), moment


@Launched
@triton.jit(do_not_specialize=["g_row_ptr", "g_own_ptr", "R", "tiles"])
def _both_gradients_kernel(
    target_ptr,  # (R,)
    x,  # (R, H), or its descriptor
    bank,  # (V, H), likewise
    rows_ptr,  # (R,)
    columns_ptr,  # (V,)
    row_lse_ptr,  # (R,)
    column_lse_ptr,  # (V,)
    g_row_ptr,  # (R,)
    g_column_ptr,  # (V,)
    g_own_ptr,  # (R,)
    moment_ptr,  # (R, tiles)
    out,  # (R, V), or its descriptor
    R,
    V,
    H,
    x_row,
    x_column,
    bank_row,
    bank_column,
    out_row,
    tiles,
    FACTORS: tl.constexpr,
    STORE: tl.constexpr,
    MOMENT: tl.constexpr,
    DESCRIBED: tl.constexpr,
    STORE_DESCRIBED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    row_tiles = tl.cdiv(R, ROWS)
    for index in tl.range(tl.program_id(0), row_tiles * tiles, tl.num_programs(0), flatten=True):
        row_tile, tile = position(index, row_tiles, tiles, TOGETHER)
        z = product(
            *(x, bank, row_tile, tile, R, V, H, x_row, x_column, bank_row, bank_column),
            *(DESCRIBED, ROWS, COLUMNS, DEPTH),
        )
        rows = row_tile * ROWS + tl.arange(0, ROWS)
        left, right = halves(z, ROWS, COLUMNS)
        moment = tl.zeros((ROWS,), tl.float32)
        for half in tl.static_range(0, 2):
            first = tile * COLUMNS + half * (COLUMNS // 2)
            grad, of_half = _slopes(
                *(left if half == 0 else right, target_ptr, rows_ptr, columns_ptr, row_lse_ptr, column_lse_ptr),
                *(g_row_ptr, g_column_ptr, g_own_ptr, rows, first, R, V, FACTORS, COLUMNS // 2),
            )
            moment += of_half
            if STORE:
                _store(out, grad, row_tile * ROWS, first, R, V, out_row, STORE_DESCRIBED, ROWS, COLUMNS // 2)
        if MOMENT:
            tl.store(moment_ptr + rows.to(tl.int64) * tiles + tile, moment, mask=rows < R)


def both_logsumexps(
    x: Tensor,  # (R, H)
    bank: Tensor,  # (V, H)
    target: Tensor,  # (R,)
    rows: Tensor,  # (R,)
    columns: Tensor | None,  # (V,)
) -> tuple[Tensor, Tensor, Tensor]:  # (R,), (V,), (R,)
    R, V = len(x), len(bank)
    tiles, row_tiles = cdiv(V, COLUMNS), cdiv(R, ROWS)
    own = torch.empty(R, device=x.device, dtype=torch.float32)
    if not R:
        return own, torch.full((V,), -torch.inf, device=x.device), own
    parts = torch.empty(R, tiles, device=x.device, dtype=torch.float32)
    column_parts = torch.empty(row_tiles, V, device=x.device, dtype=torch.float32)
    again = torch.zeros(1 + row_tiles * tiles, device=x.device, dtype=torch.int32)
    rows, columns = _vectors(own, rows, columns)
    with on_device(x):
        given, launch = _product(x, bank)
        for formed_again in (False, True):
            _both_sums_kernel[programs(row_tiles, tiles, x.device)](
                *(target.contiguous(), *given, rows, columns, own, parts, column_parts, again),
                *(R, V, x.shape[1], *x.stride(), *bank.stride(), tiles),
                FACTORS=columns is not own,
                AGAIN=formed_again,
                **launch,
            )
        return _logsumexp(parts), _logsumexp(column_parts.t()), own


def both_gradients(
    x: Tensor,  # (R, H)
    bank: Tensor,  # (V, H)
    target: Tensor,  # (R,)
    lses: tuple[Tensor, Tensor],  # (R,), (V,)
    upstream: tuple[Tensor, Tensor, Tensor],  # (R,), (V,), (R,)
    rows: Tensor,  # (R,)
    columns: Tensor | None,  # (V,)
    gradient: bool,
    moment: bool,
) -> tuple[Tensor | None, Tensor | None]:
    R, V = len(x), len(bank)
    tiles = cdiv(V, COLUMNS)
    grad = room(R, V, x, x.dtype) if gradient else None
    moments = torch.empty(R, tiles, device=x.device, dtype=torch.float32) if moment else None
    if R:
        target = target.contiguous()
        has_factors = columns is not None
        rows, columns, *vectors = _vectors(target, rows, columns, *lses, *upstream)
        with on_device(x):
            given, launch = _product(x, bank)
            out, described = (target, False) if grad is None else destination(grad, ROWS, COLUMNS)
            _both_gradients_kernel[programs(cdiv(R, ROWS), tiles, x.device)](
                *(target, *given, rows, columns, *vectors, target if moments is None else moments, out),
                *(R, V, x.shape[1], *x.stride(), *bank.stride(), 1 if grad is None else grad.stride(0), tiles),
                FACTORS=has_factors,
                STORE=gradient,
                MOMENT=moment,
                STORE_DESCRIBED=described,
                **launch,
            )
    return grad, None if moments is None else moments.sum(1)


def _product(x: Tensor, bank: Tensor) -> tuple[tuple, dict]:
    """-> the two sides of a product, and constants of its kernel."""
    given, described = sources(x, bank, ROWS, COLUMNS, DEPTH)
    constants = {
        "DESCRIBED": described,
        "ROWS": ROWS,
        "COLUMNS": COLUMNS,
        "DEPTH": DEPTH,
        "TOGETHER": TOGETHER,
        "enable_fp_fusion": True,
        "num_warps": WARPS,
        "num_stages": STAGES,
    }
    return given, constants
