"""Train a SPLADE model, a sparse encoder over the words of a vocabulary: retrieval before and after, and its sparsity.

    python examples/train_splade.py
    python examples/train_splade.py --document-weight 0.2 --query-weight 0.3 --eval-every 5
    python examples/train_splade.py --resume
    torchrun --nproc-per-node 8 examples/train_splade.py --gather --batch-size 2048 --mini-batch-size 64 \
        --max-seq-length 256 --max-steps 1500 --learning-rate 2e-5 --document-weight 3e-5 --query-weight 5e-5 \
        --model distilbert/distilbert-base-uncased --dataset sentence-transformers/natural-questions \
        --columns query,answer

Each text becomes weights of words: log(1 + relu(.)) of a masked language model's outputs, the largest over its tokens.
The head that is fused (``chunked_embed.sparse.attach``) never holds those outputs, which are tokens x vocabulary. The
loss is InfoNCE over the other pairs of the batch, plus FLOPS, whose weights ramp up as the library's callback has it.
By default nothing is downloaded: the encoder is the bundled MiniLM with a head made of its word embeddings, and learns
which docstring belongs to which function (see docstrings.py). A run that was cut off goes on with --resume, to the
same end.
"""

from __future__ import annotations

import json
import math
import time
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import common
import typer
from common import (
    BUNDLED_MODEL,
    bundled_folder,
    console,
    fit,
    has_fast_bf16,
    one_line,
    quiet_and_offline,
    save_and_check,
    show_rows,
)
from pair_parts import MAIN, POOL, QUERIES, WORLD, begin, digest, load_pairs, restore, searched, stop_and_go_on
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:  # imported below where they are used: --help and a wrong option answer at once
    from datasets import Dataset
    from sentence_transformers import SparseEncoder
    from torch import nn

SIZE, BELOW = 0.5, -1.5  # of a head made of word embeddings: its LayerNorm's weight, and its bias, which a tenth passes
NEVER = -100.0  # the bias of [CLS] and its like, which are no words
RANKING = {"MRR@10": "dot_mrr@10", "nDCG@10": "dot_ndcg@10", "recall@10": "dot_recall@10"}
SPARSITY = {"query": "query_active_dims", "document": "corpus_active_dims", "FLOPS": "avg_flops"}
TERMS = {"contrast": "base_loss", "documents' FLOPS": "document_regularizer_loss", "queries'": "query_regularizer_loss"}
SHOWN = 2  # held-out pairs whose words are shown
WORDS = 8  # a text


class Ramp(str, Enum):
    linear = "linear"
    quadratic = "quadratic"


def main(
    model: Annotated[
        str,
        typer.Option(help="A SPLADE or masked language model, a folder or hub name; by default the bundled MiniLM."),
    ] = BUNDLED_MODEL,
    dataset: Annotated[
        str, typer.Option(help="A csv, json or parquet file, a hub name, or a folder of Python code; else docstrings.")
    ] = "",
    subset: Annotated[str, typer.Option(help="Configuration of a hub dataset.")] = "",
    columns: Annotated[
        str, typer.Option(help="Query, document and, if there are any, hard negatives; a column 'negative' is found.")
    ] = "anchor,positive",
    batch_size: Annotated[int, typer.Option(min=2, help="Pairs a step, over all processes.")] = 64,
    mini_batch_size: Annotated[
        int, typer.Option(min=0, help="Texts that the model sees at a time, which is slower. 0: all of a column.")
    ] = 0,
    max_steps: Annotated[int, typer.Option(min=1)] = 60,
    learning_rate: Annotated[float, typer.Option(min=0)] = 2e-4,
    warm_up: Annotated[float, typer.Option(min=0, max=1, help="Of the learning rate: share of the steps.")] = 0.1,
    document_weight: Annotated[float, typer.Option(min=0, help="Of the documents' FLOPS: more is sparser.")] = 6e-2,
    query_weight: Annotated[float, typer.Option(min=0, help="Of the queries' FLOPS.")] = 8e-2,
    ramp: Annotated[Ramp, typer.Option(help="How both weights rise from zero.")] = Ramp.quadratic,
    ramp_until: Annotated[float, typer.Option(min=0.01, max=1, help="Share of the steps.")] = 0.33,
    scale: Annotated[float, typer.Option(min=0, help="Factor on the dot products: 1 / temperature.")] = 1.0,
    fused: Annotated[bool, typer.Option(help="Ours, or the library's head, with outputs of all tokens.")] = True,
    gather: Annotated[bool, typer.Option(help="Negatives from all processes, not from their own alone.")] = False,
    max_seq_length: Annotated[int, typer.Option(min=4, help="Tokens a text is cut to.")] = 32,
    bf16: Annotated[
        Optional[bool],  # noqa: UP045 -- typer reads it at run time, on Python 3.10 too
        typer.Option("--bf16/--no-bf16", help="By default where it is quicker."),
    ] = None,
    eval_every: Annotated[int, typer.Option(min=0, help="Steps; 0: before and after only.")] = 15,
    save_every: Annotated[int, typer.Option(min=0, help="Steps; 0: at the end only.")] = 15,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint in --output.")] = False,
    stop_after: Annotated[int, typer.Option(min=0, help="Stop after so many steps of this call; go on later.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder for all results.")] = Path("runs/train_splade"),
    seed: int = 0,
    quick: Annotated[bool, typer.Option(help="Only check that everything runs; teaches the model little.")] = False,
) -> None:
    """Train, measuring retrieval and sparsity on held-out pairs before, in between and after."""
    started = time.perf_counter()
    if quick:
        batch_size, mini_batch_size, max_steps = min(batch_size, 32), min(mini_batch_size, 16), min(max_steps, 4)
    local_model, local_data = model == BUNDLED_MODEL or Path(model).exists(), not dataset or Path(dataset).exists()
    quiet_and_offline(offline=local_model and local_data)

    try:
        if batch_size % WORLD:
            raise ValueError(f"--batch-size {batch_size} does not divide among {WORLD} processes")
        needed = 600 if quick else max(5000, math.ceil(1.25 * batch_size))
        train, held_out = load_pairs(dataset, subset, columns, needed, seed)
        if len(train) < batch_size:
            raise ValueError(f"--batch-size {batch_size} is more than the {len(train)} training rows that there are")
        network = load_encoder(model, max_seq_length)
        run = {
            "model": model,
            "data": digest(train),
            "batch size": batch_size,
            "mini-batch size": mini_batch_size,
            "steps": max_steps,
            "learning rate": learning_rate,
            "warm-up": warm_up,
            "document weight": document_weight,
            "query weight": query_weight,
            "ramp": ramp.value,
            "ramp until": ramp_until,
            "scale": scale,
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

    from sentence_transformers.sparse_encoder.callbacks import SpladeRegularizerWeightSchedulerCallback

    from chunked_embed import sparse

    if fused:
        sparse.attach(network)  # the line that a script of your own takes
    shown = [text for row in held_out.select(range(SHOWN)) for text in list(row.values())[:2]]
    before = words(network, shown)
    trained = build_loss(network, document_weight, query_weight, scale, mini_batch_size, gather)
    if checkpoint is not None:
        restore(trained, network, checkpoint)
    try:
        trainer, seconds = fit(
            network,
            train,
            trained,
            mini_batch_size,
            callbacks=[
                SpladeRegularizerWeightSchedulerCallback(trained, ramp.value, ramp_until),
                *stop_and_go_on(trained, network, stop_after),
            ],
            evaluator=make_evaluator(held_out),
            resume_from=checkpoint,
            output_dir=str(output),
            per_device_train_batch_size=batch_size // WORLD,
            max_steps=max_steps,
            learning_rate=learning_rate,
            warmup_steps=round(warm_up * max_steps),
            bf16=run["bf16"],
            eval_strategy="steps",
            eval_steps=eval_every or max_steps,
            eval_on_start=checkpoint is None,
            save_strategy="steps",
            save_steps=save_every or max_steps,
            save_total_limit=2,
            seed=seed,
        )
    except KeyboardInterrupt:
        console.print("Stopped. The same command with --resume goes on from the last checkpoint.")
        raise typer.Exit(130) from None
    if not MAIN:
        return

    done = trainer.state.global_step
    result = {"title": f"SPLADE, {batch_size:,} pairs a step", "run": run, "finished": done >= max_steps}
    result |= history(trainer.state.log_history)
    result["words"] = {
        text: {"before": old, "after": new} for text, old, new in zip(shown, before, words(network, shown))
    }
    (output / "results.json").write_text(json.dumps(result, indent=1))
    plot(result, output / "results.png")
    documents = (len(held_out.column_names) - 1) * len(held_out)
    console.print(table(result["retrieval"], min(len(held_out), QUERIES), documents, network.get_embedding_dimension()))
    console.print(table_of_words(result["words"]))
    if not result["finished"]:
        console.print(f"Stopped after step {done} of {max_steps}. The same command with --resume goes on.")
        return
    save_and_check(network, output / "model", held_out)
    trained_here = done - (int(checkpoint.name.split("-")[1]) if checkpoint else 0)
    console.print(
        f"{trained_here} steps of {batch_size:,} pairs took {seconds:.0f} s, evaluation included, everything "
        f"{time.perf_counter() - started:.0f} s. Model, numbers and plot: {output}"
    )


# ---- encoder and loss


def load_encoder(name: str, max_seq_length: int) -> SparseEncoder:
    with console.status("Loading the model"):
        from sentence_transformers import SparseEncoder
        from sentence_transformers.sparse_encoder.modules import SpladePooling

        try:
            model = with_new_head(bundled_folder("--model")) if name == BUNDLED_MODEL else SparseEncoder(name)
        except (OSError, ValueError) as error:  # no such folder, no such name, no network, no model in it
            raise ValueError(f"--model {name}: {one_line(error)}") from error
    if not any(isinstance(module, SpladePooling) for module in model.modules()):
        raise ValueError(f"--model {name}: expected a SPLADE model, or one with a head for masked words")
    model.max_seq_length = min(max_seq_length, model.max_seq_length or max_seq_length)
    return model


def with_new_head(folder: str) -> SparseEncoder:
    """A BERT, and the head of a masked language model that says each token's own word and its neighbours.

    What leaves this encoder is still near the word that came in, so the head's transform begins as the identity. The
    last layer is tied to the word embeddings, as in any BERT.
    """
    import torch
    from sentence_transformers import SparseEncoder
    from sentence_transformers.sentence_transformer.modules import Transformer
    from sentence_transformers.sparse_encoder.modules import SpladePooling
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # or it tells of a head that is missing
    encoder = Transformer(folder, transformer_task="fill-mask")
    logging.set_verbosity(verbosity)
    head = encoder.auto_model.cls.predictions
    with torch.no_grad():
        torch.nn.init.eye_(head.transform.dense.weight)
        head.transform.LayerNorm.weight.fill_(SIZE)
        head.decoder.bias.fill_(BELOW)
        head.decoder.bias[encoder.tokenizer.all_special_ids] = NEVER
    return SparseEncoder(modules=[encoder, SpladePooling("max")])


def build_loss(
    model: SparseEncoder, document_weight: float, query_weight: float, scale: float, mini_batch_size: int, gather: bool
) -> nn.Module:
    from chunked_embed.sparse import losses

    contrast = losses.SparseMultipleNegativesRankingLoss(model, scale=scale)
    return losses.SpladeLoss(
        model,
        contrast,
        document_weight,
        query_weight,
        mini_batch_size=mini_batch_size or None,
        gather_across_devices=gather,
    )


# ---- what is measured


def make_evaluator(held_out: Dataset) -> Any:
    from sentence_transformers.sparse_encoder.evaluation import SparseInformationRetrievalEvaluator

    return SparseInformationRetrievalEvaluator(*searched(held_out), batch_size=64, write_csv=False)


def words(model: SparseEncoder, texts: list[str]) -> list[dict[str, float]]:
    """{word: weight} of the heaviest of each text."""
    return [dict(found) for found in model.decode(model.encode(texts, show_progress_bar=False), top_k=WORDS)]


def history(log: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """{"loss": [{step, terms, learning rate}], "retrieval": [{step, ranking, sparsity}]} of a trainer's log."""
    losses = [
        {
            "step": entry["step"],
            **{term: entry[key] for term, key in TERMS.items()},
            "learning rate": entry["learning_rate"],
        }
        for entry in log
        if "loss" in entry
    ]
    names = RANKING | SPARSITY
    retrieval = [
        {"step": entry["step"], **{name: entry[f"eval_{key}"] for name, key in names.items()}}
        for entry in log
        if f"eval_{names['FLOPS']}" in entry
    ]
    return {"loss": losses, "retrieval": retrieval}


# ---- tables and plot


def table(retrieval: list[dict[str, Any]], queries: int, documents: int, vocabulary: int) -> Table:
    title = f"Held out: {queries:,} queries, {documents:,} documents; words in use of {vocabulary:,}"
    result = Table("step", title=title)
    for heading in (*RANKING, "words of\na query", "words of\na document", "in common\n(FLOPS)"):
        result.add_column(heading, justify="right")
    for row in retrieval:
        ranking, sparsity = ([row[name] for name in names] for names in (RANKING, SPARSITY))
        result.add_row(str(row["step"]), *(f"{x:.4f}" for x in ranking), *(f"{x:,.1f}" for x in sparsity))
    return result


def table_of_words(found: dict[str, dict[str, dict[str, float]]]) -> Table:
    result = Table("held out", "", "its heaviest words, and their weights", title="What a text is turned into")
    for text, sides in found.items():
        for when, weights in sides.items():
            told = ", ".join(f"{escape(word)} [dim]{weight:.1f}[/]" for word, weight in weights.items())
            result.add_row(escape(text) if when == "before" else "", when, told, end_section=when == "after")
    return result


def plot(result: dict[str, Any], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    of_retrieval, of_sparsity, of_loss = axes
    for axis, rows, names in (
        (of_retrieval, result["retrieval"], RANKING),
        (of_sparsity, result["retrieval"], SPARSITY),
        (of_loss, result["loss"], TERMS),
    ):
        for name in names:
            marker = "." if rows is result["loss"] else "o"
            axis.plot([row["step"] for row in rows], [row[name] for row in rows], marker=marker, label=name)
        axis.set(xlabel="step")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend()
        axis.grid(alpha=0.3)
    of_retrieval.set(ylabel="held-out pairs")
    of_sparsity.set(ylabel="words in use, held-out texts", yscale="log")
    of_loss.set(ylabel="terms of the training loss", yscale="log")
    figure.suptitle(result["title"])
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    common.run(main)
