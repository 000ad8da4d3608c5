"""Drop-in losses for sentence-transformers: change the import, keep the script.

The classes carry the names, arguments and defaults of ``sentence_transformers.losses``; our own options come last and
are keyword-only (:class:`chunked_embed.losses.Options`). Works with sentence-transformers 5.7 to 6.x, which is imported
when a class is first touched, not before.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chunked_embed.losses._base import ChunkedLoss, Options
    from chunked_embed.losses._compat import TripletDistanceMetric
    from chunked_embed.losses.angle import AnglELoss
    from chunked_embed.losses.cosent import CoSENTLoss
    from chunked_embed.losses.matryoshka import MatryoshkaLoss
    from chunked_embed.losses.triplet import TripletLoss

_HOME = {
    "AnglELoss": "angle",
    "ChunkedLoss": "_base",
    "CoSENTLoss": "cosent",
    "MatryoshkaLoss": "matryoshka",
    "Options": "_base",
    "TripletDistanceMetric": "_compat",
    "TripletLoss": "triplet",
}

__all__ = [
    "AnglELoss",
    "ChunkedLoss",
    "CoSENTLoss",
    "MatryoshkaLoss",
    "Options",
    "TripletDistanceMetric",
    "TripletLoss",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
