"""``python -m chunked_embed``: the report, plans from shapes, and what the doctor finds where something is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from alignment import DPOLoss, KTOLoss
from chunked_embed import checks, diagnose, functional, planning
from chunked_embed.__main__ import main
from distill import DistillLoss

ROOT = Path(__file__).parent.parent
OPTIONS: dict[str, Any] = {"chunk_size": 16}


# --- the report ---


def test_the_report_names_versions_devices_kernels_and_extras(capsys: pytest.CaptureFixture) -> None:
    assert main([]) == 0
    said = capsys.readouterr().out
    assert f"torch                   {metadata.version('torch')}" in said
    assert "TokenKernel" in said and "CrossEntropyRows" in said
    assert all(name in said and what in said for name, what in diagnose.EXTRAS.items())


def test_each_extra_is_explained() -> None:
    assert sorted(diagnose.EXTRAS) == sorted(metadata.metadata("chunked-embed").get_all("Provides-Extra"))


def test_extras_are_not_known_without_metadata(monkeypatch: Any, capsys: pytest.CaptureFixture) -> None:
    def none(name: str) -> Any:
        raise diagnose.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(diagnose.metadata, "requires", none)
    monkeypatch.setattr(diagnose.metadata, "version", none)
    main([])
    said = capsys.readouterr().out.partition("\nextras\n")[2]
    assert said.count("not known, since chunked-embed is not installed") == len(diagnose.EXTRAS)
    assert " installed\n" not in said.replace("not installed", "")


def test_extras_of_extras_and_their_ranges() -> None:
    asked = diagnose.requirements()
    assert asked["demo", "sentence-transformers"].range == asked["sentence-transformers", "sentence-transformers"].range
    assert ("dev", "trl") in asked and (None, "torch") in asked
    within = asked["sentence-transformers", "sentence-transformers"].within
    assert within("6.2.0") and not within("5.6.9")


def test_names_of_extras_without_packaging(monkeypatch: Any) -> None:
    """As where nothing but torch is installed."""
    expected = set(diagnose.requirements())
    monkeypatch.setitem(sys.modules, "packaging.requirements", None)
    found = set(diagnose.requirements())
    assert expected <= found and {name for _, name in found - expected} <= {"liger-kernel", "triton"}
    monkeypatch.setattr(diagnose, "installed", lambda name: None)
    assert diagnose.extras()["trl"] == ["trl", "accelerate", "datasets"]


def test_a_kernel_that_does_not_serve_says_why() -> None:
    found = diagnose.kernels_on(torch.device("cpu"))
    assert {"TokenKernel", "PairKernel", "SigmoidRows"} <= found.keys()
    if os.environ.get("TRITON_INTERPRET") != "1":
        assert set(found.values()) == {"there is no Triton on cpu"}


# --- plans ---


@pytest.mark.parametrize("name", [name for names in planning.names().values() for name in names])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_each_loss_has_a_plan_or_a_sentence(name: str, device: str) -> None:
    embeddings = name in planning.names()["chunked_embed"] and name != "linear_logps"
    rows = 6144 if name == "tpo" else 4096  # of triples
    problem = planning.Problem(rows, 64, None if embeddings else 50_000)
    reads = {"batch_semi_hard_triplet": "reads its labels first"}
    reads |= dict.fromkeys(("orthogonal_regularization", "flops"), "has no large tensor")
    if name in reads:
        with pytest.raises(ValueError, match=reads[name]):
            planning.plan(name, problem, device)
        return
    found = planning.plan(name, problem, device)
    assert found.layout.device.type == device and found.rows == found.used_rows == rows
    if not embeddings:
        assert found.products >= 3 and 0 < found.peak_bytes < planning.plain_bytes(name, found)
    assert len(found.layout.taken) == len(found.layout.units) or not found.refusals or device == "cpu" or found.direct


def test_a_plan_from_shapes_is_that_of_tensors() -> None:
    hidden, weight = torch.randn(4, 32, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    target, problem = torch.randint(50, (4, 32)), planning.Problem(128, 8, 50, torch.float32, sequences=4)
    of_teacher = torch.randn(128, 8), torch.randn(50, 8)
    calls = {
        "dpo": lambda: DPOLoss(**OPTIONS).plan(hidden, weight, target, ref_hidden=of_teacher[0].view(4, 32, 8),
                                               ref_weight=of_teacher[1]),
        "kto": lambda: KTOLoss(**OPTIONS).plan(hidden, weight, target, torch.ones(4, dtype=torch.bool),
                                               ref_hidden=of_teacher[0].view(4, 32, 8), ref_weight=of_teacher[1],
                                               kl=torch.tensor(0.0)),
        "jsd": lambda: DistillLoss([("jsd", 1.0)], **OPTIONS).plan(hidden.view(128, 8), weight, *of_teacher,
                                                                    target.view(-1)),
        "cross_entropy": lambda: DistillLoss([("ce", 1.0)], **OPTIONS).plan(hidden.view(128, 8), weight,
                                                                            target=target.view(-1)),
    }  # fmt: skip
    for name, call in calls.items():
        expected, found = call(), planning.plan(name, problem, "cpu", **OPTIONS)
        assert str(found) == str(expected), name


def test_options_and_frozen_weights_count() -> None:
    problem = planning.Problem(4096, 64, 50_000)
    frozen = planning.Problem(4096, 64, 50_000, frozen=True)
    plan, cheaper = planning.plan("cross_entropy", problem, "cuda"), planning.plan("cross_entropy", frozen, "cuda")
    assert (plan.products, cheaper.products) == (3, 2)
    assert planning.plan("cross_entropy", problem, "cuda", chunk_size=100).chunk_rows == 100
    assert planning.plan("dpo", problem, "cuda").products == 4
    precomputed = planning.Problem(4096, 64, 50_000, precomputed=True)
    assert planning.plan("dpo", precomputed, "cuda").products == 3
    assert not planning.plan("cross_entropy", problem, "cuda", compiled=False).compiled


def test_planning_leaves_nothing_behind() -> None:
    """Losses that functions share between calls run as ever, on what is there, also beside a plan of another thread."""
    a, b = torch.randn(2, 64, 8, requires_grad=True).unbind()
    call, device = partial(functional.info_nce, a, b, chunk_size=16, compiled=False), torch.device("cuda")
    expected, problem = call(), planning.Problem(64, 8, dtype=torch.float32)
    plan = planning.plan("info_nce", problem, device, chunk_size=16, compiled=False)
    with planning._elsewhere(device), ThreadPoolExecutor(1) as thread:
        beside = thread.submit(call).result()
    assert plan.layout.device == device and call() == expected == beside
    beside.backward()


def test_plan_prints_the_plan_beside_the_plain_way(capsys: pytest.CaptureFixture) -> None:
    assert main(["plan", "8192", "4096", "128256", "--loss", "dpo", "--device", "cuda"]) == 0
    said = capsys.readouterr().out
    assert "products      4 matrix products per chunk" in said and "held whole    15.66 GiB" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("8192 64 50000 --loss cross_entrpy", "did you mean cross_entropy"),
        ("8192 64 --loss kl", "got no VOCABULARY"),
        ("64 16 40 --loss batch_all_triplet", "expected ROWS WIDTH alone for batch_all_triplet"),
        ("8191 64 500 --loss dpo", "expected ROWS for 2 sequences"),
        ("8192 64 500 --loss dpo --sequences 3", "expected --sequences as a multiple of 2"),
        ("0 64 500", "expected ROWS to be"),
        ("100000000000000 64 500", "expected ROWS to be"),
        ("64 64 99999999999999999999", "expected VOCABULARY to be"),
        ("8192 64 500 --chunk-size 0", "expected chunk_size"),
        ("8192 64 500 --device tpu", "device"),
        ("8192 64 500 --device xpu", "expected a device of type cpu or cuda, got xpu"),
        ("8192 64 500 --dtype int8", "invalid choice: 'int8'"),
    ],
)
def test_a_mistake_in_a_plan_is_told_in_a_sentence(arguments: str, message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as left:
        main(["plan", *arguments.split()])
    assert left.value.code == 2
    assert message in capsys.readouterr().err


# --- the doctor ---


def test_nothing_is_found_where_all_is_well(capsys: pytest.CaptureFixture, monkeypatch: Any) -> None:
    monkeypatch.setattr(diagnose, "CHECKS", ())
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out == "nothing found\n"


def test_a_script_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "alignment.py").write_text("raise RuntimeError('it is not run')\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "chunked_embed", "doctor"]
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert found.returncode == 1, found.stderr
    assert f"got {tmp_path / 'alignment.py'}: rename it" in found.stdout
    assert "expected distill" not in found.stdout


def test_a_plan_runs_no_script_in_the_way(tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture) -> None:
    handbook(tmp_path, monkeypatch)
    with pytest.raises(SystemExit):
        main(["plan", "64", "8", "100", "--loss", "orpo"])
    assert "uninstall alignment-handbook" in capsys.readouterr().err


def handbook(folder: Path, monkeypatch: Any) -> None:
    """HF's alignment-handbook in an environment's packages, as pip tells of it."""
    packages = folder / "site-packages"
    (packages / "alignment").mkdir(parents=True)
    (packages / "alignment" / "__init__.py").write_text("__version__ = '0.4.0'\n")
    monkeypatch.setattr(diagnose.metadata, "packages_distributions", lambda: {"alignment": ["alignment-handbook"]})
    found = diagnose.find_spec

    def spec(name: str) -> Any:
        if name == "alignment":
            return SimpleNamespace(origin=str(packages / "alignment" / "__init__.py"), submodule_search_locations=[])
        return found(name)

    monkeypatch.setattr(diagnose, "find_spec", spec)


def test_a_package_of_that_name_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    handbook(tmp_path, monkeypatch)
    (said,) = diagnose._packages()
    assert "alignment/__init__.py: uninstall alignment-handbook" in said
    monkeypatch.setattr(diagnose, "ROOT", tmp_path / "site-packages")  # both in one folder, theirs came last
    assert "got a file of alignment-handbook in its place" in next(diagnose._packages())
    file = tmp_path / "site-packages" / "alignment" / "__init__.py"
    file.write_text("from .path import PreferenceLoss\n")  # ours came last
    assert "got alignment-handbook installed into the same folder" in next(diagnose._packages())
    monkeypatch.setattr(diagnose, "find_spec", lambda name: None)
    assert "expected the package alignment beside" in next(diagnose._packages())


def test_a_foreign_package_is_refused_with_its_file() -> None:
    foreign = ModuleType("alignment")
    foreign.__file__ = "/there/alignment/__init__.py"
    with pytest.raises(ImportError, match=r"expected the package alignment of chunked-embed, got .*/there/alignment"):
        checks.own_package(foreign, "PreferenceLoss")


@pytest.mark.slow  # they import their libraries first
@pytest.mark.parametrize("module", ["alignment.trl", "distill.trainer", "distill.sentence_transformers"])
def test_our_modules_behind_a_foreign_init_say_so(module: str, tmp_path: Path) -> None:
    """What is left when another package of the name was installed into the same folder after ours."""
    family = module.partition(".")[0]
    for library in ("transformers", "accelerate", "sentence_transformers"):
        pytest.importorskip(library)
    (tmp_path / family).mkdir()
    for file in (ROOT / family).iterdir():
        (tmp_path / family / file.name).symlink_to(file)
    (tmp_path / family / "__init__.py").unlink()
    (tmp_path / family / "__init__.py").write_text("__version__ = '0.4.0'\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-c", f"import {module}"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert f"got another one of that name, {tmp_path / family / '__init__.py'}" in result.stderr


@pytest.mark.parametrize(
    ("variable", "gpu", "message"),
    [
        ("CXX", False, "expected a C++ compiler, got CXX=nothing"),
        ("CC", True, "Triton starts its kernels, got CC=noth"),
    ],
)
def test_no_compiler(variable: str, gpu: bool, message: str, monkeypatch: Any) -> None:
    monkeypatch.setenv(variable, "nothing")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert any(message in said for said in diagnose._compilers())


def test_a_compiler_that_fails(tmp_path: Path, monkeypatch: Any) -> None:
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho 'fatal error: omp.h: No such file' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    assert any("to compile a program with OpenMP, got 'fatal error: omp.h" in said for said in diagnose._compilers())


def test_no_triton_beside_a_gpu(monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(diagnose, "find_spec", lambda name: None)
    assert "expected Triton beside a GPU, got none" in next(diagnose._triton())


@pytest.mark.gpu
def test_triton_runs_here() -> None:
    assert list(diagnose._triton()) == []
    assert not any(diagnose.kernels_on(torch.device("cuda")).values())


def test_a_torch_that_does_not_see_the_gpu(monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(diagnose, "driver", lambda: "580.1")
    for cuda, message in ((None, "got one for CPUs"), ("13.0", "got none with driver 580.1")):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        assert message in next(diagnose._gpu())


def test_versions_that_do_not_fit(monkeypatch: Any) -> None:
    real = metadata.version
    monkeypatch.setattr(diagnose.metadata, "version", lambda name: "0.9" if name in ("trl", "torch") else real(name))
    said = list(diagnose._ranges())
    assert len(said) == 2 and any("got 0.9: pip install 'trl" in line for line in said)


@pytest.mark.parametrize("how", ["a file", "full"])
def test_a_cache_that_cannot_be_written(how: str, tmp_path: Path, monkeypatch: Any) -> None:
    folder = tmp_path / "cache"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert list(diagnose._caches()) == []
    if how == "a file":
        folder.rmdir()
        folder.write_text("")
    else:
        monkeypatch.setattr(diagnose.shutil, "disk_usage", lambda path: SimpleNamespace(free=5 << 20))
    (said,) = diagnose._caches()
    assert "set TORCHINDUCTOR_CACHE_DIR" in said and (how == "a file" or "got 5 MiB" in said)
