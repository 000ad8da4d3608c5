"""What the package promises: light imports, one direction, pages whose code runs, archives that are whole."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("chunked_embed", "alignment", "distill")
OPTIONAL = ("sentence_transformers", "transformers", "trl", "triton", "datasets", "accelerate", "peft")


def test_importing_needs_torch_alone_and_is_quick():
    """What torch itself imports does not count, so that a CUDA build, which brings triton, passes too."""
    code = f"""
import sys, time, torch
from torch import _dynamo, _inductor  # torch's own, first used where a step is compiled
before, start = set(sys.modules), time.process_time()
import {", ".join(PACKAGES)}
from chunked_embed import functional, losses
new = {{name.split(".")[0] for name in set(sys.modules) - before}}
print(time.process_time() - start, *sorted(new & {set(OPTIONAL)}))
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    seconds, *optional = result.stdout.split()
    assert optional == [] and float(seconds) < 1.0


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
        (
            "sentence_transformers",
            (
                *("chunked_embed/losses/", "chunked_embed/sparse/", "chunked_embed/multi_vector/"),
                "distill/sentence_transformers.py",
            ),
        ),
        (
            "transformers",
            ("chunked_embed/causal_lm.py", "chunked_embed/trainer_callback.py", "distill/trainer.py", "distill/trl/"),
        ),
        ("trl", ("alignment/trl/", "distill/trl/")),
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

    public = {f"chunked_embed.{name}" for name in (*chunked_embed.__all__, "__version__")} | {"chunked_embed"}
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


# --- versions and archives ---


def project() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_there_is_one_version():
    import chunked_embed

    version = chunked_embed.__version__
    assert {importlib.import_module(package).__version__ for package in PACKAGES} == {version}
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text()
    assert project()["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "chunked_embed.__version__"}


def test_classifiers_are_the_pythons_that_are_served():
    told = project()["project"]
    minors = sorted(
        int(found[1])
        for classifier in told["classifiers"]
        if (found := re.fullmatch(r"Programming Language :: Python :: 3\.(\d+)", classifier))
    )
    assert minors == list(range(minors[0], minors[-1] + 1)) and told["requires-python"] == f">=3.{minors[0]}"
    assert sys.version_info[:2] in [(3, minor) for minor in minors]
    table = (ROOT / "docs" / "compatibility.md").read_text()
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    for minor in minors:
        assert f"3.{minor}" in table and f'python: "3.{minor}"' in workflow
    # A licence expression and a licence classifier exclude each other.
    assert told["license"] and not any("License" in classifier for classifier in told["classifiers"])


def test_the_oldest_libraries_are_those_of_the_requirements():
    """As the Makefile installs them, the workflow and the table name them."""
    extras = project()["project"]["optional-dependencies"]
    lowest = dict(
        re.fullmatch(r"([\w-]+)>=([\d.]+),.*", requirement).groups()
        for extra in ("sentence-transformers", "trl")
        for requirement in extras[extra][:1]
    )
    lowest["torch"] = project()["project"]["dependencies"][0].removeprefix("torch>=")
    makefile, workflow, table, ci = (
        (ROOT / name).read_text()
        for name in ("Makefile", ".github/workflows/ci.yml", "docs/compatibility.md", ".ci/run")
    )
    assert set(lowest) == {"sentence-transformers", "trl", "torch"}
    for name, version in lowest.items():
        pinned = f"{name}=={version}.0"
        assert pinned in workflow and version in table
        assert pinned in (ci if name == "torch" else re.search("^OLDEST := (.*)$", makefile, re.M)[1])


BUILD = "import setuptools.build_meta as build; print(build.build_{kind}({out!r}))"
NOT_SHIPPED = (".git", ".venv*", ".*_cache", ".hypothesis", "__pycache__", "*.egg-info", "build", "dist", "runs")


def build(kind: str, tree: Path, out: Path) -> Path:
    environment = {**os.environ, "PYTHONWARNINGS": "error", "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", BUILD.format(kind=kind, out=str(out))],
        cwd=tree,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """-> the unpacked source archive of a copy of this tree"""
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip("needs setuptools 77")
    folder = tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, folder / "tree", ignore=shutil.ignore_patterns(*NOT_SHIPPED))
    archive = build("sdist", folder / "tree", folder)
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def files_of(tree: Path) -> set[str]:
    return {path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file()}


def test_the_source_archive_has_all_that_its_tests_need(sdist):
    shipped = files_of(sdist)
    kept = [
        path.relative_to(ROOT).as_posix()
        for folder in ("benchmarks", "docs", "examples", "tests", *PACKAGES)
        for pattern in ("*.py", "*.md", "*.csv", "py.typed")
        for path in (ROOT / folder).rglob(pattern)
        if not {"_build", "_plots"} & set(path.parts)
    ]
    lone = ["CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "SECURITY.md"]
    lone += [".ci/run", ".ci/release.py", ".github/workflows/ci.yml", "pyproject.toml"]
    assert len(kept) > 200 and [name for name in (*kept, *lone) if name not in shipped] == []
    assert [name for name in shipped if re.search(r"\.(pyc|png|svg)$|_build/|_plots/|\.venv", name)] == []


@pytest.mark.slow
def test_the_source_archive_runs_its_tests(sdist):
    tests = ["tests/test_packaging.py", "tests/test_checks.py", "-k", "public_name or one_version or checks"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--slow=none", *tests],
        cwd=sdist,
        env={**os.environ, "PYTHONPATH": str(sdist)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_wheel_has_the_packages_alone(sdist, tmp_path):
    """Built from the source archive, as an index's would be."""
    import chunked_embed

    wheel = build("wheel", sdist, tmp_path)
    assert wheel.name == f"chunked_embed-{chunked_embed.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        (metadata,) = (file.read(name).decode() for name in names if name.endswith(".dist-info/METADATA"))
    inside = {name for name in names if ".dist-info/" not in name}
    assert inside == {name for name in files_of(sdist) if name.split("/")[0] in PACKAGES}
    assert {f"{package}/py.typed" for package in PACKAGES} <= inside
    for line in (
        "License-Expression: Apache-2.0",
        "Requires-Python: >=3.10",
        "Description-Content-Type: text/markdown",
    ):
        assert f"\n{line}\n" in metadata
    for extra in project()["project"]["optional-dependencies"]:
        assert f"\nProvides-Extra: {extra}\n" in metadata


def test_a_release_has_its_tag_and_absolute_links(tmp_path):
    import chunked_embed

    tag, address = f"v{chunked_embed.__version__}", "https://example.org/owner/name"
    for name in ("README.md", "pyproject.toml", "chunked_embed/__init__.py", ".ci/release.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    release = runpy.run_path(str(tmp_path / ".ci" / "release.py"))
    with pytest.raises(SystemExit, match=f"expected the tag {tag}.*got v0.0.0"):
        release["main"]("v0.0.0", address)
    release["main"](tag, f"{address}/")
    readme = (tmp_path / "README.md").read_text()
    assert re.findall(r"\]\((?!https?:|#|mailto:)[^)]*\)", readme) == []
    assert f"]({address}/blob/{tag}/CONTRIBUTING.md)" in readme
    urls = (tmp_path / "pyproject.toml").read_text().partition("\n[project.urls]\n")[2].splitlines()
    assert {line.split(" = ")[0] for line in urls} == {"Source", "Documentation", "Changelog", "Issues"}
    page = "![plot](docs/x.png) [a](#b) [c](https://d) [e](f.md#g)"
    assert release["absolute"](page, tag, address) == (
        f"![plot]({address}/raw/{tag}/docs/x.png) [a](#b) [c](https://d) [e]({address}/blob/{tag}/f.md#g)"
    )


def test_links_of_the_readme_lead_somewhere():
    targets = re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", (ROOT / "README.md").read_text())
    assert targets and [target for target in targets if not (ROOT / target).exists()] == []
