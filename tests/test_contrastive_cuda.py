"""The similarity losses on a GPU, kernels and compiled steps alike, against the plain functions in float64 on a CPU."""

from __future__ import annotations

import pytest
import torch

from chunked_embed import functional as CF

pytestmark = pytest.mark.gpu
ROWS, WIDTH = 4500, 64  # more than one chunk, and a ragged last one
TWO = ("query_to_doc", "doc_to_query")
FOUR = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")


def ids(x):
    return (torch.arange(ROWS, device=x.device) * 7919) % 4001


CASES = {
    "one direction": lambda q, d, n, **o: CF.info_nce(q, d, hard_negatives=[n], **o),
    "symmetric": lambda q, d, n, **o: CF.info_nce(q, d, directions=TWO, partition_mode="per_direction", **o),
    "two, joint, hard negatives": lambda q, d, n, **o: CF.info_nce(q, d, hard_negatives=[n], directions=TWO, **o),
    "four": lambda q, d, n, **o: CF.info_nce(q, d, hard_negatives=[n], directions=FOUR, **o),
    "dot": lambda q, d, n, **o: CF.info_nce(q, d, similarity="dot", scale=0.5, **o),
    "masked": lambda q, d, n, **o: CF.info_nce(q, d, hard_negatives=[n], query_ids=ids(q), **o),
    "masked, symmetric": lambda q, d, n, **o: CF.info_nce(q, d, directions=TWO, document_ids=ids(q), **o),
    "hardness": lambda q, d, n, **o: CF.info_nce(q, d, hardness_mode="all_negatives", hardness_strength=2.0, **o),
    "sigmoid": lambda q, d, n, **o: CF.sigmoid_pairs(q, d, scale=9.0, bias=-6.0, **o),
    "mega batch": lambda q, d, n, **o: CF.mega_batch_margin(q, d, **o),
}


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_plain_function(case, dtype, bound):
    generator = torch.Generator().manual_seed(0)
    sides = [torch.randn(ROWS, WIDTH, generator=generator) for _ in range(3)]
    sides[1] = sides[1] + sides[0]
    here = [side.to(dtype).cuda().requires_grad_() for side in sides]
    there = [side.detach().double().cpu().requires_grad_() for side in here]
    ours, truth = CASES[case](*here, chunk_size=1000), CASES[case](*there, compiled=False)
    torch.testing.assert_close(ours.double().cpu(), truth, rtol=bound, atol=bound)
    found, expected = (
        torch.autograd.grad(loss, side, allow_unused=True) for loss, side in ((ours, here), (truth, there))
    )
    for grad, right in zip(found, expected, strict=True):
        assert (grad is None) == (right is None)
        if right is not None:
            assert (grad.double().cpu() - right).norm() <= bound * right.norm()


@pytest.mark.parametrize("which", ["info_nce", "sigmoid_pairs"])
def test_scale_and_bias_learn(which):
    generator = torch.Generator().manual_seed(0)
    numbers = {"scale": torch.tensor(7.0), "bias": torch.tensor(-3.0)}
    if which == "info_nce":
        del numbers["bias"]
    a, b = (torch.randn(ROWS, WIDTH, generator=generator) for _ in range(2))
    here = {name: x.cuda().requires_grad_() for name, x in numbers.items()}
    there = {name: x.double().requires_grad_() for name, x in numbers.items()}
    ours = getattr(CF, which)(a.cuda(), b.cuda(), chunk_size=1000, **here)
    truth = getattr(CF, which)(a.double(), b.double(), compiled=False, **there)
    found, expected = (torch.autograd.grad(x, list(y.values())) for x, y in ((ours, here), (truth, there)))
    torch.testing.assert_close([g.double().cpu() for g in found], list(expected), rtol=1e-3, atol=1e-5)
