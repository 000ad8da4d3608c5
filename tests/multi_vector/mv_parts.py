"""Models, batches and cases that the tests of the losses of token embeddings share."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.multi_vector_encoder import losses as library
from sentence_transformers.multi_vector_encoder import scoring
from sentence_transformers.multi_vector_encoder.modules import HierarchicalTokenPooling, MultiVectorMask
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Transformer
from st_parts import HIDDEN, sentences
from torch import Tensor, nn

from chunked_embed.multi_vector import losses

N, OUT = 7, 10
MNRL, CACHED = "MultiVectorMultipleNegativesRankingLoss", "CachedMultiVectorMultipleNegativesRankingLoss"
KL, MARGIN = "MultiVectorDistillKLDivLoss", "MultiVectorMarginMSELoss"


def encoder(
    folder: str, pooled: bool = False, dropout: float = 0.0, dtype: torch.dtype = torch.float64
) -> MultiVectorEncoder:
    """With a projection, unit vectors, words that don't count in documents and expanded queries; the same weights at
    every call."""
    torch.manual_seed(0)
    modules: list[nn.Module] = [
        Transformer(folder, query_expansion={"strategy": "min", "length": 6, "attend": False}),
        Dense(HIDDEN, OUT, bias=False, activation_function=nn.Identity(), module_input_name="token_embeddings"),
        Normalize(module_input_name="token_embeddings"),
        MultiVectorMask(["the", "over"]),
    ]
    if pooled:
        modules.append(HierarchicalTokenPooling(pool_factor=2))
    model = MultiVectorEncoder(modules=modules, device="cpu").to(dtype).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    return model


def texts(rows: int, columns: int) -> list[list[str]]:
    """A query, and documents of up to as many words as a model takes, columns being as wide as their longest."""
    queries = sentences(rows, 1)
    return [queries, *([" ".join(pair) for pair in zip(sentences(rows, i), queries)][::-1] for i in range(1, columns))]


def batch(model: Any, columns: int, rows: slice = slice(None)) -> list[dict[str, Any]]:
    tasks = ["query", *["document"] * (columns - 1)]
    return [model.preprocess(column[rows], task=task) for task, column in zip(tasks, texts(N, columns))]


def labels_of(width: int | None) -> Tensor | None:
    """(N, width), or (N,) for zero."""
    generator = torch.Generator().manual_seed(7)
    shape = (N, width) if width else (N,)
    return None if width is None else torch.rand(shape, generator=generator, dtype=torch.float64) * 4


def negative_l1(
    queries_embeddings: Tensor, documents_embeddings: Tensor, queries_mask: Tensor, documents_mask: Tensor
) -> Tensor:
    """A user's own: the distance of sums of tokens, of any of the three layouts."""
    q = (queries_embeddings * queries_mask[..., None]).sum(-2)
    d = (documents_embeddings * documents_mask[..., None]).sum(-2)
    return -(q[:, None] - d.flatten(0, -2)[None]).abs().sum(-1)


def negative_l1_of_lists(
    queries_embeddings: Tensor, documents_embeddings: Tensor, queries_mask: Tensor, documents_mask: Tensor
) -> Tensor:
    q = (queries_embeddings * queries_mask[..., None]).sum(-2)
    d = (documents_embeddings * documents_mask[..., None]).sum(-2)
    return -((q[:, None] if d.dim() == 3 else q) - d).abs().sum(-1)


class Case(NamedTuple):
    name: str
    columns: int = 2
    labels: int | None = None
    keywords: dict[str, Any] = {}
    theirs: str = ""
    own: tuple[str, ...] = ()  # keywords that the library lacks

    def ours(self, model: Any, **options: Any) -> Any:
        return getattr(losses, self.name)(model, **self.keywords, **options)

    def of_library(self, model: Any) -> Any:
        keywords = {name: value for name, value in self.keywords.items() if name not in self.own}
        return getattr(library, self.theirs or self.name)(model, **keywords)


MINI = {"mini_batch_size": 3}
CASES = {
    "ranking": Case(MNRL),
    "ranking, negatives": Case(MNRL, 4, keywords={"scale": 2.0}),
    "ranking, rows": Case(MNRL, 3, keywords={**MINI, "score_mini_batch_size": 2}),
    "ranking, mean": Case(MNRL, 3, keywords={"similarity_fct": scoring.mean_colbert_scores, "scale": 8.0}),
    "ranking, partial": Case(
        MNRL, 3, keywords={"similarity_fct": partial(scoring.colbert_scores, chunk_elements=300, length_normalize=True)}
    ),
    "ranking, XTR": Case(MNRL, 3, keywords={"similarity_fct": scoring.XTRScores(9), "scale": 5.0}),
    "ranking, XTR function": Case(MNRL, 2, keywords={"similarity_fct": scoring.xtr_scores}),
    "ranking, own": Case(MNRL, 3, keywords={"similarity_fct": negative_l1, "score_mini_batch_size": 2}),
    "cached": Case(CACHED, 3, keywords=MINI),
    "cached, tokens": Case(CACHED, 3, keywords={"mini_batch_num_tokens": 25, "scale": 2.0}),
    "cached, scores": Case(CACHED, 3, keywords={**MINI, "score_mini_batch_size": 2}),
    "cached, mean": Case(CACHED, keywords={**MINI, "similarity_fct": scoring.mean_colbert_scores, "scale": 8.0}),
    "cached, XTR": Case(CACHED, 3, keywords={**MINI, "similarity_fct": partial(scoring.xtr_scores, top_k=9)}),
    "cached, own": Case(CACHED, 3, keywords={**MINI, "similarity_fct": negative_l1, "score_mini_batch_size": 2}),
    "lists": Case(KL, 4, 3),
    "lists, rows": Case(KL, 4, 3, {**MINI, "temperature": 0.5}),
    "lists, temperatures": Case(KL, 3, 2, {"student_temperature": 0.5, "teacher_temperature": 3.0}),
    "lists, mean": Case(KL, 4, 3, {"similarity_fct": scoring.mean_colbert_kd_scores, "temperature": 0.2}),
    "lists, XTR": Case(KL, 4, 3, {"similarity_fct": scoring.XTRKDScores(9, chunk_elements=500)}),
    "lists, own": Case(KL, 4, 3, {"similarity_fct": negative_l1_of_lists}),
    "lists, cached": Case(f"Cached{KL}", 4, 3, MINI, KL),
    "margins": Case(MARGIN, 4, 2),
    "margins of scores": Case(MARGIN, 4, 3, MINI),
    "margins in a row": Case(MARGIN, 3, 0),
    "margins, mean": Case(MARGIN, 3, 1, {"similarity_fct": partial(scoring.mean_colbert_scores_pairwise)}),
    "margins, XTR": Case(MARGIN, 4, 2, {"similarity_fct": partial(scoring.xtr_scores_pairwise, top_k=9)}),
    "margins, own": Case(MARGIN, 4, 2, {"similarity_fct": negative_l1_of_lists}),
    "margins, cached": Case(
        f"Cached{MARGIN}", 4, 2, {**MINI, "mini_batch_num_tokens": 25}, MARGIN, ("mini_batch_num_tokens",)
    ),
}
FIRST = {case.name: name for name, case in reversed(CASES.items())}
ALONE = {f"Cached{KL}", f"Cached{MARGIN}"}
"""Classes that the library lacks."""
