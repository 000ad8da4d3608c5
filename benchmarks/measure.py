"""Timing, peak memory, errors and a results file, shared by the benchmarks beside it.

A benchmark is a list of candidates for one case: floors (the bare work), ours and peers. Each is compared with the
truth, in float64 and of the same inputs, in the same process before its time is printed; its errors stand in its line.
There are two: of the value, what a user reads of the call (a loss, margins, log-probabilities), the mean of
|result - truth| beside the mean of |truth|; and of the gradients, |result - truth| / |truth| by Euclidean norms, the
largest of them. Ours that keep half-precision outputs (`float32_outputs=False`) are lines of their own.

Where calls take microseconds, or two losses are nearly as fast, candidates are timed in turn, a call of each, so that a
host whose speed wavers does so for all of them (`Benchmark.compare`). Ratios and differences are then of medians, to
other people's, and the ratios of four parts of the run say how far to trust them.

Every run adds to `<out>/<family>-<device>.csv`, replacing the lines that it measured again, so that a long benchmark
can be split over several calls, or over GPUs at once: by `--only` and `--match`, or by `--budget 500 --missing` until
nothing is missing. `--out`, or BENCH_OUT in the environment, says where the files are. Tables are made from them by
tables.py, figures by plots.py. `--profile` writes where the time of a call goes, kernel by kernel, in place of a csv.
"""

import csv
import datetime
import fcntl
import fnmatch
import gc
import math
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property, partial
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, TypeVar

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler that reads peak memory on a CPU is chatty

import torch
import typer
from torch import Tensor

T = TypeVar("T")
Loss = Callable[[], Tensor]
OURS, PEER, FLOOR = "ours", "peer", "floor"
GIB = 2**30
HALF = "half-precision outputs"
HALF_DTYPES = (torch.bfloat16, torch.float16)
SHORT_MS, MOST_REPEATS = 200, 60
MOST_TURNS, PARTS = 400, 4  # of candidates that are timed in turn
LONG_MS = 500  # calls that take longer are timed once: they do not waver
RESULTS = Path(__file__).parent / "results"

# Options that every benchmark takes.
Match = Annotated[str, typer.Option(help="only cases whose title contains this: patterns (*), and | between several")]
Profile = Annotated[bool, typer.Option("--profile", help="the kernels of a call of each, in <family>-profile.txt")]
Peers = Annotated[bool, typer.Option("--peers/--no-peers", help="other people's, beside the floor and ours")]
Missing = Annotated[bool, typer.Option("--missing", help="only cases that the file does not have yet")]
Budget = Annotated[float, typer.Option(help="seconds after which no further case is begun; 0: no limit")]
Out = Annotated[Path, typer.Option(envvar="BENCH_OUT", help="folder of the csv")]


@dataclass
class Timing:
    ms: float | None = None  # median
    min_ms: float | None = None
    peak_gib: float | None = None  # above the inputs; the gradients that a call returns are counted
    first_s: float | None = None  # the first call, compilation included
    note: str = ""
    # Of candidates that are timed in turn, beside the first of other people's:
    more_us: float | None = None  # what the median takes more
    least_ratio: float | None = None  # of medians, in parts of the run
    most_ratio: float | None = None


@dataclass
class Candidate:
    """One way to do the work of a case. `run` returns (loss, gradients...), the same for every candidate."""

    name: str
    role: str
    run: Callable[[], Sequence[Tensor]]
    bound: float = 0.0  # the largest relative error that is still correct; floors are not checked
    read: Loss | None = None  # the value of a case, where it is not the loss; in a call of its own, which is not timed
    note: str = ""


@dataclass
class Errors:
    """Of the results of a call, against the truth."""

    value: str = ""  # what the first result is; without, all are taken for gradients
    value_mean: float | None = None  # of |truth|
    value_error: float | None = None  # the mean of |result - truth|
    gradient_error: float | None = None  # the largest relative one
    gradients: str = ""  # that of each

    @property
    def worst(self) -> float:
        """The largest, relative to the size of the truth."""
        of_value = 0.0 if self.value_error is None else self.value_error / (self.value_mean or 1.0)
        return max(of_value, self.gradient_error or 0.0)


@dataclass
class Line:
    """A line of the csv."""

    case: str
    name: str
    role: str
    ms: float | None
    min_ms: float | None
    floor_ratio: float | None  # where candidates are timed in turn: to the first of other people's
    more_us: float | None
    least_ratio: float | None
    most_ratio: float | None
    peak_gib: float | None
    first_s: float | None
    value: str
    value_mean: float | None
    value_error: float | None
    gradient_error: float | None
    gradients: str
    note: str
    device: str
    torch: str
    triton: str
    sentence_transformers: str
    date: str

    @property
    def is_done(self) -> bool:
        """There is a number; of a peer, or what became of it."""
        has_error = self.gradient_error is not None or self.value_error is not None
        return self.role == PEER or self.ms is not None or (has_error and "WRONG" not in self.note)


IN_TURN = {"more_us", "least_ratio", "most_ratio"}  # columns that a file without such candidates may lack


def measure(
    run: Callable[[], object], device: torch.device, warmups: int = 2, repeats: int = 5, first: float | None = None
) -> Timing:
    """The median of `repeats` calls after `warmups`, by CUDA events on a GPU; of more where calls are short, because
    those are bound by the host, whose speed wavers (after a compilation above all). `first`: the seconds of a call that
    came before."""
    _collect(device)
    if first is None:
        first = seconds_of(run, device)[0]
    times = [_time_ms(run, device)]
    if times[0] <= LONG_MS:
        for _ in range(warmups - 2):
            run()
        times = [_time_ms(run, device) for _ in range(repeats)]
        while sum(times) < SHORT_MS and len(times) < MOST_REPEATS:
            times.append(_time_ms(run, device))
    peak = _peak_bytes(run, device)
    return Timing(statistics.median(times), min(times), peak / GIB, first)


def in_turn(
    runs: Sequence[Callable[[], object]], device: torch.device, seconds: float, warmups: int = 3, least: int = 8
) -> list[list[float]]:
    """Milliseconds of synchronised calls of each, as many as `seconds` hold; one of each in turn, now in one order and
    now in the other."""
    _collect(device)
    for _ in range(warmups):
        for run in runs:
            seconds_of(run, device)
    times: list[list[float]] = [[] for _ in runs]
    if not runs:
        return times
    order, began = list(range(len(runs))), time.perf_counter()
    while len(times[0]) < least or (len(times[0]) < MOST_TURNS and time.perf_counter() - began < seconds):
        for k in order:
            times[k].append(1e3 * seconds_of(runs[k], device)[0])
        order.reverse()
    return times


def beside(times: Sequence[float], others: Sequence[float] | None) -> tuple[Timing, float | None]:
    """Of calls that were timed in turn with others, and the ratio to those; without others, of these alone."""
    median = statistics.median(times)
    timing = Timing(median, min(times))
    if others is None:
        return timing, None
    theirs = statistics.median(others)
    parts = min(PARTS, len(times))
    spans = [slice(k * len(times) // parts, (k + 1) * len(times) // parts) for k in range(parts)]
    ratios = [statistics.median(times[span]) / statistics.median(others[span]) for span in spans]
    timing.more_us, timing.least_ratio, timing.most_ratio = 1e3 * (median - theirs), min(ratios), max(ratios)
    return timing, median / theirs


def once(run: Callable[[], T], device: torch.device) -> tuple[T, Timing]:
    """The result of a long call, and the time and the peak of a second one."""
    first, result = seconds_of(run, device)
    _collect(device)
    if device.type == "cpu":
        return result, Timing(1e3 * seconds_of(run, device)[0], first_s=first)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    ms = _time_ms(run, device)
    return result, Timing(ms, ms, (torch.cuda.max_memory_allocated(device) - before) / GIB, first)


def failure(error: Exception) -> str:
    """What went wrong, short: running out of memory is a result like another."""
    text = str(error)
    if isinstance(error, ImportError):  # peers are imported where they are called
        return f"not installed: {text}"[:100]
    if isinstance(error, torch.OutOfMemoryError) or "not enough memory" in text or "ALLOC_FAILED" in text:
        return "out of memory"
    return f"failed: {type(error).__name__}: {text.splitlines()[0] if text else ''}"[:100]


def seconds_of(run: Callable[[], T], device: torch.device) -> tuple[float, T]:
    started = time.perf_counter()
    result = run()
    _synchronize(device)
    return time.perf_counter() - started, result


def _time_ms(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cpu":
        return 1e3 * seconds_of(run, device)[0]
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end)


def _peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Of one call, in memory that is as it was before the first."""
    _collect(device)
    if device.type != "cpu":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        kept = run()  # gradients stay alive to the end of the call, as in training
        torch.cuda.synchronize(device)
        del kept
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = run()
    changes = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    del kept
    held = peak = 0
    for event in sorted(changes, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.cuda.synchronize(device)


def _collect(device: torch.device) -> None:
    gc.collect(1)  # what is young: a full collection takes half a second here, several times a line
    if device.type != "cpu":
        torch.cuda.empty_cache()


def kernel_times(run: Callable[[], object], device: torch.device, most: int = 12) -> list[str]:
    """Lines of a table of one call, after two: the longest kernels (on a CPU, operations), and what all take."""
    for _ in range(2):
        seconds_of(run, device)
    kinds = torch.profiler.ProfilerActivity
    on_cpu = device.type == "cpu"
    with torch.profiler.profile(activities=[kinds.CPU] if on_cpu else [kinds.CPU, kinds.CUDA]) as profile:
        seconds_of(run, device)
    events = [e for e in profile.key_averages() if on_cpu or e.device_type == torch.autograd.DeviceType.CUDA]
    times = {e.key: (e.self_cpu_time_total if on_cpu else e.self_device_time_total, e.count) for e in events}
    total = sum(time for time, _ in times.values())
    longest = sorted(times.items(), key=lambda item: item[1], reverse=True)[:most]
    told = [f"{1e-3 * time:9.3f} ms {time / total:6.1%} {count:6d} x  {key[:100]}" for key, (time, count) in longest]
    return [*told, f"{1e-3 * total:9.3f} ms in all, {len(times)} kinds"]


def value_and_gradients(loss: Loss, leaves: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
    """A training step of a loss: forward, backward, and the gradients of `leaves`."""

    def run() -> list[Tensor]:
        for leaf in leaves:
            leaf.grad = None
        value = loss()
        value.backward()
        gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
        for leaf in leaves:
            leaf.grad = None
        return [value.detach(), *gradients]

    return run


def value(loss: Callable[..., Any], *arguments: Any, **keywords: Any) -> Loss:
    """The loss alone, of a call that returns metrics with it."""
    return lambda: loss(*arguments, **keywords).loss


def as_candidates(
    losses: Mapping[str, Loss],
    leaves: Sequence[Tensor],
    role: str,
    bound: float,
    reads: Mapping[str, Loss] | None = None,  # by the same names
) -> Iterator[Candidate]:
    """Half-precision outputs have no bound: their errors are what the line is there to say."""
    for name, loss in losses.items():
        allowed = math.inf if HALF in name else bound
        yield Candidate(name, role, value_and_gradients(loss, leaves), allowed, (reads or {}).get(name))


def precisions(name: str, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """Ours as it comes, and with outputs as wide as half-precision inputs: label -> options."""
    return {name: {}} | ({f"{name}, {HALF}": {"float32_outputs": False}} if dtype in HALF_DTYPES else {})


def likely_tokens(hidden: Tensor, weight: Tensor, size: int = 2048) -> Tensor:  # (..., H), (V, H) -> (...)
    """Tokens that a model finds likely, as those of a text are: the largest of its logits with noise."""
    found = []
    for rows in hidden.detach().flatten(0, -2).split(size):
        logits = (rows @ weight.detach().T).float()
        found.append(logits.add_(torch.randn_like(logits)).argmax(1))
    return torch.cat(found).view(hidden.shape[:-1])


def floors(
    label: str,
    trained: tuple[Tensor, Tensor],
    frozen: Sequence[tuple[Tensor, Tensor]],
    sizes: Sequence[int],
    **more: Any,
) -> list[Candidate]:
    """`products`, with outputs as wide as the inputs, and with float32 ones beside them."""
    note = f"chunks of {max(sizes)}"
    found = [Candidate(f"floor: {label}", FLOOR, products(trained, frozen, sizes, **more), note=note)]
    if trained[0].dtype in HALF_DTYPES:
        wide = products(trained, frozen, sizes, outputs=torch.float32, **more)
        found.append(Candidate("floor, float32 outputs", FLOOR, wide, note=note))
    return found


def products(
    trained: tuple[Tensor, Tensor],  # (M, H), (V, H)
    frozen: Sequence[tuple[Tensor, Tensor]],
    sizes: Sequence[int],
    forwards: int = 1,
    outputs: torch.dtype | None = None,
) -> Callable[[], list[Tensor]]:
    """The bare matrix products of a chunked loss, in chunks of `sizes` rows: outputs of each frozen head, `forwards`
    times those of the trained one, and the two products back. `outputs` is their dtype where it is not the inputs'."""
    x, weight = (t.detach() for t in trained)
    wide = {"out_dtype": outputs} if outputs not in (None, x.dtype) and x.is_cuda else {}
    sides = [*frozen, *[(x, weight)] * forwards]
    # A gradient narrower than the outputs lies beside them; made here, because a conversion is no product.
    narrow = x[: max(sizes)] @ weight.T if wide else None

    def run() -> list[Tensor]:
        buffer = torch.empty(max(sizes), len(weight), dtype=wide.get("out_dtype", x.dtype), device=x.device)
        start, results = 0, []
        for size in sizes:
            rows, logits = slice(start, start + size), buffer[:size]
            for hidden, head in sides:
                torch.mm(hidden[rows], head.T, out=logits, **wide)
            gradient = logits if narrow is None else narrow[:size]
            results = [gradient @ weight, gradient.T @ x[rows]]
            start += size
        return results

    return run


Fused = Callable[..., Tensor]  # (input (M, H), weight (V, H), target (M,), reduction, scale) -> the loss, or each row's


def linear_cross_entropies() -> dict[str, Fused]:
    """Other people's cross-entropy of a product, each imported where it is called. Liger's scaled one alone takes a
    scale: the others' inputs are multiplied by it, in their dtype."""

    def liger(x: Tensor, weight: Tensor, target: Tensor, reduction: str = "mean", scale: float = 1.0) -> Tensor:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Kernel

        return Kernel.apply(times(x, scale), weight, target, None, None, -100, 0.0, 0.0, reduction)[0]

    def liger_scaled(x: Tensor, weight: Tensor, target: Tensor, reduction: str = "mean", scale: float = 1.0) -> Tensor:
        from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Kernel

        losses = Kernel.apply(x, weight, target, 1 / scale)
        return losses if reduction == "none" else losses.mean()

    def cce(x: Tensor, weight: Tensor, target: Tensor, reduction: str = "mean", scale: float = 1.0) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        return linear_cross_entropy(times(x, scale), weight, target, reduction=reduction)

    def quack(
        x: Tensor, weight: Tensor, target: Tensor, reduction: str = "mean", scale: float = 1.0, base: bool = False
    ) -> Tensor:
        from quack import linear_cross_entropy as kernels

        x = times(x, scale)
        if reduction != "none":
            options = {"reduction": reduction, "tuned": False, "use_scaled_exp": not base}
            return kernels.chunked_linear_cross_entropy(x, weight, target, **options)
        given, alone = (x.detach(), weight.detach(), target, 4096), {"need_dx": False, "need_dw": False}
        if base:
            return kernels.chunked_linear_cross_entropy_fwd(*given, tuned=False, **alone)[0]
        return kernels.scaled_exp_linear_cross_entropy_fwd(*given, **alone)[0][: len(x)]  # in whole tiles

    return {
        "Liger fused linear CE": liger,
        "Liger scaled cross-entropy": liger_scaled,
        "cut-cross-entropy": cce,
        "quack, scaled exponentials": quack,
        "quack, base": partial(quack, base=True),
    }


def times(x: Tensor, scale: float) -> Tensor:
    return x if scale == 1.0 else x * scale


def trl_kernel(module: str, name: str) -> Any:
    """A kernel of TRL. They ask the trainers' utilities for a DeepSpeed context, and so need `datasets` and
    `accelerate`; where those are not installed an empty context stands in."""
    utilities = "trl.trainer.utils"
    try:
        import_module(utilities)
    except (ImportError, RuntimeError):  # the latter from TRL's lazy imports
        stub = ModuleType(utilities)
        stub.maybe_gather_lm_head_ctx = lambda *parameters: nullcontext()  # type: ignore[attr-defined]
        sys.modules[utilities] = stub
    return getattr(import_module(f"trl.kernels.{module}"), name)


def relative_error(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest |got - expected| / |expected| (Euclidean norms) over the tensors of a result."""
    if len(got) != len(expected):
        raise ValueError(f"expected {len(expected)} results, got {len(got)}")
    worst = 0.0
    for ours, truth in zip(got, expected, strict=True):
        if ours.shape != truth.shape:
            raise ValueError(f"expected a result of shape {tuple(truth.shape)}, got {tuple(ours.shape)}")
        # In blocks: a float64 copy of a gradient of gigabytes would not fit beside the inputs.
        pairs = zip(ours.reshape(-1).split(2**24), truth.reshape(-1).split(2**24), strict=True)
        norms = [((a.double() - b.double()).square().sum(), b.double().square().sum()) for a, b in pairs]
        difference, size = (torch.stack(list(column)).sum().sqrt().item() for column in zip(*norms, strict=True))
        error = difference / size if size else difference
        worst = max(worst, error) if error == error else float("inf")
    return worst


def errors_of(got: Sequence[Tensor], truth: Sequence[Tensor], value: str, names: Sequence[str]) -> Errors:
    """`value` says what the first result is, `names` what the gradients are of."""
    if len(got) != len(truth):
        raise ValueError(f"expected {len(truth)} results, got {len(got)}")
    found = Errors(value)
    if value:
        (ours, *got), (exact, *truth) = got, truth
        if ours.shape != exact.shape:
            raise ValueError(f"expected {value} of shape {tuple(exact.shape)}, got {tuple(ours.shape)}")
        error = (ours.double() - exact.double()).abs().mean().item()
        found.value_error = error if error == error else math.inf
        found.value_mean = exact.double().abs().mean().item()
    errors = [relative_error([ours], [exact]) for ours, exact in zip(got, truth, strict=True)]
    found.gradient_error = max(errors, default=None)
    found.gradients = ", ".join(f"{name} {error:.1e}" for name, error in zip(names, errors))
    return found


@dataclass
class Benchmark:
    """Runs cases, and prints and writes each line as it comes."""

    family: str
    device: torch.device
    out: Path
    warmups: int = 2
    repeats: int = 5
    match: str = ""  # measure only cases whose name contains this, or one of several patterns
    peers: bool = True
    missing: bool = False  # leave out cases of which every candidate has its line in the file
    budget: float = 0.0  # seconds; 0: no limit
    profile: bool = False
    lines: list[Line] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)  # cases for which there was no time
    began: float = field(default_factory=time.perf_counter)

    def chosen(self, *cases: str) -> bool:
        """Whether any of these cases is asked for: worth its inputs."""
        patterns = [f"*{part.strip()}*" for part in self.match.split("|")]
        return any(fnmatch.fnmatchcase(case, pattern) for case in cases for pattern in patterns)

    def wants(self, case: str, names: Collection[str]) -> bool:
        """Whether to measure these candidates of a case now."""
        if not self.chosen(case):
            return False
        if self.missing and set(names) <= {line.name for line in self.known if line.case == case and line.is_done}:
            return False
        if self.budget and time.perf_counter() - self.began > self.budget:
            self.left.append(case)
            return False
        return True

    def case(
        self,
        name: str,
        candidates: Sequence[Candidate],
        truth: Callable[[], Sequence[Tensor]] | None,
        value: str = "loss",
        gradients: Sequence[str] = (),
        timed: bool = True,
    ) -> None:
        """Measure the candidates of one case, floors first. `truth` gives what `run` should; None: nothing to check.
        `value` says what the first of that is ("": a gradient like the others), and `gradients` what the rest is of.

        Ratios are to the first floor. One that fails is a line of the table, so that the others are still measured;
        ours is reported at the end too. Without `timed` there are errors alone.
        """
        candidates = [c for c in candidates if self.peers or c.role != PEER]
        if not self.wants(name, [c.name for c in candidates]):
            return
        if timed and "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # peers compile a closure in every call; past dynamo's limit they would run eagerly
        if self.profile:
            self._profile(name, candidates if timed else ())
            return
        expected = None if truth is None else truth()
        floor = None
        for candidate in sorted(candidates, key=lambda c: c.role != FLOOR):
            timing, errors = Timing(), Errors()
            try:
                if candidate.role == FLOOR or expected is None:
                    timing = measure(candidate.run, self.device, self.warmups, self.repeats)
                    timing.note = candidate.note
                else:
                    timing, errors = self._checked(candidate, expected, value, gradients, timed)
            except Exception as problem:
                timing = Timing(note=failure(problem))
            if candidate.role == OURS and (timing.note if not timed else timing.ms is None):
                self.wrong.append(f"{name}, {candidate.name}: {timing.note}")
            if candidate.role == FLOOR:
                floor = floor or timing.ms
            _collect(self.device)
            self.add(name, candidate.name, candidate.role, timing, errors, floor)

    def compare(
        self,
        name: str,
        candidates: Sequence[Candidate],
        truth: Callable[[], Sequence[Tensor]],
        value: str = "loss",
        gradients: Sequence[str] = (),
        seconds: float = 0.5,
    ) -> None:
        """As `case`, but the candidates whose results are right are timed in turn, for `seconds`, and stand beside the
        first that is not ours."""
        candidates = [c for c in candidates if self.peers or c.role == OURS]
        if not self.wants(name, [c.name for c in candidates]):
            return
        expected = truth()
        found: dict[str, tuple[Timing, Errors]] = {}
        right = []
        for c in candidates:
            try:
                found[c.name] = self._right(c, expected, value, gradients)
            except Exception as problem:
                found[c.name] = Timing(note=failure(problem)), Errors()
            else:
                if "WRONG" not in found[c.name][0].note:
                    right.append(c)
        del expected
        times = in_turn([c.run for c in right], self.device, seconds, self.warmups, self.repeats)
        by_name = {c.name: own for c, own in zip(right, times)}
        others = next((by_name[c.name] for c in right if c.role != OURS), None)
        for c in candidates:
            timing, errors = found[c.name]
            ratio = None
            if own := by_name.get(c.name):
                timed, ratio = beside(own, None if own is others else others)
                peak = _peak_bytes(c.run, self.device) / GIB
                timing = replace(timed, peak_gib=peak, first_s=timing.first_s, note=timing.note)
            elif c.role == OURS:
                self.wrong.append(f"{name}, {c.name}: {timing.note}")
            self.add(name, c.name, c.role, timing, errors, ratio=ratio)
        _collect(self.device)

    def _profile(self, case: str, candidates: Sequence[Candidate]) -> None:
        """Where a call's time goes, by kernels, the longest first."""
        for candidate in candidates:
            try:
                told = kernel_times(candidate.run, self.device)
            except Exception as problem:
                told = [failure(problem)]
            _collect(self.device)
            text = "".join(f"{line}\n" for line in [f"{case} | {candidate.name}", *told, ""])
            print(text, flush=True)
            self.out.mkdir(parents=True, exist_ok=True)
            with (self.out / f"{self.family}-profile.txt").open("a") as file:
                file.write(text)

    def _checked(
        self, candidate: Candidate, expected: Sequence[Tensor], value: str, gradients: Sequence[str], timed: bool
    ) -> tuple[Timing, Errors]:
        """A time, once the result is right."""
        found, errors = self._right(candidate, expected, value, gradients, ", not timed" * timed)
        if "WRONG" in found.note:
            return found, errors
        timing = Timing()
        if timed:
            timing = measure(candidate.run, self.device, self.warmups, self.repeats, found.first_s)
        timing.note = found.note
        return timing, errors

    def _right(
        self,
        candidate: Candidate,
        expected: Sequence[Tensor],
        value: str,
        gradients: Sequence[str],
        told: str = ", not timed",
    ) -> tuple[Timing, Errors]:
        """The first call's seconds, and what its errors say: a peer's stand beside its time, ours only where they are
        small."""
        first, result = seconds_of(candidate.run, self.device)
        if candidate.read is not None:
            result = [candidate.read().detach(), *result[1:]]
        errors = errors_of(result, expected, value, gradients)
        del result
        wrong = errors.worst > candidate.bound
        note = ""
        if wrong and candidate.role == OURS:
            note = f"WRONG: {errors.worst:.1e}, above {candidate.bound:.0e}{told}"
        elif wrong:
            note = f"inaccurate: above {candidate.bound:.0e}"
        return Timing(first_s=first, note=note), errors

    def add(
        self,
        case: str,
        name: str,
        role: str,
        timing: Timing,
        errors: Errors | None = None,
        floor: float | None = None,
        ratio: float | None = None,  # of an error, to what errors are like
    ) -> None:
        if ratio is None and timing.ms and floor:
            ratio = timing.ms / floor
        numbers = {"floor_ratio": ratio, **asdict(errors or Errors()), **asdict(timing)}
        line = Line(case=case, name=name, role=role, **numbers, **self.where())  # type: ignore[arg-type]
        self.lines.append(line)
        print(" | ".join([case, *_cells(line)]), flush=True)
        with locked(self.path):  # a run that is cut short keeps what it has, and so does one beside it
            write_csv(self.path, merge(read_csv(self.path), [line]))

    @property
    def path(self) -> Path:
        slug = re.sub(r"[^a-z0-9]+", "-", self.where()["device"].lower()).strip("-")
        return self.out / f"{self.family}-{slug}.csv"

    @cached_property
    def known(self) -> list[Line]:
        """What the file has from before."""
        return read_csv(self.path)

    def where(self) -> dict[str, str]:
        name = torch.cuda.get_device_name(self.device) if self.device.type != "cpu" else f"cpu ({platform.machine()})"
        versions = {key: _version(key) for key in ("torch", "triton", "sentence-transformers")}
        return {
            "device": name,
            "date": datetime.date.today().isoformat(),
            **{key.replace("-", "_"): version for key, version in versions.items()},
        }

    def finish(self) -> None:
        """Print the table. Exits with an error if something of ours was wrong."""
        for case in self.left:
            print(f"no time: {case}")
        if not self.lines and not self.left and not self.missing and not self.profile:
            raise SystemExit("no case was chosen")
        if self.lines:
            print_table(self.lines)
            print(f"written to {self.path}")
        print(f"{time.perf_counter() - self.began:.0f} s, {len(self.left)} cases left")
        if self.wrong:
            raise SystemExit("WRONG: " + "; ".join(self.wrong))


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def merge(old: Sequence[Line], new: Sequence[Line]) -> list[Line]:
    """The lines that were not measured again, then the new ones; those of a case stay together."""
    replaced = {(line.case, line.name) for line in new}
    lines = [line for line in old if (line.case, line.name) not in replaced] + list(new)
    order = {case: place for place, case in enumerate(dict.fromkeys(line.case for line in (*old, *new)))}
    return sorted(lines, key=lambda line: order[line.case])


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Nobody else changes this file meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def read_csv(path: Path) -> list[Line]:
    if not path.exists() or not path.stat().st_size:
        return []
    numbers = [f.name for f in fields(Line) if "float" in str(f.type)]
    found = []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        lacking = dict.fromkeys(f.name for f in fields(Line) if f.name not in (reader.fieldnames or ()))
        if set(reader.fieldnames or ()) - {f.name for f in fields(Line)} or set(lacking) - IN_TURN:
            raise SystemExit(f"expected the columns of today in {path}, got {reader.fieldnames}: move it away")
        for row in (lacking | row for row in reader):
            values = {key: (float(value) if value else None) if key in numbers else value for key, value in row.items()}
            found.append(Line(**values))  # type: ignore[arg-type]
    return found


def write_csv(path: Path, lines: Sequence[Line]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Line)], lineterminator="\n")
        writer.writeheader()
        for line in lines:
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in asdict(line).items()})


COLUMNS = ("", "ms", "ratio", "us more", "peak GiB", "first s", "of gradients", "of the value", "")


def _cells(line: Line) -> list[str]:
    numbers = [(line.ms, ".3g" if (line.ms or 0) < 100 else ".0f"), (line.floor_ratio, ".2f")]
    numbers += [(line.more_us, "+.0f"), (line.peak_gib, ".3g")]
    numbers += [(line.first_s, ".1f"), (line.gradient_error, ".1e")]
    told = ["" if number is None else format(number, form) for number, form in numbers]
    of_value = "" if line.value_error is None else f"{line.value_error:.1e} of {line.value_mean:.3g}"
    return [line.name, *told, of_value, line.note]


def print_table(lines: Sequence[Line]) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        for line in lines:
            print("  ".join([line.case, *_cells(line)]))
        return
    table = Table(box=None, pad_edge=False)
    for column in COLUMNS:
        number = column != ""
        table.add_column(column, justify="right" if number else "left", min_width=8 if number else None, no_wrap=True)
    case = None
    for line in lines:
        if line.case != case:
            case = line.case
            table.add_row()
            table.add_row(case, style="bold")
        table.add_row(*_cells(line), style="cyan" if line.role == OURS else None)
    where = lines[0]
    console = Console(width=170)
    console.print(table)
    console.print(f"\n{where.device}, torch {where.torch}, triton {where.triton or '-'}")
