"""Drop-in losses for sentence-transformers' ``SparseEncoder``: change the import, keep the script.

The classes carry the names, arguments and defaults of ``sentence_transformers.sparse_encoder.losses``; our own options
come last and are keyword-only. :class:`SpladeLoss` has all of :class:`chunked_embed.losses.Options` but the projection,
a loss inside of it those of chunks and of several processes. Works with sentence-transformers 5.7 to 6.x, which is
imported when a class is first touched, not before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from chunked_embed.losses._names import finder

if TYPE_CHECKING:
    from sentence_transformers.sparse_encoder.losses import CSRReconstructionLoss, SparseMSELoss

    from chunked_embed.sparse.losses.csr import CSRLoss
    from chunked_embed.sparse.losses.flops import FlopsLoss
    from chunked_embed.sparse.losses.multiple_negatives_ranking import SparseMultipleNegativesRankingLoss
    from chunked_embed.sparse.losses.pairwise import (
        SparseAnglELoss,
        SparseCoSENTLoss,
        SparseCosineSimilarityLoss,
        SparseDistillKLDivLoss,
        SparseMarginMSELoss,
        SparseTripletLoss,
    )
    from chunked_embed.sparse.losses.splade import CachedSpladeLoss, SpladeLoss

_HOME = {
    "CSRLoss": "csr",
    "CachedSpladeLoss": "splade",
    "FlopsLoss": "flops",
    "SparseAnglELoss": "pairwise",
    "SparseCoSENTLoss": "pairwise",
    "SparseCosineSimilarityLoss": "pairwise",
    "SparseDistillKLDivLoss": "pairwise",
    "SparseMarginMSELoss": "pairwise",
    "SparseMultipleNegativesRankingLoss": "multiple_negatives_ranking",
    "SparseTripletLoss": "pairwise",
    "SpladeLoss": "splade",
}

__all__ = [
    "CSRLoss",
    "CSRReconstructionLoss",
    "CachedSpladeLoss",
    "FlopsLoss",
    "SparseAnglELoss",
    "SparseCoSENTLoss",
    "SparseCosineSimilarityLoss",
    "SparseDistillKLDivLoss",
    "SparseMSELoss",
    "SparseMarginMSELoss",
    "SparseMultipleNegativesRankingLoss",
    "SparseTripletLoss",
    "SpladeLoss",
]

__getattr__ = finder(__name__, _HOME, __all__, "sparse_library")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
