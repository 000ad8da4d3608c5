"""Preference losses as pure functions of a few vectors, one value per pair (or per sequence).

``c`` and ``r`` are the policy's log-probabilities of the chosen and of the rejected completions, ``rc`` and ``rr`` the
reference's, ``nc`` and ``nr`` the completions' token counts; all are ``(B,)``. ``lc = c - rc`` and ``lr = r - rr``.
Nothing here knows hidden states or logits. Counts may be zero (an empty completion); results stay finite, and so do
gradients, at any finite log-probability: exponents are capped where the formula has a bare exponential.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LOG_EPSILON = -10.0
"""f-PO: log-probability of the rejected completion under the target distribution, as in the authors' code."""


# --- pieces ----------------------------------------------------------------------------------------------------------


def mean_logps(
    logps: Tensor,  # (B,)
    count: Tensor,  # (B,)
) -> Tensor:
    """Log-probability per token; zero for an empty completion."""
    return logps / count.clamp_min(1)


def token_mean_nll(
    logps: Tensor,  # (B,)
    count: Tensor,  # (B,)
) -> Tensor:
    """Each sequence's share of the negative log-likelihood per token: the mean over the batch is the token mean."""
    return -logps * (len(logps) / count.sum().clamp_min(1))


def log1mexp(x: Tensor) -> Tensor:
    """``log(1 - exp(x))`` for ``x <= 0``, without cancellation; x is kept below zero, so that the result is finite."""
    x = x.clamp(max=-1e-12)
    near = x > -math.log(2)
    # Each branch sees arguments of its own side only: a gradient through the other would be 0 * inf.
    small = torch.log(-torch.expm1(torch.where(near, x, -1.0)))
    return torch.where(near, small, torch.log1p(-torch.exp(torch.where(near, -1.0, x))))


def capped_exp(x: Tensor) -> Tensor:
    """``exp(x)``, constant beyond 80, where float32 would soon overflow."""
    return torch.exp(x.clamp(max=80.0))


def smoothed_logistic(
    z: Tensor,  # (B,)
    label_smoothing: float = 0.0,
) -> Tensor:
    """``-(1 - e) logsigmoid(z) - e logsigmoid(-z)``: the preference is right with probability 1 - e."""
    loss = -F.logsigmoid(z)
    if label_smoothing == 0:
        return loss
    return (1 - label_smoothing) * loss - label_smoothing * F.logsigmoid(-z)


# --- f-divergences of DPO (https://arxiv.org/abs/2309.16240) ---------------------------------------------------------


def _alpha(ratio: Tensor, f_alpha: float) -> Tensor:
    if abs(f_alpha - 1) < 1e-6:
        return ratio
    return (capped_exp((f_alpha - 1) * ratio) - 1) / (f_alpha - 1)


F_DIVERGENCES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": lambda ratio, f_alpha: ratio,
    "forward_kl": lambda ratio, f_alpha: 1 - capped_exp(-ratio),
    "js": lambda ratio, f_alpha: math.log(2) + F.logsigmoid(ratio),
    "alpha": _alpha,
}
"""``f'(u)`` by name, as a function of ``log u`` (the log-ratio of policy and reference) and of the order alpha."""


# --- DPO -------------------------------------------------------------------------------------------------------------


class Ratios(NamedTuple):
    """What the DPO losses look at, each ``(B,)``."""

    chosen: Tensor  # lc
    rejected: Tensor  # lr
    delta: Tensor  # f'(lc) - f'(lr)
    mean_delta: Tensor  # f'(lc) / nc - f'(lr) / nr
    policy: Tensor  # c - r
    reference: Tensor  # rc - rr
    nll: Tensor  # each pair's share of the chosen completions' NLL per token


class Numbers(NamedTuple):
    beta: float = 0.1
    label_smoothing: float = 0.0
    discopop_tau: float = 0.05


def _sigmoid(x: Ratios, hp: Numbers) -> Tensor:
    return smoothed_logistic(hp.beta * x.delta, hp.label_smoothing)


def _hinge(x: Ratios, hp: Numbers) -> Tensor:
    return F.relu(1 - hp.beta * x.delta)


def _ipo(x: Ratios, hp: Numbers) -> Tensor:
    largest = math.sqrt(torch.finfo(x.mean_delta.dtype).max) / 4  # the square of a capped exponential overflows
    return (x.mean_delta - 1 / (2 * hp.beta)).clamp(-largest, largest).square()


def _sigmoid_norm(x: Ratios, hp: Numbers) -> Tensor:
    return -F.logsigmoid(hp.beta * x.mean_delta)


def _exo_pair(x: Ratios, hp: Numbers) -> Tensor:
    z, e = hp.beta * x.delta, hp.label_smoothing
    right = torch.sigmoid(z) * (F.logsigmoid(z) - math.log1p(-e))
    return right + torch.sigmoid(-z) * (F.logsigmoid(-z) - math.log(e))


def _nca_pair(x: Ratios, hp: Numbers) -> Tensor:
    chosen, rejected = hp.beta * x.chosen, hp.beta * x.rejected
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def _robust(x: Ratios, hp: Numbers) -> Tensor:
    z, e = hp.beta * x.delta, hp.label_smoothing
    return (e * F.logsigmoid(-z) - (1 - e) * F.logsigmoid(z)) / (1 - 2 * e)


def _bco_pair(x: Ratios, hp: Numbers) -> Tensor:
    return -F.logsigmoid(hp.beta * x.chosen) - F.logsigmoid(-hp.beta * x.rejected)


def _sppo_hard(x: Ratios, hp: Numbers) -> Tensor:
    return (x.chosen - 0.5 / hp.beta).square() + (x.rejected + 0.5 / hp.beta).square()


def _sorted_difference(better: Tensor, worse: Tensor) -> Tensor:
    return better.sort().values - worse.sort().values


def _aot(x: Ratios, hp: Numbers) -> Tensor:
    return smoothed_logistic(hp.beta * _sorted_difference(x.policy, x.reference), hp.label_smoothing)


def _aot_unpaired(x: Ratios, hp: Numbers) -> Tensor:
    return smoothed_logistic(hp.beta * _sorted_difference(x.chosen, x.rejected), hp.label_smoothing)


def _apo_zero(x: Ratios, hp: Numbers) -> Tensor:
    return torch.sigmoid(-hp.beta * x.chosen) + torch.sigmoid(hp.beta * x.rejected)


def _apo_down(x: Ratios, hp: Numbers) -> Tensor:
    return torch.sigmoid(hp.beta * x.chosen) + torch.sigmoid(-hp.beta * (x.chosen - x.rejected))


def _discopop(x: Ratios, hp: Numbers) -> Tensor:
    z = hp.beta * x.delta
    gate = z / hp.discopop_tau
    # exp(-z) * sigmoid(gate) as one exponential: for a bad margin it would be inf * 0.
    exponential = capped_exp(F.logsigmoid(gate) - z)
    return exponential - F.logsigmoid(z) * torch.sigmoid(-gate)


def _sft(x: Ratios, hp: Numbers) -> Tensor:
    return x.nll


DPO_LOSSES: dict[str, Callable[[Ratios, Numbers], Tensor]] = {
    "sigmoid": _sigmoid,
    "hinge": _hinge,
    "ipo": _ipo,
    "sigmoid_norm": _sigmoid_norm,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "robust": _robust,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "aot": _aot,
    "aot_unpaired": _aot_unpaired,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
    "sft": _sft,
}
"""The ``loss_type`` of ``DPOLoss`` by name."""

SORTING = frozenset({"aot", "aot_unpaired"})
"""Loss types whose rows are no pairs any more: they sort the batch."""
DIFFERENCES = frozenset({"sigmoid", "hinge", "ipo", "sigmoid_norm", "exo_pair", "robust", "discopop", "sft"})
"""Loss types that see f' in differences alone, where its unknown constant cancels: the ones with f-divergences."""


def ratios(
    c: Tensor,
    r: Tensor,
    rc: Tensor,
    rr: Tensor,
    nc: Tensor,
    nr: Tensor,
    *,
    nll: Tensor | None = None,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
) -> Ratios:
    """The vectors that ``DPO_LOSSES`` take; ``nll`` defaults to the token mean of these pairs."""
    chosen, rejected = c - rc, r - rr
    divergence = F_DIVERGENCES[f_divergence]
    fc, fr = divergence(chosen, f_alpha), divergence(rejected, f_alpha)
    return Ratios(
        chosen,
        rejected,
        fc - fr,
        mean_logps(fc, nc) - mean_logps(fr, nr),
        c - r,
        rc - rr,
        token_mean_nll(c, nc) if nll is None else nll,
    )


def dpo(
    c: Tensor,
    r: Tensor,
    rc: Tensor,
    rr: Tensor,
    nc: Tensor,
    nr: Tensor,
    *,
    loss_type: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
    discopop_tau: float = 0.05,
) -> Tensor:
    """One of ``DPO_LOSSES``, by name."""
    x = ratios(c, r, rc, rr, nc, nr, f_divergence=f_divergence, f_alpha=f_alpha)
    return DPO_LOSSES[loss_type](x, Numbers(beta, label_smoothing, discopop_tau))


def wpo_weight(
    c: Tensor,
    r: Tensor,
    qc: Tensor,  # log sum_v p_v^2, summed over the chosen tokens
    qr: Tensor,
    nc: Tensor,
    nr: Tensor,
) -> Tensor:
    """``w_c w_r`` with ``w = exp(mean_t(logp_t - log sum_v p_v^2))``, detached (https://arxiv.org/abs/2406.11827)."""
    return torch.exp(mean_logps(c - qc, nc) + mean_logps(r - qr, nr)).detach()


# --- other losses with a reference -----------------------------------------------------------------------------------


def irpo(c: Tensor, r: Tensor, rc: Tensor, rr: Tensor, nc: Tensor, *, beta: float = 0.1, alpha: float = 1.0) -> Tensor:
    """``-logsigmoid(b(lc - lr)) - alpha c / nc``"""
    return -F.logsigmoid(beta * (c - rc - r + rr)) - alpha * mean_logps(c, nc)


def dpop(c: Tensor, r: Tensor, rc: Tensor, rr: Tensor, *, beta: float = 0.1, dpop_lambda: float = 50.0) -> Tensor:
    """``-logsigmoid(b(lc - lr - lambda relu(rc - c)))``"""
    return -F.logsigmoid(beta * (c - rc - r + rr - dpop_lambda * F.relu(rc - c)))


def rdpo(
    c: Tensor,
    r: Tensor,
    rc: Tensor,
    rr: Tensor,
    nc: Tensor,
    nr: Tensor,
    *,
    beta: float = 0.1,
    length_weight: float = 0.01,
) -> Tensor:
    """``-logsigmoid(b(lc - lr) + w(nc - nr))``"""
    return -F.logsigmoid(beta * (c - rc - r + rr) + length_weight * (nc - nr))


def tdpo(
    c: Tensor,
    r: Tensor,
    rc: Tensor,
    rr: Tensor,
    kc: Tensor,  # sum_t KL(reference || policy) over the chosen tokens
    kr: Tensor,
    *,
    beta: float = 0.1,
    loss_type: str = "tdpo2",
    kl_weight: float = 0.5,
) -> Tensor:
    """``-logsigmoid(b(lc - lr - d))``, ``d = kr - kc`` (tdpo1) or ``w(kr - stop_gradient(kc))`` (tdpo2)"""
    delta = kr - kc if loss_type == "tdpo1" else kl_weight * (kr - kc.detach())
    return -F.logsigmoid(beta * (c - rc - r + rr - delta))


# --- without a reference ---------------------------------------------------------------------------------------------


def cpo(
    c: Tensor,
    r: Tensor,
    nc: Tensor,
    nr: Tensor,
    *,
    loss_type: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The preference term of CPO: ``sigmoid`` and ``hinge`` on sums, ``ipo`` on log-probabilities per token"""
    if loss_type == "ipo":
        return (mean_logps(c, nc) - mean_logps(r, nr) - 1 / (2 * beta)).square()
    if loss_type == "hinge":
        return F.relu(1 - beta * (c - r))
    return smoothed_logistic(beta * (c - r), label_smoothing)


def simpo(
    c: Tensor,
    r: Tensor,
    nc: Tensor,
    nr: Tensor,
    *,
    beta: float = 0.1,
    gamma: float = 0.5,
    label_smoothing: float = 0.0,
) -> Tensor:
    """``-logsigmoid(b(c / nc - r / nr) - gamma)``"""
    return smoothed_logistic(beta * (mean_logps(c, nc) - mean_logps(r, nr)) - gamma, label_smoothing)


def alphapo_reward(
    x: Tensor,  # (B,), log-probability per token
    reward_alpha: float,
) -> Tensor:
    """``(1 - exp(-a x)) / a``, and x itself for a = 0"""
    return x if reward_alpha == 0 else (1 - capped_exp(-reward_alpha * x)) / reward_alpha


def alphapo(
    c: Tensor,
    r: Tensor,
    nc: Tensor,
    nr: Tensor,
    *,
    beta: float = 0.1,
    gamma: float = 0.5,
    reward_alpha: float = 0.25,
    label_smoothing: float = 0.0,
) -> Tensor:
    """SimPO with each mean log-probability behind ``alphapo_reward``"""
    chosen, rejected = (alphapo_reward(mean_logps(x, n), reward_alpha) for x, n in ((c, nc), (r, nr)))
    return smoothed_logistic(beta * (chosen - rejected) - gamma, label_smoothing)


def log_odds(c: Tensor, r: Tensor, nc: Tensor, nr: Tensor) -> Tensor:
    """``log(odds(chosen) / odds(rejected))`` with ``odds = p / (1 - p)``, p per token"""
    chosen, rejected = mean_logps(c, nc), mean_logps(r, nr)
    return (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))


def orpo(c: Tensor, r: Tensor, nc: Tensor, nr: Tensor, *, beta: float = 0.1) -> Tensor:
    """``-b logsigmoid(log odds ratio)``: the preference term of ORPO"""
    return -beta * F.logsigmoid(log_odds(c, r, nc, nr))


def slic(
    c: Tensor,
    r: Tensor,
    sft_logps: Tensor,  # log-probability of the sequence that regularises
    *,
    delta: float = 1.0,
    alpha: float = 0.1,
) -> Tensor:
    """``relu(delta - c + r) - alpha log p(y_ref)``"""
    return F.relu(delta - c + r) - alpha * sft_logps


# --- f-PO (https://arxiv.org/abs/2410.21662) -------------------------------------------------------------------------


class Densities(NamedTuple):
    """``log p`` (the policy's preferences) and ``log q`` (the target's), each ``(2, B)``; ``order`` of alpha."""

    log_p: Tensor
    log_q: Tensor
    order: float


def _expect(weights: Tensor, values: Tensor) -> Tensor:
    return (weights * values).sum(0)


def _fpo_js(x: Densities) -> Tensor:
    log_m = torch.logaddexp(x.log_p, x.log_q) - math.log(2)
    return 0.5 * (_expect(x.log_p.exp(), x.log_p - log_m) + _expect(x.log_q.exp(), x.log_q - log_m))


def _fpo_alpha(x: Densities) -> Tensor:
    a = x.order
    p, q = x.log_p.exp(), x.log_q.exp()
    # q u^(1 - a) in one exponential
    return (capped_exp((1 - a) * x.log_p + a * x.log_q) - (1 - a) * p - a * q).sum(0) / (a * (a - 1))


FPO_DIVERGENCES: dict[str, Callable[[Densities], Tensor]] = {
    "dpo": lambda x: _expect(x.log_q.exp(), x.log_q - x.log_p),
    "exo": lambda x: _expect(x.log_p.exp(), x.log_p - x.log_q),
    "js": _fpo_js,
    "jeffreys": lambda x: _expect(x.log_p.exp() - x.log_q.exp(), x.log_p - x.log_q),
    "squared_hellinger": lambda x: ((0.5 * x.log_p).exp() - (0.5 * x.log_q).exp()).square().sum(0),
    "alpha": _fpo_alpha,
    "total_variation": lambda x: 0.5 * (x.log_p.exp() - x.log_q.exp()).abs().sum(0),
    "chi_squared": lambda x: ((x.log_p.exp() - x.log_q.exp()).square() / x.log_q.exp()).sum(0),
}
"""``sum q f(p / q)`` by the name of f, with p and q over the pair."""


def fpo(
    sc: Tensor,  # score of the chosen completion
    sr: Tensor,
    *,
    divergence: str = "js",
    beta: float = 2.0,
    gamma: float = 0.5,
    divergence_order: float = 0.1,
) -> Tensor:
    """``sum q f(p / q)``, ``p = softmax(b [sc - gamma / b, sr])``, ``q = [1, exp(-10)]``"""
    log_p = torch.stack([beta * sc - gamma, beta * sr]).log_softmax(0)
    log_q = torch.tensor([[0.0], [LOG_EPSILON]], dtype=log_p.dtype, device=log_p.device).expand_as(log_p)
    return FPO_DIVERGENCES[divergence](Densities(log_p, log_q, divergence_order))


# --- unpaired --------------------------------------------------------------------------------------------------------


def kto_kl(
    logps: Tensor,  # (B,), of completions that belong to other prompts
    ref_logps: Tensor,  # (B,)
) -> Tensor:
    """KTO's reference point: ``max(0, mean(logps - ref_logps))``, detached"""
    return (logps - ref_logps).detach().mean().clamp_min(0)


def kto(
    ratio: Tensor,  # (B,), policy over reference
    desirable: Tensor,  # (B,), bool
    kl: Tensor,  # ()
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Desirable: ``1 - sigmoid(b(l - kl))``; undesirable: ``1 - sigmoid(b(kl - l))``; each with its class's weight"""
    z = beta * (ratio - kl)
    return torch.where(desirable, desirable_weight * torch.sigmoid(-z), undesirable_weight * torch.sigmoid(z))


def apo_zero_unpaired(
    ratio: Tensor,
    desirable: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO with ``kl = 0``: ``1 - sigmoid(b l)`` and ``sigmoid(b l)``"""
    weights = {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
    return kto(ratio, desirable, ratio.new_zeros(()), beta=beta, **weights)


def bco(
    ratio: Tensor,
    desirable: Tensor,
    delta: Tensor,  # (), mean reward
    *,
    beta: float = 0.1,
) -> Tensor:
    """Desirable: ``-logsigmoid(b l - delta)``; undesirable: ``-logsigmoid(delta - b l)``"""
    z = beta * ratio - delta
    return -F.logsigmoid(torch.where(desirable, z, -z))
