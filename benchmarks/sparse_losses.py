"""Losses of sparse embeddings beside sentence-transformers': from 16 to 16,384 texts of a vocabulary of 30,522.

    python benchmarks/sparse_losses.py                                   # everything, on the GPU
    python benchmarks/sparse_losses.py --only splade,flops --rows 1024,16384 --density 0.05
    python benchmarks/sparse_losses.py --device cpu                      # small, in seconds

Embeddings are as a SPLADE model has them after some training: most numbers are zero, at other places in each text, and
those of a document resemble its query's. `autocast` is how models are trained mostly: float32 embeddings, since
log1p is float32 there, whose products read bfloat16; `float32` multiplies in that. The value is the loss, all terms
together; gradients are those of the embeddings.

`splade` is SpladeLoss around the ranking loss, `margins` around MarginMSE with a positive and a negative, `order`
around CoSENT, `flops` the regulariser by itself, with a threshold that half of the texts are above. "ours" is what a
script gets, which leaves small batches to the library; "ours, chunked" is our computation at every size. `step` is a
whole training step in mini-batches, of a masked language model that is as good as none: what remains is the loss, and
what waits for the second pass. It has a time and a peak alone.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

import torch
import typer
from measure import (
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
    once,
)
from torch import Tensor, nn

CASES = ("splade", "margins", "order", "flops", "step")
KINDS = ("float32", "bfloat16", "autocast")
BOUNDS = {"float32": 1e-4, "bfloat16": 1e-2, "autocast": 1e-2}
NAMES = ("queries", "documents", "negatives")
DOCUMENTS, QUERIES = 3e-2, 5e-2  # weights of the regularisers, large enough to be seen in the gradients
FEW = 256  # rows up to which candidates are timed in turn
FEW_STEPS = 4096  # and up to which a training step is timed more than once
Terms = dict[str, Tensor]


class Embedded(nn.Module):
    """In the place of a model whose embeddings are there already."""

    similarity_fn_name = "dot"

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return features


# --- embeddings, and the truth in float64 ----------------------------------------------------------------------------


def embeddings(bench: Benchmark, rows: int, width: int, columns: int, kind: str, density: float) -> list[Tensor]:
    """Texts that have words of their own, and their query's."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32

    def words() -> Tensor:
        count = max(int(density * width), 1)
        x = torch.zeros(rows, width, device=bench.device)
        places = torch.randint(width, (rows, count), device=bench.device)
        return x.scatter_(1, places, torch.rand(rows, count, device=bench.device).add_(0.05).log1p_())

    first = words()
    sides = [first, *(words().add_(first, alpha=0.5 / i) for i in range(1, columns))]
    return [side.to(dtype).requires_grad_() for side in sides]


def exact(formula: Callable[..., Tensor], leaves: Sequence[Tensor], both: bool = True) -> Callable[[], list[Tensor]]:
    """The mean over rows of a formula, some rows at a time, and the regularisers."""

    def run() -> list[Tensor]:
        n, size = len(leaves[0]), 1024
        wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
        of_queries, of_documents = wide[0].mean(0).square().sum(), torch.stack([w.mean(0) for w in wide[1:]])
        rest = QUERIES * of_queries + DOCUMENTS * of_documents.mean(0).square().sum()
        total, sums = rest.detach(), list(torch.autograd.grad(rest, wide))
        for start in range(0, n, size):
            value = formula(*wide, rows=slice(start, min(start + size, n))) / n
            total += value.detach()
            for gathered, grad in zip(sums, torch.autograd.grad(value, wide), strict=True):
                gathered += grad
        return [total, *(gathered.float() for gathered in sums)]

    return run


def ranked(a: Tensor, b: Tensor, rows: slice) -> Tensor:
    z = a[rows] @ b.T
    return (z.logsumexp(1) - z.diagonal(rows.start)).sum()


def margins(a: Tensor, b: Tensor, c: Tensor, rows: slice, expected: Tensor) -> Tensor:
    found = (a[rows] * (b[rows] - c[rows])).sum(1)
    return (found - expected[rows]).square().sum()


def order(a: Tensor, b: Tensor, labels: Tensor) -> Tensor:
    s = 20 * torch.cosine_similarity(a, b)
    z = (s[:, None] - s[None]).masked_fill(labels[:, None] >= labels[None], -torch.inf)
    return torch.cat([z.new_zeros(1), z.flatten()]).logsumexp(0)


# --- cases -----------------------------------------------------------------------------------------------------------


def run(
    bench: Benchmark, name: str, candidates: list[Candidate], truth: Callable[[], Sequence[Tensor]], n: int
) -> None:
    measured = partial(bench.compare, seconds=0.5) if n <= FEW else bench.case
    columns = NAMES[: 3 if name.startswith("margins") else 2]
    measured(name, candidates, truth, gradients=columns)


def title(name: str, leaf: Tensor, kind: str, density: float) -> str:
    return f"{name} {len(leaf)}x{leaf.shape[1]}, {density:.1%} other than zero, {kind}"


def of_loss(loss: nn.Module, leaves: Sequence[Tensor], labels: Any, kind: str) -> Callable[[], Tensor]:
    features = [{"sentence_embedding": leaf} for leaf in leaves]

    def total() -> Tensor:
        device = leaves[0].device.type
        with torch.autocast(device, torch.bfloat16) if kind == "autocast" else nullcontext():
            terms: Terms = loss([dict(column) for column in features], labels)
        return torch.stack([term.float() for term in terms.values()]).sum()

    return total


def both_packages() -> tuple[Any, Any]:
    from sentence_transformers.sparse_encoder import losses as library

    from chunked_embed.sparse import losses

    return losses, library


def run_splade(
    bench: Benchmark,
    name: str,
    inner: str,
    rows: int,
    width: int,
    kind: str,
    density: float,
    options: dict[str, Any],
) -> None:
    losses, library = both_packages()
    leaves = embeddings(bench, rows, width, 3 if name == "margins" else 2, kind, density)
    case = title(name, leaves[0], kind, density)
    if not bench.chosen(case):
        return
    labels = None if name == "splade" else torch.rand(rows, device=bench.device)
    truth = exact(ranked, leaves)
    if name == "margins":
        truth = exact(partial(margins, expected=labels.double()), leaves)
    if name == "order":
        truth = exact(lambda a, b, rows: order(a, b, labels) * len(a) if rows.start == 0 else 0 * (a + b).sum(), leaves)
    weights = {"document_regularizer_weight": DOCUMENTS, "query_regularizer_weight": QUERIES}

    def candidate(package: Any, **options: Any) -> Callable[[], Tensor]:
        model = Embedded()
        return of_loss(
            package.SpladeLoss(model, getattr(package, inner)(model, **options), **weights), leaves, labels, kind
        )

    ours = {"ours": candidate(losses), "ours, chunked": candidate(losses, **options)}
    theirs = {"sentence-transformers": candidate(library)}
    candidates = [
        *as_candidates(ours, leaves, OURS, BOUNDS[kind]),
        *as_candidates(theirs, leaves, PEER, BOUNDS[kind]),
    ]
    run(bench, case, candidates, truth, rows)


def run_flops(bench: Benchmark, rows: int, width: int, kind: str, density: float) -> None:
    """Of two columns, as documents and their negatives are."""
    losses, library = both_packages()
    leaves = embeddings(bench, rows, width, 2, kind, density)
    for threshold in (None, int(1.2 * density * width)):
        case = title("flops" if threshold is None else f"flops above {threshold}", leaves[0], kind, density)
        ours = losses.FlopsLoss(None, threshold)
        theirs = library.FlopsLoss(None, threshold)

        def truth(loss: nn.Module = theirs) -> list[Tensor]:
            wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
            value = loss.compute_loss_from_embeddings(torch.cat(wide))
            return [value.detach(), *(grad.float() for grad in torch.autograd.grad(value, wide))]

        candidates = [
            *as_candidates({"ours": partial(ours.compute_loss_from_embeddings, leaves)}, leaves, OURS, BOUNDS[kind]),
            *as_candidates(
                {
                    "sentence-transformers": lambda loss=theirs: loss.compute_loss_from_embeddings(
                        torch.cat(leaves)
                    ).float()
                },
                leaves,
                PEER,
                BOUNDS[kind],
            ),
        ]
        run(bench, case, candidates, truth, rows)


def masked_model(bench: Benchmark, width: int, density: float) -> Any:
    """One layer over this vocabulary, whose head leaves about so much above zero."""
    import tempfile

    from sentence_transformers import SparseEncoder
    from sentence_transformers.sparse_encoder.modules import MLMTransformer, SpladePooling
    from tokenizers import Tokenizer, models
    from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    words = {word: n for n, word in enumerate([*special.values(), *(f"w{n}" for n in range(width - 5))])}
    config = BertConfig(
        vocab_size=width, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    model = BertForMaskedLM(config)
    with torch.no_grad():
        model.cls.predictions.bias.copy_(torch.where(torch.rand(width) < density, 0.5, -5.0))
    with tempfile.TemporaryDirectory() as folder:
        made = Tokenizer(models.WordLevel(words, "[UNK]"))
        PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)
        model.save_pretrained(folder)
        modules = [MLMTransformer(folder), SpladePooling()]
        return SparseEncoder(modules=modules, device="cpu").float().train().to(bench.device)


def run_step(bench: Benchmark, rows: int, width: int, kind: str, density: float, mini_batch: int) -> None:
    losses, library = both_packages()
    case = f"training step, {rows}x{width} in mini-batches of {mini_batch}, {density:.1%} other than zero, {kind}"
    if not bench.wants(case, ["ours", "sentence-transformers"]):
        return
    model = masked_model(bench, width, density)
    if kind == "bfloat16":
        model = model.bfloat16()
    tokens = torch.randint(5, width, (2, rows, 8), device=bench.device)
    features = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in tokens]
    weights = {"document_regularizer_weight": DOCUMENTS, "query_regularizer_weight": QUERIES}
    for who, package, role in (("ours", losses, OURS), ("sentence-transformers", library, PEER)):
        if role == PEER and not bench.peers:
            continue
        inner = package.SparseMultipleNegativesRankingLoss(model)
        loss = package.CachedSpladeLoss(model, inner, **weights, mini_batch_size=mini_batch)

        def step(loss: nn.Module = loss) -> Tensor:
            model.zero_grad()
            with torch.autocast(bench.device.type, torch.bfloat16) if kind == "autocast" else nullcontext():
                terms = loss([dict(column) for column in features], None)
            value = torch.stack(list(terms.values())).sum()
            value.backward()
            return value.detach()

        # Some thousand calls of a small model: what the host does beside them comes and goes.
        timings = [once(step, bench.device)[1] for _ in range(3 if rows <= FEW_STEPS else 1)]
        quickest = min(timings, key=lambda timing: timing.ms)
        bench.add(case, who, role, replace(quickest, first_s=timings[0].first_s))


def main(
    device: Annotated[str, typer.Option(help="cuda, or cpu for a small run")] = "cuda",
    only: Annotated[str, typer.Option(help="cases, comma-separated")] = ",".join(CASES),
    rows: Annotated[str, typer.Option(help="texts of a column, comma-separated")] = "",
    width: Annotated[int, typer.Option(help="of the vocabulary; 0: 30,522, or 300 on a CPU")] = 0,
    density: Annotated[float, typer.Option(help="share of numbers other than zero")] = 0.01,
    dtype: Annotated[str, typer.Option(help=f"of {', '.join(KINDS)}, comma-separated")] = "",
    mini_batch: Annotated[int, typer.Option(help="texts of a mini-batch of the training step")] = 64,
    chunk_size: Annotated[int, typer.Option(help="rows of ours, chunked; 0 for what the plan says")] = 0,
    compiled: Annotated[bool, typer.Option(help="steps of ours, chunked")] = True,
    match: Match = "",
    peers: Peers = True,
    missing: Missing = False,
    budget: Budget = 0,
    profile: Profile = False,
    repeats: int = 5,
    out: Out = RESULTS,
) -> None:
    cpu = device == "cpu"
    chosen, kinds = only.split(","), (dtype or ("float32" if cpu else "autocast,float32,bfloat16")).split(",")
    if unknown := (set(chosen) - set(CASES)) | (set(kinds) - set(KINDS)):
        raise typer.BadParameter(f"expected cases out of {CASES} and dtypes out of {KINDS}, got {sorted(unknown)}")
    width = width or (300 if cpu else 30522)
    sizes = [int(size) for size in (rows or ("16,64" if cpu else "16,64,256,1024,4096,16384")).split(",")]
    bench = Benchmark("sparse-losses", torch.device(device), out, 2, repeats, match, peers, missing, budget, profile)
    options = {"chunk_size": chunk_size or None, "compiled": compiled}
    inner = {
        "splade": "SparseMultipleNegativesRankingLoss",
        "margins": "SparseMarginMSELoss",
        "order": "SparseCoSENTLoss",
    }
    for kind in kinds:
        for n in sizes:
            for name in chosen:
                if name == "flops":
                    run_flops(bench, n, width, kind, density)
                elif name == "step":
                    run_step(bench, n, width, kind, density, mini_batch)
                else:
                    run_splade(bench, name, inner[name], n, width, kind, density, options)
    bench.finish()


if __name__ == "__main__":
    typer.run(main)
