"""The scaling kernel against torch in float64: on a GPU, else through Triton's interpreter."""

import os

import pytest
import torch

from chunked_embed.kernels.scale import scale_, scale_reference_

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("no GPU, and not under TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [0, 1, 8191, 20_000])
def test_scales_and_rounds_once(source, target, size):
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(size, generator=generator).to(DEVICE, source)
    buffer = torch.full((size + 3,), torch.nan, dtype=target, device=DEVICE)
    factor = torch.tensor(1 / 3, device=DEVICE)
    expected = (x.double() * factor.double()).to(target)
    for function in (scale_, scale_reference_):
        function(x, factor, buffer[:size])
        torch.testing.assert_close(buffer[:size], expected, rtol=torch.finfo(target).eps, atol=1e-7)
        assert buffer[size:].isnan().all()
