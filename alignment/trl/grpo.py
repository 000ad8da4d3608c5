"""GRPO and its kin: groups of sampled completions, whose rewards make advantages."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from trl import GRPOTrainer
from trl.trainer import grpo_trainer

from .. import policy as AP
from ..grpo import GRPOLoss
from ._policy import Policy, Scoring, mean_over_processes
from ._settings import Setting, Settings

__all__ = ["ChunkedGRPOTrainer"]

OF_ARGS = (*AP.SAPO, *AP.VESPO, "delta", "use_bias_correction_kl")
"""Numbers that TRL's trainer reads in its ``args``, at each step."""


class ChunkedGRPOTrainer(Policy, Scoring, GRPOTrainer):
    """``trl.GRPOTrainer`` on the chunked engine: its arguments, and those of ``alignment.trl``.

    ``loss`` takes an ``alignment.GRPOLoss``. A policy's update takes three products, but with ``top_entropy_quantile``
    below 1, which compares all tokens before the loss is known; log-probabilities of the policy that sampled and of the
    reference take one.

    Example:
        >>> from datasets import Dataset
        >>> from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
        >>> from trl import GRPOConfig
        >>> from alignment.trl import ChunkedGRPOTrainer
        >>> tokenizer = AutoTokenizer.from_pretrained("sentence-transformers/all-MiniLM-L6-v2", eos_token="[SEP]")
        >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=102, **sizes))
        >>> data = Dataset.from_list([{"prompt": "The plane"}, {"prompt": "The bread"}])
        >>> def short(completions, **_):
        ...     return [-float(len(text)) for text in completions]
        >>> options = {"bf16": False, "max_steps": 1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
        >>> batch = {"per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 4}
        >>> args = GRPOConfig("runs", **batch, **options)
        >>> trainer = ChunkedGRPOTrainer(model, short, args, train_dataset=data, processing_class=tokenizer)
        >>> trainer.train().global_step
        {...}
        1
    """

    uncalled = (*Policy.uncalled, "get_off_policy_mask", "get_gamma_weights")
    _loss_base = GRPOLoss
    _trl_module = grpo_trainer
    _trl_losses: ClassVar[tuple[type[GRPOLoss], ...]] = (GRPOLoss,)
    _settings: ClassVar[Settings] = {
        "epsilon": Setting("epsilon_low"),
        "off_policy_mask_threshold": Setting("off_policy_threshold"),
        **{
            name: Setting(name)
            for name in (
                "loss_type",
                "beta",
                "epsilon_high",
                "importance_sampling_level",
                "top_entropy_quantile",
                "entropy_coef",
                "temperature",
                *OF_ARGS,
            )
        },
    }
    _followed: ClassVar[Mapping[str, str]] = {name: name for name in OF_ARGS}
    _owned = ("epsilon_low", "max_completion_length")
    _read_elsewhere = ("max_completion_length",)  # where completions are sampled
    # What is TRL's, in the class behind this one.
    current_gradient_accumulation_steps: int  # while it trains
    use_vllm: bool
    vllm_importance_sampling_correction: bool
    use_adaptive_entropy: bool
    entropy_coef: float
    _last_world_entropy: Any
    _entropy_window_stats: Any

    def __init__(self, *args: Any, **kw: Any) -> None:
        self._share = 1.0
        self._window: Tensor | None = None
        super().__init__(*args, **kw)

    def _make_loss(self, args: Any, options: dict[str, Any]) -> GRPOLoss:
        numbers: dict[str, Any] = {name: getattr(args, name) for name in (*OF_ARGS, "max_completion_length")}
        numbers["epsilon_low"] = args.epsilon
        numbers["epsilon_high"] = args.epsilon if args.epsilon_high is None else args.epsilon_high
        if args.loss_type in AP.POLICY_LOSSES:
            for name in GRPOLoss.readers(args.loss_type, args.beta):
                del numbers[name]  # TRL ignores it
        described: Any = GRPOLoss
        return described(
            args.loss_type,
            args.beta,
            importance_sampling_level=args.importance_sampling_level,
            off_policy_threshold=args.off_policy_mask_threshold,
            entropy_coef=args.entropy_coef,
            top_entropy_quantile=args.top_entropy_quantile,
            temperature=args.temperature,
            **numbers,
            **options,
        )

    def _check_loss(self, args: Any) -> None:
        super()._check_loss(args)
        if args.use_adaptive_entropy and not self.chunked_loss.token_metrics:
            raise ValueError(
                "expected token_metrics=True with use_adaptive_entropy, which reads the entropy, got False"
            )

    def _adapted(self, config: Any) -> Any:
        """TRL makes a reference, and a bonus of entropy, where its config says so; a callback finds the loss's numbers
        in it."""
        loss = self.chunked_loss
        names = {"beta", "entropy_coef", *self._followed} - loss.unread.keys()
        if told := {name: value for name in names if (value := getattr(loss, name)) != getattr(config, name)}:
            config = copy.copy(config)
            for name, value in told.items():
                setattr(config, name, value)
        return config

    # --- a step ---

    @property
    def aux_loss_weight(self) -> float:
        return super().aux_loss_weight / self._share

    def _compute_loss(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        self._follow_args()
        mode, loss = ("train" if self.model.training else "eval"), self.chunked_loss
        steps = getattr(self, "current_gradient_accumulation_steps", self.args.gradient_accumulation_steps)
        accumulated = float(steps) if mode == "train" else 1.0
        counts_items = loss.kind.weights is AP.per_item
        # Where the terms are divided by the tokens of all steps that are accumulated, what is added to them is not.
        self._share = accumulated if counts_items else 1.0
        given = self._given(inputs, mode, accumulated) | {"entropy_coef": self._entropy_bonus() / self._share}
        out = self._loss_in_forward(model, inputs, **given)
        self._log_step(mode, out)
        return out.loss if counts_items else out.loss / accumulated

    def _given(self, inputs: Mapping[str, Any], mode: str, accumulated: float) -> dict[str, Any]:
        """What the loss takes of a batch."""
        loss = self.chunked_loss
        given = {"advantages": inputs["advantages"], "old_logps": inputs.get("old_per_token_logps")}
        if loss.beta:
            given["ref_logps"] = inputs["ref_per_token_logps"]
        if self.use_vllm and self.vllm_importance_sampling_correction:
            given["importance_weights"] = inputs["importance_sampling_ratio"]
        if loss.off_policy_threshold is not None:
            given["sampling_logps"] = inputs.get("sampling_per_token_logps")
        if loss.kind.weights is AP.per_item:
            items = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
            given["num_items"] = items * accumulated / self.args.steps_per_generation if mode == "train" else items
        if loss.top_entropy_quantile < 1:
            given["entropy_mask"] = self._entropy_mask
        return given

    def _entropy_mask(self, entropies: Tensor, used: Tensor) -> Tensor:
        mask = self.get_high_entropy_mask(entropies, used, 1 - self.chunked_loss.top_entropy_quantile)
        self._window = torch.stack([(entropies * mask).sum(), mask.sum().to(entropies.dtype)]).detach()
        return mask

    def _entropy_bonus(self) -> float:
        """The weight of the entropy in this step."""
        if self.use_adaptive_entropy and not self._last_world_entropy <= self.args.entropy_target:
            return 0.0
        return self.entropy_coef

    def _log_step(self, mode: str, out: Any) -> None:
        sums, metrics = out.sums, out.metrics
        names = {"kl": "kl", "entropy": "entropy", "cispo_clip_ratio": "cispo_clip_ratio"}
        names["vespo/phi_seq"] = "vespo/phi_seq_mean"
        logged = {name: sums[ours] for ours, name in names.items() if ours in sums}
        aux_loss = metrics.get("aux_loss")
        if aux_loss is not None:
            logged["aux_loss"] = mean_over_processes(aux_loss)
        if self._entropy_bonus_enabled:
            added = 0.0 if aux_loss is None else self.aux_loss_weight * aux_loss
            logged["policy_loss"] = mean_over_processes(metrics.get("policy_loss", out.loss.detach() - added))
        self._keep_clips(mode, out, logged)
        if self._entropy_bonus_enabled:
            self._control_entropy(mode, sums.get("entropy"))

    def _control_entropy(self, mode: str, entropy: tuple[Tensor, Tensor] | None) -> None:
        """The weight of the entropy goes up or down with the mean over a step, of all processes."""
        if mode != "train":
            return
        if self.use_adaptive_entropy:
            assert entropy is not None  # token_metrics are on
            window = torch.stack([x.float() for x in entropy]) if self._window is None else self._window.float()
            before = self._entropy_window_stats
            self._entropy_window_stats = window if before is None else before + window
        self._window = None
        if not self.accelerator.sync_gradients:
            return
        if self.use_adaptive_entropy:
            total, count = self.accelerator.reduce(self._entropy_window_stats, reduction="sum")
            mean, args = (total / count.clamp(min=1.0)).item(), self.args
            step = args.entropy_coef_delta if mean <= args.entropy_target else -args.entropy_coef_delta
            self.entropy_coef = min(max(self.entropy_coef + step, args.entropy_coef_min), args.entropy_coef_max)
            self._last_world_entropy, self._entropy_window_stats = mean, None
        self._metrics[mode]["entropy_coef"].append(self.entropy_coef)
