"""What is kept and bounded: layouts, plans, compiled steps."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from contextlib import suppress
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Recent(OrderedDict[K, V], Generic[K, V]):
    """A dict of so many entries at most: the least recently found go."""

    def found(self, key: K) -> V | None:
        value = self.get(key)
        if value is not None and len(self) > 1:
            with suppress(KeyError):  # gone since, by another thread's call
                self.move_to_end(key)
        return value

    def keep(self, key: K, value: V, most: int) -> V:
        while len(self) >= most and key not in self:
            with suppress(KeyError):
                self.popitem(last=False)
        self[key] = value
        return value
