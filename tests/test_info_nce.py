"""InfoNCE on plain tensors: against sentence-transformers, and against a loop over every pair."""

from __future__ import annotations

import inspect
import math
import random
import warnings
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

from chunked_embed import functional as CF
from chunked_embed.engine import compile as cache

EAGER = {"compiled": False}
EXACT = {"rtol": 1e-9, "atol": 1e-12}
ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
BOTH = ("query_to_doc", "doc_to_query")

WAYS: dict[str, dict] = {
    "one way": {},
    "two, joint": {"directions": BOTH},
    "two, each": {"directions": BOTH, "partition_mode": "per_direction"},
    "queries": {"directions": ("query_to_doc", "query_to_query")},
    "documents": {"directions": ("doc_to_doc", "query_to_doc")},
    "all four": {"directions": ALL},
}
HARDNESS: dict[str, dict] = {
    "plain": {},
    "in batch": {"hardness_mode": "in_batch_negatives", "hardness_strength": 2.0},
    "hard": {"hardness_mode": "hard_negatives", "hardness_strength": 1.5},
    "all": {"hardness_mode": "all_negatives", "hardness_strength": 3.0},
    "none of it": {"hardness_mode": "all_negatives", "hardness_strength": 0.0},
}


def manhattan(a: Tensor, b: Tensor) -> Tensor:
    return -torch.cdist(a, b, p=1)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return F.normalize(a, dim=1) @ F.normalize(b, dim=1).T


def dot(a: Tensor, b: Tensor) -> Tensor:
    return a @ b.T


SIMILARITIES = {"cosine": cosine, "dot": dot, "manhattan": manhattan}


def inputs(rows: int, negatives: int = 0, dtype: torch.dtype = torch.float64, width: int = 5, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    sides = [torch.randn(rows, width, generator=generator, dtype=torch.float64) for _ in range(2 + negatives)]
    sides[1] += sides[0]
    return [side.to(dtype).requires_grad_() for side in sides]


def nce(sides: list[Tensor], **options) -> Tensor:
    if options.get("similarity") == "manhattan":
        options["similarity"] = manhattan
    return CF.info_nce(*sides[:2], hard_negatives=sides[2:], **EAGER | options)


def grads_of(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads)]


def assert_same(leaves: list[Tensor], mine: Tensor, theirs: Tensor, **tolerance: float) -> None:
    tolerance = tolerance or EXACT
    torch.testing.assert_close(mine, theirs, **tolerance)
    for i, (a, b) in enumerate(zip(grads_of(mine, leaves), grads_of(theirs, leaves), strict=True)):
        torch.testing.assert_close(a, b, **tolerance, msg=lambda m, i=i: f"gradient {i}: {m}")


# --- against the library ----------------------------------------------------------------------------------------------


def library(sides: list[Tensor], similarity: str | Callable = "cosine", scale: float = 20.0, **options) -> Tensor:
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    kind = losses.MultipleNegativesRankingLoss
    if unknown := set(options) - set(inspect.signature(kind).parameters):
        pytest.skip(f"this sentence-transformers has no {', '.join(sorted(unknown))}")
    loss = kind(nn.Identity(), scale, SIMILARITIES.get(similarity, similarity), **options)
    return loss.compute_loss_from_embeddings(sides, None)


@pytest.mark.parametrize("hardness", HARDNESS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_is_the_librarys(similarity, way, hardness):
    for rows, negatives in ((7, 0), (6, 2), (2, 1)):
        sides = inputs(rows, negatives)
        options = {"similarity": similarity, "scale": 5.0, **WAYS[way], **HARDNESS[hardness]}
        theirs = library(sides, **options)
        for chunk_size in (1, 3, rows, None):
            assert_same(sides, nce(sides, chunk_size=chunk_size, **options), theirs)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("negatives", [0, 1])
def test_one_row(way, negatives):
    sides = inputs(1, negatives)
    mine, theirs = nce(sides, **WAYS[way]), library(sides, **WAYS[way])
    torch.testing.assert_close(mine, theirs, **EXACT)
    for a, b in zip(grads_of(mine, sides), grads_of(theirs, sides)):
        # A softmax over nothing at all: the library's similarity of a row to itself leaves NaN behind.
        torch.testing.assert_close(a, b.nan_to_num(), **EXACT)
    if negatives == 0:  # the positive alone, or twice
        twice = way in ("two, joint", "all four")
        assert mine.item() == pytest.approx(math.log(2) if twice else 0, abs=1e-12)


@pytest.mark.parametrize("given", ["list", "tuple", "matrix", "stacked"])
def test_hard_negatives_in_any_form(given):
    sides = inputs(6, 1 if given == "matrix" else 3)
    form = {"list": list, "tuple": tuple, "matrix": lambda x: x[0], "stacked": lambda x: torch.stack(x, 1)}[given]
    for way in WAYS.values():
        mine = CF.info_nce(*sides[:2], hard_negatives=form(sides[2:]), **EAGER, **way)
        assert_same(sides, mine, library(sides, **way))


def test_no_hard_negatives_in_a_tensor():
    sides = inputs(6)
    mine = CF.info_nce(*sides, hard_negatives=torch.empty(6, 0, 5, dtype=torch.float64), **EAGER)
    assert_same(sides, mine, nce(sides))


def test_the_default_is_cross_entropy():
    q, d = sides = inputs(9)
    assert_same(sides, nce(sides), F.cross_entropy(20 * cosine(q, d), torch.arange(9)))
    both = [F.cross_entropy(20 * s, torch.arange(9)) for s in (cosine(q, d), cosine(d, q))]
    assert_same(sides, nce(sides, **WAYS["two, each"]), sum(both) / 2)


def test_a_similarity_that_is_not_symmetric():
    sides = inputs(6, 1)
    for way in WAYS.values():
        options = {"similarity": lopsided, "scale": 2.0, **way}
        assert_same(sides, nce(sides, chunk_size=4, **options), library(sides, **options))


def lopsided(a: Tensor, b: Tensor) -> Tensor:
    return a @ b.sin().T - a.square().sum(1)[:, None]


def test_directions_in_any_order_and_as_a_word():
    sides = inputs(6, 1)
    assert_same(sides, nce(sides, directions="query_to_doc"), nce(sides))
    expected = nce(sides, directions=ALL)
    assert_same(sides, nce(sides, directions=ALL[::-1]), expected)
    assert_same(sides, nce(sides, directions=(*ALL, "query_to_doc")), expected)


# --- what is known to be no negative ----------------------------------------------------------------------------------


class Known(NamedTuple):
    query_ids: Tensor | None = None
    document_ids: Tensor | None = None
    false_negatives: Tensor | None = None


def knowledge(kind: str, rows: int, negatives: int) -> Known:
    generator = torch.Generator().manual_seed(rows + negatives)

    def draw(high: int, *shape: int, low: int = 0) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    lists = 1 + negatives
    return {
        "queries": Known(query_ids=draw(3, rows)),
        "documents": Known(document_ids=draw(4, rows) * rows),  # which are positions of hard negatives, too
        "all documents": Known(document_ids=draw(4, rows, lists)),
        "positions": Known(false_negatives=draw(rows * lists, rows, 2, low=-1)),
        "listed": Known(None, torch.arange(100, 100 + rows), 100 + draw(rows, rows, 3)),
        "everything": Known(draw(4, rows), draw(6, rows, lists), draw(6, rows, 1, low=-1)),
        "int32": Known(draw(3, rows).int(), draw(4, rows).int()),
        "nothing": Known(torch.arange(rows), torch.arange(rows) + 50, torch.full((rows, 2), -1)),
        "no columns": Known(false_negatives=torch.empty(rows, 0, dtype=torch.long)),
    }[kind]


KINDS = ["queries", "documents", "all documents", "positions", "listed", "everything", "int32", "nothing", "no columns"]


def by_hand(
    sides: list[Tensor],
    known: Known,
    similarity: str = "cosine",
    scale: float = 20.0,
    directions: tuple[str, ...] = ("query_to_doc",),
    partition_mode: str = "joint",
    hardness_mode: str | None = None,
    hardness_strength: float = 0.0,
) -> Tensor:
    """One pair at a time."""
    n, lists = len(sides[0]), len(sides) - 1
    query_of = list(range(n)) if known.query_ids is None else known.query_ids.tolist()
    if known.document_ids is None:
        document_of = [[k * n + i for k in range(lists)] for i in range(n)]
    elif known.document_ids.dim() == 1:  # a hard negative is like no other document
        document_of = [[int(d), *("own" for _ in range(lists - 1))] for d in known.document_ids]
    else:
        document_of = known.document_ids.tolist()
    listed = [[]] * n if known.false_negatives is None else known.false_negatives.tolist()

    def left_out(i: int, j: int, k: int) -> bool:
        """Document k of row j as a negative of row i."""
        if (j, k) == (i, 0):
            return False
        same_query = i != j and query_of[i] == query_of[j]
        document = document_of[j][k]
        return same_query or document == document_of[i][0] or document in listed[i]

    function = SIMILARITIES[similarity]
    of_queries, of_documents = ([[function(a, b) for b in sides] for a in sides[:2]][i] for i in (0, 1))
    losses = []
    for i in range(n):
        sums: dict[str, list[Tensor]] = {direction: [] for direction in directions}
        for j in range(n):
            for k in range(lists):
                if not left_out(i, j, k):
                    s = of_queries[1 + k][i, j]
                    harder = {
                        "in_batch_negatives": i != j,
                        "hard_negatives": i == j and k > 0,
                        "all_negatives": (j, k) != (i, 0),
                        None: False,
                    }[hardness_mode]
                    sums["query_to_doc"].append(scale * s + (hardness_strength * s.detach() if harder else 0))
                    if "doc_to_doc" in sums and i != j:
                        sums["doc_to_doc"].append(scale * of_documents[1 + k][i, j])
            if "query_to_query" in sums and i != j and not left_out(i, j, 0):
                sums["query_to_query"].append(scale * of_queries[0][i, j])
            if "doc_to_query" in sums and not left_out(j, i, 0):
                sums["doc_to_query"].append(scale * of_queries[1][j, i])
        if partition_mode == "joint":
            total = torch.stack([x for terms in sums.values() for x in terms]).logsumexp(0)
        else:
            total = torch.stack([torch.stack(terms).logsumexp(0) for terms in sums.values()]).mean()
        losses.append(total - scale * of_queries[1][i, i])
    return torch.stack(losses).mean()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_masks(kind, way):
    for rows, negatives in ((6, 0), (5, 2)):
        sides, known = inputs(rows, negatives), knowledge(kind, rows, negatives)
        theirs = by_hand(sides, known, **WAYS[way])
        for chunk_size in (2, None):
            assert_same(sides, nce(sides, chunk_size=chunk_size, **known._asdict(), **WAYS[way]), theirs)


@pytest.mark.parametrize("hardness", HARDNESS)
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("way", ["one way", "two, each", "all four"])
def test_masks_beside_the_other_options(way, similarity, hardness):
    sides, known = inputs(5, 2), knowledge("everything", 5, 2)
    options = {"similarity": similarity, "scale": 3.0, **WAYS[way], **HARDNESS[hardness]}
    assert_same(sides, nce(sides, chunk_size=2, **known._asdict(), **options), by_hand(sides, known, **options))


def test_the_masks_matter():
    sides = inputs(6, 2)
    for kind in KINDS:
        known = knowledge(kind, 6, 2)
        same = kind in ("nothing", "no columns")
        assert (nce(sides, **known._asdict()).item() == pytest.approx(nce(sides).item())) is same, kind


def test_everything_left_out():
    """One text in every row: nothing is left but the positive."""
    sides, same = inputs(6), torch.zeros(6, dtype=torch.long)
    for way in ("one way", "two, each"):
        mine = nce(sides, query_ids=same, document_ids=same, **WAYS[way])
        assert mine.item() == pytest.approx(0, abs=1e-12)
        assert not any(grad.abs().max() > 1e-12 for grad in grads_of(mine, sides))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_rows_stay_finite(dtype):
    """A query alone among the queries, at every scale."""
    sides = inputs(4, 1, dtype)
    for scale in (1e-3, 1e4):
        loss = nce(sides, scale=scale, query_ids=torch.zeros(4, dtype=torch.long), **WAYS["all four"])
        assert loss.isfinite() and all(grad.isfinite().all() for grad in grads_of(loss, sides))


RELABELLED = torch.tensor([-1, 7, -3, 0, -(2**63), 2**63 - 1, -2, -5, 3, -4])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["queries", "documents", "listed", "everything"])
def test_ids_are_any_integers(kind, way):
    """Only equality counts: negative ids are ids, and unlike those of hard negatives that have none."""
    sides = inputs(7, 2)
    known = Known(*(None if ids is None else ids % 7 for ids in knowledge(kind, 7, 2)))
    known = known._replace(false_negatives=None)
    other = Known(*(None if ids is None else RELABELLED[ids] for ids in known))
    assert_same(sides, nce(sides, **other._asdict(), **WAYS[way]), nce(sides, **known._asdict(), **WAYS[way]))


@pytest.mark.parametrize("way", WAYS)
def test_what_pads_false_negatives_is_nobodys_id(way):
    sides, nobody = inputs(5), torch.full((5, 2), -1)
    ids = torch.tensor([-1, 4, 2, 3, 8])
    assert_same(sides, nce(sides, document_ids=ids, false_negatives=nobody, **WAYS[way]), nce(sides, **WAYS[way]))


@pytest.mark.parametrize("way", WAYS)
def test_ids_of_queries_and_documents_are_two_numberings(way):
    sides, known = inputs(6, 1), knowledge("everything", 6, 1)
    apart, options = known._replace(query_ids=known.query_ids + 100), {"scale": 1.0, **WAYS[way]}
    two = nce(sides, **known._asdict(), **options)
    assert_same(sides, two, nce(sides, **apart._asdict(), **options))
    assert abs(nce(sides, **known._asdict(), shared_ids=True, **options).item() - two.item()) > 1e-3


# --- one numbering of queries and documents ---------------------------------------------------------------------------


def pairs_left_out(known: Known, lists: int) -> dict[str, Tensor]:
    """The whole matrices, for texts with ids of one numbering."""
    q, n = known.query_ids, len(known.query_ids)
    d = known.document_ids.view(n, -1).T
    missing = torch.full((lists - len(d), n), -99)  # which nothing else has
    d = torch.cat([d, missing])
    own, c = torch.eye(n, dtype=torch.bool), d.flatten()

    def same(a: Tensor, b: Tensor) -> Tensor:
        return a[:, None] == b

    def each(matrix: Tensor) -> Tensor:  # (N, N) -> (N, lists * N)
        return matrix.repeat(1, lists)

    listed = torch.zeros(n, lists * n, dtype=torch.bool)
    if known.false_negatives is not None:
        listed = ((known.false_negatives[:, :, None] == c) & (known.false_negatives[:, :, None] != -1)).any(1)
    of_its_row = same(d[0], q)  # (i, j): d_i is the text of q_j
    pair = same(d[0], c) | each(same(q, q) & ~own) | same(q, c) | listed
    pair[:, :n] &= ~own
    documents = same(d[0], c) | each(same(q, q)) | same(q, c) | (each(of_its_row) & (c == d[0].repeat(lists))) | listed
    queries = same(q, q) | same(d[0], d[0]) | of_its_row | of_its_row.T | listed[:, :n]
    return {"query_to_doc": pair, "doc_to_query": pair[:, :n].T, "query_to_query": queries, "doc_to_doc": documents}


def by_masks(
    sides: list[Tensor],
    known: Known,
    similarity: str = "cosine",
    scale: float = 20.0,
    directions: tuple[str, ...] = ("query_to_doc",),
    partition_mode: str = "joint",
    hardness_mode: str | None = None,
    hardness_strength: float = 0.0,
) -> Tensor:
    queries, *lists = sides
    n, f = len(queries), SIMILARITIES[similarity]
    left_out, own = pairs_left_out(known, len(lists)), torch.eye(n, dtype=torch.bool)
    bank, owned = torch.cat(lists), own.repeat(1, len(lists))
    s = f(queries, bank)
    positive = torch.cat([own, torch.zeros(n, len(bank) - n, dtype=torch.bool)], 1)
    modes = {"in_batch_negatives": ~owned, "hard_negatives": owned & ~positive, "all_negatives": ~positive}
    harder = modes.get(hardness_mode, torch.zeros_like(owned))
    z = {
        "query_to_doc": scale * s + hardness_strength * s.detach() * harder,
        "doc_to_query": scale * s[:, :n].T,
        "query_to_query": scale * f(queries, queries),
        "doc_to_doc": scale * f(lists[0], bank),
    }
    itself = {"query_to_query": own, "doc_to_doc": owned}
    out = {name: left_out[name] | itself[name] if name in itself else left_out[name] for name in directions}
    lses = torch.stack([z[name].masked_fill(out[name], -1e30).logsumexp(1) for name in directions])
    total = lses.logsumexp(0) if partition_mode == "joint" else lses.mean(0)
    return (total - z["doc_to_query"].diagonal()).mean()


def one_numbering(kind: str, rows: int, negatives: int, seed: int = 0) -> Known:
    """Few enough texts for every kind of equality: a query's with its own document's, too."""
    generator = torch.Generator().manual_seed(100 * rows + negatives + seed)
    texts = torch.randint(-3, 6, (rows, 2 + negatives), generator=generator)
    listed = torch.randint(-1, 6, (rows, 2), generator=generator)
    return {
        "texts": Known(texts[:, 0], texts[:, 1:]),
        "no ids of hard negatives": Known(texts[:, 0], texts[:, 1]),
        "and listed": Known(texts[:, 0], texts[:, 1:], listed),
    }[kind]


ONE_NUMBERING = ["texts", "no ids of hard negatives", "and listed"]


@pytest.mark.parametrize("kind", ONE_NUMBERING)
@pytest.mark.parametrize("way", WAYS)
def test_one_numbering(kind, way):
    for rows, negatives in ((12, 0), (8, 2), (1, 1)):
        sides, known = inputs(rows, negatives), one_numbering(kind, rows, negatives)
        theirs = by_masks(sides, known, **WAYS[way])
        options = {"shared_ids": True, **known._asdict(), **WAYS[way]}
        for chunk_size in (3, None):
            assert_same(sides, nce(sides, chunk_size=chunk_size, **options), theirs)


@pytest.mark.parametrize("hardness", HARDNESS)
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("way", ["one way", "two, joint", "two, each", "all four"])
def test_one_numbering_beside_the_other_options(way, similarity, hardness):
    sides, known = inputs(8, 1), one_numbering("texts", 8, 1)
    options = {"similarity": similarity, "scale": 3.0, **WAYS[way], **HARDNESS[hardness]}
    mine = nce(sides, chunk_size=3, shared_ids=True, **known._asdict(), **options)
    assert_same(sides, mine, by_masks(sides, known, **options))


def counted(texts: list[str], way: str) -> set[str]:
    """Which texts of a batch ("xy": query x, document y; any hard negatives behind) are negatives, as "x.z"."""
    columns = ["".join(column) for column in zip(*texts)]
    n, everything = len(texts), "".join(columns)
    bank = torch.eye(len(everything), dtype=torch.float64)
    weights = torch.zeros(len(everything), len(everything), dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[ord(text) for text in row] for row in texts])
    loss = CF.info_nce(
        *bank[: 2 * n].split(n),
        hard_negatives=bank[2 * n :].view(-1, n, len(everything)).transpose(0, 1),
        similarity=lambda a, b: a @ weights @ b.T,  # the gradient of a weight says whether its pair counts
        query_ids=ids[:, 0],
        document_ids=ids[:, 1:],
        shared_ids=True,
        directions=("query_to_doc", way),
        **EAGER,
    )
    (grad,) = torch.autograd.grad(loss, weights)
    mine, theirs = {"query_to_query": (0, 0), "doc_to_doc": (1, 1)}.get(way, (0, 1))
    grad = grad.T if way == "doc_to_doc" else grad  # which hands its rows over as the second argument
    rows, candidates = columns[mine], columns[0] if theirs == 0 else everything[n:]
    block = grad[mine * n : (mine + 1) * n, theirs * n : theirs * n + len(candidates)]
    return {f"{rows[i]}.{candidates[j]}" for i, j in block.nonzero().tolist() if i != j}


@pytest.mark.parametrize(
    ("texts", "expected"),
    {
        # The row's own query among the documents, whose query still has other negatives.
        ("xy", "zx"): {"query_to_doc": "z.y", "query_to_query": "", "doc_to_doc": ""},
        # A query that is another row's document: one pair of texts, on whichever side it stands.
        ("xy", "yz", "ab"): {
            "query_to_doc": "x.z x.b y.b a.y a.z",
            "query_to_query": "x.a y.a a.x a.y",
            "doc_to_doc": "y.b z.b b.y b.z",
        },
        # The hard negative of a text is its negative as a document, too, unless it is that text's document.
        ("xyp", "yzw", "abq"): {"doc_to_doc": "y.b y.w y.q z.b z.p z.q b.y b.z b.p b.w"},
        ("xyp", "yzz", "abq"): {"doc_to_doc": "y.b y.q z.b z.p z.q b.y b.z b.p"},
        # One text on both sides (dropout makes the difference) stays a positive.
        ("xx", "yy", "xx"): {"query_to_doc": "x.y y.x", "query_to_query": "x.y y.x", "doc_to_doc": "x.y y.x"},
        # A row's own hard negative that is its query.
        ("xyx", "abc"): {"query_to_doc": "x.b x.c a.y a.x a.c"},
    }.items(),
)
def test_which_pairs_count(texts, expected):
    for way, pairs in expected.items():
        assert counted(texts, way) == set(pairs.split()), way
    if len(texts[0]) == 2:
        assert counted(texts, "doc_to_query") == set(expected["query_to_doc"].split())


# --- a scale that learns ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hardness", ["plain", "all"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_learnable_scale(similarity, way, hardness):
    sides, known = inputs(6, 1), knowledge("everything", 6, 1)
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    for extra in ({}, known._asdict()):
        options = {"similarity": similarity, "chunk_size": 4, **WAYS[way], **HARDNESS[hardness], **extra}
        mine, number = nce(sides, scale=scale, **options), nce(sides, scale=3.0, **options)
        torch.testing.assert_close(mine, number, **EXACT)
        *grads, own = torch.autograd.grad(mine, [*sides, scale])
        torch.testing.assert_close(grads, grads_of(number, sides), **EXACT)
        step = 1e-5
        difference = (nce(sides, scale=3 + step, **options) - nce(sides, scale=3 - step, **options)) / (2 * step)
        torch.testing.assert_close(own, difference.detach(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("way", ["one way", "two, each", "all four"])
def test_gradcheck(way, similarity):
    sides, scale = inputs(3, 1), torch.tensor(2.0, dtype=torch.float64, requires_grad=True)

    def function(scale: Tensor, *sides: Tensor) -> Tensor:
        return nce(list(sides), scale=scale, similarity=similarity, chunk_size=2, **WAYS[way])

    assert torch.autograd.gradcheck(function, [scale, *sides])


def test_scale_of_another_shape_and_dtype():
    sides = inputs(5)
    for scale in (torch.tensor([7.0]), torch.tensor([[7.0]], dtype=torch.bfloat16), nn.Parameter(torch.tensor(7.0))):
        assert_same(sides, nce(sides, scale=scale), nce(sides, scale=7.0))
    scale = torch.tensor([7.0], requires_grad=True)
    nce(sides, scale=scale).backward()
    assert scale.grad.shape == (1,) and scale.grad.dtype == torch.float32


# --- a projection of all sides ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "normalised"])
@pytest.mark.parametrize("activation", [None, torch.tanh], ids=["linear", "tanh"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_projection(bias, activation, normalize, similarity):
    sides = inputs(6, 1)
    generator = torch.Generator().manual_seed(1)
    weight, offset = (
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in ((4, 5), (4,))
    )
    given = {"weight": weight, "bias": offset if bias else None, "activation": activation, "normalize": normalize}

    def embed(x: Tensor) -> Tensor:
        x = F.linear(x, weight, offset if bias else None)
        x = activation(x) if activation else x
        return F.normalize(x, dim=1) if normalize else x

    leaves = [*sides, weight, *([offset] if bias else [])]
    for way in ("one way", "two, each", "all four"):
        options = {"similarity": similarity, **WAYS[way]}
        mine = nce(sides, chunk_size=4, **given, **options)
        assert_same(leaves, mine, nce([embed(side) for side in sides], **options))
    assert_same(sides, nce(sides, normalize=True), nce([F.normalize(side, dim=1) for side in sides]))


# --- dtypes and nasty numbers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("way", WAYS)
def test_narrow_inputs(way, similarity, dtype):
    sides = inputs(40, 1, dtype, width=32)
    exact = [side.detach().double().requires_grad_() for side in sides]
    scale = torch.tensor(10.0 if similarity == "cosine" else 0.2, requires_grad=True)
    wide = scale.detach().double().requires_grad_()
    mine, theirs = (
        nce(x, scale=s, similarity=similarity, chunk_size=16, **WAYS[way]) for x, s in ((sides, scale), (exact, wide))
    )
    assert mine.dtype == torch.float32
    small = dtype == torch.float32
    torch.testing.assert_close(mine.double(), theirs, rtol=1e-5 if small else 1e-2, atol=1e-5 if small else 1e-2)
    for a, b in zip(grads_of(mine, [*sides, scale]), grads_of(theirs, [*exact, wide])):
        if a.dim():
            assert a.dtype == dtype
        assert (a.double() - b).norm() < (1e-4 if small else 4e-2) * b.norm()


def test_narrow_and_a_function():
    sides = inputs(20, 1, torch.bfloat16, width=16)
    mine = nce(sides, similarity=dot, scale=0.2)
    assert mine.dtype == torch.float32
    exact = nce([side.detach().double() for side in sides], similarity=dot, scale=0.2)
    torch.testing.assert_close(mine.double(), exact, rtol=1e-2, atol=1e-2)
    assert all(grad.dtype == torch.bfloat16 and grad.isfinite().all() for grad in grads_of(mine, sides))


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_identical_rows(way, learns):
    """Every candidate ties with the positive: the loss is the logarithm of their number."""
    sides = [torch.ones(5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    scale = torch.tensor(20.0, requires_grad=True) if learns else 20.0
    mine = nce(sides, scale=scale, **WAYS[way])
    sizes = {"query_to_doc": 10, "query_to_query": 4, "doc_to_query": 5, "doc_to_doc": 8}
    chosen = [sizes[name] for name in WAYS[way].get("directions", ALL[:1])]
    logs = math.log(sum(chosen)) if way != "two, each" else sum(map(math.log, chosen)) / 2
    assert mine.item() == pytest.approx(logs)
    assert all(grad.abs().max() < 1e-6 for grad in grads_of(mine, sides))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", WAYS)
def test_huge_scales_stay_finite(way, dtype):
    sides = inputs(7, 1, dtype)
    for scale in (1e4, torch.tensor(1e4, requires_grad=True)):
        loss = nce(sides, scale=scale, **WAYS[way])
        assert loss.isfinite() and all(grad.isfinite().all() for grad in grads_of(loss, sides))
    if dtype == torch.float64:
        theirs = library(sides, scale=1e4, **WAYS[way])
        assert_same(sides, nce(sides, scale=1e4, **WAYS[way]), theirs, rtol=1e-9, atol=1e-8)


@pytest.mark.parametrize("way", WAYS)
def test_zero_rows_stay_finite(way):
    sides = [torch.zeros(4, 6, requires_grad=True) for _ in range(3)]
    loss = nce(sides, **WAYS[way])
    assert loss.isfinite() and all(grad.isfinite().all() for grad in grads_of(loss, sides))


# --- how it runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("way", ["one way", "two, each", "all four"])
class TestAutograd:
    def test_no_grad(self, way, similarity):
        sides, options = inputs(6, 1), {"similarity": similarity, **WAYS[way]}
        with torch.no_grad():
            value = nce(sides, **options)
        assert not value.requires_grad
        torch.testing.assert_close(value, nce(sides, **options).detach(), **EXACT)

    def test_backward_twice(self, way, similarity):
        sides, options = inputs(6, 1), {"similarity": similarity, **WAYS[way]}
        loss = nce(sides, **options)
        first = torch.autograd.grad(loss, sides, retain_graph=True)
        second = torch.autograd.grad(3 * loss, sides)
        torch.testing.assert_close(second, [3 * grad for grad in first], **EXACT)

    def test_frozen_sides(self, way, similarity):
        sides, options = inputs(6, 1), {"similarity": similarity, **WAYS[way]}
        expected = grads_of(nce(sides, **options), sides)
        for i, (side, grad) in enumerate(zip(sides, expected)):
            others = [x if j == i else x.detach() for j, x in enumerate(sides)]
            torch.testing.assert_close(torch.autograd.grad(nce(others, **options), side)[0], grad, **EXACT)

    def test_one_tensor_on_both_sides(self, way, similarity):
        (x,) = inputs(6)[:1]
        other = x.detach().clone().requires_grad_()
        mine = grads_of(nce([x, x], similarity=similarity, **WAYS[way]), [x])[0]
        apart = grads_of(nce([x, other], similarity=similarity, **WAYS[way]), [x, other])
        torch.testing.assert_close(mine, sum(apart), **EXACT)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("projected", [False, True])
def test_autocast(way, projected):
    sides, exact = inputs(20, 1, torch.float32, width=16), inputs(20, 1, torch.float64, width=16)
    weight = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)) if projected else None
    with torch.autocast("cpu", torch.bfloat16):
        mine = nce(sides, scale=5.0, weight=weight, **WAYS[way])
    theirs = nce(exact, scale=5.0, weight=None if weight is None else weight.double(), **WAYS[way])
    assert mine.dtype == torch.float32
    torch.testing.assert_close(mine.double(), theirs, rtol=2e-2, atol=2e-2)
    for a, b in zip(grads_of(mine, sides), grads_of(theirs, exact)):
        assert a.dtype == torch.float32 and (a.double() - b).norm() < 5e-2 * b.norm()


BAD = {
    "rows": (lambda s: nce([s[0], s[1][:3]]), ValueError, "one shape"),
    "widths": (lambda s: nce([s[0], s[1][:, :2]]), ValueError, "one shape"),
    "negative rows": (lambda s: nce([*s, s[1][:3]]), ValueError, "one shape"),
    "a vector": (lambda s: nce([s[0][0], s[1][0]]), ValueError, r"queries of shape \(N, H\), got \(5,\)"),
    "negative vector": (lambda s: CF.info_nce(*s, hard_negatives=s[1][0]), ValueError, r"hard_negatives\[0\] of shape"),
    "no rows": (lambda s: nce([x[:0] for x in s]), ValueError, "at least one row"),
    "no width": (lambda s: nce([x[:, :0] for x in s]), ValueError, "one column"),
    "mixed": (lambda s: nce([s[0], s[1].float()]), TypeError, "one dtype"),
    "integers": (lambda s: nce([x.detach().long() for x in s]), TypeError, "queries to be floating point"),
    "an array": (lambda s: CF.info_nce(s[0], s[1].tolist()), TypeError, "documents to be a tensor, got list"),
    "a negative's array": (lambda s: CF.info_nce(*s, hard_negatives=[[1.0]]), TypeError, r"hard_negatives\[0\] to be"),
    "devices": (lambda s: nce([s[0], s[1].to("meta")]), ValueError, "documents on cpu, got meta"),
    "meta": (lambda s: nce([x.to("meta") for x in s]), ValueError, "queries in memory"),
    "scale": (lambda s: nce(s, scale=0.0), ValueError, "scale to be a positive"),
    "negative scale": (lambda s: nce(s, scale=-1.0), ValueError, "scale to be a positive"),
    "zero tensor scale": (lambda s: nce(s, scale=torch.zeros(())), ValueError, r"a positive, .* got 0\.0"),
    "NaN tensor scale": (lambda s: nce(s, scale=torch.tensor(math.nan)), ValueError, "got nan"),
    "text scale": (lambda s: nce(s, scale="20"), TypeError, "scale to be a positive, finite number, got '20'"),
    "NaN scale": (lambda s: nce(s, scale=math.nan), ValueError, "scale to be a positive, finite number"),
    "infinite scale": (lambda s: nce(s, scale=math.inf), ValueError, "scale to be a positive, finite number"),
    "scales": (lambda s: nce(s, scale=torch.ones(2)), ValueError, "tensor of one"),
    "integer scale": (lambda s: nce(s, scale=torch.tensor(20)), TypeError, "scale to be floating point"),
    "similarity": (lambda s: nce(s, similarity="cos"), ValueError, "similarity"),
    "direction": (lambda s: nce(s, directions=("query_to_doc", "up")), ValueError, "directions"),
    "no positive": (lambda s: nce(s, directions=("doc_to_query",)), ValueError, "positive pair"),
    "no direction": (lambda s: nce(s, directions=()), ValueError, "positive pair"),
    "mode": (lambda s: nce(s, partition_mode="apart"), ValueError, "partition_mode"),
    "mode and directions": (
        lambda s: nce(s, partition_mode="per_direction", directions=ALL), ValueError, "hold no positive pair",
    ),
    "hardness": (lambda s: nce(s, hardness_mode="negatives"), ValueError, "hardness_mode"),
    "strength": (lambda s: nce(s, hardness_strength=-1.0), ValueError, "zero or more"),
    "NaN strength": (lambda s: nce(s, hardness_strength=math.nan), ValueError, "hardness_strength to be a finite"),
    "query ids": (lambda s: nce(s, query_ids=torch.zeros(4, dtype=torch.long)), ValueError, "query_ids"),
    "float ids": (lambda s: nce(s, query_ids=torch.zeros(5)), TypeError, "integers"),
    "bool ids": (lambda s: nce(s, document_ids=torch.zeros(5, dtype=torch.bool)), TypeError, "integers"),
    "document ids": (
        lambda s: nce(s, document_ids=torch.zeros(5, 2, dtype=torch.long)), ValueError, r"document_ids .*\(5, 1\)",
    ),
    "flat false negatives": (
        lambda s: nce(s, false_negatives=torch.zeros(5, dtype=torch.long)), ValueError, "false_negatives",
    ),
    "false negatives": (
        lambda s: nce(s, false_negatives=torch.zeros(4, 2, dtype=torch.long)), ValueError, "false_negatives",
    ),
    "one numbering of nothing": (lambda s: nce(s, shared_ids=True), ValueError, "shared_ids=True, got None and None"),
    "one numbering of one": (
        lambda s: nce(s, shared_ids=True, query_ids=torch.arange(5)), ValueError, "got a tensor and None",
    ),
    "a word for a switch": (lambda s: nce(s, shared_ids="yes"), TypeError, "shared_ids to be True or False"),
    "a bias alone": (lambda s: nce(s, bias=torch.zeros(5)), ValueError, "weight of shape"),
    "weight": (lambda s: nce(s, weight=torch.zeros(5, 4).double()), ValueError, "weight of shape"),
    "bias": (lambda s: nce(s, weight=s[0].new_zeros(4, 5), bias=s[0].new_zeros(5)), ValueError, "bias of shape"),
    "weight dtype": (lambda s: nce(s, weight=torch.zeros(4, 5)), TypeError, "one dtype"),
    "what a function returns": (lambda s: nce(s, similarity=lambda a, b: (a * a).sum(1)), ValueError, r"\(5, 5\)"),
    "chunk size": (lambda s: nce(s, chunk_size=0), ValueError, "chunk_size"),
    "chunk size, a function": (lambda s: nce(s, similarity=dot, chunk_size=0), ValueError, "chunk_size"),
}  # fmt: skip


@pytest.mark.parametrize("call", BAD)
def test_refuses(call):
    function, error, message = BAD[call]
    with pytest.raises(error, match=message):
        function(inputs(5))


# --- compiled ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("way", ["one way", "two, each", "all four"])
@pytest.mark.parametrize("masked", ["", "two numberings", "one numbering"])
def test_compiled(way, masked):
    for rows in (9,) if masked else (9, 14):
        sides = inputs(rows, 1)
        scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
        known = knowledge("everything", rows, 1)._asdict() if masked else {}
        known |= {"shared_ids": True} if masked == "one numbering" else {}
        for factor in (scale, 5.0):
            options = {"scale": factor, **WAYS[way], **HARDNESS["all" if masked else "plain"], **known}
            mine, theirs = (nce(sides, chunk_size=6, compiled=flag, **options) for flag in (True, False))
            assert_same([*sides, scale] if factor is scale else sides, mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide", [False, True], ids=["dynamic rows", "fixed sizes"])
@pytest.mark.parametrize("way", ["one way", "two, joint", "two, each"])
def test_the_steps_of_the_kernels(graphs, monkeypatch, way, wide, dtype):
    """On their plain twins, which a CPU takes: what goes in and comes out of them in an engine that pads and chunks."""
    monkeypatch.setattr("chunked_embed.functional.kernel_steps.kernel_refusal", lambda shape: None)
    if wide:
        monkeypatch.setattr("chunked_embed.engine.plan.NARROW", 0)
    for rows, negatives, chunk_size in ((11, 0, None), (11, 2, 4), (1, 1, None), (70, 0, 32)):
        sides = inputs(rows, negatives, dtype, width=16)
        exact = [side.detach().double().requires_grad_() for side in sides]
        theirs = library(exact, scale=5.0, **WAYS[way])
        for scale in (5.0, torch.tensor(5.0, requires_grad=True)):
            options = {"compiled": True, "chunk_size": chunk_size, "scale": scale, **WAYS[way]}
            mine = nce(sides, **options)
            small = dtype == torch.float32
            torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=1e-5 if small else 2e-2)
            for a, b in zip(grads_of(mine, sides), grads_of(theirs, exact)):
                assert (a.double() - b).norm() <= (1e-5 if small else 4e-2) * (b.norm() + 1e-3)
            frozen = [sides[0].detach(), *sides[1:]]
            for a, b in zip(grads_of(nce(frozen, **options), sides[1:]), grads_of(theirs, exact)[1:]):
                assert (a.double() - b).norm() <= (1e-5 if small else 4e-2) * (b.norm() + 1e-3)
            with torch.no_grad():
                torch.testing.assert_close(nce(sides, **options), mine.detach())


@pytest.fixture
def graphs(monkeypatch):
    """A fresh cache, and a backend that traces but generates no code: what is counted is graphs."""
    torch._dynamo.reset()
    cache.clear()
    counters.clear()
    monkeypatch.setattr(cache, "BACKEND", "eager")
    yield lambda: counters["stats"]["unique_graphs"]
    cache.clear()


@pytest.mark.slow
@pytest.mark.parametrize("wide", [False, True], ids=["dynamic rows", "fixed sizes"])
@pytest.mark.parametrize("way", ["one way", "two, each", "all four"])
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_ragged_batches_compile_little(graphs, monkeypatch, way, masked, wide):
    if wide:
        monkeypatch.setattr("chunked_embed.engine.plan.NARROW", 0)
    sizes = random.Random(0).choices(range(2, 120), k=30)
    counts = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # falling back to eager warns
        for seed, size in enumerate(sizes):
            before = graphs()
            sides = inputs(size, 1, torch.float32, seed=seed)
            known = knowledge("everything", size, 1)._asdict() if masked else {}
            nce(sides, compiled=True, chunk_size=64, **known, **WAYS[way]).backward()
            counts.append(graphs() - before)
    # Unit vectors and their gradient; the loss, or scores and their gradient.
    two_sided = way == "two, each"
    steps = 4 if two_sided else 3
    assert sum(counts) <= ((7 if wide else 4) if two_sided else (5 if wide else 3)) * steps, counts
    # Of fixed sizes each turns dynamic in its columns on its own, the small ones when they first come.
    assert sum(counts[10:]) == (1 if two_sided and wide else 0), counts


def test_numbers_that_change_compile_nothing(graphs):
    """From the third value on."""
    sides = inputs(7, 1, torch.float32)
    for way in ("one way", "two, each", "all four"):
        options = {"compiled": True, **WAYS[way], **HARDNESS["all"]}
        for make in (float, lambda x: torch.tensor(x, requires_grad=True)):
            for scale, more in ((20.0, {}), (5.0, {}), (5.0, {"hardness_strength": 2.0})):
                nce(sides, scale=make(scale), **options | more).backward()
            before = graphs()
            for scale in (3.0, 0.7, 100.0):
                mine = nce(sides, scale=make(scale), **options)
                mine.backward()
                torch.testing.assert_close(mine, nce(sides, scale=scale, **WAYS[way], **HARDNESS["all"]))
            nce(sides, scale=make(20.0), **options | {"hardness_strength": 1.0}).backward()
            assert graphs() == before
