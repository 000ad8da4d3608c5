"""Online DPO: the model writes two answers to each prompt, a rule says which is better, and it learns from the pair.

    python examples/train_online_dpo.py
    python examples/train_online_dpo.py --loss ipo --beta 0.5 --steps 120
    python examples/train_online_dpo.py --model Qwen/Qwen3-0.6B --learning-rate 1e-6 --dataset trl-lib/tldr \
        --max-new-tokens 64

By default a small model made on the spot writes docstrings, and is rewarded for the third person and for eight words,
none of which comes twice (see online.py). Held-out prompts are answered before and after.
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import common
import online
import typer

WATCHED = {"objective/scores": "reward", "rewards/margins": "margin", "objective/kl": "KL"}
LOGGED = ("step", "loss", *WATCHED, "objective/scores_margin", "rewards/accuracies", "val/contain_eos_token")


class Loss(str, Enum):
    """Those of OnlineDPOConfig, and some that ``loss=`` adds."""

    sigmoid = "sigmoid"
    ipo = "ipo"
    irpo = "irpo"
    dpop = "dpop"
    rdpo = "rdpo"
    tdpo2 = "tdpo2"


IN_TRL = (Loss.sigmoid, Loss.ipo)


def main(
    loss: Annotated[Loss, typer.Option(help="sigmoid, ipo: of TRL's trainer; the others are losses of ours.")] = (
        Loss.sigmoid
    ),
    beta: Annotated[float, typer.Option(min=0, help="How strongly the policy is held to the reference.")] = 0.1,
    model: online.Name = "",
    dataset: online.Data = "",
    subset: online.Subset = "",
    prompts: online.Prompts = 3000,
    held_out: online.HeldOut = 400,
    max_new_tokens: online.NewTokens = 20,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of prompt and answer; prompts lose the rest.")] = 256,
    batch_size: online.BatchSize = 32,
    accumulate: online.Accumulate = 1,
    steps: online.Steps = 60,
    learning_rate: online.Rate = 1e-3,
    temperature: online.Temperature = 1.0,
    peer: online.Peer = False,
    compiled: online.Compiled = None,
    pretrain_steps: online.PretrainSteps = 150,
    save_every: online.SaveEvery = 20,
    resume: online.Resume = False,
    stop_after: online.StopAfter = 0,
    output: online.Output = Path("runs/train_online_dpo"),
    seed: int = 0,
    quick: online.Quick = False,
) -> None:
    """Train on the model's own answers, and compare those before and after."""
    run = online.Run.of({**locals(), "loss": loss.value})
    with online.mistakes_told():
        if max_length <= max_new_tokens:
            raise ValueError(
                f"--max-length {max_length}: expected more than --max-new-tokens, {max_new_tokens}: nothing of the "
                "prompt is left beside such an answer"
            )
        options = loss_options(loss, beta, run.compiled, peer)
        begun = online.start(run)
    arguments = config(
        loss_type=loss.value if loss in IN_TRL else "sigmoid",
        beta=[beta],
        max_length=max_length,
        max_new_tokens=max_new_tokens,
        **run.arguments(),
    )
    trainer = make_trainer(begun, arguments, options, peer)
    online.learn(run, begun, trainer, f"Online DPO, {loss.value}", WATCHED, LOGGED)


def loss_options(loss: Loss, beta: float, compiled: bool | None, peer: bool) -> dict[str, Any]:
    """What the trainer takes beside its configuration."""
    from alignment.trl import LOSS_TYPES

    if not beta > 0:
        raise ValueError(f"--beta {beta}: expected a positive number")
    if peer and loss not in IN_TRL:
        raise ValueError(f"--peer: TRL's trainer has {', '.join(one.value for one in IN_TRL)}, not {loss.value}")
    if peer:
        return {}
    if loss in IN_TRL:
        return {"loss_options": {"compiled": compiled}}
    return {"loss": LOSS_TYPES[loss.value](beta=beta, compiled=compiled)}


def config(**arguments: Any) -> Any:
    from trl.experimental.online_dpo import OnlineDPOConfig

    return OnlineDPOConfig(**arguments)


def make_trainer(begun: online.Start, arguments: Any, options: dict[str, Any], peer: bool) -> Any:
    from trl.experimental.online_dpo import OnlineDPOTrainer

    from alignment.trl import ChunkedOnlineDPOTrainer

    return (OnlineDPOTrainer if peer else ChunkedOnlineDPOTrainer)(
        model=begun.policy,
        ref_model=begun.model,
        reward_funcs=online.rule,
        args=arguments,
        train_dataset=begun.train,
        processing_class=begun.tokenizer,
        **options,
    )


if __name__ == "__main__":
    common.run(main)
