"""The pure functions: derivatives, limits, and what happens far out."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from alignment import functional as AF

Function = Callable[..., Tensor]
COUNTS = (torch.tensor([3.0, 1, 5, 2]), torch.tensor([2.0, 4, 1, 2]))

# name: (function of log-probabilities, how many of those it takes)
FUNCTIONS: dict[str, tuple[Function, int]] = {
    **{
        f"dpo_{name}": (
            lambda c, r, rc, rr, t=name: AF.dpo(c, r, rc, rr, *COUNTS, loss_type=t, label_smoothing=0.2),
            4,
        )
        for name in AF.DPO_LOSSES
    },
    **{
        f"dpo_{name}_{divergence}": (
            lambda c, r, rc, rr, t=name, d=divergence: AF.dpo(
                c, r, rc, rr, *COUNTS, loss_type=t, f_divergence=d, label_smoothing=0.2
            ),
            4,
        )
        for name in sorted(AF.DIFFERENCES)
        for divergence in AF.F_DIVERGENCES
    },
    "irpo": (lambda c, r, rc, rr: AF.irpo(c, r, rc, rr, COUNTS[0]), 4),
    "dpop": (AF.dpop, 4),
    "rdpo": (lambda c, r, rc, rr: AF.rdpo(c, r, rc, rr, *COUNTS), 4),
    "tdpo1": (partial(AF.tdpo, loss_type="tdpo1"), 6),
    **{f"cpo_{t}": (lambda c, r, t=t: AF.cpo(c, r, *COUNTS, loss_type=t), 2) for t in ("sigmoid", "hinge", "ipo")},
    "simpo": (lambda c, r: AF.simpo(c, r, *COUNTS, label_smoothing=0.1), 2),
    "alphapo": (lambda c, r: AF.alphapo(c, r, *COUNTS), 2),
    "orpo": (lambda c, r: AF.orpo(c, r, *COUNTS), 2),
    "slic": (AF.slic, 3),
    **{f"fpo_{d}": (partial(AF.fpo, divergence=d), 2) for d in AF.FPO_DIVERGENCES},
    "kto": (lambda x: AF.kto(x, COUNTS[0] > 2, torch.tensor(0.3), undesirable_weight=2.0), 1),
    "apo_zero_unpaired": (lambda x: AF.apo_zero_unpaired(x, COUNTS[0] > 2), 1),
    "bco": (lambda x: AF.bco(x, COUNTS[0] > 2, torch.tensor(0.3)), 1),
    "log1mexp": (AF.log1mexp, 1),
}


def logps(n: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [(-0.1 - 5 * torch.rand(4, generator=g, dtype=torch.float64)).to(dtype).requires_grad_() for _ in range(n)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradcheck(name: str) -> None:
    function, n = FUNCTIONS[name]
    assert gradcheck(function, logps(n))
    assert function(*logps(n)).shape == (4,)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_out_values_and_gradients_are_finite(name: str, dtype: torch.dtype) -> None:
    function, n = FUNCTIONS[name]
    places = torch.tensor([0.0, -1e-8, -1e4, -37.0], dtype=dtype)
    for shift in range(4):
        inputs = [places.roll(shift * i).clone().requires_grad_() for i in range(n)]
        value = function(*inputs)
        assert value.dtype == dtype
        assert value.isfinite().all(), value
        value.sum().backward()
        assert all(x.grad is None or x.grad.isfinite().all() for x in inputs)


def test_log1mexp() -> None:
    x = -torch.logspace(-9, 3, 50, dtype=torch.float64)
    torch.testing.assert_close(AF.log1mexp(x), torch.tensor([math.log(-math.expm1(v)) for v in x.tolist()]).double())
    assert AF.log1mexp(torch.tensor(-1e-8)).item() == pytest.approx(math.log(1e-8))
    assert AF.log1mexp(torch.zeros(())).isfinite()


def test_limits() -> None:
    c, r, rc, rr = logps(4)
    near = AF.dpo(c, r, rc, rr, *COUNTS, f_divergence="alpha", f_alpha=1 + 1e-5)
    torch.testing.assert_close(near, AF.dpo(c, r, rc, rr, *COUNTS), rtol=1e-4, atol=1e-5)
    near = AF.alphapo(c, r, *COUNTS, reward_alpha=1e-6)
    torch.testing.assert_close(near, AF.simpo(c, r, *COUNTS), rtol=1e-5, atol=1e-6)
    for order, name in ((1e-6, "exo"), (1 - 1e-6, "dpo")):
        near = AF.fpo(c, r, divergence="alpha", divergence_order=order)
        q = torch.tensor([1, math.exp(-10)], dtype=torch.float64)
        shift = 1 - q.sum()  # q is no distribution: the limits differ from the names' by sum(p) - sum(q)
        exact = AF.fpo(c, r, divergence=name) + (-shift if name == "exo" else shift)
        torch.testing.assert_close(near, exact, rtol=1e-3, atol=1e-4)


def test_token_mean_is_the_mean_of_shares() -> None:
    c, n = torch.tensor([-3.0, -4.0, 0.0]), torch.tensor([2.0, 5.0, 0.0])
    assert AF.token_mean_nll(c, n).mean().item() == pytest.approx(1.0)
    assert not AF.token_mean_nll(c * 0, n * 0).any()


def test_kto_kl() -> None:
    a, b = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([0.5, 1.0])
    kl = AF.kto_kl(a, b)
    assert kl.item() == 0.75 and not kl.requires_grad
    assert AF.kto_kl(b, a).item() == 0
