"""What trainers of pairs with a reference share: DPO, over a dataset's pairs or sampled ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ._base import Chunked


class Referenced(Chunked):
    """Pairs, chosen first, with a mask of their completions; scored by a reference too, where the loss has one."""

    precompute_ref_logps = False
    """Whether a batch has the reference's log-probabilities."""

    @staticmethod
    def _split(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor]:
        """-> the model's arguments, and the target of each state but the last."""
        ours = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")
        target = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)[:, 1:]
        return {**{k: v for k, v in inputs.items() if k not in ours}, "use_cache": False}, target

    def compute_ref_log_probs(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the chosen and of the rejected completions, each ``(B,)``, under the reference."""
        arguments, target = self._split(inputs)
        with self._as_reference(model):
            logps = self._token_logps(model, arguments, target)
        tail_weight = self.chunked_loss.tail_weight
        if tail_weight is not None:
            used = target != -100
            shared = used.sum(1).view(2, -1).amin(0).repeat(2)[:, None]
            logps = torch.where(used.cumsum(1) <= shared, logps, tail_weight * logps)
        chosen, rejected = logps.double().sum(1).chunk(2)  # like the policy's, from which they are subtracted
        return chosen, rejected

    def _reference(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The loss's arguments of the reference."""
        loss = self.chunked_loss
        if loss.takes_reference is False:
            return {}
        if loss.needs_kl:
            (arguments, target), model = self._split(inputs), self._reference_model
            with self._as_reference(model):
                self.check_once(model, arguments, "the reference")
                return {"ref": self.frozen_head(model, arguments, target)}
        if self.precompute_ref_logps:
            logps = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        else:
            logps = self.compute_ref_log_probs(self._reference_model, inputs)
        return {"ref_logps": torch.cat(logps)}
