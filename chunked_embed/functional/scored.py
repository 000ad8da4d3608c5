"""InfoNCE of scores that are there already: of a similarity that is no product of two embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .. import Projection, checks
from ..checks import POSITIVE
from ..chunking import Chunking
from ..gather import Ranks
from .arguments import shared, widened
from .contrastive import TWO_SIDED, InfoNCE, check_directions, over_blocks, row_scale
from .known import make_ids

FEW_SCORES = 1 << 22  # whose loss is torch's own: chunks of them would be a detour


class ScoredContrast:
    """:func:`.contrastive.info_nce` of scores of this process's queries (N,) with lists of all processes' documents.

    Args:
        queries: Whose first dimension counts this process's queries.
        lists: Documents of a query: its own, and hard negatives.
        processes: Who shares the batch.
        scale, directions, partition_mode, query_ids, document_ids, shared_ids, false_negatives, chunk_size: As there,
            of "query_to_doc", and "doc_to_query" beside it.
    """

    def __init__(
        self,
        queries: Tensor,
        lists: int,
        processes: Ranks,
        *,
        scale: float | Tensor = 1.0,
        directions: Sequence[str] = ("query_to_doc",),
        partition_mode: str = "joint",
        query_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        shared_ids: bool = False,
        false_negatives: Tensor | None = None,
        chunk_size: int | None = None,
    ) -> None:
        self.directions = check_two_sided(directions, partition_mode)
        self.n, self.processes, self.partition_mode = len(queries), processes, partition_mode
        self.chunking = Chunking(chunk_size)
        device = queries.device
        scale = checks.scalar("scale", scale, POSITIVE)
        ids = make_ids(self.n, lists, processes, device, query_ids, document_ids, false_negatives, shared_ids)
        first = processes.offset
        self.rows = {"target": torch.arange(first, first + self.n, device=device), **row_scale(scale, self.n, queries)}
        self.columns = None
        if ids is not None:
            self.rows |= ids.rows()
            self.columns = ids.columns(lists, self.both_ways and processes.alone, processes)
        self.options: dict[str, Any] = {
            "scale": None if isinstance(scale, Tensor) else scale,
            "documents": lists,
            "masked": ids is not None,
            "shared_ids": shared_ids,
        }

    @property
    def both_ways(self) -> bool:
        return len(self.directions) == 2

    def loss(self, scores: Tensor, part: slice | None = None) -> Tensor:  # (rows of the part, lists * M) -> ()
        """The part's share of the mean; both ways there are no parts."""
        scores = widened(scores)
        if self.both_ways and not self.processes.alone:  # where sums over queries are put together
            return self._by_engine({"query_to_doc": scores})
        blocks = {"query_to_doc": scores}
        if self.both_ways:
            blocks["doc_to_query"] = scores[:, : self.n].t()
        if part is None and (scores.numel() > FEW_SCORES or self.chunking.stated):
            return self._by_engine(blocks)
        rows = self.rows if part is None else {name: value[part] for name, value in self.rows.items()}
        by_row = shared(InfoNCE, Chunking(), partition_mode=self.partition_mode, **self.options)
        with torch.autocast(scores.device.type, enabled=False):
            return self.processes.share(by_row.loss_fn(blocks, rows, self.columns).sum() / self.n)

    def _by_engine(self, blocks: dict[str, Tensor]) -> Tensor:
        return over_blocks(
            {name: Projection(block) for name, block in blocks.items()},
            self.directions,
            self.partition_mode,
            self.rows,
            self.columns,
            self.processes,
            self.chunking,
            self.options,
        )


def check_two_sided(directions: Sequence[str], partition_mode: str) -> tuple[str, ...]:
    """Of queries and documents, whose tokens are compared with each other's and with none of their own kind."""
    chosen = check_directions(directions, partition_mode)
    if not TWO_SIDED.issuperset(chosen):
        raise ValueError(f"expected directions among {sorted(TWO_SIDED, reverse=True)}, got {chosen}")
    return chosen


def gather_tokens(processes: Ranks, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:  # (n, T, H), (n, T)
    """Embeddings of tokens and their mask, with the rows of all processes, as wide as the widest of them."""
    if processes.alone:
        return x, mask
    width = torch.tensor([x.shape[1]], device=x.device)
    dist.all_reduce(width, op=dist.ReduceOp.MAX)
    more = int(width) - x.shape[1]
    everywhere, real = processes.gather(F.pad(x, (0, 0, 0, more)), F.pad(mask.to(torch.uint8), (0, more)))
    return everywhere, real.bool()
