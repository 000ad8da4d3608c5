"""What a row of logits says about its target token, and the gradient of that, in one pass over the row each.

The logits of a row are the outputs x behind a scale, an optional soft cap and a temperature:

    z = y / temperature,   y = softcap * tanh(logit_scale * x / softcap)   (y = logit_scale * x without a softcap)
    p = softmax(z)

    logps             z[target] - lse
    lse               log sum exp z
    entropy           lse - sum p z
    log_sum_sq_probs  log sum p^2
    mean_logits       mean z
    is_top1           1 where z[target] >= max z, else 0

All of it is computed in float32 (float64 for float64 outputs). `token_statistics` and `token_gradient_` run as Triton
kernels where there is Triton and as their plain torch twins (`..._reference`) elsewhere, with the same numbers.
`token_scores` is the same as one differentiable function, for autograd and torch.compile.
"""

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from chunked_embed.kernels import available, in_own_rows

STATISTICS = ("logps", "lse", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
DIFFERENTIABLE = ("logps", "lse", "entropy")

# exp(LOWEST) is 0 in float64 too, and 0 * LOWEST is 0 where 0 * -inf would be NaN.
LOWEST = -800.0


def token_statistics(
    x: Tensor,  # (R, V), contiguous columns
    target: Tensor,  # (R,) int64
    *,
    names: Iterable[str],
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> dict[str, Tensor]:
    """The statistics asked for by name, each (R,) and float32, and always `lse`, which the gradient needs."""
    wanted = wanted_statistics(names)
    _check(x, target)
    if _use_triton(x):
        from chunked_embed.kernels import _triton_token_scores as kernels

        return kernels.statistics(x, target, wanted, *slopes(logit_scale, softcap, temperature))
    return token_statistics_reference(
        x, target, names=wanted, logit_scale=logit_scale, softcap=softcap, temperature=temperature
    )


def token_gradient_(
    x: Tensor,  # (R, V), overwritten by its gradient unless `out` is given
    target: Tensor,  # (R,) int64
    stats: Mapping[str, Tensor],  # lse, and entropy where that has an upstream gradient
    upstream: Mapping[str, Tensor],  # dL/d(logps, lse, entropy), any of them, (R,)
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    out: Tensor | None = None,  # (R, V), of another dtype perhaps, and then perhaps the first half of x's own rows
) -> Tensor:
    """dL/dx, in place over `x` (or in `out`):

    dL/dz_j = p_j * (g_lse - g_logps - g_entropy * (log p_j + entropy)) + g_logps * [j == target]
    dL/dx_j = dL/dz_j * logit_scale / temperature * (1 - tanh^2)
    """
    _check(x, target)
    _check_upstream(stats, upstream)
    out = x if out is None else out
    if out.shape != x.shape or out.device != x.device:
        raise ValueError(f"expected out like x, {tuple(x.shape)} on {x.device}, got {tuple(out.shape)} on {out.device}")
    in_own_rows(x, out)  # refuses one at the address of x that is not
    if _use_triton(x):
        from chunked_embed.kernels import _triton_token_scores as kernels

        return kernels.gradient_(x, target, stats, upstream, *slopes(logit_scale, softcap, temperature), out)
    return out.copy_(
        token_gradient_reference(
            x, target, stats, upstream, logit_scale=logit_scale, softcap=softcap, temperature=temperature
        )
    )


def token_statistics_reference(
    x: Tensor,  # (R, V)
    target: Tensor,  # (R,)
    *,
    names: Iterable[str],
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> dict[str, Tensor]:
    """`token_statistics` in plain torch."""
    wanted = wanted_statistics(names)
    with torch.no_grad():
        return token_scores(_wide(x), target, wanted, logit_scale=logit_scale, softcap=softcap, temperature=temperature)


def token_gradient_reference(
    x: Tensor,  # (R, V)
    target: Tensor,  # (R,)
    stats: Mapping[str, Tensor],
    upstream: Mapping[str, Tensor],
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:  # (R, V), float32 (float64 for float64)
    """`token_gradient_` in plain torch, out of place and not yet rounded to the dtype of `x`."""
    _check_upstream(stats, upstream)
    x = _wide(x)
    z = transform_logits(x, logit_scale=logit_scale, softcap=softcap, temperature=temperature)
    log_p = z - stats["lse"].to(z.dtype)[:, None]
    g_logps, g_lse, g_entropy = (
        upstream[name].to(z.dtype)[:, None] if name in upstream else None for name in DIFFERENTIABLE
    )

    factor = torch.zeros_like(stats["lse"], dtype=z.dtype)[:, None]
    if g_lse is not None:
        factor = factor + g_lse
    if g_logps is not None:
        factor = factor - g_logps
    if g_entropy is not None:
        factor = factor - g_entropy * (log_p.clamp_min(LOWEST) + stats["entropy"].to(z.dtype)[:, None])
    grad = log_p.exp() * factor
    if g_logps is not None:
        columns = torch.arange(x.shape[1], device=x.device)
        grad = grad + torch.where(columns == target[:, None], g_logps, 0.0)

    grad = grad * (logit_scale / temperature)
    return grad if softcap is None else grad * (1 - torch.tanh(x * (logit_scale / softcap)).square())


def token_scores(
    outputs: Tensor,  # (R, V), float32 or float64
    target: Tensor,  # (R,) int64
    names: Iterable[str] = ("logps",),
    *,
    logit_scale: float | Tensor = 1.0,
    softcap: float | Tensor | None = None,
    temperature: float | Tensor = 1.0,
) -> dict[str, Tensor]:
    """The statistics as a pure function of torch operations; gradients flow through logps, lse and entropy.

    The log-probability is a cross-entropy because that compiles to one fused pass; `log_softmax(...).gather(...)` takes
    2.5 times as long and three times the memory.
    """
    z = transform_logits(outputs, logit_scale=logit_scale, softcap=softcap, temperature=temperature)
    scores = {}
    for name in names:
        scores[name] = _SCORES[name](z if name in DIFFERENTIABLE else z.detach(), target)
    return scores


def transform_logits(
    x: Tensor,  # (..., V)
    *,
    logit_scale: float | Tensor = 1.0,
    softcap: float | Tensor | None = None,
    temperature: float | Tensor = 1.0,
) -> Tensor:
    """z = t(x): scale, soft cap, temperature.

    Example:
        >>> import torch
        >>> from chunked_embed import transform_logits
        >>> transform_logits(torch.tensor([-100.0, 0.0, 100.0]), logit_scale=0.5, softcap=30.0, temperature=2.0)
        tensor([-13.9666,   0.0000,  13.9666])
    """
    if softcap is None:
        scale = logit_scale / temperature
        return x if type(scale) is float and scale == 1.0 else x * scale  # a tensor may be any number
    return torch.tanh(x * (logit_scale / softcap)) * (softcap / temperature)


def _entropy(z: Tensor, target: Tensor) -> Tensor:
    log_p = z.log_softmax(-1)
    return -(log_p.exp() * log_p.clamp_min(LOWEST)).sum(-1)  # the clamp: 0 * -inf is 0 here


def _is_top1(z: Tensor, target: Tensor) -> Tensor:
    return (z.gather(-1, target[:, None]).squeeze(-1) >= z.amax(-1)).to(z.dtype)


_SCORES = {
    "logps": lambda z, target: -F.cross_entropy(z, target, reduction="none"),
    "lse": lambda z, target: z.logsumexp(-1),
    "entropy": _entropy,
    "log_sum_sq_probs": lambda z, target: (2 * z.log_softmax(-1)).logsumexp(-1),
    "mean_logits": lambda z, target: z.mean(-1),
    "is_top1": _is_top1,
}


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _use_triton(x: Tensor) -> bool:
    return x.dtype != torch.float64 and available(x.device)


def slopes(logit_scale: float, softcap: float | None, temperature: float) -> tuple[float, float | None]:
    """(inner, outer) with z = outer * tanh(inner * x), or z = inner * x where outer is None."""
    if softcap is None:
        return logit_scale / temperature, None
    return logit_scale / softcap, softcap / temperature


def wanted_statistics(names: Iterable[str]) -> tuple[str, ...]:
    names = {"lse", *names}
    if unknown := names - set(STATISTICS):
        raise ValueError(f"expected statistics out of {STATISTICS}, got {sorted(unknown)}")
    return tuple(name for name in STATISTICS if name in names)


def _check(x: Tensor, target: Tensor) -> None:
    if x.ndim != 2 or x.shape[1] == 0 or x.stride(1) != 1 or not x.is_floating_point():
        raise ValueError(
            "expected x as (R, V) floats with contiguous columns, "
            f"got {tuple(x.shape)} with strides {x.stride()}, {x.dtype}"
        )
    if target.shape != x.shape[:1] or target.dtype != torch.int64 or target.device != x.device:
        raise ValueError(
            f"expected target as ({x.shape[0]},) int64 on {x.device}, "
            f"got {tuple(target.shape)} {target.dtype} on {target.device}"
        )


def _check_upstream(stats: Mapping[str, Tensor], upstream: Mapping[str, Tensor]) -> None:
    if unknown := set(upstream) - set(DIFFERENTIABLE):
        raise ValueError(f"expected upstream gradients of {DIFFERENTIABLE}, got {sorted(unknown)}")
    if missing := ({"lse"} | ({"entropy"} & set(upstream))) - set(stats):
        raise ValueError(f"the gradient needs the statistics {sorted(missing)}, got {sorted(stats)}")
