"""The Triton side of `similarity`. Its plain twins are in similarity.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from chunked_embed.kernels import in_own_rows
from chunked_embed.kernels._launch import Launched, cdiv, next_power_of_2, on_device

# Launches, measured on an H100 at 4096 x 65,536. Threads of a program, and elements of a row that each takes at a time:
# by whether columns have factors, or by the bytes of an output.
CROSS_ENTROPY = {False: (512, 32), True: (1024, 16)}
SIGMOID = {2: (256, 8), 4: (512, 8)}
# Rows at a time and columns of a program, its warps: by both. And at most so many rows of a program.
LOGSUMEXPS = {(2, False): (16, 256, 4), (2, True): (16, 256, 4), (4, False): (16, 256, 4), (4, True): (16, 128, 4)}
LOGSUMEXPS_ROWS = 1024
# Rows of a program, and its threads, each of which takes 16 bytes of every row at a time.
GRADIENTS = 2, 128

# A running maximum starts at a finite number, so that no -inf - -inf appears.
_START = tl.constexpr(-2e38)  # times log2(e) it is finite too
_LOG2E = tl.constexpr(1.4426950408889634)  # exponents are taken to base 2: one instruction
_TINY = tl.constexpr(1e-30)


@triton.jit
def _lanes(GROUPS: tl.constexpr, VECTOR: tl.constexpr):
    """Columns of a step: groups of neighbours, which one load brings to one thread."""
    return tl.arange(0, GROUPS)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]


@triton.jit
def _joined(a, b):
    """(1 + a) (1 + b) - 1"""
    return a + b + a * b


@Launched
@triton.jit
def _cross_entropy_kernel(
    x_ptr,  # (R, V)
    x_stride,
    out_ptr,  # (R, V), may be x, or the first half of its rows
    out_stride,
    target_ptr,  # (R,)
    weight_ptr,  # (R,)
    rows_ptr,  # (R,)
    columns_ptr,  # (V,)
    loss_ptr,  # (R,)
    moment_ptr,  # (R,)
    V,
    GRADIENT: tl.constexpr,
    COLUMNS: tl.constexpr,
    MOMENT: tl.constexpr,
    OWN_ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """One program a row, which it reads twice: the second time from the cache, where the rows of all programs at work
    have room. Neighbours share a running maximum: it costs an exponential.

    A score is rounded once, and the same in both passes (no fused multiply-add), so that the exponentials relative to
    the maximum are exact to float32 whatever its size. The target's own gradient is what the others leave."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    out_ptr += row * out_stride
    factor = tl.load(rows_ptr + row)
    inner = factor * _LOG2E
    target = tl.load(target_ptr + row).to(tl.int32)
    own = tl.load(x_ptr + target).to(tl.float32)
    if COLUMNS:
        own *= tl.load(columns_ptr + target)
    own *= inner
    lanes = _lanes(GROUPS, VECTOR)
    m = tl.full((GROUPS,), _START, tl.float32)
    s = tl.zeros((GROUPS,), tl.float32)
    for start in range(0, V, GROUPS * VECTOR):
        at = start + lanes
        inside = at < V
        y = tl.load(x_ptr + at, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
        if COLUMNS:
            y *= tl.load(columns_ptr + at, mask=inside, other=0.0)
        z = tl.where(inside, y * inner, float("-inf"))
        m_new = tl.maximum(m, tl.max(z, 1))
        s = s * tl.exp2(m - m_new) + tl.sum(tl.exp2(z - m_new[:, None]), 1)
        m = m_new
    top = tl.max(m, 0)
    total = tl.sum(s * tl.exp2(m - top), 0)
    tl.store(loss_ptr + row, (tl.log2(total) + (top - own)) / _LOG2E)
    if GRADIENT:
        weight = tl.load(weight_ptr + row) / total
        factor *= weight
        rest = tl.zeros((GROUPS,), tl.float32)
        moment = tl.zeros((GROUPS,), tl.float32)
        tl.debug_barrier()  # every thread has read the target's output, which one of them is about to overwrite
        for start in range(0, V, GROUPS * VECTOR):
            at = start + lanes
            inside = at < V
            y = tl.load(x_ptr + at, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
            if COLUMNS:
                column = tl.load(columns_ptr + at, mask=inside, other=0.0)
                y *= column
            z = y * inner
            e = tl.where(inside & (at != target), tl.exp2(z - top), 0.0)
            rest += tl.sum(e, 1)
            if MOMENT:
                moment += tl.sum(e * (z - own), 1)
            grad = e * factor
            if COLUMNS:
                grad *= column
            if OWN_ROWS:
                tl.debug_barrier()  # what is written here, other threads have read
            tl.store(out_ptr + at, grad.to(out_ptr.dtype.element_ty), mask=inside)
        grad = -factor * tl.sum(rest, 0)
        if COLUMNS:
            grad *= tl.load(columns_ptr + target)
        tl.debug_barrier()  # after the zero in its place
        tl.store(out_ptr + target, grad.to(out_ptr.dtype.element_ty))
        if MOMENT:
            tl.store(moment_ptr + row, weight * tl.sum(moment, 0) / _LOG2E)


@Launched
@triton.jit
def _sigmoid_kernel(
    x_ptr,  # (R, V)
    x_stride,
    out_ptr,  # (R, V), may be x, or the first half of its rows
    out_stride,
    target_ptr,  # (R,)
    scale_ptr,  # (R,), and so are the rest
    bias_ptr,
    weight_ptr,
    rows_ptr,
    columns_ptr,  # (V,)
    loss_ptr,  # (R,), and so are the rest
    g_scale_ptr,
    g_bias_ptr,
    V,
    GRADIENT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OWN_ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """One pass over a row. The logarithms of neighbours are one logarithm of their product."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    out_ptr += row * out_stride
    scale = tl.load(scale_ptr + row)
    bias = tl.load(bias_ptr + row)
    weight = tl.load(weight_ptr + row)
    factor = 1.0
    if ROWS:
        factor = tl.load(rows_ptr + row)
    inner = scale * factor
    target = tl.load(target_ptr + row).to(tl.int32)
    lanes = _lanes(GROUPS, VECTOR)
    loss = tl.zeros((GROUPS,), tl.float32)
    slope = tl.zeros((GROUPS,), tl.float32)
    moment = tl.zeros((GROUPS,), tl.float32)
    for start in range(0, V, GROUPS * VECTOR):
        at = start + lanes
        inside = at < V
        y = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if COLUMNS:
            column = tl.load(columns_ptr + at, mask=inside, other=0.0, eviction_policy="evict_last")
            y *= column
        own = at == target
        z = y * inner + bias
        z = tl.where(inside, tl.where(own, -z, z), float("-inf"))  # sigmoid and softplus of which are zero
        e = tl.exp2(tl.abs(z) * -_LOG2E)
        product = tl.reduce(e, 1, _joined)  # of 1 + e, less one: small ones keep their digits
        series = product * (1.0 - product * (0.5 - product * (1.0 / 3.0 - product * 0.25)))
        loss += tl.sum(tl.maximum(z, 0.0), 1) + tl.where(product < 0.03, series, tl.log(1.0 + product))
        if GRADIENT:
            sigmoid = tl.where(z >= 0, 1.0, e) / (1.0 + e)
            grad = tl.where(own, -sigmoid, sigmoid)
            slope += tl.sum(grad, 1)
            moment += tl.sum(grad * y, 1)
            grad *= weight * inner
            if COLUMNS:
                grad *= column
            if OWN_ROWS:
                tl.debug_barrier()  # what is written here, other threads have read
            tl.store(out_ptr + at, grad.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(loss_ptr + row, tl.sum(loss, 0))
    if GRADIENT:
        tl.store(g_bias_ptr + row, tl.sum(slope, 0) * weight)
        tl.store(g_scale_ptr + row, tl.sum(moment, 0) * weight * factor)


@Launched
@triton.jit
def _both_logsumexps_kernel(
    x_ptr,  # (R, V)
    x_stride,
    rows_ptr,  # (R,)
    columns_ptr,  # (V,)
    row_ptr,  # (R, column blocks)
    column_ptr,  # (row blocks, V)
    R,
    V,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,  # of a program
    TILE: tl.constexpr,  # of them at a time
    BLOCK: tl.constexpr,  # columns of a program
):
    """Log-sum-exps of a block over its columns and over its rows, in one pass over it and one exponential an output.

    The exponentials are relative to their row's maximum. For the columns they are weighed back, relative to the largest
    of those maxima; a column that is smaller by so much that its sum vanishes is added up again on its own terms.
    """
    block = tl.program_id(0)
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside_columns = at < V
    column = 1.0
    if COLUMNS:
        column = tl.load(columns_ptr + at, mask=inside_columns, other=0.0)[None, :]
    first = tl.program_id(1) * ROWS
    m = tl.full((TILE,), _START, tl.float32)
    s = tl.zeros((TILE, BLOCK), tl.float32)
    for start in range(0, ROWS, TILE):
        rows = first + start + tl.arange(0, TILE)
        inside = (rows < R)[:, None] & inside_columns[None, :]
        x = tl.load(x_ptr + rows.to(tl.int64)[:, None] * x_stride + at[None, :], mask=inside, other=0.0)
        z = x.to(tl.float32) * column * tl.load(rows_ptr + rows, mask=rows < R, other=0.0)[:, None]
        z = tl.where(inside, z, float("-inf"))
        top = tl.maximum(tl.max(z, 1), _START)
        e = tl.exp2((z - top[:, None]) * _LOG2E)
        row_lse = top + tl.log(tl.where(rows < R, tl.sum(e, 1), 1.0))
        tl.store(row_ptr + rows.to(tl.int64) * tl.num_programs(0) + block, row_lse, mask=rows < R)
        m_new = tl.maximum(m, top)
        s = s * tl.exp2((m - m_new) * _LOG2E)[:, None] + e * tl.exp2((top - m_new) * _LOG2E)[:, None]
        m = m_new
    top = tl.max(m, 0)
    total = tl.where(inside_columns, tl.sum(s * tl.exp2((m - top) * _LOG2E)[:, None], 0), 1.0)
    column_lse = top + tl.log(tl.where(total < _TINY, _TINY, total))
    if tl.min(total, 0) < _TINY:
        own = tl.full((TILE, BLOCK), _START, tl.float32)
        s = tl.zeros((TILE, BLOCK), tl.float32)
        for start in range(0, ROWS, TILE):
            rows = first + start + tl.arange(0, TILE)
            inside = (rows < R)[:, None] & inside_columns[None, :]
            x = tl.load(x_ptr + rows.to(tl.int64)[:, None] * x_stride + at[None, :], mask=inside, other=0.0)
            z = x.to(tl.float32) * column * tl.load(rows_ptr + rows, mask=rows < R, other=0.0)[:, None]
            z = tl.where(inside, z, float("-inf"))
            own_new = tl.maximum(own, z)
            s = s * tl.exp2((own - own_new) * _LOG2E) + tl.exp2((z - own_new) * _LOG2E)
            own = own_new
        tops = tl.max(own, 0)
        total = tl.where(inside_columns, tl.sum(s * tl.exp2((own - tops[None, :]) * _LOG2E), 0), 1.0)
        column_lse = tops + tl.log(total)
    tl.store(column_ptr + tl.program_id(1).to(tl.int64) * V + at, column_lse, mask=inside_columns)


@Launched
@triton.jit(do_not_specialize=["N", "K"])
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


@Launched
@triton.jit
def _both_gradients_kernel(
    x_ptr,  # (R, V)
    x_stride,
    out_ptr,  # (R, V), may be x, or the first half of its rows where a program takes whole ones
    out_stride,
    target_ptr,  # (R,)
    row_lse_ptr,  # (R,)
    column_lse_ptr,  # (V,)
    g_row_ptr,  # (R,)
    g_column_ptr,  # (V,)
    g_own_ptr,  # (R,)
    rows_ptr,  # (R,)
    columns_ptr,  # (V,)
    moment_ptr,  # (R, programs of a row)
    R,
    V,
    span,  # columns of a program, in order
    COLUMNS: tl.constexpr,
    MOMENT: tl.constexpr,
    OWN_ROWS: tl.constexpr,
    TILE: tl.constexpr,  # rows of a program: what is known of the columns is read once for all
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """A thread takes the same columns of all rows."""
    rows = tl.program_id(0) * TILE + tl.arange(0, TILE)[:, None, None]
    inside_rows = rows < R
    factor = tl.load(rows_ptr + rows, mask=inside_rows, other=0.0)
    target = tl.load(target_ptr + rows, mask=inside_rows, other=-1).to(tl.int32)
    row_lse = tl.load(row_lse_ptr + rows, mask=inside_rows, other=0.0)
    g_row = tl.load(g_row_ptr + rows, mask=inside_rows, other=0.0)
    g_own = tl.load(g_own_ptr + rows, mask=inside_rows, other=0.0)
    x_rows = x_ptr + rows.to(tl.int64) * x_stride
    out_rows = out_ptr + rows.to(tl.int64) * out_stride
    lanes = _lanes(THREADS, VECTOR)[None, :, :]
    first = tl.program_id(1) * span
    moment = tl.zeros((TILE, THREADS), tl.float32)
    for start in range(first, tl.minimum(first + span, V), THREADS * VECTOR):
        at = start + lanes
        inside_columns = at < V
        inside = inside_rows & inside_columns
        column_lse = tl.load(column_lse_ptr + at, mask=inside_columns, other=0.0)
        g_column = tl.load(g_column_ptr + at, mask=inside_columns, other=0.0)
        z = tl.load(x_rows + at, mask=inside, other=0.0).to(tl.float32)
        if COLUMNS:
            column = tl.load(columns_ptr + at, mask=inside_columns, other=0.0)
            z *= column
        z *= factor
        grad = g_row * tl.exp2((z - row_lse) * _LOG2E) + g_column * tl.exp2((z - column_lse) * _LOG2E)
        grad += tl.where(at == target, g_own, 0.0)
        if MOMENT:
            moment += tl.sum(tl.where(inside, grad * z, 0.0), 2)
        grad *= factor
        if COLUMNS:
            grad *= column
        if OWN_ROWS:
            tl.debug_barrier()  # what is written here, other threads have read
        tl.store(out_rows + at, grad.to(out_ptr.dtype.element_ty), mask=inside)
    if MOMENT:
        rows = tl.program_id(0) * TILE + tl.arange(0, TILE)
        at = rows.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        tl.store(moment_ptr + at, tl.sum(moment, 1), mask=rows < R)


def cross_entropy_(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    rows: Tensor,
    columns: Tensor | None,
    moment: bool,
    out: Tensor,
) -> tuple[Tensor, Tensor]:  # the second says nothing unless `moment`
    R, V = x.shape
    loss, moments = torch.empty(2, R, device=x.device, dtype=torch.float32)
    vectors = [target.contiguous(), *_vectors(loss, weight, rows, columns), loss, moments]
    if R:
        with on_device(x):
            _cross_entropy_kernel[(R,)](
                *(x, x.stride(0), out, out.stride(0), *vectors, V),
                GRADIENT=weight is not None,
                COLUMNS=columns is not None,
                MOMENT=moment,
                OWN_ROWS=in_own_rows(x, out),
                **_launch(x, *CROSS_ENTROPY[columns is not None]),
                enable_fp_fusion=False,
            )
    return loss, moments


def sigmoid_pairs_(
    x: Tensor,
    target: Tensor,
    scale: Tensor,
    bias: Tensor,
    weight: Tensor | None,
    rows: Tensor | None,
    columns: Tensor | None,
    out: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    R, V = x.shape
    loss, g_scale, g_bias = torch.empty(3, R, device=x.device, dtype=torch.float32)
    vectors = [target.contiguous(), *_vectors(loss, scale, bias, weight, rows, columns)]
    if R:
        with on_device(x):
            _sigmoid_kernel[(R,)](
                *(x, x.stride(0), out, out.stride(0), *vectors, loss, g_scale, g_bias, V),
                GRADIENT=weight is not None,
                ROWS=rows is not None,
                COLUMNS=columns is not None,
                OWN_ROWS=in_own_rows(x, out),
                **_launch(x, *SIGMOID[x.element_size()]),
                enable_fp_fusion=True,
            )
    return loss, g_scale, g_bias


def both_logsumexps(x: Tensor, rows: Tensor, columns: Tensor | None) -> tuple[Tensor, Tensor]:
    R, V = x.shape
    tile, block, warps = LOGSUMEXPS[x.element_size(), columns is not None]
    per_program = min(LOGSUMEXPS_ROWS, max(tile, next_power_of_2(R)))
    blocks = cdiv(V, block), cdiv(R, per_program)
    parts = torch.empty(R, blocks[0], device=x.device, dtype=torch.float32)
    column_parts = torch.empty(blocks[1], V, device=x.device, dtype=torch.float32)
    if not R:
        return parts.new_empty(0), parts.new_full((V,), -torch.inf)
    with on_device(x):
        _both_logsumexps_kernel[blocks](
            *(x, x.stride(0), *_vectors(parts, rows, columns), parts, column_parts, R, V),
            COLUMNS=columns is not None,
            ROWS=per_program,
            TILE=tile,
            BLOCK=block,
            num_warps=warps,
            enable_fp_fusion=True,
        )
        return _logsumexp(parts), _logsumexp(column_parts.t())


def _logsumexp(x: Tensor) -> Tensor:
    rows, parts = x.shape
    if parts == 1:
        return x.squeeze(1)
    out = torch.empty(rows, device=x.device, dtype=torch.float32)
    block = min(next_power_of_2(parts), 256)
    each = max(1024 // block, 1)
    _logsumexp_kernel[(cdiv(rows, each),)](
        *(x, x.stride(0), x.stride(1), out, rows, parts), ROWS=each, BLOCK=block, num_warps=4, enable_fp_fusion=True
    )
    return out


def both_gradients_(
    x: Tensor,
    target: Tensor,
    lses: tuple[Tensor, Tensor],
    upstream: tuple[Tensor, Tensor, Tensor],
    rows: Tensor,
    columns: Tensor | None,
    moment: bool,
    out: Tensor,
) -> Tensor | None:
    R, V = x.shape
    tile, threads = GRADIENTS
    vector = 16 // x.element_size()
    threads = min(threads, max(32, next_power_of_2(V) // vector))
    block = threads * vector
    own_rows = in_own_rows(x, out)
    span = block * cdiv(V, block) if own_rows else block
    programs = cdiv(R, tile), cdiv(V, span)
    moments = torch.empty(R, programs[1], device=x.device, dtype=torch.float32) if moment else None
    vectors = [target.contiguous(), *_vectors(target, *lses, *upstream, rows, columns, moments)]
    if R:
        with on_device(x):
            _both_gradients_kernel[programs](
                *(x, x.stride(0), out, out.stride(0), *vectors, R, V, span),
                COLUMNS=columns is not None,
                MOMENT=moment,
                OWN_ROWS=own_rows,
                TILE=tile,
                THREADS=threads,
                VECTOR=vector,
                num_warps=threads // 32,
                enable_fp_fusion=True,
            )
    return None if moments is None else moments.sum(1)


def _launch(x: Tensor, threads: int, each: int) -> dict[str, int]:
    vector = min(16 // x.element_size(), each)  # 16 bytes a load
    threads = min(threads, max(32, next_power_of_2(x.shape[1]) // each))
    return {"GROUPS": threads * each // vector, "VECTOR": vector, "num_warps": threads // 32}


def _vectors(unused: Tensor, *given: Tensor | None) -> list[Tensor]:
    """As kernels read them; another pointer for those that they do not."""
    return [unused if x is None else x.float().contiguous() for x in given]
