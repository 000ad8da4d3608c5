"""FLOPS regularisation: sparse embeddings whose products of all with all are cheap."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..engine.autograd import once_only
from ..engine.call import refuse_transforms
from ..engine.compile import outside_compile
from ..engine.types import accumulator_dtype
from ..gather import Ranks, ranks
from .arguments import check_embeddings

BLOCK = 2**24
"""Numbers of a block of rows, of which those that count are looked for at a time."""


class _Flops(torch.autograd.Function):
    """Of all columns, (N, V) each. Every row that counts has the same gradient: that of a column is one row, which is
    read N times, where all of them do."""

    @staticmethod
    def forward(ctx: Any, threshold: float | None, processes: Ranks, *columns: Tensor) -> Tensor:
        found = [_sum(column, threshold) for column in columns]
        (total,) = processes.sum(functools.reduce(torch.add, (total for total, _ in found)))
        ctx.processes, ctx.rows = processes, sum(processes.sizes) * len(columns)
        ctx.like = [(column.shape, column.dtype) for column in columns]
        mean = total / ctx.rows
        ctx.save_for_backward(mean, *(counts for _, counts in found if counts is not None))
        return mean.square().sum()

    @staticmethod
    @once_only
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        mean, *counts = ctx.saved_tensors
        (row,) = ctx.processes.sum(mean * (upstream * (2 / ctx.rows)))
        grads: list[Tensor | None] = []
        for i, (shape, dtype) in enumerate(ctx.like):
            own = row.to(dtype)
            if not ctx.needs_input_grad[2 + i]:
                grads.append(None)
            else:
                grads.append(torch.where(counts[i], own, 0.0) if counts else own.expand(shape))
        return (None, None, *grads)


def _sum(column: Tensor, threshold: float | None) -> tuple[Tensor, Tensor | None]:  # (V,), (N, 1)
    dtype = accumulator_dtype(column.dtype)
    if threshold is None:
        return column.sum(0, dtype=dtype), None
    total, masks = column.new_zeros(column.shape[1], dtype=dtype), []
    for block in column.split(max(BLOCK // column.shape[1], 1)):
        masks.append(torch.count_nonzero(block, dim=1)[:, None] > threshold)
        total += torch.where(masks[-1], block, 0.0).sum(0, dtype=dtype)
    return total, torch.cat(masks)


@outside_compile
def flops(
    embeddings: Tensor | Sequence[Tensor],  # (N, V), or several of them
    *,
    threshold: float | None = None,
    gather_across_devices: bool = False,
) -> Tensor:
    """``sum over j of (mean over i of x_ij)^2``: the multiplications of a product of two rows, smoothed.

    What is kept for backward is a mean of rows, and N bits with a threshold; several tensors are not copied into one.

    Source: Paria et al., "Minimizing FLOPs to Learn Efficient Sparse Representations", arXiv 2004.05665; with a
    threshold arXiv 2504.14839; as in ``sentence_transformers.sparse_encoder.losses.FlopsLoss``.

    Args:
        embeddings: floating point, none below zero (they are not looked at). Rows of several tensors count as those of
            one.
        threshold: rows with at most so many numbers other than zero count as zeros.
        gather_across_devices: the mean is that of the rows of all processes, each of which returns the same.

    Returns:
        A scalar, float32 (float64 for float64 inputs).

    Raises:
        ValueError: other shapes than (N, V), or several of them; no tensor at all; a threshold that is not finite.
        TypeError: embeddings that are not floating point.

    Example:
        >>> import torch
        >>> from chunked_embed import functional as CF
        >>> CF.flops(torch.eye(4))  # each number in one of four texts
        tensor(0.2500)
        >>> CF.flops(torch.ones(4, 4))  # each in all of them
        tensor(4.)
        >>> queries, documents = (torch.rand(8, 100, requires_grad=True) for _ in range(2))
        >>> CF.flops([queries, documents], threshold=20).backward()
    """
    refuse_transforms()
    columns = [embeddings] if isinstance(embeddings, Tensor) else checks.sequence("embeddings", embeddings)
    if not columns:
        raise ValueError("expected embeddings, a tensor or several, got none")
    names = ["embeddings"] if isinstance(embeddings, Tensor) else [f"embeddings[{i}]" for i in range(len(columns))]
    check_embeddings(dict(zip(names, columns)), "V", one_dtype=False)
    checks.number_or_none("threshold", threshold)
    checks.flag("gather_across_devices", gather_across_devices)
    return _Flops.apply(threshold, ranks(columns[0], gather_across_devices), *columns)
