"""Token losses through a large head against their product floor, and the kernel pair against its memory floor.

    python benchmarks/token_losses.py                                       # everything, on the GPU
    python benchmarks/token_losses.py --only linear-logps,cross-entropy --chunk-size 2048
    python benchmarks/token_losses.py --only kernel --tune                  # block sizes and warps
    python benchmarks/token_losses.py --device cpu --no-compiled            # small, in seconds

A floor is the bare matrix products in the same chunks (three where the loss is known, four behind `linear_logps`), or
for the kernel pair as many bytes as it reads and writes: the logits once for statistics, twice for the gradient.
"""

from collections.abc import Callable
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
    Timing,
    relative_error,
    value_and_gradients,
)
from torch import Tensor

from chunked_embed import FlexChunkLoss, Projection, TokenStatistics, linear_logps
from chunked_embed.kernels import available
from chunked_embed.kernels.token_scores import (
    DIFFERENTIABLE,
    STATISTICS,
    token_gradient_,
    token_gradient_reference,
    token_statistics,
    token_statistics_reference,
)

CASES = ("linear-logps", "cross-entropy", "grouped", "weight-error", "kernel")
BOUNDS = {torch.bfloat16: 2e-2, torch.float32: 1e-4}


# --- losses as a user writes them ---


class CrossEntropy(FlexChunkLoss):
    def loss_fn(self, outputs, rows):
        return F.cross_entropy(outputs, rows["target"], reduction="none")


class SequenceLoss(FlexChunkLoss):
    """The mean negative log-probability of a sequence's tokens: a grouped loss whose groups are single sequences."""

    def score_fn(self, outputs, rows):
        return {"logps": -F.cross_entropy(outputs, rows["target"], reduction="none")}

    def loss_fn(self, scores, groups):
        return -(scores["logps"] / scores["count"]).squeeze(1)


class TokenLoss(TokenStatistics):
    """The same over single tokens, on the token statistics that the engine ships: a hand-written kernel pair."""

    def loss_fn(self, scores, groups):
        return -scores["logps"].squeeze(1)


# --- truth and floors ---


def true_step(hidden: Tensor, weight: Tensor, target: Tensor, dtype: torch.dtype, rows: int = 1024):
    """Mean cross-entropy of hidden @ weight.T with both gradients, in `dtype`, some rows at a time."""
    wide = weight.detach().to(dtype)
    loss = torch.zeros((), dtype=dtype, device=hidden.device)
    grad_hidden = torch.empty(hidden.shape, dtype=dtype, device=hidden.device)
    grad_weight = torch.zeros_like(wide)
    for start in range(0, len(hidden), rows):
        part = slice(start, start + rows)
        chunk, index = hidden.detach()[part].to(dtype), target[part, None]
        log_p = torch.log_softmax(chunk @ wide.T, -1)
        loss -= log_p.gather(1, index).sum() / len(hidden)
        grad = log_p.exp_()
        grad.scatter_add_(1, index, grad.new_full(index.shape, -1))
        grad /= len(hidden)
        grad_hidden[part] = grad @ wide
        grad_weight.addmm_(grad.T, chunk)
    return [loss, grad_hidden, grad_weight]


def product_floor(hidden: Tensor, weight: Tensor, rows: int, forwards: int) -> Callable[[], list[Tensor]]:
    hidden, weight = hidden.detach(), weight.detach()

    def run() -> list[Tensor]:
        buffer = torch.empty(min(rows, len(hidden)), len(weight), dtype=hidden.dtype, device=hidden.device)
        results = []
        for chunk in hidden.split(rows):
            outputs = buffer[: len(chunk)]
            for _ in range(forwards):
                torch.mm(chunk, weight.T, out=outputs)
            results = [outputs @ weight, outputs.T @ chunk]
        return results

    return run


def others(hidden: Tensor, weight: Tensor, target: Tensor, bound: float) -> list[Candidate]:
    """Other ways to the same loss and gradients: whole logits, and what is installed here of the fused kernels."""

    def whole() -> Tensor:
        return F.cross_entropy((hidden @ weight.T).float(), target)

    losses = {"torch, whole logits": whole}
    if hasattr(F, "linear_cross_entropy"):
        losses["F.linear_cross_entropy"] = lambda: F.linear_cross_entropy(hidden, weight, target)
    if hidden.is_cuda:
        try:
            from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Liger

            losses["Liger fused linear CE"] = lambda: Liger.apply(hidden, weight, target)[0]
        except ImportError:
            pass
        try:
            from cut_cross_entropy import linear_cross_entropy

            losses["cut-cross-entropy"] = lambda: linear_cross_entropy(hidden, weight, target)
        except ImportError:
            pass
    steps = {name: value_and_gradients(loss, [hidden, weight]) for name, loss in losses.items()}
    return [Candidate(name, PEER, run, bound) for name, run in steps.items()]


# --- cases ---


def random_head(bench: Benchmark, tokens: int, vocabulary: int, width: int, dtype: torch.dtype):
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, device=bench.device, dtype=dtype).mul_(0.3).requires_grad_()
    weight = torch.randn(vocabulary, width, device=bench.device, dtype=dtype).mul_(0.02).requires_grad_()
    return hidden, weight, torch.randint(vocabulary, (tokens,), device=bench.device)


def run_head(
    bench: Benchmark, chosen: set[str], shape: tuple[int, int, int], dtype: torch.dtype, options: dict
) -> None:
    tokens, vocabulary, width = shape
    hidden, weight, target = random_head(bench, *shape, dtype)
    leaves, bound = [hidden, weight], BOUNDS[dtype]
    rows = CrossEntropy(**options).plan(Projection(hidden, weight), {"target": target}).chunk_rows
    size = f"{tokens} tokens, V={vocabulary}, H={width}, {str(dtype).removeprefix('torch.')}, chunks of {rows}"
    expected: list[Tensor] = []

    def truth() -> list[Tensor]:
        expected[:] = expected or true_step(hidden, weight, target, torch.float32)
        return expected

    if "linear-logps" in chosen:
        ours = value_and_gradients(lambda: -linear_logps(hidden, weight, target, **options).logps.mean(), leaves)
        candidates = [
            Candidate("floor: 4 products", FLOOR, product_floor(hidden, weight, rows, 2)),
            Candidate("linear_logps", OURS, ours, bound),
        ]
        bench.case(f"log-probabilities, {size}", candidates, truth)
    candidates = []
    if "cross-entropy" in chosen:
        loss = CrossEntropy(**options)
        ours = value_and_gradients(lambda: loss(Projection(hidden, weight), {"target": target}).loss, leaves)
        candidates.append(Candidate("loss_fn, row-wise", OURS, ours, bound))
    if "grouped" in chosen:
        sequence_loss = SequenceLoss(**options)
        segments = torch.arange(tokens, device=bench.device) // (tokens // 8)
        ours = value_and_gradients(
            lambda: sequence_loss(Projection(hidden, weight), {"target": target}, segments=segments).loss, leaves
        )
        candidates.append(Candidate("score_fn, grouped", OURS, ours, bound))
        token_loss = TokenLoss(**options)
        ours = value_and_gradients(lambda: token_loss(Projection(hidden, weight), {"target": target}).loss, leaves)
        candidates.append(Candidate("TokenStatistics, grouped", OURS, ours, bound))
    if candidates:
        candidates.append(Candidate("floor: 3 products", FLOOR, product_floor(hidden, weight, rows, 1)))
        bench.case(f"cross-entropy, {size}", candidates + others(hidden, weight, target, bound), truth)


def run_weight_error(bench: Benchmark, shape: tuple[int, int, int], dtype: torch.dtype, compiled: bool) -> None:
    """The weight gradient's distance from float64 must not grow with the number of chunks."""
    case = "weight gradient against float64, {} tokens, V={}, H={}".format(*shape)
    if not bench.wants(case, ["torch, one product", "linear_logps, 64 chunks"]):
        return
    hidden, weight, target = random_head(bench, *shape, dtype)
    leaves = [hidden, weight]
    expected = true_step(hidden, weight, target, torch.float64)[2:]

    def error(loss: Callable[[], Tensor]) -> float:
        return relative_error(value_and_gradients(loss, leaves)()[2:], expected)

    whole = error(lambda: F.cross_entropy((hidden @ weight.T).float(), target))
    bench.add(case, "torch, one product", PEER, Timing(), whole, None)
    for chunks in (1, 8, 64):
        options: dict[str, Any] = {"chunk_size": -(-shape[0] // chunks), "compiled": compiled}
        loss = CrossEntropy(**options)
        losses = {
            "loss_fn": lambda loss=loss: loss(Projection(hidden, weight), {"target": target}).loss,
            "linear_logps": lambda options=options: -linear_logps(hidden, weight, target, **options).logps.mean(),
        }
        for name, value in losses.items():
            found = error(value)
            note = f"{found / whole:.2f} x one product"
            if found > 2 * whole:
                bench.wrong.append(f"{case}, {name} in {chunks} chunks: {note}")
            bench.add(case, f"{name}, {chunks} chunks", OURS, Timing(note=note), found, None)


def run_kernel(bench: Benchmark, rows: int, columns: int, dtype: torch.dtype, tune: bool) -> None:
    """Statistics, then the gradient in place: one pass and two over the logits."""
    settings = {
        "logps": (("logps",), {}),
        "logps and entropy": (("logps", "entropy"), {}),
        "logps, softcap": (("logps",), {"softcap": 30.0, "temperature": 0.7}),
        "all statistics": (STATISTICS, {}),
    }
    torch.manual_seed(0)
    x = torch.randn(rows, columns, device=bench.device, dtype=dtype)
    target = torch.randint(columns, (rows,), device=bench.device)
    original = x.clone()
    copy = torch.empty_like(x)

    def three_passes() -> list[Tensor]:
        copy.copy_(original)  # read and write
        copy[: rows // 2].copy_(original[: rows // 2])  # and half of that
        return []

    for label, (names, options) in settings.items():
        upstream = {name: torch.full((rows,), 0.5, device=bench.device) for name in DIFFERENTIABLE if name in names}

        def run(names=names, options=options, upstream=upstream) -> list[Tensor]:
            stats = token_statistics(x, target, names=names, **options)
            return [*(stats[name] for name in names), token_gradient_(x, target, stats, upstream, **options)]

        def truth(names=names, options=options, upstream=upstream) -> list[Tensor]:
            x.copy_(original)
            parts = []
            for part in torch.arange(rows, device=bench.device).split(256):
                wide = original[part].double()
                stats = token_statistics_reference(wide, target[part], names=names, **options)
                pulled = {name: g[part] for name, g in upstream.items()}
                gradient = token_gradient_reference(wide, target[part], stats, pulled, **options)
                parts.append([*(stats[name].float() for name in names), gradient.to(dtype)])
            return [torch.cat(pieces) for pieces in zip(*parts, strict=True)]

        name = "Triton" if available(bench.device) else "plain torch"
        candidates = [Candidate("floor: 3 passes", FLOOR, three_passes), Candidate(name, OURS, run, BOUNDS[dtype])]
        bench.case(f"kernel pair {rows}x{columns}, {label}", candidates, truth)
    if tune:
        run_tuning(bench, x, target)


def run_tuning(bench: Benchmark, x: Tensor, target: Tensor) -> None:
    from chunked_embed.kernels import _triton_token_scores as kernels

    coefficient = torch.full((len(x),), 0.5, device=x.device)
    for names in (("logps", "lse"), ("logps", "lse", "entropy")):
        upstream = {name: coefficient for name in names if name != "lse"}
        stats = kernels.statistics(x, target, names, 1.0, None)
        launches = [{"block": block, "warps": warps} for block in (2048, 4096, 8192) for warps in (4, 8, 16)]
        runs = {
            "statistics": partial(kernels.statistics, x, target, names, 1.0, None),
            "gradient": partial(kernels.gradient_, x, target, stats, upstream, 1.0, None, x),
        }
        for what, run in runs.items():
            candidates = [
                Candidate("block {block}, {warps} warps".format(**launch), OURS, partial(run, **launch))
                for launch in launches
            ]
            bench.case(f"tuning {x.shape[0]}x{x.shape[1]}, {what}, {' and '.join(upstream)}", candidates, None)


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split("x"))


def main(
    device: Annotated[str, typer.Option(help="cuda, or cpu for a small run")] = "cuda",
    only: Annotated[str, typer.Option(help="cases, comma-separated")] = ",".join(CASES),
    head: Annotated[str, typer.Option(help="tokens x vocabulary x hidden")] = "",
    error: Annotated[str, typer.Option(help="tokens x vocabulary x hidden of the weight-gradient error")] = "",
    kernel: Annotated[str, typer.Option(help="rows x columns of the raw kernels")] = "",
    dtype: str = "",
    chunk_size: Annotated[int, typer.Option(help="rows; 0 for what the plan says")] = 0,
    compiled: bool = True,
    tune: Annotated[bool, typer.Option(help="time the kernels at other block sizes too")] = False,
    match: Match = "",
    peers: Peers = True,
    missing: Missing = False,
    budget: Budget = 0,
    repeats: int = 5,
    out: Out = RESULTS,
) -> None:
    cpu = device == "cpu"
    chosen = set(only.split(","))
    if unknown := chosen - set(CASES):
        raise typer.BadParameter(f"expected cases out of {CASES}, got {sorted(unknown)}")
    kind = getattr(torch, dtype or ("float32" if cpu else "bfloat16"))
    options = {"chunk_size": chunk_size or (64 if cpu else None), "compiled": compiled}
    bench = Benchmark("token-losses", torch.device(device), out, 2, repeats, match, peers, missing, budget)
    if chosen & {"linear-logps", "cross-entropy", "grouped"}:
        run_head(bench, chosen, _shape(head or ("256x1000x64" if cpu else "8192x151936x4096")), kind, options)
    if "weight-error" in chosen:
        shape = _shape(error or ("256x500x32" if cpu else "4096x16384x1024"))
        run_weight_error(bench, shape, kind, compiled)
    if "kernel" in chosen:
        run_kernel(bench, *_shape(kernel or ("64x1000" if cpu else "4096x128256")), kind, tune)
    bench.finish()


if __name__ == "__main__":
    typer.run(main)
