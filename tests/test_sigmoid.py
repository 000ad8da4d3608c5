"""The sigmoid pair loss on plain tensors against the formula over the whole matrix."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters

from chunked_embed import functional as CF
from chunked_embed.engine import compile as cache

EAGER = {"compiled": False}
EXACT = {"rtol": 1e-9, "atol": 1e-12}


def formula(a: Tensor, b: Tensor, scale, bias, similarity: str = "cosine") -> Tensor:
    similarities = F.cosine_similarity(a[:, None], b[None], dim=-1) if similarity == "cosine" else a @ b.T
    y = 2 * torch.eye(len(a), dtype=similarities.dtype) - 1
    return -F.logsigmoid(y * (scale * similarities + bias)).sum(1).mean()


def inputs(rows: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return [torch.randn(rows, 6, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for _ in "ab"]


def learnt(*values: float, dtype: torch.dtype = torch.float64, shape: tuple = ()) -> list[Tensor]:
    return [torch.full(shape, value, dtype=dtype, requires_grad=True) for value in values]


def assert_same(leaves: list[Tensor], mine: Tensor, theirs: Tensor, **tolerance: float) -> None:
    tolerance = tolerance or EXACT
    torch.testing.assert_close(mine, theirs, **tolerance)
    for a, b in zip(torch.autograd.grad(mine, leaves), torch.autograd.grad(theirs, leaves), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("rows", [1, 2, 11])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("shape", [None, (), (1,), (1, 1)], ids=str)
def test_is_the_formula(rows, similarity, shape):
    sides = inputs(rows)
    for scale, bias in ((10.0, -10.0), (3.0, 0.5), (-2.0, 1.0)):
        numbers = [scale, bias] if shape is None else learnt(scale, bias, shape=shape)
        options = dict(zip(("scale", "bias"), numbers))
        mine = CF.sigmoid_pairs(*sides, **options, similarity=similarity, chunk_size=4, **EAGER)
        assert mine.dim() == 0
        leaves = [*sides, *(numbers if shape is not None else [])]
        assert_same(leaves, mine, formula(*sides, *(x if shape is None else x.sum() for x in numbers), similarity))


def test_defaults():
    sides = inputs(7)
    assert_same(sides, CF.sigmoid_pairs(*sides, **EAGER), formula(*sides, 10.0, -10.0))


@pytest.mark.parametrize("chunk_size", [1, 3, 11, 100, None])
def test_chunks_change_nothing(chunk_size):
    leaves = [*inputs(11), *learnt(10.0, -4.0)]
    a, b, scale, bias = leaves
    options = {"scale": scale, "bias": bias, **EAGER}
    mine = CF.sigmoid_pairs(a, b, chunk_size=chunk_size, **options)
    assert_same(leaves, mine, CF.sigmoid_pairs(a, b, chunk_size=11, **options))


def test_gradcheck():
    def loss(a, b, scale, bias):
        return CF.sigmoid_pairs(a, b, scale=scale, bias=bias, chunk_size=3, **EAGER)

    assert torch.autograd.gradcheck(loss, [*inputs(5), *learnt(4.0, -2.0)])


@pytest.mark.parametrize("learning", ["scale", "bias", "neither side"])
def test_what_is_frozen_has_no_gradient(learning):
    a, b = inputs(5)
    scale, bias = learnt(4.0, -2.0)
    given = {"scale": scale if learning != "bias" else 4.0, "bias": bias if learning != "scale" else -2.0}
    if learning == "neither side":
        a, b = a.detach(), b.detach()
    CF.sigmoid_pairs(a, b, **given, **EAGER).backward()
    expected = formula(a, b, scale, bias)
    found = [x for x in (scale, bias) if x.grad is not None]
    assert len(found) == (2 if learning == "neither side" else 1)
    for x, grad in zip(found, torch.autograd.grad(expected, found)):
        torch.testing.assert_close(x.grad, grad, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale, bias", [(1e6, -1e6), (1e6, 1e6), (1e30, 0.0), (-1e6, 0.0)], ids=str)
def test_huge_logits_are_finite(dtype, scale, bias):
    leaves = [*inputs(9, dtype), *learnt(scale, bias, dtype=dtype)]
    a, b, scale, bias = leaves
    mine = CF.sigmoid_pairs(a, b, scale=scale, bias=bias, **EAGER)
    assert mine.isfinite()
    torch.testing.assert_close(mine, formula(a, b, scale, bias))
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(mine, leaves))


def test_well_separated_pairs_keep_their_digits():
    """The tiny loss of a positive is not what is left of a difference of large numbers."""
    a = torch.eye(2)
    mine = CF.sigmoid_pairs(a, a, scale=100.0, bias=-50.0, **EAGER)
    torch.testing.assert_close(mine, formula(a.double(), a.double(), 100.0, -50.0).float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("value", [0.0, 2.0])
def test_degenerate_sides_are_finite(value):
    sides = [torch.full((4, 3), value, requires_grad=True) for _ in "ab"]
    mine = CF.sigmoid_pairs(*sides, **EAGER)
    torch.testing.assert_close(mine, formula(*sides, 10.0, -10.0))
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(mine, sides))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    sides, numbers = inputs(40, dtype), learnt(10.0, -2.0, dtype=torch.float32)
    mine = CF.sigmoid_pairs(*sides, scale=numbers[0], bias=numbers[1], **EAGER)
    wide = [x.detach().double().requires_grad_() for x in (*sides, *numbers)]
    exact = formula(*wide)
    assert mine.dtype == torch.float32
    torch.testing.assert_close(mine.double(), exact, rtol=5e-3, atol=0)
    grads = torch.autograd.grad(mine, [*sides, *numbers])
    assert [grad.dtype for grad in grads] == [dtype, dtype, torch.float32, torch.float32]
    for found, expected in zip(grads, torch.autograd.grad(exact, wide)):
        assert (found.double() - expected).norm() < 0.02 * expected.norm()


def test_no_grad():
    with torch.no_grad():
        assert not CF.sigmoid_pairs(*inputs(5), scale=learnt(3.0)[0], **EAGER).requires_grad


BAD = {
    "rows": (lambda a, b: CF.sigmoid_pairs(a, b[:3]), ValueError, "one shape"),
    "mixed": (lambda a, b: CF.sigmoid_pairs(a, b.float()), TypeError, "one dtype"),
    "scale": (lambda a, b: CF.sigmoid_pairs(a, b, scale=float("inf")), ValueError, "scale to be a finite"),
    "bias": (lambda a, b: CF.sigmoid_pairs(a, b, bias=float("nan")), ValueError, "bias to be a finite"),
    "scales": (lambda a, b: CF.sigmoid_pairs(a, b, scale=torch.ones(5)), ValueError, "of one element"),
    "integer": (lambda a, b: CF.sigmoid_pairs(a, b, bias=torch.tensor(1)), TypeError, "floating point"),
    "similarity": (lambda a, b: CF.sigmoid_pairs(a, b, similarity="euclidean"), ValueError, "similarity"),
    "no rows": (lambda a, b: CF.sigmoid_pairs(a[:0], b[:0]), ValueError, "at least one row"),
}


@pytest.mark.parametrize("call", BAD)
def test_refuses(call):
    function, error, message = BAD[call]
    with pytest.raises(error, match=message):
        function(*inputs(5))


def test_other_numbers_compile_nothing(monkeypatch):
    torch._dynamo.reset()
    cache.clear()
    counters.clear()
    monkeypatch.setattr(cache, "BACKEND", "eager")
    sides = inputs(6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        graphs = []
        for kind in (float, learnt):
            for values in ((10.0, -10.0), (11.5, -3.0), (0.5, 2.0)):
                scale, bias = learnt(*values) if kind is learnt else values
                mine = CF.sigmoid_pairs(*sides, scale=scale, bias=bias, compiled=True)
                assert_same([*sides, *([scale, bias] if kind is learnt else [])], mine, formula(*sides, scale, bias))
                graphs.append(counters["stats"]["unique_graphs"])
        # With numbers, and again with a gradient for the bias; the rest are what was compiled before.
        assert 0 < graphs[0] == graphs[2] < graphs[3] == graphs[5]
    cache.clear()


@pytest.mark.slow
def test_compiled():
    for rows in (11, 7):
        leaves = [*inputs(rows), *learnt(10.0, -4.0)]
        a, b, scale, bias = leaves
        assert_same(leaves, CF.sigmoid_pairs(a, b, scale=scale, bias=bias, compiled=True), formula(a, b, scale, bias))


def test_a_function_of_ones_own_sees_a_chunk_of_rows():
    a, b = (torch.randn(7, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    seen = []

    def inner_products(rows, candidates):
        seen.append((len(rows), len(candidates)))
        return rows @ candidates.T

    ours = CF.sigmoid_pairs(a, b, scale=scale, bias=-1.0, similarity=inner_products, chunk_size=3)
    fused = CF.sigmoid_pairs(a, b, scale=scale, bias=-1.0, similarity="dot", compiled=False)
    torch.testing.assert_close(ours, fused)
    gradients = (torch.autograd.grad(loss, (a, b, scale)) for loss in (ours, fused))
    for own, other in zip(*gradients, strict=True):
        torch.testing.assert_close(own, other)
    assert seen == [(3, 7), (3, 7), (1, 7), (1, 7), (3, 7), (3, 7)]  # forward, and once more in backward
