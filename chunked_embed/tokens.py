"""Token statistics from hidden states and an LM head, without the logits: ``linear_logps``, and a loss to build on."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks
from .checks import POSITIVE
from .chunking import Chunking
from .engine.chunk import Chunk, Into
from .engine.compile import outside_compile
from .engine.derived import Derived, check_derived
from .engine.products import mm
from .engine.step import Needs, Shape, Step
from .engine.types import Named, Projection, accumulator_dtype
from .kernels import available
from .kernels._launch import before_hopper, room
from .kernels.linear_scores import linear_statistics, scaled_exponentials_, scaled_exponentials_again_, serves
from .kernels.token_scores import DIFFERENTIABLE, STATISTICS, token_gradient_, token_scores, token_statistics
from .loss import FlexChunkLoss

FEW_OUTPUTS = 1 << 23  # of a call: up to here it is the host that is waited for, and it has fewer kernels to launch


class TokenLogps(NamedTuple):
    """Each shaped like ``target``, zero on ignored tokens; None where not asked for. The first three differentiable.

    Example:
        >>> import torch
        >>> from chunked_embed import linear_logps
        >>> found = linear_logps(torch.zeros(2, 4), torch.randn(8, 4), torch.tensor([3, -100]))
        >>> found.logps  # all tokens alike: -log 8; the second is ignored
        tensor([-2.0794,  0.0000])
        >>> found.entropy is None
        True
    """

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
    compiled: bool | None = None,
    float32_outputs: bool = True,
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

    Any code may follow; backward forms the logits once more (four products in all) unless they are few. Where the loss
    is known, a ``FlexChunkLoss`` needs three.

    Args:
        hidden: ``(..., H)``, any floating dtype.
        weight, bias: the head, in the dtype of ``hidden`` (or under autocast).
        target: one id per hidden state, already aligned; ``ignore_index`` drops the token before any product.
        outputs: names of the table above.
        extra: further ``(input, weight)`` terms of the logits, such as a LoRA adapter on the head.
        chunk_size, max_chunk_bytes, compiled, float32_outputs: as for ``FlexChunkLoss``.

    Returns:
        A named tuple of tensors shaped like ``target``, in float32 (float64 for float64 inputs).

    Raises:
        ValueError: an unknown output, ids outside [0, V), shapes or devices that do not fit, numbers out of range.
        TypeError: mixed dtypes without autocast, targets that are not integers.

    Example:
        >>> import torch
        >>> from chunked_embed import linear_logps
        >>> hidden, weight = torch.randn(2, 3, 4, requires_grad=True), torch.randn(11, 4)
        >>> found = linear_logps(hidden, weight, torch.randint(0, 11, (2, 3)), outputs=("logps", "entropy"))
        >>> found.logps.sum().backward()
        >>> found.entropy.shape
        torch.Size([2, 3])
    """
    names = tuple(dict.fromkeys([outputs] if isinstance(outputs, str) else outputs))
    unknown = [name for name in names if name not in STATISTICS]
    if unknown or not names:
        raise ValueError(f"expected outputs among {list(STATISTICS)}, got {list(names)}")
    checks.tensor("target", target, kind="integer")
    transform = (
        checks.number("logit_scale", logit_scale, POSITIVE),
        checks.number_or_none("logit_softcap", logit_softcap, POSITIVE),
        checks.number("temperature", temperature, POSITIVE),
    )
    checks.integer("ignore_index", ignore_index)
    chunking = Chunking(chunk_size, max_chunk_bytes, compiled, float32_outputs)
    statistics = _statistics(names, transform, ignore_index, chunking)
    found = statistics.scores(Projection(hidden, weight, bias, extra), {"target": target.long()})
    return TokenLogps(**{name: s if name in DIFFERENTIABLE else s.detach() for name, s in found.items()})


@lru_cache(maxsize=64)
def _statistics(
    names: tuple[str, ...], transform: tuple[float, float | None, float], ignore_index: int, chunking: Chunking
) -> TokenStatistics:
    """One loss serves every call with the same options, and keeps their layouts."""
    return TokenStatistics(names, *transform, ignore_index=ignore_index, **chunking.keywords)


class TokenStatistics(FlexChunkLoss):
    """Scores each token by what the logits say about it: ``linear_logps`` as a loss of the engine, to build losses on.

    The score is a Triton kernel pair where that runs, else its plain twin in a compiled (or uncompiled) step.

    Args:
        names: statistics of ``linear_logps``; or, with ``separate_outputs``, those of each projection by its name.
        logit_scale, softcap, temperature: of the logits.
        transforms: scale and softcap of each projection by its name, with ``separate_outputs``, in place of the first
            two.
        gradients_of: the statistics that have a gradient; the others are constants, such as metrics.
        token_fn: ``token_fn(statistics, rows) -> {name: (R,)}``, scores in place of the statistics: elementwise
            functions of those, which come by name, ``(R,)``, and of row arguments. A subclass overrides
            ``token_fn(self, statistics, rows)``, which reads its numbers. What it detaches is a constant.
        options: of ``FlexChunkLoss``: its ``loss_fn`` may be given as a plain function of scores and groups.

    Example:
        >>> import torch
        >>> from chunked_embed import Projection, TokenStatistics
        >>> def focal(scores, groups):  # sums over a segment's tokens; without segments each token is one
        ...     logps = scores["logps"][:, 0]
        ...     return -(1 - logps.exp()).square() * logps
        >>> loss = TokenStatistics(("logps",), logit_scale=0.5, loss_fn=focal)
        >>> hidden = torch.randn(6, 4, requires_grad=True)
        >>> loss(Projection(hidden, torch.randn(9, 4)), rows={"target": torch.arange(6)}).loss.backward()
        >>> hidden.grad.shape
        torch.Size([6, 4])

        With ``token_fn`` the scores are functions of the statistics: REINFORCE with a penalty on the divergence.

        >>> class Reinforce(TokenStatistics):
        ...     def token_fn(self, statistics, rows):
        ...         logps, ref_logps = statistics["logps"], rows["ref_logps"]
        ...         kl = (ref_logps - logps).expm1() - (ref_logps - logps)
        ...         return {"loss": 0.1 * kl - rows["advantage"] * logps}
        ...     def loss_fn(self, scores, groups):
        ...         return scores["loss"][:, 0]
        >>> rows = {"target": torch.arange(6), "ref_logps": torch.full((6,), -2.0), "advantage": torch.randn(6)}
        >>> Reinforce()(Projection(hidden, torch.randn(9, 4)), rows=rows).loss.backward()
    """

    def __init__(
        self,
        names: tuple[str, ...] | Mapping[str, tuple[str, ...]] = ("logps",),
        logit_scale: float = 1.0,
        softcap: float | None = None,
        temperature: float = 1.0,
        gradients_of: tuple[str, ...] = DIFFERENTIABLE,
        *,
        transforms: Mapping[str, tuple[float, float | None]] | None = None,
        token_fn: Callable[[Named, Named], Mapping[str, Tensor]] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**{"targets": ("target",), **options})
        if checks.function_or_none("token_fn", token_fn) is not None:
            self.__dict__["token_fn"] = token_fn  # in the method's place
        self.names = names
        self.logit_scale = logit_scale
        self.softcap = softcap
        self.temperature = temperature
        self.gradients_of = gradients_of
        self.transforms = transforms
        self._check_transform()

    def _check_transform(self) -> None:
        checks.number("logit_scale", self.logit_scale, POSITIVE)
        checks.number_or_none("softcap", self.softcap, POSITIVE)
        checks.number("temperature", self.temperature, POSITIVE)
        for name, (scale, softcap) in (self.transforms or {}).items():
            checks.number(f"logit_scale of {name!r}", scale, POSITIVE)
            checks.number_or_none(f"softcap of {name!r}", softcap, POSITIVE)

    def names_of(self, projection: str) -> tuple[str, ...]:
        return self.names[projection] if isinstance(self.names, Mapping) else tuple(self.names)

    def transform_of(self, projection: str) -> tuple[float, float | None]:
        return (self.logit_scale, self.softcap) if self.transforms is None else self.transforms[projection]

    def score_fn(self, outputs: Tensor, rows: Named) -> Named:
        # What all projections have in common names none of them, so that they share a compiled step.
        differ = isinstance(self.names, Mapping) or self.transforms is not None
        projection = self.projection if differ else ""
        names, (scale, softcap) = self.names_of(projection), self.transform_of(projection)
        found = token_scores(
            outputs, rows["target"].long(), names, logit_scale=scale, softcap=softcap, temperature=self.temperature
        )
        found = {name: value if name in self.gradients_of else value.detach() for name, value in found.items()}
        derived = self.token_fn(found, rows)
        if derived is not found:
            check_derived(derived, len(outputs))
        return dict(derived)

    def token_fn(self, statistics: Named, rows: Named) -> Mapping[str, Tensor]:
        """Scores from statistics, ``(R,)`` each, row by row; here those themselves."""
        return statistics

    def make_step(self, projections: tuple[str, ...]) -> Sequence[Step] | None:
        self._check_transform()
        if type(self).score_fn is not TokenStatistics.score_fn or len(projections) != 1:
            return None
        scale, softcap = self.transform_of(projections[0])
        asked = self.names_of(projections[0]), self.gradients_of, scale, softcap, self.temperature
        steps = ScaledExponentials(*asked), TokenKernel(*asked)
        if "token_fn" not in self.__dict__ and type(self).token_fn is TokenStatistics.token_fn:
            return steps
        scored: Any = object.__new__(type(self))  # as ``score_fn`` sees it
        scored.__dict__.update(self.__dict__, **({"projection": projections[0]} if self.separate_outputs else {}))
        return tuple(Derived(step, scored.token_fn) for step in steps)


@dataclass(frozen=True)
class _TokenStep(Step):
    row_wise = False
    names: tuple[str, ...] = ("logps",)
    gradients_of: tuple[str, ...] = ("logps",)
    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @property
    def key(self) -> Hashable:
        return type(self), self.names, self.gradients_of

    @property
    def transform(self) -> dict[str, Any]:
        return {"logit_scale": self.logit_scale, "softcap": self.softcap, "temperature": self.temperature}

    @property
    def constants(self) -> tuple[str, ...]:
        return tuple(name for name in self.names if name not in self.gradients_of or name not in DIFFERENTIABLE)

    @property
    def differentiable(self) -> tuple[str, ...]:
        return tuple(name for name in self.names if name not in self.constants)


@dataclass(frozen=True)
class ScaledExponentials(_TokenStep):
    """Statistics and the gradient of log-probabilities by a product whose logits are not written. Their exponentials
    are, and a number a row makes these the gradient of the outputs: it multiplies the rows of one product of backward,
    and those of the other's second operand."""

    def needs(self, shape: Shape) -> Needs:
        return Needs(self._refusal(shape), scratch=shape.operands.itemsize if shape.trains else 0, forms_outputs=False)

    def _refusal(self, shape: Shape) -> str | None:
        others = sorted({*self.names}.intersection(self.gradients_of, DIFFERENTIABLE) - {"logps"})
        if (refusal := kernel_refusal(shape)) is not None:
            return refusal
        if before_hopper(shape.device):
            return "GPUs before Hopper form outputs sooner"
        if shape.operands != torch.bfloat16:
            return f"exponentials need the range of bfloat16, operands are {shape.operands}"
        if shape.terms != 1:
            return f"outputs are to be one product, not the sum of {shape.terms}"
        if shape.outputs == shape.operands:
            return "outputs in half precision are asked for"
        if shape.learns and others:
            return f"the gradient of {', '.join(others)} takes logits"
        if shape.bias == "learns":
            return "the gradient of a bias takes that of the outputs"
        if shape.rows * sum(shape.widths) < FEW_OUTPUTS:
            return "few outputs are formed sooner"
        return None

    def score(self, chunk: Chunk) -> tuple[Named, Named]:
        (((x, weight),), bias), target = chunk.operands(), chunk.rows["target"].long()
        assert weight is not None
        names = {*self.names, "logps"}
        if chunk.keeps:
            chunk.held["exponentials"] = e = room(len(x), len(weight), x, x.dtype)
            found, factor = scaled_exponentials_(x, weight, bias, target, e, names=names, **self.transform)
            chunk.held["factor"] = factor
        else:
            found = linear_statistics(x, weight, bias, target, names=names, **self.transform)
        return {name: found[name] for name in self.names}, {name: found[name] for name in ("logps", "lse")}

    def pull(self, chunk: Chunk, kept: Named, parts: Named, upstream: Named, into: Into) -> None:
        if not into.wants(chunk.names[0]) or "logps" not in upstream:
            return
        (((x, weight),), bias), target = chunk.operands(), chunk.rows["target"].long()
        assert weight is not None
        if chunk.held:
            e, factor = chunk.held["exponentials"], chunk.held["factor"]
        else:
            e = room(len(x), len(weight), x, x.dtype)
            factor = scaled_exponentials_again_(x, weight, bias, target, kept, e, **self.transform)
        factor = (upstream["logps"].float() * factor)[:, None]
        if into.wants_input():
            product = torch.empty(x.shape, device=x.device, dtype=torch.float32)
            into.inputs(mm(e, weight, out=product).mul_(factor))
        if into.wants_weight():
            into.product(e, torch.mul(x, factor, out=torch.empty_like(x)))  # rounded once


@dataclass(frozen=True)
class TokenKernel(_TokenStep):
    """The token statistics by a hand-written kernel pair; the gradient reuses them and takes the outputs' place. Where
    nothing wants one, the product and its statistics are one kernel, and no outputs are formed. (A reference beside a
    policy that learns has its outputs formed like those, so that equal models have equal log-probabilities.)"""

    def needs(self, shape: Shape) -> Needs:
        whole = not shape.learns and shape.terms == 1 and serves(shape.operands, shape.device)
        return Needs(refusal=kernel_refusal(shape), overwrites=True, forms_outputs=not whole)

    def score(self, chunk: Chunk) -> tuple[Named, Named]:
        if not chunk.forms_outputs:
            (((x, weight),), bias), target = chunk.operands(), chunk.rows["target"].long()
            assert weight is not None
            found = linear_statistics(x, weight, bias, target, names=self.names, **self.transform)
            return {name: found[name] for name in self.names}, {}
        found = token_statistics(*_tokens(chunk), names=self.names, **self.transform)
        return {name: found[name] for name in self.names}, found

    def pull(self, chunk: Chunk, kept: Named, parts: Named, upstream: Named, into: Into) -> None:
        if not into.wants(chunk.names[0]):
            return
        x, target = _tokens(chunk)
        dtype = accumulator_dtype(x.dtype)
        wanted = {
            name: upstream[name].to(dtype) for name in DIFFERENTIABLE if name in self.gradients_of and name in upstream
        }
        place = into.place()
        token_gradient_(x, target, kept, wanted, **self.transform, out=place)
        into.outputs(place)


def kernel_refusal(shape: Shape) -> str | None:
    """Why kernels do not serve here, those that take outputs and nothing else."""
    if not shape.compiled:
        return "steps run uncompiled"
    if torch.float64 in (shape.outputs, shape.operands):
        return "float64 takes the plain functions"
    if shape.columns:
        return "column arguments take the plain functions"
    if not available(shape.device):
        return f"there is no Triton on {shape.device}"
    return None


def _tokens(chunk: Chunk) -> tuple[Tensor, Tensor]:
    x = chunk.outputs()
    return (x if x.stride(1) == 1 else x.contiguous()), chunk.rows["target"].long()
