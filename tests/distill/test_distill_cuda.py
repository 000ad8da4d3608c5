"""Divergences compiled for a GPU against the plain functions in float64 on a CPU."""

from __future__ import annotations

import pytest
import torch
from distill_zoo import CASES, learning, make

from distill import DistillLoss, TopKLoss

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")]
SIZES = {"v": 1003, "vt": 1003}


def moved(x, device, dtype):
    return {
        name: t.detach().to(device, dtype if t.is_floating_point() else t.dtype).requires_grad_(t.requires_grad)
        for name, t in x.items()
    }


def compare(make_loss, here, bound):
    there = moved(here, "cpu", torch.float64)
    ours, truth = make_loss(chunk_size=256)(**here), make_loss(compiled=False)(**there)
    torch.testing.assert_close(ours.loss.double().cpu(), truth.loss, rtol=bound, atol=bound * 1e-2)
    found, expected = (torch.autograd.grad(out.loss, learning(x)) for out, x in ((ours, here), (truth, there)))
    for grad, right in zip(found, expected, strict=True):
        assert (grad.double().cpu() - right).norm() <= bound * right.norm()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_plain_function(name, dtype, bound):
    here = moved(make(4, 150, **SIZES), "cuda", dtype)
    compare(lambda **options: CASES[name].loss(weight_hard=0.3, temperature=1.5, **options), here, bound)


def test_several_terms():
    here = moved(make(4, 150, **SIZES), "cuda", torch.bfloat16)
    terms = [("ce", 0.5), ("reverse_kl", 0.4), ("tvd", 0.1), ("jsd", 0.3, {"beta": 0.2})]
    compare(lambda **options: DistillLoss(terms, report=("student_entropy",), **options), here, 2e-2)


@pytest.mark.parametrize("tail", ["bucket", "renorm", "zero"])
def test_a_teacher_of_few_tokens(tail):
    x = make(4, 150, **SIZES)
    logprobs = (x["teacher_hidden"] @ x["teacher_weight"].T + x["teacher_bias"]).log_softmax(-1)
    x = {name: t for name, t in x.items() if "teacher" not in name}
    x["teacher_logprobs"], x["teacher_ids"] = logprobs.topk(8)
    compare(lambda **options: TopKLoss(tail=tail, weight_hard=0.2, **options), moved(x, "cuda", torch.bfloat16), 2e-2)
