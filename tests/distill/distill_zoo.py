"""Every distillation loss, with its formula written plainly in probabilities, and its gradient in closed form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import distill

V, HS, HT = 17, 5, 7
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    loss: Callable[..., distill.DistillationLoss]
    divergence: str
    reference: Callable[..., Tensor]  # logits (already tempered) of student and teacher, teacher head -> (R,)
    gradient: Callable[..., Tensor]  # the same -> (R, V), by the student's logits
    numbers: dict
    tempered: bool = True
    zero: bool = True  # where the distributions are equal

    def values(self, student: Tensor, teacher: Tensor, head: Tensor, temperature: float = 1.0) -> Tensor:
        t = temperature if self.tempered else 1.0
        return self.reference(student / t, teacher / t, head)


def probs(*logits):
    return [z.softmax(1) for z in logits]


def pull(u, q):
    """From ``u = q df/dq`` to the gradient by logits."""
    return u - q * u.sum(1, keepdim=True)


def kl_of(p, q):
    return (p * (p.log() - q.log())).sum(1)


def kl_reference(s, t, head):
    return F.kl_div(s.log_softmax(1), t.log_softmax(1), reduction="none", log_target=True).sum(1)


def kl_gradient(s, t, head):
    q, p = probs(s, t)
    return q - p


def reverse_reference(s, t, head):
    return F.kl_div(t.log_softmax(1), s.log_softmax(1), reduction="none", log_target=True).sum(1)


def reverse_gradient(s, t, head):
    q, p = probs(s, t)
    return q * ((q / p).log() - kl_of(q, p)[:, None])


def jsd_reference(s, t, head, beta):
    q, p = probs(s, t)
    m = (1 - beta) * q + beta * p
    return beta * kl_of(p, m) + (1 - beta) * kl_of(q, m)


def jsd_gradient(s, t, head, beta):
    q, p = probs(s, t)
    m = (1 - beta) * q + beta * p
    return (1 - beta) * q * ((q / m).log() - kl_of(q, m)[:, None])


def skew_reference(s, t, head, skew):
    q, p = probs(s, t)
    return kl_of(p, skew * p + (1 - skew) * q)


def skew_gradient(s, t, head, skew):
    q, p = probs(s, t)
    return pull(-q * p * (1 - skew) / (skew * p + (1 - skew) * q), q)


def skew_reverse_reference(s, t, head, skew, detach=False):
    q, p = probs(s, t)
    m = (1 - skew) * p + skew * q
    return kl_of(q, m.detach() if detach else m)


def skew_reverse_gradient(s, t, head, skew, detach=False):
    q, p = probs(s, t)
    m = (1 - skew) * p + skew * q
    return pull(q * ((q / m).log() + 1 - (0 if detach else skew * q / m)), q)


def tvd_reference(s, t, head):
    q, p = probs(s, t)
    return (p - q).abs().sum(1) / 2


def tvd_gradient(s, t, head):
    q, p = probs(s, t)
    return pull(q * (q - p).sign() / 2, q)


def ab_reference(s, t, head, a, b):
    q, p = probs(s, t)
    if b == 0:
        return (p**a * (p**a / q**a).log() - p**a + q**a).sum(1) / a**2
    if a == 0:
        return (q**b * (q**b / p**b).log() - q**b + p**b).sum(1) / b**2
    inner = p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)
    return -inner.sum(1) / (a * b)


def ab_gradient(s, t, head, a, b):
    q, p = probs(s, t)
    if b == 0:
        return pull((q**a - p**a) / a, q)
    if a == 0:
        return pull(q**b * (q / p).log(), q)
    return pull((q ** (a + b) - p**a * q**b) / a, q)


def head_weight(p, q, mass):
    weights = []
    for teacher, student in zip(p.detach(), q.detach(), strict=True):
        gap, total, inside = (teacher - student).abs(), 0.0, 0.0
        for i in teacher.argsort(descending=True).tolist():
            if total >= mass:
                break
            total += float(teacher[i])
            inside += float(gap[i])
        weights.append(inside / float(gap.sum()))
    return torch.tensor(weights, dtype=p.dtype)


def adaptive_reference(s, t, head, mass):
    q, p = probs(s, t)
    w = head_weight(p, q, mass)
    return w * kl_of(p, q) + (1 - w) * kl_of(q, p)


def adaptive_gradient(s, t, head, mass):
    w = head_weight(*reversed(probs(s, t)), mass)[:, None]
    return w * kl_gradient(s, t, head) + (1 - w) * reverse_gradient(s, t, head)


def taid_reference(s, t, head, share):
    target = ((1 - share) * s.detach() + share * t).softmax(1)
    return -(target * s.log_softmax(1)).sum(1)


def taid_gradient(s, t, head, share):
    return s.softmax(1) - ((1 - share) * s + share * t).softmax(1)


def cosine_reference(s, t, head):
    return 1 - F.cosine_similarity(s, t)


def cosine_gradient(s, t, head):
    size = s.norm(dim=1, keepdim=True)
    a, b = s / size, t / t.norm(dim=1, keepdim=True)
    return -(b - (a * b).sum(1, keepdim=True) * a) / size


def mse_reference(s, t, head):
    return (s - t).square().mean(1)


def mse_gradient(s, t, head):
    return 2 * (s - t) / s.shape[1]


def earth_reference(s, t, head, p):
    q, teacher = probs(s, t)
    steps = [(q[:, : k + 1].sum(1) - teacher[:, : k + 1].sum(1)).abs() ** p for k in range(q.shape[1])]
    return sum(steps) / (q.shape[1] - 1)


def earth_gradient(s, t, head, p):
    q, teacher = probs(s, t)
    gap = (q - teacher).cumsum(1)
    slope = gap.sign() if p == 1 else 2 * gap
    return pull(q * slope.flip(1).cumsum(1).flip(1) / (q.shape[1] - 1), q)


def kernel_of(head, kernel):
    unit = F.normalize(head, dim=1)
    return torch.eye(len(head), dtype=head.dtype) if kernel == "delta" else unit @ unit.T


def kvd_reference(s, t, head, kernel):
    gap = s.softmax(1) - t.softmax(1)
    return ((gap @ kernel_of(head, kernel)) * gap).sum(1)


def kvd_gradient(s, t, head, kernel):
    q, p = probs(s, t)
    return pull(q * 2 * ((q - p) @ kernel_of(head, kernel)), q)


def uld_reference(s, t, head):
    q, p = (z.softmax(1).sort(1).values for z in (s, t))
    return (q - p).abs().sum(1)


def uld_gradient(s, t, head):
    q, p = probs(s, t)
    order = q.argsort(1)
    sign = (q.gather(1, order) - p.sort(1).values).sign()
    return pull(q * torch.zeros_like(q).scatter(1, order, sign), q)


def case(loss, name, reference, gradient, numbers=None, extra=None, tempered=True, zero=True, **formula):
    """``numbers`` of the loss, and ``formula``: what the references call them."""
    return Case(
        partial(loss, **(numbers or {})),
        name,
        partial(reference, **formula),
        partial(gradient, **formula),
        numbers or {},
        tempered,
        zero,
    )


D = distill
CASES: dict[str, Case] = {
    "kl": case(D.KLDivLoss, "kl", kl_reference, kl_gradient),
    "reverse_kl": case(D.ReverseKLLoss, "reverse_kl", reverse_reference, reverse_gradient),
    "jsd": case(D.JSDLoss, "jsd", jsd_reference, jsd_gradient, {"beta": 0.5}, beta=0.5),
    "jsd .2": case(D.JSDLoss, "jsd", jsd_reference, jsd_gradient, {"beta": 0.2}, beta=0.2),
    "jsd 0": case(D.JSDLoss, "jsd", kl_reference, kl_gradient, {"beta": 0.0}),
    "jsd 1": case(D.JSDLoss, "jsd", reverse_reference, reverse_gradient, {"beta": 1.0}),
    "skew_kl": case(D.SkewKLLoss, "skew_kl", skew_reference, skew_gradient, {"skew": 0.1}, skew=0.1),
    "skew_kl .7": case(D.SkewKLLoss, "skew_kl", skew_reference, skew_gradient, {"skew": 0.7}, skew=0.7),
    "skew_kl 0": case(D.SkewKLLoss, "skew_kl", kl_reference, kl_gradient, {"skew": 0.0}),
    "skew_reverse_kl": case(
        D.SkewReverseKLLoss, "skew_reverse_kl", skew_reverse_reference, skew_reverse_gradient, {"skew": 0.3}, skew=0.3
    ),
    "skew_reverse_kl 0": case(
        D.SkewReverseKLLoss, "skew_reverse_kl", reverse_reference, reverse_gradient, {"skew": 0.0}
    ),
    "skew_reverse_kl detached": case(
        D.SkewReverseKLLoss,
        "skew_reverse_kl",
        skew_reverse_reference,
        skew_reverse_gradient,
        {"skew": 0.2, "detach_mixture": True},
        skew=0.2,
        detach=True,
    ),
    "tvd": case(D.TVDLoss, "tvd", tvd_reference, tvd_gradient),
    "alpha_beta": case(
        D.AlphaBetaLoss, "alpha_beta", ab_reference, ab_gradient, {"ab_alpha": 0.2, "ab_beta": 0.7}, a=0.2, b=0.7
    ),
    "alpha_beta above one": case(
        D.AlphaBetaLoss, "alpha_beta", ab_reference, ab_gradient, {"ab_alpha": 1.5, "ab_beta": 0.9}, a=1.5, b=0.9
    ),
    "alpha_beta forward": case(
        D.AlphaBetaLoss, "alpha_beta", ab_reference, ab_gradient, {"ab_alpha": 0.8, "ab_beta": 0.0}, a=0.8, b=0.0
    ),
    "alpha_beta reverse": case(
        D.AlphaBetaLoss, "alpha_beta", ab_reference, ab_gradient, {"ab_alpha": 0.0, "ab_beta": 0.6}, a=0.0, b=0.6
    ),
    "alpha_beta kl": case(D.AlphaBetaLoss, "alpha_beta", kl_reference, kl_gradient, {"ab_alpha": 1.0, "ab_beta": 0.0}),
    "alpha_beta reverse kl": case(
        D.AlphaBetaLoss, "alpha_beta", reverse_reference, reverse_gradient, {"ab_alpha": 0.0, "ab_beta": 1.0}
    ),
    "adaptive_kl": case(
        D.AdaptiveKLLoss, "adaptive_kl", adaptive_reference, adaptive_gradient, {"head": 0.5}, mass=0.5
    ),
    "taid": case(D.TAIDLoss, "taid", taid_reference, taid_gradient, {"t": 0.4}, zero=False, share=0.4),
    "taid 0": case(D.TAIDLoss, "taid", taid_reference, taid_gradient, {"t": 0.0}, zero=False, share=0.0),
    "taid 1": case(D.TAIDLoss, "taid", taid_reference, taid_gradient, {"t": 1.0}, zero=False, share=1.0),
    "cosine": case(D.CosineSimilarityLoss, "cosine", cosine_reference, cosine_gradient, tempered=False),
    "mse": case(D.LogitMSELoss, "mse", mse_reference, mse_gradient, tempered=False),
    "earth_mover": case(D.EarthMoverLoss, "earth_mover", earth_reference, earth_gradient, {"p": 1}, p=1),
    "cramer": case(D.EarthMoverLoss, "earth_mover", earth_reference, earth_gradient, {"p": 2}, p=2),
    "kvd": case(D.KVDLoss, "kvd", kvd_reference, kvd_gradient, {"kernel": "linear"}, kernel="linear"),
    "kvd delta": case(D.KVDLoss, "kvd", kvd_reference, kvd_gradient, {"kernel": "delta"}, kernel="delta"),
    "uld": case(D.ULDLoss, "uld", uld_reference, uld_gradient),
}


def make(*leading: int, seed: int = 0, dtype: torch.dtype = torch.float64, v: int = V, vt: int | None = None) -> Inputs:
    """Hidden states, heads and labels; the student's require grad. Some labels are ignored."""
    generator = torch.Generator().manual_seed(seed)
    leading = leading or (3, 4)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)

    target = torch.randint(0, min(v, vt or v), leading, generator=generator)
    target.view(-1)[1::3] = -100
    return {
        "student_hidden": randn(*leading, HS).requires_grad_(),
        "student_weight": randn(v, HS).requires_grad_(),
        "teacher_hidden": randn(*leading, HT),
        "teacher_weight": randn(vt or v, HT),
        "target": target,
        "student_bias": randn(v).requires_grad_(),
        "teacher_bias": randn(vt or v),
    }


def logits(x: Inputs, side: str) -> Tensor:
    """Logits of the tokens that count, whole."""
    hidden = x[f"{side}_hidden"].flatten(0, -2)[x["target"].flatten() != -100]
    return hidden @ x[f"{side}_weight"].T + x[f"{side}_bias"]


def labels(x: Inputs) -> Tensor:
    return x["target"][x["target"] != -100]


def learning(x: Inputs) -> list[Tensor]:
    return [t for t in x.values() if t.requires_grad]


def gradients(loss: Tensor, x: Inputs, upstream: float = 1.0) -> list[Tensor]:
    found = torch.autograd.grad(loss * upstream, learning(x), allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, learning(x), strict=True)]


def assert_same(output: Tensor, reference: Tensor, x: Inputs, tolerance: float = 1e-9, upstream: float = 1.0) -> None:
    torch.testing.assert_close(output, reference, rtol=tolerance, atol=1e-12)
    for mine, theirs in zip(gradients(output, x, upstream), gradients(reference, x, upstream), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=1e-11)
