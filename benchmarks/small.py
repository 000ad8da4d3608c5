"""Ordinary sizes: what a call costs where the arithmetic is next to nothing, beside what people call otherwise.

    python benchmarks/small.py                                   # everything, on the GPU
    python benchmarks/small.py --only alone --rows 16,64 --dtypes float32,bfloat16
    python benchmarks/small.py --only step,head --match MNRL
    python benchmarks/small.py --device cpu

alone   drop-ins on ready embeddings, beside sentence-transformers' own classes
step    whole training steps of a small encoder (the loss under autocast, fused AdamW), with the one loss and the other
head    DPO of a few short pairs, and token log-probabilities, beside TRL's fused head
engine  a user's loss_fn, functional, alignment and distill beside the same formula in plain torch; "in four chunks" is
        uncompiled, "to the first product" what passes of such a call before there is work for a device
first   seconds of the first call in a process of its own, whose device is warm, with empty caches of compiled code

Times are those of later calls, forward and backward, each waited for: one of ours, one of theirs, and so on in turn, so
that a host whose speed wavers does so for both. A ratio is one of medians; beside it stand the microseconds between
them and the ratios of four parts of the run: it counts where the difference is above 15 microseconds and the parts
agree. Truth is float64 of the same inputs: the library's classes, or the formula in plain torch. Of steps it is the
library's in float32, and what stands under errors is then mostly the encoder's rounding.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Annotated, Any
from unittest import mock

import torch
import torch.nn.functional as F
import typer
from contrastive import Embedded, random_tokens, untrained
from measure import (
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
    Timing,
    as_candidates,
    measure,
    seconds_of,
    value,
    value_and_gradients,
)
from preference import (
    BLOCK,
    GRADIENTS,
    MARGINS,
    TRL_STATISTICS,
    Shape,
    dpo_of,
    log_probs,
    random_batch,
    trl_logps,
    true_step,
)
from preference import dpo as dpo_formula
from torch import Tensor, nn

import alignment
import distill
from chunked_embed import FlexChunkLoss, Projection, linear_logps
from chunked_embed import functional as CF

PARTS = ("alone", "step", "head", "engine", "first")
MINE, LIBRARY, TRL, PLAIN = "ours", "sentence-transformers", "TRL", "plain torch"
BOUNDS = {torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float32: 1e-4}
STEP_BOUND = 0.1  # under autocast the encoder rounds
WIDTH, VOCABULARY, SCALE = 32, 64, 20.0  # of the engine's


def library_losses() -> ModuleType:
    from sentence_transformers.sentence_transformer import losses

    return losses


def our_losses() -> ModuleType:
    from chunked_embed import losses

    return losses


# --- alone: drop-ins -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DropIn:
    """How a loss is made of the library's module or of ours, and what it reads."""

    make: Callable[[ModuleType, nn.Module], nn.Module]
    columns: int
    labels: str = ""
    widest: int = 2**30  # rows: one of the library's takes their third power
    whole: bool = False  # it has a forward alone
    squared: bool = False  # errors, of scores and labels
    # Where a rounding turns a near-tie another row is mined: one of thousands.
    bound: float = 0.0


def matryoshka(of: ModuleType, model: nn.Module) -> nn.Module:
    width = model.get_embedding_dimension()
    widths = [width, *[n for n in (512, 256, 128, 64, 32, 16) if n < width][:4]]
    return of.MatryoshkaLoss(model, of.MultipleNegativesRankingLoss(model), widths)


DROP_INS = {
    "MNRL": DropIn(lambda of, m: of.MultipleNegativesRankingLoss(m), 2),
    "MNRL + hard negatives": DropIn(lambda of, m: of.MultipleNegativesRankingLoss(m), 3),
    "Matryoshka over MNRL": DropIn(matryoshka, 2, whole=True),
    "CoSENT": DropIn(lambda of, m: of.CoSENTLoss(m), 2, "scores"),
    "AnglE": DropIn(lambda of, m: of.AnglELoss(m), 2, "scores"),
    "Triplet": DropIn(lambda of, m: of.TripletLoss(m), 3),
    "CosineSimilarity": DropIn(lambda of, m: of.CosineSimilarityLoss(m), 2, "scores", squared=True),
    "Contrastive": DropIn(lambda of, m: of.ContrastiveLoss(m), 2, "binary"),
    "OnlineContrastive": DropIn(lambda of, m: of.OnlineContrastiveLoss(m), 2, "binary", bound=3e-2),
    "MarginMSE": DropIn(lambda of, m: of.MarginMSELoss(m), 3, "scores", squared=True),
    "BatchHardTriplet": DropIn(lambda of, m: of.BatchHardTripletLoss(m), 1, "classes", bound=3e-2),
    "BatchAllTriplet": DropIn(lambda of, m: of.BatchAllTripletLoss(m), 1, "classes", widest=64, bound=3e-2),
}


def embeddings(rows: int, width: int, columns: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Those of a row resemble each other, so that gradients are not all of one size."""
    torch.manual_seed(0)
    first = torch.randn(rows, width, device=device)
    others = [scale * first + torch.randn(rows, width, device=device) for scale in (0.3, 0.2)]
    return [side.to(dtype).requires_grad_() for side in (first, *others)[:columns]]


def labels_of(kind: str, rows: int, device: torch.device) -> Tensor | None:
    torch.manual_seed(1)
    made = {
        "scores": lambda: torch.rand(rows, device=device),
        "binary": lambda: torch.randint(2, (rows,), device=device),
        "classes": lambda: torch.arange(rows, device=device) % max(rows // 8, 2),
    }
    return made[kind]() if kind else None


class Squared(nn.MSELoss):
    def forward(self, scores: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(scores, targets.to(scores.dtype))


def drop_in(name: str, of: ModuleType, sides: Sequence[Tensor], labels: Tensor | None) -> Callable[[], list[Tensor]]:
    kind = DROP_INS[name]
    loss = kind.make(of, Embedded(sides[0].shape[1]))
    if kind.squared and sides[0].dtype == torch.float64:  # beside which the library's labels are float32
        loss.loss_fct = Squared()
    if kind.whole:
        return value_and_gradients(lambda: loss([{"sentence_embedding": side} for side in sides], labels), sides)
    return value_and_gradients(lambda: loss.compute_loss_from_embeddings(list(sides), labels), sides)


def run_alone(bench: Benchmark, rows: int, width: int, dtype: torch.dtype, seconds: float) -> None:
    for name, kind in DROP_INS.items():
        if rows > kind.widest:
            continue
        sides = embeddings(rows, width, kind.columns, dtype, bench.device)
        labels = labels_of(kind.labels, rows, bench.device)
        bound = max(BOUNDS[dtype], kind.bound)
        candidates = [
            Candidate(MINE, OURS, drop_in(name, our_losses(), sides, labels), bound),
            Candidate(LIBRARY, PEER, drop_in(name, library_losses(), sides, labels), bound),
        ]
        wide = [side.detach().double().requires_grad_() for side in sides]
        exact = labels.double() if kind.labels == "scores" and labels is not None else labels
        title = f"alone, {name}, {rows}x{width}, {told(dtype)}"
        names = ("anchors", "positives", "negatives")[: kind.columns]
        bench.compare(title, candidates, drop_in(name, library_losses(), wide, exact), "loss", names, seconds)


def told(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- step: a small encoder -------------------------------------------------------------------------------------------


STEPS = ("MNRL", "CoSENT", "Matryoshka over MNRL")


@dataclass(frozen=True)
class Size:
    tokens: int = 64
    layers: int = 6  # MiniLM's
    width: int = 384
    heads: int = 12


def run_steps(bench: Benchmark, pairs: int, size: Size, seconds: float) -> None:
    titles = {
        name: f"step, {name}, {pairs} pairs of {size.tokens} tokens, {size.layers} x {size.width}" for name in STEPS
    }
    if not any(bench.match in title for title in titles.values()):
        return
    device, half = bench.device, bench.device.type == "cuda"
    model = untrained(device, size.layers, size.width, size.heads, autocast=False)
    features = random_tokens(pairs, size.tokens, 2, device)
    # The rate is so small that the weights stay what they are, and both losses train the same.
    optimizer = torch.optim.AdamW(model.parameters(), 1e-9, fused=True)
    parameter = model[0].bert.encoder.layer[0].attention.self.query.weight

    def step(loss: nn.Module, labels: Tensor | None, autocast: bool) -> list[Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            found = loss([dict(column) for column in features], labels)
        found.backward()
        gradient = parameter.grad
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return [found.detach(), gradient]

    for name, title in titles.items():
        kind = DROP_INS[name]
        labels = labels_of(kind.labels, pairs, device)
        theirs, ours = kind.make(library_losses(), model), kind.make(our_losses(), model)
        candidates = [
            Candidate(MINE, OURS, partial(step, ours, labels, half), STEP_BOUND),
            Candidate(LIBRARY, PEER, partial(step, theirs, labels, half), STEP_BOUND),
        ]
        bench.compare(title, candidates, partial(step, theirs, labels, False), "loss", ("a weight",), seconds)


# --- head: beside TRL's ----------------------------------------------------------------------------------------------

HEADS = {
    "dpo": [Shape(1, 64, 32000, 2048), Shape(2, 256, 151936, 896), Shape(8, 512, 151936, 896)],
    "logps": [Shape(1, 1024, 151936, 2048), Shape(1, 8192, 151936, 2048)],  # two sequences each
}
SMALL_HEADS = {"dpo": [Shape(1, 16, 512, 64), Shape(2, 32, 512, 64)], "logps": [Shape(1, 128, 512, 64)]}


def run_dpo(bench: Benchmark, shape: Shape, dtype: torch.dtype, seconds: float) -> None:
    title = "head, " + shape.title("DPO", dtype)
    if not bench.wants(title, [MINE, TRL]):
        return
    batch, bound = random_batch(bench, shape, dtype), BOUNDS[dtype]
    call = partial(alignment.DPOLoss(beta=0.1), *batch.policy, **batch.reference)
    theirs, their_margins = dpo_of(trl_logps, batch, TRL_STATISTICS)
    our_margins = {MINE: lambda: call().metrics["rewards/margins"]}
    candidates = [
        *as_candidates({MINE: value(call)}, batch.leaves, OURS, bound, our_margins),
        *as_candidates({TRL: theirs}, batch.leaves, PEER, bound, {TRL: their_margins}),
    ]
    bench.compare(title, candidates, partial(true_step, batch, dpo_formula), MARGINS, GRADIENTS, seconds)


def run_logps(bench: Benchmark, shape: Shape, dtype: torch.dtype, seconds: float) -> None:
    """What GRPO asks for: of an old policy without gradients; of this one with them, and the entropy."""
    size = f"{2 * shape.tokens} tokens, V={shape.vocabulary}, H={shape.width}, {told(dtype)}"
    titles = [f"head, log-probabilities {what}, {size}" for what in ("without gradients", "and entropy")]
    if not any(bench.wants(title, [MINE, TRL]) for title in titles):
        return
    batch, bound = random_batch(bench, shape, dtype), BOUNDS[dtype]
    upstream = torch.randn(batch.target.shape, device=bench.device)

    def alone(scores: Loss) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            with torch.no_grad():
                return [scores()]

        return run

    def truth() -> list[Tensor]:
        ids = batch.target.flatten()
        index = torch.arange(len(ids), device=bench.device)
        parts = log_probs(batch.hidden, batch.weight, index)
        found = [log_p.gather(1, own[:, None])[:, 0] for log_p, own in zip(parts, ids.split(BLOCK))]
        return [torch.cat(found).view(batch.target.shape)]

    scores: dict[str, Loss] = {
        MINE: lambda: linear_logps(*batch.policy).logps,
        TRL: lambda: trl_logps(*batch.policy),
    }
    roles = {MINE: OURS, TRL: PEER}
    candidates = [Candidate(who, roles[who], alone(call), bound) for who, call in scores.items()]
    bench.compare(titles[0], candidates, truth, "log-probabilities", (), seconds)

    scores = {
        MINE: lambda: linear_logps(*batch.policy, outputs=("logps", "entropy")).logps,
        TRL: lambda: trl_logps(*batch.policy, ("log_probs", "entropy")),
    }
    candidates = []
    for who, call in scores.items():
        losses = {who: lambda call=call: (call() * upstream).sum()}
        candidates += as_candidates(losses, batch.leaves, roles[who], bound, {who: call})
    exact = partial(
        true_step, batch, lambda logps, ref, kl: ((logps * upstream.double()).sum(), logps), reference=False
    )
    bench.compare(titles[1], candidates, exact, "log-probabilities", GRADIENTS, seconds)


# --- engine: beside plain torch --------------------------------------------------------------------------------------


class CrossEntropy(FlexChunkLoss):
    def loss_fn(self, outputs, rows):
        return F.cross_entropy(outputs, rows["target"], reduction="none")


class Work:
    """A loss by its options, the same in plain torch, and what it learns."""

    def __init__(self, ours: Callable[..., Loss], plain: Loss, leaves: Sequence[Tensor]) -> None:
        self.ours = ours
        self.plain = plain
        self.leaves = leaves


def row_wise(rows: int, make: Callable[..., Tensor]) -> Work:
    hidden, weight = make(rows, WIDTH), make(VOCABULARY, WIDTH)
    target = torch.arange(rows, device=hidden.device) % VOCABULARY

    def ours(**options: Any) -> Loss:
        loss = CrossEntropy(**options)
        return lambda: loss(Projection(hidden, weight), {"target": target}).loss

    return Work(ours, lambda: F.cross_entropy(hidden @ weight.T, target), [hidden, weight])


def dpo(rows: int, make: Callable[..., Tensor]) -> Work:
    """Two pairs, half of whose tokens are of the prompt."""
    tokens = max(rows // 4, 2)
    hidden, weight, ref = make(4, tokens, WIDTH), make(VOCABULARY, WIDTH), make(4).detach()
    target = torch.arange(4 * tokens, device=hidden.device).remainder(VOCABULARY).view(4, tokens)
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


def triplet(rows: int, make: Callable[..., Tensor]) -> Work:
    a, p, n = (make(rows, WIDTH) for _ in range(3))

    def ours(**options: Any) -> Loss:
        return lambda: CF.triplet(a, p, n, margin=5.0, distance="euclidean", **options)

    return Work(ours, lambda: F.relu((a - p).norm(dim=1) - (a - n).norm(dim=1) + 5.0).mean(), [a, p, n])


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


WORKS: dict[str, Callable[[int, Callable[..., Tensor]], Work]] = {
    "cross-entropy of a loss_fn": row_wise,
    "DPO of two pairs": dpo,
    "KL from a teacher": kl,
    "InfoNCE": info_nce,
    "CoSENT": cosent,
    "CoSENT through a projection": partial(cosent, projected=True),
    "triplet": triplet,
}
WITHOUT_PRODUCT = ("CoSENT", "triplet")


def work(name: str, rows: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Work:
    """The same numbers in every dtype."""
    torch.manual_seed(0)
    return WORKS[name](rows, lambda *shape: torch.randn(shape, device=device).to(dtype).requires_grad_())


class Reached(Exception):
    """A call is at its first matrix product."""


def reached(*arguments: Any, **keywords: Any) -> Tensor:
    raise Reached


def to_first_product(loss: Loss) -> Callable[[], None]:
    def run() -> None:
        with mock.patch.multiple(torch, mm=reached, addmm=reached):
            try:
                loss()
            except Reached:
                return
        raise RuntimeError("expected a product by torch.mm or torch.addmm, got none")

    return run


def run_engine(bench: Benchmark, rows: int, chunks: bool, seconds: float) -> None:
    options = {"compiled": False, "chunk_size": max(rows // 4, 1)}
    for name in WORKS:
        own, exact = work(name, rows, bench.device), work(name, rows, bench.device, torch.float64)
        ours = {MINE: own.ours()} | ({"in four chunks": own.ours(**options)} if chunks else {})
        candidates = [
            *as_candidates(ours, own.leaves, OURS, 1e-4),
            *as_candidates({PLAIN: own.plain}, own.leaves, PEER, 1e-4),
        ]
        title = f"engine, {name}, {rows} rows"
        before = len(bench.lines)
        bench.compare(title, candidates, value_and_gradients(exact.plain, exact.leaves), seconds=seconds)
        if chunks and len(bench.lines) > before and name not in WITHOUT_PRODUCT:
            timing = measure(to_first_product(ours["in four chunks"]), bench.device, 3, max(bench.repeats, 50))
            floor = next((line.ms for line in bench.lines[before:] if line.name == PLAIN), None)
            bench.add(title, "in four chunks, to the first product", OURS, timing, floor=floor)


# --- first: in processes of their own --------------------------------------------------------------------------------

READY = "ready\n"
FIRST = (
    *(f"alone, {name}" for name in ("MNRL", "CoSENT", "Triplet", "BatchHardTriplet", "Matryoshka over MNRL")),
    *(f"engine, {name}" for name in ("cross-entropy of a loss_fn", "InfoNCE", "DPO of two pairs", "KL from a teacher")),
)


def first_call(title: str, who: str, rows: int, width: int, device: torch.device) -> None:
    """In a process of its own: says that it is ready, waits for its turn, and says how long a call took."""
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(256, 256, device=device, dtype=dtype).requires_grad_()
        (x @ x).square().sum().backward()
    losses = {MINE: our_losses(), LIBRARY: library_losses()}  # both are imported
    part, name = title.split(", ", 1)
    if part == "alone":
        kind = DROP_INS[name]
        sides = embeddings(rows, width, kind.columns, torch.float32, device)
        run = drop_in(name, losses[who], sides, labels_of(kind.labels, rows, device))
    else:
        made = work(name, rows, device)
        run = value_and_gradients(made.ours() if who == MINE else made.plain, made.leaves)
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(READY, end="", flush=True)
    sys.stdin.readline()
    print(json.dumps([seconds_of(run, device)[0] for _ in range(2)]), flush=True)


def start(folder: str, *arguments: str) -> subprocess.Popen:
    """With empty caches of compiled code, which end with the folder."""
    caches = {name: tempfile.mkdtemp(dir=folder) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
    command = [sys.executable, __file__, *arguments]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env={**os.environ, **caches}, **pipes)


def run_first(bench: Benchmark, rows: int, width: int) -> None:
    """They start together, some as many as the host has cores, and call one after the other."""
    cases: list[tuple[str, str, str]] = []
    for title in FIRST:
        other = LIBRARY if title.startswith("alone") else PLAIN
        case = f"first call, {title.split(', ', 1)[1]}, {rows} rows"
        if bench.wants(case, [MINE, other]):
            cases += [(case, title, who) for who in (other, MINE)]
    together = (os.cpu_count() or 1) // 2 * 2 + 2
    theirs: dict[str, float] = {}
    for begin in range(0, len(cases), together):
        batch = cases[begin : begin + together]
        with tempfile.TemporaryDirectory() as folder:
            given = ("--device", str(bench.device), "--first-rows", str(rows), "--first-width", str(width))
            running = [start(folder, *given, "--child", f"{title}; {who}") for _, title, who in batch]
            for process in running:
                assert process.stdout is not None
                while process.stdout.readline() not in ("", READY):
                    pass
            for (case, _, who), process in zip(batch, running):
                told, _ = process.communicate("\n")
                if process.returncode:
                    timing = Timing(note=f"failed: exit status {process.returncode}")
                else:
                    first, second = json.loads(told.splitlines()[-1])
                    timing = Timing(1e3 * first, 1e3 * first, first_s=first, note=f"the second {1e3 * second:.3g} ms")
                    if who != MINE:
                        theirs[case] = 1e3 * first
                    elif case in theirs:
                        timing.more_us = 1e3 * (1e3 * first - theirs[case])
                role = OURS if who == MINE else PEER
                bench.add(case, who, role, timing, floor=theirs.get(case) if who == MINE else None)


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def main(
    device: Annotated[str, typer.Option(help="cuda, or cpu")] = "cuda",
    only: Annotated[str, typer.Option(help="parts, comma-separated")] = ",".join(PARTS),
    rows: Annotated[str, typer.Option(help="of drop-ins, comma-separated")] = "",
    widths: Annotated[str, typer.Option(help="of drop-ins, comma-separated")] = "",
    dtypes: Annotated[str, typer.Option(help="of drop-ins, comma-separated")] = "float32",
    pairs: Annotated[str, typer.Option(help="of steps, comma-separated")] = "",
    engine_rows: Annotated[str, typer.Option(help="comma-separated; the first ones in chunks, too")] = "16,128,1024",
    first_rows: Annotated[int, typer.Option(help="of first calls")] = 1024,
    first_width: Annotated[int, typer.Option(help="of first calls")] = 768,
    seconds: Annotated[float, typer.Option(help="for each case; steps and heads take twice as long")] = 0.3,
    match: Match = "",
    missing: Missing = False,
    budget: Budget = 0,
    repeats: Annotated[int, typer.Option(help="of each in turn, at least")] = 10,
    out: Out = RESULTS,
    child: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    if child:
        return first_call(*child.split("; "), first_rows, first_width, torch.device(device))
    cpu, chosen = device == "cpu", only.split(",")
    if unknown := set(chosen) - set(PARTS):
        raise typer.BadParameter(f"expected parts out of {PARTS}, got {sorted(unknown)}")
    bench = Benchmark("small", torch.device(device), out, 3, repeats, match, missing=missing, budget=budget)
    if "alone" in chosen:
        for dtype in dtypes.split(","):
            for width in numbers(widths or ("32,768" if cpu else "768")):
                for n in numbers(rows or ("16,64" if cpu else "16,64,256,1024,4096")):
                    run_alone(bench, n, width, getattr(torch, dtype), seconds)
    if "step" in chosen:
        for n in numbers(pairs or ("16,64" if cpu else "32,128,512")):
            run_steps(bench, n, Size(16, 2, 64, 2) if cpu else Size(), 2 * seconds)
    if "head" in chosen:
        heads, kind = (SMALL_HEADS, torch.float32) if cpu else (HEADS, torch.bfloat16)
        for shape in heads["dpo"]:
            run_dpo(bench, shape, kind, 2 * seconds)
        for shape in heads["logps"]:
            run_logps(bench, shape, kind, 2 * seconds)
    if "engine" in chosen:
        for k, n in enumerate(numbers(engine_rows)):
            run_engine(bench, n, k == 0, seconds)
    if "first" in chosen:
        run_first(bench, first_rows, first_width)
    bench.finish()


if __name__ == "__main__":
    typer.run(main)
