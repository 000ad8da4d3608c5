"""KTO and BCO without a trainer: single completions with a verdict each, a plain loop on transformers and accelerate.

    python examples/kto_loop.py
    python examples/kto_loop.py --loss bco --desirable 0.1 --accumulate 2
    torchrun --nproc-per-node 8 examples/kto_loop.py --bf16 --batch-size 128 --accumulate 2 --learning-rate 1e-6 \
        --model Qwen/Qwen3-0.6B --dataset trl-lib/kto-mix-14k --max-length 2048 --precompute

By default a small model made on the spot learns from completions of docstrings, a quarter of them desirable;
preferences.py has both, and says what other data may look like. docs/trainers.md explains the recipe. Needs accelerate,
datasets, matplotlib, transformers, rich and typer.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import common
import typer
from common import console
from rich.table import Table

if TYPE_CHECKING:  # imported below where they are used: --help and a wrong option answer at once
    from accelerate import Accelerator
    from datasets import Dataset
    from torch import Tensor

    from chunked_embed import Head, LossOutput

LOSSES: dict[str, tuple[str, dict[str, Any]]] = {  # classes of alignment, and their options
    "kto": ("KTOLoss", {}),
    "apo_zero_unpaired": ("KTOLoss", {"loss_type": "apo_zero_unpaired"}),
    "bco": ("BCOLoss", {}),
}
LOGGED = ("step", "loss", "desirable", "undesirable", "point")


def main(
    loss: Annotated[str, typer.Option(help=f"One of {', '.join(LOSSES)}.")] = "kto",
    beta: Annotated[float, typer.Option(min=0, help="How strongly the policy is held to the reference.")] = 0.1,
    desirable_weight: Annotated[float, typer.Option(min=0, help="0: the rarer class weighs as much as the other.")] = 0,
    undesirable_weight: Annotated[float, typer.Option(min=0, help="The same of the others.")] = 0,
    model: Annotated[str, typer.Option(help="A folder or hub name; else a small one is made.")] = "",
    dataset: Annotated[
        str, typer.Option(help="A csv, json or parquet file, a hub name, or a folder of Python code; else docstrings.")
    ] = "",
    subset: Annotated[str, typer.Option(help="Configuration of a hub dataset.")] = "",
    rows: Annotated[int, typer.Option(min=2, help="Completions to train on, at most.")] = 4000,
    desirable: Annotated[float, typer.Option(min=0, max=1, help="Share of them, where the data are pairs.")] = 0.25,
    held_out: Annotated[int, typer.Option(min=1, help="Rows to evaluate on, at most; of pairs, both.")] = 400,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens a sequence is cut to.")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Completions a step, over all processes.")] = 64,
    accumulate: Annotated[int, typer.Option(min=1, help="Parts in which a process takes its share of them.")] = 1,
    steps: Annotated[int, typer.Option(min=1)] = 120,
    learning_rate: Annotated[float, typer.Option(min=0)] = 1e-3,
    precompute: Annotated[bool, typer.Option(help="Score the reference once, and keep no copy of it.")] = False,
    bf16: Annotated[bool, typer.Option(help="Autocast; the weights keep --dtype.")] = False,
    dtype: Annotated[str, typer.Option(help="Of the weights, by torch's name.")] = "float32",
    compiled: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="The loss; else where it pays. The numbers are equal.")
    ] = None,
    pretrain_steps: Annotated[int, typer.Option(min=0, help="Of the small model.")] = 200,
    save_every: Annotated[int, typer.Option(min=0, help="Steps between checkpoints; 0: none.")] = 0,
    resume: Annotated[bool, typer.Option(help="From the checkpoint in --output, with the same options.")] = False,
    output: Annotated[Path, typer.Option(help="Folder for the model, log.csv and the plot.")] = Path("runs/kto_loop"),
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

    from alignment.functional import kto_kl
    from chunked_embed import causal_lm

    accelerator = make_accelerator(bf16, accumulate, seed)
    set_seed(seed)
    disable_progress_bars()
    logging.disable_progress_bar()
    checkpoint = output / "checkpoint"
    try:
        if loss not in LOSSES:
            raise ValueError(f"--loss {loss}: expected one of {', '.join(LOSSES)}")
        if resume and not checkpoint.exists():
            raise ValueError(f"--resume: no {checkpoint}")
        micro = micro_batch(batch_size, accelerator, accumulate)
        train, test = preferences.load_verdicts(dataset, subset, rows, held_out, desirable, seed)
        policy, tokenizer = preferences.load_model(
            model, train, pretrain_steps, accelerator.device, dtype, seed, partial(show_pretraining, accelerator)
        )
        train, test = (preferences.encode(split, tokenizer, max_length) for split in (train, test))
        train = train.select(range(len(train) // batch_size * batch_size))  # whole steps only
        if not len(train) or not len(test):
            raise ValueError(f"{len(train)} rows for training and {len(test)} held out are too few")
        weights = class_weights(train["label"], desirable_weight, undesirable_weight)
        if loss == "kto":
            train, test = (with_mismatched(split, batch_size, max_length) for split in (train, test))
        loss_fn = make_loss(loss, beta, weights, compiled)
    except ValueError as error:
        accelerator.print(f"Error: {error}")
        raise typer.Exit(2) from error

    # From here on model(**inputs, head_fn=fn) returns what fn makes of the hidden states and the head. The loss runs
    # there, inside the forward that DDP and FSDP wrap: outside of it gradients would not be synchronised, and a
    # sharded head would not be whole. Attach before preparing, and before copying.
    causal_lm.attach(policy)
    policy.eval()  # the reference does not drop out
    collator = partial(collate, pad_token_id=tokenizer.pad_token_id)
    reference: Any = None
    if precompute:
        train, test = (with_reference(split, policy, accelerator, micro, collator, compiled) for split in (train, test))
    else:
        reference = copy.deepcopy(policy).requires_grad_(False)

    optimizer = torch.optim.AdamW(policy.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, max(1, steps // 10), steps)
    policy, optimizer, train_loader, test_loader = accelerator.prepare(
        policy,
        optimizer,
        DataLoader(train, micro, collate_fn=collator),  # in the order in which completions were exchanged
        DataLoader(test, micro, collate_fn=collator),
    )
    # A head says what the model does to its logits (scale, cap, adapters). What it does not know of is found here.
    causal_lm.check(policy, inputs(next(iter(test_loader))))

    def reference_of(batch: dict[str, Any]) -> Tensor:  # (B,)
        return batch["ref_logps"] if reference is None else logps(accelerator, reference, batch, compiled)

    def kl_of(batches: Sequence[dict[str, Any]]) -> Tensor | None:
        """KTO's reference point: the mean over all these sequences of all processes, and zero where it is below."""
        if loss != "kto":
            return None
        found = []
        for batch in batches:
            others = batch["mismatched"]
            pair = torch.stack([logps(accelerator, policy, others, compiled), reference_of(others)], 1)
            found.append(accelerator.gather_for_metrics(pair))  # without those that fill up a last batch
        return kto_kl(*torch.cat(found).unbind(1))

    def loss_of(batch: dict[str, Any], kl: Tensor | None) -> LossOutput:
        given = {"preference_labels": batch["label"], "ref_logps": reference_of(batch)}
        if loss == "kto":
            given["kl"] = kl
        if loss == "bco":  # it has no weights of its own
            given["sequence_weight"] = torch.where(batch["label"], *weights)

        def in_forward(head: Head) -> LossOutput:  # with the scale and the soft-cap that the model's logits have
            return loss_fn(head.shifted(), target=batch["target"], **given)  # the states that predict a token

        return policy(**inputs(batch), head_fn=in_forward).value

    def evaluate() -> dict[str, Tensor]:
        """Of the held-out rows; BCO's delta stays as it is."""
        policy.eval()
        loss_fn.eval()
        found = []
        with torch.no_grad():
            kl = kl_of(test_loader)
            for batch in test_loader:
                out = loss_of(batch, kl).metrics
                columns = [out["rewards"], out["logps"], batch["label"], batch["group"]]
                found.append(accelerator.gather_for_metrics(torch.stack([c.double() for c in columns], 1)))
        names = ("rewards", "logps", "desirable", "group")
        scores = dict(zip(names, torch.cat(found).cpu().unbind(1)))
        scores["rewards"] = scores["rewards"].round(decimals=5)  # what differs by rounding is equal
        return {**scores, "desirable": scores["desirable"] > 0, "point": point_of(out, beta).double().cpu()}

    log = Log()
    accelerator.register_for_checkpointing(loss_fn, schedule, log)  # BCO's delta is in buffers of the loss
    show_data(train, test, weights)
    console.print(f"{batch_size} a step: {accelerator.num_processes} x {accumulate} x {micro}")
    before = evaluate()
    if resume:
        accelerator.load_state(str(checkpoint))
        console.print(f"Resumed behind step {len(log)}")
    for batches in islice(whole_steps(train_loader, accumulate), len(log), steps):
        policy.train()
        loss_fn.train()
        kl = kl_of(batches)  # one for the step, however it is divided
        found = take_step(accelerator, policy, optimizer, schedule, partial(loss_of, kl=kl), batches)
        log.append([len(log) + 1, *means_of(found, beta, accelerator)])
        console.print("step {}: loss {:.4f}, rewards {:.3f} and {:.3f}, reference point {:.3f}".format(*log[-1]))
        if save_every and len(log) % save_every == 0 and len(log) < steps:
            accelerator.save_state(str(checkpoint))
    after = evaluate()

    save(accelerator, policy, tokenizer, output, LOGGED, log)
    if accelerator.is_main_process:
        results = [summary(when, scores) for when, scores in (("before", before), ("after", after))]
        plot(log, after, f"{loss}, beta {beta:g}", output / "results.png")
        console.print(rich_table(results, loss))
        console.print(f"Model, log and plot: {output}")
    # A DDP model that outlives its processes' group may hang while both go.
    policy = None
    accelerator.free_memory()
    accelerator.end_training()


# ---- data


def class_weights(labels: Sequence[bool], desirable: float, undesirable: float) -> tuple[float, float]:
    """Where one is 0, so that both classes weigh the same in all: the rarer one's weight is above 1."""
    n = sum(labels)
    others = len(labels) - n
    if not n or not others:
        raise ValueError(f"of {len(labels)} rows {n} are desirable: both kinds are needed")
    if desirable and undesirable:
        return desirable, undesirable
    if desirable:
        return desirable, desirable * n / others
    undesirable = undesirable or max(1.0, n / others)
    return undesirable * others / n, undesirable


def mismatched(prompts: Sequence[Any], completions: Sequence[Any], size: int) -> list[int]:
    """For each row another one, whose completion it gets: the one before it in its batch of ``size``, so that a batch
    has the completions that it had, at other prompts.

    A row with the same prompt or the same completion is passed over: a completion that belongs to the prompt would be
    no sample of those that do not. Where a batch has no other row, it is looked for before the batch.
    """
    found = []
    for row in range(len(prompts)):
        start = row - row % size
        end = min(start + size, len(prompts))
        near = chain(range(row - 1, start - 1, -1), range(end - 1, row, -1))
        far = chain(range(start - 1, -1, -1), range(len(prompts) - 1, end - 1, -1))
        for other in chain(near, far):
            if prompts[other] != prompts[row] and completions[other] != completions[row]:
                found.append(other)
                break
        else:
            raise ValueError("KTO needs completions that belong to other prompts: a row finds none among the others")
    return found


def with_mismatched(split: Dataset, size: int, max_length: int) -> Dataset:
    """A column more: ``mismatched_ids``."""
    completions = split["completion_ids"][:]
    others = mismatched(split["group"][:], completions, size)
    room = [max_length - len(prompt) for prompt in split["prompt_ids"]]
    return split.add_column("mismatched_ids", [completions[other][:n] for other, n in zip(others, room)])


def collate(rows: list[dict[str, Any]], pad_token_id: int) -> dict[str, Any]:
    """A batch of B sequences, and under ``mismatched`` B more where the rows have completions for it."""
    import preferences
    import torch

    batch: dict[str, Any] = preferences.collate(rows, pad_token_id, ["completion_ids"])
    if "mismatched_ids" in rows[0]:
        batch["mismatched"] = preferences.collate(rows, pad_token_id, ["mismatched_ids"])
    for name, part in (("ref_logps", batch), ("ref_mismatched_logps", batch.get("mismatched"))):
        if name in rows[0]:
            part["ref_logps"] = torch.tensor([row[name] for row in rows], dtype=torch.float64)
    for name in ("label", "group"):
        batch[name] = torch.tensor([row[name] for row in rows])
    return batch


def with_reference(
    split: Dataset, model: Any, accelerator: Accelerator, size: int, collator: Any, compiled: bool | None
) -> Dataset:
    """Columns more: the log-probabilities of completions, and of mismatched ones, by the model before training."""
    from loop_parts import for_each_row, logps

    def score(batch: dict[str, Any], part: str) -> Tensor:  # (B,)
        return logps(accelerator, model, batch[part] if part else batch, compiled)

    parts = {"ref_logps": ""} | ({"ref_mismatched_logps": "mismatched"} if "mismatched_ids" in split.features else {})
    found = {
        name: for_each_row(split, partial(score, part=part), accelerator, size, collator).tolist()
        for name, part in parts.items()
    }
    for name, values in found.items():
        split = split.add_column(name, values)
    return split


# ---- training


def make_loss(name: str, beta: float, weights: tuple[float, float], compiled: bool | None) -> Any:
    import alignment

    of_class = {} if name == "bco" else dict(zip(("desirable_weight", "undesirable_weight"), weights))
    kind, options = LOSSES[name]
    return getattr(alignment, kind)(beta=beta, compiled=compiled, **options, **of_class)


class Log(list):
    """Rows of numbers, which go into a checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        return {"rows": list(self)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self[:] = state["rows"]


def point_of(out: LossOutput | dict[str, Tensor], beta: float) -> Tensor:
    """The reward from which on the loss holds a completion to be desirable: delta, or beta times kl."""
    metrics = out if isinstance(out, dict) else out.metrics
    found = metrics["delta"] if "delta" in metrics else beta * metrics["kl"]
    return found.flatten()[0]


def means_of(found: Sequence[LossOutput], beta: float, accelerator: Accelerator) -> list[float]:
    """Of a step: the loss, rewards of desirable and undesirable sequences, and the reference point at its end. A class
    counts by its sequences, of which a process may have none."""
    import torch

    sums = []
    for out in found:
        one = torch.ones_like(out.loss)
        pairs = (out.loss.detach(), one), out.sums["rewards/chosen"], out.sums["rewards/rejected"]
        sums.append(torch.stack([torch.stack([total.double(), n.double()]) for total, n in pairs]))
    totals, counts = accelerator.reduce(torch.stack(sums).sum(0), "sum").unbind(1)
    return [*(totals / counts).tolist(), point_of(found[-1], beta).item()]


# ---- results


def comparisons(scores: Tensor, desirable: Tensor) -> Tensor:  # (desirable ones, others)
    """1 where the desirable one has more, 0 where it has less, one half where they are equal."""
    difference = scores[desirable][:, None] - scores[~desirable]
    return difference.sign().add(1).div(2)


def summary(when: str, x: dict[str, Tensor]) -> dict[str, Any]:
    """A row of the table."""
    desirable, rewards = x["desirable"], x["rewards"]
    same = x["group"][desirable][:, None] == x["group"][~desirable]
    beyond = (rewards > x["point"]) == desirable
    return {
        "": when,
        "all pairs": comparisons(rewards, desirable).mean().item(),
        "same prompt": comparisons(rewards, desirable)[same].mean().item(),
        "likelier": comparisons(x["logps"], desirable)[same].mean().item(),
        "right side": ((beyond[desirable].double().mean() + beyond[~desirable].double().mean()) / 2).item(),
        "mean, desirable": rewards[desirable].mean().item(),
        "mean, others": rewards[~desirable].mean().item(),
        "point": x["point"].item(),
    }


def show_data(train: Dataset, test: Dataset, weights: tuple[float, float]) -> None:
    n, m = sum(train["label"]), sum(test["label"])
    console.print(
        f"{len(train):,} completions, {n:,} desirable; {len(test):,} held out, {m:,} desirable. Weights: desirable "
        f"{weights[0]:.3g}, undesirable {weights[1]:.3g}",
        soft_wrap=True,
    )


def rich_table(rows: list[dict[str, Any]], loss: str) -> Table:
    table = Table(
        title=f"{loss}, held-out completions",
        caption="all pairs, same prompt: in how many a desirable completion has more reward than an undesirable one "
        "(equal ones count half); likelier: in how many of the same prompt it is more likely. Right side: desirable "
        "ones above the reference point, undesirable ones not; the mean over both classes. Mean: of rewards",
    )
    for n, key in enumerate(rows[0]):
        table.add_column(key.replace(" ", "\n"), justify="right" if n else "left")
    for row in rows:
        when, *numbers = row.values()
        table.add_row(when, *("" if number != number else f"{number:.3f}" for number in numbers))
    return table


def plot(log: Sequence[Sequence[float]], after: dict[str, Tensor], title: str, path: Path) -> None:
    import matplotlib
    import torch

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    steps, _, *curves = zip(*log)
    for values, label, color in zip(curves, ("desirable", "undesirable", "reference point"), ("C0", "C1", "black")):
        left.plot(steps, values, label=label, color=color, linewidth=1)
    left.set(xlabel="step", ylabel="mean reward, training sequences")
    rewards, desirable = after["rewards"], after["desirable"]
    bins = torch.linspace(rewards.min().item(), rewards.max().item() + 1e-6, 41).tolist()
    for chosen, label, color in ((desirable, "desirable", "C0"), (~desirable, "undesirable", "C1")):
        right.hist(rewards[chosen].tolist(), bins=bins, label=label, color=color, alpha=0.6)
    right.axvline(after["point"].item(), color="black", linewidth=1, label="reference point")
    right.set(xlabel="reward after training", ylabel="held-out completions")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    common.run(main)
