"""Compiled: whether the kernels of ours that a plan starts exist for its hardware.

The weakest of proofs, and one that needs neither the hardware nor weights: each program that the
plan's layers start at their true size (`true_launches`) is built for the architecture (`compiling`).
It shows that a kernel can be built and fits; of its numbers it shows nothing. Those come from
Triton's interpreter on a CPU and from the backend `reference`.

Programs are kept in `~/.cache/quantmatrix/programs`, one file each, named by the digest of what
decides them: the definition of the kernel, what it is specialised on, the architecture and Triton's
version. What did not change is not built again.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantmatrix.errors import UsageError
from quantmatrix.files import write_whole
from quantmatrix.kernels import compiling
from quantmatrix.kernels.compiling import MOST_SPILLED, Program
from quantmatrix.proof.record import digest_json

if TYPE_CHECKING:
    from quantmatrix.kernels.launching import Launch
    from quantmatrix.runtime.plan.types import Plan
    from quantmatrix.tables.rows import Cell, Matrix


@dataclass(frozen=True)
class Compiled:
    """The programs of one plan on its architecture."""

    arch: str
    triton: str
    programs: tuple[Program, ...]
    """Each once, in the order in which they are started first."""
    problems: tuple[str, ...] = ()
    """Layers that the planned kernels do not take at their true size."""

    @property
    def faults(self) -> list[str]:
        """Everything that is wrong, as text."""
        return [
            *self.problems,
            *(f"{p.kernel} on {p.arch} {fault}" for p in self.programs for fault in p.faults),
        ]

    @property
    def summary(self) -> str:
        """`decode, decode_smoothed x 3`."""
        counts = Counter(program.kernel for program in self.programs)
        return ", ".join(f"{n} x {k}" if k > 1 else n for n, k in counts.items()) or "none"

    def to_metrics(self) -> dict[str, Any]:
        """What a record keeps: the programs, and the most that any of them takes."""
        return {
            **self.to_json(),
            "kernels": self.summary,
            "shared": max((program.shared for program in self.programs), default=0),
            "spilled": max((program.spilled for program in self.programs), default=0),
        }

    def to_limits(self) -> dict[str, Any]:
        """What the metrics of the same names are held to, in bytes."""
        most = {"shared": compiling.find_target(self.arch).shared, "spilled": MOST_SPILLED}
        return {name: {"at_most": value} for name, value in most.items()}

    def to_json(self) -> dict[str, Any]:
        """The programs as plain data."""
        return {
            "arch": self.arch,
            "triton": self.triton,
            "programs": [program.to_json() for program in self.programs],
            "problems": list(self.problems),
        }


class Builder:
    """Builds programs that are not kept yet."""

    def __init__(self, folder: Path | None) -> None:
        """`folder` keeps programs; None: only this object does."""
        self.folder = folder
        self.kept: dict[str, Program] = {}
        self.built = 0

    def build(self, launch: Launch, arch: str) -> tuple[str, Program]:
        """(name of a launch's program, the program): kept, or built now."""
        name = digest_json(compiling.describe_launch(launch, arch)).removeprefix("sha256:")
        program = self.kept.get(name) or self._read(name)
        if program is None:
            program = compiling.build(launch, arch)
            self.built += 1
            self._write(name, program)
        self.kept[name] = program
        return name, program

    def build_all(self, launches: Iterable[Launch], arch: str) -> tuple[Program, ...]:
        """The programs of launches, each once."""
        return tuple(dict(self.build(launch, arch) for launch in launches).values())

    def compile_plan(self, plan: Plan) -> Compiled:
        """The programs that a plan starts; UsageError where triton is missing."""
        from quantmatrix.measure.true_launches import list_launches

        version = compiling.require_triton()
        launches, problems = list_launches(plan)
        arch = plan.machine.arch
        return Compiled(arch, version, self.build_all(launches, arch), tuple(problems))

    def _read(self, name: str) -> Program | None:
        if self.folder is None:
            return None
        with suppress(OSError, ValueError, TypeError):
            fields = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
            return Program(**{**fields, "faults": tuple(fields["faults"])})
        return None

    def _write(self, name: str, program: Program) -> None:
        if self.folder is None:
            return
        write_whole(self.folder / f"{name}.json", json.dumps(program.to_json()).encode())


def default_folder() -> Path:
    """Where programs are kept between runs."""
    return Path.home() / ".cache" / "quantmatrix" / "programs"


def choose_cells(tables: Matrix, hardware: str, row: str | None = None) -> list[Cell]:
    """Cells of a hardware (of one row, where given) that are claimed to run; UsageError: none is."""
    if hardware not in tables.hardware:
        raise UsageError(f"--hardware {hardware}: no such row; known: {', '.join(tables.hardware)}")
    claimed = [
        cell
        for cell in tables.cells
        if cell.hardware == hardware and cell.claim not in ("refused", "planned")
    ]
    found = [cell for cell in claimed if row in (None, cell.row, cell.id)]
    if not found:
        rows = ", ".join(dict.fromkeys(cell.row for cell in claimed))
        what = f"--row {row}: no row that is claimed to run on {hardware}" if row else hardware
        raise UsageError(f"{what}; rows that are: {rows or 'none'}")
    return found


def compile_cell(tables: Matrix, cell: Cell, builder: Builder) -> Compiled | None:
    """The programs of a cell's plan; None where it starts no kernel of ours.

    RefusedError where the plan is a refusal.
    """
    from quantmatrix.measure.workbench import Workbench

    bench = Workbench(tables, tiny=True)
    found = builder.compile_plan(bench.plan(bench.planned_request(cell)))
    return found if found.programs or found.problems else None
