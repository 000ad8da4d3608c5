"""Mined losses over the rows of two gloo processes against one process with the whole batch, under DDP."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from processes import Outcomes, asked, assert_passed, run_checks
from sentence_transformers.sentence_transformer import losses as library
from sentence_transformers.sentence_transformer.modules import Normalize
from st_parts import EXACT, assert_same, build, dense, features, value_and_grads
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from chunked_embed import losses

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="needs torch.distributed with gloo"),
]

WORLD, ROWS = 2, 9
SHARDS = [slice(0, 6), slice(6, 9)]  # an uneven last batch
COSINE = losses.BatchHardTripletLossDistanceFunction.cosine_distance


def manhattan_matrix(x: Tensor) -> Tensor:
    return (x[:, None] - x).abs().sum(-1)


def rbf(a: Tensor, b: Tensor) -> Tensor:
    return 1.0 * torch.exp(-(a[:, None] - b).square().sum(-1))


# name: (class, arguments, columns)
CASES: dict[str, tuple[str, tuple, int]] = {
    "hard": ("BatchHardTripletLoss", (), 1),
    "hard, cosine": ("BatchHardTripletLoss", (COSINE, 0.2), 1),
    "hard, own": ("BatchHardTripletLoss", (manhattan_matrix, 0.5), 1),
    "soft": ("BatchHardSoftMarginTripletLoss", (), 1),
    "semi hard": ("BatchSemiHardTripletLoss", (COSINE, 0.1), 1),
    "all": ("BatchAllTripletLoss", (COSINE, 0.1), 1),
    "all, own": ("BatchAllTripletLoss", (manhattan_matrix, 0.5), 1),
    "mega": ("MegaBatchMarginLoss", (0.9, -0.1, False), 2),
    "gor": ("GlobalOrthogonalRegularizationLoss", (), 2),
    "gor, own": ("GlobalOrthogonalRegularizationLoss", (rbf,), 2),
}
# Of two classes each on one process alone: the positives of one are all here, the negatives all there.
LABELS = {"mixed": torch.tensor([0, 1, 2, 0, 1, 3, 0, 4, 1]), "apart": torch.tensor([0] * 6 + [1] * 3)}
MODES = ["plain"] + (["cached"] if EXACT else [])  # before 6.2 every mini-batch is a collective


def names() -> list[str]:
    return [f"{case}-{mode}-{kind}" for case in CASES for mode in MODES for kind in LABELS]


class Total(nn.Module):
    """Adds up a loss that comes as a dict, as the trainer does."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, columns: list[dict[str, Tensor]], labels: Tensor) -> Tensor:
        value = self.loss(columns, labels)
        return torch.stack(list(value.values())).sum() if isinstance(value, dict) else value


def check(name: str, rank: int, folder: str) -> None:
    case, mode, kind = name.split("-")
    class_name, args, columns = CASES[case]
    model = build(folder, dense(), Normalize())
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_("pooler" not in parameter_name)
    labels = LABELS[kind]
    whole = features(model, ROWS, columns)
    theirs = value_and_grads(Total(getattr(library, class_name)(model, *args)), model, whole, labels, upstream=2.0)
    if mode == "cached" and class_name == "MegaBatchMarginLoss":
        args = args[:2]
    options = {"mini_batch_size": 2} if mode == "cached" else {}
    loss = getattr(losses, class_name)(model, *args, gather_across_devices=True, compiled=False, **options)
    loss.model = DistributedDataParallel(model)
    part = features(model, ROWS, columns, rows=SHARDS[rank])
    value, grads = value_and_grads(Total(loss), model, part, labels[SHARDS[rank]], upstream=2.0)
    with torch.no_grad():
        torch.testing.assert_close(Total(loss)([dict(column) for column in part], labels[SHARDS[rank]]), value)
    dist.all_reduce(value)
    assert_same((value / WORLD, grads), theirs, rtol=1e-6, atol=1e-9)


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, transformer_dir: str, tmp_path_factory: pytest.TempPathFactory
) -> Outcomes:
    return run_checks(check, asked(request), WORLD, tmp_path_factory.mktemp("mined-ranks"), transformer_dir)


@pytest.mark.parametrize("name", names())
def test_equals_one_process_with_the_whole_batch(name: str, outcomes: Outcomes) -> None:
    assert_passed(name, outcomes)
