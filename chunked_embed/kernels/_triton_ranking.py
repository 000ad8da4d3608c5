"""The Triton side of `ranking`: three launches behind a sort. Its plain twin is in ranking.py.

The sorted scores are cut into blocks. Running sums within each of them are one kernel; the next adds, where it reads
one, what the other blocks come to, which are few. A sum is held as its largest exponent and what the others are beside
that, so that none of its terms is lost, however far it is from the largest of all.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from chunked_embed.kernels._launch import Launched, cdiv, on_device

BLOCK, WARPS = 1024, 8  # scores of a program
SUMS = 256  # sums of other blocks at a time

_NOTHING = tl.constexpr(-1e300)  # the logarithm of zero: finite, so that no -inf - -inf appears


@triton.jit
def _joined(a, a_rest, b, b_rest):
    """``exp(a) a_rest + exp(b) b_rest``, likewise."""
    less = tl.exp(tl.where(a == b, 0.0, -tl.abs(a - b)))
    return tl.where(a >= b, a, b), tl.where(a >= b, a_rest + b_rest * less, a_rest * less + b_rest)


@triton.jit
def _logaddexp(a, b):
    return tl.where(a >= b, a, b) + tl.log(1.0 + tl.exp(tl.where(a == b, 0.0, -tl.abs(a - b))))


@triton.jit
def _logsumexp(x):
    top = tl.max(x, 0)
    return top + tl.log(tl.sum(tl.exp(x - top), 0))


@triton.jit
def _softplus(x):
    """``log(1 + exp(x))``, with all digits of a small one: ``log(w) / (w - 1)`` is exact where ``w = 1 + u`` is not."""
    u = tl.exp(-tl.abs(x))
    w = 1.0 + u
    return tl.where(x > 0.0, x, 0.0) + tl.where(w == 1.0, u, tl.log(w) * (u / tl.where(w == 1.0, 1.0, w - 1.0)))


@triton.jit
def _running_logsumexp(x, inside):
    x = tl.where(inside, x, _NOTHING)
    top, rest = tl.associative_scan((x, tl.full(x.shape, 1.0, tl.float64)), 0, _joined)
    return top + tl.log(rest)


@triton.jit
def _scores(scores_ptr, stride, order_ptr, scale, at, inside):
    row = tl.load(order_ptr + at, mask=inside, other=0)
    return tl.load(scores_ptr + row * stride, mask=inside, other=0.0).to(tl.float32).to(tl.float64) * scale


@triton.jit
def _first_label(labels_ptr, label, low, high, steps, HIGHER: tl.constexpr):
    """The first in [low, high) that is higher than ``label``, or not lower; else high."""
    for _ in range(steps):
        middle = (low + high) // 2
        between = low < high
        other = tl.load(labels_ptr + middle, mask=between, other=0)
        passed = (other <= label) if HIGHER else (other < label)
        high = tl.where(between & (passed == 0), middle, high)
        low = tl.where(between & passed, middle + 1, low)
    return low


@triton.jit
def _other_blocks(sums_ptr, one, two, N, ABOVE: tl.constexpr, SUMS: tl.constexpr, BLOCK: tl.constexpr):
    """The logsumexps over all blocks above (or below) one of them, and above another."""
    of_one = tl.full((SUMS,), _NOTHING, tl.float64)
    of_two = tl.full((SUMS,), _NOTHING, tl.float64)
    for first in range(0, N, SUMS * BLOCK):
        block = first // BLOCK + tl.arange(0, SUMS)
        start = block * BLOCK
        at = start if ABOVE else tl.minimum(start + BLOCK, N) - 1  # where the running sum has gone through it
        whole = tl.load(sums_ptr + at, mask=start < N, other=_NOTHING)
        of_one = _logaddexp(of_one, tl.where((block > one) if ABOVE else (block < one), whole, _NOTHING))
        of_two = _logaddexp(of_two, tl.where((block > two) if ABOVE else (block < two), whole, _NOTHING))
    return _logsumexp(of_one), _logsumexp(of_two)


@Launched
@triton.jit
def _sums_kernel(
    scores_ptr,  # (N,)
    stride,
    order_ptr,  # (N,)
    scale: tl.float64,
    space_ptr,
    N,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Within each block: log sum exp(-s) from here to its end; log sum exp(s) from its start up to here."""
    start = tl.program_id(0) * BLOCK
    at = start + (BLOCK - 1) - tl.arange(0, BLOCK)
    s = _scores(scores_ptr, stride, order_ptr, scale, at, at < N)
    tl.store(space_ptr + at, _running_logsumexp(-s, at < N), mask=at < N)
    if GRADIENT:
        at = start + tl.arange(0, BLOCK)
        s = _scores(scores_ptr, stride, order_ptr, scale, at, at < N)
        tl.store(space_ptr + N + at, _running_logsumexp(s, at < N), mask=at < N)


@Launched
@triton.jit
def _pairs_kernel(
    scores_ptr,  # (N,)
    stride,
    order_ptr,  # (N,)
    scale: tl.float64,
    labels_ptr,  # (N,), sorted
    space_ptr,
    N,
    steps,
    GRADIENT: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``s_i + above_i``, its logsumexp over each block, and ``below_i - s_i``.

    Of what is read in other blocks, all that lies in one direction is at one place: where the tie ends that crosses the
    end of this block.
    """
    block = tl.program_id(0)
    start = block * BLOCK
    at = start + tl.arange(0, BLOCK)
    inside = at < N
    at = tl.minimum(at, N - 1)
    label = tl.load(labels_ptr + at)
    s = _scores(scores_ptr, stride, order_ptr, scale, at, inside)

    above_ptr, totals_ptr = space_ptr, space_ptr + 4 * N
    place = _first_label(labels_ptr, label, at + 1, tl.zeros_like(at) + N, steps, HIGHER=True)
    elsewhere = place >= start + BLOCK
    other = tl.min(tl.where(elsewhere, place, N), 0) // BLOCK
    own_sum, other_sum = _other_blocks(above_ptr, block, other, N, ABOVE=True, SUMS=SUMS, BLOCK=BLOCK)
    above = _logaddexp(tl.load(above_ptr + tl.minimum(place, N - 1)), tl.where(elsewhere, other_sum, own_sum))
    exponent = s + tl.where(place < N, above, _NOTHING)
    tl.store(totals_ptr + block, _logsumexp(tl.where(inside, exponent, _NOTHING)))
    if GRADIENT:
        tl.store(space_ptr + 2 * N + at, exponent, mask=inside)
        below_ptr = space_ptr + N
        place = _first_label(labels_ptr, label, tl.zeros_like(at), at, steps, HIGHER=False) - 1
        elsewhere = place < start
        other = tl.max(tl.where(elsewhere, place, 0), 0) // BLOCK
        own_sum, other_sum = _other_blocks(below_ptr, block, other, N, ABOVE=False, SUMS=SUMS, BLOCK=BLOCK)
        below = _logaddexp(tl.load(below_ptr + tl.maximum(place, 0)), tl.where(elsewhere, other_sum, own_sum))
        tl.store(space_ptr + 3 * N + at, tl.where(place >= 0, below, _NOTHING) - s, mask=inside)


@Launched
@triton.jit
def _loss_kernel(
    order_ptr,  # (N,)
    scale: tl.float64,
    space_ptr,
    loss_ptr,  # ()
    grad_ptr,  # (N,)
    N,
    GRADIENT: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    total = tl.full((SUMS,), _NOTHING, tl.float64)
    for first in range(0, N, SUMS * BLOCK):
        at = first // BLOCK + tl.arange(0, SUMS)
        total = _logaddexp(total, tl.load(space_ptr + 4 * N + at, mask=at * BLOCK < N, other=_NOTHING))
    loss = _softplus(_logsumexp(total))
    if block == 0:
        tl.store(loss_ptr, loss)
    if GRADIENT:
        at = block * BLOCK + tl.arange(0, BLOCK)
        exponent = tl.load(space_ptr + 2 * N + at, mask=at < N, other=0.0)
        other = tl.load(space_ptr + 3 * N + at, mask=at < N, other=0.0)
        slope = (tl.exp(exponent - loss) - tl.exp(other - loss)) * scale
        row = tl.load(order_ptr + at, mask=at < N, other=0)
        # By way of float32: Triton's interpreter knows no other to bfloat16.
        tl.store(grad_ptr + row, slope.to(tl.float32).to(grad_ptr.dtype.element_ty), mask=at < N)


def cosent(
    scores: Tensor,  # (N,)
    labels: Tensor,  # (N,), sorted
    order: Tensor,  # (N,) int64
    scale: float,
    gradient: bool,
    *,
    block: int = BLOCK,
    warps: int = WARPS,
    sums: int = SUMS,
) -> tuple[Tensor, Tensor | None]:
    n, stride = len(scores), scores.stride(0)
    blocks = cdiv(n, block)
    # Sums above and below, exponents of both, each (N,); and the blocks' totals.
    space = torch.empty(4 * n + blocks, dtype=torch.float64, device=scores.device)
    loss = torch.empty((), dtype=torch.float32, device=scores.device)
    grad = torch.empty(n, dtype=scores.dtype, device=scores.device) if gradient else None
    launch = {"GRADIENT": gradient, "BLOCK": block, "num_warps": warps, "enable_fp_fusion": True}
    with on_device(scores):
        _sums_kernel[(blocks,)](scores, stride, order, scale, space, n, **launch)
        _pairs_kernel[(blocks,)](scores, stride, order, scale, labels, space, n, n.bit_length(), SUMS=sums, **launch)
        programs = (blocks if gradient else 1,)
        _loss_kernel[programs](order, scale, space, loss, loss if grad is None else grad, n, SUMS=sums, **launch)
    return loss, grad
