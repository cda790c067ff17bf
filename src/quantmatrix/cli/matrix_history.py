"""`quantmatrix matrix history`: what a cell's records said over time."""

from __future__ import annotations

import argparse
from typing import Any

HEAD = ("day", "commit", "scope", "verdict", "PSNR dB", "step / BF16", "")


def add_to_matrix(actions: Any) -> None:
    """Add the action to those of `quantmatrix matrix`."""
    from quantmatrix.cli.output import add_command

    text = "show from git what a cell's records said, and since when it is better or worse"
    parser = add_command(actions, "history", text, run_history)
    parser.add_argument("id", help="id of a cell (row@hardware)")
    parser.add_argument("--json", action="store_true")


def run_history(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Print a line per version; 0 whatever they say. UsageError for a cell that is not in the tables."""
    from quantmatrix.cli.output import print_json, say
    from quantmatrix.errors import UsageError
    from quantmatrix.report import changes, history
    from quantmatrix.tables import read

    cell = next((one for one in read.read().cells if one.id == arguments.id), None)
    if cell is None:
        raise UsageError(f"{arguments.id}: no such cell; see `quantmatrix matrix list`")
    root = changes.find_checkout("matrix history")
    versions, skipped = history.read_history(cell, root)
    notes = history.tell_skipped(skipped)
    if history.is_shallow(root):
        notes.append("this clone is shallow and lacks older versions: `git fetch --unshallow`")
    if arguments.json:
        lines = [one.to_json() for one in versions]
        found = {"versions": lines, "skipped": [vars(one) for one in skipped], "notes": notes}
        print_json({"ok": True, "cell": cell.id, **found})
        return 0
    from quantmatrix.cli.recommend import align

    rows = [
        (
            one.date,
            one.commit[:12],
            one.scope,
            one.verdict,
            show(one.psnr_db),
            show(one.step),
            one.trend,
        )
        for one in versions
    ]
    table = align([HEAD, *rows]) if rows else []
    say("\n".join([f"{cell.id}: {history.say_since(versions)}", *table, *notes]))
    return 0


def show(value: float | None) -> str:
    """Four significant digits, or nothing."""
    return "" if value is None else f"{value:.4g}"
