"""``HeadTrainer``: the base of trainers whose loss runs in the model's own forward, on a ``Head``.

``alignment.trl``, ``distill.trainer`` and ``distill.trl`` put it in front of a trainer of transformers or TRL. What all
of them need is here: the model takes ``head_fn`` and is checked at its first batch, the loss runs inside of the wrapped
forward, tensors move to the head's device and results back, the auxiliary loss of a mixture of experts is added, sums
become means over processes, and settings that such a loss cannot serve are refused. A new trainer says what goes into
the loss, and what is logged::

    import transformers
    from chunked_embed.trainers import HeadTrainer
    from distill import DistillLoss

    class ChunkedSFTTrainer(HeadTrainer, transformers.Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.loss = DistillLoss([("ce", 1.0)])  # without a teacher: the cross-entropy alone
            self.attach_model()

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            arguments = {name: value for name, value in inputs.items() if name != "labels"}
            self.check_once(model, arguments)
            items = self.items_per_process(num_items_in_batch)
            out = self.run_loss(model, arguments, inputs["labels"][:, 1:], self.loss, num_items=items)
            return self.with_outputs(model, arguments, out.loss, return_outputs)

``loss`` is anything that is called as ``loss(head, target=..., **named)`` and returns a ``LossOutput``: those of
``alignment`` (of pairs, chosen ones first, or with further arguments), those of ``distill``, or one's own. The model is
called with all that the collator returns but the labels: without its position ids, documents in one row would see each
other. A trainer of TRL that puts a fused head on the model is constructed under ``our_head``::

    class ChunkedSFTTrainer(HeadTrainer, trl.SFTTrainer):
        def __init__(self, *args, **kwargs):
            with our_head(trl.trainer.sft_trainer):  # the module of the class
                super().__init__(*args, **kwargs)
            ...

Imports none of those libraries.
"""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from . import causal_lm
from .checks import kind_of
from .engine import LossOutput
from .head import Head

__all__ = [
    "HeadTrainer",
    "Sums",
    "check_given_loss",
    "check_ids",
    "check_model",
    "check_untrained",
    "from_homes",
    "our_head",
    "replaced",
    "warn_untested",
]

Sums: TypeAlias = dict[str, tuple[Tensor, Tensor]]
"""By a metric's name: its sum over the units that count, and their number. ``LossOutput.sums`` are such."""
LIGERS_FUSED_LOSS = "fused_linear_cross_entropy"
LIGERS_LOSSES = ("cross_entropy", LIGERS_FUSED_LOSS)


class HeadTrainer:
    """Stands in front of a ``Trainer`` of transformers, or of a library that builds on it.

    A trainer of one's own says four things:

    - at the end of its constructor, after that of the library: ``attach_model()``. A second model (a teacher, a
      reference) takes ``causal_lm.attach`` of its own.
    - at the start of ``compute_loss``, for each model that it calls: ``check_once(model, inputs)``.
    - what goes into the loss: ``run_loss``, with ``token_logps`` or ``frozen_head`` of a model that does not learn, and
      ``items_per_process`` where it is divided by the tokens of a step.
    - what is logged: ``means_of(out.sums)``.

    And, if it has them: ``checks_logits`` from an argument, and ``aux_loss_weight`` from its settings.

    Served: DistributedDataParallel, FSDP 1 and 2, a model split over devices by a ``device_map``, autocast, gradient
    accumulation, PEFT's LoRA, DoRA, ``modules_to_save`` and ``trainable_token_indices`` on the head. Refused, with a
    sentence: what ``attach_model`` and ``check_once`` list. A model under ``torch.compile`` is served too: the loss in
    its forward stays out of that graph and is compiled by itself.

    Example:
        >>> from datasets import Dataset
        >>> from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
        >>> from chunked_embed.trainers import HeadTrainer
        >>> from distill import DistillLoss
        >>> class SFTTrainer(HeadTrainer, Trainer):
        ...     def __init__(self, *args, **kwargs):
        ...         super().__init__(*args, **kwargs)
        ...         self.loss = DistillLoss([("ce", 1.0)])  # without a teacher: the cross-entropy alone
        ...         self.attach_model()
        ...     def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ...         arguments = {name: value for name, value in inputs.items() if name != "labels"}
        ...         self.check_once(model, arguments)
        ...         items = self.items_per_process(num_items_in_batch)
        ...         out = self.run_loss(model, arguments, inputs["labels"][:, 1:], self.loss, num_items=items)
        ...         return self.with_outputs(model, arguments, out.loss, return_outputs)
        >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
        >>> ids = list(range(2, 12))
        >>> args = TrainingArguments("runs", max_steps=1, report_to="none", save_strategy="no", disable_tqdm=True)
        >>> rows = [{"input_ids": ids, "labels": ids}] * 4
        >>> SFTTrainer(model, args, train_dataset=Dataset.from_list(rows)).train().global_step
        {...}
        1
    """

    model: Any  # these are Trainer's
    args: Any
    accelerator: Any

    uncalled: ClassVar[tuple[str, ...]] = ()
    """Methods of the library's trainer that nothing calls here: a subclass that has one of its own is refused."""

    _told_of_copies = False

    checks_logits: bool = True
    """Whether the first batch compares each model's logits with its head's: the argument ``check`` of our trainers."""

    @property
    def aux_loss_weight(self) -> float:
        """Of the load-balancing loss of a mixture of experts; zero: it is not asked for."""
        return 0.0

    # --- at construction ---

    def attach_model(self) -> None:
        """Let ``self.model`` take ``head_fn``; refuse what a loss in its forward cannot serve.

        With ``use_liger_kernel=True`` Liger's kernels for layers are applied and its fused loss is not: with a warning,
        unless ``liger_kernel_config`` leaves that out already, as TRL's DPO, KTO and GKD see to.

        Raises:
            TypeError: a subclass with a method of its own that nothing calls (``uncalled``); a model that
                ``causal_lm.attach`` refuses: an encoder-decoder, a head that is no linear layer or has a forward of its
                own, an adapter on it of a kind that is not known.
            ValueError: an offloaded head; a known adapter in a setting that is not; several GPUs in one process
                (DataParallel); context or sequence parallelism; a loss of Liger's beside ours.
        """
        self._refuse_uncalled()
        causal_lm.attach(self.model)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"expected a process for each GPU (torchrun, accelerate), got {self.args.n_gpu} GPUs in one"
            )
        parallel = getattr(self.accelerator, "parallelism_config", None)
        if parallel is not None and (parallel.cp_enabled or parallel.sp_enabled):
            raise ValueError("expected whole sequences on each process, got context or sequence parallelism")
        if getattr(self.args, "use_liger_kernel", False):
            self._keep_forward_from_liger()

    def _refuse_uncalled(self) -> None:
        """A method of a subclass in whose place the loss runs in the model's forward would be ignored."""
        mine = type(self).__mro__[: type(self).__mro__.index(HeadTrainer)]
        if own := [name for name in self.uncalled for cls in mine if name in vars(cls)]:
            raise TypeError(
                f"expected no {own[0]} of {type(self).__name__}: the loss runs in the model's forward, and nothing "
                "calls it. Give loss="
            )

    def _keep_forward_from_liger(self) -> None:
        """Its layers' kernels stay; its losses would replace the model's forward, or torch's cross-entropy."""
        config = dict(self.args.liger_kernel_config or {})
        if asked := [name for name in LIGERS_LOSSES if config.get(name)]:
            raise ValueError(
                f"expected none of Liger's losses beside ours, got liger_kernel_config={{'{asked[0]}': True}}"
            )
        if LIGERS_FUSED_LOSS not in config:
            warnings.warn(
                "use_liger_kernel=True: Liger's kernels for layers are applied, its fused loss is not: the chunked one "
                "is in its place",
                stacklevel=4,
            )
        self.args.liger_kernel_config = config | dict.fromkeys(LIGERS_LOSSES, False)

    # --- at the first batch ---

    def check_once(self, model: nn.Module, inputs: Mapping[str, Any], who: str = "the model") -> bool:
        """At a model's first batch: whether it has these ids, and whether its logits follow from its head.

        The second only with ``checks_logits``. At each batch the model is attached again: ``train()`` and others
        replace forwards (kernels, patches).

        Args:
            inputs: of the model's forward; ``input_ids`` among them.
            who: the model's name in a refusal.

        Returns:
            Whether this is the first batch.

        Raises:
            ValueError: ids beyond the embeddings; logits to which the model does something that is not known; a head
                sharded for tensor parallelism.
        """
        causal_lm.attach(model)
        checked = self.__dict__.setdefault("_checked", set())
        if id(model) in checked:
            return False
        checked.add(id(model))
        check_ids(model, who, inputs["input_ids"])
        if self.checks_logits:
            causal_lm.check(model, inputs)
        elif hasattr(model, "unshard"):  # FSDP2 looks once at what learns, and a reference has its adapters off
            with torch.no_grad():
                model(**inputs, head_fn=lambda head: None)
        return True

    # --- in the model's forward ---

    def run_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        target: Tensor,  # (B, T - 1)
        loss: Callable[..., LossOutput],
        *given: Any,
        **named: Any,
    ) -> LossOutput:
        """``loss(head, *given, target=target, **named)`` inside of the model's forward, one state for each target.

        Args:
            inputs: of the model's forward; ``input_ids`` (B, T).
            target: the token that each state but the last predicts.
            given, named: what else the loss takes. Tensors and heads among them go to the head's device, as the target
                does: it is not the inputs' where a model is split over devices.

        Returns:
            What it found, on the device of ``target``. With ``aux_loss_weight`` the loss has the auxiliary loss of a
            mixture of experts added, and ``metrics`` have it as ``aux_loss``.

        Raises:
            ValueError: ``aux_loss_weight`` of a model that is no mixture of experts.
        """
        if weight := self.aux_loss_weight:
            inputs = {**inputs, "output_router_logits": True}

        def run(head: Head) -> LossOutput:
            device = head.hidden.device
            self._warn_of_copies((*given, *named.values()), device)
            there = [_moved(x, device) for x in given]
            named_there = {name: _moved(x, device) for name, x in named.items()}
            return loss(head.shifted(target.shape[1] + 1), *there, target=target.to(device), **named_there)

        found = model(**inputs, head_fn=run)
        out = LossOutput(*(_moved(part, target.device) for part in found.value))
        if not weight:
            return out
        if found.aux_loss is None:
            raise ValueError(f"expected a mixture of experts for aux_loss_weight={weight}, got {type(model).__name__}")
        aux_loss = found.aux_loss.to(target.device)
        return out._replace(loss=out.loss + weight * aux_loss, metrics={**out.metrics, "aux_loss": aux_loss.detach()})

    def items_per_process(self, num_items_in_batch: Tensor | int | None) -> Tensor | None:
        """What to divide a process's sum over tokens by, so that a step's loss is the mean over all of its tokens.

        Args:
            num_items_in_batch: as ``compute_loss`` gets it: the labels of a step, by default those of all processes
                (``average_tokens_across_devices``). The gradients are means over the processes, hence a share of them.

        Returns:
            One or more, a step may consist of ignored tokens; None where nothing was counted, as in an evaluation.
        """
        if num_items_in_batch is None:
            return None
        items = torch.as_tensor(num_items_in_batch).clamp_min(1)
        return items / self.accelerator.num_processes if self.args.average_tokens_across_devices else items

    def token_logps(self, model: nn.Module, inputs: Mapping[str, Any], target: Tensor, **options: Any) -> Tensor:
        """``linear_logps`` of the targets inside of the model's forward: (B, T - 1), zero where the target is -100.

        On the device of ``target``. Differentiable, if gradients are on: a model that does not learn is called under
        ``torch.no_grad``.

        Args:
            inputs, target: as of ``run_loss``.
            options: of ``linear_logps``: ``temperature``, ``chunk_size``, ``compiled``.
        """

        def run(head: Head) -> Tensor:
            return head.shifted(target.shape[1] + 1).logps(target.to(head.hidden.device), **options)

        return model(**inputs, head_fn=run).value.to(target.device)

    def frozen_head(self, model: nn.Module, inputs: Mapping[str, Any], target: Tensor) -> Head:
        """The head of a teacher or a reference, one state for each of the (B, T - 1) targets; nothing of it learns.

        The mode (``eval()``) is the caller's.
        """
        with self.accelerator.autocast():
            return causal_lm.capture(model, inputs).shifted(target.shape[1] + 1)

    def _warn_of_copies(self, values: Iterable[Any], device: torch.device) -> None:
        heads = [value for value in values if isinstance(value, Head) and value.weight.device != device]
        if heads and not self._told_of_copies:
            self._told_of_copies = True
            warnings.warn(
                f"the head of a frozen model is on {heads[0].weight.device} and goes to {device} at every step, "
                f"{tuple(heads[0].weight.shape)} of {heads[0].weight.dtype}: put both models' heads on one device",
                stacklevel=2,
            )

    # --- what is logged ---

    def means_of(self, sums: Mapping[str, tuple[Tensor, Tensor]], gather: bool = True) -> dict[str, float]:
        """Means over all processes, in one gather and one transfer; what counts nowhere is left out.

        Args:
            sums: such as ``LossOutput.sums``, and of a trainer's own.
            gather: False for those of this process alone.
        """
        return self.means_in(sums, self.table_of(sums, gather).tolist()) if sums else {}

    def table_of(self, sums: Mapping[str, tuple[Tensor, Tensor]], gather: bool = True) -> Tensor:  # -> (metrics, 2)
        """The sums and counts, added up over all processes in one gather. Waits for no device: a trainer may read it
        later, with ``means_in``."""
        table = torch.stack([x.float() for pair in sums.values() for x in pair]).view(-1, 2)
        return self.accelerator.gather(table[None]).sum(0) if gather else table

    @staticmethod
    def means_in(names: Iterable[str], table: list[list[float]]) -> dict[str, float]:
        return {name: total / count for name, (total, count) in zip(names, table, strict=True) if count}

    @staticmethod
    def with_outputs(model: nn.Module, inputs: Mapping[str, Any], loss: Tensor, wanted: bool) -> Any:
        """The loss, and the model's own outputs where they are asked for: by another forward, with whole logits."""
        if not wanted:
            return loss
        with torch.no_grad():
            return loss, model(**inputs)


def _moved(value: Any, device: torch.device) -> Any:
    """Tensors and heads, and dicts of them, on a device; what is no tensor as it is."""
    if isinstance(value, (Tensor, Head)):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: _moved(one, device) for name, one in value.items()}
    return value


def _attach(model: Any, cast_lm_head_to_fp32: bool = False, **_: Any) -> None:
    """As TRL puts its head on a model; where it has cast the layer to float32, with a forward that casts its states,
    that is what a ``Head`` does."""
    if cast_lm_head_to_fp32:
        layer = model.get_output_embeddings()
        if not isinstance(layer, nn.Linear) or hasattr(layer, "base_layer"):
            raise ValueError("expected cast_lm_head_to_fp32=False with an adapter on the LM head, got True")
        layer.forward.__dict__["__wrapped__"] = nn.Linear.forward
    causal_lm.attach(model)


@contextlib.contextmanager
def our_head(module: ModuleType) -> Iterator[None]:
    """While a trainer of TRL's ``module`` is built: our head in place of its own, and adapters on it not refused.

    Raises:
        ImportError: a module of TRL's without a fused head, which then has nothing to replace.

    Example:
        >>> from chunked_embed.trainers import our_head
        >>> from trl.trainer import dpo_trainer
        >>> theirs = dpo_trainer.add_fused_lm_head
        >>> with our_head(dpo_trainer):  # where the trainer is constructed
        ...     print(dpo_trainer.add_fused_lm_head is theirs)
        False
        >>> dpo_trainer.add_fused_lm_head is theirs
        True
    """
    if not hasattr(module, "add_fused_lm_head"):
        raise ImportError(f"expected a TRL whose {module.__name__} has a fused head, which ours replaces")
    with replaced(module, add_fused_lm_head=_attach, BaseTunerLayer=()):
        yield


@contextlib.contextmanager
def replaced(module: ModuleType, **ours: Any) -> Iterator[None]:
    """Names of a module, those that it has, have other values meanwhile.

    Example:
        >>> import math
        >>> from chunked_embed.trainers import replaced
        >>> with replaced(math, tau=6.0, unknown=1.0):
        ...     print(math.tau, hasattr(math, "unknown"))
        6.0 False
        >>> round(math.tau, 2)
        6.28
    """
    kept = {name: getattr(module, name) for name in ours if hasattr(module, name)}
    try:
        for name in kept:
            setattr(module, name, ours[name])
        yield
    finally:
        for name, value in kept.items():
            setattr(module, name, value)


def check_given_loss(loss: Any, kind: type, options: Mapping[str, Any] | None) -> None:
    """A trainer takes a loss, or options of the one that it makes."""
    if loss is not None and not isinstance(loss, kind):
        raise TypeError(f"expected loss to be a {kind.__name__}, got {type(loss).__name__}")
    if not isinstance(options or {}, Mapping) or not all(isinstance(name, str) for name in options or ()):
        raise TypeError(f"expected loss_options to be a dict of keywords, got {options!r}")
    if loss is not None and options:
        raise ValueError("expected loss or loss_options, got both: options go to the loss that you make")
    ignored = getattr(loss, "ignore_index", (options or {}).get("ignore_index", -100))
    if ignored != -100:
        raise ValueError(f"expected a loss with ignore_index=-100, as trainers count labels, got {ignored!r}")


def warn_untested(who: str, library: Any, tested: str) -> None:
    """At the import of an adapter, whose library may move on."""
    if not library.__version__.startswith(tested):
        name = library.__name__
        warnings.warn(f"{who} is written for {name} {tested}x and not tried with {library.__version__}", stacklevel=3)


def check_model(model: Any, who: str) -> None:
    """A name, or a model with an LM head: a backbone alone, or what stands beside among the arguments, is neither."""
    head = getattr(model, "get_output_embeddings", None)
    if not isinstance(model, str) and (head is None or head() is None):
        got = f"{type(model).__name__}, which has no LM head" if isinstance(model, nn.Module) else kind_of(model)
        raise TypeError(f"expected {who} to be a causal language model or its name, got {got}")


def check_untrained(model: nn.Module, other: nn.Module, who: str) -> None:
    """A teacher or a reference that learns with the model, if only by the model's adapters, agrees with all it says."""
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    if other is model or any(id(p) in trained for p in other.parameters()):
        raise ValueError(f"expected a {who} apart from the model, got one that would be trained with it")


def check_ids(model: Any, who: str, ids: Tensor) -> None:
    """An id beyond the embeddings would be an IndexError, or on a GPU a dead process."""
    rows = getattr(causal_lm.unwrapped(model).get_input_embeddings(), "num_embeddings", None)
    if rows is not None and int(ids.max()) >= rows:
        raise ValueError(f"expected input_ids below {rows}, the embeddings of {who}, got {int(ids.max())}")


def from_homes(package: str, homes: Mapping[str, str], tested: str) -> Callable[[str], Any]:
    """``__getattr__`` of a package with trainers of TRL's.

    Args:
        package: its ``__name__``.
        homes: by each name, the module in the package that has it.
        tested: how the versions of TRL begin that the package is written for.
    """

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            module = importlib.import_module(f"{package}.{homes[name]}")
        except (ImportError, RuntimeError) as missing:  # the second is of a library that imports lazily
            raise ImportError(
                f"expected trl {tested}x and what it needs for {name} (pip install 'chunked-embed[trl]'), "
                f"got {_installed()}: {missing}"
            ) from missing
        return getattr(module, name)

    return find


def _installed() -> str:
    try:
        return f"trl {version('trl')}"
    except PackageNotFoundError:
        return "no trl"
