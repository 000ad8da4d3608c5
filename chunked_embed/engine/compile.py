"""Compiled functions, and where nothing can be compiled.

Dynamo counts recompilations per *code object* and silently runs uncompiled past a limit, so every function gets a code
object of its own. A column count that changes is made dynamic by dynamo the second time.

What takes seconds is said when it is done, once for each loss and kind of step: a warning of
``logging.getLogger("chunked_embed")``, which shows on stderr unless logging is told otherwise.

Uncompiled, for one call alone: under a dispatch mode (a counter of FLOPs, fake tensors), where dynamo is disabled, and
in a first call under saved-tensor hooks. Where nothing can be compiled at all, uncompiled after one warning.
"""

from __future__ import annotations

import functools
import itertools
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from time import perf_counter
from typing import Any, TypeVar, cast

import torch

logger = logging.getLogger("chunked_embed")

F = TypeVar("F", bound=Callable)

_INSIDE: ContextVar[bool] = ContextVar("inside", default=False)
BROKEN: set[str] = set()  # device types on which nothing can be compiled: no C++ compiler, no Triton
_WARNED: set[str] = set()
_SAID: set[str] = set()
_SERIAL = itertools.count()
CACHES: list[Any] = [BROKEN, _WARNED, _SAID]
"""All that the process keeps; ``specialize.py`` adds its own."""

BACKEND = "inductor"
LONG = 1.0  # seconds of compiling that are worth a word
WITHOUT = (
    ". Other kinds of batches may take as long again, the next run less; compiled=False does without, slower and with "
    "more memory"
)
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
    if message not in _WARNED and len(_WARNED) < 1000:
        _WARNED.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=3)


def _tell(what: str, seconds: float) -> None:
    """Of several processes that compile the same, the first one speaks."""
    if seconds < LONG or what in _SAID or len(_SAID) >= 1000:
        return
    more = "" if _SAID else WITHOUT
    _SAID.add(what)
    if not (torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank()):
        logger.warning("chunked_embed compiled %s in %.1f s%s", what, seconds, more)


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


def clear() -> None:
    """Forget all compiled steps and warnings (for tests)."""
    for kept in CACHES:
        kept.clear()


# --- a compiled function ---------------------------------------------------------------------------------------------


class Failure(Exception):
    """A step could not be compiled; ``cause`` says why. Nothing of it has run."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(str(cause))
        self.cause = cause


class Compiled:
    """A function, compiled on its first call. Called, it runs uncompiled, after one warning, where that fails."""

    def __init__(self, function: Callable, device_type: str, what: str = "a chunk step") -> None:
        code = function.__code__
        function.__code__ = code.replace(co_name=f"{code.co_name}_{next(_SERIAL)}")
        self.function = function
        self.device_type = device_type
        self.what = what  # for a message
        self.compiled: Callable | None = None
        self.failed = False

    def __call__(self, *args: Any) -> Any:
        if self.failed or self.device_type in BROKEN or hindered(fresh=self.compiled is None):
            return self.function(*args)
        try:
            return self.attempt(args)
        except Failure as failure:
            cause = failure.cause
        # Run first, warn after: where the uncompiled step fails too, the user reads that plain error alone.
        result = self.function(*args)
        if not hindered(fresh=True):
            self.failed = True
            explain(cause, self.device_type)
        return result

    def attempt(self, args: tuple, dynamic: tuple[str, ...] = ()) -> Any:
        """Run it compiled, or raise a Failure. ``dynamic``: sources of integers that become symbols."""
        if self.compiled is not None:
            try:
                with _hooks_kept():
                    return self.compiled(*args)
            except _errors() as error:
                raise Failure(error) from None
        start = perf_counter()
        try:
            options = _inductor_options() if self.device_type == "cuda" and BACKEND == "inductor" else None
            compiled = torch.compile(self.function, fullgraph=True, backend=BACKEND, options=options)
            with _symbols(dynamic):
                result = compiled(*args)
        except _errors() as error:
            raise Failure(error) from None
        except OSError as error:  # a cache folder that cannot be made, raised as it is
            raise Failure(error) from None
        self.compiled = compiled
        _tell(self.what, perf_counter() - start)
        return result

    def serves(self, frame: Mapping[str, Any]) -> bool:
        """Whether what is compiled serves a frame with these local variables without compiling again."""
        try:
            from torch._dynamo.eval_frame import _debug_get_cache_entry_list

            found = _debug_get_cache_entry_list(cast(Any, self.function.__code__))
            free = dict(zip(self.function.__code__.co_freevars, self.function.__closure__ or (), strict=True))
            given = {**{name: cell.cell_contents for name, cell in free.items()}, **frame}
            return not found or any(cast(Any, entry).guard_manager.check(given) for entry in found)
        except (ImportError, AttributeError, TypeError, RuntimeError):
            return True  # dynamo's own; if it is not so, its limit of recompilations says it later


def hindered(fresh: bool) -> bool:
    """Whether a step cannot be compiled, or run compiled, in this call. ``fresh``: it would be compiled first."""
    if torch._C._len_torch_dispatch_stack():
        return True
    if fresh and _hooked():
        return True
    config = _dynamo_config()
    return config is None or config.disable


def _hooked() -> bool:
    """Saved-tensor hooks (offloading, checkpoints) are active: torch.func refuses those, in a trace as outside."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is not None and top(True) is not None


@functools.cache
def _dynamo_config() -> Any:
    """Dynamo's settings; None where it cannot even be imported, as where its cache folder cannot be made."""
    try:
        import torch._dynamo
        import torch._inductor.exc
    except Exception as error:
        warn_once(
            f"torch.compile does not work on this machine ({type(error).__name__}: {error}): chunk steps run "
            "uncompiled, with the same numbers but slower and with more memory"
        )
        return None
    return torch._dynamo.config


def explain(error: BaseException, device_type: str) -> None:
    told = f"{error.__cause__ or ''}\n{error}"  # the cause, where there is one, says more
    lines = [line.strip() for line in told.splitlines() if line.strip()]
    reason = " ".join(lines[:2]) or type(error).__name__
    causes = (error, error.__cause__, error.__context__, getattr(error, "inner_exception", None))
    if NO_COMPILER.search(f"{type(error).__name__}: {told}") or any(isinstance(e, OSError) for e in causes):
        BROKEN.add(device_type)
        warn_once(
            f"torch.compile does not work on this machine's {device_type} device ({reason}): chunk steps run "
            "uncompiled, with the same numbers but slower and with more memory"
        )
    else:
        warn_once(f"a chunk step could not be compiled and runs eagerly, slower ({reason})")


def _symbols(sources: tuple[str, ...]) -> AbstractContextManager:
    if not sources:
        return nullcontext()
    import torch.compiler.config as config

    known = [known for known in config.dynamic_sources.split(",") if known]
    return cast(Any, config).patch(dynamic_sources=",".join([*known, *sources]))


@functools.cache
def symbols_can_be_asked_for() -> bool:
    import torch.compiler.config as config

    return hasattr(config, "dynamic_sources")


@contextmanager
def _hooks_kept() -> Iterator[None]:
    """Whether saved-tensor hooks are allowed, as it was. ``torch.func.grad`` forbids them while it runs, and where it
    meets one as a step is traced for a new shape, it leaves them forbidden (torch 2.13)."""
    before = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message()
    try:
        yield
    finally:
        if torch._C._autograd._saved_tensors_hooks_get_disabled_error_message() != before:
            if before is None:
                torch._C._autograd._saved_tensors_hooks_enable()
            else:
                torch._C._autograd._saved_tensors_hooks_disable(before)


def _inductor_options() -> dict[str, Any]:
    import torch._inductor.config as config

    return {name: value for name, value in RECOMPUTE.items() if hasattr(config, name)}


@functools.cache
def _errors() -> tuple[type[BaseException], ...]:
    import torch._dynamo.exc as dynamo
    import torch._inductor.exc as inductor

    names = ("TorchDynamoException", "FailOnRecompileLimitHit", "InductorError", "InvalidCxxCompiler")
    return tuple(getattr(module, name) for module in (dynamo, inductor) for name in names if hasattr(module, name))
