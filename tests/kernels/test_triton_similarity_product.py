"""The kernels on similarities that are never written, against the formulas in float64: on a GPU, else through Triton's
interpreter."""

import pytest
import torch
import torch.nn.functional as F
from kernel_device import DEVICE, INTERPRETED, MARKS

from chunked_embed.kernels import similarity_product
from chunked_embed.kernels.similarity_product import (
    linear_both_gradients,
    linear_both_logsumexps,
    linear_cross_entropy,
    serves,
)

pytestmark = MARKS
KERNELS = "chunked_embed.kernels._triton_similarity_product."

DTYPES = [torch.float16] if INTERPRETED else [torch.bfloat16]  # the interpreter multiplies the bits of these
ROUNDING = {torch.float16: 2**-10, torch.bfloat16: 2**-8 + 2**-11}  # with that of the exponentials, in float16


@pytest.fixture(params=["kernel", "twin"])
def either(request, monkeypatch):
    if request.param == "twin":
        monkeypatch.setattr(similarity_product, "available", lambda device: False)


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


class Case:
    """Two sides, of which each row's own columns lie closer by ``near``; and the truth about their scores."""

    def __init__(
        self,
        rows,
        columns,
        depth,
        dtype=DTYPES[0],
        cosine=False,
        scale=3.0,
        near=0.0,
        first=0,
        size=None,
        strided=False,
    ):
        seed = rows * columns
        size = depth**-0.25 if size is None else size
        bank = random(columns, depth, seed=seed) * size
        self.target = (torch.arange(rows) + first).to(DEVICE) % columns
        x = random(rows, depth, seed=seed + 1) * size + near * bank[self.target]
        self.x, self.bank = x.to(dtype), bank.to(dtype)
        if strided:
            self.x, self.bank = self.x.t().contiguous().t(), self.bank.t().contiguous().t()
        self.rows, self.columns = torch.full((rows,), scale, device=DEVICE), None
        if cosine:
            self.rows = self.rows / self.x.float().norm(dim=1)
            self.columns = 1 / self.bank.float().norm(dim=1)
        self.weight, self.g_row, self.g_own = random(3, rows, seed=seed + 2)
        self.g_column = random(columns, seed=seed + 3)

    @property
    def factors(self):
        return {"rows": self.rows, "columns": self.columns}

    def scores(self):  # (R, V) in float64, and their derivative with respect to outputs
        column = 1.0 if self.columns is None else self.columns.double()
        factor = self.rows.double()[:, None] * column
        return self.x.double() @ self.bank.double().T * factor, factor.expand(len(self.x), len(self.bank))

    def check_one(self, rtol=1e-5):
        z, factor = self.scores()
        own = self.target[:, None]
        z_own = z.gather(1, own)
        others = z.scatter(1, own, -torch.inf)
        distance = others.logsumexp(1) - z_own[:, 0]
        loss = F.softplus(distance, threshold=700)
        loss = torch.where(distance < -30, distance.exp(), loss)
        p = (others - torch.logaddexp(others.logsumexp(1), z_own[:, 0])[:, None]).exp()
        slope = p.scatter(1, own, -p.sum(1, keepdim=True)) * self.weight.double()[:, None]
        moment = (p * (z - z_own)).sum(1) * self.weight.double()

        found, gradient, total = linear_cross_entropy(
            self.x, self.bank, self.target, self.weight, **self.factors, gradient=True, moment=True
        )
        size = 1 + z.abs().max().item()
        torch.testing.assert_close(found.double(), loss, rtol=rtol * size, atol=1e-30)
        torch.testing.assert_close(total.double(), moment, rtol=rtol * size, atol=1e-6 * size)
        assert gradient.dtype == self.x.dtype and gradient.shape == z.shape
        # Beside the row's largest entry but its own, which may be all others' sum; and the own by itself.
        got, expected = gradient.double() / factor, slope
        rounding = ROUNDING[gradient.dtype] + rtol * size
        largest = expected.scatter(1, own, 0.0).abs().amax(1, keepdim=True)
        denormal = torch.finfo(gradient.dtype).smallest_normal * torch.finfo(gradient.dtype).eps / factor.abs()
        error = (got - expected).abs()
        bound = rounding * expected.abs() + 1e-6 * largest + denormal
        assert (error <= bound).all(), (error / bound).max()
        alone, nothing, _ = linear_cross_entropy(self.x, self.bank, self.target, **self.factors)
        assert nothing is None and torch.equal(alone, found)

    def check_both(self, rtol=1e-5):
        z, factor = self.scores()
        size = 1 + z.abs().max().item()
        lses = linear_both_logsumexps(self.x, self.bank, self.target, **self.factors)
        own = self.target[:, None]
        for found, expected in zip(lses, (z.logsumexp(1), z.logsumexp(0), z.gather(1, own)[:, 0])):
            torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6 * size)
        slope = self.g_row.double()[:, None] * z.softmax(1) + self.g_column.double() * z.softmax(0)
        slope.scatter_add_(1, own, self.g_own.double()[:, None])
        gradient, total = linear_both_gradients(
            self.x,
            self.bank,
            self.target,
            lses[:2],
            (self.g_row, self.g_column, self.g_own),
            **self.factors,
            moment=True,
        )
        assert gradient.dtype == self.x.dtype and gradient.shape == z.shape
        bound = (ROUNDING[gradient.dtype] + rtol * size) * (slope * factor).abs() + 1e-6 * size * factor.abs()
        assert ((gradient.double() - slope * factor).abs() <= bound).all()
        torch.testing.assert_close(total.double(), (slope * z).sum(1), rtol=1e-5 * size, atol=1e-5 * size)


# Rows and columns that fill no tile and several, more columns than rows and fewer, depths that fill no step, operands
# that are no multiple of 16 bytes apart.
SHAPES = [(1, 1, 8), (3, 2, 33), (70, 300, 40), (140, 513, 64), (300, 140, 72)]
SHAPES += [] if INTERPRETED else [(2300, 3001, 256), (4096, 4096, 128)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cosine", [False, True])
def test_one_direction(shape, dtype, cosine, either):
    Case(*shape, dtype, cosine, scale=9.0 if cosine else 2.0).check_one()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cosine", [False, True])
def test_two_directions(shape, dtype, cosine, either):
    Case(*shape, dtype, cosine, scale=9.0 if cosine else 2.0).check_both()


@pytest.mark.parametrize("scale", [20.0, 50.0, 100.0])
@pytest.mark.parametrize("near", [0.3, 1.0, 30.0])
def test_confident_rows_and_near_duplicates(scale, near):
    case = Case(70, 300, 64, cosine=True, scale=scale, near=near, first=40)
    case.check_one()
    case.check_both()


def test_everything_is_alike():
    """Rows that differ by their rounding alone."""
    case = Case(70, 300, 64, cosine=True, scale=100.0)
    case.x, case.bank = case.x * 0.01 + 1, case.bank * 0.01 + 1
    case.rows, case.columns = 100 / case.x.float().norm(dim=1), 1 / case.bank.float().norm(dim=1)
    case.check_one()
    case.check_both()


DISTANCES = [-200, -100, -88, -40, -17, -11, -9, -1, 0, 1, 9, 11, 17, 40, 88, 100, 200]


def test_own_columns_far_from_the_others():
    """Each row's own column is so many nats above the largest of the others, or below."""
    case = Case(140, 600, 64, size=0.3, scale=1.0)
    case.x[:, : len(DISTANCES)], case.bank[:, : len(DISTANCES)] = 0.0, 0.0  # a depth for each of them
    for n, distance in enumerate(DISTANCES):
        row = 8 * n
        case.target[row] = 300 + n
        case.x[row, n], case.bank[300 + n, n] = 1.0, distance
    case.check_one()
    case.check_both()


def test_columns_that_vanish_beside_others():
    """One column is two hundred nats above all others, in every row; or in one tile of rows."""
    case = Case(140, 300, 64, size=0.3, scale=1.0)
    case.x[:, 0], case.bank[:, 0] = 0.0, 0.0
    case.bank[7, 0] = 200.0
    for rows in (slice(0, 140), slice(0, 20)):
        case.x[rows, 0] = 1.0
        case.check_one()
        case.check_both()
        case.x[:, 0] = 0.0


def test_rows_of_any_length(either):
    """Norms from 1e-3 to 1e3 on both sides."""
    case = Case(70, 300, 40)
    case.x = (case.x * torch.logspace(-3, 3, 70, device=DEVICE)[:, None]).half()
    case.bank = (case.bank * torch.logspace(3, -3, 300, device=DEVICE)[:, None]).half()
    case.rows, case.columns = 20 / case.x.float().norm(dim=1), 1 / case.bank.float().norm(dim=1)
    case.weight.mul_(1e-2), case.g_row.mul_(1e-2), case.g_column.mul_(1e-2), case.g_own.mul_(1e-2)
    z, factor = case.scores()
    _, gradient, _ = linear_cross_entropy(case.x, case.bank, case.target, case.weight, **case.factors, gradient=True)
    expected = (z.softmax(1) - F.one_hot(case.target, 300)) * case.weight.double()[:, None] * factor
    assert expected.abs().max() < 6e4  # float16 holds it
    assert (gradient.double() - expected).norm() <= 1e-3 * expected.norm()


@pytest.mark.parametrize(("together", "strided", "tiles_at_once"), [(1, False, 1), (2, True, 2), (16, True, 4)])
def test_any_order_of_tiles(together, strided, tiles_at_once, monkeypatch):
    monkeypatch.setattr(KERNELS + "TOGETHER", together)
    monkeypatch.setattr(KERNELS + "PASS", (tiles_at_once, 4))
    case = Case(301, 520, 48, strided=strided)
    case.check_one()
    case.check_both()


@pytest.mark.skipif(not INTERPRETED, reason="a GPU's engine takes what it can")
def test_tiles_that_are_copied_whole(monkeypatch):
    """As a GPU's engine copies them, through descriptors."""
    monkeypatch.setattr("chunked_embed.kernels._triton_product.can_be_described", lambda t: True)
    case = Case(140, 520, 72, cosine=True)
    case.check_one()
    case.check_both()


def test_no_row():
    case = Case(3, 7, 16)
    x, target, rows = case.x[:0], case.target[:0], case.rows[:0]
    loss, gradient, _ = linear_cross_entropy(x, case.bank, target, rows, rows=rows, gradient=True)
    assert loss.shape == (0,) and gradient.shape == (0, 7)
    over_columns, over_rows, own = linear_both_logsumexps(x, case.bank, target, rows=rows)
    assert over_columns.shape == own.shape == (0,) and (over_rows == -torch.inf).all()


def test_what_is_not_asked_for():
    case = Case(20, 30, 16)
    given = (case.x, case.bank, case.target)
    with pytest.raises(ValueError, match="a weight"):
        linear_cross_entropy(*given, rows=case.rows, gradient=True)
    _, gradient, moment = linear_cross_entropy(*given, case.weight, rows=case.rows, moment=True)
    assert gradient is None and moment.shape == (20,)
    lses = linear_both_logsumexps(*given, rows=case.rows)[:2]
    upstream = (case.g_row, case.g_column, case.g_own)
    gradient, moment = linear_both_gradients(*given, lses, upstream, rows=case.rows, gradient=False, moment=True)
    assert gradient is None and moment.shape == (20,)


def test_what_is_served(monkeypatch):
    device = torch.device(DEVICE)
    assert serves(torch.bfloat16, device) and serves(torch.float16, device)
    assert not serves(torch.float32, device) and not serves(torch.float64, device)
    monkeypatch.setattr(similarity_product, "available", lambda device: False)
    assert not serves(torch.bfloat16, device)
