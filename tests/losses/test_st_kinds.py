"""What is no model of texts, no embedding or no label is refused by its kind, before any work, in every loss."""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import sentence_transformers
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.sentence_transformer import losses as library
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from sentence_transformers.sparse_encoder import losses as sparse_library
from sentence_transformers.sparse_encoder.modules import MLMTransformer, SparseAutoEncoder, SpladePooling
from st_parts import HIDDEN, assert_same, build, features, labels_for, value_and_grads
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM

from chunked_embed import losses
from chunked_embed.losses._kinds import check_columns, check_model, check_wrapped
from distill.sentence_transformers import EmbedDistillLoss

N, D = 4, 6
MultiVectorEncoder = getattr(sentence_transformers, "MultiVectorEncoder", None)  # since 6.0
needs_multi_vector = pytest.mark.skipif(MultiVectorEncoder is None, reason="has no MultiVectorEncoder")


class Idle(nn.Module):
    """Stands for a model where embeddings are given."""

    def get_embedding_dimension(self) -> int:
        return D

    def forward(self, features: Any) -> Any:
        raise AssertionError("embedded")


def product(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)


def max_sim(a: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("nid,njd->nij", a, b).amax(2).sum(1)


def matrix(a: Tensor, b: Tensor | None = None) -> Tensor:
    return (a[:, None] - (a if b is None else b)).square().sum(-1)


class Case(NamedTuple):
    name: str
    columns: int = 2
    labels: Callable[[], Any] | None = None
    options: dict[str, Any] = {}
    own: bool = False  # scored by a function that is not ours

    def make(self, model: Any, guide: Any = None) -> nn.Module:
        options = {"compiled": False, **self.options}
        if self.name == "EmbedDistillLoss":
            return EmbedDistillLoss(model, **options)
        if self.name == "MatryoshkaLoss":
            return losses.MatryoshkaLoss(model, losses.CoSENTLoss(Idle(), compiled=False), [D, 2])
        return getattr(losses, self.name)(model, *([guide] if "GIST" in self.name else []), **options)


def teacher() -> list[Tensor]:
    return [torch.randn(N, D), torch.randn(N, D)]


def scores() -> Tensor:
    return torch.rand(N)


def classes() -> Tensor:
    return torch.arange(N) % 2


CASES = {
    "cosent": Case("CoSENTLoss", labels=scores),
    "angle": Case("AnglELoss", labels=scores),
    "cosine": Case("CosineSimilarityLoss", labels=scores),
    "contrastive": Case("ContrastiveLoss", labels=classes),
    "online": Case("OnlineContrastiveLoss", labels=classes),
    "triplet": Case("TripletLoss", 3),
    "margin": Case("MarginMSELoss", 3, scores),
    "distill": Case("DistillKLDivLoss", 3, lambda: torch.rand(N, 2)),
    "ranking": Case("MultipleNegativesRankingLoss", 3),
    "symmetric": Case("MultipleNegativesSymmetricRankingLoss"),
    "cached ranking": Case("CachedMultipleNegativesRankingLoss"),
    "cached symmetric": Case("CachedMultipleNegativesSymmetricRankingLoss"),
    "labelled": Case("MultipleNegativesRankingLoss", 2, classes, {"false_negatives": "labels"}),
    "guided": Case("GISTEmbedLoss", 2, teacher),
    "cached guided": Case("CachedGISTEmbedLoss", 2, teacher),
    "mega": Case("MegaBatchMarginLoss"),
    "hard": Case("BatchHardTripletLoss", 1, classes),
    "soft": Case("BatchHardSoftMarginTripletLoss", 1, classes),
    "semi": Case("BatchSemiHardTripletLoss", 1, classes),
    "all": Case("BatchAllTripletLoss", 1, classes),
    "orthogonal": Case("GlobalOrthogonalRegularizationLoss"),
    "sigmoid": Case("SigmoidPairLoss"),
    "tension": Case("ContrastiveTensionLossInBatchNegatives"),
    "matryoshka": Case("MatryoshkaLoss", 2, scores),
    "similarities": Case("EmbedDistillLoss", 2, teacher),
    "cosent, own": Case("CoSENTLoss", 2, scores, {"similarity_fct": product}, True),
    "cosine, own": Case("CosineSimilarityLoss", 2, scores, {"cos_score_transformation": nn.Tanh()}),
    "contrastive, own": Case("ContrastiveLoss", 2, classes, {"distance_metric": product}, True),
    "triplet, own": Case("TripletLoss", 3, None, {"distance_metric": product}, True),
    "margin, own": Case("MarginMSELoss", 3, scores, {"similarity_fct": product}, True),
    "distill, own": Case("DistillKLDivLoss", 3, lambda: torch.rand(N, 2), {"similarity_fct": product}, True),
    "ranking, own": Case("MultipleNegativesRankingLoss", 3, None, {"similarity_fct": matrix}),
    "hard, own": Case("BatchHardTripletLoss", 1, classes, {"distance_metric": matrix}),
    "orthogonal, own": Case("GlobalOrthogonalRegularizationLoss", 2, None, {"similarity_fct": matrix}),
    "sigmoid, own": Case("SigmoidPairLoss", 2, None, {"similarity_fct": matrix}),
}
NAMES = {case.name: key for key, case in reversed(CASES.items())}  # one case of each class
LABELLED = [key for key, case in CASES.items() if case.labels not in (None, teacher)]


@pytest.fixture(scope="module")
def guide(transformer_dir: str) -> SentenceTransformer:
    return build(transformer_dir)


def test_every_class_is_here() -> None:
    found = {name for name in losses.__all__ if isinstance(getattr(losses, name), type)}
    ours = {name for name in found if issubclass(getattr(losses, name), losses.ChunkedLoss)} - {"ChunkedLoss"}
    assert ours | {"EmbedDistillLoss"} == set(NAMES)


# --- embeddings ------------------------------------------------------------------------------------------------------

QUANTISED = "to be floating point, got {}: quantised embeddings can't be trained on"
x = torch.randn(N, D)
with warnings.catch_warnings():  # of prototypes
    warnings.simplefilter("ignore")
    sparse_rows, nested = x.to_sparse_csr(), torch.nested.nested_tensor([x[0], x[1]])
# name: (what comes in the place of a column, error, message)
COLUMNS: dict[str, tuple[Any, type[Exception], str]] = {
    "list": (x.tolist(), TypeError, "to be a tensor, got list"),
    "None": (None, TypeError, "to be a tensor, got None"),
    "text": ("a text", TypeError, "to be a tensor, got str"),
    "features": ({"sentence_embedding": x}, TypeError, "to be a tensor, got dict"),
    "array": (x.numpy(), TypeError, "to be a tensor, got ndarray of float32"),
    "int8 array": (x.numpy().astype(np.int8), TypeError, QUANTISED.format("ndarray of int8")),
    "ubinary array": (np.packbits(x.numpy() > 0, 1), TypeError, QUANTISED.format("ndarray of uint8")),
    "int8": (x.to(torch.int8), TypeError, QUANTISED.format("torch.int8")),
    "uint8": (x.to(torch.uint8), TypeError, QUANTISED.format("torch.uint8")),
    "float8": (x.to(torch.float8_e5m2), TypeError, QUANTISED.format("torch.float8_e5m2")),
    "integers": (x.long(), TypeError, "to be floating point, got torch.int64"),
    "booleans": (x > 0, TypeError, "to be floating point, got torch.bool"),
    "complex": (x + 1j, TypeError, "to be floating point, got torch.complex64"),
    "sparse": (x.to_sparse(), TypeError, "to be a dense tensor, got a tensor of layout sparse_coo"),
    "sparse rows": (sparse_rows, TypeError, "to be a dense tensor, got a tensor of layout sparse_csr"),
    "nested": (nested, TypeError, "to be a dense tensor.* of layout nested"),
    "meta": (x.to("meta"), ValueError, r"in memory, got a tensor on the meta device|on cpu, got meta"),
    "number": (x[0, 0], ValueError, r"of shape \(N, D, \.\.\.\), got \(\)"),
    "vector": (x[0], ValueError, r"of shape \(N, D, \.\.\.\), got \(6,\)"),
    "tokens": (
        x[:, None].expand(N, 3, D),
        ValueError,
        r"one embedding a row, got \(4, 3, 6\): those of tokens must be",
    ),
    "none": (x[:0], ValueError, r"at least one row|of one shape|expects 0 labels|of shape \(0|got \(4,|\(0, 6\)"),
}
OF_THE_FUNCTION = ("tokens", "none")  # shapes are a matter of a function of the user's own


@pytest.mark.parametrize(
    "key, kind", [(key, kind) for key in CASES for kind in COLUMNS if not (CASES[key].own and kind in OF_THE_FUNCTION)]
)
def test_columns(key: str, kind: str, guide: SentenceTransformer) -> None:
    case, (bad, error, message) = CASES[key], COLUMNS[kind]
    loss = case.make(guide if "GIST" in case.name else Idle(), guide)
    labels = case.labels and case.labels()
    for embeddings in ([bad] * case.columns, [x] * (case.columns - 1) + [bad]):
        with pytest.raises(error, match=message) as raised:
            loss.compute_loss_from_embeddings(embeddings, labels)
        assert re.search("expect|needs", str(raised.value))


@pytest.mark.parametrize("given, told", [(None, "None"), (3, "int"), ("texts", "str"), ({"a": x}, "dict")])
@pytest.mark.parametrize("key", NAMES.values())
def test_no_columns(key: str, given: Any, told: str, guide: SentenceTransformer) -> None:
    case = CASES[key]
    loss = case.make(guide if "GIST" in case.name else Idle(), guide)
    with pytest.raises(TypeError, match=f"expected embeddings as tensors, one a column, got {told}"):
        loss.compute_loss_from_embeddings(given, case.labels and case.labels())


def test_columns_are_handed_on() -> None:
    columns = [x, x.half(), x[:, None].expand(N, 3, D), x[:0]]
    assert all(a is b for a, b in zip(check_columns(iter(columns)), columns, strict=True))
    assert len(check_columns(torch.stack([x, x]))) == 2


def test_tokens_for_a_function_of_ones_own() -> None:
    """It may score what it likes, as in the library."""
    tokens, labels = torch.randn(2, N, 3, D, dtype=torch.float64, requires_grad=True), scores()
    found = [
        module.CoSENTLoss(Idle(), 1.0, max_sim, **options).compute_loss_from_embeddings(list(tokens), labels)
        for module, options in ((losses, {"compiled": False}), (library, {}))
    ]
    torch.testing.assert_close(*found)
    torch.testing.assert_close(*(torch.autograd.grad(value, tokens)[0] for value in found))


# --- labels ----------------------------------------------------------------------------------------------------------

LABELS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "None": (lambda y: None, "got None"),
    "list": (lambda y: y.tolist(), "got list"),
    "texts": (lambda y: ["yes"] * N, "got list"),
    "array": (lambda y: y.numpy(), "got ndarray of"),
    "text": (lambda y: "yes", "got str"),
    "meta": (lambda y: y.to("meta"), "meta"),
    "complex": (lambda y: y + 1j, "to hold real numbers, got torch.complex64|torch.complex64"),
    "sparse": (lambda y: (y + 1).to_sparse(), "to be a dense tensor, got a tensor of layout sparse_coo"),
    "few": (lambda y: y[:2], "got 2 in a tensor|got .*2"),
    "many": (lambda y: torch.cat([y, y]), "got 8|got .*8"),
    "NaN": (lambda y: y.float().log().log(), "NaN|torch.float32"),
}


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("key", LABELLED)
def test_labels(key: str, kind: str) -> None:
    case, (bad, message) = CASES[key], LABELS[kind]
    assert case.labels is not None
    with pytest.raises((TypeError, ValueError), match=message) as raised:
        case.make(Idle()).compute_loss_from_embeddings([x] * case.columns, bad(case.labels()))
    assert re.search("expect|requires|needs", str(raised.value))


# --- models ----------------------------------------------------------------------------------------------------------


def multi_vector(folder: str, *tail: nn.Module) -> nn.Module:
    assert MultiVectorEncoder is not None
    return MultiVectorEncoder(modules=[Transformer(folder), *tail], device="cpu").double()


MODELS: dict[str, tuple[Callable[[str], Any], str]] = {
    "multi vector": (multi_vector, "got a MultiVectorEncoder, which embeds tokens: .*embed.multi_vector.losses"),
    "cross encoder": (
        lambda folder: CrossEncoder(folder, num_labels=1, device="cpu"),
        "got a CrossEncoder, which scores pairs of texts: .*cross_encoder",
    ),
    "name": (lambda folder: "all-MiniLM-L6-v2", "got 'all-MiniLM-L6-v2'"),
    "class": (lambda folder: SentenceTransformer, "got the class SentenceTransformer"),
}


@pytest.fixture(scope="module")
def models(transformer_dir: str) -> dict[str, Any]:
    return {
        kind: make(transformer_dir)
        for kind, (make, _) in MODELS.items()
        if MultiVectorEncoder or kind != "multi vector"
    }


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("key", NAMES.values())
def test_models(key: str, kind: str, models: dict[str, Any], guide: SentenceTransformer) -> None:
    if kind not in models:
        pytest.skip("has no MultiVectorEncoder")
    with pytest.raises(TypeError, match=f"expected a SentenceTransformer as model, {MODELS[kind][1]}"):
        CASES[key].make(models[kind], guide)


def test_what_is_no_module_may_be_a_model() -> None:
    """Of a loss of given embeddings, as in the library's own tests."""
    x = torch.randn(3, N, D)
    for model in (object(), None, lambda features: features):
        losses.TripletLoss(model, compiled=False).compute_loss_from_embeddings(list(x))


@pytest.mark.parametrize("kind", ["multi vector", "cross encoder"])
def test_models_beside(kind: str, models: dict[str, Any], guide: SentenceTransformer) -> None:
    """A guide, a teacher: what embeds texts, too."""
    if kind not in models:
        pytest.skip("has no MultiVectorEncoder")
    for name in ("GISTEmbedLoss", "CachedGISTEmbedLoss"):
        with pytest.raises(TypeError, match=f"expected a SentenceTransformer as guide, {MODELS[kind][1]}"):
            getattr(losses, name)(guide, models[kind])
    with pytest.raises(TypeError, match=f"expected a SentenceTransformer as teacher, {MODELS[kind][1]}"):
        EmbedDistillLoss(guide, models[kind])


@needs_multi_vector
def test_wrapped_models_are_looked_into(models: dict[str, Any]) -> None:
    class Pooled(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    bad = models["multi vector"]
    for wrapped in (nn.DataParallel(bad), torch.compile(bad), nn.DataParallel(torch.compile(bad))):
        with pytest.raises(TypeError, match="as model, got a MultiVectorEncoder"):
            check_model(wrapped)
    check_model(Pooled(bad))  # a module of one's own may pool


def test_any_other_model_is_taken(guide: SentenceTransformer) -> None:
    """As in the library, which asks nothing of it: a module, a wrapped one, a function; none for embeddings alone."""
    for model in (nn.Identity(), nn.DataParallel(guide), torch.compile(guide), lambda features: features, None, guide):
        check_model(model)
    for kind in (losses.CoSENTLoss, losses.MultipleNegativesRankingLoss, losses.BatchHardTripletLoss):
        assert kind(None).model is None


@needs_multi_vector
def test_a_multi_vector_encoder_that_pools(transformer_dir: str) -> None:
    """It has an embedding of each text, and trains as in the library."""
    model = multi_vector(transformer_dir, Pooling(HIDDEN)).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    batch, labels = features(model, N, 2), labels_for("random", N)
    ours, theirs = losses.CoSENTLoss(model, compiled=False), library.CoSENTLoss(model)
    assert_same(value_and_grads(ours, model, batch, labels), value_and_grads(theirs, model, batch, labels))


@pytest.fixture(scope="module")
def sparse(transformer_dir: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, SparseEncoder]:
    folder = tmp_path_factory.mktemp("masked") / "model"
    shutil.copytree(transformer_dir, folder)
    BertForMaskedLM(BertConfig.from_pretrained(transformer_dir)).save_pretrained(folder)
    torch.manual_seed(0)
    auto_encoder = SparseAutoEncoder(HIDDEN, 24, k=5, k_aux=5)
    modules = {
        "SPLADE": [MLMTransformer(str(folder)), SpladePooling()],
        "CSR": [Transformer(transformer_dir), Pooling(HIDDEN), auto_encoder],
    }
    found = {}
    for name, parts in modules.items():
        found[name] = SparseEncoder(modules=parts, device="cpu").double().train()
        for module in found[name].modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    return found


SPARSE = {
    "MultipleNegativesRankingLoss": (3, None),
    "CoSENTLoss": (2, "tied"),
    "TripletLoss": (3, None),
    "MarginMSELoss": (3, "random"),
    "BatchHardTripletLoss": (1, "binary"),
}


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("kind", ["SPLADE", "CSR"])
def test_a_sparse_encoder(kind: str, name: str, sparse: dict[str, SparseEncoder]) -> None:
    """Its embeddings are dense while it trains: a loss does with it what the library's does."""
    model, (columns, labelled) = sparse[kind], SPARSE[name]
    batch, labels = features(model, N, columns), labels_for(labelled, N) if labelled else None
    theirs = value_and_grads(getattr(library, name)(model), model, batch, labels)
    for options in ({}, {"mini_batch_size": 3}):
        ours = value_and_grads(getattr(losses, name)(model, compiled=False, **options), model, batch, labels)
        assert_same(ours, theirs)


class Total(nn.Module):
    """Adds up the terms, as the trainer does."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, columns: Any, labels: Any) -> Tensor:
        return torch.stack(list(self.loss(columns, labels).values())).sum()


def test_in_the_place_of_a_sparse_loss(sparse: dict[str, SparseEncoder]) -> None:
    model = sparse["SPLADE"]
    batch, weights = features(model, N, 3), {"document_regularizer_weight": 0.1, "query_regularizer_weight": 0.2}
    inner = sparse_library.SparseMultipleNegativesRankingLoss(model)
    ours = losses.MultipleNegativesRankingLoss(model, inner.scale, inner.similarity_fct, compiled=False)
    found = [
        value_and_grads(Total(sparse_library.SpladeLoss(model, loss, **weights)), model, batch, None)
        for loss in (ours, inner)
    ]
    assert_same(*found)


# --- losses in losses ------------------------------------------------------------------------------------------------


def added(kind: type) -> type:
    """Its terms' sum, which Matryoshka can weigh."""

    class Sum(kind):
        def forward(self, *arguments: Any) -> Any:
            found = super().forward(*arguments)
            return sum(found.values()) if isinstance(found, dict) else found

        def compute_loss_from_embeddings(self, *arguments: Any) -> Any:
            return sum(super().compute_loss_from_embeddings(*arguments).values())

    return Sum


@pytest.mark.parametrize("options", [{}, {"mini_batch_size": 2}], ids=str)
@pytest.mark.parametrize("module", [losses, library], ids=["ours", "theirs"])
def test_matryoshka_around_terms(module: Any, options: dict, guide: SentenceTransformer) -> None:
    inner = module.GlobalOrthogonalRegularizationLoss(guide)
    with pytest.raises(ValueError, match=r"returns a scalar, got Global\w+, which returns a dict of terms"):
        losses.MatryoshkaLoss(guide, inner, [HIDDEN, 4], **options)


def test_a_loss_that_adds_its_terms_up(guide: SentenceTransformer) -> None:
    batch, kind = features(guide, N, 2), added(library.GlobalOrthogonalRegularizationLoss)
    expected = value_and_grads(library.MatryoshkaLoss(guide, kind(guide), [HIDDEN, 4]), guide, batch, None)
    for options in ({}, {"mini_batch_size": 2}):
        ours = losses.MatryoshkaLoss(guide, kind(guide), [HIDDEN, 4], **options)
        assert_same(value_and_grads(ours, guide, batch, None), expected)
    for inner in (losses.CoSENTLoss(guide), library.CoSENTLoss(guide), nn.Identity()):
        check_wrapped(inner)
