"""ChunkedDistillationTrainer beside TRL's: one seed, the same steps, the same losses, weights and logs."""

from __future__ import annotations

import copy
import functools
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

pytest.importorskip("trl")
pytest.importorskip("peft")

import on_policy_parts
import peft
import trainer_parts as parts
from datasets import Dataset
from on_policy_parts import PLAIN, make, prompts, trained
from processes import Outcomes, asked, assert_passed, run_checks, spawn
from trainer_parts import assert_same_training, logged
from transformers import MixtralConfig, MixtralForCausalLM
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDTrainer

from distill import (
    DIVERGENCES,
    AlphaBetaLoss,
    DistillLoss,
    JSDLoss,
    KLDivLoss,
    LogitMSELoss,
    ReverseKLLoss,
    TopKLoss,
)
from distill.trl import ChunkedDistillationTrainer, ChunkedGKDTrainer

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore::FutureWarning:trl"),
    pytest.mark.filterwarnings("ignore:.*deprecated and will be removed:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]
SIBLINGS = Path(__file__).parent.parent / "alignment"
TIMES = ("runtime", "per_second", "step_time", "train_loss")
OURS = ("jsd", "teacher_agreement")


# --- the same training -----------------------------------------------------------------------------------------------


def assert_same(folder: Path, tolerance: float = 2e-6, **options: Any) -> Any:
    """Steps, weights, and every number that TRL logs."""
    theirs, ours = (
        trained(cls, folder, **copy.deepcopy(options)) for cls in (DistillationTrainer, ChunkedDistillationTrainer)
    )
    assert_same_training(ours, theirs, tolerance)
    for said, found in zip(theirs.state.log_history, ours.state.log_history, strict=True):
        assert said.keys() <= found.keys()
        for name in said:
            if not name.endswith(TIMES):
                assert found[name] == pytest.approx(said[name], rel=10 * tolerance, abs=tolerance), name
    return ours


def test_trains_like_trl(tmp_path: Path) -> None:
    ours = assert_same(tmp_path, eval_dataset=prompts(6, 1), args={"eval_strategy": "steps", "eval_steps": 2})
    for prefix in ("", "eval_"):
        for name in (*OURS, "entropy"):
            assert len(logged(ours, prefix + name)) == (1 if prefix else 2)
        assert not logged(ours, prefix + "tempered_entropy")
    assert logged(ours, "jsd") == pytest.approx(logged(ours), rel=1e-6)


EOS = {"suppress_tokens": [1]}  # no completion ends, so that micro-batches have as many tokens as each other


@pytest.mark.slow
@pytest.mark.parametrize(
    "args",
    [
        {"beta": 0.5, "temperature": 0.7, "gradient_accumulation_steps": 2, "generation_kwargs": EOS},
        {"beta": 0.0},
        {"beta": 1.0, "temperature": 0.7},
        {"beta": 0.0, "temperature": 1.5, "gradient_accumulation_steps": 2, "generation_kwargs": EOS},
        {"gradient_checkpointing": True, "beta": 0.5},
        {"top_k": 5, "repetition_penalty": 1.2, "min_p": 0.01},
        {"pad_to_multiple_of": 8},
        {"use_liger_kernel": True, "liger_kernel_config": {"rope": False, "rms_norm": False, "swiglu": False}},
    ],
    ids=str,
)
def test_trains_like_trl_with(args: dict[str, Any], tmp_path: Path) -> None:
    if "use_liger_kernel" in args:
        pytest.importorskip("liger_kernel")
        args = args | {"liger_kernel_config": args["liger_kernel_config"] | {"fused_linear_cross_entropy": False}}
    assert_same(tmp_path, args=args)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adapter", "autocast", "chat"])
def test_trains_like_trl_as(kind: str, tmp_path: Path) -> None:
    if kind == "adapter":
        config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=4, task_type="CAUSAL_LM")
        assert_same(tmp_path, peft_config=config)
    elif kind == "autocast":
        ours = assert_same(tmp_path, 2e-2, args={"bf16": True})
        assert ours.model._original_forward is not None  # accelerate has wrapped what we attached to
    else:
        data = prompts().map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})
        assert_same(tmp_path, train_dataset=data)


# --- the loss of a batch ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make(ChunkedDistillationTrainer, tmp_path_factory.mktemp("trainer"), torch.float64)


def batch() -> dict[str, Tensor]:
    """Prompts padded on the left, completions on the right, a tool's answer within one."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 63, (3, 9), generator=draw)
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[0, :2] = mask[1, 7:] = 0
    tool = torch.ones(3, 5, dtype=torch.long)
    tool[2, 1:3] = 0
    return {
        "prompt_ids": ids[:, :4],
        "completion_ids": ids[:, 4:],
        "prompt_mask": mask[:, :4],
        "completion_mask": mask[:, 4:],
        "tool_mask": tool,
        "num_items_in_batch": torch.tensor(23),
    }


def whole(given: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """What models read, and labels of the completions alone."""
    ids, mask = (
        torch.cat([given[f"{side}_{name}"] for side in ("prompt", "completion")], 1) for name in ("ids", "mask")
    )
    used = torch.cat([torch.zeros_like(given["prompt_ids"]), given["completion_mask"] * given["tool_mask"]], 1)
    return {"input_ids": ids, "attention_mask": mask}, ids.masked_fill(used == 0, -100)


def logits_of(trainer: Any, read: dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        taught = trainer.teacher_model(**read).logits[:, :-1]
    return [trainer.model(**read).logits[:, :-1], taught]


def gradients(trainer: Any, loss: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, [p for p in trainer.model.parameters() if p.requires_grad])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_the_loss_of_a_batch(beta: float, temperature: float, trainer: Any) -> None:
    trainer.beta, trainer.temperature = beta, temperature
    trainer.model.train()
    given = batch()
    read, labels = whole(given)
    options = {"labels": labels[:, 1:], "beta": beta, "temperature": temperature, "reduction": "sum"}
    expected = GKDTrainer.generalized_jsd_loss(*logits_of(trainer, read), **options) / 23
    loss = trainer.compute_loss(trainer.model, given)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    theirs = DistillationTrainer.compute_loss(trainer, trainer.model, given)  # in float32
    torch.testing.assert_close(loss.float(), theirs.float(), rtol=1e-5, atol=1e-6)
    for ours, wanted in zip(gradients(trainer, loss), gradients(trainer, expected), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-12)
    trainer.beta, trainer.temperature = 1.0, 1.0


def test_an_evaluation_is_the_mean_of_a_batch(trainer: Any) -> None:
    trainer.model.eval()
    given = batch()
    read, labels = whole(given)
    expected = GKDTrainer.generalized_jsd_loss(*logits_of(trainer, read), labels=labels[:, 1:], beta=1.0)
    loss, outputs = trainer.compute_loss(trainer.model, given, return_outputs=True)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(outputs.logits, trainer.model(**read).logits)
    with pytest.raises(ValueError, match=r"got also \['labels'\], which nothing reads"):
        trainer.compute_loss(trainer.model, {**given, "labels": labels})


def test_evaluations_of_several_datasets(trainer: Any) -> None:
    found = trainer.evaluate({"x": prompts(3, 1), "y": prompts(2, 2)})
    for data in "xy":
        assert found[f"eval_{data}_jsd"] == pytest.approx(found[f"eval_{data}_loss"], rel=1e-6)
        assert found[f"eval_{data}_entropy"] > 0
    assert found["eval_x_jsd"] != found["eval_y_jsd"] and "eval_entropy" not in found


def test_a_batch_of_a_tools_words_alone(trainer: Any) -> None:
    trainer.model.train()
    given = batch() | {"tool_mask": torch.zeros(3, 5, dtype=torch.long), "num_items_in_batch": torch.tensor(0)}
    loss = trainer.compute_loss(trainer.model, given)
    assert loss.item() == 0 and all(not g.any() for g in gradients(trainer, loss))


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.filterwarnings("ignore:.*order of token ids:UserWarning")
def test_every_divergence(name: str, trainer: Any) -> None:
    kept = trainer.loss
    trainer.loss = loss = DistillLoss([(name, 1.0)], temperature=1.5, **PLAIN)
    trainer.model.eval()
    read, labels = whole(batch())
    sides: list[Any] = []
    for model in (trainer.model, trainer.teacher_model):
        sides += [model.model(**read).last_hidden_state[:, :-1], model.lm_head.weight]
    expected = loss(sides[0], sides[1], sides[2].detach(), sides[3], target=labels[:, 1:]).loss
    found = trainer.compute_loss(trainer.model, batch())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    for ours, wanted in zip(gradients(trainer, found), gradients(trainer, expected), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-8, atol=1e-11)
    trainer.loss = kept


@pytest.mark.slow
@pytest.mark.parametrize("name", DIVERGENCES)
def test_every_divergence_trains(name: str, tmp_path: Path) -> None:
    made = make(ChunkedDistillationTrainer, tmp_path, loss=DistillLoss([(name, 1.0)], **PLAIN))
    before = copy.deepcopy(made.model.state_dict())
    made.train()
    assert len(logged(made, name)) == 2 and logged(made, name) == pytest.approx(logged(made), rel=1e-5)
    assert any(not torch.equal(p, before[key]) for key, p in made.model.state_dict().items())


# --- the models ------------------------------------------------------------------------------------------------------

ADAPTERS: dict[str, peft.PeftConfig] = {
    "lora": peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "lm_head"]),
    "dora": peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "lm_head"], use_dora=True),
    "in whole": peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "virtual tokens": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_on_the_head_and_before_the_text(kind: str, tmp_path: Path) -> None:
    config = copy.deepcopy(ADAPTERS[kind])
    made = make(ChunkedDistillationTrainer, tmp_path, torch.float64, peft_config=config, args={"beta": 0.5})
    learning = {name: p for name, p in made.model.named_parameters() if p.requires_grad}
    for p in learning.values():  # some begin at zero
        p.data = p.data.double() + 0.1 * torch.randn(p.shape, dtype=torch.float64)
    made.model.eval()
    read, labels = whole(batch())
    logits = [z[:, -labels[:, 1:].shape[1] :] for z in logits_of(made, read)]  # behind virtual tokens
    expected = GKDTrainer.generalized_jsd_loss(*logits, labels=labels[:, 1:], beta=0.5)
    loss = made.compute_loss(made.model, batch())
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    for name, ours, wanted in zip(learning, gradients(made, loss), gradients(made, expected), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
    assert any(("lm_head" if isinstance(config, peft.LoraConfig) else "prompt") in name for name in learning)
    made.train()  # it generates, too


def test_a_mixture_of_experts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = parts.SIZES | {"num_key_value_heads": 2, "num_local_experts": 4, "eos_token_id": 1, "pad_token_id": 0}
    config = MixtralConfig(vocab_size=64, output_router_logits=True, router_aux_loss_coef=0.5, **sizes)
    model = parts.sharpened(MixtralForCausalLM(config), torch.float32)
    args = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_steps": 1, "eval_strategy": "no"}
    made = trained(ChunkedDistillationTrainer, tmp_path, model=model, eval_dataset=prompts(3, 1), args=args)
    assert logged(made)[0] - logged(made, "jsd")[0] == pytest.approx(0.5 * logged(made, "aux_loss")[0], rel=1e-4)
    assert made.evaluate()["eval_aux_loss"] > 0


@pytest.mark.filterwarnings("ignore:.*compared on their first 64:UserWarning")
@pytest.mark.parametrize("rows", [(80, 64), (64, 80)])
def test_padded_vocabularies(rows: tuple[int, int], tmp_path: Path) -> None:
    model, teacher = (make(torch.float32, vocab_size=n) for make, n in zip((parts.student, parts.teacher), rows))
    with torch.no_grad():
        model.lm_head.weight[64:] += 30  # would be generated
    given = {"model": model, "teacher_model": teacher}
    with pytest.raises(ValueError, match=rf"got {rows[0]} \(student\) and {rows[1]} .*'vocabulary': 'cut'"):
        make(ChunkedDistillationTrainer, tmp_path, **given)
    assert type(teacher.config.vocab_size) is int
    args = {"max_completion_length": 20, "beta": 0.5, "generation_kwargs": {"suppress_tokens": [7]}}
    made = make(ChunkedDistillationTrainer, tmp_path, **given, loss_options=PLAIN | {"vocabulary": "cut"}, args=args)
    generated = made._prepare_inputs(next(iter(made.get_train_dataloader())))["completion_ids"]
    assert generated.max() < 64 and 7 not in generated
    made.model.eval()
    read, labels = whole(batch())
    logits = [z[..., :64] for z in logits_of(made, read)]
    expected = GKDTrainer.generalized_jsd_loss(*logits, labels=labels[:, 1:], beta=0.5)
    torch.testing.assert_close(made.compute_loss(made.model, batch()), expected)
    made.use_vllm = True
    if rows[0] > rows[1]:
        with pytest.raises(ValueError, match="expected use_vllm=False for a student of 80 ids and a teacher of 64"):
            made.share_ids(*rows)
    else:
        made.share_ids(*rows)


@pytest.mark.parametrize("side", ["model", "teacher_model"])
@pytest.mark.filterwarnings("ignore:expected vocabularies of about one size:UserWarning")
def test_prompts_beyond_the_embeddings(side: str, tmp_path: Path) -> None:
    few = {side: parts.student(torch.float32, seed=1, vocab_size=8)}
    made = make(ChunkedDistillationTrainer, tmp_path, loss_options={"vocabulary": "cut"}, **few)
    with pytest.raises(ValueError, match=f"expected input_ids below 8, the embeddings of the {side}"):
        made.train()


@pytest.mark.parametrize("given", [None, {"dtype": "float64"}, {"attn_implementation": "eager"}], ids=str)
def test_a_teacher_by_name(given: dict[str, Any] | None, tmp_path: Path) -> None:
    name = str(tmp_path / "teacher")
    parts.teacher(torch.float32).save_pretrained(name)
    args = {"teacher_model_init_kwargs": given, "teacher_model_name_or_path": name, "teacher_model_revision": "main"}
    options = {"train_dataset": prompts(), "processing_class": parts.tokenizer()}
    settings = on_policy_parts.arguments(tmp_path, **args)
    for _ in range(2):  # args can be used again
        made = ChunkedDistillationTrainer(parts.student(torch.float32), None, settings, **options)
        assert settings.teacher_model_init_kwargs == given
    theirs = DistillationTrainer(parts.student(torch.float32), name, settings, **options)
    torch.testing.assert_close(made.teacher_model.state_dict(), theirs.teacher_model.state_dict())
    for ours, expected in zip(made.teacher_model.parameters(), theirs.teacher_model.parameters(), strict=True):
        assert ours.dtype == expected.dtype
    attention = "_attn_implementation"
    assert getattr(made.teacher_model.config, attention) == getattr(theirs.teacher_model.config, attention)


def test_without_args(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    on_a_cpu = functools.partial(DistillationConfig, use_cpu=True, bf16=False)  # the default wants a GPU
    for module in ("distill.trl.distillation", "trl.trainer.distillation_trainer"):
        monkeypatch.setattr(sys.modules[module], "DistillationConfig", on_a_cpu)
    options = {"train_dataset": prompts(), "processing_class": parts.tokenizer()}
    made, theirs = (
        cls(parts.student(), parts.teacher(), **options) for cls in (ChunkedDistillationTrainer, DistillationTrainer)
    )
    assert made.args.output_dir == theirs.args.output_dir
    assert isinstance(made.loss, JSDLoss) and (made.loss.beta, made.loss.temperature) == (1.0, 1.0)


def test_a_trainer_that_trl_drops_takes_no_other_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import distill.trl

    assert sorted(distill.trl.HOMES) == sorted(distill.trl.__all__) and set(distill.trl.HOMES) < set(dir(distill.trl))
    monkeypatch.delitem(sys.modules, "distill.trl.gkd", raising=False)
    monkeypatch.setitem(sys.modules, "trl.experimental.gkd", None)
    with pytest.raises(
        ImportError, match=r"expected trl 1\.16\.x and what it needs for ChunkedGKDTrainer .*, got trl 1"
    ):
        distill.trl.ChunkedGKDTrainer  # noqa: B018
    assert distill.trl.ChunkedDistillationTrainer is ChunkedDistillationTrainer
    with pytest.raises(AttributeError, match="has no attribute 'ChunkedOtherTrainer'"):
        distill.trl.ChunkedOtherTrainer  # noqa: B018


def with_pictures() -> dict[str, Any]:
    sys.path.append(str(SIBLINGS))
    pytest.importorskip("PIL")
    import trl_vision

    rows = [
        {"images": [trl_vision.picture(n)], "prompt": trl_vision.said("user", row["prompt"])}
        for n, row in enumerate(prompts(8))
    ]
    options = {"train_dataset": Dataset.from_list(rows), "processing_class": trl_vision.processor()}
    teacher = trl_vision.model()
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    return options | {"model": trl_vision.model(), "teacher_model": teacher}


@pytest.mark.slow
@pytest.mark.parametrize("accumulated", [1, 2])
def test_pictures(accumulated: int, tmp_path: Path) -> None:
    args = {"gradient_accumulation_steps": accumulated, "per_device_train_batch_size": 4 // accumulated, "beta": 0.5}
    eos = {"suppress_tokens": [1, 63]}
    assert_same(tmp_path, **with_pictures(), args=args | {"generation_kwargs": eos})


# --- a run -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_resumed_run(accumulated: int, tmp_path: Path) -> None:
    args = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": accumulated}
    options = {"train_dataset": prompts(24), "args": args}  # an epoch: TRL's sampler begins anew in a later one
    runs = [
        make(ChunkedDistillationTrainer, tmp_path / name, torch.float64, **options) for name in ("whole", "resumed")
    ]
    runs[0].train()
    runs[1].train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    torch.testing.assert_close(runs[1].model.state_dict(), runs[0].model.state_dict())
    for name in ("loss", *OURS, "entropy"):
        assert logged(runs[1], name) == logged(runs[0], name)  # the first two from the checkpoint


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(on_policy_parts.run, on_policy_parts.WORLD, port, str(tmp_path))
    alone = on_policy_parts.greedy(tmp_path, ChunkedDistillationTrainer, torch.float64)
    names = ["loss", "grad_norm", *OURS, "entropy"]
    for rank in range(on_policy_parts.WORLD):
        for split, found in torch.load(tmp_path / f"rank-{rank}.pt").items():
            exact = split != "trl"
            close = {"rtol": 1e-9, "atol": 1e-11} if exact else {"rtol": 1e-4, "atol": 1e-5}
            for name, value in alone["weights"].items():
                torch.testing.assert_close(found["weights"][name], value.to(found["weights"][name]), **close)
            for theirs, ours in zip(alone["logs"][:2], found["logs"][:2], strict=True):
                for name in names if exact else ("loss", "grad_norm", "entropy"):
                    assert ours[name] == pytest.approx(theirs[name], rel=1e-6 if exact else 1e-4), (rank, split, name)
            for name in [f"eval_{name}" for name in (*OURS, "entropy")] if exact else ():
                assert found["evaluated"][name] == pytest.approx(alone["evaluated"][name], rel=1e-6), (rank, name)


# --- settings --------------------------------------------------------------------------------------------------------


def entropy(s: Tensor, t: Tensor) -> Tensor:
    return (s - t).square().sum(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": TopKLoss()}, "expected a loss with a teacher, got TopKLoss"),
        ({"loss": "jsd"}, "expected loss to be a DistillationLoss, got str"),
        ({"loss": KLDivLoss(), "loss_options": PLAIN}, "got both"),
        ({"loss": KLDivLoss(), "args": {"beta": 0.1}}, "a loss with args.beta=0.1, got KLDivLoss: say it in one"),
        ({"loss": JSDLoss(beta=0.3), "args": {"beta": 0.1}}, r"args.beta=0.1, got JSDLoss\(beta=0.3\)"),
        (
            {"loss": LogitMSELoss(), "args": {"temperature": 0.7}},
            r"temperature=0.7, got LogitMSELoss\(temperature=1.0\)",
        ),
        ({"loss_options": {"temperature": 2.0}, "args": {"temperature": 0.7}}, r"got JSDLoss\(temperature=2.0\)"),
        ({"loss": DistillLoss([("ce", 0.5), ("kl", 0.5)])}, "expected a loss with weight_hard=0"),
        ({"loss_options": {"weight_soft": 0.0}}, "expected a loss with weight_hard=0 .*, got 0.0 and 0.0 of JSDLoss"),
        ({"report": ("kl",)}, "expected report of JSDLoss among"),
        ({"loss": DistillLoss([(entropy, 1.0)])}, "of other names than .*, got 'entropy'"),
        (
            {"args": {"use_liger_kernel": True, "liger_kernel_config": {"fused_linear_cross_entropy": True}}},
            "fused_linear_cross_entropy",
        ),
        ({"args": {"teacher_model_init_kwargs": {"dtype": "float32"}}}, "already instantiated"),
    ],
    ids=str,
)
def test_refusals(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        make(ChunkedDistillationTrainer, tmp_path, **options)


def test_other_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a teacher_model, got None"):
        ChunkedDistillationTrainer(parts.student(), args=on_policy_parts.arguments(tmp_path))
    prefix = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="Prompt-learning"):
        make(ChunkedDistillationTrainer, tmp_path, peft_config=prefix)
    with pytest.raises(TypeError, match="expected args to be a DistillationConfig, got TrainingArguments"):
        ChunkedDistillationTrainer(parts.student(), parts.teacher(), parts.arguments(tmp_path))

    class Mine(ChunkedDistillationTrainer):
        def _compute_loss(self, *given: Any) -> Any:
            raise NotImplementedError

    with pytest.raises(TypeError, match=r"expected no _compute_loss of Mine: .* Give loss="):
        make(Mine, tmp_path)


MODELS = parts.student(torch.float32), parts.teacher(torch.float32)
LORA = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"])


@pytest.mark.parametrize("cls", [ChunkedDistillationTrainer, ChunkedGKDTrainer])
@pytest.mark.parametrize(
    ("models", "message"),
    [
        ((None, MODELS[1]), "expected model to be a causal language model or its name, got None"),
        ((MODELS[0].model, MODELS[1]), "expected model to be .*, got LlamaModel, which has no LM head"),
        ((MODELS[0], MODELS[1].model), "expected teacher_model to be .*, got LlamaModel, which has no LM head"),
        ((MODELS[0], parts.tokenizer()), "expected teacher_model to be .*, got [A-Z]"),
        ((MODELS[0], Path("teacher")), "expected teacher_model to be .*, got [A-Z]"),
        ((MODELS[0], MODELS[0]), "expected a teacher_model apart from the model"),
    ],
    ids=str,
)
def test_models_that_are_none(cls: type, models: tuple[Any, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        cls(*models)


def test_a_teacher_that_would_get_the_adapters(tmp_path: Path) -> None:
    base = parts.student(torch.float32)
    shares = parts.student(torch.float32)
    shares.model = base.model
    with pytest.raises(ValueError, match="expected a teacher_model apart from the model"):
        make(ChunkedDistillationTrainer, tmp_path, model=base, teacher_model=shares, peft_config=copy.deepcopy(LORA))


def test_two_teachers(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="nothing reads args.teacher_model_name_or_path='other'") as caught:
        make(ChunkedDistillationTrainer, tmp_path, args={"teacher_model_name_or_path": "other"})
    assert on_policy_parts.__file__ in {w.filename for w in caught if "name_or_path" in str(w.message)}
    teacher = parts.teacher(torch.float32)
    teacher.config.name_or_path = teacher.name_or_path = "other"  # loaded by that name
    make(ChunkedDistillationTrainer, tmp_path, teacher_model=teacher, args={"teacher_model_name_or_path": "other"})


def test_a_trainer_s_numbers_are_its_loss_s(tmp_path: Path) -> None:
    made = make(ChunkedDistillationTrainer, tmp_path, loss=JSDLoss(beta=0.4, temperature=2.0, **PLAIN))
    assert (made.beta, made.temperature, made.generation_config.temperature) == (0.4, 2.0, 1.0)
    made.beta *= 0.5
    assert made.loss.beta == 0.2


def test_numbers_set_later(tmp_path: Path) -> None:
    loss = AlphaBetaLoss(0.3, 0.6, temperature=2.0, **PLAIN)
    made = make(ChunkedDistillationTrainer, tmp_path, loss=loss, args={"generation_kwargs": {"temperature": 0.5}})
    assert made.generation_config.temperature == 0.5 and loss.temperature == 2.0
    made.temperature = 3.0
    assert loss.temperature == 3.0 and made.generation_config.temperature == 0.5
    with pytest.raises(AttributeError, match=r"expected no beta for AlphaBetaLoss, got 0\.1"):
        made.beta = 0.1
    made = make(ChunkedDistillationTrainer, tmp_path)
    made.beta = 1.5
    with pytest.raises(ValueError, match="expected beta"):
        made.train()


IN_VAIN: dict[str, Any] = {
    "label_smoothing_factor": 0.1,
    "train_sampling_strategy": "sequential",
    "vllm_mode": "server",
    "num_completions_to_print": 3,
    "log_unique_prompts": True,
    "max_tool_calling_iterations": 2,
    "teacher_model_revision": "main",
}


def test_settings_in_vain(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="nothing reads") as caught:
        make(ChunkedDistillationTrainer, tmp_path, args=IN_VAIN)
    (said,) = [str(w.message) for w in caught if "nothing reads" in str(w.message)]
    for name, value in IN_VAIN.items():
        assert f"{name}={value!r}" in said
    assert {w.filename for w in caught if "nothing reads" in str(w.message)} == {on_policy_parts.__file__}
    options = {"log_completions": True, "num_completions_to_print": 3, "log_unique_prompts": True}
    make(ChunkedDistillationTrainer, tmp_path, args=options)  # a warning would be an error


def test_what_is_reported(tmp_path: Path) -> None:
    made = trained(ChunkedDistillationTrainer, tmp_path, report=("student_entropy",), loss=ReverseKLLoss(2.0, **PLAIN))
    assert len(logged(made, "student_entropy")) == 2
    assert not logged(made, "entropy") and not logged(made, "teacher_agreement")


# --- FSDP2 -----------------------------------------------------------------------------------------------------------


def sharded_like(folder: Path, dtype: torch.dtype) -> Any:
    """Student and teacher are one, and completions follow from prompts."""
    sys.path.append(str(SIBLINGS))
    import trl_sharded

    models = {"model": parts.student(dtype), "teacher_model": parts.student(dtype)}
    args = trl_sharded.SETTINGS | on_policy_parts.GREEDY
    return make(ChunkedDistillationTrainer, folder, dtype, args=args | {"beta": 0.5}, **models)


def check_sharded(name: str, rank: int) -> None:
    sys.path.append(str(SIBLINGS))
    import trl_sharded

    trl_sharded.KINDS["on policy"] = sharded_like
    trl_sharded.LOGGED["on policy"] = {"jsd": 0.0, "teacher_agreement": 1.0}
    trl_sharded.check(name, rank)


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("precision", ["float64", "bfloat16"])
@pytest.mark.usefixtures("one_process")
def test_exact_where_fsdp2_casts_outputs(precision: str) -> None:
    check_sharded(f"on policy, {precision}", 0)


@pytest.fixture(scope="module")
def sharded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return run_checks(check_sharded, asked(request), 2, tmp_path_factory.mktemp("sharded"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["on policy, float64", "on policy, bfloat16"])
def test_exact_on_two_processes(name: str, sharded: Outcomes) -> None:
    assert_passed(name, sharded)
