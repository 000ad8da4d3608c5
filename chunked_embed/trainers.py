"""What trainers share whose loss runs in the model's own forward, on a ``Head``: ``HeadTrainer``.

``alignment.trl``, ``distill.trainer`` and ``distill.trl`` put it in front of a trainer of transformers or TRL, and say
what goes into the loss and what is logged. Imports none of those libraries.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from . import causal_lm
from .engine import LossOutput
from .head import Head

Sums: TypeAlias = dict[str, tuple[Tensor, Tensor]]
"""By a metric's name: its sum over the units that count, and their number. ``LossOutput.sums`` are such."""


class HeadTrainer:
    """Stands in front of a ``Trainer``, which calls ``attach_model`` behind the constructor of its library."""

    model: Any  # these are Trainer's
    args: Any
    accelerator: Any

    def attach_model(self) -> None:
        """Let the model take ``head_fn``; refuse what a loss in its forward cannot serve."""
        causal_lm.attach(self.model)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"expected a process for each GPU (torchrun, accelerate), got {self.args.n_gpu} GPUs in one"
            )
        parallel = getattr(self.accelerator, "parallelism_config", None)
        if parallel is not None and (parallel.cp_enabled or parallel.sp_enabled):
            raise ValueError("expected whole sequences on each process, got context or sequence parallelism")

    def check_once(self, model: nn.Module, inputs: Mapping[str, Any], who: str = "the model") -> None:
        """At a model's first batch: ids that it has, and logits that follow from its head."""
        checked = self.__dict__.setdefault("_checked", set())
        if id(model) in checked:
            return
        checked.add(id(model))
        _check_ids(model, who, inputs["input_ids"])
        causal_lm.check(model, inputs)

    def run_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        target: Tensor,  # (B, T - 1)
        loss_fn: Callable[[Head, Tensor], LossOutput],
    ) -> tuple[LossOutput, Tensor | None]:
        """``loss_fn`` of the head, one state for each target, inside the model's forward.

        Args:
            inputs: of the model's forward; ``input_ids`` (B, T).
            target: the token that each state but the last predicts; ``loss_fn`` gets it on the head's device.

        Returns:
            What it found, the loss on the device of ``target``; and the auxiliary loss of a mixture of experts.
        """

        def run(head: Head) -> LossOutput:
            return loss_fn(head.shifted(target.shape[1] + 1), target.to(head.hidden.device))

        out = model(**inputs, head_fn=run)
        value = out.value
        return value._replace(loss=value.loss.to(target.device)), out.aux_loss

    def frozen_head(self, model: nn.Module, inputs: Mapping[str, Any], target: Tensor) -> Head:
        """The head of a teacher or a reference, one state for each target; nothing of it learns."""
        with self.accelerator.autocast():
            return causal_lm.capture(model, inputs).shifted(target.shape[1] + 1)

    def token_logps(self, model: nn.Module, inputs: Mapping[str, Any], target: Tensor, **options: Any) -> Tensor:
        """``linear_logps`` of the targets, (B, T - 1), inside the model's forward."""

        def run(head: Head) -> Tensor:
            return head.shifted(target.shape[1] + 1).logps(target.to(head.hidden.device), **options)

        return model(**inputs, head_fn=run).value.to(target.device)

    def means_of(self, sums: Mapping[str, tuple[Tensor, Tensor]], gather: bool = True) -> dict[str, float]:
        """Means over all processes, in one gather and one transfer; what counts nowhere is left out."""
        if not sums:
            return {}
        table = torch.stack([torch.stack([total.float(), count.float()]) for total, count in sums.values()])
        if gather:
            table = self.accelerator.gather(table[None]).sum(0)
        return {name: total / count for name, (total, count) in zip(sums, table.tolist(), strict=True) if count}

    @staticmethod
    def with_outputs(model: nn.Module, inputs: Mapping[str, Any], loss: Tensor, wanted: bool) -> Any:
        """The loss, and the model's own outputs (by another forward) where they are asked for."""
        if not wanted:
            return loss
        with torch.no_grad():
            return loss, model(**inputs)


def check_given_loss(loss: Any, kind: type, options: Mapping[str, Any] | None, but: tuple[type, ...] = ()) -> None:
    """A trainer takes a loss, or options of the one that it makes."""
    if loss is not None and (not isinstance(loss, kind) or isinstance(loss, but)):
        raise TypeError(f"expected loss to be a {kind.__name__}, got {type(loss).__name__}")
    if loss is not None and options:
        raise ValueError("expected loss or loss_options, got both: options go to the loss that you make")
    ignored = getattr(loss, "ignore_index", (options or {}).get("ignore_index", -100))
    if ignored != -100:
        raise ValueError(f"expected a loss with ignore_index=-100, as trainers count labels, got {ignored!r}")


def warn_untested(who: str, library: Any, tested: str) -> None:
    """At the import of an adapter, whose library may move on."""
    if not library.__version__.startswith(tested):
        name = library.__name__
        warnings.warn(f"{who} is written for {name} {tested}x and not tried with {library.__version__}", stacklevel=3)


def _check_ids(model: Any, who: str, ids: Tensor) -> None:
    """An id beyond the embeddings would be an IndexError, or on a GPU a dead process."""
    rows = getattr(getattr(model, "module", model).get_input_embeddings(), "num_embeddings", None)
    if rows is not None and int(ids.max()) >= rows:
        raise ValueError(f"expected input_ids below {rows}, the embeddings of {who}, got {int(ids.max())}")
