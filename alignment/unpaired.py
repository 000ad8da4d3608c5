"""Losses over single completions, each with a verdict: desirable or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed

from chunked_embed import FlexChunkLoss

from . import functional as AF
from ._base import NOT_NEGATIVE, POSITIVE, Arguments, CoupledSequenceEngine, Named, SequenceLoss, SequenceScores


class KTOLoss(SequenceLoss):
    """Kahneman-Tversky optimisation, with ``l`` the log-ratio of policy and reference.

        kto                desirable 1 - sigmoid(b (l - kl)),  undesirable 1 - sigmoid(b (kl - l))
        apo_zero_unpaired  desirable 1 - sigmoid(b l),         undesirable sigmoid(b l)

    each times its class's weight; the mean over the sequences. https://arxiv.org/abs/2402.01306 and
    https://arxiv.org/abs/2408.06266; defaults are TRL's.

    Args:
        beta: how strongly the policy is held to the reference.
        loss_type: a name of the table.
        desirable_weight, undesirable_weight: of the two classes.
        options: of ``PreferenceLoss``.

    A call takes ``kl`` () as well: the batch's reference point, ``functional.kto_kl`` of mismatched completions (a mean
    over all processes, where there are several). It has no gradient, and counts as zero where negative.
    "apo_zero_unpaired" does not read it.
    """

    ranges = {"beta": POSITIVE, "desirable_weight": NOT_NEGATIVE, "undesirable_weight": NOT_NEGATIVE}
    choices = {"loss_type": ("kto", "apo_zero_unpaired")}
    takes_numbers = ("kl",)

    def __init__(
        self,
        beta: float = 0.1,
        loss_type: str = "kto",
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.beta = beta
        self.loss_type = loss_type
        self.desirable_weight = desirable_weight
        self.undesirable_weight = undesirable_weight
        self.check()

    def _arguments(self, *arguments: Any, **keywords: Any) -> Arguments:
        if self.loss_type == "kto" and keywords.get("kl") is None:
            raise ValueError('expected kl () with loss_type="kto", as from alignment.functional.kto_kl, got None')
        return super()._arguments(*arguments, **keywords)

    def sequence_loss(self, x: SequenceScores) -> tuple[Tensor, Named]:
        numbers: dict[str, Any] = {
            "desirable_weight": self.desirable_weight,
            "undesirable_weight": self.undesirable_weight,
        }
        kl = x.given["kl"].clamp_min(0) if self.loss_type == "kto" else torch.zeros_like(x.ratio.detach())
        return AF.kto(x.ratio, x.desirable, kl, beta=self.beta, **numbers), {"kl": kl}

    def _report(self, metrics: Named) -> Named:
        metrics["kl"] = metrics["kl"][0]
        return super()._report(metrics)


class BCOLoss(SequenceLoss):
    """Binary classifier optimisation: ``-logsigmoid(b l - delta)`` desirable, ``-logsigmoid(delta - b l)`` not.

    delta is the running mean of all rewards ``b l`` seen in training: a batch is counted first, and then delta is used,
    as in TRL's trainer. It lives in buffers (``running_mean``, ``running_count``; float64 whatever the module is cast
    to), so that it is saved with the module; evaluation leaves it alone. Where a process group is initialised, the
    batches of all processes are counted, and every process must call the loss. https://arxiv.org/abs/2404.04656

    Args:
        beta: how strongly the policy is held to the reference.
        options: of ``PreferenceLoss``.

    A call takes ``sequence_weight`` (B,) as well, if you like: it multiplies each sequence's loss, and has no gradient
    (weights that match the undesirable prompts to the distribution of the desirable ones, say).
    """

    ranges = {"beta": POSITIVE}
    takes_vectors = ("sequence_weight",)
    running_mean: Tensor
    running_count: Tensor

    def __init__(self, beta: float = 0.1, **options: Any) -> None:
        super().__init__(**options)
        self.beta = beta
        for name in ("running_mean", "running_count"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))
        self.check()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BCOLoss:
        """Buffers move, but keep float64: a half-precision count stops at a few hundred."""
        kept = {name: getattr(self, name) for name in ("running_mean", "running_count")}
        super()._apply(fn, recurse)
        for name, value in kept.items():
            setattr(self, name, value.to(getattr(self, name).device))
        return self

    def _engine(self) -> Callable[..., FlexChunkLoss]:
        return CoupledSequenceEngine

    def sequence_loss(self, x: SequenceScores) -> tuple[Tensor, Named]:
        delta = self._delta(self.beta * x.ratio.detach()).to(x.ratio.dtype)
        loss = AF.bco(x.ratio, x.desirable, delta, beta=self.beta)
        if "sequence_weight" in x.given:
            loss = loss * x.given["sequence_weight"]
        return loss, {"delta": delta}

    def _delta(self, rewards: Tensor) -> Tensor:
        """The running mean of rewards, these included while training."""
        device = rewards.device
        if self.training:
            here = torch.stack([rewards.double().sum(), rewards.new_full((), len(rewards), dtype=torch.float64)])
            if distributed.is_available() and distributed.is_initialized():
                distributed.all_reduce(here)
            total, n = here
            count = self.running_count.to(device) + n
            mean = self.running_mean.to(device)
            self.running_mean = mean + (total - n * mean) / count
            self.running_count = count
        return self.running_mean.to(device)
