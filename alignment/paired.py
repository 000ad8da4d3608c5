"""Losses over preference pairs, from hidden states and an LM head.

Every class is called the same way, ``loss(hidden, weight, target, bias, ...)``; ``PairLoss.forward`` says how. ``c``,
``r``, ``rc``, ``rr`` are log-probabilities of the chosen and the rejected completion under policy and reference, ``lc =
c - rc``, ``lr = r - rr``, ``nc`` and ``nr`` their token counts, ``b`` is beta. All are means over the pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from chunked_embed import FlexChunkLoss

from . import functional as AF
from ._base import (
    FINITE,
    NOT_NEGATIVE,
    POSITIVE,
    SMOOTHING,
    CoupledPairEngine,
    DivergencePairEngine,
    Named,
    PairEngine,
    PairLoss,
    PairScores,
    Range,
    check_choice,
    check_number,
)

UNIT = Range(0, 1 + 1e-12, "a number in [0, 1]", low_included=True)


class DPOLoss(PairLoss):
    """Direct preference optimisation (https://arxiv.org/abs/2305.18290) and the losses that grew out of it.

    With ``D = f'(lc) - f'(lr)`` (``lc - lr`` by default) and ``e`` the label smoothing::

        sigmoid       -(1 - e) logsigmoid(b D) - e logsigmoid(-b D)
        hinge         relu(1 - b D)                                                     arXiv 2309.06657
        ipo           (f'(lc) / nc - f'(lr) / nr - 1 / (2 b))^2                         arXiv 2310.12036
        sigmoid_norm  -logsigmoid(b (f'(lc) / nc - f'(lr) / nr))
        exo_pair      KL of (sigmoid(b D), sigmoid(-b D)) from (1 - e, e); e > 0        arXiv 2402.00856
        nca_pair      -logsigmoid(b lc) - logsigmoid(-b lc) / 2 - logsigmoid(-b lr) / 2 arXiv 2402.05369
        robust        (-(1 - e) logsigmoid(b D) + e logsigmoid(-b D)) / (1 - 2 e)       arXiv 2403.00409
        bco_pair      -logsigmoid(b lc) - logsigmoid(-b lr)                             arXiv 2404.04656
        sppo_hard     (lc - 1 / (2 b))^2 + (lr + 1 / (2 b))^2                           arXiv 2405.00675
        aot           d = sort(c - r) - sort(rc - rr), then as sigmoid                  arXiv 2406.05882
        aot_unpaired  d = sort(lc) - sort(lr), then as sigmoid
        apo_zero      1 - sigmoid(b lc) + sigmoid(b lr)                                 arXiv 2408.06266
        apo_down      sigmoid(b lc) + 1 - sigmoid(b (lc - lr))
        discopop      z = b D, m = sigmoid(z / tau); -logsigmoid(z) (1 - m) + exp(-z) m arXiv 2406.08414
        sft           negative log-likelihood of the chosen completions, per token

    Defaults and names are TRL's; several losses may be added up with weights (MPO is ``["sigmoid", "bco_pair",
    "sft"]`` with ``[0.8, 0.2, 1.0]``).

    Args:
        beta: how strongly the policy is held to the reference.
        loss_type: one name, or several.
        loss_weights: one weight a name, 1 each by default.
        label_smoothing: probability that a preference is wrong, in [0, 0.5).
        f_divergence: "reverse_kl" (f'(l) = l), "forward_kl" (1 - exp(-l)), "js" (log 2 + logsigmoid(l)) or "alpha"
            ((exp((a - 1) l) - 1) / (a - 1)), of losses that see D alone (https://arxiv.org/abs/2309.16240).
        f_alpha: the order a of "alpha".
        ld_alpha: weighs the tokens of the longer completion beyond the length of the shorter one, in policy and
            reference alike (https://arxiv.org/abs/2409.06411); None is 1.
        use_weighting: multiply each pair's loss by WPO's weights ``w_c w_r``, ``w = exp(mean_t(logp_t - log sum_v
            p_v^2))``, detached (https://arxiv.org/abs/2406.11827). Not with aot or aot_unpaired.
        discopop_tau: temperature of discopop's gate.
        options: of ``PreferenceLoss``.

    Example:
        >>> import torch
        >>> hidden = torch.randn(4, 6, 8, requires_grad=True)  # two pairs: both chosen ones, then both rejected ones
        >>> weight = torch.randn(11, 8, requires_grad=True)  # an LM head over 11 tokens
        >>> target = torch.randint(0, 11, (4, 6))
        >>> target[:, :2] = -100  # the prompt
        >>> loss = DPOLoss(beta=0.1, compiled=False)
        >>> out = loss(hidden, weight, target, ref_logps=torch.full((4,), -10.0))
        >>> out.loss.backward()
        >>> out.metrics["rewards/margins"].shape
        torch.Size([2])
    """

    ranges = {
        "beta": POSITIVE,
        "label_smoothing": SMOOTHING,
        "f_alpha": FINITE,
        "discopop_tau": POSITIVE,
    }
    choices = {"f_divergence": AF.F_DIVERGENCES}

    def __init__(
        self,
        beta: float = 0.1,
        loss_type: str | Sequence[str] = "sigmoid",
        loss_weights: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
        f_divergence: str = "reverse_kl",
        f_alpha: float = 0.5,
        ld_alpha: float | None = None,
        use_weighting: bool = False,
        discopop_tau: float = 0.05,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.beta = beta
        self.loss_type = loss_type
        self.loss_weights = loss_weights
        self.label_smoothing = label_smoothing
        self.f_divergence = f_divergence
        self.f_alpha = f_alpha
        self.ld_alpha = ld_alpha
        self.use_weighting = use_weighting
        self.discopop_tau = discopop_tau
        self.check()

    @property
    def loss_types(self) -> tuple[str, ...]:
        return (self.loss_type,) if isinstance(self.loss_type, str) else tuple(self.loss_type)

    def check(self) -> None:
        super().check()
        if not isinstance(self.loss_type, (str, list, tuple)) or not self.loss_type:
            raise ValueError(f"expected loss_type to be a name or a list of names, got {self.loss_type!r}")
        types = self.loss_types
        for name in types:
            check_choice("loss_type", name, AF.DPO_LOSSES)
        weights = self.loss_weights
        if weights is not None and len(weights) != len(types):
            raise ValueError(f"expected {len(types)} loss_weights, one for each loss_type, got {len(weights)}")
        for value in weights or ():
            check_number("loss_weights", value, FINITE)
        if self.ld_alpha is not None:
            check_number("ld_alpha", self.ld_alpha, UNIT)
        if "exo_pair" in types and not self.label_smoothing > 0:
            raise ValueError("expected label_smoothing above 0 with exo_pair (the paper has 1e-3), got 0")
        if self.f_divergence != "reverse_kl" and not AF.DIFFERENCES.issuperset(types):
            raise ValueError(
                f"expected loss_type among {sorted(AF.DIFFERENCES)} with f_divergence={self.f_divergence!r}, "
                f"got {list(types)}"
            )
        if self.use_weighting and not AF.SORTING.isdisjoint(types):
            raise ValueError(f"expected no use_weighting with {sorted(AF.SORTING)}: sorting takes the pairs apart")

    def extra_repr(self) -> str:
        return f"loss_type={self.loss_type!r}, {super().extra_repr()}"

    def _engine(self) -> Callable[..., FlexChunkLoss]:
        types = set(self.loss_types)
        coupled = bool(types & AF.SORTING) or (self.use_weighting and "sft" in types)
        return CoupledPairEngine if coupled else PairEngine

    def _tail_weight(self) -> float | None:
        return self.ld_alpha

    def _statistics(self) -> tuple[str, ...]:
        return super()._statistics() + (("log_sum_sq_probs",) if self.use_weighting else ())

    def pair_loss(self, x: PairScores) -> Tensor:
        # Under WPO the token mean is one number, which each pair's weight multiplies.
        nll = x.nll if x.weight is None or "sft" not in self.loss_types else x.nll.mean().expand_as(x.nll)
        terms = AF.ratios(
            x.c, x.r, x.rc, x.rr, x.nc, x.nr, nll=nll, f_divergence=self.f_divergence, f_alpha=self.f_alpha
        )
        hp = AF.Numbers(self.beta, self.label_smoothing, self.discopop_tau)
        types = self.loss_types
        weights = (1.0,) * len(types) if self.loss_weights is None else self.loss_weights
        total: Any = sum(w * AF.DPO_LOSSES[name](terms, hp) for name, w in zip(types, weights, strict=True))
        return total if x.weight is None else total * x.weight


class IRPOLoss(PairLoss):
    """Iterative reasoning preference optimisation: ``-logsigmoid(b (lc - lr)) - alpha c / nc``.

    https://arxiv.org/abs/2404.19733
    """

    ranges = {"beta": POSITIVE, "alpha": NOT_NEGATIVE}

    def __init__(self, beta: float = 0.1, alpha: float = 1.0, **options: Any) -> None:
        super().__init__(**options)
        self.beta = beta
        self.alpha = alpha
        self.check()

    def pair_loss(self, x: PairScores) -> Tensor:
        return AF.irpo(x.c, x.r, x.rc, x.rr, x.nc, beta=self.beta, alpha=self.alpha)


class DPOPLoss(PairLoss):
    """DPO-positive: ``-logsigmoid(b (lc - lr - dpop_lambda relu(rc - c)))``.

    The penalty keeps the chosen completion from becoming less likely than under the reference.
    https://arxiv.org/abs/2402.13228
    """

    ranges = {"beta": POSITIVE, "dpop_lambda": NOT_NEGATIVE}

    def __init__(self, beta: float = 0.1, dpop_lambda: float = 50.0, **options: Any) -> None:
        super().__init__(**options)
        self.beta = beta
        self.dpop_lambda = dpop_lambda
        self.check()

    def pair_loss(self, x: PairScores) -> Tensor:
        return AF.dpop(x.c, x.r, x.rc, x.rr, beta=self.beta, dpop_lambda=self.dpop_lambda)


class RDPOLoss(PairLoss):
    """Length-regularised DPO: ``-logsigmoid(b (lc - lr) + length_weight (nc - nr))``.

    https://arxiv.org/abs/2403.19159
    """

    ranges = {"beta": POSITIVE, "length_weight": FINITE}

    def __init__(self, beta: float = 0.1, length_weight: float = 0.01, **options: Any) -> None:
        super().__init__(**options)
        self.beta = beta
        self.length_weight = length_weight
        self.check()

    def pair_loss(self, x: PairScores) -> Tensor:
        return AF.rdpo(x.c, x.r, x.rc, x.rr, x.nc, x.nr, beta=self.beta, length_weight=self.length_weight)


class TDPOLoss(PairLoss):
    """Token-level DPO: ``-logsigmoid(b (lc - lr - d))``, where ``k = sum_t KL(reference || policy)`` and

        tdpo1  d = kr - kc
        tdpo2  d = kl_weight (kr - stop_gradient(kc))

    The divergence is over the whole vocabulary, so the reference must be given as hidden states and a head.
    https://arxiv.org/abs/2404.11999
    """

    ranges = {"beta": POSITIVE, "kl_weight": NOT_NEGATIVE}
    choices = {"loss_type": ("tdpo1", "tdpo2")}
    takes_ref_logps = False

    def __init__(self, beta: float = 0.1, loss_type: str = "tdpo2", kl_weight: float = 0.5, **options: Any) -> None:
        super().__init__(**options)
        self.beta = beta
        self.loss_type = loss_type
        self.kl_weight = kl_weight
        self.check()

    def _engine(self) -> Callable[..., FlexChunkLoss]:
        return DivergencePairEngine

    def _projections(self, *arguments: Any) -> Any:
        projections = super()._projections(*arguments)
        sizes = [p.weight.shape[0] for p in projections.values() if p.weight is not None]
        if sizes[0] != sizes[1]:
            raise ValueError(f"expected one vocabulary of policy and reference, got {sizes[0]} and {sizes[1]} tokens")
        return projections

    def pair_loss(self, x: PairScores) -> tuple[Tensor, Named]:
        assert x.kc is not None and x.kr is not None
        numbers: dict[str, Any] = {"beta": self.beta, "loss_type": self.loss_type, "kl_weight": self.kl_weight}
        loss = AF.tdpo(x.c, x.r, x.rc, x.rr, x.kc, x.kr, **numbers)
        return loss, {"kl/chosen": x.kc, "kl/rejected": x.kr}

    def rewards(self, x: PairScores) -> tuple[Tensor, Tensor]:
        assert x.kc is not None and x.kr is not None
        return self.beta * (x.c - x.rc + x.kc), self.beta * (x.r - x.rr + x.kr)


class FPOLoss(PairLoss):
    """f-PO: an f-divergence between the policy's preference and a target's.

    ``sum q f(p / q)`` over the pair, with ``p = softmax(b [sc - gamma / b, sr])``, ``q = [1, exp(-10)]``. The score s
    is the log-ratio to the reference, or the log-probability per token where no reference is given::

        dpo                -log u                     exo              u log u
        js                 (KL(p|m) + KL(q|m)) / 2    jeffreys         sum (p - q)(log p - log q)
        squared_hellinger  sum (sqrt p - sqrt q)^2    total_variation  sum |p - q| / 2
        chi_squared        sum (p - q)^2 / q          alpha            (u^(1-a) - (1-a) u - a) / (a (a - 1))

    Not f-DPO, which is ``DPOLoss(f_divergence=...)``; and "alpha" is not ``AlphaPOLoss``. Defaults of beta, gamma and
    of alpha's order a are those of the authors' trainer without a reference. https://arxiv.org/abs/2410.21662

    Args:
        beta, gamma: scale of the scores, and the margin between them.
        divergence: a name of the table.
        divergence_order: a of "alpha"; not 0 or 1, where the formula has limits: "exo" and "dpo".
    """

    ranges = {"beta": POSITIVE, "gamma": FINITE, "divergence_order": FINITE}
    choices = {"divergence": AF.FPO_DIVERGENCES}
    takes_reference = None

    def __init__(
        self,
        beta: float = 2.0,
        gamma: float = 0.5,
        divergence: str = "js",
        divergence_order: float = 0.1,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.beta = beta
        self.gamma = gamma
        self.divergence = divergence
        self.divergence_order = divergence_order
        self.check()

    def check(self) -> None:
        super().check()
        if self.divergence_order in (0, 1):
            raise ValueError(f"expected divergence_order other than 0 and 1, got {self.divergence_order}")

    def logps(self, x: PairScores) -> tuple[Tensor, Tensor]:
        return (x.c, x.r) if x.has_reference else (AF.mean_logps(x.c, x.nc), AF.mean_logps(x.r, x.nr))

    def pair_loss(self, x: PairScores) -> Tensor:
        numbers: dict[str, Any] = {"divergence": self.divergence, "divergence_order": self.divergence_order}
        chosen, rejected = self.logps(x)
        return AF.fpo(chosen - x.rc, rejected - x.rr, beta=self.beta, gamma=self.gamma, **numbers)


# --- without a reference ---------------------------------------------------------------------------------------------


class CPOLoss(PairLoss):
    """Contrastive preference optimisation: a preference term plus ``alpha`` times the chosen NLL per token.

        sigmoid  -(1 - e) logsigmoid(b (c - r)) - e logsigmoid(-b (c - r))
        hinge    relu(1 - b (c - r))
        ipo      (c / nc - r / nr - 1 / (2 b))^2

    https://arxiv.org/abs/2401.08417. The NLL counts the tokens of ``nll_target``, by default the completions'.
    """

    ranges = {"beta": POSITIVE, "alpha": NOT_NEGATIVE, "label_smoothing": SMOOTHING}
    choices = {"loss_type": ("sigmoid", "hinge", "ipo")}
    takes_reference = False
    takes_nll_target = True

    def __init__(
        self,
        beta: float = 0.1,
        loss_type: str = "sigmoid",
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.beta = beta
        self.loss_type = loss_type
        self.alpha = alpha
        self.label_smoothing = label_smoothing
        self.check()

    def averages(self) -> bool:
        return self.loss_type == "ipo"

    def pair_loss(self, x: PairScores) -> Tensor:
        numbers: dict[str, Any] = {"loss_type": self.loss_type, "label_smoothing": self.label_smoothing}
        return AF.cpo(x.c, x.r, x.nc, x.nr, beta=self.beta, **numbers) + self.alpha * x.nll


class SimPOLoss(PairLoss):
    """Simple preference optimisation: ``-logsigmoid(b (c / nc - r / nr) - gamma)``, with label smoothing as in DPO.

    No NLL: that is ``CPOSimPOLoss``. Defaults are TRL's; the paper has beta 2 to 2.5. https://arxiv.org/abs/2405.14734
    """

    ranges = {"beta": POSITIVE, "gamma": FINITE, "label_smoothing": SMOOTHING}
    takes_reference = False

    def __init__(self, beta: float = 0.1, gamma: float = 0.5, label_smoothing: float = 0.0, **options: Any) -> None:
        super().__init__(**options)
        self.beta = beta
        self.gamma = gamma
        self.label_smoothing = label_smoothing
        self.check()

    def averages(self) -> bool:
        return True

    def pair_loss(self, x: PairScores) -> Tensor:
        numbers: dict[str, Any] = {"gamma": self.gamma, "label_smoothing": self.label_smoothing}
        return AF.simpo(x.c, x.r, x.nc, x.nr, beta=self.beta, **numbers)


class CPOSimPOLoss(SimPOLoss):
    """SimPO plus ``alpha`` times the chosen NLL per token (https://github.com/fe1ixxu/CPO_SIMPO)."""

    ranges = {**SimPOLoss.ranges, "alpha": NOT_NEGATIVE}
    takes_nll_target = True

    def __init__(
        self,
        beta: float = 0.1,
        gamma: float = 0.5,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        **options: Any,
    ) -> None:
        self.alpha = alpha
        super().__init__(beta, gamma, label_smoothing, **options)

    def pair_loss(self, x: PairScores) -> Tensor:
        return super().pair_loss(x) + self.alpha * x.nll


class AlphaPOLoss(SimPOLoss):
    """SimPO with another shape of reward: each mean log-probability x becomes ``(1 - exp(-a x)) / a``.

    ``a = reward_alpha``; zero is SimPO. With ``alpha``, the chosen NLL per token is added. https://arxiv.org/abs/2501.03884
    """

    ranges = {**SimPOLoss.ranges, "reward_alpha": FINITE, "alpha": NOT_NEGATIVE}
    takes_nll_target = True

    def __init__(
        self,
        beta: float = 0.1,
        gamma: float = 0.5,
        reward_alpha: float = 0.25,
        label_smoothing: float = 0.0,
        *,
        alpha: float = 0.0,
        **options: Any,
    ) -> None:
        self.reward_alpha = reward_alpha
        self.alpha = alpha
        super().__init__(beta, gamma, label_smoothing, **options)

    def pair_loss(self, x: PairScores) -> Tensor:
        numbers: dict[str, Any] = {"gamma": self.gamma, "label_smoothing": self.label_smoothing}
        loss = AF.alphapo(x.c, x.r, x.nc, x.nr, beta=self.beta, reward_alpha=self.reward_alpha, **numbers)
        return loss + self.alpha * x.nll

    def rewards(self, x: PairScores) -> tuple[Tensor, Tensor]:
        chosen, rejected = (self.beta * AF.alphapo_reward(v, self.reward_alpha) for v in self.logps(x))
        return chosen, rejected


class ORPOLoss(PairLoss):
    """Odds-ratio preference optimisation: the chosen NLL per token, minus ``b logsigmoid(log odds ratio)``.

    ``log odds ratio = (x - y) - (log(1 - exp x) - log(1 - exp y))``, ``x = c / nc``, ``y = r / nr``. In the paper and
    in TRL the NLL counts the prompt too: give ``nll_target`` for that. https://arxiv.org/abs/2403.07691
    """

    ranges = {"beta": POSITIVE}
    takes_reference = False
    takes_nll_target = True

    def __init__(self, beta: float = 0.1, **options: Any) -> None:
        super().__init__(**options)
        self.beta = beta
        self.check()

    def averages(self) -> bool:
        return True

    def pair_loss(self, x: PairScores) -> tuple[Tensor, Named]:
        odds = AF.log_odds(x.c, x.r, x.nc, x.nr).detach()
        metrics = {"log_odds_chosen": odds, "log_odds_ratio": F.logsigmoid(odds)}
        return x.nll + AF.orpo(x.c, x.r, x.nc, x.nr, beta=self.beta), metrics


class SLiCLoss(PairLoss):
    """Sequence likelihood calibration: ``relu(delta - c + r) - alpha log p(y)``.

    y regularises: by default the chosen completion (``nll_target`` may choose other tokens of that sequence). For
    another sequence give ``sft_logps`` ``(B,)``, with its gradient, as from ``linear_logps``.
    https://arxiv.org/abs/2305.10425
    """

    ranges = {"delta": FINITE, "alpha": NOT_NEGATIVE}
    takes_reference = False
    takes_nll_target = True
    takes_vectors = ("sft_logps",)

    def __init__(self, delta: float = 1.0, alpha: float = 0.1, **options: Any) -> None:
        super().__init__(**options)
        self.delta = delta
        self.alpha = alpha
        self.check()

    def pair_loss(self, x: PairScores) -> Tensor:
        return AF.slic(x.c, x.r, x.given.get("sft_logps", x.sft), delta=self.delta, alpha=self.alpha)
