"""What is installed, what runs here, and what goes wrong in practice: for ``python -m chunked_embed``.

Ranges of versions and extras are read from the package's own metadata; reasons why a kernel does not serve are those
that the steps themselves give.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch

from . import kernels
from .engine.step import Shape, Step

__all__ = ["EXTRAS", "astray", "doctor", "extras", "kernels_on", "versions"]

DISTRIBUTION = "chunked-embed"
ROOT = Path(__file__).parent.parent
OURS = {"alignment": "PreferenceLoss", "distill": "DistillationLoss"}
"""The other packages of this distribution, by a name that occurs in them and in no other package of theirs."""
EXTRAS = {
    "sentence-transformers": "chunked_embed.losses: drop-in losses for sentence-transformers",
    "trl": "alignment.trl, distill.trl and distill.DistillTrainer: trainers for language models",
    "demo": "the programs in examples/",
    "bench": "the scripts in benchmarks/, and the libraries that ours is compared with",
    "docs": "building the documentation",
    "dev": "tests, linters and all of the above",
}
BESIDE = ("triton", "transformers", "peft", "liger-kernel", "packaging")  # of interest where no extra names them
FREE_BYTES = 200 << 20  # that compiled steps of a few losses take on a disk


# --- versions and extras ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Requirement:
    """A line of the metadata."""

    name: str
    extras: tuple[str, ...]  # of that distribution
    range: str  # of its versions
    holds: Callable[[str], bool]  # where this extra is asked for, or "" for none
    within: Callable[[str], bool]  # of a version; always, where packaging is missing

    @classmethod
    def read(cls, text: str) -> Requirement:
        try:
            from packaging.requirements import Requirement as Parsed
        except ImportError:  # torch does without: names alone are read
            found = re.match(r"([\w.-]+)(?:\[([\w,-]+)\])?([^;]*)(?:;.*\bextra == .([\w-]+))?", text)
            assert found is not None
            name, extras, asked, extra = found.groups()
            named = tuple(sorted(filter(None, (extras or "").split(","))))
            return cls(name, named, asked.strip(), lambda e: e == (extra or ""), lambda version: True)
        parsed = Parsed(text)
        marker, specifier = parsed.marker, parsed.specifier
        return cls(
            name=parsed.name,
            extras=tuple(sorted(parsed.extras)),
            range=str(specifier),
            holds=lambda extra: marker is None or marker.evaluate({"extra": extra}),
            within=lambda version: specifier.contains(version, prereleases=True),
        )


def requirements() -> dict[tuple[str | None, str], Requirement]:
    """By the extra that asks (None: the package itself) and the name, those that hold on this platform; nothing where
    there is no metadata."""
    try:
        lines = [Requirement.read(text) for text in metadata.requires(DISTRIBUTION) or []]
    except metadata.PackageNotFoundError:
        return {}
    always = [line for line in lines if line.holds("")]
    found: dict[tuple[str | None, str], Requirement] = {(None, line.name): line for line in always}

    def enter(extra: str, asked_by: str) -> None:
        for line in lines:
            if line in always or not line.holds(extra):
                continue
            if line.name == DISTRIBUTION:  # further extras
                for other in line.extras:
                    enter(other, asked_by)
            else:
                found[asked_by, line.name] = line

    for extra in EXTRAS:
        enter(extra, extra)
    return found


def installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, tuple[str | None, str, bool]]:
    """By distribution: the version that is installed, the range that ours asks for, and whether it lies in that."""
    found: dict[str, tuple[str | None, str, bool]] = {}
    for (extra, name), r in requirements().items():
        if extra in (None, "sentence-transformers", "trl"):
            version = installed(name)
            found[name] = version, r.range, version is None or r.within(version)
    for name in ("torch", *BESIDE):
        found.setdefault(name, (installed(name), "", True))
    return found


def extras() -> dict[str, list[str]]:
    """By extra: what it asks for and is not installed."""
    found: dict[str, list[str]] = {name: [] for name in EXTRAS}
    for extra, name in requirements():
        if extra is not None and installed(name) is None:
            found[extra].append(name)
    return found


# --- devices, compilers, kernels -------------------------------------------------------------------------------------


def devices() -> Iterator[tuple[torch.device, str]]:
    yield torch.device("cpu"), f"{platform.machine()}, {torch.get_num_threads()} threads"
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        yield torch.device("cuda", index), f"{p.name}, {p.total_memory / 2**30:.0f} GiB, capability {p.major}.{p.minor}"


def driver() -> str | None:
    """Of NVIDIA GPUs, as the kernel module says."""
    try:
        return Path("/proc/driver/nvidia/version").read_text().split("  ")[1].strip()
    except (OSError, IndexError):
        return None


def cxx_compiler() -> str | None:
    return kernels.compiler("CXX", "g++", "clang++")


def kernels_on(device: torch.device) -> dict[str, str | None]:
    """By step: why it does not serve a large call in half precision there, or None."""
    from . import functional, tokens  # noqa: F401  # which state steps

    shape = Shape(
        rows=1 << 14,
        widths=(1 << 14,),
        depth=1 << 7,
        bias="none",
        operands=torch.bfloat16,
        outputs=torch.float32,
        cosine=False,
        device=device,
        compiled=True,
        columns=False,
        grad=(),
        learns=True,
        trains=True,
        terms=1,
    )
    return {cls.__name__: object.__new__(cls).needs(shape).refusal for cls in _steps(Step)}


def _steps(cls: type[Step]) -> Iterator[type[Step]]:
    """The kernels among steps: those of this package that nothing inherits, but for plain functions."""
    below = [c for c in cls.__subclasses__() if c.__module__.startswith(f"{__package__}.") and not c.runs_functions]
    for other in below:
        yield from _steps(other)
    if not below and cls is not Step:
        yield cls


# --- what goes wrong -------------------------------------------------------------------------------------------------


def doctor() -> list[str]:
    """A sentence with a remedy for each thing that is wrong; none: all is well."""
    return [sentence for check in CHECKS for sentence in check()]


def _compilers() -> Iterator[str]:
    c, cxx = kernels.c_compiler(), cxx_compiler()
    if cxx is None:
        yield f"expected a C++ compiler, got {_named('CXX')}: steps on a CPU run uncompiled; install g++"
    if c is None and torch.cuda.is_available():
        yield f"expected a C compiler, with which Triton starts its kernels, got {_named('CC')}: install gcc"
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.exists():
        yield f"expected Python's headers, got no {header}: steps run uncompiled; install python3-dev (python3-devel)"
    if cxx is not None:
        yield from _compiles(cxx)


def _named(variable: str) -> str:
    named = os.environ.get(variable)
    return f"{variable}={named}, which is not there" if named else "none on the PATH"


def _compiles(cxx: str) -> Iterator[str]:
    """A program with OpenMP, as inductor's are."""
    program = "#include <cmath>\n#include <omp.h>\nint main() { return omp_get_max_threads() < 0; }\n"
    with tempfile.TemporaryDirectory() as folder:
        command = [cxx, "-x", "c++", "-fopenmp", "-", "-o", str(Path(folder, "a.out"))]
        try:
            result = subprocess.run(command, input=program, capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired) as error:
            yield f"expected {cxx} to compile a program, got {_line(error)}: install g++ with its libraries"
            return
    if result.returncode:
        said = next((line for line in result.stderr.splitlines() if "error" in line), result.stderr[:200])
        yield f"expected {cxx} to compile a program with OpenMP, got {said.strip()!r}: install g++ with its libraries"


def _triton() -> Iterator[str]:
    if not torch.cuda.is_available():
        return
    if find_spec("triton") is None:
        yield (
            "expected Triton beside a GPU, got none: kernels and compiled steps do without, slower; install a CUDA "
            "build of torch, which brings it, or triton"
        )
    elif kernels.available("cuda"):
        from .kernels.scale import scale_

        x = torch.ones(16, device="cuda", dtype=torch.float32)
        try:
            scale_(x, torch.full((1,), 2.0, device="cuda"), x)
            if x.sum().item() != 32:
                yield "expected a Triton kernel to double ones, got other numbers: reinstall torch and triton together"
        except Exception as error:  # of Triton, its compiler, its driver
            yield f"expected a Triton kernel to run, got {_line(error)}: reinstall torch, which brings Triton"


def _gpu() -> Iterator[str]:
    if torch.cuda.is_available() or (driver() is None and shutil.which("nvidia-smi") is None):
        return
    if torch.version.cuda is None:
        yield "expected a CUDA build of torch on a machine with NVIDIA's driver, got one for CPUs: install the other"
    else:
        yield (
            f"expected torch {torch.__version__} to find a GPU, got none with driver {driver()}: a driver too old for "
            f"CUDA {torch.version.cuda}, or CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')!r}"
        )


def astray(name: str) -> str | None:
    """What is wrong with the place of one of ``OURS``, without importing it: a foreign script would run."""
    spec = find_spec(name)
    if spec is None:
        return f"expected the package {name} beside {ROOT / 'chunked_embed'}, got none: reinstall {DISTRIBUTION}"
    where = Path(spec.origin) if spec.origin else Path(next(iter(spec.submodule_search_locations or ()), name))
    home = where.parent if where.name == "__init__.py" else where
    if home.resolve() != (ROOT / name).resolve():
        theirs = _others(name) if "site-packages" in where.parts else ""
        remedy = f"uninstall {theirs}, or use another environment" if theirs else "rename it, or take it off the path"
        return f"expected {name} of {DISTRIBUTION} ({ROOT / name}), got {where}: {remedy}"
    if OURS[name] not in where.read_text(encoding="utf-8"):
        theirs = _others(name)
        by = f" of {theirs}" if theirs else ""
        return (
            f"expected {where} of {DISTRIBUTION}, got a file{by} in its place: uninstall that package, then install "
            f"{DISTRIBUTION} again"
        )
    return None


def _others(name: str) -> str:
    """Other distributions that are installed with a package of this name."""
    providers = metadata.packages_distributions().get(name, ())
    return " and ".join(sorted({d for d in providers if d.lower().replace("_", "-") != DISTRIBUTION}))


def _packages() -> Iterator[str]:
    for name in OURS:
        if (said := astray(name)) is not None:
            yield said
        elif theirs := _others(name):
            yield (
                f"expected {name} of {DISTRIBUTION} alone, got {theirs} installed into the same folder: one overwrites "
                "files of the other; use another environment"
            )


def _ranges() -> Iterator[str]:
    if installed(DISTRIBUTION) is None:
        yield f"expected {DISTRIBUTION} installed, got its files alone, which tell no versions: pip install -e ."
        return
    for name, (version, asked, within) in versions().items():
        if not within:
            yield f"expected {name}{asked}, got {version}: pip install '{name}{asked}'"


def _caches() -> Iterator[str]:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    triton = os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton"
    folders = {"TORCHINDUCTOR_CACHE_DIR": None, "TRITON_CACHE_DIR": Path(triton)}
    for variable, folder in folders.items():
        if variable.startswith("TRITON") and not torch.cuda.is_available():
            continue
        try:
            folder = folder or Path(cache_dir())
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"x")
            free = shutil.disk_usage(folder).free
        except OSError as error:
            yield (
                f"expected to write to the folder of compiled steps, got {error}: set {variable} to a folder that can "
                "be written to"
            )
            continue
        if free < FREE_BYTES:
            yield (
                f"expected {FREE_BYTES >> 20} MiB free where compiled steps go, got {free >> 20} MiB at {folder}: make "
                f"room, or set {variable} to a folder elsewhere"
            )


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}, {' '.join(str(error).split())[:200]}"


CHECKS = (_gpu, _compilers, _triton, _packages, _ranges, _caches)
