"""GRPO's losses and RLOO, beside TRL's own code and Liger's on whole logits, in float64."""

from __future__ import annotations

from typing import Any

import grpo_zoo as zoo
import pytest
import torch
from torch import Tensor

pytest.importorskip("trl")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore::FutureWarning:trl"),
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
]
WAYS = [{}, {"chunk_size": 4, "compiled": False}, {"chunk_size": 100, "compiled": False}]


def mean(out: Any, name: str) -> float:
    """Over all that counts, as TRL logs it."""
    total, count = out.sums[name]
    return (total / count).item()


def logged(out: Any) -> dict[str, float]:
    """What TRL logs, by its names."""
    found = {name: mean(out, name) for name in ("kl", "entropy", "cispo_clip_ratio") if name in out.metrics}
    if "vespo/phi_seq" in out.metrics:
        found["vespo/phi_seq_mean"] = mean(out, "vespo/phi_seq")
    for side in ("low", "high", "region"):
        if (name := f"clip_ratio/{side}") in out.metrics:
            found[f"{name}_mean"] = mean(out, name)
            counts = (out.counts or {}).get(name, torch.ones(1))
            some = out.metrics[name][(counts > 0).expand_as(out.metrics[name])]
            found |= {"low": {f"{name}_min": some.min().item()}, "high": {f"{name}_max": some.max().item()}}.get(
                side, {}
            )
    return found


def assert_same(out: Any, expected: Tensor, logs: dict[str, float], x: zoo.Batch) -> None:
    torch.testing.assert_close(out.loss, expected, rtol=1e-10, atol=1e-12)
    leaves = list(x.leaves.values())
    wanted = torch.autograd.grad(expected, leaves)
    for mine, right in zip(torch.autograd.grad(out.loss, leaves), wanted, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-9, atol=1e-11)
    found = logged(out)
    for name, value in logs.items():
        if name not in ("policy_loss", "entropy_coef"):
            of_marks = "clip" in name  # which TRL has in float32
            assert found[name] == pytest.approx(value, rel=1e-6 if of_marks else 1e-9, abs=1e-12), name


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("name", zoo.CASES)
def test_same_as_trl(name: str, how: dict[str, Any]) -> None:
    x = zoo.Batch()
    case, given = zoo.CASES[name]
    loss, arguments, call = zoo.ours(x, case, given, **how)
    assert_same(loss(*arguments, **call), *zoo.theirs(x, case, given), x)
