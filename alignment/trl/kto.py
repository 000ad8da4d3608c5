"""KTO and BCO: single completions, with a reference."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from trl import KTOConfig, KTOTrainer
from trl.trainer import kto_trainer

from chunked_embed import LossOutput
from chunked_embed.trainers import Sums

from ..losses import BCOLoss, KTOLoss
from ..sequences import SequenceLoss
from ._base import Chunked
from ._settings import NOTHING, Setting, Settings

__all__ = ["BCO_STATE", "ChunkedBCOTrainer", "ChunkedKTOTrainer"]

BCO_STATE = "bco_running_mean.json"
"""The file of a checkpoint that holds the running mean of a ``BCOLoss``.

Example:
    >>> from alignment.trl import BCO_STATE
    >>> BCO_STATE
    'bco_running_mean.json'
"""
WITHOUT_KL = "apo_zero_unpaired"  # the loss type for which TRL scores no mismatched completions


def kto_type(loss: Any) -> Any:
    """The ``KTOConfig.loss_type`` of a loss."""
    if "kl" not in loss.takes_numbers:
        return WITHOUT_KL
    return loss.loss_type if isinstance(loss, KTOLoss) else NOTHING


class ChunkedKTOTrainer(Chunked, KTOTrainer):
    """``trl.KTOTrainer`` on the chunked engine: its arguments, and those of ``alignment.trl``.

    ``loss`` takes any ``alignment.SequenceLoss``. Mismatched completions are scored where it takes ``kl``. The running
    mean of a ``BCOLoss`` is saved with each checkpoint and comes back with ``resume_from_checkpoint``.

    Example:
        >>> from datasets import Dataset
        >>> from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
        >>> from trl import KTOConfig
        >>> from alignment.trl import ChunkedKTOTrainer
        >>> tokenizer = AutoTokenizer.from_pretrained("sentence-transformers/all-MiniLM-L6-v2", eos_token="[SEP]")
        >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=102, **sizes))
        >>> rows = [{"prompt": "The plane", "completion": " takes off.", "label": True}] * 2
        >>> rows += [{"prompt": "The plane", "completion": " is bread.", "label": False}] * 2
        >>> data = Dataset.from_list(rows)
        >>> reference = LlamaForCausalLM(model.config)
        >>> options = {"bf16": False, "max_steps": 1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
        >>> args = KTOConfig("runs", per_device_train_batch_size=2, **options)
        >>> trainer = ChunkedKTOTrainer(model, reference, args, train_dataset=data, processing_class=tokenizer)
        >>> trainer.train().global_step
        {...}
        1
    """

    uncalled = ("_compute_kl_logps",)
    _loss_base = SequenceLoss
    _trl_module = kto_trainer
    _trl_losses: ClassVar[tuple[type[SequenceLoss], ...]] = (KTOLoss,)
    _settings: ClassVar[Settings] = {
        "loss_type": Setting("loss_type", read=kto_type),
        "beta": Setting("beta"),
        "desirable_weight": Setting("desirable_weight", without=1.0),
        "undesirable_weight": Setting("undesirable_weight", without=1.0),
    }

    def _adapted(self, config: Any) -> Any:
        """TRL scores mismatched completions by the name of the loss."""
        if kto_type(self.chunked_loss) == WITHOUT_KL:
            config = copy.copy(config)
            config.loss_type = WITHOUT_KL
        return config

    def _make_loss(self, args: Any, options: dict[str, Any]) -> SequenceLoss:
        return KTOLoss(args.beta, args.loss_type, args.desirable_weight, args.undesirable_weight, **options)

    @staticmethod
    def _split(inputs: Mapping[str, Any], mismatched: bool = False) -> tuple[dict[str, Any], Tensor]:
        """-> the model's arguments, and the target of each state but the last; of the mismatched completions, too."""
        found = {name: value for name, value in inputs.items() if not name.startswith("KL_")}
        if mismatched:
            found |= {name[3:]: value for name, value in inputs.items() if name.startswith("KL_")}
        target = found["input_ids"].masked_fill(found.pop("completion_mask") == 0, -100)[:, 1:]
        ours = ("label", "ref_logps", "ref_KL_logps")
        return {**{k: v for k, v in found.items() if k not in ours}, "use_cache": False}, target

    def _kl_logps(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor | None:
        """Of the mismatched completions, ``(B,)``."""
        if not self.calculate_KL:
            return None
        with torch.no_grad():
            return self._token_logps(model, *self._split(inputs, mismatched=True)).double().sum(1)

    def compute_ref_log_probs(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities ``(B,)`` of the completions under the reference, and of the mismatched ones."""
        with self._as_reference(model):
            return self._token_logps(model, *self._split(inputs)).double().sum(1), self._kl_logps(model, inputs)

    def _keywords(self, inputs: Mapping[str, Any], kl: Tensor | None) -> dict[str, Any]:
        return {"kl": kl} if "kl" in self.chunked_loss.takes_numbers else {}

    def _compute_loss(self, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool) -> Any:
        mode = "train" if self.model.training else "eval"
        batch = {k: v.to(self.accelerator.device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        arguments, target = self._split(batch)
        self.check_once(model, arguments)  # before its adapters are off: FSDP2 looks once at what learns
        if self.precompute_ref_logps:
            ref_logps, ref_kl_logps = batch["ref_logps"], batch.get("ref_KL_logps")
        else:
            ref_logps, ref_kl_logps = self.compute_ref_log_probs(self._reference_model, batch)
        kl = None
        if (kl_logps := self._kl_logps(model, batch)) is not None:
            assert ref_kl_logps is not None
            here = (kl_logps - ref_kl_logps).mean()
            kl = self.accelerator.gather_for_metrics(here).mean().clamp(min=0)
        desirable = torch.as_tensor(batch["label"], dtype=torch.bool, device=target.device)
        self.chunked_loss.train(mode == "train")
        given = {"preference_labels": desirable, "ref_logps": ref_logps, **self._keywords(batch, kl)}
        out = self.run_loss(model, arguments, target, self.chunked_loss, **given)
        self._store(mode, self._sums(out), batch["attention_mask"])
        return self.with_outputs(model, arguments, out.loss, return_outputs)

    def _adjusted(self, means: dict[str, float]) -> dict[str, float]:
        if {"rewards/chosen", "rewards/rejected"} <= means.keys():
            means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
        return means

    @staticmethod
    def _sums(out: LossOutput) -> Sums:
        """What TRL logs: of the desirable (chosen) and of the other (rejected) sequences, or their tokens."""
        sides = [f"{name}/{side}" for name in ("rewards", "logps", "logits") for side in ("chosen", "rejected")]
        logged = {"kl", "delta", "entropy", "aux_loss", *sides}
        return {name: pair for name, pair in out.sums.items() if name in logged}

    # --- the running mean of a BCO loss ---

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        loss = self.chunked_loss
        if isinstance(loss, BCOLoss) and self.args.should_save:
            state = {"mean": loss.running_mean.item(), "count": loss.running_count.item()}
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            (folder / BCO_STATE).write_text(json.dumps(state))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if not isinstance(self.chunked_loss, BCOLoss):
            return
        path = Path(resume_from_checkpoint) / BCO_STATE
        if not path.exists():
            raise FileNotFoundError(f"expected {BCO_STATE} in {resume_from_checkpoint}: a checkpoint of this trainer")
        state = json.loads(path.read_text())
        self.chunked_loss.running_mean.fill_(state["mean"])
        self.chunked_loss.running_count.fill_(state["count"])


class ChunkedBCOTrainer(ChunkedKTOTrainer):
    """Binary classifier optimisation, which TRL no longer has, over the data and the arguments of its KTO trainer.

    The class weights of ``KTOConfig`` are refused: it has none, whatever TRL's constructor recommends for unbalanced
    classes. A subclass may weight the sequences (to match the prompts of the two classes, say):
    ``sequence_weight(inputs)`` -> (B,). https://arxiv.org/abs/2404.04656

    Example:
        >>> from datasets import Dataset
        >>> from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
        >>> from trl import KTOConfig
        >>> from alignment.trl import ChunkedBCOTrainer
        >>> tokenizer = AutoTokenizer.from_pretrained("sentence-transformers/all-MiniLM-L6-v2", eos_token="[SEP]")
        >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=102, **sizes))
        >>> rows = [{"prompt": "The plane", "completion": " takes off.", "label": True}] * 2
        >>> rows += [{"prompt": "The plane", "completion": " is bread.", "label": False}] * 2
        >>> data = Dataset.from_list(rows)
        >>> reference = LlamaForCausalLM(model.config)
        >>> options = {"bf16": False, "max_steps": 1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
        >>> args = KTOConfig("runs", per_device_train_batch_size=2, **options)
        >>> trainer = ChunkedBCOTrainer(model, reference, args, train_dataset=data, processing_class=tokenizer)
        >>> trainer.train().global_step
        {...}
        1
    """

    _loss_base = BCOLoss
    _trl_losses = ()

    def _default_config(self) -> Any:
        return KTOConfig("bco")

    def _make_loss(self, args: Any, options: dict[str, Any]) -> SequenceLoss:
        return BCOLoss(args.beta, **options)

    def sequence_weight(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Weights of the batch's sequences, (B,), or None."""
        return None

    def _keywords(self, inputs: Mapping[str, Any], kl: Tensor | None) -> dict[str, Any]:
        return {"sequence_weight": self.sequence_weight(inputs)}
