"""How losses are called: heads, dtypes, LoRA terms, targets of the NLL, and what is refused before any work."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from preference_zoo import CASES, IGNORE, Batch, Vectors, make_batch

import alignment as A
from alignment import functional as AF
from chunked_embed import Head, linear_logps
from chunked_embed.checks import POSITIVE
from chunked_embed.engine.formula import Formula
from chunked_embed.fields import number

EAGER: dict[str, Any] = {"compiled": False}


def logistic(policy: torch.Tensor, reference: torch.Tensor, target: torch.Tensor, beta: float) -> torch.Tensor:
    """DPO from whole logits."""
    sums = [Vectors.pick(z.log_softmax(-1), target).sum(1) for z in (policy, reference)]
    c, r = (sums[0] - sums[1]).chunk(2)
    return -F.logsigmoid(beta * (c - r)).mean()


@pytest.mark.parametrize(
    "head",
    [{"logit_softcap": 2.0}, {"logit_scale": 0.3}, {"temperature": 1.7}, {"logit_softcap": 3.0, "logit_scale": 0.5}],
    ids=str,
)
@pytest.mark.parametrize("kind", ["dpo", "tdpo"])
def test_heads(head: dict[str, float], kind: str) -> None:
    """Soft-cap, scale and temperature, of policy and reference."""
    batch = make_batch(3)

    def transformed(z: torch.Tensor) -> torch.Tensor:
        z, cap = z * head.get("logit_scale", 1.0), head.get("logit_softcap")
        return (z if cap is None else cap * torch.tanh(z / cap)) / head.get("temperature", 1.0)

    z, zr = transformed(batch.logits()), transformed(batch.logits(reference=True))
    loss = A.DPOLoss(0.2, **head, **EAGER) if kind == "dpo" else A.TDPOLoss(0.2, kl_weight=0.0, **head, **EAGER)
    out = loss(batch.hidden, batch.weight, batch.target, batch.bias, **batch.reference())
    expected = logistic(z, zr, batch.target, 0.2)
    torch.testing.assert_close(out.loss, expected, rtol=1e-9, atol=0)
    for ours, theirs in zip(torch.autograd.grad(out.loss, batch.leaves), torch.autograd.grad(expected, batch.leaves)):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    used = batch.used
    log_p = z.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)[used].mean()
    torch.testing.assert_close(out.metrics["entropy"], entropy.detach())
    torch.testing.assert_close(out.metrics["logits/rejected"], z.mean(-1).detach()[3:][used[3:]].mean())


@pytest.mark.parametrize("kind", ["dpo", "tdpo", "kto", "bco", "orpo"])
def test_a_lora_adapter_on_the_head(kind: str) -> None:
    """Frozen head, trained adapter: gradients as through the merged weight."""
    batch = make_batch(3)
    weight = batch.weight.detach()
    down, up = torch.randn(2, 5, dtype=torch.float64), torch.randn(13, 2, dtype=torch.float64)
    leaves = [batch.hidden, down.requires_grad_(), up.requires_grad_()]
    loss: Any = {
        "dpo": A.DPOLoss,
        "tdpo": A.TDPOLoss,
        "kto": A.KTOLoss,
        "bco": A.BCOLoss,
        "orpo": A.ORPOLoss,
    }[kind](**EAGER)
    arguments: dict[str, Any] = {} if kind == "orpo" else batch.reference()
    if kind in ("kto", "bco"):
        arguments["preference_labels"] = batch.labels
    if kind == "kto":
        arguments["kl"] = torch.tensor(0.1)
    extra = ((batch.hidden @ down.T, 0.5 * up),)
    out = loss(batch.hidden, weight, batch.target, extra=extra, **arguments)
    again = type(loss)(**EAGER)
    merged = again(batch.hidden, weight + 0.5 * up @ down, batch.target, **arguments)
    torch.testing.assert_close(out.loss, merged.loss)
    for ours, theirs in zip(torch.autograd.grad(out.loss, leaves), torch.autograd.grad(merged.loss, leaves)):
        torch.testing.assert_close(ours, theirs)


def test_a_lora_adapter_of_the_reference() -> None:
    batch = make_batch(2)
    down, up = torch.randn(2, 4, dtype=torch.float64), torch.randn(13, 2, dtype=torch.float64)
    loss = A.DPOLoss(**EAGER)
    out = loss(
        batch.hidden,
        batch.weight,
        batch.target,
        ref_hidden=batch.ref_hidden,
        ref_weight=batch.ref_weight,
        ref_extra=((batch.ref_hidden @ down.T, up),),
    )
    merged = loss(
        batch.hidden,
        batch.weight,
        batch.target,
        ref_hidden=batch.ref_hidden,
        ref_weight=batch.ref_weight + up @ down,
    )
    torch.testing.assert_close(out.loss, merged.loss)


def test_the_reference_is_frozen() -> None:
    batch = make_batch(2)
    batch.ref_hidden.requires_grad_()
    batch.ref_weight.requires_grad_()
    loss = A.DPOLoss(**EAGER)
    loss(batch.hidden, batch.weight, batch.target, batch.bias, **batch.reference()).loss.backward()
    assert batch.ref_hidden.grad is None and batch.ref_weight.grad is None and batch.hidden.grad is not None


# --- heads -----------------------------------------------------------------------------------------------------------


def as_heads(batch: Batch, scale: float, ref_scale: float, cap: float | None = None) -> dict[str, Head]:
    policy = Head(batch.hidden, batch.weight, batch.bias, logit_scale=scale, logit_softcap=cap)
    reference = Head(batch.ref_hidden, batch.ref_weight, batch.ref_bias, logit_scale=ref_scale)
    return {"hidden": policy, "ref": reference}


@pytest.mark.parametrize("name", ["dpo_sigmoid", "dpo_aot", "tdpo2", "kto", "bco", "dpo_wpo"])
def test_heads_in_place_of_tensors(name: str) -> None:
    case, batch = CASES[name], make_batch(3)
    labels = {"preference_labels": batch.labels} if case.unpaired else {}
    arguments = {"target": batch.target, **labels, **case.arguments(batch)}
    loose = case.call(case.loss(**EAGER), batch)
    found = case.loss(**EAGER)(**as_heads(batch, 1.0, 1.0), **arguments)
    torch.testing.assert_close(found.loss, loose.loss)
    for key, value in loose.metrics.items():
        torch.testing.assert_close(found.metrics[key], value)
    ours, theirs = (torch.autograd.grad(out.loss, batch.leaves) for out in (found, loose))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["dpo", "tdpo"])
@pytest.mark.parametrize("scales", [(0.3, 0.3), (0.3, 1.7)])
def test_each_head_brings_its_scale_and_cap(kind: str, scales: tuple[float, float]) -> None:
    """The model's own, which ``causal_lm.check`` compared; policy and reference may differ."""
    batch = make_batch(3)
    loss = A.DPOLoss(0.2, **EAGER) if kind == "dpo" else A.TDPOLoss(0.2, kl_weight=0.0, **EAGER)
    heads = as_heads(batch, *scales, cap=2.0)
    z, zr = (head.logits() for head in heads.values())
    expected = logistic(z, zr.detach(), batch.target, 0.2)
    for _ in range(2):  # nothing of a head stays behind
        out = loss(**heads, target=batch.target)
        torch.testing.assert_close(out.loss, expected)
    ours, theirs = (torch.autograd.grad(v, batch.leaves) for v in (out.loss, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    loose = loss(batch.hidden, batch.weight, batch.target, batch.bias, **batch.reference())
    torch.testing.assert_close(loose.loss, logistic(batch.logits(), batch.logits(reference=True), batch.target, 0.2))
    assert (loss.logit_scale, loss.logit_softcap) == (1.0, None)


def test_a_head_beside_reference_log_probabilities() -> None:
    batch = make_batch(2)
    ref_logps = Vectors(batch).ref
    head = as_heads(batch, 0.5, 1.0)["hidden"]
    out = A.DPOLoss(0.2, **EAGER)(head, target=batch.target, ref_logps=ref_logps)
    picked = Vectors.pick(head.logits().log_softmax(-1), batch.target).sum(1)
    c, r = (picked - ref_logps).chunk(2)
    torch.testing.assert_close(out.loss, -F.logsigmoid(0.2 * (c - r)).mean())


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({"logit_scale": 0.3}, {}, "expected logit_scale of the head alone, got 0.5 there and 0.3 of DPOLoss"),
        ({"logit_softcap": 30.0}, {}, "expected logit_softcap of the head alone, got None there and 30.0 of DPOLoss"),
        ({}, {"weight": torch.zeros(13, 5)}, "a Head alone, and what follows it by keyword .*, got weight beside it"),
        ({}, {"extra": ((torch.zeros(1), torch.zeros(1)),)}, "expected a Head alone, .* got extra beside it"),
        ({}, {"ref": None}, "compares with a reference"),
        ({}, {"ref": None, "ref_hidden": torch.zeros(4, 9, 4), "ref_weight": torch.zeros(13, 4)}, "both in parts"),
        ({}, {"hidden": torch.zeros(4, 9, 5), "weight": torch.zeros(13, 5)}, "both in parts"),
        ({}, {"ref": torch.zeros(4, 9, 4)}, "expected ref to be a Head, got Tensor"),
        ({}, {"ref_logps": torch.zeros(4)}, "expected one reference, got both ref and ref_logps"),
    ],
)
def test_heads_that_are_refused(options: dict[str, Any], change: dict[str, Any], message: str) -> None:
    batch = make_batch(2, dtype=torch.float32)
    call = {**as_heads(batch, 0.5, 0.5), "target": batch.target, **change}
    with pytest.raises((TypeError, ValueError), match=message):
        A.DPOLoss(**options, **EAGER)(**call)


def test_a_loss_may_repeat_what_the_head_says() -> None:
    batch = make_batch(2)
    heads = as_heads(batch, 0.5, 0.5)
    plain, said = A.DPOLoss(**EAGER), A.DPOLoss(logit_scale=0.5, **EAGER)
    torch.testing.assert_close(*(loss(**heads, target=batch.target).loss for loss in (plain, said)))


# --- references, dtypes, targets -------------------------------------------------------------------------------------


def test_policy_and_reference_may_share_a_head() -> None:
    batch = make_batch(2)
    other = torch.randn_like(batch.hidden)
    out = A.DPOLoss(0.2, **EAGER)(batch.hidden, batch.weight, batch.target, ref_hidden=other, ref_weight=batch.weight)
    z, zr = batch.hidden @ batch.weight.T, (other @ batch.weight.T).detach()
    expected = logistic(z, zr, batch.target, 0.2)
    leaves = [batch.hidden, batch.weight]
    torch.testing.assert_close(out.loss, expected)
    for ours, theirs in zip(torch.autograd.grad(out.loss, leaves), torch.autograd.grad(expected, leaves)):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["dpo_sigmoid", "dpo_aot", "tdpo2", "orpo", "bco", "kto"])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    """Results are float32, gradients in the inputs' dtype and near those of float64."""
    case, batch = CASES[name], make_batch(3, scale=0.3)
    exact = torch.autograd.grad(case.call(case.loss(**EAGER), batch).loss, batch.leaves)
    for key, value in vars(batch).items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            setattr(batch, key, value.detach().to(dtype).requires_grad_(value.requires_grad))
    out = case.call(case.loss(**EAGER), batch)
    assert out.loss.dtype == torch.float32
    assert {value.dtype for value in out.metrics.values()} == {torch.float32}
    for ours, theirs in zip(torch.autograd.grad(out.loss, batch.leaves), exact):
        assert ours.dtype == dtype
        assert (ours.double() - theirs).norm() < 0.05 * theirs.norm()


def test_autocast() -> None:
    batch = make_batch(2, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = A.DPOLoss(**EAGER)(batch.hidden, batch.weight, batch.target, batch.bias, **batch.reference())
    out.loss.backward()
    assert out.loss.dtype == torch.float32 and batch.weight.grad.dtype == torch.float32
    exact = A.DPOLoss(**EAGER)(batch.hidden, batch.weight, batch.target, batch.bias, **batch.reference())
    torch.testing.assert_close(out.loss, exact.loss, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("seed", range(3))
def test_nll_target_may_be_any_part_of_the_chosen_sequence(seed: int) -> None:
    """Tokens of both, of the completion alone, of the NLL alone; rejected rows of it are not read."""
    batch = make_batch(3, seed=seed)
    g = torch.Generator().manual_seed(seed)
    ids = torch.where(batch.used, batch.target, torch.randint(0, 13, batch.target.shape, generator=g))
    nll_target = torch.where(torch.rand(ids.shape, generator=g) < 0.5, ids, IGNORE)
    nll_target[3:] = -7
    out = A.CPOLoss(0.2, **EAGER)(batch.hidden, batch.weight, batch.target, batch.bias, nll_target=nll_target)
    x = Vectors(batch)
    nll = x.mean_nll(nll_target)
    expected = nll - F.logsigmoid(0.2 * (x.c - x.r)).mean()
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(out.metrics["nll_loss"], nll.detach())
    for ours, theirs in zip(torch.autograd.grad(out.loss, batch.leaves), torch.autograd.grad(expected, batch.leaves)):
        torch.testing.assert_close(ours, theirs)


def test_slic_with_another_sequence() -> None:
    """``sft_logps`` brings its own gradient."""
    batch = make_batch(2)
    other, ids = torch.randn(2, 6, 5, dtype=torch.float64, requires_grad=True), torch.randint(0, 13, (2, 6))
    sft = linear_logps(other, batch.weight, ids, compiled=False).logps.sum(1)
    loss = A.SLiCLoss(50.0, alpha=0.3, **EAGER)
    out = loss(batch.hidden, batch.weight, batch.target, batch.bias, sft_logps=sft)
    x = Vectors(batch)
    theirs = Vectors.pick((other @ batch.weight.T).log_softmax(-1), ids).sum(1)
    expected = (F.relu(50 - x.c + x.r) - 0.3 * theirs).mean()
    leaves = [*batch.leaves, other]
    torch.testing.assert_close(out.loss, expected)
    for a, b in zip(torch.autograd.grad(out.loss, leaves), torch.autograd.grad(expected, leaves)):
        torch.testing.assert_close(a, b)


def test_dropped_tokens_are_never_read() -> None:
    """Prompt and padding may hold anything: NaN hidden states there change nothing."""
    batch = make_batch(3)
    loss = A.DPOLoss(**EAGER)
    clean = loss(batch.hidden, batch.weight, batch.target, **{**batch.reference(), "ref_bias": None})
    hidden = batch.hidden.detach().masked_fill(~batch.used[..., None], torch.nan).requires_grad_()
    ref = batch.ref_hidden.masked_fill(~batch.used[..., None], torch.nan)
    dirty = loss(hidden, batch.weight, batch.target, ref_hidden=ref, ref_weight=batch.ref_weight)
    torch.testing.assert_close(dirty.loss, clean.loss)
    dirty.loss.backward()
    assert not hidden.grad[~batch.used].any() and hidden.grad.isfinite().all()


def test_sums_over_pairs_accumulate() -> None:
    """Two halves of a batch, each at half weight, are the whole."""
    batch = make_batch(4)
    loss = A.DPOLoss(0.2, **EAGER)
    reference = batch.reference("given")["ref_logps"]
    whole = loss(batch.hidden, batch.weight, batch.target, batch.bias, ref_logps=reference).loss
    wanted = torch.autograd.grad(whole, batch.leaves)
    total = [torch.zeros_like(leaf) for leaf in batch.leaves]
    for rows in (torch.tensor([0, 1, 4, 5]), torch.tensor([2, 3, 6, 7])):
        half = loss(batch.hidden[rows], batch.weight, batch.target[rows], batch.bias, ref_logps=reference[rows])
        for sum_, g in zip(total, torch.autograd.grad(half.loss / 2, batch.leaves)):
            sum_ += g
    for ours, theirs in zip(total, wanted):
        torch.testing.assert_close(ours, theirs)


def test_attributes_may_change_between_calls() -> None:
    batch = make_batch(2)
    loss = A.DPOLoss(0.1, **EAGER)
    loss.beta = 0.5
    torch.testing.assert_close(CASES["dpo_sigmoid"].call(loss, batch).loss, logistic_of(batch, 0.5))
    loss.beta = -1.0
    with pytest.raises(ValueError, match="expected beta to be a positive"):
        CASES["dpo_sigmoid"].call(loss, batch)


def logistic_of(batch: Batch, beta: float) -> torch.Tensor:
    return logistic(batch.logits(), batch.logits(reference=True), batch.target, beta)


def of_width(batch: Batch, policy: int, reference: int) -> dict[str, Any]:
    weight, ref_weight = (
        torch.randn(v, w.shape[1], dtype=torch.float64)
        for v, w in zip((policy, reference), (batch.weight, batch.ref_weight))
    )
    return {"weight": weight, "ref_weight": ref_weight}


def test_padding_of_a_head() -> None:
    """Each model's probabilities are over its own vocabulary, as with ``ref_logps``. A KL is over what both have."""
    batch = make_batch(2)
    for sizes in ((60, 63), (63, 60)):
        heads = of_width(batch, *sizes)
        call = {"hidden": batch.hidden, "target": batch.target, "ref_hidden": batch.ref_hidden, **heads}
        z, zr = batch.hidden @ heads["weight"].T, batch.ref_hidden @ heads["ref_weight"].T
        torch.testing.assert_close(A.DPOLoss(0.2, **EAGER)(**call).loss, logistic(z, zr, batch.target, 0.2))
        found = A.TDPOLoss(0.2, kl_weight=0.0, **EAGER)(**call)
        torch.testing.assert_close(found.loss, logistic(z[..., :60], zr[..., :60], batch.target, 0.2))


@pytest.mark.parametrize("loss", [A.DPOLoss, A.TDPOLoss, A.KTOLoss])
def test_more_than_padding_is_another_vocabulary(loss: Any) -> None:
    batch = make_batch(2)
    batch.target[batch.target > 1] = 1
    call = {"hidden": batch.hidden, "target": batch.target, "ref_hidden": batch.ref_hidden, **of_width(batch, 9, 2)}
    unpaired = {"preference_labels": batch.labels, "kl": torch.zeros(())} if loss is A.KTOLoss else {}
    with pytest.raises(ValueError, match=r"policy and reference of one vocabulary.* got 9 and 2 tokens"):
        loss(**EAGER)(**call, **unpaired)


def test_plan() -> None:
    batch = make_batch(3)
    plan = A.DPOLoss(chunk_size=5, **EAGER).plan(
        batch.hidden, batch.weight, batch.target, **batch.reference() | {"ref_bias": None}
    )
    assert plan.used_rows == int(batch.used.sum()) < plan.rows == batch.target.numel()
    assert plan.chunk_rows == 5
    coupled = A.DPOLoss(loss_type="aot", chunk_size=5, **EAGER)
    assert coupled.plan(batch.hidden, batch.weight, batch.target, ref_logps=torch.zeros(6).double()).passes == 2


def test_plan_of_sequences() -> None:
    batch = make_batch(3)
    call = (batch.hidden, batch.weight, batch.target, batch.labels, batch.bias)
    plan = A.KTOLoss(chunk_size=5, **EAGER).plan(*call, **batch.reference(), kl=torch.zeros(()))
    assert plan.used_rows == int(batch.used.sum())


def test_one_step_is_compiled_for_all_losses() -> None:
    """Losses share their token scores: what identifies a compiled step does not name the loss."""
    names = ("dpo_sigmoid", "dpo_aot", "orpo", "irpo", "bco", "kto", "fpo_js_live")
    assert len({Formula.snapshot(CASES[name].loss()._engine).key for name in names}) == 1


REFUSED_OPTIONS = [
    (A.DPOLoss, {"beta": 0.0}, "beta"),
    (A.DPOLoss, {"beta": float("nan")}, "beta"),
    (A.DPOLoss, {"beta": "0.1"}, "beta"),
    (A.DPOLoss, {"beta": torch.nn.Parameter(torch.tensor(0.1))}, "beta"),
    (A.DPOLoss, {"beta": torch.tensor(0.1)}, "beta"),
    (A.DPOLoss, {"ignore_index": True}, "ignore_index"),
    (A.DPOLoss, {"ignore_index": -100.0}, "ignore_index"),
    (A.KTOLoss, {"ignore_index": "-100"}, "ignore_index"),
    (A.DPOLoss, {"temperature": 0}, "temperature"),
    (A.DPOLoss, {"logit_scale": "1"}, "logit_scale"),
    (A.DPOLoss, {"token_metrics": 1}, "token_metrics"),
    (A.DPOLoss, {"use_weighting": "yes"}, "use_weighting"),
    (A.DPOLoss, {"loss_weights": 1.0}, "loss_weights"),
    (A.DPOLoss, {"loss_weights": ["1"]}, "loss_weights"),
    (A.DPOLoss, {"max_chunk_bytes": 1e6}, "max_chunk_bytes"),
    (A.DPOLoss, {"betta": 1.0}, "betta"),
    (A.DPOLoss, {"loss_type": "sigmoidal"}, "loss_type"),
    (A.DPOLoss, {"loss_type": []}, "loss_type"),
    (A.DPOLoss, {"loss_type": None}, "loss_type"),
    (A.DPOLoss, {"loss_type": [["sigmoid"]]}, "loss_type"),
    (A.DPOLoss, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "loss_weights"),
    (A.DPOLoss, {"loss_weights": [float("inf")]}, "loss_weights"),
    (A.DPOLoss, {"loss_type": "exo_pair"}, "label_smoothing"),
    (A.DPOLoss, {"loss_type": "robust", "label_smoothing": 0.5}, "label_smoothing"),
    (A.DPOLoss, {"loss_type": "nca_pair", "f_divergence": "js"}, "f_divergence"),
    (A.DPOLoss, {"f_divergence": "kl"}, "f_divergence"),
    (A.DPOLoss, {"loss_type": ["aot"], "use_weighting": True}, "use_weighting"),
    (A.DPOLoss, {"ld_alpha": 1.5}, "ld_alpha"),
    (A.DPOLoss, {"label_smoothing": 0.1}, r"label_smoothing=0\.0, .*cdpo.*, got 0\.1"),
    (A.DPOLoss, {"loss_type": ["hinge", "sft"], "label_smoothing": 0.1}, "label_smoothing"),
    (A.DPOLoss, {"f_alpha": 0.9}, 'f_alpha=.*f_divergence="alpha"'),
    (A.DPOLoss, {"discopop_tau": 0.1}, "discopop_tau=.*discopop"),
    (A.TDPOLoss, {"loss_type": "tdpo1", "kl_weight": 0.9}, "kl_weight=.*tdpo2"),
    (A.FPOLoss, {"divergence_order": 0.3}, 'divergence_order=.*"alpha"'),
    (A.CPOLoss, {"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing=.*sigmoid"),
    (A.DPOLoss, {"logit_softcap": -1.0}, "softcap"),
    (A.DPOLoss, {"chunk_size": 0}, "chunk_size"),
    (A.DPOLoss, {"compiled": "no"}, "compiled"),
    (A.FPOLoss, {"divergence_order": 1}, "divergence_order"),
    (A.FPOLoss, {"divergence": "kl"}, "divergence"),
    (A.CPOLoss, {"loss_type": "simpo"}, "loss_type"),
    (A.TDPOLoss, {"loss_type": "tdpo3"}, "loss_type"),
    (A.SimPOLoss, {"gamma": float("inf")}, "gamma"),
    (A.KTOLoss, {"desirable_weight": -1.0}, "desirable_weight"),
    (A.BCOLoss, {"beta": True}, "beta"),
]


@pytest.mark.parametrize(("cls", "options", "name"), REFUSED_OPTIONS, ids=str)
def test_options_are_refused_at_construction(cls: Any, options: dict[str, Any], name: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"expected .*{name}"):
        cls(**options)


def refused_calls(b: Batch) -> dict[str, tuple[Any, dict[str, Any], str]]:
    call = {"hidden": b.hidden, "weight": b.weight, "target": b.target}
    given = {**call, "ref_logps": torch.zeros(4)}
    unpaired = {**given, "preference_labels": b.labels}
    dpo, kto, cpo = A.DPOLoss(**EAGER), A.KTOLoss(**EAGER), A.CPOLoss(**EAGER)
    odd = {"hidden": b.hidden[:3], "target": b.target[:3], "ref_logps": torch.zeros(3)}
    return {
        "flat hidden": (dpo, {**given, "hidden": b.hidden[0]}, "hidden of shape"),
        "odd batch": (dpo, {**given, **odd}, "hidden of pairs"),
        "width": (dpo, {**given, "weight": b.weight[:, 1:]}, "weight of shape"),
        "target": (dpo, {**given, "target": b.target[:, 1:]}, "target of shape"),
        "target dtype": (dpo, {**given, "target": b.target.double()}, "integers"),
        "no target": (dpo, {**given, "target": None}, "expected target to be a tensor, got None"),
        "list of targets": (dpo, {**given, "target": b.target.tolist()}, "expected target to be a tensor, got list"),
        "list of hidden states": (dpo, {**given, "hidden": b.hidden.tolist()}, "expected hidden to be a tensor"),
        "list of ref_logps": (dpo, {**call, "ref_logps": [0.0] * 4}, "expected ref_logps to be a tensor, got list"),
        "meta": (dpo, {**given, "hidden": b.hidden.to("meta")}, "expected hidden in memory"),
        "meta weight": (dpo, {**given, "weight": b.weight.to("meta")}, "expected weight on cpu, got meta"),
        "list of labels": (kto, {**unpaired, "preference_labels": [True] * 4, "kl": torch.zeros(())}, "to be a tensor"),
        "bias": (dpo, {**given, "bias": torch.zeros(3).double()}, r"expected bias of shape \(13,\), got \(3,\)"),
        "extra": (dpo, {**given, "extra": b.weight}, "expected extra to be a tuple"),
        "ref_extra": (dpo, {**call, **b.reference(), "ref_extra": ((b.hidden, b.weight[1:]),)}, r"ref_extra\[0\]\[1\]"),
        "number kl": (kto, {**unpaired, "kl": 0.5}, "expected kl to be a tensor, got float"),
        "ids": (dpo, {**given, "target": torch.where(b.used, 99, b.target)}, "target"),
        "no reference": (dpo, call, "ref_hidden and ref_weight, or ref_logps"),
        "two references": (dpo, {**given, "ref_hidden": b.ref_hidden, "ref_weight": b.ref_weight}, "both"),
        "no reference head": (dpo, {**call, "ref_hidden": b.ref_hidden}, "ref_weight"),
        "reference head alone": (dpo, {**given, "ref_weight": b.ref_weight}, "ref_hidden"),
        "reference width": (dpo, {**call, "ref_hidden": b.ref_hidden, "ref_weight": b.weight}, "ref_weight of shape"),
        "ref_logps": (dpo, {**call, "ref_logps": torch.zeros(2)}, "ref_logps of shape"),
        "nll_target": (dpo, {**given, "nll_target": b.target}, "nll_target"),
        "needless reference": (cpo, given, "no reference"),
        "other nll ids": (cpo, {**call, "nll_target": torch.where(b.used, (b.target + 1) % 13, -100)}, "agree"),
        "unknown vector": (dpo, {**given, "sft_logps": torch.zeros(2)}, "sft_logps"),
        "tdpo ref_logps": (A.TDPOLoss(**EAGER), given, "ref_logps"),
        "vocabulary": (
            A.TDPOLoss(**EAGER),
            {**call, "ref_hidden": b.ref_hidden, "ref_weight": b.ref_weight[1:]},
            "one vocabulary",
        ),
        "no kl": (kto, unpaired, "kl"),
        "vector kl": (kto, {**unpaired, "kl": torch.zeros(4)}, "kl"),
        "labels dtype": (kto, {**unpaired, "kl": torch.zeros(()), "preference_labels": b.labels.long()}, "bool"),
        "labels": (kto, {**unpaired, "kl": torch.zeros(()), "preference_labels": b.labels[1:]}, "preference_labels"),
        "no such number": (A.BCOLoss(**EAGER), {**unpaired, "kl": torch.zeros(())}, "kl"),
        "weights": (A.BCOLoss(**EAGER), {**unpaired, "sequence_weight": torch.ones(3)}, "sequence_weight"),
    }


@pytest.mark.parametrize("name", refused_calls(make_batch(2)))
def test_calls_are_refused(name: str) -> None:
    loss, arguments, message = refused_calls(make_batch(2))[name]
    with pytest.raises((ValueError, TypeError), match=message):
        loss(**arguments)


class Margin(A.PairLoss):
    """A loss of one's own is a function of a few vectors."""

    takes_reference = False
    takes_vectors = ("margin",)

    def pair_loss(self, x: A.PairScores) -> torch.Tensor:
        return F.relu(x.given["margin"] - x.chosen_mean + x.rejected_mean)


def test_a_loss_of_ones_own() -> None:
    batch, margin = make_batch(3), torch.rand(3, dtype=torch.float64, requires_grad=True)
    out = Margin(**EAGER)(batch.hidden, batch.weight, batch.target, batch.bias, margin=margin)
    x = Vectors(batch)
    expected = F.relu(margin - x.c / x.nc + x.r / x.nr).mean()
    leaves = [*batch.leaves, margin]
    torch.testing.assert_close(out.loss, expected)
    for a, b in zip(torch.autograd.grad(out.loss, leaves), torch.autograd.grad(expected, leaves)):
        torch.testing.assert_close(a, b)


class Smoothed(A.PairLoss):
    """Its numbers are fields: arguments, checks, ``repr`` and documentation."""

    takes_reference = False
    margin: float = number(0.5, POSITIVE, "least distance of the two")

    def pair_loss(self, x: A.PairScores) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return F.softplus(self.margin - x.chosen_mean + x.rejected_mean), {"spread": x.chosen - x.rejected}


def test_a_loss_of_ones_own_has_its_numbers_as_fields() -> None:
    batch, loss = make_batch(3), Smoothed(0.2, temperature=2.0, **EAGER)
    out = loss(batch.hidden, batch.weight, batch.target, batch.bias)
    log_p = (batch.logits() / 2).log_softmax(-1)
    c, r = (Vectors.pick(log_p, batch.target).sum(1) / batch.used.sum(1)).chunk(2)
    torch.testing.assert_close(out.loss, F.softplus(0.2 - c + r).mean())
    assert out.metrics["spread"].shape == (3,)
    assert repr(loss) == "Smoothed(margin=0.2, temperature=2.0, compiled=False)"
    assert "margin: least distance of the two; a positive, finite number." in Smoothed.__doc__
    assert [*inspect.signature(Smoothed).parameters][:2] == ["margin", "logit_scale"]
    with pytest.raises(ValueError, match="expected margin to be a positive, finite number, got 0"):
        Smoothed(0)


class Learning(Smoothed):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.tau = torch.nn.Parameter(torch.tensor(2.0))

    def pair_loss(self, x: A.PairScores) -> torch.Tensor:
        return F.softplus(self.tau * (x.rejected - x.chosen))


class Averaging(Smoothed):
    def pair_loss(self, x: A.PairScores) -> torch.Tensor:
        return F.softplus(x.rejected - x.chosen.mean())


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (Learning, r"expected what learns to be an argument .* got .*tau"),
        (Averaging, "a loss that couples the batch says so"),
        (A.PairLoss, "expected PairLoss to have a pair_loss"),
    ],
)
def test_a_loss_of_ones_own_that_would_go_wrong(loss: Any, message: str) -> None:
    batch = make_batch(2)
    with pytest.raises((ValueError, NotImplementedError), match=message):
        loss(**EAGER)(
            batch.hidden, batch.weight, batch.target, **({"ref_logps": torch.zeros(4)} if loss is A.PairLoss else {})
        )


def test_a_number_that_is_made_to_learn_is_refused() -> None:
    batch, loss = make_batch(2), A.CPOLoss(**EAGER)
    loss.beta = torch.nn.Parameter(torch.tensor(0.1))
    with pytest.raises(TypeError, match="expected beta to be a positive, finite number, got a parameter"):
        loss(batch.hidden, batch.weight, batch.target)


ARGUMENTS = {
    A.DPOLoss: "beta=0.1, loss_type='sigmoid', loss_weights=None, label_smoothing=0.0, f_divergence='reverse_kl', "
    "f_alpha=0.5, ld_alpha=None, use_weighting=False, discopop_tau=0.05",
    A.IRPOLoss: "beta=0.1, alpha=1.0",
    A.DPOPLoss: "beta=0.1, dpop_lambda=50.0",
    A.RDPOLoss: "beta=0.1, length_weight=0.01",
    A.TDPOLoss: "beta=0.1, loss_type='tdpo2', kl_weight=0.5",
    A.FPOLoss: "beta=2.0, gamma=0.5, divergence='js', divergence_order=0.1",
    A.CPOLoss: "beta=0.1, loss_type='sigmoid', alpha=1.0, label_smoothing=0.0",
    A.SimPOLoss: "beta=0.1, gamma=0.5, label_smoothing=0.0",
    A.CPOSimPOLoss: "beta=0.1, gamma=0.5, alpha=1.0, label_smoothing=0.0",
    A.AlphaPOLoss: "beta=0.1, gamma=0.5, reward_alpha=0.25, label_smoothing=0.0, *, alpha=0.0",
    A.ORPOLoss: "beta=0.1",
    A.SLiCLoss: "delta=1.0, alpha=0.1",
    A.TPOLoss: "beta=0.01, loss_type='sigmoid', alpha=1.0, label_smoothing=0.0, gamma=0.5",
    A.KTOLoss: "beta=0.1, loss_type='kto', desirable_weight=1.0, undesirable_weight=1.0",
    A.BCOLoss: "beta=0.1",
}


@pytest.mark.parametrize("cls", ARGUMENTS)
def test_arguments_in_order_with_their_defaults(cls: Any) -> None:
    own, options = [], []
    for p in inspect.signature(cls).parameters.values():
        if p.kind is p.KEYWORD_ONLY and "*" not in own and "*" in ARGUMENTS[cls]:
            own.append("*")
        (options if p.name in inspect.signature(A.PreferenceLoss).parameters else own).append(f"{p.name}={p.default!r}")
        assert p.kind is p.KEYWORD_ONLY or p.name not in inspect.signature(A.PreferenceLoss).parameters
    assert ", ".join(own) == ARGUMENTS[cls]
    assert options == [
        "logit_scale=1.0", "logit_softcap=None", "temperature=1.0", "ignore_index=-100", "token_metrics=True",
        "chunk_size=None", "max_chunk_bytes=None", "compiled=None", "float32_outputs=True",
    ]  # fmt: skip
    assert all(f"    {name}: " in cls.__doc__ for name in cls.fields if name not in A.PreferenceLoss.fields)


def test_prepare_plans_before_it_runs() -> None:
    batch = make_batch(2)
    loss = A.DPOLoss(0.2, **EAGER)
    call = loss.prepare(batch.hidden, batch.weight, batch.target, batch.bias, **batch.reference())
    loss.beta = 0.7  # of the next call
    assert call.plan.used_rows == int(batch.used.sum())
    torch.testing.assert_close(call.run().loss, logistic_of(batch, 0.2))
    assert inspect.signature(A.DPOLoss.forward).parameters == inspect.signature(A.DPOLoss.prepare).parameters
    assert "nll_target" in A.DPOLoss.forward.__doc__


@pytest.mark.parametrize("how", [copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))])
def test_copies_are_losses_of_their_own(how: Any) -> None:
    batch, loss = make_batch(2), A.BCOLoss(0.2, **EAGER)
    CASES["bco"].call(loss, batch)
    other = how(loss)
    CASES["bco"].call(other, batch)
    assert (loss.running_count.item(), other.running_count.item()) == (4, 8)
    assert not list(loss.children())


# --- what is reported ------------------------------------------------------------------------------------------------


def test_means_count_what_the_metrics_count() -> None:
    batch = make_batch(3)
    out = A.CPOLoss(**EAGER)(batch.hidden, batch.weight, batch.target, batch.bias, nll_target=batch.prompt_target)
    n, means, (c, r) = batch.used.sum(1), out.means, Vectors(batch).logps.chunk(2)
    log_p = batch.logits().log_softmax(-1)
    expected = {
        "logps/chosen": c.mean(),
        "rewards/margins": 0.1 * (c - r).mean(),
        "tokens/rejected": n[3:].double().mean(),
        "entropy": -(log_p.exp() * log_p).sum(-1)[batch.used].mean(),
        "logits/rejected": batch.logits().mean(-1)[3:][batch.used[3:]].mean(),
        "nll_loss": Vectors(batch).prompt_nll,
    }
    for name, value in expected.items():
        torch.testing.assert_close(means[name], value.detach())
    counted = {
        "entropy": n.sum(),
        "logits/chosen": n[:3].sum(),
        "mean_token_accuracy": n[:3].sum(),
        "nll_loss": (batch.prompt_target[:3] != IGNORE).sum(),
        "logps/chosen": 3,
    }
    assert {name: int(out.sums[name][1]) for name in counted} == {name: int(count) for name, count in counted.items()}


def test_means_of_sequences() -> None:
    batch = make_batch(3)
    out = CASES["apo_zero_unpaired"].call(A.KTOLoss(0.2, "apo_zero_unpaired", **EAGER), batch)
    x, chosen = Vectors(batch), batch.labels
    means = out.means
    torch.testing.assert_close(means["logps/chosen"], x.logps[chosen].mean().detach())
    torch.testing.assert_close(means["logps"], x.logps.mean().detach())
    torch.testing.assert_close(means["rewards/rejected"], 0.2 * (x.logps - x.ref)[~chosen].mean().detach())
    torch.testing.assert_close(means["tokens/rejected"], batch.used.sum(1)[~chosen].double().mean())
    assert means["count/chosen"] == chosen.sum() and out.sums["rewards/rejected"][1] == (~chosen).sum()


@pytest.mark.parametrize("name", ["dpo_sigmoid", "dpo_ipo", "dpo_hinge", "cpo", "dpo_aot", "simpo", "irpo"])
def test_an_infinite_loss_is_infinite(name: str) -> None:
    """A chosen token of probability zero: told as it is, not as a large number."""
    batch = make_batch(3, dtype=torch.float32)
    with torch.no_grad():
        batch.bias[batch.target[0][batch.used[0]][0]] = -torch.inf
    case = CASES[name]
    out = case.call(case.loss(**EAGER), batch)
    assert out.loss == torch.inf
    assert out.metrics["logps/chosen"][0] == -torch.inf


def test_no_tokens_at_all() -> None:
    batch = make_batch(2)
    with pytest.raises(ValueError, match="one token or more"):
        A.CPOLoss(**EAGER)(batch.hidden[:, :0], batch.weight, batch.target[:, :0])


def test_repr_says_what_it_is() -> None:
    assert "loss_type='ipo'" in repr(A.DPOLoss(loss_type="ipo")) and "beta=0.1" in repr(A.ORPOLoss())


def test_every_dpo_loss_type_is_documented() -> None:
    assert all(f"    {name} " in A.DPOLoss.__doc__ for name in AF.DPO_LOSSES)
    assert all(f"{name} " in A.FPOLoss.__doc__ for name in AF.FPO_DIVERGENCES)


def test_margins_of_long_completions_keep_their_digits():
    """Two sums of thousands of log-probabilities, whose difference counts: float32 would leave two digits of it."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 20_000, 4), 3 * torch.randn(50, 4)
    target = torch.randint(50, (2, 20_000))
    reference = (weight + 0.01 * torch.randn(50, 4), hidden)
    out = A.DPOLoss(compiled=False)(hidden, weight, target, ref_hidden=reference[1], ref_weight=reference[0])

    def logps(head):
        log_p = (hidden.double() @ head.double().T).log_softmax(-1)
        return log_p.gather(-1, target[..., None]).sum((1, 2))

    c, r = logps(weight) - logps(reference[0])
    assert out.metrics["rewards/margins"].item() == pytest.approx(0.1 * float(c - r), rel=1e-4)
