"""CoSENT, AnglE and Triplet on ready embeddings and through a projection, beside sentence-transformers' own classes.

    python benchmarks/embedding.py                                   # everything, on the GPU
    python benchmarks/embedding.py --only cosent,angle --sizes 65536x1024 --dtypes bfloat16
    python benchmarks/embedding.py --device cpu --no-compiled        # small, in seconds

Floors: without a projection, reading and writing every embedding once (and sorting the labels, for the ranking losses);
through a projection, its three products for each side, and two passes over the embeddings. Half-precision outputs are a
matter of the projected ones alone: without a product there is nothing to round. The value is the loss.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from measure import (
    FLOOR,
    OURS,
    PEER,
    RESULTS,
    Benchmark,
    Budget,
    Candidate,
    Match,
    Missing,
    Out,
    Peers,
    as_candidates,
    precisions,
    value_and_gradients,
)
from torch import Tensor

from chunked_embed import functional as CF

RANKING = ("cosent", "angle")
TRIPLET = ("triplet-euclidean", "triplet-cosine", "triplet-manhattan")
SCALE, MARGIN = 20.0, 5.0
BOUNDS = {torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float32: 1e-4}
# A Manhattan gradient is made of signs behind a hinge, and rounding turns those of near-ties.
SIGNS = {torch.bfloat16: 1e-1, torch.float16: 1e-1, torch.float32: 1e-2}


# --- the truth: plain formulas in float64, differentiated by autograd ---


def cosine_scores(a: Tensor, b: Tensor) -> Tensor:  # (N, H), (N, H) -> (N,)
    return F.cosine_similarity(a, b)


def angle_scores(a: Tensor, b: Tensor) -> Tensor:
    """|sum Re + Im of a_j conj(b_j)| / (|a| |b|), each half of an embedding being the real and the imaginary parts."""
    (a_re, a_im), (b_re, b_im) = a.chunk(2, 1), b.chunk(2, 1)
    total = (a_re * b_re + a_im * b_im + a_im * b_re - a_re * b_im).sum(1)
    return total.abs() / (a.norm(dim=1) * b.norm(dim=1))


def ranking_truth(scores: Tensor, labels: Tensor) -> Tensor:
    """log(1 + sum over label_i < label_j of exp(s_i - s_j)), a label at a time."""
    terms = [scores.new_zeros(())]  # the 1
    below = None  # log-sum-exp of the scores under smaller labels
    for level in labels.unique(sorted=True):
        here = scores[labels == level]
        if below is not None:
            terms.append(below + (-here).logsumexp(0))
        below = here.logsumexp(0) if below is None else torch.logaddexp(below, here.logsumexp(0))
    return torch.stack(terms).logsumexp(0)


def distance(a: Tensor, b: Tensor, kind: str) -> Tensor:
    if kind == "cosine":
        return 1 - F.cosine_similarity(a, b)
    difference = a - b
    return difference.abs().sum(1) if kind == "manhattan" else difference.norm(dim=1)


def true_loss(name: str, sides: Sequence[Tensor], labels: Tensor) -> Tensor:
    if name in RANKING:
        scores = (cosine_scores if name == "cosent" else angle_scores)(*sides)
        return ranking_truth(SCALE * scores, labels)
    kind = name.removeprefix("triplet-")
    return (distance(sides[0], sides[1], kind) - distance(sides[0], sides[2], kind) + MARGIN).relu().mean()


def truth(name: str, leaves: Sequence[Tensor], labels: Tensor, n_sides: int) -> Callable[[], list[Tensor]]:
    def run() -> list[Tensor]:
        wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
        sides = [side @ wide[-1].T for side in wide[:n_sides]] if len(wide) > n_sides else wide
        loss = true_loss(name, sides, labels)
        return [loss.detach(), *(g.float() for g in torch.autograd.grad(loss, wide))]  # kept in less memory

    return run


# --- ours, theirs, and the floor ---


def ours(name: str, sides: Sequence[Tensor], labels: Tensor, **options: Any) -> Tensor:
    if name in RANKING:
        return (CF.cosent if name == "cosent" else CF.angle)(*sides, labels, scale=SCALE, **options)
    return CF.triplet(*sides, margin=MARGIN, distance=name.removeprefix("triplet-"), **options)


def theirs(name: str) -> Callable[[Sequence[Tensor], Tensor, Tensor | None], Tensor] | None:
    """sentence-transformers' class on the same embeddings, or None without the library."""
    try:
        from sentence_transformers.sentence_transformer import losses
    except ImportError:
        return None
    model = torch.nn.Identity()
    if name == "cosent":
        loss = losses.CoSENTLoss(model, scale=SCALE)
    elif name == "angle":
        loss = losses.AnglELoss(model, scale=SCALE)
    else:
        metric = getattr(losses.TripletDistanceMetric, name.removeprefix("triplet-").upper())
        loss = losses.TripletLoss(model, distance_metric=metric, triplet_margin=MARGIN)

    def run(sides: Sequence[Tensor], labels: Tensor, weight: Tensor | None) -> Tensor:
        return loss.compute_loss_from_embeddings([s if weight is None else F.linear(s, weight) for s in sides], labels)

    return run


def floor(name: str, sides: Sequence[Tensor], labels: Tensor, weight: Tensor | None) -> Callable[[], list[Tensor]]:
    sides = [side.detach() for side in sides]
    weight = None if weight is None else weight.detach()

    def run() -> list[Tensor]:
        results = []
        for side in sides:
            results.append(side.clone())
            if weight is not None:
                outputs = side @ weight.T
                results[-1] = (outputs.clone() @ weight, outputs.T @ side)
        if name in RANKING:
            results.append(labels.sort())
        return results

    return run


def run_case(bench: Benchmark, name: str, rows: int, width: int, dtype: torch.dtype, project: bool, compiled: bool):
    device = bench.device
    torch.manual_seed(0)
    n_sides = 2 if name in RANKING else 3
    sides = [torch.randn(rows, width, device=device) for _ in range(n_sides)]
    if name in RANKING:
        sides[1] = (sides[0] + sides[1]) / 2**0.5  # pairs that are alike, away from AnglE's |0|
    sides = [side.to(dtype).requires_grad_() for side in sides]
    weight = None
    if project:
        weight = torch.randn(width, width, device=device).div(width**0.5).to(dtype).requires_grad_()
    labels = torch.randint(26, (rows,), device=device).float() / 25
    leaves = [*sides, *([] if weight is None else [weight])]
    case = f"{name} {rows}x{width} {str(dtype).removeprefix('torch.')}" + (" projected" if project else "")
    bound = (SIGNS if name == "triplet-manhattan" else BOUNDS)[dtype]
    floor_name = f"{3 * n_sides} products + 2 passes" if project else "one pass"
    kinds = precisions("ours", dtype) if project else {"ours": {}}
    losses = {
        label: partial(ours, name, sides, labels, weight=weight, compiled=compiled, **more)
        for label, more in kinds.items()
    }
    candidates = [
        Candidate(f"floor: {floor_name}", FLOOR, floor(name, sides, labels, weight)),
        *as_candidates(losses, leaves, OURS, bound),
    ]
    peer = theirs(name)
    if peer is not None:
        run = value_and_gradients(lambda: peer(sides, labels, weight), leaves)
        candidates.append(Candidate("sentence-transformers", PEER, run, bound))
    names = [*("anchors", "positives", "negatives")[:n_sides], *([] if weight is None else ["weight"])]
    bench.case(case, candidates, truth(name, leaves, labels, n_sides), gradients=names)


def main(
    device: Annotated[str, typer.Option(help="cuda, or cpu for a small run")] = "cuda",
    only: Annotated[str, typer.Option(help="losses, comma-separated")] = ",".join(RANKING + TRIPLET),
    sizes: Annotated[str, typer.Option(help="rows x width, comma-separated")] = "",
    dtypes: Annotated[str, typer.Option(help="comma-separated")] = "",
    projected: Annotated[str, typer.Option(help="sizes of the projected cases, or 'none'")] = "",
    compiled: bool = True,
    match: Match = "",
    peers: Peers = True,
    missing: Missing = False,
    budget: Budget = 0,
    repeats: int = 5,
    out: Out = RESULTS,
) -> None:
    cpu = device == "cpu"
    sizes = sizes or ("1000x64" if cpu else "8192x1024,65536x1024,1048576x256")
    projected = projected or ("500x64" if cpu else "65536x1024")
    dtypes = dtypes or ("float32" if cpu else "bfloat16,float32")
    names = only.split(",")
    if unknown := set(names) - {*RANKING, *TRIPLET}:
        raise typer.BadParameter(f"expected losses out of {RANKING + TRIPLET}, got {sorted(unknown)}")
    bench = Benchmark("embedding", torch.device(device), out, 2, repeats, match, peers, missing, budget)
    for project, listed in ((False, sizes), (True, projected)):
        for size in listed.split(",") if listed != "none" else ():
            rows, width = map(int, size.split("x"))
            for dtype in dtypes.split(","):
                for name in names:
                    run_case(bench, name, rows, width, getattr(torch, dtype), project, compiled)
    bench.finish()


if __name__ == "__main__":
    typer.run(main)
