"""The losses: each is its numbers and a formula of ``functional``.

Losses over pairs come first, then those over triples and over single sequences; ``PairLoss.forward``,
``TripleLoss.forward`` and ``SequenceLoss.forward`` say how they are called. In formulas ``c``, ``r``, ``rc``, ``rr``
are log-probabilities of the chosen and the rejected completion under policy and reference, ``lc = c - rc``,
``lr = r - rr``, ``nc`` and ``nr`` their token counts, ``b`` is beta. Losses are means over the pairs, the triples, or
the sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from chunked_embed import checks
from chunked_embed.checks import FINITE, NOT_NEGATIVE, POSITIVE, SMOOTHING, UNIT
from chunked_embed.fields import KW_ONLY, Field, choice, flag, number

from . import functional as AF
from .pairs import PairLoss, PairScores
from .path import Named
from .sequences import SequenceLoss, SequenceScores
from .triples import TripleLoss

# Fields that several losses have.
HELD: Any = number(0.1, POSITIVE, "how strongly the policy is held to the reference")
MARGIN_SCALE: Any = number(0.1, POSITIVE, "scale of the margin")
MARGIN: Any = number(0.5, FINITE, "the margin that is asked for")
SMOOTHED: Any = number(0.0, SMOOTHING, "probability e that a preference is wrong")


def names(default: str, choices: Collection[str], doc: str) -> Any:
    """A field of one name, or several."""
    return Field(default, partial(_check_names, choices=choices), doc)


def _check_names(name: str, value: Any, choices: Collection[str]) -> Any:
    if not isinstance(value, (str, list, tuple)) or not value:
        raise ValueError(f"expected {name} to be a name or a list of names, got {value!r}")
    for one in (value,) if isinstance(value, str) else value:
        checks.choice(name, one, choices)
    return value


def weights(doc: str) -> Any:
    """A field of numbers, or None."""
    return Field(None, _check_weights, doc)


def _check_weights(name: str, value: Any) -> Any:
    if value is not None and not isinstance(value, (list, tuple)):
        raise TypeError(f"expected {name} to be a list of numbers or None, got {type(value).__name__}")
    for one in value or ():
        checks.number(name, one)
    return value


# --- with a reference ------------------------------------------------------------------------------------------------


class DPOLoss(PairLoss):
    """Direct preference optimisation (https://arxiv.org/abs/2305.18290) and the losses that grew out of it.

    With ``D = f'(lc) - f'(lr)`` (``lc - lr`` by default) and ``e`` the label smoothing::

        sigmoid       -logsigmoid(b D)
        cdpo          -(1 - e) logsigmoid(b D) - e logsigmoid(-b D): conservative DPO
        hinge         relu(1 - b D)                                                     arXiv 2309.06657
        ipo           (f'(lc) / nc - f'(lr) / nr - 1 / (2 b))^2                         arXiv 2310.12036
        sigmoid_norm  -logsigmoid(b (f'(lc) / nc - f'(lr) / nr))
        exo_pair      KL of (sigmoid(b D), sigmoid(-b D)) from (1 - e, e); e > 0        arXiv 2402.00856
        nca_pair      -logsigmoid(b lc) - logsigmoid(-b lc) / 2 - logsigmoid(-b lr) / 2 arXiv 2402.05369
        robust        (-(1 - e) logsigmoid(b D) + e logsigmoid(-b D)) / (1 - 2 e)       arXiv 2403.00409
        bco_pair      -logsigmoid(b lc) - logsigmoid(-b lr)                             arXiv 2404.04656
        sppo_hard     (lc - 1 / (2 b))^2 + (lr + 1 / (2 b))^2                           arXiv 2405.00675
        aot           d = sort(c - r) - sort(rc - rr), then as cdpo                     arXiv 2406.05882
        aot_unpaired  d = sort(lc) - sort(lr), then as cdpo
        apo_zero      1 - sigmoid(b lc) + sigmoid(b lr)                                 arXiv 2408.06266
        apo_down      sigmoid(b lc) + 1 - sigmoid(b (lc - lr))
        discopop      z = b D, m = sigmoid(z / tau); -logsigmoid(z) (1 - m) + exp(-z) m arXiv 2406.08414
        sft           negative log-likelihood of the chosen completions, per token

    Defaults and names are TRL's, but for cdpo; a number that none of the chosen losses reads is refused. Several losses
    may be added up with weights (MPO is ``["sigmoid", "bco_pair", "sft"]`` with ``[0.8, 0.2, 1.0]``).

    Example:
        >>> import torch
        >>> from alignment import DPOLoss
        >>> from chunked_embed import Head
        >>> hidden = torch.randn(4, 6, 8, requires_grad=True)  # two pairs: both chosen ones, then both rejected ones
        >>> weight = torch.randn(11, 8, requires_grad=True)  # an LM head over 11 tokens
        >>> target = torch.randint(0, 11, (4, 6))
        >>> target[:, :2] = -100  # the prompt
        >>> loss = DPOLoss(beta=0.1, compiled=False)
        >>> out = loss(hidden, weight, target, ref_logps=torch.full((4,), -10.0))
        >>> out.loss.backward()
        >>> out.metrics["rewards/margins"].shape
        torch.Size([2])

        A ``Head`` says what else makes the logits; ``causal_lm`` has the model's.

        >>> policy, reference = (Head(h, weight, logit_scale=0.25) for h in (hidden, torch.randn(4, 6, 8)))
        >>> loss(policy, target=target, ref=reference).means["tokens/chosen"]
        tensor(4.)
    """

    beta: float = HELD
    loss_type: str | Sequence[str] = names("sigmoid", AF.DPO_LOSSES, "one name of the table, or several")
    loss_weights: Sequence[float] | None = weights("one weight a name, 1 each by default")
    label_smoothing: float = SMOOTHED
    f_divergence: str = choice(
        "reverse_kl",
        AF.F_DIVERGENCES,
        '"reverse_kl" (f\'(l) = l), "forward_kl" (1 - exp(-l)), "js" (log 2 + logsigmoid(l)) or "alpha" '
        "((exp((a - 1) l) - 1) / (a - 1)), of losses that see D alone (https://arxiv.org/abs/2309.16240)",
    )
    f_alpha: float = number(0.5, FINITE, 'the order a of "alpha"')
    ld_alpha: float | None = number(
        None,
        UNIT,
        "weighs the tokens of the longer completion beyond the length of the shorter one, in policy and reference "
        "alike (https://arxiv.org/abs/2409.06411); None is 1",
    )
    use_weighting: bool = flag(
        False,
        "multiply each pair's loss by WPO's weights ``w_c w_r``, ``w = exp(mean_t(logp_t - log sum_v p_v^2))``, "
        "detached (https://arxiv.org/abs/2406.11827); not with aot or aot_unpaired",
    )
    discopop_tau: float = number(0.05, POSITIVE, "temperature of discopop's gate")

    @staticmethod
    def readers(loss_types: Sequence[str], f_divergence: str) -> Mapping[str, str]:
        """Numbers that these losses do not read, and what would."""
        found = {}
        if AF.SMOOTHING.isdisjoint(loss_types):
            found["label_smoothing"] = f'loss_type "cdpo" (conservative DPO) or another of {sorted(AF.SMOOTHING)}'
        if "discopop" not in loss_types:
            found["discopop_tau"] = 'loss_type "discopop"'
        if f_divergence != "alpha":
            found["f_alpha"] = 'f_divergence="alpha"'
        return found

    @property
    def unread(self) -> Mapping[str, str]:
        return self.readers(self.loss_types, self.f_divergence)

    @property
    def loss_types(self) -> tuple[str, ...]:
        return (self.loss_type,) if isinstance(self.loss_type, str) else tuple(self.loss_type)

    def check(self) -> None:
        super().check()
        types = self.loss_types
        if self.loss_weights is not None and len(self.loss_weights) != len(types):
            got = len(self.loss_weights)
            raise ValueError(f"expected {len(types)} loss_weights, one for each loss_type, got {got}")
        if "exo_pair" in types and not self.label_smoothing > 0:
            raise ValueError("expected label_smoothing above 0 with exo_pair (the paper has 1e-3), got 0")
        if self.f_divergence != "reverse_kl" and not AF.DIFFERENCES.issuperset(types):
            raise ValueError(
                f"expected loss_type among {sorted(AF.DIFFERENCES)} with f_divergence={self.f_divergence!r}, "
                f"got {list(types)}"
            )
        if self.use_weighting and not AF.SORTING.isdisjoint(types):
            raise ValueError(f"expected no use_weighting with {sorted(AF.SORTING)}: sorting takes the pairs apart")

    @property
    def couples_batch(self) -> bool:
        return not AF.SORTING.isdisjoint(self.loss_types) or (self.use_weighting and "sft" in self.loss_types)

    @property
    def tail_weight(self) -> float | None:
        return self.ld_alpha

    @property
    def statistics(self) -> tuple[str, ...]:
        return ("log_sum_sq_probs",) if self.use_weighting else ()

    def pair_loss(self, x: PairScores) -> Tensor:
        types = self.loss_types
        nll = x.nll if "sft" in types else None
        if nll is not None and self.use_weighting:
            nll = nll.mean().expand_as(nll)  # the token mean is one number, which each pair's WPO weight multiplies
        terms = AF.Ratios(
            x.chosen_ratio,
            x.rejected_ratio,
            (x.chosen, x.rejected),
            (x.ref_chosen, x.ref_rejected),
            (x.chosen_tokens, x.rejected_tokens),
            self.f_divergence,
            self.f_alpha,
            nll,
        )
        values = [AF.DPO_LOSSES[name](terms, self) for name in types]
        if self.loss_weights is not None:
            values = [w * value for value, w in zip(values, self.loss_weights, strict=True)]
        total = values[0] if len(values) == 1 else torch.stack(values).sum(0)
        if not self.use_weighting:
            return total
        sums = *x.sums["logps"], *x.sums["log_sum_sq_probs"]
        return total * AF.wpo_weight(*sums, x.chosen_tokens, x.rejected_tokens)


class IRPOLoss(PairLoss):
    """Iterative reasoning preference optimisation: ``-logsigmoid(b (lc - lr)) - alpha c / nc``.

    https://arxiv.org/abs/2404.19733

    Example:
        >>> import torch
        >>> from alignment import IRPOLoss
        >>> hidden, head = torch.randn(4, 6, 8, requires_grad=True), torch.randn(11, 8)  # two pairs, chosen first
        >>> target = torch.randint(0, 11, (4, 6))
        >>> loss = IRPOLoss(beta=0.1, alpha=1.0)
        >>> out = loss(hidden, head, target, ref_logps=torch.full((4,), -10.0))
        >>> out.loss.backward()
    """

    beta: float = HELD
    alpha: float = number(1.0, NOT_NEGATIVE, "weight of the NLL per token")

    def pair_loss(self, x: PairScores) -> Tensor:
        return AF.irpo(x.chosen_ratio, x.rejected_ratio, x.chosen_mean, beta=self.beta, alpha=self.alpha)


class DPOPLoss(PairLoss):
    """DPO-positive: ``-logsigmoid(b (lc - lr - dpop_lambda relu(rc - c)))``.

    The penalty keeps the chosen completion from becoming less likely than under the reference.
    https://arxiv.org/abs/2402.13228

    Example:
        >>> import torch
        >>> from alignment import DPOPLoss
        >>> hidden, head = torch.randn(4, 6, 8, requires_grad=True), torch.randn(11, 8)  # two pairs, chosen first
        >>> target = torch.randint(0, 11, (4, 6))
        >>> loss = DPOPLoss(beta=0.1, dpop_lambda=50.0)
        >>> out = loss(hidden, head, target, ref_logps=torch.full((4,), -10.0))
        >>> out.loss.backward()
    """

    beta: float = HELD
    dpop_lambda: float = number(50.0, NOT_NEGATIVE, "weight of the penalty")

    def pair_loss(self, x: PairScores) -> Tensor:
        return AF.dpop(x.chosen_ratio, x.rejected_ratio, beta=self.beta, dpop_lambda=self.dpop_lambda)


class RDPOLoss(PairLoss):
    """Length-regularised DPO: ``-logsigmoid(b (lc - lr) + length_weight (nc - nr))``.

    https://arxiv.org/abs/2403.19159

    Example:
        >>> import torch
        >>> from alignment import RDPOLoss
        >>> hidden, head = torch.randn(4, 6, 8, requires_grad=True), torch.randn(11, 8)  # two pairs, chosen first
        >>> target = torch.randint(0, 11, (4, 6))
        >>> loss = RDPOLoss(beta=0.1, length_weight=0.01)
        >>> out = loss(hidden, head, target, ref_logps=torch.full((4,), -10.0))
        >>> out.loss.backward()
    """

    beta: float = HELD
    length_weight: float = number(0.01, FINITE, "of a token that the chosen completion is longer by")

    def pair_loss(self, x: PairScores) -> Tensor:
        vectors = x.chosen_ratio, x.rejected_ratio, x.chosen_tokens, x.rejected_tokens
        return AF.rdpo(*vectors, beta=self.beta, length_weight=self.length_weight)


class TDPOLoss(PairLoss):
    """Token-level DPO: ``-logsigmoid(b (lc - lr - d))``, where ``k = sum_t KL(reference || policy)`` and

        tdpo1  d = kr - kc
        tdpo2  d = kl_weight (kr - stop_gradient(kc))

    The divergence is over the whole vocabulary, so the reference must be given as hidden states and a head.
    https://arxiv.org/abs/2404.11999

    Example:
        >>> import torch
        >>> from alignment import TDPOLoss
        >>> from chunked_embed import Head
        >>> hidden, head = torch.randn(4, 6, 8, requires_grad=True), torch.randn(11, 8)  # two pairs, chosen first
        >>> target = torch.randint(0, 11, (4, 6))
        >>> policy, reference = Head(hidden, head), Head(torch.randn(4, 6, 8), head)
        >>> out = TDPOLoss(beta=0.1)(policy, target=target, ref=reference)
        >>> out.loss.backward()
        >>> out.metrics["kl/chosen"].shape
        torch.Size([2])
    """

    beta: float = HELD
    loss_type: str = choice("tdpo2", ("tdpo1", "tdpo2"), "a name of the table")
    kl_weight: float = number(0.5, NOT_NEGATIVE, "of tdpo2")
    needs_kl = True

    @property
    def unread(self) -> Mapping[str, str]:
        return {} if self.loss_type == "tdpo2" else {"kl_weight": 'loss_type="tdpo2"'}

    def pair_loss(self, x: PairScores) -> tuple[Tensor, Named]:
        chosen_kl, rejected_kl = x.sums["kl"]
        vectors = x.chosen_ratio, x.rejected_ratio, chosen_kl, rejected_kl
        loss = AF.tdpo(*vectors, beta=self.beta, loss_type=self.loss_type, kl_weight=self.kl_weight)
        return loss, {"kl/chosen": chosen_kl, "kl/rejected": rejected_kl}

    def rewards(self, x: PairScores) -> tuple[Tensor, Tensor]:
        chosen_kl, rejected_kl = x.sums["kl"]
        return self.beta * (x.chosen_ratio + chosen_kl), self.beta * (x.rejected_ratio + rejected_kl)


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

    Example:
        >>> import torch
        >>> from alignment import FPOLoss
        >>> hidden, head = torch.randn(4, 6, 8, requires_grad=True), torch.randn(11, 8)  # two pairs, chosen first
        >>> target = torch.randint(0, 11, (4, 6))
        >>> loss = FPOLoss(divergence="js")
        >>> out = loss(hidden, head, target)
        >>> out.loss.backward()
        >>> with_reference = loss(hidden, head, target, ref_logps=torch.full((4,), -10.0))
    """

    beta: float = number(2.0, POSITIVE, "scale of the scores")
    gamma: float = number(0.5, FINITE, "the margin between them")
    divergence: str = choice("js", AF.FPO_DIVERGENCES, "a name of the table")
    divergence_order: float = number(
        0.1, FINITE, 'a of "alpha"; not 0 or 1, where the formula has limits: "exo" and "dpo"'
    )
    takes_reference = None

    @property
    def unread(self) -> Mapping[str, str]:
        return {} if self.divergence == "alpha" else {"divergence_order": 'divergence="alpha"'}

    def check(self) -> None:
        super().check()
        if self.divergence_order in (0, 1):
            raise ValueError(f"expected divergence_order other than 0 and 1, got {self.divergence_order}")

    def logps(self, x: PairScores) -> tuple[Tensor, Tensor]:
        return (x.chosen, x.rejected) if x.has_reference else (x.chosen_mean, x.rejected_mean)

    def pair_loss(self, x: PairScores) -> Tensor:
        chosen, rejected = self.logps(x)
        return AF.fpo(
            chosen - x.ref_chosen,
            rejected - x.ref_rejected,
            divergence=self.divergence,
            beta=self.beta,
            gamma=self.gamma,
            divergence_order=self.divergence_order,
        )


# --- without a reference ---------------------------------------------------------------------------------------------


class CPOLoss(PairLoss):
    """Contrastive preference optimisation: a preference term plus ``alpha`` times the chosen NLL per token.

        sigmoid  -(1 - e) logsigmoid(b (c - r)) - e logsigmoid(-b (c - r))
        hinge    relu(1 - b (c - r))
        ipo      (c / nc - r / nr - 1 / (2 b))^2

    https://arxiv.org/abs/2401.08417. The NLL counts the tokens of ``nll_target``, by default the completions'.

    Example:
        >>> import torch
        >>> from alignment import CPOLoss
        >>> hidden, head = torch.randn(4, 6, 8, requires_grad=True), torch.randn(11, 8)  # two pairs, chosen first
        >>> target = torch.randint(0, 11, (4, 6))
        >>> loss = CPOLoss(beta=0.1, alpha=1.0)
        >>> out = loss(hidden, head, target)
        >>> out.loss.backward()
    """

    beta: float = MARGIN_SCALE
    loss_type: str = choice("sigmoid", ("sigmoid", "hinge", "ipo"), "a name of the table")
    alpha: float = number(1.0, NOT_NEGATIVE, "weight of the NLL per token")
    label_smoothing: float = SMOOTHED
    takes_reference = False
    takes_nll_target = True

    @property
    def unread(self) -> Mapping[str, str]:
        return {} if self.loss_type == "sigmoid" else {"label_smoothing": 'loss_type="sigmoid"'}

    @property
    def per_token(self) -> bool:
        return self.loss_type == "ipo"

    def pair_loss(self, x: PairScores) -> Tensor:
        chosen, rejected = self.logps(x)
        numbers = {"beta": self.beta, "label_smoothing": self.label_smoothing}
        return AF.cpo(chosen, rejected, loss_type=self.loss_type, **numbers) + self.alpha * x.nll


class SimPOLoss(PairLoss):
    """Simple preference optimisation: ``-logsigmoid(b (c / nc - r / nr) - gamma)``, with label smoothing as in DPO.

    No NLL: that is ``CPOSimPOLoss``. Defaults are TRL's; the paper has beta 2 to 2.5. https://arxiv.org/abs/2405.14734

    Example:
        >>> import torch
        >>> from alignment import SimPOLoss
        >>> hidden, head = torch.randn(4, 6, 8, requires_grad=True), torch.randn(11, 8)  # two pairs, chosen first
        >>> target = torch.randint(0, 11, (4, 6))
        >>> loss = SimPOLoss(beta=2.0, gamma=1.0)
        >>> out = loss(hidden, head, target)
        >>> out.loss.backward()
    """

    beta: float = MARGIN_SCALE
    gamma: float = MARGIN
    label_smoothing: float = SMOOTHED
    takes_reference = False
    per_token = True

    def pair_loss(self, x: PairScores) -> Tensor:
        numbers = {"beta": self.beta, "gamma": self.gamma, "label_smoothing": self.label_smoothing}
        return AF.simpo(x.chosen_mean, x.rejected_mean, **numbers)


class CPOSimPOLoss(PairLoss):
    """SimPO plus ``alpha`` times the chosen NLL per token (https://github.com/fe1ixxu/CPO_SIMPO).

    Example:
        >>> import torch
        >>> from alignment import CPOSimPOLoss
        >>> hidden, head = torch.randn(4, 6, 8, requires_grad=True), torch.randn(11, 8)  # two pairs, chosen first
        >>> target = torch.randint(0, 11, (4, 6))
        >>> loss = CPOSimPOLoss(beta=2.0, gamma=1.0, alpha=0.5)
        >>> out = loss(hidden, head, target)
        >>> out.loss.backward()
    """

    beta: float = MARGIN_SCALE
    gamma: float = MARGIN
    alpha: float = number(1.0, NOT_NEGATIVE, "weight of the NLL per token")
    label_smoothing: float = SMOOTHED
    takes_reference = False
    takes_nll_target = True
    per_token = True

    def pair_loss(self, x: PairScores) -> Tensor:
        numbers = {"beta": self.beta, "gamma": self.gamma, "label_smoothing": self.label_smoothing}
        return AF.simpo(x.chosen_mean, x.rejected_mean, **numbers) + self.alpha * x.nll


class AlphaPOLoss(PairLoss):
    """SimPO with another shape of reward: each mean log-probability x becomes ``(1 - exp(-a x)) / a``.

    ``a = reward_alpha``; zero is SimPO. With ``alpha``, the chosen NLL per token is added. https://arxiv.org/abs/2501.03884

    Example:
        >>> import torch
        >>> from alignment import AlphaPOLoss
        >>> hidden, head = torch.randn(4, 6, 8, requires_grad=True), torch.randn(11, 8)  # two pairs, chosen first
        >>> target = torch.randint(0, 11, (4, 6))
        >>> loss = AlphaPOLoss(beta=2.0, gamma=1.0, reward_alpha=0.25)
        >>> out = loss(hidden, head, target)
        >>> out.loss.backward()
    """

    beta: float = MARGIN_SCALE
    gamma: float = MARGIN
    reward_alpha: float = number(0.25, FINITE, "a of the rewards' shape")
    label_smoothing: float = SMOOTHED
    _: KW_ONLY
    alpha: float = number(0.0, NOT_NEGATIVE, "weight of the NLL per token")
    takes_reference = False
    takes_nll_target = True
    per_token = True

    def pair_loss(self, x: PairScores) -> Tensor:
        chosen, rejected = (AF.alphapo_reward(v, self.reward_alpha) for v in (x.chosen_mean, x.rejected_mean))
        numbers = {"beta": self.beta, "gamma": self.gamma, "label_smoothing": self.label_smoothing}
        return AF.simpo(chosen, rejected, **numbers) + self.alpha * x.nll

    def rewards(self, x: PairScores) -> tuple[Tensor, Tensor]:
        chosen, rejected = (self.beta * AF.alphapo_reward(v, self.reward_alpha) for v in self.logps(x))
        return chosen, rejected


class ORPOLoss(PairLoss):
    """Odds-ratio preference optimisation: the chosen NLL per token, minus ``b logsigmoid(log odds ratio)``.

    ``log odds ratio = (x - y) - (log(1 - exp x) - log(1 - exp y))``, ``x = c / nc``, ``y = r / nr``. In the paper and
    in TRL the NLL counts the prompt too: give ``nll_target`` for that. https://arxiv.org/abs/2403.07691

    Example:
        >>> import torch
        >>> from alignment import ORPOLoss
        >>> hidden, head = torch.randn(4, 6, 8, requires_grad=True), torch.randn(11, 8)  # two pairs, chosen first
        >>> target = torch.randint(0, 11, (4, 6))
        >>> loss = ORPOLoss(beta=0.1)
        >>> out = loss(hidden, head, target)
        >>> out.loss.backward()
        >>> out.metrics["log_odds_ratio"].shape
        torch.Size([2])
    """

    beta: float = number(0.1, POSITIVE, "weight of the preference")
    takes_reference = False
    takes_nll_target = True
    per_token = True

    def pair_loss(self, x: PairScores) -> tuple[Tensor, Named]:
        odds = AF.log_odds(x.chosen_mean, x.rejected_mean)
        metrics = {"log_odds_chosen": odds.detach(), "log_odds_ratio": F.logsigmoid(odds.detach())}
        return x.nll + AF.of_odds(odds, beta=self.beta), metrics


class SLiCLoss(PairLoss):
    """Sequence likelihood calibration: ``relu(delta - c + r) - alpha log p(y)``.

    y regularises: by default the chosen completion (``nll_target`` may choose other tokens of that sequence). For
    another sequence give ``sft_logps`` ``(B,)``, with its gradient, as from ``linear_logps``.
    https://arxiv.org/abs/2305.10425

    Example:
        >>> import torch
        >>> from alignment import SLiCLoss
        >>> hidden, head = torch.randn(4, 6, 8, requires_grad=True), torch.randn(11, 8)  # two pairs, chosen first
        >>> target = torch.randint(0, 11, (4, 6))
        >>> loss = SLiCLoss(delta=1.0, alpha=0.1)
        >>> out = loss(hidden, head, target)
        >>> out.loss.backward()
    """

    delta: float = number(1.0, FINITE, "the margin that is asked for")
    alpha: float = number(0.1, NOT_NEGATIVE, "weight of what regularises")
    takes_reference = False
    takes_nll_target = True
    takes_vectors = ("sft_logps",)

    def pair_loss(self, x: PairScores) -> Tensor:
        sft_logps = x.given.get("sft_logps", x.nll_logps)
        return AF.slic(x.chosen, x.rejected, sft_logps, delta=self.delta, alpha=self.alpha)


# --- triples ---------------------------------------------------------------------------------------------------------


class TPOLoss(TripleLoss):
    """Triple preference optimisation: a preference term plus ``alpha`` times the NLL per token of a gold completion.

        sigmoid  -(1 - e) logsigmoid(b (c - r)) - e logsigmoid(-b (c - r))
        hinge    relu(1 - b (c - r))
        ipo      (c / nc - r / nr - 1 / (2 b))^2
        tpo-l    z = b (c / nc - r / nr) - gamma; -(1 - e) logsigmoid(z) - e logsigmoid(-z)

    https://arxiv.org/abs/2405.16681; defaults are TRL's. The paper's reference is the gold completion: there is no
    reference model. With ``alpha=0`` there are no gold completions either, and a call has pairs.

    Example:
        >>> import torch
        >>> from alignment import TPOLoss
        >>> hidden, head = torch.randn(6, 5, 8, requires_grad=True), torch.randn(11, 8)  # chosen, rejected, gold
        >>> target = torch.randint(0, 11, (6, 5))
        >>> out = TPOLoss(beta=0.1, alpha=1.0)(hidden, head, target)
        >>> out.loss.backward()
        >>> out.metrics["rewards/margins"].shape
        torch.Size([2])
    """

    beta: float = number(0.01, POSITIVE, "scale of the margin")
    loss_type: str = choice("sigmoid", ("sigmoid", "hinge", "ipo", "tpo-l"), "a name of the table")
    alpha: float = number(1.0, NOT_NEGATIVE, "weight of the NLL per token of the gold completions")
    label_smoothing: float = SMOOTHED
    gamma: float = number(0.5, FINITE, "the margin that is asked for, of tpo-l")

    @staticmethod
    def readers(loss_type: str) -> Mapping[str, str]:
        """Numbers that such a loss does not read, and what would."""
        found = {} if loss_type == "tpo-l" else {"gamma": 'loss_type="tpo-l"'}
        if loss_type not in ("sigmoid", "tpo-l"):
            found["label_smoothing"] = 'loss_type="sigmoid" or "tpo-l"'
        return found

    @property
    def unread(self) -> Mapping[str, str]:
        return self.readers(self.loss_type)

    @property
    def takes_gold(self) -> bool:
        return self.alpha > 0

    @property
    def per_token(self) -> bool:
        return self.loss_type in ("ipo", "tpo-l")

    def pair_loss(self, x: PairScores) -> Tensor:
        chosen, rejected = self.logps(x)
        numbers = {"alpha": self.alpha, "label_smoothing": self.label_smoothing, "gamma": self.gamma}
        return AF.tpo(chosen, rejected, x.nll, loss_type=self.loss_type, beta=self.beta, **numbers)


# --- single sequences ------------------------------------------------------------------------------------------------


class KTOLoss(SequenceLoss):
    """Kahneman-Tversky optimisation, with ``l`` the log-ratio of policy and reference.

        kto                desirable 1 - sigmoid(b (l - kl)),  undesirable 1 - sigmoid(b (kl - l))
        apo_zero_unpaired  desirable 1 - sigmoid(b l),         undesirable sigmoid(b l)

    each times its class's weight; the mean over the sequences. https://arxiv.org/abs/2402.01306 and
    https://arxiv.org/abs/2408.06266; defaults are TRL's.

    A call takes ``kl`` () as well: the batch's reference point, ``functional.kto_kl`` of mismatched completions (a mean
    over all processes, where there are several). It has no gradient, and counts as zero where negative.
    "apo_zero_unpaired" does not read it.

    Example:
        >>> import torch
        >>> from alignment import KTOLoss
        >>> hidden, head = torch.randn(4, 6, 8, requires_grad=True), torch.randn(11, 8)
        >>> target, good = torch.randint(0, 11, (4, 6)), torch.tensor([True, False, False, True])
        >>> ref_logps, kl = torch.full((4,), -14.0), torch.tensor(0.2)
        >>> loss = KTOLoss(beta=0.1, desirable_weight=1.5)
        >>> out = loss(hidden, head, target, good, ref_logps=ref_logps, kl=kl)
        >>> out.loss.backward()
        >>> out.metrics["rewards"].shape
        torch.Size([4])
    """

    beta: float = HELD
    loss_type: str = choice("kto", ("kto", "apo_zero_unpaired"), "a name of the table")
    desirable_weight: float = number(1.0, NOT_NEGATIVE, "of the desirable sequences")
    undesirable_weight: float = number(1.0, NOT_NEGATIVE, "of the others")
    takes_numbers = ("kl",)

    @property
    def needed(self) -> Mapping[str, str]:
        return {"kl": "() as from alignment.functional.kto_kl"} if self.loss_type == "kto" else {}

    def sequence_loss(self, x: SequenceScores) -> tuple[Tensor, Named]:
        kl = x.given["kl"].clamp_min(0) if self.loss_type == "kto" else torch.zeros_like(x.ratio.detach())
        of_class = {"desirable_weight": self.desirable_weight, "undesirable_weight": self.undesirable_weight}
        return AF.kto(x.ratio, x.desirable, kl, beta=self.beta, **of_class), {"kl": kl}


class RunningMean(nn.Module):
    """The mean of all numbers seen in training, in float64 buffers, whatever the module is cast to."""

    running_mean: Tensor
    running_count: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("running_mean", "running_count"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Buffers move, but keep float64: a half-precision count stops at a few hundred."""
        kept = {name: getattr(self, name) for name in ("running_mean", "running_count")}
        super()._apply(fn, recurse)
        for name, value in kept.items():
            setattr(self, name, value.to(getattr(self, name).device))
        return self

    def seen(self, values: Tensor) -> Tensor:  # (B,) -> ()
        """The mean, these values of all processes included while training."""
        device = values.device
        if self.training:
            n: float | Tensor = len(values)
            total = values.double().sum()
            if distributed.is_available() and distributed.is_initialized():
                here = torch.stack([total, torch.full_like(total, len(values))])
                distributed.all_reduce(here)
                total, n = here.unbind(0)
            count = self.running_count.to(device) + n
            mean = self.running_mean.to(device)
            self.running_mean = mean + (total - n * mean) / count
            self.running_count = count
        return self.running_mean.to(device)


class BCOLoss(SequenceLoss, RunningMean):
    """Binary classifier optimisation: ``-logsigmoid(b l - delta)`` desirable, ``-logsigmoid(delta - b l)`` not.

    delta is the running mean of all rewards ``b l`` seen in training: a batch is counted first, and then delta is used,
    as in TRL's trainer. It lives in buffers (``running_mean``, ``running_count``; float64 whatever the module is cast
    to), so that it is saved with the module; evaluation leaves it alone. Where a process group is initialised, the
    batches of all processes are counted, and every process must call the loss. https://arxiv.org/abs/2404.04656

    A call takes ``sequence_weight`` (B,) as well, if you like: it multiplies each sequence's loss, and has no gradient
    (weights that match the undesirable prompts to the distribution of the desirable ones, say).

    Example:
        >>> import torch
        >>> from alignment import BCOLoss
        >>> hidden, head = torch.randn(4, 6, 8, requires_grad=True), torch.randn(11, 8)
        >>> target, good = torch.randint(0, 11, (4, 6)), torch.tensor([True, False, False, True])
        >>> loss = BCOLoss(beta=0.1)
        >>> loss(hidden, head, target, good, ref_logps=torch.full((4,), -14.0)).loss.backward()
        >>> loss.running_count  # of rewards seen so far
        tensor(4., dtype=torch.float64)
    """

    beta: float = HELD
    takes_vectors = ("sequence_weight",)
    couples_batch = True

    def sequence_loss(self, x: SequenceScores) -> tuple[Tensor, Named]:
        delta = self.seen(self.beta * x.ratio.detach()).to(x.ratio.dtype)
        loss = AF.bco(x.ratio, x.desirable, delta, beta=self.beta)
        if "sequence_weight" in x.given:
            loss = loss * x.given["sequence_weight"]
        return loss, {"delta": delta}
