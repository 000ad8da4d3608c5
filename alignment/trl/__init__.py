"""TRL's trainers with the losses of this package: same arguments, same logged names, no logits held.

::

    from alignment.trl import ChunkedDPOTrainer  # in place of trl.DPOTrainer

    trainer = ChunkedDPOTrainer(model=model, args=DPOConfig(...), train_dataset=pairs, processing_class=tokenizer)

The loss runs inside the wrapped model's own forward, where its head would (``chunked_embed.causal_lm``): three products
instead of the four of TRL's DPO and KTO, and no full logits as in its CPO, ORPO, TPO and online DPO. The reference's
log-probabilities come from one product in the reference's own forward, or from the dataset. At the first batch a few
logits that each model's head gives are compared with the model's own; a difference is refused.

Each takes TRL's arguments, and three of its own:

- ``loss``: an object of ``alignment`` in place of the one that ``args`` describe.
- ``loss_options``: keywords of the loss that ``args`` describe, where ``args`` have no field for them:
  ``{"chunk_size": 4096}``, ``{"compiled": False}``, ``{"token_metrics": False}``.
- ``check``: False leaves out the comparison at the first batch.

Written for TRL 1.16. The same arguments give the same loss. What differs on purpose:

- What ``args`` say of the loss, other than a default, is never in vain: what a given ``loss=`` or a loss type that TRL
  lacks does not have is refused; what TRL's trainer ignores as well (``label_smoothing`` with "sigmoid") has no effect
  and one warning.
- References are scored in eval mode: with ``disable_dropout=False`` theirs stays on in TRL, so that what is precomputed
  depends on the seed. The policy's mode is left alone.
- The lengths by which "ipo" and "sigmoid_norm" divide count tokens that a state predicts. TRL's also count a
  completion's token in first place, where ``truncation_mode="keep_end"`` has cut off the whole prompt.
- The ``logits/*`` of CPO and ORPO are means over completion tokens (TRL's count prompts and padding), and both log
  ``entropy`` and ``mean_token_accuracy`` as DPO does.
- Online DPO takes rewards before the policy's forward, means accumulated batches (TRL adds them up), takes a list of
  betas, evaluates, and its ``objective/*`` leave padding out.
- An adapter on the LM head is trained (TRL's DPO and KTO refuse it).

Each trainer is imported when it is asked for, so that one which TRL no longer has takes no other with it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from chunked_embed import checks
from chunked_embed.trainers import from_homes

from .. import functional as AF
from ..losses import DPOPLoss, FPOLoss, IRPOLoss, RDPOLoss, TDPOLoss
from ..pairs import PairLoss

checks.own_package(sys.modules["alignment"], "PreferenceLoss")

if TYPE_CHECKING:
    from .cpo import ChunkedCPOTrainer
    from .dpo import ChunkedDPOTrainer
    from .grpo import ChunkedGRPOTrainer
    from .kto import BCO_STATE, ChunkedBCOTrainer, ChunkedKTOTrainer
    from .online_dpo import ChunkedOnlineDPOTrainer
    from .orpo import ChunkedORPOTrainer
    from .rloo import ChunkedRLOOTrainer
    from .tpo import ChunkedTPOTrainer

__all__ = [
    "BCO_STATE",
    "LOSS_TYPES",
    "ChunkedBCOTrainer",
    "ChunkedCPOTrainer",
    "ChunkedDPOTrainer",
    "ChunkedGRPOTrainer",
    "ChunkedKTOTrainer",
    "ChunkedORPOTrainer",
    "ChunkedOnlineDPOTrainer",
    "ChunkedRLOOTrainer",
    "ChunkedTPOTrainer",
]

LOSS_TYPES: dict[str, Callable[..., PairLoss]] = {
    "irpo": IRPOLoss,
    "dpop": DPOPLoss,
    "rdpo": RDPOLoss,
    "tdpo1": partial(TDPOLoss, loss_type="tdpo1"),
    "tdpo2": partial(TDPOLoss, loss_type="tdpo2"),
    **{f"fpo_{name}": partial(FPOLoss, divergence=name) for name in AF.FPO_DIVERGENCES},
}
"""What ``DPOConfig(loss_type=...)`` may name, alone, besides TRL's own and "cdpo", conservative DPO. For numbers other
than beta give ``loss=``.

Example:
    >>> from alignment.trl import LOSS_TYPES
    >>> sorted(LOSS_TYPES)[:4]
    ['dpop', 'fpo_alpha', 'fpo_chi_squared', 'fpo_dpo']
"""

TESTED = "1.16."
HOMES = {
    "BCO_STATE": "kto",
    "ChunkedBCOTrainer": "kto",
    "ChunkedCPOTrainer": "cpo",
    "ChunkedDPOTrainer": "dpo",
    "ChunkedGRPOTrainer": "grpo",
    "ChunkedKTOTrainer": "kto",
    "ChunkedORPOTrainer": "orpo",
    "ChunkedOnlineDPOTrainer": "online_dpo",
    "ChunkedTPOTrainer": "tpo",
    "ChunkedRLOOTrainer": "rloo",
}

__getattr__ = from_homes(__name__, HOMES, TESTED)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
