"""Hand-written kernels for one chunk of outputs, each beside its plain torch twin. Importing this needs no Triton."""

import os
import shlex
import shutil
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

__all__ = ["ELSEWHERE", "available", "c_compiler", "compiler", "in_own_rows"]

ELSEWHERE: ContextVar[torch.device | None] = ContextVar("ELSEWHERE", default=None)
"""The device that calls are laid out for in place of their tensors' own. None of them runs. It need not be here, and is
taken to have Triton then."""


def compiler(variable: str, *names: str) -> str | None:
    """The compiler that this variable names, or the first of these that is there."""
    named = shlex.split(os.environ.get(variable, ""))[:1]
    return next(filter(None, map(shutil.which, named or names)), None)


def c_compiler() -> str | None:
    """With which Triton builds its launchers."""
    return compiler("CC", "gcc", "clang")


@cache
def _triton_works() -> bool:
    return find_spec("triton") is not None and c_compiler() is not None


def _is_elsewhere() -> bool:
    return ELSEWHERE.get() is not None and not torch.cuda.is_available()


def available(device: torch.device | str) -> bool:
    """Whether the Triton kernels run on `device`: CUDA or ROCm, or anywhere under `TRITON_INTERPRET=1` (for tests)."""
    if torch.device(device).type == "cuda" and (_triton_works() or _is_elsewhere()):
        return True
    return os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None


def in_own_rows(x: Tensor, out: Tensor) -> bool:  # (R, V) both
    """Whether `out` is the first half of x's own rows: a narrower gradient over wide outputs.

    A kernel then goes through a row in order, and writes no element before all of its step are read.
    """
    if out.dtype == x.dtype or out.data_ptr() != x.data_ptr() or not x.numel():
        return False
    bytes_between = [t.stride(0) * t.element_size() for t in (x, out)]
    if out.element_size() > x.element_size() or (len(x) > 1 and bytes_between[0] != bytes_between[1]):
        raise ValueError(
            f"expected out as the first half of x's rows, got {out.dtype} of stride {out.stride(0)} "
            f"over {x.dtype} of stride {x.stride(0)}"
        )
    return True
