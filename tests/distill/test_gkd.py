"""ChunkedGKDTrainer beside TRL's: one seed, the same steps, the same losses and weights."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("trl")
pytest.importorskip("peft")

import peft
import trainer_parts as parts
from datasets import Dataset
from trainer_parts import assert_same_training, logged
from trl.experimental.gkd import GKDConfig, GKDTrainer

from distill import KLDivLoss, TopKLoss
from distill.trl import ChunkedGKDTrainer

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore::FutureWarning:trl"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]
PLAIN = {"compiled": False}


def chats(size: int = 12, seed: int = 0) -> Dataset:
    draw = random.Random(seed)
    rows = []
    for _ in range(size):
        said = {"user": parts.text(draw, 1, 5), "assistant": parts.text(draw, 1, 9)}
        rows.append({"messages": [{"role": role, "content": content} for role, content in said.items()]})
    return Dataset.from_list(rows)


def make(cls: type, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "learning_rate": 1e-2,
        "optim": "sgd",
        "save_strategy": "no",
        "eval_strategy": "steps",
        "eval_steps": 3,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "max_new_tokens": 5,
        "lmbda": 0.0,
    }
    args = GKDConfig(str(folder), **settings | options.pop("args", {}))
    if cls is ChunkedGKDTrainer and "loss" not in options:
        options.setdefault("loss_options", PLAIN)
    options.setdefault("model", parts.student(dtype))
    options.setdefault("teacher_model", parts.teacher(dtype))
    return cls(
        args=args,
        train_dataset=chats(),
        eval_dataset=chats(6, 1),
        processing_class=parts.tokenizer(),
        **options,
    )


def trained(*args: Any, **options: Any) -> Any:
    trainer = make(*args, **options)
    random.seed(0)  # of whether a step is on-policy
    torch.manual_seed(0)
    trainer.train()
    return trainer


def assert_same(folder: Path, tolerance: float = 2e-6, **options: Any) -> Any:
    theirs, ours = (trained(cls, folder, **copy.deepcopy(options)) for cls in (GKDTrainer, ChunkedGKDTrainer))
    assert_same_training(ours, theirs, tolerance)
    assert logged(ours, "eval_loss") == pytest.approx(logged(theirs, "eval_loss"), rel=10 * tolerance)
    return ours


@pytest.mark.parametrize(
    "args",
    [
        {},
        {"beta": 0.0},
        {"beta": 1.0},
        {"beta": 0.1, "temperature": 0.5},
        {"lmbda": 0.5},
        {"lmbda": 1.0},
        {"seq_kd": True},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"gradient_checkpointing": True, "lmbda": 0.5},
    ],
    ids=str,
)
def test_trains_like_trl(args: dict[str, Any], tmp_path: Path) -> None:
    ours = assert_same(tmp_path, args=args)
    for prefix in ("", "eval_"):
        for name in ("jsd", "student_entropy", "teacher_agreement"):
            assert len(logged(ours, prefix + name)) == (1 if prefix else 3)
    if args == {}:  # a step's tokens are one batch here
        assert logged(ours, "jsd") == pytest.approx(logged(ours), rel=1e-6)


def test_in_float64(tmp_path: Path) -> None:
    assert_same(tmp_path, 1e-10, dtype=torch.float64, args={"lmbda": 0.5})


def test_under_autocast(tmp_path: Path) -> None:
    ours = assert_same(tmp_path, 2e-3, args={"bf16": True, "lmbda": 0.5})
    assert ours.model._original_forward is not None  # accelerate has wrapped what we attached to


def test_an_adapter(tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=4, task_type="CAUSAL_LM")
    ours = assert_same(tmp_path, peft_config=config, args={"lmbda": 0.5})
    assert any("lora" in name and p.requires_grad for name, p in ours.model.named_parameters())


def test_a_teacher_by_name_and_metrics(tmp_path: Path) -> None:
    parts.teacher(torch.float32).save_pretrained(tmp_path / "teacher")
    shapes = []

    def metrics(given: Any) -> dict[str, float]:
        shapes.append(given.predictions.shape)
        return {"mine": float(given.predictions.sum())}

    options = {"teacher_model": str(tmp_path / "teacher"), "args": {"teacher_model_init_kwargs": {"dtype": "float32"}}}
    found = [
        make(cls, tmp_path, compute_metrics=metrics, **copy.deepcopy(options)).evaluate()
        for cls in (GKDTrainer, ChunkedGKDTrainer)
    ]
    for name in ("eval_loss", "eval_mine"):
        assert found[1][name] == pytest.approx(found[0][name], rel=1e-6)
    assert found[1]["eval_jsd"] > 0 and shapes[0] == shapes[1]


def test_another_loss(tmp_path: Path) -> None:
    trainer = make(ChunkedGKDTrainer, tmp_path, loss=KLDivLoss(2.0, 0.3, 0.7, **PLAIN))
    batch = next(iter(trainer.get_train_dataloader()))
    arguments = {name: batch[name] for name in ("input_ids", "attention_mask")}
    used = batch["labels"][:, 1:] != -100
    s, t = (model(**arguments).logits[:, :-1][used] for model in (trainer.model, trainer.teacher_model))
    soft = F.kl_div((s / 2).log_softmax(-1), (t / 2).log_softmax(-1), reduction="batchmean", log_target=True)
    expected = 0.7 * soft + 0.3 * F.cross_entropy(s, batch["labels"][:, 1:][used])
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), expected)
    trainer.train()


@pytest.mark.parametrize("side", ["model", "teacher_model"])
def test_logits_that_do_something_unknown_are_refused(side: str, tmp_path: Path) -> None:
    model = parts.student(torch.float32)
    forward = model.forward

    def doubled(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.logits = 2 * out.logits
        return out

    model.forward = doubled
    with pytest.raises(ValueError, match="something to its logits that is not known"):
        trained(ChunkedGKDTrainer, tmp_path, **{side: model})
    trained(ChunkedGKDTrainer, tmp_path, check=False, **{side: model})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": TopKLoss()}, "expected a loss with a teacher, got TopKLoss"),
        ({"loss": "jsd"}, "expected loss to be a DistillationLoss, got str"),
        ({"loss": KLDivLoss(), "loss_options": PLAIN}, "got both"),
        ({"loss": KLDivLoss(ignore_index=1)}, "ignore_index=-100"),
        ({"teacher_model": None}, "expected a teacher_model, got None"),
        ({"loss_options": {"weight_hard": float("nan")}}, "expected weight_hard to be a finite number"),
        ({"report": ("kl",)}, "expected report of JSDLoss among"),
    ],
)
def test_refusals(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        make(ChunkedGKDTrainer, tmp_path, **options)
