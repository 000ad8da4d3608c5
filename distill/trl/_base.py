"""What the trainers share. Of TRL only what is no trainer is imported here: each of those may come and go."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, ClassVar

import trl

from chunked_embed import causal_lm
from chunked_embed.trainers import check_given_loss, check_ids, check_model, check_untrained, warn_untested

from ..losses import DistillationLoss, JSDLoss
from ..topk import TopKLoss
from ..trainer import Distilling, head_width
from . import TESTED

warn_untested("distill.trl", trl, TESTED)


class Taught(Distilling):
    """A trainer of TRL's with a student that generates and a teacher of the same vocabulary."""

    config_class: ClassVar[Any]
    """TRL's, of which ``args`` are one."""
    numbers: ClassVar[Mapping[str, type[DistillationLoss]]] = {"beta": JSDLoss}
    """What ``args`` say of the loss, and TRL's trainer reads at each step: by its name, the losses that have it."""
    generation_config: Any

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
        check_model(model, "model")
        if teacher_model is not None:
            check_model(teacher_model, "teacher_model")
        if teacher_model is model and not isinstance(model, str):
            check_untrained(model, teacher_model, "teacher_model")
        args = self.default_args(model) if args is None else args
        if not isinstance(args, self.config_class):
            raise TypeError(f"expected args to be a {self.config_class.__name__}, got {type(args).__name__}")
        named = args.teacher_model_name_or_path
        teacher_model = named if teacher_model is None else teacher_model
        if teacher_model is None:
            raise ValueError("expected a teacher_model, got None")
        _check_one_name(named, teacher_model)
        self.take_loss(self._made_loss(args, loss, dict(loss_options or {})), report, check)
        self.check_loss()
        with _taught(args, teacher_model, self.load_teacher) as teacher, self.building():
            theirs = _vocabulary(teacher)
            super().__init__(model, teacher, args, *more, **trainer_options)  # type: ignore[call-arg]
        # With its adapters, which may have gone into the teacher, too.
        check_untrained(self.model, teacher, "teacher_model")
        self.attach_model()
        # TRL has wrapped its forward for autocast. What goes past that is called under autocast here.
        causal_lm.attach(self.accelerator.unwrap_model(self.teacher_model))
        self.share_ids(_vocabulary(causal_lm.unwrapped(self.model)), theirs)
        self.check_read(by_name=teacher is not teacher_model)
        for name, kind in self.numbers.items():
            if isinstance(self.loss, kind):
                setattr(self, name, getattr(self.loss, name))
        self._made = True

    # --- what a trainer says ---

    def default_args(self, model: Any) -> Any:
        """Where none are given."""
        return None

    def load_teacher(self, name: str, args: Any) -> Any:
        raise NotImplementedError

    def building(self) -> contextlib.AbstractContextManager[Any]:
        """While TRL's trainer is built."""
        raise NotImplementedError

    def check_loss(self) -> None:
        """Refuse a loss that this trainer cannot serve."""

    def check_read(self, by_name: bool) -> None:
        """Warn of what has no effect. ``by_name``: the teacher was loaded."""

    # --- the loss ---

    def _made_loss(self, args: Any, loss: DistillationLoss | None, options: dict[str, Any]) -> DistillationLoss:
        """The loss, of which ``args`` say nothing else."""
        said = {name: getattr(args, name) for name in self.numbers}
        made = JSDLoss(**{**said, "vocabulary": "refuse", **options}) if loss is None else loss
        defaults = {field.name: field.default for field in fields(self.config_class)}
        for name, kind in self.numbers.items():
            own = getattr(made, name) if isinstance(made, kind) else None
            if said[name] not in (defaults[name], own):
                got = type(made).__name__ + ("" if own is None else f"({name}={own})")
                raise ValueError(f"expected a loss with args.{name}={said[name]}, got {got}: say it in one place")
        return made

    def __setattr__(self, name: str, value: Any) -> None:
        """A number that TRL's trainer reads at each step is the loss's here: ``trainer.beta = 0.2`` sets both.

        Nor does it begin as another: a callback may multiply what it finds.
        """
        if name in self.numbers and "_made" in self.__dict__:
            if not isinstance(self.loss, self.numbers[name]):
                raise AttributeError(f"expected no {name} for {type(self.loss).__name__}, got {value!r}")
            setattr(self.loss, name, value)
        super().__setattr__(name, value)

    # --- ids ---

    def share_ids(self, ours: int, theirs: int) -> None:
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
        suppressed = {*(self.generation_config.suppress_tokens or ()), *range(min(ours, theirs), max(ours, theirs))}
        self.generation_config.suppress_tokens = sorted(suppressed)

    def check_prompts(self, ids: Any) -> None:
        """At the first batch: what is generated from them is checked with the models."""
        if not self.__dict__.get("_prompts_checked"):
            self._prompts_checked = True
            for one, who in ((self.model, "the model"), (self.teacher_model, "the teacher_model")):
                check_ids(one, who, ids)


def _check_one_name(named: str | None, teacher: Any) -> None:
    given = teacher if isinstance(teacher, str) else getattr(teacher, "name_or_path", None)
    if named not in (None, given):
        got = repr(teacher) if isinstance(teacher, str) else type(teacher).__name__
        warnings.warn(
            f"the teacher is the argument teacher_model, {got}: nothing reads "
            f"args.teacher_model_name_or_path={named!r}",
            stacklevel=3,
        )


class _Size(int):
    """A vocabulary's, which equals any in TRL's check of sizes: what may differ is for the loss to say."""

    def __ne__(self, other: object) -> bool:
        return False


@contextlib.contextmanager
def _taught(args: Any, teacher: Any, load: Callable[[str, Any], Any]) -> Iterator[Any]:
    """The teacher, loaded if need be, as TRL's constructor takes it. ``args`` and configs are afterwards as before."""
    kept = args.teacher_model_init_kwargs
    if isinstance(teacher, str):
        teacher = load(teacher, args)
        args.teacher_model_init_kwargs = None  # it takes them beside a name only
    config = teacher.config.get_text_config()
    size = config.vocab_size
    try:
        config.vocab_size = _Size(size)
        yield teacher
    finally:
        config.vocab_size = size
        args.teacher_model_init_kwargs = kept


def _vocabulary(model: Any) -> int:
    """The rows of a head; of one in shards, what the config says."""
    return head_width(model) or model.config.get_text_config().vocab_size
