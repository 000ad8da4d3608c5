"""The compile cache: one compiled step for each loss, its static options and a row count, for the whole process.

Dynamo counts recompiles per *code object* and silently runs eager past a limit, so every entry gets a code object of
its own. A changing number (beta, scale, temperature) is a 0-d tensor argument and recompiles nothing; a column count
that changes is made dynamic by dynamo the second time.
"""

from __future__ import annotations

import functools
import re
import sys
import warnings
from collections.abc import Callable, Hashable
from contextvars import ContextVar
from typing import Any, TypeVar, cast

import torch

F = TypeVar("F", bound=Callable)

_INSIDE: ContextVar[bool] = ContextVar("inside", default=False)
_STEPS: dict[Hashable, Step] = {}
_BROKEN: set[str] = set()  # device types on which nothing can be compiled: no C++ compiler, no Triton
_WARNED: set[str] = set()

BACKEND = "inductor"
# How torch says that nothing can be compiled here; other errors are of one step, whatever names occur in them.
NO_COMPILER = re.compile(
    r"InvalidCxxCompiler|TritonMissing|No working C\+\+ compiler|[Cc]annot find a working triton"
    r"|Failed to find C compiler|No module named '?triton|No such file or directory: '?(gcc|g\+\+|cc|clang)"
)
# On a GPU a step is bound by memory: forming an element again is cheaper than a tensor of the outputs' size to keep it
# in. Inductor keeps from 30 operations or 4 reads on; these are far beyond what a divergence has.
RECOMPUTE = {"realize_opcount_threshold": 400, "realize_reads_threshold": 32, "realize_acc_reads_threshold": 32}


def warn_once(message: str) -> None:
    """Say it the first time only: a training loop would repeat it every step."""
    if message not in _WARNED:
        _WARNED.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=3)


def outside_compile(function: F) -> F:
    """Keep an outer torch.compile out of ``function``; the steps inside compile on their own.

    That is ``torch.compiler.disable``, applied on the first call: applied here it would import dynamo with the package.
    """
    disabled: list[Callable] = []

    @functools.wraps(function)
    def door(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" not in sys.modules or _INSIDE.get():  # nobody is compiling, or an outer door is closed
            return function(*args, **kwargs)
        if not disabled:
            disabled.append(torch.compiler.disable(function))
        token = _INSIDE.set(True)
        try:
            return disabled[0](*args, **kwargs)
        finally:
            _INSIDE.reset(token)

    door._torchdynamo_disable = True  # type: ignore[attr-defined]
    return cast(F, door)


def compiled_step(
    factory: Callable[..., Callable], bound: tuple, key: Hashable, device: torch.device, rows_vary: bool = False
) -> Step:
    """The step ``factory(*bound)``, compiled once for ``(factory, key)``.

    Args:
        factory: a module-level function that returns the step.
        bound: what the step closes over.
        key: everything besides tensor contents that the step depends on, ``bound`` included, hashable.
        device: where the step runs.
        rows_vary: the first dimension of its tensors is dynamic from the start: one graph instead of two.
    """
    entry = (factory, key, device.type)
    if entry not in _STEPS:
        _STEPS[entry] = Step(factory(*bound), device.type, rows_vary)
    return _STEPS[entry]


def clear() -> None:
    """Forget all compiled steps and warnings (for tests)."""
    _STEPS.clear()
    _BROKEN.clear()
    _WARNED.clear()


class Step:
    """A compiled function that runs eagerly, after one warning, where it cannot be compiled."""

    def __init__(self, function: Callable, device_type: str, rows_vary: bool = False) -> None:
        code = function.__code__
        function.__code__ = code.replace(co_name=f"{code.co_name}_{len(_STEPS)}")
        self.eager = function
        self.device_type = device_type
        self.rows_vary = rows_vary
        self.compiled: Callable | None = None
        self.failed = False

    def __call__(self, *args: Any) -> Any:
        if self.failed or self.device_type in _BROKEN:
            return self.eager(*args)
        if self.compiled is None:
            options = _inductor_options() if self.device_type == "cuda" and BACKEND == "inductor" else None
            self.compiled = torch.compile(self.eager, fullgraph=True, backend=BACKEND, options=options)
            if self.rows_vary:
                _mark_rows(args)
        try:
            return self.compiled(*args)
        except _compile_errors() as error:
            failure = error
        # Run first, warn after: where the eager step fails too, the user reads that plain error alone.
        result = self.eager(*args)
        self.failed = True
        self._explain(failure)
        return result

    def _explain(self, error: BaseException) -> None:
        told = f"{error.__cause__ or ''}\n{error}"  # the cause, where there is one, says more
        lines = [line.strip() for line in told.splitlines() if line.strip()]
        reason = " ".join(lines[:2]) or type(error).__name__
        if NO_COMPILER.search(f"{type(error).__name__}: {told}"):
            _BROKEN.add(self.device_type)
            warn_once(
                f"torch.compile does not work on this machine's {self.device_type} device ({reason}): chunk steps run "
                "uncompiled, with the same numbers but slower and with more memory"
            )
        else:
            warn_once(f"a chunk step could not be compiled and runs eagerly, slower ({reason})")


def _inductor_options() -> dict[str, Any]:
    import torch._inductor.config as config

    return {name: value for name, value in RECOMPUTE.items() if hasattr(config, name)}


def _mark_rows(args: tuple[Any, ...]) -> None:
    import torch._dynamo as dynamo

    for arg in args:
        if isinstance(arg, torch.Tensor) and arg.dim() and len(arg) > 1:
            dynamo.maybe_mark_dynamic(arg, 0)


def _compile_errors() -> tuple[type[BaseException], ...]:
    import torch._dynamo.exc as dynamo
    import torch._inductor.exc as inductor

    return (
        dynamo.TorchDynamoException,
        dynamo.FailOnRecompileLimitHit,
        inductor.InductorError,
        inductor.InvalidCxxCompiler,
    )
