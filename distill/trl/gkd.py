"""``ChunkedGKDTrainer``: TRL's GKD, on the student's own samples and on the dataset's."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.utils import DataCollatorForChatML
from trl.trainer import sft_trainer

from chunked_embed.trainers import our_head

from ..packing import DOCUMENTS, LENGTHS, KeepsApart
from ..trainer import PICTURES
from ._base import Taught

PROMPTS = ("prompts", "prompt_attention_mask")
READ = ("input_ids", "attention_mask", "labels", *DOCUMENTS, *PROMPTS)
TOLD = ("byte_offsets", "original_prompt_text", "original_completion_text")  # to other trainers, by the same collator
UNREAD = (
    *("dataset_text_field", "dataset_num_proc", "truncation_mode", "shuffle_dataset", "packing", "packing_strategy"),
    *("eval_packing", "pad_to_multiple_of", "pad_token", "assistant_only_loss", "loss_type", "label_smoothing_factor"),
)
"""What ``GKDConfig`` has of ``SFTConfig``, for a preparation of data and a loss that TRL's GKD does without."""
DEFAULTS = {field.name: field.default for field in fields(GKDConfig)} | {"pad_to_multiple_of": None}
DROPPED = ("labels", "assistant_masks", "token_type_ids", "position_ids", "tools", "chat_template_kwargs", *PICTURES)


class ChunkedGKDTrainer(Taught, GKDTrainer):
    """``trl.experimental.gkd.GKDTrainer`` on the chunked engine: its arguments, and those below.

    Generation, ``seq_kd`` and the rest are TRL's. Logged as well: each term of the loss, ``student_entropy`` and
    ``teacher_agreement``, means over tokens; ``aux_loss`` of a mixture of experts. What ``args`` sets and GKD does not
    read (``loss_type``, packing and the rest of SFT's preparation of data) warns, as do columns that its collator
    leaves out.

    Args:
        teacher_model: a model, or its name (``args.teacher_model_init_kwargs`` then goes to ``from_pretrained``). None:
            ``args.teacher_model_name_or_path``.
        data_collator: TRL's for chats by default. With ``lmbda=0`` and no ``seq_kd`` a padding-free one, too
            (``DataCollatorWithFlattening``): position ids and what else it says of documents reach both models.
        loss: a ``DistillationLoss`` in place of ``JSDLoss(args.beta)``; a ``beta`` of ``args`` that it does not have is
            refused. As in TRL, ``args.temperature`` is that of sampling, and the loss has its own. The models' own
            logit scales and soft-caps count.
        loss_options: keywords of the ``JSDLoss``, such as ``{"chunk_size": 4096}`` or ``{"weight_hard": 0.1}``. With
            ``{"vocabulary": "cut"}`` models of one tokenizer may have heads of different sizes (padding): they are
            compared on the ids that both have, and what is generated has no others. By default that is refused.
        report, check: as for ``DistillTrainer``.

    Example:
        >>> from datasets import Dataset
        >>> from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
        >>> from trl.experimental.gkd import GKDConfig
        >>> from distill.trl import ChunkedGKDTrainer
        >>> tokenizer = AutoTokenizer.from_pretrained("sentence-transformers/all-MiniLM-L6-v2", eos_token="[SEP]")
        >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=102, **sizes))
        >>> tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
        >>> teacher = LlamaForCausalLM(model.config)
        >>> chat = [{"role": "user", "content": "The plane"}, {"role": "assistant", "content": "takes off."}]
        >>> data = Dataset.from_list([{"messages": chat}] * 4)
        >>> options = {"bf16": False, "max_steps": 1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
        >>> args = GKDConfig("runs", lmbda=0.0, **options)
        >>> trainer = ChunkedGKDTrainer(model, teacher, args, train_dataset=data, processing_class=tokenizer)
        >>> trainer.train().global_step
        {...}
        1
    """

    data_collator: Any
    uncalled = ("generalized_jsd_loss",)
    config_class = GKDConfig

    def load_teacher(self, name: str, args: Any) -> Any:
        options = {"trust_remote_code": args.trust_remote_code} | dict(args.teacher_model_init_kwargs or {})
        return AutoModelForCausalLM.from_pretrained(name, **options)

    def building(self) -> contextlib.AbstractContextManager[Any]:
        return our_head(sft_trainer)

    def check_read(self, by_name: bool) -> None:
        args = self.args
        said = {name: getattr(args, name) for name in UNREAD if getattr(args, name) != DEFAULTS[name]}
        if args.completion_only_loss is False:  # it always is
            said["completion_only_loss"] = False
        if self._formatting_func is not None:
            said["formatting_func"] = self._formatting_func
        if said:
            unread = ", ".join(f"{name}={value!r}" for name, value in said.items())
            warnings.warn(f"GKD does not read {unread} (SFT does)", stacklevel=3)
        if not isinstance(self.data_collator, DataCollatorForChatML):
            self.data_collator = KeepsApart(self.data_collator)
            return
        evaluated = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        for dataset in (self.train_dataset, *evaluated.values()):
            columns = getattr(dataset, "column_names", None) or ()
            if LENGTHS in columns:
                raise ValueError(
                    f"expected a padding-free data_collator for a dataset with {LENGTHS}: TRL's for chats would let "
                    "documents see each other"
                )
            if dropped := [name for name in DROPPED if name in columns]:
                warnings.warn(f"GKD's data_collator for chats leaves out the columns {dropped}", stacklevel=3)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        if self.lmbda > 0 or self.seq_kd:  # completions are generated
            wanted, flat = set(PROMPTS), set(DOCUMENTS)
            if not wanted <= inputs.keys() or flat & inputs.keys():
                raise ValueError(
                    f"expected {list(PROMPTS)} and no documents in one row from data_collator, got {sorted(inputs)}: "
                    "completions are generated (lmbda=0 and seq_kd=False do without)"
                )
            self.check_prompts(inputs["prompts"])
        return super().training_step(model, inputs, *args, **kwargs)

    def model_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        if unknown := sorted(set(inputs) - {*READ, *TOLD}):
            raise ValueError(f"expected {list(READ)} from data_collator, got also {unknown}, which GKD does not read")
        return {name: inputs[name] for name in ("input_ids", "attention_mask", *DOCUMENTS) if name in inputs}
