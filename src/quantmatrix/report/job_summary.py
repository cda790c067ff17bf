"""Job summary: what a CI job showed, as Markdown that fits where it is shown.

Cells whose state or latents differ from earlier evidence come first, then every other one as long
as there is room: a summary of a GitHub step is refused as a whole above 1 MiB. What is left out is
counted, never dropped silently.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantmatrix.errors import UsageError
from quantmatrix.files import naming
from quantmatrix.proof.scopes import find_records, key_of, order_labels
from quantmatrix.proof.states import STATES, stand
from quantmatrix.quoting import escape_markdown
from quantmatrix.report.table import write_table

if TYPE_CHECKING:
    from quantmatrix.proof.freshness import Now
    from quantmatrix.proof.record import Evidence
    from quantmatrix.tables.rows import Matrix

LIMIT = 1024 * 1024 - 1024
"""Bytes that a step may show, with room for the lines that end it."""
HEAD = ("cell", "before", "now", "why")
LONGEST = 300
"""Characters of a reason that are shown."""


@dataclass(frozen=True)
class Shown:
    """One cell of a job."""

    cell: str
    before: str
    """State and scope by the earlier evidence."""
    now: str
    reason: str
    changed: bool

    @property
    def line(self) -> tuple[str, str, str, str]:
        """A row of the table."""
        return f"`{self.cell}`", self.before, self.now, escape_markdown(self.reason, LONGEST)


def list_cells(
    tables: Matrix,
    before: Mapping[str, Evidence],
    after: Mapping[str, Evidence],
    now: Now | None = None,
) -> list[Shown]:
    """Cells of the newer evidence in the order of the tables, those that changed first; `now` is what
    both are judged against."""
    shown = []
    for cell in tables.cells:
        if not (found := find_records(after, cell.id)):
            continue
        then, today = (stand(cell, evidence, tables, now) for evidence in (before, after))
        olds = [(before.get(key_of(record)), record) for record in found.values()]
        moved = any(old and old.latents_digest != new.latents_digest for old, new in olds)
        reason = today.reason or ("other latents than before" if moved else "")
        text = reason.partition("\n")[0][:LONGEST]
        changed = moved or then.label != today.label
        shown.append(Shown(cell.id, then.label, today.label, text, changed))
    return sorted(shown, key=lambda one: not one.changed)


def write_summary(cells: Sequence[Shown], problems: Iterable[str] = (), room: int = LIMIT) -> str:
    """The Markdown, of at most `room` bytes; problems are lines that stand above all."""
    counts = Counter(one.now for one in cells)
    changed = sum(one.changed for one in cells)
    head = [
        f"## quantmatrix: {len(cells)} cells, {changed} changed",
        *(f"- {escape_markdown(problem.partition(chr(10))[0], LONGEST)}" for problem in problems),
        write_table(
            ["state", "cells"], [(s, str(counts[s])) for s in order_labels(STATES) if counts[s]]
        ),
    ]
    text = "\n\n".join(head) + "\n\n"
    left = len(cells)
    table = write_table(HEAD, []) + "\n"
    room -= len((text + table + describe_rest(left)).encode())
    lines = []
    for one in cells:
        line = write_table(HEAD, [one.line]).rpartition("\n")[2] + "\n"
        room -= len(line.encode())
        if room < 0:
            break
        lines.append(line)
        left -= 1
    return text + table + "".join(lines) + (describe_rest(left) if left else "")


def describe_rest(count: int) -> str:
    """The line that ends a table which is cut."""
    return f"\nand {count} more cells: see the evidence of this job\n"


def append(path: Path, cells: Sequence[Shown], problems: Iterable[str]) -> int:
    """Append a summary to a step's file, within what the file still may take; returns the bytes.

    Raises UsageError when not even the counts fit.
    """
    used = path.stat().st_size if path.is_file() else 0
    data = write_summary(cells, problems, LIMIT - used).encode()
    if used + len(data) > LIMIT:
        raise UsageError(f"{path}: {used} of {LIMIT} bytes are taken, a summary does not fit")
    with naming(path):
        try:
            with path.open("ab") as stream:
                stream.write(data)
        except OSError:
            if path.is_file():
                os.truncate(path, used)
            raise
    return len(data)


def to_json(cells: Iterable[Shown]) -> list[dict[str, Any]]:
    """Plain data."""
    return [vars(one) for one in cells]
