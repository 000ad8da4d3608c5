"""Processes of tests: forks of one that has imported the libraries, which would take each of them seconds.

Named checks run on gloo processes: one set of processes for all of them. And programs, as a shell would run them.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

START = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
multiprocessing.set_forkserver_preload(
    ["pytest", "torch", "transformers.trainer", "sentence_transformers", "trl", "peft"]
)


# --- programs --------------------------------------------------------------------------------------------------------


def run_program(script: Path, *arguments: object, env: Mapping[str, str]) -> subprocess.CompletedProcess:
    """``python script arguments``."""
    command = [str(script), *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("stdout", "stderr")]
        process = multiprocessing.get_context(START).Process(target=_program, args=(command, dict(env), files))
        process.start()
        process.join(900)
        process.kill()
        return subprocess.CompletedProcess(command, process.exitcode, *(file.read_text() for file in files))


def _program(command: list[str], env: dict[str, str], files: list[Path]) -> None:
    for stream, file in zip((sys.stdout, sys.stderr), files):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream.fileno())
    os.environ.clear()
    os.environ.update(env)
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))
    runpy.run_path(command[0], run_name="__main__")


# --- checks on gloo processes ----------------------------------------------------------------------------------------

Outcomes = list[dict[str, str | None]]  # of each rank: {name: traceback or None}
LIMIT = timedelta(seconds=120)  # of a collective that somebody else never calls


def spawn(function: Callable[..., None], world: int, *arguments: object) -> None:
    """``function(rank, *arguments)``, a module-level function, on every rank."""
    mp.start_processes(function, args=arguments, nprocs=world, start_method=START)


def asked(request: pytest.FixtureRequest, **others: object) -> list[str]:
    """The names of the cases of this file that the session runs, in their order: a sample leaves most of them out."""
    found = []
    for item in request.session.items:
        given = item.callspec.params if item.path == request.path and hasattr(item, "callspec") else {}
        if "name" in given and request.fixturename in item.fixturenames and others.items() <= given.items():
            found.append(given["name"])
    return found


def run_checks(
    check: Callable[..., None], names: Sequence[str], world: int, scratch: Path, *arguments: str
) -> Outcomes:
    """``check(name, rank, *arguments)``, a module-level function, for all names on every rank."""
    spawn(_run, world, world, check, names, str(scratch), *arguments)
    return [torch.load(scratch / f"outcome-{rank}.pt") for rank in range(world)]


def _run(
    rank: int, world: int, check: Callable[..., None], names: Sequence[str], scratch: str, *arguments: str
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{scratch}/store", rank=rank, world_size=world, timeout=LIMIT)
    outcome: dict[str, str | None] = {}
    for name in names:
        try:
            check(name, rank, *arguments)
            outcome[name] = None
        except Exception:
            outcome[name] = traceback.format_exc()
        dist.barrier()
    torch.save(outcome, f"{scratch}/outcome-{rank}.pt")
    gc.collect()  # a DDP model that outlives its group destroys it holding the GIL, for which gloo's thread may wait
    dist.destroy_process_group()


def assert_passed(name: str, outcomes: Outcomes) -> None:
    for rank, outcome in enumerate(outcomes):
        assert outcome[name] is None, f"rank {rank}: {outcome[name]}"
