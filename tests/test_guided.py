"""Guided InfoNCE on plain tensors against the formula over whole matrices."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from chunked_embed import functional as CF

EAGER = {"compiled": False}
EXACT = {"rtol": 1e-9, "atol": 1e-12}


def cosines(a: Tensor, b: Tensor) -> Tensor:
    return F.cosine_similarity(a[:, None], b[None], dim=-1)


def formula(
    sides: list[Tensor],
    guides: list[Tensor],
    temperature: float = 0.01,
    margin_strategy: str = "absolute",
    margin: float = 0.0,
    contrast_anchors: bool = True,
    contrast_positives: bool = True,
) -> Tensor:
    (q, d, *negatives), (gq, gd, *guide_negatives) = sides, guides
    positive = cosines(gq, gd).diagonal()[:, None]
    limit = positive - margin * (positive.abs() if margin_strategy == "relative" else 1)
    pairs = [(cosines(q, d), (cosines(gq, gd) > limit) & ~torch.eye(len(q), dtype=torch.bool))]
    pairs += [(cosines(q, n), cosines(gq, g) > limit) for n, g in zip(negatives, guide_negatives)]
    pairs += [(cosines(q, q), cosines(gq, gq) > limit)] if contrast_anchors else []
    pairs += [(cosines(d, d), cosines(gd, gd) > limit)] if contrast_positives else []
    scores = torch.cat([s.masked_fill(drop, -torch.inf) for s, drop in pairs], 1) / temperature
    return F.cross_entropy(scores, torch.arange(len(q)))


def inputs(rows: int, negatives: int = 0, dtype: torch.dtype = torch.float64, width: int = 5, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    sides = [torch.randn(rows, 6, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2 + negatives)]
    guides = [torch.randn(rows, width, generator=generator, dtype=torch.float64) for _ in range(2 + negatives)]
    guides[1] += guides[0]  # the guide knows most pairs, so that something is left
    return [side.requires_grad_() for side in sides], [guide.to(dtype) for guide in guides]


def guided(sides: list[Tensor], guides: list[Tensor], **options) -> Tensor:
    negatives = {"hard_negatives": sides[2:], "guide_hard_negatives": guides[2:]}
    return CF.guided_info_nce(*sides[:2], *guides[:2], **negatives, **EAGER | options)


def assert_same(sides: list[Tensor], mine: Tensor, theirs: Tensor, **tolerance: float) -> None:
    tolerance = tolerance or EXACT
    torch.testing.assert_close(mine, theirs, **tolerance)
    for a, b in zip(torch.autograd.grad(mine, sides), torch.autograd.grad(theirs, sides), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("rows", [1, 2, 11])
@pytest.mark.parametrize("negatives", [0, 1, 3])
@pytest.mark.parametrize("contrasts", [(True, True), (True, False), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize("strategy", ["absolute", "relative"])
def test_is_the_formula(rows, negatives, contrasts, strategy):
    sides, guides = inputs(rows, negatives)
    for margin in (0.0, 0.3, -0.3):
        options = {"temperature": 0.1, "margin_strategy": strategy, "margin": margin}
        options |= dict(zip(("contrast_anchors", "contrast_positives"), contrasts))
        mine = guided(sides, guides, chunk_size=4, **options)
        assert_same(sides, mine, formula(sides, guides, **options))


def test_the_masks_matter():
    """The inputs above drop some negatives and keep some, in every block."""
    _, guides = inputs(11, 1)
    gq, gd, gn = guides
    limit = cosines(gq, gd).diagonal()[:, None]
    for block in (cosines(gq, gd), cosines(gq, gn), cosines(gq, gq), cosines(gd, gd)):
        assert 0 < (block > limit).double().mean() < 0.9


@pytest.mark.parametrize("chunk_size", [1, 3, 11, 100, None])
def test_chunks_change_nothing(chunk_size):
    sides, guides = inputs(11, 1)
    assert_same(sides, guided(sides, guides, chunk_size=chunk_size), guided(sides, guides, chunk_size=11))


def test_gradcheck():
    sides, guides = inputs(4, 1)
    assert torch.autograd.gradcheck(lambda *x: guided(list(x), guides, temperature=0.2, chunk_size=3), sides)


# Equal texts have equal similarities: at a margin of 0 they stay, however the products round.
def duplicates(dtype: torch.dtype, width: int) -> tuple[list[Tensor], list[Tensor]]:
    sides, guides = inputs(9, 1, dtype, width)
    with torch.no_grad():
        for x in (sides, guides):
            x[1][3:6] = x[1][0]  # documents 0, 3, 4 and 5 are one text
            x[2][:4] = x[1][:4]  # hard negatives that are copies of the document
            x[0][7] = x[1][7]  # a query that is its document: its own diagonal ties
    return sides, guides


@pytest.mark.parametrize("width", [5, 64, 1000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_ties_stay_in_every_dtype(dtype, width):
    sides, guides = duplicates(dtype, width)
    exact = formula([side.double() for side in sides], [guide.double() for guide in guides], temperature=0.5)
    for chunk_size in (1, 4, None):
        mine = guided(sides, guides, temperature=0.5, chunk_size=chunk_size)
        assert mine.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        # A tie that is lost changes the loss by several percent.
        tolerance = {torch.float64: 1e-9, torch.float32: 1e-5}.get(dtype, 5e-3)
        torch.testing.assert_close(mine.double(), exact, rtol=tolerance, atol=0.0)


@pytest.mark.parametrize("what", ["equal", "zero", "equal guide", "zero guide"])
def test_degenerate_input_is_the_formula_and_finite(what):
    sides, guides = inputs(5, 1)
    with torch.no_grad():
        for x in guides if "guide" in what else sides:
            x.fill_(0.0 if "zero" in what else 2.0)
    mine = guided(sides, guides, temperature=0.1)
    torch.testing.assert_close(mine, formula(sides, guides, temperature=0.1), **EXACT)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(mine, sides))


def test_everything_but_the_positive_dropped():
    sides, guides = inputs(6, 1)
    mine = guided(sides, guides, margin=10.0)
    assert mine.item() == 0.0
    assert not any(grad.any() for grad in torch.autograd.grad(mine, sides))


@pytest.mark.parametrize("temperature", [1e-4, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_temperatures_are_finite(temperature, dtype):
    sides, guides = inputs(9, 1, dtype)
    mine = guided(sides, guides, temperature=temperature)
    grads = torch.autograd.grad(mine, sides)
    assert mine.isfinite() and all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("own", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("guides_dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_guide_has_a_dtype_of_its_own(own, guides_dtype):
    sides, _ = inputs(9, 1, own)
    _, guides = inputs(9, 1, guides_dtype, width=17)
    mine = guided(sides, guides, temperature=0.5)
    assert mine.dtype == (torch.float64 if own == torch.float64 else torch.float32)
    exact = formula([side.double() for side in sides], [guide.double() for guide in guides], temperature=0.5)
    torch.testing.assert_close(
        mine.double(), exact, rtol={torch.float64: 1e-6, torch.float32: 1e-5}.get(own, 0.02), atol=0
    )
    assert all(grad.dtype == own for grad in torch.autograd.grad(mine, sides))


def test_similarities_of_a_half_precision_guide_are_not_rounded():
    """Two documents whose similarities differ by less than bfloat16 can tell: the nearer one is dropped."""
    query = torch.tensor([[1.0, 0.0, 0.0]])
    near, far = torch.tensor([[64.0, 5.0, 0.0]]), torch.tensor([[64.0, 5.0, 0.25]])
    assert F.cosine_similarity(query, near).bfloat16() == F.cosine_similarity(query, far).bfloat16()
    sides = [torch.eye(3)[:1] + 0.1 * i for i in range(3)]
    options = {"contrast_anchors": False, "contrast_positives": False, "temperature": 1.0}
    kept, dropped = (
        guided(sides, [x.bfloat16() for x in (query, *documents)], **options)
        for documents in ((near, far), (far, near))
    )
    assert dropped.item() == 0.0 and kept.item() > 0.1


def test_autocast_keeps_ties():
    """Products round to bfloat16 and the norms go with them."""
    sides, guides = duplicates(torch.float32, 64)
    exact = formula([side.double() for side in sides], [guide.double() for guide in guides], temperature=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        mine = guided(sides, guides, temperature=0.5)
    assert mine.dtype == torch.float32
    torch.testing.assert_close(mine.double(), exact, rtol=5e-3, atol=0)
    assert all(grad.dtype == torch.float32 for grad in torch.autograd.grad(mine, sides))


def test_no_gradient_goes_to_the_guide():
    sides, guides = inputs(5)
    guides = [guide.requires_grad_() for guide in guides]
    guided(sides, guides).backward()
    assert all(guide.grad is None for guide in guides)
    with torch.no_grad():
        assert not guided(sides, guides).requires_grad


BAD = {
    "guide rows": (lambda s, g: guided(s, [x[:3] for x in g]), ValueError, "5 rows from the guide"),
    "unlike rows": (lambda s, g: guided([s[0], s[1][:3]], g), ValueError, "one shape"),
    "unlike guides": (lambda s, g: guided(s, [g[0], g[1][:, :2]]), ValueError, "one shape"),
    "no guide for a negative": (lambda s, g: guided([*s, s[1]], g), ValueError, "1 hard negatives, got 0"),
    "mixed": (lambda s, g: guided([s[0], s[1].float()], g), TypeError, "one dtype"),
    "temperature": (lambda s, g: guided(s, g, temperature=0.0), ValueError, "temperature to be a positive"),
    "NaN temperature": (lambda s, g: guided(s, g, temperature=float("nan")), ValueError, "finite"),
    "margin": (lambda s, g: guided(s, g, margin=float("inf")), ValueError, "margin to be a finite"),
    "strategy": (lambda s, g: guided(s, g, margin_strategy="both"), ValueError, "margin_strategy"),
    "no rows": (lambda s, g: guided([x[:0] for x in s], [x[:0] for x in g]), ValueError, "at least one row"),
}


@pytest.mark.parametrize("call", BAD)
def test_refuses(call):
    function, error, message = BAD[call]
    with pytest.raises(error, match=message):
        function(*inputs(5))


@pytest.mark.slow
def test_compiled():
    for rows in (11, 7):
        sides, guides = inputs(rows, 1)
        mine = guided(sides, guides, compiled=True, temperature=0.1, margin=0.1)
        assert_same(sides, mine, formula(sides, guides, temperature=0.1, margin=0.1))
