"""TRL's trainers with the losses of this package: same arguments, same logged names, no logits held.

::

    from alignment.trl import ChunkedDPOTrainer  # in place of trl.DPOTrainer

    trainer = ChunkedDPOTrainer(model=model, args=DPOConfig(...), train_dataset=pairs, processing_class=tokenizer)

The loss runs inside the wrapped model's own forward, where its head would (``chunked_embed.causal_lm``): three products
instead of the four of TRL's DPO and KTO, and no full logits as in its CPO and ORPO. The reference's log-probabilities
come from one product in the reference's own forward, or from the dataset. At the first batch the log-probabilities of
each model are compared with its own logits; a difference is refused.

Written for TRL 1.16. What differs on purpose: ``label_smoothing`` also counts for ``loss_type="sigmoid"`` (TRL ignores
it there), and the ``logits/*`` of CPO and ORPO are means over completion tokens (TRL's count prompts and padding).
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

try:
    import trl
    from accelerate.utils import is_peft_model
    from datasets.fingerprint import Hasher
    from trl import DPOTrainer, KTOConfig, KTOTrainer
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer
    from trl.models.utils import disable_gradient_checkpointing
    from trl.trainer import dpo_trainer, kto_trainer
    from trl.trainer.utils import use_adapter
except ImportError as missing:
    raise ImportError(f"expected trl 1.16 and what it needs (pip install 'chunked-embed[trl]'): {missing}") from missing

from chunked_embed import Head, LossOutput, causal_lm
from chunked_embed.checks import FINITE
from chunked_embed.fields import KW_ONLY, ChunkFields, number
from chunked_embed.trainers import HeadTrainer, Sums, check_given_loss, warn_untested

from . import functional as AF
from .losses import (
    AlphaPOLoss,
    BCOLoss,
    CPOLoss,
    CPOSimPOLoss,
    DPOLoss,
    DPOPLoss,
    FPOLoss,
    IRPOLoss,
    KTOLoss,
    ORPOLoss,
    RDPOLoss,
    SimPOLoss,
    TDPOLoss,
)
from .pairs import PairLoss, PairScores
from .path import PreferenceLoss
from .sequences import SequenceLoss

__all__ = ["ChunkedBCOTrainer", "ChunkedCPOTrainer", "ChunkedDPOTrainer", "ChunkedKTOTrainer", "ChunkedORPOTrainer"]

LOSS_TYPES: dict[str, Callable[..., PairLoss]] = {
    "irpo": IRPOLoss,
    "dpop": DPOPLoss,
    "rdpo": RDPOLoss,
    "tdpo1": partial(TDPOLoss, loss_type="tdpo1"),
    "tdpo2": partial(TDPOLoss, loss_type="tdpo2"),
    **{f"fpo_{name}": partial(FPOLoss, divergence=name) for name in AF.FPO_DIVERGENCES},
}
"""What ``DPOConfig(loss_type=...)`` may name, alone, besides TRL's own. For numbers other than beta give ``loss=``."""

F_DIVERGENCES = {"js_divergence": "js", "alpha_divergence": "alpha"}  # TRL's names, where they differ
TESTED = "1.16."
BCO_STATE = "bco_running_mean.json"

warn_untested("alignment.trl", trl, TESTED)


class _Chunked(HeadTrainer):
    """What the trainers share: a loss that runs inside the policy's forward, a check of the models, and metrics.

    Args:
        loss: an object of ``alignment`` to use instead of the one that ``args`` describe. The scale and soft-cap of the
            logits are the model's.
        loss_options: keywords of the loss that ``args`` describe, such as ``{"chunk_size": 4096}``.
    """

    _loss_base: ClassVar[type[PreferenceLoss]] = PairLoss
    _trl_module: ClassVar[Any] = None
    """Where TRL's constructor finds the fused head that ours replaces."""
    # What is TRL's, in the class behind this one.
    ref_model: Any
    processing_class: Any
    aux_loss_enabled: bool
    router_aux_loss_coef: float
    _metrics: Any
    _precompute_model_hash: Any
    _total_train_tokens: Any
    _tp_size: int

    def __init__(
        self, *args: Any, loss: PreferenceLoss | None = None, loss_options: Mapping[str, Any] | None = None, **kw: Any
    ) -> None:
        check_given_loss(loss, self._loss_base, loss_options)
        self._given_loss = loss
        self._loss_options = dict(loss_options or {})
        self._hashed = False
        with _our_head(self._trl_module):
            super().__init__(*args, **kw)  # precomputes reference log-probabilities if asked to
        self.attach_model()
        self.chunked_loss.check()  # now, rather than at the first batch

    @cached_property
    def chunked_loss(self) -> Any:
        """The loss that this trainer computes."""
        return self._make_loss(self.args, self._loss_options) if self._given_loss is None else self._given_loss

    def _make_loss(self, args: Any, options: dict[str, Any]) -> PreferenceLoss:
        raise NotImplementedError

    def _precompute_ref_logps(self, *args: Any) -> Any:
        """TRL keeps what it computed by the reference and the data; here it also depends on numbers of the loss."""
        if not self._hashed:
            self._hashed = True
            numbers = self.chunked_loss.temperature, getattr(self.chunked_loss, "ld_alpha", None)
            self._precompute_model_hash = Hasher.hash((self._precompute_model_hash, numbers))
        return super()._precompute_ref_logps(*args)  # type: ignore[misc]

    def _loss(
        self, model: nn.Module, inputs: Mapping[str, Any], target: Tensor, given: Mapping[str, Any]
    ) -> tuple[LossOutput, Tensor | None]:
        """The loss of a batch, with further arguments by name, and the auxiliary loss of a mixture of experts."""
        self.check_once(model, inputs)

        def run(head: Head, target: Tensor) -> LossOutput:
            there = {k: v.to(target.device) if isinstance(v, Tensor) else v for k, v in given.items()}
            return self.chunked_loss(head, target=target, **there)

        return self.run_loss(model, inputs, target, run)

    def _token_logps(self, model: nn.Module, inputs: Mapping[str, Any], target: Tensor) -> Tensor:
        self.check_once(model, inputs)
        names = (*ChunkFields.fields, "temperature")
        return self.token_logps(model, inputs, target, **{name: getattr(self.chunked_loss, name) for name in names})

    @property
    def _reference_model(self) -> nn.Module:
        return self.model if self.ref_model is None else self.ref_model

    @contextlib.contextmanager
    def _as_reference(self) -> Iterator[nn.Module]:
        """The model that is the reference, as it is one: its adapters off, no gradients, under autocast."""
        adapters: Any = contextlib.nullcontext()
        if self.ref_model is None and is_peft_model(self.model):
            peft = self.accelerator.unwrap_model(self.model)
            adapters = use_adapter(peft, adapter_name="ref" if "ref" in peft.peft_config else None)
        checkpointing = disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)
        with torch.no_grad(), checkpointing, adapters, self.accelerator.autocast():
            yield self._reference_model

    def _store(self, mode: str, means: Mapping[str, float], attention_mask: Tensor) -> None:
        """Into what TRL's ``log`` averages."""
        if mode == "train":
            tokens = self.accelerator.gather_for_metrics(attention_mask.sum()).sum().item()
            self._total_train_tokens += tokens // self._tp_size
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        for name, mean in means.items():
            self._metrics[mode][name].append(mean)

    def _with_aux(self, loss: Tensor, aux_loss: Tensor | None, sums: Sums) -> Tensor:
        if not self.aux_loss_enabled:
            return loss
        assert aux_loss is not None
        sums["aux_loss"] = aux_loss.detach(), torch.ones_like(aux_loss.detach())
        return loss + self.router_aux_loss_coef * aux_loss


@contextlib.contextmanager
def _our_head(module: Any) -> Iterator[None]:
    """While TRL builds a trainer: our head in place of its own, and no refusal of adapters on the head."""
    ours = {"add_fused_lm_head": lambda model, **_: causal_lm.attach(model), "BaseTunerLayer": ()}
    kept = {name: getattr(module, name) for name in ours if hasattr(module, name)}
    if module is not None and "add_fused_lm_head" not in kept:
        raise ImportError(f"expected trl {TESTED}x, got {trl.__version__}, whose {module.__name__} has no fused head")
    try:
        for name in kept:
            setattr(module, name, ours[name])
        yield
    finally:
        for name, value in kept.items():
            setattr(module, name, value)


def _pair_sums(out: LossOutput) -> Sums:
    """What TRL logs of pairs, as sums and counts: over pairs, or over completion tokens."""
    sums = {name: pair for name, pair in out.sums.items() if not name.startswith("tokens/")}
    loss = out.metrics["nll_loss"]  # TRL means it over processes, not tokens: so does its loss
    return {**sums, "nll_loss": (loss, torch.ones_like(loss))}


# --- with a reference ------------------------------------------------------------------------------------------------


class ChunkedDPOTrainer(_Chunked, DPOTrainer):
    """``trl.DPOTrainer`` on the chunked engine: its arguments, and ``loss``, ``loss_options``.

    ``DPOConfig(loss_type=...)`` may name everything in ``alignment.DPOLoss``, or one of ``LOSS_TYPES`` alone; ``loss``
    takes any ``alignment.PairLoss``.
    """

    _trl_module = dpo_trainer

    def _make_loss(self, args: Any, options: dict[str, Any]) -> PairLoss:
        if len(args.loss_type) == 1 and args.loss_type[0] in LOSS_TYPES:
            return LOSS_TYPES[args.loss_type[0]](beta=args.beta, **options)
        if others := [name for name in args.loss_type if name in LOSS_TYPES]:
            raise ValueError(f"expected {others[0]!r} to be the only loss_type, got {args.loss_type}")
        return DPOLoss(
            args.beta,
            args.loss_type,
            loss_weights=args.loss_weights,
            label_smoothing=args.label_smoothing,
            f_divergence=F_DIVERGENCES.get(args.f_divergence_type, args.f_divergence_type),
            f_alpha=args.f_alpha_divergence_coef,
            ld_alpha=args.ld_alpha,
            use_weighting=args.use_weighting,
            discopop_tau=args.discopop_tau,
            **options,
        )

    def _precompute_ref_logps(self, *args: Any) -> Any:
        if self.chunked_loss.needs_kl:
            name = type(self.chunked_loss).__name__
            raise ValueError(f"expected precompute_ref_log_probs=False: {name} needs the reference's distributions")
        return super()._precompute_ref_logps(*args)

    @staticmethod
    def _split(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor]:
        """-> the model's arguments, and the target of each state but the last."""
        ours = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")
        target = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)[:, 1:]
        return {**{k: v for k, v in inputs.items() if k not in ours}, "use_cache": False}, target

    def compute_ref_log_probs(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the chosen and of the rejected completions, each ``(B,)``, under the reference."""
        arguments, target = self._split(inputs)
        with self._as_reference():
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
            arguments, target = self._split(inputs)
            with self._as_reference() as model:
                self.check_once(model, arguments, "the reference")
                return {"ref": self.frozen_head(model, arguments, target)}
        if self.precompute_ref_logps:
            logps = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        else:
            logps = self.compute_ref_log_probs(self._reference_model, inputs)
        return {"ref_logps": torch.cat(logps)}

    def _compute_loss(self, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool) -> Any:
        mode = "train" if self.model.training else "eval"
        arguments, target = self._split(inputs)
        if self.aux_loss_enabled:
            arguments["output_router_logits"] = True
        out, aux_loss = self._loss(model, arguments, target, self._reference(inputs))
        sums = _pair_sums(out)
        if not self.chunked_loss.takes_nll_target:
            del sums["nll_loss"]  # TRL has none there
        loss = self._with_aux(out.loss, aux_loss, sums)
        self._store(mode, self.means_of(sums), inputs["attention_mask"])
        return self.with_outputs(model, arguments, loss, return_outputs)


class ChunkedKTOTrainer(_Chunked, KTOTrainer):
    """``trl.KTOTrainer`` on the chunked engine: its arguments, and ``loss``, ``loss_options``."""

    _loss_base = SequenceLoss
    _trl_module = kto_trainer

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
        with self._as_reference():
            return self._token_logps(model, *self._split(inputs)).double().sum(1), self._kl_logps(model, inputs)

    def _keywords(self, inputs: Mapping[str, Any], kl: Tensor | None) -> dict[str, Any]:
        return {"kl": kl}

    def _compute_loss(self, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool) -> Any:
        mode = "train" if self.model.training else "eval"
        batch = {k: v.to(self.accelerator.device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        arguments, target = self._split(batch)
        if self.precompute_ref_logps:
            ref_logps, ref_kl_logps = batch["ref_logps"], batch.get("ref_KL_logps")
        else:
            ref_logps, ref_kl_logps = self.compute_ref_log_probs(self._reference_model, batch)
        kl = None
        if (kl_logps := self._kl_logps(model, batch)) is not None:
            assert ref_kl_logps is not None
            here = (kl_logps - ref_kl_logps).mean()
            kl = self.accelerator.gather_for_metrics(here).mean().clamp(min=0)
        if self.aux_loss_enabled:
            arguments["output_router_logits"] = True
        desirable = torch.as_tensor(batch["label"], dtype=torch.bool, device=target.device)
        self.chunked_loss.train(mode == "train")
        given = {"preference_labels": desirable, "ref_logps": ref_logps, **self._keywords(batch, kl)}
        out, aux_loss = self._loss(model, arguments, target, given)
        sums = self._sums(out)
        loss = self._with_aux(out.loss, aux_loss, sums)
        means = self.means_of(sums)
        if {"rewards/chosen", "rewards/rejected"} <= means.keys():
            means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
        self._store(mode, means, batch["attention_mask"])
        return self.with_outputs(model, arguments, loss, return_outputs)

    @staticmethod
    def _sums(out: LossOutput) -> Sums:
        """What TRL logs: of the desirable (chosen) and of the other (rejected) sequences, or their tokens."""
        sides = [f"{name}/{side}" for name in ("rewards", "logps", "logits") for side in ("chosen", "rejected")]
        logged = {"kl", "delta", "entropy", *sides}
        return {name: pair for name, pair in out.sums.items() if name in logged}


class ChunkedBCOTrainer(ChunkedKTOTrainer):
    """Binary classifier optimisation, which TRL no longer has, over the data and the arguments of its KTO trainer.

    Of ``KTOConfig``, ``loss_type`` and the class weights are not read. The running mean of rewards is saved with each
    checkpoint and comes back with ``resume_from_checkpoint``. A subclass may weight the sequences (to match the prompts
    of the two classes, say): ``sequence_weight(inputs)`` -> (B,). https://arxiv.org/abs/2404.04656
    """

    _loss_base = BCOLoss

    def __init__(self, model: Any, ref_model: Any = None, args: Any = None, *more: Any, **kwargs: Any) -> None:
        args = KTOConfig("bco", loss_type="apo_zero_unpaired") if args is None else copy.copy(args)
        args.loss_type = "apo_zero_unpaired"  # the one without mismatched completions
        super().__init__(model, ref_model, args, *more, **kwargs)

    def _make_loss(self, args: Any, options: dict[str, Any]) -> SequenceLoss:
        return BCOLoss(args.beta, **options)

    def sequence_weight(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Weights of the batch's sequences, or None."""
        return None

    def _keywords(self, inputs: Mapping[str, Any], kl: Tensor | None) -> dict[str, Any]:
        return {"sequence_weight": self.sequence_weight(inputs)}

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            loss = self.chunked_loss
            state = {"mean": loss.running_mean.item(), "count": loss.running_count.item()}
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            (folder / BCO_STATE).write_text(json.dumps(state))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        path = Path(resume_from_checkpoint) / BCO_STATE
        if not path.exists():
            raise FileNotFoundError(f"expected {BCO_STATE} in {resume_from_checkpoint}: a checkpoint of this trainer")
        state = json.loads(path.read_text())
        self.chunked_loss.running_mean.fill_(state["mean"])
        self.chunked_loss.running_count.fill_(state["count"])


# --- without a reference ---------------------------------------------------------------------------------------------


class _Concatenated(_Chunked):
    """CPO and ORPO: chosen and rejected sequences as one batch."""

    concatenated_inputs: Any
    aux_loss_coef: float

    def _nll_target(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        return None

    def get_batch_loss_metrics(
        self, model: nn.Module, batch: Mapping[str, Any], train_eval: str = "train"
    ) -> tuple[Tensor, dict[str, float]]:
        both = self.concatenated_inputs(
            batch, padding_value=self.processing_class.pad_token_id, device=self.accelerator.device
        )
        both = {name.removeprefix("concatenated_"): value for name, value in both.items()}
        arguments = {name: both[name] for name in ("input_ids", "attention_mask")} | {"use_cache": False}
        if self.aux_loss_enabled:
            arguments["output_router_logits"] = True
        keywords = {"nll_target": self._nll_target(both)} if self.chunked_loss.takes_nll_target else {}
        out, aux_loss = self._loss(model, arguments, both["labels"][:, 1:], keywords)
        sums = _pair_sums(out)
        loss = out.loss
        if self.aux_loss_enabled:
            assert aux_loss is not None
            loss = loss + self.aux_loss_coef * aux_loss
        means = {"logits/chosen": 0.0, "logits/rejected": 0.0} | self.means_of(sums)
        prefix = "eval_" if train_eval == "eval" else ""
        return loss, {f"{prefix}{name}": mean for name, mean in means.items()}


class ChunkedCPOTrainer(_Concatenated, CPOTrainer):
    """``trl.experimental.cpo.CPOTrainer`` on the chunked engine: its arguments, and ``loss``, ``loss_options``.

    ``loss`` takes any ``alignment.PairLoss`` without a reference.
    """

    def _make_loss(self, args: Any, options: dict[str, Any]) -> PairLoss:
        if args.loss_type == "simpo":
            given = {"gamma": args.simpo_gamma, "label_smoothing": args.label_smoothing, **options}
            if args.alpha:
                return AlphaPOLoss(args.beta, reward_alpha=args.alpha, alpha=args.cpo_alpha, **given)
            if args.cpo_alpha:
                return CPOSimPOLoss(args.beta, alpha=args.cpo_alpha, **given)
            return SimPOLoss(args.beta, **given)
        given = {"alpha": args.cpo_alpha, "label_smoothing": args.label_smoothing, **options}
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


class ChunkedORPOTrainer(_Concatenated, ORPOTrainer):
    """``trl.experimental.orpo.ORPOTrainer`` on the chunked engine: its arguments, and ``loss``, ``loss_options``."""

    def _make_loss(self, args: Any, options: dict[str, Any]) -> PairLoss:
        return ORPOLoss(args.beta, **options)

    def _nll_target(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Prompt and completion, as in the paper."""
        return torch.where(batch["attention_mask"] == 1, batch["input_ids"], -100)[:, 1:]
