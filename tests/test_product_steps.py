"""Contrastive losses whose similarities are never written, against plain torch in float64: on a GPU, else through
Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kernel_device import DEVICE, INTERPRETED, MARKS

from chunked_embed import Projection
from chunked_embed.functional import product_steps
from chunked_embed.functional.contrastive import InfoNCE, TwoSided
from chunked_embed.functional.product_steps import CrossEntropyProduct, TwoSidedProduct
from chunked_embed.kernels import norms

pytestmark = [pytest.mark.slow] if INTERPRETED else MARKS

N, V, DEPTH = (140, 290, 40) if INTERPRETED else (2100, 4400, 128)
DTYPES = [torch.float16] if INTERPRETED else [torch.bfloat16]  # the interpreter multiplies the bits of these
BOUND = {torch.float16: 1.5e-3, torch.bfloat16: 6e-3}  # a rounding of the gradient of similarities, and of what comes


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(product_steps, "FEWEST_ROWS", 1)
    monkeypatch.setattr(product_steps, "FEWEST_COLUMNS", 1)
    if INTERPRETED:  # norms take a program a row, most of the time here
        monkeypatch.setattr(norms, "available", lambda device: False)


class OneWay(InfoNCE):
    def make_step(self, projections):
        return CrossEntropyProduct(self.scale)

    def mean(self, call, rows):
        return self({"query_to_doc": call}, rows).loss


class TwoWays(TwoSided):
    def make_step(self, projections):
        return TwoSidedProduct(self.scale)

    def mean(self, call, rows):
        scores = self.scores(call, rows)
        both = scores["over_documents"] + scores["over_queries"][rows["target"]]
        return (both / 2 - scores["positive"]).mean()

    def loss_fn(self, scores, groups):
        raise NotImplementedError("which a plan asks for, and scores do not")


def truth(kind, x, bank, target, scale, cosine):
    """In float64, of plain torch."""
    x, bank = x.double(), bank.double()
    if cosine:
        x, bank = F.normalize(x, dim=1), F.normalize(bank, dim=1)
    z = x @ bank.T * scale
    loss = z.logsumexp(1)
    if kind is TwoWays:
        loss = (loss + z.logsumexp(0)[target]) / 2
    return (loss - z.gather(1, target[:, None])[:, 0]).mean()


def sides(dtype, near=0.5, offset=0):
    generator = torch.Generator().manual_seed(0)
    bank = torch.randn(V, DEPTH, generator=generator)
    target = torch.arange(N) + offset
    x = torch.randn(N, DEPTH, generator=generator) + near * bank[target]
    return *(t.to(dtype).to(DEVICE).requires_grad_() for t in (x, bank)), target.to(DEVICE)


def check(
    kind, dtype=DTYPES[0], cosine=True, scale=20.0, chunk_size=None, learns=False, frozen=(), bound=1.0, **of_sides
):
    x, bank, target = sides(dtype, **of_sides)
    for n in frozen:
        (x, bank)[n].requires_grad_(False)
    number = torch.tensor(scale, device=DEVICE, dtype=torch.float64, requires_grad=learns)
    rows = {"target": target}
    if learns:
        rows["scale"] = number.float().expand(N)
    loss = kind(scale=None if learns else scale, chunk_size=chunk_size, compiled=True)
    call = Projection(x, bank, cosine=cosine)
    plan = loss.plan({"query_to_doc": call} if kind is OneWay else call, rows)
    assert plan.steps == ((CrossEntropyProduct if kind is OneWay else TwoSidedProduct).__name__,)
    assert plan.chunk_bytes <= 2 * plan.chunk_rows * V
    value, exact = loss.mean(call, rows), truth(kind, x, bank, target, number, cosine)
    torch.testing.assert_close(value.double(), exact, rtol=3e-5, atol=1e-8)
    learning = [t for t in (x, bank, number) if t.requires_grad]
    if not learning:
        return value
    found, expected = (torch.autograd.grad(each / exact.detach(), learning) for each in (value, exact))
    for grad, right in zip(found, expected):
        limit = 1e-4 if right.dim() == 0 else bound * BOUND[dtype]
        assert grad.isfinite().all()
        assert (grad.double() - right.double()).norm() <= limit * right.double().norm() + 1e-12
    return value


KINDS = pytest.mark.parametrize("kind", [OneWay, TwoWays])


@KINDS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("cosine", "scale"), [(True, 20.0), (False, 0.2)])
@pytest.mark.parametrize("chunk_size", [None, 70])
def test_equals_plain_torch(kind, dtype, cosine, scale, chunk_size):
    check(kind, dtype, cosine, scale, chunk_size, offset=100)


@pytest.mark.parametrize(
    ("kind", "scale", "near"),
    [(OneWay, 20.0, 1.0), (OneWay, 20.0, 3.0), (OneWay, 50.0, 1.0), (OneWay, 100.0, 0.5), (TwoWays, 20.0, 1.0)],
)
def test_rows_near_their_own(kind, scale, near):
    """Losses of 1e-1 down to 1e-5: what two directions subtract there has fewer digits."""
    check(kind, scale=scale, near=near, bound=2.0 if kind is TwoWays else 1.0)


@KINDS
@pytest.mark.parametrize(("chunk_size", "frozen"), [(None, (0, 1)), (70, ())])
def test_a_scale_learns(kind, chunk_size, frozen):
    check(kind, scale=7.0, learns=True, chunk_size=chunk_size, frozen=frozen)


@KINDS
@pytest.mark.parametrize("frozen", [(0,), (1,), (0, 1)])
def test_frozen_sides(kind, frozen):
    check(kind, frozen=frozen, chunk_size=70)


@KINDS
def test_chunks_do_not_matter(kind):
    whole, parts = (check(kind, chunk_size=size) for size in (None, 37))
    torch.testing.assert_close(whole, parts, rtol=1e-6, atol=0)


@KINDS
def test_without_gradients(kind):
    with torch.no_grad():
        x, bank, target = sides(DTYPES[0])
        value = kind(scale=20.0, compiled=True).mean(Projection(x, bank, cosine=True), {"target": target})
        torch.testing.assert_close(value.double(), truth(kind, x, bank, target, 20.0, True), rtol=2e-5, atol=0)


def test_weights_of_rows():
    """Losses weigh rows as they like: through the upstream."""
    x, bank, target = sides(DTYPES[0])
    weight = torch.linspace(-1, 2, N, device=DEVICE)
    scores = TwoWays(scale=20.0, compiled=True).scores(Projection(x, bank, cosine=True), {"target": target})
    value = ((scores["over_documents"] - scores["positive"]) * weight).mean()
    z = F.normalize(x.double(), dim=1) @ F.normalize(bank.double(), dim=1).T * 20
    exact = (F.cross_entropy(z, target, reduction="none") * weight.double()).mean()
    torch.testing.assert_close(value.double(), exact, rtol=3e-5, atol=1e-8)
    for grad, right in zip(*(torch.autograd.grad(each, (x, bank)) for each in (value, exact))):
        assert (grad.double() - right.double()).norm() <= BOUND[DTYPES[0]] * right.double().norm()


REFUSALS = {
    "there are no products for float32": dict(dtype=torch.float32),
    "float64 takes the plain functions": dict(dtype=torch.float64),
    "steps run uncompiled": dict(compiled=False),
    "extra terms or a bias": dict(extra=True),
    "column arguments": dict(columns=True),
    "fewer than 1000000 rows": dict(fewest=10**6),
}


@KINDS
@pytest.mark.parametrize("sentence", REFUSALS)
def test_refusals(kind, sentence, monkeypatch):
    asked = {"dtype": DTYPES[0], "compiled": True, "extra": False, "columns": False, "fewest": 1, **REFUSALS[sentence]}
    monkeypatch.setattr(product_steps, "FEWEST_ROWS", asked["fewest"])
    x, bank, target = sides(asked["dtype"])
    call = Projection(x, bank, extra=((x, bank),) if asked["extra"] else ())
    columns = {"ids": torch.zeros(V, device=DEVICE)} if asked["columns"] else None
    loss = kind(scale=20.0, compiled=asked["compiled"])
    plan = loss.plan({"query_to_doc": call} if kind is OneWay else call, {"target": target}, columns=columns)
    assert sentence in plan.refusals[0]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, which meets NaN in NumPy
@KINDS
@pytest.mark.parametrize("row", [0, -1])
@pytest.mark.parametrize("place", [0, 1])
def test_nan_is_not_hidden(kind, place, row):
    """Of a query, of its document, or of one that is no row's own."""
    leaves, target = [x.detach() for x in sides(DTYPES[0])[:2]], sides(DTYPES[0])[2]
    leaves[place][row, 0] = torch.nan
    x, bank = (leaf.requires_grad_() for leaf in leaves)
    loss = kind(scale=20.0, compiled=True).mean(Projection(x, bank, cosine=True), {"target": target})
    loss.backward()
    assert loss.isnan() and x.grad.isnan().any() and bank.grad.isnan().any()
