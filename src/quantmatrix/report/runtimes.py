"""Runtimes: the columns of other programs beside our own, as Markdown and CSV; `programs` has them for the page.

Two things are told apart at a glance: what a runtime's documentation says of a file, and what a run of it
showed here; "documented to work" beside `refuses`, and "undocumented" beside `works`, are the finds.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantmatrix.proof import columns
from quantmatrix.proof.columns import RUNTIMES, STALE, UNPROVEN, VERDICTS
from quantmatrix.proof.scopes import label
from quantmatrix.proof.states import STATES
from quantmatrix.quoting import escape_markdown
from quantmatrix.report.overview import LONGEST
from quantmatrix.report.table import write_table
from quantmatrix.tables.rows import OWN

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from quantmatrix.proof.code_digest import Code
    from quantmatrix.proof.columns import RuntimeRecord
    from quantmatrix.proof.scopes import Standing
    from quantmatrix.tables.rows import Matrix, RuntimeCell, StatementRow

NOTICE = (
    "<!-- Rendered by `quantmatrix report` from matrix/ and reports/runtimes/: do not edit. -->"
)
PAGE, TABLE = "runtimes.md", "runtimes.csv"
MEANINGS = {
    "works": "latents are within the limit of the checkpoint's rows, compared with its own BF16 run",
    "wrong numbers": "it ran, and the latents are not within the limit",
    "not quantized": "it loaded the weights as BF16 without a word",
    "refuses": "its own code raised the error before the weights were loaded; the reason is its message",
    "crashes": "it ended afterwards or by an error that nobody meant, died, or exceeded a limit",
    "not installed": "a part that this file needs was not there",
    STALE: "a row or the adapter changed since the run",
    UNPROVEN: "nobody has run it",
}
CSV_COLUMNS = (
    *("id", "checkpoint", "hardware", "runtime", "state", "reason", "said", "version", "scope"),
    *("made", "command", "record"),
)


@dataclass(frozen=True)
class Shown:
    """A cell of a runtime's column as it is shown."""

    cell: RuntimeCell
    state: str
    reason: str
    said: str
    """The record beside what its documentation says, in few words."""
    record: RuntimeRecord | None
    statements: tuple[StatementRow, ...]

    @property
    def label(self) -> str:
        """`works · stand-in`."""
        return label(self.state, self.record.scope if self.record else "")

    @property
    def text(self) -> str:
        """The same with what is documented."""
        if self.state == UNPROVEN:
            return self.said or "–"
        return f"{self.label} ({self.said})" if self.said else self.label

    @property
    def file(self) -> str:
        """Path of the record below the reports folder; empty when there is none."""
        return f"{RUNTIMES}/{columns.path_of(self.cell.id)}" if self.record else ""

    @property
    def contradicts(self) -> bool:
        """Whether the run and the documentation disagree, or only the run says that it works."""
        return self.said in ("documented to work", "documented to refuse", "undocumented")


class Runtimes:
    """The columns of all other runtimes, joined with their records."""

    def __init__(
        self,
        tables: Matrix,
        found: Mapping[str, RuntimeRecord],
        standings: Mapping[str, Standing],
        code: Code | None = None,
    ) -> None:
        """`found` holds records by the id of their cell, `standings` those of our own cells."""
        self.tables = tables
        self.standings = standings
        self.cells = {
            cell.id: self.show(cell, found.get(cell.id), code) for cell in tables.runtime_cells
        }

    def show(self, cell: RuntimeCell, record: RuntimeRecord | None, code: Code | None) -> Shown:
        """A cell with its state and what is said of it."""
        state, reason = columns.explain_state(cell, record, self.tables, code)
        said = tuple(self.tables.find_statements(cell.runtime, cell.checkpoint))
        return Shown(cell, state, reason, columns.compare_said(state, said), record, said)

    @property
    def heads(self) -> list[tuple[str, str]]:
        """(runtime, hardware) of each column: every one with a record, one where a runtime has none."""
        heads: dict[tuple[str, str], bool] = {}
        for shown in self.cells.values():
            key = (shown.cell.runtime, shown.cell.hardware)
            heads[key] = heads.get(key, False) or shown.record is not None
        run = {runtime for (runtime, _), recorded in heads.items() if recorded}
        first = dict(reversed(heads))  # the first hardware of each
        return [
            h
            for h, recorded in heads.items()
            if recorded or (h[0] not in run and first[h[0]] == h[1])
        ]

    def find(self, checkpoint: str, runtime: str, hardware: str) -> Shown:
        """The cell of a checkpoint in a column."""
        return self.cells[f"{checkpoint}@{hardware}~{runtime}"]

    def tell_own(self, checkpoint: str, hardware: str) -> str:
        """The best state of our own cells of a checkpoint on a hardware, with its scope."""
        cells = [
            c for c in self.tables.cells if (c.checkpoint, c.hardware) == (checkpoint, hardware)
        ]
        found = [self.standings[cell.id] for cell in cells if cell.claim != "refused"]
        found = found or [self.standings[cell.id] for cell in cells]
        best = min(found, key=lambda one: STATES.index(one.state), default=None)
        return best.label if best else "–"

    def list_recorded(self) -> list[Shown]:
        """The cells that were run."""
        return [shown for shown in self.cells.values() if shown.record is not None]


def write_page(runtimes: Runtimes) -> str:
    """runtimes.md: the columns, where run and documentation differ, and what each runtime said."""
    recorded = runtimes.list_recorded()
    counts = Counter(shown.state for shown in recorded)
    finds = [shown for shown in recorded if shown.contradicts]
    parts = [
        NOTICE,
        "# Runtimes: which program loads which file",
        f"{len(recorded)} cells of other programs were run, each compared with the program's own run of the base "
        "model in BF16: "
        + (", ".join(f"{counts[v]} {v}" for v in (*VERDICTS, STALE) if counts[v]) or "none")
        + ". What a program's documentation says stands in parentheses: it is a statement of others, with "
        "its source below, and no claim of ours.",
        write_table(["verdict", "meaning"], MEANINGS.items()),
        "## Columns",
        write_columns(runtimes),
        "## Where run and documentation differ",
        write_finds(finds),
        "## Runs",
        write_runs(recorded),
        "## Programs",
        write_programs(runtimes.tables),
        "## What others say",
        write_statements(runtimes.tables.statements.values()),
    ]
    return "\n\n".join(parts) + "\n"


def write_columns(runtimes: Runtimes) -> str:
    """A line per checkpoint: our own state, and each runtime's."""
    heads = runtimes.heads
    hardware = next((where for _, where in heads), "cpu")
    lines = []
    for checkpoint in runtimes.tables.checkpoints:
        shown = [runtimes.find(checkpoint, *head) for head in heads]
        links = [f"[{one.text}]({one.file})" if one.file else one.text for one in shown]
        lines.append([f"`{checkpoint}`", runtimes.tell_own(checkpoint, hardware), *links])
    names = [f"{runtime} {where}" for runtime, where in heads]
    return write_table(["checkpoint", f"{OWN} {hardware}", *names], lines)


def write_finds(finds: Iterable[Shown]) -> str:
    """Cells whose run and documentation disagree."""
    lines = [
        [
            f"[`{one.cell.id}`]({one.file})",
            one.label,
            one.said,
            ", ".join(f"`{said.id}`" for said in one.statements),
        ]
        for one in finds
    ]
    if not lines:
        return "Nowhere."
    return write_table(["cell", "run", "documentation", "statement"], lines)


def write_runs(recorded: Iterable[Shown]) -> str:
    """What each run said, and how it was loaded; words of others are escaped."""
    lines = []
    for one in recorded:
        assert one.record is not None
        worst = one.record.metrics.get("worst", {})
        numbers = f"cosine {worst['cosine']:.4g}" if worst else ""
        facts = [one.record.version, one.record.made[:10]]
        said, how = fit(one.reason or numbers), fit(one.record.command)
        lines.append([f"[`{one.cell.id}`]({one.file})", one.label, said, how, *facts])
    head = ["cell", "verdict", "its message, or the worst step", "loaded by", "version", "on"]
    return write_table(head, lines)


def fit(text: str) -> str:
    """Words of others as Markdown of at most `LONGEST` characters; the record, or the table, has all of them."""
    found, most = escape_markdown(text, LONGEST), LONGEST
    while len(found) > LONGEST:  # marks that hide others take room, too
        most -= len(found) - LONGEST
        found = escape_markdown(text, most)
    return found


def write_programs(tables: Matrix) -> str:
    """The programs, and how a person who has one fills its column."""
    lines = [
        [
            f"`{row.id}`",
            row.name,
            row.kind,
            row.found,
            row.minimum,
            row.home,
            f"`quantmatrix run-column --runtime {row.id} --hardware auto`",
        ]
        for row in tables.runtimes.values()
        if row.id != OWN
    ]
    head = [
        "id",
        "name",
        "kind",
        "found by",
        "from version",
        "its own documentation",
        "to fill the column",
    ]
    return write_table(head, lines)


def write_statements(statements: Iterable[StatementRow]) -> str:
    """What documentation says, with source and day."""
    lines = [
        [
            f"`{one.id}`",
            one.runtime,
            f"`{one.family}` {' '.join(one.models)} {' '.join(one.forms)}".strip(),
            one.says,
            fit(one.quote),
            fit(one.source),
            one.version,
            one.date,
        ]
        for one in statements
    ]
    head = ["statement", "of", "checkpoints", "says", "words", "source", "version", "read on"]
    return write_table(head, lines)


def write_csv(runtimes: Runtimes) -> str:
    """One line per cell of another runtime."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for one in runtimes.cells.values():
        cell, record = one.cell, one.record
        facts = [record.version, record.scope, record.made, record.command] if record else [""] * 4
        reason = one.reason.partition("\n")[0]
        where = [cell.id, cell.checkpoint, cell.hardware, cell.runtime]
        writer.writerow([*where, one.state, reason, one.said, *facts, one.file])
    return stream.getvalue()
