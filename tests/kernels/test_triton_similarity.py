"""The kernels on similarity matrices against the formulas in float64: on a GPU, else through Triton's interpreter."""

import os

import pytest
import torch
import torch.nn.functional as F

from chunked_embed.kernels.similarity import (
    both_gradients_,
    both_gradients_reference,
    both_logsumexps,
    both_logsumexps_reference,
    cross_entropy_,
    cross_entropy_reference,
    sigmoid_pairs_,
    sigmoid_pairs_reference,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("no GPU, and not under TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")

SHAPES = [(1, 1), (3, 2), (17, 257), (3, 4097), (1, 17000)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Case:
    """Outputs inside a wider buffer of NaN: whatever is read or written beyond a row shows."""

    def __init__(self, rows, columns, dtype=torch.float32, size=1.0, scale=3.0):
        generator = torch.Generator().manual_seed(rows * columns)
        buffer = torch.full((rows + 1, columns + 5), torch.nan, dtype=dtype)
        buffer[:rows, :columns] = torch.randn(rows, columns, generator=generator) * size
        self.buffer, self.scale = buffer.to(DEVICE), scale
        self.x = self.buffer[:rows, :columns]
        self.target = torch.randint(columns, (rows,), generator=generator).to(DEVICE)
        self.weight, self.bias, self.g_row, self.g_own = torch.randn(4, rows, generator=generator).to(DEVICE)
        self.g_column = torch.randn(columns, generator=generator).to(DEVICE)
        self.leaf = self.x.double().requires_grad_()
        self.z = self.leaf * scale
        self.own = self.z[torch.arange(rows), self.target]

    def check_gradient(self, total, run):
        """``run(out)`` writes the gradient: the same in place, and in a buffer of float32."""
        (truth,) = torch.autograd.grad(total, self.leaf)
        size = 1 + self.z.abs().max().item()
        out = torch.full(self.x.shape, torch.nan, device=DEVICE)
        run(out)
        torch.testing.assert_close(out.double(), truth, rtol=1e-5 * size, atol=4e-6 * size)
        run(None)
        torch.testing.assert_close(self.x, out.to(self.x.dtype))
        rows, columns = self.x.shape
        assert self.buffer[rows].isnan().all() and self.buffer[:, columns:].isnan().all()


def close(got, truth, case, **tolerance):
    size = 1 + case.z.abs().max().item()
    torch.testing.assert_close(got.double(), truth.detach(), rtol=1e-5, atol=4e-6 * size)


def check_cross_entropy(case):
    truth = F.cross_entropy(case.z, case.target, reduction="none")
    close(cross_entropy_(case.x, case.target, scale=case.scale), truth, case)
    total = (truth * case.weight.double()).sum()
    case.check_gradient(total, lambda out: cross_entropy_(case.x, case.target, case.weight, scale=case.scale, out=out))


def check_sigmoid(case):
    rows = len(case.x)
    scale = torch.full((rows,), case.scale, dtype=torch.float64, device=DEVICE, requires_grad=True)
    bias = case.bias.double().requires_grad_()
    z = case.leaf * scale[:, None] + bias[:, None]
    sign = -torch.ones_like(z)
    sign[torch.arange(rows), case.target] = 1
    truth = -F.logsigmoid(sign * z).sum(1)
    numbers = (scale.detach().float(), case.bias)
    loss, _, _ = sigmoid_pairs_(case.x, case.target, *numbers)
    close(loss / case.x.shape[1], truth / case.x.shape[1], case)
    total = (truth * case.weight.double()).sum()
    grads = torch.autograd.grad(total, (scale, bias), retain_graph=True)
    got = []
    case.check_gradient(
        total, lambda out: got.append(sigmoid_pairs_(case.x, case.target, *numbers, case.weight, out=out)[1:])
    )
    size = 1 + case.x.abs().max().item()
    torch.testing.assert_close([g.double() for g in got[0]], list(grads), rtol=1e-4 * size, atol=1e-4 * size)


def check_both(case):
    truth = case.z.logsumexp(1), case.z.logsumexp(0)
    got = both_logsumexps(case.x, scale=case.scale)
    for ours, theirs in zip(got, truth, strict=True):
        close(ours, theirs, case)
    upstream = (case.g_row, case.g_column, case.g_own)
    total = sum((t * g.double()).sum() for t, g in zip((*truth, case.own), upstream, strict=True))
    case.check_gradient(
        total, lambda out: both_gradients_(case.x, case.target, got, upstream, scale=case.scale, out=out)
    )


CHECKS = [check_cross_entropy, check_sigmoid, check_both]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("check", CHECKS)
def test_shapes(check, shape):
    check(Case(*shape))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("check", CHECKS)
def test_dtypes(check, dtype):
    check(Case(9, 300, dtype))


@pytest.mark.parametrize("size", [1e-3, 30.0])
@pytest.mark.parametrize("check", CHECKS)
def test_sizes(check, size):
    check(Case(9, 300, size=size))


def test_columns_that_vanish_beside_others():
    """Far below every row's maximum: their exponentials are zero there, and their own sums are still exact."""
    case = Case(40, 300, scale=1.0)
    case.x[:, 100:] -= 500
    case.x[20:, 7] += 300
    rows, columns = both_logsumexps(case.x, scale=1.0)
    torch.testing.assert_close(rows, case.x.logsumexp(1))
    torch.testing.assert_close(columns, case.x.logsumexp(0))


def test_nan_is_not_hidden():
    case = Case(3, 100)
    case.x[1, 50] = torch.nan
    assert cross_entropy_(case.x, case.target).isnan().tolist() == [False, True, False]
    assert sigmoid_pairs_(case.x, case.target, case.bias, case.bias)[0].isnan().tolist() == [False, True, False]
    rows, columns = both_logsumexps(case.x)
    assert rows[1].isnan() and columns[50].isnan()


def test_no_rows():
    case = Case(1, 50)
    nothing = case.x[:0], case.target[:0]
    assert cross_entropy_(*nothing, case.weight[:0]).shape == (0,)
    assert sigmoid_pairs_(*nothing, case.bias[:0], case.bias[:0], case.weight[:0])[0].shape == (0,)


def test_float64_takes_the_plain_twin():
    case = Case(4, 50)
    x = case.x.double()
    assert cross_entropy_(x, case.target).dtype == torch.float64
    assert both_logsumexps(x)[0].dtype == torch.float64


@pytest.mark.parametrize("rows", [1, 60])
def test_twins_agree(rows):
    """What the twins say is what the kernels say: also with a strided weight."""
    case = Case(rows, 70)
    weight = torch.stack([case.weight, case.weight * torch.nan], 1)[:, 0]
    loss, gradient = cross_entropy_reference(case.x, case.target, weight, scale=2.0)
    sigmoid = sigmoid_pairs_reference(case.x, case.target, case.g_row, case.bias, weight)
    lses = both_logsumexps_reference(case.x, scale=2.0)
    upstream = (weight, case.g_column, case.g_own)
    both = both_gradients_reference(case.x, case.target, lses, upstream, scale=2.0)
    out = [torch.empty_like(case.x) for _ in range(3)]
    got = cross_entropy_(case.x, case.target, weight, scale=2.0, out=out[0])
    got_sigmoid = sigmoid_pairs_(case.x, case.target, case.g_row, case.bias, weight, out=out[1])
    both_gradients_(case.x, case.target, lses, upstream, scale=2.0, out=out[2])
    torch.testing.assert_close(got, loss)
    torch.testing.assert_close(got_sigmoid, (sigmoid[0], *sigmoid[2:]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out, [gradient, sigmoid[1], both], rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(INTERPRETED, reason="sizes for a GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("columns", [16384, 50257, 65536])
def test_on_a_gpu(check, dtype, columns):
    check(Case(1100, columns, dtype, size=0.3))
