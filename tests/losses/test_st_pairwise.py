"""The losses on pairwise scores against the library's own classes: loss and gradients in float64."""

from __future__ import annotations

import functools
import json
import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from sentence_transformers import util
from sentence_transformers.sentence_transformer import losses as library
from sentence_transformers.sentence_transformer.losses import SiameseDistanceMetric
from sentence_transformers.sentence_transformer.modules import Normalize
from st_parts import EXACT, assert_same, build, dense, features, labels_for, static_model, value_and_grads
from torch import Tensor, nn

from chunked_embed import functional as CF
from chunked_embed import losses


class L3(nn.Module):
    """A distance of the user's own."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (a - b).abs().pow(3).sum(-1)


class Affine(nn.Module):
    """A transformation that learns."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
        self.shift = nn.Parameter(torch.tensor(-0.25, dtype=torch.float64))

    def forward(self, scores: Tensor) -> Tensor:
        return scores * self.scale + self.shift


class Weighted(nn.Module):
    """A loss that learns."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, scores: Tensor, labels: Tensor) -> Tensor:
        return (self.weight * (scores - labels).square()).mean() + self.weight.log()


def scaled_dot(a: Tensor, b: Tensor, factor: float = 1.0) -> Tensor:
    return factor * (a * b).sum(-1)


class Case(NamedTuple):
    name: str
    args: tuple = ()
    columns: int = 2
    kinds: tuple[str, ...] = ("random", "tied", "equal", "column")
    kwargs: dict[str, Any] = {}

    def arguments(self) -> tuple:
        """Modules that learn are made anew for each loss."""
        return tuple(arg() if arg in (Affine, Weighted) else arg for arg in self.args)

    def ours(self, model: nn.Module, **options) -> nn.Module:
        return getattr(losses, self.name)(model, *self.arguments(), **{"compiled": False, **self.kwargs, **options})

    def theirs(self, model: nn.Module) -> nn.Module:
        return getattr(library, self.name)(model, *self.arguments(), **self.kwargs)


BINARY = ("binary", "equal", "zero")
EUCLIDEAN, MANHATTAN = SiameseDistanceMetric.EUCLIDEAN, SiameseDistanceMetric.MANHATTAN
CASES = {
    "cosine": Case("CosineSimilarityLoss"),
    "cosine-tanh": Case("CosineSimilarityLoss", (nn.MSELoss(), nn.Tanh())),
    "cosine-sum": Case("CosineSimilarityLoss", (nn.L1Loss(reduction="sum"),)),
    "cosine-learns": Case("CosineSimilarityLoss", (Weighted, Affine)),
    "contrastive": Case("ContrastiveLoss", kinds=BINARY),
    "contrastive-euclidean": Case("ContrastiveLoss", (EUCLIDEAN, 2.5), kinds=BINARY),
    "contrastive-manhattan": Case("ContrastiveLoss", (MANHATTAN, 6), kinds=BINARY),
    "contrastive-sum": Case("ContrastiveLoss", kinds=BINARY, kwargs={"size_average": False}),
    "contrastive-module": Case("ContrastiveLoss", (L3(), 9.0), kinds=BINARY),
    "online": Case("OnlineContrastiveLoss", kinds=BINARY),
    "online-euclidean": Case("OnlineContrastiveLoss", (EUCLIDEAN, 4.0), kinds=BINARY),
    "online-manhattan": Case("OnlineContrastiveLoss", (MANHATTAN, 9), kinds=BINARY),
    "online-module": Case("OnlineContrastiveLoss", (L3(), 9.0), kinds=BINARY),
    "margin": Case("MarginMSELoss", columns=3, kinds=("random", "column", "two")),
    "margin-negatives": Case("MarginMSELoss", columns=4, kinds=("two", "three")),
    "margin-cosine": Case("MarginMSELoss", (util.pairwise_cos_sim,), columns=4, kinds=("three",)),
    "margin-euclidean": Case("MarginMSELoss", (util.pairwise_euclidean_sim,), columns=3, kinds=("two",)),
    "margin-manhattan": Case("MarginMSELoss", (util.pairwise_manhattan_sim,), columns=3, kinds=("two",)),
    "margin-partial": Case("MarginMSELoss", (functools.partial(scaled_dot, factor=0.5),), columns=4, kinds=("two",)),
    "distill": Case("DistillKLDivLoss", columns=3, kinds=("two",)),
    "distill-three": Case("DistillKLDivLoss", columns=4, kinds=("three",), kwargs={"temperature": 2.5}),
    "distill-cosine": Case("DistillKLDivLoss", (util.pairwise_cos_sim, 0.05), columns=4, kinds=("three",)),
    "distill-partial": Case("DistillKLDivLoss", (functools.partial(scaled_dot, factor=0.5),), 3, ("two",)),
}
if EXACT:  # 5.x has one temperature for both sides
    temperatures = {"temperature": 2.0, "student_temperature": 0.5, "teacher_temperature": 3.0}
    CASES["distill-temperatures"] = Case("DistillKLDivLoss", columns=4, kinds=("three",), kwargs=temperatures)
    CASES["distill-student"] = Case("DistillKLDivLoss", (scaled_dot, 1.0, 0.5), columns=3, kinds=("two",))
ONE_EACH = ["cosine", "contrastive", "online", "margin", "distill"]
OTHERS = ["cosine-learns", "contrastive-manhattan", "online-module", "margin-negatives", "distill-three"]


def embeddings(rows: int, columns: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return [torch.randn(rows, 6, generator=generator, dtype=dtype, requires_grad=True) for _ in range(columns)]


def from_embeddings(loss: nn.Module, columns: list[Tensor], labels: Tensor | None) -> tuple[Tensor, dict]:
    """Gradients of the embeddings and of what learns in the loss."""
    value = loss.compute_loss_from_embeddings(columns, labels)
    wanted = {str(i): column for i, column in enumerate(columns)} | dict(loss.named_parameters())
    grads = torch.autograd.grad(1.5 * value, list(wanted.values()))
    return value.detach(), dict(zip(wanted, grads))


def with_own(loss: nn.Module, model: nn.Module, batch: list, labels: Tensor) -> tuple[Tensor, dict]:
    """Gradients of the model and of what learns in the loss."""
    value, grads = value_and_grads(loss, model, batch, labels, upstream=2.0)
    own = {f"own.{k}": p.grad.clone() for k, p in loss.named_parameters() if not k.startswith("model.")}
    return value, grads | own


@pytest.mark.parametrize("rows", [1, 2, 33])
@pytest.mark.parametrize("case", CASES)
def test_embeddings(case: str, rows: int) -> None:
    case_ = CASES[case]
    columns = embeddings(rows, case_.columns)
    for kind in case_.kinds:
        if not EXACT and (case_.name, rows, kind) == ("OnlineContrastiveLoss", 2, "binary"):
            continue  # 5.x takes a single pair of the other kind for none
        labels = labels_for(kind, rows)
        ours = from_embeddings(case_.ours(nn.Identity(), chunk_size=8), columns, labels)
        assert_same(ours, from_embeddings(case_.theirs(nn.Identity()), columns, labels), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"mini_batch_size": 4}, {"fuse_projection": False}], ids=str)
@pytest.mark.parametrize("case", [*ONE_EACH, *OTHERS, "distill-cosine"])
def test_model(case: str, options: dict, transformer_dir: str) -> None:
    case_ = CASES[case]
    model = build(transformer_dir, dense(), Normalize())
    batch, labels = features(model, 9, case_.columns), labels_for(case_.kinds[-1], 9)
    if not options and "module" not in case:
        options = {"fuse_projection": True}
    ours = with_own(case_.ours(model, **options), model, batch, labels)
    assert_same(ours, with_own(case_.theirs(model), model, batch, labels))


@pytest.mark.parametrize("case", ONE_EACH)
def test_token_budget_and_static_embedding(case: str) -> None:
    case_, model = CASES[case], static_model()
    batch, labels = features(model, 9, case_.columns), labels_for(case_.kinds[0], 9)
    expected = value_and_grads(case_.theirs(model), model, batch, labels)
    for options in ({"mini_batch_num_tokens": 20}, {"mini_batch_size": 4}):
        assert_same(value_and_grads(case_.ours(model, **options), model, batch, labels), expected)


@pytest.mark.parametrize("kinds", ["binary", "zero", "equal"])
def test_every_step_of_accumulation_trains_the_loss(kinds: str, transformer_dir: str) -> None:
    """What learns in the loss gets its gradient in backward, scaled like the model's, and none without it."""
    model = build(transformer_dir, dense())
    batch, labels = features(model, 6, 2), labels_for(kinds, 6).double()
    ours, theirs = CASES["cosine-learns"].ours(model, mini_batch_size=2), CASES["cosine-learns"].theirs(model)
    ours([dict(column) for column in batch], labels)
    own = [ours.loss_fct.weight, *ours.cos_score_transformation.parameters()]
    assert all(parameter.grad is None for parameter in own)
    for loss in (ours, theirs):
        for upstream in (0.5, 2.0):
            (upstream * loss([dict(column) for column in batch], labels)).backward()
    expected = [theirs.loss_fct.weight, *theirs.cos_score_transformation.parameters()]
    for parameter, other in zip(own, expected, strict=True):
        torch.testing.assert_close(parameter.grad, other.grad)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["online-euclidean", "contrastive", "distill-three", "cosine", "margin-negatives"])
def test_compiled(case: str, transformer_dir: str) -> None:
    case_ = CASES[case]
    model = build(transformer_dir, dense(), Normalize(), dtype=torch.float32)
    batch, labels = features(model, 9, case_.columns), labels_for(case_.kinds[0], 9).float()
    ours = value_and_grads(case_.ours(model, compiled=True), model, batch, labels)
    theirs = value_and_grads(case_.theirs(model), model, batch, labels)
    assert_same(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", [*ONE_EACH, "online-module", "margin-partial", "distill-cosine"])
def test_half_inputs_give_a_float32_loss(case: str, dtype: torch.dtype) -> None:
    case_ = CASES[case]
    columns, labels = embeddings(9, case_.columns, dtype), labels_for(case_.kinds[0], 9)
    value, grads = from_embeddings(case_.ours(nn.Identity()), columns, labels)
    wide = [column.detach().double().requires_grad_() for column in columns]
    expected, exact = from_embeddings(case_.theirs(nn.Identity()), wide, labels)
    assert value.dtype == torch.float32
    fused = not case.endswith(("-module", "-partial"))  # a callable of the user's own computes in half precision
    close = {"rtol": 1e-5, "atol": 1e-5} if fused else {"rtol": 0.1, "atol": 0.1}
    torch.testing.assert_close(value.double(), expected, **close)
    for name, grad in grads.items():
        assert grad.dtype == dtype
        torch.testing.assert_close(grad.double(), exact[name], rtol=0.02, atol=0.02 * float(exact[name].abs().max()))


@pytest.mark.parametrize("case", ONE_EACH)
def test_no_grad(case: str, transformer_dir: str) -> None:
    case_ = CASES[case]
    model = build(transformer_dir, dense(), Normalize()).eval()
    batch, labels = features(model, 5, case_.columns), labels_for(case_.kinds[0], 5)
    with torch.no_grad():
        expected = case_.theirs(model)([dict(column) for column in batch], labels)
        for options in ({}, {"mini_batch_size": 2}):
            value = case_.ours(model, **options)([dict(column) for column in batch], labels)
            assert not value.requires_grad
            torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("case", CASES)
def test_config(case: str) -> None:
    case_ = CASES[case]
    ours = case_.ours(nn.Identity(), compiled=None).get_config_dict()
    json.dumps(ours)
    if EXACT:
        assert ours == case_.theirs(nn.Identity()).get_config_dict()
    assert case_.ours(nn.Identity(), mini_batch_size=8).get_config_dict() == {
        **ours, "mini_batch_size": 8, "compiled": False,
    }  # fmt: skip


def test_is_the_librarys_class() -> None:
    for case in ONE_EACH:
        ours, theirs = CASES[case].ours(nn.Identity()), CASES[case].theirs(nn.Identity())
        assert isinstance(ours, type(theirs)) and ours.uses_gradient_cache is False
        assert getattr(ours, "citation", None) == getattr(theirs, "citation", None)
    assert losses.SiameseDistanceMetric is SiameseDistanceMetric


# --- edge cases ---


@pytest.mark.parametrize("case", [*ONE_EACH, "contrastive-euclidean", "online-manhattan", "distill-cosine"])
def test_coinciding_zero_and_huge_embeddings(case: str) -> None:
    case_ = CASES[case]
    for fill in (0.0, 1.0, 1e4):
        columns = [torch.full((6, 6), fill, dtype=torch.float64, requires_grad=True) for _ in range(case_.columns)]
        for kind in case_.kinds:
            labels = labels_for(kind, 6)
            ours = from_embeddings(case_.ours(nn.Identity()), columns, labels)
            theirs = from_embeddings(case_.theirs(nn.Identity()), columns, labels)
            assert ours[0].isfinite() and all(grad.isfinite().all() for grad in ours[1].values())
            if case != "online" or not fill:  # distances are rounding errors there, of which some are hard
                assert_same(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", [*ONE_EACH, "contrastive-euclidean", "distill-cosine"])
def test_zeros_on_one_side(case: str) -> None:
    """Where the norm has its floor, so has the gradient its greatest size: 1e8 for torch's cosine."""
    case_ = CASES[case]
    columns = embeddings(6, case_.columns)
    columns[0] = torch.zeros_like(columns[0], requires_grad=True)
    labels = labels_for(case_.kinds[0], 6)
    ours = from_embeddings(case_.ours(nn.Identity()), columns, labels)
    assert_same(ours, from_embeddings(case_.theirs(nn.Identity()), columns, labels), rtol=1e-9, atol=1e-9)


def test_pairs_on_the_threshold_are_not_hard() -> None:
    """A positive and a negative at one distance: neither is beyond the other. Without a hard pair the loss is zero."""
    a = torch.eye(4, dtype=torch.float64).requires_grad_()
    b = torch.zeros(4, 4, dtype=torch.float64, requires_grad=True)
    case = CASES["online-euclidean"]
    for kinds in ([1, 0, 1, 0], [1, 0, 0, 0], [1, 1, 1, 0]):
        ours = from_embeddings(case.ours(nn.Identity()), [a, b], torch.tensor(kinds))
        if EXACT:  # as above
            assert_same(ours, from_embeddings(case.theirs(nn.Identity()), [a, b], torch.tensor(kinds)))
        assert ours[0] == 0 and not any(grad.any() for grad in ours[1].values())


def test_hard_pairs_of_one_kind_are_mined_over_the_batch() -> None:
    columns = embeddings(12, 2)
    for kind in ("equal", "zero"):
        loss = losses.OnlineContrastiveLoss(nn.Identity(), EUCLIDEAN, 9.0, compiled=False, chunk_size=3)
        value, grads = from_embeddings(loss, columns, labels_for(kind, 12))
        used = grads["0"].any(1)
        assert value > 0 and 0 < used.sum() < 12  # beyond the mean of their own kind


def test_teacher_may_leave_a_candidate_out() -> None:
    columns, labels = embeddings(5, 4), labels_for("three", 5)
    labels[:, 2] = -math.inf
    ours = from_embeddings(losses.DistillKLDivLoss(nn.Identity(), compiled=False), columns, labels)
    assert ours[0].isfinite()
    assert_same(ours, from_embeddings(library.DistillKLDivLoss(nn.Identity()), columns, labels))


@pytest.mark.skipif(not EXACT, reason="the library's warning came with 6.x")
def test_teacher_scale_is_warned_about_once(caplog: pytest.LogCaptureFixture) -> None:
    loss = losses.DistillKLDivLoss(nn.Identity(), teacher_temperature=0.01, compiled=False)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            loss.compute_loss_from_embeddings(embeddings(5, 3), 30 * labels_for("two", 5).float())
    assert sum("teacher_temperature=0.01" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("case", ["contrastive", "online"])
def test_labels_between_are_warned_about_once(case: str) -> None:
    columns, labels = embeddings(9, 2), labels_for("tied", 9)
    ours, theirs = CASES[case].ours(nn.Identity()), CASES[case].theirs(nn.Identity())
    with pytest.warns(UserWarning, match="other than 0 and 1"):
        mine = from_embeddings(ours, columns, labels)
    from_embeddings(ours, columns, labels)  # a second warning would be an error
    theirs._checked_labels = True
    assert_same(mine, from_embeddings(theirs, columns, labels))


def test_labels_may_be_bool_or_float32() -> None:
    columns, labels = embeddings(9, 2), labels_for("bool", 9)
    for case in ("cosine", "contrastive", "online"):
        expected = from_embeddings(CASES[case].theirs(nn.Identity()), columns, labels.int())
        for given in (labels, labels.float(), labels.double()[:, None]):
            assert_same(from_embeddings(CASES[case].ours(nn.Identity()), columns, given), expected)


@pytest.mark.parametrize("loss_fct", [nn.HuberLoss(delta=0.3), nn.BCEWithLogitsLoss()], ids=str)
def test_losses_that_want_one_dtype(loss_fct: nn.Module) -> None:
    """The library's labels are float32: beside float64 scores, some of torch's losses fail or return float32."""
    columns, labels = embeddings(9, 2), labels_for("random", 9).float()
    ours = from_embeddings(losses.CosineSimilarityLoss(nn.Identity(), loss_fct, compiled=False), columns, labels)
    expected = loss_fct(torch.cosine_similarity(*columns), labels.double())
    grads = torch.autograd.grad(1.5 * expected, columns)
    assert_same(ours, (expected.detach(), dict(zip("01", grads))))


def test_teacher_in_float32() -> None:
    for case, kind in (("margin-negatives", "three"), ("distill-three", "three")):
        columns, labels = embeddings(9, 4), labels_for(kind, 9).float()
        theirs = from_embeddings(CASES[case].theirs(nn.Identity()), columns, labels)
        ours = from_embeddings(CASES[case].ours(nn.Identity()), columns, labels)
        assert_same(ours, theirs, rtol=1e-7, atol=1e-7)  # the library takes logarithms of the teacher in float32


def test_matryoshka_around_them(transformer_dir: str) -> None:
    for case, kind in (("cosine", "random"), ("online", "binary"), ("margin", "two"), ("distill", "two")):
        case_, model = CASES[case], build(transformer_dir, dense())
        batch, labels = features(model, 7, case_.columns), labels_for(kind, 7)
        theirs = library.MatryoshkaLoss(model, case_.theirs(model), [12, 6])
        expected = value_and_grads(theirs, model, batch, labels)
        for options in ({}, {"mini_batch_size": 3}):
            ours = losses.MatryoshkaLoss(model, case_.ours(model, **options), [12, 6])
            assert_same(value_and_grads(ours, model, batch, labels), expected)


# --- several candidates in one pass ---


@pytest.mark.parametrize("similarity", list(CF.SIMILARITIES))
def test_candidates_together_are_candidates_apart(similarity: str) -> None:
    query, *candidates = embeddings(9, 4)
    options = {"similarity": similarity, "compiled": False, "chunk_size": 4}
    together = CF.pairwise_scores(query, candidates, **options)
    apart = torch.stack([CF.pairwise_scores(query, each, **options) for each in candidates], dim=1)
    weights = torch.randn_like(together)
    sides = [query, *candidates]
    torch.testing.assert_close(together, apart)
    grads = [torch.autograd.grad((scores * weights).sum(), sides) for scores in (together, apart)]
    torch.testing.assert_close(*grads)


BAD_CALLS: dict[str, tuple[Callable, str]] = {
    "few labels": (lambda x: call("CosineSimilarityLoss", x[:2], torch.ones(3)), "expects 4 labels"),
    "no labels": (lambda x: call("ContrastiveLoss", x[:2], None), "requires labels"),
    "no teacher": (lambda x: call("DistillKLDivLoss", x[:3], None), "requires labels"),
    "NaN labels": (lambda x: call("OnlineContrastiveLoss", x[:2], torch.full((4,), torch.nan)), "without NaN"),
    "NaN teacher": (lambda x: call("MarginMSELoss", x[:3], torch.full((4,), torch.nan)), "without NaN"),
    "one column": (lambda x: call("CosineSimilarityLoss", x[:1], torch.ones(4)), "two columns"),
    "one column, online": (lambda x: call("OnlineContrastiveLoss", x[:1], torch.ones(4)), "two columns"),
    "three columns": (lambda x: call("ContrastiveLoss", x[:3], torch.ones(4)), "two columns.*got 3"),
    "no negative": (lambda x: call("MarginMSELoss", x[:2], torch.ones(4)), "got 2 columns"),
    "one candidate": (lambda x: call("DistillKLDivLoss", x[:2], torch.ones(4, 1)), "got 2 columns"),
    "margins": (lambda x: call("MarginMSELoss", x, torch.ones(4, 4)), r"\(4, 2\).*\(4, 3\).*got \(4, 4\)"),
    "margins in a row": (lambda x: call("MarginMSELoss", x, torch.ones(4)), r"got \(4,\)"),
    "teacher": (lambda x: call("DistillKLDivLoss", x, torch.ones(4, 2)), r"\(4, 3\), got \(4, 2\)"),
    "a matrix": (
        lambda x: call("ContrastiveLoss", x[:2], torch.ones(4), distance_metric=util.cos_sim),
        r"distance_metric to return one score for each pair, \(4,\), got \(4, 4\)",
    ),
    "margin": (lambda x: losses.ContrastiveLoss(nn.Identity(), margin=math.nan), "margin to be a finite number"),
    "margin, online": (
        lambda x: losses.OnlineContrastiveLoss(nn.Identity(), margin=math.inf),
        "margin to be a finite number",
    ),
    "temperature": (lambda x: losses.DistillKLDivLoss(nn.Identity(), temperature=0.0), "temperature"),
    "student": (lambda x: losses.DistillKLDivLoss(nn.Identity(), student_temperature=-1.0), "student_temperature"),
    "teacher's": (lambda x: losses.DistillKLDivLoss(nn.Identity(), teacher_temperature=math.inf), "teacher_temper"),
    "eps": (lambda x: CF.pairwise_scores(*x[:2], eps=-1.0), "eps"),
    "eps of dot": (lambda x: CF.pairwise_scores(*x[:2], similarity="dot", eps=1e-6), "eps"),
    "no candidates": (lambda x: CF.pairwise_scores(x[0], []), "at least one"),
}


def call(name: str, columns: list[Tensor], labels: Tensor | None, **options) -> Tensor:
    return getattr(losses, name)(nn.Identity(), **options).compute_loss_from_embeddings(columns, labels)


@pytest.mark.parametrize("bad", BAD_CALLS)
def test_refuses(bad: str) -> None:
    function, message = BAD_CALLS[bad]
    with pytest.raises(ValueError, match=message):
        function(embeddings(4, 4))
