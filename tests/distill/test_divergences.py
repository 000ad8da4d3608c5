"""The pure functions: against formulas in probabilities, closed-form gradients, TRL, scipy and finite differences."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from distill_zoo import CASES, HT, V

from chunked_embed.checks import POSITIVE
from chunked_embed.fields import number
from distill import DIVERGENCES, Divergence
from distill import divergences as D

ALL = pytest.mark.parametrize("name", list(CASES))


def rows(m=6, seed=0, scale=2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(m, V, dtype=torch.float64, generator=generator) for _ in range(2))
    head = torch.randn(V, HT, dtype=torch.float64, generator=generator)
    return student.to(dtype).requires_grad_(), teacher.to(dtype), head.to(dtype)


def call(name, student, teacher, head):
    case = CASES[name]
    numbers = dict(case.numbers)
    if numbers.get("kernel") == "linear":
        numbers["embedding"] = head
    return DIVERGENCES[case.divergence](student, teacher, **numbers)


@ALL
@pytest.mark.parametrize("scale", [0.1, 2.0, 20.0])
def test_value_and_gradient_equal_the_formulas(name, scale):
    student, teacher, head = rows(scale=scale)
    values = call(name, student, teacher, head)
    torch.testing.assert_close(values, CASES[name].reference(student, teacher, head), rtol=1e-8, atol=1e-12)
    (gradient,) = torch.autograd.grad(values.sum(), student)
    expected = CASES[name].gradient(student.detach(), teacher, head)
    torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-12)


@ALL
def test_gradcheck(name):
    if CASES[name].divergence == "taid" or CASES[name].divergence == "adaptive_kl" or "detached" in name:
        pytest.skip("part of it is detached: its gradient is not the slope of its value")
    student, teacher, head = rows(m=3)
    assert torch.autograd.gradcheck(lambda z: call(name, z, teacher, head), (student,))


@ALL
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equal_rows_give_zero(name, dtype):
    student, _, head = rows(dtype=dtype, scale=5.0)
    values = call(name, student, student.detach().clone(), head)
    if CASES[name].zero:
        assert torch.equal(values, torch.zeros_like(values))
    (gradient,) = torch.autograd.grad(values.sum(), student)
    assert gradient.abs().max() <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", [n for n in CASES if CASES[n].divergence not in ("earth_mover", "uld")])
def test_two_tokens_differ_and_the_rest_agree_to_the_last_bit(name):
    """Both branches of the formulas meet where log p = log q; their gradients must be those of the whole."""
    student, _, head = rows(m=300)
    log_q = student.detach().log_softmax(1)
    swapped = log_q[:, [1, 0, *range(2, V)]]
    same = (D.normalized(log_q).log == D.normalized(swapped).log)[:, 2:].all(1)  # the normalisers round alike
    assert same.sum() > 20
    log_q, swapped = log_q[same], swapped[same]
    leaf = log_q.clone().requires_grad_()
    values = call(name, leaf, swapped, head)
    torch.testing.assert_close(values, CASES[name].reference(leaf, swapped, head), rtol=1e-8, atol=1e-12)
    (gradient,) = torch.autograd.grad(values.sum(), leaf)
    if name == "tvd":  # its reference rounds otherwise, and takes the sign of that
        q, p = log_q.exp(), swapped.exp()
        slope = torch.where(torch.arange(V) < 2, (q - p).sign() / 2, 0) * q
        expected = slope - q * slope.sum(1, keepdim=True)
    else:
        expected = CASES[name].gradient(log_q, swapped, head)
    torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-12)


@ALL
@pytest.mark.parametrize("scale", [1e3, 1e6, 1e18])
def test_huge_logits_stay_finite(name, scale):
    if CASES[name].divergence == "mse" and scale > 1e6:
        pytest.skip("their square is no float32")
    student, teacher, head = rows(scale=scale, dtype=torch.float32)
    values = call(name, student, teacher, head)
    (gradient,) = torch.autograd.grad(values.sum(), student)
    assert torch.isfinite(values).all() and torch.isfinite(gradient).all()


@ALL
def test_close_rows_keep_their_digits(name):
    """float32 rows that differ by a hundredth: the plain formula in float32 loses most digits of some."""
    student, _, head = rows(scale=3.0)
    noise = rows(seed=1, scale=0.01)[1]
    teacher = student.detach() + noise
    exact = CASES[name].reference(student, teacher, head)
    (slope,) = torch.autograd.grad(exact.sum(), student)
    leaf = student.detach().float().requires_grad_()
    values = call(name, leaf, teacher.float(), head.float())
    (gradient,) = torch.autograd.grad(values.sum(), leaf)
    torch.testing.assert_close(values.double(), exact, rtol=1e-3, atol=1e-9)
    assert (gradient.double() - slope).norm() <= 1e-3 * slope.norm() + 1e-6


@pytest.mark.parametrize("beta", [1e-6, 0.1, 0.5, 0.9, 1 - 1e-6])
def test_the_log_of_a_mixture_in_float32(beta):
    """A series for small differences, plain exp and log for others; they meet at 0.35."""
    d = torch.cat([torch.linspace(-3, 3, 20001), torch.logspace(-12, 0, 500), torch.tensor([0.0, -80.0, 80.0])])
    d = d.double()
    b = torch.tensor(beta, dtype=torch.float64)
    exact = torch.log1p(b * torch.expm1(d))
    for given in (beta, torch.tensor(beta, dtype=torch.float64)):
        found = D._log_mean(d.float(), given).double()
        for near, rtol, atol in ((d.abs() < 0.35, 2e-6, 0.0), (d.abs() >= 0.35, 1e-6, 3e-7)):
            torch.testing.assert_close(found[near], exact[near], rtol=rtol, atol=atol)


UNMASKED = ("cosine", "mse", "kvd", "uld", "earth_mover")


@pytest.mark.parametrize("name", [n for n in CASES if CASES[n].divergence not in UNMASKED])
def test_tokens_that_cannot_occur_count_for_nothing(name):
    student, teacher, head = rows(scale=3.0)
    short = student.detach()[:, :11].clone().requires_grad_()
    expected = call(name, short, teacher[:, :11], head[:11])
    masked = torch.arange(V) >= 11
    leaf = student.detach().requires_grad_()
    values = call(name, leaf.masked_fill(masked, -math.inf), teacher.masked_fill(masked, -math.inf), head)
    torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-12)
    (gradient,) = torch.autograd.grad(values.sum(), leaf)
    torch.testing.assert_close(gradient[:, :11], torch.autograd.grad(expected.sum(), short)[0], rtol=1e-9, atol=1e-12)
    assert not gradient[:, 11:].any()


@pytest.mark.parametrize("name", ["kl", "jsd .2", "skew_kl", "skew_reverse_kl"])
def test_a_teacher_without_support(name):
    """Finite where the teacher is zero, in float32 too."""
    student, teacher, head = rows()
    p = teacher.masked_fill(torch.arange(V) >= 9, -math.inf)
    almost = teacher.masked_fill(torch.arange(V) >= 9, -600.0)  # what the plain formula can take
    exact = CASES[name].reference(student, almost, head)
    (slope,) = torch.autograd.grad(exact.sum(), student)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        leaf = student.detach().to(dtype).requires_grad_()
        found = call(name, leaf, p.to(dtype), head)
        torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance)
        (gradient,) = torch.autograd.grad(found.sum(), leaf)
        torch.testing.assert_close(gradient.double(), slope, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", [n for n in CASES if CASES[n].divergence not in ("mse", "cosine", "kvd")])
def test_nasty_logits_stay_finite(name):
    """Any scale, any distance between the two, tokens that cannot occur, the largest float32."""
    generator = torch.Generator().manual_seed(0)
    for n in range(60):
        width = int(torch.randint(1, 12, (), generator=generator))
        near, far = (10 ** (31 * torch.rand((), generator=generator) - 6) for _ in range(2))
        student = near * torch.randn(4, width, generator=generator)
        teacher = (student if n % 2 else 0) + far * torch.randn(4, width, generator=generator)
        never = (torch.rand(width, generator=generator) < 0.3) & (torch.arange(width) > 0)
        if n % 3 == 0:
            teacher = teacher.masked_fill(never, -math.inf)
        if n % 6 == 0:
            student = student.masked_fill(never, -math.inf)
        if n % 5 == 0:
            student = student.masked_fill(torch.rand(4, width, generator=generator) < 0.2, 3e38)
        student.requires_grad_()
        values = call(name, student, teacher, None)
        (gradient,) = torch.autograd.grad(values.sum(), student)
        assert torch.isfinite(values).all() and torch.isfinite(gradient).all(), n
        assert (values >= -1e-6).all(), n


def test_far_apart_rows_keep_their_value():
    student, teacher, _ = rows(scale=1e5, dtype=torch.float32)
    exact = CASES["kl"].reference(student.double(), teacher.double(), None)
    torch.testing.assert_close(D.kl(student, teacher).double(), exact, rtol=1e-5, atol=1.0)


def test_a_number_may_be_a_tensor():
    student, teacher, _ = rows()
    beta = torch.tensor(0.3, dtype=torch.float64)
    for dtype in (torch.float64, torch.float32):
        found = D.jsd(student.to(dtype), teacher.to(dtype), beta=beta)
        assert found.dtype == dtype
        torch.testing.assert_close(found, D.jsd(student.to(dtype), teacher.to(dtype), beta=0.3))


@pytest.mark.parametrize("beta", [1e-9, 1 - 1e-9])
def test_a_beta_next_to_its_limit_is_finite(beta):
    student, teacher, _ = rows(scale=100.0, dtype=torch.float32)
    values = D.jsd(student, teacher, beta=beta)
    assert torch.isfinite(values).all()
    assert torch.isfinite(torch.autograd.grad(values.sum(), student)[0]).all()


@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 0.9, 1])
def test_jsd_equals_trl(beta):
    trainer = pytest.importorskip("trl.experimental.gkd").GKDTrainer
    student, teacher, _ = rows()
    reference = trainer.generalized_jsd_loss(student[:, None], teacher[:, None], beta=beta, temperature=2.0)
    found = D.jsd(student / 2, teacher / 2, beta=float(beta)).mean()
    torch.testing.assert_close(found, reference, rtol=1e-9, atol=1e-12)
    slopes = [torch.autograd.grad(value, student)[0] for value in (found, reference)]
    torch.testing.assert_close(*slopes, rtol=1e-9, atol=1e-12)


def test_earth_mover_and_jsd_equal_scipy():
    stats, distance = pytest.importorskip("scipy.stats"), pytest.importorskip("scipy.spatial.distance")
    student, teacher, _ = rows()
    q, p = (z.detach().softmax(1).numpy() for z in (student, teacher))
    moved = D.earth_mover(student.detach(), teacher)
    squared = D.earth_mover(student.detach(), teacher, p=2)
    half = D.jsd(student.detach(), teacher)
    ids = range(V)
    for i in range(len(q)):
        assert float(moved[i]) == pytest.approx(stats.wasserstein_distance(ids, ids, q[i], p[i]) / (V - 1), rel=1e-9)
        energy = stats.energy_distance(ids, ids, q[i], p[i])  # sqrt(2 * Cramér)
        assert float(squared[i]) == pytest.approx(energy**2 / 2 / (V - 1), rel=1e-9)
        assert float(half[i]) == pytest.approx(distance.jensenshannon(p[i], q[i]) ** 2, rel=1e-9)


def test_uld_pads_the_shorter_vocabulary():
    student, teacher, _ = rows()
    q, p = student.softmax(1).sort(1, descending=True).values, teacher[:, :9].softmax(1).sort(1, descending=True).values
    expected = (q[:, :9] - p).abs().sum(1) + q[:, 9:].sum(1)
    torch.testing.assert_close(D.uld(student, teacher[:, :9]), expected)
    torch.testing.assert_close(D.uld(teacher[:, :9], student), expected)


def test_options_of_a_function():
    """Plain defaults, and fields, which leave a function that anybody may call."""

    def mine(student, teacher, margin=0.5, *, kind="a", width=number(3.0, POSITIVE), given=None):
        return margin, kind, width

    mine(None, None)
    found = Divergence(mine).fields
    assert {name: field.default for name, field in found.items()} == dict(margin=0.5, kind="a", width=3.0, given=None)
    assert [name for name, field in found.items() if field.range is not None] == ["margin", "width"]
    assert mine(None, None) == (0.5, "a", 3.0) and str(inspect.signature(mine)).endswith("width=3.0, given=None)")
    assert Divergence(mine).fields == found and DIVERGENCES["kl"].fields == {}
    assert list(DIVERGENCES["kvd"].fields) == ["kernel"]  # the head is the loss's to give
    assert {name: entry.name for name, entry in DIVERGENCES.items()} == {name: name for name in DIVERGENCES}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda s, t: D.kl(s, t[:, 1:]), "two tensors of logits"),
        (lambda s, t: D.mse(s, t[:, 1:]), "two tensors of logits"),
        (lambda s, t: D.kl(s[None], t[None]), "two tensors of logits"),
        (lambda s, t: D.kvd(s, t), "embedding"),
        (lambda s, t: D.alpha_beta(s, t, ab_alpha=0.0, ab_beta=0.0), "above zero"),
    ],
)
def test_wrong_input_is_refused(wrong, message):
    student, teacher, _ = rows()
    with pytest.raises(ValueError, match=message):
        wrong(student, teacher)
