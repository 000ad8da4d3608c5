"""DistillKLDiv: the teacher's distribution over each query's candidates."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from chunked_embed import checks
from chunked_embed.checks import POSITIVE
from chunked_embed.engine.types import accumulator_dtype
from chunked_embed.functional.arguments import widened
from chunked_embed.gather import gather_rows
from chunked_embed.losses._compat import SentenceTransformer, callable_name, check_teacher_targets, library, util
from chunked_embed.losses._pairwise import SimilarityLoss


class DistillKLDivLoss(SimilarityLoss, library.DistillKLDivLoss):
    """``T_s^2 * mean over queries of KL(softmax(teacher / T_t) || softmax(s(query, candidates) / T_s))``.

    Args:
        model: The SentenceTransformer to train.
        similarity_fct: Similarity of two aligned batches, (N, D), (N, D) -> (N,). The ``pairwise_*`` functions of
            ``sentence_transformers.util`` run fused and chunked, any other callable through ordinary autograd.
        temperature: What both sides' scores are divided by.
        student_temperature: Instead of ``temperature`` for the student, ``T_s``.
        teacher_temperature: Instead of ``temperature`` for the teacher, ``T_t``.
        options: See :class:`~chunked_embed.losses.Options`.

    Inputs: a query and K >= 2 candidates; labels are the teacher's scores, (N, K), -inf for one that is out.

    Reference: https://huggingface.co/papers/2010.11386

    Example:
        >>> import torch
        >>> from sentence_transformers import SentenceTransformer
        >>> from chunked_embed import losses
        >>> model = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")
        >>> loss = losses.DistillKLDivLoss(model, temperature=2.0)
        >>> anchor, positive, negative = (torch.randn(8, 384, requires_grad=True) for _ in range(3))
        >>> loss.compute_loss_from_embeddings([anchor, positive, negative], torch.rand(8, 2)).backward()
    """

    def __init__(
        self,
        model: SentenceTransformer,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = util.pairwise_dot_score,
        temperature: float = 1.0,
        student_temperature: float | None = None,
        teacher_temperature: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, similarity_fct, temperature)
        # The library has the two overrides since 6.x, as numbers; before, all follow what temperature is at a call.
        default = temperature if hasattr(self, "student_temperature") else None
        self.student_temperature = default if student_temperature is None else student_temperature
        self.teacher_temperature = default if teacher_temperature is None else teacher_temperature
        for name in ("temperature", "student_temperature", "teacher_temperature"):
            if getattr(self, name) is not None:
                checks.number(name, getattr(self, name), POSITIVE)
        self._set_options(**options)

    def _temperatures(self) -> tuple[float, float]:
        """Of the student, and of the teacher."""
        both = self.student_temperature, self.teacher_temperature
        student, teacher = (self.temperature if given is None else given for given in both)
        return student, teacher

    def _size(self, rows: int, width: int, columns: int) -> float:
        known = self._similarity and type(self.loss_fct) is nn.KLDivLoss
        return rows * width * (columns - 2) if columns >= 3 and known else math.inf

    def _for_library(self, columns: list[Tensor], labels: Tensor | None) -> Tensor:
        labels = self._teacher_scores(labels, columns[0].shape[0], len(columns) - 1)
        dtype = accumulator_dtype(columns[0].dtype)
        if labels.dtype is torch.float64 and dtype is torch.float32:  # what they differ by is all that counts of them
            largest = labels.amax(dim=1, keepdim=True)
            labels = labels - largest.nan_to_num(posinf=0.0, neginf=0.0)
        return labels if labels.dtype is dtype else labels.to(dtype)

    def _teacher_scores(self, labels: Tensor | None, rows: int, candidates: int) -> Tensor:  # (N, K)
        labels = self._labels(labels)
        if labels.shape != (rows, candidates):
            raise ValueError(
                f"{type(self).__name__} expects the teacher's scores of {candidates} candidates, "
                f"{(rows, candidates)}, got {tuple(labels.shape)}"
            )
        return labels

    def _teacher(self, labels: Tensor | None, rows: int, candidates: int) -> Tensor:  # (N, K)
        labels = self._teacher_scores(labels, rows, candidates)
        _, temperature = self._temperatures()
        probabilities = torch.softmax(widened(labels) / temperature, dim=1)
        if check_teacher_targets and not vars(self).get("_checked_teacher_scale"):
            self._checked_teacher_scale = True  # once, since it waits for the device
            check_teacher_targets(probabilities, labels, temperature, type(self).__name__)
        return probabilities

    def _loss(self, embeddings: list[Tensor], labels: Tensor | None, **projection: Any) -> Tensor:
        if len(embeddings) < 3:
            raise ValueError(
                f"{type(self).__name__} expects a query and at least two candidates (the distribution over one is "
                f"constant), got {len(embeddings)} columns"
            )
        query, *candidates = embeddings
        teacher = self._teacher(labels, len(query), len(candidates))
        scores = self._candidate_scores(query, candidates, projection)
        teacher = teacher.to(scores.dtype)
        if self.gather_across_devices:
            scores, teacher = gather_rows(scores, teacher)
        temperature, _ = self._temperatures()
        return self.loss_fct(torch.log_softmax(scores / temperature, dim=1), teacher) * temperature**2

    def get_config_dict(self) -> dict[str, Any]:
        temperatures = {name: getattr(self, name) for name in ("student_temperature", "teacher_temperature")}
        return {
            "similarity_fct": callable_name(self.similarity_fct),
            "temperature": self.temperature,
            **{name: value for name, value in temperatures.items() if value not in (None, self.temperature)},
            **self._changed_options(),
        }
