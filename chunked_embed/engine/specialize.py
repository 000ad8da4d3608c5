"""Steps compiled once for a loss's functions and the numbers that they read, for the whole process.

**Numbers are constants until they change.** A step is traced with a ``self`` that holds the attributes which its
functions read, found by running them once, uncompiled, on at most two rows. It serves a call only where all of those
have the same values and types; attributes that nobody reads are in no key. When a float or an int that is read takes a
second value, it is *promoted*: to a 0-d float64 tensor, or to a symbol, which are arguments of the step. That is kept
where the uncompiled functions give the same values and gradients with the tensor as with the number, at both values,
and the compiled step serves both; else the number stays a constant, one compilation for each value, which is said once.
Tensors are always arguments.

**Bounds.** A loss that compiles for the ninth time (a function made anew in each call, a constant that changes in each)
runs what is new uncompiled, until that has been asked for often. Of all steps, the least recently used go.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import compile
from .compile import Compiled, Failure, explain, hindered, symbols_can_be_asked_for, warn_once
from .formula import UNREAD, Formula, Notes, assemble, bind, everything, line_of, notes_all
from .recent import Recent
from .values import MISSING, Watched, frozen, plain_number, same

STEPS = 512  # compiled steps without their constants; the least recently used go
KEPT = 64  # constants of one step, likewise
MANY = 8  # compilations of one loss, beyond which what is new waits
PATIENCE = 32  # calls that it waits for
SEVERAL = 3  # values of a number that stays a constant, or functions of one code, that are worth a warning

NUMBERS = 1024  # tensors of promoted numbers
WORDS = {"score_step": "the values", "pull_step": "the gradients"}  # that a factory's step forms, in a message

_STEPS: Recent[Hashable, Specialized] = Recent()
_FAMILIES: Recent[Hashable, Family] = Recent()
_NUMBERS: Recent[tuple[str, float], Tensor] = Recent()
compile.CACHES += [_STEPS, _FAMILIES, _NUMBERS]


def run(
    factory: Callable[..., Callable],
    formula: Formula,
    bound: tuple,
    shape_key: Hashable,
    device: torch.device,
    args: tuple,
    probe: Callable[[], tuple],
) -> Any:
    """``factory(formula.bind(), *bound)(*args)``, compiled.

    Compiled once for ``(factory, formula.key, bound, shape_key, device.type)`` and for the values of the attributes
    that it notes.

    Args:
        factory: a module-level function that returns the step.
        formula: the loss's functions and numbers.
        bound: what else the step closes over, hashable.
        shape_key: everything besides that on which a compilation depends: a row count, dtypes.
        device: where the step runs.
        args: what the step is called with.
        probe: makes ``args`` for at most two rows, new tensors with each call: a step may write to them.
    """
    if device.type not in compile.BROKEN and not hindered(fresh=False):
        key = (factory, formula.key, bound, shape_key, device.type)
        step = _STEPS.found(key) or _admitted(key, factory, formula, bound, shape_key, device.type)
        if step is not None:
            return step(Given(formula, args, probe))
    return factory(formula.bind(), *bound)(*args)


class Given(NamedTuple):
    """What a call gives to its step; ``probe`` makes arguments for a trial."""

    formula: Formula
    args: tuple
    probe: Callable[[], tuple]


# --- what is compiled at all -----------------------------------------------------------------------------------------


@dataclass
class Family:
    """Function objects of the same code: where one after another comes in, they are many. Classes that share theirs
    count once."""

    known: set[int] = field(default_factory=set)  # hashes of the objects
    waiting: dict[int, int] = field(default_factory=dict)

    def admits(self, objects: int) -> bool:
        if objects in self.known or len(self.known) < MANY or waited(self.waiting, objects):
            self.known.add(objects)
            return True
        return False


def waited(waiting: dict[int, int], entry: int) -> bool:
    """Whether this has been asked for often enough. Hashes are kept, not what they are of."""
    if entry not in waiting and len(waiting) >= KEPT:
        waiting.pop(next(iter(waiting)))
    waiting[entry] = waiting.get(entry, 0) + 1
    if waiting[entry] < PATIENCE:
        return False
    del waiting[entry]
    return True


def _admitted(
    key: Hashable, factory: Callable, formula: Formula, bound: tuple, shape_key: Hashable, device_type: str
) -> Specialized | None:
    """A new step; or None, where this code has been compiled so often that it waits."""
    if hindered(fresh=True):
        return None
    codes = formula.codes()
    alike = (factory, codes, bound, shape_key, device_type)
    family = _FAMILIES.found(alike) or _FAMILIES.keep(alike, Family(), STEPS)
    if not family.admits(hash(tuple(formula.all_functions()))):
        return None
    if len(family.known) >= SEVERAL:
        warn_once(
            f"{formula.home()} came in as {SEVERAL} functions of the same code, and the chunk steps are compiled for "
            "each: define it once, at module level, and not in each call"
        )
    return _STEPS.keep(key, Specialized(factory, bound, device_type, codes), STEPS)


# --- one step --------------------------------------------------------------------------------------------------------


class Variant(NamedTuple):
    """A step compiled for some constants."""

    compiled: Compiled
    floats: frozenset[str]  # promoted numbers
    ints: frozenset[str]

    @property
    def symbols(self) -> tuple[str, ...]:
        """Where dynamo finds the integers in the traced step."""
        return tuple(f"L['integers']['{name}']" for name in sorted(self.ints))

    def arguments(self, values: Mapping[str, Any], args: tuple) -> tuple:
        """Of the traced step."""
        constants, integers = {}, {}
        for name, value in values.items():
            if name in self.ints:
                integers[name] = value
            elif value is not MISSING:
                constants[name] = _number(name, value) if name in self.floats else value
        return (constants, integers, *args)


class Reading:
    """Attributes that one way through the functions notes, and what is compiled for their values."""

    def __init__(self, lines: dict[str, str], absent: dict[str, str] | None) -> None:
        self.lines = lines
        self.names = (*lines, *(absent or ()))
        self.absent = None if absent is None else tuple(absent)  # None: these are all the attributes that there are
        self.variants: Recent[tuple, Variant] = Recent()

    def read(self, view: Any) -> dict[str, Any]:
        own = view.__dict__
        return {name: plain_number(own[name] if name in own else getattr(view, name, MISSING)) for name in self.names}

    def key(self, view: Any, values: Mapping[str, Any], promoted: set[tuple[str, type]]) -> tuple:
        """What a variant's constants are."""
        constants = [type(v) if (name, type(v)) in promoted else frozen(v) for name, v in values.items()]
        return (None if self.absent is not None else tuple(view.__dict__), *constants)

    def drop(self, name: str, kind: type) -> None:
        """Steps for constant values of what is promoted now are never asked for again."""
        at = 1 + self.names.index(name)
        for key in [k for k in self.variants if isinstance(k[at], tuple) and k[at][0] is kind]:
            self.variants.pop(key, None)


class Specialized:
    """What ``factory`` makes of a loss's functions, for all values of the attributes that they read."""

    def __init__(self, factory: Callable, bound: tuple, device_type: str, codes: tuple) -> None:
        self.factory = factory
        self.bound = bound
        self.device_type = device_type
        self.codes = codes  # kept: the key has their addresses
        self.compilations = 0
        self.waiting: dict[int, int] = {}
        self.readings: list[Reading] = []
        self.promoted: set[tuple[str, type]] = set()  # numbers that are arguments: a name and its type
        self.refused: set[tuple[str, type]] = set()  # numbers that stay constants
        self.last: dict[tuple[str, type], Any] = {}  # the last value of each number
        self.seen: dict[str, set[int]] = {}  # hashes of each constant's values, a few

    def __call__(self, given: Given) -> Any:
        view = given.formula.view
        for reading in self.readings:
            values = reading.read(view)
            key = reading.key(view, values, self.promoted)
            variant = reading.variants.found(key)
            if variant is None:
                continue
            if variant.compiled.failed:
                return self._uncompiled(given)
            try:
                return variant.compiled.attempt(variant.arguments(values, given.args))
            except Failure as failure:
                return self._again(given, reading, key, variant, failure)
        return self._build(given)

    def _uncompiled(self, given: Given) -> Any:
        return self.factory(given.formula.bind(), *self.bound)(*given.args)

    def _again(self, given: Given, reading: Reading, key: tuple, variant: Variant, failure: Failure) -> Any:
        """A step that worked does not, for other shapes or another value of a promoted number."""
        if hindered(fresh=True):
            return self._uncompiled(given)
        reading.variants.pop(key, None)
        if not _unread(failure):
            if not (variant.floats or variant.ints):
                return self._give_up(given, reading, key, variant, failure)
            self._refuse(variant)
        return self._build(given)

    def _give_up(self, given: Given, reading: Reading, key: tuple, variant: Variant, failure: Failure) -> Any:
        """Uncompiled from now on. Said after a run: where that fails too, the user reads its plain error alone."""
        result = self._uncompiled(given)
        variant.compiled.failed = True
        reading.variants.keep(key, variant, KEPT)
        explain(failure.cause, self.device_type)
        return result

    # --- the first call with some values ---

    def _build(self, given: Given) -> Any:
        if hindered(fresh=True) or self._waits(given):
            return self._uncompiled(given)
        view = given.formula.view
        reading = self._look(given)
        candidates = self._candidates(given, reading)
        trials = [candidates] if candidates else []
        if len(candidates) > 1:
            trials += [{number: before} for number, before in candidates.items()]
        while True:
            trying = trials.pop(0) if trials else {}
            values = reading.read(view)
            variant = self._variant(given, reading, values, self.promoted | set(trying))
            key = reading.key(view, values, self.promoted | set(trying))
            arguments = variant.arguments(values, given.args)
            try:
                result = variant.compiled.attempt(arguments, variant.symbols)
                break
            except Failure as failure:
                if hindered(fresh=True):
                    return self._uncompiled(given)
                if _unread(failure) and reading.absent is not None:
                    reading = self._reading(everything(given.formula), None)
                    trials.insert(0, trying)
                elif len(trying) == 1:
                    self.refused |= set(trying)
                elif not trying and (variant.floats or variant.ints):
                    self._refuse(variant)
                elif not trying:
                    return self._give_up(given, reading, key, variant, failure)
        if trying:
            self._settle(reading, variant, values, arguments, trying)
            key = reading.key(view, values, self.promoted)
        self._note(given, reading, values)
        reading.variants.keep(key, variant, KEPT)
        return result

    def _waits(self, given: Given) -> bool:
        """Whether the constants have changed so often that new ones wait; those of a promoted number never do."""
        if self.compilations < MANY or not self.readings:
            return False
        reading, view = self.readings[0], given.formula.view
        values = reading.read(view)
        if waited(self.waiting, hash(reading.key(view, values, self.promoted))):
            return False
        self._note(given, reading, values)
        return True

    def _look(self, given: Given) -> Reading:
        """Which attributes are read: all, where a run that notes them gives other numbers, or none."""
        formula = given.formula
        if notes_all(formula):
            notes = Notes(formula)
            try:
                with _own_randomness():
                    noted = self._outcome(given, notes.view)
                    notes.finish()
                    found = {name: getattr(formula.view, name, MISSING) for name in notes.names}
                    there = {name: value for name, value in found.items() if value is not MISSING}
                    served = self._outcome(given, assemble(formula.functions, there, tuple(notes.absent)))
                    whole = self._outcome(given, Formula.snapshot(formula.view).view)
            except Exception:  # the loss's own, for want of rows or for want of attributes: it is seen in the real run
                pass
            else:
                if same(noted, whole) and same(served, whole):
                    return self._reading(notes.names, notes.absent)
        return self._reading(everything(formula), None)

    def _reading(self, lines: dict[str, str], absent: dict[str, str] | None) -> Reading:
        new = Reading(lines, absent)
        for reading in self.readings:
            if set(reading.names) == set(new.names) and sorted(reading.absent or [""]) == sorted(new.absent or [""]):
                return reading
        self.readings.insert(0, new)
        del self.readings[MANY:]
        return new

    def _outcome(self, given: Given, view: Any, warns: Any = "ignore") -> Any:
        """Of a trial run."""
        args = given.probe()
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter(warns)
            return self.factory(bind(given.formula.functions, view), *self.bound)(*args), args

    def _variant(
        self, given: Given, reading: Reading, values: Mapping[str, Any], promoted: set[tuple[str, type]]
    ) -> Variant:
        floats = frozenset(n for n, v in values.items() if type(v) is float and (n, float) in promoted)
        ints = frozenset(n for n, v in values.items() if type(v) is int and (n, int) in promoted)
        traced = _traced(self.factory, given.formula.functions, self.bound, reading.absent)
        self.compilations += 1
        what = f"{WORDS.get(self.factory.__name__, 'a step')} of {given.formula.home()}"
        return Variant(Compiled(traced, self.device_type, what), floats, ints)

    # --- numbers that change ---

    def _candidates(self, given: Given, reading: Reading) -> dict[tuple[str, type], Any]:
        """Numbers that take a second value now, and may become arguments -> their first."""
        found: dict[tuple[str, type], Any] = {}
        values = reading.read(given.formula.view)
        for name, value in values.items():
            number = (name, type(value))
            if type(value) not in (float, int) or number in self.promoted | self.refused:
                continue
            before = self.last.get(number)
            if before is None or frozen(before) == frozen(value):
                continue
            if type(value) is float:
                fits = self._tensor_fits(given, reading, values, name, before)
            else:  # a symbol: dynamo guards what it assumes of one, so nothing is to be compared
                fits = symbols_can_be_asked_for() and max(abs(before), abs(value)) < 2**31
            if fits:
                found[number] = before
            else:
                self.refused.add(number)
        return found

    def _tensor_fits(self, given: Given, reading: Reading, values: Mapping[str, Any], name: str, before: float) -> bool:
        """Whether the uncompiled functions give the same with a tensor as with the number, at both values."""
        there = {n: v for n, v in values.items() if v is not MISSING}

        def outcome(value: Any, warns: Any) -> Any:
            view = assemble(given.formula.functions, there | {name: value}, reading.absent)
            return self._outcome(given, view, warns)

        try:
            for value in (before, values[name]):
                tensor = torch.tensor(value, dtype=torch.float64, device="cpu").as_subclass(Watched)
                with _own_randomness():
                    expected, found = outcome(value, "ignore"), outcome(tensor, "error")
                if tensor._version or not same(expected, found):
                    return False
        except Exception:
            return False
        return True

    def _settle(
        self,
        reading: Reading,
        variant: Variant,
        values: Mapping[str, Any],
        arguments: tuple,
        trying: dict[tuple[str, type], Any],
    ) -> None:
        """Promote the numbers of which the new step serves the earlier value, too, or a neighbour. The others were
        compiled in, in spite of all: for them it serves this value alone."""
        constants, integers, *rest = arguments
        for (name, kind), before in trying.items():
            value = values[name]
            for other in (before,) if kind is float else (before, value + 1, value - 1):
                floats = {**constants, name: _number(name, other)} if kind is float else constants
                ints = {**integers, name: other} if kind is int else integers
                if variant.compiled.serves({"values": floats, "integers": ints, "args": tuple(rest)}):
                    self.promoted.add((name, kind))
                    self.seen.pop(name, None)
                    reading.drop(name, kind)
                    break
            else:
                if kind is float or value not in (0, 1):  # which are special in many ways: wait for another
                    self.refused.add((name, kind))

    def _refuse(self, variant: Variant) -> None:
        """What was promoted in a variant that could not be compiled stays a constant."""
        numbers = {*((name, float) for name in variant.floats), *((name, int) for name in variant.ints)}
        self.promoted -= numbers
        self.refused |= numbers

    def _note(self, given: Given, reading: Reading, values: Mapping[str, Any]) -> None:
        """Remember the constants, and say so where one changes again and again."""
        for name, value in values.items():
            kind = type(value)
            if kind in (float, int):
                self.last[name, kind] = value
            if (name, kind) in self.promoted or value is MISSING:
                continue
            function = isinstance(getattr(value, "__code__", None), type(_reason.__code__))
            enough = SEVERAL if function or (name, kind) in self.refused else MANY
            seen = self.seen.setdefault(name, set())
            if len(seen) > MANY:
                continue
            seen.add(hash(frozen(value)))
            if len(seen) >= enough:
                loss = given.formula.functions.cls.__name__
                line = reading.lines.get(name) or line_of(given.formula, name)
                warn_once(
                    f"{loss}.{name}{f' (read at {line})' if line else ''} has taken {enough} values, and the chunk "
                    f"steps are compiled for each: {_reason(value)}"
                )


def _reason(value: Any) -> str:
    if type(value) in (float, int):
        return (
            "it is used in a way that only a Python number can be (a branch, a shape, a formatted string). Where it "
            "changes in training, compute with it as a tensor: a row, column or group argument, or one of numbers="
        )
    if callable(value):
        return "define the function once, at module level, and not in each call"
    return "what changes from call to call belongs in a number of its own, or in a row, column or group argument"


def _traced(factory: Callable, functions: Any, bound: tuple, absent: tuple[str, ...] | None) -> Callable:
    def step(values: dict[str, Any], integers: dict[str, int], *args: Any) -> Any:
        view = assemble(functions, {**values, **integers}, absent)
        return factory(bind(functions, view), *bound)(*args)

    return step


def _number(name: str, value: float) -> Tensor:
    """A promoted number. Kept: a loss with ten of them would spend a tenth of a millisecond a call on making them.

    By name too: a tensor that is two arguments of a compiled step makes dynamo compile anew.
    """
    kept = _NUMBERS.found((name, value))
    if kept is not None and not kept._version and value:  # zero has two signs
        return kept
    with torch.inference_mode(False):  # else it would be no good outside of the first caller's inference mode
        made = torch.tensor(value, dtype=torch.float64, device="cpu")
    return _NUMBERS.keep((name, value), made, NUMBERS)


def _own_randomness() -> AbstractContextManager:
    """A trial run draws no numbers of the user's."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    return torch.random.fork_rng(devices)


def _unread(failure: Failure) -> bool:
    return UNREAD in f"{failure.cause}\n{failure.cause.__cause__ or ''}"
