"""What programs share that train a model on its own samples: prompts, a rule that rewards them, samples before and
after, a run that can be resumed, and what is left of it.

A prompt is what a function of an installed package is called, a sample what the model says that it does (see
docstrings.py and preferences.py, whose small model is this one's, too). The rule asks for a docstring in the third
person, of eight words, none of which comes twice. It reads strings alone: any prompts will do.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import docstrings
import preferences
from common import console, load_splits
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:  # imported below where they are used: --help and a wrong option answer at once
    from datasets import Dataset

LAST = "trainer_state.json"  # of the files that a trainer writes into a checkpoint
SHOWN = 6  # samples in the table
WORDS = 8  # that an answer is to have
PARTS = ("reward", "third person", "length", "repeated", "words")

# ---- prompts and rewards


def load_prompts(name: str, subset: str, rows: int, held_out: int, model: str, seed: int) -> tuple[Dataset, Dataset]:
    """(training, held out): a column ``prompt``, and completions where a small model is to learn from them first."""
    if not name or docstrings.is_code(name):
        return preferences.load_pairs(name, subset, rows, held_out, seed)
    train, test = load_splits(name, subset, ("prompt",), "training on samples", held_out, seed, preferences.SIDES)
    if not model and not {*preferences.SIDES} & {*train.column_names}:
        raise ValueError(f"--dataset {name}: prompts alone need a model: name one with --model")
    return train.select(range(min(rows, len(train)))), test.select(range(min(held_out, len(test))))


def graded(completion: Any) -> dict[str, float]:
    """What the rule finds of a completion: its reward, and the parts of that."""
    said = re.findall(r"[a-z]+", text_of(completion).lower())
    third = bool(said) and said[0][-1] == "s" and said[0][-2:] not in ("ss", "is", "us")
    found = {
        "third person": float(third),
        "length": max(0.0, 1 - abs(len(said) - WORDS) / WORDS),
        "repeated": 1 - len({*said}) / max(1, len(said)),
    }
    return {"reward": found["third person"] + found["length"] - found["repeated"], **found, "words": float(len(said))}


def rule(completions: Sequence[Any], **_: Any) -> list[float]:
    """A reward function as TRL's trainers take it."""
    return [graded(completion)["reward"] for completion in completions]


def text_of(said: Any) -> str:
    """Of a text, or of the last message of a conversation."""
    return said if isinstance(said, str) else said[-1]["content"]


# ---- samples


def sample(model: Any, tokenizer: Any, prompts: Sequence[Any], tokens: int, seed: int, size: int = 128) -> list[str]:
    """One completion a prompt, drawn from the model as it is."""
    import torch

    texts = prompts
    if not isinstance(prompts[0], str):
        texts = [tokenizer.apply_chat_template(p, add_generation_prompt=True, tokenize=False) for p in prompts]
    was_training = model.training
    model.eval()
    found: list[str] = []
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for start in range(0, len(texts), size):
            batch = tokenizer(
                texts[start : start + size], return_tensors="pt", padding=True, padding_side="left",
                add_special_tokens=False, return_token_type_ids=False,
            ).to(model.device)  # fmt: skip
            ids = model.generate(
                **batch, do_sample=True, top_k=0, max_new_tokens=tokens, pad_token_id=tokenizer.pad_token_id
            )
            found += tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    model.train(was_training)
    return found


def measure(model: Any, tokenizer: Any, held_out: Dataset, tokens: int, seed: int) -> dict[str, Any]:
    """Samples at held-out prompts, and the means of what the rule finds of them."""
    prompts = list(held_out["prompt"])
    completions = sample(model, tokenizer, prompts, tokens, seed)
    grades = [graded(completion) for completion in completions]
    means = {name: sum(grade[name] for grade in grades) / len(grades) for name in PARTS}
    return {"samples": completions, "grades": grades, "means": means}


# ---- training


def fit(
    trainer: Any, watched: dict[str, str], resume_from: Path | None, stop_after: int
) -> tuple[list[dict[str, Any]], float]:
    """(what was logged, seconds) of a trainer of TRL, with a progress bar of ours that shows ``watched``: names in the
    log, and what to call them."""
    from transformers import PrinterCallback, TrainerCallback, TrainerState

    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"),
        TimeRemainingColumn(), console=console,
    )  # fmt: skip
    task = bar.add_task("Training", total=trainer.args.max_steps)

    class ShowAndStop(TrainerCallback):
        begun_at = 0

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.begun_at = state.global_step

        def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
            shown = [f"{label} {logs[name]:.3f}" for name, label in watched.items() if name in (logs or {})]
            if shown:
                bar.update(task, completed=state.global_step, description=", ".join(shown))

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if stop_after and state.max_steps > state.global_step >= self.begun_at + stop_after:
                control.should_save = control.should_training_stop = True

    trainer.add_callback(ShowAndStop())
    trainer.remove_callback(PrinterCallback)
    began = time.perf_counter()
    saved = TrainerState.load_from_json(str(resume_from / LAST)) if resume_from else None
    with bar:
        if saved is not None and saved.global_step >= trainer.args.max_steps:  # train() would make a step more
            trainer._load_from_checkpoint(str(resume_from))
            trainer.state = saved
        else:
            trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    log = [entry for entry in trainer.state.log_history if watched.keys() <= entry.keys()]
    return log, time.perf_counter() - began


# ---- results


def compared(held_out: Dataset, before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """For results.json: means, and the samples that are shown."""
    samples = [
        {
            "prompt": text_of(held_out[k]["prompt"]),
            **{
                f"{when} reward": found["grades"][k]["reward"] for when, found in (("before", before), ("after", after))
            },
            "before": before["samples"][k],
            "after": after["samples"][k],
        }
        for k in range(min(SHOWN, len(held_out)))
    ]
    return {"held out": {"before": before["means"], "after": after["means"]}, "samples": samples}


def show(result: dict[str, Any]) -> None:
    means = result["held out"]
    table = Table(title="Held-out prompts", caption="reward = third person + length - repeated")
    table.add_column("")
    for name in PARTS:
        table.add_column(name, justify="right")
    for when, row in means.items():
        table.add_row(when, *(f"{row[name]:.2f}" for name in PARTS))
    console.print(table)
    for row in result["samples"]:
        console.print(f"    {row['prompt']}"[:150], style="dim", markup=False, highlight=False, soft_wrap=True)
        for when in ("before", "after"):
            text = " ".join(row[when].split())
            told = f"        {when:>6} {row[f'{when} reward']:5.2f}  {text}"
            console.print(told[:150], markup=False, highlight=False, soft_wrap=True)


def plot(result: dict[str, Any], curves: dict[str, str], file: Path) -> None:
    """The logged curves, each with a label, and what the rule found before and after."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(curves) + 1, figsize=(4.5 * (len(curves) + 1), 4), layout="constrained")
    steps = [entry["step"] for entry in result["log"]]
    for axis, (name, label) in zip(axes, curves.items()):
        axis.plot(steps, [entry[name] for entry in result["log"]], marker=".")
        axis.set(xlabel="step", ylabel=f"{label}, samples of a step")
        axis.grid(alpha=0.3)
    for k, (when, row) in enumerate(result["held out"].items()):
        places = [n + 0.4 * (k - 0.5) for n in range(len(PARTS) - 1)]
        axes[-1].bar(places, [row[name] for name in PARTS[:-1]], 0.4, label=when, color=("lightgrey", "C0")[k])
    axes[-1].set_xticks(range(len(PARTS) - 1), PARTS[:-1])
    axes[-1].set(ylabel="mean over held-out prompts")
    axes[-1].legend()
    figure.suptitle(result["title"])
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def write(result: dict[str, Any], output: Path) -> None:
    part = output / "results.part"
    part.write_text(json.dumps(result, indent=1))
    part.replace(output / "results.json")
