"""Random calls against plain autograd in float64: whatever the loss, its arguments and the way in which it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from random_calls import Draft, Tensors, arguments, drafts, engine_loss, plain

from chunked_embed import FlexChunkLoss
from chunked_embed.engine import compile as cache
from chunked_embed.engine import layout, products

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
    if draft.twice:  # what follows is a call of a known kind
        called(loss, draft, made)
    found, metrics = called(loss, draft, made)
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


def called(loss: FlexChunkLoss, draft: Draft, made: Tensors) -> tuple[dict, dict]:
    """-> values, metrics"""
    positional, named = arguments(draft, made)
    if draft.kind == "scores":
        return loss.scores(*positional, **named), {}
    output = loss(*positional, **named)
    return {"loss": output.loss}, output.metrics


def check_ways(draft: Draft, dtype: torch.dtype, autocast: bool) -> None:
    """The direct way and chunks give the same in fewer digits, too."""
    results = []
    for compiled in (None, False):
        made = Tensors.of(draft, dtype=torch.float32 if autocast else dtype)
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            found, metrics = called(engine_loss(draft, compiled), draft, made)
        grads = gradients(found, {name: torch.ones_like(value) for name, value in found.items()}, made.learning)
        results.append([*found.values(), *metrics.values(), *grads])
        names = [*found, *metrics]
    for n, (mine, theirs) in enumerate(zip(*results, strict=True)):
        what = names[n] if n < len(names) else f"gradient {n - len(names)}"
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape), what
        assert torch.equal(mine.isfinite(), theirs.isfinite()), what
        mine, theirs = (t.detach().double().nan_to_num(0, 0, 0) for t in (mine, theirs))
        assert (mine - theirs).norm() <= 2.5 * torch.finfo(dtype).eps * (theirs.norm() + 0.1), what


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


def run(
    request: pytest.FixtureRequest,
    compiled: bool | None,
    kinds: tuple[str, ...] = KINDS,
    how: Callable[[Draft], None] | None = None,
    **options,
) -> None:
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
        if how is None:
            check(draft, compiled, options.get("device", "cpu"))
        else:
            how(draft)

    every()


def test_direct(request):
    run(request, compiled=None, sample=60)


@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, False)]
)
def test_direct_in_half_precision(request, dtype, autocast):
    run(request, compiled=None, sample=25, how=partial(check_ways, dtype=dtype, autocast=autocast))


def test_chunked(request):
    run(request, compiled=False, sample=120)


@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, False)]
)
def test_rows_with_room(request, monkeypatch, dtype, autocast):
    """Chunks whose rows begin with whole vectors, and what is beyond them apart, as on a GPU; beside the direct way."""
    monkeypatch.setattr(products, "VECTORS", {"cpu": 8})
    monkeypatch.setattr(products, "FEWEST", 1)
    monkeypatch.setattr(layout, "FEWEST_WITH_ROOM", 1)
    monkeypatch.setattr(layout, "FEWEST_OUTPUTS", 1)
    run(request, compiled=None, sample=25, how=partial(check_ways, dtype=dtype, autocast=autocast))


def test_groups_of_several_chunks(request):
    def how(draft: Draft) -> None:
        check(replace(draft, chunk_size=1 + draft.seed % 3, max_chunk_bytes=None), compiled=False)

    run(request, compiled=False, kinds=("grouped",), how=how, sample=60)


def test_padded(request, monkeypatch):
    """Wide losses run in tiles of fixed sizes with a padded tail: here all do, traced and not fused."""
    monkeypatch.setattr("chunked_embed.engine.plan.NARROW", 0)
    monkeypatch.setattr(cache, "BACKEND", "eager")
    run(request, compiled=True, sample=8)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_compiled(request, kind):
    run(request, compiled=True, kinds=(kind,), sample=3)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [None, False, True])
def test_on_a_gpu(request, compiled):
    run(request, compiled, sample=6, device="cuda")
