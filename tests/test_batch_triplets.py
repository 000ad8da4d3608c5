"""Mined triplets, MegaBatchMargin and orthogonal regularisation on tensors, against plain formulas over N x N."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from chunked_embed import functional as CF
from chunked_embed.chunking import Chunking
from chunked_embed.functional import spread
from chunked_embed.functional.batch_triplets import Labelled, mean_over_triplets

DISTANCES = ("euclidean", "squared_euclidean", "cosine")


# --- the formulas, as loops over all pairs and triplets ---------------------------------------------------------------


def distance_matrix(x: Tensor, distance: str) -> Tensor:
    if distance == "cosine":
        return 1 - F.normalize(x, dim=1) @ F.normalize(x, dim=1).T
    squared = (x[:, None] - x).square().sum(-1)
    if distance == "squared_euclidean":
        return squared
    some = squared > 0
    return torch.where(some, torch.where(some, squared, 1.0).sqrt(), 0.0)


def sides(labels: Tensor, a: int) -> tuple[list[int], list[int]]:
    n = len(labels)
    return (
        [p for p in range(n) if p != a and labels[p] == labels[a]],
        [j for j in range(n) if labels[j] != labels[a]],
    )


def hard(x: Tensor, labels: Tensor, margin: float, distance: str, soft: bool = False) -> Tensor:
    d = distance_matrix(x, distance)
    values = []
    for a in range(len(x)):
        positives, negatives = sides(labels, a)
        difference = x.sum() * 0
        if negatives:
            farthest = d[a, positives].max() if positives else 0.0
            difference = farthest - d[a, negatives].min()
        values.append(F.softplus(difference) if soft else F.relu(difference + margin))
    return torch.stack(values).mean()


def soft(x: Tensor, labels: Tensor, margin: float, distance: str) -> Tensor:
    return hard(x, labels, margin, distance, soft=True)


def semi_hard(x: Tensor, labels: Tensor, margin: float, distance: str) -> Tensor:
    d = distance_matrix(x, distance)
    values = [x.sum() * 0]
    for a in range(len(x)):
        positives, negatives = sides(labels, a)
        for p in positives:
            beyond = [j for j in negatives if d[a, j] > d[a, p]]
            chosen = d[a, beyond].min() if beyond else d[a, negatives].max() if negatives else 0.0
            values.append(F.relu(d[a, p] - chosen + margin))
    return torch.stack(values).sum() / max(len(values) - 1, 1)


def every(x: Tensor, labels: Tensor, margin: float, distance: str, count_too: bool = False):
    """Of the definition, without counting: a triplet of exactly zero keeps its gradient, as in the library."""
    d = distance_matrix(x, distance)
    values, count = [x.sum() * 0], 0
    for a in range(len(x)):
        for p, j in itertools.product(*sides(labels, a)):
            triplet = d[a, p] - d[a, j] + margin
            count += bool(triplet > 1e-16)
            values.append(torch.where(triplet < 0, 0.0, triplet))
    loss = torch.stack(values).sum() / count if count else values[0]
    return (loss, count) if count_too else loss


FORMULAS = {"hard": hard, "soft": soft, "semi-hard": semi_hard, "all": every}


def ours(name: str, x: Tensor, labels: Tensor, margin: float, distance: str, **options) -> Tensor:
    options = {"distance": distance, "compiled": False, **options}
    if name == "soft":
        return CF.batch_hard_triplet(x, labels, soft=True, **options)
    function = {"hard": CF.batch_hard_triplet, "semi-hard": CF.batch_semi_hard_triplet, "all": CF.batch_all_triplet}
    return function[name](x, labels, margin=margin, **options)


def mega(a: Tensor, p: Tensor, positive_margin: float = 0.8, negative_margin: float = 0.3) -> Tensor:
    similarity = F.normalize(a, dim=1) @ F.normalize(p, dim=1).T
    own = torch.eye(len(a), dtype=torch.bool)
    loss = F.relu(positive_margin - similarity.diagonal())
    return (loss + F.relu(similarity.masked_fill(own, -torch.inf).amax(1) - negative_margin)).mean()


def orthogonal(x: Tensor, similarity: str) -> tuple[Tensor, Tensor]:
    u = F.normalize(x, dim=1) if similarity == "cosine" else x
    others = (u @ u.T).masked_fill(torch.eye(len(x), dtype=torch.bool), 0.0)
    pairs = max(len(x) * (len(x) - 1), 1)
    return (others.sum() / pairs).square(), F.relu(others.square().sum() / pairs - 1 / x.shape[1])


def same(mine: Tensor, theirs: Tensor, leaves: list[Tensor], rtol: float = 1e-9, atol: float = 1e-11) -> None:
    torch.testing.assert_close(mine, theirs, rtol=rtol, atol=atol)
    found = [torch.autograd.grad(1.5 * loss, leaves, retain_graph=True) for loss in (mine, theirs)]
    for x, y in zip(*found):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol)


def batch(rows: int, classes: int, width: int = 5, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + classes)
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return x, torch.randint(0, classes, (rows,), generator=generator)


# --- triplets ---------------------------------------------------------------------------------------------------------


# One row; all of one class; every row a class of its own; some of each.
@pytest.mark.parametrize("rows, classes", [(1, 1), (2, 1), (9, 1), (6, 99), (13, 3), (17, 9)])
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("name", FORMULAS)
def test_formula(name: str, distance: str, rows: int, classes: int) -> None:
    x, labels = batch(rows, classes)
    for margin, chunk_size in ((5.0, None), (0.4, 4), (-0.2, 1)):
        mine = ours(name, x, labels, margin, distance, chunk_size=chunk_size)
        same(mine, FORMULAS[name](x, labels, margin, distance), [x])


@pytest.mark.parametrize("labels", [torch.tensor([True, False] * 4), torch.tensor([0.5, -1.0] * 4)], ids=str)
@pytest.mark.parametrize("name", FORMULAS)
def test_labels_of_any_kind(name: str, labels: Tensor) -> None:
    x, _ = batch(8, 2)
    same(ours(name, x, labels, 0.5, "cosine"), ours(name, x, (labels > 0).long(), 0.5, "cosine"), [x])


points = st.lists(
    st.tuples(st.integers(-2, 2), st.integers(-2, 2), st.sampled_from([0, 0, 1, 2])), min_size=1, max_size=9
)


@settings(max_examples=150, deadline=None)
@given(points, st.sampled_from([-1.0, 0.0, 1.0, 2.0, 5.0]), st.sampled_from(["euclidean", "squared_euclidean"]))
def test_all_triplets_of_points_on_a_grid(drawn: list, margin: float, distance: str) -> None:
    """Coinciding points, distances that are equal, triplets of exactly zero."""
    x = torch.tensor([point[:2] for point in drawn], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([point[2] for point in drawn])
    theirs, count = every(x, labels, margin, distance, count_too=True)
    if margin in (0.0, 5.0) or distance == "squared_euclidean":
        same(ours("all", x, labels, margin, distance, chunk_size=4), theirs, [x], atol=1e-9)
    else:  # whether sqrt(2) - sqrt(8) + sqrt(2) is above zero is a matter of rounding; the sum is not
        total, _ = Labelled(x, labels, x, labels, 0, distance, Chunking(compiled=False)).all(margin)
        torch.testing.assert_close(total, theirs * max(count, 1), rtol=1e-9, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(points, st.sampled_from([0.0, 2.0]))
def test_mined_triplets_of_points_on_a_grid(drawn: list, margin: float) -> None:
    """Of several that are equally hard, any may be taken: values are the formula's, gradients finite."""
    x = torch.tensor([point[:2] for point in drawn], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([point[2] for point in drawn])
    for name in ("hard", "soft", "semi-hard"):
        mine = ours(name, x, labels, margin, "squared_euclidean", chunk_size=4)
        torch.testing.assert_close(mine, FORMULAS[name](x, labels, margin, "squared_euclidean"))
        assert torch.autograd.grad(mine, x)[0].isfinite().all()


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("distance", DISTANCES)
def test_equal_and_zero_rows_stay_finite(name: str, distance: str) -> None:
    labels = torch.tensor([0, 0, 1, 1, 2, 3])
    repeated = torch.randn(768, generator=torch.Generator().manual_seed(0)).repeat(6, 1)
    for x in (torch.ones(6, 8), torch.zeros(6, 8), repeated, torch.tensor([[1e15, 0.0], [0.0, 1e15]] * 3)):
        x = x.clone().requires_grad_()
        loss = ours(name, x, labels, 0.5, distance)
        loss.backward()
        assert loss.isfinite() and x.grad.isfinite().all()
        if distance != "cosine" and (x == x[0]).all():
            assert not x.grad.any()
            assert loss.item() == pytest.approx(math.log(2) if name == "soft" else 0.5, rel=1e-6)


@pytest.mark.parametrize("name", FORMULAS)
def test_not_a_number_is_not_hidden(name: str) -> None:
    x, labels = batch(6, 2)
    x = x.detach().clone()
    x[2, 0] = torch.nan
    assert ours(name, x, labels, 0.5, "euclidean").isnan()


def test_no_triplet_counts() -> None:
    """The library divides by 1e-16 there."""
    x, labels = batch(8, 3)
    loss = CF.batch_all_triplet(x, labels, margin=-100.0, compiled=False)
    loss.backward()
    assert loss.item() == 0 and not x.grad.any()
    assert mean_over_triplets(torch.ones(()), torch.tensor(0)).item() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("name", FORMULAS)
def test_half_precision(name: str, distance: str, dtype: torch.dtype) -> None:
    """Of the same rounded numbers: only the gradient is rounded again."""
    x, labels = batch(24, 5, 32, dtype)
    exact = x.detach().double().requires_grad_()
    mine, theirs = (ours(name, z, labels, 0.5, distance, chunk_size=7) for z in (x, exact))
    assert mine.dtype == torch.float32
    torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-6)
    mine.backward()
    theirs.backward()
    assert x.grad.dtype == dtype
    error = (x.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert error < {torch.float16: 0.003, torch.bfloat16: 0.02}[dtype]


@pytest.mark.parametrize("name", FORMULAS)
def test_under_autocast(name: str) -> None:
    """Distances are differences: bfloat16 products would drown them."""
    x, labels = batch(12, 3, 16, torch.float32)
    plain = ours(name, x, labels, 0.5, "euclidean")
    with torch.autocast("cpu", torch.bfloat16):
        same(ours(name, x, labels, 0.5, "euclidean"), plain, [x])


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("name", FORMULAS)
def test_some_rows_against_all(name: str, distance: str) -> None:
    """What a process of several computes: shares that add up to the whole."""
    x, labels = batch(13, 3)
    shares, counts = [], []
    for part in (slice(0, 5), slice(5, 13)):
        rows = Labelled(x[part], labels[part], x, labels, part.start, distance, Chunking(3, compiled=False))
        weight = len(rows.rows) / 13
        if name == "all":
            total, count = rows.all(0.4)
            shares.append(total)
            counts.append(count)
        else:
            shares.append(rows.semi_hard(0.4) if name == "semi-hard" else rows.hard(0.4, name == "soft") * weight)
    whole = sum(shares)
    if counts:
        whole = mean_over_triplets(whole, sum(counts))
    same(whole, ours(name, x, labels, 0.4, distance), [x])


@pytest.mark.parametrize("name", FORMULAS)
def test_memory_does_not_hold_the_matrix(name: str) -> None:
    """Nothing that autograd sees is larger than a chunk of rows, or the embeddings."""
    x, labels = batch(600, 20, 8, torch.float32)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        loss = ours(name, x, labels, 0.5, "euclidean", chunk_size=64)
    loss.backward()
    assert kept and max(kept) <= 64 * 600


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMULAS)
def test_compiled(name: str) -> None:
    x, labels = batch(23, 4)
    for rows in (23, 9):
        mine = ours(name, x[:rows], labels[:rows], 0.4, "euclidean", compiled=True, chunk_size=8)
        same(mine, FORMULAS[name](x[:rows], labels[:rows], 0.4, "euclidean"), [x])


# --- MegaBatchMargin --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 13])
def test_mega_batch_margin(rows: int) -> None:
    (a, _), (p, _) = batch(rows, 1), batch(rows, 2)
    for margins, chunk_size in (((0.8, 0.3), None), ((0.2, -0.5), 4)):
        named = dict(zip(("positive_margin", "negative_margin"), margins))
        mine = CF.mega_batch_margin(a, p, **named, chunk_size=chunk_size, compiled=False)
        same(mine, mega(a, p, *margins), [a, p])


def test_mega_batch_margin_of_one_tensor_twice_and_half_precision() -> None:
    x, _ = batch(9, 1, 16)
    same(CF.mega_batch_margin(x, x, compiled=False), mega(x, x), [x])
    half = x.detach().bfloat16().requires_grad_()
    loss = CF.mega_batch_margin(half, half.flip(0), compiled=False)
    loss.backward()
    assert loss.dtype == torch.float32 and half.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss.double(), mega(half.double(), half.double().flip(0)), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_mega_batch_margin_compiled() -> None:
    (a, _), (p, _) = batch(13, 1), batch(13, 2)
    same(CF.mega_batch_margin(a, p, chunk_size=4), mega(a, p), [a, p])


# --- orthogonal regularisation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 12, 2**22])
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 33])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_orthogonal_terms(similarity: str, rows: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spread, "BLOCK", block)
    x, _ = batch(rows, 1)
    mine, theirs = CF.orthogonal_regularization(x, similarity=similarity), orthogonal(x, similarity)
    assert mine._fields == ("mean", "second_moment")
    for term, expected in zip(mine, theirs):
        same(term, expected, [x], atol=1e-10)


def test_orthogonal_terms_of_a_few_long_rows_in_float32() -> None:
    """Off the diagonal there is next to nothing: in float32 its squares would drown in the diagonal's."""
    x, _ = batch(4, 1, 3000)
    mine, theirs = CF.orthogonal_regularization(x.float()), orthogonal(x, "cosine")
    torch.testing.assert_close(mine.mean.double(), theirs[0], rtol=1e-4, atol=0)
    torch.testing.assert_close(mine.second_moment.double(), theirs[1], rtol=1e-4, atol=1e-12)
    assert mine.mean.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_orthogonal_terms_in_half_precision(dtype: torch.dtype) -> None:
    x, _ = batch(50, 1, 6, dtype)
    exact = x.detach().double().requires_grad_()
    mine, theirs = sum(CF.orthogonal_regularization(x)), sum(orthogonal(exact, "cosine"))
    assert mine.dtype == torch.float32
    torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-7)
    mine.backward()
    theirs.backward()
    assert x.grad.dtype == dtype and (x.grad.double() - exact.grad).norm() < 0.01 * exact.grad.norm()


def test_orthogonal_terms_of_zero_and_equal_rows_stay_finite() -> None:
    for x in (torch.zeros(4, 3), torch.ones(4, 3)):
        x.requires_grad_()
        terms = CF.orthogonal_regularization(x)
        sum(terms).backward()
        assert all(term.isfinite() for term in terms) and x.grad.isfinite().all()


def test_orthogonal_terms_without_gradient_and_twice() -> None:
    x, _ = batch(9, 1)
    with torch.no_grad():
        assert not CF.orthogonal_regularization(x).mean.requires_grad
    loss = sum(CF.orthogonal_regularization(x))
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(loss, x, create_graph=True)


# --- what is refused --------------------------------------------------------------------------------------------------

X, Y = torch.randn(4, 3), torch.tensor([0, 0, 1, 1])
BAD = {
    "labels of another length": (lambda f: f(X, Y[:3]), ValueError, r"\(4,\)"),
    "labels that are NaN": (lambda f: f(X, torch.full((4,), torch.nan)), ValueError, "NaN"),
    "three dimensions": (lambda f: f(X[None], Y), ValueError, r"got \(1, 4, 3\)"),
    "no rows": (lambda f: f(X[:0], Y[:0]), ValueError, "at least one row"),
    "integers": (lambda f: f(X.long(), Y), TypeError, "floating point"),
    "an unknown distance": (lambda f: f(X, Y, distance="manhattan"), ValueError, "squared_euclidean"),
    "an infinite margin": (lambda f: f(X, Y, margin=math.inf), ValueError, "margin to be a finite"),
    "a chunk of nothing": (lambda f: f(X, Y, chunk_size=0), ValueError, "chunk_size"),
}


@pytest.mark.parametrize("function", [CF.batch_hard_triplet, CF.batch_semi_hard_triplet, CF.batch_all_triplet])
@pytest.mark.parametrize("case", BAD)
def test_refuses(case: str, function) -> None:
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call(function)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: CF.mega_batch_margin(X, X[:3]), ValueError, r"one shape, got anchors \(4, 3\), positives \(3, 3\)"),
        (lambda: CF.mega_batch_margin(X, X.double()), TypeError, "one dtype"),
        (lambda: CF.mega_batch_margin(X, X, negative_margin=math.nan), ValueError, "negative_margin"),
        (lambda: CF.orthogonal_regularization(X[0]), ValueError, r"\(N, D\)"),
        (lambda: CF.orthogonal_regularization(X, similarity="euclidean"), ValueError, "cosine"),
        (lambda: CF.orthogonal_regularization([X]), TypeError, "list"),
    ],
)
def test_refuses_too(call, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call()
