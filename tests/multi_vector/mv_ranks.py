"""What each of two gloo processes runs: a loss of the batch of both, against one process that has all of it."""

from __future__ import annotations

from unittest.mock import patch

import torch
import torch.distributed as dist
from mv_parts import CASES, N, batch, encoder, labels_of
from st_parts import assert_same, value_and_grads
from torch.nn.parallel import DistributedDataParallel

from chunked_embed import losses as dense

WORLD = 2
# Without what is embedded by rows and not cached: each of those is a call of DDP's model, of which ranks have as many.
SHARDS = [slice(0, 4), slice(4, N)]  # an uneven last batch
BOTH = {"directions": ("query_to_doc", "doc_to_query")}
# name: (case, options of ours in both)
ASKED: dict[str, tuple[str, dict]] = {
    **{
        f"{case}, {kind}" if kind else case: (f"{case}, {kind}" if kind else case, {})
        for case, kinds in {
            "ranking": ("negatives", "XTR", "own"),
            "cached": ("tokens", "XTR", "own"),
            "lists": ("", "XTR", "own", "cached"),
            "margins": ("", "XTR", "cached"),
        }.items()
        for kind in kinds
    },
    "both ways": ("ranking, negatives", BOTH),
    "both ways, XTR": ("ranking, XTR", BOTH),
    "both ways, own": ("cached, own", BOTH),
    "labels": ("ranking, negatives", {"false_negatives": "labels"}),
    "labels, XTR": ("cached, XTR", {"false_negatives": "labels", **BOTH}),
    "learnable": ("cached", {"learnable_scale": True}),
    "matryoshka": ("lists", {}),
    "matryoshka, cached": ("cached", {}),
}


def check(name: str, rank: int, folder: str) -> None:
    case, options = ASKED[name]
    found, model, part = CASES[case], encoder(folder), SHARDS[rank]
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_("pooler" not in parameter_name)  # BERT's own has no use here: DDP would wait for it
    labels = labels_of(found.labels)
    if "false_negatives" in options:
        labels = torch.tensor([0, 1, 2, 3, 1, 5, 2])
    with patch.object(torch.Tensor, "float", torch.Tensor.double):  # the library adds scores up in float32
        alone = found.ours(model, **options) if options else found.of_library(model)
        ours = found.ours(model, gather_across_devices=True, **options)
        if name.startswith("matryoshka"):
            alone, widths = found.ours(model), [10, 4]
            alone, ours = (dense.MatryoshkaLoss(model, loss, widths) for loss in (alone, ours))
        expected = value_and_grads(alone, model, batch(model, found.columns), labels, 2.0)
        scales = [loss.log_scale.grad for loss in (alone,) if hasattr(loss, "log_scale")]
        parallel = DistributedDataParallel(model)
        for loss in {ours, getattr(ours, "loss", ours)}:
            loss.model = parallel
        value, grads = value_and_grads(
            ours, model, batch(model, found.columns, part), None if labels is None else labels[part], 2.0
        )
        if found.labels is None:  # each process has its share
            dist.all_reduce(value)
            value = value / WORLD
    assert_same((value, grads), expected)
    for scale in scales:
        torch.testing.assert_close(ours.log_scale.grad, scale, rtol=1e-5, atol=1e-6)
