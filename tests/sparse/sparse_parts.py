"""Builders and comparisons that the tests of the sparse losses share."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SparseEncoder
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from sentence_transformers.sparse_encoder.modules import MLMTransformer, SparseAutoEncoder, SpladePooling
from st_parts import EXACT, HIDDEN, TOLERANCE
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM

WEIGHTS = {"document_regularizer_weight": 0.3, "query_regularizer_weight": 0.2}
ZEROS = 0.7
"""Of the vocabulary, about so much is zero in an embedding of the SPLADE models."""


def save_masked(transformer: str, folder: Path) -> str:
    """With a head's bias that leaves some of the vocabulary below zero in all texts, and some in none."""
    shutil.copytree(transformer, folder)
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig.from_pretrained(transformer))
    bias = model.cls.predictions.bias
    with torch.no_grad():
        bias.copy_(torch.linspace(-0.5, 0.2, len(bias)))
        bias[: len(bias) // 4] = -5.0
    model.save_pretrained(folder)
    return str(folder)


def _ready(*modules: nn.Module, dtype: torch.dtype = torch.float64) -> SparseEncoder:
    model = SparseEncoder(modules=list(modules), device="cpu").to(dtype).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        model(model.preprocess(["a cat"]))  # in which its pooling learns how wide it is
    return model


def splade(transformer: str, masked: str, pooling: str = "max", **options: Any) -> SparseEncoder:
    return _ready(MLMTransformer(masked), SpladePooling(pooling), **options)


def csr(transformer: str, masked: str, **options: Any) -> SparseEncoder:
    torch.manual_seed(0)
    return _ready(Transformer(transformer), Pooling(HIDDEN), SparseAutoEncoder(HIDDEN, 24, k=5, k_aux=5), **options)


KINDS: dict[str, Callable[..., SparseEncoder]] = {"SPLADE": splade, "CSR": csr}


def result(loss: nn.Module, model: nn.Module, batch: list[dict[str, Tensor]], labels: Any) -> tuple[dict, dict]:
    """The terms, and the gradient of every parameter of the model and the loss."""
    loss.zero_grad()
    model.zero_grad()
    terms = loss([dict(column) for column in batch], labels)
    (1.5 * torch.stack(list(terms.values())).sum()).backward()
    learns = {**dict(model.named_parameters()), **dict(loss.named_parameters())}
    grads = {name: p.grad.clone() for name, p in learns.items() if p.grad is not None}
    return {name: term.detach() for name, term in terms.items()}, grads


def assert_alike(ours: tuple[dict, dict], theirs: tuple[dict, dict], **tolerance: float) -> None:
    tolerance = tolerance or TOLERANCE
    if not EXACT:
        tolerance = {name: max(tolerance[name], TOLERANCE[name]) for name in tolerance}
    for mine, other in zip(ours, theirs, strict=True):
        assert list(mine) == list(other)
        for name, value in other.items():
            torch.testing.assert_close(
                mine[name], value, **tolerance, check_dtype=False, msg=lambda m, name=name: f"{name}: {m}"
            )
