"""``DistillCollator``: rows of a dataset to a batch of a student and its teacher."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import packing
from .packing import LENGTHS

OFFLINE = ("teacher_ids", "teacher_logprobs")
MASKS = ("completion_mask", "assistant_masks")  # of the tokens to learn
COLUMNS = ("input_ids", "attention_mask", "labels", *OFFLINE)
ROWS = "row_lengths"  # tokens of each row of the dataset in a flattened batch


class DistillCollator:
    """Rows of a dataset to a batch, padded on the right: ids with 0, labels with -100, what an offline teacher said
    with no entries.

    Labels are the ids where none are given, without padding and what comes right behind it, and where a mask of SFT
    (``completion_mask``, ``assistant_masks``) is not zero. A batch has two tokens or more: the second is predicted.

    Rows with ``seq_lengths``, into which TRL's ``pack_dataset`` packed documents of these lengths, become one row
    without padding, with position ids that restart at each document, the offsets that kernels read (``packing``), and
    ``row_lengths`` of the rows. The first token of a document is no label.

    Example:
        >>> from distill.collator import DistillCollator
        >>> batch = DistillCollator()([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}])
        >>> batch["input_ids"], batch["labels"]
        (tensor([[5, 6, 7],
                [8, 9, 0]]), tensor([[   5,    6,    7],
                [   8,    9, -100]]))
    """

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        read = (*COLUMNS, *MASKS, LENGTHS)
        given = [tuple(name for name in read if row.get(name) is not None) for row in rows]
        if unlike := [names for names in given if names != given[0]]:
            raise ValueError(f"expected rows with the same columns, got {list(given[0])} and {list(unlike[0])}")
        found = [self._row(row) for row in rows]
        if len({row[name].shape[1] for row in found for name in OFFLINE if name in row}) > 1:
            raise ValueError("expected as many entries of the teacher for each token of a batch, got rows that differ")
        if LENGTHS in given[0]:
            return self._flattened(found, [packing.document_lengths(row) for row in rows])
        length = max(2, *(len(row["input_ids"]) for row in found))
        return {name: torch.stack([self._padded(name, row[name], length) for row in found]) for name in found[0]}

    @staticmethod
    def _padded(name: str, tokens: Tensor, length: int) -> Tensor:
        filler = {"labels": -100, "teacher_logprobs": -math.inf}
        sides = (0, 0) if name in OFFLINE else ()  # of the last dimension, K
        return F.pad(tokens, (*sides, 0, length - len(tokens)), value=filler.get(name, 0))

    def _flattened(self, rows: list[dict[str, Tensor]], documents: list[list[int]]) -> dict[str, Any]:
        if not all(row["attention_mask"].all() for row in rows):
            raise ValueError(f"expected an attention_mask of ones beside {LENGTHS}, got one with zeros")
        lengths = [n for row in documents for n in row]
        row_lengths = [sum(row) for row in documents]
        whole = {name: torch.cat([row[name] for row in rows]) for name in rows[0] if name != "attention_mask"}
        if lengths == [1]:  # another document, of padding
            whole = {name: self._padded(name, tokens, 2) for name, tokens in whole.items()}
            lengths, row_lengths = [1, 1], [2]
        told = packing.of_documents(lengths)
        first = told["position_ids"] == 0
        batch = {name: tokens[None] for name, tokens in whole.items()}
        batch["labels"] = batch["labels"].masked_fill(first, -100)
        return {**batch, **told, ROWS: row_lengths}

    @staticmethod
    def _row(row: Mapping[str, Any]) -> dict[str, Tensor]:
        if row.get("input_ids") is None:
            raise ValueError(
                f"expected rows with input_ids (text is tokenised in a datasets.Dataset that names its columns), got "
                f"{sorted(row)}"
            )
        made = {name: torch.as_tensor(row[name]) for name in (*COLUMNS, *MASKS) if row.get(name) is not None}
        ids = made["input_ids"]
        if not ids.dim() or not len(ids) or ids.is_floating_point():
            raise ValueError(f"expected input_ids of one integer or more, got {tuple(ids.shape)} {ids.dtype}")
        ids = made["input_ids"] = ids.long()
        mask = made.setdefault("attention_mask", torch.ones_like(ids))
        for name, value in made.items():
            if not value.dim():
                raise ValueError(f"expected {name} of {len(ids)} tokens, as input_ids has, got {value}")
            if len(value) != len(ids):
                raise ValueError(f"expected {name} of {len(ids)} tokens, as input_ids has, got {len(value)}")
            if value.dim() != (2 if name in OFFLINE else 1):
                raise ValueError(
                    f"expected {name} of shape (tokens{', K' * (name in OFFLINE)}), got {tuple(value.shape)}"
                )
        learned = (mask > 0) & (F.pad(mask[:-1], (1, 0), value=1) > 0)
        for name in MASKS:
            learned = learned & (made.pop(name, mask) > 0)
        made.setdefault("labels", torch.where(learned, ids, -100))
        return made
