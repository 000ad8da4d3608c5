"""The sigmoid pair loss: every pair of a batch is a binary question of its own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine import FlexChunkLoss, Projection
from ..engine.compile import outside_compile
from ..engine.steps import RowStep
from ..engine.walk import Call
from ..gather import ranks
from .arguments import Rows, finite, one_of, project, scalar, shared
from .by_rows import Similarity, mean_by_rows
from .kernel_steps import SigmoidRows, has_kernel
from .normalize import unit


class SigmoidPairs(FlexChunkLoss):
    """Row i: one pair that belongs together, column ``target``, among pairs that do not."""

    def loss_fn(self, outputs: Tensor, rows: Rows, hp: Any) -> Tensor:
        own = torch.arange(outputs.shape[1], device=outputs.device) == rows["target"][:, None]
        z = outputs * rows["scale"][:, None] + rows["bias"][:, None]
        return -F.logsigmoid(torch.where(own, z, -z)).sum(1)

    def _row_loss(self, call: Call) -> RowStep:
        if has_kernel(self, call):
            return SigmoidRows(call.problem.wanting(call.problem.rows))
        return super()._row_loss(call)


@outside_compile
def sigmoid_pairs(
    a: Tensor,  # (N, D)
    b: Tensor,  # (N, D), row i belongs to row i of a
    *,
    scale: float | Tensor = 10.0,
    bias: float | Tensor = -10.0,
    similarity: str | Similarity = "cosine",
    gather_across_devices: bool = False,
    chunk_size: int | None = None,
    max_chunk_bytes: int | None = None,
    compiled: bool = True,
) -> Tensor:
    """``mean over i of sum over j of -log sigmoid(y_ij * (scale * sim(a_i, b_j) + bias))``, y = 1 for i = j, else -1.

    Args:
        scale, bias: numbers, or tensors of one element, which may require grad. Other values compile nothing anew.
        similarity: "cosine" or "dot"; or a function of a chunk of rows and all candidates, ``(R, D), (V, D) ->
            (R, V)``, which runs by ordinary autograd, twice for each chunk.
        gather_across_devices: compare with the ``b`` of all processes; the results of all processes average to the loss
            of the whole batch, and so do their gradients.

    Returns:
        A scalar, float32 (float64 for float64 embeddings).

    Raises:
        ValueError: shapes or devices that differ, an unknown similarity, numbers that are not finite.
        TypeError: mixed dtypes.

    Source: Zhai et al., "Sigmoid Loss for Language Image Pre-Training", arXiv 2303.15343.
    """
    project({"a": a, "b": b}, None, None)
    if a.device != b.device:
        raise ValueError(f"expected a and b on one device, got {a.device} and {b.device}")
    if not callable(similarity):
        one_of("similarity", similarity, ("cosine", "dot"))
    scale, bias = (
        scalar(name, x if isinstance(x, Tensor) else torch.tensor(finite(name, x), dtype=torch.float64), a)
        for name, x in (("scale", scale), ("bias", bias))
    )
    left, right = (unit(a, compiled=compiled), unit(b, compiled=compiled)) if similarity == "cosine" else (a, b)
    processes, n = ranks(a, gather_across_devices), len(a)
    (right,) = processes.gather(right)
    # One number a row: gradients of a scalar inside a step would reduce the whole chunk again.
    rows = {
        "target": torch.arange(n, device=a.device) + processes.offset,
        "scale": scale.expand(n),
        "bias": bias.expand(n),
    }
    loss = shared(SigmoidPairs, chunk_size=chunk_size, max_chunk_bytes=max_chunk_bytes, compiled=compiled)
    if callable(similarity):
        mean = mean_by_rows(
            lambda blocks, part: loss.loss_fn(blocks["pairs"], part, None),
            similarity,
            {"pairs": (left, right)},
            rows,
            chunk_size=chunk_size,
            max_chunk_bytes=max_chunk_bytes,
        )
    else:
        mean = loss(Projection(left, right), rows).loss
    return processes.share(mean)
