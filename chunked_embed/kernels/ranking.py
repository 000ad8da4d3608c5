"""CoSENT's double sum over scores that are sorted by their labels, and its gradient.

With ``s = scale * scores`` in the order of the labels, ties next to each other::

    above_i  log sum exp(-s_j)  over y_j > y_i
    below_i  log sum exp(s_j)   over y_j < y_i
    loss     log(1 + sum_i exp(s_i + above_i))
    grad_i   (exp(s_i + above_i - loss) - exp(below_i - s_i - loss)) * scale

A sum over the labels above is a running sum from the highest label down, read where the tie of i ends; one over those
below ends where the tie begins. All of it in float64, and logarithms throughout: scores may be thousands apart, and no
one of them is small beside the rest of its own sum.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from chunked_embed.kernels import available

SMALL = 1024  # scores, up to which building kernels takes longer than they save
LARGE = 40.0  # log(1 + exp(x)) is x, to all digits of float64


def cosent(
    scores: Tensor,  # (N,)
    labels: Tensor,  # (N,), sorted
    order: Tensor,  # (N,) int64: whose labels those are
    scale: float = 1.0,
    *,
    gradient: bool = True,
) -> tuple[Tensor, Tensor | None]:  # loss (), float32 (float64 for that); its gradient (N,), of the scores' dtype
    if scores.dtype != torch.float64 and len(scores) > SMALL and available(scores.device):
        from chunked_embed.kernels import _triton_ranking as kernels

        return kernels.cosent(scores, labels, order, scale, gradient)
    return cosent_reference(scores, labels, order, scale, gradient=gradient)


def cosent_reference(
    scores: Tensor, labels: Tensor, order: Tensor, scale: float = 1.0, *, gradient: bool = True
) -> tuple[Tensor, Tensor | None]:
    s = scores.gather(0, order).to(torch.float64).mul_(scale)
    falls = s.neg()
    # From the first strictly higher label on: of the running sum from above, all but the labels up to there.
    above = running_logsumexp(falls.flip(0)).gather(0, len(s) - torch.searchsorted(labels, labels, right=True))
    exponents = s + above
    loss = F.softplus(exponents.logcumsumexp(0)[-1], threshold=LARGE)  # logsumexp takes four times as long
    told = loss if scores.dtype == torch.float64 else loss.float()
    if not gradient:
        return told, None
    below = running_logsumexp(s).gather(0, torch.searchsorted(labels, labels))
    slope = exponents.sub_(loss).exp_().sub_(below.add_(falls).sub_(loss).exp_()).mul_(scale)
    return told, torch.empty_like(order, dtype=scores.dtype).scatter_(0, order, slope.to(scores.dtype))


def running_logsumexp(x: Tensor) -> Tensor:  # (N,) -> (N + 1,)
    """Entry k is the logsumexp of the first k, -inf for none."""
    return torch.cat((x.new_full((1,), -torch.inf), x.logcumsumexp(0)))
