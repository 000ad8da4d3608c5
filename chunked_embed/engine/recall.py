"""What a loss keeps from call to call, so that a second call of a kind does nothing twice.

A ``Standing`` is what the loss was when it was last called: its attributes, the functions of its classes. As long as
that holds, a call whose ``signature`` was met before is of a known ``Kind``: nothing of it is read, checked or looked
at again. All of it is compared by identity; numbers and data that take other values go along.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import chain
from operator import is_
from types import FunctionType, MethodType
from typing import Any
from weakref import ref

from torch import Tensor, nn

from .call import Arguments
from .formula import STORES, Formula, is_users, own_classes, view_of
from .functions import Form
from .layout import Layout, Options
from .pack import Selection
from .recent import Recent
from .values import PLAIN, slots

KINDS = 32  # kept for each loss: ragged batches have one each


class Recall:
    """Of one loss. Layouts outlive its standing: they follow from options and arguments alone."""

    def __init__(self) -> None:
        self.layouts: Recent[Hashable, Layout] = Recent()
        self.looked: Recent[Hashable, bool] = Recent()
        self.options: tuple[tuple, Options] | None = None
        self.standing: Standing | None = None


class Kind:
    """Calls of one signature."""

    def __init__(
        self,
        arguments: Arguments,
        given: Sequence[Tensor] | None,
        formula: Formula,
        layout: Layout,
        form: Form,
        labels: Mapping[str, tuple[str, ...]],
        steps: tuple[Hashable, ...] | None,
    ) -> None:
        """
        Args:
            given: the call's tensors as ``signature`` has them.
            formula: its functions are kept, and not its attributes.
            labels: the projections of each unit.
            steps: keys of the loss's own steps, for each unit; None: it makes none.
        """
        given = [*arguments.tensors, *arguments.weights.values()] if given is None else given
        place = {id(t): n for n, t in enumerate(given)}
        self.functions, self.key = formula.functions, formula.key
        self.slots = slots(formula.functions.cls)
        self.take = tuple(place[id(t)] for t in arguments.tensors)
        self.names = {name: place[id(t)] for name, t in arguments.weights.items()}
        self.layout = layout
        self.form = form
        self.labels = labels
        self.steps = steps
        self.looked: set[Hashable] = set()
        self.differentiable: dict[str, tuple[str, ...]] = {}  # scores of plain functions that have a gradient, by unit
        self.whole = Selection(layout.n_rows, layout.n_rows)

    def formula(self, loss: Any, numbers: Mapping[str, Tensor]) -> Formula:
        """The loss's functions on what it is now."""
        return Formula(view_of(loss, self.functions.methods, numbers, self.slots), self.functions, self.key)

    def arguments(self, given: Sequence[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Tensors and weights, as ``read`` has them."""
        return [given[n] for n in self.take], {name: given[n] for name, n in self.names.items()}


class Standing:
    """A loss as it was at its last call. It keeps nothing alive that the loss has let go: of tensors it has weak
    references, and of data that may hold some it knows the type."""

    def __init__(self, loss: Any, formula: Formula, options: frozenset[str]) -> None:
        self.cls = type(loss)
        self.mro = self.cls.__mro__
        self.options = options  # names of attributes that are
        self.names = tuple(loss.__dict__)
        self.values = [self._kept(name, value) for name, value in loss.__dict__.items()]
        # Views of what may change in place: its parameters and the like, the bodies of its classes, options.
        bodies = [loss.__dict__[name] for name in (*STORES, "_functions")] + [vars(c) for c in own_classes(self.cls)]
        mapped = [m for m in (loss.row_totals, loss.column_totals, loss.targets) if isinstance(m, Mapping)]
        self.views = [body.values() for body in (*bodies, *mapped)] + [option.keys() for option in mapped]
        self.sizes = list(map(len, self.views))
        self.inside = list(chain.from_iterable(self.views))
        self.functions = [f for f in formula.all_functions() if isinstance(f, FunctionType)]
        self.codes = [f.__code__ for f in self.functions]
        own = [self._kept(name, value) for name, value in loss.__dict__.items() if _may_learn(value)]
        own += [function for function in loss._functions.values() if _may_learn(function)]
        self.owners = [*own, *(t for name in ("_parameters", "_modules") for t in loss.__dict__[name].values())]
        self.learns = self._learns()
        self.kinds: Recent[Hashable, Kind] = Recent()

    def holds(self, loss: Any) -> bool:
        own = loss.__dict__
        return (
            type(loss) is self.cls
            and self.cls.__mro__ is self.mro
            and tuple(own) == self.names
            and (all(map(is_, own.values(), self.values)) or self._goes_along(own))
            and list(map(len, self.views)) == self.sizes
            and all(map(is_, chain.from_iterable(self.views), self.inside))
            and [f.__code__ for f in self.functions] == self.codes
            and (not self.owners or self.learns == self._learns())
        )

    def _kept(self, name: str, value: Any) -> Any:
        """What an attribute is compared with."""
        if isinstance(value, Tensor):
            return _Alive(value)
        if name in self.options or not is_users(name) or not _is_data(value) or _is_plain(value):
            return value
        return _Data(type(value))

    def _learns(self) -> tuple[bool, ...]:
        return learns([owner() if type(owner) is _Alive else owner for owner in self.owners])

    def _goes_along(self, own: Mapping[str, Any]) -> bool:
        """Whether what has changed is of no consequence but for the functions, which read it anew."""
        for n, (value, before) in enumerate(zip(own.values(), self.values)):
            if value is before:
                continue
            if type(before) is _Alive:
                if before() is not value:
                    return False
            elif type(before) is _Data:
                if type(value) is not before.kind:
                    return False
            else:
                name = self.names[n]
                if type(value) is not type(before) or name in self.options or not is_users(name) or not _is_data(value):
                    return False
                self.values[n] = self._kept(name, value)
        return True


class _Alive(ref):
    """A tensor."""


class _Data:
    """Any data of a type, which says that it is data; but for a number, which may be NaN, and is kept as such."""

    def __init__(self, kind: type) -> None:
        self.kind = kind


def _is_data(value: Any) -> bool:
    """A number, not NaN, or what a look takes for data."""
    if isinstance(value, float):
        return value == value
    return not (isinstance(value, (bool, str, Tensor, nn.Module)) or callable(value))


def _is_plain(value: Any) -> bool:
    """What holds no tensor; a float of NumPy's too."""
    return type(value) in PLAIN or isinstance(value, float) or (type(value) is tuple and all(map(_is_plain, value)))


def _may_learn(value: Any) -> bool:
    return isinstance(value, (Tensor, nn.Module)) or (
        isinstance(value, MethodType) and isinstance(value.__self__, nn.Module)
    )


def learns(values: Sequence[Any]) -> tuple[bool, ...]:
    """Whether tensors require grad, and the parameters of modules and of those whose method is given."""
    found: list[bool] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value.requires_grad)
            continue
        module = value if isinstance(value, nn.Module) else getattr(value, "__self__", None)
        if isinstance(module, nn.Module):
            found += [parameter.requires_grad for parameter in module.parameters()]
    return tuple(found)
