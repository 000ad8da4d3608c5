"""ChunkedGKDTrainer beside TRL's: one seed, the same steps, the same losses and weights."""

from __future__ import annotations

import copy
import dataclasses
import random
from pathlib import Path
from types import SimpleNamespace
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
from transformers import DataCollatorWithFlattening, MixtralConfig, MixtralForCausalLM, TrainingArguments
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from distill import JSDLoss, KLDivLoss, TopKLoss
from distill.trl import ChunkedGKDTrainer
from distill.trl._base import _taught

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore::FutureWarning:trl"),
    pytest.mark.filterwarnings("ignore:.*deprecated and will be removed:FutureWarning"),
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
    options = {"train_dataset": chats(), "eval_dataset": chats(6, 1)} | options
    options.setdefault("processing_class", parts.tokenizer())
    return cls(args=args, **options)


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


@pytest.mark.slow
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
        {"neftune_noise_alpha": 5.0},
        {"use_liger_kernel": True, "liger_kernel_config": {"rope": False, "rms_norm": False, "swiglu": False}},
    ],
    ids=str,
)
def test_trains_like_trl(args: dict[str, Any], tmp_path: Path) -> None:
    if "use_liger_kernel" in args:
        pytest.importorskip("liger_kernel")
    ours = assert_same(tmp_path, args=args)
    for prefix in ("", "eval_"):
        for name in ("jsd", "student_entropy", "teacher_agreement"):
            assert len(logged(ours, prefix + name)) == (1 if prefix else 3)
    if args == {}:  # a step's tokens are one batch here
        assert logged(ours, "jsd") == pytest.approx(logged(ours), rel=1e-6)


def test_a_beta_set_later_counts_as_in_trl(tmp_path: Path) -> None:
    losses = []
    for cls in (GKDTrainer, ChunkedGKDTrainer):
        trainer = make(cls, tmp_path)
        trainer.beta = 0.1
        trainer.train()
        losses.append(logged(trainer))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    trainer = make(ChunkedGKDTrainer, tmp_path, loss=KLDivLoss(**PLAIN))
    with pytest.raises(AttributeError, match=r"expected no beta for KLDivLoss, got 0\.1"):
        trainer.beta = 0.1


def test_in_float64(tmp_path: Path) -> None:
    assert_same(tmp_path, 1e-10, dtype=torch.float64, args={"lmbda": 0.5})


def test_under_autocast(tmp_path: Path) -> None:
    ours = assert_same(tmp_path, 2e-3, args={"bf16": True, "lmbda": 0.5})
    assert ours.model._original_forward is not None  # accelerate has wrapped what we attached to


def test_an_adapter(tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=4, task_type="CAUSAL_LM")
    ours = assert_same(tmp_path, peft_config=config, args={"lmbda": 0.5})
    assert any("lora" in name and p.requires_grad for name, p in ours.model.named_parameters())


HEADS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["q_proj", "lm_head"], "lora_dropout": 0.0},
    "dora": {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
    "bias": {"target_modules": ["q_proj", "lm_head"], "lora_bias": True},
    "in whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 9]},
}


@pytest.mark.parametrize("kind", HEADS)
def test_adapters_on_the_head(kind: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", **HEADS[kind])
    model = parts.student(tie_word_embeddings=kind == "tokens")
    trainer = make(ChunkedGKDTrainer, tmp_path, torch.float64, model=model, peft_config=config, args={"lmbda": 1.0})
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    for p in trained.values():  # some begin at zero
        p.data = p.data.double() + 0.1 * torch.randn(p.shape, dtype=torch.float64)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        taught = trainer.teacher_model(**trainer.model_inputs(batch)).logits[:, :-1]
    logits = trainer.model(**trainer.model_inputs(batch)).logits[:, :-1]
    expected = GKDTrainer.generalized_jsd_loss(logits, taught, batch["labels"][:, 1:], beta=0.5)
    loss = trainer.compute_loss(trainer.model, batch)
    torch.testing.assert_close(loss, expected)
    found, wanted = (torch.autograd.grad(x, [*trained.values()]) for x in (loss, expected))
    for name, ours, theirs in zip(trained, found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
    assert any("lm_head" in name or "embed" in name for name in trained)
    trainer.train()  # it generates, too


def test_a_mixture_of_experts(tmp_path: Path) -> None:
    def model() -> Any:
        torch.manual_seed(0)
        sizes = parts.SIZES | {"num_key_value_heads": 2, "num_local_experts": 4, "eos_token_id": 1, "pad_token_id": 0}
        return parts.sharpened(MixtralForCausalLM(MixtralConfig(vocab_size=64, **sizes)), torch.float32)

    with_it, without = (
        trained(ChunkedGKDTrainer, tmp_path, model=model(), args={"router_aux_loss_coef": x}) for x in (0.5, 0.0)
    )
    aux = torch.tensor(logged(with_it, "aux_loss"))
    assert len(aux) == 3 and not logged(without, "aux_loss") and len(logged(with_it, "eval_aux_loss")) == 1
    first = logged(with_it)[0] - logged(without)[0]
    assert first == pytest.approx(0.5 * aux[0].item(), rel=1e-4)


# --- vocabularies and teachers ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*compared on their first 64:UserWarning")
@pytest.mark.parametrize("rows", [(80, 64), (64, 80)])
@pytest.mark.parametrize("args", [{"lmbda": 1.0}, {"seq_kd": True}], ids=str)
def test_padded_vocabularies(args: dict[str, Any], rows: tuple[int, int], tmp_path: Path) -> None:
    model, teacher = (make(torch.float32, vocab_size=n) for make, n in zip((parts.student, parts.teacher), rows))
    given = {"loss_options": PLAIN | {"vocabulary": "cut"}} if "lmbda" in args else {"loss": JSDLoss(**PLAIN)}
    seen = []
    model.register_forward_pre_hook(lambda m, a, kw: seen.append(int(kw["input_ids"].max())), with_kwargs=True)
    options = {"model": model, "teacher_model": teacher, "args": args | {"max_new_tokens": 30}}
    trainer = trained(ChunkedGKDTrainer, tmp_path, **options, **given)
    assert max(seen) < 64 and (model.config.vocab_size, teacher.config.vocab_size) == rows
    assert type(teacher.config.vocab_size) is int
    batch = next(iter(trainer.get_eval_dataloader()))
    with torch.no_grad():
        logits = [m.eval()(**trainer.model_inputs(batch)).logits[:, :-1, :64] for m in (model, trainer.teacher_model)]
        expected = GKDTrainer.generalized_jsd_loss(*logits, batch["labels"][:, 1:])
        torch.testing.assert_close(trainer.compute_loss(model, batch), expected)
    with pytest.raises(ValueError, match=rf"got {rows[0]} \(student\) and {rows[1]} .*'vocabulary': 'cut'"):
        make(ChunkedGKDTrainer, tmp_path, model=model, teacher_model=teacher)
    assert type(teacher.config.vocab_size) is int


def test_sizes_are_those_of_the_text() -> None:
    text = SimpleNamespace(vocab_size=64)
    teacher = SimpleNamespace(config=SimpleNamespace(vocab_size=7, get_text_config=lambda: text))
    args = SimpleNamespace(teacher_model_init_kwargs={})
    with pytest.raises(ZeroDivisionError), _taught(args, teacher, load=lambda *_: None):
        ours = 80
        assert not ours != text.vocab_size and text.vocab_size == 64 and teacher.config.vocab_size == 7  # noqa: SIM202
        raise ZeroDivisionError
    assert type(text.vocab_size) is int


@pytest.mark.parametrize("given", [None, {}, {"dtype": torch.float64}, {"attn_implementation": "eager"}], ids=str)
def test_a_teacher_by_name(given: dict[str, Any] | None, tmp_path: Path) -> None:
    name = str(tmp_path / "teacher")
    parts.teacher(torch.float32, vocab_size=64 if given else 66).save_pretrained(name)
    args = {"teacher_model_init_kwargs": given, "teacher_model_name_or_path": name}
    options = {"vocabulary": "cut"} if not given else {}
    for _ in range(2):  # args can be used again
        trainer = make(ChunkedGKDTrainer, tmp_path, teacher_model=None, args=args, loss_options=PLAIN | options)
        assert trainer.args.teacher_model_init_kwargs == given
    config = trainer.teacher_model.config
    assert trainer.teacher_model.dtype == (given or {}).get("dtype", torch.float32)
    assert config._attn_implementation == (given or {}).get("attn_implementation", "sdpa")


def test_a_teacher_has_no_dropout(tmp_path: Path) -> None:
    trainer = make(ChunkedGKDTrainer, tmp_path, teacher_model=parts.teacher(torch.float32, attention_dropout=0.9))
    batch = next(iter(trainer.get_eval_dataloader()))
    losses = [trainer.compute_loss(trainer.model, batch).item()]
    trainer.teacher_model.train()
    assert trainer.compute_loss(trainer.model, batch).item() == losses[0]


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


# --- data and settings -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "collator",
    [
        DataCollatorForLanguageModeling(0, padding_free=True),
        DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True),
        pytest.param(DataCollatorForLanguageModeling(0, padding_free=True), id="packed"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_padding_free(collator: Any, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    data = parts.tokens()
    padded = trained(
        ChunkedGKDTrainer,
        tmp_path,
        torch.float64,
        train_dataset=data,
        data_collator=DataCollatorForLanguageModeling(0),
        eval_dataset=None,
        args={"eval_strategy": "no", "per_device_train_batch_size": 12},
    )
    options = {"train_dataset": data, "data_collator": collator, "eval_dataset": None}
    if "packed" in request.node.name:
        options["train_dataset"] = parts.in_pairs(data)
    args = {"eval_strategy": "no", "per_device_train_batch_size": 12}
    flat = trained(ChunkedGKDTrainer, tmp_path, torch.float64, args=args, **options)
    assert_same_training(flat, padded)
    with pytest.raises(ValueError, match=r"expected \['prompts', 'prompt_attention_mask'\] and no documents"):
        trained(ChunkedGKDTrainer, tmp_path, torch.float64, args=args | {"lmbda": 1.0}, **options)


def test_documents_and_columns_that_its_collator_leaves_out(tmp_path: Path) -> None:
    data = chats().map(lambda row: {"labels": 1, "tools": "[]"})
    with pytest.warns(UserWarning, match=r"leaves out the columns \['labels', 'tools'\]"):
        make(ChunkedGKDTrainer, tmp_path, train_dataset=data)
    data = chats().map(lambda row: {"seq_lengths": [1]})
    with pytest.raises(ValueError, match="expected a padding-free data_collator for a dataset with seq_lengths"):
        make(ChunkedGKDTrainer, tmp_path, train_dataset=data)
    packed = {"train_dataset": parts.in_pairs(parts.tokens()), "data_collator": DataCollatorWithFlattening()}
    with pytest.raises(ValueError, match="keeps the 8 documents of these rows apart"):
        trained(ChunkedGKDTrainer, tmp_path, **packed)
    trainer = make(ChunkedGKDTrainer, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    with pytest.raises(ValueError, match=r"got also \['pixel_values'\], which GKD does not read"):
        trainer.compute_loss(trainer.model, {**batch, "pixel_values": batch["labels"]})


IN_EFFECT = (
    *("temperature", "lmbda", "beta", "max_new_tokens", "seq_kd", "disable_dropout"),
    *("teacher_model_name_or_path", "teacher_model_init_kwargs", "router_aux_loss_coef"),
    # in TRL's constructor and its collator
    *("model_init_kwargs", "trust_remote_code", "chat_template_path", "eos_token", "max_length"),
    *("activation_offloading", "dataset_kwargs"),
)
REFUSED = {"padding_free": True}  # by TRL
WARNED: dict[str, Any] = {
    "dataset_text_field": "words",
    "dataset_num_proc": 2,
    "truncation_mode": "keep_end",
    "shuffle_dataset": True,
    "packing": True,
    "packing_strategy": "wrapped",
    "eval_packing": True,
    "pad_to_multiple_of": 8,
    "pad_token": "<eos>",
    "completion_only_loss": False,
    "assistant_only_loss": True,
    "loss_type": "dft",
}


def test_all_settings_of_gkd(tmp_path: Path) -> None:
    """None of its own is silent: what has no effect in TRL's GKD says so."""
    theirs = {f.name for f in dataclasses.fields(GKDConfig)} - {f.name for f in dataclasses.fields(TrainingArguments)}
    assert theirs == {*IN_EFFECT, *REFUSED, *WARNED}
    args = WARNED | {"label_smoothing_factor": 0.1}
    tokenizer = parts.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% generation %}{{ m['content'] }} {% endgeneration %}{% endfor %}"
    )
    with pytest.warns(UserWarning, match="GKD does not read") as caught:
        make(ChunkedGKDTrainer, tmp_path, args=args, formatting_func=str, processing_class=tokenizer)
    (said,) = [str(w.message) for w in caught if "GKD does not read" in str(w.message)]
    for name in (*args, "formatting_func"):
        assert f" {name}=" in said, name
    with pytest.raises(ValueError, match="not supported when using padding-free"):
        make(ChunkedGKDTrainer, tmp_path, args=REFUSED)


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
        ({"loss": KLDivLoss(), "args": {"beta": 0.1}}, "a loss with args.beta=0.1, got KLDivLoss:"),
        ({"loss": JSDLoss(beta=0.3), "args": {"beta": 0.1}}, r"args.beta=0.1, got JSDLoss\(beta=0.3\)"),
        ({"loss_options": {"beta": 0.3}, "args": {"beta": 0.1}}, r"args.beta=0.1, got JSDLoss\(beta=0.3\)"),
        (
            {"args": {"use_liger_kernel": True, "liger_kernel_config": {"fused_linear_cross_entropy": True}}},
            "fused_linear_cross_entropy",
        ),
        ({"teacher_model": None}, "expected a teacher_model, got None"),
        ({"loss_options": {"weight_hard": float("nan")}}, "expected weight_hard to be a finite number"),
        ({"report": ("kl",)}, "expected report of JSDLoss among"),
    ],
)
def test_refusals(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        make(ChunkedGKDTrainer, tmp_path, **options)


@pytest.mark.filterwarnings("ignore:expected vocabularies of about one size:UserWarning")
@pytest.mark.parametrize("args", [{"lmbda": 1.0}, {"lmbda": 0.0, "seq_kd": True}])
@pytest.mark.parametrize("side", ["model", "teacher_model"])
def test_prompts_beyond_the_embeddings_are_refused_before_generation(
    args: dict[str, Any], side: str, tmp_path: Path
) -> None:
    few = {side: parts.student(torch.float32, seed=1, vocab_size=8)}
    with pytest.raises(ValueError, match=f"expected input_ids below 8, the embeddings of the {side}"):
        trained(ChunkedGKDTrainer, tmp_path, args=args, loss_options={"vocabulary": "cut"}, **few)


def test_a_loss_of_a_subclass_that_nothing_calls(tmp_path: Path) -> None:
    class Mine(ChunkedGKDTrainer):
        @staticmethod
        def generalized_jsd_loss(*args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError

    with pytest.raises(TypeError, match=r"expected no generalized_jsd_loss of Mine: .* Give loss="):
        make(Mine, tmp_path)


def test_arguments_that_are_none() -> None:
    with pytest.raises(TypeError, match="expected args to be a GKDConfig, got NoneType"):
        ChunkedGKDTrainer(parts.student(), parts.teacher())
