"""Several documents in one row without padding: what a model is told of them, and whether it keeps them apart.

Attention kernels differ in where they find the documents. Flash attention and linear attention read the offsets, or
position ids in a batch of one row; eager attention and sdpa position ids, if there is no attention mask. A state-space
layer may read none of it. So ``of_documents`` says everything, and ``check_apart`` looks at what came of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from chunked_embed import Head, causal_lm

DOCUMENTS = ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
LENGTHS = "seq_lengths"  # of the documents of a row, as TRL's pack_dataset leaves them
FURTHER = {"output_hidden_states", "output_attentions", "output_router_logits", "is_causal", "use_cache"}
SAMPLE = 32
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 2e-3}
"""Of states, for experts whose products group other tokens: without experts there is no difference at all."""


def of_documents(lengths: Sequence[int]) -> dict[str, Any]:
    """Arguments of a model's forward for documents of these lengths in one row."""
    sizes = torch.tensor(lengths)
    ends = torch.cat([torch.zeros(1), sizes.cumsum(0)]).int()
    longest = int(sizes.max())
    each = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(sizes)
    return {
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), ends),
        **dict.fromkeys(("max_length_q", "max_length_k"), longest),
        "seq_idx": each[None],
    }


def document_lengths(row: Mapping[str, Any]) -> list[int]:
    """A row's ``seq_lengths``, which are those of its ``input_ids``."""
    lengths = torch.as_tensor(row[LENGTHS]).tolist()
    tokens = len(row["input_ids"])
    whole = isinstance(lengths, list) and all(isinstance(n, int) and n > 0 for n in lengths)
    if not whole or sum(lengths) != tokens:
        raise ValueError(f"expected {LENGTHS} of one or more that add up to the {tokens} input_ids, got {lengths}")
    return lengths


class KeepsApart:
    """A collator of the user's for rows with ``seq_lengths``, whose batches must say where documents begin."""

    def __init__(self, collator: Callable[[list], dict[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, rows: list[Mapping[str, Any]]) -> dict[str, Any]:
        documents = sum(len(row[LENGTHS]) for row in rows if row.get(LENGTHS) is not None)
        batch = self.collator(rows)
        positions = batch.get("position_ids")
        begun = 0 if positions is None else len(positions) + int((positions.diff(dim=-1) != 1).sum())
        if begun < documents:
            raise ValueError(
                f"expected a data_collator that keeps the {documents} documents of these rows apart, as {LENGTHS} says "
                f"(the default one does), got {type(self.collator).__name__}, with position_ids for {begun}"
            )
        return batch


# --- what a model reads ----------------------------------------------------------------------------------------------


def read_by(model: Any) -> set[str] | None:
    """Names that a model's forward or its backbone's takes; None: there is no telling."""
    base = causal_lm.unwrapped(model)
    found: set[str] = set()
    for module in (base, getattr(base, "base_model", base)):
        found |= set(inspect.signature(module.forward).parameters)
    return found if "input_ids" in found else None


def check_takes_documents(model: Any, who: str) -> None:
    """A forward without position ids cannot be told of documents."""
    names = read_by(model)
    if names is not None and "position_ids" not in names:
        kind = type(causal_lm.unwrapped(model)).__name__
        raise ValueError(f"expected {who} to take position_ids for documents in one row, got {kind}, which does not")


def unread(model: Any, names: Iterable[str]) -> list[str]:
    """What a model of transformers would swallow without a word."""
    known = read_by(model)
    return [] if known is None else sorted(set(names) - known - FURTHER - set(DOCUMENTS))


def check_unmasked(inputs: Mapping[str, Any]) -> None:
    """Beside an attention mask, attention does not look for documents in position ids."""
    positions, mask = inputs.get("position_ids"), inputs.get("attention_mask")
    if positions is None or mask is None or positions.dim() != 2 or mask.dim() != 2:
        return
    both = (mask[:, 1:] > 0) & (mask[:, :-1] > 0)
    if bool(((positions.diff(dim=-1) != 1) & both).any()):
        raise ValueError(
            "expected position_ids that restart within a row to come without an attention_mask, beside which documents "
            "see each other: flatten the batch into one row without padding"
        )


def check_apart(model: nn.Module, inputs: Mapping[str, Any], who: str) -> None:
    """Whether what a document's states are depends on the document before it, in a few tokens of a batch.

    With the same arguments that ``inputs`` has of ``DOCUMENTS``. One pair of forwards on each process, whatever it has
    in its batch: sharded models want as many everywhere.

    Raises:
        ValueError: they do.
    """
    ids = inputs["input_ids"][:2, :SAMPLE]
    rows, tokens = ids.shape
    half = tokens // 2
    told = {name: value for name, value in of_documents([half, tokens - half]).items() if name in inputs}
    told = {name: value.to(ids.device) if isinstance(value, Tensor) else value for name, value in told.items()}
    if "position_ids" in told:
        told["position_ids"] = told["position_ids"].expand(rows, -1)
    other = ids.clone()
    other[:, :half] = ids[:, half : half + 1]
    found: list[Tensor] = []

    def keep(head: Head) -> None:
        found.append(head.hidden[:, -(tokens - half) :].detach())

    with torch.no_grad(), causal_lm.evaluating(model):
        for these in (ids, other):
            model(input_ids=these, **told, use_cache=False, head_fn=keep)
    here, there = (states.double() for states in found)
    difference = ((here - there).norm(dim=-1) / here.norm(dim=-1).clamp_min(1e-30)).mean().item()
    device = ids.device.type
    dtypes = [found[0].dtype] + [torch.get_autocast_dtype(device)] * torch.is_autocast_enabled(device)
    if not difference <= max(TOLERANCE[dtype] for dtype in dtypes):
        raise ValueError(
            f"expected {who} to keep documents in one row apart, got states of {type(model).__name__} that depend on "
            f"the document before (by {difference:.1e} of their size): its layers or its attention do not follow "
            f"{sorted(told) or 'anything'}. Put one document in a row"
        )
