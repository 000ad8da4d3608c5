"""Late interaction: MaxSim contrast, distillation and XTR scores, beside sentence-transformers and fused scores.

    python benchmarks/late_interaction.py                              # everything, on the GPU
    python benchmarks/late_interaction.py --only contrast --texts 1024
    python benchmarks/late_interaction.py --device cpu                 # small, in seconds

Queries have 32 tokens, documents 128 to 256, padded to 256; tokens are unit vectors of 128 numbers, and some of a
document's resemble those of its query. The value is the loss, and the truth float64 of the same tokens, some queries at
a time. Floors are products of all tokens with all that are no padding: three, as dense gradients take, and one. Of
flash-maxsim and late-interaction-kernels the score is fused, and the loss is torch's.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Annotated

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
    Loss,
    Match,
    Missing,
    Out,
    Peers,
    Profile,
    as_candidates,
    products,
)
from torch import Tensor

from chunked_embed import functional as CF

BOUNDS = {torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float32: 1e-3}  # near ties go either way in float32
CASES = ("contrast", "both", "distill", "xtr")
QUERY, LEAST, MOST, WIDTH, SCALE, WAYS, TOP = 32, 128, 256, 128, 1.0, 8, 64
NEAR = 0.45  # how much of a query's token is in its document's
CHUNK = 4096  # rows of a floor
TRUTH_NUMBERS = 2**25  # products of the truth at a time

Tokens = tuple[Tensor, Tensor]  # (N, L, H), (N, L)


def make(n: int, k: int, dtype: torch.dtype, device: torch.device, small: bool) -> tuple[Tokens, Tokens]:
    """Queries, and k documents of each, (N, K x L, H)."""
    length, least, most, width = (4, 3, 6, 16) if small else (QUERY, LEAST, MOST, WIDTH)
    generator = torch.Generator(device).manual_seed(0)
    normal = partial(torch.randn, device=device, generator=generator)
    queries = normal(n, length, width)
    documents = normal(n, k, most, width)
    documents[:, :, : min(length, least)] += NEAR * queries[:, None, : min(length, least)]
    lengths = torch.randint(least, most + 1, (n, k, 1), device=device, generator=generator)
    mask = torch.arange(most, device=device) < lengths
    leaves = [F.normalize(x, dim=-1).to(dtype).requires_grad_() for x in (queries, documents)]
    return (leaves[0], torch.ones(n, length, dtype=torch.bool, device=device)), (leaves[1], mask)


# --- the truth -------------------------------------------------------------------------------------------------------


def exact_scores(q: Tensor, d: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:  # (Q, H), (M, L, H), (M, L)
    """The largest products, and where they are: (Q, M) both."""
    z = (q @ d.flatten(0, 1).T).unflatten(1, d.shape[:2]).masked_fill_(~mask, -torch.inf)
    best = z.max(2)
    return best.values, best.indices


def truth_of_contrast(queries: Tokens, documents: Tokens, both: bool) -> Callable[[], list[Tensor]]:
    def run() -> list[Tensor]:
        q, d, mask = queries[0].detach().double(), documents[0].detach()[:, 0].double(), documents[1][:, 0]
        n, length, width = q.shape
        size = max(TRUTH_NUMBERS // (length * d.shape[0] * d.shape[1]), 1)
        found = [exact_scores(part.flatten(0, 1), d, mask) for part in q.split(size)]
        scores = torch.cat([best.unflatten(0, (-1, length)).sum(1) for best, _ in found]).requires_grad_()
        target = torch.arange(n, device=q.device)
        loss = F.cross_entropy(SCALE * scores, target)
        if both:
            loss = (loss + F.cross_entropy(SCALE * scores.T, target)) / 2
        (slopes,) = torch.autograd.grad(loss, scores)
        of_q, of_d = torch.zeros_like(q), torch.zeros_like(d).flatten(0, 1)
        first = torch.arange(n, device=q.device) * d.shape[1]
        for part, (_, at), slope, out in zip(q.split(size), found, slopes.split(size), of_q.split(size)):
            g = slope.repeat_interleave(length, 0)  # (Q, M)
            for rows in range(0, len(g), 32):
                index = (at[rows : rows + 32] + first).flatten()
                weights = g[rows : rows + 32, :, None]
                own = part.flatten(0, 1)[rows : rows + 32]
                picked = d.flatten(0, 1)[index].view(*weights.shape[:2], width)
                out.view(-1, width)[rows : rows + 32] = (weights * picked).sum(1)
                of_d.index_add_(0, index, (weights * own[:, None]).flatten(0, 1))
        return [loss.detach(), of_q.float(), of_d.view(n, 1, -1, width).float()]

    return run


def truth_of(loss: Callable[[Tensor, Tensor], Tensor], *leaves: Tensor) -> Callable[[], list[Tensor]]:
    """By ordinary autograd."""

    def run() -> list[Tensor]:
        wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
        value = loss(*wide)
        return [value.detach(), *(grad.float() for grad in torch.autograd.grad(value, wide))]

    return run


# --- candidates ------------------------------------------------------------------------------------------------------


def of_scores(scores: Callable[[], Tensor], both: bool) -> Tensor:
    z = SCALE * scores()
    target = torch.arange(len(z), device=z.device)
    loss = F.cross_entropy(z, target)
    return (loss + F.cross_entropy(z.T, target)) / 2 if both else loss


def peers_of_contrast(queries: Tokens, documents: Tokens, both: bool) -> Iterator[tuple[str, Loss]]:
    (q, q_mask), (d, d_mask) = queries, documents

    def library() -> Tensor:
        from sentence_transformers.multi_vector_encoder.scoring import colbert_scores

        return colbert_scores(q, d, queries_mask=q_mask, documents_mask=d_mask)

    def flash() -> Tensor:
        from flash_maxsim import flash_maxsim_batched_train

        lengths = [mask.sum(-1, dtype=torch.int32) for mask in (d_mask[:, 0], q_mask)]
        return flash_maxsim_batched_train(
            q, d[:, 0].contiguous(), shared_docs=True, doc_lengths=lengths[0], query_lengths=lengths[1]
        )

    def lik() -> Tensor:
        from late_interaction_kernels import maxsim

        return maxsim(q, d[:, 0].contiguous(), q_mask=q_mask, d_mask=d_mask[:, 0].contiguous())

    for name, scores in (
        ("sentence-transformers", library),
        ("flash-maxsim", flash),
        ("late-interaction-kernels", lik),
    ):
        yield name, partial(of_scores, scores, both)


def run_contrast(bench: Benchmark, n: int, dtype: torch.dtype, both: bool, small: bool) -> None:
    queries, documents = make(n, 1, dtype, bench.device, small)
    (q, q_mask), (d, d_mask) = queries, documents
    case = title("MaxSim contrast, both ways" if both else "MaxSim contrast", q, d, dtype)
    if not bench.chosen(case):
        return
    ways = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"} if both else {}

    def ours() -> Tensor:
        return CF.max_sim_info_nce(q, d[:, 0], q_mask, d_mask[:, 0], scale=SCALE, **ways)

    bare = q.detach().flatten(0, 1), d.detach()[d_mask]
    sizes = [len(part) for part in bare[0].split(CHUNK)]
    candidates = [
        Candidate("floor: 3 products", FLOOR, products(bare, (), sizes)),
        Candidate("floor: 1 product", FLOOR, lambda: [part @ bare[1].T for part in bare[0].split(CHUNK)][-1:]),
        *as_candidates({"CF.max_sim_info_nce": ours}, (q, d), OURS, BOUNDS[dtype]),
        *as_candidates(dict(peers_of_contrast(queries, documents, both)), (q, d), PEER, BOUNDS[dtype]),
    ]
    bench.case(case, candidates, truth_of_contrast(queries, documents, both), gradients=("queries", "documents"))


def run_distill(bench: Benchmark, n: int, dtype: torch.dtype, small: bool) -> None:
    (q, q_mask), (d, d_mask) = make(n, WAYS, dtype, bench.device, small)
    case = title(f"MaxSim of own {WAYS} documents", q, d, dtype)
    if not bench.chosen(case):
        return
    teacher = torch.randn(n, WAYS, device=bench.device).softmax(1)

    def divergence(scores: Tensor) -> Tensor:
        return F.kl_div(scores.log_softmax(1), teacher.to(scores.dtype), reduction="batchmean")

    def ours() -> Tensor:
        return divergence(CF.max_sim_pairs(q, d, q_mask, d_mask))

    def library() -> Tensor:
        from sentence_transformers.multi_vector_encoder.scoring import colbert_kd_scores

        return divergence(colbert_kd_scores(q, d, queries_mask=q_mask, documents_mask=d_mask))

    def exact(q: Tensor, d: Tensor) -> Tensor:
        parts = zip(q.split(64), d.split(64), d_mask.split(64))
        return divergence(
            torch.cat(
                [
                    torch.einsum("nqh,nkdh->nkqd", a, b).masked_fill(~mask[:, :, None], -torch.inf).amax(3).sum(2)
                    for a, b, mask in parts
                ]
            )
        )

    candidates = [
        *as_candidates({"CF.max_sim_pairs": ours}, (q, d), OURS, BOUNDS[dtype]),
        *as_candidates({"sentence-transformers": library}, (q, d), PEER, BOUNDS[dtype]),
    ]
    bench.case(case, candidates, truth_of(exact, q, d), gradients=("queries", "documents"))


def run_xtr(bench: Benchmark, n: int, dtype: torch.dtype, small: bool) -> None:
    (q, q_mask), (d, d_mask) = make(n, 1, dtype, bench.device, small)
    case = title(f"XTR contrast, top {TOP}", q, d, dtype)
    if not bench.chosen(case):
        return

    def ours() -> Tensor:
        return CF.xtr_scores(q, d[:, 0], q_mask, d_mask[:, 0], top_k=TOP)

    def library() -> Tensor:
        from sentence_transformers.multi_vector_encoder.scoring import xtr_scores

        return xtr_scores(q, d, queries_mask=q_mask, documents_mask=d_mask, top_k=TOP)

    candidates = [
        *as_candidates({"CF.xtr_scores": partial(of_scores, ours, False)}, (q, d), OURS, BOUNDS[dtype]),
        *as_candidates({"sentence-transformers": partial(of_scores, library, False)}, (q, d), PEER, BOUNDS[dtype]),
    ]
    bench.case(case, candidates, None, gradients=("queries", "documents"))


def title(what: str, q: Tensor, d: Tensor, dtype: torch.dtype) -> str:
    n, length, width = q.shape
    most = d.shape[2]
    return f"{what}, {n} x {length} and {most // 2}-{most}, H={width}, {str(dtype).removeprefix('torch.')}"


def main(
    device: Annotated[str, typer.Option(help="cuda, or cpu for a small run")] = "cuda",
    only: Annotated[str, typer.Option(help=f"of {', '.join(CASES)}, comma-separated")] = ",".join(CASES),
    texts: Annotated[str, typer.Option(help="queries, comma-separated")] = "",
    dtype: str = "",
    match: Match = "",
    peers: Peers = True,
    missing: Missing = False,
    budget: Budget = 0,
    repeats: int = 5,
    profile: Profile = False,
    out: Out = RESULTS,
) -> None:
    cpu = device == "cpu"
    if unknown := set(only.split(",")) - set(CASES):
        raise typer.BadParameter(f"expected cases out of {CASES}, got {sorted(unknown)}")
    kind = getattr(torch, dtype or ("float32" if cpu else "bfloat16"))
    bench = Benchmark("late-interaction", torch.device(device), out, 2, repeats, match, peers, missing, budget, profile)
    for n in map(int, (texts or ("8" if cpu else "64,256,1024,4096")).split(",")):
        for what in only.split(","):
            if what in ("contrast", "both"):
                run_contrast(bench, n, kind, what == "both", cpu)
            elif what == "distill":
                run_distill(bench, n, kind, cpu)
            else:
                run_xtr(bench, n, kind, cpu)
    bench.finish()


if __name__ == "__main__":
    typer.run(main)
