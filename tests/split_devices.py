"""A model whose head is on dev:1 and whose inputs are on dev:0, of fake tensors: no such device is needed.

The backbone is replaced by its result, which accelerate leaves on the head's side; all else is the package's own path.
The loss is one that says where things are, since those of the package look at values.
"""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import head_ranks
import lm_parts
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from chunked_embed import Head, LossOutput


def main() -> None:
    _setup_privateuseone_for_python_backend("dev")
    there, here = torch.device("dev:1"), torch.device("dev:0")
    model = lm_parts.make("Llama").float()
    trainer = head_ranks.trainer(model)
    seen: list[torch.device] = []

    def loss(head: Head, teacher: Head, *, target: Tensor, given: dict[str, Tensor], kl: Tensor, number: float) -> Any:
        tensors = [head.hidden, head.weight, teacher.hidden, teacher.weight, target, given["ref"], kl]
        seen.extend(x.device for x in tensors)
        assert number == 2.0
        value = (head.hidden.sum() * kl.sum()).requires_grad_()
        return LossOutput(value, {"kl": kl.mean()}, {"kl": (target != -100).sum()})

    with FakeTensorMode(allow_non_fake_inputs=True):
        model.lm_head.weight = torch.nn.Parameter(torch.randn(64, 16, device=there))
        model.model.forward = lambda **_: SimpleNamespace(
            last_hidden_state=torch.randn(4, 9, 16, device=there),
            router_logits=(torch.randn(36, 2, device=here),),
        )
        ids = torch.randint(3, 64, (4, 9), device=here)
        target = torch.randint(3, 64, (4, 8), device=here)
        teacher = Head(torch.randn(4, 8, 5, device=here), torch.randn(64, 5, device=here))
        more = {"given": {"ref": torch.zeros(4, device=here)}, "kl": torch.zeros(4, device=here), "number": 2.0}
        for weight in (0.0, 0.1):
            type(trainer).aux_loss_weight = property(lambda self, weight=weight: weight)
            model.config.num_local_experts, model.config.num_experts_per_tok = 2, 1
            for call in range(2):
                with warnings.catch_warnings(record=True) as said:
                    warnings.simplefilter("always")
                    out = trainer.run_loss(model, {"input_ids": ids}, target, loss, teacher, **more)
                warned = [str(w.message) for w in said if "frozen model" in str(w.message)]
                assert len(warned) == (call == 0 and weight == 0.0), warned
            assert set(seen) == {there}, seen
            results = [out.loss, *out.metrics.values(), *out.counts.values()]
            assert {x.device for x in results} == {here}, results
            assert ("aux_loss" in out.metrics) == bool(weight)
            assert out.loss.requires_grad
        head = trainer.frozen_head(model, {"input_ids": ids}, target)
        assert head.hidden.device == head.weight.device == there and head.hidden.shape == (4, 8, 16)
