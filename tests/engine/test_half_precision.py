"""Gradients that are added up, of tensors in half precision: each is rounded once, where it is returned."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from chunked_embed import FlexChunkLoss, Projection

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
COMPILED = pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
N, H, V = 12, 16, 24


def near(dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Two inputs whose outputs are nearly equal, and a weight."""
    generator = torch.Generator().manual_seed(seed)
    x, apart, weight = (torch.randn(*shape, generator=generator) for shape in ((N, H), (N, H), (V, H)))
    return x.to(dtype), (x + 0.01 * apart).to(dtype), weight.to(dtype)


def assert_rounded_once(found: Tensor, truth: Tensor, slack: float = 1.05) -> None:
    """By half of the last bit, and what float32 sums of numbers a hundred times as large are off by."""
    bits = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}[found.dtype]
    error = (found.double() - truth).abs()
    bound = slack * 2 * bits * truth.abs() + 5e-5 * truth.abs().max()
    assert bool((error <= bound).all()), float((error / bound).max())


class Difference(FlexChunkLoss):
    """Of what two projections score, each on its own, with a factor for each row."""

    def __init__(self, **options):
        super().__init__(targets=(), separate_outputs=True, **options)

    def score_fn(self, outputs, rows):
        return {"size": rows["factor"] * outputs.square().mean(1)}

    def loss_fn(self, scores, groups):
        return (scores["a"]["size"] - scores["b"]["size"]).squeeze(1)


@COMPILED
@HALF
def test_a_row_argument_of_several_units(dtype, compiled):
    a, b, weight = near(dtype)
    factor = torch.linspace(0.5, 2, N).to(dtype).requires_grad_()
    loss = Difference(compiled=compiled, chunk_size=5)
    projections = {"a": Projection(a, weight), "b": Projection(b, weight)}
    (found,) = torch.autograd.grad(loss(projections, {"factor": factor}).loss, factor)
    sizes = [(x.double() @ weight.double().T).square().mean(1) for x in (a, b)]
    assert_rounded_once(found, (sizes[0] - sizes[1]) / N)


@HALF
def test_an_input_of_several_projections(dtype):
    x, _, weight = near(dtype)
    other = (weight.float() + 0.01 * torch.randn(V, H, generator=torch.Generator().manual_seed(1))).to(dtype)
    x.requires_grad_()

    def apart(outputs, rows):
        return 16 * (outputs["a"] - outputs["b"]).sum(1)  # of gradients that are no sums of rounded ones

    projections = {"a": Projection(x, weight), "b": Projection(x, other)}
    out = FlexChunkLoss(apart, targets=(), compiled=False, chunk_size=5)(
        projections, {}, row_weight=torch.full((N,), 0.25)
    )
    (found,) = torch.autograd.grad(out.loss, x)
    assert_rounded_once(found, 4 * (weight.double() - other.double()).sum(0).expand(N, H))


@COMPILED
@HALF
def test_a_column_argument_of_several_chunks(dtype, compiled):
    a, b, weight = near(dtype)
    factor = torch.linspace(0.5, 2, V).to(dtype).requires_grad_()
    sign = torch.tensor([1.0, -1.0]).repeat_interleave(N)

    def scaled(outputs, rows, columns):
        return rows["sign"] * (outputs.square() * columns["factor"]).mean(1)

    loss = FlexChunkLoss(scaled, targets=(), compiled=compiled, chunk_size=5)
    out = loss(Projection(torch.cat([a, b]), weight), {"sign": sign}, columns={"factor": factor})
    (found,) = torch.autograd.grad(out.loss, factor)
    squares = (torch.cat([a, b]).double() @ weight.double().T).square()
    assert_rounded_once(found, (sign[:, None] * squares).sum(0) / V / (2 * N))


@pytest.mark.parametrize("couples", [False, True])
@HALF
def test_an_argument_of_groups_that_is_used_twice(dtype, couples):
    a, b, weight = near(dtype)
    factor = torch.linspace(0.5, 2, N).to(dtype).requires_grad_()

    def sizes(outputs, rows):
        return {name: outputs[name].square().mean(1) for name in outputs}

    def difference(scores, groups):
        a, b = (scores[name].squeeze(1) for name in "ab")
        return groups["factor"] * a - groups["factor"] * b

    loss = FlexChunkLoss(difference, sizes, targets=(), couples_batch=couples, compiled=False)
    projections = {"a": Projection(a, weight), "b": Projection(b, weight)}
    (found,) = torch.autograd.grad(loss(projections, groups={"factor": factor}).loss, factor)
    squares = [(x.double() @ weight.double().T).square().mean(1) for x in (a, b)]
    assert_rounded_once(found, (squares[0] - squares[1]) / N)


@COMPILED
@HALF
def test_a_bias_of_outputs_that_nearly_cancel(dtype, compiled):
    a, b, weight = near(dtype)
    bias = torch.zeros(V, dtype=dtype, requires_grad=True)

    def apart(outputs, rows):
        return (outputs["a"].square() - outputs["b"].square()).mean(1)

    projections = {"a": Projection(a, weight, bias), "b": Projection(b, weight, bias)}
    out = FlexChunkLoss(apart, targets=(), compiled=compiled, chunk_size=5)(projections)
    (found,) = torch.autograd.grad(out.loss, bias)
    assert_rounded_once(found, 2 * ((a.double() - b.double()) @ weight.double().T).sum(0) / V / N)


# --- the range of float16 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("couples", [False, True])
def test_the_size_of_gradients_is_a_power_of_two_in_between(couples):
    """It changes no digit of those that float16 holds anyway."""
    x, _, weight = near(torch.float16)
    found = []
    for size in (1.0, 0.3, 5.0):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        options = {"targets": (), "compiled": False, "chunk_size": 5, "gradient_size": size}
        if couples:
            loss = FlexChunkLoss(lambda s, g: s["z"].mean(), _waves, couples_batch=True, **options)
        else:
            loss = FlexChunkLoss(lambda o, rows: o.sin().sum(1), **options)
        found.append(torch.autograd.grad(loss(Projection(*leaves)).loss, leaves))
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


def _waves(outputs, rows):
    return {"z": outputs.sin().sum(1)}


@pytest.mark.parametrize("size", [0.0, -1.0, float("nan"), float("inf")])
def test_a_size_of_gradients_that_is_none(size):
    with pytest.raises(ValueError, match="gradient_size"):
        FlexChunkLoss(lambda o, rows: o.sum(1), gradient_size=size)
