"""Guided contrastive learning: a frozen guide says which negatives are none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import FlexChunkLoss, Projection, checks
from ..checks import POSITIVE
from ..chunking import Chunking
from ..engine.compile import outside_compile
from ..gather import ranks
from .arguments import Rows, check_embeddings, shared, widened

MARGIN_STRATEGIES = ("absolute", "relative")
DROPPED = -1e30  # far below any score; -inf would make the gradient of a block that is dropped whole NaN
TIE = 16  # units in the last place that the guide's similarities of equal texts may lie apart


class GuidedInfoNCE(FlexChunkLoss):
    """Row i holds the cosines of query i and its document with what they are compared with, in up to three blocks, each
    once for the model and once for the guide."""

    def __init__(
        self, temperature: float = 0.01, margin_strategy: str = "absolute", margin: float = 0.0, **options: Any
    ) -> None:
        super().__init__(targets=(), **options)
        self.temperature = checks.number("temperature", temperature, POSITIVE)
        self.margin_strategy = checks.choice("margin_strategy", margin_strategy, MARGIN_STRATEGIES)
        self.margin = checks.number("margin", margin)

    def loss_fn(self, outputs: Rows, rows: Rows) -> Tensor:
        candidates = outputs["guide candidates"]
        own = torch.arange(candidates.shape[1], device=candidates.device) == rows["target"][:, None]
        # From the product and not from the pair itself: a copy of the document ties with it, however products round.
        limit = torch.where(own, candidates, 0.0).sum(1, keepdim=True)
        limit = limit - self.margin * (limit.abs() if self.margin_strategy == "relative" else 1.0)
        limit = limit + TIE * torch.finfo(limit.dtype).eps
        dropped = {"candidates": (candidates > limit) & ~own}
        dropped |= {block: outputs[f"guide {block}"] > limit for block in ("queries", "documents") if block in outputs}
        terms = [
            torch.where(drop, DROPPED, outputs[block] / self.temperature).logsumexp(1)
            for block, drop in dropped.items()
        ]
        positive = torch.where(own, outputs["candidates"], 0.0).sum(1) / self.temperature
        return torch.stack(terms).logsumexp(0) - positive


@outside_compile
def guided_info_nce(
    queries: Tensor,  # (N, D)
    documents: Tensor,  # (N, D), row i belongs to query i
    guide_queries: Tensor,  # (N, E)
    guide_documents: Tensor,  # (N, E)
    *,
    hard_negatives: Sequence[Tensor] = (),  # each (N, D)
    guide_hard_negatives: Sequence[Tensor] = (),  # each (N, E)
    temperature: float = 0.01,
    margin_strategy: str = "absolute",
    margin: float = 0.0,
    contrast_anchors: bool = True,
    contrast_positives: bool = True,
    gather_across_devices: bool = False,
    chunk_size: int | None = None,
    max_chunk_bytes: int | None = None,
    compiled: bool | None = None,
    float32_outputs: bool = True,
) -> Tensor:
    """InfoNCE without the negatives that a guide finds nearer than the positive (GISTEmbed).

    The mean over i of ``-log(exp(s_ii) / sum of exp(s))`` with ``s = cos / temperature``, where the sum runs over query
    i with every document and hard negative, with every query (``contrast_anchors``), and over document i with every
    document (``contrast_positives``). Of these, pairs whose similarity under the guide is above
    ``g_i - margin`` ("absolute") or ``g_i - |g_i| * margin`` ("relative") are left out, ``g_i`` being the guide's
    similarity of query i and its document; that pair itself stays. At a margin of 0 ties stay, too: a copy of the
    document is a negative.

    No gradient goes to the guide, whose width and dtype are its own. Autocast rounds none of the embeddings here: which
    negatives are left out, and a temperature of 0.01, hang on the last digits. Embeddings in half precision are faster.

    Args:
        hard_negatives, guide_hard_negatives: further candidates, of every query.
        gather_across_devices: compare with the queries and documents of all processes; the results of all processes
            average to the loss of the whole batch, and so do their gradients.
        chunk_size, max_chunk_bytes, compiled, float32_outputs: as for ``FlexChunkLoss``.

    Returns:
        A scalar, float32 (float64 for float64 embeddings).

    Raises:
        ValueError: shapes or devices that differ, numbers that are not finite, a temperature that is not above 0.
        TypeError: mixed dtypes, numbers that are none.

    Source: Solatorio, "GISTEmbed", arXiv 2402.16829, as in ``sentence_transformers.losses.GISTEmbedLoss``.

    Example:
        >>> import torch
        >>> from chunked_embed import functional as CF
        >>> queries, documents = (torch.randn(8, 16, requires_grad=True) for _ in range(2))
        >>> guide = torch.randn(2, 8, 32)  # what another model makes of the same texts
        >>> CF.guided_info_nce(queries, documents, guide[0], guide[1], margin=0.05).backward()
    """
    chunking = Chunking(chunk_size, max_chunk_bytes, compiled, float32_outputs)
    loss = shared(GuidedInfoNCE, chunking, temperature=temperature, margin_strategy=margin_strategy, margin=margin)
    own = [queries, documents, *hard_negatives]
    guide = [guide_queries, guide_documents, *guide_hard_negatives]
    _check(own, guide)
    own = [widened(x) for x in own]
    guide = [_frozen(x, queries) for x in guide]
    processes = ranks(queries, gather_across_devices)
    everyone, everyones = processes.gather(*own), processes.gather(*guide)
    blocks = {"candidates": (0, slice(1, None))}  # the side whose rows are compared, the columns they are compared with
    blocks |= {"queries": (0, slice(0, 1))} if contrast_anchors else {}
    blocks |= {"documents": (1, slice(1, 2))} if contrast_positives else {}
    projections = {}
    for name, (side, part) in blocks.items():
        theirs = _joined(everyones[part])
        projections[name] = Projection(own[side], _joined(everyone[part]), cosine=True, dtype=queries.dtype)
        projections[f"guide {name}"] = Projection(guide[side], theirs, cosine=True, dtype=theirs.dtype)
    rows = {"target": torch.arange(len(queries), device=queries.device) + processes.offset}
    return processes.share(loss(projections, rows).loss)


def _check(own: list[Tensor], guide: list[Tensor]) -> None:
    if len(own) != len(guide):
        raise ValueError(f"expected the guide's embeddings of {len(own) - 2} hard negatives, got {len(guide) - 2}")
    names = ["queries", "documents", *(f"hard_negatives[{i}]" for i in range(len(own) - 2))]
    check_embeddings(dict(zip(names, own)))
    check_embeddings({f"guide_{name}": x for name, x in zip(names, guide)})
    if len(own[0]) != len(guide[0]) or own[0].device != guide[0].device:
        raise ValueError(
            f"expected {len(own[0])} rows from the guide on {own[0].device}, got {len(guide[0])} on {guide[0].device}"
        )


def _frozen(x: Tensor, own: Tensor) -> Tensor:
    x = x.detach()
    if (x.dtype == torch.float64) != (own.dtype == torch.float64):
        x = x.to(own.dtype if own.dtype == torch.float64 else torch.float32)
    return x


def _joined(banks: Sequence[Tensor]) -> Tensor:
    return banks[0] if len(banks) == 1 else torch.cat(list(banks))
