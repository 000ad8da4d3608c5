"""Trainers beside TRL's own: one seed, the same steps, the same logs and weights."""

import copy
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("trl")
peft = pytest.importorskip("peft")

import trl_parts as parts  # noqa: E402
from transformers import Gemma2Config, Gemma2ForCausalLM, MixtralConfig, MixtralForCausalLM  # noqa: E402
from trl_zoo import assert_same_training, make, trained  # noqa: E402

from alignment import BCOLoss, DPOLoss, IRPOLoss, KTOLoss, SimPOLoss, TDPOLoss, TPOLoss  # noqa: E402
from alignment.trl import BCO_STATE, LOSS_TYPES  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore::FutureWarning:trl"),
    pytest.mark.filterwarnings("ignore::UserWarning:trl"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]
CASES = {
    "dpo": [
        *({"loss_type": [name]} for name in ("sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "aot")),
        *({"loss_type": [name]} for name in ("aot_unpaired", "apo_zero", "apo_down", "discopop", "sft")),
        {"loss_type": ["exo_pair"], "label_smoothing": 1e-3},
        {"loss_type": ["robust"], "label_smoothing": 0.2},
        {"loss_type": ["sigmoid_norm"]},
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        {"f_divergence_type": "forward_kl"},
        {"f_divergence_type": "js_divergence"},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5},
        {"ld_alpha": 0.3},
        {"use_weighting": True},
        {"precompute_ref_log_probs": True},
        {"precompute_ref_log_probs": True, "ld_alpha": 0.5},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"gradient_checkpointing": True},
        {"max_length": 8},
    ],
    "kto": [
        {},
        {"desirable_weight": 1.3, "undesirable_weight": 0.7},
        {"loss_type": "apo_zero_unpaired"},
        {"precompute_ref_log_probs": True},
    ],
    "cpo": [
        *({"loss_type": name} for name in ("sigmoid", "hinge", "ipo", "simpo")),
        {"label_smoothing": 0.1},
        {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.7},
        {"loss_type": "alphapo", "alpha": 0.1},
        {"loss_type": "simpo", "alpha": 0.1},
        {"loss_type": "ipo", "alpha": 0.1},
        {"loss_type": "sigmoid", "alpha": 0.01},
    ],
    "orpo": [{}, {"beta": 0.5}],
    "tpo": [
        *({"loss_type": name, "beta": 0.1} for name in ("sigmoid", "hinge", "ipo", "tpo-l")),
        {"label_smoothing": 0.1, "tpo_alpha": 0.5},
        {"tpo_alpha": 0.0},
        {"loss_type": "tpo-l", "tpo_l_gamma": 1.0, "beta": 2.0, "label_smoothing": 0.1},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"max_length": 8},
    ],
}
REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
SYNCED = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5}
SLOW_CASES = {
    "dpo": [
        REENTRANT,
        SYNCED,
        {"pad_to_multiple_of": 8},
        {"padding_free": True},
        {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 2},
        {"max_length": 9, "truncation_mode": "keep_end"},
        {"disable_dropout": False},
        {"neftune_noise_alpha": 5.0},
        {"router_aux_loss_coef": 0.0},
        {"loss_type": ["discopop"], "discopop_tau": 0.1},
    ],
    "kto": [
        REENTRANT,
        SYNCED,
        {"pad_to_multiple_of": 8, "max_length": 9},
        {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 2},
        {"beta": 0.3, "disable_dropout": False, "router_aux_loss_coef": 0.0},
    ],
    "cpo": [
        REENTRANT,
        {"max_length": 9},
        {"loss_type": "hinge", "label_smoothing": 0.1},
        {"max_completion_length": 3, "disable_dropout": False, "beta": 0.3},
    ],
    "orpo": [{"max_length": 9, "padding_value": 5}, {"max_completion_length": 3, "disable_dropout": False}],
    "tpo": [
        REENTRANT,
        {"pad_to_multiple_of": 8, "max_length": 9, "truncation_mode": "keep_end", "disable_dropout": False},
    ],
}
PARAMETERS = [
    pytest.param(kind, case, marks=marks, id=f"{kind}-" + "-".join(f"{k}={v}" for k, v in case.items()))
    for table, marks in ((CASES, ()), (SLOW_CASES, pytest.mark.slow))
    for kind, cases in table.items()
    for case in cases
]


@pytest.mark.parametrize(("kind", "case"), PARAMETERS)
def test_trains_like_trl(kind: str, case: dict[str, Any], tmp_path: Path) -> None:
    theirs, ours = (trained(kind, ours, tmp_path, args=case) for ours in (False, True))
    # TRL means the logits of CPO and ORPO over prompts and padding as well, and leaves out an NLL without weight.
    but = ("logits/", *(["nll_loss"] if ours.chunked_loss.__dict__.get("alpha", 0) == 0 else []))
    assert_same_training(theirs, ours, but if kind in ("cpo", "orpo") else ())
    assert all(math.isfinite(log["eval_logits/chosen"]) for log in ours.state.log_history if "eval_loss" in log)


@pytest.mark.parametrize("kind", ["dpo", "kto", "cpo", "orpo", "tpo"])
def test_trains_like_trl_under_autocast(kind: str, tmp_path: Path) -> None:
    theirs, ours = (trained(kind, ours, tmp_path, args={"bf16": True}) for ours in (False, True))
    assert_same_training(theirs, ours, but=("logits/", "grad_norm", "accurac"), tolerance=0.06)


@pytest.mark.parametrize("kind", ["dpo", "kto", "cpo", "orpo", "tpo"])
def test_trains_an_adapter_like_trl(kind: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=4, task_type="CAUSAL_LM")
    theirs, ours = (trained(kind, ours, tmp_path, peft_config=config) for ours in (False, True))
    assert_same_training(theirs, ours, but=("logits/",) if kind in ("cpo", "orpo") else ())
    assert any("lora" in name for name, p in ours.model.named_parameters() if p.requires_grad)


def test_virtual_tokens_of_prompt_tuning(tmp_path: Path) -> None:
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    theirs, ours = (trained("dpo", ours, tmp_path, peft_config=config) for ours in (False, True))
    assert_same_training(theirs, ours)


def test_a_mixture_of_experts_has_its_auxiliary_loss(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}

    def model() -> Any:
        torch.manual_seed(0)
        config = MixtralConfig(
            vocab_size=64, num_key_value_heads=2, num_local_experts=4, output_router_logits=True, **sizes
        )
        config.router_aux_loss_coef = 0.5
        return MixtralForCausalLM(config)

    for kind in ("dpo", "cpo"):
        theirs, ours = (trained(kind, ours, tmp_path, model=model()) for ours in (False, True))
        assert_same_training(theirs, ours, but=("logits/",) if kind == "cpo" else ())
    assert "eval_aux_loss" in trained("dpo", True, tmp_path, model=model()).state.log_history[-2]


# --- what TRL lacks --------------------------------------------------------------------------------------------------


def eager_logps(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Sums over completion tokens, from the model's own logits."""
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
    picked = logits.log_softmax(-1).gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
    return (picked * inputs["completion_mask"][:, 1:]).sum(1)


def first_batch(trainer: Any) -> dict[str, Tensor]:
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


@pytest.mark.parametrize("name", [*LOSS_TYPES, "cdpo"])
def test_loss_types_that_trl_lacks(name: str, tmp_path: Path) -> None:
    smoothing = {"label_smoothing": 0.1} if name == "cdpo" else {}
    trainer = trained("dpo", True, tmp_path, args={"loss_type": [name], **smoothing})
    assert all(math.isfinite(log["loss"]) for log in trainer.state.log_history if "loss" in log)
    batch = first_batch(trainer)
    found = trainer.compute_loss(trainer.model, batch)
    with torch.no_grad():
        c, r = eager_logps(trainer.model, batch).chunk(2)
        rc, rr = eager_logps(trainer.ref_model, batch).chunk(2)
    z = 0.1 * ((c - r) - (rc - rr))
    if name == "cdpo":
        torch.testing.assert_close(found, (-0.9 * F.logsigmoid(z) - 0.1 * F.logsigmoid(-z)).mean())
    if name == "dpop":
        torch.testing.assert_close(found, -F.logsigmoid(z - 0.1 * 50 * F.relu(rc - c)).mean())


def test_any_loss_over_pairs(tmp_path: Path) -> None:
    given = IRPOLoss(beta=0.2, alpha=0.5, compiled=False)
    trainer = make("dpo", True, tmp_path, loss=given)
    assert trainer.chunked_loss is given
    batch = first_batch(trainer)
    found = trainer.compute_loss(trainer.model, batch)
    c, r = eager_logps(trainer.model, batch).chunk(2)
    rc, rr = eager_logps(trainer.ref_model, batch).chunk(2)
    count = batch["completion_mask"].chunk(2)[0].sum(1)
    expected = (-F.logsigmoid(0.2 * ((c - rc) - (r - rr))) - 0.5 * c / count).mean()
    torch.testing.assert_close(found, expected)
    trained("dpo", True, tmp_path, loss=SimPOLoss(compiled=False))  # which has no reference


@pytest.mark.parametrize("kind", ["dpo", "kto", "orpo", "tpo"])
def test_an_adapter_on_the_head_is_trained(kind: str, tmp_path: Path) -> None:
    """TRL's DPO and KTO refuse it, since their log-probabilities would go past it."""
    config = peft.LoraConfig(target_modules=["q_proj", "lm_head"], r=4, init_lora_weights=False, lora_dropout=0.0)
    trainer = make(kind, True, tmp_path, peft_config=config)
    base = copy.deepcopy(trainer.model).merge_and_unload()
    batch = first_batch(trainer)
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    grown = {name: p.grad for name, p in trainer.model.named_parameters() if "lm_head.lora" in name}
    assert len(grown) == 2 and all(g is not None and g.abs().max() > 0 for g in grown.values())
    if kind == "dpo":
        c, r = eager_logps(base, batch).chunk(2)
        with trainer.model.disable_adapter(), torch.no_grad():
            rc, rr = eager_logps(trainer.model, batch).chunk(2)
        torch.testing.assert_close(loss, -F.logsigmoid(0.1 * ((c - rc) - (r - rr))).mean())
    trainer.train()


def test_two_accumulated_halves_are_the_whole(tmp_path: Path) -> None:
    data = parts.pairs(8)
    halves = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 1}
    whole = {"per_device_train_batch_size": 8, "max_steps": 1}
    ours = [
        trained("dpo", True, tmp_path, model=parts.model(torch.float64), data=data, args=args)
        for args in (halves, whole)
    ]
    for p, q in zip(*(trainer.model.parameters() for trainer in ours), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", ["bco", "kto"])
def test_bco_keeps_its_running_mean(kind: str, tmp_path: Path) -> None:
    args = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}

    def made(start: Any = make) -> Any:
        return start(kind, True, tmp_path / "a", args=args, loss=BCOLoss(compiled=False))

    whole = made(trained)
    state = json.loads((tmp_path / "a/checkpoint-4" / BCO_STATE).read_text())
    assert state["count"] == 16
    assert state["mean"] == pytest.approx(whole.chunked_loss.running_mean.item())
    assert {"delta", "rewards/chosen", "rewards/margins", "logps/rejected"} <= whole.state.log_history[-3].keys()
    resumed = made()
    resumed.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-2"))
    assert resumed.chunked_loss.running_mean == whole.chunked_loss.running_mean
    for p, q in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    (tmp_path / "a/checkpoint-2" / BCO_STATE).unlink()
    with pytest.raises(FileNotFoundError, match=BCO_STATE):
        made().train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-2"))


# --- refusals --------------------------------------------------------------------------------------------------------


def test_logits_that_do_something_unknown_are_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma2Config(vocab_size=64, head_dim=8, num_key_value_heads=1, final_logit_softcapping=0.3, **sizes)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(config)
    trained("dpo", True, tmp_path, model=copy.deepcopy(model))  # this cap is known
    forward = model.forward
    model.forward = lambda *args, **kwargs: doubled(forward(*args, **kwargs))
    with pytest.raises(ValueError, match="something to its logits that is not known"):
        trained("dpo", True, tmp_path, model=model, ref_model=Gemma2ForCausalLM(config))


def doubled(out: Any) -> Any:
    out.logits = 2 * out.logits
    return out


def test_a_reference_with_another_scale_has_no_joint_walk(tmp_path: Path) -> None:
    reference = parts.model()
    reference.config.logit_scale = 0.5  # which this model does not apply: the check finds it, or the scales differ
    with pytest.raises(ValueError, match=r"LM head|logit scale"):
        trained("dpo", True, tmp_path, loss=TDPOLoss(compiled=False), ref_model=reference)


def test_stored_reference_logps_are_those_of_the_temperature(tmp_path: Path) -> None:
    """TRL keeps them in a file by the data and the reference; the temperature is ours."""
    args = {"precompute_ref_log_probs": True}
    makes = [make("dpo", True, tmp_path, args=args, loss=DPOLoss(temperature=t, compiled=False)) for t in (1.0, 2.0)]
    assert makes[0]._precompute_model_hash != makes[1]._precompute_model_hash
    first, second = (torch.tensor(list(trainer.train_dataset["ref_chosen_logps"])) for trainer in makes)
    assert not torch.allclose(first, second)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("dpo", {"loss": KTOLoss()}, "expected loss to be a PairLoss, got KTOLoss"),
        ("dpo", {"loss": IRPOLoss(), "loss_options": {"chunk_size": 4}}, "got both"),
        ("dpo", {"args": {"loss_type": ["sigmoid", "irpo"]}}, "'irpo' to be the only loss_type"),
        ("dpo", {"args": {"loss_type": ["nonsense"]}}, r"or one of \['irpo', .* alone, got 'nonsense'"),
        ("dpo", {"args": {"beta": float("nan")}}, "expected beta to be a positive, finite number"),
        (
            "dpo",
            {"loss": TDPOLoss(), "args": {"precompute_ref_log_probs": True}},
            "reference's distributions",
        ),
        ("bco", {"loss": KTOLoss()}, "expected loss to be a BCOLoss"),
        ("orpo", {"loss_options": {"chunk_size": 0}}, "chunk_size"),
        ("tpo", {"loss": DPOLoss()}, "expected loss to be a TripleLoss, got DPOLoss"),
        ("dpo", {"loss": TPOLoss()}, "expected loss to be a PairLoss, got TPOLoss"),
        ("cpo", {"loss": TDPOLoss(compiled=False)}, "a loss without a reference, got TDPOLoss"),
    ],
)
def test_refusals(kind: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        trained(kind, True, tmp_path, **options)
