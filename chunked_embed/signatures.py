"""Signatures: one that several methods share is written once, and a call is known by that of its arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterable
from typing import Any, ClassVar, Concatenate, ParamSpec, TypeVar

from torch import Tensor, nn

P = ParamSpec("P")
R = TypeVar("R")


def with_arguments_of(
    prepare: Callable[Concatenate[Any, P], Any],
) -> Callable[[Callable[..., R]], Callable[Concatenate[Any, P], R]]:
    """A method that hands its arguments on: it has the signature of the one that takes them, and its documentation
    where it has none of its own.

    Example:
        >>> from chunked_embed.signatures import with_arguments_of
        >>> import inspect
        >>> class Call:
        ...     def prepare(self, hidden, weight=None):
        ...         return hidden, weight
        ...     @with_arguments_of(prepare)
        ...     def run(self, *arguments, **keywords):
        ...         return self.prepare(*arguments, **keywords)
        >>> inspect.signature(Call.run)
        <Signature (self, hidden, weight=None)>
    """

    def decorate(method: Callable[..., R]) -> Callable[Concatenate[Any, P], R]:
        returns = inspect.signature(method).return_annotation
        shown: Any = method
        shown.__signature__ = inspect.signature(prepare).replace(return_annotation=returns)
        shown.__doc__ = method.__doc__ or prepare.__doc__
        return shown

    return decorate


def signature(*given: Any) -> Hashable:
    """What checks of tensors and heads may look at, as a key: who has seen it need not check again. None: there is no
    telling, as of a subclass of tensors."""
    found: list[Hashable] = []
    try:
        for value in given:
            kind = type(value)
            inside: Iterable[Any] | None = None
            if kind is Tensor or kind is nn.Parameter:
                found += (value.shape, value.dtype, value.device, value.layout)
            elif value is None or kind is float or kind is int or (kind is tuple and not value):
                found.append(value)
            elif kind is tuple and all([type(term) is tuple and len(term) == 2 for term in value]):
                inside = [part for term in value for part in term]
            elif isinstance(getattr(kind, "parts", None), property):  # a Head
                inside = value.parts
            else:
                return None
            if inside is not None:
                found.append(key := signature(*inside))
                if key is None:
                    return None
    except RuntimeError:  # a nested tensor has no shape
        return None
    return tuple(found)


class Seen:
    """What a loss knows of its calls: the signatures of those that were checked, and for which of them what follows
    from one is set. A copy knows none."""

    unchanging: ClassVar[bool] = True  # no business of a compiled step
    most: ClassVar[int] = 128

    def __init__(self) -> None:
        self.calls: set[Hashable] = set()
        self.settled: Hashable = None

    def clear(self) -> None:
        self.calls.clear()
        self.settled = None

    def keep(self, key: Hashable) -> None:
        if key is not None:
            if len(self.calls) >= self.most:
                self.calls.clear()
            self.calls.add(key)

    def __deepcopy__(self, memo: Any) -> Seen:
        return type(self)()

    def __reduce__(self) -> Any:
        return type(self), ()
