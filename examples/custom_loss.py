"""A loss that nobody ships, end to end: focal cross-entropy over a vocabulary, and a ranking of completions.

    python examples/custom_loss.py

Two losses of a few lines each. The first is row-wise: one value per token. The second is grouped: tokens score, the
engine adds their scores up per completion, and the loss compares the completions of a prompt. Both are checked against
plain autograd on the whole logits, then a small model trains on the first.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from chunked_embed import FlexChunkLoss, Projection

VOCABULARY, HIDDEN = 8192, 64


class FocalLoss(FlexChunkLoss):
    """``(1 - p)^gamma * -log p`` of the target: tokens that are already likely count for less (arXiv 1708.02002)."""

    index_rows = ("target",)  # checked to lie in [0, V) before any work

    def __init__(self, gamma: float = 2.0, **options) -> None:
        super().__init__(**options)
        self.gamma = gamma  # a number: the functions read hp.gamma, and changing it recompiles nothing

    def loss_fn(self, outputs, rows, hp):  # (R, V) float32, {"target": (R,)} -> (R,)
        nll = F.cross_entropy(outputs, rows["target"], reduction="none")
        return (1 - torch.exp(-nll)).pow(hp.gamma) * nll, {"nll": nll}


class ListwiseLoss(FlexChunkLoss):
    """Four completions to a prompt: cross-entropy of their mean log-probabilities against a teacher's ranking."""

    segments_per_group = 4
    index_rows = ("target",)

    def __init__(self, temperature: float = 1.0, **options) -> None:
        super().__init__(**options)
        self.temperature = temperature

    def score_fn(self, outputs, rows, hp):  # -> {name: (R,)}, added up per completion by the engine
        return {"logps": -F.cross_entropy(outputs, rows["target"], reduction="none")}

    def loss_fn(self, scores, groups, hp):  # {"logps": (G, 4), "count": (G, 4)}, {"preference": (G, 4)} -> (G,)
        mean = scores["logps"] / scores["count"].clamp_min(1)
        log_q = (mean / hp.temperature).log_softmax(1)
        return -(groups["preference"] * log_q).sum(1), {"best": mean.argmax(1)}


def check(name: str, mine: torch.Tensor, theirs: torch.Tensor, leaves: list[torch.Tensor]) -> None:
    """The same loss and gradients as the whole logits give."""
    pairs = zip(torch.autograd.grad(mine, leaves), torch.autograd.grad(theirs, leaves), strict=True)
    worst = max(((a - b).norm() / b.norm()).item() for a, b in pairs)
    print(f"{name}: {mine.item():.6f}, whole logits {theirs.item():.6f}, gradients differ by {worst:.1e}")
    if worst > 1e-4:
        raise SystemExit(f"{name} does not match its reference")


def main() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(2000, HIDDEN, requires_grad=True)
    head = torch.nn.Linear(HIDDEN, VOCABULARY)
    target = torch.randint(VOCABULARY, (2000,))
    projection = Projection(hidden, head.weight, head.bias)
    leaves = [hidden, head.weight, head.bias]

    focal = FocalLoss(gamma=2.0)
    print(focal.plan(projection, {"target": target}), end="\n\n")
    nll = F.cross_entropy(head(hidden), target, reduction="none")
    check("focal", focal(projection, {"target": target}).loss, ((1 - torch.exp(-nll)) ** 2 * nll).mean(), leaves)

    # Tokens of 25 prompts with four completions of 20 tokens: token i belongs to completion i // 20.
    listwise, completion = ListwiseLoss(), torch.arange(2000) // 20
    preference = torch.tensor([0.6, 0.2, 0.1, 0.1]).expand(25, 4)
    output = listwise(projection, {"target": target}, segments=completion, groups={"preference": preference})
    mean = -F.cross_entropy(head(hidden), target, reduction="none").view(25, 4, 20).mean(-1)
    check("listwise", output.loss, -(preference * mean.log_softmax(1)).sum(1).mean(), leaves)
    print("best completion of each prompt:", output.metrics["best"].tolist())

    # Training: predict the next token of a sequence that counts up in steps of three.
    model = torch.nn.Embedding(VOCABULARY, HIDDEN)
    optimizer = torch.optim.Adam([*model.parameters(), *head.parameters()], lr=1e-2)
    for step in range(30):
        tokens = torch.randint(512, (512,))
        output = focal(Projection(model(tokens), head.weight, head.bias), {"target": (tokens + 3) % 512})
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        if step % 10 == 9:
            print(f"step {step + 1}: focal loss {output.loss.item():.3f}, mean NLL {output.metrics['nll'].mean():.3f}")


if __name__ == "__main__":
    main()
