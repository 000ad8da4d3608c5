"""What each of two gloo processes runs: an attached sparse encoder under DDP and FSDP, against one process with both
batches and the library's head."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
import torch.distributed as dist
from sentence_transformers import SparseEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sparse_encoder.modules import SpladePooling
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from chunked_embed import sparse

WORLD = 2
NAMES = ["DDP, tied", "FSDP1, by layer, tied", "FSDP1, the head too", "FSDP2, the head too"]
TEXTS = ["a cat sits", "the big old dog runs under the tree", "sea", "red bird over the blue sea sits"]


def build(
    path: str,
    pooling: str = "max",
    activation: str = "relu",
    dtype: torch.dtype = torch.float64,
    module: type[Transformer] = Transformer,
) -> SparseEncoder:
    encoder = module(path, transformer_task="fill-mask")
    model = SparseEncoder(modules=[encoder, SpladePooling(pooling, activation)], device="cpu")
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    return model.to(dtype).train()


def layers(model: SparseEncoder, head: bool) -> list[nn.Module]:
    inner = model[0].model
    return [*inner.bert.encoder.layer, *([inner.get_output_embeddings()] if head else [])]


def sharded(model: SparseEncoder, name: str) -> Any:
    if "DDP" in name:
        return DistributedDataParallel(model)
    units = layers(model, "head" in name)
    if "FSDP1" in name:

        def policy(module: nn.Module, recurse: bool, **_: Any) -> bool:
            return recurse or any(module is unit for unit in units)

        options = {"use_orig_params": True, "device_id": torch.device("cpu")}
        return FullyShardedDataParallel(model, auto_wrap_policy=policy, **options)
    mesh = dist.device_mesh.init_device_mesh("cpu", (WORLD,))
    for unit in units:
        fully_shard(unit, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def step(model: Any, features: dict[str, Any], rows: slice) -> None:
    found = model(dict(features))["sentence_embedding"]
    signs = torch.randn(len(TEXTS), found.shape[1], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (found * signs[rows]).sum().div(len(found)).backward()


def weights(model: Any) -> dict[str, Tensor]:
    named = ((n.replace("_fsdp_wrapped_module.", "").removeprefix("module."), p) for n, p in model.named_parameters())
    return {n: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for n, p in named}


def check(name: str, rank: int, tied: str, untied: str) -> None:
    warnings.simplefilter("ignore")
    alone = build(tied if "tied" in name else untied)
    mine = copy.deepcopy(alone)
    sparse.attach(mine)
    rows = slice(2 * rank, 2 * rank + 2)
    batch, own = alone.preprocess(TEXTS), alone.preprocess(TEXTS[rows])
    before = weights(alone)
    model = sharded(mine, name)
    for m, features, part in ((alone, batch, slice(None)), (model, own, rows)):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
        for _ in range(2):  # hooks have states
            optimizer.zero_grad()
            step(m, features, part)
            optimizer.step()
    if "FSDP1" in name:
        with FullyShardedDataParallel.summon_full_params(model):
            found = weights(model)
    else:
        found = weights(model)
    for key, value in weights(alone).items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-11, msg=lambda text, key=key: f"{key}: {text}")
    assert sum((found[key] - value).abs().sum() for key, value in before.items()) > 0.1
    dist.barrier()
