"""What the host does for a call: small losses on a CPU, where arithmetic is next to nothing.

    python benchmarks/host.py
    python benchmarks/host.py --only dpo,kl --rows 64
    python benchmarks/host.py --device cuda

Times are those of later calls of one kind, whose layout is known. "As it comes" is forward and backward with default
options; "in chunks" the same, uncompiled, in four chunks; "to the first product" what passes of such a call before
there is work for a device, which waits for it if it has nothing else to do. The floor is the formula in plain torch,
whole and by autograd; in float64 it is the truth. On a GPU the last one counts launches that were not waited for.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from measure import (
    FLOOR,
    OURS,
    RESULTS,
    Benchmark,
    Budget,
    Candidate,
    Loss,
    Match,
    Missing,
    Out,
    measure,
    value_and_gradients,
)
from torch import Tensor

import alignment
import distill
from chunked_embed import FlexChunkLoss, Projection
from chunked_embed import functional as CF

WIDTH, VOCABULARY, SCALE = 32, 512, 20.0


class CrossEntropy(FlexChunkLoss):
    def loss_fn(self, outputs, rows):
        return F.cross_entropy(outputs, rows["target"], reduction="none")


class Work:
    """A loss by its options, the same in plain torch, and what it learns."""

    def __init__(self, ours: Callable[..., Loss], plain: Loss, leaves: Sequence[Tensor]) -> None:
        self.ours = ours
        self.plain = plain
        self.leaves = leaves


# --- the losses ---


def row_wise(rows: int, make: Callable[..., Tensor]) -> Work:
    hidden, weight, target = make(rows, WIDTH), make(VOCABULARY, WIDTH), torch.arange(rows, device=make().device)

    def ours(**options: Any) -> Loss:
        loss = CrossEntropy(**options)
        return lambda: loss(Projection(hidden, weight), {"target": target}).loss

    return Work(ours, lambda: F.cross_entropy(hidden @ weight.T, target), [hidden, weight])


def dpo(rows: int, make: Callable[..., Tensor]) -> Work:
    """Two pairs, half of whose tokens are of the prompt."""
    tokens = max(rows // 4, 2)
    hidden, weight, ref = make(4, tokens, WIDTH), make(VOCABULARY, WIDTH), make(4).detach()
    target = torch.arange(4 * tokens, device=hidden.device).view(4, tokens)
    target[:, : tokens // 2] = -100

    def ours(**options: Any) -> Loss:
        loss = alignment.DPOLoss(beta=0.1, **options)
        return lambda: loss(hidden, weight, target, ref_logps=ref).loss

    def plain() -> Tensor:
        log_p = (hidden @ weight.T).log_softmax(-1).gather(2, target.clamp_min(0)[..., None])[..., 0]
        chosen, rejected = ((log_p * (target != -100)).sum(1) - ref).chunk(2)
        return -F.logsigmoid(0.1 * (chosen - rejected)).mean()

    return Work(ours, plain, [hidden, weight])


def cosent(rows: int, make: Callable[..., Tensor], projected: bool = False) -> Work:
    a, b = make(rows, WIDTH), make(rows, WIDTH)
    labels = torch.arange(rows, device=a.device).remainder(5).float()
    weight = make(WIDTH, WIDTH) if projected else None
    leaves = [a, b] if weight is None else [a, b, weight]

    def ours(**options: Any) -> Loss:
        return lambda: CF.cosent(a, b, labels, scale=SCALE, weight=weight, **options)

    def plain() -> Tensor:
        x, y = (side if weight is None else F.linear(side, weight) for side in (a, b))
        scores = SCALE * F.cosine_similarity(x, y)
        differences = (scores[:, None] - scores[None]).masked_fill(labels[:, None] >= labels[None], -torch.inf)
        return torch.cat([differences.flatten(), scores.new_zeros(1)]).logsumexp(0)

    return Work(ours, plain, leaves)


def projected_cosent(rows: int, make: Callable[..., Tensor]) -> Work:
    return cosent(rows, make, projected=True)


def info_nce(rows: int, make: Callable[..., Tensor]) -> Work:
    a, b = make(rows, WIDTH), make(rows, WIDTH)
    target = torch.arange(rows, device=a.device)

    def ours(**options: Any) -> Loss:
        return lambda: CF.info_nce(a, b, scale=SCALE, **options)

    def plain() -> Tensor:
        return F.cross_entropy(SCALE * F.normalize(a, dim=1) @ F.normalize(b, dim=1).T, target)

    return Work(ours, plain, [a, b])


def kl(rows: int, make: Callable[..., Tensor]) -> Work:
    student, weight = make(rows, WIDTH), make(VOCABULARY, WIDTH)
    teacher, head = make(rows, 2 * WIDTH).detach(), make(VOCABULARY, 2 * WIDTH).detach()

    def ours(**options: Any) -> Loss:
        loss = distill.KLDivLoss(**options)
        return lambda: loss(student, weight, teacher, head).loss

    def plain() -> Tensor:
        q, p = (student @ weight.T).log_softmax(1), (teacher @ head.T).log_softmax(1)
        return F.kl_div(q, p, reduction="batchmean", log_target=True)

    return Work(ours, plain, [student, weight])


CASES: dict[str, tuple[str, Callable[[int, Callable[..., Tensor]], Work]]] = {
    "row-wise": ("cross-entropy of a loss_fn", row_wise),
    "dpo": ("DPO of two pairs", dpo),
    "cosent": ("CoSENT", cosent),
    "projected": ("CoSENT through a projection", projected_cosent),
    "infonce": ("InfoNCE", info_nce),
    "kl": ("KL from a teacher", kl),
}


# --- to the first product ---


class Reached(Exception):
    """A call is at its first matrix product."""


def reached(*arguments: Any, **keywords: Any) -> Tensor:
    raise Reached


@contextmanager
def no_products() -> Iterator[None]:
    found = torch.mm, torch.addmm
    torch.mm = torch.addmm = reached  # type: ignore[assignment]
    try:
        yield
    except Reached:
        pass
    finally:
        torch.mm, torch.addmm = found  # type: ignore[method-assign]


def to_first_product(loss: Loss) -> Callable[[], None]:
    def run() -> None:
        with no_products():
            loss()

    return run


def main(
    device: Annotated[str, typer.Option(help="cpu, or cuda")] = "cpu",
    only: Annotated[str, typer.Option(help="losses, comma-separated")] = ",".join(CASES),
    rows: Annotated[int, typer.Option(help="tokens, or pairs")] = 16,
    repeats: int = 200,
    match: Match = "",
    missing: Missing = False,
    budget: Budget = 0,
    out: Out = RESULTS,
) -> None:
    if unknown := set(only.split(",")) - set(CASES):
        raise typer.BadParameter(f"expected losses out of {tuple(CASES)}, got {sorted(unknown)}")
    bench = Benchmark("host", torch.device(device), out, 3, repeats, match, missing=missing, budget=budget)

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).requires_grad_()

    def make_wide(*shape: int) -> Tensor:
        return make(*shape).detach().double().requires_grad_()

    chunks = {"compiled": False, "chunk_size": max(rows // 4, 1)}
    for name in only.split(","):
        title, build = CASES[name]
        torch.manual_seed(0)
        work = build(rows, make)
        torch.manual_seed(0)
        exact = build(rows, make_wide)
        case = f"{title}, {rows} rows, width {WIDTH}"
        ours = {"as it comes": work.ours(), "in four chunks": work.ours(**chunks)}
        candidates = [
            Candidate("floor: plain torch", FLOOR, value_and_gradients(work.plain, work.leaves)),
            *(Candidate(k, OURS, value_and_gradients(loss, work.leaves), 1e-4) for k, loss in ours.items()),
        ]
        bench.case(case, candidates, value_and_gradients(exact.plain, exact.leaves))
        lines = [line for line in bench.lines if line.case == case]
        if lines and name != "cosent":  # which has no product
            timing = measure(to_first_product(ours["in four chunks"]), bench.device, 3, repeats)
            bench.add(case, "in four chunks, to the first product", OURS, timing, floor=lines[0].ms)
    bench.finish()


if __name__ == "__main__":
    typer.run(main)
