"""sentence-transformers is imported when a class is touched, not before, and its absence is said plainly."""

from __future__ import annotations

import subprocess
import sys

import pytest

from chunked_embed import losses

SCRIPT = """
import sys, types
from chunked_embed import losses
from chunked_embed.multi_vector import losses as multi_vector_losses
from chunked_embed.sparse import losses as sparse_losses
assert "MultiVectorMarginMSELoss" in dir(multi_vector_losses)
assert "CoSENTLoss" in dir(losses) and "SpladeLoss" in dir(sparse_losses) and "sentence_transformers" not in sys.modules
old = types.ModuleType("sentence_transformers")
old.__version__ = "5.6.1"
for library in (None, old):
    sys.modules["sentence_transformers"] = library
    try:
        losses.CoSENTLoss
    except ImportError as error:
        print(error)
"""


def test_lazy_missing_and_old() -> None:
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    missing, old = result.stdout.splitlines()
    assert "chunked-embed[sentence-transformers]" in missing
    assert "5.7 or later, found 5.6.1" in old


def test_names() -> None:
    assert all(getattr(losses, name).__name__ == name for name in losses.__all__)
    with pytest.raises(AttributeError, match="CoSENTLoss"):
        losses.NoSuchLoss  # noqa: B018
