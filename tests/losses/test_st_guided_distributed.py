"""GISTEmbed and the sigmoid pair loss on two gloo processes: loss, gradients, and what learns in the loss itself."""

from __future__ import annotations

import pytest
import st_guided_ranks
import torch.distributed as dist
from processes import Outcomes, asked, assert_passed, run_checks
from st_guided_parts import save_guide

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="needs torch.distributed with gloo"),
]


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, transformer_dir: str, tmp_path_factory: pytest.TempPathFactory
) -> Outcomes:
    guide, scratch = save_guide(tmp_path_factory.mktemp("guide")), tmp_path_factory.mktemp("guided_ranks")
    return run_checks(st_guided_ranks.check, asked(request), st_guided_ranks.WORLD, scratch, transformer_dir, guide)


@pytest.mark.parametrize("name", st_guided_ranks.names())
def test_equals_one_process_with_the_whole_batch(name: str, outcomes: Outcomes) -> None:
    assert_passed(name, outcomes)
