"""Launching Triton kernels with less of the host's time than Triton takes to find the one that serves its arguments:
here it is found by what Triton compiles a kernel for, and nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor


class Launched:
    """A ``triton.jit`` function, called as it is: ``kernel[grid](*arguments, **constants)``. The first argument is a
    tensor; parameters that are no constants come by position, and stand before the constants."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        self.compiled: dict[Hashable, tuple[Any, tuple]] = {}  # and the constants in their order
        self.kinds: tuple[Callable[[Any], Any], ...] = ()  # of the parameters
        if not self.interpreted:
            self.kinds = tuple([_any_kind if p.do_not_specialize else _kind for p in kernel.params])

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.kernel[grid] if self.interpreted else partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *given: Any, **constants: Any) -> None:
        key = (given[0].device, *[kind(x) for kind, x in zip(self.kinds, given)], *constants, *constants.values())
        found = self.compiled.get(key)
        if found is None:
            compiled = self.kernel[grid](*given, **constants)
            names = self.kernel.arg_names[len(given) :]
            self.compiled[key] = compiled, tuple(constants[name] for name in names)
            return
        compiled, behind = found
        compiled[(*grid, 1, 1)](*given, *behind)


def _kind(given: Any) -> Any:
    """What Triton looks at: the dtype and the alignment of a tensor, whether an integer is one or a multiple of 16,
    which tiles of which dtype a descriptor is of."""
    if isinstance(given, Tensor):
        return given.dtype, given.data_ptr() % 16 == 0
    if type(given) is int:
        return given if given == 1 else (given % 16 == 0, given.bit_length() > 31)
    if (tile := getattr(given, "block_shape", None)) is not None:
        return given.base.dtype, *tile
    return type(given)


def _any_kind(given: Any) -> Any:
    """The same of a parameter that Triton does not specialise."""
    if isinstance(given, Tensor):
        return given.dtype
    return given.bit_length() > 31 if type(given) is int else _kind(given)


def on_device(x: Tensor) -> AbstractContextManager:
    """Kernels run on the current device: that of ``x`` it is here."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@cache
def copies_tiles(device: torch.device) -> bool:
    """A Hopper GPU has an engine that reads and writes whole tiles."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9


def before_hopper(device: torch.device) -> bool:
    """A GPU without that engine; none is here where calls are interpreted, or laid out for elsewhere."""
    return device.type == "cuda" and torch.cuda.is_available() and not copies_tiles(device)


def can_be_described(t: Tensor) -> bool:
    """To that engine."""
    if not copies_tiles(t.device):
        return False
    return t.stride(1) == 1 and (t.stride(0) * t.element_size()) % 16 == 0 and t.data_ptr() % 16 == 0


def cdiv(n: int, size: int) -> int:
    return -(-n // size)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def room(rows: int, columns: int, like: Tensor, dtype: torch.dtype) -> Tensor:  # (rows, columns)
    """Rows begin 16 numbers apart, or a multiple, as products in half precision like it and kernels are told; and end
    with zeros up to there."""
    whole = torch.empty(rows, cdiv(columns, 16) * 16, device=like.device, dtype=dtype)
    whole[:, columns:] = 0
    return whole[:, :columns]


def lines(count: int, length: int, like: Tensor) -> Tensor:  # (count, length), float32
    """Each begins at a multiple of 16 bytes, whatever the length is: one kernel serves them all."""
    return torch.empty(count, cdiv(length, 4) * 4, device=like.device, dtype=torch.float32)[:, :length]
