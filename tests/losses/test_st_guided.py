"""GISTEmbed and its cached form against the library's classes, and the sigmoid pair loss, on real tiny models."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    util,
)
from sentence_transformers.sentence_transformer import losses as library
from sentence_transformers.sentence_transformer.modules import Normalize
from st_guided_parts import embeddings, guide_of, save_guide
from st_parts import EXACT, OUT, assert_same, build, dense, features, sentences, static_model, value_and_grads
from torch import Tensor, nn

from chunked_embed import losses

EAGER = {"compiled": False}


@pytest.fixture(scope="module")
def guide_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved BERT of another width, whose tokenizer gives the same words other numbers."""
    return save_guide(tmp_path_factory.mktemp("guide"))


@pytest.fixture
def model(transformer_dir: str) -> SentenceTransformer:
    return build(transformer_dir, dense(), Normalize())


@pytest.fixture(params=["same tokenizer", "other tokenizer"])
def guide(request: pytest.FixtureRequest, transformer_dir: str, guide_dir: str) -> SentenceTransformer:
    if request.param == "other tokenizer":
        return guide_of(guide_dir)
    return build(transformer_dir, dense(seed=5)).eval()


OPTIONS: dict[str, dict] = {
    "defaults": {},
    "absolute": {"temperature": 0.1, "margin": 0.05},
    "relative": {"temperature": 0.2, "margin_strategy": "relative", "margin": 0.1},
    "no anchors": {"temperature": 0.1, "contrast_anchors": False},
    "no positives": {"temperature": 0.1, "contrast_positives": False},
    "neither": {"temperature": 0.1, "contrast_anchors": False, "contrast_positives": False},
}


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("columns", [2, 3])
def test_gist_is_the_librarys(model, guide, columns, options) -> None:
    batch = features(model, 9, columns)
    theirs = library.GISTEmbedLoss(model, guide, **OPTIONS[options])
    expected = value_and_grads(theirs, model, batch, None, upstream=2.0)
    for extra in ({}, {"mini_batch_size": 4}, {"mini_batch_num_tokens": 25}, {"chunk_size": 2}):
        ours = losses.GISTEmbedLoss(model, guide, **OPTIONS[options], **EAGER, **extra)
        assert ours.must_retokenize is theirs.must_retokenize
        assert_same(value_and_grads(ours, model, batch, None, upstream=2.0), expected)


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("columns", [2, 4])
def test_cached_gist_is_the_librarys(model, guide, columns, options) -> None:
    batch = features(model, 9, columns)
    theirs = library.CachedGISTEmbedLoss(model, guide, mini_batch_size=4, **OPTIONS[options])
    if theirs.must_retokenize and not EXACT:
        pytest.skip("the library's own fails here before 6.2")
    expected = value_and_grads(theirs, model, batch, None, upstream=0.5)
    for size in (2, 32):
        ours = losses.CachedGISTEmbedLoss(model, guide, mini_batch_size=size, **OPTIONS[options], **EAGER)
        assert_same(value_and_grads(ours, model, batch, None, upstream=0.5), expected)


def test_the_guide_decides(model, guide) -> None:
    """Were its masks lost on the way, the comparisons above would not notice a batch without any."""
    batch = features(model, 9, 3)
    values = {
        margin: losses.GISTEmbedLoss(model, guide, 0.1, margin=margin, **EAGER)(batch, None).item()
        for margin in (-3.0, 0.0, 3.0)
    }
    assert values[-3.0] > values[0.0] > values[3.0] == 0.0


def test_the_guide_is_embedded_once_and_in_mini_batches(model, guide) -> None:
    seen: list[tuple[int, bool]] = []

    def record(module: nn.Module, inputs: tuple, output: dict) -> None:
        seen.append((len(output["sentence_embedding"]), output["sentence_embedding"].requires_grad))

    with_hook = guide[-1].register_forward_hook(record)
    losses.CachedGISTEmbedLoss(model, guide, mini_batch_size=4, **EAGER)(features(model, 10, 2), None).backward()
    assert seen == [(4, False), (4, False), (2, False)] * 2
    seen.clear()
    losses.GISTEmbedLoss(model, guide, **EAGER)(features(model, 10, 2), None).backward()
    assert sum(rows for rows, _ in seen) == 20 and not any(grad for _, grad in seen)
    with_hook.remove()


@pytest.mark.parametrize("name", ["GISTEmbedLoss", "CachedGISTEmbedLoss"])
def test_classes_configs_and_refusals(name, model, guide, guide_dir) -> None:
    ours, theirs = getattr(losses, name)(model, guide), getattr(library, name)(model, guide)
    assert isinstance(ours, type(theirs)) and "solatorio2024gistembed" in ours.citation
    assert ours.get_config_dict() == theirs.get_config_dict()
    assert ours.uses_gradient_cache is (name == "CachedGISTEmbedLoss")
    changed = getattr(losses, name)(
        model, guide, margin=0.2, mini_batch_size=7, chunk_size=3, gather_across_devices=True
    )
    assert changed.get_config_dict() == {
        **ours.get_config_dict(), "margin": 0.2, "mini_batch_size": 7, "chunk_size": 3, "gather_across_devices": True,
    }  # fmt: skip
    for options, message in (
        ({"margin_strategy": "both"}, "margin_strategy"),
        ({"mini_batch_size": 0}, "positive int"),
    ):
        with pytest.raises(ValueError, match=message):
            getattr(losses, name)(model, guide, **options)
    with pytest.raises(TypeError, match="batch_size"):
        getattr(losses, name)(model, guide, batch_size=3)
    with pytest.raises(ValueError, match="PreTrainedTokenizer"):
        getattr(losses, name)(model, static_model())


def test_nothing_is_fused(model, guide) -> None:
    with pytest.raises(ValueError, match="fuse_projection"):
        losses.GISTEmbedLoss(model, guide, fuse_projection=True)(features(model, 3, 2), None)


def test_embeddings_need_the_guides() -> None:
    parts = build_nothing()
    sides, guides = embeddings(7, 3), embeddings(7, 3, width=4, seed=1)
    value = parts.compute_loss_from_embeddings(sides, guides)
    split = parts.calculate_loss([list(side.split(3)) for side in sides], [list(g.split(2)) for g in guides])
    torch.testing.assert_close(value, split, rtol=1e-12, atol=0)
    for given, got in ((None, "NoneType"), (torch.ones(7), "Tensor"), (guides[:2], "2 of them")):
        with pytest.raises(ValueError, match=rf"guide's embeddings.*got {got}"):
            parts.compute_loss_from_embeddings(sides, given)
    with pytest.raises(ValueError, match="got 1 columns"):
        parts.compute_loss_from_embeddings(sides[:1], guides[:1])


def build_nothing() -> losses.GISTEmbedLoss:
    """A loss whose models are never asked."""
    loss = losses.GISTEmbedLoss.__new__(losses.GISTEmbedLoss)
    nn.Module.__init__(loss)
    vars(loss).update(
        temperature=0.1, margin_strategy="absolute", margin=0.0, contrast_anchors=True, contrast_positives=True
    )
    loss.similarity_fct, loss.cross_entropy_loss = nn.CosineSimilarity(dim=-1), nn.CrossEntropyLoss()
    loss._set_options(compiled=False)
    return loss


@pytest.mark.parametrize("options", [{}, {"mini_batch_size": 4}], ids=str)
def test_no_grad(model, guide, options) -> None:
    batch = features(model, 9, 3)
    with torch.no_grad():
        expected = library.GISTEmbedLoss(model, guide)([dict(column) for column in batch], None)
        value = losses.GISTEmbedLoss(model, guide, **EAGER, **options)(batch, None)
    assert not value.requires_grad
    torch.testing.assert_close(value, expected)


def test_under_the_librarys_matryoshka(model, guide) -> None:
    batch = features(model, 9, 3)
    expected = matryoshka_values(library.MatryoshkaLoss, model, library.GISTEmbedLoss(model, guide, 0.1), batch)
    uncached = losses.GISTEmbedLoss(model, guide, 0.1, **EAGER)
    assert_same(matryoshka_values(library.MatryoshkaLoss, model, uncached, batch), expected)
    cached = losses.CachedGISTEmbedLoss(model, guide, 0.1, mini_batch_size=4, **EAGER)
    assert_same(matryoshka_values(library.MatryoshkaLoss, model, cached, batch), expected)


@pytest.mark.parametrize("mini_batches", [4, None])
def test_under_our_matryoshka(model, guide, mini_batches) -> None:
    batch = features(model, 9, 3)
    expected = matryoshka_values(library.MatryoshkaLoss, model, library.GISTEmbedLoss(model, guide, 0.1), batch)
    ours = losses.GISTEmbedLoss(model, guide, 0.1, mini_batch_size=mini_batches, **EAGER)
    assert_same(matryoshka_values(losses.MatryoshkaLoss, model, ours, batch), expected)


def matryoshka_values(kind: type, model: nn.Module, loss: nn.Module, batch: list) -> tuple[Tensor, dict]:
    return value_and_grads(kind(model, loss, [OUT, 6, 3], [1.0, 0.5, 2.0]), model, batch, None)


# --- the sigmoid pair loss -------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """The formula, with the same parameters."""

    def __init__(self, model: nn.Module, scale: float, bias: float, similarity=util.cos_sim) -> None:
        super().__init__()
        self.model, self.similarity = model, similarity
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale), dtype=torch.float32))
        self.bias = nn.Parameter(torch.tensor(bias, dtype=torch.float32))

    def forward(self, batch: list[dict[str, Tensor]], labels: Tensor | None) -> Tensor:
        a, b = (self.model(column)["sentence_embedding"] for column in batch)
        y = 2 * torch.eye(len(a), dtype=a.dtype) - 1
        return -F.logsigmoid(y * (self.log_scale.exp() * self.similarity(a, b) + self.bias)).sum(1).mean()


def manhattan(a: Tensor, b: Tensor) -> Tensor:
    return -torch.cdist(a, b, p=1)


def everything(loss: nn.Module, model: nn.Module, batch: list, upstreams: tuple = (1.0,)) -> tuple[Tensor, dict]:
    """The sum over the steps of an accumulation, the loss's own parameters included."""
    loss.zero_grad()
    value = torch.zeros((), dtype=torch.float64)
    for upstream in upstreams:
        part = upstream * loss([dict(column) for column in batch], None)
        part.backward()
        value = value + part.detach()
    return value, {name: p.grad.clone() for name, p in loss.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("similarity", [util.cos_sim, util.dot_score, manhattan])
@pytest.mark.parametrize("options", [{}, {"mini_batch_size": 4}, {"mini_batch_num_tokens": 25}], ids=str)
def test_sigmoid_is_the_formula(model, similarity, options) -> None:
    """Two accumulated steps, each scaled: what comes from above reaches the loss's own parameters, too."""
    batch = features(model, 9, 2)
    expected = everything(Plain(model, 4.0, -3.0, similarity).double(), model, batch, (0.5, 3.0))
    assert {"log_scale", "bias"} < expected[1].keys()
    ours = losses.SigmoidPairLoss(model, 4.0, -3.0, similarity_fct=similarity, **EAGER, **options).double()
    assert_same(everything(ours, model, batch, (0.5, 3.0)), expected)
    with torch.no_grad():
        torch.testing.assert_close(3.5 * ours(batch), expected[0])


@pytest.mark.parametrize("options", [{}, {"mini_batch_size": 4}], ids=str)
def test_sigmoid_that_learns_nothing(model, options) -> None:
    batch = features(model, 9, 2)
    _, grads = everything(losses.SigmoidPairLoss(model, learnable=False, **EAGER, **options), model, batch)
    assert not {"log_scale", "bias"} & grads.keys() and grads


@pytest.mark.parametrize("weights", [None, [1.0, 0.5, 2.0]], ids=["alike", "weighted"])
@pytest.mark.parametrize("kind", ["uncached", "cached inside", "cached outside"])
def test_sigmoid_under_our_matryoshka(model, kind, weights) -> None:
    batch, dims = features(model, 9, 2), ([OUT, 6, 3], weights)
    expected = everything(
        library.MatryoshkaLoss(model, Plain(model, 4.0, -3.0).double(), *dims), model, batch, (0.5, 3.0)
    )
    inside = {"mini_batch_size": 4} if kind == "cached inside" else {}
    outside = {"mini_batch_size": 4} if kind == "cached outside" else {}
    inner = losses.SigmoidPairLoss(model, 4.0, -3.0, **EAGER, **inside)
    ours = losses.MatryoshkaLoss(model, inner, *dims, **outside).double()
    assert_same(everything(ours, model, batch, (0.5, 3.0)), expected)


def test_sigmoid_config_and_refusals(model) -> None:
    assert losses.SigmoidPairLoss(model).get_config_dict() == {
        "scale": 10.0, "bias": -10.0, "learnable": True, "similarity_fct": "cos_sim",
    }  # fmt: skip
    loss = losses.SigmoidPairLoss(model, 5, learnable=False, similarity_fct=util.dot_score, mini_batch_size=8)
    json.dumps(loss.get_config_dict())
    assert loss.get_config_dict()["mini_batch_size"] == 8 and loss.uses_gradient_cache
    assert loss.scale == pytest.approx(5.0) and "zhai2023sigmoid" in loss.citation
    assert loss.log_scale.dtype == loss.bias.dtype == torch.float32
    for options in ({"scale": 0.0}, {"scale": float("inf")}, {"bias": float("nan")}, {"chunk_size": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            losses.SigmoidPairLoss(model, **options)
    with pytest.raises(TypeError, match="batch_size"):
        losses.SigmoidPairLoss(model, batch_size=3)
    with pytest.raises(ValueError, match="two columns of embeddings, got 3"):
        losses.SigmoidPairLoss(model).compute_loss_from_embeddings(embeddings(4, 3))
    with pytest.raises(ValueError, match=r"score for every pair, \(4, 4\), got \(4,\)"):
        losses.SigmoidPairLoss(model, similarity_fct=util.pairwise_cos_sim).compute_loss_from_embeddings(
            embeddings(4, 2)
        )


# --- the real trainer ------------------------------------------------------------------------------------------------

trains = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]


def train(model: SentenceTransformer, loss: nn.Module, columns: int, folder: Path) -> Iterator[float]:
    data = Dataset.from_dict({f"text_{i}": sentences(16, i) for i in range(columns)})
    args = SentenceTransformerTrainingArguments(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=5, gradient_accumulation_steps=2,
        learning_rate=1e-2, logging_steps=1, report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True,
        eval_strategy="steps", eval_steps=2, seed=0,
    )  # fmt: skip
    trainer = SentenceTransformerTrainer(model=model, args=args, train_dataset=data, eval_dataset=data, loss=loss)
    trainer.train()
    return [entry[key] for entry in trainer.state.log_history for key in ("loss", "eval_loss") if key in entry]


@pytest.mark.parametrize("options", [{}, {"mini_batch_size": 2}], ids=str)
class TestTrainer:
    pytestmark = trains

    def test_gist_trains_like_the_librarys(self, options, transformer_dir, guide_dir, tmp_path) -> None:
        ends = {}
        for who, make in (
            ("ours", lambda m, g: losses.GISTEmbedLoss(m, g, 0.1, **EAGER, **options)),
            ("theirs", lambda m, g: library.GISTEmbedLoss(m, g, 0.1)),
        ):
            model, guide = build(transformer_dir, dense(), dtype=torch.float32), guide_of(guide_dir)
            before = {name: value.clone() for name, value in guide.state_dict().items()}
            ends[who] = train(model, make(model, guide.float()), 3, tmp_path / who), model
            assert all(torch.equal(value, before[name].float()) for name, value in guide.state_dict().items())
        assert ends["ours"][0] == pytest.approx(ends["theirs"][0], rel=1e-3, abs=1e-4)

    def test_the_sigmoids_parameters_move(self, options, transformer_dir, tmp_path) -> None:
        ends = []
        for who, make in (
            ("ours", lambda m: losses.SigmoidPairLoss(m, 4.0, -3.0, **EAGER, **options)),
            ("formula", lambda m: Plain(m, 4.0, -3.0)),
        ):
            model = build(transformer_dir, dense(), dtype=torch.float32)
            loss = make(model)
            history = train(model, loss, 2, tmp_path / who)
            assert abs(loss.bias.item() + 3.0) > 1e-3 and abs(loss.log_scale.item() - math.log(4.0)) > 1e-3
            ends.append([*history, loss.bias.item(), loss.log_scale.item()])
        assert ends[0] == pytest.approx(ends[1], rel=1e-4)
