"""What is installed and runs here; ``plan``: what a loss would take; ``doctor``: what is wrong.

With argparse: the package needs torch alone, and typer comes with the extra [demo].
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence

import torch

from . import __version__, diagnose, kernels, planning
from .engine.plan import size_text

DTYPES = ("float32", "bfloat16", "float16", "float64")


def parser() -> argparse.ArgumentParser:
    of_all = argparse.ArgumentParser("python -m chunked_embed", description=__doc__.split("\n")[0].replace("``", ""))
    commands = of_all.add_subparsers(dest="command", metavar="{plan,doctor}")
    plan = commands.add_parser(
        "plan",
        help="what a loss would take, from its sizes alone",
        description="Print the plan of a loss, beside what its outputs would take whole. Nothing is allocated.",
        epilog="Losses: "
        "of embeddings (rows are pairs) info_nce, cosent, triplet, ...; "
        "of tokens and an LM head cross_entropy, linear_logps; preferences dpo, kto, orpo, ...; "
        "a student and a teacher kl, jsd, ...  A name that there is not brings the list.",
    )
    plan.add_argument("rows", type=int, metavar="ROWS", help="tokens, or pairs of embeddings")
    plan.add_argument("width", type=int, metavar="WIDTH", help="of hidden states or embeddings")
    plan.add_argument(
        "columns",
        type=int,
        nargs="?",
        metavar="VOCABULARY",
        help="of the LM head; for a loss of embeddings, the outputs of a Dense layer, if there is one",
    )
    plan.add_argument("--loss", default="cross_entropy", help="by its name (cross_entropy)")
    plan.add_argument("--dtype", default="bfloat16", choices=DTYPES, help="of rows and weight (bfloat16)")
    plan.add_argument("--device", help="cpu or cuda, which need not be here (a GPU, if there is one)")
    plan.add_argument("--frozen", action="store_true", help="the weight gets no gradient")
    plan.add_argument("--sequences", type=int, help="among which the tokens are divided (of 1024 tokens at most each)")
    plan.add_argument("--ref-logps", action="store_true", help="the reference's log-probabilities are precomputed")
    plan.add_argument("--chunk-size", type=int, help="rows of a chunk")
    plan.add_argument("--max-chunk-bytes", type=int, help="budget of a chunk")
    plan.add_argument("--compiled", action=argparse.BooleanOptionalAction, help="by default where it pays")
    plan.add_argument(
        "--float32-outputs", action=argparse.BooleanOptionalAction, default=True, help="as for the losses"
    )
    commands.add_parser(
        "doctor",
        help="what goes wrong in practice, with remedies",
        description="Look for what goes wrong in practice: a sentence each. Exit status 1 where something is found.",
    )
    return of_all


def main(arguments: Sequence[str] | None = None) -> int:
    of_all = parser()
    given = of_all.parse_args(arguments)
    if given.command == "doctor":
        return show_findings()
    if given.command == "plan":
        try:
            show_plan(given)
        except (ValueError, TypeError, ImportError) as error:
            of_all.exit(2, f"{of_all.prog} plan: {error}\n")
        return 0
    show_report()
    return 0


def show_plan(given: argparse.Namespace) -> None:
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    problem = planning.Problem(
        rows=given.rows,
        width=given.width,
        columns=given.columns,
        dtype=getattr(torch, given.dtype),
        sequences=given.sequences,
        frozen=given.frozen,
        precomputed=given.ref_logps,
    )
    options = {name: getattr(given, name) for name in ("chunk_size", "max_chunk_bytes", "compiled", "float32_outputs")}
    plan = planning.plan(given.loss, problem, device, **options)
    there = "" if device == "cpu" or torch.cuda.is_available() else ", which is not here: taken to have Triton"
    print(f"loss          {given.loss}, {given.dtype}, on {device}{there}")
    print(plan)
    whole = planning.plain_bytes(given.loss, plan)
    if whole:
        print(f"held whole    {size_text(whole)}: outputs in float32 and their gradient, which the plain way has")


def show_report() -> None:
    print(f"chunked-embed {__version__}, Python {platform.python_version()}, {platform.platform()}")
    print("\nversions")
    for name, (version, asked, within) in sorted(diagnose.versions().items()):
        told = "" if version is None or within else f"  (expected {asked})"
        print(f"  {name:24}{version or 'not installed'}{told}")
    print(f"  {'CUDA of torch':24}{torch.version.cuda or torch.version.hip or 'none, a build for CPUs'}")
    print(f"  {'driver':24}{diagnose.driver() or 'none found'}")
    print("\ncompilers")
    print(f"  {'C':24}{kernels.c_compiler() or 'none found: no Triton'}")
    print(f"  {'C++':24}{diagnose.cxx_compiler() or 'none found: steps on a CPU run uncompiled'}")
    print("\ndevices and kernels")
    for device, what in diagnose.devices():
        print(f"  {device!s:24}{what}")
        found = diagnose.kernels_on(device)
        for refusal in dict.fromkeys(found.values()):
            steps = ", ".join(name for name, told in found.items() if told == refusal)
            print(f"    {steps}: {'in use' if refusal is None else f'not in use, {refusal}; plain functions run'}")
    print("\nextras")
    known = diagnose.installed(diagnose.DISTRIBUTION) is not None
    for name, missing in diagnose.extras().items():
        said = f"not installed: {', '.join(missing)} (pip install 'chunked-embed[{name}]')" if missing else "installed"
        said = said if known else f"not known, since {diagnose.DISTRIBUTION} is not installed"
        print(f"  {name:24}{said}\n  {'':24}{diagnose.EXTRAS[name]}")
    print("\npython -m chunked_embed doctor looks for what is wrong; plan --help says what a loss would take.")


def show_findings() -> int:
    findings = diagnose.doctor()
    for finding in findings:
        print(f"- {finding}")
    print("nothing found" if not findings else f"{len(findings)} found")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
