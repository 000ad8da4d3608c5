"""What is known of a call from its key: roles, dtypes, which gradients are wanted, how large a chunk may be.

A layout holds no tensor and is found again by the next call of the same key. What depends on the tensors' contents
(which rows are used, in which order) is packed anew in each call (``pack.py``).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..chunking import Chunking
from ..kernels.norms import of_length_one
from .call import Arguments, Positions, Structure, Term, autocast_dtype, label_of, operand_dtype
from .products import whole
from .recent import Recent
from .step import Needs, Shape, Step
from .types import HALF, accumulator_dtype
from .values import out_of_inference


@dataclass(frozen=True)
class Options:
    """What kind of loss it is, and how its caller wants it to run: the constructor arguments of ``FlexChunkLoss``."""

    chunking: Chunking
    targets: tuple[Any, ...] | None = None  # names, or names and projections; None: "target", if that may be one
    ignore_index: int = -100
    segments_per_group: int = 1
    couples_batch: bool = False
    separate_outputs: bool = False
    static_widths: bool = False
    workspace_bytes: int = 0

    def __post_init__(self) -> None:
        for name in ("couples_batch", "separate_outputs", "static_widths"):
            checks.flag(name, getattr(self, name))
        checks.integer("ignore_index", self.ignore_index)
        checks.integer("segments_per_group", self.segments_per_group, low=1)
        checks.integer("workspace_bytes", self.workspace_bytes, low=0)
        told = [name for target in self.targets or () for name in ((target,) if isinstance(target, str) else target)]
        if not isinstance(self.targets, (tuple, type(None))) or not all(isinstance(name, str) for name in told):
            raise TypeError(f"expected targets to be a tuple of names of row arguments, got {self.targets!r}")


@dataclass(frozen=True)
class Spec:
    """A projection as laid out: the positions of its tensors, its width and dtypes."""

    name: str
    terms: tuple[Term, ...]
    bias: int | None
    width: int
    operand_dtype: torch.dtype
    output_dtype: torch.dtype
    wants_grad: bool  # any of its tensors does: the gradient of its outputs is needed
    cosine: bool = False  # inverse norms of the rows of input and weight are factors of the outputs
    in_place: bool = False  # the gradient of the outputs takes their place, or the first half of each of their rows
    row: int = field(kw_only=True)  # numbers from one row of outputs to the next

    @property
    def identity(self) -> bool:
        return self.terms[0].weight is None

    @property
    def positions(self) -> tuple[int, ...]:
        """Of its tensors."""
        of_terms = [i for term in self.terms for i in term if i is not None]
        return (*of_terms, *(() if self.bias is None else (self.bias,)))


@dataclass(frozen=True)
class Unit:
    """Projections that are scored together, by one step. Usually all of a call, or each on its own; a step that merges
    sees them one by one, as ``pieces``."""

    label: str
    pieces: tuple[tuple[str, ...], ...]
    trains: bool  # the gradient of some of its outputs is wanted
    pulled: bool  # that, or the gradient of a row or column argument
    needs: Needs
    step: str | None = None  # the loss's own, by name; None: its functions

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(name for piece in self.pieces for name in piece)


@dataclass
class Layout:
    """The structure of calls with one key. Row-aligned tensors are flattened to ``(M, ...)``."""

    leading: tuple[int, ...]  # the shape of the user's rows; M is its product
    device: torch.device
    dtype: torch.dtype  # of the loss: float32, or float64 for float64 operands
    single: bool
    specs: dict[str, Spec]
    rows: dict[str, int]
    columns: dict[str, int]
    groups: dict[str, int]
    targets: dict[str, str | None]  # row arguments that index the columns: of this projection; None: of each
    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]
    wants_grad: tuple[bool, ...]
    rowlike: frozenset[int]
    normed: frozenset[int]  # those whose inverse norms are factors of outputs
    cast: dict[int, torch.dtype]  # operands that autocast converts
    room: dict[int, int]  # numbers of a row with zeros behind them, of operands whose rows are no whole vectors
    compiled: bool
    at_once: int  # bytes of all outputs in float32, and of operands that are cast to it
    small: bool  # so that chunks and compiled steps are a detour: see ``direct.py``
    options: Options
    n_groups: int | None  # that group arguments tell of
    direct: bool = False  # small, and of plain functions
    units: tuple[Unit, ...] = ()
    taken: dict[str, int] = field(default_factory=dict)  # which of the loss's own steps a unit takes; else functions
    refused: tuple[str, ...] = ()  # why steps before those do not serve
    # What follows from a few numbers: plans of calls without segments, rows of a chunk, places of outputs.
    plans: Recent[Hashable, Any] = field(default_factory=Recent)

    @cached_property
    def n_rows(self) -> int:
        return math.prod(self.leading)

    def unit(self, label: str) -> Unit:
        return next(unit for unit in self.units if unit.label == label)

    def columns_of(self, target: str) -> int:
        """How many columns a target may point to: of its projection, or of each, or of all pieces of a row."""
        projection = self.targets[target]
        return self._narrowest if projection is None else self.specs[projection].width

    @cached_property
    def _narrowest(self) -> int:
        widths = []
        for unit in self.units:
            of_unit = [self.specs[name].width for name in unit.names]
            widths.append(sum(of_unit) if len(unit.pieces) > 1 else min(of_unit))
        return min(widths)

    @cached_property
    def any_grad(self) -> bool:
        return any(self.wants_grad)

    @cached_property
    def learning(self) -> tuple[int, ...]:
        """Positions of the tensors that want a gradient."""
        return tuple(i for i, wants in enumerate(self.wants_grad) if wants)

    @cached_property
    def wanted(self) -> tuple[str, ...]:
        """Row and column arguments that want a gradient."""
        return tuple(n for named in (self.rows, self.columns) for n, i in named.items() if self.wants_grad[i])

    @cached_property
    def watched(self) -> tuple[tuple[str, int], ...]:
        """Row arguments whose values say which rows count, by name as in a message, and their positions."""
        return tuple((f"rows[{name!r}]", self.rows[name]) for name in self.targets)

    @cached_property
    def frozen_but_widened(self) -> tuple[int, ...]:
        """Positions of what functions see in another dtype and that wants no gradient."""
        return tuple(self.widened.difference(self.learning))

    @cached_property
    def formed(self) -> tuple[Spec, ...]:
        """The projections with a product."""
        return tuple(spec for spec in self.specs.values() if not spec.identity)

    @cached_property
    def input_uses(self) -> Mapping[int, int]:
        """How many terms each input is part of."""
        return Counter(term.input for spec in self.specs.values() for term in spec.terms)

    @cached_property
    def has_float16(self) -> bool:
        return any(spec.operand_dtype == torch.float16 for spec in self.specs.values())

    @cached_property
    def all_identity(self) -> bool:
        """There is no product to save by taking gradients while the outputs are there."""
        return not self.formed

    def operand_dtype(self, i: int) -> torch.dtype:
        return self.cast.get(i, self.dtypes[i])

    def no_autocast(self) -> AbstractContextManager:
        """Where it is on by now: a call may run elsewhere than it was prepared."""
        on = autocast_dtype(self.device) is not None
        return torch.autocast(self.device.type, enabled=False) if on else nullcontext()

    def flat(self, tensors: list[Tensor]) -> list[Tensor]:
        """Tensors as autograd sees them: row-aligned ones ``(M, ...)``, what functions read out of inference mode."""
        n = len(self.leading)
        if n > 1:
            tensors = [t.flatten(0, n - 1) if i in self.rowlike else t for i, t in enumerate(tensors)]
        if self.any_grad and any([tensors[i].is_inference() for i in self._read]):
            tensors = [out_of_inference(t) if i in self._read else t for i, t in enumerate(tensors)]
        return tensors

    @cached_property
    def _read(self) -> frozenset[int]:
        """Arguments of functions beside the outputs."""
        return frozenset(i for named in (self.rows, self.columns, self.groups) for i in named.values())

    def powers(self, tensors: Sequence[Tensor]) -> dict[int, Tensor]:
        """``(N,)``, what multiplies the rows of float16 operands of cosines: brought to a length of one, exactly,
        neither they nor their gradients leave its range, whatever their norms are."""
        if not (self.normed and self.has_float16):
            return {}
        narrow = [i for i in sorted(self.normed) if self.operand_dtype(i) == torch.float16]
        return {i: of_length_one(tensors[i].detach()) for i in narrow}

    def operands(self, tensors: Sequence[Tensor], powers: Mapping[int, Tensor]) -> list[Tensor]:
        """Detached tensors in the dtype of the products. A tensor that autocast converts is converted once."""
        given = [t.detach() for t in tensors]
        for i, power in powers.items():
            given[i] = (given[i] * power[:, None]).to(self.operand_dtype(i))
        for i, dtype in self.cast.items():
            if i not in self.room:
                given[i] = given[i].to(dtype)
        for i, width in self.room.items():
            x = given[i]
            given[i] = x.new_empty(*x.shape[:-1], width, dtype=self.operand_dtype(i))
            given[i][..., : x.shape[-1]] = x
            given[i][..., x.shape[-1] :] = 0
        return given

    def width(self, i: int) -> int:
        """Numbers of a row of an operand, and of its gradient until that is finished."""
        return self.room.get(i, self.shapes[i][-1])

    @cached_property
    def widened(self) -> frozenset[int]:
        """Positions of what functions see in another dtype, where all of it is there at once."""
        operands = {i for spec in self.specs.values() for i in spec.positions}
        return frozenset(
            i
            for i in (*sorted(operands), *self.learning)
            if i in self.cast or accumulator_dtype(self.dtypes[i]) != self.dtypes[i]
        )

    def seen(self, i: int, t: Tensor) -> Tensor:
        """A tensor rounded as an operand is, in the dtype in which functions see it. Rows of cosines are not rounded to
        float16, which may not hold them: a chunk rounds them at a length of one."""
        dtype = self.operand_dtype(i)
        operand = t if i in self.normed and dtype == torch.float16 else t.to(dtype)
        return operand.to(accumulator_dtype(operand.dtype))

    def shape_of(self, names: Sequence[str]) -> Shape:
        specs = [self.specs[name] for name in names]
        return Shape(
            rows=self.n_rows,
            widths=tuple(spec.width for spec in specs),
            operands=specs[0].operand_dtype,
            outputs=specs[0].output_dtype,
            cosine=any(spec.cosine for spec in specs),
            device=self.device,
            compiled=self.compiled,
            columns=bool(self.columns),
            grad=self.wanted,
            learns=self.any_grad,
            trains=any(spec.wants_grad for spec in specs),
            terms=max(0 if spec.identity else len(spec.terms) for spec in specs),
            depth=max(self.shapes[term.input][-1] for spec in specs for term in spec.terms),
            bias=max((self._bias_of(spec) for spec in specs), key=BIASES.index),
        )

    def _bias_of(self, spec: Spec) -> str:
        return BIASES[0 if spec.bias is None else 1 + self.wants_grad[spec.bias]]

    @cached_property
    def sums(self) -> tuple[tuple[torch.dtype | None, ...], tuple[torch.dtype | None, ...]]:
        """The dtype in which each gradient is summed, over one chunk and over several. Half precision is summed in
        float32; but what is written once needs no sum, unless it is float16, which waits in float32 for its scale, or
        is still to go through its norm."""
        uses = Counter(term.weight for spec in self.specs.values() for term in spec.terms)
        parts = Counter(term.input for spec in self.specs.values() for term in spec.terms)  # of a chunk's rows
        parts.update(i for i in self.rows.values() for unit in self.units if unit.pulled)
        of_groups = set(self.groups.values())  # those have theirs from the small loss

        def dtype(i: int, n_chunks: int) -> torch.dtype | None:
            if not self.wants_grad[i] or i in of_groups:
                return None
            operand = self.operand_dtype(i)
            written = parts[i] if i in self.rowlike else n_chunks * uses.get(i, 2)
            once = written <= 1 and i not in self.normed
            # A float32 weight under autocast takes it straight from the product.
            if once and operand != torch.float16 and (i in uses or operand == self.dtypes[i]):
                return self.dtypes[i]
            return accumulator_dtype(operand)

        one, several = (tuple(dtype(i, n) for i in range(len(self.dtypes))) for n in (1, 2))
        return one, several


BIASES = ("none", "frozen", "learns")
TARGET = "target"  # the row argument that is a target without being named as one
FEWEST_WITH_ROOM = 128  # numbers of a row that gets room for whole vectors, 6% of it at most
FEWEST_OUTPUTS = 4096  # of a row of outputs that does; narrower ones are of any width to a compiled step

# Outputs in float32, and operands that are cast to it, of a whole call: up to here chunks are a detour.
DIRECT_BYTES = {"cuda": 32 << 20, "cpu": 16 << 20}
KERNEL_BYTES = 8 << 20  # the same, where kernels do the steps: they start sooner than what has to be compiled


def build(arguments: Arguments, options: Options, runs_on: torch.device | None = None) -> Layout:
    """Check a call and lay it out; its units come with its steps.

    Args:
        runs_on: the device to lay out for, in place of the tensors' own. (Tensors without data are on the CPU: torch
            has none with a gradient on a GPU that it was not built for.)

    Raises:
        TypeError: mixed or integer dtypes.
        ValueError: shapes or devices that do not fit, an empty batch.
    """
    return _Builder(arguments, options).layout(runs_on)


def choose(
    layout: Layout,
    labels: Mapping[str, tuple[str, ...]],
    made: Mapping[str, Sequence[Step]],
    plain: Mapping[str, Step],
) -> None:
    """Ask each step what it needs, once a layout: units of projections, which of the loss's own steps they take, and
    why others refuse."""
    shapes = {label: layout.shape_of(names) for label, names in labels.items()}
    if layout.small and layout.at_once > KERNEL_BYTES:
        as_chunks = {label: shape._replace(compiled=True) for label, shape in shapes.items()}
        if len(_taken(made, as_chunks)[0]) == len(labels):
            layout.small, layout.compiled, shapes = False, True, as_chunks
    layout.taken, layout.refused = _taken(made, shapes)
    units = []
    for label, names in labels.items():
        step = made[label][layout.taken[label]] if label in layout.taken else plain[label]
        needs = step.needs(shapes[label])
        trains = any(layout.specs[name].wants_grad for name in names)
        pieces = tuple((name,) for name in names) if step.merges else (names,)
        for spec in (layout.specs[name] for name in names if not layout.specs[name].identity):  # the user's own tensor
            in_place = needs.overwrites or spec.output_dtype == spec.operand_dtype
            layout.specs[spec.name] = replace(spec, in_place=in_place)
        own = step.name if label in layout.taken else None
        units.append(Unit(label, pieces, trains, trains or bool(layout.wanted), needs, own))
    layout.units = tuple(units)
    layout.direct = layout.small and not layout.taken


def _taken(made: Mapping[str, Sequence[Step]], shapes: Mapping[str, Shape]) -> tuple[dict[str, int], tuple[str, ...]]:
    """-> the place of each unit's step, and what those before it say. Units go the same way where one serves them all:
    equal models then have equal scores, to the last bit."""
    told = {label: [_refusal(step, shapes[label]) for step in steps] for label, steps in made.items()}
    together = [n for n in range(min(map(len, told.values()))) if all(of_unit[n] is None for of_unit in told.values())]
    taken, refused = {}, []
    for label, of_unit in told.items():
        serving = together or [n for n, refusal in enumerate(of_unit) if refusal is None]
        if serving:
            taken[label] = serving[0]
        before = of_unit[: taken.get(label)]
        refused += [f"{made[label][n].name}: {why}" for n, why in enumerate(before) if why is not None]
    return taken, tuple(dict.fromkeys(refused))


def _refusal(step: Step, shape: Shape) -> str | None:
    if shape.cosine and not step.takes_factors:
        return "does not multiply outputs by norms, as cosine=True asks"
    return step.needs(shape).refusal


class _Builder:
    def __init__(self, arguments: Arguments, options: Options) -> None:
        self.structure: Structure = arguments.structure
        self.tensors = arguments.tensors
        self.weights = arguments.weights
        self.options = options
        first = self.tensors[0]
        self.leading = tuple(first.shape[:-1])
        self.device = first.device
        self.runs_on = self.device
        self.cast: dict[int, torch.dtype] = {}
        if first.dim() < 2 or math.prod(self.leading) == 0:
            raise ValueError(f"expected an input of shape (..., H) with at least one row, got {tuple(first.shape)}")

    def layout(self, runs_on: torch.device | None) -> Layout:
        structure, tensors, device = self.structure, self.tensors, runs_on or self.device
        self.runs_on = device
        specs = {positions.name: self.projection(positions) for positions in structure.projections}
        widths = sorted({spec.width for spec in specs.values()})
        for name, i in structure.rows:
            self.rowlike(f"rows[{name!r}]", tensors[i])
        for name, i in structure.columns:
            checks.tensor(f"columns[{name!r}]", tensors[i], device=self.device)
            if tensors[i].dim() == 0 or tensors[i].shape[0] not in widths:
                got = tuple(tensors[i].shape)
                raise ValueError(f"expected columns[{name!r}] of shape (V, ...) with V one of {widths}, got {got}")
        grad = torch.is_grad_enabled()
        inputs = {t.input for spec in specs.values() for t in spec.terms}
        normed = {i for spec in specs.values() if spec.cosine for term in spec.terms for i in term if i is not None}
        chunking = self.options.chunking
        at_once = self.bytes_at_once(specs)
        small = not chunking.stated and at_once <= DIRECT_BYTES.get(device.type, 0)
        wide = any(spec.operand_dtype == torch.float64 for spec in specs.values())
        return Layout(
            leading=self.leading,
            device=device,
            dtype=torch.float64 if wide else torch.float32,
            single=structure.single,
            specs=specs,
            rows=dict(structure.rows),
            columns=dict(structure.columns),
            groups=dict(structure.groups),
            targets=self.targets(),
            shapes=tuple(t.shape for t in tensors),
            dtypes=tuple(t.dtype for t in tensors),
            wants_grad=tuple(grad and t.requires_grad for t in tensors),
            rowlike=frozenset(inputs | {i for _, i in structure.rows}),
            normed=frozenset(normed),
            cast=self.cast,
            room={} if small else self.rooms(specs, device),
            compiled=not small if chunking.compiled is None else chunking.compiled,
            at_once=at_once,
            small=small,
            options=self.options,
            n_groups=self.groups(),
        )

    @property
    def n_rows(self) -> int:
        return math.prod(self.leading)

    def bytes_at_once(self, specs: Mapping[str, Spec]) -> int:
        """Outputs in float32, and operands that are cast to it."""
        formed = [spec for spec in specs.values() if not spec.identity]
        narrow = {i for spec in formed if spec.operand_dtype in HALF for i in spec.positions}
        outputs = self.n_rows * sum(spec.width for spec in specs.values())
        return 4 * (outputs + sum(self.tensors[i].numel() for i in narrow))

    def rooms(self, specs: Mapping[str, Spec], device: torch.device) -> dict[int, int]:
        """Half-precision rows of products that begin anywhere, as those over a vocabulary of 30,522 do: they would be
        read a number or two at a time."""
        formed = [spec for spec in specs.values() if not spec.identity and spec.operand_dtype in HALF]
        operands = {i for spec in formed for term in spec.terms for i in term if i is not None}
        elsewhere = {i for _, i in (*self.structure.rows, *self.structure.columns)}
        elsewhere |= {term.input for spec in specs.values() if spec not in formed for term in spec.terms}
        widths = {i: self.tensors[i].shape[-1] for i in operands}
        if operands & elsewhere:  # functions see it as it is
            return {}
        return {i: n for i, w in widths.items() if (n := whole(w, device)) != w and w >= FEWEST_WITH_ROOM}

    def projection(self, positions: Positions) -> Spec:
        name, terms, bias, cosine, asked = positions
        label, tensors = label_of(name), self.tensors
        first = terms[0]
        self.rowlike(f"input{label}", tensors[first.input], features=True)
        if first.weight is None:
            x = checks.tensor(f"input{label}", tensors[first.input], kind="floating")
            wants = torch.is_grad_enabled() and x.requires_grad  # there is no product to cast for
            return Spec(name, terms, None, x.shape[-1], x.dtype, x.dtype, wants, row=x.shape[-1])
        width = tensors[first.weight].shape[0] if tensors[first.weight].dim() else 0
        dtypes: dict[str, torch.dtype] = {}
        for n, term in enumerate(terms):
            suffix = label if n == 0 else f" of extra term {n}{label}"
            x, w = tensors[term.input], tensors[term.weight]  # type: ignore[index]
            self.rowlike(f"input{suffix}", x, features=True)
            dtypes[f"input{suffix}"] = self.operand(term.input, f"input{suffix}", asked)
            dtypes[f"weight{suffix}"] = self.operand(term.weight, f"weight{suffix}", asked)  # type: ignore[arg-type]
            if w.dim() != 2 or w.shape[1] != x.shape[-1] or w.shape[0] != width or 0 in w.shape:
                rows = "V" if n == 0 else str(width)
                raise ValueError(
                    f"expected weight{suffix} of shape ({rows}, {x.shape[-1]}) for input {tuple(x.shape)}, "
                    f"got {tuple(w.shape)}"
                )
        if bias is not None:
            dtypes[f"bias{label}"] = self.operand(bias, f"bias{label}", asked)
            if tensors[bias].shape != (width,):
                raise ValueError(f"expected bias{label} of shape ({width},), got {tuple(tensors[bias].shape)}")
        dtype = checks.one_dtype("the tensors of a projection", dtypes)
        widened = self.options.chunking.float32_outputs and dtype in HALF
        outputs = accumulator_dtype(dtype) if widened else dtype
        row = whole(width, self.runs_on) if dtype in HALF and width > FEWEST_OUTPUTS else width
        spec = Spec(name, terms, bias, width, dtype, outputs, False, cosine, row=row)
        wants = torch.is_grad_enabled() and any(tensors[i].requires_grad for i in spec.positions)
        return replace(spec, wants_grad=wants)

    def operand(self, i: int, name: str, asked: torch.dtype | None) -> torch.dtype:
        given = checks.tensor(name, self.tensors[i], device=self.device, kind="floating").dtype
        dtype = asked or operand_dtype(given, self.device)
        if dtype != given:
            self.cast[i] = dtype
        return dtype

    def rowlike(self, name: str, given: Tensor, features: bool = False) -> None:
        checks.tensor(name, given, device=self.device)
        n, shape = len(self.leading), ", ".join(map(str, self.leading))
        if tuple(given.shape[:n]) != self.leading:
            raise ValueError(f"expected {name} of shape ({shape}, ...), got {tuple(given.shape)}")
        if features and (given.dim() != n + 1 or given.shape[-1] == 0):
            raise ValueError(f"expected {name} of shape ({shape}, H), got {tuple(given.shape)}")

    def targets(self) -> dict[str, str | None]:
        """The row arguments that index the columns, and of which projection."""
        rows, stated = dict(self.structure.rows), self.options.targets
        found: dict[str, str | None] = {}
        for target in (TARGET,) if stated is None else stated:
            name, projection = (target, None) if isinstance(target, str) else target
            if name not in rows:
                continue
            given = self.tensors[rows[name]]
            integers = not (given.is_floating_point() or given.is_complex() or given.dtype == torch.bool)
            if integers and tuple(given.shape) == self.leading:
                found[name] = projection
            elif stated is not None:
                raise TypeError(
                    f"expected rows[{name!r}] to be one integer per row, got {given.dtype} {tuple(given.shape)}"
                )
        return found

    def groups(self) -> int | None:
        """Checks what is aligned with rows or groups but takes no gradient -> how many groups there are, if known."""
        for name in ("row_weight", "segments"):
            if (given := self.weights.get(name)) is None:
                continue
            checks.tensor(name, given, self.leading, device=self.device)
            if name == "segments":
                checks.tensor(name, given, kind="integer")
            if given.requires_grad:
                raise ValueError(f"expected {name} without gradient; a weight that learns is a row argument of loss_fn")
        counts = {}
        given_groups = {f"groups[{name!r}]": self.tensors[i] for name, i in self.structure.groups}
        if (weight := self.weights.get("group_weight")) is not None:
            given_groups["group_weight"] = weight
            if weight.requires_grad or weight.dim() != 1:
                raise ValueError(f"expected group_weight (G,) without gradient, got {tuple(weight.shape)}")
        for name, given in given_groups.items():
            checks.tensor(name, given, device=self.device)
            if given.dim() == 0 or len(given) == 0:
                raise ValueError(f"expected {name} of shape (G, ...), got {tuple(given.shape)}")
            counts[name] = len(given)
        if len(set(counts.values())) > 1:
            raise ValueError(f"expected group arguments of one length, got {counts}")
        return next(iter(counts.values()), None)
