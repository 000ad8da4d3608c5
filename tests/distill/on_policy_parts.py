"""On-policy trainers small enough for a test, TRL's and ours; also what each of two gloo processes runs."""

from __future__ import annotations

import gc
import os
import random
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import trainer_parts as parts
from datasets import Dataset
from trl import DistillationConfig

from distill.trl import ChunkedDistillationTrainer

PLAIN = {"compiled": False}
GREEDY = {"generation_kwargs": {"do_sample": False}}
WORLD = 2


def prompts(size: int = 12, seed: int = 0, words: tuple[int, int] = (1, 5)) -> Dataset:
    draw = random.Random(seed)
    return Dataset.from_list([{"prompt": parts.text(draw, *words)} for _ in range(size)])


def arguments(folder: Path | str, **given: Any) -> DistillationConfig:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "learning_rate": 1e-2,
        "optim": "sgd",
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "max_completion_length": 4,
    }
    return DistillationConfig(str(folder), **settings | given)


def make(cls: type, folder: Path | str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    options = {"model": None, "teacher_model": None, "train_dataset": prompts()} | options
    options["model"] = options["model"] or parts.student(dtype)
    options["teacher_model"] = options["teacher_model"] or parts.teacher(dtype)
    options["args"] = arguments(folder, **options.pop("args", {}))
    options.setdefault("processing_class", parts.tokenizer())
    if cls is ChunkedDistillationTrainer and "loss" not in options:
        options.setdefault("loss_options", PLAIN)
    return cls(**options)


def trained(*given: Any, **options: Any) -> Any:
    trainer = make(*given, **options)
    torch.manual_seed(0)  # of what is sampled
    trainer.train()
    return trainer


# --- two processes ---------------------------------------------------------------------------------------------------

SPLITS: dict[str, dict[str, Any]] = {  # of steps of four rows
    "whole": {"per_device_train_batch_size": 2},
    "accumulated": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
}


def greedy(folder: Path | str, cls: type, dtype: torch.dtype, **args: Any) -> dict[str, Any]:
    """Two steps, each prompt with one completion, and an evaluation of an odd number of rows.

    Prompts are as long as each other: positions go by the padding of a batch, and their sines are float32.
    """
    settings = GREEDY | {"temperature": 0.7, "beta": 0.3, "per_device_eval_batch_size": 2, "shuffle_dataset": False}
    train, evaluated = prompts(words=(3, 3)), prompts(5, 1, words=(3, 3))
    made = make(cls, folder, dtype, train_dataset=train, eval_dataset=evaluated, args=settings | args)
    made.train()
    found = made.evaluate()
    return {"logs": made.state.log_history, "weights": dict(made.model.state_dict()), "evaluated": found}


def run(rank: int, port: int, folder: str) -> None:
    warnings.simplefilter("ignore")  # third parties' warnings are errors in the tests of one process
    torch.set_num_threads(1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "LOCAL_WORLD_SIZE": WORLD}
    os.environ |= {name: str(value) for name, value in names.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    from trl import DistillationTrainer

    found: dict[str, Any] = {
        name: greedy(folder, ChunkedDistillationTrainer, torch.float64, ddp_backend="gloo", **split)
        for name, split in SPLITS.items()
    }
    found["trl"] = greedy(folder, DistillationTrainer, torch.float32, ddp_backend="gloo", **SPLITS["whole"])
    torch.save(found, f"{folder}/rank-{rank}.pt")
    gc.collect()  # a DDP model that outlives its group destroys it holding the GIL, for which gloo's thread may wait
    dist.destroy_process_group()
