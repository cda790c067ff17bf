"""quantmatrix tiny-hub: write the stand-ins of all repositories into a folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from quantmatrix.cli.output import add_command, print_json
from quantmatrix.files import check_writable, naming

if TYPE_CHECKING:
    import argparse
    from typing import Any


def _add_tiny_hub(commands: Any) -> None:
    text = "write tiny stand-ins, in the true formats, for every repository in the tables"
    parser = add_command(commands, "tiny-hub", text, run_tiny_hub)
    parser.add_argument("folder", nargs="?", help="a hub cache folder (default: your cache)")
    parser.add_argument("--json", action="store_true")


def run_tiny_hub(arguments: argparse.Namespace, rest: list[str]) -> int:
    """`quantmatrix tiny-hub`."""
    from quantmatrix.tiny import hub

    folder = Path(arguments.folder) if arguments.folder else hub.default_folder()
    check_writable(folder / "models", "FOLDER")
    with naming(folder):
        written = hub.ensure_all(folder)
    if arguments.json:
        print_json({"folder": str(folder), "repositories": written})
    else:
        print("\n".join(written))
        print(f"{len(written)} stand-ins in {folder}", file=sys.stderr)
    return 0
