"""Grouped losses of one chunk whose outputs stay for backward, beside those of several chunks and of the direct way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from chunked_embed import FlexChunkLoss, Projection

WAYS: dict[str, dict[str, Any]] = {
    "direct": {},
    "one chunk": {"compiled": False},
    "chunks": {"compiled": False, "chunk_size": 3},
}
SEGMENTS = torch.tensor([0, 0, 0, 1, 1, 2, 2, 3])


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> dict[str, Any]:
    return WAYS[request.param]


def problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 4, dtype=torch.float64, generator=g).to(dtype) for n in (8, 7))
    return hidden.requires_grad_(), weight.requires_grad_()


def squares(outputs: Tensor, rows: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"s": outputs.square().sum(1), **rows}


def grouped(loss_fn: Callable, **options: Any) -> FlexChunkLoss:
    return FlexChunkLoss(loss_fn, score_fn=squares, **options)


@pytest.mark.parametrize("couples", [False, True], ids=["", "coupled"])
def test_a_loss_without_scores_has_gradients_of_zero(way: dict[str, Any], couples: bool) -> None:
    hidden, weight = problem()
    loss = grouped(lambda scores, groups: 2 * scores["count"].sum(1), couples_batch=couples, **way)
    loss(Projection(hidden, weight), segments=SEGMENTS).loss.backward()
    for leaf in (hidden, weight):
        assert leaf.grad is not None and not leaf.grad.any()


@pytest.mark.parametrize("couples", [False, True], ids=["", "coupled"])
def test_a_loss_of_groups_alone_has_gradients_of_zero_elsewhere(way: dict[str, Any], couples: bool) -> None:
    (hidden, weight), own, idle = problem(), torch.arange(4.0, requires_grad=True), torch.ones(4, requires_grad=True)
    loss = grouped(lambda scores, groups: groups["own"].square(), couples_batch=couples, **way)
    loss(Projection(hidden, weight), segments=SEGMENTS, groups={"own": own, "idle": idle}).loss.backward()
    for leaf in (hidden, weight, idle):
        assert leaf.grad is not None and not leaf.grad.any()
    torch.testing.assert_close(own.grad, own.detach() / 2)


def test_scores_of_integers_keep_their_digits(way: dict[str, Any]) -> None:
    hidden, weight = problem(torch.float32)
    ids = torch.arange(8) + 2**24 + 1
    expected = torch.zeros(4, dtype=torch.int64).index_add_(0, SEGMENTS, ids - 2**24)

    def loss_fn(scores: dict[str, Tensor], groups: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return scores["s"].sum(1), {"ids": (scores["ids"] - 2**24 * scores["count"].double()).sum(1)}

    out = grouped(loss_fn, **way)(Projection(hidden, weight), {"ids": ids}, segments=SEGMENTS)
    assert out.metrics["ids"].tolist() == expected.tolist()


@pytest.mark.parametrize("what", ["groups", "rows"])
def test_arguments_from_inference_mode(way: dict[str, Any], what: str) -> None:
    hidden, weight = problem()
    with torch.inference_mode():
        of_rows, of_groups = torch.ones(8, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    arguments: dict[str, Any] = {"groups": {"a": of_groups}} if what == "groups" else {"rows": {"a": of_rows}}

    def loss_fn(scores: dict[str, Tensor], groups: dict[str, Tensor]) -> Tensor:
        return scores["s"].sum(1) - groups.get("a", 0)

    grouped(loss_fn, **way)(Projection(hidden, weight), segments=SEGMENTS, **arguments).loss.backward()
    assert hidden.grad is not None and hidden.grad.all()


def test_segments_that_change_before_backward_are_refused_or_of_no_consequence(way: dict[str, Any]) -> None:
    found = []
    for changed in (False, True):
        (hidden, weight), segments = problem(), SEGMENTS.clone()
        loss = grouped(lambda scores, groups: scores["s"].sum(1).square(), **way)
        value = loss(Projection(hidden, weight), segments=segments).loss
        if changed:
            segments.copy_(torch.tensor([0, 1, 2, 3, 3, 3, 3, 3]))
        try:
            value.backward()
        except RuntimeError as error:
            assert changed and ("segments" in str(error) or "inplace" in str(error))
            return
        found.append(hidden.grad)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.bfloat16])
@pytest.mark.parametrize("by_row", [True, False], ids=["row-wise", "grouped"])
def test_the_mean_of_any_values_is_that_of_numbers(way: dict[str, Any], dtype: torch.dtype, by_row: bool) -> None:
    hidden, weight = problem(torch.float32)
    given = torch.tensor([256, 0, 0, 1, 3, 1, 1, 1]).to(dtype)  # of mean 32.875, nine bits

    def loss_fn(scores: dict[str, Tensor], groups: dict[str, Tensor]) -> Tensor:
        return scores["a"][:, 0].to(dtype)

    loss = FlexChunkLoss(lambda outputs, rows: rows["a"].to(dtype), **way) if by_row else grouped(loss_fn, **way)
    out = loss(Projection(hidden, weight), {"a": given})
    torch.testing.assert_close(out.loss.detach(), given.float().mean(), rtol=1e-6, atol=0)


def test_nan_of_another_kind_of_float_is_refused_at_any_call() -> None:
    hidden, weight = problem()
    loss = FlexChunkLoss(lambda outputs, rows, margin: margin * outputs.sum(1), margin=np.float64(0.5))
    loss(Projection(hidden, weight))
    setattr(loss, "margin", np.float64("nan"))  # noqa: B010
    with pytest.raises(ValueError, match="margin to be a number, got NaN"):
        loss(Projection(hidden, weight))
