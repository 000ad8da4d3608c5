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
    """

    _trl_losses = (ORPOLoss,)
    _settings: ClassVar[Settings] = {"beta": Setting("beta")}

    def _make_loss(self, args: Any, options: dict[str, Any]) -> PairLoss:
        return ORPOLoss(args.beta, **options)

    def _nll_target(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Prompt and completion, as in the paper."""
        return torch.where(batch["attention_mask"] == 1, batch["input_ids"], -100)[:, 1:]
