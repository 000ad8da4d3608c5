"""Embedding losses on plain tensors against the quadratic formulas, on nasty input."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from chunked_embed import functional as CF

OPTIONS = {"compiled": False}


def quadratic(scores, labels):
    """The definition, all pairs at once."""
    differences = torch.where(labels[:, None] < labels, scores[:, None] - scores, -torch.inf)
    return torch.cat([scores.new_zeros(1), differences.flatten()]).logsumexp(0)


finite = st.floats(-1e4, 1e4, allow_nan=False)
pairs = st.lists(st.tuples(finite, st.sampled_from([0.0, 0.2, 0.2, 0.7, 1.0])), min_size=1, max_size=25)


@settings(max_examples=200, deadline=None)
@given(pairs)
def test_cosent_is_the_double_sum(drawn):
    scores = torch.tensor([s for s, _ in drawn], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([y for _, y in drawn])
    mine, theirs = CF.cosent_from_scores(scores, labels), quadratic(scores, labels)
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    a, b = (torch.autograd.grad(loss, scores)[0] for loss in (mine, theirs))
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("labels", [torch.zeros(9), torch.arange(9), torch.arange(9) > 4, torch.tensor([0.5] * 9)])
def test_cosent_from_scores_of_any_dtype_stays_finite(dtype, labels):
    scores = (torch.linspace(-3e4, 3e4, 9)).to(dtype).requires_grad_()
    loss = CF.cosent_from_scores(scores, labels)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(scores.grad).all() and scores.grad.dtype == dtype
    if (labels == labels[0]).all():
        assert loss.item() == 0 and not scores.grad.any()


def test_cosent_gradcheck_and_scale():
    scores = torch.randn(7, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 1, 2, 0, 3, 2])
    assert torch.autograd.gradcheck(lambda s: CF.cosent_from_scores(s, labels, scale=3.0), scores)
    torch.testing.assert_close(CF.cosent_from_scores(scores, labels, scale=3.0), quadratic(3 * scores, labels))


def test_cosent_of_many_pairs_is_linear_in_memory():
    """65,536 pairs: the quadratic form would need 32 GiB."""
    n = 65_536
    scores = torch.randn(n, requires_grad=True)
    loss = CF.cosent_from_scores(scores, torch.randint(0, 26, (n,)), scale=20.0)
    loss.backward()
    assert math.isfinite(loss.item())
    assert abs(scores.grad.sum().item()) < 1e-3  # shifting all scores changes nothing


def project(x, weight, bias, activation, normalize):
    x = activation(x @ weight.T + bias) if weight is not None else x
    return F.normalize(x, dim=1) if normalize else x


REFERENCES = {
    "cosent": lambda a, b, c, y: quadratic(20 * F.cosine_similarity(a, b), y),
    "angle": lambda a, b, c, y: quadratic(20 * angle_in_complex_numbers(a, b), y),
    "euclidean": lambda a, b, c, y: F.relu((a - b).norm(dim=1) - (a - c).norm(dim=1) + 0.5).mean(),
    "manhattan": lambda a, b, c, y: F.relu((a - b).norm(1, dim=1) - (a - c).norm(1, dim=1) + 0.5).mean(),
    "cosine": lambda a, b, c, y: F.relu(F.cosine_similarity(a, c) - F.cosine_similarity(a, b) + 0.5).mean(),
}


def angle_in_complex_numbers(a, b):
    """The definition: dimension i is the real and i + D/2 the imaginary part of a complex number."""
    a, b = (torch.complex(*F.pad(F.normalize(x, dim=1), (0, x.shape[1] % 2)).chunk(2, 1)) for x in (a, b))
    product = a * b.conj()
    return (product.real + product.imag).sum(1).abs()


def ours(name, a, b, c, y, **options):
    if name in ("cosent", "angle"):
        return getattr(CF, name)(a, b, y, **OPTIONS | options)
    return CF.triplet(a, b, c, margin=0.5, distance=name, **OPTIONS | options)


@pytest.mark.parametrize("name", list(REFERENCES))
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "projected"])
@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "normalised"])
@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("width", [5, 6])
def test_losses_and_the_projection_fused_into_them(name, fused, normalize, chunk_size, width):
    torch.manual_seed(width)
    sides = [torch.randn(11, 7, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    weight = torch.randn(width, 7, dtype=torch.float64, requires_grad=True) if fused else None
    bias = torch.randn(width, dtype=torch.float64, requires_grad=True) if fused else None
    labels = torch.randint(0, 4, (11,))
    activation = torch.tanh if fused else None
    mine = ours(
        name,
        *sides,
        labels,
        weight=weight,
        bias=bias,
        activation=activation,
        normalize=normalize,
        chunk_size=chunk_size,
    )
    theirs = REFERENCES[name](*(project(x, weight, bias, activation, normalize) for x in sides), labels)
    torch.testing.assert_close(mine, theirs)
    leaves = sides[: 2 if name in ("cosent", "angle") else 3] + ([weight, bias] if fused else [])
    for x, y in zip(torch.autograd.grad(mine, leaves), torch.autograd.grad(theirs, leaves), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("name", list(REFERENCES))
def test_coinciding_and_zero_embeddings_stay_finite(name):
    sides = [torch.zeros(4, 6, requires_grad=True) for _ in range(3)]
    with torch.no_grad():
        for side in sides:
            side[2:] = 1.0
    loss = ours(name, *sides, torch.arange(4.0))
    loss.backward()
    assert torch.isfinite(loss) and all(x.grad is None or torch.isfinite(x.grad).all() for x in sides)


@pytest.mark.parametrize("similarity", list(CF.SIMILARITIES))
def test_half_precision_scores_are_float32(similarity):
    a, b = (torch.randn(5, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    scores = CF.pairwise_scores(a, b, similarity=similarity, **OPTIONS)
    exact = CF.pairwise_scores(a.detach().double(), b.detach().double(), similarity=similarity, **OPTIONS)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(REFERENCES))
def test_compiled(name):
    sides = [torch.randn(11, 6, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    labels = torch.randint(0, 4, (11,))
    leaves = sides[: 2 if name in ("cosent", "angle") else 3]
    mine, theirs = ours(name, *sides, labels, compiled=True), REFERENCES[name](*sides, labels)
    torch.testing.assert_close(mine, theirs)
    for x, y in zip(torch.autograd.grad(mine, leaves), torch.autograd.grad(theirs, leaves), strict=True):
        torch.testing.assert_close(x, y)
