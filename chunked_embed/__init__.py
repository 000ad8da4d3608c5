"""Losses over outputs too big to hold: one chunked engine, drop-ins for sentence-transformers, any ``loss_fn``."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .engine import ChunkPlan, FlexChunkLoss, LossOutput, Projection, TokenLogps, TokenStatistics, linear_logps

__version__ = "0.1.0"
__all__ = [
    "ChunkPlan",
    "FlexChunkLoss",
    "LossOutput",
    "Projection",
    "TokenLogps",
    "TokenStatistics",
    "causal_lm",
    "functional",
    "linear_logps",
    "losses",
]


def __getattr__(name: str) -> Any:
    """Submodules on first use: importing the package stays light."""
    if name in ("causal_lm", "functional", "losses"):
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
