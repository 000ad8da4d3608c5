"""MultipleNegativesRankingLoss and its other names against the library's classes, on real tiny models."""

from __future__ import annotations

import inspect
import json
import logging
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    util,
)
from sentence_transformers.sentence_transformer import losses as library
from sentence_transformers.sentence_transformer.modules import Normalize
from st_parts import OUT, assert_same, build, dense, features, sentences, static_model, train, value_and_grads
from torch import Tensor, nn

from chunked_embed import losses

pytestmark = pytest.mark.filterwarnings("ignore:.*SymmetricRankingLoss is deprecated:DeprecationWarning")

EAGER = {"compiled": False}
ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
BOTH = ("query_to_doc", "doc_to_query")
NAMES = [
    "MultipleNegativesRankingLoss",
    "MultipleNegativesSymmetricRankingLoss",
    "CachedMultipleNegativesRankingLoss",
    "CachedMultipleNegativesSymmetricRankingLoss",
]


class Manhattan(nn.Module):
    """A similarity of the user's own."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return -torch.cdist(a, b, p=1)


OPTIONS: dict[str, dict] = {
    "defaults": {},
    "dot": {"scale": 0.5, "similarity_fct": util.dot_score},
    "custom": {"scale": 2.0, "similarity_fct": Manhattan()},
    "custom, all four": {"scale": 2.0, "similarity_fct": Manhattan(), "directions": ALL},
    "joint": {"directions": BOTH},
    "each": {"directions": BOTH, "partition_mode": "per_direction"},
    "all four": {"directions": ALL},
    "queries": {"directions": ("query_to_doc", "query_to_query"), "scale": 7},
    "in batch": {"hardness_mode": "in_batch_negatives", "hardness_strength": 9.0},
    "hard": {"hardness_mode": "hard_negatives", "hardness_strength": 5.0},
    "all negatives, each": {
        "hardness_mode": "all_negatives", "hardness_strength": 2.0,
        "directions": BOTH, "partition_mode": "per_direction",
    },
    "all negatives, all four": {"hardness_mode": "all_negatives", "hardness_strength": 2.0, "directions": ALL},
}  # fmt: skip
WAYS: dict[str, dict] = {
    "plain": {},
    "unfused": {"fuse_projection": False},
    "chunked": {"chunk_size": 2, "fuse_projection": True},
    "cached": {"mini_batch_size": 4},
    "by tokens": {"mini_batch_num_tokens": 25},
}


def theirs(name: str, model: nn.Module, **options) -> nn.Module:
    kind = getattr(library, name)
    known = set(inspect.signature(kind).parameters)
    if "kwargs" not in known and (unknown := set(options) - known):
        pytest.skip(f"this sentence-transformers has no {', '.join(sorted(unknown))}")
    return kind(model, **options)


def ours(model: nn.Module, **options) -> losses.MultipleNegativesRankingLoss:
    return losses.MultipleNegativesRankingLoss(model, **EAGER | options)


@pytest.fixture
def model(transformer_dir: str) -> SentenceTransformer:
    return build(transformer_dir, dense(), Normalize())


# --- the library's numbers --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("columns", [2, 4])
def test_is_the_librarys(options: str, columns: int, model: SentenceTransformer) -> None:
    given = OPTIONS[options]
    batch = features(model, 9, columns)
    reference = theirs(NAMES[0], model, **given)
    expected = value_and_grads(reference, model, batch, None, upstream=2.0)
    for way, extra in WAYS.items():
        if way == "chunked" and "similarity_fct" in given and isinstance(given["similarity_fct"], nn.Module):
            extra = {"chunk_size": 2}
        loss = ours(model, **given, **extra)
        assert_same(value_and_grads(loss, model, batch, None, upstream=2.0), expected)
        with torch.no_grad():
            value = loss([dict(column) for column in batch], None)
        assert not value.requires_grad
        torch.testing.assert_close(value, expected[0])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("columns", [2, 3])
def test_every_name(name: str, columns: int, model: SentenceTransformer) -> None:
    batch = features(model, 9, columns)
    cached = {"mini_batch_size": 4} if name.startswith("Cached") else {}
    loss, reference = getattr(losses, name)(model, 10.0, **EAGER, **cached), theirs(name, model, scale=10.0, **cached)
    assert loss.uses_gradient_cache is bool(cached)
    assert_same(value_and_grads(loss, model, batch, None), value_and_grads(reference, model, batch, None))
    assert loss.temperature == reference.temperature == 0.1
    assert loss.citation == reference.citation


@pytest.mark.parametrize("name", NAMES)
def test_arguments_are_the_librarys(name: str) -> None:
    mine = inspect.signature(getattr(losses, name)).parameters
    of_library = inspect.signature(getattr(library, name.replace("Symmetric", ""))).parameters
    if "hardness_mode" not in of_library:
        pytest.skip("an older signature")
    settled = ("directions", "partition_mode", "hardness_mode", "hardness_strength") if "Symmetric" in name else ()
    positional = [p for p in mine.values() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert [(p.name, p.default) for p in positional] == [
        (p.name, p.default) for p in of_library.values() if p.name not in settled
    ]
    assert {"chunk_size", "max_chunk_bytes", "compiled", "fuse_projection", "mini_batch_size"} <= set(mine)


@pytest.mark.parametrize("name", NAMES)
def test_the_cached_names_cache(name: str) -> None:
    loss = getattr(losses, name)(nn.Identity())
    assert loss.mini_batch_size == (32 if name.startswith("Cached") else None)
    cached = name.startswith("Cached")
    assert isinstance(
        loss, library.CachedMultipleNegativesRankingLoss if cached else library.MultipleNegativesRankingLoss
    )


@pytest.mark.parametrize("rows", [1, 2, 33])
@pytest.mark.parametrize("options", OPTIONS)
def test_embeddings(options: str, rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    columns = [torch.randn(rows, 6, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    values, grads = [], []
    for loss in (ours(nn.Identity(), **OPTIONS[options]), theirs(NAMES[0], nn.Identity(), **OPTIONS[options])):
        values.append(loss.compute_loss_from_embeddings(columns, None))
        found = torch.autograd.grad(1.5 * values[-1], columns, allow_unused=True)
        grads.append([torch.zeros_like(c) if g is None else g.nan_to_num() for c, g in zip(columns, found)])
    torch.testing.assert_close(*values, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("tail", ["dense", "normalize", "dense, normalize", "none"])
@pytest.mark.parametrize("options", ["defaults", "each", "all four", "dot"])
def test_tails(tail: str, options: str, transformer_dir: str) -> None:
    modules = {"dense": [dense(nn.GELU())], "normalize": [Normalize()], "dense, normalize": [dense(), Normalize()]}
    model = build(transformer_dir, *modules.get(tail, []))
    batch = features(model, 9, 3)
    expected = value_and_grads(theirs(NAMES[0], model, **OPTIONS[options]), model, batch, None)
    loss = ours(model, **OPTIONS[options], fuse_projection=tail != "none")
    assert_same(value_and_grads(loss, model, batch, None), expected)


@pytest.mark.parametrize("extra", [{}, {"mini_batch_size": 4}, {"mini_batch_num_tokens": 20}], ids=str)
@pytest.mark.parametrize("options", ["defaults", "each", "all four"])
def test_static_embedding(options: str, extra: dict) -> None:
    model = static_model()
    batch = features(model, 9, 3)
    expected = value_and_grads(theirs(NAMES[0], model, **OPTIONS[options]), model, batch, None, upstream=0.5)
    loss = ours(model, **OPTIONS[options], **extra)
    assert_same(value_and_grads(loss, model, batch, None, upstream=0.5), expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # raised inside inductor
def test_compiled(transformer_dir: str) -> None:
    model = build(transformer_dir, dense(), Normalize(), dtype=torch.float32)
    batch = features(model, 9, 3)
    for options in ("defaults", "each"):
        expected = value_and_grads(theirs(NAMES[0], model, **OPTIONS[options]), model, batch, None)
        got = value_and_grads(ours(model, compiled=True, **OPTIONS[options]), model, batch, None)
        assert_same(got, expected, rtol=1e-3, atol=1e-5)


# --- a scale that learns ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["defaults", "dot", "custom", "each", "all four", "all negatives, all four"])
def test_learnable_scale(options: str, model: SentenceTransformer) -> None:
    given = {**OPTIONS[options], "scale": 3.0}
    batch = features(model, 9, 3)
    expected = value_and_grads(ours(model, **given), model, batch, None, upstream=2.0)

    def value(scale: float) -> float:
        with torch.no_grad():
            return ours(model, **{**given, "scale": scale})([dict(column) for column in batch], None).item()

    slope = 2 * 3 * (value(3.001) - value(2.999)) / 0.002  # to the logarithm
    for extra in ({}, {"chunk_size": 2}, {"mini_batch_size": 4}):
        loss = ours(model, learnable_scale=True, **given, **extra).double()
        loss.log_scale.data.fill_(math.log(3.0))
        assert_same(value_and_grads(loss, model, batch, None, upstream=2.0), expected)
        assert loss.log_scale.grad.item() == pytest.approx(slope, rel=1e-4)
        assert loss.scale == pytest.approx(3.0) and loss.temperature == pytest.approx(1 / 3)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    loss.log_scale.grad = None
    value_and_grads(loss, model, batch, None, upstream=2.0)
    assert loss.log_scale.grad.item() == pytest.approx(slope, rel=1e-4)


def dataset(columns: int, rows: int = 16) -> Dataset:
    return Dataset.from_dict({f"text_{i}": sentences(rows, i) for i in range(columns)})


quiet = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]


def marked(function: Callable) -> Callable:
    for mark in quiet:
        function = mark(function)
    return pytest.mark.slow(function)


@marked
@pytest.mark.parametrize("options", ["defaults", "all negatives, each", "all four"])
@pytest.mark.parametrize("extra", [{}, {"mini_batch_size": 2}], ids=str)
def test_trains_like_the_library(options: str, extra: dict, transformer_dir: str, tmp_path: Path) -> None:
    ends = []
    for who in ("ours", "theirs"):
        model = build(transformer_dir, dense(), Normalize(), dtype=torch.float32)
        given = OPTIONS[options]
        loss = ours(model, **given, **extra) if who == "ours" else theirs(NAMES[0], model, **given)
        trainer = train(model, loss, dataset(3), tmp_path / who, learning_rate=1e-2)
        history = [e.get("loss", e.get("eval_loss")) for e in trainer.state.log_history]
        ends.append(([x for x in history if x is not None], model.state_dict()))
    assert len(ends[0][0]) >= 4 and ends[0][0] == pytest.approx(ends[1][0], rel=1e-3, abs=1e-4)
    for name, value in ends[0][1].items():
        torch.testing.assert_close(value, ends[1][1][name], rtol=1e-2, atol=2e-3)


@marked
def test_learnable_scale_in_the_trainer(transformer_dir: str, tmp_path: Path) -> None:
    scales = []
    for extra in ({}, {"mini_batch_size": 2}):
        model = build(transformer_dir, dense(), Normalize(), dtype=torch.float32)
        loss = ours(model, learnable_scale=True, **extra)
        train(model, loss, dataset(2), tmp_path / str(len(scales)), learning_rate=1e-2)
        scales.append(loss.scale)
        assert loss.log_scale.grad is None or loss.log_scale.grad.isfinite()
        config = loss.get_config_dict()
        assert config["scale"] == loss.scale and config["learnable_scale"] is True
        json.dumps(config)
    assert scales[0] == pytest.approx(scales[1], rel=1e-4)
    assert abs(scales[0] - 20.0) > 0.05


# --- configs and refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_config(name: str) -> None:
    mine = getattr(losses, name)(nn.Identity()).get_config_dict()
    json.dumps(mine)
    theirs_ = getattr(library, name)(_Sized()).get_config_dict()
    assert {key: mine[key] for key in theirs_} == theirs_
    assert set(mine) == set(theirs_) or "hardness_mode" not in theirs_
    changed = getattr(losses, name)(nn.Identity(), chunk_size=4, false_negatives="text", compiled=False)
    assert changed.get_config_dict() == {**mine, "chunk_size": 4, "false_negatives": "text", "compiled": False}


def test_one_direction_as_a_word() -> None:
    loss = ours(nn.Identity(), directions="query_to_doc")
    assert loss.directions == ("query_to_doc",) and loss.get_config_dict()["directions"] == ("query_to_doc",)


def test_hardness_without_strength_warns(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        ours(nn.Identity(), hardness_mode="all_negatives")
    assert "hardness_strength" in caplog.text


def columns_of(count: int, rows: int = 4) -> list[Tensor]:
    return [torch.randn(rows, 6, requires_grad=True) for _ in range(count)]


def called(count: int = 2, labels: Tensor | None = None, **options) -> Tensor:
    return ours(nn.Identity(), **options).compute_loss_from_embeddings(columns_of(count), labels)


BAD: dict[str, tuple[Callable, type[Exception], str]] = {
    "scale": (lambda: ours(None, scale=0.0), ValueError, "scale to be a positive, finite number, got 0"),
    "infinite scale": (lambda: ours(None, scale=math.inf), ValueError, "scale to be a positive, finite"),
    "NaN scale": (lambda: ours(None, scale=math.nan), ValueError, "scale to be a positive, finite"),
    "similarity": (lambda: ours(None, similarity_fct="cosine"), TypeError, "callable, got 'cosine'"),
    "directions": (lambda: ours(None, directions=("doc_to_query",)), ValueError, "positive pair"),
    "no directions": (lambda: ours(None, directions=()), ValueError, "positive pair"),
    "unknown direction": (lambda: ours(None, directions=("query_to_doc", "up")), ValueError, "'up'"),
    "mode": (lambda: ours(None, partition_mode="both"), ValueError, "partition_mode"),
    "mode and directions": (
        lambda: ours(None, partition_mode="per_direction", directions=ALL), ValueError, "no positive pair",
    ),
    "hardness": (lambda: ours(None, hardness_mode="hard"), ValueError, "hardness_mode"),
    "strength": (lambda: ours(None, hardness_strength=-1.0), ValueError, "hardness_strength"),
    "NaN strength": (lambda: ours(None, hardness_strength=math.nan), ValueError, "hardness_strength"),
    "false negatives": (lambda: ours(None, false_negatives="ids"), ValueError, "false_negatives"),
    "option": (lambda: ours(None, batch_size=3), TypeError, "batch_size"),
    "mini-batch": (lambda: ours(None, mini_batch_size=0), ValueError, "positive integer"),
    "one column": (lambda: called(1), ValueError, "at least 2 columns"),
    "no labels": (lambda: called(false_negatives="labels"), ValueError, r"for each row, integers \(4,\), got None"),
    "float labels": (lambda: called(labels=torch.ones(4), false_negatives="labels"), ValueError, "float32"),
    "few labels": (lambda: called(labels=torch.arange(3), false_negatives="labels"), ValueError, r"got \(3,\)"),
    "no texts": (lambda: called(false_negatives="text"), ValueError, r"an id for each text, integers \(4, 2\)"),
}  # fmt: skip


@pytest.mark.parametrize("call", BAD)
def test_refuses(call: str) -> None:
    function, error, message = BAD[call]
    with pytest.raises(error, match=message):
        function()


def test_wrong_columns_with_a_model(model: SentenceTransformer) -> None:
    for extra in ({}, {"mini_batch_size": 2}):
        with pytest.raises(ValueError, match="at least 2 columns"):
            ours(model, **extra)(features(model, 4, 1), None)


# --- inside other losses ----------------------------------------------------------------------------------------------

DIMS, WEIGHTS = [4, OUT, 7], [0.3, 1.0, 2.0]


@pytest.mark.parametrize("options", ["defaults", "dot", "each", "all four", "all negatives, each", "custom"])
@pytest.mark.parametrize("extra", [{}, {"mini_batch_size": 4}], ids=["plain", "cached"])
def test_matryoshka(options: str, extra: dict, transformer_dir: str) -> None:
    model = build(transformer_dir, dense())
    batch, given = features(model, 9, 3), OPTIONS[options]
    expected = library.MatryoshkaLoss(model, theirs(NAMES[0], model, **given), DIMS, WEIGHTS)
    expected = value_and_grads(expected, model, batch, None, upstream=2.0)
    for package in (losses, library):
        loss = package.MatryoshkaLoss(model, ours(model, **given, **extra), DIMS, WEIGHTS)
        assert_same(value_and_grads(loss, model, batch, None, upstream=2.0), expected)
    loss = losses.MatryoshkaLoss(model, ours(model, **given), DIMS, WEIGHTS, mini_batch_size=4)
    assert_same(value_and_grads(loss, model, batch, None, upstream=2.0), expected)


@pytest.mark.parametrize("way", ["plain", "cached inside", "cached outside", "theirs"])
def test_matryoshka_and_a_learnable_scale(way: str, transformer_dir: str) -> None:
    model = build(transformer_dir, dense())
    batch = features(model, 9, 2)
    reference = ours(model, learnable_scale=True).double()
    expected = value_and_grads(library.MatryoshkaLoss(model, reference, DIMS, WEIGHTS), model, batch, None, 2.0)
    inside, outside = ({"mini_batch_size": 4} if way == f"cached {where}" else {} for where in ("inside", "outside"))
    inner = ours(model, learnable_scale=True, **inside).double()
    package = library if way == "theirs" else losses
    loss = package.MatryoshkaLoss(model, inner, DIMS, WEIGHTS, **outside)
    assert_same(value_and_grads(loss, model, batch, None, 2.0), expected)
    torch.testing.assert_close(inner.log_scale.grad, reference.log_scale.grad, rtol=1e-9, atol=1e-12)


LAYERS: dict[str, Callable] = {
    "layers": lambda model, loss, package: package.AdaptiveLayerLoss(model, loss, n_layers_per_step=-1),
    "a layer": lambda model, loss, package: package.AdaptiveLayerLoss(model, loss),
    "without KL": lambda model, loss, package: package.AdaptiveLayerLoss(model, loss, kl_temperature=0),
    "2d": lambda model, loss, package: package.Matryoshka2dLoss(model, loss, DIMS, WEIGHTS, n_dims_per_step=-1),
    "2d, a width": lambda model, loss, package: package.Matryoshka2dLoss(model, loss, DIMS),
}


@pytest.mark.parametrize("options", ["defaults", "each", "all four"])
@pytest.mark.parametrize("around", LAYERS)
def test_layers(around: str, options: str, transformer_dir: str) -> None:
    model = build(transformer_dir, dense(), Normalize())
    batch = features(model, 9, 3)
    results = []
    for package in (library, losses):
        given = OPTIONS[options]
        inner = ours(model, **given) if package is losses else theirs(NAMES[0], model, **given)
        for seed in range(2):
            random.seed(seed)
            results.append(value_and_grads(LAYERS[around](model, inner, package), model, batch, None, upstream=2.0))
    assert_same(results[2], results[0])
    assert_same(results[3], results[1])


@pytest.mark.parametrize("package", [losses, library], ids=["ours", "theirs"])
@pytest.mark.parametrize("around", ["layers", "2d"])
def test_layers_around_cached_losses_are_refused(around: str, package, model: SentenceTransformer) -> None:
    """By a warning of the library's, and an error when it looks for the layers."""
    inner = package.CachedMultipleNegativesRankingLoss(model, mini_batch_size=4, **EAGER if package is losses else {})
    with pytest.warns(UserWarning, match="is not compatible with"):
        loss = LAYERS[around](model, inner, losses)
    with pytest.raises(KeyError, match="all_layer_embeddings"):
        loss(features(model, 6, 2), None)


class _Sized(nn.Module):
    def get_embedding_dimension(self) -> int:
        return OUT

    def __getitem__(self, index: int) -> nn.Module:
        return self
