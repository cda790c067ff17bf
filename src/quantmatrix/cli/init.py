"""`quantmatrix init`: the first tables of another project."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse
    from typing import Any


def add_to(commands: Any) -> None:
    """Add the parser."""
    from quantmatrix.cli.output import add_command

    text = "write a first set of tables, with comments, for a project of your own"
    parser = add_command(commands, "init", text, run_init)
    parser.add_argument("folder", metavar="DIR", help="folder of the new tables, such as matrix")
    parser.add_argument("--json", action="store_true")


def run_init(arguments: argparse.Namespace, rest: list[str]) -> int:
    """`quantmatrix init`; raises UsageError where tables are there already."""
    from quantmatrix.cli.output import print_json, say
    from quantmatrix.tables import starter

    written = starter.write(Path(arguments.folder))
    if arguments.json:
        print_json({"ok": True, "written": [str(path) for path in written]})
        return 0
    say("\n".join(f"{path}: written" for path in written))
    say(f"next: quantmatrix matrix check --tables {arguments.folder}")
    return 0
