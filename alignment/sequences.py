"""Losses over single completions with a verdict each: ``SequenceLoss``, to which a loss adds formula and numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from chunked_embed import ChunkPlan, Head, LossOutput, checks
from chunked_embed.signatures import with_arguments_of

from .path import Extra, Named, PreferenceLoss, PreparedLoss, Result, token_means, wide


@dataclass(frozen=True)
class SequenceScores:
    """What the loss of a single sequence sees, each ``(B,)``. Log-probabilities are sums over its tokens."""

    logps: Tensor
    ref_logps: Tensor  # of the reference
    tokens: Tensor  # how many
    desirable: Tensor  # bool
    given: Mapping[str, Tensor] = field(default_factory=dict)
    """The call's further vectors and numbers."""

    @property
    def ratio(self) -> Tensor:
        """Log of policy over reference."""
        return self.logps - self.ref_logps


class SequenceLoss(PreferenceLoss):
    """Base of the losses over single sequences with a verdict each: a subclass states its numbers as fields, and
    ``sequence_loss``.

    ``loss(hidden, weight, target, preference_labels, ...)``, or ``loss(head, target=target, ...)``; ``forward`` says
    the rest.
    """

    def sequence_loss(self, x: SequenceScores) -> Result:
        """One value per sequence, and metrics if there are any."""
        raise NotImplementedError(f"expected {type(self).__name__} to have a sequence_loss(self, x), got none")

    def prepare(
        self,
        hidden: Tensor | Head,  # (B, T, H)
        weight: Tensor | None = None,  # (V, H)
        target: Tensor | None = None,  # (B, T)
        preference_labels: Tensor | None = None,  # (B,)
        bias: Tensor | None = None,  # (V,)
        ref_hidden: Tensor | None = None,  # (B, T, Hr)
        ref_weight: Tensor | None = None,  # (V, Hr)
        ref_bias: Tensor | None = None,  # (V,)
        ref_logps: Tensor | None = None,  # (B,)
        *,
        ref: Head | None = None,
        extra: Extra = (),
        ref_extra: Extra = (),
        **vectors: Tensor | None,  # (B,) or ()
    ) -> PreparedLoss:
        """Loss and metrics of B sequences. (``prepare`` does no work yet: it has the call's ``plan``, and ``run()``.)

        Args:
            preference_labels: bool, True where the completion is desirable.
            hidden, weight, ...: as in ``PairLoss.forward``, one completion a row.
            vectors: what else the loss takes, by name: its class says what.

        Returns:
            ``loss`` and ``metrics``: per sequence ``logps``, ``rewards``, ``tokens/chosen``, ``tokens/rejected``; over
            the desirable (chosen) and the other sequences ``logps/chosen``, ``logps/rejected``, ``rewards/chosen``,
            ``rewards/rejected``, ``rewards/margins``, ``count/chosen``, ``count/rejected``; over completion tokens
            ``entropy``, ``mean_token_accuracy`` (chosen), ``logits/chosen``, ``logits/rejected``.

        Raises:
            ValueError, TypeError: shapes, dtypes, ids and options that do not fit, before any work.
        """
        self.check()
        self._refuse_unknown(vectors)
        parts = (hidden, weight, bias, extra), ref, (ref_hidden, ref_weight, ref_bias, ref_extra), ref_logps
        heads = self._heads(*parts)
        states = heads["policy"].hidden
        target = checks.tensor("target", target, tuple(states.shape[:2]), device=states.device, kind="integer")
        size = len(states)
        if not size:
            raise ValueError(f"expected hidden of one sequence or more, got {tuple(states.shape)}")
        desirable = checks.tensor("preference_labels", preference_labels, (size,), device=states.device, kind="bool")
        given, dtype = self._vectors(vectors, size, states.device), wide(states.dtype)
        segments = torch.where(target != self.ignore_index, torch.arange(size, device=target.device)[:, None], -1)
        groups = {"desirable": desirable}
        if ref_logps is not None:
            groups["ref_logps"] = ref_logps.detach().double()
        groups |= {name: vector.detach().to(dtype) for name, vector in given.items()}
        return self._prepared(heads, target, segments, groups, self._report)

    @with_arguments_of(prepare)
    def forward(self, *arguments: Any, **keywords: Any) -> LossOutput:
        return self.prepare(*arguments, **keywords).run()

    @with_arguments_of(prepare)
    def plan(self, *arguments: Any, **keywords: Any) -> ChunkPlan:
        """What ``forward`` with the same arguments will do: print it before running."""
        return self.prepare(*arguments, **keywords).plan

    def of_sums(self, scores: Any, groups: Named) -> tuple[Tensor, Named]:
        """The loss of some sequences, from sums over their tokens: ``(sequences, 1)`` for each statistic."""
        policy = {name: value[:, 0] for name, value in scores["policy"].items()}
        reference = scores["reference"]["logps"][:, 0] if "reference" in scores else groups["ref_logps"]
        desirable = groups["desirable"]
        x = SequenceScores(policy["logps"], reference, scores["count"][:, 0], desirable, groups)
        result = self.sequence_loss(x)
        loss, metrics = result if isinstance(result, tuple) else (result, {})
        chosen, rejected = desirable.to(loss.dtype), (~desirable).to(loss.dtype)
        named = {
            "logps": x.logps,
            "rewards": self.reward_scale * x.ratio,
            "tokens/chosen": x.tokens * chosen,
            "tokens/rejected": x.tokens * rejected,
            "count/chosen": chosen,
            "count/rejected": rejected,
        }
        if self.token_metrics:  # sums, which ``token_means`` divides
            named["entropy"] = policy["entropy"]
            named["mean_token_accuracy"] = policy["is_top1"] * chosen
            named["logits/chosen"] = torch.where(desirable, policy["mean_logits"], 0.0)
            named["logits/rejected"] = torch.where(desirable, 0.0, policy["mean_logits"])
        return loss, {**named, **metrics}

    def _report(self, metrics: Named) -> tuple[Named, Named]:
        """Means over the chosen and over the rejected sequences, and over all tokens of a kind in the batch; zero
        where there are none. -> those, and what they count."""
        counts: Named = {}
        for side in ("chosen", "rejected"):
            counts[f"tokens/{side}"] = member = metrics[f"count/{side}"]
            metrics[f"count/{side}"] = count = member.sum()
            for name in ("logps", "rewards"):
                # Not by a product: what is infinite on the other side would be NaN here.
                here = torch.where(member > 0, metrics[name], 0.0)
                metrics[f"{name}/{side}"] = here.sum() / count.clamp_min(1)
                counts[f"{name}/{side}"] = count
        metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        for name in self.takes_numbers:
            if name in metrics:  # the same for every sequence
                metrics[name] = metrics[name][0]
        return metrics, counts | token_means(metrics)
