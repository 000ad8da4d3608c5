"""MaxSim scores and their gradients against float64: on a GPU, else through Triton's interpreter."""

import pytest
import torch
from kernel_device import DEVICE, INTERPRETED, MARKS, exact

from chunked_embed import functional as CF
from chunked_embed.kernels import splade

pytest.importorskip("chunked_embed.kernels._triton_max_sim")

pytestmark = MARKS
DTYPE = torch.float16 if INTERPRETED else torch.bfloat16  # of which the interpreter multiplies the bits
BOUND = {torch.float16: 6e-4, torch.bfloat16: 4e-3}  # of a gradient that is rounded twice

# Tokens of queries and of documents, a width: documents that end within a group, with one and beyond a tile, without
# tokens and several in a tile; queries of one token, of none and of more than a tile of a sum.
CASES = {
    "short": ([3, 1, 2], [3, 1, 2, 9], 24),
    "in several tiles": ([32, 5, 0, 40], [5, 0, 16, 70, 1, 0, 33], 40),
    "odd": ([7, 33], [17, 66, 4], 33),
} | ({} if INTERPRETED else {"long": ([32] * 60 + [5, 64], [200, 256, 128, 1000, 3] * 9, 128)})


SMALL = {
    "_triton_max_sim": {"QUERIES": 16, "DOCUMENTS": 16, "GATHERED": 16, "OWN": 16, "COLUMNS": 16, "PACKED": 16},
    "_triton_splade": {"COLUMNS": 32, "ROWS": 32, "FEW": 16, "TILE": 32, "ENTRIES": 16, "MARKED": 32, "LISTED": 64},
}


@pytest.fixture(autouse=True, params=["fused", "by columns"])
def way(request, monkeypatch):
    """In the interpreter, more tiles of fewer numbers. What is wider goes by columns."""
    if request.param == "by columns":
        monkeypatch.setattr("chunked_embed.kernels.max_sim.WIDEST", 0)
    for module, sizes in SMALL.items() if INTERPRETED else ():
        for name, size in sizes.items():
            monkeypatch.setattr(f"chunked_embed.kernels.{module}.{name}", size)


def side(lengths, width, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(len(lengths), max(lengths), width, generator=generator).mul_(0.4)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return exact(tokens).to(dtype).to(DEVICE).requires_grad_(), mask.to(DEVICE)


def truth(queries, query_mask, documents, document_mask):
    queries, documents = (x.detach().double().requires_grad_() for x in (queries, documents))
    z = torch.einsum("qsh,dth->qdst", queries, documents).masked_fill(~document_mask[None, :, None], -torch.inf)
    scores = z.max(3).values.masked_fill(~query_mask[:, None], 0.0).sum(2)
    return scores.masked_fill(~document_mask.any(1), -1e9), [queries, documents]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", list(BOUND) if not INTERPRETED else [DTYPE])
@pytest.mark.parametrize("chunked", [False, True])
def test_equals_float64(name, dtype, chunked, monkeypatch):
    of_queries, of_documents, width = CASES[name]
    q, q_mask = side(of_queries, width, dtype, 0)
    d, d_mask = side(of_documents, width, dtype, 1)
    if chunked:
        monkeypatch.setattr("chunked_embed.functional.late_interaction.KEPT", {DEVICE: 0})
        monkeypatch.setattr("chunked_embed.functional.late_interaction.CPU_KEPT", 0)
    found = CF.max_sim(q, d, q_mask, d_mask, max_chunk_bytes=1 if chunked else None)
    expected, exact = truth(q, q_mask, d, d_mask)
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=2e-5)
    upstream = torch.randn(*found.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    given = torch.autograd.grad(found, [q, d], upstream)
    for a, b in zip(given, torch.autograd.grad(expected, exact, upstream.double()), strict=True):
        assert (a.double() - b).norm() <= BOUND[dtype] * b.norm(), (a.double() - b).norm() / b.norm()


@pytest.mark.parametrize("order", [(1, 2, 0), (0, 2, 1)])
@pytest.mark.parametrize("n", [1, 3])
def test_embeddings_with_other_strides(order, n):
    """Of which a gradient has a layout of its own: those of tensors (H, N, Q), whose tokens merge without a copy."""
    given = [side([length] * n, 16, DTYPE, seed) for seed, length in enumerate((3, 5))]
    back = [order.index(i) for i in range(3)]
    (q, q_mask), (d, d_mask) = ((x.detach().permute(back).contiguous().permute(order), mask) for x, mask in given)
    found = CF.max_sim(q.requires_grad_(), d.requires_grad_(), q_mask, d_mask)
    expected, exact = truth(q, q_mask, d, d_mask)
    for a, b in zip(torch.autograd.grad(found.sum(), [q, d]), torch.autograd.grad(expected.sum(), exact), strict=True):
        assert (a.double() - b).norm() <= BOUND[DTYPE] * b.norm()


def test_the_first_of_equal_tokens_has_the_gradient():
    q, q_mask = side([5, 3], 16, DTYPE, 0)
    d, d_mask = side([40, 30], 16, DTYPE, 1)
    with torch.no_grad():
        d[:, 3] *= 4
        d[:, 19] = d[:, 7] = d[:, 3]
        d[1, 29] = d[1, 3]
    found = CF.max_sim(q, d, q_mask, d_mask)
    (grad,) = torch.autograd.grad(found.sum(), d)
    assert (grad[:, [7, 19]] == 0).all() and (grad[1, 29] == 0).all()
    assert (grad[:, 3] != 0).any()


@pytest.mark.parametrize("place", [0, 1])
def test_nan_is_not_hidden(place):
    given = [side([5, 3], 16, DTYPE, 0), side([20, 30, 4], 16, DTYPE, 1)]
    with torch.no_grad():
        given[place][0][1, 2, 3] = torch.nan
    found = CF.max_sim(given[0][0], given[1][0], given[0][1], given[1][1])
    assert found.select(place, 1).isnan().all() and not found.select(place, 0)[0].isnan()


def test_runs_here():
    assert splade.serves(DTYPE, torch.device(DEVICE))
