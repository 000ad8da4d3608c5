"""A small library of Python code, made of word lists: what the examples learn in tests, the same on every machine.

Ten packages of a hundred functions. Names abbreviate (``calc_ovn``), docstrings do not ("Compute all ovens ..."), so
which docstring belongs to which function can be guessed in part, and learned.
"""

from __future__ import annotations

import random
from pathlib import Path

VERBS = {  # in names: in docstrings, in both moods
    "get": ("Return", "Returns"),
    "calc": ("Compute", "Computes"),
    "make": ("Create", "Creates"),
    "drop": ("Remove", "Removes"),
    "load": ("Read", "Reads"),
    "dump": ("Write", "Writes"),
    "find": ("Search", "Searches"),
    "cp": ("Copy", "Copies"),
    "mv": ("Move", "Moves"),
    "fix": ("Repair", "Repairs"),
    "cmp": ("Compare", "Compares"),
    "chk": ("Check", "Checks"),
}
NOUNS = {  # a package: its things
    "bakery": "loaves ovens recipes crusts rolls cakes orders trays",
    "clinic": "patients wards nurses doses scans beds charts visits",
    "farm": "fields tractors sheep crops barns fences seeds harvests",
    "harbour": "ferries cranes berths pilots cargoes buoys anchors tides",
    "library": "books shelves readers loans fines authors catalogues journals",
    "museum": "paintings statues guides tickets galleries coins donors frames",
    "orchestra": "violins scores rehearsals conductors concerts solos drums choirs",
    "railway": "trains signals bridges drivers fares tunnels platforms delays",
    "school": "pupils lessons teachers grades desks exams terms parents",
    "theatre": "actors scenes costumes plays curtains seats critics rows",
}
HOW = {  # a parameter: what the docstring says about it
    "day": "of one day",
    "limit": "up to a limit",
    "since": "that are new since then",
    "region": "within a region",
    "sort": "in sorted order",
    "owner": "that someone owns",
    "price": "by their price",
    "color": "of that color",
    "name": "by name",
    "age": "older than that",
    "size": "of any size",
    "path": "below a path",
}
FUNCTIONS = 100  # a package
MODULES = 5


def write(folder: Path, seed: int = 0) -> Path:
    rng = random.Random(seed)
    for package, nouns in NOUNS.items():
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").touch()
        combinations = [(verb, noun, how) for verb in VERBS for noun in nouns.split() for how in HOW]
        chosen = rng.sample(combinations, FUNCTIONS)
        for module in range(MODULES):
            code = "\n\n".join(_function(*names, rng) for names in chosen[module::MODULES])
            (folder / package / f"part{module}.py").write_text(code)
    return folder


def _function(verb: str, noun: str, how: str, rng: random.Random) -> str:
    mood = rng.random() < 0.3
    summary = f"{VERBS[verb][mood]} {rng.choice(['all', 'the', 'those'])} {noun} {HOW[how]}."
    short = noun[0] + "".join(letter for letter in noun[1:-1] if letter not in "aeiou")[:3]
    others = ", ".join(rng.sample(sorted({*NOUNS} - {noun}), 3))
    body = f"Where there are no {noun}, nothing happens. See also what is said about the {how} in {others}."
    return f'def {verb}_{short}({how}):\n    """{summary}\n\n    {body}\n    """\n'
