"""Read: the tables of a folder; lines of cases become cells."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from quantmatrix.tables import source
from quantmatrix.tables.lint import (
    check_case,
    check_checkpoints,
    check_families,
    check_hardware,
    check_models,
    check_runtimes,
    check_sharing,
    check_statements,
    check_twin,
    list_checks,
)
from quantmatrix.tables.rows import (
    Cell,
    CheckpointRow,
    FamilyRow,
    HardwareRow,
    Matrix,
    MatrixError,
    ModelRow,
    RuntimeRow,
    StatementRow,
)
from quantmatrix.tables.table import CaseRow, Table, read_table

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any


def read_tables(folder: Path, *, whole: bool = False) -> Matrix:
    """All tables of a folder; raises MatrixError with every problem.

    With `whole` every family and model of the package must have its row. The tables of runtimes may
    both be missing: those of earlier revisions are.
    """
    problems: list[str] = []
    family_table = read_table(folder / "families.csv", FamilyRow, problems)
    model_table = read_table(folder / "models.csv", ModelRow, problems)
    hardware_table = read_table(folder / "hardware.csv", HardwareRow, problems)
    checkpoint_table = read_table(folder / "checkpoints.csv", CheckpointRow, problems)
    case_table = read_table(folder / "cases.csv", CaseRow, problems)
    runtime_table, statement_table = read_runtimes(folder, problems)
    tables = Matrix(
        families=family_table.by_id(),
        models=model_table.by_id(),
        hardware=hardware_table.by_id(),
        checkpoints=checkpoint_table.by_id(),
        cells=(),
        runtimes=runtime_table.by_id(),
        statements=statement_table.by_id(),
    )
    case_table.by_id()
    check_families(family_table, tables, whole=whole)
    check_models(model_table, whole=whole)
    check_hardware(hardware_table)
    check_checkpoints(checkpoint_table, tables)
    if runtime_table.rows:
        check_runtimes(runtime_table, tables, whole=whole)
        check_statements(statement_table, tables)
    cells = tuple(expand_cases(case_table, tables))
    if problems:
        raise MatrixError(problems)
    return replace(tables, cells=cells)


def read_runtimes(
    folder: Path, problems: list[str]
) -> tuple[Table[RuntimeRow], Table[StatementRow]]:
    """The tables of runtimes and of what is said of them, empty where a folder has neither."""
    files = folder / "runtimes.csv", folder / "statements.csv"
    if not any(path.exists() for path in files):
        names = [f"{path.parent.name}/{path.name}" for path in files]
        return Table(names[0], problems), Table(names[1], problems)
    runtimes, statements = files
    return (
        read_table(runtimes, RuntimeRow, problems),
        read_table(statements, StatementRow, problems),
    )


def expand_cases(table: Table[CaseRow], tables: Matrix) -> Iterator[Cell]:
    """The cells of all lines; a line with an unknown name gives those that can be named."""
    groups = tables.groups
    names = [*tables.hardware, *groups]
    rows_named: dict[tuple[str, ...], list[str]] = {}
    seen: dict[tuple[Any, ...], int] = {}
    for line, row in table.rows:
        check_case(table, line, row, tables)
        if row.hardware not in rows_named and table.check(line, "hardware", row.hardware, names):
            rows_named[row.hardware] = [p for w in row.hardware for p in groups.get(w, (w,))]
        listed = rows_named.get(row.hardware, [])
        for name in {p for p in listed if listed.count(p) > 1}:
            table.note(line, f"hardware: {name} is named twice, once by a group")
        for hardware in dict.fromkeys(listed):
            check_sharing(table, line, row, tables.hardware[hardware])
            for backend in row.backend or ("",):
                check_twin(table, line, row, hardware, backend, seen)
                suffix = f"+{backend}" if len(row.backend) > 1 else ""
                yield Cell(
                    id=f"{row.id}@{hardware}{suffix}",
                    row=row.id,
                    checkpoint=row.checkpoint,
                    family=row.family,
                    model=row.model,
                    hardware=hardware,
                    backend=backend,
                    flags=row.flags,
                    checks=list_checks(row.checks, backend),
                    claim=row.claim,
                    rule=row.rule,
                    notes=row.notes,
                    line=line,
                )


def tables_folder() -> Path:
    """The folder of the tables in use (see `quantmatrix.tables.source`)."""
    return source.find().folder


def read(folder: Path | None = None) -> Matrix:
    """The tables of a folder, or those in use; raises MatrixError with every problem of all files.

    Only our own must name every family and model that the package knows.
    """
    found = folder or tables_folder()
    if folder is None:
        last_read.append(found)
    return read_tables(found, whole=found == source.own_folder())


last_read: deque[Path] = deque(maxlen=1)
"""The folder that a command read, so that it can say so."""
