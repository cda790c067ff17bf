"""`quantmatrix recommend`: which checkpoint of a model to use on a hardware, ranked."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quantmatrix.report.answers import Option
    from quantmatrix.report.recommend import Recommendation

HEAD = (
    "",
    "checkpoint",
    "family",
    "kernel",
    "proof",
    "error",
    "step / BF16",
    "weights",
    "peak",
    "memory",
)
SHOWN = 8
"""Lines of the table for people; `--json` has all."""
NOTE = "Weights and peak are of the transformers alone: text encoders and VAE come on top."


def add_to(commands: Any) -> None:
    """Add the parser."""
    from quantmatrix.cli.output import add_command

    text = (
        "choose a quantized checkpoint for your card: ranked, with error, speed, memory and command"
    )
    parser = add_command(commands, "recommend", text, run_recommend)
    parser.add_argument("--hardware", required=True, help="a row of hardware.csv, or `auto`")
    parser.add_argument("--model", help="a row of models.csv (default: the best of each)")
    parser.add_argument(
        "--memory-gib", type=float, metavar="N", help="memory of one device (default: the row's)"
    )
    parser.add_argument(
        "--prefer",
        choices=("quality", "speed", "memory"),
        default="quality",
        help="what decides among checkpoints that fit and are proven equally (default: quality)",
    )
    parser.add_argument("--reports", help="folder of the reports (default: reports)")
    parser.add_argument("--json", action="store_true")


def run_recommend(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Print the ranked answer; 1 where nothing can be recommended, with the reason."""
    from quantmatrix.cli.output import print_json, say
    from quantmatrix.exit_codes import EXIT_PROBLEM
    from quantmatrix.report import recommend
    from quantmatrix.tables import read

    tables = read.read()
    hardware = recommend.find_hardware(tables, arguments.hardware).id
    names = [recommend.find_model(tables, arguments.model)] if arguments.model else [*tables.models]
    known = recommend.read_answers(tables, arguments.reports)
    settings = (arguments.memory_gib, arguments.prefer)
    found = [recommend.recommend(known, tables, hardware, name, *settings) for name in names]
    if arguments.json:
        print_json(
            {"ok": all(one.usable for one in found), "answers": [a.to_json() for a in found]}
        )
    else:
        shown = SHOWN if arguments.model else 1
        say("\n\n".join([*(write_answer(one, shown) for one in found), NOTE]))
    return 0 if any(one.usable for one in found) else EXIT_PROBLEM


def write_answer(found: Recommendation, shown: int) -> str:
    """An answer for people: the table, and the commands of the best."""
    from quantmatrix.report import recommend

    memory = f", {found.memory_gib:g} GiB" if found.memory_gib else ""
    title = f"{found.model} on {found.hardware}{memory}, by {found.prefer}"
    if found.reason:
        return f"{title}: nothing\n  {found.reason}"
    lines = [HEAD, *(list_cells(n, *pair) for n, pair in enumerate(found.ranked[:shown], 1))]
    left = len(found.ranked) - shown
    more = [f"  and {left} more: --model {found.model} --json"] if left > 0 else []
    fit, best = found.ranked[0]
    commands = [f"  {command}" for command in recommend.list_commands(fit, best)]
    return "\n".join([title, *align(lines), *more, f"  1. {best.checkpoint}:", *commands])


def list_cells(number: int, fit: int, option: Option) -> tuple[str, ...]:
    """The cells of one line of `HEAD`."""
    from quantmatrix.report.answers import PROOFS
    from quantmatrix.report.ranking import FITS
    from quantmatrix.report.recommend import show_mib

    proof = option.scope_label if option.proof != 2 else PROOFS[option.proof]
    return (
        str(number),
        option.checkpoint,
        option.family,
        option.kernel,
        proof,
        show_error(option),
        f"{option.step:.2f} ({option.step_on})" if option.step is not None else "",
        show_mib(option.weights_mib),
        f"{show_mib(option.peak_mib)} ({option.peak_on})" if option.peak_mib is not None else "",
        FITS[fit],
    )


def show_error(option: Option) -> str:
    """`44.6 dB, 0.050 (h200, true size)`; empty where nothing was measured."""
    if option.relative_l2 is None:
        return ""
    near = "" if option.psnr_db is None else f"{option.psnr_db:.1f} dB, "
    return f"{near}{option.relative_l2:.3f} ({option.error_on})"


def align(lines: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their longest cell; empty columns are left out."""
    kept = [n for n in range(len(lines[0])) if any(line[n] for line in lines[1:])]
    widths = {n: max(len(line[n]) for line in lines) for n in kept}
    return [
        "  ".join(["", *(line[n].ljust(widths[n]) for n in kept)]).rstrip().removeprefix("  ")
        for line in lines
    ]
