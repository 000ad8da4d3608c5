"""Training text without a download: what the functions of installed packages are called, and what they say they do.

Or the functions of a folder of Python code: each example's ``--dataset`` takes one.

A function's name and parameters are a short query, the first sentence of its docstring is its answer. A pair is graded
by how near its two functions live: one function, one module, or two packages. Sources are parsed, never imported.
"""

from __future__ import annotations

import ast
import random
import re
import sysconfig
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

GRADES = {"same function": 1.0, "same module": 0.5, "elsewhere": 0.0}
MAX_WORDS = 8  # per text: a CPU should see many pairs rather than long ones
MAX_PER_PACKAGE = 250  # so that no single package sets the tone
SKIPPED_FOLDERS = {"test", "tests", "testing", "idle_test", "site-packages", "_vendor", "vendored", "lib2to3"}


class Function(NamedTuple):
    package: str
    module: str
    name: str  # "json encoder encode o"
    summary: str  # "Return a JSON string representation of a Python data structure"


def is_code(folder: str) -> bool:
    """Whether this is a folder of Python code."""
    return bool(folder) and Path(folder).is_dir() and any(Path(folder).rglob("*.py"))


def collect(wanted: int, per_package: int = MAX_PER_PACKAGE, folder: str = "") -> list[Function]:
    """At least `wanted` distinct functions where there are as many: the folder's, or without a folder the standard
    library's, then other packages'."""
    found: list[Function] = []
    seen: set[str] = set()
    for package, files in _packages(folder):
        of_package = 0
        for function in (f for file in files for f in _functions(package, file)):
            if function.name in seen or function.summary.lower() in seen:
                continue
            seen |= {function.name, function.summary.lower()}
            found.append(function)
            of_package += 1
            if of_package == per_package:
                break
        if len(found) >= wanted:
            break
    return found


def documents(characters: int, folder: str = "") -> tuple[list[str], list[str]]:
    """(training, held out): whole docstrings, each under what it is of, about so many characters where there are.

    None comes twice. Every twelfth is held out, by its text. A package gives an eighth of them at most.
    """
    sides: tuple[list[str], list[str]] = ([], [])
    seen: set[str] = set()
    total = 0
    for _, files in _packages(folder):
        most = min(characters, total + characters // 8)
        for name, docstring in (found for file in files for found in _docstrings(file)):
            if docstring in seen or len(docstring) < 80:
                continue
            seen.add(docstring)
            sides[zlib.crc32(docstring.encode()) % 12 == 0].append(f"{name}\n{docstring}")
            total += len(docstring)
            if total >= most:
                break
        if total >= characters:
            break
    return sides


def is_held_out(function: Function) -> bool:
    """Every sixth function, by its name: neither its name nor its docstring is in any training pair."""
    return zlib.crc32(function.name.encode()) % 6 == 0


def pairs(functions: list[Function], seed: int) -> dict[str, list]:
    """Each function with its own docstring. No name and no docstring comes twice (see `collect`)."""
    shuffled = random.Random(seed).sample(functions, len(functions))
    return {"anchor": [f.name for f in shuffled], "positive": [f.summary for f in shuffled]}


def graded_pairs(functions: list[Function], seed: int) -> dict[str, list]:
    """Each function with its own docstring, with one from its module, and with one from another package."""
    rows: dict[str, list] = {"sentence1": [], "sentence2": [], "score": []}
    for function, others in _with_others(functions, seed):
        for distance, other in others.items():
            rows["sentence1"].append(function.name)
            rows["sentence2"].append(other.summary)
            rows["score"].append(GRADES[distance])
    return rows


def triplets(functions: list[Function], seed: int) -> dict[str, list]:
    """Each function, its own docstring, and another's: one from its module (hard) and one from another package."""
    rows: dict[str, list] = {"anchor": [], "positive": [], "negative": []}
    for function, others in _with_others(functions, seed):
        for distance, other in others.items():
            if distance != "same function":
                rows["anchor"].append(function.name)
                rows["positive"].append(function.summary)
                rows["negative"].append(other.summary)
    return rows


def _with_others(functions: list[Function], seed: int) -> Iterator[tuple[Function, dict[str, Function]]]:
    rng = random.Random(seed)
    modules = defaultdict(list)
    for function in functions:
        modules[function.module].append(function)
    several_packages = len({function.package for function in functions}) > 1
    for function in rng.sample(functions, len(functions)):
        others = {"same function": function}
        neighbours = [other for other in modules[function.module] if other is not function]
        if neighbours:
            others["same module"] = rng.choice(neighbours)
        if several_packages:
            stranger = function
            while stranger.package == function.package:
                stranger = rng.choice(functions)
            others["elsewhere"] = stranger
        yield function, others


def _packages(folder: str) -> Iterator[tuple[str, Iterable[Path]]]:
    if folder:
        of_entry = defaultdict(list)
        for file in sorted(Path(folder).rglob("*.py")):
            entry, *inside = file.relative_to(folder).parts
            if not SKIPPED_FOLDERS & {entry, *inside}:
                of_entry[entry.removesuffix(".py")].append(file)
        yield from of_entry.items()
        return
    roots = dict.fromkeys(Path(sysconfig.get_path(key)) for key in ("stdlib", "purelib", "platlib"))
    for root in roots:
        for entry in sorted(root.iterdir()):
            if entry.name.startswith("_") or entry.name in SKIPPED_FOLDERS:
                continue
            if entry.suffix == ".py":
                yield entry.stem, [entry]
            elif (entry / "__init__.py").exists():
                inside = sorted(entry.rglob("*.py"))
                yield entry.name, [file for file in inside if not SKIPPED_FOLDERS & set(file.relative_to(entry).parts)]


def _parsed(file: Path) -> ast.Module | None:
    try:
        return ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, OSError):  # templates, old encodings: there are other files
        return None


def _docstrings(file: Path) -> Iterator[tuple[str, str]]:
    """(name, docstring) of the module, its classes and functions."""
    tree = _parsed(file)
    for node in ast.walk(tree) if tree else ():
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node)
            if docstring:
                yield getattr(node, "name", file.stem), docstring


def _functions(package: str, file: Path) -> Iterator[Function]:
    tree = _parsed(file)
    scopes: list[tuple[str, ast.AST]] = [("", tree)] if tree else []
    while scopes:
        owner, scope = scopes.pop()
        for node in ast.iter_child_nodes(scope):
            if isinstance(node, ast.ClassDef):
                scopes.append((node.name, node))
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not node.name.startswith("__"):
                parameters = [a.arg for a in node.args.args + node.args.kwonlyargs if a.arg not in ("self", "cls")]
                name = _words(" ".join([owner, node.name, *parameters]))
                summary = _first_sentence(ast.get_docstring(node) or "")
                if 2 <= len(name) <= MAX_WORDS and 3 <= len(summary.split()) <= MAX_WORDS:
                    yield Function(package, str(file), " ".join(name), summary)


def _words(identifiers: str) -> list[str]:
    """`JSONEncoder.encode_all` -> json encoder encode all"""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", identifiers)]


def _first_sentence(docstring: str) -> str:
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    if ">>>" in paragraph or "->" in paragraph:  # an example or a signature, no sentence
        return ""
    plain = re.sub(r":\w+:`~?([^`]*)`|`+", r"\1", paragraph)  # Sphinx roles and backticks
    return re.split(r"[.:;](?:\s|$)", plain, maxsplit=1)[0].strip()
