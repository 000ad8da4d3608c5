"""The preference examples: their data, the loops on accelerate, and TRL's trainer with the losses of this package."""

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
import kto_loop  # noqa: E402
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


def loop(
    output: Path, saved: dict[str, Path], example: Any = dpo_loop, **options: Any
) -> tuple[list[dict[str, float]], dict]:
    """The log and the weights of a run in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    files = {name: str(path) for name, path in saved.items()}
    example.main(output=output, **{**LOOP, **files, **options})
    return end_of(output)


def on_two_processes(example: str, output: Path, saved: dict[str, Path], **options: Any) -> str:
    """What such a run prints. TRL is not there for it."""
    arguments = [f"--{k.replace('_', '-')}={v}" for k, v in {**LOOP, **saved, **options}.items() if k != "compiled"]
    both = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    output.mkdir()
    (output / "trl.py").write_text("raise ImportError('the loop is to do without')")
    path = f"{EXAMPLES.parent}{os.pathsep}{output}"
    out = run(example, *arguments, "--no-compile", f"--output={output}", launcher=both, PYTHONPATH=path)
    assert out.returncode == 0, out.stdout + out.stderr
    return out.stdout


def assert_same_end(saved: dict[str, Path], one: tuple[Any, Any], other: tuple[Any, Any], *logged: str) -> None:
    """Of two runs in float64, weights and log."""
    (log, weights), (other_log, others) = one, other
    start = load_file(saved["model"] / "model.safetensors")
    assert others.keys() == weights.keys()
    for name, value in weights.items():
        assert value.dtype == torch.float64
        torch.testing.assert_close(others[name], value, rtol=0, atol=1e-6)
        assert (value - start[name]).abs().max() > 3e-4
    for row, entry in zip(log, other_log, strict=True):  # all of it means over the step's rows
        for name in logged:
            assert entry[name] == pytest.approx(row[name], abs=1e-5)


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
    at_reference = {"dpo": math.log(2), "ipo": 25.0, "dpop": math.log(2)}
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


@pytest.mark.slow
@pytest.mark.parametrize("how", ["accumulated", "precomputed", "processes"])
def test_loop_in_another_way_to_the_same_end(how: str, saved: dict[str, Path], tmp_path: Path) -> None:
    # float64, since Adam makes whole steps of rounding errors. What is precomputed is kept in float32.
    options = {"dtype": "float64", "loss": "ipo", "learning_rate": 3e-4}
    ways = {"accumulated": {"accumulate": 2}, "precomputed": {"precompute": True}}
    one = loop(tmp_path / "one", saved, **options)
    if how == "processes":
        said = on_two_processes("dpo_loop.py", tmp_path / "other", saved, **options)
        assert "8 a step: 2 x 1 x 4" in said and said.count("after: in") == 1
        other = end_of(tmp_path / "other")
    else:
        other = loop(tmp_path / "other", saved, **options, **ways[how])
    assert_same_end(saved, one, other, "loss", "margin")


# --- kto_loop.py -----------------------------------------------------------------------------------------------------

JUDGED = {"rows": 16, "held_out": 10, "dtype": "float64", "learning_rate": 3e-3, "desirable_weight": 1.5}


@pytest.fixture(scope="module")
def judged(saved: dict[str, Path], pairs: Dataset) -> dict[str, Path]:
    """Single completions with a verdict each, a third of them desirable."""
    rows = [
        {"prompt": row["prompt"], "completion": row["rejected" if n % 3 else "chosen"], "label": n % 3 == 0}
        for n, row in enumerate(pairs.select(range(60)))
    ]
    path = saved["model"].parent / "verdicts.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return {"model": saved["model"], "dataset": path}


def verdicts(judged: dict[str, Path], seed: int = 0) -> tuple[Dataset, Dataset]:
    return preferences.load_verdicts(str(judged["dataset"]), "", JUDGED["rows"], JUDGED["held_out"], 0.5, seed)


def test_verdicts_of_pairs(saved: dict[str, Path], pairs: Dataset) -> None:
    train, test = preferences.load_verdicts(str(saved["dataset"]), "", 50, 10, 0.3, seed=0)
    verdict = {(row["prompt"], row[side]): side == "chosen" for row in pairs for side in ("chosen", "rejected")}
    for row in (*train, *test):
        assert verdict[row["prompt"], row["completion"]] == row["label"]
    assert len(train) == len(set(train["prompt"])) == 50 and 5 < sum(train["label"]) < 25
    assert test["label"] == [True, False] * 10
    assert test["group"] == [n for n in range(10) for _ in range(2)]
    assert not set(train["prompt"]) & set(test["prompt"])


def test_verdicts_on_conversations(judged: dict[str, Path], pairs: Dataset, tmp_path: Path) -> None:
    whole = [
        {"completion": row["rejected" if n % 3 else "chosen"], "label": int(n % 3 == 0)}
        for n, row in enumerate(conversations(pairs.select(range(40)), prompt=False))
    ]
    answers = [{**row, "prompt": row["completion"][:1], "completion": row["completion"][1:]} for row in whole]
    ends = []
    for kind, data in (("whole", whole), ("answers", answers)):
        path = tmp_path / f"{kind}.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in data))
        ends.append(loop(tmp_path / kind, {**judged, "dataset": path}, kto_loop, **{**JUDGED, "held_out": 6}))
    assert_same_end(judged, *ends, "loss", "point")


def test_mismatched_completions_are_others() -> None:
    assert kto_loop.mismatched("abcd", "stuv", 4) == [3, 0, 1, 2]
    assert kto_loop.mismatched("abcdefg", "stuvwxy", 3) == [2, 0, 1, 5, 3, 4, 5]  # a last batch of one looks back
    assert kto_loop.mismatched("aabc", "stuv", 4) == [3, 3, 1, 2]  # not of the same prompt
    assert kto_loop.mismatched("abcd", "sstu", 4) == [3, 3, 1, 2]  # nor the same text
    with pytest.raises(ValueError, match="belong to other prompts"):
        kto_loop.mismatched("aab", "stt", 3)


def test_class_weights() -> None:
    labels = [True] * 2 + [False] * 8
    assert kto_loop.class_weights(labels, 0, 0) == (4, 1)
    assert kto_loop.class_weights([not label for label in labels], 0, 0) == (1, 4)
    assert kto_loop.class_weights(labels, 2, 0) == (2, 0.5)
    assert kto_loop.class_weights(labels, 0, 2) == (8, 2)
    assert kto_loop.class_weights(labels, 3, 5) == (3, 5)


@pytest.mark.parametrize("loss", ["kto", pytest.param("apo_zero_unpaired", marks=pytest.mark.slow)])
def test_kto_loop_is_trls(loss: str, judged: dict[str, Path], tokenizer: Any, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    transformers = pytest.importorskip("transformers")
    weights = {"desirable_weight": 3.0, "undesirable_weight": 0.75}
    options = {**JUDGED, **weights, "learning_rate": 1e-2}
    log, ours = loop(tmp_path / "ours", judged, kto_loop, loss=loss, steps=5, **options)
    args = trl.KTOConfig(
        str(tmp_path / "trl"), loss_type=loss, beta=0.1, **weights, max_steps=5, learning_rate=1e-2,
        lr_scheduler_type="linear", warmup_steps=1, per_device_train_batch_size=LOOP["batch_size"], weight_decay=0.0,
        max_length=512, train_sampling_strategy="sequential", use_cpu=True, bf16=False, gradient_checkpointing=False,
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    model, reference = (
        transformers.AutoModelForCausalLM.from_pretrained(judged["model"], dtype=torch.float64) for _ in range(2)
    )
    data = verdicts(judged)[0].select_columns(["prompt", "completion", "label"])
    trainer = trl.KTOTrainer(model, reference, args=args, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    theirs = [entry for entry in trainer.state.log_history if "rewards/chosen" in entry]
    for row, entry in zip(log, theirs, strict=True):
        assert row["loss"] == pytest.approx(entry["loss"], abs=1e-6)
        assert row["point"] == pytest.approx(0.1 * entry["kl"], abs=1e-6)
        assert row["desirable"] == pytest.approx(entry["rewards/chosen"], abs=1e-6)
        assert row["undesirable"] == pytest.approx(entry["rewards/rejected"], abs=1e-6)
    assert (max(row["point"] for row in log) > 1e-3) == (loss == "kto")
    for name, value in trainer.model.state_dict().items():
        if name in ours:  # the head is tied
            torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-6)


def test_the_recipe_is_the_example(judged: dict[str, Path], tokenizer: Any, tmp_path: Path) -> None:
    from accelerate import Accelerator
    from transformers import AutoModelForCausalLM, get_linear_schedule_with_warmup

    log, weights = loop(tmp_path, judged, kto_loop, **{**JUDGED, "desirable_weight": 3.0, "undesirable_weight": 1.0})
    AcceleratorState._reset_state(reset_partial_state=True)
    page = (EXAMPLES.parent / "docs" / "trainers.md").read_text().partition("## KTO and BCO without TRL")[2]
    recipe: dict[str, Any] = {}
    exec(page.partition("```python\n")[2].partition("```")[0], recipe)
    models = [AutoModelForCausalLM.from_pretrained(judged["model"], dtype=torch.float64) for _ in range(2)]
    optimizer = torch.optim.AdamW(models[0].parameters(), lr=JUDGED["learning_rate"], weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 1, 3)
    accelerator = Accelerator(cpu=True)
    policy, optimizer = recipe["prepare"](accelerator, *models, optimizer)
    data = kto_loop.with_mismatched(preferences.encode(verdicts(judged)[0], tokenizer, 512), 8, 512).to_list()
    for row, start in zip(log, (0, 8, 0), strict=True):
        batch = kto_loop.collate(data[start : start + 8], tokenizer.pad_token_id)
        out = recipe["step"](accelerator, policy, models[1], optimizer, batch)
        schedule.step()
        assert out.loss.item() == pytest.approx(row["loss"], abs=1e-7)
    for name, value in policy.state_dict().items():
        if name in weights:
            torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-7)


def test_bcos_delta_is_the_mean_reward_in_training(judged: dict[str, Path], tmp_path: Path) -> None:
    log, _ = loop(tmp_path, judged, kto_loop, loss="bco", **JUDGED)
    labels = torch.tensor(verdicts(judged)[0]["label"]).view(2, 8)[[0, 1, 0]]
    total = count = 0.0
    for row, of_step in zip(log, labels):
        n = int(of_step.sum())
        total, count = total + n * row["desirable"] + (8 - n) * row["undesirable"], count + 8
        assert row["point"] == pytest.approx(total / count, abs=1e-9)
    assert abs(log[-1]["point"]) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "how"),
    [
        ("kto", "processes"),
        ("kto", "accumulated and precomputed"),
        ("bco", "resumed"),
        ("apo_zero_unpaired", "accumulated and precomputed"),
        ("bco", "processes"),
    ],
)
def test_kto_loop_in_another_way_to_the_same_end(
    loss: str, how: str, judged: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    options = {**JUDGED, "loss": loss, "steps": 4, "seed": 1}
    one = loop(tmp_path / "one", judged, kto_loop, save_every=3, **options)
    said = capsys.readouterr().out
    other = tmp_path / "other"
    if how == "processes":  # 10 held-out rows are no whole number of batches there
        other_said = on_two_processes("kto_loop.py", other, judged, **options)
        assert "8 a step: 2 x 1 x 4" in other_said
    else:
        if how == "resumed":
            (tmp_path / "one" / "checkpoint").rename(other.mkdir() or other / "checkpoint")
        ways = {"resumed": {"resume": True}, "accumulated and precomputed": {"accumulate": 2, "precompute": True}}
        loop(other, judged, kto_loop, **options, **ways[how])
        other_said = capsys.readouterr().out
        assert ("Resumed behind step 3" in other_said) == (how == "resumed") == ("step 3:" not in other_said)
    assert_same_end(judged, one, end_of(other), "loss", "desirable", "undesirable", "point")
    assert (other / "results.png").stat().st_size > 10_000
    ends = [[line for line in text.splitlines() if "after" in line] for text in (said, other_said)]
    assert len(ends[0]) == 1 and ends[0] == ends[1]


def test_kto_loop_learns(saved: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    log, _ = loop(tmp_path, saved, kto_loop, steps=30, learning_rate=3e-2)
    assert log[-1]["desirable"] > log[-1]["undesirable"] + 0.5
    after = next(line for line in capsys.readouterr().out.splitlines() if "after" in line)
    assert "nan" not in after


@pytest.mark.parametrize(
    ("example", "options", "message"),
    [
        (dpo_loop, {"loss": "ppo"}, "expected one of dpo, ipo"),
        (dpo_loop, {"beta": -1.0}, "expected beta to be a positive"),
        (dpo_loop, {"accumulate": 3}, "no multiple of 1 x 3"),
        (dpo_loop, {"dataset": "no/such.json"}, "no such file"),
        (dpo_loop, {"max_length": 2}, "too few"),
        (dpo_loop, {"batch_size": 500}, "too few"),
        (kto_loop, {"loss": "dpo"}, "expected one of kto, apo_zero_unpaired, bco"),
        (kto_loop, {"beta": 0.0}, "expected beta to be a positive"),
        (kto_loop, {"resume": True}, "--resume: no "),
        (kto_loop, {"desirable": 0.0}, "of 64 rows 0 are desirable"),
        (kto_loop, {"batch_size": 500}, "too few"),
    ],
)
def test_loops_tell_a_mistake_in_a_sentence(
    example: Any,
    options: dict[str, Any],
    message: str,
    saved: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    import typer

    with pytest.raises(typer.Exit) as left:
        loop(tmp_path, saved, example, **options)
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
