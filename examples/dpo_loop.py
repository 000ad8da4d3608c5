"""Preference training without a trainer: a plain loop on transformers and accelerate.

    python examples/dpo_loop.py
    python examples/dpo_loop.py --loss simpo --beta 2
    torchrun --nproc-per-node 8 examples/dpo_loop.py --bf16 --batch-size 128 --accumulate 2 --learning-rate 1e-6 \
        --model Qwen/Qwen3-0.6B --dataset trl-lib/ultrafeedback_binarized --max-length 2048

By default a small model made on the spot learns from pairs made of docstrings; preferences.py has both, and says what
other data may look like. Needs accelerate, datasets, transformers, rich and typer.
"""

from __future__ import annotations

import copy
import csv
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import preferences
import torch
import typer
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from datasets import Dataset, disable_progress_bars
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import get_linear_schedule_with_warmup
from transformers.utils import logging

import alignment
from chunked_embed import Head, LossOutput, causal_lm

LOSSES: dict[str, Callable[..., Any]] = {
    "dpo": alignment.DPOLoss,
    "ipo": partial(alignment.DPOLoss, loss_type="ipo"),
    "mpo": partial(alignment.DPOLoss, loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0]),
    "irpo": alignment.IRPOLoss,
    "dpop": alignment.DPOPLoss,
    "fpo": alignment.FPOLoss,
    "cpo": alignment.CPOLoss,
    "simpo": alignment.SimPOLoss,
    "orpo": alignment.ORPOLoss,
    "kto": alignment.KTOLoss,
    "bco": alignment.BCOLoss,
}
LOGGED = ("step", "loss", "margin", "accuracy")


def main(
    loss: Annotated[str, typer.Option(help=f"One of {', '.join(LOSSES)}.")] = "dpo",
    beta: Annotated[float, typer.Option(min=0, help="Scale of the rewards; 0: the loss's own.")] = 0,
    model: Annotated[str, typer.Option(help="A folder or hub name; else a small one is made.")] = "",
    dataset: Annotated[
        str, typer.Option(help="A csv, json or parquet file, a hub name, or a folder of Python code; else docstrings.")
    ] = "",
    subset: Annotated[str, typer.Option(help="Configuration of a hub dataset.")] = "",
    pairs: Annotated[int, typer.Option(min=2, help="Training pairs, at most.")] = 4000,
    held_out: Annotated[int, typer.Option(min=1, help="Pairs to evaluate on, at most.")] = 400,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens a sequence is cut to.")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Pairs a step, over all processes.")] = 32,
    accumulate: Annotated[int, typer.Option(min=1, help="Parts in which a process takes its share of them.")] = 1,
    steps: Annotated[int, typer.Option(min=1)] = 80,
    learning_rate: Annotated[float, typer.Option(min=0)] = 1e-3,
    precompute: Annotated[bool, typer.Option(help="Score the reference once, and keep no copy of it.")] = False,
    bf16: Annotated[bool, typer.Option(help="Autocast; the weights keep --dtype.")] = False,
    dtype: Annotated[str, typer.Option(help="Of the weights, by torch's name.")] = "float32",
    compiled: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="The loss; else where it pays. The numbers are equal.")
    ] = None,
    pretrain_steps: Annotated[int, typer.Option(min=0, help="Of the small model.")] = 200,
    output: Annotated[Path, typer.Option(help="Folder for the model and log.csv.")] = Path("runs/dpo_loop"),
    seed: int = 0,
) -> None:
    """Train, logging every step, and evaluate before and after."""
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # or processes without a GPU would not find each other
        mixed_precision="bf16" if bf16 else "no",
        gradient_accumulation_steps=accumulate,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=seed),
    )
    set_seed(seed)
    disable_progress_bars()
    logging.disable_progress_bar()
    try:
        if loss not in LOSSES:
            raise ValueError(f"--loss {loss}: expected one of {', '.join(LOSSES)}")
        loss_fn = LOSSES[loss](compiled=compiled, **({"beta": beta} if beta else {}))
        micro, rest = divmod(batch_size, accelerator.num_processes * accumulate)
        if rest:
            raise ValueError(f"--batch-size {batch_size} is no multiple of {accelerator.num_processes} x {accumulate}")
        if loss == "kto" and (precompute or micro < 2):
            raise ValueError("--loss kto takes no --precompute, and two pairs or more of a process at a time")
        train, test = preferences.load_pairs(dataset, subset, pairs, held_out, seed)
        policy, tokenizer = preferences.load_model(
            model, train, pretrain_steps, accelerator.device, dtype, seed, partial(show_pretraining, accelerator)
        )
        train, test = (preferences.encode(split, tokenizer, max_length) for split in (train, test))
        if len(train) < batch_size or not len(test):
            raise ValueError(f"{len(train)} training pairs and {len(test)} held out are too few")
    except ValueError as error:
        accelerator.print(f"Error: {error}")
        raise typer.Exit(2) from error

    # From here on model(**inputs, head_fn=fn) returns what fn makes of the hidden states and the head. The loss runs
    # there, inside the forward that DDP and FSDP wrap: outside of it gradients would not be synchronised, and a
    # sharded head would not be whole. Attach before preparing, and before copying.
    causal_lm.attach(policy)

    def logps(model: nn.Module, batch: dict[str, Any]) -> Tensor:  # (2B,)
        """Log-probabilities of the completions, without gradients."""
        target = batch["target"]
        with torch.no_grad(), accelerator.autocast():
            out = model(**inputs(batch), head_fn=lambda head: head.shifted().logps(target, compiled=compiled))
        return out.value.sum(1)

    collator = partial(collate, pad_token_id=tokenizer.pad_token_id, mismatched=loss == "kto")
    train = train.select(range(len(train) // batch_size * batch_size))  # whole steps only
    reference: Any = None
    if loss_fn.takes_reference and precompute:
        for_logps = partial(logps, policy)
        train, test = (with_reference(split, for_logps, accelerator, micro, collator) for split in (train, test))
    elif loss_fn.takes_reference:
        reference = copy.deepcopy(policy).requires_grad_(False).eval()

    optimizer = torch.optim.AdamW(policy.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, max(1, steps // 10), steps)
    policy, optimizer, train_loader, test_loader = accelerator.prepare(
        policy,
        optimizer,
        DataLoader(train, micro, shuffle=True, collate_fn=collator),
        DataLoader(test, micro, collate_fn=collator),
    )
    # A head says what the model does to its logits (scale, cap, adapters). What it does not know of is found here.
    causal_lm.check(policy, inputs(next(iter(test_loader))))

    def loss_of(batch: dict[str, Any]) -> LossOutput:
        given = {}
        if isinstance(loss_fn, alignment.SequenceLoss):  # sequences with a verdict each, pairs or not
            rows = torch.arange(len(batch["target"]), device=accelerator.device)
            given["preference_labels"] = rows < len(rows) // 2
        if loss_fn.takes_reference:
            given["ref_logps"] = batch["ref_logps"] if reference is None else logps(reference, batch)
        if "mismatched" in batch:
            ratio = logps(policy, batch["mismatched"]) - logps(reference, batch["mismatched"])
            given["kl"] = accelerator.reduce(ratio.mean(), "mean")

        def in_forward(head: Head) -> LossOutput:  # with the scale and the soft-cap that the model's logits have
            return loss_fn(head.shifted(), target=batch["target"], **given)  # the states that predict a token

        return policy(**inputs(batch), head_fn=in_forward).value

    def evaluate(when: str) -> None:
        policy.eval()
        loss_fn.eval()
        with torch.no_grad():
            found = [accelerator.gather_for_metrics(per_pair(loss_of(batch).metrics)) for batch in test_loader]
        margin, _, preferred = torch.cat(found).mean(0).tolist()
        accelerator.print(
            f"{when}: in {preferred:.1%} of {len(test)} held-out pairs the chosen completion is more likely than the "
            f"rejected one, the mean margin of rewards is {margin:.3f}"
        )

    accelerator.print(f"{len(train)} pairs, {batch_size} a step: {accelerator.num_processes} x {accumulate} x {micro}")
    evaluate("before")
    log: list[list[float]] = []
    parts: list[Tensor] = []  # of each micro-batch of the step
    while len(log) < steps:
        policy.train()
        loss_fn.train()
        for batch in train_loader:
            with accelerator.accumulate(policy):  # gradients are synchronised with a step's last micro-batch only
                out = loss_of(batch)
                accelerator.backward(out.loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(policy.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            parts.append(torch.stack([out.loss.detach(), *per_pair(out.metrics)[:, :2].mean(0)]))
            if not accelerator.sync_gradients:
                continue
            schedule.step()
            means = accelerator.reduce(torch.stack(parts).mean(0), "mean").tolist()
            parts.clear()
            log.append([len(log) + 1, *means])
            accelerator.print("step {}: loss {:.4f}, reward margin {:.4f}, accuracy {:.3f}".format(*log[-1]))
            if len(log) == steps:
                break
    evaluate("after")

    trained = accelerator.unwrap_model(policy, keep_fp32_wrapper=False)
    weights = accelerator.get_state_dict(policy)  # gathered, where they are sharded
    if accelerator.is_main_process:
        trained.save_pretrained(output, state_dict=weights)
        tokenizer.save_pretrained(output)
        with open(output / "log.csv", "w", newline="") as file:
            csv.writer(file).writerows([LOGGED, *log])
    # A DDP model that outlives its processes' group may hang while both go.
    policy = None
    accelerator.free_memory()
    accelerator.end_training()


def inputs(batch: dict[str, Any]) -> dict[str, Tensor]:
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def collate(rows: list[dict[str, Any]], pad_token_id: int, mismatched: bool) -> dict[str, Any]:
    """2B sequences, chosen ones first. KTO also wants completions that belong to other prompts: the next row's."""
    batch: dict[str, Any] = preferences.collate(rows, pad_token_id)
    if "ref_logps" in rows[0]:
        batch["ref_logps"] = torch.tensor([row["ref_logps"] for row in rows]).T.flatten()
    if mismatched:
        others = [{**other, "prompt_ids": row["prompt_ids"]} for row, other in zip(rows, rows[1:] + rows[:1])]
        batch["mismatched"] = preferences.collate(others, pad_token_id)
    return batch


def with_reference(split: Dataset, logps: Any, accelerator: Accelerator, size: int, collator: Any) -> Dataset:
    """A column more: the log-probabilities of both completions by the model as it is before training."""
    loader = accelerator.prepare(DataLoader(split, size, collate_fn=collator))
    found = [accelerator.gather_for_metrics(logps(batch).view(2, -1).T.contiguous()) for batch in loader]
    return split.add_column("ref_logps", torch.cat(found).tolist())


def per_pair(metrics: dict[str, Tensor]) -> Tensor:  # (B, 3)
    """Margin of rewards, whether it is positive, and whether the chosen completion is the likelier one."""
    if "rewards" in metrics:  # of single sequences
        (chosen, rejected), logps = metrics["rewards"].chunk(2), metrics["logps"].chunk(2)
    else:
        chosen, rejected = metrics["rewards/chosen"], metrics["rewards/rejected"]
        logps = metrics["logps/chosen"], metrics["logps/rejected"]
    return torch.stack([chosen - rejected, chosen > rejected, logps[0] > logps[1]], 1)


def show_pretraining(accelerator: Accelerator, step: int, steps: int, loss: float) -> None:
    if step % 20 == 0:
        accelerator.print(f"pre-training, step {step} of {steps}: loss {loss:.3f}")


if __name__ == "__main__":
    typer.run(main)
