"""``FlexChunkLoss``: the base class in front of the engine. A subclass states its functions and its numbers."""

from __future__ import annotations

import math
from collections import namedtuple
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from .autograd import ChunkedLoss, ChunkedScores
from .compile import outside_compile
from .passes import as_metrics, group_counts, narrowed
from .plan import ChunkPlan, Settings, make_plan
from .problem import Problem, build
from .select import select
from .steps import Elements, Function, Named, PlainScore, RowLoss, RowStep, Score, split_metrics, weighted
from .types import LossOutput, Projections, Tensors, is_number
from .walk import Call, GroupLoss, Unit, make_runner

NO_OPTIONS = frozenset(
    ("chunk_size", "max_chunk_bytes", "compiled", "training", "call_super_init", "dump_patches")
)  # attributes that a loss function does not see


class FlexChunkLoss(nn.Module):
    """A loss over ``outputs = input @ weight.T + bias`` that never holds the outputs whole.

    **Row-wise**: override ``loss_fn(self, outputs, rows, hp)`` and return one value per row ``(R,)``, or that and a
    dict of per-row metrics. The loss is ``sum(row_weight * values)``, by default their mean.

    **Grouped**: override ``score_fn(self, outputs, rows, hp) -> {name: (R,)}`` too. The engine adds scores up per
    segment, and ``loss_fn(self, scores, groups, hp)`` gets ``{name: (G, segments)}`` (with ``"count"``, the rows of
    each segment) and returns ``(G,)``, or that and a dict of per-group metrics.

    ``outputs`` are ``(R, V)`` in float32 (float64 for float64 inputs), or a dict of those where several projections are
    given. ``rows`` holds the chunk's rows of the row arguments. ``hp`` holds the loss's numbers: every float or int
    attribute of the instance, as a 0-d float64 tensor, so that a changing number recompiles nothing; write
    ``hp.margin``, not ``self.margin``. Strings, booleans, None and tuples are static, and so is what ``static_numbers``
    names: read them from ``self``. Where
    column arguments are given, the functions get them as a keyword: ``loss_fn(self, outputs, rows, hp, columns)``.

    Without subclassing, ``FlexChunkLoss(my_loss_fn, margin=0.5)`` takes plain functions (without ``self``); define them
    once, at module level: a new function object compiles anew.

    Example:
        >>> class MarginLoss(FlexChunkLoss):
        ...     def __init__(self, margin=1.0, **options):
        ...         super().__init__(**options)
        ...         self.margin = margin
        ...     def loss_fn(self, outputs, rows, hp):
        ...         index = torch.arange(outputs.shape[1], device=outputs.device)
        ...         is_target = index == rows["target"][:, None]
        ...         target = torch.where(is_target, outputs, 0).sum(1, keepdim=True)
        ...         return torch.where(is_target, 0, (hp.margin + outputs - target).relu()).mean(1)
        >>> hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4)
        >>> loss = MarginLoss(0.5, compiled=False)
        >>> loss(Projection(hidden, weight), rows={"target": torch.arange(6)}).loss.backward()
        >>> hidden.grad.shape
        torch.Size([6, 4])

    Args:
        loss_fn, score_fn: plain functions, instead of overriding the methods.
        chunk_size: rows per chunk; without it they follow from ``max_chunk_bytes``.
        max_chunk_bytes: a chunk's budget. Without one: on a GPU as much as the gradients and their float32 sums take,
            between 512 MiB and 1.25 GiB; on a CPU 128 MiB; or one chunk, where that takes no more than several.
        compiled: compile the chunk steps. False gives the same numbers, slower and with more memory.
        numbers: further attributes, with plain functions.

    A value depends on its own row alone (a group's on its own group), unless ``couples_batch``: which rows share a
    chunk is the plan's business. Functions leave their outputs as they are (no in-place operations).
    """

    segments_per_group: ClassVar[int] = 1
    """Segments whose scores a group's loss sees: 2 for pairs."""
    couples_batch: ClassVar[bool] = False
    """The loss sorts or averages over the batch: all scores first, the loss once over all groups, then every chunk
    again. ``loss_fn`` may then return a scalar."""
    separate_outputs: ClassVar[bool] = False
    """Score each projection on its own (policy, then reference, through one buffer); ``scores[projection][name]``."""
    float32_outputs: bool = False
    """Half-precision products write float32 outputs: for divergences between close distributions."""
    index_rows: tuple[str, ...] = ()
    """Row arguments that index the columns: checked to lie in [0, V) on used rows."""
    row_totals: ClassVar[Mapping[str, str]] = {}
    """Further scores: name -> "logsumexp" or "sum" over the columns of ``element_fn``'s elements. Their gradient takes
    no second reduction, so that it is one elementwise pass."""
    column_totals: ClassVar[Mapping[str, str]] = {}
    """Column scores ``(V,)``: name -> "logsumexp" or "sum" over all rows. Needs ``couples_batch``."""
    static_numbers: ClassVar[tuple[str, ...]] = ()
    """Numbers that a formula is built on (a count of blocks, say): read from ``self``, and compiled in."""
    static_widths: bool = False
    """Compile anew for each width of narrow outputs: for formulas that cut a row at a fraction of its width, which do
    not fuse when the width is dynamic."""
    workspace_bytes: int = 0
    """Bytes per output that a step needs beyond the outputs (a sort index: 8); counts against the chunk budget."""

    def __init__(
        self,
        loss_fn: Callable | None = None,
        score_fn: Callable | None = None,
        *,
        chunk_size: int | None = None,
        max_chunk_bytes: int | None = None,
        compiled: bool = True,
        **numbers: Any,
    ) -> None:
        super().__init__()
        self.chunk_size = chunk_size
        self.max_chunk_bytes = max_chunk_bytes
        self.compiled = compiled
        self._functions = {"loss_fn": loss_fn, "score_fn": score_fn}
        for name, function in self._functions.items():
            _refuse_learnable_closure(name, function)
        given = loss_fn is not None or score_fn is not None
        for name, value in numbers.items():
            if not given or hasattr(self, name):
                raise TypeError(f"{type(self).__name__} has no option {name!r}, got {name}={value!r}")
            setattr(self, name, value)
        self._settings()

    # --- what a subclass states ---

    def loss_fn(self, outputs: Any, rows: Any, hp: Any) -> Any:
        raise NotImplementedError(
            f"{type(self).__name__} has no loss_fn: override it, or give one to FlexChunkLoss(...)"
        )

    score_fn: Callable | None = None
    element_fn: Callable | None = None
    """``element_fn(self, outputs, rows, hp) -> {name: (R, V)}``, a name for each of the totals."""

    # --- running it ---

    @outside_compile
    def forward(
        self,
        projections: Projections,
        rows: Tensors | None = None,
        *,
        columns: Tensors | None = None,
        row_weight: Tensor | None = None,
        groups: Tensors | None = None,
        segments: Tensor | None = None,
        group_weight: Tensor | None = None,
        numbers: Mapping[str, Tensor] | None = None,
    ) -> LossOutput:
        """Loss and metrics; gradients for every tensor that requires one.

        Args:
            projections: a Projection, or a dict of them by name.
            rows: tensors ``(M, ...)`` aligned with the rows.
            columns: tensors ``(V, ...)`` aligned with the outputs' columns; their gradients accumulate in float32.
            row_weight: ``(M,)``, of row-wise losses; 1/M by default, and zero drops the row before any product.
            groups: tensors ``(G, ...)`` aligned with the groups.
            segments: ``(M,)`` integers, of grouped losses: segment ``g * segments_per_group + k`` is the k-th of group
                g; a negative id drops the row. Without it every row is a group of its own.
            group_weight: ``(G,)``, 1/G by default.
            numbers: further 0-d tensors for ``hp`` (a running mean, say), without gradient.

        Raises:
            TypeError: dtypes that differ without autocast, arguments that are not tensors.
            ValueError: shapes, devices, indices or weights that do not fit, and numbers that are NaN.
        """
        call, group_tensors = self._prepare(
            projections, rows, columns, row_weight, groups, segments, group_weight, numbers
        )
        if call.plan.deferred and call.row_loss is None:
            return self._coupled(call, group_tensors)
        loss = ChunkedLoss.apply(call, *call.problem.release(), *group_tensors.values())
        return LossOutput(cast(Tensor, loss), call.metrics)

    def plan(self, projections: Projections, rows: Tensors | None = None, **arguments: Any) -> ChunkPlan:
        """What ``forward`` with the same arguments will do: print it before running."""
        names = ("columns", "row_weight", "groups", "segments", "group_weight", "numbers")
        unknown = set(arguments) - set(names)
        if unknown:
            raise TypeError(f"expected arguments of forward, got {sorted(unknown)}")
        call, _ = self._prepare(projections, rows, **arguments)
        return call.plan

    @outside_compile
    def scores(
        self,
        projections: Projections,
        rows: Tensors | None = None,
        *,
        columns: Tensors | None = None,
        segments: Tensor | None = None,
        row_weight: Tensor | None = None,
        numbers: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """The scores alone, differentiable, for code of your own behind them; backward forms the outputs again.

        Each is shaped like the rows, or ``(G, segments)`` where ``segments`` are given, or ``(V,)`` for column scores.
        With ``separate_outputs`` their names are ``"projection/score"``. ``row_weight`` zero drops a row (its score is
        zero); other values of it count for nothing.
        """
        call, _ = self._prepare(
            projections,
            rows,
            columns,
            row_weight=row_weight,
            segments=segments,
            numbers=numbers,
            scores_only=True,
        )
        results = {}
        for key, name, value in self._walk(call):
            by_row = key is not None and call.selection.lengths is None
            label = f"{key}/{name}" if key is not None and self.separate_outputs else name
            results[label] = value.view(call.problem.leading) if by_row else value.to(call.problem.dtype)
        return results

    @staticmethod
    def _walk(call: Call) -> list[tuple[str | None, str, Tensor]]:
        results = cast(tuple, ChunkedScores.apply(call, *call.problem.release()))
        return [(key, name, value) for (key, name), value in zip(call.layout, results, strict=True)]

    def _coupled(self, call: Call, groups: Named) -> LossOutput:
        """All scores, then the loss once, as ordinary autograd; the scores' gradient walks over the chunks again."""
        assert call.group_loss is not None
        scores: dict[str | None, Named] = {}
        for key, name, value in self._walk(call):
            by_row = key is not None and call.selection.lengths is None
            scores.setdefault(key, {})[name] = value[:, None] if by_row else value
        columns = scores.pop(None, {})
        (block,) = call.plan.blocks
        counts = group_counts(call, block)
        given = call.group_loss.arrange(cast(dict, scores), call.units, counts) | columns
        with torch.autocast(call.problem.device.type, enabled=False):
            loss, metrics = call.group_loss.call(given, groups, call.hp)
            if loss.dim():
                loss = weighted(loss, call.group_loss.weight)
            elif call.group_loss.weighted:
                raise ValueError("expected no group_weight: loss_fn returned a scalar, one value for the whole batch")
        return LossOutput(narrowed(loss, call.problem.dtype), as_metrics(metrics, call.problem.dtype))

    # --- preparing a call ---

    def _settings(self) -> Settings:
        return Settings(self.chunk_size, self.max_chunk_bytes, self.compiled, self.workspace_bytes)

    def _prepare(
        self,
        projections: Projections,
        rows: Tensors | None,
        columns: Tensors | None = None,
        row_weight: Tensor | None = None,
        groups: Tensors | None = None,
        segments: Tensor | None = None,
        group_weight: Tensor | None = None,
        numbers: Mapping[str, Tensor] | None = None,
        scores_only: bool = False,
    ) -> tuple[Call, Named]:
        hp = self._numbers(numbers)
        settings = self._settings()
        problem = build(projections, rows, columns, torch.float32 if self.float32_outputs else None)
        grouped = self._function("score_fn") is not None
        if self.couples_batch and not grouped:
            raise ValueError(f"expected a score_fn: {type(self).__name__} couples the batch, through its rows' scores")
        if scores_only and segments is not None and row_weight is not None:
            raise ValueError("expected segments or a row_weight, got both: a negative segment drops a row")
        if scores_only and not grouped:
            raise ValueError(f"expected a score_fn: {type(self).__name__} is row-wise and has no scores")
        if grouped and not scores_only:
            _refuse(self, row_weight=row_weight)
        if not grouped:
            _refuse(self, groups=groups, segments=segments, group_weight=group_weight)
        if missing := [name for name in self.index_rows if name not in problem.rows]:
            raise ValueError(f"expected rows {missing} ({type(self).__name__}.index_rows), got {list(problem.rows)}")
        weight = _row_vector(problem, "row_weight", row_weight)
        if weight is not None:
            weight = weight.to(problem.dtype)
        group_tensors = dict(groups or {})
        n_groups = _group_count(problem, group_tensors, group_weight)
        if grouped and segments is None and n_groups not in (None, problem.n_rows):
            raise ValueError(f"expected group arguments for {problem.n_rows} rows (no segments given), got {n_groups}")
        if grouped and segments is None and self.segments_per_group != 1 and not scores_only:
            raise ValueError(f"expected segments: {type(self).__name__} has {self.segments_per_group} to a group")
        ids = _row_vector(problem, "segments", segments, integer=True)
        selection = select(
            problem,
            index_rows=self.index_rows,
            row_weight=weight,
            segments=ids,
            n_groups=n_groups,
            segments_per_group=self.segments_per_group,
        )
        units_of: list[tuple[str, ...]] = [tuple(problem.projections)]
        if self.separate_outputs:
            units_of = [(name,) for name in problem.projections]
        coupled = scores_only or (grouped and self.couples_batch)
        plan = make_plan(
            problem,
            selection,
            settings,
            units=units_of,
            coupled=coupled,
            grouped=grouped,
        )
        call = Call(problem, selection, plan, make_runner(plan, problem, self.static_widths), hp)
        if grouped:
            self._grouped(call, units_of, group_tensors, group_weight)
        else:
            if weight is None:
                weight = torch.full((problem.n_rows,), 1 / problem.n_rows, dtype=problem.dtype, device=problem.device)
            call.row_weight = weight
            call.row_loss = self._row_loss(call)
        return call, group_tensors

    def _grouped(self, call: Call, units_of: list[tuple[str, ...]], groups: Named, weight: Tensor | None) -> None:
        problem, n = call.problem, call.selection.n_groups
        call.units = [Unit(names, self._score(call, names), tuple(problem.rows)) for names in units_of]
        loss_fn = cast(Callable, self._function("loss_fn"))

        def checked(scores: dict[str, Any], given: Named, hp: NamedTuple) -> tuple[Tensor, Named]:
            loss, metrics = split_metrics(loss_fn(scores, given, hp))
            size = len(scores["count"])
            scalar = self.couples_batch and isinstance(loss, Tensor) and loss.dim() == 0
            if not isinstance(loss, Tensor) or not (scalar or tuple(loss.shape) == (size,)):
                got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
                raise ValueError(f"expected loss_fn to return one value per group, ({size},), got {got}")
            for name, value in metrics.items():
                if not self.couples_batch and (value.dim() == 0 or len(value) != size):
                    raise ValueError(f"expected metric {name!r} of shape ({size}, ...), got {tuple(value.shape)}")
            return loss, metrics

        grad = torch.is_grad_enabled()
        call.group_loss = GroupLoss(
            call=checked,
            groups=tuple(groups),
            weighted=weight is not None,
            weight=torch.full((n,), 1 / max(n, 1), dtype=problem.dtype, device=problem.device)
            if weight is None
            else weight.detach().to(problem.dtype),
            separate=self.separate_outputs,
            wanted=tuple(name for name, t in groups.items() if grad and t.requires_grad),
        )

    def _row_loss(self, call: Call) -> RowStep:
        """How the outputs become a row-wise loss; a loss with a kernel of its own overrides this."""
        problem = call.problem
        function = self._bind("loss_fn", problem)
        return RowLoss(call.runner, function, problem.wanting(problem.rows), problem.wanting(problem.columns))

    def _score(self, call: Call, names: tuple[str, ...]) -> Score:
        """How the outputs of these projections are scored; a loss with a kernel of its own overrides this."""
        problem = call.problem
        return PlainScore(
            call.runner,
            self._bind("score_fn", problem, single=problem.single or self.separate_outputs),
            self._elements(call),
            problem.wanting(problem.rows),
            problem.wanting(problem.columns),
        )

    def _elements(self, call: Call) -> Elements | None:
        totals = {**self.row_totals, **self.column_totals}
        if bool(totals) != (self.element_fn is not None) or set(totals.values()) - {"sum", "logsumexp"}:
            raise ValueError(
                'expected row_totals and column_totals to name "sum" or "logsumexp" for each element of element_fn, '
                f"got {dict(self.row_totals)} and {dict(self.column_totals)}"
            )
        if self.element_fn is None:
            return None
        if self.separate_outputs or (self.column_totals and not call.plan.deferred):
            raise ValueError("expected joint outputs with an element_fn, and couples_batch = True with column_totals")
        function = self._bind("element_fn", call.problem)
        return Elements(function, tuple(self.row_totals.items()), tuple(self.column_totals.items()))

    # --- functions, static options and numbers ---

    def _function(self, name: str) -> Callable | None:
        return self._functions.get(name) or getattr(self, name)

    def _bind(self, name: str, problem: Problem, single: bool | None = None) -> Function:
        """The function of a step: bound to a bare twin of this loss that holds the static options only, so that one
        compiled step serves every instance with the same options."""
        single = problem.single if single is None else single
        given = self._functions.get(name)
        if given is not None:
            return Function(given, (name, given), single, bool(problem.columns))
        static = {k: v for k, v in self._attributes().items() if not self._changes(k, v)}
        static["training"] = self.training
        statics = tuple(sorted(static.items(), key=lambda item: item[0]))
        try:
            hash(statics)
        except TypeError:
            unhashable = [k for k, v in statics if not _hashable(v)]
            raise TypeError(
                f"expected hashable attributes on {type(self).__name__} (tuples, not lists), got {unhashable}"
            ) from None
        twin = _twin(cast(Any, type(self)), statics)
        return Function(getattr(twin, name), (type(self), name, statics), single, bool(problem.columns))

    def _attributes(self) -> dict[str, Any]:
        return {
            name: value
            for name, value in self.__dict__.items()
            if not (name.startswith("_") or name in NO_OPTIONS or isinstance(value, Tensor))
        }

    def _changes(self, name: str, value: Any) -> bool:
        """A number that goes to ``hp`` and recompiles nothing, or a static option."""
        return is_number(value) and name not in self.static_numbers

    def _numbers(self, further: Mapping[str, Tensor] | None) -> NamedTuple:
        values: dict[str, Tensor] = {}
        for name, value in self._attributes().items():
            if not is_number(value):
                continue
            if math.isnan(value):
                raise ValueError(f"expected {type(self).__name__}.{name} to be a number, got NaN")
            if name not in self.static_numbers:
                values[name] = _number(name, float(value))
                if values[name]._version:
                    _NUMBERS.clear()
                    raise RuntimeError(f"expected loss_fn and score_fn to leave hp alone, got {name} changed in place")
        for name, tensor in (further or {}).items():
            if not isinstance(tensor, Tensor) or tensor.dim() or tensor.requires_grad:
                raise ValueError(
                    f"expected numbers[{name!r}] to be a 0-d tensor without gradient (a learnable scalar goes through "
                    f"a row or column argument, or multiplies the input outside), got {tensor!r}"
                )
            if name in values:
                raise ValueError(f"expected numbers beside the loss's own, got {name!r}: set the attribute instead")
            values[name] = tensor
        return _hp_type(tuple(sorted(values)))(**values)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if self.__dict__.get("_is_twin"):
                raise AttributeError(
                    f"{type(self).__name__} has no static option {name!r} inside a chunk step: read numbers from hp "
                    f"(hp.{name}), and pass tensors as rows, columns, groups or numbers"
                ) from None
            raise


def _refuse_learnable_closure(name: str, function: Callable | None) -> None:
    """A tensor that a plain function closes over would get no gradient."""
    for cell in getattr(function, "__closure__", None) or ():
        held = cell.cell_contents
        if isinstance(held, nn.Module) or (isinstance(held, Tensor) and held.requires_grad):
            raise ValueError(
                f"expected {name} to take what learns as a row, column or group argument, got a closure over a "
                f"{type(held).__name__}, which would have no gradient"
            )


_NUMBERS: dict[tuple[str, float], Tensor] = {}


def _number(name: str, value: float) -> Tensor:
    """A number of ``hp``. Kept: a loss with ten of them would spend a tenth of a millisecond a call on making them.

    By name too: a tensor that is two arguments of a compiled step makes dynamo compile anew.
    """
    if (name, value) not in _NUMBERS:
        if len(_NUMBERS) >= 1024:
            _NUMBERS.clear()
        with torch.inference_mode(False):  # else it would be no good outside of the first caller's inference mode
            made = torch.tensor(value, dtype=torch.float64, device="cpu")
        if type(made) is not Tensor:  # of a mode that fakes tensors
            return made
        _NUMBERS[name, value] = made
    return _NUMBERS[name, value]


def _hashable(value: object) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


@cache
def _hp_type(names: tuple[str, ...]) -> Any:
    return namedtuple("hp", names)


@cache
def _twin(cls: type[FlexChunkLoss], statics: tuple[tuple[str, Any], ...]) -> FlexChunkLoss:
    """A bare instance that knows the static options and nothing else."""
    twin = cls.__new__(cls)
    nn.Module.__init__(twin)
    twin.__dict__.update(statics, _is_twin=True, _functions={})
    return twin


def _refuse(loss: FlexChunkLoss, **arguments: object) -> None:
    kind = "row-wise" if "groups" in arguments else "grouped"
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(f"expected no {name}: {type(loss).__name__} is {kind}")


def _row_vector(problem: Problem, name: str, given: Tensor | None, integer: bool = False) -> Tensor | None:
    """A user's (M,) vector, flattened; it takes no gradient."""
    if given is None:
        return None
    if not isinstance(given, Tensor):
        raise TypeError(f"expected {name} to be a tensor, got {type(given).__name__}")
    if tuple(given.shape) != problem.leading:
        raise ValueError(f"expected {name} of shape {problem.leading}, got {tuple(given.shape)}")
    if given.device != problem.device:
        raise ValueError(f"expected {name} on {problem.device}, got {given.device}")
    if integer and (given.is_floating_point() or given.dtype == torch.bool):
        raise TypeError(f"expected {name} to hold integers, got {given.dtype}")
    if given.requires_grad:
        raise ValueError(f"expected {name} without gradient; a weight that learns is a row argument of loss_fn")
    flat = given.reshape(-1)
    return flat.long() if integer else flat


def _group_count(problem: Problem, groups: Named, weight: Tensor | None) -> int | None:
    counts = {}
    for name, given in (groups | ({} if weight is None else {"group_weight": weight})).items():
        if not isinstance(given, Tensor):
            raise TypeError(f"expected groups[{name!r}] to be a tensor, got {type(given).__name__}")
        if given.dim() == 0 or len(given) == 0:
            raise ValueError(f"expected groups[{name!r}] of shape (G, ...), got {tuple(given.shape)}")
        if given.device != problem.device:
            raise ValueError(f"expected groups[{name!r}] on {problem.device}, got {given.device}")
        counts[name] = len(given)
    if len(set(counts.values())) > 1:
        raise ValueError(f"expected group arguments of one length, got {counts}")
    if weight is not None and (weight.requires_grad or weight.dim() != 1):
        raise ValueError(f"expected group_weight (G,) without gradient, got {tuple(weight.shape)}")
    if weight is not None and not bool(torch.isfinite(weight).all()):
        raise ValueError("expected finite group weights, got NaN or infinity")
    return next(iter(counts.values()), None)
