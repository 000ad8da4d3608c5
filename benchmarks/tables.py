"""The tables of docs/benchmarks.md, from the csv files beside this script: no figure there is written by hand.

    python benchmarks/tables.py            # writes them between their marks
    python benchmarks/tables.py --check    # says whether they are what the files say

A mark is `<!-- figures: NAME -->`, and `<!-- end -->` behind the table.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from measure import FLOOR, HALF, OURS, PEER, RESULTS, Line, read_csv

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
MARK = re.compile(r"(<!-- figures: (?P<name>[\w-]+) -->\n)(?P<body>.*?)(<!-- end -->)", re.S)
MISSING = "**TODO: not measured yet.**\n"
DEVICE = "nvidia-h100-80gb-hbm3"
CPU = "cpu-x86-64"


# --- what a cell says ---


def number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 10 else f"{value:.2g}"


def ms(line: Line) -> str:
    return number(line.ms) or line.note


def ms_ratio(line: Line) -> str:
    ratio = "" if line.floor_ratio is None or line.role == FLOOR else f" ({line.floor_ratio:.2f})"
    return f"{number(line.ms)}{ratio}" if line.ms else line.note


def ratio(line: Line) -> str:
    return "" if line.floor_ratio is None else f"{line.floor_ratio:.2f}"


def gradients(line: Line) -> str:
    return "" if line.gradient_error is None else f"{line.gradient_error:.1e}".replace("e-0", "e-")


def value(line: Line) -> str:
    if line.value_error is None:
        return ""
    return f"{line.value_error:.1e} of {number(line.value_mean)}".replace("e-0", "e-")


def beside(line: Line) -> str:
    """A ratio of medians, and the microseconds between them."""
    if line.floor_ratio is None or line.more_us is None:
        return "" if line.ms else line.note
    return f"{line.floor_ratio:.2f} ({line.more_us:+,.0f})"


def span(line: Line) -> str:
    return "" if line.least_ratio is None else f"{line.least_ratio:.2f} to {line.most_ratio:.2f}"


QUANTITIES: dict[str, Callable[[Line], str]] = {
    "ms": ms,
    "ms (x floor)": ms_ratio,
    "x floor": ratio,
    "x spread": ratio,
    "ratio (μs)": beside,
    "ratios of its parts": span,
    "GiB": lambda line: number(line.peak_gib),
    "first s": lambda line: number(line.first_s),
    "error of gradients": gradients,
    "error of the value": value,
    "error of margins": value,
    "error, nats": value,
    "error of the loss": value,
    "difference": value,
    "": lambda line: line.note,
}


# --- the tables ---


@dataclass(frozen=True)
class Table:
    """Lines of a file, by the titles of their cases.

    `row`, `column` and `under` (a row of its own above others) are formats of the groups of `cases`, of `case`, `name`
    and `who`, the name with ours called "ours".
    """

    family: str
    cases: str  # of the whole title
    quantities: tuple[str, ...]
    names: str = ".*"
    under: str = "{case}"
    row: str = "{name}"
    column: str = ""
    device: str = ""  # where it is not the page's

    def render(self, lines: Sequence[Line]) -> str:
        rows: dict[tuple[str, str], dict[str, str]] = {}
        headings: dict[str, None] = {}
        for line in lines:
            found = re.fullmatch(self.cases, line.case)
            if found is None or not re.fullmatch(self.names, line.name):
                continue
            told = {**found.groupdict(), "case": line.case, "name": line.name, "who": who(line)}
            column = self.column.format(**told)
            cells = rows.setdefault((self.under.format(**told), self.row.format(**told)), {})
            for quantity in self.quantities:
                parts = (quantity, column) if len(self.quantities) > 1 or not column else (column,)
                heading = ", ".join(part for part in parts if part)
                headings[heading] = None
                cells[heading] = QUANTITIES[quantity](line)
            if not any(cells.values()):  # one that failed
                cells[next(iter(headings))] = line.note
        if not rows:
            return MISSING
        used = [h for h in headings if any(cells.get(h) for cells in rows.values())]
        table, above = [["", *used], ["---", *["---:"] * len(used)]], ""
        for (under, label), cells in rows.items():
            if under != above:
                table.append([f"**{under}**", *[""] * len(used)])
                above = under
            table.append([label, *(cells.get(heading, "") for heading in used)])
        return "".join(f"| {' | '.join(row)} |\n" for row in table)


def who(line: Line) -> str:
    if line.role == PEER:
        return line.name
    kind = "ours" if line.role == OURS else "floor"
    return kind + next((f", {more}" for more in (HALF, "float32 outputs") if more in line.name), "")


def small_tables(device: str) -> dict[str, Table]:
    """Of ordinary sizes: on the page's device, and on a CPU."""
    suffix = "-cpu" if device else ""
    alone = r"alone, (?P<loss>.*), (?P<rows>\d+)x(?P<width>\d+), float32"
    steps = r"step, (?P<loss>.*), (?P<pairs>\d+) pairs of .*"
    times = ("ms", "ratio (μs)", "ratios of its parts")
    like = {"row": "{loss}", "device": device}
    return {
        f"small-alone{suffix}": Table(
            "small", alone, ("ratio (μs)",), "ours", "width {width}", column="{rows} rows", **like
        ),
        f"small-step{suffix}": Table("small", steps, times, under="{pairs} pairs", column="{name}", **like),
        f"small-head{suffix}": Table(
            "small", r"head, (?P<what>.*)", (*times, "GiB", "error of the value"), under="{what}", device=device
        ),
        f"small-engine{suffix}": Table(
            "small",
            r"engine, (?P<loss>.*), (?P<rows>\d+) rows",
            ("ratio (μs)",),
            "ours",
            under="",
            column="{rows} rows",
            **like,
        ),
        f"small-chunks{suffix}": Table(
            "small", r"engine, (?P<loss>.*), 16 rows", ("ms",), under="", column="{name}", **like
        ),
        f"small-first{suffix}": Table(
            "small", r"first call, (?P<loss>.*), \d+ rows", ("first s",), under="", column="{name}", **like
        ),
    }


TRAINING = r"(?P<loss>\w+, (full|LoRA), \w+(, FSDP2 on \d+)?)"
SPLIT = r"(?P<loss>.*, split over two)"
SWAPPED = r"(?P<loss>\w+, \w+)"
LONG = ("ms", "x floor", "GiB", "error of gradients")
PREFERENCE = r"(?P<loss>[\w-]+), 4 pairs x 1024, V=32000, H=2048, bfloat16"
TABLES = {
    "embedding": Table(
        "embedding",
        r"(?P<loss>[\w-]+) (?P<rows>\d+x\d+) bfloat16",
        ("ms", "GiB", "error of gradients"),
        names="ours|sentence-transformers",
        under="{rows}",
        row="{loss}",
        column="{name}",
    ),
    "projected": Table(
        "embedding",
        r"(?P<loss>[\w-]+) (?P<rows>\d+x\d+) (?P<dtype>\w+) projected",
        (*LONG, "error of the loss"),
        under="{loss}, {dtype}",
        row="{who}",
    ),
    "contrastive": Table("contrastive", r"(InfoNCE|symmetric|GTE|sigmoid|Matryoshka|GIST).*", LONG),
    "near-duplicates": Table(
        "contrastive",
        r"near duplicates, (?P<loss>.+), scale (?P<scale>\d+) .*",
        ("error of gradients",),
        under="{loss}",
        column="scale {scale}",
    ),
    "mined": Table(
        "contrastive",
        r"(?P<loss>(mega-batch|batch-).*) (?P<rows>\d+x\d+), bfloat16",
        ("ms", "GiB"),
        under="{rows}",
        row="{loss}",
        column="{name}",
    ),
    "mined-errors": Table(
        "contrastive",
        r"errors, (?P<loss>.*) (?P<rows>\d+x\d+), bfloat16",
        ("error of gradients",),
        under="",
        row="{loss}, {rows}",
        column="{name}",
    ),
    "step": Table("contrastive", r"training step.*", ("ms", "GiB")),
    "tokens": Table("token-losses", r"(log-prob|cross-ent).*", (*LONG, "error, nats")),
    "weight": Table("token-losses", r"weight gradient.*", ("error of gradients", "")),
    "dpo": Table("preference", r"DPO, .*", (*LONG, "error of margins")),
    "logps": Table("preference", r"log-probabilities.*", (*LONG, "error, nats")),
    "losses": Table("preference", PREFERENCE, ("ms (x floor)", "GiB"), under="", row="{loss}", column="{who}"),
    "losses-errors": Table(
        "preference",
        PREFERENCE,
        ("error of gradients", "error of margins"),
        names="(?!floor).*",
        under="",
        row="{loss}",
        column="{who}",
    ),
    "steps": Table("preference", r"(ORPO|CPO) step.*", (*LONG, "error of the loss")),
    "distillation": Table("distillation", r"(JSD|KL|reverse KL).* 8192 tokens.*", (*LONG, "error of the loss")),
    "divergences": Table(
        "distillation",
        r"(?P<loss>.*), 4096 tokens.*",
        ("ms (x floor)", "GiB", "error of gradients", "error of the loss"),
        names="(?!floor).*",
        under="",
        row="{loss}",
    ),
    "trainers": Table("trainers", TRAINING, ("ms", "GiB", "first s"), under="", row="{loss}", column="{name}"),
    "trainers-curves": Table(
        "trainers",
        r"(?P<quantity>losses|margins), (?P<loss>(?!.* split over).*)",
        ("difference",),
        under="{loss}",
        row="{quantity}",
        column="{name}",
    ),
    "trainers-split": Table("trainers", SPLIT, ("GiB", "difference"), under="", row="{loss}", column="{name}"),
    "swap": Table("swap", SWAPPED, ("ms", "GiB"), under="", row="{loss}", column="{name}"),
    "swap-curves": Table(
        "swap", rf"losses, {SWAPPED}", ("difference", "x spread"), under="", row="{loss}", column="{name}"
    ),
    "ranks": Table("swap-ranks", r"(?P<loss>\w+, .*) rows, bfloat16", ("ms", "GiB"), under="{loss}"),
    "ranks-errors": Table(
        "swap-ranks",
        r"errors, (?P<loss>.*) rows, float32",
        ("error of gradients", "error of the loss"),
        under="",
        row="{loss}",
        column="{name}",
    ),
    **{name: table for device in ("", CPU) for name, table in small_tables(device).items()},
}


WHERE = {"where": "", "where-cpu": CPU}  # marks -> the device, where it is not the page's


def where(lines: Sequence[Line]) -> str:
    """What was measured on, and when."""
    if not lines:
        return MISSING
    told = {key: sorted({getattr(line, key) for line in lines}) for key in ("device", "torch", "triton", "date")}
    library = sorted({line.sentence_transformers for line in lines})
    days = " to ".join(dict.fromkeys((told["date"][0], told["date"][-1])))
    versions = f"torch {', '.join(told['torch'])}, triton {', '.join(told['triton'])}"
    return f"{', '.join(told['device'])}; {versions}, sentence-transformers {', '.join(library)}; {days}.\n"


def rendered(page: str, folder: Path = RESULTS, device: str = DEVICE) -> str:
    """The page with the tables that the files say."""
    files: dict[tuple[str, str], list[Line]] = {}  # family, device
    for family, other in dict.fromkeys((table.family, table.device) for table in TABLES.values()):
        files[family, other] = read_csv(folder / f"{family}-{other or device}.csv")

    def table(found: re.Match[str]) -> str:
        name = found["name"]
        if name in WHERE:
            body = where([line for (_, of), lines in files.items() if of == WHERE[name] for line in lines])
        elif name in TABLES:
            body = TABLES[name].render(files[TABLES[name].family, TABLES[name].device])
        else:
            raise SystemExit(f"expected figures among {[*WHERE, *TABLES]}, got {name!r}")
        return f"{found[1]}\n{body}\n{found[4]}"

    return MARK.sub(table, page)


def main(
    check: Annotated[bool, typer.Option("--check", help="write nothing; exit with 1 where they differ")] = False,
    device: Annotated[str, typer.Option(help="as in the names of the files")] = DEVICE,
    folder: Annotated[Path, typer.Option("--out", envvar="BENCH_OUT", help="folder of the csv files")] = RESULTS,
) -> None:
    old = PAGE.read_text()
    new = rendered(old, folder, device)
    if check and new != old:
        raise SystemExit(f"{PAGE.name} does not say what the files say: python benchmarks/tables.py")
    if not check:
        PAGE.write_text(new)


if __name__ == "__main__":
    typer.run(main)
