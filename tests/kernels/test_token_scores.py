"""The plain torch twins and the differentiable function; test_triton.py holds the kernels against the same truth."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from chunked_embed.kernels import available, in_own_rows
from chunked_embed.kernels.token_scores import (
    DIFFERENTIABLE,
    STATISTICS,
    token_gradient_,
    token_gradient_reference,
    token_scores,
    token_statistics,
    token_statistics_reference,
)

OPTIONS = [
    {},
    {"logit_scale": 0.5, "temperature": 0.7},
    {"logit_scale": 3.0, "softcap": 2.0, "temperature": 1.5},
]
UPSTREAM = [names for n in (1, 2, 3) for names in itertools.combinations(DIFFERENTIABLE, n)]


def case(rows=6, columns=37, dtype=torch.float64):
    generator = torch.Generator().manual_seed(rows * columns)
    x = torch.randn(rows, columns, generator=generator, dtype=torch.float64).mul(3).to(dtype)
    target = torch.randint(columns, (rows,), generator=generator)
    return x, target, {name: torch.randn(rows, generator=generator, dtype=torch.float64) for name in DIFFERENTIABLE}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("columns", [1, 2, 37])
def test_statistics(truth, options, columns):
    x, target, _ = case(columns=columns)
    expected, _ = truth(x, target, **options)
    torch.testing.assert_close(token_statistics(x, target, names=STATISTICS, **options), expected)
    for name in STATISTICS:
        assert set(token_statistics(x, target, names=[name], **options)) == {name, "lse"}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("names", UPSTREAM)
def test_gradient(truth, options, names):
    x, target, upstream = case()
    upstream = {name: upstream[name] for name in names}
    _, expected = truth(x, target, upstream, **options)
    stats = token_statistics(x, target, names=names, **options)
    torch.testing.assert_close(token_gradient_reference(x, target, stats, upstream, **options), expected)

    leaf = x.clone().requires_grad_()
    scores = token_scores(leaf, target, names, **options)
    sum((scores[name] * upstream[name]).sum() for name in names).backward()
    torch.testing.assert_close(leaf.grad, expected)

    out = torch.full(x.shape, torch.nan, dtype=torch.float32)
    assert token_gradient_(x, target, stats, upstream, out=out, **options) is out
    torch.testing.assert_close(out, expected.float())
    assert token_gradient_(x, target, stats, upstream, **options) is x
    torch.testing.assert_close(x, expected)


def test_no_upstream_is_a_zero_gradient():
    x, target, _ = case()
    assert not token_gradient_reference(x, target, token_statistics(x, target, names=()), {}).any()


@pytest.mark.parametrize("options", OPTIONS[::2])
def test_gradcheck(options):
    x, target, _ = case(rows=3, columns=5)

    def scores(x):
        return tuple(token_scores(x, target, DIFFERENTIABLE, **options).values())

    assert torch.autograd.gradcheck(scores, x.requires_grad_())


def test_impossible_and_tied_logits(truth):
    x, _, upstream = case(rows=3)
    target = torch.tensor([0, 5, 2])
    x[:, 7:20] = -torch.inf
    x[1, [5, 6]] = 40.0  # a tie at the top counts as top
    x[2] = 0.0
    expected, gradient = truth(x, target, {name: g[:3] for name, g in upstream.items()})
    stats = token_statistics(x, target, names=STATISTICS)
    torch.testing.assert_close(stats, expected)
    assert stats["is_top1"].tolist()[1:] == [1.0, 1.0]
    upstream = {name: g[:3] for name, g in upstream.items()}
    torch.testing.assert_close(token_gradient_reference(x, target, stats, upstream), gradient)
    leaf = x.clone().requires_grad_()
    scores = token_scores(leaf, target, DIFFERENTIABLE)
    sum((scores[name] * upstream[name]).sum() for name in scores).backward()
    torch.testing.assert_close(leaf.grad, gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype):
    x, target, upstream = case(dtype=dtype)
    stats = token_statistics_reference(x, target, names=STATISTICS)
    assert all(value.dtype == torch.float32 for value in stats.values())
    torch.testing.assert_close(stats, token_statistics_reference(x.float(), target, names=STATISTICS))
    expected = token_gradient_reference(x.float(), target, stats, upstream)
    torch.testing.assert_close(token_gradient_(x, target, stats, upstream), expected.to(dtype))


def test_numbers_may_be_tensors_and_compile():
    x, target, _ = case(dtype=torch.float32)
    numbers = {"logit_scale": 3.0, "softcap": 2.0, "temperature": 1.5}
    expected = token_scores(x, target, STATISTICS, **numbers)
    tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
    torch.testing.assert_close(token_scores(x, target, STATISTICS, **tensors), expected)
    compiled = torch.compile(token_scores, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, target, STATISTICS, **tensors), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": ["logp"]}, "expected statistics out of"),
        ({"x": torch.zeros(6, 0)}, r"expected x as \(R, V\)"),
        ({"x": torch.zeros(37, 6).T}, "contiguous columns"),
        ({"target": torch.zeros(5, dtype=torch.int64)}, r"expected target as \(6,\)"),
        ({"target": torch.zeros(6, dtype=torch.int32)}, "int64"),
    ],
)
def test_bad_input(change, message):
    x, target, _ = case()
    with pytest.raises(ValueError, match=message):
        token_statistics(**{"x": x, "target": target, "names": ["logps"], **change})


def test_bad_gradient_input():
    x, target, upstream = case()
    stats = token_statistics(x, target, names=["logps"])
    with pytest.raises(ValueError, match="entropy"):
        token_gradient_(x, target, stats, {"entropy": upstream["entropy"]})
    with pytest.raises(ValueError, match="is_top1"):
        token_gradient_(x, target, stats, {"is_top1": upstream["lse"]})
    with pytest.raises(ValueError, match="expected out like x"):
        token_gradient_(x, target, stats, {"lse": upstream["lse"]}, out=torch.empty(2, 2))
    over_other_rows = x.view(torch.float32).view(-1)[: x.numel()].view(x.shape)
    with pytest.raises(ValueError, match="first half of x's rows"):
        token_gradient_(x, target, stats, {"lse": upstream["lse"]}, out=over_other_rows)


@pytest.mark.parametrize("rows", [1, 6])
def test_first_half_of_own_rows(rows):
    x, target, upstream = case(rows=rows)
    stats = token_statistics(x, target, names=DIFFERENTIABLE)
    expected = token_gradient_reference(x, target, stats, upstream).float()
    own = x.view(torch.float32)[:, : x.shape[1]]
    assert in_own_rows(x, own) and not in_own_rows(x, x) and not in_own_rows(x, torch.empty_like(own))
    assert token_gradient_(x, target, stats, upstream, out=own) is own
    torch.testing.assert_close(own, expected)
    with pytest.raises(ValueError, match="first half of x's rows"):
        in_own_rows(own, x)


def test_works_without_triton():
    code = """
import sys
sys.modules["triton"] = None  # importing it fails
import torch
from chunked_embed.kernels import available, token_scores
assert not available("cpu") and not available("cuda")
token_scores.token_statistics(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), names=["logps"])
assert not [name for name in sys.modules if name.startswith("chunked_embed.kernels._triton_")]
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_only_the_kernel_files_import_triton():
    package = Path(sys.modules["chunked_embed.kernels"].__file__).parents[1]
    users = [path for path in package.rglob("*.py") if re.search(r"^\s*(import|from) triton", path.read_text(), re.M)]
    assert users and all(path.parent.name == "kernels" and path.name.startswith("_triton_") for path in users)


def test_not_available_on_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not available("cpu")
    assert not available(torch.device("cpu"))


KERNELS = ("", "_contrast", "_linear", "_long_groups", "_norms", "_pairwise", "_ranking", "_scale", "_similarity")
INTERPRETED = [f"kernels/test_triton{name}.py" for name in (*KERNELS, "_similarity_product")]
INTERPRETED += ["test_attention_shaped.py", "test_product_steps.py"]


@pytest.mark.slow
@pytest.mark.parametrize("tests", INTERPRETED)
def test_triton_in_the_interpreter(tests, pytestconfig):
    """Triton reads TRITON_INTERPRET once, when it is imported: a process of its own leaves the other tests alone."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("it runs on the GPU itself")
    checks = Path(__file__).parents[1] / tests
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:xdist", "-p", "no:cacheprovider"]
    command += [f"--slow={pytestconfig.getoption('--slow')}"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, str(checks)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout + done.stderr
