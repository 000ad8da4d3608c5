"""``TopKLoss``: a teacher of whom only the top log-probabilities were kept, as a dataset's columns hold them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from chunked_embed import ChunkPlan, FlexChunkLoss, Head, LossOutput, checks
from chunked_embed.checks import POSITIVE
from chunked_embed.fields import KW_ONLY, assign, choice, number
from chunked_embed.signatures import with_arguments_of

from .divergences import FLOOR
from .losses import DistillationLoss, Extra, Logits, Sides, Term, as_report


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

    Example:
        >>> import torch
        >>> from distill import TopKLoss
        >>> hidden, head = torch.randn(6, 4, requires_grad=True), torch.randn(11, 4)
        >>> of_teacher = torch.randn(6, 11).log_softmax(1)  # as a file has it: its top 3
        >>> logprobs, ids = of_teacher.topk(3)
        >>> loss = TopKLoss("kl", tail="bucket")
        >>> loss(hidden, head, ids, logprobs).loss.backward()
    """

    divergence: str = "kl"
    tail: str = choice("bucket", ("bucket", "renorm", "zero"))
    _: KW_ONLY
    teacher_temperature: float = number(1.0, POSITIVE)
    divergence_options: Mapping[str, Any] | None = None

    def setup(self) -> None:
        if not isinstance(self.divergence, str):
            raise TypeError(f"expected the name of a divergence, got {self.divergence!r}")
        for name in ("vocabulary", "teacher_logit_scale", "teacher_softcap"):
            if getattr(self, name) != self.fields[name].default:
                raise TypeError(f"expected no {name}: the teacher is what was kept of it")
        term = self.make_term(self.divergence, self.divergence_options or {})
        kind = term.divergence
        if not (kind.shared_vocabulary and kind.tempered and kind.tokenwise):
            raise ValueError(f"expected a divergence of probabilities token by token, got {self.divergence!r}")
        self.set_terms([term])

    def check(self) -> None:
        super().check()
        (term,) = self.terms
        if self.tail == "zero" and term.label != "kl":
            raise ValueError(f'expected divergence "kl" with tail="zero", got {term.label!r}')
        if "teacher_agreement" in as_report(self.report):
            raise ValueError("expected report without teacher_agreement, which needs the teacher's logits")
        if self.tail != "renorm" and self.teacher_temperature != self.temperature:
            raise ValueError(
                f'expected log-probabilities at the temperature of the loss, {self.temperature} (tail="{self.tail}": '
                "the rest of the vocabulary is not there to change it), got teacher_temperature="
                f"{self.teacher_temperature}"
            )
        if self.tail == "renorm" and self.holds(term, term.divergence.needs_support):
            raise ValueError(f'expected tail="bucket" for {term.label!r}: it is infinite where p is zero')

    def settle(self, student: Head, teacher: Head | None = None) -> None:
        super().settle(student, teacher)
        of_tail = 0 if self.tail == "zero" else 8  # the student's others, padded and then scattered into
        assign(self, workspace_bytes=self.terms[0].divergence.workspace_bytes + of_tail)

    def size_of_gradient(self, vocabulary: int, soft: bool) -> float:
        return 1.0  # of few tokens, whatever the divergence

    def prepare(  # type: ignore[override]
        self,
        student_hidden: Tensor | Head,  # (..., H)
        student_weight: Tensor | None = None,  # (V, H)
        teacher_ids: Tensor | None = None,  # (..., K)
        teacher_logprobs: Tensor | None = None,  # (..., K)
        target: Tensor | None = None,  # (...)
        student_bias: Tensor | None = None,  # (V,)
        *,
        num_items: float | Tensor | None = None,
        student_extra: Extra = (),
    ) -> Any:
        """The mean over valid tokens, and metrics; gradients for the student's tensors that require one.

        As for the other losses (``DistillationLoss.prepare``), with ids and log-probabilities in place of the teacher.
        ``loss(student, teacher_ids, teacher_logprobs, target=labels)`` takes a ``Head`` of the student.

        Args:
            student_hidden, student_weight, student_bias: hidden states and LM head; or a ``Head`` alone.
            teacher_ids, teacher_logprobs: of the K tokens that were kept of the teacher.
            target, num_items, student_extra: as for the other losses.
        """
        if isinstance(student_hidden, Head) and student_weight is not None:  # by position, behind the one head
            if teacher_logprobs is not None:
                raise TypeError("expected what follows a Head, ids and log-probabilities by name, got one too many")
            student_weight, teacher_ids, teacher_logprobs = None, student_weight, teacher_ids
        sides = student_hidden, student_weight, student_bias, teacher_ids, teacher_logprobs
        known, key = self.recall(*sides, student_extra, target)
        student = self.head_of("student", student_hidden, student_weight, student_bias, student_extra, known=known)
        self.settle_once(key, student)
        call = self.of_student(student, target, num_items, known, weighs=self.soft)
        if self.soft:
            if not known:
                self.check_teacher(student, teacher_ids, teacher_logprobs)
            assert teacher_ids is not None and teacher_logprobs is not None
            teacher = Kept(teacher_ids, teacher_logprobs.detach(), call["row_weight"], len(student.weight), self.tail)
            call["row_weight"] = teacher.checked_weight()
            call["rows"] |= {"ids": teacher.ids, "logprobs": teacher.logprobs}
        try:
            prepared = FlexChunkLoss.prepare(self, **call)
        except ValueError:
            if self.soft:
                teacher.refuse()
            raise
        self._seen.keep(key)
        return prepared

    @with_arguments_of(prepare)
    def forward(self, *arguments: Any, **keywords: Any) -> LossOutput:  # type: ignore[override]
        return super().forward(*arguments, **keywords)

    @with_arguments_of(prepare)
    def plan(self, *arguments: Any, **keywords: Any) -> ChunkPlan:  # type: ignore[override]
        """What ``forward`` with the same arguments will do: print it before running."""
        return super().plan(*arguments, **keywords)

    def check_teacher(self, student: Head, ids: Any, logprobs: Any) -> None:
        """What shows without looking at values."""
        leading, device = tuple(student.hidden.shape[:-1]), student.hidden.device
        checks.tensor("teacher_ids", ids, (*leading, "K"), device=device, kind="integer")
        checks.tensor("teacher_logprobs", logprobs, tuple(ids.shape), device=device, kind="floating")
        if not ids.shape[-1]:
            raise ValueError(f"expected teacher_ids of one entry a token or more, got {tuple(ids.shape)}")

    def sides(self, student: Logits, outputs: Any, rows: Any) -> Sides:
        """Logits whose softmax at the loss's temperature are the few probabilities: log-probabilities, times it."""
        log_p = rows["logprobs"].to(student.z.dtype)
        there = log_p > -torch.inf
        index = rows["ids"].long().clamp(0, student.z.shape[1] - 1)
        z = student.z / self.temperature
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
            log_p = log_p * (self.teacher_temperature / self.temperature)
            log_p_tail = torch.full_like(log_q_tail, -torch.inf)
        else:
            log_p_tail = _log_rest(log_p)
        ours, theirs = torch.cat([log_q, log_q_tail], 1), torch.cat([log_p, log_p_tail], 1)
        return {"common": (Logits(ours * self.temperature), Logits(theirs * self.temperature))}

    def value(self, term: Term, sides: Sides, columns: Any) -> Tensor:
        if self.tail != "zero":
            return super().value(term, sides, columns)
        log_q, log_p = (side.z.clamp_min(FLOOR) for side in sides["common"])
        return (log_p.exp() * (log_p - log_q)).sum(1)


class Kept(NamedTuple):
    """What was kept of a teacher, beside what each token counts."""

    ids: Tensor  # (..., K)
    logprobs: Tensor  # (..., K)
    row_weight: Tensor  # (...)
    vocabulary: int
    tail: str

    def wrong(self) -> tuple[Tensor, Tensor, Tensor]:
        """Entries whose id is none; tokens whose probabilities are none, and, where one is needed, without an entry."""
        there = self.logprobs > -torch.inf
        outside = there & ((self.ids < 0) | (self.ids >= self.vocabulary))
        # A twentieth more than one: what half precision may round up to.
        total = self.logprobs.to(self.row_weight.dtype).exp().sum(-1)
        empty = there.any(-1).logical_not() if self.tail == "renorm" else torch.zeros_like(total, dtype=torch.bool)
        return outside, (total < 1.05).logical_not(), empty

    def checked_weight(self) -> Tensor:
        """What each token counts: NaN where the teacher is wrong about one that counts, which the engine refuses after
        its one transfer."""
        outside, wrong, empty = self.wrong()
        refused = (outside.any(-1) | wrong | empty) & (self.row_weight != 0)
        return self.row_weight.masked_fill(refused, torch.nan)

    def refuse(self) -> None:
        """In a sentence, if the teacher is wrong. Waits for the device."""
        used = self.row_weight != 0
        outside, wrong, empty = self.wrong()
        found = [(outside & used[..., None]).sum(), (wrong & used).sum(), (empty & used).sum()]
        n_outside, n_wrong, n_empty = torch.stack(found).tolist()
        if n_outside:
            raise ValueError(f"expected teacher_ids in [0, {self.vocabulary}), got {n_outside} outside")
        if n_wrong:
            raise ValueError(
                "expected teacher_logprobs to be logarithms of probabilities, which sum to one at most, "
                f"got others for {n_wrong} tokens"
            )
        if n_empty:
            raise ValueError(f"expected an entry or more for each token that counts, got {n_empty} without")


def _log_rest(log_probs: Tensor) -> Tensor:  # (R, K) -> (R, 1)
    """``log(1 - sum exp)``: what a few probabilities leave, at least the rounding error of their sum."""
    rest = -torch.expm1(log_probs.logsumexp(1, keepdim=True))
    return rest.clamp_min(torch.finfo(log_probs.dtype).tiny).log()
