"""`quantmatrix summary`: what a CI job showed, appended to the summary of its step."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

STEP = "GITHUB_STEP_SUMMARY"
"""The variable in which GitHub names the file of a step's summary."""


def add_to(commands: Any) -> None:
    """Add the parser."""
    from quantmatrix.cli.output import add_command

    text = f"summarize runs in Markdown, changed cells first, for ${STEP}"
    parser = add_command(commands, "summary", text, run_summary)
    parser.add_argument("folders", nargs="+", type=Path, metavar="EVIDENCE")
    parser.add_argument(
        "--since",
        type=Path,
        metavar="EVIDENCE",
        help="earlier evidence (default: what is committed)",
    )
    parser.add_argument(
        "--output-path", metavar="FILE", help=f"append there (default: ${STEP}, else print)"
    )
    parser.add_argument("--json", action="store_true")


def run_summary(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Append or print; a job that showed nothing is no success, nor is one with a damaged record.

    Raises UsageError for a `--since` that is not a folder.
    """
    from quantmatrix.cli.output import print_json, read_variable
    from quantmatrix.errors import UsageError
    from quantmatrix.exit_codes import EXIT_PROBLEM, MEANINGS, NOTHING_COLLECTED
    from quantmatrix.proof import reports_folder
    from quantmatrix.proof import store as records
    from quantmatrix.proof.freshness import read_now
    from quantmatrix.proof.merge import merge_folders
    from quantmatrix.proof.reports_folder import EVIDENCE
    from quantmatrix.report import job_summary
    from quantmatrix.tables import read

    since: Path = arguments.since or reports_folder.default_folder() / EVIDENCE
    if arguments.since and not since.is_dir():
        raise UsageError(f"--since {since}: no such folder of evidence")
    merged = merge_folders(arguments.folders)
    before = records.read_folder(since)
    now = read_now(since.parent, {**before, **merged.records})
    cells = job_summary.list_cells(read.read(), before, merged.records, now)
    problems = [f"damaged: {line}" for line in merged.damaged]
    problems += [] if cells else [MEANINGS[NOTHING_COLLECTED]]
    path = arguments.output_path or read_variable(STEP)
    if path:
        size = job_summary.append(Path(path), cells, problems)
        print(f"{size} bytes appended to {path}", file=sys.stderr)
    if arguments.json:
        listed = job_summary.to_json(cells)
        print_json({"ok": not problems, "cells": listed, "problems": problems, "output": path})
    elif not path:
        print(job_summary.write_summary(cells, problems), end="")
    if not cells:
        return NOTHING_COLLECTED
    return EXIT_PROBLEM if problems else 0
