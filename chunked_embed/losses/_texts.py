"""Ids of texts, from all that a model gets to see of them: tokens, and what stands beside those, such as images.

Equal inputs have equal ids, whatever they are padded with or packed into; others have them by a chance of about one in
2^64. An id is a sum over a row's places of what is there times a number of the place's own, modulo 2^64. Zeros add
nothing, so that an input which others of the column have, or have more of, makes no difference.
"""

from __future__ import annotations

import hashlib
from numbers import Number
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from chunked_embed.losses._bags import is_bag, with_row_ends

Column = dict[str, Any]

ASIDE = frozenset(
    {
        # How the texts are laid out in the column.
        *("attention_mask", "position_ids", "special_tokens_mask", "sentence_lengths", "query_expansion_positions"),
        *("offsets", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"),
        *("num_images_per_sample", "num_videos_per_sample"),
        # About the tokens: a prompt is among them.
        *("prompt_length", "offset_mapping", "overflow_to_sample_mapping"),
        # What modules have left there: a wrapper may call its loss twice with the same features.
        *("sentence_embedding", "token_embeddings", "all_layer_embeddings"),
        *("cls_token_embeddings", "token_weights_sum"),
    }
)
GRIDS = (  # the patches of images and videos end to end, a row of the grid for each image: (items, 3)
    ("image_grid_thw", "pixel_values", "num_images_per_sample"),
    ("video_grid_thw", "pixel_values_videos", "num_videos_per_sample"),
)
BY_IMAGE = ("pixel_values", "image_position_ids", "image_sizes")
PADDED_IMAGES = ("pixel_attention_mask", "aspect_ratio_ids")  # beside them each text has as many images as any

MULTIPLIER = 6364136223846793005  # odd, of Knuth's generator
STEP = 3935559000370003845  # odd, of another of his
INSTEAD = 'Leave it out of the features, or say by false_negatives="labels" which rows belong together.'

BLOCK = 1 << 22  # numbers that are worked on at a time


@torch.no_grad()
def text_ids(features: list[Column], model: nn.Module | None = None) -> Tensor:  # (N, columns) int64
    ids = [_column_ids(*pair) for pair in zip(features, _vocabularies(model, features))]
    if len({len(column) for column in ids}) > 1:
        raise ValueError(f"expected columns of as many texts each, got {[len(column) for column in ids]}")
    return torch.stack(ids, dim=1)


def _column_ids(column: Column, vocabulary: str) -> Tensor:  # (N,)
    names = [name for name, value in column.items() if name not in ASIDE and not _of_all_rows(value)]
    if "input_ids" not in names:  # a mask says how long a recording is
        names += [name for name in ("attention_mask",) if name in column]
    if not names and "sentence_embedding" in column:  # a bag of words is its own embedding
        names = ["sentence_embedding"]
    if not names:
        raise ValueError(f'false_negatives="text" needs tokens ("input_ids") or other inputs, got {sorted(column)}')
    inputs = {name: _tensor(name, column[name]) for name in names}
    layout = _Packed(column) if is_bag(column) or "cu_seq_lens_q" in column else _Padded(column, inputs)
    sums = [_scrambled(layout.sums(name, x)) * _factor(f"{vocabulary} {name}") for name, x in inputs.items()]
    return torch.stack(sums).sum(0)


def _of_all_rows(value: Any) -> bool:
    """What holds for a column as a whole, such as a task or a modality, is no part of its texts."""
    words = isinstance(value, tuple) and all(isinstance(word, str) for word in value)
    return value is None or isinstance(value, (str, Number)) or getattr(value, "ndim", None) == 0 or words


def _tensor(name: str, value: Any) -> Tensor:
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        tensor = None
    if tensor is None or tensor.layout != torch.strided or tensor.is_nested:
        got = type(value).__name__ if tensor is None else str(tensor.layout)
        raise ValueError(f'false_negatives="text" compares all inputs: expected {name!r} a dense tensor, got {got}')
    return tensor


# --- which row an input belongs to -----------------------------------------------------------------------------------


class _Padded:
    """A first dimension of rows, but for images and videos, of which a row may have several, or none."""

    def __init__(self, column: Column, inputs: dict[str, Tensor]) -> None:
        counts = {name: column[name] for *_, name in GRIDS if column.get(name) is not None}
        first = [column[name] for name in ("input_ids", "attention_mask") if name in column]
        self.n = len([*first, *counts.values(), *inputs.values()][0])
        self.mask = _mask(column) if "input_ids" in column else None
        self.lengths: dict[str, Tensor] = {}  # items of each row
        for grid, patches, count in GRIDS:
            if grid in inputs and patches in inputs:
                each = counts.get(count, inputs[grid].new_ones(len(inputs[grid])))
                if len(each) == self.n and int(each.sum()) == len(inputs[grid]):
                    sizes, rows = inputs[grid].long().prod(1), _rows_of(each, len(inputs[grid]))
                    self.lengths |= {grid: each, patches: sizes.new_zeros(self.n).index_add_(0, rows, sizes)}
        images = counts.get("num_images_per_sample")
        if images is not None and not any(name in column for name in PADDED_IMAGES):
            self.lengths = dict.fromkeys(BY_IMAGE, images) | self.lengths
        one = torch.ones(self.n, dtype=torch.long)
        self.others = [one, 0 * one, *counts.values()]

    def sums(self, name: str, x: Tensor) -> Tensor:  # (N,)
        if self.mask is not None and name == "input_ids":
            return _by_mask(x.long() + 1, self.mask)  # a token 0 is one, too
        candidates = [self.lengths[name]] if name in self.lengths else []
        lengths = next((each for each in [*candidates, *self.others] if int(each.sum()) == len(x)), None)
        if lengths is None or len(lengths) != self.n:
            raise ValueError(
                f'false_negatives="text" compares all inputs, and {name!r} {tuple(x.shape)} does not say which of the '
                f"{self.n} texts it belongs to: expected a first dimension of {self.n}, or num_images_per_sample or "
                f"num_videos_per_sample beside it. {INSTEAD}"
            )
        by_token = self.mask is not None and x.shape[:2] == self.mask.shape
        if self.mask is not None and by_token and not (x.is_floating_point() or name.startswith("pixel_")):
            return _by_mask(_items(x.flatten(0, 1)).view(self.mask.shape), self.mask)
        return _by_row(_items(x), lengths.to(x.device))


class _Packed:
    """The tokens of all rows end to end: an EmbeddingBag's, or one sequence's."""

    def __init__(self, column: Column) -> None:
        bounds = with_row_ends(column)["cu_seq_lens_q"].long()
        self.lengths, self.total = bounds.diff(), int(bounds[-1])

    def sums(self, name: str, x: Tensor) -> Tensor:  # (N,)
        if name == "input_ids" and x.numel() == self.total:
            return _by_row(x.flatten().long() + 1, self.lengths)
        if x.shape[-1] == self.total:
            return _by_row(_items(x.movedim(-1, 0)), self.lengths)
        if len(x) == len(self.lengths):
            return _by_row(_items(x), torch.ones_like(self.lengths))
        raise ValueError(
            f'false_negatives="text" compares all inputs, and {name!r} {tuple(x.shape)} does not say which of the '
            f"{len(self.lengths)} texts it belongs to: expected a last dimension of {self.total} (tokens), or a first "
            f"one of {len(self.lengths)}. {INSTEAD}"
        )


def _mask(column: Column) -> Tensor:
    tokens, mask = column["input_ids"], column.get("attention_mask")
    if tokens.ndim != 2 or (mask is not None and mask.shape != tokens.shape):
        got = f"{tuple(tokens.shape)} and {None if mask is None else tuple(mask.shape)}"
        raise ValueError(f'false_negatives="text": expected input_ids and attention_mask (N, T), got {got}')
    return torch.ones_like(tokens) if mask is None else mask.long()


def _by_mask(items: Tensor, mask: Tensor) -> Tensor:  # (N, T), (N, T) -> (N,)
    """Places are counted in real tokens, so that padding on either side changes nothing."""
    places = _places(torch.arange(mask.shape[1], device=mask.device))
    return (_scrambled(items) * places[mask.cumsum(1) - mask] * mask).sum(1)


def _rows_of(lengths: Tensor, total: int) -> Tensor:  # (total,)
    rows = torch.arange(len(lengths), device=lengths.device)
    return rows.repeat_interleave(lengths.long(), output_size=total)


def _by_row(items: Tensor, lengths: Tensor) -> Tensor:  # (items,), (N,) -> (N,)
    rows = _rows_of(lengths, len(items))
    place = torch.arange(len(items), device=items.device) - (lengths.cumsum(0) - lengths)[rows]
    values = _scrambled(items) * _places(place)
    return torch.zeros(len(lengths), dtype=torch.long, device=items.device).index_add_(0, rows, values)


# --- numbers ---------------------------------------------------------------------------------------------------------


def _items(x: Tensor) -> Tensor:  # (items, ...) -> (items,)
    x = x[:, None] if x.ndim == 1 else x
    places = torch.ones((), dtype=torch.long, device=x.device)
    for size in x.shape[1:]:  # of one place at least, however large the others' axes are
        places = _places(torch.arange(size, device=x.device), places[..., None])
    parts = x.split(max(BLOCK // max(places.numel(), 1), 1))
    return torch.cat([(_scrambled(_words(part)) * places).flatten(1).sum(1) for part in parts])


def _words(x: Tensor) -> Tensor:
    """The bits of floating point numbers, of which a negative zero has none either; integers as they are."""
    if x.is_complex():
        x = torch.view_as_real(x)
    if not x.is_floating_point():
        return x.long()
    x = x.float() if x.element_size() == 1 else x
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return (x + 0.0).contiguous().view(kind).long()


def _places(place: Tensor, outer: Tensor | int = 0) -> Tensor:
    """An odd number of its own for every place, within that of the axes before."""
    return _scrambled(outer + (place + 1) * STEP) | 1


def _scrambled(x: Tensor) -> Tensor:
    """One to one, and zero for zero; neighbours go far apart."""
    for _ in range(2):
        x = _folded(x).mul_(MULTIPLIER)
    return _folded(x)


def _folded(x: Tensor) -> Tensor:
    return (x >> 32).bitwise_and_(0xFFFFFFFF).bitwise_xor_(x)


def _factor(name: str) -> int:
    """An odd number of its own for every name, the same in every process."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little", signed=True) | 1


# --- what a token is --------------------------------------------------------------------------------------------------

_SAME: WeakKeyDictionary[nn.Module, tuple[list[int], bool]] = WeakKeyDictionary()


def _vocabularies(model: nn.Module | None, features: list[Column]) -> list[str]:
    """A name of each column's vocabulary. The routes of a Router may have one each: then columns of unlike routes have
    no texts in common, though they may have tokens."""
    while model is not None and (inner := getattr(model, "module", getattr(model, "_orig_mod", None))) is not None:
        model = inner
    router = None if model is None else next(model.children(), None)
    routes = getattr(router, "sub_modules", None)
    if router is None or not isinstance(routes, nn.ModuleDict) or _one_vocabulary(router, routes):
        return [""] * len(features)
    return [f"{column.get('task')} {column.get('modality')}" for column in features]


def _one_vocabulary(router: nn.Module, routes: nn.ModuleDict) -> bool:
    tokenizers = [getattr(next(route.children(), None), "tokenizer", None) for route in routes.values()]
    tokenizers = list({id(tokenizer): tokenizer for tokenizer in tokenizers if tokenizer is not None}.values())
    found, same = _SAME.get(router, ([], True))
    if found != [id(tokenizer) for tokenizer in tokenizers]:  # comparing vocabularies takes a while
        vocabularies = [getattr(tokenizer, "get_vocab", object)() for tokenizer in tokenizers]
        same = all(vocabulary == vocabularies[0] for vocabulary in vocabularies[1:])
        _SAME[router] = [id(tokenizer) for tokenizer in tokenizers], same
    return same
