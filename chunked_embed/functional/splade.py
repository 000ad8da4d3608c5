"""SPLADE: the outputs of a masked language model's head, pooled over the tokens of each text."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..engine.autograd import once_only
from ..engine.call import autocast_dtype, operand_dtype, refuse_transforms
from ..engine.compile import outside_compile
from ..kernels import splade as kernels
from .arguments import check_mask, check_trained

POOLINGS = ("max", "sum")
ACTIVATIONS = tuple(kernels.LOG1P)

BUDGET = {"cuda": 1 << 28}  # bytes of outputs at a time, where they are formed
CPU_BUDGET = 1 << 26


class _How(NamedTuple):
    pooling: str
    activation: str
    operands: torch.dtype
    result: torch.dtype
    budget: int
    learns: bool


class _Pool(torch.autograd.Function):
    """Of the largest outputs, they and their places are kept; of sums nothing is."""

    @staticmethod
    def forward(
        ctx: Any, how: _How, texts: kernels.Texts, hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.how, ctx.texts, ctx.given = how, texts, (hidden.shape, hidden.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            x, w = texts.rows_of(hidden).to(how.operands), weight.to(how.operands)
            at = None
            if how.pooling == "sum":
                pooled = found = kernels.sum_pool(x, w, bias, texts, how.budget, how.activation)
            else:
                pooled, at = kernels.max_pool(x, w, bias, texts, how.budget, how.learns)
                found = kernels.activated(pooled, how.activation)
        if how.learns:
            ctx.save_for_backward(x, weight, bias, *(() if at is None else (pooled, at)))
        return found.to(how.result)

    @staticmethod
    @once_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        how, texts = ctx.how, ctx.texts
        x, weight, bias, *kept = ctx.saved_tensors
        (shape, dtype), wants = ctx.given, ctx.needs_input_grad[2:]
        with torch.autocast(grad.device.type, enabled=False):
            w = weight.to(how.operands)
            hidden_out = torch.zeros(shape, dtype=dtype, device=x.device) if wants[0] else None
            weight_out = torch.empty(weight.shape, dtype=weight.dtype, device=x.device) if wants[1] else None
            bias_out = torch.empty(bias.shape, dtype=bias.dtype, device=x.device) if wants[2] else None
            upstream = grad.to(kernels.wide(how.operands))
            if how.pooling == "sum":
                outs = hidden_out, weight_out, bias_out
                kernels.sum_gradients(upstream, x, w, bias, texts, how.budget, how.activation, *outs)
            else:
                pooled, at = kept
                g = kernels.through_activation(upstream, pooled, how.activation)
                if bias_out is not None:
                    bias_out.copy_(g.sum(0))
                if hidden_out is not None or weight_out is not None:
                    kernels.max_gradients(g, at, x, w, texts, how.budget, hidden_out, weight_out)
        return None, None, hidden_out, weight_out, bias_out


@outside_compile
def splade_pool(
    hidden: Tensor,  # (N, L, H), or (T, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None = None,  # (V,)
    segments: Tensor | None = None,  # (T,)
    mask: Tensor | None = None,  # (N, L)
    *,
    n_texts: int | None = None,
    pooling: str = "max",
    activation: str = "relu",
    dtype: torch.dtype | None = None,
    max_chunk_bytes: int | None = None,
) -> Tensor:  # (N, V)
    """The embedding of a text over a vocabulary: ``max over tokens of log1p(relu(hidden @ weight.T + bias))``, or their
    sum. The outputs of tokens are never held, forward or backward, and padding is dropped before any product.

    Gradients of the largest are those of one token for each text and column, the first of equal ones, as torch's are.
    They are sums over the entries that are not zero, in an order that is always the same. ``pooling="sum"`` forms the
    outputs again in backward.

    Source: Formal et al., "SPLADE", arXiv 2107.05720 ("sum"), and "SPLADE v2", arXiv 2109.10086 ("max"), as in
    ``sentence_transformers.sparse_encoder.modules.SpladePooling``.

    Args:
        hidden: last states of an encoder, behind the transform of its head. Every row has its own length where a
            ``mask`` or ``segments`` say so.
        weight, bias: of the head, tied to the embeddings or not. The bias is added in float32.
        segments: integers in any order, the text of each token; a negative one drops the token. For ``(T, H)``.
        mask: bool or integers; a token that has False or zero is dropped, wherever it stands. For ``(N, L, H)``, where
            None takes all tokens.
        n_texts: how many texts ``segments`` tell of. Without it the largest id tells, and then no text may be empty.
            The embedding of a text without tokens is zero.
        pooling: "max" or "sum".
        activation: "relu" is ``log1p(relu(.))``, "log1p_relu" another ``log1p`` of that (arXiv 2504.14839): the
            library's names.
        dtype: of the result. None: that of ``hidden``, and float32 under autocast. All up to it is float32 (float64 for
            float64 inputs).
        max_chunk_bytes: of outputs at a time where they are formed by chunks of tokens: without kernels, and in the
            backward of a sum.

    Raises:
        ValueError: shapes or devices that do not fit, neither mask nor segments where they are needed, ids that skip or
            overrun, an unknown pooling or activation.
        TypeError: tensors that are not floating point or of mixed dtypes, a mask or segments that are floating point.

    Example:
        >>> import torch
        >>> from chunked_embed import functional as CF
        >>> hidden, head = torch.randn(4, 12, 16, requires_grad=True), torch.nn.Linear(16, 100)
        >>> mask = torch.arange(12) < torch.tensor([[12], [3], [7], [5]])
        >>> embeddings = CF.splade_pool(hidden, head.weight, head.bias, mask=mask)
        >>> embeddings.shape
        torch.Size([4, 100])
        >>> (embeddings @ embeddings.T).sum().backward()
        >>> packed, text = hidden[mask], mask.nonzero()[:, 0]  # the same without padding
        >>> torch.equal(CF.splade_pool(packed, head.weight, head.bias, text), embeddings)
        True
    """
    refuse_transforms()
    checks.choice("pooling", pooling, POOLINGS)
    checks.choice("activation", activation, ACTIVATIONS)
    checks.floating_dtype_or_none("dtype", dtype)
    checks.integer_or_none("max_chunk_bytes", max_chunk_bytes, low=1)
    operands = _checked(hidden, weight, bias)
    ids, n = _texts_of_rows(hidden, segments, mask, n_texts)
    device = hidden.device
    rows = hidden.flatten(0, -2)
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias))
    grouped = kernels.serves(operands, device) and 0 not in (*rows.shape, n)
    texts, over = kernels.texts(ids, n, grouped)
    _check_ids(texts, over, n_texts is None and segments is not None)
    wide = autocast_dtype(device) is not None and hidden.dtype != torch.float64
    result = dtype or (torch.float32 if wide else hidden.dtype)
    budget = max_chunk_bytes or BUDGET.get(device.type, CPU_BUDGET)
    how = _How(pooling, activation, operands, result, budget, learns)
    return _Pool.apply(how, texts, rows, weight, bias)


def _checked(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype:
    """-> of the product's operands."""
    check_trained("hidden", hidden)
    if hidden.dim() not in (2, 3):
        raise ValueError(f"expected hidden of shape (N, L, H), or (T, H), got {tuple(hidden.shape)}")
    check_trained("weight", weight, hidden.device)
    checks.tensor("weight", weight, ("V", hidden.shape[-1]))
    if not len(weight):
        raise ValueError(f"expected weight (V, H) of at least one output, got {tuple(weight.shape)}")
    if bias is not None:
        checks.tensor("bias", check_trained("bias", bias, hidden.device), (len(weight),))
    operands = operand_dtype(hidden.dtype, hidden.device)
    if autocast_dtype(hidden.device) is None or torch.float64 in (hidden.dtype, weight.dtype):
        checks.one_dtype("hidden and weight", {"hidden": hidden.dtype, "weight": weight.dtype})
    return operands


def _texts_of_rows(
    hidden: Tensor, segments: Tensor | None, mask: Tensor | None, n_texts: int | None
) -> tuple[Tensor, int]:
    """-> the text of each row, negative where it is dropped, and how many there are."""
    checks.integer_or_none("n_texts", n_texts, low=0)
    device = hidden.device
    if hidden.dim() == 3:
        if segments is not None or n_texts is not None:
            raise ValueError("expected a mask (N, L), or None, with hidden (N, L, H), got segments or n_texts")
        n, length, _ = hidden.shape
        ids = torch.arange(n, device=device)[:, None].expand(n, length)
        if mask is not None:
            ids = ids.masked_fill(check_mask("mask", mask, (n, length), device) == 0, -1)
        return ids.flatten(), n
    if segments is None or mask is not None:
        raise ValueError("expected segments (T,), the text of each token, and no mask with hidden (T, H)")
    checks.tensor("segments", segments, (len(hidden),), device=device, kind="integer")
    segments = segments.long()
    if n_texts is None:
        n_texts = int(segments.max()) + 1 if len(segments) else 0
        if n_texts > len(segments):
            raise ValueError(
                f"expected segments without gaps, got id {n_texts - 1} among {len(segments)} tokens; where a text may "
                "be empty, say how many there are by n_texts"
            )
    return segments, max(n_texts, 0)


def _check_ids(texts: kernels.Texts, over: int, none_empty: bool) -> None:
    if over:
        raise ValueError(f"expected segments below {len(texts.lengths)}, the number of texts, got {over} that are not")
    if none_empty and 0 in texts.lengths:
        raise ValueError(
            f"expected segments without gaps, got no token for text {texts.lengths.index(0)} of {len(texts.lengths)}; "
            "where a text may be empty, say how many there are by n_texts"
        )
