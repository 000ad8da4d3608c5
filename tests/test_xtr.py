"""`xtr_scores` against sentence-transformers' own, all of which is in float64 here, on a CPU."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from largest import Largest
from torch import Tensor

from chunked_embed import functional as CF

DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
EMPTY = -1e9

FORMS = {"all": ("xtr_scores", False), "own": ("xtr_kd_scores", True), "pairs": ("xtr_scores_pairwise", True)}
"""The library's functions, and whether ours is told ``pairs``."""

MASKS = {
    "none": lambda shape: None,
    "all": lambda shape: torch.ones(shape, dtype=torch.bool),
    "right": lambda shape: torch.arange(shape[-1]) < torch.randint(shape[-1] + 1, (*shape[:-1], 1)),
    "left": lambda shape: torch.arange(shape[-1]) >= torch.randint(shape[-1] + 1, (*shape[:-1], 1)),
    "any": lambda shape: (torch.rand(shape) < 0.6).int(),
    "few": lambda shape: (torch.rand(shape) < 0.1).long(),
    "first": lambda shape: (torch.arange(shape[0]) > 0).view(-1, *[1] * (len(shape) - 1)).expand(shape),
    "last": lambda shape: (torch.arange(shape[-2]) < shape[-2] - 1)[:, None].expand(shape),
    "nothing": lambda shape: torch.zeros(shape, dtype=torch.bool),
}  # fmt: skip


def embeddings(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def exact(*shape, most):
    """Whole numbers, whose products are exact and therefore equal wherever equal rows stand."""
    return torch.randint(-most, most + 1, shape).double().requires_grad_()


def case(n=4, q=5, k=3, d=6, h=8, dtype=torch.float64):
    """Where some tokens of each text count, but for one document that has none."""
    torch.manual_seed(n * q + d)
    queries, documents = (embeddings(*shape).detach().to(dtype).requires_grad_() for shape in ((n, q, h), (n, k, d, h)))
    masks = torch.rand(n, q) < 0.7, torch.rand(n, k, d) < 0.7
    masks[0][:, 1], masks[1][..., 2], masks[1][1, 1] = True, True, False
    return queries, documents, *masks


def of_library(queries, documents, query_mask, document_mask, top_k=256, name="xtr_scores"):
    """In float64 throughout, where it would be float32 from the maxima on."""
    scoring = pytest.importorskip("sentence_transformers.multi_vector_encoder.scoring.xtr")
    if name == "xtr_scores" and documents.dim() == 3:
        documents, document_mask = documents[None], None if document_mask is None else document_mask[None]
    masks = [
        torch.ones(t.shape[:-1], dtype=torch.bool) if mask is None else mask
        for t, mask in ((queries, query_mask), (documents, document_mask))
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "float", Tensor.double)
        return getattr(scoring, name)(queries, documents, *masks, top_k=top_k)


def gradients(of, leaves, upstream=None):
    upstream = torch.linspace(-1, 2, of.numel(), dtype=torch.float64).view(of.shape) if upstream is None else upstream
    return torch.autograd.grad((of.cpu().double() * upstream).sum(), leaves, retain_graph=True)


def assert_all_close(found, expected, **tolerance):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b.double(), **tolerance)


def assert_same(queries, documents, query_mask, document_mask, top_k, form="all", device="cpu", **options):
    name, pairs = FORMS[form]
    expected = of_library(queries, documents, query_mask, document_mask, top_k, name)
    there = [t if t is None else t.to(device) for t in (queries, documents, query_mask, document_mask)]
    found = CF.xtr_scores(*there, top_k=top_k, pairs=pairs, **options)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.cpu(), expected, equal_nan=True)
    leaves = [queries, documents]
    assert_all_close(gradients(found, leaves), gradients(expected, leaves), equal_nan=True)
    return found


@DEVICES
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_is_the_librarys(device, data):
    """With chunks of one query token up to all, which end within queries and between them."""
    n, q, k, d, h = (data.draw(st.integers(1, most), label) for label, most in zip("nqkdh", (5, 6, 3, 7, 5)))
    torch.manual_seed(data.draw(st.integers(0, 2**31), "seed"))
    form = data.draw(st.sampled_from(sorted(FORMS)), "form")
    shape = (n, d, h) if form == "pairs" else data.draw(st.sampled_from([(n, k, d, h), (k, d, h)]), "documents")
    if form == "own" and len(shape) == 3:
        shape = n, k, d, h
    queries, documents = embeddings(n, q, h), embeddings(*shape)
    query_mask, document_mask = (
        MASKS[data.draw(st.sampled_from(sorted(MASKS)), "mask")](t.shape[:-1]) for t in (queries, documents)
    )
    pool = documents.shape[:-1].numel()
    top_k = data.draw(st.integers(1, pool + 3), "top_k")
    budget = data.draw(st.none() | st.integers(1, 40 * (8 * pool + 64 * (top_k + pool))), "max_chunk_bytes")
    assert_same(queries, documents, query_mask, document_mask, top_k, form, device, max_chunk_bytes=budget)


@DEVICES
@pytest.mark.parametrize("kind", ["normal", "negative", "unlike"])
@pytest.mark.parametrize("document_mask", [*MASKS])
def test_each_mask_and_similarities_of_each_sign(document_mask, kind, device):
    torch.manual_seed(1)
    queries, documents = embeddings(3, 4, 5), embeddings(3, 2, 6, 5)
    with torch.no_grad():
        if kind == "negative":
            queries.abs_(), documents.abs_().neg_()
        if kind == "unlike":  # in length: what is retrieved is of a few documents
            documents *= torch.tensor([0.01, 1, 100]).view(3, 1, 1, 1)
    of_documents = MASKS[document_mask](documents.shape[:-1])
    for query_mask, top_k in (("any", 1), ("first", 7), ("right", 29), ("first", 1000)):
        mask = MASKS[query_mask](queries.shape[:-1])
        found = assert_same(queries, documents, mask, of_documents, top_k, device=device, max_chunk_bytes=1)
        if kind == "negative":
            assert (found <= 0).all()
        if query_mask == "first":
            assert ((found[0] == 0) | (found[0] == EMPTY)).all()
        if document_mask == "nothing":
            assert (found == EMPTY).all() and not any(grad.any() for grad in gradients(found, [queries, documents]))


@DEVICES
@pytest.mark.parametrize("chunks", [None, 1], ids=["one chunk", "chunks of one token"])
@pytest.mark.parametrize("mask", ["all", "left", "any"])
def test_ties_within_a_document_go_to_the_first(mask, chunks, device):
    """Where all tokens are retrieved, and where copies are, and no others that are equal."""
    torch.manual_seed(1)
    queries, documents = exact(5, 6, 3, most=1), exact(5, 2, 9, 3, most=1)
    masks = MASKS["any"](queries.shape[:-1]), MASKS[mask](documents.shape[:-1])
    for top_k in (90, 1000):
        assert_same(queries, documents, *masks, top_k, device=device, max_chunk_bytes=chunks)
    queries, documents = exact(2, 3, 4, most=1000), exact(4, 5, 4, most=1000)
    copied = documents.repeat_interleave(2, 1)[:, torch.randperm(10)].detach().requires_grad_()
    for top_k in (2, 14):
        assert_same(queries, copied, None, None, top_k, device=device, max_chunk_bytes=chunks)


@DEVICES
@pytest.mark.parametrize("top_k", [1, 20, 300, 10**6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_errors_are_those_of_float32(dtype, top_k, device):
    queries, documents, *masks = case(5, 8, 3, 20, 64, dtype)
    doubles = [t.detach().double().requires_grad_() for t in (queries, documents)]
    expected = of_library(*doubles, *masks, top_k)
    there = [t.to(device) for t in (queries, documents, *masks)]
    found = CF.xtr_scores(*there, top_k=top_k)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.cpu().double(), expected, rtol=2e-6, atol=1e-4 if device == "cuda" else 2e-6)
    bound = {torch.float32: 1e-6, torch.bfloat16: 2e-3, torch.float16: 3e-4}[dtype]  # rounded once
    for a, b in zip(gradients(found, (queries, documents)), gradients(expected, doubles)):
        assert a.dtype == dtype
        assert (a.double() - b).norm() <= bound * b.norm()


def test_autocast():
    queries, documents, *masks = case(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = CF.xtr_scores(queries, documents, *masks, top_k=9)
        mixed = CF.xtr_scores(queries.bfloat16(), documents, *masks, top_k=9)
        wide = CF.xtr_scores(queries.double(), documents.double(), *masks, top_k=9)
    assert found.dtype == torch.float32 and torch.equal(mixed, found)
    rounded = [t.detach().bfloat16().double().requires_grad_() for t in (queries, documents)]
    expected = of_library(*rounded, *masks, 9)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    given = gradients(found, (queries, documents))
    assert {grad.dtype for grad in given} == {torch.float32}
    assert_all_close(given, gradients(expected, rounded), rtol=1e-5, atol=1e-6)  # no gradient is rounded
    torch.testing.assert_close(wide, of_library(queries.double(), documents.double(), *masks, 9))


@pytest.mark.parametrize("top_k", [1, 40, 300, 10**6])
def test_nothing_of_the_grids_size_is_made_or_kept(top_k):
    queries, documents = embeddings(8, 16, 4), embeddings(24, 64, 4)
    tokens, pool, kept = 8 * 16, 24 * 64, []
    options = {"top_k": top_k, "max_chunk_bytes": 4 * (8 * pool + 64 * (min(top_k, pool) + 24))}  # four query tokens

    def keep(t):
        kept.append(t.numel())
        return t

    with Largest() as seen, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        CF.xtr_scores(queries, documents, **options).sum().backward()
    entries, inputs = tokens * min(top_k, 24), pool * 4
    assert max(kept) == max(inputs, entries)
    assert seen.elements <= max(inputs, 2 * entries, 4 * pool) <= tokens * pool / 32  # entries have two places


@DEVICES
def test_the_order_of_sums_is_one(device, monkeypatch):
    """However many tokens are worked on at a time, in both passes, and in whatever order torch retrieves them."""
    queries, documents, *masks = (t.to(device) for t in case(6, 7, 3, 20, 16, torch.float32))
    upstream = torch.randn(6, 18, dtype=torch.float64)
    for top_k in (8, 100):
        scores = (
            CF.xtr_scores(queries, documents, *masks, top_k=top_k, max_chunk_bytes=budget)
            for budget in (None, None, 1, 100_000)
        )
        first, *rest = (gradients(each, (queries, documents), upstream) for each in scores)
        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "topk", lambda *args, **options: [t.flip(1) for t in torch.topk(*args, **options)])
            turned = CF.xtr_scores(queries, documents, *masks, top_k=top_k)
        rest.append(gradients(turned, (queries, documents), upstream))
        assert all(torch.equal(a, b) for again in rest for a, b in zip(first, again))


@pytest.mark.parametrize("learning", [[0], [1], [0, 1], []])
def test_only_what_learns_has_a_gradient(learning):
    *leaves, query_mask, document_mask = case()
    expected = gradients(of_library(*leaves, query_mask, document_mask, 9), leaves)
    for n, leaf in enumerate(leaves):
        leaf.requires_grad_(n in learning)
    found = CF.xtr_scores(*leaves, query_mask, document_mask, top_k=9)
    assert found.requires_grad == bool(learning)
    if learning:
        assert_all_close(gradients(found, [leaves[n] for n in learning]), [expected[n] for n in learning])
    with torch.no_grad():
        assert torch.equal(CF.xtr_scores(*leaves, query_mask, document_mask, top_k=9), found)


def test_tensors_that_are_views_and_one_that_is_both_sides():
    queries, documents, query_mask, document_mask = case()
    turned = [t.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for t in (queries, documents)]
    masks = [m.transpose(0, 1).contiguous().transpose(0, 1) for m in (query_mask, document_mask)]
    assert_same(*turned, *masks, 9, max_chunk_bytes=1)
    found = CF.xtr_scores(queries, queries, query_mask, query_mask, top_k=9)
    expected = of_library(queries, queries, query_mask, query_mask, 9)
    assert_all_close(gradients(found, [queries]), gradients(expected, [queries]))


@DEVICES
@pytest.mark.parametrize("top_k", [1, 9, 1000])
def test_nan_is_not_lost(top_k, device):
    queries, documents, _, document_mask = case()
    with torch.no_grad():
        documents[2, 1, 2, 0] = torch.nan
    found = assert_same(queries, documents, None, document_mask, top_k, device=device)
    assert found[:, 7].isnan().all()  # the most similar to all tokens, in torch.topk
    with torch.no_grad():
        documents[2, 1, 2, 0] = 1.0
        queries[1, 3, 0] = torch.nan
    found = CF.xtr_scores(queries.to(device), documents.to(device), None, document_mask.to(device), top_k=top_k)
    assert found[1].isnan().any() and found[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize(
    ("queries", "documents"),
    [
        ((0, 3, 4), (2, 3, 4)),
        ((2, 0, 4), (2, 3, 4)),
        ((2, 3, 4), (0, 3, 4)),
        ((2, 3, 4), (2, 0, 4)),
        ((2, 3, 0), (2, 3, 0)),
        ((2, 3, 4), (2, 0, 5, 4)),
    ],
    ids=str,
)
def test_nothing_to_score(queries, documents):
    leaves = torch.ones(queries, requires_grad=True), torch.ones(documents, requires_grad=True)
    found = CF.xtr_scores(*leaves)
    assert found.shape == (queries[0], math.prod(documents[:-2]))
    assert (found == (EMPTY if documents[1] == 0 else 0)).all()
    assert [grad.shape for grad in gradients(found, leaves)] == [leaf.shape for leaf in leaves]
    if queries[0] == documents[0]:
        assert CF.xtr_scores(*leaves, pairs=True).shape == documents[:-2]


def test_backward_twice_but_not_of_itself():
    *leaves, query_mask, document_mask = case()
    found = CF.xtr_scores(*leaves, query_mask, document_mask, top_k=9).sum()
    first = torch.autograd.grad(found, leaves, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(found, leaves, retain_graph=True)))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(found, leaves, create_graph=True)


def test_documents_that_change_before_backward():
    queries, documents, *_ = case()
    found = CF.xtr_scores(queries, documents).sum()
    with torch.no_grad():
        documents.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.backward()


@pytest.mark.filterwarnings("ignore:.*grad attribute of a Tensor that is not a leaf")  # dynamo's own
def test_inside_a_compiled_function_and_checkpointing():
    queries, documents, *masks = case()

    def loss(queries, documents):
        return CF.xtr_scores(2 * queries, documents, *masks, top_k=9).logsumexp(1).sum()

    expected = loss(queries, documents)
    wanted = torch.autograd.grad(expected, (queries, documents))
    again = torch.utils.checkpoint.checkpoint(loss, queries, documents, use_reentrant=False)
    for found in (torch.compile(loss, backend="eager")(queries, documents), again):
        torch.testing.assert_close(found, expected)
        assert_all_close(torch.autograd.grad(found, (queries, documents)), wanted)
    with torch.inference_mode():
        assert torch.equal(loss(queries, documents), expected)


QUERIES, DOCUMENTS = torch.zeros(2, 3, 4), torch.zeros(2, 5, 6, 4)
QUERY_MASK, DOCUMENT_MASK = torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 5, 6, dtype=torch.bool)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((QUERIES[0], DOCUMENTS), ValueError, r"expected queries of shape \(N, Q, H\), got \(3, 4\)"),
        ((QUERIES, DOCUMENTS[0, 0]), ValueError, r"documents of shape \(M, D, 4\), or \(G, K, D, 4\), got \(6, 4\)"),
        ((QUERIES, DOCUMENTS[..., :3]), ValueError, r"documents of shape \(M, D, 4\), or .*, got \(2, 5, 6, 3\)"),
        ((QUERIES.tolist(), DOCUMENTS), TypeError, "queries to be a tensor, got list"),
        ((QUERIES.to_sparse(), DOCUMENTS), TypeError, "queries to be a dense tensor"),
        ((QUERIES.int(), DOCUMENTS.int()), TypeError, "queries to be floating point"),
        ((QUERIES, DOCUMENTS.to(torch.int8)), TypeError, "quantised embeddings can't be trained on"),
        ((QUERIES, DOCUMENTS.double()), TypeError, "queries and documents to have one dtype"),
        ((QUERIES, DOCUMENTS.to("meta")), ValueError, "expected documents on cpu, got meta"),
        ((QUERIES, DOCUMENTS, QUERY_MASK.float()), TypeError, "query_mask to be bool or hold integers, got torch"),
        ((QUERIES, DOCUMENTS, QUERY_MASK.t()), ValueError, r"query_mask of shape \(2, 3\), got \(3, 2\)"),
        ((QUERIES, DOCUMENTS, [[1]]), TypeError, "query_mask to be a tensor"),
        ((QUERIES, DOCUMENTS, None, DOCUMENT_MASK.double()), TypeError, "document_mask to be bool or hold integers"),
        ((QUERIES, DOCUMENTS, None, DOCUMENT_MASK[0]), ValueError, r"document_mask of shape \(2, 5, 6\), got \(5, 6\)"),
    ],
    ids=str,
)  # fmt: skip
def test_refusals(arguments, error, message):
    with pytest.raises(error, match=message):
        CF.xtr_scores(*arguments)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"top_k": True}, TypeError, "expected top_k to be a positive integer, got True"),
        ({"top_k": 0}, ValueError, "expected top_k to be a positive integer, got 0"),
        ({"top_k": -3}, ValueError, "expected top_k to be a positive integer, got -3"),
        ({"top_k": 8.0}, TypeError, "expected top_k to be a positive integer, got 8.0"),
        ({"top_k": None}, TypeError, "expected top_k to be a positive integer, got None"),
        ({"max_chunk_bytes": 0}, ValueError, "max_chunk_bytes to be a positive integer or None"),
        ({"pairs": 1}, TypeError, "pairs to be True or False"),
    ],
    ids=str,
)
def test_options_that_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        CF.xtr_scores(QUERIES, DOCUMENTS, **options)


def test_pairs_of_other_documents_than_queries_are_refused():
    with pytest.raises(ValueError, match=r"documents of shape \(2, D, 4\), or \(2, K, D, 4\), with pairs=True, got"):
        CF.xtr_scores(QUERIES, DOCUMENTS[0], pairs=True)
    with pytest.raises(RuntimeError, match=r"torch.func transforms"):
        torch.func.grad(lambda q: CF.xtr_scores(q, DOCUMENTS).sum())(QUERIES)
