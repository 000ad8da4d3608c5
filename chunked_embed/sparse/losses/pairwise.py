"""Losses over aligned rows of sparse embeddings: those of ``chunked_embed.losses``, inside of another loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from chunked_embed.losses._base import Small
from chunked_embed.losses._compat import SparseEncoder, sparse_library, util
from chunked_embed.losses._kinds import check_model
from chunked_embed.losses.cosent import CoSENTLoss
from chunked_embed.losses.cosine_similarity import CosineSimilarityLoss
from chunked_embed.losses.distill_kl_div import DistillKLDivLoss
from chunked_embed.losses.margin_mse import MarginMSELoss
from chunked_embed.losses.triplet import TripletLoss
from chunked_embed.sparse.losses._inside import Inside

WIDE = Small(cpu=1 << 20, gpu=1 << 25, autocast=1 << 25)
"""Of rows as wide as a vocabulary: a thousand of them, where functions are compiled and no kernel has them."""


class SparseCoSENTLoss(Inside, CoSENTLoss, sparse_library.SparseCoSENTLoss):
    """``log(1 + sum over y_i < y_j of exp(s_i - s_j))`` with ``s = scale * similarity(a, b)``:
    :class:`chunked_embed.losses.CoSENTLoss` inside of :class:`SpladeLoss` or :class:`CSRLoss`. The model's similarity
    becomes the cosine.

    Args:
        model: The SparseEncoder to train.
        scale, similarity_fct: As there.
        options: ``gather_across_devices`` and those of chunks: see :class:`~chunked_embed.losses.Options`.

    Inputs: two columns and a label per pair, (N,), any numbers that can be ordered.

    Example:
        >>> import torch
        >>> from sentence_transformers import SparseEncoder
        >>> from chunked_embed.sparse import losses
        >>> model = SparseEncoder("sentence-transformers/all-MiniLM-L6-v2")
        >>> loss = losses.SparseCoSENTLoss(model)
        >>> a, b = (torch.rand(8, 512, requires_grad=True) for _ in range(2))  # embeddings, as a model gives them
        >>> loss.compute_loss_from_embeddings([a, b], torch.rand(8)).backward()
    """

    def __init__(
        self,
        model: SparseEncoder,
        scale: float = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = util.pairwise_cos_sim,
        **options: Any,
    ) -> None:
        check_model(model)
        super().__init__(model, scale, similarity_fct, **options)
        model.similarity_fn_name = "cosine"


class SparseAnglELoss(SparseCoSENTLoss, sparse_library.SparseAnglELoss):
    """``log(1 + sum over y_i < y_j of exp(s_i - s_j))`` with ``s = scale * angle similarity(a, b)``, inside of
    :class:`SpladeLoss` or :class:`CSRLoss`. Of two columns, as the library's class is: it has no form for triplets.

    Args:
        model: The SparseEncoder to train.
        scale: Factor on the similarity.
        options: ``gather_across_devices`` and those of chunks: see :class:`~chunked_embed.losses.Options`.

    Inputs: two columns and a label per pair.

    Reference: https://huggingface.co/papers/2309.12871

    Example:
        >>> import torch
        >>> from sentence_transformers import SparseEncoder
        >>> from chunked_embed.sparse import losses
        >>> model = SparseEncoder("sentence-transformers/all-MiniLM-L6-v2")
        >>> loss = losses.SparseAnglELoss(model)
        >>> a, b = (torch.rand(8, 512, requires_grad=True) for _ in range(2))  # embeddings, as a model gives them
        >>> loss.compute_loss_from_embeddings([a, b], torch.rand(8)).backward()
    """

    def __init__(self, model: SparseEncoder, scale: float = 20.0, **options: Any) -> None:
        super().__init__(model, scale, util.pairwise_angle_sim, **options)


class SparseCosineSimilarityLoss(Inside, CosineSimilarityLoss, sparse_library.SparseCosineSimilarityLoss):
    """``loss_fct(cos_score_transformation(cos(a, b)), labels)``, by default the mean squared error:
    :class:`chunked_embed.losses.CosineSimilarityLoss` inside of :class:`SpladeLoss` or :class:`CSRLoss`. The model's
    similarity becomes the cosine.

    Args:
        model: The SparseEncoder to train.
        loss_fct, cos_score_transformation: As there.
        options: ``gather_across_devices`` and those of chunks: see :class:`~chunked_embed.losses.Options`.

    Inputs: two columns and a number per pair, (N,), often in [0, 1].

    Example:
        >>> import torch
        >>> from sentence_transformers import SparseEncoder
        >>> from chunked_embed.sparse import losses
        >>> model = SparseEncoder("sentence-transformers/all-MiniLM-L6-v2")
        >>> loss = losses.SparseCosineSimilarityLoss(model)
        >>> a, b = (torch.rand(8, 512, requires_grad=True) for _ in range(2))  # embeddings, as a model gives them
        >>> loss.compute_loss_from_embeddings([a, b], torch.rand(8)).backward()
    """

    def __init__(
        self,
        model: SparseEncoder,
        loss_fct: nn.Module = nn.MSELoss(),  # noqa: B008 (the library's own defaults)
        cos_score_transformation: nn.Module = nn.Identity(),  # noqa: B008
        **options: Any,
    ) -> None:
        check_model(model)
        super().__init__(model, loss_fct, cos_score_transformation, **options)


class SparseTripletLoss(Inside, TripletLoss, sparse_library.SparseTripletLoss):
    """``mean(relu(d(anchor, positive) - d(anchor, negative) + margin))``: :class:`chunked_embed.losses.TripletLoss`
    inside of :class:`SpladeLoss` or :class:`CSRLoss`.

    Args:
        model: The SparseEncoder to train.
        distance_metric, triplet_margin: As there.
        options: ``gather_across_devices`` and those of chunks: see :class:`~chunked_embed.losses.Options`.

    Inputs: three columns (anchor, positive, negative); labels are ignored.

    Example:
        >>> import torch
        >>> from sentence_transformers import SparseEncoder
        >>> from chunked_embed.sparse import losses
        >>> model = SparseEncoder("sentence-transformers/all-MiniLM-L6-v2")
        >>> loss = losses.SparseTripletLoss(model, triplet_margin=1.0)
        >>> anchor, positive, negative = (torch.rand(8, 512, requires_grad=True) for _ in range(3))
        >>> loss.compute_loss_from_embeddings([anchor, positive, negative]).backward()
    """

    _small = WIDE


class SparseMarginMSELoss(Inside, MarginMSELoss, sparse_library.SparseMarginMSELoss):
    """``mean((s(query, positive) - s(query, negative_k) - margin_k)^2)`` over queries and negatives:
    :class:`chunked_embed.losses.MarginMSELoss` inside of :class:`SpladeLoss` or :class:`CSRLoss`.

    Args:
        model: The SparseEncoder to train.
        similarity_fct: As there.
        options: ``gather_across_devices`` and those of chunks: see :class:`~chunked_embed.losses.Options`.

    Inputs: a query, a positive and K negatives; labels are the teacher's margins, (N, K) or, for one negative, (N,), or
    its scores of the positive and the negatives, (N, K + 1).

    Example:
        >>> import torch
        >>> from sentence_transformers import SparseEncoder
        >>> from chunked_embed.sparse import losses
        >>> model = SparseEncoder("sentence-transformers/all-MiniLM-L6-v2")
        >>> loss = losses.SparseMarginMSELoss(model)
        >>> query, positive, negative = (torch.rand(8, 512, requires_grad=True) for _ in range(3))
        >>> loss.compute_loss_from_embeddings([query, positive, negative], torch.rand(8)).backward()
    """

    _small = WIDE


class SparseDistillKLDivLoss(Inside, DistillKLDivLoss, sparse_library.SparseDistillKLDivLoss):
    """``T_s^2 * mean over queries of KL(softmax(teacher / T_t) || softmax(s(query, candidates) / T_s))``:
    :class:`chunked_embed.losses.DistillKLDivLoss` with another temperature, inside of :class:`SpladeLoss` or
    :class:`CSRLoss`.

    Args:
        model: The SparseEncoder to train.
        similarity_fct, temperature, student_temperature, teacher_temperature: As there.
        options: ``gather_across_devices`` and those of chunks: see :class:`~chunked_embed.losses.Options`.

    Inputs: a query and K >= 2 candidates; labels are the teacher's scores, (N, K), -inf for one that is out.

    Example:
        >>> import torch
        >>> from sentence_transformers import SparseEncoder
        >>> from chunked_embed.sparse import losses
        >>> model = SparseEncoder("sentence-transformers/all-MiniLM-L6-v2")
        >>> loss = losses.SparseDistillKLDivLoss(model)
        >>> query, positive, negative = (torch.rand(8, 512, requires_grad=True) for _ in range(3))
        >>> loss.compute_loss_from_embeddings([query, positive, negative], torch.rand(8, 2)).backward()
    """

    _small = WIDE

    def __init__(
        self,
        model: SparseEncoder,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = util.pairwise_dot_score,
        temperature: float = 2.0,
        student_temperature: float | None = None,
        teacher_temperature: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, similarity_fct, temperature, student_temperature, teacher_temperature, **options)
