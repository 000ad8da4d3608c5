"""Names of a package, imported when they are asked for: one whose library has lost it takes no other with it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any


def from_homes(package: str, homes: Mapping[str, str], tested: str) -> Callable[[str], Any]:
    """``__getattr__`` of a package with trainers of TRL's.

    Args:
        package: its ``__name__``.
        homes: by each name, the module in the package that has it.
        tested: how the versions of TRL begin that the package is written for.
    """

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            module = importlib.import_module(f"{package}.{homes[name]}")
        except (ImportError, RuntimeError) as missing:  # the second is of a library that imports lazily
            raise ImportError(
                f"expected trl {tested}x and what it needs for {name} (pip install 'chunked-embed[trl]'), "
                f"got {_installed()}: {missing}"
            ) from missing
        return getattr(module, name)

    return find


def _installed() -> str:
    try:
        return f"trl {version('trl')}"
    except PackageNotFoundError:
        return "no trl"
