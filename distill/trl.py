"""``ChunkedGKDTrainer``: TRL's on-policy distillation with the losses of this package, and no logits held.

::

    from distill.trl import ChunkedGKDTrainer  # in place of trl.experimental.gkd.GKDTrainer

    trainer = ChunkedGKDTrainer(
        model=student, teacher_model=teacher, args=GKDConfig(...), train_dataset=chats, processing_class=tokenizer
    )

Written for TRL 1.16. What differs on purpose: with several processes the loss is the mean over the tokens of all
(TRL's is that divided by the number of processes), a mixture of experts is trained with the auxiliary loss that its
config or ``args.router_aux_loss_coef`` asks for (TRL's leaves it out), and an adapter on the head is trained (TRL
refuses it). What does not: an on-policy step is divided by the tokens of the dataset's completions, which were counted
before others were generated; the terms that are logged are means over those in use.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

try:
    import trl
    from transformers import AutoModelForCausalLM
    from trl.experimental.gkd import GKDConfig, GKDTrainer
    from trl.experimental.utils import DataCollatorForChatML
    from trl.trainer import sft_trainer
except (ImportError, RuntimeError) as missing:  # the second is of a library that imports lazily
    raise ImportError(f"expected trl 1.16 and what it needs (pip install 'chunked-embed[trl]'): {missing}") from missing

from torch import Tensor, nn

from chunked_embed import causal_lm
from chunked_embed.trainers import check_given_loss, check_ids, our_head, warn_untested

from .losses import DistillationLoss, JSDLoss
from .packing import DOCUMENTS, LENGTHS, KeepsApart
from .topk import TopKLoss
from .trainer import PICTURES, Distilling, head_width

__all__ = ["ChunkedGKDTrainer"]

warn_untested("distill.trl", trl, "1.16.")

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


class ChunkedGKDTrainer(Distilling, GKDTrainer):
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

    def __init__(
        self,
        model: Any = None,
        teacher_model: Any = None,
        args: Any = None,
        *more: Any,
        loss: DistillationLoss | None = None,
        loss_options: Mapping[str, Any] | None = None,
        report: Sequence[str] | None = None,
        check: bool = True,
        **trainer_options: Any,
    ) -> None:
        check_given_loss(loss, DistillationLoss, loss_options)
        if isinstance(loss, TopKLoss):
            raise TypeError("expected a loss with a teacher, got TopKLoss, which reads what was kept of one")
        if not isinstance(args, GKDConfig):
            raise TypeError(f"expected args to be a GKDConfig, got {type(args).__name__}")
        teacher_model = args.teacher_model_name_or_path if teacher_model is None else teacher_model
        if teacher_model is None:
            raise ValueError("expected a teacher_model, got None")
        self.take_loss(_loss(args, loss, dict(loss_options or {})), report, check)
        with _taught(args, teacher_model) as teacher, our_head(sft_trainer):
            theirs = _vocabulary(teacher)
            super().__init__(model, teacher, args, *more, **trainer_options)
        self.attach_model()
        # TRL has wrapped its forward for autocast. What goes past that is called under autocast here.
        causal_lm.attach(self.accelerator.unwrap_model(self.teacher_model))
        self._share_ids(_vocabulary(causal_lm.unwrapped(self.model)), theirs)
        self._check_read()
        self._made = True

    def __setattr__(self, name: str, value: Any) -> None:
        """TRL's trainer reads its ``beta`` at each step: here it is the loss's."""
        if name == "beta" and "_made" in self.__dict__:
            if not isinstance(self.loss, JSDLoss):
                raise AttributeError(f"expected no beta for {type(self.loss).__name__}, got {value!r}")
            self.loss.beta = value
        super().__setattr__(name, value)

    def _share_ids(self, ours: int, theirs: int) -> None:
        """One model's tokens are the other's inputs: only ids that both have may be generated."""
        if ours == theirs:
            return
        if self.loss.vocabulary == "refuse":
            raise ValueError(
                f"expected vocabularies of one size, got {ours} (student) and {theirs} (teacher): if the tokenizer is "
                "the same and the rest is padding, loss_options={'vocabulary': 'cut'} compares them on the ids that "
                "both have"
            )
        self.loss.compared(ours, theirs)
        self.generation_config.suppress_tokens = list(range(min(ours, theirs), max(ours, theirs)))

    def _check_read(self) -> None:
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
            if not self.__dict__.get("_prompts_checked"):  # what is generated from them is checked with the models
                self._prompts_checked = True
                for one, who in ((self.model, "the model"), (self.teacher_model, "the teacher_model")):
                    check_ids(one, who, inputs["prompts"])
        return super().training_step(model, inputs, *args, **kwargs)

    def model_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        if unknown := sorted(set(inputs) - {*READ, *TOLD}):
            raise ValueError(f"expected {list(READ)} from data_collator, got also {unknown}, which GKD does not read")
        return {name: inputs[name] for name in ("input_ids", "attention_mask", *DOCUMENTS) if name in inputs}


class _Size(int):
    """A vocabulary's, which equals any in TRL's check of sizes: what may differ is for the loss to say."""

    def __ne__(self, other: object) -> bool:
        return False


@contextlib.contextmanager
def _taught(args: GKDConfig, teacher: Any) -> Iterator[Any]:
    """The teacher, loaded if need be, as TRL's constructor takes it. ``args`` and configs are afterwards as before."""
    kept = args.teacher_model_init_kwargs
    if isinstance(teacher, str):
        options = {"trust_remote_code": args.trust_remote_code} | dict(kept or {})
        teacher = AutoModelForCausalLM.from_pretrained(teacher, **options)
        args.teacher_model_init_kwargs = None  # it takes them beside a name only
    config = teacher.config.get_text_config()
    size = config.vocab_size
    try:
        config.vocab_size = _Size(size)
        yield teacher
    finally:
        config.vocab_size = size
        args.teacher_model_init_kwargs = kept


def _loss(args: GKDConfig, loss: DistillationLoss | None, options: dict[str, Any]) -> DistillationLoss:
    made = JSDLoss(**{"beta": args.beta, "vocabulary": "refuse", **options}) if loss is None else loss
    beta = made.beta if isinstance(made, JSDLoss) else None
    if args.beta not in (DEFAULTS["beta"], beta):
        said = type(made).__name__ + ("" if beta is None else f"(beta={beta})")
        raise ValueError(f"expected a loss with args.beta={args.beta}, got {said}: say it in one place")
    return made


def _vocabulary(model: Any) -> int:
    """The rows of a head; of one in shards, what the config says."""
    return head_width(model) or model.config.get_text_config().vocab_size
