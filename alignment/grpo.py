"""Policy-gradient losses: GRPO and the losses that grew out of it, and RLOO.

Three ways through the engine, by what a token's loss depends on:

    tokens     on the token alone: its loss is a score of its row                                         3 products
    sequences  on sums over its sequence, such as the ratio of a sequence: scores are added up by         3 products
               sequence, and the small loss is a function of sums (4, where a sequence is longer than
               a chunk and several scores have a gradient)
    batch      on other tokens one by one: which have the largest entropies, or advantages of tokens      4 products
               beside the ratio of a sequence. Statistics come first, the loss is behind them
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from chunked_embed import ChunkPlan, Head, LossOutput, TokenStatistics, checks
from chunked_embed.checks import FINITE, NOT_NEGATIVE, POSITIVE, UNIT
from chunked_embed.fields import assign, choice, flag, integer, number
from chunked_embed.signatures import with_arguments_of

from . import policy as AP
from .path import TABLE, Extra, Named, PreferenceLoss, PreparedLoss, wide

Way: TypeAlias = Literal["tokens", "sequences", "batch"]
EntropyMask: TypeAlias = Callable[[Tensor, Tensor], Tensor]
CLIPS = "clip_ratio/low", "clip_ratio/high", "clip_ratio/region"


@dataclass
class PolicyCall:
    """What a call knows of all its sequences."""

    used: Tensor  # (B, T), where there is a token
    tokens: Tensor  # (B,), how many
    weights: Tensor  # (B,), of each sequence's terms in the loss
    entropy_coef: float
    way: Way
    by_token: tuple[str, ...]  # what is logged of each token
    by_sequence: tuple[str, ...]  # and of each sequence
    entropy_mask: EntropyMask | None = None

    @property
    def logged(self) -> tuple[str, ...]:
        return (*self.by_token, *self.by_sequence)

    def table(self, found: Named) -> Named:
        """All that is logged as one metric: a column each."""
        with torch.no_grad():
            return {TABLE: torch.stack([found[name] for name in self.logged], 1)} if self.logged else {}

    def report(self, metrics: Named) -> tuple[Named, Named]:
        """Sums over tokens become means, one a sequence -> those, and what they count."""
        tokens = self.tokens
        found, counts = {"tokens": tokens}, {}
        if self.logged:
            table = metrics.pop(TABLE)
            if self.way == "tokens":
                table = table.view(*self.used.shape, -1).sum(1)
            found |= zip(self.logged, table.to(tokens.dtype).unbind(1), strict=True)
        for name in self.by_token:
            found[name] = found[name] / tokens.clamp_min(1)
            counts[name] = tokens
        low, high, region = CLIPS
        if low in found:
            found[region] = found[low] + found[high]  # of advantages of unlike signs
            counts |= {region: counts[low]} if low in counts else {}
        if (name := "policy_loss") in found:
            found[name] = (found[name] * self.weights).sum()
        return found | metrics, counts


class PolicyScores(TokenStatistics):
    """Scores of the tokens of one policy. The numbers that ``token_fn`` reads are attributes, of the names that
    ``numbers`` has; what is made of the scores is asked of the loss."""

    numbers: ClassVar[tuple[str, ...]] = ()
    asked_by: PolicyLoss
    call: PolicyCall
    way: Way

    def __init__(self) -> None:
        super().__init__()
        self.way = "tokens"

    def loss_fn(self, scores: Named, groups: Named) -> tuple[Tensor, Named]:
        loss, metrics = self.asked_by.of_scores(scores, groups, self.call)
        return (loss * groups["weight"] if "weight" in groups else loss), metrics


class PolicyLoss(PreferenceLoss):
    """Base of the policy-gradient losses: completions with an advantage each, one a row.

    Example:
        >>> from alignment import GRPOLoss, PolicyLoss, RLOOLoss
        >>> issubclass(GRPOLoss, PolicyLoss), issubclass(RLOOLoss, PolicyLoss)
        (True, True)
    """

    takes_reference = False
    engine: ClassVar[type[PolicyScores]]
    shapes: ClassVar[Mapping[str, tuple[str, ...]]]
    """The further tensors of a call, and what may be of each: "sequence" (B,), "token" (B, T), "column" (B, 1)."""

    def way(self, given: Named) -> Way:
        """Through the engine."""
        return "sequences"

    def logs(self, given: Named, entropy_coef: float) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """What is logged of each token, and of each sequence."""
        raise NotImplementedError

    def weights(self, tokens: Tensor, num_items: Any) -> Tensor:
        """Of each sequence's terms in the loss, ``(B,)``."""
        return AP.of_sums(tokens, self, num_items)

    def of_scores(self, scores: Named, groups: Named, call: PolicyCall) -> tuple[Tensor, Named]:
        """The loss of tokens, or of sequences from sums, or of the batch; and what is logged."""
        raise NotImplementedError

    def token_logs(self, entropy_coef: float) -> tuple[str, ...]:
        return ("entropy",) if self.token_metrics or entropy_coef else ()

    @cached_property
    def _engine(self) -> Any:
        """Kept for its layouts."""
        return self.engine()

    def _prepare(
        self, head: tuple[Any, Any, Any, Any], target: Any, named: Mapping[str, Any], **rest: Any
    ) -> PreparedLoss:
        known, key = self._recall(*head, target, *named.values())
        policy = self._known_head(head) if known else self._head("", head)
        if not known:
            self._check_tensors(policy.hidden, target, named)
        dtype = wide(policy.hidden.dtype)
        given = {name: value.detach().to(dtype) for name, value in named.items() if value is not None}
        used = target != self.ignore_index
        tokens = used.sum(1).to(dtype)
        weights, coef = self.weights(tokens, rest.pop("num_items", None)), rest.pop("entropy_coef", 0.0)
        call = PolicyCall(used, tokens, weights, coef, self.way(given), *self.logs(given, coef), **rest)
        return self._call(key, policy, target, given, call)

    def _check_tensors(self, hidden: Tensor, target: Any, named: Mapping[str, Any]) -> None:
        checks.tensor("hidden", hidden, ("batch", "tokens", "features"))
        (size, length), device = hidden.shape[:2], hidden.device
        if not size or not length:
            raise ValueError(f"expected hidden of one token or more, got {tuple(hidden.shape)}")
        checks.tensor("target", target, (size, length), device=device, kind="integer")
        of = {"sequence": (size,), "token": (size, length), "column": (size, 1)}
        for name, value in named.items():
            if value is None:
                continue
            shapes = [of[kind] for kind in self.shapes[name]]
            checks.tensor(name, value, device=device, kind="real")
            if tuple(value.shape) not in shapes:
                raise ValueError(f"expected {name} of shape {' or '.join(map(str, shapes))}, got {tuple(value.shape)}")

    def _call(self, key: Hashable, head: Head, target: Tensor, given: Named, call: PolicyCall) -> PreparedLoss:
        """The engine's call, with the numbers that the loss has now."""
        engine, shape = self._engine, target.shape
        rows = {name: (v[:, None] if v.dim() == 1 else v).expand(shape) for name, v in given.items()}
        segments = None
        if call.way == "batch":  # whose loss is one number, of all tokens; what stands at the others may be NaN
            rows, groups = {}, {name: value.masked_fill(~call.used, 0.0).reshape(-1) for name, value in rows.items()}
        else:
            # Of the mean over groups: weights as such would be looked at, which waits for the device.
            tokens, by_token = call.tokens.sum().clamp_min(1), call.way == "tokens"
            groups = {name: value for name, value in given.items() if value.dim() == 1}
            groups["weight"] = call.weights * (tokens if by_token else len(target))
            if call.entropy_coef:
                groups["entropy_weight"] = call.entropy_coef / (tokens * call.weights)
            if by_token:
                groups = {name: value[:, None].expand(shape).reshape(-1) for name, value in groups.items()}
            else:
                segments = torch.arange(len(target), device=target.device)[:, None].expand(shape)
        snapshot, asking = self._snapshot(), object.__new__(type(engine))
        with self._seen.settling:  # of this call: the loss keeps no batch alive, nor sees another thread's
            self._settle_on(head, call)
            asking.__dict__.update(engine.__dict__, asked_by=snapshot, call=call)
        prepared = asking.prepare(head.projection, {"target": target, **rows}, groups=groups, segments=segments)
        self._seen.keep(key)
        return PreparedLoss(prepared, call.report)

    def _settle_on(self, head: Head, call: PolicyCall) -> None:
        """The engine's options for such a call."""
        scale, softcap = head.transform
        with_entropy = self.token_logs(call.entropy_coef) or call.way == "batch"
        assign(
            self._engine,
            names=("logps", "entropy") if with_entropy else ("logps",),
            gradients_of=("logps", "entropy") if call.entropy_coef else ("logps",),
            way=call.way,
            couples_batch=call.way == "batch",
            logit_scale=scale,
            softcap=softcap,
            temperature=self.temperature,
            chunk_size=self.chunk_size,
            max_chunk_bytes=self.max_chunk_bytes,
            compiled=self.compiled,
            float32_outputs=self.float32_outputs,
            ignore_index=self.ignore_index,
            **{name: getattr(self, name) for name in self._engine.numbers},
        )


# --- GRPO ------------------------------------------------------------------------------------------------------------


class GRPOScores(PolicyScores):
    """Of tokens, for each way."""

    numbers = ("loss_type", "by_sequence", "beta", "use_bias_correction_kl", "off_policy_threshold", *AP.NUMBERS)

    loss_type: str
    by_sequence: bool
    beta: float
    use_bias_correction_kl: bool
    off_policy_threshold: float | None

    def token_fn(self, statistics: Named, rows: Named) -> Named:
        return {"tokens": self.terms, "sequences": self.summands, "batch": lambda s, r: s}[self.way](statistics, rows)

    def terms(self, statistics: Named, rows: Named) -> Named:
        """The loss of each token."""
        logps = statistics["logps"]
        loss, found = AP.at_level(logps - rows.get("old_logps", logps.detach()), logps, rows, self)
        if "kl" in found:
            loss, found["kl"] = loss + self.beta * found["kl"], found["kl"].detach()
        return {"loss": loss, **found, **_entropy(statistics)}

    def summands(self, statistics: Named, rows: Named) -> Named:
        """What a sequence's loss is a function of, when it is added up."""
        logps, advantages = statistics["logps"], rows["advantages"]
        log_ratio = logps - rows.get("old_logps", logps.detach())
        found = _entropy(statistics)
        if "ref_logps" in rows:
            kl, corrected = AP.k3(logps, rows["ref_logps"]), self.use_bias_correction_kl and not self.by_sequence
            found["kl"] = kl * AP.capped_ratio(log_ratio) if corrected else kl
        if self.off_policy_threshold is not None:
            sampled = rows.get("sampling_logps", rows.get("old_logps", logps))
            found["drift"] = (sampled - logps).detach().nan_to_num(0.0)
        if self.by_sequence:  # of a loss that multiplies log-probabilities it is a constant
            learns = not self.of_logps or ("ref_logps" in rows and self.use_bias_correction_kl)
            found["log_ratio"] = log_ratio if learns else log_ratio.detach()
        if self.loss_type == "vespo":
            log_weight = AP.log_weights(log_ratio.detach(), rows.get("importance_weights"))
            return found | {"log_weight": log_weight, "logps": logps}
        weights = rows.get("importance_weights", torch.ones_like(logps))
        if self.by_sequence:
            return found | ({"logps": weights * logps} if self.of_logps else {"weight": weights.detach()})
        term = AP.policy_term(log_ratio, advantages, logps, self)
        return found | AP.clip_marks(log_ratio, advantages, self) | {"term": weights * term}

    @property
    def of_logps(self) -> bool:
        return AP.POLICY_LOSSES[self.loss_type].of_logps


def _entropy(statistics: Named) -> Named:
    return {"entropy": statistics["entropy"]} if "entropy" in statistics else {}


class GRPOLoss(PolicyLoss):
    """Group relative policy optimisation (https://arxiv.org/abs/2402.03300) and the losses that grew out of it.

    With the ratio ``r`` of the policy over the one that sampled, of a token or (``importance_sampling_level``) of its
    sequence, ``exp(mean_t log r_t)``; the advantage ``A``; ``q``, the further ``importance_weights``::

        L = sum over tokens of v (q term + beta kl) - entropy_coef * mean entropy of the tokens
        kl = exp(d) - d - 1,  d = ref_logps - logps  (times r with use_bias_correction_kl, arXiv 2512.02556)

        grpo     -min(min(r, delta) A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A)   v = 1 / (B n)
        bnpo     the same, over the tokens of the batch                                v = 1 / tokens
        dr_grpo  the same                             arXiv 2503.20783                 v = 1 / (B max_completion_length)
        dapo     the same                             arXiv 2503.14476                 v = 1 / num_items
        luspo    the same, at the level of sequences  arXiv 2602.05261                 v = 1 / B
        cispo    -min(r, epsilon_high) A logps        arXiv 2506.13585                 v = 1 / num_items
        sapo     -4/t sigmoid(t (r - 1)) A            arXiv 2511.20347                 v = 1 / (B n)
        vespo    -w^k exp(l (1 - w)) A logps          arXiv 2602.10693                 v = 1 / num_items

    of B sequences of n tokens each; factors before ``logps`` are constants, and VESPO's w is the product of r q over
    the sequence. Names and defaults are TRL's. With ``importance_sampling_level="sequence"`` "grpo" is GSPO
    (https://arxiv.org/abs/2507.18071). ``alignment.policy`` has the terms as pure functions.

    Most take three products, and no chunk need hold a sequence. ``top_entropy_quantile`` below 1 takes four, since it
    compares all tokens first; so do advantages of tokens where the ratio, the weight or the mask is of a sequence.

    Example:
        >>> import torch
        >>> from alignment import GRPOLoss
        >>> hidden = torch.randn(4, 6, 8, requires_grad=True)  # four completions of one prompt
        >>> weight = torch.randn(11, 8, requires_grad=True)  # an LM head over 11 tokens
        >>> target = torch.randint(0, 11, (4, 6))
        >>> target[1, 4:] = -100  # a shorter one
        >>> rewards = torch.tensor([1.0, 0.0, 0.0, 1.0])
        >>> advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        >>> loss = GRPOLoss("grpo", beta=0.04, compiled=False)
        >>> ref_logps = torch.full((4, 6), -2.0)
        >>> out = loss(hidden, weight, target, advantages, old_logps=torch.full((4, 6), -2.2), ref_logps=ref_logps)
        >>> out.loss.backward()
        >>> out.metrics["kl"].shape, out.means["tokens"]
        (torch.Size([4]), tensor(5.5000))
    """

    loss_type: str = choice("dapo", tuple(AP.POLICY_LOSSES), "a name of the table")
    beta: float = number(0.0, NOT_NEGATIVE, "weight of the divergence from the reference", limits=(0.0,))
    epsilon_low: float = number(0.2, NOT_NEGATIVE, "how far below 1 a ratio counts")
    epsilon_high: float = number(0.2, NOT_NEGATIVE, "how far above 1; of cispo, the largest ratio itself")
    delta: float | None = number(None, POSITIVE, "the largest ratio of a bad token, above 1 + epsilon_high")
    importance_sampling_level: str = choice("token", ("token", "sequence"), "whose ratio it is")
    sapo_temperature_pos: float = number(1.0, POSITIVE, "of sapo, where A > 0")
    sapo_temperature_neg: float = number(1.05, POSITIVE, "of sapo, elsewhere")
    vespo_k_pos: float = number(2.0, FINITE, "of vespo, where A >= 0")
    vespo_lambda_pos: float = number(3.0, FINITE, "likewise")
    vespo_k_neg: float = number(3.0, FINITE, "of vespo, where A < 0")
    vespo_lambda_neg: float = number(2.0, FINITE, "likewise")
    use_bias_correction_kl: bool = flag(False, "multiply the divergence by the ratio")
    off_policy_threshold: float | None = number(
        None,
        FINITE,
        "leave out sequences with A < 0 whose tokens are less likely than when they were sampled, by more than this "
        "on average (https://arxiv.org/abs/2512.02556)",
    )
    entropy_coef: float = number(0.0, FINITE, "weight of the entropy, which the loss then raises", limits=(0.0,))
    top_entropy_quantile: float = number(
        1.0, UNIT, "the share of the tokens that have a term, those of largest entropy; 1: all of them", limits=(1.0,)
    )
    max_completion_length: int | None = integer(None, 1, doc="of dr_grpo")

    engine = GRPOScores
    shapes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "advantages": ("sequence", "token"),
        "old_logps": ("token",),
        "ref_logps": ("token",),
        "importance_weights": ("token", "column"),
        "sampling_logps": ("token",),
    }

    # --- options ---

    @property
    def kind(self) -> AP.PolicyType:
        return AP.POLICY_LOSSES[self.loss_type]

    @property
    def by_sequence(self) -> bool:
        """Whether the ratio is a sequence's."""
        return self.importance_sampling_level == "sequence"

    @staticmethod
    def readers(loss_type: str, beta: float) -> Mapping[str, str]:
        """Numbers that this loss does not read, and what would."""
        numbers = (*AP.NUMBERS, "max_completion_length")
        found = {name: f"another loss_type than {loss_type!r}" for name in numbers}
        for name in AP.POLICY_LOSSES[loss_type].reads:
            del found[name]
        return found | ({} if beta else {"use_bias_correction_kl": "a beta above 0"})

    @property
    def unread(self) -> Mapping[str, str]:
        return self.readers(self.loss_type, self.beta)

    def check(self) -> None:
        super().check()
        if self.loss_type == "dr_grpo" and self.max_completion_length is None:
            raise ValueError('expected max_completion_length with loss_type="dr_grpo", which divides by it, got None')

    # --- a call ---

    def prepare(
        self,
        hidden: Tensor | Head,  # (B, T, H)
        weight: Tensor | None = None,  # (V, H)
        target: Tensor | None = None,  # (B, T)
        advantages: Tensor | None = None,  # (B,) or (B, T)
        old_logps: Tensor | None = None,  # (B, T)
        ref_logps: Tensor | None = None,  # (B, T)
        bias: Tensor | None = None,  # (V,)
        *,
        importance_weights: Tensor | None = None,  # (B, T) or (B, 1)
        sampling_logps: Tensor | None = None,  # (B, T)
        num_items: Tensor | float | None = None,  # ()
        entropy_coef: float | None = None,
        entropy_mask: EntropyMask | None = None,
        extra: Extra = (),
    ) -> PreparedLoss:
        """Loss and metrics of B completions. (``prepare`` does no work yet: it has the call's ``plan``, and ``run()``.)

        Args:
            hidden: states that predict the completions' tokens. Or a ``Head`` in place of hidden, weight, bias and
                extra.
            weight, bias: the LM head.
            target: the token that each state predicts; ``ignore_index`` drops it.
            advantages: of each completion, or of each token. They and all that follow are constants.
            old_logps: log-probabilities of the tokens under the policy that sampled them; None: it is this one.
            ref_logps: likewise the reference's, where beta is not 0.
            importance_weights: q, such as those of a sampler that is not quite the policy; of vespo, those of tokens.
            sampling_logps: what ``off_policy_threshold`` compares with; None: ``old_logps``.
            num_items: of dapo, cispo and vespo, above 0; None: the tokens of this batch. The tokens of all processes,
                divided by their number, make up for a mean of gradients over processes.
            entropy_coef: of this call, in place of the loss's: one that changes at each step.
            entropy_mask: ``entropy_mask(entropies, used) -> bool``, all ``(B, T)``, in place of the tokens of largest
                entropy of this batch: of all processes, say.
            extra: further ``(input, weight)`` terms of the logits: a LoRA adapter on the head is
                ``((hidden @ A.T, scale * B),)``.

        Returns:
            ``loss`` and ``metrics``, one value a completion, with ``counts``: of its tokens ``entropy``, ``kl`` (where
            there is a reference), ``clip_ratio/low``, ``/high`` and ``/region`` or ``cispo_clip_ratio`` (of the
            completion, where the ratio is); ``vespo/phi_seq``; ``tokens``, how many it has. With ``entropy_coef`` also
            ``policy_loss``, one number: the loss without the entropy.

        Raises:
            ValueError, TypeError: shapes, dtypes, ids and options that do not fit, before any work.
        """
        named = {
            "advantages": advantages,
            "old_logps": old_logps,
            "ref_logps": ref_logps,
            "importance_weights": importance_weights,
            "sampling_logps": sampling_logps,
        }
        self._refuse(named, num_items, entropy_mask)
        num_items = None if num_items is None else checks.items("num_items", num_items)
        coef = self.entropy_coef if entropy_coef is None else checks.number("entropy_coef", entropy_coef, FINITE)
        rest = {"num_items": num_items, "entropy_mask": entropy_mask, "entropy_coef": coef}
        return self._prepare((hidden, weight, bias, extra), target, named, **rest)

    @with_arguments_of(prepare)
    def forward(self, *arguments: Any, **keywords: Any) -> LossOutput:
        return self.prepare(*arguments, **keywords).run()

    @with_arguments_of(prepare)
    def plan(self, *arguments: Any, **keywords: Any) -> ChunkPlan:
        """What ``forward`` with the same arguments will do: print it before running."""
        return self.prepare(*arguments, **keywords).plan

    def _refuse(self, named: Mapping[str, Any], num_items: Any, entropy_mask: Any) -> None:
        """Arguments that are missing, and those that nothing reads."""
        if named["advantages"] is None:
            raise ValueError("expected advantages, one a completion or one a token, got None")
        if (named["ref_logps"] is None) is (self.beta != 0):
            got = "None" if self.beta else "them"
            raise ValueError(f"expected ref_logps if beta is above 0 and else none, got {got} with beta={self.beta}")
        readers = {
            "sampling_logps": (named["sampling_logps"], self.off_policy_threshold is not None, "off_policy_threshold"),
            "num_items": (num_items, self.kind.weights is AP.per_item, 'loss_type "dapo", "cispo" or "vespo"'),
            "entropy_mask": (entropy_mask, self.top_entropy_quantile < 1, "top_entropy_quantile below 1"),
        }
        for name, (value, read, reader) in readers.items():
            if value is not None and not read:
                raise ValueError(f"expected no {name}, which nothing reads without {reader}, got it")
        checks.function_or_none("entropy_mask", entropy_mask)

    def _check_tensors(self, hidden: Tensor, target: Any, named: Mapping[str, Any]) -> None:
        super()._check_tensors(hidden, target, named)
        weights = named["importance_weights"]
        if self.loss_type == "vespo" and weights is not None and weights.shape != target.shape:
            raise ValueError(
                f"expected importance_weights of tokens, {tuple(target.shape)}, with loss_type 'vespo', which "
                f"multiplies them, got {tuple(weights.shape)}"
            )

    def way(self, given: Named) -> Way:
        coupled = self.by_sequence or self.loss_type == "vespo" or self.off_policy_threshold is not None
        if self.top_entropy_quantile < 1 or (coupled and given["advantages"].dim() == 2):
            return "batch"
        return "sequences" if coupled else "tokens"

    def logs(self, given: Named, entropy_coef: float) -> tuple[tuple[str, ...], tuple[str, ...]]:
        by_token = (*(("kl",) if self.beta else ()), *self.token_logs(entropy_coef))
        policy = ("policy_loss",) if entropy_coef else ()
        of_sequence = (self.by_sequence or self.loss_type == "vespo") and given["advantages"].dim() == 1
        return (by_token, (*self.kind.logs, *policy)) if of_sequence else ((*by_token, *self.kind.logs), policy)

    def weights(self, tokens: Tensor, num_items: Any) -> Tensor:
        return self.kind.weights(tokens, self, num_items)

    # --- behind the engine ---

    def of_scores(self, scores: Named, groups: Named, call: PolicyCall) -> tuple[Tensor, Named]:
        if call.way == "batch":
            return self._of_batch(scores, groups, call)
        scores = {name: value[:, 0] for name, value in scores.items()}
        loss, found = (scores["loss"], scores) if call.way == "tokens" else self._of_sequences(scores, groups)
        if call.entropy_coef:
            found = found | {"policy_loss": loss}
            loss = loss - groups["entropy_weight"] * scores["entropy"]
        return loss, call.table(found)

    def _of_sequences(self, x: Named, groups: Named) -> tuple[Tensor, Named]:
        """From sums over tokens, ``(sequences,)``."""
        advantages, tokens, found = groups["advantages"], x["count"].clamp_min(1), dict(x)
        if self.loss_type == "vespo":
            loss = AP.policy_term(x["log_weight"], advantages, x["logps"], self)
            found |= AP.clip_marks(x["log_weight"], advantages, self)
        elif self.by_sequence:
            log_ratio = x["log_ratio"] / tokens
            loss = AP.policy_term(log_ratio, advantages, x.get("logps", x["log_ratio"]), self)
            loss = loss if self.kind.of_logps else loss * x["weight"].detach()
            found |= AP.clip_marks(log_ratio, advantages, self)
        else:
            loss = x["term"]
        if self.off_policy_threshold is not None:
            loss = loss * AP.kept(advantages, x["drift"].detach() / tokens, threshold=self.off_policy_threshold)
        if self.beta:
            ratio = x["log_ratio"] / tokens if self.by_sequence and self.use_bias_correction_kl else None
            found["kl"] = kl = x["kl"] if ratio is None else x["kl"] * AP.capped_ratio(ratio)
            loss = loss + self.beta * kl
        return loss, found

    def _of_batch(self, scores: Named, groups: Named, call: PolicyCall) -> tuple[Tensor, Named]:
        """From statistics of all tokens; zero where there is none."""
        used = call.used.to(scores["logps"].dtype)  # (B, T)
        logps, entropies = (scores[name].view(used.shape) for name in ("logps", "entropy"))
        x = {name: value.view(used.shape) for name, value in groups.items()}
        chosen = used * self._largest(entropies.detach(), call).to(used.dtype)
        loss, found = self.of_tokens(logps, x, used)
        loss = loss * chosen + (self.beta * found["kl"] if self.beta else 0.0)
        loss = (loss * used).sum(1)
        total = (loss * call.weights).sum()
        if call.entropy_coef:
            total = total - call.entropy_coef * (entropies * chosen).sum() / chosen.sum().clamp_min(1)
        found["entropy"] = entropies
        with torch.no_grad():
            sums = {name: (found[name] * used).sum(1) for name in call.by_token}
            sums |= {name: found[name][:, 0] for name in call.by_sequence if name in found}
            sums["policy_loss"] = loss
        return total, call.table(sums)

    def _largest(self, entropies: Tensor, call: PolicyCall) -> Tensor:
        if self.top_entropy_quantile == 1:
            return call.used
        if call.entropy_mask is not None:
            mask = call.entropy_mask(entropies, call.used)
            return checks.tensor("what entropy_mask returns", mask, tuple(call.used.shape), device=call.used.device)
        return AP.high_entropy(entropies, call.used, self.top_entropy_quantile)

    def of_tokens(self, logps: Tensor, x: Named, used: Tensor) -> tuple[Tensor, Named]:
        """The terms without the divergence, and that and what else is logged, of whole tensors ``(B, T)``: the formula
        as it stands."""
        tokens = used.sum(1, keepdim=True).clamp_min(1)
        old = x.get("old_logps", logps.detach())
        log_ratio = (logps - old) * used
        level = log_ratio.sum(1, keepdim=True) / tokens if self.by_sequence else log_ratio
        log_weight = None
        if self.loss_type == "vespo":
            log_weight = AP.log_weights(log_ratio, x.get("importance_weights"), used).sum(1, keepdim=True)
        loss, found = AP.at_level(level, logps, x, self, log_weight)
        if self.off_policy_threshold is not None:
            drift = ((x.get("sampling_logps", old) - logps).detach().nan_to_num(0.0) * used).sum(1, keepdim=True)
            loss = loss * AP.kept(x["advantages"], drift / tokens, threshold=self.off_policy_threshold)
        return loss, found


# --- RLOO ------------------------------------------------------------------------------------------------------------


class RLOOScores(PolicyScores):
    """The statistics as they are."""

    def token_fn(self, statistics: Named, rows: Named) -> Named:
        return statistics


class RLOOLoss(PolicyLoss):
    """REINFORCE leave one out (https://arxiv.org/abs/2402.14740) with a clipped ratio, as in TRL:
    ``-min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A)``, the mean over completions, ``r = exp(sum_t (logps -
    old_logps))``. The divergence from a reference is part of the rewards.

    Example:
        >>> import torch
        >>> from alignment import RLOOLoss
        >>> hidden, head = torch.randn(4, 6, 8, requires_grad=True), torch.randn(11, 8)
        >>> target, rewards = torch.randint(0, 11, (4, 6)), torch.tensor([1.0, 0.0, 0.0, 2.0])
        >>> advantages = rewards - (rewards.sum() - rewards) / 3  # of the others' mean
        >>> out = RLOOLoss(compiled=False)(hidden, head, target, advantages, old_logps=torch.full((4,), -15.0))
        >>> out.loss.backward()
        >>> out.metrics["clip_ratio/region"].shape
        torch.Size([4])
    """

    epsilon_low: float = number(0.2, NOT_NEGATIVE, "how far below 1 a ratio counts")
    epsilon_high: float = number(0.2, NOT_NEGATIVE, "how far above 1")

    engine = RLOOScores
    shapes: ClassVar[Mapping[str, tuple[str, ...]]] = {"advantages": ("sequence",), "old_logps": ("sequence", "token")}

    def prepare(
        self,
        hidden: Tensor | Head,  # (B, T, H)
        weight: Tensor | None = None,  # (V, H)
        target: Tensor | None = None,  # (B, T)
        advantages: Tensor | None = None,  # (B,)
        old_logps: Tensor | None = None,  # (B,) or (B, T)
        bias: Tensor | None = None,  # (V,)
        *,
        extra: Extra = (),
    ) -> PreparedLoss:
        """Loss and metrics of B completions. (``prepare`` does no work yet: it has the call's ``plan``, and ``run()``.)

        Args:
            hidden, weight, target, bias, extra: as in ``GRPOLoss.forward``.
            advantages: of each completion, constants.
            old_logps: log-probabilities of the completions, or of their tokens, under the policy that sampled them;
                None: it is this one.

        Returns:
            ``loss`` and ``metrics``, one value a completion: ``clip_ratio/low``, ``/high`` and ``/region``, ``tokens``,
            how many it has, and of those ``entropy``.

        Raises:
            ValueError, TypeError: shapes, dtypes, ids and options that do not fit, before any work.
        """
        if advantages is None:
            raise ValueError("expected advantages, one a completion, got None")
        if isinstance(old_logps, Tensor) and isinstance(target, Tensor) and old_logps.shape == target.shape:
            old_logps = old_logps.masked_fill(target == self.ignore_index, 0.0).sum(1)
        named = {"advantages": advantages, "old_logps": old_logps}
        return self._prepare((hidden, weight, bias, extra), target, named)

    @with_arguments_of(prepare)
    def forward(self, *arguments: Any, **keywords: Any) -> LossOutput:
        return self.prepare(*arguments, **keywords).run()

    @with_arguments_of(prepare)
    def plan(self, *arguments: Any, **keywords: Any) -> ChunkPlan:
        """What ``forward`` with the same arguments will do: print it before running."""
        return self.prepare(*arguments, **keywords).plan

    def logs(self, given: Named, entropy_coef: float) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return self.token_logs(entropy_coef), AP.CLIP

    def of_scores(self, scores: Named, groups: Named, call: PolicyCall) -> tuple[Tensor, Named]:
        x = {name: value[:, 0] for name, value in scores.items()}
        log_ratio, advantages = x["logps"] - groups.get("old_logps", x["logps"].detach()), groups["advantages"]
        numbers = {"epsilon_low": self.epsilon_low, "epsilon_high": self.epsilon_high}
        marks = AP.clipping(log_ratio.detach(), advantages, delta=None, **numbers)
        loss = AP.clipped(log_ratio, advantages, delta=None, **numbers)
        return loss, call.table(x | dict(zip(AP.CLIP, marks)))
