"""Slow tests are sampled, GPU tests skipped without a GPU. Both are decided here, once."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on a download
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # whose warning at an import would be an error

import corpus
import pytest
import torch

SAMPLE = 16


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--slow",
        choices=("sample", "all", "none"),
        default="sample",
        help=f"which slow tests to run; sample: one case in {SAMPLE} of each file, the first included",
    )

    parser.addoption(
        "--examples", type=int, help="how many random calls each test of tests/engine/test_random.py draws, anew"
    )


@pytest.fixture(scope="session")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of Python code for the examples to learn from."""
    return corpus.write(tmp_path_factory.mktemp("corpus") / "code")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    which = config.getoption("--slow")
    seen: Counter[Path] = Counter()
    kept, left_out = [], []
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        run = True
        if item.get_closest_marker("slow") and which != "all":
            run = which == "sample" and seen[item.path] % SAMPLE == 0
            seen[item.path] += 1
        (kept if run else left_out).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept
