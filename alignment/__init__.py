"""Preference losses from hidden states and an LM head, a chunk of logits at a time."""

from __future__ import annotations

from chunked_embed import __version__ as __version__

from . import functional, policy
from .grpo import GRPOLoss, PolicyLoss, RLOOLoss
from .losses import (
    AlphaPOLoss,
    BCOLoss,
    CPOLoss,
    CPOSimPOLoss,
    DPOLoss,
    DPOPLoss,
    FPOLoss,
    IRPOLoss,
    KTOLoss,
    ORPOLoss,
    RDPOLoss,
    SimPOLoss,
    SLiCLoss,
    TDPOLoss,
    TPOLoss,
)
from .pairs import PairLoss, PairScores
from .path import PreferenceLoss, PreparedLoss
from .sequences import SequenceLoss, SequenceScores
from .triples import TripleLoss

__all__ = [
    "AlphaPOLoss",
    "BCOLoss",
    "CPOLoss",
    "CPOSimPOLoss",
    "DPOLoss",
    "DPOPLoss",
    "FPOLoss",
    "GRPOLoss",
    "IRPOLoss",
    "KTOLoss",
    "ORPOLoss",
    "PairLoss",
    "PairScores",
    "PolicyLoss",
    "PreferenceLoss",
    "PreparedLoss",
    "RDPOLoss",
    "RLOOLoss",
    "SLiCLoss",
    "SequenceLoss",
    "SequenceScores",
    "SimPOLoss",
    "TDPOLoss",
    "TPOLoss",
    "TripleLoss",
    "functional",
    "policy",
]
