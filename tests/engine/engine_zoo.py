"""Losses of every shape that the engine knows, each with a plain reference that holds the outputs whole.

Properties are tested over all of them at once (test_properties.py). A case says how to make its tensors, how to call
the engine with them, and what plain autograd would compute.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from chunked_embed import FlexChunkLoss, LossOutput, Projection
from chunked_embed import functional as CF

H, V = 6, 19
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    loss: Callable[..., FlexChunkLoss]
    tensors: Callable[[int, Callable], Inputs]  # (rows, randn) -> named tensors
    call: Callable[[FlexChunkLoss, Inputs], LossOutput]
    reference: Callable[[Inputs], Tensor]


def token_logps(outputs: Tensor, target: Tensor) -> Tensor:
    return -F.cross_entropy(outputs, target, reduction="none")


def linear(x: Inputs, weight: str = "weight", hidden: str = "hidden") -> Tensor:
    out = x[hidden] @ x[weight].T
    return out + x["bias"] if "bias" in x else out


# --- row-wise --------------------------------------------------------------------------------------------------------


class CrossEntropy(FlexChunkLoss):
    def __init__(self, scale=2.0, **options):
        super().__init__(**options)
        self.scale = scale

    def loss_fn(self, outputs, rows):
        values = F.cross_entropy(outputs * self.scale, rows["target"], reduction="none")
        return values, {"nll": values}


def token_rows(m, randn, **more):
    return {
        "hidden": randn(m, H),
        "weight": randn(V, H),
        "bias": randn(V),
        "target": torch.randint(0, V, (m,)),
        "used": (torch.arange(m) % 3 != 1) | (torch.arange(m) == m - 1),
    } | more


def weights(x: Inputs) -> Tensor:
    used = x["used"].to(x["hidden"].dtype)
    return used / used.sum().clamp_min(1)


def call_cross_entropy(loss, x):
    return loss(Projection(x["hidden"], x["weight"], x["bias"]), {"target": x["target"]}, row_weight=weights(x))


class Divergence(FlexChunkLoss):
    """KL(teacher | student) plus a hard loss: two projections of different hidden sizes."""

    def __init__(self, hard=0.3, **options):
        super().__init__(**options)
        self.hard = hard

    def loss_fn(self, outputs, rows):
        student, teacher = outputs["student"].log_softmax(1), outputs["teacher"].log_softmax(1)
        kl = (teacher.exp() * (teacher - student)).sum(1)
        return kl - self.hard * token_logps(outputs["student"], rows["target"]), {"kl": kl}


def call_divergence(loss, x):
    sides = {"student": Projection(x["hidden"], x["weight"]), "teacher": Projection(x["other"], x["other_weight"])}
    return loss(sides, {"target": x["target"]})


def divergence_reference(x):
    student, teacher = x["hidden"] @ x["weight"].T, x["other"] @ x["other_weight"].T
    kl = F.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="batchmean", log_target=True)
    return kl + 0.3 * F.cross_entropy(student, x["target"])


class ScaledSigmoid(FlexChunkLoss):
    """SigLIP with a learnable scale per row and a bias per column."""

    def loss_fn(self, outputs, rows, columns):
        z = outputs * rows["scale"][:, None] + columns["shift"]
        sign = torch.where(torch.arange(z.shape[1], device=z.device) == rows["index"][:, None], 1.0, -1.0)
        return -F.logsigmoid(sign * z).sum(1)


def call_sigmoid(loss, x):
    rows = {"scale": x["scale"], "index": x["target"]}
    return loss(Projection(x["hidden"], x["weight"]), rows, columns={"shift": x["shift"]})


def sigmoid_reference(x):
    z = x["hidden"] @ x["weight"].T * x["scale"][:, None] + x["shift"]
    sign = torch.where(torch.arange(V) == x["target"][:, None], 1.0, -1.0)
    return -F.logsigmoid(sign * z).sum(1).mean()


def triplet_reference(x):
    a, p, n = (torch.tanh(linear(x, hidden=side)) for side in ("hidden", "positive", "negative"))
    return F.relu((a - p).norm(dim=1) - (a - n).norm(dim=1) + 1.0).mean()


def call_triplet(loss, x):
    sides = {"anchor": x["hidden"], "positive": x["positive"], "negative": x["negative"]}
    return loss({name: Projection(side, x["weight"], x["bias"]) for name, side in sides.items()})


def call_lora(loss, x):
    head = Projection(x["hidden"], x["weight"], extra=((x["hidden"] @ x["down"].T, x["up"]),))
    return loss(head, {"target": x["target"]})


class CosineRegression(FlexChunkLoss):
    """Identity projections only: nothing to multiply, so gradients are taken in backward."""

    def loss_fn(self, outputs, rows):
        return (F.cosine_similarity(outputs["a"], outputs["b"]) - rows["label"]).square()


class Softplus(FlexChunkLoss):
    """Queries against themselves: one tensor is input and weight."""

    def loss_fn(self, outputs, rows):
        return F.softplus(outputs).mean(1)


# --- grouped ---------------------------------------------------------------------------------------------------------


class Preference(FlexChunkLoss):
    def __init__(self, beta=0.1, **options):
        super().__init__(segments_per_group=2, separate_outputs=True, **options)
        self.beta = beta

    def score_fn(self, outputs, rows):
        return {"logps": token_logps(outputs, rows["target"])}

    def loss_fn(self, scores, groups):
        ratio = scores["policy"]["logps"] - scores["reference"]["logps"]
        margin = ratio[:, 0] - ratio[:, 1]
        return -F.logsigmoid(self.beta * margin - groups["shift"]), {"margin": margin}


def segments(m: int) -> Tensor:
    """Ragged, out of order, some rows unused: two segments to a group."""
    ids = torch.arange(m) * 7 % max(m // 3, 1) // 2 * 2 + torch.arange(m) % 2
    return torch.where(torch.arange(m) % 5 == 3, -1, ids)


def n_groups(m: int) -> int:
    return int(segments(m).max()) // 2 + 1


def sums(values: Tensor, ids: Tensor, n: int) -> Tensor:
    used = ids >= 0
    return values.new_zeros(n).index_add(0, ids[used], values[used])


def pair_rows(m, randn):
    return token_rows(m, randn) | {
        "other": randn(m, H - 2).detach(),
        "other_weight": randn(V, H - 2).detach(),
        "shift": randn(n_groups(m)),
    }


def call_preference(loss, x):
    sides = {"policy": Projection(x["hidden"], x["weight"]), "reference": Projection(x["other"], x["other_weight"])}
    ids = segments(len(x["hidden"])).to(x["hidden"].device)
    return loss(sides, {"target": x["target"]}, segments=ids, groups={"shift": x["shift"]})


def preference_reference(x):
    m = len(x["hidden"])
    logps = [
        token_logps(h @ w.T, x["target"]) for h, w in ((x["hidden"], x["weight"]), (x["other"], x["other_weight"]))
    ]
    ratio = sums(logps[0] - logps[1], segments(m), 2 * n_groups(m)).view(-1, 2)
    return -F.logsigmoid(0.1 * (ratio[:, 0] - ratio[:, 1]) - x["shift"]).mean()


class WeightedPreference(Preference):
    """The frozen projection's scores have a gradient too, through a row argument; and it comes first."""

    def score_fn(self, outputs, rows):
        return {"logps": rows["scale"] * token_logps(outputs, rows["target"])}


def call_weighted(loss, x):
    sides = {"reference": Projection(x["other"], x["other_weight"]), "policy": Projection(x["hidden"], x["weight"])}
    ids = segments(len(x["hidden"])).to(x["hidden"].device)
    rows = {"target": x["target"], "scale": x["scale"]}
    return loss(sides, rows, segments=ids, groups={"shift": x["shift"]})


def weighted_reference(x):
    m = len(x["hidden"])
    sides = ((x["hidden"], x["weight"]), (x["other"], x["other_weight"]))
    policy, reference = (x["scale"] * token_logps(h @ w.T, x["target"]) for h, w in sides)
    ratio = sums(policy - reference, segments(m), 2 * n_groups(m)).view(-1, 2)
    return -F.logsigmoid(0.1 * (ratio[:, 0] - ratio[:, 1]) - x["shift"]).mean()


class LengthNormalised(FlexChunkLoss):
    """A mean over each segment, from its sum and its count; empty segments are zero. The normaliser is a row total."""

    def __init__(self, **options):
        super().__init__(segments_per_group=2, row_totals={"lse": "logsumexp"}, **options)

    def score_fn(self, outputs, rows):
        own = torch.arange(outputs.shape[1], device=outputs.device) == rows["target"][:, None]
        return {"own": torch.where(own, outputs, 0).sum(1)}

    def element_fn(self, outputs, rows):
        return {"lse": outputs}

    def loss_fn(self, scores, groups):
        mean = (scores["own"] - scores["lse"]) / scores["count"].clamp_min(1)
        return F.softplus(mean[:, 1] - mean[:, 0])


def call_length(loss, x):
    m = len(x["hidden"])
    weight = torch.linspace(0.5, 1, n_groups(m), dtype=x["hidden"].dtype, device=x["hidden"].device)
    ids = segments(m).to(x["hidden"].device)
    head = Projection(x["hidden"], x["weight"], x["bias"])
    return loss(head, {"target": x["target"]}, segments=ids, group_weight=weight)


def length_reference(x):
    m, ids = len(x["hidden"]), segments(len(x["hidden"]))
    logps = token_logps(linear(x), x["target"])
    mean = sums(logps, ids, 2 * n_groups(m)) / sums(torch.ones_like(logps), ids, 2 * n_groups(m)).clamp_min(1)
    mean = mean.view(-1, 2)
    return (F.softplus(mean[:, 1] - mean[:, 0]) * torch.linspace(0.5, 1, n_groups(m), dtype=mean.dtype)).sum()


class JointScores(FlexChunkLoss):
    """Both projections' outputs at once, a row argument with gradient, every row a group of its own."""

    def score_fn(self, outputs, rows):
        p, q = outputs["policy"].log_softmax(1), outputs["reference"].log_softmax(1)
        return {"kl": (p.exp() * (p - q)).sum(1) * rows["scale"], "top": outputs["policy"].amax(1)}

    def loss_fn(self, scores, groups):
        return torch.tanh(scores["kl"] - 0.1 * scores["top"]).sum(1)


def call_joint(loss, x):
    sides = {"policy": Projection(x["hidden"], x["weight"]), "reference": Projection(x["other"], x["other_weight"])}
    return loss(sides, {"scale": x["scale"]})


def joint_reference(x):
    z = x["hidden"] @ x["weight"].T
    p, q = z.log_softmax(1), (x["other"] @ x["other_weight"].T).log_softmax(1)
    return torch.tanh((p.exp() * (p - q)).sum(1) * x["scale"] - 0.1 * z.amax(1)).mean()


# --- coupled ---------------------------------------------------------------------------------------------------------


class Ranked(FlexChunkLoss):
    """CoSENT through a projection, as a class."""

    def __init__(self, **options):
        super().__init__(couples_batch=True, **options)

    def score_fn(self, outputs, rows):
        return {"cosine": F.cosine_similarity(outputs["a"], outputs["b"])}

    def loss_fn(self, scores, groups):
        return CF.cosent_from_scores(5 * scores["cosine"][:, 0], groups["label"]), {"largest": scores["cosine"].max()}


class RankedDense(Ranked):
    """A Dense layer: outputs are no larger than inputs and stay for backward. A class of its own has its own steps."""


def call_ranked(loss, x):
    sides = {"a": Projection(x["hidden"], x["weight"]), "b": Projection(x["positive"], x["weight"])}
    return loss(sides, groups={"label": x["label"]})


def ranked_reference(x):
    s = 5 * F.cosine_similarity(x["hidden"] @ x["weight"].T, x["positive"] @ x["weight"].T)
    lower = x["label"][:, None] < x["label"]
    return torch.where(lower, s[:, None] - s, -torch.inf).flatten().exp().sum().log1p()


class TwoSided(FlexChunkLoss):
    """Symmetric InfoNCE: row and column normalisers of one similarity matrix."""

    def __init__(self, **options):
        column_totals = {"column": "logsumexp", "mass": "sum"}
        super().__init__(couples_batch=True, row_totals={"row": "logsumexp"}, column_totals=column_totals, **options)

    def score_fn(self, outputs, rows):
        own = torch.arange(outputs.shape[1], device=outputs.device) == rows["index"][:, None]
        return {"own": torch.where(own, outputs, 0).sum(1)}

    def element_fn(self, outputs, rows):
        return {"row": outputs, "column": outputs, "mass": outputs.square()}

    def loss_fn(self, scores, groups):
        two_sided = scores["row"][:, 0] + scores["column"] - 2 * scores["own"][:, 0]
        return two_sided.mean() + 0.01 * scores["mass"].mean()


def call_two_sided(loss, x):
    index = torch.arange(len(x["hidden"]), device=x["hidden"].device)
    return loss(Projection(x["hidden"], x["positive"]), {"index": index})


def two_sided_reference(x):
    z = x["hidden"] @ x["positive"].T
    return (z.logsumexp(1) + z.logsumexp(0) - 2 * z.diag()).mean() + 0.01 * z.square().sum(0).mean()


CASES = {
    "cross_entropy": Case(
        CrossEntropy,
        token_rows,
        call_cross_entropy,
        lambda x: (F.cross_entropy(2 * linear(x), x["target"], reduction="none") * weights(x)).sum(),
    ),
    "divergence": Case(
        Divergence,
        lambda m, r: token_rows(m, r) | {"other": r(m, 4).detach(), "other_weight": r(V, 4)},
        call_divergence,
        divergence_reference,
    ),
    "sigmoid": Case(
        ScaledSigmoid,
        lambda m, r: token_rows(m, r) | {"scale": r(m), "shift": r(V)},
        call_sigmoid,
        sigmoid_reference,
    ),
    "triplet": Case(
        partial(CF.Triplet, margin=1.0, activation=torch.tanh),
        lambda m, r: token_rows(m, r) | {"positive": r(m, H), "negative": r(m, H)},
        call_triplet,
        triplet_reference,
    ),
    "lora": Case(
        CrossEntropy,
        lambda m, r: token_rows(m, r) | {"down": r(2, H), "up": r(V, 2), "weight": r(V, H).detach()},
        call_lora,
        lambda x: F.cross_entropy(2 * (x["hidden"] @ (x["weight"] + x["up"] @ x["down"]).T), x["target"]),
    ),
    "identity": Case(
        CosineRegression,
        lambda m, r: {"hidden": r(m, H), "positive": r(m, H), "label": r(m)},
        lambda loss, x: loss({"a": Projection(x["hidden"]), "b": Projection(x["positive"])}, {"label": x["label"]}),
        lambda x: (F.cosine_similarity(x["hidden"], x["positive"]) - x["label"]).square().mean(),
    ),
    "self": Case(
        Softplus,
        lambda m, r: {"hidden": r(m, H)},
        lambda loss, x: loss(Projection(x["hidden"], x["hidden"])),
        lambda x: F.softplus(x["hidden"] @ x["hidden"].T).mean(),
    ),
    "preference": Case(Preference, pair_rows, call_preference, preference_reference),
    "weighted_preference": Case(
        WeightedPreference, lambda m, r: pair_rows(m, r) | {"scale": r(m)}, call_weighted, weighted_reference
    ),
    "length_normalised": Case(LengthNormalised, token_rows, call_length, length_reference),
    "joint": Case(
        JointScores,
        lambda m, r: token_rows(m, r) | {"other": r(m, 4), "other_weight": r(V, 4), "scale": r(m)},
        call_joint,
        joint_reference,
    ),
    "ranked": Case(
        Ranked,
        lambda m, r: {
            "hidden": r(m, H),
            "positive": r(m, H),
            "weight": r(V, H),
            "label": torch.randint(0, 4, (m,)).float(),
        },
        call_ranked,
        ranked_reference,
    ),
    "ranked_dense": Case(
        RankedDense,
        lambda m, r: {
            "hidden": r(m, H),
            "positive": r(m, H),
            "weight": r(H, H),
            "label": torch.randint(0, 4, (m,)).float(),
        },
        call_ranked,
        ranked_reference,
    ),
    "two_sided": Case(
        TwoSided, lambda m, r: {"hidden": r(m, H), "positive": r(m, H)}, call_two_sided, two_sided_reference
    ),
}


def make(name: str, m: int = 23, dtype: torch.dtype = torch.float64, seed: int = 0, device: str = "cpu") -> Inputs:
    """The case's tensors; those that may learn require grad."""
    torch.manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_()

    def place(t: Tensor) -> Tensor:
        moved = t.detach().to(device)
        return moved.to(dtype).requires_grad_(t.requires_grad) if t.is_floating_point() else moved

    return {key: place(t) for key, t in CASES[name].tensors(m, randn).items()}


def learning(x: Inputs) -> list[Tensor]:
    return [t for t in x.values() if t.requires_grad]


def gradients(loss: Tensor, x: Inputs) -> list[Tensor]:
    """Zero where the loss does not depend on a tensor."""
    found = torch.autograd.grad(loss, learning(x), allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, learning(x), strict=True)]
