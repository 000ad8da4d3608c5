"""Bad input is refused before any work, with what was expected and what came."""

from __future__ import annotations

import pytest
import torch
from engine_zoo import CrossEntropy, Preference, Ranked, TwoSided

from chunked_embed import FlexChunkLoss, Projection
from chunked_embed import functional as CF

M, H, V = 6, 4, 9
nan = float("nan")


def projection(**change):
    return Projection(**({"input": torch.randn(M, H), "weight": torch.randn(V, H)} | change))


def cross_entropy(x=None, target=None, **arguments):
    target = torch.zeros(M, dtype=torch.long) if target is None else target
    return lambda: CrossEntropy(compiled=False)(projection() if x is None else x, {"target": target}, **arguments)


def preference(segments, **arguments):
    sides = {"policy": projection(), "reference": projection()}
    rows = {"target": torch.zeros(M, dtype=torch.long)}
    return lambda: Preference(compiled=False)(sides, rows, segments=segments, **arguments)


def plain(function, *projections, **arguments):
    return lambda: FlexChunkLoss(function, compiled=False)(*(projections or (projection(),)), **arguments)


def raising(message):
    def function(outputs, rows):
        raise AssertionError(message)

    return function


def closing_over(tensor):
    return lambda outputs, rows: (outputs * tensor).sum(1)


ids = torch.tensor([0, 0, 1, 2, 3, 3])
CASES = {
    "not a projection": (lambda: CrossEntropy()(torch.randn(M, H)), TypeError, "Projection"),
    "no projections": (lambda: CrossEntropy()({}), ValueError, "at least one projection"),
    "empty batch": (cross_entropy(projection(input=torch.randn(0, H))), ValueError, "at least one row"),
    "one dimension": (cross_entropy(projection(input=torch.randn(H))), ValueError, r"\(\.\.\., H\)"),
    "hidden sizes": (cross_entropy(projection(weight=torch.randn(V, 5))), ValueError, r"\(V, 4\).*got \(9, 5\)"),
    "weight dimensions": (cross_entropy(projection(weight=torch.randn(V))), ValueError, r"got \(9,\)"),
    "bias": (cross_entropy(projection(bias=torch.randn(V + 1))), ValueError, r"bias of shape \(9,\), got \(10,\)"),
    "bias alone": (cross_entropy(projection(weight=None, bias=torch.randn(H))), ValueError, "without a weight"),
    "extra term": (
        cross_entropy(projection(extra=((torch.randn(M, 2), torch.randn(V - 1, 2)),))),
        ValueError,
        r"extra term 1.*\(9, 2\).*got \(8, 2\)",
    ),
    "integer input": (cross_entropy(projection(input=torch.ones(M, H).long())), TypeError, "floating point"),
    "mixed dtypes": (cross_entropy(projection(weight=torch.randn(V, H).double())), TypeError, "float64"),
    "device": (cross_entropy(projection(weight=torch.empty(V, H, device="meta"))), ValueError, "on cpu, got meta"),
    "rows": (cross_entropy(target=torch.zeros(M + 1).long()), ValueError, r"rows\['target'\] of shape \(6, \.\.\.\)"),
    "rows are tensors": (plain(raising("ran"), rows={"target": [1, 2]}), TypeError, "tensor, got list"),
    "target too large": (cross_entropy(target=torch.full((M,), V)), ValueError, r"in \[0, 9\)"),
    "target negative": (cross_entropy(target=torch.full((M,), -1)), ValueError, r"in \[0, 9\)"),
    "columns": (plain(raising("ran"), columns={"norm": torch.ones(V - 1)}), ValueError, r"one of \[9\], got \(8,\)"),
    "row weight shape": (cross_entropy(row_weight=torch.ones(M + 1)), ValueError, r"row_weight of shape \(6,\)"),
    "row weight NaN": (cross_entropy(row_weight=torch.full((M,), nan)), ValueError, "finite row weights"),
    "row weight learns": (cross_entropy(row_weight=torch.ones(M, requires_grad=True)), ValueError, "without gradient"),
    "row-wise with segments": (cross_entropy(segments=ids), ValueError, "no segments.*row-wise"),
    "row-wise with groups": (cross_entropy(groups={"label": torch.ones(2)}), ValueError, "no groups.*row-wise"),
    "grouped with row weight": (preference(ids, row_weight=torch.ones(M)), ValueError, "no row_weight.*grouped"),
    "segments missing": (preference(None), ValueError, "expected segments"),
    "segments overrun": (preference(ids + 2, groups={"shift": torch.zeros(2)}), ValueError, "below 4.*got 5"),
    "segments skip": (preference(ids + 4 * (ids > 1)), ValueError, "without gaps.*group 1"),
    "segments not integers": (preference(ids.float()), TypeError, "integers"),
    "segments shape": (preference(ids[:-1]), ValueError, r"segments of shape \(6,\)"),
    "group lengths differ": (
        preference(ids, groups={"shift": torch.zeros(2)}, group_weight=torch.ones(3)),
        ValueError,
        "of one length",
    ),
    "number NaN": (lambda: CrossEntropy(nan)(projection(), {"target": ids}), ValueError, "scale to be a number"),
    "number learns": (
        cross_entropy(numbers={"t": torch.ones((), requires_grad=True)}),
        ValueError,
        r"numbers\['t'\] without gradient",
    ),
    "loss is a scalar": (
        plain(lambda o, r: o.sum()),
        ValueError,
        r"one value per row, \(R,\) .* got shape \(\) for R = ",
    ),
    "loss is a matrix": (plain(lambda o, r: o), ValueError, r"dict of metrics, got shape \(., 9\) for R = "),
    "loss is a float": (plain(lambda o, r: 1.0), ValueError, "got float for R = "),
    "loss is forgotten": (plain(lambda o, r: None), ValueError, "got None for R = "),
    "metric is a scalar": (plain(lambda o, r: (o.sum(1), {"m": o.sum()})), ValueError, "one entry per row"),
    "metric of another length": (
        plain(lambda o, r: (o.sum(1), {"m": o.mean(0)})),
        ValueError,
        r"one entry per row, \(6,\), got \(9,\)",
    ),
    "metric is a float": (plain(lambda o, r: (o.sum(1), {"m": 1.0})), TypeError, "'m' to be a tensor, got float"),
    "outputs changed": (plain(lambda o, r: o.mul_(2).sum(1), Projection(torch.ones(M, H))), ValueError, "in place"),
    "rows not a dict": (plain(raising("ran"), rows=torch.ones(M)), TypeError, "rows to be a dict"),
    "targets float": (
        lambda: CrossEntropy(targets=("target",))(projection(), {"target": torch.zeros(M)}),
        TypeError,
        r"rows\['target'\] to be one integer per row, got torch.float32",
    ),
    "targets a name": (lambda: CrossEntropy(targets="target"), TypeError, "tuple of names"),
    "extra not nested": (cross_entropy(projection(extra=(torch.ones(M, 2), torch.ones(V, 2)))), TypeError, "pairs"),
    "unknown option": (lambda: CrossEntropy(chunk_sise=2), TypeError, "no option 'chunk_sise'"),
    "option that is a method": (lambda: FlexChunkLoss(raising("ran"), forward=3.0), TypeError, "no option 'forward'"),
    "learnable closure": (
        plain(closing_over(torch.ones(V, requires_grad=True))),
        ValueError,
        r"what learns to be an argument of loss_fn, got tensor \(closed over\)",
    ),
    "number no tensor": (cross_entropy(numbers={"t": 1.0}), TypeError, r"numbers\['t'\] to be a tensor, got float"),
    "number not 0-d": (cross_entropy(numbers={"t": torch.ones(1)}), ValueError, r"numbers\['t'\] of shape \(\)"),
    "segments a list": (preference([0, 0, 1, 2, 3, 3]), TypeError, "segments to be a tensor, got list"),
    "input a list": (cross_entropy(projection(input=[[1.0]])), TypeError, "input to be a tensor, got list"),
    "function a name": (lambda: FlexChunkLoss("loss_fn"), TypeError, "loss_fn to be .*callable.*, got 'loss_fn'"),
    "group weight NaN": (preference(ids, group_weight=torch.full((2,), nan)), ValueError, "group_weight to be finite"),
    "no loss_fn": (lambda: FlexChunkLoss(compiled=False)(projection()), NotImplementedError, "no loss_fn"),
    "chunk_size": (lambda: CrossEntropy(chunk_size=0), ValueError, "chunk_size to be a positive integer"),
    "chunk_size float": (lambda: CrossEntropy(chunk_size=1.5), TypeError, r"or None, got 1\.5"),
    "max_chunk_bytes": (lambda: CrossEntropy(max_chunk_bytes=-1), ValueError, "max_chunk_bytes"),
    "compiled": (lambda: CrossEntropy(compiled="yes"), TypeError, "True, False or None, got 'yes'"),
    "scores of a row-wise loss": (
        lambda: CrossEntropy().scores(projection(), {"target": ids}),
        ValueError,
        "row-wise",
    ),
    "plan arguments": (lambda: CrossEntropy().plan(projection(), wieght=1), TypeError, "wieght"),
    "cosent labels": (
        lambda: CF.cosent(*torch.randn(2, M, H), torch.rand(M + 1)),
        ValueError,
        r"labels of shape \(6,\)",
    ),
    "cosent NaN": (lambda: CF.cosent(*torch.randn(2, M, H), torch.full((M,), nan)), ValueError, "without NaN"),
    "cosent scale": (lambda: CF.cosent(*torch.randn(2, M, H), torch.rand(M), scale=nan), ValueError, "scale"),
    "shapes differ": (
        lambda: CF.triplet(torch.ones(3, 2), torch.ones(3, 2), torch.ones(2, 2)),
        ValueError,
        "one shape",
    ),
    "dtypes differ": (lambda: CF.triplet(*[torch.ones(3, 2)] * 2, torch.ones(3, 2).half()), TypeError, "one dtype"),
    "cosent negative": (lambda: CF.cosent(*torch.randn(2, M, H), torch.rand(M), scale=-1), ValueError, "zero or more"),
    "distance": (lambda: CF.triplet(*torch.ones(3, 3, 2), distance="chebyshev"), ValueError, "chebyshev"),
    "similarity": (lambda: CF.pairwise_scores(*torch.ones(2, 3, 2), similarity="x"), ValueError, "one of"),
    "margin": (lambda: CF.triplet(*torch.ones(3, 3, 2), margin=nan), ValueError, "margin to be a finite number"),
    "activation": (lambda: CF.triplet(*torch.ones(3, 3, 2), activation="tanh"), TypeError, "callable"),
}


@pytest.mark.parametrize("name", list(CASES))
def test_is_refused(name):
    call, error, words = CASES[name]
    with pytest.raises(error, match=words):
        call()


def test_column_scores_need_a_coupled_loss():
    loss = TwoSided(compiled=False)
    loss.couples_batch = False
    with pytest.raises(ValueError, match="couples_batch=True"):
        loss(projection(), {"index": torch.arange(M)})


class Uncombined(TwoSided):
    def __init__(self, **options):
        super().__init__(**options)
        self.column_totals = {"column": "mean", "mass": "sum"}


class Counting(Ranked):
    def score_fn(self, outputs, rows):
        return {"count": outputs["a"].sum(1)}


class CoupledRows(FlexChunkLoss):
    def __init__(self, **options):
        super().__init__(couples_batch=True, **options)

    def loss_fn(self, outputs, rows):
        return outputs.sum(1)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Uncombined(compiled=False)(projection(), {"index": torch.arange(M)}), "logsumexp"),
        (lambda: Counting(compiled=False)({"a": projection()}, groups={"label": torch.ones(M)}), '"count"'),
        (lambda: CoupledRows(compiled=False)(projection()), "expected a score_fn"),
        (
            lambda: Ranked(compiled=False)(
                {"a": projection(), "b": projection()}, groups={"label": torch.ones(M)}, group_weight=torch.ones(M)
            ),
            "expected no group_weight",
        ),
    ],
)
def test_classes_that_contradict_themselves(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_a_coupled_loss_may_not_return_a_matrix():
    class Matrix(Ranked):
        def loss_fn(self, scores, groups):
            return scores["cosine"].expand(-1, 3)

    with pytest.raises(ValueError, match="one value per group"):
        Matrix(compiled=False)({"a": projection(), "b": projection()}, groups={"label": torch.ones(M)})


@pytest.mark.gpu
def test_another_gpu_tensor_is_refused():
    with pytest.raises(ValueError, match="on cuda:0, got cpu"):
        cross_entropy(projection(input=torch.randn(M, H, device="cuda")))()
