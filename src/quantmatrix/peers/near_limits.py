"""Near limits: what another runtime's run of a checkpoint is held to: our own runs' limits of it.

Which arithmetic another program uses is not known, so that the widest of a checkpoint's limits counts;
where we never ran one, those of its family on the model, else those of the model.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from quantmatrix.errors import UnusableError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from quantmatrix.proof.limits import Ledger, Limits
    from quantmatrix.proof.record import Evidence
    from quantmatrix.tables.rows import Cell, CheckpointRow, Matrix


class NearLimits:
    """The limits of checkpoints on one hardware, found in our own records."""

    def __init__(self, tables: Matrix, hardware: str) -> None:
        """Nothing is read yet."""
        self.tables = tables
        self.hardware = hardware

    @cached_property
    def evidence(self) -> dict[str, Evidence]:
        """Records of our own cells, by key."""
        from quantmatrix.proof import packaged, reports_folder, store

        folder = reports_folder.find_source(None)
        if (folder / packaged.RECORDS).is_file():
            return packaged.read_records(folder / packaged.RECORDS)
        return store.read_folder(folder / "evidence")

    @cached_property
    def ledger(self) -> Ledger:
        """Every sample that limits are found in."""
        from quantmatrix.proof import limits, reports_folder

        return limits.read(reports_folder.find_source(None) / "limits.csv")

    def find(self, row: CheckpointRow) -> Limits:
        """The limits of a checkpoint; UnusableError where nothing was measured on its model."""
        for kinds in self.list_kinds(row):
            if kinds:
                found = [self.ledger.find(kind, row.model, self.hardware) for kind in kinds]
                return min(found, key=lambda one: one.psnr_db)
        raise UnusableError(f"{row.id}: no limits: run the suites of {row.model} first")

    def list_kinds(self, row: CheckpointRow) -> Iterator[set[str]]:
        """Classes of arithmetic whose limits may serve, the nearest first."""
        for cells in self.list_near(row):
            yield {self.read_kind(cell) for cell in cells} - {""}
        yield {sample.kind for sample in self.ledger.samples if sample.model == row.model}

    def list_near(self, row: CheckpointRow) -> Iterator[list[Cell]]:
        """Cells whose limits may serve, the nearest first."""
        cells = self.tables.cells
        yield [c for c in cells if c.checkpoint == row.id]
        yield [c for c in cells if (c.family, c.model) == (row.family, row.model)]

    def read_kind(self, cell: Cell) -> str:
        """The class of arithmetic of a cell's latents check, or nothing."""
        from quantmatrix.proof.limit_classes import read_class

        record = self.evidence.get(cell.id)
        check = record.checks.get("latents") if record else None
        return read_class(check) if check else ""
