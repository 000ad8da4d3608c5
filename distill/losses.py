"""Distillation losses: a divergence between a teacher's and a student's logits, without holding either's.

``DistillationLoss`` is what they share: the call, ignored tokens, temperature, vocabularies, the hard loss. A loss of
one divergence names its entry in ``DIVERGENCES`` and takes its options from there.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from chunked_embed import ChunkPlan, FlexChunkLoss, Head, LossOutput, checks, transform_logits
from chunked_embed.checks import PADDING, POSITIVE
from chunked_embed.fields import KW_ONLY, ChunkFields, Field, assign, choice, flag, integer, number
from chunked_embed.signatures import Seen, signature, with_arguments_of

from .divergences import (
    DIVERGENCES,
    Divergence,
    LogProbs,
    When,
    by_function,
    by_name,
    floored,
    name_of,
    nll,
    normalized,
)

Extra: TypeAlias = "Sequence[tuple[Tensor, Tensor]]"
REPORTS = ("student_entropy", "teacher_agreement", "tempered_entropy")


class Term(NamedTuple):
    """One divergence of a loss."""

    label: str  # of its metric
    divergence: Divergence
    options: tuple[tuple[str, str], ...]  # keyword of the divergence -> attribute of the loss
    weight: str | None = None  # attribute


def as_report(report: Sequence[str] | str | None) -> tuple[str, ...]:
    return (report,) if isinstance(report, str) else tuple(report or ())


class DistillationLoss(ChunkFields, FlexChunkLoss):
    """What the distillation losses share.

        loss = sum over valid tokens of (weight_soft * D(student, teacher) + weight_hard * CE(student, target)) / tokens

    A subclass names its divergence; see ``JSDLoss``. All options are plain attributes: setting one counts from the
    next call on. Numbers (temperature, weights, beta, ...) may change in every step without a new compilation, but for
    the values at which a formula is another one: a weight of zero, a beta of 0 or 1, a temperature of one.

    Args:
        temperature: of both softmaxes in D; cosine similarity, squared error and the hard loss do without.
        weight_hard: of the cross-entropy with the labels, from the student's logits at temperature one.
        weight_soft: of the divergence. With zero the teacher is not looked at, and may be None.
        ignore_index: tokens with this target are dropped before any product.
        scale_by_t2: multiply what takes a temperature by its square, so that gradients keep their size (Hinton's
            convention; TRL, Liger and DistiLLM do not).
        student_logit_scale, student_softcap: logits are ``scale * x``, then ``softcap * tanh(. / softcap)``. A ``Head``
            brings its own.
        teacher_logit_scale, teacher_softcap: likewise.
        vocabulary: what happens where one head has more rows than the other (padding, as a rule). "cut" compares the
            two on the ids that both have, each with its softmax over those, with a warning where that is more than
            padding. "mask" lets the teacher give probability zero to what it lacks: a longer student then pays for
            probability out there (not for divergences that are infinite where the teacher is zero). "refuse" raises. A
            longer teacher is cut in any case (logits of -inf would be the same), and the hard loss always sees the
            student's whole vocabulary.
        report: further metrics, "student_entropy", "tempered_entropy" (the student's at ``temperature``) and
            "teacher_agreement" (whether their top tokens are the same).
        chunk_size, max_chunk_bytes, compiled, float32_outputs: as for ``FlexChunkLoss``. With half-precision logits a
            divergence between close distributions is off by about a percent.

    Example:
        >>> import torch
        >>> from distill import DistillationLoss, KLDivLoss
        >>> student, teacher = torch.randn(6, 4, requires_grad=True), torch.randn(6, 8)
        >>> heads = torch.randn(11, 4), torch.randn(11, 8)
        >>> loss = KLDivLoss(temperature=2.0, weight_hard=0.5, weight_soft=0.5, report="teacher_agreement")
        >>> isinstance(loss, DistillationLoss)
        True
        >>> labels = torch.tensor([1, 2, 3, 4, -100, -100])
        >>> sorted(loss(student, heads[0], teacher, heads[1], labels).means)
        ['ce', 'kl', 'teacher_agreement']
        >>> loss.temperature = 1.0  # counts from the next call on
    """

    entry: ClassVar[Divergence]
    """The divergence of a class that has one."""

    _: KW_ONLY
    temperature: float = number(1.0, POSITIVE, by_position=True)
    weight_hard: float = number(0.0, by_position=True)
    weight_soft: float = number(1.0, by_position=True)
    ignore_index: int = integer(-100)
    scale_by_t2: bool = flag(False)
    student_logit_scale: float = number(1.0, POSITIVE)
    student_softcap: float | None = number(None, POSITIVE)
    teacher_logit_scale: float = number(1.0, POSITIVE)
    teacher_softcap: float | None = number(None, POSITIVE)
    vocabulary: str = choice("cut", ("cut", "mask", "refuse"))
    report: Sequence[str] | str | None = ()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        entry: Divergence | None = getattr(cls, "entry", None)
        for name in () if entry is None else entry.fields:
            if name not in cls.fields:
                raise TypeError(f"expected a field of {cls.__name__} for each option of its entry, got no {name!r}")

    def begin(self, values: Mapping[str, Any]) -> None:
        of_engine = ("ignore_index", *ChunkFields.fields)
        FlexChunkLoss.__init__(self, targets={"target": "student"}, **{name: values[name] for name in of_engine})
        self._seen = Seen()
        self.terms: tuple[Term, ...] = ()
        self.further: dict[str, Field] = {}
        # What follows from a call, for its step: see ``settle``.
        self.hard = self.soft = False
        self.pinned: tuple[tuple[str, float], ...] = ()
        self.student_scale = self.teacher_scale = 1.0
        self.student_cap: float | None = None
        self.teacher_cap: float | None = None

    def setup(self) -> None:
        if hasattr(self, "entry"):
            self.set_terms([Term(self.entry.name, self.entry, tuple((name, name) for name in self.entry.fields))])

    def set_terms(self, terms: Sequence[Term]) -> None:
        self.terms = tuple(terms)
        self.forget()
        self.workspace_bytes = max((term.divergence.workspace_bytes for term in terms), default=0)

    def make_term(
        self, kind: str | Divergence | Callable, keywords: Mapping[str, Any], label: str | None = None, prefix: str = ""
    ) -> Term:
        """A term whose options become attributes of this loss, with ``prefix`` before their names."""
        if isinstance(kind, str):
            kind = by_name(kind)
        elif not isinstance(kind, Divergence):
            if not callable(kind):
                raise TypeError(f"expected the name of a divergence or a function, got {kind!r}")
            kind = by_function(kind)
        label = kind.name if label is None else label
        if unknown := sorted(set(keywords) - set(kind.fields)):
            raise TypeError(f"expected options of {label!r} among {sorted(kind.fields)}, got {unknown}")
        for name, field in kind.fields.items():
            self.add_field(prefix + name, field, keywords.get(name, field.default))
        return Term(label, kind, tuple((name, prefix + name) for name in kind.fields))

    def add_field(self, name: str, field: Field, value: Any) -> None:
        """One more option of this instance."""
        if hasattr(self, name):
            raise ValueError(f"expected terms whose numbers have names of their own, got {name!r} again")
        self.further[name] = field
        setattr(self, name, field.check(name, value))
        self.forget()

    def known_fields(self) -> Mapping[str, Field]:
        return {**self.fields, **self.further}

    def check(self) -> None:
        super().check()
        if unknown := [name for name in as_report(self.report) if name not in REPORTS]:
            raise ValueError(f"expected report among {list(REPORTS)}, got {unknown}")
        for term in self.terms:
            some = [attribute for name, attribute in term.options if name in term.divergence.not_all_zero]
            if some and not any(getattr(self, attribute) for attribute in some):
                raise ValueError(f"expected {' or '.join(some)} above zero, got 0 for all")

    @property
    def numbers(self) -> tuple[str, ...]:
        """The attributes that may change from call to call, by a schedule for one. Logit scales and soft-caps are the
        models'."""
        weights = [term.weight for term in self.terms if term.weight]
        options = [attribute for term in self.terms for _, attribute in term.options]
        fields = self.known_fields()
        of_terms = [name for name in options if fields[name].range is not None]
        return ("temperature", "weight_hard", "weight_soft", *weights, *of_terms)

    # --- the call ---

    def prepare(  # type: ignore[override]
        self,
        student_hidden: Tensor | Head,  # (..., Hs)
        student_weight: Tensor | Head | None = None,  # (Vs, Hs)
        teacher_hidden: Tensor | Head | None = None,  # (..., Ht)
        teacher_weight: Tensor | None = None,  # (Vt, Ht)
        target: Tensor | None = None,  # (...)
        student_bias: Tensor | None = None,  # (Vs,)
        teacher_bias: Tensor | None = None,  # (Vt,)
        *,
        num_items: float | Tensor | None = None,
        student_extra: Extra = (),
        teacher_extra: Extra = (),
    ) -> Any:
        """The mean over valid tokens, and metrics; gradients for the student's tensors that require one, none for the
        teacher's. (``prepare`` stops before the first product: it has the call's ``plan``, and ``run()``.)

        ``loss(student, teacher, target=labels)`` with two ``Head`` is the same as with their parts.

        Args:
            student_hidden, student_weight, student_bias: hidden states and LM head; or a ``Head`` alone.
            teacher_hidden, teacher_weight, teacher_bias: likewise, of as many tokens; behind a student's ``Head`` the
                teacher's comes second.
            target: labels, aligned with the hidden states; tokens with ``ignore_index`` take no part. Needed for a
                hard loss; without one it may be any mask of that form, or None: every token counts.
            num_items: divide the sum over tokens by this instead of the valid tokens of this batch: those of all
                batches whose gradients are accumulated.
            student_extra, teacher_extra: further ``(input, weight)`` terms of the logits, such as a LoRA adapter on the
                head.

        Returns:
            ``loss``, and ``metrics``: the value of each term for every token, unweighted, zero where ignored; ``means``
            has their means over the others.
        """
        sides = student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias
        known, key = self.recall(*sides, student_extra, teacher_extra, target)
        if isinstance(student_hidden, Head) and isinstance(student_weight, Head):
            if teacher_hidden is not None:
                raise TypeError("expected what follows two heads by name (target=...), got a third argument")
            student_weight, teacher_hidden = None, student_weight
        student = self.head_of("student", student_hidden, student_weight, student_bias, student_extra, known=known)
        teacher = None
        if teacher_hidden is not None or teacher_weight is not None:
            if isinstance(student_hidden, Head) != isinstance(teacher_hidden, Head):
                raise TypeError(
                    "expected a Head for both or for neither, got one: the other's scale and soft-cap would be a guess"
                )
            teacher = self.head_of("teacher", teacher_hidden, teacher_weight, teacher_bias, teacher_extra, known=known)
        call = super().prepare(**self.arguments(student, teacher, target, num_items, known, key))
        self._seen.keep(key)
        return call

    @with_arguments_of(prepare)
    def forward(self, *arguments: Any, **keywords: Any) -> LossOutput:  # type: ignore[override]
        return super().forward(*arguments, **keywords)

    @with_arguments_of(prepare)
    def plan(self, *arguments: Any, **keywords: Any) -> ChunkPlan:  # type: ignore[override]
        """What ``forward`` with the same arguments will do: print it before running."""
        return super().plan(*arguments, **keywords)

    def recall(self, *given: Any) -> tuple[bool, Hashable]:
        """Whether a call like this one was checked, with the options as they are; and what ``_seen`` knows it by."""
        if self.recheck():
            self._seen.clear()
        key = signature(*given)
        return key in self._seen.calls, key

    def head_of(
        self, side: str, hidden: Any, weight: Any, bias: Any = None, extra: Any = (), *, known: bool = False
    ) -> Head:
        """A side's tensors as one; a ``Head`` must not be at odds with the loss's own transform of that side."""
        if known and isinstance(hidden, Head):
            return hidden
        own = getattr(self, f"{side}_logit_scale"), getattr(self, f"{side}_softcap")
        if known:
            return Head.known(hidden, weight, bias, extra, *own)
        if not isinstance(hidden, Head):
            return Head.of(f"{side}_", hidden, weight, bias, extra, *own)
        if weight is not None or bias is not None or extra:
            raise TypeError(f"expected no {side}_weight, {side}_bias or {side}_extra beside a Head, which has its own")
        for name, mine, theirs in zip(("logit_scale", "softcap"), own, hidden.transform):
            option = f"{side}_{name}"
            if mine not in (self.fields[option].default, theirs):
                raise ValueError(
                    f"expected a {side} whose Head agrees with {option}={mine} of {type(self).__name__}, got {theirs}: "
                    "leave the option out, the Head's counts"
                )
        return hidden

    def among_others(self, student: Head, teacher: Head, own: Tensor) -> LossOutput:  # own: (M,)
        """The loss of rows that are themselves among the columns: each leaves out the column ``own``, on both sides."""
        self.check()
        if len({term.divergence.tempered for term in self.terms}) > 1:
            labels = [term.label for term in self.terms]
            raise ValueError(f"expected terms that all take a softmax, or none, for texts of one column, got {labels}")
        if student.logit_softcap is not None or teacher.logit_softcap is not None:
            raise ValueError("expected no soft-cap for texts of one column, each of which leaves itself out")
        call = self.arguments(student, teacher)
        call["rows"]["own"] = own
        return super().prepare(**call).run()

    def arguments(
        self,
        student: Head,
        teacher: Head | None,
        target: Tensor | None = None,
        num_items: float | Tensor | None = None,
        known: bool = False,
        key: Hashable = None,
    ) -> dict[str, Any]:
        """The arguments of ``FlexChunkLoss.prepare``; ``known`` and ``key`` as from ``recall``."""
        self.settle_once(key, student, teacher)
        if not self.soft:
            return self.of_student(student, target, num_items, known)
        if teacher is None:
            raise TypeError("expected teacher_hidden and teacher_weight, or a Head, got None")
        call = self.of_student(student, target, num_items, known)
        ours, theirs = student.weight.shape[0], teacher.weight.shape[0]
        width = self.compared(ours, theirs)
        if width < theirs and all(term.divergence.shared_vocabulary for term in self.terms):
            teacher = teacher.cut(width)
        call["projections"]["teacher"] = frozen = teacher.detach().projection
        if any([self.holds(term, term.divergence.takes_head) for term in self.terms]):
            call["columns"] = {"embedding": frozen.weight}
        return call

    def of_student(
        self, student: Head, target: Any, num_items: float | Tensor | None, known: bool, weighs: bool = False
    ) -> dict[str, Any]:
        """The student's part of the call: its projection, the labels, and the weight of every token, where that is not
        what the engine takes for one (1 / the tokens that are not ignored). ``weighs``: in any case."""
        hidden = student.hidden
        leading, wide = hidden.shape[:-1], torch.float64 if hidden.dtype == torch.float64 else torch.float32
        call: dict[str, Any] = {"projections": {"student": student.projection}, "rows": {}}
        if target is None:
            if self.hard:
                raise ValueError("expected a target: weight_hard is not zero")
            if num_items is not None or weighs:
                items = leading.numel() if num_items is None else checks.items("num_items", num_items, hidden.device)
                each = 1 / items if isinstance(items, Tensor) else torch.tensor(1 / items)
                call["row_weight"] = each.to(hidden.device, wide).expand(leading)
            return call
        if not known:
            checks.tensor("target", target, tuple(leading), device=hidden.device, kind="integer")
        if self.hard:
            call["rows"]["target"] = target
            if num_items is None and not weighs:
                return call
        used: Tensor = target != self.ignore_index
        if wide == torch.float64:
            used = used.double()
        items = used.sum().clamp_min(1) if num_items is None else checks.items("num_items", num_items, hidden.device)
        call["row_weight"] = used / items
        return call

    def compared(self, student: int, teacher: int) -> int:
        """How many ids the two are compared on."""
        if student == teacher:
            return student
        if self.vocabulary == "refuse":
            raise ValueError(f"expected vocabularies of one size, got {student} (student) and {teacher} (teacher)")
        if self.vocabulary == "mask" and student > teacher:
            for term in self.terms:
                if self.holds(term, term.divergence.needs_support):
                    raise ValueError(
                        f'expected vocabulary="cut" for {term.label!r}, which is not defined where the teacher\'s '
                        f"probability is zero, for a student of {student} tokens and a teacher of {teacher}"
                    )
            return student
        few, many = sorted((student, teacher))
        if many > few * (1 + PADDING) and any(term.divergence.shared_vocabulary for term in self.terms):
            _warn_cut(student, teacher)
        return few

    def forget(self) -> None:
        """What is known of calls, and of the options."""
        self._checked_options.forget()
        self._seen.clear()

    def settle_once(self, key: Hashable, student: Head, teacher: Head | None = None) -> None:
        """``settle``, unless the last call was of the same kind, with the same options."""
        if key is None or self._seen.settled != key:
            self.settle(student, teacher)
            self._seen.settled = key

    def settle(self, student: Head, teacher: Head | None = None) -> None:
        """Set what follows from options and heads for the step of this call."""
        (student_scale, student_cap), (teacher_scale, teacher_cap) = (
            (1.0, None) if head is None else head.transform for head in (student, teacher)
        )
        scales = {"student_scale": student_scale, "teacher_scale": teacher_scale}
        fields = self.known_fields()
        limits = [(name, getattr(self, name), fields[name].limits) for term in self.terms for _, name in term.options]
        # At one, nothing is multiplied: all terms then share a softmax.
        limits += [(name, value, (1.0,)) for name, value in {"temperature": self.temperature, **scales}.items()]
        soft = bool(self.terms) and self.weight_soft != 0
        assign(
            self,
            **scales,
            student_cap=student_cap,
            teacher_cap=teacher_cap,
            report=as_report(self.report),
            hard=self.weight_hard != 0,
            soft=soft,
            pinned=tuple((name, float(value)) for name, value, at in limits if value in at),
            gradient_size=self.size_of_gradient(len(student.weight), soft),
        )

    def size_of_gradient(self, vocabulary: int, soft: bool) -> float:
        """Of the largest term: brought near one, it leaves those of smaller ones the digits that they add to it."""
        sizes = [abs(self.weight_hard)]
        for term in self.terms if soft else ():
            weight = abs(self.weight_soft if term.weight is None else self.weight_soft * getattr(self, term.weight))
            sizes.append(weight / vocabulary if term.divergence.averages else weight)
        return max(sizes) or 1.0

    def holds(self, term: Term, when: When) -> bool:
        """Whether something is so for a term, which may hang on one of its options."""
        return when if isinstance(when, bool) else getattr(self, dict(term.options)[when[0]]) == when[1]

    # --- a chunk ---

    def loss_fn(self, outputs: Any, rows: Any, columns: Any = None) -> Any:
        if "own" in rows:
            outputs = self.without_own(outputs, rows["own"][:, None])
        student, reports = self.logits("student", outputs), as_report(self.report)
        total, metrics = student.z.new_zeros(student.z.shape[0]), {}
        sides = self.sides(student, outputs, rows) if self.soft else {}
        for term in self.terms if self.soft else ():
            value = self.value(term, sides, columns)
            if not isinstance(value, Tensor) or value.shape != total.shape:
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"expected {term.label!r} to give a value a row, {tuple(total.shape)}, got {got}")
            metrics[term.label] = value
            if term.divergence.tempered and self.scale_by_t2:
                value = value * self.temperature**2
            weight = self.weight_soft if term.weight is None else self.weight_soft * getattr(self, term.weight)
            total = total + weight * value
        if self.soft and "teacher_agreement" in reports:
            ours, theirs = sides["common"]
            metrics["teacher_agreement"] = (ours.z.detach().argmax(1) == theirs.z.argmax(1)).to(total.dtype)
        if self.hard:
            metrics["ce"] = nll(student.softmax(), rows["target"])
            total = total + self.weight_hard * metrics["ce"]
        if "student_entropy" in reports:
            metrics["student_entropy"] = student.entropy()
        if "tempered_entropy" in reports:
            metrics["tempered_entropy"] = student.entropy(self.inverse_temperature)
        return total, metrics

    def without_own(self, outputs: Any, own: Tensor) -> Any:
        """To a softmax what is left out is a logit of -1e4 on both sides: its probability is zero and its difference
        finite, unlike that of -inf. To a distance of logits it is two zeros."""
        value = -1e4 if any(term.divergence.tempered for term in self.terms) else 0.0
        index = torch.arange(outputs["student"].shape[1], device=own.device)
        return {name: z.masked_fill(index == own, value) for name, z in outputs.items()}

    def logits(self, side: str, outputs: Any) -> Logits:
        z, name, cap = outputs[side], f"{side}_scale", getattr(self, f"{side}_cap")
        if cap is not None:
            return Logits(transform_logits(z, logit_scale=getattr(self, name), softcap=cap))
        return Logits(z if name in dict(self.pinned) else _times(z, getattr(self, name)))

    def sides(self, student: Logits, outputs: Any, rows: Any) -> Sides:
        """Pairs of logits: "whole" vocabularies, and what they have in "common"."""
        teacher = self.logits("teacher", outputs)
        ours, theirs = student, teacher
        more = student.z.shape[1] - teacher.z.shape[1]
        if more > 0 and self.vocabulary == "mask":
            theirs = Logits(F.pad(teacher.z, (0, more), value=-torch.inf))
        elif more > 0:
            ours = Logits(student.z[:, :-more])
        elif more < 0:
            theirs = Logits(teacher.z[:, :more])
        return {"common": (ours, theirs), "whole": (student, teacher)}

    @property
    def inverse_temperature(self) -> Any:
        """What logits are multiplied by; None: nothing."""
        return None if "temperature" in dict(self.pinned) else 1 / self.temperature

    def value(self, term: Term, sides: Sides, columns: Any) -> Tensor:  # (R,)
        """A term, unweighted."""
        pinned, divergence = dict(self.pinned), term.divergence
        options = {name: pinned[a] if a in pinned else getattr(self, a) for name, a in term.options}
        student, teacher = sides["common" if divergence.shared_vocabulary else "whole"]
        if self.holds(term, divergence.takes_head):
            options["embedding"] = columns["embedding"][: student.z.shape[1]]
        factor = self.inverse_temperature if divergence.tempered else None
        if divergence.core is not None:
            return divergence.core(student.softmax(factor), teacher.softmax(factor), **options)
        return divergence.function(student.times(factor), teacher.times(factor), **options)


class Logits:
    """One side's logits in a chunk, and their softmax, formed once for all terms: it reads the whole of them."""

    def __init__(self, z: Tensor) -> None:  # (R, V)
        self.z = z
        self.found: dict[bool, LogProbs] = {}

    def times(self, factor: Any) -> Tensor:
        return self.z if factor is None else _times(self.z, factor)

    def softmax(self, factor: Any = None) -> LogProbs:
        """Of the logits times ``factor``, the inverse temperature: of one value in a step."""
        plain = factor is None
        if plain not in self.found:
            self.found[plain] = normalized(self.times(factor))
        return self.found[plain]

    def entropy(self, factor: Any = None) -> Tensor:  # (R,)
        q = self.softmax(factor)
        return -(q.p * q.log.detach()).sum(1)


Sides: TypeAlias = dict[str, tuple[Logits, Logits]]


def _times(z: Tensor, factor: Any) -> Tensor:
    """``z * factor``, in a form that inductor does not take for a scaled softmax: for that it would read z twice."""
    return floored(z * factor)


@functools.cache  # one warning for two sizes, but an error each time where warnings are errors
def _warn_cut(student: int, teacher: int) -> None:
    warnings.warn(
        f"expected vocabularies of about one size, got {student} tokens (student) and {teacher} (teacher), which are "
        f"compared on their first {min(student, teacher)}: right where these ids mean the same. Cut the wider head "
        '(weight[:size], head.cut(size)) where they do; vocabulary="refuse" makes this an error',
        stacklevel=2,
    )


# --- one divergence --------------------------------------------------------------------------------------------------


class KLDivLoss(DistillationLoss):
    """Forward KL, ``sum_v p log(p/q)``: p the teacher, q the student, both softmax(logits / temperature).

    Covers the teacher's modes. Metrics: "kl", and "ce" with a hard loss.

    Example:
        >>> import torch
        >>> from distill import KLDivLoss
        >>> student, teacher = torch.randn(6, 4, requires_grad=True), torch.randn(6, 8)
        >>> loss = KLDivLoss(temperature=2.0, compiled=False)
        >>> out = loss(student, torch.randn(11, 4), teacher, torch.randn(11, 8))
        >>> out.loss.backward()
        >>> out.metrics["kl"].shape, student.grad.shape
        (torch.Size([6]), torch.Size([6, 4]))

    Reference: Hinton et al., https://arxiv.org/abs/1503.02531
    """

    entry = DIVERGENCES["kl"]


class ReverseKLLoss(DistillationLoss):
    """Reverse KL, ``sum_v q log(q/p)``: seeks a mode of the teacher. Metrics: "reverse_kl".

    Reference: MiniLLM, https://arxiv.org/abs/2306.08543

    Example:
        >>> import torch
        >>> from distill import ReverseKLLoss
        >>> student, teacher = torch.randn(6, 4, requires_grad=True), torch.randn(6, 8)
        >>> heads = torch.randn(11, 4), torch.randn(11, 8)
        >>> loss = ReverseKLLoss(temperature=2.0)
        >>> out = loss(student, heads[0], teacher, heads[1])
        >>> out.loss.backward()
        >>> out.metrics["reverse_kl"].shape
        torch.Size([6])
    """

    entry = DIVERGENCES["reverse_kl"]


class JSDLoss(DistillationLoss):
    """Generalised Jensen-Shannon divergence: ``beta KL(p|m) + (1-beta) KL(q|m)``, ``m = (1-beta) q + beta p``.

    ``beta=0`` is the forward and ``beta=1`` the reverse KL, as in TRL and Liger. Metrics: "jsd".

    Reference: GKD, https://arxiv.org/abs/2306.13649

    Example:
        >>> import torch
        >>> from distill import JSDLoss
        >>> student, teacher = torch.randn(6, 4, requires_grad=True), torch.randn(6, 8)
        >>> heads = torch.randn(11, 4), torch.randn(11, 8)
        >>> loss = JSDLoss(beta=0.1)
        >>> out = loss(student, heads[0], teacher, heads[1])
        >>> out.loss.backward()
        >>> out.metrics["jsd"].shape
        torch.Size([6])
    """

    entry = DIVERGENCES["jsd"]
    beta: float = entry["beta"]


class SkewKLLoss(DistillationLoss):
    """Skew forward KL: ``KL(p | skew p + (1-skew) q)``. Metrics: "skew_kl".

    Reference: DistiLLM, https://arxiv.org/abs/2402.03898

    Example:
        >>> import torch
        >>> from distill import SkewKLLoss
        >>> student, teacher = torch.randn(6, 4, requires_grad=True), torch.randn(6, 8)
        >>> heads = torch.randn(11, 4), torch.randn(11, 8)
        >>> loss = SkewKLLoss(skew=0.1)
        >>> out = loss(student, heads[0], teacher, heads[1])
        >>> out.loss.backward()
        >>> out.metrics["skew_kl"].shape
        torch.Size([6])
    """

    entry = DIVERGENCES["skew_kl"]
    skew: float = entry["skew"]


class SkewReverseKLLoss(DistillationLoss):
    """Skew reverse KL: ``KL(q | (1-skew) p + skew q)``. Metrics: "skew_reverse_kl".

    ``detach_mixture=True`` takes no gradient through the mixture, as DistiLLM-2 does.

    Reference: DistiLLM, https://arxiv.org/abs/2402.03898, and DistiLLM-2, https://arxiv.org/abs/2503.07067

    Example:
        >>> import torch
        >>> from distill import SkewReverseKLLoss
        >>> student, teacher = torch.randn(6, 4, requires_grad=True), torch.randn(6, 8)
        >>> heads = torch.randn(11, 4), torch.randn(11, 8)
        >>> loss = SkewReverseKLLoss(skew=0.1, detach_mixture=True)
        >>> out = loss(student, heads[0], teacher, heads[1])
        >>> out.loss.backward()
        >>> out.metrics["skew_reverse_kl"].shape
        torch.Size([6])
    """

    entry = DIVERGENCES["skew_reverse_kl"]
    skew: float = entry["skew"]
    _: KW_ONLY
    detach_mixture: bool = entry["detach_mixture"]


class TVDLoss(DistillationLoss):
    """Total variation distance: ``1/2 sum_v |p - q|``, between 0 and 1. Metrics: "tvd".

    Reference: f-DISTILL, https://arxiv.org/abs/2307.15190

    Example:
        >>> import torch
        >>> from distill import TVDLoss
        >>> student, teacher = torch.randn(6, 4, requires_grad=True), torch.randn(6, 8)
        >>> heads = torch.randn(11, 4), torch.randn(11, 8)
        >>> loss = TVDLoss()
        >>> out = loss(student, heads[0], teacher, heads[1])
        >>> out.loss.backward()
        >>> out.metrics["tvd"].shape
        torch.Size([6])
    """

    entry = DIVERGENCES["tvd"]


class AlphaBetaLoss(DistillationLoss):
    """alpha-beta divergence, with ``a = ab_alpha``, ``b = ab_beta``, both at least zero and not both zero::

        -1/(a b) sum_v [p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b)]

    and its limits at zero: (1, 0) is the forward KL and (0, 1) the reverse. Metrics: "alpha_beta".

    Reference: ABKD, https://arxiv.org/abs/2505.04560

    Example:
        >>> import torch
        >>> from distill import AlphaBetaLoss
        >>> student, teacher = torch.randn(6, 4, requires_grad=True), torch.randn(6, 8)
        >>> heads = torch.randn(11, 4), torch.randn(11, 8)
        >>> loss = AlphaBetaLoss(ab_alpha=0.2, ab_beta=0.7)
        >>> out = loss(student, heads[0], teacher, heads[1])
        >>> out.loss.backward()
        >>> out.metrics["alpha_beta"].shape
        torch.Size([6])
    """

    entry = DIVERGENCES["alpha_beta"]
    ab_alpha: float = entry["ab_alpha"]
    ab_beta: float = entry["ab_beta"]


class AdaptiveKLLoss(DistillationLoss):
    """Adaptive KL: ``w KL(p|q) + (1-w) KL(q|p)`` with ``w = gap_head / (gap_head + gap_tail)``, detached.

    The head are the teacher's most probable tokens that hold ``head`` of its mass, a gap is ``sum |p - q|`` over them.
    Sorts the vocabulary. Metrics: "adaptive_kl".

    Reference: https://arxiv.org/abs/2404.02657

    Example:
        >>> import torch
        >>> from distill import AdaptiveKLLoss
        >>> student, teacher = torch.randn(6, 4, requires_grad=True), torch.randn(6, 8)
        >>> heads = torch.randn(11, 4), torch.randn(11, 8)
        >>> loss = AdaptiveKLLoss(head=0.5)
        >>> out = loss(student, heads[0], teacher, heads[1])
        >>> out.loss.backward()
        >>> out.metrics["adaptive_kl"].shape
        torch.Size([6])
    """

    entry = DIVERGENCES["adaptive_kl"]
    head: float = entry["head"]


class TAIDLoss(DistillationLoss):
    """Cross-entropy to a target between student and teacher: ``-sum_v p_t log q``,
    ``p_t = softmax((1-t) student.detach() + t teacher)``.

    Move ``loss.t`` from a small value to 1 in training; nothing compiles anew. Its least value is the entropy of p_t,
    not zero. Metrics: "taid".

    Reference: TAID, https://arxiv.org/abs/2501.16937

    Example:
        >>> import torch
        >>> from distill import TAIDLoss
        >>> student, teacher = torch.randn(6, 4, requires_grad=True), torch.randn(6, 8)
        >>> heads = torch.randn(11, 4), torch.randn(11, 8)
        >>> loss = TAIDLoss(t=0.4)
        >>> out = loss(student, heads[0], teacher, heads[1])
        >>> out.loss.backward()
        >>> out.metrics["taid"].shape
        torch.Size([6])
        >>> loss.t = 0.5  # a step later
    """

    entry = DIVERGENCES["taid"]
    t: float = entry["t"]


class CosineSimilarityLoss(DistillationLoss):
    """``1 - cos`` of the student's and the teacher's logits, without temperature. Metrics: "cosine".

    Example:
        >>> import torch
        >>> from distill import CosineSimilarityLoss
        >>> student, teacher = torch.randn(6, 4, requires_grad=True), torch.randn(6, 8)
        >>> heads = torch.randn(11, 4), torch.randn(11, 8)
        >>> loss = CosineSimilarityLoss()
        >>> out = loss(student, heads[0], teacher, heads[1])
        >>> out.loss.backward()
        >>> out.metrics["cosine"].shape
        torch.Size([6])
    """

    entry = DIVERGENCES["cosine"]


class LogitMSELoss(DistillationLoss):
    """Mean squared difference of the logits, ``mean_v (student_v - teacher_v)^2``, without temperature. Metrics: "mse".

    Reference: https://arxiv.org/abs/2105.08919

    Example:
        >>> import torch
        >>> from distill import LogitMSELoss
        >>> student, teacher = torch.randn(6, 4, requires_grad=True), torch.randn(6, 8)
        >>> heads = torch.randn(11, 4), torch.randn(11, 8)
        >>> loss = LogitMSELoss()
        >>> out = loss(student, heads[0], teacher, heads[1])
        >>> out.loss.backward()
        >>> out.metrics["mse"].shape
        torch.Size([6])
    """

    entry = DIVERGENCES["mse"]


class EarthMoverLoss(DistillationLoss):
    """Earth mover's distance over token ids: ``sum_k |C_q(k) - C_p(k)| / (V-1)``, C the cumulative probabilities.

    ``p=2`` squares the differences: the Cramér distance. **The order of token ids carries no meaning**: this costs
    probability by how far its id is away, which is right where columns are ordered (bins, ratings), and for a
    vocabulary at most a smoothed total variation. Metrics: "earth_mover".

    Reference: https://arxiv.org/abs/1705.10743 (Cramér distance)

    Example:
        >>> import torch
        >>> from distill import EarthMoverLoss
        >>> student, teacher = torch.randn(6, 4, requires_grad=True), torch.randn(6, 8)
        >>> heads = torch.randn(11, 4), torch.randn(11, 8)
        >>> loss = EarthMoverLoss(p=2)
        >>> out = loss(student, heads[0], teacher, heads[1])
        >>> out.loss.backward()
        >>> out.metrics["earth_mover"].shape
        torch.Size([6])
    """

    entry = DIVERGENCES["earth_mover"]
    p: int = entry["p"]


class KVDLoss(DistillationLoss):
    """Kernel distance between the distributions (squared MMD): ``(q-p)' K (q-p)``.

    ``kernel="linear"``: K holds the cosine similarities of the teacher head's rows, so that tokens which the teacher
    thinks alike count as near; two more products with that head, in its dtype. ``kernel="delta"``: K is the identity,
    ``sum_v (q-p)^2``. Metrics: "kvd".

    The RFC that asks for KVD names it without defining it; this is our reading. If you came for total variation, that
    is ``TVDLoss``. Reference for the distance: https://jmlr.org/papers/v13/gretton12a.html

    Example:
        >>> import torch
        >>> from distill import KVDLoss
        >>> student, teacher = torch.randn(6, 4, requires_grad=True), torch.randn(6, 8)
        >>> heads = torch.randn(11, 4), torch.randn(11, 8)
        >>> loss = KVDLoss(kernel="linear")
        >>> out = loss(student, heads[0], teacher, heads[1])
        >>> out.loss.backward()
        >>> out.metrics["kvd"].shape
        torch.Size([6])
    """

    entry = DIVERGENCES["kvd"]
    kernel: str = entry["kernel"]


class ULDLoss(DistillationLoss):
    """Universal logit distillation, across tokenizers: ``sum_v |sort(q) - sort(p)|``, the shorter vocabulary padded
    with zeros.

    Blind to which token is which, so not for a shared vocabulary. The tokens of the two sides must be aligned by the
    caller: one hidden state of each to a row. Sorts both vocabularies. Metrics: "uld".

    Reference: https://arxiv.org/abs/2402.12030

    Example:
        >>> import torch
        >>> from distill import ULDLoss
        >>> student, teacher = torch.randn(6, 4, requires_grad=True), torch.randn(6, 8)
        >>> loss = ULDLoss()
        >>> loss(student, torch.randn(11, 4), teacher, torch.randn(23, 8)).loss.backward()  # two vocabularies
    """

    entry = DIVERGENCES["uld"]


# --- several ---------------------------------------------------------------------------------------------------------


class DistillLoss(DistillationLoss):
    """A weighted sum of divergences over one pair of logits, with a metric for each.

        DistillLoss([("ce", 0.5), ("reverse_kl", 0.4), ("tvd", 0.1)], temperature=2.0)
        DistillLoss([("jsd", 1.0, {"beta": 0.1}), (my_divergence, 0.5, {"margin": 0.2})])

    Args:
        temperature, options: as for ``DistillationLoss``, but for ``weight_hard`` and ``weight_soft``.
        terms: (name or function, weight) or (name or function, weight, keywords). Names are those of
            ``divergences.DIVERGENCES`` and "ce", the hard loss. A function of yours takes ``(student, teacher)``
            logits ``(R, V)`` divided by the temperature, and keywords, and returns ``(R,)``; define it once, at module
            level. A ``Divergence`` says more about a function.
        loss_fn: a function of yours alone, short for ``[(loss_fn, 1.0)]``.

    The numbers of a term are attributes that begin with its label: ``loss.jsd_beta``, ``loss.tvd_weight``; the weight
    of "ce" is ``weight_hard``. Metrics go by label: the name, and for a second term of that name ``jsd_2``.

    Example:
        >>> import torch
        >>> from distill import DistillLoss
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
        temperature: float = DistillationLoss.fields["temperature"].default,
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
        given = [(loss_fn, 1.0)] if terms is None else list(terms)
        if not given:
            raise ValueError("expected terms [(name, weight), ...], got none")
        super().__init__(temperature=temperature, **options)
        made: list[Term] = []
        hard: float | None = None
        for kind, weight, keywords in map(_read, given):
            if kind == "ce":
                if hard is not None or keywords:
                    raise ValueError('expected one term "ce", without keywords')
                self.weight_hard = hard = weight
                continue
            base = kind if isinstance(kind, str) else name_of(kind)
            labels, label, n = {"ce", *REPORTS, *(term.label for term in made)}, base, 2
            while label in labels:
                label, n = f"{base}_{n}", n + 1
            term = self.make_term(kind, keywords, label, prefix=f"{label}_")
            self.add_field(f"{label}_weight", number(weight), weight)
            made.append(term._replace(weight=f"{label}_weight"))
        self.set_terms(made)
        self.check()


def _read(given: Any) -> tuple[Any, float, Mapping[str, Any]]:
    """A term of ``DistillLoss``."""
    if not isinstance(given, (tuple, list)) or len(given) not in (2, 3):
        raise ValueError(f"expected a term (name or function, weight[, keywords]), got {given!r}")
    kind, weight, keywords = (*given, {}) if len(given) == 2 else given
    if not isinstance(keywords, Mapping):
        raise TypeError(f"expected the keywords of {kind!r} as a dict, got {keywords!r}")
    return kind, checks.number(f"the weight of {kind!r}", weight), keywords
