"""`quantmatrix evidence`: merge the evidence of shards, see that everything planned was run, and carry
records over a change of the code that computes nothing else."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantmatrix.harness.completeness import Comparison, Verdicts
    from quantmatrix.tables.rows import Matrix

PLANNED = "hardware ids or groups, files of rows, or what `matrix jobs --json` printed"


def add_to(commands: Any) -> None:
    """Add the parser and its actions."""
    from quantmatrix.cli.output import add_command

    parser = add_command(commands, "evidence", "merge and check records of runs", run_check)
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    text = "merge evidence folders of shards; the order of the folders does not matter"
    merge = add_command(actions, "merge", text, run_merge)
    merge.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="evidence of shards")
    what = "the evidence folder to merge into; it is made if there is none"
    merge.add_argument("--output-path", type=Path, required=True, metavar="DIR", help=what)
    merge.add_argument("--planned", nargs="+", default=[], metavar="WORD", help=PLANNED)
    text = "compare what was executed with what was planned; the exit code says how they differ"
    check = add_command(actions, "check", text, run_check)
    check.add_argument(
        "sources",
        nargs="+",
        type=Path,
        metavar="FOLDER_OR_JUNIT_XML",
        help="evidence folders, or JUnit files of runs",
    )
    check.add_argument("--planned", nargs="+", required=True, metavar="WORD", help=PLANNED)
    text = (
        "run cpu twins with a revision's code and with this one: equal latents keep records fresh"
    )
    carry = add_command(actions, "carry", text, run_carry)
    carry.add_argument(
        "revision", metavar="REVISION", help="git revision whose code made the records"
    )
    carry.add_argument("--reports", help="folder of the reports (default: reports)")
    carry.add_argument("--json", action="store_true")
    text = "print the JSON Schema of records, benchmark files and packets"
    shown = add_command(actions, "schema", text, run_schema)
    shown.add_argument("--json", action="store_true", help="the same: a schema is JSON")
    for action in (merge, check):
        action.add_argument(
            "--check", nargs="+", default=[], metavar="NAME", help="compare only these checks"
        )
        action.add_argument("--json", action="store_true")


def run_merge(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Merge, write, and name what is damaged or was planned and not executed (exit code 1)."""
    from quantmatrix.cli.output import print_json, say
    from quantmatrix.exit_codes import EXIT_PROBLEM
    from quantmatrix.harness import completeness
    from quantmatrix.proof.code_digest import own_code
    from quantmatrix.proof.freshness import Now
    from quantmatrix.proof.merge import merge_folders, write
    from quantmatrix.quoting import limit_message
    from quantmatrix.tables import read

    output: Path = arguments.output_path
    compared = None
    stale: dict[str, str] = {}
    shards = merge_folders(arguments.folders)
    if arguments.planned:
        tables, now = read.read(), Now(code=own_code())
        stale = completeness.list_stale(shards.records, tables, now)
        compared = compare(
            arguments, completeness.take_records(shards.records, tables, now), tables
        )
    folders = [*arguments.folders, *([output] if output.is_dir() else [])]
    merged = merge_folders(folders)
    changed = write(merged.records.values(), output)
    bad = bool(merged.damaged or not shards.records or (compared and compared.missing))
    if arguments.json:
        missing = {"missing": dict(compared.missing), "stale": stale} if compared else {}
        written = [path.relative_to(output).as_posix() for path in changed]
        found = {"records": len(merged.records), "written": written, "damaged": merged.damaged}
        print_json({"ok": not bad, "output": str(output), **found, **missing})
        return EXIT_PROBLEM if bad else 0
    for line in merged.damaged:
        say(limit_message(f"damaged: {line}"))
    for cell, why in stale.items():
        say(f"stale: {cell}: {why}")
    for cell, checks in compared.missing.items() if compared else ():
        say(f"row not executed: {cell} ({', '.join(checks)})")
    if not shards.records:
        print("nothing collected: no record in these folders")
    print(f"{output}: {len(merged.records)} records, {len(changed)} of them changed")
    return EXIT_PROBLEM if bad else 0


def run_check(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Compare; the exit code is the comparison's."""
    from quantmatrix.cli.output import print_json, say
    from quantmatrix.harness import completeness
    from quantmatrix.tables import read

    tables = read.read()
    stale: dict[str, str] = {}
    verdicts = completeness.combine([read_source(s, tables, stale) for s in arguments.sources])
    found = compare(arguments, verdicts, tables)
    if arguments.json:
        print_json({**found.to_json(), "stale": stale})
    else:
        lines = [f"stale: {cell}: {why}" for cell, why in stale.items()]
        say("\n".join([*lines, *found.describe(), f"{found.planned} cells were planned"]))
    return found.code


def run_schema(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Print the published schema."""
    from quantmatrix.cli.output import print_json
    from quantmatrix.proof import shapes

    print_json(shapes.schema())
    return 0


def run_carry(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Carry; 1 where a twin computes something else, or a record is of neither code."""
    from quantmatrix.cli.output import print_json
    from quantmatrix.exit_codes import EXIT_PROBLEM
    from quantmatrix.measure import carry
    from quantmatrix.proof import reports_folder

    def say(text: str) -> None:
        print(f"\r{text}", end="", file=sys.stderr, flush=True)

    folder = reports_folder.find_folder(arguments.reports)
    found = carry.carry(arguments.revision, folder, say)
    bad = bool(found.differing or found.foreign)
    if arguments.json:
        print_json({"ok": not bad, **asdict(found)})
        return EXIT_PROBLEM if bad else 0
    print(file=sys.stderr)
    for twin, why in found.differing.items():
        print(f"not carried: {why}: {twin}")
    for cell in found.foreign:
        print(f"not of {arguments.revision}: the record of {cell}")
    print(f"{folder}: {len(found.pairs)} pairs carry {len(found.cells)} records")
    return EXIT_PROBLEM if bad else 0


def compare(arguments: argparse.Namespace, verdicts: Verdicts, tables: Matrix) -> Comparison:
    """Verdicts against the plan that the arguments name; raises UsageError for an unknown check."""
    from quantmatrix.errors import UsageError
    from quantmatrix.harness import completeness
    from quantmatrix.tables import rows

    if unknown := [name for name in arguments.check if name not in rows.CHECKS]:
        raise UsageError(f"--check {unknown[0]}: known: {', '.join(rows.CHECKS)}")
    planned = completeness.read_planned(arguments.planned, tables)
    return completeness.compare(planned, verdicts, arguments.check)


def read_source(path: Path, tables: Matrix, stale: dict[str, str]) -> Verdicts:
    """Verdicts of an evidence folder or of a JUnit file; records of changed rows go to `stale`.

    Raises UsageError where neither is there.
    """
    from quantmatrix.errors import UsageError
    from quantmatrix.harness import completeness
    from quantmatrix.proof import store as records
    from quantmatrix.proof.code_digest import own_code
    from quantmatrix.proof.freshness import Now

    if path.is_dir():
        found, now = records.read_folder(path), Now(code=own_code())
        stale |= completeness.list_stale(found, tables, now)
        return completeness.take_records(found, tables, now)
    if not path.is_file():
        raise UsageError(f"{path}: no such folder of records, and no such JUnit file")
    return completeness.read_junit(path)
