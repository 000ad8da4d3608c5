"""The benchmarks' small CPU mode runs, finds every result right, and writes its files."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
pytest.importorskip("typer")


@pytest.mark.parametrize(
    ("script", "arguments", "lines"),
    [
        ("embedding", ["--no-compiled", "--sizes", "300x16", "--projected", "200x16"], 30),
        ("token_losses", ["--no-compiled", "--head", "64x100x8", "--error", "64x50x8", "--kernel", "8x100"], 15),
        ("contrastive", ["--no-compiled", "--sizes", "64x32", "--small", "32x16", "--sigmoid-size", "64x8"], 25),
        ("preference", ["--no-compiled", "--only", "dpo,logps,losses,orpo-step"], 45),
        ("distillation", ["--no-compiled", "--vocabularies", "100"], 65),
        ("host", ["--rows", "8"], 23),
    ],
)
def test_small_mode(tmp_path, script, arguments, lines):
    if script in ("embedding", "contrastive"):
        pytest.importorskip("sentence_transformers")
    command = [sys.executable, ROOT / "benchmarks" / f"{script}.py", "--device", "cpu", "--repeats", "1", *arguments]
    # One thread: tiny products on a busy machine wait for their threads most of the time.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "BENCH_OUT": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (table,) = tmp_path.glob("*.csv")
    with table.open(newline="") as file:
        found = list(csv.DictReader(file))
    assert len(found) >= lines
    assert all(line["torch"] == torch.__version__ and line["device"] and line["date"] for line in found)
    ours = [line for line in found if line["role"] == "ours"]
    assert ours and all(float(line["error"] or 0) < 1e-4 for line in ours), ours


def test_a_wrong_result_is_not_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    measure = pytest.importorskip("measure")
    bench = measure.Benchmark("family", torch.device("cpu"), tmp_path, repeats=1)
    x = torch.ones(3)

    def broken():
        raise RuntimeError("no such kernel")

    def absent():
        import no_such_package  # noqa: F401

    candidates = [
        measure.Candidate("wrong", measure.OURS, lambda: [1.1 * x], 1e-2),
        measure.Candidate("right", measure.OURS, lambda: [x + 1e-4], 1e-2),
        measure.Candidate("loose", measure.PEER, lambda: [1.1 * x], 1e-2),
        measure.Candidate("broken", measure.PEER, broken, 1e-2),
        measure.Candidate("absent", measure.PEER, absent),
        measure.Candidate("floor", measure.FLOOR, lambda: x + 1),
        measure.Candidate("higher floor", measure.FLOOR, lambda: torch.ones(500, 500) @ torch.ones(500, 500)),
    ]
    bench.case("case", candidates, lambda: [x])
    lines = {line.name: line for line in bench.lines}
    assert bench.lines[0].name == "floor"
    assert lines["wrong"].ms is None and "WRONG" in lines["wrong"].note
    assert lines["right"].ms is not None and lines["right"].floor_ratio is not None
    assert lines["loose"].ms is not None and "inaccurate" in lines["loose"].note
    assert lines["broken"].ms is None and "no such kernel" in lines["broken"].note
    assert lines["absent"].note.startswith("not installed: No module named 'no_such_package'")
    assert lines["floor"].floor_ratio == 1 and lines["higher floor"].floor_ratio > 1
    with pytest.raises(SystemExit, match="case, wrong"):
        bench.finish()
    assert (tmp_path / bench.path.name).exists()


def test_a_benchmark_goes_on_in_another_call(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    measure = pytest.importorskip("measure")
    x, calls = torch.ones(3), []

    def run(name, **options):
        bench = measure.Benchmark("family", torch.device("cpu"), tmp_path, repeats=1, **options)
        for case, value in {"first": x, "second": x if name == "again" else 2 * x}.items():
            candidates = [measure.Candidate("ours", measure.OURS, lambda v=value, c=case: calls.append(c) or [v], 1e-2)]
            bench.case(case, candidates, lambda: [x])
        return bench

    bench = run("first")  # the second case is wrong
    assert bench.wrong and {line.case for line in bench.lines} == {"first", "second"}
    calls.clear()
    bench = run("again", missing=True)
    assert set(calls) == {"second"} and not bench.wrong
    bench = run("again", missing=True)
    assert not bench.lines
    bench.finish()
    assert "0 cases left" in capsys.readouterr().out

    bench = run("again", budget=1e-9)
    assert not bench.lines and bench.left == ["first", "second"]
    bench.finish()
    assert "no time: second" in capsys.readouterr().out
    assert {line.case for line in measure.read_csv(bench.path)} == {"first", "second"}


def test_peak_memory_on_a_cpu(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    measure = pytest.importorskip("measure")

    def run():
        temporary = torch.ones(2**20)  # 4 MiB, freed before the second 8
        del temporary
        return torch.ones(2**21)

    timing = measure.measure(run, torch.device("cpu"), repeats=1)
    assert timing.peak_gib * 2**30 == pytest.approx(2**23, rel=0.01)
