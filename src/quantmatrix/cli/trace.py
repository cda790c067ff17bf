"""`quantmatrix trace`: a profiled run, and which kernel each quantized layer ran by.

With `--row` or `--hardware` the runs are those of the matrix: one trace and one JSON census for each
cell, in a folder.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantmatrix.errors import QuantmatrixError, UsageError
from quantmatrix.files import check_writable

if TYPE_CHECKING:
    from quantmatrix.measure.trace_census import Census
    from quantmatrix.tables.rows import Cell, Matrix

FILE, FOLDER = "trace.json.gz", "traces"


def add_to(commands: Any) -> None:
    """Add the parser."""
    from quantmatrix.cli.output import add_command
    from quantmatrix.request import add_request_flags

    text = "profile a generation (Chrome trace) and confirm that the planned kernels ran"
    parser = add_command(commands, "trace", text, run_trace)
    add_request_flags(parser, needed=False)
    parser.add_argument(
        "--hardware", metavar="ROW", help="trace the cells that are claimed for this hardware"
    )
    what = "cells of the matrix, such as modelopt-fp8-flux-1@cpu+decode"
    parser.add_argument("--row", action="extend", nargs="+", default=[], metavar="CELL", help=what)
    what = f"{FILE}; with --row or --hardware alone a folder ({FOLDER})"
    parser.add_argument("--output-path", metavar="PATH", help=what)
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(takes_overrides=True)


def run_trace(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Trace; 1 when a planned layer did not run by its kernel, 3 for a refusal.

    Raises UsageError unless exactly one of a model path, rows and a hardware is given.
    """
    ways = [bool(arguments.model_path), bool(arguments.row), bool(arguments.hardware)]
    if sum(ways) != 1:
        raise UsageError("expected one of --model-path, --row and --hardware")
    if not arguments.model_path:
        return run_cells(arguments, rest)
    from quantmatrix.cli.output import print_json, read_request, report_problems
    from quantmatrix.exit_codes import EXIT_PROBLEM
    from quantmatrix.measure.trace import trace

    path = Path(arguments.output_path or FILE)
    check_writable(path)
    census = trace(read_request(arguments, rest), path)
    if arguments.json:
        print_json({"ok": not census.problems, "output": str(path), **census.to_json()})
    else:
        show(census, str(path))
    report_problems(census.problems)
    if not census.layers:
        report_problems(
            ["warning: no layer is quantized: the trace is that of a model in full precision"]
        )
    return EXIT_PROBLEM if census.problems else 0


def run_cells(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Trace cells of the matrix into a folder; a cell that fails is named, the others go on.

    Raises UsageError for overrides, unknown cells and hardware that nothing runs on.
    """
    from quantmatrix.cli.output import print_json, report_problems
    from quantmatrix.exit_codes import EXIT_PROBLEM
    from quantmatrix.tables import read

    if rest:
        raise UsageError(f"unrecognized arguments: {' '.join(rest)}")
    tables = read.read()
    if arguments.row:
        cells = [find_cell(tables, name) for name in arguments.row]
    else:
        cells = choose_cells(tables, arguments.hardware)
    folder = Path(arguments.output_path or FOLDER)
    check_writable(folder / "CELL")
    found = trace_cells(cells, tables, folder, tiny=bool(arguments.tiny), quiet=arguments.json)
    problems = [line for one in found.values() for line in one["problems"]]
    if arguments.json:
        print_json({"ok": not problems, "output": str(folder), "cells": found})
    else:
        for name, one in found.items():
            share = one.get("quantize_and_scale_share")
            summary = (
                "failed" if share is None else f"{share:6.1%} of the layers' time not in matmuls"
            )
            print(f"{name:50} {summary}")
        print(folder)
    report_problems(problems)
    return EXIT_PROBLEM if problems else 0


def trace_cells(
    cells: list[Cell], tables: Matrix, folder: Path, *, tiny: bool, quiet: bool
) -> dict[str, dict[str, Any]]:
    """Census of every cell by its id; writes `CELL.json.gz` and `CELL.json` into the folder."""
    from tqdm import tqdm

    from quantmatrix.measure.trace import ENDING, trace_pipeline
    from quantmatrix.measure.workbench import Workbench

    bench = Workbench(tables, tiny=tiny)
    found: dict[str, dict[str, Any]] = {}
    folder.mkdir(parents=True, exist_ok=True)
    for cell in tqdm(cells, desc="trace", unit="cell", disable=quiet):
        try:
            request = bench.request(cell)
            plan = bench.plan(request)
            pipeline = bench.pipeline(request, plan)
            census = trace_pipeline(request, plan, pipeline, folder / f"{cell.id}{ENDING}")
        except QuantmatrixError as error:
            found[cell.id] = {"problems": [f"{cell.id}: {error}"]}
            continue
        fields = census.to_json()
        fields["problems"] = [f"{cell.id}: {line}" for line in census.problems]
        text = json.dumps(fields, indent=1, sort_keys=True) + "\n"
        (folder / f"{cell.id}.json").write_text(text, encoding="utf-8")
        found[cell.id] = fields
    return found


def find_cell(tables: Matrix, name: str) -> Cell:
    """The cell of an id; UsageError when there is none."""
    for cell in tables.cells:
        if cell.id == name:
            return cell
    raise UsageError(f"--row {name}: no such cell; `quantmatrix matrix list` shows their ids")


def choose_cells(tables: Matrix, hardware: str) -> list[Cell]:
    """The first cell of every family, model and backend that a hardware is claimed to run.

    Raises UsageError if there is none, or no such hardware.
    """
    if hardware not in tables.hardware:
        known = ", ".join(tables.hardware)
        raise UsageError(f"--hardware {hardware}: not in the tables; known: {known}")
    chosen: dict[tuple[str, str, str], Cell] = {}
    for cell in tables.cells:
        claimed = cell.claim != "planned" and "latents" in cell.checks
        if claimed and cell.hardware == hardware:
            chosen.setdefault((cell.family, cell.model, cell.backend), cell)
    if not chosen:
        raise UsageError(f"--hardware {hardware}: no row claims that anything runs there")
    return list(chosen.values())


def show(census: Census, title: str) -> None:
    """Stages, backends and shares for people."""
    summary = census.summarize()
    for name, stage in summary["stages"].items():
        print(f"{name:14} {stage['calls']:5.0f} calls {stage['seconds'] * 1e3:10.2f} ms")
    for backend, found in summary["backends"].items():
        print(f"{found['layers']} quantized layers ran by {backend}, {found['calls']} calls")
    print(
        f"{summary['quantize_and_scale_share']:.1%} of their time went into quantizing and scaling"
    )
    print(title)
