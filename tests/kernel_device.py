"""Where tests of Triton kernels run: on a GPU, else, under TRITON_INTERPRET=1, in the interpreter. Where neither is,
whoever imports this is skipped."""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
MARKS = [] if INTERPRETED else [pytest.mark.gpu]
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("no GPU, and not under TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")


def exact(x: torch.Tensor) -> torch.Tensor:
    """In the interpreter, whose products are NumPy's: numbers whose sums of products are exact, so that equal rows have
    equal outputs wherever they stand in a tile, as on a GPU."""
    return x.mul(32).round_().div_(32) if INTERPRETED else x
