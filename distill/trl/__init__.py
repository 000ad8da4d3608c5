"""TRL's trainers for distillation with the losses of this package, and no logits held.

::

    from distill.trl import ChunkedDistillationTrainer  # in place of trl.DistillationTrainer

    trainer = ChunkedDistillationTrainer(
        model=student, teacher_model=teacher, args=args, train_dataset=prompts, processing_class=tokenizer
    )

The loss runs inside the student's own forward, where its head would (``chunked_embed.causal_lm``), and is any
``DistillationLoss`` with a teacher. Written for TRL 1.16. What differs on purpose: an adapter on the head is trained
(TRL refuses it; in on-policy distillation also virtual tokens of prompt tuning), a mixture of experts has the auxiliary
loss that its config or ``args`` ask for (TRL leaves it out), heads of two sizes are compared on the ids that both have
where ``vocabulary="cut"`` says so, and heads on two devices are served. With several processes ``ChunkedGKDTrainer``'s
loss is the mean over the tokens of all (TRL's is that divided by the number of processes). What does not: an on-policy
step of GKD is divided by the tokens of the dataset's completions, which were counted before others were generated;
``ChunkedDistillationTrainer`` divides by the generated.

Each trainer is imported when it is asked for, so that one which TRL no longer has takes no other with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from chunked_embed.trainers import from_homes

if TYPE_CHECKING:
    from .distillation import ChunkedDistillationTrainer
    from .gkd import ChunkedGKDTrainer

__all__ = ["ChunkedDistillationTrainer", "ChunkedGKDTrainer"]

TESTED = "1.16."
HOMES = {"ChunkedDistillationTrainer": "distillation", "ChunkedGKDTrainer": "gkd"}

__getattr__ = from_homes(__name__, HOMES, TESTED)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
