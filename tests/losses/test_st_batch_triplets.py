"""The batch-triplet family, MegaBatchMargin and orthogonal regularisation against the library's own classes."""

from __future__ import annotations

import functools
import inspect
import json
from typing import NamedTuple

import pytest
import torch
from sentence_transformers import SentenceTransformerTrainer, util
from sentence_transformers.sentence_transformer import losses as library
from sentence_transformers.sentence_transformer.modules import Normalize
from st_parts import EXACT, TOLERANCE, assert_same, build, dense, features, static_model, value_and_grads
from torch import Tensor, nn

from chunked_embed import losses

DISTANCES = losses.BatchHardTripletLossDistanceFunction
squared = functools.partial(DISTANCES.euclidean_distance, squared=True)
TRIPLETS = (
    "BatchAllTripletLoss",
    "BatchHardSoftMarginTripletLoss",
    "BatchHardTripletLoss",
    "BatchSemiHardTripletLoss",
)


def manhattan_matrix(x: Tensor) -> Tensor:
    """A distance of the user's own."""
    return (x[:, None] - x).abs().sum(-1)


def rbf(a: Tensor, b: Tensor) -> Tensor:
    return 1.0 * torch.exp(-(a[:, None] - b).square().sum(-1))  # the library writes into what it is given


class Case(NamedTuple):
    name: str
    args: tuple
    columns: int = 1

    @property
    def labelled(self) -> bool:
        return self.columns == 1 and "Triplet" in self.name

    def ours(self, model: nn.Module, **options) -> nn.Module:
        return Total(getattr(losses, self.name)(model, *self.args, **{"compiled": False, **options}))

    def theirs(self, model: nn.Module) -> nn.Module:
        args = (*self.args, False) if self.name == "MegaBatchMarginLoss" else self.args
        return Total(getattr(library, self.name)(model, *args))


class Total(nn.Module):
    """Adds up a loss that comes as a dict, as the trainer does."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    @staticmethod
    def scalar(value: Tensor | dict) -> Tensor:
        return torch.stack(list(value.values())).sum() if isinstance(value, dict) else value

    def forward(self, columns, labels) -> Tensor:
        return self.scalar(self.loss(columns, labels))

    def from_embeddings(self, columns: list[Tensor], labels: Tensor | None) -> Tensor:
        if isinstance(self.loss, library.MegaBatchMarginLoss):
            return self.loss.calculate_loss([[column] for column in columns])
        return self.scalar(self.loss.compute_loss_from_embeddings(columns, labels))


CASES = {
    **{name: Case(name, ()) for name in TRIPLETS},
    **{f"{name}-cosine": Case(name, (DISTANCES.cosine_distance,)) for name in TRIPLETS},
    **{f"{name}-squared": Case(name, (squared,)) for name in TRIPLETS},
    **{f"{name}-own": Case(name, (manhattan_matrix,)) for name in TRIPLETS},
    "BatchAllTripletLoss-margin": Case("BatchAllTripletLoss", (DISTANCES.eucledian_distance, 0.5)),
    "BatchHardTripletLoss-margin": Case("BatchHardTripletLoss", (DISTANCES.eucledian_distance, 0.5)),
    "BatchSemiHardTripletLoss-margin": Case("BatchSemiHardTripletLoss", (DISTANCES.eucledian_distance, 0.5)),
    "mega": Case("MegaBatchMarginLoss", (0.7, -0.1), 2),
    "gor": Case("GlobalOrthogonalRegularizationLoss", (), 2),
    "gor-dot-sum": Case("GlobalOrthogonalRegularizationLoss", (util.dot_score, 0.5, 2.0, "sum"), 3),
    "gor-mean": Case("GlobalOrthogonalRegularizationLoss", (util.pytorch_cos_sim, 1.0, None), 1),
    "gor-second": Case("GlobalOrthogonalRegularizationLoss", (util.cos_sim, 0, 3.0), 1),
    "gor-own": Case("GlobalOrthogonalRegularizationLoss", (rbf,), 2),
}
MODEL_CASES = [*TRIPLETS, "BatchHardTripletLoss-own", "mega", "gor", "gor-second", "gor-own"]


def labels_of(case: Case, rows: int) -> Tensor | None:
    generator = torch.Generator().manual_seed(rows)
    return torch.randint(0, max(rows // 3, 1), (rows,), generator=generator) if case.labelled else None


def embeddings(rows: int, columns: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return [torch.randn(rows, 6, generator=generator, dtype=dtype, requires_grad=True) for _ in range(columns)]


def from_embeddings(total: Total, columns: list[Tensor], labels: Tensor | None) -> tuple[Tensor, dict]:
    value = total.from_embeddings(columns, labels)
    grads = torch.autograd.grad(1.5 * value, columns)
    return value.detach(), {str(i): grad for i, grad in enumerate(grads)}


@pytest.mark.parametrize("rows", [2, 5, 33])
@pytest.mark.parametrize("case", CASES)
def test_embeddings(case: str, rows: int) -> None:
    case_ = CASES[case]
    columns, labels = embeddings(rows, case_.columns), labels_of(case_, rows)
    ours = from_embeddings(case_.ours(nn.Identity(), chunk_size=8), columns, labels)
    assert_same(ours, from_embeddings(case_.theirs(nn.Identity()), columns, labels), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("labels", ["one class", "all differ", "column", "bool"])
@pytest.mark.parametrize("case", [*TRIPLETS, "BatchHardTripletLoss-cosine", "BatchSemiHardTripletLoss-squared"])
def test_labels(case: str, labels: str) -> None:
    given = {
        "one class": torch.zeros(7),
        "all differ": torch.arange(7),
        "column": torch.arange(7)[:, None] % 3,
        "bool": torch.arange(7) % 2 == 0,
    }[labels]
    columns = embeddings(7, 1)
    ours = from_embeddings(CASES[case].ours(nn.Identity()), columns, given)
    # The library compares a cosine distance of 1e-16, its rounding, with zero.
    theirs = from_embeddings(CASES[case].theirs(nn.Identity()), columns, given.reshape(-1))
    assert_same(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_one_row(case: str) -> None:
    """The library of 5.7 divides by zero pairs in orthogonal regularisation."""
    case_ = CASES[case]
    columns, labels = embeddings(1, case_.columns), labels_of(case_, 1)
    value, grads = from_embeddings(case_.ours(nn.Identity()), columns, labels)
    assert all(grad.isfinite().all() for grad in grads.values())
    if "GlobalOrthogonal" in case_.name:
        assert value.item() == 0 and not any(grad.any() for grad in grads.values())
    else:
        theirs = from_embeddings(case_.theirs(nn.Identity()), columns, labels)
        assert_same((value, grads), theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"mini_batch_size": 4}, {"mini_batch_num_tokens": 20}], ids=str)
@pytest.mark.parametrize("case", MODEL_CASES)
def test_model(case: str, options: dict, transformer_dir: str) -> None:
    case_ = CASES[case]
    model = build(transformer_dir, dense(), Normalize())
    batch, labels = features(model, 9, case_.columns), labels_of(case_, 9)
    if case_.name == "MegaBatchMarginLoss" and not options:
        options = {"use_mini_batched_version": False}
    ours = value_and_grads(case_.ours(model, **options), model, batch, labels, upstream=2.0)
    theirs = value_and_grads(case_.theirs(model), model, batch, labels, upstream=2.0)
    # A difference of products against one of embeddings, by way of distances well below one.
    assert_same(ours, theirs, **({"rtol": 1e-7, "atol": 1e-9} if EXACT else TOLERANCE))


@pytest.mark.parametrize("case", ["BatchAllTripletLoss", "BatchHardTripletLoss", "mega", "gor"])
def test_static_embedding(case: str) -> None:
    """The library's MegaBatchMargin refuses its mini-batches."""
    case_ = CASES[case]
    model = static_model()
    batch, labels = features(model, 9, case_.columns), labels_of(case_, 9)
    ours = value_and_grads(case_.ours(model, mini_batch_size=4), model, batch, labels)
    assert_same(ours, value_and_grads(case_.theirs(model), model, batch, labels), rtol=1e-7, atol=1e-9)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # raised inside inductor
@pytest.mark.parametrize("case", [*TRIPLETS, "mega", "gor"])
def test_compiled(case: str) -> None:
    case_ = CASES[case]
    columns, labels = embeddings(33, case_.columns), labels_of(case_, 33)
    ours = from_embeddings(case_.ours(nn.Identity(), compiled=True), columns, labels)
    assert_same(ours, from_embeddings(case_.theirs(nn.Identity()), columns, labels), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_half_inputs_give_a_float32_loss(case: str, dtype: torch.dtype) -> None:
    case_ = CASES[case]
    columns, labels = embeddings(12, case_.columns, dtype), labels_of(case_, 12)
    value, grads = from_embeddings(case_.ours(nn.Identity()), columns, labels)
    wide = [column.detach().double().requires_grad_() for column in columns]
    expected, wide_grads = from_embeddings(case_.theirs(nn.Identity()), wide, labels)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-5)
    for name, grad in grads.items():
        assert grad.dtype == dtype
        assert (grad.double() - wide_grads[name]).norm() <= 0.03 * wide_grads[name].norm()


@pytest.mark.parametrize("case", MODEL_CASES)
def test_no_grad(case: str, transformer_dir: str) -> None:
    case_ = CASES[case]
    model = build(transformer_dir, dense(), Normalize())
    batch, labels = features(model, 5, case_.columns), labels_of(case_, 5)
    with torch.no_grad():
        expected = case_.theirs(model)([dict(column) for column in batch], labels)
        for options in ({}, {"mini_batch_size": 2}):
            value = case_.ours(model, **options)([dict(column) for column in batch], labels)
            assert not value.requires_grad
            torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("case", CASES)
def test_config(case: str) -> None:
    case_ = CASES[case]
    ours = case_.ours(nn.Identity(), compiled=None).loss.get_config_dict()
    json.dumps(ours)
    if case_.name == "MegaBatchMarginLoss":
        assert ours == library.MegaBatchMarginLoss(None, 0.7, -0.1, False).get_config_dict()
    else:
        assert ours == case_.theirs(nn.Identity()).loss.get_config_dict()
    changed = case_.ours(nn.Identity(), mini_batch_size=8, chunk_size=4).loss.get_config_dict()
    assert changed == {**ours, "mini_batch_size": 8, "chunk_size": 4, "compiled": False}


@pytest.mark.parametrize("name", [*TRIPLETS, "MegaBatchMarginLoss", "GlobalOrthogonalRegularizationLoss"])
def test_is_the_librarys_class(name: str) -> None:
    ours, theirs = getattr(losses, name), getattr(library, name)
    assert issubclass(ours, theirs) and ours.citation is theirs.citation
    mine = list(inspect.signature(ours).parameters.values())
    for given, expected in zip(mine, inspect.signature(theirs).parameters.values()):
        assert (given.name, given.default, given.kind) == (expected.name, expected.default, expected.kind)
    assert ours(nn.Identity()).uses_gradient_cache is (name == "MegaBatchMarginLoss")


def test_mega_batch_margin_keeps_the_librarys_mini_batches() -> None:
    loss = losses.MegaBatchMarginLoss(nn.Identity())
    assert loss.mini_batch_size == 50 and loss.uses_gradient_cache and "forward" not in vars(loss)
    assert not losses.MegaBatchMarginLoss(nn.Identity(), use_mini_batched_version=False).uses_gradient_cache
    assert not losses.MegaBatchMarginLoss(nn.Identity(), mini_batch_size=None).uses_gradient_cache


@pytest.mark.parametrize("name", TRIPLETS)
def test_the_trainer_replaces_the_model(name: str, transformer_dir: str) -> None:
    """The library keeps the model as ``sentence_embedder`` alone, where the trainer does not look for one."""
    model, wrapped = build(transformer_dir), nn.Sequential()
    loss = getattr(losses, name)(model, compiled=False)
    assert loss.model is model and loss.sentence_embedder is model
    assert [child for child, _ in loss.named_children()] == ["model"]
    trainer = SentenceTransformerTrainer.__new__(SentenceTransformerTrainer)
    assert trainer.override_model_in_loss(loss, wrapped) is loss
    assert loss.model is wrapped and loss.sentence_embedder is wrapped
    loss.sentence_embedder = model
    assert loss.model is model


def test_extra_columns_are_not_read(transformer_dir: str) -> None:
    """Like the library, the first column alone; nothing else is embedded."""
    model = build(transformer_dir)
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    for options in ({}, {"mini_batch_size": 2}):
        loss = losses.BatchHardTripletLoss(model, compiled=False, **options)
        one, two = (value_and_grads(loss, model, features(model, 6, n), labels) for n in (1, 2))
        assert_same(two, one)


def test_orthogonal_regularisation_is_a_dict(transformer_dir: str) -> None:
    model = build(transformer_dir)
    batch = features(model, 7, 2)
    expected = library.GlobalOrthogonalRegularizationLoss(model)([dict(column) for column in batch])
    for options in ({}, {"mini_batch_size": 3}):
        loss = losses.GlobalOrthogonalRegularizationLoss(model, compiled=False, **options)
        terms = loss([dict(column) for column in batch])
        assert list(terms) == list(expected) and "_terms" not in vars(loss)
        for name, value in expected.items():
            torch.testing.assert_close(terms[name], value)
    with pytest.raises(RuntimeError, match="second_moment_weight"):  # their gradients were taken together
        (terms["gor_mean"] + 2 * terms["gor_second_moment"]).backward()


X = torch.randn(4, 3)
BAD = {
    "no labels": (lambda: losses.BatchAllTripletLoss(None)._loss([X], None), "requires labels"),
    "too few": (lambda: losses.BatchHardTripletLoss(None)._loss([X], torch.ones(3)), "expects 4 labels"),
    "too few, own": (
        lambda: losses.BatchSemiHardTripletLoss(None, manhattan_matrix)._loss([X], torch.ones(3)),
        "expects 4 labels",
    ),
    "NaN": (lambda: losses.BatchHardTripletLoss(None)._loss([X], torch.full((4,), torch.nan)), "NaN"),
    "no column": (lambda: losses.BatchHardTripletLoss(None)._loss([], torch.ones(4)), "got none"),
    "margin": (lambda: losses.BatchAllTripletLoss(None, margin=float("inf")), "margin"),
    "fuse": (
        lambda: losses.BatchHardTripletLoss(nn.Identity(), fuse_projection=True)([{}], torch.ones(4)),
        "fuse_projection",
    ),
    "three columns": (lambda: losses.MegaBatchMarginLoss(None)._loss([X, X, X], None), "got 3"),
    "three columns of features": (lambda: losses.MegaBatchMarginLoss(None)([{}, {}, {}]), "got 3"),
    "unlike columns": (lambda: losses.MegaBatchMarginLoss(None)._loss([X, X[:3]], None), r"\(4, 3\)"),
    "negative_margin": (lambda: losses.MegaBatchMarginLoss(None, negative_margin=float("nan")), "negative_margin"),
    "weights": (
        lambda: losses.GlobalOrthogonalRegularizationLoss(None, mean_weight=0, second_moment_weight=None),
        "At least one",
    ),
    "aggregation": (lambda: losses.GlobalOrthogonalRegularizationLoss(None, aggregation="max"), "aggregation"),
    "no columns": (lambda: losses.GlobalOrthogonalRegularizationLoss(None).compute_loss_from_embeddings([]), "none"),
    "mini_batch_size": (lambda: losses.MegaBatchMarginLoss(None, mini_batch_size=0), "positive integer"),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses(case: str) -> None:
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()
