"""Writes pylate.json: losses of PyLate, of its own ColBERT model, and their gradients, in float64 on a CPU.

Needs an environment of its own, with PyLate and what it pins, and nothing of this package:

    python -m venv env && env/bin/pip install pylate==1.6.0 && env/bin/python tests/data/dump_pylate.py

The model is a BERT of random weights over a dozen words, one for each of `INPUTS`. The file holds

* ``inputs``: by name, ``tokens``, what the model gives for each column of texts before normalization (queries first,
  then the positives, then the negatives), and ``masks``, the tokens that count in the losses (null for queries that the
  model expands: all count); ``zeros`` is how many maxima over a document's tokens are the zero of a masked one;
* ``scores``: of scoring functions, from normalized tokens;
* ``cases``: loss class, its options, the inputs' name, the value, and the gradients with respect to ``tokens``.

Scores and gradients are given to twelve digits.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from pylate import losses, models, scores, utils
from pylate.losses.contrastive import extract_skiplist_mask
from transformers import BertConfig, BertModel, BertTokenizerFast

FILE = Path(__file__).with_name("pylate.json")
WIDTH = 4  # of a token's embedding
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [*SPECIAL, "red", "green", "blue", "old", "small", "large", "cat", "dog", "bird", "river", "house", ".", ","]

# Seed of the model and the texts, their number, documents of each, longest query and document, and ColBERT's options
INPUTS = {
    "pairs": (25, 4, 1, 5, 6, {"do_query_expansion": False}),
    "expanded pairs": (2, 5, 1, 6, 5, {}),
    "attended expansions": (13, 3, 1, 6, 6, {"attend_to_expansion_tokens": True}),
    "triplets": (30, 3, 2, 5, 7, {"do_query_expansion": False}),
    "two negatives": (5, 3, 3, 5, 6, {"do_query_expansion": False, "skiplist_words": [".", ",", "[SEP]", "[CLS]"]}),
    "one query": (6, 1, 2, 5, 6, {}),
    "short documents": (7, 3, 2, 6, 4, {}),
}
CONTRASTIVE = {
    "pairs": [{}, {"temperature": 0.05}, {"temperature": 2.0, "size_average": False}],
    "expanded pairs": [{}, {"temperature": 0.1}],
    "attended expansions": [{}],
    "triplets": [{}, {"temperature": 0.2}],
    "two negatives": [{}, {"temperature": 0.5}],
    "one query": [{}],
    "short documents": [{"temperature": 0.1}],
}
CACHED = {
    "pairs": [{"mini_batch_size": 3}, {"mini_batch_size": 3, "score_mini_batch_size": 1, "temperature": 0.05}],
    "expanded pairs": [{"mini_batch_size": 2, "score_mini_batch_size": 3}],
    "triplets": [{"mini_batch_size": 2, "size_average": False}],
    "two negatives": [{"mini_batch_size": 2, "temperature": 0.5}],
}
DISTILLATION = {  # the columns of documents are the ways
    "triplets": [{"normalize_scores": False}],
    "two negatives": [{}, {"normalize_scores": False, "size_average": False}],
}
RETRIEVED = 8  # XTR's k


def make_model(folder: str, seed: int, query_length: int, document_length: int, options: dict) -> models.ColBERT:
    Path(folder, "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(vocab=str(Path(folder, "vocab.txt"))).save_pretrained(folder)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=16,
        initializer_range=1.0,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertModel(config).save_pretrained(folder)
    options = {"skiplist_words": [".", ","], **options}
    lengths = {"query_length": query_length, "document_length": document_length}
    return models.ColBERT(folder, device="cpu", embedding_size=WIDTH, **lengths, **options).double()


def make_features(model: models.ColBERT, seed: int, size: int, documents: int) -> list[dict[str, torch.Tensor]]:
    """The columns as PyLate's collator pads them: a text of the longest length, one of a word, the rest in between."""
    draw = torch.Generator().manual_seed(seed)

    def text(length: int) -> str:
        words = torch.randint(len(SPECIAL), len(WORDS), (length,), generator=draw)
        return " ".join(WORDS[word] for word in words)

    columns = ["query", "positive", *(f"negative_{number}" for number in range(1, documents))]
    lengths = torch.randint(1, 5, (size, len(columns)), generator=draw)
    lengths[0], lengths[-1] = 4, 1
    rows = [{column: text(int(n)) for column, n in zip(columns, row)} for row in lengths]
    batch = utils.ColBERTCollator(tokenize_fn=model.tokenize)(rows)
    keys = ("input_ids", "attention_mask", "token_type_ids")
    return [{key: batch[f"{column}_{key}"] for key in keys} for column in columns]


class Recorder:
    """What a model gives with gradients, call by call."""

    def __init__(self, model: models.ColBERT) -> None:
        self.calls: list[torch.Tensor] = []
        self.handle = model.register_forward_hook(self.keep)

    def keep(self, module, args, output) -> None:
        if torch.is_grad_enabled():
            output["token_embeddings"].retain_grad()
            self.calls.append(output["token_embeddings"])

    def columns(self, size: int) -> list[list]:
        """The gradients of (size, length, width) columns, of calls that may be parts of one."""
        self.handle.remove()
        columns, parts = [], []
        for call in self.calls:
            parts.append(call.grad)
            if sum(map(len, parts)) == size:
                columns.append(torch.cat(parts))
                parts = []
        assert not parts
        return columns


def digits(column: torch.Tensor) -> list:
    """Twelve digits of each number, nested as the tensor is."""
    return json.loads(json.dumps(column.tolist()), parse_float=lambda number: float(f"{float(number):.12g}"))


def run(model: models.ColBERT, loss: torch.nn.Module, features: list[dict], labels=None) -> tuple[float, Recorder]:
    recorder = Recorder(model)
    value = loss([dict(feature) for feature in features], labels)  # the model writes into what it is given
    value.backward()
    return value.item(), recorder


def dump() -> dict:
    inputs, cases, tables = {}, [], []
    for name, (seed, size, documents, query_length, document_length, options) in INPUTS.items():
        with tempfile.TemporaryDirectory() as folder:
            model = make_model(folder, seed, query_length, document_length, options)
        features = make_features(model, seed, size, documents)
        masks = extract_skiplist_mask(features, model.skiplist)
        with torch.no_grad():
            tokens = [model(dict(feature))["token_embeddings"] for feature in features]
        query_mask = None if model.do_query_expansion else masks[0]

        queries, *rest = (F.normalize(column, dim=-1) for column in tokens)
        stacked, stacked_mask = torch.stack(rest, 1), torch.stack(masks[1:], 1)
        given = {"queries_mask": query_mask, "documents_mask": stacked_mask}
        tables += [
            {"inputs": name, "function": "ColBERTScores", "options": {}, "scores": scores.ColBERTScores()},
            {"inputs": name, "function": "colbert_kd_scores", "options": {}, "scores": scores.colbert_kd_scores},
        ]
        if name in ("pairs", "triplets"):
            made = scores.XTRScores(k=RETRIEVED)
            tables.append({"inputs": name, "function": "XTRScores", "options": {"k": RETRIEVED}, "scores": made})
        for table in tables:
            if callable(table["scores"]):
                table["scores"] = digits(table["scores"](queries, stacked, **given))

        real = torch.einsum("qsd,bntd->qsbnt", queries, stacked).masked_fill(~stacked_mask, -torch.inf).amax(-1)
        won = (real < 0) & ~stacked_mask.all(-1)  # (Q, s, B, n)
        if query_mask is not None:
            won &= query_mask[:, :, None, None]
        inputs[name] = {
            "tokens": [column.tolist() for column in tokens],
            "masks": [None if mask is None else mask.int().tolist() for mask in (query_mask, *masks[1:])],
            "zeros": int(won.sum()),
        }

        for table, kind in ((CONTRASTIVE, losses.Contrastive), (CACHED, losses.CachedContrastive)):
            for settings in table.get(name, ()):
                value, recorder = run(model, kind(model, **settings), features)
                gradients = [digits(column) for column in recorder.columns(size)]
                case = {"loss": kind.__name__, "inputs": name, "options": settings}
                cases.append({**case, "value": value, "gradients": gradients})
        for settings in DISTILLATION.get(name, ()):
            teacher = torch.randn(size, documents, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            ways = {key: torch.stack([f[key] for f in features[1:]], 1).flatten(0, 1) for key in features[0]}
            value, recorder = run(model, losses.Distillation(model, **settings), [features[0], ways], teacher)
            queries, ways = (call.grad for call in recorder.calls)
            recorder.handle.remove()
            gradients = [queries, *ways.unflatten(0, (size, documents)).unbind(1)]
            case = {"loss": "Distillation", "inputs": name, "options": settings, "teacher": teacher.tolist()}
            cases.append({**case, "value": value, "gradients": [digits(column) for column in gradients]})

    packages = ("pylate", "sentence-transformers", "transformers", "torch")
    versions = {"python": platform.python_version(), **{package: version(package) for package in packages}}
    return {"versions": versions, "inputs": inputs, "scores": tables, "cases": cases}


def lines(entries: dict | list) -> str:
    """JSON with a line for each entry."""
    if isinstance(entries, dict):
        return "{" + ",".join(f"\n{json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items()) + "\n}"
    return "[" + ",".join(f"\n{json.dumps(entry)}" for entry in entries) + "\n]"


if __name__ == "__main__":
    torch.set_num_threads(1)
    made = dump()
    FILE.write_text("{" + ",".join(f"\n{json.dumps(name)}: {lines(part)}" for name, part in made.items()) + "\n}\n")
    for name, entry in made["inputs"].items():
        print(f"{name}: {entry['zeros']} maxima are a masked token's zero", file=sys.stderr)
