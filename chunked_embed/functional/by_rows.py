"""Any function for a similarity: what the engine's products cannot form, by ordinary autograd, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..engine.plan import CPU_CHUNK_BYTES, CUDA_CHUNK_BYTES
from ..engine.types import accumulator_dtype
from .arguments import Rows

Similarity = Callable[[Tensor, Tensor], Tensor]  # (R, D), (V, D) -> (R, V)
COPIES = 8  # of a block, about, while it is worked on


def mean_by_rows(
    loss_fn: Callable[[Rows, Rows], Tensor],  # similarities by block, row arguments -> (R,)
    similarity: Similarity,
    sides: dict[str, tuple[Tensor, Tensor]],  # by block: (N, D) rows, (V, D) candidates
    rows: Rows,
    *,
    chunk_size: int | None,
    max_chunk_bytes: int | None,
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
                    f"a similarity must return a score for every pair: expected shape {expected}, got {tuple(z.shape)}"
                )
            blocks[name] = (z.t() if name in swapped else z).to(accumulator_dtype(z.dtype))
        return loss_fn(blocks, {name: r[start:stop] for name, r in rows.items()}).sum()

    per_row = COPIES * 4 * sum(len(candidates) for _, candidates in sides.values())
    least, _ = CUDA_CHUNK_BYTES if first.is_cuda else CPU_CHUNK_BYTES
    size = chunk_size or max((max_chunk_bytes or least) // per_row, 1)
    n = len(first)
    parts = [checkpoint(part, i, min(i + size, n), use_reentrant=False) for i in range(0, n, size)]
    return torch.stack(parts).sum() / n
