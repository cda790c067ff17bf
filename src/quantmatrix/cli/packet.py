"""`quantmatrix packet`: evidence to contribute from another machine, made and checked."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from quantmatrix.errors import UsageError


def add_to(commands: Any) -> None:
    """Add the parsers."""
    from quantmatrix.cli.output import add_command

    text = "make and check evidence packets: one folder with record, latents and digests"
    parser = add_command(commands, "packet", text, run_check)
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    text = "run the latents check of a cell on this machine, and write its packet"
    make = add_command(actions, "make", text, run_make)
    make.add_argument("cell", help="id of a cell (row@hardware, row@hardware+backend)")
    make.add_argument("--output-path", required=True, help="the folder to write; it must not exist")
    make.add_argument("--tiny", action="store_true", help="use tiny stand-ins")
    text = "verify schema and digests, and compute the metrics again from the latents"
    check = add_command(actions, "check", text, run_check)
    check.add_argument("folders", nargs="+", metavar="DIR", help="packets")
    for action in (make, check):
        action.add_argument("--json", action="store_true")


def run_make(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Write a packet; 0 even when the check failed, for that is evidence, too.

    Raises UsageError for an unknown cell.
    """
    from quantmatrix.cli.output import print_json
    from quantmatrix.harness import packets
    from quantmatrix.proof import scopes, store
    from quantmatrix.tables import read

    tables = read.read()
    cell = next((cell for cell in tables.cells if cell.id == arguments.cell), None)
    if cell is None:
        raise UsageError(f"{arguments.cell}: no such cell; see `quantmatrix matrix list`")
    folder = packets.make(tables, cell, Path(arguments.output_path), tiny=arguments.tiny)
    [record] = store.read_folder(folder).values()
    found = record.checks["latents"]
    if arguments.json:
        scope = scopes.read_scope(record)
        result = {"verdict": found.verdict, "message": found.message, "scope": scope}
        print_json({"ok": True, "packet": str(folder), "cell": cell.id, **result})
    else:
        print(f"{folder}: {cell.id}: {found.verdict} {found.message}".rstrip())
    return 0


def run_check(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Check packets, of cells and of columns; 1 when one of them is not sound."""
    from quantmatrix.cli.output import print_json, say
    from quantmatrix.exit_codes import EXIT_PROBLEM
    from quantmatrix.harness import packets
    from quantmatrix.peers import packet_check
    from quantmatrix.quoting import limit_message
    from quantmatrix.tables import read

    tables = read.read()
    problems = {}
    for folder in arguments.folders:
        kind = packet_check if packet_check.is_column(Path(folder)) else packets
        problems[folder] = kind.check(Path(folder), tables)
    bad = any(problems.values())
    if arguments.json:
        print_json({"ok": not bad, "problems": problems})
    else:
        for folder, found in problems.items():
            say("\n".join(map(limit_message, found)) or f"{folder}: sound")
    return EXIT_PROBLEM if bad else 0
