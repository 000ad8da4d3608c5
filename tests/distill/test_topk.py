"""A teacher of whom the top log-probabilities are left."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from distill_zoo import V, assert_same, gradients, labels, logits, make

from chunked_embed import Head
from distill import DIVERGENCES, KLDivLoss, TopKLoss

K = 4


def offline(x, k=K, temperature=1.0):
    """-> what a script would have stored: (..., k) ids and log-probabilities."""
    z = (x["teacher_hidden"] @ x["teacher_weight"].T + x["teacher_bias"]) / temperature
    logprobs, ids = z.log_softmax(-1).topk(k)
    return ids, logprobs


def student_of(x):
    return {k: t for k, t in x.items() if not k.startswith("teacher")}


def run(x, ids, logprobs, num_items=None, **options):
    loss = TopKLoss(**{"compiled": False} | options)
    return loss(**student_of(x), teacher_ids=ids, teacher_logprobs=logprobs, num_items=num_items)


def flat(x, ids, logprobs):
    used = x["target"] != -100
    return ids[used], logprobs[used]


@pytest.mark.parametrize("chunk_size", [None, 1, 3])
@pytest.mark.parametrize("tail", ["bucket", "renorm", "zero"])
def test_equals_the_formula(tail, chunk_size):
    x = make()
    ids, logprobs = offline(x, temperature=1.5)
    options = {"teacher_temperature": 1.5, "weight_hard": 0.3, "weight_soft": 0.7}
    output = run(x, ids, logprobs, tail=tail, temperature=1.5, chunk_size=chunk_size, **options)
    ids, logprobs = flat(x, ids, logprobs)
    q, p = (logits(x, "student") / 1.5).softmax(1).gather(1, ids), logprobs.exp()
    if tail == "renorm":
        p = p / p.sum(1, keepdim=True)
    values = (p * (p / q).log()).sum(1)
    if tail == "bucket":
        rest_q, rest_p = 1 - q.sum(1), 1 - p.sum(1)
        values = values + rest_p * (rest_p / rest_q).log()
    expected = (0.7 * values + 0.3 * F.cross_entropy(logits(x, "student"), labels(x), reduction="none")).mean()
    assert_same(output.loss, expected, x)
    assert set(output.metrics) == {"kl", "ce"} and output.metrics["kl"].shape == x["target"].shape


@pytest.mark.parametrize("tail", ["bucket", "renorm", "zero"])
def test_gradients_by_logits(tail):
    x = make(1, 6)
    x["target"].clamp_min_(0)
    ids, logprobs = offline(x)
    output = run(x, ids, logprobs, tail=tail)
    (_, _, by_bias) = gradients(output.loss, x)
    ids, logprobs = flat(x, ids, logprobs)
    q = logits(x, "student").softmax(1)
    inside = torch.zeros_like(q, dtype=torch.bool).scatter(1, ids, True)
    p = torch.zeros_like(q).scatter(1, ids, logprobs.exp())
    rest_q, rest_p = (q * ~inside).sum(1, keepdim=True), 1 - p.sum(1, keepdim=True)
    expected = {
        "bucket": torch.where(inside, q - p, q * (1 - rest_p / rest_q)),
        "renorm": q - p / p.sum(1, keepdim=True),
        "zero": q * p.sum(1, keepdim=True) - p,
    }[tail]
    torch.testing.assert_close(by_bias, expected.mean(0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("tail", ["bucket", "renorm", "zero"])
def test_all_ids_are_the_whole_teacher(tail):
    x = make()
    output = run(x, *offline(x, V), tail=tail, weight_hard=0.2)
    assert_same(output.loss, KLDivLoss(weight_hard=0.2, compiled=False)(**x).loss, x, tolerance=1e-7)


@pytest.mark.parametrize("divergence", ["jsd", "reverse_kl", "tvd", "skew_kl", "alpha_beta", "taid", "adaptive_kl"])
def test_any_divergence_of_the_bucketed_distributions(divergence):
    x = make()
    ids, logprobs = offline(x)
    output = run(x, ids, logprobs, divergence=divergence)
    ids, logprobs = flat(x, ids, logprobs)
    q, p = logits(x, "student").softmax(1).gather(1, ids), logprobs.exp()
    q, p = (torch.cat([side, 1 - side.sum(1, keepdim=True)], 1) for side in (q, p))
    assert_same(output.loss, DIVERGENCES[divergence](q.log(), p.log()).mean(), x)


def test_options_of_the_divergence():
    x = make()
    ids, logprobs = offline(x)
    loss = TopKLoss("jsd", divergence_options={"beta": 1.0}, compiled=False)
    arguments = student_of(x) | {"teacher_ids": ids, "teacher_logprobs": logprobs}
    torch.testing.assert_close(loss(**arguments).loss, run(x, ids, logprobs, divergence="reverse_kl").loss)
    loss.beta = 0.5
    torch.testing.assert_close(loss(**arguments).loss, run(x, ids, logprobs, divergence="jsd").loss)


def test_renorm_may_change_the_temperature():
    x = make()
    stored = run(x, *offline(x), tail="renorm", temperature=2.0)
    again = run(x, *offline(x, temperature=2.0), tail="renorm", temperature=2.0, teacher_temperature=2.0)
    ids, _ = offline(x)  # the order is the same at any temperature
    assert torch.equal(ids, offline(x, temperature=2.0)[0])
    torch.testing.assert_close(stored.loss, again.loss)


@pytest.mark.parametrize("tail", ["bucket", "renorm", "zero"])
def test_entries_that_are_not_there(tail):
    x = make()
    ids, logprobs = offline(x)
    padded = torch.cat([ids, torch.full_like(ids[..., :2], -1)], -1)
    missing = F.pad(logprobs, (0, 2), value=-math.inf)
    assert_same(run(x, padded, missing, tail=tail).loss, run(x, ids, logprobs, tail=tail).loss, x)


@pytest.mark.parametrize("tail", ["bucket", "renorm", "zero"])
def test_edges(tail):
    x = make(dtype=torch.float32)
    ids, logprobs = offline(x)
    peaked = x | {"student_weight": (1e4 * x["student_weight"].detach()).requires_grad_()}
    for given in (x, peaked):
        output = run(given, ids, logprobs, tail=tail)
        assert torch.isfinite(output.loss) and all(torch.isfinite(g).all() for g in gradients(output.loss, given))
    x["target"].fill_(-100)
    output = run(x, torch.full_like(ids, -7), logprobs, tail=tail)  # nobody looks at the ids of ignored tokens
    assert output.loss == 0 and not any(g.any() for g in gradients(output.loss, x))


def test_a_small_tail_of_the_student_keeps_its_digits():
    """One minus the sum of a confident student's few would be zero in float32."""
    torch.manual_seed(0)
    z = torch.randn(5, 200, dtype=torch.float64)
    ids = torch.arange(8).expand(5, 8)
    z[:, :8] += 22
    log_p = (0.3 * torch.randn(5, 209, dtype=torch.float64)).log_softmax(1)[:, :8]
    values, gradients = [], []
    for dtype in (torch.float64, torch.float32):
        hidden = z.to(dtype).requires_grad_()
        head = torch.eye(200, dtype=dtype)
        loss = TopKLoss(compiled=False)(hidden, head, ids, log_p.to(dtype)).loss
        values.append(loss.detach())
        gradients.append(torch.autograd.grad(loss, hidden)[0])
    assert -(z.log_softmax(1)[:, 8:].logsumexp(1)).max() > 16  # beyond what one minus a float32 can say
    torch.testing.assert_close(values[1].double(), values[0], rtol=1e-5, atol=0.0)
    torch.testing.assert_close(gradients[1].double(), gradients[0], rtol=1e-4, atol=1e-8)


def test_an_equal_teacher_gives_zero():
    x = make()
    same = x | {f"teacher_{k}": x[f"student_{k}"].detach() for k in ("hidden", "weight", "bias")}
    output = run(same, *offline(same))
    assert output.loss.abs() < 1e-14 and all(g.abs().max() < 1e-14 for g in gradients(output.loss, same))


def test_a_head_of_the_student():
    x = make()
    ids, logprobs = offline(x)
    head = Head(x["student_hidden"], x["student_weight"], x["student_bias"], logit_scale=0.5)
    expected = run(x, ids, logprobs, student_logit_scale=0.5, weight_hard=0.2)
    loss = TopKLoss(weight_hard=0.2, compiled=False)
    assert_same(loss(head, ids, logprobs, target=x["target"]).loss, expected.loss, x)
    named = loss(head, teacher_ids=ids, teacher_logprobs=logprobs, target=x["target"])
    torch.testing.assert_close(named.loss, expected.loss)
    with pytest.raises(TypeError, match="by name"):
        loss(head, ids, logprobs, x["target"])


def test_num_items():
    x = make()
    ids, logprobs = offline(x)
    n = (x["target"] != -100).sum()
    torch.testing.assert_close(run(x, ids, logprobs, num_items=2 * n).loss * 2, run(x, ids, logprobs).loss)


@pytest.mark.slow
@pytest.mark.parametrize("tail", ["bucket", "renorm", "zero"])
def test_compiled_is_uncompiled(tail):
    x = make(dtype=torch.float32)
    ids, logprobs = offline(x)
    found, expected = (run(x, ids, logprobs.bfloat16(), tail=tail, compiled=c, chunk_size=5) for c in (True, False))
    torch.testing.assert_close(found.loss, expected.loss)
    for mine, theirs in zip(gradients(found.loss, x), gradients(expected.loss, x), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tail": "drop"}, "tail"),
        ({"tail": "zero", "divergence": "jsd"}, "zero"),
        ({"tail": "renorm", "divergence": "reverse_kl"}, "infinite"),
        ({"temperature": 2.0}, "teacher_temperature"),
        ({"teacher_temperature": 0.0}, "teacher_temperature"),
        ({"divergence": "uld"}, "token by token"),
        ({"divergence": "mse"}, "token by token"),
        ({"divergence": "kvd"}, "token by token"),
        ({"report": ("teacher_agreement",)}, "teacher_agreement"),
        ({"report": "teacher_agreement"}, "teacher_agreement"),
        ({"divergence": torch.dist}, "name of a divergence"),
        ({"vocabulary": "mask"}, "no vocabulary"),
        ({"teacher_softcap": 3.0}, "no teacher_softcap"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        TopKLoss(**options)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda ids, logprobs: (ids.float(), logprobs), TypeError, "teacher_ids to hold integers"),
        (lambda ids, logprobs: (ids, logprobs.long()), TypeError, "teacher_logprobs to be floating"),
        (lambda ids, logprobs: (ids[..., 1:], logprobs), ValueError, "shape"),
        (lambda ids, logprobs: (ids[:, 1:], logprobs[:, 1:]), ValueError, "shape"),
        (lambda ids, logprobs: (ids + V, logprobs), ValueError, "teacher_ids in"),
        (lambda ids, logprobs: (ids, logprobs.exp()), ValueError, "logarithms of probabilities"),
        (lambda ids, logprobs: (ids, logprobs * math.nan), ValueError, "logarithms of probabilities"),
        (lambda ids, logprobs: (None, logprobs), TypeError, "teacher_ids"),
    ],
)
def test_wrong_arguments_are_refused(change, kind, message):
    x = make()
    with pytest.raises(kind, match=message):
        run(x, *change(*offline(x)))


def test_renorm_wants_something_to_scale():
    ids, logprobs = torch.zeros(3, 2, dtype=torch.long), torch.full((3, 2), -1.0)
    ids[:, 1], logprobs[1] = 1, -torch.inf
    hidden, weight = torch.randn(3, 4), torch.randn(9, 4)
    with pytest.raises(ValueError, match="an entry or more for each token that counts, got 1 without"):
        TopKLoss(tail="renorm", compiled=False)(hidden, weight, ids, logprobs)
    target = torch.tensor([1, -100, 2])  # unless it does not count
    assert TopKLoss(tail="renorm", compiled=False)(hidden, weight, ids, logprobs, target).loss.isfinite()
