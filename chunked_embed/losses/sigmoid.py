"""The sigmoid pair loss: does this text belong to that one? A binary question for every pair of the batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from chunked_embed import checks
from chunked_embed import functional as CF
from chunked_embed.checks import POSITIVE
from chunked_embed.losses._base import ChunkedLoss
from chunked_embed.losses._compat import SentenceTransformer, callable_name, known_matrix, util
from chunked_embed.losses._learnable import averaged


class SigmoidPairLoss(ChunkedLoss, nn.Module):
    """``mean over i of sum over j of -log sigmoid(y_ij * (scale * similarity(a_i, b_j) + bias))``, where y is 1 for
    i = j and -1 for every other pair of the batch.

    Args:
        model: The SentenceTransformer to train.
        scale: Factor on the similarity, above 0.
        bias: Added to it. Negative: most pairs do not belong together.
        learnable: Train both, as the paper does: ``log_scale`` and ``bias`` are parameters of the loss, which the
            trainer finds and which are averaged over processes. A checkpoint of the model does not hold them.
        similarity_fct: Similarity of every row of one batch with every row of another, (N, D), (M, D) -> (N, M).
            ``util.cos_sim`` and ``util.dot_score`` run fused and chunked, any other callable chunked, through ordinary
            autograd.
        options: See :class:`~chunked_embed.losses.Options`.

    Inputs: two columns, whose rows belong together; labels are ignored.

    Reference: https://huggingface.co/papers/2303.15343

    Example:
        >>> import torch
        >>> from sentence_transformers import SentenceTransformer
        >>> from chunked_embed import losses
        >>> model = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")
        >>> loss = losses.SigmoidPairLoss(model)
        >>> a, b = (torch.randn(8, 384, requires_grad=True) for _ in range(2))  # embeddings, as a model gives them
        >>> loss.compute_loss_from_embeddings([a, b]).backward()
        >>> loss.log_scale.grad.shape, loss.bias.grad.shape  # both learn
        (torch.Size([]), torch.Size([]))
    """

    def __init__(
        self,
        model: SentenceTransformer,
        scale: float = 10.0,
        bias: float = -10.0,
        learnable: bool = True,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = util.cos_sim,
        **options: Any,
    ) -> None:
        super().__init__()
        checks.number("scale", scale, POSITIVE)
        checks.number("bias", bias)
        checks.function("similarity_fct", similarity_fct)
        self.model = model
        self.similarity_fct = similarity_fct
        self.learnable = bool(learnable)
        self.gather_across_devices: bool
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale), dtype=torch.float32), requires_grad=self.learnable)
        self.bias = nn.Parameter(torch.tensor(float(bias), dtype=torch.float32), requires_grad=self.learnable)
        self._initial = {"scale": float(scale), "bias": float(bias)}
        self._set_options(**options)

    @property
    def scale(self) -> float:
        """As it is now: ``exp(log_scale)``."""
        return float(self.log_scale.detach().exp())

    @property
    def _similarity(self) -> str | None:
        return known_matrix(self.similarity_fct)

    @property
    def _fusable(self) -> bool:
        return False

    @property
    def _normalizes(self) -> bool:
        return self._similarity == "cosine"

    def _loss(self, embeddings: list[Tensor], labels: Tensor | None, **projection: Any) -> Tensor:
        if len(embeddings) != 2:
            raise ValueError(f"{type(self).__name__} expects two columns of embeddings, got {len(embeddings)}")
        a, b = embeddings
        scale, bias = averaged(self.log_scale).exp(), averaged(self.bias)
        return CF.sigmoid_pairs(
            a,
            b,
            scale=scale,
            bias=bias,
            similarity=self._similarity or self.similarity_fct,
            gather_across_devices=self.gather_across_devices,
            **self._chunking.keywords,
        )

    def get_config_dict(self) -> dict[str, Any]:
        return {
            **self._initial,
            "learnable": self.learnable,
            "similarity_fct": callable_name(self.similarity_fct),
            **self._changed_options(),
        }

    @property
    def citation(self) -> str:
        return """
@inproceedings{zhai2023sigmoid,
    title={Sigmoid Loss for Language Image Pre-Training},
    author={Zhai, Xiaohua and Mustafa, Basil and Kolesnikov, Alexander and Beyer, Lucas},
    booktitle={Proceedings of the IEEE/CVF International Conference on Computer Vision},
    pages={11975--11986},
    year={2023}
}
"""
