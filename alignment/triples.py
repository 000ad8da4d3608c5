"""Losses over a pair and a gold completion of one prompt: ``TripleLoss``, to which a loss adds formula and numbers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from chunked_embed import ChunkPlan, Head, LossOutput
from chunked_embed.signatures import with_arguments_of

from .batches import Batch, Triples
from .pairs import ContrastLoss
from .path import Extra, PreparedLoss


class TripleLoss(ContrastLoss):
    """Base of the losses over triples: a subclass states its numbers as fields, and ``pair_loss``, in which the NLL is
    that of the gold completions.

    ``loss(hidden, weight, target, ...)``, or ``loss(head, target=target, ...)``, takes the three completions of each
    prompt in one batch: all chosen ones, all rejected ones, all gold ones. There is no reference model.

    Example:
        >>> import torch
        >>> import torch.nn.functional as F
        >>> from alignment import TripleLoss
        >>> class MarginLoss(TripleLoss):
        ...     def pair_loss(self, x):
        ...         return F.relu(1.0 - x.chosen_mean + x.rejected_mean) + x.nll
        >>> hidden, head = torch.randn(6, 5, 8, requires_grad=True), torch.randn(11, 8)  # two triples
        >>> target = torch.randint(0, 11, (6, 5))
        >>> out = MarginLoss()(hidden, head, target)
        >>> out.loss.backward()
        >>> out.metrics["logps/chosen"].shape
        torch.Size([2])
    """

    takes_reference = False

    @property
    def takes_gold(self) -> bool:
        """Whether a call has gold completions; else it is one of pairs."""
        return True

    @property
    def completions(self) -> int:
        return 3 if self.takes_gold else 2

    def prepare(
        self,
        hidden: Tensor | Head,  # (3B, T, H)
        weight: Tensor | None = None,  # (V, H)
        target: Tensor | None = None,  # (3B, T)
        bias: Tensor | None = None,  # (V,)
        *,
        extra: Extra = (),
        **vectors: Tensor | None,  # (B,)
    ) -> PreparedLoss:
        """Loss and metrics of B triples. (``prepare`` does no work yet: it has the call's ``plan``, and ``run()``.)

        Args:
            hidden, weight, ...: as in ``PairLoss.forward``, with the gold completions behind the rejected ones.
            vectors: what else the loss takes, by name.

        Returns:
            ``loss`` and ``metrics``: as of ``PairLoss.forward``, but that ``nll_loss`` is of the gold completions and
            ``entropy`` of all three.

        Raises:
            ValueError, TypeError: shapes, dtypes, ids and options that do not fit, before any work.
        """
        none = (None, None, None, ())
        return self._contrasted((hidden, weight, bias, extra), target, none, None, None, None, vectors)

    @with_arguments_of(prepare)
    def forward(self, *arguments: Any, **keywords: Any) -> LossOutput:
        return self.prepare(*arguments, **keywords).run()

    @with_arguments_of(prepare)
    def plan(self, *arguments: Any, **keywords: Any) -> ChunkPlan:
        """What ``forward`` with the same arguments will do: print it before running."""
        return self.prepare(*arguments, **keywords).plan

    def _batch(self, size: int, target: Tensor, nll_target: Tensor | None) -> Batch:
        return (Triples if self.takes_gold else Batch)(size, target, self.ignore_index)
