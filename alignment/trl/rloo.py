"""RLOO: sampled completions, each with the others' rewards as its baseline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from trl import RLOOTrainer
from trl.trainer import rloo_trainer

from ..grpo import RLOOLoss
from ._policy import Policy, Scoring, mean_over_processes
from ._settings import Setting, Settings

__all__ = ["ChunkedRLOOTrainer"]


class ChunkedRLOOTrainer(Policy, Scoring, RLOOTrainer):
    """``trl.RLOOTrainer`` on the chunked engine: its arguments, and those of ``alignment.trl``.

    ``loss`` takes an ``alignment.RLOOLoss``. A policy's update takes three products; log-probabilities of the policy
    that sampled and of the reference take one.

    Example:
        >>> from datasets import Dataset
        >>> from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
        >>> from trl import RLOOConfig
        >>> from alignment.trl import ChunkedRLOOTrainer
        >>> tokenizer = AutoTokenizer.from_pretrained("sentence-transformers/all-MiniLM-L6-v2", eos_token="[SEP]")
        >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=102, **sizes))
        >>> data = Dataset.from_list([{"prompt": "The plane"}, {"prompt": "The bread"}])
        >>> def short(completions, **_):
        ...     return [-float(len(text)) for text in completions]
        >>> options = {"bf16": False, "max_steps": 1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
        >>> batch = {"per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 4, "beta": 0.0}
        >>> args = RLOOConfig("runs", **batch, **options)
        >>> trainer = ChunkedRLOOTrainer(model, short, args, train_dataset=data, processing_class=tokenizer)
        >>> trainer.train().global_step
        {...}
        1
    """

    _loss_base = RLOOLoss
    _trl_module = rloo_trainer
    _trl_losses: ClassVar[tuple[type[RLOOLoss], ...]] = (RLOOLoss,)
    _settings: ClassVar[Settings] = {
        "epsilon": Setting("epsilon_low"),
        "epsilon_high": Setting("epsilon_high"),
        "temperature": Setting("temperature"),
    }
    _owned = ("epsilon_low",)

    def _make_loss(self, args: Any, options: dict[str, Any]) -> RLOOLoss:
        high = args.epsilon if args.epsilon_high is None else args.epsilon_high
        return RLOOLoss(args.epsilon, high, temperature=args.temperature, **options)

    def _compute_loss(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        mode = "train" if self.model.training else "eval"
        given = {"advantages": inputs["advantages"], "old_logps": inputs["old_logps"]}
        out = self._loss_in_forward(model, inputs, **given)
        logged = {name: out.sums[name] for name in ("entropy",) if name in out.sums}
        if "aux_loss" in out.metrics:
            logged["aux_loss"] = mean_over_processes(out.metrics["aux_loss"])
        self._keep_clips(mode, out, logged)
        return out.loss
