"""Plans of every checkpoint for every hardware: `python -m quantmatrix.measure.plans [FILE]`.

Stand-ins are planned with the flags of the first row of cases.csv that runs the checkpoint, once with
the backend left open, and once for every backend that a row asks for there. Nothing is loaded, and no
device is needed. See `quantmatrix.proof.plans` for the columns of `reports/plans.csv`.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from quantmatrix import families
from quantmatrix.api import plan
from quantmatrix.files import write_whole
from quantmatrix.measure.workbench import Workbench
from quantmatrix.proof.plans import FILE, PlanLine, write_plans
from quantmatrix.proof.reports_folder import find_folder
from quantmatrix.runtime import true_bytes
from quantmatrix.runtime.plan.types import Plan, Refusal
from quantmatrix.tables import read

if TYPE_CHECKING:
    from quantmatrix.tables.rows import Cell, Matrix

SHOWN = 240
"""Characters of a refusal that the table keeps."""
MIB = 2**20
LEFT_OUT = ("--dit-cpu-offload", "--dit-layerwise-offload", "--save-output")
"""Flags of a row that are another question than which kernels there are."""


def list_requests(tables: Matrix, checkpoint: str) -> Iterator[Cell]:
    """Cells to plan of a checkpoint: every hardware with an open backend, and every backend of a row."""
    rows = [c for c in tables.cells if c.checkpoint == checkpoint]
    runs = [c for c in rows if c.claim != "refused"] or rows
    if not runs:
        return
    flags = tuple(flag for flag in runs[0].flags if flag not in LEFT_OUT)
    for hardware in tables.hardware:
        asked = [c.backend for c in runs if c.hardware == hardware and c.claim != "planned"]
        for backend in dict.fromkeys(["", *asked]):
            yield replace(runs[0], hardware=hardware, backend=backend, flags=flags)


def plan_cell(bench: Workbench, cell: Cell) -> PlanLine:
    """The line of one checkpoint, hardware and backend."""
    found = plan(bench.planned_request(cell))
    line = PlanLine(cell.checkpoint, (cell.hardware,), cell.backend)
    if isinstance(found, Refusal):
        message = " ".join(found.message.split())
        short = message if len(message) <= SHOWN else f"{message[: SHOWN - 4]} ..."
        return replace(line, rule=found.rule, message=short)
    return describe_plan(line, found)


def describe_plan(line: PlanLine, found: Plan) -> PlanLine:
    """A line with the kernels and the bytes of a plan."""
    sizes = true_bytes.measure_all(found).values()
    counts: Counter[str] = Counter()
    for part in found.components.values():
        counts.update(f"{piece.backend}:{piece.numerics}" for piece in part.pieces())
    own = {part.family for part in found.components.values()} - {None}
    return replace(
        line,
        kernels=tuple(name for name, _ in counts.most_common()),
        whole_mib=round(sum(size.whole for size in sizes) / MIB),
        largest_mib=round(max(size.whole for size in sizes) / MIB),
        layerwise_mib=round(max(size.layerwise for size in sizes) / MIB),
        movable=all(families.load(str(name)).CPU_OFFLOAD for name in own),
    )


def plan_checkpoint(tables: Matrix, checkpoint: str) -> list[PlanLine]:
    """Every line of one checkpoint."""
    bench = Workbench(tables, tiny=True)
    return [plan_cell(bench, cell) for cell in list_requests(tables, checkpoint)]


def main(argv: list[str]) -> None:
    """Plan everything; the file is written whole at the end."""
    path = Path(argv[0]) if argv else find_folder(None) / FILE
    tables = read.read()
    lines: list[PlanLine] = []
    for number, checkpoint in enumerate(tables.checkpoints, 1):
        lines += plan_checkpoint(tables, checkpoint)
        print(f"{number} of {len(tables.checkpoints)}: {checkpoint}", flush=True)
    write_whole(path, write_plans(lines).encode())


if __name__ == "__main__":
    main(sys.argv[1:])
