"""Lint: how the tables are read, and what they must not say.

A problem reads `matrix/cases.csv:17: claim: "suported" is not one of validated, expected, ...`.
Reading goes on after a problem, so that one run names them all. What needs more than the standard
library (does the family know the scheme, does a kernel have the rule) is left to the tests.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from quantmatrix import families, models, strict_json
from quantmatrix.identify import AUTO
from quantmatrix.lint_flags import list_flag_problems
from quantmatrix.matrix import (
    CHECKS,
    CLAIMS,
    EVERYWHERE,
    PLAIN_BACKENDS,
    SELECTORS,
    VENDORS,
    Cell,
    CheckpointRow,
    FamilyRow,
    HardwareRow,
    Matrix,
    MatrixError,
    ModelRow,
    split_flags,
)

Row = TypeVar("Row", FamilyRow, ModelRow, HardwareRow, CheckpointRow, "CaseRow")

ID = re.compile(r"[a-z0-9][a-z0-9._-]*")
LONGEST = 100
"""Characters of an id: the names of files and of tests are made of it."""
REVISION = re.compile(r"([0-9a-f]{40})?")
OPTIONAL = {
    "models": ("notes",),
    "hardware": ("memory_gib", "devices", "group", "packages"),
    "checkpoints": ("revision", "kept", "algo", "cli", "scope", "notes"),
    "cases": ("backend", "flags", "rule", "notes"),
}
"""Columns that may be blank, by table."""
LATER = {"hardware": ("devices",)}
"""Of these the columns that tables of earlier revisions do not have; there they count as blank."""
ARCHITECTURES = {
    "cpu": r"cpu|mps",
    "nvidia": r"sm[0-9]{2,3}[a-z]?(-[a-z0-9]+)*",
    "amd": r"gfx[0-9a-f]+",
    "ascend": r"[0-9]+[a-z]?",
}
"""How a probe of each vendor's devices names them (see `quantmatrix.hardware`)."""
PACKAGE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
RESERVED = (EVERYWHERE, AUTO)
"""Words that stand for hardware wherever it is asked for, so that nothing else may be called so."""


@dataclass(frozen=True)
class CaseRow:
    """A line of cases.csv, before it becomes cells."""

    id: str
    family: str
    model: str
    checkpoint: str
    hardware: tuple[str, ...]
    backend: tuple[str, ...]
    flags: tuple[str, ...]
    checks: tuple[str, ...]
    claim: str
    rule: str
    notes: str


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
        """The rows by id; an id that stands there twice is a problem."""
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

    def check(self, line: int, column: str, words: Sequence[str], known: Collection[str]) -> bool:
        """Whether all words are known ones and none stands there twice; blanks were noted."""
        good = all(words)
        for word in dict.fromkeys(words):
            if word and word not in known:
                self.note(line, f'{column}: "{word}" is not one of {", ".join(known)}')
                good = False
            if words.count(word) > 1:
                self.note(line, f'{column}: "{word}" stands there twice')
                good = False
        return good


def read_tables(folder: Path) -> Matrix:
    """All five tables of a folder; raises MatrixError with every problem."""
    problems: list[str] = []
    family_table = read_table(folder / "families.csv", FamilyRow, problems)
    model_table = read_table(folder / "models.csv", ModelRow, problems)
    hardware_table = read_table(folder / "hardware.csv", HardwareRow, problems)
    checkpoint_table = read_table(folder / "checkpoints.csv", CheckpointRow, problems)
    case_table = read_table(folder / "cases.csv", CaseRow, problems)
    tables = Matrix(
        families=family_table.by_id(),
        models=model_table.by_id(),
        hardware=hardware_table.by_id(),
        checkpoints=checkpoint_table.by_id(),
        cells=(),
    )
    case_table.by_id()
    check_families(family_table, tables)
    check_models(model_table)
    check_hardware(hardware_table)
    check_checkpoints(checkpoint_table, tables)
    cells = tuple(expand_cases(case_table, tables))
    if problems:
        raise MatrixError(problems)
    return replace(tables, cells=cells)


def read_table(path: Path, kind: type[Row], problems: list[str]) -> Table[Row]:
    """The rows of one CSV file; lines that cannot be read are noted and left out."""
    table: Table[Row] = Table(f"{path.parent.name}/{path.name}", problems)
    columns = [column.name for column in fields(kind)]
    try:
        text = strict_json.read_bytes(path).decode("utf-8")
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
                    told = dict(zip(header, cells, strict=True))
                    row = build(line, [told.get(name, "") for name in columns])
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
    """(line on which it starts, cells) of every record that is not an empty line."""
    start = 1
    for cells in reader:
        if cells:
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

    def read_words(line: int, column: str, text: str) -> tuple[str, ...]:
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
            readers[column.name] = read_words
    columns = [(c.name, c.name not in optional, readers.get(c.name)) for c in fields(kind)]

    def build(line: int, cells: list[str]) -> Row:
        values: list[Any] = []
        for text, (column, needed, read) in zip(cells, columns, strict=True):
            if needed and not text:
                table.note(line, f"{column}: blank")
            values.append(read(line, column, text) if read else text)
        return kind(*values)

    return build


def check_families(table: Table[FamilyRow], tables: Matrix) -> None:
    """Ids are those of the modules in families/, models are known."""
    check_modules(table, "families", families.IDS)
    for line, row in table.rows:
        table.check(line, "models", row.models, tables.models)


def check_models(table: Table[ModelRow]) -> None:
    """Ids are those of the modules in models/, each of another repository."""
    check_modules(table, "models", models.IDS)
    repos: dict[str, int] = {}
    for line, row in table.rows:
        check_reference(table, line, "repo", row.repo)
        if (first := repos.setdefault(row.repo, line)) != line:
            table.note(line, f"repo: {row.repo} is the repo of line {first}, too")
        table.check(line, "transformers", row.transformers, row.transformers)


def check_reference(table: Table[Any], line: int, column: str, text: str) -> None:
    """A hub id or path is one word, and none that a command would take for a flag."""
    if text.startswith("-") or len(text.split()) > 1:
        table.note(line, f'{column}: "{text}" is no hub id and no path')


def check_modules(table: Table[Any], package: str, ids: Sequence[str]) -> None:
    """Every row has its module `quantmatrix/<package>/<id>.py`, and every module its row."""
    for line, row in table.rows:
        table.check(line, "id", [row.id], ids)
    listed = {row.id for _, row in table.rows}
    for name in ids:
        if name not in listed:
            module = f"{package}/{name.replace('-', '_')}.py"
            table.problems.append(f"{table.name}: no row for {name}, the module {module}")


def check_hardware(table: Table[HardwareRow]) -> None:
    """Vendors are known and have such devices, and no group is named like a hardware."""
    ids = {row.id for _, row in table.rows}
    for line, row in table.rows:
        if table.check(line, "vendor", [row.vendor], VENDORS):
            form = ARCHITECTURES[row.vendor]
            if row.arch and not re.fullmatch(form, row.arch):
                table.note(line, f'arch: "{row.arch}" is none of {row.vendor}, expected {form}')
        for name in sorted(ids.intersection(row.group)):
            table.note(line, f'group: "{name}" is the id of a hardware')
        for name in (row.id, *row.group):
            if name in RESERVED:
                table.note(line, f'"{name}" is a word for other hardware; take another name')
        table.check(line, "group", row.group, row.group)
        table.check(line, "packages", row.packages, row.packages)
        for column, shape in (("group", ID), ("packages", PACKAGE)):
            for name in getattr(row, column):
                if not shape.fullmatch(name):
                    table.note(line, f'{column}: "{name}" is no name')


def check_checkpoints(table: Table[CheckpointRow], tables: Matrix) -> None:
    """Foreign keys, a flag that can name the form, and one content per reference."""
    contents: dict[str, tuple[int, tuple[Any, ...]]] = {}
    for line, row in table.rows:
        table.check(line, "family", [row.family], tables.families)
        if table.check(line, "model", [row.model], tables.models):
            known = tables.models[row.model].transformers
            table.check(line, "components", row.components, known)
        if table.check(line, "form", [row.form], SELECTORS):
            table.check(line, f"selector of a {row.form}", [row.selector], SELECTORS[row.form])
        if not REVISION.fullmatch(row.revision):
            table.note(line, f'revision: "{row.revision}" is not a commit of 40 digits')
        for column in ("reference", "base"):
            check_reference(table, line, column, getattr(row, column))
        if row.form == "online":
            continue
        if row.reference and row.reference == row.base:
            table.note(line, f"reference: {row.reference} is its own base, the full precision")
        content = (row.family, row.model, row.form, row.scheme, row.kept, row.components)
        first, expected = contents.setdefault(row.reference, (line, content))
        if content != expected:
            table.note(line, f"reference: {row.reference} has another content in line {first}")


def expand_cases(table: Table[CaseRow], tables: Matrix) -> Iterator[Cell]:
    """The cells of all lines; a line with an unknown word gives those that can be named."""
    groups = tables.groups
    words = [*tables.hardware, *groups]
    places: dict[tuple[str, ...], list[str]] = {}
    seen: dict[tuple[Any, ...], int] = {}
    for line, row in table.rows:
        check_case(table, line, row, tables)
        if row.hardware not in places and table.check(line, "hardware", row.hardware, words):
            places[row.hardware] = [p for w in row.hardware for p in groups.get(w, (w,))]
        listed = places.get(row.hardware, [])
        for place in {p for p in listed if listed.count(p) > 1}:
            table.note(line, f"hardware: {place} is named twice, once by a group")
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


def list_checks(checks: tuple[str, ...], backend: str) -> tuple[str, ...]:
    """The checks of a row that its cell of a backend has."""
    return tuple(c for c in checks if c != "compile" or backend not in PLAIN_BACKENDS)


def check_case(table: Table[CaseRow], line: int, row: CaseRow, tables: Matrix) -> None:
    """What one line of cases.csv must say, whatever the other lines say."""
    if table.check(line, "checkpoint", [row.checkpoint], tables.checkpoints):
        checkpoint = tables.checkpoints[row.checkpoint]
        for column in ("family", "model"):
            found, expected = getattr(row, column), getattr(checkpoint, column)
            if found and found != expected:
                table.note(line, f"{column}: {found}, but {row.checkpoint} is of {expected}")
        for why in list_flag_problems(row.flags, checkpoint):
            table.note(line, f"flags: {why}")
    for word in row.backend:
        if not ID.fullmatch(word) or row.backend.count(word) > 1:
            table.note(line, f'backend: "{word}" is no name, or stands there twice')
    table.check(line, "checks", row.checks, CHECKS)
    if table.check(line, "claim", [row.claim], CLAIMS):
        check_claim(table, line, row, tables)


def check_claim(table: Table[CaseRow], line: int, row: CaseRow, tables: Matrix) -> None:
    """A reason wherever something is refused, and only there; the guide behind `validated`."""
    if row.claim == "refused":
        if not row.rule or not row.notes:
            table.note(line, "a refused row needs a rule, and the reason in notes")
        elif not ID.fullmatch(row.rule):
            table.note(line, f'rule: "{row.rule}" is not made of a-z, 0-9, dot, dash, underscore')
        if row.checks != ("refuse",):
            table.note(line, f"checks: a refused row has the check refuse, not {row.checks}")
        return
    if row.claim == "failing":
        if row.rule not in row.checks or not row.notes:
            table.note(line, "a failing row needs one of its checks as rule, the reason in notes")
    elif row.rule:
        table.note(line, f"rule: {row.rule}, but the row is not refused")
    if "refuse" in row.checks:
        table.note(line, "checks: refuse, but the row is not refused")
    if row.claim == "planned" and not row.notes:
        table.note(line, "notes: blank; a planned row says what is missing")
    family = tables.families.get(row.family)
    if row.claim == "validated" and family and row.model not in family.models:
        table.note(
            line,
            f"claim: the guide does not name {row.model} for {row.family}, whose models are "
            f"{', '.join(family.models)}; say expected",
        )


def check_sharing(table: Table[CaseRow], line: int, row: CaseRow, place: HardwareRow) -> None:
    """`--nproc-per-node` is the number of devices of the hardware; processes of a CPU share it."""
    text = " ".join(row.flags).replace("_", "-").replace("=", " ")
    found = re.search(r"--nproc-per-node (\S+)", text)
    given = found[1] if found else "1"
    if place.vendor != "cpu" and given != str(place.devices):
        table.note(
            line, f"flags: --nproc-per-node {given}, but {place.id} has devices: {place.devices}"
        )


def check_twin(
    table: Table[CaseRow],
    line: int,
    row: CaseRow,
    hardware: str,
    backend: str,
    seen: dict[tuple[Any, ...], int],
) -> None:
    """No cell stands in two lines; where a row without flags is refused, nothing is claimed."""
    place = (row.checkpoint, hardware, backend)
    text = " ".join(filter(None, place))
    first = seen.setdefault((*place, row.flags), line)
    if first != line:
        table.note(line, f"{text}: the same cell as in line {first}")
        return
    refused = row.claim == "refused"
    if refused and row.flags:
        return
    seen.setdefault((*place, refused), line)
    if other := seen.get((*place, not refused)):
        table.note(line, f"{text}: line {other} claims the opposite")
