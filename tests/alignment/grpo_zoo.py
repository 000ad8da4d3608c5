"""Policy-gradient losses as TRL has them: its own ``_compute_loss``, on log-probabilities of whole logits, with no
trainer around it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from alignment import GRPOLoss, RLOOLoss

B, T, H, V = 5, 7, 6, 13
IGNORE = -100
MAX_LENGTH = 9
ITEMS = 37.0


@dataclass
class Batch:
    """Completions of unlike lengths, one of none and one with a hole, such as a tool's answer."""

    dtype: torch.dtype = torch.float64
    drift: float = 0.6
    leaves: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(3)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=g)

        for name, shape in {"hidden": (B, T, H), "weight": (V, H), "bias": (V,)}.items():
            self.leaves[name] = randn(*shape).to(self.dtype).requires_grad_()
        lengths = torch.tensor([7, 3, 0, 5, 6])[:, None]
        self.mask = torch.arange(T) < lengths
        self.mask[3, 1] = False
        self.ids = torch.randint(0, V, (B, T), generator=g)
        self.target = torch.where(self.mask, self.ids, IGNORE)
        logps = self.statistics()[0].detach().double()
        self.advantages = torch.tensor([1.3, -0.7, 0.4, -1.1, 0.0], dtype=torch.float64)
        self.old_logps, self.ref_logps, self.sampling_logps = (logps + self.drift * randn(B, T) for _ in range(3))
        self.of_tokens = self.advantages[:, None] + randn(B, T)
        self.importance_weights = (0.3 * randn(B, T)).exp()
        self.importance_weights[0, 2] = 0.0
        self.importance_weights[~self.mask] = 1.0  # as TRL has them: VESPO adds up their logarithms

    @property
    def head(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.leaves["hidden"], self.leaves["weight"], self.target

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies of all tokens."""
        log_p = (self.leaves["hidden"] @ self.leaves["weight"].T + self.leaves["bias"]).log_softmax(-1)
        return log_p.gather(-1, self.ids[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)


def alone() -> SimpleNamespace:
    """An accelerator of one process, as far as it is asked."""
    return SimpleNamespace(
        num_processes=1,
        sync_gradients=True,
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        reduce=lambda x, reduction: x,
        pad_across_processes=lambda x, dim, pad_index: x,
    )


OPTIONS = {
    "delta": None,
    "use_bias_correction_kl": False,
    "sapo_temperature_pos": 1.0,
    "sapo_temperature_neg": 1.05,
    "vespo_k_pos": 2.0,
    "vespo_lambda_pos": 3.0,
    "vespo_k_neg": 3.0,
    "vespo_lambda_neg": 2.0,
}


def theirs(x: Batch, case: dict[str, Any], given: tuple[str, ...]) -> tuple[Tensor, dict[str, float]]:
    """TRL's loss and what it logs."""
    from trl import GRPOTrainer

    logps, entropies = x.statistics()
    args = {name: case.get(name, default) for name, default in OPTIONS.items()}
    trainer = SimpleNamespace(
        accelerator=alone(),
        args=SimpleNamespace(**args, steps_per_generation=1),
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        loss_type=case.get("loss_type", "dapo"),
        beta=case.get("beta", 0.0),
        epsilon_low=case.get("epsilon_low", 0.2),
        epsilon_high=case.get("epsilon_high", 0.2),
        importance_sampling_level=case.get("importance_sampling_level", "token"),
        off_policy_mask_threshold=case.get("off_policy_threshold"),
        top_entropy_quantile=case.get("top_entropy_quantile", 1.0),
        max_completion_length=MAX_LENGTH,
        use_vllm="importance_weights" in given,
        vllm_importance_sampling_correction=True,
        _entropy_bonus_enabled=case.get("entropy_coef", 0.0) != 0,
        entropy_coef=case.get("entropy_coef", 0.0),
        use_adaptive_entropy=False,
        aux_loss_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, entropies, None),
    )
    for name in ("get_off_policy_mask", "get_gamma_weights"):
        setattr(trainer, name, getattr(GRPOTrainer, name))
    trainer.get_high_entropy_mask = lambda *a: GRPOTrainer.get_high_entropy_mask(trainer, *a)
    ids = torch.zeros(B, 1, dtype=torch.long)
    inputs: dict[str, Any] = {
        "prompt_ids": ids,
        "prompt_mask": torch.ones_like(ids),
        "completion_ids": x.ids,
        "completion_mask": x.mask.long(),
        "advantages": x.of_tokens if "of_tokens" in given else x.advantages,
        "num_items_in_batch": torch.tensor(ITEMS if "num_items" in given else float(x.mask.sum())),
    }
    names = {
        "old_logps": "old_per_token_logps",
        "importance_weights": "importance_sampling_ratio",
        "sampling_logps": "sampling_per_token_logps",
    }
    inputs |= {names[name]: getattr(x, name) for name in given if name in names}
    if trainer.beta:
        inputs["ref_per_token_logps"] = x.ref_logps
    # Tokens that count for nothing are infinite in no tensor, as padding is none of the model's.
    loss = GRPOTrainer._compute_loss(trainer, nn.Identity(), inputs)
    return loss, {name: values[0] for name, values in trainer._metrics["train"].items()}


def ours(x: Batch, case: dict[str, Any], given: tuple[str, ...], **options: Any) -> Any:
    """-> the loss and its call."""
    more = {"max_completion_length": MAX_LENGTH} if case.get("loss_type") == "dr_grpo" else {}
    loss = GRPOLoss(**case, **more, **options)
    call: dict[str, Any] = {name: getattr(x, name) for name in given if name not in ("of_tokens", "num_items")}
    if "num_items" in given:
        call["num_items"] = ITEMS
    if loss.beta:
        call["ref_logps"] = x.ref_logps
    call["advantages"] = x.of_tokens if "of_tokens" in given else x.advantages
    return loss, (*x.head,), {**call, "bias": x.leaves["bias"]}


TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
OLD = ("old_logps",)
CASES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {}
for name in TYPES:
    kind: dict[str, Any] = {"loss_type": name}
    if name == "cispo":
        kind["epsilon_high"] = 1.5
    if name == "sapo":
        kind["sapo_temperature_neg"] = 1.5  # TRL's are rounded to float32
    CASES |= {
        f"{name}": (kind | {"beta": 0.1}, OLD),
        f"{name}, on policy": (kind, ()),
        f"{name}, sequences": (kind | {"beta": 0.1, "importance_sampling_level": "sequence"}, OLD),
        f"{name}, biased kl": (kind | {"beta": 0.1, "use_bias_correction_kl": True}, OLD),
        f"{name}, biased kl of sequences": (
            kind | {"beta": 0.1, "use_bias_correction_kl": True, "importance_sampling_level": "sequence"}, OLD
        ),
        f"{name}, weights": (kind | {"beta": 0.1}, (*OLD, "importance_weights")),
        f"{name}, weights of sequences": (
            kind | {"importance_sampling_level": "sequence"}, (*OLD, "importance_weights")
        ),
        f"{name}, off policy": (kind | {"beta": 0.1, "off_policy_threshold": 0.1}, (*OLD, "sampling_logps")),
        f"{name}, off policy, sequences": (
            kind | {"off_policy_threshold": -0.1, "importance_sampling_level": "sequence"}, OLD
        ),
        f"{name}, entropy": (kind | {"entropy_coef": 0.3}, OLD),
        f"{name}, entropy, sequences": (kind | {"entropy_coef": 0.3, "importance_sampling_level": "sequence"}, OLD),
        f"{name}, high entropies": (
            kind | {"beta": 0.1, "top_entropy_quantile": 0.4, "entropy_coef": 0.3}, (*OLD, "importance_weights")
        ),
        f"{name}, of tokens": (kind, (*OLD, "of_tokens")),
        f"{name}, of tokens, sequences": (
            kind | {"beta": 0.1, "importance_sampling_level": "sequence", "off_policy_threshold": 0.1},
            (*OLD, "of_tokens", "sampling_logps", "importance_weights"),
        ),
    }  # fmt: skip
for name in ("grpo", "dapo", "luspo"):
    CASES[f"{name}, delta"] = {"loss_type": name, "delta": 1.1}, OLD
for name in ("dapo", "cispo", "vespo"):
    case, given = CASES[name]
    CASES[f"{name}, items"] = case, (*given, "num_items")


def rloo_theirs(x: Batch, case: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
    from trl import RLOOTrainer

    logps, entropies = x.statistics()
    trainer = SimpleNamespace(
        accelerator=alone(),
        model=SimpleNamespace(training=True),
        epsilon_low=case.get("epsilon_low", 0.2),
        epsilon_high=case.get("epsilon_high", 0.2),
        aux_loss_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, entropies, None),
    )
    ids = torch.zeros(B, 1, dtype=torch.long)
    inputs = {
        "prompt_ids": ids,
        "prompt_mask": torch.ones_like(ids),
        "completion_ids": x.ids,
        "completion_mask": x.mask.long(),
        "advantages": x.advantages,
        "old_logps": (x.old_logps * x.mask).sum(1),
    }
    loss = RLOOTrainer._compute_loss(trainer, nn.Identity(), inputs)
    return loss, {name: values[0] for name, values in trainer._metrics["train"].items()}


def rloo_ours(x: Batch, case: dict[str, Any], **options: Any) -> Any:
    return RLOOLoss(**case, **options), x.head, {"advantages": x.advantages, "bias": x.leaves["bias"]}
