"""What logits say about their target tokens, without the logits: `token_statistics` of a product that is not written,
and the gradient of log-probabilities as scaled exponentials.

Half-precision operands, float32 logits: nothing is rounded on the way. On a GPU a tile of logits is reduced where it is
formed, and what is left is a few numbers a row and tile; and where a gradient is wanted, in half precision,

    E_j = exp(z_j - a) * slope_j,   E_target = -(the sum of the others' exp(z_j - a)) * slope_target

relative to an anchor a of the row, with slope_j that of a soft cap. The gradient of the row's log-probability with
respect to its outputs is a number times E: a product with that gradient is one with E, whose rows (or those of the
other operand) are scaled.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from chunked_embed.kernels import available
from chunked_embed.kernels.token_scores import slopes, token_statistics_reference, wanted_statistics


def serves(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether there is a kernel for operands of this dtype."""
    return dtype in (torch.bfloat16, torch.float16) and available(device)


def linear_statistics(
    x: Tensor,  # (R, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (R,) int64
    *,
    names: Iterable[str],
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> dict[str, Tensor]:
    """`token_statistics` of ``x @ weight.T + bias``."""
    if not serves(x.dtype, x.device):
        logits = _logits(x, weight, bias)
        return token_statistics_reference(
            logits, target, names=names, logit_scale=logit_scale, softcap=softcap, temperature=temperature
        )
    from chunked_embed.kernels import _triton_linear_scores as kernels

    numbers = slopes(logit_scale, softcap, temperature)
    return kernels.linear_statistics(x, weight, bias, target, wanted_statistics(names), *numbers)


def scaled_exponentials_(
    x: Tensor,  # (R, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (R,) int64
    out: Tensor,  # (R, V), contiguous columns: takes E
    *,
    names: Iterable[str],
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> tuple[dict[str, Tensor], Tensor]:
    """-> `linear_statistics`, bit by bit, and ``(R,)``, the factor of each row: times E the gradient of `logps` with
    respect to ``x @ weight.T + bias``."""
    inner, outer = slopes(logit_scale, softcap, temperature)
    if not serves(x.dtype, x.device):
        logits, wanted = _logits(x, weight, bias), {"logps", *names}
        found = token_statistics_reference(
            logits, target, names=wanted, logit_scale=logit_scale, softcap=softcap, temperature=temperature
        )
        return found, _exponentials_of(logits, target, found, inner, outer, out)
    from chunked_embed.kernels import _triton_linear_scores as kernels

    factor = torch.empty(len(x), device=x.device, dtype=torch.float32)
    found = kernels.linear_statistics(
        x, weight, bias, target, wanted_statistics(names), inner, outer, out=out, factor=factor
    )
    return found, factor if outer is not None else factor.mul_(inner)


def scaled_exponentials_again_(
    x: Tensor,  # (R, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (R,) int64
    stats: Mapping[str, Tensor],  # logps and lse, (R,)
    out: Tensor,  # (R, V), contiguous columns: takes E
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:  # (R,)
    """The same of rows whose statistics are known: E relative to the log-sum-exp -> the factors."""
    inner, outer = slopes(logit_scale, softcap, temperature)
    if not serves(x.dtype, x.device):
        return _exponentials_of(_logits(x, weight, bias), target, stats, inner, outer, out)
    from chunked_embed.kernels import _triton_linear_scores as kernels

    lse, at_target = stats["lse"], torch.expm1(stats["logps"])
    kernels.linear_exponentials_(x, weight, bias, target, lse, at_target, inner, outer, out)
    return torch.full_like(lse, -inner if outer is None else -1.0)


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # (R, V) float32
    return x.float() @ weight.float().t() + (0.0 if bias is None else bias.float())


def _exponentials_of(
    logits: Tensor,  # (R, V)
    target: Tensor,
    stats: Mapping[str, Tensor],
    inner: float,
    outer: float | None,
    out: Tensor,  # (R, V)
) -> Tensor:  # (R,)
    u = logits * inner
    z = u if outer is None else u.tanh() * outer
    e = torch.exp(z - stats["lse"][:, None]).scatter_(1, target[:, None], torch.expm1(stats["logps"])[:, None])
    out.copy_(e if outer is None else e * (inner * outer) * (1 - u.tanh().square()))
    return torch.full_like(stats["lse"], -inner if outer is None else -1.0)
