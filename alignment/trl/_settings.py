"""What a config says of the loss, and whether a loss is as it says. Imports nothing of TRL."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass
from typing import Any, NoReturn, TypeAlias

from ..path import PreferenceLoss

NOTHING = object()
"""What a loss has where no value of the config would say the same."""


@dataclass(frozen=True)
class Setting:
    """How a field of a config that describes the loss is found in a loss."""

    name: str
    """Of the loss's field."""
    without: Any = NOTHING
    """What a loss amounts to that has no such field."""
    read: Callable[[Any], Any] | None = None
    """Instead of the field's value."""

    def of(self, loss: PreferenceLoss) -> Any:
        """What the config would say of this loss."""
        return getattr(loss, self.name, self.without) if self.read is None else self.read(loss)


Settings: TypeAlias = Mapping[str, Setting]


def conflicts(config: Any, loss: PreferenceLoss, settings: Settings) -> list[str]:
    """Names of fields that are not at their default and say something else than the loss has."""
    found = []
    for one in dataclasses.fields(config):
        if one.name in settings:
            said = _plain(getattr(config, one.name))
            default = one.default if one.default_factory is MISSING else one.default_factory()
            if said not in (_plain(default), _plain(settings[one.name].of(loss))):
                found.append(one.name)
    return found


def _plain(value: Any) -> Any:
    """A list of one thing says no more than that thing."""
    if not isinstance(value, (list, tuple)):
        return value
    return value[0] if len(value) == 1 else tuple(value)


def refuse(config: Any, loss: PreferenceLoss, name: str, setting: Setting) -> NoReturn:
    """In a sentence with what both say."""
    who, has = type(loss).__name__, setting.of(loss)
    none = has is NOTHING or not (setting.read or hasattr(loss, setting.name))
    other = f"{who}, which has none" if none else f"{who} with {has!r}"
    raise ValueError(
        f"expected args to say nothing else than the loss, got {name}={getattr(config, name)!r} and {other}"
    )


def warn(config: Any, loss: PreferenceLoss, name: str, setting: Setting, stacklevel: int) -> None:
    """That TRL's trainer ignores it too."""
    reader, who = loss.unread.get(setting.name), type(loss).__name__
    warnings.warn(
        f"{name}={getattr(config, name)!r} has no effect, as in TRL: {who} as args describe it does not read it"
        + (f", {reader} would" if reader else ""),
        stacklevel=stacklevel + 1,
    )
