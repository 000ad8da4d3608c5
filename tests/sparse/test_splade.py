"""SpladeLoss, CachedSpladeLoss and CSRLoss beside the library's: terms, gradients, mini-batches, trainer, cards."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import random
import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sentence_transformers import (
    SparseEncoder,
    SparseEncoderModelCardData,
    SparseEncoderTrainer,
    SparseEncoderTrainingArguments,
)
from sentence_transformers.base.losses import gradcache
from sentence_transformers.base.model_card import generate_model_card
from sentence_transformers.sentence_transformer import losses as dense_library
from sentence_transformers.sentence_transformer.modules import Router
from sentence_transformers.sparse_encoder import losses as library
from sentence_transformers.sparse_encoder.callbacks.splade_callbacks import SpladeRegularizerWeightSchedulerCallback
from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding, SpladePooling
from sparse_parts import KINDS, WEIGHTS, assert_alike, csr, result, splade
from st_parts import EXACT, HIDDEN, features, labels_for, sentences
from torch import Tensor, nn

from chunked_embed import __version__
from chunked_embed import losses as dense
from chunked_embed.losses._base import BY_ROWS, Small
from chunked_embed.sparse import losses
from chunked_embed.sparse.losses import _places, flops
from chunked_embed.sparse.losses._places import Places, keeps_zeros

N = 7
CHUNKS = {"chunk_size": 3, "compiled": False}
MNRL = "SparseMultipleNegativesRankingLoss"
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning"),
]

# name: (columns, labels)
INNER: dict[str, tuple[int, str | None]] = {
    MNRL: (3, None),
    "SparseMarginMSELoss": (3, "two"),
    "SparseDistillKLDivLoss": (4, "three"),
    "SparseCoSENTLoss": (2, "tied"),
    "SparseAnglELoss": (2, "tied"),
    "SparseTripletLoss": (3, None),
    "SparseCosineSimilarityLoss": (2, "random"),
}


class L1(nn.Module):
    """A regulariser of the user's own."""

    def compute_loss_from_embeddings(self, embeddings: Tensor) -> Tensor:
        return embeddings.abs().sum(1).mean()


def own_flops(package: Any, model: Any) -> Any:
    """A user's subclass of FlopsLoss, of either package."""

    def twice(self: Any, embeddings: Tensor) -> Tensor:
        return 2 * super(kind, self).compute_loss_from_embeddings(embeddings)

    kind = type("Twice", (package.FlopsLoss,), {"__module__": __name__, "compute_loss_from_embeddings": twice})
    return kind(model)


# name: arguments of SpladeLoss, from a package and a model
WAYS: dict[str, Callable[[Any, Any], dict[str, Any]]] = {
    "both": lambda package, model: WEIGHTS,
    "documents": lambda package, model: {"document_regularizer_weight": 0.3},
    "documents only": lambda package, model: {
        "document_regularizer_weight": 0.3, "use_document_regularizer_only": True,
    },
    "thresholds": lambda package, model: {
        **WEIGHTS, "document_regularizer_threshold": 8, "query_regularizer_threshold": 6,
    },
    "own": lambda package, model: {
        **WEIGHTS, "document_regularizer": L1(), "query_regularizer": own_flops(package, model),
    },
    "zero": lambda package, model: {"document_regularizer_weight": 0.0, "query_regularizer_weight": 0.0},
}  # fmt: skip


def make(package: Any, model: Any, inner: str = MNRL, way: str = "both", cached: bool = False, **options: Any) -> Any:
    chunks = CHUNKS if package is losses else {}
    kind = package.CachedSpladeLoss if cached else package.SpladeLoss
    return kind(model, getattr(package, inner)(model, **chunks), **WAYS[way](package, model), **options)


def batch(model: Any, inner: str) -> tuple[list[dict[str, Tensor]], Tensor | None]:
    columns, labels = INNER[inner]
    return features(model, N, columns), None if labels is None else labels_for(labels, N)


@pytest.fixture(autouse=True)
def none_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the regularisers, which no option asks for ours."""
    monkeypatch.setattr(flops, "SMALL", Small(-1, -1, -1))


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, encoders: dict[str, SparseEncoder]) -> SparseEncoder:
    return encoders[request.param]


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[Places | None]:
    """The places of mini-batches, as they are found."""
    found: list[Places | None] = []

    def noting(embeddings: Tensor) -> Places | None:
        found.append(before(embeddings))
        return found[-1]

    before = Places.of
    monkeypatch.setattr(Places, "of", noting)
    return found


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", INNER)
def test_is_the_librarys(inner: str, model: SparseEncoder) -> None:
    """Plain, in mini-batches of ours, and beside the library's cached class."""
    given = batch(model, inner)
    expected = result(make(library, model, inner), model, *given)
    assert_alike(result(make(losses, model, inner), model, *given), expected, rtol=1e-6, atol=1e-9)
    for options in ({"mini_batch_size": 3}, {"mini_batch_num_tokens": 20}):
        found = result(make(losses, model, inner, **options), model, *given)
        assert_alike(found, expected, rtol=1e-6, atol=1e-9)
    cached = result(make(losses, model, inner, cached=True, mini_batch_size=2), model, *given)
    of_library = result(make(library, model, inner, cached=True, mini_batch_size=2), model, *given)
    assert_alike(cached, of_library, rtol=1e-5, atol=1e-7)  # whose terms are float32


@pytest.mark.skipif(not EXACT, reason="ours runs at every size beside a library before 6.2")
def test_a_small_batch_is_the_librarys(model: SparseEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit."""
    monkeypatch.setattr(flops, "SMALL", BY_ROWS)
    given = batch(model, MNRL)
    found = []
    for package in (losses, library):
        loss = package.SpladeLoss(model, getattr(package, MNRL)(model), **WEIGHTS)
        found.append(result(loss, model, *given))
    assert_alike(*found, rtol=0, atol=0)


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_regularize(way: str, model: SparseEncoder) -> None:
    given = batch(model, MNRL)
    expected = result(make(library, model, way=way), model, *given)
    for options in ({}, {"mini_batch_size": 3}):
        assert_alike(result(make(losses, model, way=way, **options), model, *given), expected)


@pytest.mark.parametrize("options", [{}, {"mini_batch_size": 3}], ids=str)
def test_around_other_losses(options: dict, model: SparseEncoder) -> None:
    """The library's, the dense ones of both, a teacher's embeddings as labels, and several terms."""
    columns = features(model, N, 2)
    embeddings = torch.rand(2, N, model.get_embedding_dimension(), dtype=torch.float64)  # a column each
    others: list[tuple[nn.Module, nn.Module, Any]] = [
        (library.SparseMultipleNegativesRankingLoss(model),) * 2 + (None,),
        (dense.CoSENTLoss(model, **CHUNKS), dense_library.CoSENTLoss(model), labels_for("tied", N)),
        (losses.SparseMSELoss(model), library.SparseMSELoss(model), embeddings),
        (
            dense.GlobalOrthogonalRegularizationLoss(model, **CHUNKS),
            dense_library.GlobalOrthogonalRegularizationLoss(model),
            None,
        ),
    ]
    for ours, theirs, labels in others:
        expected = result(library.SpladeLoss(model, theirs, **WEIGHTS), model, columns, labels)
        found = result(losses.SpladeLoss(model, ours, **WEIGHTS, **options), model, columns, labels)
        assert_alike(found, expected, rtol=1e-6, atol=1e-9)


def test_sum_pooling(folders: tuple[str, str]) -> None:
    model = splade(*folders, pooling="sum")
    given = batch(model, MNRL)
    expected = result(make(library, model), model, *given)
    assert_alike(result(make(losses, model, cached=True, mini_batch_size=2), model, *given), expected)


def test_float32_and_autocast(folders: tuple[str, str]) -> None:
    """Under autocast the library rounds similarities; ours are as near to those of float32 or nearer."""
    model = splade(*folders, dtype=torch.float32)
    given = batch(model, MNRL)
    exact = result(make(library, model), model, *given)
    assert_alike(result(make(losses, model), model, *given), exact, rtol=1e-4, atol=1e-5)
    errors = []
    for package in (losses, library):
        for options in ({"cached": False}, {"cached": True, "mini_batch_size": 3}):
            loss = make(package, model, **options)
            with torch.autocast("cpu", torch.bfloat16):
                terms = loss([dict(column) for column in given[0]], None)
            errors.append(abs(sum(terms.values()).item() - sum(exact[0].values()).item()))
    assert max(errors[:2]) <= max(errors[2:]) + 1e-2


def test_false_negatives_of_texts(model: SparseEncoder) -> None:
    """A loss inside learns from the one around it which texts are the same."""
    texts = ["the cat", "the cat", "a dog", "the sea"], ["red", "blue", "big", "red"]
    columns = [model.preprocess(list(column)) for column in texts]
    found = []
    for options in ({}, {"mini_batch_size": 3}):
        inner = losses.SparseMultipleNegativesRankingLoss(model, false_negatives="text", learnable_scale=True, **CHUNKS)
        found.append(result(losses.SpladeLoss(model, inner, **WEIGHTS, **options), model, columns, None))
    assert_alike(*found)
    assert found[0][1]["loss.log_scale"] != 0
    plain = result(make(losses, model), model, columns, None)
    assert found[0][0]["base_loss"] < plain[0]["base_loss"]


# --- mini-batches ----------------------------------------------------------------------------------------------------


def test_numbers_other_than_zero_are_all_that_is_kept(
    model: SparseEncoder, kept: list[Places | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of embeddings and gradients, between the two passes."""
    caches: list[list[Tensor]] = []
    hook = gradcache._backward_hook

    def seeing(grad: Tensor, *args: Any, cache: list[list[Tensor]], **kwargs: Any) -> Any:
        caches.extend(cache)
        return hook(grad, *args, cache=cache, **kwargs)

    monkeypatch.setattr(gradcache, "_backward_hook", seeing)
    monkeypatch.setattr(_places, "FULLEST", 0.9)
    given = batch(model, MNRL)
    expected = result(make(library, model), model, *given)
    assert_alike(result(make(losses, model, mini_batch_size=3), model, *given), expected)
    assert len(kept) == 9 and all(kept)
    gradients = [grad for column in caches for grad in column]
    assert [grad.shape for grad in gradients] == [places.index.shape for places in kept]
    every = 3 * N * model.get_embedding_dimension()
    assert 0 < sum(map(len, gradients)) < 0.6 * every


@pytest.mark.parametrize("fullest", [0.0, 0.4])
def test_full_mini_batches_are_kept_as_they_are(
    fullest: float, encoders: dict[str, SparseEncoder], kept: list[Places | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = encoders["SPLADE"]
    monkeypatch.setattr(_places, "FULLEST", fullest)
    given = batch(model, MNRL)
    expected = result(make(library, model), model, *given)
    assert_alike(result(make(losses, model, mini_batch_size=2), model, *given), expected)
    assert any(places is None for places in kept) and any(kept) is (fullest > 0)


def inference_free(folders: tuple[str, str], frozen: bool, dead: bool = False) -> SparseEncoder:
    transformer, masked = folders
    documents = splade(transformer, masked)
    static = SparseStaticEmbedding(documents.tokenizer, frozen=frozen)
    if dead:
        with torch.no_grad():
            static.weight[12:] = 0.0
    router = Router.for_query_document([static], list(documents.children()))
    return SparseEncoder(modules=[router], device="cpu").double().train()


@pytest.mark.parametrize("frozen", [False, True])
def test_inference_free_queries(frozen: bool, folders: tuple[str, str], kept: list[Places | None]) -> None:
    """A weight of zero has a gradient all the same, while it learns: nothing is left out."""
    model = inference_free(folders, frozen, dead=not frozen)
    columns = [
        model.preprocess(sentences(N, 0), task="query"),
        model.preprocess(sentences(N, 1), task="document"),
    ]
    for column, task in zip(columns, ("query", "document")):
        column["task"] = task
    expected = result(make(library, model, way="documents"), model, columns, None)
    found = result(make(losses, model, way="documents", mini_batch_size=3), model, columns, None)
    assert_alike(found, expected)
    assert bool(kept) is frozen and keeps_zeros(model) is frozen
    if not frozen:
        name = next(name for name in expected[1] if name.endswith("sub_modules.query.0.weight"))
        assert expected[1][name][12:].any()


def test_models_whose_zeros_may_learn(folders: tuple[str, str], encoders: dict[str, SparseEncoder]) -> None:
    assert keeps_zeros(encoders["SPLADE"]) and keeps_zeros(encoders["CSR"])
    assert keeps_zeros(nn.DataParallel(encoders["CSR"])) and keeps_zeros(
        types.SimpleNamespace(_orig_mod=encoders["CSR"])
    )
    assert not keeps_zeros(nn.Identity()) and not keeps_zeros(None)
    hooked, shifted = splade(*folders), csr(*folders)
    hooked[-1].register_forward_hook(lambda module, args, output: output)
    shifted.append(nn.Identity())
    assert not keeps_zeros(hooked) and not keeps_zeros(shifted)

    class Own(SparseEncoder):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    assert not keeps_zeros(Own(modules=list(csr(*folders)), device="cpu"))


def test_two_forward_passes_before_a_backward_pass(model: SparseEncoder) -> None:
    loss, given = make(losses, model, mini_batch_size=3), batch(model, MNRL)
    other = features(model, N, 3, seed=50)
    expected = result(loss, model, *given)
    first = loss([dict(column) for column in given[0]], None)
    model.zero_grad()
    loss([dict(column) for column in other], None)
    (1.5 * torch.stack(list(first.values())).sum()).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected[1][name])


def test_dropout_is_replayed(folders: tuple[str, str]) -> None:
    model = splade(*folders)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    given = batch(model, MNRL)
    found = []
    for package in (losses, library):
        torch.manual_seed(0)
        found.append(result(make(package, model, cached=True, mini_batch_size=3), model, *given))
    assert_alike(*found, rtol=1e-5, atol=1e-7)


def test_evaluation(model: SparseEncoder) -> None:
    given = batch(model, MNRL)
    with torch.no_grad():
        found = [
            make(package, model, cached=cached)([dict(column) for column in given[0]], None)
            for package, cached in ((losses, False), (losses, True), (library, False))
        ]
    for terms in found:
        assert not any(term.requires_grad for term in terms.values())
        assert_alike((terms,), (found[2],))


def test_terms_are_added_up_as_they_are(encoders: dict[str, SparseEncoder]) -> None:
    model = encoders["CSR"]
    terms = make(losses, model, cached=True)([dict(column) for column in batch(model, MNRL)[0]], None)
    with pytest.raises(RuntimeError, match="document_regularizer_weight"):
        (terms["base_loss"] + 2 * terms["document_regularizer_loss"]).backward()


OVERRIDDEN = ("calculate_loss", "embed_minibatch", "embed_minibatch_iter", "forward")


@pytest.mark.parametrize("method", OVERRIDDEN)
def test_methods_of_a_subclass(method: str, encoders: dict[str, SparseEncoder], kept: list[Places | None]) -> None:
    """Get what those of the library's class get, and keep their effect."""
    model, found = encoders["SPLADE"], []

    def changed(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: 2 * term for name, term in value.items()}
        if isinstance(value, types.GeneratorType):
            return (changed(item) for item in value)
        return (2 * value[0], *value[1:]) if isinstance(value, tuple) else value

    for package in (losses, library):

        def instead(self: Any, *args: Any, **kwargs: Any) -> Any:
            if method == "calculate_loss":
                assert all(part.ndim == 2 for column in args[0] for part in column)
            return changed(getattr(super(type(self), self), method)(*args, **kwargs))

        kind = type("Mine", (package.CachedSpladeLoss,), {"__module__": __name__, method: instead})
        loss = kind(model, getattr(package, MNRL)(model), **WEIGHTS, mini_batch_size=3)
        found.append(result(loss, model, *batch(model, MNRL)))
    assert_alike(*found, rtol=1e-5, atol=1e-7)
    assert bool(kept) is (method == "forward")


# --- options, attributes, copies -------------------------------------------------------------------------------------


def test_options_are_those_of_the_loss_inside(encoders: dict[str, SparseEncoder]) -> None:
    model = encoders["CSR"]
    inner = losses.SparseMultipleNegativesRankingLoss(model)
    loss = losses.SpladeLoss(model, inner, **WEIGHTS, chunk_size=16, mini_batch_size=4, gather_across_devices=True)
    assert inner.chunk_size == loss.chunk_size == 16 and inner.mini_batch_size is None
    assert inner.gather_across_devices and loss.document_regularizer.gather_across_devices
    assert loss.query_regularizer.gather_across_devices
    loss.gather_across_devices = False
    assert not (inner.gather_across_devices or loss.document_regularizer.gather_across_devices)
    loss.mini_batch_size = None
    assert not loss.uses_gradient_cache
    assert losses.CachedSpladeLoss(model, inner, **WEIGHTS).mini_batch_size == 32


def test_the_librarys_arguments_in_its_order() -> None:
    for name in ("SpladeLoss", "CachedSpladeLoss", "CSRLoss", "FlopsLoss"):
        ours, theirs = (inspect.signature(getattr(package, name)).parameters for package in (losses, library))
        assert list(ours)[: len(theirs)] == list(theirs)
        assert [ours[n].default for n in theirs] == [p.default for p in theirs.values()]


def test_config_citation_state_and_copies(model: SparseEncoder) -> None:
    for way, cached in [(way, False) for way in WAYS] + [("both", True)]:
        ours, theirs = (make(package, model, way=way, cached=cached) for package in (losses, library))
        configs = [loss.get_config_dict() for loss in (ours, theirs)]
        assert [config.pop("loss") for config in configs] == [ours.loss, theirs.loss]
        assert configs[0] == configs[1] and json.dumps(configs[0])
        assert ours.citation == theirs.citation and list(ours.state_dict()) == list(theirs.state_dict())
        names = {name for name in vars(theirs) if not name.startswith("_")} | set(theirs._modules)
        assert names <= set(dir(ours)), names - set(dir(ours))
    plain = make(losses, model, mini_batch_size=3)
    assert plain.get_config_dict() == {
        **make(losses, model).get_config_dict(),
        "loss": plain.loss,
        "mini_batch_size": 3,
    }
    given = batch(model, MNRL)
    copies = [copy.deepcopy(plain)]
    if type(model[-1]) is SpladePooling:  # an autoencoder of the library's holds a local function
        copies.append(pickle.loads(pickle.dumps(plain)))
    for again in copies:
        assert again.loss.model is again.model
        assert_alike(result(again, again.model, *given), result(plain, model, *given))


REFUSED: dict[str, tuple[Callable[[Any, Any], Any], type[Exception], str]] = {
    "no loss": (lambda m, inner: losses.SpladeLoss(m, nn.Identity(), 1.0), ValueError, "of SpladeLoss, got Identity"),
    "a class": (lambda m, inner: losses.CSRLoss(m, library.FlopsLoss), ValueError, "inside of CSRLoss, got FlopsLoss"),
    "another SpladeLoss": (
        lambda m, inner: losses.SpladeLoss(m, losses.SpladeLoss(m, inner, 1.0), 1.0),
        ValueError, "no regulariser inside of SpladeLoss, got SpladeLoss",
    ),
    "a regulariser": (
        lambda m, inner: losses.CSRLoss(m, losses.FlopsLoss(m)), ValueError, "inside of CSRLoss, got FlopsLoss",
    ),
    "no regulariser": (
        lambda m, inner: losses.SpladeLoss(m, inner, 1.0, document_regularizer=nn.Identity()),
        ValueError, "document_regularizer to be a loss .*, or None, got Identity",
    ),
    "a regulariser's class": (
        lambda m, inner: losses.SpladeLoss(m, inner, 1.0, query_regularizer=losses.FlopsLoss),
        ValueError, "query_regularizer to be a loss .*, or None, got FlopsLoss",
    ),
    "no weight": (lambda m, inner: losses.SpladeLoss(m, inner, None), TypeError, "document_regularizer_weight to be"),
    "a weight that is NaN": (
        lambda m, inner: losses.SpladeLoss(m, inner, 1.0, float("nan")), ValueError, "query_regularizer_weight to be",
    ),
    "a model's name": (lambda m, inner: losses.SpladeLoss("bert", inner, 1.0), TypeError, "as model, got 'bert'"),
    "mini-batches inside": (
        lambda m, inner: losses.SpladeLoss(m, dense.CoSENTLoss(m, mini_batch_size=4), 1.0),
        ValueError, "no mini-batches of the loss inside of SpladeLoss",
    ),
    "mini-batches inside of CSR": (
        lambda m, inner: losses.CSRLoss(m, dense.CachedMultipleNegativesRankingLoss(m)),
        ValueError, "no mini-batches of the loss inside of CSRLoss",
    ),
    "a projection": (lambda m, inner: losses.SpladeLoss(m, inner, 1.0, fuse_projection=True), TypeError, "got 'fuse_"),
    "an option": (lambda m, inner: losses.SpladeLoss(m, inner, 1.0, chunks=3), TypeError, "got 'chunks'"),
    "mini_batch_size": (lambda m, inner: losses.CachedSpladeLoss(m, inner, 1.0, mini_batch_size=0), ValueError, "mini"),
    "options of the library's": (
        lambda m, inner: losses.SpladeLoss(m, library.SparseTripletLoss(m), 1.0, chunk_size=4),
        ValueError, "chunk_size: SparseTripletLoss, the wrapped loss, has no such option",
    ),
    "a threshold beside a regulariser": (
        lambda m, inner: losses.SpladeLoss(m, inner, 1.0, document_regularizer=L1(), document_regularizer_threshold=9),
        ValueError, "document_regularizer_threshold .* got 9 beside document_regularizer=L1",
    ),
    "a threshold of no queries": (
        lambda m, inner: losses.SpladeLoss(
            m, inner, 1.0, query_regularizer_threshold=9, use_document_regularizer_only=True
        ),
        ValueError, "got 9 beside use_document_regularizer_only=True",
    ),
    "Matryoshka": (
        lambda m, inner: dense.MatryoshkaLoss(m, losses.SpladeLoss(m, inner, 1.0), [4]), ValueError, "a dict of terms",
    ),
    "one column": (
        lambda m, inner: losses.SpladeLoss(m, inner, 1.0).compute_loss_from_embeddings([torch.rand(3, 4)]),
        ValueError, "a query and its documents, got 1 columns",
    ),
    "sparse embeddings": (
        lambda m, inner: losses.SpladeLoss(m, inner, 1.0).compute_loss_from_embeddings([torch.eye(3).to_sparse()] * 2),
        TypeError, "dense tensor",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str) -> None:
    call, kind, message = REFUSED[case]
    model = nn.Identity()
    with pytest.raises(kind, match=message):
        call(model, losses.SparseMultipleNegativesRankingLoss(model))


# --- CSR -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", [None, *INNER])
def test_csr(inner: str | None, folders: tuple[str, str]) -> None:
    found = []
    for package, chunks in ((losses, CHUNKS), (library, {})):
        model = csr(*folders)
        given = batch(model, inner or MNRL)
        own = None if inner is None else getattr(package, inner)(model, **chunks)
        loss = package.CSRLoss(model, own, beta=0.3, gamma=0.7)
        found.append(result(loss, model, *given))
        config = loss.get_config_dict()
        assert config == {"beta": 0.3, "gamma": 0.7, "loss": inner or MNRL}
    assert list(found[0][0]) == [*(f"reconstruction_loss_{name}" for name in ("k", "4k", "aux")), "base_loss"]
    assert_alike(*found, rtol=1e-6, atol=1e-9)


def test_csr_knows_texts(encoders: dict[str, SparseEncoder]) -> None:
    model = encoders["CSR"]
    inner = losses.SparseMultipleNegativesRankingLoss(model, false_negatives="text")
    terms = losses.CSRLoss(model, inner)(features(model, N, 2))
    assert terms["base_loss"].isfinite()


# --- in a script -----------------------------------------------------------------------------------------------------


def dataset(columns: int, labels: str | None, rows: int = 16) -> Dataset:
    data: dict[str, list] = {f"text_{i}": sentences(rows, i) for i in range(columns)}
    return Dataset.from_dict(data | ({"label": labels_for(labels, rows).tolist()} if labels else {}))


def trainer_of(model: SparseEncoder, loss: Any, data: Dataset, folder: Path) -> SparseEncoderTrainer:
    args = SparseEncoderTrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=5,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        eval_strategy="steps",
        eval_steps=4,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
    )
    return SparseEncoderTrainer(model=model, args=args, train_dataset=data, eval_dataset=data, loss=loss)


# name: model, columns, labels, and the loss of a package
RUNS: dict[str, tuple[str, int, str | None, Callable[[Any, Any], Any]]] = {
    "ranking": ("SPLADE", 3, None, lambda package, m: make(package, m)),
    "ranking, cached": ("SPLADE", 2, None, lambda package, m: make(package, m, cached=True, mini_batch_size=2)),
    "margins": ("SPLADE", 3, "two", lambda package, m: make(package, m, "SparseMarginMSELoss", "documents only")),
    "CSR": ("CSR", 2, None, lambda package, m: package.CSRLoss(m)),
}


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_trains_like_the_library(run: str, folders: tuple[str, str], tmp_path: Path) -> None:
    """Each term's curve, and the schedule of the weights."""
    kind, columns, labels, loss_of = RUNS[run]
    ends = {}
    for package in (losses, library):
        model = KINDS[kind](*folders, dtype=torch.float32)
        trainer = trainer_of(model, loss_of(package, model), dataset(columns, labels), tmp_path / package.__name__)
        callbacks = [type(callback) for callback in trainer.callback_handler.callbacks]
        assert (SpladeRegularizerWeightSchedulerCallback in callbacks) is (kind == "SPLADE")
        trainer.train()
        ends[package] = model, trainer.state.log_history
    timed = ("runtime", "per_second", "flos")
    for mine, other in zip(ends[losses][1], ends[library][1], strict=True):
        assert list(mine) == list(other)
        for name, value in other.items():
            if not any(word in name for word in timed):
                assert mine[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name
    state = ends[library][0].state_dict()
    for name, value in ends[losses][0].state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=1e-2, atol=1e-3)


CARDS: dict[str, Callable[[Any, Any], Any]] = {
    "SPLADE": lambda package, m: package.SpladeLoss(m, package.SparseMarginMSELoss(m), **WEIGHTS),
    "cached": lambda package, m: package.CachedSpladeLoss(
        m, package.SparseMultipleNegativesRankingLoss(m), 0.1, document_regularizer_threshold=9
    ),
    "CSR": lambda package, m: package.CSRLoss(m),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CARDS)
def test_cards(case: str, folders: tuple[str, str], tmp_path: Path) -> None:
    cards = []
    for package in (losses, library):
        model = KINDS["CSR" if case == "CSR" else "SPLADE"](*folders, dtype=torch.float32)
        random.seed(0)
        trainer_of(model, CARDS[case](package, model), dataset(3, None), tmp_path)
        cards.append(generate_model_card(model))
    signature = re.compile(rf',\n *"chunked_embed": "{re.escape(__version__)}"')
    assert signature.search(cards[0]) and "chunked_embed" not in cards[1]
    assert signature.sub("", cards[0]).splitlines() == cards[1].splitlines()
    assert hasattr(SparseEncoderModelCardData.compute_dataset_metrics, "_signs")


def test_hidden_is_not_the_vocabulary(encoders: dict[str, SparseEncoder]) -> None:
    """What the tests above take for granted."""
    assert {model.get_embedding_dimension() for model in encoders.values()} == {20, 24} and HIDDEN == 16
