"""The names of a module of losses: ours where we have one, else those of the library's module."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def finder(package: str, home: Mapping[str, str], names: Iterable[str], library: str) -> Callable[[str], Any]:
    """A ``__getattr__`` of ``package``: ``home`` has the modules in which ours are, ``library`` is the name in
    ``_compat`` of the module that has the others, and ``names`` are what to tell of."""

    def find(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(package)
        if name in home:
            value = getattr(importlib.import_module(f"{package}.{home[name]}"), name)
        else:  # the library's own: no large tensor, a name that goes with a loss, or one of a later version
            theirs = getattr(importlib.import_module("chunked_embed.losses._compat"), library)
            if name not in theirs.__all__:
                raise AttributeError(f"module {package!r} has no attribute {name!r}; it has {', '.join(names)}")
            value = getattr(theirs, name)
        vars(module)[name] = value
        return value

    return find
