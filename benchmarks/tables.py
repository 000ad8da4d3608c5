"""The tables of docs/benchmarks.md, and figures in the text of README and docs, from the csv files beside this script.

    python benchmarks/tables.py            # writes them
    python benchmarks/tables.py --check    # says whether they are what the files say
    python benchmarks/tables.py --untied   # lists times and sizes in a text that name no source

A table's mark is `<!-- figures: NAME -->`, and `<!-- end -->` behind it. Figures in a text have their sources in a
comment below, one a line and in the text's order:

    <!-- sources:
    takes 52 ms | contrastive | InfoNCE 65536x1024, bfloat16 | CF.info_nce | ms
    1.4 GiB     |             |                              |             | peak_gib
    by 25%      | contrastive | near duplicates, *100*       | Liger*      | most gradient_error
    costs 26%   | contrastive | InfoNCE 65536x1024, bfloat16 | ours over theirs | ms
    -->

That is: words of the text, whose last number is the figure; family, case and name of a line of a csv, empty where they
are those of the line above; and a column, or a quotient of two (`value_error / value_mean`). Two names are compared, in
each case that has both: `ours / theirs`, `ours - theirs`, or `ours over theirs`, what ours takes more as a share. `*`
stands for anything: with it "least" or "most" says which. A family is followed by `@ cpu-x86-64` where the device is
not the page's. The figure keeps its form: as many decimals as it has, `%` for a share, `1e-4` for a power of ten.
"""

import fnmatch
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Annotated

import typer
from measure import FLOOR, HALF, OURS, PEER, RESULTS, Line, read_csv
from targets import TARGETS, Target

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
MARK = re.compile(r"(<!-- figures: (?P<name>[\w-]+) -->\n)(?P<body>.*?)(<!-- end -->)", re.S)
MISSING = "**TODO: not measured yet.**\n"
DEVICE = "nvidia-h100-80gb-hbm3"
CPU, H200 = "cpu-x86-64", "nvidia-h200"


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
    "error of embeddings": value,
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


TRAINING = r"(?P<loss>[\w ]+, (full|LoRA), \w+(, FSDP2 on \d+)?)"
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
    "confident": Table(
        "contrastive",
        r"confident InfoNCE (?P<rows>\d+x\d+), bfloat16",
        ("error of gradients",),
        under="",
        column="{rows}",
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
    "sparse": Table("sparse", r"SPLADE.*", (*LONG, "error of embeddings")),
    "sparse-losses": Table(
        "sparse-losses",
        r"(?P<loss>splade|margins|order|flops|flops above 366) (?P<rows>\d+)x.*, (?P<dtype>autocast|bfloat16)",
        ("ms", "GiB"),
        names="ours|sentence-transformers",
        under="{dtype}",
        row="{loss}, {rows}",
        column="{name}",
    ),
    "sparse-steps": Table(
        "sparse-losses",
        r"training step, (?P<rows>\d+)x.*, (?P<dtype>\w+)",
        ("ms", "GiB"),
        under="{dtype}",
        row="{rows}",
        column="{name}",
    ),
    "late-interaction": Table("late-interaction", r"MaxSim contrast.*", (*LONG, "error of the loss")),
    "late-pairs": Table("late-interaction", r"(MaxSim of own|XTR).*", ("ms", "GiB", "error of gradients")),
    "dpo": Table("preference", r"DPO, .*", (*LONG, "error of margins")),
    "dpo-h200": Table("preference", r"DPO, .*", (*LONG, "error of margins"), device=H200),
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
    "policy": Table("preference", r"(GRPO|GSPO).*", (*LONG, "error of the loss")),
    "steps": Table("preference", r"(DPO|ORPO|CPO) step.*", (*LONG, "error of the loss")),
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
        r"(?P<quantity>losses|margins|entropies), (?P<loss>(?!.* split over).*)",
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
    "gathered": Table(
        "swap-ranks", r"gathered InfoNCE.*", ("ms", "GiB", "error of gradients", "error of the loss"), device=H200
    ),
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


WHERE = {"where": "", "where-cpu": CPU, "where-h200": H200}  # marks -> the device, where it is not the page's


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
    """The page with the tables that the files say, and with their figures in its text."""
    read = cache(lambda family, other: read_csv(folder / f"{family}-{other or device}.csv"))

    def table(found: re.Match[str]) -> str:
        name = found["name"]
        if name in WHERE:
            files = {(spec.family, spec.device) for spec in TABLES.values() if spec.device == WHERE[name]}
            body = where([line for file in sorted(files) for line in read(*file)])
        elif name == "targets":
            body = targets(read)
        elif name in TABLES:
            body = TABLES[name].render(read(TABLES[name].family, TABLES[name].device))
        else:
            raise SystemExit(f"expected figures among {['targets', *WHERE, *TABLES]}, got {name!r}")
        return f"{found[1]}\n{body}\n{found[4]}"

    return tied(MARK.sub(table, page), read)


def targets(read: "Read") -> str:
    """What is wanted, and where it is."""
    table = [["", "at most", "measured", "met"], ["---", "---:", "---:", "---"]]
    for under, wanted in TARGETS.items():
        table.append([f"**{under}**", "", "", ""])
        table.extend(target_row(target, read) for target in wanted())
    return "".join(f"| {' | '.join(row)} |\n" for row in table)


def target_row(target: Target, read: "Read") -> list[str]:
    source = Source("", *target.source)
    if not source.values(read):
        return [target.what, told(target.most, target.unit), "not yet", ""]
    value = source.value(read)
    return [
        target.what,
        told(target.most, target.unit),
        told(value, target.unit),
        "yes" if value <= target.most else "**no**",
    ]


def told(value: float, unit: str) -> str:
    if unit == "%":
        return f"{100 * value:.2g}%"
    return f"{value:.2f} x" if unit == "x" else f"{number(value)} {unit}"


# --- figures in a text ---


SOURCES = re.compile(r"<!-- sources:\n(?P<lines>.*?)-->", re.S)
FIGURE = re.compile(r"\d[\d,]*(\.\d+)?(e[+-]?\d+)?")
SHARE = re.compile(rf"%|\s+to\s+{FIGURE.pattern}%")  # 4%, and 4 of "4 to 77%"
NOT_TEXT = re.compile(rf"{MARK.pattern}|<!--.*?-->|```.*?```|^(?: {{4}}|\t).*?$|`[^`\n]+`", re.S | re.M)
MEASURED = re.compile(r"\d[\d,.]*\s+(?:ms|GiB)\b")  # what a text claims
Read = Callable[[str, str], list[Line]]
COMPARED: dict[str, Callable[[float, float], float]] = {
    " / ": lambda ours, theirs: ours / theirs,
    " - ": lambda ours, theirs: ours - theirs,
    " over ": lambda ours, theirs: ours / theirs - 1,
}


@dataclass(frozen=True)
class Source:
    """A line of a comment: words of the text above it, and where their figure is from."""

    words: str
    family: str
    case: str
    name: str
    column: str

    def values(self, read: Read) -> list[float]:
        family, _, device = self.family.partition(" @ ")
        _, column = self.which
        name, *other = re.split(rf"({'|'.join(map(re.escape, COMPARED))})", self.name)

        def of(name: str) -> Iterator[tuple[str, float]]:
            for line in read(family, device):
                if fnmatch.fnmatchcase(line.case, self.case) and fnmatch.fnmatchcase(line.name, name):
                    value = quantity(line, column)
                    if value is not None:
                        yield line.case, value

        values = [value for _, value in of(name)]
        if other:
            compare, others = COMPARED[other[0]], dict(of(other[1]))
            values = [compare(value, others[case]) for case, value in of(name) if case in others]
        return values

    @property
    def which(self) -> tuple[str, str]:
        """Of several lines, and the column."""
        first, _, rest = self.column.partition(" ")
        return (first, rest) if first in ("least", "most") else ("", self.column)

    def value(self, read: Read) -> float:
        values, (which, _) = self.values(read), self.which
        if not values or (len(values) > 1 and not which):
            expected = "one line or more" if which else "one line"
            raise SystemExit(f"expected {expected} of a csv for {self}, got {len(values)}")
        return min(values) if which == "least" else max(values)

    def written(self, read: Read, behind: str) -> str:
        """Its words, with what the csv says. `behind`: how the text goes on."""
        *_, figure = FIGURE.finditer(self.words)
        value = self.value(read) * (100 if SHARE.match(self.words[figure.end() :] + behind) else 1)
        decimals, comma = len(figure[1] or ".") - 1, "," if "," in figure[0] else ""
        told = f"{value:.{decimals}e}".replace("e-0", "e-") if figure[2] else f"{value:{comma}.{decimals}f}"
        return self.words[: figure.start()] + told + self.words[figure.end() :]

    @property
    def pattern(self) -> re.Pattern[str]:
        """Its words wherever a line ends, and not as a part of a longer number."""
        words = r"\s+".join(map(re.escape, self.words.split()))
        return re.compile(rf"(?<![\d.,]){words}(?!\d|[.,]\d)")


def sources(lines: str) -> list[Source]:
    found: list[Source] = []
    for line in lines.strip().splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) != 5 or not FIGURE.search(cells[0]):
            raise SystemExit(f"expected `words with a figure | family | case | name | column`, got {line!r}")
        above = [found[-1].family, found[-1].case, found[-1].name] if found else cells[1:4]
        found.append(Source(cells[0], *(cell or old for cell, old in zip(cells[1:4], above)), cells[4]))
    return found


def quantity(line: Line, column: str) -> float | None:
    """Of a column, or of a quotient of two."""
    names = column.split(" / ")
    if not set(names) <= {field.name for field in fields(Line)} or len(names) > 2:
        raise SystemExit(f"expected a column of the csv, or a quotient of two, got {column!r}")
    values = [getattr(line, name) for name in names]
    return None if None in values else values[0] if len(values) == 1 else values[0] / values[1]


def text_of(page: str) -> str:
    """The page with blanks for its tables, comments and code: as long as the page is."""
    return NOT_TEXT.sub(lambda found: re.sub(r"\S", " ", found[0]), page)


def places(page: str) -> Iterator[tuple[Source, int, int]]:
    """Where the words of each source are in the text between the comment before and its own."""
    text, start = text_of(page), 0
    for comment in SOURCES.finditer(page):
        for source in sources(comment["lines"]):
            found = source.pattern.search(text, start, comment.start())
            if found is None:
                raise SystemExit(f"expected {source.words!r} in the text above its source, behind the one before")
            yield source, *found.span()
            start = found.end()
        start = comment.end()


def tied(page: str, read: Read) -> str:
    """The page with figures as the files say, in its text and in the comments."""
    edits = []
    for source, start, end in places(page):
        old, new = source.words, source.written(read, page[end:])
        if old != new:
            entry = page.index(f"\n{old}", page.index("<!-- sources:", end)) + 1
            figure, told = list(FIGURE.finditer(page[start:end]))[-1], list(FIGURE.finditer(new))[-1][0]
            edits += [(start + figure.start(), start + figure.end(), told), (entry, entry + len(old), new)]
    for start, end, new in sorted(edits, reverse=True):
        page = page[:start] + new + page[end:]
    return page


def untied(page: str) -> list[str]:
    """Times and sizes in the text that name no source."""
    spans = [range(start, end) for _, start, end in places(page)]
    found = MEASURED.finditer(text_of(page))
    return [" ".join(figure[0].split()) for figure in found if not any(figure.start() in span for span in spans)]


def pages() -> list[Path]:
    """README and docs."""
    docs = (ROOT / "docs").rglob("*.md")
    return [ROOT / "README.md", *sorted(page for page in docs if "_build" not in page.parts)]


def main(
    check: Annotated[bool, typer.Option("--check", help="write nothing; exit with 1 where they differ")] = False,
    loose: Annotated[bool, typer.Option("--untied", help="list times and sizes in a text that name no source")] = False,
    device: Annotated[str, typer.Option(help="as in the names of the files")] = DEVICE,
    folder: Annotated[Path, typer.Option("--out", envvar="BENCH_OUT", help="folder of the csv files")] = RESULTS,
) -> None:
    for page in pages():
        name, old = page.relative_to(ROOT), page.read_text()
        if loose:
            print("".join(f"{name}: {figure}\n" for figure in untied(old)), end="")
            continue
        new = rendered(old, folder, device)
        if check and new != old:
            raise SystemExit(f"{name} does not say what the files say: python benchmarks/tables.py")
        if new != old:
            page.write_text(new)


if __name__ == "__main__":
    typer.run(main)
