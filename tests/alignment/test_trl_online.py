"""Online DPO beside TRL's own: one seed, the same completions and rewards, the same steps, logs and weights."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("trl")
peft = pytest.importorskip("peft")

import trl_parts as parts  # noqa: E402
from transformers import MixtralConfig, MixtralForCausalLM, TrainingArguments  # noqa: E402
from trl_zoo import SAMPLING, assert_same_training, make, trained  # noqa: E402

from alignment import CPOLoss, DPOLoss, IRPOLoss, KTOLoss, PairLoss, PairScores, SimPOLoss, TDPOLoss  # noqa: E402
from alignment.trl.online_dpo import Sampled, SummedIPOLoss, with_places  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore::FutureWarning:trl"),
    pytest.mark.filterwarnings("ignore::UserWarning:trl"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]
KIND = SAMPLING["online"]
OVER_PADDING = ("objective/kl", "objective/entropy", "objective/non_score", "objective/rlhf")
"""What TRL adds up over padding as well."""
ALL_OF_A_LENGTH = {"generation_kwargs": {"min_new_tokens": 6}}


def numbered(number: list[int], completions: list[str], **_: Any) -> list[float | None]:
    """By a column of the data; of some there is no verdict."""
    return [None if n % 5 == 0 else len(text) / (n + 1) for n, text in zip(number, completions, strict=True)]


CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"loss_type": "ipo", "beta": [0.5]}, {}),
    ({"missing_eos_penalty": 3.0, "temperature": 0.5, "top_k": 20, "top_p": 0.9}, {}),
    ({"max_length": 8}, {}),  # a part of the prompts is left
    ({"reward_weights": [1.0, -0.5]}, {"reward_funcs": [parts.odd_words, numbered]}),
    ({"gradient_checkpointing": True, "repetition_penalty": 1.2, "min_p": 0.01}, {}),
    ({"disable_dropout": False, "cache_implementation": "dynamic"}, {}),
    ({"num_train_epochs": 2, "max_steps": -1, "per_device_train_batch_size": 8}, {}),  # a last batch that is short
]
ELSEWHERE = {
    "generation_kwargs": "test_all_that_is_logged_is_trl_s",
    "max_new_tokens": "KIND",
    **dict.fromkeys(("model_init_kwargs", "trust_remote_code"), "of a model given by name, before there is a loss"),
    "reward_model_path": "which TRL 1.16 does not read",
    "ds3_gather_for_generation": "of ZeRO-3, which is not here",
}
ARGUMENTS = {
    *("model", "ref_model", "reward_funcs", "args", "data_collator", "train_dataset", "eval_dataset"),
    *("processing_class", "reward_processing_classes", "peft_config", "compute_metrics", "callbacks", "optimizers"),
    "preprocess_logits_for_metrics",
}


def test_every_field_and_argument_is_served() -> None:
    """One that a newer TRL adds is in none of the tables. What vLLM generates with is TRL's."""
    common = {field.name for field in dataclasses.fields(TrainingArguments)}
    own = {field.name for field in dataclasses.fields(KIND.config)} - common
    own = {name for name in own if "vllm" not in name}
    tried = {name for args, _ in CASES for name in args}
    assert own - tried - ELSEWHERE.keys() == set() and not tried & ELSEWHERE.keys() and ELSEWHERE.keys() <= own
    assert set(inspect.signature(KIND.theirs.__init__).parameters) - {"self"} == ARGUMENTS


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case[0]) or "plain")
def test_trains_like_trl(case: tuple[dict[str, Any], dict[str, Any]], tmp_path: Path) -> None:
    args, options = case
    theirs, ours = (trained("online", ours, tmp_path, args=args, **options) for ours in (False, True))
    assert_same_training(theirs, ours, OVER_PADDING)


def test_all_that_is_logged_is_trl_s(tmp_path: Path) -> None:
    theirs, ours = (trained("online", ours, tmp_path, args=ALL_OF_A_LENGTH) for ours in (False, True))
    assert_same_training(theirs, ours)
    assert {"entropy", "mean_token_accuracy"} <= ours.state.log_history[0].keys()


def test_trains_like_trl_under_autocast(tmp_path: Path) -> None:
    theirs, ours = (trained("online", ours, tmp_path, args={"bf16": True}) for ours in (False, True))
    assert_same_training(theirs, ours, (*OVER_PADDING, "grad_norm", "accurac"), tolerance=0.06)


@pytest.mark.parametrize("by_itself", [True, False])
def test_trains_an_adapter_like_trl(by_itself: bool, tmp_path: Path) -> None:
    """Its reference is the policy without it, or another model."""
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=4, task_type="CAUSAL_LM")
    options = {} if by_itself else {"ref_model": parts.reference(parts.model())}
    theirs, ours = (
        trained("online", ours, tmp_path, peft_config=config, **copy.deepcopy(options)) for ours in (False, True)
    )
    assert_same_training(theirs, ours, OVER_PADDING)
    assert (ours.ref_model is None) is by_itself


def test_a_reference_is_made_of_the_model_as_in_trl(tmp_path: Path) -> None:
    theirs, ours = (trained("online", ours, tmp_path, ref_model=None) for ours in (False, True))
    assert_same_training(theirs, ours, OVER_PADDING)


def test_pictures_train_like_trl(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    import trl_vision

    rows = [{"prompt": row["prompt"], "image": row["images"][0]} for row in trl_vision.data("dpo")]
    theirs, ours = (
        trained(
            "online",
            ours,
            tmp_path,
            model=trl_vision.model(),
            data=parts.Dataset.from_list(rows),
            processing_class=trl_vision.processor(),
            args={"dataloader_drop_last": True, "per_device_train_batch_size": 2},
            data_collator=lambda rows: {name: [row[name] for row in rows] for name in ("prompt", "image")},
        )
        for ours in (False, True)
    )
    assert_same_training(theirs, ours, OVER_PADDING)


# --- what a step does ------------------------------------------------------------------------------------------------


def eager_logps(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Sums over completion tokens, from the model's own logits."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    picked = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    return (picked * batch["completion_mask"][:, 1:]).sum(1)


def step_of(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, dict[str, Tensor], list[str]]:
    """-> the loss, what was scored, and the prompts."""
    seen = []
    split = trainer._split
    monkeypatch.setattr(trainer, "_split", lambda batch: seen.append(batch) or split(batch))
    inputs = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    return trainer.compute_loss(trainer.model, inputs), seen[0], inputs["prompt"]


class Lead(PairLoss):
    """Without a beta."""

    takes_reference = False

    def pair_loss(self, x: PairScores) -> Tensor:
        return F.relu(1.0 - x.chosen_mean + x.rejected_mean)


LOSSES = {
    "irpo": IRPOLoss(beta=0.2, alpha=0.5, compiled=False),
    "simpo": SimPOLoss(beta=2.0, compiled=False),
    "mean ipo": DPOLoss(0.3, "ipo", compiled=False),
    "sum ipo": SummedIPOLoss(0.3, compiled=False),
}


@pytest.mark.parametrize("name", LOSSES)
def test_any_loss_over_pairs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make("online", True, tmp_path, model=parts.model(torch.float64), loss=LOSSES[name])
    found, batch, prompts = step_of(trainer, monkeypatch)
    texts = trainer.processing_class.batch_decode(
        batch["input_ids"] * batch["completion_mask"], skip_special_tokens=True
    )
    chosen_words, rejected_words = torch.tensor(parts.odd_words(texts)).chunk(2)
    assert (chosen_words >= rejected_words).all() and (chosen_words > rejected_words).any()
    starts = trainer.processing_class.batch_decode(
        batch["input_ids"] * (1 - batch["completion_mask"]), skip_special_tokens=True
    )
    assert [text.strip() for text in starts] == [*prompts, *prompts]
    c, r = eager_logps(trainer.model, batch).chunk(2)
    with torch.no_grad():
        rc, rr = eager_logps(trainer.ref_model, batch).chunk(2)
    nc, nr = batch["completion_mask"].sum(1).chunk(2)
    expected = {
        "irpo": -F.logsigmoid(0.2 * ((c - rc) - (r - rr))) - 0.5 * c / nc,
        "simpo": -F.logsigmoid(2 * (c / nc - r / nr) - 0.5),
        "mean ipo": ((c - rc) / nc - (r - rr) / nr - 1 / 0.6) ** 2,
        "sum ipo": ((c - rc) - (r - rr) - 1 / 0.6) ** 2,
    }[name].mean()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    ours, theirs = (torch.autograd.grad(loss, list(trainer.model.parameters())) for loss in (found, expected))
    for grad, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("loss", [SimPOLoss(compiled=False), CPOLoss(compiled=False), TDPOLoss(compiled=False)])
def test_what_a_loss_has_not_is_not_logged(loss: Any, tmp_path: Path) -> None:
    logs = trained("online", True, tmp_path, loss=loss).state.log_history[0]
    assert {"objective/scores", "objective/entropy", "rewards/margins"} <= logs.keys()
    assert not {"objective/kl", "objective/rlhf_reward"} & logs.keys()  # no log-probabilities of a reference
    assert ("nll_loss" in logs) == isinstance(loss, CPOLoss) and ("kl/chosen" in logs) == isinstance(loss, TDPOLoss)


def test_entropy_counts_all_tokens_where_a_loss_takes_means(tmp_path: Path) -> None:
    sums, means = (
        trained("online", True, tmp_path, args={"max_steps": 1}, loss=loss).state.log_history[0]
        for loss in (DPOLoss(compiled=False), SimPOLoss(compiled=False))
    )
    assert means["objective/entropy"] == pytest.approx(sums["objective/entropy"], rel=1e-5)
    assert means["logps/chosen"] > sums["logps/chosen"] / 2


def test_an_adapter_on_the_head_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = peft.LoraConfig(target_modules=["q_proj", "lm_head"], r=4, init_lora_weights=False)
    trainer = make("online", True, tmp_path, peft_config=config, model=parts.model(torch.float64))
    base = copy.deepcopy(trainer.model).merge_and_unload()
    loss, batch, _ = step_of(trainer, monkeypatch)
    loss.backward()
    grown = {name: p.grad for name, p in trainer.model.named_parameters() if "lm_head.lora" in name}
    assert len(grown) == 2 and all(g is not None and g.abs().max() > 0 for g in grown.values())
    c, r = eager_logps(base, batch).chunk(2)
    with trainer.model.disable_adapter(), torch.no_grad():
        rc, rr = eager_logps(trainer.model, batch).chunk(2)
    torch.testing.assert_close(loss, -F.logsigmoid(0.1 * ((c - r) - (rc - rr))).mean(), rtol=1e-9, atol=1e-12)


def test_a_mixture_of_experts_has_its_auxiliary_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(vocab_size=64, num_key_value_heads=2, num_local_experts=4, bos_token_id=1, **sizes)
    config.output_router_logits, config.router_aux_loss_coef = True, 0.5
    trainer = make("online", True, tmp_path, model=MixtralForCausalLM(config))
    ids, mask = torch.randint(3, 64, (4, 5)), torch.ones(4, 5, dtype=torch.long)
    ids[2:, :2] = ids[:2, :2]  # prompts
    sampled = Sampled(ids[:, :2], mask[:, :2], ids[:, 2:], mask[:, 2:], {})
    monkeypatch.setattr(trainer, "_sampled", lambda *_: sampled)  # such a model cannot generate, vLLM may

    def loss() -> float:
        return trainer.compute_loss(trainer.model, {"prompt": ["w0", "w1"]}).item()

    with_balance = loss()
    trainer.model.config.router_aux_loss_coef = 0.0
    out = trainer.model(input_ids=ids, output_router_logits=True)
    assert out.aux_loss > 1.0
    assert with_balance == pytest.approx(loss() + 0.5 * out.aux_loss.item(), rel=1e-5)


def test_dropout_of_the_reference_is_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = parts.model(attention_dropout=0.5)
    trainer = make("online", True, tmp_path, model=model, args={"disable_dropout": False})
    trainer.ref_model.train()
    _, batch, _ = step_of(trainer, monkeypatch)
    first, again = (torch.cat(trainer.compute_ref_log_probs(trainer.ref_model, batch)) for _ in range(2))
    assert torch.equal(first, again) and trainer.ref_model.training


# --- what differs from TRL -------------------------------------------------------------------------------------------


def test_accumulated_batches_are_a_mean(tmp_path: Path) -> None:
    """TRL's gradients are their sum: half the learning rate makes the same steps."""
    args = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_grad_norm": 0.0}
    theirs = trained("online", False, tmp_path, args=args | {"learning_rate": 5e-3})
    ours = trained("online", True, tmp_path, args=args)
    assert_same_training(theirs, ours, (*OVER_PADDING, "learning_rate", "grad_norm"))


def test_a_beta_for_each_epoch(tmp_path: Path) -> None:
    """With several, TRL's second step is an IndexError or a TypeError."""
    args = {"beta": [0.2, 0.4], "num_train_epochs": 3, "max_steps": -1, "per_device_train_batch_size": 6}
    trainer = trained("online", True, tmp_path, args=args)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["beta"] for log in logs] == [0.2, 0.2, 0.4, 0.4, 0.4, 0.4]
    for log in logs:
        assert log["objective/non_score_reward"] == pytest.approx(-log["beta"] * log["objective/kl"], rel=1e-4)


def test_a_beta_set_later(tmp_path: Path) -> None:
    trainer = make("online", True, tmp_path)
    trainer.beta = 0.7
    assert trainer.beta == trainer.chunked_loss.beta == 0.7
    trainer.train()
    assert trainer.state.log_history[0]["beta"] == 0.7


def test_the_beta_is_the_loss_s_or_a_subclass_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL reads its ``beta`` at each step."""
    assert make("online", True, tmp_path, loss=SimPOLoss(beta=2.0)).beta == 2.0
    assert make("online", True, tmp_path, loss=Lead()).beta == 0.1
    falling = property(lambda self: 0.5 / (1 + self.state.global_step), lambda self, value: None)
    monkeypatch.setattr(KIND, "ours", type("Mine", (KIND.ours,), {"beta": falling}))
    logs = trained("online", True, tmp_path, args={"max_steps": 2}).state.log_history
    assert [log["beta"] for log in logs if "loss" in log] == [0.5, 0.25]


def test_tokens_that_no_state_predicts_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing of the prompts is left, TRL takes each token's probability behind that very token."""
    args = {"max_length": 6, **ALL_OF_A_LENGTH}
    trainer = make("online", True, tmp_path, model=parts.model(torch.float64), args=args)
    loss, batch, _ = step_of(trainer, monkeypatch)
    assert batch["input_ids"].shape == (8, 6) and batch["completion_mask"].all()
    c, r = eager_logps(trainer.model, batch).chunk(2)
    rc, rr = eager_logps(trainer.ref_model, batch).chunk(2)
    torch.testing.assert_close(loss, -F.logsigmoid(0.1 * ((c - r) - (rc - rr))).mean(), rtol=1e-9, atol=1e-12)


def test_evaluates_what_is_sampled(tmp_path: Path) -> None:
    """TRL's calls the model with texts."""
    trainer = make("online", True, tmp_path, args={"eval_strategy": "steps", "eval_steps": 2})
    trainer.train()
    logged = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert len(logged) == 2 and {"eval_objective/scores", "eval_rewards/margins", "eval_beta"} <= logged[0].keys()
    found = trainer.evaluate(metric_key_prefix="held_out")
    assert {"held_out_loss", "held_out_objective/kl"} <= found.keys()
    assert all(p.grad is None or not p.grad.any() for p in trainer.model.parameters())


def test_resumes_where_it_was(tmp_path: Path) -> None:
    args = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = trained("online", True, tmp_path, args=args)
    resumed = make("online", True, tmp_path, args=args)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for p, q in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_what_vllm_generates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As TRL hands it over: lists padded to ``max_new_tokens``."""
    trainer = make("online", True, tmp_path)
    monkeypatch.setattr(trainer.args, "use_vllm", True)
    monkeypatch.setattr(trainer, "vllm_mode", "colocate", raising=False)
    monkeypatch.setattr(trainer, "generation_config", SimpleNamespace(max_tokens=6))
    samples = [[5, 7, 1], [4, 4], [6, 8, 10, 12, 14, 16], [9, 1]]
    monkeypatch.setattr(trainer, "_generate_vllm_colocate", lambda *_: (samples, [[3], [4, 5], [3], [4, 5]]))
    trainer.compute_loss(trainer.model.train(), {"prompt": ["w0", "w1 w2"]})
    assert trainer.stats["objective/scores"] == [
        sum(parts.odd_words(["w2 w4", "w1 w1", "w3 w5 w7 w9 w11 w13", "w6"])) / 4
    ]


# --- pieces ----------------------------------------------------------------------------------------------------------


def test_chosen_completions_come_first_and_prompts_stay() -> None:
    ids = torch.arange(12).view(6, 2)
    sampled = Sampled(torch.arange(6)[:, None] % 3, torch.ones(6, 1), ids, ids + 1, {})
    found = sampled.chosen_first(torch.tensor([True, False, True]))
    assert found.ids.tolist() == ids[[0, 4, 2, 3, 1, 5]].tolist() and torch.equal(found.mask, found.ids + 1)
    assert torch.equal(found.prompt_ids, sampled.prompt_ids)


@pytest.mark.parametrize("room", [5, 3, 2, 1])
def test_prompts_lose_what_there_is_no_room_for(room: int) -> None:
    ids, mask = torch.arange(6).view(2, 3), torch.ones(2, 3, dtype=torch.long)
    batch = Sampled(ids, mask, ids[:, :2] + 9, mask[:, :2], {}).batch(room)
    kept = max(room - 2, 0)
    assert batch["input_ids"].tolist() == torch.cat([ids[:, 3 - kept :], ids[:, :2] + 9], 1).tolist()
    assert batch["completion_mask"].tolist() == [[0] * kept + [1, 1]] * 2
    pictures = Sampled(ids, mask, ids[:, :2], mask[:, :2], {"pixel_values": 7}).batch(room)
    assert pictures["input_ids"].shape == (2, 5) and pictures["pixel_values"] == 7


def test_conversations_have_places_for_pictures() -> None:
    said = [{"role": role, "content": "so"} for role in ("system", "user", "assistant")]
    text = {"type": "text", "text": "so"}
    assert with_places(said) == [
        {"role": "system", "content": [text]},
        {"role": "user", "content": [{"type": "image"}, text]},
        said[2],
    ]
    assert with_places("so") == "so" and with_places(with_places(said)) == with_places(said)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": KTOLoss()}, "expected loss to be a PairLoss, got KTOLoss"),
        ({"args": {"loss_type": "hinge"}}, r"one of \['sigmoid', 'ipo'\], got 'hinge' \(others are given as loss=\)"),
        ({"args": {"beta": 0.3}, "loss": IRPOLoss(beta=0.2)}, "got beta=0.3 and IRPOLoss with 0.2"),
        ({"args": {"beta": [0.3, 0.2]}, "loss": IRPOLoss(beta=0.2)}, "got beta=0.3 and IRPOLoss with 0.2"),
        ({"args": {"loss_type": "ipo"}, "loss": DPOLoss()}, "got loss_type='ipo' and DPOLoss with 'sigmoid'"),
        ({"args": {"beta": [0.1, 0.2]}, "loss": SimPOLoss(beta=2.0)}, "got beta=0.1 and SimPOLoss with 2.0"),
        ({"args": {"beta": [0.1, 0.2]}, "loss": Lead()}, "got beta=0.1 and Lead, which has none"),
        ({"args": {"beta": [0.1, -0.2]}}, "expected beta to be a positive, finite number, got -0.2"),
        ({"args": {"beta": []}}, r"expected beta to be a number, or one for each epoch, got \[\]"),
        ({"loss_options": {"beta": 0.3}}, "expected beta in args"),
        ({"compute_metrics": dict}, "expected no compute_metrics"),
        ({"reward_funcs": None}, "`reward_funcs` must be provided"),
    ],
)
def test_refusals(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        make("online", True, tmp_path, **options)


def test_arguments_are_asked_for() -> None:
    with pytest.raises(TypeError, match="expected args for ChunkedOnlineDPOTrainer, got None"):
        KIND.ours(model=parts.model(), reward_funcs=parts.odd_words, train_dataset=parts.prompts())


def test_a_method_of_a_subclass_that_nothing_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KIND, "ours", type("Mine", (KIND.ours,), {"_forward": lambda *args: None}))
    with pytest.raises(TypeError, match=r"expected no _forward of Mine: .* Give loss="):
        make("online", True, tmp_path)


def test_what_agrees_is_taken(tmp_path: Path) -> None:
    loss = DPOLoss(0.3, compiled=False)
    assert make("online", True, tmp_path, loss=loss).chunked_loss is loss  # the default of args says nothing
    assert make("online", True, tmp_path, loss=loss, args={"beta": [0.3]}).chunked_loss is loss
