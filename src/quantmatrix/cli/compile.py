"""`quantmatrix compile`: the kernels of ours that a device's rows start, built without it."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantmatrix.measure.compiled import Compiled


def add_to(commands: Any) -> None:
    """Add the parser."""
    from quantmatrix.cli.output import add_command

    text = (
        "build the Triton kernels that the rows of a device launch, at true sizes, on any machine"
    )
    parser = add_command(commands, "compile", text, run_compile)
    parser.add_argument("--hardware", required=True, metavar="ID", help="a row of hardware.csv")
    parser.add_argument(
        "--row", help="a row of cases.csv, or a cell (default: all of the hardware)"
    )
    parser.add_argument("--no-cache", action="store_true", help="rebuild cached kernels, too")
    parser.add_argument("--json", action="store_true")


def run_compile(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Print the programs of each cell; 1 when one cannot be built, or does not fit."""
    from tqdm import tqdm

    from quantmatrix.cli.output import print_json
    from quantmatrix.exit_codes import EXIT_PROBLEM
    from quantmatrix.kernels import compiling
    from quantmatrix.measure import compiled
    from quantmatrix.tables import read

    version = compiling.require_triton()
    tables = read.read()
    cells = compiled.choose_cells(tables, arguments.hardware, arguments.row)
    row = tables.hardware[arguments.hardware]
    builder = compiled.Builder(None if arguments.no_cache else compiled.default_folder())
    shown = tqdm(cells, desc=row.id, disable=not sys.stderr.isatty(), leave=False)
    found = {cell.id: compiled.compile_cell(tables, cell, builder) for cell in shown}
    ok = not any(result.faults for result in found.values() if result is not None)
    if arguments.json:
        print_json(
            {
                "ok": ok,
                "hardware": row.id,
                "arch": row.arch,
                "triton": version,
                "built": builder.built,
                "cells": {name: result and result.to_json() for name, result in found.items()},
            }
        )
    else:
        print(f"{row.name} ({row.arch}), Triton {version}: built, never run")
        print("\n".join(line for name, result in found.items() for line in to_lines(name, result)))
        print(f"{len(builder.kept)} programs, {builder.built} of them built now")
    return 0 if ok else EXIT_PROBLEM


def to_lines(name: str, result: Compiled | None) -> list[str]:
    """A cell for people."""
    if result is None:
        return [f"{name}: starts no kernel of ours"]
    lines = [f"{name}: {result.summary}"]
    for program in result.programs:
        used = (
            f"{program.registers} registers, {program.spilled} bytes spilled, "
            f"{program.shared / 1024:.3g} of {program.shared_limit / 1024:g} KiB shared, "
            f"{program.warps} warps, {program.digest[:19]}"
        )
        lines.append(f"  {program.kernel}: {used if program.digest else 'not built'}")
    return [*lines, *(f"  FAULT {fault}" for fault in result.faults)]
