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

import math
import time
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import common
import typer
from common import (
    BUNDLED_MODEL,
    console,
    fit,
    has_fast_bf16,
    load_model,
    quiet_and_offline,
    save_and_check,
    show_rows,
)
from pair_parts import MAIN, POOL, WORLD, begin, digest, load_pairs, restore, stop_and_go_on

if TYPE_CHECKING:  # imported below where they are used: --help and a wrong option answer at once
    from sentence_transformers import SentenceTransformer
    from torch import nn


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
        if loss is Loss.siglip and len(columns.split(",")) > 2:
            raise ValueError(f"--loss siglip takes pairs, and --columns {columns} names more than two columns")
        needed = max(12_000 if not quick else 600, math.ceil(1.25 * batch_size))
        train, held_out = load_pairs(dataset, subset, columns, needed, seed, negatives=loss is not Loss.siglip)
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
            callbacks=stop_and_go_on(trained, network, stop_after),
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


# ---- widths and loss


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


if __name__ == "__main__":
    common.run(main)
