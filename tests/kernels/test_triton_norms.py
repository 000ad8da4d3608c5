"""Inverse norms and projections against the formulas in float64: on a GPU, else through Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F
from kernel_device import DEVICE, INTERPRETED, MARKS

from chunked_embed.kernels import norms
from chunked_embed.kernels.norms import inverse_norms, inverse_norms_of_both, through_norms_

pytestmark = MARKS

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
WIDTHS = [1, 2, 31, 384, 4096, 5000, 9001]


@pytest.fixture(params=["kernel", "twin"])
def either(request, monkeypatch):
    if request.param == "twin":
        monkeypatch.setattr(norms, "available", lambda device: False)
        monkeypatch.setattr(norms, "BLOCK", 700)  # several blocks of rows, and rows wider than one


def case(rows, columns, dtype):
    """Rows of any size, inside a wider buffer of NaN; and a gradient likewise, in the accumulators' dtype."""
    generator = torch.Generator().manual_seed(rows * columns)
    x, grad = torch.randn(2, rows, columns, generator=generator, dtype=torch.float64)
    x *= torch.logspace(-2, 2, rows, dtype=torch.float64)[:, None]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    buffers = [torch.full((rows + 1, columns + 3), torch.nan, dtype=d, device=DEVICE) for d in (dtype, wide)]
    places = [buffer[:rows, :columns] for buffer in buffers]
    for place, values in zip(places, (x, grad), strict=True):
        place.copy_(values)
    return places


def tolerance(dtype):
    return {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-6, "atol": 1e-5}


@pytest.mark.parametrize(("columns", "dtype"), [*((n, torch.bfloat16) for n in WIDTHS), *((70, d) for d in DTYPES)])
def test_gradient_of_unit_vectors(columns, dtype, either):
    """With the inverse norm in it, a gradient of unit vectors becomes that of the rows."""
    x, grad = case(5, columns, dtype)
    leaf = x.to(torch.float64, copy=True).requires_grad_()
    expected = 1 / leaf.detach().norm(dim=1)
    inverse = inverse_norms(x)
    assert inverse.dtype == grad.dtype
    torch.testing.assert_close(inverse.double(), expected, **tolerance(dtype) | {"atol": 0})

    (truth,) = torch.autograd.grad((F.normalize(leaf, eps=1e-12) * grad.double()).sum(), leaf)
    grad *= inverse[:, None]
    assert through_norms_(grad, x, inverse) is grad
    # Relative to the rows' sizes, which are any.
    torch.testing.assert_close(grad.double() / expected[:, None], truth / expected[:, None], **tolerance(dtype))
    assert all(t._base[5].isnan().all() and t._base[:, columns:].isnan().all() for t in (x, grad))


@pytest.mark.parametrize(("n", "m"), [(1, 1), (5, 3), (4, 9)])
def test_both_sides(n, m, either):
    """The same to the last bit, each from a place of its own; also where the two are not alike."""
    x, y = case(n, 70, torch.bfloat16)[0], case(m, 70, torch.bfloat16)[0]
    for given in ((x, y), (x, y.float()), (x, y[:, :60]), (x, y.double()), (x.t().contiguous().t(), y)):
        for found, alone in zip(inverse_norms_of_both(*given), map(inverse_norms, given), strict=True):
            assert torch.equal(found, alone)


@pytest.mark.parametrize("dtype", DTYPES[:2] + DTYPES[3:])
def test_rows_at_the_floor(dtype, either):
    """Below it the norm is a constant: nothing is projected out; just above, all is."""
    x, grad = case(4, 50, dtype)
    x[:] = F.normalize(x.double()) * torch.tensor([0.0, 9e-13, 2e-12, 1e-11], device=DEVICE)[:, None]
    grad *= 1e-6
    inverse = inverse_norms(x)
    assert (inverse[:2] - 1e12).abs().max() < 1e6 and inverse[2] < 6e11
    before = grad.clone()
    through_norms_(grad, x, inverse)
    torch.testing.assert_close(grad[:2], before[:2], rtol=0, atol=0)
    left = (F.normalize(x[2:].double(), eps=1e-30) * grad[2:]).sum(1) / before[2:].norm(dim=1)
    assert left.abs().max() < 1e-6


def test_nothing_is_written_to_the_rows(either):
    x, grad = case(3, 20, torch.bfloat16)
    before = x.clone()
    through_norms_(grad, x, inverse_norms(x))
    torch.testing.assert_close(x, before, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
def test_empty(shape, either):
    x, grad = torch.empty(2, *shape, device=DEVICE)
    inverse = inverse_norms(x.bfloat16())
    assert inverse.shape == shape[:1] and through_norms_(grad, x.bfloat16(), inverse).shape == shape


def test_any_strides(either):
    x, grad = case(6, 40, torch.float32)
    inverse = inverse_norms(x)
    torch.testing.assert_close(inverse_norms(x.T.contiguous().T), inverse)
    expected = through_norms_(grad.clone(), x, inverse)
    strided = torch.stack([inverse, inverse * torch.nan], 1)[:, 0]
    torch.testing.assert_close(through_norms_(grad.T.contiguous().T, x.T.contiguous().T, strided), expected)
    torch.testing.assert_close(through_norms_(grad.double(), x, inverse).float(), expected)


def test_nan_is_not_hidden(either):
    x, _ = case(3, 20, torch.float32)
    x[1, 7] = torch.nan
    assert inverse_norms(x).isnan().tolist() == [False, True, False]


@pytest.mark.skipif(INTERPRETED, reason="sizes for a GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [384, 1024, 4096, 7168])
def test_on_a_gpu(columns, dtype):
    x, grad = case(5000, columns, dtype)
    inverse = inverse_norms(x)
    torch.testing.assert_close(inverse.double(), 1 / x.double().norm(dim=1), **tolerance(dtype) | {"atol": 0})
    given = grad.double()
    through_norms_(grad, x, inverse)
    unit_rows = F.normalize(x.double())
    expected = given - unit_rows * (unit_rows * given).sum(1, keepdim=True)
    torch.testing.assert_close(grad.double(), expected, **tolerance(dtype))
