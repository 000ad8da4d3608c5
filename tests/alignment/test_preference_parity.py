"""Every loss against TRL's own result or the plain formula, on the same logits: value, gradients and metrics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from preference_zoo import CASES, Batch, Case, make_batch

EAGER = {"compiled": False}


@pytest.fixture(autouse=True)
def _trl_where_needed(request: pytest.FixtureRequest) -> None:
    name = request.node.callspec.params.get("name") if hasattr(request.node, "callspec") else None
    if name is not None and CASES[name].trl:
        request.getfixturevalue("trl")


def grads(loss: torch.Tensor, batch: Batch) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, batch.leaves))


def expected(case: Case, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
    found = case.reference(batch)
    return found if isinstance(found, tuple) else (found, {})


def same(ours: Any, theirs: Any, rtol: float = 1e-9, atol: float = 1e-11) -> None:
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


@pytest.mark.parametrize("pairs", [4, 1])
@pytest.mark.parametrize("name", CASES)
def test_value_gradients_and_metrics(name: str, pairs: int) -> None:
    case, batch = CASES[name], make_batch(pairs, seed=3)
    out = case.call(case.loss(**EAGER), batch)
    loss, metrics = expected(case, batch)
    same(out.loss, loss, case.rtol)
    for ours, theirs in zip(grads(out.loss, batch), grads(loss, batch), strict=True):
        same(ours, theirs, case.rtol)
    assert all(not value.requires_grad for value in out.metrics.values())
    for key, value in metrics.items():
        if key in ("num_tokens", "aux_loss"):
            continue
        ours = out.metrics[key].double().mean()
        same(ours, torch.tensor(value, dtype=torch.float64), rtol=1e-6, atol=1e-7)  # TRL has some in float32


@pytest.mark.parametrize("name", CASES)
def test_chunks_change_nothing(name: str) -> None:
    """Chunks of a few rows split pairs (the recomputing way); of a dozen, take a pair or two."""
    case, batch = CASES[name], make_batch(5, seed=5)
    whole = case.call(case.loss(**EAGER), batch)
    wanted = grads(whole.loss, batch)
    for chunk_size in (2, 12):
        part = case.call(case.loss(**EAGER, chunk_size=chunk_size), batch)
        same(part.loss, whole.loss, 1e-12)
        for ours, theirs in zip(grads(part.loss, batch), wanted, strict=True):
            same(ours, theirs)
        for key, value in whole.metrics.items():
            same(part.metrics[key], value)


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.kind == "live" and not n.startswith("tdpo")])
def test_a_precomputed_reference_is_a_live_one(name: str) -> None:
    case, batch = CASES[name], make_batch(3, seed=7)
    loss = case.loss(**EAGER)
    live = case.call(loss, batch)
    options = {}
    if getattr(loss, "ld_alpha", None) is not None:
        rewards = torch.cat([live.metrics["rewards/chosen"], live.metrics["rewards/rejected"]])
        logps = torch.cat([live.metrics["logps/chosen"], live.metrics["logps/rejected"]])
        options["ref_logps"] = logps - rewards / loss.beta
    given = case.call(case.loss(**EAGER), batch, "given", **options)
    same(given.loss, live.loss)
    for ours, theirs in zip(grads(given.loss, batch), grads(live.loss, batch), strict=True):
        same(ours, theirs)
    for key, value in live.metrics.items():
        same(given.metrics[key], value)


@pytest.mark.parametrize("name", CASES)
def test_nothing_to_learn_from_is_a_differentiable_zero(name: str) -> None:
    case, batch = CASES[name], make_batch(2, lengths=[0, 0, 0, 0])
    batch.prompt_target = batch.target
    out = case.call(case.loss(**EAGER), batch)
    assert out.loss.item() == 0
    assert all(not g.any() for g in grads(out.loss, batch))
    assert all(value.isfinite().all() for value in out.metrics.values())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("lengths", [[0, 4, 3, 2], [2, 3, 0, 4], [0, 0, 1, 5], [0, 3, 0, 5]], ids=str)
def test_empty_completions_are_finite(name: str, lengths: list[int]) -> None:
    case, batch = CASES[name], make_batch(2, lengths=lengths)
    out = case.call(case.loss(**EAGER), batch)
    assert out.loss.isfinite()
    assert all(g.isfinite().all() for g in grads(out.loss, batch))
    assert all(value.isfinite().all() for value in out.metrics.values())
    if case.kind == "live" and "irpo" not in name and "sft" not in name and "mpo" not in name and "ld" not in name:
        loss, _ = expected(case, batch)
        same(out.loss, loss, case.rtol)


@pytest.mark.parametrize("name", CASES)
def test_extreme_margins_are_finite_in_float32(name: str) -> None:
    """Log-ratios of thousands, both ways."""
    case, batch = CASES[name], make_batch(4, seed=1, dtype=torch.float32, scale=200.0)
    out = case.call(case.loss(**EAGER), batch)
    assert out.loss.dtype == torch.float32 and out.loss.isfinite()
    assert all(g.isfinite().all() for g in grads(out.loss, batch))
    assert all(value.isfinite().all() for value in out.metrics.values())


@pytest.mark.parametrize("name", CASES)
def test_equal_log_probabilities(name: str) -> None:
    """The reference is the policy, and the completions are one and the same."""
    case, batch = CASES[name], make_batch(1, lengths=[3, 3])
    for ids in (batch.target, batch.prompt_target):
        ids[1] = ids[0]
    hidden = batch.hidden.detach().clone()
    hidden[1] = hidden[0]
    batch.hidden = hidden.requires_grad_()
    batch.ref_hidden, batch.ref_weight, batch.ref_bias = (x.detach() for x in batch.leaves)
    out = case.call(case.loss(**EAGER), batch)
    loss, _ = expected(case, batch)
    same(out.loss, loss, case.rtol)
    for ours, theirs in zip(grads(out.loss, batch), grads(loss, batch), strict=True):
        same(ours, theirs, case.rtol)


@pytest.mark.parametrize("name", ["dpo_sigmoid", "dpo_aot", "dpo_wpo", "orpo", "tdpo2", "bco"])
def test_upstream_gradient_frozen_head_and_no_grad(name: str) -> None:
    case, batch = CASES[name], make_batch(3)
    out = case.call(case.loss(**EAGER), batch)
    wanted = grads(out.loss, batch)
    for ours, theirs in zip(grads(3 * case.call(case.loss(**EAGER), batch).loss, batch), wanted, strict=True):
        same(ours, 3 * theirs)
    batch.weight.requires_grad_(False)
    batch.bias.requires_grad_(False)
    frozen = case.call(case.loss(**EAGER), batch)
    same(torch.autograd.grad(frozen.loss, batch.hidden)[0], wanted[0])
    with torch.no_grad():
        quiet = case.call(case.loss(**EAGER), batch)
    same(quiet.loss, out.loss.detach())
    assert not quiet.loss.requires_grad
    for key, value in out.metrics.items():
        same(quiet.metrics[key], value)


@pytest.mark.parametrize("name", ["dpo_sigmoid", "cpo", "tdpo2", "kto"])
def test_without_token_metrics(name: str) -> None:
    case, batch = CASES[name], make_batch(3)
    full, less = (case.call(case.loss(**EAGER, token_metrics=m), batch) for m in (True, False))
    same(less.loss, full.loss)
    assert set(full.metrics) - set(less.metrics) == {
        "entropy",
        "mean_token_accuracy",
        "logits/chosen",
        "logits/rejected",
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo_wpo", "tdpo2", "orpo", "kto", "dpo_aot", "bco"])
def test_compiled_steps_give_the_same(name: str) -> None:
    case, batch = CASES[name], make_batch(3)
    eager, compiled = (case.call(case.loss(compiled=c), batch) for c in (False, True))
    same(compiled.loss, eager.loss)
    for ours, theirs in zip(grads(compiled.loss, batch), grads(eager.loss, batch), strict=True):
        same(ours, theirs)
    for key, value in eager.metrics.items():
        same(compiled.metrics[key], value)


@pytest.mark.parametrize("name", ["dpo_mpo", "dpo_wpo", "dpo_ld", "dpo_aot", "orpo", "kto", "bco"])
def test_the_kernel_path_gives_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: statistics and gradient by the kernel pair (its plain twins), nothing compiled."""
    monkeypatch.setattr("chunked_embed.tokens.available", lambda device: True)
    monkeypatch.setattr("chunked_embed.engine.specialize.run", None)
    case, batch = CASES[name], make_batch(4, dtype=torch.float32)
    eager = case.call(case.loss(**EAGER), batch)
    wanted = grads(eager.loss, batch)
    for chunk_size in (None, 4):
        kernel = case.call(case.loss(compiled=True, chunk_size=chunk_size), batch)
        same(kernel.loss, eager.loss, 1e-5, 1e-6)
        for ours, theirs in zip(grads(kernel.loss, batch), wanted, strict=True):
            same(ours, theirs, 1e-4, 1e-5)
        for key, value in eager.metrics.items():
            same(kernel.metrics[key], value, 1e-5, 1e-5)
