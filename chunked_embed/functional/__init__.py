"""Embedding losses on plain tensors, without a model. A projection ``weight (D, H)``, ``bias (D,)``, where one is
given, is applied to every side, followed by ``activation`` and, with ``normalize=True``, by an L2 normalisation.
Everything is chunked: what is held is the embeddings, their gradients and O(N) scores.
"""

from .pairwise import SIMILARITIES, PairwiseScores, Triplet, pairwise_scores, triplet
from .ranking import angle, cosent, cosent_from_scores

__all__ = [
    "SIMILARITIES",
    "PairwiseScores",
    "Triplet",
    "angle",
    "cosent",
    "cosent_from_scores",
    "pairwise_scores",
    "triplet",
]
