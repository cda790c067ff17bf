"""`quantmatrix mutate`: faults injected into rows, and which gates catch them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from quantmatrix.errors import UsageError


def add_to(commands: Any) -> None:
    """Add the parser."""
    from quantmatrix.cli.output import add_command

    text = "inject faults into tiny checkpoints and confirm that the rows' checks catch them"
    parser = add_command(commands, "mutate", text, run_mutate)
    parser.add_argument("rows", nargs="*", metavar="ROW", help="rows, families, models, or globs")
    parser.add_argument(
        "--faults", nargs="+", default=[], metavar="NAME", help="inject only these faults"
    )
    what = "gates to run; plan and witness alone run no model (default: all)"
    parser.add_argument("--gates", nargs="+", default=[], metavar="GATE", help=what)
    parser.add_argument(
        "--reports",
        type=Path,
        default=Path("reports"),
        metavar="DIR",
        help="folder of the reports (default: reports)",
    )
    parser.add_argument("--write", action="store_true", help="write mutation.csv and mutation.md")
    parser.add_argument("--json", action="store_true")


def run_mutate(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Inject and judge; 1 when too much is missed.

    Raises UsageError for unknown rows, faults or gates, and for `--write` of a part of the gates.
    """
    from quantmatrix.cli.output import print_json, report_problems, report_progress
    from quantmatrix.exit_codes import EXIT_PROBLEM
    from quantmatrix.harness.mutation.judge import (
        GATES,
        Mutator,
        choose_faults,
        choose_gates,
        choose_rows,
    )
    from quantmatrix.harness.mutation.report import summarize, to_markdown, write_reports
    from quantmatrix.tables import read

    tables, gates = read.read(), choose_gates(arguments.gates)
    if arguments.write and gates != GATES:
        raise UsageError("--write keeps the result of all gates: leave --gates out")
    cells, faults = choose_rows(tables, arguments.rows), choose_faults(arguments.faults)

    mutator = Mutator(tables, arguments.reports / "limits.csv", gates)
    outcomes = mutator.run(cells, faults, report_progress)
    found = summarize(outcomes, gates)
    if arguments.write:
        for path in write_reports(outcomes, arguments.reports):
            print(f"wrote {path}", file=sys.stderr)
    if arguments.json:
        print_json(found)
    else:
        print(to_markdown(outcomes))
    report_problems(found["problems"])
    return EXIT_PROBLEM if found["problems"] else 0
