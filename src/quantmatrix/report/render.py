"""Report: claims and evidence joined, as files that anybody can read.

`render` is a pure function of the tables, the records and what they are judged against: equal input
gives equal bytes, so a hand edit or a forgotten rendering is found by `check`. Nothing in it depends
on the date, nor on the packages that are installed where it is rendered.
"""

from __future__ import annotations

import csv
import gc
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from quantmatrix.errors import UsageError
from quantmatrix.files import write_whole
from quantmatrix.proof import bench_results, columns, packaged, plans, store, transformer_classes
from quantmatrix.proof import record as records
from quantmatrix.proof.agreement import write_badge
from quantmatrix.proof.bench_results import BENCHMARKS
from quantmatrix.proof.freshness import read_now
from quantmatrix.proof.joined import Joined, read_worst
from quantmatrix.proof.reports_folder import EVIDENCE, find_folder, find_source, is_checkout
from quantmatrix.proof.scopes import Standing, cell_of
from quantmatrix.proof.states import STATES as STATES
from quantmatrix.proof.states import explain_state as explain_state
from quantmatrix.proof.states import stand_all as stand_all
from quantmatrix.proof.states import state_of as state_of
from quantmatrix.report import answers, history
from quantmatrix.report.markdown import show_number, write_family
from quantmatrix.report.overview import write_overview
from quantmatrix.report.page import write_page
from quantmatrix.report.picture import draw_matrix
from quantmatrix.report.runtimes import PAGE, TABLE, Runtimes
from quantmatrix.report.runtimes import write_csv as write_runtimes_csv
from quantmatrix.report.runtimes import write_page as write_runtimes_page
from quantmatrix.report.transformer_classes import PAGE as CLASSES_PAGE
from quantmatrix.report.transformer_classes import summarize, write_classes

if TYPE_CHECKING:
    import pandas

    from quantmatrix.proof.bench_results import Result
    from quantmatrix.proof.columns import RuntimeRecord
    from quantmatrix.proof.freshness import Now
    from quantmatrix.proof.plans import Key, PlanLine
    from quantmatrix.proof.record import Evidence
    from quantmatrix.proof.transformer_classes import ClassLine
    from quantmatrix.report.history import Version
    from quantmatrix.tables.rows import Cell, Matrix


def read_standings(
    tables: Matrix, reports: str | os.PathLike[str] | None = None
) -> dict[str, Standing]:
    """State and scope of every cell, by cell id, joined from the evidence below a reports folder."""
    evidence = read_evidence(reports)
    return stand_all(tables, evidence, read_now(find_source(reports), evidence))


def read_evidence(reports: str | os.PathLike[str] | None = None) -> dict[str, Evidence]:
    """Every record below a reports folder, by key, or of the summary that the package carries."""
    folder = find_source(reports)
    summary = folder / packaged.RECORDS
    if not (folder / EVIDENCE).is_dir() and summary.is_file():
        return packaged.read_records(summary)
    return store.read_folder(folder / EVIDENCE)


def matrix_frame(reports: str | os.PathLike[str] | None = None) -> pandas.DataFrame:
    """The matrix as a pandas DataFrame: one row per cell, with its claim, state and command."""
    import pandas

    from quantmatrix.proof.joined import rows_as_dicts
    from quantmatrix.tables import read

    tables = read.read()
    rows = rows_as_dicts(tables, read_standings(tables, reports))
    frame: pandas.DataFrame = pandas.DataFrame(rows)
    return frame


def write(reports: str | os.PathLike[str] | None = None) -> list[str]:
    """Render into a reports folder; returns the files, each with `written` or `unchanged`."""
    folder, wanted = _prepare(reports)
    done = []
    for name, data in wanted.items():
        path = folder / name
        if path.is_file() and path.read_bytes() == data:
            done.append(f"{path}: unchanged")
            continue
        write_whole(path, data)
        done.append(f"{path}: written")
    return done


def check(reports: str | os.PathLike[str] | None = None) -> list[str]:
    """What differs from a fresh rendering, one line each; empty when nothing does."""
    folder, wanted = _prepare(reports)
    remedy = "run `quantmatrix report`"
    drift = []
    for name, data in wanted.items():
        path = folder / name
        if not path.is_file():
            drift.append(f"{path}: missing; {remedy}")
        elif path.read_bytes() != data:
            drift.append(f"{path}: differs from claims and evidence; {remedy}")
    found = {path.relative_to(folder).as_posix() for path in folder.glob("families/*")}
    drift += [f"{folder / name}: no such family; delete it" for name in sorted(found - set(wanted))]
    return drift + find_orphans(folder)


def _prepare(reports: str | os.PathLike[str] | None) -> tuple[Path, dict[str, bytes]]:
    from quantmatrix.tables import read

    folder = find_folder(reports)
    if reports is None and not is_checkout() and not (folder / EVIDENCE).is_dir():
        raise UsageError(
            f"no evidence: there is no {folder / EVIDENCE} here, and no checkout around "
            f"{Path(__file__).parents[1]}; run this in a checkout, or name a folder with --reports"
        )
    with keep_everything():
        evidence, timed = store.read_folder(folder / EVIDENCE), bench_results.read_reports(folder)
        lines = transformer_classes.read_lines(folder / transformer_classes.FILE)
        others = columns.read_folder(folder / columns.RUNTIMES)
        planned = plans.read_plans(folder / plans.FILE)
        now = read_now(folder, evidence)
        tables = read.read()
        inputs = answers.digest_inputs(tables, folder)
        pages = sorted(folder.glob(f"{EVIDENCE}/*/measurements/README.md"))
        measured = [page.relative_to(folder).as_posix() for page in pages]
        past = history.read_lines(folder / history.FILE)
        found = (timed, now, lines, others, planned, inputs, measured, past)
        return folder, render(tables, evidence, *found)


@contextmanager
def keep_everything() -> Iterator[None]:
    """Read and render without looking for garbage: there is none, and it takes a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def find_orphans(folder: Path) -> list[str]:
    """Records and benchmarks of cells that are no longer in the tables, those of runtimes included.

    Benchmarks are read with their samples: BenchmarkError where these do not give what is stated.
    """
    from quantmatrix.tables import read

    known = {cell.id for cell in read.read().cells}
    found = [(EVIDENCE, name) for name in store.read_folder(folder / EVIDENCE)]
    found += [(BENCHMARKS, name) for name in bench_results.read_reports(folder, deep=True)]
    orphans = [
        f"{folder / kind / records.path_of(name)}: no cell {cell_of(name)} in the tables; delete it"
        for kind, name in found
        if cell_of(name) not in known
    ]
    others = {cell.id for cell in read.read().runtime_cells}
    return orphans + [
        f"{folder / columns.RUNTIMES / columns.path_of(name)}: no cell {name} in the tables; delete it"
        for name in columns.read_folder(folder / columns.RUNTIMES)
        if name not in others
    ]


def render(
    tables: Matrix,
    evidence: Mapping[str, Evidence],
    benchmarks: Mapping[str, Result] | None = None,
    now: Now | None = None,
    classes: Sequence[ClassLine] = (),
    others: Mapping[str, RuntimeRecord] | None = None,
    planned: Mapping[Key, PlanLine] | None = None,
    inputs: str = "",
    measured: Sequence[str] = (),
    past: Mapping[str, Sequence[Version]] | None = None,
) -> dict[str, bytes]:
    """Every file of the report, by its path below the reports folder; without `now` records are
    judged against the rows alone. `others` are records of other runtimes, by the id of their cell,
    `planned` the lines of plans.csv, `inputs` the digest of what all this was read from, `measured` pages of
    measurements below the reports folder, `past` the lines of history.csv."""
    standings = stand_all(tables, evidence, now)
    code = now.code if now else None
    joined = Joined(tables, standings, benchmarks, code)
    runtimes = Runtimes(tables, others or {}, standings, code)
    found = answers.collect(joined, evidence, planned or {}, inputs)
    cells = {cell.id for cell in tables.cells}
    known = (record for record in evidence.values() if record.cell["id"] in cells)
    lines = history.update(past or {}, known)
    pages = {
        history.FILE: history.write_lines(lines).encode(),
        answers.FILE: answers.encode(found),
        "support-matrix.md": write_overview(joined, summarize(classes)).encode(),
        "support-matrix.csv": write_csv(joined).encode(),
        "support-matrix.svg": draw_picture(joined),
        "badge.json": write_badge(tables, evidence, standings),
        "index.html": write_page(joined, runtimes, found, measured, lines),
    }
    if tables.runtimes:
        pages[PAGE] = write_runtimes_page(runtimes).encode()
        pages[TABLE] = write_runtimes_csv(runtimes).encode()
    for family in tables.families.values():
        pages[f"families/{family.id}.md"] = write_family(joined, family).encode()
    if classes:
        pages[CLASSES_PAGE] = write_classes(classes).encode()
    return pages


def draw_picture(joined: Joined) -> bytes:
    """The grid of families and hardware."""
    tables = joined.tables
    boxes: dict[tuple[str, str], list[Cell]] = {}
    for cell in tables.cells:
        boxes.setdefault((cell.family, cell.hardware), []).append(cell)
    counts = {name: joined.count(cells) for name, cells in boxes.items()}
    return draw_matrix(list(tables.families), list(tables.hardware), counts)


CELL_COLUMNS = (
    "id",
    "row",
    "family",
    "model",
    "checkpoint",
    "hardware",
    "backend",
    "claim",
    "rule",
)

JOINED_COLUMNS = (
    "state",
    "scope",
    "reason",
    "evidence",
    "worst_psnr_db",
    "worst_cosine",
    "made",
    "command_run",
    "command_offered",
)


def write_csv(joined: Joined) -> str:
    """One line per cell, every column that a filter may want."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(CELL_COLUMNS + JOINED_COLUMNS)
    for cell in joined.tables.cells:
        record = joined.evidence.get(cell.id)
        worst = read_worst(record)
        writer.writerow(
            [
                *(getattr(cell, name) for name in CELL_COLUMNS),
                joined.states[cell.id],
                joined.standings[cell.id].scope,
                joined.reasons[cell.id].partition("\n")[0],
                joined.file_of(cell),
                show_number(worst.get("psnr_db")),
                show_number(worst.get("cosine")),
                record.made if record else "",
                record.command if record else "",
                " && ".join(joined.offers[cell.id].commands),
            ]
        )
    return stream.getvalue()
