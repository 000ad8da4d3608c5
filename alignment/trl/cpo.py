"""CPO, SimPO and AlphaPO: pairs, without a reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor
from trl.experimental.cpo import CPOTrainer

from chunked_embed.checks import FINITE
from chunked_embed.fields import KW_ONLY, number

from .. import functional as AF
from ..losses import AlphaPOLoss, CPOLoss, CPOSimPOLoss, SimPOLoss
from ..pairs import PairLoss, PairScores
from ._concatenated import Concatenated
from ._settings import NOTHING, Setting, Settings

__all__ = ["ChunkedCPOTrainer"]


def cpo_type(loss: Any) -> Any:
    """The ``CPOConfig.loss_type`` of a loss."""
    if isinstance(loss, (SimPOLoss, CPOSimPOLoss, AlphaPOLoss)):
        return "simpo"
    return loss.loss_type if isinstance(loss, CPOLoss) else NOTHING


class ChunkedCPOTrainer(Concatenated, CPOTrainer):
    """``trl.experimental.cpo.CPOTrainer`` on the chunked engine: its arguments, and those of ``alignment.trl``.

    ``loss`` takes any ``alignment.PairLoss`` without a reference.

    Example:
        >>> from datasets import Dataset
        >>> from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
        >>> from trl.experimental.cpo import CPOConfig
        >>> from alignment.trl import ChunkedCPOTrainer
        >>> tokenizer = AutoTokenizer.from_pretrained("sentence-transformers/all-MiniLM-L6-v2", eos_token="[SEP]")
        >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=102, **sizes))
        >>> data = Dataset.from_list([{"prompt": "The plane", "chosen": " takes off.", "rejected": " is bread."}] * 4)
        >>> options = {"bf16": False, "max_steps": 1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
        >>> args = CPOConfig("runs", per_device_train_batch_size=2, **options)
        >>> trainer = ChunkedCPOTrainer(model, args=args, train_dataset=data, processing_class=tokenizer)
        >>> trainer.train().global_step
        {...}
        1
    """

    _trl_losses = (PairLoss,)
    _trl_warns_of = ("label_smoothing",)
    _settings: ClassVar[Settings] = {
        "loss_type": Setting("loss_type", read=cpo_type),
        "beta": Setting("beta"),
        "label_smoothing": Setting("label_smoothing", without=0.0),
        "cpo_alpha": Setting("alpha", without=0.0),
        "simpo_gamma": Setting("gamma"),
        "alpha": Setting("reward_alpha", without=0.0),
    }

    def _make_loss(self, args: Any, options: dict[str, Any]) -> PairLoss:
        if args.loss_type == "simpo":
            given = {"gamma": args.simpo_gamma, "label_smoothing": args.label_smoothing, **options}
            if args.alpha:
                return AlphaPOLoss(args.beta, reward_alpha=args.alpha, alpha=args.cpo_alpha, **given)
            if args.cpo_alpha:
                return CPOSimPOLoss(args.beta, alpha=args.cpo_alpha, **given)
            return SimPOLoss(args.beta, **given)
        given = {"alpha": args.cpo_alpha, **options}
        if args.loss_type == "sigmoid":  # TRL ignores it elsewhere
            given["label_smoothing"] = args.label_smoothing
        if args.alpha:
            return _ShapedCPOLoss(args.beta, args.loss_type, reward_alpha=args.alpha, **given)
        return CPOLoss(args.beta, args.loss_type, **given)


class _ShapedCPOLoss(CPOLoss):
    """CPO over AlphaPO's rewards, for ``CPOConfig(alpha=...)`` with a loss type other than "simpo"."""

    _: KW_ONLY
    reward_alpha: float = number(0.0, FINITE)

    def pair_loss(self, x: PairScores) -> Any:
        chosen, rejected = (AF.alphapo_reward(v, self.reward_alpha) for v in self.logps(x))
        if self.per_token:  # its loss divides by the tokens
            chosen, rejected = chosen * x.chosen_tokens.clamp_min(1), rejected * x.rejected_tokens.clamp_min(1)
        return super().pair_loss(replace(x, chosen=chosen, rejected=rejected))

    def rewards(self, x: PairScores) -> tuple[Tensor, Tensor]:
        chosen, rejected = (self.beta * AF.alphapo_reward(v, self.reward_alpha) for v in self.logps(x))
        return chosen, rejected
