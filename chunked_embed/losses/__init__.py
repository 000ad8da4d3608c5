"""Drop-in losses for sentence-transformers: change the import, keep the script.

The classes carry the names, arguments and defaults of ``sentence_transformers.losses``; our own options come last and
are keyword-only (:class:`chunked_embed.losses.Options`). Works with sentence-transformers 5.7 to 6.x, which is imported
when a class is first touched, not before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from chunked_embed.losses._names import finder

if TYPE_CHECKING:
    from sentence_transformers.sentence_transformer.losses import (
        AdaptiveLayerLoss,
        ContrastiveTensionDataLoader,
        ContrastiveTensionLoss,
        EmbedDistillLoss,
        MSELoss,
        SiameseDistanceMetric,
        SoftmaxLoss,
        TripletDistanceMetric,
    )

    from chunked_embed.losses._base import ChunkedLoss, Options
    from chunked_embed.losses.angle import AnglELoss
    from chunked_embed.losses.batch_triplet import (
        BatchAllTripletLoss,
        BatchHardSoftMarginTripletLoss,
        BatchHardTripletLoss,
        BatchHardTripletLossDistanceFunction,
        BatchSemiHardTripletLoss,
    )
    from chunked_embed.losses.contrastive import ContrastiveLoss
    from chunked_embed.losses.contrastive_tension import ContrastiveTensionLossInBatchNegatives
    from chunked_embed.losses.cosent import CoSENTLoss
    from chunked_embed.losses.cosine_similarity import CosineSimilarityLoss
    from chunked_embed.losses.denoising_auto_encoder import DenoisingAutoEncoderLoss
    from chunked_embed.losses.distill_kl_div import DistillKLDivLoss
    from chunked_embed.losses.gist import CachedGISTEmbedLoss, GISTEmbedLoss
    from chunked_embed.losses.global_orthogonal_regularization import GlobalOrthogonalRegularizationLoss
    from chunked_embed.losses.margin_mse import MarginMSELoss
    from chunked_embed.losses.matryoshka import Matryoshka2dLoss, MatryoshkaLoss
    from chunked_embed.losses.mega_batch_margin import MegaBatchMarginLoss
    from chunked_embed.losses.multiple_negatives_ranking import (
        CachedMultipleNegativesRankingLoss,
        CachedMultipleNegativesSymmetricRankingLoss,
        MultipleNegativesRankingLoss,
        MultipleNegativesSymmetricRankingLoss,
    )
    from chunked_embed.losses.online_contrastive import OnlineContrastiveLoss
    from chunked_embed.losses.sigmoid import SigmoidPairLoss
    from chunked_embed.losses.triplet import TripletLoss

_HOME = {
    "MultipleNegativesRankingLoss": "multiple_negatives_ranking",
    "MultipleNegativesSymmetricRankingLoss": "multiple_negatives_ranking",
    "CachedMultipleNegativesRankingLoss": "multiple_negatives_ranking",
    "CachedMultipleNegativesSymmetricRankingLoss": "multiple_negatives_ranking",
    "AnglELoss": "angle",
    "BatchAllTripletLoss": "batch_triplet",
    "BatchHardSoftMarginTripletLoss": "batch_triplet",
    "BatchHardTripletLoss": "batch_triplet",
    "BatchHardTripletLossDistanceFunction": "batch_triplet",
    "BatchSemiHardTripletLoss": "batch_triplet",
    "CachedGISTEmbedLoss": "gist",
    "ChunkedLoss": "_base",
    "ContrastiveLoss": "contrastive",
    "ContrastiveTensionLossInBatchNegatives": "contrastive_tension",
    "CoSENTLoss": "cosent",
    "CosineSimilarityLoss": "cosine_similarity",
    "DenoisingAutoEncoderLoss": "denoising_auto_encoder",
    "DistillKLDivLoss": "distill_kl_div",
    "GISTEmbedLoss": "gist",
    "GlobalOrthogonalRegularizationLoss": "global_orthogonal_regularization",
    "MarginMSELoss": "margin_mse",
    "Matryoshka2dLoss": "matryoshka",
    "MatryoshkaLoss": "matryoshka",
    "MegaBatchMarginLoss": "mega_batch_margin",
    "OnlineContrastiveLoss": "online_contrastive",
    "Options": "_base",
    "SigmoidPairLoss": "sigmoid",
    "TripletLoss": "triplet",
}

__all__ = [
    "AdaptiveLayerLoss",
    "AnglELoss",
    "BatchAllTripletLoss",
    "BatchHardSoftMarginTripletLoss",
    "BatchHardTripletLoss",
    "BatchHardTripletLossDistanceFunction",
    "BatchSemiHardTripletLoss",
    "CachedGISTEmbedLoss",
    "CachedMultipleNegativesRankingLoss",
    "CachedMultipleNegativesSymmetricRankingLoss",
    "ChunkedLoss",
    "CoSENTLoss",
    "ContrastiveLoss",
    "ContrastiveTensionDataLoader",
    "ContrastiveTensionLoss",
    "ContrastiveTensionLossInBatchNegatives",
    "CosineSimilarityLoss",
    "DenoisingAutoEncoderLoss",
    "DistillKLDivLoss",
    "EmbedDistillLoss",
    "GISTEmbedLoss",
    "GlobalOrthogonalRegularizationLoss",
    "MSELoss",
    "MarginMSELoss",
    "Matryoshka2dLoss",
    "MatryoshkaLoss",
    "MegaBatchMarginLoss",
    "MultipleNegativesRankingLoss",
    "MultipleNegativesSymmetricRankingLoss",
    "OnlineContrastiveLoss",
    "Options",
    "SiameseDistanceMetric",
    "SigmoidPairLoss",
    "SoftmaxLoss",
    "TripletDistanceMetric",
    "TripletLoss",
]


__getattr__ = finder(__name__, _HOME, __all__, "library")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
