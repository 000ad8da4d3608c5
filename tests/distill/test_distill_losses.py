"""The losses as they are called: hidden states, heads and labels in; value, gradients and metrics out."""

from __future__ import annotations

import gc
import inspect
import math
import pickle
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from distill_zoo import CASES, V, assert_same, gradients, labels, learning, logits, make

import distill
from chunked_embed import Head
from chunked_embed.checks import POSITIVE
from chunked_embed.fields import number
from distill import DistillationLoss, DistillLoss, Divergence, JSDLoss, KLDivLoss, KVDLoss, TAIDLoss, ULDLoss

ALL = pytest.mark.parametrize("name", list(CASES))


def reference(name, x, temperature=1.0, hard=0.0, soft=1.0, tokens=None):
    student, teacher = logits(x, "student"), logits(x, "teacher")
    values = CASES[name].values(student, teacher, x["teacher_weight"], temperature)
    ce = F.cross_entropy(student, labels(x), reduction="none")
    return (soft * values + hard * ce).sum() / (tokens or len(ce))


def run(name, x, **options):
    keywords = {key: options.pop(key) for key in ("num_items",) if key in options}
    return CASES[name].loss(**{"compiled": False} | options)(**x, **keywords)


@ALL
@pytest.mark.parametrize("chunk_size", [None, 1, 3, 100])
def test_equals_the_formula_at_any_chunk_size(name, chunk_size):
    """Biases, ignored tokens, temperature, a hard loss and an upstream gradient, all at once."""
    x = make()
    output = run(name, x, chunk_size=chunk_size, temperature=1.7, weight_hard=0.3, weight_soft=0.8)
    assert_same(output.loss, reference(name, x, 1.7, 0.3, 0.8), x, upstream=-2.5)


@ALL
def test_one_token(name):
    x = make(1, 1)
    assert_same(run(name, x).loss, reference(name, x), x)


@ALL
def test_every_token_counts_without_a_target(name):
    x = make()
    x["target"].clamp_min_(0)
    assert_same(run(name, {k: v for k, v in x.items() if k != "target"}).loss, reference(name, x), x)


@ALL
def test_ignored_tokens_are_never_looked_at(name):
    x = make()
    spoiled = {k: v.detach().clone() for k, v in x.items()}
    for side in ("student_hidden", "teacher_hidden"):
        spoiled[side][x["target"] == -100] = math.nan
    spoiled = {k: v.requires_grad_(x[k].requires_grad) for k, v in spoiled.items()}
    output, expected = run(name, spoiled, weight_hard=0.2), run(name, x, weight_hard=0.2)
    torch.testing.assert_close(output.loss, expected.loss)
    for mine, theirs in zip(gradients(output.loss, spoiled), gradients(expected.loss, x), strict=True):
        torch.testing.assert_close(mine, theirs)
    for metric in output.metrics.values():
        assert metric.shape == x["target"].shape
        assert not metric[x["target"] == -100].any() and not metric.requires_grad


@ALL
def test_nothing_counts(name):
    x = make()
    x["target"].fill_(-100)
    output = run(name, x, weight_hard=0.5)
    assert output.loss == 0
    assert not any(g.any() for g in gradients(output.loss, x))


@ALL
def test_equal_distributions(name):
    x = make()
    same = x | {f"teacher_{k}": x[f"student_{k}"].detach().clone() for k in ("hidden", "weight", "bias")}
    output = run(name, same)
    if CASES[name].zero:
        assert output.loss == 0
    assert all(g.abs().max() < 1e-14 for g in gradients(output.loss, same))


@ALL
def test_metrics_are_the_terms(name):
    x = make()
    used = x["target"] != -100
    output = run(name, x, temperature=2.0, weight_hard=0.3, weight_soft=0.5)
    assert set(output.metrics) == {CASES[name].divergence, "ce"}
    student, teacher = logits(x, "student"), logits(x, "teacher")
    expected = CASES[name].values(student, teacher, x["teacher_weight"], 2.0).detach()
    torch.testing.assert_close(output.metrics[CASES[name].divergence][used], expected, rtol=1e-9, atol=1e-12)
    ce = F.cross_entropy(student, labels(x), reduction="none").detach()
    torch.testing.assert_close(output.metrics["ce"][used], ce)


@ALL
def test_the_teacher_has_no_gradient_and_frozen_parts_none_either(name):
    x = make()
    for key in ("teacher_hidden", "teacher_weight", "teacher_bias"):
        x[key].requires_grad_()
    expected = gradients(reference(name, x), x)[0]
    x["student_weight"].requires_grad_(False)
    x["student_bias"].requires_grad_(False)
    loss = CASES[name].loss(compiled=False)
    output = loss(**x)
    output.loss.backward()
    assert all(x[key].grad is None for key in x if key != "student_hidden")
    torch.testing.assert_close(x["student_hidden"].grad, expected, rtol=1e-9, atol=1e-11)
    assert loss.plan(**x).products == 3  # two heads, and the gradient of the hidden states


@ALL
def test_evaluation(name):
    x = make()
    with torch.no_grad():
        output = run(name, x)
    assert not output.loss.requires_grad
    torch.testing.assert_close(output.loss, reference(name, x).detach(), rtol=1e-9, atol=1e-12)


@ALL
def test_num_items_makes_accumulated_batches_one(name):
    x = make(4, 3)
    expected = gradients(run(name, x, weight_hard=0.2).loss, x)
    tokens = int((x["target"] != -100).sum())
    rows = ("student_hidden", "teacher_hidden", "target")
    total = 0
    for items in (tokens, float(tokens), torch.tensor(tokens)):
        parts = [x | {k: x[k][part] for k in rows} for part in (slice(0, 1), slice(1, 4))]
        total = sum(run(name, part, weight_hard=0.2, num_items=items).loss for part in parts)
        for mine, theirs in zip(gradients(total, x), expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


@ALL
def test_logit_scale_and_softcap_of_each_side(name):
    x = make()
    options = {"student_logit_scale": 0.7, "student_softcap": 2.0, "teacher_logit_scale": 1.3, "teacher_softcap": 3.0}
    output = run(name, x, temperature=1.5, weight_hard=0.3, **options)
    student = 2 * torch.tanh(0.7 * logits(x, "student") / 2)
    teacher = 3 * torch.tanh(1.3 * logits(x, "teacher") / 3)
    values = CASES[name].values(student, teacher, x["teacher_weight"], 1.5)
    expected = (values + 0.3 * F.cross_entropy(student, labels(x), reduction="none")).mean()
    assert_same(output.loss, expected, x)


@ALL
def test_scale_by_t2(name):
    x = make()
    factor = 9 if CASES[name].tempered else 1
    output = run(name, x, temperature=3.0, weight_hard=0.5, scale_by_t2=True)
    torch.testing.assert_close(output.loss, reference(name, x, 3.0, hard=0.5, soft=factor), rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["jsd", "kvd", "uld", "kl", "adaptive_kl", "earth_mover"])
def test_compiled_is_uncompiled(name):
    x = make(7, 3, dtype=torch.float32)
    options = {"temperature": 1.7, "weight_hard": 0.3, "report": distill.losses.REPORTS}
    output = run(name, x, compiled=True, chunk_size=8, **options)  # what does not compile warns: an error here
    expected = run(name, x, **options)
    torch.testing.assert_close(output.loss, expected.loss)
    for mine, theirs in zip(gradients(output.loss, x), gradients(expected.loss, x), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    for key, metric in expected.metrics.items():
        torch.testing.assert_close(output.metrics[key], metric)


# --- precision -------------------------------------------------------------------------------------------------------


def close_pair(noise=0.1, m=64, h=48, v=400):
    """A bfloat16 student, and the teacher that it came from."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(m, h), torch.randn(v, h) / h**0.5 * 2
    student = (hidden + noise * torch.randn(m, h)).bfloat16()
    sides = {"student_hidden": student, "student_weight": weight.bfloat16()}
    sides |= {"teacher_hidden": hidden.bfloat16(), "teacher_weight": weight.bfloat16()}
    return {k: t.requires_grad_(k.startswith("student")) for k, t in sides.items()}


def exact(name, x):
    wide = {k: t.detach().double().requires_grad_(t.requires_grad) for k, t in x.items()}
    student, teacher = (wide[f"{s}_hidden"] @ wide[f"{s}_weight"].T for s in ("student", "teacher"))
    loss = CASES[name].reference(student, teacher, wide["teacher_weight"]).mean()
    return loss.detach(), gradients(loss, wide)


def error(found, truth):
    return float((found.double() - truth).norm() / truth.norm())


@ALL
def test_a_bfloat16_student_close_to_its_teacher(name):
    x = close_pair()
    value, slopes = exact(name, x)
    output = run(name, x, chunk_size=16)
    assert output.loss.dtype == torch.float32
    assert error(output.loss.detach(), value) < 2e-5
    for mine, theirs in zip(gradients(output.loss, x), slopes, strict=True):
        assert mine.dtype == torch.bfloat16
        if theirs.norm() > 1e-9:
            # The gradient is rounded to bfloat16 on its way into the product, and the product's sum once more.
            limit = 0.02 if name == "earth_mover" else 0.004
            assert error(mine, theirs) < limit


def test_float32_logits_are_what_keeps_them_exact():
    x = close_pair()
    value, slopes = exact("jsd", x)
    coarse = run("jsd", x, float32_outputs=False)
    fine = run("jsd", x)
    assert error(coarse.loss.detach(), value) > 20 * error(fine.loss.detach(), value)
    assert error(gradients(coarse.loss, x)[0], slopes[0]) > 2 * error(gradients(fine.loss, x)[0], slopes[0])


@pytest.mark.parametrize(("name", "beta"), [("kl", 0.0), ("reverse_kl", 1.0), ("jsd", 0.5)])
def test_no_further_off_than_twice_trls_kernel(name, beta):
    kernel = pytest.importorskip("trl.kernels.chunked_divergence").ChunkedDivergenceFunction
    x = close_pair()
    value, slopes = exact(name, x)
    theirs, _ = kernel.apply(
        x["student_hidden"], x["student_weight"], None, x["teacher_hidden"], x["teacher_weight"], None, beta
    )
    loss = theirs.mean()
    output = run(name, x)
    assert error(output.loss.detach(), value) <= max(2 * error(loss.detach(), value), 1e-6)
    for mine, peer, truth in zip(gradients(output.loss, x), gradients(loss, x), slopes, strict=True):
        assert error(mine, truth) <= 2 * error(peer, truth)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_equals_trls_kernel(beta):
    kernel = pytest.importorskip("trl.kernels.chunked_divergence").ChunkedDivergenceFunction
    x = make(dtype=torch.float32)
    x["target"].clamp_min_(0)
    sides = [x[f"{s}_{k}"] for s in ("student", "teacher") for k in ("hidden", "weight", "bias")]
    sides[0], sides[3] = sides[0].flatten(0, 1), sides[3].flatten(0, 1)
    theirs, _ = kernel.apply(*sides, beta, 1.5, 0.8, 3.0, 1.2, None)
    options = {"student_logit_scale": 0.8, "student_softcap": 3.0, "teacher_logit_scale": 1.2}
    loss = JSDLoss(beta, 1.5, compiled=False, **options)
    output = loss(**x)
    torch.testing.assert_close(output.loss, theirs.mean(), rtol=1e-4, atol=1e-6)
    for mine, peer in zip(gradients(output.loss, x), gradients(theirs.mean(), x), strict=True):
        torch.testing.assert_close(mine, peer, rtol=1e-3, atol=1e-5)


def test_autocast():
    x = make(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = run("jsd", x, weight_hard=0.3)
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, reference("jsd", x, hard=0.3), rtol=0.05, atol=0.05)
    assert all(g.dtype == torch.float32 for g in gradients(output.loss, x))


def test_sides_of_unlike_dtypes():
    x = make(dtype=torch.float32)
    teacher = {k: x[k].bfloat16() for k in x if k.startswith("teacher")}
    output = run("kl", x | teacher)
    torch.testing.assert_close(output.loss, reference("kl", x), rtol=0.02, atol=0.02)


# --- vocabularies ----------------------------------------------------------------------------------------------------

SHARED = pytest.mark.parametrize("name", [n for n in CASES if n != "uld"])
MORE_THAN_PADDING = pytest.mark.filterwarnings("ignore:expected vocabularies of about one size:UserWarning")


@MORE_THAN_PADDING
@SHARED
@pytest.mark.parametrize("vocabulary", ["cut", "mask"])
def test_a_teacher_padded_beyond_the_student_is_renormalised(name, vocabulary):
    x = make(vt=V + 6)
    short = x | {k: x[k][:V] for k in ("teacher_weight", "teacher_bias")}
    output = run(name, x, vocabulary=vocabulary, weight_hard=0.3, temperature=1.4)
    assert_same(output.loss, reference(name, short, 1.4, 0.3), x)


@MORE_THAN_PADDING
@SHARED
def test_a_student_padded_beyond_the_teacher_is_cut(name):
    x = make(v=V + 6, vt=V)
    x["target"][0, 0] = V + 2  # a label that the teacher does not know
    output = run(name, x, weight_hard=0.3, chunk_size=4)
    student, teacher = logits(x, "student"), logits(x, "teacher")
    values = CASES[name].reference(student[:, :V], teacher, x["teacher_weight"])
    expected = (values + 0.3 * F.cross_entropy(student, labels(x), reduction="none")).mean()
    assert_same(output.loss, expected, x)


def refuses_mask(name):
    needs, numbers = distill.DIVERGENCES[CASES[name].divergence].needs_support, CASES[name].numbers
    return needs if isinstance(needs, bool) else numbers[needs[0]] == needs[1]


@SHARED
def test_a_student_padded_beyond_the_teacher_is_masked(name):
    """The teacher gives zero to what it lacks: the formula at logits far below all others."""
    x = make(v=V + 6, vt=V)
    if refuses_mask(name):
        with pytest.raises(ValueError, match='vocabulary="cut"'):
            run(name, x, vocabulary="mask")
        return
    output = run(name, x, vocabulary="mask")
    student, teacher = logits(x, "student"), F.pad(logits(x, "teacher"), (0, 6), value=-600.0)
    expected = CASES[name].reference(student, teacher, x["student_weight"]).mean()
    assert_same(output.loss, expected, x)


@pytest.mark.parametrize(("v", "vt"), [(9, 2), (2, 9), (20, 18)])
@pytest.mark.parametrize("vocabulary", ["cut", "mask"])
def test_more_than_padding_is_not_cut_without_a_word(v, vt, vocabulary):
    x = make(v=v, vt=vt)
    if vocabulary == "mask" and v > vt:
        run("kl", x, vocabulary=vocabulary)  # nothing is cut
        return
    distill.losses._warn_cut.cache_clear()
    with pytest.warns(UserWarning, match=rf"about one size, got {v} tokens \(student\) and {vt} \(teacher\)"):
        run("kl", x, vocabulary=vocabulary)
    run("uld", x, vocabulary=vocabulary)  # compares whole vocabularies
    run("kl", x, vocabulary=vocabulary, weight_hard=1.0, weight_soft=0.0)


@pytest.mark.parametrize(("v", "vt"), [(41, 40), (40, 41)])
def test_padding_is_cut_silently(v, vt):
    x = make(v=v, vt=vt)
    cut = x | {k: x[k][:40] for k in x if k.endswith(("weight", "bias"))}
    torch.testing.assert_close(run("kl", x).loss, run("kl", cut).loss)


def test_other_vocabularies_may_be_refused():
    with pytest.raises(ValueError, match="vocabularies of one size, got 20"):
        run("kl", make(v=20, vt=V), vocabulary="refuse")


@pytest.mark.parametrize(("v", "vt"), [(V, V + 6), (V + 6, V)])
def test_uld_takes_both_vocabularies_whole(v, vt):
    x = make(v=v, vt=vt)
    output = ULDLoss(weight_hard=0.2, compiled=False, chunk_size=3)(**x)
    student, teacher = logits(x, "student"), logits(x, "teacher")
    ranked = [z.softmax(1).sort(1, descending=True).values for z in (student, teacher)]
    q, p = (F.pad(side, (0, max(v, vt) - side.shape[1])) for side in ranked)
    expected = ((q - p).abs().sum(1) + 0.2 * F.cross_entropy(student, labels(x), reduction="none")).mean()
    assert_same(output.loss, expected, x)


@MORE_THAN_PADDING
def test_kvd_beside_uld_in_vocabularies_of_two_sizes():
    x = make(vt=V + 6)
    output = DistillLoss([("kvd", 1.0), ("uld", 0.5)], compiled=False)(**x)
    parts = KVDLoss(compiled=False)(**x).loss + 0.5 * ULDLoss(compiled=False)(**x).loss
    assert_same(output.loss, parts, x)


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_numbers_may_be_scheduled():
    x = make()
    loss = TAIDLoss(0.1, compiled=False)
    for t, temperature in ((0.1, 1.0), (0.7, 2.0), (1.0, 2.0), (0, 3)):
        loss.t, loss.temperature = t, temperature
        student, teacher = (logits(x, side) / temperature for side in ("student", "teacher"))
        expected = -((((1 - t) * student + t * teacher).softmax(1)) * student.log_softmax(1)).sum(1).mean()
        torch.testing.assert_close(loss(**x).loss, expected)
    loss.t = 1.5
    with pytest.raises(ValueError, match=r"expected t to be a number in \[0, 1\], got 1.5"):
        loss(**x)


def test_beta_may_reach_its_limits():
    x = make()
    loss = JSDLoss(0.5, compiled=False)
    for beta, name in ((0.0, "kl"), (0.5, "jsd"), (1.0, "reverse_kl")):
        loss.beta = beta
        torch.testing.assert_close(loss(**x).loss, reference(name, x))


def test_without_a_soft_loss_the_teacher_may_be_missing():
    x = make()
    student = {k: None if k.startswith("teacher") else t for k, t in x.items()}
    output = KLDivLoss(weight_hard=2.0, weight_soft=0.0, compiled=False)(**student)
    assert_same(output.loss, 2 * F.cross_entropy(logits(x, "student"), labels(x)), x)
    assert set(output.metrics) == {"ce"}


def test_a_loss_can_be_pickled_and_printed():
    loss = pickle.loads(pickle.dumps(JSDLoss(0.3, 2.0)))
    assert loss.beta == 0.3 and loss.temperature == 2.0
    assert loss.terms == JSDLoss(0.3).terms and hash(loss.terms) == hash(JSDLoss(0.3).terms)  # they share a step
    assert repr(loss) == "JSDLoss(beta=0.3, temperature=2.0)"
    both = pickle.loads(pickle.dumps(DistillLoss([("jsd", 1.0, {"beta": 0.2}), ("ce", 0.5)])))
    assert repr(both) == "DistillLoss(weight_hard=0.5, jsd_beta=0.2, jsd_weight=1.0)"


def test_signatures_are_told():
    signature = inspect.signature(JSDLoss)
    assert list(signature.parameters)[:5] == ["beta", "temperature", "weight_hard", "weight_soft", "ignore_index"]
    assert {"compiled", "report", "vocabulary"} < set(signature.parameters)
    assert [signature.parameters[name].default for name in ("beta", "temperature", "compiled")] == [0.5, 1.0, None]
    assert "beta: a number in [0, 1]." in JSDLoss.__doc__
    assert inspect.signature(DistillLoss).parameters["temperature"].default == 1.0
    assert list(inspect.signature(distill.TopKLoss).parameters)[:3] == ["divergence", "tail", "temperature"]
    assert KVDLoss("delta", 2.0).kernel == "delta"


def test_numbers_are_stated_once():
    """A class of one divergence has its options, with the same defaults, and so has a composite."""
    for name, entry in distill.DIVERGENCES.items():
        composite = DistillLoss([(name, 1.0)])
        for option, field in entry.fields.items():
            assert getattr(composite, f"{name}_{option}") == field.default
    kinds = [kind for kind in vars(distill).values() if isinstance(kind, type) and "entry" in vars(kind)]
    assert {kind.entry.name for kind in kinds} == set(distill.DIVERGENCES)
    for kind in kinds:
        assert {name: kind.fields[name].default for name in kind.entry.fields} == {
            name: field.default for name, field in kind.entry.fields.items()
        }


def test_a_class_of_ones_own():
    class Margin(DistillationLoss):
        """A margin."""

        entry = Divergence(bounded)
        margin: float = entry["margin"]

    x = make()
    gap = (logits(x, "student").softmax(1) - logits(x, "teacher").softmax(1)).abs().sum(1)
    assert_same(Margin(0.3, compiled=False)(**x).loss, (gap - 0.3).relu().mean(), x)
    with pytest.raises(ValueError, match="expected margin to be a positive, finite number, got -1"):
        Margin(-1)
    loss = DistillLoss([(bounded, 1.0)])
    loss.bounded_margin = 0.0
    with pytest.raises(ValueError, match="bounded_margin"):
        loss(**x)
    with pytest.raises(TypeError, match="no 'margin'"):
        type("Lacking", (DistillationLoss,), {"entry": Divergence(bounded)})


def bounded(student, teacher, *, margin=number(0.1, POSITIVE)):
    return ((student.softmax(1) - teacher.softmax(1)).abs().sum(1) - margin).relu()


def test_arguments_by_position():
    x = make()
    loss = JSDLoss(0.2, 1.5, 0.3, 0.7, compiled=False)
    output = loss(*(x[k] for k in ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight", "target")))
    bare = {k: torch.zeros_like(t) if k.endswith("bias") else t for k, t in x.items()}
    torch.testing.assert_close(output.loss, reference("jsd .2", bare, 1.5, 0.3, 0.7))


def test_adapters_on_the_heads():
    x = make()
    down, up = torch.randn(2, 5, dtype=torch.float64).requires_grad_(), torch.randn(V, 2, dtype=torch.float64)
    up.requires_grad_()
    x["student_weight"].requires_grad_(False)
    output = KLDivLoss(compiled=False, chunk_size=3)(
        **x, student_extra=((x["student_hidden"] @ down.T, up),), teacher_extra=((x["teacher_hidden"][..., :2], up),)
    )
    merged = x | {"student_weight": x["student_weight"] + up @ down, "down": down, "up": up}
    merged["teacher_weight"] = x["teacher_weight"] + F.pad(up.detach(), (0, 5))
    assert_same(output.loss, reference("kl", merged), {k: merged[k] for k in ("student_hidden", "down", "up")})


# --- heads -----------------------------------------------------------------------------------------------------------


def heads(x, student=(1.0, None), teacher=(1.0, None)):
    """The two sides of ``make()``, with an adapter each."""
    sides = []
    for side, transform in (("student", student), ("teacher", teacher)):
        torch.manual_seed(len(sides))
        extra = ((x[f"{side}_hidden"][..., :2], torch.randn(V, 2, dtype=torch.float64)),)
        sides.append(Head(*(x[f"{side}_{part}"] for part in ("hidden", "weight", "bias")), extra, *transform))
    return sides


def loose(x, student, teacher):
    return x | {"student_extra": student.extra, "teacher_extra": teacher.extra}


@ALL
def test_heads_are_their_parts(name):
    """With a Cohere-style scale on one side and a soft-cap on the other: what a head says is what is computed."""
    x = make()
    student, teacher = heads(x, (0.4, None), (1.0, 2.0))
    loss = CASES[name].loss(weight_hard=0.3, temperature=1.4, compiled=False)
    output = loss(student, teacher, target=x["target"])
    options = {"student_logit_scale": 0.4, "teacher_softcap": 2.0}
    own = CASES[name].loss(weight_hard=0.3, temperature=1.4, compiled=False, **options)
    expected = own(**loose(x, student, teacher))
    assert_same(output.loss, expected.loss, x)
    for key, metric in expected.metrics.items():
        torch.testing.assert_close(output.metrics[key], metric)
    torch.testing.assert_close(own(student, teacher, target=x["target"]).loss, expected.loss)  # they agree
    assert loss(**loose(x, student, teacher)).loss != output.loss  # the next call has its own transform again
    assert loss.plan(student, teacher, target=x["target"]).products > 3


def test_heads_of_whole_logits():
    x = make()
    student, teacher = heads(x, (0.4, 3.0), (1.3, None))
    s, t = (head.logits()[x["target"] != -100] for head in (student, teacher))
    expected = F.kl_div(s.log_softmax(1), t.log_softmax(1), reduction="batchmean", log_target=True)
    torch.testing.assert_close(KLDivLoss(compiled=False)(student, teacher, target=x["target"]).loss, expected)
    assert KLDivLoss(1.0, 1.0, 0.0, compiled=False)(student, target=x["target"]).loss.isfinite()


def test_two_prepared_calls_have_a_head_each():
    x = make()
    loss = KLDivLoss(compiled=False)
    calls = [loss.prepare(*heads(x, (scale, None)), target=x["target"]) for scale in (0.5, 2.0)]
    fresh = [loss(*heads(x, (scale, None)), target=x["target"]).loss for scale in (0.5, 2.0)]
    torch.testing.assert_close([call.run().loss for call in calls], fresh)


@pytest.mark.parametrize(
    ("options", "call", "kind", "message"),
    [
        ({"student_logit_scale": 0.5}, {}, ValueError, "student whose Head agrees with student_logit_scale=0.5"),
        ({"teacher_softcap": 9.0}, {}, ValueError, "teacher whose Head agrees with teacher_softcap=9.0.*got 2.0"),
        ({}, {"student_bias": torch.zeros(V)}, TypeError, "no student_weight, student_bias or student_extra"),
        ({}, {"teacher_extra": [(0, 0)]}, TypeError, "no teacher_weight, teacher_bias or teacher_extra"),
    ],
)
def test_a_head_and_what_contradicts_it(options, call, kind, message):
    x = make()
    with pytest.raises(kind, match=message):
        KLDivLoss(compiled=False, **options)(*heads(x, (0.4, None), (1.0, 2.0)), target=x["target"], **call)


def test_a_head_beside_loose_tensors():
    x = make()
    student, teacher = heads(x)
    for wrong in (
        lambda loss: loss(student, teacher_hidden=teacher.hidden, teacher_weight=teacher.weight),
        lambda loss: loss(student.hidden, student.weight, teacher),
        lambda loss: loss(student, teacher, x["target"]),
    ):
        with pytest.raises(TypeError, match=r"a Head for both or for neither|by name"):
            wrong(KLDivLoss(compiled=False))


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_means_are_over_the_tokens_that_count():
    x = make()
    output = run("kl", x, weight_hard=0.5, report=distill.losses.REPORTS)
    assert output.metrics["kl"].mean() < 0.8 * output.means["kl"]
    torch.testing.assert_close(output.means["kl"], reference("kl", x).detach())
    torch.testing.assert_close(output.means["ce"], F.cross_entropy(logits(x, "student"), labels(x)).detach())
    assert set(output.means) == {"kl", "ce", *distill.losses.REPORTS}
    every = run("kl", {k: v for k, v in x.items() if k != "target"})
    torch.testing.assert_close(every.means["kl"], every.metrics["kl"].mean())


@pytest.mark.parametrize("name", ["kl", "mse"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_reports(name, temperature):
    x = make()
    used = x["target"] != -100
    metrics = run(name, x, temperature=temperature, report=distill.losses.REPORTS).metrics
    student, teacher = logits(x, "student").detach(), logits(x, "teacher")
    for key, at in {"student_entropy": 1.0, "tempered_entropy": temperature}.items():
        entropy = torch.distributions.Categorical(logits=student / at).entropy()
        torch.testing.assert_close(metrics[key][used], entropy, msg=key)
    assert torch.equal(metrics["teacher_agreement"][used].bool(), student.argmax(1) == teacher.argmax(1))


def test_inside_an_outer_torch_compile():
    x = make(dtype=torch.float32)
    loss = JSDLoss(weight_hard=0.3, compiled=False)

    def outer(hidden):
        return loss(**x | {"student_hidden": hidden * 2}).loss + 1

    expected = torch.autograd.grad(outer(x["student_hidden"]), x["student_hidden"])[0]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*grad attribute of a Tensor that is not a leaf.*")  # dynamo's own
        compiled = torch.compile(outer, backend="eager")
        found = torch.autograd.grad(compiled(x["student_hidden"]), x["student_hidden"])[0]
    torch.testing.assert_close(found, expected)


# --- several terms ---------------------------------------------------------------------------------------------------


def overlap(student, teacher):
    return 1 - torch.minimum(student.softmax(1), teacher.softmax(1)).sum(1)


def margin(student, teacher, margin=0.1, kind="relu"):
    gap = (student.softmax(1) - teacher.softmax(1)).abs().sum(1)
    return (gap - margin).relu() if kind == "relu" else gap


def test_a_composite_is_the_sum_of_its_parts():
    x = make()
    terms = [("ce", 0.5), ("reverse_kl", 0.4), ("tvd", 0.1), ("jsd", 0.2, {"beta": 0.2}), ("mse", 0.3), ("kvd", 0.1)]
    terms += [("jsd", 0.1, {"beta": 0.0}), ("uld", 0.2), ("skew_reverse_kl", 0.3, {"detach_mixture": True})]
    output = DistillLoss(terms, temperature=1.6, compiled=False, chunk_size=4)(**x)
    names = ["reverse_kl", "tvd", "jsd .2", "mse", "kvd", "jsd 0", "uld"]
    expected = sum(
        reference(name, x, 1.6, soft=w) for name, w in zip(names, (0.4, 0.1, 0.2, 0.3, 0.1, 0.1, 0.2), strict=True)
    )
    detached = distill.SkewReverseKLLoss(temperature=1.6, detach_mixture=True, compiled=False)(**x).loss
    expected = expected + 0.3 * detached + 0.5 * F.cross_entropy(logits(x, "student"), labels(x))
    assert_same(output.loss, expected, x)
    assert list(output.metrics)[:3] == ["reverse_kl", "tvd", "jsd"]
    assert set(output.metrics) == {"reverse_kl", "tvd", "jsd", "mse", "kvd", "jsd_2", "uld", "skew_reverse_kl", "ce"}
    torch.testing.assert_close(output.metrics["tvd"].sum() / len(labels(x)), reference("tvd", x, 1.6).detach())


def test_one_pair_of_logits_serves_all_terms():
    x = make()
    loss = DistillLoss([("ce", 0.5), ("reverse_kl", 0.4), ("tvd", 0.1)])
    assert loss.plan(**x).products == 4


def test_numbers_of_a_composite_are_attributes():
    x = make()
    loss = DistillLoss([("ce", 1.0), ("jsd", 1.0, {"beta": 0.5})], compiled=False)
    loss.weight_hard, loss.jsd_weight, loss.jsd_beta, loss.temperature = 0.2, 3.0, 0.2, 1.5
    torch.testing.assert_close(loss(**x).loss, reference("jsd .2", x, 1.5, hard=0.2, soft=3.0))


def test_divergences_of_ones_own():
    x = make()

    def sides():
        return logits(x, "student") / 2, logits(x, "teacher") / 2

    output = DistillLoss(loss_fn=overlap, temperature=2.0, compiled=False)(**x)
    assert_same(output.loss, overlap(*sides()).mean(), x)
    loss = DistillLoss([(overlap, 0.5), (margin, 2.0, {"margin": 0.3})], temperature=2.0, compiled=False)
    assert_same(loss(**x).loss, (0.5 * overlap(*sides()) + 2 * margin(*sides(), 0.3)).mean(), x)
    loss.margin_margin = 0.7
    assert_same(loss(**x).loss, (0.5 * overlap(*sides()) + 2 * margin(*sides(), 0.7)).mean(), x)
    raw = Divergence(margin, tempered=False)
    output = DistillLoss([(raw, 1.0, {"kind": "plain"})], temperature=2.0, compiled=False)(**x)
    torch.testing.assert_close(output.loss, margin(*(2 * z for z in sides()), kind="plain").mean())


def test_a_divergence_that_learns_is_refused():
    """Each function of ones own, also behind one of the same class that was fine."""
    scale = torch.nn.Linear(V, V).double()

    def learned(student, teacher):
        return (scale(student) - teacher).square().mean(1)

    x = make()
    DistillLoss(loss_fn=overlap, compiled=False)(**x)
    terms = ([("kl", 0.5), (learned, 0.5)], [(Divergence(learned, tempered=False), 1.0)])
    for loss in (DistillLoss(loss_fn=learned), *(DistillLoss(given, compiled=False) for given in terms)):
        with pytest.raises(ValueError, match=r"expected what learns to be an argument .* scale"):
            loss(**x)


def test_any_callable_has_a_label():
    x = make()
    loss = DistillLoss([(lambda s, t: (s - t).abs().mean(1), 1.0), (lambda s, t: s.sum(1), 0.0)], compiled=False)
    assert set(loss(**x).metrics) == {"lambda", "lambda_2"}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", ["kl", "reverse_kl", "jsd", "tvd"])
def test_what_is_not_a_number_reaches_the_gradient(name, temperature, bad):
    """A frozen head would not tell, and a scaler of mixed precision must skip the step."""
    x = make()
    x["student_weight"], x["student_bias"] = x["student_weight"].detach(), x["student_bias"].detach()
    x["student_hidden"].data[0, 0, 0] = bad
    out = DistillLoss([("ce", 0.5), (name, 0.5)], temperature, compiled=False)(**x)
    out.loss.backward()
    assert not torch.isfinite(out.loss)
    assert not torch.isfinite(x["student_hidden"].grad[0, 0]).any()


@pytest.mark.parametrize("shape", [lambda v: v.square(), lambda v: v.sum(1, keepdim=True), lambda v: v.sum()])
def test_a_divergence_that_gives_no_value_a_row(shape):
    def own(student, teacher):
        return shape(student - teacher)

    with pytest.raises(ValueError, match=r"expected 'own' to give a value a row, \(\d+,\), got"):
        DistillLoss(loss_fn=own, compiled=False)(**make())


# --- wrong input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make_loss", "kind", "message"),
    [
        (lambda: JSDLoss(beta=1.1), ValueError, "beta"),
        (lambda: JSDLoss(beta=math.nan), ValueError, "beta"),
        (lambda: JSDLoss(beta="half"), TypeError, "beta"),
        (lambda: JSDLoss(temperature=0.0), ValueError, "temperature"),
        (lambda: JSDLoss(temperature=math.inf), ValueError, "temperature"),
        (lambda: JSDLoss(weight_hard=math.nan), ValueError, "weight_hard"),
        (lambda: JSDLoss(student_softcap=-1.0), ValueError, "student_softcap"),
        (lambda: JSDLoss(vocabulary="pad"), ValueError, "vocabulary"),
        (lambda: JSDLoss(report=("perplexity",)), ValueError, "report"),
        (lambda: JSDLoss(ignore_index=0.5), TypeError, "ignore_index"),
        (lambda: JSDLoss(gamma=1.0), TypeError, "gamma"),
        (lambda: JSDLoss(loss_fn=overlap), TypeError, "loss_fn"),
        (lambda: JSDLoss(chunk_size=0), ValueError, "chunk_size"),
        (lambda: distill.SkewKLLoss(skew=1.0), ValueError, "skew"),
        (lambda: distill.AlphaBetaLoss(0.0, 0.0), ValueError, "above zero"),
        (lambda: distill.AlphaBetaLoss(-0.5, 1.0), ValueError, "ab_alpha"),
        (lambda: distill.EarthMoverLoss(p=3), ValueError, "p to be an integer"),
        (lambda: KVDLoss(kernel="rbf"), ValueError, "kernel"),
        (lambda: DistillLoss([]), ValueError, "terms"),
        (lambda: DistillLoss(), TypeError, "either"),
        (lambda: DistillLoss("kl"), ValueError, "terms"),
        (lambda: DistillLoss([("kld", 1.0)]), ValueError, "kld"),
        (lambda: DistillLoss([("kl", math.nan)]), ValueError, "weight of 'kl'"),
        (lambda: DistillLoss([("kl",)]), ValueError, "a term"),
        (lambda: DistillLoss([("jsd", 1.0, {"gamma": 1})]), TypeError, "gamma"),
        (lambda: DistillLoss([("ce", 1.0), ("ce", 1.0)]), ValueError, "ce"),
        (lambda: DistillLoss([("kl", 1.0)], weight_hard=1.0), TypeError, "weight_hard"),
        (lambda: DistillLoss([(3, 1.0)]), TypeError, "function"),
        (lambda: DistillLoss(iter([])), ValueError, "got none"),
        (lambda: DistillLoss([("jsd", 1.0, 0.1)]), TypeError, "keywords of 'jsd'"),
        (lambda: DistillLoss([("kvd", 1.0, {"embedding": torch.ones(3, 2)})]), TypeError, "embedding"),
        (lambda: DistillLoss([("skew_reverse_kl", 1.0, {"detach_mixture": "no"})]), TypeError, "detach_mixture"),
        (lambda: DistillLoss([("alpha_beta", 1.0, {"ab_alpha": 0.0, "ab_beta": 0.0})]), ValueError, "above zero"),
    ],
)
def test_wrong_options_are_refused(make_loss, kind, message):
    with pytest.raises(kind, match=message):
        make_loss()


@pytest.mark.parametrize(
    ("change", "options", "kind", "message"),
    [
        ({"target": None}, {"weight_hard": 1.0}, ValueError, "target"),
        ({"target": torch.zeros(3, 5, dtype=torch.long)}, {}, ValueError, "target of shape"),
        ({"target": torch.zeros(3, 4)}, {}, TypeError, "integers"),
        ({"target": torch.full((3, 4), V)}, {"weight_hard": 1.0}, ValueError, "target"),
        ({"target": torch.full((3, 4), -1)}, {"weight_hard": 1.0}, ValueError, "target"),
        ({"teacher_hidden": None}, {}, TypeError, "teacher_hidden"),
        ({"teacher_hidden": torch.zeros(3, 5, 7).double()}, {}, ValueError, "teacher"),
        ({"teacher_bias": torch.zeros(V + 1).double()}, {}, ValueError, "teacher_bias"),
        ({"student_weight": torch.zeros(V, 9).double()}, {}, ValueError, "weight"),
        ({"student_hidden": "x"}, {}, TypeError, "student_hidden"),
        ({"num_items": 0}, {}, ValueError, "num_items"),
        ({"num_items": torch.tensor(-1)}, {}, ValueError, "num_items"),
    ],
)
def test_wrong_arguments_are_refused(change, options, kind, message):
    with pytest.raises(kind, match=message):
        JSDLoss(compiled=False, **options)(**make() | change)


@MORE_THAN_PADDING
def test_a_label_beyond_a_student_that_is_longer_than_its_teacher_is_refused():
    x = make(v=V + 6, vt=V)
    x["target"][0, 0] = V + 6
    with pytest.raises(ValueError, match="target"):
        run("kl", x, weight_hard=1.0)
    assert torch.isfinite(run("kl", x).loss)  # without a hard loss it is a mask


def test_learning_is_what_the_tests_think():
    assert len(learning(make())) == 3


def test_numbers_and_names_of_composites():
    """weight_soft counts on top of the terms' own weights; a user's names do not cover what is there already."""
    x = make()
    loss = DistillLoss([("ce", 0.5), ("kl", 0.5)], compiled=False)
    whole = loss(**x).loss
    loss.weight_soft = 0.0
    hard = loss(**x).loss
    loss.weight_soft = 0.1
    torch.testing.assert_close(loss(**x).loss, hard + 0.1 * (whole - hard))

    def ce(student, teacher):
        return -(teacher.softmax(1) * student.log_softmax(1)).sum(1)

    assert set(DistillLoss([("ce", 0.5), (ce, 0.5)], compiled=False)(**x).metrics) == {"ce", "ce_2"}

    def penalty(student, teacher, *, weight=0.1):
        return weight * student.square().sum(1)

    with pytest.raises(ValueError, match="penalty_weight"):
        DistillLoss([(penalty, 0.5)])


def test_a_function_of_ones_own_keeps_nothing_alive():
    student, teacher, head = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4), torch.randn(5, 4)
    batches = []
    for _ in range(3):
        batch = torch.zeros(3)
        batches.append(weakref.ref(batch))
        loss = DistillLoss(loss_fn=lambda s, t, batch=batch: (s - t).square().mean(1) + batch[0], compiled=False)
        loss(student, head, teacher, head).loss.backward()
    del batch, loss
    gc.collect()
    assert not any(ref() is not None for ref in batches)
