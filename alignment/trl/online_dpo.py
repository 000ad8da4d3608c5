"""Online DPO: pairs that the policy samples and reward functions put in order, with a reference."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from trl.data_utils import is_conversational
from trl.experimental.online_dpo import OnlineDPOTrainer

from chunked_embed import LossOutput
from chunked_embed.trainers import Sums

from .. import functional as AF
from ..losses import HELD, DPOLoss
from ..pairs import PairLoss, PairScores
from ._base import AsConfigured, pair_sums
from ._referenced import Referenced
from ._settings import NOTHING, Setting, Settings, refuse

__all__ = ["ChunkedOnlineDPOTrainer"]


class SummedIPOLoss(PairLoss):
    """``(lc - lr - 1 / (2 b))^2``: IPO on sums over tokens, where ``DPOLoss("ipo")`` takes means.

    https://arxiv.org/abs/2310.12036
    """

    beta: float = HELD

    def pair_loss(self, x: PairScores) -> Tensor:
        return AF.cpo(x.chosen_ratio, x.rejected_ratio, loss_type="ipo", beta=self.beta, label_smoothing=0.0)


LOSSES = {"sigmoid": DPOLoss, "ipo": SummedIPOLoss}


def online_type(loss: Any) -> Any:
    """The ``OnlineDPOConfig.loss_type`` of a loss."""
    if isinstance(loss, SummedIPOLoss):
        return "ipo"
    return "sigmoid" if isinstance(loss, DPOLoss) and loss.loss_types == ("sigmoid",) else NOTHING


class Sampled(NamedTuple):
    """Two completions of each of B prompts: the first ones, then the second ones."""

    prompt_ids: Tensor  # (2B, P), padded on the left
    prompt_mask: Tensor
    ids: Tensor  # (2B, T), padded on the right
    mask: Tensor
    given: Mapping[str, Any]
    """What else the model takes with the prompts: pictures."""

    def chosen_first(self, first_is_chosen: Tensor) -> Sampled:  # (B,)
        """The same, with the chosen completion of each prompt in front. Prompts stay where they are."""
        pairs = len(first_is_chosen)
        places = torch.arange(pairs, device=self.ids.device)
        chosen = torch.where(first_is_chosen, places, places + pairs)
        order = torch.cat([chosen, (chosen + pairs) % (2 * pairs)])
        return self._replace(ids=self.ids[order], mask=self.mask[order])

    def batch(self, max_length: int) -> dict[str, Any]:
        """For the model, with a mask of completions; prompts lose what is beyond ``max_length``, from the left."""
        beyond = 0 if self.given else max(self.prompt_ids.shape[1] + self.ids.shape[1] - max_length, 0)
        prompt_ids, prompt_mask = self.prompt_ids[:, beyond:], self.prompt_mask[:, beyond:]
        return {
            "input_ids": torch.cat([prompt_ids, self.ids], 1),
            "attention_mask": torch.cat([prompt_mask, self.mask], 1),
            "completion_mask": torch.cat([torch.zeros_like(prompt_mask), self.mask], 1),
            **self.given,
        }


class ChunkedOnlineDPOTrainer(AsConfigured, Referenced, OnlineDPOTrainer):
    """``trl.experimental.online_dpo.OnlineDPOTrainer`` on the chunked engine: its arguments, and those of
    ``alignment.trl``.

    Generation, by the model or by vLLM, and rewards are TRL's. They come before the policy's forward here, in which the
    loss then runs with the chosen completions first: three products for the policy and one for the reference.
    ``OnlineDPOConfig(loss_type=...)`` names "sigmoid" or "ipo" (on sums over tokens, as in TRL); ``loss`` takes any
    ``alignment.PairLoss``. ``evaluate()`` samples, too, and logs what training does. https://arxiv.org/abs/2402.04792

    Example:
        >>> from datasets import Dataset
        >>> from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
        >>> from trl.experimental.online_dpo import OnlineDPOConfig
        >>> from alignment.trl import ChunkedOnlineDPOTrainer
        >>> tokenizer = AutoTokenizer.from_pretrained("sentence-transformers/all-MiniLM-L6-v2", eos_token="[SEP]")
        >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=102, **sizes))
        >>> def brevity(completions, **_):
        ...     return [-float(len(text)) for text in completions]
        >>> data = Dataset.from_list([{"prompt": "The plane"}] * 4)
        >>> options = {"bf16": False, "max_steps": 1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
        >>> args = OnlineDPOConfig("runs", per_device_train_batch_size=2, max_new_tokens=4, **options)
        >>> trainer = ChunkedOnlineDPOTrainer(
        ...     model, reward_funcs=brevity, args=args, train_dataset=data, processing_class=tokenizer
        ... )
        >>> trainer.train().global_step
        {...}
        1
    """

    uncalled = ("_forward",)
    _trl_losses = (DPOLoss, SummedIPOLoss)
    _settings: ClassVar[Settings] = {
        "loss_type": Setting("loss_type", read=online_type),
        "beta": Setting("beta"),
    }
    # What is TRL's.
    _beta: Any
    stats: Any

    def __init__(self, *args: Any, **kw: Any) -> None:
        super().__init__(*args, **kw)
        if self.compute_metrics is not None:
            raise ValueError("expected no compute_metrics: an evaluation samples, and has no predictions with labels")
        self.model_accepts_loss_kwargs = False  # a step's batches weigh alike
        self.stats = {}  # of the names that the loss has
        self._evaluated: dict[str, list[float]] = defaultdict(list)

    def _default_config(self) -> Any:
        raise TypeError(f"expected args for {type(self).__name__}, got None: TRL has none by default")

    def _make_loss(self, args: Any, options: dict[str, Any]) -> PairLoss:
        if args.loss_type not in LOSSES:
            raise ValueError(
                f"expected loss_type to be one of {list(LOSSES)}, got {args.loss_type!r} (others are given as loss=)"
            )
        return LOSSES[args.loss_type](args.beta, **options)

    def _take_loss(self, args: Any, given: Any, options: Mapping[str, Any]) -> None:
        """Of several betas, one an epoch, the first one's: a default among them is no less said."""
        betas = getattr(args, "beta", None)
        if not isinstance(betas, (list, tuple)):
            super()._take_loss(args, given, options)
            return
        if not betas:
            raise ValueError(f"expected beta to be a number, or one for each epoch, got {betas!r}")
        args = copy.copy(args)
        args.beta = betas[0]
        super()._take_loss(args, given, options)
        loss = self.chunked_loss
        if getattr(loss, "beta", None) != args.beta:
            refuse(args, loss, "beta", self._settings["beta"])
        for beta in betas:
            loss.fields["beta"].check("beta", beta)

    @property
    def beta(self) -> Any:
        """The loss's. Where ``args`` have several, that of the epoch; the last one from then on."""
        if not isinstance(self._beta, (list, tuple)):
            return getattr(self.chunked_loss, "beta", self._beta)
        return self._beta[min(int(self.state.epoch or 0), len(self._beta) - 1)]

    @beta.setter
    def beta(self, value: float) -> None:
        self._beta = value

    # --- completions and rewards ---

    def _sampled(self, model: nn.Module, prompts: list[Any], pictures: Any) -> Sampled:
        if self.args.use_vllm:
            found = (*self._generate_vllm(prompts, pictures), None)
        else:
            found = self._generate(model, prompts, pictures)
        prompt_ids, prompt_mask, ids, mask, given = found
        return Sampled(prompt_ids, prompt_mask, ids, mask, given or {})

    def _rewards(self, inputs: Mapping[str, Any], prompts: list[Any], ids: Tensor, ended: Tensor) -> Tensor:  # (2B,)
        """Weighted sums over the reward functions, which get the dataset's other columns by name."""
        completions: list[Any] = self.processing_class.batch_decode(ids, skip_special_tokens=True)
        if is_conversational({"prompt": prompts[0]}):
            completions = [[{"role": "assistant", "content": text}] for text in completions]
        columns = {name: value for name, value in inputs.items() if name != "prompt"}
        columns = {
            name: [*value, *value] if isinstance(value, (list, tuple)) else value for name, value in columns.items()
        }
        rewards = self._calculate_rewards_from_functions(
            prompts=[*prompts, *prompts], completions=completions, completion_ids_list=ids.tolist(), **columns
        )
        penalty = self.args.missing_eos_penalty
        return rewards if penalty is None else torch.where(ended, rewards, rewards - penalty)

    # --- a step ---

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """That of ``transformers``: TRL's would sample, and score with whole logits."""
        return super(OnlineDPOTrainer, self).training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        prompts, pictures = inputs["prompt"], inputs.get("image")
        if pictures is not None:
            prompts = [with_places(prompt) for prompt in prompts]
        sampled = self._sampled(model, prompts, pictures)
        ended = torch.isin(sampled.ids, torch.tensor(self.eos_token_ids, device=sampled.ids.device)).any(1)
        rewards = self._rewards(inputs, prompts, sampled.ids, ended)
        first, second = rewards.chunk(2)
        batch = sampled.chosen_first(first >= second).batch(self.max_length)
        arguments, target = self._split(batch)
        beta = self.beta  # that of the epoch, or what a subclass says
        if getattr(self.chunked_loss, "beta", beta) != beta:
            self.chunked_loss.beta = beta
        self.check_once(model, arguments)  # before its adapters are off: FSDP2 looks once at what learns
        reference = self._reference(batch)
        out = self.run_loss(model, arguments, target, self.chunked_loss, **reference)
        self._keep(self._sums(out, rewards, ended, reference.get("ref_logps")))
        return self.with_outputs(model, arguments, out.loss, return_outputs)

    def _sums(self, out: LossOutput, rewards: Tensor, ended: Tensor, ref_logps: Tensor | None) -> Sums:
        """What TRL logs, as sums and counts: over pairs, over their completions, or over tokens."""
        loss, found = self.chunked_loss, out.metrics
        logps = torch.cat([found[f"logps/{side}"] for side in ("chosen", "rejected")])
        if loss.per_token:
            logps = logps * torch.cat([found[f"tokens/{side}"] for side in ("chosen", "rejected")])
        each = {"objective/scores": rewards, "objective/entropy": -logps, "val/contain_eos_token": ended}
        each["objective/scores_margin"] = (rewards[: len(rewards) // 2] - rewards[len(rewards) // 2 :]).abs()
        if ref_logps is not None:
            each["objective/kl"] = kl = logps - ref_logps
            each["objective/non_score_reward"] = -loss.reward_scale * kl
            each["objective/rlhf_reward"] = rewards - loss.reward_scale * kl
        sums = pair_sums(out)
        if not loss.takes_nll_target:
            del sums["nll_loss"]
        return sums | {name: (x.sum(), torch.full_like(x, 1.0, dtype=torch.float32).sum()) for name, x in each.items()}

    # --- logs ---

    def _keep(self, sums: Sums) -> None:
        means = self.means_of(sums) | {"beta": self.chunked_loss.reward_scale}
        for name, mean in means.items():
            (self.stats.setdefault(name, []) if self.model.training else self._evaluated[name]).append(mean)

    def _maybe_log_save_evaluate(self, *args: Any, **kw: Any) -> None:
        self.stats = {name: means for name, means in self.stats.items() if means}  # TRL divides by their number
        super()._maybe_log_save_evaluate(*args, **kw)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """The loss of a batch: what it was sampled from has no labels."""
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, self._prepare_inputs(inputs)), None, None

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: Any = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Also the means over batches of what training logs."""
        self._evaluated.clear()
        found = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        means = {name: sum(values) / len(values) for name, values in self._evaluated.items()}
        found.metrics.update({f"{metric_key_prefix}_{name}": mean for name, mean in means.items()})
        return found


def with_places(prompt: Any) -> Any:
    """A conversation whose messages are text has a place for the picture in front of each of the user's."""
    if not isinstance(prompt, Sequence) or isinstance(prompt, str):
        return prompt
    in_front = {"user": [{"type": "image"}], "system": []}
    return [
        {**message, "content": [*in_front[message["role"]], {"type": "text", "text": message["content"]}]}
        if message.get("role") in in_front and isinstance(message.get("content"), str)
        else message
        for message in prompt
    ]
