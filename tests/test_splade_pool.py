"""`splade_pool` on a CPU, against sentence-transformers' pooling of outputs that are there, in float64."""

import pytest
import torch
from torch import nn

from chunked_embed import functional as CF
from chunked_embed.kernels import splade as kernels

WAYS = pytest.mark.parametrize(
    ("pooling", "activation"), [("max", "relu"), ("max", "log1p_relu"), ("sum", "relu"), ("sum", "log1p_relu")]
)


def case(n=4, length=7, width=5, columns=23, dtype=torch.float64, bias=True):
    generator = torch.Generator().manual_seed(n * length + columns)
    hidden = torch.randn(n, length, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(columns, width, generator=generator, dtype=torch.float64)
    added = torch.randn(columns, generator=generator, dtype=torch.float64) if bias else None
    mask = torch.rand(n, length, generator=generator) < 0.6
    mask[:, 2] = True
    leaves = [t if t is None else t.to(dtype).requires_grad_() for t in (hidden, weight, added)]
    return (*leaves, mask)


def of_library(hidden, weight, bias, mask, pooling="max", activation="relu"):
    modules = pytest.importorskip("sentence_transformers.sparse_encoder.modules")
    logits = nn.functional.linear(hidden, weight, bias)
    pool = modules.SpladePooling(pooling_strategy=pooling, activation_function=activation)
    features = {"token_embeddings": logits, "attention_mask": mask}
    return pool(features)["sentence_embedding"]


def wide(*tensors):
    return [t if t is None else t.detach().double().requires_grad_() for t in tensors]


def gradients(of, leaves, upstream):
    learning = [leaf for leaf in leaves if leaf is not None]
    return torch.autograd.grad((of.double() * upstream).sum(), learning, retain_graph=True)


def assert_all_close(found, expected, **tolerance):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b.double(), **tolerance)


@pytest.fixture(params=[None, 3], ids=["one chunk", "chunks of 3 rows"])
def chunks(request, monkeypatch):
    """Ends of chunks and of texts fall together, and they do not."""
    if request.param:
        monkeypatch.setattr(kernels, "CHUNK_ROWS", request.param)
    return {"max_chunk_bytes": 1} if request.param else {}


@WAYS
@pytest.mark.parametrize("bias", [True, False])
def test_is_the_librarys(pooling, activation, bias, chunks):
    *leaves, mask = case(bias=bias)
    expected = of_library(*leaves, mask, pooling, activation)
    upstream = torch.randn_like(expected)
    options = {"pooling": pooling, "activation": activation, **chunks}
    for masked in (mask, mask.int()):
        found = CF.splade_pool(*leaves, mask=masked, **options)
        torch.testing.assert_close(found, expected)
        assert_all_close(gradients(found, leaves, upstream), gradients(expected, leaves, upstream))
    hidden, weight, added = leaves
    shuffled = torch.randperm(int(mask.sum()))
    packed = CF.splade_pool(hidden[mask][shuffled], weight, added, mask.nonzero()[shuffled, 0], **options)
    torch.testing.assert_close(packed, expected)
    assert_all_close(gradients(packed, leaves, upstream), gradients(expected, leaves, upstream))


@WAYS
def test_gradcheck(pooling, activation):
    *leaves, mask = case(2, 3, 3, 4)
    torch.autograd.gradcheck(
        lambda *leaves: CF.splade_pool(*leaves, mask=mask, pooling=pooling, activation=activation), leaves
    )


@pytest.mark.parametrize("copies", [[0, 3], [3, 5], [0, 6]])
def test_ties_go_where_those_of_torch_go(copies, chunks):
    hidden, weight, bias, _ = case(2, 7)
    with torch.no_grad():
        for t in (hidden, weight, bias):  # whose products are exact: equal rows have equal outputs wherever they stand
            t.copy_((8 * t).round() / 8)
        hidden[:, copies] = 3 * hidden[:, copies[:1]]
    mask = torch.ones(2, 7, dtype=torch.bool)
    upstream = torch.rand(2, 23, dtype=torch.float64)
    expected = gradients(of_library(hidden, weight, bias, mask), [hidden], upstream)
    found = gradients(CF.splade_pool(hidden, weight, bias, mask=mask, **chunks), [hidden], upstream)
    assert_all_close(found, expected)
    assert (found[0][:, copies[0]] != 0).any()
    assert (found[0][:, copies[1:]] == 0).all()


@WAYS
def test_texts_without_tokens(pooling, activation):
    hidden, weight, bias, mask = case()
    mask[0] = mask[2] = mask[-1] = False
    options = {"pooling": pooling, "activation": activation}
    found = CF.splade_pool(hidden, weight, bias, mask=mask, **options)
    torch.testing.assert_close(found, of_library(hidden, weight, bias, mask, **options))
    assert found[0].eq(0).all() and found[1].any()
    ids = torch.where(mask, torch.arange(4)[:, None], -1).flatten()
    packed = CF.splade_pool(hidden.flatten(0, 1), weight, bias, ids, n_texts=4, **options)
    torch.testing.assert_close(packed, found)
    nothing = CF.splade_pool(hidden, weight, bias, mask=torch.zeros_like(mask), **options)
    assert nothing.eq(0).all()
    assert all(grad.eq(0).all() for grad in gradients(nothing, [hidden, weight, bias], 1.0))
    assert CF.splade_pool(hidden[:0], weight, bias, **options).shape == (0, 23)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int16], ids=str)
def test_ids_of_any_integers(dtype):
    hidden, weight, bias, _ = case(1, 6)
    ids = torch.tensor([0, 0, 1, 1, 1, 2])
    expected = CF.splade_pool(hidden[0], weight, bias, ids)
    assert torch.equal(CF.splade_pool(hidden[0], weight, bias, ids.to(dtype)), expected)
    mask = torch.tensor([[2, 0, 1, 1, 0, 1]])
    expected = CF.splade_pool(hidden, weight, bias, mask=mask.bool())
    assert torch.equal(CF.splade_pool(hidden, weight, bias, mask=mask.to(dtype)), expected)


def test_no_second_gradient_of_the_weight_is_held(monkeypatch):
    """Of its rows, which are summed by parts, a sixteenth of the budget."""
    hidden, weight, bias, mask = case(columns=200)
    options = {"mask": mask, "max_chunk_bytes": 16 * 10 * weight.shape[1] * weight.element_size()}
    expected = gradients(of_library(hidden, weight, bias, mask), [weight], 1.0)
    sizes, sums = [], kernels.weighted_sums
    monkeypatch.setattr(kernels, "weighted_sums", lambda *a: sizes.append(a[-1]) or sums(*a))
    assert_all_close(gradients(CF.splade_pool(hidden.detach(), weight, bias, **options), [weight], 1.0), expected)
    assert sizes == [10] * 20


@pytest.mark.parametrize("learning", [[0], [1], [2], [0, 2], [1, 2], []])
@pytest.mark.parametrize("pooling", ["max", "sum"])
def test_only_what_learns_has_a_gradient(learning, pooling):
    *leaves, mask = case()
    upstream = torch.rand(4, 23, dtype=torch.float64)
    expected = gradients(of_library(*leaves, mask, pooling), leaves, upstream)
    for n, leaf in enumerate(leaves):
        leaf.requires_grad_(n in learning)
    found = CF.splade_pool(*leaves, mask=mask, pooling=pooling)
    assert found.requires_grad == bool(learning)
    if learning:
        alone = gradients(found, [leaves[n] for n in learning], upstream)
        assert_all_close(alone, [expected[n] for n in learning])
    with torch.no_grad():
        torch.testing.assert_close(CF.splade_pool(*leaves, mask=mask, pooling=pooling), found.detach())


@pytest.mark.parametrize("pooling", ["max", "sum"])
def test_tensors_that_are_views(pooling):
    hidden, weight, bias, mask = case(columns=24)
    turned = hidden.transpose(0, 1).contiguous().transpose(0, 1), weight.t().contiguous().t()
    views = [*turned, torch.stack([bias, bias], 1)[:, 0]]
    upstream = torch.rand(24, 4, dtype=torch.float64).t()
    expected = gradients(of_library(hidden, weight, bias, mask, pooling), (hidden, weight, bias), upstream)
    found = CF.splade_pool(*views, mask=mask.t().contiguous().t(), pooling=pooling)
    assert_all_close(gradients(found, (hidden, weight, bias), upstream), expected)
    tied = CF.splade_pool(weight[None], weight, bias, pooling=pooling)  # input and weight at once
    expected = of_library(weight[None], weight, bias, torch.ones(1, 24), pooling)
    assert_all_close(gradients(tied, [weight], 1.0), gradients(expected, [weight], 1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@WAYS
def test_errors_are_those_of_float32(dtype, pooling, activation):
    *leaves, mask = case(6, 12, 64, 200, dtype)
    exact = wide(*leaves)
    expected = of_library(*exact, mask, pooling, activation)
    upstream = torch.randn_like(expected)
    options = {"pooling": pooling, "activation": activation}
    found = CF.splade_pool(*leaves, mask=mask, dtype=torch.float32, **options)
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=2e-6)
    narrow = CF.splade_pool(*leaves, mask=mask, **options)
    assert torch.equal(narrow, found.to(dtype))  # the library's dtype, rounded once
    # A sum's gradient is an operand of products, and rounded as such; that of the largest is rounded at the end alone.
    bound = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}[dtype]
    for a, b in zip(gradients(found, leaves, upstream), gradients(expected, exact, upstream)):
        assert (a.double() - b).norm() <= bound * b.norm()


@pytest.mark.parametrize("pooling", ["max", "sum"])
def test_autocast(pooling):
    """Operands of its dtype, results of float32, gradients of the tensors' dtype, which nothing rounds."""
    *leaves, mask = case(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = CF.splade_pool(*leaves, mask=mask, pooling=pooling)
    assert found.dtype == torch.float32
    rounded = [leaf.detach().bfloat16().double().requires_grad_() for leaf in leaves[:2]] + wide(leaves[2])
    expected = of_library(*rounded, mask, pooling)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    given = gradients(found, leaves, 1.0)
    assert {grad.dtype for grad in given} == {torch.float32}
    for a, b in zip(given, gradients(expected, rounded, 1.0)):
        assert (a.double() - b).norm() <= (1e-6 if pooling == "max" else 4e-3) * b.norm()


@pytest.mark.parametrize("pooling", ["max", "sum"])
@pytest.mark.parametrize("size", [1e-9, 1.0, 1e6])
def test_float16_keeps_its_range(pooling, size):
    hidden, weight, bias, mask = case(6, 12, 64, 200, torch.float16)
    exact = wide(hidden, weight)
    expected = of_library(*exact, wide(bias)[0], mask, pooling)
    leaves = [hidden.detach().float().requires_grad_(), weight.detach().float().requires_grad_()]
    with torch.autocast("cpu", torch.float16):
        found = CF.splade_pool(*leaves, bias, mask=mask, pooling=pooling)
    for a, b in zip(gradients(found, leaves, size), gradients(expected, exact, size)):
        assert (a.double() - b).norm() <= 6e-4 * b.norm()


def test_nan_is_not_lost(chunks):
    hidden, weight, bias, mask = case()
    with torch.no_grad():
        hidden[1, 2, 0], weight[3, 1] = torch.nan, torch.nan
    found = CF.splade_pool(hidden, weight, bias, mask=mask, **chunks)
    expected = torch.zeros(4, 23, dtype=torch.bool)
    expected[1], expected[:, 3] = True, True
    assert torch.equal(found.isnan(), expected)


def test_backward_twice_but_not_of_itself():
    *leaves, mask = case()
    found = CF.splade_pool(*leaves, mask=mask).sum()
    first = torch.autograd.grad(found, leaves, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(found, leaves, retain_graph=True)))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(found, leaves, create_graph=True)


def test_a_weight_that_changes_before_backward():
    *leaves, mask = case()
    found = CF.splade_pool(*leaves, mask=mask).sum()
    with torch.no_grad():
        leaves[1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.backward()


@pytest.mark.filterwarnings("ignore:.*grad attribute of a Tensor that is not a leaf")  # dynamo's own
def test_inside_a_compiled_function():
    hidden, weight, bias, mask = case()

    def loss(hidden):
        return CF.splade_pool(2 * hidden, weight, bias, mask=mask).square().sum()

    compiled = torch.compile(loss, backend="eager")(hidden)
    torch.testing.assert_close(compiled, loss(hidden))
    assert_all_close(torch.autograd.grad(compiled, hidden), torch.autograd.grad(loss(hidden), hidden))


def test_checkpointing_and_inference_mode():
    *leaves, mask = case()
    expected = CF.splade_pool(*leaves, mask=mask)
    found = torch.utils.checkpoint.checkpoint(lambda *x: CF.splade_pool(*x, mask=mask), *leaves, use_reentrant=False)
    assert_all_close(gradients(found, leaves, 1.0), gradients(expected, leaves, 1.0))
    with torch.inference_mode():
        assert torch.equal(CF.splade_pool(*leaves, mask=mask), expected)
        states = leaves[0] * 1
    weight = CF.splade_pool(states, *leaves[1:], mask=mask)  # a frozen encoder's, and a head that learns
    assert_all_close(gradients(weight, leaves[1:], 1.0), gradients(CF.splade_pool(*leaves, mask=mask), leaves, 1.0)[1:])


HIDDEN, WEIGHT, MASK = torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.ones(2, 3, dtype=torch.bool)
FLAT, IDS = torch.zeros(6, 4), torch.tensor([0, 0, 1, 1, 1, 2])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(2), WEIGHT), ValueError, r"hidden of shape \(N, L, H\), or \(T, H\), got \(2,\)"),
        ((HIDDEN.int(), WEIGHT), TypeError, "hidden to be floating point"),
        ((HIDDEN, WEIGHT.t()), ValueError, r"weight of shape \(V, 4\), got \(4, 5\)"),
        ((HIDDEN, WEIGHT[:0]), ValueError, r"weight \(V, H\) of at least one output, got \(0, 4\)"),
        ((HIDDEN, WEIGHT.double()), TypeError, "hidden and weight to have one dtype"),
        ((HIDDEN, WEIGHT, torch.zeros(4)), ValueError, r"bias of shape \(5,\)"),
        ((HIDDEN, WEIGHT, None, IDS), ValueError, r"expected a mask \(N, L\), or None, with hidden \(N, L, H\)"),
        ((HIDDEN, WEIGHT, None, None, MASK.float()), TypeError, "mask to be bool or hold integers, got torch.float32"),
        ((HIDDEN, WEIGHT, None, None, MASK.t()), ValueError, r"mask of shape \(2, 3\)"),
        ((FLAT, WEIGHT), ValueError, r"expected segments \(T,\)"),
        ((FLAT, WEIGHT, None, IDS, MASK), ValueError, r"expected segments \(T,\)"),
        ((FLAT, WEIGHT, None, IDS.float()), TypeError, "segments to hold integers"),
        ((FLAT, WEIGHT, None, IDS[1:]), ValueError, r"segments of shape \(6,\)"),
        ((FLAT, WEIGHT, None, IDS * 2), ValueError, "no token for text 1 of 5"),
        ((FLAT, WEIGHT, None, IDS * 1000), ValueError, "got id 2000 among 6 tokens"),
    ],
    ids=str,
)
def test_refusals(arguments, error, message):
    with pytest.raises(error, match=message):
        CF.splade_pool(*arguments)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"pooling": "mean"}, ValueError, r"pooling to be one of \['max', 'sum'\]"),
        ({"activation": "gelu"}, ValueError, r"activation to be one of \['relu', 'log1p_relu'\]"),
        ({"dtype": torch.int32}, TypeError, "dtype to be one of"),
        ({"max_chunk_bytes": 0}, ValueError, "max_chunk_bytes to be a positive integer"),
        ({"n_texts": -1}, ValueError, "n_texts to be an integer, zero or more"),
        ({"n_texts": 2}, ValueError, "expected segments below 2, the number of texts, got 1 that are not"),
    ],
    ids=str,
)
def test_options_that_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        CF.splade_pool(FLAT, WEIGHT, None, IDS, **options)
