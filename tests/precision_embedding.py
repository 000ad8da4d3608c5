"""Embedding losses of the precision contract: ``chunked_embed.functional``, and the drop-ins for sentence-transformers.

Their truths are sentence-transformers' own losses in float64 where it has them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from precision_parts import FP32, Case, Tensors, draw, near_duplicates, spread, weighted_sum
from sentence_transformers import util
from sentence_transformers.sentence_transformer import losses as library
from sentence_transformers.sparse_encoder import losses as sparse_library
from torch import Tensor, nn

from chunked_embed import functional as CF
from chunked_embed import losses
from chunked_embed.sparse import losses as sparse_losses

ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
BOTH = ("query_to_doc", "doc_to_query")
WAYS: dict[str, dict[str, Any]] = {
    "one way": {},
    "two ways, joint": {"directions": BOTH},
    "two ways, each": {"directions": BOTH, "partition_mode": "per_direction"},
    "four ways": {"directions": ALL},
}
CASES: dict[str, Case] = {}


class Model(nn.Identity):
    """What losses ask of one that get embeddings."""

    def get_embedding_dimension(self) -> int:
        return 64


MODEL = Model()
CANCELS = (
    "in G @ X, of rows of X that are nearly equal and rows of G that add up to zero, what is common to the rows of X "
    "cancels, but for the rounding of G; cosines project it away, products and distances do not"
)
APART = (
    "the positive pair counts in two blocks, whose gradients have opposite signs and are rounded apart: in float64 "
    "with that rounding alone 1.3 for products, and 1.1 for cosines"
)
PAIRED = (
    "the gradients of two embeddings that are nearly equal are nearly opposite: in the weight's gradient, the sum of "
    "products with both, they cancel, but for their rounding"
)


def project(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, activation: Any = None) -> Tensor:
    x = x if weight is None else F.linear(x, weight, bias)
    return x if activation is None else activation(x)


def labels(n: int, kinds: int = 5) -> Tensor:
    return torch.arange(n) * 11 % kinds


# --- aligned rows ----------------------------------------------------------------------------------------------------

PAIRWISE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": util.pairwise_cos_sim,
    "angle": util.pairwise_angle_sim,
    "dot": util.pairwise_dot_score,
    "euclidean": util.pairwise_euclidean_sim,
    "manhattan": util.pairwise_manhattan_sim,
}
DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "euclidean": lambda a, b: torch.linalg.vector_norm(a - b, dim=1),
    "cosine": lambda a, b: 1 - F.cosine_similarity(a, b),
    "manhattan": lambda a, b: (a - b).abs().sum(1),
}


def dense(x: Tensors, d: int = 32) -> Tensors:
    randn = draw(3)
    width = x["a"].shape[1]
    return x | {"weight": randn(d, width) / width**0.5, "bias": 0.1 * randn(d)}


def projection_of(x: Tensors) -> dict[str, Tensor]:
    return {name: x[name] for name in ("weight", "bias") if name in x}


SLACK_PROJECTED = {"weight": 5.5}


def pairwise(similarity: str, projected: bool = False, **options: Any) -> Case:
    def ours(x: Tensors, **chunks: Any) -> Any:
        scores = CF.pairwise_scores(
            x["a"], [x["b"], x["c"]], similarity=similarity, **projection_of(x), **options, **chunks
        )
        return weighted_sum({"scores": scores}), {"scores": scores}

    def truth(x: Tensors) -> Any:
        a, b, c = (_embedded(x, key, options) for key in "abc")
        scores = torch.stack([PAIRWISE[similarity](a, other) for other in (b, c)], 1)
        return weighted_sum({"scores": scores}), {"scores": scores}

    def make() -> Tensors:
        x = near_duplicates(columns="abc")
        return dense(x) if projected else x

    return Case(make, ours, truth, learning(similarity, projected, **options), slack=SLACK_PROJECTED, why=PAIRED)


def learning(similarity: str, projected: bool, activation: Any = None, **_: Any) -> tuple[str, ...]:
    """Differences do not see a bias."""
    if not projected:
        return tuple("abc")
    return (
        (*"abc", "weight")
        if similarity in ("euclidean", "manhattan") and not activation
        else (*"abc", "weight", "bias")
    )


def _embedded(x: Tensors, key: str, options: dict[str, Any]) -> Tensor:
    found = project(x[key], x.get("weight"), x.get("bias"), options.get("activation"))
    return F.normalize(found, dim=1) if options.get("normalize") else found


for similarity in PAIRWISE:
    CASES[f"pairwise {similarity}"] = pairwise(similarity)
    CASES[f"pairwise {similarity}, projected"] = pairwise(similarity, True)
CASES["pairwise euclidean, projected, tanh, normalize"] = pairwise(
    "euclidean", True, activation=torch.tanh, normalize=True
)


def ranking(function: Callable[..., Tensor], kind: Any, scale: float, projected: bool = False, **options: Any) -> Case:
    def ours(x: Tensors, **chunks: Any) -> Tensor:
        return function(x["a"], x["b"], x["label"], scale=scale, **projection_of(x), **options, **chunks)

    def truth(x: Tensors) -> Tensor:
        sides = [_embedded(x, key, options) for key in "ab"]
        return kind(MODEL, scale).compute_loss_from_embeddings(sides, x["label"])

    def make() -> Tensors:
        x = near_duplicates()
        x = dense(x) if projected else x
        return x | {"label": labels(64)}

    learns = ("a", "b", "weight", "bias") if projected else ("a", "b")
    return Case(make, ours, truth, learns, slack=SLACK_PROJECTED, why=PAIRED)


for scale in (1.0, 20.0, 50.0, 100.0):
    CASES[f"cosent {scale:g}"] = ranking(CF.cosent, library.CoSENTLoss, scale)
    CASES[f"cosent {scale:g}, projected"] = ranking(CF.cosent, library.CoSENTLoss, scale, True)
    CASES[f"angle {scale:g}"] = ranking(CF.angle, library.AnglELoss, scale)
CASES["angle 20, projected"] = ranking(CF.angle, library.AnglELoss, 20.0, True)
for name, options in (
    ("tanh", {"activation": torch.tanh}),
    ("normalize", {"normalize": True}),
    ("tanh, normalize", {"activation": torch.tanh, "normalize": True}),
):
    CASES[f"cosent 20, projected, {name}"] = ranking(CF.cosent, library.CoSENTLoss, 20.0, True, **options)


def triplet(distance: str, projected: bool = False, **options: Any) -> Case:
    margin = 0.05 if distance == "cosine" else 3.0

    def ours(x: Tensors, **chunks: Any) -> Tensor:
        sides = (x[key] for key in "abc")
        return CF.triplet(*sides, margin=margin, distance=distance, **projection_of(x), **options, **chunks)

    def truth(x: Tensors) -> Tensor:
        a, p, n = (_embedded(x, key, options) for key in "abc")
        return F.relu(DISTANCES[distance](a, p) - DISTANCES[distance](a, n) + margin).mean()

    def make() -> Tensors:
        x = near_duplicates(columns="abc")
        return dense(x) if projected else x

    return Case(make, ours, truth, learning(distance, projected), slack=SLACK_PROJECTED, why=PAIRED)


for distance in DISTANCES:
    CASES[f"triplet {distance}"] = triplet(distance)
    CASES[f"triplet {distance}, projected"] = triplet(distance, True)


# --- InfoNCE ---------------------------------------------------------------------------------------------------------


def sides_of(x: Tensors) -> list[Tensor]:
    """Projected, where there is a projection: by a product before the product, whose results are not rounded."""
    return [_embedded(x, key, {}) for key in "abcd" if key in x]


def library_nce(x: Tensors, scale: Any = None, similarity: str = "cosine", **options: Any) -> Tensor:
    function = util.cos_sim if similarity == "cosine" else util.dot_score
    loss = library.MultipleNegativesRankingLoss(MODEL, 1.0, function, **options)
    loss.scale = x["scale"] if scale is None else scale  # as a parameter would be
    return loss.compute_loss_from_embeddings(sides_of(x), None)


def nce(
    make: Callable[[], Tensors],
    truth: Callable[..., Tensor] = library_nce,
    slack: float = 1.0,
    why: str = "",
    **options: Any,
) -> Case:
    def ours(x: Tensors, **chunks: Any) -> Tensor:
        more = {key: x[key] for key in ("query_ids", "document_ids", "false_negatives", "scale") if key in x}
        sides = [x[key] for key in "abcd" if key in x]
        return CF.info_nce(*sides[:2], hard_negatives=sides[2:], **projection_of(x), **more, **options, **chunks)

    names = set(make())
    learns = tuple(name for name in ("a", "b", "c", "d", "weight", "bias", "scale") if name in names)
    if options.get("directions") == ALL:
        slack, why = max(slack, 1.4), why or APART
    return Case(make, ours, partial(truth, **options), learns, slack=dict.fromkeys("abcd", slack), why=why)


def large() -> Tensors:
    """Near duplicates whose inner products are beyond the largest number of float16."""
    return {name: 30 * x for name, x in near_duplicates().items()}


for scale in (1.0, 20.0, 50.0, 100.0):
    for way, options in WAYS.items():
        CASES[f"info_nce {scale:g}, {way}"] = nce(near_duplicates, scale=scale, **options)
for mode in ("in_batch_negatives", "hard_negatives", "all_negatives"):
    for way in ("one way", "two ways, each"):
        CASES[f"info_nce 50, {mode}, {way}"] = nce(
            partial(near_duplicates, columns="abcd"),
            scale=50.0,
            hardness_mode=mode,
            hardness_strength=5.0,
            **WAYS[way],
        )
for way, options in WAYS.items():
    CASES[f"info_nce 100, hard negatives, {way}"] = nce(partial(near_duplicates, columns="abc"), scale=100.0, **options)
    CASES[f"info_nce dot, {way}"] = nce(spread, scale=0.1, similarity="dot", **options)
    CASES[f"info_nce dot beyond 65504, {way}"] = nce(
        large, slack=4.0, why=CANCELS, scale=0.001, similarity="dot", **options
    )


def ids(x: Tensors) -> Tensors:
    n = len(x["a"])
    query, document = torch.arange(n), torch.arange(n) + 1000
    query[n // 2 :: 3] = query[: len(query[n // 2 :: 3])]
    document[n // 3 :: 5] = document[: len(document[n // 3 :: 5])]
    false = torch.stack([document.roll(5), torch.full_like(document, -1)], 1)
    return x | {"query_ids": query, "document_ids": document, "false_negatives": false}


def masked_nce(
    x: Tensors, scale: Any = None, directions: tuple[str, ...] = ("query_to_doc",), partition_mode: str = "joint"
) -> Tensor:
    """The formula, with what is known to be no negative left out of the whole matrices."""
    scale = x["scale"] if scale is None else scale
    q, d = (F.normalize(x[key], dim=1) for key in "ab")
    own = torch.eye(len(q), dtype=torch.bool)
    known = torch.zeros_like(own)
    if "query_ids" in x:
        known |= x["query_ids"][:, None] == x["query_ids"]
    if "document_ids" in x:
        known |= x["document_ids"][:, None] == x["document_ids"]
    if "false_negatives" in x:
        known |= (x["false_negatives"][:, :, None] == x["document_ids"]).any(1)
    known &= ~own
    masks = {"query_to_doc": known, "query_to_query": known | own, "doc_to_query": known.T, "doc_to_doc": known | own}
    sides = {"query_to_doc": (q, d), "query_to_query": (q, q), "doc_to_query": (d, q), "doc_to_doc": (d, d)}
    lses = []
    for name in directions:
        z = scale * (sides[name][0] @ sides[name][1].T)
        lses.append(z.masked_fill(masks[name], -torch.inf).logsumexp(1))
    both = torch.stack(lses)
    total = both.mean(0) if partition_mode == "per_direction" else both.logsumexp(0)
    return (total - scale * (q * d).sum(1)).mean()


def with_scale(make: Callable[[], Tensors], scale: float) -> Tensors:
    return make() | {"scale": torch.tensor(scale, dtype=FP32)}


for way, options in WAYS.items():
    # The library's own scale would have no gradient here: it multiplies what is masked, -inf.
    CASES[f"info_nce scale that learns, {way}"] = nce(
        partial(with_scale, near_duplicates, 100.0), masked_nce, **options
    )
CASES["info_nce dot, scale that learns"] = nce(partial(with_scale, spread, 0.1), similarity="dot")
for way in ("one way", "two ways, each"):
    CASES[f"info_nce 20, projected, {way}"] = nce(lambda: dense(near_duplicates()), scale=20.0, **WAYS[way])


for way, options in WAYS.items():
    CASES[f"info_nce 50, ids, {way}"] = nce(lambda: ids(near_duplicates()), masked_nce, scale=50.0, **options)


# --- sigmoid pairs ---------------------------------------------------------------------------------------------------


def sigmoid(make: Callable[[], Tensors], scale: float, bias: float, similarity: str = "cosine") -> Case:
    def truth(x: Tensors) -> Tensor:
        a, b = (F.normalize(x[key], dim=1) if similarity == "cosine" else x[key] for key in "ab")
        z = x["scale"] * (a @ b.T) + x["bias"]
        return -F.logsigmoid((2 * torch.eye(len(a), dtype=z.dtype) - 1) * z).sum(1).mean()

    def ours(x: Tensors, **chunks: Any) -> Tensor:
        return CF.sigmoid_pairs(x["a"], x["b"], scale=x["scale"], bias=x["bias"], similarity=similarity, **chunks)

    numbers = {"scale": torch.tensor(scale, dtype=FP32), "bias": torch.tensor(bias, dtype=FP32)}
    return Case(lambda: make() | numbers, ours, truth, ("a", "b", "scale", "bias"))


for scale, bias in ((1.0, -1.0), (10.0, -10.0), (50.0, -48.0), (100.0, -96.0)):
    CASES[f"sigmoid_pairs {scale:g}"] = sigmoid(near_duplicates, scale, bias)
CASES["sigmoid_pairs dot"] = sigmoid(spread, 0.1, -3.0, "dot")
CASES["sigmoid_pairs dot beyond 65504"] = sigmoid(large, 1e-4, -25.0, "dot")


# --- a guide ---------------------------------------------------------------------------------------------------------


def guided_inputs(columns: str = "ab", seed: int = 1) -> Tensors:
    x = near_duplicates(32, columns=columns, seed=seed)
    guide = near_duplicates(32, 48, columns, seed=seed + 1, within=0.3)
    return x | {f"guide {name}": side for name, side in guide.items()}


def cosines(a: Tensor, b: Tensor) -> Tensor:
    return F.normalize(a, dim=1) @ F.normalize(b, dim=1).T


def guided_formula(
    x: Tensors,
    temperature: float = 0.01,
    margin_strategy: str = "absolute",
    margin: float = 0.0,
    contrast_anchors: bool = True,
    contrast_positives: bool = True,
) -> Tensor:
    """``GISTEmbedLoss``, whose own class asks for models."""
    names = [name for name in "abcd" if name in x]
    (q, d, *negatives), (gq, gd, *guides) = [x[name] for name in names], [x[f"guide {name}"] for name in names]
    limit = cosines(gq, gd).diagonal()[:, None]
    limit = limit - margin * (limit.abs() if margin_strategy == "relative" else 1)
    own = torch.eye(len(q), dtype=torch.bool)
    pairs = [(cosines(q, d), cosines(gq, gd), own)]
    pairs += [(cosines(q, n), cosines(gq, g), ~(own | True)) for n, g in zip(negatives, guides, strict=True)]
    pairs += [(cosines(q, q), cosines(gq, gq), own & False)] if contrast_anchors else []
    pairs += [(cosines(d, d), cosines(gd, gd), own & False)] if contrast_positives else []
    terms = []
    for similarity, guide, stays in pairs:
        gap = torch.where(stays, torch.inf, (guide - limit).abs()).min()
        assert gap > 3e-6, "a case in which the guide's similarities tie shows nothing"
        terms.append(similarity.masked_fill((guide > limit) & ~stays, -torch.inf))
    return F.cross_entropy(torch.cat(terms, 1) / temperature, torch.arange(len(q)))


def guided(make: Callable[[], Tensors], autocast: str | None = None, **options: Any) -> Case:
    def ours(x: Tensors, **chunks: Any) -> Tensor:
        names = [name for name in "abcd" if name in x]
        own, guide = [x[name] for name in names], [x[f"guide {name}"] for name in names]
        more = {"hard_negatives": own[2:], "guide_hard_negatives": guide[2:]}
        return CF.guided_info_nce(*own[:2], *guide[:2], **more, **options, **chunks)

    learns = tuple(name for name in "abcd" if name in make())
    return Case(make, ours, partial(guided_formula, **options), learns, autocast)


GUIDED: dict[str, dict[str, Any]] = {
    "0.01": {},
    "0.05": {"temperature": 0.05},
    "absolute": {"temperature": 0.02, "margin": 0.01},
    "relative": {"temperature": 0.02, "margin_strategy": "relative", "margin": 0.01},
    "candidates alone": {"contrast_anchors": False, "contrast_positives": False},
}
for name, options in GUIDED.items():
    CASES[f"guided {name}"] = guided(guided_inputs, **options)
CASES["guided, hard negatives"] = guided(partial(guided_inputs, "abcd"), temperature=0.02)


# --- mined -----------------------------------------------------------------------------------------------------------


def mega(x: Tensors) -> Tensor:
    z = cosines(x["a"], x["b"])
    own = torch.eye(len(z), dtype=torch.bool)
    others = z.masked_fill(own, -torch.inf)
    first, second = others.topk(2, 1).values.unbind(1)
    assert (first - second).min() > 3e-6, "a case in which the nearest two tie shows nothing"
    return (F.relu(0.99 - z.diagonal()) + F.relu(first - 0.3)).mean()


def call_mega(x: Tensors, **chunks: Any) -> Tensor:
    return CF.mega_batch_margin(x["a"], x["b"], positive_margin=0.99, negative_margin=0.3, **chunks)


CASES["mega_batch_margin"] = Case(near_duplicates, call_mega, mega, ("a", "b"))


def mega_loss() -> Case:
    def ours(x: Tensors, **chunks: Any) -> Tensor:
        return losses.MegaBatchMarginLoss(MODEL, 0.99, 0.3, **chunks).compute_loss_from_embeddings([x["a"], x["b"]])

    return Case(near_duplicates, ours, mega, ("a", "b"))


MATRICES: dict[str, Callable[[Tensor], Tensor]] = {
    "euclidean": library.BatchHardTripletLossDistanceFunction.euclidean_distance,
    "squared_euclidean": partial(library.BatchHardTripletLossDistanceFunction.euclidean_distance, squared=True),
    "cosine": library.BatchHardTripletLossDistanceFunction.cosine_distance,
}
BATCH: dict[str, tuple[Callable[..., Tensor], Any, str | None]] = {
    "hard": (CF.batch_hard_triplet, library.BatchHardTripletLoss, "margin"),
    "hard soft": (partial(CF.batch_hard_triplet, soft=True), library.BatchHardSoftMarginTripletLoss, None),
    "semi-hard": (CF.batch_semi_hard_triplet, library.BatchSemiHardTripletLoss, "margin"),
    "all": (CF.batch_all_triplet, library.BatchAllTripletLoss, "margin"),
}


def labelled(n: int = 48) -> Tensors:
    return {"a": near_duplicates(n, columns="a", seed=4)["a"], "label": labels(n, 7)}


def batch_triplets(kind: str, distance: str) -> Case:
    function, theirs, margin = BATCH[kind]
    # About as large as distances differ, so that some triplets count and others do not.
    options = {} if margin is None else {"margin": {"cosine": 0.03, "euclidean": 1.0}.get(distance, 15.0)}

    def ours(x: Tensors, **chunks: Any) -> Tensor:
        return function(x["a"], x["label"], distance=distance, **options, **chunks)

    def truth(x: Tensors) -> Tensor:
        loss = theirs(MODEL, distance_metric=MATRICES[distance], **options)
        return loss.compute_loss_from_embeddings([x["a"]], x["label"])

    # The hardest are taken from differences of embeddings.
    slack = 1.0 if kind.startswith("hard") else {"euclidean": 3.0, "squared_euclidean": 1.25, "cosine": 1.25}[distance]
    return Case(labelled, ours, truth, ("a",), slack={"a": slack}, why=CANCELS)


for kind in BATCH:
    for distance in MATRICES:
        CASES[f"batch {kind} {distance}"] = batch_triplets(kind, distance)


# --- orthogonal regularisation ---------------------------------------------------------------------------------------


def spread_out(make: Callable[[], Tensors], similarity: str) -> Case:
    def truth(x: Tensors) -> Any:
        function = util.cos_sim if similarity == "cosine" else util.dot_score
        loss = library.GlobalOrthogonalRegularizationLoss(MODEL, function)
        terms = loss.compute_loss_from_embeddings([x["a"]])
        return sum(terms.values()), {name.removeprefix("gor_"): value for name, value in terms.items()}

    def ours(x: Tensors, **_: Any) -> Any:
        terms = CF.orthogonal_regularization(x["a"], similarity=similarity)
        return terms.mean + terms.second_moment, terms._asdict()

    return Case(make, ours, truth, ("a",))


for rows in (48, 96):
    CASES[f"orthogonal_regularization, {rows} near duplicates"] = spread_out(partial(near_duplicates, rows), "cosine")
CASES["orthogonal_regularization dot"] = spread_out(partial(spread, size=0.3), "dot")


# --- drop-ins for sentence-transformers -------------------------------------------------------------------------------


def library_loss(name: str, *arguments: Any, **options: Any) -> Any:
    """The library's class. Those that ask for mini-batches, or are deprecated, are cases of another."""
    if name.startswith("Cached") or "SymmetricRanking" in name:
        options |= WAYS["two ways, each"] if "Symmetric" in name else {}
        name = "MultipleNegativesRankingLoss"
    return getattr(library, name)(MODEL, *arguments, **options)


class InOneDtype(nn.MSELoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input, target.to(input.dtype))


def from_embeddings(
    name: str,
    *arguments: Any,
    columns: str = "ab",
    target: Callable[[int], Tensor] | None = None,
    make: Callable[..., Tensors] = near_duplicates,
    autocast: str | None = None,
    slack: float = 1.0,
    **options: Any,
) -> Case:
    """The same class of both libraries, on the same embeddings."""

    def ours(x: Tensors, **chunks: Any) -> Tensor:
        loss = getattr(losses, name)(MODEL, *arguments, **options, **chunks)
        return _total(loss.compute_loss_from_embeddings([x[key] for key in columns], x.get("label")))

    def truth(x: Tensors) -> Tensor:
        loss = library_loss(name, *arguments, **options)
        if name == "CosineSimilarityLoss":  # which takes labels in float32, that torch 2.11 does not mix with float64
            loss.loss_fct = InOneDtype()
        return _total(loss.compute_loss_from_embeddings([x[key] for key in columns], x.get("label")))

    def tensors() -> Tensors:
        x = make(columns=columns)
        return x if target is None else x | {"label": target(len(x["a"]))}

    return Case(tensors, ours, truth, tuple(columns), autocast, slack=dict.fromkeys(columns, slack), why=CANCELS)


def _total(result: Any) -> Tensor:
    return sum(result.values()) if isinstance(result, dict) else result


def scores(n: int) -> Tensor:
    return torch.linspace(0, 1, n)[torch.arange(n) * 7 % n]


def binary(n: int) -> Tensor:
    return torch.arange(n) % 3 % 2


def two_margins(n: int) -> Tensor:
    return 3 * draw(5)(n, 2).float()


def three_scores(n: int) -> Tensor:
    return 3 * draw(6)(n, 3).float()


Siamese, Triplets = library.SiameseDistanceMetric, library.TripletDistanceMetric
DROP_INS: dict[str, Case] = {
    "CoSENT": from_embeddings("CoSENTLoss", 50.0, target=scores),
    "CoSENT euclidean": from_embeddings("CoSENTLoss", 1.0, util.pairwise_euclidean_sim, target=scores),
    "AnglE": from_embeddings("AnglELoss", 20.0, target=scores),
    "AnglE triplets": from_embeddings("AnglELoss", 20.0, columns="abc"),
    "CosineSimilarity": from_embeddings("CosineSimilarityLoss", target=scores),
    "Contrastive": from_embeddings("ContrastiveLoss", Siamese.COSINE_DISTANCE, 0.1, target=binary),
    "Contrastive euclidean": from_embeddings("ContrastiveLoss", Siamese.EUCLIDEAN, 5.0, target=binary),
    "Contrastive manhattan": from_embeddings("ContrastiveLoss", Siamese.MANHATTAN, 30.0, target=binary),
    "OnlineContrastive": from_embeddings("OnlineContrastiveLoss", Siamese.COSINE_DISTANCE, 0.1, target=binary),
    "Triplet": from_embeddings("TripletLoss", Triplets.EUCLIDEAN, 3.0, columns="abc"),
    "Triplet cosine": from_embeddings("TripletLoss", Triplets.COSINE, 0.05, columns="abc"),
    "Triplet manhattan": from_embeddings("TripletLoss", Triplets.MANHATTAN, 15.0, columns="abc"),
    "MarginMSE": from_embeddings("MarginMSELoss", columns="abcd", target=two_margins),
    "MarginMSE cosine": from_embeddings("MarginMSELoss", util.pairwise_cos_sim, columns="abcd", target=two_margins),
    "DistillKLDiv": from_embeddings(
        "DistillKLDivLoss", util.pairwise_dot_score, 5.0, columns="abcd", target=three_scores
    ),
    "BatchHardTriplet": from_embeddings("BatchHardTripletLoss", columns="a", target=labels),
    "BatchHardSoftMarginTriplet": from_embeddings("BatchHardSoftMarginTripletLoss", columns="a", target=labels),
    "BatchSemiHardTriplet": from_embeddings("BatchSemiHardTripletLoss", columns="a", target=labels, slack=3.0),
    "BatchAllTriplet": from_embeddings("BatchAllTripletLoss", columns="a", target=labels, slack=3.0),
    "GlobalOrthogonalRegularization": from_embeddings("GlobalOrthogonalRegularizationLoss"),
    "MultipleNegativesRanking 20": from_embeddings("MultipleNegativesRankingLoss", 20.0),
    "MultipleNegativesRanking 100": from_embeddings("MultipleNegativesRankingLoss", 100.0, columns="abc"),
    "MultipleNegativesSymmetricRanking": from_embeddings("MultipleNegativesSymmetricRankingLoss", 100.0),
    "CachedMultipleNegativesRanking": from_embeddings("CachedMultipleNegativesRankingLoss", 100.0),
    "CachedMultipleNegativesSymmetricRanking": from_embeddings("CachedMultipleNegativesSymmetricRankingLoss", 50.0),
    "MegaBatchMargin": mega_loss(),
}
for name, case in DROP_INS.items():
    CASES[f"losses.{name}"] = case

# Where the library computes in float32 under autocast, of embeddings in float32: there is no product, or none that
# ours lets autocast round (distances are differences of nearly equal numbers).
UNDER_AUTOCAST = {
    "CoSENT": ("CoSENTLoss", (50.0,), {"target": scores}),
    "AnglE": ("AnglELoss", (20.0,), {"target": scores}),
    "CosineSimilarity": ("CosineSimilarityLoss", (), {"target": scores}),
    "Contrastive": ("ContrastiveLoss", (Siamese.COSINE_DISTANCE, 0.1), {"target": binary}),
    "OnlineContrastive": ("OnlineContrastiveLoss", (Siamese.EUCLIDEAN, 6.0), {"target": binary}),
    "Triplet": ("TripletLoss", (Triplets.EUCLIDEAN, 3.0), {"columns": "abc"}),
    "MarginMSE": ("MarginMSELoss", (), {"columns": "abcd", "target": two_margins}),
    "DistillKLDiv": ("DistillKLDivLoss", (util.pairwise_dot_score, 5.0), {"columns": "abcd", "target": three_scores}),
    "BatchHardTriplet": ("BatchHardTripletLoss", (), {"columns": "a", "target": labels}),
    "BatchSemiHardTriplet": ("BatchSemiHardTripletLoss", (), {"columns": "a", "target": labels}),
    "BatchAllTriplet": ("BatchAllTripletLoss", (), {"columns": "a", "target": labels}),
    "GlobalOrthogonalRegularization": ("GlobalOrthogonalRegularizationLoss", (), {}),
}
for name, (kind, arguments, more) in UNDER_AUTOCAST.items():
    CASES[f"autocast losses.{name}"] = from_embeddings(kind, *arguments, autocast="float32", **more)
CASES["autocast mega_batch_margin"] = Case(near_duplicates, call_mega, mega, ("a", "b"), "float32")
for name, options in GUIDED.items():
    CASES[f"autocast guided {name}"] = guided(guided_inputs, "float32", **options)

# Products read what autocast makes of them.
for way, kind in (("one way", "MultipleNegativesRankingLoss"), ("two ways", "MultipleNegativesSymmetricRankingLoss")):
    for scale in (20.0, 100.0):
        CASES[f"autocast losses.InfoNCE {scale:g}, {way}"] = from_embeddings(kind, scale, autocast="half")


def gist(autocast: str | None = None, **options: Any) -> Case:
    def ours(x: Tensors, **chunks: Any) -> Tensor:
        loss = object.__new__(losses.GISTEmbedLoss)
        nn.Module.__init__(loss)
        defaults = {"margin_strategy": "absolute", "margin": 0.0, "contrast_anchors": True, "contrast_positives": True}
        vars(loss).update(defaults | {"temperature": 0.01} | options)
        loss.similarity_fct, loss.cross_entropy_loss = nn.CosineSimilarity(dim=-1), nn.CrossEntropyLoss()
        loss._set_options(**chunks)
        return loss.compute_loss_from_embeddings([x["a"], x["b"]], [x["guide a"], x["guide b"]])

    return Case(guided_inputs, ours, partial(guided_formula, **options), ("a", "b"), autocast)


CASES["losses.GISTEmbed"] = gist()
CASES["autocast losses.GISTEmbed"] = gist("float32")


def sigmoid_loss(autocast: str | None = None) -> Case:
    def ours(x: Tensors, **chunks: Any) -> Any:
        loss = losses.SigmoidPairLoss(MODEL, 30.0, -28.0, **chunks)
        loss.log_scale, loss.bias = nn.Parameter(x["log_scale"]), nn.Parameter(x["bias"])
        value = loss.compute_loss_from_embeddings([x["a"], x["b"]])
        x["log_scale"], x["bias"] = loss.log_scale, loss.bias
        return value

    def truth(x: Tensors) -> Tensor:
        z = x["log_scale"].exp() * cosines(x["a"], x["b"]) + x["bias"]
        return -F.logsigmoid((2 * torch.eye(len(z), dtype=z.dtype) - 1) * z).sum(1).mean()

    numbers = {"log_scale": torch.tensor(3.4, dtype=FP32), "bias": torch.tensor(-28.0, dtype=FP32)}
    learns = ("a", "b", "log_scale", "bias")
    return Case(lambda: near_duplicates() | numbers, ours, truth, learns, autocast)


CASES["losses.SigmoidPair"] = sigmoid_loss()


# --- sparse encoders -------------------------------------------------------------------------------------------------


def pooled(columns: str = "ab") -> Tensors:
    """What SPLADE makes of logits: a third of the numbers are zero, or most of them in a text."""
    shift = torch.linspace(-0.5, 2.0, 64, dtype=torch.float64)[:, None]
    return {name: F.relu(x - shift).log1p() for name, x in spread(columns=columns).items()}


def flops(threshold: float | None, autocast: str | None = None) -> Case:
    def truth(x: Tensors) -> Tensor:
        return sparse_library.FlopsLoss(MODEL, threshold).compute_loss_from_embeddings(torch.cat([x["a"], x["b"]]))

    def ours(x: Tensors, **_: Any) -> Tensor:
        return CF.flops([x["a"], x["b"]], threshold=threshold)

    return Case(pooled, ours, truth, ("a", "b"), autocast)


def splade(
    inner: str, columns: str, target: Callable[[int], Tensor] | None = None, autocast: str | None = None
) -> Case:
    """Each term has a part in the gradient of an embedding, rounded apart from the others'."""

    def loss_of(package: Any, x: Tensors, **chunks: Any) -> Any:
        loss = package.SpladeLoss(MODEL, getattr(package, inner)(MODEL, **chunks), 0.3, 0.2)
        terms = loss([{"sentence_embedding": x[key]} for key in columns], x.get("label"))
        return _total(terms), terms

    def tensors() -> Tensors:
        x = pooled(columns)
        return x if target is None else x | {"label": target(len(x["a"]))}

    ours, truth = partial(loss_of, sparse_losses), partial(loss_of, sparse_library)
    return Case(tensors, ours, truth, tuple(columns), autocast)


for threshold in (None, 20):
    CASES[f"flops, threshold {threshold}"] = flops(threshold)
CASES["autocast flops"] = flops(20, "float32")
CASES["sparse.losses.Splade ranking"] = splade("SparseMultipleNegativesRankingLoss", "abc")
CASES["sparse.losses.Splade margins"] = splade("SparseMarginMSELoss", "abcd", two_margins)
CASES["autocast sparse.losses.Splade"] = splade("SparseMultipleNegativesRankingLoss", "ab", autocast="half")


# --- late interaction ------------------------------------------------------------------------------------------------


def tokens(columns: str = "ab", length: int = 4) -> Tensors:
    """Of texts whose tokens are unit vectors, of which a document's are mixtures of its query's and others."""
    rows = {name: F.normalize(x, dim=1) for name, x in spread(columns=columns).items()}
    return {name: x.unflatten(0, (-1, length)) for name, x in rows.items()}


def max_sim_formula(x: Tensors, both: bool = False, own: bool = False) -> Tensor:
    if own:
        best = torch.einsum("nqh,ndh->nqd", x["a"], x["b"]).amax(2)
        return (best.sum(1) - 1).square().mean()
    blocks = [torch.einsum("nqh,mdh->nmqd", x["a"], x[name]).amax(3).sum(2) for name in x if name != "a"]
    scores, target = torch.cat(blocks, 1), torch.arange(len(x["a"]))
    loss = F.cross_entropy(scores, target)
    return (loss + F.cross_entropy(scores[:, : len(scores)].T, target)) / 2 if both else loss


def max_sim(columns: str, autocast: str | None = None, *, both: bool = False, own: bool = False) -> Case:
    ways: dict[str, Any] = {"directions": BOTH, "partition_mode": "per_direction"} if both else {}

    def ours(x: Tensors, **_: Any) -> Tensor:
        if own:
            return (CF.max_sim_pairs(x["a"], x["b"]) - 1).square().mean()
        return CF.max_sim_info_nce(x["a"], x["b"], hard_negatives=[x[name] for name in columns[2:]], **ways)

    truth = partial(max_sim_formula, both=both, own=own)
    return Case(partial(tokens, columns), ours, truth, tuple(columns), autocast)


CASES["MaxSim contrast"] = max_sim("abc")
CASES["MaxSim contrast, two ways"] = max_sim("ab", both=True)
CASES["MaxSim of own documents"] = max_sim("ab", own=True)
CASES["autocast MaxSim contrast"] = max_sim("ab", "half")


# --- Matryoshka ------------------------------------------------------------------------------------------------------

WIDTHS, WIDTH_WEIGHTS = (64, 32, 16), (1.0, 0.5, 0.25)


def matryoshka(
    name: str,
    *arguments: Any,
    columns: str = "ab",
    target: Callable[[int], Tensor] | None = None,
    autocast: str | None = None,
    slack: float = 1.0,
    **options: Any,
) -> Case:
    """Of the library's loss at every width: the sum as it is defined."""

    def ours(x: Tensors, **chunks: Any) -> Tensor:
        inner = getattr(losses, name)(MODEL, *arguments, **options, **chunks)
        loss = losses.MatryoshkaLoss(MODEL, inner, WIDTHS, WIDTH_WEIGHTS)
        return loss.compute_loss_from_embeddings([x[key] for key in columns], x.get("label"))

    def truth(x: Tensors) -> Tensor:
        theirs = {key: value for key, value in options.items() if key != "learnable_scale"}
        loss, total = library_loss(name, *arguments, **theirs), 0.0
        for width, weight in zip(WIDTHS, WIDTH_WEIGHTS, strict=True):
            cut = [F.normalize(x[key][:, :width], dim=1) for key in columns]
            total = total + weight * loss.compute_loss_from_embeddings(cut, x.get("label"))
        return total

    def tensors() -> Tensors:
        x = near_duplicates(columns=columns)
        return x if target is None else x | {"label": target(len(x["a"]))}

    return Case(tensors, ours, truth, tuple(columns), autocast, slack=dict.fromkeys(columns, slack), why=CANCELS)


MATRYOSHKA: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    "InfoNCE 20": ("MultipleNegativesRankingLoss", (20.0,), {}),
    "InfoNCE 100": ("MultipleNegativesRankingLoss", (100.0,), {}),
    "InfoNCE that learns": ("MultipleNegativesRankingLoss", (20.0,), {"learnable_scale": True}),
    "symmetric InfoNCE": ("MultipleNegativesSymmetricRankingLoss", (50.0,), {}),
    "CoSENT": ("CoSENTLoss", (50.0,), {"target": scores}),
    "AnglE": ("AnglELoss", (20.0,), {"target": scores}),
    "Triplet": ("TripletLoss", (Triplets.EUCLIDEAN, 0.2), {"columns": "abc"}),
    "BatchHardTriplet": ("BatchHardTripletLoss", (MATRICES["euclidean"], 0.3), {"columns": "a", "target": labels}),
    "BatchAllTriplet": (
        "BatchAllTripletLoss",
        (MATRICES["euclidean"], 0.3),
        {"columns": "a", "target": labels},
    ),
    "OnlineContrastive": ("OnlineContrastiveLoss", (Siamese.COSINE_DISTANCE, 0.1), {"target": binary}),
    "DistillKLDiv": (
        "DistillKLDivLoss",
        (util.pairwise_cos_sim, 0.5),
        {"columns": "abcd", "target": three_scores},
    ),
}
for name, (kind, arguments, more) in MATRYOSHKA.items():
    CASES[f"Matryoshka of {name}"] = matryoshka(kind, *arguments, **more)
CASES["autocast Matryoshka of CoSENT"] = matryoshka("CoSENTLoss", 50.0, target=scores, autocast="float32")
CASES["autocast Matryoshka of InfoNCE 20"] = matryoshka("MultipleNegativesRankingLoss", 20.0, autocast="half")
