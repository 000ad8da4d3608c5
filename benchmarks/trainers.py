"""Training runs of our trainers beside TRL's: the curves of one seed, times of steps, peaks.

    python benchmarks/trainers.py
    torchrun --nproc-per-node 2 benchmarks/trainers.py    # FSDP2
    python benchmarks/trainers.py --device-map            # one process, a model split over two GPUs
    python benchmarks/trainers.py --device cpu            # small

A case is one loss in one precision: float32 weights under autocast, all of them or LoRA's, AdamW, no checkpointing. TRL
runs from seed 0, the same again, and with its data in another order (and other adapters) from seed 1; ours from seed 0,
twice. Every run begins at one model, a Llama of a few layers that has read docstrings of installed packages for a
while. The difference of two curves is the mean of |loss - loss| over the steps, or of reward margins or entropies. Ours
from TRL's is to be within twice the spread, TRL's own between its seeds. Under FSDP2 a step's data are those of one
GPU, and where TRL's curves of one GPU are in the file, those of two are compared with them as well: FSDP2 rounds what
TRL reads of a model.

Where a trainer would have the policy write completions, they are given (drafts.py): two of each of eight prompts, or
eight of each of two. What is left of a step is what both trainers do with them.

Times are those of whole steps, optimiser included, without the data: the median after five, of the second run of each:
the first pays for what a process pays once for each length of a batch (attention's plans). Memory is the peak of a
process after the first step, everything included. The first step has the compilation in it, as far as the machine's
caches do not. The curves are in a file of their own beside the other, trainers-curves-<device>.csv.
"""

import gc
import math
import os
import random
import re
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import torch
import torch.distributed as dist
import transformers
import typer
from datasets import Dataset
from drafts import EOS, PAD, Drafts, reward, with_drafts
from measure import OURS, PEER, RESULTS, Benchmark, Budget, Errors, Match, Missing, Out, Timing, failure
from torch import Tensor
from training import UNTIMED, Clock, plot_curves, read_curve, read_rows, write_curves
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback
from trl import (
    DistillationConfig,
    DistillationTrainer,
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
)
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.experimental.tpo import TPOConfig, TPOTrainer

import alignment.trl as al
from distill.trl import ChunkedDistillationTrainer, ChunkedGKDTrainer

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import docstrings

THEIRS, MINE, AGAIN = "TRL", "ours", "TRL, the same again"
RUNS = {THEIRS: 0, MINE: 0, AGAIN: 0, "TRL, another seed": 1}  # name -> seed
SPREAD = "TRL, another seed"
ONE, TWO = "one device", "two devices"
ALONE = "TRL on one GPU"
CURVES = {"losses": "loss", "margins": "margin", "entropies": "entropy"}  # their columns
STYLES = {THEIRS: "C1-", MINE: "C0--", SPREAD: "C7:", ONE: "C1-", TWO: "C0--"}
LORA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WORLD = int(os.environ.get("WORLD_SIZE", "1"))  # as torchrun has it
RANK, LOCAL = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
CHATS = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
State = dict[str, Tensor]


@dataclass(frozen=True)
class Size:
    vocabulary: int = 128256
    width: int = 2048
    layers: int = 4
    heads: int = 16
    pairs: int = 8  # a step, of all processes
    prompt: int = 64
    completion: tuple[int, int] = (192, 448)  # words, which are tokens
    read: int = 150  # steps on text, before any run
    characters: int = 2_500_000
    rate: float = 1.0  # learning rates are multiplied by this


SMALL = Size(300, 32, 2, 2, 4, 4, (5, 12), 10, 60_000, 200.0)


# --- text ---


@dataclass(frozen=True)
class Pair:
    prompt: str
    chosen: str
    rejected: str


def of_pair(pair: Pair) -> list[dict[str, Any]]:
    return [{"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}]


def of_verdicts(pair: Pair) -> list[dict[str, Any]]:
    sides = {True: pair.chosen, False: pair.rejected}
    return [{"prompt": pair.prompt, "completion": text, "label": label} for label, text in sides.items()]


def of_chat(pair: Pair) -> list[dict[str, Any]]:
    said = {"user": pair.prompt, "assistant": pair.chosen + "<eos>"}
    return [{"messages": [{"role": role, "content": text} for role, text in said.items()]}]


def of_triple(pair: Pair) -> list[dict[str, Any]]:
    """The gold answer is the chosen one's first half."""
    words = pair.chosen.split(" ")
    return [{**of_pair(pair)[0], "reference": " ".join(words[: len(words) // 2])}]


def of_prompt(pair: Pair) -> list[dict[str, Any]]:
    return [{"prompt": pair.prompt, "chosen": pair.chosen}]


class Text:
    """Words of docstrings, a tokenizer of which each is a token, and pairs. In a rejected completion every fifth word
    is another."""

    def __init__(self, size: Size) -> None:
        self.size = size
        found, _ = docstrings.documents(size.characters)
        self.words = [word for text in found for word in re.findall(r"\w+|[^\w\s]", text)]
        usual = [word for word, _ in Counter(self.words).most_common(min(30_000, size.vocabulary - 3))]
        self.vocabulary = {word: n for n, word in enumerate(["<pad>", "<eos>", "<unk>", *usual])}
        if len(self.words) < 4 * self.length:
            raise SystemExit(f"expected docstrings of {4 * self.length} words, got {len(self.words)}")

    @property
    def length(self) -> int:
        return self.size.prompt + self.size.completion[1]

    def tokenizer(self) -> Any:
        from tokenizers import Tokenizer, models, pre_tokenizers

        made = Tokenizer(models.WordLevel(self.vocabulary, unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokens = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "unk")}
        return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=CHATS, padding_side="left", **tokens)

    def ids(self) -> Tensor:
        return torch.tensor(self.of_text(" ".join(self.words)))

    def drafts(self, count: int) -> Drafts:
        texts = {tuple(self.of_text(pair.prompt)): self.of_text(pair.chosen) for pair in self.pairs(count)}
        return Drafts(texts, len(self.vocabulary))

    def of_text(self, text: str) -> list[int]:
        return [self.vocabulary.get(word, 2) for word in text.split()]

    def pairs(self, count: int) -> Iterator[Pair]:
        draw, usual, prompt = random.Random(0), list(self.vocabulary)[3:], self.size.prompt
        for n in range(count):
            start = n * self.length % (len(self.words) - self.length)
            words = self.words[start : start + prompt + draw.randint(*self.size.completion)]
            worse = [draw.choice(usual) if draw.random() < 0.2 else word for word in words[prompt:]]
            yield Pair(*(" ".join(part) for part in (words[:prompt], ["", *words[prompt:]], ["", *worse])))


# --- models ---


def llama(size: Size, device: torch.device) -> Any:
    torch.manual_seed(0)
    ids = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": EOS}
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=size.width * 11 // 4,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=size.prompt + size.completion[1] + 64,
        **ids,
    )
    with device:
        return LlamaForCausalLM(config)


def readers(text: Text, device: torch.device) -> tuple[State, State]:
    """The weights of a model after a fifth of its reading and after all of it: where students and policies begin, and
    teachers. The same on every process."""
    size, ids, model = text.size, text.ids(), llama(text.size, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    draw = torch.Generator().manual_seed(0)
    found = []
    for step in range(1, size.read + 1):
        optimizer.param_groups[0]["lr"] = 5e-4 * min(1.0, step / 10)
        starts = torch.randint(len(ids) - text.length, (size.pairs,), generator=draw)
        batch = torch.stack([ids[start : start + text.length] for start in starts]).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step in (max(1, size.read // 5), size.read):
            say(f"after reading {step} x {size.pairs} x {text.length} tokens: a loss of {loss.item():.2f}")
            if WORLD > 1:
                for parameter in model.parameters():
                    dist.broadcast(parameter.data, 0)
            found.append({name: value.detach().cpu().clone() for name, value in model.state_dict().items()})
    return found[0], found[-1]


def split(model: Any, devices: Sequence[torch.device]) -> Any:
    """Embeddings and half of the layers on the first device, the others and the head on the last."""
    from accelerate import dispatch_model

    names = [device.index if device.type == "cuda" else device.type for device in (devices[0], devices[-1])]
    layers = len(model.model.layers)
    places = {f"model.layers.{n}": names[2 * n >= layers] for n in range(layers)}
    places |= dict.fromkeys(("model.embed_tokens", "model.rotary_emb"), names[0])
    places |= dict.fromkeys(("model.norm", "lm_head"), names[1])
    return dispatch_model(model, places, main_device=names[0], force_hooks=True)


# --- trainers ---


@dataclass(frozen=True)
class Kind:
    theirs: Any
    ours: Any
    config: Any
    rate: float  # of learning; LoRA's is 20 times as large
    rows: Callable[[Pair], list[dict[str, Any]]] = of_pair
    frozen: str = ""  # the argument that takes a second model
    sequences: int = 2  # of each pair
    settings: dict[str, Any] = field(default_factory=dict)
    drafted: str = ""  # the setting that says how long a completion may be, which is given and not sampled
    per_row: int = 1  # what a batch's size counts, of each row's sequences
    rewarded: bool = False


KINDS = {
    "DPO": Kind(DPOTrainer, al.ChunkedDPOTrainer, DPOConfig, 1.5e-5, frozen="ref_model"),
    "ORPO": Kind(ORPOTrainer, al.ChunkedORPOTrainer, ORPOConfig, 2e-5),
    "CPO": Kind(CPOTrainer, al.ChunkedCPOTrainer, CPOConfig, 1e-5),
    "KTO": Kind(KTOTrainer, al.ChunkedKTOTrainer, KTOConfig, 1.5e-5, of_verdicts, "ref_model"),
    "GKD": Kind(GKDTrainer, ChunkedGKDTrainer, GKDConfig, 1e-4, of_chat, "teacher_model", 1, {"lmbda": 0.0}),
    "TPO": Kind(TPOTrainer, al.ChunkedTPOTrainer, TPOConfig, 1e-5, of_triple, sequences=3),
    "online DPO": Kind(
        OnlineDPOTrainer,
        al.ChunkedOnlineDPOTrainer,
        OnlineDPOConfig,
        1.5e-5,
        of_prompt,
        "ref_model",
        drafted="max_new_tokens",
        rewarded=True,
    ),
    "GRPO": Kind(
        GRPOTrainer,
        al.ChunkedGRPOTrainer,
        GRPOConfig,
        1e-5,
        of_prompt,
        settings={"num_generations": 8},
        drafted="max_completion_length",
        per_row=2,
        rewarded=True,
    ),
    "RLOO": Kind(
        RLOOTrainer,
        al.ChunkedRLOOTrainer,
        RLOOConfig,
        1e-5,
        of_prompt,
        settings={"num_generations": 8, "beta": 0.0},
        drafted="max_completion_length",
        per_row=2,
        rewarded=True,
    ),
    "distillation": Kind(
        DistillationTrainer,
        ChunkedDistillationTrainer,
        DistillationConfig,
        1e-4,
        of_prompt,
        "teacher_model",
        drafted="max_completion_length",
        per_row=2,
    ),
}
KINDS["GRPO with KL"] = replace(KINDS["GRPO"], settings={**KINDS["GRPO"].settings, "beta": 0.04})


@dataclass(frozen=True)
class Case:
    loss: str
    dtype: str = "bfloat16"
    lora: bool = False

    @property
    def title(self) -> str:
        return f"{self.loss}, {'LoRA' if self.lora else 'full'}, {self.dtype}"


CASES = [
    Case("DPO"),
    Case("ORPO"),
    Case("GKD"),
    Case("KTO"),
    Case("DPO", "float16"),
    Case("DPO", lora=True),
    Case("DPO", "float16", lora=True),
    Case("CPO"),
    Case("GRPO"),
    Case("GRPO with KL", lora=True),  # the reference is the model without its adapters
    Case("RLOO"),
    Case("online DPO"),
    Case("TPO"),
    Case("distillation"),
]
SHARDED = [Case("DPO"), Case("ORPO"), Case("DPO", lora=True), Case("GRPO"), Case("online DPO"), Case("distillation")]
SPLIT = [Case("DPO"), Case("ORPO")]


@dataclass
class Run:
    losses: list[float]
    margins: list[float]  # of pairs
    entropies: list[float]  # of trainers whose losses begin at zero, or at the teacher's own
    timing: Timing


@dataclass
class Setup:
    """What all runs share."""

    text: Text
    devices: list[torch.device]  # of this process
    steps: int
    compiled: bool | None
    begun: State
    grown: State

    @property
    def device(self) -> torch.device:
        return self.devices[0]

    def model(self, state: State, device: torch.device) -> Any:
        made = llama(self.text.size, device)
        made.load_state_dict(state)
        return made

    def trainer(self, case: Case, ours: bool, seed: int, folder: str, devices: Sequence[torch.device]) -> Any:
        """`devices`: more than one for a model split over them."""
        kind, size = KINDS[case.loss], self.text.size
        rows = [row for pair in self.text.pairs(size.pairs * self.steps) for row in kind.rows(pair)]
        random.Random(seed).shuffle(rows)  # KTO's trainer takes them as they come
        settings = {
            "output_dir": folder,
            "per_device_train_batch_size": len(rows) // self.steps // WORLD,
            "max_steps": self.steps,
            "max_length": self.text.length + 8,
            "learning_rate": kind.rate * size.rate * (20 if case.lora else 1),
            "warmup_steps": min(UNTIMED, self.steps),
            "optim": "adamw_torch_fused",
            "bf16": case.dtype == "bfloat16",
            "fp16": case.dtype == "float16",
            "gradient_checkpointing": False,
            "logging_steps": 1,
            "logging_nan_inf_filter": False,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "seed": seed,
            "use_cpu": self.device.type == "cpu",
            "dataloader_pin_memory": self.device.type == "cuda",
            **kind.settings,
        }
        if kind.drafted:
            settings[kind.drafted] = size.completion[1] + 1
            settings["per_device_train_batch_size"] *= kind.per_row
        known = {one.name for one in fields(kind.config)}
        settings = {name: value for name, value in settings.items() if name in known}
        if WORLD > 1:
            layers = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
            wrap = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", **layers}
            settings |= {"fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": True, **wrap}}
            settings |= {"ddp_backend": dist.get_backend()}
        args = kind.config(**settings)
        if args.device.type == "cuda":
            args._n_gpu = 1  # the others, where there are, hold the rest of a split model

        models = {"model": self.begun}
        if kind.frozen and not (case.lora and kind.frozen == "ref_model"):  # which is the model without its adapters
            models[kind.frozen] = self.grown if kind.frozen == "teacher_model" else self.begun
        made: dict[str, Any] = {name: self.model(state, devices[0]) for name, state in models.items()}
        if len(devices) > 1:
            made = {name: split(model, devices) for name, model in made.items()}
        if case.lora:
            from peft import LoraConfig

            made["peft_config"] = LoraConfig(
                r=16, lora_alpha=32, lora_dropout=0.0, target_modules=list(LORA), task_type="CAUSAL_LM"
            )
        if kind.rewarded:
            made["reward_funcs"] = reward
        if ours:
            made["loss_options"] = {"compiled": self.compiled}
        torch.manual_seed(seed)  # of adapters
        make = kind.ours if ours else kind.theirs
        if kind.drafted:
            make = with_drafts(make, self.text.drafts(size.pairs * self.steps))
        trainer = make(args=args, train_dataset=Dataset.from_list(rows), processing_class=self.text.tokenizer(), **made)
        trainer.remove_callback(PrinterCallback)
        return trainer

    def run(self, case: Case, ours: bool, seed: int, devices: Sequence[torch.device] = ()) -> Run:
        """One training, and nothing left of it; one that fails has a note."""
        devices = devices or self.devices[:1]
        torch.compiler.reset()
        clock, trainer = Clock(devices), None
        try:
            with tempfile.TemporaryDirectory() as folder:
                trainer = self.trainer(case, ours, seed, folder, devices)
                trainer.add_callback(clock)
                trainer.train()
            logs = [entry for entry in trainer.state.log_history if "loss" in entry]
            curves = [
                [entry[name] for entry in logs if name in entry] for name in ("loss", "rewards/margins", "entropy")
            ]
            if not KINDS[case.loss].drafted:
                curves[-1] = []
            timing = clock.timing()
            timing.note = f"{self.tokens(case):,.0f} tokens a step{timing.note}"
            return Run(*curves, timing)
        except Exception as problem:
            if WORLD > 1 and not isinstance(problem, torch.OutOfMemoryError):
                raise  # the other process may wait for this one
            traceback.print_exc()
            return Run([], [], [], Timing(note=failure(problem)))
        finally:
            if trainer is not None:
                trainer.accelerator.free_memory()
            del trainer
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def tokens(self, case: Case) -> float:
        """Of a step, on average, of all processes."""
        lengths = [len(f"{p.prompt}{p.chosen}".split()) for p in self.text.pairs(self.text.size.pairs * self.steps)]
        return KINDS[case.loss].sequences * sum(lengths) / self.steps


def shard_on_cpu() -> None:
    """Accelerate shards on accelerators alone; here it does so wherever it is asked to."""
    from accelerate.state import AcceleratorState, DistributedType

    build = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        build(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type = DistributedType.FSDP
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = init


# --- curves ---


def difference(found: Sequence[float], truth: Sequence[float]) -> float:
    if len(found) != len(truth):
        return math.inf
    return statistics.fmean(abs(a - b) for a, b in zip(found, truth))


def compare(
    bench: Benchmark,
    title: str,
    runs: dict[str, Run],
    truth: str,
    allowed: Callable[[dict[str, float], float], float],  # differences by name, the mean of |truth| -> of ours
) -> None:
    """Lines of the differences from the curves of `truth`."""
    for quantity in CURVES:
        curves = {name: curve for name, run in runs.items() if (curve := getattr(run, quantity))}
        if truth not in curves:
            continue
        mean = statistics.fmean(map(abs, curves[truth]))
        found = {name: difference(curve, curves[truth]) for name, curve in curves.items() if name != truth}
        for name, error in found.items():
            ours, note = "TRL" not in name, ""
            if ours and not error <= allowed(found, mean):
                note = f"WRONG: {error:.1e}, above {allowed(found, mean):.1e}"
                bench.wrong.append(f"{quantity}, {title}: {note}")
            errors = Errors(quantity, mean, error)
            bench.add(f"{quantity}, {title}", name, OURS if ours else PEER, Timing(note=note), errors)


def twice_the_spread(differences: dict[str, float], mean: float) -> float:
    """Of losses that are zero but for rounding, as those of ratios of one: that of float32."""
    return max(2 * differences.get(SPREAD, math.inf), 1e-6)


def write(path: Path, title: str, who: str, run: Run) -> None:
    write_curves(path, {"case": title, "who": who}, {name: getattr(run, curve) for curve, name in CURVES.items()})


def read_run(path: Path, title: str, who: str) -> Run:
    return Run(*(read_curve(path, {"case": title, "who": who}, name) for name in CURVES.values()), Timing())


def plot(path: Path) -> None:
    """Of each case."""
    grid: dict[str, dict[str, dict[str, list[float]]]] = {}
    for row in read_rows(path):
        of_case = grid.setdefault(row["case"], {quantity: {} for quantity in CURVES})
        for quantity, name in CURVES.items():
            if row.get(name):
                of_case[quantity].setdefault(row["who"], []).append(float(row[name]))
    plot_curves(path.with_suffix(".png"), grid, STYLES)


# --- cases ---


def curves_path(bench: Benchmark) -> Path:
    return bench.path.with_name(bench.path.name.replace("trainers-", "trainers-curves-", 1))


def run_case(bench: Benchmark, setup: Setup, case: Case, title: str) -> None:
    """TRL's and ours; with two processes only the first writes."""
    runs: dict[str, Run] = {}
    for name, seed in RUNS.items():
        runs[name] = run = setup.run(case, name == MINE, seed)
        told = " ".join(f"{loss:.3f}" for loss in run.losses[:: max(1, len(run.losses) // 5)])
        say(f"{title}, {name}: {told} {run.timing.note}")
        if not RANK:
            write(curves_path(bench), title, name, run)
    if not RANK:
        settled = replace(runs[AGAIN].timing, first_s=runs[THEIRS].timing.first_s)
        bench.add(title, THEIRS, PEER, settled)  # at the end: a case with these lines has all of them
        bench.add(title, MINE, OURS, runs[MINE].timing)
        if not runs[MINE].losses:
            bench.wrong.append(f"{title}: {runs[MINE].timing.note}")
        compare(bench, title, runs, THEIRS, twice_the_spread)
        if WORLD > 1 and (alone := read_run(curves_path(bench), case.title, THEIRS)).losses:
            found = {name: runs[name] for name in (MINE, THEIRS)} | {ALONE: alone}
            compare(bench, f"{title}, from one GPU's", found, ALONE, lambda differences, mean: math.inf)


def run_split(bench: Benchmark, setup: Setup, case: Case, title: str) -> None:
    """Ours, the model on one device and over two: equal but for rounding."""
    runs = {name: setup.run(case, True, 0, places) for name, places in ((ONE, setup.devices[:1]), (TWO, setup.devices))}
    for name, run in runs.items():
        bench.add(title, name, OURS, run.timing)
        write(curves_path(bench), title, name, run)
        if not run.losses:
            bench.wrong.append(f"{title}, {name}: {run.timing.note}")
    compare(bench, title, runs, ONE, lambda differences, mean: 1e-2 * mean)


def say(text: str) -> None:
    if not RANK:
        print(text, flush=True)


def agreed(yes: bool, device: torch.device) -> bool:
    """As the first process has it, whose clock counts."""
    if WORLD == 1:
        return yes
    told = torch.tensor(int(yes), device=device)
    dist.broadcast(told, 0)
    return bool(told)


def chosen(cases: Iterable[Case], only: str) -> list[Case]:
    known = {case.loss.lower() for case in cases}
    wanted = set(only.lower().split(",")) if only else known
    if unknown := wanted - known:
        raise typer.BadParameter(f"expected losses out of {sorted(known)}, got {sorted(unknown)}")
    return [case for case in cases if case.loss.lower() in wanted]


def main(
    device: Annotated[str, typer.Option(help="cuda, or cpu for a small run")] = "cuda",
    only: Annotated[str, typer.Option(help="losses, comma-separated, in place of all")] = "",
    device_map: Annotated[bool, typer.Option("--device-map", help="a model split over two GPUs of a process")] = False,
    steps: Annotated[int, typer.Option(min=0, help="of each run; 0: 40, or 3 on a CPU")] = 0,
    compiled: bool = True,
    match: Match = "",
    missing: Missing = False,
    budget: Budget = 0,
    out: Out = RESULTS,
) -> None:
    cpu = device == "cpu"
    size = SMALL if cpu else Size()
    devices = [torch.device("cpu")] if cpu else [torch.device("cuda", LOCAL)]
    if device_map:
        if WORLD > 1 or (not cpu and torch.cuda.device_count() < 2):
            raise typer.BadParameter("expected one process and two GPUs for --device-map")
        devices = 2 * devices if cpu else [torch.device("cuda", n) for n in range(2)]
    if not cpu:
        torch.cuda.set_device(devices[0])
    if WORLD > 1:
        dist.init_process_group("gloo" if cpu else "nccl")
        if cpu:
            shard_on_cpu()
    warnings.filterwarnings("ignore", category=FutureWarning)  # between TRL, transformers and PEFT
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    bench = Benchmark("trainers", devices[0], out, match=match, missing=missing, budget=budget)
    run, cases, names, layout = run_case, CASES, [THEIRS, MINE], ""
    if device_map:
        run, cases, names, layout = run_split, SPLIT, [ONE, TWO], ", split over two"
    elif WORLD > 1:
        cases, layout = SHARDED, f", FSDP2 on {WORLD}"
    todo = [(case, case.title + layout) for case in chosen(cases, only)]
    text = Text(size)
    say(f"{len(text.words):,} words, {len(text.vocabulary):,} of them different")
    setup = Setup(text, devices, steps or (3 if cpu else 40), compiled, *readers(text, devices[0]))
    say(f"{time.perf_counter() - bench.began:.0f} s so far")
    for case, title in todo:
        if agreed(bench.wants(title, names), setup.device):
            run(bench, setup, case, title)
            say(f"{time.perf_counter() - bench.began:.0f} s so far")
    if not RANK:
        if bench.lines:
            plot(curves_path(bench))
        bench.finish()
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
