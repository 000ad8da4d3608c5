"""GRPO's losses and RLOO, beside TRL's own code and Liger's on whole logits, in float64."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import grpo_zoo as zoo
import pytest
import torch
from torch import Tensor

from alignment import DPOLoss, GRPOLoss, RLOOLoss
from chunked_embed import Head

pytest.importorskip("trl")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore::FutureWarning:trl"),
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
]


def mean(out: Any, name: str) -> float:
    """Over all that counts, as TRL logs it."""
    total, count = out.sums[name]
    return (total / count).item()


def logged(out: Any) -> dict[str, float]:
    """What TRL logs, by its names."""
    names = ("kl", "entropy", "cispo_clip_ratio", "policy_loss")
    found = {name: mean(out, name) for name in names if name in out.metrics}
    if "vespo/phi_seq" in out.metrics:
        found["vespo/phi_seq_mean"] = mean(out, "vespo/phi_seq")
    for side in ("low", "high", "region"):
        if (name := f"clip_ratio/{side}") in out.metrics:
            found[f"{name}_mean"] = mean(out, name)
            counts = (out.counts or {}).get(name, torch.ones(1))
            some = out.metrics[name][(counts > 0).expand_as(out.metrics[name])]
            found |= {f"{name}_min": some.min().item(), f"{name}_max": some.max().item()}
    return found


def assert_same(out: Any, expected: Tensor, logs: dict[str, float], x: zoo.Batch) -> None:
    torch.testing.assert_close(out.loss, expected, rtol=1e-10, atol=1e-12)
    leaves = list(x.leaves.values())
    wanted = torch.autograd.grad(expected, leaves)
    for mine, right in zip(torch.autograd.grad(out.loss, leaves), wanted, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-9, atol=1e-11)
    found = logged(out)
    for name, value in logs.items():
        if name != "entropy_coef":
            of_marks = "clip" in name  # which TRL has in float32
            assert found[name] == pytest.approx(value, rel=1e-6 if of_marks else 1e-9, abs=1e-12), name


def check(name: str, **how: Any) -> None:
    x = zoo.Batch()
    case, given = zoo.CASES[name]
    loss, arguments, call = zoo.ours(x, case, given, **how)
    assert_same(loss(*arguments, **call), *zoo.theirs(x, case, given), x)


@pytest.mark.parametrize("name", zoo.CASES)
def test_same_as_trl(name: str) -> None:
    check(name, chunk_size=4, compiled=False)


OTHER_WAYS = [(name, how) for name in zoo.CASES for how in ("direct", "1", "100")]
OTHER_WAYS += [(name, "compiled") for name in ("dapo", "grpo, sequences", "cispo, weights", "vespo", "sapo, entropy")]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "how"), OTHER_WAYS)
def test_same_as_trl_in_other_ways(name: str, how: str) -> None:
    options = {"direct": {}, "compiled": {"chunk_size": 8, "compiled": True}}
    check(name, **(options[how] if how in options else {"chunk_size": int(how), "compiled": False}))


@pytest.mark.parametrize("case", [{}, {"epsilon_low": 0.9, "epsilon_high": 3.0}])
@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("by_token", [True, False])
def test_rloo_is_trls(case: dict[str, Any], chunk_size: int | None, by_token: bool) -> None:
    x = zoo.Batch(drift=0.2)
    loss, arguments, call = zoo.rloo_ours(x, case, chunk_size=chunk_size, compiled=False)
    out = loss(*arguments, **call, old_logps=x.old_logps if by_token else (x.old_logps * x.mask).sum(1))
    assert_same(out, *zoo.rloo_theirs(x, case), x)


# --- Liger -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def liger() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("liger_kernel.chunked_loss.grpo_loss", exc_type=ImportError)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", zoo.TYPES)
def test_same_as_ligers_formula(kind: str, weighted: bool, liger: Any) -> None:
    """In float64, on log-probabilities of whole logits. (What luspo adds to its term Liger adds up over padding.)"""
    x = zoo.Batch()
    level = "sequence" if kind in ("luspo", "grpo") else "token"
    case: dict[str, Any] = {"loss_type": kind, "beta": 0.0 if kind == "luspo" else 0.1}
    case |= {"importance_sampling_level": level, "use_bias_correction_kl": kind == "dapo"}
    given = (*zoo.OLD, "importance_weights") if weighted and kind != "luspo" else zoo.OLD
    loss, arguments, call = zoo.ours(x, case, given, chunk_size=4, compiled=False)
    logps, _ = x.statistics()
    mask = x.mask.double()
    options = {"max_completion_length": zoo.MAX_LENGTH, "old_per_token_logps": x.old_logps}
    options |= {"vllm_is_ratio": x.importance_weights} if "importance_weights" in given else {}
    expected, _ = liger.LigerFusedLinearGRPOFunction.ppo_loss_fn(
        logps, mask, x.advantages, mask, ref_per_token_logps=x.ref_logps, **case, **options
    )
    out = loss(*arguments, **call)
    torch.testing.assert_close(out.loss, expected, rtol=1e-10, atol=1e-12)
    leaves = list(x.leaves.values())
    for mine, right in zip(*(torch.autograd.grad(v, leaves) for v in (out.loss, expected)), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", ["dapo", "luspo"])
def test_same_as_liger(kind: str, liger: Any) -> None:
    """Its whole loss, whose log-probabilities are float32: a head with a bias, a temperature."""
    x = zoo.Batch(torch.float32)
    level = "sequence" if kind == "luspo" else "token"
    options: dict[str, Any] = {"loss_type": kind, "importance_sampling_level": level, "temperature": 0.7}
    theirs = liger.LigerFusedLinearGRPOLoss(beta=0.0, compiled=False, use_ref_model=False, **options)
    leaves = list(x.leaves.values())
    given = {"bias": x.leaves["bias"], "old_per_token_logps": x.old_logps.float()}
    advantages = x.advantages.float()
    expected, *_ = theirs(leaves[0], leaves[1], x.ids, x.mask.long(), advantages, **given)
    out = GRPOLoss(**options, compiled=False)(*x.head, advantages, x.old_logps, bias=x.leaves["bias"])
    torch.testing.assert_close(out.loss, expected, rtol=1e-4, atol=1e-5)
    for mine, right in zip(*(torch.autograd.grad(v, leaves) for v in (out.loss, expected)), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-3, atol=1e-5)


# --- plans -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [4, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", zoo.CASES)
def test_products(name: str, chunk_size: int) -> None:
    """Three, unless the loss looks at other tokens one by one, or at several scores of sequences of 5 to 7 tokens."""
    case, given = zoo.CASES[name]
    loss, arguments, call = zoo.ours(zoo.Batch(), case, given, chunk_size=chunk_size, compiled=False)
    products = loss.plan(*arguments, **call).products
    coupled = loss.by_sequence or loss.loss_type == "vespo" or loss.off_policy_threshold is not None
    if loss.top_entropy_quantile < 1 or (coupled and "of_tokens" in given):
        assert products == 4
    elif not coupled or chunk_size == 8 or not (loss.beta or loss.entropy_coef):
        assert products == 3
    else:
        assert products == 4


# --- what it is on other batches -------------------------------------------------------------------------------------

KINDS = [
    {"loss_type": "dapo"},
    {"loss_type": "grpo", "importance_sampling_level": "sequence", "entropy_coef": 0.1},
    {"loss_type": "vespo"},
    {"loss_type": "bnpo", "top_entropy_quantile": 0.5},
]


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("case", KINDS)
def test_nothing_but_padding(case: dict[str, Any], chunk_size: int | None) -> None:
    x = zoo.Batch()
    x.target = torch.full_like(x.target, zoo.IGNORE)
    how: dict[str, Any] = {"chunk_size": chunk_size, "compiled": False}
    for loss in (GRPOLoss(**case, **how), RLOOLoss(**how)):
        out = loss(*x.head, x.advantages, bias=x.leaves["bias"])
        assert out.loss == 0
        assert all(not g.any() for g in torch.autograd.grad(out.loss, list(x.leaves.values())))
        assert all(value.isfinite().all() for value in out.metrics.values())


@pytest.mark.parametrize("name", ["dapo", "vespo, weights", "grpo, high entropies", "cispo, of tokens, sequences"])
def test_what_stands_at_padding_does_not_count(name: str) -> None:
    """Samplers leave NaN there, or nothing that a logarithm is made for."""
    x = zoo.Batch()
    case, given = zoo.CASES[name]
    expected = zoo.theirs(x, case, given)
    for tensor in ("old_logps", "ref_logps", "sampling_logps", "of_tokens", "importance_weights"):
        setattr(x, tensor, getattr(x, tensor).masked_fill(~x.mask, torch.nan))
    loss, arguments, call = zoo.ours(x, case, given, chunk_size=4, compiled=False)
    assert_same(loss(*arguments, **call), *expected, x)


@pytest.mark.parametrize("case", KINDS)
def test_far_ratios_are_finite(case: dict[str, Any]) -> None:
    x, shape = zoo.Batch(torch.float32), (zoo.B, zoo.T)
    for old in (-500.0, 0.0):
        loss = GRPOLoss(**case, beta=0.1, compiled=False)
        out = loss(*x.head, x.advantages, torch.full(shape, old), torch.full(shape, 200.0))
        grads = torch.autograd.grad(out.loss, [x.leaves["hidden"], x.leaves["weight"]])
        assert out.loss.isfinite() and all(g.isfinite().all() for g in grads)


def test_an_adapter_on_the_head_and_a_scale() -> None:
    x = zoo.Batch()
    down, up = torch.randn(2, zoo.H).double().requires_grad_(), torch.randn(zoo.V, 2).double().requires_grad_()
    hidden, weight, target = x.head
    loss, found = GRPOLoss("grpo", temperature=0.8, compiled=False, chunk_size=4), []
    plain = Head(hidden, weight + up @ down, logit_scale=0.5)
    for head in (Head(hidden, weight, extra=((hidden @ down.T, up),), logit_scale=0.5), plain):
        out = loss(head, target=target, advantages=x.advantages, old_logps=x.old_logps)
        found.append([out.loss, *torch.autograd.grad(out.loss, [hidden, weight, down, up])])
    for mine, right in zip(*found, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-12)


def test_numbers_that_change_count() -> None:
    x = zoo.Batch()
    loss = GRPOLoss("grpo", compiled=False, chunk_size=4)
    before = loss(*x.head, x.advantages, x.old_logps).loss
    for name, value in {"epsilon_high": 3.0, "epsilon_low": 0.9, "temperature": 2.0, "loss_type": "bnpo"}.items():
        setattr(loss, name, value)
        fresh = GRPOLoss(**{n: getattr(loss, n) for n in ("loss_type", "epsilon_low", "epsilon_high", "temperature")})
        now = loss(*x.head, x.advantages, x.old_logps).loss
        assert now != before
        torch.testing.assert_close(now, fresh(*x.head, x.advantages, x.old_logps).loss)
        before = now


def unlike_calls(kind: str) -> tuple[Any, str, list[Callable[[], Any]]]:
    """A loss, its method that sets the engine's options, and two calls for which those differ."""
    x = zoo.Batch()
    if kind == "grpo":
        loss = GRPOLoss("grpo", importance_sampling_level="sequence", compiled=False)
        return loss, "_settle_on", [lambda a=a: loss(*x.head, a, x.old_logps) for a in (x.advantages, x.of_tokens)]
    loss, ref_logps = DPOLoss(compiled=False), torch.zeros(4).double()
    heads = [Head(x.leaves["hidden"][:4], x.leaves["weight"], logit_scale=scale) for scale in (0.5, 2.0)]
    return loss, "_settle", [lambda h=h: loss(h, target=x.target[:4], ref_logps=ref_logps) for h in heads]


@pytest.mark.parametrize("kind", ["grpo", "dpo"])
def test_calls_of_unlike_kinds_in_two_threads(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, name, calls = unlike_calls(kind)
    expected = [call().loss for call in calls]
    found: list[Any] = [None, None]
    other = threading.Thread(target=lambda: found.__setitem__(1, calls[1]().loss))
    settle = getattr(loss, name)

    def interrupted(*arguments: Any) -> None:
        settle(*arguments)
        if not other.ident:
            other.start()
            other.join(0.3)

    monkeypatch.setattr(type(loss), name, lambda self, *arguments: interrupted(*arguments))
    found[0] = calls[0]().loss
    other.join()
    assert found == expected and found[0] != found[1]


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({}, {"advantages": None}, "expected advantages"),
        ({}, {"advantages": torch.ones(3)}, r"advantages of shape \(5,\) or \(5, 7\), got \(3,\)"),
        ({}, {"old_logps": torch.ones(5)}, r"old_logps of shape \(5, 7\)"),
        ({}, {"ref_logps": torch.ones(5, 7)}, "expected ref_logps if beta is above 0"),
        ({"beta": 0.1}, {}, "expected ref_logps if beta is above 0"),
        ({}, {"sampling_logps": torch.ones(5, 7)}, "nothing reads without off_policy_threshold"),
        ({"loss_type": "grpo"}, {"num_items": 3.0}, "expected no num_items"),
        ({"loss_type": "dapo"}, {"num_items": torch.ones(5)}, "expected num_items to be a positive number"),
        ({"loss_type": "vespo"}, {"num_items": -3}, "expected num_items to be a positive"),
        ({}, {"entropy_mask": len}, "expected no entropy_mask"),
        ({"top_entropy_quantile": 0.5}, {"entropy_mask": 0.5}, "expected entropy_mask to be callable"),
        (
            {"top_entropy_quantile": 0.5},
            {"entropy_mask": lambda e, used: used[0]},
            "entropy_mask returns of shape",
        ),
        ({"loss_type": "vespo"}, {"importance_weights": torch.ones(5, 1)}, "expected importance_weights of tokens"),
        ({}, {"target": torch.full((5, 7), 99)}, "in "),
        ({"loss_type": "dr_grpo"}, {}, "expected max_completion_length"),
        ({"loss_type": "ppo"}, {}, "loss_type to be one of"),
        ({"loss_type": "sapo", "epsilon_low": 0.3}, {}, "epsilon_low=0.2, which nothing reads"),
        ({"use_bias_correction_kl": True}, {}, "nothing reads without a beta above 0"),
        ({"loss_type": "cispo", "delta": 2.0}, {}, "delta=None, which nothing reads"),
    ],
)
def test_refusals(options: dict[str, Any], change: dict[str, Any], message: str) -> None:
    x = zoo.Batch()
    hidden, weight, target = x.head
    call = {"target": target, "advantages": x.advantages} | change
    with pytest.raises((TypeError, ValueError), match=message):
        GRPOLoss(**options, compiled=False)(hidden, weight, **call)


@pytest.mark.slow
def test_numbers_and_instances_share_compiled_steps() -> None:
    """A warning, an error here, comes with the third value for which a step is compiled anew."""
    hidden, head = torch.randn(4, 6, 8, requires_grad=True), torch.randn(30, 8)
    target, advantages = torch.randint(0, 30, (4, 6)), torch.randn(4)
    for n in range(4):
        loss = GRPOLoss("grpo", compiled=True, chunk_size=8, epsilon_low=0.1 + 0.01 * n, epsilon_high=0.3 - 0.01 * n)
        loss(hidden, head, target, advantages).loss.backward()
