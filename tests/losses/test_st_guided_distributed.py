"""GISTEmbed and the sigmoid pair loss on two gloo processes: loss, gradients, and what learns in the loss itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import st_guided_ranks
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from st_guided_parts import save_guide

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="needs torch.distributed with gloo"),
]


@pytest.fixture(scope="module")
def outcomes(transformer_dir: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str | None]]:
    scratch = tmp_path_factory.mktemp("guided_ranks")
    guide = save_guide(tmp_path_factory.mktemp("guide"))
    mp.spawn(st_guided_ranks.run, args=(transformer_dir, guide, str(scratch)), nprocs=st_guided_ranks.WORLD)
    return [torch.load(Path(scratch) / f"outcome-{rank}.pt") for rank in range(st_guided_ranks.WORLD)]


@pytest.mark.parametrize("name", st_guided_ranks.names())
def test_equals_one_process_with_the_whole_batch(name: str, outcomes: list[dict[str, str | None]]) -> None:
    for rank, outcome in enumerate(outcomes):
        assert outcome[name] is None, f"rank {rank}: {outcome[name]}"
