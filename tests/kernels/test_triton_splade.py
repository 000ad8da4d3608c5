"""Pooled outputs and their gradients against float64: on a GPU, else through Triton's interpreter."""

import pytest
import torch
from kernel_device import DEVICE, INTERPRETED, MARKS, exact

from chunked_embed import functional as CF
from chunked_embed.kernels import splade

kernels = pytest.importorskip("chunked_embed.kernels._triton_splade")

pytestmark = MARKS
DTYPE = torch.float16 if INTERPRETED else torch.bfloat16  # of which the interpreter multiplies the bits
BOUND = {torch.float16: 6e-4, torch.bfloat16: 4e-3}  # of a gradient that is rounded twice

# Texts that end within a group, with one, with a tile and beyond it, without tokens, and several in a tile; columns and
# depths that fill no tile, and operands that are no multiple of 16 bytes apart.
LENGTHS = {
    "short": ([3, 1, 2], 40, 24),
    "in several tiles": ([5, 0, 16, 70, 1, 0, 33], 90, 40),
    "odd": ([17, 66, 4], 77, 33),
} | ({} if INTERPRETED else {"long": ([200, 256, 128, 1000, 3], 3001, 768)})


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """In the interpreter, where scans go number by number: more tiles of fewer numbers."""
    if INTERPRETED:
        sizes = {"COLUMNS": 32, "ROWS": 32, "FEW": 16, "TILE": 32, "ENTRIES": 16, "MARKED": 32, "LISTED": 64}
        for name, size in sizes.items():
            monkeypatch.setattr(kernels, name, size)


def case(lengths, columns, width, dtype=DTYPE, bias=True):
    generator = torch.Generator().manual_seed(columns)
    n, longest = len(lengths), max(lengths)
    hidden = torch.randn(n, longest, width, generator=generator).mul_(0.4)
    weight = torch.randn(columns, width, generator=generator).mul_(0.4)
    added = torch.randn(columns, generator=generator) if bias else None
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    leaves = [t if t is None else exact(t).to(dtype).to(DEVICE).requires_grad_() for t in (hidden, weight, added)]
    return leaves, mask.to(DEVICE)


def truth(leaves, mask, pooling="max", activation="relu"):
    hidden, weight, bias = (t if t is None else t.detach().double().requires_grad_() for t in leaves)
    z = hidden @ weight.T + (0 if bias is None else bias)
    z = (z * mask[..., None]).relu().log1p()
    z = z.log1p() if activation == "log1p_relu" else z
    pooled = z.max(1).values if pooling == "max" else z.sum(1)
    return pooled, [t for t in (hidden, weight, bias) if t is not None]


def assert_gradients(found, leaves, expected, exact, upstream, bound):
    given = torch.autograd.grad(
        found, [t for t in leaves if t is not None], upstream.to(found.dtype), retain_graph=True
    )
    for a, b in zip(given, torch.autograd.grad(expected, exact, upstream.double(), retain_graph=True), strict=True):
        assert (a.double() - b).norm() <= bound * b.norm(), (a.double() - b).norm() / b.norm()


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(
    ("pooling", "activation", "bias"),
    [("max", "relu", True), ("max", "log1p_relu", False), ("sum", "relu", False), ("sum", "log1p_relu", True)],
)
def test_values_and_gradients(lengths, pooling, activation, bias):
    leaves, mask = case(*LENGTHS[lengths], bias=bias)
    expected, exact = truth(leaves, mask, pooling, activation)
    found = CF.splade_pool(*leaves, mask=mask, pooling=pooling, activation=activation, dtype=torch.float32)
    torch.testing.assert_close(found.double(), expected, rtol=3e-6, atol=1e-5)
    upstream = torch.randn(found.shape, device=DEVICE)
    assert_gradients(found, leaves, expected, exact, upstream, BOUND[DTYPE])
    upstream = torch.where(torch.rand_like(upstream) < 0.02, upstream, 0.0)  # few entries, and tiles without any
    assert_gradients(found, leaves, expected, exact, upstream, BOUND[DTYPE])
    with torch.no_grad():
        alone = CF.splade_pool(*leaves, mask=mask, pooling=pooling, activation=activation, dtype=torch.float32)
    assert torch.equal(alone, found)


@pytest.mark.parametrize("learning", [0, 1, 2])
@pytest.mark.parametrize("pooling", ["max", "sum"])
def test_one_that_learns(learning, pooling):
    leaves, mask = case(*LENGTHS["odd"])
    expected, exact = truth(leaves, mask, pooling)
    for n, leaf in enumerate(leaves):
        leaf.requires_grad_(n == learning)
    found = CF.splade_pool(*leaves, mask=mask, pooling=pooling, dtype=torch.float32)
    upstream = torch.randn(found.shape, device=DEVICE)
    assert_gradients(
        found, leaves[learning : learning + 1], expected, exact[learning : learning + 1], upstream, BOUND[DTYPE]
    )


@pytest.mark.parametrize("pooling", ["max", "sum"])
def test_the_twin_is_the_kernel(pooling, monkeypatch):
    leaves, mask = case(*LENGTHS["in several tiles"])
    found = CF.splade_pool(*leaves, mask=mask, pooling=pooling, dtype=torch.float32)
    grads = torch.autograd.grad(found.sum(), leaves)
    monkeypatch.setattr(splade, "available", lambda device: False)
    twin = CF.splade_pool(*leaves, mask=mask, pooling=pooling, dtype=torch.float32)
    torch.testing.assert_close(found, twin, rtol=3e-6, atol=3e-6)
    for a, b in zip(grads, torch.autograd.grad(twin.sum(), leaves)):
        assert (a.double() - b.double()).norm() <= 2 * BOUND[DTYPE] * b.double().norm()


@pytest.mark.parametrize("copies", [[3, 4], [2, 20], [15, 16, 69]])
def test_the_first_of_equal_ones(copies):
    leaves, _ = case([80, 80], 60, 16)
    with torch.no_grad():
        leaves[0][:, copies] = 8 * leaves[0][:, copies[:1]]
    found = CF.splade_pool(*leaves)
    (grad,) = torch.autograd.grad(found.sum(), leaves[:1])
    assert (grad[:, copies[0]] != 0).any()
    assert (grad[:, copies[1:]] == 0).all()


@pytest.mark.parametrize("strided", [False, True])
def test_rows_in_any_order_and_place(strided):
    """Left padding, holes, texts out of order, rows that are dropped, operands that are views."""
    leaves, mask = case([90, 70, 40], 70, 48)
    generator = torch.Generator().manual_seed(1)
    mask = mask & (torch.rand(mask.shape, generator=generator) < 0.7).to(DEVICE)
    mask[:, 5] = True
    hidden, weight, bias = leaves
    expected, exact = truth(leaves, mask)
    if strided:
        hidden, weight = hidden.transpose(1, 2).contiguous().transpose(1, 2), weight.t().contiguous().t()
    upstream = torch.randn(expected.shape, device=DEVICE)
    found = CF.splade_pool(hidden, weight, bias, mask=mask, dtype=torch.float32)
    assert_gradients(found, leaves, expected, exact, upstream, BOUND[DTYPE])
    turned = torch.randperm(mask.numel(), generator=generator).to(DEVICE)
    ids = torch.where(mask, torch.arange(3, device=DEVICE)[:, None], -1).flatten()[turned].int()
    found = CF.splade_pool(hidden.flatten(0, 1)[turned], weight, bias, ids, dtype=torch.float32)
    torch.testing.assert_close(found.double(), expected, rtol=3e-6, atol=1e-5)
    assert_gradients(found, leaves, expected, exact, upstream, BOUND[DTYPE])


def test_nan_is_not_lost():
    leaves, mask = case([70, 20], 50, 16)
    with torch.no_grad():
        leaves[0][1, 3, 0] = torch.nan
    found = CF.splade_pool(*leaves, mask=mask)
    assert found[1].isnan().all() and found[0].isfinite().all()


@pytest.mark.parametrize("size", [1e-9, 1e6])
@pytest.mark.parametrize("pooling", ["max", "sum"])
def test_float16_keeps_its_range(size, pooling):
    leaves, mask = case([20, 9], 50, 16, torch.float16)
    expected, exact = truth(leaves, mask, pooling)
    wide = [leaf.detach().float().requires_grad_() for leaf in leaves]
    with torch.autocast(DEVICE, torch.float16):
        found = CF.splade_pool(*wide, mask=mask, pooling=pooling)
    assert_gradients(found, wide, expected, exact, torch.full(found.shape, size, device=DEVICE), BOUND[torch.float16])


def test_the_same_to_the_last_bit():
    leaves, mask = case(*LENGTHS["in several tiles"])
    first, second = (
        torch.autograd.grad(CF.splade_pool(*leaves, mask=mask).float().square().sum(), leaves) for _ in range(2)
    )
    assert all(map(torch.equal, first, second))


@pytest.mark.skipif(INTERPRETED, reason="measures a GPU's memory")
@pytest.mark.parametrize(("pooling", "most"), [("max", 0.6), ("sum", 1.0)])
def test_memory(pooling, most):
    """256 texts of up to 256 tokens: their outputs would take 4 GB."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    leaves = [
        torch.randn(*shape, device=DEVICE, dtype=DTYPE, generator=generator).mul_(0.05)
        for shape in ((256, 256, 768), (30_522, 768))
    ]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    mask = torch.arange(256, device=DEVICE) < torch.arange(1, 257, device=DEVICE)[:, None]
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        grads = torch.autograd.grad(CF.splade_pool(*leaves, mask=mask, pooling=pooling).float().sum(), leaves)
        peak = torch.cuda.max_memory_allocated() - before
        del grads
    assert peak < most * 2**30
