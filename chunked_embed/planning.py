"""The plan of a loss from shapes alone, for ``python -m chunked_embed plan``: no tensor is there, nothing runs.

Tensors are torch's fake ones. The loss lays its call out as ever, for the device that is asked for
(``kernels.ELSEWHERE``), and the call ends there. What the engine would read from tensors (which rows are used, how long
segments are) is taken to be the plain case: all rows, segments of one length.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from . import checks, diagnose
from .chunking import Chunking
from .engine.pack import Selection
from .engine.plan import ChunkPlan, make_plan
from .kernels import ELSEWHERE
from .loss import LaidOut

__all__ = ["Problem", "names", "plain_bytes", "plan"]

MOST = 1 << 24  # of each size: a plan lists its chunks
TOKENS = 1024  # of a sequence, at most, unless the caller says how many sequences there are
RANKED = ("angle", "cosent")  # the plain way takes the differences of all scores


@dataclass(frozen=True)
class Problem:
    """Sizes of a call.

    Args:
        rows: tokens, or pairs of embeddings.
        width: of the hidden states or embeddings.
        columns: rows of the weight: the vocabulary of an LM head, the outputs of a Dense layer under a loss of
            embeddings (None: there is none).
        sequences: completions among which the tokens are divided, for losses of preferences.
        frozen: the weight gets no gradient.
        precomputed: the reference's log-probabilities are there, and its hidden states are not.
    """

    rows: int
    width: int
    columns: int | None = None
    dtype: torch.dtype = torch.bfloat16
    sequences: int | None = None
    frozen: bool = False
    precomputed: bool = False

    def __post_init__(self) -> None:
        checks.integer("ROWS", self.rows, low=1, high=MOST)
        checks.integer("WIDTH", self.width, low=1, high=MOST)
        checks.integer_or_none("VOCABULARY", self.columns, low=1, high=MOST)
        checks.integer_or_none("--sequences", self.sequences, low=1)

    def empty(self, *shape: int, dtype: torch.dtype | None = None, learns: bool = False) -> Tensor:
        return torch.empty(*shape, dtype=dtype or self.dtype, requires_grad=learns)

    @property
    def weight(self) -> Tensor:  # (V, H)
        if self.columns is None:
            raise ValueError("expected ROWS WIDTH VOCABULARY for a loss of an LM head, got no VOCABULARY")
        return self.empty(self.columns, self.width, learns=not self.frozen)

    def batch(self, multiple: int) -> tuple[int, int]:  # (sequences, tokens of each)
        """Of ``sequences``, by default the fewest of up to 1024 tokens."""
        if self.sequences is not None:
            if self.sequences % multiple or self.rows % self.sequences:
                raise ValueError(
                    f"expected --sequences as a multiple of {multiple} that divides {self.rows} rows, "
                    f"got {self.sequences}"
                )
            return self.sequences, self.rows // self.sequences
        for n in range(multiple, self.rows + 1, multiple):
            if self.rows % n == 0 and self.rows // n <= TOKENS:
                return n, self.rows // n
        raise ValueError(f"expected ROWS for {multiple} sequences of one length or more, got {self.rows}")


# --- the losses that there are ---------------------------------------------------------------------------------------


def _functions() -> dict[str, Callable[..., Any]]:
    from . import functional, linear_logps

    found = {name: getattr(functional, name) for name in functional.__all__}
    of_tokens = "splade_pool", "xtr_scores", "max_sim", "max_sim_pairs", "max_sim_info_nce"
    others = "cosent_from_scores", *of_tokens  # which the engine does not lay out
    plain = {n: f for n, f in found.items() if inspect.isfunction(f) and n not in others}
    return {"linear_logps": linear_logps, **plain}


def _family(name: str) -> ModuleType:
    """One of the other packages."""
    if (said := diagnose.astray(name)) is not None:
        raise ImportError(said)
    return importlib.import_module(name)


def _preferences() -> dict[str, type]:
    alignment = _family("alignment")
    found = [getattr(alignment, name) for name in alignment.__all__]
    homes = "alignment.losses", "alignment.grpo"
    losses = [c for c in found if isinstance(c, type) and c.__module__ in homes and c is not alignment.PolicyLoss]
    return {c.__name__.removesuffix("Loss").lower(): c for c in losses}


def _divergences() -> tuple[str, ...]:
    return "cross_entropy", *_family("distill").DIVERGENCES, "topk"


def names() -> dict[str, tuple[str, ...]]:
    """What ``--loss`` may be, by the package that has it."""
    return {
        "chunked_embed": tuple(sorted(_functions())),
        "alignment": tuple(sorted(_preferences())),
        "distill": tuple(sorted(_divergences())),
    }


# --- a call of each --------------------------------------------------------------------------------------------------


def _of_embeddings(function: Callable[..., Any], told: str, p: Problem, options: Mapping[str, Any]) -> None:
    """A function of ``functional``, by the names of its arguments."""
    integers = "batch" in told  # labels are classes there, scores elsewhere
    parameters = inspect.signature(function).parameters
    arguments: dict[str, Any] = {}
    for name, parameter in parameters.items():
        if parameter.default is not parameter.empty or parameter.kind is parameter.VAR_KEYWORD:
            continue
        if name == "labels":
            arguments[name] = p.empty(p.rows, dtype=torch.int64 if integers else torch.float32)
        else:
            arguments[name] = p.empty(p.rows, p.width, learns=not name.startswith("guide_"))
    if p.columns is not None:
        if "weight" not in parameters:
            raise ValueError(f"expected ROWS WIDTH alone for {told}, which has no projection, got {p.columns} columns")
        arguments["weight"] = p.weight
    function(**arguments, **options)


def _of_preferences(cls: Any, p: Problem, options: Mapping[str, Any]) -> None:
    loss, parameters = cls(**options), inspect.signature(cls.prepare).parameters
    n, tokens = p.batch(getattr(loss, "completions", 1))
    target = p.empty(n, tokens, dtype=torch.int64)
    arguments: dict[str, Any] = {"hidden": p.empty(n, tokens, p.width, learns=True), "weight": p.weight}
    if "preference_labels" in parameters:
        arguments["preference_labels"] = p.empty(n, dtype=torch.bool)
    if "advantages" in parameters:
        arguments["advantages"] = p.empty(n, dtype=torch.float32)
    elif p.precomputed:
        arguments["ref_logps"] = p.empty(n, dtype=torch.float32)
    elif loss.takes_reference is not False:
        arguments |= {"ref_hidden": p.empty(n, tokens, p.width), "ref_weight": p.weight.detach()}
    arguments |= {name: p.empty(1, dtype=torch.float32) for name in loss.needed if name in loss.takes_numbers}
    loss.prepare(target=target, **arguments)


def _of_distillation(name: str, p: Problem, options: Mapping[str, Any]) -> None:
    distill = _family("distill")
    target, hidden = p.empty(p.rows, dtype=torch.int64), p.empty(p.rows, p.width, learns=True)
    if name == "topk":
        ids, logprobs = p.empty(p.rows, 32, dtype=torch.int64), p.empty(p.rows, 32, dtype=torch.float32)
        distill.TopKLoss(**options).prepare(hidden, p.weight, ids, logprobs, target)
    elif name == "cross_entropy":
        distill.DistillLoss([("ce", 1.0)], **options).prepare(hidden, p.weight, target=target)
    else:
        teacher = p.empty(p.rows, p.width), p.weight.detach()
        distill.DistillLoss([(name, 1.0)], **options).prepare(hidden, p.weight, *teacher, target)


def _call(name: str, p: Problem, options: Mapping[str, Any]) -> None:
    functions = _functions()
    if name == "linear_logps":
        target = p.empty(p.rows, dtype=torch.int64)
        functions[name](p.empty(p.rows, p.width, learns=True), p.weight, target, **options)
    elif name in functions:
        _of_embeddings(functions[name], name, p, options)
    elif name in _divergences():
        _of_distillation(name, p, options)
    elif name in _preferences():
        _of_preferences(_preferences()[name], p, options)
    else:
        known = [told for of_package in names().values() for told in of_package]
        near = get_close_matches(name, known, 1)
        raise ValueError(
            f"expected --loss to be one of {', '.join(known)}, got {name!r}"
            + (f" (did you mean {near[0]}?)" if near else "")
        )


# --- planning --------------------------------------------------------------------------------------------------------


@contextmanager
def _elsewhere(device: torch.device) -> Iterator[None]:
    """Tensors have no data, and calls of the engine stop once they are laid out for this device."""
    token = ELSEWHERE.set(device)
    try:
        with FakeTensorMode():
            yield
    finally:
        ELSEWHERE.reset(token)


def _plain_case(found: LaidOut) -> ChunkPlan:
    """Every row is used, segments are of one length."""
    layout = found.kind.layout
    n, per_group = layout.n_rows, layout.options.segments_per_group
    selection = found.kind.whole
    if found.in_segments:
        groups = layout.n_groups or n
        each = n // (groups * per_group)
        selection = Selection(n, groups, per_group, bounds=[each * i for i in range(groups * per_group + 1)])
    scores = found.wanted == "scores"
    row_wise, together = found.kind.form.kind == "loss", scores or layout.options.couples_batch
    only_score = partial(found.only_score, selection)
    made = make_plan(layout, selection, row_wise=row_wise, together=together, only_score=only_score)
    return replace(made, direct=layout.direct)


def plan(name: str, problem: Problem, device: torch.device | str, **options: Any) -> ChunkPlan:
    """What the first call of the engine by this loss will do.

    Args:
        name: of ``names()``.
        device: where it would run; it need not be here.
        options: ``chunk_size``, ``max_chunk_bytes``, ``compiled``, ``float32_outputs``.

    Raises:
        ValueError: a name that there is not, sizes that mean nothing, a loss that needs more than shapes.
    """
    stated = {key: value for key, value in Chunking(**options).keywords.items() if value != getattr(Chunking, key)}
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"expected a device of type cpu or cuda, got {device}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"expected a device of type cpu or cuda, got {device}")
    try:
        with _elsewhere(device):
            _call(name, problem, stated)
    except LaidOut as found:
        return _plain_case(found)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ValueError(
            f"expected a loss that shapes say enough of, got {name}, which reads its labels first"
        ) from error
    raise ValueError(f"expected a loss that calls the engine, got {name}, which has no large tensor")


def plain_bytes(name: str, plan: ChunkPlan) -> int:
    """What plain PyTorch holds at once: the outputs whole in float32, and their gradient."""
    outputs = plan.rows * sum(spec.width for spec in plan.layout.formed)
    ranked = plan.rows**2 if name in RANKED else 0
    return 8 * (outputs + ranked)
