"""Options of a class as annotated fields: each name, default and range is stated once, in the body of the class.

    class MarginLoss(PairLoss):
        margin: float = number(1.0, doc="least distance of the two")
        alpha: float = number(0.1, NOT_NEGATIVE, "weight of the NLL")
        _: KW_ONLY
        kind: str = choice("hinge", ("hinge", "squared"))
        weights: Sequence[float] | None = None  # anything: ``check`` may look at it

Such a class has a constructor of those arguments, ``MarginLoss(margin=1.0, alpha=0.1, *, kind="hinge", weights=None,
...)``: its own fields, then those of its bases. They are plain attributes. ``check`` refuses what means nothing, at
construction, and wherever a loss calls it again, since attributes may change.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from typing import Any, ClassVar

from . import checks
from .checks import FINITE, Range
from .chunking import Chunking

if sys.version_info >= (3, 11):
    from typing import dataclass_transform
else:
    from typing_extensions import dataclass_transform  # torch brings it

__all__ = ["KW_ONLY", "ChunkFields", "Field", "Fields", "choice", "flag", "integer", "number"]


def _anything(name: str, value: Any) -> Any:
    return value


class Table(dict[str, "Field"]):
    """The fields of a class. Nobody changes it, so that a compiled step need not compare it."""

    unchanging: ClassVar[bool] = True


@dataclass(frozen=True)
class Field:
    """A default, and what else is known of an option. ``number`` and its like make them."""

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
    """A number in ``allowed``. None is one more value of a number whose default it is."""
    check = partial(checks.number if default is not None else checks.number_or_none, allowed=allowed)
    text = "" if allowed == FINITE else f"{allowed}{'' if default is not None else ', or None'}"
    return Field(default, check, doc, text, allowed, limits, by_position=by_position)


def integer(default: int | None, low: int | None = None, high: int | None = None, doc: str = "") -> Any:
    check = checks.integer if default is not None else checks.integer_or_none
    return Field(default, partial(check, low=low, high=high), doc)


def choice(default: str | None, choices: Collection[str | None], doc: str = "") -> Any:
    told = all(f'"{name}"' in doc for name in choices)
    return Field(default, partial(checks.choice, choices=choices), doc, "" if told else " or ".join(map(repr, choices)))


def flag(default: bool, doc: str = "") -> Any:
    return Field(default, checks.flag, doc)


@dataclass_transform()
class Fields:
    """Base of a class whose options are annotated in its body.

    Every annotation with a value is an option, but for a ``ClassVar``; those behind ``_: KW_ONLY`` go by keyword only.
    A class may have a constructor of its own instead, which hands the rest on: ``super().__init__(**options)``.
    """

    fields: Mapping[str, Field] = {}
    """By name, in the order of the constructor."""

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

    def extra_repr(self) -> str:
        """The options by position, and those by keyword that are not as by default."""
        shown = []
        for name, field in self.known_fields().items():
            value = getattr(self, name, field.default)
            if _place(field) == 0 or value != field.default:
                shown.append(f"{name}={value!r}")
        return ", ".join(shown)


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
    """The options of chunks, which ``FlexChunkLoss`` explains."""

    _: KW_ONLY
    chunk_size: int | None = None
    max_chunk_bytes: int | None = None
    compiled: bool | None = None
    float32_outputs: bool = True

    def check(self) -> None:
        super().check()
        Chunking.of(self)
