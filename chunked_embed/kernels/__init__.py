"""Hand-written kernels for one chunk of outputs, each beside its plain torch twin. Importing this needs no Triton."""

import os
import shutil
from functools import cache
from importlib.util import find_spec

import torch

__all__ = ["available"]


@cache
def _triton_works() -> bool:
    """Triton is importable, and the C compiler with which it builds its launchers is there."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return find_spec("triton") is not None and compiler is not None


def available(device: torch.device | str) -> bool:
    """Whether the Triton kernels run on `device`: CUDA or ROCm, or anywhere under `TRITON_INTERPRET=1` (for tests)."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return find_spec("triton") is not None
    return torch.device(device).type == "cuda" and _triton_works()
