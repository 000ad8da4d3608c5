"""How far a student's distribution over tokens is from its teacher's: pure functions of two rows of logits.

Each takes ``student`` and ``teacher`` logits ``(R, V)``, already divided by the temperature where there is one, and
numbers by keyword, and returns one value per row ``(R,)``. Below, ``q = softmax(student)`` is the student and
``p = softmax(teacher)`` the teacher. Numbers may be Python floats or 0-d tensors; where a formula has a limit of its
own (a generalised JSD at beta 0 or 1), a Python float at that value takes it.

``DIVERGENCES`` has them by name. All work in log space from ``d = log p - log q``, in forms that vanish term by term
where ``d`` does: equal rows give zero, and close rows lose no digits to cancellation. Logits of ``-inf`` are tokens
that cannot occur.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Number: TypeAlias = "float | Tensor"  # a Python float, or a 0-d tensor

FLOOR = -1e30  # log-probability of what cannot occur: its exp is zero, and its differences are not NaN
TINY = 1e-30


def log_probs(logits: Tensor) -> Tensor:  # (R, V) -> (R, V)
    """Log-softmax over the last dimension, finite where logits are ``-inf``."""
    wide = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    # Not log_softmax: inductor would write its shifted logits out, a tensor of size (R, V) for each side.
    return (wide - wide.logsumexp(-1, keepdim=True)).clamp_min(FLOOR)


def _pair(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if student.shape != teacher.shape or student.dim() != 2:
        raise ValueError(
            f"expected two tensors of logits (R, V), got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    return log_probs(student), log_probs(teacher)


def _is(number: Number, value: float) -> bool:
    """Whether a Python number has this value; a tensor's is not looked at (a compiled step must not)."""
    return not isinstance(number, Tensor) and number == value


def _over_mixture(log_q: Tensor, log_p: Tensor, beta: Number) -> tuple[Tensor, Tensor]:
    """``log(q/m)`` and ``log(p/m)`` for ``m = (1-beta) q + beta p``, 0 < beta < 1.

    ``m`` is taken relative to the larger of p and q, so that nothing overflows, and ``log1p(c expm1(-|d|))`` keeps the
    digits of a small ``d``. Both branches are smooth at ``d = 0``.
    """
    d = log_p - log_q
    up = d > 0
    e = torch.expm1(torch.where(up, -d, d))
    share = torch.where(up, (1 - beta) * e, beta * e).clamp_min(2**-24 - 1)  # a beta that rounds to 1 in float32
    log_m = torch.log1p(share)  # less the larger of log p and log q
    return torch.where(up, -d, 0.0) - log_m, torch.where(up, 0.0, d) - log_m


def _excess(a: Tensor, b: Tensor, r: Tensor) -> Tensor:
    """``a log(a/b) - a + b`` from ``r = log(a/b)``: its sum is KL(a|b) where a and b are distributions.

    No term is negative, and each is formed from ``r`` alone and the larger of a and b: of order ``r^2`` for a small
    ``r``, where ``a log(a/b)`` would be of order ``r`` and cancel in the sum.
    """
    up = r > 0
    x = torch.where(up, -r, r)
    e = torch.expm1(x)
    return torch.where(up, a * (e - x), b * (x * (1 + e) - e))


# --- Kullback-Leibler and its relatives ------------------------------------------------------------------------------


def kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Forward KL: ``sum p log(p/q)``. Its gradient by the student's logits is ``q - p``."""
    log_q, log_p = _pair(student, teacher)
    return _excess(log_p.exp(), log_q.exp(), log_p - log_q).sum(1)


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Reverse KL: ``sum q log(q/p)``. Its gradient is ``q (log(q/p) - RKL)``. Infinite where p is zero and q is not."""
    log_q, log_p = _pair(student, teacher)
    return _excess(log_q.exp(), log_p.exp(), log_q - log_p).sum(1)


def jsd(student: Tensor, teacher: Tensor, *, beta: Number = 0.5) -> Tensor:
    """Generalised Jensen-Shannon: ``beta KL(p|m) + (1-beta) KL(q|m)``, ``m = (1-beta) q + beta p``.

    Its gradient is ``(1-beta) q (log(q/m) - KL(q|m))``. By the convention of GKD, beta 0 is the forward and beta 1 the
    reverse KL (the formula itself is zero there).
    """
    if _is(beta, 0.0):
        return kl(student, teacher)
    if _is(beta, 1.0):
        return reverse_kl(student, teacher)
    log_q, log_p = _pair(student, teacher)
    q_over_m, p_over_m = _over_mixture(log_q, log_p, beta)
    return (beta * (log_p.exp() * p_over_m) + (1 - beta) * (log_q.exp() * q_over_m)).sum(1)


def skew_kl(student: Tensor, teacher: Tensor, *, skew: Number = 0.1) -> Tensor:
    """Skew forward KL: ``KL(p | skew p + (1-skew) q)``; skew 0 is the forward KL."""
    if _is(skew, 0.0):
        return kl(student, teacher)
    log_q, log_p = _pair(student, teacher)
    _, p_over_m = _over_mixture(log_q, log_p, skew)
    p = log_p.exp()
    return _excess(p, skew * p + (1 - skew) * log_q.exp(), p_over_m).sum(1)


def skew_reverse_kl(student: Tensor, teacher: Tensor, *, skew: Number = 0.1, detach_mixture: bool = False) -> Tensor:
    """Skew reverse KL: ``KL(q | (1-skew) p + skew q)``; skew 0 is the reverse KL.

    With ``detach_mixture`` the mixture counts as a constant: the gradient is ``q (log(q/m) - KL(q|m))``.
    """
    if _is(skew, 0.0):
        return reverse_kl(student, teacher)
    log_q, log_p = _pair(student, teacher)
    q_over_m, _ = _over_mixture(log_q, log_p, 1 - skew)
    q = log_q.exp()
    values = _excess(q, (1 - skew) * log_p.exp() + skew * q, q_over_m)
    if detach_mixture:
        slope = q * q_over_m.detach()
        values = values.detach() + (slope - slope.detach())
    return values.sum(1)


def alpha_beta(student: Tensor, teacher: Tensor, *, ab_alpha: Number = 0.2, ab_beta: Number = 0.7) -> Tensor:
    """alpha-beta divergence (arXiv 2505.04560), with ``a = ab_alpha``, ``b = ab_beta`` and ``s = a + b``.

    ``-1/(a b) sum [p^a q^b - (a/s) p^s - (b/s) q^s]``; for ``b = 0`` its limit ``1/a^2 sum [p^a log(p^a/q^a) - p^a +
    q^a]``, which at ``a = 1`` is forward KL; for ``a = 0`` the same with p and q exchanged, reverse KL.
    """
    log_q, log_p = _pair(student, teacher)
    a, b = ab_alpha, ab_beta
    if _is(a, 0.0) and _is(b, 0.0):
        raise ValueError("expected ab_alpha or ab_beta above zero, got 0 for both")
    d = log_p - log_q
    if _is(b, 0.0):
        return _excess((a * log_p).exp(), (a * log_q).exp(), a * d).sum(1) / (a * a)
    if _is(a, 0.0):
        return _excess((b * log_q).exp(), (b * log_p).exp(), -b * d).sum(1) / (b * b)
    # Relative to the larger of p^s and q^s: exponents are not positive, and every term vanishes with d.
    s = a + b
    up = d > 0
    x = torch.where(up, -d, d)
    largest = (s * torch.where(up, log_p, log_q)).exp()
    e = torch.expm1(s * x)
    inner = torch.expm1(torch.where(up, b * x, a * x)) - torch.where(up, (b / s) * e, (a / s) * e)
    return -(largest * inner).sum(1) / (a * b)


def adaptive_kl(student: Tensor, teacher: Tensor, *, head: Number = 0.5) -> Tensor:
    """Adaptive KL: ``w KL(p|q) + (1-w) KL(q|p)``, ``w = gap_head / (gap_head + gap_tail)``, detached.

    The head are the teacher's most probable tokens, up to and including the one that brings their mass to ``head``
    (tokens that tie with it too); a gap is ``sum |p - q|`` over those tokens.
    """
    log_q, log_p = _pair(student, teacher)
    p, q = log_p.exp(), log_q.exp()
    gap = (p - q).abs().detach()
    ranked = p.detach().sort(1, descending=True).values
    before = ranked.cumsum(1) - ranked
    least = torch.where(before < head, ranked, torch.inf).amin(1, keepdim=True)
    in_head = torch.where(p.detach() >= least, gap, 0.0).sum(1)
    total = gap.sum(1)
    w = torch.where(total > 0, in_head / total.clamp_min(TINY), 0.5)
    d = log_p - log_q
    return w * _excess(p, q, d).sum(1) + (1 - w) * _excess(q, p, -d).sum(1)


def taid(student: Tensor, teacher: Tensor, *, t: Number = 0.4) -> Tensor:
    """TAID: the cross-entropy of q to ``p_t = softmax((1-t) student.detach() + t teacher)``.

    Its gradient is ``q - p_t``. It is an entropy, not zero, where the two are equal.
    """
    log_q, _ = _pair(student, teacher)
    start = student.detach()
    target = start if _is(t, 0.0) else teacher if _is(t, 1.0) else (1 - t) * start + t * teacher
    return -(log_probs(target).exp() * log_q).sum(1)


# --- distances -------------------------------------------------------------------------------------------------------


def tvd(student: Tensor, teacher: Tensor) -> Tensor:
    """Total variation: ``1/2 sum |p - q|``."""
    log_q, log_p = _pair(student, teacher)
    return 0.5 * (log_q.exp() - log_p.exp()).abs().sum(1)


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """``1 - cos(student, teacher)`` of the logits themselves, as half the squared distance of their unit vectors."""
    _same_width(student, teacher)
    return 0.5 * (F.normalize(student, dim=1) - F.normalize(teacher, dim=1)).square().sum(1)


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the logits themselves: ``mean_V (student - teacher)^2``."""
    _same_width(student, teacher)
    return (student - teacher).square().mean(1)


def earth_mover(student: Tensor, teacher: Tensor, *, p: int = 1) -> Tensor:
    """Earth mover's distance over token ids: ``sum_k |C_q(k) - C_p(k)| / (V-1)``, C the cumulative probabilities.

    ``p=2`` squares the differences instead: the Cramér distance. The order of token ids carries no meaning.
    """
    log_q, log_p = _pair(student, teacher)
    gap = (log_q.exp() - log_p.exp()).cumsum(1)
    return (gap.square() if p == 2 else gap.abs()).sum(1) / max(gap.shape[1] - 1, 1)


def kvd(student: Tensor, teacher: Tensor, *, kernel: str = "linear", embedding: Tensor | None = None) -> Tensor:
    """Kernel distance (squared MMD): ``(q-p)' K (q-p)``.

    ``kernel="linear"``: ``K = E E'`` with the unit rows of ``embedding`` ``(V, H)``, so ``|(q-p) E|^2``: two more
    products, there and back. ``kernel="delta"``: K is the identity, the Brier score between p and q.
    """
    log_q, log_p = _pair(student, teacher)
    gap = log_q.exp() - log_p.exp()
    if kernel == "delta":
        return gap.square().sum(1)
    if embedding is None or embedding.shape[0] != gap.shape[1]:
        got = None if embedding is None else tuple(embedding.shape)
        raise ValueError(f"expected an embedding ({gap.shape[1]}, H) for the linear kernel, got {got}")
    wide = torch.promote_types(embedding.dtype, torch.float32)
    norm = torch.linalg.vector_norm(embedding, dim=1, dtype=wide).clamp_min(1e-12)
    moved = (gap / norm).to(embedding.dtype) @ embedding
    return moved.to(gap.dtype).square().sum(1)


def uld(student: Tensor, teacher: Tensor) -> Tensor:
    """Universal logit distillation: ``sum |sort(q) - sort(p)|``, the shorter vocabulary padded with zeros.

    Blind to which token is which: for unlike tokenizers, not for a shared one.
    """
    sides = [log_probs(z).exp().sort(1, descending=True).values for z in (student, teacher)]
    width = max(side.shape[1] for side in sides)
    q, p = (F.pad(side, (0, width - side.shape[1])) for side in sides)
    return (q - p).abs().sum(1)


def ce(student: Tensor, target: Tensor) -> Tensor:  # (R, V), (R,) -> (R,)
    """The hard loss: cross-entropy with the labels, ``-log q[target]``."""
    index = torch.arange(student.shape[1], device=student.device)
    at_target = torch.where(index == target[:, None], student, 0).sum(1)
    return student.logsumexp(1) - at_target


def _same_width(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape or student.dim() != 2:
        raise ValueError(
            f"expected two tensors of logits (R, V), got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )


# --- by name ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Divergence:
    """A divergence and what a loss must know about it. ``Divergence(my_function)`` does for most.

    Keyword arguments of the function whose defaults are floats are numbers of the loss, which change without a new
    compilation; those with a string, boolean or integer default are options, each compiled for itself.

    Args:
        function: ``(student, teacher, **numbers) -> (R,)``, logits ``(R, V)``.
        tempered: it takes logits divided by the temperature (and ``scale_by_t2`` counts for it).
        limits: values of a number at which the function takes another formula, (name, value) pairs.
        bounds: name -> the least and the largest value of a number.
        choices: name -> the values that an option may have.
        needs_support: infinite or undefined where the teacher's probability is zero: True, or at which (name, value).
        shared_vocabulary: the two rows are over the same tokens.
        workspace_bytes: bytes per output that it needs beside them (a sort: 12).
    """

    function: Callable[..., Tensor]
    tempered: bool = True
    limits: tuple[tuple[str, float], ...] = ()
    bounds: dict[str, tuple[float, float]] = field(default_factory=dict)
    choices: dict[str, tuple] = field(default_factory=dict)
    needs_support: bool | tuple[str, Any] = False
    shared_vocabulary: bool = True
    workspace_bytes: int = 0

    def __hash__(self) -> int:  # part of the key of a compiled step
        return hash(self.function)

    @cached_property
    def keywords(self) -> dict[str, Any]:
        """Keyword arguments and their defaults."""
        given = inspect.signature(self.function).parameters.values()
        empty = inspect.Parameter.empty
        return {
            p.name: p.default
            for i, p in enumerate(given)
            if (i > 1 or p.kind is p.KEYWORD_ONLY) and p.default is not empty
        }

    def __call__(self, student: Tensor, teacher: Tensor, **numbers: Any) -> Tensor:
        return self.function(student, teacher, **numbers)


UNIT = (0.0, 1.0)
BELOW_ONE = (0.0, 1.0 - 1e-6)

DIVERGENCES: dict[str, Divergence] = {
    "kl": Divergence(kl),
    "reverse_kl": Divergence(reverse_kl, needs_support=True),
    "jsd": Divergence(jsd, limits=(("beta", 0.0), ("beta", 1.0)), bounds={"beta": UNIT}, needs_support=("beta", 1.0)),
    "skew_kl": Divergence(skew_kl, limits=(("skew", 0.0),), bounds={"skew": BELOW_ONE}),
    "skew_reverse_kl": Divergence(
        skew_reverse_kl, limits=(("skew", 0.0),), bounds={"skew": BELOW_ONE}, needs_support=("skew", 0.0)
    ),
    "tvd": Divergence(tvd),
    "alpha_beta": Divergence(
        alpha_beta,
        limits=(("ab_alpha", 0.0), ("ab_beta", 0.0)),
        bounds={"ab_alpha": (0.0, 10.0), "ab_beta": (0.0, 10.0)},
        needs_support=("ab_alpha", 0.0),
    ),
    "adaptive_kl": Divergence(adaptive_kl, bounds={"head": UNIT}, needs_support=True, workspace_bytes=12),
    "taid": Divergence(taid, limits=(("t", 0.0), ("t", 1.0)), bounds={"t": UNIT}),
    "cosine": Divergence(cosine, tempered=False, needs_support=True),
    "mse": Divergence(mse, tempered=False, needs_support=True),
    "earth_mover": Divergence(earth_mover, choices={"p": (1, 2)}),
    "kvd": Divergence(kvd, choices={"kernel": ("linear", "delta")}, needs_support=("kernel", "linear")),
    "uld": Divergence(uld, shared_vocabulary=False, workspace_bytes=24),
}
