"""The Triton side of `splade`: a product whose tiles leave pooled, and products with a matrix of one entry a text and
column. Their plain twins are beside it.

A tile is of columns and rows, in this order: what is reduced over rows is in one thread then, for the most part. Texts
begin at multiples of GROUP rows, so that a tile is reduced by group first, and by text only then. What a tile says of a
text goes to a slot, of number text + tile: no two pairs of a text and a tile have the same, and those of one text are
neighbours, which a second kernel puts together, in their order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from chunked_embed.kernels._launch import Launched, cdiv, next_power_of_2, on_device, room
from chunked_embed.kernels._triton_product import destination, halves, position, product, programs, sources
from chunked_embed.kernels.splade import GROUP, Texts, power_of

COLUMNS, ROWS, DEPTH = 128, 256, 64  # of a tile of the product
FEW = 64  # rows of a tile, where there are no more
WARPS, STAGES = 8, 3
TOGETHER = 16  # tiles of columns that share what they read of the rows in the L2 cache

TILE, WIDTH, ENTRIES = 128, 256, 64  # of the gradients: rows of the result, numbers of a row, and entries at a time
ENTRY_WARPS, ENTRY_STAGES = 8, 3
BLOCK = 1024  # columns of a program that puts together
TEXTS, MARKED = 16, 256  # texts and columns of a program that marks
LISTED = 2048  # marks at a time


@triton.jit
def _activated(z, TWICE: tl.constexpr):
    """log1p of the relu, once or twice: what ``1 + z`` loses of a small z is less than the product lost of it."""
    u = tl.log(1.0 + tl.maximum(z, 0.0))
    if TWICE:
        u = tl.log(1.0 + u)
    return u


@triton.jit
def _tile(
    weight,
    x,
    bias_ptr,
    column_tile,
    row_tile,
    V,
    R,
    H,
    weight_row,
    weight_column,
    x_row,
    x_column,
    BIAS: tl.constexpr,
    DESCRIBED: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """-> (COLUMNS, ROWS) outputs, transposed."""
    z = product(
        *(weight, x, column_tile, row_tile, V, R, H, weight_row, weight_column, x_row, x_column),
        *(DESCRIBED, COLUMNS, ROWS, DEPTH),
    )
    if BIAS:
        columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
        z += tl.load(bias_ptr + columns, mask=columns < V, other=0.0).to(tl.float32)[:, None]
    return z


@triton.jit
def _there(text, rows, start_ptr, length_ptr, there, GROUP: tl.constexpr):
    """Which rows of these groups are tokens, and not the last one again. (groups, GROUP)"""
    within = rows - tl.load(start_ptr + text, mask=there, other=0)
    length = tl.load(length_ptr + text, mask=there, other=0)
    return (within[:, None] + tl.arange(0, GROUP)[None, :]) < length[:, None]


# Scans over the groups of a tile, whose texts ascend: of a group and those before it that are of the same text.


@triton.jit
def _first_largest(text, value, place, next_text, next_value, next_place):
    stays = (text == next_text) & (value >= next_value)
    return next_text, tl.where(stays, value, next_value), tl.where(stays, place, next_place)


@triton.jit
def _largest(text, value, next_text, next_value):
    return next_text, tl.where((text == next_text) & (value >= next_value), value, next_value)


@triton.jit
def _total(text, value, next_text, next_value):
    return next_text, tl.where(text == next_text, value + next_value, next_value)


@triton.jit
def _in_order(bits):
    """Bits of numbers of either sign, as integers in the numbers' order, with NaN beyond infinity; and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@Launched
@triton.jit
def _pool_kernel(
    text_ptr,  # (R,)
    weight,  # (V, H), or its descriptor
    x,  # (R, H), likewise
    bias_ptr,  # (V,)
    start_ptr,  # (N,)
    length_ptr,  # (N,)
    values_ptr,  # (N + tiles, V): the bits of the largest output, or the sum of activated ones
    places_ptr,  # (N + tiles, V): the row of the tile that has it
    R,
    V,
    H,
    weight_row,
    weight_column,
    x_row,
    x_column,
    SUM: tl.constexpr,
    TWICE: tl.constexpr,
    PLACES: tl.constexpr,
    SIGNED: tl.constexpr,
    BIAS: tl.constexpr,
    DESCRIBED: tl.constexpr,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    GROUPS: tl.constexpr = ROWS // GROUP
    column_tiles, row_tiles = tl.cdiv(V, COLUMNS), tl.cdiv(R, ROWS)
    # Flattened, it is one loop with that over the depth: the next tile is read while one is reduced.
    for index in tl.range(tl.program_id(0), column_tiles * row_tiles, tl.num_programs(0), flatten=DESCRIBED):
        column_tile, row_tile = position(index, column_tiles, row_tiles, TOGETHER)
        z = _tile(
            *(weight, x, bias_ptr, column_tile, row_tile, V, R, H, weight_row, weight_column, x_row, x_column),
            *(BIAS, DESCRIBED, COLUMNS, ROWS, DEPTH),
        )
        columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
        inside = columns < V
        rows = row_tile * ROWS + tl.arange(0, GROUPS) * GROUP
        there = rows < R
        text = tl.load(text_ptr + rows, mask=there, other=-1)
        following = tl.load(text_ptr + rows + GROUP, mask=rows + GROUP < R, other=-1)
        is_last = (text != following) | (tl.arange(0, GROUPS) == GROUPS - 1)
        # Of what is positive, the bits are in the order of the numbers, and NaN is beyond infinity.
        if SUM:
            tokens = _there(text, rows, start_ptr, length_ptr, there, GROUP)
            u = tl.reshape(_activated(z, TWICE), (COLUMNS, GROUPS, GROUP))
            of_group = tl.sum(tl.where(tokens[None, :, :], u, 0.0), 2)
        else:
            bits = z.to(tl.int32, bitcast=True)
            if SIGNED:
                bits = _in_order(bits)
            bits = tl.reshape(bits, (COLUMNS, GROUPS, GROUP))
            of_group = tl.max(bits, 2)
            if PLACES:
                within = tl.arange(0, GROUP)[None, None, :]
                place = tl.min(tl.where(bits == of_group[:, :, None], within, GROUP), 2)
                place += tl.arange(0, GROUPS)[None, :] * GROUP
        of_text = tl.broadcast_to(text[None, :], (COLUMNS, GROUPS))
        slot = (text + row_tile).to(tl.int64)[None, :] * V + columns[:, None]
        stored = inside[:, None] & (is_last & there)[None, :]
        if PLACES:
            _, best, place = tl.associative_scan((of_text, of_group, place), 1, _first_largest)
            tl.store(places_ptr + slot, place.to(tl.uint8), mask=stored)
        elif SUM:
            _, best = tl.associative_scan((of_text, of_group), 1, _total)
        else:
            _, best = tl.associative_scan((of_text, of_group), 1, _largest)
        tl.store(values_ptr + slot, best, mask=stored)


@Launched
@triton.jit
def _together_kernel(
    values_ptr,  # (N + tiles, V)
    places_ptr,  # (N + tiles, V)
    start_ptr,  # (N,)
    length_ptr,  # (N,)
    out_ptr,  # (N, V)
    at_ptr,  # (N, V)
    V,
    at_row,
    SUM: tl.constexpr,
    PLACES: tl.constexpr,
    SIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    text = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < V
    start, length = tl.load(start_ptr + text), tl.load(length_ptr + text)
    first, last = start // ROWS, (start + length - 1) // ROWS
    out_ptr += text.to(tl.int64) * V + columns
    at_ptr += text.to(tl.int64) * at_row + columns
    lowest = -0x80000000 if SIGNED else 0
    total = tl.full((BLOCK,), lowest, values_ptr.dtype.element_ty)
    at = tl.zeros((BLOCK,), tl.int32)
    if length > 0:
        for tile in range(first, last + 1):
            slot = (text + tile).to(tl.int64) * V + columns
            value = tl.load(values_ptr + slot, mask=inside, other=0)
            if SUM:
                total += value
            else:
                if PLACES:
                    place = tl.load(places_ptr + slot, mask=inside, other=0).to(tl.int32) + (tile * ROWS - start)
                    at = tl.where(value > total, place, at)
                total = tl.maximum(total, value)
    if SUM:
        tl.store(out_ptr, total, mask=inside)
    else:
        if SIGNED:
            total = _in_order(total)
        tl.store(out_ptr, total.to(tl.float32, bitcast=True), mask=inside)
        if PLACES:
            tl.store(at_ptr, at.to(at_ptr.dtype.element_ty), mask=inside)


def _pooled(
    x: Tensor, weight: Tensor, bias: Tensor | None, of: Texts, places: bool, times: int, signed: bool = False
) -> tuple[Tensor, Tensor | None]:
    """``times``: that log1p is taken before the sum; zero: the largest."""
    (n_rows, depth), columns, n = x.shape, len(weight), len(of.lengths)
    bias = None if bias is None else bias.contiguous()
    rows = ROWS if n_rows > FEW else FEW
    slots = n + cdiv(n_rows, rows), columns
    values = torch.empty(slots, dtype=torch.float32 if times else torch.int32, device=x.device)
    partial = torch.empty(slots, dtype=torch.uint8, device=x.device) if places else values
    out = torch.empty(n, columns, dtype=torch.float32, device=x.device)
    at = room(n, columns, x, of.position_dtype) if places else None
    given, described = sources(weight, x, COLUMNS, rows, DEPTH)
    with on_device(x):
        _pool_kernel[programs(cdiv(columns, COLUMNS), cdiv(n_rows, rows), x.device)](
            *(of.text, *given, weight if bias is None else bias, of.start, of.length, values, partial),
            *(n_rows, columns, depth, *weight.stride(), *x.stride()),
            SUM=times > 0,
            TWICE=times > 1,
            PLACES=places,
            SIGNED=signed,
            BIAS=bias is not None,
            DESCRIBED=described,
            GROUP=GROUP,
            COLUMNS=COLUMNS,
            ROWS=rows,
            DEPTH=DEPTH,
            TOGETHER=TOGETHER,
            num_warps=WARPS,
            num_stages=STAGES,
        )
        _together_kernel[n, cdiv(columns, BLOCK)](
            *(
                values,
                partial,
                of.start,
                of.length,
                out,
                *((out, columns, 1) if at is None else (at, columns, at.stride(0))),
            ),
            SUM=times > 0,
            PLACES=places,
            SIGNED=signed,
            ROWS=rows,
            BLOCK=BLOCK,
            num_warps=4,
        )
    return out, at


def max_pool(
    x: Tensor,  # (R, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    of: Texts,
    keep: bool,
    signed: bool,
) -> tuple[Tensor, Tensor | None]:
    return _pooled(x, weight, bias, of, keep, 0, signed)


def sum_pool(x: Tensor, weight: Tensor, bias: Tensor | None, of: Texts, times: int) -> Tensor:
    return _pooled(x, weight, bias, of, False, times)[0]


# --- the gradient of a sum -------------------------------------------------------------------------------------------


@Launched
@triton.jit
def _slopes_kernel(
    text_ptr,  # (R,), of rows from the first of the chunk on
    weight,  # (V, H), or its descriptor
    x,  # (R, H), likewise
    bias_ptr,  # (V,)
    start_ptr,  # (N,)
    length_ptr,  # (N,)
    upstream_ptr,  # (N, V)
    sums_ptr,  # (row tiles, V), of a tile over its rows
    out,  # (V, R), or its descriptor
    first_row,  # of the chunk
    R,
    V,
    H,
    weight_row,
    weight_column,
    x_row,
    x_column,
    out_row,
    TWICE: tl.constexpr,
    SUMS: tl.constexpr,
    BIAS: tl.constexpr,
    DESCRIBED: tl.constexpr,
    STORE_DESCRIBED: tl.constexpr,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    GROUPS: tl.constexpr = ROWS // GROUP
    column_tiles, row_tiles = tl.cdiv(V, COLUMNS), tl.cdiv(R, ROWS)
    for index in tl.range(tl.program_id(0), column_tiles * row_tiles, tl.num_programs(0), flatten=DESCRIBED):
        column_tile, row_tile = position(index, column_tiles, row_tiles, TOGETHER)
        z = _tile(
            *(weight, x, bias_ptr, column_tile, row_tile, V, R, H, weight_row, weight_column, x_row, x_column),
            *(BIAS, DESCRIBED, COLUMNS, ROWS, DEPTH),
        )
        columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
        inside = columns < V
        rows = row_tile * ROWS + tl.arange(0, GROUPS) * GROUP
        there = rows < R
        text = tl.load(text_ptr + rows, mask=there, other=0)
        tokens = _there(text, first_row + rows, start_ptr, length_ptr, there, GROUP)
        upstream_at = upstream_ptr + text.to(tl.int64)[None, :] * V + columns[:, None]
        upstream = tl.load(upstream_at, mask=inside[:, None] & there[None, :], other=0.0)
        upstream = tl.where(tokens[None, :, :], upstream[:, :, None], 0.0)
        slope = 1.0 + tl.maximum(z, 0.0)
        if TWICE:
            slope *= 1.0 + _activated(z, False)
        dz = tl.where(z <= 0.0, 0.0, tl.reshape(upstream, (COLUMNS, ROWS)) / slope)
        if SUMS:
            tl.store(sums_ptr + row_tile.to(tl.int64) * V + columns, tl.sum(dz, 1), mask=inside)
        if STORE_DESCRIBED:
            left, right = halves(dz, COLUMNS, ROWS)
            out.store([column_tile * COLUMNS, row_tile * ROWS], left.to(out.dtype))
            out.store([column_tile * COLUMNS, row_tile * ROWS + ROWS // 2], right.to(out.dtype))
        else:
            every = row_tile * ROWS + tl.arange(0, ROWS)
            out_ptr = out + columns.to(tl.int64)[:, None] * out_row + every[None, :]
            tl.store(out_ptr, dz.to(out.dtype.element_ty), mask=inside[:, None] & (every < R)[None, :])


def sum_slopes(
    upstream: Tensor,  # (N, V) float32
    x: Tensor,  # (R', H), rows of a chunk
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    of: Texts,
    first: int,
    times: int,
    of_bias: Tensor | None,  # (V,)
) -> Tensor:  # (V, R')
    (n_rows, depth), columns = x.shape, len(weight)
    bias = None if bias is None else bias.contiguous()
    upstream = upstream.contiguous()
    rows = ROWS if n_rows > FEW else FEW
    out = torch.empty(columns, n_rows, dtype=x.dtype, device=x.device)
    sums = upstream if of_bias is None else upstream.new_empty(cdiv(n_rows, rows), columns)
    given, described = sources(weight, x, COLUMNS, rows, DEPTH)
    place, stored = destination(out, COLUMNS, rows)
    with on_device(x):
        _slopes_kernel[programs(cdiv(columns, COLUMNS), cdiv(n_rows, rows), x.device)](
            *(of.text[first:], *given, weight if bias is None else bias, of.start, of.length, upstream, sums, place),
            *(first, n_rows, columns, depth, *weight.stride(), *x.stride(), n_rows),
            TWICE=times > 1,
            SUMS=of_bias is not None,
            BIAS=bias is not None,
            DESCRIBED=described,
            STORE_DESCRIBED=stored,
            GROUP=GROUP,
            COLUMNS=COLUMNS,
            ROWS=rows,
            DEPTH=DEPTH,
            TOGETHER=TOGETHER,
            num_warps=WARPS,
            num_stages=STAGES,
        )
    if of_bias is not None:
        of_bias += sums.sum(0)
    return out


# --- the gradient of the largest -------------------------------------------------------------------------------------


@Launched
@triton.jit
def _mark_kernel(
    g_ptr,  # (N, V) float32
    at_ptr,  # (N, V)
    start_ptr,  # (N,)
    power_ptr,  # ()
    out_ptr,  # (N, V), g times the power, rounded
    of_columns_ptr,  # (column tiles, R): rows of which a tile of columns has an entry
    of_rows_ptr,  # (row tiles, V): columns of which a tile of rows has one
    N,
    V,
    R,
    at_row,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    TEXTS: tl.constexpr,
    MARKED: tl.constexpr,
):
    text = tl.program_id(1) * TEXTS + tl.arange(0, TEXTS)
    columns = tl.program_id(0) * MARKED + tl.arange(0, MARKED)
    here = (text < N)[:, None] & (columns < V)[None, :]
    element = text.to(tl.int64)[:, None] * at_row + columns[None, :]
    g = tl.load(g_ptr + text.to(tl.int64)[:, None] * V + columns[None, :], mask=here, other=0.0)
    tl.store(out_ptr + element, (g * tl.load(power_ptr)).to(out_ptr.dtype.element_ty), mask=here)
    start = tl.load(start_ptr + text, mask=text < N, other=0)
    row = tl.load(at_ptr + element, mask=here, other=0).to(tl.int32) + start[:, None]
    here = here & (g != 0.0)
    one = tl.full((TEXTS, MARKED), 1, tl.uint8)
    if COLUMNS:
        tl.store(of_columns_ptr + (columns // TILE).to(tl.int64)[None, :] * R + row, one, mask=here)
    if ROWS:
        tl.store(of_rows_ptr + (row // TILE).to(tl.int64) * V + columns[None, :], one, mask=here)


@Launched
@triton.jit
def _list_kernel(
    marks_ptr,  # (tiles, S)
    list_ptr,  # (tiles, S), which are marked, in their order
    count_ptr,  # (tiles,)
    S,
    BLOCK: tl.constexpr,
):
    tile = tl.program_id(0)
    marks_ptr += tile.to(tl.int64) * S
    list_ptr += tile.to(tl.int64) * S
    count = tl.full((), 0, tl.int32)
    for first in range(0, S, BLOCK):
        each = first + tl.arange(0, BLOCK)
        marked = tl.load(marks_ptr + each, mask=each < S, other=0).to(tl.int32)
        place = count + tl.cumsum(marked, 0) - 1
        tl.store(list_ptr + place, each, mask=marked != 0)
        count += tl.sum(marked, 0)
    tl.store(count_ptr + tile, count)


@triton.jit
def _listed(list_ptr, first, count, ENTRIES: tl.constexpr):
    """So many of a list, -1 beyond its end."""
    each = first + tl.arange(0, ENTRIES)
    return tl.load(list_ptr + each, mask=each < count, other=-1)


@triton.jit
def _text_of(text_ptr, inner, OF_ROWS: tl.constexpr):
    """Of listed rows; of columns there is none."""
    return inner if OF_ROWS else tl.load(text_ptr + inner, mask=inner >= 0, other=0)


@triton.jit
def _entries(g_ptr, at_ptr, start_ptr, text, other_text, inner, outer, at_row, there, OF_ROWS: tl.constexpr):
    """-> g, its place in the text, and, of listed rows, theirs. Rows of the result are groups where it is of rows."""
    here = there[:, None] & (inner >= 0)[None, :]
    if OF_ROWS:
        element = text.to(tl.int64)[:, None] * at_row + inner[None, :]
        place = inner
    else:
        element = other_text.to(tl.int64)[None, :] * at_row + outer[:, None]
        place = inner - tl.load(start_ptr + other_text)
    return tl.load(g_ptr + element, mask=here, other=0.0), tl.load(at_ptr + element, mask=here, other=-1), place


@Launched
@triton.jit
def _entries_kernel(
    list_ptr,  # (tiles, S), what a tile of the result has entries of: rows, or columns
    count_ptr,  # (tiles,)
    g_ptr,  # (N, V), times the power
    at_ptr,  # (N, V)
    text_ptr,  # (R,)
    start_ptr,  # (N,)
    length_ptr,  # (N,)
    power_ptr,  # ()
    other_ptr,  # (S, H): the input, or the weight
    source_ptr,  # (R,), where rows of the result go
    out_ptr,  # (V, H), or (M, H)
    V,
    R,
    H,
    S,
    at_row,
    other_row,
    other_column,
    out_row,
    OF_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """A tile of the product of a matrix, g where a row is the one of a text and column, and the other operand; of that
    matrix what has an entry in the tile. What it is formed of is read ahead, a step at a time."""
    blocks = tl.cdiv(H, WIDTH)
    tile, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    count = tl.load(count_ptr + tile)
    list_ptr += tile.to(tl.int64) * S
    depth = block * WIDTH + tl.arange(0, WIDTH)
    own = tile * TILE + tl.arange(0, TILE)
    if OF_ROWS:
        GROUPS: tl.constexpr = TILE // GROUP
        groups = tile * TILE + tl.arange(0, GROUPS) * GROUP
        there = groups < R
        text = tl.load(text_ptr + groups, mask=there, other=0)
        places = (groups - tl.load(start_ptr + text))[:, None] + tl.arange(0, GROUP)[None, :]
    else:
        there = own < at_row  # whole vectors; rows of the result beyond V are not stored
        text = own
    inner = _listed(list_ptr, 0, count, ENTRIES)
    other_text = _text_of(text_ptr, inner, OF_ROWS)
    g, at, place = _entries(g_ptr, at_ptr, start_ptr, text, other_text, inner, own, at_row, there, OF_ROWS)
    inner = _listed(list_ptr, ENTRIES, count, ENTRIES)
    other_text = _text_of(text_ptr, inner, OF_ROWS)
    total = tl.zeros((TILE, WIDTH), tl.float32)
    for first in range(0, count, ENTRIES):
        if OF_ROWS:
            a = tl.where(at.to(tl.int32)[:, None, :] == places[:, :, None], g[:, None, :], 0.0)
            a = tl.reshape(a, (TILE, ENTRIES))
        else:
            a = tl.where(at.to(tl.int32) == place[None, :], g, 0.0)
        each = first + tl.arange(0, ENTRIES)
        line = tl.load(list_ptr + each, mask=each < count, other=0)
        other_at = other_ptr + line.to(tl.int64)[:, None] * other_row + depth[None, :] * other_column
        b = tl.load(other_at, mask=(each < count)[:, None] & (depth < H)[None, :], other=0.0)
        total = tl.dot(a, b, total)
        g, at, place = _entries(g_ptr, at_ptr, start_ptr, text, other_text, inner, own, at_row, there, OF_ROWS)
        inner = _listed(list_ptr, first + 2 * ENTRIES, count, ENTRIES)
        other_text = _text_of(text_ptr, inner, OF_ROWS)
    total /= tl.load(power_ptr)
    stored, to = own < V, own.to(tl.int64)
    if OF_ROWS:
        stored = own < R
        of_own = tl.load(text_ptr + own, mask=stored, other=0)
        stored = stored & (own - tl.load(start_ptr + of_own) < tl.load(length_ptr + of_own))
        to = tl.load(source_ptr + own, mask=stored, other=0)
    out_at = out_ptr + to[:, None] * out_row + depth[None, :]
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=stored[:, None] & (depth < H)[None, :])


def max_gradients(
    g: Tensor,  # (N, V) float32
    at: Tensor,  # (N, V)
    x: Tensor,  # (R, H)
    weight: Tensor,  # (V, H)
    of: Texts,
    hidden_out: Tensor | None,  # (M, H), of zeros
    weight_out: Tensor | None,  # (V, H)
) -> None:
    (n, columns), n_rows, device = g.shape, len(x), x.device
    g, power, rounded = g.contiguous(), power_of(g), room(n, columns, x, x.dtype)
    at_row = at.stride(0)
    column_tiles, row_tiles = (
        cdiv(columns, TILE) * (weight_out is not None),
        cdiv(n_rows, TILE) * (hidden_out is not None),
    )
    of_columns = torch.zeros(column_tiles, n_rows, dtype=torch.uint8, device=device)
    of_rows = torch.zeros(row_tiles, columns, dtype=torch.uint8, device=device)
    with on_device(x):
        _mark_kernel[cdiv(columns, MARKED), cdiv(n, TEXTS)](
            *(g, at, of.start, power, rounded, of_columns, of_rows, n, columns, n_rows, at_row),
            COLUMNS=weight_out is not None,
            ROWS=hidden_out is not None,
            TILE=TILE,
            TEXTS=TEXTS,
            MARKED=MARKED,
            num_warps=8,
        )
        if weight_out is not None:
            _products(of_columns, rounded, at, x, power, of, weight_out, of_rows=False)
        if hidden_out is not None:
            _products(of_rows, rounded, at, weight, power, of, hidden_out, of_rows=True)


def _products(
    marks: Tensor,  # (tiles, S)
    g: Tensor,  # (N, V), times the power
    at: Tensor,  # (N, V)
    other: Tensor,  # (S, H)
    power: Tensor,  # ()
    of: Texts,
    out: Tensor,  # (V, H), or (M, H)
    *,
    of_rows: bool,
) -> None:
    (tiles, size), depth = marks.shape, other.shape[1]
    listed = torch.empty(tiles, size, dtype=torch.int32, device=marks.device)
    count = torch.empty(tiles, dtype=torch.int32, device=marks.device)
    _list_kernel[(tiles,)](marks, listed, count, size, BLOCK=LISTED, num_warps=8)
    width = WIDTH if depth > 2 * WIDTH or depth % WIDTH == 0 else min(WIDTH // 2, max(16, next_power_of_2(depth)))
    _entries_kernel[(tiles * cdiv(depth, width),)](
        *(listed, count, g, at, of.text, of.start, of.length, power, other, of.source, out),
        *(g.shape[1], of.bounds[-1], depth, size, at.stride(0), *other.stride(), out.stride(0)),
        OF_ROWS=of_rows,
        GROUP=GROUP,
        TILE=TILE,
        WIDTH=width,
        ENTRIES=ENTRIES,
        num_warps=ENTRY_WARPS,
        num_stages=ENTRY_STAGES,
    )
