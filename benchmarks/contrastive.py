"""In-batch contrastive losses beside their product floors and beside other people's, then whole training steps.

    python benchmarks/contrastive.py                                      # everything, on the GPU
    python benchmarks/contrastive.py --only infonce,sigmoid --sizes 65536x1024
    python benchmarks/contrastive.py --device cpu --no-compiled           # small, in seconds

A floor is the bare matrix products in the same chunks: three for one direction, four for both (row and column sums of
one matrix), twelve for the four directions of GTE. Inputs are unit vectors, so that all candidates do the same work;
"normalising" takes them for raw ones. Cross-entropies of a product are peers of one direction: the documents are the
vocabulary, and queries are multiplied by the scale in their dtype where a kernel takes none, within the time. The value
is the loss.

`confident` and `near-duplicates` have errors alone. The first are pairs that all win: a gradient is `p - 1` there. The
others are what a model in half precision gives: raw embeddings whose cosines are .9 to 1, at scales of 20, 50 and 100.
There a gradient is a small difference of large sums, and rounded similarities or unit vectors show in it. `mined` has
errors at fewer rows than times, because the truth is the library's class in float64.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
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
    Profile,
    as_candidates,
    errors_of,
    floors,
    linear_cross_entropies,
    once,
    precisions,
    value_and_gradients,
)
from torch import Tensor, nn

from chunked_embed import FlexChunkLoss, Projection
from chunked_embed import functional as CF

CASES = (
    *("infonce", "symmetric", "masked", "confident", "gte", "sigmoid", "matryoshka", "guided"),
    *("mined", "near-duplicates", "step"),
)
BOUNDS = {torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float32: 1e-4}
# Where a rounding in float32 turns a near-tie another negative is mined: a few rows of thousands.
MINED_BOUNDS = {torch.bfloat16: 1e-1, torch.float16: 1e-1, torch.float32: 1e-4}
PAIR = ("queries", "documents")
SCALES = (20.0, 50.0, 100.0)  # of the near duplicates
SCALE, WIDEST_WHOLE = 20.0, 32768  # rows up to which a whole similarity matrix is tried
BOTH = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
GTE = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
Loss = Callable[[], Tensor]
# Rows x width of one direction and of both; those of other people's who are slow, and of a plain function, are few.
ONE_WAY = "65536x1024,65536x768,65536x512,65536x384,65536x256,65536x128,65536x64,16384x1024,16384x64,4096x256,4096x64"
TWO_WAY = "65536x1024,65536x768,65536x256,65536x64,16384x1024"
WIDE = 1024  # at which everybody is measured


class UserInfoNCE(FlexChunkLoss):
    """As a user writes it: a plain function, compiled."""

    def loss_fn(self, outputs, rows):
        return F.cross_entropy(SCALE * outputs, rows["target"], reduction="none")


def total(outputs, rows):
    """Some loss of several blocks, to ask for the plan of their chunks."""
    return sum(block.sum(1) for block in outputs.values())


class Embedded(nn.Identity):
    """In the place of a model whose embeddings are there already."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def get_embedding_dimension(self) -> int:
        return self.width


# --- the truth, in float64: some rows at a time, differentiated by autograd ------------------------------------------


def one_way(a: Tensor, b: Tensor, rows: slice, scale: float | Tensor = SCALE) -> Tensor:
    z = scale * a[rows] @ b.T
    return (z.logsumexp(1) - z.diagonal(rows.start)).sum()


def masked(a: Tensor, b: Tensor, rows: slice, kept: Callable[[slice], Tensor]) -> Tensor:
    z = SCALE * a[rows] @ b.T
    return (z.masked_fill(~kept(rows), -torch.inf).logsumexp(1) - z.diagonal(rows.start)).sum()


def with_hard_negatives(a: Tensor, b: Tensor, hard: Tensor, rows: slice) -> Tensor:
    z = SCALE * a[rows] @ torch.cat([b, hard]).T
    return (z.logsumexp(1) - z.diagonal(rows.start)).sum()


def both_ways(a: Tensor, b: Tensor, rows: slice, scale: float = SCALE) -> Tensor:
    return (one_way(a, b, rows, scale) + one_way(b, a, rows, scale)) / 2


def own_pairs(a: Tensor, rows: slice) -> Tensor:  # (R, N)
    everything = torch.arange(len(a), device=a.device)
    return everything == everything[rows, None]


def gte(a: Tensor, b: Tensor, rows: slice, scale: float = SCALE) -> Tensor:
    blocks = [scale * x[rows] @ y.T for x, y in ((a, b), (a, a), (b, a), (b, b))]
    positive = blocks[0].diagonal(rows.start)
    blocks[1], blocks[3] = (z.masked_fill(own_pairs(a, rows), -torch.inf) for z in (blocks[1], blocks[3]))
    return (torch.cat(blocks, 1).logsumexp(1) - positive).sum()


def sigmoid(a: Tensor, b: Tensor, log_scale: Tensor, bias: Tensor, rows: slice) -> Tensor:
    z = log_scale.exp() * a[rows] @ b.T + bias
    return F.softplus(z).sum() - z.diagonal(rows.start).sum()


def matryoshka(a: Tensor, b: Tensor, rows: slice, dims: Sequence[int]) -> Tensor:
    cut = ((F.normalize(a[:, :d], dim=1), F.normalize(b[:, :d], dim=1)) for d in dims)
    return torch.stack([one_way(x, y, rows) for x, y in cut]).sum()


def guided(a: Tensor, b: Tensor, rows: slice, guides: Sequence[Tensor], scale: float = SCALE) -> Tensor:
    """GISTEmbed. What the guide finds nearer than the pair is no negative, a query and its document themselves too."""
    g, h = (F.normalize(guide.double(), dim=1) for guide in guides)
    blocks = [scale * x[rows] @ y.T for x, y in ((a, b), (a, a), (b, b))]
    hints = [x[rows] @ y.T for x, y in ((g, h), (g, g), (h, h))]
    dropped = [hint > hints[0].diagonal(rows.start)[:, None] for hint in hints]
    dropped[0] = dropped[0] & ~own_pairs(a, rows)
    positive = blocks[0].diagonal(rows.start)
    kept = [z.masked_fill(out, -torch.inf) for z, out in zip(blocks, dropped, strict=True)]
    return (torch.cat(kept, 1).logsumexp(1) - positive).sum()


def truth(formula: Callable[..., Tensor], leaves: Sequence[Tensor], raw: bool = False) -> Callable[[], list[Tensor]]:
    """The mean over rows of a formula of unit vectors, and the gradients of `leaves`; `raw`: those are not of one."""

    def run() -> list[Tensor]:
        n, size = len(leaves[0]), 1024
        wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
        total, sums = torch.zeros((), dtype=torch.float64, device=wide[0].device), [torch.zeros_like(w) for w in wide]
        for start in range(0, n, size):
            sides = [F.normalize(side, dim=1) for side in wide[:2]] if raw else wide[:2]
            value = formula(*sides, *wide[2:], rows=slice(start, min(start + size, n))) / n
            for gathered, grad in zip(sums, torch.autograd.grad(value, wide), strict=True):
                gathered += grad
            total += value.detach()
        return [total, *(gathered.float() for gathered in sums)]

    return run


# --- floors and peers ------------------------------------------------------------------------------------------------


def product_floors(sides: Sequence[tuple[Tensor, Tensor]], rows: int, forwards: int, label: str) -> list[Candidate]:
    """Of several matrices one after the other, in chunks of `rows`."""

    def joined(parts: Sequence[Candidate]) -> Callable[[], list[Tensor]]:
        return lambda: [result for part in parts for result in part.run()]

    chunks = [[len(part) for part in torch.arange(len(a)).split(rows)] for a, _ in sides]
    found = [floors(label, side, [], sizes, forwards=forwards) for side, sizes in zip(sides, chunks, strict=True)]
    return [Candidate(parts[0].name, FLOOR, joined(parts), note=parts[0].note) for parts in zip(*found, strict=True)]


def library_loss(a: Tensor, b: Tensor, scale: float = SCALE, raw: bool = False, **options: Any) -> dict[str, Loss]:
    """sentence-transformers, on unit vectors or on raw ones; empty without the library."""
    try:
        from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
        from sentence_transformers.util import cos_sim, dot_score
    except ImportError:
        return {}
    similarity = cos_sim if raw else dot_score
    loss = MultipleNegativesRankingLoss(nn.Identity(), scale=scale, similarity_fct=similarity, **options)
    return {"sentence-transformers": lambda: loss.compute_loss_from_embeddings([a, b], None)}


def cached_stage(a: Tensor, b: Tensor, size: int, **options: Any) -> Callable[[], list[Tensor]] | None:
    """The loss stage of sentence-transformers' gradient caching: mini-batches of ready embeddings."""
    try:
        from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
        from sentence_transformers.util import dot_score
    except ImportError:
        return None
    loss = CachedMultipleNegativesRankingLoss(
        nn.Sequential(nn.Identity()), scale=SCALE, similarity_fct=dot_score, mini_batch_size=size, **options
    )

    def run() -> list[Tensor]:
        parts = [[part.detach().requires_grad_() for part in side.detach().split(size)] for side in (a, b)]
        value = loss.calculate_loss(parts, None, with_backward=True)
        return [value, *(torch.cat([part.grad for part in side]) for side in parts)]

    return run


def units(a: Tensor, b: Tensor, raw: bool) -> Callable[[], tuple[Tensor, Tensor]]:
    """The sides as those take them who do not normalise: by torch, in their dtype."""
    return lambda: (F.normalize(a, dim=1), F.normalize(b, dim=1)) if raw else (a, b)


def one_way_peers(a: Tensor, b: Tensor, scale: float = SCALE, raw: bool = False) -> dict[str, Loss]:
    target, sides = torch.arange(len(a), device=a.device), units(a, b, raw)
    losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}
    if len(a) <= WIDEST_WHOLE:
        losses["torch, whole matrix"] = lambda x, y: F.cross_entropy(scale * (x @ y.T).float(), target)
    if hasattr(F, "linear_cross_entropy"):
        losses["F.linear_cross_entropy"] = lambda x, y: F.linear_cross_entropy(x * scale, y, target)
    if a.is_cuda:
        for name, loss in linear_cross_entropies().items():
            if name != "quack, base" or (a.shape[1] == WIDE and not raw):
                losses[name] = lambda x, y, loss=loss: loss(x, y, target, scale=scale)
    found = {name: lambda loss=loss: loss(*sides()) for name, loss in losses.items()}
    if a.is_cuda and (a.shape[1] == WIDE or raw):  # twenty times the others' time
        found |= inf_cl(a, b, scale=scale, raw=raw)
    return found | (library_loss(a, b, scale, raw) if a.shape[1] == WIDE or len(a) <= WIDEST_WHOLE else {})


def inf_cl(a: Tensor, b: Tensor, both: bool = False, scale: float = SCALE, raw: bool = False) -> dict[str, Loss]:
    try:
        from inf_cl import cal_flash_loss
    except ImportError:
        return {}
    target, sides = torch.arange(len(a), device=a.device), units(a, b, raw)

    def loss() -> Tensor:
        x, y = sides()
        values = [cal_flash_loss(*pair, target, scale).mean() for pair in ((x, y), (y, x))[: 1 + both]]
        return torch.stack(values).mean()

    return {"Inf-CL": loss}


def siglip_kernel(a: Tensor, b: Tensor, log_scale: Tensor, bias: Tensor, raw: bool = False) -> dict[str, Loss]:
    if not a.is_cuda:
        return {}
    try:
        from siglip_kernel import fused_siglip_loss
    except ImportError:
        return {}
    return {"siglip-kernel": lambda: fused_siglip_loss(*units(a, b, raw)(), log_scale, bias)}


def whole_sigmoid(a: Tensor, b: Tensor, log_scale: Tensor, bias: Tensor, raw: bool = False) -> dict[str, Loss]:
    def loss() -> Tensor:
        x, y = units(a, b, raw)()
        z = log_scale.exp() * (x @ y.T).float() + bias
        return (F.softplus(z).sum() - z.diagonal().sum()) / len(a)

    return {"torch, whole matrix": loss} if len(a) <= WIDEST_WHOLE else {}


def whole_guided(
    a: Tensor, b: Tensor, guides: Sequence[Tensor], scale: float = SCALE, raw: bool = False
) -> dict[str, Loss]:
    """The library's formula; its class wants tokenizers, and takes rows x rows x width."""

    def loss() -> Tensor:
        (x, y), (g, h) = units(a, b, raw)(), units(guides[0], guides[1], True)()
        scores = [(p @ q.T).float() for p, q in ((x, y), (x, x), (y, y))]
        hints = [(p @ q.T).float() for p, q in ((g, h), (g, g), (h, h))]
        dropped = [hint > hints[0].diagonal()[:, None] for hint in hints]
        dropped[0] = dropped[0] & ~torch.eye(len(a), dtype=torch.bool, device=a.device)
        z = torch.cat([s.masked_fill(m, -torch.inf) for s, m in zip(scores, dropped, strict=True)], 1) * scale
        return F.cross_entropy(z, torch.arange(len(a), device=a.device))

    return {"torch, whole matrices": loss} if len(a) <= WIDEST_WHOLE else {}


# --- cases -----------------------------------------------------------------------------------------------------------


def pair(bench: Benchmark, rows: int, width: int, dtype: torch.dtype, unit: bool = True) -> list[Tensor]:
    """Queries and documents that resemble each other, so that gradients are not all of one size."""
    torch.manual_seed(0)
    a = torch.randn(rows, width, device=bench.device)
    b = 0.3 * a + torch.randn(rows, width, device=bench.device)
    sides = [F.normalize(side, dim=1) for side in (a, b)] if unit else [a, b]
    return [side.to(dtype).requires_grad_() for side in sides]


def shaped(name: str, rows: int, width: int, dtype: torch.dtype) -> str:
    return f"{name} {rows}x{width}, {str(dtype).removeprefix('torch.')}"


def title(name: str, a: Tensor) -> str:
    return shaped(name, len(a), a.shape[1], a.dtype)


def call_of(function: Callable[..., Tensor], label: str, dtype: torch.dtype, *given: Any, **keywords: Any):
    """Ours by its labels."""
    kinds = precisions(label, dtype)
    return {name: partial(function, *given, **keywords, **more) for name, more in kinds.items()}


def run_infonce(bench: Benchmark, rows: int, width: int, dtype: torch.dtype, options: dict[str, Any]) -> None:
    name, normalising = (shaped(name, rows, width, dtype) for name in ("InfoNCE", "InfoNCE, normalising"))
    if not bench.chosen(name, normalising):
        return
    leaves = a, b = pair(bench, rows, width, dtype)
    target, bound = torch.arange(rows, device=bench.device), BOUNDS[dtype]
    size = UserInfoNCE(**options).plan(Projection(a, b), {"target": target}).chunk_rows
    ours: dict[str, Loss] = call_of(CF.info_nce, "CF.info_nce", dtype, a, b, scale=SCALE, similarity="dot", **options)
    if width == WIDE or not a.is_cuda:
        for label, more in precisions("a user's loss_fn", dtype).items():
            user = UserInfoNCE(**options, **more)
            ours[label] = lambda user=user: user(Projection(a, b), {"target": target}).loss
    floor = product_floors([(a, b)], size, 1, "3 products")
    candidates = [
        *floor,
        *as_candidates(ours, leaves, OURS, bound),
        *as_candidates(one_way_peers(a, b), leaves, PEER, bound),
    ]
    cached = cached_stage(a, b, 1024)
    if cached and rows > 1024 and width == WIDE:
        candidates.append(Candidate("sentence-transformers cached, 1024", PEER, cached, bound))
    bench.case(name, candidates, truth(one_way, leaves), gradients=PAIR)
    if width not in (WIDE, 256) and a.is_cuda:
        return
    # Unit vectors stay what they are, but their gradients lose what lies along them.
    raw = {"CF.info_nce, normalising": partial(CF.info_nce, a, b, scale=SCALE, **options)}
    candidates = [*floor[:1], *as_candidates(raw, leaves, OURS, bound)]
    bench.case(normalising, candidates, truth(one_way, leaves, raw=True), gradients=PAIR)


def run_symmetric(bench: Benchmark, rows: int, width: int, dtype: torch.dtype, options: dict[str, Any]) -> None:
    name = shaped("symmetric InfoNCE", rows, width, dtype)
    if not bench.chosen(name):
        return
    leaves = a, b = pair(bench, rows, width, dtype)
    target, bound = torch.arange(rows, device=bench.device), BOUNDS[dtype]
    size = UserInfoNCE(**options).plan(Projection(a, b), {"target": target}).chunk_rows
    settings = {"scale": SCALE, "similarity": "dot", **BOTH, **options}
    ours = call_of(CF.info_nce, "CF.info_nce", dtype, a, b, **settings)
    few = rows <= WIDEST_WHOLE
    peers = (library_loss(a, b, **BOTH) | (inf_cl(a, b, both=True) if a.is_cuda else {})) if few else {}
    candidates = [
        *product_floors([(a, b)], size, 2, "4 products"),
        *as_candidates(ours, leaves, OURS, bound),
        *as_candidates(peers, leaves, PEER, bound),
    ]
    cached = cached_stage(a, b, 1024, **BOTH)
    if cached and rows > 1024 and width == WIDE:
        candidates.append(Candidate("sentence-transformers cached, 1024", PEER, cached, bound))
    bench.case(name, candidates, truth(both_ways, leaves), gradients=PAIR)


def run_masked(bench: Benchmark, rows: int, width: int, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Documents that occur eight times, and are no negatives of each other's queries; a hard negative a query."""
    told = [shaped(name, rows, width, dtype) for name in ("InfoNCE, false negatives", "InfoNCE, hard negatives")]
    if not bench.chosen(*told):
        return
    leaves = a, b = pair(bench, rows, width, dtype)
    hard = F.normalize(b.detach().float() + 0.5 * torch.randn_like(b, dtype=torch.float32), dim=1)
    hard = hard.to(dtype).requires_grad_()
    ids, own = torch.arange(rows, device=bench.device) // 8, torch.arange(rows, device=bench.device)

    def kept(part: slice) -> Tensor:  # (R, N)
        return (ids != ids[part, None]) | (own == own[part, None])

    settings = {"scale": SCALE, "similarity": "dot", **options}
    kinds = {
        told[0]: ({"document_ids": ids}, [(a, b)], partial(masked, kept=kept), leaves),
        told[1]: ({"hard_negatives": [hard]}, [(a, b), (a, hard)], with_hard_negatives, [a, b, hard]),
    }
    for name, (given, sides, formula, learns) in kinds.items():
        ours = call_of(CF.info_nce, "CF.info_nce", dtype, a, b, **given, **settings)
        blocks = {str(k): Projection(*side) for k, side in enumerate(sides)}
        size = FlexChunkLoss(total, **options).plan(blocks).chunk_rows
        candidates = [
            *product_floors(sides, size, 1, f"{3 * len(sides)} products"),
            *as_candidates(ours, learns, OURS, BOUNDS[dtype]),
        ]
        names = (*PAIR, "hard negatives")[: len(learns)]
        bench.case(name, candidates, truth(formula, learns), gradients=names)


def run_confident(bench: Benchmark, rows: int, width: int, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Pairs whose cosines are about .98 among random ones: the positive has all but a few ten-thousandths."""
    name = shaped("confident InfoNCE", rows, width, dtype)
    if not bench.chosen(name):
        return
    torch.manual_seed(0)
    x = torch.randn(rows, width, device=bench.device)
    pairs = x, x + 0.2 * torch.randn_like(x)
    leaves = a, b = [F.normalize(side, dim=1).to(dtype).requires_grad_() for side in pairs]
    bound = BOUNDS[torch.bfloat16]  # of any dtype: float32 has few digits left of `p - 1`
    ours = call_of(CF.info_nce, "ours", dtype, a, b, scale=SCALE, similarity="dot", **options)
    peers = {who: loss for who, loss in one_way_peers(a, b).items() if who not in ("Inf-CL", "sentence-transformers")}
    candidates = [
        *as_candidates(ours, leaves, OURS, bound),
        *as_candidates(peers, leaves, PEER, bound),
    ]
    bench.case(name, candidates, truth(one_way, leaves), gradients=PAIR, timed=False)


def run_gte(bench: Benchmark, rows: int, width: int, dtype: torch.dtype, options: dict[str, Any]) -> None:
    if not bench.chosen(shaped("GTE softmax", rows, width, dtype)):
        return
    leaves = a, b = pair(bench, rows, width, dtype)
    bound = BOUNDS[dtype]
    blocks = {name: Projection(x, y) for name, x, y in zip(GTE, (a, a, b, b), (b, a, a, b), strict=True)}
    size = FlexChunkLoss(total, **options).plan(blocks).chunk_rows
    settings = {"scale": SCALE, "similarity": "dot", "directions": GTE, **options}
    ours = call_of(CF.info_nce, "CF.info_nce", dtype, a, b, **settings)
    sides = [(a, b), (a, a), (b, a), (b, b)]
    candidates = [
        *product_floors(sides, size, 1, "12 products"),
        *as_candidates(ours, leaves, OURS, bound),
        *as_candidates(library_loss(a, b, directions=GTE), leaves, PEER, bound),
    ]
    cached = cached_stage(a, b, 1024, directions=GTE)
    if cached and rows > 1024:
        candidates.append(Candidate("sentence-transformers cached, 1024", PEER, cached, bound))
    bench.case(title("GTE softmax", a), candidates, truth(gte, leaves), gradients=PAIR)


def learnable(bench: Benchmark, scale: float, bias: float) -> list[Tensor]:
    log_scale = torch.tensor(scale, device=bench.device).log()
    return [log_scale.requires_grad_(), torch.tensor(bias, device=bench.device, requires_grad=True)]


def our_sigmoid(a: Tensor, b: Tensor, log_scale: Tensor, bias: Tensor, **options: Any) -> Tensor:
    return CF.sigmoid_pairs(a, b, scale=log_scale.exp(), bias=bias, **options)


def run_sigmoid(bench: Benchmark, rows: int, width: int, dtype: torch.dtype, options: dict[str, Any]) -> None:
    if not bench.chosen(shaped("sigmoid pairs", rows, width, dtype)):
        return
    a, b = pair(bench, rows, width, dtype)
    leaves, bound = [a, b, *learnable(bench, 10.0, -10.0)], BOUNDS[dtype]
    target = torch.arange(rows, device=bench.device)
    size = UserInfoNCE(**options).plan(Projection(a, b), {"target": target}).chunk_rows
    ours = call_of(our_sigmoid, "CF.sigmoid_pairs", dtype, *leaves, similarity="dot", **options)
    candidates = [
        *product_floors([(a, b)], size, 1, "3 products"),
        *as_candidates(ours, leaves, OURS, bound),
        *as_candidates(siglip_kernel(*leaves), leaves, PEER, bound),
    ]
    names = (*PAIR, "log scale", "bias")
    bench.case(title("sigmoid pairs", a), candidates, truth(sigmoid, leaves), gradients=names)


def run_matryoshka(bench: Benchmark, rows: int, width: int, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """The ratio is to the loss of the full width alone: what the other widths cost."""
    try:
        from sentence_transformers.sentence_transformer import losses as library

        from chunked_embed import losses
    except ImportError:
        return
    dims, bound, model = [width >> k for k in range(5)], BOUNDS[dtype], Embedded(width)
    name = shaped(f"Matryoshka ({', '.join(map(str, dims))}) over InfoNCE", rows, width, dtype)
    if not bench.chosen(name):
        return
    leaves = a, b = pair(bench, rows, width, dtype, unit=False)
    ours: dict[str, Loss] = {}
    for label, more in precisions("MatryoshkaLoss", dtype).items():
        loss = losses.MatryoshkaLoss(model, losses.MultipleNegativesRankingLoss(model, **options, **more), dims)
        ours[label] = lambda loss=loss: loss.compute_loss_from_embeddings([a, b])
    single = value_and_gradients(partial(CF.info_nce, a, b, scale=SCALE, **options), leaves)
    candidates = [
        Candidate("floor: CF.info_nce at full width", FLOOR, single),
        *as_candidates(ours, leaves, OURS, bound),
    ]
    if rows <= WIDEST_WHOLE:
        inner = library.MultipleNegativesRankingLoss(model)

        def theirs() -> Tensor:  # what its MatryoshkaLoss does with the embeddings of an uncached loss
            cut = ([F.normalize(x[:, :d], dim=1) for x in (a, b)] for d in dims)
            return torch.stack([inner.compute_loss_from_embeddings(sides, None) for sides in cut]).sum()

        candidates.extend(as_candidates({"sentence-transformers": theirs}, leaves, PEER, bound))
    bench.case(name, candidates, truth(partial(matryoshka, dims=dims), leaves), gradients=PAIR)


def run_guided(bench: Benchmark, rows: int, width: int, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """GISTEmbed: three blocks of the student's similarities, three of the guide's, whose pairs are far nearer to each
    other than to anything else: which it leaves out does not hang on rounding."""
    if not bench.chosen(shaped("GISTEmbed", rows, width, dtype)):
        return
    leaves = a, b = pair(bench, rows, width, dtype)
    guides = [side.detach().roll(1, 1) for side in leaves]
    settings = {"temperature": 1 / SCALE, **options}
    # It normalises: unit vectors stay what they are, but their gradients lose what lies along them.
    ours = call_of(CF.guided_info_nce, "CF.guided_info_nce", dtype, a, b, *guides, **settings)
    sides = [(a, b), (a, a), (b, b)]
    guided_by = [(guides[0], guides[1]), (guides[0], guides[0]), (guides[1], guides[1])]
    blocks = {str(k): Projection(*side) for k, side in enumerate(sides + guided_by)}
    size = FlexChunkLoss(total, **options).plan(blocks).chunk_rows
    candidates = [
        *product_floors(sides, size, 1, "9 of its 12 products"),
        *as_candidates(ours, leaves, OURS, BOUNDS[dtype]),
        *as_candidates(whole_guided(a, b, guides, raw=True), leaves, PEER, BOUNDS[dtype]),
    ]
    formula = partial(guided, guides=guides)
    bench.case(title("GISTEmbed", a), candidates, truth(formula, leaves, raw=True), gradients=PAIR)


MINED = {
    "mega-batch margin": (CF.mega_batch_margin, "MegaBatchMarginLoss"),
    "batch-hard triplet": (CF.batch_hard_triplet, "BatchHardTripletLoss"),
    "batch-semi-hard triplet": (CF.batch_semi_hard_triplet, "BatchSemiHardTripletLoss"),
    "batch-all triplet": (CF.batch_all_triplet, "BatchAllTripletLoss"),
}


def run_mined(bench: Benchmark, rows: int, width: int, dtype: torch.dtype, options: dict[str, Any]) -> None:
    try:
        from sentence_transformers.sentence_transformer import losses as library
    except ImportError:
        library = None

    def theirs(name: str, kind: str, sides: Sequence[Tensor], labels: Tensor) -> Loss:
        loss = getattr(library, kind)(nn.Sequential(nn.Identity()))
        if name.startswith("mega"):
            return partial(loss.calculate_loss, [[side] for side in sides])
        return partial(loss.compute_loss_from_embeddings, sides, labels)

    for name, (function, kind) in MINED.items():
        fits = WIDEST_WHOLE // (64 if name.startswith("batch-all") else 1)
        fewer = min(rows, 256 if name.startswith("batch-all") else 2048)
        for n, timed in ((rows, True), (fewer, False)):
            sides = pair(bench, n, width, dtype)[: 2 if name.startswith("mega") else 1]
            labels = torch.arange(n, device=bench.device) % max(n // 8, 1)
            arguments = sides if name.startswith("mega") else [*sides, labels]
            ours = call_of(function, "ours", dtype, *arguments, **options)
            if timed:  # half-precision outputs are compiled for their errors alone
                ours = {"ours": ours["ours"]}
            candidates = list(as_candidates(ours, sides, OURS, MINED_BOUNDS[dtype]))
            if library is not None and n <= fits:
                loss = {"sentence-transformers": theirs(name, kind, sides, labels)}
                candidates.extend(as_candidates(loss, sides, PEER, MINED_BOUNDS[dtype]))
            if timed:
                bench.case(title(name, sides[0]), candidates, None)
            elif library is not None:
                wide = [side.detach().double().requires_grad_() for side in sides]
                exact = value_and_gradients(theirs(name, kind, wide, labels), wide)
                told = title(f"errors, {name}", sides[0])
                bench.case(told, candidates, exact, gradients=PAIR[: len(sides)], timed=False)


NEAR = ("InfoNCE", "symmetric InfoNCE", "GTE softmax", "sigmoid pairs", "GISTEmbed")


def near_duplicates(bench: Benchmark, rows: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """Raw embeddings of a model in this dtype. Cosines of queries are about .92, of a query and its document .98."""
    torch.manual_seed(0)
    a = torch.randn(1, width, device=bench.device) + 0.3 * torch.randn(rows, width, device=bench.device)
    b = a + 0.2 * torch.randn(rows, width, device=bench.device)
    return [side.to(dtype).requires_grad_() for side in (a, b)]


def clear_guides(bench: Benchmark, rows: int, dtype: torch.dtype) -> list[Tensor]:
    """A guide of a few numbers, which no dtype rounds: of a class's texts, all but the pair itself are nearer to each
    other (.8) than a query is to its document (.6), and those of other classes are far away (.2 and below)."""
    classes = 1 << (rows.bit_length() // 2)
    index = torch.arange(rows, device=bench.device)
    found = torch.zeros(2, rows, classes + -(-rows // classes), device=bench.device)
    found[:, index, index % classes] = 1.0
    found[0, index, classes + index // classes] = -0.5
    found[1, index, classes + index // classes] = 0.5
    return list(found.to(dtype))


def run_near_duplicates(bench: Benchmark, rows: int, width: int, dtype: torch.dtype, options: dict[str, Any]) -> None:
    pair = a, b = near_duplicates(bench, rows, width, dtype)
    guides = clear_guides(bench, rows, dtype)
    for scale in SCALES:
        told = {name: title(f"near duplicates, {name}, scale {scale:.0f}", a) for name in NEAR}
        if not bench.chosen(*told.values()):
            continue
        scalars = learnable(bench, scale, -0.95 * scale)  # pairs lie on one side of the bias, all others on the other
        leaves = [*pair, *scalars]
        # name: our function and its arguments; other people's; the formula of unit vectors; what learns
        cases: dict[str, tuple[dict[str, Loss], dict[str, Loss], Callable[..., Tensor], list[Tensor]]] = {
            "InfoNCE": (
                call_of(CF.info_nce, "ours", dtype, a, b, scale=scale, **options),
                one_way_peers(a, b, scale, raw=True),
                partial(one_way, scale=scale),
                pair,
            ),
            "symmetric InfoNCE": (
                call_of(CF.info_nce, "ours", dtype, a, b, scale=scale, **BOTH, **options),
                library_loss(a, b, scale, raw=True, **BOTH)
                | (inf_cl(a, b, both=True, scale=scale, raw=True) if a.is_cuda else {}),
                partial(both_ways, scale=scale),
                pair,
            ),
            "GTE softmax": (
                call_of(CF.info_nce, "ours", dtype, a, b, scale=scale, directions=GTE, **options),
                library_loss(a, b, scale, raw=True, directions=GTE),
                partial(gte, scale=scale),
                pair,
            ),
            "sigmoid pairs": (
                call_of(our_sigmoid, "ours", dtype, *leaves, **options),
                whole_sigmoid(*leaves, raw=True) | siglip_kernel(*leaves, raw=True),
                sigmoid,
                leaves,
            ),
            "GISTEmbed": (
                call_of(CF.guided_info_nce, "ours", dtype, a, b, *guides, temperature=1 / scale, **options),
                whole_guided(a, b, guides, scale, raw=True),
                partial(guided, guides=guides, scale=scale),
                pair,
            ),
        }
        for name, (ours, peers, formula, learns) in cases.items():
            candidates = [
                *as_candidates(ours, learns, OURS, BOUNDS[dtype]),
                *as_candidates(peers, learns, PEER, BOUNDS[dtype]),
            ]
            names = (*PAIR, "log scale", "bias")[: len(learns)]
            bench.case(told[name], candidates, truth(formula, learns, raw=True), gradients=names, timed=False)


def untrained(device: torch.device, layers: int, width: int, heads: int, autocast: bool) -> nn.Module:
    """A SentenceTransformer: BERT from a config, without the tokenizer that a Transformer module brings (features are
    token ids) and without dropout, the mean of the tokens, unit length. `autocast`: bfloat16 in BERT alone."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
    from transformers import BertConfig, BertModel

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            shape = dict(hidden_size=width, num_attention_heads=heads, intermediate_size=4 * width)
            off = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
            self.bert = BertModel(BertConfig(num_hidden_layers=layers, **shape, **off), add_pooling_layer=False)

        def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
            # Here, as the trainer does: gradient caching runs it once more in backward, where no context is left.
            with torch.autocast(device.type, torch.bfloat16) if autocast else nullcontext():
                hidden = self.bert(features["input_ids"], features["attention_mask"]).last_hidden_state
            return {**features, "token_embeddings": hidden}

    torch.manual_seed(0)
    return SentenceTransformer(modules=[Encoder(), Pooling(width), Normalize()], device=str(device)).train()


def random_tokens(rows: int, tokens: int, columns: int, device: torch.device) -> list[dict[str, Tensor]]:
    """Features of as many columns."""
    ids = [torch.randint(1000, 30000, (rows, tokens), device=device) for _ in range(columns)]
    return [{"input_ids": column, "attention_mask": torch.ones_like(column)} for column in ids]


def run_step(bench: Benchmark, rows: int, mini_batch: int, tokens: int, layers: int, options: dict[str, Any]) -> None:
    """Forward and backward of an encoder of BERT's size, gradients cached, and of the loss of all pairs at once."""
    try:
        from sentence_transformers.sentence_transformer import losses as library

        from chunked_embed import losses
    except ImportError:
        return
    ours, theirs = "CachedMultipleNegativesRankingLoss", "sentence-transformers, cached"
    name = f"training step, {rows} pairs of {tokens} tokens, BERT of {layers} layers, mini-batches of {mini_batch}"
    if not bench.wants(name, [ours, theirs] if bench.peers else [ours]):
        return

    heads = 12 if layers == 12 else 2
    model = untrained(bench.device, layers, 64 * heads, heads, autocast=bench.device.type == "cuda")
    batch = random_tokens(rows, tokens, 2, bench.device)
    kinds = {
        ours: (OURS, losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=mini_batch, **options)),
        theirs: (PEER, library.CachedMultipleNegativesRankingLoss(model, mini_batch_size=mini_batch)),
    }
    if not bench.peers:
        del kinds[theirs]
    parameter = model[0].bert.encoder.layer[0].attention.self.query.weight

    def step(loss: nn.Module) -> list[Tensor]:
        model.zero_grad()
        value = loss([dict(column) for column in batch], None)
        value.backward()
        return [value.detach(), parameter.grad.clone()]

    expected: list[Tensor] | None = None
    for who, (role, loss) in kinds.items():  # seconds each: once to warm up and to compare, once for the time
        result, timing = once(partial(step, loss), bench.device)
        if expected is not None and (found := errors_of(result, expected, "", ()).gradient_error or 0.0) > 1e-3:
            timing.note = f"{found:.0e} from the other"
            if found > 5e-2:
                bench.wrong.append(f"{name}, {who}: {timing.note}")
        expected = expected or result
        bench.add(name, who, role, timing)


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split("x"))


def main(
    device: Annotated[str, typer.Option(help="cuda, or cpu for a small run")] = "cuda",
    only: Annotated[str, typer.Option(help="cases, comma-separated")] = ",".join(CASES),
    sizes: Annotated[str, typer.Option(help="rows x width, comma-separated")] = "",
    small: Annotated[str, typer.Option(help="rows x width of many blocks, of mining and of near duplicates")] = "",
    sigmoid_size: Annotated[str, typer.Option(help="rows x width of the sigmoid pairs")] = "",
    step: Annotated[str, typer.Option(help="pairs x mini-batch x tokens x layers of the training step")] = "",
    dtype: str = "",
    chunk_size: Annotated[int, typer.Option(help="rows; 0 for what the plan says")] = 0,
    compiled: bool = True,
    match: Match = "",
    peers: Peers = True,
    missing: Missing = False,
    budget: Budget = 0,
    profile: Profile = False,
    repeats: int = 5,
    out: Out = RESULTS,
) -> None:
    cpu = device == "cpu"
    chosen = only.split(",")
    if unknown := set(chosen) - set(CASES):
        raise typer.BadParameter(f"expected cases out of {CASES}, got {sorted(unknown)}")
    kind = getattr(torch, dtype or ("float32" if cpu else "bfloat16"))
    options = {"chunk_size": chunk_size or None, "compiled": compiled}
    bench = Benchmark("contrastive", torch.device(device), out, 2, repeats, match, peers, missing, budget, profile)
    where = {
        "infonce": sizes or ("256x32" if cpu else ONE_WAY),
        "symmetric": sizes or ("256x32" if cpu else TWO_WAY),
        "masked": sizes or ("256x32" if cpu else "65536x256"),
        "confident": small or ("128x32" if cpu else "16384x1024,16384x256,16384x64"),
        "matryoshka": sizes or ("256x32" if cpu else "65536x1024"),
        "sigmoid": sigmoid_size or ("256x32" if cpu else "65536x768"),
        "gte": small or ("128x32" if cpu else "16384x1024"),
        "guided": small or ("128x32" if cpu else "16384x1024"),
        "mined": small or ("128x32" if cpu else "16384x1024"),
        "near-duplicates": small or ("128x32" if cpu else "16384x1024"),
    }
    runs = {
        "infonce": run_infonce,
        "symmetric": run_symmetric,
        "masked": run_masked,
        "confident": run_confident,
        "gte": run_gte,
        "sigmoid": run_sigmoid,
        "matryoshka": run_matryoshka,
        "guided": run_guided,
        "mined": run_mined,
        "near-duplicates": run_near_duplicates,
    }
    for name in chosen:
        if name == "step":
            run_step(bench, *_shape(step or ("64x16x8x1" if cpu else "16384x1024x32x12")), options)
            continue
        for size in where[name].split(","):
            rows, width = _shape(size)
            runs[name](bench, rows, width, kind, options)
    bench.finish()


if __name__ == "__main__":
    typer.run(main)
