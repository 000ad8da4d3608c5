"""What each of two gloo processes runs: steps of unlike batches, whose running delta counts them all."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from preference_zoo import CASES, Batch, make_batch

import alignment as A

WORLD, STEPS, BETA = 2, 3, 0.2


def batch_of(rank: int, step: int) -> Batch:
    return make_batch(2 + rank, seed=10 * step + rank)


def run(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    loss = A.BCOLoss(BETA, compiled=False)
    deltas, losses = [], []
    for step in range(STEPS):
        out = CASES["bco"].call(loss, batch_of(rank, step))
        deltas.append(out.metrics["delta"].item())
        losses.append(out.loss.item())
    torch.save({"deltas": deltas, "losses": losses, "state": loss.state_dict()}, Path(folder) / f"rank-{rank}.pt")
    dist.destroy_process_group()
