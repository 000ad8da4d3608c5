"""Launches: a compiled kernel serves what it was compiled for, and nothing else."""

import os
import random
import sys
from importlib import import_module
from itertools import product
from types import SimpleNamespace

import pytest
import torch

from chunked_embed import functional as CF
from chunked_embed.functional import attention_steps, product_steps
from chunked_embed.kernels import _launch
from chunked_embed.kernels._launch import Launched
from chunked_embed.kernels.scale import scale_

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
compiled = pytest.mark.skipif(INTERPRETED, reason="the interpreter is launched as it is")


class Kernel:
    """Stands in for a function of Triton: says for what it is compiled, and with what it is launched."""

    arg_names = ("x", "n", "factor", "WIDE", "BLOCK")

    def __init__(self, *unspecialised):
        self.params = [SimpleNamespace(do_not_specialize=name in unspecialised) for name in self.arg_names]
        self.compilations = []
        self.launches = []

    def __getitem__(self, grid):
        def compile_and_launch(*given, **constants):
            self.compilations.append(given)
            return self

        def launch(*given):
            self.launches.append((grid, given))

        return compile_and_launch if len(grid) < 3 else launch


@compiled
def test_what_differs_is_compiled_anew():
    kernel = Kernel()
    launched = Launched(kernel)
    x, constants = torch.zeros(64), {"BLOCK": 32, "WIDE": True, "num_warps": 4}
    calls = [
        (x, 32, 0.5, constants),
        (x[1:], 32, 0.5, constants),  # at no multiple of 16 bytes
        (x.double(), 32, 0.5, constants),
        (x, 33, 0.5, constants),  # no multiple of 16
        (x, 1, 0.5, constants),
        (x, 1 << 40, 0.5, constants),
        (x, 32, x, constants),
        (x, 32, SimpleNamespace(base=x, block_shape=[8, 8]), constants),  # a descriptor
        (x, 32, SimpleNamespace(base=x.double(), block_shape=[8, 8]), constants),
        (x, 32, SimpleNamespace(base=x, block_shape=[8, 16]), constants),
        (x, 32, 0.5, constants | {"BLOCK": 64}),
        (x, 32, 0.5, constants | {"num_warps": 8}),
    ]
    for again in range(3):
        for *given, named in calls:
            launched[(7,)](*given, **named)
            if again:
                grid, found = kernel.launches[-1]
                assert grid[:3] == (7, 1, 1) and found[3:] == (True, named["BLOCK"])
                assert found[0] is given[0] and found[1:3] == tuple(given[1:])
    assert len(kernel.compilations) == len(calls)
    assert len(kernel.launches) == 2 * len(calls)
    # Other numbers of the kind are served by what is there.
    launched[(2,)](x[4:], 48, 0.7, **constants)
    assert len(kernel.compilations) == len(calls) and kernel.launches[-1][1][1:3] == (48, 0.7)


@compiled
def test_what_triton_does_not_specialise():
    kernel = Kernel("x", "n")
    launched = Launched(kernel)
    x = torch.zeros(64)
    for given in (x, x[1:]):
        for n in (1, 16, 33):
            launched[(1,)](given, n, 0.5, WIDE=True, BLOCK=32)
    assert len(kernel.compilations) == 1 and len(kernel.launches) == 5
    launched[(1,)](x, 1 << 31, 0.5, WIDE=True, BLOCK=32)
    launched[(1,)](x.double(), 1, 0.5, WIDE=True, BLOCK=32)
    assert len(kernel.compilations) == 3


@compiled
@pytest.mark.parametrize("specialised", [True, False])
def test_kinds_are_those_of_triton(specialised):
    """Two arguments are of one kind where Triton compiles one kernel for them, and nowhere else."""
    pytest.importorskip("triton")
    jit = import_module("triton.runtime.jit")
    if not hasattr(jit, "native_specialize_impl"):
        pytest.skip("another Triton, which says it in another way")
    backend = import_module("triton.backends.nvidia.compiler").CUDABackend
    described = import_module("triton.tools.tensor_descriptor").TensorDescriptor.from_tensor
    x = torch.zeros(64, 64)
    given = [x, x[:, 1:], x.bfloat16(), x.half(), 0, 1, 2, 16, 33, 2**31 - 1, 2**31, 2**40 + 1, 0.5, 1.0, None, True]
    given += [described(t, tile) for t in (x, x.bfloat16(), x.half()) for tile in ([16, 16], [32, 16], [16, 32])]
    kind = _launch._kind if specialised else _launch._any_kind
    theirs = [jit.native_specialize_impl(backend, value, False, specialised, specialised) for value in given]
    for (a, of_a), (b, of_b) in product(zip(given, theirs), repeat=2):
        assert (kind(a) == kind(b)) == (of_a == of_b), (a, b)


@pytest.fixture
def kernels(monkeypatch):
    """All kernels of these modules, of which none runs: only what they would be compiled for is kept."""
    pytest.importorskip("triton")
    names = ("contrast", "norms", "scale", "similarity", "similarity_product", "linear_scores", "max_sim")
    found = {}
    for module in [import_module(f"chunked_embed.kernels._triton_{name}") for name in names]:
        for name, launched in vars(module).items():
            if isinstance(launched, Launched):
                stub = Kernel()
                stub.arg_names, stub.params = launched.kernel.arg_names, launched.kernel.params
                monkeypatch.setattr(launched, "kernel", stub)
                monkeypatch.setattr(launched, "compiled", {})
                found[f"{module.__name__.removeprefix('chunked_embed.kernels._triton_')}.{name}"] = launched
    for name, module in list(sys.modules.items()):
        if name.startswith("chunked_embed"):
            for question in ("available", "copies_tiles"):  # on the CPU, as on a Hopper GPU
                if hasattr(module, question):
                    monkeypatch.setattr(module, question, lambda device: True)
    for name in ("FEWEST_ROWS", "FEWEST_BOTH"):
        monkeypatch.setattr(attention_steps, name, 1)
    monkeypatch.setattr(product_steps, "FEWEST_ROWS", 1)
    monkeypatch.setattr(product_steps, "FEWEST_COLUMNS", 1)
    return found


def compilations(kernels, of):
    return {name: len(kernel.compiled) for name, kernel in kernels.items() if name.startswith(of) and kernel.compiled}


SIZES = [1, 2, 16, *random.Random(0).sample(range(3, 500), 27)]
ATTENTION = {"contrast._softmax_kernel": 1, "contrast._sum_kernel": 1}
WAYS = {
    ("query_to_doc",): (
        ATTENTION,
        {"similarity_product._exponentials_kernel": 1, "similarity_product._rows_kernel": 3},
    ),
    ("query_to_doc", "doc_to_query"): (
        dict.fromkeys(ATTENTION, 2),  # of queries, and of documents
        {"similarity_product._both_sums_kernel": 2, "similarity_product._both_gradients_kernel": 3},
    ),
}


@compiled
@pytest.mark.parametrize("directions", WAYS)
@pytest.mark.parametrize(("width", "ids"), [(64, ()), (100, ("query_ids", "document_ids")), (300, ())])
def test_ragged_batches_compile_few_kernels(kernels, width, ids, directions):
    """Thirty batches of as many sizes: one kernel serves them, or three, where it reads whole vectors: of one column,
    of a multiple of 16, and of others."""
    for n in SIZES:
        queries, documents = (torch.randn(n, width).half().requires_grad_() for _ in range(2))
        given = {name: torch.randint(9, (n,)) for name in ids}
        CF.info_nce(queries, documents, directions=directions, compiled=True, **given).backward()
    expected = WAYS[directions][width > 256]
    assert compilations(kernels, "contrast" if width <= 256 else "similarity_product") == expected
    assert max(compilations(kernels, ("norms", "scale")).values()) <= 3
    assert max(compilations(kernels, "similarity.").values(), default=0) <= 8


@compiled
def test_ragged_tokens_compile_few_kernels(kernels):
    linear = import_module("chunked_embed.kernels._triton_linear_scores")
    weight = torch.zeros(640, 64, dtype=torch.float16)
    for n in SIZES:
        x, target = torch.zeros(n, 64, dtype=torch.float16), torch.zeros(n, dtype=torch.int64)
        e, factor = _launch.room(n, len(weight), x, x.dtype), torch.empty(n)
        linear.linear_statistics(x, weight, None, target, ("logps",), 1.0, None, e, factor)
        linear.linear_exponentials_(x, weight, None, target, *torch.empty(2, n), 1.0, None, e)
    tiles = 3 * 2  # sums, tiles that are formed again, and without sums; of few rows in smaller tiles
    assert compilations(kernels, "linear_scores") == {
        "linear_scores._own_kernel": 1,
        "linear_scores._tiles_kernel": tiles,
        "linear_scores._rows_kernel": 2,
    }


@compiled
def test_ragged_documents_compile_few_kernels(kernels):
    """Of the same width; documents of more than 128 tokens take larger tiles than those of fewer."""
    lengths = random.Random(1)
    for n in SIZES[:20]:
        queries, documents = (
            torch.randn(n, lengths.randint(*of), 64).half().requires_grad_() for of in ((1, 40), (65, 256))
        )
        mask = torch.ones(documents.shape[:2], dtype=torch.bool)
        CF.max_sim_info_nce(queries, documents, document_mask=mask).backward()
    once = ("_survey_kernel", "_pack_kernel", "_best_kernel", "_sums_kernel", "_of_queries_kernel")
    expected = {f"max_sim.{name}": 1 for name in once} | {"max_sim._of_documents_kernel": 2}
    expected |= dict.fromkeys(("max_sim._survey_kernel", "max_sim._pack_kernel"), 2)  # of queries, and of documents
    assert compilations(kernels, "max_sim") == expected


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="no GPU")
def test_alignments_on_a_gpu():
    x = torch.randn(5000, device="cuda")
    factor = torch.tensor(1 / 3, device="cuda")
    for _ in range(2):
        for offset in (0, 1, 4):
            for size in (1, 16, 33, 4096, 4097):
                out = torch.full((size + 3,), torch.nan, device="cuda")
                for at in (0, 2):
                    scale_(x[offset : offset + size], factor, out[at : at + size])
                    torch.testing.assert_close(out[at : at + size], x[offset : offset + size] / 3)
