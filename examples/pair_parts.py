"""What train_contrastive.py, train_splade.py and train_colbert.py share: pairs of texts, a run that can be resumed,
as train_online_dpo.py and train_grpo.py can be."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import docstrings
from common import console, load_splits

if TYPE_CHECKING:  # imported below where they are used: --help and a wrong option answer at once
    from datasets import Dataset
    from torch import Tensor, nn

POOL = 2000  # held-out pairs
QUERIES = 300  # of them, where a library's evaluator ranks the documents of all of them
OWN_STATE = "loss.pt"  # the last file of a checkpoint: one without it was cut off while it was written
WORLD = int(os.environ.get("WORLD_SIZE", "1"))
MAIN = os.environ.get("RANK", "0") == "0"


def load_pairs(
    name: str, subset: str, columns: str, rows: int, seed: int, negatives: bool = True
) -> tuple[Dataset, Dataset]:
    """(training, held out): query, document, hard negatives. No held-out text is in a training row, or comes twice."""
    if not name or docstrings.is_code(name):
        from datasets import Dataset

        with console.status("Reading docstrings"):
            functions = docstrings.collect(rows, per_package=max(1000, rows // 12), folder=name)
            train = docstrings.pairs([f for f in functions if not docstrings.is_held_out(f)], seed)
            held_out = docstrings.pairs([f for f in functions if docstrings.is_held_out(f)], seed)
        return Dataset.from_dict(train), Dataset.from_dict(held_out)

    wanted = [column.strip() for column in columns.split(",")]
    if len(wanted) < 2:
        raise ValueError(f"--columns takes two names or more, query,document, got {columns!r}")
    optional = () if "negative" in wanted or not negatives else ("negative",)
    train, held_out = load_splits(name, subset, wanted, "the training", 2 * POOL, seed, optional)
    seen: set[str] = set()

    def is_new(row: dict[str, str]) -> bool:
        texts = [row[column] for column in wanted[:2]]
        new = not seen & set(texts)
        seen.update(texts)
        return new

    kept = [i for i, row in enumerate(held_out.select(range(min(len(held_out), 2 * POOL)))) if is_new(row)]
    clean = [i for i, row in enumerate(train) if not seen & {row[column] for column in wanted[:2]}]
    return train.select(clean), held_out.select(kept)


def searched(held_out: Dataset) -> tuple[dict[str, str], dict[str, str], dict[str, set[str]]]:
    """Queries, documents (hard negatives among them) and each query's own, as the library's evaluators take them."""
    query, *others = held_out.column_names
    queries = {str(i): text for i, text in enumerate(held_out[query][:QUERIES])}
    corpus = {f"{name} {i}": text for name in others for i, text in enumerate(held_out[name])}
    return queries, corpus, {i: {f"{others[0]} {i}"} for i in queries}


# ---- stopping and going on


def digest(train: Dataset) -> str:
    """Of the training texts, in their order: other texts would be another run."""
    total = hashlib.sha256()
    for row in train:
        total.update(json.dumps(row).encode())
    return total.hexdigest()[:16]


def begin(output: Path, run: dict[str, Any], resume: bool, last: str = OWN_STATE) -> Path | None:
    """The checkpoint to go on from, or None for a new run, after a look at what lies in the folder. ``last``: the file
    that a checkpoint has when it is whole."""
    told = output / "run.json"
    before = json.loads(told.read_text()) if told.exists() else None
    checkpoints = sorted(
        (path.parent for path in output.glob(f"checkpoint-*/{last}")), key=lambda c: int(c.name.split("-")[1])
    )
    if resume:
        if before is None or not checkpoints:
            raise ValueError(f"--resume: no checkpoint in {output}")
        if before != run:
            other = [
                f"{name} was {before.get(name)}, is {run.get(name)}" for name in run if before.get(name) != run[name]
            ]
            raise ValueError(f"--resume: the run in {output} was another one: {'; '.join(other)}")
        return checkpoints[-1]
    if not MAIN:
        return None  # the first process looks, and clears up
    results = output / "results.json"
    if checkpoints and not (results.exists() and json.loads(results.read_text()).get("finished")):
        raise ValueError(f"{output} holds an unfinished run: --resume goes on with it, --output names another folder")
    for path in output.glob("checkpoint-*") if before is not None else ():
        shutil.rmtree(path)
    results.unlink(missing_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    told.write_text(json.dumps(run, indent=1))
    return None


def own_parameters(loss: nn.Module, model: nn.Module) -> dict[str, Tensor]:
    """What a loss learns itself, such as a temperature: no checkpoint of a model holds it."""
    of_model = {id(parameter) for parameter in model.parameters()}
    return {name: p.detach() for name, p in loss.named_parameters() if id(p) not in of_model}


def restore(loss: nn.Module, model: nn.Module, checkpoint: Path) -> None:
    import torch

    saved = torch.load(checkpoint / OWN_STATE, map_location="cpu", weights_only=True)
    for name, parameter in own_parameters(loss, model).items():
        parameter.copy_(saved[name])


def stop_and_go_on(loss: nn.Module, model: nn.Module, stop_after: int) -> list[Any]:
    import torch
    from transformers import TrainerCallback

    class KeepLoss(TrainerCallback):
        """Puts into a checkpoint what the loss learned."""

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero:
                file = Path(args.output_dir, f"checkpoint-{state.global_step}", OWN_STATE)
                torch.save(own_parameters(loss, model), file.with_suffix(".part"))
                file.with_suffix(".part").replace(file)

    class StopAndEvaluate(TrainerCallback):
        """Evaluates at the end, which need not be a multiple of --eval-every; stops where --stop-after says."""

        begun_at = 0

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.begun_at = state.global_step

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step >= state.max_steps:
                control.should_evaluate = control.should_save = True
            elif stop_after and state.global_step - self.begun_at >= stop_after:
                control.should_save = control.should_training_stop = True

    return [KeepLoss(), StopAndEvaluate()]
