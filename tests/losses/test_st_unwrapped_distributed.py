"""Losses whose encoders the trainer does not wrap, on two gloo processes: one model on both, and its whole gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from processes import Outcomes, asked, assert_passed, run_checks
from sentence_transformers.sentence_transformer import losses as library
from sentence_transformers.sentence_transformer.modules import Normalize
from st_parts import EXACT, TOLERANCE, assert_same, build, dense, features, value_and_grads
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from chunked_embed import losses
from chunked_embed.losses._unwrapped import averaged_behind, in_step

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="needs torch.distributed with gloo"),
]

WORLD, ROWS = 2, 9
SHARDS = [slice(0, 6), slice(6, 9)]  # an uneven last batch, with unlike numbers of mini-batches
MODES = {"plain": {}, "cached": {"mini_batch_size": 2}}
NEAR = {"rtol": 1e-6, "atol": 1e-9} if EXACT else TOLERANCE


def tension(kind: type, folder: str, **options) -> nn.Module:
    model = build(folder, dense(), Normalize())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("pooler" not in name)
    loss = kind(model, **options)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in loss.model1.parameters():
            parameter += 0.03 * torch.randn_like(parameter)
    return loss


def ours(folder: str, **options) -> nn.Module:
    return tension(losses.ContrastiveTensionLossInBatchNegatives, folder, **{"compiled": False, **options})


def theirs(folder: str) -> nn.Module:
    return tension(library.ContrastiveTensionLossInBatchNegatives, folder)


def denoising(kind: type, folder: str, **options) -> nn.Module:
    torch.manual_seed(2)
    loss = kind(build(folder), **options).double()
    for module in loss.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return loss.train()


def texts(model: nn.Module, columns: int, rank: int | None) -> list[dict[str, Tensor]]:
    return features(model, ROWS, columns, rows=slice(None) if rank is None else SHARDS[rank])


def mean_of_ranks(make: Callable[[], nn.Module], columns: int, rank: int) -> tuple[Tensor, dict[str, Tensor]]:
    """This process's loss, and the mean of both processes' gradients."""
    each = []
    for r in range(WORLD):
        loss = make()
        model = loss.encoder if columns == 2 else loss.model2
        each.append(value_and_grads(loss, loss, texts(model, columns, r), None, upstream=2.0))
    return each[rank][0], {name: (each[0][1][name] + each[1][1][name]) / 2 for name in each[0][1]}


def gathered(options: dict, rank: int, folder: str, change: Callable[[nn.Module], object] = lambda loss: None) -> None:
    """The loss of the whole batch, which the processes' losses average to."""
    one, other = ours(folder, gather_across_devices=True, **options), theirs(folder)
    for loss in (one, other):
        change(loss)
    value, grads = value_and_grads(one, one, texts(one.model2, 1, rank), None, upstream=2.0)
    dist.all_reduce(value)
    whole = value_and_grads(other, other, texts(other.model2, 1, None), None, upstream=2.0)
    assert_same((value / WORLD, grads), whole, **NEAR)
    assert {name.split(".")[0] for name in grads} == {"model1", "model2", "logit_scale"}


def smoothed(loss: nn.Module) -> None:
    loss.cross_entropy_loss = nn.CrossEntropyLoss(label_smoothing=0.1)


def local(options: dict, rank: int, folder: str) -> None:
    loss = ours(folder, **options)
    found = value_and_grads(loss, loss, texts(loss.model2, 1, rank), None, upstream=2.0)
    assert_same(found, mean_of_ranks(lambda: theirs(folder), 1, rank), **NEAR)


def accumulated(options: dict, rank: int, folder: str) -> None:
    loss = ours(folder, **options)
    batch = texts(loss.model2, 1, rank)
    _, once = value_and_grads(loss, loss, batch, None)
    loss([dict(column) for column in batch], None).backward()
    for name, grad in once.items():
        torch.testing.assert_close(loss.get_parameter(name).grad, 2 * grad)


def no_grad(options: dict, rank: int, folder: str) -> None:
    """Evaluation talks to nobody: one process alone would wait for ever."""
    if rank == 0:
        loss = ours(folder, **options)
        with torch.no_grad():
            loss(texts(loss.model2, 1, rank))


def model2_wrapped(options: dict, rank: int, folder: str) -> None:
    """By its owner: DDP sees to it, and we to the rest."""
    loss = ours(folder, gather_across_devices=True, **options)
    loss.model2 = DistributedDataParallel(loss.model2, find_unused_parameters=True)
    assert not any(parameter is q for parameter in loss.model2.parameters() for q in in_step(loss))
    value, grads = value_and_grads(loss, loss, texts(loss.model2.module, 1, rank), None, upstream=2.0)
    other = theirs(folder)
    dist.all_reduce(value)
    whole = value_and_grads(other, other, texts(other.model2, 1, None), None, upstream=2.0)
    unwrapped = {name.replace("model2.module.", "model2."): grad for name, grad in grads.items()}
    assert_same((value / WORLD, unwrapped), whole, **NEAR)


def all_wrapped(options: dict, rank: int, folder: str) -> None:
    loss = ours(folder)
    inside: list[list] = []
    loss.register_forward_pre_hook(lambda *_: inside.append(in_step(loss)))
    found = value_and_grads(DistributedDataParallel(loss), loss, texts(loss.model2, 1, rank), None, upstream=2.0)
    assert inside == [[]]
    assert_same(found, mean_of_ranks(lambda: theirs(folder), 1, rank), **NEAR)


def one_start(options: dict, rank: int, folder: str) -> None:
    """Weights that each process drew for itself become those of process 0."""
    loss = ours(folder)
    first = {name: value.clone() for name, value in loss.state_dict().items()}
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter += rank
    loss(texts(loss.model2, 1, rank))
    frozen = {name for name, p in loss.named_parameters() if not p.requires_grad}
    for name, value in loss.state_dict().items():
        assert name in frozen or torch.equal(value, first[name]), name
    with torch.no_grad():
        loss.logit_scale += rank  # and never again
    loss(texts(loss.model2, 1, rank))
    assert loss.logit_scale.item() == first["logit_scale"].item() + rank


def used_by_one(options: dict, rank: int, folder: str) -> None:
    module = nn.ParameterDict({name: nn.Parameter(torch.ones(2, 3).mT) for name in ("both", "first", "nobody")})
    used = module["both"] + (module["first"] if rank == 0 else 0)
    averaged_behind((used * (rank + 1)).sum(), in_step(module)).backward()
    torch.testing.assert_close(module["both"].grad, torch.full((3, 2), 1.5))
    torch.testing.assert_close(module["first"].grad, torch.full((3, 2), 0.5))
    assert module["nobody"].grad is None


def decoder(options: dict, rank: int, folder: str) -> None:
    loss = denoising(losses.DenoisingAutoEncoderLoss, folder, compiled=False)
    with torch.no_grad():
        for name, parameter in loss.named_parameters():
            if "crossattention" in name:  # new, and drawn on each process
                parameter += 0.1 * rank
    found = value_and_grads(loss, loss, texts(loss.encoder, 2, rank), None, upstream=2.0)
    expected = mean_of_ranks(lambda: denoising(library.DenoisingAutoEncoderLoss, folder), 2, rank)
    assert any("crossattention" in name for name in found[1])
    assert_same(found, expected, **NEAR)


BOTH: dict[str, Callable[..., None]] = {
    "gathered": gathered,
    "gathered, smoothed": lambda options, rank, folder: gathered(options, rank, folder, smoothed),
    "local": local,
    "accumulated": accumulated,
    "no_grad": no_grad,
}
ONE: dict[str, Callable[..., None]] = {
    "model2 wrapped": model2_wrapped,
    "all wrapped": all_wrapped,
    "one start": one_start,
    "used by one": used_by_one,
    "decoder": decoder,
}
NAMES = [f"{case}-{mode}" for case in BOTH for mode in MODES] + [f"{case}-plain" for case in ONE]


def check(name: str, rank: int, folder: str) -> None:
    case, mode = name.split("-")
    {**BOTH, **ONE}[case](MODES[mode], rank, folder)


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, transformer_dir: str, tmp_path_factory: pytest.TempPathFactory
) -> Outcomes:
    return run_checks(check, asked(request), WORLD, tmp_path_factory.mktemp("unwrapped-ranks"), transformer_dir)


@pytest.mark.parametrize("name", NAMES)
def test_two_processes(name: str, outcomes: Outcomes) -> None:
    assert_passed(name, outcomes)
