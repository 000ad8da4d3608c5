"""Preference training without a trainer: a plain loop on transformers and accelerate.

    python examples/dpo_loop.py
    python examples/dpo_loop.py --loss simpo --beta 2
    torchrun --nproc-per-node 8 examples/dpo_loop.py --bf16 --batch-size 128 --accumulate 2 --learning-rate 1e-6 \
        --model Qwen/Qwen3-0.6B --dataset trl-lib/ultrafeedback_binarized --max-length 2048

By default a small model made on the spot learns from pairs made of docstrings; preferences.py has both, and says what
other data may look like. Losses over single completions with a verdict each (KTO, BCO): kto_loop.py. Needs accelerate,
datasets, transformers, rich and typer.
"""

from __future__ import annotations

import copy
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import common
import typer

if TYPE_CHECKING:  # imported below where they are used: --help and a wrong option answer at once
    from datasets import Dataset
    from torch import Tensor

    from chunked_embed import Head, LossOutput

LOSSES: dict[str, tuple[str, dict[str, Any]]] = {  # classes of alignment, and their options
    "dpo": ("DPOLoss", {}),
    "ipo": ("DPOLoss", {"loss_type": "ipo"}),
    "mpo": ("DPOLoss", {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}),
    "irpo": ("IRPOLoss", {}),
    "dpop": ("DPOPLoss", {}),
    "fpo": ("FPOLoss", {}),
    "cpo": ("CPOLoss", {}),
    "simpo": ("SimPOLoss", {}),
    "orpo": ("ORPOLoss", {}),
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
    import preferences
    import torch
    from accelerate.utils import set_seed
    from datasets import disable_progress_bars
    from loop_parts import inputs, logps, make_accelerator, micro_batch, save, show_pretraining, take_step, whole_steps
    from torch.utils.data import DataLoader
    from transformers import get_linear_schedule_with_warmup
    from transformers.utils import logging

    import alignment
    from chunked_embed import causal_lm

    accelerator = make_accelerator(bf16, accumulate, seed)
    set_seed(seed)
    disable_progress_bars()
    logging.disable_progress_bar()
    try:
        if loss not in LOSSES:
            raise ValueError(f"--loss {loss}: expected one of {', '.join(LOSSES)}")
        name, options = LOSSES[loss]
        loss_fn = getattr(alignment, name)(compiled=compiled, **options, **({"beta": beta} if beta else {}))
        micro = micro_batch(batch_size, accelerator, accumulate)
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

    collator = partial(collate, pad_token_id=tokenizer.pad_token_id)
    train = train.select(range(len(train) // batch_size * batch_size))  # whole steps only
    reference: Any = None
    if loss_fn.takes_reference and precompute:
        train, test = (with_reference(split, policy, accelerator, micro, collator, compiled) for split in (train, test))
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
        if loss_fn.takes_reference and reference is None:
            given["ref_logps"] = batch["ref_logps"]
        elif loss_fn.takes_reference:
            given["ref_logps"] = logps(accelerator, reference, batch, compiled)

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
    for batches in islice(whole_steps(train_loader, accumulate), steps):
        policy.train()
        loss_fn.train()
        found = take_step(accelerator, policy, optimizer, schedule, loss_of, batches)
        parts = [torch.stack([out.loss.detach(), *per_pair(out.metrics)[:, :2].mean(0)]) for out in found]
        means = accelerator.reduce(torch.stack(parts).mean(0), "mean").tolist()
        log.append([len(log) + 1, *means])
        accelerator.print("step {}: loss {:.4f}, reward margin {:.4f}, accuracy {:.3f}".format(*log[-1]))
    evaluate("after")

    save(accelerator, policy, tokenizer, output, LOGGED, log)
    # A DDP model that outlives its processes' group may hang while both go.
    policy = None
    accelerator.free_memory()
    accelerator.end_training()


def collate(rows: list[dict[str, Any]], pad_token_id: int) -> dict[str, Any]:
    """2B sequences, chosen ones first."""
    import preferences
    import torch

    batch: dict[str, Any] = preferences.collate(rows, pad_token_id)
    if "ref_logps" in rows[0]:
        batch["ref_logps"] = torch.tensor([row["ref_logps"] for row in rows]).T.flatten()
    return batch


def with_reference(
    split: Dataset, model: Any, accelerator: Any, size: int, collator: Any, compiled: bool | None
) -> Dataset:
    """A column more: the log-probabilities of both completions by the model as it is before training."""
    from loop_parts import for_each_row, logps

    def of_pairs(batch: dict[str, Any]) -> Tensor:  # (B, 2)
        return logps(accelerator, model, batch, compiled).view(2, -1).T.contiguous()

    return split.add_column("ref_logps", for_each_row(split, of_pairs, accelerator, size, collator).tolist())


def per_pair(metrics: dict[str, Tensor]) -> Tensor:  # (B, 3)
    """Margin of rewards, whether it is positive, and whether the chosen completion is the likelier one."""
    import torch

    chosen, rejected = metrics["rewards/chosen"], metrics["rewards/rejected"]
    logps = metrics["logps/chosen"], metrics["logps/rejected"]
    return torch.stack([chosen - rejected, chosen > rejected, logps[0] > logps[1]], 1)


if __name__ == "__main__":
    common.run(main)
