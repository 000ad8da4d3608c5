"""In-batch contrast at narrow widths, through the engine: on a GPU, else in Triton's interpreter."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from kernel_device import DEVICE, INTERPRETED, MARKS
from torch import Tensor

from chunked_embed import Projection
from chunked_embed import functional as CF
from chunked_embed.functional import attention_steps
from chunked_embed.functional.contrastive import InfoNCE
from chunked_embed.kernels import norms
from chunked_embed.kernels.contrast import logsumexps, softmaxes, weighted_sums

pytestmark = [pytest.mark.slow] if INTERPRETED else MARKS

DTYPE = torch.float16 if INTERPRETED else torch.bfloat16  # the interpreter multiplies no bfloat16
BOUND = 2 * torch.finfo(DTYPE).eps / 3  # of gradients, twice rounded
UPSTREAM = 3 * 2.0**12  # of a gradient scaler, so that float16 holds small gradients
BOTH = ("query_to_doc", "doc_to_query")
N, WIDTH = 90, 48


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setattr(attention_steps, "FEWEST_ROWS", 1)
    monkeypatch.setattr(attention_steps, "FEWEST_BOTH", 1)
    if INTERPRETED and request.function is not test_matryoshka:  # norms take a program a row, most of the time here
        monkeypatch.setattr(norms, "available", lambda device: False)


def sides(negatives=0, n=N, width=WIDTH, seed=0, noise=1.0) -> list[Tensor]:
    """Leaves that hold half-precision numbers in float32."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(n, width, generator=generator)
    found = [queries]
    for i in range(1 + negatives):
        found.append(queries + (noise + i) * torch.randn(n, width, generator=generator))
    return [x.to(DTYPE).to(DEVICE).float().requires_grad_() for x in found]


def half(leaves: list[Tensor]) -> list[Tensor]:
    return [x.to(DTYPE) for x in leaves]


def truth(leaves, scale=20.0, cosine=True, ways=1, each=False, out=None):
    """Loss and gradients in float64, written plainly. ``out``: pairs that do not count."""
    queries, *documents = (x.detach().double().requires_grad_() for x in leaves)
    bank = torch.cat(documents)
    scale = scale.detach().double().requires_grad_() if isinstance(scale, Tensor) else scale
    z = scale * (F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T if cosine else queries @ bank.T)
    own = torch.arange(len(queries), device=z.device)
    if out is not None:
        z = z.masked_fill(out, -torch.inf)
    over_documents, over_queries, positive = z.logsumexp(1), z[:, : len(own)].logsumexp(0), z[own, own]
    if ways == 1:
        total = over_documents
    else:
        total = (over_documents + over_queries) / 2 if each else torch.logaddexp(over_documents, over_queries)
    loss = (total - positive).mean()
    learning = [queries, *documents, *([scale] if isinstance(scale, Tensor) else [])]
    return loss.detach(), torch.autograd.grad(loss, learning)


def check(leaves, loss, expected, scale=None, bound=BOUND):
    value, gradients = expected
    # A score of 100 is off by 1e-5, and two ways the loss is a difference of scores.
    torch.testing.assert_close(loss.detach().double(), value, rtol=2e-5, atol=3e-7)
    (UPSTREAM * loss).backward()
    for leaf, gradient in zip(leaves, gradients):
        assert (leaf.grad.double() / UPSTREAM - gradient).norm() <= bound * gradient.norm()
    if scale is not None:
        torch.testing.assert_close(scale.grad.double() / UPSTREAM, gradients[-1], rtol=2e-4, atol=1e-7)


@pytest.fixture
def launches(monkeypatch):
    """How often each kernel runs."""
    found: Counter[str] = Counter()

    def counted(run):
        def wrapped(*args, **options):
            found[run.__name__] += 1
            return run(*args, **options)

        monkeypatch.setattr(attention_steps, run.__name__, wrapped)

    for run in (softmaxes, logsumexps, weighted_sums):
        counted(run)
    return found


WAYS = {
    "one": ({}, {}),
    "joint": ({"directions": BOTH}, {"ways": 2}),
    "each": ({"directions": BOTH, "partition_mode": "per_direction"}, {"ways": 2, "each": True}),
}
KINDS = {
    "cosine": ({}, {}),
    "dot": ({"similarity": "dot", "scale": 0.2}, {"cosine": False, "scale": 0.2}),
    "confident": ({"scale": 50.0}, {"scale": 50.0}),
}


@pytest.mark.parametrize("negatives", [0, 2])
@pytest.mark.parametrize("chunk_size", [None, 40])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_equals_the_formula(way, kind, chunk_size, negatives, launches):
    leaves = sides(negatives)
    (ours, theirs), (of_kind, of_truth) = WAYS[way], KINDS[kind]
    queries, document, *hard = half(leaves)
    options = {"compiled": True, "chunk_size": chunk_size, **ours, **of_kind}
    loss = CF.info_nce(queries, document, hard_negatives=hard, **options)
    check(leaves, loss, truth(leaves, **theirs, **of_truth))
    chunks = 1 if chunk_size is None else 3
    two = way != "one"
    assert launches == Counter(softmaxes=chunks, logsumexps=chunks * two, weighted_sums=chunks * (1 + two))


@pytest.mark.parametrize("way", WAYS)
def test_scale_learns(way):
    leaves, scale = sides(1), torch.tensor(12.0, device=DEVICE, requires_grad=True)
    ours, theirs = WAYS[way]
    queries, documents, hard = half(leaves)
    loss = CF.info_nce(queries, documents, hard_negatives=hard, scale=scale, compiled=True, **ours)
    check(leaves, loss, truth(leaves, scale=scale, **theirs), scale)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("learning", [(0,), (1,), (2,), ()])
def test_what_does_not_learn_is_not_computed(learning, way, launches):
    """Queries, documents, a scale: one of them alone; or none."""
    leaves, scale = sides(), torch.tensor(12.0, device=DEVICE, requires_grad=2 in learning)
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i in learning)
    ours, theirs = WAYS[way]
    loss = CF.info_nce(*half(leaves), scale=scale, compiled=True, **ours)
    value, gradients = truth(leaves, scale=scale, **theirs)
    torch.testing.assert_close(loss.detach().double(), value, rtol=3e-6, atol=1e-9)
    if learning:
        loss.backward()
        (place,) = learning
        got = [*leaves, scale][place].grad.double()
        assert (got - gradients[place]).norm() <= BOUND * gradients[place].norm()
    two = way != "one"
    sums = 1 if learning and (two or learning == (1,)) else 0
    assert launches == Counter(softmaxes=1, logsumexps=int(two), weighted_sums=sums)


@pytest.mark.parametrize("way", ["one", "each"])
@pytest.mark.parametrize("given", ["queries", "documents", "listed", "queries documents listed", "all, shared"])
def test_known_pairs(way, given):
    leaves, generator = sides(1), torch.Generator().manual_seed(2)
    shared, given = "shared" in given, "queries documents listed" if "all" in given else given
    query_ids, document_ids = (torch.randint(30, shape, generator=generator) for shape in ((N,), (N, 2)))
    listed = torch.randint(-1, 30, (N, 2), generator=generator)
    ids = {"queries": query_ids, "documents": document_ids, "listed": listed}
    names = {"queries": "query_ids", "documents": "document_ids", "listed": "false_negatives"}
    here = {names[name]: ids[name].to(DEVICE) for name in given.split()}
    if "documents" not in given:
        document_ids = torch.arange(2 * N).view(2, N).t()
    document_of = document_ids.t().flatten()
    out = torch.zeros(N, 2 * N, dtype=torch.bool)
    for i in range(N):
        for j in range(2 * N):
            known = document_of[j] == document_ids[i, 0]
            known = known or ("queries" in given and query_ids[j % N] == query_ids[i] and j % N != i)
            known = known or ("listed" in given and any(k == document_of[j] and k != -1 for k in listed[i]))
            out[i, j] = bool(known or (shared and document_of[j] == query_ids[i])) and i != j
    assert out.any()
    ours, theirs = WAYS[way]
    queries, documents, hard = half(leaves)
    loss = CF.info_nce(
        queries, documents, hard_negatives=hard, shared_ids=shared, compiled=True, chunk_size=50, **here, **ours
    )
    check(leaves, loss, truth(leaves, out=out.to(DEVICE), **theirs))


@pytest.mark.parametrize("width", [8, 16, 40])
def test_matryoshka(width):
    """Rows that are part of wider ones, as they lie."""
    leaves = sides(width=64)
    loss = CF.info_nce(*(x[:, :width] for x in half(leaves)), compiled=True)
    value, gradients = truth([x[:, :width] for x in leaves])
    torch.testing.assert_close(loss.detach().double(), value, rtol=3e-6, atol=1e-9)
    loss.backward()
    for leaf, gradient in zip(leaves, gradients):
        assert leaf.grad[:, width:].count_nonzero() == 0
        assert (leaf.grad[:, :width].double() - gradient).norm() <= BOUND * gradient.norm()


@pytest.mark.parametrize("way", WAYS)
def test_one_row(way):
    leaves = sides(n=1)
    loss = CF.info_nce(*half(leaves), compiled=True, **WAYS[way][0])
    expected = 0.6931472 if way == "joint" else 0.0
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    loss.backward()
    assert all(leaf.grad.abs().max() < 1e-6 for leaf in leaves)


@pytest.mark.parametrize("way", ["one", "each"])
@pytest.mark.parametrize("scale", [20.0, 50.0, 100.0])
def test_near_duplicates(scale, way):
    """Cosines of .9 to 1."""
    generator = torch.Generator().manual_seed(0)
    center = torch.randn(1, 64, generator=generator)
    queries = center + 0.3 * torch.randn(256, 64, generator=generator)
    documents = queries + 0.2 * torch.randn(256, 64, generator=generator)
    leaves = [x.to(DTYPE).to(DEVICE).float().requires_grad_() for x in (queries, documents)]
    ours, theirs = WAYS[way]
    loss = CF.info_nce(*half(leaves), scale=scale, compiled=True, **ours)
    check(leaves, loss, truth(leaves, scale=scale, **theirs))


def plan_of(width=WIDTH, dtype=DTYPE, bias=None, **options):
    queries, documents = (torch.randn(8, width, device=DEVICE, dtype=dtype, requires_grad=True) for _ in range(2))
    call = {"query_to_doc": Projection(queries, documents, bias=bias)}
    return InfoNCE(**{"compiled": True, **options}).plan(call, {"target": torch.arange(8, device=DEVICE)})


REFUSED = {
    "embeddings of 257 numbers are wider than 256": {"width": 257},
    "float32 operands take other products": {"dtype": torch.float32},
    "a sum of products, or one with a bias, takes other products": {"bias": torch.zeros(8, device=DEVICE, dtype=DTYPE)},
    "weights by hardness take the plain functions": {"hardness_mode": "all_negatives", "hardness": 1.0},
    "steps run uncompiled": {"compiled": False},
}


def test_the_plan_says_what_runs():
    plan = plan_of()
    assert "steps         AttentionRows\n" in str(plan) and not plan.refusals
    assert plan.products == 4 and plan.chunk_bytes == 0


@pytest.mark.parametrize("told", REFUSED)
def test_the_plan_says_why_not(told):
    plan = plan_of(**REFUSED[told])
    assert "AttentionRows" not in plan.steps and f"no kernel     AttentionRows: {told}" in str(plan)


@pytest.mark.skipif(INTERPRETED, reason="sizes for a GPU")
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("way", WAYS)
def test_nothing_of_the_size_of_the_similarities(way, width):
    leaves = half(sides(n=32768, width=width))
    leaves = [x.detach().requires_grad_() for x in leaves]
    CF.info_nce(*leaves, **WAYS[way][0]).backward()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    CF.info_nce(*leaves, **WAYS[way][0]).backward()
    assert torch.cuda.max_memory_allocated() - before < 12 * 4 * leaves[0].numel()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, which meets NaN in NumPy
@pytest.mark.parametrize("kind", ["cosine", "dot"])
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("way", WAYS)
def test_nan_is_not_hidden(way, place, kind):
    """Of a query, a document or a hard negative: no gradient looks as though nothing was wrong."""
    leaves = [x.detach() for x in half(sides(1))]
    leaves[place][3, 2] = torch.nan
    queries, document, hard = (x.requires_grad_() for x in leaves)
    loss = CF.info_nce(queries, document, hard_negatives=[hard], compiled=True, **WAYS[way][0], **KINDS[kind][0])
    loss.backward()
    assert loss.isnan() and all(x.grad.isnan().any() for x in leaves)
