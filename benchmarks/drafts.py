"""Completions that are given, for trainers that would have the policy write them: what is timed is what comes behind.

Each is the chosen text of a pair in which a share of the words are others: from none to half of them, by the prompt and
by how many of its completions came before. ``reward`` says which share was left alone. Both trainers of a comparison
see the same ones, whatever their policies are.
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import pad

EOS, PAD = 1, 0


class Drafts:
    """By the ids of a prompt."""

    def __init__(self, texts: Mapping[tuple[int, ...], list[int]], usual: int) -> None:
        self.texts = texts
        self.usual = usual  # ids from 3 to here are words

    def __call__(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        seen: Counter[tuple[int, ...]] = Counter()
        found = []
        for prompt in map(tuple, prompts):
            text = self.texts[prompt]
            draw = random.Random(f"{prompt[:8]} {seen[prompt]}")
            share = draw.uniform(0, 0.5)
            found.append([draw.randrange(3, self.usual) if draw.random() < share else word for word in text] + [EOS])
            seen[prompt] += 1
        return found


def reward(completions: list[str], chosen: list[str], **_: Any) -> list[float]:
    """The share of a completion's words that are those of the text."""
    pairs = [(said.split(), text.split()) for said, text in zip(completions, chosen)]
    return [sum(map(str.__eq__, said, text)) / max(len(text), 1) for said, text in pairs]


def with_drafts(trainer: type, drafts: Drafts) -> type:
    """A trainer's class that takes its completions from there."""
    return type(
        trainer.__name__, (_Pairs if hasattr(trainer, "_generate_vllm") else _Turns, trainer), {"drafts": drafts}
    )


class _Turns:
    """GRPO, RLOO and distillation."""

    drafts: Drafts
    with_logps = ("GRPO",)  # of the sampler, which has none here

    def _generate_single_turn(self, prompt_ids: list[list[int]], *_: Any, **__: Any) -> Any:
        found = self.drafts(prompt_ids)
        return (found, None) if any(name in type(self).__name__ for name in self.with_logps) else found


class _Pairs:
    """Online DPO: two of each prompt."""

    drafts: Drafts
    processing_class: Any

    def _generate(self, model: Any, prompts: list[str], *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        device = next(model.parameters()).device
        ids = 2 * [self.processing_class(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
        prompt_ids, prompt_mask = _padded(ids, "left", device)
        return prompt_ids, prompt_mask, *_padded(self.drafts(ids), "right", device), None


def _padded(rows: list[list[int]], side: str, device: torch.device) -> tuple[Tensor, Tensor]:
    ids = [torch.tensor(row, device=device) for row in rows]
    masks = [torch.ones_like(row) for row in ids]
    return pad(ids, PAD, side), pad(masks, 0, side)
