"""The chunk plan: how many rows at a time, in how many passes, at how many bytes. Printable before anything runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .problem import Problem, ProjectionSpec
from .select import Selection
from .types import accumulator_dtype

CUDA_CHUNK_BYTES = (1 << 29, 5 << 28)  # least and most; between them, as much as the gradients take anyway
CPU_CHUNK_BYTES = (1 << 27, 1 << 27)
CUDA_ROWS, CUDA_ROWS_BYTES = 2048, 5 << 29  # rows that wide outputs get beyond that, and what those may take
LOWEST_RUNG = 256
SMALL_BYTES = 1 << 26  # gradients up to this are held from forward to backward: one step is faster than two
KEEP_RATIO = 1.5  # outputs up to this many times the inputs are kept for backward
NARROW = 4096  # up to this width a reduction over a row does not split, and compiled steps take any number of rows
EAGER_BYTES = 24  # float32 temporaries of an uncompiled step, per output: the copy read, about four more, a gradient


@dataclass(frozen=True)
class Chunk:
    """Rows ``[start, stop)`` of the selection, at most ``chunk_rows`` of them."""

    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Block:
    """Groups ``[start, stop)`` whose loss is computed together, and the chunks that hold their rows.

    One chunk: a single pass. Several: scores first, then every chunk again.
    """

    start: int
    stop: int
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class ChunkPlan:
    """What a call will do. ``print(loss.plan(...))`` shows it.

    Byte counts are above the call's inputs: a chunk's outputs and workspace, the gradients as they are gathered (half
    precision in float32 sums), and as they are returned. ``peak_bytes`` is the largest moment of forward and backward.
    A plain compiled ``loss_fn`` may add what inductor keeps beside its inputs.
    """

    rows: int
    used_rows: int
    chunk_rows: int
    blocks: tuple[Block, ...]
    products: int
    rungs: tuple[int, ...] | None  # the row counts of compiled steps; None: any
    chunk_bytes: int
    gathered_bytes: int
    gradient_bytes: int
    peak_bytes: int
    compiled: bool
    deferred: bool  # gradients are taken in backward
    keeps_outputs: bool  # from forward to backward

    @property
    def chunks(self) -> int:
        return sum(len(block.chunks) for block in self.blocks)

    @property
    def passes(self) -> int:
        again = self.deferred and not self.keeps_outputs
        return 2 if again or any(len(block.chunks) > 1 for block in self.blocks) else 1

    def __str__(self) -> str:
        def size(n: int) -> str:
            return f"{n / 2**30:.2f} GiB" if n >= 2**28 else f"{n / 2**20:.2f} MiB"

        lines = [
            f"rows          {self.used_rows} of {self.rows} used",
            f"chunks        {self.chunks} of up to {self.chunk_rows} rows",
            f"passes        {self.passes}",
            f"products      {self.products} matrix products per chunk",
            f"steps         {'compiled' if self.compiled else 'uncompiled'}",
            f"chunk         {size(self.chunk_bytes)}",
            f"gathered      {size(self.gathered_bytes)}",
            f"gradients     {size(self.gradient_bytes)}",
            f"peak          {size(self.peak_bytes)}",
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class Settings:
    """How a caller wants it to run."""

    chunk_size: int | None = None
    max_chunk_bytes: int | None = None
    compiled: bool = True
    workspace_bytes: int = 0  # per output, beyond the outputs themselves

    def __post_init__(self) -> None:
        for name in ("chunk_size", "max_chunk_bytes"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"expected {name} to be a positive integer or None, got {value!r}")
        if not isinstance(self.compiled, bool):
            raise TypeError(f"expected compiled to be True or False, got {self.compiled!r}")


def gradient_in_place(spec: ProjectionSpec) -> bool:
    """The gradient of the outputs takes the place of the outputs: same dtype, and not the user's own tensor."""
    return not spec.identity and spec.output_dtype == spec.operand_dtype


def bytes_per_output(spec: ProjectionSpec, problem: Problem, settings: Settings, gathers: bool) -> int:
    """Bytes that an output takes while its chunk is worked on."""
    total = settings.workspace_bytes
    if not spec.identity:
        total += spec.output_dtype.itemsize
        if spec.wants_grad and not gradient_in_place(spec):
            total += spec.operand_dtype.itemsize
    elif gathers:  # else an identity's outputs are the user's tensor, and its gradients are what is returned
        total += 2 * spec.output_dtype.itemsize
    if not settings.compiled:
        total += EAGER_BYTES * problem.dtype.itemsize // 4
    elif problem.device.type == "cpu" and spec.wants_grad:  # see steps._store
        total += spec.operand_dtype.itemsize
    return total


def bytes_per_row(problem: Problem, settings: Settings, units: list[tuple[str, ...]], gathers: bool) -> int:
    """Bytes that one more row in a chunk costs, for the outputs of all units that are alive together."""
    trainable = frozen = 0
    for names in units:
        specs = [problem.projections[name] for name in names]
        total = sum(spec.width * bytes_per_output(spec, problem, settings, gathers) for spec in specs)
        if any(spec.wants_grad for spec in specs):
            trainable += total
        else:  # scored one after the other through one buffer
            frozen = max(frozen, total)
    return max(trainable, frozen)


def rows_per_chunk(problem: Problem, settings: Settings, per_row: int, rows: int) -> tuple[int, int]:
    """-> rows of a chunk, rows of the largest compiled step.

    As many as fit in the budget; or all of them, where that takes no more memory than chunks and their accumulators.
    The steps' sizes follow from the budget alone: a ragged batch must not change them.
    """
    if settings.chunk_size is not None:
        return settings.chunk_size, settings.chunk_size
    if per_row == 0:
        return max(rows, 1), max(rows, 1)
    least, largest = CUDA_CHUNK_BYTES if problem.device.type == "cuda" else CPU_CHUNK_BYTES
    several, one = gathered_bytes(problem, n_chunks=2), gathered_bytes(problem, n_chunks=1)
    budget = min(max(least, several), largest)
    if problem.device.type == "cuda":  # 768 rows of two float32 sides of 128k logits: 12% slower than 2048
        budget = max(budget, min(CUDA_ROWS * per_row, CUDA_ROWS_BYTES))
    budget = settings.max_chunk_bytes or budget
    most = max(budget // per_row, 1)
    # Whole tiles of the matrix product, and a ladder that divides evenly; but no cliff from 15 rows to one.
    step = next(n for n in (256, 16, 1) if most >= n)
    fitting = most // step * step
    if settings.max_chunk_bytes is None and rows * per_row + one <= budget + several:
        return max(rows, 1), fitting
    return fitting, fitting


def split(start: int, stop: int, size: int) -> tuple[Chunk, ...]:
    """Chunks of at most ``size`` rows; no rows are one empty chunk, which still tells what the scores are called."""
    if start == stop:
        return (Chunk(start, stop),)
    return tuple(Chunk(s, min(s + size, stop)) for s in range(start, stop, size))


def pack(selection: Selection, size: int, couples_batch: bool) -> tuple[Block, ...]:
    """Whole groups into chunks, in order; a group longer than a chunk, or a coupled batch, spreads over several."""
    n, groups = selection.n_rows, selection.n_groups
    lengths = selection.group_lengths()
    if couples_batch:
        return (Block(0, groups, split(0, n, size)),)
    if lengths is None:
        return tuple(Block(c.start, c.stop, (c,)) for c in split(0, n, size))
    if groups == 0:
        return (Block(0, 0, split(0, 0, size)),)
    ends = torch.cumsum(lengths, 0)
    blocks: list[Block] = []
    group, row = 0, 0
    while group < groups:
        stop = int(torch.searchsorted(ends, torch.tensor(row + size), right=True))
        stop = max(stop, group + 1)
        end = int(ends[stop - 1])
        blocks.append(Block(group, stop, split(row, end, size)))
        group, row = stop, end
    return tuple(blocks)


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


def ladder(problem: Problem, settings: Settings, step_rows: int) -> tuple[int, ...] | None:
    """The row counts that compiled steps are specialised to. None: natural ones, uncompiled or with dynamic rows.

    With a dynamic row count inductor splits a long reduction and drops its online softmax (measured at a 128k
    vocabulary: 2.1 against 1.5 ms), so wide outputs get a few fixed sizes. Narrow ones do not split.
    """
    if not settings.compiled or all(p.width <= NARROW for p in problem.projections.values()):
        return None
    rungs = [step_rows, -(-step_rows // 4), -(-step_rows // 16)]
    while rungs[-1] > LOWEST_RUNG:  # a chunk size far above the batch must not pad it to that size
        rungs.append(-(-rungs[-1] // 4))
    return tuple(dict.fromkeys(rungs))


def padded_rows(rows: int, rungs: tuple[int, ...] | None) -> int:
    if rungs is None:
        return rows
    return max((start + size for start, _, size in tiles(rows, rungs)), default=0)


def make_plan(
    problem: Problem,
    selection: Selection,
    settings: Settings,
    *,
    units: list[tuple[str, ...]],
    grouped: bool,
    coupled: bool,
) -> ChunkPlan:
    """Lay out the chunks and count what they take."""
    returned = sum(t.numel() * t.dtype.itemsize for t, w in zip(problem.tensors, problem.wants_grad, strict=True) if w)
    # Without products, taking gradients in backward costs little and holds nothing in between.
    deferred = coupled or (not grouped and problem.all_identity and returned > SMALL_BYTES)
    per_row = bytes_per_row(problem, settings, units, selection.order is not None)
    size, step_rows = rows_per_chunk(problem, settings, per_row, selection.n_rows)
    rungs = ladder(problem, settings, step_rows)
    blocks = pack(selection, size, coupled)
    largest = max((chunk.rows for block in blocks for chunk in block.chunks), default=0)
    chunk_bytes = padded_rows(largest, rungs) * per_row

    gathered = gathered_bytes(problem, sum(len(b.chunks) for b in blocks))
    products = [p for p in problem.projections.values() if not p.identity]
    # A Dense layer's outputs are as large as its inputs: in one chunk they may as well stay for backward.
    inputs = {i for p in products for i, _ in p.terms}
    input_bytes = sum(problem.tensors[i].numel() * problem.tensors[i].dtype.itemsize for i in inputs)
    output_bytes = selection.n_rows * sum(p.width * p.output_dtype.itemsize for p in products)
    keeps = coupled and len(blocks[0].chunks) == 1 and 0 < output_bytes <= KEEP_RATIO * input_bytes
    two_passes = (deferred and not keeps) or any(len(b.chunks) > 1 for b in blocks)
    arguments = bool(problem.wanting(problem.rows) or problem.wanting(problem.columns))
    forwards = 0
    for names in units:
        learns = any(problem.projections[name].wants_grad for name in names)
        # Formed again: everything that has a gradient in a second pass; what is frozen and not kept, for its arguments.
        again = (learns or arguments) if two_passes else (grouped and not learns and arguments)
        forwards += sum(
            len(problem.projections[n].terms) * (1 + again) for n in names if not problem.projections[n].identity
        )
    backwards = sum(problem.wants_grad[i] for p in products for term in p.terms for i in term if i is not None)
    # A gradient that is still to be scaled, or is wider than its tensor, is returned as a copy.
    copied = returned if not deferred or gathered > returned else 0
    cast = sum(
        problem.tensors[i].numel() * dtype.itemsize for i, dtype in problem.cast.items() if dtype != problem.dtypes[i]
    )
    peak = cast + max(chunk_bytes + gathered, gathered + copied)
    return ChunkPlan(
        rows=problem.n_rows,
        used_rows=selection.n_rows,
        chunk_rows=size,
        blocks=blocks,
        products=forwards + backwards,
        rungs=rungs,
        chunk_bytes=chunk_bytes,
        gathered_bytes=gathered,
        gradient_bytes=returned,
        peak_bytes=peak if problem.any_grad else chunk_bytes,
        compiled=settings.compiled,
        deferred=deferred,
        keeps_outputs=keeps,
    )


def gathered_bytes(problem: Problem, n_chunks: int) -> int:
    """What gradients.Gradients holds: float32 sums for half precision, but one product alone needs no sum."""
    terms = [term for p in problem.projections.values() for term in p.terms]
    weights = [w for _, w in terms]
    rowlike = {i for i, _ in terms} | set(problem.rows.values())
    total = 0
    for i, tensor in enumerate(problem.tensors):
        if not problem.wants_grad[i]:
            continue
        operand = problem.cast.get(i, tensor.dtype)
        alone = i in rowlike or (i in weights and n_chunks * weights.count(i) == 1)
        if alone and operand == tensor.dtype and operand != torch.float16:
            total += tensor.numel() * operand.itemsize
        else:
            total += tensor.numel() * accumulator_dtype(operand).itemsize
    return total
