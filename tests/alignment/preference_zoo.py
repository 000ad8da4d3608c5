"""Preference losses beside what others make of the same logits: TRL's own functions, or the formula written plainly.

A batch is whole logits on one side and hidden states with a head on the other. ``Case.reference`` takes the former and
knows nothing of chunks, segments or this package's functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import alignment as A

H, HR, V = 5, 4, 13
IGNORE = -100


@dataclass
class Batch:
    """``2B`` completions, chosen first, of unlike lengths behind prompts of unlike lengths."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    target: Tensor
    ref_hidden: Tensor
    ref_weight: Tensor
    ref_bias: Tensor
    prompt_target: Tensor  # target, and the prompt's tokens
    labels: Tensor  # (2B,) bool, for the unpaired
    scale: float = 1.0

    @property
    def leaves(self) -> list[Tensor]:
        return [self.hidden, self.weight, self.bias]

    @property
    def used(self) -> Tensor:
        return self.target != IGNORE

    def logits(self, reference: bool = False) -> Tensor:
        if reference:
            return self.ref_hidden @ self.ref_weight.T + self.ref_bias
        return self.hidden @ self.weight.T + self.bias

    def reference(self, how: str = "live") -> dict[str, Tensor]:
        if how == "none":
            return {}
        if how == "given":
            return {"ref_logps": Vectors(self).ref}
        return {"ref_hidden": self.ref_hidden, "ref_weight": self.ref_weight, "ref_bias": self.ref_bias}


def make_batch(
    pairs: int = 4,
    tokens: int = 9,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    lengths: list[int] | None = None,
    scale: float = 1.0,
) -> Batch:
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=g).to(dtype)

    n = 2 * pairs
    prompt = torch.randint(1, 3, (n, 1), generator=g)
    count = torch.randint(1, tokens - 2, (n, 1), generator=g) if lengths is None else torch.tensor(lengths)[:, None]
    place = torch.arange(tokens)
    ids = torch.randint(0, V, (n, tokens), generator=g)
    used = (place >= prompt) & (place < prompt + count)
    return Batch(
        hidden=(scale * randn(n, tokens, H)).requires_grad_(),
        weight=randn(V, H).requires_grad_(),
        bias=randn(V).requires_grad_(),
        target=torch.where(used, ids, IGNORE),
        ref_hidden=scale * randn(n, tokens, HR),
        ref_weight=randn(V, HR),
        ref_bias=randn(V),
        prompt_target=torch.where(place < prompt + count, ids, IGNORE),
        labels=torch.arange(n) % 3 != 1,
    )


class Vectors:
    """Everything that a formula may ask for, from whole logits by ordinary autograd."""

    def __init__(self, batch: Batch) -> None:
        z, zr = batch.logits(), batch.logits(reference=True).detach()
        self.used, self.target = batch.used, batch.target.clamp_min(0)
        self.log_p, self.log_r = z.log_softmax(-1), zr.log_softmax(-1)
        self.tokens = self.pick(self.log_p, batch.target)
        self.ref_tokens = self.pick(self.log_r, batch.target)
        self.ref = self.ref_tokens.sum(1)
        self.logps = self.tokens.sum(1)
        self.n = self.used.sum(1).to(z.dtype)
        self.c, self.r = self.logps.chunk(2)
        self.rc, self.rr = self.ref.chunk(2)
        self.nc, self.nr = self.n.clamp_min(1).chunk(2)
        self.lc, self.lr = self.c - self.rc, self.r - self.rr
        self.kc, self.kr = (
            torch.where(self.used, (self.log_r.exp() * (self.log_r - self.log_p)).sum(-1), 0.0).sum(1).chunk(2)
        )
        self.nll = self.mean_nll(batch.target)
        w = torch.exp((self.tokens - self.used * (2 * self.log_p).logsumexp(-1)).sum(1) / self.n.clamp_min(1)).detach()
        self.w = w.chunk(2)[0] * w.chunk(2)[1]
        self.prompt_nll = self.mean_nll(batch.prompt_target)

    @staticmethod
    def pick(log_p: Tensor, target: Tensor) -> Tensor:
        found = log_p.gather(-1, target.clamp_min(0)[..., None]).squeeze(-1)
        return torch.where(target != IGNORE, found, 0.0)

    def mean_nll(self, target: Tensor) -> Tensor:
        chosen = target.chunk(2)[0]
        return -self.pick(self.log_p.chunk(2)[0], chosen).sum() / (chosen != IGNORE).sum()


# --- TRL's own functions on our logits -------------------------------------------------------------------------------


class Accelerator:
    device = torch.device("cpu")

    def gather(self, x: Tensor) -> Tensor:
        return x

    gather_for_metrics = gather


class Outputs(SimpleNamespace):
    """What TRL's fused head returns: statistics of each token, zero where the label is ignored."""


class Policy(nn.Module):
    """What TRL asks of the policy besides its outputs."""

    is_gradient_checkpointing = False


def fake_model(batch: Batch, reference: bool) -> Callable[..., Outputs]:
    def run(**_: Any) -> Outputs:
        z = batch.logits(reference)
        log_p = z.log_softmax(-1)
        return Outputs(
            log_probs=Vectors.pick(log_p, batch.target),
            entropy=-(log_p.exp() * log_p).sum(-1),
            log_sum_sq_probs=(2 * log_p).logsumexp(-1),
            mean_logits=z.mean(-1),
            is_top1=z.argmax(-1) == batch.target,
        )

    return run


def trl_inputs(batch: Batch) -> dict[str, Tensor]:
    """TRL shifts: its token t + 1 is our target t."""
    ids = F.pad(batch.target.clamp_min(0), (1, 0))
    return {
        "input_ids": ids,
        "completion_mask": F.pad(batch.used.long(), (1, 0)),
        "attention_mask": torch.ones_like(ids),
    }


def trl_metrics() -> dict[str, Any]:
    class Lists(dict):
        def __missing__(self, key: str) -> list[float]:
            self[key] = []
            return self[key]

    return {"train": Lists()}


def trl_dpo(batch: Batch, loss_type: Any = "sigmoid", loss_weights: Any = None, **options: Any) -> tuple[Tensor, dict]:
    from trl import DPOTrainer

    types = [loss_type] if isinstance(loss_type, str) else list(loss_type)
    defaults = {"beta": 0.1, "label_smoothing": 0.0, "ld_alpha": None, "use_weighting": False}
    reference = fake_model(batch, True)

    class Model(nn.Module):
        def forward(self, **_: Any) -> Outputs:
            return reference()

    stub = SimpleNamespace(
        **{**defaults, **{k: v for k, v in options.items() if k in defaults}},
        model=Policy(),
        ref_model=Model(),
        accelerator=Accelerator(),
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        f_divergence_type=options.get("f_divergence", "reverse_kl"),
        f_alpha_divergence_coef=options.get("f_alpha", 0.5),
        loss_types=types,
        loss_weights=loss_weights or [1.0] * len(types),
        args=SimpleNamespace(discopop_tau=options.get("discopop_tau", 0.05), gradient_checkpointing_kwargs=None),
        _metrics=trl_metrics(),
        _total_train_tokens=0,
        _tp_size=1,
    )
    loss = DPOTrainer._compute_loss(stub, fake_model(batch, False), trl_inputs(batch), False)
    return loss, {k: v[-1] for k, v in stub._metrics["train"].items() if isinstance(v, list)}


def trl_kto(batch: Batch, kl: float, **options: Any) -> tuple[Tensor, dict]:
    from trl import KTOTrainer

    reference = fake_model(batch, True)

    class Model(nn.Module):
        def forward(self, **_: Any) -> Outputs:
            return reference()

    model, ref_model = fake_model(batch, False), Model()
    stub = SimpleNamespace(
        beta=options.get("beta", 0.1),
        loss_type=options.get("loss_type", "kto"),
        desirable_weight=options.get("desirable_weight", 1.0),
        undesirable_weight=options.get("undesirable_weight", 1.0),
        calculate_KL=options.get("loss_type", "kto") == "kto",
        model=Policy(),
        ref_model=ref_model,
        precompute_ref_logps=False,
        accelerator=Accelerator(),
        aux_loss_enabled=False,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        _compute_kl_logps=lambda m, b: torch.full((len(batch.labels),), kl if m is model else 0.0),
        _metrics=trl_metrics(),
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {**trl_inputs(batch), "label": batch.labels}
    loss = KTOTrainer._compute_loss(stub, model, inputs, False)
    return loss, {k: v[-1] for k, v in stub._metrics["train"].items() if isinstance(v, list)}


def shifted(batch: Batch) -> tuple[Tensor, Tensor]:
    return F.pad(batch.logits(), (0, 0, 0, 1)), F.pad(batch.target, (1, 0), value=IGNORE)


def trl_cpo(batch: Batch, loss_type: str, alpha: float, reward_alpha: float = 0.0, **options: Any) -> tuple:
    from trl.experimental.cpo import CPOTrainer

    numbers = {"beta": 0.1, "label_smoothing": 0.0, "simpo_gamma": 0.5, **options}
    stub = SimpleNamespace(loss_type=loss_type, alpha=reward_alpha, accelerator=Accelerator(), **numbers)
    logps = CPOTrainer.get_batch_logps(*shifted(batch), average_log_prob=loss_type in ("ipo", "simpo"))
    losses, chosen, rejected = CPOTrainer.cpo_loss(stub, *logps.chunk(2))
    loss = losses.mean()
    if alpha:
        loss = loss + alpha * F.cross_entropy(
            batch.logits().chunk(2)[0].flatten(0, 1), batch.target.chunk(2)[0].flatten()
        )
    return loss, pair_metrics(logps, chosen, rejected)


def trl_orpo(batch: Batch, beta: float) -> tuple[Tensor, dict]:
    from trl.experimental.orpo import ORPOTrainer

    stub = SimpleNamespace(beta=beta, accelerator=Accelerator())
    logps = ORPOTrainer.get_batch_logps(*shifted(batch), average_log_prob=True)
    # TRL casts to float32 in here, for half precision; the formula is what is compared.
    wide = [Float64(x) for x in logps.chunk(2)]
    losses, chosen, rejected, ratio, odds = ORPOTrainer.odds_ratio_loss(stub, *wide)
    nll = F.cross_entropy(batch.logits().chunk(2)[0].flatten(0, 1), batch.prompt_target.chunk(2)[0].flatten())
    metrics = pair_metrics(logps, chosen, rejected)
    return nll - losses.mean(), {**metrics, "log_odds_ratio": ratio.item(), "log_odds_chosen": odds.item()}


class Float64:
    """Stands in for a log-probability whose ``float()`` keeps float64."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def float(self) -> Tensor:
        return self.x


def pair_metrics(logps: Tensor, chosen: Tensor, rejected: Tensor) -> dict[str, float]:
    c, r = logps.detach().chunk(2)
    return {
        "logps/chosen": float(c.mean()),
        "logps/rejected": float(r.mean()),
        "rewards/chosen": float(chosen.detach().mean()),
        "rewards/rejected": float(rejected.mean()),
        "rewards/margins": float((chosen - rejected).mean()),
        "rewards/accuracies": float((chosen > rejected).double().mean()),
    }


# --- the table -------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    loss: Callable[..., A.DPOLoss]
    reference: Callable[[Batch], Any]  # a scalar, or that and metrics
    kind: str = "live"  # the reference model: live, or none
    trl: bool = False
    arguments: Callable[[Batch], dict[str, Any]] = field(default=lambda batch: {})
    unpaired: bool = False
    rtol: float = 1e-9

    def call(self, loss: Any, batch: Batch, how: str | None = None, **options: Any) -> Any:
        how = how or self.kind
        labels = {"preference_labels": batch.labels} if self.unpaired else {}
        arguments = {**labels, **batch.reference(how), **self.arguments(batch), **options}
        return loss(batch.hidden, batch.weight, batch.target, bias=batch.bias, **arguments)


CASES: dict[str, Case] = {}


def add_dpo(name: str, rtol: float = 1e-9, **options: Any) -> None:
    CASES[name] = Case(
        lambda **engine: A.DPOLoss(**options, **engine), lambda batch: trl_dpo(batch, **options), trl=True, rtol=rtol
    )


for loss_type in (name for name in A.functional.DPO_LOSSES if name != "cdpo"):  # which TRL lacks
    smoothing = {"exo_pair": 0.125, "robust": 0.1, "aot": 0.1, "aot_unpaired": 0.1}.get(loss_type, 0.0)
    # TRL's exo_pair has its label smoothing in float32.
    rtol = 1e-6 if loss_type == "exo_pair" else 1e-9
    add_dpo(f"dpo_{loss_type}", rtol, loss_type=loss_type, beta=0.3, label_smoothing=smoothing)
for divergence, theirs in (("forward_kl", "forward_kl"), ("js", "js_divergence")):
    for loss_type in ("sigmoid", "ipo", "discopop" if divergence == "js" else "hinge"):  # TRL's exp overflows
        CASES[f"dpo_{loss_type}_{divergence}"] = Case(
            lambda t=loss_type, d=divergence, **engine: A.DPOLoss(0.2, t, f_divergence=d, **engine),
            lambda batch, t=loss_type, d=theirs: trl_dpo(batch, t, beta=0.2, f_divergence=d),
            trl=True,
        )
mpo: dict[str, Any] = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}
add_dpo("dpo_mpo", **mpo)
add_dpo("dpo_ld", ld_alpha=0.4, loss_type=["sigmoid", "ipo", "sft", "aot"])
add_dpo("dpo_wpo", use_weighting=True, loss_type=["sigmoid", "apo_zero"], loss_weights=[1.0, 0.5])
add_dpo("dpo_wpo_ld", use_weighting=True, ld_alpha=0.3)


def formula(
    loss: Callable[..., Any], reference: Callable[[Vectors], Tensor], kind: str = "live", **options: Any
) -> Case:
    return Case(loss, lambda batch: reference(Vectors(batch)), kind, **options)


def alpha_divergence(x: Tensor, a: float) -> Tensor:
    return (x.exp() ** (a - 1) - 1) / (a - 1)


def fpo_reference(x: Vectors, name: str, scores: str) -> Tensor:
    b, gamma, a = 0.7, 0.4, 0.3
    s = (x.lc, x.lr) if scores == "live" else (x.c / x.nc, x.r / x.nr)
    p = torch.stack([b * (s[0] - gamma / b), b * s[1]]).softmax(0)
    q = torch.tensor([1.0, math.exp(-10)], dtype=p.dtype)[:, None]
    u, m = p / q, (p + q) / 2
    values = {
        "dpo": q * -u.log(),
        "exo": q * u * u.log(),
        "js": 0.5 * p * (p / m).log() + 0.5 * q * (q / m).log(),
        "jeffreys": (p - q) * (p.log() - q.log()),
        "squared_hellinger": (p.sqrt() - q.sqrt()) ** 2,
        "alpha": q * (u ** (1 - a) - (1 - a) * u - a) / (a * (a - 1)),
        "total_variation": 0.5 * (p - q).abs(),
        "chi_squared": (p - q) ** 2 / q,
    }
    return values[name].sum(0).mean()


def cdpo(x: Vectors) -> Tensor:
    z = 0.2 * (x.lc - x.lr)
    return (-0.9 * F.logsigmoid(z) - 0.1 * F.logsigmoid(-z)).mean()


def bco_reference(batch: Batch) -> Tensor:
    x = Vectors(batch)
    reward = 0.2 * (x.logps - x.ref)
    z = reward - reward.detach().mean()
    return torch.where(batch.labels, -F.logsigmoid(z), -F.logsigmoid(-z)).mean()


def with_prompt(batch: Batch) -> dict[str, Tensor]:
    return {"nll_target": batch.prompt_target}


def mean_logistic(z: Tensor) -> Tensor:
    return -F.logsigmoid(z).mean()


CASES |= {
    # TRL's own fails here: it multiplies an expanded tensor in place.
    "dpo_wpo_sft": formula(
        lambda **e: A.DPOLoss(0.2, ["sft", "sigmoid"], [0.5, 1.0], use_weighting=True, **e),
        lambda x: (x.w * (0.5 * x.nll - F.logsigmoid(0.2 * (x.lc - x.lr)))).mean(),
    ),
    "dpo_smoothed": formula(lambda **e: A.DPOLoss(0.2, "cdpo", label_smoothing=0.1, **e), cdpo),
    "dpo_alpha": formula(
        lambda **e: A.DPOLoss(0.2, f_divergence="alpha", f_alpha=0.6, **e),
        lambda x: mean_logistic(0.2 * (alpha_divergence(x.lc, 0.6) - alpha_divergence(x.lr, 0.6))),
    ),
    "dpo_alpha_one": formula(
        lambda **e: A.DPOLoss(0.2, f_divergence="alpha", f_alpha=1.0, **e),
        lambda x: mean_logistic(0.2 * (x.lc - x.lr)),
    ),
    "irpo": formula(
        lambda **e: A.IRPOLoss(0.2, alpha=0.7, **e),
        lambda x: mean_logistic(0.2 * (x.lc - x.lr)) - 0.7 * (x.c / x.nc).mean(),
    ),
    "dpop": formula(
        lambda **e: A.DPOPLoss(0.2, dpop_lambda=3.0, **e),
        lambda x: mean_logistic(0.2 * (x.lc - x.lr - 3 * F.relu(x.rc - x.c))),
    ),
    "rdpo": formula(
        lambda **e: A.RDPOLoss(0.2, length_weight=0.3, **e),
        lambda x: mean_logistic(0.2 * (x.lc - x.lr) + 0.3 * -x.n.view(2, -1).diff(dim=0)[0]),
    ),
    "tdpo1": formula(
        lambda **e: A.TDPOLoss(0.2, "tdpo1", **e), lambda x: mean_logistic(0.2 * (x.lc - x.lr - (x.kr - x.kc)))
    ),
    "tdpo2": formula(
        lambda **e: A.TDPOLoss(0.2, kl_weight=0.6, **e),
        lambda x: mean_logistic(0.2 * (x.lc - x.lr - 0.6 * (x.kr - x.kc.detach()))),
    ),
    "slic": formula(
        lambda **e: A.SLiCLoss(30.0, alpha=0.3, **e),
        lambda x: F.relu(30 - x.c + x.r).mean() - 0.3 * x.c.mean(),
        "none",
    ),
    "cpo_prompt": formula(
        lambda **e: A.CPOLoss(0.2, alpha=0.5, **e),
        lambda x: mean_logistic(0.2 * (x.c - x.r)) + 0.5 * x.prompt_nll,
        "none",
        arguments=with_prompt,
    ),
    "simpo_cpo_prompt": formula(
        lambda **e: A.CPOSimPOLoss(2.0, 0.3, alpha=0.5, **e),
        lambda x: mean_logistic(2 * (x.c / x.nc - x.r / x.nr) - 0.3) + 0.5 * x.prompt_nll,
        "none",
        arguments=with_prompt,
    ),
    "cpo": Case(
        lambda **e: A.CPOLoss(0.2, label_smoothing=0.1, **e),
        lambda b: trl_cpo(b, "sigmoid", 1.0, beta=0.2, label_smoothing=0.1),
        "none",
        True,
    ),
    "cpo_hinge": Case(
        lambda **e: A.CPOLoss(0.2, "hinge", **e), lambda b: trl_cpo(b, "hinge", 1.0, beta=0.2), "none", True
    ),
    "cpo_ipo": Case(lambda **e: A.CPOLoss(0.2, "ipo", **e), lambda b: trl_cpo(b, "ipo", 1.0, beta=0.2), "none", True),
    "simpo": Case(
        lambda **e: A.SimPOLoss(2.0, 0.3, 0.1, **e),
        lambda b: trl_cpo(b, "simpo", 0.0, beta=2.0, simpo_gamma=0.3, label_smoothing=0.1),
        "none",
        True,
    ),
    "cpo_simpo": Case(
        lambda **e: A.CPOSimPOLoss(2.0, 0.3, alpha=0.7, **e),
        lambda b: trl_cpo(b, "simpo", 0.7, beta=2.0, simpo_gamma=0.3),
        "none",
        True,
    ),
    "alphapo": Case(
        lambda **e: A.AlphaPOLoss(2.0, 0.3, reward_alpha=0.4, **e),
        lambda b: trl_cpo(b, "simpo", 0.0, 0.4, beta=2.0, simpo_gamma=0.3),
        "none",
        True,
    ),
    "alphapo_zero": Case(
        lambda **e: A.AlphaPOLoss(2.0, 0.3, reward_alpha=0.0, **e),
        lambda b: trl_cpo(b, "simpo", 0.0, beta=2.0, simpo_gamma=0.3),
        "none",
        True,
    ),
    "orpo": Case(lambda **e: A.ORPOLoss(0.3, **e), lambda b: trl_orpo(b, 0.3), "none", True, arguments=with_prompt),
    "kto": Case(
        lambda **e: A.KTOLoss(0.2, desirable_weight=1.3, undesirable_weight=0.7, **e),
        lambda b: trl_kto(b, 0.5, beta=0.2, desirable_weight=1.3, undesirable_weight=0.7),
        trl=True,
        arguments=lambda b: {"kl": torch.tensor(0.5)},
        unpaired=True,
    ),
    "kto_negative_kl": Case(
        lambda **e: A.KTOLoss(0.2, **e),
        lambda b: trl_kto(b, -0.5, beta=0.2),
        trl=True,
        arguments=lambda b: {"kl": torch.tensor(-0.5)},
        unpaired=True,
    ),
    "apo_zero_unpaired": Case(
        lambda **e: A.KTOLoss(0.2, "apo_zero_unpaired", desirable_weight=1.3, **e),
        lambda b: trl_kto(b, 0.5, loss_type="apo_zero_unpaired", beta=0.2, desirable_weight=1.3),
        trl=True,
        unpaired=True,
    ),
    "bco": Case(lambda **e: A.BCOLoss(0.2, **e), bco_reference, unpaired=True),
}
for divergence in A.functional.FPO_DIVERGENCES:
    order = {"divergence_order": 0.3} if divergence == "alpha" else {}
    for kind in ("live", "none"):
        CASES[f"fpo_{divergence}_{kind}"] = formula(
            lambda d=divergence, o=order, **e: A.FPOLoss(0.7, 0.4, d, **o, **e),
            lambda x, d=divergence, k=kind: fpo_reference(x, d, k),
            kind,
        )
