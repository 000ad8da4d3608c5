"""How far a student's distribution over tokens is from its teacher's: pure functions of two rows of logits.

Each takes ``student`` and ``teacher`` logits ``(R, V)``, already divided by the temperature where there is one, and
numbers by keyword, and returns one value per row ``(R,)``. Below, ``q = softmax(student)`` is the student and
``p = softmax(teacher)`` the teacher. Numbers may be Python floats or 0-d tensors; where a formula has a limit of its
own (a generalised JSD at beta 0 or 1), a Python float at that value takes it.

``@divergence()`` enters a function in ``DIVERGENCES``, with what a loss must know about it. Defaults and ranges stand
in its signature, as fields: ``beta: Number = number(0.5, UNIT)``. A call of the function itself does not check them.

All work in log space from ``d = log p - log q``, in forms that vanish term by term where ``d`` does: equal rows give
zero, and close rows lose no digits to cancellation. Logits of ``-inf`` are tokens that cannot occur. Gradients are the
student's: the teacher is a constant.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import re
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from chunked_embed.checks import UNIT, Range
from chunked_embed.digits import excess, product
from chunked_embed.fields import Field, choice, flag, integer, number

Number: TypeAlias = "float | Tensor"  # a Python float, or a 0-d tensor

FLOOR = -1e30  # log-probability of what cannot occur: its exp is zero, and its differences are not NaN
TINY = 1e-30
BELOW_ONE = Range(0, 1 - 1e-6)
ORDERS = Range(0, 10)


# --- what a loss must know about a divergence ------------------------------------------------------------------------

C = TypeVar("C", bound=Callable[..., Tensor])
When: TypeAlias = "bool | tuple[str, Any]"
"""Always, never, or where an option has a value: ``("beta", 1.0)``."""


@dataclass(frozen=True)
class Divergence:
    """A divergence and what a loss must know about it. ``Divergence(my_function)`` does for most.

    The function's keyword arguments are the divergence's options. Their defaults may be fields: ``margin:
    Number = number(0.1, POSITIVE)`` from ``chunked_embed.fields`` says what a loss may set it to; a plain float is any
    finite number, and what is no float any value.

    Args:
        function: ``(student, teacher, **options) -> (R,)``, logits ``(R, V)``.
        tempered: it takes logits divided by the temperature (and ``scale_by_t2`` counts for it).
        needs_support: infinite or undefined where the teacher's probability is zero.
        takes_head: where it takes the teacher head's rows ``(V, H)``, too, as ``embedding``.
        not_all_zero: numbers of which one or more must not be zero.
        shared_vocabulary: the two rows are over the same tokens.
        tokenwise: a sum over tokens that may come in any order, some of them as one.
        workspace_bytes: bytes per output that it needs beside them (a sort: 12).
        averages: a mean over tokens: its gradient by a logit is about 1/V, which float16 must know.

    Example:
        >>> import torch
        >>> from distill import DistillLoss, Divergence
        >>> def overlap(student, teacher, *, power: float = 1.0):
        ...     return 1 - torch.minimum(student.softmax(1), teacher.softmax(1)).pow(power).sum(1)
        >>> entry = Divergence(overlap, needs_support=False)
        >>> entry.name, dict(entry.fields)["power"].default
        ('overlap', 1.0)
        >>> DistillLoss([(entry, 1.0, {"power": 1.0})]).overlap_power
        1.0
    """

    unchanging: ClassVar[bool] = True  # compiled steps need not compare it

    function: Callable[..., Tensor]
    tempered: bool = True
    needs_support: When = False
    takes_head: When = False
    not_all_zero: tuple[str, ...] = ()
    shared_vocabulary: bool = True
    tokenwise: bool = True
    workspace_bytes: int = 0
    averages: bool = False

    def __post_init__(self) -> None:
        fields_of(self.function)

    def __hash__(self) -> int:
        return hash(self.function)

    def __reduce__(self) -> Any:  # a copy is one of which steps may be compiled already
        if DIVERGENCES.get(self.name) is self:
            return by_name, (self.name,)
        return _known, self.traits

    @property
    def traits(self) -> tuple[Any, ...]:
        """What it was made of."""
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    def __call__(self, student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
        return self.function(student, teacher, **options)

    def __getitem__(self, option: str) -> Any:
        """An option as the field of a class: ``beta: float = DIVERGENCES["jsd"]["beta"]``."""
        return self.fields[option]

    @property
    def name(self) -> str:
        return name_of(self.function)

    @property
    def fields(self) -> Mapping[str, Field]:
        """Options by name."""
        found = dict(fields_of(self.function))
        if self.takes_head:
            del found["embedding"]
        return found

    @property
    def core(self) -> Callable[..., Tensor] | None:
        """The function of two ``LogProbs``, where it is one of distributions alone."""
        return getattr(self.function, "core", None)


def fields_of(function: Callable) -> dict[str, Field]:
    """A function's keyword arguments. Where a field stands for a default, the function gets the field's."""
    inner: Any = inspect.unwrap(function)
    known = getattr(inner, "fields", None)
    if known is not None:
        return known
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError:  # a builtin may have none
        return {}
    defaults = {
        p.name: p.default
        for i, p in enumerate(parameters)
        if (i > 1 or p.kind is p.KEYWORD_ONLY) and p.default is not p.empty
    }
    found = {name: _field(value) for name, value in defaults.items()}
    if any(isinstance(value, Field) for value in defaults.values()):
        inner.fields = found
        inner.__kwdefaults__ = {name: _plain(value) for name, value in (inner.__kwdefaults__ or {}).items()}
        inner.__defaults__ = tuple(_plain(value) for value in inner.__defaults__ or ())
    return found


def _field(default: Any) -> Field:
    if isinstance(default, Field):
        return default
    return number(default) if isinstance(default, float) else Field(default)


def _plain(default: Any) -> Any:
    return default.default if isinstance(default, Field) else default


def name_of(kind: Any) -> str:
    """Of a function or a divergence, as a part of names."""
    function = kind.function if isinstance(kind, Divergence) else kind
    name = getattr(function, "__name__", type(function).__name__)
    return re.sub(r"\W", "", name).strip("_") or "divergence"


DIVERGENCES: dict[str, Divergence] = {}
"""By name: what ``DistillLoss``, ``TopKLoss`` and the trainers take.

Example:
    >>> from distill import DIVERGENCES
    >>> sorted(DIVERGENCES)[:4]
    ['adaptive_kl', 'alpha_beta', 'cosine', 'earth_mover']
"""


def by_name(name: str) -> Divergence:
    """An entry of ``DIVERGENCES``; an unknown name is a ``ValueError`` with the known ones.

    Example:
        >>> from distill import divergences as D
        >>> D.by_name("jsd").name
        'jsd'
    """
    if name not in DIVERGENCES:
        raise ValueError(f"expected a divergence among {sorted(DIVERGENCES)}, or a function, got {name!r}")
    return DIVERGENCES[name]


_KNOWN: weakref.WeakValueDictionary[tuple, Divergence] = weakref.WeakValueDictionary()


def by_function(function: Callable[..., Tensor]) -> Divergence:
    return _known(*Divergence(function).traits)


def _known(*traits: Any) -> Divergence:
    """One for the same traits, as long as somebody uses it: a closure must not outlive its batch."""
    return _KNOWN.setdefault(traits, Divergence(*traits))


def divergence(**traits: Any) -> Callable[[C], C]:
    """Enter a function in ``DIVERGENCES``, by its name. ``traits`` are those of ``Divergence``.

    Example:
        >>> from distill import DistillLoss
        >>> from distill import divergences as D
        >>> @D.divergence()
        ... def brier(student, teacher):
        ...     return (student.softmax(1) - teacher.softmax(1)).square().sum(1)
        >>> DistillLoss([("brier", 1.0)], temperature=2.0).temperature
        2.0
    """

    def enter(function: C) -> C:
        DIVERGENCES[function.__name__] = Divergence(function, **traits)
        return function

    return enter


# --- two distributions -----------------------------------------------------------------------------------------------


class LogProbs(NamedTuple):
    """One side's distribution: its logits behind a softmax.

    Example:
        >>> import torch
        >>> from distill import divergences as D
        >>> @D.of_distributions
        ... def entropy(student: D.LogProbs, teacher: D.LogProbs):
        ...     return -(student.log.exp() * student.log).sum(1)
        >>> entropy(torch.zeros(1, 4), torch.zeros(1, 4))  # log 4
        tensor([1.3863])
    """

    logits: Tensor  # (R, V), ``FLOOR`` for -inf
    log: Tensor  # log-softmax
    p: Tensor  # probabilities; their gradient is not followed


def normalized(logits: Tensor) -> LogProbs:
    wide = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    finite = floored(wide)
    log = finite.log_softmax(-1).clamp_min(FLOOR)
    return LogProbs(finite, log, _exp(log.detach()))


def floored(logits: Tensor) -> Tensor:
    """``FLOOR`` for -inf, which is a token that cannot occur. NaN and inf stay and reach the gradient, where scalers of
    mixed precision look for them."""
    return torch.where(logits == -torch.inf, FLOOR, logits)


def _exp(x: Tensor) -> Tensor:
    """By ``exp2``, which a GPU has an instruction for: JSD spends a fifteenth of its time on the difference."""
    return torch.exp2(x * (1 / math.log(2)))


class OfLogits(Protocol):
    core: Callable[..., Tensor]

    def __call__(self, student: Tensor, teacher: Tensor, **numbers: Any) -> Tensor: ...


def of_distributions(function: Callable[..., Tensor]) -> OfLogits:
    """Make a function of two ``LogProbs`` one of two tensors of logits. Several terms may share the softmax: for those
    the function itself stays there, as ``core``.

    Example:
        >>> import torch
        >>> from distill import divergences as D
        >>> @D.of_distributions
        ... def brier(student: D.LogProbs, teacher: D.LogProbs):
        ...     return (student.log.exp() - teacher.p).square().sum(1)
        >>> brier(torch.zeros(2, 4), torch.zeros(2, 4))  # of logits, from outside
        tensor([0., 0.])
    """

    @functools.wraps(function)
    def of_logits(student: Tensor, teacher: Tensor, **numbers: Any) -> Tensor:
        _same_width(student, teacher)
        return function(normalized(student), normalized(teacher.detach()), **numbers)

    of_logits.core = function  # type: ignore[attr-defined]
    return of_logits  # type: ignore[return-value]


def _is(number: Number, value: float) -> bool:
    """Whether a Python number has this value; a tensor's is not looked at (a compiled step must not)."""
    return not isinstance(number, Tensor) and number == value


def _sum(values: Tensor, slope: Tensor, student: LogProbs, total: float | None = None) -> Tensor:
    """The sum over tokens of ``values`` ``(R, V)``, with ``slope`` as its derivative by ``log q``: ``(R,)``.

    By the logits, that is ``slope - q sum(slope)``. Where the sum is known, as ``total``, it needs no pass of its own
    over the logits. Stated rather than derived: the forms below that keep the digits of values have branches, whose
    derivatives would cost more than everything else together.
    """
    slope = slope.detach()
    if total is None:
        moves = slope * student.log
    else:
        moves = (slope - total * student.p) * (student.logits - student.logits.detach())
    moves = moves.sum(1)
    return values.detach().sum(1) + (moves - moves.detach())


def _over_mixture(q: LogProbs, p: LogProbs, beta: Number) -> tuple[Tensor, Tensor]:
    """``log(q/m)`` and ``log(p/m)`` for ``m = (1-beta) q + beta p``, 0 < beta < 1.

    Beyond the limit q is nothing beside p, or p beside q.
    """
    limit = 600.0 if q.log.dtype == torch.float64 else 80.0
    d = (p.log - q.log).clamp(-limit, limit)
    m_over_q = _log_mean(d, beta)
    return -m_over_q, d - m_over_q


def _log_mean(d: Tensor, beta: Number) -> Tensor:
    """``log(1 - beta + beta e^d)``, keeping the digits of a small ``d``."""
    if d.dtype == torch.float64:
        return torch.log1p(beta * torch.expm1(d))
    # On a GPU these two take longer than reading the logits does. A series does it as well where d is small: that of a
    # Bernoulli variable's cumulants, which converges below pi. Six terms are off by less than log's own error.
    b, rest = (x.to(d.dtype) if isinstance(x, Tensor) else x for x in (beta, 1 - beta))
    v, skew = b * rest, rest - b
    cumulants = b, v, v * skew, v * (1 - 6 * v), v * skew * (1 - 12 * v), v * (1 - 30 * v * (1 - 4 * v))
    series: Tensor | float = 0.0
    for n in range(len(cumulants), 0, -1):
        series = d * (cumulants[n - 1] * (1 / math.factorial(n)) + series)
    return torch.where(d.abs() < 0.35, series, torch.log(rest + b * _exp(d)))


# --- Kullback-Leibler and its relatives ------------------------------------------------------------------------------


@divergence()
@of_distributions
def kl(student: LogProbs, teacher: LogProbs) -> Tensor:
    """Forward KL: ``sum p log(p/q)``. Its gradient by the student's logits is ``q - p``.

    Example:
        >>> import torch
        >>> from distill import divergences as D
        >>> student, teacher = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[1.0, 0.5, -1.0]])
        >>> D.kl(student, teacher), D.kl(teacher, teacher)
        (tensor([0.2149]), tensor([0.]))
    """
    return _sum(excess(teacher.p, student.p, teacher.log - student.log), -teacher.p, student, total=-1.0)


@divergence(needs_support=True)
@of_distributions
def reverse_kl(student: LogProbs, teacher: LogProbs) -> Tensor:
    """Reverse KL: ``sum q log(q/p)``. Its gradient is ``q (log(q/p) - RKL)``. Infinite where p is zero and q is not.

    Example:
        >>> import torch
        >>> from distill import divergences as D
        >>> student, teacher = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[1.0, 0.5, -1.0]])
        >>> D.reverse_kl(student, teacher)
        tensor([0.1718])
    """
    r = student.log - teacher.log
    return _sum(excess(student.p, teacher.p, r), student.p * r, student)


@divergence(needs_support=("beta", 1.0))
@of_distributions
def jsd(student: LogProbs, teacher: LogProbs, *, beta: Number = number(0.5, UNIT, limits=(0.0, 1.0))) -> Tensor:
    """Generalised Jensen-Shannon: ``beta KL(p|m) + (1-beta) KL(q|m)``, ``m = (1-beta) q + beta p``.

    Its gradient is ``(1-beta) q (log(q/m) - KL(q|m))``. By the convention of GKD, beta 0 is the forward and beta 1 the
    reverse KL (the formula itself is zero there).

    Example:
        >>> import torch
        >>> from distill import divergences as D
        >>> student, teacher = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[1.0, 0.5, -1.0]])
        >>> D.jsd(student, teacher, beta=0.5)
        tensor([0.0466])
    """
    if _is(beta, 0.0):
        return kl.core(student, teacher)
    if _is(beta, 1.0):
        return reverse_kl.core(student, teacher)
    q_over_m, p_over_m = _over_mixture(student, teacher, beta)
    of_q = (1 - beta) * (student.p * q_over_m)
    return _sum(beta * (teacher.p * p_over_m) + of_q, of_q, student)


@divergence()
@of_distributions
def skew_kl(student: LogProbs, teacher: LogProbs, *, skew: Number = number(0.1, BELOW_ONE, limits=(0.0,))) -> Tensor:
    """Skew forward KL: ``KL(p | m)``, ``m = skew p + (1-skew) q``; skew 0 is the forward KL.

    Its gradient is ``q sum(c) - c`` with ``c = (1-skew) p q / m``.

    Example:
        >>> import torch
        >>> from distill import divergences as D
        >>> student, teacher = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[1.0, 0.5, -1.0]])
        >>> D.skew_kl(student, teacher, skew=0.1)
        tensor([0.1623])
    """
    if _is(skew, 0.0):
        return kl.core(student, teacher)
    q_over_m, p_over_m = _over_mixture(student, teacher, skew)
    m = skew * teacher.p + (1 - skew) * student.p
    return _sum(excess(teacher.p, m, p_over_m), (skew - 1) * teacher.p * q_over_m.exp(), student)


@divergence(needs_support=("skew", 0.0))
@of_distributions
def skew_reverse_kl(
    student: LogProbs,
    teacher: LogProbs,
    *,
    skew: Number = number(0.1, BELOW_ONE, limits=(0.0,)),
    detach_mixture: bool = flag(False),
) -> Tensor:
    """Skew reverse KL: ``KL(q | m)``, ``m = (1-skew) p + skew q``; skew 0 is the reverse KL.

    Its gradient is ``c - q sum(c)`` with ``c = q (log(q/m) - skew q/m)``; with ``detach_mixture`` the mixture counts as
    a constant: ``q (log(q/m) - KL(q|m))``.

    Example:
        >>> import torch
        >>> from distill import divergences as D
        >>> student, teacher = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[1.0, 0.5, -1.0]])
        >>> D.skew_reverse_kl(student, teacher, skew=0.1)
        tensor([0.1430])
    """
    if _is(skew, 0.0):
        return reverse_kl.core(student, teacher)
    q_over_m, _ = _over_mixture(student, teacher, 1 - skew)
    q = student.p
    values = excess(q, (1 - skew) * teacher.p + skew * q, q_over_m)
    # expm1: a multiple of q more or less changes nothing but the digits that are left.
    through_m = 0.0 if detach_mixture else skew * torch.expm1(q_over_m)
    return _sum(values, q * (q_over_m - through_m), student)


@divergence(needs_support=("ab_alpha", 0.0), not_all_zero=("ab_alpha", "ab_beta"))
@of_distributions
def alpha_beta(
    student: LogProbs,
    teacher: LogProbs,
    *,
    ab_alpha: Number = number(0.2, ORDERS, limits=(0.0,)),
    ab_beta: Number = number(0.7, ORDERS, limits=(0.0,)),
) -> Tensor:
    """alpha-beta divergence (arXiv 2505.04560), with ``a = ab_alpha``, ``b = ab_beta`` and ``s = a + b``.

    ``-1/(a b) sum [p^a q^b - (a/s) p^s - (b/s) q^s]``; for ``b = 0`` its limit ``1/a^2 sum [p^a log(p^a/q^a) - p^a +
    q^a]``, which at ``a = 1`` is forward KL; for ``a = 0`` the same with p and q exchanged, reverse KL.
    Its gradient is ``c - q sum(c)`` with ``c = (q^s - p^a q^b) / a``, or ``q^b log(q/p)`` for ``a = 0``.

    Example:
        >>> import torch
        >>> from distill import divergences as D
        >>> student, teacher = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[1.0, 0.5, -1.0]])
        >>> D.alpha_beta(student, teacher, ab_alpha=0.2, ab_beta=0.7)
        tensor([0.2051])
    """
    a, b, log_q, log_p = ab_alpha, ab_beta, student.log, teacher.log
    if _is(a, 0.0) and _is(b, 0.0):
        raise ValueError("expected ab_alpha or ab_beta above zero, got 0 for both")
    d = log_p - log_q
    if _is(a, 0.0):
        powered = (b * log_q).exp()
        return _sum(excess(powered, (b * log_p).exp(), -b * d) / (b * b), -powered * d, student)
    # Relative to the larger of p and q: exponents are not positive, and every term vanishes with d.
    s = a + b
    up = d > 0
    x = torch.where(up, -d, d)
    slope = torch.where(up, a * log_p + b * log_q, s * log_q).exp() * torch.expm1(a * x) * torch.where(up, 1, -1) / a
    if _is(b, 0.0):
        return _sum(excess((a * log_p).exp(), (a * log_q).exp(), a * d) / (a * a), slope, student)
    largest = (s * torch.where(up, log_p, log_q)).exp()
    e = torch.expm1(s * x)
    inner = torch.expm1(torch.where(up, b * x, a * x)) - torch.where(up, (b / s) * e, (a / s) * e)
    return _sum(largest * inner / (-a * b), slope, student)


@divergence(needs_support=True, workspace_bytes=12)
@of_distributions
def adaptive_kl(student: LogProbs, teacher: LogProbs, *, head: Number = number(0.5, UNIT)) -> Tensor:
    """Adaptive KL: ``w KL(p|q) + (1-w) KL(q|p)``, ``w = gap_head / (gap_head + gap_tail)``, detached.

    The head are the teacher's most probable tokens, up to and including the one that brings their mass to ``head``
    (tokens that tie with it too); a gap is ``sum |p - q|`` over those tokens.

    Example:
        >>> import torch
        >>> from distill import divergences as D
        >>> student, teacher = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[1.0, 0.5, -1.0]])
        >>> D.adaptive_kl(student, teacher, head=0.5)
        tensor([0.1934])
    """
    p, q = teacher.p, student.p
    gap = (p - q).abs()
    ranked = p.sort(1, descending=True).values
    before = ranked.cumsum(1) - ranked
    least = torch.where(before < head, ranked, torch.inf).amin(1, keepdim=True)
    in_head = torch.where(p >= least, gap, 0.0).sum(1, keepdim=True)
    total = gap.sum(1, keepdim=True)
    w = torch.where(total > 0, in_head / total.clamp_min(TINY), 0.5)
    d = teacher.log - student.log
    return _sum(w * excess(p, q, d) + (1 - w) * excess(q, p, -d), (w - 1) * q * d - w * p, student)


@divergence()
def taid(student: Tensor, teacher: Tensor, *, t: Number = number(0.4, UNIT, limits=(0.0, 1.0))) -> Tensor:
    """TAID: the cross-entropy of q to ``p_t = softmax((1-t) student.detach() + t teacher)``.

    Its gradient is ``q - p_t``. It is an entropy, not zero, where the two are equal.

    Example:
        >>> import torch
        >>> from distill import divergences as D
        >>> student, teacher = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[1.0, 0.5, -1.0]])
        >>> D.taid(student, teacher, t=0.4)
        tensor([0.7119])
    """
    _same_width(student, teacher)
    start, teacher = student.detach(), teacher.detach()
    target = start if _is(t, 0.0) else teacher if _is(t, 1.0) else (1 - t) * start + t * teacher
    p_t, q = normalized(target).p, normalized(student)
    return _sum(-p_t * q.log, -p_t, q, total=-1.0)


# --- distances -------------------------------------------------------------------------------------------------------


@divergence()
@of_distributions
def tvd(student: LogProbs, teacher: LogProbs) -> Tensor:
    """Total variation: ``1/2 sum |p - q|``.

    Example:
        >>> import torch
        >>> from distill import divergences as D
        >>> student, teacher = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[1.0, 0.5, -1.0]])
        >>> D.tvd(student, teacher)
        tensor([0.2697])
    """
    gap = student.p - teacher.p
    return _sum(0.5 * gap.abs(), 0.5 * student.p * gap.sign(), student)


@divergence(tempered=False, needs_support=True, averages=True)
def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """``1 - cos(student, teacher)`` of the logits themselves, as half the squared distance of their unit vectors.

    Example:
        >>> import torch
        >>> from distill import divergences as D
        >>> student, teacher = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[1.0, 0.5, -1.0]])
        >>> D.cosine(student, teacher)
        tensor([0.1056])
    """
    _same_width(student, teacher)
    return 0.5 * (F.normalize(student, dim=1) - F.normalize(teacher, dim=1)).square().sum(1)


@divergence(tempered=False, needs_support=True, averages=True)
def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the logits themselves: ``mean_V (student - teacher)^2``.

    Example:
        >>> import torch
        >>> from distill import divergences as D
        >>> student, teacher = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[1.0, 0.5, -1.0]])
        >>> D.mse(student, teacher)
        tensor([0.4167])
    """
    _same_width(student, teacher)
    return (student - teacher).square().mean(1)


@divergence(tokenwise=False)
def earth_mover(student: Tensor, teacher: Tensor, *, p: int = integer(1, 1, 2)) -> Tensor:
    """Earth mover's distance over token ids: ``sum_k |C_q(k) - C_p(k)| / (V-1)``, C the cumulative probabilities.

    ``p=2`` squares the differences instead: the Cramér distance. The order of token ids carries no meaning.

    Example:
        >>> import torch
        >>> from distill import divergences as D
        >>> student, teacher = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[1.0, 0.5, -1.0]])
        >>> D.earth_mover(student, teacher, p=1)
        tensor([0.1527])
    """
    _same_width(student, teacher)
    gap = (student.softmax(1) - teacher.softmax(1)).cumsum(1)
    return (gap.square() if p == 2 else gap.abs()).sum(1) / max(gap.shape[1] - 1, 1)


@divergence(takes_head=("kernel", "linear"), needs_support=("kernel", "linear"), tokenwise=False, workspace_bytes=4)
@of_distributions
def kvd(
    student: LogProbs,
    teacher: LogProbs,
    *,
    kernel: str = choice("linear", ("linear", "delta")),
    embedding: Tensor | None = None,
) -> Tensor:
    """Kernel distance (squared MMD): ``(q-p)' K (q-p)``.

    ``kernel="linear"``: ``K = E E'`` with the unit rows of ``embedding`` ``(V, H)``, so ``|(q-p) E|^2``: two more
    products, there and back, each in two where E is in half precision. ``kernel="delta"``: K is the identity, the Brier
    score between p and q. Its gradient is ``u - q sum(u)`` with ``u = 2 q K (q-p)``.

    Example:
        >>> import torch
        >>> from distill import divergences as D
        >>> student, teacher = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[1.0, 0.5, -1.0]])
        >>> D.kvd(student, teacher, kernel="delta")
        tensor([0.1288])
    """
    q = student.p
    gap = q - teacher.p
    if kernel == "delta":
        return _sum(gap.square(), 2 * q * gap, student)
    if embedding is None or embedding.shape[0] != gap.shape[1]:
        got = None if embedding is None else tuple(embedding.shape)
        raise ValueError(f"expected an embedding ({gap.shape[1]}, H) for the linear kernel, got {got}")
    wide = torch.promote_types(embedding.dtype, torch.float32)
    norm = torch.linalg.vector_norm(embedding, dim=1, dtype=wide).clamp_min(1e-12)
    moved = product(gap / norm, embedding)  # the terms of a sum that nearly cancel
    return _sum(moved.square(), 2 * q * product(moved, embedding, transposed=True) / norm, student)


@divergence(shared_vocabulary=False, workspace_bytes=24)
def uld(student: Tensor, teacher: Tensor) -> Tensor:
    """Universal logit distillation: ``sum |sort(q) - sort(p)|``, the shorter vocabulary padded with zeros.

    Blind to which token is which: for unlike tokenizers, not for a shared one.

    Example:
        >>> import torch
        >>> from distill import divergences as D
        >>> student, teacher = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[0.0, 2.0, -1.0, -5.0]])
        >>> D.uld(student, teacher)  # sorted, nearly alike
        tensor([0.0015])
    """
    sides = [z.softmax(1).sort(1, descending=True).values for z in (student, teacher)]
    width = max(side.shape[1] for side in sides)
    q, p = (F.pad(side, (0, width - side.shape[1])) for side in sides)
    return (q - p).abs().sum(1)


def ce(student: Tensor, target: Tensor) -> Tensor:  # (R, V), (R,) -> (R,)
    """The hard loss: cross-entropy with the labels, ``-log q[target]``.

    Example:
        >>> import torch
        >>> from distill import divergences as D
        >>> D.ce(torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([0]))
        tensor([0.1698])
    """
    return nll(normalized(student), target)


def nll(student: LogProbs, target: Tensor) -> Tensor:
    hit = torch.arange(student.log.shape[1], device=target.device) == target[:, None]
    return _sum(-torch.where(hit, student.log, 0), -hit.to(student.log.dtype), student, total=-1.0)


def _same_width(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape or student.dim() != 2:
        raise ValueError(
            f"expected two tensors of logits (R, V), got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
