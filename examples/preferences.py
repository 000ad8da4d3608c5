"""Preference pairs as a ``datasets.Dataset`` of prompt, chosen and rejected, or single completions with a verdict each
(prompt, completion, label), and a small model to train on them.

Nothing is downloaded unless you name a model or a dataset. A prompt is then what a function of an installed package is
called (see docstrings.py), and the completions are two ways to say what it does:

    style  chosen "Returns the ...", rejected "Return the ...", whichever of them the docstring has
    order  chosen as written, rejected with two neighbouring words swapped

Tokenizer and model are made on the spot. A short pre-training reads both completions of each pair alike, with no
verdict: it learns that most docstrings are in the imperative mood, which the pairs then ask it to give up.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import docstrings
import torch
from common import load_splits, one_line
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from chunked_embed import causal_lm

COLUMNS = ("prompt", "chosen", "rejected")
SIDES = ("chosen", "rejected", "completion")  # columns of completions
PAD, EOS = "<pad>", "<eos>"
VOCABULARY = 2000

# ---- pairs


def load_pairs(name: str, subset: str, rows: int, held_out: int, seed: int) -> tuple[Dataset, Dataset]:
    """(training, held out) of a file or a hub dataset, or of docstrings: a folder of code's, or where
    nothing is named.

    ``chosen`` and ``rejected`` may be texts after a ``prompt``, or conversations, whose prompt may be a column of its
    own.
    """
    if name and not docstrings.is_code(name):
        train, test = load_splits(name, subset, COLUMNS[1:], "preference training", held_out, seed, COLUMNS[:1])
        texts = isinstance(train[0]["chosen"], str)
        if texts and "prompt" not in train.column_names:
            raise ValueError(f"texts need a column prompt; {name} has none")
        if not texts and isinstance(train[0].get("prompt"), str):  # which the conversations begin with
            train, test = (split.remove_columns("prompt") for split in (train, test))
    else:
        functions = docstrings.collect(round(1.25 * (rows + held_out)), per_package=1000, folder=name)
        verbs = third_persons(functions)
        train = docstring_pairs([f for f in functions if not docstrings.is_held_out(f)], verbs, seed)
        test = docstring_pairs([f for f in functions if docstrings.is_held_out(f)], verbs, seed)
    return train.select(range(min(rows, len(train)))), test.select(range(min(held_out, len(test))))


def docstring_pairs(functions: Sequence[docstrings.Function], verbs: dict[str, str], seed: int) -> Dataset:
    """One pair a function. Every second one that begins with a verb is about style, the others about order."""
    rng = random.Random(seed)
    imperatives = {third: verb for verb, third in verbs.items()}
    rows = []
    for n, function in enumerate(rng.sample(functions, len(functions))):
        first, *rest = words = function.summary.split()
        swappable = [k for k in range(len(words) - 1) if words[k].lower() != words[k + 1].lower()]
        if first in verbs.keys() | imperatives.keys() and (n % 2 or not swappable):
            kind = "style"
            chosen, rejected = [verbs.get(first, first), *rest], [imperatives.get(first, first), *rest]
        elif swappable:
            kind, k = "order", rng.choice(swappable)
            chosen, rejected = words, [*words[:k], words[k + 1], words[k], *words[k + 2 :]]
        else:
            continue
        texts = (f"{function.name}:", " " + " ".join(chosen), " " + " ".join(rejected))
        rows.append({**dict(zip(COLUMNS, texts)), "kind": kind})
    return Dataset.from_list(rows)


def third_persons(functions: Iterable[docstrings.Function]) -> dict[str, str]:
    """{"Return": "Returns", "Copy": "Copies", ...}: words that begin docstrings in both forms."""
    firsts = {function.summary.split()[0] for function in functions}
    forms = {word: (word + "s", word + "es", word[:-1] + "ies") for word in sorted(firsts)}
    return {word: next(f for f in thirds if f in firsts) for word, thirds in forms.items() if firsts & set(thirds)}


# ---- single completions


def load_verdicts(
    name: str, subset: str, rows: int, held_out: int, desirable: float, seed: int
) -> tuple[Dataset, Dataset]:
    """(training, held out): ``completion`` and ``label`` (whether it is desirable), ``prompt`` where it is no part of
    them, and ``group``, a number that rows with the same prompt share.

    A file or a hub dataset has ``prompt``, ``completion`` and ``label``, texts or conversations, or it has pairs: of
    those one completion each is for training, a desirable one with probability ``desirable``, and both are held out.
    """
    if name and not docstrings.is_code(name):
        columns = ("prompt", "completion", "label", *SIDES[:2])
        train, test = load_splits(name, subset, (), "training on verdicts", held_out, seed, columns)
        if {"completion", "label"} <= {*train.column_names}:
            splits = [
                split.shuffle(seed).select(range(min(n, len(split)))) for split, n in ((train, rows), (test, held_out))
            ]
            made = [[{**row, "label": bool(row["label"])} for row in split] for split in splits]
            return with_groups(made[0]), with_groups(made[1])
        if not {*SIDES[:2]} <= {*train.column_names}:
            raise ValueError(
                f"verdicts need the columns completion and label, or chosen and rejected; {name} has neither"
            )
    rng = random.Random(seed)
    pairs = load_pairs(name, subset, rows, held_out, seed)
    one, both = [], []
    for row in pairs[0]:
        one += with_verdicts(row, [rng.random() < desirable])
    for row in pairs[1]:
        both += with_verdicts(row, [True, False])
    return with_groups(rng.sample(one, len(one))), with_groups(both)


def with_verdicts(pair: dict[str, Any], labels: Iterable[bool]) -> list[dict[str, Any]]:
    rest = {name: value for name, value in pair.items() if name not in SIDES}
    return [{**rest, "completion": pair["chosen" if label else "rejected"], "label": label} for label in labels]


def with_groups(rows: list[dict[str, Any]]) -> Dataset:
    groups: dict[str, int] = {}
    for row in rows:
        before = [] if isinstance(row["completion"], str) else row["completion"][:-1]  # a whole conversation
        row["group"] = groups.setdefault(repr((row.get("prompt"), before)), len(groups))
    return Dataset.from_list(rows)


# ---- model


def load_model(
    name: str, train: Dataset, steps: int, device: Any, dtype: str, seed: int, tell: Callable[[int, int, float], None]
) -> tuple[Any, Any]:
    """(model, tokenizer): of a folder or the hub, or made on the spot and pre-trained for some steps."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"--dtype {dtype}: expected a dtype of torch, such as float32 or bfloat16")
    if name:
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
            model = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype))
        except (OSError, ValueError) as error:  # no such folder, no such name, no network, no model in it
            raise ValueError(f"--model {name}: {one_line(error)}") from error
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return model.to(device), tokenizer
    texts = [column for column in ("prompt", *SIDES) if column in train.column_names]
    if not all(isinstance(train[0][column], str) for column in texts):
        raise ValueError("conversations need a model with a chat template: name one with --model")
    if torch.device(device).type == "cpu":
        torch.set_num_threads(1)  # in a model this small, threads wait for each other longer than they compute
    tokenizer = make_tokenizer(text for column in texts for text in train[column])
    model = make_model(tokenizer, seed).to(device, getattr(torch, dtype))
    pretrain(model, tokenizer, train, steps, seed, tell)
    return model, tokenizer


def make_tokenizer(texts: Iterable[str]) -> Any:
    """Byte-pair encoding, upper and lower case alike: a small model has no capacity to learn what they share."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[PAD, EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token=PAD, eos_token=EOS)


def make_model(tokenizer: Any, seed: int, width: int = 128, layers: int = 2) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        **ids,
    )
    return LlamaForCausalLM(config)


def pretrain(
    model: Any,
    tokenizer: Any,
    train: Dataset,
    steps: int,
    seed: int,
    tell: Callable[[int, int, float], None],
    batch_size: int = 64,
) -> None:
    """Next tokens of prompts and completions, of pairs either by the toss of a coin. ``tell(step, steps, loss)``."""
    rng = random.Random(seed)
    rows = encode(train, tokenizer, max_length=128)
    sides = [f"{side}_ids" for side in SIDES if side in train.column_names]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, step / 20) * (1 - (step - 1) / steps)
        picked = rows.select(rng.sample(range(len(rows)), min(batch_size, len(rows)))).to_list()
        side = rng.choice(sides)
        ids, mask = _pad([row["prompt_ids"] + row[side] for row in picked], tokenizer.pad_token_id)
        ids, mask = ids.to(model.device), mask.to(model.device)
        loss = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tell(step, steps, loss.item())
    model.eval()


# ---- tokens


def encode(data: Dataset, tokenizer: Any, max_length: int) -> Dataset:
    """Columns ``prompt_ids`` and ``chosen_ids``, ``rejected_ids``, or ``completion_ids``; others stay.

    Sequences end at ``max_length`` tokens; rows of which nothing of a completion is left are dropped.
    """
    sides = [side for side in SIDES if side in data.column_names]

    def ids_of(row: dict[str, Any]) -> dict[str, list[int]]:
        wholes = []
        for side in sides:
            if isinstance(row[side], str):
                prompt = tokenizer(row["prompt"]).input_ids
                text = row["prompt"] + row[side].removesuffix(tokenizer.eos_token) + tokenizer.eos_token
                wholes.append(tokenizer(text).input_ids)
            else:
                *before, answer = row[side]  # a conversation, or an answer to one
                before = [*(row.get("prompt") or []), *before]
                prompt = tokenizer.apply_chat_template(before, add_generation_prompt=True, return_dict=False)
                wholes.append(tokenizer.apply_chat_template([*before, answer], return_dict=False))
        # Up to where they agree: a tokenizer may merge the prompt's end with the completion's beginning.
        same = [all(whole[k : k + 1] == [token] for whole in wholes) for k, token in enumerate(prompt)]
        length = same.index(False) if False in same else len(prompt)
        completions = {f"{side}_ids": whole[length:max_length] for side, whole in zip(sides, wholes)}
        return {"prompt_ids": prompt[:length], **completions}

    encoded = data.map(ids_of, remove_columns=[name for name in ("prompt", *sides) if name in data.column_names])
    return encoded.filter(lambda row: all(row[f"{side}_ids"] for side in sides))


def collate(
    rows: Sequence[dict[str, Any]], pad_token_id: int, sides: Sequence[str] = ("chosen_ids", "rejected_ids")
) -> dict[str, Tensor]:
    """A batch of sequences, chosen ones first; ``target`` is aligned with all hidden states but the last, -100 where
    the token is of a prompt or padding."""
    sequences = [(row["prompt_ids"], row[side]) for side in sides for row in rows]
    ids, mask = _pad([prompt + completion for prompt, completion in sequences], pad_token_id)
    target = ids.masked_fill(mask == 0, -100)
    for row, (prompt, _) in zip(target, sequences):
        row[: len(prompt)] = -100
    return {"input_ids": ids, "attention_mask": mask, "target": target[:, 1:]}


def _pad(sequences: Sequence[list[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    ids = pad_sequence([torch.tensor(s) for s in sequences], batch_first=True, padding_value=pad_token_id)
    lengths = torch.tensor([len(s) for s in sequences])
    return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()


def score(model: Any, pairs: Dataset, pad_token_id: int, batch_size: int = 64, **options: Any) -> Tensor:  # (4, N)
    """Log-probabilities of chosen and rejected completions, and their numbers of tokens. ``pairs`` are encoded ones."""
    causal_lm.attach(model)
    model.eval()
    found = []
    for start in range(0, len(pairs), batch_size):
        rows = pairs.select(range(start, min(start + batch_size, len(pairs)))).to_list()
        batch = {name: value.to(model.device) for name, value in collate(rows, pad_token_id).items()}
        target = batch.pop("target")
        with torch.no_grad():
            logps = model(**batch, head_fn=lambda head, t=target: head.shifted().logps(t, **options)).value
        found.append(torch.cat([logps.sum(1).view(2, -1), (target != -100).sum(1).view(2, -1)]))
    return torch.cat(found, 1).cpu()
