"""What each of two gloo processes runs: the trainers under DDP, and a loss in a model sharded by FSDP2."""

from __future__ import annotations

import gc
import os
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

WORLD = 2
KINDS = ("dpo", "kto", "cpo", "orpo", "online")
SAMPLED = ("grpo", "rloo")
DROPPING = ("cpo", "orpo")  # rows that fill up a last batch; TRL's others count them
LAYOUTS = ("accelerate", "root only", "head alone")


def train(kind: str, ours: bool, folder: str, world: int) -> dict[str, Any]:
    """Weights and logs of two steps of eight, and of an evaluation of six."""
    import trl_zoo

    args = {"per_device_train_batch_size": 8 // world, "max_steps": 2, "eval_strategy": "no"}
    if world > 1:
        args["ddp_backend"] = "gloo"
    model = trl_zoo.parts.model(torch.float64 if ours else torch.float32)
    data = (trl_zoo.KINDS | trl_zoo.SAMPLING)[kind].data(16)
    trainer = trl_zoo.make(kind, ours, Path(folder), model=model, data=data, args=args)
    if kind in trl_zoo.SAMPLING:
        trl_zoo.parts.seeded(trainer)
    trainer.train()
    evaluated = trainer.evaluate() if kind in DROPPING else {}
    return {"weights": dict(trainer.model.state_dict()), "logs": trainer.state.log_history, "evaluated": evaluated}


def sample(kind: str, ours: bool, folder: str) -> dict[str, Any]:
    """Weights and logs of steps on completions that the policy samples: of unlike ones on each process."""
    import trl_zoo

    args: dict[str, Any] = {"max_steps": 4, "ddp_backend": "gloo", "num_iterations": 2, "learning_rate": 0.1}
    if kind == "grpo":
        args |= {"top_entropy_quantile": 0.5, "entropy_coef": 0.1, "gradient_accumulation_steps": 2}
    trainer = trl_zoo.trained(kind, ours, Path(folder), model=trl_zoo.parts.model(), args=args)
    return {"weights": dict(trainer.model.state_dict()), "logs": trainer.state.log_history}


def run_trainers(rank: int, port: int, folder: str) -> None:
    _join(rank, port)
    found = {(kind, ours): train(kind, ours, folder, WORLD) for kind in KINDS for ours in (False, True)}
    found |= {(kind, ours): sample(kind, ours, folder) for kind in SAMPLED for ours in (False, True)}
    torch.save(found, Path(folder) / f"trained-{rank}.pt")
    gc.collect()  # a DDP model that outlives its group destroys it holding the GIL, for which gloo's thread may wait
    dist.destroy_process_group()


def _join(rank: int, port: int) -> None:
    warnings.simplefilter("ignore")  # third parties' warnings are errors in the tests of one process
    torch.set_num_threads(1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "LOCAL_WORLD_SIZE": WORLD}
    os.environ |= {name: str(value) for name, value in names.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


# --- FSDP2 -----------------------------------------------------------------------------------------------------------


def batch(rank: int | None) -> dict[str, Tensor]:
    """Pairs, chosen first: of one rank, or of both."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, 64, (2, 2, WORLD, 9), generator=generator)  # side, pair, rank, token
    ids = ids if rank is None else ids[:, :, rank : rank + 1]
    ids = ids.transpose(1, 2).reshape(-1, 9)
    target = ids.clone()
    target[:, :3] = -100
    return {"input_ids": ids, "target": target[:, 1:]}


def preference_loss(model: Any, data: dict[str, Tensor], primitive: bool) -> Tensor:
    from alignment import SimPOLoss

    target = data["target"]
    loss = SimPOLoss(beta=2.0, compiled=False)

    def fn(head: Any) -> Any:
        head = head.shifted()
        if primitive:  # forms the logits again in backward
            return -head.logps(target, compiled=False).mean(1).mean()
        return loss(head, target=target)

    value = model(input_ids=data["input_ids"], head_fn=fn).value
    return value if primitive else value.loss


def gradients(model: Any, data: dict[str, Tensor], primitive: bool) -> dict[str, Tensor]:
    from torch.distributed.tensor import DTensor

    for _ in range(2):  # a second step, since hooks have states
        model.zero_grad()
        preference_loss(model, data, primitive).backward()
    grown = {name: p.grad for name, p in model.named_parameters()}
    return {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in grown.items() if g is not None}


def check_fsdp(name: str, rank: int) -> None:
    """Gradients equal those of one process with both batches, in the ways in which people shard a model."""
    import trl_parts as parts
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    from chunked_embed import causal_lm

    layout, primitive = name.rsplit(", ", 1)
    alone = parts.model(torch.float64)
    causal_lm.attach(alone)
    expected = gradients(alone, batch(None), primitive == "linear_logps")
    model = parts.model(torch.float64)
    causal_lm.attach(model)
    mesh = init_device_mesh("cpu", (WORLD,))
    policy = MixedPrecisionPolicy(output_dtype=torch.bfloat16)  # of what leaves the head or the model
    if layout == "accelerate":
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model.model.embed_tokens, mesh=mesh)
        fully_shard([model.model.norm, model.lm_head], mesh=mesh, reshard_after_forward=False)
    if layout == "head alone":
        fully_shard(model.lm_head, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    found = gradients(model, batch(rank), primitive == "linear_logps")
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-12, msg=lambda text, key=key: f"{key}: {text}")
