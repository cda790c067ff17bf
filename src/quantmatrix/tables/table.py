"""Table: one CSV file, every problem with its line.

A line that begins with `#` is a comment. A first one that reads `# quantmatrix tables, version 1` says which
version of the columns a file has; without it a file is of version 1, the only one that there is.
"""

from __future__ import annotations

import csv
import io
import re
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Generic, TypeVar

from quantmatrix import strict_json
from quantmatrix.tables.rows import (
    CheckpointRow,
    FamilyRow,
    HardwareRow,
    ModelRow,
    RuntimeRow,
    StatementRow,
    split_flags,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence
    from pathlib import Path
    from typing import Any


Row = TypeVar(
    "Row", FamilyRow, ModelRow, HardwareRow, CheckpointRow, "CaseRow", RuntimeRow, StatementRow
)

ID = re.compile(r"[a-z0-9][a-z0-9._-]*")

LONGEST = 100
"""Characters of an id: the names of files and of tests are made of it."""

OPTIONAL = {
    "models": ("notes",),
    "hardware": ("memory_gib", "devices", "group", "packages"),
    "checkpoints": ("revision", "kept", "algo", "cli", "scope", "notes"),
    "cases": ("backend", "flags", "rule", "notes"),
    "runtimes": ("found", "minimum", "home", "notes"),
    "statements": ("models", "forms", "version"),
}
"""Columns that may be blank, by table."""

VERSION = 1
"""Of the columns and of what they may say; a change that earlier tables do not survive raises it."""

DECLARED = re.compile(r"\ufeff?# quantmatrix tables, version ([0-9]{1,4})\b")

LATER = {"hardware": ("devices",)}
"""Of these the columns that tables of earlier revisions do not have; there they count as blank."""


@dataclass(frozen=True)
class CaseRow:
    """A line of cases.csv, before it becomes cells."""

    id: str
    """Name of the row."""
    family: str
    """That of its checkpoint."""
    model: str
    """That of its checkpoint."""
    checkpoint: str
    """A row of checkpoints.csv."""
    hardware: tuple[str, ...]
    """Rows of hardware.csv, groups, or `all`."""
    backend: tuple[str, ...]
    """Kernel backends; blank for the one that the hardware runs by default."""
    flags: tuple[str, ...]
    """Further flags of `quantmatrix generate`, quoted as in a shell; first `NAME=value` for variables."""
    checks: tuple[str, ...]
    """What is checked; each is a test."""
    claim: str
    """What the row says."""
    rule: str
    """Of a refused row the rule that refuses; of a failing one the check that fails."""
    notes: str
    """Why, where it is refused, failing or planned."""


@dataclass
class Table(Generic[Row]):
    """One table being read: its rows with their lines, and where problems are noted."""

    name: str
    """As problems spell it: `matrix/cases.csv`."""
    problems: list[str]
    """Shared by all tables."""
    rows: list[tuple[int, Row]] = field(default_factory=list)

    def note(self, line: int, text: str) -> None:
        """Note a problem of a line."""
        self.problems.append(f"{self.name}:{line}: {text}")

    def by_id(self) -> dict[str, Row]:
        """The rows by id; an id that is repeated is a problem."""
        found: dict[str, Row] = {}
        lines: dict[str, int] = {}
        for line, row in self.rows:
            if row.id in found:
                self.note(line, f'id: "{row.id}" is the id of line {lines[row.id]}, too')
            elif row.id and not ID.fullmatch(row.id):
                self.note(line, f'id: "{row.id}" is not made of a-z, 0-9, dot, dash, underscore')
            elif len(row.id) > LONGEST:
                self.note(line, f"id: {len(row.id)} characters, a file name takes {LONGEST}")
            found.setdefault(row.id, row)
            lines.setdefault(row.id, line)
        return found

    def check(self, line: int, column: str, values: Sequence[str], known: Collection[str]) -> bool:
        """Whether all values are known and none is repeated; blanks were noted."""
        good = all(values)
        for value in dict.fromkeys(values):
            if value and value not in known:
                self.note(line, f'{column}: "{value}" is not one of {", ".join(known)}')
                good = False
            if values.count(value) > 1:
                self.note(line, f'{column}: "{value}" is repeated')
                good = False
        return good


def read_table(path: Path, kind: type[Row], problems: list[str]) -> Table[Row]:
    """The rows of one CSV file; lines that cannot be read are noted and left out."""
    table: Table[Row] = Table(f"{path.parent.name}/{path.name}", problems)
    columns = [column.name for column in fields(kind)]
    try:
        text = strict_json.read_bytes(path).decode("utf-8-sig")  # spreadsheets put a mark before it
        if (said := DECLARED.match(text)) and int(said[1]) > VERSION:
            table.note(
                1, f"version {said[1]} of the tables; this quantmatrix reads version {VERSION}"
            )
            return table
        with io.StringIO(text, newline="") as stream:
            records = number_records(csv.reader(stream, strict=True))
            line, header = next(records, (1, []))
            added = [name for name in LATER.get(path.stem, ()) if name not in header]
            if header != [name for name in columns if name not in added]:
                table.note(line, f"expected the columns {','.join(columns)}")
                return table
            build = choose_builder(kind, table, OPTIONAL.get(path.stem, ()))
            for line, cells in records:
                if len(cells) != len(header):
                    table.note(line, f"found {len(cells)} cells, expected {len(header)}")
                else:
                    cell_by_name = dict(zip(header, cells, strict=True))
                    row = build(line, [cell_by_name.get(name, "") for name in columns])
                    table.rows.append((line, row))
            if not table.rows and not problems:
                table.note(line, "no row below the columns: is the file whole?")
    except FileNotFoundError:
        problems.append(f"{table.name}: no such file; the folder is {path.parent}")
    except OSError as error:
        problems.append(f"{table.name}: cannot be read: {error.strerror or error}")
    except strict_json.JsonError as error:
        problems.append(f"{table.name}: {error}")
    except (csv.Error, UnicodeDecodeError) as error:
        problems.append(f"{table.name}: not a CSV file in UTF-8: {error}")
    return table


def number_records(reader: Any) -> Iterator[tuple[int, list[str]]]:
    """(line on which it starts, cells) of every record that is no empty line and no comment."""
    start = 1
    for cells in reader:
        if cells and not cells[0].startswith("#"):
            yield start, [cell.strip() for cell in cells]
        start = reader.line_num + 1


def choose_builder(
    kind: type[Row], table: Table[Row], optional: Collection[str]
) -> Callable[[int, list[str]], Row]:
    """A function that makes a row of (line, cells), its cells converted and blanks noted."""

    def read_number(line: int, column: str, text: str) -> float:
        if text and not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", text):
            table.note(line, f'{column}: "{text}" is not a number of GiB')
            return 0.0
        return float(text or 0)

    def read_count(line: int, column: str, text: str) -> int:
        if text and not re.fullmatch("[1-9][0-9]{0,5}", text):
            table.note(line, f'{column}: "{text}" is not a number from 1')
            return 1
        return int(text or 1)

    def read_flags(line: int, column: str, text: str) -> tuple[str, ...]:
        try:
            return split_flags(text)
        except ValueError as error:
            table.note(line, f"{column}: {error}: {text}")
            return ()

    def read_names(line: int, column: str, text: str) -> tuple[str, ...]:
        return tuple(text.split())

    readers: dict[str, Callable[[int, str, str], Any]] = {}
    for column in fields(kind):
        if column.name == "flags":
            readers[column.name] = read_flags
        elif column.name == "memory_gib":
            readers[column.name] = read_number
        elif column.name == "devices":
            readers[column.name] = read_count
        elif column.type == "tuple[str, ...]":
            readers[column.name] = read_names
    columns = [(c.name, c.name not in optional, readers.get(c.name)) for c in fields(kind)]

    def build(line: int, cells: list[str]) -> Row:
        values: list[Any] = []
        for text, (column, needed, read) in zip(cells, columns, strict=True):
            if needed and not text:
                table.note(line, f"{column}: blank")
            values.append(read(line, column, text) if read else text)
        return kind(*values)

    return build
