"""The plan says what will happen, and it does: chunks, products, and the peak of memory."""

from __future__ import annotations

import pytest
import torch
from engine_zoo import CASES, CrossEntropy, make

from chunked_embed import FlexChunkLoss, Projection, TokenStatistics
from chunked_embed import functional as CF
from chunked_embed.engine import plan as plans
from chunked_embed.engine.plan import ladder, tiles


def peak_on_cpu(function):
    """Bytes above the start at the worst moment, from the allocator's own events."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        function()
    events = profile.profiler.kineto_results.events()
    memory = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    level = peak = 0
    for _, n in memory:
        level += n
        peak = max(peak, level)
    return peak


def peak_on_cuda(function):
    torch.cuda.synchronize()
    start = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    return torch.cuda.max_memory_allocated() - start


class NLL(TokenStatistics):
    def loss_fn(self, scores, groups):
        return -scores["logps"][:, 0]


COLUMNS = 20_000 if torch.cuda.is_available() else 5_000  # more take a CPU seconds
SHAPES = {  # loss, rows, hidden, columns; of how many rows one is used, rows of a segment
    "one chunk": (CrossEntropy, 256, 64, 4500, 1, None),
    "many chunks": (CrossEntropy, 2048, 64, 4500, 1, None),
    "rows of no whole vectors": (CrossEntropy, 2048, 515, 4500, 1, None),
    "grouped": (NLL, 1024, 64, 4500, 1, None),
    "long groups": (NLL, 2048, 64, 4500, 1, 1024),
    "few rows of many": (CrossEntropy, 40_000, 256, COLUMNS, 20, None),
}


def call(name, device, dtype, **options):
    make_loss, m, h, v, dropped, length = SHAPES[name]
    hidden = torch.randn(m, h, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(v, h, device=device, dtype=dtype, requires_grad=True)
    target = torch.where(torch.arange(m) % dropped == 0, torch.randint(0, v, (m,)), -100).to(device)
    loss = make_loss(**options)
    arguments = (Projection(hidden, weight), {"target": target})
    named = {} if length is None else {"segments": torch.arange(m, device=device) // length}

    def run():
        loss(*arguments, **named).loss.backward()
        hidden.grad = weight.grad = None

    return loss.plan(*arguments, **named), run


@pytest.mark.parametrize("name", list(SHAPES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_promised_peak_uncompiled(name, dtype):
    plan, run = call(name, "cpu", dtype, compiled=False, max_chunk_bytes=48 << 20)
    peak = peak_on_cpu(run)
    assert 0.4 * plan.peak_bytes < peak < 1.1 * plan.peak_bytes, (peak / plan.peak_bytes, str(plan))


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(SHAPES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiled", [True, False])
def test_promised_peak_on_a_gpu(name, dtype, compiled):
    plan, run = call(name, "cuda", dtype, compiled=compiled, max_chunk_bytes=48 << 20)
    run()
    run()
    peak = peak_on_cuda(run)
    low = 0.85 if compiled else 0.4
    assert low * plan.peak_bytes < peak < 1.1 * plan.peak_bytes, (peak / plan.peak_bytes, str(plan))


def test_identity_losses_hold_scores_and_gradients_only():
    a, b = (torch.randn(20_000, 64, requires_grad=True) for _ in range(2))
    labels = torch.rand(20_000)

    def run():
        a.grad = b.grad = None
        CF.cosent(a, b, labels).backward()

    run()
    gradients = 2 * a.numel() * 4
    assert peak_on_cpu(run) < 2.5 * gradients


def test_a_plan_can_be_printed_before_running():
    x = make("preference")
    loss = CASES["preference"].loss(chunk_size=8)
    sides = {"policy": Projection(x["hidden"], x["weight"]), "reference": Projection(x["other"], x["other_weight"])}
    ids = torch.arange(23) // 3 * 2 + torch.arange(23) % 2
    segments, groups = torch.where(ids > 13, -1, ids), {"shift": torch.zeros(7, dtype=torch.float64)}
    plan = loss.plan(sides, {"target": x["target"]}, segments=segments, groups=groups)
    text = str(plan)
    assert plan.used_rows == 21 and plan.chunk_rows == 8
    assert plan.passes == 1 and plan.products == 4  # policy: outputs and two gradients; reference: outputs
    for word in ("21 of 23 used", "up to 8 rows", "4 matrix products", "peak"):
        assert word in text


@pytest.mark.parametrize(
    ("name", "learns", "products", "with_few_outputs"),
    [
        ("cross_entropy", ["hidden", "weight"], 3, 3),
        ("cross_entropy", ["hidden"], 2, 2),
        ("cross_entropy", ["weight"], 2, 2),
        ("cross_entropy", [], 1, 1),
        ("two_sided", ["hidden", "positive"], 4, 3),
        ("ranked", ["hidden", "positive", "weight"], 8, 6),
        ("ranked_dense", ["hidden", "positive", "weight"], 6, 6),
        ("identity", ["hidden", "positive"], 0, 0),
    ],
)
@pytest.mark.parametrize("few", [False, True])
def test_products_per_chunk(name, learns, products, with_few_outputs, few, monkeypatch):
    if not few:
        monkeypatch.setattr(plans, "DIRECT_BYTES", {})
    x = {key: t.detach() for key, t in make(name).items()}
    for key in learns:
        x[key].requires_grad_()
    seen = []

    class Spy(CASES[name].loss):
        def forward(self, *args, **kwargs):
            seen.append(self.plan(*args, **kwargs))
            return super().forward(*args, **kwargs)

    CASES[name].call(Spy(compiled=False), x)
    assert seen[0].products == (with_few_outputs if few else products)


def test_chunk_rows_follow_the_budget():
    x = Projection(torch.randn(100_000, 4), torch.randn(8192, 4))
    loss = FlexChunkLoss(lambda o, r: o.sum(1), max_chunk_bytes=8192 * 4 * 1024)
    assert loss.plan(x).chunk_rows == 1024
    assert loss.plan(x).chunk_bytes <= loss.max_chunk_bytes
    loss.max_chunk_bytes = 8192 * 4 * 2 * 15
    assert 2 <= loss.plan(x).chunk_rows <= 30  # fewer than sixteen rows fit: as many as fit, not one
    loss.chunk_size = 300
    assert loss.plan(x).chunk_rows == 300


@pytest.mark.parametrize("rows", [1, 7, 63, 64, 65, 255, 256, 700, 1024])
def test_tiles_cover_the_rows_with_few_sizes_and_little_padding(rows):
    rungs = (1024, 256, 64)
    covered = list(tiles(rows, rungs))
    assert [t[0] for t in covered] == [0, *(t[1] for t in covered[:-1])] and covered[-1][1] == rows
    assert all(stop - start <= size and size in rungs for start, stop, size in covered)
    assert sum(size for *_, size in covered) <= max(4 / 3 * rows, rows + 64)


def test_a_ladder_has_three_rungs_where_rows_are_wide():
    x = make("cross_entropy")
    loss = CrossEntropy(chunk_size=1024)
    problem = loss.plan(Projection(x["hidden"], x["weight"]), {"target": x["target"]})
    assert problem.rungs is None  # narrow
    wide = loss.plan(Projection(torch.randn(9, 2), torch.randn(5000, 2)), {"target": torch.zeros(9, dtype=torch.long)})
    assert wide.rungs == (1024, 256, 64)
    assert ladder.__doc__


@pytest.mark.parametrize("rows, longer", [(800, False), (2400, True)])
def test_a_chunk_grows_to_hold_a_group_that_is_a_little_longer(rows, longer):
    hidden, weight = torch.randn(2 * rows, 4, requires_grad=True), torch.randn(30_000, 4, requires_grad=True)
    loss = NLL(segments_per_group=1)
    segments = torch.arange(2).repeat_interleave(rows)
    arguments = (Projection(hidden, weight), {"target": torch.zeros(2 * rows, dtype=torch.long)})
    plan = loss.plan(*arguments, segments=segments)
    assert (plan.chunk_rows < rows) is longer and (plan.passes, plan.products) == (1, 3)
    told = NLL(segments_per_group=1, max_chunk_bytes=1 << 27).plan(*arguments, segments=segments)
    assert told.chunk_rows < 800 and told.passes == 1


def test_gradients_of_used_rows_are_gathered_and_sums_let_go():
    plan, run = call("few rows of many", "cpu", torch.float32, compiled=False, max_chunk_bytes=8 << 20)
    used, full, head = (4 * 256 * n for n in (2000, 40_000, COLUMNS))
    assert (plan.gathered_bytes, plan.gradient_bytes) == (used + head, full + head)
    assert plan.peak_bytes == used + full + head  # the sum of the weight's gradient is gone
    assert 0.9 * plan.peak_bytes < peak_on_cpu(run) < 1.1 * plan.peak_bytes


def test_groups_are_packed_whole():
    segments = torch.arange(9).repeat_interleave(torch.tensor([3, 4, 0, 9, 2, 2, 25, 1, 0]))
    loss = FlexChunkLoss(lambda scores, groups: scores["s"][:, 0], lambda o, rows: {"s": o.sum(1)}, chunk_size=10)
    head = Projection(torch.randn(46, 2), torch.randn(3, 2))
    blocks = loss.plan(head, segments=segments, group_weight=torch.ones(9)).blocks
    assert [(b.start, b.stop) for b in blocks] == [(0, 3), (3, 4), (4, 6), (6, 7), (7, 9)]
    assert [len(b.spans) for b in blocks] == [1, 1, 1, 3, 1]
    assert all(span.rows <= 10 for block in blocks for span in block.spans)
