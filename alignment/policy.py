"""Policy-gradient losses as pure functions, elementwise in tensors of one shape or shapes that broadcast.

``log_ratio`` is the log of policy over the policy that sampled, of a token or of a sequence; ``A`` its advantage. Terms
are losses: they are minimised. Nothing here knows hidden states or logits, batches or processes.

The ratio is capped at exp(80), so that values and gradients stay finite at any finite log-probability.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LEAST_LOG_WEIGHT, LARGEST_LOG_WEIGHT = math.log(1e-8), 20.0
"""VESPO's bounds of the log of an importance weight, as in the authors' code."""


def capped_ratio(log_ratio: Tensor) -> Tensor:
    """``exp(log_ratio)``, constant beyond 80, where float32 would soon overflow.

    Example:
        >>> import torch
        >>> from alignment import policy
        >>> policy.capped_ratio(torch.tensor([0.0, 200.0])).isfinite()
        tensor([True, True])
    """
    return torch.exp(log_ratio.clamp(max=80.0))


def clipped(
    log_ratio: Tensor,
    advantages: Tensor,
    *,
    epsilon_low: float,
    epsilon_high: float,
    delta: float | None,
) -> Tensor:
    """``-min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A)``: PPO's surrogate; ``delta`` caps the first r, so that
    a bad token that became likely has a bounded loss (two-sided clipping, https://arxiv.org/abs/2505.07291).

    Example:
        >>> import torch
        >>> from alignment import policy
        >>> log_ratio, advantages = torch.tensor([1.0, 1.0, -1.0]), torch.tensor([1.0, -1.0, -1.0])
        >>> policy.clipped(log_ratio, advantages, epsilon_low=0.2, epsilon_high=0.2, delta=2.0)
        tensor([-1.2000,  2.0000,  0.8000])
    """
    ratio = capped_ratio(log_ratio)
    bounded = ratio.clamp_min(1 - epsilon_low).clamp_max(1 + epsilon_high)  # one of which may be a tensor
    first = ratio if delta is None else ratio.clamp(max=delta)
    return -torch.min(first * advantages, bounded * advantages)


def truncated(log_ratio: Tensor, advantages: Tensor, *, epsilon_high: float) -> Tensor:
    """``-min(r, epsilon_high) A``: the weight, a constant, of CISPO's log-probability (https://arxiv.org/abs/2506.13585).

    Example:
        >>> import torch
        >>> from alignment import policy
        >>> policy.truncated(torch.tensor([0.0, 3.0]), torch.tensor([1.0, -1.0]), epsilon_high=5.0)
        tensor([-1.,  5.])
    """
    return -capped_ratio(log_ratio).clamp(max=epsilon_high) * advantages


def soft(log_ratio: Tensor, advantages: Tensor, *, temperature_pos: float, temperature_neg: float) -> Tensor:
    """``-4/t sigmoid(t (r - 1)) A`` with a temperature t for A > 0 and one for the others: SAPO's soft gate
    (https://arxiv.org/abs/2511.20347).

    Example:
        >>> import torch
        >>> from alignment import policy
        >>> policy.soft(torch.zeros(2), torch.tensor([1.0, -1.0]), temperature_pos=1.0, temperature_neg=2.0)
        tensor([-2.,  1.])
    """
    temperature = _either(advantages > 0, temperature_pos, temperature_neg, log_ratio.dtype)
    return -torch.sigmoid(temperature * (capped_ratio(log_ratio) - 1)) * 4 / temperature * advantages


def gamma_weight(
    log_weight: Tensor,
    advantages: Tensor,
    *,
    k_pos: float,
    lambda_pos: float,
    k_neg: float,
    lambda_neg: float,
) -> Tensor:
    """``w^k exp(lambda (1 - w))``, 1 at w = 1, with numbers for A >= 0 and for A < 0: VESPO's weight of a sequence
    (https://arxiv.org/abs/2602.10693).

    Example:
        >>> import torch
        >>> from alignment import policy
        >>> numbers = {"k_pos": 2.0, "lambda_pos": 3.0, "k_neg": 3.0, "lambda_neg": 2.0}
        >>> policy.gamma_weight(torch.tensor([0.0, 1.0]), torch.ones(2), **numbers)
        tensor([1.0000, 0.0426])
    """
    log_weight = log_weight.clamp(LEAST_LOG_WEIGHT, LARGEST_LOG_WEIGHT)
    good = advantages >= 0
    k = _either(good, k_pos, k_neg, log_weight.dtype)
    scale = _either(good, lambda_pos, lambda_neg, log_weight.dtype).clamp_min(1e-4)
    return torch.exp(scale + k * log_weight - scale * torch.exp(log_weight)).nan_to_num(0.0, 0.0, 0.0)


def _either(first: Tensor, one: float, other: float, dtype: torch.dtype) -> Tensor:
    """Of two numbers, which ``torch.where`` would round to float32."""
    first = first.to(dtype)
    return first * one + (1 - first) * other


def k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """``exp(d) - d - 1`` with ``d = ref_logps - logps``: an estimate of KL(policy || reference) that is never negative
    (http://joschu.net/blog/kl-approx.html).

    Example:
        >>> import torch
        >>> from alignment import policy
        >>> policy.k3(torch.tensor([-2.0, -1.0]), torch.tensor([-2.0, -2.0]))
        tensor([0.0000, 0.3679])
    """
    ahead = ref_logps - logps
    return torch.expm1(ahead.clamp(max=80.0)) - ahead


def kept(advantages: Tensor, drift: Tensor, *, threshold: float) -> Tensor:
    """1 where ``A >= 0`` or the mean of ``log sampled - log policy`` over the sequence, its drift, is no more than the
    threshold, else 0: the off-policy mask of DeepSeek-V3.2 (https://arxiv.org/abs/2512.02556).

    Example:
        >>> import torch
        >>> from alignment import policy
        >>> policy.kept(torch.tensor([1.0, -1.0, -1.0]), torch.tensor([9.0, 9.0, 0.1]), threshold=0.5)
        tensor([1., 0., 1.])
    """
    return ((advantages >= 0) | (drift <= threshold)).to(drift.dtype)


def high_entropy(entropies: Tensor, used: Tensor, share: float) -> Tensor:
    """Where an entropy is among the largest ``share`` of the used ones (https://arxiv.org/abs/2506.01939).

    Example:
        >>> import torch
        >>> from alignment import policy
        >>> policy.high_entropy(torch.tensor([0.1, 2.0, 1.0, 9.0]), torch.tensor([True, True, True, False]), 0.5)
        tensor([False,  True,  True, False])
    """
    if not bool(used.any()):
        return torch.zeros_like(used)
    return used & (entropies >= torch.quantile(entropies[used], 1 - share))


# --- what sums are divided by ----------------------------------------------------------------------------------------


def per_sequence(tokens: Tensor, o: Any, num_items: Any) -> Tensor:
    """Of a mean over sequences of means over tokens."""
    return 1 / (len(tokens) * tokens.clamp_min(1))


def per_token(tokens: Tensor, o: Any, num_items: Any) -> Tensor:
    """Of the mean over the tokens of the batch."""
    return (1 / tokens.sum().clamp_min(1)).expand_as(tokens)


def per_item(tokens: Tensor, o: Any, num_items: Any) -> Tensor:
    """Of a sum over tokens, divided by what the caller counts."""
    if num_items is None:
        return per_token(tokens, o, num_items)
    return (1 / torch.as_tensor(num_items, dtype=tokens.dtype, device=tokens.device)).expand_as(tokens)


def per_length(tokens: Tensor, o: Any, num_items: Any) -> Tensor:
    """Of a sum over tokens, divided by the most that the batch might have."""
    return torch.full_like(tokens, 1 / (len(tokens) * o.max_completion_length))


def of_sums(tokens: Tensor, o: Any, num_items: Any) -> Tensor:
    """Of a mean over sequences of sums over tokens."""
    return torch.full_like(tokens, 1 / len(tokens))


# --- the losses ------------------------------------------------------------------------------------------------------


def _clipped(log_ratio: Tensor, advantages: Tensor, o: Any) -> Tensor:
    return clipped(log_ratio, advantages, epsilon_low=o.epsilon_low, epsilon_high=o.epsilon_high, delta=o.delta)


def _truncated(log_ratio: Tensor, advantages: Tensor, o: Any) -> Tensor:
    return truncated(log_ratio, advantages, epsilon_high=o.epsilon_high)


def _soft(log_ratio: Tensor, advantages: Tensor, o: Any) -> Tensor:
    temperatures = {"temperature_pos": o.sapo_temperature_pos, "temperature_neg": o.sapo_temperature_neg}
    return soft(log_ratio, advantages, **temperatures)


def _gamma(log_weight: Tensor, advantages: Tensor, o: Any) -> Tensor:
    return -advantages * gamma(log_weight, advantages, o)


def gamma(log_weight: Tensor, advantages: Tensor, o: Any) -> Tensor:
    """VESPO's weight with the numbers of a loss."""
    numbers = {name: getattr(o, f"vespo_{name}") for name in ("k_pos", "lambda_pos", "k_neg", "lambda_neg")}
    return gamma_weight(log_weight, advantages, **numbers)


CLIP, EPSILONS, SAPO, VESPO = (
    ("clip_ratio/low", "clip_ratio/high"),
    ("epsilon_low", "epsilon_high", "delta"),
    ("sapo_temperature_pos", "sapo_temperature_neg"),
    ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"),
)
NUMBERS = (*EPSILONS, *SAPO, *VESPO)
"""Fields of a ``GRPOLoss`` that terms read."""


@dataclass(frozen=True)
class PolicyType:
    """A loss type: the term of a token or a sequence, and how terms are added up.

    Example:
        >>> from alignment.policy import POLICY_LOSSES, PolicyType
        >>> isinstance(POLICY_LOSSES["grpo"], PolicyType), POLICY_LOSSES["cispo"].of_logps
        (True, True)
    """

    term: Callable[[Tensor, Tensor, Any], Tensor]
    """(log_ratio, advantages, numbers) -> the loss, linear in the advantages; or, ``of_logps``, the constant by which
    the log-probability is multiplied."""
    weights: Callable[[Tensor, Any, Any], Tensor]
    """(tokens of each sequence, numbers, num_items) -> of a sequence's sum in the batch's loss."""
    of_logps: bool = False
    reads: tuple[str, ...] = EPSILONS
    logs: tuple[str, ...] = CLIP


POLICY_LOSSES: dict[str, PolicyType] = {
    "grpo": PolicyType(_clipped, per_sequence),
    "bnpo": PolicyType(_clipped, per_token),
    "dr_grpo": PolicyType(_clipped, per_length, reads=(*EPSILONS, "max_completion_length")),
    "dapo": PolicyType(_clipped, per_item),
    "luspo": PolicyType(_clipped, of_sums),
    "cispo": PolicyType(_truncated, per_item, True, ("epsilon_high",), ("cispo_clip_ratio",)),
    "sapo": PolicyType(_soft, per_sequence, reads=SAPO, logs=()),
    "vespo": PolicyType(_gamma, per_item, True, VESPO, ("vespo/phi_seq",)),
}
"""By name.

Example:
    >>> from alignment import policy
    >>> list(policy.POLICY_LOSSES)
    ['grpo', 'bnpo', 'dr_grpo', 'dapo', 'luspo', 'cispo', 'sapo', 'vespo']
"""


def policy_term(log_ratio: Tensor, advantages: Tensor, logps: Tensor, o: Any) -> Tensor:
    """The loss of tokens, or of sequences, by the loss type and the numbers of ``o``, a ``GRPOLoss``.

    Example:
        >>> import torch
        >>> from alignment import GRPOLoss, policy
        >>> logps = torch.tensor([-1.0, -2.0])
        >>> policy.policy_term(torch.zeros(2), torch.tensor([1.0, -1.0]), logps, GRPOLoss("cispo", epsilon_high=5.0))
        tensor([ 1., -2.])
    """
    kind = POLICY_LOSSES[o.loss_type]
    term = kind.term(log_ratio, advantages, o)
    return term.detach() * logps if kind.of_logps else term


def log_weights(log_ratio: Tensor, weights: Tensor | None, used: Tensor | float = 1.0) -> Tensor:
    """What tokens add to the logarithm of VESPO's weight: their ratio's, and that of a sampler's weight, in bounds.

    Example:
        >>> import torch
        >>> from alignment import policy
        >>> policy.log_weights(torch.tensor([0.5, 99.0]), torch.tensor([1.0, 1.0]))
        tensor([ 0.5000, 20.0000])
    """
    found = log_ratio.clamp(-LARGEST_LOG_WEIGHT, LARGEST_LOG_WEIGHT)
    if weights is not None:
        found = found + weights.log().clamp(LEAST_LOG_WEIGHT, LARGEST_LOG_WEIGHT)
    return found * used


def at_level(
    level: Tensor, logps: Tensor, x: Mapping[str, Tensor], o: Any, log_weight: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses of tokens without the divergence, and that and what else is logged.

    Args:
        level: the log of the ratio that counts, a token's own or its sequence's.
        x: by name ``advantages``; ``ref_logps`` and ``importance_weights`` where there are some.
        o: a ``GRPOLoss``.
        log_weight: of VESPO, in the place of the ratio and of the importance weights.

    Example:
        >>> import torch
        >>> from alignment import GRPOLoss, policy
        >>> x = {"advantages": torch.tensor([1.0, -1.0]), "ref_logps": torch.tensor([-1.0, -2.0])}
        >>> policy.at_level(torch.zeros(2), torch.tensor([-1.0, -2.0]), x, GRPOLoss("grpo", beta=0.1))[1]["kl"]
        tensor([0., 0.])
    """
    advantages, found = x["advantages"], {}
    if "ref_logps" in x:
        kl = k3(logps, x["ref_logps"])
        found["kl"] = kl * capped_ratio(level) if o.use_bias_correction_kl else kl
    counted = level if log_weight is None else log_weight
    loss = policy_term(counted, advantages, logps, o)
    if log_weight is None and "importance_weights" in x:
        loss = loss * x["importance_weights"]
    return loss, found | clip_marks(counted.expand_as(logps), advantages, o)


def clipping(
    log_ratio: Tensor,
    advantages: Tensor,
    *,
    epsilon_low: float,
    epsilon_high: float,
    delta: float | None,
) -> tuple[Tensor, Tensor]:
    """1.0 where ``clipped`` holds a ratio that is too low, and one that is too high.

    Example:
        >>> import torch
        >>> from alignment import policy
        >>> log_ratio, advantages = torch.tensor([1.0, -1.0]), torch.tensor([1.0, -1.0])
        >>> policy.clipping(log_ratio, advantages, epsilon_low=0.2, epsilon_high=0.2, delta=None)
        (tensor([0., 1.]), tensor([1., 0.]))
    """
    ratio = capped_ratio(log_ratio) if delta is None else capped_ratio(log_ratio).clamp(max=delta)
    low, high = (ratio < 1 - epsilon_low) & (advantages < 0), (ratio > 1 + epsilon_high) & (advantages > 0)
    return low.to(ratio.dtype), high.to(ratio.dtype)


def clip_marks(log_ratio: Tensor, advantages: Tensor, o: Any) -> dict[str, Tensor]:
    """What a loss type logs of each ratio: 1.0 where it is clipped, or VESPO's weight.

    Example:
        >>> import torch
        >>> from alignment import GRPOLoss, policy
        >>> policy.clip_marks(torch.tensor([1.0, -1.0]), torch.tensor([1.0, 1.0]), GRPOLoss("grpo"))
        {'clip_ratio/low': tensor([0., 0.]), 'clip_ratio/high': tensor([1., 0.])}
    """
    logs, log_ratio = POLICY_LOSSES[o.loss_type].logs, log_ratio.detach()
    if logs == CLIP:
        numbers = {"epsilon_low": o.epsilon_low, "epsilon_high": o.epsilon_high, "delta": o.delta}
        return dict(zip(logs, clipping(log_ratio, advantages, **numbers)))
    if o.loss_type == "cispo":
        mark = (capped_ratio(log_ratio) > o.epsilon_high) & (advantages > 0)
        return {logs[0]: mark.to(log_ratio.dtype)}
    return {logs[0]: gamma(log_ratio, advantages, o)} if logs else {}
