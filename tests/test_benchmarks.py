"""The benchmarks' small CPU mode runs, finds every result right, and writes its files, and the tables are theirs."""

import csv
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
pytest.importorskip("typer")


def run_script(folder, script, arguments):
    """-> the lines of its csv"""
    command = [sys.executable, ROOT / "benchmarks" / f"{script}.py", "--device", "cpu", "--repeats", "1", *arguments]
    # One thread: tiny products on a busy machine wait for their threads most of the time.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "BENCH_OUT": str(folder)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (table,) = folder.glob("*.csv")
    return rows_of(table)


def rows_of(table):
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


def has_errors(line):
    """Against a truth; or of a line that another one answers for, and of what fails here."""
    elsewhere = ("mega-batch", "batch-", "training step")
    unchecked = line["case"].startswith(elsewhere) or "first product" in line["name"] or line["role"] == "floor"
    unchecked |= "without gradients" in line["case"] and bool(line["value_error"])
    return bool(line["gradient_error"]) or unchecked or line["note"].startswith(("failed", "not installed"))


BRIEFLY = ("--seconds", "0")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "arguments", "lines"),
    [
        ("embedding", ["--no-compiled", "--sizes", "300x16", "--projected", "200x16"], 30),
        ("token_losses", ["--no-compiled", "--head", "64x100x8", "--error", "64x50x8", "--kernel", "8x100"], 23),
        ("contrastive", ["--no-compiled", "--sizes", "64x32", "--small", "32x16", "--sigmoid-size", "64x8"], 80),
        ("sparse_losses", ["--no-compiled", "--rows", "16", "--width", "100", "--density", "0.1"], 15),
        ("preference", ["--no-compiled", "--only", "dpo,packed,logps,losses,dpo-step,orpo-step"], 53),
        ("distillation", ["--no-compiled", "--vocabularies", "100"], 65),
        ("sparse", [], 28),
        ("small", ["--only", "alone,engine", "--rows", "8", "--widths", "16", "--engine-rows", "8", *BRIEFLY], 50),
    ],
)
def test_small_mode(tmp_path, script, arguments, lines):
    if script in ("embedding", "contrastive", "small", "sparse", "sparse_losses"):
        pytest.importorskip("sentence_transformers")
    found = run_script(tmp_path, script, arguments)
    assert len(found) >= lines
    assert all(line["torch"] == torch.__version__ and line["device"] and line["date"] for line in found)
    assert all(has_errors(line) for line in found), [line for line in found if not has_errors(line)]
    ours = [line for line in found if line["role"] == "ours"]
    sharp = [line for line in ours if not line["case"].startswith("confident")]  # of `p - 1` few digits are left
    assert sharp and all(float(line["gradient_error"] or 0) < 1e-4 for line in sharp), sharp
    told = [line for line in ours if line["value"]]
    assert all(float(line["value_error"]) < 1e-4 * float(line["value_mean"]) for line in told), told


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("token_losses", ["--only", "linear-logps,cross-entropy,grouped", "--head", "64x100x8"]),
        ("contrastive", ["--only", "infonce,guided,near-duplicates", "--sizes", "64x32", "--small", "64x32"]),
        ("preference", ["--only", "dpo"]),
    ],
)
def test_half_precision_outputs_are_lines_of_their_own(tmp_path, script, arguments):
    """Ours are exact by default, or the script would say so."""
    pytest.importorskip("sentence_transformers")
    found = run_script(tmp_path, script, ["--no-compiled", "--dtype", "bfloat16", "--no-peers", *arguments])
    errors = {(line["case"], line["name"]): float(line["gradient_error"] or "nan") for line in found}
    pairs = [(errors[case, name.removesuffix(HALF)], errors[case, name]) for case, name in errors if HALF in name]
    assert pairs and all(exact < 6e-3 for exact, _ in pairs)
    assert sum(exact < rough for exact, rough in pairs) > len(pairs) / 2


HALF = ", half-precision outputs"


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [["step", "--pairs", "4"], ["first", "--first-rows", "8", "--match", "call, MNRL"], ["head"]]
)
def test_small_steps_first_calls_and_heads(tmp_path, arguments):
    pytest.importorskip("sentence_transformers")
    found = run_script(tmp_path, "small", ["--only", *arguments, *BRIEFLY])
    assert {line["name"] for line in found} == {"ours", "TRL" if arguments == ["head"] else "sentence-transformers"}
    assert len(found) in (2, 6, 8) and all(float(line["ms"]) > 0 for line in found)
    ours = [line for line in found if line["role"] == "ours"]
    assert all(float(line["floor_ratio"]) > 0 and line["more_us"] for line in ours)
    if "first" not in arguments:
        assert all(has_errors(line) and float(line["gradient_error"] or 0) < 1e-4 for line in ours)


def test_candidates_in_turn_stand_beside_the_first_of_the_others(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    measure = pytest.importorskip("measure")
    bench = measure.Benchmark("family", torch.device("cpu"), tmp_path, 0, 8)
    x, calls = torch.ones(3), []
    clock = iter(range(10**6))
    seconds = {"ours": 3e-6, "theirs": 2e-6, "wrong": 1e-6, "others": 1e-6}

    def timed(run, device):
        """A host that is slower with every call."""
        result = run()
        return seconds[calls[-1]] * (1 + next(clock) // 8), result

    monkeypatch.setattr(measure, "seconds_of", timed)
    roles = {"ours": measure.OURS, "theirs": measure.PEER, "wrong": measure.OURS, "others": measure.PEER}
    candidates = [
        measure.Candidate(who, role, lambda who=who: calls.append(who) or [1.1 * x if who == "wrong" else x], 1e-2)
        for who, role in roles.items()
    ]
    bench.compare("case", candidates, lambda: [x], "margins", seconds=0)
    lines = {line.name: line for line in bench.lines}
    assert calls[4:10] == ["ours", "theirs", "others", "others", "theirs", "ours"]
    assert lines["wrong"].ms is None and bench.wrong == ["case, wrong: " + lines["wrong"].note]
    assert lines["theirs"].floor_ratio is None and lines["theirs"].more_us is None
    ours = lines["ours"]
    assert ours.floor_ratio == pytest.approx(1.5, rel=0.3) and ours.least_ratio < ours.most_ratio
    assert ours.more_us == pytest.approx(1e3 * (ours.ms - lines["theirs"].ms))
    assert lines["others"].floor_ratio < 1 and lines["others"].more_us < 0
    told = measure.read_csv(bench.path)
    assert [line.name for line in told] == list(roles) and told[0].more_us == pytest.approx(ours.more_us, rel=1e-3)


def test_columns_of_a_file_from_before(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    measure = pytest.importorskip("measure")
    bench = measure.Benchmark("family", torch.device("cpu"), tmp_path)
    bench.add("case", "theirs", measure.PEER, measure.Timing(1.0))
    rows = rows_of(bench.path)

    def without(*columns):
        with bench.path.open("w", newline="") as file:
            kept = [{key: value for key, value in row.items() if key not in columns} for row in rows]
            writer = csv.DictWriter(file, kept[0])
            writer.writeheader()
            writer.writerows(kept)
        return measure.read_csv(bench.path)

    (line,) = without(*measure.IN_TURN)
    assert line.ms == 1.0 and line.more_us is None
    with pytest.raises(SystemExit, match="columns of today"):
        without("note")


TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def run_training(folder, script, *arguments, launch=(), curves=True):
    """The smallest runs of a script -> the rows of its curves, and the lines by their cases and names."""
    command = [sys.executable, *launch, ROOT / "benchmarks" / f"{script}.py", "--device", "cpu", *arguments]
    alone = {"CUDA_VISIBLE_DEVICES": "", "BENCH_OUT": str(folder), "PYTHONPATH": str(ROOT)}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **alone}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    tables = {path.name.split("-cpu")[0]: rows_of(path) for path in folder.glob("*.csv")}
    assert set(tables) == {script.replace("_", "-"), *([f"{script}-curves"] if curves else [])}, (
        done.stdout + done.stderr
    )
    lines = {(line["case"], line["name"]): line for line in tables[script.replace("_", "-")]}
    return done, tables.get(f"{script}-curves"), lines


def train(folder, *arguments, launch=()):
    pytest.importorskip("trl")
    pytest.importorskip("peft")
    return run_training(folder, "trainers", "--no-compiled", *arguments, launch=launch)


RUNS = ("TRL", "ours", "TRL, the same again", "TRL, another seed")


@pytest.mark.slow
@pytest.mark.parametrize("losses", ["orpo,gkd", "kto,dpo"])
def test_trainers_have_the_curves_of_trl(tmp_path, losses):
    done, curves, lines = train(tmp_path, "--only", losses, "--match", "bfloat16")
    assert done.returncode == 0, done.stdout + done.stderr
    cases = {case for case, name in lines if name == "TRL"}
    assert len(cases) == losses.count(",") + 1 + losses.count("dpo")  # with LoRA, too
    for case in cases:
        assert all(float(lines[case, name]["ms"]) > 0 for name in ("TRL", "ours"))
        for quantity in ("losses",) if "GKD" in case else ("losses", "margins"):
            errors = {who: line for (of, who), line in lines.items() if of == f"{quantity}, {case}"}
            ours, again, other = (float(errors[who]["value_error"]) for who in RUNS[1:])
            assert again == 0 and ours < 0.1 * other
        of_runs = {name: [row for row in curves if (row["case"], row["who"]) == (case, name)] for name in RUNS}
        assert all([row["step"] for row in rows] == ["1", "2", "3"] for rows in of_runs.values())
        assert len({row["loss"] for row in of_runs["ours"]}) > 1


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["split over two", "FSDP2 on 2"])
def test_trainers_on_two_devices(tmp_path, layout):
    """Under FSDP2 TRL's log-probabilities are rounded, and differ from ours by as much."""
    if layout == "split over two":
        done, _, lines = train(tmp_path, "--device-map", "--only", "dpo")
        assert done.returncode == 0, done.stdout + done.stderr
        assert float(lines[f"losses, DPO, full, bfloat16, {layout}", "two devices"]["value_error"]) == 0
        return
    done, curves, lines = train(tmp_path, "--match", "DPO, LoRA", launch=TWO)
    assert {row["who"] for row in curves} == set(RUNS)
    assert len(curves) == 12 and all(math.isfinite(float(row["loss"])) for row in curves)
    assert all(case.endswith(layout) for case, _ in lines), done.stdout + done.stderr


def test_curves_of_trainers_are_compared_with_the_spread(tmp_path, monkeypatch, capsys):
    pytest.importorskip("trl")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    measure, trainers = pytest.importorskip("measure"), pytest.importorskip("trainers")
    bench = measure.Benchmark("trainers", torch.device("cpu"), tmp_path)
    made = {"TRL": 0.0, "ours": 0.3, "TRL, another seed": 0.1}
    runs = {name: trainers.Run([1.0 + off, 2.0 - off], [], [], measure.Timing()) for name, off in made.items()}
    trainers.compare(bench, "case", runs, "TRL", trainers.twice_the_spread)
    ours, other = bench.lines
    assert (ours.name, ours.value_mean, ours.value_error) == ("ours", 1.5, pytest.approx(0.3))
    assert other.value_error == pytest.approx(0.1) and other.note == ""
    assert len(bench.wrong) == 1 and "WRONG: 3.0e-01, above 2.0e-01" in ours.note
    for off in (0.15, math.nan):
        runs["ours"] = trainers.Run([1.0 + off, 2.0], [], [], measure.Timing())
        trainers.compare(bench, "case", runs, "TRL", trainers.twice_the_spread)
        assert len(bench.wrong) == 1 + (off != off)

    path = tmp_path / "trainers-curves-x.csv"
    for losses in ([1.0], [1.0, 2.5]):  # in place of the first
        trainers.write(path, "case", "TRL", trainers.Run(losses, [], [], measure.Timing()))
    assert trainers.read_run(path, "case", "TRL").losses == [1.0, 2.5]
    assert trainers.read_run(path, "case", "ours").losses == []


@pytest.mark.slow
def test_swapped_losses_have_the_curves_of_the_library(tmp_path):
    """In a few steps the library's spread is one of single roundings, so that the ratio to it says nothing."""
    pytest.importorskip("sentence_transformers")
    names = ["CachedMultipleNegativesRanking", "BatchSemiHardTriplet"]
    done, curves, lines = run_training(tmp_path, "swap", "--only", ",".join(names))
    whos = ("sentence-transformers", "ours", "the same again", "a last digit", "another last digit")
    assert len(curves) == 4 * len(names), done.stdout + done.stderr
    for case in (f"{name}, bfloat16" for name in names):
        assert all(float(lines[case, who]["ms"]) > 0 for who in whos[:2])
        ours, theirs = (lines[f"losses, {case}", who] for who in ("ours", "sentence-transformers"))
        assert 0 <= float(ours["value_error"]) < 1e-3 * float(ours["value_mean"])
        assert float(theirs["value_error"]) < 1e-3 * float(theirs["value_mean"])
        rows = [row for row in curves if row["case"] == case]
        assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
        assert all(len({row[who] for row in rows}) == 4 for who in whos)
        assert [row["the same again"] for row in rows] == [row["sentence-transformers"] for row in rows]
    assert any(row["a last digit"] != row["sentence-transformers"] for row in curves)


def test_swapped_losses_are_compared_with_the_spread(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("rich")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    measure, swap = pytest.importorskip("measure"), pytest.importorskip("swap")
    bench = measure.Benchmark("swap", torch.device("cpu"), tmp_path)
    theirs = dict(
        zip(("sentence-transformers", "the same again", "a last digit", "another last digit"), (0, 0, 0.2, 0.2))
    )

    def compared(offset):
        made = {"ours": offset, **theirs}
        runs = {who: swap.Run([2.0 + off, 1.0 - off], measure.Timing()) for who, off in made.items()}
        swap.compare(bench, "case", runs)
        ours, spread = bench.lines[-2:]
        assert (spread.name, spread.value_mean, spread.value_error) == (swap.THEIRS, 1.5, pytest.approx(0.8 / 6))
        return ours

    assert compared(0.3).floor_ratio == pytest.approx(1.5) and not bench.wrong
    assert compared(0.4).note == "WRONG: 3.0e-01, above 2.7e-01" and len(bench.wrong) == 1
    assert "WRONG" in compared(math.nan).note
    theirs = dict.fromkeys(theirs, 0.0)
    runs = {who: swap.Run([1.0 + off], measure.Timing()) for who, off in {"ours": 5e-7, **theirs}.items()}
    swap.compare(bench, "case", runs)
    assert "WRONG" not in bench.lines[-2].note and bench.lines[-2].floor_ratio is None  # to rounding, without a spread
    runs["ours"] = swap.Run([], measure.Timing(note="failed"))
    swap.compare(bench, "case", runs)
    assert "WRONG" in bench.lines[-2].note


@pytest.mark.slow
@pytest.mark.parametrize("match", ["CachedMultiple", "CoSENT"])
def test_losses_of_two_processes(tmp_path, match):
    pytest.importorskip("sentence_transformers")
    done, _, lines = run_training(tmp_path, "swap_ranks", "--match", match, launch=TWO, curves=False)
    assert done.returncode == 0, done.stdout + done.stderr
    errors = {key: line for key, line in lines.items() if key[0].startswith("errors")}
    assert {("8 + 8" in case, who) for case, who in errors} >= {(True, "ours"), (False, "ours")}
    assert all(float(line["gradient_error"]) < 1e-4 for line in errors.values())
    assert all(float(line["value_error"]) < 1e-4 * float(line["value_mean"]) for line in errors.values())
    assert all(float(line["ms"]) > 0 for key, line in lines.items() if key not in errors)
    whos = {who for _, who in lines}
    peers = {"sentence-transformers, each its own batch" if match == "CoSENT" else "sentence-transformers"}
    assert whos - {"ours", "ours, mini-batches"} == peers


@pytest.mark.slow
def test_gathered_embeddings(tmp_path):
    pytest.importorskip("sentence_transformers")
    command = [sys.executable, *TWO, ROOT / "benchmarks" / "gathered.py", "--device", "cpu", "--no-compiled"]
    alone = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "BENCH_OUT": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env={**os.environ, **alone}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (table,) = tmp_path.glob("*.csv")
    lines = rows_of(table)
    assert [line["name"] for line in lines] == ["ours", "sentence-transformers"]
    assert all(float(line["gradient_error"]) < 1e-5 and float(line["ms"]) > 0 for line in lines), lines


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
    bench.case("case", candidates, lambda: [x], "margins")
    lines = {line.name: line for line in bench.lines}
    assert bench.lines[0].name == "floor"
    assert lines["wrong"].ms is None and "WRONG" in lines["wrong"].note
    assert lines["right"].ms is not None and lines["right"].floor_ratio is not None
    assert lines["right"].value == "margins" and lines["right"].value_error == pytest.approx(1e-4, rel=0.01)
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


def test_a_case_is_chosen_by_patterns(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    measure = pytest.importorskip("measure")
    cases = ["InfoNCE 64x8, float32", "symmetric InfoNCE 64x8, float32", "InfoNCE 64x16, float32"]

    def chosen(match):
        bench = measure.Benchmark("family", torch.device("cpu"), tmp_path, match=match)
        return [bench.chosen(case) for case in cases]

    assert chosen("") == [True] * 3 and chosen("64x8,") == [True, True, False]
    assert chosen("symmetric*64x8 | 64x16") == [False, True, True] and chosen("InfoNCE 64x9") == [False] * 3


def test_a_profile_names_what_takes_the_time(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    measure = pytest.importorskip("measure")
    x = torch.ones(1000, 1000)
    bench = measure.Benchmark("family", torch.device("cpu"), tmp_path, profile=True)

    def absent():
        raise ImportError("no such peer")

    candidates = [
        measure.Candidate("ours", measure.OURS, lambda: [x @ x + 1]),
        measure.Candidate("peer", "peer", absent),
    ]
    bench.case("product", candidates, lambda: pytest.fail("nothing is checked"))
    bench.finish()
    first, longest, *_, missing, end = (tmp_path / "family-profile.txt").read_text().splitlines()
    assert (first, missing, end) == ("product | ours", "not installed: no such peer", "")
    assert "aten::mm" in longest and "1 x" in longest and not bench.path.exists()


def test_floors_are_named_without_their_chunks(monkeypatch):
    """A line of other chunks takes the place of the one before."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    measure = pytest.importorskip("measure")
    x, weight = torch.ones(6, 2), torch.ones(3, 2)
    (floor,) = measure.floors("3 products", (x, weight), [], [4, 2])
    assert (floor.name, floor.note) == ("floor: 3 products", "chunks of 4")


def test_targets_stand_beside_what_was_measured(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    measure, tables = pytest.importorskip("measure"), pytest.importorskip("tables")
    device = few_lines(measure, tmp_path)

    def wanted():
        for case, most in {"short": 2.5, "long": 40.0, "none": 1.0}.items():
            yield tables.Target(f"{case} takes", most, "ms", ("preference", case, "ours", "ms"))
        yield tables.Target("to theirs", 0.05, "x", ("preference", "*", "ours / theirs", "least ms"))
        yield tables.Target("off by", 1e-4, "%", ("preference", "short", "ours", "value_error / value_mean"))

    monkeypatch.setattr(tables, "TARGETS", {"All": wanted})
    page = tables.rendered("<!-- figures: targets -->\n<!-- end -->\n", tmp_path, device)
    assert page.splitlines()[4:-2] == [
        "| **All** |  |  |  |",
        "| short takes | 2.5 ms | 2 ms | yes |",
        "| long takes | 40 ms | 50 ms | **no** |",
        "| none takes | 1 ms | not yet |  |",
        "| to theirs | 0.05 x | 0.04 x | yes |",
        "| off by | 0.01% | 0.004% | yes |",
    ]


def test_peak_memory_on_a_cpu(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    measure = pytest.importorskip("measure")

    def run():
        temporary = torch.ones(2**20)  # 4 MiB, freed before the second 8
        del temporary
        return torch.ones(2**21)

    timing = measure.measure(run, torch.device("cpu"), repeats=1)
    assert timing.peak_gib * 2**30 == pytest.approx(2**23, rel=0.01)


def test_errors_of_a_result(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    measure = pytest.importorskip("measure")
    truth = [torch.tensor([1.0, -3.0]), torch.tensor([3.0, 4.0]), torch.ones(2)]
    got = [torch.tensor([1.5, -3.0]), torch.tensor([3.0, 4.5]), torch.ones(2)]
    found = measure.errors_of(got, truth, "margins", ["a", "b"])
    assert (found.value, found.value_error, found.value_mean) == ("margins", 0.25, 2.0)
    assert found.gradient_error == pytest.approx(0.1) and found.gradients == "a 1.0e-01, b 0.0e+00"
    assert found.worst == pytest.approx(0.125)
    assert measure.errors_of(got[1:], truth[1:], "", []).gradient_error == pytest.approx(0.1)
    got[0][0] = math.nan
    assert measure.errors_of(got, truth, "margins", []).worst == math.inf
    with pytest.raises(ValueError, match="expected 3 results, got 2"):
        measure.errors_of(got[1:], truth, "margins", [])


def test_what_a_candidate_reads_is_compared_in_place_of_its_loss(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    measure = pytest.importorskip("measure")
    bench = measure.Benchmark("family", torch.device("cpu"), tmp_path, repeats=1)
    x, margins = torch.ones(2), torch.tensor([1.0, 2.0])
    candidates = [
        measure.Candidate("right", measure.OURS, lambda: [torch.tensor(9.0), x], 1e-2, lambda: margins),
        measure.Candidate("wrong", measure.OURS, lambda: [torch.tensor(9.0), x], 1e-2, lambda: 1.1 * margins),
    ]
    bench.case("case", candidates, lambda: [margins, x], "margins", timed=False)
    right, wrong = bench.lines
    assert right.ms is None and right.value_error == 0 and right.is_done
    assert "WRONG" in wrong.note and not wrong.is_done and len(bench.wrong) == 1


def test_two_runs_at_once_share_a_file(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    measure = pytest.importorskip("measure")
    one, other = (measure.Benchmark("family", torch.device("cpu"), tmp_path, repeats=1) for _ in range(2))
    for bench, case in ((one, "a"), (other, "b"), (one, "a")):
        bench.add(case, f"line {len(bench.lines)}", measure.PEER, measure.Timing(ms=1.0))
    assert [(line.case, line.name) for line in measure.read_csv(one.path)] == [
        ("a", "line 0"),
        ("a", "line 1"),
        ("b", "line 0"),
    ]


def test_tables_and_figures_of_the_pages_are_what_the_files_say(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    tables = pytest.importorskip("tables")
    for path in tables.pages():
        page = path.read_text()
        assert tables.rendered(page) == page, f"python benchmarks/tables.py, of {path.name}"
    page = tables.PAGE.read_text()
    marks = {"targets", *tables.WHERE, *tables.TABLES}
    assert {found["name"] for found in tables.MARK.finditer(page)} == marks
    for text in (page, (ROOT / "README.md").read_text()):
        assert len(list(tables.places(text))) >= 10 and tables.untied(text) == []


def few_lines(measure, folder, family="preference"):
    """A csv -> the device in its name"""
    bench = measure.Benchmark(family, torch.device("cpu"), folder, repeats=1)
    for case, times in {"short": (2.0, 4.0), "long": (50.0, 1250.0)}.items():
        for (name, role), ms in zip({"ours": measure.OURS, "theirs": measure.PEER}.items(), times):
            errors = measure.Errors("margins", 0.5, ms * 1e-5, 2.3e-3)
            bench.add(case, name, role, measure.Timing(ms=ms, min_ms=ms, peak_gib=ms / 10), errors)
    return bench.path.stem.removeprefix(f"{family}-")


TIED = """It takes {long} ms and {gib}
GiB. `9 ms` is code.

<!-- sources:
takes {long} ms | preference | long | ours | ms
{gib} GiB | | | | peak_gib
-->

| 7 ms |

Others take {least} to {most}% more, or {theirs} ms, {apart} ms
more, and are off by {error}; 3 ms is untold.

<!-- sources:
take {least} | preference | * | theirs over ours | least ms
{most}% | | | | most ms
{theirs} ms | preference @ {device} | long | theirs | ms
{apart} ms more | | | theirs - ours | ms
{error} | | | theirs | value_error / value_mean
-->
"""


def test_figures_in_a_text_follow_their_files(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    measure, tables = pytest.importorskip("measure"), pytest.importorskip("tables")
    device = few_lines(measure, tmp_path)
    old = dict(long=1, gib="1.00", least=2, most=3, theirs="1,000", apart="1,111", error="1.0e-1", device=device)
    new = dict(long=50, gib="5.00", least=100, most=2400, theirs="1,250", apart="1,200", error="2.5e-2", device=device)
    page = TIED.format(**old)
    assert tables.rendered(page, tmp_path, device) == TIED.format(**new)
    assert tables.rendered(TIED.format(**new), tmp_path, device) == TIED.format(**new)
    assert tables.untied(page) == ["7 ms", "3 ms"]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("3 ms | preference | long | ours | ms", "expected '3 ms' in the text above"),
        ("1 ms | preference | lang | ours | ms", "expected one line of a csv.*got 0"),
        ("1 ms | preference | * | ours | ms", "expected one line of a csv.*got 2"),
        ("1 ms | preference | * | nobody | most ms", "expected one line or more of a csv.*got 0"),
        ("1 ms | preference | long | ours | seconds", "expected a column of the csv.*'seconds'"),
        ("1 ms | preference | long | ours", "expected `words with a figure"),
        ("much | preference | long | ours | ms", "expected `words with a figure"),
    ],
)
def test_sources_that_say_nothing_are_refused(tmp_path, monkeypatch, line, told):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    measure, tables = pytest.importorskip("measure"), pytest.importorskip("tables")
    device = few_lines(measure, tmp_path)
    with pytest.raises(SystemExit, match=told):
        tables.rendered(f"It takes 1 ms, not 13 ms, much.\n\n<!-- sources:\n{line}\n-->\n", tmp_path, device)


def test_each_family_has_a_figure(tmp_path, monkeypatch):
    """With a time for each bar of ours, and of others that its file has; some families are drawn."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    measure, plots = pytest.importorskip("measure"), pytest.importorskip("plots")
    files = {path.name for path in measure.RESULTS.glob(f"*-{plots.DEVICE}.csv") if "curves" not in path.name}
    files -= {f"swap-ranks-{plots.DEVICE}.csv"}
    assert files == {f"{family.replace('_', '-')}-{plots.DEVICE}.csv" for family in plots.FIGURES}
    for family, spec in plots.FIGURES.items():
        lines = measure.read_csv(measure.RESULTS / f"{family.replace('_', '-')}-{plots.DEVICE}.csv")
        cases, names = spec.measured(lines)
        assert len(names) >= 2, family
        for case in cases:
            for panel in spec.panels:
                found = [len(panel.values(lines, case, name)) for name in names]  # the first of them is ours
                assert found[0] == 1 and set(found) <= {0, 1}, (family, case, panel)
            assert not spec.floor or len(plots.TIME.values(lines, case, spec.floor)) == 1, (family, case)
    monkeypatch.setattr(
        plots, "FIGURES", {family: plots.FIGURES[family] for family in ("contrastive", "preference", "trainers")}
    )
    plots.main(tmp_path, "svg", plots.DEVICE, measure.RESULTS)
    for family in plots.FIGURES:
        drawn = (tmp_path / f"{family}.svg").read_text()
        assert "fill: #ffffff" in drawn and drawn.rstrip().endswith("</svg>")


def test_a_family_without_a_file_has_no_figure(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    plots = pytest.importorskip("plots")
    plots.main(tmp_path / "out", "svg", "another", tmp_path)
    assert capsys.readouterr().out.count("no figure, expected its cases in") == len(plots.FIGURES)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_table_of_lines(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    measure, tables = pytest.importorskip("measure"), pytest.importorskip("tables")
    bench = measure.Benchmark("preference", torch.device("cpu"), tmp_path, repeats=1)
    errors = measure.Errors("margins", 0.44, 8.7e-2, 2.3e-3)
    case = "DPO, 4 pairs x 1024, V=300, H=32, bfloat16"
    bench.add(case, "floor: 4 products", measure.FLOOR, measure.Timing(50.0), floor=50.0)
    bench.add(case, "DPOLoss", measure.OURS, measure.Timing(55.0, 54.0, 2.5), errors, 50.0)
    bench.add(case, "TRL", measure.PEER, measure.Timing(note="out of memory"))
    page = "before\n<!-- figures: dpo -->\n<!-- end -->\nbehind\n"
    device = bench.path.stem.removeprefix("preference-")
    assert tables.rendered(page, tmp_path, device).splitlines()[1:-1] == [
        "<!-- figures: dpo -->",
        "",
        "|  | ms | x floor | GiB | error of gradients | error of margins |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        f"| **{case}** |  |  |  |  |  |",
        "| floor: 4 products | 50 | 1.00 |  |  |  |",
        "| DPOLoss | 55 | 1.10 | 2.5 | 2.3e-3 | 8.7e-2 of 0.44 |",
        "| TRL | out of memory |  |  |  |  |",
        "",
        "<!-- end -->",
    ]
    assert tables.MISSING.strip() in tables.rendered(page, tmp_path, "another")
    with pytest.raises(SystemExit, match="no-such-table"):
        tables.rendered(page.replace("dpo", "no-such-table"), tmp_path, device)
