"""``DistillTrainer``: off-policy distillation with ``transformers.Trainer``, without either model's logits.

::

    from distill import DistillTrainer, JSDLoss

    trainer = DistillTrainer(
        model=student,
        teacher_model=teacher,
        loss=JSDLoss(temperature=2.0, weight_hard=0.5, weight_soft=0.5),
        args=TrainingArguments(...),
        train_dataset=dataset,  # input_ids, or a text column and processing_class=tokenizer
    )
    trainer.train()

The loss runs inside the student's own forward, where its head would (``chunked_embed.causal_lm``), so that DDP, FSDP
and PEFT see an ordinary one. Written for transformers 5.
"""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    from transformers import DataCollatorWithFlattening, Trainer, TrainerCallback, TrainingArguments
except ImportError as missing:
    raise ImportError(
        f"expected transformers 5 and accelerate (pip install 'chunked-embed[trl]'): {missing}"
    ) from missing

from chunked_embed import LossOutput, causal_lm, checks
from chunked_embed.trainers import HeadTrainer, check_given_loss, check_untrained

from . import packing
from .collator import COLUMNS, MASKS, OFFLINE, ROWS, DistillCollator
from .divergences import DIVERGENCES
from .losses import REPORTS, DistillationLoss, DistillLoss, as_report
from .packing import DOCUMENTS, LENGTHS
from .topk import TopKLoss

checks.own_package(sys.modules["distill"], "DistillationLoss")

__all__ = ["DistillCollator", "DistillTrainer"]

PICTURES = ("image", "images", "video", "videos", "audio", "audios")
Schedule = Mapping[str, Callable[[float], float]]


class Distilling(HeadTrainer):
    """What the trainers share, in front of a ``Trainer``: the loss in the student's forward, and means over tokens.

    A trainer calls ``take_loss`` in its constructor and, after that of its library, ``attach_model``.
    """

    loss: DistillationLoss
    teacher_model: Any

    usual_report: ClassVar[tuple[str, ...]] = ("student_entropy", "teacher_agreement")
    """What is logged unless ``report`` says otherwise."""
    taken: ClassVar[tuple[str, ...]] = ("loss", "aux_loss", "grad_norm", "learning_rate", "epoch")
    """Names in the logs that no term of the loss may have: it would stand in their place."""

    def take_loss(self, loss: DistillationLoss, report: Sequence[str] | None, check: bool) -> None:
        check_given_loss(loss, DistillationLoss, None)
        possible = REPORTS[:1] if isinstance(loss, TopKLoss) else REPORTS
        usual = [name for name in self.usual_report if name in possible]
        loss.report = usual if report is None else as_report(report)
        if unknown := [name for name in loss.report if name not in possible]:
            raise ValueError(f"expected report of {type(loss).__name__} among {list(possible)}, got {unknown}")
        if shadowed := [term.label for term in loss.terms if term.label in self.taken]:
            raise ValueError(f"expected terms of other names than {list(self.taken)}, as logged, got {shadowed[0]!r}")
        self.loss = loss
        self.checks_logits = checks.flag("check", check)
        self.sums: dict[str, dict[tuple[str, ...], Tensor]] = {"train": {}, "eval": {}}

    # --- the loss ---

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss, and the model's own outputs (by another forward) where they are asked for."""
        if inputs.get("labels") is None:
            raise ValueError(f"expected labels in what data_collator returns, got {sorted(inputs)}")
        arguments = {**self.model_inputs(inputs), "use_cache": False}
        length = inputs["input_ids"].shape[1]
        if length < 2:
            raise ValueError(
                f"expected sequences of two tokens or more, got input_ids {(len(inputs['labels']), length)}"
            )
        target = inputs["labels"][:, 1:]
        self.check_once(model, arguments)
        if self.teacher_model is not None:
            with self.accelerator.autocast():
                self.check_once(self.teacher_model, arguments, "the teacher_model")
        packing.check_unmasked(arguments)
        teacher = self.teach(inputs, arguments, target)
        items = self.items_per_process(num_items_in_batch)
        out = self.run_loss(model, arguments, target, self.loss, *teacher, num_items=items)
        self.store("train" if model.training else "eval", out, inputs.get(ROWS))
        return self.with_outputs(model, arguments, out.loss, return_outputs)

    def check_once(self, model: nn.Module, inputs: Mapping[str, Any], who: str = "the model") -> bool:
        """Also that all inputs are read, and documents in one row kept apart."""
        if not super().check_once(model, inputs, who):
            return False
        if ignored := packing.unread(model, inputs):
            if model is not self.teacher_model:
                raise ValueError(f"expected from data_collator what {who} reads, got also {ignored}, which none does")
            warnings.warn(f"{who} does not read {ignored}, which the model does", stacklevel=2)
        if any(name in inputs for name in DOCUMENTS) and inputs.get("attention_mask") is None:
            packing.check_takes_documents(model, who)
            if self.checks_logits:
                packing.check_apart(model, inputs, who)
        return True

    @property
    def aux_loss_weight(self) -> float:
        """What the student's config says, a share of it for each micro-batch of a step."""
        config = self.model.config.get_text_config()
        if not getattr(config, "output_router_logits", False):
            return 0.0
        steps = getattr(self, "current_gradient_accumulation_steps", 1) if self.model.training else 1
        return config.router_aux_loss_coef / steps

    def model_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What the models are called with."""
        raise NotImplementedError

    def teach(self, inputs: Mapping[str, Any], arguments: Mapping[str, Any], target: Tensor) -> tuple[Any, ...]:
        """What stands behind the student's head in a call of the loss."""
        if self.teacher_model is None or self.loss.weight_soft == 0:
            return ()
        if self.teacher_model.training:  # whoever called train() on it
            self.teacher_model.eval()
        return (self.frozen_head(self.teacher_model, arguments, target),)

    # --- what is logged ---

    def store(self, mode: str, out: LossOutput, rows: Sequence[int] | None = None) -> None:
        """Sums over tokens: in training those of this process, in evaluation of all, without rows that only fill up.

        Args:
            rows: tokens of each row of the dataset, where the batch has them one behind the other.
        """
        metrics = {name: value for name, value in out.metrics.items() if value.dim() == 2}  # (B, tokens)
        counts = out.counts or {}
        values = torch.stack([*metrics.values()])  # (metrics, B, tokens)
        given = [counts[name] if name in counts else torch.ones_like(value) for name, value in metrics.items()]
        count = torch.stack(given).to(values)
        table = torch.stack([values * count, count], -1)  # (metrics, B, tokens, 2)
        if rows is None:
            table = table.sum(2)
        else:  # the first token is no target
            each = F.pad(table[:, 0], (0, 0, 1, 0)).split(list(rows), 1)
            table = torch.stack([row.sum(1) for row in each], 1)
        table = table.transpose(0, 1).contiguous()  # (B, metrics, 2)
        if mode == "eval":
            table = self.accelerator.gather_for_metrics(table)
        self._add(mode, tuple(metrics), table.sum(0))
        if (aux_loss := out.metrics.get("aux_loss")) is not None:  # of a micro-batch
            each = self.accelerator.gather(aux_loss[None]) if mode == "eval" else aux_loss[None]
            self._add(mode, ("aux_loss",), torch.stack([each.sum(), each.new_full((), len(each))])[None])

    def _add(self, mode: str, names: tuple[str, ...], table: Tensor) -> None:  # (names, 2)
        before = self.sums[mode].get(names)
        self.sums[mode][names] = table if before is None else before + table

    def take_means(self, mode: str) -> dict[str, float]:
        """The means since the last call, over all processes."""
        kept, self.sums[mode] = self.sums[mode], {}
        found: dict[str, tuple[Any, Any]] = {}
        for names, table in kept.items():
            for name, (total, seen) in zip(names, table, strict=True):
                before = found.get(name, (0.0, 0.0))
                found[name] = before[0] + total, before[1] + seen
        return self.means_of(found, gather=mode == "train")

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        self.sums["train"] = {}  # auto_find_batch_size may have broken off a loop before
        return super()._inner_training_loop(*args, **kwargs)  # type: ignore[misc]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:  # of training: an evaluation has eval_loss, and what follows
            logs.update(self.take_means("train"))
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        self.sums["eval"] = {}
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)  # type: ignore[misc]
        means = self.take_means("eval")
        output.metrics.update({f"{metric_key_prefix}_{name}": mean for name, mean in means.items()})
        return output


class DistillTrainer(Distilling, Trainer):
    """``transformers.Trainer`` with a distillation loss.

    The loss is the mean over the tokens of a step, whatever the micro-batches and processes that they come in. Logged,
    in training and (``eval_*``) in evaluation: each term of the loss, ``student_entropy`` and ``teacher_agreement``, as
    means over tokens; ``aux_loss`` of a mixture of experts whose config has ``output_router_logits``, which is added
    with the config's coefficient; ``eval_loss`` is ``Trainer``'s, the mean over batches.

    Documents packed into rows by TRL's ``pack_dataset`` (a column ``seq_lengths``) neither see nor predict each other:
    a batch of them is one row without padding, whose documents both models are told of in every way that eager
    attention, sdpa, flash attention and linear attention have (``distill.packing``). Padding-free collators work the
    same way (``DataCollatorWithFlattening``, TRL's ``DataCollatorForLanguageModeling(padding_free=True)``). At the
    first batch each model's states are looked at (``check``): one in which documents do see each other, as in most
    state-space layers, is refused; one without position ids always. With such a collator of your own and several
    processes, what is logged of an evaluation counts the rows that fill up its last batch.

    Args:
        model: the student, a causal language model of transformers, or one with adapters of PEFT.
        teacher_model: the teacher, of the same tokenizer. Its vocabulary may be of another size (the loss's
            ``vocabulary``). It is in eval mode at every step and never trained. None with ``TopKLoss``.
        loss: a ``DistillationLoss``, or the name of a divergence, which is then weighed like the hard loss: half and
            half. By default "kl". The models' own logit scales and soft-caps count. ``report`` replaces its own.
        data_collator: by default ``DistillCollator()``. What it returns goes to both models, but labels and what an
            offline teacher said; what the model does not read is refused, what the teacher does not read warns.
        train_dataset, eval_dataset: with ``input_ids``, and perhaps ``attention_mask`` and ``labels`` (aligned with
            ``input_ids``; -100 is ignored; by default the ids themselves, without padding and where ``completion_mask``
            or ``assistant_masks`` is zero); or with ``text``, which ``processing_class`` turns into at most
            ``max_length`` ids (a text of one token, which has nothing to predict, is left out). For ``TopKLoss`` also
            ``teacher_ids`` and ``teacher_logprobs``, (tokens, K) each: entry t is the teacher's distribution of the
            token after t. Columns that a model reads and the collator leaves out are refused.
        schedule: ``loss.numbers`` as functions of progress, which is 0 at the first step and 1 at the last:
            ``{"t": lambda progress: 0.4 + 0.6 * progress}``.
        report: which of "student_entropy", "teacher_agreement" and "tempered_entropy" to log. By default the first two,
            if the loss can.
        check: at the first batch, compare a few logits that each model's head gives with the model's own, and documents
            in one row with and without others. That ids are below the sizes of embeddings is always checked.
        args, trainer_options: ``Trainer``'s. ``label_smoothing_factor`` and ``compute_loss_func`` are refused: the loss
            is the argument loss. With ``use_liger_kernel`` the kernels of layers are applied, Liger's losses are not.

    Raises:
        TypeError, ValueError: what makes no sense, in the constructor as far as it shows there.

    Example:
        >>> from datasets import Dataset
        >>> from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
        >>> from distill import DistillTrainer, JSDLoss
        >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
        >>> teacher = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
        >>> rows = [{"input_ids": list(range(2, 12))}] * 4
        >>> args = TrainingArguments("runs", max_steps=1, report_to="none", save_strategy="no", disable_tqdm=True)
        >>> loss = JSDLoss(temperature=2.0, weight_hard=0.5, weight_soft=0.5)
        >>> trainer = DistillTrainer(model, teacher, loss, args, train_dataset=Dataset.from_list(rows))
        >>> trainer.train().global_step
        {...}
        1
    """

    train_dataset: Any
    eval_dataset: Any
    data_collator: Any
    _signature_columns: Any

    def __init__(
        self,
        model: nn.Module,
        teacher_model: nn.Module | None = None,
        loss: DistillationLoss | str | None = None,
        args: TrainingArguments | None = None,
        data_collator: Callable[[list], dict[str, Any]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        max_length: int | None = 1024,
        schedule: Schedule | None = None,
        report: Sequence[str] | None = None,
        check: bool = True,
        **trainer_options: Any,
    ) -> None:
        checks.instance("model", model, nn.Module)
        if trainer_options.get("compute_loss_func") is not None:
            raise TypeError("expected no compute_loss_func: the loss is the argument loss")
        if args is not None and not isinstance(args, TrainingArguments):
            raise TypeError(f"expected args to be TrainingArguments, got {type(args).__name__}")
        checks.integer_or_none("max_length", max_length, low=2)
        if args is not None and args.label_smoothing_factor != 0:
            raise ValueError(f"expected label_smoothing_factor=0, got {args.label_smoothing_factor}")
        _warn_foreign(args)
        if isinstance(data_collator, DataCollatorWithFlattening) and not data_collator.return_position_ids:
            raise ValueError("expected DataCollatorWithFlattening(return_position_ids=True), got False")
        self.take_loss(_loss(loss), report, check)
        self.offline = isinstance(self.loss, TopKLoss)
        schedule = _schedule(schedule, self.loss)
        self._check_teacher(model, teacher_model, "weight_soft" in schedule)
        self.teacher_model = teacher_model
        self.max_length = max_length
        self._own_collator = data_collator is None
        super().__init__(
            model,
            args,
            data_collator or DistillCollator(),
            train_dataset,
            eval_dataset,
            processing_class,
            **trainer_options,
        )
        self.attach_model()
        self.model_accepts_loss_kwargs = True  # have the tokens of a step counted ...
        self._loss_shifts_labels = True  # ... without the first of each sequence, which no state predicts
        with self.args.main_process_first(desc="tokenising"):
            self.train_dataset = self._prepare(self.train_dataset)
            if isinstance(self.eval_dataset, dict):
                self.eval_dataset = {name: self._prepare(data) for name, data in self.eval_dataset.items()}
            else:
                self.eval_dataset = self._prepare(self.eval_dataset)
        if teacher_model is not None:
            devices = set((getattr(teacher_model, "hf_device_map", None) or {}).values())
            if len(devices) < 2 and not getattr(teacher_model, "is_quantized", False):  # more have hooks for inputs
                teacher_model.to(self.args.device)
            teacher_model.eval()
        if schedule:
            self.add_callback(_Scheduled(self.loss, schedule))

    def _check_teacher(self, model: nn.Module, teacher: nn.Module | None, soft_later: bool) -> None:
        if teacher is None:
            if self.loss.terms and (self.loss.weight_soft != 0 or soft_later) and not self.offline:
                raise ValueError(f"expected a teacher_model for {type(self.loss).__name__}, got None")
            return
        if self.offline:
            raise ValueError("expected no teacher_model: TopKLoss reads the dataset's teacher_ids and teacher_logprobs")
        checks.instance("teacher_model", teacher, nn.Module)
        check_untrained(model, teacher, "teacher_model")
        ours, theirs = head_width(model), head_width(teacher)
        if ours is not None and theirs is not None:
            self.loss.compared(ours, theirs)
        causal_lm.attach(teacher)

    # --- the data ---

    def _prepare(self, dataset: Any) -> Any:
        """Tokenise, if need be, and check the columns of a ``datasets.Dataset``; others are taken as they are."""
        columns = getattr(dataset, "column_names", None)
        if columns is None:
            return dataset
        if "input_ids" not in columns:
            if "text" not in columns or self.offline:
                wanted = "input_ids" if self.offline else "input_ids or text"
                raise ValueError(f"expected a dataset with a column {wanted}, got {sorted(columns)}")
            if not callable(self.processing_class):
                got = type(self.processing_class).__name__
                raise ValueError(f"expected a processing_class (a tokenizer) for a dataset of text, got {got}")
            options = {"truncation": self.max_length is not None, "max_length": self.max_length}
            tokenizer = self.processing_class

            def tokenised(rows: Mapping[str, Any]) -> dict[str, Any]:
                made = tokenizer(rows["text"], **options)  # and token types, which text alone has none of
                return {name: made[name] for name in ("input_ids", "attention_mask") if name in made}

            rows = dataset.map(tokenised, batched=True, remove_columns=columns)
            return rows.filter(lambda row: len(row["input_ids"]) > 1)
        if self.offline and (lacking := [name for name in OFFLINE if name not in columns]):
            raise ValueError(f"expected a dataset with {list(OFFLINE)} for TopKLoss, got none of {lacking}")
        if LENGTHS in columns:
            packing.check_takes_documents(self.model, "the model")
            if self.teacher_model is not None:
                packing.check_takes_documents(self.teacher_model, "the teacher_model")
        if self._own_collator:
            self._set_signature_columns_if_needed()
            changing = {*self._signature_columns, *PICTURES}
            if unknown := sorted((set(columns) & changing) - {*COLUMNS, *MASKS, LENGTHS}):
                raise ValueError(
                    f"expected a data_collator for the columns {unknown}, which the default one leaves out"
                )
            return dataset
        masks = sorted(set(columns) & set(MASKS))
        if masks and "labels" not in columns and self.args.remove_unused_columns:
            raise ValueError(
                f"expected a column labels, got {masks}, which only the default data_collator reads "
                "(remove_unused_columns=False leaves them to yours)"
            )
        if LENGTHS in columns and not isinstance(self.data_collator, packing.KeepsApart):
            self.data_collator = packing.KeepsApart(self.data_collator)
        return dataset

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        return super().get_eval_dataloader(self._prepare(eval_dataset))

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        return super().get_test_dataloader(self._prepare(test_dataset))

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        masks = MASKS if self._own_collator else ()
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, *COLUMNS, LENGTHS, *masks]))

    # --- the loss ---

    def model_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in inputs.items() if name not in ("labels", ROWS, *OFFLINE)}

    def teach(self, inputs: Mapping[str, Any], arguments: Mapping[str, Any], target: Tensor) -> tuple[Any, ...]:
        if not self.offline:
            return super().teach(inputs, arguments, target)
        if lacking := [name for name in OFFLINE if inputs.get(name) is None]:
            raise ValueError(f"expected {lacking} in what data_collator returns, got {sorted(inputs)}")
        return tuple(inputs[name][:, :-1] for name in OFFLINE)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            if prediction_loss_only:
                return self.compute_loss(model, inputs), None, None
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return loss, outputs.logits, inputs["labels"]


# --- parts -----------------------------------------------------------------------------------------------------------


class _Scheduled(TrainerCallback):
    """Numbers of a loss by the progress of training. They follow from the step, so a resumed run has them too."""

    def __init__(self, loss: DistillationLoss, schedule: Schedule) -> None:
        self.loss, self.schedule = loss, schedule

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        progress = min(state.global_step / max(state.max_steps - 1, 1), 1.0)
        for name, function in self.schedule.items():
            value = function(progress)
            if not checks.is_number(value):
                raise TypeError(f"expected a number for {name!r} from the schedule at {progress:.3g}, got {value!r}")
            setattr(self.loss, name, float(value))

    on_train_begin = on_step_begin  # for an evaluation before the first step


def _loss(loss: DistillationLoss | str | None) -> DistillationLoss:
    if isinstance(loss, DistillationLoss):
        return loss
    name = "kl" if loss is None else loss
    if not isinstance(name, str):
        raise TypeError(f"expected loss to be a DistillationLoss or a name, got {type(loss).__name__}")
    if name not in DIVERGENCES:
        raise ValueError(f"expected loss to be a DistillationLoss or one of {sorted(DIVERGENCES)}, got {name!r}")
    return DistillLoss([("ce", 0.5), (name, 0.5)])


def _warn_foreign(args: TrainingArguments | None) -> None:
    """Settings of TRL's configs, which are ``TrainingArguments`` too."""
    if not type(args).__module__.startswith("trl."):
        return
    ours = {field.name for field in dataclasses.fields(TrainingArguments)}
    theirs = [field for field in dataclasses.fields(args) if field.name not in ours]  # type: ignore[arg-type]
    if unread := [f.name for f in theirs if getattr(args, f.name) not in (f.default, dataclasses.MISSING, None)]:
        said = ", ".join(f"{name}={getattr(args, name)!r}" for name in unread)
        warnings.warn(f"DistillTrainer reads TrainingArguments, and of {type(args).__name__} not {said}", stacklevel=3)


def head_width(model: Any) -> int | None:
    """The rows of a model's head, where that can be seen from outside."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    weight = getattr(head, "weight", None)
    return len(weight) if isinstance(weight, Tensor) and weight.dim() == 2 else None


def _schedule(schedule: Schedule | None, loss: DistillationLoss) -> Schedule:
    if schedule is not None and not isinstance(schedule, Mapping):
        raise TypeError(f"expected schedule to be a dict of functions by name, got {type(schedule).__name__}")
    for name, function in (schedule or {}).items():
        if name not in loss.numbers:
            raise ValueError(
                f"expected schedule to name numbers of {type(loss).__name__}, {list(loss.numbers)}, got {name!r}"
            )
        if name == "temperature" and isinstance(loss, TopKLoss) and loss.tail != "renorm":
            raise ValueError(f'expected no schedule for the temperature with tail="{loss.tail}", which has one')
        if not callable(function):
            raise TypeError(f"expected a function of progress for {name!r}, got {function!r}")
    return dict(schedule or {})
