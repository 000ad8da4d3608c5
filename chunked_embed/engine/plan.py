"""The chunk plan: how many rows at a time, in how many passes, at how many bytes. Printable before anything runs.

The plan decides; the sweep, the steps and the gradients read from it where outputs lie and in which dtype each
gradient is summed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from operator import sub

import torch

from .layout import DIRECT_BYTES, Layout, Spec
from .pack import Block, Selection, pack
from .types import accumulator_dtype

CUDA_CHUNK_BYTES = (1 << 29, 5 << 28)  # least and most; between them, as much as the gradients take anyway
CPU_CHUNK_BYTES = (1 << 27, 1 << 27)
ONE_CHUNK_BYTES = {"cuda": 1 << 30}  # one chunk up to this: no sums of gradients, and the host waits less
CUDA_ROWS = ((2048, 5 << 29), (4096, 1 << 30))  # rows that wide outputs get beyond that, where those take no more
# A chunk grows to hold the longest group, and a longer one has sums of its segments, up to this: one product less.
GROUP_BYTES = {"cuda": 5 << 29, "cpu": 1 << 28}
LOWEST_RUNG = 256
SMALL_BYTES = 1 << 26  # gradients up to this are held from forward to backward: one step is faster than two
KEEP_RATIO = 1.5  # outputs up to so many times the inputs are kept for backward
NARROW = 4096  # up to this width a reduction over a row does not split, and compiled steps take any number of rows
EAGER_BYTES = 24  # float32 temporaries of an uncompiled step, per output: the copy read, about four more, a gradient
PLANS = 32  # kept for each layout
ALIGNMENT = 256  # bytes, of buffers that share a space: whatever their dtypes, and for the matrix products


@dataclass(frozen=True)
class ChunkPlan:
    """What a call will do. ``print(loss.plan(...))`` shows it.

    Byte counts are above the call's inputs: a chunk's outputs and workspace, the gradients as they are gathered (half
    precision in float32 sums), and as they are returned. ``peak_bytes`` is the largest moment of forward and backward.
    A plain compiled ``loss_fn`` may add what inductor keeps beside its inputs.

    Example:
        >>> import torch
        >>> from chunked_embed import FlexChunkLoss, Projection
        >>> loss = FlexChunkLoss(lambda outputs, rows: outputs.logsumexp(1), chunk_size=256)
        >>> plan = loss.plan(Projection(torch.randn(1000, 64, requires_grad=True), torch.randn(5000, 64)))
        >>> plan.chunks, plan.chunk_rows, plan.products  # the weight is frozen: no gradient of it
        (4, 256, 2)
    """

    used_rows: int
    chunk_rows: int
    blocks: tuple[Block, ...]
    rungs: tuple[int, ...] | None  # the row counts of compiled steps; None: any
    deferred: bool  # gradients are taken in backward
    keeps_outputs: bool  # from forward to backward
    row_wise: bool
    row_bytes: int  # of a chunk
    layout: Layout = field(repr=False, compare=False)
    ahead: str | None = None  # a score whose gradient is taken before the small loss of a long group is known
    apart_bytes: int = 0  # the sums of that by segment, beside those of the call
    direct: bool = False  # by ordinary autograd, all at once: see ``direct.py``

    @property
    def rows(self) -> int:
        return self.layout.n_rows

    @property
    def compiled(self) -> bool:
        return self.layout.compiled

    @property
    def steps(self) -> tuple[str, ...]:
        """What works on a chunk: the loss's own steps (kernels, say) by name, or its functions, and how they run."""
        if self.direct:
            return ("direct",)
        functions = "compiled" if self.compiled else "uncompiled"
        return tuple(dict.fromkeys(unit.step or functions for unit in self.layout.units))

    @property
    def refusals(self) -> tuple[str, ...]:
        """Of steps that the loss would rather take, and that do not serve here."""
        return self.layout.refused

    @property
    def sums(self) -> tuple[torch.dtype | None, ...]:
        """The dtype in which each tensor's gradient is summed; or waits for its factor."""
        layout = self.layout
        found = layout.sums[self.chunks > 1]
        if self.ahead is None:
            return found
        return tuple(
            dtype and accumulator_dtype(dtype) if i in layout.rowlike else dtype for i, dtype in enumerate(found)
        )

    @property
    def chunks(self) -> int:
        return sum(len(block.spans) for block in self.blocks)

    @property
    def passes(self) -> int:
        again = self.deferred and not self.keeps_outputs
        return 2 if again or any(len(block.spans) > 1 and not block.segments for block in self.blocks) else 1

    @property
    def products(self) -> int:
        layout, found = self.layout, 0
        for unit in layout.units:
            if unit.needs.products is not None:
                found += unit.needs.products
                continue
            # Formed again: all that is pulled in a second pass; and what is frozen, which has no buffer of its own.
            again = unit.pulled if self.passes > 1 else unit.pulled and not unit.trains and not self.row_wise
            for spec in (layout.specs[name] for name in unit.names if not layout.specs[name].identity):
                operands = [i for term in spec.terms for i in term if i is not None]
                found += len(spec.terms) * (1 + again) + sum(layout.wants_grad[i] for i in operands)
        return found

    @property
    def chunk_bytes(self) -> int:
        largest = max((span.rows for block in self.blocks for span in block.spans), default=0)
        return padded_rows(largest, self.rungs) * self.row_bytes

    @property
    def gathered_bytes(self) -> int:
        room = self.layout.room
        return sum(self._bytes_of(i, dtype, self.used_rows, room.get(i)) for i, dtype in enumerate(self.sums))

    def _bytes_of(self, i: int, dtype: torch.dtype | None, rows: int, width: int | None = None) -> int:
        """A gradient in this dtype; a row-aligned one of so many rows, of another width perhaps."""
        layout = self.layout
        if dtype is None or not layout.wants_grad[i]:
            return 0
        shape = layout.shapes[i]
        n = shape.numel() if width is None else shape[:-1].numel() * width
        return dtype.itemsize * (n // layout.n_rows * rows if i in layout.rowlike else n)

    @property
    def gradient_bytes(self) -> int:
        return _bytes(self.layout, self.layout.dtypes)

    @property
    def peak_bytes(self) -> int:
        layout, chunk, gathered = self.layout, self.chunk_bytes, self.gathered_bytes
        if not layout.any_grad:
            return chunk
        forward, backward, held = chunk + gathered + self.apart_bytes, gathered, gathered
        for i in sorted(range(len(layout.dtypes)), key=lambda i: i in layout.rowlike):
            # What is still to be scaled, is wider than its tensor, or of fewer rows, is returned as a copy.
            dropped = i in layout.rowlike and self.used_rows < self.rows
            if dropped or not self.deferred or self.sums[i] != layout.dtypes[i]:
                held += self._bytes_of(i, layout.dtypes[i], layout.n_rows)
                backward = max(backward, held)
                held -= self._bytes_of(i, self.sums[i], self.used_rows)
        copied = {i for i, dtype in layout.cast.items() if dtype != layout.dtypes[i]} | set(layout.room)
        sizes = {i: layout.shapes[i][:-1].numel() * layout.width(i) for i in copied}
        operands = sum(n * layout.operand_dtype(i).itemsize for i, n in sizes.items())
        return operands + max(forward, backward)

    def __str__(self) -> str:
        lines = [
            f"rows          {self.used_rows} of {self.rows} used",
            f"chunks        {self.chunks} of up to {self.chunk_rows} rows",
            f"passes        {self.passes}",
            f"products      {self.products} matrix products per chunk",
            f"steps         {', '.join(self.steps)}",
            f"chunk         {size_text(self.chunk_bytes)}",
            f"gathered      {size_text(self.gathered_bytes)}",
            f"gradients     {size_text(self.gradient_bytes)}",
            *([f"by segment    {size_text(self.apart_bytes)}"] if self.apart_bytes else []),
            f"peak          {size_text(self.peak_bytes)}",
        ]
        return "\n".join(lines + [f"no kernel     {refusal}" for refusal in self.refusals])


def size_text(n: int) -> str:
    return f"{n / 2**30:.2f} GiB" if n >= 2**28 else f"{n / 2**20:.2f} MiB"


def make_plan(
    layout: Layout,
    selection: Selection,
    *,
    row_wise: bool,
    together: bool,
    only_score: Callable[[], str | None] = lambda: None,
) -> ChunkPlan:
    """Lay out the chunks and count what they take.

    Args:
        together: all scores first.
        only_score: tells the name of the one score that has a gradient, if there is one.
    """
    if selection.bounds is not None:
        plan = _make_plan(layout, selection, row_wise, together)
        return _ahead(plan, selection, only_score)
    key = (selection.n_rows, selection.order is None, row_wise, together)
    found = layout.plans.found(key)
    return found or layout.plans.keep(key, _make_plan(layout, selection, row_wise, together), PLANS)


def _make_plan(layout: Layout, selection: Selection, row_wise: bool, together: bool) -> ChunkPlan:
    # Without products, taking gradients in backward costs little and holds nothing in between.
    deferred = together or (row_wise and layout.all_identity and _bytes(layout, layout.dtypes) > SMALL_BYTES)
    per_row = bytes_per_row(layout, gathers=selection.order is not None)
    size, step_rows = rows_per_chunk(layout, per_row, selection.n_rows)
    if not deferred:
        size = max(size, longest_group(layout, selection, per_row))
    blocks = pack(layout, selection, size, deferred)
    one = len(blocks) == 1 and len(blocks[0].spans) == 1
    # A few groups' small loss is differentiated along with what comes behind it: each run of autograd takes a while.
    deferred = deferred or (one and not row_wise and _few_outputs(layout, selection.n_rows))
    return ChunkPlan(
        used_rows=selection.n_rows,
        chunk_rows=size,
        blocks=blocks,
        rungs=ladder(layout, step_rows),
        deferred=deferred,
        keeps_outputs=deferred and one and _keeps(layout, selection.n_rows),
        row_wise=row_wise,
        row_bytes=per_row,
        layout=layout,
    )


def _ahead(plan: ChunkPlan, selection: Selection, only_score: Callable[[], str | None]) -> ChunkPlan:
    """A group longer than a chunk in one pass, where one score alone has a gradient: that of each segment's sum waits
    for its factor, and the outputs are not formed again."""
    layout = plan.layout
    long = [block for block in plan.blocks if len(block.spans) > 1]
    pulled = [unit for unit in layout.units if unit.pulled]
    if plan.deferred or not long or [unit.trains for unit in pulled] != [True]:
        return plan
    sums = [None if i in layout.rowlike else dtype for i, dtype in enumerate(plan.sums)]
    filled = [sum(map(bool, selection.segment_lengths(block.start))) for block in long]
    # The first segment of all takes the place of the call's own sums.
    apart = _bytes(layout, sums) * max(filled[0] - 1, *filled[1:], 0)
    chunking = layout.options.chunking
    if apart > (chunking.max_chunk_bytes or GROUP_BYTES.get(layout.device.type, 0)) or (score := only_score()) is None:
        return plan
    blocks = pack(layout, selection, plan.chunk_rows, together=False, by_segment=True)
    return replace(plan, blocks=blocks, ahead=score, apart_bytes=apart)


def _keeps(layout: Layout, rows: int) -> bool:
    """Outputs of one chunk stay for backward where they are few, or not many more than the inputs (a Dense layer)."""
    inputs = {term.input for spec in layout.formed for term in spec.terms}
    n_inputs = sum(layout.shapes[i].numel() for i in inputs)
    dense = 0 < rows * sum(spec.width for spec in layout.formed) <= KEEP_RATIO * n_inputs
    return dense or _few_outputs(layout, rows)


def _few_outputs(layout: Layout, rows: int) -> bool:
    """Whether the outputs with a gradient are few enough to hold until backward, as the direct way does."""
    learning = [spec for spec in layout.formed if spec.wants_grad]
    n_bytes = rows * sum(spec.width * spec.output_dtype.itemsize for spec in learning)
    return 0 < n_bytes <= DIRECT_BYTES.get(layout.device.type, 0)


def _bytes(layout: Layout, dtypes: Sequence[torch.dtype | None]) -> int:
    """What the gradients take in these dtypes."""
    wanted = zip(layout.shapes, dtypes, layout.wants_grad)
    return sum(shape.numel() * dtype.itemsize for shape, dtype, wants in wanted if wants and dtype is not None)


# --- the rows of a chunk ---------------------------------------------------------------------------------------------


def bytes_per_output(layout: Layout, spec: Spec, gathers: bool) -> int:
    """Bytes that an output takes while its chunk is worked on."""
    total = layout.options.workspace_bytes
    if not spec.identity:
        total += spec.output_dtype.itemsize
        if spec.wants_grad and not spec.in_place:
            total += spec.operand_dtype.itemsize
    elif gathers:  # else an identity's outputs are the user's tensor; its gradients are what is returned
        total += spec.output_dtype.itemsize
    if not layout.compiled:
        total += EAGER_BYTES * layout.dtype.itemsize // 4
    elif layout.device.type == "cpu" and spec.wants_grad:  # see functions.store
        total += spec.operand_dtype.itemsize
    return total


def bytes_per_row(layout: Layout, gathers: bool) -> int:
    key = ("bytes a row", gathers)
    found = layout.plans.found(key)
    return layout.plans.keep(key, _bytes_per_row(layout, gathers), PLANS) if found is None else found


def _bytes_per_row(layout: Layout, gathers: bool) -> int:
    """Bytes that one more row in a chunk costs, for the outputs of all units that are alive together."""
    trainable = frozen = 0
    for unit in layout.units:
        specs = [layout.specs[name] for name in unit.names]
        formed = sum(spec.width * bytes_per_output(layout, spec, gathers) for spec in specs)
        total = (formed if unit.needs.forms_outputs else 0) + unit.needs.scratch * sum(spec.width for spec in specs)
        if unit.trains:
            trainable += total
        else:  # scored one after the other through one buffer
            frozen = max(frozen, total)
    return max(trainable, frozen)


def rows_per_chunk(layout: Layout, per_row: int, rows: int) -> tuple[int, int]:
    key = ("rows", per_row, rows)
    found = layout.plans.found(key)
    return found or layout.plans.keep(key, _rows_per_chunk(layout, per_row, rows), PLANS)


def _rows_per_chunk(layout: Layout, per_row: int, rows: int) -> tuple[int, int]:
    """-> rows of a chunk, rows of the largest compiled step.

    As many as fit in the budget; or all of them, where that takes no more memory than chunks and their accumulators, or
    little enough.
    The steps' sizes follow from the budget alone: a ragged batch must not change them.
    """
    chunking = layout.options.chunking
    multiple = math.lcm(*(unit.needs.multiple for unit in layout.units))
    if chunking.chunk_size is not None:
        size = max(chunking.chunk_size // multiple, 1) * multiple
        return size, size
    if per_row == 0:
        return max(rows, 1), max(rows, 1)
    least, largest = CUDA_CHUNK_BYTES if layout.device.type == "cuda" else CPU_CHUNK_BYTES
    several, one = _bytes(layout, layout.sums[1]), _bytes(layout, layout.sums[0])
    budget = min(max(least, several), largest)
    if layout.device.type == "cuda":
        workspace = layout.options.workspace_bytes * sum(spec.width for spec in layout.specs.values())
        budget = max(budget, *(min(n * (per_row - workspace), at_most) for n, at_most in CUDA_ROWS))
    budget = chunking.max_chunk_bytes or budget
    most = max(budget // per_row, 1)
    # Whole tiles of the matrix product, and a ladder that divides evenly, also powers of two; but no cliff from 15
    # rows to one.
    step = next(n for n in (2048, 256, 16, 1) if most >= n)
    step = math.lcm(step, multiple)
    fitting = max(most // step, 1) * step
    at_once = rows * per_row
    little = at_once <= ONE_CHUNK_BYTES.get(layout.device.type, 0)
    if chunking.max_chunk_bytes is None and (little or at_once + one <= budget + several):
        return max(rows, 1), fitting
    return fitting, fitting


def longest_group(layout: Layout, selection: Selection, per_row: int) -> int:
    """Its rows, where a chunk may hold them all and the caller has no say in chunks; else 0. A group longer than
    a chunk takes sums by segment (`_ahead`), or a second pass, which forms its outputs again."""
    chunking = layout.options.chunking
    if selection.bounds is None or (chunking.chunk_size, chunking.max_chunk_bytes) != (None, None):
        return 0
    ends = selection.group_ends()
    rows = max(map(sub, ends, [0, *ends]), default=0)
    return rows if rows * per_row <= GROUP_BYTES.get(layout.device.type, 0) else 0


def tiles(rows: int, ladder: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    """Cover ``rows`` with steps of few fixed sizes: ``(start, stop, size)``, where a tail is padded up to ``size``.

    A rung is taken where it fits, or where padding up to it wastes less than a quarter.
    """
    start = 0
    while start < rows:
        left = rows - start
        size = next((r for r in ladder if 4 * left >= 3 * r), ladder[-1])
        stop = min(start + size, rows)
        yield start, stop, size
        start = stop


def ladder(layout: Layout, step_rows: int) -> tuple[int, ...] | None:
    """The row counts that compiled steps are specialised to. None: natural ones, of kernels, uncompiled or with dynamic
    rows.

    With a dynamic row count inductor splits a long reduction and drops its online softmax (measured at a 128k
    vocabulary: 2.1 against 1.5 ms), so wide outputs get a few fixed sizes. Narrow ones do not split.
    """
    kernels = len(layout.taken) == len(layout.units)
    if kernels or not layout.compiled or all(spec.width <= NARROW for spec in layout.specs.values()):
        return None
    rungs = [step_rows, -(-step_rows // 4), -(-step_rows // 16)]
    while rungs[-1] > LOWEST_RUNG:  # a chunk size far above the batch must not pad it to that size
        rungs.append(-(-rungs[-1] // 4))
    return tuple(dict.fromkeys(rungs))


def padded_rows(rows: int, rungs: tuple[int, ...] | None) -> int:
    if rungs is None:
        return rows
    return max((start + size for start, _, size in tiles(rows, rungs)), default=0)


# --- where outputs lie -----------------------------------------------------------------------------------------------


Places = tuple[dict[str, tuple[int, int]], list[int]]


def places(layout: Layout, capacity: int, holds: bool) -> Places:
    """-> where the outputs of each projection lie (a space that several may share, and so many bytes into it), and the
    bytes of each space.

    ``holds``: outputs of units that train stay from score to pull, and have a space of their own. The others are scored
    one after the other through the space of the first that is held, before it is filled.
    """
    key = ("places", capacity, holds)
    found = layout.plans.found(key)
    return found or layout.plans.keep(key, _places(layout, capacity, holds), PLANS)


def _places(layout: Layout, capacity: int, holds: bool) -> Places:
    held = [unit for unit in layout.units if unit.trains and holds]

    def size(spec: Spec) -> int:
        return -(-capacity * spec.row * spec.output_dtype.itemsize // ALIGNMENT) * ALIGNMENT

    found: dict[str, tuple[int, int]] = {}
    spaces = [0]
    first = next(iter(held), None)
    for unit in sorted(layout.units, key=lambda unit: unit in held and unit is not first):
        space = 0
        if unit in held and unit is not first:
            space = len(spaces)
            spaces.append(0)
        offset = 0
        for name in unit.names:
            spec = layout.specs[name]
            if not spec.identity:
                found[name] = space, offset
                offset += size(spec)
        spaces[space] = max(spaces[space], offset)
    return found, spaces
