"""The Triton side of `similarity`. Its plain twins are in similarity.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from chunked_embed.kernels._triton_token_scores import _device

# A running maximum starts at a finite number, so that no -inf - -inf appears.
_START = tl.constexpr(-3.4028234663852886e38)
_LOG2E = tl.constexpr(1.4426950408889634)  # exponents are taken to base 2: one instruction
_TINY = tl.constexpr(1e-30)


@triton.jit
def _times(a, b):
    return a * b


@triton.jit
def _cross_entropy_kernel(
    x_ptr,  # (R, V)
    x_stride,
    out_ptr,  # (R, V), may be x
    out_stride,
    target_ptr,  # (R,)
    weight_ptr,  # (R,)
    loss_ptr,  # (R,)
    V,
    scale,
    GRADIENT: tl.constexpr,
    GROUPS: tl.constexpr,
    EACH: tl.constexpr,
):
    """One program a row, which it reads twice: the second time from the cache, where the rows of two programs a
    multiprocessor have room. EACH neighbours, of one thread, share a running maximum: it costs an exponential."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    out_ptr += row * out_stride
    inner = scale * _LOG2E
    target = tl.load(target_ptr + row).to(tl.int32)
    own = tl.load(x_ptr + target).to(tl.float32) * scale
    lanes = tl.arange(0, GROUPS)[:, None] * EACH + tl.arange(0, EACH)[None, :]
    m = tl.full((GROUPS,), _START, tl.float32)
    s = tl.zeros((GROUPS,), tl.float32)
    for start in range(0, V, GROUPS * EACH):
        columns = start + lanes
        x = tl.load(x_ptr + columns, mask=columns < V, other=float("-inf"), eviction_policy="evict_last")
        z = x.to(tl.float32) * inner
        m_new = tl.maximum(m, tl.max(z, 1))
        s = s * tl.exp2(m - m_new) + tl.sum(tl.exp2(z - m_new[:, None]), 1)
        m = m_new
    top = tl.max(m, 0)
    lse = top + tl.log2(tl.sum(s * tl.exp2(m - top), 0))
    tl.store(loss_ptr + row, lse / _LOG2E - own)
    if GRADIENT:
        weight = tl.load(weight_ptr + row) * scale
        tl.debug_barrier()  # every thread has read the target's output, which one of them is about to overwrite
        for start in range(0, V, GROUPS * EACH):
            columns = start + lanes
            inside = columns < V
            x = tl.load(x_ptr + columns, mask=inside, other=0.0, eviction_policy="evict_first")
            p = tl.exp2(x.to(tl.float32) * inner - lse)
            grad = weight * tl.where(columns == target, p - 1.0, p)
            tl.store(out_ptr + columns, grad.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _sigmoid_kernel(
    x_ptr,  # (R, V)
    x_stride,
    out_ptr,  # (R, V), may be x
    out_stride,
    target_ptr,  # (R,)
    scale_ptr,  # (R,), and so are the rest
    bias_ptr,
    weight_ptr,
    loss_ptr,
    g_scale_ptr,
    g_bias_ptr,
    V,
    GRADIENT: tl.constexpr,
    GROUPS: tl.constexpr,
    EACH: tl.constexpr,
):
    """One pass over a row. The logarithms of EACH neighbours are one logarithm of their product, at most 2^EACH."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    out_ptr += row * out_stride
    scale = tl.load(scale_ptr + row)
    inner = scale * _LOG2E
    bias = tl.load(bias_ptr + row) * _LOG2E
    weight = tl.load(weight_ptr + row)
    target = tl.load(target_ptr + row).to(tl.int32)
    x_own = tl.load(x_ptr + target).to(tl.float32)
    own = x_own * inner + bias
    tl.debug_barrier()  # as above
    lanes = tl.arange(0, GROUPS)[:, None] * EACH + tl.arange(0, EACH)[None, :]
    loss = tl.zeros((GROUPS,), tl.float32)
    slope = tl.zeros((GROUPS,), tl.float32)
    moment = tl.zeros((GROUPS,), tl.float32)
    for start in range(0, V, GROUPS * EACH):
        columns = start + lanes
        inside = columns < V
        x = tl.load(x_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        z = tl.where(inside, x * inner + bias, float("-inf"))  # sigmoid and softplus of which are zero
        e = tl.exp2(-tl.abs(z))
        loss += tl.sum(tl.maximum(z, 0.0), 1) + tl.log2(tl.reduce(1.0 + e, 1, _times))
        if GRADIENT:
            sigmoid = tl.where(z >= 0, 1.0, e) / (1.0 + e)
            slope += tl.sum(sigmoid, 1)
            moment += tl.sum(sigmoid * x, 1)
            grad = tl.where(columns == target, sigmoid - 1.0, sigmoid) * (weight * scale)
            tl.store(out_ptr + columns, grad.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(loss_ptr + row, (tl.sum(loss, 0) - own) / _LOG2E)  # softplus(z) - z is softplus(-z)
    if GRADIENT:
        tl.store(g_bias_ptr + row, (tl.sum(slope, 0) - 1.0) * weight)
        tl.store(g_scale_ptr + row, (tl.sum(moment, 0) - x_own) * weight)


@triton.jit
def _both_logsumexps_kernel(
    x_ptr,  # (R, V)
    x_stride,
    row_ptr,  # (R, column blocks)
    column_ptr,  # (row blocks, V)
    R,
    V,
    scale,
    ROWS: tl.constexpr,  # of a program
    TILE: tl.constexpr,  # of them at a time
    COLUMNS: tl.constexpr,
):
    """Log-sum-exps of a block over its columns and over its rows, in one pass over it and one exponential an output.

    The exponentials are relative to their row's maximum. For the columns they are weighed back, relative to the largest
    of those maxima; a column that is smaller by so much that its sum vanishes is added up again on its own terms.
    """
    block = tl.program_id(0)
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    inside_columns = columns < V
    first = tl.program_id(1) * ROWS
    inner = scale * _LOG2E
    m = tl.full((TILE,), _START, tl.float32)
    s = tl.zeros((TILE, COLUMNS), tl.float32)
    for start in range(0, ROWS, TILE):
        rows = first + start + tl.arange(0, TILE)
        inside = (rows < R)[:, None] & inside_columns[None, :]
        x = tl.load(x_ptr + rows.to(tl.int64)[:, None] * x_stride + columns[None, :], mask=inside, other=float("-inf"))
        z = x.to(tl.float32) * inner
        top = tl.maximum(tl.max(z, 1), _START)
        e = tl.exp2(z - top[:, None])
        row_lse = (top + tl.log2(tl.where(rows < R, tl.sum(e, 1), 1.0))) / _LOG2E
        tl.store(row_ptr + rows.to(tl.int64) * tl.num_programs(0) + block, row_lse, mask=rows < R)
        m_new = tl.maximum(m, top)
        s = s * tl.exp2(m - m_new)[:, None] + e * tl.exp2(top - m_new)[:, None]
        m = m_new
    top = tl.max(m, 0)
    total = tl.where(inside_columns, tl.sum(s * tl.exp2(m - top)[:, None], 0), 1.0)
    column_lse = top + tl.log2(tl.where(total < _TINY, _TINY, total))
    if tl.min(total, 0) < _TINY:
        own = tl.full((TILE, COLUMNS), _START, tl.float32)
        s = tl.zeros((TILE, COLUMNS), tl.float32)
        for start in range(0, ROWS, TILE):
            rows = first + start + tl.arange(0, TILE)
            inside = (rows < R)[:, None] & inside_columns[None, :]
            at = x_ptr + rows.to(tl.int64)[:, None] * x_stride + columns[None, :]
            z = tl.load(at, mask=inside, other=float("-inf")).to(tl.float32) * inner
            own_new = tl.maximum(own, z)
            s = s * tl.exp2(own - own_new) + tl.exp2(z - own_new)
            own = own_new
        tops = tl.max(own, 0)
        total = tl.where(inside_columns, tl.sum(s * tl.exp2(own - tops[None, :]), 0), 1.0)
        column_lse = tops + tl.log2(total)
    at = column_ptr + tl.program_id(1).to(tl.int64) * V + columns
    tl.store(at, column_lse / _LOG2E, mask=inside_columns)


@triton.jit
def _logsumexp_kernel(
    x_ptr,  # (N, K)
    n_stride,
    k_stride,
    out_ptr,  # (N,)
    N,
    K,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Partial log-sum-exps into whole ones."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m = tl.full((ROWS, BLOCK), _START, tl.float32)
    s = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, K, BLOCK):
        parts = start + tl.arange(0, BLOCK)
        inside = (rows < N)[:, None] & (parts < K)[None, :]
        at = x_ptr + rows.to(tl.int64)[:, None] * n_stride + parts.to(tl.int64)[None, :] * k_stride
        x = tl.load(at, mask=inside, other=float("-inf"))
        m_new = tl.maximum(m, x)
        s = s * tl.exp(m - m_new) + tl.exp(x - m_new)
        m = m_new
    top = tl.max(m, 1)
    total = tl.where(rows < N, tl.sum(s * tl.exp(m - top[:, None]), 1), 1.0)
    tl.store(out_ptr + rows, top + tl.log(total), mask=rows < N)


@triton.jit
def _both_gradients_kernel(
    x_ptr,  # (R, V)
    x_stride,
    out_ptr,  # (R, V), may be x
    out_stride,
    target_ptr,  # (R,)
    row_lse_ptr,  # (R,)
    column_lse_ptr,  # (V,)
    g_row_ptr,  # (R,)
    g_column_ptr,  # (V,)
    g_own_ptr,  # (R,)
    V,
    scale,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < V
    inner = scale * _LOG2E
    target = tl.load(target_ptr + row).to(tl.int32)
    row_lse = tl.load(row_lse_ptr + row) * _LOG2E
    column_lse = tl.load(column_lse_ptr + columns, mask=inside, other=0.0) * _LOG2E
    g_column = tl.load(g_column_ptr + columns, mask=inside, other=0.0)
    z = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32) * inner
    grad = tl.load(g_row_ptr + row) * tl.exp2(z - row_lse) + g_column * tl.exp2(z - column_lse)
    grad = scale * (grad + tl.where(columns == target, tl.load(g_own_ptr + row), 0.0))
    tl.store(out_ptr + row * out_stride + columns, grad.to(out_ptr.dtype.element_ty), mask=inside)


def cross_entropy_(x: Tensor, target: Tensor, weight: Tensor | None, scale: float, out: Tensor) -> Tensor:
    rows, columns = x.shape
    loss = torch.empty(rows, device=x.device, dtype=torch.float32)
    target, weight = target.contiguous(), None if weight is None else _vector(weight)
    if rows:
        with _device(x):
            _cross_entropy_kernel[(rows,)](
                *(x, x.stride(0), out, out.stride(0), target, loss if weight is None else weight, loss, columns, scale),
                GRADIENT=weight is not None,
                **_launch(columns, 1024, 16),
            )
    return loss


def sigmoid_pairs_(
    x: Tensor, target: Tensor, scale: Tensor, bias: Tensor, weight: Tensor | None, out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = x.shape
    loss, g_scale, g_bias = torch.empty(3, rows, device=x.device, dtype=torch.float32)
    vectors = [target.contiguous(), _vector(scale), _vector(bias), loss if weight is None else _vector(weight)]
    if rows:
        with _device(x):
            _sigmoid_kernel[(rows,)](
                *(x, x.stride(0), out, out.stride(0), *vectors, loss, g_scale, g_bias, columns),
                GRADIENT=weight is not None,
                **_launch(columns, 256, 8),
            )
    return loss, g_scale, g_bias


def both_logsumexps(x: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape
    size, tile = 256, 16
    per_program = min(1024, max(tile, triton.next_power_of_2(rows)))
    blocks = triton.cdiv(columns, size), triton.cdiv(rows, per_program)
    parts = torch.empty(rows, blocks[0], device=x.device, dtype=torch.float32)
    column_parts = torch.empty(blocks[1], columns, device=x.device, dtype=torch.float32)
    with _device(x):
        _both_logsumexps_kernel[blocks](
            *(x, x.stride(0), parts, column_parts, rows, columns, scale),
            ROWS=per_program,
            TILE=tile,
            COLUMNS=size,
            num_warps=4,
        )
        return _logsumexp(parts), _logsumexp(column_parts.t())


def _logsumexp(x: Tensor) -> Tensor:
    rows, parts = x.shape
    if parts == 1:
        return x.squeeze(1)
    out = torch.empty(rows, device=x.device, dtype=torch.float32)
    block = min(triton.next_power_of_2(parts), 256)
    each = max(1024 // block, 1)
    _logsumexp_kernel[(triton.cdiv(rows, each),)](
        x, x.stride(0), x.stride(1), out, rows, parts, ROWS=each, BLOCK=block, num_warps=4
    )
    return out


def both_gradients_(
    x: Tensor,
    target: Tensor,
    lses: tuple[Tensor, Tensor],
    upstream: tuple[Tensor, Tensor, Tensor],
    scale: float,
    out: Tensor,
) -> None:
    rows, columns = x.shape
    vectors = (target.contiguous(), *map(_vector, lses), *map(_vector, upstream))
    if rows:
        block = min(1024, max(32, triton.next_power_of_2(columns)))
        with _device(x):
            _both_gradients_kernel[(rows, triton.cdiv(columns, block))](
                *(x, x.stride(0), out, out.stride(0), *vectors, columns, scale),
                BLOCK=block,
                num_warps=max(1, block // 256),
            )


def _launch(columns: int, groups: int, each: int) -> dict[str, int]:
    groups = min(groups, max(32, triton.next_power_of_2(columns) // each))
    return {"GROUPS": groups, "EACH": each, "num_warps": groups // 32}


def _vector(x: Tensor) -> Tensor:
    return x.float().contiguous()
