"""Two rows, or two groups, of a call: what ``look.py`` looks at a loss's functions with."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from ..kernels.norms import inverse_norms_reference
from .direct import Direct
from .formula import NAMES, Formula
from .functions import Form, FunctionStep, score_step
from .layout import Layout, Spec, Unit
from .look import kept_generators, look
from .losses import GroupLoss, RowLoss
from .pack import Selection
from .products import mm
from .step import Step
from .sweep import Call
from .types import Named, accumulator_dtype

ROWS = 2


def look_at(
    formulas: Mapping[str, Formula],
    form: Form,
    call: Direct | Call,
    steps: Mapping[str, Step],
    tensors: list[Tensor],
    loss: RowLoss | GroupLoss | None,
    twice: bool,
) -> None:
    """Look at the functions of a call: those of rows for each unit, with the values that they give at that of groups.

    Args:
        twice: functions of rows run again for the gradient.

    Raises:
        ValueError: what ``look`` says.
    """
    layout = call.layout
    n = min(ROWS, call.selection.n_rows)
    if not n or tensors[0].is_meta:
        return
    operands = layout.operands(tensors, layout.powers(tensors))
    order = torch.arange(n, device=layout.device) if call.selection.order is None else call.selection.order[:n]
    rows = {name: operands[i].index_select(0, order) for name, i in layout.rows.items()}
    _warn_of_ignored(call, {name: operands[i] for name, i in layout.rows.items() if name not in layout.targets})
    columns = {name: operands[i] for name, i in layout.columns.items()}
    outputs = {name: _outputs(spec, operands, order) for name, spec in layout.specs.items()}
    scores: dict[str, Named] = {}
    for unit in layout.units:
        formula = formulas[unit.label]
        bound = formula.bind()

        def of_rows(o: Named, r: Named, c: Named, bound: Any = bound) -> Any:
            return {**form.elements(bound, o, r, c), **form.values(bound, o, r, c)}

        given = {name: outputs[name] for name in unit.names}
        wanted = [name for name in unit.names if layout.specs[name].wants_grad]
        function = "score_fn" if form.kind == "scores" else "loss_fn"
        if formula.has(function) and steps[unit.label].runs_functions:
            look(
                of_rows, given, rows, columns, name=function, functions=_functions(formula), row_wise=True,
                twice=twice, wanted=wanted,
            )  # fmt: skip
        if isinstance(loss, GroupLoss) and formula.has("score_fn"):
            with torch.no_grad():
                valid = torch.ones(n, dtype=torch.bool, device=layout.device)
                values, totals = score_step(bound, form)(given, rows, columns, valid, {}, {})
                scores[unit.label] = values | {name: totals[name] for name, _ in form.totals.rows}
    if isinstance(loss, GroupLoss) and len(scores) == len(layout.units):
        _look_at_groups(loss, scores, call, tensors, _functions(next(iter(formulas.values()))))


def differentiable(
    step: FunctionStep, unit: Unit, layout: Layout, selection: Selection, tensors: list[Tensor]
) -> tuple[str, ...]:
    """The scores of plain functions that have a gradient; none if they fail, which the step says better."""
    n = min(ROWS, selection.n_rows)
    operands = layout.operands(tensors, layout.powers(tensors))
    first = operands[0].new_ones(n, dtype=torch.int64).cumsum(0) - 1  # a fake tensor if those are
    order = first if selection.order is None else selection.order[:n]

    def leaves(named: Named, wanted: Collection[str] = layout.wanted) -> Named:
        return {name: t.requires_grad_(t.is_floating_point() and name in wanted) for name, t in named.items()}

    outputs = leaves({name: _outputs(layout.specs[name], operands, order) for name in unit.names}, unit.names)
    rows = leaves({name: operands[i].index_select(0, order) for name, i in layout.rows.items()})
    columns = leaves({name: operands[i].detach() for name, i in layout.columns.items()})
    with torch.enable_grad(), warnings.catch_warnings(), kept_generators(first.device), suppress(Exception):
        warnings.simplefilter("ignore")
        values = step.form.values(step.formula.bind(), outputs, rows, columns)
        return (*[n for n, v in values.items() if v.requires_grad], *[n for n, _ in step.form.totals.rows])
    return ()


def _warn_of_ignored(call: Direct | Call, rows: Named) -> None:
    """Labels under a name that nobody said is a target would count where they are ignored, without a word."""
    options, order = call.layout.options, call.selection.order
    for name, value in rows.items() if options.targets is None else ():
        if value.dim() != 1 or value.dtype not in (torch.int64, torch.int32):
            continue
        used = value if order is None else value.index_select(0, order)
        if bool((used == options.ignore_index).any()):
            warnings.warn(
                f"rows[{name!r}] has {options.ignore_index}, the ignore_index, on rows that count: if it holds "
                f"targets, targets=({name!r},) drops those rows; targets=() says that it holds none",
                stacklevel=2,
            )


def _functions(formula: Formula) -> list[Callable]:
    """What is called, for the names in a message: methods bound, so that attributes are found through them."""
    bound = [getattr(formula.view, name, None) for name in NAMES]
    plain = [function for function, _ in formula.functions.plain]
    return [function for function in (*plain, *bound) if function is not None]


def _look_at_groups(
    loss: GroupLoss, scores: Mapping[str, Named], call: Direct | Call, tensors: list[Tensor], functions: list[Callable]
) -> None:
    layout, per_group = call.layout, call.selection.segments_per_group
    n = min(ROWS, call.selection.n_groups, *(len(v) for named in scores.values() for v in named.values()))
    count = torch.ones(n, per_group, dtype=layout.dtype, device=layout.device)
    names = {f"{label} {name}": (label, name) for label, named in scores.items() for name in named}
    flat = {key: scores[label][name][:n, None].expand(n, per_group).double() for key, (label, name) in names.items()}
    groups = {name: tensors[i].detach()[:n] for name, i in loss.groups.items()}

    def of_groups(s: Named, g: Named, c: Named) -> Any:
        nested: dict[str, Named] = {label: {} for label in scores}
        for key, (label, name) in names.items():
            nested[label][name] = s[key]
        size = len(next(iter(s.values())))
        return loss.call(nested, g, count[:size], c)

    if not loss.couples:  # one that couples runs once, by ordinary autograd, which finds whatever learns
        look(of_groups, flat, groups, {}, name="loss_fn", functions=functions, row_wise=True, twice=False, unit="group")


def _outputs(spec: Spec, operands: list[Tensor], order: Tensor) -> Tensor:
    dtype = accumulator_dtype(spec.operand_dtype)
    total: Any = 0.0
    for term in spec.terms:
        x = operands[term.input].index_select(0, order)
        if term.weight is None:
            return x.to(dtype)
        weight = operands[term.weight]
        product = mm(x, weight.t(), out=x.new_empty(len(x), spec.width, dtype=spec.output_dtype)).to(dtype)
        if spec.cosine:
            product *= inverse_norms_reference(x)[:, None] * inverse_norms_reference(weight)
        total = total + product
    return total if spec.bias is None else total + operands[spec.bias]
