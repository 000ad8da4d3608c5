"""Online DPO: the model writes two answers to each prompt, a rule says which is better, and it learns from the pair.

    python examples/train_online_dpo.py
    python examples/train_online_dpo.py --loss ipo --beta 0.5 --steps 120
    python examples/train_online_dpo.py --model Qwen/Qwen3-0.6B --learning-rate 1e-6 --dataset trl-lib/tldr \
        --max-new-tokens 64

By default a small model made on the spot writes docstrings, and is rewarded for the third person and for eight words,
none of which comes twice (see online.py). Held-out prompts are answered before and after.
"""

from __future__ import annotations

import copy
import time
import warnings
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import common
import typer
from common import console, has_fast_bf16, quiet_and_offline

if TYPE_CHECKING:  # imported below where they are used: --help and a wrong option answer at once
    from datasets import Dataset

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
    model: Annotated[str, typer.Option(help="A folder or hub name; else a small one is made.")] = "",
    dataset: Annotated[
        str, typer.Option(help="A csv, json or parquet file, a hub name, or a folder of Python code; else docstrings.")
    ] = "",
    subset: Annotated[str, typer.Option(help="Configuration of a hub dataset.")] = "",
    prompts: Annotated[int, typer.Option(min=2, help="Training prompts, at most.")] = 3000,
    held_out: Annotated[int, typer.Option(min=1, help="Prompts to measure on, at most.")] = 400,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 20,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of prompt and answer; prompts lose the rest.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts that the model sees at a time.")] = 32,
    accumulate: Annotated[int, typer.Option(min=1, help="Such batches a step.")] = 1,
    steps: Annotated[int, typer.Option(min=1)] = 60,
    learning_rate: Annotated[float, typer.Option(min=0)] = 1e-3,
    temperature: Annotated[float, typer.Option(min=0.01, help="Of the answers in training.")] = 1.0,
    peer: Annotated[bool, typer.Option(help="TRL's trainer in the place of ours.")] = False,
    compiled: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="The loss; else where it pays, and not for the small model."),
    ] = None,
    pretrain_steps: Annotated[int, typer.Option(min=0, help="Of the small model.")] = 150,
    save_every: Annotated[int, typer.Option(min=0, help="Steps; 0: at the end only.")] = 20,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint in --output.")] = False,
    stop_after: Annotated[int, typer.Option(min=0, help="Stop after so many steps of this call; go on later.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder for all results.")] = Path("runs/train_online_dpo"),
    seed: int = 0,
    quick: Annotated[bool, typer.Option(help="Only check that everything runs; teaches the model little.")] = False,
) -> None:
    """Train on the model's own answers, and compare those before and after."""
    started = time.perf_counter()
    if quick:
        prompts, held_out, batch_size, steps = min(prompts, 400), min(held_out, 50), min(batch_size, 8), min(steps, 4)
        pretrain_steps = min(pretrain_steps, 20)
    quiet_and_offline(offline=all(not name or Path(name).exists() for name in (model, dataset)))
    warnings.filterwarnings("ignore", category=FutureWarning)  # between TRL and transformers
    warnings.filterwarnings("ignore", message=".*importing from 'trl.experimental'")
    import online
    import pair_parts
    import preferences
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if max_length <= max_new_tokens:
            raise ValueError(
                f"--max-length {max_length}: expected more than --max-new-tokens, {max_new_tokens}: nothing of the "
                "prompt is left beside such an answer"
            )
        options = loss_options(loss, beta, False if compiled is None and not model else compiled, peer)
        train, test = online.load_prompts(dataset, subset, prompts, held_out, model, seed)
        run = {
            "loss": loss.value,
            "beta": beta,
            "model": model,
            "data": pair_parts.digest(train),
            "tokens": [max_new_tokens, max_length],
            "batch size": batch_size,
            "accumulate": accumulate,
            "steps": steps,
            "learning rate": learning_rate,
            "temperature": temperature,
            "pre-training": pretrain_steps,
            "peer": peer,
            "seed": seed,
        }
        checkpoint = pair_parts.begin(output, run, resume, online.LAST)
        with console.status("Pre-training" if not model else "Loading the model") as status:

            def tell(step: int, steps: int, loss: float) -> None:
                status.update(f"Pre-training, step {step} of {steps}: loss {loss:.2f}")

            start, tokenizer = preferences.load_model(model, train, pretrain_steps, device, "float32", seed, tell)
            before = online.measure(start, tokenizer, test, max_new_tokens, seed)
    except ValueError as error:
        common.show_error(error)
        raise typer.Exit(2) from error

    arguments = config(
        output_dir=str(output),
        loss_type=loss.value if loss in IN_TRL else "sigmoid",
        beta=[beta],
        max_new_tokens=max_new_tokens,
        max_length=max_length,
        temperature=temperature,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulate,
        max_steps=steps,
        learning_rate=learning_rate,
        warmup_steps=max(1, steps // 10),
        gradient_checkpointing=bool(model),
        bf16=has_fast_bf16(device) and bool(model),
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
        save_steps=save_every or steps,
        seed=seed,
    )
    policy = copy.deepcopy(start)
    trainer = make_trainer(policy, start, arguments, train, tokenizer, options, peer)
    try:
        log, seconds = online.fit(trainer, WATCHED, checkpoint, stop_after)
    except KeyboardInterrupt:
        console.print("Stopped. The same command with --resume goes on from the last checkpoint.")
        raise typer.Exit(130) from None
    trainer.accelerator.unwrap_model(policy, keep_fp32_wrapper=False)  # or it would be measured in bfloat16
    done = trainer.state.global_step
    result = {"title": f"Online DPO, {loss.value}, {batch_size * accumulate} prompts a step", "run": run}
    result |= {"finished": done >= steps, "log": [{name: entry[name] for name in LOGGED} for entry in log]}
    result |= online.compared(test, before, online.measure(policy, tokenizer, test, max_new_tokens, seed))
    result["seconds"] = seconds
    online.show(result)
    online.write(result, output)
    online.plot(result, WATCHED, output / "results.png")
    if not result["finished"]:
        console.print(f"Stopped after step {done} of {steps}. The same command with --resume goes on from there.")
        return
    policy.save_pretrained(output / "model")
    tokenizer.save_pretrained(output / "model")
    console.print(
        f"{steps} steps took {seconds:.0f} s, everything {time.perf_counter() - started:.0f} s. Results, plot and "
        f"model: {output}"
    )


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

    shown = {"logging_steps": 1, "report_to": "none", "disable_tqdm": True}
    return OnlineDPOConfig(**arguments, **shown, save_strategy="steps", save_total_limit=2)


def make_trainer(
    policy: Any, start: Any, arguments: Any, train: Dataset, tokenizer: Any, options: dict[str, Any], peer: bool
) -> Any:
    import online
    from trl.experimental.online_dpo import OnlineDPOTrainer

    from alignment.trl import ChunkedOnlineDPOTrainer

    return (OnlineDPOTrainer if peer else ChunkedOnlineDPOTrainer)(
        model=policy,
        ref_model=start,
        reward_funcs=online.rule,
        args=arguments,
        train_dataset=train.select_columns(["prompt"]),
        processing_class=tokenizer,
        **options,
    )


if __name__ == "__main__":
    common.run(main)
