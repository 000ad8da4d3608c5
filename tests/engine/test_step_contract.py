"""Steps of a user's own, against plain autograd in float64: outputs pooled over the tokens of a text, and a vocabulary
that comes in pieces. Neither knows how the engine cuts its rows."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from chunked_embed import FlexChunkLoss, Needs, Projection, Step
from chunked_embed.engine.step import LOSS

H, V = 5, 11
CHUNKS = pytest.mark.parametrize("chunk_size", [None, 1, 3, 100])


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def assert_same(found: Tensor, expected: Tensor, leaves: list[Tensor], upstream: Tensor | float = -1.5) -> None:
    """Values, and gradients of a backward that comes twice."""
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    grad = torch.as_tensor(upstream, dtype=torch.float64)
    wanted = torch.autograd.grad(expected, leaves, grad)
    for factor in (1, 2):
        got = torch.autograd.grad(found, leaves, factor * grad, retain_graph=True)
        for mine, theirs in zip(got, wanted, strict=True):
            torch.testing.assert_close(mine, factor * theirs, rtol=1e-9, atol=1e-10)


# --- pooled outputs --------------------------------------------------------------------------------------------------


class MaxOverTokens(Step):
    """SPLADE: ``log(1 + relu(z))``, the largest over the tokens of a text; an empty text is zero everywhere.

    The gradient reaches one token for each text and word: the winners are all that it needs, no outputs.
    """

    row_wise = False

    def needs(self, shape):
        return Needs(rows="whole segments")

    def score(self, chunk):
        z, (text, n) = chunk.outputs(), chunk.segments
        index = text[:, None].expand_as(z)
        largest = z.new_full((n, z.shape[1]), -torch.inf).scatter_reduce(0, index, z, "amax")
        rows = torch.arange(chunk.size)[:, None].expand_as(z)
        first = torch.where(z == largest[text], rows, chunk.size)
        winner = torch.full((n, z.shape[1]), chunk.size).scatter_reduce(0, index, first, "amin")
        return {"text": largest.relu().log1p()}, winner

    def pull(self, chunk, kept, parts, upstream, into):
        grad = upstream["text"] * torch.exp(-parts["text"]) * (parts["text"] > 0)
        place = into.place().zero_()
        won = kept < chunk.size
        place.scatter_add_(0, torch.where(won, kept, 0), torch.where(won, grad, 0))
        into.outputs(place)


class Pairs(FlexChunkLoss):
    """Hinge on the dot product of a query and a document."""

    def __init__(self, **options):
        super().__init__(segments_per_group=2, **options)

    def make_step(self, projections):
        return MaxOverTokens()

    def loss_fn(self, scores, groups):
        query, document = scores["text"].unbind(1)
        return (groups["margin"] - (query * document).sum(1)).relu(), {"words": (query > 0).sum(1)}


class InBatch(Pairs):
    """Each query against all documents."""

    def __init__(self, **options):
        super().__init__(couples_batch=True, **options)

    def loss_fn(self, scores, groups):
        query, document = scores["text"].unbind(1)
        return F.cross_entropy(query @ document.T, torch.arange(len(query)), reduction="none")


def texts() -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """-> hidden states (B, T, H), weight, bias, the text of each token, groups. Tokens of a text are not together, some
    are of none, and one text is empty."""
    torch.manual_seed(0)
    groups, tokens = 6, (4, 9)
    text = torch.randint(0, 2 * groups, tokens)
    text[text == 5] = 6
    text[torch.rand(tokens) < 0.2] = -1
    text[1, :groups] = 2 * torch.arange(groups)  # but no group is
    return randn(*tokens, H), randn(V, H), randn(V), text, groups


def pooled(hidden: Tensor, weight: Tensor, bias: Tensor, text: Tensor, groups: int) -> Tensor:
    """(G, 2, V)"""
    z = (hidden @ weight.T + bias).flatten(0, 1).relu().log1p()
    of = text.flatten()
    rows = [z[of == n].amax(0) if (of == n).any() else z.new_zeros(V) for n in range(2 * groups)]
    return torch.stack(rows).view(groups, 2, V)


@CHUNKS
def test_pooled_in_groups(chunk_size):
    hidden, weight, bias, text, groups = texts()
    margin = randn(groups)
    loss = Pairs(chunk_size=chunk_size)
    out = loss(Projection(hidden, weight, bias), segments=text, groups={"margin": margin})
    query, document = pooled(hidden, weight, bias, text, groups).unbind(1)
    expected = (margin - (query * document).sum(1)).relu().mean()
    assert_same(out.loss, expected, [hidden, weight, bias, margin])
    assert torch.equal(out.metrics["words"], (query > 0).sum(1))


@CHUNKS
def test_pooled_over_the_batch(chunk_size):
    hidden, weight, bias, text, groups = texts()
    told = torch.full((groups,), 1 / groups, dtype=torch.float64)
    loss = InBatch(chunk_size=chunk_size)
    out = loss(Projection(hidden, weight, bias), segments=text, group_weight=told)
    query, document = pooled(hidden, weight, bias, text, groups).unbind(1)
    expected = F.cross_entropy(query @ document.T, torch.arange(groups))
    assert_same(out.loss, expected, [hidden, weight, bias])


@CHUNKS
def test_pooled_scores(chunk_size):
    hidden, weight, bias, text, groups = texts()
    found = Pairs(chunk_size=chunk_size).scores(Projection(hidden, weight, bias), segments=text)
    expected = pooled(hidden, weight, bias, text, groups)
    assert found.keys() == {"text"}
    assert_same(found["text"], expected, [hidden, weight, bias], torch.randn(expected.shape))


def test_pooled_chunks_hold_whole_groups():
    hidden, weight, bias, text, groups = texts()
    plan = Pairs(chunk_size=5).plan(
        Projection(hidden, weight, bias), segments=text, groups={"margin": torch.ones(groups)}
    )
    assert plan.chunks > 1 and plan.passes == 1
    assert [stop for block in plan.blocks for stop in (block.start, block.stop)][1:-1:2] == [
        block.start for block in plan.blocks[1:]
    ]


# --- columns in pieces -----------------------------------------------------------------------------------------------

CUTS = {"even": (4, 4, 3), "uneven": (1, 7, 3), "whole": (11,), "single": (1,) * 11}
PIECES = pytest.mark.parametrize("widths", CUTS.values(), ids=CUTS)
PRODUCTS = pytest.mark.parametrize("own_products", [False, True], ids=["outputs", "own products"])


@dataclass
class LogpsInPieces(Step):
    """The log-probability of a target, of whose logits each piece holds some columns.

    A piece's part is its log-sum-exp, and the target's logit where that is in the piece. Merged, they are those of all
    columns, and so is the gradient: ``softmax`` needs no other piece's logits.
    """

    gain: float
    own_products: bool

    row_wise = False
    merges = True

    def needs(self, shape):
        return Needs(forms_outputs=not self.own_products)

    def logits(self, chunk):
        if self.own_products:
            ((x, weight),), bias = chunk.operands()
            z = x @ weight.T + bias
        else:
            z = chunk.outputs()
        return self.gain * z * chunk.rows["sharpness"][:, None]

    def here(self, chunk, z):
        """Whether a logit is the target's."""
        return torch.arange(z.shape[1]) + chunk.first_column == chunk.rows["target"][:, None]

    def score(self, chunk):
        z = self.logits(chunk)
        return {"lse": z.logsumexp(1), "own": torch.where(self.here(chunk, z), z, 0).sum(1)}, None

    def merge(self, parts):
        lse = torch.stack([part["lse"] for part in parts]).logsumexp(0)
        return {"lse": lse, "own": torch.stack([part["own"] for part in parts]).sum(0)}

    def values(self, parts, chunk):
        return {"logps": parts["own"] - parts["lse"]}

    def pull(self, chunk, kept, parts, upstream, into):
        z = self.logits(chunk)
        grad = (self.here(chunk, z).double() - torch.exp(z - parts["lse"][:, None])) * self.upstream(upstream)[:, None]
        if into.wants("sharpness"):
            into.rows("sharpness", (grad * z).sum(1) / chunk.rows["sharpness"])
        grad = self.gain * grad * chunk.rows["sharpness"][:, None]
        if self.own_products:
            ((x, weight),), _ = chunk.operands()
            into.inputs(grad @ weight)
            into.product(grad, x)
            into.bias(grad.sum(0))
        else:
            into.outputs(grad)

    def upstream(self, named):
        return named["logps"]


@dataclass
class CrossEntropyInPieces(LogpsInPieces):
    row_wise = True

    def values(self, parts, chunk):
        return {LOSS: parts["lse"] - parts["own"]}

    def upstream(self, named):
        return -named[LOSS]


class InPieces(FlexChunkLoss):
    def __init__(self, gain=1.3, own_products=False, **options):
        super().__init__(**options)
        self.gain = gain
        self.own_products = own_products

    def make_step(self, projections):
        return CrossEntropyInPieces(self.gain, self.own_products)


class Sequences(InPieces):
    """Log-probabilities of sequences."""

    def make_step(self, projections):
        return LogpsInPieces(self.gain, self.own_products)

    def loss_fn(self, scores, groups):
        return F.softplus(-scores["logps"][:, 0] / scores["count"][:, 0])


@dataclass
class Tokens:
    hidden: Tensor
    weight: Tensor
    bias: Tensor
    target: Tensor
    sharpness: Tensor

    @classmethod
    def make(cls) -> Tokens:
        torch.manual_seed(1)
        target = torch.randint(0, V, (3, 6))
        target[0, 2:4] = -100
        return cls(randn(3, 6, H), randn(V, H), randn(V), target, randn(3, 6))

    @property
    def leaves(self) -> list[Tensor]:
        return [self.hidden, self.weight, self.bias, self.sharpness]

    @property
    def rows(self) -> dict[str, Tensor]:
        return {"target": self.target, "sharpness": self.sharpness}

    def pieces(self, widths: tuple[int, ...]) -> dict[str, Projection]:
        weights, biases = self.weight.split(widths), self.bias.split(widths)
        return {f"{n}": Projection(self.hidden, *parts) for n, parts in enumerate(zip(weights, biases))}

    def logps(self, gain: float = 1.3) -> Tensor:
        """(3, 6), zero where the target is ignored"""
        z = gain * (self.hidden @ self.weight.T + self.bias) * self.sharpness[..., None]
        return -F.cross_entropy(z.flatten(0, 1), self.target.flatten(), reduction="none").view(3, 6)


@PRODUCTS
@PIECES
@CHUNKS
def test_pieces_of_a_row_wise_loss(chunk_size, widths, own_products):
    tokens = Tokens.make()
    loss = InPieces(own_products=own_products, chunk_size=chunk_size)
    out = loss(tokens.pieces(widths), tokens.rows)
    expected = -tokens.logps().sum() / (tokens.target != -100).sum()
    assert_same(out.loss, expected, tokens.leaves)


@PRODUCTS
@PIECES
@CHUNKS
def test_pieces_of_scores_in_groups(chunk_size, widths, own_products):
    tokens = Tokens.make()
    loss = Sequences(own_products=own_products, chunk_size=chunk_size)
    sequence = torch.arange(3)[:, None].expand(3, 6)
    out = loss(tokens.pieces(widths), tokens.rows, segments=sequence)
    mean = tokens.logps().sum(1) / (tokens.target != -100).sum(1)
    assert_same(out.loss, F.softplus(-mean).mean(), tokens.leaves)


@PRODUCTS
@PIECES
@CHUNKS
def test_pieces_of_scores(chunk_size, widths, own_products):
    tokens = Tokens.make()
    loss = Sequences(own_products=own_products, chunk_size=chunk_size)
    found = loss.scores(tokens.pieces(widths), tokens.rows)
    assert_same(found["logps"], tokens.logps(), tokens.leaves, torch.randn(3, 6))


def test_numbers_of_a_step_are_those_of_the_call():
    tokens, loss = Tokens.make(), InPieces()
    for gain in (0.5, 2.6):
        loss.gain = gain
        out = loss(tokens.pieces((4, 7)), tokens.rows)
        assert_same(out.loss, -tokens.logps(gain).sum() / (tokens.target != -100).sum(), tokens.leaves)


# --- steps that do not serve -----------------------------------------------------------------------------------------


class Reluctant(Step):
    def needs(self, shape):
        return Needs(refusal=f"expected at least 20 columns, got {shape.widths[0]}")


class WithFallback(FlexChunkLoss):
    def make_step(self, projections):
        return Reluctant()

    def loss_fn(self, outputs, rows):
        return outputs.square().sum(1)


def test_functions_serve_where_a_step_refuses():
    x, w = randn(4, H), randn(V, H)
    loss = WithFallback(chunk_size=3)
    assert "Reluctant: expected at least 20 columns, got 11" in str(loss.plan(Projection(x, w)))
    assert_same(loss(Projection(x, w)).loss, (x @ w.T).square().sum(1).mean(), [x, w])


class Keen(Step):
    """Squares of outputs, where no more than ``most`` columns are asked for."""

    row_wise = False

    def __init__(self, most):
        self.most = most

    @property
    def key(self):
        return type(self), self.most

    def needs(self, shape):
        return Needs(
            refusal=f"{shape.widths[0]} columns are above {self.most}" if shape.widths[0] > self.most else None
        )

    def score(self, chunk):
        if chunk.keeps:
            chunk.held["outputs"] = chunk.outputs().clone()
        return {"squares": chunk.outputs().square().sum(1)}, None

    def pull(self, chunk, kept, parts, upstream, into):
        outputs = chunk.held.get("outputs", chunk.outputs())
        into.outputs(2 * outputs * upstream["squares"][:, None])


class Eager(Keen):
    pass


class Choosy(FlexChunkLoss):
    """The first step that serves a unit; the same for both, where one serves both."""

    def __init__(self, *most, **options):
        super().__init__(separate_outputs=True, **options)
        self.most = most

    def make_step(self, projections):
        return [cls(most) for cls, most in zip((Keen, Eager), self.most)]

    def score_fn(self, outputs, rows):
        return {"squares": outputs.square().sum(1)}

    def loss_fn(self, scores, groups):
        return (scores["a"]["squares"] - scores["b"]["squares"])[:, 0]


@pytest.mark.parametrize(
    ("most", "steps", "refused"),
    [
        ((20, 20), ("Keen",), ()),
        ((12, 20), ("Eager",), ("Keen: 13 columns are above 12",)),  # one of them would have the first
        ((12, 12), ("Keen", "compiled"), ("Keen: 13 columns are above 12", "Eager: 13 columns are above 12")),
        ((3, 3), ("compiled",), None),
        ((3, 12), ("Eager", "compiled"), None),
    ],
)
@pytest.mark.parametrize("scores_first", [False, True])
def test_steps_in_order(most, steps, refused, scores_first):
    x, a, b = randn(7, H), randn(13, H), randn(V, H)
    loss = Choosy(*most, chunk_size=3, couples_batch=scores_first)
    call = {"a": Projection(x, a), "b": Projection(x, b)}
    plan = loss.plan(call)
    assert set(plan.steps) == set(steps) and f"steps         {', '.join(plan.steps)}" in str(plan)
    assert refused is None or plan.refusals == refused
    expected = ((x @ a.T).square().sum(1) - (x @ b.T).square().sum(1)).mean()
    assert_same(loss(call).loss, expected, [x, a, b])


def test_a_step_that_merges_nothing_sees_all_at_once():
    seen = []

    class Looking(Step):
        def score(self, chunk):
            seen.append(chunk.names)
            return {LOSS: chunk.outputs("a").sum(1) * chunk.outputs("b").sum(1)}, None

        def pull(self, chunk, kept, parts, upstream, into):
            grads = {name: chunk.outputs(other).sum(1) for name, other in (("a", "b"), ("b", "a"))}
            for name, grad in grads.items():
                into.outputs((grad * upstream[LOSS])[:, None].expand_as(chunk.outputs(name)).clone(), name)

    class Both(FlexChunkLoss):
        def make_step(self, projections):
            return Looking()

    x, a, b = randn(4, H), randn(V, H), randn(3, H)
    out = Both(chunk_size=2)({"a": Projection(x, a), "b": Projection(x, b)})
    assert seen == [("a", "b")] * 2
    assert_same(out.loss, ((x @ a.T).sum(1) * (x @ b.T).sum(1)).mean(), [x, a, b])


class InMultiples(Step):
    """Row sums, of chunks whose rows are a multiple of six."""

    def needs(self, shape):
        return Needs(multiple=6)

    def score(self, chunk):
        return {LOSS: chunk.outputs().sum(1)}, None

    def pull(self, chunk, kept, parts, upstream, into):
        into.outputs(upstream[LOSS][:, None].expand(-1, chunk.outputs().shape[1]))


class InMultiplesLoss(FlexChunkLoss):
    def make_step(self, projections):
        return InMultiples()


@pytest.mark.parametrize("options", [{"chunk_size": 20}, {"chunk_size": 4}, {"max_chunk_bytes": 4000}], ids=str)
def test_chunks_in_multiples(options):
    x, weight = (torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (50, 7))
    loss = InMultiplesLoss(compiled=False, **options)
    plan = loss.plan(Projection(x, weight))
    assert plan.chunk_rows % 6 == 0 and plan.chunks > 1
    expected = (x @ weight.T).sum(1).mean()
    output = loss(Projection(x, weight)).loss
    torch.testing.assert_close(output, expected)
    for found, truth in zip(torch.autograd.grad(output, (x, weight)), torch.autograd.grad(expected, (x, weight))):
        torch.testing.assert_close(found, truth)
