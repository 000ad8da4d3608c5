"""Every class of the library's sparse losses that goes inside of another one, ours beside theirs."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from sentence_transformers import util
from sentence_transformers.sparse_encoder import losses as library
from st_parts import labels_for
from torch import Tensor, nn

from chunked_embed import losses as dense
from chunked_embed.chunking import NAMES
from chunked_embed.losses._base import OPTIONS, ChunkedLoss
from chunked_embed.sparse import losses

N, V = 9, 17
OURS = {"chunk_size": 4, "compiled": False}
HANDED_THROUGH = {"CSRReconstructionLoss", "SparseMSELoss"}
WITH_OTHERS = {"CSRLoss", "CachedSpladeLoss", "SpladeLoss"}


class Model(nn.Identity):
    similarity_fn_name: str | None = None


class Case(NamedTuple):
    name: str
    columns: int = 2
    labels: str | None = None
    args: tuple = ()
    keywords: dict[str, Any] = {}

    def ours(self, **options: Any) -> Any:
        return getattr(losses, self.name)(Model(), *self.args, **self.keywords, **options)

    def theirs(self) -> Any:
        return getattr(library, self.name)(Model(), *self.args, **self.keywords)


MNRL = "SparseMultipleNegativesRankingLoss"
ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
CASES = {
    "ranking": Case(MNRL, 3),
    "ranking, both ways": Case(
        MNRL, args=(0.5,), keywords={"directions": (ALL[0], ALL[2]), "partition_mode": "per_direction"}
    ),
    "ranking, all ways": Case(MNRL, 3, keywords={"directions": ALL, "hardness_mode": "all_negatives", "scale": 2.0}),
    "ranking, cosine": Case(MNRL, args=(20.0, util.cos_sim)),
    "CoSENT": Case("SparseCoSENTLoss", labels="tied"),
    "CoSENT, dot": Case("SparseCoSENTLoss", labels="random", args=(0.5, util.pairwise_dot_score)),
    "AnglE": Case("SparseAnglELoss", labels="tied", keywords={"scale": 5.0}),
    "triplet": Case("SparseTripletLoss", 3),
    "triplet, cosine": Case("SparseTripletLoss", 3, args=(dense.TripletDistanceMetric.COSINE, 0.3)),
    "margins": Case("SparseMarginMSELoss", 3, "random"),
    "margins of scores": Case("SparseMarginMSELoss", 4, "three"),
    "margins, cosine": Case("SparseMarginMSELoss", 3, "two", keywords={"similarity_fct": util.pairwise_cos_sim}),
    "lists": Case("SparseDistillKLDivLoss", 3, "two"),
    "lists, cooler": Case("SparseDistillKLDivLoss", 3, "two", args=(util.pairwise_cos_sim, 0.5, 3.0)),
    "cosine": Case("SparseCosineSimilarityLoss", labels="random"),
    "cosine, L1": Case("SparseCosineSimilarityLoss", labels="random", args=(nn.L1Loss(), nn.Tanh())),
}
FIRST = {case.name: case for case in reversed(CASES.values())}
every = pytest.mark.parametrize("case", CASES)
each = pytest.mark.parametrize("name", FIRST)


def given(case: Case, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor | None]:
    torch.manual_seed(0)
    columns = [torch.rand(N, V, dtype=torch.float64) * (torch.rand(N, V) < 0.4) for _ in range(case.columns)]
    labels = None if case.labels is None else labels_for(case.labels, N).to(dtype)
    return [column.to(dtype).requires_grad_() for column in columns], labels


def result(loss: Any, columns: list[Tensor], labels: Tensor | None) -> list[Tensor]:
    value = loss.compute_loss_from_embeddings(columns, labels)
    return [value.detach(), *torch.autograd.grad(1.5 * value, columns)]


def test_every_name() -> None:
    assert set(library.__all__) <= set(losses.__all__) <= set(dir(losses))
    for name in library.__all__:
        assert (getattr(losses, name) is getattr(library, name)) == (name in HANDED_THROUGH), name
        assert issubclass(getattr(losses, name), getattr(library, name))
    assert {*FIRST, *HANDED_THROUGH, *WITH_OTHERS, "FlopsLoss"} == set(losses.__all__)
    with pytest.raises(AttributeError, match=r"NoLoss.*it has CSRLoss"):
        losses.NoLoss  # noqa: B018


# --- numbers ---------------------------------------------------------------------------------------------------------


@every
def test_is_the_librarys(case: str) -> None:
    """With our computation, and with that of small batches."""
    columns, labels = given(CASES[case])
    expected = result(CASES[case].theirs(), columns, labels)
    for options in (OURS, {}):
        found = result(CASES[case].ours(**options), columns, labels)
        torch.testing.assert_close(found, expected, rtol=1e-6 if labels is not None else 1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every
def test_precision(case: str, dtype: torch.dtype) -> None:
    columns, labels = given(CASES[case], dtype)
    labels = labels if labels is None else labels.float()
    wide = [column.detach().double().requires_grad_() for column in columns]
    expected = result(CASES[case].theirs(), wide, labels if labels is None else labels.double())
    value, *grads = result(CASES[case].ours(**OURS), columns, labels)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected[0].item(), rel=2e-5, abs=1e-6)
    bound = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    for grad, exact in zip(grads, expected[1:]):
        assert grad.dtype == dtype and (grad.double() - exact).norm() <= bound * exact.norm().clamp_min(1e-6)


def test_a_wide_batch_is_ours() -> None:
    """The library copies embeddings that are wider than there are rows."""
    loss = losses.SparseMultipleNegativesRankingLoss(Model())
    assert loss._size(8, 30522, 2) == 2 * 8 * 30522
    assert loss._size(4096, 16, 2) == dense.MultipleNegativesRankingLoss(Model())._size(4096, 16, 2)


# --- the rest of an object -------------------------------------------------------------------------------------------


@every
def test_attributes_config_and_copies(case: str) -> None:
    ours, theirs = CASES[case].ours(), CASES[case].theirs()
    assert ours.get_config_dict() == theirs.get_config_dict()
    assert getattr(ours, "citation", None) == getattr(theirs, "citation", None) and repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours.model.similarity_fn_name == theirs.model.similarity_fn_name
    names = {name for name in vars(theirs) if not name.startswith("_")} | set(theirs._modules)
    for name in names - {"model", "training", "directions"}:
        value, other = getattr(ours, name), getattr(theirs, name)
        assert value == other or type(value) is type(other), name
    assert CASES[case].ours(**OURS).get_config_dict() == {**ours.get_config_dict(), **OURS}
    columns, labels = given(CASES[case])
    expected = result(ours, columns, labels)
    copies = [copy.deepcopy(ours)] if "Triplet" in CASES[case].name else [pickle.loads(pickle.dumps(ours))]
    for loss in copies:
        assert torch.equal(result(loss, columns, labels)[0], expected[0])


@each
def test_arguments(name: str) -> None:
    """The library's in its order, then ours, and none of how embeddings are made."""
    ours, theirs = (inspect.signature(getattr(package, name)).parameters for package in (losses, library))
    assert list(ours)[: len(theirs)] == list(theirs)
    assert [ours[n].default for n in theirs] == [p.default for p in theirs.values()] or name in (
        *("SparseCosineSimilarityLoss", "SparseTripletLoss"),  # modules and functions of their own
    )
    assert {*ours} & {*OPTIONS} == {"gather_across_devices", *NAMES}


@each
def test_a_call_of_its_own_is_refused(name: str) -> None:
    for package in (losses, library):
        with pytest.raises(AttributeError, match=name):
            getattr(package, name)(Model())([{}, {}], None)


FOREIGN = {"mini_batch_size": 4, "mini_batch_num_tokens": 9, "show_progress_bar": True, "fuse_projection": True}


@pytest.mark.parametrize("option", FOREIGN)
@each
def test_options_of_embedding_are_refused(name: str, option: str) -> None:
    with pytest.raises(TypeError, match=f"options of {name} among .*'chunk_size'.*got '{option}'"):
        getattr(losses, name)(Model(), **{option: FOREIGN[option]})
    loss = getattr(losses, name)(Model())
    with pytest.raises(TypeError, match=f"got '{option}'"):
        setattr(loss, option, FOREIGN[option])


BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    **{f"{name}, a name": (lambda name=name: getattr(losses, name)("bert"), TypeError, "as model, got 'bert'")
       for name in FIRST},
    "scale": (lambda: losses.SparseMultipleNegativesRankingLoss(Model(), -1.0), ValueError, "scale"),
    "ids": (lambda: losses.SparseMultipleNegativesRankingLoss(Model(), false_negatives="x"), ValueError, "false_neg"),
    "chunk_size": (lambda: losses.SparseTripletLoss(Model(), chunk_size=0), ValueError, "chunk_size"),
    "temperature": (lambda: losses.SparseDistillKLDivLoss(Model(), temperature=0.0), ValueError, "temperature"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_refuses(case: str) -> None:
    call, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        call()


def test_false_negatives_and_a_scale_that_learns() -> None:
    columns, _ = given(FIRST[MNRL])
    loss = losses.SparseMultipleNegativesRankingLoss(Model(), 2.0, learnable_scale=True, false_negatives="labels")
    labels = torch.arange(N) // 2
    loss.compute_loss_from_embeddings(columns, labels).backward()
    assert loss.log_scale.grad.abs() > 0
    a, b, c = (column.detach() for column in columns)
    same = labels[:, None] == labels
    z = (2 * a @ torch.cat([b, c]).T).masked_fill((same & ~torch.eye(N, dtype=torch.bool)).repeat(1, 2), -torch.inf)
    mine = loss.compute_loss_from_embeddings([a, b, c], labels)
    own = torch.eye(N, dtype=torch.bool)
    z[:, N:] = (2 * a @ c.T).masked_fill(same & ~own, -torch.inf)
    torch.testing.assert_close(mine.detach(), (z.logsumexp(1) - z.diagonal()).mean(), rtol=1e-6, atol=1e-6)


def test_json() -> None:
    for case in CASES.values():
        if not case.args or not callable(case.args[0]):
            json.dumps(case.ours(**OURS).get_config_dict())


def test_is_ours() -> None:
    assert all(issubclass(getattr(losses, name), ChunkedLoss) for name in FIRST)
