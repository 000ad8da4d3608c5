"""``linear_logps`` against plain float64 autograd and against torch's own distributions."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Categorical

from chunked_embed import TokenLogps, linear_logps

ALL = ("logps", "lse", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def tensors(shape=(3, 7), h=5, v=13, dtype=torch.float64):
    torch.manual_seed(0)
    hidden = torch.randn(*shape, h, dtype=dtype, requires_grad=True)
    weight, bias = torch.randn(v, h, dtype=dtype, requires_grad=True), torch.randn(v, dtype=dtype, requires_grad=True)
    target = torch.randint(0, v, shape)
    target[..., 0] = -100
    return hidden, weight, bias, target


def reference(hidden, weight, bias, target, logit_scale=1.0, logit_softcap=None, temperature=1.0):
    z = (hidden @ weight.T + bias) * logit_scale
    if logit_softcap is not None:
        z = logit_softcap * torch.tanh(z / logit_softcap)
    z = z / temperature
    used, safe = target != -100, target.clamp_min(0)
    distribution = Categorical(logits=z)
    values = TokenLogps(
        logps=distribution.log_prob(safe),
        lse=z.logsumexp(-1),
        entropy=distribution.entropy(),
        log_sum_sq_probs=distribution.probs.square().sum(-1).log(),
        mean_logits=z.mean(-1),
        is_top1=(z.argmax(-1) == safe).to(z.dtype),
    )
    return TokenLogps(*(torch.where(used, value, 0) for value in values))


TRANSFORMS = [
    {},
    {"logit_scale": 0.3},
    {"logit_softcap": 2.0},
    {"temperature": 1.7},
    {"logit_scale": 2.0, "logit_softcap": 3.0, "temperature": 0.6},
]


@pytest.mark.parametrize("shape", [(21,), (3, 7)], ids=["2-D", "3-D"])
@pytest.mark.parametrize("chunk_size", [None, 1, 4])
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_values_and_gradients(shape, chunk_size, transform):
    x = tensors(shape)
    mine = linear_logps(*x[:2], x[3], x[2], outputs=ALL, chunk_size=chunk_size, compiled=False, **transform)
    theirs = reference(*x, **transform)
    for name, a, b in zip(ALL, mine, theirs, strict=True):
        torch.testing.assert_close(a, b, msg=name)
    weights = torch.randn(3, *shape, dtype=torch.float64)
    total = [(w * torch.stack(list(v[:3]))).sum() for w, v in ((weights, mine), (weights, theirs))]
    for a, b in zip(*(torch.autograd.grad(t, x[:3]) for t in total), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ALL)
def test_one_output_alone(name):
    x = tensors()
    mine = linear_logps(*x[:2], x[3], x[2], outputs=name, compiled=False)
    assert [n for n, value in mine._asdict().items() if value is not None] == [name]
    torch.testing.assert_close(getattr(mine, name), getattr(reference(*x), name))
    assert getattr(mine, name).requires_grad == (name in ("logps", "lse", "entropy"))


def test_any_code_may_follow():
    x = tensors()

    def loss(logps):
        ratio = torch.exp(logps - logps.detach() * 0.9)
        return torch.minimum(ratio, ratio.clamp(0.8, 1.2)).pow(2).mean() + logps.std()

    mine, theirs = loss(linear_logps(*x[:2], x[3], x[2], compiled=False).logps), loss(reference(*x).logps)
    torch.testing.assert_close(mine, theirs)
    for a, b in zip(torch.autograd.grad(mine, x[:3]), torch.autograd.grad(theirs, x[:3]), strict=True):
        torch.testing.assert_close(a, b)


def test_a_lora_head():
    hidden, weight, bias, target = tensors()
    weight = weight.detach()
    down, up = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 5), (13, 2)))
    mine = linear_logps(hidden, weight, target, bias, extra=((hidden @ down.T, up),), compiled=False).logps.sum()
    theirs = reference(hidden, weight + up @ down, bias, target).logps.sum()
    torch.testing.assert_close(mine, theirs)
    leaves = (hidden, down, up, bias)
    for a, b in zip(torch.autograd.grad(mine, leaves), torch.autograd.grad(theirs, leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_no_grad():
    x = tensors()
    with torch.no_grad():
        assert not linear_logps(*x[:2], x[3], x[2], compiled=False).logps.requires_grad


@pytest.mark.slow
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_compiled(transform):
    x = tensors((40,), v=5000)
    mine = linear_logps(*x[:2], x[3], x[2], outputs=ALL, chunk_size=16, **transform)
    for a, b in zip(mine, reference(*x, **transform), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_kernels_on_a_gpu(dtype, transform):
    x = [t.detach().cuda() for t in tensors((64,), h=32, v=5003, dtype=torch.float32)]
    x[:3] = [t.to(dtype).mul_(0.3).requires_grad_() for t in x[:3]]
    exact = [*(t.detach().double().requires_grad_() for t in x[:3]), x[3]]
    mine = linear_logps(*x[:2], x[3], x[2], outputs=ALL, chunk_size=48, **transform)
    theirs = reference(*exact, **transform)
    tolerance = {torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
    for a, b in zip(mine[:5], theirs[:5], strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)
    totals = [v.logps.mean() - 0.5 * v.entropy.mean() + 0.1 * v.lse.mean() for v in (mine, theirs)]
    found = torch.autograd.grad(totals[0], x[:3])
    for a, b in zip(found, torch.autograd.grad(totals[1], exact[:3]), strict=True):
        assert (a.double() - b).norm() / b.norm() < tolerance


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"outputs": ("logps", "perplexity")}, ValueError, "perplexity"),
        ({"outputs": ()}, ValueError, "expected outputs among"),
        ({"temperature": 0.0}, ValueError, "temperature to be a positive"),
        ({"temperature": float("nan")}, ValueError, "temperature to be a positive"),
        ({"logit_softcap": -1.0}, ValueError, "softcap to be a positive"),
        ({"target": torch.full((3, 7), 13)}, ValueError, r"\[0, 13\)"),
        ({"target": torch.full((3, 7), -1)}, ValueError, r"\[0, 13\)"),
        ({"target": torch.zeros(3, 6, dtype=torch.long)}, ValueError, r"shape \(3, 7"),
        ({"target": torch.zeros(3, 7)}, TypeError, "integers"),
        ({"bias": torch.zeros(12, dtype=torch.float64)}, ValueError, r"bias of shape \(13,\)"),
        ({"chunk_size": 0}, ValueError, "chunk_size to be a positive integer"),
        ({"weight": torch.zeros(13, 4, dtype=torch.float64)}, ValueError, r"weight of shape \(V, 5\)"),
        ({"weight": torch.zeros(13, 5)}, TypeError, "one dtype"),
    ],
)
def test_bad_input(change, error, words):
    hidden, weight, bias, target = tensors()
    arguments = {"hidden": hidden, "weight": weight, "target": target, "bias": bias, "compiled": False} | change
    with pytest.raises(error, match=words):
        linear_logps(**arguments)
