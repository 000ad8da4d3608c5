"""Embedding losses on plain tensors against the quadratic formulas, on nasty input."""

from __future__ import annotations

import functools
import gc
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from chunked_embed import functional as CF
from chunked_embed.functional import arguments

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


# --- arguments of all kinds ------------------------------------------------------------------------------------------


def embeddings(n=5, count=2, width=4):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, width, generator=generator, requires_grad=True) for _ in range(count)]


def test_an_activation_may_be_a_module():
    (a, b), weight = embeddings(), torch.randn(3, 4)
    modules = {torch.tanh: torch.nn.Tanh(), None: torch.nn.Identity(), F.gelu: torch.nn.GELU(), F.elu: torch.nn.ELU()}
    for function, module in modules.items():
        mine, theirs = (
            CF.pairwise_scores(a, b, weight=weight, activation=activation, **OPTIONS)
            for activation in (module, function)
        )
        torch.testing.assert_close(mine, theirs)
        torch.testing.assert_close(*(torch.autograd.grad(scores.sum(), a)[0] for scores in (mine, theirs)))


def test_what_learns_in_an_activation():
    a, b, c = embeddings(count=3)
    learns = torch.nn.PReLU()
    for call in (
        lambda f: CF.cosent(a, b, torch.arange(5), activation=f, **OPTIONS),
        lambda f: CF.triplet(a, b, c, activation=f, **OPTIONS),
    ):
        with pytest.raises(ValueError, match=r"without parameters that learn, got PReLU with \['weight'\]"):
            call(learns)
        with pytest.raises(ValueError, match=r"what learns to be an argument of \w+, got learns"):
            call(lambda x: learns(x))
    CF.info_nce(a, b, activation=learns, **OPTIONS).backward()  # ordinary autograd
    assert learns.weight.grad is not None and learns.weight.grad.abs() > 0


def test_a_scale_may_be_a_tensor():
    (a, b), labels = embeddings(), torch.arange(5)
    for make in (torch.tensor, lambda x: torch.tensor([x], dtype=torch.float64), lambda x: torch.tensor(x).half()):
        for call in (
            lambda s: CF.cosent(a, b, labels, scale=s, **OPTIONS),
            lambda s: CF.info_nce(a, b, scale=s, **OPTIONS),
            lambda s: CF.sigmoid_pairs(a, b, scale=s, **OPTIONS),
        ):
            plain, learns = call(20.0), make(20.0).requires_grad_()
            torch.testing.assert_close(call(make(20.0)), plain)
            torch.testing.assert_close(call(learns), plain, rtol=1e-5, atol=1e-6)
            (grad,) = torch.autograd.grad(call(learns), learns)
            slope = (call(20.01) - call(19.99)) / 0.02
            torch.testing.assert_close(grad.float().view(()), slope, rtol=2e-2, atol=1e-3)


def test_which_losses_are_kept():
    """With their plans; what may hold a batch is not."""
    a, b = embeddings()

    def kept(activation):
        before = arguments._kept.cache_info().currsize
        for _ in range(2):
            CF.pairwise_scores(a, b, activation=activation() if isinstance(activation, type) else activation, **OPTIONS)
        return arguments._kept.cache_info().currsize - before

    arguments._kept.cache_clear()
    assert [kept(f) for f in (None, torch.tanh, torch.nn.Tanh, F.silu, torch.nn.Mish, doubled)] == [1, 1, 0, 1, 1, 1]
    batch = torch.ones(4)
    assert [kept(f) for f in (lambda x: x * batch, batch.mul, functools.partial(doubled), torch.nn.ELU)] == [0] * 4


def doubled(x, by=2.0):
    return x * by


def test_a_closure_does_not_outlive_its_call():
    a, b = embeddings()

    def call():
        batch = torch.ones(4)
        CF.pairwise_scores(a, b, activation=lambda x: x * batch, **OPTIONS).sum().backward()
        return weakref.ref(batch)

    found = [call() for _ in range(3)]
    gc.collect()
    assert not any(batch() is not None for batch in found)


REFUSED = {
    "a list": (
        lambda a, b: CF.cosent(a.tolist(), b, torch.arange(5)),
        TypeError,
        "expected a to be a tensor, got list",
    ),
    "labels as a list": (lambda a, b: CF.cosent(a, b, [0, 1, 2, 3, 4]), TypeError, "labels to be a tensor, got list"),
    "labels of another length": (lambda a, b: CF.angle(a, b, torch.arange(4)), ValueError, r"labels of shape \(5,\)"),
    "labels that are NaN": (lambda a, b: CF.cosent(a, b, torch.full((5,), math.nan)), ValueError, "without NaN"),
    "a scale as text": (lambda a, b: CF.cosent(a, b, torch.arange(5), scale="20"), TypeError, "number.*got '20'"),
    "a scale below zero": (
        lambda a, b: CF.cosent(a, b, torch.arange(5), scale=torch.tensor(-1.0)),
        ValueError,
        r"zero or more, got -1\.0",
    ),
    "scores that are integers": (
        lambda a, b: CF.cosent_from_scores(torch.arange(5), torch.arange(5)),
        TypeError,
        "scores to be floating point",
    ),
    "a margin that learns": (
        lambda a, b: CF.triplet(a, b, b, margin=torch.nn.Parameter(torch.ones(()))),
        TypeError,
        "margin to be a finite number, got a parameter .* must be an argument",
    ),
    "a margin as a tensor": (
        lambda a, b: CF.triplet(a, b, b, margin=torch.ones(())),
        TypeError,
        r"margin.*item\(\) makes a number of it",
    ),
    "a margin that is a bool": (lambda a, b: CF.triplet(a, b, b, margin=True), TypeError, "got True"),
    "an unknown distance": (lambda a, b: CF.triplet(a, b, b, distance="l2"), ValueError, "distance to be one of.*'l2'"),
    "a distance in a list": (lambda a, b: CF.triplet(a, b, b, distance=["cosine"]), ValueError, "got list"),
    "eps where there is none": (lambda a, b: CF.pairwise_scores(a, b, similarity="dot", eps=1.0), ValueError, "eps"),
    "no candidates": (lambda a, b: CF.pairwise_scores(a, []), ValueError, "at least one b"),
    "one number": (lambda a, b: CF.pairwise_scores(a, 1.0), TypeError, "b to be a sequence of tensors, got 1.0"),
    "an activation as text": (lambda a, b: CF.pairwise_scores(a, b, activation="tanh"), TypeError, "callable or None"),
    "normalize": (lambda a, b: CF.pairwise_scores(a, b, normalize="yes"), TypeError, "normalize to be True or False"),
    "on the meta device": (lambda a, b: CF.pairwise_scores(a.to("meta"), b.to("meta")), ValueError, "a in memory"),
    "on two devices": (lambda a, b: CF.pairwise_scores(a, b.to("meta")), ValueError, "b0 on cpu, got meta"),
    "sparse": (lambda a, b: CF.triplet(a.detach().to_sparse(), b, b), TypeError, "anchor to be a dense tensor"),
    "compiled": (lambda a, b: CF.triplet(a, b, b, compiled="no"), TypeError, "compiled to be True, False or None"),
}


@pytest.mark.parametrize("call, error, message", REFUSED.values(), ids=REFUSED)
def test_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call(*embeddings())
