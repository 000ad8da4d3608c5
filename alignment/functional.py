"""Preference losses as pure functions of a few vectors, one value per pair (or per sequence).

All vectors are ``(B,)``: log-probabilities of the two completions of a pair under the policy (``chosen``, ``rejected``)
and the reference (``ref_chosen``, ``ref_rejected``), the differences of those (``chosen_ratio = chosen - ref_chosen``),
token counts (``chosen_tokens``), log-probabilities per token (``chosen_mean = chosen / chosen_tokens``). Formulas write
``c``, ``r``, ``rc``, ``rr``, ``lc = c - rc``, ``lr = r - rr``, ``nc``, ``nr`` for them, and ``b`` for beta. Numbers go
by keyword and have no defaults here: the classes of ``alignment`` say what is usual.

Nothing here knows hidden states or logits. Counts may be zero (an empty completion); results stay finite, and so do
gradients, at any finite log-probability: exponents are capped where the formula has a bare exponential.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

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
    """Log-probability per token; zero for an empty completion.

    Example:
        >>> import torch
        >>> from alignment import functional as AF
        >>> AF.mean_logps(torch.tensor([-6.0, 0.0]), torch.tensor([3, 0]))
        tensor([-2.,  0.])
    """
    return logps / count.clamp_min(1)


def token_mean_nll(
    logps: Tensor,  # (B,)
    count: Tensor,  # (B,)
) -> Tensor:
    """Each sequence's share of the negative log-likelihood per token: the mean over the batch is the token mean.

    Example:
        >>> import torch
        >>> from alignment import functional as AF
        >>> AF.token_mean_nll(torch.tensor([-6.0, -2.0]), torch.tensor([3, 1])).mean()  # 8 nats over 4 tokens
        tensor(2.)
    """
    return -logps * (len(logps) / count.sum().clamp_min(1))


def log1mexp(x: Tensor) -> Tensor:
    """``log(1 - exp(x))`` for ``x <= 0``, without cancellation; x is kept below zero, so that the result is finite.

    Example:
        >>> import torch
        >>> from alignment import functional as AF
        >>> AF.log1mexp(torch.tensor([-1e-6, -1.0, -50.0]))
        tensor([-1.3816e+01, -4.5868e-01, -1.9287e-22])
    """
    x = x.clamp(max=-1e-12)
    near = x > -math.log(2)
    # Each branch sees arguments of its own side only: a gradient through the other would be 0 * inf.
    small = torch.log(-torch.expm1(torch.where(near, x, -1.0)))
    return torch.where(near, small, torch.log1p(-torch.exp(torch.where(near, -1.0, x))))


def capped_exp(x: Tensor) -> Tensor:
    """``exp(x)``, constant beyond 80, where float32 would soon overflow; infinite where x is.

    Example:
        >>> import torch
        >>> from alignment import functional as AF
        >>> AF.capped_exp(torch.tensor([0.0, 200.0])).isfinite()
        tensor([True, True])
    """
    return torch.where(x == math.inf, x, torch.exp(x.clamp(max=80.0)))


def smoothed_logistic(
    z: Tensor,  # (B,)
    label_smoothing: float,
) -> Tensor:
    """``-(1 - e) logsigmoid(z) - e logsigmoid(-z)``: the preference is right with probability 1 - e.

    Example:
        >>> import torch
        >>> from alignment import functional as AF
        >>> AF.smoothed_logistic(torch.tensor([2.0, -2.0]), 0.1)
        tensor([0.3269, 1.9269])
    """
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
"""``f'(u)`` by name, as a function of ``log u`` (the log-ratio of policy and reference) and of the order alpha.

Example:
    >>> import torch
    >>> from alignment import functional as AF
    >>> AF.F_DIVERGENCES["js"](torch.tensor([0.0, 2.0]), 0.5)
    tensor([0.0000, 0.5662])
"""


# --- DPO -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ratios:
    """What the DPO losses look at, each ``(B,)``. What none of them asks for is not formed.

    Example:
        >>> import torch
        >>> from alignment import functional as AF
        >>> chosen, rejected = torch.tensor([-10.0, -8.0]), torch.tensor([-12.0, -7.0])
        >>> given = chosen, rejected, chosen - 1.0, rejected + 1.0, torch.tensor([4, 4]), torch.tensor([5, 2])
        >>> x = AF.ratios(*given, f_divergence="reverse_kl", f_alpha=0.5)
        >>> x.delta, x.policy
        (tensor([2., 2.]), tensor([ 2., -1.]))
    """

    chosen: Tensor  # lc
    rejected: Tensor  # lr
    logps: tuple[Tensor, Tensor]  # c, r
    ref_logps: tuple[Tensor, Tensor]  # rc, rr
    tokens: tuple[Tensor, Tensor]  # nc, nr
    f_divergence: str
    f_alpha: float
    given_nll: Tensor | None = None

    @cached_property
    def shaped(self) -> tuple[Tensor, Tensor]:
        """f'(lc), f'(lr)"""
        divergence = F_DIVERGENCES[self.f_divergence]
        return divergence(self.chosen, self.f_alpha), divergence(self.rejected, self.f_alpha)

    @cached_property
    def delta(self) -> Tensor:
        """f'(lc) - f'(lr)"""
        chosen, rejected = self.shaped
        return chosen - rejected

    @cached_property
    def mean_delta(self) -> Tensor:
        """f'(lc) / nc - f'(lr) / nr"""
        chosen, rejected = map(mean_logps, self.shaped, self.tokens)
        return chosen - rejected

    @property
    def policy(self) -> Tensor:
        """c - r"""
        chosen, rejected = self.logps
        return chosen - rejected

    @property
    def reference(self) -> Tensor:
        """rc - rr"""
        chosen, rejected = self.ref_logps
        return chosen - rejected

    @cached_property
    def nll(self) -> Tensor:
        """Each pair's share of the chosen completions' NLL per token."""
        return token_mean_nll(self.logps[0], self.tokens[0]) if self.given_nll is None else self.given_nll


class DPONumbers(Protocol):
    """What they read besides: a ``DPOLoss`` has it all."""

    beta: float
    label_smoothing: float
    discopop_tau: float


def _sigmoid(x: Ratios, n: DPONumbers) -> Tensor:
    return -F.logsigmoid(n.beta * x.delta)


def _cdpo(x: Ratios, n: DPONumbers) -> Tensor:
    return smoothed_logistic(n.beta * x.delta, n.label_smoothing)


def _hinge(x: Ratios, n: DPONumbers) -> Tensor:
    return F.relu(1 - n.beta * x.delta)


def _ipo(x: Ratios, n: DPONumbers) -> Tensor:
    error = x.mean_delta - 1 / (2 * n.beta)
    largest = math.sqrt(torch.finfo(torch.float32).max) / 4  # the square of a capped exponential overflows
    return torch.where(error.isinf(), error.abs(), error.clamp(-largest, largest).square())


def _sigmoid_norm(x: Ratios, n: DPONumbers) -> Tensor:
    return -F.logsigmoid(n.beta * x.mean_delta)


def _exo_pair(x: Ratios, n: DPONumbers) -> Tensor:
    z, e = n.beta * x.delta, n.label_smoothing
    right = torch.sigmoid(z) * (F.logsigmoid(z) - math.log1p(-e))
    return right + torch.sigmoid(-z) * (F.logsigmoid(-z) - math.log(e))


def _nca_pair(x: Ratios, n: DPONumbers) -> Tensor:
    chosen, rejected = n.beta * x.chosen, n.beta * x.rejected
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def _robust(x: Ratios, n: DPONumbers) -> Tensor:
    z, e = n.beta * x.delta, n.label_smoothing
    return (e * F.logsigmoid(-z) - (1 - e) * F.logsigmoid(z)) / (1 - 2 * e)


def _bco_pair(x: Ratios, n: DPONumbers) -> Tensor:
    return -F.logsigmoid(n.beta * x.chosen) - F.logsigmoid(-n.beta * x.rejected)


def _sppo_hard(x: Ratios, n: DPONumbers) -> Tensor:
    return (x.chosen - 0.5 / n.beta).square() + (x.rejected + 0.5 / n.beta).square()


def _sorted_difference(better: Tensor, worse: Tensor) -> Tensor:
    return better.sort().values - worse.sort().values


def _aot(x: Ratios, n: DPONumbers) -> Tensor:
    return smoothed_logistic(n.beta * _sorted_difference(x.policy, x.reference), n.label_smoothing)


def _aot_unpaired(x: Ratios, n: DPONumbers) -> Tensor:
    return smoothed_logistic(n.beta * _sorted_difference(x.chosen, x.rejected), n.label_smoothing)


def _apo_zero(x: Ratios, n: DPONumbers) -> Tensor:
    return torch.sigmoid(-n.beta * x.chosen) + torch.sigmoid(n.beta * x.rejected)


def _apo_down(x: Ratios, n: DPONumbers) -> Tensor:
    return torch.sigmoid(n.beta * x.chosen) + torch.sigmoid(-n.beta * (x.chosen - x.rejected))


def _discopop(x: Ratios, n: DPONumbers) -> Tensor:
    z = n.beta * x.delta
    gate = z / n.discopop_tau
    # exp(-z) * sigmoid(gate) as one exponential: for a bad margin it would be inf * 0.
    exponential = capped_exp(F.logsigmoid(gate) - z)
    return exponential - F.logsigmoid(z) * torch.sigmoid(-gate)


def _sft(x: Ratios, n: DPONumbers) -> Tensor:
    return x.nll


DPO_LOSSES: dict[str, Callable[[Ratios, DPONumbers], Tensor]] = {
    "sigmoid": _sigmoid,
    "cdpo": _cdpo,
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
"""The ``loss_type`` of ``DPOLoss`` by name.

Example:
    >>> from alignment import functional as AF
    >>> len(AF.DPO_LOSSES), sorted(AF.DPO_LOSSES)[:3]
    (16, ['aot', 'aot_unpaired', 'apo_down'])
"""

SORTING = frozenset({"aot", "aot_unpaired"})
"""Loss types whose rows are no pairs any more: they sort the batch."""
DIFFERENCES = frozenset({"sigmoid", "cdpo", "hinge", "ipo", "sigmoid_norm", "exo_pair", "robust", "discopop", "sft"})
"""Loss types that see f' in differences alone, where its unknown constant cancels: the ones with f-divergences."""
SMOOTHING = frozenset({"cdpo", "exo_pair", "robust", "aot", "aot_unpaired"})
"""Loss types that read ``label_smoothing``. As in TRL, "sigmoid" does not."""


def ratios(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    chosen_tokens: Tensor,
    rejected_tokens: Tensor,
    *,
    f_divergence: str,
    f_alpha: float,
    nll: Tensor | None = None,
) -> Ratios:
    """The vectors that ``DPO_LOSSES`` take; ``nll`` defaults to the token mean of these pairs.

    Example:
        >>> import torch
        >>> from alignment import DPOLoss
        >>> from alignment import functional as AF
        >>> chosen, rejected = torch.tensor([-10.0, -8.0]), torch.tensor([-12.0, -7.0])
        >>> given = chosen, rejected, chosen - 1.0, rejected + 1.0, torch.tensor([4, 4]), torch.tensor([5, 2])
        >>> x = AF.ratios(*given, f_divergence="reverse_kl", f_alpha=0.5)
        >>> AF.DPO_LOSSES["sigmoid"](x, DPOLoss(beta=0.1))
        tensor([0.5981, 0.5981])
    """
    return Ratios(
        chosen - ref_chosen,
        rejected - ref_rejected,
        (chosen, rejected),
        (ref_chosen, ref_rejected),
        (chosen_tokens, rejected_tokens),
        f_divergence,
        f_alpha,
        nll,
    )


def wpo_weight(
    chosen: Tensor,
    rejected: Tensor,
    chosen_squares: Tensor,  # log sum_v p_v^2, summed over the chosen tokens
    rejected_squares: Tensor,
    chosen_tokens: Tensor,
    rejected_tokens: Tensor,
) -> Tensor:
    """``w_c w_r`` with ``w = exp(mean_t(logp_t - log sum_v p_v^2))``, detached (https://arxiv.org/abs/2406.11827).

    Example:
        >>> import torch
        >>> from alignment import functional as AF
        >>> chosen, rejected = torch.tensor([-10.0, -8.0]), torch.tensor([-12.0, -7.0])
        >>> squares, tokens = torch.tensor([-4.0, -3.0]), torch.tensor([4, 4])
        >>> AF.wpo_weight(chosen, rejected, squares, squares, tokens, tokens)
        tensor([0.0302, 0.1054])
    """
    of_chosen = mean_logps(chosen - chosen_squares, chosen_tokens)
    return torch.exp(of_chosen + mean_logps(rejected - rejected_squares, rejected_tokens)).detach()


# --- other losses with a reference -----------------------------------------------------------------------------------


def irpo(chosen_ratio: Tensor, rejected_ratio: Tensor, chosen_mean: Tensor, *, beta: float, alpha: float) -> Tensor:
    """``-logsigmoid(b(lc - lr)) - alpha c / nc``

    Example:
        >>> import torch
        >>> from alignment import functional as AF
        >>> chosen, rejected = torch.tensor([1.0, 0.5]), torch.tensor([-1.0, 0.5])  # log-ratios to the reference
        >>> AF.irpo(chosen, rejected, torch.tensor([-2.0, -1.0]), beta=0.1, alpha=1.0)
        tensor([2.5981, 1.6931])
    """
    return -F.logsigmoid(beta * (chosen_ratio - rejected_ratio)) - alpha * chosen_mean


def dpop(chosen_ratio: Tensor, rejected_ratio: Tensor, *, beta: float, dpop_lambda: float) -> Tensor:
    """``-logsigmoid(b(lc - lr - lambda relu(-lc)))``

    Example:
        >>> import torch
        >>> from alignment import functional as AF
        >>> chosen, rejected = torch.tensor([1.0, 0.5]), torch.tensor([-1.0, 0.5])  # log-ratios to the reference
        >>> AF.dpop(chosen, rejected, beta=0.1, dpop_lambda=50.0)
        tensor([0.5981, 0.6931])
    """
    return -F.logsigmoid(beta * (chosen_ratio - rejected_ratio - dpop_lambda * F.relu(-chosen_ratio)))


def rdpo(
    chosen_ratio: Tensor,
    rejected_ratio: Tensor,
    chosen_tokens: Tensor,
    rejected_tokens: Tensor,
    *,
    beta: float,
    length_weight: float,
) -> Tensor:
    """``-logsigmoid(b(lc - lr) + w(nc - nr))``

    Example:
        >>> import torch
        >>> from alignment import functional as AF
        >>> chosen, rejected = torch.tensor([1.0, 0.5]), torch.tensor([-1.0, 0.5])  # log-ratios to the reference
        >>> AF.rdpo(chosen, rejected, torch.tensor([4, 4]), torch.tensor([5, 2]), beta=0.1, length_weight=0.01)
        tensor([0.6027, 0.6832])
    """
    longer = chosen_tokens - rejected_tokens
    return -F.logsigmoid(beta * (chosen_ratio - rejected_ratio) + length_weight * longer)


def tdpo(
    chosen_ratio: Tensor,
    rejected_ratio: Tensor,
    chosen_kl: Tensor,  # sum_t KL(reference || policy) over the chosen tokens
    rejected_kl: Tensor,
    *,
    beta: float,
    loss_type: str,
    kl_weight: float,
) -> Tensor:
    """``-logsigmoid(b(lc - lr - d))``: ``d = kr - kc`` (tdpo1) or ``w(kr - stop_gradient(kc))`` (tdpo2), k the KLs

    Example:
        >>> import torch
        >>> from alignment import functional as AF
        >>> chosen, rejected = torch.tensor([1.0, 0.5]), torch.tensor([-1.0, 0.5])  # log-ratios to the reference
        >>> kl = torch.tensor([0.5, 0.2]), torch.tensor([0.1, 0.4])
        >>> AF.tdpo(chosen, rejected, *kl, beta=0.1, loss_type="tdpo2", kl_weight=0.5)
        tensor([0.5892, 0.6982])
    """
    delta = rejected_kl - chosen_kl if loss_type == "tdpo1" else kl_weight * (rejected_kl - chosen_kl.detach())
    return -F.logsigmoid(beta * (chosen_ratio - rejected_ratio - delta))


# --- without a reference ---------------------------------------------------------------------------------------------


def cpo(chosen: Tensor, rejected: Tensor, *, loss_type: str, beta: float, label_smoothing: float) -> Tensor:
    """The preference term of CPO: ``sigmoid``, ``hinge``, or ``ipo``, which takes log-probabilities per token

    Example:
        >>> import torch
        >>> from alignment import functional as AF
        >>> chosen, rejected = torch.tensor([-10.0, -8.0]), torch.tensor([-12.0, -7.0])
        >>> AF.cpo(chosen, rejected, loss_type="sigmoid", beta=0.1, label_smoothing=0.0)
        tensor([0.5981, 0.7444])
    """
    if loss_type == "ipo":
        return (chosen - rejected - 1 / (2 * beta)).square()
    if loss_type == "hinge":
        return F.relu(1 - beta * (chosen - rejected))
    return smoothed_logistic(beta * (chosen - rejected), label_smoothing)


def simpo(chosen_mean: Tensor, rejected_mean: Tensor, *, beta: float, gamma: float, label_smoothing: float) -> Tensor:
    """``-logsigmoid(b(c / nc - r / nr) - gamma)``

    Example:
        >>> import torch
        >>> from alignment import functional as AF
        >>> chosen_mean, rejected_mean = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.5])
        >>> AF.simpo(chosen_mean, rejected_mean, beta=2.0, gamma=0.5, label_smoothing=0.0)
        tensor([0.4741, 1.7014])
    """
    return smoothed_logistic(beta * (chosen_mean - rejected_mean) - gamma, label_smoothing)


def tpo(
    chosen: Tensor,
    rejected: Tensor,
    nll: Tensor,
    *,
    loss_type: str,
    beta: float,
    label_smoothing: float,
    alpha: float,
    gamma: float,
) -> Tensor:
    """``alpha`` times the NLL of a gold completion, plus ``cpo``'s term, or with "tpo-l" ``simpo``'s.

    "ipo" and "tpo-l" take log-probabilities per token.

    Example:
        >>> import torch
        >>> from alignment import functional as AF
        >>> chosen, rejected, nll = torch.tensor([-10.0]), torch.tensor([-12.0]), torch.tensor([2.0])
        >>> AF.tpo(chosen, rejected, nll, loss_type="sigmoid", beta=0.1, label_smoothing=0.0, alpha=1.0, gamma=0.5)
        tensor([2.5981])
    """
    if loss_type == "tpo-l":
        term = simpo(chosen, rejected, beta=beta, gamma=gamma, label_smoothing=label_smoothing)
    else:
        term = cpo(chosen, rejected, loss_type=loss_type, beta=beta, label_smoothing=label_smoothing)
    return term + alpha * nll if alpha else term


def alphapo_reward(
    x: Tensor,  # (B,), log-probability per token
    reward_alpha: float,
) -> Tensor:
    """``(1 - exp(-a x)) / a``, and x itself for a = 0: SimPO of these is AlphaPO

    Example:
        >>> import torch
        >>> from alignment import functional as AF
        >>> AF.alphapo_reward(torch.tensor([-1.0, -2.0]), 0.25)
        tensor([-1.1361, -2.5949])
        >>> AF.alphapo_reward(torch.tensor([-1.0, -2.0]), 0.0)
        tensor([-1., -2.])
    """
    return x if reward_alpha == 0 else (1 - capped_exp(-reward_alpha * x)) / reward_alpha


def log_odds(chosen_mean: Tensor, rejected_mean: Tensor) -> Tensor:
    """``log(odds(chosen) / odds(rejected))`` with ``odds = p / (1 - p)``, p per token

    Example:
        >>> import torch
        >>> from alignment import functional as AF
        >>> AF.log_odds(torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.5]))
        tensor([ 0.7062, -0.6071])
    """
    chosen, rejected = log1mexp(torch.stack([chosen_mean, rejected_mean])).unbind(0)
    return (chosen_mean - rejected_mean) - (chosen - rejected)


def orpo(chosen_mean: Tensor, rejected_mean: Tensor, *, beta: float) -> Tensor:
    """``-b logsigmoid(log odds ratio)``: the preference term of ORPO

    Example:
        >>> import torch
        >>> from alignment import functional as AF
        >>> AF.orpo(torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.5]), beta=0.1)
        tensor([0.0401, 0.1042])
    """
    return of_odds(log_odds(chosen_mean, rejected_mean), beta=beta)


def of_odds(log_odds: Tensor, *, beta: float) -> Tensor:
    """The same, where the ratio is known

    Example:
        >>> import torch
        >>> from alignment import functional as AF
        >>> AF.of_odds(torch.tensor([0.7, -0.7]), beta=0.1)
        tensor([0.0403, 0.1103])
    """
    return -beta * F.logsigmoid(log_odds)


def slic(
    chosen: Tensor,
    rejected: Tensor,
    sft_logps: Tensor,  # log-probability of the sequence that regularises
    *,
    delta: float,
    alpha: float,
) -> Tensor:
    """``relu(delta - c + r) - alpha log p(y_ref)``

    Example:
        >>> import torch
        >>> from alignment import functional as AF
        >>> chosen, rejected = torch.tensor([-10.0, -8.0]), torch.tensor([-12.0, -7.0])
        >>> AF.slic(chosen, rejected, chosen, delta=1.0, alpha=0.1)
        tensor([1.0000, 2.8000])
    """
    return F.relu(delta - chosen + rejected) - alpha * sft_logps


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
"""``sum q f(p / q)`` by the name of f, with p and q over the pair.

Example:
    >>> from alignment import functional as AF
    >>> sorted(AF.FPO_DIVERGENCES)[:4]
    ['alpha', 'chi_squared', 'dpo', 'exo']
"""


def fpo(
    chosen: Tensor,  # score of the chosen completion
    rejected: Tensor,
    *,
    divergence: str,
    beta: float,
    gamma: float,
    divergence_order: float,
) -> Tensor:
    """``sum q f(p / q)``, ``p = softmax(b [chosen - gamma / b, rejected])``, ``q = [1, exp(-10)]``

    Example:
        >>> import torch
        >>> from alignment import functional as AF
        >>> numbers = {"beta": 2.0, "gamma": 0.5, "divergence_order": 0.1}
        >>> AF.fpo(torch.tensor([1.0, -1.0]), torch.tensor([-1.0, 1.0]), divergence="js", **numbers)
        tensor([0.0101, 0.6626])
    """
    log_p = torch.stack([beta * chosen - gamma, beta * rejected]).log_softmax(0)
    of_rejected = torch.full_like(log_p[1], LOG_EPSILON)
    log_q = torch.stack([torch.zeros_like(of_rejected), of_rejected])
    return FPO_DIVERGENCES[divergence](Densities(log_p, log_q, divergence_order))


# --- single sequences ------------------------------------------------------------------------------------------------


def kto_kl(
    logps: Tensor,  # (B,), of completions that belong to other prompts
    ref_logps: Tensor,  # (B,)
) -> Tensor:
    """KTO's reference point: ``max(0, mean(logps - ref_logps))``, detached

    Example:
        >>> import torch
        >>> from alignment import functional as AF
        >>> AF.kto_kl(torch.tensor([-10.0, -8.0]), torch.tensor([-11.0, -8.0]))
        tensor(0.5000)
        >>> AF.kto_kl(torch.tensor([-11.0, -8.0]), torch.tensor([-10.0, -8.0]))  # not below zero
        tensor(0.)
    """
    return (logps - ref_logps).detach().mean().clamp_min(0)


def kto(
    ratio: Tensor,  # (B,), log of policy over reference
    desirable: Tensor,  # (B,), bool
    kl: Tensor,  # () or (B,)
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> Tensor:
    """Desirable: ``1 - sigmoid(b(l - kl))``; undesirable: ``1 - sigmoid(b(kl - l))``; each with its class's weight

    Example:
        >>> import torch
        >>> from alignment import functional as AF
        >>> good = torch.tensor([True, False])
        >>> numbers = {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}
        >>> AF.kto(torch.tensor([1.0, 1.0]), good, torch.tensor(0.5), **numbers)
        tensor([0.4875, 0.5125])
    """
    z = beta * (ratio - kl)
    return torch.where(desirable, desirable_weight * torch.sigmoid(-z), undesirable_weight * torch.sigmoid(z))


def bco(
    ratio: Tensor,
    desirable: Tensor,
    delta: Tensor,  # (), mean reward
    *,
    beta: float,
) -> Tensor:
    """Desirable: ``-logsigmoid(b l - delta)``; undesirable: ``-logsigmoid(delta - b l)``

    Example:
        >>> import torch
        >>> from alignment import functional as AF
        >>> AF.bco(torch.tensor([1.0, 1.0]), torch.tensor([True, False]), torch.tensor(0.05), beta=0.1)
        tensor([0.6685, 0.7185])
    """
    z = beta * ratio - delta
    return -F.logsigmoid(torch.where(desirable, z, -z))
