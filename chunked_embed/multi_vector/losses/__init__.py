"""Drop-in losses for sentence-transformers' ``MultiVectorEncoder``: change the import, keep the script.

The classes carry the names, arguments and defaults of ``sentence_transformers.multi_vector_encoder.losses``; our own
options come last and are keyword-only. ``CachedMultiVectorDistillKLDivLoss`` and ``CachedMultiVectorMarginMSELoss`` are
ours alone. Works with sentence-transformers 6.x, which is imported when a class is first touched, not before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from chunked_embed.losses._names import finder

if TYPE_CHECKING:
    from chunked_embed.multi_vector.losses.distill_kl_div import (
        CachedMultiVectorDistillKLDivLoss,
        MultiVectorDistillKLDivLoss,
    )
    from chunked_embed.multi_vector.losses.margin_mse import CachedMultiVectorMarginMSELoss, MultiVectorMarginMSELoss
    from chunked_embed.multi_vector.losses.multiple_negatives_ranking import (
        CachedMultiVectorMultipleNegativesRankingLoss,
        MultiVectorMultipleNegativesRankingLoss,
    )

_HOME = {
    "CachedMultiVectorDistillKLDivLoss": "distill_kl_div",
    "CachedMultiVectorMarginMSELoss": "margin_mse",
    "CachedMultiVectorMultipleNegativesRankingLoss": "multiple_negatives_ranking",
    "MultiVectorDistillKLDivLoss": "distill_kl_div",
    "MultiVectorMarginMSELoss": "margin_mse",
    "MultiVectorMultipleNegativesRankingLoss": "multiple_negatives_ranking",
}

__all__ = [
    "CachedMultiVectorDistillKLDivLoss",
    "CachedMultiVectorMarginMSELoss",
    "CachedMultiVectorMultipleNegativesRankingLoss",
    "MultiVectorDistillKLDivLoss",
    "MultiVectorMarginMSELoss",
    "MultiVectorMultipleNegativesRankingLoss",
]

__getattr__ = finder(__name__, _HOME, __all__, "multi_vector_library")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
