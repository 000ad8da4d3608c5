"""The one path of all preference losses: token statistics by the engine, summed per segment, and a small loss on them.

``PreferenceLoss`` is what pairs and single sequences share: options, heads, the call to the engine. A loss says which
statistics it wants and what it makes of their sums; nothing here knows one loss from another.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from operator import is_
from threading import Lock
from typing import Any, ClassVar, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chunked_embed import ChunkPlan, FlexChunkLoss, Head, LossOutput, TokenStatistics, checks, transform_logits
from chunked_embed.checks import POSITIVE
from chunked_embed.digits import excess
from chunked_embed.fields import KW_ONLY, ChunkFields, assign, flag, integer, number
from chunked_embed.signatures import Seen, signature

Named: TypeAlias = dict[str, Tensor]
Extra: TypeAlias = tuple[tuple[Tensor, Tensor], ...]
Loose: TypeAlias = tuple[Any, Any, Any, Any]
"""A head in parts: hidden, weight, bias, extra."""
Result: TypeAlias = Tensor | tuple[Tensor, Named]
"""One value a unit, and metrics if there are any."""
TOKEN_METRICS = ("entropy", "mean_logits", "is_top1")
"""Statistics of a token that need more of its logits than its log-probability."""
TABLE = "table"
"""The metric of the engine's call in which all of ours are: ``(units, columns)``, so that they are cast as one."""


@dataclass(frozen=True)
class PreparedLoss:
    """A call, ready to run: print its ``plan`` before.

    Example:
        >>> import torch
        >>> from alignment import SimPOLoss
        >>> hidden, head = torch.randn(4, 6, 8, requires_grad=True), torch.randn(11, 8)  # two pairs, chosen first
        >>> target = torch.randint(0, 11, (4, 6))
        >>> prepared = SimPOLoss(chunk_size=8, compiled=False).prepare(hidden, head, target)
        >>> prepared.plan.chunks, prepared.plan.used_rows
        (4, 24)
        >>> prepared.run().loss.backward()
    """

    call: Any  # of the engine
    report: Callable[[Named], tuple[Named, Named]]  # the engine's metrics -> metrics, and their counts

    @property
    def plan(self) -> ChunkPlan:
        return self.call.plan

    def run(self) -> LossOutput:
        out = self.call.run()
        # A batch without a token has no loss; the product keeps it differentiable.
        loss = out.loss if self.call.used_rows else 0 * out.loss
        return LossOutput(loss, *self.report(dict(out.metrics)))


class PreferenceLoss(ChunkFields, nn.Module):
    """A preference loss from hidden states and an LM head; the logits are never held whole.

    ``chunk_size``, ``max_chunk_bytes``, ``compiled`` and ``float32_outputs`` are as for ``FlexChunkLoss``.

    Example:
        >>> from alignment import DPOLoss, KTOLoss, PreferenceLoss
        >>> issubclass(DPOLoss, PreferenceLoss), issubclass(KTOLoss, PreferenceLoss)
        (True, True)
        >>> DPOLoss(temperature=0.7, chunk_size=2048, token_metrics=False).token_metrics
        False
    """

    _: KW_ONLY
    logit_scale: float = number(
        1.0, POSITIVE, "of the logits of loose tensors, policy and reference; a Head has its own"
    )
    logit_softcap: float | None = number(None, POSITIVE, "likewise")
    temperature: float = number(1.0, POSITIVE, "divides all logits, as for ``linear_logps``")
    ignore_index: int = integer(-100, doc="target of tokens that count for nothing: dropped before any product")
    token_metrics: bool = flag(True, "also report what needs more of a token's logits than its log-probability")

    takes_reference: ClassVar[bool | None] = True
    """True: needs a reference; False: has none; None: either."""
    needs_kl: ClassVar[bool] = False
    """The loss reads ``sums["kl"]``, KL(reference || policy): log-probabilities are not enough of the reference."""
    takes_vectors: ClassVar[tuple[str, ...]] = ()
    """Further arguments of a call, one number a pair or a sequence; those of pairs may require grad."""
    takes_numbers: ClassVar[tuple[str, ...]] = ()
    """Further arguments of one number each, which the loss sees once a sequence."""

    @cached_property
    def _engine(self) -> TokenSums | DivergenceSums:
        """Kept for its layouts. No child of this module: it has nothing of its own."""
        return DivergenceSums() if self.needs_kl else TokenSums()

    @cached_property
    def _seen(self) -> _Seen:
        return _Seen()

    # --- what a loss may say of itself ---

    @property
    def unread(self) -> Mapping[str, str]:
        """Numbers that the loss does not read as its other options are, and what would read each."""
        return {}

    def check(self) -> None:
        super().check()
        for name, reader in self.unread.items():
            if (value := getattr(self, name)) != (default := self.fields[name].default):
                raise ValueError(f"expected {name}={default!r}, which nothing reads without {reader}, got {value!r}")

    @property
    def statistics(self) -> tuple[str, ...]:
        """What ``sums`` shall hold besides log-probabilities: names of ``linear_logps``'s outputs."""
        return ()

    @property
    def couples_batch(self) -> bool:
        """Whether the loss sorts or averages over the batch; it then sees all units at once."""
        return False

    @property
    def reward_scale(self) -> float:
        """Of the rewards that are logged: beta, where a loss has it."""
        return getattr(self, "beta", 1.0)

    @property
    def needed(self) -> Mapping[str, str]:
        """Vectors and numbers that a call must have, and what each is."""
        return {}

    # --- a call ---

    def prepare(self, *arguments: Any, **keywords: Any) -> PreparedLoss:
        raise NotImplementedError

    def of_sums(self, scores: Any, groups: Named, batch: Any) -> tuple[Tensor, Named]:
        """The loss of some units, from sums over their segments: ``(units, segments)`` for each statistic. Metrics are
        detached; most are columns of ``TABLE``. ``batch``: what the call knows of all units."""
        raise NotImplementedError

    def _recall(self, *given: Any, **named: Any) -> tuple[bool, Hashable]:
        """Whether a call like this one was checked, with the options as they are; and what ``_seen`` knows it by."""
        if self.recheck():
            self._seen.clear()
        key = signature(*given, *named.values())
        if named and key is not None:
            key = key, *named
        return key in self._seen.calls, key

    def _known_heads(self, policy: Loose, ref: Head | None, reference: Loose) -> dict[str, Head]:
        """What is projected: the policy, and the reference where there is one, which is frozen, whatever its tensors
        say."""
        heads = {"policy": self._known_head(policy)}
        if ref is not None or reference[0] is not None:
            heads["reference"] = (self._known_head(reference) if ref is None else ref).detach()
            if self.needs_kl:
                shared = min(len(head.weight) for head in heads.values())
                heads = {key: head.cut(shared) for key, head in heads.items()}
        return heads

    def _known_head(self, parts: Loose) -> Head:
        return parts[0] if isinstance(parts[0], Head) else Head.known(*parts, self.logit_scale, self.logit_softcap)

    def _heads(self, policy: Loose, ref: Head | None, reference: Loose, ref_logps: Tensor | None) -> dict[str, Head]:
        """The same, checked."""
        name = type(self).__name__
        ref_hidden, *rest = reference
        given = {"ref": ref, "ref_hidden": ref_hidden, "ref_logps": ref_logps}
        given = {key: value for key, value in given.items() if value is not None}
        heads = {"policy": self._head("", policy)}
        hidden = checks.tensor("hidden", heads["policy"].hidden, ("batch", "tokens", "features"))
        if not hidden.shape[1]:
            raise ValueError(f"expected hidden of one token or more, got {tuple(hidden.shape)}")
        if self.takes_reference is False and given:
            raise ValueError(f"expected no reference, {name} has none, got {next(iter(given))}")
        if self.takes_reference and not given:
            raise ValueError(
                f"expected ref_hidden and ref_weight, or ref_logps, or ref: {name} compares with a reference"
            )
        if len(given) > 1:
            raise ValueError(f"expected one reference, got both {' and '.join(given)}")
        if ref_hidden is None and any(map(_given, rest)):
            raise ValueError("expected ref_hidden with the reference's head, got the head alone")
        if self.needs_kl and ref_logps is not None:
            raise ValueError(f"expected ref, or ref_hidden and ref_weight, got ref_logps: {name} needs distributions")
        if ref_logps is not None:
            checks.tensor("ref_logps", ref_logps, hidden.shape[:1], device=hidden.device, kind="floating")
            return heads
        if not given:
            return heads
        if ref is not None:
            checks.instance("ref", ref, Head)
        if (ref is not None) != isinstance(policy[0], Head):
            raise TypeError(f"expected policy and reference both as heads or both in parts, got {next(iter(given))}")
        # The reference is frozen, whatever its tensors say.
        heads["reference"] = other = self._head("ref_", reference if ref is None else (ref, None, None, ())).detach()
        checks.tensor("ref_hidden", other.hidden, (*hidden.shape[:2], "features"), device=hidden.device)
        sizes = [len(head.weight) for head in heads.values()]
        shared = checks.one_vocabulary("policy and reference", sizes[0], sizes[1])
        return {key: head.cut(shared) for key, head in heads.items()} if self.needs_kl else heads

    def _head(self, prefix: str, parts: Loose) -> Head:
        head, *rest = parts
        if not isinstance(head, Head):
            if prefix and rest[0] is None:
                raise ValueError(f"expected {prefix}weight with {prefix}hidden, got None")
            return Head.of(prefix, *parts, self.logit_scale, self.logit_softcap)
        for part, value in zip(("weight", "bias", "extra"), rest, strict=True):
            if _given(value):
                raise TypeError(
                    "expected a Head alone, and what follows it by keyword (target=, ref=), "
                    f"got {prefix}{part} beside it"
                )
        for option in ("logit_scale", "logit_softcap"):
            own, theirs = getattr(self, option), getattr(head, option)
            if own not in (self.fields[option].default, theirs):
                raise ValueError(
                    f"expected {option} of the head alone, got {theirs!r} there and {own!r} of {type(self).__name__}"
                )
        return head

    def _refuse_unknown(self, given: Mapping[str, Any]) -> None:
        """Before anything else: a name with a slip of the pen would look like an argument that is missing."""
        known = (*self.takes_vectors, *self.takes_numbers)
        unknown = [name for name, value in given.items() if name not in known and value is not None]
        if unknown:
            raise TypeError(f"expected arguments that {type(self).__name__} takes, got {unknown[0]!r}")

    def _vectors(self, given: Mapping[str, Any], size: int, device: torch.device, known: bool) -> Named:
        """The further arguments of a call, checked if they are not known."""
        found = {name: value for name, value in given.items() if value is not None}
        for name in found:
            if name in self.takes_numbers:
                if not known and checks.tensor(name, found[name], kind="real").numel() != 1:
                    raise ValueError(f"expected {name} to be a tensor of one number, got {tuple(found[name].shape)}")
                found[name] = found[name].to(device).reshape(1).expand(size)
            if not known:
                checks.tensor(name, found[name], (size,), device=device, kind="real")
        for name, what in self.needed.items():
            if name not in found:
                raise ValueError(f"expected {name}, {what}, got None")
        return found

    def _prepared(
        self,
        key: Hashable,
        heads: Mapping[str, Head],
        target: Tensor,
        segments: Tensor,
        per_unit: int,
        groups: Named,
        batch: Any,
        report: Callable[[Named], tuple[Named, Named]],
    ) -> PreparedLoss:
        """The engine's call, with the numbers that the loss has now; ``per_unit``: segments of a unit."""
        engine, seen, snapshot = self._engine, self._seen, self._snapshot()
        with seen.settling:
            if key is None or seen.settled is None or seen.settled[0] is not snapshot or seen.settled[1] != key:
                seen.settled = None
                self._settle(heads, per_unit)
                seen.settled = snapshot, key
            # Of this call: the loss keeps no batch alive, nor sees another thread's.
            asking = object.__new__(type(engine))
            asking.__dict__.update(engine.__dict__, asked_by=(snapshot, batch))
        projections = {name: head.projection for name, head in heads.items()}
        call = asking.prepare(projections, {"target": target}, groups=groups, segments=segments)
        seen.keep(key)
        return PreparedLoss(call, report)

    def _settle(self, heads: Mapping[str, Head], per_unit: int) -> None:
        """The engine's options for such a call."""
        metrics = TOKEN_METRICS if self.token_metrics else ()
        self._engine.read(heads, tuple(dict.fromkeys(("logps", *metrics, *self.statistics))))
        assign(
            self._engine,
            temperature=self.temperature,
            segments_per_group=per_unit,
            couples_batch=self.couples_batch,
            chunk_size=self.chunk_size,
            max_chunk_bytes=self.max_chunk_bytes,
            compiled=self.compiled,
            float32_outputs=self.float32_outputs,
            ignore_index=self.ignore_index,
        )

    def _snapshot(self) -> PreferenceLoss:
        """This loss as it is now; the last one, where every attribute is still the same object. Buffers are shared, and
        may be written to."""
        values = (*self.__dict__.values(),)
        before, snapshot = self._seen.snapshot
        if snapshot is None or len(before) != len(values) or not all(map(is_, before, values)):
            snapshot = object.__new__(type(self))
            snapshot.__dict__.update(self.__dict__)
            self._seen.snapshot = values, snapshot
        return snapshot


class _Seen(Seen):
    """Also the loss as it was in its last call."""

    def __init__(self) -> None:
        super().__init__()
        self.settling = Lock()  # until a call has its copy: another thread's may be of another kind
        self.settled: tuple[Any, Hashable] | None = None  # the loss as it was, and the call
        self.snapshot: tuple[tuple, Any] = (), None


def _given(part: Any) -> bool:
    return part is not None and not (isinstance(part, (tuple, list)) and not part)


class Sides(Mapping[str, tuple[Tensor, Tensor]]):
    """Sums over the chosen and over the rejected tokens by name, each formed when it is asked for."""

    def __init__(self, sums: Named, both: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        self.sums = sums
        self.both = both

    def __getitem__(self, name: str) -> tuple[Tensor, Tensor]:
        return self.both(self.sums[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.sums)

    def __len__(self) -> int:
        return len(self.sums)


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# --- what the engine is asked for ------------------------------------------------------------------------------------


class TokenSums(TokenStatistics):
    """Token by token, each projection on its own. Who asks for the sums is an attribute, and what is made of them no
    function of this class: all losses share their compiled steps."""

    asked_by: tuple[PreferenceLoss, Any]  # and what the call knows of all units

    def __init__(self) -> None:
        super().__init__(gradients_of=("logps",), separate_outputs=True)

    def read(self, heads: Mapping[str, Head], names: tuple[str, ...]) -> None:
        """Of these heads: the reference is asked for its log-probabilities alone."""
        transforms = {name: head.transform for name, head in heads.items()}
        of_reference = ("logps",) if "reference" in heads else names
        same = len(set(transforms.values())) == 1
        scale, softcap = transforms["policy"] if same else (1.0, None)
        assign(
            self,
            # What all have in common names none of them, so that they share a step.
            names=names if of_reference == names else {"policy": names, "reference": of_reference},
            logit_scale=scale,
            softcap=softcap,
            transforms=None if same else transforms,
        )

    def loss_fn(self, scores: Any, groups: Named) -> tuple[Tensor, Named]:
        asked_by, batch = self.asked_by
        return asked_by.of_sums(scores, groups, batch)


class DivergenceSums(FlexChunkLoss):
    """Policy and reference side by side, for what needs both their distributions: KL(reference || policy)."""

    asked_by: tuple[PreferenceLoss, Any]  # and what the call knows of all units

    names: tuple[str, ...]
    transforms: tuple[tuple[str, tuple[float, float | None]], ...]

    def __init__(self) -> None:
        super().__init__(targets=("target",))
        self.temperature = 1.0

    def read(self, heads: Mapping[str, Head], names: tuple[str, ...]) -> None:
        assign(self, names=names, transforms=tuple((name, head.transform) for name, head in heads.items()))

    def logits(self, outputs: Any, name: str) -> Tensor:
        scale, softcap = dict(self.transforms)[name]
        return transform_logits(outputs[name], logit_scale=scale, softcap=softcap, temperature=self.temperature)

    def score_fn(self, outputs: Any, rows: Named) -> Named:
        z, zr = self.logits(outputs, "policy"), self.logits(outputs, "reference")
        target = rows["target"].long()
        policy, reference = z.log_softmax(1), zr.log_softmax(1)
        # The sum over p (log p - log q), whose terms of first order cancel, and its derivative by log q, -p.
        log_q, log_p = (log.clamp_min(-800.0) for log in (policy, reference))  # 0 * -inf is 0 here
        p, q = log_p.exp(), log_q.detach().exp()
        moves = -(p * log_q).sum(1)
        kl = excess(p, q, log_p - log_q.detach()).sum(1) + (moves - moves.detach())
        scores = {
            "logps": -F.cross_entropy(z, target, reduction="none"),
            "ref_logps": -F.cross_entropy(zr, target, reduction="none"),
            "kl": kl,
        }
        if self.names != ("logps",):
            z, policy = z.detach(), policy.detach()
            own = torch.where(torch.arange(z.shape[1], device=z.device) == target[:, None], z, -torch.inf)
            scores["entropy"] = -(policy.exp() * policy.clamp_min(-800.0)).sum(1)
            scores["mean_logits"] = z.mean(1)
            scores["is_top1"] = (own.amax(1) >= z.amax(1)).to(z.dtype)
        return scores

    def loss_fn(self, scores: Named, groups: Named) -> tuple[Tensor, Named]:
        policy = {name: value for name, value in scores.items() if name not in ("ref_logps", "count")}
        by_side = {"policy": policy, "reference": {"logps": scores["ref_logps"]}, "count": scores["count"]}
        asked_by, batch = self.asked_by
        return asked_by.of_sums(by_side, groups, batch)
