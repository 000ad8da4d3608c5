"""``Head``: hidden states and all that turns them into logits, as one argument of a loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks
from .engine import Projection
from .kernels.token_scores import transform_logits
from .tokens import linear_logps


@dataclass(frozen=True, eq=False)
class Head:
    """Hidden states, and what turns them into logits.

    With ``y = logit_scale * (hidden @ weight.T + bias + the extra terms)``: y, or ``softcap * tanh(y / softcap)``.

    The losses of ``alignment`` and ``distill`` take one in place of the loose tensors, so that what
    ``causal_lm.check`` compared with the model's own logits is what they compute on.

    Args:
        hidden: any floating dtype and leading dimensions.
        weight, bias: the LM head.
        extra: further ``(input, weight)`` terms of the logits: a LoRA adapter on the head is
            ``((hidden @ A.T, scale * B),)``.
        logit_scale, logit_softcap: what the model does to its logits.

    Raises:
        TypeError, ValueError: what is no head, in a sentence.

    Example:
        >>> import torch
        >>> from chunked_embed import Head
        >>> head = Head(torch.randn(2, 5, 8, requires_grad=True), torch.randn(11, 8), logit_softcap=30.0)
        >>> head.shifted().hidden.shape  # the states that predict tokens 1 ... 4
        torch.Size([2, 4, 8])
        >>> head.logits().shape
        torch.Size([2, 5, 11])
        >>> head.logps(torch.randint(0, 11, (2, 5))).sum().backward()
        >>> head
        Head(hidden=(2, 5, 8), weight=(11, 8), logit_scale=1.0, logit_softcap=30.0)
    """

    hidden: Tensor  # (..., H)
    weight: Tensor  # (V, H)
    bias: Tensor | None = None  # (V,)
    extra: tuple[tuple[Tensor, Tensor], ...] = ()  # of (..., R) and (V, R)
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "extra", check_head(self.hidden, self.weight, self.bias, self.extra))
        checks.number("logit_scale", self.logit_scale, checks.POSITIVE)
        checks.number_or_none("logit_softcap", self.logit_softcap, checks.POSITIVE)

    def __repr__(self) -> str:
        """Shapes, and what the model does to its logits."""
        shapes = [f"{name}={tuple(getattr(self, name).shape)}" for name in ("hidden", "weight")]
        shapes += [] if self.bias is None else [f"bias={tuple(self.bias.shape)}"]
        shapes += [f"extra={len(self.extra)} more"] if self.extra else []
        scale, softcap = self.transform
        return f"Head({', '.join(shapes)}, logit_scale={scale}, logit_softcap={softcap})"

    @classmethod
    def of(
        cls, prefix: str, hidden: Any, weight: Any, bias: Any, extra: Any, logit_scale: float, softcap: float | None
    ) -> Head:
        """From a caller's loose tensors, whose names in refusals begin with ``prefix``: ``ref_`` for ``ref_weight``."""
        return cls.known(hidden, weight, bias, check_head(hidden, weight, bias, extra, prefix), logit_scale, softcap)

    @classmethod
    def known(cls, hidden: Any, weight: Any, bias: Any, extra: Any, logit_scale: float, softcap: float | None) -> Head:
        """From parts that were checked: others of the same ``signature`` were."""
        head = object.__new__(cls)
        own = head.__dict__  # frozen: a constructor would take each on its own
        own["hidden"], own["weight"], own["bias"], own["extra"] = hidden, weight, bias, extra
        own["logit_scale"], own["logit_softcap"] = logit_scale, softcap
        return head

    def _with(self, **changes: Any) -> Head:
        """With other tensors that fit as these do: not checked again."""
        head = object.__new__(type(self))
        head.__dict__.update(self.__dict__, **changes)
        return head

    @property
    def projection(self) -> Projection:
        """What the engine multiplies; ``transform`` is what follows."""
        projection = object.__new__(Projection)
        own = projection.__dict__
        own["input"], own["weight"], own["bias"], own["extra"] = self.hidden, self.weight, self.bias, self.extra
        return projection

    @property
    def parts(self) -> tuple[Any, ...]:
        """All that there is to check, for ``signatures.signature``."""
        extra = [part for term in self.extra for part in term]
        return self.hidden, self.weight, self.bias, *extra, self.logit_scale, self.logit_softcap

    @property
    def transform(self) -> tuple[float, float | None]:
        """Scale and soft-cap."""
        return self.logit_scale, self.logit_softcap

    def __getitem__(self, index: Any) -> Head:
        """The same head on some of the states: ``head[:, 1:]``, ``head[mask]``."""
        extra = tuple((x[index], weight) for x, weight in self.extra)
        return self._with(hidden=self.hidden[index], extra=extra)

    def shifted(self, length: int | None = None) -> Head:
        """The states that predict tokens 1 ... of the last ``length`` (all by default): all but the last state.

        Prompt tuning puts virtual tokens in front of the ``length`` real ones.
        """
        return self[:, 0 if length is None else self.hidden.shape[1] - length : -1]

    def cut(self, vocabulary: int) -> Head:
        """Without the tokens from ``vocabulary`` on."""
        bias = None if self.bias is None else self.bias[:vocabulary]
        extra = tuple((x, weight[:vocabulary]) for x, weight in self.extra)
        return self._with(weight=self.weight[:vocabulary], bias=bias, extra=extra)

    def detach(self) -> Head:
        """For a frozen model. Tensors that do not learn anyway stay the same ones."""
        learns = self.hidden.requires_grad or self.weight.requires_grad
        return self._map(_detached) if learns or self.extra or self.bias is not None else self

    def to(self, where: torch.dtype | torch.device) -> Head:
        return self._map(lambda tensor: tensor.to(where))

    def _map(self, fn: Callable[[Tensor], Tensor]) -> Head:
        bias = None if self.bias is None else fn(self.bias)
        extra = tuple((fn(x), fn(weight)) for x, weight in self.extra)
        return self._with(hidden=fn(self.hidden), weight=fn(self.weight), bias=bias, extra=extra)

    def logits(self) -> Tensor:  # -> (..., V)
        """All of them at once: for a few states."""
        x = F.linear(self.hidden, self.weight, self.bias)
        for more, weight in self.extra:
            x = x + F.linear(more, weight)
        return transform_logits(x, logit_scale=self.logit_scale, softcap=self.logit_softcap)

    def logps(self, target: Tensor, **options: Any) -> Tensor:  # (...) -> (...)
        """``linear_logps`` of these states."""
        transform: dict[str, Any] = {"logit_scale": self.logit_scale, "logit_softcap": self.logit_softcap}
        found = linear_logps(self.hidden, self.weight, target, self.bias, extra=self.extra, **transform, **options)
        assert found.logps is not None
        return found.logps


def _detached(tensor: Tensor) -> Tensor:
    return tensor.detach() if tensor.requires_grad else tensor


def check_head(hidden: Any, weight: Any, bias: Any, extra: Any, prefix: str = "") -> tuple[tuple[Tensor, Tensor], ...]:
    """Refuses tensors that make no logits together; -> extra as tuples. ``prefix`` is of the arguments' names."""
    checks.tensor(f"{prefix}hidden", hidden, (..., "features"), kind="floating")
    where = {"device": hidden.device, "kind": "floating"}
    checks.tensor(f"{prefix}weight", weight, ("vocabulary", hidden.shape[-1]), **where)
    if bias is not None:
        checks.tensor(f"{prefix}bias", bias, (weight.shape[0],), **where)
    name = f"{prefix}extra"
    if not isinstance(extra, (tuple, list)) or not all(isinstance(term, (tuple, list)) for term in extra):
        raise TypeError(f"expected {name} to be a tuple of (input, weight) pairs, got {type(extra).__name__}")
    for k, term in enumerate(extra):
        if len(term) != 2:
            raise TypeError(f"expected {name}[{k}] to be a pair (input, weight), got {len(term)} of them")
        checks.tensor(f"{name}[{k}][0]", term[0], (*hidden.shape[:-1], "rank"), **where)
        checks.tensor(f"{name}[{k}][1]", term[1], (weight.shape[0], term[0].shape[-1]), **where)
    return tuple((x, more) for x, more in extra)
