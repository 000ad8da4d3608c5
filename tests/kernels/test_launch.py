"""Launches: a compiled kernel serves what it was compiled for, and nothing else."""

import os

import pytest
import torch

from chunked_embed.kernels._launch import Launched
from chunked_embed.kernels.scale import scale_

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Kernel:
    """Stands in for a function of Triton: says for what it is compiled, and with what it is launched."""

    arg_names = ("x", "n", "factor", "WIDE", "BLOCK")

    def __init__(self):
        self.compilations = []
        self.launches = []

    def __getitem__(self, grid):
        def compile_and_launch(*given, **constants):
            self.compilations.append(given)
            return self

        def launch(*given):
            self.launches.append((grid, given))

        return compile_and_launch if len(grid) == 1 else launch


@pytest.mark.skipif(INTERPRETED, reason="the interpreter is launched as it is")
def test_what_differs_is_compiled_anew():
    kernel = Kernel()
    launched = Launched(kernel)
    x, constants = torch.zeros(64), {"BLOCK": 32, "WIDE": True, "num_warps": 4}
    calls = [
        (x, 32, 0.5, constants),
        (x[1:], 32, 0.5, constants),  # at no multiple of 16 bytes
        (x.double(), 32, 0.5, constants),
        (x, 33, 0.5, constants),  # no multiple of 16
        (x, 1, 0.5, constants),
        (x, 1 << 40, 0.5, constants),
        (x, 32, x, constants),
        (x, 32, 0.5, constants | {"BLOCK": 64}),
        (x, 32, 0.5, constants | {"num_warps": 8}),
    ]
    for again in range(3):
        for *given, named in calls:
            launched[(7,)](*given, **named)
            if again:
                grid, found = kernel.launches[-1]
                assert grid[:3] == (7, 1, 1) and found[3:] == (True, named["BLOCK"])
                assert found[0] is given[0] and found[1:3] == tuple(given[1:])
    assert len(kernel.compilations) == len(calls)
    assert len(kernel.launches) == 2 * len(calls)
    # Other numbers of the kind are served by what is there.
    launched[(2,)](x[4:], 48, 0.7, **constants)
    assert len(kernel.compilations) == len(calls) and kernel.launches[-1][1][1:3] == (48, 0.7)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="no GPU")
def test_alignments_on_a_gpu():
    x = torch.randn(5000, device="cuda")
    factor = torch.tensor(1 / 3, device="cuda")
    for _ in range(2):
        for offset in (0, 1, 4):
            for size in (1, 16, 33, 4096, 4097):
                out = torch.full((size + 3,), torch.nan, device="cuda")
                for at in (0, 2):
                    scale_(x[offset : offset + size], factor, out[at : at + size])
                    torch.testing.assert_close(out[at : at + size], x[offset : offset + size] / 3)
