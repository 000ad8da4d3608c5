"""The scaling kernels against torch in float64: on a GPU, else through Triton's interpreter."""

import pytest
import torch
from kernel_device import DEVICE, MARKS

from chunked_embed.kernels.scale import combine_, combine_reference_, scale_, scale_both_, scale_reference_

pytestmark = MARKS


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


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)])
@pytest.mark.parametrize("sizes", [(1, 20_000), (8192, 5), (0, 3), (9000, 0), (0, 0)])
def test_scales_two(sizes, dtypes):
    given = [torch.randn(size, generator=torch.Generator().manual_seed(size)).to(DEVICE) for size in sizes]
    out = [torch.full((len(x) + 3,), torch.nan, dtype=dtype, device=DEVICE) for x, dtype in zip(given, dtypes)]
    factor = torch.tensor(1 / 3, device=DEVICE, dtype=torch.float64)
    scale_both_(*given, factor, *(place[: len(x)] for place, x in zip(out, given)))
    for place, x, dtype in zip(out, given, dtypes):
        expected = (x.double() * factor).to(dtype)
        torch.testing.assert_close(place[: len(x)], expected, rtol=torch.finfo(dtype).eps, atol=1e-7)
        assert place[len(x) :].isnan().all()


@pytest.mark.parametrize("function", [combine_, combine_reference_])
@pytest.mark.parametrize("size", [0, 1, 8191, 20_000])
@pytest.mark.parametrize("factor", [None, -1 / 3])
@pytest.mark.parametrize("of_x", [None, 2.7])
def test_combines(function, size, factor, of_x):
    generator = torch.Generator().manual_seed(size)
    total, x = (torch.randn(size + 3, generator=generator).to(DEVICE) for _ in range(2))
    total[size:] = torch.nan
    expected = total[:size].double() * (1 if factor is None else factor)
    expected += 0 if of_x is None else x[:size].double() * of_x
    a, b = (None if f is None else torch.tensor(f, dtype=torch.float64, device=DEVICE) for f in (factor, of_x))
    function(total[:size], a, None if b is None else x[:size], b)
    torch.testing.assert_close(total[:size].double(), expected, rtol=1e-6, atol=1e-6)
    assert total[size:].isnan().all()


@pytest.mark.parametrize("function", [combine_, combine_reference_])
def test_a_factor_of_zero_makes_nothing_of_nan(function):
    zero, one = torch.zeros((), device=DEVICE), torch.ones((), device=DEVICE)
    bad, good = torch.tensor([torch.nan, torch.nan, 1.0], device=DEVICE), torch.arange(3.0, device=DEVICE)
    torch.testing.assert_close(function(bad.clone(), zero, good.clone(), one), good)
    torch.testing.assert_close(function(good.clone(), None, bad.clone(), zero), good)
    assert function(good.clone(), one / 0 * 0, None, None).isnan().all()
