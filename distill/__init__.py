"""Distillation losses on the chunked engine: from a teacher's logits to a student's, without holding either's.

::

    from distill import JSDLoss
    loss = JSDLoss(beta=0.5, temperature=2.0, weight_hard=0.1)
    out = loss(student_hidden, student_weight, teacher_hidden, teacher_weight, target=labels)
    out.loss.backward()
"""

from __future__ import annotations

from typing import Any

from chunked_embed import __version__ as __version__

from .divergences import DIVERGENCES, Divergence
from .losses import (
    AdaptiveKLLoss,
    AlphaBetaLoss,
    CosineSimilarityLoss,
    DistillationLoss,
    DistillLoss,
    EarthMoverLoss,
    JSDLoss,
    KLDivLoss,
    KVDLoss,
    LogitMSELoss,
    ReverseKLLoss,
    SkewKLLoss,
    SkewReverseKLLoss,
    TAIDLoss,
    TVDLoss,
    ULDLoss,
)
from .topk import TopKLoss

__all__ = [
    "DIVERGENCES",
    "AdaptiveKLLoss",
    "AlphaBetaLoss",
    "CosineSimilarityLoss",
    "DistillLoss",
    "DistillationLoss",
    "Divergence",
    "EarthMoverLoss",
    "JSDLoss",
    "KLDivLoss",
    "KVDLoss",
    "LogitMSELoss",
    "ReverseKLLoss",
    "SkewKLLoss",
    "SkewReverseKLLoss",
    "TAIDLoss",
    "TVDLoss",
    "TopKLoss",
    "ULDLoss",
]


def __getattr__(name: str) -> Any:
    """``DistillTrainer`` on first use: it brings transformers."""
    if name == "DistillTrainer":
        from .trainer import DistillTrainer

        return DistillTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
