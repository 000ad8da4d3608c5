"""The Triton side of `pairwise`: programs of a few rows, which go through their columns. Its plain twins are in
pairwise.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from chunked_embed.kernels._launch import Launched, cdiv, next_power_of_2, on_device

TILE, BLOCK, WARPS = 1024, 256, 4  # elements of a program at a time, and of them of one row


@Launched
@triton.jit
def _scores_kernel(
    a_ptr,  # (N, D)
    a_stride,
    a_step,
    b_ptr,  # (N, D)
    b_stride,
    b_step,
    scores_ptr,  # (N,)
    factors_ptr,  # (3, N)
    N,
    D,
    half,  # of a row, for "angle": an argument, whose alignment Triton sees; else D
    floor,
    NORMS: tl.constexpr,
    ANGLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < N
    a_ptr += row.to(tl.int64)[:, None] * a_stride
    b_ptr += row.to(tl.int64)[:, None] * b_stride
    t = tl.zeros((ROWS, BLOCK), tl.float32)
    aa = tl.zeros((ROWS, BLOCK), tl.float32)
    bb = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, half, BLOCK):
        at = start + tl.arange(0, BLOCK)[None, :]
        mask = inside[:, None] & (at < half)
        a = tl.load(a_ptr + at * a_step, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(b_ptr + at * b_step, mask=mask, other=0.0).to(tl.float32)
        if NORMS:
            aa += a * a
            bb += b * b
        if ANGLE:
            at += half
            mask = inside[:, None] & (at < D)
            a_im = tl.load(a_ptr + at * a_step, mask=mask, other=0.0).to(tl.float32)
            b_im = tl.load(b_ptr + at * b_step, mask=mask, other=0.0).to(tl.float32)
            aa += a_im * a_im
            bb += b_im * b_im
            t += (a * b + a_im * b_im) + (a_im * b - a * b_im)
        else:
            t += a * b
    score = tl.sum(t, 1)
    if NORMS:
        norm_a, norm_b = tl.sqrt_rn(tl.sum(aa, 1)), tl.sqrt_rn(tl.sum(bb, 1))
        of_a = 1.0 / tl.where(norm_a < floor, floor, norm_a)  # not tl.maximum, which drops a NaN
        of_b = 1.0 / tl.where(norm_b < floor, floor, norm_b)
        across = of_a * of_b
        score *= across
        if ANGLE:
            across = tl.where(score < 0.0, -across, tl.where(score == 0.0, 0.0, across))
            score = tl.abs(score)
        tl.store(factors_ptr + row, across, mask=inside)
        tl.store(factors_ptr + N + row, tl.where(norm_a < floor, 0.0, score * of_a * of_a), mask=inside)
        tl.store(factors_ptr + 2 * N + row, tl.where(norm_b < floor, 0.0, score * of_b * of_b), mask=inside)
    tl.store(scores_ptr + row, score, mask=inside)


@Launched
@triton.jit
def _gradients_kernel(
    a_ptr,  # (N, D)
    a_stride,
    a_step,
    b_ptr,  # (N, D)
    b_stride,
    b_step,
    out_a_ptr,  # (N, D), may be a
    out_a_stride,
    out_b_ptr,  # (N, D), may be b
    out_b_stride,
    factors_ptr,  # (3, N)
    upstream_ptr,  # (N,)
    N,
    D,
    half,
    NORMS: tl.constexpr,
    ANGLE: tl.constexpr,
    OF_A: tl.constexpr,
    OF_B: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < N
    across = tl.load(upstream_ptr + row, mask=inside, other=0.0)[:, None]
    along_a, along_b = across, across
    if NORMS:
        along_a = across * tl.load(factors_ptr + N + row, mask=inside, other=0.0)[:, None]
        along_b = across * tl.load(factors_ptr + 2 * N + row, mask=inside, other=0.0)[:, None]
        across *= tl.load(factors_ptr + row, mask=inside, other=0.0)[:, None]
    row = row.to(tl.int64)[:, None]
    a_ptr += row * a_stride
    b_ptr += row * b_stride
    out_a_ptr += row * out_a_stride
    out_b_ptr += row * out_b_stride
    for start in range(0, half, BLOCK):
        at = start + tl.arange(0, BLOCK)[None, :]
        mask = inside[:, None] & (at < half)
        a = tl.load(a_ptr + at * a_step, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(b_ptr + at * b_step, mask=mask, other=0.0).to(tl.float32)
        to_a, to_b = across * b, across * a
        if ANGLE:
            at_im = at + half
            mask_im = inside[:, None] & (at_im < D)
            a_im = tl.load(a_ptr + at_im * a_step, mask=mask_im, other=0.0).to(tl.float32)
            b_im = tl.load(b_ptr + at_im * b_step, mask=mask_im, other=0.0).to(tl.float32)
            to_a, to_b = across * (b - b_im), across * (a + a_im)
            to_a_im, to_b_im = across * (b_im + b), across * (a_im - a)
            if OF_A:
                to_a_im -= along_a * a_im
                tl.store(out_a_ptr + at_im, to_a_im.to(out_a_ptr.dtype.element_ty), mask=mask_im)
            if OF_B:
                to_b_im -= along_b * b_im
                tl.store(out_b_ptr + at_im, to_b_im.to(out_b_ptr.dtype.element_ty), mask=mask_im)
        if NORMS:
            to_a -= along_a * a
            to_b -= along_b * b
        if OF_A:
            tl.store(out_a_ptr + at, to_a.to(out_a_ptr.dtype.element_ty), mask=mask)
        if OF_B:
            tl.store(out_b_ptr + at, to_b.to(out_b_ptr.dtype.element_ty), mask=mask)


def pair_scores(a: Tensor, b: Tensor, similarity: str, floor: float) -> tuple[Tensor, Tensor | None]:
    (n, width), half = a.shape, _half(a, similarity)
    scores = torch.empty(n, device=a.device, dtype=torch.float32)
    factors = None if similarity == "dot" else scores.new_empty(3, n)
    if n:
        launch = _launch(half, similarity)
        with on_device(a):
            _scores_kernel[(cdiv(n, launch["ROWS"]),)](
                *(a, *a.stride(), b, *b.stride(), scores, scores if factors is None else factors),
                *(n, width, half, floor),
                **launch,
            )
    return scores, factors


def pair_gradients_(
    a: Tensor,
    b: Tensor,
    factors: Tensor | None,
    upstream: Tensor,
    similarity: str,
    out_a: Tensor | None,
    out_b: Tensor | None,
) -> None:
    (n, width), half = a.shape, _half(a, similarity)
    if n and not (out_a is None and out_b is None):
        launch = _launch(half, similarity)
        upstream = upstream.float().contiguous()
        to_a, to_b = (x if out is None else out for x, out in ((a, out_a), (b, out_b)))
        with on_device(a):
            _gradients_kernel[(cdiv(n, launch["ROWS"]),)](
                *(a, *a.stride(), b, *b.stride(), to_a, to_a.stride(0), to_b, to_b.stride(0)),
                *(upstream if factors is None else factors, upstream, n, width, half),
                OF_A=out_a is not None,
                OF_B=out_b is not None,
                **launch,
            )


def _launch(half: int, similarity: str) -> dict[str, int | bool]:
    block = min(BLOCK, max(32, next_power_of_2(half)))
    return {
        "NORMS": similarity != "dot",
        "ANGLE": similarity == "angle",
        "ROWS": TILE // block,
        "BLOCK": block,
        "num_warps": WARPS,
        "enable_fp_fusion": True,
    }


def _half(x: Tensor, similarity: str) -> int:
    return (x.shape[1] + 1) // 2 if similarity == "angle" else x.shape[1]
