"""Every property of every loss shape, in one place."""

from __future__ import annotations

import pytest
import torch
from engine_zoo import CASES, gradients, learning, make

from chunked_embed.engine import compile as cache

ALL = pytest.mark.parametrize("name", list(CASES))


def run(name, x, **options):
    case = CASES[name]
    return case.call(case.loss(**{"compiled": False} | options), x)


def assert_same(name, x, output, factor=1.0, tolerance=1e-10):
    reference = CASES[name].reference(x)
    torch.testing.assert_close(output.loss, reference, rtol=tolerance, atol=tolerance)
    expected = gradients(reference * factor, x)
    for mine, theirs in zip(gradients(output.loss * factor, x), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


@ALL
@pytest.mark.parametrize("chunk_size", [None, 1, 4, 7, 23, 1000])
def test_equals_the_reference_at_any_chunk_size(name, chunk_size):
    x = make(name)
    assert_same(name, x, run(name, x, chunk_size=chunk_size))


@ALL
def test_upstream_gradient_is_not_one(name):
    x = make(name, seed=1)
    assert_same(name, x, run(name, x, chunk_size=6), factor=-2.5)


@ALL
@pytest.mark.parametrize("m", [1, 2, 5])
def test_few_rows(name, m):
    x = make(name, m=m)
    output = run(name, x, chunk_size=2)
    assert torch.isfinite(output.loss)
    assert_same(name, x, output)


@ALL
def test_retained_backward_twice(name):
    x = make(name)
    loss = run(name, x, chunk_size=5).loss
    first = torch.autograd.grad(loss, learning(x), retain_graph=True, allow_unused=True)
    second = torch.autograd.grad(3 * loss, learning(x), allow_unused=True)
    for a, b in zip(first, second, strict=True):
        if a is not None:
            torch.testing.assert_close(3 * a, b)


@ALL
def test_no_grad_gives_the_same_loss_and_no_graph(name):
    x = make(name)
    with torch.no_grad():
        output = run(name, x, chunk_size=5)
    assert not output.loss.requires_grad
    torch.testing.assert_close(output.loss, CASES[name].reference(x).detach())
    assert all(not metric.requires_grad for metric in output.metrics.values())


@ALL
def test_each_tensor_may_be_frozen(name):
    for frozen in (k for k, t in make(name).items() if t.requires_grad):
        x = make(name)
        x[frozen].requires_grad_(False)
        if learning(x):
            assert_same(name, x, run(name, x, chunk_size=7))


@ALL
def test_nothing_learns(name):
    x = {key: t.detach() for key, t in make(name).items()}
    assert not run(name, x).loss.requires_grad


@pytest.mark.slow
@ALL
def test_gradcheck(name):
    x = make(name, m=5)
    keys = [key for key, t in x.items() if t.requires_grad]

    def function(*leaves):
        return run(name, x | dict(zip(keys, leaves, strict=True)), chunk_size=3).loss

    assert torch.autograd.gradcheck(function, [x[key] for key in keys])


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_stays_close(name, dtype):
    x = make(name, dtype=dtype)
    exact = {
        k: t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t for k, t in x.items()
    }
    output = run(name, x, chunk_size=6)
    assert output.loss.dtype == torch.float32
    tolerance = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    reference = CASES[name].reference(exact)
    torch.testing.assert_close(output.loss.double(), reference, rtol=tolerance, atol=tolerance)
    for mine, theirs, leaf in zip(gradients(output.loss, x), gradients(reference, exact), learning(x), strict=True):
        assert mine.dtype == leaf.dtype
        error = (mine.double() - theirs).norm() / theirs.norm().clamp_min(1e-3)
        assert error < tolerance, error


@pytest.mark.slow
@ALL
def test_compiled_is_uncompiled(name):
    x = make(name, seed=2)
    assert_same(name, x, run(name, x, chunk_size=8, compiled=True))


@ALL
def test_padded_steps_are_uncompiled_ones(name, monkeypatch):
    """Wide losses run in tiles of fixed sizes with a padded tail; here all count as wide and none is compiled."""
    monkeypatch.setattr("chunked_embed.engine.plan.NARROW", 0)
    monkeypatch.setattr(cache, "BACKEND", "eager")
    cache.clear()
    x = make(name, seed=3)
    assert_same(name, x, run(name, x, chunk_size=16, compiled=True))
    cache.clear()


@ALL
def test_autocast_casts_operands_and_returns_float32_gradients(name):
    x = make(name, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = run(name, x, chunk_size=6)
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, CASES[name].reference(x), rtol=0.05, atol=0.05)
    assert all(g.dtype == torch.float32 for g in gradients(output.loss, x))


@pytest.mark.gpu
@ALL
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu(name, dtype, compiled):
    x = make(name, dtype=dtype, device="cuda")
    cpu = {k: t.detach().cpu().double() if t.is_floating_point() else t.cpu() for k, t in x.items()}
    cpu = {k: t.requires_grad_(x[k].requires_grad) for k, t in cpu.items()}
    output = run(name, x, chunk_size=8, compiled=compiled)
    tolerance = {torch.float64: 1e-9, torch.float32: 5e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    reference = CASES[name].reference(cpu)
    torch.testing.assert_close(output.loss.cpu().double(), reference, rtol=tolerance, atol=tolerance)
    for mine, theirs in zip(gradients(output.loss, x), gradients(reference, cpu), strict=True):
        error = (mine.cpu().double() - theirs).norm() / theirs.norm().clamp_min(1e-3)
        assert error < tolerance, error
