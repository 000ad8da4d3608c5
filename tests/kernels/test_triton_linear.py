"""Statistics of a product that is not written, against float64: on a GPU, else through Triton's interpreter."""

import os

import pytest
import torch

from chunked_embed.kernels.linear_scores import linear_statistics, serves
from chunked_embed.kernels.token_scores import STATISTICS

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("no GPU, and not under TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")
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


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    "transform", [{}, {"logit_scale": 0.7, "temperature": 1.3}, {"softcap": 5.0, "temperature": 0.8}]
)
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
