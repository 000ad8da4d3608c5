"""A call as a key and a list of tensors.

The key says everything about a call but what its tensors hold: which tensor plays which role, shapes, dtypes, devices,
what wants a gradient. It finds the ``Layout`` of earlier calls like it, so that only the first of them is checked and
planned. The tensors are what autograd sees; everything else refers to them by their position.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks
from .types import Projection, Projections, Tensors

ONLY = "outputs"  # the name of a projection that was given alone, not in a dict


class Term(NamedTuple):
    """``input @ weight.T`` by the positions of its tensors; no weight is the identity."""

    input: int
    weight: int | None


class Positions(NamedTuple):
    """A projection by the positions of its tensors."""

    name: str
    terms: tuple[Term, ...]
    bias: int | None
    cosine: bool
    dtype: torch.dtype | None  # of the operands, where it is stated


class Structure(NamedTuple):
    """Which tensor plays which role, by position."""

    projections: tuple[Positions, ...]
    single: bool  # one projection, given alone: loss functions see the tensor and not a dict
    rows: tuple[tuple[str, int], ...]
    columns: tuple[tuple[str, int], ...]
    groups: tuple[tuple[str, int], ...]


class Arguments(NamedTuple):
    """A call, read but not yet checked."""

    structure: Structure
    tensors: list[Tensor]  # as they were given
    weights: dict[str, Tensor]  # row_weight, segments, group_weight: what takes no gradient

    def key(self) -> Hashable:
        return (
            self.structure,
            _signatures(self.tensors),
            tuple(self.weights),
            _signatures(self.weights.values()),
            torch.is_grad_enabled(),
            autocast_dtype(self.tensors[0].device),
        )


def read(
    projections: Projections,
    rows: Tensors | None,
    columns: Tensors | None,
    groups: Tensors | None,
    weights: Mapping[str, Tensor | None],
) -> Arguments:
    """Flatten a call.

    Raises:
        TypeError: not a Projection, a dict or a tensor where one belongs.
    """
    single = isinstance(projections, Projection)
    if not isinstance(projections, (Projection, Mapping)):
        got = type(projections).__name__
        raise TypeError(f"expected a Projection(input, weight) or a dict of them by name, got {got}")
    named: Mapping[str, Projection] = {ONLY: projections} if isinstance(projections, Projection) else projections
    if not named:
        raise ValueError("expected at least one projection, got an empty dict")
    for kind, given in (("rows", rows), ("columns", columns), ("groups", groups)):
        if given is not None and not isinstance(given, Mapping):
            raise TypeError(f"expected {kind} to be a dict of tensors by name, got {type(given).__name__}")
    reader = _Reader()
    structure = Structure(
        tuple(reader.projection(name, projection) for name, projection in named.items()),
        single,
        tuple((name, reader.slot("row", f"rows[{name!r}]", t)) for name, t in (rows or {}).items()),
        tuple((name, reader.slot("column", f"columns[{name!r}]", t)) for name, t in (columns or {}).items()),
        tuple((name, reader.slot("group", f"groups[{name!r}]", t)) for name, t in (groups or {}).items()),
    )
    for name, weight in weights.items():
        if weight is not None and not isinstance(weight, Tensor):
            raise TypeError(f"expected {name} to be a tensor, got {type(weight).__name__}")
    return Arguments(structure, reader.tensors, {name: w for name, w in weights.items() if w is not None})


def signature(
    wanted: str,
    projections: Any,
    named: tuple[Tensors | None, ...],
    weights: Mapping[str, Tensor | None],
) -> tuple[Hashable, list[Tensor]] | None:
    """What tells the calls of a loss apart, without a check of them, and their tensors one after the other. None: a
    call out of the ordinary, for ``read``.

    Args:
        wanted: what is called.
        named: rows, columns, groups, numbers.
    """
    tensors: list[Any] = []
    told: list[Any] = [wanted]
    if type(projections) is Projection:
        of_projections: Any = ((None, projections),)
    elif type(projections) is dict:
        of_projections = projections.items()
    else:
        return None
    for name, p in of_projections:
        if type(p) is not Projection or type(p.extra) is not tuple or type(p.dtype) not in _DTYPES:
            return None
        # What is neither True nor False is refused by ``read``, and may have no hash.
        told += (name, p.weight is None, p.bias is None, len(p.extra), p.cosine is True, p.cosine is False, p.dtype)
        tensors.append(p.input)
        if p.weight is not None:
            tensors.append(p.weight)
        if p.bias is not None:
            tensors.append(p.bias)
        for pair in p.extra:
            tensors += pair
    for given in named:
        if given is None:
            told.append(None)
        elif type(given) is dict:
            told.append(tuple(given))
            tensors += given.values()
        else:
            return None
    for name, weight in weights.items():
        if weight is not None:
            told.append(name)
            tensors.append(weight)
    if len(set(map(id, tensors))) < len(tensors):
        places = {id(t): n for n, t in enumerate(tensors)}
        told.append(tuple([places[id(t)] for t in tensors]))
    try:
        for t in tensors:
            told += (t.shape, t.dtype, t.device, t.requires_grad, t.layout, type(t))
        told += (torch.is_grad_enabled(), autocast_dtype(tensors[0].device))
    except (AttributeError, IndexError):
        return None
    return tuple(told), tensors


_DTYPES = (type(None), torch.dtype)


class _Reader:
    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.positions: dict[tuple[int, str], int] = {}

    def slot(self, role: str, name: str, given: Any) -> int:
        """The position of a tensor; the same tensor in the same role (a shared weight) has one position."""
        if not isinstance(given, Tensor):
            raise TypeError(f"expected {name} to be a tensor, got {type(given).__name__}")
        key = (id(given), role)
        if key not in self.positions:
            self.positions[key] = len(self.tensors)
            self.tensors.append(given)
        return self.positions[key]

    def projection(self, name: str, given: Any) -> Positions:
        if not isinstance(given, Projection):
            raise TypeError(f"expected a Projection for {name!r}, got {type(given).__name__}")
        label = label_of(name)
        if given.weight is None:
            if given.bias is not None or given.extra or given.cosine or given.dtype is not None:
                raise ValueError(f"expected no bias, extra terms, cosine or dtype{label} without a weight")
            return Positions(
                name, (Term(self.slot("identity", f"input{label}", given.input), None),), None, False, None
            )
        checks.flag(f"cosine{label}", given.cosine)
        if given.cosine and (given.bias is not None or given.extra):
            raise ValueError(f"expected neither bias nor extra terms{label} with cosine=True")
        if not isinstance(given.extra, (tuple, list)) or not all(
            isinstance(term, (tuple, list)) and len(term) == 2 for term in given.extra
        ):
            raise TypeError(f"expected extra{label} to be a tuple of (input, weight) pairs, got {given.extra!r:.80}")
        pairs = ((given.input, given.weight), *given.extra)
        dtype = checks.floating_dtype_or_none(f"dtype{label}", given.dtype)
        # A tensor that goes through its norm, or is cast, is another one than where it does not.
        kind = f"{'cosine ' if given.cosine else ''}{'' if dtype is None else dtype} "
        terms = []
        for n, (x, w) in enumerate(pairs):
            suffix = label if n == 0 else f" of extra term {n}{label}"
            slots = self.slot(kind + "input", f"input{suffix}", x), self.slot(kind + "weight", f"weight{suffix}", w)
            terms.append(Term(*slots))
        bias = None if given.bias is None else self.slot(kind + "bias", f"bias{label}", given.bias)
        return Positions(name, tuple(terms), bias, given.cosine, dtype)


def label_of(name: str) -> str:
    return "" if name == ONLY else f" of projection {name!r}"


def _signatures(tensors: Any) -> tuple[Hashable, ...]:
    return tuple((t.shape, t.dtype, t.device, t.requires_grad, t.layout, type(t)) for t in tensors)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    kind = device.type
    return torch.get_autocast_dtype(kind) if _has_autocast(kind) and torch.is_autocast_enabled(kind) else None


_has_autocast = functools.cache(torch.amp.is_autocast_available)


def operand_dtype(given: torch.dtype, device: torch.device) -> torch.dtype:
    """Of a product, where none is stated: that of autocast, which leaves float64 alone."""
    return given if given == torch.float64 else autocast_dtype(device) or given


def refuse_transforms() -> None:
    if torch.compiler.is_exporting():
        raise RuntimeError("a chunked loss cannot be exported: its chunk plan depends on the batch")
    if torch._C._functorch.maybe_current_level() is not None:
        raise RuntimeError(
            "a chunked loss computes its gradients in the forward pass: torch.func transforms (grad, vmap, jvp, ...) "
            "do not apply. Use autograd: loss.backward() or torch.autograd.grad"
        )
