"""The one path of all preference losses: token statistics by the engine, summed per segment, and a small loss on them.

A loss states which vectors it wants (``PairLoss``, ``SequenceLoss``) and a function of them; nothing else here knows
one loss from another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from numbers import Real
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chunked_embed import ChunkPlan, FlexChunkLoss, LossOutput, Projection, TokenStatistics

from .functional import mean_logps, wpo_weight

Named = dict[str, Tensor]
Extra = tuple[tuple[Tensor, Tensor], ...]
TOKEN_METRICS = ("entropy", "mean_logits", "is_top1")


# --- what the engine is asked for ------------------------------------------------------------------------------------


class _TokenScore(TokenStatistics):
    """Scores each projection on its own. Its steps are what is compiled, so all losses over pairs share them."""

    separate_outputs = True


@lru_cache(maxsize=64)  # making modules takes longer than using them
def _token_score(names: tuple[str, ...], options: tuple[tuple[str, Any], ...]) -> _TokenScore:
    return _TokenScore(names, gradients_of=("logps",), **dict(options))


class SequenceEngine(_TokenScore):
    """Policy and reference, token by token, one sequence a group. The policy is asked for more than the reference."""

    def __init__(self, function: Callable[[Named, Named], Any], names: tuple[str, ...], **options: Any) -> None:
        super().__init__(names, **options)
        self._loss_of_scores = function

    def loss_fn(self, scores: Any, groups: Any, hp: Any) -> Any:
        return self._loss_of_scores(scores, groups)

    def _score(self, call: Any, names: tuple[str, ...]) -> Any:
        options = tuple((n, getattr(self, n)) for n in ("logit_scale", "softcap", "temperature", "compiled"))
        return _token_score(("logps",) if names == ("reference",) else self.names, options)._score(call, names)


class CoupledSequenceEngine(SequenceEngine):
    couples_batch = True


class PairEngine(SequenceEngine):
    """Two completions a group. Each has two segments: see ``PairLoss._segments``."""

    segments_per_group = 4


class CoupledPairEngine(PairEngine):
    couples_batch = True


class DivergencePairEngine(FlexChunkLoss):
    """Policy and reference side by side, for what needs both their distributions: KL(reference || policy)."""

    segments_per_group = 4
    index_rows = ("target",)
    float32_outputs = True

    def __init__(
        self,
        function: Callable[[Any, Named], Any],
        names: tuple[str, ...],
        logit_scale: float,
        softcap: float | None,
        temperature: float,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.names = names
        self.logit_scale = logit_scale
        self.softcap = softcap
        self.temperature = temperature
        self._loss_of_scores = function

    def score_fn(self, outputs: Any, rows: Any, hp: Any) -> Named:
        cap = getattr(hp, "softcap", None)
        z, zr = (_transform(outputs[name], hp.logit_scale, cap, hp.temperature) for name in ("policy", "reference"))
        target = rows["target"].long()
        policy, reference = z.log_softmax(1), zr.log_softmax(1)
        kl = reference.exp() * (reference.clamp_min(-800.0) - policy.clamp_min(-800.0))  # 0 * -inf is 0 here
        scores = {
            "logps": -F.cross_entropy(z, target, reduction="none"),
            "ref_logps": -F.cross_entropy(zr, target, reduction="none"),
            "kl": kl.sum(1),
        }
        if self.names != ("logps",):
            z, policy = z.detach(), policy.detach()
            own = torch.where(torch.arange(z.shape[1], device=z.device) == target[:, None], z, -torch.inf)
            scores["entropy"] = -(policy.exp() * policy.clamp_min(-800.0)).sum(1)
            scores["mean_logits"] = z.mean(1)
            scores["is_top1"] = (own.amax(1) >= z.amax(1)).to(z.dtype)
        return scores

    def loss_fn(self, scores: Any, groups: Any, hp: Any) -> Any:
        reference = {"logps": scores["ref_logps"]}
        return self._loss_of_scores({"policy": scores, "reference": reference, "count": scores["count"]}, groups)


def _transform(x: Tensor, logit_scale: Tensor, softcap: Tensor | None, temperature: Tensor) -> Tensor:
    if softcap is None:
        return x * (logit_scale / temperature)
    return torch.tanh(x * (logit_scale / softcap)) * (softcap / temperature)


# --- checks ----------------------------------------------------------------------------------------------------------


class Range(NamedTuple):
    """The numbers that an option may be."""

    low: float
    high: float
    text: str
    low_included: bool = False

    def holds(self, value: float) -> bool:
        return (
            math.isfinite(value)
            and value < self.high
            and (value >= self.low if self.low_included else value > self.low)
        )


POSITIVE = Range(0, math.inf, "a positive, finite number")
NOT_NEGATIVE = Range(0, math.inf, "a finite number, zero or more", low_included=True)
SMOOTHING = Range(0, 0.5, "a number in [0, 0.5)", low_included=True)
FINITE = Range(-math.inf, math.inf, "a finite number")


def check_number(name: str, value: Any, allowed: Range) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not allowed.holds(float(value)):
        raise ValueError(f"expected {name} to be {allowed.text}, got {value!r}")


def check_choice(name: str, value: Any, choices: Any) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"expected {name} to be one of {sorted(choices)}, got {value!r}")


def _check_shape(name: str, tensor: Any, shape: tuple[int | str, ...], device: torch.device | None = None) -> None:
    """Numbers in ``shape`` are exact; strings say what a dimension is and may be any size."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"expected {name} to be a tensor, got {type(tensor).__name__}")
    fits = tensor.dim() == len(shape) and all(
        isinstance(want, str) or want == got for want, got in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        raise ValueError(f"expected {name} of shape ({', '.join(map(str, shape))}), got {tuple(tensor.shape)}")
    if device is not None and tensor.device != device:
        raise ValueError(f"expected {name} on {device}, got {tensor.device}")


def _check_ids(name: str, ids: Any, hidden: Tensor) -> None:
    _check_shape(name, ids, tuple(hidden.shape[:2]), hidden.device)
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise TypeError(f"expected {name} to hold integers, got {ids.dtype}")


# --- all losses ------------------------------------------------------------------------------------------------------


@dataclass
class Arguments:
    """A call to the engine, and what of it the results still need."""

    engine: FlexChunkLoss
    projections: dict[str, Projection]
    rows: Named
    groups: Named
    segments: Tensor

    def as_keywords(self) -> dict[str, Any]:
        return {"rows": self.rows, "groups": self.groups, "segments": self.segments}


class PreferenceLoss(nn.Module):
    """A preference loss from hidden states and an LM head; the logits are never held whole.

    Args:
        logit_scale, logit_softcap, temperature: of the logits, as for ``linear_logps``; policy and reference alike.
        ignore_index: target of tokens that count for nothing (prompt, padding): dropped before any product.
        token_metrics: also report the metrics that need more of a token's logits than its log-probability.
        chunk_size, max_chunk_bytes, compiled: as for ``FlexChunkLoss``.
    """

    ranges: ClassVar[Mapping[str, Range]] = {}
    """What each number of the loss may be."""
    choices: ClassVar[Mapping[str, Any]] = {}
    """What each of its names may be."""
    takes_reference: ClassVar[bool | None] = True
    """True: needs a reference; False: has none; None: either."""
    takes_ref_logps: ClassVar[bool] = True
    """Whether the reference's log-probabilities are enough of it."""
    takes_vectors: ClassVar[tuple[str, ...]] = ()
    """Further arguments, one number a pair or a sequence; those of pairs may require grad."""
    takes_numbers: ClassVar[tuple[str, ...]] = ()
    """Further arguments of one number each, which the loss sees once a sequence."""

    def __init__(
        self,
        *,
        logit_scale: float = 1.0,
        logit_softcap: float | None = None,
        temperature: float = 1.0,
        ignore_index: int = -100,
        token_metrics: bool = True,
        chunk_size: int | None = None,
        max_chunk_bytes: int | None = None,
        compiled: bool = True,
    ) -> None:
        super().__init__()
        self.logit_scale = logit_scale
        self.logit_softcap = logit_softcap
        self.temperature = temperature
        self.ignore_index = ignore_index
        self.token_metrics = token_metrics
        self.chunk_size = chunk_size
        self.max_chunk_bytes = max_chunk_bytes
        self.compiled = compiled
        # The engine knows its own options; it refuses them here rather than at the first call.
        TokenStatistics(("logps",), **self._options())

    def check(self) -> None:
        """Refuse options that mean nothing; run at construction and before each call, since attributes may change."""
        for name, allowed in self.ranges.items():
            check_number(name, getattr(self, name), allowed)
        for name, choices in self.choices.items():
            check_choice(name, getattr(self, name), choices)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in (*self.choices, *self.ranges))

    def _statistics(self) -> tuple[str, ...]:
        """What is asked of the policy's tokens."""
        return ("logps", *TOKEN_METRICS) if self.token_metrics else ("logps",)

    def _make(self, engine: Callable[..., FlexChunkLoss]) -> FlexChunkLoss:
        return engine(self._from_scores, self._statistics(), **self._options())

    def _options(self) -> dict[str, Any]:
        return {
            "logit_scale": self.logit_scale,
            "softcap": self.logit_softcap,
            "temperature": self.temperature,
            "chunk_size": self.chunk_size,
            "max_chunk_bytes": self.max_chunk_bytes,
            "compiled": self.compiled,
        }

    def _engine(self) -> Callable[..., FlexChunkLoss]:
        raise NotImplementedError

    def _from_scores(self, scores: Any, groups: Named) -> tuple[Tensor, Named]:
        raise NotImplementedError

    def _arguments(self, *arguments: Any, **keywords: Any) -> Arguments:
        """The call to the engine that ``forward`` with these arguments makes."""
        raise NotImplementedError

    def plan(self, *arguments: Any, **keywords: Any) -> ChunkPlan:
        """What ``forward`` with the same arguments will do: print it before running."""
        call = self._arguments(*arguments, **keywords)
        return call.engine.plan(call.projections, **call.as_keywords())

    def _check_vectors(self, vectors: Mapping[str, Any], shape: tuple[int, ...], hidden: Tensor) -> None:
        for name, vector in vectors.items():
            if name not in (*self.takes_vectors, *self.takes_numbers):
                raise TypeError(f"{type(self).__name__} takes no argument {name!r}")
            _check_shape(name, vector, shape, hidden.device)

    def _check_batch(self, hidden: Any, weight: Any, target: Any) -> None:
        _check_shape("hidden", hidden, ("batch", "tokens", "features"))
        _check_shape("weight", weight, ("vocabulary", hidden.shape[2]), hidden.device)
        _check_ids("target", target, hidden)
        if not hidden.shape[1]:
            raise ValueError(f"expected hidden of one token or more, got {tuple(hidden.shape)}")

    def _projections(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        extra: Extra,
        ref_hidden: Tensor | None,
        ref_weight: Tensor | None,
        ref_bias: Tensor | None,
        ref_extra: Extra,
        ref_logps: Tensor | None,
    ) -> dict[str, Projection]:
        """Checks the reference, and that there is one where the loss wants it."""
        name = type(self).__name__
        given = [n for n, t in (("ref_hidden", ref_hidden), ("ref_logps", ref_logps)) if t is not None]
        if self.takes_reference is False and given:
            raise ValueError(f"expected no reference, {name} has none, got {given[0]}")
        if self.takes_reference and not given:
            raise ValueError(f"expected ref_hidden and ref_weight, or ref_logps: {name} compares with a reference")
        if len(given) == 2:
            raise ValueError("expected ref_hidden or ref_logps, got both")
        if ref_logps is not None and not self.takes_ref_logps:
            raise ValueError(f"expected ref_hidden and ref_weight, got ref_logps: {name} needs whole distributions")
        if ref_hidden is None and (ref_weight is not None or ref_bias is not None or ref_extra):
            raise ValueError("expected ref_hidden with the reference's head, got the head alone")
        projections = {"policy": Projection(hidden, weight, bias, tuple(extra))}
        if ref_logps is not None:
            _check_shape("ref_logps", ref_logps, (hidden.shape[0],), hidden.device)
        if ref_hidden is not None:
            if ref_weight is None:
                raise ValueError("expected ref_weight with ref_hidden, got None")
            _check_shape("ref_hidden", ref_hidden, (*hidden.shape[:2], "features"), hidden.device)
            _check_shape("ref_weight", ref_weight, ("vocabulary", ref_hidden.shape[2]), hidden.device)
            # The reference is frozen, whatever its tensors say.
            frozen = tuple((x.detach(), w.detach()) for x, w in ref_extra)
            ref_bias = None if ref_bias is None else ref_bias.detach()
            projections["reference"] = Projection(ref_hidden.detach(), ref_weight.detach(), ref_bias, frozen)
        return projections

    def _run(self, arguments: Arguments) -> LossOutput:
        out = arguments.engine(arguments.projections, **arguments.as_keywords())
        # A batch without a token has no loss; the product keeps it differentiable.
        loss = out.loss * (arguments.segments >= 0).any()
        return LossOutput(loss, self._report(dict(out.metrics)))

    def _report(self, metrics: Named) -> Named:
        """Sums over tokens become means, over all tokens of a kind in the batch."""
        if "_entropy" in metrics:
            tokens = metrics["tokens/chosen"].sum(), metrics["tokens/rejected"].sum()
            n_chosen, n_rejected = (n.clamp_min(1) for n in tokens)
            metrics["entropy"] = metrics.pop("_entropy").sum() / (tokens[0] + tokens[1]).clamp_min(1)
            metrics["mean_token_accuracy"] = metrics.pop("_top1").sum() / n_chosen
            metrics["logits/chosen"] = metrics.pop("_logits/chosen").sum() / n_chosen
            metrics["logits/rejected"] = metrics.pop("_logits/rejected").sum() / n_rejected
        return metrics


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# --- pairs -----------------------------------------------------------------------------------------------------------


@dataclass
class PairScores:
    """What a pair's loss sees, each ``(B,)``. Log-probabilities are sums over the completion's tokens."""

    c: Tensor
    r: Tensor
    rc: Tensor  # of the reference; zero without one
    rr: Tensor
    nc: Tensor  # tokens
    nr: Tensor
    nll: Tensor  # each pair's share of the chosen sequences' NLL per token, over nll_target
    sft: Tensor  # log-probability of the chosen sequence over nll_target
    has_reference: bool
    kc: Tensor | None = None  # sum of KL(reference || policy)
    kr: Tensor | None = None
    weight: Tensor | None = None  # WPO
    given: Named = field(default_factory=dict)  # further vectors of the call


class PairLoss(PreferenceLoss):
    """Base of the losses over pairs: a subclass states ``pair_loss``.

    ``loss(hidden, weight, target, ...)`` takes both completions of each pair in one batch, all chosen ones first.
    """

    takes_nll_target: ClassVar[bool] = False
    beta: float = 1.0

    def pair_loss(self, x: PairScores) -> Tensor | tuple[Tensor, Named]:
        """One value per pair, and metrics if there are any."""
        raise NotImplementedError

    def averages(self) -> bool:
        """Whether log-probabilities and rewards are logged per token, as TRL does where the loss takes them so."""
        return False

    def logps(self, x: PairScores) -> tuple[Tensor, Tensor]:
        """Log-probabilities of chosen and rejected, as logged."""
        return (mean_logps(x.c, x.nc), mean_logps(x.r, x.nr)) if self.averages() else (x.c, x.r)

    def rewards(self, x: PairScores) -> tuple[Tensor, Tensor]:
        chosen, rejected = self.logps(x)
        return self.beta * (chosen - x.rc), self.beta * (rejected - x.rr)

    def forward(
        self,
        hidden: Tensor,  # (2B, T, H)
        weight: Tensor,  # (V, H)
        target: Tensor,  # (2B, T)
        bias: Tensor | None = None,  # (V,)
        ref_hidden: Tensor | None = None,  # (2B, T, Hr)
        ref_weight: Tensor | None = None,  # (V, Hr)
        ref_bias: Tensor | None = None,  # (V,)
        ref_logps: Tensor | None = None,  # (2B,)
        nll_target: Tensor | None = None,  # (2B, T)
        *,
        extra: Extra = (),
        ref_extra: Extra = (),
        **vectors: Tensor,  # (B,)
    ) -> LossOutput:
        """Loss and metrics of B pairs.

        Args:
            hidden: hidden states, chosen completions first, then the rejected ones in the same order.
            weight, bias: the LM head.
            target: the token that each hidden state predicts, already aligned; ``ignore_index`` drops it.
            ref_hidden, ref_weight, ref_bias: the reference's, which is frozen.
            ref_logps: the reference's log-probabilities of the completions, instead of the reference (with
                ``ld_alpha``, weighted likewise).
            nll_target: targets of the NLL term of the chosen sequences, by default ``target``; ORPO's also have the
                prompt. The rows of rejected ones are not read.
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
        policy = (hidden, weight, target, bias)
        reference = (ref_hidden, ref_weight, ref_bias, ref_logps)
        return self._run(self._arguments(*policy, *reference, nll_target, extra=extra, ref_extra=ref_extra, **vectors))

    # --- before the engine ---

    def _engine(self) -> Callable[..., FlexChunkLoss]:
        return PairEngine

    def _tail_weight(self) -> float | None:
        """The weight of a completion's tokens beyond the shorter completion's length; None where all weigh alike."""
        return None

    def _arguments(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_hidden: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        ref_logps: Tensor | None = None,
        nll_target: Tensor | None = None,
        *,
        extra: Extra = (),
        ref_extra: Extra = (),
        **vectors: Tensor,
    ) -> Arguments:
        self.check()
        self._check_batch(hidden, weight, target)
        pairs, odd = divmod(hidden.shape[0], 2)
        if odd or not pairs:
            raise ValueError(f"expected hidden of pairs, (2B, T, H), chosen first, got {tuple(hidden.shape)}")
        if nll_target is not None and not self.takes_nll_target:
            raise ValueError(f"expected no nll_target, {type(self).__name__} has none")
        if nll_target is not None:
            _check_ids("nll_target", nll_target, hidden)
        self._check_vectors(vectors, (pairs,), hidden)
        reference = (ref_hidden, ref_weight, ref_bias, ref_extra, ref_logps)
        projections = self._projections(hidden, weight, bias, extra, *reference)
        segments, ids, nll_tokens = self._segments(target, nll_target)
        dtype = _wide(hidden.dtype)
        groups = {"nll_scale": (pairs / nll_tokens.clamp_min(1).to(dtype)).expand(pairs).contiguous()}
        if ref_logps is not None:
            groups["ref_logps"] = ref_logps.detach().double().view(2, pairs).t()
        groups |= {name: vector.to(dtype) for name, vector in vectors.items()}
        engine = self._make(self._engine())
        return Arguments(engine, projections, {"target": ids}, groups, segments)

    def _segments(self, target: Tensor, nll_target: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """-> the segment of each token, its id, and how many tokens the NLL has.

        Segments of a pair: 0 chosen, 1 chosen of another kind, 2 rejected, 3. With a tail weight the odd ones hold the
        tails. Else 1 holds chosen tokens that the NLL leaves out, and 3 those of the NLL alone.
        """
        used, pairs = target != self.ignore_index, len(target) // 2
        first = torch.arange(0, 4 * pairs, 4, device=target.device)
        segments = torch.cat([first, first + 2])[:, None]
        if self._tail_weight() is not None:
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

    # --- behind it ---

    def _from_scores(self, scores: Any, groups: Named) -> tuple[Tensor, Named]:
        policy, count, tail = scores["policy"], scores["count"], self._tail_weight()

        def sides(v: Tensor, tail_weight: float = 1.0) -> tuple[Tensor, Tensor]:
            chosen = v[:, 0] + tail_weight * v[:, 1]
            return chosen, v[:, 2] if tail is None else v[:, 2] + tail_weight * v[:, 3]

        def of_nll(v: Tensor) -> Tensor:
            return v[:, 0] + v[:, 3 if tail is None else 1]

        tail_weight = 1.0 if tail is None else tail
        c, r = sides(policy["logps"], tail_weight)
        nc, nr = sides(count)
        if "reference" in scores:
            rc, rr = sides(scores["reference"]["logps"], tail_weight)
        elif "ref_logps" in groups:
            rc, rr = groups["ref_logps"].unbind(1)
        else:
            rc = rr = torch.zeros_like(c.detach())
        sft = of_nll(policy["logps"])
        known = "reference" in scores or "ref_logps" in groups
        x = PairScores(c, r, rc, rr, nc, nr, -sft * groups["nll_scale"], sft, known, given=groups)
        if "kl" in policy:
            x.kc, x.kr = sides(policy["kl"])
        if "log_sum_sq_probs" in policy:
            x.weight = wpo_weight(*sides(policy["logps"]), *sides(policy["log_sum_sq_probs"]), nc, nr)
        result = self.pair_loss(x)
        loss, metrics = result if isinstance(result, tuple) else (result, {})
        named = self._metrics(x)
        if self.token_metrics:
            entropy, logits = sides(policy["entropy"]), sides(policy["mean_logits"])
            named["_entropy"] = entropy[0] + entropy[1]
            named["_top1"], _ = sides(policy["is_top1"])
            named["_logits/chosen"], named["_logits/rejected"] = logits
        return loss, {**named, **metrics}

    def _metrics(self, x: PairScores) -> Named:
        chosen, rejected = self.rewards(x)
        logps = self.logps(x)
        return {
            "logps/chosen": logps[0],
            "logps/rejected": logps[1],
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
            "tokens/chosen": x.nc,
            "tokens/rejected": x.nr,
            "_nll": x.nll,
        }

    def _report(self, metrics: Named) -> Named:
        metrics["nll_loss"] = metrics.pop("_nll").mean()
        return super()._report(metrics)


# --- single sequences ------------------------------------------------------------------------------------------------


@dataclass
class SequenceScores:
    """What the loss of single sequences sees, each ``(B,)``."""

    logps: Tensor
    ref_logps: Tensor
    count: Tensor
    desirable: Tensor  # bool
    given: Named

    @property
    def ratio(self) -> Tensor:
        return self.logps - self.ref_logps


class SequenceLoss(PreferenceLoss):
    """Base of the losses over single sequences with a verdict each: a subclass states ``sequence_loss``."""

    beta: float = 1.0

    def sequence_loss(self, x: SequenceScores) -> Tensor | tuple[Tensor, Named]:
        """One value per sequence, and metrics if there are any."""
        raise NotImplementedError

    def forward(
        self,
        hidden: Tensor,  # (B, T, H)
        weight: Tensor,  # (V, H)
        target: Tensor,  # (B, T)
        preference_labels: Tensor,  # (B,)
        bias: Tensor | None = None,  # (V,)
        ref_hidden: Tensor | None = None,  # (B, T, Hr)
        ref_weight: Tensor | None = None,  # (V, Hr)
        ref_bias: Tensor | None = None,  # (V,)
        ref_logps: Tensor | None = None,  # (B,)
        *,
        extra: Extra = (),
        ref_extra: Extra = (),
        **vectors: Any,
    ) -> LossOutput:
        """Loss and metrics of B sequences.

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
        policy = (hidden, weight, target, preference_labels, bias)
        reference = (ref_hidden, ref_weight, ref_bias, ref_logps)
        return self._run(self._arguments(*policy, *reference, extra=extra, ref_extra=ref_extra, **vectors))

    def _engine(self) -> Callable[..., FlexChunkLoss]:
        return SequenceEngine

    def _arguments(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        preference_labels: Tensor,
        bias: Tensor | None = None,
        ref_hidden: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        ref_logps: Tensor | None = None,
        *,
        extra: Extra = (),
        ref_extra: Extra = (),
        **vectors: Any,
    ) -> Arguments:
        self.check()
        self._check_batch(hidden, weight, target)
        size = hidden.shape[0]
        if not size:
            raise ValueError(f"expected hidden of one sequence or more, got {tuple(hidden.shape)}")
        _check_shape("preference_labels", preference_labels, (size,), hidden.device)
        if preference_labels.dtype != torch.bool:
            raise TypeError(f"expected preference_labels to be bool, got {preference_labels.dtype}")
        given = {name: vector for name, vector in vectors.items() if vector is not None}
        for name in given.keys() & set(self.takes_numbers):
            number = given[name]
            if not isinstance(number, Tensor) or number.numel() != 1:
                raise ValueError(f"expected {name} to be a tensor of one number, got {number!r}")
            given[name] = number.to(hidden.device).reshape(1).expand(size)
        self._check_vectors(given, (size,), hidden)
        reference = (ref_hidden, ref_weight, ref_bias, ref_extra, ref_logps)
        projections = self._projections(hidden, weight, bias, extra, *reference)
        dtype = _wide(hidden.dtype)
        of_rows = torch.arange(size, device=target.device)[:, None]
        segments = torch.where(target != self.ignore_index, of_rows, -1)
        groups = {"desirable": preference_labels}
        if ref_logps is not None:
            groups["ref_logps"] = ref_logps.detach().double()
        groups |= {name: vector.detach().to(dtype) for name, vector in given.items()}
        return Arguments(self._make(self._engine()), projections, {"target": target}, groups, segments)

    def _from_scores(self, scores: Any, groups: Named) -> tuple[Tensor, Named]:
        policy = {name: value[:, 0] for name, value in scores["policy"].items()}
        reference = scores["reference"]["logps"][:, 0] if "reference" in scores else groups["ref_logps"]
        desirable = groups["desirable"]
        x = SequenceScores(policy["logps"], reference, scores["count"][:, 0], desirable, groups)
        result = self.sequence_loss(x)
        loss, metrics = result if isinstance(result, tuple) else (result, {})
        chosen, rejected = desirable.to(loss.dtype), (~desirable).to(loss.dtype)
        named = {
            "logps": x.logps,
            "rewards": self.beta * x.ratio,
            "tokens/chosen": x.count * chosen,
            "tokens/rejected": x.count * rejected,
            "_chosen": chosen,
        }
        if self.token_metrics:
            named["_entropy"] = policy["entropy"]
            named["_top1"] = policy["is_top1"] * chosen
            named["_logits/chosen"] = policy["mean_logits"] * chosen
            named["_logits/rejected"] = policy["mean_logits"] * rejected
        return loss, {**named, **metrics}

    def _report(self, metrics: Named) -> Named:
        """Means over the chosen and over the rejected sequences; zero where there are none."""
        chosen = metrics.pop("_chosen")
        for side, member in (("chosen", chosen), ("rejected", 1 - chosen)):
            metrics[f"count/{side}"] = member.sum()
            for name in ("logps", "rewards"):
                metrics[f"{name}/{side}"] = (metrics[name] * member).sum() / member.sum().clamp_min(1)
        metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        return super()._report(metrics)
