"""Projections whose outputs are cosines, and whose operands are narrower than their tensors, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from chunked_embed import FlexChunkLoss, Needs, Projection, Step

TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-5, torch.bfloat16: 3e-3, torch.float16: 4e-4}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE)


class Peaked(FlexChunkLoss):
    def loss_fn(self, outputs, rows):
        given = outputs.values() if isinstance(outputs, dict) else [outputs]
        return sum(F.cross_entropy(20 * o, rows["target"], reduction="none") for o in given)


class Scored(FlexChunkLoss):
    def score_fn(self, outputs, rows):
        return {"nll": F.cross_entropy(20 * outputs, rows["target"], reduction="none")}

    def loss_fn(self, scores, groups):
        return scores["nll"][:, 0]


def near(n, d=24, size=15.0):
    base = torch.randn(1, d) + 0.3 * torch.randn(n, d)
    return size * base, size * (base + 0.2 * torch.randn(n, d))


def truth(x, w, target):
    leaves = [t.detach().double().requires_grad_() for t in (x, w)]
    cosines = F.normalize(leaves[0], dim=1) @ F.normalize(leaves[1], dim=1).T
    loss = F.cross_entropy(20 * cosines, target)
    return loss, torch.autograd.grad(loss, leaves)


SCALE = 256.0  # of a loss, as a GradScaler has it: float16 returns gradients that are denormal otherwise


def assert_near(loss, x, w, target, bound):
    found = torch.autograd.grad(SCALE * loss, (x, w))
    true, grads = truth(x, w, target)
    assert abs(loss.item() - true.item()) <= 1e-5 * (1 + abs(true.item()))
    for mine, exact in zip(found, grads):
        error = ((mine.double() / SCALE - exact).norm() / exact.norm()).item()
        assert error <= bound, f"{error:.1e} > {bound:.1e}"


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("chunk_size", [None, 7])
@pytest.mark.parametrize("kind", [Peaked, Scored])
@DTYPES
def test_cosines(kind, dtype, chunk_size, compiled):
    x, w = (t.to(dtype).requires_grad_() for t in near(30))
    target = torch.arange(30)
    target[::5] = -100
    loss = kind(chunk_size=chunk_size, compiled=compiled)(Projection(x, w, cosine=True), {"target": target}).loss
    assert_near(loss, x, w, target, TOLERANCE[dtype])


@pytest.mark.parametrize("autocast, size", [(False, 1e-2), (False, 1e3), (True, 1e-7), (True, 1e6)])
def test_float16_has_the_same_cosines_for_any_length(size, autocast):
    """Rows that float16 cannot hold, or whose products it cannot, nor the gradients of those."""
    x, w = (t.to(torch.float32 if autocast else torch.float16).requires_grad_() for t in near(30, size=size))
    target = torch.arange(30)
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        loss = Peaked()(Projection(x, w, cosine=True), {"target": target}).loss
    scale = 1.0 if autocast else 16 * size
    found = torch.autograd.grad(scale * loss, (x, w))
    true, exact = truth(x, w, target)
    assert abs(loss.item() - true.item()) <= 2e-3  # autocast rounds the rows
    for mine, grad in zip(found, exact):
        assert ((mine.double() / scale - grad).norm() / grad.norm()).item() <= 5e-3


def test_float16_of_rows_of_unlike_lengths_beside_other_projections():
    x, w = near(40, size=1.0)
    lengths = torch.logspace(-2, 2, 40)[:, None]
    x, w = ((F.normalize(t, dim=1) * lengths).half() for t in (x, w))
    x[3] = 0  # its cosines are zero, as those of F.normalize are, and float16 has no gradient for it
    x, w = x.requires_grad_(), w.requires_grad_()
    other = [t.half().requires_grad_() for t in near(40, size=30.0)]
    target = torch.arange(40)
    given = {"a": Projection(x, w, cosine=True), "b": Projection(*other, cosine=True)}
    found = torch.autograd.grad(Peaked()(given, {"target": target}).loss, (x, w, *other))
    exact = [*truth(x, w, target)[1], *truth(*other, target)[1]]
    exact[0][3] = 0
    for mine, grad, bound in zip(found, exact, (2e-3, 2e-3, 2e-2, 2e-2)):  # the latter are denormal
        assert ((mine.double() - grad).norm() / grad.norm()).item() <= bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_wide_tensors_are_summed_wide(dtype):
    """One tensor in two products whose gradients cancel: of float32 tensors with operands of half precision."""
    x, w = (t.to(dtype) for t in near(20, size=1.0))
    wide = [t.float().requires_grad_() for t in (x, w)]
    target = torch.arange(20)

    def cancelling(outputs, rows):
        return sum(s * F.cross_entropy(o, rows["target"], reduction="none") for s, o in zip((1, -1), outputs.values()))

    given = {name: Projection(*wide, dtype=dtype) for name in ("a", "b")}
    FlexChunkLoss(cancelling)(given, {"target": target}).loss.backward()
    assert all(t.grad.dtype == torch.float32 and t.grad.abs().max() < 1e-6 for t in wide)


@pytest.mark.parametrize(
    "more, error, told",
    [
        ({"bias": torch.zeros(5)}, ValueError, "neither bias nor extra"),
        ({"extra": ((torch.zeros(3, 2), torch.zeros(5, 2)),)}, ValueError, "neither bias nor extra"),
        ({"weight": None}, ValueError, "without a weight"),
        ({"cosine": 1}, TypeError, "cosine to be True or False"),
        ({"dtype": torch.int64}, TypeError, "dtype to be one of"),
        ({"dtype": torch.float8_e4m3fn}, TypeError, "dtype to be one of"),
    ],
)
def test_what_means_nothing_is_refused(more, error, told):
    given = {"input": torch.randn(3, 4), "weight": torch.randn(5, 4), "cosine": True, **more}
    with pytest.raises(error, match=told):
        Peaked()(Projection(**given), {"target": torch.tensor([0, 1, 2])})


def test_a_step_without_factors_leaves_cosines_to_the_functions():
    class Bare(Step):
        def needs(self, shape):
            return Needs()

    class WithStep(Peaked):
        def make_step(self, projections):
            return Bare()

    x, w = (t.requires_grad_() for t in near(6))
    call = Projection(x, w, cosine=True), {"target": torch.arange(6)}
    assert "does not multiply outputs by norms" in str(WithStep().plan(*call))
    assert_near(WithStep()(*call).loss, x, w, call[1]["target"], 3e-5)
