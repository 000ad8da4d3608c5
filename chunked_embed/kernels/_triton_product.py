"""What kernels that form a product's tiles have in common."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from chunked_embed.kernels._launch import can_be_described, multiprocessors


@triton.jit
def position(index, row_tiles, tiles, TOGETHER: tl.constexpr):
    """-> tile of rows, tile of columns: all columns of a few rows, column by column, then of the next."""
    group = index // (TOGETHER * tiles)
    first_row = group * TOGETHER
    height = tl.minimum(row_tiles - first_row, TOGETHER)
    within = index - group * TOGETHER * tiles
    return first_row + within % height, within // height


@triton.jit
def product(
    x,  # (R, H), or its descriptor
    bank,  # (V, H), likewise
    row_tile,
    tile,
    R,
    V,
    H,
    x_row,
    x_column,
    bank_row,
    bank_column,
    DESCRIBED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """-> (ROWS, COLUMNS), zero beyond the matrix."""
    z = tl.zeros((ROWS, COLUMNS), tl.float32)
    if DESCRIBED:
        for k in range(0, H, DEPTH):
            a, b = x.load([row_tile * ROWS, k]), bank.load([tile * COLUMNS, k])
            z = tl.dot(a, b.T, z)
    else:
        rows, columns = row_tile * ROWS + tl.arange(0, ROWS), tile * COLUMNS + tl.arange(0, COLUMNS)
        there, inside = rows < R, columns < V
        depth = tl.arange(0, DEPTH)
        x_ptr = x + tl.where(there, rows, 0).to(tl.int64)[:, None] * x_row + depth[None, :] * x_column
        bank_ptr = bank + tl.where(inside, columns, 0).to(tl.int64)[None, :] * bank_row + depth[:, None] * bank_column
        for k in range(0, H, DEPTH):
            a = tl.load(x_ptr, mask=(depth[None, :] < H - k) & there[:, None], other=0.0)
            b = tl.load(bank_ptr, mask=(depth[:, None] < H - k) & inside[None, :], other=0.0)
            z = tl.dot(a, b, z)
            x_ptr += DEPTH * x_column
            bank_ptr += DEPTH * bank_column
    return z


@triton.jit
def own_columns(target_ptr, rows, first, R, WIDTH: tl.constexpr):
    """-> which rows have their own column among so many from the first, and which element that is."""
    target = tl.load(target_ptr + rows, mask=rows < R, other=-1).to(tl.int32) - first
    return (target >= 0) & (target < WIDTH), tl.arange(0, WIDTH)[None, :] == target[:, None]


@triton.jit
def halves(z, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile leaves in two: fewer registers and less shared memory."""
    return tl.split(tl.permute(tl.reshape(z, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def log1p(u):
    """Of u in [0, 1], to the last digits: 2 artanh(u / (2 + u))."""
    t = u / (2.0 + u)
    s = t * t
    series = 1.0 / 9 + s * (1.0 / 11 + s * (1.0 / 13 + s * (1.0 / 15 + s * (1.0 / 17))))
    return 2.0 * t * (1.0 + s * (1.0 / 3 + s * (1.0 / 5 + s * (1.0 / 7 + s * series))))


def sources(x: Tensor, bank: Tensor, rows: int, columns: int, depth: int) -> tuple[tuple, bool]:
    """-> what tiles are read from, and whether as wholes."""
    if not (can_be_described(x) and can_be_described(bank)):
        return (x, bank), False
    described = TensorDescriptor.from_tensor(x, [rows, depth]), TensorDescriptor.from_tensor(bank, [columns, depth])
    return described, True


def destination(out: Tensor, rows: int, columns: int) -> tuple[Tensor | TensorDescriptor, bool]:
    """-> where halves of tiles go, and whether as wholes."""
    if not can_be_described(out):
        return out, False
    return TensorDescriptor.from_tensor(out, [rows, columns // 2]), True


def programs(rows: int, columns: int, device: torch.device) -> tuple[int]:
    """For so many tiles: one for each multiprocessor, which takes tile after tile."""
    return (min(rows * columns, multiprocessors(device)),)
