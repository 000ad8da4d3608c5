"""A loss around another one, whose attributes it shows as its own."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from chunked_embed.losses._base import OF_MINI_BATCHES, OPTIONS, ChunkedLoss, Options


class Around(ChunkedLoss):
    """Has the options of mini-batches. All others, and the attributes in ``_shown``, are those of ``self.loss``: read
    from it, and set on it."""

    loss: nn.Module
    _own_options = OF_MINI_BATCHES
    _shown: tuple[str, ...] = ()
    _defaults: dict[str, tuple[Any]] = {}  # of what in ``_shown`` a wrapped loss may lack

    def __setattr__(self, name: str, value: Any) -> None:
        inner = self._inner_with(name)
        if inner is None:
            super().__setattr__(name, value)
            return
        if name in OPTIONS:
            self._check_taken(name)
            if not (isinstance(inner, ChunkedLoss) or hasattr(inner, name)):
                raise ValueError(f"{name}: {type(inner).__name__}, the wrapped loss, has no such option")
            Options(**{**self._options(), name: value})
        setattr(inner, name, value)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in vars(cls).get("_shown", ()):
            setattr(cls, name, _of_the_loss_inside(name, *cls._defaults.get(name, ())))

    def _inner_with(self, name: str) -> nn.Module | None:
        """The wrapped loss, where that is what has the attribute; None as well before there is one."""
        theirs = name in self._shown or (name in OPTIONS and name not in OF_MINI_BATCHES)
        return vars(self).get("_modules", {}).get("loss") if theirs else None

    @property
    def _fusable(self) -> bool:
        return False

    @property
    def _normalizes(self) -> bool:
        return isinstance(self.loss, ChunkedLoss) and self.loss._normalizes

    def _targets(self, features: list[dict[str, Tensor]], labels: Any) -> Any:
        return self.loss._targets(features, labels) if isinstance(self.loss, ChunkedLoss) else labels


def _of_the_loss_inside(name: str, *default: Any) -> property:
    """What the wrapped loss has by this name, or else the default, where there is one."""

    def read(self: Around) -> Any:
        return getattr(self._modules.get("loss"), name, *default)

    return property(read)


for _name in OPTIONS:
    if _name not in OF_MINI_BATCHES:
        setattr(Around, _name, _of_the_loss_inside(_name, getattr(Options, _name)))  # which the library's losses lack
