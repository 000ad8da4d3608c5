"""The Triton side of `linear_scores`: a product whose logits never leave the chip. Its plain twin is beside it.

Logits z are kept in units of log 2 here, so that exponentials are powers of two: one fused multiplication and addition
of an output and `exp2`. Nothing else is fused, so that a kernel with other constants computes the same to the last bit.
"""

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from chunked_embed.kernels._launch import Launched, cdiv, next_power_of_2, on_device
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
from chunked_embed.kernels._triton_token_scores import _LOWEST, _START, _transform
from chunked_embed.kernels.token_scores import STATISTICS

# The quickest of those that were tried on an H100, at 4096 x 128,256 x 2048 in bfloat16: others take 5 to 50% longer.
ROWS, COLUMNS, DEPTH = 128, 256, 64
WARPS, STAGES = 8, 3
TOGETHER = 16  # tiles of rows that share what they read of the weight in the L2 cache

PARTS = 5  # of a tile and row, without the target: the maximum m, sum e, sum e (z - m), sum e^2 with e = 2^(z - m);
# and with it sum z
REACH = 90.0  # a logit may be so many log 2 above the target's before exponentials are relative to the row's maximum

_LN2 = tl.constexpr(0.6931471805599453)
LOG2_E = 1.4426950408889634


@Launched
@triton.jit(do_not_specialize=["anchor_ptr"])
def _own_kernel(
    x_ptr,  # (R, H)
    weight_ptr,  # (V, H)
    bias_ptr,  # (V,)
    target_ptr,  # (R,)
    anchor_ptr,  # (R,), the logits of targets
    H,
    x_row,
    x_column,
    weight_row,
    weight_column,
    inner,
    outer,
    SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row).to(tl.int64)
    depth = tl.arange(0, BLOCK)
    x_ptr += row * x_row + depth * x_column
    weight_ptr += target * weight_row + depth * weight_column
    total = tl.zeros((BLOCK,), tl.float32)
    for k in range(0, H, BLOCK):
        a = tl.load(x_ptr, mask=depth < H - k, other=0.0).to(tl.float32)
        total += a * tl.load(weight_ptr, mask=depth < H - k, other=0.0).to(tl.float32)
        x_ptr += BLOCK * x_column
        weight_ptr += BLOCK * weight_column
    own = tl.sum(total, 0)
    if BIAS:
        own += tl.load(bias_ptr + target).to(tl.float32)
    if SOFTCAP:
        own, _ = _transform(own, inner, outer, SOFTCAP)
    else:
        own *= inner
    tl.store(anchor_ptr + row, own)


@Launched
@triton.jit(do_not_specialize=["anchor_ptr", "at_target_ptr", "R"])
def _tiles_kernel(
    target_ptr,  # (R,)
    x,  # (R, H), or its descriptor
    weight,  # (V, H), likewise
    bias_ptr,  # (V,)
    parts_ptr,  # (PARTS, R, tiles)
    own_ptr,  # (2, R), the logits of targets and the slopes there
    anchor_ptr,  # (R,), what exponentials are relative to
    at_target_ptr,  # (R,), what takes the place of the target's, where it is known
    again_ptr,  # (1 + 2 * row tiles,), how many row tiles are to be formed again, and which
    out,  # (R, V), the exponentials, or its descriptor
    R,
    V,
    H,
    x_row,
    x_column,
    weight_row,
    weight_column,
    out_row,
    tiles,
    inner,
    outer,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    SQUARES: tl.constexpr,
    MEAN: tl.constexpr,
    BIAS: tl.constexpr,
    SUMS: tl.constexpr,
    STORE: tl.constexpr,
    AGAIN: tl.constexpr,
    DESCRIBED: tl.constexpr,
    STORE_DESCRIBED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    TOGETHER: tl.constexpr,
    REACH: tl.constexpr,
):
    row_tiles = tl.cdiv(R, ROWS)
    last = row_tiles * tiles
    if AGAIN:
        last = tl.load(again_ptr) * tiles
    # Not flattened, unlike the loop of similarities: DPO's steps would take a tenth longer.
    for index in range(tl.program_id(0), last, tl.num_programs(0)):
        if AGAIN:
            row_tile, tile = tl.load(again_ptr + 1 + index // tiles), index % tiles
        else:
            row_tile, tile = position(index, row_tiles, tiles, TOGETHER)
        z = product(
            *(x, weight, row_tile, tile, R, V, H, x_row, x_column, weight_row, weight_column),
            *(DESCRIBED, ROWS, COLUMNS, DEPTH),
        )
        rows, columns = row_tile * ROWS + tl.arange(0, ROWS), tile * COLUMNS + tl.arange(0, COLUMNS)
        there, inside = rows < R, columns < V
        if BIAS:
            z += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
        if SOFTCAP:
            z, slope = _transform(z, inner, outer, SOFTCAP)
            slope *= _LN2

        # Few tiles hold a target, or end beyond the columns: the others are spared the comparisons.
        here, is_target = own_columns(target_ptr, rows, tile * COLUMNS, R, COLUMNS)
        special = (tl.max(here.to(tl.int32), 0) != 0) | (tile * COLUMNS + COLUMNS > V)
        if SUMS:
            part_ptr = parts_ptr + rows.to(tl.int64) * tiles + tile
            line = R.to(tl.int64) * tiles
            if MEAN:
                mean = tl.sum(z, 1)  # zero beyond the columns: t(0) = 0
                tl.store(part_ptr + 4 * line, mean if SOFTCAP else mean * inner, mask=there)
            if special:
                own = tl.sum(tl.where(is_target, z, 0.0), 1)
                tl.store(own_ptr + rows, own if SOFTCAP else own * inner, mask=here)
                if STORE and SOFTCAP:
                    tl.store(own_ptr + R + rows, tl.sum(tl.where(is_target, slope, 0.0), 1), mask=here)
                z = tl.where(inside[None, :] & ~is_target, z, float("-inf"))
            m = tl.max(z, 1)
            m = tl.maximum(m if SOFTCAP else m * inner, _START)
            z = _relative(z, m, inner, SOFTCAP)
            e = tl.exp2(z)
            tl.store(part_ptr, m, mask=there)
            tl.store(part_ptr + line, tl.sum(e, 1), mask=there)
            if ENTROPY:
                tl.store(part_ptr + 2 * line, tl.sum(e * tl.maximum(z, _LOWEST), 1), mask=there)
            if SQUARES:
                tl.store(part_ptr + 3 * line, tl.sum(e * e, 1), mask=there)
        if STORE:
            anchor = tl.load(anchor_ptr + rows, mask=there, other=0.0)
            if SUMS:  # the target's is what the others add up to: it is not known yet; rows beyond reach come again
                e *= tl.exp2(tl.minimum(m - anchor, REACH))[:, None]
            else:
                e = tl.exp2(_relative(z, anchor, inner, SOFTCAP))
                if special:
                    at_target = tl.load(at_target_ptr + rows, mask=there, other=0.0)
                    e = tl.where(is_target, at_target[:, None], e)
            if SOFTCAP:
                e *= slope
            if STORE_DESCRIBED:
                left, right = halves(e, ROWS, COLUMNS)
                out.store([row_tile * ROWS, tile * COLUMNS], left.to(out.dtype))
                out.store([row_tile * ROWS, tile * COLUMNS + COLUMNS // 2], right.to(out.dtype))
            else:
                out_ptr = out + rows.to(tl.int64)[:, None] * out_row + columns[None, :]
                tl.store(out_ptr, e.to(out.dtype.element_ty), mask=there[:, None] & inside[None, :])


@triton.jit
def _relative(z, to, inner, SOFTCAP: tl.constexpr):
    if SOFTCAP:
        z -= to[:, None]
    else:
        z = tl.fma(z, tl.full(z.shape, inner, tl.float32), tl.broadcast_to(-to[:, None], z.shape))
    return z


@Launched
@triton.jit(do_not_specialize=["anchor_ptr", "at_target_ptr", "R", "row_tiles"])
def _rows_kernel(
    parts_ptr,  # (PARTS, R, tiles)
    own_ptr,  # (2, R)
    stats_ptr,  # (6, R), a line each in the order of STATISTICS
    target_ptr,  # (R,), and so are the next three
    anchor_ptr,
    at_target_ptr,
    factor_ptr,
    again_ptr,  # (1 + 2 * row tiles,)
    out_ptr,  # (R, V)
    R,
    V,
    out_row,
    tiles,
    row_tiles,
    ENTROPY: tl.constexpr,
    SQUARES: tl.constexpr,
    MEAN: tl.constexpr,
    TOP1: tl.constexpr,
    SOFTCAP: tl.constexpr,
    STORE: tl.constexpr,
    REACH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, BLOCK)
    there = tile < tiles
    parts_ptr += row * tiles + tile
    line = R.to(tl.int64) * tiles
    m = tl.load(parts_ptr, mask=there, other=_START)
    s = tl.load(parts_ptr + line, mask=there, other=0.0)
    own = tl.load(own_ptr + row)
    top = tl.maximum(tl.max(m, 0), own)
    keep = tl.exp2(m - top)
    others = tl.sum(keep * s, 0)
    e_own = tl.exp2(own - top)
    sum_e = others + e_own
    log_sum = tl.log(sum_e)

    stats_ptr += row
    near_one = -log1p(tl.minimum(others, e_own) / tl.maximum(others, e_own))
    tl.store(stats_ptr, tl.where(others < e_own, near_one, (own - top) * _LN2 - log_sum))
    tl.store(stats_ptr + R, top * _LN2 + log_sum)
    if ENTROPY:
        u = tl.load(parts_ptr + 2 * line, mask=there, other=0.0)
        sum_ez = tl.sum(keep * (u + s * tl.maximum(m - top, _LOWEST)), 0) + e_own * tl.maximum(own - top, _LOWEST)
        tl.store(stats_ptr + 2 * R, log_sum - sum_ez / sum_e * _LN2)
    if SQUARES:
        q = tl.load(parts_ptr + 3 * line, mask=there, other=0.0)
        sum_squares = tl.sum(keep * keep * q, 0) + e_own * e_own
        tl.store(stats_ptr + 3 * R, tl.log(sum_squares) - 2.0 * log_sum)
    if MEAN:
        total = tl.sum(tl.load(parts_ptr + 4 * line, mask=there, other=0.0), 0)
        tl.store(stats_ptr + 4 * R, total / V * _LN2)
    if TOP1:
        tl.store(stats_ptr + 5 * R, (own >= top).to(tl.float32))
    if STORE:
        anchor = tl.load(anchor_ptr + row)
        if top - anchor > REACH:
            anchor = top
            tl.store(anchor_ptr + row, anchor)
            row_tile = (row // ROWS).to(tl.int32)
            if tl.atomic_xchg(again_ptr + 1 + row_tiles + row_tile, 1) == 0:
                tl.store(again_ptr + 1 + tl.atomic_add(again_ptr, 1), row_tile)
        shift = tl.exp2(top - anchor)
        at_target = -others * shift
        tl.store(at_target_ptr + row, at_target)
        tl.store(factor_ptr + row, -1.0 / (sum_e * shift))
        if SOFTCAP:
            at_target *= tl.load(own_ptr + R + row)
        tl.store(out_ptr + row * out_row + tl.load(target_ptr + row), at_target.to(out_ptr.dtype.element_ty))


def linear_statistics(
    x: Tensor,  # (R, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (R,)
    names: tuple[str, ...],
    inner: float,
    outer: float | None,
    out: Tensor | None = None,  # (R, V), contiguous columns
    factor: Tensor | None = None,  # (R,), with them
) -> dict[str, Tensor]:
    n, columns, target = len(x), len(weight), target.contiguous()
    bias = None if bias is None else bias.contiguous()
    stats = torch.empty(len(STATISTICS), n, device=x.device, dtype=torch.float32)
    if n:
        tiles, rows = cdiv(columns, COLUMNS), _rows(n)
        row_tiles = cdiv(n, rows)
        parts = torch.empty(PARTS, n, tiles, device=x.device, dtype=torch.float32)
        own = torch.zeros(2, n, device=x.device, dtype=torch.float32)
        wanted = {
            "ENTROPY": "entropy" in names,
            "SQUARES": "log_sum_sq_probs" in names,
            "MEAN": "mean_logits" in names,
        }
        sides = x, weight, bias, target, *_in_units(inner, outer)
        with on_device(x):
            anchor, at_target, again = own[0], own[0], target  # which nothing reads
            if out is not None:
                anchor, at_target = torch.empty(2, n, device=x.device, dtype=torch.float32)
                again = torch.zeros(1 + 2 * row_tiles, device=x.device, dtype=torch.int32)
                _own_kernel[(n,)](
                    *(x, weight, weight if bias is None else bias, target, anchor, x.shape[1]),
                    *(*x.stride(), *weight.stride(), *sides[-2:-1], sides[-1] or 1.0),
                    SOFTCAP=outer is not None,
                    BIAS=bias is not None,
                    BLOCK=min(1024, max(32, next_power_of_2(x.shape[1]))),
                    enable_fp_fusion=False,
                    num_warps=4,
                )
            _tiles(*sides, parts, own, anchor, at_target, again, out, wanted, sums=True)
            _rows_kernel[(n,)](
                *(parts, own, stats, target, anchor, at_target, own if factor is None else factor, again),
                *(parts if out is None else out, n, columns, 1 if out is None else out.stride(0), tiles, row_tiles),
                TOP1="is_top1" in names,
                SOFTCAP=outer is not None,
                STORE=out is not None,
                REACH=REACH,
                ROWS=rows,
                BLOCK=max(32, next_power_of_2(tiles)),
                enable_fp_fusion=False,
                num_warps=4,
                **wanted,
            )
            if out is not None:
                _tiles(*sides, parts, own, anchor, at_target, again, out, {}, sums=False, formed_again=True)
    return {name: stats[STATISTICS.index(name)] for name in names}


def linear_exponentials_(
    x: Tensor,  # (R, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (R,)
    anchor: Tensor,  # (R,)
    at_target: Tensor,  # (R,)
    inner: float,
    outer: float | None,
    out: Tensor,  # (R, V)
) -> None:
    """``exp(z - anchor)``, and at the target what is told, times the slope of a soft cap."""
    if len(x):
        anchor, at_target, target = anchor.contiguous(), at_target.contiguous(), target.contiguous()
        bias = None if bias is None else bias.contiguous()
        sides = x, weight, bias, target, *_in_units(inner, outer)
        with on_device(x):
            _tiles(*sides, anchor, anchor, anchor * LOG2_E, at_target, target, out, {}, sums=False)


def _in_units(inner: float, outer: float | None) -> tuple[float, float | None]:
    return (inner * LOG2_E, None) if outer is None else (inner, outer * LOG2_E)


def _rows(n: int) -> int:
    """Of a tile."""
    return ROWS if n > 64 else 64


def _tiles(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    inner: float,
    outer: float | None,
    parts: Tensor,
    own: Tensor,
    anchor: Tensor,
    at_target: Tensor,
    again: Tensor,
    out: Tensor | None,
    wanted: Mapping[str, bool],
    *,
    sums: bool,
    formed_again: bool = False,
) -> None:
    (n, depth), columns, rows = x.shape, len(weight), _rows(len(x))
    tiles = cdiv(columns, COLUMNS)
    given, described = sources(x, weight, rows, COLUMNS, DEPTH)
    place, out_row, stored = parts, 1, False
    if out is not None:
        out_row = out.stride(0)
        place, stored = destination(out, rows, COLUMNS) if out.dtype == x.dtype else (out, False)
    _tiles_kernel[programs(cdiv(n, rows), tiles, x.device)](
        *(target, *given, weight if bias is None else bias, parts, own, anchor, at_target, again, place),
        *(n, columns, depth, *x.stride(), *weight.stride(), out_row, tiles, inner, outer or 1.0),
        SOFTCAP=outer is not None,
        BIAS=bias is not None,
        SUMS=sums,
        STORE=out is not None,
        AGAIN=formed_again,
        DESCRIBED=described,
        STORE_DESCRIBED=stored,
        ROWS=rows,
        COLUMNS=COLUMNS,
        DEPTH=DEPTH,
        TOGETHER=TOGETHER,
        REACH=REACH,
        num_warps=WARPS,
        num_stages=STAGES - (out is not None and out.element_size() > 2),  # which shared memory has room for
        enable_fp_fusion=False,
        **{"ENTROPY": False, "SQUARES": False, "MEAN": False, **wanted},
    )
