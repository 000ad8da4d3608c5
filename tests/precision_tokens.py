"""Losses over a vocabulary in the precision contract: ``alignment``, ``linear_logps``, ``distill``, and losses of a
user's own on the engine.

Truths are those of the zoos beside these losses' tests: TRL's functions, or formulas on whole logits.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from precision_parts import Case, Tensors, draw, weighted_sum
from torch import Tensor

for folder in ("alignment", "distill", "engine"):
    sys.path.append(str(Path(__file__).parent / folder))

import distill_zoo  # noqa: E402
import engine_zoo  # noqa: E402
import preference_zoo  # noqa: E402
from preference_zoo import IGNORE, Batch  # noqa: E402

import alignment  # noqa: E402
import distill  # noqa: E402
from chunked_embed import FlexChunkLoss, Projection, linear_logps  # noqa: E402

CASES: dict[str, Case] = {}
PAIRS, TOKENS, H, V = 3, 11, 48, 300


# --- preferences -----------------------------------------------------------------------------------------------------


def head(h: int = H, v: int = V, seed: int = 0, size: float = 8.0) -> Tensors:
    """Whose logits have a standard deviation of 8: a token has nearly all of the probability, as in a trained model."""
    randn = draw(1000 + seed)
    return {"weight": randn(v, h) * size / h**0.5, "bias": 0.3 * randn(v)}


def likely(hidden: Tensor, weight: Tensor, seed: int = 7) -> Tensor:
    """Tokens that are the most probable, or near it."""
    z = hidden @ weight.T
    return (z + 2 * draw(seed)(*z.shape)).argmax(-1)


def pairs(seed: int = 0, drift: float = 0.02) -> Tensors:
    """Completions, chosen ones first, behind prompts; the reference is near the policy."""
    randn, n = draw(seed + 1), 2 * PAIRS
    x = {"hidden": randn(n, TOKENS, H), **head(seed=seed)}
    x |= {"ref_hidden": x["hidden"] + drift * randn(n, TOKENS, H)}
    x |= {"ref_weight": x["weight"].clone(), "ref_bias": x["bias"].clone()}
    ids, place = likely(x["hidden"], x["weight"]), torch.arange(TOKENS)
    prompt = torch.tensor([1, 2, 1, 2, 1, 1])[:, None]
    count = torch.tensor([8, 5, 9, 6, 9, 4])[:, None]
    x["target"] = torch.where((place >= prompt) & (place < prompt + count), ids, IGNORE)
    x["prompt_target"] = torch.where(place < prompt + count, ids, IGNORE)
    x["labels"] = torch.arange(n) % 3 != 1
    return x


def batch_of(x: Tensors) -> Batch:
    return Batch(**{field.name: x[field.name] for field in dataclasses.fields(Batch) if field.name in x})


LOGGED = ("rewards/margins", "rewards/chosen", "logps/chosen", "logps/rejected", "logps")


def preference(case: preference_zoo.Case, how: str, autocast: str | None = None, **options: Any) -> Case:
    """``how``: the reference is "live", "given" by its log-probabilities, or there is "none"."""

    def call(x: Tensors, **chunks: Any) -> Any:
        batch, more = batch_of(x), {}
        if how == "given":
            used = batch.ref_hidden, batch.ref_weight, batch.target, batch.ref_bias
            with torch.no_grad():
                more["ref_logps"] = linear_logps(*used, chunk_size=5, compiled=False).logps.sum(1)
        loss = case.loss(**options, **chunks)
        arguments = {name: t.to(x["hidden"].device) for name, t in case.arguments(batch).items()}
        labels = {"preference_labels": batch.labels} if case.unpaired else {}
        reference = batch.reference(how) if how != "given" else {}
        given = {**labels, **reference, **more, **arguments}
        return loss(batch.hidden, batch.weight, batch.target, bias=batch.bias, **given)

    def ours(x: Tensors, **chunks: Any) -> Any:
        out = call(x, **chunks)
        return out.loss, {name: out.metrics[name] for name in LOGGED if name in out.metrics}

    def truth(x: Tensors) -> Any:
        value = case.reference(batch_of(x))
        # What is logged is ours in float64, which other tests compare with TRL's.
        metrics = call(x, compiled=False).metrics
        return value[0] if isinstance(value, tuple) else value, {
            name: metrics[name] for name in LOGGED if name in metrics
        }

    return Case(pairs, ours, truth, ("hidden", "weight", "bias"), autocast)


for name, zoo_case in preference_zoo.CASES.items():
    CASES[f"alignment {name}"] = preference(zoo_case, zoo_case.kind)
for name in ("dpo_sigmoid", "dpo_ipo", "dpo_mpo", "dpo_wpo", "dpo_aot", "irpo", "kto", "bco", "fpo_js_live"):
    CASES[f"alignment {name}, reference given"] = preference(preference_zoo.CASES[name], "given")
for name in ("dpo_sigmoid", "tdpo2", "simpo", "orpo", "kto"):
    zoo_case = preference_zoo.CASES[name]
    CASES[f"autocast alignment {name}"] = preference(zoo_case, zoo_case.kind, "half")
REFERRING = [name for name, case in preference_zoo.CASES.items() if case.kind == "live"]


# --- policy gradients ---


def sampled(seed: int = 5) -> Tensors:
    """Completions of a policy that has moved a little since."""
    x = pairs(seed)
    target = x["target"]
    logps = whole_logps(x)
    randn = draw(seed + 50)
    x["old_logps"], x["ref_logps"] = ((logps + 0.05 * randn(*target.shape)).float() for _ in range(2))
    x["advantages"] = randn(len(target)).float()
    return {name: x[name] for name in ("hidden", "weight", "bias", "target", "old_logps", "ref_logps", "advantages")}


def whole_logps(x: Tensors) -> Tensor:
    log_p = (x["hidden"] @ x["weight"].T + x["bias"]).log_softmax(-1)
    return log_p.gather(-1, x["target"].clamp_min(0)[..., None])[..., 0]


def policy_gradient(**options: Any) -> Case:
    loss = alignment.GRPOLoss(**options)

    def ours(x: Tensors, **chunks: Any) -> Tensor:
        given = x["advantages"], x["old_logps"], x["ref_logps"] if loss.beta else None
        made = alignment.GRPOLoss(**options, token_metrics=False, **chunks)
        return made(x["hidden"], x["weight"], x["target"], *given, bias=x["bias"]).loss

    def truth(x: Tensors) -> Tensor:
        """The formula on whole tensors, which other tests compare with TRL's."""
        used = (x["target"] != IGNORE).double()
        given = {name: x[name] for name in ("old_logps", "ref_logps")}
        terms, found = loss.of_tokens(whole_logps(x), {**given, "advantages": x["advantages"][:, None]}, used)
        terms = terms + (loss.beta * found["kl"] if loss.beta else 0.0)
        return ((terms * used).sum(1) * loss.weights(used.sum(1), None)).sum()

    why = "few tokens have a term that is not clipped, so that roundings are not averaged"
    learns = ("hidden", "weight", "bias")
    return Case(sampled, ours, truth, learns, slack=dict.fromkeys(learns, 1.2), why=why)


CASES |= {
    "alignment grpo": policy_gradient(loss_type="grpo", beta=0.1),
    "alignment gspo": policy_gradient(loss_type="grpo", importance_sampling_level="sequence"),
    "alignment cispo": policy_gradient(loss_type="cispo", epsilon_high=2.0),
    "alignment vespo": policy_gradient(loss_type="vespo"),
}


# --- token statistics ------------------------------------------------------------------------------------------------

STATISTICS = ("logps", "lse", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def tokens(n: int = 40, seed: int = 2, lora: bool = False, size: float = 8.0) -> Tensors:
    randn = draw(seed)
    x = {"hidden": randn(n, H), **head(seed=seed, size=size)}
    x["target"] = torch.where(torch.arange(n) % 4 == 1, IGNORE, likely(x["hidden"], x["weight"]))
    return x | ({"low": randn(n, 4), "up": randn(V, 4)} if lora else {})


def whole_logits(x: Tensors, hidden: str = "hidden", weight: str = "weight", bias: str = "bias") -> Tensor:
    z = x[hidden] @ x[weight].T + x[bias]
    return z + x["low"] @ x["up"].T if "low" in x else z


FEW = "six dimensions and 23 rows: a few numbers outweigh the others, and their roundings are not averaged"


def statistics(
    outputs: tuple[str, ...], make: Callable[[], Tensors] = tokens, autocast: str | None = None, **transform: Any
) -> Case:
    def scored(found: Tensors) -> Any:
        return weighted_sum({name: found[name] for name in outputs if name in ("logps", "lse", "entropy")}), found

    def ours(x: Tensors, **chunks: Any) -> Any:
        extra = ((x["low"], x["up"]),) if "low" in x else ()
        given = {"outputs": outputs, "extra": extra, **transform, **chunks}
        found = linear_logps(x["hidden"], x["weight"], x["target"], x["bias"], **given)
        return scored({name: getattr(found, name) for name in outputs})

    def truth(x: Tensors) -> Any:
        z = whole_logits(x) * transform.get("logit_scale", 1.0)
        if cap := transform.get("logit_softcap"):
            z = cap * torch.tanh(z / cap)
        log_p = (z / transform.get("temperature", 1.0)).log_softmax(1)
        z = z / transform.get("temperature", 1.0)
        used, own = x["target"] != IGNORE, x["target"].clamp_min(0)[:, None]
        found = {
            "logps": log_p.gather(1, own)[:, 0],
            "lse": z.logsumexp(1),
            "entropy": -(log_p.exp() * log_p).sum(1),
            "log_sum_sq_probs": (2 * log_p).logsumexp(1),
            "mean_logits": z.mean(1),
            "is_top1": (z.gather(1, own)[:, 0] >= z.amax(1)).to(z.dtype),
        }
        return scored({name: torch.where(used, found[name], 0.0) for name in outputs})

    learns = tuple(name for name in ("hidden", "weight", "bias", "low", "up") if name in make())
    slack = {"low": 1.2}  # of rank 2: few numbers, whose errors vary
    return Case(make, ours, truth, learns, autocast, slack=slack, why=FEW)


CASES |= {
    "linear_logps": statistics(("logps",)),
    "linear_logps, all": statistics(STATISTICS),
    "linear_logps entropy": statistics(("entropy",)),
    "linear_logps, softcap": statistics(STATISTICS, logit_scale=0.5, logit_softcap=12.0, temperature=1.5),
    "linear_logps, LoRA": statistics(STATISTICS, partial(tokens, lora=True)),
    "linear_logps, flat": statistics(STATISTICS, partial(tokens, size=1.0)),
    "autocast linear_logps": statistics(STATISTICS, autocast="half"),
    "autocast linear_logps, LoRA": statistics(STATISTICS, partial(tokens, lora=True), "half"),
}


# --- distillation ----------------------------------------------------------------------------------------------------


def student_and_teacher(n: int = 30, seed: int = 3, drift: float = 0.1, size: float = 8.0, v: int = V) -> Tensors:
    """A student near its teacher, both peaked."""
    randn = draw(seed)
    x = {"teacher_hidden": randn(n, H)}
    x |= {f"teacher_{name}": t for name, t in head(v=v, seed=seed, size=size).items()}
    x |= {"student_hidden": x["teacher_hidden"] + drift * randn(n, H)}
    x |= {"student_weight": x["teacher_weight"].clone(), "student_bias": x["teacher_bias"].clone()}
    x["target"] = torch.where(torch.arange(n) % 3 == 1, IGNORE, likely(x["teacher_hidden"], x["teacher_weight"]))
    return x


TOKENS_COUNT = "few tokens have nearly all of the loss, so that roundings are not averaged"
DISTILLED = ("student_hidden", "student_weight", "student_bias")


def call_distill(loss: Any, x: Tensors) -> Any:
    parts = ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight", "target")
    return loss(*(x[name] for name in parts), student_bias=x["student_bias"], teacher_bias=x["teacher_bias"]).loss


def distilled(
    case: distill_zoo.Case,
    autocast: str | None = None,
    temperature: float = 1.0,
    make: Callable[[], Tensors] = student_and_teacher,
) -> Case:
    def ours(x: Tensors, **chunks: Any) -> Tensor:
        return call_distill(case.loss(temperature=temperature, **chunks), x)

    def truth(x: Tensors) -> Tensor:
        logits = (distill_zoo.logits(x, side) for side in ("student", "teacher"))
        return case.values(*logits, x["teacher_weight"], temperature).mean()

    return Case(make, ours, truth, DISTILLED, autocast, slack=dict.fromkeys(DISTILLED, 1.2), why=TOKENS_COUNT)


for name, zoo_of_distill in distill_zoo.CASES.items():
    if name != "taid 0":  # the student's own distribution: a gradient of zero
        CASES[f"distill {name}"] = distilled(zoo_of_distill)
for name in ("kl", "reverse_kl", "jsd"):
    CASES[f"distill {name}, temperature 2"] = distilled(distill_zoo.CASES[name], temperature=2.0)
    CASES[f"autocast distill {name}"] = distilled(distill_zoo.CASES[name], "half")
many = partial(student_and_teacher, n=6, v=20_000)  # a mean over as many is denormal in float16
CASES["distill cosine of 20,000 tokens"] = distilled(distill_zoo.CASES["cosine"], make=many)


def composite(x: Tensors) -> Tensor:
    s, t = (distill_zoo.logits(x, side) for side in ("student", "teacher"))
    soft = 0.4 * distill_zoo.reverse_reference(s, t, None) + 0.1 * distill_zoo.tvd_reference(s, t, None)
    return (soft + 0.5 * F.cross_entropy(s, distill_zoo.labels(x), reduction="none")).mean()


def call_composite(x: Tensors, **chunks: Any) -> Tensor:
    return call_distill(distill.DistillLoss([("ce", 0.5), ("reverse_kl", 0.4), ("tvd", 0.1)], **chunks), x)


CASES["distill composite"] = Case(student_and_teacher, call_composite, composite, DISTILLED)


def hard_and_mean(x: Tensors) -> Tensor:
    s, t = (distill_zoo.logits(x, side) for side in ("student", "teacher"))
    hard = F.cross_entropy(s, distill_zoo.labels(x), reduction="none")
    return (0.5 * hard + 0.5 * distill_zoo.cosine_reference(s, t, None)).mean()


def call_hard_and_mean(x: Tensors, **chunks: Any) -> Tensor:
    return call_distill(distill.DistillLoss([("ce", 0.5), ("cosine", 0.5)], **chunks), x)


CASES["distill ce and cosine of 20,000 tokens"] = Case(many, call_hard_and_mean, hard_and_mean, DISTILLED)


def top_tokens(k: int = 8) -> Tensors:
    x = student_and_teacher(size=2.0)  # something is left beyond these
    log_p = (x["teacher_hidden"] @ x["teacher_weight"].T + x["teacher_bias"]).log_softmax(1)
    logprobs, ids = log_p.topk(k, 1)
    return {name: x[name] for name in (*DISTILLED, "target")} | {"logprobs": logprobs.float(), "ids": ids}


def call_top(x: Tensors, **chunks: Any) -> Tensor:
    loss = distill.TopKLoss("kl", **chunks)
    given = x["student_hidden"], x["student_weight"], x["ids"], x["logprobs"], x["target"]
    return loss(*given, student_bias=x["student_bias"]).loss


def bucket_kl(x: Tensors) -> Tensor:
    """The rest of both distributions as one more token."""
    used = x["target"] != IGNORE
    log_q = (x["student_hidden"] @ x["student_weight"].T + x["student_bias"]).log_softmax(1)[used]
    ids, log_p = x["ids"][used], x["logprobs"][used]
    kept = log_q.gather(1, ids)
    log_q_rest = log_q.scatter(1, ids, -torch.inf).logsumexp(1)
    p_rest = -torch.expm1(log_p.logsumexp(1))
    return ((log_p.exp() * (log_p - kept)).sum(1) + p_rest * (p_rest.log() - log_q_rest)).mean()


CASES["distill top-k"] = Case(top_tokens, call_top, bucket_kl, DISTILLED)


# --- a user's own ----------------------------------------------------------------------------------------------------


def engine_case(name: str, size: float) -> Case:
    case = engine_zoo.CASES[name]

    def make() -> Tensors:
        x = engine_zoo.make(name)
        grown = {"hidden": size * x["hidden"].detach()}
        return {key: t.detach() for key, t in x.items()} | grown

    def ours(x: Tensors, **chunks: Any) -> Tensor:
        return case.call(case.loss(**chunks), x).loss

    x = engine_zoo.make(name)
    grads = torch.autograd.grad(case.reference(x), engine_zoo.learning(x), allow_unused=True)
    used = {id(t) for t, grad in zip(engine_zoo.learning(x), grads, strict=True) if grad is not None}
    learns = tuple(key for key, t in x.items() if id(t) in used)
    return Case(make, ours, case.reference, learns, slack=dict.fromkeys(learns, 1.4), why=FEW)


for name in engine_zoo.CASES:
    if name == "lora":  # whose caller rounds the product with the adapter; "linear_logps, LoRA" is one
        continue
    CASES[f"engine {name}"] = engine_case(name, 1.0)
    if name not in ("identity", "self", "ranked", "ranked_dense", "two_sided", "triplet"):
        CASES[f"engine {name}, peaked"] = engine_case(name, 4.0)


class Cross(FlexChunkLoss):
    """As a user writes it, over a peaked vocabulary."""

    def loss_fn(self, outputs: Tensor, rows: Tensors) -> Tensor:
        return F.cross_entropy(outputs, rows["target"], reduction="none")


def call_cross(x: Tensors, **chunks: Any) -> Tensor:
    return Cross(**chunks)(Projection(x["hidden"], x["weight"], x["bias"]), {"target": x["target"]}).loss


def cross(x: Tensors) -> Tensor:
    return F.cross_entropy(whole_logits(x), x["target"])


class Mean(FlexChunkLoss):
    """Over the vocabulary: its gradients are small."""

    def __init__(self, **options: Any) -> None:
        super().__init__(gradient_size=1 / 20_000, **options)

    def loss_fn(self, outputs: Tensor, rows: Tensors) -> Tensor:
        return torch.tanh(outputs).mean(1)


def many_tokens() -> Tensors:
    randn = draw(8)
    return {"hidden": randn(6, 16), "weight": randn(20_000, 16) / 4}


def call_mean(x: Tensors, **chunks: Any) -> Tensor:
    return Mean(**chunks)(Projection(x["hidden"], x["weight"])).loss


CASES["engine mean of 20,000 columns"] = Case(
    many_tokens, call_mean, lambda x: torch.tanh(x["hidden"] @ x["weight"].T).mean(), ("hidden", "weight")
)
for autocast in (None, "half"):
    name = "engine cross-entropy of a vocabulary"
    CASES[f"autocast {name}" if autocast else name] = Case(
        tokens, call_cross, cross, ("hidden", "weight", "bias"), autocast
    )


class Elements(FlexChunkLoss):
    """Scores of several kinds: one a row, a total a row and a total a column."""

    def __init__(self, **options: Any) -> None:
        super().__init__(
            couples_batch=True, row_totals={"lse": "logsumexp"}, column_totals={"used": "logsumexp"}, **options
        )

    def score_fn(self, outputs: Tensor, rows: Tensors) -> Tensors:
        own = torch.arange(outputs.shape[1], device=outputs.device) == rows["target"][:, None]
        return {"own": torch.where(own, outputs, 0).sum(1)}

    def element_fn(self, outputs: Tensor, rows: Tensors) -> Tensors:
        return {"lse": outputs, "used": outputs}

    def loss_fn(self, scores: Tensors, groups: Tensors) -> Tensor:
        return weighted_sum({name: value.flatten() for name, value in scores.items() if name != "count"})


def all_used() -> Tensors:
    x = tokens()
    return x | {"target": likely(x["hidden"], x["weight"])}


def call_scores(x: Tensors, **chunks: Any) -> Any:
    projection = Projection(x["hidden"], x["weight"], x["bias"])
    found = Elements(**chunks).scores(projection, {"target": x["target"]})
    return weighted_sum(found), found


def scores(x: Tensors) -> Any:
    z = whole_logits(x)
    own = z.gather(1, x["target"][:, None])[:, 0]
    found = {"own": own, "lse": z.logsumexp(1), "used": z.logsumexp(0)}
    return weighted_sum(found), found


CASES["engine scores()"] = Case(all_used, call_scores, scores, ("hidden", "weight", "bias"))
CASES["engine coupled totals"] = Case(
    all_used,
    lambda x, **chunks: (
        Elements(**chunks)(Projection(x["hidden"], x["weight"], x["bias"]), {"target": x["target"]}).loss
    ),
    lambda x: scores(x)[0],
    ("hidden", "weight", "bias"),
)


# --- what is compared across calls -----------------------------------------------------------------------------------


def metrics_of(name: str, x: Tensors, ref_logps: Tensor | None = None, **chunks: Any) -> Tensors:
    """What a preference loss logs; of the reference's log-probabilities, or else of the reference."""
    case, batch = preference_zoo.CASES[name], batch_of(x)
    labels = {"preference_labels": batch.labels} if case.unpaired else {}
    reference = batch.reference() if ref_logps is None else {"ref_logps": ref_logps}
    given = {**labels, **reference, **case.arguments(batch)}
    return case.loss(**chunks)(batch.hidden, batch.weight, batch.target, bias=batch.bias, **given).metrics


def is_own_reference(x: Tensors) -> Tensors:
    return x | {f"ref_{name}": x[name].detach() for name in ("hidden", "weight", "bias")}
