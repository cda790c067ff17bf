"""Selection: which cells of the matrix a run of the suites is about.

Filters name columns of the tables (`--family`, `--model`, `--hardware`, `--check`, `--backend`),
`--rows` names rows or cells in a file, and `--shard 2/5` takes the second of five parts of what the
others left. A name that the tables do not have is a usage error; a selection that fits no claimed
cell is empty, which a run reports by an exit code of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quantmatrix.errors import QuantmatrixError, UsageError
from quantmatrix.proof.record import list_versions

if TYPE_CHECKING:
    from quantmatrix.proof.record import Evidence
    from quantmatrix.tables.rows import Cell, Matrix

FILTERS = ("family", "model", "hardware", "check", "backend")


class EmptySelection(QuantmatrixError, LookupError):
    """No claimed cell of the matrix is as the options say."""


def split_values(given: Iterable[str]) -> tuple[str, ...]:
    """Values of a repeatable option, each of which may hold several, separated by commas."""
    return tuple(value for text in given for value in text.replace(",", " ").split())


def show_options(wanted: Mapping[str, tuple[str, ...]]) -> str:
    """The filters as they were given, `--family fp8 --check load`."""
    return " ".join(f"--{name} {','.join(values)}" for name, values in wanted.items() if values)


def select_cells(
    tables: Matrix,
    wanted: Mapping[str, tuple[str, ...]],
    rows: Path | None = None,
    shard: str | None = None,
    evidence: Path | None = None,
) -> list[Cell]:
    """Cells that pass every filter, are claimed, and can be run, in the order of the tables.

    Rows of a family that has no module yet stay `unproven`: nothing could run them. `evidence` is
    the folder whose timings decide how `shard` is cut. Raises UsageError for names that the tables
    do not have, EmptySelection when nothing is left.
    """
    from quantmatrix.harness import shards

    check_names(tables, wanted)
    cells = [cell for cell in shards.runnable(tables) if fits(cell, wanted)]
    if rows is not None:
        cells = shards.select_rows(cells, shards.read_rows(rows), f"--rows {rows}")
    if shard is not None:
        cells = shards.select_shard(cells, read_timings(evidence), shard)
    if not cells:
        options = [show_options(wanted), f"--rows {rows}" if rows else ""]
        options.append(f"--shard {shard}" if shard else "")
        chosen = " ".join(option for option in options if option)
        raise EmptySelection(f"{chosen or 'the tables'}: no claimed cell of the matrix matches")
    return cells


def select_changed(
    cells: Sequence[Cell], tables: Matrix, reports: Path, runs: Callable[[Cell, str], bool]
) -> list[Cell]:
    """Cells that have to run again, and one of each family, model, backend and claim of the others.

    Those that have to are cells one of whose checks `runs` here, and has no passing verdict in the reports
    folder: its record is missing, failing, or stale (of another row, code or release of a package). The others ran
    on the code that is here; one of each kind shows that this machine agrees.
    """
    from quantmatrix.harness import completeness
    from quantmatrix.proof import freshness, merge, scopes

    cells = [cell for cell in cells if any(runs(cell, check) for check in cell.checks)]
    records = merge.merge_folders([reports / "evidence"]).records
    now = freshness.read_now(reports, records)
    verdicts = completeness.take_records(records, tables, now)
    found = completeness.compare(cells, verdicts)
    open_checks = [*found.missing.items(), *found.failed.items()]
    by_id = {cell.id: cell for cell in cells}
    due = {cell for cell, checks in open_checks if any(runs(by_id[cell], c) for c in checks)}
    installed = list_versions()
    for key, record in records.items():
        cell = by_id.get(scopes.cell_of(key))
        if cell and runs(cell, "load") and freshness.list_upgrades(record.versions, installed):
            due.add(cell.id)
    first: dict[tuple[str, ...], str] = {}
    for cell in cells:
        first.setdefault((cell.family, cell.model, cell.backend, cell.claim), cell.id)
    return [cell for cell in cells if cell.id in due or cell.id in first.values()]


def check_reach(cells: Iterable[Cell], rows: Path, runs: Callable[[Cell], bool]) -> None:
    """Raise UsageError for a line of a file of rows none of whose cells is run: `runs` tells which.

    A run that skips what it was asked to run, and ends well, would be a lie.
    """
    from quantmatrix.harness import shards

    cells = list(cells)
    for name in shards.read_rows(rows):
        named = [cell for cell in cells if name in (cell.id, cell.row)]
        if not any(runs(cell) for cell in named):
            hardware = ",".join(dict.fromkeys(cell.hardware for cell in named))
            raise UsageError(
                f"--rows {rows}: {name} runs on {hardware} only: add --hardware {hardware}"
            )


def check_names(tables: Matrix, wanted: Mapping[str, tuple[str, ...]]) -> None:
    """Raise UsageError for a filter's name that the tables do not have."""
    known: dict[str, set[str]] = {
        "family": set(tables.families),
        "model": set(tables.models),
        "hardware": set(tables.hardware),
        "check": {check for cell in tables.cells for check in cell.checks},
        "backend": {cell.backend for cell in tables.cells} - {""},
    }
    for name, values in wanted.items():
        if unknown := [value for value in values if value not in known[name]]:
            raise UsageError(
                f"--{name} {unknown[0]}: not in the tables; known: {', '.join(sorted(known[name]))}"
            )


def fits(cell: Cell, wanted: Mapping[str, tuple[str, ...]]) -> bool:
    """Whether a cell passes the filters."""
    checks = wanted.get("check", ())
    columns = (name for name in FILTERS if name != "check" and wanted.get(name))
    return all(getattr(cell, name) in wanted[name] for name in columns) and (
        not checks or not set(cell.checks).isdisjoint(checks)
    )


def read_timings(folder: Path | None) -> Mapping[str, Evidence]:
    """Records to estimate from; none where there is no folder."""
    from quantmatrix.proof import store

    return store.read_folder(folder) if folder is not None and folder.is_dir() else {}
