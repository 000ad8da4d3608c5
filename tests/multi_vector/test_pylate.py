"""Numbers of PyLate's own environment (tests/data/dump_pylate.py), beside the library's losses and ours.

PyLate multiplies the products of masked document tokens by zero, and so lets that zero win where a query token has
negative products alone; the library and we leave such tokens out. Where none wins the numbers are the same. Where one
does, PyLate's are those of documents whose masked tokens are vectors of zeros, and count. Of negative products that XTR
retrieves PyLate counts none; the library and we take them for what they are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chunked_embed import functional as CF

FILE = json.loads((Path(__file__).parents[1] / "data" / "pylate.json").read_text())
EXACT = {"rtol": 1e-10, "atol": 1e-11}  # the file has twelve digits
LIBRARY = {"rtol": 1e-5, "atol": 2e-6}  # its scores are float32
ZEROS, LEFT_OUT = "zeros", "left out"  # what masked tokens of documents are


def ours(columns: list[Tensor], masks: list[Tensor], scale: float, **options: Any) -> Tensor:
    (queries, documents, *negatives), (query_mask, document_mask, *negative_masks) = columns, masks
    return CF.max_sim_info_nce(
        queries,
        documents,
        query_mask,
        document_mask,
        hard_negatives=negatives,
        hard_negative_masks=negative_masks,
        scale=scale,
        **options,
    )


class Inputs(NamedTuple):
    tokens: list[Tensor]  # queries, positives and negatives, of (N, length, width)
    masks: list[Tensor]  # (N, length)
    zeros: int  # maxima that are a masked token's zero in PyLate

    @classmethod
    def read(cls, name: str) -> Inputs:
        entry = FILE["inputs"][name]
        tokens = [torch.tensor(column, dtype=torch.float64) for column in entry["tokens"]]
        masks = [
            torch.ones(column.shape[:2], dtype=torch.bool) if mask is None else torch.tensor(mask, dtype=torch.bool)
            for mask, column in zip(entry["masks"], tokens)
        ]
        return cls(tokens, masks, entry["zeros"])

    def normalized(self, masked: str) -> tuple[list[Tensor], list[Tensor]]:
        """Embeddings and masks, as the losses take them."""
        queries, *documents = (F.normalize(column, dim=-1) for column in self.tokens)
        if masked == LEFT_OUT:
            return [queries, *documents], self.masks
        documents = [column * mask[..., None] for column, mask in zip(documents, self.masks[1:])]
        return [queries, *documents], [self.masks[0], *(torch.ones_like(mask) for mask in self.masks[1:])]

    def stacked(self, masked: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, documents (N, columns, length, width), and their masks."""
        columns, masks = self.normalized(masked)
        return columns[0], torch.stack(columns[1:], 1), masks[0], torch.stack(masks[1:], 1)


class Case(NamedTuple):
    loss: str
    inputs: str
    options: dict[str, Any]
    value: float
    gradients: list
    teacher: list | None = None

    @property
    def scale(self) -> float:
        return 1 / self.options.get("temperature", 1.0)

    def expected(self, size: int) -> tuple[Tensor, list[Tensor]]:
        """Value and gradients of the mean over queries.

        PyLate's cached loss divides its value by their number, but not the gradients.
        """
        value = torch.tensor(self.value, dtype=torch.float64)
        gradients = [torch.tensor(column, dtype=torch.float64) for column in self.gradients]
        mean = self.options.get("size_average", True)
        if not mean:
            value = value / size
        if not mean or self.loss == "CachedContrastive":
            gradients = [gradient / size for gradient in gradients]
        return value, gradients


CASES = [Case(**entry) for entry in FILE["cases"]]
WAYS = [(case, ZEROS) for case in CASES]
WAYS += [(case, LEFT_OUT) for case in CASES if not FILE["inputs"][case.inputs]["zeros"]]


def cases(*kinds: str) -> Any:
    chosen = [way for way in WAYS if way[0].loss in kinds]
    names = [f"{case.loss}, {case.inputs}, {case.options}, {masked}" for case, masked in chosen]
    return pytest.mark.parametrize(("case", "masked"), chosen, ids=names)


def compare(case: Case, value: Tensor, tokens: list[Tensor], tolerance: dict[str, float]) -> None:
    expected, gradients = case.expected(len(tokens[0]))
    torch.testing.assert_close(value.detach().double(), expected, **tolerance)
    for token, gradient in zip(tokens, gradients, strict=True):
        assert token.grad is not None
        size = {**tolerance, "atol": tolerance["atol"] * max(1.0, float(gradient.abs().max()))}
        torch.testing.assert_close(token.grad, gradient, **size)


def test_the_file_has_both_kinds_of_inputs():
    zeros = {case.inputs: FILE["inputs"][case.inputs]["zeros"] > 0 for case in CASES if case.loss == "Contrastive"}
    assert set(zeros.values()) == {True, False}
    negatives = {name: len(FILE["inputs"][name]["tokens"]) > 2 for name in zeros}
    assert {(zeros[name], negatives[name]) for name in zeros} == {(a, b) for a in (True, False) for b in (True, False)}


@pytest.mark.parametrize("chunk_size", [None, 2])
@cases("Contrastive", "CachedContrastive")
def test_contrastive(case: Case, masked: str, chunk_size: int | None):
    inputs = Inputs.read(case.inputs)
    for column in inputs.tokens:
        column.requires_grad_()
    value = ours(*inputs.normalized(masked), case.scale, chunk_size=chunk_size)
    value.backward()
    compare(case, value, inputs.tokens, EXACT)


def test_masked_tokens_are_left_out():
    """Not PyLate's numbers, where a masked token's zero wins there."""
    for case in CASES:
        inputs = Inputs.read(case.inputs)
        if inputs.zeros and case.loss == "Contrastive" and case.scale == 1.0:
            value, _ = case.expected(len(inputs.tokens[0]))
            assert abs(ours(*inputs.normalized(LEFT_OUT), case.scale) - value) > 1e-3, case.inputs


def kl_divergence(scores: Tensor, teacher: Tensor, normalized: bool) -> Tensor:
    """PyLate's, of the mean over queries: with scores moved and stretched to [0, 1] by default."""
    if normalized:
        least, most = scores.amin(1, keepdim=True), scores.amax(1, keepdim=True)
        scores = (scores - least) / (most - least + 1e-8)
    return F.kl_div(scores.log_softmax(1), teacher.log_softmax(1), reduction="batchmean", log_target=True)


@cases("Distillation")
def test_distillation(case: Case, masked: str):
    inputs = Inputs.read(case.inputs)
    for column in inputs.tokens:
        column.requires_grad_()
    queries, documents, query_mask, document_mask = inputs.stacked(masked)
    scores = CF.max_sim_pairs(queries, documents, query_mask, document_mask)
    teacher = torch.tensor(case.teacher, dtype=torch.float64)
    value = kl_divergence(scores, teacher, case.options.get("normalize_scores", True))
    value.backward()
    compare(case, value, inputs.tokens, EXACT)


XTR = [table for table in FILE["scores"] if table["function"] == "XTRScores"]
TABLES = [table for table in FILE["scores"] if table["function"] != "XTRScores"]


@pytest.mark.parametrize("masked", [ZEROS, LEFT_OUT])
@pytest.mark.parametrize("table", TABLES, ids=[f"{table['function']}, {table['inputs']}" for table in TABLES])
def test_scores(table: dict[str, Any], masked: str):
    """The library's, and ours where there are some, are PyLate's unless a masked token's zero wins."""
    scoring = pytest.importorskip("sentence_transformers.multi_vector_encoder.scoring")
    inputs = Inputs.read(table["inputs"])
    queries, documents, query_mask, document_mask = inputs.stacked(masked)
    pairs = table["function"] == "colbert_kd_scores"
    function = scoring.colbert_kd_scores if pairs else scoring.colbert_scores
    made = [(function(queries, documents, queries_mask=query_mask, documents_mask=document_mask).double(), LIBRARY)]
    if pairs:
        own = CF.max_sim_pairs(queries, documents, query_mask, document_mask)
    else:
        own = CF.max_sim(queries, documents.flatten(0, 1), query_mask, document_mask.flatten(0, 1))
    made.append((own, EXACT))
    expected = torch.tensor(table["scores"], dtype=torch.float64)
    for scores, tolerance in made:
        if masked == ZEROS or not inputs.zeros:
            torch.testing.assert_close(scores, expected, **tolerance)
        elif not pairs:  # `zeros` counts all pairs of a query and a document
            lower = scores < expected - 1e-3
            assert lower.any() and torch.allclose(scores[~lower], expected[~lower], **tolerance)


@pytest.mark.parametrize("table", XTR, ids=[table["inputs"] for table in XTR])
def test_xtr_scores(table: dict[str, Any]):
    """PyLate's but for documents of which a query token retrieves negative products alone."""
    scoring = pytest.importorskip("sentence_transformers.multi_vector_encoder.scoring")
    inputs = Inputs.read(table["inputs"])
    queries, documents, query_mask, document_mask = inputs.stacked(LEFT_OUT)
    k = table["options"]["k"]
    library = scoring.xtr_scores(queries, documents, queries_mask=query_mask, documents_mask=document_mask, top_k=k)
    made = [library.double()]
    documents, document_mask = documents.flatten(0, 1), document_mask.flatten(0, 1)
    made.append(CF.xtr_scores(queries, documents, query_mask, document_mask, top_k=k))

    products = torch.einsum("nqh,mdh->nqmd", queries, documents).masked_fill(~document_mask, -2.0)
    least = products.flatten(2).topk(k, dim=2).values[:, :, -1, None, None]
    best = products.masked_fill(products < least, -2.0).amax(3)  # (N, Q, M), -2 where nothing is retrieved
    negative = ((best > -2.0) & (best < 0.0) & query_mask[:, :, None]).any(1)
    assert negative.any() == (table["inputs"] == "pairs") and not negative.all()

    expected = torch.tensor(table["scores"], dtype=torch.float64)  # which PyLate returns in float32
    for scores in made:
        torch.testing.assert_close(scores[~negative], expected[~negative], **LIBRARY)
        assert ((scores - expected)[negative].abs() > 1e-3).all()


class Encoder(nn.Module):
    """Gives a file's tokens, by their place in it, to the library's losses."""

    def __init__(self, inputs: Inputs, masked: str) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.cat([column.flatten(0, 1) for column in inputs.tokens]))
        kept = [torch.ones_like(inputs.masks[0]), *inputs.masks[1:]]
        self.kept = torch.cat([mask.flatten() for mask in kept]) | (masked == LEFT_OUT)
        ids = iter(torch.arange(len(self.tokens)).split([column.shape[:2].numel() for column in inputs.tokens]))
        self.features = [
            {"input_ids": next(ids).view(mask.shape), "attention_mask": mask.long()}
            for mask in inputs.normalized(masked)[1]
        ]

    def forward(self, features: dict[str, Tensor], task: str | None = None) -> dict[str, Any]:
        ids = features["input_ids"]
        tokens = F.normalize(self.tokens[ids], dim=-1) * self.kept[ids, None]
        return {**features, "token_embeddings": tokens}

    def columns(self, inputs: Inputs) -> list[Tensor]:
        assert self.tokens.grad is not None
        for column, feature in zip(inputs.tokens, self.features):
            column.grad = self.tokens.grad[feature["input_ids"]]
        return inputs.tokens


@pytest.mark.parametrize("cached", [False, True])
@cases("Contrastive", "CachedContrastive")
def test_library_contrastive(case: Case, masked: str, cached: bool):
    losses = pytest.importorskip("sentence_transformers.multi_vector_encoder.losses")
    inputs = Inputs.read(case.inputs)
    encoder = Encoder(inputs, masked)
    if cached:
        sizes = {name: case.options.get(name) for name in ("mini_batch_size", "score_mini_batch_size")}
        sizes["mini_batch_size"] = sizes["mini_batch_size"] or 2
        loss = losses.CachedMultiVectorMultipleNegativesRankingLoss(encoder, scale=case.scale, **sizes)
    else:
        loss = losses.MultiVectorMultipleNegativesRankingLoss(encoder, scale=case.scale)
    value = loss(encoder.features)
    value.backward()
    compare(case, value, encoder.columns(inputs), {**LIBRARY, "atol": LIBRARY["atol"] * max(1.0, case.scale)})


@cases("Distillation")
def test_library_distillation(case: Case, masked: str):
    """The library has no normalization of scores: it is left to a function of scores."""
    losses = pytest.importorskip("sentence_transformers.multi_vector_encoder.losses")
    scoring = pytest.importorskip("sentence_transformers.multi_vector_encoder.scoring")

    def normalized(*args: Tensor, **masks: Tensor) -> Tensor:
        scores = scoring.colbert_kd_scores(*args, **masks)
        least, most = scores.amin(1, keepdim=True), scores.amax(1, keepdim=True)
        return (scores - least) / (most - least + 1e-8)

    inputs = Inputs.read(case.inputs)
    encoder = Encoder(inputs, masked)
    score = normalized if case.options.get("normalize_scores", True) else None
    loss = losses.MultiVectorDistillKLDivLoss(encoder, similarity_fct=score)
    value = loss(encoder.features, torch.tensor(case.teacher, dtype=torch.float64))
    value.backward()
    compare(case, value, encoder.columns(inputs), LIBRARY)
