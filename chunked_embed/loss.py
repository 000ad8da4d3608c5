"""``FlexChunkLoss``: the class in front of the engine. A subclass states its functions and its numbers."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from . import checks
from .chunking import NAMES, Chunking
from .engine.autograd import ChunkedLoss, ChunkedScores, ScoreName, with_gradients
from .engine.call import Arguments, read, refuse_transforms, signature
from .engine.compile import outside_compile
from .engine.direct import Direct
from .engine.formula import BASES, INTERNAL, Formula, attribute, keywords
from .engine.functions import Form, FunctionStep, Totals
from .engine.layout import Layout, Options, build, choose
from .engine.losses import GroupLoss, RowLoss, as_metrics, mean_or_weighted, rows_of_segments
from .engine.pack import Selection, select
from .engine.plan import ChunkPlan, make_plan
from .engine.recall import KINDS, Kind, Recall, Standing, learns
from .engine.sample import differentiable, look_at
from .engine.step import Step
from .engine.sweep import Call
from .engine.types import LossOutput, Named, Projections, Tensors
from .engine.values import Alive, out_of_inference
from .kernels import ELSEWHERE
from .signatures import with_arguments_of

OPTIONS = (
    *NAMES,
    "ignore_index",
    "segments_per_group",
    "couples_batch",
    "separate_outputs",
    "static_widths",
    "workspace_bytes",
)


class FlexChunkLoss(nn.Module):
    """A loss over ``outputs = input @ weight.T + bias`` that never holds the outputs whole.

    **Row-wise**: override ``loss_fn(self, outputs, rows)`` and return one value per row ``(R,)``, or that and a dict of
    per-row metrics. The loss is ``sum(row_weight * values)``, by default their mean.

    **Grouped**: override ``score_fn(self, outputs, rows) -> {name: (R,)}`` too. The engine adds scores up per segment,
    and ``loss_fn(self, scores, groups)`` gets ``{name: (G, segments)}`` (with ``"count"``, the rows of each segment)
    and returns ``(G,)``, or that and a dict of per-group metrics.

    ``outputs`` are ``(R, V)`` in float32 (float64 for float64 inputs), or a dict of those where several projections are
    given. ``rows`` holds the chunk's rows of the row arguments. Where column arguments are given, the functions get
    them as a keyword: ``loss_fn(self, outputs, rows, columns)``. ``self`` is a snapshot of the loss as it was when it
    was called: its attributes are read as usual, and what is written to it is lost. An attribute that changes between
    calls counts from the next call on; a number that changes does not compile anew for each value.

    Without subclassing, ``FlexChunkLoss(my_loss_fn, margin=0.5)`` takes plain functions, which get the numbers by
    keyword: ``my_loss_fn(outputs, rows, margin)``. Define them once, at module level: a new function compiles anew.

    Example:
        >>> import torch
        >>> from chunked_embed import FlexChunkLoss, Projection
        >>> class MarginLoss(FlexChunkLoss):
        ...     def __init__(self, margin=1.0, **options):
        ...         super().__init__(**options)
        ...         self.margin = margin
        ...     def loss_fn(self, outputs, rows):
        ...         index = torch.arange(outputs.shape[1], device=outputs.device)
        ...         is_target = index == rows["target"][:, None]
        ...         target = torch.where(is_target, outputs, 0).sum(1, keepdim=True)
        ...         return torch.where(is_target, 0, (self.margin + outputs - target).relu()).mean(1)
        >>> hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4)
        >>> target = torch.tensor([0, 1, 2, 3, -100, -100])  # the last two count for nothing
        >>> loss = MarginLoss(0.5)
        >>> loss(Projection(hidden, weight), rows={"target": target}).loss.backward()
        >>> hidden.grad.shape
        torch.Size([6, 4])

    Args:
        loss_fn, score_fn, element_fn: plain functions, instead of overriding the methods.
        chunk_size: rows per chunk; without it they follow from ``max_chunk_bytes``.
        max_chunk_bytes: a chunk's budget. Without one: on a GPU as much as the gradients and their float32 sums take,
            between 512 MiB and 1.25 GiB, and beyond that 2048 rows in 2.5 GiB or 4096 in 1 GiB; on a CPU 128 MiB. One
            chunk, where that takes no more than several, or 1 GiB on a GPU. A chunk grows to hold the longest group, up
            to 2.5 GiB (256 MiB).
        compiled: compile the steps. None: where the problem is large enough for it to pay. False gives the same
            numbers, slower and with more memory.

            A small problem (outputs of up to 32 MiB in float32 on a GPU, 16 MiB on a CPU) goes a direct way unless one
            of these three is given: whole, by ordinary autograd, with nothing to plan or compile; docs/design.md says
            more.
        float32_outputs: products of half-precision operands write float32 outputs. False: in the operands' dtype, for
            up to a fifth less time and half of a chunk's memory; what follows is as wrong as that rounding. Outputs of
            bfloat16 are right to 0.4% of themselves: a margin between log-probabilities of a policy and a reference
            near it is off by a fifth to a half, the gradient of a softmax over near duplicates at a scale of 100 by 5
            to 10%.
            Float16 has an eighth of those errors, and infinity above 65,504.
        targets: names of row arguments that index the outputs' columns; or a dict that says of which projection. Rows
            whose target is ``ignore_index`` are dropped before any product, and all other targets must lie in [0, V).
            (A dropped row that is a group of its own has scores of zero and a ``"count"`` of zero: one that couples the
            batch looks at that.)
            By default ``"target"`` is one, where that holds one integer a row; under another name, ``ignore_index``
            among integers brings a warning.
        ignore_index: the target of rows that count for nothing.
        segments_per_group: segments whose scores a group's loss sees: 2 for pairs.
        couples_batch: the loss sorts or averages over the batch: all scores first, the loss once over all groups, then
            every chunk again. ``loss_fn`` may then return a scalar. Dropped rows are among the scores, as zeros: where
            ``scores["count"]`` is zero there is none.
        separate_outputs: score each projection on its own (policy, then reference, through one buffer), under
            ``self.projection``, its name; the loss sees ``scores[projection][name]``.
        row_totals: further scores, name -> "logsumexp" or "sum" over the columns of what ``element_fn(self, outputs,
            rows) -> {name: (R, V)}`` returns. Their gradient takes no second reduction: one elementwise pass.
        column_totals: column scores ``(V,)``, name -> "logsumexp" or "sum" over all rows. Needs ``couples_batch``.
        static_widths: compile anew for each width of narrow outputs: for formulas that cut a row at a fraction of its
            width, which do not fuse when the width is dynamic.
        workspace_bytes: per output, that a step needs beyond the outputs (a sort index: 8).
        gradient_size: about how large the gradient of a value by an output is, where that is far from one: 1/V of a
            mean over V outputs. Float16 gradients are brought near one by it, and by the weights; without it those of
            such a mean are denormal, and off by 5% at V = 20,000. A size that is 60,000 times too small overflows.
        numbers: further attributes, with plain functions.

    A value depends on its own row alone (a group's on its own group), unless ``couples_batch``: which rows share a
    chunk is the plan's business. Functions leave their outputs as they are (no in-place operations), and what learns is
    an argument: a row, column or group argument, or part of a projection.

    Raises:
        TypeError, ValueError: options that mean nothing.
    """

    def __init__(
        self,
        loss_fn: Callable | None = None,
        score_fn: Callable | None = None,
        element_fn: Callable | None = None,
        *,
        chunk_size: int | None = None,
        max_chunk_bytes: int | None = None,
        compiled: bool | None = None,
        float32_outputs: bool = True,
        targets: tuple[str, ...] | Mapping[str, str] | None = None,
        ignore_index: int = -100,
        segments_per_group: int = 1,
        couples_batch: bool = False,
        separate_outputs: bool = False,
        row_totals: Mapping[str, str] | None = None,
        column_totals: Mapping[str, str] | None = None,
        static_widths: bool = False,
        workspace_bytes: int = 0,
        gradient_size: float = 1.0,
        **numbers: Any,
    ) -> None:
        super().__init__()
        for name in ("targets", "row_totals", "column_totals", "gradient_size", *OPTIONS):
            if hasattr(type(self), name):
                raise TypeError(f"expected {name} as an argument of FlexChunkLoss.__init__, got a class attribute")
        self.chunk_size = chunk_size
        self.max_chunk_bytes = max_chunk_bytes
        self.compiled = compiled
        self.float32_outputs = float32_outputs
        self.targets = targets
        self.ignore_index = ignore_index
        self.segments_per_group = segments_per_group
        self.couples_batch = couples_batch
        self.separate_outputs = separate_outputs
        self.row_totals = dict(row_totals or {})
        self.column_totals = dict(column_totals or {})
        self.static_widths = static_widths
        self.workspace_bytes = workspace_bytes
        self.gradient_size = checks.number("gradient_size", gradient_size, checks.POSITIVE)
        self._recall = Recall()
        given = {"loss_fn": loss_fn, "score_fn": score_fn, "element_fn": element_fn}
        self._functions = {name: f for name, f in given.items() if checks.function_or_none(name, f) is not None}
        for name, value in numbers.items():
            if not any(keywords(function, (name,)) for function in self._functions.values()):
                raise TypeError(f"{type(self).__name__} has no option {name!r}, got {name}={value!r}")
            if hasattr(self, name):
                raise TypeError(f"expected a number that is no option of FlexChunkLoss, got {name!r}")
        self._numbers = tuple(numbers)
        self.__dict__.update(numbers)
        self._options()

    # --- what a subclass states ---

    loss_fn: Callable
    score_fn: Callable | None = None
    element_fn: Callable | None = None
    projection: str
    """The projection that is being scored, with ``separate_outputs``."""

    def make_step(self, projections: tuple[str, ...]) -> Step | Sequence[Step] | None:
        """A step of your own for these projections, in the place of the functions: a kernel, say; or several, the best
        first. They are asked what they need, and the first that does not refuse is taken; else the functions run.
        Called on the snapshot of each call, so that they may take numbers along."""
        return None

    # --- running it ---

    @outside_compile
    def prepare(
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
    ) -> Prepared:
        """Loss and metrics; gradients for every tensor that requires one. (``prepare`` stops before the first product:
        it has the call's ``plan``, and ``run()``.)

        Args:
            projections: a Projection, or a dict of them by name.
            rows: tensors ``(M, ...)`` aligned with the rows.
            columns: tensors ``(V, ...)`` aligned with the outputs' columns; their gradients accumulate in float32.
            row_weight: ``(M,)``, of row-wise losses; by default 1 / used rows, and zero drops the row before any
                product.
            groups: tensors ``(G, ...)`` aligned with the groups.
            segments: ``(M,)`` integers, of grouped losses: segment ``g * segments_per_group + k`` is the k-th of group
                g; a negative id drops the row. Without it every row is a group of its own.
            group_weight: ``(G,)``, 1/G by default.
            numbers: 0-d tensors without gradient (a running mean, say) that the functions see as attributes of
                ``self``, in this call.

        Returns:
            ``loss``, ``metrics`` (a value a row or a group) and their ``means``: see ``LossOutput``.

        Raises:
            TypeError: dtypes that differ without autocast, arguments that are not tensors.
            ValueError: shapes, devices, targets or weights that do not fit, and numbers that are NaN.
        """
        weights = {"row_weight": row_weight, "segments": segments, "group_weight": group_weight}
        laid = self._lay_out(projections, rows, columns, groups, weights, numbers, "loss")
        layout, options, given = laid.kind.layout, laid.kind.layout.options, laid.weights
        row_wise = laid.kind.form.kind == "loss"
        selection = laid.select(rows_are_groups=not row_wise)
        loss: RowLoss | GroupLoss
        if row_wise:
            loss = RowLoss(_row_weight(layout, selection, given.get("row_weight")))
        else:
            loss = GroupLoss(
                loss_fn=laid.formula.bind(names=("loss_fn",)).loss_fn,
                weight=_group_weight(layout, selection, given.get("group_weight"), "segments" not in given),
                weighted="group_weight" in given,
                of_rows="segments" not in given,
                couples=options.couples_batch,
                by_unit=options.separate_outputs,
                groups=layout.groups,
            )
        call = laid.call(selection, row_wise=row_wise, together=options.couples_batch)
        self._look(laid, call, loss)
        watched = [(name, laid.tensors[i]) for name, i in layout.watched] + [*given.items()]
        versions = [(name, t, t._version) for name, t in watched if not t.is_inference()]
        return Prepared(call, loss, laid.tensors, versions)

    @outside_compile
    @with_arguments_of(prepare)
    def forward(self, *arguments: Any, **keywords: Any) -> LossOutput:
        return self.prepare(*arguments, **keywords).result()

    @with_arguments_of(prepare)
    def plan(self, *arguments: Any, **keywords: Any) -> ChunkPlan:
        """What ``forward`` with the same arguments will do: print it before running."""
        return self.prepare(*arguments, **keywords).plan

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
        """The scores alone, differentiable, for code of your own behind them; backward forms the outputs again,
        unless they are few.

        Each is shaped like the rows, or ``(G, segments)`` where ``segments`` are given, or ``(V,)`` for column scores.
        With ``separate_outputs`` their names are ``"projection/score"``. ``row_weight`` zero drops a row (its score is
        zero); other values of it count for nothing.
        """
        if segments is not None and row_weight is not None:
            raise ValueError("expected segments or a row_weight, got both: a negative segment drops a row")
        weights = {"row_weight": row_weight, "segments": segments}
        laid = self._lay_out(projections, rows, columns, None, weights, numbers, "scores")
        layout = laid.kind.layout
        call = laid.call(laid.select(rows_are_groups=False), row_wise=False, together=True)
        self._look(laid, call, None)
        with layout.no_autocast():
            found = call.scores() if isinstance(call, Direct) else score_rows(call, laid.tensors)
        results = {}
        for (label, name), value in found:
            told = f"{label}/{name}" if label is not None and layout.options.separate_outputs else name
            by_row = label is not None and value.dim() == 1
            results[told] = value.view(layout.leading) if by_row else value.to(layout.dtype)
        return results

    # --- preparing a call ---

    def _options(self) -> Options:
        """The engine's options as they are now; checked when they change."""
        targets = tuple(self.targets.items()) if isinstance(self.targets, Mapping) else self.targets
        given = (targets, *(getattr(self, name) for name in OPTIONS))
        if self._recall.options is None or self._recall.options[0] != given:
            options = dict(zip(OPTIONS, given[1:]))
            chunking = Chunking(*(options.pop(name) for name in NAMES))
            self._recall.options = given, Options(chunking, targets, **options)
        return self._recall.options[1]

    def _lay_out(
        self,
        projections: Projections,
        rows: Tensors | None,
        columns: Tensors | None,
        groups: Tensors | None,
        weights: Mapping[str, Tensor | None],
        numbers: Mapping[str, Tensor] | None,
        wanted: Literal["loss", "scores"],
    ) -> _Laid:
        """The kind of this call, its tensors, and the loss's functions as they are now."""
        refuse_transforms()
        standing = self._recall.standing
        told = signature(wanted, projections, (rows, columns, groups, numbers), weights)
        if told is not None and standing is not None and standing.holds(self):
            kind = standing.kinds.found(told[0])
            if kind is not None:
                formula = kind.formula(self, self._checked_numbers(numbers))
                made = {} if kind.steps is None else self._made(formula, kind.labels)
                if kind.steps is None or kind.steps == _keys(made):
                    return _Laid(kind, formula, *kind.arguments(told[1]), made)
        else:
            standing = None
        self._check_attributes()
        formula = Formula.snapshot(self, self._checked_numbers(numbers))
        arguments = read(projections, rows, columns, groups, weights)
        laid = self._lay_out_anew(arguments, told[1] if told else None, formula, wanted)
        if ELSEWHERE.get() is not None:
            raise LaidOut(laid.kind, wanted, "segments" in laid.weights, laid.only_score)
        if told is not None:
            standing = standing or Standing(self, formula, _OPTIONS)
            standing.kinds.keep(told[0], laid.kind, KINDS)
            self._recall.standing = standing
        return laid

    def _lay_out_anew(
        self, arguments: Arguments, given: list[Tensor] | None, formula: Formula, wanted: Literal["loss", "scores"]
    ) -> _Laid:
        """The layout of calls of this key, and what such a call needs beside it."""
        options = self._options()
        names = tuple(positions.name for positions in arguments.structure.projections)
        labels = {name: (name,) for name in names} if options.separate_outputs else {"/".join(names): names}
        made = self._made(formula, labels)
        grouped = formula.has("score_fn") or any(not step.row_wise for steps in made.values() for step in steps)
        if not grouped and (options.couples_batch or options.separate_outputs):
            option = "couples_batch" if options.couples_batch else "separate_outputs"
            raise ValueError(f"expected a score_fn with {option}, got {type(self).__name__}, which is row-wise")
        stated = formula.has("loss_fn") or formula.has("score_fn")
        if not stated and not all(made.values()):
            raise NotImplementedError(
                f"{type(self).__name__} has no loss_fn: override it, or give one to FlexChunkLoss(...)"
            )
        if wanted == "scores" and not grouped:
            raise ValueError(f"expected a score_fn: {type(self).__name__} is row-wise and has no scores")
        if wanted == "loss" and grouped and not formula.has("loss_fn"):
            raise NotImplementedError(f"{type(self).__name__} has scores but no loss_fn: override it, or give one")
        single = arguments.structure.single or options.separate_outputs
        form = Form("scores" if grouped else "loss", single, self._totals(formula))
        steps = _keys(made)
        device = ELSEWHERE.get()
        key = (arguments.key(), options, form, steps, device)
        layout = self._recall.layouts.found(key)
        if layout is None:
            layout = build(arguments, options, device)
            plain = FunctionStep(formula, form, options.static_widths)
            choose(layout, labels, made, dict.fromkeys(labels, plain))
            self._recall.layouts.keep(key, layout, KINDS)
        function = "score_fn" if grouped else "loss_fn"
        if len(layout.taken) < len(labels) and not formula.has(function):
            told = "; ".join(layout.refused)
            raise NotImplementedError(f"{type(self).__name__} has no {function} for where its step refuses: {told}")
        if wanted == "loss":
            _check_roles(type(self).__name__, layout, arguments.weights, grouped)
        has_steps = type(self).make_step is not FlexChunkLoss.make_step or "make_step" in vars(self)
        kind = Kind(arguments, given, formula, layout, form, labels, steps if has_steps else None)
        return _Laid(kind, formula, arguments.tensors, arguments.weights, made)

    def _made(self, formula: Formula, labels: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[Step, ...]]:
        """The loss's own steps for each unit, the best first."""
        return {label: _own_steps(formula, told) for label, told in labels.items()}

    def _check_attributes(self) -> None:
        for name, value in self.__dict__.items():
            if isinstance(value, float) and value != value:
                raise ValueError(f"expected {type(self).__name__}.{name} to be a number, got NaN")

    def _checked_numbers(self, further: Mapping[str, Tensor] | None) -> Mapping[str, Tensor]:
        for name, value in (further or {}).items():
            checks.tensor(f"numbers[{name!r}]", value, (), grad=False)
        return {name: out_of_inference(value) for name, value in (further or {}).items()}

    def _totals(self, formula: Formula) -> Totals:
        found = {**self.row_totals, **self.column_totals}
        if bool(found) != formula.has("element_fn") or set(found.values()) - {"sum", "logsumexp"}:
            raise ValueError(
                'expected row_totals and column_totals to name "sum" or "logsumexp" for each element of element_fn, '
                f"got {self.row_totals} and {self.column_totals}"
            )
        if found and self.separate_outputs:
            raise ValueError("expected joint outputs with an element_fn, got separate_outputs")
        if self.column_totals and not self.couples_batch:
            raise ValueError("expected couples_batch=True with column_totals, which run over all rows")
        return Totals(tuple(self.row_totals.items()), tuple(self.column_totals.items()))

    def _look(self, laid: _Laid, call: Direct | Call, loss: RowLoss | GroupLoss | None) -> None:
        """Look at the functions once: what learns but is no argument, and other things that would go wrong."""
        # Of fewer than two rows or groups there is less to see.
        sizes = min(call.selection.n_rows, 2), min(call.selection.n_groups, 2)
        if sizes in laid.kind.looked or torch._C._len_torch_dispatch_stack():  # FLOPs of the call are counted
            return
        layout, view, form = laid.kind.layout, laid.formula.view, laid.kind.form
        roles = tuple(layout.specs), tuple(layout.rows), tuple(layout.columns), tuple(layout.groups)
        # Functions that it is given, and what switches branches; numbers rarely do. And what learns by now.
        own = {**view.__dict__, **view._modules}
        called = tuple(Alive(v) if callable(v) else v for v in own.values() if callable(v) or type(v) in (bool, str))
        learning = learns([*own.values(), *view._parameters.values(), *self._functions.values()])
        steps = laid.steps()
        kinds = tuple(type(step) for step in steps.values())
        functions = tuple(f.key for f in laid.formulas.values())
        twice = form.kind == "scores" or (isinstance(call, Call) and call.plan.deferred)
        key = (functions, called, learning, form, roles, layout.wants_grad, loss is None, sizes, kinds, twice)
        if not self._recall.looked.found(key):
            look_at(laid.formulas, form, call, steps, laid.tensors, loss, twice)
            self._recall.looked.keep(key, True, KINDS)
        laid.kind.looked.add(sizes)

    # --- a module beside its caches ---

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_recall": Recall()}

    __getattr__ = attribute


BASES.add(FlexChunkLoss)
INTERNAL.update(("_functions", "_numbers", "_recall"))
_OPTIONS = frozenset(("row_totals", "column_totals", "targets", "gradient_size", *OPTIONS))


def _own_steps(formula: Formula, projections: tuple[str, ...]) -> tuple[Step, ...]:
    made = formula.view.make_step(projections)
    return () if made is None else (made,) if isinstance(made, Step) else tuple(made)


def _keys(made: Mapping[str, tuple[Step, ...]]) -> tuple[Hashable, ...]:
    return tuple([tuple([step.key for step in steps]) for steps in made.values()])


class LaidOut(Exception):
    """Where a call that is laid out for a device elsewhere ends: no value of a tensor was read."""

    def __init__(
        self,
        kind: Kind,
        wanted: Literal["loss", "scores"],
        in_segments: bool,
        only_score: Callable[[Selection], str | None],
    ) -> None:
        self.kind = kind
        self.wanted = wanted
        self.in_segments = in_segments
        self.only_score = only_score


class _Laid:
    """A call of a known kind."""

    def __init__(
        self,
        kind: Kind,
        formula: Formula,
        tensors: list[Tensor],
        weights: dict[str, Tensor],
        made: Mapping[str, Sequence[Step]],  # the loss's own steps, by unit
    ) -> None:
        self.kind = kind
        self.formula = formula
        self.made = made
        if kind.layout.options.separate_outputs:
            self.formulas = {label: formula.with_attributes({"projection": label}) for label in kind.labels}
        else:
            self.formulas = dict.fromkeys(kind.labels, formula)
        self.tensors = kind.layout.flat(tensors)  # as autograd sees them
        self.weights = weights

    def select(self, rows_are_groups: bool) -> Selection:
        layout = self.kind.layout
        weight, segments = self.weights.get("row_weight"), self.weights.get("segments")
        if weight is None and segments is None:
            if not layout.targets:
                return self.kind.whole
            if rows_are_groups:  # a row that is dropped leaves its group empty
                rows = torch.arange(layout.n_rows, device=layout.device)
                return select(layout, self.tensors, None, rows, layout.n_rows)
        weight = None if weight is None else weight.reshape(-1)
        segments = None if segments is None else segments.reshape(-1).long()
        return select(layout, self.tensors, weight, segments, layout.n_groups)

    def steps(self) -> dict[str, Step]:
        """Of each unit: its own, or plain functions."""
        kind, found = self.kind, {}
        for label, formula in self.formulas.items():
            if (place := kind.layout.taken.get(label)) is not None:
                found[label] = self.made[label][place]
            else:
                found[label] = _plain(kind, formula)
        return found

    def call(self, selection: Selection, row_wise: bool, together: bool) -> Direct | Call:
        layout = self.kind.layout
        if layout.direct:
            return Direct(layout, selection, self.kind.form, self.formulas, self.tensors)
        steps = self.steps()
        only_score = partial(self.only_score, selection, steps)
        plan = make_plan(layout, selection, row_wise=row_wise, together=together, only_score=only_score)
        return Call(
            layout, selection, plan, steps, self.formula.view, partial(_look_again, self.kind, selection, self.formulas)
        )

    def only_score(self, selection: Selection, steps: Mapping[str, Step] | None = None) -> str | None:
        """The one score with a gradient, of units of which one is pulled."""
        layout, known = self.kind.layout, self.kind.differentiable
        unit = next(unit for unit in layout.units if unit.pulled)
        steps = self.steps() if steps is None else steps
        step = steps[unit.label]
        names = step.differentiable
        if step.runs_functions:
            if layout.has_float16:  # how large a gradient for an upstream of one is, nobody has said
                return None
            names = known.get(unit.label)
            if names is None:
                names = _look_again(self.kind, selection, self.formulas, self.tensors)
        return next(iter(names)) if names is not None and len(names) == 1 and not step.column_parts else None


def _plain(kind: Kind, formula: Formula) -> FunctionStep:
    return FunctionStep(formula, kind.form, kind.layout.options.static_widths)


def _look_again(
    kind: Kind, selection: Selection, formulas: Mapping[str, Formula], tensors: list[Tensor]
) -> tuple[str, ...]:
    """The scores with a gradient, of the plain functions of the one unit that is pulled."""
    unit = next(unit for unit in kind.layout.units if unit.pulled)
    step = _plain(kind, formulas[unit.label])
    found = kind.differentiable[unit.label] = differentiable(step, unit, kind.layout, selection, tensors)
    return found


class Prepared(NamedTuple):
    """A call of a loss, checked and planned."""

    call: Direct | Call
    loss: RowLoss | GroupLoss
    tensors: list[Tensor]
    watched: list[tuple[str, Tensor, int]]  # what the plan was made from, and its versions

    @property
    def plan(self) -> ChunkPlan:
        """What ``run`` will do; print it."""
        call, loss = self.call, self.loss
        if isinstance(call, Call):
            return call.plan
        together = isinstance(loss, GroupLoss) and loss.couples
        found = make_plan(call.layout, call.selection, row_wise=isinstance(loss, RowLoss), together=together)
        return replace(found, direct=True)

    @property
    def used_rows(self) -> int:
        return self.call.selection.n_rows

    @outside_compile
    def run(self) -> LossOutput:
        self._check()
        return self.result()

    def result(self) -> LossOutput:
        """What ``run`` returns, right behind ``prepare``."""
        call, loss = self.call, self.loss
        if isinstance(call, Direct):
            with call.layout.no_autocast():
                value, metrics = call.row_loss(loss) if isinstance(loss, RowLoss) else call.group_loss(loss)
        elif call.plan.deferred and (isinstance(loss, GroupLoss) or call.layout.any_grad):
            value, metrics = self._over_scores(call)
        else:
            metrics = {}
            value = cast(Tensor, ChunkedLoss.apply(call, loss, metrics, *self.tensors))
        of_rows = isinstance(loss, RowLoss) or loss.of_rows
        if not of_rows or call.selection.order is None or not metrics:
            return LossOutput(value, metrics)
        used = torch.zeros(call.layout.n_rows, dtype=torch.int64, device=call.layout.device)
        used = used.index_fill_(0, call.selection.order, 1)
        if isinstance(loss, RowLoss):
            used = used.view(call.layout.leading)
        metrics_of_rows = {name: v for name, v in metrics.items() if v.shape[: used.dim()] == used.shape}
        extra = {name: (1,) * (v.dim() - used.dim()) for name, v in metrics_of_rows.items()}
        counts = {name: used.view(*used.shape, *extra[name]).expand_as(v) for name, v in metrics_of_rows.items()}
        return LossOutput(value, metrics, counts)

    def _check(self) -> None:
        """Between ``prepare`` and ``run`` a tensor may take other values, but for those that the plan was made from."""
        for name, given, version in self.watched:
            if given._version != version:
                raise ValueError(f"expected {name} as it was in prepare(), got it changed in place: prepare() again")
        wants = tuple(t.requires_grad for t in self.tensors)
        if torch.is_grad_enabled() and wants != self.call.layout.wants_grad:
            raise ValueError("expected the gradients that were wanted in prepare(), got others: prepare() again")

    def _over_scores(self, call: Call) -> tuple[Tensor, Named]:
        """All values first, then the loss once, as ordinary autograd; their gradient walks over the chunks again."""
        loss = self.loss
        scores: dict[str | None, Named] = {}
        for (label, name), value in score_rows(call, self.tensors):
            scores.setdefault(label, {})[name] = value
        dtype = call.layout.dtype
        with call.layout.no_autocast():
            if isinstance(loss, RowLoss):
                (values,) = scores.values()
                order = call.selection.order
                used = {n: v if order is None else v.index_select(0, order) for n, v in values.items()}
                return loss.of(used, call)
            of_columns = scores.pop(None, {})
            (block,) = call.plan.blocks
            by_group = {
                cast(str, label): {name: v[:, None] if v.dim() == 1 else v for name, v in named.items()}
                for label, named in scores.items()
            }
            groups = {name: self.tensors[i] for name, i in loss.groups.items()}
            value, metrics = loss.call(by_group, groups, rows_of_segments(call, block), of_columns)
            value = mean_or_weighted(value, loss.weight) if value.dim() else value
            if call.layout.any_grad:  # though it may depend on no score: none of these, or an argument of groups alone
                found = [v for named in (*by_group.values(), of_columns) for v in named.values() if v.requires_grad]
                found = found or [t for t, wants in zip(self.tensors, call.layout.wants_grad) if wants]
                value = with_gradients(value, found, always=any(t.requires_grad for t in groups.values()))
        return value.to(dtype), as_metrics(metrics, dtype)


def score_rows(call: Call, tensors: list[Tensor]) -> list[tuple[ScoreName, Tensor]]:
    names: list[ScoreName] = []
    results = cast(tuple, ChunkedScores.apply(call, names, *tensors))
    return list(zip(names, results))


def _check_roles(loss: str, layout: Layout, weights: Mapping[str, Tensor], grouped: bool) -> None:
    """Arguments that go with the kind of loss."""
    for name in (*(("groups",) if layout.groups else ()), *weights):
        if (name == "row_weight") is grouped:
            raise ValueError(f"expected no {name}: {loss} is {'grouped' if grouped else 'row-wise'}")
    if not grouped or "segments" in weights:
        return
    if layout.options.segments_per_group != 1:
        raise ValueError(f"expected segments: {loss} has {layout.options.segments_per_group} to a group")
    if layout.n_groups not in (None, layout.n_rows):
        raise ValueError(
            f"expected group arguments for {layout.n_rows} rows (no segments given), got {layout.n_groups}"
        )


def _row_weight(layout: Layout, selection: Selection, given: Tensor | None) -> Tensor | None:
    """-> (used rows,); None: all the same"""
    if given is None:
        return None
    weight = out_of_inference(given.reshape(-1).to(layout.dtype))
    return weight if selection.order is None else weight.index_select(0, selection.order)


def _group_weight(layout: Layout, selection: Selection, given: Tensor | None, of_rows: bool) -> Tensor | None:
    """-> (G,); None: all the same"""
    n = selection.n_groups
    if given is not None:
        weight = out_of_inference(given.detach().to(layout.dtype))
        checks.all_finite("group_weight", weight)
    elif of_rows and selection.offsets is not None:  # rows that were dropped are groups that count for nothing
        weight = selection.offsets.diff().to(layout.dtype) / max(selection.n_rows, 1)
    else:
        return None
    if len(weight) != n:
        raise ValueError(f"expected group arguments for {n} groups, got {len(weight)}")
    return weight
