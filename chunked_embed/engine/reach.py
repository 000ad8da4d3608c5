"""What a function can read beside its arguments."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from types import CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

LIBRARIES = ("torch.", "builtins.", "chunked_embed.engine.", "chunked_embed.loss.")


class Held(NamedTuple):
    """Something that a function can read: how it says so, where that is from, and what it is."""

    path: str
    where: str
    value: Any

    def part(self, path: str, value: Any) -> Held:
        return Held(self.path + path, self.where, value)


def is_library(module: str | None) -> bool:
    """What torch and this engine read is no business of a loss's author."""
    return f"{module}.".startswith(LIBRARIES)


def readable(function: FunctionType) -> Iterator[Held]:
    """Closures, default arguments, globals, and of modules what the function names."""
    code = function.__code__
    names = names_in(code)
    found = []
    for label, cell in zip(code.co_freevars, function.__closure__ or ()):
        with suppress(ValueError):  # nothing in it yet
            found.append(Held(label, "closed over", cell.cell_contents))
    defaults = function.__defaults__ or ()
    positional = code.co_varnames[code.co_argcount - len(defaults) : code.co_argcount]
    given = {**dict(zip(positional, defaults)), **(function.__kwdefaults__ or {})}
    found += [Held(label, "a default argument", value) for label, value in given.items()]
    found += [Held(n, "a global", function.__globals__[n]) for n in names if n in function.__globals__]
    for held in found:
        if not isinstance(held.value, ModuleType):
            yield held
        elif not is_library(held.value.__name__):
            inside = vars(held.value)
            yield from (held.part(f".{name}", inside[name]) for name in names if name in inside)


def names_in(code: CodeType) -> list[str]:
    """Of globals and attributes, inner functions included."""
    inner = [name for const in code.co_consts if isinstance(const, CodeType) for name in names_in(const)]
    return [*code.co_names, *inner]
