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

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .distillation import ChunkedDistillationTrainer
    from .gkd import ChunkedGKDTrainer

__all__ = ["ChunkedDistillationTrainer", "ChunkedGKDTrainer"]

TESTED = "1.16."
HOMES = {"ChunkedDistillationTrainer": "distillation", "ChunkedGKDTrainer": "gkd"}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{HOMES[name]}")
    except (ImportError, RuntimeError) as missing:  # the second is of a library that imports lazily
        raise ImportError(
            f"expected trl {TESTED}x and what it needs for {name} (pip install 'chunked-embed[trl]'), "
            f"got {_installed()}: {missing}"
        ) from missing
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _installed() -> str:
    try:
        return f"trl {version('trl')}"
    except PackageNotFoundError:
        return "no trl"
