"""InfoNCE, and gathering itself, over two and three gloo processes against one: values, gradients, uneven, DDP."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from unittest import mock

import pytest
import st_contrastive_ranks
import torch
import torch.distributed as dist
from processes import Outcomes, asked, assert_passed, run_checks, spawn

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="needs torch.distributed with gloo"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]


@pytest.fixture(scope="module", params=st_contrastive_ranks.SHARDS)
def outcomes(
    request: pytest.FixtureRequest, transformer_dir: str, tmp_path_factory: pytest.TempPathFactory
) -> Outcomes:
    names, scratch = asked(request, outcomes=request.param), tmp_path_factory.mktemp("ranks")
    return run_checks(st_contrastive_ranks.check, names, request.param, scratch, transformer_dir)


@pytest.mark.parametrize("name", st_contrastive_ranks.names())
def test_equals_one_process_with_the_whole_batch(name: str, outcomes: Outcomes) -> None:
    assert_passed(name, outcomes)


def test_the_trainer_of_two_processes(transformer_dir: str, tmp_path: Path) -> None:
    """As one process with twice the batch."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(st_contrastive_ranks.run_trainer, 2, 2, port, transformer_dir, str(tmp_path))
    ranks = [torch.load(tmp_path / f"trained-{rank}.pt") for rank in range(2)]
    with mock.patch.dict(os.environ):
        for case in st_contrastive_ranks.TRAINED:
            alone = st_contrastive_ranks.train(case, transformer_dir, str(tmp_path), 1)
            start = st_contrastive_ranks.a_model(transformer_dir).state_dict()
            assert any(not torch.equal(alone[name], value) for name, value in start.items())
            for rank in ranks:
                for name, value in alone.items():
                    torch.testing.assert_close(rank[case][name], value, rtol=1e-6, atol=1e-7, msg=f"{case}: {name}")
