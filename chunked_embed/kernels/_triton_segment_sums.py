"""The Triton side of `segment_sums`: one program a sum. Its plain twin is in segment_sums.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from chunked_embed.kernels._launch import Launched, on_device

BLOCK = 512  # values at a time


@Launched
@triton.jit
def _sums_kernel(
    values_ptr,  # (K, R)
    stride,
    offsets_ptr,  # (S + 1,)
    out_ptr,  # (K, S)
    S,
    BLOCK: tl.constexpr,
):
    segment, k = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start, stop = tl.load(offsets_ptr + segment), tl.load(offsets_ptr + segment + 1)
    values_ptr += k * stride
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(start, stop, BLOCK):
        at = first + tl.arange(0, BLOCK)
        total += tl.load(values_ptr + at, mask=at < stop, other=0.0).to(tl.float64)
    tl.store(out_ptr + k * S + segment, tl.sum(total, 0))


def segment_sums(values: Tensor, offsets: Tensor) -> Tensor:
    k, segments = len(values), len(offsets) - 1
    out = values.new_empty(k, segments, dtype=torch.float64)
    if segments:
        with on_device(values):
            _sums_kernel[segments, k](values, values.stride(0), offsets, out, segments, BLOCK=BLOCK)
    return out
