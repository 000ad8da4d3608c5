"""Two gloo processes against one with the whole batch: loss and gradients, uneven batches, DDP's two modes."""

from __future__ import annotations

from pathlib import Path

import pytest
import st_ranks
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="needs torch.distributed with gloo"),
]


@pytest.fixture(scope="module")
def outcomes(transformer_dir: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str | None]]:
    """One pair of processes for all cases: starting them takes longer than running them."""
    scratch = tmp_path_factory.mktemp("ranks")
    mp.spawn(st_ranks.run, args=(transformer_dir, str(scratch)), nprocs=st_ranks.WORLD)
    return [torch.load(Path(scratch) / f"outcome-{rank}.pt") for rank in range(st_ranks.WORLD)]


@pytest.mark.parametrize("name", st_ranks.names())
def test_equals_one_process_with_the_whole_batch(name: str, outcomes: list[dict[str, str | None]]) -> None:
    for rank, outcome in enumerate(outcomes):
        assert outcome[name] is None, f"rank {rank}: {outcome[name]}"
