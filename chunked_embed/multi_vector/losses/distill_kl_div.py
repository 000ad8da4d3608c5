"""DistillKLDiv of late interaction: the teacher's distribution over each query's candidates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from chunked_embed import checks
from chunked_embed.checks import POSITIVE
from chunked_embed.functional.arguments import widened
from chunked_embed.gather import gather_rows
from chunked_embed.losses._base import OF_MINI_BATCHES
from chunked_embed.losses._pairwise import AlignedLoss
from chunked_embed.losses.distill_kl_div import DistillKLDivLoss
from chunked_embed.multi_vector.losses._base import MultiVectorLoss, check_scores
from chunked_embed.multi_vector.losses._compat import (
    MultiVectorEncoder,
    check_teacher_targets,
    library,
    stack_padded_token_embeddings,
)


class MultiVectorDistillKLDivLoss(MultiVectorLoss, AlignedLoss, library.MultiVectorDistillKLDivLoss):
    """``T_s^2 * mean over queries of KL(softmax(teacher / T_t) || softmax(MaxSim(query, candidates) / T_s))``. See
    :func:`chunked_embed.functional.max_sim_pairs`.

    Args:
        model: The MultiVectorEncoder to train.
        similarity_fct: Scores of queries with lists of candidates, (N, Q, H), (N, K, D, H) -> (N, K), as the library
            calls it. None is ``scoring.colbert_kd_scores``. That, ``mean_colbert_kd_scores``, ``xtr_kd_scores`` and
            ``XTRKDScores``, and a ``functools.partial`` of settings of these, are computed here; any other callable is
            called.
        temperature: What both sides' scores are divided by.
        student_temperature: Instead of ``temperature`` for the student, ``T_s``.
        teacher_temperature: Instead of ``temperature`` for the teacher, ``T_t``.
        mini_batch_size: Rows of a forward pass, all of whose activations are held.
        options: ``gather_across_devices`` (XTR retrieves from the documents of all processes, then) and
            ``max_chunk_bytes``: see :class:`~chunked_embed.losses.Options`.

    Inputs: a query and K >= 2 candidates; labels are the teacher's scores, (N, K), -inf for one that is out.

    Reference: https://huggingface.co/papers/2010.11386

    Example:
        >>> import torch
        >>> from chunked_embed.multi_vector import losses
        >>> loss = losses.MultiVectorDistillKLDivLoss(model=None, temperature=0.25)  # of given embeddings
        >>> queries = torch.randn(8, 5, 16, requires_grad=True)  # tokens, as a model gives them
        >>> candidates = [torch.randn(8, 9, 16, requires_grad=True) for _ in range(4)]
        >>> loss.compute_loss_from_embeddings([queries, *candidates], torch.rand(8, 4)).backward()
    """

    _layout = "lists"
    _checked_teacher_scale: bool
    _columns = 3, "a query and two or more candidates: the distribution over one is constant"

    def __init__(
        self,
        model: MultiVectorEncoder,
        *,
        similarity_fct: Callable[..., Tensor] | None = None,
        temperature: float = 1.0,
        student_temperature: float | None = None,
        teacher_temperature: float | None = None,
        mini_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        checks.function_or_none("similarity_fct", similarity_fct)
        checks.number("temperature", temperature, POSITIVE)
        checks.number_or_none("student_temperature", student_temperature, POSITIVE)
        checks.number_or_none("teacher_temperature", teacher_temperature, POSITIVE)
        super().__init__(
            model,
            similarity_fct=similarity_fct,
            temperature=temperature,
            student_temperature=student_temperature,
            teacher_temperature=teacher_temperature,
        )
        self._set_options(mini_batch_size=mini_batch_size, **options)

    _teacher_scores = DistillKLDivLoss._teacher_scores

    def _teacher(self, labels: Tensor | None, rows: int, candidates: int) -> Tensor:  # (N, K), logarithms
        labels = self._teacher_scores(labels, rows, candidates)
        scores = widened(labels) if labels.is_floating_point() else labels.float()
        logs = torch.log_softmax(scores / self.teacher_temperature, dim=1)
        if not self._checked_teacher_scale:
            self._checked_teacher_scale = True  # once, since it waits for the device
            check_teacher_targets(logs.exp(), labels, self.teacher_temperature, type(self).__name__)
        return logs

    def _masked_loss(self, embeddings: list[Tensor], masks: list[Tensor], labels: Tensor | None) -> Tensor:
        rows, candidates = len(embeddings[0]), len(embeddings) - 1
        teacher = self._teacher(labels, rows, candidates)
        scores = self._lists(embeddings, masks)
        # Finite: a candidate that is out has a probability of zero, and zero times infinity is no number.
        teacher = teacher.to(scores.dtype).clamp_min(torch.finfo(scores.dtype).min)
        if self.gather_across_devices:
            scores, teacher = gather_rows(scores, teacher)
        student = torch.log_softmax(scores / self.student_temperature, dim=1)
        return self.loss_function(student, teacher) * self.student_temperature**2

    def _lists(self, embeddings: list[Tensor], masks: list[Tensor]) -> Tensor:  # (N, K)
        score = self._known
        if score is not None:
            scores = self._own_max_sim if score.top_k is None else self._own_xtr
            return scores(score, embeddings, masks)
        stacked, mask = stack_padded_token_embeddings(embeddings[1:], masks[1:])
        found = self.similarity_fct(embeddings[0], stacked, queries_mask=masks[0], documents_mask=mask)
        return widened(check_scores(found, tuple(stacked.shape[:2]), "a score of each query with its candidates"))


class CachedMultiVectorDistillKLDivLoss(MultiVectorDistillKLDivLoss):
    """:class:`MultiVectorDistillKLDivLoss` with gradient caching, which the library has for none of its losses of
    teachers: the batch is embedded in mini-batches, twice, and the activations of one are held.

    Args:
        mini_batch_size: Rows of a mini-batch. None, set later, embeds at once.
        mini_batch_num_tokens: The same, in mini-batches of at most this many tokens.
        show_progress_bar: Show one while mini-batches are embedded.
        model, similarity_fct, temperature, student_temperature, teacher_temperature, options: As there.

    References: https://huggingface.co/papers/2010.11386, https://huggingface.co/papers/2101.06983

    Example:
        >>> import torch
        >>> from chunked_embed.multi_vector import losses
        >>> loss = losses.CachedMultiVectorDistillKLDivLoss(model=None, mini_batch_size=16)
        >>> queries = torch.randn(8, 5, 16, requires_grad=True)  # tokens, as a model gives them
        >>> candidates = [torch.randn(8, 9, 16, requires_grad=True) for _ in range(4)]
        >>> loss.compute_loss_from_embeddings([queries, *candidates], torch.rand(8, 4)).backward()
    """

    _takes: ClassVar[tuple[str, ...]] = (*MultiVectorLoss._takes, *OF_MINI_BATCHES[1:])
    _own_options: ClassVar[tuple[str, ...]] = _takes
    _caches = True

    def __init__(
        self,
        model: MultiVectorEncoder,
        *,
        similarity_fct: Callable[..., Tensor] | None = None,
        temperature: float = 1.0,
        student_temperature: float | None = None,
        teacher_temperature: float | None = None,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        show_progress_bar: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(
            model,
            similarity_fct=similarity_fct,
            temperature=temperature,
            student_temperature=student_temperature,
            teacher_temperature=teacher_temperature,
            mini_batch_size=mini_batch_size,
            mini_batch_num_tokens=mini_batch_num_tokens,
            show_progress_bar=show_progress_bar,
            **options,
        )
