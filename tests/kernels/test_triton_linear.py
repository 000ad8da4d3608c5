"""Statistics of a product that is not written, against float64: on a GPU, else through Triton's interpreter."""

import pytest
import torch
from kernel_device import DEVICE, INTERPRETED, MARKS

from chunked_embed.kernels.linear_scores import (
    linear_statistics,
    scaled_exponentials_,
    scaled_exponentials_again_,
    serves,
)
from chunked_embed.kernels.token_scores import STATISTICS

pytestmark = MARKS
DTYPE = torch.float16 if INTERPRETED else torch.bfloat16  # of which the interpreter multiplies the bits

# Rows and columns that fill no tile, rows of one tile and of more than share a weight, depths that fill no step, and
# operands that are no multiple of 16 bytes apart.
SIZES = [(1, 7, 64), (70, 300, 40), (130, 513, 72), (3, 1000, 33)] + ([] if INTERPRETED else [(2300, 3001, 256)])


def case(rows, columns, depth, dtype, strided=False):
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, depth, generator=generator).mul_(0.5).to(dtype).to(DEVICE)
    weight = torch.randn(columns, depth, generator=generator).mul_(0.5).to(dtype).to(DEVICE)
    bias = torch.randn(columns, generator=generator).to(dtype).to(DEVICE)
    target = torch.randint(0, columns, (rows,), generator=generator).to(DEVICE)
    if strided:
        x, weight = x.t().contiguous().t(), weight.t().contiguous().t()
    return x, weight, bias, target


TRANSFORMS = pytest.mark.parametrize(
    "transform", [{}, {"logit_scale": 0.7, "temperature": 1.3}, {"softcap": 5.0, "temperature": 0.8}], ids=str
)
BIASED = pytest.mark.parametrize("biased", [False, True])


@pytest.mark.parametrize("size", SIZES)
@BIASED
@TRANSFORMS
def test_all_statistics(size, biased, transform, truth):
    x, weight, bias, target = case(*size, DTYPE)
    bias = bias if biased else None
    logits = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    expected, _ = truth(logits, target, **transform)
    found = linear_statistics(x, weight, bias, target, names=STATISTICS, **transform)
    for name in STATISTICS:
        if name != "is_top1":
            torch.testing.assert_close(found[name].double(), expected[name], rtol=2e-5, atol=2e-5)
    assert torch.equal(found["is_top1"].double(), expected["is_top1"])


@pytest.mark.parametrize(("dtype", "strided"), [(torch.float16, False), (DTYPE, True)])
def test_operands(dtype, strided, truth):
    x, weight, _, target = case(40, 270, 48, dtype, strided)
    expected, _ = truth(x.double() @ weight.double().T, target)
    found = linear_statistics(x, weight, None, target, names=("logps",))
    torch.testing.assert_close(found["logps"].double(), expected["logps"], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_twin_serves_what_the_kernel_does_not(dtype, truth):
    x, weight, bias, target = case(5, 20, 8, dtype)
    assert not serves(dtype, x.device)
    expected, _ = truth(x.double() @ weight.double().T + bias.double(), target)
    found = linear_statistics(x, weight, bias, target, names=("logps", "entropy"))
    for name in ("logps", "entropy"):
        torch.testing.assert_close(found[name].double(), expected[name], rtol=2e-5, atol=2e-5)


def test_no_row():
    x, weight, _, target = case(3, 7, 16, DTYPE)
    assert linear_statistics(x[:0], weight, None, target[:0], names=("logps",))["logps"].shape == (0,)


@pytest.mark.skipif(INTERPRETED, reason="measures a GPU's memory")
def test_no_logits_are_formed():
    from chunked_embed import linear_logps

    x, weight, _, target = case(4096, 20_000, 256, torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        found = linear_logps(x, weight, target, compiled=True).logps
    assert torch.cuda.max_memory_allocated() - before < 4096 * 20_000  # an eighth of the logits, in half precision
    expected = torch.cat([(part.double() @ weight.double().T).log_softmax(1) for part in x.split(512)])
    torch.testing.assert_close(found.double(), expected.gather(1, target[:, None])[:, 0], rtol=1e-5, atol=1e-5)


# --- scaled exponentials ---------------------------------------------------------------------------------------------


def room(rows, columns, dtype):
    """For exponentials, with something in it that is not to be read, and rows that begin at multiples of 16 bytes."""
    width = -(-columns // 8) * 8
    return torch.full((rows, width), float("nan"), dtype=dtype, device=DEVICE)[:, :columns]


def assert_gradient(e, factor, expected, rtol):
    """Row by row, beside its largest entry; and so the target's own, and those of the others by themselves."""
    found = e.double() * factor.double()[:, None]
    assert found.isfinite().all()
    error, size = (found - expected).abs(), expected.abs()
    assert (error <= rtol * size + 1e-36).all(), (error / size.clamp_min(1e-36)).max()


def exact(x, weight, bias):
    return x.double() @ weight.double().T + (0 if bias is None else bias.double())


@pytest.mark.parametrize("size", SIZES)
@BIASED
@TRANSFORMS
def test_exponentials_are_the_gradient(size, biased, transform, truth):
    x, weight, bias, target = case(*size, DTYPE)
    bias = bias if biased else None
    expected, grad = truth(exact(x, weight, bias), target, {"logps": torch.ones(size[0], device=DEVICE)}, **transform)
    e = room(*size[:2], torch.float32)
    found, factor = scaled_exponentials_(x, weight, bias, target, e, names=STATISTICS, **transform)
    assert_gradient(e, factor, grad, 2e-5)
    alone = linear_statistics(x, weight, bias, target, names=STATISTICS, **transform)
    assert all(torch.equal(found[name], alone[name]) for name in STATISTICS)  # to the last bit
    torch.testing.assert_close(found["logps"].double(), expected["logps"], rtol=2e-5, atol=0)

    again = room(*size[:2], torch.float32)
    factor = scaled_exponentials_again_(x, weight, bias, target, found, again, **transform)
    assert_gradient(again, factor, grad, 3e-5)


@pytest.mark.parametrize("strided", [False, True])
def test_exponentials_are_rounded_once(strided, truth):
    x, weight, bias, target = case(70, 300, 48, DTYPE, strided)
    x = x * 0.25  # so that float16 holds them
    wide, narrow = room(70, 300, torch.float32), room(70, 300, DTYPE)
    for e in (wide, narrow):
        scaled_exponentials_(x, weight, bias, target, e, names=("logps",))
    assert torch.equal(narrow, wide.to(DTYPE))


@pytest.mark.parametrize("view", ["every other", "one number"])
def test_a_bias_that_is_a_view(view, truth):
    x, weight, bias, target = case(5, 300, 48, DTYPE)
    bias = torch.stack([bias, bias + 1], 1)[:, 0] if view == "every other" else bias[:1].expand(300)
    expected, grad = truth(exact(x, weight, bias), target, {"logps": torch.ones(5, device=DEVICE)})
    e, again = room(5, 300, torch.float32), room(5, 300, torch.float32)
    found, factor = scaled_exponentials_(x, weight, bias, target, e, names=("logps",))
    torch.testing.assert_close(found["logps"].double(), expected["logps"], rtol=2e-5, atol=0)
    assert_gradient(e, factor, grad, 2e-5)
    factor = scaled_exponentials_again_(x, weight, bias, target, found, again)
    assert_gradient(again, factor, grad, 3e-5)


DISTANCES = [-100, -88, -70, -64, -60, -45, -30, -10, -1, 0, 1, 5, 10, 12, 14, 17, 20, 30, 60, 100]


def leaning(rows, columns=300, depth=64):
    """Some rows' targets are so many nats away from the largest of the others, about."""
    generator = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(n, depth, generator=generator).mul_(0.25) for n in (rows, columns))
    target = torch.randint(columns // 2, columns, (rows,), generator=generator)
    lifted = range(0, rows, rows // len(DISTANCES))[: len(DISTANCES)]
    x[:, : len(DISTANCES)], weight[:, : len(DISTANCES)] = 0.0, 0.0  # a depth for each of them
    for n, row in enumerate(lifted):
        target[row] = n
        others = (x[row] @ weight.T).scatter(0, target[row], -torch.inf).amax()
        x[row, n], weight[n, n] = DISTANCES[n] + others - x[row] @ weight[n], 1.0
    return x.to(DTYPE).to(DEVICE), weight.to(DTYPE).to(DEVICE), target.to(DEVICE)


@pytest.mark.parametrize("rows", [20, 400])
def test_targets_of_any_probability(rows, truth):
    """From 1e-45, a hundred nats below the others, to one less than float64 tells: each to its last digits. Rows far
    below are in some tiles of 400 rows, and not in others."""
    x, weight, target = leaning(rows)
    expected, grad = truth(exact(x, weight, None), target, {"logps": torch.ones(rows, device=DEVICE)})
    own = target[:, None]
    grad.scatter_(1, own, -grad.scatter(1, own, 0.0).sum(1, keepdim=True))  # 1 - p loses digits in float64 too
    e = room(rows, len(weight), torch.float32)
    found, factor = scaled_exponentials_(x, weight, None, target, e, names=("logps",))
    torch.testing.assert_close(found["logps"].double(), expected["logps"], rtol=2e-5, atol=1e-13)
    assert_gradient(e, factor, grad, 5e-5)
    again = room(rows, len(weight), torch.float32)
    factor = scaled_exponentials_again_(x, weight, None, target, found, again)
    assert_gradient(again, factor, grad, 5e-5)


def test_a_vocabulary_with_holes(truth):
    """Columns of which a bias takes all probability, the target's among them, and a tile of nothing else."""
    x, weight, _, target = case(70, 520, 48, DTYPE)
    bias = torch.zeros(520, dtype=torch.float32, device=DEVICE)
    bias[3:500] = -torch.inf
    target[0] = 10
    e = room(70, 520, torch.float32)
    found, factor = scaled_exponentials_(x, weight, bias, target, e, names=("logps", "entropy"))
    z = exact(x, weight, bias)
    torch.testing.assert_close(
        found["entropy"].double(), torch.distributions.Categorical(logits=z).entropy(), rtol=1e-5, atol=1e-6
    )
    assert found["logps"][0] == -torch.inf
    one = torch.nn.functional.one_hot(target, 520)
    assert_gradient(e, factor, one - z.softmax(1), 2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exponentials_of_the_twin(dtype, truth):
    x, weight, bias, target = case(5, 20, 8, dtype)
    transform = {"softcap": 5.0, "temperature": 0.8}
    _, grad = truth(exact(x, weight, bias), target, {"logps": torch.ones(5, device=DEVICE)}, **transform)
    e = room(5, 20, torch.float32)
    _, factor = scaled_exponentials_(x, weight, bias, target, e, names=("entropy",), **transform)
    assert_gradient(e, factor, grad, 3e-5)
