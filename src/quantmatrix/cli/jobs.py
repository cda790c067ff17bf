"""`quantmatrix matrix jobs`: the jobs that a CI matrix is made of, cut by the last timings."""

from __future__ import annotations

import argparse
import json
from typing import Any


def add_to_matrix(actions: Any) -> None:
    """Add the action to those of `quantmatrix matrix`."""
    from quantmatrix.cli.output import add_command
    from quantmatrix.request import parse_number

    text = "list the CI jobs of some hardware; with --json as a matrix on one line"
    parser = add_command(actions, "jobs", text, run_jobs)
    parser.add_argument(
        "--hardware", nargs="+", default=[], metavar="ID", help="ids or groups (default: all)"
    )
    parser.add_argument(
        "--parts", type=int, metavar="N", help="cut the cells of each device into N parts"
    )
    parser.add_argument(
        "--minutes",
        type=parse_number,
        default=30.0,
        help="or into parts of about this many minutes (default 30)",
    )
    parser.add_argument("--reports", help="folder of the reports (default: reports)")
    parser.add_argument("--json", action="store_true")


def run_jobs(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Print the jobs; nothing to run is never success.

    Raises UsageError for unknown hardware, and for parts or minutes below what a job can have.
    """
    from quantmatrix.errors import UsageError
    from quantmatrix.exit_codes import NOTHING_COLLECTED
    from quantmatrix.harness import shards
    from quantmatrix.report import render
    from quantmatrix.tables import read

    tables = read.read()
    known = [*tables.hardware, *tables.groups]
    if unknown := [name for name in arguments.hardware if name not in known]:
        raise UsageError(f"--hardware {unknown[0]}: not in the tables; known: {', '.join(known)}")
    if (arguments.parts is not None and arguments.parts < 1) or arguments.minutes <= 0:
        raise UsageError("--parts and --minutes: expected more than 0")
    evidence = render.read_evidence(arguments.reports)
    jobs = shards.list_jobs(
        tables, evidence, arguments.hardware, arguments.parts, 60 * arguments.minutes
    )
    if arguments.json:
        print(json.dumps(jobs, sort_keys=True))
    else:
        print("\n".join(to_lines(jobs["include"])))
    return 0 if jobs["include"] else NOTHING_COLLECTED


def to_lines(jobs: list[dict[str, Any]]) -> list[str]:
    """A table for people."""
    if not jobs:
        return ["nothing collected: no claimed cell of this hardware can be run"]
    width = max(len(job["job"]) for job in jobs)
    lines = [f"{'job':{width}} {'hardware':12} {'shard':6} {'cells':>5} {'seconds':>8}"]
    for job in jobs:
        lines.append(
            f"{job['job']:{width}} {job['hardware']:12} {job['shard']:6} "
            f"{len(job['rows']):5} {job['seconds']:8.0f}"
        )
    return lines
