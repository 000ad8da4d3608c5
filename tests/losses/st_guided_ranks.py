"""What each gloo process runs for GISTEmbed and the sigmoid pair loss: uneven shards against the whole batch."""

from __future__ import annotations

from itertools import product

import torch
import torch.distributed as dist
from sentence_transformers import util
from sentence_transformers.sentence_transformer import losses as library
from sentence_transformers.sentence_transformer.modules import Normalize
from st_guided_parts import guide_of
from st_parts import EXACT, assert_same, build, dense, features
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from chunked_embed import losses

ROWS, WORLD = 9, 2
SHARDS = [slice(0, 6), slice(6, 9)]
GLOBAL = {"gather_across_devices": True, "compiled": False}
MODES = {"plain": {}}
if EXACT:  # before 6.2 every mini-batch is a collective, and ranks with unlike numbers of them wait for ever
    MODES["cached"] = {"mini_batch_size": 2}


def manhattan(a: Tensor, b: Tensor) -> Tensor:
    return -torch.cdist(a, b, p=1)


def cached_gist(model: nn.Module, guide: nn.Module, **options) -> nn.Module:
    return losses.CachedGISTEmbedLoss(model, guide, **{"mini_batch_size": 100, **options})


# name: (columns, a loss from the model and a guide)
CASES = {
    "gist": (2, lambda m, g, **options: losses.GISTEmbedLoss(m, g, 0.1, **options)),
    "negatives": (4, lambda m, g, **options: cached_gist(m, g, temperature=0.1, margin=0.1, **options)),
    "onesided": (3, lambda m, g, **options: losses.GISTEmbedLoss(m, g, 0.1, contrast_anchors=False, **options)),
    "sigmoid": (2, lambda m, g, **options: losses.SigmoidPairLoss(m, 4.0, -3.0, **options)),
    "dot": (2, lambda m, g, **options: losses.SigmoidPairLoss(m, 4.0, -3.0, similarity_fct=util.dot_score, **options)),
    "custom": (2, lambda m, g, **options: losses.SigmoidPairLoss(m, 1.0, 2.0, similarity_fct=manhattan, **options)),
}


def names() -> list[str]:
    gathered = [f"{case}-{mode}" for case, mode in product(CASES, MODES)]
    return [*gathered, *(f"local-{mode}" for mode in MODES), "library-plain"]


def check(name: str, rank: int, folder: str, guide: str) -> None:
    case, mode = name.split("-")
    function = {"local": check_local, "library": check_library}.get(case, check_gathered)
    function(case, MODES[mode], rank, folder, guide_of(guide))


def a_model(folder: str) -> nn.Module:
    model = build(folder, dense(), Normalize())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("pooler" not in name)  # BERT's own pooler has no use here: DDP would wait for it
    return model


def everything(loss: nn.Module, batch: list[dict[str, Tensor]], model: nn.Module) -> tuple[Tensor, dict]:
    """Two accumulated steps: the loss's sum and the gradients of the model and of the loss itself."""
    loss.zero_grad()
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for upstream in (0.5, 1.5):
        value = upstream * loss([dict(column) for column in batch], None)
        value.backward()
        total = total + value.detach()
    own = {f"loss.{name}": p.grad for name, p in loss.named_parameters(recurse=False) if p.grad is not None}
    return total, own | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def copied(result: tuple[Tensor, dict]) -> tuple[Tensor, dict]:
    return result[0], {name: grad.clone() for name, grad in result[1].items()}


def parallel(loss: nn.Module, model: nn.Module) -> nn.Module:
    loss.model = DistributedDataParallel(model)
    return loss


def mean_over_ranks(value: Tensor) -> Tensor:
    value = value.clone()
    dist.all_reduce(value)
    return value / WORLD


def check_gathered(case: str, options: dict, rank: int, folder: str, guide: nn.Module) -> None:
    columns, make = CASES[case]
    model = a_model(folder)
    whole = make(model, guide, compiled=False).double()
    expected = copied(everything(whole, features(model, ROWS, columns), model))
    part = features(model, ROWS, columns, rows=SHARDS[rank])
    loss = parallel(make(model, guide, **GLOBAL, **options).double(), model)
    value, grads = everything(loss, part, model)
    assert ("loss.bias" in grads) is ("loss.bias" in expected[1])
    assert_same((mean_over_ranks(value), grads), expected)
    with torch.no_grad():
        own = loss([dict(column) for column in part], None)
    torch.testing.assert_close(2 * mean_over_ranks(own), expected[0])


def check_local(case: str, options: dict, rank: int, folder: str, guide: nn.Module) -> None:
    """No gathering: the loss's own parameters get the mean of the ranks' gradients, as the model does."""
    model = a_model(folder)
    each = []
    for shard in SHARDS:
        # Outside of DistributedDataParallel; what learns in the loss is averaged by itself, so do it by hand.
        alone = losses.SigmoidPairLoss(model, 4.0, -3.0, compiled=False).double()
        alone._loss = lambda embeddings, labels, alone=alone: unaveraged(alone, embeddings)
        each.append(copied(everything(alone, features(model, ROWS, 2, rows=shard), model)))
    mean = {name: (each[0][1][name] + each[1][1][name]) / 2 for name in each[0][1]}
    loss = parallel(losses.SigmoidPairLoss(model, 4.0, -3.0, compiled=False, **options).double(), model)
    assert_same(everything(loss, features(model, ROWS, 2, rows=SHARDS[rank]), model), (each[rank][0], mean))


def unaveraged(loss: nn.Module, embeddings: list[Tensor]) -> Tensor:
    from chunked_embed import functional as CF

    return CF.sigmoid_pairs(*embeddings, scale=loss.log_scale.exp(), bias=loss.bias, compiled=False)


def check_library(case: str, options: dict, rank: int, folder: str, guide: nn.Module) -> None:
    """Without anchors among the candidates, which the library does not gather, even shards give its own numbers."""
    model, shard = a_model(folder), [slice(0, 4), slice(4, 8)][rank]
    part = features(model, 8, 3, rows=shard)
    results = []
    for module in (library, losses):
        extra = {"compiled": False} if module is losses else {}
        loss = module.GISTEmbedLoss(model, guide, 0.1, contrast_anchors=False, gather_across_devices=True, **extra)
        results.append(copied(everything(parallel(loss, model), part, model)))
    assert_same(results[1], results[0])
