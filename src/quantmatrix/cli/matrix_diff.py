"""`quantmatrix matrix diff`: what a change does to the matrix, for those who review it."""

from __future__ import annotations

import argparse
from typing import Any


def add_to_matrix(actions: Any) -> None:
    """Add the action to those of `quantmatrix matrix`."""
    from quantmatrix.cli.output import add_command

    text = "list cells gained, lost and changed between two git revisions, as Markdown or JSON"
    parser = add_command(actions, "diff", text, run_diff)
    parser.add_argument(
        "revisions", metavar="A..B", help="two git revisions; B is HEAD if left out"
    )
    parser.add_argument("--json", action="store_true")


def run_diff(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Print the changes; 0 whatever they are."""
    from quantmatrix.cli.output import print_json
    from quantmatrix.report import changes

    root = changes.find_checkout("matrix diff")
    found = changes.compare_revisions(arguments.revisions, root)
    if arguments.json:
        print_json({"ok": True, **found.to_json()})
    else:
        print(changes.write_markdown(found, arguments.revisions))
    return 0
