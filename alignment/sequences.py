"""Losses over single completions with a verdict each: ``SequenceLoss``, to which a loss adds formula and numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from chunked_embed import ChunkPlan, Head, LossOutput, checks
from chunked_embed.signatures import with_arguments_of

from .path import TABLE, Extra, Named, PreferenceLoss, PreparedLoss, Result, wide


@dataclass(frozen=True)
class SequenceScores:
    """What the loss of a single sequence sees, each ``(B,)``. Log-probabilities are sums over its tokens.

    Example:
        >>> import torch
        >>> from alignment import SequenceLoss, SequenceScores
        >>> class Signed(SequenceLoss):
        ...     def sequence_loss(self, x: SequenceScores):
        ...         return torch.where(x.desirable, -x.ratio, x.ratio) / x.tokens
        >>> hidden, head = torch.randn(4, 6, 8, requires_grad=True), torch.randn(11, 8)
        >>> target, good = torch.randint(0, 11, (4, 6)), torch.tensor([True, False, False, True])
        >>> Signed()(hidden, head, target, good, ref_logps=torch.full((4,), -14.0)).loss.backward()
    """

    logps: Tensor
    ref_logps: Tensor  # of the reference
    tokens: Tensor  # how many
    desirable: Tensor  # bool
    given: Mapping[str, Tensor] = field(default_factory=dict)
    """The call's further vectors and numbers."""

    @cached_property
    def ratio(self) -> Tensor:
        """Log of policy over reference."""
        return self.logps - self.ref_logps


class SequenceLoss(PreferenceLoss):
    """Base of the losses over single sequences with a verdict each: a subclass states its numbers as fields, and
    ``sequence_loss``.

    ``loss(hidden, weight, target, preference_labels, ...)``, or ``loss(head, target=target, ...)``; ``forward`` says
    the rest.

    Example:
        >>> import torch
        >>> import torch.nn.functional as F
        >>> from alignment import SequenceLoss
        >>> from chunked_embed.checks import POSITIVE
        >>> from chunked_embed.fields import number
        >>> class LogisticLoss(SequenceLoss):
        ...     beta: float = number(0.1, POSITIVE, "scale of the log-ratios")
        ...     def sequence_loss(self, x):
        ...         return -F.logsigmoid(self.beta * torch.where(x.desirable, x.ratio, -x.ratio))
        >>> hidden, head = torch.randn(4, 6, 8, requires_grad=True), torch.randn(11, 8)
        >>> target, good = torch.randint(0, 11, (4, 6)), torch.tensor([True, False, False, True])
        >>> out = LogisticLoss()(hidden, head, target, good, ref_logps=torch.full((4,), -14.0))
        >>> out.loss.backward()
        >>> out.metrics["rewards"].shape
        torch.Size([4])
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
        policy, reference = (hidden, weight, bias, extra), (ref_hidden, ref_weight, ref_bias, ref_extra)
        known, key = self._recall(*policy, *reference, ref, ref_logps, target, preference_labels, **vectors)
        if known:
            heads = self._known_heads(policy, ref, reference)
        else:
            self._refuse_unknown(vectors)
            heads = self._heads(policy, ref, reference, ref_logps)
            self._check_targets(heads["policy"].hidden, target, preference_labels)
        assert target is not None and preference_labels is not None
        states = heads["policy"].hidden
        size = states.shape[0]
        given = self._vectors(vectors, size, states.device, known)
        # Of ids that are ignored no segment is read: the engine drops them.
        segments = torch.arange(size, device=states.device)[:, None].expand(target.shape)
        groups = {"desirable": preference_labels}
        if ref_logps is not None:
            groups["ref_logps"] = ref_logps.detach().double()
        if given:
            dtype = wide(states.dtype)
            groups |= {name: vector.detach().to(dtype) for name, vector in given.items()}
        report = partial(self._report, preference_labels)
        return self._prepared(key, heads, target, segments, 1, groups, None, report)

    def _check_targets(self, states: Tensor, target: Any, preference_labels: Any) -> None:
        size, device = len(states), states.device
        checks.tensor("target", target, tuple(states.shape[:2]), device=device, kind="integer")
        if not size:
            raise ValueError(f"expected hidden of one sequence or more, got {tuple(states.shape)}")
        checks.tensor("preference_labels", preference_labels, (size,), device=device, kind="bool")

    @with_arguments_of(prepare)
    def forward(self, *arguments: Any, **keywords: Any) -> LossOutput:
        return self.prepare(*arguments, **keywords).run()

    @with_arguments_of(prepare)
    def plan(self, *arguments: Any, **keywords: Any) -> ChunkPlan:
        """What ``forward`` with the same arguments will do: print it before running."""
        return self.prepare(*arguments, **keywords).plan

    def of_sums(self, scores: Any, groups: Named, batch: None) -> tuple[Tensor, Named]:
        """The loss of some sequences, from sums over their tokens: ``(sequences, 1)`` for each statistic."""
        policy = {name: value[:, 0] for name, value in scores["policy"].items()}
        reference = scores["reference"]["logps"].detach()[:, 0] if "reference" in scores else groups["ref_logps"]
        x = SequenceScores(policy["logps"], reference, scores["count"][:, 0], groups["desirable"], groups)
        result = self.sequence_loss(x)
        loss, metrics = result if isinstance(result, tuple) else (result, {})
        with torch.no_grad():
            columns = [x.logps, self.reward_scale * x.ratio, x.tokens.double()]
            if self.token_metrics:
                columns += [policy[name] for name in ("entropy", "is_top1", "mean_logits")]
            table = torch.stack(columns, 1)
        return loss, {TABLE: table, **metrics}

    def _report(self, desirable: Tensor, metrics: Named) -> tuple[Named, Named]:
        """Means over the chosen and over the rejected sequences, and over all tokens of a kind in the batch; zero
        where there are none. -> those, and what they count."""
        rows = metrics.pop(TABLE).t().contiguous()  # (columns, B)
        sides = torch.stack([desirable, ~desirable])
        members = sides.to(rows.dtype)
        # Not by a product: what is infinite on the other side would be NaN here.
        by_side = torch.where(sides[:, None], rows, 0.0)  # (2, columns, B)
        sums, sizes = by_side.sum(-1), members.sum(-1)
        means = (sums[:, :2] / sizes.clamp_min(1)[:, None]).flatten().unbind(0)
        found = {"logps": rows[0], "rewards": rows[1]}
        found["tokens/chosen"], found["tokens/rejected"] = by_side[:, 2].unbind(0)
        found["count/chosen"], found["count/rejected"] = chosen, rejected = sizes.unbind(0)
        found |= zip(("logps/chosen", "rewards/chosen", "logps/rejected", "rewards/rejected"), means, strict=True)
        found["rewards/margins"] = means[1] - means[3]
        counts = dict(zip(("tokens/chosen", "tokens/rejected"), members.unbind(0), strict=True))
        counts |= {f"{name}/chosen": chosen for name in ("logps", "rewards")}
        counts |= {f"{name}/rejected": rejected for name in ("logps", "rewards")}
        if self.token_metrics:
            # Columns: log-probabilities, rewards, tokens, entropy, is_top1, mean_logits.
            c, r, both = (side.unbind(0) for side in (*sums.unbind(0), sums.sum(0)))
            names = ("entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected")
            each = torch.stack([both[3], c[4], c[5], r[5], both[2], c[2], c[2], r[2]])
            total, of_tokens = each.chunk(2)
            found |= zip(names, (total / of_tokens.clamp_min(1)).unbind(0), strict=True)
            counts |= zip(names, of_tokens.unbind(0), strict=True)
        for name in self.takes_numbers:
            if name in metrics:  # the same for every sequence
                metrics[name] = metrics[name][0]
        return found | metrics, counts
