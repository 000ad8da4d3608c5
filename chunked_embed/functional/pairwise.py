"""Losses over aligned rows: the similarity of row i of one side and row i of another."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import Chunk, Into, Needs, Shape, Step, checks
from ..checks import NOT_NEGATIVE
from ..chunking import Chunking
from ..engine.compile import outside_compile
from ..engine.types import HALF
from ..kernels import pairwise as kernels
from ..kernels.norms import FLOOR
from ..tokens import kernel_refusal
from .arguments import Activation, Embedding, Rows, frozen_activation, project, shared

# --- pairwise similarities: (R, D), (R, D) -> (R,) -------------------------------------------------------------------


def inverse_norm(x: Tensor, floor: float = FLOOR) -> Tensor:
    """(R,), with the floor of ``F.normalize``. It divides sums, not vectors: nothing of size (R, D) is left behind."""
    return 1 / torch.linalg.vector_norm(x, dim=1).clamp_min(floor)


def cosine(a: Tensor, b: Tensor, eps: float = FLOOR) -> Tensor:
    return (a * b).sum(1) * inverse_norm(a, eps) * inverse_norm(b, eps)


def angle_similarity(a: Tensor, b: Tensor) -> Tensor:
    """``|cos + sin|`` of unit vectors read as complex ones, i paired with i + D/2 (AnglE, arXiv 2309.12871)."""
    if a.shape[1] % 2:
        a, b = F.pad(a, (0, 1)), F.pad(b, (0, 1))
    a_re, a_im = a.chunk(2, dim=1)
    b_re, b_im = b.chunk(2, dim=1)
    both = ((a_re * b_re + a_im * b_im) + (a_im * b_re - a_re * b_im)).sum(1)  # cos + sin
    return (both * inverse_norm(a) * inverse_norm(b)).abs()


def dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1)


def difference(a: Tensor, b: Tensor, eps: float) -> Tensor:
    return a - b + eps if eps else a - b


def negative_euclidean(a: Tensor, b: Tensor, eps: float = 0.0) -> Tensor:
    return -torch.linalg.vector_norm(difference(a, b, eps), dim=1)


def negative_manhattan(a: Tensor, b: Tensor, eps: float = 0.0) -> Tensor:
    return -difference(a, b, eps).abs().sum(1)


SIMILARITIES: dict[str, Callable[..., Tensor]] = {
    "cosine": cosine,
    "angle": angle_similarity,
    "dot": dot,
    "euclidean": negative_euclidean,
    "manhattan": negative_manhattan,
}
"""By name: functions of two (N, D) that return (N,). What is near has the larger number.

Example:
    >>> from chunked_embed import functional as CF
    >>> sorted(CF.SIMILARITIES)
    ['angle', 'cosine', 'dot', 'euclidean', 'manhattan']
"""
DISTANCES = ("euclidean", "cosine", "manhattan")  # these have an eps


# --- the losses as the engine sees them ------------------------------------------------------------------------------


class PairwiseScores(Embedding):
    """The similarity of row i of ``a`` and row i of every other side, by the side's name.

    Example:
        >>> import torch
        >>> from chunked_embed import Projection
        >>> from chunked_embed import functional as CF
        >>> loss = CF.PairwiseScores("cosine", compiled=False)
        >>> a, b = (torch.randn(8, 16, requires_grad=True) for _ in range(2))
        >>> loss.scores({"a": Projection(a), "b": Projection(b)})["b"].shape
        torch.Size([8])
    """

    def __init__(self, similarity: str = "cosine", eps: float | None = None, **options: Any) -> None:
        super().__init__(static_widths=similarity == "angle", **options)  # which cuts rows in half
        self.similarity = checks.choice("similarity", similarity, tuple(SIMILARITIES))
        self.eps = checks.number_or_none("eps", eps, NOT_NEGATIVE)
        if eps is not None and similarity not in DISTANCES:
            raise ValueError(f"expected eps with a similarity of {list(DISTANCES)}, got {eps} with {similarity!r}")

    def score_fn(self, outputs: Rows, rows: Rows) -> Rows:
        similarity, eps = SIMILARITIES[self.similarity], () if self.eps is None else (self.eps,)
        a = self.embed(outputs["a"])
        return {name: similarity(a, self.embed(outputs[name]), *eps) for name in outputs if name != "a"}

    def make_step(self, projections: tuple[str, ...]) -> Step | None:
        plain = type(self).score_fn is PairwiseScores.score_fn and self.activation is None and not self.normalize
        if not plain or len(projections) != 2 or self.similarity not in kernels.SIMILARITIES:
            return None
        return PairKernel(self.similarity, FLOOR if self.eps is None else self.eps)


@dataclass(frozen=True)
class PairKernel(Step):
    """The similarity of two sides by a kernel pair, which keeps three numbers a row from the first to the second."""

    row_wise = False
    similarity: str
    floor: float

    @property
    def key(self) -> Hashable:
        return type(self), self.similarity

    def needs(self, shape: Shape) -> Needs:
        return Needs(refusal=kernel_refusal(shape))

    def score(self, chunk: Chunk) -> tuple[Rows, Tensor | None]:
        a, b = (chunk.outputs(name) for name in chunk.names)
        scores, factors = kernels.pair_scores(a, b, self.similarity, self.floor)
        return {chunk.names[1]: scores}, factors

    def pull(self, chunk: Chunk, kept: Tensor | None, parts: Rows, upstream: Rows, into: Into) -> None:
        (given,) = upstream.values()
        a, b = (chunk.outputs(name) for name in chunk.names)
        biases: tuple[Tensor | None, ...] = (None, None)
        if any(_sums_more_digits(chunk, name) for name in chunk.names):
            biases = kernels.summed_gradients(a, b, kept, given, self.similarity)
        places = [into.place(name) if into.wants(name) else None for name in chunk.names]
        kernels.pair_gradients_(a, b, kept, given, self.similarity, *places)
        for name, place, bias in zip(chunk.names, places, biases):
            if place is not None:
                into.outputs(place, name, bias)


def _sums_more_digits(chunk: Chunk, name: str) -> bool:
    """Whether a projection has a bias whose gradient is not to be summed from rounded ones."""
    spec = chunk.spec(name)
    return spec.bias is not None and chunk.sweep.layout.wants_grad[spec.bias] and spec.operand_dtype in HALF


class Triplet(Embedding):
    """``relu(d(anchor, positive) - d(anchor, negative) + margin)``

    Example:
        >>> import torch
        >>> from chunked_embed import Projection
        >>> from chunked_embed import functional as CF
        >>> sides = {name: Projection(torch.randn(8, 16)) for name in ("anchor", "positive", "negative")}
        >>> out = CF.Triplet(margin=5.0, compiled=False)(sides)
        >>> out.loss.shape
        torch.Size([])
    """

    def __init__(self, margin: float = 5.0, distance: str = "euclidean", **options: Any) -> None:
        super().__init__(**options)
        self.margin = checks.number("margin", margin)
        self.distance = checks.choice("distance", distance, DISTANCES)

    def loss_fn(self, outputs: Rows, rows: Rows) -> Tensor:
        similarity = SIMILARITIES[self.distance]
        anchor = self.embed(outputs["anchor"])
        # A distance is a negated similarity, up to a constant that the difference loses.
        closer = similarity(anchor, self.embed(outputs["positive"]))
        farther = similarity(anchor, self.embed(outputs["negative"]))
        return F.relu(farther - closer + self.margin)


# --- public functions ------------------------------------------------------------------------------------------------


@outside_compile
def pairwise_scores(
    a: Tensor,  # (N, H)
    b: Tensor | Sequence[Tensor],  # (N, H), or K of those
    *,
    similarity: str = "cosine",
    eps: float | None = None,
    weight: Tensor | None = None,  # (D, H)
    bias: Tensor | None = None,  # (D,)
    activation: Activation | None = None,
    normalize: bool = False,
    chunk_size: int | None = None,
    max_chunk_bytes: int | None = None,
    compiled: bool | None = None,
    float32_outputs: bool = True,
) -> Tensor:  # (N,), or (N, K)
    """Similarity of each pair: "cosine", "angle", "dot", or a negated "euclidean" or "manhattan" distance.

    Given K candidates for every row of ``a``, all of them are scored together: ``a`` is read and projected once.
    ``eps`` is what torch calls so: the floor of the norms for "cosine" (1e-12 by default), added to every difference
    for the distances (0).

    Differentiable in everything that requires grad; float32 (float64 for float64 inputs). Backward forms the chunks
    again, so that nothing but the scores is kept.

    Args:
        activation: a function of projected embeddings, or a module without parameters that learn.
        chunk_size, max_chunk_bytes, compiled, float32_outputs: as for :class:`~chunked_embed.FlexChunkLoss`.

    Raises:
        ValueError: shapes or devices that differ, no candidates, an unknown similarity, a bad ``eps``, an activation
            that learns.
        TypeError: mixed dtypes, an activation that is no function.

    Example:
        >>> import torch
        >>> from chunked_embed import functional as CF
        >>> a, b, c = torch.eye(2), torch.eye(2), torch.ones(2, 2)
        >>> CF.pairwise_scores(a, [b, c])  # cosines of each row of a with its rows of b and c
        tensor([[1.0000, 0.7071],
                [1.0000, 0.7071]])
        >>> CF.pairwise_scores(a, c, similarity="euclidean")
        tensor([-1., -1.])
    """
    several = not isinstance(b, Tensor)
    sides = {f"b{i}": side for i, side in enumerate(checks.sequence("b", b) if several else [b])}
    if not sides:
        raise ValueError("expected at least one b, got an empty sequence")
    chunking = Chunking(chunk_size, max_chunk_bytes, compiled, float32_outputs)
    function = frozen_activation(activation)
    loss = shared(PairwiseScores, chunking, similarity=similarity, eps=eps, activation=function, normalize=normalize)
    scores = loss.scores(project({"a": a, **sides}, weight, bias))
    return torch.stack([scores[name] for name in sides], dim=1) if several else scores["b0"]


@outside_compile
def triplet(
    anchor: Tensor,  # (N, H)
    positive: Tensor,  # (N, H)
    negative: Tensor,  # (N, H)
    *,
    margin: float = 5.0,
    distance: str = "euclidean",
    weight: Tensor | None = None,  # (D, H)
    bias: Tensor | None = None,  # (D,)
    activation: Activation | None = None,
    normalize: bool = False,
    chunk_size: int | None = None,
    max_chunk_bytes: int | None = None,
    compiled: bool | None = None,
    float32_outputs: bool = True,
) -> Tensor:
    """``mean relu(d(anchor, positive) - d(anchor, negative) + margin)``, with a "euclidean", "cosine" (1 - cos) or
    "manhattan" distance. Source: Schroff et al., "FaceNet", arXiv 1503.03832.

    Raises:
        ValueError: shapes or devices that differ, an unknown distance, a margin that is not finite.
        TypeError: mixed dtypes.

    Example:
        >>> import torch
        >>> from chunked_embed import functional as CF
        >>> anchor, positive, negative = (torch.randn(8, 16, requires_grad=True) for _ in range(3))
        >>> CF.triplet(anchor, positive, negative, distance="cosine", margin=0.5).backward()
        >>> CF.triplet(torch.eye(2), torch.eye(2), -torch.eye(2), distance="cosine", margin=0.5)
        tensor(0.)
    """
    chunking = Chunking(chunk_size, max_chunk_bytes, compiled, float32_outputs)
    function = frozen_activation(activation)
    loss = shared(Triplet, chunking, margin=margin, distance=distance, activation=function, normalize=normalize)
    return loss(project({"anchor": anchor, "positive": positive, "negative": negative}, weight, bias)).loss
