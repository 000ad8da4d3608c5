"""Which of the library's scoring functions a loss has been given, by identity, and with which settings."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

from chunked_embed import checks
from chunked_embed.multi_vector.losses._compat import scoring

Layout = Literal["all", "lists", "pairs"]
"""Of the scores: queries with all documents (N, M), with a list each (N, K), or with one each (N,)."""


class Known(NamedTuple):
    """MaxSim, or XTR where ``top_k`` is a number."""

    length_normalize: bool = False
    top_k: int | None = None
    max_chunk_bytes: int | None = None  # of ``chunk_elements``, numbers of four bytes


# By id: these live as long as the library does, and a user's callable need not have a hash.
_MAX_SIM: dict[int, tuple[Layout, bool]] = {
    id(scoring.colbert_scores): ("all", False),
    id(scoring.colbert_kd_scores): ("lists", False),
    id(scoring.colbert_scores_pairwise): ("pairs", False),
    id(scoring.mean_colbert_scores): ("all", True),
    id(scoring.mean_colbert_kd_scores): ("lists", True),
    id(scoring.mean_colbert_scores_pairwise): ("pairs", True),
}
_XTR: dict[int, Layout] = {
    id(scoring.xtr_scores): "all",
    id(scoring.xtr_kd_scores): "lists",
    id(scoring.xtr_scores_pairwise): "pairs",
}
_XTR_OBJECTS: dict[type, Layout] = {scoring.XTRScores: "all", scoring.XTRKDScores: "lists"}
TOP_K = 256  # the library's default


def known(function: Callable[..., Any], layout: Layout) -> Known | None:
    """None: a function of the user's own, or one whose scores are of another layout."""
    given: dict[str, Any] = {}
    asked: Any = function
    if _XTR_OBJECTS.get(type(asked)) == layout:
        return _xtr(asked.top_k, asked.chunk_elements)
    if type(asked) is partial:
        if asked.args:
            return None
        asked, given = asked.func, asked.keywords
    if id(asked) in _MAX_SIM and given.keys() <= {"length_normalize", "chunk_elements"}:
        whose, mean = _MAX_SIM[id(asked)]
        if whose == layout:
            return Known(bool(given.get("length_normalize", mean)), None, _bytes(given.get("chunk_elements")))
    elif _XTR.get(id(asked)) == layout and given.keys() <= {"top_k", "chunk_elements"}:
        return _xtr(given.get("top_k", TOP_K), given.get("chunk_elements"))
    return None


def _xtr(top_k: Any, chunk_elements: Any) -> Known:
    return Known(top_k=checks.integer("top_k", top_k, low=1), max_chunk_bytes=_bytes(chunk_elements))


def _bytes(elements: Any) -> int | None:
    found = checks.integer_or_none("chunk_elements", elements, low=1)
    return None if found is None else 4 * found
