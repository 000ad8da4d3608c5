"""One gloo process and two: DDP as TRL's own trainers and as one process with twice the batch; FSDP2 as one process."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("trl")
pytest.importorskip("peft")

import trl_ranks
import trl_sharded
from processes import Outcomes, asked, assert_passed, run_checks, spawn

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="needs torch.distributed with gloo"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore::FutureWarning:trl"),
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
]
SHARDED = [f"{layout}, {kind}" for layout in trl_ranks.LAYOUTS for kind in ("loss", "linear_logps")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("trained")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(trl_ranks.run_trainers, trl_ranks.WORLD, port, str(folder))
    return [torch.load(folder / f"trained-{rank}.pt") for rank in range(trl_ranks.WORLD)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", trl_ranks.KINDS)
def test_ddp_trains_like_trl(kind: str, trained: list[dict[Any, Any]]) -> None:
    for rank in trained:
        theirs, ours = rank[kind, False], rank[kind, True]
        for name, value in theirs["weights"].items():
            torch.testing.assert_close(ours["weights"][name].float(), value, rtol=1e-4, atol=1e-5)
        for name in ("loss", "rewards/chosen", "rewards/margins", "logps/rejected"):
            for expected, found in zip(theirs["logs"][:2], ours["logs"][:2], strict=True):
                assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("kind", trl_ranks.SAMPLED)
def test_ddp_samples_and_trains_like_trl(kind: str, trained: list[dict[Any, Any]]) -> None:
    for rank in trained:
        theirs, ours = rank[kind, False], rank[kind, True]
        for name, value in theirs["weights"].items():
            torch.testing.assert_close(ours["weights"][name], value, rtol=1e-4, atol=1e-5)
        for expected, found in zip(theirs["logs"], ours["logs"], strict=True):
            for name, value in expected.items():
                if not any(part in name for part in ("time", "per_second", "flos", "grad_norm")):
                    assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-5, nan_ok=True), name


@pytest.mark.parametrize("kind", trl_ranks.DROPPING)
def test_rows_that_fill_up_a_batch_are_not_counted(kind: str, trained: list[dict[Any, Any]]) -> None:
    for rank in trained:
        theirs, ours = rank[kind, False]["evaluated"], rank[kind, True]["evaluated"]
        for name in ("eval_loss", "eval_rewards/chosen", "eval_rewards/accuracies", "eval_logps/rejected"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("kind", ["dpo", "online"])
def test_ddp_is_one_process_with_both_batches(kind: str, trained: list[dict[Any, Any]], tmp_path: Path) -> None:
    alone = trl_ranks.train(kind, True, str(tmp_path), 1)
    for rank in trained:
        for name, value in alone["weights"].items():
            torch.testing.assert_close(rank[kind, True]["weights"][name], value, rtol=1e-9, atol=1e-11)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return run_checks(trl_ranks.check_fsdp, SHARDED, trl_ranks.WORLD, tmp_path_factory.mktemp("sharded"))


@pytest.mark.parametrize("name", SHARDED)
def test_fsdp2_is_one_process_with_both_batches(name: str, sharded: Outcomes) -> None:
    assert_passed(name, sharded)


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("name", trl_sharded.NAMES)
@pytest.mark.usefixtures("one_process")
def test_trainers_are_exact_where_fsdp2_casts_outputs(name: str) -> None:
    trl_sharded.check(name, 0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", trl_sharded.SAMPLED)
@pytest.mark.usefixtures("one_process")
def test_what_was_sampled_is_exact_where_fsdp2_casts_outputs(kind: str) -> None:
    trl_sharded.check_sampled(kind, 0)


@pytest.fixture(scope="module")
def sampled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    names = asked(request)
    return run_checks(trl_sharded.check_sampled, names, trl_ranks.WORLD, tmp_path_factory.mktemp("sampled"))


@pytest.mark.slow
@pytest.mark.parametrize("name", trl_sharded.SAMPLED)
def test_what_was_sampled_is_exact_on_two_processes(name: str, sampled: Outcomes) -> None:
    assert_passed(name, sampled)


@pytest.mark.parametrize("checks_logits", [True, False])
@pytest.mark.parametrize("kind", ["dpo", "kto"])
@pytest.mark.usefixtures("one_process")
def test_an_adapter_learns_under_fsdp2(kind: str, checks_logits: bool) -> None:
    trl_sharded.check_adapter(kind, checks_logits)


@pytest.fixture(scope="module")
def cast(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return run_checks(trl_sharded.check, asked(request), trl_ranks.WORLD, tmp_path_factory.mktemp("cast"))


@pytest.mark.slow
@pytest.mark.parametrize("name", trl_sharded.NAMES)
def test_trainers_are_exact_on_two_processes(name: str, cast: Outcomes) -> None:
    assert_passed(name, cast)
