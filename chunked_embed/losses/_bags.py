"""StaticEmbedding's features: the tokens of all rows end to end, and where each row begins.

They have no batch dimension to slice. The row boundaries, added under the name that sentence-transformers gives to
flattened transformer inputs, let its mini-batch planner count rows and tokens; the slicing is done here.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BOUNDS = "cu_seq_lens_q"


def is_bag(features: dict[str, Tensor]) -> bool:
    """Whether these are an EmbeddingBag's inputs: ``input_ids`` (tokens,) and ``offsets`` (rows,)."""
    return "offsets" in features and "input_ids" in features and features["input_ids"].ndim == 1


def with_row_ends(features: dict[str, Tensor]) -> dict[str, Tensor]:
    """A copy with the bounds of every row, (rows + 1,); any other features as they are."""
    if not is_bag(features):
        return features
    offsets = features["offsets"]
    end = offsets.new_tensor([features["input_ids"].shape[0]])
    return {**features, _BOUNDS: torch.cat([offsets, end])}


def bag_slice(features: dict[str, Tensor], begin: int, end: int) -> dict[str, Tensor]:
    """Rows ``begin`` to ``end`` as features of their own."""
    bounds = features[_BOUNDS][begin : end + 1]
    first, last = bounds[0].item(), bounds[-1].item()
    rest = {name: value for name, value in features.items() if name != _BOUNDS}
    return {**rest, "input_ids": features["input_ids"][first:last], "offsets": bounds[:-1] - first}
