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
