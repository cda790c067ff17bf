"""Executed: which planned checks of which cells were run, read from records or from JUnit files.

The unit is a check of a cell. A test that was skipped, stopped at its time limit, or whose process
died has no verdict and counts as not executed; so does a row, or its code, that changed since its record was made.
A JUnit file tells the cell by the brackets of the test's name and the check by the property `check`,
both of which the pytest plugin writes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from quantmatrix import strict_json
from quantmatrix.errors import QuantmatrixError, UsageError
from quantmatrix.exit_codes import CLAIM_VIOLATED, MEANINGS, NOT_EXECUTED, NOTHING_COLLECTED
from quantmatrix.proof.scopes import cell_of, find_records, key_of
from quantmatrix.proof.states import explain_state
from quantmatrix.tables.rows import ON_REQUEST

if TYPE_CHECKING:
    from quantmatrix.proof.freshness import Now
    from quantmatrix.proof.record import Evidence
    from quantmatrix.tables.rows import Cell, Matrix

Verdicts = dict[str, dict[str, str]]
"""`pass` or `fail` of each check, by cell id."""
UNPLANNED = 1
"""Exit code when something was executed that nobody planned."""


class ExecutedError(QuantmatrixError, ValueError):
    """A file that is not a JUnit report."""


@dataclass(frozen=True)
class Comparison:
    """Planned and executed checks of cells, as `cell: check, check`."""

    planned: int
    """Number of cells."""
    missing: Mapping[str, tuple[str, ...]]
    failed: Mapping[str, tuple[str, ...]]
    unplanned: Mapping[str, tuple[str, ...]]
    nothing: bool
    """Whether nothing was executed at all."""

    @property
    def code(self) -> int:
        """The exit code; see `quantmatrix.exit_codes`."""
        if self.nothing:
            return NOTHING_COLLECTED
        if self.missing:
            return NOT_EXECUTED
        return CLAIM_VIOLATED if self.failed else UNPLANNED if self.unplanned else 0

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        lists = {name: dict(getattr(self, name)) for name in ("missing", "failed", "unplanned")}
        return {"ok": self.code == 0, "exit_code": self.code, "planned": self.planned, **lists}

    def describe(self) -> list[str]:
        """One line per cell with a problem."""
        groups = (
            (MEANINGS[NOT_EXECUTED], self.missing),
            (MEANINGS[CLAIM_VIOLATED], self.failed),
            ("not planned", self.unplanned),
        )
        lines = [
            f"{label}: {cell} ({', '.join(checks)})"
            for label, found in groups
            for cell, checks in found.items()
        ]
        return [*([MEANINGS[NOTHING_COLLECTED]] if self.nothing else []), *lines]


def read_planned(names: Iterable[str], tables: Matrix) -> list[Cell]:
    """Cells that arguments plan: ids or groups of hardware.csv, files of rows, or of CI jobs as
    JSON.

    Raises UsageError for an argument that is none of these, and for rows that are not claimed.
    """
    from quantmatrix.harness import shards

    claimed = shards.runnable(tables)
    chosen: set[str] = set()
    for name in names:
        if name in tables.hardware or name in tables.groups:
            chosen.update(cell.id for cell in shards.runnable(tables, [name]))
            continue
        if not Path(name).is_file():
            raise UsageError(
                f"--planned {name}: neither hardware of the tables nor a file; "
                f"known: {', '.join([*tables.hardware, *tables.groups])}"
            )
        rows = read_rows_or_jobs(Path(name))
        where = f"--planned {name}"
        chosen.update(cell.id for cell in shards.select_rows(claimed, rows, where))
    return [cell for cell in claimed if cell.id in chosen]


def read_rows_or_jobs(path: Path) -> tuple[str, ...]:
    """Ids in a file: one per line, or what `quantmatrix matrix jobs --json` printed.

    Raises UsageError for JSON of another form.
    """
    from quantmatrix.harness import shards

    rows = shards.read_rows(path, f"--planned {path}")
    if not rows or not rows[0].startswith("{"):
        return rows
    try:
        jobs = strict_json.read(path)
        return tuple(str(row) for job in jobs["include"] for row in list_rows(job["rows"]))
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"--planned {path}: expected rows, one per line, or what `quantmatrix matrix jobs "
            f"--json` prints; found JSON without include[].rows ({error})"
        ) from error


def list_rows(rows: Any) -> list[Any]:
    """The rows of a job; TypeError for a text, which would be its letters."""
    if not isinstance(rows, list):
        raise TypeError(f"rows: {rows!r:.80}")
    return rows


def take_records(found: Mapping[str, Evidence], tables: Matrix, now: Now | None = None) -> Verdicts:
    """Verdicts of records, as JUnit files have them.

    A record of a row or of code that changed since is left out: that was not executed. A check that is
    claimed to fail passes by failing.
    """
    stale = list_stale(found, tables, now)
    fresh = {key: record for key, record in found.items() if key not in stale}
    return read_verdicts(fresh, {cell.id: cell for cell in tables.cells})


def read_verdicts(found: Mapping[str, Evidence], cells: Mapping[str, Cell]) -> Verdicts:
    """The verdicts of records by their keys, none of which is stale; `cells` are the tables' by id."""
    verdicts: Verdicts = {}
    for key, record in found.items():
        name = cell_of(key)
        results = {check: result.verdict for check, result in record.checks.items()}
        cell = cells.get(name)
        if cell and cell.claim == "failing" and cell.rule in results:
            results[cell.rule] = "pass" if results[cell.rule] == "fail" else "fail"
        add(verdicts, {name: results})
    return verdicts


def list_stale(
    found: Mapping[str, Evidence], tables: Matrix, now: Now | None = None
) -> dict[str, str]:
    """Why some records are not about rows and code as they stand, by their keys."""
    explained = {
        key_of(record): explain_state(cell, record, tables, now)
        for cell in tables.cells
        for record in find_records(found, cell.id).values()
    }
    return {name: why for name, (state, why) in explained.items() if state == "stale"}


def read_junit(path: Path) -> Verdicts:
    """Verdicts in a JUnit file; tests that are about no cell are left out.

    Raises ExecutedError for a file that is no JUnit report.
    """
    try:
        root = ElementTree.fromstring(strict_json.read_bytes(path))
    except (OSError, ElementTree.ParseError, ValueError, LookupError) as error:
        raise ExecutedError(f"{path}: not a JUnit report: {error}") from error
    verdicts: Verdicts = {}
    for case in root.iter("testcase"):
        properties = {p.get("name", ""): p.get("value", "") for p in case.iter("property")}
        cell = case.get("name", "").partition("[")[2].removesuffix("]")
        if not cell or properties.get("cell") != cell or "check" not in properties:
            continue  # another test, or one whose process died
        bad = case.find("failure") is not None or case.find("error") is not None
        if case.find("skipped") is not None or (bad and properties.get("problem") in NO_VERDICT):
            continue
        checks = verdicts.setdefault(cell, {})
        if checks.get(properties["check"]) != "fail":
            checks[properties["check"]] = "fail" if bad else "pass"
    return verdicts


NO_VERDICT = tuple(MEANINGS[code] for code in MEANINGS if code >= NOT_EXECUTED)
"""Problems of a test that leave its claim as open as before."""


def combine(several: Iterable[Verdicts]) -> Verdicts:
    """All verdicts; a check that failed anywhere failed."""
    combined: Verdicts = {}
    for verdicts in several:
        add(combined, verdicts)
    return combined


def add(combined: Verdicts, verdicts: Verdicts) -> None:
    """Add verdicts to others; a check that failed in either failed."""
    for cell, checks in verdicts.items():
        known = combined.setdefault(cell, {})
        for check, verdict in checks.items():
            known[check] = "fail" if "fail" in (verdict, known.get(check)) else verdict


def compare(planned: Iterable[Cell], verdicts: Verdicts, only: Collection[str] = ()) -> Comparison:
    """Planned against executed checks; `only` limits both to some checks.

    Checks that run on request only are planned where `only` names them, and never unplanned.
    Cells of a hardware that nothing was planned for are not looked at.
    """
    wanted = {cell.id: [c for c in cell.checks if fits(c, only)] for cell in planned}
    wanted = {cell: checks for cell, checks in wanted.items() if checks}
    rows_seen = {cell.partition("@")[2].partition("+")[0] for cell in wanted}

    def list_checks(cell: str, verdict: str | None) -> tuple[str, ...]:
        return tuple(c for c in wanted[cell] if verdicts.get(cell, {}).get(c) == verdict)

    missing = {cell: found for cell in wanted if (found := list_checks(cell, None))}
    failed = {cell: found for cell in wanted if (found := list_checks(cell, "fail"))}
    unplanned = {
        cell: extra
        for cell, checks in verdicts.items()
        if cell.partition("@")[2].partition("+")[0] in rows_seen
        and (extra := tuple(c for c in checks if fits(c, only) and c not in wanted.get(cell, ())))
    }
    executed = any(verdicts.get(cell) for cell in wanted)
    return Comparison(len(wanted), missing, failed, unplanned, nothing=not executed)


def fits(check: str, only: Collection[str]) -> bool:
    """Whether a check is looked at."""
    return check in only if only else check not in ON_REQUEST
