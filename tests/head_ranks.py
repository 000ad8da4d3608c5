"""What each of two gloo processes runs: a loss in a model sharded by FSDP1, in the units in which people have it.

And what needs a process of its own, since it registers a device: a model split over two of them.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import lm_parts
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision

from chunked_embed import Head, causal_lm
from chunked_embed.trainers import HeadTrainer

WORLD = 2
SPLIT = "on two devices"
# layout, parameters as they are or flat, what the loss does with the head, and more
NAMES = [
    "by layer, original, loss",
    "by layer, flat, logps",
    "by layer, flat, logps, bfloat16",
    "head, original, loss",
    "head, original, logps",
    "head, original, loss, bfloat16",
    "head, flat, loss",
    "head, original, loss, LoRA",
    "below the adapter, original, logps, LoRA",
    "all that learns, original, logps, LoRA",  # PEFT's own policy: A and B are units
    "all that learns, flat, loss, LoRA",
    SPLIT,  # the last: it registers a device
]
HALF = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def trainer(model: Any) -> Any:
    """Without a library: on one process."""
    found = HeadTrainer()
    found.model, found.args = model, SimpleNamespace(n_gpu=1)
    found.accelerator = SimpleNamespace(autocast=nullcontext, is_main_process=True)
    found.attach_model()
    return found


def made(lora: bool) -> Any:
    model = lm_parts.plain("Llama")
    if lora:
        import peft

        config = peft.LoraConfig(target_modules=["lm_head", "q_proj"], r=2, init_lora_weights=False)
        model = peft.get_peft_model(model, config).double()
    causal_lm.attach(model)
    return model


def batch(rank: int | None) -> Tensor:
    ids = torch.randint(3, 64, (2 * WORLD, 9), generator=torch.Generator().manual_seed(7))
    return ids if rank is None else ids[2 * rank : 2 * rank + 2]


def loss_of(model: Any, ids: Tensor, primitive: bool) -> Tensor:
    from distill import DistillLoss

    loss = DistillLoss([("ce", 1.0)], compiled=False)

    def fn(head: Head) -> Tensor:
        if primitive:  # forms the logits again in backward
            return -head.shifted().logps(ids[:, 1:], compiled=False).mean()
        return loss(head.shifted(), target=ids[:, 1:]).loss

    return model(input_ids=ids, head_fn=fn).value


def units(layout: str, model: Any) -> Any:
    """Which modules are sharded apart from the root."""
    head = causal_lm.unwrapped(model).get_output_embeddings()
    apart = {"head": head, "below the adapter": getattr(head, "base_layer", None)}.get(layout)

    def policy(module: Any, recurse: bool, **_: Any) -> bool:
        learns = not list(module.children()) and any(p.requires_grad for p in module.parameters())
        is_layer = type(module).__name__ == "LlamaDecoderLayer"
        return recurse or is_layer or module is apart or (layout == "all that learns" and learns)

    return policy


def weights(model: Any) -> dict[str, Tensor]:
    return {n.replace("_fsdp_wrapped_module.", ""): p.detach().clone() for n, p in model.named_parameters()}


def check(name: str, rank: int) -> None:
    """Weights behind two steps are those of one process with both batches, and what is captured is not a shard."""
    warnings.simplefilter("ignore")
    if name == SPLIT:
        import split_devices

        split_devices.main()
        return
    layout, parameters, primitive, *more = name.split(", ")
    close = {"rtol": 5e-2, "atol": 1e-2} if "bfloat16" in more else {"rtol": 1e-9, "atol": 1e-11}
    alone, model = made("LoRA" in more), made("LoRA" in more)
    options = {"use_orig_params": parameters == "original", "mixed_precision": HALF if "bfloat16" in more else None}
    policy = units(layout, model)
    model = FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=torch.device("cpu"), **options)
    causal_lm.attach(model)
    ids = batch(rank)
    causal_lm.check(model, {"input_ids": ids})
    head = causal_lm.capture(model, {"input_ids": ids})
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    torch.testing.assert_close(head.logits().double(), logits.double(), **close)

    for m, data in ((alone, batch(None)), (model, ids)):
        optimizer = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.3)
        for _ in range(2):  # hooks have states
            optimizer.zero_grad()
            loss_of(m, data, primitive == "logps").backward()
            optimizer.step()
    with FullyShardedDataParallel.summon_full_params(model):
        found = weights(model)
    before = weights(made("LoRA" in more))
    for key, value in weights(alone).items():
        torch.testing.assert_close(found[key], value, **close, msg=lambda text, key=key: f"{key}: {text}")
    assert sum((found[key] - value).abs().sum() for key, value in before.items()) > 0.1
    dist.barrier()
