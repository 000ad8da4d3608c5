"""The Triton kernels against the truth in float64: on a GPU where there is one, else through Triton's interpreter.

The interpreter needs TRITON_INTERPRET=1 before Triton is imported; test_token_scores.py starts it in its own process.
"""

import itertools

import pytest
import torch
from kernel_device import DEVICE, INTERPRETED, MARKS

from chunked_embed.kernels.token_scores import (
    DIFFERENTIABLE,
    STATISTICS,
    token_gradient_,
    token_gradient_reference,
    token_statistics,
    token_statistics_reference,
)

pytestmark = MARKS

SCALE = {"logit_scale": 0.5, "temperature": 0.7}
SOFTCAP = {"logit_scale": 3.0, "softcap": 20.0, "temperature": 1.5}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def subsets(names):
    return [chosen for n in range(len(names) + 1) for chosen in itertools.combinations(names, n)]


def case(rows, columns, dtype=torch.float32, scale=3.0, pad=5):
    """x is a slice of a wider buffer of NaN: whatever is read beyond a row shows, and its stride is not V."""
    generator = torch.Generator().manual_seed(rows * columns)
    buffer = torch.full((rows + 1, columns + pad), torch.nan, dtype=dtype)
    buffer[:rows, :columns] = torch.randn(rows, columns, generator=generator) * scale
    target = torch.randint(columns, (rows,), generator=generator)
    upstream = {name: torch.randn(rows, generator=generator).to(DEVICE) for name in DIFFERENTIABLE}
    return buffer.to(DEVICE)[:rows, :columns], target.to(DEVICE), upstream


def check(truth, x, target, upstream, options, names=STATISTICS):
    """Statistics to float32 accuracy; a stored gradient to the rounding of its dtype, wherever it is stored."""
    expected, gradient = truth(x, target, upstream, **options)
    stats = token_statistics(x, target, names={*names, *upstream}, **options)
    size = 1 + expected["lse"].abs().amax().item()
    assert all(value.dtype == torch.float32 for value in stats.values())
    wide = {name: value.double() for name, value in stats.items()}
    torch.testing.assert_close(wide, {name: expected[name] for name in stats}, rtol=1e-5, atol=2e-6 * size)
    out = torch.full(x.shape, torch.nan, dtype=torch.float32, device=DEVICE)
    token_gradient_(x, target, stats, upstream, out=out, **options)
    atol = 4e-6 * size * (1 + gradient.abs().amax().item())
    torch.testing.assert_close(out.double(), gradient, rtol=1e-5 * size, atol=atol)
    for place in own_halves(x):
        assert token_gradient_(x, target, stats, upstream, out=place, **options) is place
        torch.testing.assert_close(place, out.to(place.dtype))
    assert token_gradient_(x, target, stats, upstream, **options) is x
    torch.testing.assert_close(x, out.to(x.dtype))


def own_halves(x):
    """The first half of x's own rows, of either narrower dtype, if x is wide; x is as before after each."""
    buffer = x._base
    given = buffer.clone()
    for dtype in DTYPES[1:] if x.dtype == torch.float32 else ():
        yield buffer.view(dtype)[: len(x), : x.shape[1]]
        buffer.copy_(given)


@pytest.mark.parametrize("options", [{}, SCALE, SOFTCAP])
@pytest.mark.parametrize("columns", [1, 2, 31, 129, 4096, 4097, 9000])
def test_columns(truth, columns, options):
    check(truth, *case(3, columns), options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, SOFTCAP])
def test_dtypes(truth, dtype, options):
    check(truth, *case(4, 300, dtype), options)


@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("names", subsets(STATISTICS))
def test_every_choice_of_statistics(names, softcap):
    x, target, _ = case(2, 70)
    stats = token_statistics(x, target, names=names, softcap=softcap)
    assert set(stats) == {*names, "lse"}
    torch.testing.assert_close(stats, token_statistics_reference(x, target, names=names, softcap=softcap))


@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("names", subsets(DIFFERENTIABLE))
def test_every_choice_of_upstream(truth, names, softcap):
    x, target, upstream = case(2, 70)
    upstream = {name: upstream[name] for name in names}
    if upstream:
        check(truth, x, target, upstream, {"softcap": softcap}, names=())
    else:
        stats = token_statistics(x, target, names=())
        assert not token_gradient_(x, target, stats, {}).any()


@pytest.mark.parametrize("options", [{}, SCALE])
def test_impossible_logits(truth, options):
    x, target, upstream = case(4, 5000)
    x[0, 1:4500] = -torch.inf  # whole lanes see nothing but -inf
    x[1, 1:] = -torch.inf  # one possible token: entropy 0
    x[2, ::2] = torch.finfo(torch.float32).min
    target[:] = torch.tensor([0, 0, 1, 3])
    names = set(STATISTICS) - {"mean_logits"}  # whose sum overflows here, as it does in torch
    stats = token_statistics(x, target, names=names, **options)
    assert all(abs(stats[name][1]) < 1e-6 for name in ("entropy", "log_sum_sq_probs", "logps"))
    check(truth, x, target, upstream, options, names)


def test_the_smallest_finite_logits_then_others(truth):
    """A lane whose sums are of finfo.min (a usual mask) before it meets a real logit."""
    x, target, upstream = case(2, 9000)
    x[0, :8192] = torch.finfo(torch.float32).min
    x[1, 100:] = torch.finfo(torch.float32).min
    target[:] = torch.tensor([8200, 50])
    check(truth, x, target, upstream, {}, names=set(STATISTICS) - {"mean_logits"})


def test_impossible_logits_behind_a_softcap():
    x, target, upstream = case(2, 100)
    x[:, 10:20] = -torch.inf  # capped to -softcap: possible again, but with a derivative of zero
    options = {"softcap": 5.0}
    expected = token_statistics_reference(x, target, names=STATISTICS, **options)
    stats = token_statistics(x, target, names=STATISTICS, **options)
    torch.testing.assert_close(stats, expected)
    gradient = token_gradient_reference(x, target, stats, upstream, **options)
    torch.testing.assert_close(token_gradient_(x, target, stats, upstream, **options), gradient)


def test_target_that_is_impossible():
    x, target, upstream = case(2, 100)
    x[:, 3] = -torch.inf
    target[:] = 3
    stats = token_statistics(x, target, names=["logps", "is_top1"])
    assert stats["logps"].tolist() == [-torch.inf] * 2 and stats["is_top1"].tolist() == [0.0] * 2
    gradient = token_gradient_reference(x, target, stats, {"logps": upstream["logps"]})
    torch.testing.assert_close(token_gradient_(x, target, stats, {"logps": upstream["logps"]}), gradient)


def test_ties_at_the_top():
    x, target, _ = case(3, 4200)
    x[:, [7, 4100]] = 50.0
    x[2] = 0.25
    target[:] = torch.tensor([7, 4100, 11])
    for options in ({}, SCALE, SOFTCAP):
        assert token_statistics(x, target, names=["is_top1"], **options)["is_top1"].tolist() == [1.0] * 3
    assert token_statistics(x, target.flip(0), names=["is_top1"])["is_top1"].tolist() == [0.0, 1.0, 1.0]


@pytest.mark.parametrize("scale", [1e-4, 1e3, 1e5])
@pytest.mark.parametrize("options", [{}, SOFTCAP])
def test_scales(truth, scale, options):
    check(truth, *case(3, 600, scale=scale), options)


def test_other_signs_of_the_scale(truth):
    check(truth, *case(2, 100), {"logit_scale": -2.0})
    check(truth, *case(2, 100), {"logit_scale": 0.0})
    check(truth, *case(2, 100), {"logit_scale": -2.0, "softcap": 4.0})


def test_nan_is_not_hidden():
    x, target, upstream = case(2, 100)
    x[0, 50] = torch.nan
    stats = token_statistics(x, target, names=STATISTICS)
    for name in ("logps", "lse", "entropy", "log_sum_sq_probs", "mean_logits"):
        assert stats[name].isnan().tolist() == [True, False], name
    gradient = token_gradient_(x, target, stats, upstream)
    assert gradient[0].isnan().all() and gradient[1].isfinite().all()


def test_nothing_is_written_beyond_the_row():
    for dtype in DTYPES:
        x, target, upstream = case(3, 77, dtype)
        buffer = x._base
        stats = token_statistics(x, target, names=STATISTICS)
        for place in [*own_halves(x), x]:
            token_gradient_(x, target, stats, upstream, out=place)
            assert buffer[:3, 77:].isnan().all() and buffer[3].isnan().all()


def test_inputs_need_not_be_contiguous():
    x, target, upstream = case(4, 50)
    stats = token_statistics(x, target, names=DIFFERENTIABLE)
    expected = token_gradient_reference(x, target, stats, upstream)
    strided = {name: torch.stack([g, g * torch.nan], 1)[:, 0].double() for name, g in upstream.items()}
    torch.testing.assert_close(token_gradient_(x, torch.stack([target] * 2, 1)[:, 0], stats, strided), expected)


def test_no_rows_and_float64():
    x, target, upstream = case(0, 50)
    stats = token_statistics(x, target, names=STATISTICS)
    assert all(value.shape == (0,) for value in stats.values())
    assert token_gradient_(x, target, stats, upstream).shape == (0, 50)
    x, target, upstream = case(3, 50)
    assert token_statistics(x.double(), target, names=())["lse"].dtype == torch.float64


@pytest.mark.skipif(INTERPRETED, reason="sizes for a GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, SOFTCAP])
@pytest.mark.parametrize("columns", [50257, 128256])
def test_on_a_gpu(truth, dtype, options, columns):
    check(truth, *case(64, columns, dtype, pad=0), options)


@pytest.mark.skipif(INTERPRETED, reason="sizes for a GPU")
def test_more_than_two_to_the_31_elements():
    rows, columns = 18000, 131072
    x = torch.zeros(rows, columns, dtype=torch.bfloat16, device=DEVICE)
    x[-1, 5] = 20.0
    target = torch.full((rows,), 5, device=DEVICE)
    stats = token_statistics(x, target, names=DIFFERENTIABLE)
    expected = token_statistics_reference(x[-2:], target[-2:], names=DIFFERENTIABLE)
    torch.testing.assert_close({name: value[-2:] for name, value in stats.items()}, expected)
    upstream = {name: torch.ones(rows, device=DEVICE) for name in DIFFERENTIABLE}
    gradient = token_gradient_reference(x[-2:], target[-2:], expected, {n: g[-2:] for n, g in upstream.items()})
    torch.testing.assert_close(token_gradient_(x, target, stats, upstream)[-2:], gradient.bfloat16())
