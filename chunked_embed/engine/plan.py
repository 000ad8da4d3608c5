"""The chunk plan: how many rows at a time, in how many passes, at how many bytes. Printable before anything runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .problem import Problem, ProjectionSpec
from .select import Selection
from .types import HALF, accumulator_dtype

CUDA_CHUNK_BYTES = 1 << 30
CPU_CHUNK_BYTES = 1 << 27
NARROW = 4096  # up to this width a reduction over a row does not split, and compiled steps take any number of rows
EAGER_BYTES = (
    24  # an uncompiled step's float32 temporaries for each output: the copy read, about four more, the gradient
)


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

    Byte counts are peaks above the call's inputs, returned gradients included; ``peak_bytes`` is the largest moment of
    forward and backward together. A plain compiled ``loss_fn`` may add what inductor keeps beside its inputs.
    """

    rows: int
    used_rows: int
    chunk_rows: int
    blocks: tuple[Block, ...]
    products: int
    rungs: tuple[int, ...] | None  # the row counts of compiled steps; None: any
    chunk_bytes: int
    accumulator_bytes: int
    gradient_bytes: int
    peak_bytes: int
    compiled: bool
    deferred: bool

    @property
    def chunks(self) -> int:
        return sum(len(block.chunks) for block in self.blocks)

    @property
    def passes(self) -> int:
        return 2 if self.deferred or any(len(block.chunks) > 1 for block in self.blocks) else 1

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
            f"accumulators  {size(self.accumulator_bytes)}",
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


def rows_per_chunk(problem: Problem, settings: Settings, per_row: int) -> int:
    if settings.chunk_size is not None:
        return settings.chunk_size
    default = CUDA_CHUNK_BYTES if problem.device.type == "cuda" else CPU_CHUNK_BYTES
    if per_row == 0:
        return problem.n_rows
    fitting = (settings.max_chunk_bytes or default) // per_row
    step = 256 if fitting >= 256 else 16  # whole tiles of the matrix product, and a ladder that divides evenly
    return max(fitting // step * step, 1)


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


def ladder(problem: Problem, settings: Settings, chunk_rows: int) -> tuple[int, ...] | None:
    """The row counts that compiled steps are specialised to. None: natural ones, uncompiled or with dynamic rows.

    With a dynamic row count inductor splits a long reduction and drops its online softmax (measured at a 128k
    vocabulary: 2.1 against 1.5 ms), so wide outputs get three fixed sizes. Narrow ones do not split.
    """
    if not settings.compiled or all(p.width <= NARROW for p in problem.projections.values()):
        return None
    return tuple(sorted({chunk_rows, -(-chunk_rows // 4), -(-chunk_rows // 16)}, reverse=True))


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
    couples_batch: bool,
    deferred: bool,
) -> ChunkPlan:
    """Lay out the chunks and count what they take."""
    per_row = bytes_per_row(problem, settings, units, selection.order is not None)
    size = rows_per_chunk(problem, settings, per_row)
    rungs = ladder(problem, settings, size)
    blocks = pack(selection, size, couples_batch)
    largest = max((chunk.rows for block in blocks for chunk in block.chunks), default=0)
    chunk_bytes = padded_rows(largest, rungs) * per_row

    accumulators, gradients = _gradient_bytes(problem, sum(len(b.chunks) for b in blocks))
    two_passes = deferred or any(len(b.chunks) > 1 for b in blocks)
    forwards = sum(len(p.terms) for p in problem.projections.values() if not p.identity)
    if two_passes:  # the outputs that a gradient is taken of are formed twice
        forwards += sum(len(p.terms) for p in problem.projections.values() if not p.identity and p.wants_grad)
    backwards = sum(
        problem.wants_grad[i]
        for p in problem.projections.values()
        if not p.identity
        for t in p.terms
        for i in t  # type: ignore[index]
    )
    scaled = 0 if deferred else gradients  # backward scales out of place
    peak = max(chunk_bytes + accumulators + _row_gradient_bytes(problem), accumulators + gradients, gradients + scaled)
    return ChunkPlan(
        rows=problem.n_rows,
        used_rows=selection.n_rows,
        chunk_rows=size,
        blocks=blocks,
        products=forwards + backwards,
        rungs=rungs,
        chunk_bytes=chunk_bytes,
        accumulator_bytes=accumulators,
        gradient_bytes=gradients,
        peak_bytes=peak if problem.any_grad else chunk_bytes,
        compiled=settings.compiled,
        deferred=deferred,
    )


def _row_gradient_bytes(problem: Problem) -> int:
    """Gradients of row-aligned tensors are held from the first chunk on."""
    rowlike = {i for p in problem.projections.values() for i, _ in p.terms} | set(problem.rows.values())
    return sum(_storage_bytes(problem, i) for i in rowlike if problem.wants_grad[i])


def _storage_bytes(problem: Problem, i: int) -> int:
    tensor = problem.tensors[i]
    operand = problem.cast.get(i, tensor.dtype)
    wide = operand == torch.float16 or (operand in HALF and tensor.dtype not in HALF)
    return tensor.numel() * (4 if wide else operand.itemsize)


def _gradient_bytes(problem: Problem, n_chunks: int) -> tuple[int, int]:
    """(accumulators that are not themselves returned, gradients that are)."""
    accumulators = gradients = 0
    shared = [i for p in problem.projections.values() for _, i in p.terms if i is not None]
    for i, tensor in enumerate(problem.tensors):
        if not problem.wants_grad[i]:
            continue
        gradients += tensor.numel() * tensor.dtype.itemsize
        once = n_chunks * max(shared.count(i), 1) == 1
        if i in shared and tensor.dtype in HALF and not (once and tensor.dtype != torch.float16):
            accumulators += tensor.numel() * accumulator_dtype(tensor.dtype).itemsize
    return accumulators, gradients
