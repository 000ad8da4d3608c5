"""The kernels on similarity matrices against the formulas in float64: on a GPU, else through Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F
from kernel_device import DEVICE, INTERPRETED, MARKS

from chunked_embed.kernels import similarity
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

pytestmark = MARKS

SHAPES = [((1, 1), False), ((3, 2), True), ((9, 257), True), ((2, 2100), False), ((1, 17000), True)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["kernel", "twin"])
def either(request, monkeypatch):
    if request.param == "twin":
        monkeypatch.setattr(similarity, "available", lambda device: False)


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


class Case:
    """Outputs inside a wider buffer of NaN: whatever is read or written beyond a row shows.

    Scores are of the given size times the scale. With `unequal` factors, those of rows differ, and columns have some.
    """

    def __init__(self, rows, columns, dtype=torch.float32, size=1.0, scale=3.0, unequal=False):
        seed = rows * columns
        x = random(rows, columns, seed=seed) * size
        self.factors = {"rows": torch.full((rows,), scale, device=DEVICE), "columns": None}
        if unequal:
            over_rows, over_columns = random(rows, seed=seed + 1).exp(), random(columns, seed=seed + 2).exp()
            self.factors = {"rows": scale * over_rows, "columns": over_columns}
            x = x / over_rows[:, None] / over_columns
        self.buffer = torch.full((rows + 1, columns + 5), torch.nan, dtype=dtype, device=DEVICE)
        self.x = self.buffer[:rows, :columns]
        self.x.copy_(x)
        self.target = torch.randint(columns, (rows,), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
        self.weight, self.bias, self.g_row, self.g_own = random(4, rows, seed=seed + 3)
        self.g_column = random(columns, seed=seed + 4)

    @property
    def dz_dx(self):
        rows, columns = self.factors.values()
        factor = rows.double()[:, None].expand(self.x.shape)
        return factor if columns is None else factor * columns.double()

    def truth(self):
        """x in float64, its scores, and those in the target's column."""
        leaf = self.x.to(torch.float64, copy=True).requires_grad_()
        z = leaf * self.dz_dx
        return leaf, z, z.gather(1, self.target[:, None]).squeeze(1)

    def places(self):
        """Of the gradient: apart from x, over it, and in the first half of its own rows."""
        for dtype in DTYPES[:2]:
            yield torch.full(self.x.shape, torch.nan, dtype=dtype, device=DEVICE)
        yield None
        for dtype in DTYPES:
            if 2 * dtype.itemsize == self.x.element_size():
                yield self.buffer.view(dtype)[: len(self.x), : self.x.shape[1]]

    def check_gradient(self, truth, run):
        """``run(out)`` writes the gradient, and returns what else it found: the same, wherever that is written."""
        size = 1 + self.truth()[1].abs().max().item()
        given, exact, others = self.buffer.clone(), None, None
        for out in self.places():
            self.buffer.copy_(given)
            found = run(out)
            got = (self.x if out is None else out).clone()
            if exact is None:
                exact, others = got, found
                # As gradients of scores: those of outputs carry factors of any size.
                slope, expected = exact / self.dz_dx, truth / self.dz_dx
                torch.testing.assert_close(slope, expected, rtol=1e-5 * size, atol=4e-6 * size)
            else:
                rounded = exact.to(got.dtype)
                atol = 1e-6 * exact.abs().max().item()
                torch.testing.assert_close(got, rounded, rtol=max(torch.finfo(got.dtype).eps, 1e-6), atol=atol)
                torch.testing.assert_close(found, others, rtol=1e-6 * size, atol=1e-6 * size)
            rows, columns = self.x.shape
            assert self.buffer[rows].isnan().all() and self.buffer[:, columns:].isnan().all()
        self.buffer.copy_(given)
        return others


def close(got, truth, z, times=1.0):
    size = times * (1 + z.detach().abs().max().item())
    torch.testing.assert_close(got.double(), truth.detach(), rtol=1e-5, atol=4e-6 * size)


def check_cross_entropy(case):
    leaf, z, _ = case.truth()
    truth = F.cross_entropy(z, case.target, reduction="none")
    close(cross_entropy_(case.x, case.target, **case.factors), truth, z)
    slope, gradient = torch.autograd.grad((truth * case.weight.double()).sum(), (z, leaf))
    given = (case.x, case.target, case.weight)
    loss, moment = case.check_gradient(
        gradient, lambda out: cross_entropy_(*given, moment=True, out=out, **case.factors)
    )
    close(loss, truth, z)
    close(moment, (slope * z).sum(1), z, times=10)
    (loss,) = case.check_gradient(gradient, lambda out: [cross_entropy_(*given, out=out, **case.factors)])
    close(loss, truth, z)


def check_sigmoid(case):
    """With scales of their own beside the factors."""
    leaf, y, _ = case.truth()
    numbers = (0.5 + case.g_row.abs(), case.bias)
    scale, bias = (number.double().requires_grad_() for number in numbers)
    z = y * scale[:, None] + bias[:, None]
    sign = -torch.ones_like(z)
    sign[torch.arange(len(z)), case.target] = 1
    truth = -F.logsigmoid(sign * z).sum(1)
    columns = z.shape[1]
    loss, _, _ = sigmoid_pairs_(case.x, case.target, *numbers, **case.factors)
    close(loss / columns, truth / columns, z)
    gradient, *of_numbers = torch.autograd.grad((truth * case.weight.double()).sum(), (leaf, scale, bias))
    given = (case.x, case.target, *numbers, case.weight)
    loss, *got = case.check_gradient(gradient, lambda out: sigmoid_pairs_(*given, out=out, **case.factors))
    close(loss / columns, truth / columns, z)
    for ours, theirs in zip(got, of_numbers, strict=True):
        close(ours / columns, theirs / columns, z)


def check_both(case):
    leaf, z, own = case.truth()
    truth = z.logsumexp(1), z.logsumexp(0)
    lses = both_logsumexps(case.x, **case.factors)
    for ours, theirs in zip(lses, truth, strict=True):
        close(ours, theirs, z)
    upstream = (case.g_row, case.g_column, case.g_own)
    total = sum((t * g.double()).sum() for t, g in zip((*truth, own), upstream, strict=True))
    slope, gradient = torch.autograd.grad(total, (z, leaf))
    given = (case.x, case.target, lses, upstream)

    def run(out):
        place, moment = both_gradients_(*given, moment=True, out=out, **case.factors)
        assert place is (case.x if out is None else out)
        return [moment]

    (moment,) = case.check_gradient(gradient, run)
    close(moment, (slope * z).sum(1), z, times=1 + z.detach().abs().max().item())

    def run_without(out):
        assert both_gradients_(*given, out=out, **case.factors) is (case.x if out is None else out)
        return []

    case.check_gradient(gradient, run_without)


CHECKS = [check_cross_entropy, check_sigmoid, check_both]


@pytest.mark.parametrize(("shape", "unequal"), SHAPES)
@pytest.mark.parametrize("check", CHECKS)
def test_shapes(check, shape, unequal):
    check(Case(*shape, unequal=unequal))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("check", CHECKS)
def test_dtypes(check, dtype, either):
    check(Case(9, 300, dtype, unequal=True))


@pytest.mark.parametrize("size", [1e-3, 30.0])
@pytest.mark.parametrize("check", CHECKS)
def test_sizes(check, size, either):
    check(Case(9, 300, size=size, unequal=True))


@pytest.mark.parametrize("check", CHECKS)
def test_scale_of_either_sign(check, either):
    check(Case(3, 100, scale=-2.0))
    check(Case(3, 100, scale=1e-9))


def winners(scale, gap):
    """Rows whose own cosine is ahead of all others, by `gap` / scale and more, and the truth for them."""
    case = Case(12, 700, scale=scale)
    case.x.copy_(random(12, 700, seed=0).clamp(-3, 3) / 30)
    ahead = case.x.amax(1) + (gap + torch.arange(12, device=DEVICE) / 2) / scale
    case.x.scatter_(1, case.target[:, None], ahead[:, None])
    return case


@pytest.mark.parametrize(("scale", "gap"), [(20.0, 7.0), (100.0, 4.0)])
def test_a_target_that_all_but_won(scale, gap, either):
    """What is left of it, 1 - p, has the relative accuracy of the others' probabilities; so has the moment."""
    case = winners(scale, gap)
    leaf, z, _ = case.truth()
    truth = F.cross_entropy(z, case.target, reduction="none")
    slope, gradient = torch.autograd.grad(truth.sum(), (z, leaf))
    assert slope.gather(1, case.target[:, None]).abs().min() < 1e-3
    ones = torch.ones_like(case.weight)
    loss, moment = cross_entropy_(case.x, case.target, ones, moment=True, **case.factors)
    torch.testing.assert_close(case.x.double(), gradient, rtol=1e-4, atol=1e-12)
    torch.testing.assert_close(moment.double(), (slope * z).sum(1), rtol=1e-4, atol=0)
    torch.testing.assert_close(loss.double(), truth.detach(), rtol=1e-4, atol=1e-6)


def test_sigmoid_pairs_that_all_but_won(either):
    """Losses and gradients far below the rounding of one keep their digits, for pairs of either kind."""
    case = Case(4, 600, scale=1.0)
    case.x.copy_(random(4, 600, seed=1) - 24)
    case.x.scatter_(1, case.target[:, None], torch.tensor([17.0, 20.0, 22.0, 25.0], device=DEVICE)[:, None])
    leaf, z, _ = case.truth()
    scale = torch.ones(4, dtype=torch.float64, device=DEVICE, requires_grad=True)
    sign = torch.ones_like(z).scatter(1, case.target[:, None], -1.0)
    truth = F.softplus(sign * z * scale[:, None], threshold=1e9).sum(1)
    gradient, g_scale = torch.autograd.grad(truth.sum(), (leaf, scale))
    ones = torch.ones_like(case.weight)
    loss, got, _ = sigmoid_pairs_(case.x, case.target, ones, ones * 0, ones, **case.factors)
    for ours, theirs in [(loss, truth.detach()), (got, g_scale), (case.x, gradient)]:
        torch.testing.assert_close(ours.double(), theirs, rtol=3e-5, atol=0)


def test_columns_that_vanish_beside_others():
    """Far below every row's maximum: their exponentials are zero there, and their own sums are still exact."""
    case = Case(40, 300, scale=1.0)
    case.x[:, 100:] -= 500
    case.x[20:, 7] += 300
    rows, columns = both_logsumexps(case.x, **case.factors)
    torch.testing.assert_close(rows, case.x.logsumexp(1))
    torch.testing.assert_close(columns, case.x.logsumexp(0))


def test_nan_is_not_hidden(either):
    case = Case(3, 100)
    case.x[1, 50] = torch.nan
    assert cross_entropy_(case.x, case.target, **case.factors).isnan().tolist() == [False, True, False]
    assert sigmoid_pairs_(case.x, case.target, case.bias, case.bias)[0].isnan().tolist() == [False, True, False]
    rows, columns = both_logsumexps(case.x, **case.factors)
    assert rows[1].isnan() and columns[50].isnan()


def test_no_rows(either):
    case = Case(1, 50)
    x, target, none = case.x[:0], case.target[:0], case.weight[:0]
    assert cross_entropy_(x, target, none, rows=none).shape == (0,)
    assert [len(t) for t in cross_entropy_(x, target, none, rows=none, moment=True)] == [0, 0]
    assert sigmoid_pairs_(x, target, none, none, none)[0].shape == (0,)
    over_columns, over_rows = both_logsumexps(x, rows=none)
    assert over_columns.shape == (0,) and over_rows.tolist() == [-torch.inf] * 50
    out, moment = both_gradients_(x, target, (none, over_rows), (none, case.g_column, none), rows=none, moment=True)
    assert out.shape == (0, 50) and moment.shape == (0,)


def test_what_is_refused():
    case = Case(4, 50)
    with pytest.raises(ValueError, match="needs a weight"):
        cross_entropy_(case.x, case.target, moment=True, **case.factors)
    beside = case.buffer.view(torch.bfloat16).as_strided((4, 50), (50, 1))  # rows of its own, over those of x
    with pytest.raises(ValueError, match="first half of x's rows"):
        cross_entropy_(case.x, case.target, case.weight, out=beside, **case.factors)


def test_float64_stays_float64():
    case = Case(4, 50, torch.float64)
    assert cross_entropy_(case.x, case.target, **case.factors).dtype == torch.float64
    assert sigmoid_pairs_(case.x, case.target, case.bias, case.bias)[0].dtype == torch.float64
    assert {lse.dtype for lse in both_logsumexps(case.x, **case.factors)} == {torch.float64}


@pytest.mark.parametrize("rows", [1, 60])
def test_twins_agree(rows):
    """What the twins say is what the kernels say: also with strided vectors, and of another dtype."""
    case = Case(rows, 70, unequal=True)
    strided = torch.stack([case.weight, case.weight * torch.nan], 1)[:, 0]
    factors = {name: torch.stack([f, f * torch.nan], 1)[:, 0].double() for name, f in case.factors.items()}
    x, target, out = case.x, case.target, torch.empty_like(case.x)

    loss, gradient, moment = cross_entropy_reference(x, target, strided, **factors)
    got = cross_entropy_(x, target, strided, moment=True, out=out, **factors)
    torch.testing.assert_close([*got, out], [loss, moment, gradient], rtol=1e-4, atol=1e-5)

    numbers = (case.g_row, case.bias, strided)
    loss, gradient, *of_numbers = sigmoid_pairs_reference(x, target, *numbers, **factors)
    got = sigmoid_pairs_(x, target, *numbers, out=out, **factors)
    torch.testing.assert_close([*got, out], [loss, *of_numbers, gradient], rtol=1e-4, atol=1e-4)

    lses = both_logsumexps_reference(x, **factors)
    torch.testing.assert_close(both_logsumexps(x, **factors), lses)
    upstream = (strided, case.g_column, case.g_own)
    expected = both_gradients_reference(x, target, lses, upstream, **factors)
    got = both_gradients_(x, target, lses, upstream, moment=True, out=out, **factors)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(INTERPRETED, reason="sizes for a GPU")
@pytest.mark.parametrize("unequal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("columns", [16384, 50257, 65536])
def test_on_a_gpu(check, dtype, columns, unequal):
    check(Case(1100, columns, dtype, size=0.3, unequal=unequal))
