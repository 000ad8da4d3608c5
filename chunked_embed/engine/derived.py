"""Scores that follow row by row from a step's values: elementwise functions behind a kernel."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

from .chunk import Chunk, Into
from .formula import mentions
from .functions import check_per_row, grad_or_none, weighted
from .step import Needs, Shape, Step
from .types import Named

TokenFn = Callable[[Named, Named], Mapping[str, Tensor]]
"""(statistics, rows) -> scores by name; all are ``(R,)``, of the same rows."""


class Derived(Step):
    """A step whose scores are a function of another step's values and of row arguments.

    The function runs on the vectors of a chunk, between the inner step and the sums over segments. Its gradient, by
    ordinary autograd, is the upstream of the inner step, which is pulled once however many scores there are.
    """

    row_wise = False
    runs_functions = True

    def __init__(self, step: Step, token_fn: TokenFn) -> None:
        self.step = step
        self.token_fn = token_fn

    @property
    def name(self) -> str:
        return self.step.name

    @property
    def key(self) -> Hashable:
        return Derived, self.step.key

    def needs(self, shape: Shape) -> Needs:
        return self.step.needs(shape)

    def reads(self, name: str) -> bool:
        owner = getattr(self.token_fn, "__self__", None)
        return self.step.reads(name) or mentions(type(owner), [self.token_fn], name)

    def score(self, chunk: Chunk) -> tuple[Named, Any]:
        parts, kept = self.step.score(chunk)
        statistics = self.step.values(parts, chunk)
        return {n: v.detach() for n, v in self._derived(statistics, chunk.rows).items()}, (kept, parts, statistics)

    def pull(self, chunk: Chunk, kept: Any, parts: Named, upstream: Named, into: Into) -> None:
        of_step, inner, statistics = kept
        learns = [name for name in chunk.rows if into.wants(name)]
        constants = self.step.constants
        with torch.enable_grad():
            leaves = {n: v.detach().requires_grad_() for n, v in statistics.items() if n not in constants}
            rows = {n: chunk.rows[n].detach().requires_grad_() for n in learns}
            found = self._derived(statistics | leaves, chunk.rows | rows)
            total: Any = sum(weighted(found[n], u.to(found[n].dtype)) for n, u in upstream.items())
        taken = grad_or_none(total, [*leaves.values(), *rows.values()])
        for name, grad in zip(rows, taken[len(leaves) :]):
            into.rows(name, torch.zeros_like(rows[name]) if grad is None else grad)
        of_statistics = {name: grad for name, grad in zip(leaves, taken) if grad is not None}
        if of_statistics:
            self.step.pull(chunk, of_step, inner, of_statistics, into)

    def _derived(self, statistics: Named, rows: Named) -> Named:
        found = self.token_fn(dict(statistics), dict(rows))
        check_derived(found, len(next(iter(statistics.values()))))
        return dict(found)


def check_derived(found: Any, rows: int) -> None:
    """Refuses what ``token_fn`` may not return."""
    if not isinstance(found, Mapping) or not found:
        raise ValueError(f"expected token_fn to return a dict of scores by name, got {type(found).__name__}")
    for name, value in found.items():
        check_per_row(f"score {name!r} of token_fn", value, rows)
