"""Runs named checks on gloo processes: one set of processes for all of them, since starting it takes longest."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Outcomes = list[dict[str, str | None]]  # of each rank: {name: traceback or None}
LIMIT = timedelta(seconds=120)  # of a collective that somebody else never calls


def run_checks(
    check: Callable[..., None], names: Sequence[str], world: int, scratch: Path, *arguments: str
) -> Outcomes:
    """``check(name, rank, *arguments)``, a module-level function, for all names on every rank."""
    mp.spawn(_run, args=(world, check, names, str(scratch), *arguments), nprocs=world)
    return [torch.load(scratch / f"outcome-{rank}.pt") for rank in range(world)]


def _run(
    rank: int, world: int, check: Callable[..., None], names: Sequence[str], scratch: str, *arguments: str
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{scratch}/store", rank=rank, world_size=world, timeout=LIMIT)
    outcome: dict[str, str | None] = {}
    for name in names:
        try:
            check(name, rank, *arguments)
            outcome[name] = None
        except Exception:
            outcome[name] = traceback.format_exc()
        dist.barrier()
    torch.save(outcome, f"{scratch}/outcome-{rank}.pt")
    gc.collect()  # a DDP model that outlives its group destroys it holding the GIL, for which gloo's thread may wait
    dist.destroy_process_group()


def assert_passed(name: str, outcomes: Outcomes) -> None:
    for rank, outcome in enumerate(outcomes):
        assert outcome[name] is None, f"rank {rank}: {outcome[name]}"
