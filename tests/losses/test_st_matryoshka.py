"""Matryoshka around our losses and the library's, cached and not, against the library's Matryoshka."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable

import pytest
import torch
from sentence_transformers.sentence_transformer import losses as library
from sentence_transformers.sentence_transformer.modules import Normalize
from st_parts import HIDDEN, OUT, assert_same, build, dense, features, labels_for, static_model, value_and_grads
from torch import Tensor, nn

from chunked_embed import losses

DIMS, WEIGHTS = [4, OUT, 7], [0.3, 1.0, 2.0]

# name: (columns, labels, the wrapped loss, what the library's Matryoshka wraps for the same numbers)
PAIRS: dict[str, tuple[int, str | None, Callable, Callable]] = {
    "ours-cosent": (2, "tied", lambda m: losses.CoSENTLoss(m, compiled=False), library.CoSENTLoss),
    "ours-angle": (3, None, lambda m: losses.AnglELoss(m, compiled=False), library.AnglELoss),
    "ours-triplet": (3, None, lambda m: losses.TripletLoss(m, compiled=False), library.TripletLoss),
    "ours-cached": (
        2, "tied", lambda m: losses.CoSENTLoss(m, compiled=False, mini_batch_size=4), library.CoSENTLoss,
    ),
    "theirs-cosent": (2, "tied", library.CoSENTLoss, library.CoSENTLoss),
    "theirs-cached": (
        3, None,
        lambda m: library.CachedMultipleNegativesRankingLoss(m, mini_batch_size=4),
        library.MultipleNegativesRankingLoss,
    ),
    "theirs-distill": (2, "embedding", library.EmbedDistillLoss, library.EmbedDistillLoss),
    "theirs-gist": (
        2, None,
        lambda m: library.CachedGISTEmbedLoss(m, copy.deepcopy(m), mini_batch_size=4),
        lambda m: library.GISTEmbedLoss(m, copy.deepcopy(m)),
    ),
}  # fmt: skip


def labels_of(kind: str | None, rows: int) -> Tensor | None:
    if kind == "embedding":
        return torch.randn(rows, OUT, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return kind and labels_for(kind, rows)


def a_model(folder: str) -> nn.Module:
    return build(folder, dense())


@pytest.mark.parametrize("pair", PAIRS)
def test_equals_the_library(pair: str, transformer_dir: str) -> None:
    columns, kind, ours, theirs = PAIRS[pair]
    model = a_model(transformer_dir)
    batch, labels = features(model, 9, columns), labels_of(kind, 9)
    wrapped, reference = ours(model), theirs(model)
    loss = losses.MatryoshkaLoss(model, wrapped, DIMS, WEIGHTS)
    expected = value_and_grads(library.MatryoshkaLoss(model, reference, DIMS, WEIGHTS), model, batch, labels, 2.0)
    assert_same(value_and_grads(loss, model, batch, labels, 2.0), expected)
    with torch.no_grad():
        torch.testing.assert_close(loss([dict(c) for c in batch], labels), expected[0])
    # The wrapped loss is as it was.
    fresh = value_and_grads(ours(model), model, batch, labels)
    assert_same(value_and_grads(wrapped, model, batch, labels), fresh)


@pytest.mark.parametrize("inner", [losses.CoSENTLoss, library.CoSENTLoss], ids=["ours", "theirs"])
def test_mini_batches_of_its_own(inner: Callable, transformer_dir: str) -> None:
    model = a_model(transformer_dir)
    batch, labels = features(model, 9, 2), labels_for("tied", 9)
    options = {"compiled": False} if inner is losses.CoSENTLoss else {}
    loss = losses.MatryoshkaLoss(model, inner(model, **options), DIMS, WEIGHTS, mini_batch_size=4)
    assert loss.uses_gradient_cache
    expected = library.MatryoshkaLoss(model, library.CoSENTLoss(model), DIMS, WEIGHTS)
    assert_same(value_and_grads(loss, model, batch, labels), value_and_grads(expected, model, batch, labels))


@pytest.mark.parametrize("cached", [{}, {"mini_batch_size": 4}], ids=["plain", "cached"])
def test_the_librarys_matryoshka_around_ours(cached: dict, transformer_dir: str) -> None:
    """It patches ``model.forward`` or ``calculate_loss``; the tail must not be taken out behind its back."""
    model = build(transformer_dir, dense(), Normalize())
    batch, labels = features(model, 9, 2), labels_for("tied", 9)
    around = library.MatryoshkaLoss(model, losses.CoSENTLoss(model, compiled=False, **cached), DIMS)
    expected = library.MatryoshkaLoss(model, library.CoSENTLoss(model), DIMS)
    assert_same(value_and_grads(around, model, batch, labels), value_and_grads(expected, model, batch, labels))


@pytest.mark.parametrize("pair", ["ours-cosent", "ours-cached", "theirs-cosent"])
def test_n_dims_per_step(pair: str, transformer_dir: str) -> None:
    columns, kind, ours, theirs = PAIRS[pair]
    model = a_model(transformer_dir)
    batch, labels = features(model, 9, columns), labels_of(kind, 9)
    loss = losses.MatryoshkaLoss(model, ours(model), DIMS, WEIGHTS, n_dims_per_step=2)
    reference = library.MatryoshkaLoss(model, theirs(model), DIMS, WEIGHTS, n_dims_per_step=2)
    for seed in range(4):
        random.seed(seed)
        got = value_and_grads(loss, model, batch, labels)
        random.seed(seed)
        assert_same(got, value_and_grads(reference, model, batch, labels))


def test_from_embeddings() -> None:
    model = _Sized()
    generator = torch.Generator().manual_seed(0)
    columns = [torch.randn(9, OUT, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    for inner in (losses.TripletLoss(model, compiled=False), library.TripletLoss(model)):
        value = losses.MatryoshkaLoss(model, inner, DIMS, WEIGHTS).compute_loss_from_embeddings(columns)
        plain = sum(
            w * library.TripletLoss(model).compute_loss_from_embeddings(
                [nn.functional.normalize(column[:, :dim], dim=1) for column in columns], None
            )
            for dim, w in zip(DIMS, WEIGHTS)
        )  # fmt: skip
        torch.testing.assert_close(value, plain)
        got, expected = (torch.autograd.grad(3 * x, columns) for x in (value, plain))
        torch.testing.assert_close(got, expected)


class Held:
    """What the graphs keep for backward, and the most that they kept at a time."""

    now = most = 0

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.bytes = tensor, tensor.nbytes
        Held.now += self.bytes
        Held.most = max(Held.most, Held.now)

    def __del__(self) -> None:
        Held.now -= self.bytes


def test_memory_is_that_of_the_widest() -> None:
    model, columns = _Sized(), [torch.randn(512, OUT, requires_grad=True) for _ in range(3)]

    def most(dims: list[int]) -> int:
        loss = losses.MatryoshkaLoss(model, library.TripletLoss(model), dims)
        Held.most = Held.now = 0
        with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
            loss.compute_loss_from_embeddings(columns).backward()
        return Held.most

    assert most([OUT] * 6) < 1.1 * most([OUT])


def test_static_embedding() -> None:
    model = static_model()
    batch, labels, dims = features(model, 9, 2), labels_for("tied", 9), [HIDDEN, 5]
    inner = losses.CoSENTLoss(model, compiled=False, mini_batch_size=4)
    expected = value_and_grads(library.MatryoshkaLoss(model, library.CoSENTLoss(model), dims), model, batch, labels)
    assert_same(value_and_grads(losses.MatryoshkaLoss(model, inner, dims), model, batch, labels), expected)
    loss = losses.MatryoshkaLoss(model, library.CoSENTLoss(model), dims, mini_batch_size=4)
    assert_same(value_and_grads(loss, model, batch, labels), expected)


class CubedDistance(library.CoSENTLoss):
    """A user's loss whose forward makes of the labels what it needs."""

    def forward(self, sentence_features, labels: Tensor) -> Tensor:
        embeddings = [self.model(column)["sentence_embedding"] for column in sentence_features]
        return self.compute_loss_from_embeddings(embeddings, {"cubes": labels**3})

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: dict) -> Tensor:
        wanted = labels["cubes"].flatten(1).sum(1)
        return sum((column.sum(1) - wanted).square().mean() for column in embeddings)


TEACHERS: dict[str, Callable] = {
    "mse": library.MSELoss,
    "cosine": library.EmbedDistillLoss,
    "l2": lambda model: library.EmbedDistillLoss(model, "l2"),
    "a user's": CubedDistance,
}
WRAPPINGS: dict[str, Callable] = {
    "plain": lambda package, model, *args, **options: package.MatryoshkaLoss(model, *args, **options),
    "2d": lambda package, model, *args: package.Matryoshka2dLoss(
        model, *args, n_layers_per_step=-1, n_dims_per_step=-1
    ),
    "layers": lambda package, model, *args: library.AdaptiveLayerLoss(
        model, package.MatryoshkaLoss(model, *args), n_layers_per_step=-1
    ),
}


@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize("dim", ["2-D", "3-D"])
@pytest.mark.parametrize("teacher", TEACHERS)
def test_a_teachers_embeddings_as_labels(teacher: str, dim: str, columns: int, transformer_dir: str) -> None:
    """Each row learns its own, in every wrapping; in mini-batches too, where the layers' losses need none."""
    model = build(transformer_dir)
    dims = [HIDDEN, 5]
    shape = (9, HIDDEN) if dim == "2-D" else (9, columns, HIDDEN)
    labels = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    batch, inner = features(model, 9, columns), TEACHERS[teacher](model)
    for name, wrap in WRAPPINGS.items():
        expected = value_and_grads(wrap(library, model, inner, dims), model, batch, labels, 2.0)
        for options in ({}, {"mini_batch_size": 4}) if name == "plain" else ({},):
            assert_same(
                value_and_grads(wrap(losses, model, inner, dims, **options), model, batch, labels, 2.0), expected
            )


def test_a_forward_of_the_users_own_counts(transformer_dir: str) -> None:
    """At every width, around a loss of ours whose subclass has one."""
    model = build(transformer_dir)
    batch, labels = features(model, 9, 2), labels_for("tied", 9)
    found = []
    for package in (losses, library):

        class Pulled(package.CoSENTLoss):
            def forward(self, sentence_features, labels: Tensor) -> Tensor:
                anchors = self.model(next(iter(sentence_features)))["sentence_embedding"]
                return super().forward(sentence_features, labels) + anchors.square().sum()

        for options in ({}, {"mini_batch_size": 4}) if package is losses else ({},):
            loss = package.MatryoshkaLoss(model, Pulled(model), [HIDDEN, 5], **options)
            found.append(value_and_grads(loss, model, batch, labels, 2.0))
    assert_same(found[0], found[2])
    assert_same(found[1], found[2])


def test_options_go_to_the_wrapped_loss(transformer_dir: str) -> None:
    model = build(transformer_dir)
    inner = losses.CoSENTLoss(model)
    loss = losses.MatryoshkaLoss(model, inner, [HIDDEN, 5], chunk_size=4)
    assert inner.chunk_size == loss.chunk_size == 4
    loss.compiled = False
    assert inner.compiled is False and inner.mini_batch_size is None
    loss.mini_batch_size = 3
    assert loss.uses_gradient_cache and inner.mini_batch_size is None
    inner.mini_batch_size = 3
    with pytest.raises(ValueError, match="already"):
        loss(features(model, 9, 2), labels_for("tied", 9))
    theirs = losses.MatryoshkaLoss(model, library.CoSENTLoss(model), [HIDDEN, 5])
    with pytest.raises(ValueError, match="CoSENTLoss, the wrapped loss, has no such option"):
        theirs.chunk_size = 4


def test_inside_adaptive_layers(transformer_dir: str) -> None:
    """Which patches the model's forward, and reads the embeddings that come out of it."""
    grads = []
    for package in (losses, library):
        model = build(transformer_dir, dense(), Normalize())
        batch, labels = features(model, 9, 2), labels_for("tied", 9)
        for inner in (package.CoSENTLoss(model), package.MatryoshkaLoss(model, package.CoSENTLoss(model), DIMS)):
            cosent = getattr(inner, "loss", inner)
            cosent.compiled = False
            random.seed(0)
            grads.append(value_and_grads(library.AdaptiveLayerLoss(model, inner), model, batch, labels))
    assert_same(grads[0], grads[2])
    assert_same(grads[1], grads[3])


def test_half_embeddings() -> None:
    model = _Sized()
    columns = [torch.randn(9, OUT).half().requires_grad_() for _ in range(3)]
    loss = losses.MatryoshkaLoss(model, losses.TripletLoss(model, compiled=False), DIMS)
    loss.compute_loss_from_embeddings(columns).backward()
    assert all(column.grad.dtype == torch.float16 and column.grad.isfinite().all() for column in columns)


def test_learnable_similarity_gets_its_gradient(transformer_dir: str) -> None:
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.power = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return -(a - b).abs().pow(self.power).sum(1)

    model = a_model(transformer_dir)
    batch, labels = features(model, 9, 2), labels_for("tied", 9)
    grads = []
    for package in (losses, library):
        similarity = Weighted()
        loss = package.MatryoshkaLoss(model, package.CoSENTLoss(model, 20.0, similarity), DIMS)
        value_and_grads(loss, model, batch, labels)
        grads.append(similarity.power.grad)
    torch.testing.assert_close(*grads)


def test_options_reach_the_wrapped_loss() -> None:
    model = _Sized()
    inner = losses.CoSENTLoss(model)
    loss = losses.MatryoshkaLoss(model, inner, DIMS, compiled=False, chunk_size=3)
    assert inner.compiled is False and inner.chunk_size == 3
    config = loss.get_config_dict()
    json.dumps(config)
    assert config == library.MatryoshkaLoss(model, library.CoSENTLoss(model), DIMS).get_config_dict()
    assert loss.citation == library.MatryoshkaLoss.citation.fget(loss)


def test_refuses() -> None:
    model = _Sized()
    with pytest.raises(ValueError, match="no such option"):
        losses.MatryoshkaLoss(model, library.CoSENTLoss(model), DIMS, chunk_size=4)
    with pytest.raises(ValueError, match="already"):
        losses.MatryoshkaLoss(model, losses.CoSENTLoss(model, mini_batch_size=4), DIMS, mini_batch_size=4)
    with pytest.raises(ValueError, match="compute_loss_from_embeddings"):
        losses.MatryoshkaLoss(model, nn.Identity(), DIMS, mini_batch_size=4)
    with pytest.raises(ValueError, match="cannot be greater"):
        loss = losses.MatryoshkaLoss(model, losses.CoSENTLoss(model, compiled=False), DIMS)
        loss.compute_loss_from_embeddings([torch.randn(3, OUT - 1, requires_grad=True)] * 2, torch.rand(3))
    with pytest.raises(ValueError, match="exceed"):
        losses.MatryoshkaLoss(model, losses.CoSENTLoss(model), [OUT + 1])


class _Sized(nn.Module):
    def get_embedding_dimension(self) -> int:
        return OUT
