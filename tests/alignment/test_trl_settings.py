"""Every setting of TRL's configs and constructors: it does what it does there, is the loss's, or is refused."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl")
peft = pytest.importorskip("peft")

import trl_parts as parts  # noqa: E402
from test_trl import CASES, SLOW_CASES, eager_logps, first_batch  # noqa: E402
from transformers import T5Config, T5ForConditionalGeneration, TrainingArguments  # noqa: E402
from trl_zoo import KINDS, assert_same_training, make, trained  # noqa: E402

import alignment  # noqa: E402
from alignment import (  # noqa: E402
    AlphaPOLoss,
    BCOLoss,
    CPOLoss,
    DPOLoss,
    FPOLoss,
    IRPOLoss,
    KTOLoss,
    ORPOLoss,
    PairScores,
    SimPOLoss,
    SLiCLoss,
    TPOLoss,
    TripleLoss,
)
from chunked_embed.checks import FINITE  # noqa: E402
from chunked_embed.fields import number  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore::FutureWarning:trl"),
    pytest.mark.filterwarnings("ignore:.*truncation mode is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]
ALL = tuple(KINDS)
SOME_SLOW = [pytest.param(kind, marks=() if kind == "cpo" else pytest.mark.slow) for kind in ALL]


# --- all fields ------------------------------------------------------------------------------------------------------

# What neither describes the loss nor is tried beside TRL's trainer in ``CASES``: where it is served.
ELSEWHERE = {
    "model_init_kwargs": "of a model given by name, before there is a loss",
    "trust_remote_code": "likewise",
    "dataset_num_proc": "of the tokenizing, before there is a loss",
    "pad_token": "deprecated; of the tokenizer",
    "activation_offloading": "test_offloaded_activations_change_nothing",
    "is_encoder_decoder": "of a model that is not given; test_an_encoder_decoder_is_refused",
    "generate_during_eval": "test_generates_as_trl_does",
}
ARGUMENTS = {
    *("model", "ref_model", "args", "data_collator", "train_dataset", "eval_dataset", "processing_class"),
    *("callbacks", "optimizers", "preprocess_logits_for_metrics", "compute_metrics", "peft_config"),
    "quantization_config",  # of a model given by name
    "model_init",  # TRL 1.16 needs a model as well, and transformers then refuses it
}


def own_fields(kind: str) -> set[str]:
    common = {field.name for field in dataclasses.fields(TrainingArguments)}
    return {field.name for field in dataclasses.fields(KINDS[kind].config)} - common


@pytest.mark.parametrize("kind", ["dpo", "kto", "cpo", "orpo", "tpo"])
def test_every_field_is_served(kind: str) -> None:
    """One that a newer TRL adds is in none of the tables."""
    of_the_loss = set(KINDS[kind].ours._settings)
    tried = {name for case in CASES[kind] + SLOW_CASES[kind] for name in case}
    assert own_fields(kind) - of_the_loss - tried - ELSEWHERE.keys() == set()
    assert of_the_loss <= own_fields(kind)
    assert not of_the_loss & ELSEWHERE.keys() and not tried & ELSEWHERE.keys()


def test_no_field_is_in_a_table_for_nothing() -> None:
    assert set(ELSEWHERE) <= set().union(*map(own_fields, ("dpo", "kto", "cpo", "orpo", "tpo")))


@pytest.mark.parametrize("kind", ["dpo", "kto", "cpo", "orpo", "tpo"])
def test_every_argument_is_served(kind: str) -> None:
    assert set(inspect.signature(KINDS[kind].theirs.__init__).parameters) - {"self"} <= ARGUMENTS


# --- what args say of the loss ---------------------------------------------------------------------------------------

# What a field may say that is not its default and not what ``loss`` has.
OTHER = {
    "loss_type": {"dpo": ["hinge"], "kto": "apo_zero_unpaired", "cpo": "hinge", "tpo": "hinge"},
    "loss_weights": [0.5],
    "f_divergence_type": "js_divergence",
    "f_alpha_divergence_coef": 0.9,
    "ld_alpha": 0.3,
    "use_weighting": True,
    "label_smoothing": 0.1,
}
GIVEN: dict[str, Any] = {"dpo": DPOLoss, "kto": KTOLoss, "bco": BCOLoss, "cpo": CPOLoss, "orpo": ORPOLoss}
GIVEN["tpo"] = TPOLoss


@pytest.mark.parametrize("kind", ALL)
def test_numbers_of_args_that_a_given_loss_does_not_have_are_refused(kind: str, tmp_path: Path) -> None:
    loss = GIVEN[kind](compiled=False)
    for name in KINDS[kind].ours._settings:
        if (kind, name) == ("bco", "loss_type"):  # it has one
            continue
        value = OTHER.get(name, 0.7)
        value = value[kind] if isinstance(value, dict) else value
        with pytest.raises(
            ValueError, match=f"args to say nothing else than the loss, got {name}=.* and {type(loss).__name__}"
        ):
            make(kind, True, tmp_path, args={name: value}, loss=loss)


CONFLICTS: list[tuple[str, dict[str, Any], Any, str]] = [
    ("dpo", {"beta": 0.3}, IRPOLoss(beta=0.2), "got beta=0.3 and IRPOLoss with 0.2"),
    ("dpo", {"beta": 0.3}, SLiCLoss(), "got beta=0.3 and SLiCLoss, which has none"),
    ("dpo", {"loss_type": ["hinge"]}, DPOLoss(), r"got loss_type=\['hinge'\] and DPOLoss with \('sigmoid',\)"),
    ("dpo", {"loss_type": ["fpo_js"]}, FPOLoss(divergence="exo"), "loss_type"),
    ("dpo", {"loss_type": ["hinge"]}, SimPOLoss(), "got loss_type=.*, which has none"),
    ("dpo", {"loss_type": ["irpo"], "label_smoothing": 0.1}, None, "got label_smoothing=0.1 and IRPOLoss, which has"),
    ("dpo", {"loss_type": ["dpop"], "f_divergence_type": "js_divergence"}, None, "f_divergence_type"),
    ("dpo", {"loss_type": ["rdpo"], "ld_alpha": 0.5}, None, "ld_alpha"),
    ("dpo", {"loss_type": ["tdpo1"], "use_weighting": True}, None, "use_weighting"),
    ("dpo", {"loss_type": ["fpo_js"], "loss_weights": [2.0]}, None, "loss_weights"),
    ("dpo", {"sync_ref_model": True}, SimPOLoss(), "sync_ref_model=False: SimPOLoss has no reference"),
    ("bco", {"desirable_weight": 2.0}, None, "got desirable_weight=2.0 and BCOLoss, which has none"),
    ("kto", {"beta": 0.3}, BCOLoss(), "got beta=0.3 and BCOLoss with 0.1"),
    ("cpo", {"loss_type": "simpo"}, CPOLoss(), "loss_type"),
    ("cpo", {"simpo_gamma": 0.7}, AlphaPOLoss(), "got simpo_gamma=0.7 and AlphaPOLoss with 0.5"),
    ("orpo", {"beta": 0.3}, ORPOLoss(), "got beta=0.3 and ORPOLoss with 0.1"),
    ("tpo", {"tpo_alpha": 0.5}, TPOLoss(), "got tpo_alpha=0.5 and TPOLoss with 1.0"),
]


@pytest.mark.parametrize(("kind", "args", "loss", "message"), CONFLICTS, ids=lambda x: str(x)[:40])
def test_conflicts_are_refused(kind: str, args: dict[str, Any], loss: Any, message: str, tmp_path: Path) -> None:
    options = {} if loss is None else {"loss": loss}
    with pytest.raises(ValueError, match=message):
        make(kind, True, tmp_path, args=args, **options)


AGREEMENTS: list[tuple[str, dict[str, Any], Any]] = [
    ("dpo", {"loss_type": ["irpo"], "beta": 0.3}, IRPOLoss(beta=0.3, alpha=0.5)),
    ("dpo", {"loss_type": ["fpo_js"], "beta": 2.0}, FPOLoss()),
    (
        "dpo",
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5], "f_divergence_type": "js_divergence"},
        DPOLoss(loss_type=("sigmoid", "sft"), loss_weights=[1.0, 0.5], f_divergence="js"),
    ),
    ("kto", {"loss_type": "apo_zero_unpaired"}, BCOLoss()),
    ("cpo", {"loss_type": "alphapo", "alpha": 0.2}, AlphaPOLoss(reward_alpha=0.2)),
    ("cpo", {"loss_type": "simpo", "cpo_alpha": 0.0}, SimPOLoss()),
]


@pytest.mark.parametrize(("kind", "args", "loss"), AGREEMENTS, ids=lambda x: str(x)[:40])
def test_what_agrees_is_taken(kind: str, args: dict[str, Any], loss: Any, tmp_path: Path) -> None:
    trainer = make(kind, True, tmp_path, args=args, loss=loss)
    assert trainer.chunked_loss is loss


@pytest.mark.parametrize(
    ("kind", "args", "message"),
    [
        ("dpo", {"label_smoothing": 0.1}, "label_smoothing=0.1 has no effect, as in TRL: DPOLoss .* read it, .*cdpo"),
        pytest.param("dpo", {"discopop_tau": 0.1}, "discopop_tau=0.1 has no effect", marks=pytest.mark.slow),
        pytest.param(
            "dpo",
            {"f_alpha_divergence_coef": 0.7},
            'f_alpha_divergence_coef=0.7 .*f_divergence="alpha" would',
            marks=pytest.mark.slow,
        ),
        ("cpo", {"simpo_gamma": 0.7}, "simpo_gamma=0.7 has no effect, as in TRL: CPOLoss"),
        ("tpo", {"tpo_l_gamma": 0.7}, "tpo_l_gamma=0.7 has no effect, as in TRL: TPOLoss .*tpo-l"),
    ],
)
def test_what_trl_ignores_has_no_effect_and_one_warning(
    kind: str, args: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        ours = trained(kind, True, tmp_path, args=args)
    (told,) = [w for w in found if "has no effect" in str(w.message)]
    assert re.search(message, str(told.message))
    assert told.filename.endswith("trl_zoo.py")  # where the trainer is made
    assert_same_training(trained(kind, False, tmp_path, args=args), ours, ("logits/",) if kind == "cpo" else ())


def test_options_of_the_loss_do_not_go_past_args(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected cpo_alpha in args, got alpha in loss_options"):
        make("cpo", True, tmp_path, loss_options={"alpha": 0.5})


@pytest.mark.parametrize("kind", ["dpo", "kto", "cpo", "orpo", "tpo"])
def test_a_number_set_later_counts_as_in_trl(kind: str, tmp_path: Path) -> None:
    theirs, ours = (make(kind, ours, tmp_path) for ours in (False, True))
    losses = []
    for trainer in (theirs, ours):
        trainer.beta = 0.7
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[1] == pytest.approx(losses[0], rel=2e-5)


@pytest.mark.parametrize(
    ("kind", "cls"), [("dpo", DPOLoss), ("bco", BCOLoss), ("cpo", SimPOLoss), ("orpo", ORPOLoss)], ids=str
)
def test_a_trainer_s_numbers_are_its_loss_s(kind: str, cls: Any, tmp_path: Path) -> None:
    loss = cls(beta=0.4, compiled=False)
    trainer = make(kind, True, tmp_path, loss=loss)
    assert trainer.beta == 0.4
    trainer.beta *= 0.5
    assert loss.beta == 0.2


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_a_reference_that_would_learn_is_refused(kind: str, tmp_path: Path) -> None:
    model = parts.model()
    reference = parts.reference(model)
    reference.model = model.model
    with pytest.raises(ValueError, match="expected a ref_model apart from the model"):
        make(kind, True, tmp_path, model=model, ref_model=reference)


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ((parts.model().model, None), "expected model to be .*, got LlamaModel, which has no LM head"),
        ((parts.model(), parts.model().model), "expected ref_model to be .*, got LlamaModel, which has no LM head"),
        ((parts.model(), {"beta": 0.1}), "expected ref_model to be a causal language model or its name, got dict"),
        ((parts.model(), None, {}), "expected args with loss_type, of this trainer's config, got dict"),
    ],
    ids=["backbone", "backbone as reference", "args as reference", "no args"],
)
def test_models_that_are_none(models: tuple[Any, ...], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        KINDS["dpo"].ours(*models)


def test_a_number_set_later_that_the_loss_does_not_have(tmp_path: Path) -> None:
    trainer = make("dpo", True, tmp_path, loss=IRPOLoss(compiled=False))
    with pytest.raises(AttributeError, match=r"expected label_smoothing when the trainer is made, got 0\.1 later"):
        trainer.label_smoothing = 0.1


@pytest.mark.parametrize("kind", ["dpo", "kto", "cpo", "tpo"])
def test_numbers_are_those_of_a_given_loss(kind: str, tmp_path: Path) -> None:
    trainer = make(kind, True, tmp_path, loss=GIVEN[kind](beta=0.6, compiled=False))
    assert trainer.beta == 0.6
    trainer.beta *= 0.5
    assert trainer.chunked_loss.beta == 0.3


class Gold(TripleLoss):
    """The NLL of the gold completions; its ``alpha`` is another number than TPO's."""

    alpha: float = number(0.0, FINITE)

    def pair_loss(self, x: PairScores) -> Tensor:
        return x.nll + self.alpha


def test_a_loss_over_triples_gets_gold_completions(tmp_path: Path) -> None:
    trainer = make("tpo", True, tmp_path, loss=Gold(compiled=False))
    assert len(first_batch(trainer)["input_ids"]) == 12


def test_gold_completions_stay_or_stay_out(tmp_path: Path) -> None:
    """They are collated by the weight of their NLL when the trainer is made."""
    trainer = make("tpo", True, tmp_path, loss=TPOLoss(alpha=0.0, compiled=False))
    assert len(first_batch(trainer)["input_ids"]) == 8
    trainer.train()
    trainer.tpo_alpha = 0.5
    with pytest.raises(ValueError, match="expected tpo_alpha to stay zero, or to stay above it"):
        trainer.evaluate()


def test_a_loss_without_kl_scores_no_mismatched_completions(tmp_path: Path) -> None:
    ours = trained("kto", True, tmp_path, loss=BCOLoss(compiled=False))
    assert not ours.calculate_KL and ours.chunked_loss.running_count == 12
    assert_same_training(trained("bco", True, tmp_path), ours)


def test_a_loss_without_a_reference_precomputes_none(tmp_path: Path) -> None:
    args = {"precompute_ref_log_probs": True}
    ours = trained("dpo", True, tmp_path, args=args, loss=SimPOLoss(compiled=False), ref_model=None)
    assert ours.ref_model is None and "ref_chosen_logps" not in ours.train_dataset.column_names
    kept = trained("dpo", True, tmp_path, loss=SimPOLoss(compiled=False))
    for p, q in zip(ours.model.parameters(), kept.model.parameters(), strict=True):
        torch.testing.assert_close(p, q)


# --- references ------------------------------------------------------------------------------------------------------


def modes(model: Any) -> list[bool]:
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("seed", [0, 1])
def test_precomputed_references_are_those_of_eval_mode(seed: int, tmp_path: Path) -> None:
    model = parts.model(attention_dropout=0.5)
    model.train()
    args = {"disable_dropout": False, "precompute_ref_log_probs": True, "seed": seed, "max_steps": 1}
    trainer = make("dpo", True, tmp_path / str(seed), model=model, args=args, ref_model=None)
    assert all(modes(model))
    batch = first_batch(trainer)
    model.eval()
    chosen, rejected = eager_logps(model, batch).detach().chunk(2)
    torch.testing.assert_close(batch["ref_chosen_logps"].float(), chosen)
    torch.testing.assert_close(batch["ref_rejected_logps"].float(), rejected)
    trainer.train()


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_an_adapter_s_reference_has_no_dropout_and_its_policy_has(kind: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], r=4, lora_dropout=0.5, task_type="CAUSAL_LM")
    model = parts.model(attention_dropout=0.5)
    trainer = make(kind, True, tmp_path, model=model, args={"disable_dropout": False}, peft_config=config)
    trainer.model.train()
    trainer.model.base_model.model.lm_head.eval()  # each module's own mode comes back
    batch, before = first_batch(trainer), modes(trainer.model)
    first, again = (torch.cat(trainer.compute_ref_log_probs(trainer.model, batch)) for _ in range(2))
    assert torch.equal(first, again)
    assert modes(trainer.model) == before
    losses = {trainer.compute_loss(trainer.model, batch).item() for _ in range(3)}
    assert len(losses) == 3  # the policy's dropout is on
    assert modes(trainer.model) == before


@pytest.mark.parametrize("name", ["ipo", "sigmoid_norm"])
def test_lengths_count_what_a_state_predicts(name: str, tmp_path: Path) -> None:
    """With "keep_end" a completion may begin a row: nothing predicts its first token, which TRL's length counts."""
    args = {"loss_type": [name], "max_length": 4, "truncation_mode": "keep_end", "max_steps": 1}
    theirs, ours = (make("dpo", ours, tmp_path, args=args) for ours in (False, True))
    batch = first_batch(ours)
    cut = batch["completion_mask"][:, 0] == 1
    assert cut.any() and not cut.all()
    with torch.no_grad():
        ratio = eager_logps(ours.model, batch) - eager_logps(ours.ref_model, batch)
        loss, others = (trainer.compute_loss(trainer.model, batch) for trainer in (ours, theirs))

    def expected(lengths: Tensor) -> Tensor:
        chosen, rejected = (ratio / lengths).chunk(2)
        margin = chosen - rejected
        return ((margin - 5) ** 2 if name == "ipo" else -torch.nn.functional.logsigmoid(0.1 * margin)).mean()

    mask = batch["completion_mask"]
    torch.testing.assert_close(loss.float(), expected(mask[:, 1:].sum(1)))
    torch.testing.assert_close(others, expected(mask.sum(1)))
    assert abs(loss - others) > 1e-4


# --- what replaces forwards, and what is compared --------------------------------------------------------------------

LAYERS = {"rope": False, "rms_norm": False, "swiglu": False}  # their kernels are Triton's


@pytest.mark.parametrize("kind", SOME_SLOW)
@pytest.mark.filterwarnings("ignore:`use_liger_kernel=True` is deprecated:FutureWarning")
def test_liger_keeps_its_layers_and_not_its_loss(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("liger_kernel")
    args = {"use_liger_kernel": True, "liger_kernel_config": LAYERS, "max_steps": 2, "eval_strategy": "no"}
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        ours = trained(kind, True, tmp_path, args=args)
    told = [str(w.message) for w in found if "iger" in str(w.message)]
    assert len(told) == 1, told  # by TRL where it knows, else by us
    plain = trained(kind, True, tmp_path, args={"max_steps": 2, "eval_strategy": "no"})
    for p, q in zip(ours.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    for loss in ("cross_entropy", "fused_linear_cross_entropy"):
        args["liger_kernel_config"] = {loss: True}
        with pytest.raises(ValueError, match=loss):
            make(kind, True, tmp_path, args=args)


@pytest.mark.parametrize("kind", SOME_SLOW)
def test_a_forward_that_train_replaces_is_attached_again(kind: str, tmp_path: Path) -> None:
    trainer = make(kind, True, tmp_path, args={"max_steps": 1, "eval_strategy": "no"})
    plain = type(trainer.model).forward
    trainer.model.forward = MethodType(lambda self, *args, **kwargs: plain(self, *args, **kwargs), trainer.model)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    assert any(not torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


@pytest.mark.parametrize("kind", SOME_SLOW)
def test_check_compares_logits_or_does_not(kind: str, tmp_path: Path) -> None:
    def doubled(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = type(self).forward(self, *args, **kwargs)
        out.logits = 2 * out.logits
        return out

    def trainer(**options: Any) -> Any:
        model = parts.model()
        model.forward = MethodType(doubled, model)
        return make(kind, True, tmp_path, model=model, args={"max_steps": 1, "eval_strategy": "no"}, **options)

    with pytest.raises(ValueError, match="something to its logits"):
        trainer().train()
    trainer(check=False).train()
    with pytest.raises(TypeError, match="expected check to be"):
        trainer(check="no")


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cpo", "orpo"])
def test_an_encoder_decoder_is_refused(kind: str, tmp_path: Path) -> None:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(vocab_size=64, decoder_start_token_id=0, **sizes))
    with pytest.raises(TypeError, match="expected a decoder-only model, got T5For"):
        make(kind, True, tmp_path, model=model, args={"max_completion_length": 8})


@pytest.mark.parametrize("kind", ["dpo", "kto"])
@pytest.mark.slow
def test_pictures_train_like_trl(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    import trl_vision

    options: dict[str, Any] = {"args": {"max_length": None, "remove_unused_columns": False}}
    theirs, ours = (
        trained(
            kind,
            ours,
            tmp_path,
            model=trl_vision.model(),
            data=trl_vision.data(kind),
            eval_dataset=trl_vision.data(kind, 4),
            processing_class=trl_vision.processor(),
            **copy.deepcopy(options),
        )
        for ours in (False, True)
    )
    assert "pixel_values" in first_batch(ours)
    assert_same_training(theirs, ours)


HEADS: dict[str, dict[str, Any]] = {
    "dora": {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
    "bias": {"target_modules": ["q_proj", "lm_head"], "lora_bias": True},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 9]},
}


@pytest.mark.parametrize("kind", SOME_SLOW)
@pytest.mark.parametrize("name", HEADS)
def test_what_peft_makes_of_a_head_is_trained(kind: str, name: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", **HEADS[name])
    model = parts.model(tie_word_embeddings=name == "tokens")
    trainer = make(kind, True, tmp_path, model=model, args={"max_steps": 1}, peft_config=config)
    trainer.compute_loss(trainer.model, first_batch(trainer)).backward()
    part = "token_adapter" if name == "tokens" else "lm_head"
    grown = {n: p.grad for n, p in trainer.model.named_parameters() if part in n and p.requires_grad}
    assert grown and all(g is not None for g in grown.values())
    assert any(g.abs().max() > 0 for g in grown.values() if g is not None)


# --- evaluation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in ALL if kind not in ("grpo", "rloo")])  # which take none
def test_compute_metrics_is_called(kind: str, tmp_path: Path) -> None:
    found = make(kind, True, tmp_path, compute_metrics=lambda p: {"size": len(p.label_ids)}).evaluate()
    assert found["eval_size"] == (2 if kind in ("cpo", "orpo") else 6)  # of those, TRL hands over two means a batch


@pytest.mark.parametrize(
    ("kind", "name"),
    [("cpo", "cpo_loss"), ("orpo", "odds_ratio_loss"), ("orpo", "concatenated_forward"), ("kto", "_compute_kl_logps")],
)
def test_a_method_of_a_subclass_that_nothing_calls(
    kind: str, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    own = type("Mine", (KINDS[kind].ours,), {name: lambda *args: None})
    monkeypatch.setattr(KINDS[kind], "ours", own)
    with pytest.raises(TypeError, match=rf"expected no {name} of Mine: .* Give loss="):
        make(kind, True, tmp_path)


@pytest.mark.parametrize(
    ("kind", "args", "message"),
    [
        ("dpo", TrainingArguments(use_cpu=True), "expected args with loss_type, .* got TrainingArguments"),
        ("cpo", None, "expected args for ChunkedCPOTrainer, got None"),
    ],
)
def test_arguments_of_another_kind(kind: str, args: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        KINDS[kind].ours(model=parts.model(), args=args, train_dataset=parts.pairs())


def test_what_is_not_measured_is_not_logged(tmp_path: Path) -> None:
    found = make("cpo", True, tmp_path, loss_options={"token_metrics": False, "compiled": False}).evaluate()
    assert "eval_logps/chosen" in found and "eval_logits/chosen" not in found


@pytest.mark.parametrize("kind", ["cpo", "orpo"])
def test_generates_as_trl_does(kind: str, tmp_path: Path) -> None:
    """``generate_during_eval``, without the tracker that it reports to."""
    texts = []
    for ours in (False, True):
        trainer = make(kind, ours, tmp_path)
        torch.manual_seed(0)
        texts.append(trainer.generate_from_model(trainer.model, first_batch(trainer)))
    assert texts[0] == texts[1] and len(texts[0]) == 4


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="Trainer takes all GPUs that it sees")
@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_offloaded_activations_change_nothing(kind: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2}
    ours = [
        trained(
            kind,
            True,
            tmp_path,
            model=parts.model(**sizes),
            args={"use_cpu": False, "eval_strategy": "no", "activation_offloading": offloaded},
        )
        for offloaded in (False, True)
    ]
    for p, q in zip(*(trainer.model.parameters() for trainer in ours), strict=True):
        torch.testing.assert_close(p, q)


# --- a TRL that lacks a trainer --------------------------------------------------------------------------------------


@pytest.fixture
def imported_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """``alignment.trl`` as a process finds it that has not imported it."""
    monkeypatch.setattr(alignment, "trl", sys.modules["alignment.trl"])
    for name in [name for name in sys.modules if name.startswith("alignment.trl")]:
        monkeypatch.delitem(sys.modules, name)
    yield monkeypatch


@pytest.mark.parametrize("gone", ["cpo", "orpo"])
def test_a_trainer_that_trl_lacks_takes_no_other_with_it(gone: str, imported_anew: Any) -> None:
    imported_anew.setitem(sys.modules, f"trl.experimental.{gone}", None)
    package = importlib.import_module("alignment.trl")
    missing = f"Chunked{gone.upper()}Trainer"
    for name in package.__all__:
        if name == missing:
            with pytest.raises(ImportError, match=rf"expected trl 1\.16\.x .* for {missing} .*, got trl \d"):
                getattr(package, name)
        else:
            getattr(package, name)
    assert missing in dir(package)
    with pytest.raises(AttributeError, match="no attribute 'ChunkedTrainer'"):
        _ = package.ChunkedTrainer


def test_a_module_that_trl_fails_to_load_is_an_import_error(imported_anew: Any) -> None:
    def lazily(name: str) -> Any:
        raise RuntimeError(f"Failed to import {name}")

    package = importlib.import_module("alignment.trl")
    imported_anew.setattr(package.importlib, "import_module", lazily)
    with pytest.raises(ImportError, match=r"for ChunkedKTOTrainer .*: Failed to import alignment\.trl\.kto"):
        _ = package.ChunkedKTOTrainer


def test_trl_is_imported_with_a_trainer(imported_anew: Any) -> None:
    for name in [name for name in sys.modules if name == "trl" or name.startswith("trl.")]:
        imported_anew.delitem(sys.modules, name)
    package = importlib.import_module("alignment.trl")
    assert "irpo" in package.LOSS_TYPES
    assert "trl" not in sys.modules
