"""Small batches: the library's own computation, checked and widened as ours is, and ours wherever it is asked for."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from sentence_transformers.sentence_transformer import losses as library
from sentence_transformers.sentence_transformer.modules import Normalize
from st_parts import EXACT, assert_same, build, dense, features, labels_for, value_and_grads
from torch import Tensor, nn

from chunked_embed import checks, losses
from chunked_embed.losses import _base
from chunked_embed.losses._attach import leaves_behind
from chunked_embed.losses._base import (
    BY_DISTANCES,
    BY_PRODUCTS,
    BY_ROWS,
    BY_SIMILARITIES,
    BY_TRIPLETS,
    FEW_ROWS,
    ChunkedLoss,
    Small,
)
from chunked_embed.losses._tail import NO_TAIL

pytestmark = [
    pytest.mark.skipif(not EXACT, reason="ours runs at every size beside a library before 6.2"),
    pytest.mark.filterwarnings("ignore:.*SymmetricRankingLoss is deprecated:DeprecationWarning"),
]

N, D = 8, 6
CHUNKED = {"chunk_size": 3, "compiled": False}
OURS = {
    "chunk_size": 2,
    "max_chunk_bytes": 1 << 20,
    "compiled": False,
    "float32_outputs": False,
    "fuse_projection": True,
}


class Embedded(nn.Module):
    """A model whose features are the embeddings, by the name that it is made with."""

    def __init__(self, name: str = "sentence_embedding") -> None:
        super().__init__()
        self.name = name

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": features[self.name]}


class Case(NamedTuple):
    columns: int = 2
    labels: str | None = None  # "guide": the guide's embeddings
    bound: Small = BY_ROWS
    size: Callable[[int, int, int], int] = lambda rows, width, columns: rows * width

    def given(self, dtype: torch.dtype = torch.float64, rows: int = N) -> tuple[list[Tensor], Any]:
        """Embeddings and labels."""
        torch.manual_seed(rows)
        columns = [torch.randn(rows, D, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(self.columns)]
        if self.labels == "guide":
            return columns, [torch.randn(rows, 4, dtype=torch.float64).to(dtype) for _ in columns]
        labels = labels_for(self.labels, rows) if self.labels else None
        rounds = labels is not None and labels.is_floating_point() and dtype.itemsize >= 4
        return columns, labels.to(dtype) if rounds else labels


def pairs(rows: int, width: int, columns: int) -> int:
    return rows * rows * (columns - 1)


def ranked(rows: int, width: int, columns: int) -> int:
    """All differences of scores beside the embeddings."""
    return rows * max(rows, width)


def of_candidates(rows: int, width: int, columns: int) -> int:
    return rows * width * (columns - 2)


CASES = {
    "AnglELoss": Case(2, "tied", BY_ROWS, ranked),
    "BatchAllTripletLoss": Case(1, "binary", BY_TRIPLETS, lambda rows, width, columns: rows**3),
    "BatchHardSoftMarginTripletLoss": Case(1, "binary", BY_DISTANCES, lambda rows, width, columns: rows**2),
    "BatchHardTripletLoss": Case(1, "binary", BY_DISTANCES, lambda rows, width, columns: rows**2),
    "BatchSemiHardTripletLoss": Case(1, "binary", BY_DISTANCES, lambda rows, width, columns: rows**2),
    "CachedGISTEmbedLoss": Case(3, "guide", BY_PRODUCTS, lambda *shape: shape[1] * pairs(*shape)),
    "CachedMultipleNegativesRankingLoss": Case(3, None, BY_SIMILARITIES, pairs),
    "CachedMultipleNegativesSymmetricRankingLoss": Case(2, None, BY_SIMILARITIES, lambda *shape: 2 * pairs(*shape)),
    "CoSENTLoss": Case(2, "tied", BY_ROWS, ranked),
    "ContrastiveLoss": Case(labels="binary"),
    "ContrastiveTensionLossInBatchNegatives": Case(2, None, BY_SIMILARITIES, pairs),
    "CosineSimilarityLoss": Case(labels="random"),
    "DistillKLDivLoss": Case(3, "two", BY_ROWS, of_candidates),
    "GISTEmbedLoss": Case(3, "guide", BY_PRODUCTS, lambda *shape: shape[1] * pairs(*shape)),
    "GlobalOrthogonalRegularizationLoss": Case(2, None, BY_DISTANCES, lambda rows, width, columns: rows**2),
    "MarginMSELoss": Case(3, "random", BY_ROWS, of_candidates),
    "MegaBatchMarginLoss": Case(2, None, BY_DISTANCES, pairs),
    "MultipleNegativesRankingLoss": Case(3, None, BY_SIMILARITIES, pairs),
    "MultipleNegativesSymmetricRankingLoss": Case(2, None, BY_SIMILARITIES, lambda *shape: 2 * pairs(*shape)),
    "OnlineContrastiveLoss": Case(labels="binary"),
    "TripletLoss": Case(3),
}
LABELLED = [name for name, case in CASES.items() if case.labels not in (None, "guide")]
ELSEWHERE = {"DenoisingAutoEncoderLoss", "Matryoshka2dLoss", "MatryoshkaLoss", "SigmoidPairLoss"}


def ours(name: str, **options: Any) -> Any:
    return made(losses, name, **options)


def made(package: Any, name: str, **options: Any) -> Any:
    """A loss whose models hand on the embeddings that they are given."""
    kind = getattr(package, name)
    if "GIST" not in name:
        return kind(Embedded(), **options)
    loss = kind.__new__(kind)  # its constructor asks the models for tokenizers
    nn.Module.__init__(loss)
    loss.model, loss.guide, loss.must_retokenize, loss.temperature = Embedded(), Embedded("guide"), False, 0.1
    loss.margin_strategy, loss.margin, loss.contrast_anchors, loss.contrast_positives = "absolute", 0.01, True, True
    loss.similarity_fct, loss.cross_entropy_loss = nn.CosineSimilarity(dim=-1), nn.CrossEntropyLoss()
    if package is losses:
        loss._set_options(**options)
    else:
        loss.gather_across_devices, loss.show_progress_bar, loss.mini_batch_size = False, False, N
    return loss


def by_library(name: str, columns: list[Tensor], labels: Any) -> Any:
    """The library's computation of a class that has no such method, or has it for mini-batches alone, in one step."""
    if name == "CachedGISTEmbedLoss":
        return made(library, name).calculate_loss([[x] for x in columns], [[x] for x in labels])
    loss = made(library, name.removeprefix("Cached"), **{"use_mini_batched_version": False} if "Mega" in name else {})
    if name == "GISTEmbedLoss":
        return loss([{"sentence_embedding": x, "guide": y} for x, y in zip(columns, labels)], None)
    if name == "MegaBatchMarginLoss":
        return loss.calculate_loss([[column] for column in columns])
    if name == "ContrastiveTensionLossInBatchNegatives":
        loss.model1, loss.model2 = Embedded("a"), Embedded("b")
        return loss([dict(zip("ab", columns))], None)
    return loss.compute_loss_from_embeddings(columns, labels)


def result(value: Any, columns: list[Tensor]) -> list[Tensor]:
    """The loss, or its terms, and the gradients."""
    terms = list(value.values()) if isinstance(value, dict) else [value]
    return [*(term.detach() for term in terms), *torch.autograd.grad(1.5 * sum(terms), columns)]


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The classes of losses that were left to the library, one for each time."""
    seen: list[str] = []
    before = ChunkedLoss._left

    def recording(self: ChunkedLoss, *args: Any) -> Any:
        seen.append(type(self).__name__)
        return before(self, *args)

    monkeypatch.setattr(ChunkedLoss, "_left", recording)
    return seen


def test_every_class_is_here() -> None:
    found = {name for name in losses.__all__ if isinstance(getattr(losses, name), type)}
    mine = {name for name in found if getattr(losses, name).__module__.startswith("chunked_embed.losses.")}
    assert mine - {"ChunkedLoss", "Options"} == {*CASES, *ELSEWHERE}


# --- the library's numbers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_to_the_last_bit(name: str, dtype: torch.dtype, left: list[str]) -> None:
    columns, labels = CASES[name].given(dtype)
    found = result(ours(name).compute_loss_from_embeddings(columns, labels), columns)
    assert set(left) == {name}
    for mine, theirs in zip(found, result(by_library(name, columns, labels), columns), strict=True):
        assert mine.dtype == dtype and torch.equal(mine, theirs)
    with torch.no_grad():
        value = ours(name).compute_loss_from_embeddings(columns, labels)
    terms = list(value.values()) if isinstance(value, dict) else [value]
    assert all(torch.equal(term, mine) for term, mine in zip(terms, found))


@pytest.mark.parametrize("kind", ["column", "bool", "float32", "learns"])
@pytest.mark.parametrize("name", LABELLED)
def test_labels_of_other_kinds(name: str, kind: str, left: list[str]) -> None:
    """In the form that the library takes: one shape, no booleans; in the dtype of what is computed."""
    columns, labels = CASES[name].given()
    if kind == "bool":
        if CASES[name].labels != "binary":
            pytest.skip("labels of two values alone")
        given = labels.bool()
    elif kind == "column":
        given = labels[:, None] if labels.ndim == 1 and name != "MarginMSELoss" else labels
    else:
        labels = labels.float()
        given = labels if kind == "float32" else labels.clone().requires_grad_()
    found = result(ours(name).compute_loss_from_embeddings(columns, given), columns)
    expected = result(ours(name, **CHUNKED).compute_loss_from_embeddings(columns, given), columns)
    assert left == [name]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def distance(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [float((x.double() - y).norm() / y.norm().clamp_min(1e-3)) for x, y in zip(found, exact, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, "autocast"], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_half_precision(name: str, dtype: Any, left: list[str]) -> None:
    """Nearer to the loss of those embeddings than the library's and our chunked one, or as near, and float32."""
    autocast = dtype == "autocast"
    columns, labels = CASES[name].given(torch.float32 if autocast else dtype)
    wide = [column.detach().double().requires_grad_() for column in columns]
    teacher = [x.double() for x in labels] if isinstance(labels, list) else labels
    exact = result(by_library(name, wide, teacher), wide)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = ours(name).compute_loss_from_embeddings(columns, labels)
        theirs = by_library(name, columns, labels)
        chunked = ours(name, **CHUNKED).compute_loss_from_embeddings(columns, labels)
        assert torch.is_autocast_enabled("cpu") is autocast
    found, theirs, chunked = (result(value, columns) for value in (found, theirs, chunked))
    assert set(left) == {name}
    count = len(found) - len(columns)
    assert {value.dtype for value in found[:count]} == {torch.float32}
    assert {grad.dtype for grad in found[count:]} == {columns[0].dtype}
    rounded = 2e-6 if autocast else 4 * torch.finfo(dtype).eps
    for i, (mine, *others) in enumerate(zip(*(distance(x, exact) for x in (found, theirs, chunked)))):
        assert mine <= (2e-6 if i < count else rounded)
        assert mine <= min(others) * 1.01 + 1e-6


def test_gradients_that_are_taken_under_autocast() -> None:
    """In mini-batches, in the forward pass: no product of the backward pass is rounded."""
    columns, _ = CASES["MultipleNegativesRankingLoss"].given(torch.float32)
    loss = ours("MultipleNegativesRankingLoss", mini_batch_size=3)
    parts = [[part.detach().requires_grad_() for part in column.split(3)] for column in columns]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss.calculate_loss(parts, None, with_backward=True)
    expected = torch.autograd.grad(by_library("MultipleNegativesRankingLoss", columns, None), columns)
    for column, grad in zip(parts, expected):
        torch.testing.assert_close(torch.cat([part.grad for part in column]), grad, rtol=1e-5, atol=1e-6)


def test_float16_beyond_its_range() -> None:
    columns = [(200 * torch.randn(N, D)).half().requires_grad_() for _ in range(3)]
    for scale in (1.0, 1e-9):
        loss = losses.MarginMSELoss(Embedded())
        value = scale * loss.compute_loss_from_embeddings(columns, torch.rand(N))
        wide = [column.detach().double().requires_grad_() for column in columns]
        exact = scale * library.MarginMSELoss(Embedded()).compute_loss_from_embeddings(wide, torch.rand(N) * 0)
        assert value.dtype == torch.float32 and value.item() == pytest.approx(exact.item(), rel=1e-3)
        grads = torch.autograd.grad(1e-3 * value, columns), torch.autograd.grad(1e-3 * exact, wide)
        if scale < 1:
            torch.testing.assert_close([x.double() for x in grads[0]], list(grads[1]), rtol=2e-3, atol=1e-7)


def test_a_second_derivative() -> None:
    """Which ours lack."""
    columns, labels = CASES["CosineSimilarityLoss"].given()
    for loss in (ours("CosineSimilarityLoss"), library.CosineSimilarityLoss(Embedded())):
        value = loss.compute_loss_from_embeddings(columns, labels)
        (grad,) = torch.autograd.grad(value, columns[:1], create_graph=True)
        assert torch.autograd.grad(grad.square().sum(), columns[0])[0].any()


# --- where ours runs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_an_option_asks_for_ours(name: str, left: list[str]) -> None:
    columns, labels = CASES[name].given()
    expected = result(ours(name).compute_loss_from_embeddings(columns, labels), columns)
    assert left
    left.clear()
    found = result(ours(name, **CHUNKED).compute_loss_from_embeddings(columns, labels), columns)
    assert not left
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    loss = ours(name)
    loss.mini_batch_size = None  # beside which one of the options is refused
    for option, value in OURS.items():
        assert loss._is_small(columns, labels)
        before = getattr(loss, option)
        setattr(loss, option, value)
        assert not loss._is_small(columns, labels)
        setattr(loss, option, before)


@pytest.mark.parametrize("name", CASES)
def test_up_to_a_bound(name: str, left: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    loss, (columns, labels) = ours(name), case.given()
    assert loss._small is case.bound
    size = case.size(N, D, case.columns)
    for bound, times in ((size, 1), (size - 1, 0)):
        monkeypatch.setattr(type(loss), "_small", Small(bound, bound, bound))
        left.clear()
        loss.compute_loss_from_embeddings(columns, labels)
        assert bool(left) is bool(times)


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].columns == 3 and name != "TripletLoss"])
def test_each_candidate_counts(name: str) -> None:
    for columns in (3, 12):
        assert ours(name)._size(N, D, columns) == CASES[name].size(N, D, columns)


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].labels == "guide"])
def test_a_wide_guide_counts(name: str, left: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cosines are summed up from products, too."""
    case = CASES[name]
    loss, (columns, guide) = ours(name), case.given()
    size = case.size(N, D, case.columns)
    monkeypatch.setattr(type(loss), "_small", Small(size, size, size))
    loss.compute_loss_from_embeddings(columns, [torch.randn(N, D + 1) for _ in guide])
    assert not left


def test_a_teacher_of_large_float64_scores(left: list[str]) -> None:
    """What they differ by is not rounded away with what they have in common."""
    columns, labels = CASES["DistillKLDivLoss"].given(torch.float32)
    far = labels.double() + 2.0**40
    found = result(ours("DistillKLDivLoss").compute_loss_from_embeddings(columns, far), columns)
    expected = result(ours("DistillKLDivLoss", **CHUNKED).compute_loss_from_embeddings(columns, far), columns)
    assert left == ["DistillKLDivLoss"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_ours_among_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_base, "is_distributed", lambda: True)
    for name in CASES:
        columns, labels = CASES[name].given()
        loss = ours(name)
        assert loss._is_small(columns, labels)
        loss.gather_across_devices = True
        assert not loss._is_small(columns, labels)


def test_what_the_library_lacks() -> None:
    columns, _ = CASES["MultipleNegativesRankingLoss"].given(torch.float32)
    for name in ("MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"):
        for options in (
            {"learnable_scale": True},
            {"false_negatives": "labels"},
            {"similarity_fct": lambda a, b: a @ b.T},
        ):
            assert not ours(name, **options)._is_small(columns, torch.arange(N))
    columns, labels = CASES["CosineSimilarityLoss"].given()
    assert not ours("CosineSimilarityLoss", loss_fct=nn.HuberLoss())._is_small(columns, labels)
    assert not ours("CoSENTLoss", similarity_fct=lambda a, b: (a * b).sum(1))._is_small(columns, labels)


# --- what is refused, and checked ------------------------------------------------------------------------------------

BAD_COLUMNS: dict[str, Callable[[Tensor], Any]] = {
    "integers": lambda x: x.long(),
    "bytes": lambda x: x.to(torch.uint8),
    "another dtype": lambda x: x.float(),
    "a list": lambda x: x.tolist(),
    "meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "a vector": lambda x: x[0],
    "tokens": lambda x: x[:, None].expand(N, 3, D),
    "fewer rows": lambda x: x[:-1],
    "narrower": lambda x: x[:, :-1],
    "empty": lambda x: x[:0],
    "none": lambda x: None,
}
BAD_LABELS: dict[str, Callable[[Tensor], Any]] = {
    "none": lambda y: None,
    "a list": lambda y: y.tolist(),
    "few": lambda y: y[:-1],
    "many": lambda y: torch.cat([y, y]),
    "complex": lambda y: y + 1j,
    "meta": lambda y: y.to("meta"),
    "sparse": lambda y: (y + 1).to_sparse(),
    "NaN": lambda y: torch.full_like(y, torch.nan, dtype=torch.float64),
}


def refusal(loss: Any, columns: Any, labels: Any) -> tuple[type, str]:
    with pytest.raises((TypeError, ValueError)) as raised:
        loss.compute_loss_from_embeddings(columns, labels)
    return raised.type, str(raised.value)


@pytest.mark.parametrize("name", CASES)
def test_refusals_are_the_same(name: str, left: list[str]) -> None:
    small, chunked = ours(name), ours(name, **CHUNKED)
    columns, labels = CASES[name].given()
    for kind, bad in BAD_COLUMNS.items():
        if "Orthogonal" in name and kind in ("another dtype", "fewer rows", "narrower"):
            continue  # each column is on its own
        if len(columns) == 1 and kind in ("another dtype", "narrower"):
            continue
        given = [*columns[:-1], bad(columns[-1].detach())]
        assert refusal(small, given, labels) == refusal(chunked, given, labels), kind
    for given in ([], columns[:1] if len(columns) > 1 else []):
        if not ("Orthogonal" in name and given):
            assert refusal(small, given, labels) == refusal(chunked, given, labels)
    assert not left or len(columns) == 1  # then other rows are the labels' fault
    for kind, bad in BAD_LABELS.items() if name in LABELLED else ():
        assert refusal(small, columns, bad(labels)) == refusal(chunked, columns, bad(labels)), kind


LATER: dict[str, dict[str, Any]] = {
    "BatchAllTripletLoss": {"triplet_margin": float("inf")},
    "BatchHardTripletLoss": {"triplet_margin": "wide"},
    "BatchSemiHardTripletLoss": {"margin": float("nan")},
    "CachedMultipleNegativesRankingLoss": {"scale": 0.0},
    "GISTEmbedLoss": {"temperature": 0.0, "margin_strategy": "both", "margin": float("nan")},
    "MegaBatchMarginLoss": {"positive_margin": float("nan"), "negative_margin": None},
    "MultipleNegativesRankingLoss": {
        "scale": -1.0,
        "directions": ("doc_to_query",),
        "partition_mode": "both",
        "hardness_mode": "hard",
        "hardness_strength": -1.0,
    },
    "TripletLoss": {"triplet_margin": float("nan")},
}


@pytest.mark.parametrize("name", LATER)
def test_values_set_later_are_refused(name: str, left: list[str]) -> None:
    """In each call, until there is another one."""
    columns, labels = CASES[name].given()
    for attribute, value in LATER[name].items():
        small, chunked = ours(name), ours(name, **CHUNKED)
        before = getattr(small, attribute)
        small.compute_loss_from_embeddings(columns, labels)
        for loss in (small, chunked):
            setattr(loss, attribute, value)
        for _ in range(2):
            assert refusal(small, columns, labels) == refusal(chunked, columns, labels)
        setattr(small, attribute, before)
        small.compute_loss_from_embeddings(columns, labels)
    assert left


@pytest.mark.parametrize("name", ["ContrastiveLoss", "OnlineContrastiveLoss"])
def test_labels_between_are_warned_about_once(name: str) -> None:
    columns, _ = CASES[name].given()
    loss = ours(name)
    with pytest.warns(UserWarning, match=f"{name} got labels other than 0 and 1"):
        loss.compute_loss_from_embeddings(columns, labels_for("tied", N))
    loss.compute_loss_from_embeddings(columns, labels_for("tied", N))  # a second warning would be an error


def test_nan_is_seen_in_tensors_of_all_kinds() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for rows in (1, 64, 65):
            for fill in (0.0, torch.inf):
                watch, value = checks.NaNWatch(), torch.full((rows,), fill, dtype=dtype)
                if fill and rows > 1:
                    value[0] = -torch.inf
                for good in (value, value[:, None], value.long(), value[:0]):
                    assert watch.no_nan("labels", good) is good
                value[-1] = torch.nan
                for bad in (value, value[:, None]):
                    with pytest.raises(ValueError, match=f"expected labels without NaN, got 1 of {rows}"):
                        watch.no_nan("labels", bad)


def test_a_watch_is_pickled_and_copied_afresh() -> None:
    loss = ours("CoSENTLoss")
    loss.compute_loss_from_embeddings(*CASES["CoSENTLoss"].given())
    assert isinstance(loss._watch, checks.NaNWatch)
    assert isinstance(copy.deepcopy(loss._watch), checks.NaNWatch) and pickle.loads(pickle.dumps(loss._watch))


@pytest.mark.gpu
def test_nan_on_a_gpu_is_refused_a_call_later() -> None:
    columns, labels = CASES["CoSENTLoss"].given(torch.float32)
    columns, labels = [column.detach().cuda() for column in columns], labels.float().cuda()
    bad = torch.full_like(labels, torch.nan)
    first, loss = ours("CoSENTLoss"), ours("CoSENTLoss")
    with pytest.raises(ValueError, match="expected labels without NaN, got 8 of 8"):  # of the first batch
        first.compute_loss_from_embeddings(columns, bad)
    for _ in range(2):
        for _ in range(3):
            loss.compute_loss_from_embeddings(columns, labels)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a prototype
            try:
                torch.cuda.set_sync_debug_mode("error")
                loss.compute_loss_from_embeddings(columns, bad)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        with pytest.raises(ValueError, match="without NaN, got some in an earlier batch"):
            loss.compute_loss_from_embeddings(columns, labels)


@pytest.mark.gpu
def test_labels_at_several_widths_are_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step later, when the device has long been there: not at the second width."""
    waits: list[int] = []
    before = torch.cuda.Event.synchronize
    monkeypatch.setattr(torch.cuda.Event, "synchronize", lambda self: (waits.append(1), before(self)))
    monkeypatch.setattr(torch.cuda.Event, "query", lambda self: False)
    columns, labels = CASES["CoSENTLoss"].given(torch.float32)
    columns = [column.detach().cuda().requires_grad_() for column in columns]
    inner = ours("CoSENTLoss")
    inner.model.get_embedding_dimension = lambda: D
    loss = losses.MatryoshkaLoss(inner.model, inner, [D, 4, 2])
    for step, expected in enumerate((0, 0, 1, 2)):
        loss.compute_loss_from_embeddings(columns, labels.float().cuda())
        assert len(waits) == expected, step
    given = labels.float().cuda()
    for _ in range(2):
        inner.compute_loss_from_embeddings(columns, given)
        given[0] = torch.nan  # written to: looked at again
    with pytest.raises(ValueError, match="in an earlier batch"):
        inner.compute_loss_from_embeddings(columns, labels.float().cuda())


# --- on a model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["CoSENTLoss", "MultipleNegativesRankingLoss", "TripletLoss"])
def test_on_a_model(name: str, transformer_dir: str, left: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows run through the whole model, as the library's do; more of them are looked at for a tail."""
    model, case = build(transformer_dir, dense(), Normalize(), dtype=torch.float32), CASES[name]
    batch, labels = features(model, N, case.columns), case.labels and labels_for(case.labels, N)
    loss = getattr(losses, name)(model)
    found = value_and_grads(loss, model, batch, labels)
    expected = value_and_grads(getattr(library, name)(model), model, batch, labels)
    assert left == [name] and torch.equal(found[0], expected[0])
    assert all(torch.equal(found[1][key], grad) for key, grad in expected[1].items())
    assert loss._tail(batch) is NO_TAIL and loss._tail().modules
    loss.chunk_size = FEW_ROWS
    assert loss._tail(batch).modules
    loss.chunk_size = None
    monkeypatch.setattr(_base, "FEW_ROWS", N - 1)
    assert loss._tail(batch).modules
    assert_same(value_and_grads(loss, model, batch, labels), expected, rtol=1e-3, atol=1e-5)
    assert left == [name]


@pytest.mark.parametrize("name", ["CoSENTLoss", "MultipleNegativesRankingLoss", "BatchHardTripletLoss"])
def test_in_mini_batches_and_at_several_widths(name: str, transformer_dir: str, left: list[str]) -> None:
    model, case = build(transformer_dir), CASES[name]
    batch, labels = features(model, N, case.columns), case.labels and labels_for(case.labels, N)
    kind, theirs = getattr(losses, name), getattr(library, name)(model)
    expected = value_and_grads(theirs, model, batch, labels)
    assert_same(value_and_grads(kind(model, mini_batch_size=3), model, batch, labels), expected)
    widths = [16, 4]
    expected = value_and_grads(library.MatryoshkaLoss(model, theirs, widths), model, batch, labels)
    for inside, outside in (({}, {}), ({"mini_batch_size": 3}, {}), ({}, {"mini_batch_size": 3})):
        left.clear()
        around = losses.MatryoshkaLoss(model, kind(model, **inside), widths, **outside)
        assert_same(value_and_grads(around, model, batch, labels), expected)
        assert left == [name, name]


def test_what_learns_beside_the_embeddings() -> None:
    """Is found behind the loss, wherever it is held; what is behind the embeddings is not."""
    a, scale, weight = (torch.randn(3, requires_grad=True) for _ in range(3))
    made = a * weight
    loss = (made * scale.exp() + a).sum() + scale.sum()
    assert {id(leaf) for leaf in leaves_behind(loss, [made, a])} == {id(scale)}
    assert {id(leaf) for leaf in leaves_behind(loss, [made])} == {id(scale), id(a)}
    assert leaves_behind(loss.detach(), [made]) == []


def test_a_scale_that_nothing_registers(transformer_dir: str) -> None:
    """In mini-batches it has the gradient that it has in the library."""
    model, grads = build(transformer_dir), []
    batch = features(model, N, 2)
    name = "MultipleNegativesRankingLoss"
    for loss in (getattr(losses, name)(model, mini_batch_size=3, compiled=False), getattr(library, name)(model)):
        scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        loss.similarity_fct = lambda a, b, scale=scale: scale * (a @ b.T)
        value_and_grads(loss, model, batch, None)
        grads.append(scale.grad)
    torch.testing.assert_close(*grads)
