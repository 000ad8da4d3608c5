"""Numbers that change compile nothing anew; ragged batches do not either."""

from __future__ import annotations

import random

import pytest
import torch
from distill_zoo import make
from torch._dynamo.utils import counters

from chunked_embed.engine import compile as cache
from distill import DistillLoss, JSDLoss, KLDivLoss, TAIDLoss


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    """A fresh cache, and a backend that traces but generates no code: what is counted is graphs."""
    torch._dynamo.reset()
    cache.clear()
    counters.clear()
    monkeypatch.setattr(cache, "BACKEND", "eager")
    yield lambda: counters["stats"]["unique_graphs"]
    cache.clear()


def test_numbers_that_change_compile_nothing_anew(graphs):
    x = make(dtype=torch.float32)
    losses = [
        (JSDLoss(0.5, 1.0, 0.5), ("beta", "temperature", "weight_hard", "weight_soft", "student_logit_scale")),
        (TAIDLoss(0.3), ("t", "temperature")),
        (
            DistillLoss([("ce", 0.5), ("skew_kl", 0.4), ("tvd", 0.1)], teacher_softcap=9.0),
            ("skew_kl_skew", "skew_kl_weight", "tvd_weight", "weight_hard", "temperature", "teacher_softcap"),
        ),
    ]
    for n, (loss, names) in enumerate(losses, 1):
        values = set()
        for value in (0.3, 0.6, 0.7, 0.85):
            for name in names:
                setattr(loss, name, value)
            values.add(float(loss(**x).loss.detach()))
        assert len(values) == 4  # and every number counted
        assert graphs() == n


def test_numbers_that_meet_compile_nothing_anew(graphs):
    """One tensor for two equal numbers would be an alias, which a graph is specialised to."""
    x = make(dtype=torch.float32)
    loss = DistillLoss([("ce", 0.5), ("skew_kl", 0.4), ("tvd", 0.1)], temperature=2.0)
    for skew, weight in ((0.1, 0.2), (0.2, 0.2), (0.3, 0.5), (0.5, 0.5), (0.4, 0.4)):
        loss.skew_kl_skew, loss.tvd_weight = skew, weight
        loss(**x)
    assert graphs() == 1


def test_instances_share_a_step(graphs):
    x = make(dtype=torch.float32)
    for beta in (0.1, 0.5, 0.9):
        JSDLoss(beta, temperature=1 + beta)(**x)
    assert graphs() == 1
    JSDLoss(0.0)(**x)  # a formula of its own
    assert graphs() == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", [KLDivLoss, JSDLoss])
@pytest.mark.parametrize("wide", [False, True], ids=["dynamic rows", "fixed sizes"])
def test_ragged_batches(graphs, monkeypatch, kind, wide):
    if wide:
        monkeypatch.setattr("chunked_embed.engine.plan.NARROW", 0)
    loss, counts = kind(weight_hard=0.2, chunk_size=64), []
    for seed, size in enumerate(random.Random(0).choices(range(2, 120), k=30)):
        before = graphs()
        loss.temperature = 1.1 + seed / 10  # one has a graph of its own
        loss(**make(1, size, seed=seed, dtype=torch.float32)).loss.backward()
        counts.append(graphs() - before)
    assert sum(counts) <= 3, counts  # a chunk of a single row is one of them
    assert sum(map(bool, counts)) <= 2, counts
