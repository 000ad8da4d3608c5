"""Embeddings of mini-batches as their numbers other than zero, and where those stand.

A pooled ReLU hands nothing back where it gave zero. So of an embedding that is zero there, neither the value nor the
gradient is kept between the two passes of gradient caching.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from chunked_embed.losses._compat import SparseAutoEncoder, SparseEncoder, SpladePooling

FULLEST = 0.5
"""Beyond such a share of numbers other than zero, the numbers and their places take more than the embeddings."""


@dataclass(frozen=True, eq=False)
class Places:
    """Of a mini-batch (n, V)."""

    index: Tensor  # (numbers,) into the mini-batch end to end
    rows: int
    width: int

    @staticmethod
    def of(embeddings: Tensor) -> Places | None:  # (n, V)
        """None: most numbers are other than zero."""
        flat = embeddings.detach().reshape(-1)
        index = flat.nonzero().squeeze(1)
        if len(index) > FULLEST * len(flat):
            return None
        dtype = torch.int32 if len(flat) <= torch.iinfo(torch.int32).max else torch.int64
        return Places(index.to(dtype), *embeddings.shape)

    def read(self, embeddings: Tensor) -> Tensor:  # (n, V) -> (numbers,)
        return embeddings.reshape(-1).index_select(0, self.index)

    def write(self, values: Tensor, embeddings: Tensor) -> None:
        """Into zeros, (n, V), in one piece."""
        embeddings.view(-1).index_copy_(0, self.index.long(), values)


@torch.no_grad()
def column(parts: Sequence[Tensor], places: Sequence[Places | None]) -> Tensor:
    """(N, V), of mini-batches as they are, or as numbers of their places."""
    rows = [len(part) if at is None else at.rows for part, at in zip(parts, places)]
    width = parts[0].shape[1] if places[0] is None else places[0].width
    found = parts[0].new_zeros(sum(rows), width)
    for part, at, block in zip(parts, places, found.split(rows)):
        if at is None:
            block.copy_(part)
        else:
            at.write(part, block)
    return found


def rows_of(whole: Tensor, places: Iterable[Places | None], parts: Iterable[Tensor]) -> Iterable[Tensor]:
    """What stands in a column, (N, V), for each of its mini-batches."""
    begin = 0
    for at, part in zip(places, parts):
        end = begin + (len(part) if at is None else at.rows)
        yield whole[begin:end] if at is None else at.read(whole[begin:end])
        begin = end


def keeps_zeros(model: Any) -> bool:
    """Whether no gradient passes a zero of the model's embeddings: they are what a ReLU gave, or nothing learns."""
    inner = model.module if isinstance(model, (DataParallel, DistributedDataParallel)) else model
    inner = getattr(inner, "_orig_mod", inner)  # of a compiled one
    if not isinstance(inner, SparseEncoder) or type(inner).forward is not SparseEncoder.forward:
        return False
    last = list(inner.children())[-1]
    routes = getattr(last, "sub_modules", None)  # of a Router
    ends = [(last, inner)] if routes is None else [(list(route)[-1], route) for route in routes.values()]
    return all(_ends_in_relu(end) or not _learns(whole) for end, whole in ends)


def _ends_in_relu(module: nn.Module) -> bool:
    hooks = any(getattr(module, f"_forward{kind}hooks") for kind in ("_", "_pre_"))
    return type(module) in (SpladePooling, SparseAutoEncoder) and not hooks


def _learns(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
