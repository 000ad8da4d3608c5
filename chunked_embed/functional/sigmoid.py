"""The sigmoid pair loss: every pair of a batch is a binary question of its own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine import FlexChunkLoss, Projection
from ..engine.compile import outside_compile
from ..engine.steps import RowStep
from ..engine.types import accumulator_dtype
from ..engine.walk import Call
from ..gather import counts, gather_rows, rank, share
from .arguments import Rows, finite, one_of, project, shared
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
    similarity: str = "cosine",
    gather_across_devices: bool = False,
    chunk_size: int | None = None,
    max_chunk_bytes: int | None = None,
    compiled: bool = True,
) -> Tensor:
    """``mean over i of sum over j of -log sigmoid(y_ij * (scale * sim(a_i, b_j) + bias))``, y = 1 for i = j, else -1.

    Args:
        scale, bias: numbers, or tensors of one element, which may require grad. Other values compile nothing anew.
        similarity: "cosine" or "dot".
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
    one_of("similarity", similarity, ("cosine", "dot"))
    wide = accumulator_dtype(a.dtype)
    scale, bias = (_scalar(name, x, wide, a.device) for name, x in (("scale", scale), ("bias", bias)))
    left, right = (a, b) if similarity == "dot" else (unit(a, compiled=compiled), unit(b, compiled=compiled))
    sizes = [len(a)]
    if gather_across_devices:
        sizes = counts(a)
        (right,) = gather_rows(right)
    offset = sum(sizes[: rank()]) if len(sizes) > 1 else 0
    n = len(a)
    # One number a row: gradients of a scalar inside a step would reduce the whole chunk again.
    rows = {
        "target": torch.arange(offset, offset + n, device=a.device),
        "scale": scale.expand(n),
        "bias": bias.expand(n),
    }
    loss = shared(SigmoidPairs, chunk_size=chunk_size, max_chunk_bytes=max_chunk_bytes, compiled=compiled)
    value = loss(Projection(left, right), rows).loss
    return share(value, sizes) if len(sizes) > 1 else value


def _scalar(name: str, value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:  # -> ()
    if not isinstance(value, Tensor):
        return torch.tensor(finite(name, value), dtype=dtype, device=device)
    if value.numel() != 1 or not value.is_floating_point():
        raise ValueError(
            f"expected {name} to be a number or a floating-point tensor of one element, "
            f"got {value.dtype} {tuple(value.shape)}"
        )
    return value.reshape(()).to(device=device, dtype=dtype)
