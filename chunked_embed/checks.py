"""Checks of what a caller gives: every "expected ..., got ..." of the three packages is worded here.

Shapes and values that do not fit are a ``ValueError``, types and dtypes a ``TypeError``. A check returns what it has
checked. None of them waits for a device, but for those that say so.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from types import EllipsisType, ModuleType
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
C = TypeVar("C", bound=Callable)
Shape: TypeAlias = tuple[int | str | EllipsisType, ...]
"""Numbers are exact; strings say what a dimension is, of any size; an ellipsis is any number of dimensions."""
Kind: TypeAlias = Literal["floating", "integer", "bool", "real"]

KINDS: Mapping[str, str] = {
    "floating": "be floating point",
    "integer": "hold integers",
    "bool": "be bool",
    "real": "hold real numbers",
}

PADDING = 0.05
"""How much wider one head may be than another of the same vocabulary: sizes are rounded up to a multiple."""


# --- numbers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Range:
    """The numbers that an option may be: finite ones from ``low`` to ``high``, an open end left out.

    Example:
        >>> from chunked_embed.checks import Range
        >>> 0.5 in Range(0, 1), float("nan") in Range(0, 1)
        (True, False)
        >>> print(Range(0, 1, low_open=True))
        a number in (0, 1]
    """

    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return above and below and math.isfinite(value)

    def __str__(self) -> str:
        if self.low > -math.inf and self.high < math.inf:
            return f"a number in {'[('[self.low_open]}{self.low:g}, {self.high:g}{'])'[self.high_open]}"
        if self.low > -math.inf:
            if self.low == 0:
                return "a positive, finite number" if self.low_open else "a finite number, zero or more"
            return f"a finite number {f'above {self.low:g}' if self.low_open else f'of {self.low:g} or more'}"
        if self.high < math.inf:
            return f"a finite number {f'below {self.high:g}' if self.high_open else f'of {self.high:g} or less'}"
        return "a finite number"


FINITE = Range()
POSITIVE = Range(0, low_open=True)
NOT_NEGATIVE = Range(0)
SMOOTHING = Range(0, 0.5, high_open=True)
UNIT = Range(0, 1)


def is_number(value: object) -> bool:
    """A real number, of Python or NumPy, that is no boolean."""
    kind = type(value)
    return kind is float or kind is int or (kind is not bool and isinstance(value, Real))


def number(name: str, value: Any, allowed: Range = FINITE) -> float:
    """A number that stays one: what learns, or lives on a device, is an argument and not an option.

    Example:
        >>> from chunked_embed import checks
        >>> checks.number("beta", 0.1, checks.POSITIVE)
        0.1
        >>> try:
        ...     checks.number("beta", -0.1, checks.POSITIVE)
        ... except ValueError as error:
        ...     print(error)
        expected beta to be a positive, finite number, got -0.1
    """
    return _number(name, value, allowed, "")


def number_or_none(name: str, value: Any, allowed: Range = FINITE) -> float | None:
    return None if value is None else _number(name, value, allowed, ", or None")


def integer(name: str, value: Any, low: int | None = None, high: int | None = None) -> int:
    """An integer from ``low`` to ``high``, of Python or NumPy; no boolean.

    Example:
        >>> from chunked_embed import checks
        >>> checks.integer("chunk_size", 64, low=1)
        64
    """
    return _integer(name, value, low, high, "")


def integer_or_none(name: str, value: Any, low: int | None = None, high: int | None = None) -> int | None:
    return None if value is None else _integer(name, value, low, high, " or None")


def _number(name: str, value: Any, allowed: Range, or_none: str) -> float:
    if not is_number(value):
        raise TypeError(f"expected {name} to be {allowed}{or_none}, got {_told(value)}")
    try:
        found = float(value)
    except OverflowError:  # a whole number beyond all floats
        found = math.inf
    if found not in allowed:
        raise ValueError(f"expected {name} to be {allowed}{or_none}, got {value!r}")
    return found


def _integer(name: str, value: Any, low: int | None, high: int | None, or_none: str) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"expected {name} to be {_integers(low, high)}{or_none}, got {_told(value)}")
    found = int(value)
    if (low is not None and found < low) or (high is not None and found > high):
        raise ValueError(f"expected {name} to be {_integers(low, high)}{or_none}, got {found}")
    return found


def scalar(name: str, value: Any, allowed: Range = FINITE) -> float | Tensor:  # -> a number, or ()
    """A number, or a tensor of one element that may learn.

    A tensor on the CPU that does not learn is a number. One on another device is not looked at: a value outside of
    ``allowed`` goes on to the loss.

    Example:
        >>> import torch
        >>> from chunked_embed import checks
        >>> checks.scalar("scale", 20.0, checks.POSITIVE)
        20.0
        >>> checks.scalar("scale", torch.tensor([20.0], requires_grad=True)).shape  # one that learns stays a tensor
        torch.Size([])
    """
    if not isinstance(value, Tensor):
        return number(name, value, allowed)
    tensor(name, value, kind="floating")
    if value.numel() != 1:
        raise ValueError(f"expected {name} to be a number or a tensor of one element, got {tuple(value.shape)}")
    if value.device.type != "cpu":
        return value.reshape(())
    found = value.item()
    if found not in allowed:
        raise ValueError(f"expected {name} to be {allowed}, got {found!r}")
    return value.reshape(()) if value.requires_grad else found


def scalar_tensor(  # -> ()
    name: str, value: Any, allowed: Range = FINITE, *, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The same as a tensor of that dtype, where it is needed."""
    found = scalar(name, value, allowed)
    if isinstance(found, Tensor):
        return found.to(device=device, dtype=dtype)
    return torch.tensor(found, dtype=dtype, device=device)


def items(name: str, value: Any, device: torch.device | None = None) -> float | Tensor:  # -> a number, or ()
    """What a sum is divided by, a positive number. A tensor on a GPU is not looked at, which would wait for it, and
    goes to ``device``; one on the CPU stays there, as the number that it is.

    Example:
        >>> import torch
        >>> from chunked_embed import checks
        >>> checks.items("num_items", 37), checks.items("num_items", torch.tensor([37]))
        (37.0, tensor(37))
    """
    if not isinstance(value, Tensor):
        return number(name, value, POSITIVE)
    on_cpu = value.device.type == "cpu"
    if value.numel() != 1 or (on_cpu and not bool(value > 0)):
        raise ValueError(f"expected {name} to be a positive number, got {value}")
    found = value.detach().reshape(())
    if found.dtype in (torch.float16, torch.bfloat16):
        found = found.float()
    return found if on_cpu or device is None else found.to(device)


# --- names, switches, functions --------------------------------------------------------------------------------------


def choice(name: str, value: Any, choices: Collection[str | None]) -> Any:
    """One of ``choices``.

    Example:
        >>> from chunked_embed import checks
        >>> checks.choice("tail", "bucket", ("bucket", "renorm"))
        'bucket'
    """
    if not (value is None or isinstance(value, str)) or value not in choices:
        raise ValueError(f"expected {name} to be one of {_listed(choices)}, got {_told(value)}")
    return value


def flag(name: str, value: Any) -> bool:
    """True or False, and not what counts as such.

    Example:
        >>> from chunked_embed import checks
        >>> checks.flag("normalize", True)
        True
    """
    if not isinstance(value, bool):
        raise TypeError(f"expected {name} to be True or False, got {_told(value)}")
    return value


def floating_dtype_or_none(name: str, given: Any) -> torch.dtype | None:
    known = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    if given is not None and given not in known:
        raise TypeError(f"expected {name} to be one of {[str(dtype)[6:] for dtype in known]} or None, got {given!r}")
    return given


def flag_or_none(name: str, value: Any) -> bool | None:
    if value is not None and not isinstance(value, bool):
        raise TypeError(f"expected {name} to be True, False or None, got {_told(value)}")
    return value


def function(name: str, value: C) -> C:
    if not callable(value):
        raise TypeError(f"expected {name} to be callable, got {_told(value)}")
    return value


def function_or_none(name: str, value: C | None) -> C | None:
    if value is not None and not callable(value):
        raise TypeError(f"expected {name} to be callable or None, got {_told(value)}")
    return value


def instance(name: str, value: Any, kind: type[T]) -> T:
    if not isinstance(value, kind):
        raise TypeError(f"expected {name} to be {_article(kind.__name__)}, got {kind_of(value)}")
    return value


def named(name: str, value: Any, of: str = "tensors") -> Mapping[str, Any]:
    """A dict by name, such as rows and columns are."""
    if not isinstance(value, Mapping):
        raise TypeError(f"expected {name} to be a dict of {of} by name, got {type(value).__name__}")
    for key in value:
        if not isinstance(key, str):
            raise TypeError(f"expected {name} to be a dict of {of} by name, got the key {key!r}")
    return value


def sequence(name: str, value: Any, of: str = "tensors") -> list[Any]:
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise TypeError(f"expected {name} to be a sequence of {of}, got {_told(value)}")
    return list(value)


# --- tensors ---------------------------------------------------------------------------------------------------------


def tensor(
    name: str,
    value: Any,
    shape: Shape | None = None,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    kind: Kind | None = None,
    grad: bool | None = None,
) -> Tensor:
    """A dense tensor in memory. ``grad=False``: one that does not learn.

    Example:
        >>> import torch
        >>> from chunked_embed import checks
        >>> x = checks.tensor("hidden", torch.zeros(2, 3, 8), (..., "features"), kind="floating")
        >>> try:
        ...     checks.tensor("weight", torch.zeros(4, 7), ("vocabulary", 8))
        ... except ValueError as error:
        ...     print(error)
        expected weight of shape (vocabulary, 8), got (4, 7)
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"expected {name} to be a tensor, got {kind_of(value)}")
    if device is not None and value.device != device:
        raise ValueError(f"expected {name} on {device}, got {value.device}")
    if value.is_meta:
        raise ValueError(f"expected {name} in memory, got a tensor on the meta device")
    if value.layout is not torch.strided or value.is_nested:
        kinds = "nested" if value.is_nested else str(value.layout).removeprefix("torch.").strip("_")
        raise TypeError(f"expected {name} to be a dense tensor, got a tensor of layout {kinds}")
    if shape is not None and not _fits(shape, value.shape):
        raise ValueError(f"expected {name} of shape {_shape_text(shape)}, got {tuple(value.shape)}")
    if dtype is not None and value.dtype != dtype:
        raise TypeError(f"expected {name} to be {dtype}, got {value.dtype}")
    if kind is not None and not _is_kind(kind, value.dtype):
        raise TypeError(f"expected {name} to {KINDS[kind]}, got {value.dtype}")
    if grad is False and value.requires_grad:
        raise ValueError(f"expected {name} without gradient, got a tensor that requires grad")
    return value


def one_dtype(what: str, dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
    """``what`` is of one dtype, such as "the embeddings"."""
    if len(set(dtypes.values())) > 1:
        each = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        raise TypeError(f"expected {what} to have one dtype (or autocast to make it one), got {each}")
    return next(iter(dtypes.values()))


def one_shape(what: str, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    if len(set(shapes.values())) > 1:
        each = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"expected {what} of one shape, got {each}")
    return next(iter(shapes.values()))


def one_vocabulary(who: str, ours: int, theirs: int) -> int:
    """The tokens that two heads have in common, such as those of "policy and reference"; padding may differ."""
    few, many = sorted((ours, theirs))
    if many > few * (1 + PADDING):
        raise ValueError(
            f"expected {who} of one vocabulary, but for {PADDING:.0%} of padding, got {ours} and {theirs} tokens: cut "
            f"the wider head to the ids that both share (weight[:{few}], or head.cut({few}))"
        )
    return few


def all_finite(name: str, value: Tensor) -> Tensor:
    """Waits for the device."""
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"expected {name} to be finite, got NaN or infinity")
    return value


def no_nan(name: str, value: Tensor) -> Tensor:
    """Waits for the device."""
    if value.is_floating_point() and bool(value.isnan().any()):
        raise ValueError(f"expected {name} without NaN, got {int(value.isnan().sum())} of {value.numel()}")
    return value


class NaNWatch:
    """:func:`no_nan` of what is given call by call, which waits for no GPU.

    The first tensor of a device is looked at there and then. Of a later one the largest number, NaN where there is one,
    is copied to the host meanwhile, and the next call looks at it. A tensor that comes again at once, for another
    width of the embeddings, is neither looked at nor waited for. A copy of a watch starts anew.
    """

    def __init__(self) -> None:
        self._of: tuple[torch.device, torch.dtype] | None = None  # what the two below are for
        self._number: Tensor  # () in pinned memory
        self._there: torch.cuda.Event  # it has arrived
        self._pending = False
        self._last: tuple[weakref.ref[Tensor], int] | None = None  # and how often it had been written to

    def __reduce__(self) -> tuple[type[NaNWatch], tuple[()]]:
        return NaNWatch, ()

    def no_nan(self, name: str, value: Tensor) -> Tensor:
        if not value.is_cuda:
            if not value.is_floating_point() or (value.is_cpu and not _may_have_nan(value)):
                return value
            return no_nan(name, value)
        version = 0 if value.is_inference() else value._version
        again = self._last is not None and self._last[0]() is value and self._last[1] == version
        there = self._pending and self._there.query()
        if there or (self._pending and not again):
            self._pending = False
            if not there:  # of a call ago: the device is past it, but for a host that is a whole step ahead
                self._there.synchronize()
            if math.isnan(self._number.item()):
                self._last = None
                raise ValueError(f"expected {name} without NaN, got some in an earlier batch")
        if again or not (value.is_floating_point() and value.numel()):
            return value
        if self._of == (value.device, value.dtype):
            self._number.copy_(value.detach().amax(), non_blocking=True)
            self._there.record(torch.cuda.current_stream(value.device))
            self._pending = True
        else:
            no_nan(name, value)
            self._of = (value.device, value.dtype)
            self._number, self._there = torch.empty((), dtype=value.dtype, pin_memory=True), torch.cuda.Event()
        self._last = weakref.ref(value), version
        return value


def _may_have_nan(value: Tensor) -> bool:
    """On the CPU, floating point; no, in most cases, for less than a mask costs."""
    if value.numel() <= 64:
        found = sum(value.flatten().tolist())  # a few numbers are added up sooner than torch is asked to
    elif value.element_size() > 1:
        found = value.amax().item()
    else:
        return True
    return found != found


# --- how things are told ---------------------------------------------------------------------------------------------


def _told(value: Any) -> str:
    """What came, in a few words."""
    if isinstance(value, Tensor):
        found = f"{_article(type(value).__name__.lower())} of shape {tuple(value.shape)}"
        if value.requires_grad:
            return f"{found} that requires grad: what learns must be an argument of the call"
        return found if value.numel() != 1 else f"{found}: item() makes a number of it"
    if value is None or isinstance(value, (str, bool, int, float, complex)):
        return repr(value)
    return type(value).__name__


def kind_of(value: Any) -> str:
    """Its type, with the dtype where it has one."""
    if value is None:
        return "None"
    dtype = getattr(value, "dtype", None)
    return type(value).__name__ if dtype is None else f"{type(value).__name__} of {dtype}"


def _article(word: str) -> str:
    return f"{'an' if word[:1] in 'AEIOU' else 'a'} {word}"


def _listed(choices: Collection[str | None]) -> list[str | None]:
    """In an order of its own: a set has none."""
    return sorted(choices, key=str) if isinstance(choices, (set, frozenset)) else list(choices)


def _integers(low: int | None, high: int | None) -> str:
    if low is not None and high is not None:
        return f"an integer in [{low}, {high}]"
    if high is not None:
        return f"an integer of {high} or less"
    if low is None:
        return "an integer"
    return {0: "an integer, zero or more", 1: "a positive integer"}.get(low, f"an integer of {low} or more")


def _is_kind(kind: Kind, dtype: torch.dtype) -> bool:
    if kind == "floating":
        return dtype.is_floating_point
    if kind == "bool":
        return dtype == torch.bool
    if kind == "real":
        return not dtype.is_complex
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def _fits(shape: Shape, found: tuple[int, ...]) -> bool:
    if ... in shape:
        cut = shape.index(...)
        behind = len(shape) - cut - 1
        if len(found) < cut + behind:
            return False
        return _fits(shape[:cut], found[:cut]) and _fits(shape[cut + 1 :], found[len(found) - behind :])
    return len(shape) == len(found) and all(type(want) is str or want == got for want, got in zip(shape, found))


def _shape_text(shape: Shape) -> str:
    text = ", ".join("..." if size is ... else str(size) for size in shape)
    return f"({text},)" if len(shape) == 1 and shape[0] is not ... else f"({text})"


def own_package(found: ModuleType, own: str) -> ModuleType:
    """A package of this distribution, and not another one of that name: it has ``own``, which no other has.

    Raises:
        ImportError: it is another one; says where its file is.
    """
    if hasattr(found, own):
        return found
    where = found.__file__ or ", ".join(found.__path__)
    raise ImportError(
        f"expected the package {found.__name__} of chunked-embed, got another one of that name, {where}: rename or "
        "uninstall it, and see python -m chunked_embed doctor"
    )
