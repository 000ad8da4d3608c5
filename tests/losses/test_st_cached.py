"""Gradient caching: the numbers of the whole batch, in the encoder's memory of a mini-batch."""

from __future__ import annotations

import pytest
import torch
from sentence_transformers.sentence_transformer import losses as library
from sentence_transformers.sentence_transformer.modules import Normalize
from st_parts import assert_same, build, dense, features, labels_for, static_model, value_and_grads
from torch import nn

from chunked_embed import losses

COLUMNS = {"CoSENTLoss": 2, "AnglELoss": 3, "TripletLoss": 3}


class Rows(nn.Module):
    """Records how many rows each forward pass embeds, and whether with a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, bool]] = []

    def forward(self, features: dict) -> dict:
        embedding = features["sentence_embedding"]
        self.seen.append((len(embedding), embedding.requires_grad))
        return features


def labels_of(name: str, rows: int) -> torch.Tensor | None:
    return labels_for("tied", rows) if name == "CoSENTLoss" else None


@pytest.mark.parametrize("name", COLUMNS)
def test_dropout_is_reproduced(name: str, transformer_dir: str) -> None:
    """With mini-batches of one row, dropout draws the masks of a loop that embeds row by row."""
    model = build(transformer_dir, dense(), dropout=True)
    batch, labels = features(model, 4, COLUMNS[name]), labels_of(name, 4)
    torch.manual_seed(3)
    cached = value_and_grads(
        getattr(losses, name)(model, compiled=False, mini_batch_size=1), model, batch, labels, upstream=0.5
    )
    torch.manual_seed(3)
    model.zero_grad()
    rows = [[_row(column, i) for i in range(4)] for column in batch]
    embeddings = [torch.cat([model(row)["sentence_embedding"] for row in column]) for column in rows]
    value = getattr(library, name)(model).compute_loss_from_embeddings(embeddings, labels)
    (0.5 * value).backward()
    grads = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    assert_same(cached, (value.detach(), grads))


def _row(column: dict, i: int) -> dict:
    length = int(column["attention_mask"][i].sum())
    return {k: v[i : i + 1, :length] if isinstance(v, torch.Tensor) else v for k, v in column.items()}


def test_one_mini_batch_at_a_time(transformer_dir: str) -> None:
    watch = Rows()
    model = build(transformer_dir, watch)
    loss = losses.CoSENTLoss(model, compiled=False, mini_batch_size=4)
    assert loss.uses_gradient_cache
    value = loss(features(model, 10, 2), labels_for("random", 10))
    assert watch.seen == [(4, False), (4, False), (2, False)] * 2
    value.backward()
    assert watch.seen[6:] == [(4, True), (4, True), (2, True)] * 2
    watch.seen.clear()
    with torch.no_grad():
        loss(features(model, 10, 2), labels_for("random", 10))
    assert len(watch.seen) == 6


def test_token_budget(transformer_dir: str) -> None:
    model = build(transformer_dir, dense(), Normalize())
    batch, labels = features(model, 9, 2), labels_for("random", 9)
    loss = losses.CoSENTLoss(model, compiled=False, mini_batch_num_tokens=12)
    assert_same(
        value_and_grads(loss, model, batch, labels), value_and_grads(library.CoSENTLoss(model), model, batch, labels)
    )


def test_progress_bar(transformer_dir: str, capsys: pytest.CaptureFixture) -> None:
    model = build(transformer_dir)
    for shown in (False, True):
        loss = losses.TripletLoss(model, compiled=False, mini_batch_size=4, show_progress_bar=shown)
        loss(features(model, 6, 3), None).backward()
        assert ("Embed mini-batches" in capsys.readouterr().err) is shown


@pytest.mark.parametrize("options", [{"mini_batch_size": 4}, {"mini_batch_num_tokens": 20}, {}], ids=str)
@pytest.mark.parametrize("name", COLUMNS)
def test_static_embedding(name: str, options: dict) -> None:
    """The library's mixin would slice the token stream as if tokens were rows."""
    model = static_model()
    batch, labels = features(model, 9, COLUMNS[name]), labels_of(name, 9)
    ours = value_and_grads(getattr(losses, name)(model, compiled=False, **options), model, batch, labels, upstream=2.0)
    assert_same(ours, value_and_grads(getattr(library, name)(model), model, batch, labels, upstream=2.0))


def test_static_embedding_with_empty_and_single_token_rows() -> None:
    model = static_model()
    for texts in (["cat", "dog", "tree"], ["", "cat dog", ""]):
        batch, labels = [model.preprocess(texts), model.preprocess(texts[::-1])], labels_for("random", 3)
        ours = value_and_grads(losses.CoSENTLoss(model, compiled=False, mini_batch_size=2), model, batch, labels)
        assert_same(ours, value_and_grads(library.CoSENTLoss(model), model, batch, labels))


def test_unused_column_is_named(transformer_dir: str) -> None:
    model = build(transformer_dir)
    with pytest.raises(ValueError, match="column"):
        losses.CoSENTLoss(model, compiled=False, mini_batch_size=4)(features(model, 6, 3), labels_for("random", 6))
