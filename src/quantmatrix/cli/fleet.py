"""`quantmatrix fleet`: the cells of every hardware of a Ray cluster, run there and merged here."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantmatrix.fleet.engine import RayEngine
    from quantmatrix.fleet.groups import Group
    from quantmatrix.harness.completeness import Verdicts
    from quantmatrix.proof.freshness import Now
    from quantmatrix.proof.record import Evidence
    from quantmatrix.tables.rows import Cell, Matrix

FILTERS = {
    "family": "ids of families",
    "model": "ids of models",
    "hardware": "ids of hardware (default: all of the tables)",
    "check": "only these checks",
    "backend": "names of backends",
}
SETTINGS = {"RAY_task_oom_retries": "2", "RAY_USAGE_STATS_ENABLED": "0"}
"""Of Ray, where the caller says nothing: a task that fills the memory is not run for ever, and nothing
is reported to Ray's makers."""


def add_to(commands: Any) -> None:
    """Add the parser and its actions."""
    from quantmatrix.cli.output import add_command

    text = "run the matrix on a Ray cluster, each cell on a node of its hardware"
    parser = add_command(commands, "fleet", text, run_status)
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    text = "run planned cells as Ray tasks; started again, it resumes where it stopped"
    run = add_command(actions, "run", text, run_fleet)
    text = "HOST:PORT of the cluster (default: RAY_ADDRESS, the cluster of this machine, or a new one here)"
    run.add_argument("--address", metavar="ADDRESS", help=text)
    for name, text in FILTERS.items():
        flags = ["--check", "--checks"] if name == "check" else [f"--{name}"]
        run.add_argument(*flags, nargs="+", default=[], metavar=name.upper(), help=text)
    run.add_argument(
        "--rows", type=Path, metavar="FILE", help="run only the rows or cells listed in a file"
    )
    run.add_argument(
        "--full-size",
        action="store_true",
        help="use the real checkpoints instead of the tiny stand-ins",
    )
    text = "time limit of one check in seconds (default: 900, with --full-size 3600)"
    run.add_argument("--timeout", type=int, metavar="SECONDS", help=text)
    text = "files or folders of suites (default: those that come with quantmatrix)"
    run.add_argument("--suites", nargs="+", type=Path, default=[], metavar="PATH", help=text)
    status = add_command(actions, "status", "show the progress of a run", run_status)
    for action in (run, status):
        text = "folder of the records; its run is kept beside it, in DIR.fleet"
        action.add_argument("--evidence-dir", type=Path, required=True, metavar="DIR", help=text)
        action.add_argument("--json", action="store_true")


def run_status(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Print how far a run is; UsageError if there is none."""
    from quantmatrix.cli.output import print_json, say
    from quantmatrix.fleet import progress

    status = progress.read(arguments.evidence_dir)
    if arguments.json:
        print_json({"ok": True, **status})
    else:
        say("\n".join(progress.describe(status)))
    return 0


def run_fleet(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Plan, run, merge; the exit code is the largest of all (see `quantmatrix.exit_codes`).

    Raises UsageError for filters and paths that are wrong.
    """
    from quantmatrix.cli.output import report_error
    from quantmatrix.errors import UsageError
    from quantmatrix.exit_codes import NOTHING_COLLECTED
    from quantmatrix.files import check_writable
    from quantmatrix.fleet import bundle
    from quantmatrix.fleet.engine import RayEngine
    from quantmatrix.fleet.groups import make_groups
    from quantmatrix.harness import completeness, selection
    from quantmatrix.harness.sessions import LIMITS
    from quantmatrix.tables import read

    if arguments.timeout is not None and arguments.timeout < 1:
        raise UsageError(f"--timeout {arguments.timeout}: expected 1 second or more")
    evidence: Path = arguments.evidence_dir
    check_writable(evidence / "cpu" / "record", "--evidence-dir")
    folder = read.tables_folder()
    reports = folder.parent / "reports"
    data = bundle.pack(folder, arguments.suites)
    tables, now = read.read(folder), read_now(reports)
    wanted = {name: selection.split_values(getattr(arguments, name)) for name in FILTERS}
    only = wanted["check"]
    try:
        cells = selection.select_cells(tables, wanted, arguments.rows)
    except selection.EmptySelection as error:
        return report_error(error, NOTHING_COLLECTED, as_json=arguments.json)
    planned = [cell for cell in cells if any(completeness.fits(c, only) for c in cell.checks)]
    found, verdicts = read_kept(evidence, tables, now)
    missing = completeness.compare(planned, verdicts, only).missing
    timings = {**selection.read_timings(reports / "evidence"), **found}
    groups = make_groups([cell for cell in planned if cell.id in missing], timings, only)
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    limit = arguments.timeout or LIMITS[arguments.full_size]
    arguments.limit, arguments.only = limit, only
    with RayEngine(arguments.address, data) as engine:
        return run_groups(arguments, engine, tables, now, planned, groups, verdicts)


def run_groups(
    arguments: argparse.Namespace,
    engine: RayEngine,
    tables: Matrix,
    now: Now,
    planned: list[Cell],
    groups: list[Group],
    verdicts: Verdicts,
) -> int:
    """Run groups on a cluster that is connected, and say what came of them."""
    from collections import Counter

    from quantmatrix.cli.output import print_json, report_progress, say
    from quantmatrix.fleet import driver as drivers
    from quantmatrix.fleet.intake import Intake
    from quantmatrix.fleet.progress import Progress, fleet_folder

    evidence: Path = arguments.evidence_dir
    sites, unused = look_around(engine, tables)
    about = {"address": engine.address, "dashboard": engine.dashboard, "evidence": str(evidence)}
    progress = Progress(fleet_folder(evidence), about)
    todo = {cell for group in groups for cell in group.cells}
    for cell in planned:
        progress.lane(cell.hardware).planned += 1
        progress.lane(cell.hardware).kept += cell.id not in todo
    outcome = drivers.Outcome(verdicts)
    intake = Intake(tables, now, arguments.only, full_size=arguments.full_size)
    driver = drivers.Driver(engine, intake, evidence, progress, outcome, limit=arguments.limit)
    driver.plan(groups, sites)
    if engine.dashboard:
        report_progress(f"Ray's dashboard: http://{engine.dashboard}")
    counts = Counter(group.hardware for group in groups if group.hardware in sites)
    for hardware, count in counts.items():
        report_progress(f"{hardware}: {count} groups for {len(sites[hardware].nodes)} nodes")
    try:
        progress.write(at_once=True)
        run_with_bar(driver, sum(len(group.cells) for group in groups))
        progress.finished = True
    finally:
        progress.write(at_once=True)
    compared = outcome.compare(planned, arguments.only)
    if arguments.json:
        print_json({**drivers.to_json(outcome, compared, unused), "output": str(evidence)})
    else:
        lines = drivers.describe(outcome, compared, unused)
        kept = len(planned) - len(todo)
        end = f"{len(planned)} cells planned, {kept} of them before, {outcome.written} records written"
        say("\n".join([*lines, f"{evidence}: {end}"]))
    return drivers.exit_code(outcome, compared)


def run_with_bar(driver: Any, cells: int) -> None:
    """Run with a progress bar of cells, on a terminal."""
    from tqdm import tqdm

    with tqdm(total=cells, desc="fleet", unit="cell", disable=None) as bar:
        bar.update(cells - sum(len(g.cells) for held in driver.waiting.values() for g in held))
        driver.run(bar.update)


def look_around(engine: RayEngine, tables: Matrix) -> tuple[dict[str, Any], dict[str, str]]:
    """(nodes by hardware, why others are not used) of a cluster, each node asked what it is."""
    from quantmatrix.fleet import answers, bundle
    from quantmatrix.fleet.cluster import find_sites
    from quantmatrix.fleet.engine import Failure

    nodes = engine.list_nodes()
    probes: dict[str, answers.Probe | str] = {}
    for node, found in engine.probe(nodes).items():
        try:
            read = found.why if isinstance(found, Failure) else answers.read(found, answers.Probe)
        except answers.AnswerError as error:
            read = f"it gave no answer: {error}"
        probes[node] = read
    return find_sites(nodes, probes, tables, bundle.digest_source())


def read_now(reports: Path) -> Now:
    """What records are judged against: the code here, and the limits of a reports folder, if there are any."""
    from quantmatrix.proof import freshness
    from quantmatrix.proof.code_digest import own_code

    if (reports / "limits.csv").is_file():
        return freshness.read_now(reports, {})
    return freshness.Now(code=own_code())


def read_kept(evidence: Path, tables: Matrix, now: Now) -> tuple[dict[str, Evidence], Verdicts]:
    """(records that lie in the folder already, the verdicts of those that are fresh)."""
    from quantmatrix.harness import completeness
    from quantmatrix.proof.merge import merge_folders
    from quantmatrix.proof.store import remove_leftovers

    if not evidence.is_dir():
        return {}, {}
    remove_leftovers(evidence)
    found = merge_folders([evidence]).records
    return found, completeness.take_records(found, tables, now)
