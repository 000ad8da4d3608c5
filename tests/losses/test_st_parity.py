"""CoSENT, AnglE and Triplet against the library's own classes: loss and gradients in float64."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from sentence_transformers import util
from sentence_transformers.sentence_transformer import losses as library
from sentence_transformers.sentence_transformer.losses import TripletDistanceMetric
from sentence_transformers.sentence_transformer.modules import Normalize
from st_parts import assert_same, build, dense, features, labels_for, value_and_grads
from torch import Tensor, nn

from chunked_embed import losses


class L3(nn.Module):
    """A similarity of the user's own."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return -(a - b).abs().pow(3).sum(-1)


def scaled_cosine(a: Tensor, b: Tensor, factor: float = 1.0) -> Tensor:
    return factor * util.pairwise_cos_sim(a, b)


class Case(NamedTuple):
    name: str
    args: tuple
    columns: int
    labelled: bool

    def ours(self, model: nn.Module, **options) -> nn.Module:
        return getattr(losses, self.name)(model, *self.args, **{"compiled": False, **options})

    def theirs(self, model: nn.Module) -> nn.Module:
        return getattr(library, self.name)(model, *self.args)


CASES = {
    "cosent": Case("CoSENTLoss", (), 2, True),
    "cosent-dot": Case("CoSENTLoss", (0.5, util.pairwise_dot_score), 2, True),
    "cosent-euclidean": Case("CoSENTLoss", (2.0, util.pairwise_euclidean_sim), 2, True),
    "cosent-manhattan": Case("CoSENTLoss", (2.0, util.pairwise_manhattan_sim), 2, True),
    "cosent-angle": Case("CoSENTLoss", (20.0, util.pairwise_angle_sim), 2, True),
    "cosent-module": Case("CoSENTLoss", (3.0, L3()), 2, True),
    "cosent-partial": Case("CoSENTLoss", (3.0, functools.partial(scaled_cosine, factor=2.0)), 2, True),
    "cosent-huge": Case("CoSENTLoss", (1e5,), 2, True),
    "angle": Case("AnglELoss", (), 2, True),
    "angle-triplets": Case("AnglELoss", (), 3, False),
    "angle-tuples": Case("AnglELoss", (5.0,), 5, False),
    "angle-huge": Case("AnglELoss", (1e5,), 2, True),
    "triplet": Case("TripletLoss", (), 3, False),
    "triplet-cosine": Case("TripletLoss", (TripletDistanceMetric.COSINE, 0.5), 3, False),
    "triplet-manhattan": Case("TripletLoss", (TripletDistanceMetric.MANHATTAN, 2), 3, False),
    "triplet-module": Case("TripletLoss", (L3(), 1.0), 3, False),
}


def embeddings(rows: int, columns: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return [torch.randn(rows, 6, generator=generator, dtype=dtype, requires_grad=True) for _ in range(columns)]


def from_embeddings(loss: nn.Module, columns: list[Tensor], labels: Tensor | None) -> tuple[Tensor, dict]:
    value = loss.compute_loss_from_embeddings(columns, labels)
    grads = torch.autograd.grad(1.5 * value, columns)
    return value.detach(), {str(i): grad for i, grad in enumerate(grads)}


@pytest.mark.parametrize("rows", [1, 2, 33])
@pytest.mark.parametrize("case", CASES)
def test_embeddings(case: str, rows: int) -> None:
    case_ = CASES[case]
    columns = embeddings(rows, case_.columns)
    for kind in ("random", "tied", "equal") if case_.labelled else ("none",):
        labels = labels_for(kind, rows) if case_.labelled else None
        ours = from_embeddings(case_.ours(nn.Identity(), chunk_size=8), columns, labels)
        assert_same(ours, from_embeddings(case_.theirs(nn.Identity()), columns, labels))


@pytest.mark.parametrize("options", [{}, {"mini_batch_size": 4}, {"fuse_projection": False}], ids=str)
@pytest.mark.parametrize("case", ["cosent", "cosent-module", "angle", "angle-tuples", "triplet", "triplet-manhattan"])
def test_model(case: str, options: dict, transformer_dir: str) -> None:
    case_ = CASES[case]
    model = build(transformer_dir, dense(), Normalize())
    batch, labels = features(model, 9, case_.columns), labels_for("tied", 9) if case_.labelled else None
    ours = value_and_grads(case_.ours(model, **options), model, batch, labels, upstream=2.0)
    assert_same(ours, value_and_grads(case_.theirs(model), model, batch, labels, upstream=2.0))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # raised inside inductor
@pytest.mark.parametrize("case", ["cosent", "angle", "triplet"])
def test_compiled(case: str, transformer_dir: str) -> None:
    case_ = CASES[case]
    model = build(transformer_dir, dense(), Normalize(), dtype=torch.float32)
    batch, labels = features(model, 9, case_.columns), labels_for("tied", 9).float() if case_.labelled else None
    ours = value_and_grads(case_.ours(model, compiled=True), model, batch, labels)
    theirs = value_and_grads(case_.theirs(model), model, batch, labels)
    assert_same(ours, theirs, rtol=1e-3, atol=2e-3 if case_.labelled else 1e-5)


@pytest.mark.parametrize("case", ["cosent", "angle"])
@pytest.mark.parametrize("kind", ["bool", "column"])
def test_labels_of_other_kinds(case: str, kind: str) -> None:
    columns, labels = embeddings(9, 2), labels_for(kind, 9)
    plain = labels.reshape(-1).to(torch.float64)
    ours = from_embeddings(CASES[case].ours(nn.Identity()), columns, labels)
    assert_same(ours, from_embeddings(CASES[case].theirs(nn.Identity()), columns, plain))


def test_angle_tuples_with_labels() -> None:
    columns, labels = embeddings(9, 4), torch.arange(9) % 2
    ours = from_embeddings(losses.AnglELoss(nn.Identity(), compiled=False), columns, labels.bool())
    assert_same(ours, from_embeddings(library.AnglELoss(nn.Identity()), columns, labels))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", ["cosent", "cosent-partial", "angle", "triplet", "triplet-cosine", "triplet-module"])
def test_half_inputs_give_a_float32_loss(case: str, dtype: torch.dtype) -> None:
    case_ = CASES[case]
    columns = embeddings(9, case_.columns, dtype)
    labels = labels_for("tied", 9).float() if case_.labelled else None
    value, grads = from_embeddings(case_.ours(nn.Identity()), columns, labels)
    wide = [column.detach().float().requires_grad_() for column in columns]
    expected, wide_grads = from_embeddings(case_.theirs(nn.Identity()), wide, labels)
    assert value.dtype == torch.float32
    loose = (
        {"rtol": 0.05, "atol": 0.05 * float(expected.abs() + 1)}
        if case_.name == "CoSENTLoss"
        else {"rtol": 0.03, "atol": 0.03}
    )
    torch.testing.assert_close(value, expected, **loose)
    assert all(grad.dtype == dtype and grad.isfinite().all() for grad in grads.values())
    assert all(wide_grads[name].isfinite().all() for name in grads)


@pytest.mark.parametrize("case", ["cosent", "angle", "triplet"])
def test_no_grad(case: str, transformer_dir: str) -> None:
    case_ = CASES[case]
    model = build(transformer_dir, dense(), Normalize())
    batch, labels = features(model, 5, case_.columns), labels_for("random", 5) if case_.labelled else None
    with torch.no_grad():
        expected = case_.theirs(model)([dict(column) for column in batch], labels)
        for options in ({}, {"mini_batch_size": 2}):
            value = case_.ours(model, **options)([dict(column) for column in batch], labels)
            assert not value.requires_grad
            torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("case", CASES)
def test_config(case: str) -> None:
    case_ = CASES[case]
    ours = case_.ours(nn.Identity(), compiled=None).get_config_dict()
    json.dumps(ours)
    if not case.endswith(("-partial", "-module")):  # for which CoSENTLoss of the library has no name
        assert ours == case_.theirs(nn.Identity()).get_config_dict()
    assert case_.ours(nn.Identity(), mini_batch_size=8, chunk_size=4).get_config_dict() == {
        **ours, "mini_batch_size": 8, "chunk_size": 4, "compiled": False,
    }  # fmt: skip


def test_is_the_librarys_class() -> None:
    for name in ("CoSENTLoss", "AnglELoss", "TripletLoss"):
        loss = getattr(losses, name)(nn.Identity())
        theirs = getattr(library, name)(nn.Identity())
        assert isinstance(loss, type(theirs)) and loss.citation == theirs.citation
        assert loss.uses_gradient_cache is False
    assert losses.TripletDistanceMetric is TripletDistanceMetric


BAD_CALLS: dict[str, tuple[Callable, str]] = {
    "too few labels": (lambda x: losses.CoSENTLoss(nn.Identity())._loss(x[:2], torch.ones(3)), "expects 4 labels"),
    "no labels": (lambda x: losses.CoSENTLoss(nn.Identity())._loss(x[:2], None), "requires labels"),
    "no labels, AnglE": (lambda x: losses.AnglELoss(nn.Identity())._loss(x[:2], None), "requires labels"),
    "one column": (lambda x: losses.CoSENTLoss(nn.Identity())._loss(x[:1], torch.ones(4)), "two columns"),
    "two columns": (lambda x: losses.TripletLoss(nn.Identity())._loss(x[:2], None), "got 2 columns"),
    "a matrix": (
        lambda x: losses.CoSENTLoss(nn.Identity(), 20.0, util.cos_sim)._loss(x[:2], torch.ones(4)),
        r"one score for each pair, \(4,\), got \(4, 4\)",
    ),
    "mini_batch_size": (lambda x: losses.CoSENTLoss(nn.Identity(), mini_batch_size=0), "positive integer"),
    "fuse": (lambda x: losses.TripletLoss(nn.Identity(), fuse_projection="yes"), "fuse_projection"),
}


@pytest.mark.parametrize("call", BAD_CALLS)
def test_refuses(call: str) -> None:
    function, message = BAD_CALLS[call]
    with pytest.raises(ValueError, match=message):
        function(embeddings(4, 3))


def test_unknown_option() -> None:
    with pytest.raises(TypeError, match="batch_size"):
        losses.CoSENTLoss(nn.Identity(), batch_size=3)
