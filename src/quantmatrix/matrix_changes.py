"""Matrix changes: which cells two revisions gained, lost and changed, claims and states alike.

Both revisions are read from git, tables, evidence and code together, so the working tree takes no
part: a record is judged by the code of its revision. A cell is changed when something of its row is
(`claim`, `flags`, `checks` ...), when its checkpoint's row is, or when its state is: evidence that
went stale is a change, too.
"""

from __future__ import annotations

import io
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantmatrix import evidence as records
from quantmatrix import matrix
from quantmatrix.code_digest import Code
from quantmatrix.errors import QuantmatrixError, UsageError
from quantmatrix.freshness import Now, read_now
from quantmatrix.states import stand_all

if TYPE_CHECKING:
    from quantmatrix.matrix import Matrix

TABLES, REPORTS, SOURCES = "matrix", "reports", "src/quantmatrix"
EVIDENCE = f"{REPORTS}/evidence"
BESIDE = tuple(f"{REPORTS}/{name}.csv" for name in ("carried", "limits", "spread"))
"""Files that records are judged against; a revision may have none of them."""
COLUMNS = tuple(key for key in records.CELL_KEYS if key not in ("id", "row", "row_digest"))
CHECKPOINT_ROW = "checkpoint row"


@dataclass(frozen=True)
class CellNow:
    """A cell at one revision."""

    told: Mapping[str, Any]
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
            return {n: {**c.told, "state": c.state, "scope": c.scope} for n, c in cells.items()}

        pairs = {
            change.cell: {
                column: {"before": before, "after": after}
                for column, (before, after) in change.columns.items()
            }
            for change in self.changed
        }
        return {"gained": tell(self.gained), "lost": tell(self.lost), "changed": pairs}


def compare_revisions(span: str, root: Path) -> Changes:
    """Changes of `A..B` in the repository at `root`; B is HEAD where it is left out."""
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
        column: (before.told[column], after.told[column])
        for column in COLUMNS
        if before.told[column] != after.told[column]
    }
    if before.digest != after.digest and not set(found) - {"checks"}:
        found[CHECKPOINT_ROW] = ("", "changed")
    if before.state != after.state:
        found["state"] = (before.state, after.state)
    if before.scope != after.scope:
        found["scope"] = (before.scope, after.scope)
    return found


def read_cells(revision: str, root: Path) -> dict[str, CellNow]:
    """Every cell of a revision with its state then; errors name the revision."""
    commit = find_commit(revision, root)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        extract(commit, root, folder)
        try:
            tables = matrix.read(folder / TABLES)
            evidence = records.read_folder(folder / EVIDENCE)
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
        told = records.describe_cell(cell, tables)
        columns = {key: told[key] for key in COLUMNS}
        standing = standings[cell.id]
        place = told["row_digest"], standing.state, standing.scope
        found[cell.id] = CellNow(columns, *place)
    return found


def find_commit(revision: str, root: Path) -> str:
    """Commit of a revision; UsageError when git does not know it."""
    words = ["rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}"]
    done = ask_git(root, *words)
    if done.returncode:
        raise UsageError(f"{revision}: no such revision in {root}; see `git log`")
    return done.stdout.decode().strip()


def extract(commit: str, root: Path, folder: Path) -> None:
    """Put tables, evidence and code of a commit in a folder; only tables must be there."""
    wanted = (TABLES, EVIDENCE, SOURCES, *BESIDE)
    listed = ask_git(root, "ls-tree", "--name-only", commit, *wanted)
    present = listed.stdout.decode().split()
    if TABLES not in present:
        raise UsageError(f"{commit[:12]}: has no {TABLES}/ at the top of the repository")
    done = ask_git(root, "archive", "--format=tar", commit, *present)
    if done.returncode:
        raise QuantmatrixError(f"git archive {commit[:12]}: {done.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        for member in archive.getmembers():
            path = folder / member.name
            stream = archive.extractfile(member) if member.isfile() else None
            if stream is not None and path.resolve().is_relative_to(folder.resolve()):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(stream.read())


def find_checkout(command: str) -> Path:
    """The checkout whose history a command asks; UsageError where there is none around the package."""
    root = matrix.tables_folder().parent
    if not (root / ".git").exists():
        raise UsageError(
            f"{command} asks the history of the project, and there is none: {root} is no git "
            "checkout. Clone the project and run it there"
        )
    return root


def ask_git(root: Path, *words: str) -> subprocess.CompletedProcess[bytes]:
    """Run git in a repository; QuantmatrixError when there is no git."""
    try:
        return subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, check=False, timeout=120
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise QuantmatrixError(f"git {words[0]}: {error}") from error


def write_markdown(found: Changes, span: str) -> str:
    """The changes as Markdown, for a review."""
    from quantmatrix.pages import write_table

    counts = f"{len(found.gained)} gained, {len(found.lost)} lost, {len(found.changed)} changed"
    parts = [f"## Matrix {span}: {counts}"]
    for title, cells in (("Gained", found.gained), ("Lost", found.lost)):
        if cells:
            rows = [[f"`{n}`", str(c.told["claim"]), c.state] for n, c in cells.items()]
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
    """A value of a column in words."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
