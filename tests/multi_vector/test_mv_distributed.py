"""Two gloo processes against one with the whole batch: losses and gradients, of uneven batches and unlike widths."""

from __future__ import annotations

import mv_ranks
import pytest
import torch.distributed as dist
from processes import Outcomes, asked, assert_passed, run_checks
from st_parts import EXACT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="needs torch.distributed with gloo"),
    pytest.mark.skipif(not EXACT, reason="before 6.2 every mini-batch is a collective, and ranks wait for ever"),
]


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, transformer_dir: str, tmp_path_factory: pytest.TempPathFactory
) -> Outcomes:
    return run_checks(mv_ranks.check, asked(request), mv_ranks.WORLD, tmp_path_factory.mktemp("ranks"), transformer_dir)


@pytest.mark.parametrize("name", mv_ranks.ASKED)
def test_equals_one_process_with_the_whole_batch(name: str, outcomes: Outcomes) -> None:
    assert_passed(name, outcomes)
