"""The trainers of both packages, made alike, and whether two of them trained alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import trl_parts as parts
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, RLOOConfig, RLOOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.experimental.tpo import TPOConfig, TPOTrainer

from alignment.trl import (
    ChunkedBCOTrainer,
    ChunkedCPOTrainer,
    ChunkedDPOTrainer,
    ChunkedGRPOTrainer,
    ChunkedKTOTrainer,
    ChunkedOnlineDPOTrainer,
    ChunkedORPOTrainer,
    ChunkedRLOOTrainer,
    ChunkedTPOTrainer,
)

PLAIN = {"compiled": False}
TIMES = ("runtime", "per_second", "flos")


@dataclass
class Kind:
    theirs: Any
    ours: Any
    config: Any
    data: Callable[..., Any]
    has_reference: bool = True
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Of the config."""
    given: Mapping[str, Any] = field(default_factory=dict)
    """To the trainer."""


SAMPLED = {"num_generations": 4, "max_completion_length": 6}


def reward(completions: list[str], **_: Any) -> list[float]:
    """Of words, unlike in most completions."""
    return [sum(map(ord, text)) % 7 / 2 for text in completions]


KINDS = {
    "dpo": Kind(DPOTrainer, ChunkedDPOTrainer, DPOConfig, parts.pairs),
    "kto": Kind(KTOTrainer, ChunkedKTOTrainer, KTOConfig, parts.verdicts),
    "bco": Kind(None, ChunkedBCOTrainer, KTOConfig, parts.verdicts),
    "cpo": Kind(CPOTrainer, ChunkedCPOTrainer, CPOConfig, parts.pairs, False, {"max_length": 32}),
    "orpo": Kind(ORPOTrainer, ChunkedORPOTrainer, ORPOConfig, parts.pairs, False, {"max_length": 32}),
    "tpo": Kind(TPOTrainer, ChunkedTPOTrainer, TPOConfig, parts.triples, False),
    "grpo": Kind(GRPOTrainer, ChunkedGRPOTrainer, GRPOConfig, parts.prompts, False, SAMPLED, {"reward_funcs": reward}),
    "rloo": Kind(
        RLOOTrainer,
        ChunkedRLOOTrainer,
        RLOOConfig,
        parts.prompts,
        False,
        SAMPLED | {"beta": 0.0},
        {"reward_funcs": reward},
    ),
}

SAMPLING = {  # TRL's cannot evaluate
    "online": Kind(
        OnlineDPOTrainer,
        ChunkedOnlineDPOTrainer,
        OnlineDPOConfig,
        parts.prompts,
        fixed={"max_new_tokens": 6, "eval_strategy": "no"},
        given={"reward_funcs": parts.odd_words},
    ),
}


def make(kind: str, ours: bool, folder: Path, model: Any = None, data: Any = None, **options: Any) -> Any:
    """A trainer of either package; ``args`` are the config's, the rest the trainer's."""
    k = (KINDS | SAMPLING)[kind]
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "learning_rate": 1e-2,
        "optim": "sgd",  # Adam makes steps of rounding errors where a gradient is almost zero
        "save_strategy": "no",
        "eval_strategy": "steps",
        "eval_steps": 3,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }
    args = k.config(**(settings | dict(k.fixed) | options.pop("args", {})))
    policy = parts.model() if model is None else model
    if k.has_reference and "ref_model" not in options and "peft_config" not in options:
        options["ref_model"] = parts.reference(policy)
    if ours and "loss" not in options:
        options.setdefault("loss_options", PLAIN)
    options = {"eval_dataset": k.data(6, 1), "processing_class": parts.tokenizer(), **k.given, **options}
    return (k.ours if ours else k.theirs)(
        model=policy, args=args, train_dataset=k.data() if data is None else data, **options
    )


def trained(*args: Any, **kwargs: Any) -> Any:
    trainer = make(*args, **kwargs)
    trainer.train()
    return trainer


def assert_same_training(theirs: Any, ours: Any, but: tuple[str, ...] = (), tolerance: float = 2e-5) -> None:
    assert len(theirs.state.log_history) == len(ours.state.log_history) >= 4
    for expected, found in zip(theirs.state.log_history, ours.state.log_history, strict=True):
        compared = [name for name in expected if not any(part in name for part in (*TIMES, *but))]
        assert len(compared) > 1
        for name in compared:
            assert found[name] == pytest.approx(expected[name], rel=tolerance, abs=tolerance), name
    for (name, p), q in zip(theirs.model.named_parameters(), ours.model.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")
