"""Weighted sums of rows in a fixed order: each sum is of its entries as they come, whatever the device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def weighted_sums(
    table: Tensor,  # (R, H)
    rows: Tensor,  # (E,) int64, of the table
    weights: Tensor,  # (E,), of the table's dtype
    bag: Tensor,  # (E,) int64 ascending, the sum that each entry belongs to
    bags: int,
) -> Tensor:  # (bags, H)
    """Of rows of a table, ``bag`` by bag; zero where a bag has none."""
    before = torch.bincount(bag, minlength=bags).cumsum(0)
    offsets = torch.cat([before.new_zeros(1), before])
    return F.embedding_bag(rows, table, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)
