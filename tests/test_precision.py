"""The precision contract of docs/design.md: margins, losses and gradients of half-precision inputs against float64.

One table of cases (precision_embedding.py, precision_tokens.py) and one of tolerances (precision_parts.py).
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

for module in ("sentence_transformers", "trl"):
    pytest.importorskip(module)

with warnings.catch_warnings():  # what other libraries warn about when they are imported is theirs
    warnings.simplefilter("ignore")
    import precision_embedding
    import precision_tokens
    import trl
    import trl.experimental.cpo
    import trl.experimental.orpo

    _ = trl.DPOTrainer, trl.KTOTrainer, trl.experimental.cpo.CPOTrainer, trl.experimental.orpo.ORPOTrainer
from precision_parts import BF16, FP16, FP32, FP64, Error, errors_of, inputs_of, ours_of  # noqa: E402
from precision_tokens import REFERRING, is_own_reference, metrics_of  # noqa: E402

from chunked_embed import linear_logps  # noqa: E402

CASES = {**precision_embedding.CASES, **precision_tokens.CASES}
OF_HALF = [name for name, case in CASES.items() if case.autocast is None]
HALF = pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bfloat16", "float16"])
CHUNKS: dict[str, dict[str, Any]] = {"whole": {}, "chunks": {"chunk_size": 7}}

# One of each kind of step, for compilers.
STEPS = [
    "info_nce 100, one way",
    "info_nce 100, two ways, each",
    "info_nce scale that learns, two ways, joint",
    "sigmoid_pairs 50",
    "alignment dpo_sigmoid",
    "linear_logps, all",
    "info_nce 50, ids, four ways",
    "info_nce 50, all_negatives, one way",
    "info_nce dot beyond 65504, one way",
    "guided 0.01",
    "cosent 20, projected",
    "cosent 20, projected, tanh, normalize",
    "triplet euclidean, projected",
    "batch semi-hard cosine",
    "batch all euclidean",
    "mega_batch_margin",
    "alignment tdpo2",
    "distill jsd",
    "distill kvd",
    "distill cosine of 20,000 tokens",
    "distill composite",
    "distill top-k",
    "engine cross-entropy of a vocabulary",
    "engine preference",
    "engine coupled totals",
    "autocast losses.GISTEmbed",
]


@pytest.fixture(autouse=True)
def one_thread():
    """Matrices of a few rows lose more to threads than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def assert_within(name: str, dtype: torch.dtype, device: str = "cpu", **options: Any) -> None:
    errors = errors_of(CASES[name], name, dtype, device, **options)
    if any(not e.error <= e.tolerance for e in errors):
        pytest.fail(f"{name}, {dtype}, {options}:\n" + "\n".join(map(str, errors)), pytrace=False)


@pytest.mark.slow
@pytest.mark.parametrize("chunks", CHUNKS)
@HALF
@pytest.mark.parametrize("name", CASES)
def test_half_precision_is_float64_of_the_same_inputs(name: str, dtype: torch.dtype, chunks: str) -> None:
    assert_within(name, dtype, compiled=False, **CHUNKS[chunks])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [FP64, FP32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", OF_HALF)
def test_the_truths_are_what_is_computed(name: str, dtype: torch.dtype) -> None:
    """In float64 to 1e-6 (which TRL's and sentence-transformers' float32 numbers allow): the formulas are ours."""
    assert_within(name, dtype, compiled=False, chunk_size=7)


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_compiled(name: str) -> None:
    assert_within(name, BF16, compiled=True, chunk_size=16)


@pytest.mark.gpu
@HALF
@pytest.mark.parametrize("chunk_size", [None, 16])
@pytest.mark.parametrize("name", STEPS)
def test_compiled_on_a_gpu(name: str, chunk_size: int | None, dtype: torch.dtype) -> None:
    assert_within(name, dtype, "cuda", compiled=True, chunk_size=chunk_size)


@pytest.mark.gpu
@HALF
@pytest.mark.parametrize("name", CASES)
def test_products_of_a_gpu(name: str, dtype: torch.dtype) -> None:
    """Which write float32 themselves, where a CPU's products are those of float32 operands."""
    assert_within(name, dtype, "cuda", compiled=False, chunk_size=7)


# --- references ------------------------------------------------------------------------------------------------------

POLICY = CASES["alignment dpo_sigmoid"]


@pytest.mark.parametrize("chunks", CHUNKS)
@HALF
@pytest.mark.parametrize("name", REFERRING)
def test_a_policy_that_is_its_reference_has_margins_of_zero(name: str, dtype: torch.dtype, chunks: str) -> None:
    x = is_own_reference(inputs_of(POLICY, dtype))
    margins = metrics_of(name, x, compiled=False, **CHUNKS[chunks])["rewards/margins"]
    assert not margins.any(), margins


@HALF
@pytest.mark.parametrize("name", ["dpo_sigmoid", "dpo_ipo", "irpo", "fpo_js_live"])
def test_log_probabilities_of_another_call_are_the_same(name: str, dtype: torch.dtype) -> None:
    """To 1e-4 nats a completion, whichever rows share a chunk: a reference may be scored beforehand."""
    x = inputs_of(POLICY, dtype)
    with torch.no_grad():
        given = x["hidden"], x["weight"], x["target"], x["bias"]
        beforehand = linear_logps(*given, chunk_size=5, compiled=False).logps.sum(1)
    found = metrics_of(name, x, beforehand, compiled=False, chunk_size=7)
    logged = torch.cat([found["logps/chosen"], found["logps/rejected"]])
    assert (logged - beforehand).abs().max() < 1e-4
    beta = {"dpo_sigmoid": 0.3, "dpo_ipo": 0.3, "irpo": 0.2, "fpo_js_live": 0.7}[name]
    assert found["rewards/margins"].abs().max() < beta * 2e-4


# --- without float32 outputs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_float32_outputs_may_be_declined(name: str) -> None:
    values, grads = ours_of(CASES[name], BF16, compiled=False, float32_outputs=False)
    assert all(found.isfinite().all() for found in (*values.values(), *grads.values()))


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("alignment dpo_sigmoid", "rewards/margins"),
        ("alignment dpo_sigmoid", "gradient of hidden"),
        ("alignment kto", "loss"),
        ("info_nce 100, one way", "loss"),
        ("info_nce 100, one way", "gradient of a"),
        ("info_nce 100, two ways, each", "gradient of a"),
        ("linear_logps", "logps"),
        ("distill kl", "loss"),
        ("cosent 100, projected", "gradient of a"),
        ("engine cross-entropy of a vocabulary", "loss"),
    ],
)
def test_outputs_in_half_precision_are_coarser(name: str, what: str) -> None:
    def error(**options: Any) -> Error:
        errors = errors_of(CASES[name], name, BF16, compiled=False, **options)
        return next(e for e in errors if e.what == what)

    fine, coarse = error(), error(float32_outputs=False)
    assert coarse.error > max(2 * fine.error, coarse.tolerance), f"{fine}\n{coarse}"
