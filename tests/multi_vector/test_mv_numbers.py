"""Losses, gradients and curves of training are the library's, of all classes, scores and ways of embedding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from mv_parts import (
    CACHED,
    CASES,
    FIRST,
    KL,
    MINI,
    MNRL,
    Case,
    N,
    batch,
    encoder,
    labels_of,
    negative_l1,
    negative_l1_of_lists,
    texts,
)
from sentence_transformers import MultiVectorEncoderTrainer, MultiVectorEncoderTrainingArguments, util
from sentence_transformers.multi_vector_encoder import losses as library
from sentence_transformers.multi_vector_encoder import scoring
from sentence_transformers.sentence_transformer import losses as dense_library
from st_parts import EXACT, assert_same, value_and_grads

from chunked_embed import losses as dense
from chunked_embed.multi_vector import losses

every = pytest.mark.parametrize("case", CASES)
CLOSE = {"rtol": 1e-9, "atol": 1e-11} if EXACT else {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def models(transformer_dir: str) -> dict[bool, Any]:
    return {pooled: encoder(transformer_dir, pooled) for pooled in (False, True)}


def result(loss: Any, model: Any, case: Case, rows: slice = slice(None)) -> tuple[torch.Tensor, dict]:
    labels = labels_of(case.labels)
    return value_and_grads(
        loss, model, batch(model, case.columns, rows), labels if labels is None else labels[rows], 1.5
    )


@pytest.mark.parametrize(
    ("case", "pooled"), [*((case, False) for case in CASES), *((case, True) for case in FIRST.values())]
)
def test_loss_and_gradients(case: str, pooled: bool, models: dict[bool, Any], exact: None) -> None:
    model = models[pooled]
    expected = result(CASES[case].of_library(model), model, CASES[case])
    ours = CASES[case].ours(model)
    assert_same(result(ours, model, CASES[case]), expected, **CLOSE)
    with torch.no_grad():
        labels = labels_of(CASES[case].labels)
        torch.testing.assert_close(ours(batch(model, CASES[case].columns), labels), expected[0], **CLOSE)


@pytest.mark.slow
@every
def test_curves_of_training(case: str, transformer_dir: str, tmp_path: Path, exact: None) -> None:
    """Of the real trainer, with dropout where both embed alike."""
    dropout = 0.0 if CASES[case].theirs else 0.1
    columns = dict(zip(["query", "positive", "one", "two"], texts(14, CASES[case].columns)))
    labels = labels_of(CASES[case].labels)
    if labels is not None:
        columns["label"] = torch.cat([labels, labels.flip(0)]).tolist()
    found: dict[str, list[float]] = {}
    for who, make in (("ours", CASES[case].ours), ("theirs", CASES[case].of_library)):
        model = encoder(transformer_dir, dropout=dropout)
        args = MultiVectorEncoderTrainingArguments(
            output_dir=str(tmp_path / who),
            max_steps=3,
            per_device_train_batch_size=N,
            learning_rate=1e-3,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            seed=0,
        )
        trainer = MultiVectorEncoderTrainer(
            model=model, args=args, train_dataset=Dataset.from_dict(columns), loss=make(model)
        )
        trainer.train()
        found[who] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(found["ours"]) == 3 and len(set(found["ours"])) == 3
    assert found["ours"] == pytest.approx(found["theirs"], rel=1e-6, abs=1e-6)


# --- at several widths -----------------------------------------------------------------------------------------------

WIDTHS = {"matryoshka_dims": [10, 4], "matryoshka_weights": [1.0, 0.3]}
SEVERAL = [*FIRST.values(), "ranking, XTR", "cached, XTR", "cached, own", "lists, XTR", "margins, own"]


@pytest.mark.parametrize("case", SEVERAL)
def test_matryoshka(case: str, models: dict[bool, Any], exact: None) -> None:
    """Ours around all of ours; the library's around what it takes, which are the losses with gradient caching."""
    model, ours = models[False], CASES[case].ours(models[False])
    found = result(dense.MatryoshkaLoss(model, ours, **WIDTHS), model, CASES[case])
    plain = [CASES[case].ours(cut(model, width)) for width in WIDTHS["matryoshka_dims"]]
    each = [result(loss, model, CASES[case]) for loss in plain]
    weights = WIDTHS["matryoshka_weights"]
    value = sum(w * of[0] for w, of in zip(weights, each))
    grads = {name: sum(w * of[1][name] for w, of in zip(weights, each)) for name in each[0][1]}
    assert_same(found, (value, grads), **CLOSE)
    if not ours.uses_gradient_cache:
        with pytest.raises(TypeError, match="task"):
            result(dense_library.MatryoshkaLoss(model, CASES[case].of_library(model), **WIDTHS), model, CASES[case])
        return
    around = (dense_library.MatryoshkaLoss, ours), (dense.MatryoshkaLoss, CASES[case].of_library(model))
    for kind, inner in around if not CASES[case].theirs else around[:1]:
        assert_same(result(kind(model, inner, **WIDTHS), model, CASES[case]), (value, grads), **CLOSE)
    if not CASES[case].theirs:
        expected = dense_library.MatryoshkaLoss(model, CASES[case].of_library(model), **WIDTHS)
        assert_same(found, result(expected, model, CASES[case]), **CLOSE)


def cut(model: Any, width: int) -> torch.nn.Module:
    """The model with the first of its embeddings' numbers alone, as unit vectors."""

    class Cut(torch.nn.Module):
        def forward(self, features: dict[str, Any], **keywords: Any) -> dict[str, Any]:
            found = dict(model(features, **keywords))
            short = found["token_embeddings"][..., :width]
            return found | {"token_embeddings": torch.nn.functional.normalize(short, dim=-1)}

    return Cut()


def test_matryoshka_refuses(models: dict[bool, Any]) -> None:
    model = models[False]
    with pytest.raises(ValueError, match=f"expected {KL} of chunked_embed.multi_vector.losses inside of Matryoshka"):
        dense.MatryoshkaLoss(model, library.MultiVectorDistillKLDivLoss(model), **WIDTHS)
    with pytest.raises(ValueError, match=f"mini-batches of a loss of tokens on that loss, Cached{KL}"):
        dense.MatryoshkaLoss(model, losses.MultiVectorDistillKLDivLoss(model), **WIDTHS, mini_batch_size=4)
    with pytest.raises(ValueError, match="texts' embeddings in Matryoshka2dLoss"):
        dense.Matryoshka2dLoss(model, losses.MultiVectorDistillKLDivLoss(model), [10])
    with pytest.raises(TypeError, match="expected a SentenceTransformer as model, got a MultiVectorEncoder"):
        dense.MatryoshkaLoss(model, dense.CoSENTLoss(None), **WIDTHS)
    with pytest.raises(ValueError, match="no such option"):
        dense.MatryoshkaLoss(model, CASES["cached"].of_library(model), **WIDTHS, chunk_size=4)


# --- what is ours alone ----------------------------------------------------------------------------------------------

BOTH = ("query_to_doc", "doc_to_query")
EXTRAS: dict[str, dict[str, Any]] = {
    "both ways": {"directions": BOTH},
    "symmetric": {"directions": BOTH, "partition_mode": "per_direction"},
    "labels": {"false_negatives": "labels"},
    "text": {"false_negatives": "text", "directions": BOTH},
    "learnable": {"learnable_scale": True, "scale": 2.0, "directions": BOTH},
}
SCORES = {"MaxSim": None, "XTR": scoring.XTRScores(9), "own": negative_l1}


@pytest.mark.parametrize(("score", "name"), [*((score, MNRL) for score in SCORES), ("MaxSim", CACHED), ("own", CACHED)])
@pytest.mark.parametrize("extra", EXTRAS)
def test_extras(extra: str, score: str, name: str, models: dict[bool, Any], exact: None) -> None:
    """By the whole matrix of the library's scores, masked by hand."""
    model, options = models[False], EXTRAS[extra]
    mini = MINI if name == CACHED else {}
    # Two documents are the same where texts are: of tokens that are equally near, the library retrieves any.
    chosen = scoring.XTRScores(500) if (extra, score) == ("text", "XTR") else SCORES[score]
    loss = getattr(losses, name)(model, similarity_fct=chosen, **options, **mini)
    columns = batch(model, 3)
    labels = torch.tensor([0, 1, 2, 1, 4, 5, 6])
    if extra == "text":  # query 3 is query 1; document 4 is the hard negative of query 0
        columns[0], columns[1], columns[2] = repeated(columns[0], 3, 1), *swapped(columns[1], columns[2])
    model.zero_grad()
    value = loss([dict(column) for column in columns], labels)
    (1.5 * value).backward()
    found = value.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    model.zero_grad()
    outputs = [model(dict(c), task=t) for c, t in zip(columns, ("query", "document", "document"))]
    stacked = util.stack_padded_token_embeddings(
        [o["token_embeddings"] for o in outputs[1:]], [o["attention_mask"].bool() for o in outputs[1:]]
    )
    asked = {"queries_mask": outputs[0]["attention_mask"], "documents_mask": stacked[1]}
    scores = (chosen or scoring.colbert_scores)(outputs[0]["token_embeddings"], stacked[0], **asked)
    scale = torch.tensor(float(loss.scale), dtype=torch.float64, requires_grad=True)
    to_documents = (scores * scale).view(N, N, 2)
    to_queries = to_documents[..., 0].T
    own = torch.eye(N, dtype=torch.bool)
    out_documents, out_queries = torch.zeros(N, N, 2, dtype=torch.bool), torch.zeros(N, N, dtype=torch.bool)
    if "false_negatives" in options:
        same = (labels[:, None] == labels) & ~own
        out_documents |= same[..., None]
        out_queries |= same
    if extra == "text":
        out_documents[4, 0, 1] = True  # the hard negative of query 0 is the document of query 4
    positive = to_documents[..., 0].diagonal()
    first = to_documents.masked_fill(out_documents, -torch.inf).flatten(1).logsumexp(1)
    second = to_queries.masked_fill(out_queries, -torch.inf).logsumexp(1)
    z = first
    if "directions" in options:
        both = torch.stack([first, second])
        z = both.mean(0) if options.get("partition_mode") else both.logsumexp(0)
    expected = (z - positive).mean()
    (1.5 * expected).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    close = {"rtol": 1e-6, "atol": 1e-8} if extra == "learnable" else CLOSE  # whose scale is a float32 parameter
    assert_same(found, (expected.detach(), grads), **close)
    if extra == "learnable":
        torch.testing.assert_close(
            loss.log_scale.grad, (scale.grad * scale.detach()).to(torch.float32), rtol=1e-5, atol=1e-6
        )


def repeated(column: dict[str, Any], row: int, of: int) -> dict[str, Any]:
    """A column in which one text is another."""
    order = torch.arange(N)
    order[row] = of
    return {name: value[order] if isinstance(value, torch.Tensor) else value for name, value in column.items()}


def swapped(documents: dict[str, Any], negatives: dict[str, Any]) -> list[dict[str, Any]]:
    """Columns of one width, in which the first negative is the fifth document."""
    names = [name for name, value in documents.items() if isinstance(value, torch.Tensor)]
    width = max(documents["input_ids"].shape[1], negatives["input_ids"].shape[1])
    wide = [
        column | {n: torch.nn.functional.pad(column[n], (0, width - column[n].shape[1])) for n in names}
        for column in (documents, negatives)
    ]
    for name in names:
        wide[1][name][0] = wide[0][name][4]
    return wide


# --- what a script sets or replaces ----------------------------------------------------------------------------------

KINDS = {name: FIRST[name] for name in library.__all__}
LATER: dict[str, Any] = {
    "gather_across_devices": True,
    "loss_function": torch.nn.L1Loss(),
    "mini_batch_num_tokens": 25,
    "mini_batch_size": 2,
    "scale": 3.0,
    "score_mini_batch_size": 4,
    "show_progress_bar": False,
    "student_temperature": 0.4,
    "teacher_temperature": 2.0,
    "temperature": 9.0,
}
WITHOUT_EFFECT = {*LATER} - {"loss_function", "scale", "student_temperature", "teacher_temperature"}
OTHER_SCORES = {MNRL: negative_l1, CACHED: scoring.mean_colbert_scores, KL: scoring.XTRKDScores(5)}


@pytest.mark.parametrize("name", KINDS)
def test_attributes_set_later(name: str, models: dict[bool, Any], exact: None) -> None:
    """Each that the library's class has."""
    model, case = models[False], CASES[KINDS[name]]
    case = case._replace(keywords={"mini_batch_size": 3} if name == CACHED else {})
    plain = result(case.of_library(model), model, case)
    theirs = case.of_library(model)
    for attribute in {n for n in vars(theirs) if n[0] != "_"} | {*theirs._modules} - {"model"}:
        if attribute in ("training", "model"):
            continue
        value = LATER.get(attribute) or OTHER_SCORES.get(name, negative_l1_of_lists)
        found = []
        for loss in (case.ours(model), case.of_library(model)):
            setattr(loss, attribute, value)
            assert getattr(loss, attribute) == value and loss.get_config_dict().get(attribute, value) in (
                value, util.similarity_fct_name(value) if callable(value) else value,
            )  # fmt: skip
            found.append(result(loss, model, case))
        assert_same(*found, **CLOSE)
        assert attribute in WITHOUT_EFFECT or not torch.equal(found[1][0], plain[0]), attribute


def scaled(method: Any) -> Any:
    """A method of a subclass, which doubles the numbers that the library's gives."""

    def replaced(self: Any, *args: Any, **keywords: Any) -> Any:
        found = method(super(type(self), self))(*args, **keywords)
        return (found[0] * 2, *found[1:]) if isinstance(found, tuple) else 2 * found

    return replaced


METHODS = {
    "_score": lambda of: of._score,
    "calculate_loss": lambda of: of.calculate_loss,
    "calculate_loss_and_cache_gradients": lambda of: of.calculate_loss_and_cache_gradients,
    "embed_minibatch": lambda of: of.embed_minibatch,
    "forward": lambda of: of.forward,
}
# The iterator hands on what the other method gives.
ASIDE = {"__init__", "citation", "embed_minibatch_iter", "get_config_dict"}


@pytest.mark.parametrize("name", KINDS)
def test_methods_of_a_subclass(name: str, models: dict[bool, Any], exact: None) -> None:
    """Each that the library's class has, of which a subclass makes another."""
    model, case = models[False], CASES[KINDS[name]]
    case = case._replace(keywords={"mini_batch_size": 3} if name == CACHED else {})
    plain = result(case.of_library(model), model, case)
    mine = getattr(library, name)
    methods = {n for n, value in vars(mine).items() if callable(value) or isinstance(value, property)} - ASIDE
    assert methods <= {*METHODS}
    for method in methods:
        found = []
        for package in (losses, library):
            own = type("Mine", (getattr(package, name),), {method: scaled(METHODS[method]), "__module__": "training"})
            found.append(result(own(model, **case.keywords), model, case))
        assert_same(*found, **CLOSE)
        assert not torch.equal(found[1][0], plain[0]), method


@pytest.mark.parametrize("case", [*KINDS.values(), "ranking, rows", "cached, tokens", "lists, rows"])
def test_embeds_as_the_library_does(case: str, models: dict[bool, Any]) -> None:
    """The same forward passes, of the same texts: all documents in one, rows of them, or mini-batches twice."""
    model, calls = models[False], []
    with model[0].register_forward_pre_hook(lambda module, args: calls.append(args[0]["input_ids"])):
        for loss in (CASES[case].ours(model), CASES[case].of_library(model)):
            result(loss, model, CASES[case])
    assert len(calls) % 2 == 0 and len(calls) > 2
    half = len(calls) // 2
    assert all(map(torch.equal, calls[:half], calls[half:]))


def test_a_cached_loss_may_embed_at_once(models: dict[bool, Any], exact: None) -> None:
    model, calls = models[False], []
    at_once, later = (CASES["lists, cached"].ours(model) for _ in range(2))
    at_once.mini_batch_size = None
    with model[0].register_forward_pre_hook(lambda module, args: calls.append(None)):
        found = result(at_once, model, CASES["lists"])
    assert len(calls) == 2  # queries, and documents
    assert_same(found, result(later, model, CASES["lists"]), **CLOSE)
