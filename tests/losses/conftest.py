"""Real, tiny sentence-transformers models, built from a config: no download."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))  # so that spawned processes find the helpers, too

import pytest
import torch
from st_parts import save_transformer


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
