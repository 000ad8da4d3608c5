"""How the completions of a call lie: the segment of each token, and what of the sums over segments is whose."""

from __future__ import annotations

from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

Sides = tuple[Tensor, Tensor]


class Batch:
    """Pairs: all chosen completions, then the rejected ones. Segments of a pair: 0 chosen, 1 rejected.

    What a call knows of all of its groups. Of ids that are ignored no segment is read: the engine drops them.
    """

    per_group: ClassVar[int] = 2
    """Segments."""

    def __init__(self, size: int, target: Tensor, ignored: int) -> None:
        self.size = size  # in groups
        self.target = target
        self.ignored = ignored

    @cached_property
    def of_group(self) -> Tensor:  # (groups, segments)
        """The segments of each group."""
        each = torch.arange(self.per_group * self.size, device=self.target.device)
        return each.view(self.size, self.per_group)

    def segments(self) -> tuple[Tensor, Tensor]:
        """-> the segment of each token, and its id."""
        return self.of_group.t().flatten()[:, None].expand(self.target.shape), self.target

    def both(self, sums: Tensor) -> Sides:  # (groups, segments)
        """Over the chosen and over the rejected completions."""
        return sums[:, 0], sums[:, 1]

    def weighted(self, sums: Tensor) -> Sides:
        """The same, as the loss weighs them."""
        return self.both(sums)

    def nll(self, sums: Tensor, chosen: Tensor) -> Tensor:
        """Over what the NLL counts; ``chosen`` are those over the chosen completions."""
        return chosen

    def every(self, sums: Tensor) -> Tensor:
        """Over all completions."""
        return sums.sum(1)

    @property
    def nll_ids(self) -> Tensor:
        return self.target[: self.size]

    @cached_property
    def nll_tokens(self) -> Tensor:  # ()
        """How many the NLL has, one or more."""
        return (self.nll_ids != self.ignored).sum().clamp_min(1)

    def refuse_other_ids(self) -> None:
        """Two targets that are not of one sequence. Waits for the device."""


class Triples(Batch):
    """Gold completions follow, which the NLL counts. Segments of a triple: 0 chosen, 1 rejected, 2 gold."""

    per_group = 3

    def nll(self, sums: Tensor, chosen: Tensor) -> Tensor:
        return sums[:, 2]

    @property
    def nll_ids(self) -> Tensor:
        return self.target[2 * self.size :]


class Tails(Batch):
    """Tokens beyond the length of the pair's shorter completion weigh less. Segments of a pair: 0 chosen, 1 its tail,
    2 rejected, 3 its tail."""

    per_group = 4

    def __init__(self, size: int, target: Tensor, ignored: int, weight: float) -> None:
        super().__init__(size, target, ignored)
        self.weight = weight

    def segments(self) -> tuple[Tensor, Tensor]:
        first = self.of_group[:, ::2].t().flatten()[:, None]  # (2B, 1)
        used = self.target != self.ignored
        lengths = used.sum(1).view(2, -1).amin(0).repeat(2)[:, None]
        return first + (used.cumsum(1) > lengths), self.target

    def both(self, sums: Tensor) -> Sides:
        return self._with_tails(sums, 1)

    def weighted(self, sums: Tensor) -> Sides:
        return self._with_tails(sums, self.weight)

    @staticmethod
    def _with_tails(sums: Tensor, weight: float) -> Sides:
        chosen, rejected = torch.add(sums[:, ::2], sums[:, 1::2], alpha=weight).unbind(1)
        return chosen, rejected

    def nll(self, sums: Tensor, chosen: Tensor) -> Tensor:
        return sums[:, 0] + sums[:, 1]


class TwoTargets(Batch):
    """The NLL counts other tokens of the chosen sequences. Segments of a pair: 0 chosen tokens of the NLL alone,
    1 rejected, 2 chosen tokens that the NLL leaves out, 3 others."""

    per_group = 4

    def __init__(self, size: int, target: Tensor, ignored: int, nll_target: Tensor) -> None:
        super().__init__(size, target, ignored)
        self.nll_target = nll_target

    def segments(self) -> tuple[Tensor, Tensor]:
        ids, of_rejected = self.target.chunk(2)
        chosen, in_nll = ids != self.ignored, self.nll_ids != self.ignored
        both = torch.where(in_nll, self.nll_ids, ids)
        # Ids that differ go beyond all segments: the engine refuses those after its one transfer.
        beyond = (chosen & (both != ids)).mul(self.of_group.numel())
        of_chosen = chosen * (in_nll + 2) + self.of_group[:, :1] + beyond
        segments = torch.cat([of_chosen, self.of_group[:, 1:2].expand_as(ids)])
        return segments, torch.cat([both, of_rejected])

    def both(self, sums: Tensor) -> Sides:
        return sums[:, 2] + sums[:, 3], sums[:, 1]

    def nll(self, sums: Tensor, chosen: Tensor) -> Tensor:
        return sums[:, 0] + sums[:, 3]

    def every(self, sums: Tensor) -> Tensor:
        return sums[:, 1:].sum(1)

    @property
    def nll_ids(self) -> Tensor:
        return self.nll_target[: self.size]

    def refuse_other_ids(self) -> None:
        ids, nll_ids = self.target[: self.size], self.nll_ids
        both = (ids != self.ignored) & (nll_ids != self.ignored)
        if bool((both & (ids != nll_ids)).any()):
            raise ValueError("expected nll_target and target to agree where both have a token, got other ids")
