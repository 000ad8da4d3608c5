"""What a call does before its first matrix product: on an idle GPU all of it is waited for."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import alignment
import distill

TOKENS, HIDDEN, VOCABULARY = (4, 6), 8, 31
aten = torch.ops.aten
FREE = {aten.view, aten._unsafe_view, aten.detach, aten.t, aten.slice, aten.select, aten.alias, aten.unsqueeze}
FREE |= {aten.expand, aten.as_strided, aten.empty, aten.lift_fresh, aten.split, aten.permute, aten.transpose}


class BeforeTheFirstProduct(TorchDispatchMode):
    """Counts operations that launch a kernel or copy, up to the first ``mm``."""

    def __init__(self):
        super().__init__()
        self.names = []
        self.done = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.done = self.done or func.overloadpacket in (aten.mm, aten.addmm)
        tensors = [t for t in args if isinstance(t, torch.Tensor)]
        on_host = any(t.dtype == torch.float64 and not t.dim() for t in tensors)
        if not self.done and not on_host and func.overloadpacket not in FREE:
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def operations(call):
    call()
    with BeforeTheFirstProduct() as counted:
        call()
    assert counted.done
    return counted.names


def tokens(ignored=0):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(*TOKENS, HIDDEN, generator=generator).requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator).requires_grad_()
    target = torch.randint(VOCABULARY, TOKENS, generator=generator)
    target[:, :ignored] = -100
    return hidden, weight, target


@pytest.mark.parametrize("ignored", [0, 2])
def test_few_operations_before_a_divergence(ignored):
    hidden, weight, target = tokens(ignored)
    loss = distill.JSDLoss(weight_hard=0.5, compiled=False)
    teacher = (hidden.detach() + 1, weight.detach() + 1)
    # The mask, its mean, the survey; and where tokens are ignored: which are used, and the gathers of them.
    names = operations(lambda: loss(hidden, weight, *teacher, target))
    assert len(names) <= 14 + 4 * bool(ignored), names


@pytest.mark.parametrize("ignored", [0, 2])
def test_few_operations_before_a_preference_loss(ignored):
    hidden, weight, target = tokens(ignored)
    loss = alignment.DPOLoss(compiled=False)
    reference = {"ref_hidden": hidden.detach() + 1, "ref_weight": weight.detach() + 1}
    names = operations(lambda: loss(hidden, weight, target, **reference))
    assert len(names) <= 36, names


def test_numbers_made_in_inference_mode_serve_training():
    hidden, weight, _ = tokens()
    loss = distill.JSDLoss(0.28125, compiled=False)
    teacher = (hidden.detach() + 1, weight.detach() + 1)
    with torch.inference_mode():
        value = loss(hidden, weight, *teacher).loss
    out = loss(hidden, weight, *teacher)
    out.loss.backward()
    torch.testing.assert_close(out.loss, value.clone())
    assert hidden.grad.abs().sum() > 0
