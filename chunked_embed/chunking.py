"""How a caller wants a loss to run: the three options that every loss takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from . import checks


@dataclass(frozen=True)
class Chunking:
    """Rows at a time, or the bytes that those may take, and whether steps are compiled.

    Args:
        chunk_size: rows per chunk; without it they follow from ``max_chunk_bytes``.
        max_chunk_bytes: a chunk's budget; without it the engine has one for the device.
        compiled: compile the steps; None: where the problem is large enough for it to pay.

    Raises:
        TypeError, ValueError: of a positive integer, or of True, False and None, none was given.
    """

    chunk_size: int | None = None
    max_chunk_bytes: int | None = None
    compiled: bool | None = None

    def __post_init__(self) -> None:
        checks.integer_or_none("chunk_size", self.chunk_size, low=1)
        checks.integer_or_none("max_chunk_bytes", self.max_chunk_bytes, low=1)
        checks.flag_or_none("compiled", self.compiled)

    @property
    def keywords(self) -> dict[str, Any]:
        """The options by name, as every loss takes them."""
        return {
            "chunk_size": self.chunk_size,
            "max_chunk_bytes": self.max_chunk_bytes,
            "compiled": self.compiled,
        }
