"""Preference training with TRL's trainer on chunked losses, several losses side by side.

    python examples/train_dpo.py
    python examples/train_dpo.py --loss-type sigmoid,irpo,dpop,fpo_js --steps 120
    python examples/train_dpo.py --loss-type sigmoid+sft --model Qwen/Qwen3-0.6B --learning-rate 1e-6 \
        --dataset trl-lib/ultrafeedback_binarized --max-length 2048 --precompute

Every loss starts from the same model. Held-out pairs are scored before and after: how often the chosen completion is
more likely than the rejected one, by how much, and what became of the chosen one's own likelihood. By default a small
model made on the spot learns from pairs made of docstrings (see preferences.py). Without TRL, and on several
processes: dpo_loop.py.
"""

from __future__ import annotations

import copy
import csv
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import common
import typer
from common import console, has_fast_bf16, quiet_and_offline
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:  # imported below where they are used: --help and a wrong option answer at once
    from datasets import Dataset
    from torch import Tensor

REFERENCE_FREE = ("simpo", "cpo", "orpo")
SMOOTHING = {"exo_pair": 1e-3, "cdpo": 0.1}  # losses that are nothing, or nothing else than sigmoid, without
CURVES = {"rewards/margins": "margin of rewards", "rewards/accuracies": "accuracy of rewards"}
LOGGED = ("step", "loss", *CURVES, "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")


def main(
    loss_type: Annotated[
        str,
        typer.Option(
            help="Losses to compare, with commas: those of TRL's DPOConfig, sigmoid+sft for a sum of two; irpo, dpop, "
            "rdpo, tdpo1, tdpo2, fpo_js and other fpo_...; cdpo; simpo, cpo, orpo."
        ),
    ] = "sigmoid,ipo,sigmoid+sft,simpo",
    beta: Annotated[float, typer.Option(min=0, help="How strongly the policy is held to the reference.")] = 0.1,
    model: Annotated[str, typer.Option(help="A folder or hub name; else a small one is made.")] = "",
    dataset: Annotated[
        str, typer.Option(help="A csv, json or parquet file, a hub name, or a folder of Python code; else docstrings.")
    ] = "",
    subset: Annotated[str, typer.Option(help="Configuration of a hub dataset.")] = "",
    pairs: Annotated[int, typer.Option(min=2, help="Training pairs, at most.")] = 6000,
    held_out: Annotated[int, typer.Option(min=1, help="Pairs to evaluate on, at most.")] = 600,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens a sequence is cut to.")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Pairs that the model sees at a time.")] = 32,
    accumulate: Annotated[int, typer.Option(min=1, help="Such batches a step.")] = 1,
    steps: Annotated[int, typer.Option(min=1)] = 80,
    learning_rate: Annotated[float, typer.Option(min=0)] = 1e-3,
    precompute: Annotated[bool, typer.Option(help="Score the reference once, and keep no copy of it.")] = False,
    compiled: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="The loss; else where it pays. The numbers are equal.")
    ] = None,
    pretrain_steps: Annotated[int, typer.Option(min=0, help="Of the small model.")] = 200,
    output: Annotated[Path, typer.Option(help="Folder for tables, plot and models.")] = Path("runs/train_dpo"),
    seed: int = 0,
) -> None:
    """Train one model for each loss, and compare them on held-out pairs."""
    started = time.perf_counter()
    local = all(not name or Path(name).exists() for name in (model, dataset))
    quiet_and_offline(offline=local)
    warnings.filterwarnings("ignore", category=FutureWarning)  # between TRL and transformers
    import preferences
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = [name.strip() for name in loss_type.split(",")]
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"),
        TimeRemainingColumn(), console=console,
    )  # fmt: skip
    with bar:
        try:
            trainers = make_losses(names, beta, compiled)
            train, test = preferences.load_pairs(dataset, subset, pairs, held_out, seed)
            task = bar.add_task("Pre-training", total=pretrain_steps, visible=not model)

            def tell(step: int, steps: int, loss: float) -> None:
                bar.update(task, completed=step, description=f"Pre-training, loss {loss:.2f}")

            start, tokenizer = preferences.load_model(model, train, pretrain_steps, device, "float32", seed, tell)
            encoded = preferences.encode(test, tokenizer, max_length)
            if not len(encoded):
                raise ValueError(f"nothing of the held-out completions is left at --max-length {max_length}")
        except ValueError as error:
            common.show_error(error)
            raise typer.Exit(2) from error
        show(train, test)

        def measure(policy: Any) -> Tensor:
            return preferences.score(policy, encoded, tokenizer.pad_token_id, compiled=compiled)

        from trl import DPOConfig

        before = measure(start)
        table = [summary("before", before, encoded)]
        curves: list[dict[str, Any]] = []
        for name in names:
            arguments = DPOConfig(
                output_dir=str(output / name),
                loss_type=config_names(name),
                beta=beta,
                label_smoothing=next((e for part, e in SMOOTHING.items() if part in name.split("+")), 0.0),
                max_length=max_length,
                per_device_train_batch_size=batch_size,
                gradient_accumulation_steps=accumulate,
                max_steps=steps,
                learning_rate=learning_rate,
                warmup_steps=max(1, steps // 10),
                precompute_ref_log_probs=precompute,
                gradient_checkpointing=bool(model),
                bf16=has_fast_bf16(device) and bool(model),
                use_cpu=device.type == "cpu",
                dataloader_pin_memory=device.type == "cuda",
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                seed=seed,
            )
            policy = copy.deepcopy(start)
            log, seconds = fit(policy, start, arguments, train, tokenizer, trainers[name], bar, name)
            curves += [{"loss type": name, **entry} for entry in log]
            table.append(summary(name, measure(policy), encoded, seconds))
            policy.save_pretrained(output / name)
            tokenizer.save_pretrained(output / name)

    write_csv(table, output / "results.csv")
    write_csv(curves, output / "steps.csv")
    plot(table, curves, output / "results.png")
    console.print(rich_table(table, len(encoded)))
    console.print(
        f"{steps} steps of {batch_size * accumulate} pairs for each loss took {time.perf_counter() - started:.0f} s, "
        f"everything included. Tables, plot and models: {output}"
    )


# ---- losses and training


def config_names(name: str) -> list[str]:
    """What DPOConfig is to read; it also wants a name where the loss is an object of ours."""
    return ["sigmoid"] if name in REFERENCE_FREE else name.split("+")


def make_losses(names: list[str], beta: float, compiled: bool | None) -> dict[str, dict[str, Any]]:
    """What ChunkedDPOTrainer takes beside its configuration, by loss: any object of ``alignment``, or options."""
    import alignment
    from alignment.trl import LOSS_TYPES

    objects = {
        "simpo": alignment.SimPOLoss,
        "cpo": alignment.CPOLoss,
        "orpo": alignment.ORPOLoss,
    }
    if not beta > 0:
        raise ValueError(f"--beta {beta}: expected a positive number")
    if len(set(names)) < len(names):
        raise ValueError(f"--loss-type {','.join(names)} names one twice")
    known = {*objects, *LOSS_TYPES, *alignment.functional.DPO_LOSSES}
    for name in names:
        for part in name.split("+"):
            if part not in known or (part in objects and part != name):
                raise ValueError(f"--loss-type {name}: expected one of {', '.join(sorted(known))}, or a sum of TRL's")
    return {
        name: {"loss": objects[name](beta=beta, compiled=compiled)}
        if name in objects
        else {"loss_options": {"compiled": compiled}}
        for name in names
    }


def fit(
    policy: Any, start: Any, arguments: Any, train: Dataset, tokenizer: Any, options: Any, bar: Progress, name: str
) -> tuple[list[dict[str, float]], float]:
    """(what was logged, seconds). Only the progress bar is ours: the rest is what TRL's trainer takes."""
    from transformers import PrinterCallback, TrainerCallback

    from alignment.trl import ChunkedDPOTrainer

    task = bar.add_task(name, total=arguments.max_steps)

    class ShowSteps(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
            if logs and "rewards/margins" in logs:
                text = f"{name}, loss {logs['loss']:.3f}, margin {logs['rewards/margins']:.2f}"
                bar.update(task, completed=state.global_step, description=text)

    trainer = ChunkedDPOTrainer(
        model=policy,
        ref_model=None if arguments.precompute_ref_log_probs else copy.deepcopy(start),
        args=arguments,
        train_dataset=train,
        processing_class=tokenizer,
        callbacks=[ShowSteps()],
        **options,
    )
    trainer.remove_callback(PrinterCallback)
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    trainer.accelerator.unwrap_model(policy, keep_fp32_wrapper=False)  # or it would be scored in bfloat16
    steps = [entry for entry in trainer.state.log_history if CURVES.keys() <= entry.keys()]
    return [{key: entry[key] for key in LOGGED} for entry in steps], seconds


# ---- results


def summary(name: str, scores: Tensor, held_out: Dataset, seconds: float = 0.0) -> dict[str, Any]:
    """A row of the table, from ``preferences.score``: accuracies, the margin of log-probabilities, and what became of
    the chosen completions' own."""
    import torch

    chosen, rejected, tokens, _ = scores
    preferred = (chosen > rejected).double()
    row: dict[str, Any] = {"loss": name, "accuracy": preferred.mean().item()}
    kinds = held_out["kind"] if "kind" in held_out.column_names else []
    for kind in sorted(set(kinds)):
        row[f"accuracy {kind}"] = preferred[torch.tensor([other == kind for other in kinds])].mean().item()
    row["margin"] = (chosen - rejected).mean().item()
    row["chosen token"] = (chosen.sum() / tokens.sum()).item()
    return row | {"seconds": seconds}


def show(train: Dataset, test: Dataset) -> None:
    console.print(f"{len(train):,} training pairs, {len(test):,} held out, for example:")
    for row in train.select(range(min(3, len(train)))):
        for text in (f"    {row.get('prompt', '')}", f"        + {row['chosen']}", f"        - {row['rejected']}"):
            console.print(text[:200], style="dim", markup=False, highlight=False, soft_wrap=True)


def rich_table(rows: list[dict[str, Any]], pairs: int) -> Table:
    table = Table(
        title=f"{pairs:,} held-out pairs",
        caption="accuracy: the chosen completion is likelier than the rejected one; margin: by how much, in "
        "log-probability; chosen token: its mean log-probability",
    )
    for key in rows[0]:
        table.add_column(key.replace(" ", "\n"), justify="left" if key == "loss" else "right", no_wrap=key == "loss")
    for row in rows:
        numbers = [f"{row[key]:.3f}" if "accuracy" in key else f"{row[key]:.2f}" for key in list(row)[1:-1]]
        seconds = f"{row['seconds']:.0f}" if row["seconds"] else ""
        table.add_row(row["loss"], *numbers, seconds, end_section=row is rows[0])
    return table


def write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def plot(table: list[dict[str, Any]], curves: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4), layout="constrained")
    for axis, (key, label) in zip(axes, CURVES.items()):
        for row in table[1:]:
            points = [entry for entry in curves if entry["loss type"] == row["loss"]]
            smooth = running_mean([entry[key] for entry in points], 5)
            axis.plot([entry["step"] for entry in points], smooth, label=row["loss"])
        axis.set(xlabel="step", ylabel=f"{label}, training pairs")
        axis.grid(alpha=0.3)
    measures = [key for key in table[0] if key.startswith("accuracy")]
    width = 0.8 / len(table)
    for n, row in enumerate(table):
        places = [k + (n - (len(table) - 1) / 2) * width for k in range(len(measures))]
        color = "lightgrey" if n == 0 else f"C{n - 1}"
        axes[2].bar(places, [row[key] for key in measures], width, label=row["loss"], color=color)
    axes[2].set_xticks(range(len(measures)), ["all pairs", *(m.removeprefix("accuracy ") for m in measures[1:])])
    axes[2].set(ylabel="chosen likelier than rejected, held-out pairs", ylim=(0, 1.05))
    axes[2].axhline(0.5, color="black", linewidth=0.8, linestyle=":")
    figure.legend(*axes[2].get_legend_handles_labels(), loc="outside upper center", ncols=len(table))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def running_mean(values: list[float], window: int) -> list[float]:
    return [sum(values[max(0, n - window + 1) : n + 1]) / min(window, n + 1) for n in range(len(values))]


if __name__ == "__main__":
    common.run(main)
