"""One figure for each benchmark family, from the csv files beside this script. They are built, and not committed.

    python benchmarks/plots.py --out docs/_plots     # `make docs` does

A figure has few bars: one case, or few, that stand for the family; ours, other people's, and a line where the bare work
ends. All lines are in the tables of docs/benchmarks.md. A family of which the device has no file is left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import typer
from measure import FLOOR, OURS, RESULTS, Line, read_csv
from tables import DEVICE, number, quantity

matplotlib.use("Agg")
from matplotlib import pyplot

BLUE, INK, FAINT = "#1f6fb2", "#222222", "#dddddd"
OTHERS = ("#e3a05c", "#b9b2a6")  # other people's, in turn
LOOK = {
    "figure.facecolor": "white",  # opaque: pages may be dark
    "axes.edgecolor": FAINT,
    "axes.facecolor": "white",
    "axes.labelcolor": INK,
    "axes.titlelocation": "left",
    "font.size": 10,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


@dataclass(frozen=True)
class Panel:
    """One axis: a column of the csv, or a quotient of two."""

    column: str
    title: str
    percent: bool = False
    case: str = "{case}"  # where its lines are of another case

    def values(self, lines: Sequence[Line], case: str, name: str) -> list[float]:
        """None or one."""
        found = [line for line in lines if (line.case, line.name) == (self.case.format(case=case), name)]
        values = [quantity(line, self.column) for line in found]
        return [(100 if self.percent else 1) * value for value in values if value is not None]

    def text(self, value: float) -> str:
        return f"{number(value)}{'%' if self.percent else ''}"


TIME = Panel("ms", "time, ms")
MEMORY = Panel("peak_gib", "memory on top of the inputs, GiB")
GRADIENTS = Panel("gradient_error", "gradient off by", percent=True)


@dataclass(frozen=True)
class Figure:
    """`cases` and `names` are those of the csv, with what a reader is told."""

    title: str
    cases: dict[str, str]
    names: dict[str, str]
    panels: tuple[Panel, ...] = (TIME, MEMORY, GRADIENTS)
    floor: str = ""  # its name in the csv
    floor_is: str = "the bare matrix products"

    def measured(self, lines: Sequence[Line]) -> tuple[dict[str, str], dict[str, str]]:
        """Its cases and names of which there is a line."""
        found = {(line.case, line.name) for line in lines if line.ms or line.peak_gib}
        cases = {case: told for case, told in self.cases.items() if any((case, name) in found for name in self.names)}
        names = {name: told for name, told in self.names.items() if any((case, name) in found for case in cases)}
        return cases, names

    def draw(self, lines: Sequence[Line]) -> Any:
        """With several cases their names stand at the axis and colours tell who; with one, the names do."""
        cases, names = self.measured(lines)
        many = len(self.cases) > 1
        apart = len(names) + 0.7  # from case to case
        places = [(case, name, k * apart + n) for k, case in enumerate(cases) for n, name in enumerate(names)]
        height = 1.6 + (0.28 if many else 0.36) * (places[-1][-1] + 1)
        figure, axes = pyplot.subplots(
            1, len(self.panels), sharey=True, squeeze=False, figsize=(10.5, height), layout="constrained"
        )
        roles = {line.name: line.role for line in lines}
        colours = self.colours(roles, names)
        for axis, panel in zip(axes[0], self.panels):
            shown = {(case, name): panel.values(lines, case, name) for case, name, _ in places}
            most = max((value for values in shown.values() for value in values), default=1.0)
            for case, name, place in places:
                for value in shown[case, name]:
                    axis.barh(place, value, 0.86, color=colours[name])
                    axis.annotate(panel.text(value), (value, place), (4, 0), textcoords="offset points", va="center")
            for k, case in enumerate(cases if self.floor else ()):
                ends = [k * apart - 0.55, k * apart + len(names) - 0.45]
                for value in panel.values(lines, case, self.floor) if panel.column == "ms" else []:
                    axis.plot([value] * 2, ends, color=INK, linestyle=(0, (3, 2)))
            axis.set_xlim(0, 1.22 * most)
            axis.set_ylim(places[-1][-1] + 0.7, -0.7)
            axis.set_title(panel.title, fontsize=10)
            axis.spines[["top", "right", "bottom"]].set_visible(False)
            axis.tick_params(length=0)
            axis.locator_params(axis="x", nbins=4)
            axis.grid(axis="x", color=FAINT, linewidth=0.6)
            axis.set_axisbelow(True)
        if many:
            middle = (len(names) - 1) / 2
            where = {told: k * apart + middle for k, told in enumerate(cases.values())}
        else:
            where = {told: place for told, (_, _, place) in zip(names.values(), places)}
        axes[0][0].set_yticks(list(where.values()), list(where))
        figure.suptitle(f"{self.title}\n", x=0.01, ha="left", fontsize=12.5, fontweight="bold", linespacing=0.6)
        figure.supxlabel(self.told(lines), x=0.01, ha="left", fontsize=8.5, color="#666666")
        self.legend(figure, roles, names if many else {})
        return figure

    def legend(self, figure: Any, roles: dict[str, str], names: dict[str, str]) -> None:
        colours = self.colours(roles, names)
        handles: list[Any] = [
            pyplot.Rectangle((0, 0), 1, 1, color=colours[name], label=told) for name, told in names.items()
        ]
        if roles.get(self.floor) == FLOOR:
            handles.append(pyplot.Line2D([], [], color=INK, linestyle=(0, (3, 2)), label=self.floor_is))
        if handles:
            figure.legend(
                handles=handles, loc="lower right", ncols=len(handles), frameon=False, fontsize=9, borderpad=0.1
            )

    def colours(self, roles: dict[str, str], names: dict[str, str]) -> dict[str, str]:
        """Of ours, and of other people's: those are told apart where colours alone do so."""
        others = [name for name in names if roles.get(name) != OURS]
        tones = OTHERS if len(self.cases) > 1 else OTHERS[:1]
        return {name: tones[others.index(name) % len(tones)] if name in others else BLUE for name in names}

    def told(self, lines: Sequence[Line]) -> str:
        """What it was measured on."""
        of_cases = [line for line in lines if line.case in self.cases]
        device, torch = (", ".join(sorted({getattr(line, key) for line in of_cases})) for key in ("device", "torch"))
        return f"{device}, torch {torch}. Less is better everywhere."


US = "chunked-embed"
SBERT = "sentence-transformers"
QUACK = "quack, scaled exponentials"
THREE, FOUR = (f"{count} matrix products, and nothing else" for count in ("three", "four"))
TRAINED = {"ours": US, "TRL": "TRL"}
SWAPPED = {"ours": US, SBERT: SBERT}
HELD = Panel("peak_gib", "memory held at the peak, GiB")
FIGURES = {
    "embedding": Figure(
        "Losses of a million pairs of ready embeddings (1,048,576 x 256)",
        {
            f"{loss} 1048576x256 bfloat16": told
            for loss, told in {
                "cosent": "CoSENT",
                "angle": "AnglE",
                "triplet-cosine": "triplet, cosine",
                "triplet-euclidean": "triplet, Euclidean",
            }.items()
        },
        SWAPPED,
        (TIME, MEMORY),
        floor="floor: one pass",
        floor_is="reading and writing all once",
    ),
    "contrastive": Figure(
        "InfoNCE of 65,536 pairs by their width: every other pair is a negative",
        {f"InfoNCE 65536x{width}, bfloat16": f"width {width}" for width in (1024, 768, 384, 256, 64)},
        {"CF.info_nce": US, QUACK: "quack", "Liger fused linear CE": "Liger"},
        (TIME, GRADIENTS),
        floor="floor: 3 products",
        floor_is=THREE,
    ),
    "token_losses": Figure(
        "Cross-entropy of 8,192 tokens through a head of 128,256 x 4096",
        {"cross-entropy, 8192 tokens, V=128256, H=4096, bfloat16": "cross-entropy"},
        {
            "TokenStatistics, grouped": f"{US},\nTokenStatistics",
            "loss_fn, row-wise": f"{US},\na loss_fn of one line",
            QUACK: "quack",
            "Liger fused linear CE": "Liger",
            "torch, whole logits": "torch, whole logits",
        },
        floor="floor: 3 products",
        floor_is=THREE,
    ),
    "preference": Figure(
        "DPO of 4 pairs x 1,024 tokens, reference included, head of 128,256 x 4096",
        {"DPO, 4 pairs x 1024, V=128256, H=4096, bfloat16": "DPO"},
        {
            "DPOLoss": US,
            "TRL fused head": "TRL",
            "Liger, chunks of 1 pair": "Liger",
            "Liger scaled cross-entropy": "Liger's scaled\ncross-entropy",
            "torch, whole logits": "torch, whole logits",
        },
        (TIME, MEMORY, Panel("value_error / value_mean", "reward margin off by", percent=True)),
        floor="floor: 4 products",
        floor_is=FOUR,
    ),
    "sparse": Figure(
        "A SPLADE head over 256 texts of 256 tokens, a vocabulary of 30,522",
        {
            f"SPLADE, {kind}, 256 texts x 256, V=30522, H=768, bfloat16": told
            for kind, told in {
                "100% active": "untrained",
                "2% active": "trained",
                "sum": "sum",
                "encode": "encode",
            }.items()
        },
        {"CF.splade_pool": US, "sentence-transformers": SBERT, "torch.compile": "torch.compile"},
        (TIME, MEMORY),
        floor="floor: 1 product",
        floor_is="one bare matrix product",
    ),
    "sparse_losses": Figure(
        "Losses of 16,384 sparse embeddings over a vocabulary of 30,522",
        {
            f"{loss} 16384x30522, 1.0% other than zero, autocast": told
            for loss, told in {"splade": "ranking", "margins": "MarginMSE", "order": "CoSENT", "flops": "FLOPS"}.items()
        },
        SWAPPED,
        (TIME, MEMORY),
    ),
    "late_interaction": Figure(
        "MaxSim contrast of queries of 32 tokens with documents of 128 to 256",
        {f"MaxSim contrast, {n} x 32 and 128-256, H=128, bfloat16": f"{n:,} queries" for n in (256, 1024, 4096)},
        {
            "CF.max_sim_info_nce": US,
            "flash-maxsim": "flash-maxsim",
            "late-interaction-kernels": "late-interaction-kernels",
        },
        (TIME, MEMORY),
        floor="floor: 3 products",
        floor_is="three products",
    ),
    "distillation": Figure(
        "Jensen-Shannon divergence from a teacher: 8,192 tokens, a vocabulary of 128,256",
        {"JSD, 8192 tokens, V=128256, H=2048 from 4096, bfloat16": "JSD"},
        {"JSDLoss": US, "TRL": "TRL", "Liger, chunked": "Liger, chunked", "Liger, Triton": "Liger, Triton"},
        floor="floor: 4 products",
        floor_is=FOUR,
    ),
    "trainers": Figure(
        "TRL's trainers and ours: Llama of 4 layers, vocabulary of 128,256",
        {
            f"{loss}, full, bfloat16": loss
            for loss in ("DPO", "KTO", "CPO", "ORPO", "TPO", "online DPO", "GRPO", "GKD", "distillation")
        },
        TRAINED,
        (Panel("ms", "time of a step, ms"), HELD),
    ),
    "swap": Figure(
        "The same training run with another import",
        {
            f"{loss}, bfloat16": told
            for loss, told in {
                "MultipleNegativesRanking": "MultipleNegatives-\nRanking",
                "CachedMultipleNegativesRanking": "the same, cached",
                "CoSENT": "CoSENT",
                "Triplet": "Triplet",
                "GISTEmbed": "GISTEmbed",
                "Matryoshka": "Matryoshka",
            }.items()
        },
        SWAPPED,
        (
            Panel("ms", "time of a step, ms"),
            Panel("value_error / value_mean", f"losses off those of a run of {SBERT} by", True, "losses, {case}"),
        ),
    ),
    "small": Figure(
        "Training steps at ordinary batches",
        {
            f"step, {loss}, {pairs} pairs of 64 tokens, 6 x 384": f"{told}, {pairs} pairs"
            for pairs in (32, 512)
            for loss, told in {"MNRL": "InfoNCE", "CoSENT": "CoSENT", "Matryoshka over MNRL": "Matryoshka"}.items()
        },
        SWAPPED,
        (Panel("ms", "time of a training step, ms"), HELD),
    ),
}


def main(
    out: Annotated[Path, typer.Option(help="folder of the figures")] = Path(__file__).parents[1] / "docs" / "_plots",
    form: Annotated[str, typer.Option("--format", help="svg, or png")] = "svg",
    device: Annotated[str, typer.Option(help="as in the names of the csv files")] = DEVICE,
    folder: Annotated[Path, typer.Option("--from", envvar="BENCH_OUT", help="folder of the csv files")] = RESULTS,
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for family, spec in FIGURES.items():
        path = folder / f"{family.replace('_', '-')}-{device}.csv"
        lines = read_csv(path)
        if not any(line.case in spec.cases for line in lines):
            print(f"{family}: no figure, expected its cases in {path}")
            continue
        with pyplot.rc_context(LOOK):
            figure = spec.draw(lines)
            figure.savefig(out / f"{family}.{form}", dpi=110, bbox_inches="tight", pad_inches=0.12)
            pyplot.close(figure)


if __name__ == "__main__":
    typer.run(main)
