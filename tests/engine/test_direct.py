"""The direct way of small problems means what chunks mean, to the last refusal."""

from __future__ import annotations

import contextlib
import gc
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from engine_zoo import CASES, gradients, learning, make
from torch import nn

from chunked_embed import FlexChunkLoss, Projection, linear_logps
from chunked_embed import functional as CF
from chunked_embed.engine import plan
from chunked_embed.engine.direct import Direct
from chunked_embed.engine.losses import as_metrics

ALL = pytest.mark.parametrize("name", list(CASES))


@pytest.fixture
def directly(monkeypatch):
    """How many calls have gone the direct way."""
    calls = []
    for name in ("row_loss", "group_loss", "scores"):
        method = getattr(Direct, name)

        def counted(self, *arguments, method=method):
            calls.append(self)
            return method(self, *arguments)

        monkeypatch.setattr(Direct, name, counted)
    return calls


def both_ways(name, x, directly, **options):
    case, before = CASES[name], len(directly)
    direct = case.call(case.loss(**options), x)
    assert len(directly) == before + 1
    chunked = case.call(case.loss(compiled=False, **options), x)
    assert len(directly) == before + 1
    return direct, chunked


# --- the same numbers ------------------------------------------------------------------------------------------------


@ALL
@pytest.mark.parametrize("m", [1, 23])
def test_the_zoo_both_ways(name, m, directly):
    x = make(name, m=m)
    direct, chunked = both_ways(name, x, directly)
    torch.testing.assert_close(direct.loss, chunked.loss, rtol=1e-10, atol=1e-10)
    for mine, theirs in zip(gradients(-2.5 * direct.loss, x), gradients(-2.5 * chunked.loss, x), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    assert list(direct.metrics) == list(chunked.metrics)
    for key, metric in direct.metrics.items():
        assert not metric.requires_grad
        torch.testing.assert_close(metric, chunked.metrics[key])
    assert (direct.counts is None) == (chunked.counts is None)
    for key in direct.counts or ():
        torch.testing.assert_close(direct.counts[key], chunked.counts[key])


@pytest.mark.parametrize("name", [name for name in CASES if name != "lora"])  # which multiplies before the call
@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, False)]
)
def test_half_precision_is_no_less_exact(name, dtype, autocast, directly):
    """Against the same operands in float64."""
    x = make(name, dtype=torch.float64)
    small = torch.float32 if autocast else dtype
    given = {k: t.detach().to(dtype).to(small) if t.is_floating_point() else t for k, t in x.items()}
    for key, t in given.items():
        t.requires_grad_(x[key].requires_grad)
    exact = {k: t.detach().double() if t.is_floating_point() else t for k, t in given.items()}
    for key, t in exact.items():
        t.requires_grad_(x[key].requires_grad)
    truth = CASES[name].reference(exact)
    with torch.autocast("cpu", dtype=dtype) if autocast else contextlib.nullcontext():
        direct, _ = both_ways(name, given, directly)
    assert direct.loss.dtype == torch.float32
    torch.testing.assert_close(direct.loss.double(), truth, rtol=2e-4, atol=2e-4)
    limit = 2e-3 if autocast else torch.finfo(dtype).eps
    for mine, theirs in zip(gradients(direct.loss, given), gradients(truth, exact), strict=True):
        assert mine.dtype == small
        assert (mine.double() - theirs).norm() <= limit * theirs.norm() + 1e-6


@ALL
def test_nothing_wants_a_gradient(name, directly):
    x = make(name)
    with torch.no_grad():
        direct, chunked = both_ways(name, x, directly)
    assert not direct.loss.requires_grad
    torch.testing.assert_close(direct.loss, chunked.loss)


@ALL
def test_backward_twice(name, directly):
    x = make(name)
    direct, _ = both_ways(name, x, directly)
    first = torch.autograd.grad(direct.loss, learning(x), retain_graph=True, allow_unused=True)
    second = torch.autograd.grad(3 * direct.loss, learning(x), allow_unused=True)
    for a, b in zip(first, second, strict=True):
        if a is not None:
            torch.testing.assert_close(3 * a, b)


# --- the same meaning ------------------------------------------------------------------------------------------------


def head(m=6, v=7, h=4):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, h, generator=generator).requires_grad_() for n in (m, v))
    return hidden, weight, torch.arange(m) % v


def cross_entropy(outputs, rows):
    return F.cross_entropy(outputs, rows["target"], reduction="none")


def test_a_tensor_without_a_part_has_a_gradient_of_zero(directly):
    hidden, weight, target = head()
    unused = torch.ones(6, requires_grad=True)
    loss = FlexChunkLoss(cross_entropy)(Projection(hidden, weight), {"target": target, "unused": unused}).loss
    (found,) = torch.autograd.grad(loss, (unused,))
    assert directly and torch.equal(found, torch.zeros(6))


def of_a_constant(outputs, rows):
    return rows["value"] * 1.0


def test_a_loss_that_depends_on_nothing_has_a_gradient_of_zero(directly):
    hidden, weight, _ = head()
    loss = FlexChunkLoss(of_a_constant)(Projection(hidden, weight), {"value": torch.ones(6)}).loss
    assert directly and loss.requires_grad
    for found, tensor in zip(torch.autograd.grad(loss, (hidden, weight)), (hidden, weight), strict=True):
        assert torch.equal(found, torch.zeros_like(tensor))


@pytest.mark.parametrize("weighted", [False, True])
def test_rows_that_count_for_nothing_are_not_looked_at(directly, weighted):
    hidden, weight, target = head()
    target[0] = -100
    with torch.no_grad():
        hidden[0] = torch.nan
    given = {"row_weight": torch.full((6,), 0.2)} if weighted else {}
    out = FlexChunkLoss(cross_entropy)(Projection(hidden, weight), {"target": target}, **given)
    out.loss.backward()
    torch.testing.assert_close(out.loss, F.cross_entropy(hidden[1:] @ weight.T, target[1:]))
    assert directly and not hidden.grad[0].any() and hidden.grad[1:].any()


def test_no_row_counts(directly):
    hidden, weight, target = head()
    out = FlexChunkLoss(cross_entropy)(Projection(hidden, weight), {"target": torch.full_like(target, -100)})
    out.loss.backward()
    assert directly and out.loss == 0 and not hidden.grad.any()


PARAMETER = nn.Parameter(torch.ones(()))


def that_learns(outputs, rows):
    return cross_entropy(outputs * PARAMETER, rows)


def that_couples(outputs, rows):
    return cross_entropy(outputs, rows) - outputs.mean()


def in_place(outputs, rows):
    return cross_entropy(outputs.mul_(2), rows)


def of_wrong_shape(outputs, rows):
    return cross_entropy(outputs, rows)[:, None]


REFUSED = {
    "what learns": (that_learns, ValueError, "to be an argument"),
    "rows that depend on each other": (that_couples, ValueError, "a value of its own"),
    "in place": (in_place, ValueError, "changed in place"),
    "a wrong shape": (of_wrong_shape, ValueError, "one value per row"),
}


@pytest.mark.parametrize("compiled", [None, False])
@pytest.mark.parametrize("case", list(REFUSED))
def test_refused_both_ways(case, compiled):
    function, kind, message = REFUSED[case]
    hidden, weight, target = head()
    with pytest.raises(kind, match=message):
        FlexChunkLoss(function, compiled=compiled)(Projection(hidden, weight), {"target": target})


@pytest.mark.parametrize("compiled", [None, False])
def test_targets_out_of_range_are_refused_both_ways(compiled):
    hidden, weight, target = head()
    loss = FlexChunkLoss(cross_entropy, compiled=compiled)
    loss(Projection(hidden, weight), {"target": target})
    with pytest.raises(ValueError, match="got 1 outside"):  # of a kind that has been met
        loss(Projection(hidden, weight), {"target": target + 2})


@pytest.mark.parametrize("compiled", [None, False])
def test_no_second_derivative_both_ways(compiled):
    hidden, weight, target = head()
    loss = FlexChunkLoss(cross_entropy, compiled=compiled)(Projection(hidden, weight), {"target": target}).loss
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize("compiled", [None, False])
def test_no_transforms_both_ways(compiled):
    hidden, weight, target = head()
    loss = FlexChunkLoss(cross_entropy, compiled=compiled)
    loss(Projection(hidden, weight), {"target": target})
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.grad(lambda h: loss(Projection(h, weight), {"target": target}).loss)(hidden.detach())


def test_an_input_changed_in_place_before_backward_is_refused(directly):
    """By torch itself, as after any of its own functions."""
    hidden, weight, target = head()
    loss = FlexChunkLoss(cross_entropy)(Projection(hidden, weight), {"target": target}).loss
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()
    assert directly


def of_a_product(outputs, rows):
    return F.linear(outputs, rows["mix"][0]).sum(1)


@pytest.mark.parametrize("compiled", [None, False])
def test_autocast_that_comes_after_prepare_changes_nothing(compiled):
    hidden, weight, _ = head()
    mix = torch.randn(1, 3, 7, generator=torch.Generator().manual_seed(1)).expand(6, 3, 7)
    call = FlexChunkLoss(of_a_product, compiled=compiled).prepare(Projection(hidden, weight), {"mix": mix})
    expected = call.run().loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(call.run().loss, expected, rtol=0, atol=0)


# --- when ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("option", [{"chunk_size": 4}, {"max_chunk_bytes": 1 << 20}, {"compiled": False}])
def test_a_caller_who_has_a_say_has_chunks(option, directly):
    hidden, weight, target = head()
    plan = FlexChunkLoss(cross_entropy, **option).plan(Projection(hidden, weight), {"target": target})
    FlexChunkLoss(cross_entropy, **option)(Projection(hidden, weight), {"target": target})
    CF.triplet(hidden, hidden, hidden, **option)
    linear_logps(hidden, weight, target, **option)
    assert not directly and not plan.direct


def test_operands_that_are_cast_count():
    """A head in half precision, whose products would take it in float32."""
    hidden, weight = torch.randn(2, 64).bfloat16(), torch.randn(80_000, 64).bfloat16()
    call = {"rows": {"target": torch.arange(2)}}
    loss = FlexChunkLoss(cross_entropy)
    assert not loss.plan(Projection(hidden, weight), **call).direct
    assert loss.plan(Projection(hidden.float(), weight.float()), **call).direct
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not loss.plan(Projection(hidden.float(), weight.float()), **call).direct


def test_the_plan_says_so():
    hidden, weight, target = head()
    assert "direct" in str(FlexChunkLoss(cross_entropy).plan(Projection(hidden, weight), {"target": target}))


# --- what changes from call to call ----------------------------------------------------------------------------------


class Scaled(FlexChunkLoss):
    def __init__(self, scale=1.0, **options):
        super().__init__(**options)
        self.scale = scale

    def loss_fn(self, outputs, rows):
        return self.of(F.cross_entropy(outputs * self.scale, rows["target"], reduction="none"))

    def of(self, values):
        return values


def value_of(loss):
    hidden, weight, target = head()
    return loss(Projection(hidden, weight), {"target": target}).loss.item()


def plain_value(scale):
    hidden, weight, target = head()
    return F.cross_entropy(hidden @ weight.T * scale, target).item()


@pytest.mark.parametrize("compiled", [None, False])
def test_what_is_set_between_calls_counts(compiled):
    loss = Scaled(compiled=compiled)
    for scale in (1.0, 1.0, 2.0, 3, 0.5):
        loss.scale = scale
        assert value_of(loss) == pytest.approx(plain_value(scale))
    for kind in (float, np.float64):
        loss.scale = kind(2.0)
        value_of(loss)
        loss.scale = kind("nan")
        with pytest.raises(ValueError, match=r"Scaled.scale to be a number, got NaN"):
            value_of(loss)
    loss.scale = 1.0
    loss.ignore_index = 0  # the first row's target
    assert value_of(loss) != pytest.approx(plain_value(1.0))
    loss.ignore_index = -100
    loss.compiled = "yes"
    with pytest.raises(TypeError, match="compiled"):
        value_of(loss)


@pytest.mark.parametrize("where", ["instance", "class", "helper"])
def test_a_function_replaced_between_calls_counts(where):
    class Own(Scaled):
        pass

    loss = Own()
    before = value_of(loss)
    if where == "instance":
        loss.loss_fn = lambda outputs, rows: 2 * Scaled.loss_fn(loss, outputs, rows)
    elif where == "class":
        Own.loss_fn = lambda self, outputs, rows: 2 * Scaled.loss_fn(self, outputs, rows)
    else:
        Own.of = lambda self, values: 2 * values
    assert value_of(loss) == pytest.approx(2 * before)


def test_a_function_replaced_by_one_that_couples_is_refused():
    class Own(Scaled):
        pass

    loss = Own()
    value_of(loss)
    Own.of = lambda self, values: values - values.mean()
    with pytest.raises(ValueError, match="a value of its own"):
        value_of(loss)


def test_what_begins_to_learn_is_refused():
    loss = Scaled()
    loss.layer = nn.Linear(7, 7).requires_grad_(False)
    loss.loss_fn = lambda outputs, rows: cross_entropy(loss.layer(outputs), rows)
    value_of(loss)
    loss.layer.requires_grad_(True)
    with pytest.raises(ValueError, match="to be an argument"):
        value_of(loss)


def test_what_a_function_writes_is_lost():
    loss = Scaled()
    loss.calls = 0

    class Counting(Scaled):
        def of(self, values):
            self.calls += 1
            return values

    loss = Counting()
    loss.calls = 0
    for _ in range(3):
        value_of(loss)
    assert loss.calls == 0


def test_a_total_added_in_place_counts():
    hidden, weight, _ = head()
    loss = FlexChunkLoss(
        score_fn=lambda outputs, rows: {"first": outputs[:, 0]},
        loss_fn=lambda scores, groups: sum(scores[name][:, 0] for name in scores if name != "count"),
    )
    first = loss(Projection(hidden, weight)).loss.item()
    loss.row_totals["all"] = "sum"
    loss._functions["element_fn"] = lambda outputs, rows: {"all": outputs}
    outputs = hidden @ weight.T
    assert loss(Projection(hidden, weight)).loss.item() == pytest.approx(first + outputs.sum(1).mean().item(), rel=1e-5)


def test_the_same_tensor_in_two_roles():
    """A signature tells it from two tensors of one shape."""
    a, b = (torch.randn(5, 4, requires_grad=True) for _ in range(2))
    loss = FlexChunkLoss(lambda outputs, rows: outputs.square().sum(1))
    for left, right in ((a, b), (a, a), (b, b), (b, a)):
        found = torch.autograd.grad(loss(Projection(left, right)).loss, {left, right})
        expected = torch.autograd.grad((left @ right.T).square().sum(1).mean(), {left, right})
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs)


# --- what stays behind -----------------------------------------------------------------------------------------------


class Named(FlexChunkLoss):
    def score_fn(self, outputs, rows):
        return {"all": outputs.logsumexp(1), "first": outputs[:, 0], "given": rows["value"]}

    def loss_fn(self, scores, groups):
        return scores["all"][:, 0], {name: scores[name][:, 0] for name in ("first", "given")}


@pytest.mark.parametrize("grouped", [False, True])
def test_values_hold_neither_all_outputs_nor_the_callers_tensors(directly, grouped):
    hidden, weight, _ = (t.detach() for t in head())
    value = torch.ones(6)
    if grouped:
        loss = Named()
        found = loss(Projection(hidden, weight), {"value": value}).metrics
        found |= {f"score {n}": v for n, v in loss.scores(Projection(hidden, weight), {"value": value}).items()}
    else:
        metrics = {
            "first": lambda o, r: o[:, 0],
            "given": lambda o, r: r["value"],
            "part": lambda o, r: o.detach()[:, 1],
        }
        loss = FlexChunkLoss(lambda o, r: (o.sum(1), {name: f(o, r) for name, f in metrics.items()}))
        found = loss(Projection(hidden, weight), {"value": value}).metrics
    assert directly
    for metric in found.values():
        assert metric.untyped_storage().nbytes() == metric.nbytes and metric.data_ptr() != value.data_ptr()


@pytest.mark.parametrize("compiled", [None, False])
def test_scores_under_autocast_have_all_their_digits(compiled):
    hidden, weight, _ = (t.detach() for t in head())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = Named(compiled=compiled).scores(Projection(hidden, weight), {"value": torch.ones(6)})["all"]
    expected = (hidden.bfloat16().double() @ weight.bfloat16().double().T).logsumexp(1)
    torch.testing.assert_close(found, expected.float())


@pytest.mark.parametrize("compiled", [None, False])
@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: [t], lambda t: (1, {"a": t})])
def test_an_attribute_of_one_call_is_let_go(compiled, wrap):
    loss = Scaled(compiled=compiled)
    for _ in range(2):
        mask = torch.ones(7)
        watched = weakref.ref(mask)
        loss.mask = wrap(mask)
        value_of(loss)
        del loss.mask, mask
        gc.collect()
        assert watched() is None


@pytest.mark.parametrize("compiled", [None, False])
def test_attributes_of_any_kind_count_from_the_next_call_on(compiled):
    loss = Scaled(compiled=compiled)
    for scale in (torch.tensor(2.0), torch.tensor(3.0), 2.0, torch.tensor(3.0)):
        loss.scale = scale
        assert value_of(loss) == pytest.approx(plain_value(float(scale)))
    loss.scale.fill_(2.0)
    assert value_of(loss) == pytest.approx(plain_value(2.0))
    loss.scale.requires_grad_()
    with pytest.raises(ValueError, match="to be an argument"):
        value_of(loss)


@pytest.mark.parametrize("compiled", [None, False])
def test_functions_put_in_beside_the_constructor_count(compiled):
    loss = FlexChunkLoss(cross_entropy, compiled=compiled)
    before = value_of(loss)
    loss._functions["loss_fn"] = lambda outputs, rows: 2 * cross_entropy(outputs, rows)
    assert value_of(loss) == pytest.approx(2 * before)
    loss._functions = {"loss_fn": lambda outputs, rows: 3 * cross_entropy(outputs, rows)}
    assert value_of(loss) == pytest.approx(3 * before)


def test_what_is_random_is_refused_when_it_comes_to_run_twice(monkeypatch):
    loss = FlexChunkLoss(lambda outputs, rows: F.dropout(outputs, 0.5).sum(1), compiled=False)
    hidden, _, _ = head()
    loss(Projection(hidden))
    monkeypatch.setattr(plan, "SMALL_BYTES", 0)  # from here on gradients are taken in backward
    with pytest.raises(ValueError, match="random"):
        loss(Projection(head(m=5)[0]))


def test_metrics_on_several_devices_are_cast_apart():
    given = {"a": torch.ones(3), "b": torch.ones(3, device="meta"), "c": torch.zeros(3)}
    found = as_metrics(given, torch.float64)
    assert [v.device.type for v in found.values()] == ["cpu", "meta", "cpu"]
    assert torch.equal(found["a"], torch.ones(3).double()) and not found["c"].any()
