"""BCO's delta: over steps, saved and restored, cast, left alone by evaluation, and over two processes."""

from __future__ import annotations

import copy
from pathlib import Path

import bco_ranks
import pytest
import torch
import torch.distributed as dist
from preference_zoo import CASES, Batch, Vectors, make_batch
from processes import spawn

import alignment as A

CASE = CASES["bco"]


def rewards(batch: Batch, beta: float = 0.2) -> torch.Tensor:
    x = Vectors(batch)
    return beta * (x.logps - x.ref).detach()


def value(batch: Batch, delta: torch.Tensor) -> torch.Tensor:
    z = rewards(batch) - delta
    return -torch.nn.functional.logsigmoid(torch.where(batch.labels, z, -z)).mean()


def test_delta_is_the_mean_of_all_rewards_so_far() -> None:
    loss, seen = A.BCOLoss(0.2, compiled=False), []
    for step, pairs in enumerate([2, 3, 1]):
        batch = make_batch(pairs, seed=step)
        seen.append(rewards(batch))
        out = CASE.call(loss, batch)
        delta = torch.cat(seen).mean()
        torch.testing.assert_close(out.metrics["delta"], delta)
        torch.testing.assert_close(out.loss.detach(), value(batch, delta))
    assert loss.running_count.item() == 12


def test_evaluation_uses_delta_and_leaves_it() -> None:
    loss = A.BCOLoss(0.2, compiled=False)
    CASE.call(loss, make_batch(2))
    before = copy.deepcopy(loss.state_dict())
    loss.eval()
    batch = make_batch(2, seed=9)
    with torch.no_grad():
        out = CASE.call(loss, batch)
    torch.testing.assert_close(out.loss, value(batch, before["running_mean"]))
    assert loss.state_dict() == before


def test_state_survives_a_checkpoint_and_a_cast() -> None:
    loss, other = A.BCOLoss(0.2, compiled=False), A.BCOLoss(0.2, compiled=False)
    for step in range(3):
        CASE.call(loss, make_batch(2, seed=step))
    loss.to(torch.bfloat16)
    assert loss.running_mean.dtype == loss.running_count.dtype == torch.float64
    other.load_state_dict(loss.state_dict())
    batch = make_batch(2, seed=7)
    torch.testing.assert_close(CASE.call(loss, batch).loss, CASE.call(other, batch).loss, rtol=0, atol=0)
    assert set(loss.state_dict()) == {"running_mean", "running_count"}


def test_sequence_weights() -> None:
    batch, weight = make_batch(2), torch.tensor([1.0, 0.5, 0.0, 2.0], dtype=torch.float64)
    out = CASE.call(A.BCOLoss(0.2, compiled=False), batch, sequence_weight=weight)
    z = rewards(batch) - rewards(batch).mean()
    expected = (-torch.nn.functional.logsigmoid(torch.where(batch.labels, z, -z)) * weight).mean()
    torch.testing.assert_close(out.loss.detach(), expected)


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs torch.distributed with gloo")
def test_two_processes_have_one_delta(tmp_path: Path) -> None:
    spawn(bco_ranks.run, bco_ranks.WORLD, str(tmp_path))
    found = [torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(bco_ranks.WORLD)]
    seen, wanted = [], []
    for step in range(bco_ranks.STEPS):
        seen += [rewards(bco_ranks.batch_of(rank, step)) for rank in range(bco_ranks.WORLD)]
        wanted.append(torch.cat(seen).mean().item())
    for rank, outcome in enumerate(found):
        assert outcome["deltas"] == pytest.approx(wanted, rel=1e-12)
        own = [
            value(bco_ranks.batch_of(rank, step), torch.tensor(delta, dtype=torch.float64))
            for step, delta in enumerate(wanted)
        ]
        assert outcome["losses"] == pytest.approx([v.item() for v in own], rel=1e-9)
        assert outcome["state"]["running_count"].item() == len(torch.cat(seen))
