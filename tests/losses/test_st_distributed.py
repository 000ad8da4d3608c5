"""Two gloo processes against one with the whole batch: loss and gradients, uneven batches, DDP's two modes."""

from __future__ import annotations

import pytest
import st_ranks
import torch.distributed as dist
from processes import Outcomes, asked, assert_passed, run_checks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="needs torch.distributed with gloo"),
]


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, transformer_dir: str, tmp_path_factory: pytest.TempPathFactory
) -> Outcomes:
    scratch = tmp_path_factory.mktemp("ranks")
    return run_checks(st_ranks.check, asked(request), st_ranks.WORLD, scratch, transformer_dir)


@pytest.mark.parametrize("name", st_ranks.names())
def test_equals_one_process_with_the_whole_batch(name: str, outcomes: Outcomes) -> None:
    assert_passed(name, outcomes)
