"""The sigmoid pair loss: every pair of a batch is a binary question of its own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import FlexChunkLoss, Projection, Step, checks
from ..chunking import Chunking
from ..engine.compile import outside_compile
from ..engine.types import accumulator_dtype
from ..gather import ranks
from .arguments import Rows, check_embeddings, shared, widened
from .by_rows import Similarity, mean_by_rows
from .kernel_steps import SigmoidRows


class SigmoidPairs(FlexChunkLoss):
    """Row i: one pair that belongs together, column ``target``, among pairs that do not."""

    def __init__(self, **options: Any) -> None:
        super().__init__(targets=(), **options)

    def loss_fn(self, outputs: Tensor, rows: Rows) -> Tensor:
        own = torch.arange(outputs.shape[1], device=outputs.device) == rows["target"][:, None]
        z = outputs * rows["scale"][:, None] + rows["bias"][:, None]
        return -F.logsigmoid(torch.where(own, z, -z)).sum(1)

    def make_step(self, projections: tuple[str, ...]) -> Step | None:
        return SigmoidRows()


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
    compiled: bool | None = None,
    float32_outputs: bool = True,
) -> Tensor:
    """``mean over i of sum over j of -log sigmoid(y_ij * (scale * sim(a_i, b_j) + bias))``, y = 1 for i = j, else -1.

    Args:
        scale, bias: numbers, or tensors of one element, which may require grad. Other values compile nothing anew.
        similarity: "cosine" or "dot"; or a function of a chunk of rows and all candidates, ``(R, D), (V, D) ->
            (R, V)``, which runs by ordinary autograd, twice for each chunk.
        gather_across_devices: compare with the ``b`` of all processes; the results of all processes average to the loss
            of the whole batch, and so do their gradients.
        chunk_size, max_chunk_bytes, compiled, float32_outputs: as for ``FlexChunkLoss``.

    Returns:
        A scalar, float32 (float64 for float64 embeddings).

    Raises:
        ValueError: shapes or devices that differ, an unknown similarity, numbers that are not finite.
        TypeError: mixed dtypes, numbers that are none.

    Source: Zhai et al., "Sigmoid Loss for Language Image Pre-Training", arXiv 2303.15343.

    Example:
        >>> import torch
        >>> from chunked_embed import functional as CF
        >>> a, b = (torch.randn(8, 16, requires_grad=True) for _ in range(2))
        >>> scale, bias = torch.tensor(10.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
        >>> CF.sigmoid_pairs(a, b, scale=scale, bias=bias).backward()
        >>> scale.grad.shape, bias.grad.shape
        (torch.Size([]), torch.Size([]))
    """
    chunking = Chunking(chunk_size, max_chunk_bytes, compiled, float32_outputs)
    check_embeddings({"a": a, "b": b})
    if not callable(similarity):
        checks.choice("similarity", similarity, ("cosine", "dot"))
    scale, bias = (
        checks.scalar_tensor(name, x, dtype=accumulator_dtype(a.dtype), device=a.device)
        for name, x in (("scale", scale), ("bias", bias))
    )
    processes, n = ranks(a, gather_across_devices), len(a)
    (candidates,) = processes.gather(b)
    # One number a row: gradients of a scalar inside a step would reduce the whole chunk again.
    rows = {
        "target": torch.arange(n, device=a.device) + processes.offset,
        "scale": scale.expand(n),
        "bias": bias.expand(n),
    }
    loss = shared(SigmoidPairs, chunking)
    if callable(similarity):
        mean = mean_by_rows(
            lambda blocks, part: loss.loss_fn(blocks["pairs"], part),
            similarity,
            {"pairs": (widened(a), widened(candidates))},
            rows,
            chunking,
        )
    else:
        mean = loss(Projection(a, candidates, cosine=similarity == "cosine"), rows).loss
    return processes.share(mean)
