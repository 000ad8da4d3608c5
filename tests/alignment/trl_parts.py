"""A tokenizer, a model and preference data small enough to train with TRL in a test."""

import copy
import random
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [f"w{n}" for n in range(60)]


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: n for n, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def model(dtype: torch.dtype = torch.float32, seed: int = 0, **config: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    made = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, bos_token_id=1, eos_token_id=1, pad_token_id=0, **sizes | config)
    )
    with torch.no_grad():
        made.lm_head.weight.mul_(20)  # so that tokens differ in probability
    return made.to(dtype)


def reference(policy: Any) -> Any:
    made = copy.deepcopy(policy)
    with torch.no_grad():
        made.lm_head.weight.mul_(0.9)
    return made


def pairs(size: int = 12, seed: int = 0) -> Dataset:
    draw = random.Random(seed)

    def text(low: int, high: int) -> str:
        return " " + " ".join(draw.choices(WORDS, k=draw.randint(low, high)))

    return Dataset.from_list(
        [{"prompt": text(1, 4).strip(), "chosen": text(1, 9), "rejected": text(1, 9)} for _ in range(size)]
    )


def triples(size: int = 12, seed: int = 0) -> Dataset:
    """Pairs and a gold completion."""
    gold = [row["chosen"] for row in pairs(size, seed + 100)]
    return Dataset.from_list([{**row, "reference": text} for row, text in zip(pairs(size, seed), gold, strict=True)])


def prompts(size: int = 12, seed: int = 0) -> Dataset:
    """With a number each, for rewards."""
    rows = pairs(size, seed)
    return Dataset.from_list([{"prompt": row["prompt"], "number": n} for n, row in enumerate(rows)])


def odd_words(completions: list[Any], **_: Any) -> list[float]:
    """A reward: how many of a completion's words have an odd number."""
    texts = [said if isinstance(said, str) else said[-1]["content"] for said in completions]
    return [float(sum(int(word[1:]) % 2 for word in text.split() if word in WORDS)) for text in texts]


def seeded(trainer: Any) -> Any:
    """What a trainer samples follows from its prompts: not from what was drawn before, nor from the batch."""
    ids_of = trainer.processing_class.convert_tokens_to_ids

    def generate(model: Any, prompts: list[str], images: Any = None) -> tuple[Any, ...]:
        rows, completions = [ids_of(text.split()) for text in prompts] * 2, []
        for n, row in enumerate(rows):
            g = torch.Generator().manual_seed(sum(row) + 1000 * (n // len(prompts)))
            length = int(torch.randint(2, 7, (), generator=g))
            completions.append([*torch.randint(3, 63, (length - 1,), generator=g).tolist(), 1][:6])
        width, longest = max(map(len, rows)), max(map(len, completions))
        ids = [[0] * (width - len(row)) + row for row in rows], [c + [0] * (longest - len(c)) for c in completions]
        prompt_ids, completion_ids = (torch.tensor(each) for each in ids)
        return prompt_ids, (prompt_ids > 0).long(), completion_ids, (completion_ids > 0).long(), None

    trainer._generate = generate
    return trainer


def verdicts(size: int = 12, seed: int = 0) -> Dataset:
    """Single completions, each with a label."""
    rows = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in pairs(size, seed)
        for side in ("chosen", "rejected")
    ]
    random.Random(seed).shuffle(rows)
    return Dataset.from_list(rows[:size])
