"""The kernels of pairwise similarities, and their plain twins, against autograd in float64: on a GPU, else through
Triton's interpreter."""

import pytest
import torch
from kernel_device import DEVICE, INTERPRETED, MARKS

from chunked_embed.functional import SIMILARITIES, pairwise_scores
from chunked_embed.kernels import pairwise

pytestmark = MARKS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["kernel", "twin"])
def either(request, monkeypatch):
    if request.param == "twin":
        monkeypatch.setattr(pairwise, "available", lambda device: False)


def sides(rows, columns, dtype, near=False):
    """Two sides, each in a wider buffer of NaN: what is read or written beyond a row shows."""
    generator = torch.Generator().manual_seed(rows * columns)
    a, b = torch.randn(2, rows, columns, generator=generator)
    found = []
    for x in (a, a + 0.01 * b if near else b):
        buffer = torch.full((rows + 1, columns + 3), torch.nan, dtype=dtype, device=DEVICE)
        buffer[:rows, :columns] = x.to(DEVICE, dtype)
        found.append(buffer)
    return found


def truth(a, b, upstream, similarity):
    a, b = (x.double().requires_grad_() for x in (a, b))
    scores = SIMILARITIES[similarity](a, b)
    return scores.detach(), *torch.autograd.grad(scores, (a, b), upstream.double())


def close(found, expected, **tolerance):
    torch.testing.assert_close(found.double(), expected, **tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (9, 300)])
@pytest.mark.parametrize("similarity", pairwise.SIMILARITIES)
def test_scores_and_gradients(similarity, shape, dtype, either):
    (n, width), buffers = shape, sides(*shape, dtype)
    a, b = (buffer[:n, :width] for buffer in buffers)
    upstream = torch.linspace(-1, 2, n, device=DEVICE)
    expected = truth(a, b, upstream, similarity)
    scores, factors = pairwise.pair_scores(a, b, similarity)
    assert scores.dtype == torch.float32
    close(scores, expected[0], rtol=2e-6, atol=2e-6 * width**0.5)

    # To others; one alone; and in their place.
    wide = [torch.full((n, width), torch.nan, device=DEVICE) for _ in "ab"]
    pairwise.pair_gradients_(a, b, factors, upstream, similarity, *wide)
    sums = pairwise.summed_gradients(a, b, factors, upstream, similarity)
    for out, total, grad in zip(wide, sums, expected[1:]):
        close(out, grad, rtol=2e-6, atol=2e-6)
        close(total, grad.sum(0), rtol=2e-6, atol=2e-6 * n)
    alone = torch.full_like(wide[0], torch.nan)
    pairwise.pair_gradients_(a, b, factors, upstream, similarity, None, alone)
    assert torch.equal(alone, wide[1])
    pairwise.pair_gradients_(a, b, factors, upstream, similarity, a, b)
    for out, grad, buffer in zip((a, b), wide, buffers):
        torch.testing.assert_close(
            out, grad.to(dtype), rtol=torch.finfo(dtype).eps, atol=0
        )  # the interpreter truncates
        assert buffer[n:].isnan().all() and buffer[:, width:].isnan().all()


@pytest.mark.parametrize("similarity", ["cosine", "angle"])
def test_near_duplicates_keep_their_digits(similarity, either):
    n, width = 6, 64
    a, b = (buffer[:n, :width] for buffer in sides(n, width, torch.float32, near=True))
    upstream = torch.ones(n, device=DEVICE)
    _, *expected = truth(a, b, upstream, similarity)
    _, factors = pairwise.pair_scores(a, b, similarity)
    found = torch.empty(2, n, width, device=DEVICE)
    pairwise.pair_gradients_(a, b, factors, upstream, similarity, *found)
    for mine, grad in zip(found, expected):
        assert (mine - grad).norm() < 2e-5 * grad.norm()


@pytest.mark.parametrize("similarity", pairwise.SIMILARITIES)
def test_rows_of_zeros_and_other_strides(similarity, either):
    a, b = torch.randn(2, 40, 7, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    a[:, 1], b[:, 2], a[:, 3], b[:, 3] = 0.0, 0.0, 1e-14, -1e-14
    a, b = a.T, b.T  # columns far apart
    upstream = torch.full((7,), 0.5, device=DEVICE)
    expected = truth(a, b, upstream, similarity)
    scores, factors = pairwise.pair_scores(a, b, similarity)
    close(scores, expected[0], rtol=1e-5, atol=1e-5)
    found = torch.empty(2, 7, 40, device=DEVICE)
    pairwise.pair_gradients_(a, b, factors, upstream, similarity, *found)
    for mine, grad in zip(found, expected[1:]):
        close(mine, grad, rtol=1e-5, atol=1e-5)


def test_a_nan_is_not_lost(either):
    a, b = torch.ones(2, 3, 8, device=DEVICE)
    a[1, 5] = torch.nan
    for similarity in pairwise.SIMILARITIES:
        scores, factors = pairwise.pair_scores(a, b, similarity)
        found = torch.empty(2, 3, 8, device=DEVICE)
        pairwise.pair_gradients_(a, b, factors, torch.ones(3, device=DEVICE), similarity, *found)
        assert scores.isnan().tolist() == [False, True, False]
        assert found[1, 1].isnan().any() and not found[:, [0, 2]].isnan().any()


@pytest.mark.skipif(INTERPRETED, reason="sizes for a GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 384, 768, 1024, 4097])
@pytest.mark.parametrize("similarity", pairwise.SIMILARITIES)
def test_on_a_gpu(similarity, width, dtype):
    test_scores_and_gradients(similarity, (5000, width), dtype, None)


@pytest.mark.parametrize("way", ["rows", "one side frozen", "projected", "in chunks", "projected, in chunks"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("similarity", pairwise.SIMILARITIES)
def test_as_the_step_of_a_loss(similarity, dtype, way, monkeypatch):
    calls = []
    kernel = pairwise.pair_gradients_
    monkeypatch.setattr(pairwise, "pair_gradients_", lambda *given: [calls.append(1), kernel(*given)])
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 21, 10, generator=generator).to(DEVICE, dtype).requires_grad_()
    weight, bias = None, None
    if "projected" in way:
        weight = torch.randn(6, 10, generator=generator).to(DEVICE, dtype).requires_grad_()
        bias = torch.randn(6, generator=generator).to(DEVICE, dtype).requires_grad_()
    leaves = [t for t in (a, b, weight, bias) if t is not None]
    if way == "one side frozen":
        a = a.detach()
        leaves = [b]
    options = {"weight": weight, "bias": bias, "similarity": similarity, "chunk_size": 8 if "chunks" in way else None}
    upstream = torch.linspace(-1, 2, 21, device=DEVICE)
    results = []
    for compiled in (True, False):
        scores = pairwise_scores(a, b, compiled=compiled, **options)
        results.append((scores, *torch.autograd.grad(scores, leaves, upstream)))
    assert len(calls) == (3 if "chunks" in way else 1)
    rounding = torch.finfo(dtype).eps
    for n, (mine, plain) in enumerate(zip(*results)):
        assert mine.dtype == plain.dtype
        bound = max(2e-6, 0 if n == 0 else rounding)
        torch.testing.assert_close(mine, plain, rtol=bound, atol=bound * plain.abs().max().item())
