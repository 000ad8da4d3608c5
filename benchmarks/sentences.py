"""Sentence encoders and sentences for the benchmarks of training: MiniLM or a small one, and docstrings."""

import random
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import docstrings
from common import load_model

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
Function = docstrings.Function
Columns = dict[str, list[Any]]


# --- models ---


def encoder(name: str, texts: Sequence[str], device: torch.device, max_seq_length: int = 64) -> SentenceTransformer:
    """A folder's or the hub's in float32, whatever it was saved in; without a name, a small one for these texts."""
    model = load_model(name, max_seq_length) if name else small_encoder(texts)
    return model.float().to(device)


def small_encoder(texts: Sequence[str], width: int = 32) -> SentenceTransformer:
    """MiniLM's shape in small, untrained: BERT with its dropout, the mean of the tokens, unit length."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    usual = [word for word, _ in Counter(word for text in texts for word in re.findall(r"\w+", text)).most_common(5000)]
    made = Tokenizer(models.WordLevel({word: n for n, word in enumerate([*special.values(), *usual])}, "[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    config = BertConfig(
        vocab_size=made.get_vocab_size(),
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=4 * width,
        max_position_embeddings=64,
    )
    with tempfile.TemporaryDirectory() as folder:
        PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)
        BertModel(config).save_pretrained(folder)
        return SentenceTransformer(modules=[Transformer(folder), Pooling(width), Normalize()], device="cpu")


# --- sentences ---


def collect(wanted: int) -> list[Function]:
    """As many functions of installed packages, or all that there are, in an order of no meaning.

    No two texts have the same words, in lower case: of such a pair a guide's comparisons are ties.
    """
    kept: list[Function] = []
    seen: set[tuple[str, ...]] = set()
    for function in docstrings.collect(wanted * 11 // 10):
        found = {tuple(re.findall(r"\w+", text.lower())) for text in (function.name, function.summary)}
        if len(found) == 2 and not found & seen:
            kept.append(function)
            seen |= found
    return random.Random(0).sample(kept, len(kept))[:wanted]


def graded(functions: Sequence[Function]) -> Columns:
    return docstrings.graded_pairs(list(functions), 0)


def pairs(functions: Sequence[Function]) -> Columns:
    return docstrings.pairs(list(functions), 0)


def triplets(functions: Sequence[Function]) -> Columns:
    return docstrings.triplets(list(functions), 0)


def margins(functions: Sequence[Function]) -> Columns:
    """Triplets, and how much better the grade of the positive is."""
    rows: Columns = {"query": [], "positive": [], "negative": [], "label": []}
    for query, text, grade in zip(*graded(functions).values()):
        if grade == 1.0:
            positive = text
            continue
        for name, value in zip(rows, (query, positive, text, 1.0 - grade)):
            rows[name].append(value)
    return rows


def binary(functions: Sequence[Function]) -> Columns:
    """Graded pairs of one function, and of two packages."""
    kept = [row for row in zip(*graded(functions).values()) if row[2] != 0.5]
    return {
        "sentence1": [a for a, _, _ in kept],
        "sentence2": [b for _, b, _ in kept],
        "label": [int(c) for *_, c in kept],
    }


def classes(functions: Sequence[Function]) -> Columns:
    """Docstrings, and the package that each is from."""
    packages = {name: n for n, name in enumerate(dict.fromkeys(function.package for function in functions))}
    return {"sentence": [f.summary for f in functions], "label": [packages[f.package] for f in functions]}


DATA: dict[str, Callable[[Sequence[Function]], Columns]] = {
    made.__name__: made for made in (pairs, graded, binary, triplets, margins, classes)
}
