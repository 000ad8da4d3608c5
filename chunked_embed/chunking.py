"""How a caller wants a loss to run: the options that every loss takes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from . import checks


@dataclass(frozen=True)
class Chunking:
    """Rows at a time, or the bytes that those may take, whether steps are compiled, and what products write.

    Args:
        chunk_size: rows per chunk; without it they follow from ``max_chunk_bytes``.
        max_chunk_bytes: a chunk's budget; without it the engine has one for the device.
        compiled: compile the steps; None: where the problem is large enough for it to pay.
        float32_outputs: products of half-precision operands write float32 outputs.

    Raises:
        TypeError, ValueError: of a positive integer, or of True, False and None, none was given.
    """

    chunk_size: int | None = None
    max_chunk_bytes: int | None = None
    compiled: bool | None = None
    float32_outputs: bool = True

    def __post_init__(self) -> None:
        checks.integer_or_none("chunk_size", self.chunk_size, low=1)
        checks.integer_or_none("max_chunk_bytes", self.max_chunk_bytes, low=1)
        checks.flag_or_none("compiled", self.compiled)
        checks.flag("float32_outputs", self.float32_outputs)

    @classmethod
    def of(cls, given: Any) -> Chunking:
        """The options of an object that has them as attributes."""
        return cls(*(getattr(given, name) for name in NAMES))

    @property
    def stated(self) -> bool:
        """The caller has a say in chunks, or in whether they are compiled."""
        return (self.chunk_size, self.max_chunk_bytes, self.compiled) != (None, None, None)

    @property
    def keywords(self) -> dict[str, Any]:
        """The options by name, as every loss takes them."""
        return asdict(self)


NAMES = tuple(field.name for field in fields(Chunking))
