"""Write down what a teacher thinks: the top k log-probabilities of every next token, as a `datasets` folder.

    python examples/teacher_topk.py --teacher runs/distill_lm/teacher --output runs/topk
    python examples/teacher_topk.py --teacher Qwen/Qwen3-8B --dataset HuggingFaceFW/fineweb-edu --subset sample-10BT \
        --split "train[:100000]" --k 64 --dtype float16 --output topk
    python examples/distill_lm.py --offline runs/topk

A student then trains without its teacher in memory: `DistillTrainer(..., loss=TopKLoss(...), train_dataset=load(...))`.
Columns: `input_ids`, and `teacher_ids` and `teacher_logprobs`, (tokens, k) each, best first: entry t is the
distribution of the token after token t, `log_softmax(logits / temperature)`. The loss must know the temperature:
`TopKLoss(temperature=T, teacher_temperature=T)`.

Rows go into shards. Call it again after a stop or a kill, and it goes on with those that are missing or incomplete.
manifest.json says what made the folder, and nothing else may be added to it. A finished folder is read by
`datasets.load_from_disk`, too.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from enum import Enum
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import common
import docstrings
import typer
from common import console, quiet_and_offline
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:  # imported below where they are used: --help and a wrong option answer at once
    from datasets import Dataset
    from torch import Tensor, nn

CHUNK_BYTES = 64 << 20  # of logits, held at a time
MANIFEST = "manifest.json"


class Precision(str, Enum):
    float32 = "float32"
    float16 = "float16"


class ModelPrecision(str, Enum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def main(
    teacher: Annotated[str, typer.Option(help="A folder or hub name of a causal language model with its tokenizer.")],
    output: Annotated[Path, typer.Option(help="Folder for the shards.")],
    dataset: Annotated[
        str,
        typer.Option(
            help="A hub name; a csv, json, parquet or txt file; or a folder of txt and md files, or of Python code. "
            "Or docstrings."
        ),
    ] = "",
    subset: Annotated[str, typer.Option(help="Configuration of a hub dataset.")] = "",
    split: Annotated[str, typer.Option(help='Of a hub dataset, as in "train[:1%]".')] = "train",
    column: Annotated[str, typer.Option(help="The dataset's column of texts.")] = "text",
    characters: Annotated[int, typer.Option(min=1, help="How much of the docstrings.")] = 2_000_000,
    k: Annotated[int, typer.Option(min=1, help="Entries of each token.")] = 32,
    temperature: Annotated[float, typer.Option(help="Of the teacher's softmax.")] = 1.0,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of a row.")] = 512,
    pack: Annotated[
        bool, typer.Option(help="Texts end to end, cut into rows of --max-length; else a row each, cut off there.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows that the teacher sees at a time.")] = 8,
    shard_rows: Annotated[int, typer.Option(min=1, help="Rows of a shard: what a kill can cost.")] = 1000,
    dtype: Annotated[Precision, typer.Option(help="Of the log-probabilities.")] = Precision.float16,
    model_dtype: Annotated[ModelPrecision, typer.Option(help="Of the teacher; auto: as saved.")] = ModelPrecision.auto,
) -> None:
    """Write the teacher's top k of every token, or go on with it."""
    local = Path(teacher).exists() and (not dataset or Path(dataset).exists())
    quiet_and_offline(offline=local)
    try:
        with console.status("Loading the teacher and the texts"):
            import torch
            from transformers import AutoModelForCausalLM

            tokenizer = load_tokenizer(teacher)
            model = AutoModelForCausalLM.from_pretrained(teacher, dtype=model_dtype.value)
            model.to("cuda" if torch.cuda.is_available() else "cpu")
            texts = load_texts(dataset, subset, split, column, characters)
            rows = tokenised(tokenizer, texts, max_length, pack)
        written = write(
            output,
            model,
            rows,
            k=k,
            temperature=temperature,
            dtype=dtype.value,
            batch_size=batch_size,
            shard_rows=shard_rows,
            told={"model": teacher},
        )
    except (ValueError, TypeError) as error:
        common.show_error(error)
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        console.print("Stopped. The same command goes on.")
        raise typer.Exit(130) from None
    size = sum(file.stat().st_size for file in output.rglob("*.arrow")) / 2**20
    console.print(f"{len(written):,} rows, the top {k} of every token, {size:,.0f} MiB: {output}")


# ---- texts


def load_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:  # no such folder, no such name, no network, no tokenizer in it
        raise ValueError(f"expected a model with its tokenizer, got {name!r}: {error}") from error


def text_files(folder: Path) -> list[Path]:
    return sorted(file for kind in ("*.txt", "*.md") for file in folder.rglob(kind))


def reads_docstrings(name: str) -> bool:
    """Of installed packages, or of a folder of Python code in which there are no texts."""
    return not name or (docstrings.is_code(name) and not text_files(Path(name)))


def load_texts(name: str, subset: str, split: str, column: str, characters: int) -> Dataset:
    """With a column `text`."""
    from datasets import Dataset, load_dataset

    path = Path(name)
    if reads_docstrings(name):
        return Dataset.from_dict({"text": docstrings.documents(characters, name)[0]})
    if path.is_dir():
        files = text_files(path)
        if not files:
            raise ValueError(f"--dataset {name}: no txt, md or py file in this folder")
        return Dataset.from_dict({"text": [file.read_text(encoding="utf-8", errors="replace") for file in files]})
    kind = {".jsonl": "json", ".txt": "text"}.get(path.suffix, path.suffix[1:])
    try:
        if kind in ("csv", "json", "parquet", "text"):
            if not path.exists():
                raise ValueError("no such file")
            loaded = load_dataset(kind, data_files=str(path), split="train")
        else:
            loaded = load_dataset(name, subset or None, split=split)
    except Exception as error:  # of several libraries: unknown name, no network, no such configuration
        raise ValueError(f"--dataset {name}: {error}") from error
    if column not in loaded.column_names:
        raise ValueError(f"--dataset {name} has no column {column} (it has {', '.join(loaded.column_names)})")
    return loaded.select_columns([column]).rename_column(column, "text") if column != "text" else loaded


def tokenised(tokenizer: Any, texts: Dataset, max_length: int, pack: bool) -> Dataset:
    """Rows of `input_ids`. Packed: a text, the end token, the next one, and so on, cut into rows of `max_length`; what
    is left of a thousand texts goes."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def rows(batch: dict[str, list]) -> dict[str, list]:
        given = [text for text in batch["text"] if text]
        if not pack:
            found = tokenizer(given, truncation=True, max_length=max_length)["input_ids"] if given else []
            return {"input_ids": [row for row in found if len(row) > 1]}
        found = tokenizer(given, verbose=False)["input_ids"] if given else []
        ids = list(chain.from_iterable(row + end for row in found))
        return {"input_ids": [ids[i : i + max_length] for i in range(0, len(ids) - max_length + 1, max_length)]}

    made = texts.map(rows, batched=True, remove_columns=texts.column_names)
    if not len(made):
        raise ValueError(f"expected texts for a row of {max_length if pack else 2} tokens at least, got none")
    return made


# ---- the top k


def top_k(
    head: Any, k: int, temperature: float = 1.0, chunk_bytes: int = CHUNK_BYTES
) -> tuple[Tensor, Tensor]:  # (R, k) int64, (R, k) float32
    """The most probable tokens and their log-probabilities, a chunk of rows of logits at a time.

    ``head`` is a ``chunked_embed.Head`` with hidden states (R, H).
    """
    import torch

    found = []
    step = max(1, chunk_bytes // (4 * len(head.weight)))
    # Widened first: logits in half precision would be off by their rounding, and so would who is among the k.
    wide = head.to(torch.float32)
    for start in range(0, len(head.hidden), step):
        logits = wide[start : start + step].logits() / temperature
        best = logits.topk(k, dim=1)
        found.append((best.indices, best.values - logits.logsumexp(1, keepdim=True)))
    ids, logprobs = zip(*found)
    return torch.cat(ids), torch.cat(logprobs)


def of_rows(
    model: nn.Module, rows: list[list[int]], k: int, temperature: float, chunk_bytes: int = CHUNK_BYTES
) -> list[tuple[Tensor, Tensor]]:
    """(teacher_ids, teacher_logprobs) of each row, (tokens, k), of one forward pass."""
    import torch

    from chunked_embed import causal_lm

    lengths = [len(row) for row in rows]
    device = next(model.parameters()).device
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(device)
    real = torch.arange(ids.shape[1], device=device) < torch.tensor(lengths, device=device)[:, None]
    head = causal_lm.capture(model, {"input_ids": ids, "attention_mask": real.long()})
    found = top_k(head[real], k, temperature, chunk_bytes)
    return list(zip(*(side.cpu().split(lengths) for side in found)))


# ---- the folder


def check(model: nn.Module, k: int, temperature: float) -> int:
    """The teacher's vocabulary, where k entries at this temperature can be taken from it."""
    if not 0 < temperature < float("inf"):
        raise ValueError(f"expected a positive, finite temperature, got {temperature}")
    vocabulary = model.get_output_embeddings().weight.shape[0]
    if not 0 < k <= vocabulary:
        raise ValueError(f"expected k in [1, {vocabulary}], the teacher's vocabulary, got {k}")
    return vocabulary


def write(
    folder: Path,
    model: nn.Module,
    rows: Dataset,
    *,
    k: int,
    temperature: float = 1.0,
    dtype: str = "float16",
    batch_size: int = 8,
    shard_rows: int = 1000,
    told: dict[str, Any] | None = None,
) -> Dataset:
    """The finished folder's rows: what was there already, and what was missing.

    Args:
        model: a causal language model of transformers.
        rows: with a column ``input_ids``.
        told: what else the manifest shall say, such as the model's name.

    Raises:
        ValueError: the folder was made by another model, other settings or other rows; k beyond the vocabulary.
    """
    import torch
    from datasets import Dataset

    from chunked_embed import causal_lm

    vocabulary = check(model, k, temperature)
    causal_lm.attach(model.eval())
    manifest = {
        **(told or {}),
        "weights": fingerprint(model),
        "vocabulary": vocabulary,
        "k": k,
        "temperature": temperature,
        "dtype": dtype,
        "rows": len(rows),
        "tokens": digest(rows),
        "rows of a shard": shard_rows,
    }
    begin(folder, manifest)
    starts = range(0, len(rows), shard_rows)
    missing = [
        i for i, start in enumerate(starts) if whole(shard(folder, i), len(span(start, rows, shard_rows))) is None
    ]
    if missing:
        first = torch.tensor([rows[0]["input_ids"]], device=next(model.parameters()).device)
        causal_lm.check(model, {"input_ids": first})  # that head and hidden states are all of its logits
    bar = Progress(
        TextColumn("Writing top-k"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("rows"),
        TimeRemainingColumn(),
        console=console,
    )
    task = bar.add_task(
        "", total=len(rows), completed=len(rows) - sum(len(span(starts[i], rows, shard_rows)) for i in missing)
    )
    with bar:
        for i in missing:
            found: dict[str, list] = {"input_ids": [], "teacher_ids": [], "teacher_logprobs": []}
            part = rows.select(span(starts[i], rows, shard_rows))
            for batch in part.iter(batch_size):
                for ids, (best, logprobs) in zip(
                    batch["input_ids"], of_rows(model, batch["input_ids"], k, temperature)
                ):
                    found["input_ids"].append(ids)
                    found["teacher_ids"].append(best.int().numpy())
                    found["teacher_logprobs"].append(logprobs.numpy().astype(dtype))
                    bar.advance(task)
            unfinished = shard(folder, i).with_suffix(".part")
            Dataset.from_dict(found, features=features(k, dtype)).save_to_disk(str(unfinished), num_shards=1)
            shutil.rmtree(shard(folder, i), ignore_errors=True)  # one that lost a file
            unfinished.rename(shard(folder, i))  # at once, or not at all
    finish(folder, len(starts))
    return load(folder)[1]


def load(folder: Path) -> tuple[dict[str, Any], Dataset]:
    """(manifest, rows) of a finished folder. The rows stay on the disk until they are used."""
    folder = Path(folder)
    if not (folder / MANIFEST).exists():
        raise ValueError(f"expected a folder that teacher_topk.py wrote, got {folder}")
    manifest = json.loads((folder / MANIFEST).read_text())
    rows = whole(folder, manifest["rows"])
    if rows is None:
        raise ValueError(f"{folder} is not finished: call teacher_topk.py again, and it goes on")
    return manifest, rows


def whole(folder: Path, count: int) -> Dataset | None:
    """The rows of a folder, or of a shard, where all of them are there."""
    from datasets import load_from_disk

    try:
        rows = load_from_disk(str(folder))
    except (OSError, ValueError):  # a file is missing, or was cut off
        return None
    return rows if len(rows) == count else None


def begin(folder: Path, manifest: dict[str, Any]) -> None:
    file = folder / MANIFEST
    if file.exists():
        before = json.loads(file.read_text())
        if before != manifest:
            names = [name for name in {**before, **manifest} if before.get(name) != manifest.get(name)]
            other = "; ".join(f"{name} was {before.get(name)}, is {manifest.get(name)}" for name in names)
            raise ValueError(f"{folder} holds something else: {other}. --output names another folder")
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty, and not from here: --output names another folder")
    folder.mkdir(parents=True, exist_ok=True)
    for cut_off in folder.glob("shard-*.part"):
        shutil.rmtree(cut_off)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(manifest, indent=1))
    part.replace(file)


def finish(folder: Path, shards: int) -> None:
    """Make of the shards' folders one that `datasets` reads: its two small files, over all of their data."""
    states = [json.loads((shard(folder, i) / "state.json").read_text()) for i in range(shards)]
    files = [
        {"filename": f"{shard(folder, i).name}/{file['filename']}"}
        for i, state in enumerate(states)
        for file in state["_data_files"]
    ]
    name = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()[:16]
    shutil.copy(shard(folder, 0) / "dataset_info.json", folder / "dataset_info.json")
    (folder / "state.json").write_text(json.dumps({**states[0], "_data_files": files, "_fingerprint": name}, indent=1))


def shard(folder: Path, i: int) -> Path:
    return folder / f"shard-{i:05d}"


def span(start: int, rows: Dataset, size: int) -> range:
    return range(start, min(start + size, len(rows)))


def features(k: int, dtype: str) -> Any:
    from datasets import Features, List, Value

    return Features(
        {
            "input_ids": List(Value("int32")),
            "teacher_ids": List(List(Value("int32"), length=k)),
            "teacher_logprobs": List(List(Value(dtype), length=k)),
        }
    )


def digest(rows: Dataset) -> str:
    """Of all tokens, in their order."""
    total = hashlib.sha256()
    for batch in rows.select_columns("input_ids").iter(1000):
        total.update(json.dumps(batch["input_ids"]).encode())
    return total.hexdigest()[:16]


def fingerprint(model: nn.Module) -> str:
    """Of a model's weights: names, shapes, and some values of each."""
    total = hashlib.sha256()
    for name, value in model.state_dict().items():
        flat = value.detach().flatten()
        some = flat[:: max(1, len(flat) // 64)].double().cpu()
        total.update(f"{name} {tuple(value.shape)}".encode() + some.numpy().tobytes())
    return total.hexdigest()[:16]


if __name__ == "__main__":
    common.run(main)
