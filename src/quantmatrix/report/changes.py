"""Matrix changes: which cells two revisions gained, lost and changed, claims and states alike.

Both revisions are read from git, tables, evidence and code together, so the working tree takes no
part: a record is judged by the code of its revision. A cell is changed when something of its row is
(`claim`, `flags`, `checks` ...), when its checkpoint's row is, or when its state is: evidence that
went stale is a change, too.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantmatrix.errors import QuantmatrixError, UsageError
from quantmatrix.proof import record as records
from quantmatrix.proof import store
from quantmatrix.proof.code_digest import Code
from quantmatrix.proof.freshness import Now, read_now
from quantmatrix.proof.revisions import EVIDENCE, REPORTS, SOURCES, TABLES, extract, find_commit
from quantmatrix.proof.states import stand_all
from quantmatrix.tables import read

if TYPE_CHECKING:
    from quantmatrix.tables.rows import Matrix

COLUMNS = tuple(key for key in records.CELL_KEYS if key not in ("id", "row", "row_digest"))
CHECKPOINT_ROW = "checkpoint row"


@dataclass(frozen=True)
class CellNow:
    """A cell at one revision."""

    columns: Mapping[str, Any]
    """The columns of its row, as evidence describes them."""
    digest: str
    """Of the row and its checkpoint's row."""
    state: str
    scope: str = ""
    """Of the record that names the cell."""


@dataclass(frozen=True)
class Changed:
    """A cell that both revisions have: (before, after) per column that differs."""

    cell: str
    columns: Mapping[str, tuple[Any, Any]]


@dataclass(frozen=True)
class Changes:
    """What happened between two revisions."""

    gained: Mapping[str, CellNow]
    lost: Mapping[str, CellNow]
    changed: tuple[Changed, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""

        def tell(cells: Mapping[str, CellNow]) -> dict[str, Any]:
            return {n: {**c.columns, "state": c.state, "scope": c.scope} for n, c in cells.items()}

        pairs = {
            change.cell: {
                column: {"before": before, "after": after}
                for column, (before, after) in change.columns.items()
            }
            for change in self.changed
        }
        return {"gained": tell(self.gained), "lost": tell(self.lost), "changed": pairs}


def compare_revisions(span: str, root: Path) -> Changes:
    """Changes of `A..B` in the repository at `root`; B is HEAD where it is left out.

    Raises UsageError for a span of another form, QuantmatrixError for a revision that cannot be
    read.
    """
    first, dots, second = span.partition("..")
    if not dots or not first or second.startswith("."):
        raise UsageError(f"{span}: expected two revisions, A..B")
    return compare(read_cells(first, root), read_cells(second or "HEAD", root))


def compare(before: Mapping[str, CellNow], after: Mapping[str, CellNow]) -> Changes:
    """Changes between two sets of cells, each in table order."""
    changed = []
    for name, now in after.items():
        if name in before and (columns := list_columns(before[name], now)):
            changed.append(Changed(name, columns))
    return Changes(
        gained={name: cell for name, cell in after.items() if name not in before},
        lost={name: cell for name, cell in before.items() if name not in after},
        changed=tuple(changed),
    )


def list_columns(before: CellNow, after: CellNow) -> dict[str, tuple[Any, Any]]:
    """(before, after) of what differs."""
    found = {
        column: (before.columns[column], after.columns[column])
        for column in COLUMNS
        if before.columns[column] != after.columns[column]
    }
    if before.digest != after.digest and not set(found) - {"checks"}:
        found[CHECKPOINT_ROW] = ("", "changed")
    if before.state != after.state:
        found["state"] = (before.state, after.state)
    if before.scope != after.scope:
        found["scope"] = (before.scope, after.scope)
    return found


def read_cells(revision: str, root: Path) -> dict[str, CellNow]:
    """Every cell of a revision with its state then.

    Raises QuantmatrixError, which names the revision, where its files cannot be read.
    """
    commit = find_commit(revision, root)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        extract(commit, root, folder)
        try:
            tables = read.read(folder / TABLES)
            evidence = store.read_folder(folder / EVIDENCE)
            now = read_now(folder / REPORTS, evidence, Code(folder / SOURCES))
        except QuantmatrixError as error:
            text = str(error).replace(f"{folder}/", "")
            raise QuantmatrixError(f"revision {revision} cannot be read: {text}") from error
        known = any("shared_digest" in record.cell for record in evidence.values())
        if not known or not (folder / SOURCES).is_dir():
            now = replace(now, code=None)  # a revision from before records had these digests
        return describe_cells(tables, evidence, now)


def describe_cells(
    tables: Matrix, evidence: Mapping[str, records.Evidence], now: Now | None = None
) -> dict[str, CellNow]:
    """Cells by id, as they are compared."""
    found = {}
    standings = stand_all(tables, evidence, now)
    for cell in tables.cells:
        described = records.describe_cell(cell, tables)
        columns = {key: described[key] for key in COLUMNS}
        standing = standings[cell.id]
        row_state = described["row_digest"], standing.state, standing.scope
        found[cell.id] = CellNow(columns, *row_state)
    return found


def find_checkout(command: str) -> Path:
    """The checkout whose history a command asks; UsageError where there is none around the package."""
    root = read.tables_folder().parent
    if not (root / ".git").exists():
        raise UsageError(
            f"{command} asks the history of the project, and there is none: {root} is not a git "
            "checkout. Clone the project and run it there"
        )
    return root


def write_markdown(found: Changes, span: str) -> str:
    """The changes as Markdown, for a review."""
    from quantmatrix.report.table import write_table

    counts = f"{len(found.gained)} gained, {len(found.lost)} lost, {len(found.changed)} changed"
    parts = [f"## Matrix {span}: {counts}"]
    for title, cells in (("Gained", found.gained), ("Lost", found.lost)):
        if cells:
            rows = [[f"`{n}`", str(c.columns["claim"]), c.state] for n, c in cells.items()]
            parts += [f"### {title}", write_table(["cell", "claim", "state"], rows)]
    if found.changed:
        lines = list_lines(found.changed)
        parts += ["### Changed", write_table(["cell", "what", "before", "after"], lines)]
    return "\n\n".join(parts)


def list_lines(changed: Iterable[Changed]) -> list[Sequence[str]]:
    """A line per cell and column."""
    return [
        [f"`{change.cell}`", column, show(before), show(after)]
        for change in changed
        for column, (before, after) in change.columns.items()
    ]


def show(value: Any) -> str:
    """A value of a column as text."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
