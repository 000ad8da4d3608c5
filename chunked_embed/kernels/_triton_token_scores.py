"""The Triton side of `token_scores`: one program a row, one pass over it. Its plain twin is in token_scores.py."""

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from chunked_embed.kernels import in_own_rows
from chunked_embed.kernels._launch import Launched, next_power_of_2, on_device
from chunked_embed.kernels.token_scores import STATISTICS

BLOCK, WARPS = 2048, 8  # measured on an H100: 8 elements a thread

# The running maximum starts at a finite number, so that no -inf - -inf appears; exp(_LOWEST) is 0 in float32.
_START = tl.constexpr(-3.4028234663852886e38)
_LOWEST = tl.constexpr(-200.0)


@triton.jit
def _transform(x, inner, outer, SOFTCAP: tl.constexpr):
    """z = t(x) and dz/dx."""
    u = x * inner
    if SOFTCAP:
        # tanh |u| = (1 - e) / (1 + e) with e = exp(-2 |u|), which cannot overflow; 1 - tanh^2 = 4 e / (1 + e)^2
        e = tl.exp(-2.0 * tl.abs(u))
        tanh = (1.0 - e) / (1.0 + e)
        z = outer * tl.where(u < 0, -tanh, tanh)
        slope = inner * outer * 4.0 * e / ((1.0 + e) * (1.0 + e))
    else:
        z = u
        slope = inner
    return z, slope


@Launched
@triton.jit
def _statistics_kernel(
    x_ptr,  # (R, V)
    x_stride,
    target_ptr,  # (R,)
    stats_ptr,  # (6, R), a line each in the order of STATISTICS
    R,
    V,
    inner,
    outer,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    SQUARES: tl.constexpr,
    MEAN: tl.constexpr,
    TOP1: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    # Every lane keeps its own running maximum m and, relative to it, s = sum e, u = sum e (z - m), q = sum e^2 with
    # e = exp(z - m); lanes meet once, after the loop.
    m = tl.full((BLOCK,), _START, tl.float32)
    s = tl.zeros((BLOCK,), tl.float32)
    u = tl.zeros((BLOCK,), tl.float32)
    q = tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < V
        x = tl.load(x_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        z, _ = _transform(x, inner, outer, SOFTCAP)
        if MEAN:
            total += z  # zero outside: t(0) = 0
        z = tl.where(inside, z, float("-inf"))
        m_new = tl.maximum(m, z)
        keep = tl.exp(m - m_new)
        e = tl.exp(z - m_new)
        if ENTROPY:
            u = keep * (u + s * tl.maximum(m - m_new, _LOWEST)) + e * tl.maximum(z - m_new, _LOWEST)
        if SQUARES:
            q = keep * keep * q + e * e
        s = keep * s + e
        m = m_new

    top = tl.max(m, 0)
    keep = tl.exp(m - top)
    sum_e = tl.sum(keep * s, 0)
    log_sum = tl.log(sum_e)

    target = tl.load(target_ptr + row)
    x_target = tl.load(x_ptr + target, mask=(target >= 0) & (target < V), other=0.0).to(tl.float32)
    z_target, _ = _transform(x_target, inner, outer, SOFTCAP)

    stats_ptr += row
    tl.store(stats_ptr, z_target - top - log_sum)
    tl.store(stats_ptr + R, top + log_sum)
    if ENTROPY:
        sum_ez = tl.sum(keep * (u + s * tl.maximum(m - top, _LOWEST)), 0)
        tl.store(stats_ptr + 2 * R, log_sum - sum_ez / sum_e)
    if SQUARES:
        tl.store(stats_ptr + 3 * R, tl.log(tl.sum(keep * keep * q, 0)) - 2.0 * log_sum)
    if MEAN:
        tl.store(stats_ptr + 4 * R, tl.sum(total, 0) / V)
    if TOP1:
        tl.store(stats_ptr + 5 * R, (z_target >= top).to(tl.float32))


@Launched
@triton.jit
def _gradient_kernel(
    x_ptr,  # (R, V)
    x_stride,
    out_ptr,  # (R, V), may be x, or the first half of its rows
    out_stride,
    target_ptr,  # (R,), and so are the rest
    lse_ptr,
    entropy_ptr,
    g_logps_ptr,
    g_lse_ptr,
    g_entropy_ptr,
    V,
    inner,
    outer,
    SOFTCAP: tl.constexpr,
    LOGPS: tl.constexpr,
    LSE: tl.constexpr,
    ENTROPY: tl.constexpr,
    OWN_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    out_ptr += row * out_stride
    lse = tl.load(lse_ptr + row)
    factor = 0.0
    if LSE:
        factor += tl.load(g_lse_ptr + row)
    if LOGPS:
        g_logps = tl.load(g_logps_ptr + row)
        target = tl.load(target_ptr + row).to(tl.int32)  # compared with every column: 32 bits cost half
        factor -= g_logps
    if ENTROPY:
        g_entropy = tl.load(g_entropy_ptr + row)
        factor -= g_entropy * tl.load(entropy_ptr + row)
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < V
        x = tl.load(x_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        z, slope = _transform(x, inner, outer, SOFTCAP)
        log_p = z - lse
        grad = tl.exp(log_p)
        if ENTROPY:
            grad *= factor - g_entropy * tl.maximum(log_p, _LOWEST)
        else:
            grad *= factor
        if LOGPS:
            grad += tl.where(columns == target, g_logps, 0.0)
        if OWN_ROWS:
            tl.debug_barrier()  # what is written here, other threads have read
        tl.store(out_ptr + columns, (grad * slope).to(out_ptr.dtype.element_ty), mask=inside)


def statistics(
    x: Tensor,  # (R, V)
    target: Tensor,  # (R,)
    names: tuple[str, ...],
    inner: float,
    outer: float | None,
    *,
    block: int = BLOCK,
    warps: int = WARPS,
) -> dict[str, Tensor]:
    (rows, columns), target = x.shape, target.contiguous()
    stats = torch.empty(len(STATISTICS), rows, device=x.device, dtype=torch.float32)
    if rows:
        with on_device(x):
            _statistics_kernel[(rows,)](
                *(x, x.stride(0), target, stats, rows, columns, inner, outer or 1.0),
                SOFTCAP=outer is not None,
                ENTROPY="entropy" in names,
                SQUARES="log_sum_sq_probs" in names,
                MEAN="mean_logits" in names,
                TOP1="is_top1" in names,
                **_launch(columns, block, warps),
            )
    return {name: stats[STATISTICS.index(name)] for name in names}


def gradient_(
    x: Tensor,  # (R, V)
    target: Tensor,  # (R,)
    stats: Mapping[str, Tensor],
    upstream: Mapping[str, Tensor],
    inner: float,
    outer: float | None,
    out: Tensor,  # (R, V)
    *,
    block: int = BLOCK,
    warps: int = WARPS,
) -> Tensor:
    (rows, columns), target = x.shape, target.contiguous()
    lse = stats["lse"].float().contiguous()
    entropy = stats["entropy"].float().contiguous() if "entropy" in upstream else lse  # lse where unused: not read
    gradients = {name: gradient.float().contiguous() for name, gradient in upstream.items()}
    if rows:
        with on_device(x):
            _gradient_kernel[(rows,)](
                *(x, x.stride(0), out, out.stride(0), target, lse, entropy),
                *(gradients.get(name, lse) for name in ("logps", "lse", "entropy")),
                *(columns, inner, outer or 1.0),
                SOFTCAP=outer is not None,
                LOGPS="logps" in gradients,
                LSE="lse" in gradients,
                ENTROPY="entropy" in gradients,
                OWN_ROWS=in_own_rows(x, out),
                **_launch(columns, block, warps),
            )
    return out


def _launch(columns: int, block: int, warps: int) -> dict[str, int]:
    block = min(block, max(32, next_power_of_2(columns)))
    # Fusion is named because its default differs between Triton's versions, and 3.9 warns.
    return {"BLOCK": block, "num_warps": min(warps, block // 32), "enable_fp_fusion": True}
