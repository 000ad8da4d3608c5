"""What dpo_loop.py and kto_loop.py share: accelerator, scores of completions, steps made of micro-batches, saving."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader

from chunked_embed import LossOutput

Batch = dict[str, Any]


def make_accelerator(bf16: bool, accumulate: int, seed: int) -> Accelerator:
    # Steps are whole (whole_steps reads ahead of them), so that the end of the data ends none of them.
    plugin = GradientAccumulationPlugin(num_steps=accumulate, sync_with_dataloader=False)
    return Accelerator(
        cpu=not torch.accelerator.is_available(),  # or processes without a GPU would not find each other
        mixed_precision="bf16" if bf16 else "no",
        gradient_accumulation_plugin=plugin,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=seed),
    )


def micro_batch(batch_size: int, accelerator: Accelerator, accumulate: int) -> int:
    """What a process takes at a time of a step's batch."""
    micro, rest = divmod(batch_size, accelerator.num_processes * accumulate)
    if rest:
        raise ValueError(f"--batch-size {batch_size} is no multiple of {accelerator.num_processes} x {accumulate}")
    return micro


def inputs(batch: Batch) -> dict[str, Tensor]:
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def logps(accelerator: Accelerator, model: Any, batch: Batch, compiled: bool | None) -> Tensor:  # (B,)
    """Log-probabilities of the completions, without gradients: inside the model's forward, as the loss is."""
    target = batch["target"]
    with torch.no_grad(), accelerator.autocast():
        out = model(**inputs(batch), head_fn=lambda head: head.shifted().logps(target, compiled=compiled))
    return out.value.double().sum(1)


def for_each_row(
    split: Dataset, fn: Callable[[Batch], Tensor], accelerator: Accelerator, size: int, collator: Callable[..., Batch]
) -> Tensor:
    """What ``fn`` finds of a batch, (B, ...), for all rows in order. Each process scores a share of them."""
    loader = accelerator.prepare(DataLoader(split, size, collate_fn=collator))
    return torch.cat([accelerator.gather_for_metrics(fn(batch)) for batch in loader])


def whole_steps(loader: Any, accumulate: int) -> Iterator[list[Batch]]:
    """The micro-batches of this process for one step after the other, without end; a step ends with an epoch."""
    while True:
        batches = []
        for batch in loader:
            batches.append(batch)
            if len(batches) == accumulate:
                yield batches
                batches = []


def take_step(
    accelerator: Accelerator,
    policy: Any,
    optimizer: Any,
    schedule: Any,
    loss_of: Callable[[Batch], LossOutput],
    batches: Sequence[Batch],
) -> list[LossOutput]:
    """One step of the optimizer, and what the loss found of each micro-batch."""
    found = []
    for batch in batches:
        with accelerator.accumulate(policy):  # gradients are synchronised with a step's last micro-batch only
            out = loss_of(batch)
            accelerator.backward(out.loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        found.append(out)
    schedule.step()
    return found


def save(
    accelerator: Accelerator,
    policy: Any,
    tokenizer: Any,
    output: Path,
    header: Sequence[str],
    log: Sequence[Sequence[float]],
) -> None:
    """Model, tokenizer and log.csv."""
    trained = accelerator.unwrap_model(policy, keep_fp32_wrapper=False)
    weights = accelerator.get_state_dict(policy)  # gathered, where they are sharded
    if accelerator.is_main_process:
        trained.save_pretrained(output, state_dict=weights)
        tokenizer.save_pretrained(output)
        with open(output / "log.csv", "w", newline="") as file:
            csv.writer(file).writerows([header, *log])


def show_pretraining(accelerator: Accelerator, step: int, steps: int, loss: float) -> None:
    if step % 20 == 0:
        accelerator.print(f"pre-training, step {step} of {steps}: loss {loss:.3f}")
