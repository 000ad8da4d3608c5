"""Losses over chosen, rejected and gold completions, beside TRL's own on the same logits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from preference_zoo import Accelerator, Batch, Outputs, Policy, Vectors, make_batch, trl_inputs, trl_metrics
from torch import Tensor

from alignment import PairScores, TPOLoss, TripleLoss
from chunked_embed import Head

EAGER = {"compiled": False}
CASES: dict[str, dict[str, Any]] = {
    "sigmoid": {"beta": 0.2, "alpha": 0.7},
    "smoothed": {"beta": 0.2, "label_smoothing": 0.1},
    "hinge": {"beta": 0.2, "loss_type": "hinge"},
    "ipo": {"beta": 0.2, "loss_type": "ipo"},
    "tpo-l": {"beta": 2.0, "loss_type": "tpo-l", "gamma": 0.3, "label_smoothing": 0.1},
    "without gold": {"beta": 0.2, "alpha": 0.0},
}
NAMES = pytest.mark.parametrize("name", CASES)


def triples(size: int = 4, **options: Any) -> Batch:
    """``3 size`` sequences; an even number of them."""
    return make_batch(3 * size // 2, **options)


def call(loss: TripleLoss, batch: Batch, **options: Any) -> Any:
    return loss(batch.hidden, batch.weight, batch.target, batch.bias, **options)


def trl_tpo(batch: Batch, **options: Any) -> tuple[Tensor, dict[str, float]]:
    from trl.experimental.tpo import TPOTrainer

    numbers = {"beta": 0.01, "loss_type": "sigmoid", "alpha": 1.0, "label_smoothing": 0.0, "gamma": 0.5} | options
    stub = SimpleNamespace(
        tpo_alpha=numbers.pop("alpha"),
        tpo_l_gamma=numbers.pop("gamma"),
        **numbers,
        model=Policy(),
        accelerator=Accelerator(),
        _metrics=trl_metrics(),
        _total_train_tokens=0,
        _tp_size=1,
    )
    logits = F.pad(batch.logits(), (0, 0, 0, 1))
    loss = TPOTrainer._compute_loss(stub, lambda **_: Outputs(logits=logits), trl_inputs(batch), False)
    return loss, {name: values[-1] for name, values in stub._metrics["train"].items()}


def same(ours: Any, theirs: Any, rtol: float = 1e-9, atol: float = 1e-11) -> None:
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


@pytest.mark.parametrize("size", [4, 2])
@NAMES
@pytest.mark.usefixtures("trl")
def test_value_gradients_and_metrics_are_trl_s(name: str, size: int) -> None:
    batch = triples(size, seed=3)
    out = call(TPOLoss(**CASES[name], **EAGER), batch)
    loss, metrics = trl_tpo(batch, **CASES[name])
    same(out.loss, loss)
    for ours, theirs in zip(*(torch.autograd.grad(x, batch.leaves) for x in (out.loss, loss)), strict=True):
        same(ours, theirs)
    assert not any(value.requires_grad for value in out.metrics.values())
    assert {"entropy", "rewards/margins", "logits/chosen", "mean_token_accuracy"} <= metrics.keys()
    for key in metrics.keys() - {"num_tokens"}:
        same(out.metrics[key].double().mean().item(), metrics[key], rtol=1e-6, atol=1e-7)  # some are float32 in TRL


@NAMES
def test_chunks_change_nothing(name: str) -> None:
    batch, loss = triples(4, seed=5), TPOLoss(**CASES[name], **EAGER)
    whole = call(loss, batch)
    wanted = torch.autograd.grad(whole.loss, batch.leaves)
    for chunk_size in (2, 12):  # a triple in several chunks, or one or two in one
        part = call(TPOLoss(**CASES[name], **EAGER, chunk_size=chunk_size), batch)
        same(part.loss, whole.loss, 1e-12)
        for ours, theirs in zip(torch.autograd.grad(part.loss, batch.leaves), wanted, strict=True):
            same(ours, theirs)
        for key, value in whole.metrics.items():
            same(part.metrics[key], value)


@NAMES
@pytest.mark.parametrize("lengths", [[0, 4, 3, 2, 1, 3], [2, 3, 1, 2, 0, 4], [2, 3, 1, 2, 0, 0], [0] * 6], ids=str)
def test_empty_completions_are_finite(name: str, lengths: list[int]) -> None:
    batch = triples(2, lengths=lengths)
    out = call(TPOLoss(**CASES[name], **EAGER), batch)
    assert all(x.isfinite().all() for x in (*torch.autograd.grad(out.loss, batch.leaves), *out.metrics.values()))
    assert bool(out.loss) == any(lengths)


class Gap(TripleLoss):
    """Of one's own: the rest is the engine's."""

    takes_vectors = ("margin",)

    def pair_loss(self, x: PairScores) -> tuple[Tensor, dict[str, Tensor]]:
        gap = x.chosen_mean - x.rejected_mean
        return F.relu(x.given["margin"] - gap) + 0.5 * x.nll, {"gap": gap.detach()}


def test_a_loss_of_ones_own() -> None:
    batch, margin = triples(2), torch.rand(2, dtype=torch.float64, requires_grad=True)
    out = Gap(**EAGER)(Head(batch.hidden, batch.weight, batch.bias), target=batch.target, margin=margin)
    means = Vectors(batch).logps / batch.used.sum(1)
    gold, tokens = Vectors(batch).logps[4:], batch.used[4:].sum()
    expected = F.relu(margin - means[:2] + means[2:4]).mean() - 0.5 * gold.sum() / tokens
    same(out.loss, expected)
    leaves = [*batch.leaves, margin]
    for ours, theirs in zip(*(torch.autograd.grad(x, leaves) for x in (out.loss, expected)), strict=True):
        same(ours, theirs)
    same(out.metrics["gap"], (means[:2] - means[2:4]).detach())
    same(out.means["nll_loss"].double(), (-gold.sum() / tokens).detach(), rtol=1e-6)


def test_numbers_of_a_later_call() -> None:
    """A weight that becomes zero leaves out the gold completions: the same tensors are pairs then."""
    batch, loss = triples(4), TPOLoss(0.2, **EAGER)
    assert loss.completions == 3
    first = call(loss, batch)
    loss.alpha = 0.0
    assert loss.completions == 2
    second = call(loss, batch)
    assert (len(first.metrics["logps/chosen"]), len(second.metrics["logps/chosen"])) == (4, 6)


def refused(b: Batch) -> dict[str, tuple[dict[str, Any], str]]:
    call = {"hidden": b.hidden, "weight": b.weight, "target": b.target}
    return {
        "pairs": ({**call, "hidden": b.hidden[:4], "target": b.target[:4]}, r"triples, \(3B, T, H\): chosen, rejected"),
        "none": ({**call, "hidden": b.hidden[:0], "target": b.target[:0]}, "hidden of triples"),
        "target": ({**call, "target": b.target[:, 1:]}, "target of shape"),
        "vector": ({**call, "margin": torch.zeros(2)}, "arguments that TPOLoss takes, got 'margin'"),
        "reference": ({**call, "ref_logps": torch.zeros(6)}, "arguments that TPOLoss takes, got 'ref_logps'"),
    }


@pytest.mark.parametrize("name", refused(triples(2)))
def test_calls_are_refused(name: str) -> None:
    arguments, message = refused(triples(2))[name]
    with pytest.raises((ValueError, TypeError), match=message):
        TPOLoss(**EAGER)(**arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "exo"}, "loss_type"),
        ({"gamma": 0.3}, 'expected gamma=0.5, which nothing reads without loss_type="tpo-l"'),
        ({"loss_type": "ipo", "label_smoothing": 0.1}, "expected label_smoothing=0.0"),
        ({"alpha": -1.0}, "expected alpha"),
    ],
)
def test_numbers_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TPOLoss(**options)
