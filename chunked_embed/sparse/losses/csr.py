"""CSR: a sparse autoencoder behind a dense encoder."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from chunked_embed.losses._base import ChunkedLoss
from chunked_embed.losses._compat import SparseEncoder, sparse_library
from chunked_embed.losses._kinds import check_model
from chunked_embed.sparse.losses._inside import check_inner
from chunked_embed.sparse.losses.multiple_negatives_ranking import SparseMultipleNegativesRankingLoss


class CSRLoss(sparse_library.CSRLoss):
    """``mse(x, x_k) + mse(x, x_4k) / 8 + beta * aux + gamma * loss``: how well k and 4k latents reconstruct the
    embeddings x, the error that dead latents explain, and a loss of the latents.

    The reconstruction is the library's, of tensors as wide as the dense embeddings. There is no gradient caching, which
    embeds twice: an autoencoder counts its dead latents between the two.

    Args:
        model: The SparseEncoder to train, which ends in a SparseAutoEncoder.
        loss: A loss of embeddings; None is our :class:`SparseMultipleNegativesRankingLoss`.
        beta: Weight of the error that dead latents explain.
        gamma: Weight of the loss.

    Inputs: those of the loss inside. Returns a dict of terms, which the trainer adds up: "reconstruction_loss_k",
    "reconstruction_loss_4k", "reconstruction_loss_aux", "base_loss".

    Reference: https://huggingface.co/papers/2503.01776

    Example:
        >>> from sentence_transformers import SparseEncoder
        >>> from chunked_embed.sparse import losses
        >>> model = SparseEncoder("sentence-transformers/all-MiniLM-L6-v2")
        >>> loss = losses.CSRLoss(model, losses.SparseMultipleNegativesRankingLoss(model, chunk_size=1024), beta=0.1)
        >>> texts = ["A plane.", "A flute."], ["An aircraft.", "Music."]
        >>> terms = loss([model.preprocess(list(column)) for column in texts])
        >>> sum(terms.values()).backward()
    """

    def __init__(
        self, model: SparseEncoder, loss: nn.Module | None = None, beta: float = 0.1, gamma: float = 1.0
    ) -> None:
        check_model(model)
        loss = SparseMultipleNegativesRankingLoss(model) if loss is None else loss
        check_inner(loss, type(self).__name__)
        super().__init__(model, loss, beta, gamma)

    def forward(
        self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        features: list[Any] = list(sentence_features)
        check_inner(self.loss, type(self).__name__)
        if isinstance(self.loss, ChunkedLoss):
            labels = self.loss._targets(features, labels)
        return super().forward(features, labels)
