"""TPO: pairs and a gold completion, without a reference model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn
from trl.experimental.tpo import TPOTrainer

from ..losses import TPOLoss
from ..triples import TripleLoss
from ._base import AsConfigured, pair_sums
from ._settings import Setting, Settings

__all__ = ["ChunkedTPOTrainer"]


class ChunkedTPOTrainer(AsConfigured, TPOTrainer):
    """``trl.experimental.tpo.TPOTrainer`` on the chunked engine: its arguments, and those of ``alignment.trl``.

    ``loss`` takes any ``alignment.TripleLoss``. Rows have a ``reference`` beside ``chosen`` and ``rejected``: the gold
    completion. With ``tpo_alpha=0`` it is not read.

    Example:
        >>> from datasets import Dataset
        >>> from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
        >>> from trl.experimental.tpo import TPOConfig
        >>> from alignment.trl import ChunkedTPOTrainer
        >>> tokenizer = AutoTokenizer.from_pretrained("sentence-transformers/all-MiniLM-L6-v2", eos_token="[SEP]")
        >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=102, **sizes))
        >>> row = {"prompt": "The plane", "chosen": " takes off.", "rejected": " is bread.", "reference": " departs."}
        >>> options = {"bf16": False, "max_steps": 1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
        >>> args = TPOConfig("runs", per_device_train_batch_size=2, **options)
        >>> data = Dataset.from_list([row] * 4)
        >>> trainer = ChunkedTPOTrainer(model, args, train_dataset=data, processing_class=tokenizer)
        >>> trainer.train().global_step
        {...}
        1
    """

    _loss_base = TripleLoss
    _trl_losses = (TPOLoss,)
    _trl_warns_of = ("label_smoothing",)
    _settings: ClassVar[Settings] = {
        "loss_type": Setting("loss_type"),
        "beta": Setting("beta"),
        "label_smoothing": Setting("label_smoothing", without=0.0),
        "tpo_alpha": Setting("alpha"),
        "tpo_l_gamma": Setting("gamma"),
    }

    def _adapted(self, config: Any) -> Any:
        """TRL collates gold completions by the weight of their NLL."""
        self._completions = self.chunked_loss.completions
        config = copy.copy(config)
        weight = getattr(self.chunked_loss, "alpha", 1.0) or 1.0  # of one's own loss it may be another number
        config.tpo_alpha = weight if self._completions == 3 else 0.0
        return config

    def _make_loss(self, args: Any, options: dict[str, Any]) -> TripleLoss:
        numbers = {"label_smoothing": args.label_smoothing, "gamma": args.tpo_l_gamma}
        for name in TPOLoss.readers(args.loss_type):
            del numbers[name]  # TRL ignores it
        return TPOLoss(args.beta, args.loss_type, args.tpo_alpha, **numbers, **options)

    def _compute_loss(self, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool) -> Any:
        if self.chunked_loss.completions != self._completions:
            raise ValueError(
                "expected tpo_alpha to stay zero, or to stay above it: batches have gold completions or not"
            )
        mode = "train" if self.model.training else "eval"
        arguments = {name: value for name, value in inputs.items() if name != "completion_mask"} | {"use_cache": False}
        target = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)[:, 1:]
        self.check_once(model, arguments)
        out = self.run_loss(model, arguments, target, self.chunked_loss)
        self._store(mode, pair_sums(out), inputs["attention_mask"])
        return self.with_outputs(model, arguments, out.loss, return_outputs)
