"""Options of a class as annotated fields: each name, default and range is stated once, in the body of the class.

    class MarginLoss(PairLoss):
        margin: float = number(1.0, doc="least distance of the two")
        alpha: float = number(0.1, NOT_NEGATIVE, "weight of the NLL")
        _: KW_ONLY
        kind: str = choice("hinge", ("hinge", "squared"))
        weights: Sequence[float] | None = None  # anything: ``check`` may look at it

Such a class has a constructor of those arguments, ``MarginLoss(margin=1.0, alpha=0.1, *, kind="hinge", weights=None,
...)``: its own fields, then those of its bases. They are plain attributes. ``check`` refuses what means nothing, at
construction and, since attributes may change, in each call of a loss: ``recheck`` runs it where one did.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property, partial
from operator import is_, itemgetter
from typing import Any, ClassVar

from . import checks
from .checks import FINITE, Range
from .chunking import Chunking
from .engine.values import PLAIN

if sys.version_info >= (3, 11):
    from typing import dataclass_transform
else:
    from typing_extensions import dataclass_transform  # torch brings it

__all__ = ["KW_ONLY", "ChunkFields", "Field", "Fields", "assign", "choice", "flag", "integer", "number"]


def _anything(name: str, value: Any) -> Any:
    return value


class Table(dict[str, "Field"]):
    """The fields of a class. Nobody changes it, so that a compiled step need not compare it."""

    unchanging: ClassVar[bool] = True


@dataclass(frozen=True)
class Field:
    """A default, and what else is known of an option. ``number`` and its like make them.

    Example:
        >>> from chunked_embed.checks import POSITIVE
        >>> from chunked_embed.fields import Fields, number
        >>> class Margin(Fields):
        ...     margin: float = number(1.0, POSITIVE, "least distance")
        >>> Margin.fields["margin"].doc, Margin.fields["margin"].default
        ('least distance', 1.0)
    """

    default: Any
    check: Callable[[str, Any], Any] = _anything
    """(name, value) -> value, or an error."""
    doc: str = ""
    text: str = ""
    """What it may be, in words."""
    range: Range | None = None
    """Of a number."""
    limits: tuple[float, ...] = ()
    """Values of a number at which a formula takes another form."""
    keyword_only: bool = False
    by_position: bool = False
    """Of a keyword-only field: it may be given by position too, behind the fields of the class itself."""


# They return a Field. Any, so that ``margin: float = number(1.0)`` is to a type checker what it is at run time.


def number(
    default: float | None,
    allowed: Range = FINITE,
    doc: str = "",
    *,
    limits: tuple[float, ...] = (),
    by_position: bool = False,
) -> Any:
    """A number in ``allowed``. None is one more value of a number whose default it is.

    Example:
        >>> from chunked_embed.checks import POSITIVE
        >>> from chunked_embed.fields import Fields, number
        >>> class Numbers(Fields):
        ...     margin: float = number(1.0, POSITIVE, "least distance")
        ...     cap: float | None = number(None, POSITIVE)  # None is a value, too
        >>> Numbers(2, cap=30.0).cap
        30.0
    """
    check = partial(checks.number if default is not None else checks.number_or_none, allowed=allowed)
    text = "" if allowed == FINITE else f"{allowed}{'' if default is not None else ', or None'}"
    return Field(default, check, doc, text, allowed, limits, by_position=by_position)


def integer(default: int | None, low: int | None = None, high: int | None = None, doc: str = "") -> Any:
    """An integer from ``low`` to ``high``. None is one more value of one whose default it is.

    Example:
        >>> from chunked_embed.fields import Fields, integer
        >>> class Power(Fields):
        ...     p: int = integer(1, 1, 2)  # 1 or 2
        >>> Power(2).p
        2
    """
    check = checks.integer if default is not None else checks.integer_or_none
    return Field(default, partial(check, low=low, high=high), doc)


def choice(default: str | None, choices: Collection[str | None], doc: str = "") -> Any:
    """One of ``choices``.

    Example:
        >>> from chunked_embed.fields import Fields, choice
        >>> class Kind(Fields):
        ...     kind: str = choice("hinge", ("hinge", "squared"))
        >>> try:
        ...     Kind("square")
        ... except ValueError as error:
        ...     print(error)
        expected kind to be one of ['hinge', 'squared'], got 'square'
    """
    told = all(f'"{name}"' in doc for name in choices)
    return Field(default, partial(checks.choice, choices=choices), doc, "" if told else " or ".join(map(repr, choices)))


def flag(default: bool, doc: str = "") -> Any:
    """True or False.

    Example:
        >>> from chunked_embed.fields import Fields, flag
        >>> class Switch(Fields):
        ...     detached: bool = flag(False)
        >>> Switch(True).detached
        True
    """
    return Field(default, checks.flag, doc)


@dataclass_transform()
class Fields:
    """Base of a class whose options are annotated in its body.

    Every annotation with a value is an option, but for a ``ClassVar``; those behind ``_: KW_ONLY`` go by keyword only.
    A class may have a constructor of its own instead, which hands the rest on: ``super().__init__(**options)``.

    Example:
        >>> from chunked_embed.checks import POSITIVE
        >>> from chunked_embed.fields import choice, Fields, KW_ONLY, number
        >>> class Margin(Fields):
        ...     margin: float = number(1.0, POSITIVE, "least distance")
        ...     _: KW_ONLY
        ...     kind: str = choice("hinge", ("hinge", "squared"))
        >>> Margin(0.5, kind="squared").kind
        'squared'
        >>> try:
        ...     Margin(-1.0)
        ... except ValueError as error:
        ...     print(error)
        expected margin to be a positive, finite number, got -1.0
    """

    fields: Mapping[str, Field] = {}
    """By name, in the order of the constructor."""
    _checked_options: _CheckedOptions

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        _declare(cls)

    def begin(self, values: Mapping[str, Any]) -> None:
        """Before the fields are set: constructors of other bases, which may want some of the ``values``."""
        super().__init__()

    def setup(self) -> None:
        """When they are set: what else the object has, such as buffers."""

    def known_fields(self) -> Mapping[str, Field]:
        """Those of this object, which may have more than its class."""
        return self.fields

    def check(self) -> None:
        """Refuse options that mean nothing. A class that knows more of them calls ``super().check()`` first."""
        for name, field in self.known_fields().items():
            field.check(name, getattr(self, name, field.default))

    def recheck(self) -> bool:
        """``check``, unless all options are the very objects that it saw last; -> whether it ran."""
        return self._checked_options.again(self)

    def extra_repr(self) -> str:
        """The options by position, and those by keyword that are not as by default."""
        shown = []
        for name, field in self.known_fields().items():
            value = getattr(self, name, field.default)
            if _place(field) == 0 or value != field.default:
                shown.append(f"{name}={value!r}")
        return ", ".join(shown)


class _CheckedOptions:
    """Options of an object when they were checked, to be told from others by identity."""

    # In a class of its own: a loss whose functions ask for its whole dictionary would count as reading all of it.
    unchanging: ClassVar[bool] = True

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self.read: Callable[[Mapping[str, Any]], tuple[Any, ...]] | None = None
        self.values: tuple[Any, ...] = ()
        self.lists: tuple[tuple[list, tuple], ...] = ()  # they may change in place

    def again(self, owner: Fields) -> bool:
        if self.stay(owner.__dict__):
            return False
        self.forget()
        owner.check()
        self.keep(owner)
        return True

    def stay(self, own: Mapping[str, Any]) -> bool:
        if self.read is None:
            return False
        try:
            now = self.read(own)
        except KeyError:
            return False
        if not all(map(is_, now, self.values)):
            return False
        return all([len(now) == len(then) and all(map(is_, now, then)) for now, then in self.lists])

    def keep(self, owner: Fields) -> None:
        """Not where a check of the user's may look at anything, or where values change unseen."""
        names, own = tuple(owner.known_fields()), owner.__dict__
        if not names or "check" in own or not own.keys() >= set(names) or not _looks_at_options(type(owner)):
            return
        values = tuple(own[name] for name in names)
        if all(map(_is_plain, values)):
            self.read = itemgetter(*names, names[0])  # a tuple, also of one name
            self.values = (*values, values[0])
            self.lists = tuple((value, tuple(value)) for value in values if type(value) is list)

    def __deepcopy__(self, memo: Any) -> _CheckedOptions:
        return _CheckedOptions()

    def __reduce__(self) -> Any:
        return _CheckedOptions, ()


def _is_plain(value: Any) -> bool:
    return type(value) in PLAIN or (type(value) in (tuple, list) and PLAIN.issuperset(map(type, value)))


def _looks_at_options(cls: type) -> bool:
    """Whether ``check`` is of these packages, and so are the properties that it reads: at options, and nothing else."""
    others = [vars(c) for c in cls.__mro__ if c.__module__.partition(".")[0] not in _OURS]
    return not any("check" in own or any(isinstance(v, _PROPERTIES) for v in own.values()) for own in others)


_OURS = frozenset(("chunked_embed", "alignment", "distill", "torch", "builtins"))
_PROPERTIES = (property, cached_property)


def assign(owner: Any, **values: Any) -> None:
    """Attributes that are not so already: those that stay keep their objects, and setting one takes a module some
    microseconds."""
    for name, value in values.items():
        before = getattr(owner, name, _NOTHING)
        if before is not value and (type(before) is not type(value) or before != value):
            setattr(owner, name, value)


_NOTHING = object()


def _place(field: Field) -> int:
    """Own by position, those of a base by position, by keyword."""
    return field.keyword_only * (1 if field.by_position else 2)


def _declare(cls: type[Fields]) -> None:
    own = _declared(cls)
    found = dict(own)
    for base in cls.__mro__[1:]:
        for name, field in base.__dict__.get("fields", {}).items():
            found.setdefault(name, _changed(cls, name, field))
    cls.fields = Table(sorted(found.items(), key=lambda item: _place(item[1])))
    for name in own:
        delattr(cls, name)
    written = "__init__" in cls.__dict__
    if not written:
        cls.__init__ = _constructor(cls)  # type: ignore[method-assign]
    if cls.__doc__:
        text = _documented(cls.__doc__, own)
        cls.__doc__ = text if written else _pointing(text, cls, own)


def _declared(cls: type) -> dict[str, Field]:
    fields, keyword_only = {}, False
    for name, annotation in inspect.get_annotations(cls).items():
        if annotation is KW_ONLY or annotation in ("KW_ONLY", "dataclasses.KW_ONLY"):
            keyword_only = True
        elif name in cls.__dict__ and "ClassVar" not in str(annotation):
            value = cls.__dict__[name]
            field = value if isinstance(value, Field) else Field(value)
            fields[name] = replace(field, keyword_only=keyword_only)
    return fields


def _changed(cls: type, name: str, field: Field) -> Field:
    """A base's field, whose default a class may change: ``margin = 2.0`` in its body."""
    default = cls.__dict__.get(name, field.default)
    return field if default is field.default or hasattr(default, "__get__") else replace(field, default=default)


def signature_of(cls: type[Fields]) -> inspect.Signature:
    """Of the constructor, without ``self``."""
    annotations: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        annotations |= inspect.get_annotations(base)
    parameters = []
    for name, field in cls.fields.items():
        kind = inspect.Parameter.KEYWORD_ONLY if _place(field) == 2 else inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters.append(inspect.Parameter(name, kind, default=field.default, annotation=annotations[name]))
    return inspect.Signature(parameters)


def _constructor(cls: type[Fields]) -> Callable[..., None]:
    signature = signature_of(cls)

    def __init__(self: Fields, *arguments: Any, **keywords: Any) -> None:
        try:
            bound = signature.bind(*arguments, **keywords)
        except TypeError as error:
            raise TypeError(f"expected options of {cls.__name__} among {list(cls.fields)}, {error}") from None
        bound.apply_defaults()
        values = {name: cls.fields[name].check(name, value) for name, value in bound.arguments.items()}
        self.begin(values)
        self._checked_options = _CheckedOptions()
        for name, value in values.items():
            setattr(self, name, value)
        self.setup()
        self.check()

    me = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = [me, *signature.parameters.values()]
    shown: Any = __init__
    shown.__signature__ = signature.replace(parameters=parameters)
    shown.__doc__ = f"The options of ``{cls.__name__}``."
    shown.__qualname__, shown.__module__ = f"{cls.__qualname__}.__init__", cls.__module__
    return shown


def _documented(text: str, own: Mapping[str, Field]) -> str:
    """With a line for each field of which something is known; where there are such lines, for those that have a doc."""
    text, title = inspect.cleandoc(text), "Args:\n"
    told = {name: "; ".join(filter(None, [f.doc, f.text])) for name, f in own.items() if f.doc or title not in text}
    lines = "".join(f"    {name}: {said}.\n" for name, said in told.items() if said)
    if not lines:
        return text
    return text.replace(title, title + lines, 1) if title in text else f"{text}\n\n{title}{lines}"


def _pointing(text: str, cls: type[Fields], own: Collection[str]) -> str:
    """With a line that says which base has the options of which nothing is said, behind the others."""
    untold = {name for name in cls.fields if name not in own and name not in text}
    base = next((base for base in cls.__mro__[1:] if untold & inspect.get_annotations(base).keys()), None)
    if base is None:
        return text
    if (found := re.search(r"^Args:\n(?:[ \t].*(?:\n|\Z)|\n(?=[ \t]))*", text, re.M)) is None:
        return f"{text.rstrip()}\n\nArgs:\n    options: those of ``{base.__name__}``.\n"
    before, after = text[: found.end()].rstrip(), text[found.end() :]
    return f"{before}\n    others: those of ``{base.__name__}``.\n" + (f"\n{after.lstrip()}" if after.strip() else "")


class ChunkFields(Fields):
    """The options of chunks, which ``FlexChunkLoss`` explains.

    Example:
        >>> from chunked_embed.fields import ChunkFields, number
        >>> class Numbers(ChunkFields):
        ...     margin: float = number(1.0)
        >>> Numbers(0.5, chunk_size=1024).chunk_size
        1024
    """

    _: KW_ONLY
    chunk_size: int | None = None
    max_chunk_bytes: int | None = None
    compiled: bool | None = None
    float32_outputs: bool = True

    def check(self) -> None:
        super().check()
        Chunking.of(self)
