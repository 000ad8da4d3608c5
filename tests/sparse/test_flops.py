"""FLOPS against the library's class in float64, and what holds of it for any embeddings."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers.sparse_encoder import losses as library
from st_parts import EXACT
from st_shapes import Shapes
from torch import Tensor, nn

from chunked_embed import functional as CF
from chunked_embed.functional import sparsity
from chunked_embed.losses._base import Small
from chunked_embed.sparse import losses
from chunked_embed.sparse.losses import flops as losses_flops

N, V = 9, 14


def sparse(rows: int = N, width: int = V, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Rows of one to all numbers other than zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(rows, width, generator=generator, dtype=torch.float64) + 0.1
    kept = torch.rand(rows, width, generator=generator) < torch.linspace(0.1, 1.0, rows)[:, None]
    return (x * kept).to(dtype).requires_grad_()


def theirs(columns: list[Tensor], threshold: float | None) -> Tensor:
    return library.FlopsLoss(nn.Identity(), threshold).compute_loss_from_embeddings(torch.cat(columns))


def grads(loss: Tensor, columns: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(1.5 * loss, columns))


@pytest.fixture(autouse=True)
def none_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """All are ours, but where it is said."""
    monkeypatch.setattr(losses_flops, "SMALL", Small(-1, -1, -1))


@pytest.fixture(params=[None, 2 * V], ids=["one block", "blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        monkeypatch.setattr(sparsity, "BLOCK", request.param)


@pytest.mark.parametrize("threshold", [None, 0, 3, 7.5, V])
@pytest.mark.parametrize("count", [1, 3])
def test_is_the_librarys(count: int, threshold: float | None, blocks: None) -> None:
    columns = [sparse(seed=seed) for seed in range(count)]
    for mine in (
        CF.flops(columns, threshold=threshold),
        losses.FlopsLoss(nn.Identity(), threshold).compute_loss_from_embeddings(columns),
        *([CF.flops(columns[0], threshold=threshold)] if count == 1 else ()),
    ):
        expected = theirs(columns, threshold)
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(grads(mine, columns), grads(expected, columns), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("threshold", [None, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_precision(dtype: torch.dtype, threshold: float | None) -> None:
    """Float32 sums whatever the embeddings are, and one rounding of their gradient."""
    columns = [sparse(300, 40, seed, dtype) for seed in range(2)]
    wide = [column.detach().double().requires_grad_() for column in columns]
    mine, exact = CF.flops(columns, threshold=threshold), theirs(wide, threshold)
    assert mine.dtype == torch.float32
    assert mine.item() == pytest.approx(exact.item(), rel=1e-6)
    for found, expected in zip(grads(mine, columns), grads(exact, wide)):
        assert found.dtype == dtype
        step = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        torch.testing.assert_close(found.double(), expected, rtol=max(torch.finfo(dtype).eps, 1e-6), atol=step)


def test_nothing_of_the_embeddings_size_is_made() -> None:
    x = torch.rand(50, 60)
    columns = [x[:25].requires_grad_(), x[25:].detach().requires_grad_()]
    with Shapes() as shapes:
        loss = CF.flops(columns)
        found = torch.autograd.grad(loss, columns)
    assert {grad.stride() for grad in found} == {(0, 1)}  # one row, read as many times as there are rows
    made = {shape for shape in shapes.seen if math.prod(shape) > 60}
    assert made <= {(25, 60)}, made  # the gradients above


def test_its_gradient_is_added_in_place() -> None:
    """To that of a loss that comes after it."""
    leaf = torch.rand(30, 20, requires_grad=True)
    x = leaf * 1.0
    terms = CF.flops(x), x.sin().sum()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        sum(terms).backward()
    added = [event.name for event in profile.events() if event.input_shapes and event.input_shapes[0] == [30, 20]]
    assert "aten::add_" in added and "aten::add" not in added


@pytest.mark.skipif(not EXACT, reason="ours runs at every size beside a library before 6.2")
@pytest.mark.parametrize("threshold", [None, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_small_batch_is_the_librarys(
    dtype: torch.dtype, threshold: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit; half precision is ours."""
    columns = [sparse(seed=seed, dtype=dtype) for seed in range(2)]
    loss, called = losses.FlopsLoss(None, threshold), []
    monkeypatch.setattr(
        CF, "flops", lambda *args, before=CF.flops, **kwargs: called.append(1) or before(*args, **kwargs)
    )
    for bound in (2 * N * V, 2 * N * V - 1):
        monkeypatch.setattr(losses_flops, "SMALL", Small(bound, bound, bound))
        called.clear()
        value = loss.compute_loss_from_embeddings(columns)
        left = bound == 2 * N * V and dtype is not torch.bfloat16
        assert bool(called) is not left
        if left:
            expected = theirs(columns, threshold)
            assert all(map(torch.equal, [value, *grads(value, columns)], [expected, *grads(expected, columns)]))


def test_one_side_that_learns() -> None:
    x, y = sparse(seed=0), sparse(seed=1).detach()
    (found,) = torch.autograd.grad(CF.flops([x, y], threshold=4), [x])
    torch.testing.assert_close(found, torch.autograd.grad(theirs([x, y], 4), [x])[0])
    assert not CF.flops([y]).requires_grad


# --- for any embeddings ----------------------------------------------------------------------------------------------

tables = st.integers(1, 6).flatmap(
    lambda width: st.lists(
        st.lists(st.sampled_from([0.0, 0.0, 0.25, 0.5, 1.0, 3.0]), min_size=width, max_size=width),
        min_size=1,
        max_size=8,
    )
)


@settings(max_examples=80, deadline=None)
@given(tables, st.sampled_from([None, 0, 1, 3]), st.randoms(use_true_random=False))
def test_properties(table: list[list[float]], threshold: int | None, random: Any) -> None:
    x = torch.tensor(table, dtype=torch.float64, requires_grad=True)
    loss = CF.flops(x, threshold=threshold)
    torch.testing.assert_close(loss, theirs([x], threshold))
    (grad,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close((grad * x).sum(), 2 * loss)  # of degree two
    order = torch.tensor(random.sample(range(len(table)), len(table)))
    torch.testing.assert_close(CF.flops(x[order], threshold=threshold), loss)
    torch.testing.assert_close(CF.flops([x, x], threshold=threshold), loss)  # a mean
    torch.testing.assert_close(CF.flops(3 * x, threshold=threshold), 9 * loss)
    counts = (x != 0).sum(1) > (-1 if threshold is None else threshold)
    rows = x[counts]
    torch.testing.assert_close(loss, CF.flops(rows) * (len(rows) / len(x)) ** 2 if len(rows) else 0 * loss)


# --- refusals --------------------------------------------------------------------------------------------------------

x = torch.rand(3, 4)
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "nothing": (lambda: CF.flops([]), ValueError, "a tensor or several, got none"),
    "a number": (lambda: CF.flops(3.0), TypeError, "sequence of tensors"),
    "integers": (lambda: CF.flops(x.long()), TypeError, "floating"),
    "a row": (lambda: CF.flops(x[0]), ValueError, "embeddings.*(N, V)"),
    "no rows": (lambda: CF.flops(x[:0]), ValueError, "at least one row"),
    "two shapes": (lambda: CF.flops([x, x[:, :2]]), ValueError, "one shape"),
    "sparse": (lambda: CF.flops(x.to_sparse()), TypeError, "dense tensor"),
    "NaN": (lambda: CF.flops(x, threshold=math.nan), ValueError, "threshold"),
    "a word": (lambda: losses.FlopsLoss(nn.Identity(), "many"), TypeError, "threshold"),
    "a class": (lambda: losses.FlopsLoss(nn.Identity), TypeError, "as model"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str) -> None:
    call, kind, message = REFUSED[case]
    with pytest.raises(kind, match=message):
        call()


def test_no_second_derivative() -> None:
    leaf = sparse()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(CF.flops(leaf), leaf, create_graph=True)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.vmap])
def test_no_transforms(transform: Callable[[Any], Any]) -> None:
    with pytest.raises(RuntimeError, match=r"torch.func transforms \(grad, vmap, jvp, ...\) do not apply"):
        transform(CF.flops)(torch.stack([x]) if transform is torch.vmap else x)
