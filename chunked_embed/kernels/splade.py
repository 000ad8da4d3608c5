"""Outputs of a head pooled over the tokens of each text, ``(N, V)``: those of the tokens, ``(R, V)``, are never held.

The largest output of a text and column is that of one token: its gradient is a number times a row of the weight, and
times a row of the input, and nothing is multiplied by the zeros beside it. Sums have a dense gradient, formed again a
chunk of rows at a time. On a GPU a product of half-precision operands leaves pooled, in kernels; all else goes by
chunks of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from chunked_embed.kernels import available
from chunked_embed.kernels.selection import selected
from chunked_embed.kernels.weighted_sums import weighted_sums

GROUP = 16  # rows of a text come in groups of so many, in the kernels
CHUNK_ROWS = 256  # or a multiple of it, of those whose outputs are formed at a time
ENTRY_BYTES = 64  # of a number and its place, while the twin gathers what it multiplies
PARTS = 16  # of the budget, at least: sums are copied to where they belong, and few of them are in fast memory then
HALF = (torch.bfloat16, torch.float16)

LOG1P = {"relu": 1, "log1p_relu": 2}
"""How often log1p is taken behind the relu, by the library's names."""


@dataclass(frozen=True)
class Texts:
    """Rows in the order of their texts. In the kernels a text begins at a multiple of ``GROUP`` rows, and its last row
    comes again up to there: its outputs are not the first of their size. A text without tokens has rows of another one
    there, which do not count."""

    grouped: bool
    source: Tensor | None  # (R,), which of the given rows each is; None: they come in this order
    text: Tensor  # (R,) int32
    within: Tensor  # (R,) int32, how many rows of its text are before each
    start: Tensor  # (N,) int32, the first row of each text
    length: Tensor  # (N,) int32, its tokens
    bounds: list[int]  # (N + 1), where texts begin, on the host
    lengths: list[int]  # (N,)

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def position_dtype(self) -> torch.dtype:
        return torch.int16 if max(self.lengths, default=0) < 2**15 else torch.int32

    def rows_of(self, hidden: Tensor) -> Tensor:  # (M, H) -> (R, H)
        return hidden if self.source is None else hidden.index_select(0, self.source)

    def put_rows(self, rows: Tensor, out: Tensor) -> None:  # (R, H) -> (M, H), where they come from
        if self.source is None:
            out.copy_(rows)
        elif self.grouped:
            own = torch.nonzero_static(self.within < self.length[self.text], size=self.tokens)[:, 0]
            out.index_copy_(0, self.source[own], rows[own])
        else:
            out.index_copy_(0, self.source, rows)


def serves(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether there are kernels for operands of this dtype."""
    return dtype in HALF and available(device)


def texts_of(mask: Tensor, grouped: bool = False) -> Texts:  # (..., L) bool
    """Of the tokens that count: each line of the mask is a text. Waits for the device."""
    n = mask.shape[:-1].numel()
    ids = torch.arange(n, device=mask.device).view(*mask.shape[:-1], 1).expand(mask.shape)
    return texts(ids.masked_fill(~mask, -1).flatten(), n, grouped)[0]


def texts(
    segments: Tensor,  # (M,) integers: the text of each row; a negative one drops it
    n: int,
    grouped: bool,
) -> tuple[Texts, int]:
    """-> and how many rows name a text beyond the last. Waits for the device."""
    found = selected(segments.long().contiguous(), (), 0, n, kernel=segments.is_cuda)
    grouped = grouped and found.bounds[-1] > 0
    lengths = [stop - start for start, stop in pairwise(found.bounds)]
    offsets = found.offsets.to(torch.int32)
    first, length = offsets[:-1], offsets.diff()
    if grouped:
        sizes = (length + (GROUP - 1)).div(GROUP, rounding_mode="floor").clamp_min(1) * GROUP
        bounds = [0, *accumulate(max(-(-length // GROUP), 1) * GROUP for length in lengths)]
        start = sizes.cumsum(0, dtype=torch.int32) - sizes
    else:
        sizes, bounds, start = length, found.bounds, first
    numbers = torch.arange(n, dtype=torch.int32, device=segments.device)
    text = numbers.repeat_interleave(sizes, output_size=bounds[-1])
    within = torch.arange(bounds[-1], dtype=torch.int32, device=segments.device) - start[text]
    source = found.order
    if grouped:
        place = first[text] + torch.minimum(within, length[text] - 1)
        place.clamp_(0, found.bounds[-1] - 1)
        source = place.long() if source is None else source[place]
    return Texts(grouped, source, text, within, start, length, bounds, lengths), found.over


def activated(pooled: Tensor, activation: str) -> Tensor:
    """``log1p`` of what is not negative, once or twice."""
    for _ in range(LOG1P[activation]):
        pooled = pooled.log1p()
    return pooled


def through_activation(upstream: Tensor, outputs: Tensor, activation: str) -> Tensor:
    """The gradient of outputs, ``upstream`` times the slope of ``log1p(relu(.))`` there; NaN where an output is."""
    u = outputs.relu()
    grad = upstream / (1 + u)
    for _ in range(LOG1P[activation] - 1):
        u = u.log1p()
        grad /= 1 + u
    return grad.masked_fill_(outputs <= 0, 0.0)


# --- the largest -----------------------------------------------------------------------------------------------------


def max_pool(
    x: Tensor,  # (R, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    of: Texts,
    budget: int,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:  # (N, V), (N, V)
    """``max(0, the largest output of a text)``, float32 of half-precision operands. To ``keep``, also the place in its
    text of the first row that has it."""
    if of.grouped:
        from chunked_embed.kernels import _triton_splade as kernels

        return kernels.max_pool(x, weight, bias, of, keep, signed=False)
    shape = len(of.lengths), len(weight)
    best = torch.zeros(shape, dtype=wide(x.dtype), device=x.device)
    at = torch.zeros(shape, dtype=of.position_dtype, device=x.device) if keep else None
    for text, before, z in _by_text(x, weight, bias, of, budget):
        value, index = z.max(1) if keep else (z.amax(1), None)
        take = ~(value <= best[text])  # NaN is taken, and stays
        if before:
            take &= best[text] == best[text]
        best[text] = torch.where(take, value, best[text])
        if at is not None and index is not None:
            at[text] = torch.where(take, index + before, at[text])
    return best, at


def max_gradients(
    g: Tensor,  # (N, V), of the largest outputs
    at: Tensor,  # (N, V)
    x: Tensor,  # (R, H)
    weight: Tensor,  # (V, H)
    of: Texts,
    budget: int,
    hidden_out: Tensor | None,  # (M, H), of zeros
    weight_out: Tensor | None,  # (V, H)
) -> None:
    """Sums over entries that are not zero, float32 of half-precision operands, and rounded once."""
    if of.grouped:
        from chunked_embed.kernels import _triton_splade as kernels

        return kernels.max_gradients(g, at, x, weight, of, hidden_out, weight_out)
    if weight_out is not None:
        table = x.to(g.dtype)
        row_bytes = PARTS * weight.shape[1] * g.element_size()
        size = max(budget // max(ENTRY_BYTES * len(g), row_bytes, 1), 1)
        for first in range(0, len(weight), size):
            part = g[:, first : first + size].t()
            column, text = part.nonzero(as_tuple=True)
            rows = of.start[text] + at[text, column + first]
            weight_out[first : first + size] = weighted_sums(table, rows.long(), part[column, text], column, len(part))
    if hidden_out is not None:
        table, rows_out = weight.to(g.dtype), torch.empty(x.shape, dtype=hidden_out.dtype, device=x.device)
        size = max(budget // (ENTRY_BYTES * len(weight)), 1)
        for first in range(0, len(g), size):
            part = g[first : first + size]
            text, column = part.nonzero(as_tuple=True)
            start, stop = of.bounds[first], of.bounds[min(first + size, len(g))]
            rows, order = (of.start[text + first] + at[text + first, column] - start).sort(stable=True)
            weights, column = part[text, column][order], column[order]
            rows_out[start:stop] = weighted_sums(table, column, weights, rows, stop - start)
        of.put_rows(rows_out, hidden_out)
    return None


# --- sums ------------------------------------------------------------------------------------------------------------


def sum_pool(
    x: Tensor,  # (R, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    of: Texts,
    budget: int,
    activation: str,
) -> Tensor:  # (N, V)
    """Activated outputs, added up over a text's rows; float32 of half-precision operands."""
    if of.grouped:
        from chunked_embed.kernels import _triton_splade as kernels

        return kernels.sum_pool(x, weight, bias, of, LOG1P[activation])
    total = torch.zeros(len(of.lengths), len(weight), dtype=wide(x.dtype), device=x.device)
    for text, _, z in _by_text(x, weight, bias, of, budget):
        total[text] += activated(z.relu_(), activation).sum(1)
    return total


def sum_gradients(
    upstream: Tensor,  # (N, V) float32, or float64
    x: Tensor,  # (R, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    of: Texts,
    budget: int,
    activation: str,
    hidden_out: Tensor | None,  # (M, H), of zeros
    weight_out: Tensor | None,  # (V, H)
    bias_out: Tensor | None,  # (V,)
) -> None:
    """The gradient of a chunk's outputs is rounded to the operands' dtype, once; sums are float32 of those."""
    sums, power = upstream.dtype, None
    if x.dtype == torch.float16:
        power = power_of(upstream)
        upstream = upstream * power
    rows = None if hidden_out is None else torch.empty(x.shape, dtype=hidden_out.dtype, device=x.device)
    by_column = None if weight_out is None else torch.zeros(weight.shape, dtype=sums, device=x.device)
    of_bias = None if bias_out is None else torch.zeros(weight.shape[:1], dtype=sums, device=x.device)
    for first, stop in _chunks(len(x), len(weight) * x.element_size(), budget):
        part = x[first:stop]
        dz = _slopes(upstream, part, weight, bias, of, first, activation, of_bias)
        if rows is not None:
            rows[first:stop] = _unscaled(product(dz.t(), weight), power)
        if by_column is not None:
            _add_product(by_column, dz, part)
    if rows is not None and hidden_out is not None:
        of.put_rows(rows, hidden_out)
    for out, total in ((weight_out, by_column), (bias_out, of_bias)):
        if out is not None and total is not None:
            out.copy_(_unscaled(total, power))


def _slopes(
    upstream: Tensor,  # (N, V)
    x: Tensor,  # (R', H), rows of a chunk
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    of: Texts,
    first: int,
    activation: str,
    of_bias: Tensor | None,  # (V,), to which the sums over rows are added
) -> Tensor:  # (V, R')
    """The gradient of a chunk's outputs, transposed."""
    if of.grouped:
        from chunked_embed.kernels import _triton_splade as kernels

        return kernels.sum_slopes(upstream, x, weight, bias, of, first, LOG1P[activation], of_bias)
    z = _outputs(x, weight, bias)
    text = of.text[first : first + len(x)]
    dz = through_activation(upstream.index_select(0, text).t(), z, activation)
    if of_bias is not None:
        of_bias += dz.sum(1)
    return dz.to(x.dtype)


def power_of(g: Tensor) -> Tensor:  # ()
    """That brings the largest number near one, exactly: float16 keeps what is much smaller then."""
    _, exponent = torch.frexp(g.abs().amax())
    return torch.exp2(-exponent.clamp(-100, 100).to(g.dtype))


# --- outputs by chunks -----------------------------------------------------------------------------------------------


def wide(dtype: torch.dtype) -> torch.dtype:
    """Of outputs and sums."""
    return torch.float32 if dtype in HALF else dtype


def _chunks(rows: int, row_bytes: int, budget: int) -> Iterator[tuple[int, int]]:
    size = max(budget // row_bytes // CHUNK_ROWS * CHUNK_ROWS, CHUNK_ROWS)
    return ((first, min(first + size, rows)) for first in range(0, rows, size))


def _by_text(
    x: Tensor, weight: Tensor, bias: Tensor | None, of: Texts, budget: int
) -> Iterator[tuple[int, int, Tensor]]:
    """A text, how many of its rows came before, and outputs of the next, ``(V, rows)``: their maximum over what lies
    side by side is quicker than the other way round."""
    text = 0
    for first, stop in _chunks(len(x), len(weight) * torch.finfo(wide(x.dtype)).bits // 8, budget):
        z = _outputs(x[first:stop], weight, bias)
        while text < len(of.lengths) and of.bounds[text] < stop:
            start, end = of.bounds[text], of.bounds[text + 1]
            begin = max(start, first)
            if begin < end:
                yield text, begin - start, z[:, begin - first : min(end, stop) - first]
            if end > stop:
                break
            text += 1


def _outputs(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # (V, R)
    z = product(weight, x.t())
    return z if bias is None else z.add_(bias[:, None])


def product(a: Tensor, b: Tensor) -> Tensor:
    """Float32 of half-precision operands."""
    if a.is_cuda and a.dtype in HALF:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.to(wide(a.dtype)) @ b.to(wide(b.dtype))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if a.is_cuda and a.dtype in HALF:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _unscaled(value: Tensor, power: Tensor | None) -> Tensor:
    return value if power is None else value.div_(power)
