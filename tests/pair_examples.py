"""What the tests of train_splade.py and train_colbert.py share: how a run is started, and what it leaves behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from processes import run_program
from pytest import approx
from safetensors.torch import load_file

EXAMPLES = Path(__file__).parent.parent / "examples"
ENV = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


class Program(NamedTuple):
    """An example, at its smallest."""

    name: str

    def command(self, output: Path, *arguments: Any, launcher: tuple[str, ...] = ()) -> list[str]:
        program = [sys.executable, *launcher, str(EXAMPLES / self.name)]
        return [*program, "--quick", "--output", str(output), *map(str, arguments)]

    def train(self, output: Path, *arguments: Any, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
        command = self.command(output, *arguments, launcher=launcher)
        if not launcher:
            _, script, *given = command
            return run_program(Path(script), *given, env=ENV)
        return subprocess.run(command, capture_output=True, text=True, timeout=900, env=ENV)

    def stop_and_go_on(self, how: str, folder: Path, other: tuple[str, ...], told: str, *arguments: Any) -> None:
        """A whole run in one folder, and one in two parts in the other; ``other`` is an option that makes it another
        run, of which ``told`` is said."""
        whole, halves = folder / "whole", folder / "halves"
        assert self.train(whole, *arguments).returncode == 0
        if how == "asked to":
            stopped = self.train(halves, *arguments, "--stop-after", "2")
            assert stopped.returncode == 0 and "Stopped after step 2 of 4" in said(stopped)
        else:
            process = subprocess.Popen(
                self.command(halves, *arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENV
            )
            while process.poll() is None and not (halves / "checkpoint-1" / "loss.pt").exists():
                time.sleep(0.01)
            process.kill()
            process.wait()
        assert not (halves / "model").exists()
        again = self.train(halves, *arguments)
        assert again.returncode == 2 and "--resume goes on with it" in said(again)
        another = self.train(halves, *arguments, "--resume", *other)
        assert another.returncode == 2 and told in said(another)
        resumed = self.train(halves, *arguments, "--resume")
        assert resumed.returncode == 0, resumed.stdout + resumed.stderr


def said(result: subprocess.CompletedProcess) -> str:
    return " ".join((result.stdout + result.stderr).replace("│", " ").split())


def end_of(output: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """What a finished run reports, and the weights that it saved."""
    result = json.loads((output / "results.json").read_text())
    assert result["finished"]
    assert (output / "results.png").stat().st_size > 10_000
    files = sorted((output / "model").rglob("*.safetensors"))
    weights = {f"{file.parent.name}.{name}": x for file in files for name, x in load_file(file).items()}
    return result, weights


def assert_same_end(one: Path, other: Path, tolerance: float, astray: float = 0.0) -> None:
    """But for so small a share of a weight's numbers."""
    (expected, weights), (got, others) = end_of(one), end_of(other)
    assert [entry["step"] for entry in got["loss"]] == [1, 2, 3, 4]
    assert got.keys() == expected.keys()
    for name in ("loss", "retrieval"):
        for entry, reference in zip(got[name], expected[name], strict=True):
            assert entry == approx(reference, rel=tolerance, abs=tolerance)
    assert others.keys() == weights.keys()
    for name, weight in weights.items():
        assert ((others[name] - weight).abs() > tolerance).double().mean() <= astray, name


def without_dropout(model: Path, folder: Path) -> None:
    """A copy, of whose draws each process would have its own."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps({**config, **off}))
