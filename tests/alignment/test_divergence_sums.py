"""KL(reference || policy) of tokens, where the policy is near its reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from alignment.path import DivergenceSums

HEAD = (1.0, None)


def found(policy: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """-> KL by token, and its gradient by the policy's logits."""
    engine = DivergenceSums()
    engine.transforms, engine.names = (("policy", HEAD), ("reference", HEAD)), ("logps",)
    z = policy.clone().requires_grad_()
    target = torch.zeros(len(z), dtype=torch.int64)
    kl = engine.score_fn({"policy": z, "reference": reference}, {"target": target})["kl"]
    return kl.detach(), torch.autograd.grad(kl.sum(), z)[0]


@pytest.mark.parametrize("drift", [0.2, 2e-3, 2e-4])
def test_digits_near_the_reference(drift):
    generator = torch.Generator().manual_seed(0)
    reference = 8 * torch.randn(40, 300, generator=generator)
    policy = reference + drift * torch.randn(40, 300, generator=generator)
    kl, gradient = found(policy, reference)
    policy, reference = policy.double(), reference.double()
    p, log_q = reference.softmax(1), policy.log_softmax(1)
    truth = (p * (reference.log_softmax(1) - log_q)).sum(1)
    assert (kl - truth).norm() < 1e-3 * truth.norm()
    assert (kl >= 0).all()
    assert (gradient - (log_q.exp() - p)).norm() < 2e-3 * (log_q.exp() - p).norm()


def test_none_of_equal_distributions():
    z = 8 * torch.randn(5, 30, generator=torch.Generator().manual_seed(1))
    assert not found(z, z)[0].any()


def test_tokens_that_cannot_occur():
    """Of -inf: nothing where neither has them, and finite where only the policy lacks one."""
    reference, policy = torch.zeros(2, 4), torch.zeros(2, 4)
    reference[:, 3] = policy[:, 3] = policy[1, 2] = -torch.inf
    kl, gradient = found(policy, reference)
    assert kl[0] == 0 and 200 < kl[1] < 300
    assert gradient.isfinite().all()
