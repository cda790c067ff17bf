"""quantmatrix report: render the support matrix from claims and evidence."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from quantmatrix.cli.output import add_command, print_json
from quantmatrix.errors import UsageError
from quantmatrix.exit_codes import EXIT_PROBLEM

if TYPE_CHECKING:
    import argparse
    from typing import Any


TABLES = ("families", "checkpoints", "cells")
FORMATS = ("md", "rst", "html", "csv")


def _add_report(commands: Any) -> None:
    parser = add_command(commands, "report", "render the support matrix from evidence", run_report)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit code 1 when a file is out of date"
    )
    parser.add_argument("--reports", help="folder of the reports (default: reports)")
    parser.add_argument(
        "--into",
        metavar="PAGE",
        help="render only the marked tables of this page, a file of your own",
    )
    parser.add_argument(
        "--table",
        nargs="+",
        default=[],
        choices=TABLES,
        help="tables to render (default: every marked one)",
    )
    parser.add_argument(
        "--format", choices=FORMATS, help="format of the page (default: what its name says)"
    )
    parser.add_argument(
        "--columns",
        nargs="+",
        default=[],
        metavar="NAME[=TITLE]",
        help="columns of the table, in order, each with a title of your own if you like; needs one --table",
    )
    parser.add_argument("--json", action="store_true")


def run_report(arguments: argparse.Namespace, rest: list[str]) -> int:
    """`quantmatrix report`; raises UsageError for flags of a page where none is named."""
    if arguments.into:
        return run_into(arguments)
    if given := [f"--{n}" for n in ("table", "format", "columns") if getattr(arguments, n)]:
        raise UsageError(f"{given[0]} is about a page: name it with --into")
    from quantmatrix.report import render

    drift = render.check(arguments.reports) if arguments.check else render.write(arguments.reports)
    if arguments.json:
        print_json({"ok": not (arguments.check and drift), "files": drift})
    elif arguments.check and not drift:
        print("reports agree with claims and evidence")
    else:
        print("\n".join(drift))
    return EXIT_PROBLEM if arguments.check and drift else 0


def run_into(arguments: argparse.Namespace) -> int:
    """`quantmatrix report --into PAGE`; 1 where `--check` finds a difference.

    Raises UsageError for columns of no one table.
    """
    from quantmatrix.proof.joined import Joined
    from quantmatrix.report import fragments, into, render
    from quantmatrix.tables import read

    if arguments.columns and len(arguments.table) != 1:
        raise UsageError("--columns: of which table? Name one with --table")
    page = Path(arguments.into)
    form = arguments.format or into.choose_format(page)
    tables = read.read()
    joined = Joined(tables, render.read_standings(tables, arguments.reports))

    def render_table(name: str) -> str:
        return fragments.render(joined, name, form, arguments.columns)

    found = into.update(page, render_table, arguments.table, check=arguments.check)
    drift = bool(arguments.check and found)
    if arguments.json:
        print_json({"ok": not drift, "files": found})
    else:
        print("\n".join(found) or f"{page} agrees with claims and evidence")
    return EXIT_PROBLEM if drift else 0
