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

from .batches import Batch, Tails, TwoTargets
from .functional import mean_logps
from .path import TABLE, Extra, Loose, Named, PreferenceLoss, PreparedLoss, Result, Sides, wide

METRICS = (
    "logps/chosen",
    "logps/rejected",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "tokens/chosen",
    "tokens/rejected",
)
"""Those of each pair: the first columns of ``TABLE``. Sums over tokens follow, and the counts that divide them."""
MEANS = ("nll_loss", "entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected")
"""Means over tokens of the batch, in the order of those columns."""


@dataclass(frozen=True)
class PairScores:
    """What the loss of a pair sees, each ``(B,)``. Log-probabilities are sums over the completion's tokens.

    Example:
        >>> import torch
        >>> import torch.nn.functional as F
        >>> from alignment import PairLoss, PairScores
        >>> class LeadLoss(PairLoss):
        ...     takes_reference = False
        ...     def pair_loss(self, x: PairScores):
        ...         lead = x.chosen_mean - x.rejected_mean
        ...         return F.relu(1.0 - lead), {"lead": lead.detach()}
        >>> hidden, head = torch.randn(4, 6, 8, requires_grad=True), torch.randn(11, 8)  # two pairs, chosen first
        >>> target = torch.randint(0, 11, (4, 6))
        >>> LeadLoss()(hidden, head, target).metrics["lead"].shape
        torch.Size([2])
    """

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


class ContrastLoss(PreferenceLoss):
    """What losses over pairs and over triples share: a chosen completion beside a rejected one.

    Example:
        >>> from alignment import DPOLoss, TPOLoss
        >>> from alignment.pairs import ContrastLoss
        >>> issubclass(DPOLoss, ContrastLoss), issubclass(TPOLoss, ContrastLoss)
        (True, True)
        >>> DPOLoss().completions, TPOLoss().completions
        (2, 3)
    """

    # --- what a loss says of itself ---

    @property
    def completions(self) -> int:
        """Of a group, in a call: chosen, rejected, and what else there is."""
        return 2

    def pair_loss(self, x: PairScores) -> Result:
        """One value per pair, and metrics if there are any."""
        raise NotImplementedError(f"expected {type(self).__name__} to have a pair_loss(self, x), got none")

    @property
    def per_token(self) -> bool:
        """Whether log-probabilities and rewards are logged per token, as TRL does where the loss takes them so."""
        return False

    def logps(self, x: PairScores) -> tuple[Tensor, Tensor]:
        """Log-probabilities of chosen and rejected, as logged."""
        return (x.chosen_mean, x.rejected_mean) if self.per_token else (x.chosen, x.rejected)

    def rewards(self, x: PairScores) -> tuple[Tensor, Tensor]:
        """Rewards of chosen and rejected, as logged."""
        chosen, rejected = self.logps(x)
        if x.has_reference:
            # Formed already, as a rule.
            chosen = x.chosen_ratio if chosen is x.chosen else chosen - x.ref_chosen
            rejected = x.rejected_ratio if rejected is x.rejected else rejected - x.ref_rejected
        return self.reward_scale * chosen, self.reward_scale * rejected

    # --- a call ---

    def _contrasted(
        self,
        policy: Loose,
        target: Tensor | None,
        reference: Loose,
        ref: Head | None,
        ref_logps: Tensor | None,
        nll_target: Tensor | None,
        vectors: Mapping[str, Any],
    ) -> PreparedLoss:
        """What ``prepare`` of both returns."""
        known, key = self._recall(*policy, *reference, ref, ref_logps, target, nll_target, **vectors)
        if known:
            heads = self._known_heads(policy, ref, reference)
        else:
            self._refuse_unknown(vectors)
            heads = self._heads(policy, ref, reference, ref_logps)
            self._check_targets(heads["policy"].hidden, target, nll_target)
        assert target is not None
        states = heads["policy"].hidden
        size = states.shape[0] // self.completions
        given = self._vectors(vectors, size, states.device, known)
        batch = self._batch(size, target, nll_target)
        segments, ids = batch.segments()
        groups = {"segments": batch.of_group}
        if ref_logps is not None:
            groups["ref_logps"] = ref_logps.detach().double().view(2, size).t()
        if given:
            dtype = wide(states.dtype)
            groups |= {name: vector.to(dtype) for name, vector in given.items()}
        try:
            return self._prepared(key, heads, ids, segments, batch.per_group, groups, batch, self._report)
        except ValueError:
            batch.refuse_other_ids()
            raise

    def _batch(self, size: int, target: Tensor, nll_target: Tensor | None) -> Batch:
        """How so many groups lie."""
        raise NotImplementedError

    def _check_targets(self, states: Tensor, target: Any, nll_target: Any) -> None:
        where: dict[str, Any] = {"shape": tuple(states.shape[:2]), "device": states.device, "kind": "integer"}
        checks.tensor("target", target, **where)
        size, odd = divmod(len(states), self.completions)
        if odd or not size:
            what = {2: "pairs, (2B, T, H), chosen first", 3: "triples, (3B, T, H): chosen, rejected, gold"}
            raise ValueError(f"expected hidden of {what[self.completions]}, got {tuple(states.shape)}")

    # --- behind the engine ---

    def of_sums(self, scores: Any, groups: Named, batch: Batch) -> tuple[Tensor, Named]:
        """The loss of some groups, from sums over their segments: ``(groups, segments)`` for each statistic."""
        x = PairSums.of(scores, groups, batch)
        result = self.pair_loss(x)
        loss, metrics = result if isinstance(result, tuple) else (result, {})
        with torch.no_grad():  # few operations: each is a launch
            chosen, rejected = self.rewards(x)
            accuracies = torch.gt(chosen, rejected, out=torch.empty_like(chosen))
            columns = [*self.logps(x), chosen, rejected, chosen - rejected, accuracies]
            tokens = x.chosen_tokens, x.rejected_tokens
            sums, counts = [x.nll_logps], [x.nll_tokens]
            if self.token_metrics:
                sums += [batch.every(x.policy["entropy"]), x.sums["is_top1"][0], *x.sums["mean_logits"]]
                counts += [batch.every(x.count), tokens[0], *tokens]
            table = torch.stack([*columns, *tokens, *sums, *counts], 1)
        return loss, {TABLE: table, **metrics}

    @staticmethod
    def _report(metrics: Named) -> tuple[Named, Named]:
        """Columns of the table as metrics by name; those that are sums become means over all tokens of a kind in the
        batch. -> them, and how many those are."""
        rows = metrics.pop(TABLE).t().contiguous()  # (columns, pairs)
        n = len(METRICS)
        sums, counts = rows[n:].sum(1).chunk(2)
        means = sums / counts.clamp_min(1)
        found = dict(zip(METRICS, rows[:n].unbind(0), strict=True))
        found |= zip(MEANS, means.unbind(0))  # the first alone, where there are no metrics of tokens
        found["nll_loss"] = -found["nll_loss"]
        return found | metrics, dict(zip(MEANS, counts.unbind(0)))


class PairLoss(ContrastLoss):
    """Base of the losses over pairs: a subclass states its numbers as fields, and ``pair_loss``.

    ``loss(hidden, weight, target, ...)``, or ``loss(head, target=target, ...)``, takes both completions of each pair in
    one batch, all chosen ones first; ``forward`` says the rest.

    Example:
        >>> import torch
        >>> import torch.nn.functional as F
        >>> from alignment import PairLoss
        >>> from chunked_embed.checks import POSITIVE
        >>> from chunked_embed.fields import number
        >>> class MarginLoss(PairLoss):
        ...     takes_reference = False
        ...     margin: float = number(1.0, POSITIVE, "least distance of the two, per token")
        ...     def pair_loss(self, x):
        ...         return F.relu(self.margin - x.chosen_mean + x.rejected_mean)
        >>> hidden, head = torch.randn(4, 6, 8, requires_grad=True), torch.randn(11, 8)  # two pairs, chosen first
        >>> target = torch.randint(0, 11, (4, 6))
        >>> MarginLoss(0.5)(hidden, head, target).loss.backward()
        >>> MarginLoss(0.5)
        MarginLoss(margin=0.5)
    """

    takes_nll_target: ClassVar[bool] = False

    @property
    def tail_weight(self) -> float | None:
        """The weight of a completion's tokens beyond the shorter completion's length; None where all weigh alike."""
        return None

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
        policy, reference = (hidden, weight, bias, extra), (ref_hidden, ref_weight, ref_bias, ref_extra)
        return self._contrasted(policy, target, reference, ref, ref_logps, nll_target, vectors)

    @with_arguments_of(prepare)
    def forward(self, *arguments: Any, **keywords: Any) -> LossOutput:
        return self.prepare(*arguments, **keywords).run()

    @with_arguments_of(prepare)
    def plan(self, *arguments: Any, **keywords: Any) -> ChunkPlan:
        """What ``forward`` with the same arguments will do: print it before running."""
        return self.prepare(*arguments, **keywords).plan

    def _batch(self, size: int, target: Tensor, nll_target: Tensor | None) -> Batch:
        if nll_target is not None:
            return TwoTargets(size, target, self.ignore_index, nll_target)
        if (weight := self.tail_weight) is not None:
            return Tails(size, target, self.ignore_index, weight)
        return Batch(size, target, self.ignore_index)

    def _check_targets(self, states: Tensor, target: Any, nll_target: Any) -> None:
        super()._check_targets(states, target, nll_target)
        if nll_target is None:
            return
        if not self.takes_nll_target:
            raise ValueError(f"expected no nll_target, {type(self).__name__} has none")
        if self.tail_weight is not None:
            raise ValueError("expected nll_target or a weight of tails, got both")
        where: dict[str, Any] = {"shape": tuple(states.shape[:2]), "device": states.device, "kind": "integer"}
        checks.tensor("nll_target", nll_target, **where)


class PairSums(PairScores):
    """The scores of some pairs, from sums over their segments. What no loss asks for is not formed."""

    policy: Named
    count: Tensor
    batch: Batch

    @classmethod
    def of(cls, scores: Any, groups: Named, batch: Batch) -> PairSums:
        policy, count = scores["policy"], scores["count"].double()
        x = object.__new__(cls)
        own = x.__dict__  # not by the constructor, which wants all of it
        own.update(policy=policy, count=count, batch=batch, given=groups, sums=Sides(policy, batch.both))
        own["chosen"], own["rejected"] = batch.weighted(policy["logps"])
        own["chosen_tokens"], own["rejected_tokens"] = batch.both(count)
        own["has_reference"] = has_reference = "reference" in scores or "ref_logps" in groups
        if has_reference:
            given = batch.weighted(scores["reference"]["logps"].detach()) if "reference" in scores else None
            own["ref_chosen"], own["ref_rejected"] = given or groups["ref_logps"].unbind(1)
        return x

    @cached_property
    def ref_chosen(self) -> Tensor:
        return torch.zeros_like(self.chosen.detach())

    @cached_property
    def ref_rejected(self) -> Tensor:
        return self.ref_chosen

    @cached_property
    def nll_logps(self) -> Tensor:
        return self.batch.nll(self.policy["logps"], self.chosen)

    @cached_property
    def nll_tokens(self) -> Tensor:
        return self.batch.nll(self.count, self.chosen_tokens)

    @cached_property
    def nll(self) -> Tensor:
        return self.nll_logps * -self.batch.size / self.batch.nll_tokens
