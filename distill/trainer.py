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

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    from transformers import Trainer, TrainerCallback, TrainingArguments
except ImportError as missing:
    raise ImportError(
        f"expected transformers 5 and accelerate (pip install 'transformers[torch]'): {missing}"
    ) from missing

from chunked_embed import LossOutput, causal_lm, checks
from chunked_embed.trainers import HeadTrainer, check_given_loss

from .divergences import DIVERGENCES
from .losses import REPORTS, DistillationLoss, DistillLoss, as_report
from .topk import TopKLoss

__all__ = ["DistillCollator", "DistillTrainer"]

OFFLINE = ("teacher_ids", "teacher_logprobs")
MASKS = ("completion_mask", "assistant_masks")  # of the tokens to learn
COLUMNS = ("input_ids", "attention_mask", "labels", *OFFLINE)
Schedule = Mapping[str, Callable[[float], float]]


class Distilling(HeadTrainer):
    """What the trainers share, in front of a ``Trainer``: the loss in the student's forward, and means over tokens.

    A trainer calls ``take_loss`` in its constructor and, after that of its library, ``attach_model``.
    """

    loss: DistillationLoss
    teacher_model: Any

    def take_loss(self, loss: DistillationLoss, report: Sequence[str] | None, check: bool) -> None:
        check_given_loss(loss, DistillationLoss, None)
        possible = REPORTS[:1] if isinstance(loss, TopKLoss) else REPORTS
        loss.report = possible if report is None else as_report(report)
        if unknown := [name for name in loss.report if name not in possible]:
            raise ValueError(f"expected report of {type(loss).__name__} among {list(possible)}, got {unknown}")
        self.loss = loss
        self.checks_logits = bool(check)
        self.sums: dict[str, dict[str, tuple[Any, Any]]] = {"train": {}, "eval": {}}

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
        if self.checks_logits:
            self.check_once(model, arguments)
            if self.teacher_model is not None:
                with self.accelerator.autocast():
                    self.check_once(self.teacher_model, arguments, "the teacher_model")
        teacher = self.teach(inputs, arguments, target)
        # At least one: a step may consist of ignored tokens.
        items = None if num_items_in_batch is None else torch.as_tensor(num_items_in_batch).clamp_min(1)
        out, aux_loss = self.run_loss(
            model, arguments, target, lambda head, labels: self.loss(head, *teacher, target=labels, num_items=items)
        )
        loss = out.loss
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # Gradients are averaged over the processes, but this sum was divided by the tokens of all of them.
            loss = loss * self.accelerator.num_processes
        if aux_loss is not None:
            steps = getattr(self, "current_gradient_accumulation_steps", 1) if model.training else 1
            loss = loss + self.model.config.get_text_config().router_aux_loss_coef / steps * aux_loss
        self.store("train" if model.training else "eval", out)
        return self.with_outputs(model, arguments, loss, return_outputs)

    def model_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What the models are called with."""
        raise NotImplementedError

    def teach(self, inputs: Mapping[str, Any], arguments: Mapping[str, Any], target: Tensor) -> tuple[Any, ...]:
        """What stands behind the student's head in a call of the loss."""
        if self.teacher_model is None or self.loss.weight_soft == 0:
            return ()
        return (self.frozen_head(self.teacher_model, arguments, target),)

    # --- what is logged ---

    def store(self, mode: str, out: LossOutput) -> None:
        """Sums over tokens: in training those of this process, in evaluation of all, without rows that only fill up."""
        found = []
        for name, value in out.metrics.items():
            count = (out.counts or {}).get(name, torch.ones_like(value))
            found.append(torch.stack([(value * count).sum(1), count.sum(1)], 1))
        table = torch.stack(found, 1)  # (B, metrics, 2)
        if mode == "eval":
            table = self.accelerator.gather_for_metrics(table)
        kept = self.sums[mode]
        for name, (total, seen) in zip(out.metrics, table.sum(0), strict=True):
            before = kept.get(name, (0.0, 0.0))
            kept[name] = before[0] + total, before[1] + seen

    def take_means(self, mode: str) -> dict[str, float]:
        """The means since the last call, over all processes."""
        kept, self.sums[mode] = self.sums[mode], {}
        return self.means_of(kept, gather=mode == "train")

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
    means over tokens; ``eval_loss`` is ``Trainer``'s, the mean over batches.

    Args:
        model: the student, a causal language model of transformers, or one with adapters of PEFT.
        teacher_model: the teacher, of the same tokenizer. Its vocabulary may be of another size (the loss's
            ``vocabulary``). It is put into eval mode and never trained. None with ``TopKLoss``.
        loss: a ``DistillationLoss``, or the name of a divergence, which is then weighed like the hard loss: half and
            half. By default "kl". The models' own logit scales and soft-caps count. ``report`` replaces its own.
        data_collator: by default ``DistillCollator()``.
        train_dataset, eval_dataset: with ``input_ids``, and perhaps ``attention_mask`` and ``labels`` (aligned with
            ``input_ids``; -100 is ignored; by default the ids themselves, without padding and where ``completion_mask``
            or ``assistant_masks`` is zero); or with ``text``, which ``processing_class`` turns into at most
            ``max_length`` ids (a text of one token, which has nothing to predict, is left out). For ``TopKLoss`` also
            ``teacher_ids`` and ``teacher_logprobs``, (tokens, K) each: entry t is the teacher's distribution of the
            token after t.
        schedule: ``loss.numbers`` as functions of progress, which is 0 at the first step and 1 at the last:
            ``{"t": lambda progress: 0.4 + 0.6 * progress}``.
        report: which of "student_entropy" and "teacher_agreement" to log. By default both, if the loss can.
        check: at the first batch, compare each model's log-probabilities through its head with its own logits'.
        trainer_options: ``Trainer``'s other arguments.

    Raises:
        TypeError, ValueError: what makes no sense, in the constructor as far as it shows there.
    """

    train_dataset: Any
    eval_dataset: Any
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
            placed = getattr(teacher_model, "hf_device_map", None) or getattr(teacher_model, "is_quantized", False)
            if not placed:
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
        trained = {id(p) for p in model.parameters() if p.requires_grad}
        if teacher is model or any(id(p) in trained for p in teacher.parameters()):
            raise ValueError("expected a teacher_model apart from the model, got one that would be trained with it")
        ours, theirs = _width(model), _width(teacher)
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
            rows = dataset.map(lambda rows: tokenizer(rows["text"], **options), batched=True, remove_columns=columns)
            return rows.filter(lambda row: len(row["input_ids"]) > 1)
        if self.offline and (lacking := [name for name in OFFLINE if name not in columns]):
            raise ValueError(f"expected a dataset with {list(OFFLINE)} for TopKLoss, got none of {lacking}")
        if self._own_collator:
            self._set_signature_columns_if_needed()
            if unknown := sorted((set(columns) & set(self._signature_columns)) - {*COLUMNS, *MASKS}):
                raise ValueError(
                    f"expected a data_collator for the columns {unknown}, which the default one leaves out"
                )
        return dataset

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        return super().get_eval_dataloader(self._prepare(eval_dataset))

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        return super().get_test_dataloader(self._prepare(test_dataset))

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        masks = MASKS if self._own_collator else ()
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, *COLUMNS, *masks]))

    # --- the loss ---

    def model_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in inputs.items() if name not in ("labels", *OFFLINE)}

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


class DistillCollator:
    """Rows of a dataset to a batch, padded on the right: ids with 0, labels with -100, what an offline teacher said
    with no entries.

    Labels are the ids where none are given, without padding and what comes right behind it, and where a mask of SFT
    (``completion_mask``, ``assistant_masks``) is not zero. A batch has two tokens or more: the second is predicted.
    """

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        given = [tuple(name for name in (*COLUMNS, *MASKS) if row.get(name) is not None) for row in rows]
        if unlike := [names for names in given if names != given[0]]:
            raise ValueError(f"expected rows with the same columns, got {list(given[0])} and {list(unlike[0])}")
        found = [self._row(row) for row in rows]
        if len({row[name].shape[1] for row in found for name in OFFLINE if name in row}) > 1:
            raise ValueError("expected as many entries of the teacher for each token of a batch, got rows that differ")
        length = max(2, *(len(row["input_ids"]) for row in found))
        filler = {"labels": -100, "teacher_logprobs": -math.inf}
        batch = {}
        for name in found[0]:
            value = filler.get(name, 0)
            sides = (0, 0) if name in OFFLINE else ()  # of the last dimension, K
            batch[name] = torch.stack(
                [F.pad(row[name], (*sides, 0, length - len(row[name])), value=value) for row in found]
            )
        return batch

    @staticmethod
    def _row(row: Mapping[str, Any]) -> dict[str, Tensor]:
        if row.get("input_ids") is None:
            raise ValueError(
                f"expected rows with input_ids (text is tokenised in a datasets.Dataset that names its columns), got "
                f"{sorted(row)}"
            )
        made = {name: torch.as_tensor(row[name]) for name in (*COLUMNS, *MASKS) if row.get(name) is not None}
        ids = made["input_ids"]
        if not ids.dim() or not len(ids) or ids.is_floating_point():
            raise ValueError(f"expected input_ids of one integer or more, got {tuple(ids.shape)} {ids.dtype}")
        ids = made["input_ids"] = ids.long()
        mask = made.setdefault("attention_mask", torch.ones_like(ids))
        for name, value in made.items():
            if not value.dim():
                raise ValueError(f"expected {name} of {len(ids)} tokens, as input_ids has, got {value}")
            if len(value) != len(ids):
                raise ValueError(f"expected {name} of {len(ids)} tokens, as input_ids has, got {len(value)}")
            if value.dim() != (2 if name in OFFLINE else 1):
                raise ValueError(
                    f"expected {name} of shape (tokens{', K' * (name in OFFLINE)}), got {tuple(value.shape)}"
                )
        learned = (mask > 0) & (F.pad(mask[:-1], (1, 0), value=1) > 0)
        for name in MASKS:
            learned = learned & (made.pop(name, mask) > 0)
        made.setdefault("labels", torch.where(learned, ids, -100))
        return made


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


def _width(model: Any) -> int | None:
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
