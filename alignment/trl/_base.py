"""What the trainers share. Of TRL only what is no trainer is imported here: each of those may come and go."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
import trl
from accelerate.utils import is_peft_model
from datasets.fingerprint import Hasher
from torch import Tensor, nn
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from chunked_embed import LossOutput, causal_lm, checks
from chunked_embed.fields import ChunkFields
from chunked_embed.trainers import (
    HeadTrainer,
    Sums,
    check_given_loss,
    check_model,
    check_untrained,
    our_head,
    warn_untested,
)

from ..pairs import PairLoss
from ..path import PreferenceLoss
from . import TESTED
from ._settings import Settings, conflicts, refuse, warn

warn_untested("alignment.trl", trl, TESTED)


UNREAD = 256
"""Steps whose metrics may wait on the device."""


class Chunked(HeadTrainer):
    """What the trainers share: a loss that runs inside the policy's forward, a check of the models, and metrics.

    Args:
        loss: an object of ``alignment`` to use instead of the one that ``args`` describe. The scale and soft-cap of the
            logits are the model's. What ``args`` say of the loss, other than defaults, must agree with it.
        loss_options: keywords of the loss that ``args`` describe, such as ``{"chunk_size": 4096}``.
        check: compare each model's logits with its head's, at the first batch.
    """

    _loss_base: ClassVar[type[PreferenceLoss]] = PairLoss
    _trl_losses: ClassVar[tuple[type[PreferenceLoss], ...]] = ()
    """Made of a config for TRL's trainer: what it says in vain, that trainer ignores as well."""
    _settings: ClassVar[Settings] = {}
    _trl_warns_of: ClassVar[tuple[str, ...]] = ()
    """Settings of which TRL's constructor says itself that they have no effect."""
    _read_elsewhere: ClassVar[tuple[str, ...]] = ()
    """Numbers of the loss that TRL's trainer also reads for another purpose."""
    _trl_module: ClassVar[Any] = None
    """Where TRL's constructor finds the fused head that ours replaces."""
    # What is TRL's, in the class behind this one.
    ref_model: Any
    processing_class: Any
    aux_loss_enabled: bool
    router_aux_loss_coef: float
    _metrics: Any
    _precompute_model_hash: Any
    _total_train_tokens: Any
    _tp_size: int

    chunked_loss: Any
    """The loss that this trainer computes."""

    def __init__(
        self,
        *args: Any,
        loss: PreferenceLoss | None = None,
        loss_options: Mapping[str, Any] | None = None,
        check: bool = True,
        **kw: Any,
    ) -> None:
        check_given_loss(loss, self._loss_base, loss_options)
        self.checks_logits = checks.flag("check", check)
        self._hashed = False
        self._unread: list[tuple[str, tuple[str, ...], Tensor, Tensor | None]] = []
        call = inspect.signature(super().__init__).bind_partial(*args, **kw)
        for who in ("model", "ref_model"):
            if who == "model" or call.arguments.get(who) is not None:
                check_model(call.arguments.get(who), who)
        config = call.arguments.get("args")
        config = self._default_config() if config is None else config
        if config is not None:
            self._take_loss(config, loss, loss_options or {})  # before any work
            call.arguments["args"] = self._adapted(config)
        with contextlib.nullcontext() if self._trl_module is None else our_head(self._trl_module):
            super().__init__(*call.args, **call.kwargs)  # precomputes reference log-probabilities if asked to
        if config is None:
            self._take_loss(self.args, loss, loss_options or {})
        self._check_apart()
        self.attach_model()
        self._show_numbers()
        self._made = True

    def _show_numbers(self) -> None:
        """A number that TRL's trainer has of its loss is that of a given one: ``trainer.beta *= 0.5`` halves it."""
        loss = self.chunked_loss
        for name, setting in self._settings.items():
            if setting.read is None and name in self.__dict__ and setting.name in loss.fields:
                setattr(self, name, getattr(loss, setting.name))

    def __setattr__(self, name: str, value: Any) -> None:
        """A number that TRL's trainer reads at each step is the loss's here: ``trainer.beta = 0.2`` sets both."""
        setting = self._settings.get(name) if "_made" in self.__dict__ else None
        if setting is not None:
            if setting.read is not None or not hasattr(self.chunked_loss, setting.name):
                who = type(self.chunked_loss).__name__
                raise AttributeError(f"expected {name} when the trainer is made, got {value!r} later, for {who}")
            self._tell_loss(setting.name, value)
        super().__setattr__(name, value)

    def _tell_loss(self, name: str, value: Any) -> None:
        """A number of the loss, if it reads it: TRL's trainer has all, whatever its loss type."""
        loss = self.chunked_loss
        if (reader := loss.unread.get(name)) is None:
            setattr(loss, name, value)
        elif name not in self._read_elsewhere and value != getattr(loss, name):
            who = type(loss).__name__
            warnings.warn(f"{name}={value!r} has no effect: {who} does not read it, {reader} would", stacklevel=4)

    def _default_config(self) -> Any:
        """Where no ``args`` are given; None: TRL makes one."""
        return None

    def _adapted(self, config: Any) -> Any:
        """What TRL's constructor gets for it, once the loss is known."""
        return config

    def _make_loss(self, args: Any, options: dict[str, Any]) -> PreferenceLoss:
        raise NotImplementedError

    def _take_loss(self, args: Any, given: PreferenceLoss | None, options: Mapping[str, Any]) -> None:
        """The loss, of which ``args`` say nothing else."""
        if lacking := [name for name in self._settings if not hasattr(args, name)]:
            raise TypeError(f"expected args with {lacking[0]}, of this trainer's config, got {type(args).__name__}")
        for name, setting in self._settings.items():
            if setting.name in options:
                raise ValueError(f"expected {name} in args, got {setting.name} in loss_options")
        self.chunked_loss = loss = self._make_loss(args, dict(options)) if given is None else given
        loss.check()
        for name in conflicts(args, loss, self._settings):
            if given is not None or not isinstance(loss, self._trl_losses):
                refuse(args, loss, name, self._settings[name])
            if name not in self._trl_warns_of:
                warn(args, loss, name, self._settings[name], stacklevel=3)
        self._check_loss(args)

    def _check_loss(self, args: Any) -> None:
        """Refuse a loss that this trainer cannot serve, or not with these arguments."""

    def _check_apart(self) -> None:
        """A reference that learns with the policy is none. What is precomputed was there before."""
        precomputed = getattr(self.args, "precompute_ref_log_probs", False)
        if getattr(self, "ref_model", None) is not None and not precomputed:
            check_untrained(self.model, self.ref_model, "ref_model")

    def _precompute_ref_logps(self, *args: Any) -> Any:
        """TRL keeps what it computed by the reference and the data; here it also depends on numbers of the loss."""
        if not self._hashed:
            self._hashed = True
            numbers = self.chunked_loss.temperature, getattr(self.chunked_loss, "tail_weight", None)
            self._precompute_model_hash = Hasher.hash((self._precompute_model_hash, numbers))
        return super()._precompute_ref_logps(*args)  # type: ignore[misc]

    def _token_logps(self, model: nn.Module, inputs: Mapping[str, Any], target: Tensor) -> Tensor:
        self.check_once(model, inputs)
        names = (*ChunkFields.fields, "temperature")
        return self.token_logps(model, inputs, target, **{name: getattr(self.chunked_loss, name) for name in names})

    @property
    def _reference_model(self) -> nn.Module:
        return self.model if self.ref_model is None else self.ref_model

    @contextlib.contextmanager
    def _as_reference(self, model: nn.Module) -> Iterator[None]:
        """A model is the reference: its adapters and its dropout off, no gradients, under autocast.

        A reference is one distribution. With dropout it would be another one at every step, and what is precomputed
        would depend on the seed.
        """
        adapters: Any = contextlib.nullcontext()
        if self.ref_model is None and is_peft_model(self.model):
            peft = self.accelerator.unwrap_model(self.model)
            adapters = use_adapter(peft, adapter_name="ref" if "ref" in peft.peft_config else None)
        checkpointing = disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)
        with torch.no_grad(), checkpointing, adapters, causal_lm.evaluating(model), self.accelerator.autocast():
            yield

    def _store(self, mode: str, sums: Sums, attention_mask: Tensor) -> None:
        """For what TRL's ``log`` averages. Nothing waits for the device here, between a forward and its backward."""
        tokens = self.accelerator.gather_for_metrics(attention_mask.sum()).sum() if mode == "train" else None
        self._unread.append((mode, tuple(sums), self.table_of(sums), tokens))
        if len(self._unread) >= UNREAD:
            self._read()

    def _read(self) -> None:
        """What was stored goes where TRL has it."""
        unread, self._unread = self._unread, []
        if not unread:
            return
        tables = iter(torch.cat([table for _, _, table, _ in unread]).tolist())
        counted = [tokens for *_, tokens in unread if tokens is not None]
        seen = iter(torch.stack(counted).tolist() if counted else ())
        for mode, names, _, tokens in unread:
            if tokens is not None:
                self._total_train_tokens += next(seen) // self._tp_size
            self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
            for name, mean in self._adjusted(self.means_in(names, [next(tables) for _ in names])).items():
                self._metrics[mode][name].append(mean)

    def _adjusted(self, means: dict[str, float]) -> dict[str, float]:
        """What follows from a step's means."""
        return means

    def log(self, *args: Any, **kwargs: Any) -> None:
        self._read()
        super().log(*args, **kwargs)  # type: ignore[misc]

    @property
    def aux_loss_weight(self) -> float:
        return self.router_aux_loss_coef if self.aux_loss_enabled else 0.0


def pair_sums(out: LossOutput) -> Sums:
    """What TRL logs of pairs, as sums and counts: over pairs, or over completion tokens."""
    sums = {name: pair for name, pair in out.sums.items() if not name.startswith("tokens/")}
    loss = out.metrics["nll_loss"]  # TRL means it over processes, not tokens: so does its loss
    return {**sums, "nll_loss": (loss, torch.ones_like(loss))}


class AsConfigured(Chunked):
    """Of trainers without a setting for a mixture of experts: its auxiliary loss is what the policy's config says."""

    @property
    def aux_loss_weight(self) -> float:
        config = self.model.config.get_text_config()
        return config.router_aux_loss_coef if getattr(config, "output_router_logits", False) else 0.0
