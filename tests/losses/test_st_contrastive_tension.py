"""Contrastive tension with in-batch negatives against the library's own class."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from sentence_transformers import util
from sentence_transformers.sentence_transformer import losses as library
from sentence_transformers.sentence_transformer.modules import Normalize
from st_parts import assert_same, build, dense, features, sentences, static_model, train, value_and_grads
from st_shapes import Shapes
from torch import Tensor, nn

from chunked_embed import losses

Ours, Theirs = losses.ContrastiveTensionLossInBatchNegatives, library.ContrastiveTensionLossInBatchNegatives
ROWS = 9
MODES: dict[str, dict] = {
    "plain": {},
    "cached": {"mini_batch_size": 4},
    "tokens": {"mini_batch_num_tokens": 20},
    "chunked": {"chunk_size": 4},
}
every_mode = pytest.mark.parametrize("mode", MODES)


def lopsided(a: Tensor, b: Tensor) -> Tensor:
    """Of the user's own, and not the same the other way round."""
    return a[:, None].sub(b).abs().sum(-1).neg() + a.sum(1, keepdim=True)


def pair(model: nn.Module, *args, mode: str = "plain", kind: type = Ours) -> tuple[nn.Module, nn.Module]:
    """Ours and the library's, with the same two encoders, no longer alike."""
    ours = kind(model, *args, compiled=False, **MODES[mode])
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in ours.model1.parameters():
            parameter += 0.03 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    theirs = Theirs(model, *args)
    theirs.load_state_dict(ours.state_dict())  # the same keys
    return ours, theirs


def assert_equal(ours: nn.Module, theirs: nn.Module, batch: list, **tolerance: float) -> None:
    results = [value_and_grads(loss, loss, batch, None, upstream=2.0) for loss in (ours, theirs)]
    assert any(name.startswith("model1.") for name in results[0][1])
    assert_same(*results, **tolerance)


@every_mode
@pytest.mark.parametrize("similarity", [util.cos_sim, util.dot_score, lopsided], ids=lambda f: f.__name__)
def test_equals_the_library(similarity: Callable, mode: str, transformer_dir: str) -> None:
    model = build(transformer_dir, dense(), Normalize())
    ours, theirs = pair(model, 7.0, similarity, mode=mode)
    assert_equal(ours, theirs, features(model, ROWS, 1))
    assert ours.logit_scale.grad


@pytest.mark.parametrize("mode", ["plain", "cached"])
def test_static_embedding(mode: str) -> None:
    model = static_model()
    assert_equal(*pair(model, mode=mode), features(model, ROWS, 1))


@pytest.mark.parametrize("size", [ROWS, 4])
def test_dropout_is_reproduced(size: int, transformer_dir: str) -> None:
    """The masks of a loop over mini-batches; those of one mini-batch are the library's own."""
    model = build(transformer_dir, dense(), dropout=True)
    ours, theirs = pair(model)
    ours.mini_batch_size, ours.uses_gradient_cache = size, True
    batch = features(model, ROWS, 1)

    def looped(columns: list, labels: None) -> Tensor:
        if size == ROWS:
            return theirs(columns, labels)
        parts = [slice(i, i + size) for i in range(0, ROWS, size)]
        a, b = (torch.cat([m(rows(columns[0], p))["sentence_embedding"] for p in parts]) for m in encoders)
        fixed = copy.copy(theirs)
        fixed._modules = {**theirs._modules, "model1": Given(a), "model2": Given(b)}
        return fixed(columns, labels)

    encoders = (theirs.model1, theirs.model2)
    results = []
    for loss, forward in ((ours, ours), (theirs, looped)):
        torch.manual_seed(3)
        results.append(value_and_grads(forward, loss, batch, None))
    assert_same(*results)


def rows(column: dict, part: slice) -> dict:
    width = int(column["attention_mask"][part].sum(1).max())
    return {name: v[part, :width] if isinstance(v, Tensor) else v for name, v in column.items()}


class Given(nn.Module):
    def __init__(self, embeddings: Tensor) -> None:
        super().__init__()
        self.embeddings = embeddings

    def forward(self, features: dict) -> dict:
        return {"sentence_embedding": self.embeddings}


def test_the_first_column_alone(transformer_dir: str) -> None:
    model = build(transformer_dir)
    for mode in ("plain", "cached"):
        ours, theirs = pair(model, mode=mode)
        assert_equal(ours, theirs, features(model, ROWS, 2))
        value = ours(features(model, ROWS, 1))  # and no labels
        torch.testing.assert_close(ours(features(model, ROWS, 1), torch.arange(ROWS)), value)


def replaced_encoder(loss: nn.Module) -> None:
    loss.model1 = copy.deepcopy(loss.model2).requires_grad_(False)


class Weighted(nn.CrossEntropyLoss):
    def forward(self, scores: Tensor, target: Tensor) -> Tensor:
        return 1.5 * super().forward(scores, target)


SET_LATER: dict[str, Callable[[nn.Module], object]] = {
    "similarity_fct": lambda loss: setattr(loss, "similarity_fct", lopsided),
    "dot": lambda loss: setattr(loss, "similarity_fct", util.dot_score),
    "smoothing": lambda loss: setattr(loss, "cross_entropy_loss", nn.CrossEntropyLoss(label_smoothing=0.1)),
    "smoothing of the same": lambda loss: setattr(loss.cross_entropy_loss, "label_smoothing", 0.1),
    "sum": lambda loss: setattr(loss, "cross_entropy_loss", nn.CrossEntropyLoss(reduction="sum")),
    "ignored row": lambda loss: setattr(loss, "cross_entropy_loss", nn.CrossEntropyLoss(ignore_index=2)),
    "weights": lambda loss: setattr(
        loss, "cross_entropy_loss", nn.CrossEntropyLoss(torch.linspace(0.5, 2, ROWS, dtype=torch.float64))
    ),
    "own class": lambda loss: setattr(loss, "cross_entropy_loss", Weighted()),
    "hook": lambda loss: loss.cross_entropy_loss.register_forward_hook(lambda module, args, output: 3 * output),
    "logit_scale": lambda loss: loss.logit_scale.data.fill_(1.5),
    "double logit_scale": lambda loss: setattr(loss, "logit_scale", nn.Parameter(torch.tensor(0.3).double())),
    "fixed logit_scale": lambda loss: loss.logit_scale.requires_grad_(False),
    "frozen model2": lambda loss: loss.model2.requires_grad_(False),
    "model1": replaced_encoder,
}


@pytest.mark.parametrize("mode", ["plain", "cached"])
@pytest.mark.parametrize("change", SET_LATER)
def test_what_is_set_later_counts(change: str, mode: str, transformer_dir: str) -> None:
    model = build(transformer_dir)
    losses_ = pair(model, mode=mode)
    batch = features(model, ROWS, 1)
    losses_[0](batch)  # and nothing is left of a call before
    model2 = copy.deepcopy(losses_[0].model2)
    for loss, own in zip(losses_, (model2, copy.deepcopy(model2))):
        loss.model2 = own
        SET_LATER[change](loss)
    results = [value_and_grads(loss, loss, batch, None) for loss in losses_]
    assert_same(*results)


def test_subclasses_keep_their_effect(transformer_dir: str) -> None:
    class Doubled(Ours):
        def forward(self, sentence_features: list, labels: Tensor | None = None) -> Tensor:
            return 2 * super().forward(sentence_features, labels)

    class Cut(Ours):
        def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None = None) -> Tensor:
            return super().compute_loss_from_embeddings([embedding[:, :4] for embedding in embeddings], labels)

    model = build(transformer_dir)
    batch = features(model, ROWS, 1)
    ours, theirs = pair(model, kind=Doubled)
    value, grads = value_and_grads(theirs, theirs, batch, None, upstream=2.0)
    assert_same(value_and_grads(ours, ours, batch, None), (2 * value, grads))
    ours, theirs = pair(model, kind=Cut)
    theirs.similarity_fct = lambda a, b: util.cos_sim(a[:, :4], b[:, :4])
    assert_equal(ours, theirs, batch)


def test_compute_loss_from_embeddings() -> None:
    a, b = (torch.randn(ROWS, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    ours = Ours(nn.Identity(), compiled=False)
    value = ours.compute_loss_from_embeddings([a, b])
    theirs = Theirs(nn.Identity())
    theirs.model1, theirs.model2 = Given(a), Given(b)
    torch.testing.assert_close(value, theirs([{}], None))
    torch.testing.assert_close(torch.autograd.grad(value, [a, b]), torch.autograd.grad(theirs([{}], None), [a, b]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # raised inside inductor
def test_compiled(transformer_dir: str) -> None:
    model = build(transformer_dir)
    ours, theirs = pair(model)
    ours.compiled = True
    assert_equal(ours, theirs, features(model, ROWS, 1))


@every_mode
def test_no_grad(mode: str, transformer_dir: str) -> None:
    model = build(transformer_dir)
    ours, theirs = pair(model, mode=mode)
    batch = features(model, ROWS, 1)
    with torch.no_grad():
        value = ours(batch)
        torch.testing.assert_close(value, theirs(batch, None))
    assert not value.requires_grad


@pytest.mark.parametrize("mode", ["plain", "cached"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_a_float32_loss(dtype: torch.dtype, mode: str, transformer_dir: str) -> None:
    model = build(transformer_dir, dtype=dtype)
    ours, _ = pair(model, mode=mode)
    batch = features(model, 64, 1)
    value, grads = value_and_grads(ours, ours, batch, None)
    with torch.no_grad():
        embeddings = [m(dict(batch[0]))["sentence_embedding"] for m in (ours.model1, ours.model2)]
    wide = Theirs(nn.Identity())
    wide.model1, wide.model2 = (Given(embedding.double()) for embedding in embeddings)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), wide([{}], None).detach(), rtol=1e-5, atol=1e-6)
    assert all(grad.dtype == dtype and grad.isfinite().all() for name, grad in grads.items() if "model" in name)


def test_config_and_class(transformer_dir: str) -> None:
    model = build(transformer_dir)
    ours, theirs = Ours(model, 7.0, util.dot_score), Theirs(model, 7.0, util.dot_score)
    assert isinstance(ours, Theirs) and ours.citation == theirs.citation
    assert ours.get_config_dict() == theirs.get_config_dict()
    json.dumps(ours.get_config_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    assert ours.model2 is model and ours.model1 is not model
    assert not hasattr(ours, "model")  # the trainer would put its wrapper there, and scripts read model2
    changed = Ours(model, mini_batch_size=4, chunk_size=8).get_config_dict()
    assert changed == {**Theirs(model).get_config_dict(), "mini_batch_size": 4, "chunk_size": 8}
    mine = list(inspect.signature(Ours).parameters.values())
    given = list(inspect.signature(Theirs).parameters.values())
    for one, other in zip(mine, given):
        assert (one.name, one.default, one.kind) == (other.name, other.default, other.kind)
    assert {p.kind for p in mine[len(given) :]} == {inspect.Parameter.KEYWORD_ONLY}


@pytest.mark.parametrize("mode", ["plain", "cached"])
def test_copies(mode: str, transformer_dir: str) -> None:
    model = build(transformer_dir)
    ours, _ = pair(model, mode=mode)
    batch = features(model, ROWS, 1)
    expected = value_and_grads(ours, ours, batch, None)
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert_same(value_and_grads(again, again, batch, None), expected)


def test_no_matrix_of_all_rows_is_made(transformer_dir: str) -> None:
    model = build(transformer_dir)
    rows = 37  # no other dimension's size
    widest = {}
    for mode in ("chunked", "cached", "library"):
        ours, theirs = pair(model, mode=mode if mode in MODES else "plain")
        loss = theirs if mode == "library" else ours
        ours.chunk_size = 16
        with Shapes() as shapes:
            loss(features(model, rows, 1), None).backward()
        widest[mode] = shapes.most_rows(rows)
    assert widest == {"chunked": 16, "cached": 16, "library": rows}


REFUSED: dict[str, tuple[Callable, type, str]] = {
    "no column": (lambda loss, model: loss([]), ValueError, "a column of texts, got none"),
    "one model": (lambda loss, model: loss.compute_loss_from_embeddings([torch.ones(2, 3)]), ValueError, "got 1"),
    "fuse": (lambda loss, model: Ours(model, fuse_projection=True)([{}]), ValueError, "fuse_projection"),
    "scale": (lambda loss, model: Ours(model, 0.0), ValueError, "scale"),
    "similarity": (lambda loss, model: Ours(model, 20.0, "cosine"), TypeError, "similarity_fct"),
    "option": (lambda loss, model: Ours(model, minibatch=4), TypeError, "minibatch"),
    "mini_batch_size": (lambda loss, model: Ours(model, mini_batch_size=0), ValueError, "mini_batch_size"),
    "matryoshka": (lambda loss, model: losses.MatryoshkaLoss(model, loss, [4]), ValueError, "model.s embeddings"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str, transformer_dir: str) -> None:
    call, error, message = REFUSED[case]
    model = build(transformer_dir)
    with pytest.raises(error, match=message):
        call(Ours(model, compiled=False), model)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
@pytest.mark.parametrize("mode", ["plain", "cached"])
def test_trains_like_the_library(mode: str, transformer_dir: str, tmp_path: Path) -> None:
    data = Dataset.from_dict({"sentence": sentences(16, 0)})
    ends = []
    for make in (lambda m: Ours(m, compiled=False, **MODES[mode]), Theirs):
        # Dropout is drawn as by the library where the batch is embedded at once.
        model = build(transformer_dir, dense(), dropout=mode == "plain", dtype=torch.float32)
        loss = make(model)
        trainer = train(model, loss, data, tmp_path, learning_rate=1e-2)
        history = [entry.get("loss", entry.get("eval_loss")) for entry in trainer.state.log_history]
        ends.append(([value for value in history if value is not None], loss.state_dict()))
    (ours, ours_state), (theirs, theirs_state) = ends
    assert len(ours) == 4 and ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)
    assert ours_state["logit_scale"] != torch.tensor(20.0).log()
    for name, value in theirs_state.items():
        torch.testing.assert_close(ours_state[name], value, rtol=1e-2, atol=2e-3)
