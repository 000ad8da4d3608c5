"""``ChunkedDistillationTrainer``: TRL's on-policy distillation, with every divergence of this package."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from trl import DistillationConfig, DistillationTrainer
from trl.trainer import distillation_trainer
from trl.trainer.utils import create_model_from_path, get_config_model_id

from chunked_embed.trainers import replaced

from .. import packing
from ..losses import DistillationLoss, JSDLoss
from ._base import Taught

TOKENS = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "tool_mask")
COUNTS = ("num_items_in_batch", "num_images", "num_tiles")
ABOUT_PICTURES = (
    *("image_grid_thw", "pixel_attention_mask", "spatial_shapes", "image_sizes", "token_type_ids"),
    *("mm_token_type_ids", "image_position_ids"),
)
SHOWN = ("pixel_values", *ABOUT_PICTURES)
"""What models are given of pictures, beside the tokens."""
DEFAULTS = {field.name: field.default for field in fields(DistillationConfig)}
UNREAD = ("label_smoothing_factor", "train_sampling_strategy")
NEEDED = {
    "use_vllm": tuple(name for name in DEFAULTS if name.startswith("vllm_")),
    "log_completions": ("num_completions_to_print", "log_unique_prompts"),
}
"""Settings without which others have no effect."""


class ChunkedDistillationTrainer(Taught, DistillationTrainer):
    """``trl.DistillationTrainer`` on the chunked engine: its arguments, and those below.

    Generation, tools, vLLM and images are TRL's. A step's loss is the sum over its generated tokens, without those of
    tools, divided by their number on all processes; an evaluation's is the mean of its batches'. Logged is what TRL
    logs, and each term of the loss, ``teacher_agreement`` and, of a mixture of experts, ``aux_loss``; these and
    ``entropy`` are means over tokens (TRL's ``entropy`` is one over micro-batches). Settings of ``args`` that nothing
    reads warn.

    Args:
        teacher_model: a model, or its name (``args.teacher_model_init_kwargs`` and ``args.teacher_model_revision`` then
            go to ``from_pretrained``). None: ``args.teacher_model_name_or_path``.
        loss: a ``DistillationLoss`` in place of ``JSDLoss(args.beta, temperature=args.temperature)``. A ``beta`` or a
            ``temperature`` of ``args`` that it does not have is refused: ``args.generation_kwargs={"temperature": x}``
            is that of sampling alone. So is a hard loss: the tokens are the student's own samples, whose cross-entropy
            has a gradient of mean zero. The models' own logit scales and soft-caps count.
        loss_options: keywords of the ``JSDLoss``, such as ``{"chunk_size": 4096}``. With ``{"vocabulary": "cut"}``
            models of one tokenizer may have heads of different sizes (padding): they are compared on the ids that both
            have, and what is generated has no others. By default that is refused.
        report, check: as for ``DistillTrainer``; by default "tempered_entropy", which is TRL's ``entropy`` and is
            logged under that name, and "teacher_agreement".

    ``trainer.beta`` and ``trainer.temperature``, set later, are the loss's; sampling stays as it was, as in TRL.

    Reference: GKD, https://arxiv.org/abs/2306.13649

    Example:
        >>> from datasets import Dataset
        >>> from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
        >>> from trl import DistillationConfig
        >>> from distill import SkewReverseKLLoss
        >>> from distill.trl import ChunkedDistillationTrainer
        >>> tokenizer = AutoTokenizer.from_pretrained("sentence-transformers/all-MiniLM-L6-v2", eos_token="[SEP]")
        >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=102, **sizes))
        >>> teacher = LlamaForCausalLM(model.config)
        >>> data = Dataset.from_list([{"prompt": "The plane"}] * 8)
        >>> options = {"bf16": False, "max_steps": 1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
        >>> args = DistillationConfig("runs", max_completion_length=4, **options)
        >>> loss = SkewReverseKLLoss(skew=0.1)
        >>> trainer = ChunkedDistillationTrainer(
        ...     model, teacher, args, train_dataset=data, processing_class=tokenizer, loss=loss
        ... )
        >>> trainer.train().global_step
        {...}
        1
    """

    uncalled = ("_compute_loss", "_get_last_hidden_state")
    usual_report = ("tempered_entropy", "teacher_agreement")
    taken = (*Taught.taken, "entropy")
    config_class = DistillationConfig
    numbers = {"beta": JSDLoss, "temperature": DistillationLoss}

    # --- at construction ---

    def default_args(self, model: Any) -> DistillationConfig:
        """With TRL's name for the folder."""
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        return DistillationConfig(f"{name.split('/')[-1]}-Distillation")

    def load_teacher(self, name: str, args: DistillationConfig) -> Any:
        """With the defaults that TRL has beside a name."""
        options: dict[str, Any] = {"dtype": None, "trust_remote_code": args.trust_remote_code}
        if args.teacher_model_revision is not None:
            options["revision"] = args.teacher_model_revision
        options |= args.teacher_model_init_kwargs or {}
        if isinstance(options["dtype"], str) and options["dtype"] != "auto":
            options["dtype"] = getattr(torch, options["dtype"])
        if args.distributed_state.distributed_type in (DistributedType.MULTI_GPU, DistributedType.DEEPSPEED):
            options["device_map"] = None
        return create_model_from_path(name, **options)

    def building(self) -> contextlib.AbstractContextManager[Any]:
        return _adapters_in_forward()

    def check_loss(self) -> None:
        if self.loss.weight_hard != 0 or self.loss.weight_soft == 0:
            raise ValueError(
                'expected a loss with weight_hard=0 (no "ce") and weight_soft above: completions are the student\'s '
                f"own samples, got {self.loss.weight_hard} and {self.loss.weight_soft} of {type(self.loss).__name__}"
            )

    def check_read(self, by_name: bool) -> None:
        args = self.args
        unread = [*UNREAD, *(name for needed in NEEDED for name in NEEDED[needed] if not getattr(args, needed))]
        if not self.tools:
            unread.append("max_tool_calling_iterations")
        if not by_name:
            unread.append("teacher_model_revision")
        if self.accelerator.num_processes > 1:  # with one it says nothing
            unread.append("average_tokens_across_devices")
        if said := [f"{x}={getattr(args, x)!r}" for x in unread if x in DEFAULTS and getattr(args, x) != DEFAULTS[x]]:
            warnings.warn(f"nothing reads {', '.join(said)} of args here", stacklevel=3)

    def share_ids(self, ours: int, theirs: int) -> None:
        super().share_ids(ours, theirs)
        if self.use_vllm and ours > theirs:
            raise ValueError(
                f"expected use_vllm=False for a student of {ours} ids and a teacher of {theirs}: vLLM would generate "
                "ids that the teacher lacks"
            )

    # --- at each step ---

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        self.check_prompts(torch.tensor([max(ids, default=0) for ids in prompt_ids]))
        with _without_router_logits(self.model):
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss, and the model's own outputs (by another forward) where they are asked for."""
        if self.model.training and inputs.get("num_items_in_batch") is not None:
            # Of all processes. A step's gradient is the mean of theirs.
            num_items_in_batch = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
        return super().compute_loss(model, _in_rows(inputs), return_outputs, num_items_in_batch)

    def items_per_process(self, num_items_in_batch: Tensor | int | None) -> Any:
        """As given: counted after generation, over all processes whatever ``args`` say."""
        return num_items_in_batch

    def model_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """All but labels, and what is said of pictures to a student that does not read it."""
        read = packing.read_by(self.model)
        left_out = {"labels"} | (set() if read is None else {*ABOUT_PICTURES} - read)
        return {name: value for name, value in inputs.items() if name not in left_out}

    def take_means(self, mode: str) -> dict[str, float]:
        return {"entropy" if name == "tempered_entropy" else name: x for name, x in super().take_means(mode).items()}


def _in_rows(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Prompts and completions as what models read, and labels where a student's own token is to be predicted."""
    if unknown := sorted(set(inputs) - {*TOKENS, *COUNTS, *SHOWN}):
        raise ValueError(
            f"expected {[*TOKENS, *COUNTS, *SHOWN]} among the inputs, got also {unknown}, which nothing reads"
        )
    prompts, completions = inputs["prompt_ids"], inputs["completion_ids"]
    own = inputs["completion_mask"]
    if "tool_mask" in inputs:
        own = own * inputs["tool_mask"]
    labels = completions.masked_fill(own == 0, -100)
    return {
        "input_ids": torch.cat([prompts, completions], 1),
        "attention_mask": torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
        "labels": torch.cat([torch.full_like(prompts, -100), labels], 1),
        **{name: inputs[name] for name in SHOWN if name in inputs},
    }


@contextlib.contextmanager
def _without_router_logits(model: Any) -> Iterator[None]:
    """While a mixture of experts generates: its balance counts in training, and is ill-defined beside a cache."""
    config = model.config.get_text_config()
    asked = getattr(config, "output_router_logits", False)
    try:
        if asked:
            config.output_router_logits = False
        yield
    finally:
        if asked:
            config.output_router_logits = asked


def _adapters_in_forward() -> contextlib.AbstractContextManager[None]:
    """TRL refuses adapters on the head and virtual tokens, which its loss would go past. A prefix stays refused: what
    generates with a cache may leave it out."""
    prefixes = getattr(distillation_trainer, "PrefixTuningConfig", ())
    return replaced(distillation_trainer, BaseTunerLayer=(), PromptLearningConfig=prefixes)
