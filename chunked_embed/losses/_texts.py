"""Ids of texts, from their tokens: equal for equal texts, and for others by a chance of about one in 2^63."""

from __future__ import annotations

import torch
from torch import Tensor

from chunked_embed.losses._bags import is_bag

_MULTIPLIER = 6364136223846793005  # odd, of Knuth's generator: its powers run through all odd residues of their class


@torch.no_grad()
def text_ids(features: list[dict[str, Tensor]]) -> Tensor:  # (N, columns) int64
    return torch.stack([_column_ids(column) for column in features], dim=1)


def _column_ids(column: dict[str, Tensor]) -> Tensor:  # (N,)
    if "input_ids" not in column:
        raise ValueError(f'false_negatives="text" needs tokens ("input_ids") in the inputs, got {sorted(column)}')
    tokens = column["input_ids"]
    if is_bag(column):
        starts = column["offsets"]
        return _by_row(tokens, starts)
    if "cu_seq_lens_q" in column:  # one sequence, which holds all rows
        return _by_row(tokens.flatten(), column["cu_seq_lens_q"][:-1])
    mask = column.get("attention_mask")
    mask = torch.ones_like(tokens) if mask is None else mask.long()
    # Positions count real tokens, so that padding on either side changes nothing.
    return _mixed(((tokens + 1) * _powers(tokens.shape[1], tokens.device)[mask.cumsum(1) - mask] * mask).sum(1))


def _by_row(tokens: Tensor, starts: Tensor) -> Tensor:
    starts = starts.long()
    position = torch.arange(len(tokens), device=tokens.device)
    row = torch.searchsorted(starts, position, right=True) - 1
    longest = int(torch.diff(starts, append=starts.new_tensor([len(tokens)])).max()) if len(tokens) else 1
    values = (tokens + 1) * _powers(max(longest, 1), tokens.device)[position - starts[row]]
    return _mixed(torch.zeros(len(starts), dtype=torch.long, device=tokens.device).index_add_(0, row, values))


def _powers(n: int, device: torch.device) -> Tensor:
    """Of the multiplier, modulo 2^64: a number of its own for every position."""
    powers = torch.full((n,), _MULTIPLIER, dtype=torch.long, device=device)
    return powers.cumprod(0)


def _mixed(sums: Tensor) -> Tensor:
    """Never negative: those are the ids that stand for nothing."""
    return sums & torch.iinfo(torch.long).max
