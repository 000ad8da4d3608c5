"""``linear_logps``: token log-probabilities from hidden states and an LM head, differentiable, without the logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import available
from ..kernels.token_scores import DIFFERENTIABLE, STATISTICS, token_gradient_, token_scores, token_statistics
from .compile import outside_compile
from .loss import FlexChunkLoss
from .steps import ChunkData, Named, Score
from .types import Projection, accumulator_dtype
from .walk import Call


class TokenLogps(NamedTuple):
    """Each shaped like ``target``, zero on ignored tokens; None where not asked for. The first three differentiable."""

    logps: Tensor | None = None
    lse: Tensor | None = None
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None


@outside_compile
def linear_logps(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    target: Tensor,  # (...), integers
    bias: Tensor | None = None,  # (V,)
    *,
    outputs: Sequence[str] = ("logps",),
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    extra: tuple[tuple[Tensor, Tensor], ...] = (),
    chunk_size: int | None = None,
    max_chunk_bytes: int | None = None,
    compiled: bool = True,
) -> TokenLogps:
    """Log-probabilities of target tokens, and what else the logits say about them, a chunk of logits at a time.

    With ``x = hidden @ weight.T + bias``, ``y = logit_scale * x``, capped to ``softcap * tanh(y / softcap)`` where
    there is a softcap, and ``z = y / temperature``::

        logps             z[target] - lse            differentiable
        lse               log sum_v exp z_v          differentiable
        entropy           lse - sum_v p_v z_v        differentiable, p = softmax(z)
        log_sum_sq_probs  log sum_v p_v^2
        mean_logits       mean_v z_v
        is_top1           1 where the target has the largest logit

    Any code may follow; backward forms the logits once more (four products in all). Where the loss is known, a
    ``FlexChunkLoss`` needs three.

    Args:
        hidden: ``(..., H)``, any floating dtype.
        weight, bias: the head, in the dtype of ``hidden`` (or under autocast).
        target: one id per hidden state, already aligned; ``ignore_index`` drops the token before any product.
        outputs: names of the table above.
        extra: further ``(input, weight)`` terms of the logits, such as a LoRA adapter on the head.
        chunk_size, max_chunk_bytes, compiled: as for ``FlexChunkLoss``.

    Returns:
        A named tuple of tensors shaped like ``target``, in float32 (float64 for float64 inputs).

    Raises:
        ValueError: an unknown output, ids outside [0, V), shapes or devices that do not fit, numbers out of range.
        TypeError: mixed dtypes without autocast.
    """
    names = tuple(dict.fromkeys([outputs] if isinstance(outputs, str) else outputs))
    unknown = [name for name in names if name not in STATISTICS]
    if unknown or not names:
        raise ValueError(f"expected outputs among {list(STATISTICS)}, got {list(names)}")
    if target.is_floating_point() or target.dtype == torch.bool:
        raise TypeError(f"expected target to hold integers, got {target.dtype}")
    statistics = TokenStatistics(
        names,
        logit_scale=logit_scale,
        softcap=logit_softcap,
        temperature=temperature,
        chunk_size=chunk_size,
        max_chunk_bytes=max_chunk_bytes,
        compiled=compiled,
    )
    used = (target != ignore_index).float()
    found = statistics.scores(Projection(hidden, weight, bias, extra), {"target": target.long()}, row_weight=used)
    return TokenLogps(**{name: s if name in DIFFERENTIABLE else s.detach() for name, s in found.items()})


class TokenStatistics(FlexChunkLoss):
    """Scores each token by what the logits say about it: ``linear_logps`` as an engine loss, to build losses on.

    The score is a Triton kernel pair where that runs, else its plain twin in a compiled (or uncompiled) step.
    """

    index_rows = ("target",)

    def __init__(
        self,
        names: tuple[str, ...] = ("logps",),
        logit_scale: float = 1.0,
        softcap: float | None = None,
        temperature: float = 1.0,
        gradients_of: tuple[str, ...] = DIFFERENTIABLE,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        _check_transform(logit_scale, softcap, temperature)
        self.names = names
        self.gradients_of = gradients_of  # the others are constants, such as metrics
        self.logit_scale = logit_scale
        self.softcap = softcap
        self.temperature = temperature

    def score_fn(self, outputs: Tensor, rows: Named, hp: Any) -> Named:
        found = token_scores(
            outputs,
            rows["target"].long(),
            self.names,
            logit_scale=hp.logit_scale,
            softcap=getattr(hp, "softcap", None),
            temperature=hp.temperature,
        )
        return {name: value if name in self.gradients_of else value.detach() for name, value in found.items()}

    def _score(self, call: Call, names: tuple[str, ...]) -> Score:
        problem = call.problem
        _check_transform(self.logit_scale, self.softcap, self.temperature)
        own = self._function("score_fn") == self.score_fn and type(self).score_fn is TokenStatistics.score_fn
        if (
            own
            and not problem.columns
            and self.compiled
            and problem.dtype != torch.float64
            and available(problem.device)
        ):
            return KernelScore(self.names, self.gradients_of, self.logit_scale, self.softcap, self.temperature)
        return super()._score(call, names)


def _check_transform(logit_scale: float, softcap: float | None, temperature: float) -> None:
    for name, value in (("logit_scale", logit_scale), ("softcap", softcap), ("temperature", temperature)):
        if value is not None and (not isinstance(value, Real) or not 0 < value < float("inf")):
            raise ValueError(f"expected {name} to be a positive, finite number, got {value!r}")


class KernelScore:
    """The token statistics by a hand-written kernel pair; the gradient reuses them and takes the outputs' place."""

    combine: Mapping[str, str] = {}

    def __init__(
        self,
        names: tuple[str, ...],
        gradients_of: tuple[str, ...],
        logit_scale: float,
        softcap: float | None,
        temperature: float,
    ) -> None:
        self.names = names
        self.gradients_of = tuple(name for name in DIFFERENTIABLE if name in gradients_of)
        self.transform: dict[str, Any] = {"logit_scale": logit_scale, "softcap": softcap, "temperature": temperature}

    def values(self, data: ChunkData, hp: NamedTuple) -> tuple[Named, Named, Named]:
        (outputs,) = data.outputs.values()
        x, target = outputs[: data.rows], data.row_args["target"].long()
        found = token_statistics(x if x.stride(1) == 1 else x.contiguous(), target, names=self.names, **self.transform)
        return {name: found[name] for name in self.names}, {}, found

    def gradients(
        self, data: ChunkData, hp: NamedTuple, saved: Named, upstream: Named, totals: Named
    ) -> tuple[Named, Named]:
        ((name, outputs),) = data.outputs.items()
        if name not in data.destinations:
            return {}, {}
        wanted = {
            name: upstream[name].to(accumulator_dtype(outputs.dtype)) for name in self.gradients_of if name in upstream
        }
        destination = data.destinations[name]
        out = None if destination is None else destination[: data.rows]
        x, target = outputs[: data.rows], data.row_args["target"].long()
        token_gradient_(x if x.stride(1) == 1 else x.contiguous(), target, saved, wanted, **self.transform, out=out)
        return {}, {}
