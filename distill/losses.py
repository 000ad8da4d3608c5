"""Distillation losses: a divergence between a teacher's and a student's logits, without holding either's.

``DistillationLoss`` is what they share: the call, ignored tokens, temperature, vocabularies, the hard loss. A loss adds
a function (``divergences.py``) and a small class.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, ClassVar, NamedTuple, TypeAlias, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from chunked_embed import ChunkPlan, FlexChunkLoss, LossOutput, Projection

from .divergences import DIVERGENCES, FLOOR, Divergence, LogProbs, floored, nll, normalized

Extra = tuple[tuple[Tensor, Tensor], ...]
REPORTS = ("student_entropy", "teacher_agreement")
POSITIVE = ("temperature", "student_logit_scale", "teacher_logit_scale", "student_softcap", "teacher_softcap")


class Term(NamedTuple):
    """One divergence of a loss, and the attributes of the loss that hold its weight and numbers."""

    label: str  # of its metric
    divergence: Divergence
    numbers: tuple[tuple[str, str], ...]  # keyword -> attribute
    options: tuple[tuple[str, Any], ...]  # keyword -> value, static
    weight: str | None = None


def as_report(report: Sequence[str] | str | None) -> tuple[str, ...]:
    return (report,) if isinstance(report, str) else tuple(report or ())


def make_term(
    label: str, divergence: str | Divergence | Callable, keywords: Mapping[str, Any], prefix: str = ""
) -> tuple[Term, dict[str, float]]:
    """A term, and the numbers that the loss keeps for it, by attribute."""
    if isinstance(divergence, str):
        if divergence not in DIVERGENCES:
            raise ValueError(f"expected a divergence among {sorted(DIVERGENCES)}, or a function, got {divergence!r}")
        divergence = DIVERGENCES[divergence]
    elif not isinstance(divergence, Divergence):
        if not callable(divergence):
            raise TypeError(f"expected the name of a divergence or a function, got {divergence!r}")
        divergence = Divergence(divergence)
    known = divergence.keywords
    if unknown := sorted(set(keywords) - set(known)):
        raise TypeError(f"expected options of {label!r} among {sorted(known)}, got {unknown}")
    given = {name: value for name, value in (known | dict(keywords)).items() if value is not None}
    numbers = {name: value for name, value in given.items() if isinstance(known[name], float)}
    options = tuple((name, value) for name, value in given.items() if name not in numbers)
    for name, allowed in divergence.choices.items():
        if given.get(name) not in allowed:
            raise ValueError(f"expected {name} of {label!r} to be one of {list(allowed)}, got {given.get(name)!r}")
    term = Term(label, divergence, tuple((name, prefix + name) for name in numbers), options)
    return term, {prefix + name: value for name, value in numbers.items()}


class DistillationLoss(FlexChunkLoss):
    """What the distillation losses share.

        loss = sum over valid tokens of (weight_soft * D(student, teacher) + weight_hard * CE(student, target)) / tokens

    A subclass hands its terms to ``__init__``; see ``JSDLoss``. All of its numbers (temperature, weights, beta, ...)
    are plain attributes: setting one counts from the next call on, and compiles nothing anew. (Switching
    ``weight_hard`` on or off does, once, and so does reaching a value where a formula has a limit of its own, or a
    temperature or logit scale of one.)

    Args:
        temperature: of both softmaxes in D; cosine similarity, squared error and the hard loss do without.
        weight_hard: of the cross-entropy with the labels, from the student's logits at temperature one.
        weight_soft: of the divergence. With zero the teacher is not looked at, and may be None.
        ignore_index: tokens with this target are dropped before any product.
        scale_by_t2: multiply what takes a temperature by its square, so that gradients keep their size (Hinton's
            convention; TRL, Liger and DistiLLM do not).
        student_logit_scale, student_softcap: logits are ``scale * x``, then ``softcap * tanh(. / softcap)``.
        teacher_logit_scale, teacher_softcap: likewise.
        vocabulary: what happens where one head has more rows than the other (padding, as a rule). "cut" compares the
            two on the ids that both have, each with its softmax over those. "mask" lets the teacher give probability
            zero to what it lacks: a longer student then pays for probability out there (not for divergences that are
            infinite where the teacher is zero). "refuse" raises. A longer teacher is cut in any case (logits of -inf
            would be the same), and the hard loss always sees the student's whole vocabulary.
        report: further metrics, "student_entropy" and "teacher_agreement" (whether their top tokens are the same).
        float32_outputs: products of half-precision operands write float32 logits. Without it a divergence between
            close distributions is off by about a percent, in less memory.
        chunk_size, max_chunk_bytes, compiled: as for ``FlexChunkLoss``.
    """

    def __init__(
        self,
        terms: Sequence[Term],
        attributes: Mapping[str, Any],
        temperature: float = 1.0,
        weight_hard: float = 0.0,
        weight_soft: float = 1.0,
        *,
        ignore_index: int = -100,
        scale_by_t2: bool = False,
        student_logit_scale: float = 1.0,
        student_softcap: float | None = None,
        teacher_logit_scale: float = 1.0,
        teacher_softcap: float | None = None,
        vocabulary: str = "cut",
        report: Sequence[str] | str | None = (),
        float32_outputs: bool = True,
        **options: Any,
    ) -> None:
        for name in ("loss_fn", "score_fn"):
            if name in options:
                raise TypeError(f"expected no {name}: a divergence of your own goes to DistillLoss(loss_fn=...)")
        super().__init__(**options)
        self.temperature = temperature
        self.weight_hard = weight_hard
        self.weight_soft = weight_soft
        self.student_logit_scale = student_logit_scale
        self.student_softcap = student_softcap
        self.teacher_logit_scale = teacher_logit_scale
        self.teacher_softcap = teacher_softcap
        self.ignore_index = ignore_index
        self.scale_by_t2 = bool(scale_by_t2)
        self.vocabulary = vocabulary
        self.report = as_report(report)
        self.float32_outputs = bool(float32_outputs)
        self.terms = tuple(terms)
        self.workspace_bytes = max((term.divergence.workspace_bytes for term in self.terms), default=0)
        if vocabulary not in ("cut", "mask", "refuse"):
            raise ValueError(f'expected vocabulary to be "cut", "mask" or "refuse", got {vocabulary!r}')
        if unknown := [name for name in self.report if name not in REPORTS]:
            raise ValueError(f"expected report among {list(REPORTS)}, got {unknown}")
        if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
            raise TypeError(f"expected ignore_index to be an integer, got {ignore_index!r}")
        for name, value in attributes.items():
            if hasattr(self, name):
                raise ValueError(f"expected terms whose numbers have names of their own, got {name!r} again")
            setattr(self, name, value)
        self._settle()

    # --- the call ---

    def forward(  # type: ignore[override]  # the call of this family, in front of the engine's
        self,
        student_hidden: Tensor,  # (..., Hs)
        student_weight: Tensor,  # (Vs, Hs)
        teacher_hidden: Tensor | None,  # (..., Ht)
        teacher_weight: Tensor | None,  # (Vt, Ht)
        target: Tensor | None = None,  # (...)
        student_bias: Tensor | None = None,  # (Vs,)
        teacher_bias: Tensor | None = None,  # (Vt,)
        *,
        num_items: float | Tensor | None = None,
        student_extra: Extra = (),
        teacher_extra: Extra = (),
    ) -> LossOutput:
        """The mean over valid tokens; gradients for the student's tensors that require one, none for the teacher's.

        Args:
            target: labels, aligned with the hidden states; tokens with ``ignore_index`` take no part. Needed for a
                hard loss; without one it may be any mask of that form, or None: every token counts.
            num_items: divide the sum over tokens by this instead of the valid tokens of this batch: those of all
                batches whose gradients are accumulated.
            student_extra, teacher_extra: further ``(input, weight)`` terms of the logits, such as a LoRA adapter on the
                head.

        Returns:
            The loss, and ``metrics``: the value of each term for every token, unweighted, zero where ignored.
        """
        call = self._call(
            student_hidden, student_weight, teacher_hidden, teacher_weight, target, student_bias, teacher_bias,
            num_items=num_items, student_extra=student_extra, teacher_extra=teacher_extra,
        )  # fmt: skip
        return super().forward(**call)

    def plan(self, *arguments: Any, **keywords: Any) -> ChunkPlan:
        """What ``forward`` with the same arguments will do."""
        return super().plan(**self._call(*arguments, **keywords))

    def _call(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor | None,
        teacher_weight: Tensor | None,
        target: Tensor | None = None,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        *,
        num_items: float | Tensor | None = None,
        student_extra: Extra = (),
        teacher_extra: Extra = (),
    ) -> dict[str, Any]:
        """The arguments of ``FlexChunkLoss.forward``."""
        self._settle()
        if self.soft and not (isinstance(teacher_hidden, Tensor) and isinstance(teacher_weight, Tensor)):
            got = type(teacher_hidden).__name__, type(teacher_weight).__name__
            raise TypeError(f"expected tensors teacher_hidden and teacher_weight, got {got}")
        rows = len(teacher_weight) if self.soft and teacher_weight is not None else None
        call = self._student(student_hidden, student_weight, target, student_bias, num_items, student_extra, rows)
        if teacher_hidden is None or teacher_weight is None or not self.soft:
            return call
        if teacher_bias is not None:
            if teacher_bias.shape != teacher_weight.shape[:1]:
                expected = len(teacher_weight)
                raise ValueError(f"expected teacher_bias of shape ({expected},), got {tuple(teacher_bias.shape)}")
            teacher_bias = teacher_bias.detach()
        weight, width = teacher_weight.detach(), self._compared(student_weight.shape[0], teacher_weight.shape[0])
        if width < len(weight) and all(term.divergence.shared_vocabulary for term in self.terms):
            weight = weight[:width]
            teacher_bias = None if teacher_bias is None else teacher_bias[:width]
            teacher_extra = tuple((x, w[:width]) for x, w in teacher_extra)
        extra = tuple((x.detach(), w.detach()) for x, w in teacher_extra)
        call["projections"]["teacher"] = Projection(teacher_hidden.detach(), weight, teacher_bias, extra)
        if any(("kernel", "linear") in term.options for term in self.terms):
            call["columns"] = {"embedding": weight}
        return call

    def _student(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor | None,
        bias: Tensor | None,
        num_items: float | Tensor | None,
        extra: Extra,
        width: int | None = None,
    ) -> dict[str, Any]:
        """The student's part of the call: its projection, the labels, and the weight of every token.

        ``width`` is the teacher's, where there is one.
        """
        for name, given in (("student_hidden", hidden), ("student_weight", weight)):
            if not isinstance(given, Tensor):
                raise TypeError(f"expected {name} to be a tensor, got {type(given).__name__}")
        if weight.dim() != 2:
            raise ValueError(f"expected student_weight of shape (V, H), got {tuple(weight.shape)}")
        leading = hidden.shape[:-1]
        call: dict[str, Any] = {"projections": {"student": Projection(hidden, weight, bias, tuple(extra))}, "rows": {}}
        if target is None:
            if self.hard:
                raise ValueError("expected a target: weight_hard is not zero")
            valid = torch.ones(leading, dtype=torch.bool, device=hidden.device)
        else:
            if not isinstance(target, Tensor):
                raise TypeError(f"expected target to be a tensor, got {type(target).__name__}")
            if target.is_floating_point() or target.dtype == torch.bool:
                raise TypeError(f"expected target to hold integers, got {target.dtype}")
            if target.shape != leading or target.device != hidden.device:
                raise ValueError(
                    f"expected target of shape {tuple(leading)} on {hidden.device}, "
                    f"got {tuple(target.shape)} on {target.device}"
                )
            valid = target != self.ignore_index
        if self.hard and target is not None:
            call["rows"]["target"] = target
            # The engine checks labels against the narrower head, in the one transfer that it makes anyway.
            self.index_rows = ("target",) if width is None or width >= len(weight) else ()
            if not self.index_rows:
                outside = int((valid & ((target < 0) | (target >= len(weight)))).sum())
                if outside:
                    raise ValueError(f"expected target in [0, {len(weight)}), got {outside} outside")
        else:
            self.index_rows = ()
        used = valid.to(torch.float64 if hidden.dtype == torch.float64 else torch.float32)
        call["row_weight"] = used / (used.sum().clamp_min(1) if num_items is None else _items(num_items, used))
        return call

    def _compared(self, student: int, teacher: int) -> int:
        """How many ids the two are compared on."""
        if student == teacher:
            return student
        if self.vocabulary == "refuse":
            raise ValueError(f"expected vocabularies of one size, got {student} (student) and {teacher} (teacher)")
        if self.vocabulary == "mask" and student > teacher:
            for term in self.terms:
                if self._needs_support(term):
                    raise ValueError(
                        f'expected vocabulary="cut" for {term.label!r}, which is not defined where the teacher\'s '
                        f"probability is zero, for a student of {student} tokens and a teacher of {teacher}"
                    )
            return student
        return min(student, teacher)

    def _needs_support(self, term: Term) -> bool:
        needs = term.divergence.needs_support
        if isinstance(needs, bool):
            return needs
        values = {name: getattr(self, attribute) for name, attribute in term.numbers} | dict(term.options)
        return values[needs[0]] == needs[1]

    def _settle(self) -> None:
        """Check the numbers of this call, and fix what they imply for the compiled step."""
        for name in POSITIVE:
            value = getattr(self, name)
            if value is None and name.endswith("softcap"):
                continue
            if not _finite(value) or value <= 0:
                raise ValueError(f"expected {name} to be a positive, finite number, got {value!r}")
        weights = ["weight_hard", "weight_soft", *(term.weight for term in self.terms if term.weight)]
        numbers = [(name, attribute, term) for term in self.terms for name, attribute in term.numbers]
        for attribute in [*weights, *(attribute for _, attribute, _ in numbers)]:
            if not _finite(getattr(self, attribute)):
                raise ValueError(f"expected {attribute} to be a finite number, got {getattr(self, attribute)!r}")
        pinned = []
        for name, attribute, term in numbers:
            value = float(getattr(self, attribute))
            least, most = term.divergence.bounds.get(name, (-math.inf, math.inf))
            if not least <= value <= most:
                raise ValueError(f"expected {attribute} in [{least:g}, {most:g}], got {value!r}")
            if (name, value) in term.divergence.limits:
                pinned.append((attribute, value))
        for term in self.terms:
            some = [attribute for name, attribute in term.numbers if name in term.divergence.not_all_zero]
            if some and not any(getattr(self, attribute) for attribute in some):
                raise ValueError(f"expected {' or '.join(some)} above zero, got 0 for all")
        for name in ("temperature", "student_logit_scale", "teacher_logit_scale"):
            if getattr(self, name) == 1:  # all terms then share a softmax
                pinned.append((name, 1.0))
        self.pinned = tuple(pinned)
        self.hard = self.weight_hard != 0
        self.soft = bool(self.terms) and self.weight_soft != 0

    @property
    def numbers(self) -> tuple[str, ...]:
        """The attributes that may change from call to call, by a schedule for one. Logit scales and soft-caps are the
        models'."""
        of_terms = [attribute for term in self.terms for _, attribute in term.numbers]
        weights = [term.weight for term in self.terms if term.weight]
        return ("temperature", "weight_hard", "weight_soft", *weights, *of_terms)

    # --- a chunk ---

    def loss_fn(self, outputs: Any, rows: Any, hp: Any, columns: Any = None) -> Any:
        student = self._logits("student", outputs, hp)
        total, metrics = student.z.new_zeros(student.z.shape[0]), {}
        sides = self._sides(student, outputs, rows, hp) if self.soft else {}
        for term in self.terms if self.soft else ():
            value = self._term(term, sides, hp, columns)
            if not isinstance(value, Tensor) or value.shape != total.shape:
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"expected {term.label!r} to give a value a row, {tuple(total.shape)}, got {got}")
            metrics[term.label] = value
            if term.divergence.tempered and self.scale_by_t2:
                value = value * hp.temperature**2
            weight = hp.weight_soft if term.weight is None else hp.weight_soft * getattr(hp, term.weight)
            total = total + weight * value
        if self.soft and "teacher_agreement" in self.report:
            ours, theirs = sides["common"]
            metrics["teacher_agreement"] = (ours.z.detach().argmax(1) == theirs.z.argmax(1)).to(total.dtype)
        if self.hard:
            metrics["ce"] = nll(student.softmax(), rows["target"])
            total = total + hp.weight_hard * metrics["ce"]
        if "student_entropy" in self.report:
            q = student.softmax()
            metrics["student_entropy"] = -(q.p * q.log.detach()).sum(1)
        return total, metrics

    def _logits(self, side: str, outputs: Any, hp: Any) -> Logits:
        z, name = outputs[side], f"{side}_logit_scale"
        if name not in dict(self.pinned):
            z = _times(z, getattr(hp, name))
        cap = getattr(hp, f"{side}_softcap", None)
        return Logits(z if cap is None else cap * torch.tanh(z / cap))

    def _sides(self, student: Logits, outputs: Any, rows: Any, hp: Any) -> Sides:
        """Pairs of logits: "whole" vocabularies, and what they have in "common"."""
        teacher = self._logits("teacher", outputs, hp)
        ours, theirs = student, teacher
        more = student.z.shape[1] - teacher.z.shape[1]
        if more > 0 and self.vocabulary == "mask":
            theirs = Logits(F.pad(teacher.z, (0, more), value=-torch.inf))
        elif more > 0:
            ours = Logits(student.z[:, :-more])
        elif more < 0:
            theirs = Logits(teacher.z[:, :more])
        return {"common": (ours, theirs), "whole": (student, teacher)}

    def _term(self, term: Term, sides: Sides, hp: Any, columns: Any) -> Tensor:
        pinned = dict(self.pinned)
        numbers = {name: pinned[a] if a in pinned else getattr(hp, a) for name, a in term.numbers}
        options = dict(term.options)
        student, teacher = sides["common" if term.divergence.shared_vocabulary else "whole"]
        if options.get("kernel") == "linear":
            options["embedding"] = columns["embedding"][: student.z.shape[1]]
        factor = 1 / hp.temperature if term.divergence.tempered and "temperature" not in pinned else None
        if term.divergence.core is not None:
            return term.divergence.core(student.softmax(factor), teacher.softmax(factor), **numbers, **options)
        return term.divergence.function(student.times(factor), teacher.times(factor), **numbers, **options)


class Logits:
    """One side's logits in a chunk, and their softmax, formed once for all terms: it reads the whole of them."""

    def __init__(self, z: Tensor) -> None:  # (R, V)
        self.z = z
        self.found: dict[bool, LogProbs] = {}

    def times(self, factor: Tensor | None) -> Tensor:
        return self.z if factor is None else _times(self.z, factor)

    def softmax(self, factor: Tensor | None = None) -> LogProbs:
        """Of the logits times ``factor``, the inverse temperature: of one value in a step."""
        plain = factor is None
        if plain not in self.found:
            self.found[plain] = normalized(self.times(factor))
        return self.found[plain]


Sides: TypeAlias = dict[str, tuple[Logits, Logits]]


def _times(z: Tensor, factor: Tensor) -> Tensor:
    """``z * factor``, in a form that inductor does not take for a scaled softmax: for that it would read z twice."""
    return floored(z * factor)


def is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, Real) and not isinstance(value, bool)


def _finite(value: object) -> bool:
    return is_number(value) and math.isfinite(value)


def _items(num_items: float | Tensor, like: Tensor) -> float | Tensor:
    """The normaliser. A tensor on a GPU is not looked at: that would wait for it."""
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1 or (num_items.device.type == "cpu" and not bool(num_items > 0)):
            raise ValueError(f"expected num_items to be a positive number, got {num_items}")
        return num_items.detach().to(like.device, like.dtype).reshape(())
    if not _finite(num_items) or num_items <= 0:
        raise ValueError(f"expected num_items to be a positive number, got {num_items!r}")
    return float(num_items)


def _single(name: str, **keywords: Any) -> tuple[list[Term], dict[str, float]]:
    term, numbers = make_term(name, name, keywords)
    return [term], numbers


# --- one divergence --------------------------------------------------------------------------------------------------


class PlainLoss(DistillationLoss):
    """A divergence without numbers of its own, by its name."""

    divergence: ClassVar[str]

    def __init__(
        self, temperature: float = 1.0, weight_hard: float = 0.0, weight_soft: float = 1.0, **options: Any
    ) -> None:
        super().__init__(*_single(self.divergence), temperature, weight_hard, weight_soft, **options)


class KLDivLoss(PlainLoss):
    """Forward KL, ``sum_v p log(p/q)``: p the teacher, q the student, both softmax(logits / temperature).

    Covers the teacher's modes. Metrics: "kl", and "ce" with a hard loss.

    Example:
        >>> student, teacher = torch.randn(6, 4, requires_grad=True), torch.randn(6, 8)
        >>> loss = KLDivLoss(temperature=2.0, compiled=False)
        >>> out = loss(student, torch.randn(11, 4), teacher, torch.randn(11, 8))
        >>> out.loss.backward()
        >>> out.metrics["kl"].shape, student.grad.shape
        (torch.Size([6]), torch.Size([6, 4]))

    Reference: Hinton et al., https://arxiv.org/abs/1503.02531
    """

    divergence = "kl"


class ReverseKLLoss(PlainLoss):
    """Reverse KL, ``sum_v q log(q/p)``: seeks a mode of the teacher. Metrics: "reverse_kl".

    Reference: MiniLLM, https://arxiv.org/abs/2306.08543
    """

    divergence = "reverse_kl"


class JSDLoss(DistillationLoss):
    """Generalised Jensen-Shannon divergence: ``beta KL(p|m) + (1-beta) KL(q|m)``, ``m = (1-beta) q + beta p``.

    ``beta=0`` is the forward and ``beta=1`` the reverse KL, as in TRL and Liger. Metrics: "jsd".

    Reference: GKD, https://arxiv.org/abs/2306.13649
    """

    def __init__(
        self,
        beta: float = 0.5,
        temperature: float = 1.0,
        weight_hard: float = 0.0,
        weight_soft: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(*_single("jsd", beta=beta), temperature, weight_hard, weight_soft, **options)


class SkewKLLoss(DistillationLoss):
    """Skew forward KL: ``KL(p | skew p + (1-skew) q)``, 0 <= skew < 1. Metrics: "skew_kl".

    Reference: DistiLLM, https://arxiv.org/abs/2402.03898
    """

    def __init__(
        self,
        skew: float = 0.1,
        temperature: float = 1.0,
        weight_hard: float = 0.0,
        weight_soft: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(*_single("skew_kl", skew=skew), temperature, weight_hard, weight_soft, **options)


class SkewReverseKLLoss(DistillationLoss):
    """Skew reverse KL: ``KL(q | (1-skew) p + skew q)``, 0 <= skew < 1. Metrics: "skew_reverse_kl".

    ``detach_mixture=True`` takes no gradient through the mixture, as DistiLLM-2 does.

    Reference: DistiLLM, https://arxiv.org/abs/2402.03898, and DistiLLM-2, https://arxiv.org/abs/2503.07067
    """

    def __init__(
        self,
        skew: float = 0.1,
        temperature: float = 1.0,
        weight_hard: float = 0.0,
        weight_soft: float = 1.0,
        *,
        detach_mixture: bool = False,
        **options: Any,
    ) -> None:
        term = _single("skew_reverse_kl", skew=skew, detach_mixture=bool(detach_mixture))
        super().__init__(*term, temperature, weight_hard, weight_soft, **options)


class TVDLoss(PlainLoss):
    """Total variation distance: ``1/2 sum_v |p - q|``, between 0 and 1. Metrics: "tvd".

    Reference: f-DISTILL, https://arxiv.org/abs/2307.15190
    """

    divergence = "tvd"


class AlphaBetaLoss(DistillationLoss):
    """alpha-beta divergence, with ``a = ab_alpha``, ``b = ab_beta``, both at least zero and not both zero::

        -1/(a b) sum_v [p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b)]

    and its limits at zero: (1, 0) is the forward KL and (0, 1) the reverse. Metrics: "alpha_beta".

    Reference: ABKD, https://arxiv.org/abs/2505.04560
    """

    def __init__(
        self,
        ab_alpha: float = 0.2,
        ab_beta: float = 0.7,
        temperature: float = 1.0,
        weight_hard: float = 0.0,
        weight_soft: float = 1.0,
        **options: Any,
    ) -> None:
        term = _single("alpha_beta", ab_alpha=ab_alpha, ab_beta=ab_beta)
        super().__init__(*term, temperature, weight_hard, weight_soft, **options)


class AdaptiveKLLoss(DistillationLoss):
    """Adaptive KL: ``w KL(p|q) + (1-w) KL(q|p)`` with ``w = gap_head / (gap_head + gap_tail)``, detached.

    The head are the teacher's most probable tokens that hold ``head`` of its mass, a gap is ``sum |p - q|`` over them.
    Sorts the vocabulary. Metrics: "adaptive_kl".

    Reference: https://arxiv.org/abs/2404.02657
    """

    def __init__(
        self,
        head: float = 0.5,
        temperature: float = 1.0,
        weight_hard: float = 0.0,
        weight_soft: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(*_single("adaptive_kl", head=head), temperature, weight_hard, weight_soft, **options)


class TAIDLoss(DistillationLoss):
    """Cross-entropy to a target between student and teacher: ``-sum_v p_t log q``,
    ``p_t = softmax((1-t) student.detach() + t teacher)``.

    Move ``loss.t`` from a small value to 1 in training; nothing compiles anew. Its least value is the entropy of p_t,
    not zero. Metrics: "taid".

    Reference: TAID, https://arxiv.org/abs/2501.16937
    """

    def __init__(
        self,
        t: float = 0.4,
        temperature: float = 1.0,
        weight_hard: float = 0.0,
        weight_soft: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(*_single("taid", t=t), temperature, weight_hard, weight_soft, **options)


class CosineSimilarityLoss(PlainLoss):
    """``1 - cos`` of the student's and the teacher's logits, without temperature. Metrics: "cosine"."""

    divergence = "cosine"


class LogitMSELoss(PlainLoss):
    """Mean squared difference of the logits, ``mean_v (student_v - teacher_v)^2``, without temperature. Metrics: "mse".

    Reference: https://arxiv.org/abs/2105.08919
    """

    divergence = "mse"


class EarthMoverLoss(DistillationLoss):
    """Earth mover's distance over token ids: ``sum_k |C_q(k) - C_p(k)| / (V-1)``, C the cumulative probabilities.

    ``p=2`` squares the differences: the Cramér distance. **The order of token ids carries no meaning**: this costs
    probability by how far its id is away, which is right where columns are ordered (bins, ratings), and for a
    vocabulary at most a smoothed total variation. Metrics: "earth_mover".

    Reference: https://arxiv.org/abs/1705.10743 (Cramér distance)
    """

    def __init__(
        self,
        p: int = 1,
        temperature: float = 1.0,
        weight_hard: float = 0.0,
        weight_soft: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(*_single("earth_mover", p=p), temperature, weight_hard, weight_soft, **options)


class KVDLoss(DistillationLoss):
    """Kernel distance between the distributions (squared MMD): ``(q-p)' K (q-p)``.

    ``kernel="linear"``: K holds the cosine similarities of the teacher head's rows, so that tokens which the teacher
    thinks alike count as near; two more products with that head, in its dtype. ``kernel="delta"``: K is the identity,
    ``sum_v (q-p)^2``. Metrics: "kvd".

    The RFC that asks for KVD names it without defining it; this is our reading. If you came for total variation, that
    is ``TVDLoss``. Reference for the distance: https://jmlr.org/papers/v13/gretton12a.html
    """

    def __init__(
        self,
        kernel: str = "linear",
        temperature: float = 1.0,
        weight_hard: float = 0.0,
        weight_soft: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(*_single("kvd", kernel=kernel), temperature, weight_hard, weight_soft, **options)


class ULDLoss(PlainLoss):
    """Universal logit distillation, across tokenizers: ``sum_v |sort(q) - sort(p)|``, the shorter vocabulary padded
    with zeros.

    Blind to which token is which, so not for a shared vocabulary. The tokens of the two sides must be aligned by the
    caller: one hidden state of each to a row. Sorts both vocabularies. Metrics: "uld".

    Reference: https://arxiv.org/abs/2402.12030
    """

    divergence = "uld"


# --- several, and a teacher that is not there ------------------------------------------------------------------------


class DistillLoss(DistillationLoss):
    """A weighted sum of divergences over one pair of logits, with a metric for each.

        DistillLoss([("ce", 0.5), ("reverse_kl", 0.4), ("tvd", 0.1)], temperature=2.0)
        DistillLoss([("jsd", 1.0, {"beta": 0.1}), (my_divergence, 0.5, {"margin": 0.2})])

    Args:
        terms: (name or function, weight) or (name or function, weight, keywords). Names are those of
            ``divergences.DIVERGENCES`` and "ce", the hard loss. A function of yours takes ``(student, teacher)``
            logits ``(R, V)`` divided by the temperature, and keywords, and returns ``(R,)``; define it once, at module
            level. A ``Divergence`` says more about a function.
        loss_fn: a function of yours alone, short for ``[(loss_fn, 1.0)]``.

    The numbers of a term are attributes that begin with its label: ``loss.jsd_beta``, ``loss.tvd_weight``; the weight
    of "ce" is ``weight_hard``. Metrics go by label: the name, and for a second term of that name ``jsd_2``.

    Example:
        >>> def overlap(student, teacher):
        ...     return 1 - torch.minimum(student.softmax(1), teacher.softmax(1)).sum(1)
        >>> loss = DistillLoss([("ce", 0.5), (overlap, 0.5)], compiled=False)
        >>> sides = torch.randn(6, 4), torch.randn(11, 4), torch.randn(6, 8), torch.randn(11, 8)
        >>> sorted(loss(*sides, target=torch.arange(6)).metrics)
        ['ce', 'overlap']
    """

    def __init__(
        self,
        terms: Sequence[tuple] | None = None,
        temperature: float = 1.0,
        *,
        loss_fn: Callable[..., Tensor] | None = None,
        **options: Any,
    ) -> None:
        if "weight_hard" in options or "weight_soft" in options:
            raise TypeError("expected weights with the terms, got weight_hard or weight_soft")
        if (terms is None) == (loss_fn is None):
            raise TypeError("expected either terms or a loss_fn")
        if isinstance(terms, (str, Mapping)):
            raise ValueError(f"expected terms [(name, weight), ...], got {terms!r}")
        terms = [(loss_fn, 1.0)] if terms is None else list(terms)
        if not terms:
            raise ValueError("expected terms [(name, weight), ...], got none")
        made: list[Term] = []
        numbers: dict[str, float] = {}
        hard: float | None = None
        for given in terms:
            if not isinstance(given, (tuple, list)) or len(given) not in (2, 3):
                raise ValueError(f"expected a term (name or function, weight[, keywords]), got {given!r}")
            kind, weight, keywords = (*given, {}) if len(given) == 2 else given
            if not isinstance(keywords, Mapping):
                raise TypeError(f"expected the keywords of {kind!r} as a dict, got {keywords!r}")
            if not _finite(weight):
                raise ValueError(f"expected the weight of {kind!r} to be a finite number, got {weight!r}")
            if kind == "ce":
                if hard is not None or keywords:
                    raise ValueError('expected one term "ce", without keywords')
                hard = float(weight)
                continue
            base = kind if isinstance(kind, str) else _name_of(kind)
            labels, label, n = {"ce", *REPORTS, *(term.label for term in made)}, base, 2
            while label in labels:
                label, n = f"{base}_{n}", n + 1
            term, found = make_term(label, kind, keywords, prefix=f"{label}_")
            made.append(term._replace(weight=f"{label}_weight"))
            if clash := found.keys() & {*numbers, f"{label}_weight"}:
                raise ValueError(f"expected terms whose numbers have names of their own, got {sorted(clash)} again")
            numbers |= found | {f"{label}_weight": float(weight)}
        super().__init__(made, numbers, temperature, hard or 0.0, 1.0, **options)


def _name_of(kind: Any) -> str:
    function = kind.function if isinstance(kind, Divergence) else kind
    name = getattr(function, "__name__", type(function).__name__)
    return re.sub(r"\W", "", name).strip("_") or "divergence"


class TopKLoss(DistillationLoss):
    """A divergence from a teacher of whom only the top k log-probabilities were kept.

    With p the teacher's k probabilities and q the student's at the same ids:

    * ``tail="bucket"``: what is left of both is one more token: ``sum_k p log(p/q) + p_tail log(p_tail/q_tail)``;
    * ``tail="renorm"``: the teacher's k are scaled to sum to one, and it gives zero to everything else;
    * ``tail="zero"``: its k as they are, nothing for the rest: ``sum_k p log(p/q)`` (forward KL only, and no
      distance: it may be negative).

    Args:
        divergence: a name of ``DIVERGENCES`` over shared tokens; with "renorm" not one that is infinite where the
            teacher's probability is zero. Its keywords go in ``divergence_options``.
        teacher_temperature: at which the log-probabilities were taken. "bucket" and "zero" need the loss's
            ``temperature`` to be the same; "renorm" can change it, since it does without the tail.

    The call is ``loss(student_hidden, student_weight, teacher_ids, teacher_logprobs, target=None, student_bias=None)``,
    ids and log-probabilities ``(..., K)``, distinct ids; a log-probability of ``-inf`` marks an entry that is not
    there. Metrics: the divergence's name.
    """

    def __init__(
        self,
        divergence: str = "kl",
        tail: str = "bucket",
        temperature: float = 1.0,
        weight_hard: float = 0.0,
        weight_soft: float = 1.0,
        *,
        teacher_temperature: float = 1.0,
        divergence_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        if tail not in ("bucket", "renorm", "zero"):
            raise ValueError(f'expected tail to be "bucket", "renorm" or "zero", got {tail!r}')
        if tail == "zero" and divergence != "kl":
            raise ValueError(f'expected divergence "kl" with tail="zero", got {divergence!r}')
        if not isinstance(divergence, str):
            raise TypeError(f"expected the name of a divergence, got {divergence!r}")
        for name in ("vocabulary", "teacher_logit_scale", "teacher_softcap"):
            if name in options:
                raise TypeError(f"expected no {name}: the teacher is what was kept of it")
        terms, numbers = _single(divergence, **(divergence_options or {}))
        kind = terms[0].divergence
        if not (kind.shared_vocabulary and kind.tempered) or divergence in ("kvd", "earth_mover"):
            raise ValueError(f"expected a divergence of probabilities token by token, got {divergence!r}")
        if "teacher_agreement" in as_report(options.get("report")):
            raise ValueError("expected report without teacher_agreement, which needs the teacher's logits")
        attributes = numbers | {"tail": tail, "teacher_temperature": teacher_temperature}
        super().__init__(terms, attributes, temperature, weight_hard, weight_soft, **options)
        if tail != "zero":
            self.workspace_bytes += 8  # the student's others, padded and then scattered into

    def _settle(self) -> None:
        super()._settle()
        own = self.teacher_temperature
        if not _finite(own) or own <= 0:
            raise ValueError(f"expected teacher_temperature to be a positive, finite number, got {own!r}")
        if self.tail != "renorm" and own != self.temperature:
            raise ValueError(
                f'expected log-probabilities at the temperature of the loss, {self.temperature} (tail="{self.tail}": '
                f"the rest of the vocabulary is not there to change it), got teacher_temperature={own}"
            )
        if self.tail == "renorm" and self._needs_support(self.terms[0]):
            raise ValueError(f'expected tail="bucket" for {self.terms[0].label!r}: it is infinite where p is zero')

    def forward(  # type: ignore[override]  # the call of this family, in front of the engine's
        self,
        student_hidden: Tensor,  # (..., H)
        student_weight: Tensor,  # (V, H)
        teacher_ids: Tensor | None,  # (..., K)
        teacher_logprobs: Tensor | None,  # (..., K)
        target: Tensor | None = None,  # (...)
        student_bias: Tensor | None = None,  # (V,)
        *,
        num_items: float | Tensor | None = None,
        student_extra: Extra = (),
    ) -> LossOutput:
        """As for the other losses, with ids and log-probabilities in place of the teacher."""
        call = self._call(
            student_hidden, student_weight, teacher_ids, teacher_logprobs, target, student_bias,
            num_items=num_items, student_extra=student_extra,
        )  # fmt: skip
        return FlexChunkLoss.forward(self, **call)

    def _call(  # type: ignore[override]
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_ids: Tensor | None,
        teacher_logprobs: Tensor | None,
        target: Tensor | None = None,
        student_bias: Tensor | None = None,
        *,
        num_items: float | Tensor | None = None,
        student_extra: Extra = (),
    ) -> dict[str, Any]:
        self._settle()
        call = self._student(student_hidden, student_weight, target, student_bias, num_items, student_extra)
        if not self.soft:
            return call
        if not isinstance(teacher_ids, Tensor) or not isinstance(teacher_logprobs, Tensor):
            got = type(teacher_ids).__name__, type(teacher_logprobs).__name__
            raise TypeError(f"expected tensors teacher_ids and teacher_logprobs, got {got}")
        ids, logprobs = teacher_ids, teacher_logprobs.detach()
        if ids.is_floating_point() or ids.dtype == torch.bool or not logprobs.is_floating_point():
            raise TypeError(
                f"expected integer teacher_ids and floating teacher_logprobs, got {ids.dtype}, {logprobs.dtype}"
            )
        if ids.shape != logprobs.shape or ids.shape[:-1] != student_hidden.shape[:-1] or ids.shape[-1] == 0:
            raise ValueError(
                f"expected teacher_ids and teacher_logprobs of shape {(*student_hidden.shape[:-1], 'K')}, "
                f"got {tuple(ids.shape)} and {tuple(logprobs.shape)}"
            )
        used = call["row_weight"] != 0
        outside = used[..., None] & (logprobs > -torch.inf) & ((ids < 0) | (ids >= len(student_weight)))
        # A twentieth more than one: what half precision may round up to.
        wrong = used & ~(logprobs.to(call["row_weight"].dtype).exp().sum(-1) < 1.05)
        n_outside, n_wrong = torch.stack([outside.sum(), wrong.sum()]).tolist()
        if n_outside:
            raise ValueError(f"expected teacher_ids in [0, {len(student_weight)}), got {n_outside} outside")
        if n_wrong:
            raise ValueError(
                "expected teacher_logprobs to be logarithms of probabilities, which sum to one at most, "
                f"got others for {n_wrong} tokens"
            )
        if self.tail == "renorm":
            empty = used & (logprobs == -torch.inf).all(-1)
            if bool(empty.any()):
                raise ValueError(
                    f"expected an entry or more for each token that counts, got {int(empty.sum())} without"
                )
        call["rows"] |= {"ids": ids, "logprobs": logprobs}
        return call

    def _sides(self, student: Logits, outputs: Any, rows: Any, hp: Any) -> Sides:
        """Logits whose softmax at the loss's temperature are the few probabilities: log-probabilities, times it."""
        log_p = rows["logprobs"].to(student.z.dtype)
        there = log_p > -torch.inf
        index = rows["ids"].long().clamp(0, student.z.shape[1] - 1)
        z = student.z / hp.temperature
        total = z.logsumexp(1, keepdim=True)
        log_q = torch.where(there, z.gather(1, index) - total, -torch.inf)
        if self.tail == "zero":
            return {"common": (Logits(log_q), Logits(log_p))}
        # The sum of the others, not what the few leave of one: that would have few digits, or none. What is not there
        # takes a column behind the last.
        others = F.pad(z, (0, 1), value=FLOOR).scatter(1, torch.where(there, index, z.shape[1]), FLOOR)
        log_q_tail = others.logsumexp(1, keepdim=True) - total
        log_q_tail = log_q_tail.clamp_min(math.log(torch.finfo(z.dtype).tiny))
        if self.tail == "renorm":
            log_p = log_p * (hp.teacher_temperature / hp.temperature)
            log_p_tail = torch.full_like(log_q_tail, -torch.inf)
        else:
            log_p_tail = _log_rest(log_p)
        ours, theirs = torch.cat([log_q, log_q_tail], 1), torch.cat([log_p, log_p_tail], 1)
        return {"common": (Logits(ours * hp.temperature), Logits(theirs * hp.temperature))}

    def _term(self, term: Term, sides: Sides, hp: Any, columns: Any) -> Tensor:
        if self.tail != "zero":
            return super()._term(term, sides, hp, columns)
        log_q, log_p = (side.z.clamp_min(FLOOR) for side in sides["common"])
        return (log_p.exp() * (log_p - log_q)).sum(1)


def _log_rest(log_probs: Tensor) -> Tensor:  # (R, K) -> (R, 1)
    """``log(1 - sum exp)``: what a few probabilities leave, at least the rounding error of their sum."""
    rest = -torch.expm1(log_probs.logsumexp(1, keepdim=True))
    return rest.clamp_min(torch.finfo(log_probs.dtype).tiny).log()
