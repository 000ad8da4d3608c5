"""Preference losses from hidden states and an LM head, a chunk of logits at a time."""

from __future__ import annotations

from . import functional
from ._base import PairLoss, PairScores, SequenceLoss, SequenceScores
from .paired import (
    AlphaPOLoss,
    CPOLoss,
    CPOSimPOLoss,
    DPOLoss,
    DPOPLoss,
    FPOLoss,
    IRPOLoss,
    ORPOLoss,
    RDPOLoss,
    SimPOLoss,
    SLiCLoss,
    TDPOLoss,
)
from .unpaired import BCOLoss, KTOLoss

__all__ = [
    "AlphaPOLoss",
    "BCOLoss",
    "CPOLoss",
    "CPOSimPOLoss",
    "DPOLoss",
    "DPOPLoss",
    "FPOLoss",
    "IRPOLoss",
    "KTOLoss",
    "ORPOLoss",
    "PairLoss",
    "PairScores",
    "RDPOLoss",
    "SLiCLoss",
    "SequenceLoss",
    "SequenceScores",
    "SimPOLoss",
    "TDPOLoss",
    "functional",
]
