"""How losses are called: heads, dtypes, LoRA terms, targets of the NLL, and what is refused before any work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from preference_zoo import CASES, IGNORE, Batch, Vectors, make_batch

import alignment as A
from alignment import functional as AF
from chunked_embed import FlexChunkLoss, linear_logps

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


def test_a_reference_of_another_vocabulary() -> None:
    """Padded to another size: log-probabilities of the same ids."""
    batch = make_batch(2)
    padded = torch.cat([batch.ref_weight, torch.randn(3, 4, dtype=torch.float64)])
    out = A.DPOLoss(0.2, **EAGER)(
        batch.hidden, batch.weight, batch.target, ref_hidden=batch.ref_hidden, ref_weight=padded
    )
    expected = logistic(batch.hidden @ batch.weight.T, batch.ref_hidden @ padded.T, batch.target, 0.2)
    torch.testing.assert_close(out.loss, expected)


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


def test_the_docstring_runs() -> None:
    import doctest

    from alignment import paired

    failed, tried = doctest.testmod(paired)
    assert tried and not failed


def test_one_step_is_compiled_for_all_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses share their token scores: what identifies a compiled step does not name the loss."""
    keys = []
    score = FlexChunkLoss._score

    def spy(self: FlexChunkLoss, call: Any, names: tuple[str, ...]) -> Any:
        keys.append(score(self, call, names).key)
        return score(self, call, names)

    monkeypatch.setattr(FlexChunkLoss, "_score", spy)
    batch = make_batch(2)
    for name in ("dpo_sigmoid", "dpo_aot", "orpo", "irpo", "bco", "kto", "fpo_js_live"):
        CASES[name].call(CASES[name].loss(**EAGER), batch)
    assert len(set(keys)) == 2  # the policy's statistics, and the reference's


REFUSED_OPTIONS = [
    (A.DPOLoss, {"beta": 0.0}, "beta"),
    (A.DPOLoss, {"beta": float("nan")}, "beta"),
    (A.DPOLoss, {"beta": "0.1"}, "beta"),
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
        "tdpo vocabulary": (
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
        return F.relu(x.given["margin"] - x.c / x.nc + x.r / x.nr)


def test_a_loss_of_ones_own() -> None:
    batch, margin = make_batch(3), torch.rand(3, dtype=torch.float64, requires_grad=True)
    out = Margin(**EAGER)(batch.hidden, batch.weight, batch.target, batch.bias, margin=margin)
    x = Vectors(batch)
    expected = F.relu(margin - x.c / x.nc + x.r / x.nr).mean()
    leaves = [*batch.leaves, margin]
    torch.testing.assert_close(out.loss, expected)
    for a, b in zip(torch.autograd.grad(out.loss, leaves), torch.autograd.grad(expected, leaves)):
        torch.testing.assert_close(a, b)


def test_no_tokens_at_all() -> None:
    batch = make_batch(2)
    with pytest.raises(ValueError, match="one token or more"):
        A.CPOLoss(**EAGER)(batch.hidden[:, :0], batch.weight, batch.target[:, :0])


def test_repr_says_what_it_is() -> None:
    assert "loss_type='ipo'" in repr(A.DPOLoss(loss_type="ipo")) and "beta=0.1" in repr(A.ORPOLoss())


def test_every_dpo_loss_type_is_documented() -> None:
    assert all(f"        {name} " in A.DPOLoss.__doc__ for name in AF.DPO_LOSSES)
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
