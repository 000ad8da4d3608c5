"""Random calls against plain autograd in float64: whatever the loss, its arguments and the way in which it runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from random_calls import Draft, Tensors, arguments, drafts, engine_loss, plain

from chunked_embed.engine import compile as cache

KINDS = ("row-wise", "grouped", "coupled", "scores")


@pytest.fixture(autouse=True)
def fresh_steps() -> Iterator[None]:
    cache.clear()
    yield
    cache.clear()


def check(draft: Draft, compiled: bool | None, device: str = "cpu") -> None:
    """Values, metrics and all gradients of one call."""
    cache.clear()  # dynamo gives up on a step that is called in more than eight ways
    made = Tensors.of(draft, device)
    loss = engine_loss(draft, compiled)
    positional, named = arguments(draft, made)
    if draft.kind == "scores":
        found, metrics = loss.scores(*positional, **named), {}
    else:
        output = loss(*positional, **named)
        found, metrics = {"loss": output.loss}, output.metrics
    expected = plain(draft, made)
    assert_close(found, expected.values, "value")
    assert_close(metrics, expected.metrics, "metric")
    assert not any(metric.requires_grad for metric in metrics.values())
    learning = made.learning
    generator = torch.Generator().manual_seed(draft.seed)
    upstream = {
        name: draft.upstream * torch.randn(value.shape, generator=generator, dtype=torch.float64).to(device)
        for name, value in expected.values.items()
    }
    for round in range(2 if draft.twice else 1):  # of a graph that is kept, more than once
        mine = gradients(found, upstream, learning)
        theirs = gradients(expected.values, upstream, learning)
        for n, (got, wanted) in enumerate(zip(mine, theirs, strict=True)):
            torch.testing.assert_close(
                got, wanted, rtol=1e-8, atol=1e-9, msg=lambda m, n=n, r=round: f"gradient {n}, backward {r}: {m}"
            )
        upstream = {name: 3 * value for name, value in upstream.items()}


def gradients(values: dict, upstream: dict, leaves: list) -> list[torch.Tensor]:
    """Zero where nothing depends on a leaf, or nothing requires grad."""
    used = [name for name, value in values.items() if value.requires_grad]
    found: tuple = (None,) * len(leaves)
    if used and leaves:
        outputs, grads = [values[name] for name in used], [upstream[name] for name in used]
        found = torch.autograd.grad(outputs, leaves, grads, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(leaf) if grad is None else grad for grad, leaf in zip(found, leaves, strict=True)]


def assert_close(found: dict, expected: dict, what: str) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        value = value.detach()
        torch.testing.assert_close(
            found[name].detach(), value, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{what} {name!r}: {m}"
        )


def run(request: pytest.FixtureRequest, compiled: bool | None, kinds: tuple[str, ...] = KINDS, **options) -> None:
    """``--examples N`` draws N calls anew; without it the same few are drawn every time."""
    wanted = request.config.getoption("--examples")

    @settings(
        max_examples=wanted or options["sample"],
        derandomize=not wanted,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(drafts(kinds, chunked=compiled is not None))
    def every(draft: Draft) -> None:
        check(draft, compiled, options.get("device", "cpu"))

    every()


def test_direct(request):
    run(request, compiled=None, sample=60)


def test_chunked(request):
    run(request, compiled=False, sample=120)


def test_padded(request, monkeypatch):
    """Wide losses run in tiles of fixed sizes with a padded tail: here all do, traced and not fused."""
    monkeypatch.setattr("chunked_embed.engine.plan.NARROW", 0)
    monkeypatch.setattr(cache, "BACKEND", "eager")
    run(request, compiled=True, sample=20)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_compiled(request, kind):
    run(request, compiled=True, kinds=(kind,), sample=3)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [None, False, True])
def test_on_a_gpu(request, compiled):
    run(request, compiled, sample=6, device="cuda")
