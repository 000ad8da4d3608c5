"""What programs share that train a model on its own samples: prompts, a rule that rewards them, samples before and
after, a run that can be resumed, and what is left of it.

A prompt is what a function of an installed package is called, a sample what the model says that it does (see
docstrings.py and preferences.py, whose small model is this one's, too). The rule asks for a docstring in the third
person, of eight words, none of which comes twice. It reads strings alone: any prompts will do.
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import common
import docstrings
import typer
from common import console, has_fast_bf16, load_splits, quiet_and_offline
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:  # imported below where they are used: --help and a wrong option answer at once
    from datasets import Dataset

LAST = "trainer_state.json"  # of the files that a trainer writes into a checkpoint
SHOWN = 6  # samples in the table
WORDS = 8  # that an answer is to have
PARTS = ("reward", "third person", "length", "repeated", "words")

# ---- options

Name = Annotated[str, typer.Option(help="A folder or hub name; else a small one is made.")]
Data = Annotated[
    str, typer.Option(help="A csv, json or parquet file, a hub name, or a folder of Python code; else docstrings.")
]
Subset = Annotated[str, typer.Option(help="Configuration of a hub dataset.")]
Prompts = Annotated[int, typer.Option(min=2, help="Training prompts, at most.")]
HeldOut = Annotated[int, typer.Option(min=1, help="Prompts to measure on, at most.")]
NewTokens = Annotated[int, typer.Option(min=1, help="Of an answer.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Prompts that the model sees at a time.")]
Accumulate = Annotated[int, typer.Option(min=1, help="Such batches a step.")]
Steps = Annotated[int, typer.Option(min=1)]
Rate = Annotated[float, typer.Option(min=0)]
Temperature = Annotated[float, typer.Option(min=0.01, help="Of the answers in training.")]
Peer = Annotated[bool, typer.Option(help="TRL's trainer in the place of ours.")]
Compiled = Annotated[
    bool | None,
    typer.Option("--compile/--no-compile", help="The loss; else where it pays, and not for the small model."),
]
PretrainSteps = Annotated[int, typer.Option(min=0, help="Of the small model.")]
SaveEvery = Annotated[int, typer.Option(min=0, help="Steps; 0: at the end only.")]
Resume = Annotated[bool, typer.Option(help="Go on from the last checkpoint in --output.")]
StopAfter = Annotated[int, typer.Option(min=0, help="Stop after so many steps of this call; go on later.")]
Output = Annotated[Path, typer.Option(help="Folder for all results.")]
Quick = Annotated[bool, typer.Option(help="Only check that everything runs; teaches the model little.")]


@dataclass
class Run:
    """What the options say, but for the loss: that is in ``own``, by name."""

    model: str
    dataset: str
    subset: str
    prompts: int
    held_out: int
    max_new_tokens: int
    batch_size: int
    accumulate: int
    steps: int
    learning_rate: float
    temperature: float
    peer: bool
    compiled: bool | None
    pretrain_steps: int
    save_every: int
    resume: bool
    stop_after: int
    output: Path
    seed: int
    quick: bool
    own: dict[str, Any] = field(default_factory=dict)
    began: float = field(default_factory=time.perf_counter)

    @classmethod
    def of(cls, options: dict[str, Any]) -> Run:
        """From all options of a program. Libraries that are imported from here on are quiet."""
        shared = {one.name for one in fields(cls)} & options.keys()
        run = cls(**{name: options[name] for name in shared}, own={k: v for k, v in options.items() if k not in shared})
        if run.quick:
            run.prompts, run.held_out = min(run.prompts, 400), min(run.held_out, 50)
            run.batch_size, run.steps = min(run.batch_size, 8), min(run.steps, 4)
            run.pretrain_steps = min(run.pretrain_steps, 20)
        if run.compiled is None and not run.model:
            run.compiled = False
        quiet_and_offline(offline=all(not name or Path(name).exists() for name in (run.model, run.dataset)))
        warnings.filterwarnings("ignore", category=FutureWarning)  # between TRL and transformers
        warnings.filterwarnings("ignore", message=".*importing from 'trl.experimental'")
        return run

    @property
    def told(self) -> dict[str, Any]:
        """What makes it another run where it differs."""
        aside = {"dataset", "subset", "prompts", "held_out", "compiled", "save_every", "resume", "stop_after"}
        aside |= {"output", "quick", "own", "began"}
        return {name: value for name, value in asdict(self).items() if name not in aside} | self.own

    def arguments(self, **more: Any) -> dict[str, Any]:
        """Of a config of TRL."""
        device = _device()
        return {
            "output_dir": str(self.output),
            "temperature": self.temperature,
            "per_device_train_batch_size": self.batch_size,
            "gradient_accumulation_steps": self.accumulate,
            "max_steps": self.steps,
            "learning_rate": self.learning_rate,
            "warmup_steps": max(1, self.steps // 10),
            "gradient_checkpointing": bool(self.model),
            "bf16": has_fast_bf16(device) and bool(self.model),
            "use_cpu": device.type == "cpu",
            "dataloader_pin_memory": device.type == "cuda",
            "save_strategy": "steps",
            "save_steps": self.save_every or self.steps,
            "save_total_limit": 2,
            "seed": self.seed,
            "logging_steps": 1,
            "report_to": "none",
            "disable_tqdm": True,
            **more,
        }


def _device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextlib.contextmanager
def mistakes_told() -> Iterator[None]:
    """What a user can mend is told in a line."""
    try:
        yield
    except ValueError as error:
        common.show_error(error)
        raise typer.Exit(2) from error


# ---- prompts and rewards


def load_prompts(name: str, subset: str, rows: int, held_out: int, model: str, seed: int) -> tuple[Dataset, Dataset]:
    """(training, held out): a column ``prompt``, and completions where a small model is to learn from them first."""
    import preferences

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


@dataclass
class Start:
    """Before the training: a model, a copy to train, and what there is to learn from."""

    model: Any
    policy: Any
    tokenizer: Any
    train: Dataset
    held_out: Dataset
    checkpoint: Path | None
    measured: dict[str, Any]


def start(run: Run) -> Start:
    """Data, a look at what lies in the folder, and a model that is measured."""
    import pair_parts
    import preferences

    train, test = load_prompts(run.dataset, run.subset, run.prompts, run.held_out, run.model, run.seed)
    run.own["data"] = pair_parts.digest(train)
    checkpoint = pair_parts.begin(run.output, run.told, run.resume, LAST)
    with console.status("Loading the model" if run.model else "Pre-training") as status:

        def tell(step: int, steps: int, loss: float) -> None:
            status.update(f"Pre-training, step {step} of {steps}: loss {loss:.2f}")

        model, tokenizer = preferences.load_model(
            run.model, train, run.pretrain_steps, _device(), "float32", run.seed, tell
        )
        measured = measure(model, tokenizer, test, run.max_new_tokens, run.seed)
    policy = copy.deepcopy(model)
    return Start(model, policy, tokenizer, train.select_columns(["prompt"]), test, checkpoint, measured)


def learn(run: Run, begun: Start, trainer: Any, title: str, watched: dict[str, str], logged: Sequence[str]) -> None:
    """Train, measure again, and leave the results, a plot and the model. ``logged``: what of the log is kept."""
    try:
        log, seconds = fit(trainer, watched, begun.checkpoint, run.stop_after)
    except KeyboardInterrupt:
        console.print("Stopped. The same command with --resume goes on from the last checkpoint.")
        raise typer.Exit(130) from None
    trainer.accelerator.unwrap_model(begun.policy, keep_fp32_wrapper=False)  # or it would be measured in bfloat16
    done = trainer.state.global_step
    after = measure(begun.policy, begun.tokenizer, begun.held_out, run.max_new_tokens, run.seed)
    result = {"title": f"{title}, {run.batch_size * run.accumulate} prompts a step", "run": run.told}
    result |= {"finished": done >= run.steps, "log": [{name: entry[name] for name in logged} for entry in log]}
    result |= compared(begun.held_out, begun.measured, after) | {"seconds": seconds}
    show(result)
    write(result, run.output)
    plot(result, watched, run.output / "results.png")
    if not result["finished"]:
        console.print(f"Stopped after step {done} of {run.steps}. The same command with --resume goes on from there.")
        return
    for part in (begun.policy, begun.tokenizer):
        part.save_pretrained(run.output / "model")
    console.print(
        f"{run.steps} steps took {seconds:.0f} s, everything {time.perf_counter() - run.began:.0f} s. Results, plot "
        f"and model: {run.output}"
    )


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
