"""Unit vectors, once for the whole batch: what cosine similarity matrices are products of."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def unit(x: Tensor) -> Tensor:  # (N, D)
    """``x / max(|x|, 1e-12)``, in the dtype of ``x``, rounded once."""
    return F.normalize(x.float(), dim=1).to(x.dtype) if x.dtype.itemsize == 2 else F.normalize(x, dim=1)
