"""Softmaxes over a similarity matrix that is never formed, for narrow rows: as in attention, whose values are its keys.

With ``s_ij = (x_i . y_j) rows_i columns_j`` of queries x ``(M, D)`` and documents y ``(V, D)``, factors that are a
scale and inverse norms, ``target_i`` the query's own document, and p a softmax over the others that count, with the
log-sum-exp l:

    softmaxes        loss_i = softplus(l_i - s_it),  1 - p_it = sigmoid(l_i - s_it),  and the gradient of x:
                     weight_i rows_i (1 - p_it) (sum_j p_j columns_j y_j - columns_t y_t)
    logsumexps       of documents, over queries that are not their own
    weighted_sums    sum_j S_ij columns_j y_j, of slopes S whose log-sum-exps are known; likewise over queries

Gradients go through the norms: of cosines, what is at right angles to a row is left.

A query's own document stays outside of every sum: what is left beside it has digits of its own, however little it is.
Slopes are rounded once, to the dtype of the rows that they multiply; what that takes goes to a row near by, so that it
multiplies differences of rows. All else is float32. The `..._reference` functions are the same in plain torch: where
Triton does not run, and for other dtypes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from chunked_embed.kernels import available
from chunked_embed.kernels.norms import through_norms_reference_

WIDEST = 256  # of a row
HALF = (torch.bfloat16, torch.float16)
LOG2E = 1 / math.log(2)
NEVER = 1e38  # a shift; and less than minus that is the log-sum-exp of nothing


class Pairs(NamedTuple):
    """Which document is a query's own, and ids, in int32, by which other pairs do not count: those of one document,
    those that are listed, and those of one query that are not of one row."""

    target: Tensor  # (queries,) int64
    documents: tuple[Tensor, Tensor] | None = None  # of a query's own (queries,), of each (documents,); -1: none
    queries: tuple[Tensor, Tensor, Tensor] | None = None  # (queries,); of each document's query (documents,), its row
    listed: Tensor | None = None  # (lists, queries), of documents; -2: none
    shared: bool = False  # queries and documents have one numbering

    @property
    def masked(self) -> bool:
        return self.documents is not None or self.queries is not None

    def apart(self, documents: int) -> tuple[Tensor, Tensor]:  # (queries, documents) both
        """Pairs of a query and its own document, and others that do not count."""
        target = self.target[:, None]
        own = torch.arange(documents, device=target.device) == target
        known = torch.zeros_like(own)
        if self.documents is not None:
            document, candidate = self.documents
            of_row = [document, *(() if self.listed is None else self.listed)]
            if self.shared and self.queries is not None:
                of_row.append(self.queries[0])
            for ids in of_row:
                known = known | (candidate == ids[:, None])
        if self.queries is not None:
            query, its_query, row = self.queries
            known = known | ((its_query == query[:, None]) & (row != target))
        return own, known & ~own


class Similarities(NamedTuple):
    """The scores ``s_ij``, before they are formed."""

    x: Tensor  # (M, D)
    y: Tensor  # (V, D)
    pairs: Pairs
    scale: float | Tensor  # (M,)
    inverse_norms: tuple[Tensor, Tensor] | None = None  # (M,), (V,), ones by default

    @property
    def rows(self) -> Tensor:  # (M,), factors
        scale = self.scale
        if not isinstance(scale, Tensor):
            dtype = self.x.dtype if self.x.dtype == torch.float64 else torch.float32
            scale = torch.full((len(self.x),), scale, dtype=dtype, device=self.x.device)
        return scale if self.inverse_norms is None else scale * self.inverse_norms[0]

    @property
    def columns(self) -> Tensor | None:  # (V,), factors
        return None if self.inverse_norms is None else self.inverse_norms[1]

    def formed(self) -> Tensor:  # (M, V)
        z = (_wide(self.x) @ _wide(self.y).T) * self.rows[:, None]
        return z if self.columns is None else z * self.columns

    def apart(self) -> tuple[Tensor, Tensor]:  # (M, V) both
        return self.pairs.apart(len(self.y))

    def through_norms(self, gradient: Tensor, of_columns: bool = False) -> Tensor:
        if self.inverse_norms is None:
            return gradient
        return through_norms_reference_(gradient, self.y if of_columns else self.x, self.inverse_norms[of_columns])


class Found(NamedTuple):
    """What `softmaxes` says of each row."""

    loss: Tensor
    positive: Tensor  # the score of the own document
    rest: Tensor  # 1 - p of it
    slopes: Slopes | None  # of the others, and of the own document, times `rows`
    gradient: Tensor | None  # (M, D)
    moment: Tensor | None  # sum over j of slope times score


class Slopes(NamedTuple):
    """``sign 2^(score log2(e) - shift)`` of a row and any of the other side; of one's own pair, a number."""

    shift: Tensor
    sign: Tensor
    own: Tensor


def softmaxes(
    s: Similarities,
    weight: Tensor | None = None,  # (M,): gradients are those of sum(weight * loss); None: no slopes
    *,
    gradient: bool = False,  # of x
    moment: bool = False,
) -> Found:
    if use_triton(s):
        from chunked_embed.kernels import _triton_contrast as kernels

        return kernels.softmaxes(s, weight, gradient, moment)
    return softmaxes_reference(s, weight, gradient=gradient, moment=moment)


def softmaxes_reference(
    s: Similarities, weight: Tensor | None = None, *, gradient: bool = False, moment: bool = False
) -> Found:
    z, (own, out) = s.formed(), s.apart()
    others = z.masked_fill(own | out, -torch.inf).logsumexp(1)
    positive = z.gather(1, s.pairs.target[:, None]).squeeze(1)
    loss, rest = F.softplus(others - positive, threshold=1e9), (others - positive).sigmoid()
    if weight is None:
        return Found(loss, positive, rest, None, None, None)
    slope = weight * rest
    value = slope * s.rows
    p = (z - others[:, None]).exp().masked_fill(own | out, 0.0).nan_to_num(0.0)
    p = torch.where(own, -1.0, p)
    moments = (p * z).sum(1) * slope if moment else None
    p = p if s.columns is None else p * s.columns
    of_x = s.through_norms((p @ _wide(s.y)) * value[:, None]) if gradient else None
    return Found(loss, positive, rest, Slopes(*shifted(others, value), -value), of_x, moments)


def logsumexps(s: Similarities) -> Tensor:
    """(V,), over queries that are not the document's own; less than -1e38 where there are none."""
    if use_triton(s):
        from chunked_embed.kernels import _triton_contrast as kernels

        return kernels.logsumexps(s)
    return logsumexps_reference(s)


def logsumexps_reference(s: Similarities) -> Tensor:
    own, out = s.apart()
    return s.formed().masked_fill(own | out, -torch.inf).logsumexp(0).clamp_min(-1.1 * NEVER)


def weighted_sums(
    s: Similarities,
    slopes: Slopes,  # (M,)
    of_columns: tuple[Tensor, Tensor]
    | None = None,  # shift and sign (V,); None: `slopes` have the factor `rows` in them
    *,
    over_rows: bool,
    moment: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``columns_j sum_i S_ij rows_i x_i`` (V, D), or ``rows_i sum_j S_ij columns_j y_j`` (M, D), through the norms; and
    the moment, the sum of ``S_ij s_ij`` over the same."""
    if use_triton(s):
        from chunked_embed.kernels import _triton_contrast as kernels

        return kernels.weighted_sums(s, slopes, of_columns, over_rows, moment)
    return weighted_sums_reference(s, slopes, of_columns, over_rows=over_rows, moment=moment)


def weighted_sums_reference(
    s: Similarities,
    slopes: Slopes,
    of_columns: tuple[Tensor, Tensor] | None = None,
    *,
    over_rows: bool,
    moment: bool = False,
) -> tuple[Tensor, Tensor | None]:
    z, (own, out) = s.formed(), s.apart()
    slope = slopes.sign[:, None] * torch.exp2(z * LOG2E - slopes.shift[:, None])
    if of_columns is not None:
        shift, sign = of_columns
        slope = slope + sign * torch.exp2(z * LOG2E - shift)
    slope = torch.where(own, slopes.own[:, None], slope.masked_fill(out, 0.0))
    moments = (slope * z).sum(0 if over_rows else 1) if moment else None
    if of_columns is not None:
        slope = slope * s.rows[:, None]
    slope = slope if s.columns is None else slope * s.columns
    sums = slope.T @ _wide(s.x) if over_rows else slope @ _wide(s.y)
    return s.through_norms(sums, of_columns=over_rows), moments


def shifted(lse: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """-> shift and sign of ``slope exp(score - lse)``. What is NaN stays NaN."""
    size = slope.abs()
    shift = torch.where((size == 0) | (lse <= -NEVER), NEVER, (lse - size.log()) * LOG2E)
    return shift, torch.where(slope < 0, -1.0, 1.0)


def use_triton(s: Similarities) -> bool:
    x, y = s.x, s.y
    return x.dtype in HALF and x.dtype == y.dtype and x.shape[1] <= WIDEST and available(x.device)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
