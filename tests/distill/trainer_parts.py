"""Models, data and a trainer small enough for a test; and the same loss from full logits, as ``Trainer`` would have it.

Also what each of two gloo processes runs.
"""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from distill import DistillLoss, DistillTrainer

WORDS = [f"w{n}" for n in range(60)]
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
Divergence = Callable[[Tensor, Tensor, Tensor], Tensor]  # logits of student and teacher (N, V), labels (N,) -> (N,)


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: n for n, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    made.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    return made


def sharpened(model: Any, dtype: torch.dtype = torch.float64) -> Any:
    """Its tokens differ in probability."""
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model.to(dtype)


def student(dtype: torch.dtype = torch.float64, seed: int = 0, **config: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = SIZES | {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0} | config
    return sharpened(LlamaForCausalLM(LlamaConfig(**sizes)), dtype)


def teacher(dtype: torch.dtype = torch.float64, **config: Any) -> LlamaForCausalLM:
    return student(dtype, seed=1, **{"hidden_size": 32} | config)


def text(draw: random.Random, low: int, high: int) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(low, high)))


def texts(size: int = 12, seed: int = 0) -> Dataset:
    draw = random.Random(seed)
    return Dataset.from_list([{"text": text(draw, 2, 11)} for _ in range(size)])


def tokens(size: int = 12, seed: int = 0) -> Dataset:
    """Ids and labels: of each row the first token or so is a prompt."""
    rows = []
    for n, row in enumerate(texts(size, seed)):
        ids = tokenizer()(row["text"])["input_ids"]
        rows.append({"input_ids": ids, "labels": [-100] * (n % 3) + ids[n % 3 :]})
    return Dataset.from_list(rows)


def in_pairs(data: Dataset) -> Dataset:
    """Two rows in one, as TRL's ``pack_dataset`` has them; the last alone if they are odd."""
    rows = []
    for n in range(0, len(data), 2):
        two = list(data.select(range(n, min(n + 2, len(data)))))
        joined = {name: [x for row in two for x in row[name]] for name in data.column_names}
        rows.append({**joined, "seq_lengths": [len(row["input_ids"]) for row in two]})
    return Dataset.from_list(rows)


class FromLogits(Trainer):
    """The same from full logits: ``Trainer`` as it is, and a function of logits."""

    def __init__(self, *args: Any, teacher_model: Any, divergence: Divergence, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher_model, self.divergence = teacher_model.eval(), divergence

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")[:, 1:]
        offline = {name: inputs.pop(name)[:, :-1] for name in list(inputs) if name.startswith("teacher_")}
        used = labels != -100
        outputs = model(**inputs)
        with torch.no_grad(), self.accelerator.autocast():
            taught = self.teacher_model(**inputs).logits[:, :-1]
        if offline:
            taught = torch.cat([offline["teacher_ids"].to(taught), offline["teacher_logprobs"].to(taught)], -1)
        values = self.divergence(outputs.logits[:, :-1][used].to(taught), taught[used], labels[used])
        loss = values.sum() / (used.sum() if num_items_in_batch is None else num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Padded on the right, by hand."""
    length = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "labels": -100, "teacher_ids": 0, "teacher_logprobs": -1.0}
    batch = {}
    for name, value in fill.items():
        if name in rows[0]:
            first = rows[0][name][0]
            blank = [value] * len(first) if isinstance(first, list) else value
            batch[name] = torch.tensor([row[name] + [blank] * (length - len(row[name])) for row in rows])
    real = [[1] * len(row["input_ids"]) + [0] * (length - len(row["input_ids"])) for row in rows]
    return {**batch, "attention_mask": torch.tensor(real)}


def arguments(folder: Path | str, **given: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "learning_rate": 1e-2,
        "optim": "sgd",  # Adam makes steps of rounding errors where a gradient is almost zero
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return TrainingArguments(**settings | given)


def trainer(folder: Path | str, *, args: Mapping[str, Any] | None = None, **options: Any) -> DistillTrainer:
    options.setdefault("model", student())
    options.setdefault("teacher_model", teacher())
    options.setdefault("train_dataset", tokens())
    return DistillTrainer(args=arguments(folder, **args or {}), **options)


def reference(
    folder: Path | str, divergence: Divergence, *, args: Mapping[str, Any] | None = None, **options: Any
) -> Any:
    options.setdefault("model", student())
    options.setdefault("teacher_model", teacher())
    options.setdefault("train_dataset", tokens())
    args = arguments(folder, remove_unused_columns=False, **args or {})
    return FromLogits(args=args, divergence=divergence, data_collator=collate, **options)


def kl(s: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    return F.kl_div(s.log_softmax(-1), t.log_softmax(-1), reduction="none", log_target=True).sum(-1)


def hard(s: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(s, labels, reduction="none")


def logged(trainer: Any, name: str = "loss") -> list[float]:
    return [log[name] for log in trainer.state.log_history if name in log]


def assert_same_training(ours: Any, theirs: Any, tolerance: float = 1e-9) -> None:
    losses = (torch.tensor(logged(trainer)) for trainer in (ours, theirs))  # which Trainer sums up in float32
    torch.testing.assert_close(*losses, rtol=max(10 * tolerance, 1e-6), atol=tolerance)
    for (name, p), q in zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(
            p, q, rtol=tolerance, atol=tolerance, msg=lambda message, name=name: f"{name}: {message}"
        )


# --- two processes ---------------------------------------------------------------------------------------------------

WORLD = 2
ORDERED = {"max_steps": 2, "train_sampling_strategy": "sequential", "per_device_eval_batch_size": 2}
SPLITS: dict[str, dict[str, Any]] = {  # of steps of four rows
    "whole": {"per_device_train_batch_size": 2},
    "accumulated": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
    "packed": {"per_device_train_batch_size": 1},
}


def distributed(folder: Path | str, split: Mapping[str, Any], packed: bool = False) -> DistillTrainer:
    """Two steps, and an evaluation of an odd number of rows."""
    loss = DistillLoss([("ce", 0.5), ("kl", 0.5)], compiled=False)
    data = [in_pairs(data) if packed else data for data in (tokens(), tokens(5, seed=1))]
    args = ORDERED | dict(split)
    made = trainer(folder, loss=loss, train_dataset=data[0], eval_dataset=data[1], args=args)
    made.train()
    made.evaluate()
    return made


def run(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    ours = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    os.environ.update({name: str(value) for name, value in ours.items()})  # accelerate looks for them
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)

    def trained(name: str) -> dict[str, Any]:
        made = distributed(folder, SPLITS[name], name == "packed")
        return {"logs": made.state.log_history, "weights": made.model.state_dict()}

    torch.save({name: trained(name) for name in SPLITS}, f"{folder}/rank-{rank}.pt")
    # Before the group: a DDP model that outlives it destroys it holding the GIL, for which gloo's thread may wait.
    gc.collect()
    dist.destroy_process_group()
