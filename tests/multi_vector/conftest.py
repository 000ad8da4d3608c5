"""Real, tiny multi-vector encoders, built from a config: no download."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "losses"))
sys.path.insert(0, str(Path(__file__).parent))  # so that spawned processes find the helpers, too

import pytest
import sentence_transformers
import torch
from st_parts import save_transformer

if not hasattr(sentence_transformers, "MultiVectorEncoder"):  # there is none before 6.0
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def transformer_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved two-layer BERT with a word-level tokenizer."""
    return save_transformer(tmp_path_factory.mktemp("transformer"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices of a few rows lose more to threads than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library adds scores up in float32, whatever embeddings are: here in float64."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
