"""``LossStageCallback`` in real trainers: sentence-transformers', transformers' with ours in front, TRL's."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
Dataset = pytest.importorskip("datasets").Dataset

for folder in ("losses", "distill", "alignment"):
    sys.path.append(str(Path(__file__).parent / folder))

from chunked_embed import FlexChunkLoss, loss  # noqa: E402
from chunked_embed.engine import autograd, direct  # noqa: E402
from chunked_embed.trainer_callback import DOORS, LossStageCallback  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
SETTINGS = {"use_cpu": True, "max_steps": 4, "logging_steps": 2, "report_to": "none", "disable_tqdm": True}
SETTINGS |= {"save_strategy": "no", "per_device_train_batch_size": 4, "seed": 0}


def embedding(folder: Path, **options: Any) -> Any:
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from st_parts import labels_for, sentences, static_model

    from chunked_embed import losses

    model = static_model(torch.float32)
    data = Dataset.from_dict({"a": sentences(16, 0), "b": sentences(16, 1), "label": labels_for("tied", 16).tolist()})
    args = SentenceTransformerTrainingArguments(output_dir=str(folder), **SETTINGS)
    return SentenceTransformerTrainer(
        model=model, args=args, train_dataset=data, loss=losses.CoSENTLoss(model, **options)
    )


def distillation(folder: Path, **options: Any) -> Any:
    from trainer_parts import student, teacher, tokens
    from transformers import TrainingArguments

    from distill import DistillTrainer, KLDivLoss

    args = TrainingArguments(output_dir=str(folder), gradient_accumulation_steps=2, **SETTINGS)
    loss = KLDivLoss(**options)
    return DistillTrainer(student(torch.float32), teacher(torch.float32), loss, args, train_dataset=tokens(16))


def preference(folder: Path, **options: Any) -> Any:
    pytest.importorskip("trl")
    from trl import DPOConfig
    from trl_parts import model, pairs, reference, tokenizer

    from alignment.trl import ChunkedDPOTrainer

    args = DPOConfig(output_dir=str(folder), precompute_ref_log_probs=False, **SETTINGS)
    policy, rest = model(), {"train_dataset": pairs(16), "processing_class": tokenizer()}
    return ChunkedDPOTrainer(policy, reference(policy), args, loss_options=options, **rest)


CHUNKED = {"chunk_size": 3, "compiled": False}
RUNS: dict[str, tuple[Callable, dict[str, Any], set[str]]] = {
    "embedding": (embedding, CHUNKED, {"share", "chunks"}),
    "embedding, left to the library": (embedding, {}, set()),
    "embedding, in mini-batches": (embedding, {**CHUNKED, "mini_batch_size": 2}, {"share", "chunks"}),
    "distillation": (distillation, CHUNKED, {"share", "chunks"}),
    "distillation, small": (distillation, {}, {"share"}),
    "preference": (preference, CHUNKED, {"share", "chunks"}),
}


def originals() -> list[Any]:
    doors = (loss._Laid, "call"), (loss.Prepared, "result"), (FlexChunkLoss, "scores")
    backwards = autograd.ChunkedLoss, autograd.ChunkedScores, direct._Gate
    return [vars(owner)[name] for owner, name in (*doors, *((owner, "backward") for owner in backwards))]


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_entries_of_a_trainer(run: str, tmp_path: Path) -> None:
    make, options, expected = RUNS[run]
    before = originals()
    trainer = make(tmp_path, **options)
    trainer.add_callback(LossStageCallback(trainer))
    trainer.train()
    assert originals() == before and not DOORS.watching
    history = trainer.state.log_history
    entries = [entry for entry in history if "memory/peak_gib" in entry]
    assert [entry["step"] for entry in entries] == [2, 4]
    assert len([entry for entry in history if "loss" in entry]) == 2  # the trainer's own are as they were
    for entry in entries:
        assert entry["memory/peak_gib"] > 0.01
        assert {"share", "chunks"} & {name.removeprefix("loss_stage/") for name in entry} == expected
        if "share" in expected:
            assert 0 < entry["loss_stage/share"] < 1
            assert entry["loss_stage/calls"] == (1 if make is embedding else 2)  # micro-batches; a reference
        if "chunks" in expected:
            assert entry["loss_stage/chunks"] > 1 and entry["loss_stage/chunk_rows"] == 3
            assert entry["loss_stage/planned_gib"] > 0
    if make is preference:  # which TRL's trainer collects for its next entry
        assert all("rewards/margins" in entry for entry in history if "loss" in entry)


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_forward_and_backward_are_counted(small: bool, grouped: bool, device: str, tmp_path: Path) -> None:
    from chunked_embed import functional as CF

    callback = LossStageCallback(distillation(tmp_path))
    callback.device = torch.device(device)
    callback.on_train_begin(None, None, None)
    callback.on_step_begin(None, None, None)
    step = callback.current
    a, b = torch.randn(2, 6, 4, device=device, requires_grad=True).unbind()
    options = {} if small else CHUNKED
    found = CF.cosent(a, b, torch.arange(6.0, device=device), **options) if grouped else CF.info_nce(a, b, **options)
    assert step.calls == 1 and len(step.spans) == 1
    found.backward()
    assert step.calls == 1 and len(step.spans) == 2
    if device == "cuda":
        torch.cuda.synchronize()
    assert step.reached()
    (_, forward), (backward, end) = step.spans
    assert forward.until(backward) >= 0 and backward.until(end) > 0
    assert (step.plan is None) == small
    callback.on_train_end(None, None, None)


def test_what_the_device_has_not_done_waits_for_the_next_entry(tmp_path: Path) -> None:
    callback = LossStageCallback(distillation(tmp_path))
    callback.on_train_begin(None, None, None)
    done: list[int] = []
    for n in range(3):
        callback.on_step_begin(None, None, None)
        step = callback.current
        callback.spent(step.start, step.start, 1)
        callback.current, step.end = None, step.start
        step.reached = lambda n=n: n in done
        callback.steps.append(step)
    assert "loss_stage/calls" not in callback._entry() and len(callback.steps) == 3
    done += [0, 1]
    for step in callback.steps:
        step.start.until = lambda other: 1.0
    assert callback._entry()["loss_stage/calls"] == 1 and len(callback.steps) == 1
    callback.on_train_end(None, None, None)


def test_a_training_that_failed_keeps_nothing_alive(tmp_path: Path) -> None:
    before = originals()
    failed, other = (LossStageCallback(distillation(tmp_path)) for _ in range(2))
    failed.on_train_begin(None, None, None)
    alive = ref(failed.trainer)
    del failed
    gc.collect()
    assert alive() is None
    other.on_train_begin(None, None, None)
    other.on_train_end(None, None, None)
    assert originals() == before


def test_no_trainer() -> None:
    with pytest.raises(TypeError, match=r"expected the trainer as transformers\.Trainer, got str"):
        LossStageCallback("trainer")
