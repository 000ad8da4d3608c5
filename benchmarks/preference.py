"""Preference losses beside their product floors and other people's, then whole training steps.

    python benchmarks/preference.py                                       # everything, on the GPU
    python benchmarks/preference.py --only dpo,completion
    python benchmarks/preference.py --only losses --match ORPO --no-peers
    python benchmarks/preference.py --device cpu --no-compiled            # small, in seconds

A floor is the bare matrix products over the rows in use, in the same chunks: one for the reference where there is one,
three for the policy, four where code behind the log-probabilities decides, or the loss couples the batch. Groups longer
than a chunk take us one product more than their floor. The truth is formed in float64 from blocks of tokens, by
formulas of its own for DPO and the training steps. Peers import what they need where they are called; one that is not
installed is a line that says so.

The value is the margins of the pairs' rewards; log-probabilities, in nats, of `logps`, and a training step's loss.
Logits have a standard deviation of 8, targets are likely tokens, and the reference is near the policy: margins are then
what they are in training, small differences of large sums, and rounded logits show in them.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import chain
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from measure import (
    FLOOR,
    OURS,
    PEER,
    RESULTS,
    Benchmark,
    Budget,
    Candidate,
    Loss,
    Match,
    Missing,
    Out,
    Peers,
    Profile,
    as_candidates,
    floors,
    likely_tokens,
    precisions,
    products,
    trl_kernel,
    value,
)
from torch import Tensor

import alignment as al
from chunked_embed import ChunkPlan, Projection, TokenStatistics, linear_logps

BOUNDS = {torch.bfloat16: 1e-2, torch.float32: 1e-4}
STEP_BOUNDS = {torch.bfloat16: 5e-2, torch.float32: 1e-3}
BLOCK = 1024  # rows of float64 logits that the truth holds, some five times
MARGINS, GRADIENTS = "margins", ("hidden", "weight")
TRL_STATISTICS = ("log_probs", "entropy", "mean_logits", "is_top1")  # what its DPO trainer asks of the policy


# --- a batch, and the truth about it ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    pairs: int
    tokens: int
    vocabulary: int
    width: int
    lengths: tuple[int, ...] = ()  # of the completions, a number a pair or one for all; without: every token

    def small(self) -> "Shape":
        fewer = tuple(max(n // 256, 1) for n in self.lengths)
        return Shape(min(self.pairs, 4), self.tokens // 256, 300, 32, fewer[:4])

    def title(self, name: str, dtype: torch.dtype) -> str:
        used = f" ({' and '.join(map(str, dict.fromkeys(self.lengths)))} used)" if self.lengths else ""
        size = f"{self.pairs} {'pair' if self.pairs == 1 else 'pairs'} x {self.tokens}{used}"
        return f"{name}, {size}, V={self.vocabulary}, H={self.width}, {str(dtype).removeprefix('torch.')}"


@dataclass
class Batch:
    """Sequences, the chosen ones first; targets are aligned, -100 is prompt or padding."""

    hidden: Tensor  # (S, T, H)
    weight: Tensor  # (V, H)
    target: Tensor  # (S, T)
    ref_hidden: Tensor  # (S, T, H)
    ref_weight: Tensor  # (V, H)

    @property
    def policy(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden, self.weight, self.target

    @property
    def leaves(self) -> list[Tensor]:
        return [self.hidden, self.weight]

    @property
    def reference(self) -> dict[str, Tensor]:
        return {"ref_hidden": self.ref_hidden, "ref_weight": self.ref_weight}

    @property
    def used(self) -> Tensor:
        return self.target != -100

    def floor(self, plan: ChunkPlan, forwards: int = 1, reference: bool = True) -> list[Candidate]:
        """`forwards` products of the policy, two back, and the reference's."""
        frozen = [(self.ref_hidden.flatten(0, 1), self.ref_weight)] if reference else []
        # The first rows stand for those in use: as many of them.
        trained, label = (self.hidden.flatten(0, 1), self.weight), f"{forwards + 2 + reference} products"
        return floors(label, trained, frozen, chunk_sizes(plan), forwards=forwards)


def random_batch(bench: Benchmark, shape: Shape, dtype: torch.dtype) -> Batch:
    """Sequences of likely tokens, and a reference that is near the policy."""
    torch.manual_seed(0)
    sequences = 2 * shape.pairs
    like: dict[str, Any] = {"device": bench.device, "dtype": dtype}
    hidden = torch.randn(sequences, shape.tokens, shape.width, **like)
    weight = torch.randn(shape.vocabulary, shape.width, **like).mul_(8 * shape.width**-0.5)
    target = likely_tokens(hidden, weight)
    if shape.lengths:
        lengths = torch.tensor(shape.lengths, device=bench.device).expand(shape.pairs).repeat(2)
        target[torch.arange(shape.tokens, device=bench.device) < shape.tokens - lengths[:, None]] = -100
    ref_hidden = torch.randn_like(hidden).mul_(0.02).add_(hidden)
    return Batch(hidden.requires_grad_(), weight.requires_grad_(), target, ref_hidden, weight.detach().clone())


def chunk_sizes(plan: ChunkPlan) -> list[int]:
    return [span.rows for block in plan.blocks for span in block.spans]


def log_probs(hidden: Tensor, weight: Tensor, index: Tensor) -> Iterator[Tensor]:
    """Of the tokens `index`, a block at a time, in float64."""
    rows, wide = hidden.detach().flatten(0, 1), weight.detach().double()
    return ((rows[part].double() @ wide.T).log_softmax(1) for part in index.split(BLOCK))


Formula = Callable[..., tuple[Tensor, Tensor]]
"""`(logps, ref, kl)`, each (S, T), float64, zero on tokens that are not used -> the loss, and the case's value."""


def true_step(batch: Batch, formula: Formula, reference: bool = True) -> list[Tensor]:
    """Value and gradients of any function of the tokens' log-probabilities and of KL(reference || policy)."""
    index = batch.used.flatten().nonzero()[:, 0]
    parts, ids = index.split(BLOCK), batch.target.flatten()
    scores = torch.zeros(3, batch.target.numel(), dtype=torch.float64, device=ids.device)
    ref_blocks = log_probs(batch.ref_hidden, batch.ref_weight, index) if reference else [None] * len(parts)
    for part, log_p, log_r in zip(parts, log_probs(batch.hidden, batch.weight, index), ref_blocks, strict=True):
        of_target = ids[part, None]
        scores[0, part] = log_p.gather(1, of_target)[:, 0]
        if log_r is not None:
            scores[1, part] = log_r.gather(1, of_target)[:, 0]
            scores[2, part] = (log_r.exp() * (log_r - log_p)).sum(1)
    logps, ref, kl = (s.view(batch.target.shape) for s in scores)
    learns = [logps.requires_grad_(), kl.requires_grad_()]
    loss, value = formula(logps, ref, kl)
    pulls = torch.autograd.grad(loss, learns, allow_unused=True, materialize_grads=True)
    of_logps, of_kl = (pull.flatten()[:, None] for pull in pulls)

    wide, rows = batch.weight.detach().double(), batch.hidden.detach().flatten(0, 1)
    grad_hidden = torch.zeros(rows.shape, dtype=torch.float32, device=rows.device)
    grad_weight = torch.zeros_like(wide)
    ref_blocks = log_probs(batch.ref_hidden, batch.ref_weight, index) if bool(of_kl.any()) else [None] * len(parts)
    for part, log_p, log_r in zip(parts, log_probs(batch.hidden, batch.weight, index), ref_blocks, strict=True):
        p = log_p.exp()
        grad = p * -of_logps[part]
        grad.scatter_add_(1, ids[part, None], of_logps[part])
        if log_r is not None:
            grad += of_kl[part] * (p - log_r.exp())
        grad_hidden[part] = (grad @ wide).float()
        grad_weight.addmm_(grad.T, rows[part].double())
    return [value.detach(), grad_hidden.view(batch.hidden.shape), grad_weight.float()]


def margins(logps: Tensor, ref: Tensor, beta: float = 0.1) -> Tensor:
    chosen, rejected = (logps - ref).sum(1).chunk(2)
    return beta * (chosen - rejected)


def dpo(logps: Tensor, ref: Tensor, kl: Tensor | None = None) -> tuple[Tensor, Tensor]:
    found = margins(logps, ref)
    return -F.logsigmoid(found).mean(), found


# --- other people's --------------------------------------------------------------------------------------------------


def liger(name: str, *arguments: Any, **options: Any) -> Callable[[], tuple[Tensor, Any]]:
    """-> its loss, and what it reports."""

    def call() -> tuple[Tensor, Any]:
        from liger_kernel import chunked_loss

        return getattr(chunked_loss, name)(**options)(*arguments)

    return call


def liger_margins(call: Callable[[], tuple[Tensor, Any]]) -> Tensor:
    """Of its pairs: the rewards stand behind five statistics. Of sequences it reports sums behind four."""
    _, told = call()
    return told[5] - told[6] if told[5].dim() else (told[4] - told[5])


def trl_logps(hidden: Tensor, weight: Tensor, target: Tensor, outputs: tuple[str, ...] = ("log_probs",)) -> Tensor:
    """As TRL's fused head calls its kernel: the tokens in use, scattered back."""
    kernel, used = trl_kernel("chunked_logprob", "ChunkedLogProbFunction"), target != -100
    found = kernel.apply(hidden[used], weight, None, target[used], 1.0, 32768, None, 1.0, outputs)[0]
    return found.new_zeros(used.shape).masked_scatter(used, found)


def liger_logps(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Liger's scaled cross-entropy of the tokens in use, scattered back."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Kernel

    used = target != -100
    found = -Kernel.apply(hidden[used], weight, target[used])
    return found.new_zeros(used.shape).masked_scatter(used, found)


def whole_logps(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    log_p = (hidden @ weight.T).log_softmax(-1, dtype=torch.float32)
    return log_p.gather(2, target.clamp_min(0)[..., None])[..., 0] * (target != -100)


def dpo_of(
    scorer: Callable[..., Tensor], batch: Batch, *statistics: Any, ref: Tensor | None = None
) -> tuple[Loss, Loss]:
    """-> the loss, and its margins."""

    def both() -> tuple[Tensor, Tensor]:
        known = ref
        if known is None:
            with torch.no_grad():
                known = scorer(batch.ref_hidden, batch.ref_weight, batch.target)
        return dpo(scorer(*batch.policy, *statistics), known)

    return lambda: both()[0], lambda: both()[1]


# --- DPO -------------------------------------------------------------------------------------------------------------

large = partial(Shape, vocabulary=128256, width=4096)
narrow = partial(Shape, vocabulary=128256, width=2048)
LONG_PAIR = (8192,) + 15 * (256,)
DPO_CASES = {
    "dpo": [large(4, 1024), Shape(8, 1024, vocabulary=151936, width=2048)],
    "completion": [large(4, 2048, lengths=(length,)) for length in (512, 1024, 2048)],
    "length": [
        narrow(8, 1024),
        narrow(1, 8192),
        narrow(1, 32768),
        narrow(16, 8192, lengths=LONG_PAIR),
        narrow(16, 8192, lengths=LONG_PAIR, width=1024),
    ],
}


def run_dpo(bench: Benchmark, case: str, shape: Shape, dtype: torch.dtype, options: dict[str, Any]) -> None:
    if not bench.chosen(*(shape.title(name, dtype) for name in ("DPO", "DPO, ref_logps given"))):
        return
    batch, bound = random_batch(bench, shape, dtype), BOUNDS[dtype]
    expected = cache(partial(true_step, batch, dpo))

    def ours(name: str, given: dict[str, Tensor], **more: Any) -> Iterator[Candidate]:
        for label, precision in precisions(name, dtype).items():
            call = partial(al.DPOLoss(beta=0.1, **options, **more, **precision), *batch.policy, **given)
            reads = {label: lambda call=call: call().metrics["rewards/margins"]}
            yield from as_candidates({label: value(call)}, batch.leaves, OURS, bound, reads)

    def peer(name: str, loss: Loss, read: Loss) -> Iterator[Candidate]:
        return as_candidates({name: loss}, batch.leaves, PEER, bound, {name: read})

    candidates = batch.floor(al.DPOLoss(beta=0.1, **options).plan(*batch.policy, **batch.reference))
    candidates += ours("DPOLoss", batch.reference)
    candidates += peer("TRL fused head", *dpo_of(trl_logps, batch, TRL_STATISTICS))
    candidates += peer("Liger scaled cross-entropy", *dpo_of(liger_logps, batch))
    if case != "length":
        label = "DPOLoss, token_metrics=False"
        candidates += [c for c in ours(label, batch.reference, token_metrics=False) if c.name == label]
        candidates += peer("TRL fused head, log-probabilities alone", *dpo_of(trl_logps, batch))
        candidates += peer("torch, whole logits", *dpo_of(whole_logps, batch))
    if case != "length" or not shape.lengths:  # Liger would multiply all of the padding
        arguments = (batch.weight, batch.hidden, batch.target, None, batch.ref_hidden, batch.ref_weight)
        for size in (1, 4) if case == "dpo" else (1,):
            settings = {"beta": 0.1, "chunk_size": size, "compiled": options["compiled"]}
            call = liger("LigerFusedLinearDPOLoss", *arguments, **settings)
            name = f"Liger, chunks of {size} pair{'s' * (size > 1)}"
            candidates += peer(name, lambda call=call: call()[0], partial(liger_margins, call))
    bench.case(shape.title("DPO", dtype), candidates, expected, MARGINS, GRADIENTS)
    if case != "dpo":
        return

    with torch.no_grad():
        known = linear_logps(batch.ref_hidden, batch.ref_weight, batch.target, **options).logps
    assert known is not None
    given = {"ref_logps": known.double().sum(1)}
    candidates = [
        *batch.floor(al.DPOLoss(beta=0.1, **options).plan(*batch.policy, **given), reference=False),
        *ours("DPOLoss", given),
        *peer("TRL fused head", *dpo_of(trl_logps, batch, TRL_STATISTICS, ref=known)),
    ]
    bench.case(shape.title("DPO, ref_logps given", dtype), candidates, expected, MARGINS, GRADIENTS)


def run_packed(bench: Benchmark, case: str, shape: Shape, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """The tokens in use alone, one sequence behind the other, and DPO of their sums by code of one's own."""
    name = shape.title("DPO, packed rows", dtype)
    if not bench.chosen(name):
        return
    padded = random_batch(bench, shape, dtype)
    used, sequences = padded.used, 2 * shape.pairs
    of_token = used.nonzero()[:, 0]  # the sequence of each
    rows = [side.detach()[used][None] for side in (padded.hidden, padded.ref_hidden)]
    batch = Batch(rows[0].requires_grad_(), padded.weight, padded.target[used][None], rows[1], padded.ref_weight)
    del padded

    def summed(logps: Tensor) -> Tensor:  # (1, M) -> (S, 1)
        zeros = torch.zeros(sequences, dtype=torch.float64, device=logps.device)
        return zeros.index_add(0, of_token, logps[0].double())[:, None]

    def of_scorer(scorer: Callable[..., Tensor]) -> tuple[Loss, Loss]:
        return dpo_of(lambda *given: summed(scorer(*given)), batch)

    def formula(logps: Tensor, ref: Tensor, kl: Tensor) -> tuple[Tensor, Tensor]:
        return dpo(summed(logps), summed(ref))

    sample = {"target": batch.target[0]}
    plan = TokenStatistics(loss_fn=token_loss, **options).plan(Projection(rows[0][0], batch.weight), sample)
    scorers = {
        label: (OURS, lambda *given, more=more: linear_logps(*given, **options, **more).logps)
        for label, more in precisions("linear_logps", dtype).items()
    }
    scorers |= {"TRL fused head": (PEER, trl_logps), "Liger scaled cross-entropy": (PEER, liger_logps)}
    candidates = batch.floor(plan)
    for label, (role, scorer) in scorers.items():
        loss, read = of_scorer(scorer)
        candidates += as_candidates({label: loss}, batch.leaves, role, BOUNDS[dtype], {label: read})
    bench.case(name, candidates, partial(true_step, batch, formula), MARGINS, GRADIENTS)


# --- log-probabilities -----------------------------------------------------------------------------------------------


def token_loss(scores: dict[str, Tensor], groups: dict[str, Tensor]) -> Tensor:
    return -scores["logps"].squeeze(1)


def run_logps(bench: Benchmark, case: str, shape: Shape, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """TRL's published case. Sequences of a batch do not matter here."""
    name = shape.title("log-probabilities", dtype)
    if not bench.chosen(name):
        return
    batch = random_batch(bench, shape, dtype)
    flat = batch.hidden.flatten(0, 1)

    def add(scores: dict[str, Loss], role: str) -> None:
        losses = {name: lambda f=f: -f().mean() for name, f in scores.items()}
        candidates.extend(as_candidates(losses, batch.leaves, role, BOUNDS[dtype], scores))

    rows = {"target": batch.target.flatten()}
    plan = TokenStatistics(loss_fn=token_loss, **options).plan(Projection(flat, batch.weight), rows)
    candidates = batch.floor(plan, forwards=2, reference=False)
    for label, precision in precisions("linear_logps", dtype).items():
        call = partial(linear_logps, *batch.policy, **options, **precision)
        add({label: lambda call=call: call().logps}, OURS)
    peers = {
        "TRL fused head": partial(trl_logps, *batch.policy),
        "torch, whole logits": partial(whole_logps, *batch.policy),
        "Liger scaled cross-entropy": partial(liger_logps, *batch.policy),
    }
    add(peers, PEER)
    expected = partial(true_step, batch, lambda logps, ref, kl: (-logps.mean(), logps), reference=False)
    bench.case(name, candidates, expected, "log-probabilities", GRADIENTS)


# --- every other loss ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    make: Callable[..., Any]
    reference: bool = True
    forwards: int = 1  # of the policy: two where the loss couples the batch
    peer: str = ""  # Liger's
    peer_options: tuple[tuple[str, Any], ...] = ()


LOSSES = {
    "ORPO": Kind(al.ORPOLoss, False, peer="LigerFusedLinearORPOLoss"),
    "CPO": Kind(al.CPOLoss, False, peer="LigerFusedLinearCPOLoss"),
    "SimPO": Kind(al.SimPOLoss, False, peer="LigerFusedLinearSimPOLoss", peer_options=(("compute_nll_loss", False),)),
    "KTO": Kind(al.KTOLoss, peer="LigerFusedLinearKTOLoss", peer_options=(("use_ref_model", True),)),
    "BCO": Kind(al.BCOLoss, forwards=2),
    "TDPO": Kind(al.TDPOLoss),
    "IPO": Kind(partial(al.DPOLoss, loss_type="ipo")),
    "AOT": Kind(partial(al.DPOLoss, loss_type="aot"), forwards=2),
    "IRPO": Kind(al.IRPOLoss),
    "DPOP": Kind(al.DPOPLoss),
    "R-DPO": Kind(al.RDPOLoss),
    "f-PO": Kind(al.FPOLoss, False),
    "CPO-SimPO": Kind(al.CPOSimPOLoss, False, peer="LigerFusedLinearSimPOLoss"),
    "AlphaPO": Kind(al.AlphaPOLoss, False),
    "SLiC": Kind(al.SLiCLoss, False),
}


def own_formula(loss: Any, used: Tensor, given: dict[str, Tensor]) -> Formula:
    """The small loss of a class on sums over its sequences' tokens. Tests hold it against TRL's and Liger's."""

    def formula(logps: Tensor, ref: Tensor, kl: Tensor) -> tuple[Tensor, Tensor]:
        sums = [score.sum(1) for score in (logps, ref, used.to(logps.dtype), kl)]
        if isinstance(loss, al.SequenceLoss):
            of_policy, of_ref, tokens, _ = sums
            chosen = given["preference_labels"]
            scores = al.SequenceScores(of_policy, of_ref, tokens, chosen, given=given)
            result, rewards = loss.sequence_loss(scores), loss.reward_scale * scores.ratio
            told = rewards[chosen].mean() - rewards[~chosen].mean()
        else:
            chosen, rejected, ref_chosen, ref_rejected, n_chosen, n_rejected, *of_kl = chain(
                *(s.chunk(2) for s in sums)
            )
            x = al.PairScores(
                chosen,
                rejected,
                ref_chosen,
                ref_rejected,
                n_chosen,
                n_rejected,
                nll=-chosen * (len(chosen) / n_chosen.sum()),
                nll_logps=chosen,
                has_reference=bool(ref.any()),
                sums={"kl": tuple(of_kl)},
            )
            result, rewards = loss.pair_loss(x), loss.rewards(x)
            told = rewards[0] - rewards[1]
        return (result[0] if isinstance(result, tuple) else result).mean(), told

    return formula


def run_losses(bench: Benchmark, case: str, shape: Shape, dtype: torch.dtype, options: dict[str, Any]) -> None:
    if not bench.chosen(*(shape.title(name, dtype) for name in LOSSES)):
        return
    batch, bound = random_batch(bench, shape, dtype), BOUNDS[dtype]
    labels = torch.arange(2 * shape.pairs, device=bench.device) < shape.pairs
    for name, kind in LOSSES.items():
        loss = kind.make(**options)
        of_sequences = isinstance(loss, al.SequenceLoss)
        given = {"preference_labels": labels} if of_sequences else {}
        if isinstance(loss, al.KTOLoss):
            given["kl"] = torch.tensor(0.5, device=bench.device)
        keywords = given | (batch.reference if kind.reference else {})
        candidates = batch.floor(loss.plan(*batch.policy, **keywords), kind.forwards, kind.reference)
        for label, precision in precisions(type(loss).__name__, dtype).items():
            call = partial(kind.make(**options, **precision), *batch.policy, **keywords)
            reads = {label: lambda call=call: call().metrics["rewards/margins"]}
            candidates += as_candidates({label: value(call)}, batch.leaves, OURS, bound, reads)
        if kind.peer:
            arguments: tuple[Any, ...] = (batch.weight, batch.hidden, batch.target)
            if given:
                arguments = (batch.hidden, batch.weight, batch.target, None, labels)
                arguments += (batch.ref_hidden, batch.ref_weight, None, given["kl"])
            peer = liger(kind.peer, *arguments, **dict(kind.peer_options), compiled=options["compiled"])
            label, pairs = "Liger, chunks of 1", shape.pairs if of_sequences else 1  # sums, and means of ours
            reads = {label: lambda peer=peer, pairs=pairs: liger_margins(peer) / pairs}
            losses = {label: lambda peer=peer: peer()[0]}
            candidates += as_candidates(losses, batch.leaves, PEER, bound, reads)
        # An instance of its own: BCO's counts its calls.
        formula = own_formula(kind.make(), batch.used, given)
        expected = partial(true_step, batch, formula, kind.reference)
        bench.case(shape.title(name, dtype), candidates, expected, MARGINS, GRADIENTS)


# --- policy gradients ------------------------------------------------------------------------------------------------

POLICY = {
    "GRPO": {},
    "GRPO with KL": {"beta": 0.04},
    "GSPO": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "GRPO, entropy bonus": {"entropy_coef": 0.01},
    "GRPO, a fifth of the tokens": {"top_entropy_quantile": 0.2},
}
"""Options of ``GRPOLoss``, whose default is DAPO's mean over the tokens of the batch."""
LIGERS = {"beta", "loss_type", "importance_sampling_level"}
"""Of those, what its loss has as well."""


def policy_formula(
    used: Tensor, advantages: Tensor, old: Tensor, options: dict[str, Any]
) -> Callable[[Tensor, Tensor], Tensor]:
    """Of log-probabilities and entropies (S, T), zero on tokens that are not used: as TRL's trainer writes it down."""
    tokens, A = used.sum(1), advantages[:, None]
    by_sequence = options.get("importance_sampling_level") == "sequence"

    def loss(logps: Tensor, entropies: Tensor) -> Tensor:
        log_ratio, known = logps - old.to(logps), old.to(logps)
        if by_sequence:
            log_ratio = ((log_ratio * used).sum(1) / tokens)[:, None]
        ratio = log_ratio.exp()
        term = -torch.min(ratio * A, ratio.clamp(0.8, 1.2) * A).expand_as(logps)
        if "top_entropy_quantile" in options:
            least = torch.quantile(entropies[used].float(), 1 - options["top_entropy_quantile"])
            term = term * (entropies >= least)
        if beta := options.get("beta"):
            term = term + beta * ((known - logps).exp() - (known - logps) - 1)
        if by_sequence:
            return ((term * used).sum(1) / tokens).mean()
        total = (term * used).sum() / used.sum()
        return total - options.get("entropy_coef", 0.0) * (entropies * used).sum() / used.sum()

    return loss


def run_policy(bench: Benchmark, case: str, shape: Shape, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Completions in groups, log-probabilities of another policy that is near."""
    if not bench.chosen(*(shape.title(name, dtype) for name in POLICY)):
        return
    batch, bound = random_batch(bench, shape, dtype), BOUNDS[dtype]
    with torch.no_grad():
        old = linear_logps(batch.ref_hidden, batch.ref_weight, batch.target, **options).logps
    assert old is not None
    advantages = torch.randn(len(old), device=bench.device)
    for name, kind in POLICY.items():
        given = {"advantages": advantages, "old_logps": old} | ({"ref_logps": old} if "beta" in kind else {})
        formula = policy_formula(batch.used, advantages, old, kind)
        loss = al.GRPOLoss(**kind, **options)
        forwards = 2 if "top_entropy_quantile" in kind else 1
        candidates = batch.floor(loss.plan(*batch.policy, **given), forwards, reference=False)
        for label, precision in precisions("GRPOLoss", dtype).items():
            call = partial(al.GRPOLoss(**kind, **options, **precision), *batch.policy, **given)
            candidates += as_candidates({label: value(call)}, batch.leaves, OURS, bound)
        peer = partial(through_trl, batch, formula)
        candidates += as_candidates({"TRL fused head": peer}, batch.leaves, PEER, bound)
        if kind.keys() <= LIGERS:
            settings = {"beta": 0.0, "loss_type": "dapo", **kind, "use_ref_model": "beta" in kind}
            settings |= {"compiled": options["compiled"]}
            arguments = batch.hidden, batch.weight, batch.target.clamp_min(0), batch.used.long(), advantages, None
            arguments += (old if "beta" in kind else None), old
            peer = liger("LigerFusedLinearGRPOLoss", *arguments, **settings)
            candidates += as_candidates({"Liger, chunks of 1": lambda p=peer: p()[0]}, batch.leaves, PEER, bound)
        expected = partial(true_policy, batch, formula)
        bench.case(shape.title(name, dtype), candidates, expected)


def through_trl(batch: Batch, formula: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Its trainer always asks for entropies."""
    kernel, used = trl_kernel("chunked_logprob", "ChunkedLogProbFunction"), batch.used
    outputs = ("log_probs", "entropy")
    found = kernel.apply(batch.hidden[used], batch.weight, None, batch.target[used], 1.0, 32768, None, 1.0, outputs)
    return formula(*(x.new_zeros(used.shape).masked_scatter(used, x) for x in found[:2]))


def true_policy(batch: Batch, formula: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
    """Value and gradients; of an entropy, by blocks as well."""
    index = batch.used.flatten().nonzero()[:, 0]
    ids = batch.target.flatten()
    scores = torch.zeros(2, batch.target.numel(), dtype=torch.float64, device=ids.device)
    for part, log_p in zip(index.split(BLOCK), log_probs(batch.hidden, batch.weight, index), strict=True):
        scores[0, part] = log_p.gather(1, ids[part, None])[:, 0]
        scores[1, part] = -(log_p.exp() * log_p).sum(1)
    logps, entropies = (s.view(batch.target.shape).requires_grad_() for s in scores)
    loss = formula(logps, entropies)
    pulls = torch.autograd.grad(loss, [logps, entropies], allow_unused=True, materialize_grads=True)
    of_logps, of_entropy = (pull.flatten()[:, None] for pull in pulls)
    wide, rows = batch.weight.detach().double(), batch.hidden.detach().flatten(0, 1)
    grad_hidden = torch.zeros(rows.shape, dtype=torch.float32, device=rows.device)
    grad_weight = torch.zeros_like(wide)
    for part, log_p in zip(index.split(BLOCK), log_probs(batch.hidden, batch.weight, index), strict=True):
        p = log_p.exp()
        grad = -p * (of_logps[part] + of_entropy[part] * (log_p + entropies.flatten()[part, None].detach()))
        grad.scatter_add_(1, ids[part, None], of_logps[part])
        grad_hidden[part] = (grad @ wide).float()
        grad_weight.addmm_(grad.T, rows[part].double())
    return [loss.detach(), grad_hidden.view(batch.hidden.shape), grad_weight.float()]


# --- training steps --------------------------------------------------------------------------------------------------


def whole_orpo(logits: Tensor, ids: Tensor, target: Tensor) -> Tensor:
    """ORPO as TRL's trainer forms it, from whole logits; its log(1 - exp(x)) is stable, and log1p is here."""
    chosen, rejected = mean_logps(logits, target).chunk(2)
    odds = (chosen - rejected) - (torch.log1p(-chosen.exp()) - torch.log1p(-rejected.exp()))
    pairs = len(ids) // 2
    nll = F.cross_entropy(logits[:pairs, :-1].flatten(0, 1), ids[:pairs, 1:].flatten())
    return nll - 0.1 * F.logsigmoid(odds).mean()


def whole_cpo(logits: Tensor, ids: Tensor, target: Tensor) -> Tensor:
    used, pairs = target != -100, len(ids) // 2
    chosen, rejected = (mean_logps(logits, target) * used.sum(1)).chunk(2)
    nll = F.cross_entropy(logits[:pairs].flatten(0, 1), target[:pairs].flatten())
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean() + nll


def mean_logps(logits: Tensor, target: Tensor) -> Tensor:
    """As TRL's `selective_log_softmax` takes them: a sequence at a time."""
    used = target != -100
    of_target = logits.gather(2, target.clamp_min(0)[..., None])[..., 0]
    logps = of_target - torch.stack([row.logsumexp(-1) for row in logits])
    return (logps * used).sum(1) / used.sum(1)


def true_orpo(logps: Tensor, completion: Tensor) -> Tensor:
    chosen, rejected = ((logps * completion).sum(1) / completion.sum(1)).chunk(2)
    odds = (chosen - rejected) - (torch.log1p(-chosen.exp()) - torch.log1p(-rejected.exp()))
    in_nll = logps[: len(chosen), :-1]  # prompt and completion; nothing follows the last token
    return -in_nll.mean() - 0.1 * F.logsigmoid(odds).mean()


def true_cpo(logps: Tensor, completion: Tensor) -> Tensor:
    chosen, rejected = (logps * completion).sum(1).chunk(2)
    nll = -chosen.sum() / completion[: len(chosen)].sum()
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean() + nll


STEPS: dict[str, tuple[Any, Any, Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "dpo-step": (al.DPOLoss, None, lambda logps, ref, completion: dpo(logps, ref)[0]),
    "orpo-step": (al.ORPOLoss, whole_orpo, lambda logps, ref, completion: true_orpo(logps, completion)),
    "cpo-step": (al.CPOLoss, whole_cpo, lambda logps, ref, completion: true_cpo(logps, completion)),
}


def near(model: torch.nn.Module) -> torch.nn.Module:
    """A frozen copy whose weights are a fiftieth away."""
    other = deepcopy(model).requires_grad_(False)
    for parameter in other.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.02 * float(parameter.std()))
    return other


def run_step(bench: Benchmark, case: str, shape: Shape, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Forward and backward of a Llama of four layers with random weights, completions behind their prompts.

    TRL's way: the model's logits in float32, as mixed precision hands them to its trainers; of DPO, its fused head.
    """
    name = shape.title(f"{case.split('-')[0].upper()} step, Llama of 4 layers", dtype)
    if not bench.chosen(name):
        return
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as problem:
        print(f"{case}: not installed: {problem}")
        return
    make, whole, formula = STEPS[case]
    heads = 16 if shape.width >= 1024 else 2
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.width * 11 // 4,
        num_hidden_layers=4,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=shape.tokens,
    )
    with bench.device:
        model = LlamaForCausalLM(config).to(dtype)
        ids = torch.randint(shape.vocabulary, (2 * shape.pairs, shape.tokens))
    following = F.pad(ids[:, 1:], (0, 1), value=-100)
    target = following.clone()
    target[:, : shape.tokens - 1 - shape.lengths[0]] = -100
    weight, leaves = model.lm_head.weight, list(model.parameters())
    kinds = {label: make(**options, **more) for label, more in precisions(make.__name__, dtype).items()}
    nll = {"nll_target": following} if case == "orpo-step" else {}

    reference = near(model) if case == "dpo-step" else None
    frozen = weight if reference is None else reference.lm_head.weight

    def backbone() -> Tensor:
        return model.model(ids, use_cache=False).last_hidden_state

    def given() -> dict[str, Tensor]:
        if reference is None:
            return nll
        with torch.no_grad():
            return {"ref_hidden": reference.model(ids, use_cache=False).last_hidden_state, "ref_weight": frozen}

    # The tokens that the truth looks at: ORPO's NLL also has the prompt's.
    every = target.clone()
    if nll:
        every[: shape.pairs] = following[: shape.pairs]

    def true_loss(logps: Tensor, ref: Tensor, kl: Tensor) -> tuple[Tensor, Tensor]:
        found = formula(logps, ref, (target != -100).double())
        return found, found

    def expected() -> list[Tensor]:
        """The head by blocks in float64, the backbone as it is."""
        hidden = backbone()
        batch = Batch(hidden.detach(), weight, every, given().get("ref_hidden", hidden), frozen)
        value, of_hidden, of_weight = true_step(batch, true_loss, reference is not None)
        others = [leaf for leaf in leaves if leaf is not weight]
        grads = iter(torch.autograd.grad(hidden, others, of_hidden.to(dtype)))
        return [value, *(of_weight if leaf is weight else next(grads) for leaf in leaves)]

    with torch.no_grad():
        sample, others = backbone(), given()
    plan = kinds[make.__name__].plan(sample, weight, target, **others)
    sides = [] if reference is None else [(others["ref_hidden"].flatten(0, 1), frozen)]
    head = products((sample.flatten(0, 1), weight), sides, chunk_sizes(plan))

    def floor() -> list[Tensor]:
        hidden = backbone()
        if reference is not None:
            given()
        head()
        return list(torch.autograd.grad(hidden, [p for p in leaves if p is not weight], torch.ones_like(hidden)))

    def through(scorer: Callable[..., Tensor], *statistics: Any) -> Tensor:
        with torch.no_grad():
            ref = scorer(given()["ref_hidden"], frozen, target)
        return dpo(scorer(backbone(), weight, target, *statistics), ref)[0]

    ours = {label: lambda loss=loss: loss(backbone(), weight, target, **given()).loss for label, loss in kinds.items()}
    if reference is None:
        peers = {"TRL's way, whole logits": lambda: whole(model(ids, use_cache=False).logits.float(), ids, target)}
    else:
        peers = {
            "TRL fused head": partial(through, trl_logps, TRL_STATISTICS),
            "Liger scaled cross-entropy": partial(through, liger_logps),
        }
    candidates = [
        Candidate(f"floor: backbone and {3 + len(sides)} products", FLOOR, floor),
        *as_candidates(ours, leaves, OURS, STEP_BOUNDS[dtype]),
        *as_candidates(peers, leaves, PEER, STEP_BOUNDS[dtype]),
    ]
    bench.case(name, candidates, expected)


CASES: dict[str, tuple[Callable[..., None], list[Shape]]] = {
    **{case: (run_dpo, shapes) for case, shapes in DPO_CASES.items()},
    "packed": (run_packed, [narrow(16, 8192, lengths=LONG_PAIR, width=width) for width in (2048, 1024)]),
    "logps": (run_logps, [Shape(4, 1024, vocabulary=151936, width=4096)]),
    "policy": (run_policy, [large(4, 1024)]),
    "losses": (run_losses, [Shape(4, 1024, vocabulary=32000, width=2048)]),
    **{case: (run_step, [narrow(4, 1024, lengths=(512,))]) for case in STEPS},
}


def main(
    device: Annotated[str, typer.Option(help="cuda, or cpu for a small run")] = "cuda",
    only: Annotated[str, typer.Option(help="cases, comma-separated")] = ",".join(CASES),
    vocabulary: Annotated[int, typer.Option(help="instead of each case's")] = 0,
    width: Annotated[int, typer.Option(help="of the hidden states, instead of each case's")] = 0,
    dtype: str = "",
    chunk_size: Annotated[int, typer.Option(help="rows; 0 for what the plan says")] = 0,
    compiled: bool = True,
    match: Match = "",
    peers: Peers = True,
    missing: Missing = False,
    budget: Budget = 0,
    profile: Profile = False,
    repeats: int = 5,
    out: Out = RESULTS,
) -> None:
    cpu = device == "cpu"
    if unknown := set(only.split(",")) - set(CASES):
        raise typer.BadParameter(f"expected cases out of {tuple(CASES)}, got {sorted(unknown)}")
    kind = getattr(torch, dtype or ("float32" if cpu else "bfloat16"))
    options = {"chunk_size": chunk_size or None, "compiled": compiled}
    bench = Benchmark("preference", torch.device(device), out, 2, repeats, match, peers, missing, budget, profile)
    for case in only.split(","):
        run, shapes = CASES[case]
        sized = [shape.small() if cpu else shape for shape in shapes]
        sized = [replace(s, vocabulary=vocabulary or s.vocabulary, width=width or s.width) for s in sized]
        for shape in dict.fromkeys(sized):
            run(bench, case, shape, kind, options)
    bench.finish()


if __name__ == "__main__":
    typer.run(main)
