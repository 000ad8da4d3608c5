"""A look at a loss's functions before they are trusted: once for each key, uncompiled, on two rows.

A step runs inside of an autograd Function, rows are split into chunks as the plan says, and scores are formed twice.
What does not stand that would give wrong numbers without a word. Here each such thing gets a sentence.
"""

from __future__ import annotations

import functools
import operator
import random
import sys
import types
import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from .call import ONLY
from .reach import Held, is_library, readable
from .step import LOSS, METRIC
from .types import Tensors

Call: TypeAlias = Callable[[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]], Any]

NEAR = 1e-2, 1e3  # a row alone and beside another: relative, and in rounding errors of the outputs
AGAIN = 1e-3, 1e2  # the same rows once more
EXACTLY = 0.0, 0.0


class Sample(NamedTuple):
    """Arguments of a loss's functions: two rows of them or groups, or one where there are no more."""

    outputs: Tensors  # (R, V), of grouped losses the scores, (G, segments)
    rows: Tensors  # (R, ...)
    columns: Tensors  # (V, ...), not looked at for being rows

    def row(self, i: int) -> Sample:
        outputs, rows = ({name: t[i : i + 1] for name, t in named.items()} for named in self[:2])
        return Sample(outputs, rows, self.columns)

    def copy(self) -> Sample:
        """Detached, so that only something else can learn; rows of their own, so that nothing of the user's changes."""
        outputs, rows = ({name: t.detach().clone() for name, t in named.items()} for named in self[:2])
        return Sample(outputs, rows, {name: t.detach() for name, t in self.columns.items()})

    @property
    def size(self) -> int:
        return min((len(t) for t in self.outputs.values()), default=0)


def look(
    call: Call,
    outputs: Tensors,
    rows: Tensors,
    columns: Tensors,
    *,
    name: str,
    functions: Sequence[Callable],
    row_wise: bool,
    twice: bool,
    wanted: Collection[str] = (),
    unit: str = "row",
) -> None:
    """Refuse a function that would give wrong values or gradients.

    Args:
        call: ``call(outputs, rows, columns)``, dicts by name -> a tensor, that and metrics, or a dict of values, where
            metrics have names of theirs.
        outputs, rows, columns: a sample: real ones, of two rows (or groups) at most; columns whole.
        name: what messages call the function: "loss_fn".
        functions: what ``call`` calls; what learns is sought in their globals, closures, defaults and attributes.
        row_wise: a row's value does not depend on other rows.
        twice: the function runs again for the gradient.
        wanted: names of the outputs that are trained.
        unit: what a row of the sample is: a "row", or a "group".

    Raises:
        ValueError: something learns that is no argument; an argument is changed in place; values that run twice are
            random; a row's value depends on another row, or is not to be had for one row alone.
    """
    sample = Sample(outputs, rows, columns).copy()
    tensors = [*sample.outputs.values(), *sample.rows.values()]
    if not sample.size or type(tensors[0]).__name__ == "FakeTensor":  # nothing to compare
        return
    device = tensors[0].device
    run = functools.partial(_run, call)
    with torch.autocast(device.type, enabled=False), warnings.catch_warnings(), kept_generators(device) as drawn:
        warnings.simplefilter("ignore")  # the step itself warns
        with _unchanged(name, sample):
            found = run(sample)
        if torch.is_grad_enabled() and any(value.requires_grad for value in found.values()):
            _refuse_learning(name, functions, found, run(sample))
        at_random = drawn()
        alike = EXACTLY if at_random else AGAIN
        if twice and (at_random or not row_wise or sample.size == 1) and not _close(found, run(sample), sample, alike):
            raise ValueError(_random(name))
        if row_wise and sample.size == 2:
            if not at_random:
                _refuse_coupled(name, unit, run, sample, found, twice)
            if wanted and torch.is_grad_enabled():
                _refuse_cross_gradients(name, unit, run, sample, wanted)


def _run(call: Call, sample: Sample) -> dict[str, Tensor]:
    """The values that count, by name: of scores, or of the loss without its metrics."""
    result = call(*(dict(named) for named in sample))
    if isinstance(result, tuple) and len(result) == 2:
        result = result[0]
    values = result if isinstance(result, Mapping) else {LOSS: result}
    return {name: v for name, v in values.items() if isinstance(v, Tensor) and not name.startswith(METRIC)}


# --- in place --------------------------------------------------------------------------------------------------------


@contextmanager
def _unchanged(name: str, sample: Sample) -> Iterator[None]:
    """Inference tensors count no versions; then nothing is trained that a change could spoil."""
    watched = [
        (role if key == ONLY else f"{role}[{key!r}]", t, t._version)
        for role, named in sample._asdict().items()
        for key, t in named.items()
        if not t.is_inference()
    ]
    yield
    if changed := [label for label, t, version in watched if t._version != version]:
        raise ValueError(f"expected {name} to leave its arguments as they are, got {changed[0]} changed in place")


# --- what learns -----------------------------------------------------------------------------------------------------


def _refuse_learning(name: str, functions: Sequence[Callable], found: Tensors, again: Tensors) -> None:
    """Something required grad although no argument does. A tensor that the function makes anew in each call does not
    learn: what does is met in both."""
    nodes = _graph(found.values()) & _graph(again.values())
    leaves = [node.variable for node in nodes if type(node).__name__ == "AccumulateGrad"]
    leaves += [t for t in found.values() if t.is_leaf and t.requires_grad and any(t is u for u in again.values())]
    if not leaves:
        return
    names = _names_of(functions, {id(leaf) for leaf in leaves}, nodes)
    if names:
        got = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    else:
        got = f"a {type(leaves[0]).__name__.lower()} of shape {tuple(leaves[0].shape)} from elsewhere"
    raise ValueError(
        f"expected what learns to be an argument of {name}, got {got}, which would have no gradient: pass it as a row, "
        "column or group argument, or detach it"
    )


def _graph(values: Collection[Tensor]) -> Set[Any]:
    """The nodes of autograd behind values."""
    seen: set[Any] = set()
    todo = [value.grad_fn for value in values]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [following for following, _ in node.next_functions]
    return seen


def _names_of(functions: Sequence[Callable], leaves: Set[int], nodes: Set[Any]) -> list[str]:
    """What a reader calls the tensors that learn."""
    names: list[str] = []
    seen: set[int] = set()
    todo: deque[Held] = deque(Held("", "", function) for function in functions)
    while todo and len(seen) < 20_000:
        held = todo.popleft()
        if id(held.value) in seen:
            continue
        seen.add(id(held.value))
        if isinstance(held.value, Tensor):
            if id(held.value) in leaves or (held.value.grad_fn is not None and held.value.grad_fn in nodes):
                names.append(f"{held.path} ({held.where})" if held.where else held.path)
        else:
            with suppress(Exception):  # of an object that does not like to be looked at
                todo.extend(_within(held))
    return names


def _within(held: Held) -> Iterator[Held]:
    """What can be read from there."""
    value = held.value
    if isinstance(value, types.MethodType):
        owner = value.__self__
        yield Held(held.path or "self", held.where or f"of {type(owner).__name__}", owner)
        yield held.part("", value.__func__)
    elif isinstance(value, functools.partial):
        yield held.part("", value.func)
        given = {**{f"args[{i}]": v for i, v in enumerate(value.args)}, **value.keywords}
        yield from (Held(label, "of the partial function", v) for label, v in given.items())
    elif isinstance(value, types.FunctionType):
        if not is_library(value.__module__):
            yield from readable(value)
    elif isinstance(value, Mapping):
        yield from (held.part(f"[{key!r}]", v) for key, v in list(value.items()))
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        yield from (held.part(f"[{i}]", v) for i, v in enumerate(value))
    elif not isinstance(value, (type, types.ModuleType, types.BuiltinFunctionType, str, bytes)):
        yield from _within_object(held)


def _within_object(held: Held) -> Iterator[Held]:
    path = Held(held.path or type(held.value).__name__, held.where, None)
    for label, v in list(getattr(held.value, "__dict__", {}).items()):
        if label in ("_parameters", "_buffers", "_modules"):
            yield from (path.part(f".{inner}", kept) for inner, kept in list(v.items()))
        else:
            yield path.part(f".{label}", v)
    for cls in type(held.value).__mro__:
        if not is_library(cls.__module__):
            yield from (Held("", "", f) for f in vars(cls).values() if isinstance(f, types.FunctionType))


# --- randomness ------------------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """A generator that everybody shares."""

    get: Callable[[], Any]
    put: Callable[[Any], Any]
    same: Callable[[Any, Any], bool] = operator.eq


def _sources(device: torch.device) -> Iterator[Source]:
    yield Source(torch.get_rng_state, torch.set_rng_state, torch.equal)
    yield Source(random.getstate, random.setstate)
    if (numpy := sys.modules.get("numpy.random")) is not None:
        yield Source(numpy.get_state, numpy.set_state, lambda a, b: (a[1] == b[1]).all() and a[2:] == b[2:])
    if device.type != "cpu":
        module = torch.get_device_module(device)
        yield Source(
            lambda: module.get_rng_state(device), lambda state: module.set_rng_state(state, device), torch.equal
        )


@contextmanager
def kept_generators(device: torch.device) -> Iterator[Callable[[], bool]]:
    """The user's random numbers go on as if nothing had been drawn. Yields whether something was."""
    states = [(source, source.get()) for source in _sources(device)]
    try:
        yield lambda: not all(source.same(state, source.get()) for source, state in states)
    finally:
        for source, state in states:
            source.put(state)


def _random(name: str) -> str:
    return (
        f"expected {name} to give the same values when it runs again for the gradient, got others: draw random numbers "
        "outside and pass them as a row argument"
    )


# --- rows that depend on each other ----------------------------------------------------------------------------------


def _refuse_coupled(
    name: str, unit: str, run: Callable[[Sample], Tensors], sample: Sample, both: Tensors, twice: bool
) -> None:
    """Each of two rows alone has the value that it has beside the other."""
    alone = []
    for i in range(2):
        try:
            alone.append(run(sample.row(i)))
        except Exception as error:
            raise ValueError(
                f"expected {name} to take any number of {unit}s, since a chunk may hold one, got "
                f"{type(error).__name__} for one {unit} and none for two: {error}"
            ) from error
    for key, value in both.items():
        label = "" if key == LOSS else f" of {key!r}"
        if not value.dim() or len(value) != 2:
            continue  # the step says so
        for i in range(2):
            single = alone[i].get(key)
            expected = (1, *value.shape[1:])
            if single is None or single.shape != expected:
                got = "none" if single is None else tuple(single.shape)
                raise ValueError(f"expected {name} to return values{label} {expected} for one {unit}, got {got}")
            if _close({key: value[i]}, {key: single[0]}, sample, NEAR):
                continue
            if not _close(both, run(sample), sample, AGAIN):  # at random, by a generator of its own
                if twice:
                    raise ValueError(_random(name))
                return
            raise ValueError(
                f"expected {name} to give each {unit} a value of its own, got {_text(single[0])}{label} for a {unit} "
                f"alone and {_text(value[i])} beside another one: {_way_out(unit)}"
            )


def _refuse_cross_gradients(
    name: str, unit: str, run: Callable[[Sample], Tensors], sample: Sample, wanted: Collection[str]
) -> None:
    """A row's value has no gradient at another row: exactly none, however small it would be."""
    leaves = {
        key: t.detach().requires_grad_()
        for key, t in sample.outputs.items()
        if key in wanted and t.is_floating_point() and not t.is_inference()
    }
    try:
        # Hooks of the caller (offloading, checkpointing) have nothing to do with a look.
        with saved_tensors_hooks(torch.Tensor.detach, lambda kept: kept):
            found = run(sample._replace(outputs={**sample.outputs, **leaves}))
            first = [v[0].sum() for v in found.values() if v.dim() and len(v) == 2 and v.requires_grad]
            if not first or not leaves:
                return
            grads = torch.autograd.grad(first, list(leaves.values()), allow_unused=True)
    except (RuntimeError, NotImplementedError):  # the step itself meets the same and says it better
        return
    for key, grad in zip(leaves, grads):
        if grad is not None and bool(grad[1].nan_to_num(0.0).any()):
            of = "" if key == ONLY else f" of {key!r}"
            raise ValueError(
                f"expected {name} to give each {unit} a value of its own, got a gradient at another {unit}'s "
                f"outputs{of}: {_way_out(unit)}"
            )


def _way_out(unit: str) -> str:
    how = "give it a score_fn and couples_batch=True" if unit == "row" else "give it couples_batch=True"
    return f"a loss that couples the batch says so ({how})"


def _text(value: Tensor) -> str:
    if value.numel() == 1:
        return f"{value.item():.6g}"
    return "[" + ", ".join(f"{v:.6g}" for v in value.flatten()[:4].tolist()) + (", ...]" if value.numel() > 4 else "]")


def _close(left: Tensors, right: Tensors, sample: Sample, tolerance: tuple[float, float]) -> bool:
    """Equal but for rounding; of the outputs as well, where they nearly cancel. NaN and infinities are equal."""
    relative, errors = tolerance
    dtypes = [t.dtype for t in sample.outputs.values() if t.is_floating_point()]
    eps = max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)
    largest = [t.nan_to_num(0.0, 0.0, 0.0).abs().max() for t in sample.outputs.values() if t.is_floating_point()]
    absolute = errors * eps * max(1.0, *(float(size) for size in largest)) if largest else 0.0
    return left.keys() == right.keys() and all(
        value.shape == right[name].shape
        and torch.allclose(value.double(), right[name].double(), rtol=relative, atol=absolute, equal_nan=True)
        for name, value in left.items()
    )
