"""examples/train_grpo.py and train_online_dpo.py at their smallest: they learn as TRL's trainers do, and go on where
they stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

for needed in ("trl", "datasets", "transformers", "tokenizers", "accelerate", "typer", "rich", "matplotlib"):
    pytest.importorskip(needed)

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import online  # noqa: E402
import preferences  # noqa: E402
from datasets import Dataset  # noqa: E402
from processes import run_program  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

ENV = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "COLUMNS": "200", "OMP_NUM_THREADS": "1"}


LOGGED = {
    "train_grpo.py": ("reward", "reward_std", "entropy", "loss"),
    "train_online_dpo.py": ("objective/scores", "rewards/margins", "loss"),
}


def train(program: str, output: Path, *arguments: Any) -> subprocess.CompletedProcess:
    return run_program(EXAMPLES / program, "--quick", "--output", output, *arguments, env=ENV)


def said(result: subprocess.CompletedProcess) -> str:
    return " ".join((result.stdout + result.stderr).split())


def end_of(output: Path) -> dict[str, Any]:
    result = json.loads((output / "results.json").read_text())
    assert result["finished"] and (output / "results.png").stat().st_size > 10_000
    assert [entry["step"] for entry in result["log"]] in ([1, 2, 3, 4], [2, 4])  # GRPO: once for each round of answers
    return result


def assert_same_end(program: str, one: Path, other: Path) -> None:
    expected, found = end_of(one), end_of(other)
    for entry, reference in zip(found["log"], expected["log"], strict=True):
        for name in LOGGED[program]:
            assert entry[name] == pytest.approx(reference[name], rel=1e-4, abs=2e-4), name
    assert found["samples"] == expected["samples"]
    weights, others = (load_file(folder / "model" / "model.safetensors") for folder in (one, other))
    for name, weight in weights.items():  # Adam makes steps of rounding errors where a gradient is almost zero
        difference = (others[name] - weight).abs()
        assert difference.mean() < 1e-6 and difference.max() < 1e-3, name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "arguments"),
    [("train_grpo.py", ("--beta", "0.05", "--level", "sequence")), ("train_online_dpo.py", ())],
)
def test_it_shows_samples_before_and_after(
    program: str, arguments: tuple[str, ...], tmp_path: Path, code: Path
) -> None:
    out = train(program, tmp_path, "--dataset", code, *arguments)
    assert out.returncode == 0, out.stdout + out.stderr
    assert "4/4 steps" in out.stdout and "Held-out prompts" in out.stdout and "Warning" not in out.stderr
    result = end_of(tmp_path)
    means, first = result["held out"], result["log"][0]
    assert means["before"].keys() == {*online.PARTS} and means["before"] != means["after"]
    assert len(result["samples"]) == online.SHOWN
    if program == "train_grpo.py":  # the reference is the model as it began
        assert first["kl"] == pytest.approx(0.0, abs=1e-5) and 1e-3 < result["log"][-1]["kl"] < 1
    else:
        assert first["rewards/margins"] == 0.0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        ("train_grpo.py", ("--loss-type", "cispo", "--beta", "0.05")),
        ("train_grpo.py", ("--trainer", "rloo", "--beta", "0.05", "--accumulate", "2")),
        ("train_online_dpo.py", ()),
    ],
)
def test_ours_ends_where_trl_s_does(program: str, arguments: tuple[str, ...], tmp_path: Path, code: Path) -> None:
    for folder, more in (("ours", ()), ("trl", ("--peer",))):
        assert train(program, tmp_path / folder, "--dataset", code, *arguments, *more).returncode == 0
    assert_same_end(program, tmp_path / "trl", tmp_path / "ours")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "more"),
    [("train_grpo.py", ("--loss-type", "vespo")), ("train_online_dpo.py", ("--loss", "irpo", "--beta", "0.1"))],
)
def test_a_run_that_stopped_goes_on_to_the_same_end(
    program: str, more: tuple[str, ...], tmp_path: Path, code: Path
) -> None:
    """Of GRPO after two steps of the same answers, though it is asked to stop between them."""
    after = "1" if program == "train_grpo.py" else "2"
    arguments = ("--dataset", code, *more, "--save-every", "1")
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert train(program, whole, *arguments).returncode == 0
    stopped = train(program, halves, *arguments, "--stop-after", after)
    assert stopped.returncode == 0 and "Stopped after step 2 of 4" in said(stopped)
    again = train(program, halves, *arguments)
    assert again.returncode == 2 and "--resume goes on with it" in said(again)
    another = train(program, halves, *arguments, "--resume", "--temperature", "0.9")
    assert another.returncode == 2 and "temperature was 1.0, is 0.9" in said(another)
    resumed = train(program, halves, *arguments, "--resume")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert_same_end(program, whole, halves)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        ("train_online_dpo.py", ("--loss", "irpo", "--peer"), "--peer: TRL's trainer has sigmoid, ipo, not irpo"),
        ("train_online_dpo.py", ("--beta", "0"), "--beta 0.0: expected a positive number"),
        ("train_online_dpo.py", ("--model", "./nowhere"), "--model ./nowhere: no such file"),
        (
            "train_grpo.py",
            ("--trainer", "rloo", "--level", "token"),
            "--trainer rloo: --loss-type and --level are GRPO's",
        ),
    ],
)
def test_a_mistake_is_told_in_a_sentence(
    program: str, arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    out = train(program, tmp_path, *arguments)
    assert out.returncode == 2 and f"Error: {message}" in said(out) and "Traceback" not in out.stderr


@pytest.mark.parametrize(
    ("text", "third", "length", "repeated"),
    [
        ("Returns a list of all the open files", 1.0, 1.0, 0.0),
        ("return the the the", 0.0, 0.5, 0.5),
        ("is this", 0.0, 0.25, 0.0),
        ([{"role": "assistant", "content": "copies it"}], 1.0, 0.25, 0.0),
        ("", 0.0, 0.0, 1.0),
        ("gets " + " ".join("abcdefghijklmnopq"), 1.0, 0.0, 0.0),
    ],
)
def test_the_rule(text: Any, third: float, length: float, repeated: float) -> None:
    found = online.graded(text)
    assert (found["third person"], found["length"], found["repeated"]) == (third, length, repeated)
    assert online.rule(prompts=["x"], completions=[text]) == [third + length - repeated]


def test_samples_leave_the_draws_and_the_mode_of_training_alone() -> None:
    import torch

    tokenizer = preferences.make_tokenizer(["read all files", "write it"])
    model = preferences.make_model(tokenizer, seed=0, width=16, layers=1).train()
    before = torch.get_rng_state()
    prompts = Dataset.from_list([{"prompt": text} for text in ("read:", "write it:", "a:")])
    first, again = (online.measure(model, tokenizer, prompts, 5, seed=1) for _ in range(2))
    assert first == again and len(first["samples"]) == 3 and model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert online.sample(model, tokenizer, list(prompts["prompt"]), 5, seed=2) != first["samples"]


def test_prompts_alone_need_a_model(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": f"say {n}"}) for n in range(40)))
    with pytest.raises(ValueError, match="prompts alone need a model"):
        online.load_prompts(str(file), "", 20, 5, "", seed=0)
    train_rows, test_rows = online.load_prompts(str(file), "", 20, 5, "some", seed=0)
    assert (len(train_rows), len(test_rows)) == (20, 5) and not {*train_rows["prompt"]} & {*test_rows["prompt"]}
