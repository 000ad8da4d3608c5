"""Each check takes what fits and tells in one sentence what it expected and what it got."""

from __future__ import annotations

import math
import warnings
from fractions import Fraction
from types import FunctionType

import numpy as np
import pytest
import torch
from torch import nn

from chunked_embed import checks
from chunked_embed import functional as CF
from chunked_embed.checks import FINITE, NOT_NEGATIVE, POSITIVE, SMOOTHING, UNIT, Range
from chunked_embed.chunking import Chunking

nan, inf = math.nan, math.inf
learns = nn.Parameter(torch.tensor(2.0))


@pytest.mark.parametrize(
    "allowed, inside, outside, text",
    [
        (FINITE, (0, -1e300, 3), (nan, inf, -inf, 10**400), "a finite number"),
        (POSITIVE, (1e-300, 2), (0, -0.0, -1, nan, inf), "a positive, finite number"),
        (NOT_NEGATIVE, (0, 0.0, 5), (-1e-9, nan, inf), "a finite number, zero or more"),
        (SMOOTHING, (0, 0.49), (0.5, -0.1, nan), "a number in [0, 0.5)"),
        (UNIT, (0, 1), (1.1, -0.1, nan), "a number in [0, 1]"),
        (Range(0, 1, low_open=True), (1,), (0,), "a number in (0, 1]"),
        (Range(2), (2,), (1.9, inf), "a finite number of 2 or more"),
        (Range(2, low_open=True), (2.1,), (2,), "a finite number above 2"),
        (Range(high=2), (2, -9), (2.1, -inf), "a finite number of 2 or less"),
        (Range(high=2, high_open=True), (1.9,), (2,), "a finite number below 2"),
    ],
)
def test_ranges(allowed, inside, outside, text):
    assert str(allowed) == text
    for value in inside:
        assert checks.number("beta", value, allowed) == value
    for value in outside:
        with pytest.raises(ValueError) as error:
            checks.number("beta", value, allowed)
        assert str(error.value) == f"expected beta to be {text}, got {value!r}"


@pytest.mark.parametrize("value", [2, 2.0, np.float32(2), np.int64(2), Fraction(2)])
def test_numbers_are_plain_floats(value):
    found = checks.number("beta", value)
    assert type(found) is float and found == 2


NO_NUMBERS = {
    "string": ("2", "got '2'"),
    "bool": (True, "got True"),
    "none": (None, "got None"),
    "list": ([2.0], "got list"),
    "complex": (2j, "got 2j"),
    "parameter": (learns, r"got a parameter of shape \(\) that requires grad: what learns must be an argument"),
    "learning tensor": (torch.ones(3, requires_grad=True), r"got a tensor of shape \(3,\) that requires grad: what"),
    "0-d tensor": (torch.tensor(2.0), r"got a tensor of shape \(\): item\(\) makes a number of it"),
    "tensor": (torch.ones(3), r"got a tensor of shape \(3,\)$"),
}


@pytest.mark.parametrize("value, message", NO_NUMBERS.values(), ids=NO_NUMBERS)
def test_no_numbers(value, message):
    with pytest.raises(TypeError, match=f"expected beta to be a positive, finite number, {message}"):
        checks.number("beta", value, POSITIVE)
    if value is not None:
        with pytest.raises(TypeError, match=f"expected beta to be a finite number, or None, {message}"):
            checks.number_or_none("beta", value)
        with pytest.raises(TypeError, match=f"expected size to be a positive integer or None, {message}"):
            checks.integer_or_none("size", value, low=1)
    assert checks.number_or_none("beta", None) is None


@pytest.mark.parametrize(
    "low, high, inside, outside, text",
    [
        (None, None, (-100, 0), (), "an integer"),
        (1, None, (1, np.int32(7)), (0, -1), "a positive integer"),
        (0, None, (0,), (-1,), "an integer, zero or more"),
        (2, None, (2,), (1,), "an integer of 2 or more"),
        (None, 5, (5, -9), (6,), "an integer of 5 or less"),
        (1, 5, (1, 5), (0, 6), r"an integer in \[1, 5\]"),
    ],
)
def test_integers(low, high, inside, outside, text):
    for value in inside:
        found = checks.integer("size", value, low, high)
        assert type(found) is int and found == value
    for value in outside:
        with pytest.raises(ValueError, match=f"expected size to be {text}, got {value}"):
            checks.integer("size", value, low, high)
    with pytest.raises(TypeError, match=f"expected size to be {text}, got 1.0"):
        checks.integer("size", 1.0, low, high)


def test_a_scalar_is_a_number_or_learns():
    assert checks.scalar("scale", 20) == 20.0
    for element in (torch.tensor(20.0), torch.tensor([20.0]), torch.tensor(20.0, dtype=torch.bfloat16)):
        found = checks.scalar("scale", element, POSITIVE)
        assert type(found) is float and found == 20
    found = checks.scalar("scale", learns, POSITIVE)
    assert isinstance(found, torch.Tensor) and found.shape == () and found.requires_grad
    (torch.stack([found, found]).sum() * 3).backward()
    assert learns.grad == 6
    learns.grad = None


def test_a_scalar_tensor_is_where_it_is_needed():
    where = {"dtype": torch.float64, "device": torch.device("cpu")}
    for value in (0.1, torch.tensor(0.1, dtype=torch.float64)):
        found = checks.scalar_tensor("scale", value, **where)
        assert found.dtype == torch.float64 and found.shape == () and found.item() == 0.1
    assert checks.scalar_tensor("scale", learns, **where).requires_grad


BAD_SCALARS = {
    "zero": (0.0, ValueError, "a positive, finite number, got 0.0"),
    "zero tensor": (torch.tensor(0.0), ValueError, "a positive, finite number, got 0.0"),
    "negative, learning": (torch.tensor([-1.0], requires_grad=True), ValueError, "got -1.0"),
    "NaN tensor": (torch.tensor(nan), ValueError, "got nan"),
    "infinite tensor": (torch.tensor(inf), ValueError, "got inf"),
    "two": (torch.ones(2), ValueError, r"a number or a tensor of one element, got \(2,\)"),
    "integers": (torch.tensor(2), TypeError, "scale to be floating point, got torch.int64"),
    "string": ("20", TypeError, "got '20'"),
    "list": ([20.0], TypeError, "got list"),
    "meta": (torch.ones((), device="meta"), ValueError, "in memory"),
}


@pytest.mark.parametrize("value, error, message", BAD_SCALARS.values(), ids=BAD_SCALARS)
def test_bad_scalars(value, error, message):
    with pytest.raises(error, match=message):
        checks.scalar("scale", value, POSITIVE)


x = torch.randn(2, 3, 4)
cpu = torch.device("cpu")
GOOD_TENSORS = {
    "any": {},
    "exact": {"shape": (2, 3, 4)},
    "named": {"shape": ("batch", "tokens", 4)},
    "leading": {"shape": (..., 4)},
    "leading and none": {"shape": (..., 2, 3, 4)},
    "behind": {"shape": (2, ...)},
    "middle": {"shape": (2, ..., "features")},
    "rest": {"device": cpu, "dtype": torch.float32, "kind": "floating", "grad": False},
}


@pytest.mark.parametrize("wanted", GOOD_TENSORS.values(), ids=GOOD_TENSORS)
def test_tensors(wanted):
    assert checks.tensor("hidden", x, **wanted) is x


BAD_TENSORS = {
    "list": ([1.0], {}, TypeError, "expected hidden to be a tensor, got list"),
    "number": (1.0, {}, TypeError, "expected hidden to be a tensor, got float"),
    "none": (None, {}, TypeError, "expected hidden to be a tensor, got None"),
    "array": (np.ones(3), {}, TypeError, "expected hidden to be a tensor, got ndarray of float64"),
    "meta": (x.to("meta"), {}, ValueError, "expected hidden in memory, got a tensor on the meta device"),
    "device": (x.to("meta"), {"device": cpu}, ValueError, "expected hidden on cpu, got meta"),
    "sparse": (torch.eye(3).to_sparse(), {}, TypeError, "expected hidden to be a dense tensor.*layout sparse_coo"),
    "exact": (x, {"shape": (2, 3, 5)}, ValueError, r"expected hidden of shape \(2, 3, 5\), got \(2, 3, 4\)"),
    "named": (x, {"shape": ("tokens", 4)}, ValueError, r"hidden of shape \(tokens, 4\), got \(2, 3, 4\)"),
    "vector": (x, {"shape": (9,)}, ValueError, r"hidden of shape \(9,\), got"),
    "leading": (x, {"shape": (..., 5)}, ValueError, r"hidden of shape \(\.\.\., 5\), got"),
    "too few": (x, {"shape": (2, 3, ..., 3, 4)}, ValueError, r"hidden of shape \(2, 3, \.\.\., 3, 4\), got"),
    "dtype": (x, {"dtype": torch.float64}, TypeError, "hidden to be torch.float64, got torch.float32"),
    "floating": (x.long(), {"kind": "floating"}, TypeError, "hidden to be floating point, got torch.int64"),
    "integer": (x, {"kind": "integer"}, TypeError, "hidden to hold integers, got torch.float32"),
    "integer, bool": (x > 0, {"kind": "integer"}, TypeError, "hidden to hold integers, got torch.bool"),
    "bool": (x, {"kind": "bool"}, TypeError, "hidden to be bool, got torch.float32"),
    "real": (x + 1j, {"kind": "real"}, TypeError, "hidden to hold real numbers, got torch.complex64"),
    "grad": (learns, {"grad": False}, ValueError, "hidden without gradient, got a tensor that requires grad"),
}


@pytest.mark.parametrize("value, wanted, error, message", BAD_TENSORS.values(), ids=BAD_TENSORS)
def test_bad_tensors(value, wanted, error, message):
    with pytest.raises(error, match=message):
        checks.tensor("hidden", value, **wanted)


def test_several_tensors():
    assert checks.one_dtype("embeddings", {"a": torch.float32, "b": torch.float32}) == torch.float32
    assert checks.one_shape("embeddings", {"a": x, "b": x}) == (2, 3, 4)
    with pytest.raises(
        TypeError, match=r"expected embeddings to have one dtype .*got a torch.float32, b torch.float64"
    ):
        checks.one_dtype("embeddings", {"a": torch.float32, "b": torch.float64})
    with pytest.raises(ValueError, match=r"expected embeddings of one shape, got a \(2, 3, 4\), b \(3, 4\)"):
        checks.one_shape("embeddings", {"a": x, "b": x[0]})


def test_values():
    assert checks.all_finite("weight", x) is x and checks.no_nan("labels", x) is x
    assert checks.no_nan("labels", torch.ones(2, dtype=torch.long)).sum() == 2
    with pytest.raises(ValueError, match="expected weight to be finite, got NaN or infinity"):
        checks.all_finite("weight", torch.tensor([1.0, inf]))
    with pytest.raises(ValueError, match="expected labels without NaN, got 1 of 2"):
        checks.no_nan("labels", torch.tensor([1.0, nan]))


REFUSED = {
    "choice": (lambda: checks.choice("tail", "no", ("bucket", "zero")), ValueError, r"one of \['bucket', 'zero'\], g"),
    "choice of a set": (lambda: checks.choice("tail", "no", {"b", "a"}), ValueError, r"one of \['a', 'b'\], got 'no'"),
    "choice of a list": (lambda: checks.choice("tail", ["a"], ("a",)), ValueError, "got list"),
    "choice without none": (lambda: checks.choice("tail", None, ("a",)), ValueError, "got None"),
    "flag": (lambda: checks.flag("soft", 1), TypeError, "expected soft to be True or False, got 1"),
    "flag or none": (
        lambda: checks.flag_or_none("soft", "yes"),
        TypeError,
        "soft to be True, False or None, got 'yes'",
    ),
    "function": (lambda: checks.function("loss_fn", 3), TypeError, "expected loss_fn to be callable, got 3"),
    "function or none": (
        lambda: checks.function_or_none("f", "tanh"),
        TypeError,
        "f to be callable or None, got 'tanh",
    ),
    "instance": (lambda: checks.instance("loss", 3, Chunking), TypeError, "expected loss to be a Chunking, got int"),
    "named": (lambda: checks.named("rows", [x]), TypeError, "rows to be a dict of tensors by name, got list"),
    "named by numbers": (lambda: checks.named("rows", {0: x}), TypeError, "rows to be a dict.*got the key 0"),
    "sequence": (lambda: checks.sequence("b", x), TypeError, "expected b to be a sequence of tensors, got a tensor of"),
    "sequence of text": (lambda: checks.sequence("b", "ab", "names"), TypeError, "to be a sequence of names, got 'ab'"),
    "chunk size": (lambda: Chunking(chunk_size=0), ValueError, "chunk_size to be a positive integer or None, got 0"),
    "chunk size float": (lambda: Chunking(1.5), TypeError, r"chunk_size to be a positive integer or None, got 1\.5"),
    "chunk size bool": (lambda: Chunking(True), TypeError, "chunk_size to be a positive integer or None, got True"),
    "bytes": (lambda: Chunking(max_chunk_bytes=-1), ValueError, "max_chunk_bytes to be a positive integer or None"),
    "compiled": (lambda: Chunking(compiled="yes"), TypeError, "compiled to be True, False or None, got 'yes'"),
}


@pytest.mark.parametrize("call, error, message", REFUSED.values(), ids=REFUSED)
def test_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_accepted():
    assert checks.choice("tail", "zero", ("bucket", "zero")) == "zero"
    assert checks.choice("tail", None, ("zero", None)) is None
    assert checks.flag("soft", False) is False and checks.flag_or_none("soft", None) is None
    assert checks.function("f", len) is len and checks.function_or_none("f", None) is None
    assert checks.instance("loss", 3, int) == 3
    assert checks.sequence("b", (x,)) == [x]
    assert checks.named("rows", {"target": x})["target"] is x


rows = torch.randn(4, 6)
labels = torch.tensor([0, 1, 0, 1])
with warnings.catch_warnings():  # of prototypes
    warnings.simplefilter("ignore")
    sparse_rows, nested = rows.to_sparse_csr(), torch.nested.nested_tensor([rows[0], rows[1]])

# name: (function, how many embeddings it takes first, what else)
FUNCTIONS = {
    "angle": (CF.angle, 2, {"labels": labels}),
    "cosent": (CF.cosent, 2, {"labels": labels}),
    "pairwise scores": (CF.pairwise_scores, 2, {}),
    "pairwise scores, projected": (CF.pairwise_scores, 2, {"weight": torch.randn(3, 6)}),
    "triplet": (CF.triplet, 3, {}),
    "info_nce": (CF.info_nce, 2, {}),
    "info_nce, projected": (CF.info_nce, 2, {"weight": torch.randn(3, 6), "normalize": True}),
    "info_nce, plain": (CF.info_nce, 2, {"similarity": lambda a, b: a @ b.t()}),
    "guided": (CF.guided_info_nce, 4, {}),
    "mega batch": (CF.mega_batch_margin, 2, {}),
    "batch hard": (CF.batch_hard_triplet, 1, {"labels": labels}),
    "batch semi hard": (CF.batch_semi_hard_triplet, 1, {"labels": labels}),
    "batch all": (CF.batch_all_triplet, 1, {"labels": labels}),
    "flops": (CF.flops, 1, {}),
    "orthogonal": (CF.orthogonal_regularization, 1, {}),
    "sigmoid": (CF.sigmoid_pairs, 2, {"scale": 10.0, "bias": -10.0}),
}
QUANTISED = "to be floating point, got {}: quantised embeddings can't be trained on"
KINDS = {
    "list": (rows.tolist(), TypeError, "to be a tensor, got list"),
    "array": (rows.numpy(), TypeError, "to be a (tensor|sequence of tensors), got ndarray"),
    "int8 array": (
        rows.numpy().astype(np.int8),
        TypeError,
        QUANTISED.format("ndarray of int8") + "|sequence of tensors, got ndarray",
    ),
    "int8": (rows.to(torch.int8), TypeError, QUANTISED.format("torch.int8")),
    "uint8": (rows.to(torch.uint8), TypeError, QUANTISED.format("torch.uint8")),
    "float8": (rows.to(torch.float8_e4m3fn), TypeError, QUANTISED.format("torch.float8_e4m3fn")),
    "integers": (rows.long(), TypeError, "to be floating point, got torch.int64"),
    "complex": (rows + 1j, TypeError, "to be floating point, got torch.complex64"),
    "sparse": (rows.to_sparse(), TypeError, "to be a dense tensor, got a tensor of layout sparse_coo"),
    "sparse rows": (sparse_rows, TypeError, "to be a dense tensor, got a tensor of layout sparse_csr"),
    "nested": (nested, TypeError, "to be a dense tensor, got a tensor of layout nested"),
    "meta": (rows.to("meta"), ValueError, "in memory, got a tensor on the meta device|on cpu, got meta"),
    "vector": (rows[0], ValueError, r"of shape \(N, [DHV]\), got \(6,\)"),
    "tokens": (
        rows[:, None],
        ValueError,
        r"one embedding a row, got \(4, 1, 6\): those of tokens must be pooled first",
    ),
}


def test_every_function_is_here():
    of_tokens = {"max_sim", "max_sim_info_nce", "max_sim_pairs", "splade_pool", "xtr_scores"}  # whose tests have theirs
    others = {"cosent_from_scores"} | of_tokens
    named = {getattr(CF, name) for name in CF.__all__ if isinstance(getattr(CF, name), FunctionType)}
    assert {name.__name__ for name in named} == {function.__name__ for function, *_ in FUNCTIONS.values()} | others


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_embeddings_of_other_kinds(name, kind):
    (function, count, options), (bad, error, message) = FUNCTIONS[name], KINDS[kind]
    for place in range(count):
        sides = [bad if i == place else rows for i in range(count)]
        with pytest.raises(error, match=message):
            function(*sides, **options)
    with pytest.raises(error, match=message):
        function(*[bad] * count, **options)


def test_chunking_is_a_key():
    one = Chunking(4, 1 << 20, True)
    assert one == Chunking(**one.keywords) and hash(one) == hash(Chunking(**one.keywords))
    assert Chunking() == Chunking(None, None, None) != one
