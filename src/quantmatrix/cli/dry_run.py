"""`quantmatrix matrix dry-run`: what the job of a device would run, on any machine."""

from __future__ import annotations

import argparse
import sys
from typing import Any


def add_to_matrix(actions: Any) -> None:
    """Add the action to those of `quantmatrix matrix`."""
    from quantmatrix.cli.output import add_command

    text = "show how the guide's checkpoints would run on a device that is not here: commands, kernels, memory"
    parser = add_command(actions, "dry-run", text, run_dry)
    parser.add_argument("--hardware", required=True, metavar="ID", help="a row of hardware.csv")
    parser.add_argument("--json", action="store_true")


def run_dry(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Print what would run; 1 when a claimed cell could not, 13 when there is none."""
    from tqdm import tqdm

    from quantmatrix.cli.output import print_json
    from quantmatrix.exit_codes import EXIT_PROBLEM, NOTHING_COLLECTED
    from quantmatrix.harness import dry_run
    from quantmatrix.tables import read

    tables = read.read()
    cells = dry_run.choose_cells(tables, arguments.hardware)
    row = tables.hardware[arguments.hardware]
    shown = tqdm(cells, desc=row.job, disable=not sys.stderr.isatty(), leave=False)
    found = [dry_run.describe(tables, cell) for cell in shown]
    ok = bool(found) and all(described["ok"] for described in found)
    if arguments.json:
        print_json({"ok": ok, "hardware": row.id, "job": row.job, "cells": found})
    else:
        many = "checkpoint" if len(found) == 1 else "checkpoints"
        print(f"{row.job}: {len(found)} {many} of the guide on {row.name}, planned only")
        print("\n".join(line for described in found for line in to_lines(described)))
    if not found:
        return NOTHING_COLLECTED
    return 0 if ok else EXIT_PROBLEM


def to_lines(described: dict[str, Any]) -> list[str]:
    """A cell for people."""
    lines = ["", described["cell"], f"  {described['command']}"]
    if not described["ok"]:
        return [
            *lines,
            f"  refused [{described['refusal']['rule']}]: {described['refusal']['message']}",
        ]
    for name, counts in described["kernels"].items():
        kernels = ", ".join(f"{count} x {kernel}" for kernel, count in counts.items())
        lines.append(f"  kernels  {name}: {kernels or 'full precision'} (tiny stand-in)")
    true, tiny = described["true_bytes"] / 2**30, described["tiny_bytes"] / 2**20
    each = f" on each of {described['devices']} devices" if described["devices"] > 1 else ""
    held = described["memory_bytes"] / 2**30
    lines.append(
        f"  memory   {held:.1f} GiB of weights at true size{each}, {true:.1f} GiB in files "
        f"({tiny:.1f} MiB tiny)"
    )
    return [*lines, *(f"  warning: {warning}" for warning in described["warnings"])]
