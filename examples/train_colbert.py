"""Train a ColBERT, an encoder with a vector for each token: retrieval before and after, and what an index would hold.

    python examples/train_colbert.py
    python examples/train_colbert.py --loss xtr --width 64 --eval-every 4 --merge 2,3,4
    python examples/train_colbert.py --resume
    torchrun --nproc-per-node 8 examples/train_colbert.py --gather --batch-size 2048 --mini-batch-size 64 \
        --max-seq-length 256 --max-steps 1500 --learning-rate 1e-5 --width 128 \
        --model distilbert/distilbert-base-uncased --dataset sentence-transformers/natural-questions \
        --columns query,answer

A score is MaxSim: each token of the query takes the nearest of the document's, and their cosines are added up. The loss
is InfoNCE over the other pairs of the batch, with gradient caching, and never holds the similarities of all tokens. By
default nothing is downloaded: the encoder is the bundled MiniLM with a new projection of its tokens, and learns which
docstring belongs to which function (see docstrings.py). A run that was cut off goes on with --resume, to the same end.
"""

from __future__ import annotations

import json
import math
import time
from enum import Enum
from functools import partial
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
    from sentence_transformers import MultiVectorEncoder
    from torch import nn

WIDTH = 32  # of a token of the bundled MiniLM
RANKING = {"MRR@10": "mrr@10", "nDCG@10": "ndcg@10", "recall@10": "recall@10"}
SIZES = {"tokens": "tokens of\na document", "bytes": "bytes of one\nin float16"}
SHOWN = 2  # held-out pairs whose matches are shown


class Loss(str, Enum):
    maxsim = "maxsim"
    meanmaxsim = "meanmaxsim"
    xtr = "xtr"


SCALES = {Loss.maxsim: 2.0, Loss.meanmaxsim: 20.0, Loss.xtr: 20.0}


def main(
    loss: Annotated[
        Loss,
        typer.Option(
            help="Scores in training. maxsim: a sum over the query's tokens. meanmaxsim: their mean. xtr: the mean of "
            "what is among the --top-k nearest of the batch. Ranking is by the model's own, MaxSim."
        ),
    ] = Loss.maxsim,
    model: Annotated[
        str, typer.Option(help="A ColBERT or any encoder, a folder or hub name; by default the bundled MiniLM.")
    ] = BUNDLED_MODEL,
    width: Annotated[
        int,
        typer.Option(
            min=0, help=f"Of a token's vector, by a new projection; 0: the model's own, {WIDTH} for the bundled one."
        ),
    ] = 0,
    dataset: Annotated[
        str, typer.Option(help="A csv, json or parquet file, a hub name, or a folder of Python code; else docstrings.")
    ] = "",
    subset: Annotated[str, typer.Option(help="Configuration of a hub dataset.")] = "",
    columns: Annotated[
        str, typer.Option(help="Query, document and, if there are any, hard negatives; a column 'negative' is found.")
    ] = "anchor,positive",
    batch_size: Annotated[int, typer.Option(min=2, help="Pairs a step, over all processes.")] = 64,
    mini_batch_size: Annotated[
        int, typer.Option(min=0, help="Texts that the model sees at a time. 0: all of a column, without caching.")
    ] = 32,
    max_steps: Annotated[int, typer.Option(min=1)] = 24,
    learning_rate: Annotated[float, typer.Option(min=0)] = 3e-4,
    warm_up: Annotated[float, typer.Option(min=0, max=1, help="Of the learning rate: share of the steps.")] = 0.1,
    scale: Annotated[float, typer.Option(min=0, help="1 / temperature; 0: 2, and 20 for the means.")] = 0,
    top_k: Annotated[int, typer.Option(min=1, help="Of xtr: tokens that each token of a query finds.")] = 256,
    peer: Annotated[bool, typer.Option(help="The library's loss in the place of ours.")] = False,
    gather: Annotated[bool, typer.Option(help="Negatives from all processes, not from their own alone.")] = False,
    max_seq_length: Annotated[int, typer.Option(min=4, help="Tokens a text is cut to.")] = 32,
    merge: Annotated[
        str, typer.Option(help="Then rank with fewer tokens too: each document's merged to one in so many.")
    ] = "2,3",
    bf16: Annotated[
        Optional[bool],  # noqa: UP045 -- typer reads it at run time, on Python 3.10 too
        typer.Option("--bf16/--no-bf16", help="By default where it is quicker."),
    ] = None,
    eval_every: Annotated[int, typer.Option(min=0, help="Steps; 0: before and after only.")] = 8,
    save_every: Annotated[int, typer.Option(min=0, help="Steps; 0: at the end only.")] = 8,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint in --output.")] = False,
    stop_after: Annotated[int, typer.Option(min=0, help="Stop after so many steps of this call; go on later.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder for all results.")] = Path("runs/train_colbert"),
    seed: int = 0,
    quick: Annotated[bool, typer.Option(help="Only check that everything runs; teaches the model little.")] = False,
) -> None:
    """Train, measuring retrieval on held-out pairs before, in between and after."""
    started = time.perf_counter()
    if quick:
        batch_size, mini_batch_size, max_steps = min(batch_size, 32), min(mini_batch_size, 16), min(max_steps, 4)
    local_model, local_data = model == BUNDLED_MODEL or Path(model).exists(), not dataset or Path(dataset).exists()
    quiet_and_offline(offline=local_model and local_data)

    try:
        if batch_size % WORLD:
            raise ValueError(f"--batch-size {batch_size} does not divide among {WORLD} processes")
        factors = read_factors(merge)
        needed = 600 if quick else max(5000, math.ceil(1.25 * batch_size))
        train, held_out = load_pairs(dataset, subset, columns, needed, seed)
        if len(train) < batch_size:
            raise ValueError(f"--batch-size {batch_size} is more than the {len(train)} training rows that there are")
        network = load_encoder(model, width, max_seq_length, seed)
        run = {
            "loss": loss.value,
            "model": model,
            "width": network.get_embedding_dimension(),
            "data": digest(train),
            "batch size": batch_size,
            "mini-batch size": mini_batch_size,
            "steps": max_steps,
            "learning rate": learning_rate,
            "warm-up": warm_up,
            "scale": scale or SCALES[loss],
            "top k": top_k,
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

    shown = [list(row.values())[:2] for row in held_out.select(range(SHOWN))]
    before = [matches(network, *pair) for pair in shown]
    trained = build_loss(loss, network, run["scale"], top_k, mini_batch_size, gather, peer)
    if checkpoint is not None:
        restore(trained, network, checkpoint)
    try:
        trainer, seconds = fit(
            network,
            train,
            trained,
            mini_batch_size,
            callbacks=stop_and_go_on(trained, network, stop_after),
            evaluator=make_evaluator(held_out),
            resume_from=checkpoint,
            output_dir=str(output),
            prompts=prompts(network, train.column_names),
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
    result = {"title": f"{loss.value}, {batch_size:,} pairs a step", "run": run, "finished": done >= max_steps}
    result |= history(trainer.state.log_history, network.similarity_fn_name)
    result["matches"] = [
        {"query": pair[0], "document": pair[1], "before": old, "after": matches(network, *pair)}
        for pair, old in zip(shown, before)
    ]
    if result["finished"]:
        with console.status("Ranking with fewer tokens"):
            result["kept"] = [kept(network, held_out, factor) for factor in factors]
    (output / "results.json").write_text(json.dumps(result, indent=1))
    plot(result, output / "results.png")
    documents = (len(held_out.column_names) - 1) * len(held_out)
    console.print(table(result["retrieval"], min(len(held_out), QUERIES), documents))
    console.print(table_of_matches(result["matches"]))
    if not result["finished"]:
        console.print(f"Stopped after step {done} of {max_steps}. The same command with --resume goes on.")
        return
    console.print(table_of_kept(result["kept"]))
    save_and_check(network, output / "model", held_out)
    trained_here = done - (int(checkpoint.name.split("-")[1]) if checkpoint else 0)
    console.print(
        f"{trained_here} steps of {batch_size:,} pairs took {seconds:.0f} s, evaluation included, everything "
        f"{time.perf_counter() - started:.0f} s. Model, numbers and plot: {output}"
    )


# ---- encoder and loss


def read_factors(text: str) -> list[int]:
    """With one, which is all tokens."""
    try:
        factors = sorted({1, *(int(part) for part in text.split(",") if text)})
    except ValueError:
        raise ValueError(f"--merge takes whole numbers, as in 2,3, got {text!r}") from None
    if factors[0] < 1:
        raise ValueError(f"--merge takes numbers from 1 on, got {text!r}")
    return factors


def load_encoder(name: str, width: int, max_seq_length: int, seed: int) -> MultiVectorEncoder:
    with console.status("Loading the model"):
        try:
            from sentence_transformers import MultiVectorEncoder
        except ImportError:
            raise ValueError(f"--model {name}: late interaction needs sentence-transformers 6.0 or later") from None
        from transformers import set_seed

        set_seed(seed)  # of a new projection
        try:
            if name == BUNDLED_MODEL:
                model = with_projection(bundled_folder("--model"), width or WIDTH)
            else:
                model = with_projection(name, width) if width else MultiVectorEncoder(name)
        except (OSError, ValueError) as error:  # no such folder, no such name, no network, no model in it
            raise ValueError(f"--model {name}: {one_line(error)}") from error
    model.max_seq_length = min(max_seq_length, model.max_seq_length or max_seq_length)
    return model


def with_projection(name: str, width: int) -> MultiVectorEncoder:
    """An encoder, a new projection of its tokens to unit vectors, and a mask: documents' punctuation does not count."""
    import string

    from sentence_transformers import MultiVectorEncoder
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Transformer
    from torch import nn

    of_tokens = {"module_input_name": "token_embeddings"}
    encoder = Transformer(name)
    hidden = encoder.get_embedding_dimension()
    projection = Dense(hidden, width, bias=False, activation_function=nn.Identity(), **of_tokens)
    marks = [mark for mark in string.punctuation if mark in encoder.tokenizer.get_vocab()]
    return MultiVectorEncoder(modules=[encoder, projection, Normalize(**of_tokens), MultiVectorMask(marks)])


def build_loss(
    name: Loss, model: MultiVectorEncoder, scale: float, top_k: int, mini_batch_size: int, gather: bool, peer: bool
) -> nn.Module:
    from sentence_transformers.multi_vector_encoder import losses as library
    from sentence_transformers.multi_vector_encoder import scoring

    from chunked_embed.multi_vector import losses

    scores = {
        Loss.maxsim: scoring.colbert_scores,
        Loss.meanmaxsim: scoring.mean_colbert_scores,
        Loss.xtr: partial(scoring.xtr_scores, top_k=top_k),
    }
    module = library if peer else losses
    options: dict[str, Any] = {"scale": scale, "similarity_fct": scores[name], "gather_across_devices": gather}
    if not mini_batch_size:
        return module.MultiVectorMultipleNegativesRankingLoss(model, **options)
    return module.CachedMultiVectorMultipleNegativesRankingLoss(model, mini_batch_size=mini_batch_size, **options)


def prompts(model: MultiVectorEncoder, columns: list[str]) -> dict[str, str]:
    """{column: what the model puts in front of its texts}, which a trainer does not do by itself."""
    found = {name: model.prompts.get("query" if i == 0 else "document") for i, name in enumerate(columns)}
    return {name: prompt for name, prompt in found.items() if prompt}


# ---- what is measured


def make_evaluator(held_out: Dataset, pooling: Any = None) -> Any:
    """The library's; with ``pooling`` of documents that are merged to fewer tokens."""
    from sentence_transformers.multi_vector_encoder.evaluation import MultiVectorInformationRetrievalEvaluator

    class Evaluator(MultiVectorInformationRetrievalEvaluator):
        def embed_inputs(self, *args: Any, **kwargs: Any) -> Any:
            return super().embed_inputs(*args, token_pooling=pooling, **kwargs)

    return Evaluator(*searched(held_out), batch_size=64, write_csv=False)


def kept(model: MultiVectorEncoder, held_out: Dataset, factor: int) -> dict[str, float]:
    """Ranking and size of documents whose tokens are merged to one in ``factor``."""
    from sentence_transformers.multi_vector_encoder.modules import HierarchicalTokenPooling

    pooling = HierarchicalTokenPooling(factor) if factor > 1 else None
    found = make_evaluator(held_out, pooling)(model)
    documents = model.encode_document(
        list(searched(held_out)[1].values()), batch_size=64, token_pooling=pooling, show_progress_bar=False
    )
    tokens = sum(map(len, documents)) / len(documents)
    ranking = {name: found[f"{model.similarity_fn_name}_{key}"] for name, key in RANKING.items()}
    return {"merged": factor, **ranking, "tokens": tokens, "bytes": 2 * tokens * documents[0].shape[1]}


def matches(model: MultiVectorEncoder, query: str, document: str) -> list[dict[str, Any]]:
    """[{token, finds, cosine}]: of each token of a query the nearest of the document's, special ones left out."""

    def embed(encode: Any, text: str) -> tuple[list[str], Any]:
        found = encode(text, output_value=None, show_progress_bar=False)
        special = {*model.tokenizer.all_special_ids}
        ids = found["input_ids"].tolist()
        places = [i for i, counts in enumerate(found["attention_mask"].tolist()) if counts and ids[i] not in special]
        tokens = model.tokenizer.convert_ids_to_tokens([ids[i] for i in places])
        return tokens, found["token_embeddings"][places].float()

    (asked, queries), (others, documents) = embed(model.encode_query, query), embed(model.encode_document, document)
    if not (asked and others):
        return []
    cosines, nearest = (queries @ documents.T).max(1)
    return [
        {"token": token, "finds": others[place], "cosine": cosine}
        for token, place, cosine in zip(asked, nearest.tolist(), cosines.tolist())
    ]


def history(log: list[dict[str, Any]], similarity: str) -> dict[str, list[dict[str, Any]]]:
    """{"loss": [{step, loss, learning rate}], "retrieval": [{step, ranking}]} of a trainer's log."""
    losses = [
        {"step": entry["step"], "loss": entry["loss"], "learning rate": entry["learning_rate"]}
        for entry in log
        if "loss" in entry
    ]
    names = {name: f"eval_{similarity}_{key}" for name, key in RANKING.items()}
    retrieval = [
        {"step": entry["step"], **{name: entry[key] for name, key in names.items()}}
        for entry in log
        if names["MRR@10"] in entry
    ]
    return {"loss": losses, "retrieval": retrieval}


# ---- tables and plot


def table(retrieval: list[dict[str, Any]], queries: int, documents: int) -> Table:
    result = Table("step", title=f"Held out: {queries:,} queries, {documents:,} documents")
    for name in RANKING:
        result.add_column(name, justify="right")
    for row in retrieval:
        result.add_row(str(row["step"]), *(f"{row[name]:.4f}" for name in RANKING))
    return result


def table_of_kept(rows: list[dict[str, float]]) -> Table:
    result = Table("a document's tokens", title="What an index would hold")
    for heading in (*RANKING, *SIZES.values()):
        result.add_column(heading, justify="right")
    for row in rows:
        size = f"{row['tokens']:.1f}", f"{row['bytes']:,.0f}"
        told = "all" if row["merged"] == 1 else f"merged to one in {row['merged']}"
        result.add_row(told, *(f"{row[name]:.4f}" for name in RANKING), *size)
    return result


def table_of_matches(found: list[dict[str, Any]]) -> Table:
    result = Table(
        "query, and document", "", "each token of the query, what it finds and how near", title="What MaxSim adds up"
    )
    for pair in found:
        for when in ("before", "after"):
            told = ", ".join(
                f"{escape(m['token'])} [dim]to[/] {escape(m['finds'])} [dim]{m['cosine']:.2f}[/]" for m in pair[when]
            )
            text = pair["query" if when == "before" else "document"]
            result.add_row(escape(text), when, told, end_section=when == "after")
    return result


def plot(result: dict[str, Any], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kept = result.get("kept", [])
    figure, axes = pyplot.subplots(1, 3 if kept else 2, figsize=(13 if kept else 9, 4), layout="constrained")
    of_retrieval, of_loss, *of_kept = axes
    for axis, rows, names in ((of_retrieval, result["retrieval"], RANKING), (of_loss, result["loss"], ["loss"])):
        for name in names:
            marker = "." if rows is result["loss"] else "o"
            axis.plot([row["step"] for row in rows], [row[name] for row in rows], marker=marker, label=name)
        axis.set(xlabel="step")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    of_retrieval.set(ylabel="held-out pairs")
    of_retrieval.legend()
    of_loss.set(ylabel="training loss")
    for axis in of_kept:
        for name in RANKING:
            axis.plot([row["tokens"] for row in kept], [row[name] for row in kept], marker="o")
        axis.sharey(of_retrieval)  # its legend is this one's, too
        axis.set(xlabel="tokens of a document, after merging", ylabel="held-out pairs", xlim=(0, None))
        axis.grid(alpha=0.3)
    figure.suptitle(result["title"])
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    common.run(main)
