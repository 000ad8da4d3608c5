"""Contrastive pre-training at a large batch: every other pair of the batch is a negative, as many as you ask for.

    python examples/train_contrastive.py
    python examples/train_contrastive.py --loss symmetric --batch-size 4096 --matryoshka 384,192,96
    python examples/train_contrastive.py --resume
    torchrun --nproc-per-node 8 examples/train_contrastive.py --gather --batch-size 65536 --mini-batch-size 256 \
        --model microsoft/mpnet-base --dataset sentence-transformers/gooaq --columns question,answer

The model embeds the batch in mini-batches, twice (gradient caching), and the loss walks over the similarity matrix in
chunks, so memory is that of a mini-batch plus the embeddings. By default nothing is downloaded: the bundled MiniLM
learns which docstring belongs to which function (see docstrings.py). Retrieval on held-out pairs is measured before,
in between and after (see retrieval.py). A run that was cut off goes on with --resume, to the same end.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import common
import docstrings
import typer
from common import (
    BUNDLED_MODEL,
    console,
    fit,
    has_fast_bf16,
    load_model,
    load_splits,
    quiet_and_offline,
    save_and_check,
    show_rows,
)

if TYPE_CHECKING:  # imported below where they are used: --help and a wrong option answer at once
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer
    from torch import Tensor, nn

POOL = 2000  # held-out pairs
OWN_STATE = "loss.pt"  # the last file of a checkpoint: one without it was cut off while it was written
WORLD = int(os.environ.get("WORLD_SIZE", "1"))
MAIN = os.environ.get("RANK", "0") == "0"


class Loss(str, Enum):
    infonce = "infonce"
    symmetric = "symmetric"
    gte = "gte"
    siglip = "siglip"


class Schedule(str, Enum):
    linear = "linear"
    cosine = "cosine"
    constant = "constant_with_warmup"


class Duplicates(str, Enum):
    keep = "keep"
    avoid = "avoid"
    mask = "mask"


def main(
    loss: Annotated[
        Loss,
        typer.Option(
            help="infonce: a query finds its document. symmetric: and a document its query. gte: and queries repel "
            "queries, documents documents, in one softmax. siglip: each pair of the batch is a yes or no of its own."
        ),
    ] = Loss.infonce,
    model: Annotated[str, typer.Option(help="A folder or hub name; by default the bundled MiniLM.")] = BUNDLED_MODEL,
    dataset: Annotated[
        str, typer.Option(help="A csv, json or parquet file, a hub name, or a folder of Python code; else docstrings.")
    ] = "",
    subset: Annotated[str, typer.Option(help="Configuration of a hub dataset.")] = "",
    columns: Annotated[
        str, typer.Option(help="Query, document and, if there are any, hard negatives; a column 'negative' is found.")
    ] = "anchor,positive",
    batch_size: Annotated[int, typer.Option(min=2, help="Pairs a step, over all processes.")] = 1024,
    mini_batch_size: Annotated[int, typer.Option(min=1, help="Rows that the model sees at a time.")] = 32,
    max_steps: Annotated[int, typer.Option(min=0, help="0: as many as --epochs make.")] = 4,
    epochs: Annotated[float, typer.Option(min=0, help="Passes over the data, where --max-steps is 0.")] = 1.0,
    learning_rate: Annotated[float, typer.Option(min=0)] = 3e-4,
    schedule: Schedule = Schedule.cosine,
    warm_up: Annotated[float, typer.Option(min=0, max=1, help="Share of the steps.")] = 0.1,
    scale: Annotated[float, typer.Option(min=0, help="1 / temperature; 0: 20, and 10 to begin with for siglip.")] = 0,
    matryoshka: Annotated[str, typer.Option(help="Widths to train at once, as in 384,192,96.")] = "",
    duplicates: Annotated[
        Duplicates,
        typer.Option(
            help="A text that comes twice in a batch is a negative of its own pair. avoid: batches without (per "
            "process). mask: leave such negatives out of the loss (not siglip)."
        ),
    ] = Duplicates.keep,
    gather: Annotated[bool, typer.Option(help="Negatives from all processes, not from their own alone.")] = False,
    max_seq_length: Annotated[int, typer.Option(min=4, help="Tokens a text is cut to.")] = 32,
    bf16: Annotated[
        Optional[bool],  # noqa: UP045 -- typer reads it at run time, on Python 3.10 too
        typer.Option("--bf16/--no-bf16", help="By default where it is quicker."),
    ] = None,
    compiled: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="The loss; else where it pays. The numbers are equal.")
    ] = None,
    eval_every: Annotated[int, typer.Option(min=0, help="Steps; 0: before and after only.")] = 0,
    save_every: Annotated[int, typer.Option(min=0, help="Steps; 0: at the end only.")] = 50,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint in --output.")] = False,
    stop_after: Annotated[int, typer.Option(min=0, help="Stop after so many steps of this call; go on later.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder for all results.")] = Path("runs/train_contrastive"),
    seed: int = 0,
    quick: Annotated[bool, typer.Option(help="Only check that everything runs; teaches the model little.")] = False,
) -> None:
    """Train, measuring retrieval on held-out pairs before, in between and after."""
    started = time.perf_counter()
    if quick:
        batch_size, mini_batch_size = min(batch_size, 64), min(mini_batch_size, 16)
        max_steps = min(max_steps or 4, 4)
    local_model, local_data = model == BUNDLED_MODEL or Path(model).exists(), not dataset or Path(dataset).exists()
    quiet_and_offline(offline=local_model and local_data)

    try:
        if batch_size % WORLD:
            raise ValueError(f"--batch-size {batch_size} does not divide among {WORLD} processes")
        if loss is Loss.siglip and duplicates is Duplicates.mask:
            raise ValueError("--loss siglip cannot mask duplicates: --duplicates avoid makes batches without")
        needed = max(12_000 if not quick else 600, math.ceil(1.25 * batch_size))
        train, held_out = load_data(dataset, subset, columns, loss, needed, seed)
        if len(train) < batch_size:
            raise ValueError(f"--batch-size {batch_size} is more than the {len(train)} training rows that there are")
        network = load_model(model, max_seq_length)
        widths = read_widths(matryoshka, network.get_embedding_dimension())
        total = max_steps or max(1, round(epochs * (len(train) // batch_size)))
        run = {
            "loss": loss.value,
            "model": model,
            "data": digest(train),
            "batch size": batch_size,
            "mini-batch size": mini_batch_size,
            "steps": total,
            "learning rate": learning_rate,
            "schedule": schedule.value,
            "warm-up": warm_up,
            "scale": scale,
            "widths": widths,
            "duplicates": duplicates.value,
            "gather": gather,
            "tokens": max_seq_length,
            "bf16": has_fast_bf16(network.device) if bf16 is None else bf16,
            "seed": seed,
            "processes": WORLD,
        }
        checkpoint = begin(output, run, resume)
    except ValueError as error:
        common.show_error(error)
        raise typer.Exit(2) from error
    held_out = held_out.select(range(min(len(held_out), POOL if not quick else 100)))
    show_rows(train, held_out)
    if WORLD > 1 and not gather:
        console.print(f"{WORLD} processes, each with the negatives of its own {batch_size // WORLD:,} pairs: --gather")

    from retrieval import RetrievalEvaluator, history, save, table
    from sentence_transformers.sentence_transformer.training_args import BatchSamplers

    options = {"mini_batch_size": mini_batch_size, "gather_across_devices": gather, "compiled": compiled}
    if duplicates is Duplicates.mask:
        options["false_negatives"] = "text"
    if scale:
        options["scale"] = scale
    trained = build_loss(loss, network, widths, options)
    if checkpoint is not None:
        restore(trained, network, checkpoint)
    texts = [list(held_out[name]) for name in held_out.column_names]
    try:
        trainer, seconds = fit(
            network,
            train,
            trained,
            mini_batch_size,
            callbacks=callbacks(trained, network, stop_after),
            evaluator=RetrievalEvaluator(texts, widths),
            resume_from=checkpoint,
            output_dir=str(output),
            per_device_train_batch_size=batch_size // WORLD,
            max_steps=total,
            learning_rate=learning_rate,
            lr_scheduler_type=schedule.value,
            warmup_steps=round(warm_up * total),
            batch_sampler=BatchSamplers.NO_DUPLICATES
            if duplicates is Duplicates.avoid
            else BatchSamplers.BATCH_SAMPLER,
            bf16=run["bf16"],
            eval_strategy="steps",
            eval_steps=eval_every or total,
            eval_on_start=checkpoint is None,
            save_strategy="steps",
            save_steps=save_every or total,
            save_total_limit=2,
            seed=seed,
        )
    except KeyboardInterrupt:
        console.print("Stopped. The same command with --resume goes on from the last checkpoint.")
        raise typer.Exit(130) from None
    if not MAIN:
        return

    done = trainer.state.global_step
    result = {"title": f"{loss.value}, {batch_size:,} pairs a step", "run": run, "finished": done >= total}
    result |= history(trainer.state.log_history, widths)
    save(result, output)
    console.print(table(result["retrieval"], len(held_out), (len(texts) - 1) * len(held_out)))
    if not result["finished"]:
        console.print(f"Stopped after step {done} of {total}. The same command with --resume goes on.")
        return
    save_and_check(network, output / "model", held_out)
    trained_here = done - (int(checkpoint.name.split("-")[1]) if checkpoint else 0)
    console.print(
        f"{trained_here} steps of {batch_size:,} pairs took {seconds:.0f} s, evaluation included, everything "
        f"{time.perf_counter() - started:.0f} s. Model, numbers and plot: {output}"
    )


# ---- data and loss


def load_data(name: str, subset: str, columns: str, loss: Loss, rows: int, seed: int) -> tuple[Dataset, Dataset]:
    """(training, held out): query, document, hard negatives. No held-out text is in a training row, or comes twice."""
    if not name or docstrings.is_code(name):
        from datasets import Dataset

        with console.status("Reading docstrings"):
            functions = docstrings.collect(rows, per_package=max(1000, rows // 12), folder=name)
            train = docstrings.pairs([f for f in functions if not docstrings.is_held_out(f)], seed)
            held_out = docstrings.pairs([f for f in functions if docstrings.is_held_out(f)], seed)
        return Dataset.from_dict(train), Dataset.from_dict(held_out)

    wanted = [column.strip() for column in columns.split(",")]
    if len(wanted) < 2:
        raise ValueError(f"--columns takes two names or more, query,document, got {columns!r}")
    if loss is Loss.siglip and len(wanted) > 2:
        raise ValueError(f"--loss siglip takes pairs, and --columns {columns} names {len(wanted)} columns")
    optional = () if loss is Loss.siglip or "negative" in wanted else ("negative",)
    train, held_out = load_splits(name, subset, wanted, "the training", 2 * POOL, seed, optional)
    seen: set[str] = set()

    def is_new(row: dict[str, str]) -> bool:
        texts = [row[column] for column in wanted[:2]]
        new = not seen & set(texts)
        seen.update(texts)
        return new

    kept = [i for i, row in enumerate(held_out.select(range(min(len(held_out), 2 * POOL)))) if is_new(row)]
    clean = [i for i, row in enumerate(train) if not seen & {row[column] for column in wanted[:2]}]
    return train.select(clean), held_out.select(kept)


def read_widths(text: str, dim: int) -> list[int]:
    try:
        widths = sorted({int(part) for part in text.split(",")}, reverse=True) if text else [dim]
    except ValueError:
        raise ValueError(f"--matryoshka takes widths, as in 384,192,96, got {text!r}") from None
    if widths[-1] < 1 or widths[0] > dim:
        raise ValueError(f"--matryoshka {text}: the model has widths from 1 to {dim}")
    return widths


def build_loss(name: Loss, model: SentenceTransformer, widths: list[int], options: dict[str, Any]) -> nn.Module:
    from chunked_embed import losses

    loss: nn.Module
    if name is Loss.siglip:
        loss = losses.SigmoidPairLoss(model, **options)
    elif name is Loss.infonce:
        loss = losses.CachedMultipleNegativesRankingLoss(model, **options)
    elif name is Loss.symmetric:
        both = ("query_to_doc", "doc_to_query")
        loss = losses.CachedMultipleNegativesRankingLoss(
            model, directions=both, partition_mode="per_direction", **options
        )
    else:
        four = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
        loss = losses.CachedMultipleNegativesRankingLoss(model, directions=four, partition_mode="joint", **options)
    if widths == [model.get_embedding_dimension()]:
        return loss
    return losses.MatryoshkaLoss(model, loss, matryoshka_dims=widths)


# ---- stopping and going on


def digest(train: Dataset) -> str:
    """Of the training texts, in their order: other texts would be another run."""
    total = hashlib.sha256()
    for row in train:
        total.update(json.dumps(row).encode())
    return total.hexdigest()[:16]


def begin(output: Path, run: dict[str, Any], resume: bool) -> Path | None:
    """The checkpoint to go on from, or None for a new run, after a look at what lies in the folder."""
    told = output / "run.json"
    before = json.loads(told.read_text()) if told.exists() else None
    checkpoints = sorted(
        (path.parent for path in output.glob(f"checkpoint-*/{OWN_STATE}")), key=lambda c: int(c.name.split("-")[1])
    )
    if resume:
        if before is None or not checkpoints:
            raise ValueError(f"--resume: no checkpoint in {output}")
        if before != run:
            other = [
                f"{name} was {before.get(name)}, is {run.get(name)}" for name in run if before.get(name) != run[name]
            ]
            raise ValueError(f"--resume: the run in {output} was another one: {'; '.join(other)}")
        return checkpoints[-1]
    if not MAIN:
        return None  # the first process looks, and clears up
    results = output / "results.json"
    if checkpoints and not (results.exists() and json.loads(results.read_text()).get("finished")):
        raise ValueError(f"{output} holds an unfinished run: --resume goes on with it, --output names another folder")
    for path in output.glob("checkpoint-*") if before is not None else ():
        shutil.rmtree(path)
    results.unlink(missing_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    told.write_text(json.dumps(run, indent=1))
    return None


def own_parameters(loss: nn.Module, model: nn.Module) -> dict[str, Tensor]:
    """What a loss learns itself, such as a temperature: no checkpoint of a model holds it."""
    of_model = {id(parameter) for parameter in model.parameters()}
    return {name: p.detach() for name, p in loss.named_parameters() if id(p) not in of_model}


def restore(loss: nn.Module, model: nn.Module, checkpoint: Path) -> None:
    import torch

    saved = torch.load(checkpoint / OWN_STATE, map_location="cpu", weights_only=True)
    for name, parameter in own_parameters(loss, model).items():
        parameter.copy_(saved[name])


def callbacks(loss: nn.Module, model: nn.Module, stop_after: int) -> list[Any]:
    import torch
    from transformers import TrainerCallback

    class KeepLoss(TrainerCallback):
        """Puts into a checkpoint what the loss learned."""

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero:
                file = Path(args.output_dir, f"checkpoint-{state.global_step}", OWN_STATE)
                torch.save(own_parameters(loss, model), file.with_suffix(".part"))
                file.with_suffix(".part").replace(file)

    class StopAndEvaluate(TrainerCallback):
        """Evaluates at the end, which need not be a multiple of --eval-every; stops where --stop-after says."""

        begun_at = 0

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.begun_at = state.global_step

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step >= state.max_steps:
                control.should_evaluate = control.should_save = True
            elif stop_after and state.global_step - self.begun_at >= stop_after:
                control.should_save = control.should_training_stop = True

    return [KeepLoss(), StopAndEvaluate()]


if __name__ == "__main__":
    common.run(main)
