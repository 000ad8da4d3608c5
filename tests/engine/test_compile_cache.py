"""What is compiled, how often, and where it runs uncompiled: one graph for a loss and a row count, bounded caches."""

from __future__ import annotations

import gc
import os
import random
import subprocess
import sys
import textwrap
import threading
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from engine_zoo import CASES, make
from step_parts import Loss, call, check, compilations, forget
from torch.utils.flop_counter import FlopCounterMode

from chunked_embed.engine import compile as cache
from chunked_embed.engine import specialize


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """A backend that traces and generates no code: what is counted is graphs."""
    forget()
    monkeypatch.setattr(cache, "BACKEND", "eager")
    yield
    forget()


class Scaled(Loss):
    def __init__(self, m=0.5):
        super().__init__()
        self.m = m

    def loss_fn(self, outputs, rows):
        return (outputs * self.m).sum(1)


def outputs(rows=4, columns=6):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))


def compiled():
    """Of each step and its constants: whether it is compiled."""
    return [
        variant.compiled.compiled is not None and not variant.compiled.failed
        for step in specialize._STEPS.values()
        for layout in step.readings
        for variant in layout.variants.values()
    ]


# --- graphs are counted ----------------------------------------------------------------------------------------------


def test_rows_and_columns_that_change_turn_dynamic():
    sizes = random.Random(0)
    for _ in range(30):
        check(Scaled(), outputs(sizes.randint(2, 120), sizes.randint(2, 50)), shape_key="narrow")
    assert compilations() <= 3  # the first, with dynamic rows, with dynamic columns


def test_each_shape_key_has_a_graph():
    for _ in range(3):
        for rows in (8, 16, 32):
            check(Scaled(), outputs(rows))
    assert compilations() == 3


@pytest.mark.slow
@pytest.mark.parametrize("wide", [False, True], ids=["dynamic rows", "fixed sizes"])
@pytest.mark.parametrize("name", ["cross_entropy", "preference", "ranked", "identity"])
def test_ragged_batches(name, wide, monkeypatch):
    """A kind of loss each, through the whole engine: after a few batches hardly anything is compiled any more."""
    if wide:
        monkeypatch.setattr("chunked_embed.engine.plan.NARROW", 0)
    counts = []
    for seed, size in enumerate((40, 90, 2, 7, 64, 33, 81, 119)):
        before = compilations()
        x = make(name, m=size, seed=seed, dtype=torch.float32)
        CASES[name].call(CASES[name].loss(chunk_size=64, compiled=True), x).loss.backward()
        counts.append(compilations() - before)
    assert sum(counts) <= 12, counts
    assert sum(counts[5:]) <= 1, counts


# --- where it runs uncompiled ----------------------------------------------------------------------------------------


def disabled():
    import torch._dynamo.config

    return torch._dynamo.config.patch(disable=True)


HINDRANCES = {
    "dispatch mode": lambda: FlopCounterMode(display=False),
    "saved-tensor hooks": torch.autograd.graph.save_on_cpu,
    "dynamo disabled": disabled,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HINDRANCES)
def test_a_hindrance_passes(name, monkeypatch):
    """A first call, a new value and a new shape run uncompiled; afterwards they are compiled."""
    monkeypatch.setattr(cache, "BACKEND", "aot_eager")  # whose graphs run under hooks, as generated code does
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with HINDRANCES[name]():
            check(Scaled(), outputs())
        assert compiled() == [] and compilations() == 0
        check(Scaled(), outputs())
        assert compiled() == [True] and compilations() == 1
        with HINDRANCES[name]():
            check(Scaled(), outputs())
            check(Scaled(0.7), outputs())
            check(Scaled(), outputs(4, 9), shape_key=4)
        with torch.autograd.graph.save_on_cpu():  # as allowed as it was
            pass
        assert compiled() == [True] and compilations() == 1
        check(Scaled(0.7), outputs())
        check(Scaled(0.9), outputs())
        check(Scaled(), outputs(4, 9), shape_key=4)
        assert compiled() == [True] and compilations() == 3


def test_flops_are_counted():
    class Product(Loss):
        def loss_fn(self, outputs, rows):
            return (outputs @ outputs.T).sum(1)

    check(Product(), outputs())
    with FlopCounterMode(display=False) as mode:
        call(Product(), outputs())
    assert mode.get_total_flops() > 0


SCRIPT = """
import sys, warnings
sys.path.insert(0, {folder!r})
import torch
from step_parts import Loss, check
from chunked_embed.engine import compile as cache
from chunked_embed.engine import specialize
cache.BACKEND = "eager"

class Scaled(Loss):
    def loss_fn(self, outputs, rows):
        return (outputs * self.m).sum(1)

loss = Scaled()
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for loss.m in (0.5, 0.7, 0.9):
        check(loss, torch.randn(4, 6))
print(*[w.message for w in seen if "chunk step" in str(w.message)], sep="\\n")
"""


def in_a_new_process(tmp_path, **environment):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT).format(folder=str(Path(__file__).parent)))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()


@pytest.mark.slow
def test_torch_compile_is_switched_off(tmp_path):
    assert in_a_new_process(tmp_path, TORCH_COMPILE_DISABLE="1") == []


@pytest.mark.slow
def test_a_cache_folder_that_cannot_be_made(tmp_path):
    """Dynamo makes it on import."""
    (tmp_path / "file").write_text("")
    (warning,) = in_a_new_process(tmp_path, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "file"))
    assert "does not work on this machine" in warning and "file" in warning


def failing(error):
    def compiled(*args):
        raise error

    return lambda *args, **kwargs: compiled


def no_compiler():
    from torch._inductor.exc import InvalidCxxCompiler

    return InvalidCxxCompiler()


@pytest.mark.parametrize("error", [no_compiler, lambda: PermissionError(13, "denied", "/cache")], ids=["C++", "folder"])
def test_where_nothing_can_be_compiled(error, monkeypatch):
    monkeypatch.setattr(torch, "compile", failing(error()))
    with pytest.warns(RuntimeWarning, match="does not work on this machine's cpu device") as seen:
        for m in (0.5, 0.7, 0.9):
            check(Scaled(m), outputs())
    assert len(seen) == 1


class Untraceable(Loss):
    def loss_fn(self, outputs, rows):
        if float(outputs.detach().sum()) > 1e9:  # depends on data: cannot be traced in one graph
            return outputs.sum(1)
        return outputs.mean(1)


def test_what_cannot_be_compiled_runs_uncompiled_after_one_warning():
    with pytest.warns(RuntimeWarning, match="could not be compiled") as seen:
        for _ in range(3):
            check(Untraceable(), outputs())
        check(Untraceable(), outputs(), in_place=True)
    assert len([w for w in seen if "could not be compiled" in str(w.message)]) == 1


def test_an_error_of_the_function_is_the_functions():
    class Wrong(Loss):
        def loss_fn(self, outputs, rows):
            return outputs.sum(1) + rows["nothing"]

    with warnings.catch_warnings(), pytest.raises(KeyError, match="nothing"):
        warnings.simplefilter("error")
        call(Wrong(), outputs())


# --- what is said of it ---------------------------------------------------------------------------------------------


@pytest.fixture
def said(monkeypatch, caplog):
    """Each compilation takes three seconds by the clock, or what ``said.seconds`` is."""

    class Said(list):
        seconds, now = 3.0, 0.0

        def clock(self):
            self.now += self.seconds
            return self.now

        def lines(self):
            return [(r.name, r.levelname, r.getMessage()) for r in caplog.records]

    found = Said()
    monkeypatch.setattr(cache, "perf_counter", found.clock)
    caplog.set_level("INFO")
    return found


def test_what_takes_seconds_is_said_once(said):
    for _ in range(2):
        for rows in (4, 8):  # two graphs
            check(Scaled(), outputs(rows))
        check(Scaled(0.7), outputs())  # and another
    assert compilations() > 2
    ((name, level, message),) = said.lines()
    assert (name, level) == ("chunked_embed", "WARNING")  # at this level it shows without any setting
    assert "Scaled.loss_fn (test_compile_cache.py:" in message and "in 3.0 s" in message and "compiled=False" in message


def test_each_loss_and_kind_of_step_is_said(said):
    x = make("preference", dtype=torch.float32)
    for _ in range(2):
        CASES["preference"].call(CASES["preference"].loss(compiled=True), x).loss.backward()
    values, gradients = (message for _, _, message in said.lines())
    assert " the values of " in values and " the gradients of " in gradients
    assert "compiled=False" in values and gradients.endswith("in 3.0 s")
    check(Scaled(), outputs())
    assert len(said.lines()) == 3


def test_what_is_quick_is_not_said_until_something_is_not(said):
    said.seconds = 0.4
    check(Scaled(), outputs())
    call(Scaled(), outputs(), compiled=False)
    assert said.lines() == [] and compilations() == 1
    said.seconds = 3.0
    call(Scaled(), outputs(), compiled=False)
    check(Scaled(), outputs())
    assert said.lines() == []  # nothing was compiled
    check(Scaled(), outputs(8), shape_key="another")
    assert len(said.lines()) == 1


def test_one_process_of_several_speaks(said, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    check(Scaled(), outputs())
    assert said.lines() == []


def test_a_failure_is_a_warning_and_no_more(said):
    with pytest.warns(RuntimeWarning, match="could not be compiled"):
        check(Untraceable(), outputs())
    assert said.lines() == []


# --- bounds ----------------------------------------------------------------------------------------------------------


def closure(mask):
    return lambda outputs, rows: outputs.sum(1) + mask[0]


def by_function(mask):
    return Loss(closure(mask))


def by_class(mask):
    class Local(Loss):
        def loss_fn(self, outputs, rows):
            return outputs.sum(1) + mask[0]

    return Local()


class Transformed(Loss):
    def loss_fn(self, outputs, rows):
        return self.transform(outputs)


def by_attribute(mask):
    loss = Transformed()
    loss.transform = lambda outputs: outputs.sum(1) + mask[0]
    return loss


@pytest.mark.slow
@pytest.mark.parametrize("make", [by_function, by_class, by_attribute])
def test_a_function_made_anew_in_each_call(make):
    alive, few = [], specialize.MANY
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for i in range(3 * few):
            mask = torch.full((4,), float(i))
            alive.append(weakref.ref(mask))
            check(make(mask), outputs())
    del mask
    gc.collect()
    assert compilations() == few
    assert sum(ref() is not None for ref in alive) <= few
    (warning,) = seen
    assert "once, at module level" in str(warning.message)
    assert "test_compile_cache.py:" in str(warning.message)
    cache.clear()
    gc.collect()
    assert not any(ref() for ref in alive)


@pytest.mark.parametrize("make", [by_function, by_class, by_attribute])
def test_uncompiled_calls_keep_nothing_alive(make):
    alive = []
    for i in range(5):
        mask = torch.full((4,), float(i))
        alive.append(weakref.ref(mask))
        call(make(mask), outputs(), compiled=False)
    del mask
    gc.collect()
    assert not any(ref() for ref in alive)


class Named(Loss):
    def loss_fn(self, outputs, rows):
        return outputs.sum(1) * len(self.name)


def test_a_string_that_changes_in_each_call():
    loss = Named()
    with pytest.warns(RuntimeWarning, match=r"Named\.name \(read at .*\) has taken 8 values") as seen:
        for i in range(3 * specialize.MANY):
            loss.name = "x" * i
            check(loss, outputs())
    assert len(seen) == 1 and compilations() == specialize.MANY


def test_a_late_constant_is_compiled_when_it_is_asked_for_often(monkeypatch):
    monkeypatch.setattr(specialize, "PATIENCE", 3)
    loss = Named()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i in range(specialize.MANY):
            loss.name = "x" * i
            check(loss, outputs())
        loss.name = "x" * 20
        counts = []
        for _ in range(4):
            check(loss, outputs())
            counts.append(compilations() - specialize.MANY)
    assert counts == [0, 0, 1, 1]


def test_the_least_recently_used_go(monkeypatch):
    monkeypatch.setattr(specialize, "KEPT", 2)
    monkeypatch.setattr(specialize, "STEPS", 2)
    loss = Named()
    for name in ("", "x", "", "xx", ""):
        loss.name = name
        check(loss, outputs())
    assert compilations() == 3
    for rows in (8, 16, 8, 32, 8):
        check(Scaled(), outputs(rows))
    assert compilations() == 6 and len(specialize._STEPS) == 2
    assert len(specialize._FAMILIES) <= 2


def test_threads_share_steps():
    failed = []

    def work(m):
        try:
            for _ in range(3):
                check(Scaled(m), outputs())
        except BaseException as error:
            failed.append(error)

    check(Scaled(0.5), outputs())
    check(Scaled(0.7), outputs())
    threads = [threading.Thread(target=work, args=(0.1 * i,)) for i in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and compilations() == 2


# --- an outer torch.compile, and what cannot go through --------------------------------------------------------------


def test_outside_torch_compile():
    case = CASES["cross_entropy"]
    x = make("cross_entropy", dtype=torch.float32)
    loss = case.loss(compiled=False)

    def outer(hidden):
        return case.call(loss, x | {"hidden": hidden * 2}).loss + 1

    expected = torch.autograd.grad(outer(x["hidden"]), x["hidden"])[0]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*grad attribute of a Tensor that is not a leaf.*")  # dynamo's own
        found = torch.autograd.grad(torch.compile(outer, backend="eager")(x["hidden"]), x["hidden"])[0]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev])
def test_functional_transforms_are_refused(transform):
    case = CASES["cross_entropy"]
    x = make("cross_entropy", dtype=torch.float32)
    loss = case.loss(compiled=False)
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        transform(lambda hidden: case.call(loss, x | {"hidden": hidden}).loss)(x["hidden"].detach())


def test_export_is_refused():
    case = CASES["cross_entropy"]
    x = make("cross_entropy", dtype=torch.float32)

    class Module(torch.nn.Module):
        def forward(self, hidden):
            return case.call(case.loss(compiled=False), x | {"hidden": hidden}).loss

    with pytest.raises(RuntimeError, match="exported"):
        torch.export.export(Module(), (x["hidden"].detach(),))
