"""The classes of the multi-vector losses as objects: names, arguments, attributes, configs, copies, cards, refusals."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import random
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from mv_parts import (
    ALONE,
    CACHED,
    CASES,
    FIRST,
    KL,
    MARGIN,
    MNRL,
    OUT,
    N,
    encoder,
    labels_of,
    texts,
)
from sentence_transformers import MultiVectorEncoderTrainer, MultiVectorEncoderTrainingArguments, SparseEncoder
from sentence_transformers.base.losses import uses_gradient_cache
from sentence_transformers.base.model_card import generate_model_card
from sentence_transformers.multi_vector_encoder import losses as library
from sentence_transformers.multi_vector_encoder import scoring
from torch import Tensor, nn

from chunked_embed import __version__
from chunked_embed.losses._base import ChunkedLoss
from chunked_embed.losses._card import sign_cards
from chunked_embed.multi_vector import losses
from chunked_embed.multi_vector.losses._scores import Known, known

every = pytest.mark.parametrize("case", CASES)
each = pytest.mark.parametrize("name", losses.__all__)
OF_RANKING = {"directions", "partition_mode", "learnable_scale", "false_negatives", "chunk_size"}


class Model(nn.Module):
    """Of a loss that is given embeddings, which hands them on."""

    def forward(self, features: dict[str, Any], task: str | None = None) -> dict[str, Any]:
        return features


def columns_of(case: str, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Tensor]]:
    """Embeddings and masks, each column of a width of its own; no document is empty."""
    torch.manual_seed(0)
    sizes = [5, 9, 7, 8][: CASES[case].columns]
    masks = [torch.rand(N, size) < 0.7 for size in sizes]
    for mask in masks:
        mask[:, 0] = True
    made = [torch.nn.functional.normalize(torch.randn(N, size, OUT, dtype=torch.float64), dim=-1) for size in sizes]
    return [x.to(dtype).requires_grad_() for x in made], masks


def result(loss: Any, columns: list[Tensor], labels: Tensor | None, masks: list[Tensor]) -> list[Tensor]:
    value = loss.compute_loss_from_embeddings(columns, labels, masks)
    return [value.detach(), *torch.autograd.grad(1.5 * value, columns)]


def test_every_name() -> None:
    assert set(losses.__all__) == {*library.__all__, *ALONE} <= set(dir(losses))
    for name in library.__all__:
        assert issubclass(getattr(losses, name), (getattr(library, name), ChunkedLoss))
        assert getattr(losses, name) is not getattr(library, name)
    for name in ALONE:
        assert issubclass(getattr(losses, name), getattr(library, name.removeprefix("Cached")))
    assert not issubclass(getattr(losses, CACHED), getattr(library, MNRL))
    with pytest.raises(AttributeError, match=r"NoLoss.*it has CachedMultiVector"):
        losses.NoLoss  # noqa: B018


@each
def test_arguments(name: str) -> None:
    """The library's in its order, with its defaults; all but the model are keywords."""
    ours = inspect.signature(getattr(losses, name)).parameters
    of = getattr(library, name.removeprefix("Cached") if name in ALONE else name)
    theirs = inspect.signature(of).parameters
    assert [n for n in ours if n in theirs] == list(theirs)
    expected = {n: p.default for n, p in theirs.items()} | ({"mini_batch_size": 32} if name in ALONE else {})
    assert {n: ours[n].default for n in theirs} == expected
    assert {n: p.kind for n, p in ours.items() if n != "model"} == dict.fromkeys(
        {*ours} - {"model"}, inspect.Parameter.KEYWORD_ONLY
    )
    mini = {"mini_batch_num_tokens", "show_progress_bar"} if name in ALONE else set()
    more = OF_RANKING if "Ranking" in name else {"gather_across_devices"}
    assert {*ours} - {*theirs} == more | mini | {"max_chunk_bytes"}


@every
def test_attributes_config_and_copies(case: str) -> None:
    ours, theirs = CASES[case].ours(Model()), CASES[case].of_library(Model())
    config = ours.get_config_dict()
    assert {n: v for n, v in config.items() if n not in CASES[case].own} == theirs.get_config_dict()
    assert ours.citation == theirs.citation and list(ours.state_dict()) == list(theirs.state_dict())
    assert uses_gradient_cache(ours) == (uses_gradient_cache(theirs) or case.endswith(", cached"))
    for name in {name for name in vars(theirs) if not name.startswith("_")} | {*theirs._modules} - {"model"}:
        value, other = getattr(ours, name), getattr(theirs, name)
        assert value == other or type(value) is type(other), name
    budget = {"max_chunk_bytes": 4096}
    assert CASES[case].ours(Model(), **budget).get_config_dict() == {**config, **budget}
    json.dumps(config)
    columns, masks = columns_of(case)
    labels = labels_of(CASES[case].labels)
    expected = result(ours, columns, labels, masks)
    for loss in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours), CASES[case].ours(Model(), **budget)):
        torch.testing.assert_close(result(loss, columns, labels, masks), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FIRST)
def test_half_precision_is_rounded_once(name: str, dtype: torch.dtype) -> None:
    case = FIRST[name]
    columns, masks = columns_of(case, dtype)
    labels = labels_of(CASES[case].labels)
    wide = [x.detach().double().requires_grad_() for x in columns]
    expected = result(CASES[case].ours(Model()), wide, labels, masks)
    value, *grads = result(CASES[case].ours(Model()), columns, labels, masks)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected[0], rtol=2e-5, atol=1e-6)
    bound = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    for grad, exact in zip(grads, expected[1:]):
        assert grad.dtype == dtype and (grad.double() - exact).norm() <= bound * exact.norm()


@pytest.mark.parametrize("case", [case for case in CASES if "own" not in case])
def test_a_document_without_tokens(case: str, exact: None) -> None:
    """It has the library's score, and no gradient."""
    columns, masks = columns_of(case)
    labels = labels_of(CASES[case].labels)
    masks[-1][2] = False
    if "margins" in case:  # of which the library's is squared: the score itself is what counts
        labels = None if labels is None else labels * 0
    value, *grads = result(CASES[case].ours(Model()), columns, labels, masks)
    assert torch.isfinite(value) and not grads[-1][2].any() and grads[-1][3].any()


def test_tokens_that_do_not_count_change_nothing() -> None:
    for name, case in FIRST.items():
        columns, masks = columns_of(case)
        labels, loss = labels_of(CASES[case].labels), getattr(losses, name)(Model())
        before = result(loss, columns, labels, masks)
        other = [torch.where(mask[..., None], x.detach(), 9.0).requires_grad_() for x, mask in zip(columns, masks)]
        torch.testing.assert_close(result(loss, other, labels, [mask.long() for mask in masks]), before)
        without = loss.compute_loss_from_embeddings(columns, labels)
        full = [torch.ones(x.shape[:2]) for x in columns]
        assert torch.equal(without, loss.compute_loss_from_embeddings(columns, labels, full)) and without != before[0]


def test_a_teacher_may_leave_a_candidate_out() -> None:
    columns, masks = columns_of("lists")
    labels = labels_of(3).index_fill(1, torch.tensor([2]), -torch.inf)
    value, *grads = result(losses.MultiVectorDistillKLDivLoss(Model()), columns, labels, masks)
    scores = scoring.colbert_kd_scores(columns[0], *stacked(columns[1:], masks))
    logs, p = scores.double().log_softmax(1), labels.softmax(1)
    expected = (torch.special.xlogy(p, p) - p * logs).sum(1).mean()
    torch.testing.assert_close(value, expected.detach(), rtol=1e-5, atol=1e-6)
    assert all(torch.isfinite(grad).all() for grad in grads)


def stacked(columns: list[Tensor], masks: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Documents, and the masks of queries and of documents."""
    width = max(x.shape[1] for x in columns)
    wide = [nn.functional.pad(x, (0, 0, 0, width - x.shape[1])) for x in columns]
    real = [nn.functional.pad(m, (0, width - m.shape[1])) for m in masks[1:]]
    return torch.stack(wide, 1), masks[0], torch.stack(real, 1)


# --- scores ----------------------------------------------------------------------------------------------------------

KNOWN: dict[str, tuple[Any, str, Known | None]] = {
    "all": (scoring.colbert_scores, "all", Known()),
    "mean": (scoring.mean_colbert_kd_scores, "lists", Known(True)),
    "mean that is none": (partial(scoring.mean_colbert_scores, length_normalize=False), "all", Known()),
    "budget": (partial(scoring.colbert_scores_pairwise, chunk_elements=100), "pairs", Known(max_chunk_bytes=400)),
    "XTR": (scoring.XTRScores(7, chunk_elements=3), "all", Known(top_k=7, max_chunk_bytes=12)),
    "XTR of lists": (scoring.XTRKDScores(7), "lists", Known(top_k=7)),
    "XTR function": (partial(scoring.xtr_kd_scores, top_k=5), "lists", Known(top_k=5)),
    "XTR default": (scoring.xtr_scores_pairwise, "pairs", Known(top_k=256)),
    "nested": (partial(partial(scoring.xtr_scores, top_k=5), top_k=4), "all", Known(top_k=4)),
    "other layout": (scoring.colbert_kd_scores, "all", None),
    "other layout of XTR": (scoring.XTRKDScores(7), "all", None),
    "a mask": (partial(scoring.colbert_scores, documents_mask=None), "all", None),
    "an argument": (partial(scoring.colbert_scores, torch.zeros(1)), "all", None),
    "a subclass": (type("Mine", (scoring.XTRScores,), {})(7), "all", None),
    "wrapped": (lambda *args, **keywords: scoring.colbert_scores(*args, **keywords), "all", None),
}


@pytest.mark.parametrize("case", KNOWN)
def test_scores_are_known_by_identity(case: str) -> None:
    function, layout, expected = KNOWN[case]
    assert known(function, layout) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("case", [case for case in CASES if "own" in case])
def test_others_are_called_as_the_library_calls_them(case: str) -> None:
    calls: dict[str, list] = {"ours": [], "theirs": []}

    def watched(who: str) -> Callable:
        def score(*args: Any, **keywords: Any) -> Tensor:
            calls[who].append({**dict(enumerate(args)), **keywords})
            return CASES[case].keywords["similarity_fct"](*args, **keywords)

        return score

    ours, theirs = CASES[case].ours(Model()), CASES[case].of_library(Model())
    ours.similarity_fct, theirs.similarity_fct = watched("ours"), watched("theirs")
    columns, masks = columns_of(case)
    names = ("token_embeddings", "attention_mask")
    features = [dict(zip(names, pair)) for pair in zip(columns, masks)]
    for loss in (ours, theirs):
        if not uses_gradient_cache(loss):
            loss(features, labels_of(CASES[case].labels))
        else:
            loss.calculate_loss([[x] for x in columns], [[m] for m in masks])
    assert len(calls["ours"]) == len(calls["theirs"]) > 0
    for mine, other in zip(calls["ours"], calls["theirs"]):
        assert list(mine) == list(other)
        torch.testing.assert_close(mine, other)


def test_a_score_of_the_users_own_method() -> None:
    """The library goes through ``_score``."""

    class Mine(losses.MultiVectorMarginMSELoss):
        def _score(self, *args: Tensor) -> Tensor:
            return 2 * super()._score(*args)

    columns, masks = columns_of("margins")
    twice = losses.MultiVectorMarginMSELoss(
        Model(), similarity_fct=lambda *a, **k: 2 * scoring.colbert_scores_pairwise(*a, **k)
    )
    labels = labels_of(2)
    torch.testing.assert_close(result(Mine(Model()), columns, labels, masks), result(twice, columns, labels, masks))


# --- options and refusals --------------------------------------------------------------------------------------------


def test_options_are_set_later_and_checked() -> None:
    loss = losses.CachedMultiVectorMultipleNegativesRankingLoss(Model(), scale=3.0, learnable_scale=True)
    assert loss.scale == pytest.approx(3.0) and loss.score_mini_batch_size == 32
    loss.scale, loss.mini_batch_size, loss.chunk_size = 2.0, None, 4
    assert loss.scale == pytest.approx(2.0) and loss.log_scale.exp().item() == pytest.approx(2.0)
    assert not uses_gradient_cache(loss) and loss.get_config_dict()["learnable_scale"] is True
    with pytest.raises(ValueError, match="mini_batch_size"):
        loss.mini_batch_size = 0
    plain = losses.MultiVectorDistillKLDivLoss(Model(), mini_batch_size=4)
    with pytest.raises(ValueError, match=f"Cached{KL} for gradient caching"):
        plain.uses_gradient_cache = True
    with pytest.raises(TypeError, match=r"options of .* among .*got 'mini_batch_num_tokens'"):
        plain.mini_batch_num_tokens = 4


def with_embeddings(name: str, **changes: Any) -> Any:
    case = FIRST[name]
    columns, masks = columns_of(case)
    given = {"embeddings": columns, "labels": labels_of(CASES[case].labels), "masks": masks}
    for key, change in changes.items():
        given[key] = change(given[key])
    return getattr(losses, name)(Model()).compute_loss_from_embeddings(**given)


BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    **{
        f"{name}, {what}": (lambda name=name, given=given: getattr(losses, name)(**given), TypeError, message)
        for name in losses.__all__
        for what, given, message in (
            ("a name", {"model": "bert"}, "a MultiVectorEncoder as model, got 'bert'"),
            ("an option", {"model": Model(), "fuse_projection": True}, "fuse_projection"),
            ("no function", {"model": Model(), "similarity_fct": 3}, "similarity_fct"),
        )
    },
    **{
        f"{name}, a column": (
            lambda name=name: with_embeddings(name, embeddings=lambda x: x[:1]), ValueError, "expects at least",
        )
        for name in FIRST
    },
    "scale": (lambda: losses.MultiVectorMultipleNegativesRankingLoss(Model(), scale=0.0), ValueError, "scale"),
    "directions": (
        lambda: losses.MultiVectorMultipleNegativesRankingLoss(Model(), directions=("query_to_doc", "doc_to_doc")),
        ValueError, "expected directions among",
    ),
    "score rows": (
        lambda: losses.MultiVectorMultipleNegativesRankingLoss(Model(), score_mini_batch_size=0),
        ValueError, "score_mini",
    ),
    "tokens": (lambda: getattr(losses, CACHED)(Model(), mini_batch_num_tokens=0), ValueError, "mini_batch_num_tokens"),
    "temperature": (lambda: getattr(losses, KL)(Model(), temperature=0.0), ValueError, "temperature"),
    "infinite temperature": (
        lambda: getattr(losses, KL)(Model(), teacher_temperature=float("inf")), ValueError, "teacher_temperature",
    ),
    "pooled": (lambda: with_embeddings(MNRL, embeddings=lambda x: [c[:, 0] for c in x]), ValueError, r"\(N, T, H\)"),
    "rows": (lambda: with_embeddings(MNRL, embeddings=lambda x: [x[0], x[1][:3]]), ValueError, r"embeddings\[1\]"),
    "dtypes": (lambda: with_embeddings(MNRL, embeddings=lambda x: [x[0], x[1].float()]), TypeError, "one dtype"),
    "mask": (lambda: with_embeddings(MNRL, masks=lambda m: [m[1], m[1]]), ValueError, r"masks\[0\]"),
    "masks": (lambda: with_embeddings(MNRL, masks=lambda m: m[:1]), ValueError, "a mask for each of 2"),
    "no labels": (lambda: with_embeddings(KL, labels=lambda y: None), ValueError, "requires labels"),
    "lists of labels": (lambda: with_embeddings(KL, labels=lambda y: y[:, :2]), ValueError, "3 candidates"),
    "margins of labels": (
        lambda: with_embeddings(MARGIN, labels=lambda y: y[:, :1]), ValueError, "expects labels of shape",
    ),
    "NaN": (lambda: with_embeddings(KL, labels=lambda y: y * float("nan")), ValueError, "NaN"),
    "ids": (
        lambda: losses.MultiVectorMultipleNegativesRankingLoss(
            Model(), false_negatives="labels"
        ).compute_loss_from_embeddings(columns_of("ranking")[0]),
        ValueError, "needs a label for each row",
    ),
    "scores": (
        lambda: losses.MultiVectorMultipleNegativesRankingLoss(
            Model(), similarity_fct=scoring.colbert_kd_scores
        ).compute_loss_from_embeddings(columns_of("ranking")[0]),
        ValueError, "expected similarity_fct to return a score of each query with each document",
    ),
    "top_k": (
        lambda: losses.MultiVectorMultipleNegativesRankingLoss(
            Model(), similarity_fct=scoring.XTRScores(0)
        ).compute_loss_from_embeddings(columns_of("ranking")[0]),
        ValueError, "top_k",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_refuses(case: str) -> None:
    call, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        call()


def test_a_model_of_another_kind() -> None:
    model = SparseEncoder.__new__(SparseEncoder)
    nn.Module.__init__(model)
    with pytest.raises(
        TypeError, match="expected a MultiVectorEncoder as model, got a SparseEncoder, which embeds texts"
    ):
        losses.MultiVectorMarginMSELoss(model)


# --- model cards -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", losses.__all__)
def test_card(name: str, transformer_dir: str, tmp_path: Path) -> None:
    """It is the library's, line by line, but for our version; a loss that the library lacks has its own name."""

    def card(source: Any, name: str) -> str:
        model = encoder(transformer_dir, dtype=torch.float32)
        args = MultiVectorEncoderTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
        data = Dataset.from_dict(dict(zip("abc", texts(5, 3))))
        random.seed(0)
        MultiVectorEncoderTrainer(model=model, args=args, train_dataset=data, loss=getattr(source, name)(model))
        return generate_model_card(model)

    ours = card(losses, name)
    (parameters,) = re.findall(r"```json\n(.*?)```", ours, re.DOTALL)
    assert json.loads(parameters)["chunked_embed"] == __version__ and f"- loss:{name}\n" in ours
    if name in ALONE:
        assert re.search(rf"\* Loss: <code>chunked_embed\.multi_vector\.losses\.\w+\.{name}</code>", ours)
        return
    entry = re.compile(rf',\n *"chunked_embed": "{re.escape(__version__)}"')
    assert entry.sub("", ours).splitlines() == card(library, name).splitlines()


def test_cards_are_signed_once() -> None:
    from sentence_transformers import MultiVectorEncoderModelCardData

    signed = MultiVectorEncoderModelCardData.compute_dataset_metrics
    sign_cards()
    assert MultiVectorEncoderModelCardData.compute_dataset_metrics is signed
