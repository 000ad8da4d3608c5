"""ChunkedGRPOTrainer and ChunkedRLOOTrainer beside TRL's own: one seed, the same completions, logs and weights."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("peft")

import peft
import trl_parts as parts
from transformers import MixtralConfig, MixtralForCausalLM, TrainerCallback
from trl_zoo import TIMES, make, trained

from alignment import GRPOLoss, RLOOLoss
from chunked_embed import causal_lm

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore::FutureWarning:trl"),
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore:.*use_return_dict.*"),
]
BUT = (*TIMES, "step_time")


def saved(folder: Path) -> str:
    """A model on disk, from which TRL makes its reference."""
    path = folder / "model"
    if not path.exists():
        parts.model().save_pretrained(path)
        parts.tokenizer().save_pretrained(path)
    return str(path)


def both(kind: str, folder: Path, **options: Any) -> tuple[Any, Any]:
    """TRL's trainer and ours, trained. ``model``: makes one."""
    model = options.pop("model", None)
    policy = (lambda: saved(folder)) if options.get("args", {}).get("beta") and model is None else model or parts.model
    return tuple(
        trained(kind, ours, folder / str(ours), model=policy(), **copy.deepcopy(options)) for ours in (False, True)
    )  # type: ignore[return-value]


def assert_alike(theirs: Any, ours: Any, tolerance: float = 2e-5, but: tuple[str, ...] = ()) -> None:
    """All that TRL logs, and the weights."""
    assert len(theirs.state.log_history) == len(ours.state.log_history) >= 3
    for expected, found in zip(theirs.state.log_history, ours.state.log_history, strict=True):
        for name, value in expected.items():
            if not any(part in name for part in (*BUT, *but)):
                if value is None:  # of no sequence
                    assert found[name] is None, name
                    continue
                assert found[name] == pytest.approx(value, rel=tolerance, abs=tolerance, nan_ok=True), name
    for (name, p), q in zip(theirs.model.named_parameters(), ours.model.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


TWICE = {"num_iterations": 2, "beta": 0.1, "learning_rate": 0.1}
SEQUENCES = {"importance_sampling_level": "sequence"}
ENTROPY = {"use_adaptive_entropy": True, "entropy_coef_delta": 0.05, "entropy_target": 3.1, "entropy_coef_max": 0.2}
TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"]
CASES: list[tuple[str, dict[str, Any]]] = [
    ("grpo", TWICE | {"loss_type": "dapo", "gradient_accumulation_steps": 2, "entropy_coef": 0.1}),
    ("rloo", {"num_iterations": 2, "beta": 0.1, "learning_rate": 0.1, "gradient_accumulation_steps": 2}),
]
SLOW: list[tuple[str, dict[str, Any]]] = [
    ("grpo", ENTROPY | {"loss_type": "dapo", "gradient_accumulation_steps": 2, "max_steps": 4}),
    ("grpo", TWICE | SEQUENCES | {"loss_type": "grpo", "entropy_coef": 0.1}),
    ("grpo", TWICE | {"loss_type": "bnpo", "top_entropy_quantile": 0.4, "off_policy_mask_threshold": 0.01}),
    *(("grpo", TWICE | {"loss_type": kind}) for kind in TYPES),
    *(("grpo", {"loss_type": kind}) for kind in TYPES),
    *(("grpo", TWICE | SEQUENCES | {"loss_type": kind}) for kind in TYPES),
    *(("grpo", TWICE | {"loss_type": kind, "entropy_coef": 0.1}) for kind in TYPES),
    *(("grpo", {"loss_type": kind, "gradient_accumulation_steps": 2, "steps_per_generation": 4}) for kind in TYPES),
    ("grpo", TWICE | {"use_bias_correction_kl": True, "delta": 1.3}),
    ("grpo", TWICE | SEQUENCES | {"use_bias_correction_kl": True}),
    ("grpo", TWICE | {"off_policy_mask_threshold": 0.01}),
    ("grpo", TWICE | {"top_entropy_quantile": 0.4, "entropy_coef": 0.1}),
    ("grpo", ENTROPY | {"top_entropy_quantile": 0.5, "max_steps": 4}),
    ("grpo", ENTROPY | {"loss_type": "grpo", "entropy_target": 0.1}),
    ("grpo", TWICE | {"epsilon": 0.05, "epsilon_high": 0.4, "temperature": 0.7}),
    ("grpo", {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5, "beta": 0.1}),
    ("grpo", {"mask_truncated_completions": True, "scale_rewards": "batch"}),
    ("grpo", {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}),
    ("grpo", {"pad_to_multiple_of": 8}),
    ("rloo", {}),
    ("rloo", {"num_iterations": 3, "learning_rate": 0.1, "epsilon": 0.1, "epsilon_high": 0.3}),
    ("rloo", {"beta": 0.1, "normalize_advantages": True, "mask_truncated_completions": True}),
]


def named(case: tuple[str, dict[str, Any]]) -> str:
    kind, args = case
    return f"{kind}-" + "-".join(f"{name}={value}" for name, value in args.items())


@pytest.mark.parametrize(("kind", "args"), CASES, ids=map(named, CASES))
def test_trains_like_trl(kind: str, args: dict[str, Any], tmp_path: Path) -> None:
    assert_alike(*both(kind, tmp_path, args=args))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "args"), SLOW, ids=map(named, SLOW))
def test_trains_like_trl_in_other_ways(kind: str, args: dict[str, Any], tmp_path: Path) -> None:
    assert_alike(*both(kind, tmp_path, args=args))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_trains_like_trl_under_autocast(kind: str, tmp_path: Path) -> None:
    # One step: what is sampled next depends on the last digit.
    args = {"bf16": True, "max_steps": 1, "eval_strategy": "no"}
    assert_close = [trained(kind, ours, tmp_path, model=parts.model(), args=args) for ours in (False, True)]
    for p, q in zip(*(trainer.model.parameters() for trainer in assert_close), strict=True):
        torch.testing.assert_close(q, p, rtol=0.06, atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_trains_an_adapter_like_trl(kind: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=4, task_type="CAUSAL_LM")
    args = {"beta": 0.1, "num_iterations": 2}
    assert_alike(*both(kind, tmp_path, peft_config=config, args=args, model=parts.model))


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_an_adapter_on_the_head_is_trained(kind: str, tmp_path: Path) -> None:
    """TRL refuses it, since its log-probabilities would go past it."""
    config = peft.LoraConfig(target_modules=["q_proj", "lm_head"], r=4, init_lora_weights=False, lora_dropout=0.0)
    args = {"beta": 0.1, "max_steps": 2, "num_iterations": 2}
    trainer = trained(kind, True, tmp_path, model=parts.model(), peft_config=config, args=args)
    fresh = make(kind, True, tmp_path, model=parts.model(), peft_config=config, args=args)
    before = dict(fresh.model.named_parameters())
    moved = [name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])]
    assert sum("lm_head.lora" in name for name in moved) == 2
    if kind == "grpo":  # of another reference, since the adapter began elsewhere
        assert all(log["kl"] > 0.1 for log in trainer.state.log_history if "kl" in log)


EXPERTS = [("grpo", {"loss_type": "grpo"}), ("grpo", {"entropy_coef": 0.1}), ("rloo", {})]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "args"), EXPERTS, ids=map(named, EXPERTS))
def test_a_mixture_of_experts_has_its_auxiliary_loss(kind: str, args: dict[str, Any], tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}

    def model() -> Any:
        torch.manual_seed(0)
        config = MixtralConfig(vocab_size=64, num_key_value_heads=2, num_local_experts=4, pad_token_id=0, **sizes)
        config.router_aux_loss_coef = 0.5
        return MixtralForCausalLM(config)

    args = args | {"gradient_accumulation_steps": 2, "max_steps": 2}
    theirs, ours = both(kind, tmp_path, model=model, args=args)
    assert_alike(theirs, ours)
    assert "aux_loss" in ours.state.log_history[0]


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
def test_a_head_in_float32(bf16: bool, tmp_path: Path) -> None:
    args = {"cast_lm_head_to_fp32": True, "max_steps": 1, "bf16": bf16, "eval_strategy": "no", "beta": 0.1}

    def model() -> Any:
        return parts.model(torch.float32 if bf16 else torch.bfloat16)

    path = tmp_path / "model"
    model().save_pretrained(path)
    parts.tokenizer().save_pretrained(path)
    dtype = "float32" if bf16 else "bfloat16"
    args["model_init_kwargs"] = {"dtype": dtype}
    theirs, ours = (trained("grpo", ours, tmp_path, model=str(path), args=args) for ours in (False, True))
    assert ours.model.lm_head.weight.dtype == torch.float32
    for name in ("loss", "kl", "entropy"):
        expected, found = (trainer.state.log_history[0][name] for trainer in (theirs, ours))
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6), name
    torch.testing.assert_close(ours.model.lm_head.weight, theirs.model.lm_head.weight, rtol=1e-4, atol=1e-5)
    config = peft.LoraConfig(target_modules=["lm_head"], r=4)
    with pytest.raises(ValueError, match="cast_lm_head_to_fp32=False with an adapter"):
        make("grpo", True, tmp_path, model=parts.model(), peft_config=config, args=args | {"model_init_kwargs": None})


def test_resumes_as_it_was(tmp_path: Path) -> None:
    args = ENTROPY | {"save_strategy": "steps", "save_steps": 2, "max_steps": 3, "eval_strategy": "no"}
    whole = trained("grpo", True, tmp_path, model=parts.model(), args=args)
    resumed = make("grpo", True, tmp_path, model=parts.model(), args=args)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.entropy_coef == whole.entropy_coef == resumed.chunked_loss.entropy_coef != 0
    for p, q in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(p, q)


class Changes(TrainerCallback):
    """Numbers of a trainer that change while it trains."""

    def __init__(self) -> None:
        self.trainer: Any = None

    def on_step_end(self, args: Any, *_: Any, **__: Any) -> None:
        self.trainer.beta = 0.3
        self.trainer.epsilon_low = self.trainer.epsilon_high = 0.01
        args.delta = 1.02


def test_numbers_that_change_while_it_trains(tmp_path: Path) -> None:
    args = TWICE | {"loss_type": "grpo"}
    found = []
    for ours in (False, True):
        changes = Changes()
        trainer = make("grpo", ours, tmp_path, model=saved(tmp_path), args=args, callbacks=[changes])
        changes.trainer = trainer
        trainer.train()
        found.append(trainer)
    assert_alike(*found)
    assert found[1].chunked_loss.beta == 0.3 and found[1].chunked_loss.delta == 1.02


@pytest.mark.parametrize(
    ("args", "options", "name", "value"),
    [
        ({"loss_type": "dapo"}, {}, "max_completion_length", 4),  # TRL's own, where tools answer
        ({"loss_type": "sapo"}, {}, "epsilon_low", 0.1),
        ({"entropy_coef": 0.1}, {"loss_options": {"token_metrics": False, "compiled": False}}, "entropy_coef", 0.0),
    ],
)
def test_a_number_that_its_loss_does_not_read_may_change(
    args: dict[str, Any], options: dict[str, Any], name: str, value: Any, tmp_path: Path
) -> None:
    class Change(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            setattr(trainer, name, value)

    args = args | {"max_steps": 2, "eval_strategy": "no"}
    trainer = make("grpo", True, tmp_path, model=parts.model(), args=args, callbacks=[Change()], **options)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer.train()
    assert getattr(trainer, name) == value and trainer.state.global_step == 2
    assert any(f"{name}={value!r} has no effect" in str(one.message) for one in told) is (name == "epsilon_low")


def test_numbers_begin_as_the_losss(tmp_path: Path) -> None:
    """A callback may multiply what it finds."""
    given = GRPOLoss("grpo", epsilon_low=0.05, epsilon_high=0.1, delta=2.0)
    trainer = make("grpo", True, tmp_path, model=parts.model(), loss=given)
    assert (trainer.epsilon_low, trainer.epsilon_high, trainer.args.delta) == (0.05, 0.1, 2.0)
    trainer._keep("train", {"kl": (torch.tensor(torch.inf), torch.tensor(2.0))}, {"low_min": torch.tensor([torch.nan])})
    trainer._read()
    assert trainer._metrics["train"]["kl"] == [torch.inf]  # as TRL has it
    assert str(trainer._metrics["train"]["low_min"]) == "[nan]"  # of no sequence
    trainer = make("rloo", True, tmp_path, model=parts.model(), loss=RLOOLoss(0.05, 0.1))
    assert (trainer.epsilon_low, trainer.epsilon_high) == (0.05, 0.1)


def test_any_loss_of_its_kind(tmp_path: Path) -> None:
    given = GRPOLoss("grpo", 0.1, importance_sampling_level="sequence", entropy_coef=0.05, compiled=False)
    args = {"loss_type": "grpo", "beta": 0.1, "importance_sampling_level": "sequence", "entropy_coef": 0.05}
    theirs = trained("grpo", False, tmp_path, model=saved(tmp_path), args=args)
    ours = trained("grpo", True, tmp_path, model=saved(tmp_path), loss=given)
    assert ours.chunked_loss is given and ours.ref_model is not None
    assert_alike(theirs, ours, 1e-4)
    given = RLOOLoss(0.1, 0.3, compiled=False)
    assert make("rloo", True, tmp_path, model=parts.model(), loss=given).chunked_loss is given


def test_a_method_of_a_subclass_has_its_effect_or_is_refused(tmp_path: Path) -> None:
    from alignment.trl import ChunkedGRPOTrainer

    class Selective(ChunkedGRPOTrainer):
        def get_high_entropy_mask(self, entropies: Any, mask: Any, threshold: float) -> Any:
            asked.append(threshold)
            return super().get_high_entropy_mask(entropies, mask, threshold)

    asked: list[float] = []
    options: dict[str, Any] = {"train_dataset": parts.prompts(), "processing_class": parts.tokenizer()}
    options["loss_options"] = {"compiled": False}

    def start(cls: Any) -> Any:
        from trl import GRPOConfig

        settings = {"max_steps": 1, "report_to": "none", "use_cpu": True, "bf16": False, "save_strategy": "no"}
        batch = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 4}
        args = GRPOConfig(str(tmp_path), top_entropy_quantile=0.25, disable_tqdm=True, **settings, **batch)
        return cls(parts.model(), len_of, args, **options)

    start(Selective).train()
    assert asked == [0.75]
    for name in ("_get_per_token_logps_and_entropies", "get_off_policy_mask", "get_gamma_weights"):
        with pytest.raises(TypeError, match=f"expected no {name} of Own"):
            start(type("Own", (ChunkedGRPOTrainer,), {name: lambda self: None}))


def len_of(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def test_what_others_ask_for_of_the_log_probabilities(tmp_path: Path) -> None:
    """TRL's method, its arguments and results, gradients included."""
    theirs, ours = (make("grpo", ours, tmp_path, model=parts.model()) for ours in (False, True))
    ids = torch.randint(3, 60, (5, 9))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    for options in ({}, {"batch_size": 2, "compute_entropy": True}):
        found = [t._get_per_token_logps_and_entropies(t.model, ids, mask, 4, **options) for t in (theirs, ours)]
        for expected, mine in zip(*found, strict=True):
            if expected is None:
                assert mine is None
                continue
            torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)
            grads = [torch.autograd.grad(x.sum(), t.model.lm_head.weight, retain_graph=True)[0]
                     for x, t in ((expected, theirs), (mine, ours))]  # fmt: skip
            torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_logits_that_do_something_unknown_are_refused(tmp_path: Path) -> None:
    model = parts.model()
    forward = model.forward

    def doubled(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.logits = 2 * out.logits
        return out

    model.forward = doubled
    assert causal_lm.unwrapped(model) is model
    with pytest.raises(ValueError, match="something to its logits that is not known"):
        trained("grpo", True, tmp_path, model=model)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("grpo", {"loss": RLOOLoss()}, "expected loss to be a GRPOLoss, got RLOOLoss"),
        ("rloo", {"loss": GRPOLoss()}, "expected loss to be a RLOOLoss, got GRPOLoss"),
        (
            "grpo",
            {"loss": GRPOLoss(temperature=0.5)},
            "that completions are sampled with, 1.0, got 0.5",
        ),
        ("grpo", {"args": {"loss_type": "nonsense"}}, "loss_type to be one of"),
        ("grpo", {"loss": GRPOLoss("bnpo"), "args": {"loss_type": "grpo"}}, "nothing else than the loss"),
        ("grpo", {"loss_options": {"beta": 0.1}}, "expected beta in args"),
        ("grpo", {"loss_options": {"chunk_size": 0}}, "chunk_size"),
        (
            "grpo",
            {"loss_options": {"token_metrics": False}, "args": {"use_adaptive_entropy": True}},
            "token_metrics=True with use_adaptive_entropy",
        ),
    ],
)
def test_refusals(kind: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        make(kind, True, tmp_path, model=parts.model(), **options)


def test_what_a_loss_does_not_read_is_said(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        make("grpo", True, tmp_path, model=parts.model(), args={"loss_type": "cispo", "delta": 2.0})
    assert any("delta=2.0 has no effect, as in TRL" in str(one.message) for one in told)
