"""Embedding losses on plain tensors, without a model. A projection ``weight (D, H)``, ``bias (D,)``, where one is
given, is applied to every side, followed by ``activation`` and, with ``normalize=True``, by an L2 normalisation.
Everything is chunked: what is held is the embeddings, their gradients and O(N) scores.
"""

from .batch_triplets import batch_all_triplet, batch_hard_triplet, batch_semi_hard_triplet
from .contrastive import info_nce
from .guided import guided_info_nce
from .late_interaction import max_sim, max_sim_info_nce, max_sim_pairs
from .mega_batch import mega_batch_margin
from .pairwise import SIMILARITIES, PairwiseScores, Triplet, pairwise_scores, triplet
from .ranking import angle, cosent, cosent_from_scores
from .sigmoid import sigmoid_pairs
from .sparsity import flops
from .splade import splade_pool
from .spread import OrthogonalTerms, orthogonal_regularization
from .xtr import xtr_scores

__all__ = [
    "SIMILARITIES",
    "OrthogonalTerms",
    "PairwiseScores",
    "Triplet",
    "angle",
    "batch_all_triplet",
    "batch_hard_triplet",
    "batch_semi_hard_triplet",
    "cosent",
    "cosent_from_scores",
    "flops",
    "guided_info_nce",
    "info_nce",
    "max_sim",
    "max_sim_info_nce",
    "max_sim_pairs",
    "mega_batch_margin",
    "orthogonal_regularization",
    "pairwise_scores",
    "sigmoid_pairs",
    "splade_pool",
    "triplet",
    "xtr_scores",
]
