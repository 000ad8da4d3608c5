"""``LossStageCallback``: what the loss does in a training run, beside whatever else the trainer logs.

::

    from chunked_embed.trainer_callback import LossStageCallback

    trainer = SentenceTransformerTrainer(...)  # or a trainer of TRL or transformers with a loss of ours
    trainer.add_callback(LossStageCallback(trainer))
    trainer.train()

Counted is the engine: from the call of a loss of ours to its value, and its part of backward; where a reference or a
teacher is scored by it, that too. Not counted is what runs before and behind it: the encoder, gathering, CoSENT's
ordering of scores, a batch that is small enough to be left to sentence-transformers' own computation.
"""

from __future__ import annotations

import functools
import logging
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

try:
    from transformers import Trainer, TrainerCallback
except (ImportError, RuntimeError) as missing:  # the second is of a library that imports lazily
    raise ImportError(
        "expected transformers for chunked_embed.trainer_callback (pip install 'chunked-embed[sentence-transformers]' "
        f"or 'chunked-embed[trl]'): {missing}"
    ) from missing

from .engine.autograd import ChunkedLoss, ChunkedScores
from .engine.direct import Direct, _Gate
from .engine.plan import ChunkPlan
from .engine.sweep import Call
from .loss import FlexChunkLoss, Prepared, _Laid

__all__ = ["LossStageCallback"]

logger = logging.getLogger("chunked_embed")
STEPS = 1000  # that are kept unread, where nothing is logged
SPANS = 10_000  # of a step: one that failed has no end
OF_PLAN = ("chunks", "chunk_rows", "passes", "products")


# --- time, without waiting for the device ----------------------------------------------------------------------------


class Mark:
    """A point in time: of the device's stream on a GPU, of the host elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.event = None
        if device.type == "cuda":
            self.event = torch.cuda.Event(enable_timing=True)
            self.event.record(torch.cuda.current_stream(device))
        self.time = time.perf_counter()

    def reached(self) -> bool:
        return self.event is None or self.event.query()

    def until(self, other: Mark) -> float:  # seconds
        if self.event is None or other.event is None:
            return other.time - self.time
        return self.event.elapsed_time(other.event) / 1000


@dataclass(eq=False)
class Step:
    """From its first micro-batch to behind the optimizer."""

    start: Mark
    end: Mark | None = None
    spans: list[tuple[Mark, Mark]] = field(default_factory=list)
    calls: int = 0
    plan: ChunkPlan | None = None  # of the call that takes the most memory

    def reached(self) -> bool:
        return all(mark.reached() for mark in (self.end, *(end for _, end in self.spans)) if mark is not None)


# --- the engine, watched ---------------------------------------------------------------------------------------------
# While a callback trains, and then alone: a call that nobody watches has nothing to ask.


class _Doors:
    """The engine's ways in, with a clock beside each: the plan of a call, its value, its backward.

    A training that fails does not say so: who watched it is held weakly, and keeps no model alive.
    """

    def __init__(self) -> None:
        self.watching: WeakSet[LossStageCallback] = WeakSet()
        self.originals: list[tuple[type, str, Any]] = []
        self.of_thread = threading.local()

    def open(self, callback: LossStageCallback) -> None:
        if not self.originals:
            doors = {
                (_Laid, "call"): self._planned,
                (Prepared, "result"): self._forward,
                (FlexChunkLoss, "scores"): self._forward,
                (ChunkedLoss, "backward"): self._backward,
                (ChunkedScores, "backward"): self._backward,
                (_Gate, "backward"): self._end_of_direct,
            }
            for (owner, name), clocked in doors.items():
                original = vars(owner)[name]
                self.originals.append((owner, name, original))
                setattr(owner, name, clocked(original))
        self.watching.add(callback)

    def close(self, callback: LossStageCallback) -> None:
        self.watching.discard(callback)
        if not self.watching:
            while self.originals:
                setattr(*self.originals.pop())

    @contextmanager
    def span(self, device: torch.device, calls: int = 0) -> Iterator[None]:
        """One inside another is a part of that."""
        if getattr(self.of_thread, "inside", False):
            yield
            return
        self.of_thread.inside, start = True, Mark(device)
        try:
            yield
        finally:
            self.of_thread.inside = False
            self.tell(start, Mark(device), calls)

    def tell(self, start: Mark, end: Mark, calls: int = 0) -> None:
        for callback in self.watching:
            callback.spent(start, end, calls)

    def _planned(self, original: Callable) -> Callable:
        @functools.wraps(original)
        def call(laid: _Laid, *arguments: Any, **keywords: Any) -> Direct | Call:
            found = original(laid, *arguments, **keywords)
            self.of_thread.direct = isinstance(found, Direct)
            if isinstance(found, Call):
                for callback in self.watching:
                    callback.planned(found.plan)
            return found

        return call

    def _forward(self, original: Callable) -> Callable:
        @functools.wraps(original)
        def forward(*arguments: Any, **keywords: Any) -> Any:
            with self.span(self.device, calls=1):
                found = original(*arguments, **keywords)
            if isinstance(arguments[0], Prepared):
                direct, values = isinstance(arguments[0].call, Direct), [found.loss]
            else:
                direct, values = getattr(self.of_thread, "direct", False), list(found.values())
            for value in values if direct else ():
                if value.requires_grad:
                    value.register_hook(self._start_of_direct)
            return found

        return forward

    def _backward(self, original: Any) -> Any:
        function = original.__func__

        @functools.wraps(function)
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            with self.span(self.device):
                return function(ctx, *grads)

        return staticmethod(backward)

    # A small problem's backward is ordinary autograd: from the gradient of its value to its gate.

    def _start_of_direct(self, grad: Tensor) -> None:
        if getattr(self.of_thread, "start", None) is None and not getattr(self.of_thread, "inside", False):
            self.of_thread.start = Mark(self.device)

    def _end_of_direct(self, original: Any) -> Any:
        function = original.__func__

        @functools.wraps(function)
        def backward(ctx: Any, *grads: Tensor) -> Any:
            found = function(ctx, *grads)
            start, self.of_thread.start = getattr(self.of_thread, "start", None), None
            if start is not None:
                self.tell(start, Mark(self.device))
            return found

        return staticmethod(backward)

    @property
    def device(self) -> torch.device:
        """Of those who watch: one, in one process."""
        return next((callback.device for callback in self.watching), torch.device("cpu"))


DOORS = _Doors()


# --- the callback ----------------------------------------------------------------------------------------------------


class LossStageCallback(TrainerCallback):
    """Logs, whenever the trainer logs, an entry of its own of the same step:

    - ``loss_stage/share``: of a step's time, from its first micro-batch to behind the optimizer, what the engine takes
      in forward and backward; ``loss_stage/seconds`` a step. Means over the steps since the last entry that the device
      has done by now: on a GPU they are read from events, and nothing waits for them, so that an entry may lack the
      last step, and the first entry both. Elsewhere they are the host's.
    - ``loss_stage/calls`` of the engine a step. Without any (small batches, left to sentence-transformers' own
      computation) nothing above is logged.
    - ``loss_stage/chunks``, ``chunk_rows``, ``passes``, ``products``, ``planned_gib``: of the plan of the call that
      takes the most, where calls are planned (small problems are not). A plan that is new is told to
      ``logging.getLogger("chunked_embed")`` whole, at the level INFO.
    - ``memory/peak_gib``: the most that torch held on the GPU since the counter was last reset, which this does not do;
      on a CPU the most that the process had in memory.

    Evaluation between steps is not counted. Of several processes each counts its own, and the first one's is logged.

    Args:
        trainer: the trainer that it is added to: a ``transformers.Trainer`` or one that builds on it. Its own ``log``
            is passed by, so that metrics which it collects for its next entry stay there.
    """

    def __init__(self, trainer: Trainer) -> None:
        if not isinstance(trainer, Trainer):
            raise TypeError(f"expected the trainer as transformers.Trainer, got {type(trainer).__name__}")
        self.trainer = trainer
        self.device: torch.device = trainer.args.device
        self.steps: list[Step] = []
        self.current: Step | None = None
        self.plan: ChunkPlan | None = None  # the last that was told

    # --- what the engine says ---

    def planned(self, plan: ChunkPlan) -> None:
        step = self.current
        if step is not None and (step.plan is None or step.plan.peak_bytes < plan.peak_bytes):
            step.plan = plan

    def spent(self, start: Mark, end: Mark, calls: int) -> None:
        if self.current is not None and len(self.current.spans) < SPANS:
            self.current.spans.append((start, end))
            self.current.calls += calls

    # --- what the trainer says ---

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        DOORS.close(self)  # of a training that failed
        self.steps, self.current, self.plan = [], None, None
        DOORS.open(self)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        DOORS.close(self)
        self.current = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.current = Step(Mark(self.device))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step, self.current = self.current, None
        if step is not None:
            step.end = Mark(self.device)
            self.steps = [*self.steps[-STEPS:], step]
        if control.should_log:
            Trainer.log(self.trainer, self._entry())
            control.should_log = True  # which an entry takes back; the trainer's own is still to come

    # --- an entry ---

    def _entry(self) -> dict[str, float]:
        done = [step for step in self.steps if step.reached()]
        found: dict[str, float] = {}
        calls = sum(step.calls for step in done)
        if calls:
            whole = sum(step.start.until(step.end) for step in done if step.end is not None)
            seconds = sum(start.until(end) for step in done for start, end in step.spans)
            found["loss_stage/share"] = seconds / whole
            found["loss_stage/seconds"] = seconds / len(done)
            found["loss_stage/calls"] = calls / len(done)
        plans = [step.plan for step in self.steps if step.plan is not None]
        if plans:
            plan = max(plans, key=lambda plan: plan.peak_bytes)
            found |= {f"loss_stage/{name}": getattr(plan, name) for name in OF_PLAN}
            found["loss_stage/planned_gib"] = plan.peak_bytes / 2**30
            if plan != self.plan:
                self.plan = plan
                logger.info("the plan of the loss\n%s", plan)
        found["memory/peak_gib"] = _peak_bytes(self.device) / 2**30
        self.steps = [step for step in self.steps if step not in done]
        return found


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
