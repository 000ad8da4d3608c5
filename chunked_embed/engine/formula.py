"""A loss's functions in one call: the snapshot that they get as ``self``, and what identifies them.

``Formula.snapshot(loss)`` is taken once a call. Its ``view`` is a bare instance of the loss's own class with a copy of
the loss's attributes: whatever a function reads there is what the loss had when the call began, in its backward too,
and whatever it writes is lost. ``key`` names every function that may run: the class, the functions that its classes
have now, methods replaced on the instance, plain functions. A function replaced anywhere gives another key.

A compiled step holds no formula. It holds ``formula.functions``, and is given the attributes that its functions read.
Which those are is found by running the functions once on a view that notes what is asked of it (``Notes``); for that,
the loss's class says ``__getattr__ = attribute``.
"""

from __future__ import annotations

import inspect
import os
import sys
from abc import ABC
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import suppress
from functools import cached_property, partial
from types import BuiltinFunctionType, CodeType, FunctionType, MemberDescriptorType, MethodType
from typing import Any, Generic, NamedTuple, Protocol

from torch import nn

from .reach import names_in, readable
from .values import MISSING, Same, slots

NAMES = ("loss_fn", "score_fn", "element_fn")
BASES: set[type] = {object, nn.Module, ABC, Generic, Protocol}
"""Classes whose functions and class attributes nobody replaces: not looked at. ``FlexChunkLoss`` adds itself."""

UNREAD = "an attribute that no earlier run of the loss's functions read"
STORES = ("_parameters", "_buffers", "_modules")
INTERNAL = set(nn.Module().__dict__) - {*STORES, "training"}
"""Attributes that are no business of a loss's functions. ``FlexChunkLoss`` adds its own."""


def is_users(name: str) -> bool:
    """Whether an attribute is a loss's own, of no module and not of the engine."""
    return name not in INTERNAL and name not in STORES


_WHOLE = frozenset(("__dict__", "vars", "dir"))  # names in code that reads an object past its attributes


class Bound(NamedTuple):
    """The functions of a loss on one view, each ``(outputs, rows, columns=None)``; None where a loss has none, or none
    was asked for."""

    loss_fn: Any
    score_fn: Any
    element_fn: Any


class Functions(NamedTuple):
    """The functions without the numbers: what a compiled step may hold on to."""

    cls: type
    methods: tuple[tuple[str, Any], ...]  # bound to the instance: an attribute's name, the function
    plain: tuple[tuple[Any, tuple[str, ...]], ...]  # for each of NAMES: the function or None, what it gets by keyword
    of_class: tuple[bool, ...]  # for each of NAMES: an ordinary method of the class


def bind(functions: Functions, view: Any, names: tuple[str, ...] = NAMES) -> Bound:
    calls: list[Any] = []
    for name, (function, keywords), of_class in zip(NAMES, functions.plain, functions.of_class, strict=True):
        if name not in names:
            calls.append(None)
        elif function is not None:
            calls.append(_call(function, (), keywords, view))
        elif of_class:  # a trace finds what a function closes over by way of its class, not of the view
            calls.append(_call(getattr(functions.cls, name), (view,), (), view))
        else:
            calls.append(_call(getattr(view, name, None), (), (), view))
    return Bound(*calls)


def _call(function: Any, first: tuple, keywords: tuple[str, ...], view: Any) -> Any:
    if function is None:
        return None

    def call(outputs: Any, rows: Any, columns: Any = None) -> Any:
        given = {keyword: getattr(view, keyword) for keyword in keywords}
        if columns:
            given["columns"] = columns
        return function(*first, outputs, rows, **given)

    return call


def assemble(functions: Functions, values: Mapping[str, Any], absent: tuple[str, ...] | None) -> Any:
    """A bare instance that has ``values`` and nothing else; also inside a trace.

    Asked for anything that is neither in ``values`` nor in ``absent`` it raises: a loss that reads on where a shape or
    a number takes it another way must be looked at again. With ``absent=None``, ``values`` are all that there is.
    """
    view: Any = object.__new__(functions.cls)
    for name, value in values.items():
        object.__setattr__(view, name, value)
    for name, function in functions.methods:
        object.__setattr__(view, name, partial(function, view))
    if absent is not None:
        object.__setattr__(view, "_absent", absent)
    return view


def attribute(self: Any, name: str) -> Any:
    """``__getattr__`` of a loss: what its dictionary and class do not have. Parameters, buffers and modules, as in any
    module; and on the views of a compiled step, a note of what is read, or the refusal of what was not."""
    own = self.__dict__
    if "_notes" in own:
        return own["_notes"].of(self, name)
    if "_absent" in own and name not in own["_absent"] and not name.startswith("__"):
        raise RuntimeError(f"{UNREAD}: {name}")
    return nn.Module.__getattr__(self, name)


def view_of(
    loss: Any, methods: tuple[tuple[str, Any], ...], extra: Mapping[str, Any] | None, of_class: list[tuple[str, Any]]
) -> Any:
    """A snapshot of a loss; ``methods``: those put on the instance, whose self is the snapshot; ``of_class``: the slots
    of its class."""
    kind = type(loss)
    view: Any = object.__new__(kind)
    own = loss.__dict__.copy()
    object.__setattr__(view, "__dict__", own)
    for store in STORES:
        if store in own:
            own[store] = dict(own[store])
    for _, slot in of_class:
        with suppress(AttributeError):  # never set
            slot.__set__(view, slot.__get__(loss, kind))
    for name, function in methods:
        own[name] = MethodType(function, view)
    if extra:
        own.update(extra)
    return view


class Formula:
    """The functions of one loss in one call, and their numbers."""

    __slots__ = ("functions", "key", "view")

    def __init__(self, view: Any, functions: Functions, key: Hashable) -> None:
        self.view = view
        self.functions = functions
        self.key = key

    @classmethod
    def snapshot(cls, loss: Any, extra: Mapping[str, Any] | None = None) -> Formula:
        """
        Args:
            loss: an instance. Its ``_functions`` (by name) are plain functions in place of methods, its ``_numbers``
                the names that those get by keyword, where they take them.
            extra: further attributes, in this call alone.
        """
        kind = type(loss)
        # Whose self is the user's object, past any snapshot.
        methods = [(n, v.__func__) for n, v in loss.__dict__.items() if type(v) is MethodType and v.__self__ is loss]
        view = view_of(loss, tuple(methods), extra, slots(kind))
        own = view.__dict__
        given = own.get("_functions")
        plain: tuple = _NO_PLAIN
        if given and any(function is not None for function in given.values()):
            numbers = (*own.get("_numbers", ()), *(extra or ()))
            plain = tuple([(f, keywords(f, numbers)) for f in (given.get(name) for name in NAMES)])
        of_class = tuple([name not in own and type(_raw(kind, name)) is FunctionType for name in NAMES])
        functions = Functions(kind, tuple(methods), plain, of_class)
        return cls(view, functions, _key(*functions))

    def with_attributes(self, extra: Mapping[str, Any]) -> Formula:
        """The same functions on a view that has these attributes too."""
        view: Any = object.__new__(self.functions.cls)
        view.__dict__.update(self.view.__dict__, **extra)
        return Formula(view, self.functions, self.key)

    def has(self, name: str) -> bool:
        """Whether the loss has this function."""
        return self.functions.plain[NAMES.index(name)][0] is not None or getattr(self.view, name, None) is not None

    def bind(self, view: Any = None, names: tuple[str, ...] = NAMES) -> Bound:
        return bind(self.functions, self.view if view is None else view, names)

    def all_functions(self) -> Iterator[Callable]:
        """Every function that may run, unwrapped: for messages, and to know the same code again."""
        for cls in own_classes(self.functions.cls):
            for name, value in vars(cls).items():
                if name not in _OUTSIDE:
                    yield from _unwrapped(value)
        for _, function in self.functions.methods:
            yield from _unwrapped(function)
        for function, _ in self.functions.plain:
            yield from _unwrapped(function)

    def mentions(self, start: tuple[str, ...], name: str) -> bool:
        """Whether these functions, or those of the class that they name, name an attribute."""
        functions, numbers = [], set()
        for function, (plain, given) in zip(NAMES, self.functions.plain, strict=True):
            if function in start:
                functions += [plain, getattr(self.view, function, None)]
                numbers |= set(given)
        return name in numbers or mentions(self.functions.cls, functions, name)

    def codes(self) -> tuple[CodeType, ...]:
        return tuple(f.__code__ for f in self.all_functions() if isinstance(f, FunctionType))

    def home(self) -> str:
        """Which loss this is, for a message: its first function, with file and line."""
        plain = [f for f, _ in self.functions.plain if f is not None]
        methods = [function for _, function in self.functions.methods]
        own = [_raw(self.functions.cls, name) for name in NAMES]
        for candidate in (*plain, *methods, *own):
            for function in _unwrapped(candidate):
                if isinstance(function, FunctionType):
                    code = function.__code__
                    return f"{function.__qualname__} ({os.path.basename(code.co_filename)}:{code.co_firstlineno})"
        return self.functions.cls.__name__ if not plain else type(plain[0]).__name__


_OUTSIDE = frozenset(
    ("__init__", "__new__", "__init_subclass__", "__post_init__", "__getstate__", "__setstate__", "__repr__", "__dir__")
)  # methods that do not run in a step
_NO_PLAIN: tuple = ((None, ()),) * len(NAMES)


def keywords(function: Any, names: tuple[str, ...]) -> tuple[str, ...]:
    """Those of ``names`` that a plain function takes by keyword."""
    if function is None or not names:
        return ()
    if type(function) is FunctionType and not function.__code__.co_flags & inspect.CO_VARKEYWORDS:
        code = function.__code__
        taken = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        return tuple([name for name in names if name in taken])
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return names
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return names
    return tuple([name for name in names if name in parameters])


# --- the functions of a class, and its data --------------------------------------------------------------------------

_WRAPPERS = (property, classmethod, staticmethod, cached_property)
_DATA: dict[type, bool] = {}


def _raw(cls: type, name: str) -> Any:
    for c in cls.__mro__:
        if name in vars(c):
            return vars(c)[name]
    return None


def own_classes(cls: type) -> list[type]:
    return [c for c in cls.__mro__ if c not in BASES]


def _is_data(kind: type) -> bool:
    """Values of a class body that are numbers and the like, not functions, descriptors or classes."""
    if kind not in _DATA:
        if len(_DATA) >= 1024:
            _DATA.clear()
        _DATA[kind] = not (hasattr(kind, "__get__") or issubclass(kind, type))
    return _DATA[kind]


def _key(cls: type, methods: tuple, plain: tuple, of_class: tuple) -> Hashable:
    found: list[Hashable] = [cls, of_class]
    for c in cls.__mro__:
        if c in BASES:
            continue
        for value in vars(c).values():
            kind = type(value)
            if kind is FunctionType:  # its code, too: a notebook's autoreload replaces that in place
                found.append(value)
                found.append(id(value.__code__))
            elif kind in _WRAPPERS:
                found.append(value)
                found.extend([id(f.__code__) for f in _unwrapped(value) if type(f) is FunctionType])
            elif not _is_data(kind):
                found.append(Same(value))
    for name, function in methods:
        found.extend((name, Same(function)))
    if plain is not _NO_PLAIN:
        for function, given in plain:
            # Of a method the parts are kept, since each access makes a new object.
            found.append(function if type(function) in (FunctionType, MethodType) else Same(function))
            found.append(given)
            if type(function) is FunctionType:
                found.append(id(function.__code__))
    return tuple(found)


def _unwrapped(value: Any) -> Iterator[Any]:
    if isinstance(value, (FunctionType, BuiltinFunctionType)):
        yield value
    elif isinstance(value, (classmethod, staticmethod, MethodType)):
        yield from _unwrapped(value.__func__)
    elif isinstance(value, property):
        for part in (value.fget, value.fset, value.fdel):
            yield from _unwrapped(part)
    elif isinstance(value, (cached_property, partial)):
        yield from _unwrapped(value.func)


def _class_data(cls: type) -> list[str]:
    return [
        name
        for c in own_classes(cls)
        for name, value in vars(c).items()
        if not name.startswith("__") and name != "_abc_impl" and _is_data(type(value))
    ]


# --- which attributes are read ---------------------------------------------------------------------------------------


class Notes:
    """Notes what the functions of a formula read, while they run on ``view``: a bare instance with an empty dictionary,
    so that every attribute is asked of ``__getattr__``. What exists on the class is not, and counts as read."""

    def __init__(self, formula: Formula) -> None:
        self.formula = formula
        self.names: dict[str, str] = {}  # name -> "file:line" of the first read
        self.absent: dict[str, str] = {}
        cls = formula.functions.cls
        self.view: Any = object.__new__(cls)
        own: dict[str, Any] = self.view.__dict__
        own["_notes"] = self
        self.methods = {name: MethodType(function, self.view) for name, function in formula.functions.methods}
        for name, value in formula.view.__dict__.items():
            if hasattr(cls, name) and name not in INTERNAL:
                own[name] = self.methods.get(name, value)
                if name not in self.methods:
                    self.names[name] = ""
        for name in _class_data(cls):
            self.names.setdefault(name, "")

    def of(self, view: Any, name: str) -> Any:
        if name in self.methods:
            return self.methods[name]
        value = getattr(self.formula.view, name, MISSING)
        line = _reader()
        if value is MISSING:
            if not name.startswith("__"):
                self.absent.setdefault(name, line)
            raise AttributeError(f"{type(view).__name__!r} object has no attribute {name!r}")
        self.names.setdefault(name, line)
        return value

    def finish(self) -> None:
        """Call it after the run. A cached property is computed outside of a step, and given to it like a number."""
        for name in self.view.__dict__:
            if isinstance(_raw(type(self.view), name), cached_property):
                self.names.setdefault(name, "")


def _reader() -> str:
    frame: Any = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename in (__file__, nn.modules.module.__file__):
        frame = frame.f_back
    return "" if frame is None else f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"


def notes_all(formula: Formula) -> bool:
    """Whether a view can note all that the functions read: not where a class answers for its attributes itself, or its
    code asks for the whole dictionary."""
    cls: Any = formula.functions.cls
    if cls.__getattr__ is not attribute or cls.__getattribute__ is not object.__getattribute__:
        return False
    for c in own_classes(cls):
        for value in vars(c).values():
            kind = type(value)
            known = kind is FunctionType or kind in _WRAPPERS or kind is MemberDescriptorType or _is_data(kind)
            if not known and hasattr(kind, "__get__") and not inspect.isgetsetdescriptor(value):
                return False
    return not _ask_for_all(formula)


def _ask_for_all(formula: Formula) -> bool:
    """Whether the functions, or functions of the user's that they name, ask for an object's whole dictionary."""
    left: list[Any] = list(formula.all_functions())
    known: set[Any] = set()
    while left and len(known) < 1000:
        function = left.pop()
        if not isinstance(function, FunctionType) or function in known:
            continue
        known.add(function)
        if not _WHOLE.isdisjoint(names_in(function.__code__)):
            return True
        held = [held.value for held in readable(function)]
        left += [f for f in held if (getattr(f, "__module__", None) or "").split(".")[0] not in _THEIRS]
    return False


_THEIRS = frozenset((*sys.stdlib_module_names, "torch", "numpy"))


def mentions(cls: type, functions: list[Any], name: str) -> bool:
    """Whether functions, or those of a class that they name, name an attribute."""
    left, known = [f for function in functions for f in _unwrapped(function)], set()
    while left:
        function = left.pop()
        if not isinstance(function, FunctionType) or function in known:
            continue
        known.add(function)
        names = names_in(function.__code__)
        if name in names:
            return True
        left += [f for c in cls.__mro__ for found in names for f in _unwrapped(vars(c).get(found))]  # super's, too
    return False


def everything(formula: Formula) -> dict[str, str]:
    """All attributes, read or not."""
    methods = dict(formula.functions.methods)
    names = [n for n in formula.view.__dict__ if n not in INTERNAL and n not in methods]
    names += _class_data(formula.functions.cls)
    names += [name for name, _ in slots(formula.functions.cls)]
    return dict.fromkeys(names, "")


def line_of(formula: Formula, name: str) -> str:
    """Where the functions name an attribute: "file:line", or nothing."""
    import dis

    for function, given in formula.functions.plain:
        if name in given and isinstance(function, FunctionType):
            return f"{os.path.basename(function.__code__.co_filename)}:{function.__code__.co_firstlineno}"
    for code in formula.codes():
        line = code.co_firstlineno
        for instruction in dis.get_instructions(code):
            line = getattr(instruction, "line_number", None) or instruction.starts_line or line
            if instruction.argval == name and instruction.opname.startswith(("LOAD_ATTR", "LOAD_METHOD")):
                return f"{os.path.basename(code.co_filename)}:{line}"
    return ""
