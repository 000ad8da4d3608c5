"""The Triton side of `linear_scores`: a product whose logits never leave the chip. Its plain twin is beside it."""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from chunked_embed.kernels._launch import Launched, cdiv, next_power_of_2, on_device
from chunked_embed.kernels._triton_token_scores import _LOWEST, _transform
from chunked_embed.kernels.token_scores import STATISTICS

# Measured on an H100: 1.9 ms for 2048 x 151,936 x 2048 in bfloat16, where the product alone takes 1.7 (1.9 with its
# float32 outputs written).
ROWS, COLUMNS, DEPTH = 128, 256, 64
TOGETHER = 16  # tiles of rows that share what they read of the weight in the L2 cache
PARTS = 5  # of a tile and row: the maximum, sum e, sum e (z - m), sum e^2 with e = exp(z - m), sum z


@Launched
@triton.jit
def _tiles_kernel(
    target_ptr,  # (R,)
    x,  # (R, H), or its descriptor
    weight,  # (V, H), likewise
    bias_ptr,  # (V,)
    parts_ptr,  # (PARTS, R, tiles)
    own_ptr,  # (R,), the logits of targets
    R,
    V,
    H,
    x_row,
    x_column,
    weight_row,
    weight_column,
    tiles,
    inner,
    outer,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    SQUARES: tl.constexpr,
    MEAN: tl.constexpr,
    BIAS: tl.constexpr,
    DESCRIBED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    # All tiles of a few rows, column by column, then of the next.
    program = tl.program_id(0)
    group = program // (TOGETHER * tiles)
    first_row = group * TOGETHER
    height = tl.minimum(tl.cdiv(R, ROWS) - first_row, TOGETHER)
    within = program - group * TOGETHER * tiles
    row_tile, tile = first_row + within % height, within // height

    rows, columns = row_tile * ROWS + tl.arange(0, ROWS), tile * COLUMNS + tl.arange(0, COLUMNS)
    there, inside = rows < R, columns < V
    z = tl.zeros((ROWS, COLUMNS), tl.float32)
    if DESCRIBED:
        for k in range(0, H, DEPTH):
            a, b = x.load([row_tile * ROWS, k]), weight.load([tile * COLUMNS, k])
            z = tl.dot(a, b.T, z)
    else:
        depth = tl.arange(0, DEPTH)
        x_ptr = x + tl.where(there, rows, 0).to(tl.int64)[:, None] * x_row + depth[None, :] * x_column
        weight_ptr = weight + tl.where(inside, columns, 0).to(tl.int64)[None, :] * weight_row
        weight_ptr += depth[:, None] * weight_column
        for k in range(0, H, DEPTH):
            a = tl.load(x_ptr, mask=depth[None, :] < H - k, other=0.0)
            b = tl.load(weight_ptr, mask=depth[:, None] < H - k, other=0.0)
            z = tl.dot(a, b, z)
            x_ptr += DEPTH * x_column
            weight_ptr += DEPTH * weight_column
    if BIAS:
        z += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    z, _ = _transform(z, inner, outer, SOFTCAP)

    target = tl.load(target_ptr + rows, mask=there, other=-1).to(tl.int32)
    own = tl.sum(tl.where(columns[None, :] == target[:, None], z, 0.0), 1)
    here = (target >= tile * COLUMNS) & (target < tile * COLUMNS + COLUMNS)
    tl.store(own_ptr + rows, own, mask=there & here)

    parts_ptr += rows.to(tl.int64) * tiles + tile
    line = tl.full((), R, tl.int64) * tiles  # one row is a constant
    if MEAN:
        tl.store(parts_ptr + 4 * line, tl.sum(tl.where(inside[None, :], z, 0.0), 1), mask=there)
    z = tl.where(inside[None, :], z, float("-inf"))
    m = tl.max(z, 1)
    e = tl.exp(z - m[:, None])
    tl.store(parts_ptr, m, mask=there)
    tl.store(parts_ptr + line, tl.sum(e, 1), mask=there)
    if ENTROPY:
        tl.store(parts_ptr + 2 * line, tl.sum(e * tl.maximum(z - m[:, None], _LOWEST), 1), mask=there)
    if SQUARES:
        tl.store(parts_ptr + 3 * line, tl.sum(e * e, 1), mask=there)


@Launched
@triton.jit
def _rows_kernel(
    parts_ptr,  # (PARTS, R, tiles)
    own_ptr,  # (R,)
    stats_ptr,  # (6, R), a line each in the order of STATISTICS
    R,
    V,
    tiles,
    ENTROPY: tl.constexpr,
    SQUARES: tl.constexpr,
    MEAN: tl.constexpr,
    TOP1: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, BLOCK)
    there = tile < tiles
    parts_ptr += row * tiles + tile
    line = tl.full((), R, tl.int64) * tiles  # one row is a constant
    m = tl.load(parts_ptr, mask=there, other=float("-inf"))
    s = tl.load(parts_ptr + line, mask=there, other=0.0)
    top = tl.max(m, 0)
    keep = tl.exp(m - top)
    sum_e = tl.sum(keep * s, 0)
    log_sum = tl.log(sum_e)
    z_target = tl.load(own_ptr + row)

    stats_ptr += row
    tl.store(stats_ptr, z_target - top - log_sum)
    tl.store(stats_ptr + R, top + log_sum)
    if ENTROPY:
        u = tl.load(parts_ptr + 2 * line, mask=there, other=0.0)
        sum_ez = tl.sum(keep * (u + s * tl.maximum(m - top, _LOWEST)), 0)
        tl.store(stats_ptr + 2 * R, log_sum - sum_ez / sum_e)
    if SQUARES:
        q = tl.load(parts_ptr + 3 * line, mask=there, other=0.0)
        tl.store(stats_ptr + 3 * R, tl.log(tl.sum(keep * keep * q, 0)) - 2.0 * log_sum)
    if MEAN:
        tl.store(stats_ptr + 4 * R, tl.sum(tl.load(parts_ptr + 4 * line, mask=there, other=0.0), 0) / V)
    if TOP1:
        tl.store(stats_ptr + 5 * R, (z_target >= top).to(tl.float32))


def linear_statistics(
    x: Tensor,  # (R, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (R,)
    names: tuple[str, ...],
    inner: float,
    outer: float | None,
) -> dict[str, Tensor]:
    (n, depth), columns, target = x.shape, len(weight), target.contiguous()
    stats = torch.empty(len(STATISTICS), n, device=x.device, dtype=torch.float32)
    if n:
        tiles, rows = cdiv(columns, COLUMNS), ROWS if n > 64 else 64
        parts = torch.empty(PARTS, n, tiles, device=x.device, dtype=torch.float32)
        own = torch.zeros(n, device=x.device, dtype=torch.float32)
        wanted = {
            "ENTROPY": "entropy" in names,
            "SQUARES": "log_sum_sq_probs" in names,
            "MEAN": "mean_logits" in names,
        }
        described = _can_be_described(x) and _can_be_described(weight)
        sides = (x, weight)
        if described:
            sides = (
                TensorDescriptor.from_tensor(x, [rows, DEPTH]),
                TensorDescriptor.from_tensor(weight, [COLUMNS, DEPTH]),
            )
        with on_device(x):
            _tiles_kernel[(cdiv(n, rows) * tiles,)](
                *(target, *sides, weight if bias is None else bias, parts, own, n, columns, depth),
                *(*x.stride(), *weight.stride(), tiles, inner, outer or 1.0),
                SOFTCAP=outer is not None,
                BIAS=bias is not None,
                DESCRIBED=described,
                ROWS=rows,
                COLUMNS=COLUMNS,
                DEPTH=DEPTH,
                TOGETHER=TOGETHER,
                num_warps=8,
                num_stages=3,
                **wanted,
            )
            _rows_kernel[(n,)](
                *(parts, own, stats, n, columns, tiles),
                TOP1="is_top1" in names,
                BLOCK=max(32, next_power_of_2(tiles)),
                num_warps=4,
                **wanted,
            )
    return {name: stats[STATISTICS.index(name)] for name in names}


@cache
def _copies_tiles(device: torch.device) -> bool:
    """A Hopper GPU has an engine that reads whole tiles."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def _can_be_described(t: Tensor) -> bool:
    """To that engine."""
    if not _copies_tiles(t.device):
        return False
    return t.stride(1) == 1 and (t.stride(0) * t.element_size()) % 16 == 0 and t.data_ptr() % 16 == 0
