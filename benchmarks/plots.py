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

BLUE, ORANGE, INK, FAINT = "#1f6fb2", "#e3a05c", "#222222", "#dddddd"
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

    def draw(self, lines: Sequence[Line]) -> Any:
        """With several cases their names stand at the axis and colours tell who; with one, the names do."""
        many = len(self.cases) > 1
        apart = len(self.names) + 0.7  # from case to case
        places = [(case, name, k * apart + n) for k, case in enumerate(self.cases) for n, name in enumerate(self.names)]
        height = 1.6 + (0.28 if many else 0.36) * (places[-1][-1] + 1)
        figure, axes = pyplot.subplots(
            1, len(self.panels), sharey=True, squeeze=False, figsize=(10.5, height), layout="constrained"
        )
        roles = {line.name: line.role for line in lines}
        for axis, panel in zip(axes[0], self.panels):
            shown = {(case, name): panel.values(lines, case, name) for case, name, _ in places}
            most = max((value for values in shown.values() for value in values), default=1.0)
            for case, name, place in places:
                colour = BLUE if roles.get(name) == OURS else ORANGE
                for value in shown[case, name]:
                    axis.barh(place, value, 0.86, color=colour)
                    axis.annotate(panel.text(value), (value, place), (4, 0), textcoords="offset points", va="center")
            for k, case in enumerate(self.cases if self.floor else ()):
                ends = [k * apart - 0.55, k * apart + len(self.names) - 0.45]
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
            middle = (len(self.names) - 1) / 2
            where = {told: k * apart + middle for k, told in enumerate(self.cases.values())}
        else:
            where = {told: place for told, (_, _, place) in zip(self.names.values(), places)}
        axes[0][0].set_yticks(list(where.values()), list(where))
        figure.suptitle(f"{self.title}\n", x=0.01, ha="left", fontsize=12.5, fontweight="bold", linespacing=0.6)
        figure.supxlabel(self.told(lines), x=0.01, ha="left", fontsize=8.5, color="#666666")
        self.legend(figure, roles, many)
        return figure

    def legend(self, figure: Any, roles: dict[str, str], many: bool) -> None:
        handles: list[Any] = []
        if many:
            colours = {told: BLUE if roles.get(name) == OURS else ORANGE for name, told in self.names.items()}
            handles = [pyplot.Rectangle((0, 0), 1, 1, color=colour, label=told) for told, colour in colours.items()]
        if roles.get(self.floor) == FLOOR:
            handles.append(pyplot.Line2D([], [], color=INK, linestyle=(0, (3, 2)), label=self.floor_is))
        if handles:
            figure.legend(
                handles=handles, loc="lower right", ncols=len(handles), frameon=False, fontsize=9, borderpad=0.1
            )

    def told(self, lines: Sequence[Line]) -> str:
        """What it was measured on."""
        of_cases = [line for line in lines if line.case in self.cases]
        device, torch = (", ".join(sorted({getattr(line, key) for line in of_cases})) for key in ("device", "torch"))
        return f"{device}, torch {torch}. Less is better everywhere."


US = "chunked-embed"
SBERT = "sentence-transformers"
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
        "InfoNCE of 65,536 pairs x 1024: every other pair is a negative",
        {"InfoNCE 65536x1024, bfloat16": "InfoNCE"},
        {
            "CF.info_nce": US,
            "Liger fused linear CE": "Liger",
            "cut-cross-entropy": "cut-cross-entropy",
            SBERT: SBERT,
            "sentence-transformers cached, 1024": f"{SBERT},\ncached",
        },
        floor="floor: 3 products, chunks of 2048",
    ),
    "token_losses": Figure(
        "Cross-entropy of 8,192 tokens through a head of 128,256 x 4096",
        {"cross-entropy, 8192 tokens, V=128256, H=4096, bfloat16": "cross-entropy"},
        {
            "loss_fn, row-wise": f"{US},\na loss_fn of one line",
            "torch, whole logits": "torch, whole logits",
            "Liger fused linear CE": "Liger",
            "cut-cross-entropy": "cut-cross-entropy",
        },
        floor="floor: 3 products",
    ),
    "preference": Figure(
        "DPO of 4 pairs x 1,024 tokens, reference included, head of 128,256 x 4096",
        {"DPO, 4 pairs x 1024, V=128256, H=4096, bfloat16": "DPO"},
        {
            "DPOLoss": US,
            "TRL fused head": "TRL",
            "Liger, chunks of 1 pair": "Liger",
            "torch, whole logits": "torch, whole logits",
        },
        (TIME, MEMORY, Panel("value_error / value_mean", "reward margin off by", percent=True)),
        floor="floor: 4 products",
    ),
    "distillation": Figure(
        "Jensen-Shannon divergence from a teacher: 8,192 tokens, a vocabulary of 128,256",
        {"JSD, 8192 tokens, V=128256, H=2048 from 4096, bfloat16": "JSD"},
        {"JSDLoss": US, "TRL": "TRL", "Liger, chunked": "Liger, chunked", "Liger, Triton": "Liger, Triton"},
        floor="floor: 4 products, chunks of 2048",
    ),
    "trainers": Figure(
        "TRL's trainers and ours: Llama of 4 layers, vocabulary of 128,256",
        {f"{loss}, full, bfloat16": loss for loss in ("DPO", "KTO", "CPO", "ORPO", "GKD")},
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
