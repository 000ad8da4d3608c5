"""InfoNCE of the ready embeddings of all processes, ours beside sentence-transformers'.

    torchrun --nproc-per-node 2 benchmarks/gathered.py                  # two GPUs with NCCL
    torchrun --nproc-per-node 2 benchmarks/gathered.py --device cpu     # gloo, small

Each process has its share of the pairs, the loss of its own queries, and gradients of its own embeddings from the
losses of all. Time and memory are the most of any process, and so are errors, against float64 of the whole batch.
"""

import os
import statistics
from collections.abc import Callable
from functools import partial
from typing import Annotated

import torch
import torch.distributed as dist
import typer
from contrastive import BOUNDS, PAIR, SCALE, one_way, pair, shaped, truth
from measure import (
    GIB,
    OURS,
    PEER,
    RESULTS,
    Benchmark,
    Errors,
    Out,
    Timing,
    errors_of,
    failure,
    precisions,
    seconds_of,
    value_and_gradients,
)
from torch import Tensor, nn

from chunked_embed import functional as CF

WORLD, RANK, LOCAL = (int(os.environ.get(name, "0")) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"))
WARMUPS, REPEATS = 3, 10


def of_library(a: Tensor, b: Tensor) -> Tensor:
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.util import dot_score

    options = {"scale": SCALE, "similarity_fct": dot_score, "gather_across_devices": True}
    return MultipleNegativesRankingLoss(nn.Identity(), **options).compute_loss_from_embeddings([a, b], None)


def largest(numbers: list[float], device: torch.device) -> list[float]:
    """Of all processes."""
    found = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.tolist()


def timed(run: Callable[[], list[Tensor]], device: torch.device) -> Timing:
    def together() -> float:
        dist.barrier()
        return 1e3 * seconds_of(run, device)[0]

    for _ in range(WARMUPS):
        together()
    cuda, before = device.type == "cuda", 0
    if cuda:
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    times = [together() for _ in range(REPEATS)]
    peak = torch.cuda.max_memory_allocated(device) - before if cuda else 0
    ms, least, gib = largest([statistics.median(times), min(times), peak / GIB], device)
    return Timing(ms, least, gib or None)


def checked(run: Callable[[], list[Tensor]], expected: list[Tensor], rows: slice, device: torch.device) -> Errors:
    """The mean of the losses; a share's gradients come from as many losses as there are processes."""
    loss, *grads = run()
    dist.all_reduce(loss.div_(WORLD))
    whole = [expected[0], *(grad[rows] for grad in expected[1:])]
    found = errors_of([loss, *(grad.float() / WORLD for grad in grads)], whole, "loss", PAIR)
    found.value_error, found.gradient_error = largest([found.value_error or 0.0, found.gradient_error or 0.0], device)
    return found


def main(
    device: Annotated[str, typer.Option(help="cuda, or cpu for a small run")] = "cuda",
    size: Annotated[str, typer.Option(help="rows of a process x width")] = "",
    compiled: bool = True,
    out: Out = RESULTS,
) -> None:
    if WORLD < 2:
        raise typer.BadParameter("expected two processes or more: torchrun --nproc-per-node 2 benchmarks/gathered.py")
    cpu = device == "cpu"
    place = torch.device("cpu") if cpu else torch.device("cuda", LOCAL)
    if not cpu:
        torch.cuda.set_device(place)
    share, width = (int(n) for n in (size or ("32x16" if cpu else "32768x768")).split("x"))
    dtype = torch.float32 if cpu else torch.bfloat16
    dist.init_process_group("gloo" if cpu else "nccl", device_id=None if cpu else place)
    bench = Benchmark("swap-ranks", place, out)
    whole = pair(bench, WORLD * share, width, dtype)
    expected = truth(one_way, whole)()
    rows = slice(RANK * share, (RANK + 1) * share)
    leaves = [side.detach()[rows].clone().requires_grad_() for side in whole]
    del whole
    settings = {"scale": SCALE, "similarity": "dot", "compiled": compiled, "gather_across_devices": True}
    kinds = {
        label: (OURS, partial(CF.info_nce, *leaves, **settings, **more))
        for label, more in precisions("ours", dtype).items()
    }
    kinds["sentence-transformers"] = (PEER, partial(of_library, *leaves))
    title = shaped(f"gathered InfoNCE, {WORLD} x", share, width, dtype)
    for name, (role, loss) in kinds.items():
        run, errors = value_and_gradients(loss, leaves), None
        try:
            errors = checked(run, expected, rows, place)
            timing = timed(run, place)
        except (ImportError, torch.OutOfMemoryError) as problem:  # of every process: all have as much to do
            timing = Timing(note=failure(problem))
        if RANK:
            continue
        if role == OURS and not (errors and errors.worst <= BOUNDS[dtype]):
            timing.note = f"WRONG: {errors.worst:.1e}" if errors else timing.note
            bench.wrong.append(f"{title}, {name}: {timing.note}")
        bench.add(title, name, role, timing, errors)
    if not RANK:
        bench.finish()
    dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
