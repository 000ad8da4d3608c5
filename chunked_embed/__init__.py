"""Losses over outputs too big to hold: one chunked engine, drop-ins for sentence-transformers, any ``loss_fn``."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .engine import LOSS, Chunk, ChunkPlan, Into, LossOutput, Needs, Projection, Shape, Step
from .head import Head
from .kernels.token_scores import transform_logits
from .loss import FlexChunkLoss
from .tokens import TokenLogps, TokenStatistics, linear_logps

__version__ = "0.1.0"
__all__ = [
    "LOSS",
    "Chunk",
    "ChunkPlan",
    "FlexChunkLoss",
    "Head",
    "Into",
    "LossOutput",
    "Needs",
    "Projection",
    "Shape",
    "Step",
    "TokenLogps",
    "TokenStatistics",
    "causal_lm",
    "checks",
    "digits",
    "fields",
    "functional",
    "linear_logps",
    "losses",
    "signatures",
    "trainers",
    "transform_logits",
]


def __getattr__(name: str) -> Any:
    """Submodules on first use: importing the package stays light."""
    if name in ("causal_lm", "checks", "digits", "fields", "functional", "losses", "signatures", "trainers"):
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
