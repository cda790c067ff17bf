"""Bench rows: which cells of the matrix are benchmarked.

Only what is claimed to run, and lies on its device while it runs: offloaded rows would time the bus.
An accelerator runs every such cell. A CPU runs one per family, model and backend, the first in the
table: its rows differ in schemes and flags by little, and the whole must take minutes. There a row
that names no backend is left out where other rows of its family and model name theirs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from quantmatrix.errors import UsageError

if TYPE_CHECKING:
    from quantmatrix.tables.rows import Cell, Matrix

LOCAL = "cpu"
OFFLOAD = ("--dit-layerwise-offload", "--dit-cpu-offload")
CLAIMED = ("validated", "expected")


def choose_cells(cells: Iterable[Cell]) -> list[Cell]:
    """The cells to benchmark among those given, in their order."""
    able = [cell for cell in cells if not why_not(cell)]
    named = {(cell.family, cell.model) for cell in able if cell.backend and cell.hardware == LOCAL}
    chosen = []
    seen = set()
    for cell in able:
        kind = (cell.family, cell.model, cell.backend)
        if cell.hardware == LOCAL:
            if kind in seen or (not cell.backend and kind[:2] in named):
                continue
            seen.add(kind)
        chosen.append(cell)
    return chosen


def why_not(cell: Cell) -> str:
    """Why a cell cannot be benchmarked; empty when it can."""
    if cell.claim not in CLAIMED:
        return f"it is claimed to be {cell.claim}"
    flags = [flag.replace("_", "-") for flag in cell.flags]
    if found := [flag for flag in OFFLOAD if flag in flags]:
        return f"it has {found[0]}, and would time the transfers"
    return ""


def find_cells(tables: Matrix, names: Sequence[str]) -> list[Cell]:
    """The cells of these ids; UsageError for one that there is not, or that cannot be timed."""
    known = {cell.id: cell for cell in tables.cells}
    for name in names:
        if name not in known:
            raise UsageError(f"--row {name}: no such cell; see `quantmatrix matrix list`")
        if why := why_not(known[name]):
            raise UsageError(f"--row {name}: cannot be benchmarked: {why}")
    return [known[name] for name in dict.fromkeys(names)]
