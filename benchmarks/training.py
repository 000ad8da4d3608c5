"""What the benchmarks of training runs share: a clock in the trainer, and curves, their file and their plot."""

import csv
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from measure import GIB, Timing, locked
from transformers import TrainerCallback

UNTIMED = 5  # steps


class Clock(TrainerCallback):
    """Seconds of each step, the peak of those after the first, and the steps that a loss scaler skipped."""

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self.devices = [device for device in devices if device.type == "cuda"]
        self.seconds: list[float] = []
        self.skipped: list[int] = []

    def _now(self) -> float:
        for device in self.devices:
            torch.cuda.synchronize(device)
        return time.perf_counter()

    @staticmethod
    def _scale(optimizer: Any) -> float:
        scaler = getattr(optimizer, "scaler", None)
        return 1.0 if scaler is None else scaler.get_scale()

    def on_step_begin(self, *args: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self.scale = self._scale(optimizer)
        self.began = self._now()

    def on_step_end(self, *args: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self.seconds.append(self._now() - self.began)
        # A fused optimizer is called for a skipped step as well; a scale that fell says that it was one.
        if self._scale(optimizer) < self.scale:
            self.skipped.append(len(self.seconds))
        if len(self.seconds) == 1:
            for device in self.devices:
                torch.cuda.reset_peak_memory_stats(device)

    def timing(self) -> Timing:
        settled = self.seconds[min(UNTIMED, len(self.seconds) - 1) :]
        peaks = [torch.cuda.max_memory_allocated(device) / GIB for device in self.devices]
        steps = ", ".join(map(str, self.skipped))
        note = f", the scaler skipped step{'s' * (len(self.skipped) > 1)} {steps}" if steps else ""
        median, least = statistics.median(settled), min(settled)
        return Timing(1e3 * median, 1e3 * least, max(peaks, default=None), self.seconds[0], note)


def write_curves(path: Path, key: Mapping[str, str], curves: Mapping[str, Sequence[float]]) -> None:
    """A row a step, in place of those of an earlier run. A curve without points is a column without numbers."""
    with locked(path):
        kept = [row for row in read_rows(path) if not key.items() <= row.items()]
        new = []
        for step in range(max(map(len, curves.values()))):
            points = {name: f"{curve[step]:.8g}" if step < len(curve) else "" for name, curve in curves.items()}
            new.append({**key, "step": step + 1, **points})
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, (*key, "step", *curves))
            writer.writeheader()
            writer.writerows([*kept, *new])


def read_rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def read_curve(path: Path, key: Mapping[str, str], name: str) -> list[float]:
    return [float(row[name]) for row in read_rows(path) if key.items() <= row.items() and row.get(name)]


def plot_curves(
    path: Path, grid: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]], styles: Mapping[str, str]
) -> None:
    """A row for each case, in it an axis for each quantity, in that a line for each run. Skipped without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print("no matplotlib: no plot")
        return
    if not grid:
        return
    columns = max(map(len, grid.values()))
    size = (5.5 * columns, 2.4 * len(grid))
    figure, axes = pyplot.subplots(len(grid), columns, squeeze=False, figsize=size, layout="constrained", sharex=True)
    for (title, quantities), row in zip(grid.items(), axes):
        for (quantity, lines), axis in zip(quantities.items(), row):
            for who, points in lines.items():
                axis.plot(range(1, len(points) + 1), points, styles.get(who, "C2-."), label=who, linewidth=1)
            axis.set_title(f"{title}: {quantity}", fontsize=8)
        row[0].legend(fontsize=6)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
