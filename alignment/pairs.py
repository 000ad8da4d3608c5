"""Losses over preference pairs: ``PairLoss``, to which a loss adds a formula and its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from chunked_embed import ChunkPlan, Head, LossOutput, checks
from chunked_embed.signatures import with_arguments_of

from .functional import mean_logps
from .path import Extra, Named, PreferenceLoss, PreparedLoss, Result, token_means, wide


@dataclass(frozen=True)
class PairScores:
    """What the loss of a pair sees, each ``(B,)``. Log-probabilities are sums over the completion's tokens."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor  # of the reference; zero without one
    ref_rejected: Tensor
    chosen_tokens: Tensor  # how many
    rejected_tokens: Tensor
    nll: Tensor  # each pair's share of the chosen sequences' NLL per token, over nll_target
    nll_logps: Tensor  # log-probability of the chosen sequence over nll_target
    has_reference: bool = True
    sums: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Of the policy's "logps", further ``statistics`` and "kl", by name: over the chosen tokens, and over the rejected
    ones, whatever their ``tail_weight``."""
    given: Mapping[str, Tensor] = field(default_factory=dict)
    """The call's further vectors."""

    @cached_property
    def chosen_ratio(self) -> Tensor:
        """Log of policy over reference."""
        return self.chosen - self.ref_chosen

    @cached_property
    def rejected_ratio(self) -> Tensor:
        return self.rejected - self.ref_rejected

    @cached_property
    def chosen_mean(self) -> Tensor:
        """Log-probability per token; zero for an empty completion."""
        return mean_logps(self.chosen, self.chosen_tokens)

    @cached_property
    def rejected_mean(self) -> Tensor:
        return mean_logps(self.rejected, self.rejected_tokens)


class PairLoss(PreferenceLoss):
    """Base of the losses over pairs: a subclass states its numbers as fields, and ``pair_loss``.

        class MarginLoss(PairLoss):
            takes_reference = False
            margin: float = number(1.0, POSITIVE, "least distance of the two, per token")

            def pair_loss(self, x: PairScores) -> Tensor:
                return F.relu(self.margin - x.chosen_mean + x.rejected_mean)

    ``loss(hidden, weight, target, ...)``, or ``loss(head, target=target, ...)``, takes both completions of each pair in
    one batch, all chosen ones first; ``forward`` says the rest.
    """

    takes_nll_target: ClassVar[bool] = False
    segments_per_unit = 4

    # --- what a loss says of itself ---

    def pair_loss(self, x: PairScores) -> Result:
        """One value per pair, and metrics if there are any."""
        raise NotImplementedError(f"expected {type(self).__name__} to have a pair_loss(self, x), got none")

    @property
    def per_token(self) -> bool:
        """Whether log-probabilities and rewards are logged per token, as TRL does where the loss takes them so."""
        return False

    @property
    def tail_weight(self) -> float | None:
        """The weight of a completion's tokens beyond the shorter completion's length; None where all weigh alike."""
        return None

    def logps(self, x: PairScores) -> tuple[Tensor, Tensor]:
        """Log-probabilities of chosen and rejected, as logged."""
        return (x.chosen_mean, x.rejected_mean) if self.per_token else (x.chosen, x.rejected)

    def rewards(self, x: PairScores) -> tuple[Tensor, Tensor]:
        """Rewards of chosen and rejected, as logged."""
        chosen, rejected = self.logps(x)
        return self.reward_scale * (chosen - x.ref_chosen), self.reward_scale * (rejected - x.ref_rejected)

    # --- a call ---

    def prepare(
        self,
        hidden: Tensor | Head,  # (2B, T, H)
        weight: Tensor | None = None,  # (V, H)
        target: Tensor | None = None,  # (2B, T)
        bias: Tensor | None = None,  # (V,)
        ref_hidden: Tensor | None = None,  # (2B, T, Hr)
        ref_weight: Tensor | None = None,  # (V, Hr)
        ref_bias: Tensor | None = None,  # (V,)
        ref_logps: Tensor | None = None,  # (2B,)
        nll_target: Tensor | None = None,  # (2B, T)
        *,
        ref: Head | None = None,
        extra: Extra = (),
        ref_extra: Extra = (),
        **vectors: Tensor | None,  # (B,)
    ) -> PreparedLoss:
        """Loss and metrics of B pairs. (``prepare`` does no work yet: it has the call's ``plan``, and ``run()``.)

        Args:
            hidden: hidden states, chosen completions first, then the rejected ones in the same order. Or a ``Head`` in
                place of hidden, weight, bias and extra; then ``ref`` is one too.
            weight, bias: the LM head.
            target: the token that each hidden state predicts, already aligned; ``ignore_index`` drops it.
            ref_hidden, ref_weight, ref_bias: the reference's, which is frozen.
            ref_logps: the reference's log-probabilities of the completions, instead of the reference (with
                ``ld_alpha``, weighted likewise).
            nll_target: targets of the NLL term of the chosen sequences, by default ``target``; ORPO's also have the
                prompt. The rows of rejected ones are not read.
            ref: the reference, as a ``Head``.
            extra, ref_extra: further ``(input, weight)`` terms of the logits: a LoRA adapter on the head is
                ``((hidden @ A.T, scale * B),)``.
            vectors: what else the loss takes, by name.

        Returns:
            ``loss`` and ``metrics``: per pair ``logps/chosen``, ``logps/rejected``, ``rewards/chosen``,
            ``rewards/rejected``, ``rewards/margins``, ``rewards/accuracies``, ``tokens/chosen``, ``tokens/rejected``;
            over all tokens of the batch ``nll_loss`` (chosen), ``entropy``, ``mean_token_accuracy`` (chosen),
            ``logits/chosen``, ``logits/rejected``. All count completion tokens only, but for ``nll_loss``.

        Raises:
            ValueError, TypeError: shapes, dtypes, ids and options that do not fit, before any work.
        """
        self.check()
        self._refuse_unknown(vectors)
        parts = (hidden, weight, bias, extra), ref, (ref_hidden, ref_weight, ref_bias, ref_extra), ref_logps
        heads = self._heads(*parts)
        states = heads["policy"].hidden
        where: dict[str, Any] = {"shape": tuple(states.shape[:2]), "device": states.device, "kind": "integer"}
        target = checks.tensor("target", target, **where)
        pairs, odd = divmod(len(states), 2)
        if odd or not pairs:
            raise ValueError(f"expected hidden of pairs, (2B, T, H), chosen first, got {tuple(states.shape)}")
        if nll_target is not None and not self.takes_nll_target:
            raise ValueError(f"expected no nll_target, {type(self).__name__} has none")
        if nll_target is not None:
            checks.tensor("nll_target", nll_target, **where)
        given, dtype = self._vectors(vectors, pairs, states.device), wide(states.dtype)
        segments, ids, nll_tokens = self._segments(target, nll_target)
        groups = {"nll_scale": (pairs / nll_tokens.clamp_min(1).to(dtype)).expand(pairs).contiguous()}
        if ref_logps is not None:
            groups["ref_logps"] = ref_logps.detach().double().view(2, pairs).t()
        groups |= {name: vector.to(dtype) for name, vector in given.items()}

        def report(metrics: Named) -> tuple[Named, Named]:
            metrics["nll_loss"] = metrics["nll_loss"].mean()  # the pairs' shares are so scaled
            return metrics, {"nll_loss": nll_tokens, **token_means(metrics)}

        return self._prepared(heads, ids, segments, groups, report)

    @with_arguments_of(prepare)
    def forward(self, *arguments: Any, **keywords: Any) -> LossOutput:
        return self.prepare(*arguments, **keywords).run()

    @with_arguments_of(prepare)
    def plan(self, *arguments: Any, **keywords: Any) -> ChunkPlan:
        """What ``forward`` with the same arguments will do: print it before running."""
        return self.prepare(*arguments, **keywords).plan

    def _segments(self, target: Tensor, nll_target: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """-> the segment of each token, its id, and how many tokens the NLL has.

        Segments of a pair: 0 chosen, 1 chosen of another kind, 2 rejected, 3. With a tail weight the odd ones hold the
        tails. Else 1 holds chosen tokens that the NLL leaves out, and 3 those of the NLL alone.
        """
        used, pairs = target != self.ignore_index, len(target) // 2
        first = torch.arange(0, 4 * pairs, 4, device=target.device)
        segments = torch.cat([first, first + 2])[:, None]
        if self.tail_weight is not None:
            lengths = used.sum(1).view(2, pairs).amin(0).repeat(2)[:, None]
            segments = segments + (used.cumsum(1) > lengths)
        if nll_target is None:
            # What is not used is dropped, whatever its id.
            return torch.where(used, segments, -1), target, used[:pairs].sum()
        chosen, ids, nll_ids = used[:pairs], target[:pairs], nll_target[:pairs]
        in_nll = nll_ids != self.ignore_index
        if bool((in_nll & chosen & (nll_ids != ids)).any()):
            raise ValueError("expected nll_target and target to agree where both have a token, got other ids")
        kind = torch.where(chosen, (~in_nll).long(), 3)
        of_chosen = torch.where(chosen | in_nll, first[:, None] + kind, -1)
        of_rejected = torch.where(used[pairs:], segments[pairs:], -1)
        ids = torch.cat([torch.where(in_nll, nll_ids, ids), target[pairs:]])
        return torch.cat([of_chosen, of_rejected]), ids, in_nll.sum()

    # --- behind the engine ---

    def of_sums(self, scores: Any, groups: Named) -> tuple[Tensor, Named]:
        """The loss of some pairs, from sums over their segments: ``(pairs, 4)`` for each statistic."""
        x = self._pair_scores(scores, groups)
        result = self.pair_loss(x)
        loss, metrics = result if isinstance(result, tuple) else (result, {})
        logps, (chosen, rejected) = self.logps(x), self.rewards(x)
        named = {
            "logps/chosen": logps[0],
            "logps/rejected": logps[1],
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
            "tokens/chosen": x.chosen_tokens,
            "tokens/rejected": x.rejected_tokens,
            "nll_loss": x.nll,
        }
        if self.token_metrics:  # sums, which ``token_means`` divides
            entropy = x.sums["entropy"]
            named["entropy"] = entropy[0] + entropy[1]
            named["mean_token_accuracy"], _ = x.sums["is_top1"]
            named["logits/chosen"], named["logits/rejected"] = x.sums["mean_logits"]
        return loss, {**named, **metrics}

    def _pair_scores(self, scores: Any, groups: Named) -> PairScores:
        policy, tail = scores["policy"], self.tail_weight

        def sides(v: Tensor, of_tail: float = 1.0) -> tuple[Tensor, Tensor]:
            return v[:, 0] + of_tail * v[:, 1], v[:, 2] if tail is None else v[:, 2] + of_tail * v[:, 3]

        weight = 1.0 if tail is None else tail
        logps = policy["logps"]
        if "reference" in scores:
            ref_chosen, ref_rejected = sides(scores["reference"]["logps"], weight)
        elif "ref_logps" in groups:
            ref_chosen, ref_rejected = groups["ref_logps"].unbind(1)
        else:
            ref_chosen = ref_rejected = torch.zeros_like(logps.detach()[:, 0])
        nll_logps = logps[:, 0] + logps[:, 3 if tail is None else 1]
        return PairScores(
            *sides(logps, weight),
            ref_chosen,
            ref_rejected,
            *sides(scores["count"]),
            nll=-nll_logps * groups["nll_scale"],
            nll_logps=nll_logps,
            has_reference="reference" in scores or "ref_logps" in groups,
            sums={name: sides(value) for name, value in policy.items()},
            given=groups,
        )
