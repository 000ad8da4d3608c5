"""Any function for a similarity: what the engine's products cannot form, by ordinary autograd, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..chunking import Chunking
from ..engine.types import accumulator_dtype
from .arguments import Rows

Similarity = Callable[[Tensor, Tensor], Tensor]  # (R, D), (V, D) -> (R, V)
COPIES = 8  # of a block, about, while it is worked on
CHUNK_BYTES = {"cuda": 1 << 29}
CPU_CHUNK_BYTES = 1 << 27


def mean_by_rows(
    loss_fn: Callable[[Rows, Rows], Tensor],  # similarities by block, row arguments -> (R,)
    similarity: Similarity,
    sides: dict[str, tuple[Tensor, Tensor]],  # by block: (N, D) rows, (V, D) candidates
    rows: Rows,
    chunking: Chunking,
    *,
    swapped: tuple[str, ...] = (),  # blocks whose rows are the similarity's second argument
) -> Tensor:
    """The mean over rows of a row-wise loss, a chunk of rows at a time, each formed again in backward."""
    first = next(iter(sides.values()))[0]

    def part(start: int, stop: int) -> Tensor:
        blocks = {}
        for name, (own, candidates) in sides.items():
            pair = (candidates, own[start:stop]) if name in swapped else (own[start:stop], candidates)
            z, expected = similarity(*pair), (len(pair[0]), len(pair[1]))
            if z.shape != expected:
                raise ValueError(
                    f"expected the similarity to return a score for every pair, {expected}, got {tuple(z.shape)}"
                )
            blocks[name] = (z.t() if name in swapped else z).to(accumulator_dtype(z.dtype))
        return loss_fn(blocks, {name: r[start:stop] for name, r in rows.items()}).sum()

    per_row = COPIES * 4 * sum(len(candidates) for _, candidates in sides.values())
    budget = chunking.max_chunk_bytes or CHUNK_BYTES.get(first.device.type, CPU_CHUNK_BYTES)
    size = chunking.chunk_size or max(budget // per_row, 1)
    n = len(first)
    parts = [checkpoint(part, i, min(i + size, n), use_reentrant=False) for i in range(0, n, size)]
    return torch.stack(parts).sum() / n
