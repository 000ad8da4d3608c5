"""Every class of the library's ``losses``, ours beside theirs: numbers, overrides, attributes, config, pickling."""

from __future__ import annotations

import copy
import pickle
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from sentence_transformers import SentenceTransformer, util
from sentence_transformers.sentence_transformer import losses as library
from sentence_transformers.sentence_transformer.losses import SiameseDistanceMetric, TripletDistanceMetric
from st_parts import EXACT, HIDDEN, assert_same, build, features, labels_for
from torch import Tensor, nn

from chunked_embed import losses
from chunked_embed.losses import ChunkedLoss
from chunked_embed.losses._tail import NO_TAIL

ROWS = 7
DIMS = [HIDDEN, 4]

HANDED_THROUGH = {
    "AdaptiveLayerLoss",
    "ContrastiveTensionDataLoader",
    "ContrastiveTensionLoss",
    "EmbedDistillLoss",
    "MSELoss",
    "SiameseDistanceMetric",
    "SoftmaxLoss",
    "TripletDistanceMetric",
}
SAME_OBJECT = {*HANDED_THROUGH, "BatchHardTripletLossDistanceFunction"}


class Case(NamedTuple):
    columns: int
    labels: str | None = None
    args: Callable[[SentenceTransformer, SentenceTransformer], tuple] = lambda model, guide: ()
    keywords: dict[str, Any] = {}
    one_by_one: bool = True  # can be computed at several widths


def guided(model: SentenceTransformer, guide: SentenceTransformer) -> tuple:
    return (guide, 0.1)


CASES = {
    "AnglELoss": Case(2, "tied"),
    "BatchAllTripletLoss": Case(1, "binary"),
    "BatchHardSoftMarginTripletLoss": Case(1, "binary"),
    "BatchHardTripletLoss": Case(1, "binary"),
    "BatchSemiHardTripletLoss": Case(1, "binary"),
    "CachedGISTEmbedLoss": Case(3, args=guided, keywords={"mini_batch_size": 3, "margin": 0.01}),
    "CachedMultipleNegativesRankingLoss": Case(3, keywords={"mini_batch_size": 3}),
    "CachedMultipleNegativesSymmetricRankingLoss": Case(2, keywords={"mini_batch_size": 3}),
    "CoSENTLoss": Case(2, "tied"),
    "ContrastiveLoss": Case(2, "binary"),
    "CosineSimilarityLoss": Case(2, "random"),
    "DistillKLDivLoss": Case(3, "two"),
    "GISTEmbedLoss": Case(3, args=guided, keywords={"margin": 0.01}),
    "GlobalOrthogonalRegularizationLoss": Case(2, one_by_one=False),
    "MarginMSELoss": Case(3, "random"),
    "MegaBatchMarginLoss": Case(2, keywords={"mini_batch_size": 3}),
    "MultipleNegativesRankingLoss": Case(3),
    "MultipleNegativesSymmetricRankingLoss": Case(2),
    "OnlineContrastiveLoss": Case(2, "binary"),
    "TripletLoss": Case(3),
}
AROUND = {"MatryoshkaLoss", "Matryoshka2dLoss"}  # tests/losses/test_st_matryoshka.py has them around all
ELSEWHERE = {"ContrastiveTensionLossInBatchNegatives", "DenoisingAutoEncoderLoss"}  # with tests of their own
CACHED = {name for name, case in CASES.items() if "mini_batch_size" in case.keywords}


@pytest.fixture(scope="module")
def model(transformer_dir: str) -> SentenceTransformer:
    return build(transformer_dir)


@pytest.fixture(scope="module")
def guide(transformer_dir: str) -> SentenceTransformer:
    guide = build(transformer_dir)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.3 * torch.sin(torch.arange(parameter.numel()).double().view_as(parameter)))
    return guide


ways = [{"compiled": False}, *([{}] if EXACT else [])]
both_ways = pytest.mark.parametrize("make", ways, ids=["ours", "small"][: len(ways)], indirect=True)
"""With our computation, and with that of small batches, which is the library's."""


@pytest.fixture
def make(
    request: pytest.FixtureRequest, model: SentenceTransformer, guide: SentenceTransformer
) -> Callable[..., nn.Module]:
    given = getattr(request, "param", {"compiled": False})

    def make(kind: type, name: str, **options: Any) -> nn.Module:
        """A loss of this class, a subclass of the one that the case is of, ours without compiling."""
        ours = given if issubclass(kind, ChunkedLoss) else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return kind(model, *CASES[name].args(model, guide), **CASES[name].keywords, **ours, **options)

    return make


def batch(model: SentenceTransformer, name: str) -> tuple[list[dict[str, Tensor]], Tensor | None]:
    case = CASES[name]
    return features(model, ROWS, case.columns), None if case.labels is None else labels_for(case.labels, ROWS)


def run(loss: nn.Module, model: SentenceTransformer, name: str) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    found = loss(*batch(model, name))
    value = torch.stack(list(found.values())).sum() if isinstance(found, dict) else found
    value.backward()
    return value.detach(), {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


# --- names -----------------------------------------------------------------------------------------------------------


def test_every_name() -> None:
    assert set(library.__all__) <= set(losses.__all__) <= set(dir(losses))
    for name in library.__all__:
        assert (getattr(losses, name) is getattr(library, name)) == (name in SAME_OBJECT), name
    classes = {name for name in library.__all__ if issubclass(getattr(library, name), nn.Module)}
    assert classes - HANDED_THROUGH == {*CASES, *AROUND, *ELSEWHERE}


@pytest.mark.parametrize("name", [name for name in library.__all__ if name not in SAME_OBJECT])
def test_is_the_librarys(name: str) -> None:
    assert issubclass(getattr(losses, name), getattr(library, name))


def test_a_name_of_a_later_version(monkeypatch: pytest.MonkeyPatch) -> None:
    later = type("LaterLoss", (nn.Module,), {})
    monkeypatch.setattr(library, "LaterLoss", later, raising=False)
    monkeypatch.setattr(library, "__all__", [*library.__all__, "LaterLoss"])
    try:
        assert losses.LaterLoss is later
    finally:
        vars(losses).pop("LaterLoss", None)
    with pytest.raises(AttributeError, match="it has AdaptiveLayerLoss"):
        losses.NoLoss  # noqa: B018


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_plain_and_cached(name: str, make: Callable, model: SentenceTransformer) -> None:
    try:
        theirs = run(make(getattr(library, name), name), model, name)
    except RuntimeError as error:  # labels that it casts to float32, in a float64 model under torch 2.11
        if "Found dtype Float but expected Double" not in str(error):
            raise
        pytest.skip(f"the library's own: {error}")
    assert theirs[1]
    assert_same(run(make(getattr(losses, name), name), model, name), theirs)
    later = make(getattr(losses, name), name)
    later.mini_batch_size = None if name in CACHED else 3
    assert later.uses_gradient_cache is (name not in CACHED)
    assert_same(run(later, model, name), theirs)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_matryoshka_around(name: str, make: Callable, model: SentenceTransformer) -> None:
    inner = make(getattr(losses, name), name)
    if not CASES[name].one_by_one:
        for options in ({}, {"mini_batch_size": 3}):
            with pytest.raises(ValueError, match="dict"):
                losses.MatryoshkaLoss(model, inner, DIMS, **options)
        return
    theirs = run(library.MatryoshkaLoss(model, make(getattr(library, name), name), DIMS), model, name)
    assert_same(run(losses.MatryoshkaLoss(model, inner, DIMS), model, name), theirs)
    inner.mini_batch_size = None
    assert_same(run(losses.MatryoshkaLoss(model, inner, DIMS, mini_batch_size=3), model, name), theirs)


# --- what a user replaces --------------------------------------------------------------------------------------------


def subclass(kind: type, **members: Any) -> type:
    with warnings.catch_warnings():  # two classes of the library's are deprecated
        warnings.simplefilter("ignore", DeprecationWarning)
        return type(f"My{kind.__name__}", (kind,), {"__module__": __name__, **members})


def read_by(kind: type, name: str, make: Callable, model: SentenceTransformer) -> list[str]:
    """What a loss of the library's asks itself for, from its call to the end of the backward pass."""
    seen: dict[str, None] = {}

    def see(self: Any, attribute: str) -> Any:
        seen[attribute] = None
        return super(watched, self).__getattribute__(attribute)

    watched = subclass(kind, __getattribute__=see)
    loss = make(watched, name)
    seen.clear()
    run(loss, model, name)
    return [attribute for attribute in seen if not attribute.startswith("_")]


def changed(value: Any) -> Any:
    """Tensors of any shape and structure; the direction of embeddings, too."""
    if isinstance(value, Tensor):
        return value.sin()
    if isinstance(value, dict):
        return {key: changed(part) for key, part in value.items()}
    if isinstance(value, types.GeneratorType):
        return (changed(item) for item in value)
    # Of the library's guided loss the second item is the guide's, whose embeddings have a method of their own here.
    return (changed(value[0]), *value[1:]) if isinstance(value, tuple) else value


def overriding(kind: type, method: str) -> type:
    """A subclass whose method gives something else."""

    def instead(self: Any, *args: Any, **kwargs: Any) -> Any:
        return changed(getattr(super(mine, self), method)(*args, **kwargs))

    mine = subclass(kind, **{method: instead})
    return mine


REFUSED = {"calculate_loss_and_cache_gradients"}


@pytest.mark.slow
@both_ways
@pytest.mark.parametrize("name", CASES)
def test_subclassed(name: str, make: Callable, model: SentenceTransformer) -> None:
    """Each method that the library's class goes through, in a subclass that changes what it gives."""
    theirs, ours = getattr(library, name), getattr(losses, name)
    plain = run(make(theirs, name), model, name)
    methods = [m for m in read_by(theirs, name, make, model) if callable(getattr(theirs, m, None))]
    methods = [m for m in methods if getattr(theirs, m) is not getattr(nn.Module, m, None)]
    if "compute_loss_from_embeddings" not in methods:
        methods.append("compute_loss_from_embeddings" if not hasattr(theirs, "compute_loss_from_embeddings") else "")
    for method in filter(None, methods):
        if method in REFUSED:
            with pytest.raises(TypeError, match=method):
                run(make(overriding(ours, method), name), model, name)
            continue
        found = run(make(overriding(ours, method), name), model, name)
        if not hasattr(theirs, method):  # a method of ours alone
            torch.testing.assert_close(found[0], plain[0].sin())
            continue
        expected = run(make(overriding(theirs, method), name), model, name)
        assert not torch.equal(expected[0], plain[0]), method
        assert_same(found, expected)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "mini_batch_size" in case.keywords])
@pytest.mark.parametrize("way", ["a pull before", "a pull after", "of other embeddings"])
def test_a_calculate_loss_of_the_users_own(way: str, name: str, make: Callable, model: SentenceTransformer) -> None:
    """Whose terms pull at the embeddings by themselves, and whose embeddings are made of those that it gets."""

    def pull(reps: list[list[Tensor]]) -> None:
        sum(part.pow(2).sum() for column in reps for part in column).backward()

    def instead(self: Any, reps: list[list[Tensor]], *args: Any, **kwargs: Any) -> Tensor:
        if way == "a pull before":
            pull(reps)
        changed = [[part + 1 for part in column] for column in reps] if way == "of other embeddings" else reps
        loss = super(type(self), self).calculate_loss(changed, *args, **kwargs)
        if way == "a pull after":
            pull(reps)
        return loss

    kinds = [subclass(getattr(package, name), calculate_loss=instead) for package in (losses, library)]
    assert_same(*(run(make(kind, name), model, name) for kind in kinds))


# What a user's loss does beside the library's, in all ways of running it.
def reads_the_encoder(package: Any) -> type:
    def loss(self: Any, embeddings: list[Tensor], labels: Tensor | None = None) -> Tensor:
        decay = sum(parameter.square().sum() for parameter in self.model.parameters())
        return super(kind, self).compute_loss_from_embeddings(embeddings, labels) + 0.01 * decay

    kind = subclass(package.MultipleNegativesRankingLoss, compute_loss_from_embeddings=loss)
    return kind


def measures_lengths(package: Any) -> type:
    def loss(self: Any, embeddings: list[Tensor], labels: Tensor | None = None) -> Tensor:
        a, b, *_ = embeddings = list(embeddings)
        return super(kind, self).compute_loss_from_embeddings(embeddings, labels) + (a - b).square().mean()

    kind = subclass(package.MultipleNegativesRankingLoss, compute_loss_from_embeddings=loss)
    return kind


def is_called_twice(package: Any) -> type:
    def call(self: Any, *args: Any) -> Tensor:
        return 2 * super(kind, self).__call__(*args)

    kind = subclass(package.MultipleNegativesRankingLoss, __call__=call)
    return kind


@both_ways
@pytest.mark.parametrize("make_kind", [reads_the_encoder, measures_lengths, is_called_twice])
def test_a_users_loss_in_all_wrappings(make_kind: Callable, make: Callable, model: SentenceTransformer) -> None:
    name = "MultipleNegativesRankingLoss"
    ours, theirs = (make(make_kind(package), name) for package in (losses, library))
    assert_same(run(ours, model, name), run(theirs, model, name))
    around = run(library.MatryoshkaLoss(model, theirs, DIMS), model, name)
    assert_same(run(losses.MatryoshkaLoss(model, ours, DIMS), model, name), around)
    assert_same(run(losses.MatryoshkaLoss(model, ours, DIMS, mini_batch_size=3), model, name), around)
    ours.mini_batch_size = 3
    assert_same(run(ours, model, name), run(theirs, model, name))
    assert_same(run(losses.MatryoshkaLoss(model, ours, DIMS), model, name), around)


@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("cached", ["", "Cached"])
def test_a_scale_that_the_model_holds(cached: str, around: bool, make: Callable, model: SentenceTransformer) -> None:
    """As CLIP does: read by the similarity, so that the loss has a gradient for it."""
    name = f"{cached}MultipleNegativesRankingLoss"
    model.temperature = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
    try:
        found = []
        for package in (losses, library):
            loss = make(getattr(package, name), name)
            loss.similarity_fct = lambda a, b: util.cos_sim(a, b) * model.temperature.exp()
            found.append(run(package.MatryoshkaLoss(model, loss, DIMS) if around else loss, model, name))
        assert found[1][1]["temperature"] != 0
        assert_same(*found)
    finally:
        del model.temperature


def test_a_parameter_for_a_scale(make: Callable, model: SentenceTransformer) -> None:
    for name in ("MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"):
        grads = []
        for package in (losses, library):
            loss = make(getattr(package, name), name)
            scale = nn.Parameter(torch.tensor(7.0, dtype=torch.float64))
            loss.scale = scale
            run(loss, model, name)
            grads.append(scale.grad)
        torch.testing.assert_close(*grads, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    "members",
    [
        {"directions": ("query_to_doc", "doc_to_query")},
        {"scale": property(lambda self: 5.0)},
        {"hardness_mode": "all_negatives", "hardness_strength": 5.0},
        {"similarity_fct": staticmethod(util.dot_score)},
    ],
    ids=lambda members: next(iter(members)),
)
def test_attributes_of_a_subclass(members: dict[str, Any], make: Callable, model: SentenceTransformer) -> None:
    name = "CachedMultipleNegativesRankingLoss"
    kinds = [subclass(getattr(package, name), **members) for package in (losses, library)]
    assert_same(*(run(make(kind, name), model, name) for kind in kinds))


def test_hooks_of_a_wrapped_loss(make: Callable, model: SentenceTransformer) -> None:
    found = []
    for package, options in ((losses, {}), (losses, {"mini_batch_size": 3}), (library, {})):
        inner = make(package.CoSENTLoss, "CoSENTLoss")
        inner.register_forward_hook(lambda module, args, output: 3 * output)
        found.append(run(package.MatryoshkaLoss(model, inner, DIMS, **options), model, "CoSENTLoss"))
    assert_same(found[0], found[2])
    assert_same(found[1], found[2])


@both_ways
def test_a_method_put_into_a_class(make: Callable, model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, method in (
        ("CoSENTLoss", "compute_loss_from_embeddings"),
        ("BatchHardTripletLoss", "batch_hard_triplet_loss"),
    ):
        before = getattr(getattr(losses, name), method)
        monkeypatch.setattr(
            getattr(losses, name), method, lambda self, *args, before=before: 3 * before(self, *args), raising=False
        )
        expected = run(make(getattr(library, name), name), model, name)[0]
        loss = make(getattr(losses, name), name)
        torch.testing.assert_close(run(loss, model, name)[0], 3 * expected)
        assert loss._tail() is NO_TAIL
        with pytest.raises(ValueError, match="of its own" if name == "CoSENTLoss" else "no fused form"):
            loss.fuse_projection = True
            run(loss, model, name)


def test_terms_in_mini_batches(make: Callable, model: SentenceTransformer) -> None:
    """A user's dict of them is one in mini-batches, too."""

    def terms(self: Any, embeddings: list[Tensor], labels: Tensor | None = None) -> dict[str, Tensor]:
        value = super(kind, self).compute_loss_from_embeddings(embeddings, labels)
        return {"main": value, "lengths": embeddings[0].square().mean()}

    found, name = [], "MultipleNegativesRankingLoss"
    for package, options in ((losses, {"mini_batch_size": 3}), (library, {})):
        kind = subclass(getattr(package, name), compute_loss_from_embeddings=terms)
        found.append(run(make(kind, name, **options), model, name))
    assert_same(*found)


def test_matryoshka_in_matryoshka(make: Callable, model: SentenceTransformer) -> None:
    name = "MultipleNegativesRankingLoss"
    inner = make(losses.MultipleNegativesRankingLoss, name)
    plain = losses.MatryoshkaLoss(model, losses.MatryoshkaLoss(model, inner, [4]), [8], [3.0])
    theirs = library.MatryoshkaLoss(model, make(library.MultipleNegativesRankingLoss, name), [4], [3.0])
    assert_same(run(plain, model, name), run(theirs, model, name))
    inner.mini_batch_size = 3
    with pytest.raises(ValueError, match="outermost"):
        run(plain, model, name)


def test_two_dimensions(make: Callable, model: SentenceTransformer) -> None:
    inner = make(losses.CoSENTLoss, "CoSENTLoss")
    loss = losses.Matryoshka2dLoss(model, inner, DIMS, chunk_size=16)
    assert loss.chunk_size == inner.chunk_size == 16
    loss.chunk_size = 8
    assert inner.chunk_size == 8
    with pytest.raises(ValueError, match="chunk_size"):
        loss.chunk_size = -5
    with pytest.raises(ValueError, match="no mini-batches"):
        loss.mini_batch_size = 4
    with pytest.raises(ValueError, match="no mini-batches"):
        losses.Matryoshka2dLoss(model, inner, DIMS, mini_batch_size=4)


@pytest.mark.parametrize("outer", ["cached", "matryoshka"])
def test_fused_inside_of_mini_batches(outer: str, make: Callable, model: SentenceTransformer) -> None:
    """Set on the loss inside, where it would be in vain."""
    name = "CachedMultipleNegativesRankingLoss" if outer == "cached" else "CoSENTLoss"
    loss = make(getattr(losses, name), name)
    loss = loss if outer == "cached" else losses.MatryoshkaLoss(model, loss, DIMS, mini_batch_size=3)
    loss.loss.fuse_projection = True
    with pytest.raises(ValueError, match="without mini-batches"):
        run(loss, model, name)


def test_terms_that_a_subclass_adds_up(make: Callable, model: SentenceTransformer) -> None:
    """Of the one loss that returns several."""
    name, found = "GlobalOrthogonalRegularizationLoss", []

    def added(self: Any, embeddings: list[Tensor], labels: Tensor | None = None) -> Tensor:
        return sum(super(type(self), self).compute_loss_from_embeddings(embeddings, labels).values())

    for package, options in ((losses, {}), (losses, {"mini_batch_size": 3}), (library, {})):
        kind = subclass(getattr(package, name), compute_loss_from_embeddings=added)
        found.append(run(make(kind, name, **options), model, name))
    assert_same(found[0], found[2])
    assert_same(found[1], found[2])


def half_cosine(a: Tensor, b: Tensor) -> Tensor:
    return 0.5 * torch.cosine_similarity(a, b, dim=-1)


def half_cosines(a: Tensor, b: Tensor) -> Tensor:
    return 0.5 * util.cos_sim(a, b)


def l1_matrix(embeddings: Tensor) -> Tensor:
    return (embeddings[:, None] - embeddings[None]).abs().sum(2)


class Half(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return half_cosine(a, b)


# What each attribute is set to after construction; a class may need another value than most.
VALUES: dict[str, Any] = {
    "contrast_anchors": False,
    "contrast_positives": False,
    "cos_score_transformation": nn.Tanh(),
    "cross_entropy_loss": nn.CrossEntropyLoss(reduction="sum"),
    "directions": ("query_to_doc", "doc_to_query"),
    "distance_metric": lambda a, b: (a - b).abs().sum(1),
    "gather_across_devices": True,
    "hardness_mode": None,
    "hardness_strength": 0.7,
    "loss_fct": nn.L1Loss(),
    "margin": 0.03,
    "margin_strategy": "relative",
    "mean_weight": 3.0,
    "mini_batch_num_tokens": 20,
    "mini_batch_size": 2,
    "must_retokenize": False,
    "negative_margin": -0.4,
    "partition_mode": "joint",
    "positive_margin": 0.99,
    "scale": 7.0,
    "second_moment_weight": 3.0,
    "show_progress_bar": False,
    "similarity_fct": half_cosine,
    "size_average": False,
    "student_temperature": 3.0,
    "teacher_temperature": 5.0,
    "temperature": 0.3,
    "triplet_margin": 0.1,
    "aggregation": "sum",
    "uses_gradient_cache": True,
}
OF_CLASS = {
    **{("directions", name): ("query_to_doc",) for name in CASES if "Symmetric" in name},
    **{("similarity_fct", name): half_cosines for name in CASES if "Ranking" in name},
    **{("distance_metric", name): l1_matrix for name in CASES if name.startswith("Batch")},
    **{("margin", name): 3.0 for name in ("BatchSemiHardTripletLoss", "ContrastiveLoss", "OnlineContrastiveLoss")},
    **{("similarity_fct", name): Half() for name in ("GISTEmbedLoss", "CachedGISTEmbedLoss")},
    ("similarity_fct", "GlobalOrthogonalRegularizationLoss"): half_cosines,
    ("loss_fct", "DistillKLDivLoss"): nn.KLDivLoss(reduction="sum"),
    ("distance_metric", "ContrastiveLoss"): SiameseDistanceMetric.EUCLIDEAN,
    ("distance_metric", "TripletLoss"): TripletDistanceMetric.COSINE,
    ("partition_mode", "MultipleNegativesRankingLoss"): "per_direction",
}
# Of one process, of mini-batches, or of a value that is there: the number stays.
WITHOUT_EFFECT = {
    "gather_across_devices",
    "hardness_mode",
    "hardness_strength",
    "margin_strategy",
    "mini_batch_num_tokens",
    "mini_batch_size",
    "must_retokenize",
    "partition_mode",
    "show_progress_bar",
    "uses_gradient_cache",
}
# The tokenizer decodes for a guide of another vocabulary; ``loss`` and ``guide`` are modules with tests of their own.
MODULES = {"model", "sentence_embedder", "guide", "loss", "tokenizer", "training"}


def data_of(name: str, make: Callable, model: SentenceTransformer) -> Iterator[str]:
    loss = make(getattr(library, name), name)
    for attribute in read_by(getattr(library, name), name, make, model):
        is_method = isinstance(getattr(loss, attribute, None), types.MethodType)
        if attribute not in MODULES and not is_method and not hasattr(nn.Module, attribute):
            yield attribute


@pytest.mark.slow
@both_ways
@pytest.mark.parametrize("name", CASES)
def test_attributes_set_later(name: str, make: Callable, model: SentenceTransformer) -> None:
    """Each attribute that the library's class reads, set on a loss that is made already."""
    theirs, ours = getattr(library, name), getattr(losses, name)
    plain = run(make(theirs, name), model, name)
    attributes = list(data_of(name, make, model))
    assert attributes
    for attribute in attributes:
        value = OF_CLASS.get((attribute, name), VALUES[attribute])
        found = []
        for kind in (ours, theirs):
            loss = make(kind, name)
            if kind is ours or attribute != "uses_gradient_cache":
                setattr(loss, attribute, value)
            assert getattr(loss, attribute) == value
            found.append(run(loss, model, name))
        assert attribute in WITHOUT_EFFECT or not torch.equal(found[1][0], plain[0]), attribute
        assert_same(*found)


TOGETHER = {
    "hardness": ("MultipleNegativesRankingLoss", {"hardness_mode": "all_negatives", "hardness_strength": 2.0}),
    "each": (
        "MultipleNegativesRankingLoss",
        {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"},
    ),
    "margin": ("GISTEmbedLoss", {"margin_strategy": "relative", "margin": -0.01, "guide": None}),
}


@pytest.mark.parametrize("cached", ["", "Cached"])
@pytest.mark.parametrize("settings", TOGETHER)
def test_attributes_that_go_together(
    settings: str, cached: str, make: Callable, model: SentenceTransformer, transformer_dir: str
) -> None:
    """Those that say something only beside another, and another guide."""
    name, values = TOGETHER[settings]
    found = []
    for package in (losses, library):
        loss = make(getattr(package, cached + name), cached + name)
        for attribute, value in values.items():
            setattr(loss, attribute, build(transformer_dir) if attribute == "guide" else value)
        found.append(run(loss, model, cached + name))
    assert_same(*found)


LATER: dict[str, tuple[dict[str, Any], str]] = {
    "mini_batch_size": ({"mini_batch_size": 0}, "mini_batch_size to be a positive"),
    "chunk_size": ({"chunk_size": -1}, "chunk_size"),
    "compiled": ({"compiled": "yes"}, "compiled"),
    "fuse_projection": ({"fuse_projection": "no"}, 'True, False or "auto"'),
    "fused in mini-batches": ({"mini_batch_size": 4, "fuse_projection": True}, "without mini-batches"),
    "mini-batches of what is fused": ({"fuse_projection": True, "mini_batch_size": 4}, "without mini-batches"),
    "cached without mini-batches": ({"uses_gradient_cache": True}, "mini_batch_size before"),
}


@pytest.mark.parametrize("name", ["CoSENTLoss", "CachedMultipleNegativesRankingLoss"])
@pytest.mark.parametrize("case", LATER)
def test_options_are_checked_when_they_are_set(case: str, name: str, make: Callable) -> None:
    settings, message = LATER[case]
    loss = make(getattr(losses, name), name)
    loss.mini_batch_size = None
    before = loss._options()
    *first, (last, value) = settings.items()
    for attribute, given in first:
        setattr(loss, attribute, given)
    with pytest.raises((ValueError, TypeError), match=message):
        setattr(loss, last, value)
    assert loss._options() == {**before, **dict(first)}
    options = {key: value for key, value in settings.items() if key != "uses_gradient_cache"}
    if options:
        with pytest.raises((ValueError, TypeError), match=message):
            getattr(losses, name)(nn.Identity(), **options)


def test_a_subclass_without_our_constructor(make: Callable, model: SentenceTransformer) -> None:
    """Has our options all the same, as they are by default."""

    class Bare(losses.CoSENTLoss):
        def __init__(self, model: SentenceTransformer) -> None:
            nn.Module.__init__(self)
            self.model, self.scale, self.similarity_fct = model, 20.0, util.pairwise_cos_sim

    assert_same(run(Bare(model), model, "CoSENTLoss"), run(make(losses.CoSENTLoss, "CoSENTLoss"), model, "CoSENTLoss"))
    with pytest.raises(AttributeError, match="no attribute 'chunks'"):
        Bare(model).chunks  # noqa: B018


def test_a_learnable_scale_set_later(make: Callable) -> None:
    for name in ("MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"):
        loss = make(getattr(losses, name), name, learnable_scale=True)
        loss.scale = 7.0
        assert loss.scale == pytest.approx(7.0) and loss.log_scale.exp().item() == pytest.approx(7.0)
        with pytest.raises(ValueError, match="scale"):
            loss.scale = -1.0


# --- the rest of an object -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_pickled_and_copied(name: str, make: Callable, model: SentenceTransformer) -> None:
    ours, theirs = make(getattr(losses, name), name), make(getattr(library, name), name)
    expected = run(ours, model, name)
    try:
        pickle.dumps(theirs)
        copies = [pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)]
    except (pickle.PicklingError, AttributeError):  # a distance that is a lambda
        copies = [copy.deepcopy(ours)]
    for loss in copies:
        assert type(loss) is type(ours)
        inner = loss.model
        assert inner is not model
        assert_same(run(loss, inner, name), expected)


@pytest.mark.parametrize("name", CASES)
def test_parameters_and_state(name: str, make: Callable) -> None:
    ours, theirs = make(getattr(losses, name), name), make(getattr(library, name), name)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [key for key, _ in ours.named_parameters()] == [key for key, _ in theirs.named_parameters()]
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    assert repr(ours) == repr(theirs)


@pytest.mark.parametrize("name", CASES)
def test_config(name: str, make: Callable) -> None:
    ours, theirs = make(getattr(losses, name), name), make(getattr(library, name), name)
    config = {key: value for key, value in ours.get_config_dict().items() if key not in ("compiled", "chunked_embed")}
    assert config == theirs.get_config_dict()
