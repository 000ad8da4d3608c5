"""Sums over segments against torch in float64: the plain twin anywhere, the kernel on a GPU or through Triton's
interpreter."""

import pytest
import torch

from chunked_embed.kernels.segment_sums import segment_sums, segment_sums_reference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool])
@pytest.mark.parametrize("lengths", [[3], [0, 5, 0, 1, 0], [512, 513, 1030, 1], [0]])
def test_sums(lengths, dtype, device):
    rows = sum(lengths)
    values = torch.randn(3, rows, generator=torch.Generator().manual_seed(rows)).mul(10).to(device, dtype)
    offsets = torch.tensor([0, *lengths], device=device).cumsum(0)
    expected = torch.stack([part.double().sum(1) for part in values.split(lengths, 1)], 1)
    for found in (segment_sums(values, offsets), segment_sums_reference(values, offsets)):
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
def test_a_sum_does_not_depend_on_where_its_values_lie(device):
    """Rows of a policy and of its equal have equal sums: margins between them are zero, and no rounding."""
    own = torch.randn(1400, generator=torch.Generator().manual_seed(0)).to(device)
    found = set()
    for before in (0, 1, 7, 513):
        values = torch.cat([own.new_ones(before), own, own.new_ones(5)]).expand(2, -1).contiguous()
        sums = segment_sums(values, torch.tensor([0, before, before + len(own), values.shape[1]], device=device))
        found |= set(sums[:, 1].tolist())
    assert len(found) == 1


@pytest.mark.parametrize("device", DEVICES)
def test_no_segments(device):
    assert segment_sums(torch.ones(2, 3, device=device), torch.zeros(1, dtype=torch.int64, device=device)).shape == (
        2,
        0,
    )
