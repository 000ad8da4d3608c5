"""The step of a loss that is stated as plain functions: values, and gradients with respect to the outputs only.

Each factory below returns a plain function that is compiled once for a loss, its options and a row count. The matrix
products stay outside: cuBLAS does those, and a compiled step without them reaches a hand-written kernel. Outputs reach
loss functions in float32 (float64), whatever the products' dtype: in a compiled step the cast is free.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from . import specialize
from .call import ONLY
from .chunk import Chunk, Into
from .formula import Bound, Formula
from .step import LOSS, METRIC, Step
from .types import HALF, Named, accumulator_dtype


@dataclass(frozen=True)
class Totals:
    """Scores that reduce elements ``(R, V)`` of ``element_fn``: over columns to one value a row, or over rows (of all
    chunks) to one value a column. Name -> "logsumexp" or "sum"."""

    rows: tuple[tuple[str, str], ...] = ()
    columns: tuple[tuple[str, str], ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in (*self.rows, *self.columns))


@dataclass(frozen=True)
class Form:
    """What the functions are and how they are called."""

    kind: Literal["loss", "scores"]
    single: bool  # outputs of one projection: pass the tensor, not a dict
    totals: Totals

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The functions that give values of rows."""
        of_rows = "loss_fn" if self.kind == "loss" else "score_fn"
        return (of_rows, "element_fn") if self.totals.names else (of_rows,)

    def values(self, bound: Bound, outputs: Named, rows: Named, columns: Named) -> Named:
        size = next(iter(outputs.values())).shape[0]
        if self.kind == "loss":
            loss, metrics = split_metrics(self._call(bound.loss_fn, outputs, rows, columns))
            check_per_row("loss_fn", loss, size)
            return {LOSS: loss, **{METRIC + name: value for name, value in metrics.items()}}
        scores = self._call(bound.score_fn, outputs, rows, columns)
        if not isinstance(scores, Mapping) or not scores:
            raise ValueError(f"expected score_fn to return a dict of scores by name, got {type(scores).__name__}")
        for name, value in scores.items():
            check_per_row(f"score {name!r}", value, size)
        return dict(scores)

    def elements(self, bound: Bound, outputs: Named, rows: Named, columns: Named) -> Named:
        if not (self.totals.rows or self.totals.columns):
            return {}
        found = self._call(bound.element_fn, outputs, rows, columns)
        if set(found) != set(self.totals.names):
            raise ValueError(f"expected element_fn to return {list(self.totals.names)}, got {list(found)}")
        return found

    def whole(self, bound: Bound, outputs: Named, rows: Named, columns: Named) -> tuple[Named, Named]:
        """Values of rows, and of columns, where all rows are there."""
        size = next(iter(outputs.values())).shape[0]
        values = self.values(bound, outputs, rows, columns)
        elements = self.elements(bound, outputs, rows, columns)
        values |= {name: _reduce(how, elements[name], 1) for name, how in self.totals.rows}
        for name, value in values.items():
            if name != LOSS:
                check_entries(name, value, size)
        return values, {name: _reduce(how, elements[name], 0) for name, how in self.totals.columns}

    def _call(self, function: Callable, outputs: Named, rows: Named, columns: Named) -> Any:
        given = next(iter(outputs.values())) if self.single else outputs
        return function(given, rows, columns)


def split_metrics(result: Any) -> tuple[Tensor, Named]:
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping):
        return result[0], dict(result[1])
    return result, {}


def check_per_row(what: str, value: Any, rows: int) -> None:
    if not isinstance(value, Tensor) or value.shape != (rows,):
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        got = "None" if value is None else got
        and_metrics = ", or that and a dict of metrics" if what == "loss_fn" else ""
        raise ValueError(
            f"expected {what} to return one value per row, (R,) for outputs (R, V){and_metrics}, "
            f"got {got} for R = {rows}"
        )


def check_is_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"expected {name.removeprefix(METRIC)!r} to be a tensor, got {type(value).__name__}")


def check_entries(name: str, value: Any, rows: int) -> None:
    check_is_tensor(name, value)
    if value.dim() == 0 or value.shape[0] != rows:
        got = "a scalar" if value.dim() == 0 else tuple(value.shape)
        raise ValueError(
            f"expected metric {name.removeprefix(METRIC)!r} of a row-wise loss to have one entry per row, ({rows},), "
            f"got {got}"
        )


def weighted(value: Tensor, weight: Tensor) -> Tensor:
    """What has weight zero counts for nothing, infinite or not: padded rows, empty groups."""
    return (torch.where(weight != 0, value, 0.0) * weight).sum()


# --- factories -------------------------------------------------------------------------------------------------------


def score_step(bound: Bound, form: Form, learns: tuple[str, ...] = ()) -> Callable:
    def step(
        outputs: Named, rows: Named, columns: Named, valid: Tensor | None, row_factors: Named, column_factors: Named
    ) -> tuple[Named, Named]:
        wide = _factored(_wide(outputs), row_factors, column_factors)
        rows, columns = (named | _wide(named, learns) for named in (rows, columns))
        values = form.values(bound, wide, rows, columns)
        elements = form.elements(bound, wide, rows, columns)
        parts = {name: _reduce(how, elements[name], 1) for name, how in form.totals.rows}
        for name, how in form.totals.columns:
            assert valid is not None
            nothing = 0.0 if how == "sum" else -torch.inf
            parts[name] = _reduce(how, torch.where(valid[:, None], elements[name], nothing), 0)
        return _own(values), parts

    return step


def pull_step(
    bound: Bound,
    form: Form,
    wanted_rows: tuple[str, ...],
    wanted_columns: tuple[str, ...],
    biased: tuple[str, ...],
    with_values: bool,
) -> Callable:
    def step(
        outputs: Named,
        rows: Named,
        columns: Named,
        valid: Tensor | None,
        row_factors: Named,
        column_factors: Named,
        destinations: dict[str, Tensor | None],  # where the gradient of outputs goes; None: in their place
        upstream: Named,
        parts: Named,  # totals
    ) -> tuple[Named, Named, Named, Named, Named]:
        wide = _wide(outputs)

        def total(o: Named, r: Named, c: Named) -> tuple[Tensor, Named]:
            factored = _factored({**wide, **o}, row_factors, column_factors)
            given = (bound, factored, {**rows, **r}, {**columns, **c})
            values = form.values(*given)
            elements = form.elements(*given)
            value: Any = sum(weighted(values[name], u) for name, u in upstream.items() if name in values)
            for name, how in form.totals.rows:
                if name in upstream:
                    g = upstream[name][:, None] * _share(how, elements[name], parts[name][:, None])
                    value = value + torch.where(g == 0, 0.0, elements[name] * g).sum()
            for name, how in form.totals.columns:
                if name in upstream:
                    assert valid is not None
                    g = upstream[name] * valid[:, None] * _share(how, elements[name], parts[name])
                    value = value + torch.where(g == 0, 0.0, elements[name] * g).sum()
            return value, _own(values) if with_values else {}

        arguments = (
            {name: wide[name] for name in destinations},
            _wide(rows, wanted_rows),
            _wide(columns, wanted_columns),
        )
        grads, values = _gradients(total, arguments)
        of_bias = {name: grads[0][name].sum(0) for name in biased}
        return values, grads[1], grads[2], of_bias, _store(grads[0], outputs, destinations)

    return step


def _wide(named: Named, names: tuple[str, ...] | None = None) -> Named:
    """Those of these names, or all: functions see in float32 what has a gradient, so that nobody rounds that before it
    is summed."""
    chosen = named if names is None else [name for name in names if name in named]
    return {name: named[name].to(accumulator_dtype(named[name].dtype)) for name in chosen}


def _factored(outputs: Named, of_rows: Named, of_columns: Named) -> Named:
    """Outputs as functions see them: some are products still to be multiplied (``Chunk.factors``)."""
    factored = {name: outputs[name] * of_rows[name][:, None] * of_columns[name] for name in of_rows}
    return {**outputs, **factored}


def _own(named: Mapping[str, Tensor]) -> Named:
    """Copies: a value that is a view of the outputs would change when their gradient takes their place."""
    for name, value in named.items():
        check_is_tensor(name, value)
    return {name: value.detach().clone() for name, value in named.items()}


def _reduce(how: str, elements: Tensor, dim: int) -> Tensor:
    return elements.sum(dim) if how == "sum" else elements.logsumexp(dim)


def _share(how: str, x: Tensor, total: Tensor) -> Tensor | float:
    """d total / d x: from the total alone, so that no reduction is formed again."""
    return torch.where(total > -torch.inf, torch.exp(x.detach() - total), 0.0) if how == "logsumexp" else 1.0


def _gradients(total: Callable, arguments: tuple[Named, ...]) -> tuple[tuple[Named, ...], Named]:
    """-> gradients of ``total(*arguments) -> (value, more)``, and what more it returns."""
    if torch.compiler.is_compiling():
        both = torch.func.grad(total, argnums=tuple(range(len(arguments))), has_aux=True)
        return both(*arguments)
    # Plain autograd also works under saved-tensor hooks (offloading), which torch.func refuses.
    with torch.enable_grad():
        leaves = tuple({name: t.detach().requires_grad_() for name, t in named.items()} for named in arguments)
        value, more = total(*leaves)
        flat = grad_or_zero(value, [leaf for named in leaves for leaf in named.values()])
    found = iter(flat)
    return tuple({name: next(found) for name in named} for named in leaves), more


def grad_or_zero(value: Any, leaves: list[Tensor]) -> list[Tensor]:
    """Gradients of a scalar; zero where it does not depend on a leaf."""
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grad_or_none(value, leaves), leaves)]


def grad_or_none(value: Any, leaves: list[Tensor]) -> list[Tensor | None]:
    if not isinstance(value, Tensor) or not value.requires_grad:
        return [None] * len(leaves)
    return list(torch.autograd.grad(value, leaves, allow_unused=True))


def _store(grads: Named, outputs: Named, destinations: dict[str, Tensor | None]) -> Named:
    """Write the outputs' gradients to their destinations -> those that are left for ``_store_rest``.

    Inductor's C++ backend fails on some reductions that are fused with a write to an input (KeyError in its outer loop
    fusion, torch 2.13), so a compiled step on a CPU returns them.
    """
    rest = {}
    for name, grad in grads.items():
        destination = destinations[name]
        destination = outputs[name] if destination is None else destination
        if torch.compiler.is_compiling() and destination.device.type == "cpu":
            rest[name] = grad.to(destination.dtype)
        else:
            destination.copy_(grad)
    return rest


def _store_rest(rest: Named, outputs: Named, destinations: dict[str, Tensor | None]) -> None:
    for name, grad in rest.items():
        destination = destinations[name]
        (outputs[name] if destination is None else destination).copy_(grad)


# --- the step --------------------------------------------------------------------------------------------------------


class FunctionStep(Step):
    """Plain functions over the rows of a chunk: whole, or compiled for wide outputs in tiles of a few fixed sizes."""

    takes_factors = True
    runs_functions = True

    def __init__(self, formula: Formula, form: Form, static_widths: bool) -> None:
        self.formula = formula
        self.form = form
        self.static_widths = static_widths
        self.column_parts = dict(form.totals.columns)

    @property
    def key(self) -> Hashable:
        return FunctionStep, self.form, self.static_widths

    def reads(self, name: str) -> bool:
        return self.formula.mentions(("loss_fn",) if self.form.kind == "loss" else ("score_fn", "element_fn"), name)

    def score(self, chunk: Chunk) -> tuple[Named, None]:
        pieces: dict[str, list[Tensor]] = {}
        columns: Named = {}
        bound = (self.form, chunk.sweep.layout.wanted)
        for start, stop, size in chunk.sweep.tiles(chunk.size):
            given = self._given(chunk, start, stop, size)
            values, totals = self._run(score_step, bound, chunk, size, given)
            _collect(pieces, values, stop - start, size)
            for name, how in self.form.totals.columns:
                columns[name] = combine(how, columns.get(name), totals.pop(name))
            _collect(pieces, totals, stop - start, size)
        return _joined(pieces) | columns, None

    def pull(self, chunk: Chunk, kept: None, parts: Named, upstream: Named, into: Into) -> None:
        self._pull(chunk, parts, upstream, into, with_values=False)

    def both(self, chunk: Chunk, upstream: Named, into: Into) -> Named:
        return self._pull(chunk, {}, upstream, into, with_values=True)

    def _pull(self, chunk: Chunk, parts: Named, upstream: Named, into: Into, with_values: bool) -> Named:
        names = [name for name in chunk.names if into.wants(name)]
        rows = tuple(name for name in chunk.rows if into.wants(name))
        columns = tuple(name for name in chunk.columns if into.wants(name))
        places = {name: into.room(name) for name in names}
        across = self.column_parts
        row_parts = {name: parts[name] for name, _ in self.form.totals.rows if parts}
        column_parts = {name: parts[name] for name in across if parts}
        column_upstream = {name: u for name, u in upstream.items() if name in across}
        row_upstream = {name: u for name, u in upstream.items() if name not in across}
        values: dict[str, list[Tensor]] = {}
        row_grads: dict[str, list[Tensor]] = {}
        of_bias: Named = {}
        bound = (self.form, rows, columns, self._biased(chunk), with_values)
        for start, stop, size in chunk.sweep.tiles(chunk.size):
            given = self._given(chunk, start, stop, size)
            destinations = {
                self._name(name): None if place is chunk.buffer(name) else place[start : start + size]
                for name, place in places.items()
            }
            upstreams = _pad_zero(row_upstream, start, stop, size) | column_upstream
            totals = _pad(row_parts, start, stop, size) | column_parts
            arguments = (*given, destinations, upstreams, totals)
            named, of_rows, of_columns, sums, rest = self._run(pull_step, bound, chunk, size, arguments)
            _store_rest(rest, given[0], destinations)
            _collect(values, named, stop - start, size)
            _collect(row_grads, of_rows, stop - start, size)
            for name, value in of_columns.items():
                into.columns(name, value)
            of_bias = {name: value + of_bias[name] if name in of_bias else value for name, value in sums.items()}
        for name, place in places.items():
            into.outputs(place[: chunk.size], name, of_bias.get(self._name(name)))
        for name, value in _joined(row_grads).items():
            into.rows(name, value)
        return _joined(values)

    def _name(self, name: str) -> str:
        """A single output has one name whatever its projection's, so that policy and reference share a step."""
        return ONLY if self.form.single else name

    def _given(self, chunk: Chunk, start: int, stop: int, size: int) -> tuple:
        """What either step takes first: rows [start, stop), padded, and what belongs to the columns."""
        row_factors, column_factors = self._factors(chunk)
        return (
            self._outputs(chunk, start, stop, size),
            _pad(chunk.rows, start, stop, size),
            chunk.columns,
            self._valid(chunk, stop - start, size),
            _pad(row_factors, start, stop, size),
            column_factors,
        )

    def _outputs(self, chunk: Chunk, start: int, stop: int, size: int) -> Named:
        """Rows [start, start + size) of the outputs; padding repeats the last real row, so it stays finite."""
        found = {}
        for name in chunk.names:
            buffer = chunk.buffer(name)
            if stop - start < size:
                buffer[stop : start + size] = buffer[stop - 1]
            found[self._name(name)] = buffer[start : start + size]
        return found

    def _factors(self, chunk: Chunk) -> tuple[Named, Named]:
        """By output: those of the chunk's rows, and of the columns."""
        found = {self._name(name): chunk.factors(name) for name in chunk.names}
        pairs = {name: pair for name, pair in found.items() if pair is not None}
        return {name: of_rows for name, (of_rows, _) in pairs.items()}, {name: of for name, (_, of) in pairs.items()}

    def _biased(self, chunk: Chunk) -> tuple[str, ...]:
        """Outputs whose gradient is summed for a bias before it is rounded. In a compiled step of wide outputs that
        would be one more pass over all of them."""
        layout = chunk.sweep.layout
        if chunk.sweep.plan.rungs is not None:
            return ()
        specs = [chunk.spec(name) for name in chunk.names]
        return tuple(
            self._name(spec.name)
            for spec in specs
            if spec.bias is not None and layout.wants_grad[spec.bias] and spec.operand_dtype in HALF
        )

    def _valid(self, chunk: Chunk, rows: int, size: int) -> Tensor | None:
        """(size,) True on rows, False on the padding behind them."""
        if not self.form.totals.columns:
            return None
        return torch.arange(size, device=chunk.sweep.layout.device) < rows

    def _run(self, factory: Callable, bound: tuple, chunk: Chunk, size: int, arguments: tuple) -> Any:
        sweep = chunk.sweep
        if not sweep.layout.compiled or size == 0:
            return factory(self.formula.bind(), *bound)(*arguments)
        # A wide step is compiled for its row count alone; a narrow one turns dynamic in whatever changes.
        rows = "narrow" if sweep.plan.rungs is None else size
        outputs, _, columns, _, row_factors, column_factors, *of_pull = arguments
        widths = tuple((o.dtype, o.shape[1] if self.static_widths else None) for o in outputs.values())
        destinations = tuple((name, t if t is None else t.dtype) for name, t in of_pull[0].items()) if of_pull else ()
        # By names and dtypes too, which a loss may be called with in several ways: each has a limit of its own.
        named = tuple((name, t.dtype) for part in (chunk.rows, chunk.columns) for name, t in part.items())
        key = (rows, widths, destinations, named, tuple(row_factors))

        def probe() -> tuple:
            whole = (columns, column_factors)
            return tuple(a if any(a is b for b in whole) else _few(a, size, self.column_parts) for a in arguments)

        return specialize.run(factory, self.formula, bound, key, sweep.layout.device, arguments, probe)


def _few(argument: Any, size: int, besides: Mapping[str, str] = {}) -> Any:
    """At most two rows of whatever is as long as a step, copied."""
    if isinstance(argument, dict):
        return {name: value if name in besides else _few(value, size) for name, value in argument.items()}
    if isinstance(argument, Tensor) and argument.dim() and len(argument) == size:
        return argument[:2].clone()
    return argument


def _pad(rows: Mapping[str, Tensor], start: int, stop: int, size: int) -> Named:
    """Rows [start, stop) of row arguments, the last row repeated up to ``size``."""
    return {name: _padded(part[start:stop], size, part[stop - 1 : stop]) for name, part in rows.items()}


def _pad_zero(rows: Mapping[str, Tensor], start: int, stop: int, size: int) -> Named:
    """Rows [start, stop) of weights or upstreams, zeros up to ``size``: padded rows count for nothing."""
    return {name: _padded(part[start:stop], size, part.new_zeros(1, *part.shape[1:])) for name, part in rows.items()}


def _padded(part: Tensor, size: int, filler: Tensor) -> Tensor:
    missing = size - len(part)
    if missing:
        return torch.cat([part, filler.expand(missing, *part.shape[1:])])
    # Small row vectors start their storage: dynamo compiles a dynamic step anew for an offset of zero.
    return part.clone() if part.storage_offset() else part


def _collect(pieces: dict[str, list[Tensor]], new: Named, n: int, size: int) -> None:
    """Keep the real rows of a tile: the first ``n`` of ``size``."""
    for name, value in new.items():
        check_entries(name, value, size)
        pieces.setdefault(name, []).append(value[:n])


def combine(how: str, total: Tensor | None, part: Tensor) -> Tensor:
    if total is None:
        return part
    return total + part if how == "sum" else torch.logaddexp(total, part)


def _joined(pieces: Mapping[str, list[Tensor]]) -> Named:
    return {name: cat(parts) for name, parts in pieces.items()}


def cat(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
