"""Values of attributes as keys, and whether two results agree."""

from __future__ import annotations

import math
import sys
import weakref
from collections import deque
from collections.abc import Hashable, Mapping
from enum import Enum
from functools import partial
from types import BuiltinFunctionType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

MISSING: Any = type("Missing", (), {"__repr__": lambda self: "missing"})()
"""The value of an attribute that was asked for (``hasattr``, ``getattr`` with a default) and is not there."""


PLAIN = frozenset((bool, int, float, str, type(None)))
"""Types of values that hold nothing."""


class Same:
    """Equal to itself alone: what is compared by identity, whatever its own ``==``. Keeps it, so that no other takes
    its address."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value


class Alive:
    """Equal to itself alone, too, and only as long as it is alive: without keeping it."""

    __slots__ = ("address", "of")

    def __init__(self, value: Any) -> None:
        self.address = id(value)
        try:
            self.of: Any = weakref.ref(value)
        except TypeError:  # a builtin
            self.of = lambda: value

    def __hash__(self) -> int:
        return self.address

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Alive) and self.of() is not None and self.of() is other.of()


def out_of_inference(t: Tensor) -> Tensor:
    """A tensor that autograd may save: of one that was made in inference mode, a copy."""
    return t.clone() if t.is_inference() and not torch.is_inference_mode_enabled() else t


DEPTH = 8


def frozen(value: Any, above: tuple[int, ...] = ()) -> Hashable:
    """A key that is equal for values with the same types and contents. Tensors and arrays count by type alone: they are
    arguments of a step. Functions, classes and modules count by identity, and so does what has a type that says of
    itself to be ``unchanging``: a table of a class, say, which each call would read through."""
    kind = type(value)
    if kind is float:
        # Zero has two signs, and NaN differs from itself.
        return (kind, value) if value and value == value else (kind, "nan" if value else math.copysign(1, value))
    if kind in _ATOMS:
        return (kind, value)
    if isinstance(value, Tensor):
        return (kind,)
    if isinstance(value, (nn.Module, type, FunctionType, BuiltinFunctionType, ModuleType, Enum)):
        return (kind, Same(value))
    if getattr(kind, "unchanging", False) is True:
        return (kind, Same(value))
    if isinstance(value, MethodType):
        return (kind, Same(value.__func__), Same(value.__self__))
    if len(above) >= DEPTH or id(value) in above:
        return (kind, Same(value))
    if kind.__module__ == "numpy":
        return (kind, value.item()) if hasattr(value, "item") and not hasattr(value, "__setitem__") else (kind,)
    inside = (*above, id(value))
    parts: list[Any] = [kind]
    if isinstance(value, (tuple, list, deque)):
        parts += [frozen(v, inside) for v in value]
    elif isinstance(value, Mapping):
        parts += [(frozen(k, inside), frozen(v, inside)) for k, v in value.items()]
    elif isinstance(value, (set, frozenset)):
        parts.append(frozenset([frozen(v, inside) for v in value]))
    elif isinstance(value, partial):
        parts += [frozen(v, inside) for v in (value.func, value.args, value.keywords)]
    elif not hasattr(value, "__dict__") and not slots(kind):
        by_value = kind.__eq__ is not object.__eq__ and kind.__hash__ not in (None, object.__hash__)
        return (kind, value if by_value else Same(value))
    if hasattr(value, "__dict__"):
        parts += [(name, frozen(v, inside)) for name, v in vars(value).items()]
    parts += [(name, frozen(getattr(value, name, MISSING), inside)) for name, _ in slots(kind)]
    return tuple(parts)


_ATOMS = frozenset(
    (int, bool, str, bytes, complex, range, type(None), type(MISSING), torch.dtype, torch.device, torch.layout)
)


def plain_number(value: Any) -> Any:
    """A numpy scalar as the Python number that it is; other things as they are."""
    kind = type(value)
    if kind.__module__ == "numpy" and hasattr(value, "item") and not hasattr(value, "__setitem__"):
        return value.item()
    return value


def slots(cls: type) -> list[tuple[str, Any]]:
    return [
        (name, value)
        for c in cls.__mro__
        if "__slots__" in vars(c)
        for name, value in vars(c).items()
        if type(value) is MemberDescriptorType
    ]


# --- numbers as tensors ---


class Watched(Tensor):
    """A number as a tensor, in the trial of a promotion: what looks at its type or its text, or looks it up, would find
    another thing in a trace, and raises here. What is computed from it alone is watched, too."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        if type(result) is Tensor and not result.dim() and result.dtype == torch.float64:
            return result.as_subclass(cls)
        return result

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        if sys._getframe(1).f_globals.get("__name__", "").split(".")[0] != "torch":
            raise TypeError("a number was asked for its type")
        return Watched

    def _python(self, *args: Any) -> Any:
        raise TypeError("a number was used as a Python value")

    __hash__ = __format__ = __str__ = __repr__ = _python  # type: ignore[assignment]


TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5}  # others: 2e-2


def same(expected: Any, found: Any) -> bool:
    """Whether two results of a step agree: structures, types and, within rounding, numbers."""
    (left, shape), (right, other) = tree_flatten(expected), tree_flatten(found)
    if shape != other:
        return False
    for a, b in zip(left, right, strict=True):
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            if a.dtype != b.dtype or a.shape != b.shape:
                return False
            limit = TOLERANCE.get(a.dtype, 2e-2)
            if not torch.allclose(a, b, rtol=limit, atol=limit, equal_nan=True):
                return False
        elif not (a is b or a == b):
            return False
    return True
