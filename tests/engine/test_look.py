"""A loss's functions are looked at once: what would give wrong numbers without a word is refused with a sentence, and
what gives right ones is left alone."""

from __future__ import annotations

import functools
import random
import sys
import time
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from chunked_embed import FlexChunkLoss, Projection
from chunked_embed.engine.look import look

V = 9
scale = nn.Parameter(torch.tensor(2.0))  # a notebook's global
box = {"s": [scale]}
centre = scale * torch.ones(V)  # learns, and is no leaf
settings = types.ModuleType("settings")
settings.scale = scale


def sample(rows=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(rows, V, generator=generator, dtype=dtype)
    return {"outputs": outputs}, {"target": torch.arange(rows), "weight": 1.0 + torch.arange(rows).to(dtype)}


def looks(function, *, rows=2, functions=None, dtype=torch.float32, columns=None, **options):
    """Row-wise, once, trained, unless said otherwise."""
    options = {"name": "loss_fn", "row_wise": True, "twice": False, "wanted": ("outputs",)} | options
    outputs, given = sample(rows, dtype)
    columns = columns or {}

    def call(outputs, rows, columns):
        more = {"columns": columns} if columns else {}
        return function(outputs["outputs"], rows, **more)

    look(call, outputs, given, columns, functions=functions or [function], **options)


# --- what learns -----------------------------------------------------------------------------------------------------


def reads_global(o, rows):
    return torch.tanh(o * scale).mean(1)


def reads_container(o, rows):
    return torch.tanh(o * box["s"][0]).mean(1)


def reads_through_helper(o, rows):
    return reads_global(o, rows) + 1


def reads_inner(o, rows):
    return torch.stack([(lambda row: (row * scale).sum())(row) for row in o])


def reads_module_attribute(o, rows):
    return (o * settings.scale).sum(1)


def reads_non_leaf(o, rows):
    return (o - centre).square().sum(1)


def has_default(o, rows, s=scale):
    return torch.tanh(o * s).mean(1)


def has_keyword_default(o, rows, *, s=scale):
    return torch.tanh(o * s).mean(1)


def takes_first(s, o, rows):
    return torch.tanh(o * s).mean(1)


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = scale
        self.inner = nn.Sequential(nn.PReLU())
        self.plain = {"s": torch.tensor(3.0, requires_grad=True)}

    def own(self, o, rows):
        return torch.tanh(o * self.scale).mean(1)

    def of_a_module(self, o, rows):
        return self.inner(o).mean(1)

    def plain_attribute(self, o, rows):
        return (o * self.plain["s"]).mean(1)

    def by_a_method(self, o, rows):
        return self.helper(o) + 1

    def helper(self, o):
        return (o * scale).mean(1)

    def __call__(self, o, rows):
        return self.own(o, rows)


class Bare:
    """Not a module."""

    def __init__(self):
        self.scale = scale

    def own(self, o, rows):
        return (o * self.scale).sum(1)


def closure_over(held):
    return lambda o, rows: torch.tanh(o * held).mean(1)


def closure_over_dict(held):
    inside = {"s": held}
    return lambda o, rows: torch.tanh(o * inside["s"]).mean(1)


def wrapped(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


def returns_itself(o, rows):
    return pair


pair = nn.Parameter(torch.ones(2))
holder = Holder()
LEARNING = {
    "global": (reads_global, r"scale \(a global\)"),
    "container": (reads_container, r"box\['s'\]\[0\] \(a global\)"),
    "helper": (reads_through_helper, r"scale \(a global\)"),
    "inner function": (reads_inner, r"scale \(a global\)"),
    "module attribute": (reads_module_attribute, r"settings\.scale \(a global\)"),
    "no leaf": (reads_non_leaf, r"centre \(a global\)"),
    "default": (has_default, r"s \(a default argument\)"),
    "keyword default": (has_keyword_default, r"s \(a default argument\)"),
    "partial": (functools.partial(takes_first, scale), r"args\[0\] \(of the partial function\)"),
    "partial by keyword": (functools.partial(has_default, s=scale), r"s \(of the partial function\)"),
    "bound method": (holder.own, r"self\.scale \(of Holder\)"),
    "a module of the loss": (holder.of_a_module, r"self\.inner\.0\.weight \(of Holder\)"),
    "plain attribute": (holder.plain_attribute, r"self\.plain\['s'\] \(of Holder\)"),
    "method that reads a global": (Holder().by_a_method, r"self\.scale|scale \(a global\)"),
    "no module": (Bare().own, r"self\.scale \(of Bare\)"),
    "module that is called": (holder, r"Holder\.scale"),
    "closure": (closure_over(scale), r"held \(closed over\)"),
    "closure over a dict": (closure_over_dict(scale), r"inside\['s'\] \(closed over\)"),
    "closure over a module": (closure_over_dict(nn.PReLU().weight), r"inside\['s'\] \(closed over\)"),
    "wrapped": (wrapped(reads_global), r"scale \(a global\)"),
    "returned": (returns_itself, r"pair \(a global\)"),
}


@pytest.mark.parametrize("function, named", LEARNING.values(), ids=LEARNING)
@pytest.mark.parametrize("metrics", [False, True])
def test_what_learns_is_an_argument(function, named, metrics):
    given = functools.partial(with_metrics, function) if metrics else function
    message = f"expected what learns to be an argument of loss_fn, got {named}.*no gradient: pass it as a row"
    with pytest.raises(ValueError, match=message):
        looks(given, functions=[function])
    with torch.no_grad():  # nothing is trained, so nothing is missing
        looks(given, functions=[function], row_wise=function is not returns_itself)


def with_metrics(function, o, rows):
    return function(o, rows), {"n": torch.ones(len(o), dtype=torch.long)}


def test_several_things_learn():
    net = nn.Sequential(nn.Linear(V, 4), nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"net\.0\.weight .*, net\.0\.bias .*, net\.1\.weight .* and 1 more, which"):
        looks(lambda o, rows: net(o).sum(1))


def test_what_learns_may_have_no_name():
    hidden = [nn.Parameter(torch.ones(3))]
    iterator = iter(lambda: hidden[0], None)
    with pytest.raises(ValueError, match=r"got a parameter of shape \(3,\) from elsewhere"):
        looks(lambda o, rows: o.sum(1) * next(iterator).sum(), functions=[])


def detached(o, rows):
    return (o * scale.detach()).sum(1)


def in_a_metric(o, rows):
    return o.sum(1), {"scaled": (o * scale).sum(1)}


def makes_its_own(o, rows):
    """Something that requires grad, but is not from outside: a direction to look into."""
    with torch.enable_grad():
        direction = torch.zeros(V, requires_grad=True)
        (found,) = torch.autograd.grad((o * (direction + 1)).square().sum(), direction, create_graph=True)
    return o.sum(1) + 0 * found.sum() + 0 * direction.sum()


def without_grad(o, rows):
    with torch.no_grad():
        s = scale * 2
    return (o * s).sum(1)


@pytest.mark.parametrize("function", [detached, in_a_metric, makes_its_own, without_grad])
def test_what_needs_no_gradient_does_not_learn(function):
    looks(function)


def test_a_score_and_its_columns():
    def score_fn(o, rows, columns=None):
        return {"s": (o * columns["norm"] * scale).sum(1), "found": o.argmax(1)}

    columns = {"norm": torch.ones(V, requires_grad=True)}
    with pytest.raises(ValueError, match=r"an argument of score_fn, got scale \(a global\)"):
        looks(score_fn, name="score_fn", twice=True, columns=columns)
    looks(lambda o, rows, columns=None: {"s": (o * columns["norm"]).sum(1)}, twice=True, columns=columns)


# --- in place --------------------------------------------------------------------------------------------------------


def cuts_outputs(o, rows):
    return o.clamp_(0).sum(1)


def writes_into_a_view(o, rows):
    o[:, 0] = 0
    return o.sum(1)


def changes_rows(o, rows):
    rows["weight"] += 1
    return o.sum(1) * rows["weight"]


def changes_columns(o, rows, columns):
    columns["norm"].mul_(2)
    return (o * columns["norm"]).sum(1)


@pytest.mark.parametrize(
    "function, label",
    [
        (cuts_outputs, "outputs"),
        (writes_into_a_view, "outputs"),
        (changes_rows, r"rows\['weight'\]"),
        (changes_columns, r"columns\['norm'\]"),
    ],
)
def test_arguments_stay_as_they_are(function, label):
    columns = {"norm": torch.ones(V)} if function is changes_columns else None
    with pytest.raises(ValueError, match=f"expected loss_fn to leave its arguments as they are, got {label} changed"):
        looks(function, columns=columns)


def test_nothing_of_the_users_changes():
    outputs, rows = sample()
    before = {name: t.clone() for name, t in (outputs | rows).items()}
    with pytest.raises(ValueError, match="in place"):
        look(
            lambda o, r, c: changes_rows(cuts_outputs(o["outputs"], r)[:, None], r),
            outputs,
            rows,
            {},
            name="loss_fn",
            functions=[],
            row_wise=True,
            twice=False,
        )
    for name, t in (outputs | rows).items():
        assert torch.equal(t, before[name])


def test_dicts_are_the_functions_own():
    def pops(o, rows):
        return o.sum(1) * rows.pop("weight")

    looks(pops, twice=True)


# --- randomness ------------------------------------------------------------------------------------------------------

own = torch.Generator().manual_seed(1)
calls = [0]


def drops_out(o, rows):
    return {"s": F.dropout(o, 0.5).sum(1)}


def draws_from_python(o, rows):
    return {"s": o.sum(1) * random.random()}


def draws_from_numpy(o, rows):
    return {"s": o.sum(1) * float(np.random.rand())}


def draws_little(o, rows):
    return {"s": o.sum(1) + 1e-4 * torch.rand(len(o))}


def draws_from_its_own(o, rows):
    return {"s": o.sum(1) + torch.rand(len(o), generator=own)}


def counts_its_calls(o, rows):
    calls[0] += 1
    return {"s": o.sum(1) * calls[0]}


RANDOM = [drops_out, draws_from_python, draws_from_numpy, draws_little, draws_from_its_own, counts_its_calls]


def states():
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()


@pytest.mark.parametrize("function", RANDOM)
@pytest.mark.parametrize("rows", [1, 2])
def test_values_that_run_twice_are_not_random(function, rows):
    before = states()
    with pytest.raises(ValueError, match=r"expected score_fn to give the same values when it runs again.*as a row arg"):
        looks(function, name="score_fn", twice=True, rows=rows)
    looks(function, name="loss_fn", twice=False, rows=rows)  # one draw serves value and gradient
    assert states() == before


def test_a_draw_that_counts_for_nothing():
    def function(o, rows):
        return {"s": o.sum(1) + 0 * torch.rand(len(o))}

    looks(function, twice=True)
    looks(lambda o, rows: (o.sum(1), {"m": torch.rand(len(o))}), twice=True)


def test_a_group_whose_loss_draws():
    def loss_fn(o, rows):
        return o.sum(1) + torch.randn(len(o))

    with pytest.raises(ValueError, match="the same values"):
        looks(loss_fn, row_wise=False, twice=True)
    looks(loss_fn, row_wise=False, twice=False)


# --- rows that depend on each other ----------------------------------------------------------------------------------


def cross_entropy(o, rows):
    return F.cross_entropy(o, rows["target"], reduction="none")


def minus_mean(o, rows):
    return cross_entropy(o, rows) - o.mean()


def a_little_mean(o, rows):
    return cross_entropy(o, rows) - 1e-5 * o.mean()


def above_median(o, rows):
    value = cross_entropy(o, rows)
    return value * (value.detach() > value.detach().median())


def divides_by_rows(o, rows):
    return cross_entropy(o, rows) / len(o)


def normalised_over_rows(o, rows):
    return ((o - o.mean(0)) / o.std(0)).sum(1)


def weight_over_sum(o, rows):
    return cross_entropy(o, rows) * (rows["weight"] / rows["weight"].sum())


def reversed_rows(o, rows):
    return o.flip(0).sum(1)


def batch_norm(o, rows):
    return F.batch_norm(o, None, None, training=True).square().sum(1)


def sorts_rows(o, rows):
    """In the order that these two do not have."""
    value = o.sum(1)
    return value.sort(descending=bool(value[0] < value[-1])).values


COUPLED = {
    "mean": (minus_mean, "value of its own.*couples the batch says so .*score_fn and couples_batch=True"),
    "a little mean": (a_little_mean, "a gradient at another row's outputs"),
    "median": (above_median, "a value of its own, got 0 for a row alone and"),
    "rows": (divides_by_rows, "a value of its own"),
    "normalised": (normalised_over_rows, "value of its own, got nan for a row alone"),
    "row arguments": (weight_over_sum, "a value of its own"),
    "reversed": (reversed_rows, "a value of its own"),
    "batch norm": (batch_norm, "expected loss_fn to take any number of rows.*got ValueError for one row"),
    "squeezed": (lambda o, rows: o.sum(1, keepdim=True).squeeze(), r"return values \(1,\) for one row, got \(\)"),
    "sorted": (sorts_rows, "a value of its own"),
}


@pytest.mark.parametrize("function, message", COUPLED.values(), ids=COUPLED)
def test_rows_that_depend_on_each_other(function, message):
    with pytest.raises(ValueError, match=message):
        looks(function)
    looks(function, row_wise=False)
    if function is not batch_norm:
        looks(function, rows=1)


def test_scores_of_rows_and_losses_of_groups():
    def score_fn(o, rows):
        return {"near": o.sum(1), "far": o.sum(1) - o.sum()}

    with pytest.raises(ValueError, match=r"score_fn to give each row a value of its own, got .* of 'far' for a row"):
        looks(score_fn, name="score_fn", twice=True)
    with pytest.raises(ValueError, match=r"each group a value of its own.*give it couples_batch=True"):
        looks(minus_mean, unit="group")


def test_elements_of_totals_and_metrics():
    def elements(o, rows):
        return {"over_documents": o - o.amax(0)}

    with pytest.raises(ValueError, match=r"value of its own, got \[0, 0, 0, 0, ...\] of 'over_documents' for a row"):
        looks(elements, name="element_fn", twice=True)
    looks(lambda o, rows: {"loss": o.sum(1), "metrics/learns": (o * scale).sum(1), "metrics/mean": o.mean(0)})


def test_several_projections():
    outputs, rows = sample()
    both = {"student": outputs["outputs"], "teacher": outputs["outputs"] + 1}
    options = {"name": "loss_fn", "functions": [], "row_wise": True, "twice": False, "wanted": ("student",)}
    look(lambda o, r, c: (o["student"] - o["teacher"]).square().sum(1), both, rows, {}, **options)

    def call(o, r, c):
        return o["student"].sum(1) + 1e-7 * o["student"].sum()

    with pytest.raises(ValueError, match="at another row's outputs of 'student'"):
        look(call, both, rows, {}, **options)


# --- what is right is left alone -------------------------------------------------------------------------------------


def data_dependent(o, rows):
    if o.max() > 0:
        o = o * 2
    out = torch.zeros(len(o), dtype=o.dtype)
    for i, row in enumerate(o):
        out[i] = row[row > 0].sum()
    return out


def with_integer_metrics(o, rows):
    hits = o.argmax(1) == rows["target"]
    return o.sum(1), {"hits": hits, "best": o.argmax(1), "share": hits.float().mean()}


def overflows(o, rows):
    return (o * 1e4).half().exp().sum(1).float()


def is_nan(o, rows):
    return o.sum(1) * torch.where(rows["target"] == 0, torch.nan, 1.0)


def infinite(o, rows):
    return torch.where(rows["target"] == 0, torch.inf, o.sum(1))


def in_half(o, rows):
    return o.bfloat16().logsumexp(1).float() - o.amax(1)


def nearly_cancels(o, rows):
    z = o * 1e4
    return z.logsumexp(1) - z.amax(1)


def masked(o, rows):
    z = torch.where(torch.arange(V) > 6, torch.finfo(o.dtype).min, o)
    return -z.log_softmax(1)[:, 0]


def mixes_columns(o, rows):
    return (o @ torch.full((V, V), torch.inf, dtype=o.dtype)).nan_to_num(0).sum(1)


def needs_no_outputs(o, rows):
    return rows["weight"] * 2


def warns(o, rows):
    import warnings

    warnings.warn("look", UserWarning, stacklevel=1)
    return o.sum(1)


def no_backward(o, rows):
    return torch.from_numpy(o.detach().numpy()).sum(1)


RIGHT = [
    cross_entropy,
    data_dependent,
    with_integer_metrics,
    overflows,
    is_nan,
    infinite,
    in_half,
    nearly_cancels,
    masked,
    mixes_columns,
    needs_no_outputs,
    warns,
    no_backward,
]


@pytest.mark.parametrize("function", RIGHT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("grad", [True, False])
def test_what_is_right_is_left_alone(function, dtype, grad):
    with torch.set_grad_enabled(grad):
        for twice in (False, True):
            looks(function, twice=twice, dtype=dtype)
            looks(function, twice=twice, dtype=dtype, rows=1)
        looks(lambda o, rows: {"s": values_of(function(o, rows))}, twice=True)


def values_of(result):
    return result[0] if isinstance(result, tuple) else result


def test_errors_of_the_function_pass():
    def fails(o, rows):
        raise KeyError("margin")

    with pytest.raises(KeyError, match="margin"):
        looks(fails)


def test_what_is_no_value_is_for_the_step_to_tell():
    for result in (None, 1.0, {"s": 1.0}, torch.ones(()), torch.ones(3, V), {}):
        looks(lambda o, rows, result=result: result)


def test_inference_autocast_and_hooks():
    packed = []
    with torch.inference_mode():
        looks(cross_entropy)
        looks(reads_global)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        looks(lambda o, rows: (o @ torch.eye(V)).sum(1) if o.dtype == torch.float32 else minus_mean(o, rows))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        looks(cross_entropy)
    assert not packed


@pytest.mark.gpu
def test_on_a_gpu():
    before = torch.cuda.get_rng_state()
    outputs, rows = ({name: t.cuda() for name, t in named.items()} for named in sample())
    options = {"name": "score_fn", "functions": [], "row_wise": True, "twice": True, "wanted": ("outputs",)}
    look(lambda o, r, c: cross_entropy(o["outputs"], r), outputs, rows, {}, **options)
    for function, message in ((drops_out, "the same values"), (minus_mean, "a value of its own")):
        with pytest.raises(ValueError, match=message):
            look(lambda o, r, c, function=function: function(o["outputs"], r), outputs, rows, {}, **options)
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_a_look_takes_a_moment():
    looks(cross_entropy)
    start = time.perf_counter()
    for _ in range(20):
        looks(cross_entropy, twice=True)
    assert (time.perf_counter() - start) / 20 < 0.02, sys.version


def test_ignored_labels_under_a_name_that_is_no_target_bring_a_warning():
    def of_labels(outputs, rows):
        return F.cross_entropy(outputs, rows["labels"], reduction="none")

    torch.manual_seed(0)
    x, labels = Projection(torch.randn(6, 4), torch.randn(9, 4)), torch.tensor([1, -100, 3, 4, -100, 8])
    with pytest.warns(UserWarning, match=r"targets=\('labels',\) drops those rows"):
        FlexChunkLoss(of_labels)(x, {"labels": labels})
    FlexChunkLoss(of_labels, targets=())(x, {"labels": labels})
    expected = F.cross_entropy(x.input @ x.weight.T, labels)
    torch.testing.assert_close(FlexChunkLoss(of_labels, targets=("labels",))(x, {"labels": labels}).loss, expected)
