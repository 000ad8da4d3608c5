"""The trainers under FSDP2 with outputs cast to bfloat16, beside themselves without: on as many processes as there are.

Every trainer's policy equals its reference, or its teacher.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

sys.path.append(str(Path(__file__).parent.parent / "distill"))

import trainer_parts
import trl_parts
import trl_zoo
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from trl.experimental.gkd import GKDConfig

from alignment import TDPOLoss
from distill import DistillLoss
from distill.trl import ChunkedGKDTrainer

PLAIN = {"compiled": False}
SETTINGS = {
    "per_device_train_batch_size": 4,
    "max_steps": 1,
    "logging_steps": 1,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "learning_rate": 0.0,
    "optim": "sgd",
    "save_strategy": "no",
    "eval_strategy": "no",
    "disable_tqdm": True,
    "gradient_checkpointing": False,
}


def aligned(kind: str, folder: Path, dtype: torch.dtype, **options: Any) -> Any:
    if (trl_zoo.KINDS | trl_zoo.SAMPLING)[kind].has_reference:
        options["ref_model"] = trl_parts.model(dtype)
    args = SETTINGS | options.pop("args", {})
    return trl_zoo.make(kind, True, folder, model=trl_parts.model(dtype), args=args, **options)


def sampled(folder: Path, dtype: torch.dtype) -> Any:
    """What both trainers sample from one batch is the same."""
    trainer = aligned("online", folder, dtype, args={"generation_kwargs": {"min_new_tokens": 6}})
    compute_loss = trainer.compute_loss

    def seeded(model: Any, inputs: Any, **kw: Any) -> Any:
        torch.manual_seed(sum(inputs["number"]))
        return compute_loss(model, inputs, **kw)

    trainer.compute_loss = seeded
    return trainer


def distilled(folder: Path, dtype: torch.dtype) -> Any:
    loss = DistillLoss([("ce", 0.5), ("kl", 0.5)], compiled=False)
    models = {"model": trainer_parts.student(dtype), "teacher_model": trainer_parts.student(dtype)}
    return trainer_parts.trainer(folder, loss=loss, args=SETTINGS, **models)


def on_policy(folder: Path, dtype: torch.dtype) -> Any:
    said = [{"user": row["prompt"], "assistant": row["chosen"].strip()} for row in trl_parts.pairs()]
    data = [{"messages": [{"role": role, "content": text} for role, text in row.items()]} for row in said]
    return ChunkedGKDTrainer(
        trainer_parts.student(dtype),
        trainer_parts.student(dtype),
        GKDConfig(str(folder), lmbda=0.0, **SETTINGS),
        train_dataset=trl_parts.Dataset.from_list(data),
        processing_class=trainer_parts.tokenizer(),
        loss_options=PLAIN | {"weight_hard": 0.5},
    )


KINDS: dict[str, Callable[[Path, torch.dtype], Any]] = {
    "dpo": lambda *a: aligned("dpo", *a),
    "dpo, precomputed": lambda *a: aligned("dpo", *a, args={"precompute_ref_log_probs": True}),
    "tdpo": lambda *a: aligned("dpo", *a, loss=TDPOLoss(compiled=False)),
    "kto": lambda *a: aligned("kto", *a),
    "bco": lambda *a: aligned("bco", *a),
    "cpo": lambda *a: aligned("cpo", *a),
    "orpo": lambda *a: aligned("orpo", *a),
    "tpo": lambda *a: aligned("tpo", *a),
    "online": sampled,
    "distill": distilled,
    "gkd": on_policy,
}
LOGGED: dict[str, dict[str, float]] = {  # where the policy is its reference
    "dpo": {"loss": math.log(2), "rewards/margins": 0.0},
    "dpo, precomputed": {"loss": math.log(2), "rewards/margins": 0.0},
    "tdpo": {"loss": math.log(2), "rewards/margins": 0.0},
    "kto": {"loss": 0.5, "rewards/chosen": 0.0, "rewards/rejected": 0.0, "kl": 0.0},
    "bco": {"loss": math.log(2), "rewards/margins": 0.0},
    "online": {"rewards/margins": 0.0, "objective/kl": 0.0},  # TRL rounds the loss that is logged
    "distill": {"kl": 0.0, "teacher_agreement": 1.0},
    "gkd": {"jsd": 0.0, "teacher_agreement": 1.0},
}
CAST = {"output_dtype": torch.bfloat16}
NAMES = [f"{kind}, float64" for kind in KINDS]
# What is precomputed comes from models that nothing has sharded or rounded.
NAMES += [f"{kind}, bfloat16" for kind in KINDS if kind != "dpo, precomputed"]
HALF = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32, **CAST}  # accelerate's bf16, all but the sums


def shard(model: Any, half: bool) -> None:
    """What is cast is what leaves the head and the model; in half precision also what leaves each layer, as there."""
    mesh, policy = init_device_mesh("cpu", (dist.get_world_size(),)), MixedPrecisionPolicy(**(HALF if half else CAST))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, **({"mp_policy": policy} if half else {}))
    fully_shard(model.lm_head, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def models(trainer: Any) -> list[Any]:
    found = (getattr(trainer, name, None) for name in ("model", "ref_model", "teacher_model"))
    return [model for model in found if model is not None]


def step(trainer: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a batch, and its gradients."""
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    grown = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.detach(), {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in grown.items()}


def check(name: str, rank: int) -> None:
    """One batch a process: losses, references, gradients to the last digits; and what is logged at a rate of zero."""
    kind, precision = name.rsplit(", ", 1)
    half = precision == "bfloat16"
    with tempfile.TemporaryDirectory() as folder:
        alone, trainer = (KINDS[kind](Path(folder), torch.float32 if half else torch.float64) for _ in range(2))
    batches = [alone._prepare_inputs(batch) for batch in alone.get_train_dataloader()][: dist.get_world_size()]
    for model in models(trainer):
        shard(model, half)
    for parameter in (p for model in models(alone) for p in model.parameters() if half):
        parameter.data = parameter.data.bfloat16()  # as under the policy, which leaves buffers alone

    steps = [step(alone, batch) for batch in batches]
    loss, found = step(trainer, batches[rank])
    close = {"rtol": 2e-2, "atol": 2e-3} if half else {"rtol": 1e-9, "atol": 1e-12}
    assert loss.dtype == (torch.float32 if half else torch.float64)
    torch.testing.assert_close(loss, steps[rank][0], rtol=1e-5 if half else 1e-12, atol=0.0)
    assert found.keys() == steps[0][1].keys()
    for key, gradient in found.items():
        expected = torch.stack([gradients[key].to(gradient) for _, gradients in steps]).mean(0)
        torch.testing.assert_close(gradient, expected, **close, msg=lambda text, key=key: f"{key}: {text}")
    if getattr(trainer, "ref_model", None) is not None and "input_ids" in batches[rank]:
        scored = [t.compute_ref_log_probs(t.ref_model, batches[rank]) for t in (trainer, alone)]
        for ours, theirs in zip(*scored, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-4 if half else 1e-9)

    trainer.train()
    for key, value in LOGGED.get(kind, {}).items():
        assert trainer.state.log_history[0][key] == pytest.approx(value, abs=1e-6, rel=1e-6), key


def check_adapter(kind: str, checks_logits: bool) -> None:
    """The policy is its own reference with its adapter off: FSDP2 looks once, at the first forward, at what learns."""
    config = peft.LoraConfig(target_modules=["q_proj"], r=4, task_type="CAUSAL_LM", init_lora_weights=False)
    with tempfile.TemporaryDirectory() as folder:
        options = {"args": SETTINGS, "peft_config": config, "check": checks_logits}
        trainer = trl_zoo.make(kind, True, Path(folder), model=trl_parts.model(), **options)
    mesh, policy = init_device_mesh("cpu", (dist.get_world_size(),)), MixedPrecisionPolicy(**HALF)
    for unit in (*trainer.model.get_base_model().model.layers, trainer.model):
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    _, found = step(trainer, trainer._prepare_inputs(next(iter(trainer.get_train_dataloader()))))
    assert len(found) == 2 and all("lora" in name and g.abs().max() > 0 for name, g in found.items())


SAMPLED = {"grpo": {"entropy_coef": 0.1, "top_entropy_quantile": 0.5}, "rloo": {}}


def check_sampled(kind: str, rank: int) -> None:
    """Completions that a policy which is not sharded samples, one batch a process: losses, log-probabilities and
    gradients to the last digits."""
    args = SETTINGS | SAMPLED[kind]
    with tempfile.TemporaryDirectory() as folder:
        made = [trl_parts.model(torch.float64) for _ in range(2)]
        alone, trainer = (trl_zoo.make(kind, True, Path(folder), model=policy, args=args) for policy in made)
    for each in (alone, trainer):
        each.current_gradient_accumulation_steps = 1  # as ``train`` says at each step
    torch.manual_seed(7)
    batches = [alone._prepare_inputs(batch) for batch in alone.get_train_dataloader()][: dist.get_world_size()]
    for model in models(trainer):
        shard(model, half=False)
    steps = [step(alone, batch) for batch in batches]
    loss, found = step(trainer, batches[rank])
    torch.testing.assert_close(loss, steps[rank][0], rtol=1e-12, atol=1e-14)
    for key, gradient in found.items():
        expected = torch.stack([gradients[key] for _, gradients in steps]).mean(0)
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12, msg=lambda text, k=key: f"{k}: {text}")
    mine = batches[rank]
    ids, mask = (
        torch.cat([mine[f"{part}_{name}"] for part in ("prompt", "completion")], 1) for name in ("ids", "mask")
    )
    with torch.no_grad():
        scored = [t._get_per_token_logps_and_entropies(t.model, ids, mask, 4, 2)[0] for t in (trainer, alone)]
    torch.testing.assert_close(*scored, rtol=0.0, atol=1e-9)
