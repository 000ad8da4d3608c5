"""``ChunkedGKDTrainer``: TRL's on-policy distillation with the losses of this package, and no logits held.

::

    from distill.trl import ChunkedGKDTrainer  # in place of trl.experimental.gkd.GKDTrainer

    trainer = ChunkedGKDTrainer(
        model=student, teacher_model=teacher, args=GKDConfig(...), train_dataset=chats, processing_class=tokenizer
    )

Written for TRL 1.16. What differs on purpose: with several processes the loss is the mean over the tokens of all
(TRL's is that divided by the number of processes), and a mixture of experts is trained with the auxiliary loss that its
config asks for (TRL's leaves it out). What does not: an on-policy step is divided by the tokens of the dataset's
completions, which were counted before others were generated; the terms that are logged are means over those in use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

try:
    import trl
    from trl.experimental.gkd import GKDTrainer
except ImportError as missing:
    raise ImportError(f"expected trl 1.16 and what it needs (pip install 'chunked-embed[trl]'): {missing}") from missing

from torch import Tensor

from chunked_embed import causal_lm
from chunked_embed.trainers import check_given_loss, warn_untested

from .losses import DistillationLoss, JSDLoss
from .topk import TopKLoss
from .trainer import Distilling

__all__ = ["ChunkedGKDTrainer"]

warn_untested("distill.trl", trl, "1.16.")


class ChunkedGKDTrainer(Distilling, GKDTrainer):
    """``trl.experimental.gkd.GKDTrainer`` on the chunked engine: its arguments, and those below.

    Generation, ``seq_kd`` and the rest are TRL's. Logged as well: each term of the loss, ``student_entropy`` and
    ``teacher_agreement``, means over tokens.

    Args:
        loss: a ``DistillationLoss`` in place of ``JSDLoss(args.beta)``. As in TRL, ``args.temperature`` is that of
            sampling, and the loss has its own. The models' own logit scales and soft-caps count.
        loss_options: keywords of the ``JSDLoss``, such as ``{"chunk_size": 4096}`` or ``{"weight_hard": 0.1}``.
        report, check: as for ``DistillTrainer``.
    """

    def __init__(
        self,
        model: Any = None,
        teacher_model: Any = None,
        *args: Any,
        loss: DistillationLoss | None = None,
        loss_options: Mapping[str, Any] | None = None,
        report: Sequence[str] | None = None,
        check: bool = True,
        **trainer_options: Any,
    ) -> None:
        check_given_loss(loss, DistillationLoss, loss_options)
        if isinstance(loss, TopKLoss):
            raise TypeError("expected a loss with a teacher, got TopKLoss, which reads what was kept of one")
        if teacher_model is None:
            raise ValueError("expected a teacher_model, got None")
        super().__init__(model, teacher_model, *args, **trainer_options)
        self.take_loss(JSDLoss(**{"beta": self.beta, **(loss_options or {})}) if loss is None else loss, report, check)
        self.attach_model()
        # TRL has wrapped its forward for autocast. What goes past that is called under autocast here.
        causal_lm.attach(self.accelerator.unwrap_model(self.teacher_model))

    def model_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {name: inputs[name] for name in ("input_ids", "attention_mask")}

    def teach(self, inputs: Mapping[str, Any], arguments: Mapping[str, Any], target: Tensor) -> tuple[Any, ...]:
        self.teacher_model.eval()
        return super().teach(inputs, arguments, target)
