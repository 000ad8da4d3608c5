"""Distillation losses beside their product floors and other people's, and how far each is from the truth.

    python benchmarks/distillation.py                                      # everything, on the GPU
    python benchmarks/distillation.py --only jsd --vocabularies 128256 --chunks 1024,4096
    python benchmarks/distillation.py --only divergences --match ULD
    python benchmarks/distillation.py --device cpu --no-compiled           # small, in seconds

A floor is four products in the same chunks, three of the student's and one of the teacher's, with float32 logits where
we take them so (ratios are to that one) and with half-precision ones. The truth is float64, from blocks of tokens: by
formulas of its own for JSD and KL, by our pure functions for the other divergences. Peers import what they need where
they are called; one that is not installed is a line that says so. Those without a hard loss have a case without it. The
value is the loss. `accuracy` has errors alone, of a student near its teacher, where they are largest.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from measure import (
    FLOOR,
    HALF,
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
    precisions,
    products,
    trl_kernel,
    value,
)
from torch import Tensor

import distill
from chunked_embed import ChunkPlan

CASES = ("jsd", "kl", "divergences", "accuracy")
BOUNDS = {torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float32: 1e-4}
GRADIENTS = ("hidden", "weight")
BLOCK = 256  # rows of float64 logits that the truth holds, of both sides and a dozen times


# --- a batch, and the truth about it ---------------------------------------------------------------------------------


@dataclass
class Sides:
    student: Tensor  # (M, Hs)
    student_weight: Tensor  # (V, Hs)
    teacher: Tensor  # (M, Ht)
    teacher_weight: Tensor  # (V, Ht)
    target: Tensor  # (M,)

    @property
    def heads(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.student, self.student_weight, self.teacher, self.teacher_weight

    @property
    def leaves(self) -> list[Tensor]:
        return [self.student, self.student_weight]

    def title(self, name: str) -> str:
        (m, h), (v, ht) = self.student.shape, self.teacher_weight.shape
        return f"{name}, {m} tokens, V={v}, H={h} from {ht}, {str(self.student.dtype).removeprefix('torch.')}"

    def floors(self, plan: ChunkPlan, teacher: bool = True) -> list[Candidate]:
        """Of a loss that takes float32 logits, in its chunks; the second one's are as wide as the inputs."""
        sizes = [span.rows for block in plan.blocks for span in block.spans]
        frozen = [(self.teacher, self.teacher_weight)] if teacher else []
        trained, name, note = (self.student, self.student_weight), f"{3 + teacher} products", f"chunks of {max(sizes)}"
        wide = products(trained, frozen, sizes, outputs=torch.float32)
        found = [Candidate(f"floor: {name}", FLOOR, wide, note=note)]
        if self.student.dtype != torch.float32:
            found.append(Candidate(f"floor, {HALF}", FLOOR, products(trained, frozen, sizes), note=note))
        return found


def random_sides(bench: Benchmark, shape: list[int], dtype: torch.dtype, noise: float | None = None) -> Sides:
    """Tokens x vocabulary x student's width x teacher's. With `noise` a student that is its teacher, and so much of
    its hidden states' size beside it: near the end of training, where logits' rounding counts."""
    torch.manual_seed(0)
    tokens, vocabulary, *widths = shape
    like: dict[str, Any] = {"device": bench.device, "dtype": dtype}
    student, teacher = (torch.randn(tokens, width, **like) for width in widths)
    heads = [torch.randn(vocabulary, width, **like).mul_(width**-0.5) for width in widths]
    if noise is not None:
        student, heads[0] = teacher + noise * student, heads[1].clone()
    target = torch.randint(vocabulary, (tokens,), device=bench.device)
    return Sides(student.requires_grad_(), heads[0].requires_grad_(), teacher, heads[1], target)


Formula = Callable[..., Tensor]
"""`(student, teacher, rows, weight)`: logits of some rows (R, V), which rows, and the teacher's head -> (R,)."""


def true_step(sides: Sides, formula: Formula) -> list[Tensor]:
    """The mean over tokens of a formula of both logits, with gradients of the student's sides, in float64."""
    rows, weight, teacher, head = (t.detach().double() for t in sides.heads)
    total = torch.zeros((), dtype=torch.float64, device=rows.device)
    grad_rows, grad_weight = torch.zeros_like(rows), torch.zeros_like(weight)
    for index in torch.arange(len(rows), device=rows.device).split(BLOCK):
        z = (rows[index] @ weight.T).requires_grad_()
        value = formula(z, teacher[index] @ head.T, index, head).sum() / len(rows)
        (grad,) = torch.autograd.grad(value, z)
        total += value.detach()
        grad_rows[index] = grad @ weight
        grad_weight.addmm_(grad.T, rows[index])
    return [total, grad_rows, grad_weight]


def divergence(beta: float, hard: float, sides: Sides) -> Formula:
    """The generalised Jensen-Shannon divergence by its definition, forward KL at 0 and reverse at 1, and the labels."""
    kl = partial(F.kl_div, reduction="none", log_target=True)  # of its second argument from the first

    def formula(z: Tensor, teacher: Tensor, rows: Tensor, head: Tensor) -> Tensor:
        q, p = z.log_softmax(1), teacher.log_softmax(1)
        if beta in (0.0, 1.0):
            values = kl(p, q) if beta else kl(q, p)
        else:
            m = torch.logaddexp(q + math.log(1 - beta), p + math.log(beta))
            values = beta * kl(m, p) + (1 - beta) * kl(m, q)
        return (1 - hard) * values.sum(1) + hard * F.cross_entropy(z, sides.target[rows], reduction="none")

    return formula


def own_formula(loss: distill.DistillationLoss, rows: Mapping[str, Tensor]) -> Formula:
    """The pure function of a class in float64, at once. Tests hold it against other people's."""

    def formula(z: Tensor, teacher: Tensor, index: Tensor, head: Tensor) -> Tensor:
        given = {name: argument[index] for name, argument in rows.items()}
        return loss.loss_fn({"student": z, "teacher": teacher}, given, {"embedding": head})[0]

    return formula


# --- other people's --------------------------------------------------------------------------------------------------


def peers_of(sides: Sides, beta: float, hard: float, compiled: bool) -> dict[str, Loss]:
    def trl() -> Tensor:
        kernel = trl_kernel("chunked_divergence", "ChunkedDivergenceFunction")
        student, weight, teacher, head = sides.heads
        return kernel.apply(student, weight, None, teacher, head, None, beta)[0].mean()

    def liger_triton() -> Tensor:
        from liger_kernel.transformers import LigerFusedLinearJSD

        return LigerFusedLinearJSD(jsd_beta=beta)(*sides.heads, None)

    def liger() -> Tensor:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        loss = LigerFusedLinearJSDLoss(hard, 1 - hard, beta=beta, compiled=compiled)
        return loss(*sides.heads, sides.target)

    alone: dict[str, Loss] = {} if hard else {"TRL": trl, "Liger, Triton": liger_triton}
    return {**alone, "Liger, chunked": liger}


# --- JSD and KL ------------------------------------------------------------------------------------------------------

BETAS = {"JSD": (distill.JSDLoss, 0.5), "KL": (distill.KLDivLoss, 0.0), "reverse KL": (distill.ReverseKLLoss, 1.0)}


def ours_of(name: str, hard: float, dtype: torch.dtype, **options: Any) -> dict[str, distill.DistillationLoss]:
    make = partial(BETAS[name][0], weight_hard=hard, weight_soft=1 - hard, **options)
    return {label: make(**more) for label, more in precisions(BETAS[name][0].__name__, dtype).items()}


def run_divergence(bench: Benchmark, name: str, sides: Sides, chunks: list[int], options: dict[str, Any]) -> None:
    """With a hard loss of half the weight, and without one; other sizes of chunks beside the plan's with it."""
    dtype, beta = sides.student.dtype, BETAS[name][1]
    for hard in (0.5, 0.0):
        losses = ours_of(name, hard, dtype, **options)
        first = next(iter(losses))
        for size in chunks if hard else ():
            losses[f"{first}, chunks of {size}"] = ours_of(name, hard, dtype, chunk_size=size, **options)[first]
        ours = {label: value(loss, *sides.heads, target=sides.target) for label, loss in losses.items()}
        candidates = [
            *sides.floors(losses[first].plan(*sides.heads, target=sides.target)),
            *as_candidates(ours, sides.leaves, OURS, BOUNDS[dtype]),
            *as_candidates(peers_of(sides, beta, hard, options["compiled"]), sides.leaves, PEER, BOUNDS[dtype]),
        ]
        expected = partial(true_step, sides, divergence(beta, hard, sides))
        bench.case(sides.title(f"{name} and CE" if hard else name), candidates, expected, gradients=GRADIENTS)


# --- every class -----------------------------------------------------------------------------------------------------

EVERY: dict[str, Callable[..., distill.DistillationLoss]] = {
    "forward KL": distill.KLDivLoss,
    "reverse KL": distill.ReverseKLLoss,
    "JSD": distill.JSDLoss,
    "skew KL": distill.SkewKLLoss,
    "skew reverse KL": distill.SkewReverseKLLoss,
    "total variation": distill.TVDLoss,
    "alpha-beta": distill.AlphaBetaLoss,
    "adaptive KL": distill.AdaptiveKLLoss,
    "TAID": distill.TAIDLoss,
    "cosine": distill.CosineSimilarityLoss,
    "MSE of logits": distill.LogitMSELoss,
    "earth mover": distill.EarthMoverLoss,
    "Cramer": partial(distill.EarthMoverLoss, p=2),
    "KVD, linear": distill.KVDLoss,
    "KVD, delta": partial(distill.KVDLoss, kernel="delta"),
    "ULD": distill.ULDLoss,
    "CE, reverse KL and TVD": partial(distill.DistillLoss, [("ce", 0.5), ("reverse_kl", 0.4), ("tvd", 0.1)]),
    "top 64": distill.TopKLoss,
}


def run_divergences(bench: Benchmark, sides: Sides, options: dict[str, Any]) -> None:
    bound = BOUNDS[sides.student.dtype]
    logprobs = [(part @ sides.teacher_weight.T).float().log_softmax(1).topk(64) for part in sides.teacher.split(1024)]
    known, ids = (torch.cat(parts) for parts in zip(*logprobs, strict=True))
    for name, make in EVERY.items():
        loss = make(**options)
        top = isinstance(loss, distill.TopKLoss)
        heads = (*sides.leaves, ids, known) if top else sides.heads
        rows = {"target": sides.target, "ids": ids, "logprobs": known.double()}
        ours = {type(loss).__name__: value(loss, *heads, target=sides.target)}
        candidates = [
            *sides.floors(loss.plan(*heads, target=sides.target), teacher=not top)[:1],
            *as_candidates(ours, sides.leaves, OURS, bound),
        ]
        expected = partial(true_step, sides, own_formula(loss, rows))
        bench.case(sides.title(name), candidates, expected, gradients=GRADIENTS)


# --- accuracy --------------------------------------------------------------------------------------------------------


def run_accuracy(bench: Benchmark, sides: Sides, options: dict[str, Any]) -> None:
    dtype = sides.student.dtype
    for name, (_, beta) in BETAS.items():
        ours = {label: value(loss, *sides.heads) for label, loss in ours_of(name, 0.0, dtype, **options).items()}
        candidates = [
            *as_candidates(ours, sides.leaves, OURS, BOUNDS[dtype]),
            *as_candidates(peers_of(sides, beta, 0.0, options["compiled"]), sides.leaves, PEER, BOUNDS[dtype]),
        ]
        expected = partial(true_step, sides, divergence(beta, 0.0, sides))
        told = sides.title(f"error of {name} near the teacher")
        bench.case(told, candidates, expected, gradients=GRADIENTS, timed=False)


def _numbers(text: str, by: str = ",") -> list[int]:
    return [int(n) for n in text.split(by) if n]


def main(
    device: Annotated[str, typer.Option(help="cuda, or cpu for a small run")] = "cuda",
    only: Annotated[str, typer.Option(help="cases, comma-separated")] = ",".join(CASES),
    vocabularies: Annotated[str, typer.Option(help="of JSD, comma-separated; KL takes the middle one")] = "",
    chunks: Annotated[str, typer.Option(help="rows a chunk, beside the plan's, at the middle vocabulary")] = "",
    head: Annotated[str, typer.Option(help="tokens x student's width x teacher's, of JSD and KL")] = "",
    every: Annotated[str, typer.Option(help="tokens x vocabulary x widths, of the table of divergences")] = "",
    near: Annotated[str, typer.Option(help="tokens x vocabulary x widths, of the accuracy")] = "",
    dtype: str = "",
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
    options = {"compiled": compiled}
    bench = Benchmark("distillation", torch.device(device), out, 2, repeats, match, peers, missing, budget, profile)
    sizes = _numbers(vocabularies or ("100,200,300" if cpu else "32000,128256,262144"))
    middle = sizes[len(sizes) // 2]
    tokens, student, teacher = _numbers(head or ("64x16x24" if cpu else "8192x2048x4096"), "x")
    if "jsd" in chosen:
        for size in sizes:
            extra = _numbers(chunks or ("16,32" if cpu else "1024,2048,4096")) if size == middle else []
            sides = random_sides(bench, [tokens, size, student, teacher], kind)
            run_divergence(bench, "JSD", sides, extra, options)
    if "kl" in chosen:
        sides = random_sides(bench, [tokens, middle, student, teacher], kind)
        for name in ("KL", "reverse KL"):
            run_divergence(bench, name, sides, [], options)
    if "divergences" in chosen:
        shape = _numbers(every or ("64x100x16x24" if cpu else "4096x32000x1024x2048"), "x")
        run_divergences(bench, random_sides(bench, shape, kind), options)
    if "accuracy" in chosen:
        shape = _numbers(near or ("64x100x16x16" if cpu else "2048x128256x2048x2048"), "x")
        run_accuracy(bench, random_sides(bench, shape, kind, noise=0.1), options)
    bench.finish()


if __name__ == "__main__":
    typer.run(main)
