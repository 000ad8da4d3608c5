"""A wide operand in two halves beside one in half precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from chunked_embed.digits import product

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def cancelling(dtype: torch.dtype, v: int = 2000, h: int = 32, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Rows whose sum is nothing beside their entries, of sizes that half precision has not, and a matrix."""
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(5, v, dtype=torch.float64, generator=generator).mul(4).softmax(1)
    a = 1e-6 * (p - p.roll(1, 1))
    b = 1 + 0.1 * torch.randn(v, h, dtype=torch.float64, generator=generator)
    return a.float().to(device), b.to(dtype).to(device)


def assert_right(found: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == torch.float32
    bound = {torch.bfloat16: 2.0**-15, torch.float16: 2.0**-18}[dtype]
    assert (found.double().cpu() - truth).norm() <= bound * truth.norm()


def truths(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    a, b = a.double().cpu(), b.double().cpu()
    return a @ b, (a @ b) @ b.t()


@HALF
def test_both_ways(dtype):
    a, b = cancelling(dtype)
    there, back = truths(a, b)
    assert_right(product(a, b), there, dtype)
    assert_right(product(there.float(), b, transposed=True), back, dtype)


@pytest.mark.slow
@HALF
def test_a_compiler_leaves_the_low_half(dtype):
    a, b = cancelling(dtype)
    compiled = torch.compile(lambda a, b: 2 * product(3 * a, b), fullgraph=True)
    assert_right(compiled(a, b), 6 * truths(a, b)[0], dtype)


def test_zeros_and_what_is_not_finite():
    b = torch.ones(4, 3, dtype=torch.float16)
    a = torch.zeros(4, 4)
    a[1, 0], a[2, 0], a[3, 0] = torch.inf, torch.nan, 1e30
    found = product(a, b)
    assert not found[0].any()
    assert not found[1].isfinite().any() and found[2].isnan().all()
    torch.testing.assert_close(found[3], torch.full((3,), 1e30))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_operands_are_taken_as_they_are(dtype):
    a, b = (t.to(dtype) for t in cancelling(torch.bfloat16))
    assert torch.equal(product(a, b), a @ b)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@HALF
def test_no_wide_copy_on_a_gpu(dtype, compiled):
    a, b = cancelling(dtype, v=40_000, h=512, device="cuda")
    there, back = truths(a, b)
    moved = there.float().cuda()
    function = torch.compile(product, fullgraph=True) if compiled else product
    for given, transposed, truth in ((a, False, there), (moved, True, back)):
        function(given, b, transposed)  # cuBLAS takes its workspace
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        assert_right(function(given, b, transposed), truth, dtype)
        assert torch.cuda.max_memory_allocated() - before < b.numel() * 2 // 4
