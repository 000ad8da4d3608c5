"""The preference examples: their data, the loop on accelerate, and TRL's trainer with the losses of this package."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("transformers")
pytest.importorskip("typer")

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import docstrings  # noqa: E402
import dpo_loop  # noqa: E402
import preferences  # noqa: E402
import train_dpo  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from datasets import Dataset  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
]
ENV = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def run(example: str, *arguments: Any, launcher: tuple[str, ...] = (), **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *launcher, str(EXAMPLES / example), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env={**ENV, **env})


@pytest.fixture(scope="module")
def functions(code: Path) -> list[docstrings.Function]:
    return docstrings.collect(600, folder=str(code))


@pytest.fixture(scope="module")
def pairs(functions: list[docstrings.Function]) -> Dataset:
    return preferences.docstring_pairs(functions, preferences.third_persons(functions), seed=0)


@pytest.fixture(scope="module")
def tokenizer(pairs: Dataset) -> Any:
    made = preferences.make_tokenizer(text for column in preferences.COLUMNS for text in pairs[column])
    made.chat_template = CHAT
    return made


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, pairs: Dataset, tokenizer: Any) -> dict[str, Path]:
    """A model and data in files, as users have them."""
    folder = tmp_path_factory.mktemp("preferences")
    tokenizer.save_pretrained(folder / "model")
    preferences.make_model(tokenizer, seed=0, width=16, layers=1).save_pretrained(folder / "model")
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in pairs.select(range(80))))
    return {"model": folder / "model", "dataset": folder / "pairs.jsonl"}


# --- data ------------------------------------------------------------------------------------------------------------


def test_pairs_of_docstrings(functions: list[docstrings.Function], pairs: Dataset) -> None:
    assert len(pairs) > 0.9 * len(functions)
    assert pairs.to_list() == preferences.docstring_pairs(functions, preferences.third_persons(functions), 0).to_list()
    kinds = {row["kind"] for row in pairs}
    assert kinds == {"style", "order"}
    for row in pairs:
        chosen, rejected = row["chosen"].split(), row["rejected"].split()
        assert row["prompt"].endswith(":") and chosen and rejected and chosen != rejected
        assert row["chosen"].startswith(" ") and row["rejected"].startswith(" ")
        if row["kind"] == "order":
            assert sorted(chosen) == sorted(rejected) and sum(a != b for a, b in zip(chosen, rejected)) == 2
        else:
            assert chosen[1:] == rejected[1:] and chosen[0].endswith("s") and len(chosen[0]) > len(rejected[0])


def test_held_out_pairs_are_in_no_training_pair(code: Path) -> None:
    train, test = preferences.load_pairs(str(code), "", 300, 60, seed=0)
    assert (len(train), len(test)) == (300, 60)
    for column in preferences.COLUMNS:
        assert not set(train[column]) & set(test[column])
    assert not set(train["chosen"]) & set(test["rejected"]) and not set(train["rejected"]) & set(test["chosen"])


def test_verbs_in_both_forms() -> None:
    summaries = ["Return it", "Returns it", "Copies a", "Copy b", "Matches c", "Match d", "Always e", "Gets f"]
    found = preferences.third_persons(docstrings.Function("p", "m", "n", text) for text in summaries)
    assert found == {"Return": "Returns", "Copy": "Copies", "Match": "Matches"}


def conversations(pairs: Dataset, prompt: bool) -> Dataset:
    def turn(role: str, text: str) -> dict[str, str]:
        return {"role": role, "content": text.strip()}

    rows = []
    for row in pairs:
        asked = [turn("user", row["prompt"])]
        sides = {side: [turn("assistant", row[side])] for side in ("chosen", "rejected")}
        rows.append({"prompt": asked, **sides} if prompt else {side: asked + said for side, said in sides.items()})
    return Dataset.from_list(rows)


@pytest.mark.parametrize(
    ("kind", "max_length"),
    [("texts", 11), ("answers", 19), ("conversations", 19), *((k, 512) for k in ("texts", "answers", "conversations"))],
)
def test_tokens_are_those_of_trl(kind: str, max_length: int, pairs: Dataset, tokenizer: Any, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    data = pairs.select(range(40)).select_columns(list(preferences.COLUMNS))
    if kind != "texts":
        data = conversations(data, prompt=kind == "answers")
    args = trl.DPOConfig(str(tmp_path), max_length=max_length, use_cpu=True, bf16=False, report_to="none")
    model, reference = (preferences.make_model(tokenizer, seed=0, width=16, layers=1) for _ in range(2))
    trainer = trl.DPOTrainer(model, reference, args=args, train_dataset=data, processing_class=tokenizer)
    rows = trainer.train_dataset.to_list()
    theirs = trainer.data_collator(rows)
    encoded = preferences.encode(data, tokenizer, max_length)
    assert 0 < len(encoded) <= len(data)
    ours = preferences.collate(encoded.to_list(), tokenizer.pad_token_id)
    assert len(rows) == len(encoded)
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(ours[name], theirs[name])
    expected = theirs["input_ids"].masked_fill(theirs["completion_mask"] == 0, -100)[:, 1:]
    assert torch.equal(ours["target"], expected)


def test_scores_are_those_of_the_models_logits(pairs: Dataset, tokenizer: Any) -> None:
    model = preferences.make_model(tokenizer, seed=0, width=16, layers=1).double()
    data = preferences.encode(pairs.select(range(5)), tokenizer, max_length=64)
    found = preferences.score(model, data, tokenizer.pad_token_id, batch_size=2, compiled=False)
    for n, row in enumerate(data):
        for k, side in enumerate(("chosen_ids", "rejected_ids")):
            ids, completion = torch.tensor([row["prompt_ids"] + row[side]]), row[side]
            logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1)[-len(completion) :]
            expected = logps[torch.arange(len(completion)), completion].sum()
            torch.testing.assert_close(found[k, n], expected)
            assert found[2 + k, n] == len(completion)


# --- dpo_loop.py -----------------------------------------------------------------------------------------------------

LOOP = {"held_out": 10, "batch_size": 8, "steps": 3, "pretrain_steps": 0, "compiled": False, "learning_rate": 1e-2}


def loop(output: Path, saved: dict[str, Path], **options: Any) -> tuple[list[dict[str, float]], dict]:
    """The log and the weights of a run in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    files = {name: str(path) for name, path in saved.items()}
    dpo_loop.main(output=output, **{**LOOP, **files, **options})
    return end_of(output)


def end_of(output: Path) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    with open(output / "log.csv", newline="") as file:
        log = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    return log, load_file(output / "model.safetensors")


@pytest.mark.parametrize("loss", dpo_loop.LOSSES)
def test_loop(loss: str, saved: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    log, weights = loop(tmp_path, saved, loss=loss)
    assert [row["step"] for row in log] == [1, 2, 3]
    assert all(math.isfinite(value) for row in log for value in row.values())
    start = load_file(saved["model"] / "model.safetensors")
    assert all(not torch.equal(weights[name], value) for name, value in start.items())
    said = capsys.readouterr().out
    assert "before: in" in said and "after: in" in said
    at_reference = {"dpo": math.log(2), "ipo": 25.0, "dpop": math.log(2), "kto": 0.5, "bco": math.log(2)}
    if loss in at_reference:
        assert log[0]["loss"] == pytest.approx(at_reference[loss], abs=1e-4)
        assert log[0]["margin"] == pytest.approx(0, abs=1e-4)


def test_loop_learns(saved: dict[str, Path], tmp_path: Path) -> None:
    log, _ = loop(tmp_path, saved, steps=20, learning_rate=3e-2)
    assert sum(row["accuracy"] for row in log[-5:]) > 4 and log[-1]["loss"] < 0.6 < log[0]["loss"]


def test_loop_in_bf16(saved: dict[str, Path], tmp_path: Path) -> None:
    exact, _ = loop(tmp_path / "float32", saved)
    log, weights = loop(tmp_path / "bf16", saved, bf16=True)
    assert all(value.dtype == torch.float32 for value in weights.values())
    assert [row["loss"] for row in log] == pytest.approx([row["loss"] for row in exact], abs=0.02)
    assert log != exact


@pytest.mark.parametrize("how", ["accumulated", "precomputed", "processes"])
def test_loop_in_another_way_to_the_same_end(how: str, saved: dict[str, Path], tmp_path: Path) -> None:
    # float64, since Adam makes whole steps of rounding errors. What is precomputed is kept in float32.
    options = {"dtype": "float64", "loss": "ipo", "learning_rate": 3e-4}
    log, weights = loop(tmp_path / "one", saved, **options)
    if how == "processes":
        arguments = [f"--{k.replace('_', '-')}={v}" for k, v in {**LOOP, **saved, **options}.items() if k != "compiled"]
        both = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
        (tmp_path / "trl.py").write_text("raise ImportError('the loop is to do without')")
        path = f"{EXAMPLES.parent}{os.pathsep}{tmp_path}"
        arguments += ["--no-compile", f"--output={tmp_path / 'other'}"]
        out = run("dpo_loop.py", *arguments, launcher=both, PYTHONPATH=path)
        assert out.returncode == 0, out.stdout + out.stderr
        assert "8 a step: 2 x 1 x 4" in out.stdout and out.stdout.count("after: in") == 1
        other_log, others = end_of(tmp_path / "other")
    else:
        way = {"accumulate": 2} if how == "accumulated" else {"precompute": True}
        other_log, others = loop(tmp_path / "other", saved, **options, **way)
    start = load_file(saved["model"] / "model.safetensors")
    assert others.keys() == weights.keys()
    for name, value in weights.items():
        assert value.dtype == torch.float64
        torch.testing.assert_close(others[name], value, rtol=0, atol=1e-6)
        assert (value - start[name]).abs().max() > 3e-4
    for row, other in zip(log, other_log, strict=True):  # all of it means over the step's pairs
        assert other["loss"] == pytest.approx(row["loss"], abs=1e-5)
        assert other["margin"] == pytest.approx(row["margin"], abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "ppo"}, "expected one of dpo, ipo"),
        ({"beta": -1.0}, "expected beta to be a positive"),
        ({"accumulate": 3}, "no multiple of 1 x 3"),
        ({"loss": "kto", "precompute": True}, "--loss kto takes no --precompute"),
        ({"dataset": "no/such.json"}, "no such file"),
        ({"max_length": 2}, "too few"),
        ({"batch_size": 500}, "too few"),
    ],
)
def test_loop_tells_a_mistake_in_a_sentence(
    options: dict[str, Any], message: str, saved: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    import typer

    with pytest.raises(typer.Exit) as left:
        loop(tmp_path, saved, **options)
    assert left.value.exit_code == 2
    assert message in capsys.readouterr().out


# --- train_dpo.py ----------------------------------------------------------------------------------------------------

SMALL = ("--no-compile", "--pairs", "400", "--held-out", "100", "--batch-size", "16")


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_training_with_trl(tmp_path: Path, code: Path) -> None:
    pytest.importorskip("trl")
    names = ["sigmoid", "sigmoid+sft", "fpo_js", "simpo"]
    options = ("--pretrain-steps", 30, "--steps", 12, "--dataset", code)
    out = run("train_dpo.py", *SMALL, *options, "--loss-type", ",".join(names), "--output", tmp_path)
    assert out.returncode == 0, out.stdout + out.stderr
    assert "100 held-out pairs" in out.stdout and "Warning" not in out.stderr
    before, *after = rows_of(tmp_path / "results.csv")
    assert before["loss"] == "before" and [row["loss"] for row in after] == names
    assert {"accuracy", "accuracy order", "accuracy style", "margin", "chosen token"} <= before.keys()
    assert float(after[0]["margin"]) > float(before["margin"]) + 0.1
    steps = rows_of(tmp_path / "steps.csv")
    assert [(row["loss type"], int(row["step"])) for row in steps] == [(n, k) for n in names for k in range(1, 13)]
    assert float(steps[0]["loss"]) == pytest.approx(math.log(2), abs=1e-4)
    assert (tmp_path / "results.png").stat().st_size > 10_000
    assert all((tmp_path / name / "model.safetensors").exists() for name in names)


@pytest.mark.slow
def test_training_with_trl_on_files(saved: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("trl")
    files = [text for name, path in saved.items() for text in (f"--{name}", path)]
    out = run("train_dpo.py", *SMALL, *files, "--steps", 2, "--loss-type", "irpo", "--precompute", "--output", tmp_path)
    assert out.returncode == 0, out.stdout + out.stderr
    assert len(rows_of(tmp_path / "results.csv")) == 2


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["sigmoid", "ppo"], "--loss-type ppo: expected one of"),
        (["sigmoid+simpo"], "--loss-type sigmoid\\+simpo: expected one of"),
        (["ipo", "ipo"], "names one twice"),
    ],
)
def test_losses_that_there_are_not(names: list[str], message: str) -> None:
    pytest.importorskip("trl")
    with pytest.raises(ValueError, match=message):
        train_dpo.make_losses(names, beta=0.1, compiled=False)


@pytest.mark.slow
def test_training_with_trl_tells_a_mistake_in_a_sentence(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    out = run("train_dpo.py", "--loss-type", "ppo", "--output", tmp_path)
    assert out.returncode == 2
    assert "Error: --loss-type ppo: expected one of" in " ".join(out.stdout.split())
    assert "Traceback" not in out.stderr
