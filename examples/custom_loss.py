"""Losses that nobody ships, each of a few lines, checked against plain autograd on the whole logits.

    python examples/custom_loss.py

Row-wise, one value a token: a margin that grows in training (``MarginLoss``), targets of which some are ignored
(``FocalLoss``). Grouped: tokens score, the engine adds their scores up per completion, and the loss compares the
completions of a prompt (``ListwiseLoss``). As plain functions, with numbers by keyword (``smoothed``). With a step of
its own, where the gradient is known and a kernel could be (``ZLoss``). Then a small model trains on two of them.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from chunked_embed import LOSS, FlexChunkLoss, Projection, Step

VOCABULARY, HIDDEN, TOKENS = 8192, 64, 2000


# --- row-wise ---


class MarginLoss(FlexChunkLoss):
    """How far the other outputs of a row come within a margin of its target's."""

    def __init__(self, margin: float = 1.0, **options) -> None:
        super().__init__(**options)
        self.margin = margin  # a plain number, and it may change between calls

    def loss_fn(self, outputs, rows):  # (R, V) float32, {"target": (R,)} -> (R,)
        is_target = torch.arange(outputs.shape[1], device=outputs.device) == rows["target"][:, None]
        target = torch.where(is_target, outputs, 0).sum(1, keepdim=True)
        return torch.where(is_target, 0, (self.margin + outputs - target).relu()).mean(1)


class FocalLoss(FlexChunkLoss):
    """``(1 - p)^gamma * -log p`` of the target: tokens that are already likely count for less (arXiv 1708.02002).

    ``targets`` names what points to columns: rows with ``ignore_index`` are dropped before any product, and the loss is
    the mean over the others.
    """

    def __init__(self, gamma: float = 2.0, ignore_index: int = -100, **options) -> None:
        super().__init__(targets=("label",), ignore_index=ignore_index, **options)
        self.gamma = gamma

    def loss_fn(self, outputs, rows):  # -> (R,), and metrics of the rows
        nll = F.cross_entropy(outputs, rows["label"], reduction="none")
        return (1 - torch.exp(-nll)).pow(self.gamma) * nll, {"nll": nll}


# --- grouped ---


class ListwiseLoss(FlexChunkLoss):
    """Four completions to a prompt: cross-entropy of their mean log-probabilities against a teacher's ranking."""

    def __init__(self, temperature: float = 1.0, **options) -> None:
        super().__init__(segments_per_group=4, **options)
        self.temperature = temperature

    def score_fn(self, outputs, rows):  # -> {name: (R,)}, added up per completion by the engine
        return {"logps": -F.cross_entropy(outputs, rows["target"], reduction="none")}

    def loss_fn(self, scores, groups):  # {"logps": (G, 4), "count": (G, 4)}, {"preference": (G, 4)} -> (G,)
        mean = scores["logps"] / scores["count"].clamp_min(1)
        log_q = (mean / self.temperature).log_softmax(1)
        return -(groups["preference"] * log_q).sum(1), {"best": mean.argmax(1)}


# --- plain functions: define them once, at module level; numbers come by keyword ---


def smoothed(outputs, rows, smoothing):
    return F.cross_entropy(outputs, rows["target"], reduction="none", label_smoothing=smoothing)


# --- a step of its own ---


class ZLoss(FlexChunkLoss):
    """``-log p + c * log(Z)^2`` of the target, which keeps the normaliser Z near one.

    The functions would do. The step replaces them where it serves: it says what autograd would have to find out, and a
    kernel would stand in its place.
    """

    def __init__(self, coefficient: float = 1e-2, **options) -> None:
        super().__init__(**options)
        self.coefficient = coefficient

    def loss_fn(self, outputs, rows):
        nll = F.cross_entropy(outputs, rows["target"], reduction="none")
        return nll + self.coefficient * outputs.logsumexp(1).square()

    def make_step(self, projections):
        return ZLossStep(self.coefficient)


@dataclass(frozen=True)
class ZLossStep(Step):
    coefficient: float

    def score(self, chunk):  # -> parts by name, here (R,), and what `pull` uses again
        z, target = chunk.outputs().float(), chunk.rows["target"]
        lse = z.logsumexp(1)
        nll = lse - z.gather(1, target[:, None]).squeeze(1)
        return {LOSS: nll + self.coefficient * lse.square()}, lse

    def pull(self, chunk, lse, parts, upstream, into):  # upstream[LOSS]: (R,), what each row's loss counts
        slope = (chunk.outputs().float() - lse[:, None]).exp_()  # p
        slope *= (1 + 2 * self.coefficient * lse)[:, None]
        slope.scatter_add_(1, chunk.rows["target"][:, None], slope.new_full((chunk.size, 1), -1.0))
        into.outputs(slope.mul_(upstream[LOSS][:, None]))  # the engine takes the products with input and weight


# --- are they right? ---


def check(name: str, mine: Tensor, theirs: Tensor, leaves: list[Tensor]) -> None:
    """The same loss and gradients as the whole logits give."""
    expected = torch.autograd.grad(theirs, leaves, retain_graph=True)  # of the whole logits, which the next one needs
    pairs = zip(torch.autograd.grad(mine, leaves), expected, strict=True)
    worst = max(((a - b).norm() / b.norm()).item() for a, b in pairs)
    print(f"{name}: {mine.item():.6f}, whole logits {theirs.item():.6f}, gradients differ by {worst:.1e}")
    if worst > 1e-4 or not torch.allclose(mine, theirs, rtol=1e-5):
        raise SystemExit(f"{name} does not match its reference")


def main() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    head = torch.nn.Linear(HIDDEN, VOCABULARY)
    target = torch.randint(VOCABULARY, (TOKENS,))
    projection, rows = Projection(hidden, head.weight, head.bias), {"target": target}
    leaves = [hidden, head.weight, head.bias]

    focal = FocalLoss(gamma=2.0)
    label = target.masked_fill(torch.arange(TOKENS) % 4 == 0, -100)
    print(focal.plan(projection, {"label": label}), end="\n\n")  # what a call will do: 1,500 of 2,000 rows
    logits = head(hidden)
    nll = F.cross_entropy(logits, target, reduction="none")
    used = nll[label >= 0]
    check("focal", focal(projection, {"label": label}).loss, ((1 - torch.exp(-used)) ** 2 * used).mean(), leaves)

    margin = MarginLoss()
    of_target = logits.gather(1, target[:, None])
    for margin.margin in (0.5, 2.0):  # counts from the next call on
        over = (margin.margin + logits - of_target).relu().scatter(1, target[:, None], 0)
        check(f"margin of {margin.margin}", margin(projection, rows).loss, over.mean(), leaves)

    # Tokens of 25 prompts with four completions of 20 tokens: token i belongs to completion i // 20.
    listwise, completion = ListwiseLoss(), torch.arange(TOKENS) // 20
    preference = torch.tensor([0.6, 0.2, 0.1, 0.1]).expand(25, 4)
    output = listwise(projection, rows, segments=completion, groups={"preference": preference})
    mean = -nll.view(25, 4, 20).mean(-1)
    check("listwise", output.loss, -(preference * mean.log_softmax(1)).sum(1).mean(), leaves)
    print("best completion of each prompt:", output.metrics["best"].tolist())

    smooth = FlexChunkLoss(smoothed, smoothing=0.1)
    check("smoothed", smooth(projection, rows).loss, F.cross_entropy(logits, target, label_smoothing=0.1), leaves)

    z_loss = ZLoss(coefficient=1e-2)
    check("z-loss", z_loss(projection, rows).loss, (nll + 1e-2 * logits.logsumexp(1) ** 2).mean(), leaves)

    # Training: predict the next token of a sequence that counts up in steps of three. One token in eight is ignored.
    model = torch.nn.Embedding(VOCABULARY, HIDDEN)
    optimizer = torch.optim.Adam([*model.parameters(), *head.parameters()], lr=1e-2)
    for step in range(30):
        tokens = torch.randint(512, (512,))
        label = ((tokens + 3) % 512).masked_fill(torch.arange(512) % 8 == 0, -100)
        projection = Projection(model(tokens), head.weight, head.bias)
        focal.gamma, margin.margin = 2 - step / 15, 0.1 * step  # schedules: nothing is compiled anew for them
        output = focal(projection, {"label": label})
        loss = output.loss + margin(projection, {"target": label}).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 9:  # `means`: over the tokens that count
            print(f"step {step + 1}: loss {loss.item():.3f}, mean NLL {output.means['nll']:.3f}")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    main()
