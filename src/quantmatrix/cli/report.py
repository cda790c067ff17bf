"""quantmatrix report: render the support matrix from claims and evidence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantmatrix.cli.output import add_command, print_json
from quantmatrix.exit_codes import EXIT_PROBLEM

if TYPE_CHECKING:
    import argparse
    from typing import Any


def _add_report(commands: Any) -> None:
    parser = add_command(commands, "report", "render the support matrix from evidence", run_report)
    parser.add_argument("--check", action="store_true", help="write nothing; fail on any drift")
    parser.add_argument("--reports", help="folder of the reports (default: reports)")
    parser.add_argument("--json", action="store_true")


def run_report(arguments: argparse.Namespace, rest: list[str]) -> int:
    """`quantmatrix report`."""
    from quantmatrix.report import render

    drift = render.check(arguments.reports) if arguments.check else render.write(arguments.reports)
    if arguments.json:
        print_json({"ok": not (arguments.check and drift), "files": drift})
    elif arguments.check and not drift:
        print("reports agree with claims and evidence")
    else:
        print("\n".join(drift))
    return EXIT_PROBLEM if arguments.check and drift else 0
