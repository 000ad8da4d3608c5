"""GRPO and its kin, or RLOO: the model writes a group of answers to each prompt, a rule rewards them, and it learns
from how much better than the group each one is.

    python examples/train_grpo.py
    python examples/train_grpo.py --loss-type grpo --level sequence --beta 0.02
    python examples/train_grpo.py --trainer rloo --generations 4
    python examples/train_grpo.py --model Qwen/Qwen3-0.6B --learning-rate 1e-6 --dataset trl-lib/tldr \
        --max-new-tokens 64 --batch-size 4 --accumulate 8

By default a small model made on the spot writes docstrings, and is rewarded for the third person and for eight words,
none of which comes twice (see online.py). Held-out prompts are answered before and after. Each group of answers has
several steps, --iterations: from the second one on, ratios of probabilities differ from 1 and are clipped.
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import common
import online
import typer

WATCHED = {"reward": "reward", "entropy": "entropy"}
LOGGED = ("step", "loss", *WATCHED, "reward_std", "completions/mean_length", "completions/clipped_ratio")
BEGINNING = "start"  # folder of the model as it began, from which TRL makes the reference


class Trainer(str, Enum):
    grpo = "grpo"
    rloo = "rloo"


class LossType(str, Enum):
    """Of GRPOConfig, and of ``alignment.GRPOLoss``."""

    grpo = "grpo"
    bnpo = "bnpo"
    dr_grpo = "dr_grpo"
    dapo = "dapo"
    luspo = "luspo"
    cispo = "cispo"
    sapo = "sapo"
    vespo = "vespo"


class Level(str, Enum):
    token = "token"
    sequence = "sequence"


def main(
    trainer: Annotated[Trainer, typer.Option(help="grpo: all of --loss-type.")] = Trainer.grpo,
    loss_type: Annotated[LossType | None, typer.Option(help="Of GRPO; dapo where none is named.")] = None,
    level: Annotated[
        Level | None, typer.Option(help="Of GRPO: whose ratio of probabilities; token where none is named.")
    ] = None,
    beta: Annotated[float, typer.Option(min=0, help="How strongly the policy is held to the reference; 0: none.")] = 0,
    generations: Annotated[int, typer.Option(min=2, help="Answers to a prompt.")] = 8,
    iterations: Annotated[int, typer.Option(min=1, help="Steps that an answer is used in.")] = 2,
    model: online.Name = "",
    dataset: online.Data = "",
    subset: online.Subset = "",
    prompts: online.Prompts = 3000,
    held_out: online.HeldOut = 400,
    max_new_tokens: online.NewTokens = 20,
    batch_size: online.BatchSize = 16,
    accumulate: online.Accumulate = 1,
    steps: online.Steps = 100,
    learning_rate: online.Rate = 1e-3,
    temperature: online.Temperature = 1.0,
    peer: online.Peer = False,
    compiled: online.Compiled = None,
    pretrain_steps: online.PretrainSteps = 150,
    save_every: online.SaveEvery = 20,
    resume: online.Resume = False,
    stop_after: online.StopAfter = 0,
    output: online.Output = Path("runs/train_grpo"),
    seed: int = 0,
    quick: online.Quick = False,
) -> None:
    """Train on groups of the model's own answers, and compare those before and after."""
    of_loss = {"trainer": trainer.value, "loss_type": loss_type and loss_type.value, "level": level and level.value}
    run = online.Run.of(locals() | of_loss)
    with online.mistakes_told():
        if trainer is Trainer.rloo and (loss_type or level):
            raise ValueError("--trainer rloo: --loss-type and --level are GRPO's")
        # A checkpoint between two steps of the same answers would have lost them.
        run.save_every, run.stop_after = (-(-n // iterations) * iterations for n in (run.save_every, run.stop_after))
        begun = online.start(run)
    if beta:
        begun.model.save_pretrained(output / BEGINNING)
        begun.policy.config._name_or_path = str(output / BEGINNING)
    name = trainer.value if trainer is Trainer.rloo else (loss_type or LossType.dapo).value
    watched = WATCHED | ({"kl": "KL"} if beta else {})
    logged = dict.fromkeys((*LOGGED, *watched))
    online.learn(run, begun, make_trainer(run, begun), f"{name}, {generations} answers", watched, [*logged])


def make_trainer(run: online.Run, begun: online.Start) -> Any:
    """Of either package, ``--trainer`` and ``--peer`` say which."""
    import trl

    from alignment import trl as ours

    own, grpo = run.own, run.own["trainer"] == "grpo"
    config, theirs, chunked = (
        (trl.GRPOConfig, trl.GRPOTrainer, ours.ChunkedGRPOTrainer)
        if grpo
        else (trl.RLOOConfig, trl.RLOOTrainer, ours.ChunkedRLOOTrainer)
    )
    of_grpo = {
        "loss_type": own["loss_type"] or "dapo",
        "importance_sampling_level": own["level"] or "token",
    }
    arguments = run.arguments(
        beta=own["beta"],
        num_generations=own["generations"],
        num_iterations=own["iterations"],
        max_completion_length=run.max_new_tokens,
        per_device_train_batch_size=run.batch_size * own["generations"],
        logging_steps=own["iterations"],  # rewards are known once for all of them
        **(of_grpo if grpo else {}),
    )
    return (theirs if run.peer else chunked)(
        model=begun.policy,
        reward_funcs=online.rule,
        args=config(**arguments),
        train_dataset=begun.train,
        processing_class=begun.tokenizer,
        **({} if run.peer else {"loss_options": {"compiled": run.compiled}}),
    )


if __name__ == "__main__":
    common.run(main)
