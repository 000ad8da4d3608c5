"""The kernels of attention-shaped contrast against the formulas in float64: on a GPU, else in Triton's interpreter."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from kernel_device import DEVICE, INTERPRETED, MARKS

from chunked_embed.kernels import contrast
from chunked_embed.kernels.contrast import (
    Pairs,
    Similarities,
    Slopes,
    logsumexps,
    logsumexps_reference,
    shifted,
    softmaxes,
    softmaxes_reference,
    weighted_sums,
    weighted_sums_reference,
)

pytestmark = MARKS

DTYPES = [torch.float16] if INTERPRETED else [torch.bfloat16]  # the interpreter multiplies none of these
BOUND = {torch.float16: 3.75e-4, torch.bfloat16: 3e-3}  # of gradients, whole tensors
SHAPES = [(1, 70, 64), (70, 70, 48), (65, 129, 200)]
SHAPES += [(1, 1, 16), (130, 300, 64), (128, 256, 256), (150, 40, 32)] if INTERPRETED else []


@pytest.fixture(params=["kernel", "twin"])
def either(request, monkeypatch):
    if request.param == "twin":
        monkeypatch.setattr(contrast, "available", lambda device: False)


class Case:
    """Queries beside their documents, in wider buffers of NaN: whatever is read beyond a row shows.

    Documents are as far from their query as `noise` says, and all of them from one point as `spread` does. Targets are
    the rows in their order, from the middle of the documents on; or anywhere, where there are fewer documents.
    """

    def __init__(
        self, queries, documents, width, *, cosine=True, scale=20.0, noise=0.5, spread=None, dtype=torch.float16, seed=0
    ):
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape):
            return torch.randn(*shape, generator=generator)

        x, y = randn(queries, width), randn(documents, width)
        if spread is not None:
            center = randn(1, width)
            x, y = center + spread * x, center + spread * y
        offset = max(documents - queries, 0) // 2
        self.target = torch.arange(queries) + offset
        if queries > documents:
            self.target = torch.randint(documents, (queries,), generator=generator)
        y[self.target] = x + noise * randn(queries, width)
        y *= 0.7 + 0.7 * torch.rand(documents, 1, generator=generator)
        self.x, self.y = self.within(x, dtype), self.within(y, dtype)
        self.target = self.target.to(DEVICE)
        self.scale = torch.full((queries,), scale, device=DEVICE)
        self.norms = tuple(1 / t.double().norm(dim=1).float() for t in (self.x, self.y)) if cosine else None
        self.weight, self.g_own = randn(2, queries).to(DEVICE)
        self.g_row, self.g_column = randn(queries).to(DEVICE), randn(documents).to(DEVICE)
        self.ids = {}
        self.out = torch.zeros(queries, documents, dtype=torch.bool, device=DEVICE)

    @staticmethod
    def within(given, dtype):
        rows, width = given.shape
        buffer = torch.full((rows + 3, width + 8), torch.nan, dtype=dtype, device=DEVICE)
        buffer[:rows, :width] = given
        return buffer[:rows, :width]

    @property
    def bound(self):
        return BOUND[self.x.dtype]

    @property
    def similarities(self):
        return Similarities(self.x, self.y, Pairs(self.target, **self.ids), self.scale, self.norms)

    def truth(self):
        """Operands in float64, and all scores; what does not count at -inf."""
        x, y = (t.to(torch.float64, copy=True).requires_grad_() for t in (self.x, self.y))
        z = x @ y.T * self.scale.double()[:, None]
        if self.norms is not None:
            z = z * self.norms[0].double()[:, None] * self.norms[1].double()
        return x, y, z.masked_fill(self.out, -torch.inf)

    def across(self, gradient, x):
        """What of it is at right angles to the rows, where norms are factors."""
        x, gradient = x.detach().double(), gradient.double()
        if self.norms is None:
            return gradient
        return gradient - (gradient * x).sum(1, keepdim=True) * x / x.square().sum(1, keepdim=True).clamp_min(1e-30)


def error(got, truth):
    return ((got.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()


def check_one_way(case):
    """-> the least 1 - p of an own document."""
    x, y, z = case.truth()
    truth = F.cross_entropy(z, case.target, reduction="none")
    of_x, of_y, of_z = torch.autograd.grad((truth * case.weight.double()).sum(), (x, y, z))
    positive = z.gather(1, case.target[:, None]).squeeze(1)
    others = z.scatter(1, case.target[:, None], -torch.inf).logsumexp(1)
    rest = (others - positive).sigmoid()
    size = 1 + positive.detach().abs().max().item()
    found = softmaxes(case.similarities, case.weight, gradient=True, moment=True)
    torch.testing.assert_close(
        found.loss.double(), F.softplus(others - positive, threshold=1e9), rtol=1e-6 * size, atol=0
    )
    torch.testing.assert_close(found.positive.double(), positive, rtol=1e-6, atol=1e-6 * size)
    torch.testing.assert_close(found.rest.double(), rest, rtol=1e-6 * size, atol=0)
    moment = (of_z * z.masked_fill(case.out, 0.0)).sum(1)
    torch.testing.assert_close(found.moment.double(), moment, rtol=1e-5 * size, atol=1e-6 * size * rest.max().item())
    assert error(found.gradient, case.across(of_x, x)) <= case.bound
    sums, _ = weighted_sums(case.similarities, found.slopes, over_rows=True)
    assert error(sums, case.across(of_y, y)) <= case.bound
    alone = softmaxes(case.similarities)
    torch.testing.assert_close([alone.loss, alone.rest], [found.loss, found.rest], rtol=1e-6 * size, atol=0)
    assert alone.slopes is alone.gradient is alone.moment is None
    return rest.min().item()


def check_two_ways(case):
    x, y, z = case.truth()
    own = torch.zeros_like(z, dtype=torch.bool).scatter_(1, case.target[:, None], True)
    others = z.masked_fill(own, -torch.inf).logsumexp(0)
    found, none = logsumexps(case.similarities), others == -torch.inf
    torch.testing.assert_close(found[~none].double(), others[~none], rtol=1e-6, atol=1e-5)
    assert (found[none] < -1e38).all()
    over_columns, over_rows = z.logsumexp(1), z.logsumexp(0).masked_fill(none & ~own.any(0), -1.1e38)
    positive = z.gather(1, case.target[:, None]).squeeze(1)
    total = sum(
        (g.double() * t.clamp_min(-1e300)).sum()
        for g, t in [(case.g_row, over_columns), (case.g_column, over_rows), (case.g_own, positive)]
    )
    of_x, of_y, of_z = torch.autograd.grad(total, (x, y, z))
    slope = of_z.gather(1, case.target[:, None]).squeeze(1).float()
    slopes = Slopes(*shifted(over_columns.float(), case.g_row), slope)
    of_columns = shifted(over_rows.float(), case.g_column)
    size = 1 + positive.detach().abs().max().item()
    for along, over in enumerate((False, True)):
        got, moment = weighted_sums(case.similarities, slopes, of_columns, over_rows=over, moment=True)
        given, gradient = (y, of_y) if over else (x, of_x)
        # Slopes of both signs, whose sums cancel.
        assert error(got, case.across(gradient, given)) <= 1.5 * case.bound
        expected = (of_z * z.masked_fill(case.out, 0.0)).sum(1 - along)
        torch.testing.assert_close(moment.double(), expected, rtol=1e-5, atol=2e-6 * size * size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("check", [check_one_way, check_two_ways])
def test_shapes(check, shape, cosine, dtype):
    check(Case(*shape, cosine=cosine, scale=5.0 if cosine else 5.0 / shape[2], dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("scale", "noise", "most"), [(2.0, 1.5, 1.0), (10.0, 0.7, 0.3), (20.0, 0.5, 1e-4), (30.0, 0.5, 1e-6)]
)
def test_own_documents_that_all_but_won(scale, noise, most, dtype):
    """1 - p from .9 to 1e-8: what is left has the relative accuracy of all else."""
    assert check_one_way(Case(130, 200, 64, scale=scale, noise=noise, dtype=dtype)) <= most


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("spread", "noise"), [(0.3, 0.2), (0.3, 0.05), (0.05, 0.02)])
@pytest.mark.parametrize("scale", [20.0, 50.0, 100.0])
def test_near_duplicates(scale, spread, noise, dtype):
    """Cosines of .9 to 1."""
    check_one_way(Case(256, 256, 64, scale=scale, spread=spread, noise=noise, dtype=dtype))


@pytest.mark.parametrize("scale", [20.0, 100.0])
def test_near_duplicates_two_ways(scale):
    check_two_ways(Case(200, 200, 64, scale=scale, spread=0.3, noise=0.2))


def test_targets_in_any_order():
    case = Case(150, 200, 32, scale=5.0)
    case.target = torch.randperm(200, generator=torch.Generator().manual_seed(1))[:150].to(DEVICE)
    check_one_way(case)
    check_two_ways(case)
    case.target = case.target % 7
    check_one_way(case)


def with_ids(case, lists=None, shared=False, bare=False, of=("documents", "queries"), everything=False):
    """Few ids, so that much is left out; and what that is, pair by pair."""
    queries, documents = len(case.x), len(case.y)
    generator = torch.Generator().manual_seed(3)

    def ids(*shape):
        return torch.zeros(*shape, dtype=torch.long) if everything else torch.randint(9, shape, generator=generator)

    query, document, listed = ids(queries), ids(queries), ids(lists or 0, queries) - 1
    candidate, its_query, has_id = ids(documents), ids(documents), torch.arange(documents) % 3 > 0
    place = torch.arange(documents) - (documents - queries) // 2
    target = case.target.tolist()
    for i, j in product(range(queries), range(documents)):
        known = candidate[j] == document[i] or (shared and candidate[j] == query[i])
        known = known or any(ids == candidate[j] and ids != -1 for ids in listed[:, i])
        known = known and "documents" in of and (has_id[j] or not bare)
        known = known or ("queries" in of and its_query[j] == query[i] and place[j] != target[i])
        case.out[i, j] = bool(known and j != target[i])
    if bare:
        candidate = torch.where(has_id, candidate, -1)
    given = {"documents": (document, candidate), "queries": (query, its_query, place)}
    case.ids = {name: tuple(t.int().to(DEVICE) for t in given[name]) for name in of} | {"shared": shared}
    if lists is not None:
        case.ids["listed"] = torch.where(listed == -1, -2, listed).int().to(DEVICE)
    return case


IDS = {
    "documents": {"of": ("documents",)},
    "queries": {"of": ("queries",)},
    "both": {},
    "empty lists": {"lists": 0},
    "lists": {"lists": 2, "bare": True},
    "lists alone": {"lists": 3, "of": ("documents",)},
    "many lists": {"lists": 9, "of": ("documents",)},
    "shared": {"shared": True},
    "all": {"lists": 1, "shared": True},
}


@pytest.mark.parametrize("ids", IDS)
@pytest.mark.parametrize("check", [check_one_way, check_two_ways])
def test_known_pairs(check, ids, either):
    case = with_ids(Case(40, 150, 32, scale=5.0), **IDS[ids])
    assert 0.05 < case.out.double().mean() < 0.9
    check(case)


def test_nothing_else_counts(either):
    case = with_ids(Case(20, 150, 32), everything=True)
    found = softmaxes(case.similarities, case.weight, gradient=True, moment=True)
    for got in (
        found.loss,
        found.gradient,
        found.moment,
        weighted_sums(case.similarities, found.slopes, over_rows=True)[0],
    ):
        assert got.count_nonzero() == 0 and got.isfinite().all()
    assert (logsumexps(case.similarities) < -1e38).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_zeros(dtype, either):
    """Of a document that is a query's own, and of others. Their inverse norms are at the floor, but float16's zero."""
    case = Case(40, 70, 32, dtype=dtype)
    case.x[3] = case.y[5] = case.y[20] = 0
    factor = 0.0 if dtype == torch.float16 else 1e12
    case.norms[0][3] = case.norms[1][5] = case.norms[1][20] = factor
    x, y, z = case.truth()
    truth = F.cross_entropy(z, case.target, reduction="none")
    found = softmaxes(case.similarities, case.weight, gradient=True)
    torch.testing.assert_close(found.loss.double(), truth, rtol=1e-4, atol=1e-6)
    sums, _ = weighted_sums(case.similarities, found.slopes, over_rows=True)
    of_x, of_y = torch.autograd.grad((truth * case.weight.double()).sum(), (x, y))
    expected = case.across(of_x, x), case.across(of_y, y)
    for got, right, inverse in zip((found.gradient, sums), expected, case.norms, strict=True):
        usual = (inverse > 0) & (inverse < 1e10)
        for part in (usual, ~usual):
            assert error(got[part], right[part]) <= 2 * case.bound


def test_scores_beyond_float16(either):
    """Products of 200,000, of which the scale makes 20."""
    check_one_way(Case(40, 70, 64, cosine=False, scale=0.3))
    case = Case(40, 70, 64, cosine=False, scale=1e-4, noise=0.1)
    case.x *= 64
    case.y *= 64
    assert case.truth()[2].max() > 6.5504e4 * 1e-4
    check_one_way(case)


def test_small_slopes_keep_their_digits_in_float16():
    """Of 1e-9 beside each other, which float16 cannot hold."""
    case = Case(130, 130, 32, scale=5.0)
    case.weight *= 1e-9
    check_one_way(case)


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # of the interpreter
def test_nan_is_not_hidden(either):
    case = Case(20, 40, 32)
    case.x[2, 7] = torch.nan
    found = softmaxes(case.similarities, case.weight, gradient=True)
    assert found.loss.isnan().nonzero().tolist() == [[2]] and found.gradient[2].isnan().all()
    assert weighted_sums(case.similarities, found.slopes, over_rows=True)[0].isnan().all()
    assert logsumexps(case.similarities).isnan().sum() >= 39


def test_no_rows(either):
    case = Case(1, 30, 16)
    empty = Similarities(case.x[:0], case.y, Pairs(case.target[:0]), case.scale[:0], (case.norms[0][:0], case.norms[1]))
    found = softmaxes(empty, case.weight[:0], gradient=True, moment=True)
    assert found.loss.shape == (0,) and found.gradient.shape == (0, 16) and found.moment.shape == (0,)
    assert weighted_sums(empty, found.slopes, over_rows=True)[0].tolist() == torch.zeros(30, 16).tolist()


@pytest.mark.parametrize("cosine", [True, False])
def test_twins_agree(cosine):
    """What the twins say is what the kernels say: also with strided vectors, and numbers of a row that are apart."""
    case = Case(40, 70, 32, cosine=cosine, scale=0.5)
    x, y, pairs, scale, norms = case.similarities
    strided = torch.stack([scale, scale * torch.nan], 1)[:, 0]
    s = Similarities(x.t().contiguous().t(), y, pairs, strided, norms)
    plain = softmaxes_reference(s, case.weight, gradient=True, moment=True)
    found = softmaxes(s, case.weight, gradient=True, moment=True)
    torch.testing.assert_close(tuple(found.slopes), tuple(plain.slopes), rtol=1e-5, atol=1e-5, check_dtype=False)
    flat = ("loss", "positive", "rest", "gradient", "moment")
    got, expected = ([getattr(of, name) for name in flat] for of in (found, plain))
    torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3, check_dtype=False)
    torch.testing.assert_close(logsumexps(s), logsumexps_reference(s), rtol=1e-5, atol=1e-5, check_dtype=False)
    across = shifted(case.g_column, case.g_column)
    for of_columns, over in [(None, True), (across, True), (across, False)]:
        got, expected = (
            f(s, plain.slopes, of_columns, over_rows=over, moment=True)
            for f in (weighted_sums, weighted_sums_reference)
        )
        assert error(got[0], expected[0].double()) <= 2 * case.bound
        assert error(got[1], expected[1].double()) <= 1e-5


def test_float64_and_wide_rows_are_the_twins():
    case = Case(20, 40, 32)
    s = case.similarities
    s = s._replace(x=s.x.double(), y=s.y.double())
    assert softmaxes(s, case.weight, gradient=True).gradient.dtype == torch.float64
    wide = Case(20, 40, 257).similarities
    assert not contrast.use_triton(s) and not contrast.use_triton(wide)


@pytest.mark.skipif(INTERPRETED, reason="sizes for a GPU")
@pytest.mark.parametrize(
    ("width", "cosine", "dtype"),
    [
        (16, True, torch.bfloat16),
        (64, False, torch.bfloat16),
        (64, True, torch.float16),
        (128, True, torch.bfloat16),
        (256, True, torch.bfloat16),
        (256, False, torch.float16),
    ],
)
@pytest.mark.parametrize("check", [check_one_way, check_two_ways])
def test_on_a_gpu(check, width, cosine, dtype):
    check(Case(3000, 5001, width, cosine=cosine, scale=10.0 if cosine else 10.0 / width, dtype=dtype))


@pytest.mark.skipif(INTERPRETED, reason="sizes for a GPU")
@pytest.mark.parametrize("width", [64, 256])
@pytest.mark.parametrize("scale", [20.0, 50.0, 100.0])
def test_many_near_duplicates_on_a_gpu(scale, width):
    check_one_way(Case(6000, 6000, width, scale=scale, spread=0.3, noise=0.2, dtype=torch.bfloat16))
