"""A signature that several methods share is written once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def with_arguments_of(
    prepare: Callable[Concatenate[Any, P], Any],
) -> Callable[[Callable[..., R]], Callable[Concatenate[Any, P], R]]:
    """A method that hands its arguments on: it has the signature of the one that takes them, and its documentation
    where it has none of its own."""

    def decorate(method: Callable[..., R]) -> Callable[Concatenate[Any, P], R]:
        returns = inspect.signature(method).return_annotation
        shown: Any = method
        shown.__signature__ = inspect.signature(prepare).replace(return_annotation=returns)
        shown.__doc__ = method.__doc__ or prepare.__doc__
        return shown

    return decorate
