"""CoSENT's kernels and their plain twin against the double sum in float64: on a GPU, else by Triton's interpreter."""

import pytest
import torch
from kernel_device import DEVICE, INTERPRETED, MARKS

from chunked_embed.kernels import ranking

pytestmark = MARKS

SMALL = {"block": 32, "warps": 1, "sums": 2}  # several blocks, and several loads of what they come to
SCALE = 1 / 0.07  # no number of float32

# (scores, labels) of n pairs, from a generator
CASES = {
    "all distinct": lambda n, g: (torch.randn(n, generator=g), torch.randperm(n, generator=g) / 7),
    "few labels": lambda n, g: (torch.randn(n, generator=g), torch.randint(-1, 2, (n,), generator=g)),
    "one label": lambda n, g: (torch.randn(n, generator=g), torch.full((n,), 0.5)),
    "two labels": lambda n, g: (torch.randn(n, generator=g), torch.rand(n, generator=g) > 0.9),
    "a tie over blocks": lambda n, g: (torch.randn(n, generator=g), torch.arange(n).clamp(3, 66).double()),
    "far apart": lambda n, g: (torch.randn(n, generator=g) * 1e4, torch.randn(n, generator=g).half()),
    "nearly right": lambda n, g: (0.9 * torch.arange(n) + torch.rand(n, generator=g), torch.arange(n).byte()),
}


def quadratic(scores, labels):
    """The loss and the gradient of float64 scores."""
    s = scores.double().requires_grad_()
    differences = (SCALE * (s[:, None] - s[None])).masked_fill(labels[:, None] >= labels[None], -torch.inf)
    top = differences.amax().clamp(0).detach()
    rest = (differences - top).exp().sum()
    loss = torch.log1p(rest) if top == 0 else top + torch.log(torch.exp(-top) + rest)
    return loss.detach(), torch.autograd.grad(loss, s)[0]


def run(scores, labels, launch, gradient=True):
    labels, order = (labels.byte() if labels.dtype == torch.bool else labels).sort()
    if launch == "twin":
        return ranking.cosent_reference(scores, labels, order, SCALE, gradient=gradient)
    from chunked_embed.kernels import _triton_ranking as kernels

    return kernels.cosent(scores, labels, order, SCALE, gradient, **launch)


def check(scores, labels, launch):
    truth, slope = quadratic(scores, labels)
    loss, grad = run(scores, labels, launch)
    assert loss.dtype == torch.float32 and grad.dtype == scores.dtype
    torch.testing.assert_close(loss.double(), truth, rtol=1e-7, atol=1e-12)  # rounded once
    info = torch.finfo(grad.dtype)
    torch.testing.assert_close(grad.double(), slope, rtol=info.eps, atol=max(1e-11, info.smallest_normal * info.eps))
    alone, nothing = run(scores, labels, launch, gradient=False)
    assert torch.equal(alone, loss) and nothing is None


@pytest.mark.parametrize("launch", [SMALL, "twin"], ids=["kernels", "twin"])
@pytest.mark.parametrize("n", [1, 64, 75])
@pytest.mark.parametrize("name", CASES)
def test_is_the_double_sum(name, n, launch):
    scores, labels = CASES[name](n, torch.Generator().manual_seed(n))
    check(scores.to(DEVICE), labels.to(DEVICE), launch)


@pytest.mark.parametrize("launch", [SMALL, "twin"], ids=["kernels", "twin"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_strided_scores_of_half_precision(dtype, launch):
    table = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    check(table[:, 1], (torch.arange(40) % 5).to(DEVICE), launch)


@pytest.mark.filterwarnings("ignore:.*NaN slice:RuntimeWarning")  # numpy's, under the interpreter
@pytest.mark.parametrize("at", [0, 40])
@pytest.mark.parametrize("launch", [SMALL, "twin"], ids=["kernels", "twin"])
def test_a_nan_is_not_lost(launch, at):
    scores = torch.zeros(50, device=DEVICE)
    scores[at] = torch.nan
    loss, grad = run(scores, torch.arange(50, device=DEVICE), launch)
    assert loss.isnan() and grad.isnan().any()


@pytest.mark.skipif(INTERPRETED, reason="sizes for a GPU")
@pytest.mark.parametrize("n", [1025, 5000])
@pytest.mark.parametrize("name", CASES)
def test_on_a_gpu(name, n):
    scores, labels = CASES[name](n, torch.Generator().manual_seed(n))
    check(scores.to(DEVICE), labels.to(DEVICE), {})


@pytest.mark.skipif(INTERPRETED, reason="sizes for a GPU")
@pytest.mark.parametrize("name", ["few labels", "all distinct", "far apart"])
def test_many_agree_with_the_twin(name):
    scores, labels = (x.to(DEVICE) for x in CASES[name](1_000_003, torch.Generator().manual_seed(0)))
    for mine, twin in zip(run(scores, labels, {}), run(scores, labels, "twin")):
        torch.testing.assert_close(mine, twin, rtol=1e-6, atol=1e-11)
