"""The pure functions: derivatives, limits, and what happens far out."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from alignment import DPOLoss
from alignment import functional as AF

Function = Callable[..., Tensor]
COUNTS = (torch.tensor([3.0, 1, 5, 2]), torch.tensor([2.0, 4, 1, 2]))

SMOOTH = {"beta": 0.1, "label_smoothing": 0.2}


def dpo(name: str, divergence: str, c: Tensor, r: Tensor, rc: Tensor, rr: Tensor, alpha: float = 0.5) -> Tensor:
    terms = AF.ratios(c, r, rc, rr, *COUNTS, f_divergence=divergence, f_alpha=alpha)
    return AF.DPO_LOSSES[name](terms, DPOLoss(loss_type="cdpo", label_smoothing=0.2))


# name: (function of vectors, how many of those it takes)
FUNCTIONS: dict[str, tuple[Function, int]] = {
    **{f"dpo_{name}": (partial(dpo, name, "reverse_kl"), 4) for name in AF.DPO_LOSSES},
    **{
        f"dpo_{name}_{divergence}": (partial(dpo, name, divergence), 4)
        for name in sorted(AF.DIFFERENCES)
        for divergence in AF.F_DIVERGENCES
    },
    "irpo": (partial(AF.irpo, beta=0.1, alpha=1.0), 3),
    "dpop": (partial(AF.dpop, beta=0.1, dpop_lambda=50.0), 2),
    "rdpo": (lambda lc, lr: AF.rdpo(lc, lr, *COUNTS, beta=0.1, length_weight=0.01), 2),
    "tdpo1": (partial(AF.tdpo, beta=0.1, loss_type="tdpo1", kl_weight=0.5), 4),
    **{f"cpo_{t}": (partial(AF.cpo, loss_type=t, **SMOOTH), 2) for t in ("sigmoid", "hinge", "ipo")},
    "simpo": (partial(AF.simpo, gamma=0.5, **SMOOTH), 2),
    **{
        f"tpo_{t}": (partial(AF.tpo, loss_type=t, alpha=0.7, gamma=0.5, **SMOOTH), 3)
        for t in ("sigmoid", "hinge", "ipo", "tpo-l")
    },
    "alphapo_reward": (partial(AF.alphapo_reward, reward_alpha=0.25), 1),
    "orpo": (partial(AF.orpo, beta=0.1), 2),
    "slic": (partial(AF.slic, delta=1.0, alpha=0.1), 3),
    **{
        f"fpo_{d}": (partial(AF.fpo, divergence=d, beta=2.0, gamma=0.5, divergence_order=0.1), 2)
        for d in AF.FPO_DIVERGENCES
    },
    "kto": (
        lambda x: AF.kto(x, COUNTS[0] > 2, torch.tensor(0.3), beta=0.1, desirable_weight=1.0, undesirable_weight=2.0),
        1,
    ),
    "bco": (lambda x: AF.bco(x, COUNTS[0] > 2, torch.tensor(0.3), beta=0.1), 1),
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
    near = dpo("sigmoid", "alpha", c, r, rc, rr, 1 + 1e-5)
    torch.testing.assert_close(near, dpo("sigmoid", "reverse_kl", c, r, rc, rr), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(AF.alphapo_reward(c, 1e-6), AF.alphapo_reward(c, 0.0), rtol=1e-5, atol=1e-6)
    numbers = {"beta": 2.0, "gamma": 0.5}
    for order, name in ((1e-6, "exo"), (1 - 1e-6, "dpo")):
        near = AF.fpo(c, r, divergence="alpha", divergence_order=order, **numbers)
        q = torch.tensor([1, math.exp(-10)], dtype=torch.float64)
        shift = 1 - q.sum()  # q is no distribution: the limits differ from the names' by sum(p) - sum(q)
        exact = AF.fpo(c, r, divergence=name, divergence_order=order, **numbers) + (-shift if name == "exo" else shift)
        torch.testing.assert_close(near, exact, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["ipo", "sigmoid", "hinge"])
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl"])
def test_what_is_infinite_stays_so(name: str, divergence: str) -> None:
    """Capped exponents are for finite log-probabilities."""
    c, r, rc, rr = (x.detach() for x in logps(4))
    c[0] = -torch.inf
    value = dpo(name, divergence, c, r, rc, rr)
    assert value[0] == torch.inf and value[1:].isfinite().all()


def test_token_mean_is_the_mean_of_shares() -> None:
    c, n = torch.tensor([-3.0, -4.0, 0.0]), torch.tensor([2.0, 5.0, 0.0])
    assert AF.token_mean_nll(c, n).mean().item() == pytest.approx(1.0)
    assert not AF.token_mean_nll(c * 0, n * 0).any()


def test_kto_kl() -> None:
    a, b = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([0.5, 1.0])
    kl = AF.kto_kl(a, b)
    assert kl.item() == 0.75 and not kl.requires_grad
    assert AF.kto_kl(b, a).item() == 0
