"""The SPLADE head: outputs of a masked language model pooled over the tokens of a text, beside sentence-transformers'.

    python benchmarks/sparse.py                        # everything, on the GPU
    python benchmarks/sparse.py --match 'queries*|*encode*'
    python benchmarks/sparse.py --device cpu           # small, in seconds

Texts are 256 of 256 tokens, of 128 to 256 (padded to 256), and queries of 16 to 48. Of a model that is not yet trained
nearly all outputs are active; of one that is, a few: a bias says how many. The value is the embeddings, and the truth
ordinary autograd in float64, some texts at a time. Floors are products of the tokens that are no padding: three, as a
dense gradient takes, and one. Peers have half-precision outputs, whose largest is often that of several tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
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
    Match,
    Missing,
    Out,
    Peers,
    Profile,
    products,
    value_and_gradients,
)
from torch import Tensor

from chunked_embed import functional as CF

BOUNDS = {torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float32: 1e-3}  # near ties go either way in float32
FEW_ACTIVE = 2e-2  # half precision: outputs near zero turn in float32, and of few entries they are a share
TRUTH_NUMBERS = 2**27  # outputs of the truth at a time
CHUNK = 4096  # rows of a floor


@dataclass(frozen=True)
class Texts:
    """Sizes of a case."""

    told: str
    n: int
    least: int  # tokens
    most: int
    vocabulary: int = 30_522
    width: int = 768


ON_GPU = [
    Texts("256 texts x 256", 256, 256, 256),
    Texts("256 texts x 128-256", 256, 128, 256),
    Texts("1024 queries x 16-48", 1024, 16, 48),
    Texts("64 texts x 128-256", 64, 128, 256, vocabulary=250_002),
]
ON_CPU = [Texts("4 texts x 6-12", 4, 6, 12, 200, 32), Texts("8 queries x 2-5", 8, 2, 5, 200, 32)]


@dataclass
class Case:
    hidden: Tensor  # (N, L, H)
    weight: Tensor  # (V, H)
    bias: Tensor  # (V,)
    mask: Tensor  # (N, L)
    upstream: Tensor  # (N, V)
    pooling: str
    active: float

    @property
    def leaves(self) -> list[Tensor]:
        return [self.hidden, self.weight, self.bias]


def make(texts: Texts, pooling: str, active: float, dtype: torch.dtype, device: torch.device) -> Case:
    """Of embeddings a share is above zero: ``active``."""
    generator = torch.Generator(device).manual_seed(0)
    normal = partial(torch.randn, device=device, generator=generator)
    hidden = normal(texts.n, texts.most, texts.width).mul_(0.3).to(dtype)
    weight = normal(texts.vocabulary, texts.width).mul_(0.05).to(dtype)
    lengths = torch.randint(texts.least, texts.most + 1, (texts.n, 1), device=device, generator=generator)
    mask = torch.arange(texts.most, device=device) < lengths
    bias = torch.zeros(texts.vocabulary, device=device, dtype=dtype)
    if active < 1:
        seen = hidden[:8].float() @ weight[:2000].float().T
        bias -= torch.where(mask[:8, :, None], seen, -torch.inf).amax(1).flatten().quantile(1 - active).to(dtype)
    upstream = normal(texts.n, texts.vocabulary)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    return Case(*leaves, mask, upstream, pooling, active)


def plain(hidden: Tensor, weight: Tensor, bias: Tensor, mask: Tensor, pooling: str) -> Tensor:  # -> (N, V)
    outputs = (F.linear(hidden, weight, bias) * mask[..., None]).relu().log1p()
    return outputs.max(1).values if pooling == "max" else outputs.sum(1)


def of_library(hidden: Tensor, weight: Tensor, bias: Tensor, mask: Tensor, pooling: str) -> Tensor:
    from sentence_transformers.sparse_encoder.modules import SpladePooling

    features = {"token_embeddings": F.linear(hidden, weight, bias), "attention_mask": mask}
    return SpladePooling(pooling)(features)["sentence_embedding"]


def ours(hidden: Tensor, weight: Tensor, bias: Tensor, mask: Tensor, pooling: str) -> Tensor:
    return CF.splade_pool(hidden, weight, bias, mask=mask, pooling=pooling)


def truth(case: Case, grad: bool) -> Callable[[], list[Tensor]]:
    def run() -> list[Tensor]:
        weight, bias = (t.detach().double().requires_grad_() for t in (case.weight, case.bias))
        n, length, _ = case.hidden.shape
        size = max(TRUTH_NUMBERS // (length * len(weight)), 1)
        embeddings, of_hidden, sums = [], [], [torch.zeros_like(weight), torch.zeros_like(bias)]
        for part in range(0, n, size):
            texts = slice(part, part + size)
            hidden = case.hidden[texts].detach().double().requires_grad_()
            found = plain(hidden, weight, bias, case.mask[texts], case.pooling)
            embeddings.append(found.detach().float())
            if grad:
                upstream = case.upstream[texts].to(found)
                of_part, *of_sides = torch.autograd.grad(found, (hidden, weight, bias), upstream)
                of_hidden.append(of_part.float())
                for total, more in zip(sums, of_sides):
                    total += more
        gradients = [torch.cat(of_hidden), *(total.float() for total in sums)] if grad else []
        return [torch.cat(embeddings), *gradients]

    return run


Pool = Callable[[Tensor, Tensor, Tensor, Tensor, str], Tensor]


def candidates(case: Case, grad: bool, compiled: bool) -> list[Candidate]:
    pools: dict[str, tuple[str, Pool]] = {
        "CF.splade_pool": (OURS, ours),
        "sentence-transformers": (PEER, of_library),
    }
    if compiled:
        pools["torch.compile"] = (PEER, torch.compile(plain))
    bound = max(BOUNDS[case.hidden.dtype], FEW_ACTIVE if case.active < 1 else 0.0)
    x = case.hidden.detach()[case.mask]
    w = case.weight.detach()
    sizes = [len(part) for part in x.split(CHUNK)]
    found = [Candidate("floor: 1 product", FLOOR, lambda: [part @ w.T for part in x.split(CHUNK)][-1:])]
    if grad:
        found.insert(0, Candidate("floor: 3 products", FLOOR, products((x, w), (), sizes)))
    for name, (role, pool) in pools.items():
        embed = partial(pool, *case.leaves, case.mask, case.pooling)

        def loss(embed: Callable[[], Tensor] = embed) -> Tensor:
            return (embed() * case.upstream).sum()

        def read(embed: Callable[[], Tensor] = embed) -> Tensor:
            with torch.no_grad():
                return embed()

        if grad:
            found.append(Candidate(name, role, value_and_gradients(loss, case.leaves), bound, read))
        else:
            found.append(Candidate(name, role, lambda read=read: [read()], bound))
    return found


def main(
    device: Annotated[str, typer.Option(help="cuda, or cpu for a small run")] = "cuda",
    only: Annotated[str, typer.Option(help="max, sum, encode: comma-separated")] = "max,sum,encode",
    dtype: str = "",
    compiled: bool = True,
    match: Match = "",
    peers: Peers = True,
    missing: Missing = False,
    budget: Budget = 0,
    repeats: int = 5,
    profile: Profile = False,
    out: Out = RESULTS,
) -> None:
    cpu = device == "cpu"
    kind = getattr(torch, dtype or ("float32" if cpu else "bfloat16"))
    bench = Benchmark("sparse", torch.device(device), out, 2, repeats, match, peers, missing, budget, profile)
    for texts in ON_CPU if cpu else ON_GPU:
        for what in only.split(","):
            for active in (1.0, 0.02) if what == "max" else (1.0,):
                told = {"max": f"SPLADE, {active:.0%} active", "sum": "SPLADE, sum", "encode": "SPLADE, encode"}[what]
                sizes = f"V={texts.vocabulary}, H={texts.width}, {str(kind).removeprefix('torch.')}"
                title = f"{told}, {texts.told}, {sizes}"
                if not bench.chosen(title):
                    continue
                case = make(texts, "sum" if what == "sum" else "max", active, kind, bench.device)
                grad = what != "encode"
                found = candidates(case, grad, compiled and not cpu)
                bench.case(title, found, truth(case, grad), "embeddings", ("hidden", "weight", "bias") * grad)
    bench.finish()


if __name__ == "__main__":
    typer.run(main)
