"""The tables of README and docs are held to the code: names, arguments, defaults."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
LOSS_PAGES = {
    "docs/losses/embeddings.md": ("losses", "CF"),
    "docs/losses/sparse.md": ("sparse", "CF"),
    "docs/losses/late-interaction.md": ("multi_vector", "CF"),
    "docs/losses/preferences.md": ("alignment",),
    "docs/losses/policy_gradient.md": ("alignment",),
    "docs/losses/distillation.md": ("distill",),
    "docs/losses/your_own.md": ("chunked_embed",),
}
PAGES = ("README.md", "docs/choosing.md", "docs/migration.md", *LOSS_PAGES)
PREFIXES = {
    "CF": "chunked_embed.functional",
    "AF": "alignment.functional",
    "losses": "chunked_embed.losses",
    "sparse": "chunked_embed.sparse",
    "multi_vector": "chunked_embed.multi_vector",
    **{name: name for name in ("alignment", "chunked_embed", "distill")},
}
OURS = re.compile(rf"(?<![\w./])({'|'.join(PREFIXES)})((?:\.\w+)+)(\(([^()]*)\))?")
CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
STATEMENT = re.compile(rf"^(?:{'|'.join(PREFIXES)})\.[\w.]+\((?:[^()]|\([^()]*\))*\)", re.M)
# Of a file that is no module, or that imports what is optional: names of files, and of what a user writes.
NOT_OURS = {"chunked_embed.egg", "distill.py", "alignment.py"}


def read(page: str) -> str:
    return (ROOT / page).read_text()


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def found(name: str) -> Any:
    """An object by its dotted name, which may begin with one of the short names of the pages."""
    head, *rest = name.split(".")
    parts = [*PREFIXES.get(head, head).split("."), *rest]
    for cut in range(len(parts), 0, -1):
        try:
            value: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            value = getattr(value, part)
        return value
    raise AttributeError(name)


def parameters(thing: Any) -> dict[str, inspect.Parameter]:
    """Of the constructor or the function."""
    return dict(inspect.signature(thing).parameters)


def accepted(thing: Any) -> set[str]:
    """Names of what constructor, call and fields of a class take, or a function."""
    names = set(parameters(thing))
    for call in ("prepare", "forward", "__call__") if inspect.isclass(thing) else ():
        if (function := getattr(thing, call, None)) is not None:
            names |= set(inspect.signature(function).parameters)
    # Named in a call, behind ** in its signature.
    names |= {*getattr(thing, "takes_vectors", ()), *getattr(thing, "takes_numbers", ())}
    names |= {*parameters(found("losses.Options"))} if "options" in names else set()
    return names - {"self"}


def default(value: Any) -> str:
    """As a reader would write it."""
    for metric in ("SiameseDistanceMetric", "TripletDistanceMetric"):
        for name, member in vars(found(f"losses.{metric}")).items():
            if member is value and not name.startswith("_"):
                return f"{metric}.{name}"
    if inspect.isfunction(value):
        return value.__name__
    return re.sub(r"'", '"', repr(value))


def stated(name: str, shared: dict[str, str]) -> str:
    """A signature without annotations, and without what the page says once for all."""
    told, more = [], False
    for one in parameters(found(name)).values():
        if one.kind is one.VAR_KEYWORD:
            more = True
        elif one.default is one.empty:
            told.append(one.name)
        elif shared.get(one.name) == default(one.default):
            more = True
        else:
            told.append(f"{one.name}={default(one.default)}")
    return f"{name}({', '.join([*told, *['...'] * more])})"


def shared_arguments(page: str) -> dict[str, str]:
    """What the page's tables under "What all ..." headings say, name -> default."""
    told = "".join(re.findall(r"^## What all .*?(?=^## |\Z)", read(page), re.M | re.S))
    cells = re.findall(r"^\| ([^|]+) \|", told, re.M)
    return dict(pair for cell in cells for pair in re.findall(r"`(\w+)=([^`]+)`", cell))


def sections(page: str) -> list[str]:
    return re.split(r"^(?=###? )", read(page), flags=re.M)


def statements(page: str) -> Iterator[tuple[str, str, str]]:
    """(name, signature as written, its section) of each signature in a block of text."""
    for section in sections(page):
        for block in re.findall(r"^```text\n(.*?)^```", section, re.M | re.S):
            for written in STATEMENT.findall(block):
                yield written.partition("(")[0], re.sub(r"\s+", " ", written).replace("( ", "("), section


SIGNATURES = [(page, *rest) for page in LOSS_PAGES for rest in statements(page)]


@pytest.fixture(autouse=True)
def _libraries(monkeypatch):
    pytest.importorskip("sentence_transformers")
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


@pytest.mark.parametrize(("page", "name", "written", "section"), SIGNATURES, ids=[name for _, name, *_ in SIGNATURES])
def test_a_signature_is_the_codes_and_each_argument_is_explained(page, name, written, section):
    if name.startswith("multi_vector"):
        pytest.importorskip("sentence_transformers.multi_vector_encoder")
    shared = shared_arguments(page)
    assert written == stated(name, shared)
    explained = set(re.findall(r"\w+", " ".join(CODE.findall(prose(section))))) | set(shared)
    arguments = {p.name for p in parameters(found(name)).values() if p.kind is not p.VAR_KEYWORD}
    assert arguments - explained - {"model"} == set()


def multi_vector() -> list[str]:
    """Of a library that has multi-vector encoders."""
    return ["multi_vector.losses"] if found("losses._compat").multi_vector_library else []


def public_losses() -> Iterator[str]:
    """Every loss class and function of the three packages."""
    for prefix in ("losses", "sparse.losses", *multi_vector(), "alignment", "distill"):
        module = found(prefix)
        for name in module.__all__:
            thing = getattr(module, name)
            if not inspect.isclass(thing) or name in ("ChunkedLoss", "PreparedLoss"):  # a base without one; no loss
                continue
            if name.endswith("Loss") and thing.__module__.startswith(module.__name__):
                yield f"{prefix}.{name}"
    yield from (f"CF.{name}" for name in found("CF").__all__ if inspect.isfunction(getattr(found("CF"), name)))
    yield from ("distill.sentence_transformers.EmbedDistillLoss", "chunked_embed.FlexChunkLoss")
    yield from ("chunked_embed.linear_logps", "chunked_embed.TokenStatistics")


def test_every_loss_has_its_signature_on_a_page():
    told = {name for _, name, *_ in SIGNATURES}
    assert sorted(set(public_losses()) - told) == []


def names_of_formulas() -> set[str]:
    AF = found("AF")
    own = {name for name, thing in vars(AF).items() if getattr(thing, "__module__", "") == AF.__name__}
    return {
        *(name for name in own if inspect.isfunction(getattr(AF, name)) and not name.startswith("_")),
        *(*AF.DPO_LOSSES, *AF.F_DIVERGENCES, *AF.FPO_DIVERGENCES, *found("alignment.trl").LOSS_TYPES),
        *found("distill").DIVERGENCES,
    }


def test_every_public_name_is_on_a_loss_page():
    text = "\n".join(read(page) for page in (*LOSS_PAGES, "docs/choosing.md"))
    words = set(re.findall(r"\w+", text))
    public = {
        name
        for prefix in ("losses", "sparse.losses", *multi_vector(), "CF", "alignment", "distill")
        for name in found(prefix).__all__
    }
    trainers = {*found("alignment.trl").HOMES, *found("distill.trl").HOMES, "DistillTrainer"} - {"BCO_STATE"}
    assert sorted({*public, *names_of_formulas(), *trainers} - words - {"functional"}) == []


@pytest.mark.parametrize("page", PAGES)
def test_names_and_arguments_in_prose_exist(page):
    for code in CODE.findall(prose(read(page))):
        for prefix, rest, call, inside in OURS.findall(code):
            name = prefix + rest
            if name in NOT_OURS or name.endswith((".py", ".md", ".trl")):
                continue
            try:
                thing = found(name)
            except ImportError as missing:  # trl
                pytest.importorskip("trl", reason=str(missing))
                raise
            if call and callable(thing):
                given = set(re.findall(r"(\w+)=", re.sub(r'"[^"]*"', "", inside)))
                assert given <= accepted(thing), code


# --- migration ---

MIGRATION = "docs/migration.md"
HEADING = re.compile(r"^### (?P<theirs>`.*?) to (?P<ours>`.*)$", re.M)


def migrations() -> Iterator[Any]:
    text = read(MIGRATION)
    for heading in HEADING.finditer(text):
        body = re.split(r"^##", text[heading.end() :], maxsplit=1, flags=re.M)[0]
        theirs, ours = (CODE.findall(heading[side]) for side in ("theirs", "ours"))
        yield pytest.param(theirs, ours, body, id=theirs[0])


def of_others(name: str) -> set[str]:
    """Arguments of another library's class (constructor and call) or function; of a config its own fields alone."""
    thing = found(name)
    if dataclasses.is_dataclass(thing):
        base = pytest.importorskip("transformers").TrainingArguments
        common = {field.name for field in dataclasses.fields(base)} if issubclass(thing, base) else set()
        return {field.name for field in dataclasses.fields(thing)} - common
    names = {name for name, p in parameters(thing).items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    return names | (set(inspect.signature(thing.forward).parameters) - {"self"} if inspect.isclass(thing) else set())


@pytest.mark.parametrize(("theirs", "ours", "body"), list(migrations()))
def test_a_migration_table_names_each_argument_and_ours_exist(theirs, ours, body):
    rows = re.findall(r"^\| (.*?) \| (.*?) \|", body, re.M)[2:]
    named = {name for cell, _ in rows for name in re.findall(r"\w+", " ".join(CODE.findall(cell)))}
    library = theirs[0].split(".")[0]
    if library != "cut_cross_entropy":  # which needs a GPU, and is not installed where this runs
        pytest.importorskip(library)
        expected = set().union(*map(of_others, theirs))
        assert (sorted(expected - named), sorted(named - expected)) == ([], [])
    offered = set().union(*(accepted(found(name)) for name in ours))
    cells = [cell for _, cell in rows if not cell.startswith("none")]
    said = {name for cell in cells for code in CODE.findall(cell) for name in re.findall(r"^(\w+)(?:=|$)", code)}
    assert rows and sorted(said - offered) == []


SAME = {  # a row of the tables whose numbers are not called alike: theirs, ours
    "SimPO": (("SimPO", {"beta": 2.0}), ("CPOSimPOLoss", {"beta": 2.0})),
    "CPO": (("CPO", {"alpha": 0.7, "label_smoothing": 0.1}), ("CPOLoss", {"alpha": 0.7, "label_smoothing": 0.1})),
    "CPO without NLL": (("CPO", {"compute_nll_loss": False}), ("CPOLoss", {"alpha": 0.0})),
    "CPO by length": (("CPO", {"average_log_prob": True}), ("CPOSimPOLoss", {"gamma": 0.0})),
    "ORPO": (("ORPO", {}), ("ORPOLoss", {})),
    "DPO with NLL": (
        ("DPO", {"compute_nll_loss": True, "alpha": 0.3}),
        ("DPOLoss", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]}),
    ),
    "DPO by length": (("DPO", {"average_log_prob": True}), ("DPOLoss", {"loss_type": "sigmoid_norm"})),
    "DPO, smoothing ignored": (("DPO", {"label_smoothing": 0.2}), ("DPOLoss", {})),
}


@pytest.mark.parametrize("row", SAME)
def test_what_stands_side_by_side_is_the_same_loss(row):
    chunked = pytest.importorskip("liger_kernel.chunked_loss")
    torch.manual_seed(0)
    hidden, reference = torch.randn(2, 4, 8, 16)
    weight, target = torch.randn(50, 16), torch.randint(0, 50, (4, 8))
    target[:, :2] = target[1, :5] = -100
    (theirs, numbers), (ours, options) = SAME[row]
    loss = getattr(chunked, f"LigerFusedLinear{theirs}Loss")(**numbers, compiled=False)
    given = {"ref_input": reference, "ref_weight": weight} if theirs == "DPO" else {}
    expected = loss(weight, hidden, target, **given)[0]
    given = {"ref_hidden": reference, "ref_weight": weight} if theirs == "DPO" else {}
    torch.testing.assert_close(found(f"alignment.{ours}")(**options)(hidden, weight, target, **given).loss, expected)


@pytest.mark.parametrize("name", sorted(name for name in found("losses")._HOME if name.endswith("Loss")))
def test_the_librarys_arguments_are_there_in_its_order(name):
    library = found("losses._compat").library
    if name in ("ChunkedLoss", "SigmoidPairLoss"):
        assert not hasattr(library, name), "the pages say that it is ours alone"
        return
    kinds = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    theirs = {n: p for n, p in parameters(getattr(library, name)).items() if p.kind not in kinds}
    ours = parameters(getattr(found("losses"), name))
    assert [n for n in ours if n in theirs] == list(theirs)
    assert {n: default(ours[n].default) for n in theirs} == {n: default(p.default) for n, p in theirs.items()}
