"""In-batch contrastive losses beside their product floors and beside other people's, then whole training steps.

    python benchmarks/contrastive.py                                      # everything, on the GPU
    python benchmarks/contrastive.py --only infonce,sigmoid --sizes 65536x1024
    python benchmarks/contrastive.py --device cpu --no-compiled           # small, in seconds

A floor is the bare matrix products in the same chunks: three for one direction, four for both (row and column sums of
one matrix), twelve for the four directions of GTE. Inputs are unit vectors, so that all candidates do the same work;
under "from raw embeddings" they are normalised inside. Peers that are not installed are left out.
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
    once,
    relative_error,
    value_and_gradients,
)
from torch import Tensor, nn

from chunked_embed import FlexChunkLoss, Projection
from chunked_embed import functional as CF

CASES = ("infonce", "symmetric", "gte", "sigmoid", "matryoshka", "guided", "mined", "step")
BOUNDS = {torch.bfloat16: 2e-2, torch.float32: 1e-4}
SCALE, WIDEST_WHOLE = 20.0, 32768  # rows up to which a whole similarity matrix is tried
GTE = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
Loss = Callable[[], Tensor]


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


# --- the truth, in float32 or float64: some rows at a time, differentiated by autograd -------------------------------


def one_way(a: Tensor, b: Tensor, rows: slice, scale: float | Tensor = SCALE) -> Tensor:
    z = scale * a[rows] @ b.T
    return (z.logsumexp(1) - z.diagonal(rows.start)).sum()


def both_ways(a: Tensor, b: Tensor, rows: slice) -> Tensor:
    return (one_way(a, b, rows) + one_way(b, a, rows)) / 2


def gte(a: Tensor, b: Tensor, rows: slice) -> Tensor:
    blocks = [SCALE * x[rows] @ y.T for x, y in ((a, b), (a, a), (b, a), (b, b))]
    own = torch.arange(len(a), device=a.device) == torch.arange(rows.start, rows.stop, device=a.device)[:, None]
    positive = blocks[0].diagonal(rows.start)
    blocks[1], blocks[3] = (z.masked_fill(own, -torch.inf) for z in (blocks[1], blocks[3]))
    return (torch.cat(blocks, 1).logsumexp(1) - positive).sum()


def sigmoid(a: Tensor, b: Tensor, log_scale: Tensor, bias: Tensor, rows: slice) -> Tensor:
    z = log_scale.exp() * a[rows] @ b.T + bias
    return F.softplus(z).sum() - z.diagonal(rows.start).sum()


def matryoshka(a: Tensor, b: Tensor, rows: slice, dims: Sequence[int]) -> Tensor:
    cut = ((F.normalize(a[:, :d], dim=1), F.normalize(b[:, :d], dim=1)) for d in dims)
    return torch.stack([one_way(x, y, rows) for x, y in cut]).sum()


def truth(formula: Callable[..., Tensor], leaves: Sequence[Tensor], size: int = 512) -> Callable[[], list[Tensor]]:
    def run() -> list[Tensor]:
        n = len(leaves[0])
        dtype = torch.float64 if n <= 4096 else torch.float32
        wide = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
        total, sums = torch.zeros((), dtype=torch.float64, device=wide[0].device), [torch.zeros_like(w) for w in wide]
        for start in range(0, n, size):
            value = formula(*wide, rows=slice(start, min(start + size, n))) / n
            for gathered, grad in zip(sums, torch.autograd.grad(value, wide), strict=True):
                gathered += grad
            total += value.detach()
        return [total, *sums]

    return run


# --- floors and peers ------------------------------------------------------------------------------------------------


def products(sides: Sequence[tuple[Tensor, Tensor]], rows: int, forwards: int) -> Callable[[], list[Tensor]]:
    sides = [(a.detach(), b.detach()) for a, b in sides]

    def run() -> list[Tensor]:
        results = []
        for a, b in sides:
            buffer = torch.empty(min(rows, len(a)), len(b), dtype=a.dtype, device=a.device)
            for chunk in a.split(rows):
                outputs = buffer[: len(chunk)]
                for _ in range(forwards):
                    torch.mm(chunk, b.T, out=outputs)
                results = [outputs @ b, outputs.T @ chunk]
        return results

    return run


def library_loss(a: Tensor, b: Tensor, **options: Any) -> dict[str, Loss]:
    """sentence-transformers on unit vectors; empty without the library."""
    try:
        from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
        from sentence_transformers.util import dot_score
    except ImportError:
        return {}
    loss = MultipleNegativesRankingLoss(nn.Identity(), scale=SCALE, similarity_fct=dot_score, **options)
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


def one_way_peers(a: Tensor, b: Tensor, target: Tensor) -> dict[str, Loss]:
    found: dict[str, Loss] = {}
    if len(a) <= WIDEST_WHOLE:
        found["torch, whole matrix"] = lambda: F.cross_entropy(SCALE * (a @ b.T).float(), target)
    if hasattr(F, "linear_cross_entropy"):
        found["F.linear_cross_entropy"] = lambda: F.linear_cross_entropy(a * SCALE, b, target)
    if a.is_cuda:
        try:
            from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Liger

            found["Liger fused linear CE"] = lambda: Liger.apply(a * SCALE, b, target)[0]
        except ImportError:
            pass
        try:
            from cut_cross_entropy import linear_cross_entropy

            found["cut-cross-entropy"] = lambda: linear_cross_entropy(a * SCALE, b, target)
        except ImportError:
            pass
        found |= inf_cl(a, b, target)
    return found


def inf_cl(a: Tensor, b: Tensor, target: Tensor, both: bool = False) -> dict[str, Loss]:
    try:
        from inf_cl import cal_flash_loss
    except ImportError:
        return {}
    if both:
        return {
            "Inf-CL": lambda: (
                (cal_flash_loss(a, b, target, SCALE).mean() + cal_flash_loss(b, a, target, SCALE).mean()) / 2
            )
        }
    return {"Inf-CL": lambda: cal_flash_loss(a, b, target, SCALE).mean()}


# --- cases -----------------------------------------------------------------------------------------------------------


def pair(bench: Benchmark, rows: int, width: int, dtype: torch.dtype, unit: bool = True) -> list[Tensor]:
    """Queries and documents that resemble each other, so that gradients are not all of one size."""
    torch.manual_seed(0)
    a = torch.randn(rows, width, device=bench.device)
    b = 0.3 * a + torch.randn(rows, width, device=bench.device)
    sides = [F.normalize(side, dim=1) for side in (a, b)] if unit else [a, b]
    return [side.to(dtype).requires_grad_() for side in sides]


def title(name: str, a: Tensor) -> str:
    return f"{name} {len(a)}x{a.shape[1]}, {str(a.dtype).removeprefix('torch.')}"


def run_infonce(bench: Benchmark, rows: int, width: int, dtype: torch.dtype, options: dict[str, Any]) -> None:
    leaves = a, b = pair(bench, rows, width, dtype)
    target, bound = torch.arange(rows, device=bench.device), BOUNDS[dtype]
    user = UserInfoNCE(**options)
    size = user.plan(Projection(a, b), {"target": target}).chunk_rows
    ours: dict[str, Loss] = {
        "CF.info_nce": partial(CF.info_nce, a, b, scale=SCALE, similarity="dot", **options),
        "CF.info_nce, normalising": partial(CF.info_nce, a, b, scale=SCALE, **options),
        "a user's loss_fn": lambda: user(Projection(a, b), {"target": target}).loss,
    }
    peers = one_way_peers(a, b, target) | library_loss(a, b)
    candidates = [
        Candidate(f"floor: 3 products, chunks of {size}", FLOOR, products([(a, b)], size, 1)),
        *as_candidates({k: v for k, v in ours.items() if "normalising" not in k}, leaves, OURS, bound),
        *as_candidates(peers, leaves, PEER, bound),
    ]
    for mini_batch in (1024,) if rows > WIDEST_WHOLE else (1024, 32):
        cached = cached_stage(a, b, mini_batch)
        if cached and mini_batch < rows:
            candidates.append(Candidate(f"sentence-transformers cached, {mini_batch}", PEER, cached, bound))
    bench.case(title("InfoNCE", a), candidates, truth(one_way, leaves))


def run_symmetric(bench: Benchmark, rows: int, width: int, dtype: torch.dtype, options: dict[str, Any]) -> None:
    leaves = a, b = pair(bench, rows, width, dtype)
    target, bound = torch.arange(rows, device=bench.device), BOUNDS[dtype]
    directions = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
    size = UserInfoNCE(**options).plan(Projection(a, b), {"target": target}).chunk_rows
    ours = {"CF.info_nce": partial(CF.info_nce, a, b, scale=SCALE, similarity="dot", **directions, **options)}
    peers = library_loss(a, b, **directions) | (inf_cl(a, b, target, both=True) if a.is_cuda else {})
    candidates = [
        Candidate(f"floor: 4 products, chunks of {size}", FLOOR, products([(a, b)], size, 2)),
        *as_candidates(ours, leaves, OURS, bound),
        *as_candidates(peers, leaves, PEER, bound),
    ]
    cached = cached_stage(a, b, 1024, **directions)
    if cached and rows > 1024:
        candidates.append(Candidate("sentence-transformers cached, 1024", PEER, cached, bound))
    bench.case(title("symmetric InfoNCE", a), candidates, truth(both_ways, leaves))


def run_gte(bench: Benchmark, rows: int, width: int, dtype: torch.dtype, options: dict[str, Any]) -> None:
    leaves = a, b = pair(bench, rows, width, dtype)
    bound = BOUNDS[dtype]
    blocks = {name: Projection(x, y) for name, x, y in zip(GTE, (a, a, b, b), (b, a, a, b), strict=True)}
    size = FlexChunkLoss(total, **options).plan(blocks).chunk_rows
    ours = {"CF.info_nce": partial(CF.info_nce, a, b, scale=SCALE, similarity="dot", directions=GTE, **options)}
    candidates = [
        Candidate(f"floor: 12 products, chunks of {size}", FLOOR, products([(a, b), (a, a), (b, a), (b, b)], size, 1)),
        *as_candidates(ours, leaves, OURS, bound),
        *as_candidates(library_loss(a, b, directions=GTE), leaves, PEER, bound),
    ]
    cached = cached_stage(a, b, 1024, directions=GTE)
    if cached and rows > 1024:
        candidates.append(Candidate("sentence-transformers cached, 1024", PEER, cached, bound))
    bench.case(title("GTE softmax", a), candidates, truth(gte, leaves))


def run_sigmoid(bench: Benchmark, rows: int, width: int, dtype: torch.dtype, options: dict[str, Any]) -> None:
    a, b = pair(bench, rows, width, dtype)
    log_scale = torch.tensor(10.0, device=bench.device).log().requires_grad_()
    bias = torch.tensor(-10.0, device=bench.device, requires_grad=True)
    leaves, bound = [a, b, log_scale, bias], BOUNDS[dtype]
    target = torch.arange(rows, device=bench.device)
    size = UserInfoNCE(**options).plan(Projection(a, b), {"target": target}).chunk_rows
    ours = {
        "CF.sigmoid_pairs": lambda: CF.sigmoid_pairs(
            a, b, scale=log_scale.exp(), bias=bias, similarity="dot", **options
        )
    }
    peers: dict[str, Loss] = {}
    if a.is_cuda:
        try:
            from siglip_kernel import fused_siglip_loss

            peers["siglip-kernel"] = lambda: fused_siglip_loss(a, b, log_scale, bias)
        except ImportError:
            pass
    candidates = [
        Candidate(f"floor: 3 products, chunks of {size}", FLOOR, products([(a, b)], size, 1)),
        *as_candidates(ours, leaves, OURS, bound),
        *as_candidates(peers, leaves, PEER, bound),
    ]
    bench.case(title("sigmoid pairs", a), candidates, truth(sigmoid, leaves))


def run_matryoshka(bench: Benchmark, rows: int, width: int, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """The ratio is to the loss of the full width alone: what the other widths cost."""
    try:
        from sentence_transformers.sentence_transformer import losses as library

        from chunked_embed import losses
    except ImportError:
        return
    leaves = a, b = pair(bench, rows, width, dtype, unit=False)
    dims, bound, model = [width >> k for k in range(5)], BOUNDS[dtype], Embedded(width)
    ours = losses.MatryoshkaLoss(model, losses.MultipleNegativesRankingLoss(model, **options), dims)
    single = value_and_gradients(partial(CF.info_nce, a, b, scale=SCALE, **options), leaves)
    candidates = [
        Candidate("floor: CF.info_nce at full width", FLOOR, single),
        *as_candidates({"MatryoshkaLoss": lambda: ours.compute_loss_from_embeddings([a, b])}, leaves, OURS, bound),
    ]
    if rows <= WIDEST_WHOLE:
        inner = library.MultipleNegativesRankingLoss(model)

        def theirs() -> Tensor:  # what its MatryoshkaLoss does with the embeddings of an uncached loss
            cut = ([F.normalize(x[:, :d], dim=1) for x in (a, b)] for d in dims)
            return torch.stack([inner.compute_loss_from_embeddings(sides, None) for sides in cut]).sum()

        candidates.extend(as_candidates({"sentence-transformers": theirs}, leaves, PEER, bound))
    name = title(f"Matryoshka ({', '.join(map(str, dims))}) over InfoNCE", a)
    bench.case(name, candidates, truth(partial(matryoshka, dims=dims), leaves))


def run_guided(bench: Benchmark, rows: int, width: int, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """GISTEmbed: three blocks of the student's similarities, three of the guide's."""
    leaves = a, b = pair(bench, rows, width, dtype)
    guides = [side.detach().roll(1, 1) for side in leaves]
    ours = {"CF.guided_info_nce": partial(CF.guided_info_nce, a, b, *guides, temperature=1 / SCALE, **options)}

    def theirs() -> Tensor:
        """The library's formula; its class wants tokenizers, and takes rows x rows x width."""
        scores, hints = ([(x @ y.T).float() for x, y in blocks] for blocks in (sides, guided))
        masks = [hint > hints[0].diagonal()[:, None] for hint in hints]
        masks[0] = masks[0] & ~torch.eye(rows, dtype=torch.bool, device=a.device)
        z = torch.cat([s.masked_fill(m, -torch.inf) for s, m in zip(scores, masks, strict=True)], 1) * SCALE
        return F.cross_entropy(z, torch.arange(rows, device=a.device))

    # Which candidates the guide leaves out hangs on rounding: only a whole computation in this dtype would agree.
    sides = [(a, b), (a, a), (b, b)]
    guided = [(guides[0], guides[1]), (guides[0], guides[0]), (guides[1], guides[1])]
    blocks = {str(k): Projection(*side) for k, side in enumerate(sides + guided)}
    size = FlexChunkLoss(total, **options).plan(blocks).chunk_rows
    candidates = [
        Candidate(f"floor: 9 of its 12 products, chunks of {size}", FLOOR, products(sides, size, 1)),
        *as_candidates(ours, leaves, OURS, BOUNDS[dtype]),
    ]
    if rows <= WIDEST_WHOLE:
        candidates.extend(as_candidates({"torch, whole matrices": theirs}, leaves, PEER, BOUNDS[dtype]))
    bench.case(title("GISTEmbed", a), candidates, None)


def run_mined(bench: Benchmark, rows: int, width: int, dtype: torch.dtype, options: dict[str, Any]) -> None:
    leaves = a, b = pair(bench, rows, width, dtype)
    labels = torch.arange(rows, device=bench.device) % max(rows // 8, 1)
    cases: dict[str, tuple[list[Tensor], Loss, Loss | None]] = {
        "mega-batch margin": (leaves, partial(CF.mega_batch_margin, a, b, **options), None),
        "batch-hard triplet": ([a], partial(CF.batch_hard_triplet, a, labels, **options), None),
        "batch-semi-hard triplet": ([a], partial(CF.batch_semi_hard_triplet, a, labels, **options), None),
        "batch-all triplet": ([a], partial(CF.batch_all_triplet, a, labels, **options), None),
    }
    try:
        from sentence_transformers.sentence_transformer import losses as library
    except ImportError:
        library = None
    for name, (used, ours, _) in cases.items():
        candidates = list(as_candidates({"ours": ours}, used, OURS, BOUNDS[dtype]))
        if library is not None and rows <= WIDEST_WHOLE // (64 if name.startswith("batch-all") else 1):
            classes = {
                "mega-batch margin": library.MegaBatchMarginLoss,
                "batch-hard triplet": library.BatchHardTripletLoss,
                "batch-semi-hard triplet": library.BatchSemiHardTripletLoss,
                "batch-all triplet": library.BatchAllTripletLoss,
            }
            loss = classes[name](nn.Sequential(nn.Identity()))
            if name.startswith("mega"):
                theirs = partial(loss.calculate_loss, [[a], [b]])
            else:
                theirs = partial(loss.compute_loss_from_embeddings, [a], labels)
            candidates.extend(as_candidates({"sentence-transformers": theirs}, used, PEER, BOUNDS[dtype]))
        bench.case(title(name, a), candidates, None)


def run_step(bench: Benchmark, rows: int, mini_batch: int, tokens: int, layers: int, options: dict[str, Any]) -> None:
    """Forward and backward of an encoder of BERT's size, gradients cached, and of the loss of all pairs at once."""
    try:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer import losses as library
        from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
        from transformers import BertConfig, BertModel

        from chunked_embed import losses
    except ImportError:
        return
    ours, theirs = "CachedMultipleNegativesRankingLoss", "sentence-transformers, cached"
    name = f"training step, {rows} pairs of {tokens} tokens, BERT of {layers} layers, mini-batches of {mini_batch}"
    if not bench.wants(name, [ours, theirs] if bench.peers else [ours]):
        return

    class Encoder(nn.Module):
        """A BERT from a config, without the tokenizer that a Transformer module brings: features are token ids."""

        def __init__(self) -> None:
            super().__init__()
            heads = 12 if layers == 12 else 2
            shape = dict(hidden_size=64 * heads, num_attention_heads=heads, intermediate_size=256 * heads)
            self.bert = BertModel(BertConfig(num_hidden_layers=layers, **shape), add_pooling_layer=False)

        def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
            # Here, as the trainer does: gradient caching runs it once more in backward, where no context is left.
            with torch.autocast(bench.device.type, torch.bfloat16, enabled=bench.device.type == "cuda"):
                hidden = self.bert(features["input_ids"], features["attention_mask"]).last_hidden_state
            return {**features, "token_embeddings": hidden}

    torch.manual_seed(0)
    encoder = Encoder()
    width = encoder.bert.config.hidden_size
    model = SentenceTransformer(modules=[encoder, Pooling(width), Normalize()], device=str(bench.device)).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    batch = []
    for _ in range(2):
        ids = torch.randint(1000, 30000, (rows, tokens), device=bench.device)
        batch.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    kinds = {
        ours: (OURS, losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=mini_batch, **options)),
        theirs: (PEER, library.CachedMultipleNegativesRankingLoss(model, mini_batch_size=mini_batch)),
    }
    if not bench.peers:
        del kinds[theirs]
    parameter = encoder.bert.encoder.layer[0].attention.self.query.weight

    def step(loss: nn.Module) -> list[Tensor]:
        model.zero_grad()
        value = loss([dict(column) for column in batch], None)
        value.backward()
        return [value.detach(), parameter.grad.clone()]

    expected: list[Tensor] | None = None
    for who, (role, loss) in kinds.items():  # seconds each: once to warm up and to compare, once for the time
        result, timing = once(partial(step, loss), bench.device)
        error = None if expected is None else relative_error(result, expected)
        expected = expected or result
        if error is not None and error > 5e-2:
            bench.wrong.append(f"{name}, {who}: {error:.0e} from the other")
        bench.add(name, who, role, timing, error, None)


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split("x"))


def main(
    device: Annotated[str, typer.Option(help="cuda, or cpu for a small run")] = "cuda",
    only: Annotated[str, typer.Option(help="cases, comma-separated")] = ",".join(CASES),
    sizes: Annotated[str, typer.Option(help="rows x width, comma-separated")] = "",
    small: Annotated[str, typer.Option(help="rows x width of the cases with many blocks or with mining")] = "",
    sigmoid_size: Annotated[str, typer.Option(help="rows x width of the sigmoid pairs")] = "",
    step: Annotated[str, typer.Option(help="pairs x mini-batch x tokens x layers of the training step")] = "",
    dtype: str = "",
    chunk_size: Annotated[int, typer.Option(help="rows; 0 for what the plan says")] = 0,
    compiled: bool = True,
    match: Match = "",
    peers: Peers = True,
    missing: Missing = False,
    budget: Budget = 0,
    repeats: int = 5,
    out: Out = RESULTS,
) -> None:
    cpu = device == "cpu"
    chosen = only.split(",")
    if unknown := set(chosen) - set(CASES):
        raise typer.BadParameter(f"expected cases out of {CASES}, got {sorted(unknown)}")
    kind = getattr(torch, dtype or ("float32" if cpu else "bfloat16"))
    options = {"chunk_size": chunk_size or None, "compiled": compiled}
    bench = Benchmark("contrastive", torch.device(device), out, 2, repeats, match, peers, missing, budget)
    usual = sizes or ("256x32" if cpu else "16384x1024,65536x1024")
    where = {
        "sigmoid": sigmoid_size or ("256x32" if cpu else "65536x768"),
        "gte": small or ("128x32" if cpu else "16384x1024"),
        "guided": small or ("128x32" if cpu else "16384x1024"),
        "mined": small or ("128x32" if cpu else "16384x1024"),
    }
    runs = {
        "infonce": run_infonce,
        "symmetric": run_symmetric,
        "gte": run_gte,
        "sigmoid": run_sigmoid,
        "matryoshka": run_matryoshka,
        "guided": run_guided,
        "mined": run_mined,
    }
    for name in chosen:
        if name == "step":
            run_step(bench, *_shape(step or ("64x16x8x1" if cpu else "65536x1024x32x12")), options)
            continue
        for size in where.get(name, usual).split(","):
            rows, width = _shape(size)
            runs[name](bench, rows, width, kind, options)
    bench.finish()


if __name__ == "__main__":
    typer.run(main)
