"""DistillTrainer beside ``transformers.Trainer`` on full logits: one seed, the same losses and weights."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("accelerate")

import trainer_parts as parts
from datasets import Dataset
from processes import spawn
from trainer_parts import assert_same_training, hard, kl, logged, student, teacher, tokens
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    DataCollatorWithFlattening,
    Gemma2Config,
    Gemma2ForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from distill import (
    DistillLoss,
    DistillTrainer,
    JSDLoss,
    KLDivLoss,
    ReverseKLLoss,
    TAIDLoss,
    TopKLoss,
)
from distill.trainer import DistillCollator

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]
HALF = DistillLoss([("ce", 0.5), ("kl", 0.5)], compiled=False)


def half(s: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    return 0.5 * hard(s, t, labels) + 0.5 * kl(s, t, labels)


def gemma(vocab_size: int = 64) -> Any:
    """With a soft-cap."""
    torch.manual_seed(3)
    sizes = parts.SIZES | {"head_dim": 8, "num_key_value_heads": 1, "final_logit_softcapping": 2.0}
    config = Gemma2Config(vocab_size=vocab_size, attn_implementation="eager", pad_token_id=0, **sizes)
    return parts.sharpened(Gemma2ForCausalLM(config))


def cohere() -> Any:
    """With a logit scale."""
    torch.manual_seed(4)
    return parts.sharpened(
        CohereForCausalLM(CohereConfig(vocab_size=64, logit_scale=0.4, pad_token_id=0, **parts.SIZES))
    )


def adapted(tied: bool = False, **options: Any) -> Any:
    """Adapters in the backbone and on the head."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(5)
    options = {"target_modules": ["q_proj", "down_proj", "lm_head"], "init_lora_weights": False} | options
    return peft.get_peft_model(student(tie_word_embeddings=tied), peft.LoraConfig(r=4, **options))


def biased() -> Any:
    """A teacher with a bias in its head, and dropout that it was left with."""
    model = teacher(attention_dropout=0.5).train()
    model.lm_head.bias = torch.nn.Parameter(torch.randn(64, dtype=torch.float64))
    return model


def uncounted() -> Any:
    """Whose tokens ``Trainer`` would not count of itself."""
    model = student()
    model.accepts_loss_kwargs, model.loss_type = False, None
    return model


@dataclass
class Case:
    loss: Callable[[], Any]
    divergence: parts.Divergence
    student: Callable[[], Any] = student
    teacher: Callable[[], Any] = teacher
    args: dict[str, Any] = field(default_factory=dict)  # of ours alone


ACCUMULATED = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}


CASES = {
    "by default": Case(lambda: None, half),
    "reverse": Case(lambda: ReverseKLLoss(compiled=False), lambda s, t, y: kl(t, s, y)),
    "temperature": Case(
        lambda: KLDivLoss(2.0, 0.3, 0.7, scale_by_t2=True, compiled=False),
        lambda s, t, y: 0.3 * hard(s, t, y) + 0.7 * 4 * kl(s / 2, t / 2, y),
    ),
    "chunks": Case(lambda: DistillLoss([("ce", 0.5), ("kl", 0.5)], compiled=False, chunk_size=3), half),
    "hard": Case(lambda: KLDivLoss(weight_hard=1.0, weight_soft=0.0, compiled=False), hard),
    "larger teacher": Case(lambda: HALF, lambda s, t, y: half(s, t[:, :64], y), teacher=lambda: teacher(vocab_size=66)),
    "larger student": Case(
        lambda: HALF,
        lambda s, t, y: 0.5 * hard(s, t, y) + 0.5 * kl(s[:, :63], t, y),
        teacher=lambda: teacher(vocab_size=63),
    ),
    "soft-cap and scale": Case(lambda: HALF, half, gemma, cohere),
    "scale and soft-cap": Case(lambda: HALF, half, cohere, gemma),
    "adapters": Case(lambda: HALF, half, adapted),
    "dora": Case(lambda: HALF, half, lambda: adapted(use_dora=True, init_lora_weights=True)),
    "bias of adapters": Case(lambda: HALF, half, lambda: adapted(lora_bias=True)),
    "a head in whole": Case(
        lambda: HALF, half, lambda: adapted(target_modules=["q_proj"], modules_to_save=["lm_head"])
    ),
    "tokens": Case(
        lambda: HALF, half, lambda: adapted(True, target_modules=["q_proj"], trainable_token_indices=[5, 9])
    ),
    "biased teacher": Case(lambda: HALF, half, teacher=biased),
    "adapted teacher": Case(lambda: HALF, half, teacher=adapted),
    "checkpointing": Case(lambda: HALF, half, args={"gradient_checkpointing": True}),
    "accumulated": Case(lambda: HALF, half, uncounted, args=ACCUMULATED),
}


@pytest.mark.parametrize("name", CASES)
def test_trains_as_from_full_logits(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    loss = case.loss()
    options = {} if loss is None else {"loss": loss}
    ours = parts.trainer(tmp_path, model=case.student(), teacher_model=case.teacher(), args=case.args, **options)
    theirs = parts.reference(tmp_path, case.divergence, model=case.student(), teacher_model=case.teacher())
    before = copy.deepcopy(ours.model.state_dict())
    for trainer in (ours, theirs):
        trainer.train()
    assert_same_training(ours, theirs)
    changed = {key for key, value in ours.model.state_dict().items() if not torch.equal(value, before[key])}
    assert any("lm_head" in key or "embed" in key for key in changed)
    assert all(p.grad is None for p in ours.teacher_model.parameters())


def test_bf16_autocast(tmp_path: Path) -> None:
    options = {"model": student(torch.float32), "teacher_model": teacher(torch.float32), "args": {"bf16": True}}
    ours = parts.trainer(tmp_path, loss=HALF, eval_dataset=tokens(4), **copy.deepcopy(options))
    theirs = parts.reference(tmp_path, half, **copy.deepcopy(options))
    dtypes = set()
    ours.teacher_model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *a: dtypes.add(a[-1].dtype))
    for trainer in (ours, theirs):
        trainer.train()
    assert dtypes == {torch.bfloat16}
    assert_same_training(ours, theirs, 2e-3)
    assert ours.evaluate()["eval_loss"] == pytest.approx(theirs.evaluate(ours.eval_dataset)["eval_loss"], rel=1e-2)
    # A teacher may have another dtype than the student.
    parts.trainer(tmp_path, loss=HALF, model=student(torch.float32), teacher_model=teacher(torch.bfloat16)).train()


def test_an_auxiliary_loss_is_added_once(tmp_path: Path) -> None:
    def model() -> Any:
        torch.manual_seed(0)
        sizes = parts.SIZES | {"num_key_value_heads": 2, "num_local_experts": 4}
        config = MixtralConfig(vocab_size=64, output_router_logits=True, router_aux_loss_coef=0.5, **sizes)
        return parts.sharpened(MixtralForCausalLM(config), torch.float32)  # its experts have no float64

    def batch_loss(trainer: Any) -> Tensor:
        batch = next(iter(trainer.get_eval_dataloader()))
        trainer.model.eval()
        return trainer.compute_loss(trainer.model, dict(batch))

    options = {"teacher_model": teacher(torch.float32), "eval_dataset": tokens(4)}
    ours = parts.trainer(tmp_path, loss=HALF, model=model(), **options)
    theirs = parts.reference(tmp_path, half, model=model(), **options)
    batch = next(iter(theirs.get_eval_dataloader()))
    aux = theirs.model(**batch).aux_loss
    assert aux > 0.1
    torch.testing.assert_close(batch_loss(ours), batch_loss(theirs) + 0.5 * aux)
    assert ours.evaluate()["eval_aux_loss"] == pytest.approx(aux.item(), rel=1e-5)
    ours.train()
    assert len(logged(ours, "aux_loss")) == 3


# --- steps, processes, offline ---------------------------------------------------------------------------------------


def test_noise_in_embeddings(tmp_path: Path) -> None:
    args = {"neftune_noise_alpha": 5.0}
    ours, theirs = parts.trainer(tmp_path, loss=HALF, args=args), parts.reference(tmp_path, half, args=args)
    for trainer in (ours, theirs):
        torch.manual_seed(0)
        trainer.train()
    assert_same_training(ours, theirs)


def test_a_loop_begins_without_sums(tmp_path: Path) -> None:
    """Of one before, that ended or was broken off (``auto_find_batch_size``)."""
    args = {"learning_rate": 0.0, "logging_steps": 2, "train_sampling_strategy": "sequential"}
    trainer = parts.trainer(tmp_path, loss=HALF, args=args)  # three steps, the last of which is not logged
    for _ in range(2):
        trainer.train()
    (found,) = logged(trainer, "kl")
    assert found == pytest.approx(by_hand(trainer, tokens().select(range(8)))["kl"], rel=1e-6)


def test_ligers_kernels_without_its_loss(tmp_path: Path) -> None:
    pytest.importorskip("liger_kernel")
    kernels = {"rope": False, "rms_norm": False, "swiglu": False}  # the others need a GPU
    liger = {"use_liger_kernel": True, "liger_kernel_config": kernels}
    with pytest.warns(UserWarning, match="its fused loss is not"):
        ours = parts.trainer(tmp_path, loss=HALF, args=liger)
    theirs = parts.reference(tmp_path, half)
    for trainer in (ours, theirs):
        trainer.train()
    assert_same_training(ours, theirs)
    liger["liger_kernel_config"] = kernels | {"fused_linear_cross_entropy": True}
    with pytest.raises(ValueError, match="none of Liger's losses"):
        parts.trainer(tmp_path, loss=HALF, args=liger)


def test_a_teacher_has_no_dropout(tmp_path: Path) -> None:
    trainer = parts.trainer(tmp_path, loss=HALF, teacher_model=teacher(attention_dropout=0.9))
    batch = DistillCollator()(list(tokens(4)))
    losses = [trainer.compute_loss(trainer.model, batch).item()]
    trainer.teacher_model.train()
    losses.append(trainer.compute_loss(trainer.model, batch).item())
    assert losses[0] == losses[1]
    dropping = parts.trainer(tmp_path, loss=HALF, model=student(attention_dropout=0.9))
    assert dropping.compute_loss(dropping.model.train(), batch) != dropping.compute_loss(dropping.model, batch)


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs torch.distributed with gloo")
@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    spawn(parts.run, parts.WORLD, str(tmp_path))
    one = parts.reference(tmp_path, half, eval_dataset=tokens(5, seed=1), args=parts.ORDERED)
    one.train()
    alone = parts.distributed(tmp_path, {}).state.log_history
    for rank in range(parts.WORLD):
        for name, found in torch.load(tmp_path / f"rank-{rank}.pt").items():
            torch.testing.assert_close(found["weights"], dict(one.model.state_dict()), rtol=1e-10, atol=1e-12)
            for theirs, ours in zip(alone, found["logs"], strict=True):
                compared = [key for key in theirs if key.removeprefix("eval_") in ("kl", "ce", "student_entropy")]
                assert len(compared) == (0 if "train_loss" in theirs else 3)
                compared += [key for key in ("loss", "grad_norm") if key in theirs]
                for key in compared:
                    assert ours[key] == pytest.approx(theirs[key], rel=1e-6), (rank, name, key)


def offline(k: int = 8) -> Dataset:
    model = teacher()

    def say(row: dict[str, Any]) -> dict[str, Any]:
        with torch.no_grad():
            logprobs, ids = model(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1).topk(k)
        return {"teacher_ids": ids.tolist(), "teacher_logprobs": logprobs.tolist()}

    return tokens().map(say)


def test_offline_teacher(tmp_path: Path) -> None:
    def bucket(s: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        k = t.shape[1] // 2
        p, q = t[:, k:].exp(), s.softmax(-1).gather(1, t[:, :k].long())
        p, q = (torch.cat([x, 1 - x.sum(1, keepdim=True)], 1) for x in (p, q))
        return 0.5 * (p * (p / q).log()).sum(1) + 0.5 * hard(s, t, labels)

    data = offline()
    loss = TopKLoss(weight_hard=0.5, weight_soft=0.5, compiled=False)
    options = {"train_dataset": data, "eval_dataset": data}
    ours = parts.trainer(tmp_path, loss=loss, teacher_model=None, **options)
    theirs = parts.reference(tmp_path, bucket, **options)
    for trainer in (ours, theirs):
        trainer.train()
    assert_same_training(ours, theirs, 1e-6)  # the collators make float32 of the log-probabilities
    found = ours.evaluate()
    assert {"eval_kl", "eval_ce", "eval_student_entropy"} < found.keys() and "eval_teacher_agreement" not in found


def test_a_step_of_ignored_tokens(tmp_path: Path) -> None:
    data = Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [-100] * 3}] * 8)
    trainer = parts.trainer(tmp_path, loss=HALF, train_dataset=data)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    assert logged(trainer) == [0.0, 0.0, 0.0] and not logged(trainer, "kl")
    torch.testing.assert_close(trainer.model.state_dict(), before)


def test_a_schedule_and_a_resumed_run(tmp_path: Path) -> None:
    def run(folder: str, resume: str | None = None) -> Any:
        seen: list[float] = []
        trainer = parts.trainer(
            tmp_path / folder,
            loss=TAIDLoss(compiled=False),
            schedule={"t": lambda progress: seen.append(progress) or 0.2 + 0.8 * progress},
            args={"max_steps": 5, "save_strategy": "steps", "save_steps": 2},
        )
        trainer.train(resume_from_checkpoint=resume and str(tmp_path / resume))
        return trainer, seen

    whole, seen = run("whole")
    assert seen == [0.0, 0.0, 0.25, 0.5, 0.75, 1.0] and whole.loss.t == 1.0
    resumed, seen = run("resumed", "whole/checkpoint-2")
    assert seen == [0.5, 0.5, 0.75, 1.0]
    torch.testing.assert_close(resumed.model.state_dict(), whole.model.state_dict())
    assert logged(resumed, "taid") == logged(whole, "taid")  # the first of them from the checkpoint

    seen = []

    def taid(s: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        mix = 0.2 + 0.8 * len(seen) / 4
        seen.append(mix)
        return -(((1 - mix) * s.detach() + mix * t).softmax(-1) * s.log_softmax(-1)).sum(-1)

    theirs = parts.reference(tmp_path, taid, args={"max_steps": 5})
    theirs.train()
    assert_same_training(whole, theirs)


# --- what is logged, and evaluation ----------------------------------------------------------------------------------


def by_hand(trainer: Any, data: Dataset) -> dict[str, float]:
    """Means over the tokens of all rows, one row at a time."""
    sums = dict.fromkeys(("kl", "ce", "student_entropy", "teacher_agreement"), 0.0)
    count = 0
    for row in data:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        used = labels != -100
        with torch.no_grad():
            s, t = (model(ids).logits[0, :-1][used] for model in (trainer.model, trainer.teacher_model))
        log_q = s.log_softmax(-1)
        sums["kl"] += kl(s, t, labels).sum().item()
        sums["ce"] += hard(s, t, labels[used]).sum().item()
        sums["student_entropy"] -= (log_q.exp() * log_q).sum().item()
        sums["teacher_agreement"] += (s.argmax(-1) == t.argmax(-1)).sum().item()
        count += int(used.sum())
    return {name: total / count for name, total in sums.items()}


def test_logs_means_over_tokens(tmp_path: Path) -> None:
    data, held_out = tokens(7), tokens(5, seed=1)
    similar = student()
    with torch.no_grad():
        similar.lm_head.weight.add_(torch.randn_like(similar.lm_head.weight) * 0.1)
    args = {"learning_rate": 0.0, "max_steps": 4, "logging_steps": 4, "per_device_train_batch_size": 2}
    args |= {"per_device_eval_batch_size": 2, "eval_strategy": "steps", "eval_steps": 4}
    args |= {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 4, "metric_for_best_model": "kl"}
    trainer = parts.trainer(
        tmp_path,
        loss=HALF,
        teacher_model=similar,
        train_dataset=data,
        eval_dataset={"held_out": held_out},
        args=args | {"metric_for_best_model": "held_out_kl"},
    )
    trainer.train()  # one epoch
    for dataset, prefix in ((data, ""), (held_out, "eval_held_out_")):
        expected = by_hand(trainer, dataset)
        assert expected["teacher_agreement"] > 0.3
        for name, value in expected.items():
            assert logged(trainer, prefix + name) == [pytest.approx(value, rel=1e-6)], name
    assert trainer.state.best_metric == pytest.approx(by_hand(trainer, held_out)["kl"], rel=1e-6)
    assert trainer.predict(data).metrics["test_kl"] == pytest.approx(by_hand(trainer, data)["kl"], rel=1e-6)
    silent = parts.trainer(tmp_path, loss=HALF, report=())
    assert {"eval_student_entropy", "eval_teacher_agreement"}.isdisjoint(silent.evaluate(data))


def test_evaluates_with_and_without_metrics(tmp_path: Path) -> None:
    seen = []
    data = tokens(4)

    def metrics(given: Any) -> dict[str, float]:
        seen.append((given.predictions, given.label_ids))
        return {"mine": 7.0}

    args = {"per_device_eval_batch_size": 4}
    trainer = parts.trainer(tmp_path, loss=HALF, compute_metrics=metrics, eval_dataset=data, args=args)
    plain = parts.trainer(tmp_path, loss=HALF, eval_dataset=data, args=args)
    theirs = parts.reference(tmp_path, half, eval_dataset=data, args=args)
    found, bare, expected = (t.evaluate() for t in (trainer, plain, theirs))
    assert found["eval_mine"] == 7.0
    assert found["eval_loss"] == bare["eval_loss"] == pytest.approx(expected["eval_loss"])
    batch = parts.collate(list(data))
    with torch.no_grad():
        logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(torch.from_numpy(seen[0][0]), logits)
    assert torch.equal(torch.from_numpy(seen[0][1]), batch["labels"])

    forwards = []
    hook = plain.model.lm_head.register_forward_hook(lambda *_: forwards.append(torch.is_grad_enabled()))
    loss, predictions, labels = plain.prediction_step(plain.model, batch, prediction_loss_only=True)
    hook.remove()
    assert forwards == [False] and predictions is None and labels is None and not loss.requires_grad


# --- the data --------------------------------------------------------------------------------------------------------


def test_text_is_tokenised(tmp_path: Path) -> None:
    ids = Dataset.from_list([{"input_ids": parts.tokenizer()(row["text"])["input_ids"][:6]} for row in parts.texts()])
    options = {"processing_class": parts.tokenizer(), "max_length": 6}
    from_text = parts.trainer(tmp_path, loss=HALF, train_dataset=parts.texts(), **options)
    labels = ids.map(lambda row: {"labels": row["input_ids"]})
    theirs = parts.reference(tmp_path, half, train_dataset=labels)
    for trainer in (from_text, theirs):
        trainer.train()
    assert_same_training(from_text, theirs)
    held_out = from_text.evaluate(parts.texts(5, seed=1))
    assert held_out["eval_ce"] == pytest.approx(from_text.evaluate({"a": parts.texts(5, seed=1)})["eval_a_ce"])


def test_collator() -> None:
    rows = [
        {"input_ids": [5, 6, 7], "teacher_ids": [[1, 2]] * 3, "teacher_logprobs": [[-1.0, -2.0]] * 3},
        {"input_ids": [8, 9], "teacher_ids": [[3, 4]] * 2, "teacher_logprobs": [[-3.0, -4.0]] * 2},
    ]
    batch = DistillCollator()(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7], [8, 9, -100]]
    assert batch["teacher_ids"].tolist() == [[[1, 2]] * 3, [[3, 4]] * 2 + [[0, 0]]]
    assert batch["teacher_logprobs"][1].tolist() == [[-3.0, -4.0]] * 2 + [[-math.inf] * 2]
    # What was padded before: no label is a pad, nor predicted from one.
    left = DistillCollator()([{"input_ids": torch.tensor([0, 0, 5, 6]), "attention_mask": torch.tensor([0, 0, 1, 1])}])
    assert left["labels"].tolist() == [[-100, -100, -100, 6]]
    right = DistillCollator()([{"input_ids": [5, 6, 0], "attention_mask": [1, 1, 0]}])
    assert right["labels"].tolist() == [[5, 6, -100]]
    with pytest.raises(ValueError, match="labels of 2 tokens"):
        DistillCollator()([{"input_ids": [1, 2], "labels": [1]}])
    with pytest.raises(ValueError, match=r"teacher_ids of shape \(tokens, K\)"):
        DistillCollator()([{"input_ids": [1, 2], "teacher_ids": [1, 2]}])


# --- documents in one row --------------------------------------------------------------------------------------------


def trls(**options: Any) -> Any:
    return pytest.importorskip("trl.trainer.sft_trainer").DataCollatorForLanguageModeling(0, **options)


def trl_packed() -> Dataset:
    return pytest.importorskip("trl").pack_dataset(tokens(), 25)  # four rows


def masked() -> Dataset:
    """Packed, with a mask instead of labels."""
    data = tokens().map(lambda row: {"completion_mask": [int(x != -100) for x in row["labels"]]})
    return parts.in_pairs(data.remove_columns("labels"))


FLAT: dict[str, tuple[Callable[[], Any], Callable[[], Any], dict[str, Any]]] = {  # data, collator, args
    "packed": (trl_packed, lambda: None, {}),
    "packed and accumulated": (
        trl_packed,
        lambda: None,
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    ),
    "packed masks": (masked, lambda: None, {}),
    "packed, theirs": (trl_packed, lambda: trls(padding_free=True, pad_to_multiple_of=16), {}),
    "flattened": (tokens, DataCollatorWithFlattening, {}),
    "flattened, offsets": (
        tokens,
        lambda: DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True),
        {},
    ),
    "padding-free": (tokens, lambda: trls(padding_free=True), {}),
    "positions": (tokens, lambda: trls(return_position_ids=True), {}),
}


@pytest.fixture(scope="module")
def one_a_row(tmp_path_factory: pytest.TempPathFactory) -> Any:
    trainer = parts.reference(tmp_path_factory.mktemp("apart"), half, args={"per_device_train_batch_size": 12})
    trainer.train()
    return trainer


@pytest.mark.parametrize(("name", "attention"), [*((name, "sdpa") for name in FLAT), ("packed", "eager")])
def test_documents_are_kept_apart(name: str, attention: str, one_a_row: Any, tmp_path: Path) -> None:
    data, collator, args = FLAT[name]
    ours = parts.trainer(
        tmp_path,
        loss=HALF,
        model=student(attn_implementation=attention),
        teacher_model=teacher(attn_implementation=attention),
        train_dataset=data(),
        data_collator=collator(),
        args={"per_device_train_batch_size": 12} | args,
    )
    ours.train()
    assert_same_training(ours, one_a_row)
    if name == "packed":
        apart = by_hand(ours, tokens(5, seed=1))
        for key, value in ours.evaluate(parts.in_pairs(tokens(5, seed=1))).items():
            if (key := key.removeprefix("eval_")) in apart:
                assert value == pytest.approx(apart.pop(key), rel=1e-6)
        assert not apart


def test_packed_rows_make_one() -> None:
    rows = [
        {"input_ids": [5, 6, 7], "seq_lengths": [1, 2], "teacher_ids": [[1], [2], [3]]},
        {"input_ids": [8, 9], "seq_lengths": [2], "teacher_ids": [[4], [5]]},
    ]
    batch = {name: x.tolist() if isinstance(x, Tensor) else x for name, x in DistillCollator()(rows).items()}
    assert batch == {
        "input_ids": [[5, 6, 7, 8, 9]],
        "teacher_ids": [[[1], [2], [3], [4], [5]]],
        "labels": [[-100, -100, 7, -100, 9]],
        "position_ids": [[0, 0, 1, 0, 1]],
        "cu_seq_lens_q": [0, 1, 3, 5],
        "cu_seq_lens_k": [0, 1, 3, 5],
        "max_length_q": 2,
        "max_length_k": 2,
        "seq_idx": [[0, 1, 1, 2, 2]],
        "row_lengths": [3, 2],
    }
    short = DistillCollator()([{"input_ids": [5], "seq_lengths": [1]}])
    assert short["position_ids"].tolist() == [[0, 0]] and short["labels"].tolist() == [[-100, -100]]


def test_packed_rows_of_an_offline_teacher(tmp_path: Path) -> None:
    loss = TopKLoss(weight_hard=0.5, weight_soft=0.5, compiled=False)
    data = offline()
    trainer = parts.trainer(tmp_path, loss=loss, teacher_model=None, train_dataset=parts.in_pairs(data))
    found, expected = (
        trainer.compute_loss(trainer.model, DistillCollator()(list(rows))) for rows in (parts.in_pairs(data), data)
    )
    torch.testing.assert_close(found, expected)


def mamba() -> Any:
    return MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=1))


def jamba() -> Any:
    torch.manual_seed(0)
    sizes = parts.SIZES | {"num_key_value_heads": 2, "num_experts": 2, "mamba_d_state": 4, "mamba_dt_rank": 4}
    layers = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
    config = JambaConfig(vocab_size=64, pad_token_id=0, use_mamba_kernels=False, **sizes, **layers)
    return JambaForCausalLM(config)


@pytest.mark.parametrize("side", ["model", "teacher_model"])
def test_states_that_go_on_from_one_document_to_the_next(side: str, tmp_path: Path) -> None:
    data = parts.in_pairs(tokens())
    plain = {"model": student(torch.float32), "teacher_model": teacher(torch.float32)}
    with pytest.raises(ValueError, match=f"expected the {side} to take position_ids .* got MambaForCausalLM"):
        parts.trainer(tmp_path, loss=HALF, train_dataset=data, **plain | {side: mamba()})
    with pytest.raises(ValueError, match=f"expected the {side} to keep documents in one row apart"):
        parts.trainer(tmp_path, loss=HALF, train_dataset=data, **plain | {side: jamba()}).train()
    parts.trainer(tmp_path, loss=HALF, train_dataset=data, check=False, **plain | {side: jamba()}).train()
    parts.trainer(tmp_path, loss=HALF, **plain | {side: jamba()}).train()  # one document a row


def test_offsets_that_attention_does_not_read(tmp_path: Path) -> None:
    def collate(rows: list) -> dict[str, Any]:
        batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(rows)
        return {name: value for name, value in batch.items() if name != "position_ids"}

    with pytest.raises(ValueError, match=r"do not follow .'cu_seq_lens_k'"):
        parts.trainer(tmp_path, loss=HALF, data_collator=collate).train()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"input_ids": [3, 4], "seq_lengths": [1, 1]}, {"input_ids": [3, 4]}], "rows with the same columns"),
        ([{"input_ids": [3, 4], "seq_lengths": [1, 2]}], r"add up to the 2 input_ids, got \[1, 2\]"),
        ([{"input_ids": [3, 4], "seq_lengths": [2, 0]}], r"of one or more .* got \[2, 0\]"),
        ([{"input_ids": [3, 4], "seq_lengths": 2}], "seq_lengths of one or more .* got 2"),
        ([{"input_ids": [3, 4], "seq_lengths": [2], "attention_mask": [1, 0]}], "attention_mask of ones beside"),
    ],
)
def test_rows_that_cannot_be_flattened(rows, message) -> None:
    with pytest.raises(ValueError, match=message):
        DistillCollator()(rows)


def leaving(*names: str, **also: Any) -> Callable[[list], dict[str, Any]]:
    """A collator that leaves something in a batch, or puts it there."""

    def collator(rows: list) -> dict[str, Any]:
        batch = DistillCollator()([{name: x for name, x in row.items() if name != "seq_lengths"} for row in rows])
        return {**batch, **{name: torch.ones_like(batch["input_ids"]) for name in names}, **also}

    return collator


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data_collator": leaving("completion_mask")}, r"reads, got also \['completion_mask'\]"),
        ({"data_collator": leaving(seq_lengths=[[3]])}, r"reads, got also \['seq_lengths'\]"),
        ({"data_collator": leaving("position_ids")}, "come without an attention_mask"),
        ({"data_collator": leaving(), "train_dataset": parts.in_pairs(tokens())}, "keeps the 8 documents .* for 0"),
        (
            {"data_collator": DataCollatorWithFlattening(), "train_dataset": parts.in_pairs(tokens())},
            "keeps the 8 documents .* got DataCollatorWithFlattening, with position_ids for 4",
        ),
    ],
)
def test_batches_that_would_be_another_loss(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        parts.trainer(tmp_path, loss=HALF, **options).train()


def test_what_only_one_of_two_reads(tmp_path: Path) -> None:
    def reading(model: Any) -> Any:
        class Reading(type(model)):
            def forward(self, input_ids: Any = None, attention_mask: Any = None, weights: Any = None, **kw: Any) -> Any:
                return super().forward(input_ids, attention_mask, **kw)

        model.__class__ = Reading
        return model

    trainer = parts.trainer(tmp_path, loss=HALF, model=reading(student()), data_collator=leaving("weights"))
    with pytest.warns(UserWarning, match=r"the teacher_model does not read \['weights'\], which the model does"):
        trainer.train()


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["model", "teacher_model"])
def test_logits_that_do_something_unknown_are_refused(side: str, tmp_path: Path) -> None:
    models = {"model": student(), "teacher_model": teacher()}
    forward = models[side].forward

    def doubled(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.logits = 2 * out.logits
        return out

    models[side].forward = doubled
    with pytest.raises(ValueError, match="something to its logits that is not known"):
        parts.trainer(tmp_path, loss=HALF, **models).train()
    models = {"model": student(), "teacher_model": teacher()} | {side: models[side]}
    parts.trainer(tmp_path, loss=HALF, check=False, **models).train()


def t5() -> Any:
    return T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))


SHARED = student()


def loss(s: Tensor, t: Tensor) -> Tensor:
    return (s - t).square().sum(1)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no teacher": ({"teacher_model": None}, "expected a teacher_model for DistillLoss"),
    "teacher and top k": ({"loss": TopKLoss()}, "expected no teacher_model"),
    "one model": ({"model": SHARED, "teacher_model": SHARED}, "apart from the model"),
    "encoder-decoder": ({"model": t5()}, "expected a decoder-only model"),
    "encoder-decoder teacher": ({"teacher_model": t5()}, "expected a decoder-only model"),
    "no model": ({"model": "a/name"}, "expected model to be a Module, got str"),
    "no module": ({"teacher_model": "a/name"}, "expected teacher_model to be a Module, got str"),
    "a name in the logs": ({"loss": DistillLoss([(loss, 2.0)])}, r"of other names than .'loss', .*, got 'loss'"),
    "unknown": ({"loss": "wasserstein"}, "one of .*'kl'.*got 'wasserstein'"),
    "no loss": ({"loss": 3.0}, "expected loss to be a DistillationLoss or a name, got float"),
    "columns": ({"train_dataset": Dataset.from_dict({"prompt": ["a"]})}, r"input_ids or text, got \['prompt'\]"),
    "evaluation": ({"eval_dataset": {"a": Dataset.from_dict({"prompt": ["a"]})}}, "input_ids or text"),
    "no tokenizer": ({"train_dataset": parts.texts()}, "expected a processing_class"),
    "not offline": ({"loss": TopKLoss(), "teacher_model": None}, "none of .'teacher_ids', 'teacher_logprobs'"),
    "offline text": (
        {"loss": TopKLoss(), "teacher_model": None, "train_dataset": parts.texts()},
        "expected a dataset with a column input_ids, got",
    ),
    "positions": (
        {"train_dataset": Dataset.from_dict({"input_ids": [[1, 2]], "position_ids": [[0, 1]]})},
        r"expected a data_collator for the columns \['position_ids'\]",
    ),
    "schedule": ({"schedule": {"t": float}}, "expected schedule to name numbers of DistillLoss.* got 't'"),
    "schedule of a value": ({"schedule": {"temperature": 2.0}}, "expected a function of progress"),
    "schedule of an option": (
        {"schedule": {"ignore_index": float}},
        "expected schedule to name numbers of DistillLoss",
    ),
    "schedule of a list": ({"schedule": ["temperature"]}, "expected schedule to be a dict of functions"),
    "schedule of a bucket": (
        {
            "loss": TopKLoss(),
            "teacher_model": None,
            "train_dataset": Dataset.from_dict({}),
            "schedule": {"temperature": float},
        },
        'no schedule for the temperature with tail="bucket"',
    ),
    "a teacher later": (
        {
            "loss": KLDivLoss(weight_hard=1.0, weight_soft=0.0),
            "teacher_model": None,
            "schedule": {"weight_soft": float},
        },
        "expected a teacher_model for KLDivLoss",
    ),
    "vocabularies": (
        {"loss": KLDivLoss(vocabulary="refuse"), "teacher_model": teacher(vocab_size=80)},
        "expected vocabularies of one size, got 64",
    ),
    "max_length": ({"max_length": 1}, "expected max_length to be an integer of 2 or more"),
    "a string's letters": ({"report": "entropy"}, r"got \['entropy'\]"),
    "report": ({"report": ("entropy",)}, "expected report of DistillLoss among"),
    "report of an absent teacher": (
        {"loss": TopKLoss(), "teacher_model": None, "report": ("teacher_agreement",)},
        "expected report of TopKLoss among",
    ),
    "ignore_index": ({"loss": JSDLoss(ignore_index=0)}, "ignore_index=-100"),
    "pictures": (
        {"train_dataset": Dataset.from_dict({"input_ids": [[1, 2]], "images": [["a"]]})},
        r"expected a data_collator for the columns \['images'\]",
    ),
    "a mask for another collator": (
        {
            "train_dataset": Dataset.from_dict({"input_ids": [[1, 2]], "completion_mask": [[0, 1]]}),
            "data_collator": DataCollatorWithFlattening(),
        },
        r"expected a column labels, got \['completion_mask'\], which only the default",
    ),
    "flattened without positions": (
        {"data_collator": DataCollatorWithFlattening(return_position_ids=False)},
        "return_position_ids=True",
    ),
    "smoothing": ({"args": {"label_smoothing_factor": 0.1}}, "label_smoothing_factor=0"),
    "another loss": ({"compute_loss_func": print}, "no compute_loss_func"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str, tmp_path: Path) -> None:
    options, message = REFUSED[name]
    with pytest.raises((TypeError, ValueError), match=message):
        parts.trainer(tmp_path, **options)


def test_arguments_that_are_none(tmp_path: Path) -> None:
    none: Any = {}
    with pytest.raises(TypeError, match="expected args to be TrainingArguments, got dict"):
        DistillTrainer(student(), teacher(), args=none)


def test_settings_of_trls_configs(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    args = trl.SFTConfig(str(tmp_path), packing=True, bf16=False, use_cpu=True, report_to="none")
    with pytest.warns(UserWarning, match=r"of SFTConfig not packing=True$"):
        DistillTrainer(student(), teacher(), HALF, args, train_dataset=tokens())


def test_batches_without_what_is_needed(tmp_path: Path) -> None:
    trainer = parts.trainer(tmp_path, loss=HALF)
    ids = {"input_ids": torch.tensor([[5, 6, 7]])}
    with pytest.raises(ValueError, match="expected labels in what data_collator returns"):
        trainer.compute_loss(trainer.model, ids)
    trainer = parts.trainer(tmp_path, loss=TopKLoss(compiled=False), teacher_model=None, train_dataset=offline())
    with pytest.raises(ValueError, match=r"expected \['teacher_ids', 'teacher_logprobs'\] in what"):
        trainer.compute_loss(trainer.model, ids | {"labels": ids["input_ids"]})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"input_ids": [3, 4], "labels": [3, 4]}, {"input_ids": [3, 4], "labels": None}],
            "rows with the same columns",
        ),
        ([{"input_ids": [3.5, 4.0]}], "expected input_ids of one integer or more"),
        ([{"input_ids": []}], "expected input_ids of one integer or more"),
        ([{"input_ids": [3, 4], "labels": 3}], "expected labels of 2 tokens"),
        ([{"input_ids": [3, 4], "attention_mask": [1]}], "expected attention_mask of 2 tokens"),
        ([{"text": "words"}], "text is tokenised in a datasets.Dataset"),
    ],
)
def test_rows_that_make_no_batch(rows, message) -> None:
    with pytest.raises(ValueError, match=message):
        DistillCollator()(rows)


def test_masks_of_what_to_learn() -> None:
    rows = [{"input_ids": [3, 4, 5, 6], "completion_mask": [0, 0, 1, 1]}, {"input_ids": [7], "completion_mask": [1]}]
    batch = DistillCollator()(rows)
    assert batch["labels"].tolist() == [[-100, -100, 5, 6], [7, -100, -100, -100]]
    assert "completion_mask" not in batch


def test_sequences_of_one_token(tmp_path: Path) -> None:
    """A text may be that short; a batch of such has nothing to predict, and no loss."""
    rows = Dataset.from_dict(
        {"input_ids": [[3], [3, 4, 5], [4], [7, 8]], "completion_mask": [[1], [0, 1, 1], [1], [0, 1]]}
    )
    trainer = parts.trainer(tmp_path, loss=HALF, train_dataset=rows, args={"per_device_train_batch_size": 1})
    assert math.isfinite(trainer.train().training_loss)


@pytest.mark.parametrize("check", [True, False])
def test_ids_that_a_model_does_not_have(check: bool, tmp_path: Path) -> None:
    rows = Dataset.from_dict({"input_ids": [[3, 65, 5]]})
    trainer = parts.trainer(tmp_path, loss=HALF, model=student(vocab_size=67), train_dataset=rows, check=check)
    with pytest.raises(ValueError, match="expected input_ids below 64, the embeddings of the teacher_model, got 65"):
        trainer.train()


def test_the_package_finds_it_when_asked() -> None:
    code = (
        "import sys, distill; light = 'transformers' not in sys.modules\n"
        "from distill import DistillTrainer; from distill.trainer import DistillTrainer as same\n"
        "print(light and DistillTrainer is same is distill.DistillTrainer)"
    )
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "True"
    assert issubclass(DistillTrainer, parts.Trainer)
