"""Token losses through a large head against their product floor, and the kernel pair against its memory floor.

    python benchmarks/token_losses.py                                       # everything, on the GPU
    python benchmarks/token_losses.py --only linear-logps,cross-entropy --chunk-size 2048
    python benchmarks/token_losses.py --only kernel --tune                  # block sizes and warps
    python benchmarks/token_losses.py --device cpu --no-compiled            # small, in seconds

Logits have a standard deviation of 8 and targets are likely tokens, as those of a language model: the size of logits
decides what their rounding does. The value is the tokens' log-probabilities, in nats.

A floor is the bare matrix products in the same chunks (three where the loss is known, four behind `linear_logps`), or
for the kernel pair as many bytes as it reads and writes: the logits once for statistics, twice for the gradient.
"""

from collections.abc import Callable
from functools import cache, partial
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
    Errors,
    Loss,
    Match,
    Missing,
    Out,
    Peers,
    Profile,
    Timing,
    as_candidates,
    errors_of,
    floors,
    likely_tokens,
    linear_cross_entropies,
    precisions,
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
BOUNDS = {torch.bfloat16: 1e-2, torch.float32: 1e-4}
VALUE, GRADIENTS = "log-probabilities", ("hidden", "weight")


# --- losses as a user writes them ---


class CrossEntropy(FlexChunkLoss):
    def loss_fn(self, outputs, rows):
        return F.cross_entropy(outputs, rows["target"], reduction="none")


class Told(FlexChunkLoss):
    """The same, and each row's log-probability with it."""

    def loss_fn(self, outputs, rows):
        loss = F.cross_entropy(outputs, rows["target"], reduction="none")
        return loss, {"logps": -loss}


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


# --- truth and peers ---


def true_step(hidden: Tensor, weight: Tensor, target: Tensor, rows: int = 1024) -> list[Tensor]:
    """Log-probabilities of the targets and both gradients of their negative mean, in float64, some rows at a time."""
    wide = weight.detach().double()
    logps = torch.empty(len(hidden), dtype=torch.float64, device=hidden.device)
    grad_hidden = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device)
    grad_weight = torch.zeros_like(wide)
    for start in range(0, len(hidden), rows):
        part = slice(start, start + rows)
        chunk, index = hidden.detach()[part].double(), target[part, None]
        log_p = torch.log_softmax(chunk @ wide.T, -1)
        logps[part] = log_p.gather(1, index)[:, 0]
        grad = log_p.exp_()
        grad.scatter_add_(1, index, grad.new_full(index.shape, -1))
        grad /= len(hidden)
        grad_hidden[part] = grad @ wide
        grad_weight.addmm_(grad.T, chunk)
    return [logps, grad_hidden, grad_weight.float()]


def others(hidden: Tensor, weight: Tensor, target: Tensor) -> dict[str, Callable[[str], Tensor]]:
    """Other ways to the same loss, by the reduction: whole logits, and fused kernels."""

    def whole(reduction: str) -> Tensor:
        return F.cross_entropy((hidden @ weight.T).float(), target, reduction=reduction)

    losses = {"torch, whole logits": whole}
    if hasattr(F, "linear_cross_entropy"):
        losses["F.linear_cross_entropy"] = lambda r: F.linear_cross_entropy(hidden, weight, target, reduction=r)
    if hidden.is_cuda:
        for name, loss in linear_cross_entropies().items():
            losses[name] = partial(loss, hidden, weight, target)
    return losses


# --- cases ---


def random_head(bench: Benchmark, tokens: int, vocabulary: int, width: int, dtype: torch.dtype):
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, device=bench.device, dtype=dtype)
    weight = torch.randn(vocabulary, width, device=bench.device, dtype=dtype).mul_(8 * width**-0.5)
    target = likely_tokens(hidden, weight)
    return hidden.requires_grad_(), weight.requires_grad_(), target


def run_head(
    bench: Benchmark, chosen: set[str], shape: tuple[int, ...], dtype: torch.dtype, options: dict[str, Any]
) -> None:
    tokens, vocabulary, width = shape
    size = f"{tokens} tokens, V={vocabulary}, H={width}, {str(dtype).removeprefix('torch.')}"
    of_logps, of_loss = f"log-probabilities, {size}", f"cross-entropy, {size}"
    if not bench.chosen(of_logps, of_loss):
        return
    hidden, weight, target = random_head(bench, tokens, vocabulary, width, dtype)
    leaves, bound = [hidden, weight], BOUNDS[dtype]
    head, rows = Projection(hidden, weight), {"target": target}
    plan = CrossEntropy(**options).plan(head, rows)
    sizes = [span.rows for block in plan.blocks for span in block.spans]
    expected = cache(partial(true_step, hidden, weight, target))

    def add(name: str, losses: dict[str, Loss], reads: dict[str, Loss], role: str) -> None:
        candidates.extend(as_candidates(losses, leaves, role, bound, reads))

    if "linear-logps" in chosen:
        candidates = floors("4 products", (hidden, weight), [], sizes, forwards=2)
        for label, more in precisions("linear_logps", dtype).items():
            logps = partial(linear_logps, hidden, weight, target, **options, **more)
            add(label, {label: lambda f=logps: -f().logps.mean()}, {label: lambda f=logps: f().logps}, OURS)
        bench.case(of_logps, candidates, expected, VALUE, GRADIENTS)
    candidates = floors("3 products", (hidden, weight), [], sizes)
    n_floors = len(candidates)
    if "cross-entropy" in chosen:
        for label, more in precisions("loss_fn, row-wise", dtype).items():
            loss, told = CrossEntropy(**options, **more), Told(**options, **more)
            reads = {label: lambda f=told: f(head, rows).metrics["logps"]}
            add(label, {label: lambda f=loss: f(head, rows).loss}, reads, OURS)
    if "grouped" in chosen:
        segments = torch.arange(tokens, device=bench.device) // (tokens // 8)
        kinds = {"score_fn, grouped": (SequenceLoss, segments), "TokenStatistics, grouped": (TokenLoss, None)}
        for name, (kind, by) in kinds.items():
            for label, more in precisions(name, dtype).items():
                loss = kind(**options, **more)
                reads = {label: lambda f=loss: f.scores(head, rows)["logps"]}
                add(label, {label: lambda f=loss, by=by: f(head, rows, segments=by).loss}, reads, OURS)
    if len(candidates) > n_floors:
        peers = others(hidden, weight, target)
        steps = {name: partial(loss, "mean") for name, loss in peers.items()}
        reads = {name: lambda f=loss: -f("none") for name, loss in peers.items()}
        add("", steps, reads, PEER)
        bench.case(of_loss, candidates, expected, VALUE, GRADIENTS)


def run_weight_error(bench: Benchmark, shape: tuple[int, ...], dtype: torch.dtype, compiled: bool) -> None:
    """The weight gradient's distance from float64 must not grow with the number of chunks."""
    case = "weight gradient, {} tokens, V={}, H={}".format(*shape)
    if not bench.wants(case, ["torch, one product", "linear_logps, 64 chunks"]):
        return
    tokens, vocabulary, width = shape
    hidden, weight, target = random_head(bench, tokens, vocabulary, width, dtype)
    leaves = [hidden, weight]
    expected = true_step(hidden, weight, target)[2:]

    def errors(loss: Loss) -> Errors:
        return errors_of(value_and_gradients(loss, leaves)()[2:], expected, "", ["weight"])

    def one_product() -> Tensor:
        """Float32 logits of the half-precision inputs, as products on a GPU write them, and one product back."""
        logits = Logits.apply(hidden, weight)
        return F.cross_entropy(logits, target)

    whole = errors(one_product)
    bench.add(case, "torch, one product", PEER, Timing(), whole)
    for chunks in (1, 8, 64):
        options: dict[str, Any] = {"chunk_size": -(-shape[0] // chunks), "compiled": compiled}
        loss = CrossEntropy(**options)
        losses = {
            "loss_fn": lambda loss=loss: loss(Projection(hidden, weight), {"target": target}).loss,
            "linear_logps": lambda options=options: -linear_logps(hidden, weight, target, **options).logps.mean(),
        }
        for name, value in losses.items():
            found = errors(value)
            assert found.gradient_error is not None and whole.gradient_error is not None
            note = f"{found.gradient_error / whole.gradient_error:.2f} x one product"
            if found.gradient_error > 2 * whole.gradient_error:
                bench.wrong.append(f"{case}, {name} in {chunks} chunks: {note}")
            bench.add(case, f"{name}, {chunks} chunks", OURS, Timing(note=note), found)


class Logits(torch.autograd.Function):
    """`hidden @ weight.T` in float32; the gradient is rounded once, to the inputs' dtype, before its two products."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return hidden.float() @ weight.float().T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        hidden, weight = ctx.saved_tensors
        narrow = gradient.to(hidden.dtype)
        return narrow @ weight, narrow.T @ hidden


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
                parts.append([*(stats[name] for name in names), gradient.float()])
            return [torch.cat(pieces) for pieces in zip(*parts, strict=True)]

        name = "Triton" if available(bench.device) else "plain torch"
        candidates = [Candidate("floor: 3 passes", FLOOR, three_passes), Candidate(name, OURS, run, BOUNDS[dtype])]
        results = [*names, "gradient"]
        bench.case(f"kernel pair {rows}x{columns}, {label}", candidates, truth, "", results)
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
    head: Annotated[str, typer.Option(help="tokens x vocabulary x hidden, comma-separated")] = "",
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
    profile: Profile = False,
    repeats: int = 5,
    out: Out = RESULTS,
) -> None:
    cpu = device == "cpu"
    chosen = set(only.split(","))
    if unknown := chosen - set(CASES):
        raise typer.BadParameter(f"expected cases out of {CASES}, got {sorted(unknown)}")
    kind = getattr(torch, dtype or ("float32" if cpu else "bfloat16"))
    options = {"chunk_size": chunk_size or (64 if cpu else None), "compiled": compiled}
    bench = Benchmark("token-losses", torch.device(device), out, 2, repeats, match, peers, missing, budget, profile)
    if chosen & {"linear-logps", "cross-entropy", "grouped"}:
        usual = "256x1000x64" if cpu else "8192x128256x2048,8192x128256x4096,16384x151936x2048"
        for shape in (head or usual).split(","):
            run_head(bench, chosen, _shape(shape), kind, options)
    if "weight-error" in chosen:
        shape = _shape(error or ("256x500x32" if cpu else "4096x16384x1024"))
        run_weight_error(bench, shape, kind, compiled)
    if "kernel" in chosen:
        run_kernel(bench, *_shape(kernel or ("64x1000" if cpu else "4096x128256")), kind, tune)
    bench.finish()


if __name__ == "__main__":
    typer.run(main)
