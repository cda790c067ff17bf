"""Joined: tables and records, joined once."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from quantmatrix.proof import bench_results
from quantmatrix.proof import record as records
from quantmatrix.proof.agreement import find_life
from quantmatrix.proof.offers import offer
from quantmatrix.proof.reports_folder import EVIDENCE
from quantmatrix.proof.scopes import key_of, order_labels
from quantmatrix.proof.states import STATES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Any

    from quantmatrix.proof.bench_results import Result
    from quantmatrix.proof.code_digest import Code
    from quantmatrix.proof.record import Evidence
    from quantmatrix.proof.scopes import Standing
    from quantmatrix.tables.rows import Cell, Matrix


def rows_as_dicts(matrix: Matrix, standings: Mapping[str, Standing]) -> list[dict[str, Any]]:
    """Every cell as plain data, with its state and scope (by cell id), and two commands.

    `command_run` is that of its record, `command` what published weights need: where a checkpoint
    exists only as a stand-in, the command that makes it comes first.
    """
    from quantmatrix.proof.offers import offer

    return [
        {
            "id": cell.id,
            "row": cell.row,
            "family": cell.family,
            "model": cell.model,
            "checkpoint": cell.checkpoint,
            "hardware": cell.hardware,
            "backend": cell.backend,
            "claim": cell.claim,
            "state": standings[cell.id].state,
            "scope": standings[cell.id].scope,
            "rule": cell.rule,
            "checks": list(cell.checks),
            "flags": list(cell.flags),
            "notes": cell.notes,
            "command_run": getattr(standings[cell.id].record, "command", ""),
            "command": " && ".join(offer(cell, matrix).commands),
        }
        for cell in matrix.cells
    ]


LABELS = order_labels(STATES)


class Joined:
    """The tables with the state and the record of every cell: what the pages are written from."""

    def __init__(
        self,
        tables: Matrix,
        standings: Mapping[str, Standing],
        benchmarks: Mapping[str, Result] | None = None,
        code: Code | None = None,
    ) -> None:
        """Join; `standings` holds that of every cell, by its id. Stray records are left out."""
        self.tables = tables
        self.standings = standings
        self.benchmarks = dict(benchmarks or {})
        self.changes = {
            c.id: bench_results.find_change(self.benchmarks[c.id], c, tables, code)
            for c in tables.cells
            if c.id in self.benchmarks
        }
        self.evidence = {name: one.record for name, one in standings.items() if one.record}
        """The record that names each cell."""
        self.states = {name: one.state for name, one in standings.items()}
        self.reasons = {name: one.reason for name, one in standings.items()}
        self.offers = {
            cell.id: offer(cell, tables, standings[cell.id].record, standings[cell.id].scope)
            for cell in tables.cells
        }

    def count(self, cells: Iterable[Cell]) -> dict[str, int]:
        """Cells per state and scope (`proven · stand-in`), in the order of `LABELS`."""
        found = Counter(self.standings[cell.id].label for cell in cells)
        return {label: found[label] for label in LABELS if found[label]}

    def agrees(self, cell: Cell) -> bool:
        """Whether a run says what the claim says, a failure that is claimed included."""
        return cell.claim != "planned" and find_life(self.standings[cell.id]) == "fresh"

    def link(self, cell: Cell, text: str, base: str) -> str:
        """Markdown link to the cell's record, or the text alone when there is none."""
        file = self.file_of(cell)
        return f"[{text}]({base}{file})" if file else text

    def file_of(self, cell: Cell) -> str:
        """Path of the cell's record below the reports folder; empty when there is none."""
        record = self.evidence.get(cell.id)
        return f"{EVIDENCE}/{records.path_of(key_of(record))}" if record else ""


def read_worst(record: Evidence | None) -> Mapping[str, Any]:
    """Worst-step metrics of the latents check, or nothing."""
    check = record.checks.get("latents") if record else None
    found: Mapping[str, Any] = check.metrics.get("worst", {}) if check else {}
    return found
