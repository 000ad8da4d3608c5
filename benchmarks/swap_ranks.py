"""Losses of the batch of all processes under DDP, ours beside sentence-transformers': errors, times of steps, peaks.

    torchrun --nproc-per-node 2 benchmarks/swap_ranks.py                  # two GPUs with NCCL, MiniLM from the hub
    torchrun --nproc-per-node 2 benchmarks/swap_ranks.py --device cpu     # gloo, small

Errors: float32 without dropout, the loss and the gradient of all parameters after DDP has averaged it, against float64
of one process that has the whole batch (the library's class). With 64 rows in each process, and with 64 in the first
and 40 in each other, as a last batch has them; the library gathers equal shares alone, and is left out there.

Times: training steps as the library's trainer takes them, with accelerate's bfloat16, DDP and a fused AdamW, on texts
of 8 to 32 random tokens; the median of three after two, of the slowest process. Memory is the largest peak of a process
after the first step, everything included. Each process has the number of rows that a case names. Running out of memory
is a result like another.
"""

import copy
import gc
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, Any

import sentences
import torch
import torch.distributed as dist
import transformers
import typer
from accelerate import Accelerator, DistributedDataParallelKwargs
from measure import GIB, OURS, PEER, RESULTS, Benchmark, Budget, Errors, Match, Missing, Out, Timing, errors_of, failure
from sentence_transformers.sentence_transformer import losses as library
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from chunked_embed import losses

WORLD = int(os.environ.get("WORLD_SIZE", "1"))  # as torchrun has it
RANK, LOCAL = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
THEIRS, MINE = "sentence-transformers", "ours"
PARTS, OWN = "ours, mini-batches", "sentence-transformers, each its own batch"
WARMUPS, REPEATS = 2, 3
BOUND = 1e-4
TOGETHER = {"gather_across_devices": True}
UNUSED = {"find_unused_parameters": True, "broadcast_buffers": False}  # as the trainer has it
LIMIT = timedelta(seconds=120)  # of a collective that somebody else never calls


@dataclass(frozen=True)
class Size:
    words: int = 32  # of a text at most
    errors: tuple[int, int] = (64, 40)  # rows of the first process, and of the others where shares are uneven
    mini: int = 1024
    few: int = 1024  # GISTEmbed, of which the library holds N x N x D
    more: int = 4096
    many: int = 8192
    most: int = 32768


SMALL = Size(8, (8, 5), 8, 8, 12, 16, 20)

# Of the library's module or of ours: module, model, what makes a guide, rows of a mini-batch, options.
Make = Callable[..., nn.Module]
KINDS: dict[str, Make] = {
    "MultipleNegativesRanking": lambda of, m, guide, mini, **o: of.MultipleNegativesRankingLoss(m, **o),
    "CachedMultipleNegativesRanking": lambda of, m, guide, mini, **o: of.CachedMultipleNegativesRankingLoss(
        m, mini_batch_size=mini, **o
    ),
    "GISTEmbed": lambda of, m, guide, mini, **o: of.GISTEmbedLoss(m, guide(), **o),
    "GISTEmbed without anchors": lambda of, m, guide, mini, **o: of.GISTEmbedLoss(
        m, guide(), contrast_anchors=False, **o
    ),
    "CachedGISTEmbed without anchors": lambda of, m, guide, mini, **o: of.CachedGISTEmbedLoss(
        m, guide(), mini_batch_size=mini, contrast_anchors=False, **o
    ),
    "CoSENT": lambda of, m, guide, mini, **o: of.CoSENTLoss(m, **o),
}
GATHERED = [name for name in KINDS if name != "CoSENT"]  # by the library, too


def cases(size: Size) -> list[tuple[str, int]]:
    """Losses and rows of a process. Those last that do not fit all candidates: one may stay behind the others."""
    return [
        ("MultipleNegativesRanking", size.more),
        ("CachedMultipleNegativesRanking", size.many),
        ("CoSENT", size.more),
        ("GISTEmbed", size.few),
        ("CachedMultipleNegativesRanking", size.most),
        ("GISTEmbed", size.more),
        ("MultipleNegativesRanking", size.most),
    ]


# --- texts ---


@dataclass
class Batch:
    """Pairs of texts whose second ones have some of the first's tokens, and a grade for each: how many."""

    columns: list[dict[str, Any]]
    grades: Tensor

    def rows(self, where: slice) -> "Batch":
        cut = [{k: v[where] if isinstance(v, Tensor) else v for k, v in column.items()} for column in self.columns]
        return Batch(cut, self.grades[where])

    def fresh(self) -> tuple[list[dict[str, Any]], Tensor]:
        """For a call: modules write into what they are given."""
        return [dict(column) for column in self.columns], self.grades


def texts(rows: int, words: int, vocabulary: int, device: torch.device) -> Batch:
    """The same on every process."""
    draw = torch.Generator().manual_seed(0)
    first, other = (torch.randint(5, vocabulary, (rows, words), generator=draw) for _ in range(2))
    lengths = torch.randint(max(2, words // 4), words + 1, (rows, 1), generator=draw)
    grades = torch.randint(5, (rows,), generator=draw) / 4
    second = torch.where(torch.rand(rows, words, generator=draw) < grades[:, None], first, other)
    second[:, 0] = other[:, 0]  # no text twice: a guide's comparison of the two would be one of roundings
    mask = (torch.arange(words) < lengths).long()

    def column(ids: Tensor) -> dict[str, Any]:
        tensors = {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": torch.zeros_like(mask)}
        return {name: tensor.to(device) for name, tensor in tensors.items()} | {"modality": "text"}

    return Batch([column(first), column(second)], grades.to(device))


# --- losses under DDP ---


@dataclass
class Setup:
    model: nn.Module
    size: Size
    device: torch.device
    compiled: bool | None

    @property
    def vocabulary(self) -> int:
        return self.model[0].auto_model.config.vocab_size

    def loss(self, kind: str, of: Any, model: nn.Module, mini: int, **options: Any) -> nn.Module:
        if of is losses:
            options["compiled"] = self.compiled

        def guide() -> nn.Module:
            return copy.deepcopy(self.model).to(next(model.parameters()).dtype).eval()

        return KINDS[kind](of, model, guide, mini, **options)


def under(loss: nn.Module, wrapped: nn.Module) -> nn.Module:
    """The loss with its model wrapped, as the trainer does it."""
    for part in (loss, getattr(loss, "loss", None)):
        if isinstance(part, nn.Module) and hasattr(part, "model"):
            part.model = wrapped
    return loss


def gradient(model: nn.Module) -> Tensor:
    """Of all parameters, (P,)."""
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])


def truth(setup: Setup, kind: str, batch: Batch, mini: int) -> list[Tensor]:
    """[loss, gradient] of one process with the whole batch, in float64."""
    model = copy.deepcopy(setup.model).double().eval()
    loss = setup.loss(kind, library, model, mini)
    columns, grades = batch.fresh()
    value = loss(columns, grades.double())
    value.backward()
    return [value.detach(), gradient(model)]


def of_ranks(setup: Setup, kind: str, of: Any, batch: Batch, mini: int) -> list[Tensor]:
    """The same of all processes with their shares, in float32."""
    model = copy.deepcopy(setup.model).eval()
    loss = under(setup.loss(kind, of, model, mini, **TOGETHER), DistributedDataParallel(model, **UNUSED))
    value = loss(*batch.fresh())
    value.backward()
    mean = value.detach().clone()
    dist.all_reduce(mean)
    return [mean / WORLD, gradient(model)]


def run_errors(bench: Benchmark, setup: Setup, kind: str, sizes: Sequence[int], title: str) -> None:
    mini = max(2, sizes[0] // 3)
    batch = texts(sum(sizes), setup.size.words, setup.vocabulary, setup.device)
    start = sum(sizes[:RANK])
    share = batch.rows(slice(start, start + sizes[RANK]))
    expected = truth(setup, kind, batch, mini)
    for name, of in {MINE: losses, THEIRS: library}.items():
        if name == THEIRS and (kind not in GATHERED or len(set(sizes)) > 1):
            continue
        found = errors_of(of_ranks(setup, kind, of, share, mini), expected, "loss", ["parameters"])
        note, role = "", OURS if name == MINE else PEER
        if not found.worst <= BOUND:
            note = f"{'WRONG' if name == MINE else 'inaccurate'}: {found.worst:.1e}, above {BOUND:.0e}"
        add(bench, title, name, role, Timing(note=note), found)


# --- times ---


def timed(setup: Setup, kind: str, of: Any, rows: int, batch: Batch, **options: Any) -> Timing:
    """Of training steps of all processes. One that runs out of memory in one of them has run out of it."""
    gc.collect()  # models that DDP's hooks hold in cycles
    try:
        timing, problem = steps(setup, kind, of, batch, **options), ""
    except Exception as error:
        if not isinstance(error, torch.OutOfMemoryError):
            raise  # the others may wait for this one
        timing, problem = Timing(), failure(error)
    gc.collect()
    if setup.device.type == "cuda":
        torch.cuda.empty_cache()
    numbers = torch.tensor(
        [bool(problem), timing.ms or 0, timing.min_ms or 0, timing.peak_gib or 0, timing.first_s or 0],
        device=setup.device,
    )
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    failed, ms, least, peak, first = numbers.tolist()
    return Timing(note=problem or "out of memory") if failed else Timing(ms, least, peak or None, first)


def steps(setup: Setup, kind: str, of: Any, batch: Batch, **options: Any) -> Timing:
    torch.manual_seed(RANK)  # of dropout
    handlers = [DistributedDataParallelKwargs(**UNUSED)]
    accelerator = Accelerator(mixed_precision="bf16", cpu=setup.device.type == "cpu", kwargs_handlers=handlers)
    model = copy.deepcopy(setup.model).train()
    loss = setup.loss(kind, of, model, setup.size.mini, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    loss = under(loss, accelerator.prepare_model(model))
    seconds = []
    for step in range(WARMUPS + REPEATS):
        synchronize(setup.device)
        began = time.perf_counter()
        loss(*batch.fresh()).backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize(setup.device)
        seconds.append(time.perf_counter() - began)
        if step == 0 and setup.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(setup.device)
    peak = torch.cuda.max_memory_allocated(setup.device) / GIB if setup.device.type == "cuda" else None
    settled = seconds[WARMUPS:]
    return Timing(1e3 * statistics.median(settled), 1e3 * min(settled), peak, seconds[0])


def candidates(kind: str, mini: int) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Name -> module and options."""
    found: dict[str, tuple[Any, dict[str, Any]]] = {MINE: (losses, TOGETHER)}
    if kind in ("MultipleNegativesRanking", "CoSENT"):
        found[PARTS] = losses, TOGETHER | {"mini_batch_size": mini}
    found |= {THEIRS: (library, TOGETHER)} if kind in GATHERED else {OWN: (library, {})}
    return found


def run_times(bench: Benchmark, setup: Setup, kind: str, rows: int, title: str) -> None:
    batch = texts(rows * WORLD, setup.size.words, setup.vocabulary, setup.device)
    share = batch.rows(slice(rows * RANK, rows * (RANK + 1)))
    del batch
    for name, (of, options) in candidates(kind, setup.size.mini).items():
        timing = timed(setup, kind, of, rows, share, **options)
        add(bench, title, name, PEER if of is library else OURS, timing)


# --- all of it ---


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def add(bench: Benchmark, title: str, name: str, role: str, timing: Timing, errors: Errors | None = None) -> None:
    """A line, of the first process."""
    if not RANK:
        if timing.note.startswith("WRONG"):
            bench.wrong.append(f"{title}, {name}: {timing.note}")
        bench.add(title, name, role, timing, errors)


def agreed(yes: bool, device: torch.device) -> bool:
    """As the first process has it, whose clock counts."""
    told = torch.tensor(int(yes), device=device)
    dist.broadcast(told, 0)
    return bool(told)


def say(text: str) -> None:
    if not RANK:
        print(text, flush=True)


def main(
    device: Annotated[str, typer.Option(help="cuda, or cpu for a small run")] = "cuda",
    model: Annotated[str, typer.Option(help="a folder, or a name on the hub; on a CPU, a small one")] = "",
    compiled: Annotated[bool | None, typer.Option(help="ours; by default as it comes")] = None,
    match: Match = "",
    missing: Missing = False,
    budget: Budget = 0,
    out: Out = RESULTS,
) -> None:
    if WORLD < 2:
        raise typer.BadParameter("expected two processes or more: torchrun --nproc-per-node 2 benchmarks/swap_ranks.py")
    cpu = device == "cpu"
    size, place = SMALL if cpu else Size(), torch.device("cpu") if cpu else torch.device("cuda", LOCAL)
    if not cpu:
        torch.cuda.set_device(place)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    bench = Benchmark("swap-ranks", place, out, match=match, missing=missing, budget=budget)
    words = [f"word{n}" for n in range(200)]
    # Made before there is a group, in which only the first process would save one.
    made = sentences.encoder(model or ("" if cpu else sentences.MINILM), words, place)
    setup = Setup(made, size, place, compiled)
    dist.init_process_group("gloo" if cpu else "nccl", timeout=LIMIT, device_id=None if cpu else place)
    say(f"{time.perf_counter() - bench.began:.0f} s so far")
    first, other = size.errors
    for kind in KINDS:
        for sizes in ([first] * WORLD, [first, *[other] * (WORLD - 1)]):
            title = f"errors, {kind}, {' + '.join(map(str, sizes))} rows, float32"
            names = [MINE, THEIRS] if kind in GATHERED and len(set(sizes)) == 1 else [MINE]
            if agreed(bench.wants(title, names), place):
                run_errors(bench, setup, kind, sizes, title)
    say(f"{time.perf_counter() - bench.began:.0f} s so far")
    for kind, rows in cases(size):
        title = f"{kind}, {WORLD} x {rows} rows, bfloat16"
        if agreed(bench.wants(title, list(candidates(kind, size.mini))), place):
            run_times(bench, setup, kind, rows, title)
            say(f"{time.perf_counter() - bench.began:.0f} s so far")
    if not RANK:
        bench.finish()
    gc.collect()  # a DDP model that outlives its group destroys it holding the GIL, for which a thread may wait
    dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
