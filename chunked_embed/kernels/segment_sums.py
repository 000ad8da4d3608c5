"""Sums of values over segments of their rows, in float64 whatever the values are.

A segment's sum depends on its values alone, not on where they lie: the same values in another chunk, or of another
model, have the same sum to the last bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chunked_embed.kernels import available


def segment_sums(values: Tensor, offsets: Tensor, *, kernel: bool = True) -> Tensor:  # (K, R), (S + 1,) -> (K, S)
    """``sum values[:, offsets[s] : offsets[s + 1]]`` for each s; zero for an empty segment."""
    if kernel and values.numel() and available(values.device):
        from chunked_embed.kernels import _triton_segment_sums as kernels

        return kernels.segment_sums(values, offsets)
    return segment_sums_reference(values, offsets)


def segment_sums_reference(values: Tensor, offsets: Tensor) -> Tensor:
    values = values.double()
    if values.is_cuda:  # where several at once are added up by one thread a segment
        return torch.stack([torch.segment_reduce(v, "sum", offsets=offsets, unsafe=True, initial=0) for v in values])
    return torch.segment_reduce(values.t(), "sum", offsets=offsets, unsafe=True, initial=0).t()
