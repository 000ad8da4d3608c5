"""DPO and its kin: pairs, with a reference."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

from torch import nn
from trl import DPOTrainer
from trl.trainer import dpo_trainer

from .. import functional as AF
from ..losses import DPOLoss
from ..pairs import PairLoss
from . import LOSS_TYPES
from ._base import pair_sums
from ._referenced import Referenced
from ._settings import NOTHING, Setting, Settings

__all__ = ["ChunkedDPOTrainer"]

F_DIVERGENCES = {"js_divergence": "js", "alpha_divergence": "alpha"}  # TRL's names, where they differ


def dpo_types(loss: Any) -> Any:
    """The ``DPOConfig.loss_type`` of a loss."""
    if isinstance(loss, DPOLoss):
        return loss.loss_types
    for name, make in LOSS_TYPES.items():
        cls, options = (make.func, make.keywords) if isinstance(make, partial) else (make, {})
        if isinstance(loss, cls) and all(getattr(loss, key) == value for key, value in options.items()):  # type: ignore[arg-type]
            return (name,)
    return NOTHING


def f_divergence_type(loss: Any) -> str:
    """The ``DPOConfig.f_divergence_type`` of a loss."""
    ours = getattr(loss, "f_divergence", "reverse_kl")
    return next((theirs for theirs, name in F_DIVERGENCES.items() if name == ours), ours)


class ChunkedDPOTrainer(Referenced, DPOTrainer):
    """``trl.DPOTrainer`` on the chunked engine: its arguments, and those of ``alignment.trl``.

    ``DPOConfig(loss_type=...)`` may name everything in ``alignment.DPOLoss``, or one of ``LOSS_TYPES`` alone; ``loss``
    takes any ``alignment.PairLoss``. For one that has no reference (``alignment.SimPOLoss``, say)
    ``precompute_ref_log_probs=True`` computes nothing, and no reference is kept.

    Example:
        >>> from datasets import Dataset
        >>> from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
        >>> from trl import DPOConfig
        >>> from alignment.trl import ChunkedDPOTrainer
        >>> tokenizer = AutoTokenizer.from_pretrained("sentence-transformers/all-MiniLM-L6-v2", eos_token="[SEP]")
        >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=102, **sizes))
        >>> data = Dataset.from_list([{"prompt": "The plane", "chosen": " takes off.", "rejected": " is bread."}] * 4)
        >>> reference = LlamaForCausalLM(model.config)
        >>> options = {"bf16": False, "max_steps": 1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
        >>> args = DPOConfig("runs", per_device_train_batch_size=2, **options)
        >>> trainer = ChunkedDPOTrainer(model, reference, args, train_dataset=data, processing_class=tokenizer)
        >>> trainer.train().global_step
        {...}
        1
    """

    _trl_module = dpo_trainer
    _trl_losses = (DPOLoss,)
    _settings: ClassVar[Settings] = {
        "loss_type": Setting("loss_type", read=dpo_types),
        "loss_weights": Setting("loss_weights", without=None),
        "beta": Setting("beta"),
        "label_smoothing": Setting("label_smoothing", without=0.0),
        "f_divergence_type": Setting("f_divergence", read=f_divergence_type),
        "f_alpha_divergence_coef": Setting("f_alpha"),
        "ld_alpha": Setting("ld_alpha", without=None),
        "use_weighting": Setting("use_weighting", without=False),
        "discopop_tau": Setting("discopop_tau"),
    }

    def _check_loss(self, args: Any) -> None:
        loss, name = self.chunked_loss, type(self.chunked_loss).__name__
        if args.precompute_ref_log_probs and loss.needs_kl:
            raise ValueError(f"expected precompute_ref_log_probs=False: {name} needs the reference's distributions")
        if args.sync_ref_model and loss.takes_reference is False:
            raise ValueError(f"expected sync_ref_model=False: {name} has no reference")

    def _make_loss(self, args: Any, options: dict[str, Any]) -> PairLoss:
        if len(args.loss_type) == 1 and args.loss_type[0] in LOSS_TYPES:
            return LOSS_TYPES[args.loss_type[0]](beta=args.beta, **options)
        if unknown := [name for name in args.loss_type if name not in {*AF.DPO_LOSSES, *LOSS_TYPES}]:
            raise ValueError(
                f"expected loss_type to be one or more of {list(AF.DPO_LOSSES)}, or one of {list(LOSS_TYPES)} alone, "
                f"got {unknown[0]!r} (losses without a reference are given as loss=)"
            )
        if others := [name for name in args.loss_type if name in LOSS_TYPES]:
            raise ValueError(f"expected {others[0]!r} to be the only loss_type, got {args.loss_type}")
        divergence = F_DIVERGENCES.get(args.f_divergence_type, args.f_divergence_type)
        numbers = {
            "label_smoothing": args.label_smoothing,
            "f_alpha": args.f_alpha_divergence_coef,
            "discopop_tau": args.discopop_tau,
        }
        for name in DPOLoss.readers(args.loss_type, divergence):
            del numbers[name]  # TRL ignores it
        return DPOLoss(
            args.beta,
            args.loss_type,
            loss_weights=args.loss_weights,
            f_divergence=divergence,
            ld_alpha=args.ld_alpha,
            use_weighting=args.use_weighting,
            **numbers,
            **options,
        )

    def _precompute_ref_logps(self, dataset: Any, *args: Any) -> Any:
        return dataset if self.chunked_loss.takes_reference is False else super()._precompute_ref_logps(dataset, *args)

    def _compute_loss(self, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool) -> Any:
        mode = "train" if self.model.training else "eval"
        arguments, target = self._split(inputs)
        self.check_once(model, arguments)  # before its adapters are off: FSDP2 looks once at what learns
        out = self.run_loss(model, arguments, target, self.chunked_loss, **self._reference(inputs))
        sums = pair_sums(out)
        if not self.chunked_loss.takes_nll_target:
            del sums["nll_loss"]  # TRL has none there
        self._store(mode, sums, inputs["attention_mask"])
        return self.with_outputs(model, arguments, out.loss, return_outputs)
