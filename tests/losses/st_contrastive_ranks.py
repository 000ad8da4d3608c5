"""What each gloo process runs for InfoNCE and its drop-ins: uneven shards against one process with the whole batch."""

from __future__ import annotations

import gc
import math
import os
from itertools import product
from typing import NamedTuple

import st_gather_ranks
import torch
import torch.distributed as dist
from sentence_transformers import util
from sentence_transformers.sentence_transformer import losses as library
from sentence_transformers.sentence_transformer.modules import Normalize
from st_parts import EXACT, assert_same, build, dense, features, sentences, value_and_grads
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from chunked_embed import functional as CF
from chunked_embed import losses

ROWS = 9
SHARDS = {2: [slice(0, 6), slice(6, 9)], 3: [slice(0, 5), slice(5, 6), slice(6, 9)]}
ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
BOTH = ("query_to_doc", "doc_to_query")
EXACTLY = {"rtol": 1e-9, "atol": 1e-12}


def manhattan(a: Tensor, b: Tensor) -> Tensor:
    return -torch.cdist(a, b, p=1)


WAYS: dict[str, dict] = {
    "one": {},
    "each": {"directions": BOTH, "partition_mode": "per_direction"},
    "joint": {"directions": BOTH},
    "four": {"directions": ALL},
}
EXTRAS: dict[str, dict] = {
    "plain": {},
    "negatives": {"negatives": 2, "hardness_mode": "all_negatives", "hardness_strength": 2.0},
    "dot": {"negatives": 1, "similarity": "dot", "scale": 0.5},
    "custom": {"negatives": 1, "similarity": manhattan, "scale": 0.5},
    "queries": {"negatives": 1, "known": ("query_ids",)},
    "documents": {"negatives": 1, "known": ("document_ids",)},
    "known": {"negatives": 1, "known": ("query_ids", "document_ids", "false_negatives")},
    "positions": {"negatives": 1, "known": ("positions",)},
    "shared": {"negatives": 1, "known": ("query_ids", "document_ids"), "shared_ids": True},
    "customknown": {"similarity": manhattan, "scale": 0.5, "known": ("query_ids", "document_ids")},
    "learns": {"negatives": 1, "learns": True, "hardness_mode": "in_batch_negatives", "hardness_strength": 2.0},
}

# name: (columns, the name of the class, its options)
DROPINS: dict[str, tuple[int, str, dict]] = {
    "one": (2, "MultipleNegativesRankingLoss", {}),
    "symmetric": (3, "MultipleNegativesSymmetricRankingLoss", {}),
    "joint": (2, "MultipleNegativesRankingLoss", WAYS["joint"]),
    "four": (3, "MultipleNegativesRankingLoss", WAYS["four"]),
    "hard": (
        4, "MultipleNegativesRankingLoss", {"hardness_mode": "hard_negatives", "hardness_strength": 5.0},
    ),
    "custom": (3, "MultipleNegativesRankingLoss", {"scale": 0.5, "similarity_fct": manhattan, **WAYS["each"]}),
    "dot": (3, "MultipleNegativesRankingLoss", {"scale": 0.5, "similarity_fct": util.dot_score, **WAYS["each"]}),
    "text": (3, "MultipleNegativesRankingLoss", {"false_negatives": "text", **WAYS["each"]}),
    "labels": (3, "MultipleNegativesRankingLoss", {"false_negatives": "labels", **WAYS["four"]}),
    "learns": (3, "MultipleNegativesRankingLoss", {"learnable_scale": True, **WAYS["each"]}),
}  # fmt: skip
OURS_ONLY = ("text", "labels", "learns")
MODES: dict[str, dict] = {"plain": {"fuse_projection": False}, "fused": {}}
if EXACT:  # before 6.2 every mini-batch is a collective, and ranks with unlike numbers of them wait for ever
    MODES["cached"] = {"mini_batch_size": 2}


def names() -> list[str]:
    functional = [f"tensors-{way}-{extra}" for way, extra in product(WAYS, EXTRAS)]
    local = [f"local-{way}-{extra}" for way, extra in product(WAYS, ("plain", "positions"))]
    dropins = [f"dropin-{case}-{mode}" for case, mode in product(DROPINS, MODES)]
    matryoshka = [f"matryoshka-one-{mode}" for mode in MODES]
    return [*st_gather_ranks.names(), *functional, *local, *dropins, *matryoshka]


def check(name: str, rank: int, folder: str) -> None:
    kind, case, extra = name.split("-")
    checks = {
        "gather": st_gather_ranks.check,
        "tensors": check_tensors,
        "local": check_local,
        "dropin": check_dropin,
        "matryoshka": check_matryoshka,
    }
    checks[kind](case, extra, folder)


def own_shard() -> slice:
    return SHARDS[dist.get_world_size()][dist.get_rank()]


def mean_over_ranks(value: Tensor) -> Tensor:
    value = value.detach().clone()
    dist.all_reduce(value)
    return value / dist.get_world_size()


# --- the function -----------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    sides: list[Tensor]
    options: dict
    ids: dict[str, Tensor]

    def part(self, shard: slice) -> Batch:
        ids = {name: tensor[shard] for name, tensor in self.ids.items()}
        if "false_negatives" in ids and "document_ids" not in ids:  # positions: of this process's own rows
            ids["false_negatives"] = own_positions(ids["false_negatives"], shard)
        return Batch([side.detach()[shard].requires_grad_() for side in self.sides], self.options, ids)

    def loss(self, scale: Tensor | float, **options) -> Tensor:
        sides = {"hard_negatives": self.sides[2:], "scale": scale, "compiled": False, "chunk_size": 2}
        return CF.info_nce(*self.sides[:2], **sides, **self.options, **self.ids, **options)


def own_positions(positions: Tensor, shard: slice) -> Tensor:
    """Of k * ROWS + j, those with j in the shard, counted in the shard; -1 for any others."""
    length = shard.stop - shard.start
    k, j = positions // ROWS, positions % ROWS
    own = (positions >= 0) & (j >= shard.start) & (j < shard.stop)
    return torch.where(own, k * length + j - shard.start, -1)


def a_batch(way: str, extra: str) -> tuple[Batch, float, bool]:
    generator = torch.Generator().manual_seed(3)
    given = {**WAYS[way], **EXTRAS[extra]}
    lists = 1 + given.pop("negatives", 0)
    sides = [torch.randn(ROWS, 6, generator=generator, dtype=torch.float64) for _ in range(1 + lists)]
    known = given.pop("known", ())
    ids = {
        "query_ids": torch.randint(0, 5, (ROWS,), generator=generator),
        "document_ids": torch.randint(0, 7, (ROWS, lists), generator=generator),
        "false_negatives": torch.randint(-1, 7, (ROWS, 2), generator=generator),
    }
    if extra == "documents":
        ids["document_ids"] = ids["document_ids"][:, 0]
    chosen = {name: ids[name] for name in known if name in ids}
    if "positions" in known:  # all of a query's are in its own shard, of either world
        start = torch.tensor([0, 0, 0, 0, 0, 5, 6, 6, 6])
        length = torch.tensor([5, 5, 5, 5, 5, 1, 3, 3, 3])
        within = torch.randint(0, 12, (2, ROWS), generator=generator) % length
        chosen["false_negatives"] = torch.stack([start + within[0], ROWS + start + within[1]], 1)
    scale, learns = given.pop("scale", 7.0), given.pop("learns", False)
    return Batch([side.requires_grad_() for side in sides], given, chosen), scale, learns


def check_tensors(way: str, extra: str, folder: str) -> None:
    """Each rank's loss averages to the whole one; so do gradients, of which a rank holds the sum for its own rows."""
    world, shard = dist.get_world_size(), own_shard()
    batch, scale, learns = a_batch(way, extra)
    scales = [torch.tensor(scale, dtype=torch.float64, requires_grad=True) for _ in range(2)] if learns else [scale] * 2
    whole = batch.loss(scales[0])
    (2 * whole).backward()
    part = batch.part(shard)
    mine = part.loss(scales[1], gather_across_devices=True)
    (2 * mine).backward()
    torch.testing.assert_close(mean_over_ranks(mine), whole.detach(), **EXACTLY)
    for own, all_ in zip(part.sides, batch.sides, strict=True):
        expected = torch.zeros_like(all_) if all_.grad is None else all_.grad
        got = torch.zeros_like(own) if own.grad is None else own.grad / world
        torch.testing.assert_close(got, expected[shard], **EXACTLY)
    if learns:
        torch.testing.assert_close(mean_over_ranks(scales[1].grad), scales[0].grad, **EXACTLY)
    with torch.no_grad():
        torch.testing.assert_close(part.loss(scale, gather_across_devices=True), mine.detach(), **EXACTLY)


def check_local(way: str, extra: str, folder: str) -> None:
    """Without gathering nobody asks for anything of another process: one of them may run alone."""
    batch, scale, _ = a_batch(way, extra)
    part = batch.part(own_shard())
    if extra == "plain":
        options = {"directions": ("query_to_doc",), **batch.options}
        theirs = library.MultipleNegativesRankingLoss(nn.Identity(), scale, **options)
        expected = theirs.compute_loss_from_embeddings(part.sides, None)
    else:  # with ids for positions
        n = len(part.sides[0])
        ids = {"document_ids": torch.arange(n * (len(part.sides) - 1)).view(-1, n).t()}
        expected = Batch(part.sides, part.options, {**part.ids, **ids, "query_ids": torch.arange(n)}).loss(scale)
    if dist.get_rank() == dist.get_world_size() - 1:
        return
    mine = part.loss(scale)
    torch.testing.assert_close(mine, expected, **EXACTLY)
    both = [torch.autograd.grad(x, part.sides, allow_unused=True, materialize_grads=True) for x in (mine, expected)]
    torch.testing.assert_close(both[0], tuple(grad.nan_to_num() for grad in both[1]), **EXACTLY)


# --- the drop-ins -----------------------------------------------------------------------------------------------------


def a_model(folder: str) -> nn.Module:
    model = build(folder, dense(), Normalize())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("pooler" not in name)  # BERT's own pooler has no use here: DDP would wait for it
    return model


def texts(column: int) -> list[str]:
    """With repetitions, across shards and columns, too."""
    words = sentences(ROWS, column)
    words[8], words[5], words[4] = words[0], words[3], words[0]
    words[7 - column], words[2] = sentences(ROWS, 0)[1], sentences(ROWS, 1)[6]
    return words


def batches(model: nn.Module, case: str, columns: int) -> tuple[list[dict], list[dict]]:
    if case != "text":
        return features(model, ROWS, columns), features(model, ROWS, columns, rows=own_shard())
    return tuple([model.preprocess(texts(c)[rows]) for c in range(columns)] for rows in (slice(None), own_shard()))


def parallel(loss: nn.Module, model: nn.Module) -> nn.Module:
    wrapped = DistributedDataParallel(model)
    for part in (loss, getattr(loss, "loss", None)):
        if part is not None:
            part.model = wrapped
    return loss


def check_dropin(case: str, mode: str, folder: str) -> None:
    columns, name, options = DROPINS[case]
    model = a_model(folder)
    whole, part = batches(model, case, columns)
    labels = torch.tensor([0, 1, 2, 0, 3, 4, 1, 1, 0])
    if case in OURS_ONLY:
        reference = getattr(losses, name)(model, compiled=False, **options).double()
    else:
        reference = getattr(library, name)(model, **options)
    expected = value_and_grads(reference, model, whole, labels, upstream=2.0)
    loss = getattr(losses, name)(model, compiled=False, gather_across_devices=True, **options, **MODES[mode]).double()
    value, grads = value_and_grads(parallel(loss, model), model, part, labels[own_shard()], upstream=2.0)
    assert_same((mean_over_ranks(value), grads), expected)
    if case == "learns":
        torch.testing.assert_close(loss.log_scale.grad, reference.log_scale.grad, **EXACTLY)
    with torch.no_grad():
        again = loss([dict(column) for column in part], labels[own_shard()])
    torch.testing.assert_close(again, value)


def check_matryoshka(case: str, mode: str, folder: str) -> None:
    model = build(folder, dense())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("pooler" not in name)
    whole, part = batches(model, case, 3)
    reference = library.MatryoshkaLoss(model, library.MultipleNegativesRankingLoss(model), [12, 6, 2])
    expected = value_and_grads(reference, model, whole, None)
    inner = losses.MultipleNegativesRankingLoss(model, compiled=False, gather_across_devices=True, **MODES[mode])
    loss = parallel(losses.MatryoshkaLoss(model, inner, [12, 6, 2]), model)
    value, grads = value_and_grads(loss, model, part, None)
    assert_same((mean_over_ranks(value), grads), expected)


# --- the trainer ------------------------------------------------------------------------------------------------------

TRAINED: dict[str, dict] = {
    "plain": {},
    "each": {**WAYS["each"], "learnable_scale": True},
    "cached": {"mini_batch_size": 3, "learnable_scale": True, "false_negatives": "text"},
}


def train(case: str, folder: str, scratch: str, world: int) -> dict[str, Tensor]:
    """Two steps of plain gradient descent on eight rows each, whatever the number of processes."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

    model = a_model(folder)
    loss = losses.MultipleNegativesRankingLoss(model, compiled=False, gather_across_devices=True, **TRAINED[case])
    data = Dataset.from_dict({f"text_{i}": sentences(16, i) for i in range(3)})
    args = SentenceTransformerTrainingArguments(
        output_dir=f"{scratch}/run-{case}-{world}",
        max_steps=2,
        per_device_train_batch_size=8 // world,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
    )
    trainer = SentenceTransformerTrainer(model=model, args=args, train_dataset=data, loss=loss)
    assert args.world_size == world
    trainer.train()
    result = {name: value.detach().clone() for name, value in model.state_dict().items()}
    return result | {"scale": torch.tensor(math.log(loss.scale))}


def run_trainer(rank: int, world: int, port: int, folder: str, scratch: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }
    torch.save({case: train(case, folder, scratch, world) for case in TRAINED}, f"{scratch}/trained-{rank}.pt")
    gc.collect()  # a DDP model that outlives its group destroys it holding the GIL, for which gloo's thread may wait
    if dist.is_initialized():
        dist.destroy_process_group()
