"""`quantmatrix run-column`: every checkpoint in another program that is installed here, as records."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantmatrix.peers.column import Outcome

PACKETS = Path("packets")


def add_to(commands: Any) -> None:
    """Add the parser."""
    from quantmatrix.cli.output import add_command
    from quantmatrix.request import parse_number

    text = "run every checkpoint in another program (diffusers, sglang ...), and record the outcome"
    parser = add_command(commands, "run-column", text, run_column)
    parser.add_argument("--runtime", required=True, help="an id of runtimes.csv")
    parser.add_argument("--hardware", required=True, help="an id, or `auto` for this machine's row")
    parser.add_argument(
        "--checkpoint", nargs="+", default=[], metavar="ID", help="only these (default: all)"
    )
    parser.add_argument("--tiny", action="store_true", help="on tiny stand-ins, without a download")
    parser.add_argument(
        "--output-path", help="folder of the packet (packets/RUNTIME-HARDWARE); it must not exist"
    )
    parser.add_argument(
        "--record-dir", metavar="DIR", help="write the records there, too (reports/runtimes)"
    )
    parser.add_argument(
        "--timeout",
        type=parse_number,
        default=600.0,
        metavar="S",
        help="time limit of a run in seconds (default: 600)",
    )
    parser.add_argument(
        "--memory", type=parse_number, default=0.0, metavar="GIB",
        help="memory limit of a run (default: all there is, shared by the workers)",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=int, metavar="N",
        help="models that run at once (default: 2 for stand-ins on a CPU, else 1)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true")


def run_column(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Print a line per checkpoint; 0 whatever the verdicts, 1 where one has none.

    Raises UsageError for unknown names, UnusableError where the runtime is not installed.
    """
    from quantmatrix.cli.output import print_json, say
    from quantmatrix.exit_codes import EXIT_PROBLEM
    from quantmatrix.peers import packet
    from quantmatrix.peers.session import Bounds
    from quantmatrix.tables import read

    tables = read.read()
    hardware = packet.find_hardware(tables, arguments.runtime, arguments.hardware)
    vendor = tables.hardware[hardware].vendor
    workers = packet.choose_workers(arguments.workers, vendor, tiny=arguments.tiny)
    memory = int(arguments.memory * 2**30) or packet.read_memory() // workers
    asked = packet.Asked(
        runtime=arguments.runtime,
        hardware=hardware,
        checkpoints=packet.check_names(tables, arguments.checkpoint),
        tiny=arguments.tiny,
        bounds=Bounds(seconds=arguments.timeout, memory_bytes=memory),
        workers=workers,
    )
    name = f"{asked.runtime}-{asked.hardware}"
    folder = Path(arguments.output_path) if arguments.output_path else PACKETS / name
    records = Path(arguments.record_dir) if arguments.record_dir else None
    show = None if arguments.json else lambda outcome: say(to_line(outcome))
    outcomes, archive = packet.make(tables, asked, folder, records, show)
    lacking = [one for one in outcomes if one.record is None and not one.skipped]
    kept = sum(one.record is not None for one in outcomes)
    if arguments.json:
        cells = {one.cell.id: describe(one) for one in outcomes}
        print_json({"ok": not lacking, "packet": str(archive), "cells": cells})
    else:
        say(f"{archive}: {kept} records")
    return EXIT_PROBLEM if lacking else 0


def to_line(outcome: Outcome) -> str:
    """An outcome on one line."""
    found = outcome.record
    if found is None:
        how = "left out" if outcome.skipped else "no verdict"
        return f"{outcome.cell.id}: {how}: {outcome.problem}"
    return f"{outcome.cell.id}: {found.verdict} {found.reason}".rstrip()


def describe(outcome: Outcome) -> dict[str, str]:
    """An outcome as plain data."""
    found = outcome.record
    if found is None:
        return {"verdict": "", "reason": outcome.problem}
    return {"verdict": found.verdict, "reason": found.reason, "command": found.command}
