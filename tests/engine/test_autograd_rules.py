"""How the engine behaves inside training: grad mode, autocast, GradScaler, accumulation, memory, precision."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from engine_zoo import CASES, CrossEntropy, make

from chunked_embed import FlexChunkLoss, Projection, TokenStatistics, linear_logps

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def problem(device="cpu", dtype=torch.float32, m=40, h=16, v=50):
    torch.manual_seed(0)
    hidden = torch.randn(m, h).to(device, dtype).requires_grad_()
    weight = torch.randn(v, h).to(device, dtype).requires_grad_()
    return hidden, weight, torch.randint(0, v, (m,), device=device)


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def exact_gradients(hidden, weight, target):
    h, w = (t.detach().double().requires_grad_() for t in (hidden, weight))
    return torch.autograd.grad(F.cross_entropy(h @ w.T, target), (h, w))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("chunks", [1, 8, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["loss", "logps"])
def test_weight_gradient_error_does_not_grow_with_chunks(device, dtype, chunks, how):
    """Within twice the error of one unchunked product in the same dtype."""
    hidden, weight, target = problem(device, dtype, m=2048, h=32, v=200)
    _, exact = exact_gradients(hidden, weight, target)
    unchunked = torch.autograd.grad(F.cross_entropy((hidden @ weight.T).float(), target), weight)[0]
    if how == "loss":
        loss = CrossEntropy(1.0, chunk_size=2048 // chunks, compiled=False)
        value = loss(Projection(hidden, weight), {"target": target}).loss
    else:
        value = -linear_logps(hidden, weight, target, chunk_size=2048 // chunks, compiled=False).logps.mean()
    mine = torch.autograd.grad(value, weight)[0]
    assert relative(mine, exact) < 2 * relative(unchunked, exact)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_too_small_for_float16_survive_a_grad_scaler(device):
    """With a mean over many rows float16 gradients of the outputs underflow unless 1/M comes after the sum."""
    hidden, weight, target = problem(device, torch.float16, m=4096, h=8, v=30)
    loss = CrossEntropy(1.0, chunk_size=512, compiled=False)(Projection(hidden, weight), {"target": target}).loss
    scaled = torch.autograd.grad(loss * 2.0**10, (hidden, weight))
    for mine, exact in zip(scaled, exact_gradients(hidden, weight, target), strict=True):
        assert mine.dtype == torch.float16
        assert relative(mine.float() / 2**10, exact) < 2e-2


def test_a_real_grad_scaler_skips_and_steps():
    weight = torch.nn.Parameter(torch.randn(20, 8))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    before = weight.detach().clone()
    with torch.autocast("cpu", torch.float16):
        loss = CrossEntropy(compiled=False)(Projection(torch.randn(9, 8), weight), {"target": torch.arange(9)}).loss
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert weight.grad.dtype == torch.float32
    assert not torch.equal(weight, before)


def test_mixed_dtypes_need_autocast():
    hidden, weight, target = problem()
    loss = CrossEntropy(compiled=False)
    with pytest.raises(TypeError, match=r"one dtype.*bfloat16"):
        loss(Projection(hidden.bfloat16(), weight), {"target": target})
    with torch.autocast("cpu", torch.bfloat16):
        loss(Projection(hidden.bfloat16(), weight), {"target": target}).loss.backward()


def test_autocast_of_forward_decides_also_in_backward():
    hidden, weight, target = problem()
    with torch.autocast("cpu", torch.bfloat16):
        inside = linear_logps(hidden, weight, target, compiled=False).logps.mean()
        gradients = torch.autograd.grad(inside, (hidden, weight), retain_graph=True)
    outside = torch.autograd.grad(inside, (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(gradients, outside, strict=True))


def test_float64_stays_float64_under_autocast():
    hidden, weight, target = problem(dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        loss = CrossEntropy(1.0, compiled=False)(Projection(hidden, weight), {"target": target}).loss
    torch.testing.assert_close(loss, F.cross_entropy(hidden @ weight.T, target), rtol=1e-12, atol=0)


def test_accumulated_half_batches_equal_the_whole():
    hidden, weight, target = problem(dtype=torch.float64)
    loss = CrossEntropy(1.0, compiled=False, chunk_size=16)
    weights = torch.full((40,), 1 / 40, dtype=torch.float64)
    for half in (slice(0, 13), slice(13, 40)):
        x = Projection(hidden[half], weight)
        loss(x, {"target": target[half]}, row_weight=weights[half]).loss.backward()
    h, w = exact_gradients(hidden, weight, target)
    torch.testing.assert_close(hidden.grad, h)
    torch.testing.assert_close(weight.grad, w)


def test_all_rows_ignored_is_a_differentiable_zero():
    hidden, weight, target = problem(dtype=torch.float64)
    zero = torch.zeros(40, dtype=torch.float64)
    loss = CrossEntropy(compiled=False)(Projection(hidden, weight), {"target": target - 1000}, row_weight=zero).loss
    logps = linear_logps(hidden, weight, torch.full((40,), -100), outputs=("logps", "entropy"), compiled=False)
    (loss + logps.logps.sum() + logps.entropy.sum()).backward()
    assert loss.item() == 0 and not hidden.grad.any() and not weight.grad.any()


@pytest.mark.parametrize("name", ["preference", "length_normalised"])
def test_groups_without_rows_stay_finite(name):
    x = make(name)
    case = CASES[name]
    original = torch.full((23,), -1)
    loss = case.loss(compiled=False)
    head = Projection(x["hidden"], x["weight"])
    sides = {"policy": head, "reference": Projection(x["other"], x["other_weight"])} if name == "preference" else head
    groups = {"shift": x["shift"]} if name == "preference" else None
    weight = None if name == "preference" else torch.ones(3, dtype=torch.float64)
    output = loss(sides, {"target": x["target"]}, segments=original, groups=groups, group_weight=weight)
    output.loss.backward()
    assert torch.isfinite(output.loss) and not x["hidden"].grad.any()


def test_an_infinite_row_does_not_turn_into_nan():
    outputs = torch.full((3, 4), 1.0, dtype=torch.float64)
    outputs[2] = torch.inf
    loss = FlexChunkLoss(lambda o, rows: o.sum(1), compiled=False)(Projection(outputs)).loss
    assert loss.item() == torch.inf


def test_a_kept_loss_does_not_keep_the_batch():
    hidden, weight, target = problem()
    batch = hidden * 1.0
    watched = weakref.ref(batch)
    loss = CrossEntropy(compiled=False)(Projection(batch, weight), {"target": target}).loss
    scores = linear_logps(batch, weight, target, compiled=False).logps.sum()
    (loss + scores).backward()
    del batch
    gc.collect()
    assert watched() is None


def test_no_reference_cycles():
    """Memory comes back when the loss goes, not when the collector runs."""
    hidden, weight, target = problem()
    gc.collect()
    gc.disable()
    try:
        results = [
            CrossEntropy(compiled=False)(Projection(hidden, weight), {"target": target}).loss,
            linear_logps(hidden, weight, target, compiled=False).logps,
        ]
        watched = [weakref.ref(r) for r in results]
        del results
        assert all(w() is None for w in watched)
    finally:
        gc.enable()


def test_inputs_changed_before_a_recomputing_backward_are_noticed():
    hidden, weight, target = problem()
    logps = linear_logps(hidden, weight, target, compiled=False).logps
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logps.sum().backward()


def test_double_backward_is_refused():
    hidden, weight, target = problem()
    loss = CrossEntropy(compiled=False)(Projection(hidden, weight), {"target": target}).loss
    scores = linear_logps(hidden, weight, target, compiled=False).logps.sum()
    for value in (loss, scores):
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(value, hidden, create_graph=True)


def test_works_under_saved_tensor_hooks():
    hidden, weight, target = problem(dtype=torch.float64)
    with torch.autograd.graph.save_on_cpu():
        loss = CrossEntropy(1.0, compiled=False)(Projection(hidden, weight), {"target": target}).loss
        loss.backward()
    torch.testing.assert_close(weight.grad, exact_gradients(hidden, weight, target)[1])


def test_metrics_are_detached_and_in_the_users_order():
    x = make("preference")
    output = CASES["preference"].call(CASES["preference"].loss(compiled=False, chunk_size=4), x)
    whole = CASES["preference"].call(CASES["preference"].loss(compiled=False), x)
    assert not output.metrics["margin"].requires_grad
    torch.testing.assert_close(output.metrics["margin"], whole.metrics["margin"])
    x = make("cross_entropy")
    nll = CASES["cross_entropy"].call(CrossEntropy(compiled=False, chunk_size=4), x).metrics["nll"]
    expected = F.cross_entropy(2 * (x["hidden"] @ x["weight"].T + x["bias"]), x["target"], reduction="none")
    torch.testing.assert_close(nll, torch.where(x["used"], expected, 0).detach())


def test_rows_of_any_leading_shape():
    hidden, weight, target = problem(dtype=torch.float64)
    flat = CrossEntropy(compiled=False)(Projection(hidden, weight), {"target": target})
    shaped = CrossEntropy(compiled=False)(
        Projection(hidden.view(2, 5, 4, 16), weight), {"target": target.view(2, 5, 4)}
    )
    torch.testing.assert_close(flat.loss, shaped.loss)
    assert shaped.metrics["nll"].shape == (2, 5, 4)


def test_evaluation_forms_each_product_once(monkeypatch):
    products = []
    real = torch.mm
    x, loss = make("preference"), CASES["preference"].loss(compiled=False)
    with torch.no_grad():
        CASES["preference"].call(loss, x)  # the first call looks at two rows
        replaced = lambda *a, **k: products.append(1) or real(*a, **k)  # noqa: E731
        monkeypatch.setattr("chunked_embed.engine.products.torch.mm", replaced)
        CASES["preference"].call(loss, x)
    assert len(products) == 2


@pytest.mark.parametrize("factor", [1 / 3, 1 / 6])
def test_an_upstream_factor_is_not_rounded_to_half_precision(factor):
    """As gradient accumulation divides the loss: a rounded factor would scale every gradient by 0.2%."""
    hidden, weight, target = problem(dtype=torch.bfloat16)
    loss = CrossEntropy(1.0, compiled=False)(Projection(hidden, weight), {"target": target}).loss
    for mine, exact in zip(
        torch.autograd.grad(loss * factor, (hidden, weight)), exact_gradients(hidden, weight, target)
    ):
        gain = (mine.double() * exact).sum() / (factor * exact * exact).sum()
        assert abs(gain.item() - 1) < 1e-3


def test_float16_without_any_row_has_zero_gradients_under_a_large_scale():
    hidden, weight, target = problem(dtype=torch.float16)
    loss = CASES["length_normalised"].loss(compiled=False)
    ignored = torch.full((40,), -1)
    output = loss(Projection(hidden, weight), {"target": target}, segments=ignored, group_weight=torch.ones(2))
    gradients = torch.autograd.grad(output.loss * 65536.0, (hidden, weight))
    assert not any(g.any() for g in gradients)
    empty = loss(Projection(hidden, weight), {"target": target}, segments=ignored)  # no group at all
    assert empty.loss.item() == 0


def test_metrics_stay_the_users_after_a_deferred_backward(monkeypatch):
    monkeypatch.setattr("chunked_embed.engine.plan.SMALL_BYTES", 0)
    x = torch.randn(5, 3, requires_grad=True)
    output = FlexChunkLoss(lambda o, rows: (o.sum(1), {"m": o[:, 0]}), compiled=False)(Projection(x))
    output.metrics["m"] = output.metrics["m"].mean().item()
    output.loss.backward()
    assert isinstance(output.metrics["m"], float)


def test_evaluation_mode_is_seen_inside_a_step():
    class Mode(FlexChunkLoss):
        def loss_fn(self, outputs, rows):
            return outputs.sum(1) if self.training else outputs.sum(1) * 0

    loss, x = Mode(compiled=False), Projection(torch.ones(2, 3))
    assert loss(x).loss.item() == 3
    assert loss.eval()(x).loss.item() == 0


def test_the_kernel_is_used_for_the_engines_own_score_only(monkeypatch):
    """A subclass that scores in its own way must not be answered by the kernel."""

    class Weighted(TokenStatistics):
        def score_fn(self, outputs, rows):
            return {"logps": 3 * super().score_fn(outputs, rows)["logps"]}

        def loss_fn(self, scores, groups):
            return -scores["logps"][:, 0]

    hidden, weight, target = problem()
    expected = 3 * F.cross_entropy(hidden @ weight.T, target)
    monkeypatch.setattr("chunked_embed.tokens.available", lambda device: True)
    monkeypatch.setattr("chunked_embed.engine.compile.BACKEND", "eager")
    torch.testing.assert_close(Weighted()(Projection(hidden, weight), {"target": target}).loss, expected)


def test_the_kernel_path_on_its_plain_twins(monkeypatch):
    """TokenKernel with the twins in place of Triton: what is saved and reused, in place, in one chunk and several."""
    monkeypatch.setattr("chunked_embed.tokens.available", lambda device: True)
    for chunk_size in (None, 16):
        hidden, weight, target = problem()
        found = linear_logps(hidden, weight, target, outputs=("logps", "entropy"), chunk_size=chunk_size)
        z = (hidden @ weight.T).log_softmax(-1)
        entropy = -(z.exp() * z).sum(-1)
        mine, theirs = found.logps.sum() + found.entropy.sum(), z.gather(1, target[:, None]).sum() + entropy.sum()
        torch.testing.assert_close(mine, theirs)
        pairs = zip(*(torch.autograd.grad(value, (hidden, weight)) for value in (mine, theirs)), strict=True)
        for a, b in pairs:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
