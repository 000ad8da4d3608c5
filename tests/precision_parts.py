"""What the precision contract of docs/design.md is measured with: cases, inputs, errors and what they may be.

A case has inputs in float64, a call of ours and the same loss as plain formulas over whole matrices, or as another
library has it. Its tensors are rounded to half precision; the truth is the formula in float64 of the same rounded
tensors, so that nothing but the computation is measured.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Result = Tensor | tuple[Tensor, Tensors]
"""The loss, or that and further values by name."""

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

# What an error may be, relative to the truth:
#
#               bfloat16  float16   float32  of what, and why
# loss          1e-4      1e-4      1e-4     its size. From the products on everything is float32, as of float32 inputs
# values        1e-4      1e-4      1e-4     the largest of them: scores, log-probabilities, rewards
# margins       1e-3      1e-3      1e-3     their mean size: each is a difference of sums of log-probabilities
# gradients     3e-3      3.75e-4   5e-5     the Frobenius norm. Half precision rounds twice: the gradient of the
#                                            outputs, which is an operand of two products, and the result; each by 2^-9
#                                            (2^-12) at most, which comes to 0.16 to 0.2% (0.02 to 0.025%) of many
#                                            numbers. Float32 ones: under autocast, where products read float32
# vectors       3.9e-3    4.9e-4    5e-5     gradients of a bias or a row argument: few numbers, whose roundings are not
#                                            averaged. Twice 2^-9 (2^-12)
# parameters    1e-3      1e-3      1e-3     gradients of float32 numbers that learn (scale, bias): no operand of a
#                                            product is on the way
#
# ``Case.slack`` is a factor on the gradients' tolerance, with its reason: where gradients of nearly equal rows cancel,
# what is left is smaller than what was rounded. The factors are those of the contract, computed in float64.
LOSS = VALUES = 1e-4
MARGINS = PARAMETERS = 1e-3
GRADIENTS = {BF16: 3e-3, FP16: 3e-3 / 8, FP32: 5e-5, FP64: 1e-6}
VECTORS = {BF16: 2.0**-8, FP16: 2.0**-11, FP32: 5e-5, FP64: 1e-6}
LARGEST = 4
"""The exponent of two to which gradients are scaled, as by a GradScaler: none is denormal in float16."""


@dataclass(frozen=True)
class Case:
    """Tensors in float64 are rounded to the dtype that is tested; float32 ones (parameters of a loss) and integers stay
    as they are."""

    make: Callable[[], Tensors]
    ours: Callable[..., Result]  # (tensors, **options of chunks)
    truth: Callable[[Tensors], Result]
    learns: tuple[str, ...]
    autocast: str | None = None
    """Float32 tensors under autocast, whose products read "half" precision, or "float32"."""
    slack: Mapping[str, float] = field(default_factory=dict)
    """By tensor, a factor on what its gradient may be off by in half precision."""
    why: str = ""
    """Of the slack."""


class Error(NamedTuple):
    what: str
    error: float
    tolerance: float

    def __str__(self) -> str:
        mark = "  " if self.error <= self.tolerance else "> "
        return f"{mark}{self.what:28} {self.error:9.2e}  tolerance {self.tolerance:.2e}"


class Truth(NamedTuple):
    values: Tensors  # "loss" and others
    grads: Tensors
    factor: float
    """What the loss is multiplied with for its gradients, as a GradScaler does: so that none is denormal in float16."""


def errors_of(case: Case, name: str, dtype: torch.dtype, device: str = "cpu", **options: Any) -> list[Error]:
    """Every error of a case, beside what it may be."""
    true = truth_of(case, name, dtype)
    values, grads = ours_of(case, dtype, true.factor, device, **options)
    found = []
    for key, expected in true.values.items():
        got = values[key].double().cpu()
        error, size = (got - expected).abs().max(), expected.abs().max()
        tolerance = VALUES
        if key == "loss":
            tolerance = LOSS
        elif "margins" in key:
            size, tolerance = expected.abs().mean(), MARGINS
        found.append(Error(key, _ratio(error, size), tolerance if dtype != FP64 else GRADIENTS[FP64]))
    half = dtype in (BF16, FP16) and case.autocast != "float32"
    for key, expected in true.grads.items():
        got = grads[key]
        assert expected.norm() > 0, f"a case whose gradient of {key} is zero shows nothing"
        error = _ratio((got.double().cpu() - expected).norm(), expected.norm())
        tolerance = (VECTORS if got.dim() == 1 else GRADIENTS)[dtype if half or dtype == FP64 else FP32]
        if got.dim() == 0 and dtype != FP64:
            tolerance = PARAMETERS
        elif half:
            tolerance *= case.slack.get(key, 1.0)
        found.append(Error(f"gradient of {key}", error, tolerance))
    return found


def _ratio(error: Tensor, size: Tensor) -> float:
    ratio = float(error / size) if size > 0 else float(error)
    return math.inf if math.isnan(ratio) else ratio


def ours_of(
    case: Case, dtype: torch.dtype, factor: float = 1.0, device: str = "cpu", **options: Any
) -> tuple[Tensors, Tensors]:
    """-> values and gradients of ours, of one call."""
    x = inputs_of(case, dtype, device)
    with torch.autocast(device, dtype) if case.autocast else nullcontext():
        values = _named(case.ours(x, **options))
    (values["loss"] * factor).backward()
    missing = [key for key in case.learns if x[key].grad is None]
    assert not missing, f"no gradient of {missing}"
    for key in case.learns:
        assert x[key].grad.dtype == x[key].dtype
    return {key: value.detach() for key, value in values.items()}, {key: x[key].grad for key in case.learns}


def inputs_of(case: Case, dtype: torch.dtype, device: str = "cpu") -> Tensors:
    """Tensors as the call gets them."""
    given = FP32 if case.autocast else dtype
    x = {key: t.to(device, given if t.dtype == FP64 else t.dtype) for key, t in case.make().items()}
    return {key: t.detach().requires_grad_() if key in case.learns else t for key, t in x.items()}


_truths: dict[tuple[str, torch.dtype], Truth] = {}


def truth_of(case: Case, name: str, dtype: torch.dtype) -> Truth:
    if (name, dtype) not in _truths:
        _truths[name, dtype] = _truth(case, dtype)
    return _truths[name, dtype]


def _truth(case: Case, dtype: torch.dtype) -> Truth:
    x = {key: t.detach() for key, t in inputs_of(case, dtype).items()}
    if case.autocast == "half":  # what the products read
        x = {key: t.to(dtype) if case.make()[key].dtype == FP64 else t for key, t in x.items()}
    x = {key: t.double() if t.is_floating_point() else t for key, t in x.items()}
    x = {key: t.requires_grad_() if key in case.learns else t for key, t in x.items()}
    values = _named(case.truth(x))
    grads = torch.autograd.grad(values["loss"], [x[key] for key in case.learns])
    halves = [g for key, g in zip(case.learns, grads, strict=True) if case.make()[key].dtype == FP64]
    factor = 2.0 ** (LARGEST - math.ceil(math.log2(max(float(g.abs().max()) for g in halves))))
    named = {key: g * factor for key, g in zip(case.learns, grads, strict=True)}
    return Truth({key: value.detach() for key, value in values.items()}, named, factor)


def _named(result: Result) -> Tensors:
    loss, more = result if isinstance(result, tuple) else (result, {})
    return {"loss": loss, **more}


# --- inputs ----------------------------------------------------------------------------------------------------------


def draw(seed: int = 0) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, dtype=FP64, generator=generator)


def near_duplicates(
    n: int = 64, d: int = 64, columns: str = "ab", seed: int = 0, apart: float = 0.3, within: float = 0.2
) -> Tensors:
    """Embeddings whose cosines are .9 to 1, as models give them: not normalised, of norms 10 to 20. Rows of the later
    columns belong to those of the first."""
    randn = draw(seed)
    first = randn(1, d) + apart * randn(n, d)
    return {name: 2 * (first if i == 0 else first + within * randn(n, d)) for i, name in enumerate(columns)}


def spread(n: int = 64, d: int = 64, columns: str = "ab", seed: int = 0, size: float = 1.0) -> Tensors:
    """Embeddings in all directions; rows of the later columns belong to those of the first."""
    randn = draw(seed)
    first = randn(n, d)
    return {name: size * (first if i == 0 else first + randn(n, d)) for i, name in enumerate(columns)}


@functools.cache
def fixed_weights(*shape: int) -> Tensor:
    return draw(99)(*shape)


def weighted_sum(values: Mapping[str, Tensor]) -> Tensor:
    """One number of many, whose gradient is unlike in all of them."""
    total: Any = 0.0
    for value in values.values():
        total = total + (value * fixed_weights(*value.shape).to(value)).sum()
    return total
