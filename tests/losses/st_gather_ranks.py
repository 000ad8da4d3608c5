"""What each gloo process runs for the gathering itself: rows, sums, their gradients, and what is sent for them."""

from __future__ import annotations

import warnings
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from chunked_embed.gather import Ranks, ranks

# Rows of each process, by how many processes there are. One may have far fewer than another, or none.
SIZES: dict[str, dict[int, tuple[int, ...]]] = {
    "even": {2: (4, 4), 3: (4, 4, 4)},
    "uneven": {2: (9, 2), 3: (3, 40, 1)},
    "none": {2: (0, 3), 3: (2, 0, 3)},
}
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HALF = (torch.bfloat16, torch.float16)
SHAPES = {"vector": (), "matrix": (3,), "cube": (2, 3)}


def names() -> list[str]:
    rows = [f"gather-{sizes}-{dtype}" for sizes, dtype in product(SIZES, DTYPES)]
    return [*rows, "gather-integers-int64", "gather-integers-bool", "gather-sums-float64", "gather-before-float64"]


class Sent(TorchDispatchMode):
    """Notes each collective: its name, the dtype and the number of elements that it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, torch.dtype, int]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, name = function.name().split("::")
        if space == "c10d":
            of = args[1] if name in ("_allgather_base_", "_reduce_scatter_base_") else args[0][0]
            self.seen.append((name, of.dtype, of.numel()))
        return function(*args, **(kwargs or {}))


def check(case: str, kind: str, folder: str = "") -> None:
    if case == "sums":
        return check_sums()
    if case == "before":
        return check_before()
    if case == "integers":
        return check_integers(getattr(torch, kind))
    for shape, laid_out in product(SHAPES, ("as it is", "transposed", "expanded")):
        check_rows(SIZES[case][dist.get_world_size()], DTYPES[kind], SHAPES[shape], laid_out)


def of_everyone(sizes: tuple[int, ...], shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """All rows, and what each process wants from them: integers, whose sum is exact in float32, and depends on the
    order in half precision."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(sum(sizes), *shape, generator=generator).to(dtype)
    wanted = torch.randint(-127, 128, (len(sizes), *rows.shape), generator=generator)
    return rows, (wanted * torch.tensor([256, 1, 1][: len(sizes)]).view(-1, *[1] * rows.dim())).to(dtype)


def turned(x: Tensor) -> Tensor:
    """The same numbers, laid out from back to front."""
    return x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))


def check_rows(sizes: tuple[int, ...], dtype: torch.dtype, shape: tuple[int, ...], laid_out: str) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    shard = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    rows, wanted = of_everyone(sizes, shape, dtype)
    if laid_out == "expanded":
        wanted = wanted[:, :1].expand_as(wanted)  # as of a sum over rows
    own, upstream = rows[shard], wanted[rank]
    if laid_out == "transposed":
        own, upstream = turned(own), turned(upstream)
    own = own.detach().requires_grad_()
    processes = ranks(own)
    assert processes == Ranks(sizes, rank) and processes.offset == shard.start
    longest, row = max(sizes), rows[:1].numel()
    with Sent() as there:
        (gathered,) = processes.gather(own)
    assert there.seen == [("_allgather_base_", dtype, longest * row)]
    assert torch.equal(gathered, rows)
    with Sent() as back:
        (grad,) = torch.autograd.grad(gathered, own, upstream)
    summed = torch.float32 if dtype in HALF else dtype
    assert back.seen == [("_reduce_scatter_base_", summed, world * longest * row)]
    assert grad.dtype == dtype and grad.shape == own.shape
    assert torch.equal(grad, wanted.double().sum(0)[shard].to(dtype))


def check_integers(dtype: torch.dtype) -> None:
    """Ids and labels have no gradient."""
    sizes, rank = SIZES["uneven"][dist.get_world_size()], dist.get_rank()
    rows = (torch.arange(sum(sizes)) % 3).to(dtype)
    own = rows.split(list(sizes))[rank]
    (gathered,) = ranks(own).gather(own)
    assert torch.equal(gathered, rows) and not gathered.requires_grad


def check_before() -> None:
    """Torch 2.11 and 2.12 have the collectives under other names, of which later ones warn."""
    now = {name: vars(dist).pop(name) for name in ("all_gather_single", "reduce_scatter_single") if hasattr(dist, name)}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            check("uneven", "float64")
    finally:
        vars(dist).update(now)


def check_sums() -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    each, wanted = (
        torch.randn(2, world, 3, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ).unbind()
    own, processes = each[rank].t().requires_grad_(), Ranks((1,) * world, rank)
    with Sent() as sent:
        total, count = processes.sum(own, torch.tensor(rank))
        (grad,) = torch.autograd.grad(total, own, wanted[rank].t())
    assert [name for name, *_ in sent.seen] == ["allreduce_"] * 3
    torch.testing.assert_close(total, each.sum(0).t(), rtol=0, atol=1e-14)
    torch.testing.assert_close(grad, wanted.sum(0).t(), rtol=0, atol=1e-14)
    assert count == sum(range(world))
    assert torch.equal(own, each[rank].t())
    (stacked,) = processes.stack(own)
    assert torch.equal(stacked, each.transpose(1, 2))
    alone = Ranks((4,))
    assert alone.sum(own) == [own] and alone.gather(own) == [own]
