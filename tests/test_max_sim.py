"""MaxSim scores and their contrast against plain torch in float64, and against sentence-transformers."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from largest import Largest

from chunked_embed import functional as CF
from chunked_embed.functional import scored

late_interaction = sys.modules["chunked_embed.functional.late_interaction"]
EMPTY = -1e9
BOTH = ("query_to_doc", "doc_to_query")


@pytest.fixture(params=["all at once", "chunks", "chunks, nothing kept"])
def options(request, monkeypatch):
    """Chunks of one query each, and places of maxima that are found again."""
    if "nothing" in request.param:
        monkeypatch.setattr(late_interaction, "CPU_KEPT", 0)
    if request.param == "all at once":
        return {}
    return {"max_chunk_bytes": 1}


def tokens(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def masks(n, q, m, d, seed=0):
    """Some tokens anywhere; one query and one document without any."""
    generator = torch.Generator().manual_seed(seed)
    of_queries, of_documents = (torch.rand(shape, generator=generator) < 0.6 for shape in ((n, q), (m, d)))
    of_queries[:, 0], of_documents[:, -1] = True, True
    of_queries[1], of_documents[2] = False, False
    return of_queries, of_documents


def plain(queries, documents, query_mask=None, document_mask=None, length_normalize=False):
    z = torch.einsum("nqh,mdh->nmqd", queries, documents)
    if document_mask is not None:
        z = z.masked_fill(document_mask[None, :, None] == 0, -torch.inf)
    best = z.max(3).values
    count = torch.full((len(queries),), queries.shape[1])
    if query_mask is not None:
        best, count = best.masked_fill(query_mask[:, None] == 0, 0.0), (query_mask != 0).sum(1)
    scores = best.sum(2)
    if document_mask is not None:
        scores = scores.masked_fill((document_mask == 0).all(1), EMPTY)
    return scores / count.clamp_min(1)[:, None] if length_normalize else scores


def assert_same(found, expected, leaves, **tolerance):
    torch.testing.assert_close(found, expected, **tolerance)
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(5), dtype=found.dtype)
    grads = [torch.autograd.grad(of, leaves, upstream, retain_graph=True) for of in (found, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


# --- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("length_normalize", [False, True])
def test_scores_of_all_pairs(masked, length_normalize, options):
    queries, documents = tokens(4, 5, 8), tokens(6, 7, 8)
    given = [mask if there else None for mask, there in zip(masks(4, 5, 6, 7), masked)]
    found = CF.max_sim(queries, documents, *given, length_normalize=length_normalize, **options)
    assert_same(found, plain(queries, documents, *given, length_normalize), [queries, documents])


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.tuples(*[st.integers(1, 6)] * 5), st.integers(0, 99), st.sampled_from([None, 1, 300]))
def test_random_shapes(shape, seed, max_chunk_bytes):
    n, q, m, d, h = shape
    generator = torch.Generator().manual_seed(seed)
    queries, documents = tokens(n, q, h, seed=seed), tokens(m, d, h, seed=seed + 1)
    given = [torch.rand(s, generator=generator) < 0.5 for s in ((n, q), (m, d))]
    found = CF.max_sim(queries, documents, *given, max_chunk_bytes=max_chunk_bytes)
    assert_same(found, plain(queries, documents, *given), [queries, documents])


def test_scores_are_the_librarys():
    util = pytest.importorskip("sentence_transformers.util", reason="the library's own")
    if not hasattr(util, "maxsim"):
        pytest.skip("a library without late interaction")
    queries, documents = tokens(4, 5, 8, dtype=torch.float32), tokens(6, 7, 8, dtype=torch.float32)
    given = masks(4, 5, 6, 7)
    for normalized in (False, True):
        expected = util.maxsim(queries, documents, *given, length_normalize=normalized)
        found = CF.max_sim(queries, documents, *given, length_normalize=normalized)
        torch.testing.assert_close(found, expected)
        own = documents[:4].unflatten(0, (4, 1)).expand(4, 3, 7, 8)
        expected = util.maxsim_pairwise(queries, own[:, 1], given[0], given[1][:4], length_normalize=normalized)
        many = given[1][:4, None].expand(4, 3, 7)
        found = CF.max_sim_pairs(queries, own, given[0], many, length_normalize=normalized)
        torch.testing.assert_close(found[:, 1], expected)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("single", [False, True])
def test_scores_of_own_documents(single, masked, options):
    queries, documents = tokens(4, 5, 8), tokens(4, 3, 7, 8)
    query_mask, document_mask = masks(4, 5, 12, 7)
    document_mask = document_mask.view(4, 3, 7)
    given = (query_mask, document_mask) if masked else (None, None)
    of_each = [plain(queries, documents[:, k], given[0], document_mask[:, k] if masked else None) for k in range(3)]
    expected = torch.stack([scores.diagonal() for scores in of_each], 1)
    if single:
        found = CF.max_sim_pairs(queries, documents[:, 0], given[0], given[1][:, 0] if masked else None, **options)
        assert_same(found, expected[:, 0], [queries, documents])
    else:
        assert_same(CF.max_sim_pairs(queries, documents, *given, **options), expected, [queries, documents])


def test_ties_go_to_the_first_token(options):
    queries = torch.ones(2, 3, 4, dtype=torch.float64)
    documents = torch.randint(-2, 3, (3, 6, 4), generator=torch.Generator().manual_seed(0)).double()
    documents[:, [1, 4]] = 2.0
    documents.requires_grad_()
    for found in (CF.max_sim(queries, documents, **options), CF.max_sim_pairs(queries, documents[:2], **options)):
        (grad,) = torch.autograd.grad(found.sum(), documents)
        assert (grad[:, [0, 2, 3, 4, 5]] == 0).all() and (grad[:2, 1] != 0).all()


@pytest.mark.parametrize("of", [CF.max_sim, CF.max_sim_pairs, CF.xtr_scores, CF.max_sim_info_nce])
@pytest.mark.parametrize("padding", [torch.nan, torch.inf])
def test_what_padding_holds_does_not_count(of, padding):
    of_queries, of_documents = masks(4, 5, 4, 7)
    of_documents[2, 1] = True
    given = {}
    for value in (0.0, padding):
        leaves = [
            x.detach().masked_fill(~mask[..., None], value).requires_grad_()
            for x, mask in ((tokens(4, 5, 8), of_queries), (tokens(4, 7, 8), of_documents))
        ]
        scores = of(*leaves, of_queries, of_documents)
        given[value] = [scores, *torch.autograd.grad(scores.sum(), leaves)]
    for a, b in zip(given[padding], given[0.0], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("of", [CF.max_sim, CF.max_sim_pairs, CF.xtr_scores, CF.max_sim_info_nce])
def test_backward_under_autocast_is_as_exact(of):
    """Where a loss with gradient caching runs it."""
    leaves = [tokens(3, 4, 16, dtype=torch.float32), tokens(3, 6, 16, dtype=torch.float32)]
    scores = of(*leaves)
    expected = torch.autograd.grad(scores.sum(), leaves, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(scores.sum(), leaves)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_autocast_takes_documents_of_several_dtypes():
    queries, documents = tokens(3, 4, 16, dtype=torch.float32), tokens(3, 6, 16, dtype=torch.float32)
    negatives = tokens(3, 5, 16, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = CF.max_sim_info_nce(queries, documents, hard_negatives=[negatives])
        expected = CF.max_sim_info_nce(queries, documents, hard_negatives=[negatives.float()])
    leaves = [queries, documents, negatives]
    for a, b in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("of", [CF.max_sim, CF.max_sim_pairs, CF.xtr_scores, CF.max_sim_info_nce])
def test_a_mask_that_changes_before_backward(of):
    """Is that of the forward pass, or refused."""
    leaves, mask = [tokens(3, 4, 5), tokens(3, 6, 5)], torch.ones(3, 6, dtype=torch.bool)
    expected = torch.autograd.grad(of(*leaves, None, mask).sum(), leaves)
    scores = of(*leaves, None, mask)
    mask[1] = False
    try:
        found = torch.autograd.grad(scores.sum(), leaves)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
        return
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("of", [CF.max_sim, CF.max_sim_pairs])
def test_nan_is_not_hidden(of, options):
    queries, documents = tokens(3, 4, 5).detach(), tokens(3, 6, 5).detach()
    documents[1, 2, 3] = torch.nan
    found = of(queries, documents, **options)
    bad = found[1] if found.dim() == 1 else found[:, 1]
    assert bad.isnan().all() and not found.flatten()[0].isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("of", [CF.max_sim, CF.max_sim_pairs])
def test_half_precision(of, dtype, autocast, options):
    """Products are not rounded, and gradients of tensors once, at the end."""
    given = [tokens(8, 6, 16, dtype=dtype), tokens(8, 9, 16, dtype=dtype)]
    exact = [t.detach().double().requires_grad_() for t in given]
    leaves = [t.detach().float().requires_grad_() for t in given] if autocast else given
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        found = of(*leaves, *masks(8, 6, 8, 9), **options)
    expected = of(*exact, *masks(8, 6, 8, 9))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-5)
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(5))
    bound = 4e-3 if dtype == torch.bfloat16 else 6e-4
    grads = torch.autograd.grad(found, leaves, upstream), torch.autograd.grad(expected, exact, upstream.double())
    for leaf, a, b in zip(leaves, *grads, strict=True):
        assert a.dtype == leaf.dtype
        assert (a.double() - b).norm() <= bound * b.norm()


@pytest.mark.parametrize("learning", [(True, False), (False, True), (False, False)])
def test_what_is_frozen_has_no_gradient(learning, options):
    given = [t.detach().requires_grad_(wanted) for t, wanted in zip((tokens(4, 5, 8), tokens(4, 7, 8)), learning)]
    for of in (CF.max_sim, CF.max_sim_pairs, CF.max_sim_info_nce):
        found = of(*given, **({} if of is CF.max_sim_info_nce else options))
        assert found.requires_grad == any(learning)
        if any(learning):
            found.sum().backward()
            assert [t.grad is not None for t in given] == list(learning)


def test_nothing_of_the_size_of_all_tokens_with_all():
    queries, documents = tokens(24, 16, 8), tokens(24, 32, 8)
    with Largest() as largest:
        CF.max_sim_info_nce(queries, documents, max_chunk_bytes=1 << 18).backward()
    assert largest.elements < queries.shape[:2].numel() * documents.shape[:2].numel() / 8


@pytest.mark.parametrize("m", [1, 2])
def test_products_with_a_long_document_are_within_the_budget(m):
    queries, documents = tokens(200, 8, 4), tokens(m, 500, 4)
    with Largest() as largest:
        CF.max_sim(queries, documents, max_chunk_bytes=1 << 18).sum().backward()
    assert largest.elements <= (1 << 18) // 8


def test_a_second_derivative_is_refused():
    queries, documents = tokens(3, 4, 5), tokens(3, 6, 5)
    for of in (CF.max_sim, CF.max_sim_pairs):
        with pytest.raises(RuntimeError, match="second derivative"):
            torch.autograd.grad(of(queries, documents).sum(), queries, create_graph=True)


# --- contrast --------------------------------------------------------------------------------------------------------

N, L, H = 6, 5, 4
IDS = {
    "queries": {"query_ids": torch.tensor([0, 1, 0, 2, 3, 3])},
    "documents": {"document_ids": torch.tensor([[5, 6], [6, 5], [7, 7], [8, 1], [9, 2], [5, 3]])},
    "both, shared": {
        "query_ids": torch.tensor([0, 1, 0, 2, 3, 3]),
        "document_ids": torch.tensor([[5, 6], [6, 5], [2, 7], [8, 1], [9, 2], [5, 3]]),
        "shared_ids": True,
    },
    "listed": {"false_negatives": torch.tensor([[1, 7], [-1, -1], [3, 0], [-1, 2], [8, 9], [4, -1]])},
}


def of_any_similarity(queries, documents, negatives, query_mask, masks_of, **options):
    """`info_nce` of texts as rows, with a similarity that cuts them into tokens again."""
    there = {
        t.flatten().sum().item(): mask
        for t, mask in zip((*queries, *documents, *negatives), (*query_mask, *masks_of[0], *masks_of[1]))
    }

    def similarity(a, b):
        rows, columns = a.view(-1, L, H), b.view(-1, L, H)
        found = [torch.stack([there[t.flatten().sum().item()] for t in side]) for side in (rows, columns)]
        return plain(rows, columns, *found)

    rows = [t.flatten(1) for t in (queries, documents, negatives)]
    return CF.info_nce(rows[0], rows[1], hard_negatives=[rows[2]], similarity=similarity, **options)


@pytest.mark.parametrize("ids", [None, *IDS])
@pytest.mark.parametrize(
    "ways",
    [{}, {"directions": BOTH, "partition_mode": "per_direction"}, {"directions": BOTH}],
    ids=["one way", "both ways", "joint"],
)
@pytest.mark.parametrize("few", [True, False])
def test_contrast_is_that_of_any_similarity(ids, ways, few, options, monkeypatch):
    monkeypatch.setattr(scored, "FEW_SCORES", 1 << 20 if few else 0)
    queries, documents, negatives = tokens(N, L, H), tokens(N, L, H, seed=1), tokens(N, L, H, seed=2)
    query_mask, mask = torch.rand(N, L, generator=torch.Generator().manual_seed(3)) < 0.7, masks(N, L, N, L)[1]
    query_mask[:, 0], mask[2, 1] = True, True
    of_negatives = masks(N, L, N, L, seed=4)[1] | (torch.arange(L) == 1)
    leaves = [queries, documents, negatives]
    named = ways | IDS.get(ids, {})
    found = CF.max_sim_info_nce(
        queries,
        documents,
        query_mask,
        mask,
        hard_negatives=[negatives],
        hard_negative_masks=[of_negatives],
        scale=0.7,
        **named,
        **options,
    )
    expected = of_any_similarity(*leaves, query_mask, (mask, of_negatives), scale=0.7, **named)
    assert_same(found, expected, leaves, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("few", [True, False])
def test_hard_negatives_of_other_lengths(few, monkeypatch):
    monkeypatch.setattr(scored, "FEW_SCORES", 1 << 20 if few else 0)
    queries, documents = tokens(4, 5, 8), tokens(4, 7, 8)
    negatives = [tokens(4, 3, 8, seed=1), tokens(4, 9, 8, seed=2)]
    mask = torch.arange(9) < torch.tensor([[9], [1], [4], [8]])
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    of_negatives = {"hard_negatives": negatives, "hard_negative_masks": [None, mask]}
    found = CF.max_sim_info_nce(queries, documents, **of_negatives, scale=scale, length_normalize=True)
    blocks = [plain(queries, x, None, m, True) for x, m in zip((documents, *negatives), (None, None, mask))]
    expected = F.cross_entropy(scale * torch.cat(blocks, 1), torch.arange(4))
    assert_same(found, expected, [queries, documents, *negatives, scale], rtol=1e-9, atol=1e-10)
    stacked = torch.stack([negatives[0]] * 2, 1)
    several = CF.max_sim_info_nce(queries, documents, hard_negatives=stacked)
    torch.testing.assert_close(several, CF.max_sim_info_nce(queries, documents, hard_negatives=[negatives[0]] * 2))


# --- refusals --------------------------------------------------------------------------------------------------------

Q, D = torch.randn(3, 4, 5), torch.randn(3, 6, 5)


@pytest.mark.parametrize("of", [CF.max_sim, CF.max_sim_pairs, CF.max_sim_info_nce])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((Q[0], D), ValueError, r"queries of shape \(N, Q, H\)"),
        ((Q[:0], D), ValueError, "at least one token"),
        ((Q, D[..., :4]), ValueError, r"expected documents"),
        ((Q, D[0]), ValueError, r"expected documents"),
        ((Q, D.double()), TypeError, "one dtype"),
        ((Q.long(), D), TypeError, "queries to be floating point"),
        ((Q, D.to(torch.int8)), TypeError, "quantised"),
        ((Q, D.to("meta")), ValueError, "documents on cpu, got meta"),
        ((Q, D, torch.ones(3, 4)), TypeError, "query_mask to be bool or hold integers"),
        ((Q, D, torch.ones(3, 5, dtype=torch.bool)), ValueError, "query_mask"),
        ((Q, D, None, torch.ones(3, 5, dtype=torch.bool)), ValueError, "document_mask"),
    ],
    ids=str,
)
def test_refusals(of, arguments, error, message):
    with pytest.raises(error, match=message):
        of(*arguments)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scale": 0.0}, ValueError, "scale"),
        ({"scale": math.nan}, ValueError, "scale"),
        ({"directions": ("query_to_doc", "doc_to_doc")}, ValueError, "expected directions among"),
        ({"directions": ("doc_to_query",)}, ValueError, "query_to_doc"),
        ({"partition_mode": "one"}, ValueError, "partition_mode"),
        ({"hard_negatives": [D[:2]]}, ValueError, r"hard_negatives\[0\]"),
        ({"hard_negatives": [D.double()]}, TypeError, "one dtype"),
        ({"hard_negatives": [D], "hard_negative_masks": [None, None]}, ValueError, "1 hard_negative_masks"),
        ({"hard_negative_masks": [torch.ones(3, 6).bool()]}, ValueError, "0 hard_negative_masks"),
        ({"hard_negatives": [D], "hard_negative_masks": [torch.ones(3, 5).bool()]}, ValueError, r"masks\[0\]"),
        ({"length_normalize": 1}, TypeError, "length_normalize"),
        ({"max_chunk_bytes": 0}, ValueError, "max_chunk_bytes"),
        ({"query_ids": torch.zeros(2, dtype=torch.int64)}, ValueError, "query_ids"),
        ({"false_negatives": torch.zeros(3, 1)}, TypeError, "false_negatives"),
    ],
    ids=str,
)
def test_refusals_of_contrast(options, error, message):
    with pytest.raises(error, match=message):
        CF.max_sim_info_nce(Q, D, **options)


def test_own_documents_of_another_batch_are_refused():
    with pytest.raises(ValueError, match=r"expected documents of shape \(3, D, 5\) or \(3, K, D, 5\), got \(2, 6, 5\)"):
        CF.max_sim_pairs(Q, D[:2])
