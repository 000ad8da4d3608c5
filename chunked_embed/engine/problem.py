"""A call, checked and flattened: which tensors there are, which role each plays, which of them want a gradient.

Everything here happens before any work. Tensors live in one list (what autograd sees); everything else refers to them
by their position in it, so that the same structure serves the forward pass and a recomputing backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .types import HALF, Projection, Projections, Tensors, accumulator_dtype

ONLY = "outputs"  # the name of a projection that was given alone, not in a dict


@dataclass(frozen=True)
class ProjectionSpec:
    """A projection by the positions of its tensors."""

    name: str
    terms: tuple[tuple[int, int | None], ...]  # (input, weight); weight None: the identity
    bias: int | None
    width: int
    operand_dtype: torch.dtype
    output_dtype: torch.dtype
    wants_grad: bool  # any of its tensors does: the gradient of its outputs is needed

    @property
    def identity(self) -> bool:
        return self.terms[0][1] is None


@dataclass
class Problem:
    """The structure of one call. ``tensors`` are what autograd sees: flattened to ``(M, ...)`` where row-aligned."""

    leading: tuple[int, ...]  # the shape of the user's rows; M is its product
    device: torch.device
    tensors: list[Tensor]  # until the call runs; then autograd alone holds them
    dtypes: list[torch.dtype]
    wants_grad: list[bool]
    cast: dict[int, torch.dtype]  # operands that autocast converts
    projections: dict[str, ProjectionSpec]
    rows: dict[str, int]
    columns: dict[str, int]
    single: bool  # one projection, given alone: loss functions see the tensor and not a dict
    dtype: torch.dtype  # of the loss: float32, or float64 for float64 operands

    @property
    def n_rows(self) -> int:
        return math.prod(self.leading)

    @property
    def any_grad(self) -> bool:
        return any(self.wants_grad)

    def wanting(self, names: dict[str, int]) -> tuple[str, ...]:
        return tuple(name for name, i in names.items() if self.wants_grad[i])

    @property
    def has_float16(self) -> bool:
        return any(p.operand_dtype == torch.float16 for p in self.projections.values())

    @property
    def all_identity(self) -> bool:
        """There is no product to save by taking gradients while the outputs are there."""
        return all(p.identity for p in self.projections.values())

    def release(self) -> list[Tensor]:
        """Hand the tensors over: a loss that is kept for logging must not keep the batch alive."""
        tensors, self.tensors = self.tensors, []
        return tensors

    def operands(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Detached tensors in the dtype of the products. A tensor that autocast converts is converted once."""
        return [t.detach().to(self.cast.get(i, t.dtype)) for i, t in enumerate(tensors)]


def build(
    projections: Projections, rows: Tensors | None, columns: Tensors | None, output_dtype: torch.dtype | None
) -> Problem:
    """Check and flatten a call.

    Raises:
        TypeError: not a Projection or a tensor, mixed or integer dtypes.
        ValueError: shapes or devices that do not fit, an empty batch.
    """
    _refuse_transforms()
    single = isinstance(projections, Projection)
    if not isinstance(projections, (Projection, Mapping)):
        raise TypeError(f"expected a Projection or a dict of them, got {type(projections).__name__}")
    named = {ONLY: projections} if isinstance(projections, Projection) else dict(projections)
    if not named:
        raise ValueError("expected at least one projection, got an empty dict")
    for name, projection in named.items():
        if not isinstance(projection, Projection):
            raise TypeError(f"expected a Projection for {name!r}, got {type(projection).__name__}")
    for kind, given in (("rows", rows), ("columns", columns)):
        if given is not None and not isinstance(given, Mapping):
            raise TypeError(f"expected {kind} to be a dict of tensors by name, got {type(given).__name__}")
    first = next(iter(named.values())).input
    _expect_tensor("input", first)
    builder = _Builder(tuple(first.shape[:-1]), first.device)
    if math.prod(builder.leading) == 0 or first.dim() < 2:
        raise ValueError(f"expected an input of shape (..., H) with at least one row, got {tuple(first.shape)}")
    specs = {name: builder.projection(name, p, output_dtype) for name, p in named.items()}
    row_slots = {name: builder.row(name, t) for name, t in (rows or {}).items()}
    widths = {p.width for p in specs.values()}
    column_slots = {name: builder.column(name, t, widths) for name, t in (columns or {}).items()}
    wide = any(p.operand_dtype == torch.float64 for p in specs.values())
    grad = torch.is_grad_enabled()
    return Problem(
        leading=builder.leading,
        device=first.device,
        tensors=builder.tensors,
        dtypes=[t.dtype for t in builder.tensors],
        wants_grad=[grad and t.requires_grad for t in builder.tensors],
        cast=builder.cast,
        projections=specs,
        rows=row_slots,
        columns=column_slots,
        single=single,
        dtype=torch.float64 if wide else torch.float32,
    )


class _Builder:
    def __init__(self, leading: tuple[int, ...], device: torch.device) -> None:
        self.leading = leading
        self.device = device
        self.tensors: list[Tensor] = []
        self.cast: dict[int, torch.dtype] = {}
        self.positions: dict[tuple[int, str], int] = {}
        autocast = torch.is_autocast_enabled(device.type)
        self.autocast_dtype = torch.get_autocast_dtype(device.type) if autocast else None

    def slot(self, role: str, given: Tensor) -> int:
        """The position of a tensor; the same tensor in the same role (a shared weight) has one position."""
        key = (id(given), role)
        if key not in self.positions:
            self.positions[key] = len(self.tensors)
            rowlike = role in ("input", "identity", "row")
            flat = given.flatten(0, len(self.leading) - 1) if rowlike else given
            self.tensors.append(flat)
        return self.positions[key]

    def operand(self, role: str, name: str, given: Tensor) -> tuple[int, torch.dtype]:
        _expect_tensor(name, given, self.device)
        if not given.is_floating_point():
            raise TypeError(f"expected {name} to be floating point, got {given.dtype}")
        position = self.slot(role, given)
        dtype = given.dtype
        if self.autocast_dtype is not None and dtype != torch.float64:
            dtype = self.autocast_dtype
            self.cast[position] = dtype
        return position, dtype

    def projection(self, name: str, projection: Projection, output_dtype: torch.dtype | None) -> ProjectionSpec:
        label = "" if name == ONLY else f" of projection {name!r}"
        weight = projection.weight
        self._rowlike(f"input{label}", projection.input)
        if weight is None:
            return self._identity(name, label, projection)
        if not all(isinstance(term, tuple) and len(term) == 2 for term in projection.extra):
            raise TypeError(f"expected extra{label} to be a tuple of (input, weight) pairs")
        pairs = ((projection.input, weight), *projection.extra)
        terms: list[tuple[int, int | None]] = []
        dtypes: dict[str, torch.dtype] = {}
        for n, (x, w) in enumerate(pairs):
            suffix = label if n == 0 else f" of extra term {n}{label}"
            self._rowlike(f"input{suffix}", x)
            _expect_tensor(f"weight{suffix}", w, self.device)
            if w.dim() != 2 or w.shape[1] != x.shape[-1] or w.shape[0] != weight.shape[0] or 0 in w.shape:
                rows = "V" if n == 0 else str(weight.shape[0])
                raise ValueError(
                    f"expected weight{suffix} of shape ({rows}, {x.shape[-1]}) for input {tuple(x.shape)}, "
                    f"got {tuple(w.shape)}"
                )
            x_position, dtypes[f"input{suffix}"] = self.operand("input", f"input{suffix}", x)
            w_position, dtypes[f"weight{suffix}"] = self.operand("weight", f"weight{suffix}", w)
            terms.append((x_position, w_position))
        bias = None
        if projection.bias is not None:
            _expect_tensor(f"bias{label}", projection.bias, self.device)
            if projection.bias.shape != weight.shape[:1]:
                raise ValueError(
                    f"expected bias{label} of shape ({weight.shape[0]},), got {tuple(projection.bias.shape)}"
                )
            bias, dtypes[f"bias{label}"] = self.operand("bias", f"bias{label}", projection.bias)
        if len(set(dtypes.values())) > 1:
            raise TypeError(
                "expected the tensors of a projection to have one dtype (or autocast to make it one), got "
                + ", ".join(f"{key} {dtype}" for key, dtype in dtypes.items())
            )
        dtype = next(iter(dtypes.values()))
        widened = output_dtype is not None and dtype in HALF
        used = [i for term in terms for i in term if i is not None] + ([] if bias is None else [bias])
        return ProjectionSpec(
            name=name,
            terms=tuple(terms),
            bias=bias,
            width=weight.shape[0],
            operand_dtype=dtype,
            output_dtype=accumulator_dtype(dtype) if widened else dtype,
            wants_grad=self._any_grad(used),
        )

    def _identity(self, name: str, label: str, projection: Projection) -> ProjectionSpec:
        if projection.bias is not None or projection.extra:
            raise ValueError(f"expected no bias and no extra terms{label} without a weight")
        x = projection.input
        if not x.is_floating_point():
            raise TypeError(f"expected input{label} to be floating point, got {x.dtype}")
        position = self.slot("identity", x)  # there is no product to cast for
        return ProjectionSpec(
            name, ((position, None),), None, x.shape[-1], x.dtype, x.dtype, self._any_grad([position])
        )

    def row(self, name: str, given: Tensor) -> int:
        _expect_tensor(f"rows[{name!r}]", given, self.device)
        self._rowlike(f"rows[{name!r}]", given, feature_dims=0)
        return self.slot("row", given)

    def column(self, name: str, given: Tensor, widths: set[int]) -> int:
        _expect_tensor(f"columns[{name!r}]", given, self.device)
        if given.dim() == 0 or given.shape[0] not in widths:
            raise ValueError(
                f"expected columns[{name!r}] of shape (V, ...) with V one of {sorted(widths)}, got {tuple(given.shape)}"
            )
        return self.slot("column", given)

    def _rowlike(self, name: str, given: Tensor, feature_dims: int = 1) -> None:
        _expect_tensor(name, given, self.device)
        n = len(self.leading)
        if tuple(given.shape[:n]) != self.leading or given.dim() < n + feature_dims:
            shape = ", ".join(map(str, self.leading))
            raise ValueError(f"expected {name} of shape ({shape}, ...), got {tuple(given.shape)}")
        if feature_dims and (given.dim() != n + 1 or given.shape[-1] == 0):
            shape = ", ".join(map(str, self.leading))
            raise ValueError(f"expected {name} of shape ({shape}, H), got {tuple(given.shape)}")

    def _any_grad(self, positions: Sequence[int]) -> bool:
        return torch.is_grad_enabled() and any(self.tensors[i].requires_grad for i in positions)


def _expect_tensor(name: str, given: object, device: torch.device | None = None) -> None:
    if not isinstance(given, Tensor):
        raise TypeError(f"expected {name} to be a tensor, got {type(given).__name__}")
    if device is not None and given.device != device:
        raise ValueError(f"expected {name} on {device}, got {given.device}")


def _refuse_transforms() -> None:
    if torch.compiler.is_exporting():
        raise RuntimeError("a chunked loss cannot be exported: its chunk plan depends on the batch")
    if torch._C._functorch.maybe_current_level() is not None:
        raise RuntimeError(
            "a chunked loss computes its gradients in the forward pass: torch.func transforms (grad, vmap, jvp, ...) "
            "do not apply. Use autograd: loss.backward() or torch.autograd.grad"
        )
