"""The truth for the kernels: the formulas in float64, differentiated by autograd, sharing no code with the package."""

import pytest
import torch


def _truth(x, target, upstream=None, logit_scale=1.0, softcap=None, temperature=1.0):
    """({name: (R,)}, dL/dx (R, V)) in float64 for L = sum upstream * statistics."""
    x = x.detach().double().requires_grad_()
    y = logit_scale * x
    if softcap is not None:
        y = softcap * torch.tanh(y / softcap)
    z = y / temperature
    p = z.softmax(-1)
    rows = torch.arange(len(target), device=x.device)
    stats = {
        "logps": z.log_softmax(-1)[rows, target],
        "lse": z.logsumexp(-1),
        "entropy": -torch.where(p > 0, p * p.clamp_min(1e-320).log(), 0).sum(-1),
        "log_sum_sq_probs": p.square().sum(-1).log(),
        "mean_logits": z.mean(-1),
        "is_top1": (z[rows, target] == z.max(-1).values).double(),
    }
    loss = sum((stats[name] * g.double()).sum() for name, g in (upstream or {}).items())
    grad = torch.autograd.grad(loss, x)[0] if upstream else torch.zeros_like(x)
    return {name: value.detach() for name, value in stats.items()}, grad


@pytest.fixture
def truth():
    return _truth
