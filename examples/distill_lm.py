"""Does a teacher help? One student trained several ways, on the same text, for as many steps, from the same weights.

    python examples/distill_lm.py
    python examples/distill_lm.py --loss reverse_kl --loss taid --steps 600
    python examples/distill_lm.py --teacher runs/distill_lm/teacher --offline runs/topk --loss topk
    python examples/distill_lm.py --teacher Qwen/Qwen3-1.7B --student Qwen/Qwen3-0.6B --dataset corpus.jsonl --bf16

By default nothing is downloaded: two small Llamas from configs, the docstrings of installed packages, and a tokenizer
trained on them. The teacher is trained first (--teacher-steps). Then students: with the labels alone ("ce"), and with
each --loss beside them. "topk" learns from the teacher's top k on a disk (see teacher_topk.py), which is written here,
or given by --offline. Held-out perplexity and agreement with the teacher: a table, results.csv and a plot.

The default takes about ten minutes of one CPU core. One seed says that a teacher helps, not by how much: seeds 0 and 1
took 38% and 20% off the perplexity with "kl", 22% and 9% with "topk".
"""

from __future__ import annotations

import copy
import csv
import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import common
import docstrings
import teacher_topk
import typer
from common import console, quiet_and_offline
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:  # imported below where they are used: --help and a wrong option answer at once
    from datasets import Dataset
    from torch import nn

    from distill import DistillationLoss

DIVERGENCES = ("kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd", "alpha_beta", "adaptive_kl", "taid")
TITLES = {"ce": "labels alone", "topk": "labels and top-k KL, offline"}
HELD_OUT_TOKENS = 16_000
METRICS = ("perplexity", "agreement", "KL(teacher|student)")


class Setting(NamedTuple):
    """What all trainings share."""

    batch_size: int
    warm_up: float
    compiled: bool
    bf16: bool
    seed: int
    folder: Path


def main(
    loss: Annotated[
        list[str],
        typer.Option(help=f"What is added to the labels' loss, as often as you like: {', '.join(DIVERGENCES)}, topk."),
    ] = ["kl", "jsd", "topk"],  # noqa: B006 -- typer copies it
    teacher: Annotated[str, typer.Option(help="A folder or hub name, with its tokenizer; else one is trained.")] = "",
    student: Annotated[str, typer.Option(help="A folder or hub name; else a small Llama without training.")] = "",
    offline: Annotated[str, typer.Option(help="A folder of teacher_topk.py: its rows are the training data.")] = "",
    dataset: Annotated[
        str,
        typer.Option(
            help="A hub name; a csv, json, parquet or txt file; or a folder of txt and md files, or of Python code. "
            "Or docstrings."
        ),
    ] = "",
    subset: Annotated[str, typer.Option(help="Configuration of a hub dataset.")] = "",
    split: Annotated[str, typer.Option(help='Of a hub dataset, as in "train[:1%]".')] = "train",
    column: Annotated[str, typer.Option(help="The dataset's column of texts.")] = "text",
    characters: Annotated[int, typer.Option(min=10_000, help="How much of the docstrings.")] = 3_000_000,
    vocabulary: Annotated[int, typer.Option(min=300, help="Of the tokenizer that is trained here.")] = 4096,
    steps: Annotated[int, typer.Option(min=1, help="Of each student.")] = 300,
    teacher_steps: Annotated[int, typer.Option(min=1, help="Of a teacher that is trained here.")] = 700,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows a step.")] = 8,
    block: Annotated[int, typer.Option(min=8, help="Tokens of a row.")] = 128,
    learning_rate: Annotated[float, typer.Option(min=0, help="Of the students.")] = 3e-3,
    weight_hard: Annotated[
        float, typer.Option(min=0, max=1, help="Of the labels' loss; the rest is the soft one.")
    ] = 0.5,
    temperature: Annotated[float, typer.Option(help="Of the soft loss, which is multiplied by its square.")] = 1.0,
    k: Annotated[int, typer.Option(min=1, help="Entries of a token, for topk.")] = 32,
    teacher_size: Annotated[str, typer.Option(help="Hidden size and layers of the teacher that is trained.")] = "192,3",
    student_size: Annotated[str, typer.Option(help="Hidden size and layers of the small student.")] = "96,2",
    eval_every: Annotated[int, typer.Option(min=1, help="Steps.")] = 75,
    bf16: Annotated[bool, typer.Option(help="Train under bfloat16 autocast.")] = False,
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="The losses; the numbers are equal.")
    ] = False,
    output: Annotated[Path, typer.Option(help="Folder for all results.")] = Path("runs/distill_lm"),
    seed: int = 0,
    quick: Annotated[bool, typer.Option(help="Only check that everything runs.")] = False,
) -> None:
    """Train a teacher and the students, and compare them."""
    started = time.perf_counter()
    if quick:
        characters, vocabulary, block = min(characters, 200_000), min(vocabulary, 512), min(block, 32)
        steps, teacher_steps, batch_size, k = min(steps, 2), min(teacher_steps, 2), min(batch_size, 4), min(k, 4)
        teacher_size, student_size = "32,2", "16,1"
    quiet_and_offline(offline=all(not name or Path(name).exists() for name in (teacher, student, dataset)))
    names = list(dict.fromkeys(["ce", *loss]))
    try:
        if unknown := [name for name in names[1:] if name not in (*DIVERGENCES, "topk")]:
            raise ValueError(f"--loss is one of {', '.join(DIVERGENCES)} or topk, got {', '.join(unknown)}")
        sizes = [
            read_size(name, text) for name, text in (("--teacher-size", teacher_size), ("--student-size", student_size))
        ]
        manifest, stored = teacher_topk.load(Path(offline)) if offline else (None, None)
        # What is left of the vocabulary is known at the temperature alone that was stored.
        kept = {"topk": manifest["temperature"]} if manifest else {}
        losses = {name: build_loss(name, weight_hard, kept.get(name, temperature), compiled) for name in names}
        teacher = teacher or (manifest or {}).get("model", "")
        train, held_out, tokenizer = load_data(
            teacher, dataset, subset, split, column, characters, vocabulary, block, seed, stored
        )
        big = load_lm(teacher) if teacher else llama(*sizes[0], tokenizer, block, seed)
        if manifest and manifest["weights"] != teacher_topk.fingerprint(big):
            raise ValueError(f"--offline {offline}: its teacher was another one, {manifest.get('model')}")
        if "topk" in names and not manifest:
            teacher_topk.check(big, k, temperature)
        small = load_lm(student) if student else llama(*sizes[1], tokenizer, block, seed + 1)
    except ValueError as error:
        common.show_error(error)
        raise typer.Exit(2) from error

    setting = Setting(batch_size, 0.1, compiled, bf16, seed, output)
    console.print(
        f"{len(train):,} rows of {block} tokens, {len(held_out):,} held out; vocabulary {len(tokenizer):,}; "
        f"teacher {millions(big)}, student {millions(small)} parameters"
    )
    history: list[dict[str, Any]] = []
    if not teacher:
        labels = build_loss("ce", 1.0, 1.0, compiled)
        fit("teacher", big, train, labels, setting, teacher_steps, learning_rate=3e-3)
        big.save_pretrained(str(output / "teacher"))
        tokenizer.save_pretrained(str(output / "teacher"))
    history.append({"loss": "teacher", "step": 0, **measure(big, big, held_out, batch_size)})

    if not manifest:  # the students' rows: the same for all, in the same order
        train = train.shuffle(seed=seed).select(range(min(len(train), steps * batch_size)))
    if "topk" in names and not manifest:
        shutil.rmtree(output / "topk", ignore_errors=True)
        stored = teacher_topk.write(
            output / "topk",
            big,
            train,
            k=k,
            temperature=temperature,
            batch_size=batch_size,
            told={"model": teacher or str(output / "teacher")},
        )
    seconds = {}
    for name in names:
        model = copy.deepcopy(small)

        def evaluate(step: int, name: str = name, model: nn.Module = model) -> None:
            history.append({"loss": name, "step": step, **measure(model, big, held_out, batch_size)})

        data = stored if name == "topk" else train
        seconds[name] = fit(
            name, model, data, losses[name], setting, steps, learning_rate,
            teacher=big if name not in ("ce", "topk") else None, evaluate=evaluate, eval_every=eval_every,
        )  # fmt: skip
        for part in (model, tokenizer):
            part.save_pretrained(str(output / f"student-{name}"))

    run = {"teacher": teacher or teacher_size, "student": student or student_size, "steps": steps, "seed": seed}
    run |= {"weight of the labels": weight_hard, "temperature": temperature, "batch size": batch_size, "block": block}
    save(history, run, output)
    plot(history, names, f"{steps} steps of {batch_size} x {block} tokens, seed {seed}", output / "results.png")
    console.print(table(history, names, seconds))
    console.print(
        f"One seed: {seed}. Everything took {time.perf_counter() - started:.0f} s. Models, numbers and plot: {output}"
    )


# ---- data


def load_data(
    teacher: str,
    dataset: str,
    subset: str,
    split: str,
    column: str,
    characters: int,
    vocabulary: int,
    block: int,
    seed: int,
    stored: Dataset | None,
) -> tuple[Dataset, Dataset, Any]:
    """(training rows, held-out rows, tokenizer); rows of `input_ids`. No text is in both."""
    from datasets import Dataset

    with console.status("Reading texts"):
        if not teacher_topk.reads_docstrings(dataset):
            texts = teacher_topk.load_texts(dataset, subset, split, column, characters)
            if len(texts) < 12:
                raise ValueError(f"--dataset {dataset}: expected 12 texts at least, got {len(texts)}")
            sides = texts.train_test_split(test_size=max(1, min(2000, len(texts) // 12)), seed=seed)
            train, held_out = sides["train"], sides["test"]
        else:
            train, held_out = (Dataset.from_dict({"text": side}) for side in docstrings.documents(characters, dataset))
        tokenizer = teacher_topk.load_tokenizer(teacher) if teacher else train_tokenizer(train, vocabulary)
        train, held_out = (side.shuffle(seed=seed) for side in (train, held_out))
        rows = teacher_topk.tokenised(tokenizer, held_out, block, pack=True)
        rows = rows.select(range(min(len(rows), max(1, HELD_OUT_TOKENS // block))))
        if stored is not None:
            return stored.select_columns(["input_ids"]), rows, tokenizer
        return teacher_topk.tokenised(tokenizer, train, block, pack=True), rows, tokenizer


def train_tokenizer(texts: Dataset, vocabulary: int) -> Any:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts["text"], vocabulary, special_tokens=["<|end|>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token="<|end|>", pad_token="<|end|>")


# ---- models


def read_size(option: str, text: str) -> tuple[int, int]:
    try:
        hidden, layers = (int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{option} takes hidden size and layers, as in 256,4, got {text!r}") from None
    if hidden < 16 or hidden % 16 or layers < 1:
        raise ValueError(f"{option} {text}: expected a hidden size that 16 divides, and a layer at least")
    return hidden, layers


def llama(hidden: int, layers: int, tokenizer: Any, block: int, seed: int) -> nn.Module:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=8 * hidden // 3 // 16 * 16,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 32),
        max_position_embeddings=max(block, 512),
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config).to("cuda" if torch.cuda.is_available() else "cpu")


def load_lm(name: str) -> nn.Module:
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(name)
    except OSError as error:  # no such folder, no such name, no network
        raise ValueError(f"expected a causal language model, got {name!r}: {error}") from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def millions(model: nn.Module) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M"


# ---- training


def build_loss(name: str, weight_hard: float, temperature: float, compiled: bool) -> DistillationLoss:
    from distill import DistillLoss, TopKLoss

    if name == "ce":
        return DistillLoss([("ce", 1.0)], compiled=compiled)
    options: dict[str, Any] = {"scale_by_t2": True, "compiled": compiled}
    if name == "topk":
        hard = {"weight_hard": weight_hard, "weight_soft": 1 - weight_hard}
        return TopKLoss("kl", temperature=temperature, teacher_temperature=temperature, **hard, **options)
    return DistillLoss([("ce", weight_hard), (name, 1 - weight_hard)], temperature, **options)


def fit(
    title: str,
    model: nn.Module,
    data: Any,
    loss: DistillationLoss,
    setting: Setting,
    steps: int,
    learning_rate: float,
    teacher: nn.Module | None = None,
    evaluate: Callable[[int], None] | None = None,
    eval_every: int = 1,
) -> float:
    """Seconds of the ordinary trainer, evaluations left out."""
    from transformers import PrinterCallback, TrainerCallback, TrainingArguments

    from distill.trainer import DistillTrainer

    settings = TrainingArguments(
        output_dir=str(setting.folder / "trainer"),
        per_device_train_batch_size=setting.batch_size,
        max_steps=steps,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(setting.warm_up * steps),
        weight_decay=0.1,
        adam_beta2=0.95,
        bf16=setting.bf16,
        use_cpu=next(model.parameters()).device.type == "cpu",
        dataloader_drop_last=True,
        dataloader_pin_memory=next(model.parameters()).device.type == "cuda",
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=setting.seed,  # the same rows in the same order for all
    )
    bar = Progress(
        TextColumn(f"{title:>15}: {{task.description}}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=console,
    )  # fmt: skip
    task = bar.add_task("loss", total=steps)
    aside = 0.0

    class Show(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.look(0)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            bar.update(task, completed=state.global_step)
            if state.global_step % eval_every == 0 or state.global_step == steps:
                self.look(state.global_step)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                bar.update(task, description=f"loss {float(logs['loss']):.3f}")

        def look(self, step: int) -> None:
            nonlocal aside
            start = time.perf_counter()
            if evaluate is not None:
                evaluate(step)
            aside += time.perf_counter() - start

    trainer = DistillTrainer(
        model=model, teacher_model=teacher, loss=loss, args=settings, train_dataset=data, callbacks=[Show()]
    )
    trainer.remove_callback(PrinterCallback)
    start = time.perf_counter()
    with bar:
        trainer.train()
    model.eval()
    return time.perf_counter() - start - aside


def measure(student: nn.Module, teacher: nn.Module, held_out: Dataset, batch_size: int) -> dict[str, float]:
    """METRICS of held-out tokens: perplexity, how often both have the same first choice, how far they are apart."""
    import torch

    from chunked_embed import causal_lm
    from distill import KLDivLoss

    loss = KLDivLoss(weight_hard=1.0, report=["teacher_agreement"], compiled=False)
    training = student.training
    sums: dict[str, tuple[float, float]] = {}
    device = next(student.parameters()).device
    for model in (student.eval(), teacher.eval()):
        causal_lm.attach(model)
    for batch in held_out.iter(batch_size):
        ids = torch.tensor(batch["input_ids"], device=device)
        mine, theirs = (causal_lm.capture(model, {"input_ids": ids}).shifted() for model in (student, teacher))
        with torch.no_grad():
            found = loss(mine, theirs, target=ids[:, 1:]).sums
        for name, (total, count) in found.items():
            before, seen = sums.get(name, (0.0, 0.0))
            sums[name] = before + float(total), seen + float(count)
    student.train(training)
    means = {name: total / count for name, (total, count) in sums.items()}
    return dict(zip(METRICS, (math.exp(means["ce"]), means["teacher_agreement"], means["kl"])))


# ---- results


def title_of(name: str) -> str:
    return TITLES.get(name, f"labels and {name.replace('_', ' ')}")


def at_end(history: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return [row for row in history if row["loss"] == name][-1]


def table(history: list[dict[str, Any]], names: list[str], seconds: dict[str, float]) -> Table:
    result = Table("student learned from", title="Held out")
    for heading in (
        "perplexity",
        "against labels alone",
        "agreement with\nthe teacher's choice",
        "KL from\nthe teacher",
        "s",
    ):
        result.add_column(heading, justify="right")
    own, reference = at_end(history, "teacher"), at_end(history, "ce")["perplexity"]
    result.add_row("(the teacher)", f"{own['perplexity']:.2f}", "", "", "", "", end_section=True)
    for name in names:
        row = at_end(history, name)
        change = f"{row['perplexity'] / reference - 1:+.1%}" if name != "ce" else ""
        perplexity, agreement, divergence = (row[metric] for metric in METRICS)
        values = [f"{perplexity:.2f}", change, f"{agreement:.1%}", f"{divergence:.3f}", f"{seconds[name]:.0f}"]
        result.add_row(title_of(name), *values)
    return result


def save(history: list[dict[str, Any]], run: dict[str, Any], folder: Path) -> None:
    """results.csv: a row for each evaluation; run.json: the settings."""
    (folder / "run.json").write_text(json.dumps(run, indent=1))
    with open(folder / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(history[0]))
        writer.writeheader()
        writer.writerows(history)


def plot(history: list[dict[str, Any]], names: list[str], title: str, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for axis, metric in zip(axes, METRICS):
        for i, name in enumerate(names):
            rows = [row for row in history if row["loss"] == name]
            look = {"color": "black", "linestyle": "--"} if name == "ce" else {"color": f"C{i - 1}"}
            steps, values = [row["step"] for row in rows], [row[metric] for row in rows]
            axis.plot(steps, values, marker=".", label=title_of(name), **look)
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
    perplexity, agreement = axes
    own = at_end(history, "teacher")["perplexity"]
    perplexity.axhline(own, color="grey", linewidth=1, label=f"the teacher, {own:.1f}")
    perplexity.set(xlabel="step", ylabel="held-out perplexity", yscale="log")
    for formatter in (perplexity.yaxis.set_major_formatter, perplexity.yaxis.set_minor_formatter):
        formatter("{x:.0f}")
    agreement.set(xlabel="step", ylabel="held-out tokens with the teacher's first choice")
    perplexity.legend()
    figure.suptitle(title)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    common.run(main)
