"""quantmatrix matrix: list, check and show rows of the tables."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING

from quantmatrix.cli.output import add_command, print_json
from quantmatrix.errors import UsageError

if TYPE_CHECKING:
    import argparse
    import os
    from collections.abc import Mapping
    from typing import Any


LIST_FILTERS = ("family", "model", "hardware", "claim", "state", "scope")


PLURALS = {
    "family": "families",
    "model": "models",
    "hardware": "hardware ids",
    "claim": "claims",
    "state": "states",
    "scope": "scopes",
}


def _add_matrix(commands: Any) -> None:
    parser = add_command(
        commands, "matrix", "list, check and show rows of the tables", run_matrix_list
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    for name, text, handler in (
        ("list", "list the cells, with their state from the evidence", run_matrix_list),
        ("check", "check the tables; every problem with file and line", run_matrix_check),
        ("show", "show one cell or row: its command, claim, rule and evidence", run_matrix_show),
        (
            "schema",
            "print the columns of the tables as JSON, with their version",
            run_matrix_schema,
        ),
    ):
        action = add_command(actions, name, text, handler)
        action.add_argument("--json", action="store_true")
        if name in ("check", "schema"):
            continue
        action.add_argument("--reports", help="folder of the reports (default: reports)")
        if name == "show":
            action.add_argument("id", help="id of a cell (row@hardware) or of a row")
        if name == "list":
            for flag in LIST_FILTERS:
                action.add_argument(
                    f"--{flag}",
                    nargs="+",
                    default=[],
                    metavar=flag.upper(),
                    help=f"only cells of these {PLURALS[flag]}",
                )
    for name in ("jobs", "matrix_diff", "matrix_history", "dry_run"):
        import_module(f"quantmatrix.cli.{name}").add_to_matrix(actions)


def read_standings(reports: str | None) -> tuple[Any, Mapping[str, Any]]:
    """(the matrix, state and scope of every cell joined from the evidence)."""
    from quantmatrix.report import render
    from quantmatrix.tables import read

    tables = read.read()
    return tables, render.read_standings(tables, reports)


def run_matrix_list(arguments: argparse.Namespace, rest: list[str]) -> int:
    """`quantmatrix matrix list`; raises UsageError for a filter that no row can meet."""
    from quantmatrix.proof import joined
    from quantmatrix.proof.scopes import label

    tables, standings = read_standings(arguments.reports)
    rows = joined.rows_as_dicts(tables, standings)
    for flag in LIST_FILTERS:
        wanted = getattr(arguments, flag)
        known = {row[flag] for row in rows} - {""} | known_values(tables, flag)
        unknown = [name for name in wanted if name not in known]
        if unknown:
            raise UsageError(f"--{flag} {unknown[0]}: not in the tables; known: {sorted(known)}")
        rows = [row for row in rows if not wanted or row[flag] in wanted]
    if arguments.json:
        from quantmatrix.proof import reports_folder

        print_json({"rows": rows, "read_from": reports_folder.tell_source(arguments.reports)})
        return 0
    for row in rows:
        print(f"{label(row['state'], row['scope']):22} {row['claim']:10} {row['id']}")
    print(f"{len(rows)} cells", file=sys.stderr)
    tell_where(arguments.reports)
    return 0


def tell_where(reports: str | os.PathLike[str] | None) -> None:
    """Say on standard error where evidence was read from, where that is not the checkout."""
    from quantmatrix.proof import packaged, reports_folder

    if reports_folder.find_source(reports) == packaged.FOLDER:
        print(f"read from {reports_folder.tell_source(reports)}", file=sys.stderr)


def known_values(tables: Any, flag: str) -> set[str]:
    """Values that a filter may take although no row has them at the moment."""
    from quantmatrix.proof import scopes
    from quantmatrix.report import render
    from quantmatrix.tables.rows import CLAIMS

    if flag == "scope":
        return set(scopes.SCOPES)
    if flag == "state":
        return set(render.STATES)
    if flag == "claim":
        return set(CLAIMS)
    return set({"family": tables.families, "model": tables.models}.get(flag, tables.hardware))


def run_matrix_check(arguments: argparse.Namespace, rest: list[str]) -> int:
    """`quantmatrix matrix check`."""
    from quantmatrix.tables import read

    tables = read.read()
    found = {"ok": True, "rows": len({c.row for c in tables.cells}), "cells": len(tables.cells)}
    if arguments.json:
        print_json(found)
    else:
        print(f"{found['rows']} rows, {found['cells']} cells: no problem found")
    return 0


def run_matrix_schema(arguments: argparse.Namespace, rest: list[str]) -> int:
    """`quantmatrix matrix schema`."""
    from quantmatrix.tables import schema

    print_json(schema.describe())
    return 0


def run_matrix_show(arguments: argparse.Namespace, rest: list[str]) -> int:
    """`quantmatrix matrix show`; raises UsageError for an unknown row or cell."""
    from quantmatrix.proof import joined

    tables, standings = read_standings(arguments.reports)
    rows = joined.rows_as_dicts(tables, standings)
    found = [row for row in rows if arguments.id in (row["id"], row["row"])]
    if not found:
        raise UsageError(f"{arguments.id}: no such row or cell; see `quantmatrix matrix list`")
    if arguments.json:
        print_json({"rows": found})
        return 0
    for row in found:
        print(row["id"])
        for key, value in row.items():
            if key != "id" and value not in ("", [], None):
                print(f"  {key:11} {' '.join(value) if isinstance(value, list) else value}")
    return 0
