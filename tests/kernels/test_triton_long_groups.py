"""A preference loss whose kernel scores pairs longer than a chunk, against float64: on a GPU, else through Triton's
interpreter."""

import pytest
import torch
import torch.nn.functional as F
from kernel_device import DEVICE, INTERPRETED, MARKS

from chunked_embed import Projection, TokenStatistics

pytestmark = MARKS

LENGTHS = (40, 33, 5, 2, 0, 30, 4, 0)  # of the segments, two to a pair
NAMES = ("logps", "entropy")


class DPO(TokenStatistics):
    def __init__(self, **options):
        super().__init__(NAMES, gradients_of=("logps",), segments_per_group=2, separate_outputs=True, **options)

    def loss_fn(self, scores, groups):
        ratio = scores["policy"]["logps"] - scores["reference"]["logps"]
        return -F.logsigmoid(0.1 * (ratio[:, 0] - ratio[:, 1])), {"entropy": scores["policy"]["entropy"]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16]))
def test_pairs(dtype):
    g = torch.Generator().manual_seed(0)
    rows, width, columns = sum(LENGTHS) + 50, 16, 203
    ids = torch.cat([torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS)), torch.full((50,), -1)])
    ids = ids[torch.randperm(rows, generator=g)].to(DEVICE)
    target = torch.randint(columns, (rows,), generator=g).to(DEVICE)
    given = [torch.randn(n, width, generator=g).to(DEVICE, dtype) for n in (rows, columns, rows, columns)]
    hidden, weight, other, other_weight = given
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    sides = {"policy": Projection(hidden, weight), "reference": Projection(other, other_weight)}
    found = {}
    for chunk_size in (16, 200):
        loss = DPO(chunk_size=chunk_size)
        named = {"segments": ids, "group_weight": torch.full((len(LENGTHS) // 2,), 0.25, device=DEVICE)}
        plan = loss.plan(sides, {"target": target}, **named)
        assert (plan.ahead, plan.passes, plan.products) == ("logps" if chunk_size == 16 else None, 1, 4)
        out = loss(sides, {"target": target}, **named)
        found[chunk_size] = [out.metrics["entropy"], *torch.autograd.grad(out.loss, leaves)]
    used, wide = ids >= 0, [t.detach().double().requires_grad_() for t in given]
    z = [wide[n] @ wide[n + 1].T for n in (0, 2)]
    logps = [x.log_softmax(1).gather(1, target[:, None])[:, 0] for x in z]
    entropy = -(z[0].softmax(1) * z[0].log_softmax(1)).sum(1)

    def sums(x):
        return x.new_zeros(len(LENGTHS)).index_add(0, ids[used], x[used]).view(-1, 2)

    ratio = sums(logps[0] - logps[1])
    truth = [sums(entropy), *torch.autograd.grad(-F.logsigmoid(0.1 * (ratio[:, 0] - ratio[:, 1])).mean(), wide[:2])]
    bound = 1e-5 if dtype == torch.float32 else 0.5 * torch.finfo(dtype).eps
    for mine in found.values():
        for value, right in zip(mine, truth, strict=True):
            assert (value.double() - right).norm() < bound * right.norm()
