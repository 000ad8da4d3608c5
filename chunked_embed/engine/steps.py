"""What happens to the outputs of one chunk: values, and gradients with respect to the outputs only.

Each factory below returns a plain function that is compiled once for a loss, its static options and a row count. The
matrix products stay outside: cuBLAS does those, and a compiled step without them reaches a hand-written kernel.
Outputs reach loss functions in float32 (float64), whatever the products' dtype: in a compiled step the cast is free.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .compile import compiled_step
from .plan import tiles
from .problem import ONLY
from .types import accumulator_dtype

Named = dict[str, Tensor]


@dataclass(frozen=True)
class Function:
    """A user's function and what identifies it in the compile cache."""

    call: Callable
    key: Hashable
    single: bool  # outputs of one projection: pass the tensor, not a dict
    has_columns: bool

    def __call__(self, outputs: Named, rows: Named, columns: Named, hp: NamedTuple) -> Any:
        given = next(iter(outputs.values())) if self.single else outputs
        return self.call(given, rows, hp, columns=columns) if self.has_columns else self.call(given, rows, hp)


@dataclass
class ChunkData:
    """One chunk in a step's hands. Buffers of outputs may be longer than ``rows``: room to pad a compiled step."""

    rows: int
    outputs: Named
    destinations: dict[str, Tensor | None]  # for each output that wants a gradient: where it goes, None is in place
    row_args: Named
    columns: Named

    def tile(self, start: int, stop: int, size: int, single: bool) -> tuple[Named, dict[str, Tensor | None]]:
        """Outputs and destinations of a step's rows, padded to ``size``. A single output has one name whatever its
        projection's, so that policy and reference share a compiled step."""
        names = {name: ONLY if single else name for name in self.outputs}
        outputs = {names[name]: tile_of(o, start, stop, size) for name, o in self.outputs.items()}
        places = self.destinations.items()
        return outputs, {names[name]: d if d is None else d[start : start + size] for name, d in places}


def split_metrics(result: Any) -> tuple[Tensor, Named]:
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping):
        return result[0], dict(result[1])
    return result, {}


def _wide(outputs: Named) -> Named:
    return {name: o.to(accumulator_dtype(o.dtype)) for name, o in outputs.items()}


def _check_per_row(what: str, value: Any, rows: int) -> None:
    if not isinstance(value, Tensor) or tuple(value.shape) != (rows,):
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"expected {what} to return one value per row, ({rows},), got {got}")


def weighted(loss: Tensor, weight: Tensor) -> Tensor:
    """What has weight zero counts for nothing, infinite or not: padded rows, empty groups."""
    return (torch.where(weight != 0, loss, 0.0) * weight).sum()


def _own(named: Mapping[str, Tensor]) -> Named:
    """Copies: a value that is a view of the outputs would change when their gradient takes their place."""
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"expected {name!r} to be a tensor, got {type(value).__name__}")
    return {name: value.detach().clone() for name, value in named.items()}


def _gradients(total: Callable, arguments: tuple[Named, ...]) -> tuple[tuple[Named, ...], Tensor, Named]:
    """-> gradients of ``total(*arguments) -> (value, metrics)``, its value, its metrics."""
    if torch.compiler.is_compiling():
        both = torch.func.grad_and_value(total, argnums=tuple(range(len(arguments))), has_aux=True)
        grads, (value, metrics) = both(*arguments)
        return grads, value, metrics
    # Plain autograd also works under saved-tensor hooks (offloading), which torch.func refuses.
    with torch.enable_grad():
        leaves = tuple({name: t.detach().requires_grad_() for name, t in named.items()} for named in arguments)
        value, metrics = total(*leaves)
        flat = grad_or_zero(value, [leaf for named in leaves for leaf in named.values()])
    found = iter(flat)
    return tuple({name: next(found) for name in named} for named in leaves), value.detach(), metrics


def grad_or_zero(value: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Gradients of a scalar; zero where it does not depend on a leaf."""
    if not value.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    found = torch.autograd.grad(value, leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]


def _store(grads: Named, outputs: Named, destinations: dict[str, Tensor | None]) -> Named:
    """Write the outputs' gradients to their destinations -> those that are left for ``store_rest``.

    Inductor's C++ backend fails on some reductions that are fused with a write to an input (KeyError in its outer loop
    fusion, torch 2.13), so a compiled step on a CPU returns them.
    """
    rest = {}
    for name, grad in grads.items():
        destination = outputs[name] if destinations[name] is None else destinations[name]
        assert destination is not None
        if torch.compiler.is_compiling() and destination.device.type == "cpu":
            rest[name] = grad.to(destination.dtype)
        else:
            destination.copy_(grad)
    return rest


def store_rest(rest: Named, outputs: Named, destinations: dict[str, Tensor | None]) -> None:
    for name, grad in rest.items():
        destination = destinations[name]
        (outputs[name] if destination is None else destination).copy_(grad)


# --- row-wise losses: one fused step ---------------------------------------------------------------------------------


def row_values(loss_fn: Function) -> Callable:
    def step(outputs, destinations, rows, columns, weight, hp):
        loss, metrics = split_metrics(loss_fn(_wide(outputs), rows, columns, hp))
        _check_per_row("loss_fn", loss, len(weight))
        return weighted(loss, weight), _own(metrics)

    return step


def row_values_and_gradients(
    loss_fn: Function, wanted_rows: tuple[str, ...], wanted_columns: tuple[str, ...]
) -> Callable:
    def step(outputs, destinations, rows, columns, weight, hp):
        wide = _wide(outputs)

        def total(o: Named, r: Named, c: Named) -> tuple[Tensor, Named]:
            result = loss_fn({**wide, **o}, {**rows, **r}, {**columns, **c}, hp)
            loss, metrics = split_metrics(result)
            _check_per_row("loss_fn", loss, len(weight))
            return weighted(loss, weight), _own(metrics)

        arguments = (
            {name: wide[name] for name in destinations},
            {name: rows[name] for name in wanted_rows},
            {name: columns[name] for name in wanted_columns},
        )
        grads, value, metrics = _gradients(total, arguments)
        return value, metrics, grads[1], grads[2], _store(grads[0], outputs, destinations)

    return step


# --- scores: values first, the product of their Jacobian with an upstream later --------------------------------------


@dataclass(frozen=True)
class Elements:
    """A function of outputs to elements ``(R, V)`` by name, and how each is reduced: over columns to one value a row,
    or over rows (of all chunks) to one value a column."""

    function: Function
    rows: tuple[tuple[str, str], ...]  # name, "logsumexp" or "sum"
    columns: tuple[tuple[str, str], ...]

    @property
    def key(self) -> Hashable:
        return (self.function.key, self.rows, self.columns)


def _reduce(how: str, elements: Tensor, dim: int) -> Tensor:
    return elements.sum(dim) if how == "sum" else elements.logsumexp(dim)


def _share(how: str, x: Tensor, total: Tensor) -> Tensor | float:
    """d total / d x: from the total alone, so that no reduction is formed again."""
    return torch.where(total > -torch.inf, torch.exp(x.detach() - total), 0.0) if how == "logsumexp" else 1.0


def score_values(score_fn: Function, elements: Elements | None) -> Callable:
    def step(outputs, destinations, rows, columns, valid, hp):
        wide = _wide(outputs)
        scores = score_fn(wide, rows, columns, hp)
        if not isinstance(scores, Mapping) or not scores:
            raise ValueError(f"expected score_fn to return a dict of scores by name, got {type(scores).__name__}")
        for name, value in scores.items():
            _check_per_row(f"score {name!r}", value, len(next(iter(wide.values()))))
        totals, parts = {}, {}
        if elements is not None:
            found = elements.function(wide, rows, columns, hp)
            totals = {name: _reduce(how, found[name], 1) for name, how in elements.rows}
            for name, how in elements.columns:
                nothing = 0.0 if how == "sum" else -torch.inf
                parts[name] = _reduce(how, torch.where(valid[:, None], found[name], nothing), 0)
        return _own(scores), totals, parts

    return step


def score_gradients(
    score_fn: Function,
    elements: Elements | None,
    wanted_rows: tuple[str, ...],
    wanted_columns: tuple[str, ...],
) -> Callable:
    def step(outputs, destinations, rows, columns, valid, upstream, totals, hp):
        wide = _wide(outputs)

        def total(o: Named, r: Named, c: Named) -> tuple[Tensor, Named]:
            arguments = ({**wide, **o}, {**rows, **r}, {**columns, **c}, hp)
            scores = score_fn(*arguments)
            value: Any = sum((scores[name] * upstream[name]).sum() for name in scores)
            if elements is not None:
                found = elements.function(*arguments)
                for name, how in elements.rows:
                    g = upstream[name][:, None] * _share(how, found[name], totals[name][:, None])
                    value = value + torch.where(g == 0, 0.0, found[name] * g).sum()
                for name, how in elements.columns:
                    g = upstream[name] * valid[:, None] * _share(how, found[name], totals[name])
                    value = value + torch.where(g == 0, 0.0, found[name] * g).sum()
            return value, {}

        arguments = (
            {name: wide[name] for name in destinations},
            {name: rows[name] for name in wanted_rows},
            {name: columns[name] for name in wanted_columns},
        )
        grads, _, _ = _gradients(total, arguments)
        return grads[1], grads[2], _store(grads[0], outputs, destinations)

    return step


# --- running a step over the rows of a chunk -------------------------------------------------------------------------


class Runner:
    """Runs steps over chunks: whole, or compiled for wide outputs in tiles of a few fixed sizes."""

    def __init__(
        self,
        compiled: bool,
        rungs: tuple[int, ...] | None,
        static_widths: bool,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.compiled = compiled
        self.rungs = rungs  # None: natural row counts
        self.static_widths = static_widths
        self.device = device
        self.dtype = dtype

    def tiles(self, rows: int) -> list[tuple[int, int, int]]:
        return [(0, rows, rows)] if self.rungs is None or rows == 0 else list(tiles(rows, self.rungs))

    def step(self, factory: Callable, bound: tuple, key: Hashable, data: ChunkData, rows: int) -> Callable:
        if not self.compiled or rows == 0:
            return factory(*bound)
        # A wide step is compiled for its row count alone; a narrow one turns dynamic in whatever changes.
        size = "narrow" if self.rungs is None else rows
        shapes = tuple((o.dtype, o.shape[1] if self.static_widths else None) for o in data.outputs.values())
        return compiled_step(factory, bound, (key, size, shapes, tuple(data.destinations)), self.device)

    def run(self, step: Callable, outputs: Named, destinations: dict[str, Tensor | None], *arguments: Any) -> Any:
        """Run a step, and see that the user's function left its outputs alone, where no gradient takes their place."""
        watched = [] if None in destinations.values() else [o for o in outputs.values() if not o.is_inference()]
        versions = [o._version for o in watched]
        result = step(outputs, destinations, *arguments)
        if [o._version for o in watched] != versions:
            raise ValueError("expected loss_fn and score_fn to leave their outputs alone, got one changed in place")
        return result

    def valid(self, rows: int, size: int) -> Tensor:
        """(size,) True on rows, False on the padding behind them."""
        return torch.arange(size, device=self.device) < rows


def tile_of(buffer: Tensor, start: int, stop: int, size: int) -> Tensor:
    """Rows [start, start + size) of an output buffer; the padding repeats the last real row, so it stays finite."""
    if stop - start < size:
        buffer[stop : start + size] = buffer[stop - 1]
    return buffer[start : start + size]


def pad(rows: Tensor, start: int, stop: int, size: int) -> Tensor:
    """Rows [start, stop) of a row argument, its last row repeated up to ``size``."""
    part = rows[start:stop]
    if stop - start == size:
        return _from_zero(part)
    return torch.cat([part, part[-1:].expand(size - (stop - start), *part.shape[1:])])


def pad_zero(rows: Tensor, start: int, stop: int, size: int) -> Tensor:
    """Rows [start, stop) of a weight or an upstream, zeros up to ``size``: padded rows count for nothing."""
    part = rows[start:stop]
    if stop - start == size:
        return _from_zero(part)
    return torch.cat([part, part.new_zeros(size - (stop - start), *part.shape[1:])])


def _from_zero(part: Tensor) -> Tensor:
    """Small row vectors start their storage: dynamo compiles a dynamic step anew for an offset of zero."""
    return part.clone() if part.storage_offset() else part


class Score(Protocol):
    """How a chunk's outputs become scores. ``saved`` is what the gradient may reuse (statistics of a kernel)."""

    combine: Mapping[str, str]  # column scores by name: how parts of several chunks combine, "logsumexp" or "sum"

    def values(self, data: ChunkData, hp: NamedTuple) -> tuple[Named, Named, Named]:
        """-> scores {name: (rows,)}, column parts {name: (V,)}, saved {name: (rows,)}"""
        ...

    def gradients(
        self, data: ChunkData, hp: NamedTuple, saved: Named, upstream: Named, totals: Named
    ) -> tuple[Named, Named]:
        """Write the outputs' gradients to their destinations -> gradients of row arguments, of columns."""
        ...


class PlainScore:
    """A score from a user's function, by torch.compile."""

    def __init__(
        self,
        runner: Runner,
        score_fn: Function,
        elements: Elements | None = None,
        wanted_rows: tuple[str, ...] = (),
        wanted_columns: tuple[str, ...] = (),
    ) -> None:
        self.runner = runner
        self.combine: Mapping[str, str] = dict(elements.columns if elements else ())
        self.single = score_fn.single
        self.forward = (score_fn, elements)
        self.backward = (*self.forward, wanted_rows, wanted_columns)
        self.key = (score_fn.key, score_fn.single, score_fn.has_columns, elements and elements.key)
        self.backward_key = (self.key, wanted_rows, wanted_columns)

    def _valid(self, start: int, stop: int, size: int) -> Tensor | None:
        return self.runner.valid(stop - start, size) if self.combine else None

    def values(self, data: ChunkData, hp: NamedTuple) -> tuple[Named, Named, Named]:
        scores: dict[str, list[Tensor]] = {}
        reused: dict[str, list[Tensor]] = {}
        parts: Named = {}
        for start, stop, size in self.runner.tiles(data.rows):
            step = self.runner.step(score_values, self.forward, self.key, data, size)
            outputs, _ = data.tile(start, stop, size, self.single)
            values, totals, columns = self.runner.run(
                step,
                outputs,
                {},
                {name: pad(r, start, stop, size) for name, r in data.row_args.items()},
                data.columns,
                self._valid(start, stop, size),
                hp,
            )
            for name, value in (values | totals).items():
                scores.setdefault(name, []).append(value[: stop - start])
            for name in totals:
                reused[name] = scores[name]
            for name, how in self.combine.items():
                parts[name] = combine_parts(how, parts.get(name), columns[name])
        return _joined(scores), parts, _joined(reused)

    def gradients(
        self, data: ChunkData, hp: NamedTuple, saved: Named, upstream: Named, totals: Named
    ) -> tuple[Named, Named]:
        row_grads: dict[str, list[Tensor]] = {}
        column_grads: Named = {}
        for start, stop, size in self.runner.tiles(data.rows):
            step = self.runner.step(score_gradients, self.backward, self.backward_key, data, size)
            outputs, destinations = data.tile(start, stop, size, self.single)
            rows, columns, rest = self.runner.run(
                step,
                outputs,
                destinations,
                {name: pad(r, start, stop, size) for name, r in data.row_args.items()},
                data.columns,
                self._valid(start, stop, size),
                {n: u if n in totals else pad_zero(u, start, stop, size) for n, u in upstream.items()},
                totals | {name: pad(value, start, stop, size) for name, value in saved.items()},
                hp,
            )
            store_rest(rest, outputs, destinations)
            collect_rows(row_grads, rows, stop - start, size)
            add_columns(column_grads, columns)
        return _joined(row_grads), column_grads


class RowStep(Protocol):
    """How a chunk's outputs become a row-wise loss, with its gradient."""

    def values(self, data: ChunkData, weight: Tensor, hp: NamedTuple) -> tuple[Tensor, Named]:
        """-> sum of weight * loss, metrics {name: (rows,)}"""
        ...

    def gradients(self, data: ChunkData, weight: Tensor, hp: NamedTuple) -> tuple[Tensor, Named, Named, Named]:
        """The same, and gradients of row arguments and columns; the outputs' go to their destinations."""
        ...


class RowLoss:
    """A row-wise loss from a user's function: value and gradient fused in one step."""

    def __init__(
        self, runner: Runner, loss_fn: Function, wanted_rows: tuple[str, ...], wanted_columns: tuple[str, ...]
    ) -> None:
        self.runner = runner
        self.loss_fn = loss_fn
        self.key = (loss_fn.key, loss_fn.single, loss_fn.has_columns)
        self.wanted = (wanted_rows, wanted_columns)

    def values(self, data: ChunkData, weight: Tensor, hp: NamedTuple) -> tuple[Tensor, Named]:
        total = torch.zeros((), dtype=self.runner.dtype, device=self.runner.device)
        metrics: dict[str, list[Tensor]] = {}
        for start, stop, size in self.runner.tiles(data.rows):
            step = self.runner.step(row_values, (self.loss_fn,), self.key, data, size)
            outputs, _ = data.tile(start, stop, size, self.loss_fn.single)
            value, named = self.runner.run(
                step,
                outputs,
                {},
                {name: pad(r, start, stop, size) for name, r in data.row_args.items()},
                data.columns,
                pad_zero(weight, start, stop, size),
                hp,
            )
            total += value
            collect_rows(metrics, named, stop - start, size)
        return total, _joined(metrics)

    def gradients(self, data: ChunkData, weight: Tensor, hp: NamedTuple) -> tuple[Tensor, Named, Named, Named]:
        total = torch.zeros((), dtype=self.runner.dtype, device=self.runner.device)
        metrics: dict[str, list[Tensor]] = {}
        row_grads: dict[str, list[Tensor]] = {}
        column_grads: Named = {}
        for start, stop, size in self.runner.tiles(data.rows):
            key = (self.key, *self.wanted)
            step = self.runner.step(row_values_and_gradients, (self.loss_fn, *self.wanted), key, data, size)
            outputs, destinations = data.tile(start, stop, size, self.loss_fn.single)
            value, named, rows, columns, rest = self.runner.run(
                step,
                outputs,
                destinations,
                {name: pad(r, start, stop, size) for name, r in data.row_args.items()},
                data.columns,
                pad_zero(weight, start, stop, size),
                hp,
            )
            store_rest(rest, outputs, destinations)
            total += value
            collect_rows(metrics, named, stop - start, size)
            collect_rows(row_grads, rows, stop - start, size)
            add_columns(column_grads, columns)
        return total, _joined(metrics), _joined(row_grads), column_grads


def collect_rows(rows: dict[str, list[Tensor]], new: Named, n: int, size: int) -> None:
    """Keep the real rows of a tile: the first ``n`` of ``size``."""
    for name, value in new.items():
        if value.dim() == 0 or len(value) != size:
            got = "a scalar" if value.dim() == 0 else tuple(value.shape)
            raise ValueError(
                f"expected metric {name!r} of a row-wise loss to have one entry per row, ({size},), got {got}"
            )
        rows.setdefault(name, []).append(value[:n])


def add_columns(columns: Named, new: Named) -> None:
    for name, value in new.items():
        wide = value.to(accumulator_dtype(value.dtype))
        columns[name] = columns[name] + wide if name in columns else wide


def combine_parts(how: str, total: Tensor | None, part: Tensor) -> Tensor:
    if total is None:
        return part
    return total + part if how == "sum" else torch.logaddexp(total, part)


def _joined(pieces: Mapping[str, list[Tensor]]) -> Named:
    return {name: cat(parts) for name, parts in pieces.items()}


def join(named: Sequence[Named]) -> Named:
    """Concatenate the pieces of several chunks."""
    return {name: cat([piece[name] for piece in named]) for name in (named[0] if named else {})}


def cat(pieces: Sequence[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))
