"""The model card of a model trained with ours is the library's, line by line, but for the version that ours add."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerModelCardData,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.model_card import generate_model_card
from sentence_transformers.sentence_transformer import losses as library
from st_parts import HIDDEN, build, sentences
from torch import nn

from chunked_embed import __version__, losses
from chunked_embed.losses._card import sign_cards
from distill import KLDivLoss
from distill.sentence_transformers import EmbedDistillLoss

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore:The .*SymmetricRankingLoss is deprecated:DeprecationWarning"),
]

VERSION = {"chunked_embed": __version__}
DIMS = [HIDDEN, 6]
LOSSES = [
    name
    for name in library.__all__
    if isinstance(kind := getattr(library, name), type) and issubclass(kind, nn.Module)
    and getattr(losses, name, kind) is not kind
]  # fmt: skip


def arguments(name: str, source: Any, model: SentenceTransformer) -> tuple:
    if name in ("GISTEmbedLoss", "CachedGISTEmbedLoss"):
        return (build(model[0].auto_model.config._name_or_path),)  # a guide
    if name.startswith("Matryoshka"):
        return source.CoSENTLoss(model), DIMS
    return ()


# name: the loss, or losses, from ours or the library's module of losses and a model
WRAPPED: dict[str, Callable[[Any, SentenceTransformer], Any]] = {
    "a class": lambda source, model: source.CoSENTLoss,
    "Matryoshka around Cached": lambda source, model: source.MatryoshkaLoss(
        model, source.CachedMultipleNegativesRankingLoss(model), DIMS
    ),
    "Matryoshka around the library's": lambda source, model: source.MatryoshkaLoss(
        model, library.CoSENTLoss(model), DIMS
    ),
    "the library's Matryoshka": lambda source, model: library.MatryoshkaLoss(model, source.TripletLoss(model), DIMS),
    "the library's AdaptiveLayer": lambda source, model: library.AdaptiveLayerLoss(
        model, source.MultipleNegativesRankingLoss(model)
    ),
    "the library's Matryoshka2d": lambda source, model: library.Matryoshka2dLoss(
        model, source.MultipleNegativesRankingLoss(model), DIMS
    ),
    "a subclass": lambda source, model: type("Mine", (source.CoSENTLoss,), {"__module__": "training"})(model),
    "several": lambda source, model: {"pairs": source.CoSENTLoss(model), "words": source.AnglELoss(model)},
    "several, one of them the library's": lambda source, model: {
        "pairs": source.MultipleNegativesRankingLoss(model), "words": library.TripletLoss(model),
    },
}  # fmt: skip


def dataset(seed: int) -> Dataset:
    return Dataset.from_dict({"a": sentences(5, seed), "b": sentences(5, seed + 1)})


def card_of(folder: str, make: Callable[[SentenceTransformer], Any], output: Path) -> str:
    """The card of a model that is about to be trained with a loss, or with one for each of two datasets."""
    model = build(folder, dtype=torch.float32)
    loss = make(model)
    data = DatasetDict(pairs=dataset(0), words=dataset(2)) if isinstance(loss, dict) else dataset(0)
    args = SentenceTransformerTrainingArguments(output_dir=str(output), report_to="none", use_cpu=True)
    random.seed(0)  # of the examples on the card
    SentenceTransformerTrainer(model=model, args=args, train_dataset=data, loss=loss)
    return generate_model_card(model)


def parameters(card: str) -> list[dict[str, Any]]:
    """Those of each dataset's loss, in the card's order."""
    return [json.loads(block) for block in re.findall(r"```json\n(.*?)```", card, re.DOTALL)]


@pytest.mark.slow
@pytest.mark.parametrize("case", [*LOSSES, *WRAPPED])
def test_reads_as_the_librarys(
    case: str, transformer_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Ours cites the paper; the library forgets to.
    monkeypatch.setattr(library.CachedGISTEmbedLoss, "citation", library.GISTEmbedLoss.citation, raising=False)

    def make(source: Any) -> Callable[[SentenceTransformer], Any]:
        if case in WRAPPED:
            return lambda model: WRAPPED[case](source, model)
        return lambda model: getattr(source, case)(model, *arguments(case, source, model))

    ours, theirs = (card_of(transformer_dir, make(source), tmp_path) for source in (losses, library))
    assert "chunked_embed" not in theirs
    signed = [list(config.items())[-1:] == list(VERSION.items()) for config in parameters(ours)]
    assert signed == ([True, False] if "one of them" in case else [True] * len(parameters(theirs)))
    entry = re.compile(rf',\n *"chunked_embed": "{re.escape(__version__)}"')
    assert entry.sub("", ours).splitlines() == theirs.splitlines()


OURS_ALONE: dict[str, tuple[Callable[[SentenceTransformer], nn.Module], str]] = {
    "chunked_embed.losses.sigmoid.SigmoidPairLoss": (losses.SigmoidPairLoss, "zhai2023sigmoid"),
    "distill.sentence_transformers.EmbedDistillLoss": (EmbedDistillLoss, "fang2021seed"),
}


@pytest.mark.parametrize("name", OURS_ALONE)
def test_a_loss_that_the_library_lacks(name: str, transformer_dir: str, tmp_path: Path) -> None:
    kind, citation = OURS_ALONE[name]
    card = card_of(transformer_dir, kind, tmp_path)
    short = name.rpartition(".")[2]
    assert f"* Loss: <code>{name}</code> with these parameters:\n" in card
    assert f"- loss:{short}\n" in card and re.search(rf"#### {short}\n```bibtex\n@inproceedings{{{citation},", card)
    assert parameters(card)[0].items() >= VERSION.items()


@pytest.mark.parametrize(("loss", "tags"), [(None, []), ("kl", ["DistillLoss"]), (KLDivLoss(), ["KLDivLoss"])])
def test_tags_name_what_is_there(loss: Any, tags: list[str], transformer_dir: str, tmp_path: Path) -> None:
    card = card_of(transformer_dir, lambda model: EmbedDistillLoss(model, loss=loss, hidden="cosine"), tmp_path)
    assert re.findall(r"^- loss:(\w+)$", card, re.MULTILINE) == ["EmbedDistillLoss", *tags]


def test_options_stand_before_the_version(transformer_dir: str, tmp_path: Path) -> None:
    options = {"mini_batch_size": 4, "chunk_size": 8}
    card = card_of(transformer_dir, lambda model: losses.CoSENTLoss(model, **options), tmp_path)
    assert list(parameters(card)[0].items())[-3:] == list((options | VERSION).items())


class Sum(nn.Module):
    """A user's loss of two losses, without parameters to print."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)


def test_a_users_loss_of_ours(transformer_dir: str, tmp_path: Path) -> None:
    def card(source: Any) -> str:
        return card_of(transformer_dir, lambda m: Sum(source.CoSENTLoss(m), library.AnglELoss(m)), tmp_path)

    assert parameters(card(losses)) == [VERSION] and parameters(card(library)) == []


def test_cards_are_signed_once() -> None:
    signed = SentenceTransformerModelCardData.compute_dataset_metrics
    sign_cards()
    assert SentenceTransformerModelCardData.compute_dataset_metrics is signed
