"""What CPO and ORPO share: pairs, without a reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from chunked_embed import LossOutput

from ._base import Chunked, pair_sums


class Concatenated(Chunked):
    """CPO and ORPO: chosen and rejected sequences as one batch."""

    concatenated_inputs: Any
    aux_loss_coef: float
    compute_metrics: Any
    uncalled = ("cpo_loss", "odds_ratio_loss", "get_batch_logps", "concatenated_forward")

    def _default_config(self) -> Any:
        raise TypeError(f"expected args for {type(self).__name__}, got None: TRL has none by default")

    def _check_loss(self, args: Any) -> None:
        if self.chunked_loss.takes_reference:
            raise ValueError(
                f"expected a loss without a reference, got {type(self.chunked_loss).__name__}, which compares with one"
            )

    @property
    def aux_loss_weight(self) -> float:
        return self.aux_loss_coef if self.aux_loss_enabled else 0.0

    def _nll_target(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        return None

    def _means(self, out: LossOutput) -> dict[str, float]:
        """Of pairs without those that fill up the last batch of several processes, as in TRL; of tokens with them."""
        sums = pair_sums(out)
        each = [name for name in sums if out.metrics[name].dim() == 1 and name not in (out.counts or {})]
        table = torch.stack([out.metrics[name].float() for name in each], 1)
        of_pairs = self.accelerator.gather_for_metrics(table).mean(0)
        others = {name: pair for name, pair in sums.items() if name not in each}
        found = torch.cat([of_pairs, self.table_of(others).flatten()]).tolist()  # in one transfer
        pairs, rest = dict(zip(each, found)), found[len(each) :]
        means = self.means_in(others, [rest[k : k + 2] for k in range(0, len(rest), 2)]) | pairs
        return {name: means[name] for name in sums if name in means}

    def get_batch_loss_metrics(
        self, model: nn.Module, batch: Mapping[str, Any], train_eval: str = "train"
    ) -> tuple[Tensor, dict[str, float]]:
        padding = getattr(self, "padding_value", self.processing_class.pad_token_id)  # ORPOConfig has one
        both = self.concatenated_inputs(batch, padding_value=padding, device=self.accelerator.device)
        both = {name.removeprefix("concatenated_"): value for name, value in both.items()}
        arguments = {name: both[name] for name in ("input_ids", "attention_mask")} | {"use_cache": False}
        given = {"nll_target": self._nll_target(both)} if self.chunked_loss.takes_nll_target else {}
        self.check_once(model, arguments)
        out = self.run_loss(model, arguments, both["labels"][:, 1:], self.chunked_loss, **given)
        means = self._means(out)
        if self.chunked_loss.token_metrics or self.compute_metrics is not None:  # which TRL gives these
            means = {"logits/chosen": 0.0, "logits/rejected": 0.0} | means
        prefix = "eval_" if train_eval == "eval" else ""
        return out.loss, {f"{prefix}{name}": mean for name, mean in means.items()}
