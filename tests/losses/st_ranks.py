"""What each of two gloo processes runs: every distributed case against one process that has the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from sentence_transformers import SparseEncoder
from sentence_transformers.sentence_transformer import losses as library
from sentence_transformers.sentence_transformer.modules import Normalize
from sentence_transformers.sparse_encoder import losses as sparse_library
from sentence_transformers.sparse_encoder.modules import SparseAutoEncoder
from st_parts import EXACT, assert_same, build, dense, features, labels_for, value_and_grads
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from chunked_embed import losses
from chunked_embed.sparse import losses as sparse_losses

ROWS, WORLD = 8, 2
SHARDS = [slice(0, 5), slice(5, 8)]  # an uneven last batch
GLOBAL = {"gather_across_devices": True, "compiled": False}

# name: (columns, kind of labels, ours, the library's)
CASES: dict[str, tuple[int, str | None, Callable, Callable]] = {
    "cosent": (2, "tied", losses.CoSENTLoss, library.CoSENTLoss),
    "angle": (3, None, losses.AnglELoss, library.AnglELoss),
    "triplet": (3, None, losses.TripletLoss, library.TripletLoss),
    "cosine": (2, "random", losses.CosineSimilarityLoss, library.CosineSimilarityLoss),
    "contrastive": (2, "binary", losses.ContrastiveLoss, library.ContrastiveLoss),
    "online": (2, "binary", losses.OnlineContrastiveLoss, library.OnlineContrastiveLoss),
    "positives": (2, "equal", losses.OnlineContrastiveLoss, library.OnlineContrastiveLoss),
    "margin": (4, "three", losses.MarginMSELoss, library.MarginMSELoss),
    "distill": (3, "two", losses.DistillKLDivLoss, library.DistillKLDivLoss),
    "custom": (
        2,
        "tied",
        lambda model, **options: losses.CoSENTLoss(model, 20.0, negative_l3, **options),
        lambda model: library.CoSENTLoss(model, 20.0, negative_l3),
    ),
}
MODES = {"plain": {"fuse_projection": False}, "fused": {"fuse_projection": "auto"}}
if EXACT:  # before 6.2 every mini-batch is a collective, and ranks with unlike numbers of them wait for ever
    MODES["cached"] = {"mini_batch_size": 2}


def negative_l3(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return -(a - b).abs().pow(3).sum(-1)


def names() -> list[str]:
    gathered = [f"{case}-{mode}-{unused}" for case, mode, unused in product(CASES, MODES, ("unused", "used"))]
    local = [f"local-{case}-{unused}" for case, unused in product(("cosent", "triplet"), ("unused", "used"))]
    cached = ["matryoshka-cached-unused"] if "cached" in MODES else []
    learns = [f"learns-{mode}" for mode in MODES]
    splade = [f"splade-{mode}-{threshold}" for mode, threshold in product(MODES, ("", "4")) if mode != "fused"]
    return [*gathered, *local, *learns, "matryoshka-used", *cached, "frozen-dense", *splade]


def check(name: str, rank: int, folder: str) -> None:
    kind, *rest = name.split("-")
    if kind == "local":
        return check_local(rest[0], rest[1] == "unused", rank, folder)
    if kind == "learns":
        return check_learns(MODES[rest[0]], rank, folder)
    if kind == "splade":
        return check_splade({"mini_batch_size": 2} if "cached" in rest else {}, int(rest[1] or 0) or None, rank, folder)
    if kind == "frozen":
        return check_gathered("cosent", MODES["fused"], True, rank, folder, freeze="weight")
    if kind == "matryoshka":
        options = {"mini_batch_size": 2} if "cached" in rest else {}
        return check_matryoshka(options, "unused" in rest, rank, folder)
    return check_gathered(kind, MODES[rest[0]], rest[1] == "unused", rank, folder)


def a_model(folder: str, freeze: str = "") -> nn.Module:
    model = build(folder, dense(), Normalize())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("pooler" not in name)  # BERT's own pooler has no use here: DDP would wait for it
    if freeze:
        model[2].linear.get_parameter(freeze).requires_grad_(False)
    return model


def wrapped(model: nn.Module, loss: nn.Module, unused: bool) -> nn.Module:
    """The loss holding the model in DDP, as the trainer leaves it."""
    parallel = DistributedDataParallel(model, find_unused_parameters=unused)
    for part in (loss, getattr(loss, "loss", None)):
        if part is not None:
            part.model = parallel
    return loss


def check_gathered(case: str, options: dict, unused: bool, rank: int, folder: str, freeze: str = "") -> None:
    columns, kind, ours, theirs = CASES[case]
    model = a_model(folder, freeze)
    whole, part = features(model, ROWS, columns), features(model, ROWS, columns, rows=SHARDS[rank])
    labels = labels_for(kind, ROWS) if kind else None
    expected = value_and_grads(theirs(model), model, whole, labels, upstream=2.0)
    loss = wrapped(model, ours(model, **GLOBAL, **options), unused)
    own = labels[SHARDS[rank]] if kind else None
    assert_same(value_and_grads(loss, model, part, own, upstream=2.0), expected)
    with torch.no_grad():
        torch.testing.assert_close(loss([dict(column) for column in part], own), expected[0])


def check_local(case: str, unused: bool, rank: int, folder: str) -> None:
    """No gathering, the tail fused: DDP's mean of the ranks' own gradients."""
    columns, kind, ours, theirs = CASES[case]
    model = a_model(folder)
    labels = labels_for(kind, ROWS) if kind else None
    each = []
    for shard in SHARDS:
        part = features(model, ROWS, columns, rows=shard)
        each.append(value_and_grads(theirs(model), model, part, labels[shard] if kind else None))
    mean = {name: (each[0][1][name] + each[1][1][name]) / 2 for name in each[0][1]}
    loss = wrapped(model, ours(model, compiled=False, fuse_projection=True), unused)
    part = features(model, ROWS, columns, rows=SHARDS[rank])
    got = value_and_grads(loss, model, part, labels[SHARDS[rank]] if kind else None)
    assert_same(got, (each[rank][0], mean))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, scores: torch.Tensor) -> torch.Tensor:
        return self.scale * scores


def check_learns(options: dict, rank: int, folder: str) -> None:
    """A parameter of the loss itself, which DDP knows nothing of: every process has the whole batch's gradient."""
    model, labels = a_model(folder), labels_for("random", ROWS)
    whole, part = features(model, ROWS, 2), features(model, ROWS, 2, rows=SHARDS[rank])
    theirs = library.CosineSimilarityLoss(model, cos_score_transformation=Scaled())
    expected = value_and_grads(theirs, model, whole, labels, upstream=2.0)
    ours = losses.CosineSimilarityLoss(model, cos_score_transformation=Scaled(), **GLOBAL, **options)
    assert_same(value_and_grads(wrapped(model, ours, False), model, part, labels[SHARDS[rank]], upstream=2.0), expected)
    grads = [loss.cos_score_transformation.scale.grad for loss in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)


def check_splade(options: dict, threshold: int | None, rank: int, folder: str) -> None:
    """Similarities and FLOPS of the whole batch, of a sparse model."""
    torch.manual_seed(0)
    parts = [*build(folder), SparseAutoEncoder(16, 24, k=5, k_aux=5).double()]
    model = SparseEncoder(modules=parts, device="cpu").train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("pooler" not in name)
    whole, part = features(model, ROWS, 3), features(model, ROWS, 3, rows=SHARDS[rank])

    def terms(package: Any, batch: list, **more: Any) -> tuple[dict, dict]:
        weights = {"document_regularizer_weight": 0.3, "query_regularizer_weight": 0.2}
        inner = package.SparseMultipleNegativesRankingLoss(model)
        loss = package.SpladeLoss(model, inner, **weights, document_regularizer_threshold=threshold, **more)
        model.zero_grad()
        found = (wrapped(model, loss, True) if more else loss)([dict(column) for column in batch], None)
        torch.stack(list(found.values())).sum().backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return {name: term.detach() for name, term in found.items()}, grads

    expected, grads = terms(sparse_library, whole)
    found, own = terms(sparse_losses, part, gather_across_devices=True, **options)
    dist.all_reduce(found["base_loss"])  # each process has its share
    found["base_loss"] /= WORLD
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(own, grads)


def check_matryoshka(options: dict, unused: bool, rank: int, folder: str) -> None:
    model = a_model(folder)
    labels, dims = labels_for("random", ROWS), [12, 6, 2]
    theirs = library.MatryoshkaLoss(model, library.CoSENTLoss(model), dims)
    expected = value_and_grads(theirs, model, features(model, ROWS, 2), labels)
    inner = losses.CoSENTLoss(model, **GLOBAL, **options)
    loss = wrapped(model, losses.MatryoshkaLoss(model, inner, dims), unused)
    part = features(model, ROWS, 2, rows=SHARDS[rank])
    assert_same(value_and_grads(loss, model, part, labels[SHARDS[rank]]), expected)
