"""What logits say about their target tokens, without the logits: `token_statistics` of a product that is not written.

For calls without gradient. Half-precision operands, float32 logits: nothing is rounded on the way. On a GPU a tile of
logits is reduced where it is formed, and what is left is a few numbers a row and tile.
"""

from collections.abc import Iterable

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
        logits = x.float() @ weight.float().t() + (0.0 if bias is None else bias.float())
        return token_statistics_reference(
            logits, target, names=names, logit_scale=logit_scale, softcap=softcap, temperature=temperature
        )
    from chunked_embed.kernels import _triton_linear_scores as kernels

    numbers = slopes(logit_scale, softcap, temperature)
    return kernels.linear_statistics(x, weight, bias, target, wanted_statistics(names), *numbers)
