"""ORPO: pairs, without a reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from trl.experimental.orpo import ORPOTrainer

from ..losses import ORPOLoss
from ..pairs import PairLoss
from ._concatenated import Concatenated
from ._settings import Setting, Settings

__all__ = ["ChunkedORPOTrainer"]


class ChunkedORPOTrainer(Concatenated, ORPOTrainer):
    """``trl.experimental.orpo.ORPOTrainer`` on the chunked engine: its arguments, and those of ``alignment.trl``.

    ``loss`` takes any ``alignment.PairLoss`` without a reference.

    Example:
        >>> from datasets import Dataset
        >>> from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
        >>> from trl.experimental.orpo import ORPOConfig
        >>> from alignment.trl import ChunkedORPOTrainer
        >>> tokenizer = AutoTokenizer.from_pretrained("sentence-transformers/all-MiniLM-L6-v2", eos_token="[SEP]")
        >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=102, **sizes))
        >>> data = Dataset.from_list([{"prompt": "The plane", "chosen": " takes off.", "rejected": " is bread."}] * 4)
        >>> options = {"bf16": False, "max_steps": 1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
        >>> args = ORPOConfig("runs", per_device_train_batch_size=2, **options)
        >>> trainer = ChunkedORPOTrainer(model, args=args, train_dataset=data, processing_class=tokenizer)
        >>> trainer.train().global_step
        {...}
        1
    """

    _trl_losses = (ORPOLoss,)
    _settings: ClassVar[Settings] = {"beta": Setting("beta")}

    def _make_loss(self, args: Any, options: dict[str, Any]) -> PairLoss:
        return ORPOLoss(args.beta, **options)

    def _nll_target(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Prompt and completion, as in the paper."""
        return torch.where(batch["attention_mask"] == 1, batch["input_ids"], -100)[:, 1:]
