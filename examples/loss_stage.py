"""Time and peak memory of a loss alone, forward and backward on given embeddings, for ours and for the library's."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Measurement(NamedTuple):
    who: str
    pairs: int
    seconds: float  # median
    peak_bytes: int  # above the embeddings; their gradients are included


class Given(nn.Module):
    """Stands in for the model: its sentence embeddings are the features. Frozen, it has no gradients for them."""

    def __init__(self, dim: int, frozen: bool = False):
        super().__init__()
        self.dim = dim
        self.frozen = frozen

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: x.detach() for name, x in features.items()} if self.frozen else dict(features)

    def get_embedding_dimension(self) -> int:
        return self.dim


def measure(
    makers: dict[str, Callable[[nn.Module], nn.Module]],
    columns: int,
    batch_sizes: list[int],
    dim: int,
    device: torch.device,
) -> Iterator[Measurement]:
    """Every maker's loss at every batch size, on the same random embeddings; losses that disagree are an error."""
    for pairs in batch_sizes:
        generator = torch.Generator().manual_seed(pairs)
        embeddings = [torch.randn(pairs, dim, generator=generator).to(device) for _ in range(columns)]
        labels = torch.randint(0, 4, (pairs,), generator=generator).float().to(device)
        values = {}
        for who, maker in makers.items():
            loss = maker(Given(dim))

            def step(loss: nn.Module = loss, embeddings: list = embeddings, labels: Tensor = labels) -> Tensor:
                leaves = [embedding.requires_grad_() for embedding in embeddings]
                for leaf in leaves:
                    leaf.grad = None
                value = loss([{"sentence_embedding": leaf} for leaf in leaves], labels)
                value.backward()
                return value

            values[who] = step().item()  # compiles, where a loss does
            seconds = median_seconds(step, device)
            for embedding in embeddings:
                embedding.grad = None
            yield Measurement(who, pairs, seconds, peak_bytes(step, device))
        low, high = min(values.values()), max(values.values())
        if high - low > 1e-3 * abs(high):
            raise RuntimeError(f"the losses differ at {pairs} pairs, so their times mean nothing: {values}")


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """The most that `step` holds at a time, above what was there before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    # A CPU has no such counter. The profiler sees each allocation, those of compiled code included.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profile.export_chrome_trace(str(trace))
        events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def median_seconds(step: Callable[[], object], device: torch.device) -> float:
    """Of three runs, or of as many as half a second holds: short ones vary more."""
    times: list[float] = []
    while len(times) < 3 or (sum(times) < 0.5 and len(times) < 50):
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def in_turn(steps: dict[str, Callable[[], object]], device: torch.device, seconds: float) -> dict[str, float]:
    """Median seconds of each step. One of each in turn, so that a machine whose speed wavers does so for all."""
    times: dict[str, list[float]] = {who: [] for who in steps}
    for step in steps.values():  # what a first call pays for
        step()
    began = time.perf_counter()
    while any(len(own) < 3 for own in times.values()) or time.perf_counter() - began < seconds:
        for who, step in steps.items():
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[who].append(time.perf_counter() - start)
    return {who: statistics.median(own) for who, own in times.items()}


def plot(measurements: list[Measurement], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (time_axis, memory_axis) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for who in dict.fromkeys(m.who for m in measurements):
        own = [m for m in measurements if m.who == who]
        pairs = [m.pairs for m in own]
        time_axis.plot(pairs, [m.seconds * 1e3 for m in own], marker="o", label=who)
        memory_axis.plot(pairs, [m.peak_bytes / 2**20 for m in own], marker="o", label=who)
    for axis, label in ((time_axis, "time (ms)"), (memory_axis, "peak memory (MiB)")):
        axis.set(xlabel="batch size", ylabel=f"{label}, forward + backward", xscale="log", yscale="log")
        axis.set_xticks(pairs, [f"{n:,}" for n in pairs])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
