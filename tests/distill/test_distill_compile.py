"""A number that changes compiles once more, and a limit of a formula once; ragged batches do not."""

from __future__ import annotations

import copy
import pickle
import random

import pytest
import torch
from distill_zoo import make
from torch._dynamo.utils import counters

from chunked_embed import Head
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


@pytest.mark.slow
def test_numbers_that_change_compile_once_more(graphs):
    """Constants at first; all that take a second value become arguments."""
    x = make(dtype=torch.float32)
    losses = [
        (JSDLoss(0.5, 1.0, 0.5, compiled=True), ("beta", "temperature", "weight_hard", "weight_soft")),
        (KLDivLoss(compiled=True), ("student_logit_scale", "teacher_logit_scale")),
        (TAIDLoss(0.3, compiled=True), ("t", "temperature")),
        (
            DistillLoss([("ce", 0.5), ("skew_kl", 0.4), ("tvd", 0.1)], teacher_softcap=9.0, compiled=True),
            ("skew_kl_skew", "skew_kl_weight", "tvd_weight", "weight_hard", "temperature", "teacher_softcap"),
        ),
    ]
    for n, (loss, names) in enumerate(losses, 1):
        values = set()
        for value in (0.3, 0.6, 0.7, 0.85):
            for k, name in enumerate(names):
                setattr(loss, name, value + k / 100)
            values.add(float(loss(**x).loss.detach()))
        assert len(values) == 4  # and every number counted
        assert graphs() == 2 * n


def test_numbers_that_meet_compile_nothing_anew(graphs):
    """One tensor for two equal numbers would be an alias, which a graph is specialised to."""
    x = make(dtype=torch.float32)
    loss = DistillLoss([("ce", 0.5), ("skew_kl", 0.4), ("tvd", 0.1)], temperature=2.0, compiled=True)
    counts = []
    for skew, weight in ((0.1, 0.2), (0.2, 0.3), (0.3, 0.3), (0.5, 0.5), (0.4, 0.1)):
        loss.skew_kl_skew, loss.tvd_weight = skew, weight
        loss(**x)
        counts.append(graphs())
    assert counts == [1, 2, 2, 2, 2]


def test_a_limit_is_a_formula_of_its_own(graphs):
    """Exactly the limit's, also where the number had become an argument; and back without a new graph."""
    x = make(dtype=torch.float32)
    loss = JSDLoss(0.5, compiled=True)
    counts = []
    for beta in (0.3, 0.6, 0.7, 0.0, 1.0, 0.4, 0.0, 1.0):
        loss.beta = beta
        value = loss(**x).loss
        counts.append(graphs())
        torch.testing.assert_close(value, JSDLoss(beta, compiled=False)(**x).loss, rtol=1e-6, atol=1e-7)
    assert counts == [1, 2, 2, 3, 4, 4, 4, 4]


def test_heads_of_one_scale_share_a_step(graphs):
    x = make(dtype=torch.float32)
    loss = KLDivLoss(compiled=True)
    parts = [[x[f"{side}_{part}"] for part in ("hidden", "weight", "bias")] for side in ("student", "teacher")]
    for scale in (0.4, 0.4, 1.0, 0.4, 1.0):
        loss(*(Head(*tensors, logit_scale=scale) for tensors in parts), target=x["target"])
    assert graphs() == 2


def test_instances_share_a_step(graphs):
    x = make(dtype=torch.float32)
    for beta in (0.1, 0.5, 0.9):
        JSDLoss(beta, temperature=1 + beta, compiled=True)(**x)
    assert graphs() == 2
    JSDLoss(0.0, compiled=True)(**x)  # a formula of its own
    assert graphs() == 3


@pytest.mark.slow
@pytest.mark.parametrize("again", [copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss)), None])
def test_composites_share_a_step(graphs, again):
    x = make(dtype=torch.float32)
    for weight in (0.1, 0.5, 0.9):
        loss = DistillLoss([("ce", 0.5), ("jsd", weight), (overlap, 0.5)], compiled=True)
        (loss if again is None else again(loss))(**x)
    assert graphs() == 2


def overlap(student, teacher):
    return 1 - torch.minimum(student.softmax(1), teacher.softmax(1)).sum(1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [KLDivLoss, JSDLoss])
@pytest.mark.parametrize("wide", [False, True], ids=["dynamic rows", "fixed sizes"])
def test_ragged_batches(graphs, monkeypatch, kind, wide):
    if wide:
        monkeypatch.setattr("chunked_embed.engine.plan.NARROW", 0)
    loss, counts = kind(weight_hard=0.2, chunk_size=64, compiled=True), []
    for seed, size in enumerate(random.Random(0).choices(range(2, 120), k=30)):
        before = graphs()
        loss.temperature = 1.1 + seed / 10
        loss(**make(1, size, seed=seed, dtype=torch.float32)).loss.backward()
        counts.append(graphs() - before)
    assert sum(counts) <= 6, counts  # two for the temperature; a chunk of a single row has its own
    assert sum(map(bool, counts)) <= 5, counts
