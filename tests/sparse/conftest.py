"""Real, tiny sparse encoders, built from a config: no download."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "losses"))

import pytest
import torch
from sentence_transformers import SparseEncoder
from sparse_parts import KINDS, save_masked
from st_parts import save_transformer


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A saved two-layer BERT, and one with a head for masked tokens."""
    folder = save_transformer(tmp_path_factory.mktemp("transformer"))
    return folder, save_masked(folder, tmp_path_factory.mktemp("masked") / "model")


@pytest.fixture(scope="session")
def encoders(folders: tuple[str, str]) -> dict[str, SparseEncoder]:
    return {kind: make(*folders) for kind, make in KINDS.items()}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices of a few rows lose more to threads than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
