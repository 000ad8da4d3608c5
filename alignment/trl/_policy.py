"""What GRPO and RLOO share: completions that the policy samples, and a loss in its forward."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn

from chunked_embed import Head, LossOutput, causal_lm, linear_logps
from chunked_embed.fields import ChunkFields
from chunked_embed.trainers import Sums

from ..grpo import PolicyLoss
from ._base import UNREAD, Chunked

IGNORED = -100


class _Instead:
    """A model as TRL's method calls it, and what is done in its place with each batch's arguments and labels."""

    def __init__(self, run: Callable[[dict[str, Any], Tensor], Any]) -> None:
        self.run = run

    def __call__(self, *, labels: Tensor, fused_lm_head: bool, **inputs: Any) -> Any:
        return self.run(inputs, labels[:, 1:])


class Scoring:
    """Behind the trainer's own class and in front of TRL's: log-probabilities of completions, a chunk of logits at a
    time. TRL's method makes the batches, images included."""

    def _get_per_token_logps_and_entropies(
        self, model: Any, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Of each completion's tokens, (B, T), as TRL's; one product where gradients are off."""
        mine: Any = self
        theirs: Any = super()
        given = inspect.signature(theirs._get_per_token_logps_and_entropies).bind(model, *args, **kwargs).arguments
        outputs = ("logps", "entropy") if given.get("compute_entropy") else ("logps",)

        def scored(inputs: dict[str, Any], target: Tensor) -> Any:
            mine.check_once(model, inputs)
            found, aux_loss = mine._statistics(model, inputs, target, outputs)
            return SimpleNamespace(log_probs=found.logps, entropy=found.entropy, aux_loss=aux_loss)

        with causal_lm.evaluating(model) if mine._is_reference(model) else contextlib.nullcontext():
            return theirs._get_per_token_logps_and_entropies(_Instead(scored), *args, **kwargs)


class Policy(Chunked):
    """GRPO and RLOO: a policy that is trained on what it sampled."""

    _loss_base = PolicyLoss
    uncalled: ClassVar[tuple[str, ...]] = ("_get_per_token_logps_and_entropies",)
    _owned: ClassVar[tuple[str, ...]] = ()
    """Attributes of TRL's trainer that are the loss's, under names that its config has not."""
    _followed: ClassVar[Mapping[str, str]] = {}
    """Fields of ``args`` that TRL's trainer reads at each step, and those of the loss."""

    def __init__(self, *args: Any, **kw: Any) -> None:
        super().__init__(*args, **kw)
        for name in self._owned:
            if name not in self._read_elsewhere:
                setattr(self, name, getattr(self.chunked_loss, name))
        self._read_args = self._values_in_args()

    def _check_loss(self, args: Any) -> None:
        if (found := self.chunked_loss.temperature) != args.temperature:
            raise ValueError(
                f"expected a loss of the temperature that completions are sampled with, {args.temperature}, got {found}"
            )

    # --- the loss is as the trainer's numbers say now ---

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._owned and "_made" in self.__dict__:
            self._tell_loss(name, value)
        super().__setattr__(name, value)

    def _values_in_args(self) -> dict[str, Any]:
        return {name: getattr(self.args, name) for name in self._followed}

    def _follow_args(self) -> None:
        """What was changed in ``args`` since."""
        now = self._values_in_args()
        for name, value in now.items():
            if value != self._read_args[name]:
                self._tell_loss(self._followed[name], value)
        self._read_args = now

    # --- in a model's forward ---

    @contextlib.contextmanager
    def _as_asked(self, head: Head) -> Iterator[Head]:
        """A head in float32, outside of autocast, with ``cast_lm_head_to_fp32``."""
        if not getattr(self.args, "cast_lm_head_to_fp32", False):
            yield head
            return
        with torch.autocast(head.hidden.device.type, enabled=False):
            yield head.to(torch.float32)

    def _statistics(self, model: nn.Module, inputs: dict[str, Any], target: Tensor, outputs: tuple[str, ...]) -> Any:
        """``linear_logps`` of the targets, and the auxiliary loss of a mixture of experts, if it is asked for."""
        loss = self.chunked_loss
        options: dict[str, Any] = {name: getattr(loss, name) for name in (*ChunkFields.fields, "temperature")}

        def run(whole: Head) -> Any:
            with self._as_asked(whole.shifted(target.shape[1] + 1)) as head:
                ids, (scale, softcap) = target.to(head.hidden.device), head.transform
                named: dict[str, Any] = {"extra": head.extra, "logit_scale": scale, "logit_softcap": softcap}
                return linear_logps(head.hidden, head.weight, ids, head.bias, outputs=outputs, **named, **options)

        out = model(**inputs, head_fn=run)
        found = type(out.value)(*[None if x is None else x.to(target.device) for x in out.value])
        return found, None if out.aux_loss is None else out.aux_loss.to(target.device)

    def _loss_in_forward(self, model: nn.Module, inputs: Mapping[str, Any], **given: Any) -> LossOutput:
        """The loss of a batch, in one forward of the policy; ``given``: what it takes beside head and target."""
        completions, mask = inputs["completion_ids"], inputs["completion_mask"]
        used = mask * inputs["tool_mask"] if "tool_mask" in inputs else mask
        target = completions.masked_fill(used == 0, IGNORED)
        found: list[LossOutput] = []

        def loss(head: Head, **named: Any) -> LossOutput:
            with self._as_asked(head) as asked:
                return self.chunked_loss(asked, **named)

        def run(arguments: dict[str, Any], _: Tensor) -> Any:
            self.check_once(model, arguments)
            found.append(self.run_loss(model, arguments, target, loss, **given))
            return SimpleNamespace(log_probs=target, entropy=None, aux_loss=None)

        theirs = super(Scoring, self)._get_per_token_logps_and_entropies  # type: ignore[misc]
        names = [name for name in inspect.signature(theirs).parameters if name in inputs]
        theirs(
            _Instead(run),
            torch.cat([inputs["prompt_ids"], completions], dim=1),
            torch.cat([inputs["prompt_mask"], mask], dim=1),
            completions.shape[1],
            **{name: inputs[name] for name in names},
        )
        return found[0]

    def _is_reference(self, model: Any) -> bool:
        """The model is scored as the reference: it is one, or its adapters are off, or are those it began with."""
        if model is self.ref_model:
            return True
        if self.ref_model is not None or not is_peft_model(self.model):
            return False
        layers = [m for m in self.accelerator.unwrap_model(self.model).modules() if hasattr(m, "disable_adapters")]
        return any(layer.disable_adapters or "ref" in layer.active_adapters for layer in layers[:1])

    # --- what is logged, as TRL does; nothing waits for the device before it is ---

    def _keep(self, mode: str, sums: Sums, extremes: Mapping[str, Tensor]) -> None:
        """Sums and counts, added up over processes; and the least and the largest of values of sequences."""
        names = [*sums, *extremes]
        columns = [self.table_of(sums)]
        for name, value in extremes.items():
            every = self.accelerator.gather(value.float())
            found = every.nan_to_num(torch.inf).min() if name.endswith("_min") else every.nan_to_num(-torch.inf).max()
            columns.append(torch.stack([found, torch.ones_like(found)])[None])
        self._unread.append((mode, tuple(names), torch.cat(columns), None))
        if len(self._unread) >= UNREAD:
            self._read()

    def _read(self) -> None:
        """What was kept goes where TRL has it."""
        unread, self._unread = self._unread, []
        if not unread:
            return
        tables = iter(torch.cat([table for _, _, table, _ in unread]).tolist())
        for mode, names, _, _ in unread:
            for name in names:
                total, count = next(tables)
                value = total / max(count, 1.0)
                of_none = name.endswith(("_min", "_max")) and abs(value) == float("inf")
                self._metrics[mode][name].append(float("nan") if of_none else value)

    def _keep_clips(self, mode: str, out: LossOutput, sums: Sums) -> None:
        """Beside other ``sums`` the shares of ratios that are clipped: means over all, and extremes of sequences."""
        found, extremes = dict(sums), dict[str, Tensor]()
        for side in ("low", "high", "region"):
            if (name := f"clip_ratio/{side}") in out.metrics:
                found[f"{name}_mean"] = out.sums[name]
                counts = (out.counts or {}).get(name)
                value = out.metrics[name]
                value = value if counts is None else value.masked_fill(counts == 0, torch.nan)
                extremes |= {"low": {f"{name}_min": value}, "high": {f"{name}_max": value}}.get(side, {})
        self._keep(mode, found, extremes)


def mean_over_processes(value: Tensor) -> tuple[Tensor, Tensor]:
    """One number a process, of which TRL logs the mean."""
    return value.detach(), torch.ones_like(value)
