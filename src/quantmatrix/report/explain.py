"""Explain: the state of a checkpoint on a device, why, the command, and what works instead.

Reads tables and evidence only, so it answers on a machine that has neither torch nor the hardware.
A checkpoint is named as people name it: by its id in checkpoints.csv, by what a command would pass
(hub id or path), by the repository of a file, or by a file name.

Alternatives are looked for from near to far. Each kind gives its best cell, a proven one before one
that is only claimed:

| how               | what stays the same |
| ----------------- | ------------------- |
| other backend     | checkpoint and hardware |
| other row         | checkpoint and hardware: other flags |
| other checkpoint  | model and hardware, the family where it can |
| other hardware    | checkpoint, the vendor where it can |
| other runtime     | checkpoint and hardware: another program that works by a run, or says that it does |
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from quantmatrix.errors import UsageError
from quantmatrix.proof import columns
from quantmatrix.proof import record as records
from quantmatrix.proof.joined import read_worst
from quantmatrix.proof.offers import find_real, is_invented, offer, write_quantize
from quantmatrix.proof.reports_folder import EVIDENCE
from quantmatrix.proof.scopes import COMPILED, WEIGHTS, key_of, list_checks
from quantmatrix.proof.states import stand_all
from quantmatrix.report.markdown import show_number
from quantmatrix.tables.identify import resolve
from quantmatrix.tables.rows import AUTO

if TYPE_CHECKING:
    from quantmatrix.proof.columns import RuntimeRecord
    from quantmatrix.proof.freshness import Now
    from quantmatrix.proof.record import Evidence
    from quantmatrix.tables.rows import Cell, CheckpointRow, Matrix

UNCLAIMED = "unclaimed"
"""State of a checkpoint on a device that no row of cases.csv names."""
WORKING = ("proven", "unjudged", "unproven")
"""States of cells that may serve instead, the best first."""
SUGGESTIONS = 5


@dataclass(frozen=True)
class Alternative:
    """A cell that may be used instead of another."""

    how: str
    """`other backend`, `other row`, `other checkpoint`, `other hardware` or `other runtime`."""
    cell: str
    checkpoint: str
    hardware: str
    state: str
    scope: str
    commands: tuple[str, ...]
    """With published weights; the last one is the cell's, one before it makes the checkpoint."""


@dataclass(frozen=True)
class Explanation:
    """What is known about one checkpoint on one device, in one cell or in none."""

    cell: str
    """Id of the cell; empty where no row claims anything."""
    checkpoint: str
    model: str
    hardware: str
    backend: str
    claim: str
    rule: str
    state: str
    scope: str
    why: str
    ran: str
    """The command of the record; empty when there is none."""
    title: str
    """What `commands` are, and whether they have been run."""
    commands: tuple[str, ...]
    """With published weights; the last one is the cell's, one before it makes the checkpoint."""
    evidence: str
    """Path of the record below the reports folder; empty when there is none."""
    alternatives: tuple[Alternative, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


class Explainer:
    """Tables and evidence, joined, to be asked about."""

    def __init__(
        self,
        tables: Matrix,
        evidence: Mapping[str, Evidence],
        now: Now | None = None,
        others: Mapping[str, RuntimeRecord] | None = None,
    ) -> None:
        """`evidence` holds records by key; `now` is what they are judged against; `others` are records
        of other runtimes, by the id of their cell."""
        self.tables = tables
        self.standings = stand_all(tables, evidence, now)
        self.others = others or {}
        self.code = now.code if now else None

    def explain(
        self, checkpoint: str, hardware: str, model: str | None = None
    ) -> list[Explanation]:
        """One explanation per cell, or per pair without one; UsageError for unknown names."""
        rows_of_hardware = find_hardware(self.tables, hardware)
        found = []
        for row in find_checkpoints(self.tables, checkpoint, model):
            for where in rows_of_hardware:
                cells = [
                    c for c in self.tables.cells if (c.checkpoint, c.hardware) == (row.id, where)
                ]
                found += [self.explain_cell(cell) for cell in cells]
                if not cells:
                    found.append(self.explain_gap(row, where))
        return found

    def explain_cell(self, cell: Cell) -> Explanation:
        """State, reason, command and alternatives of a cell."""
        standing = self.standings[cell.id]
        state, record = standing.state, standing.record
        where = (cell.checkpoint, cell.hardware)
        offered = offer(cell, self.tables, record, standing.scope)
        ran = state == "proven" and standing.scope != COMPILED
        return Explanation(
            cell=cell.id,
            checkpoint=cell.checkpoint,
            model=cell.model,
            hardware=cell.hardware,
            backend=cell.backend,
            claim=cell.claim,
            rule=cell.rule,
            state=state,
            scope=standing.scope,
            why=self.say_why(cell),
            ran=record.command if record else "",
            title=offered.title,
            commands=offered.commands,
            evidence=f"{EVIDENCE}/{records.path_of(key_of(record))}" if record else "",
            alternatives=() if ran else self.find_alternatives(*where, cell),
        )

    def explain_gap(self, row: CheckpointRow, hardware: str) -> Explanation:
        """The answer where no cell is: nobody claims anything, the plan may still say more."""
        real = find_real(row, self.tables)
        argv = shlex.join(real.arguments)
        earlier = [write_quantize(real)] if is_invented(row.reference) else []
        return Explanation(
            cell="",
            checkpoint=row.id,
            model=row.model,
            hardware=hardware,
            backend="",
            claim="",
            rule="",
            state=UNCLAIMED,
            scope="",
            why=f"no row of cases.csv names {row.id} on {hardware}; the command plans it",
            ran="",
            title="To plan it",
            commands=(*earlier, f"quantmatrix plan {argv} --hardware {hardware}"),
            evidence="",
            alternatives=self.find_alternatives(row.id, hardware, None),
        )

    def say_why(self, cell: Cell) -> str:
        """The reason of a cell's state, as text."""
        standing = self.standings[cell.id]
        state, reason, record = standing.state, standing.reason, standing.record
        if state == "proven" and record and standing.scope == COMPILED:
            return say_compiled(record)
        if state == "proven" and record:
            worst = show_number(read_worst(record).get("psnr_db"))
            near = f", {worst} dB from BF16 at the worst step" if worst else ""
            checks = " and ".join(list_checks(cell, standing.scope))
            carried = f"; {reason}" if reason else ""
            passed = f"{checks} passed on {record.made[:10]} with {WEIGHTS[standing.scope]}"
            return f"{passed}{near}{carried}"
        if cell.claim == "refused":
            refusal = (record.plan.get("refusal") or {}) if record and state == "refused" else {}
            description = str(refusal.get("message") or cell.notes)
            seen = f" ({reason})" if reason else ""
            return f"rule {cell.rule}: {description}{seen}"
        return reason or cell.notes or state

    def find_alternatives(
        self, checkpoint: str, hardware: str, cell: Cell | None
    ) -> tuple[Alternative, ...]:
        """The best cell of each kind, see the module's table."""
        row = self.tables.checkpoints[checkpoint]
        vendor = self.tables.hardware[hardware].vendor
        backend = cell.backend if cell else None

        def is_here(other: Cell) -> bool:
            return (other.checkpoint, other.hardware) == (checkpoint, hardware)

        def is_other_checkpoint(other: Cell) -> bool:
            same = (other.model, other.hardware) == (row.model, hardware)
            return same and other.checkpoint != checkpoint

        def is_other_hardware(other: Cell) -> bool:
            return other.checkpoint == checkpoint and other.hardware != hardware

        kinds: Sequence[tuple[str, Callable[[Cell], bool], Callable[[Cell], bool]]] = (
            (
                "other backend",
                lambda c: is_here(c) and c.backend != backend,
                lambda c: bool(cell and c.row == cell.row),
            ),
            (
                "other row",
                lambda c: is_here(c) and c.backend == backend and c != cell,
                lambda c: True,
            ),
            ("other checkpoint", is_other_checkpoint, lambda c: c.family == row.family),
            (
                "other hardware",
                is_other_hardware,
                lambda c: self.tables.hardware[c.hardware].vendor == vendor,
            ),
        )
        found = []
        for how, fits, is_near in kinds:
            best = self.choose(filter(fits, self.tables.cells), is_near)
            if best:
                standing = self.standings[best.id]
                offered = offer(best, self.tables, standing.record, standing.scope)
                where = (best.id, best.checkpoint, best.hardware)
                description = (standing.state, standing.scope, offered.commands)
                found.append(Alternative(how, *where, *description))
        near = sorted(found, key=lambda a: WORKING.index(a.state))
        return (*near, *self.find_runtimes(checkpoint, hardware))

    def find_runtimes(self, checkpoint: str, hardware: str) -> list[Alternative]:
        """Other programs that load the checkpoint there: by a run of ours, else by their own word."""
        found = []
        for cell in self.tables.runtime_cells:
            if (cell.checkpoint, cell.hardware) != (checkpoint, hardware):
                continue
            record = self.others.get(cell.id)
            state, _ = columns.explain_state(cell, record, self.tables, self.code)
            where = ("other runtime", cell.id, checkpoint, hardware)
            if record is not None and state == "works":
                found.append(Alternative(*where, state, record.scope, (record.command,)))
            said = self.tables.find_statements(cell.runtime, checkpoint)
            if state == columns.UNPROVEN and (
                claim := next((s for s in said if s.says == "works"), None)
            ):
                how = f"documented: {claim.source}"
                run = f"quantmatrix run-column --runtime {cell.runtime} --hardware {hardware}"
                commands = (f"{run} --checkpoint {checkpoint}",)
                found.append(Alternative(*where, how, "", commands))
        return sorted(found, key=lambda one: one.state != "works")

    def choose(self, cells: Iterable[Cell], is_near: Callable[[Cell], bool]) -> Cell | None:
        """The first working cell: proven before claimed, published before what has to be made, near
        before far, in table order.
        """
        ranked = [
            (*self.rank(cell), not is_near(cell), number, cell)
            for number, cell in enumerate(cells)
            if self.standings[cell.id].state in WORKING and cell.claim not in ("refused", "failing")
        ]
        return min(ranked, key=lambda rank: rank[:-1])[-1] if ranked else None

    def rank(self, cell: Cell) -> tuple[int, bool, bool]:
        """How far a cell is from one that a reader can use at once, the best first."""
        invented = is_invented(self.tables.checkpoints[cell.checkpoint].reference)
        standing = self.standings[cell.id]
        return WORKING.index(standing.state), standing.scope == COMPILED, invented


def say_compiled(record: Evidence) -> str:
    """What kernels that were built and never run show, and what their numbers rest on."""
    description = record.checks["compile"].metrics
    return (
        f"compiled for {description['arch']}, never run: Triton {description['triton']} built the kernels at true "
        f"size on {record.made[:10]}, and they fit ({description['kernels']}); their numbers are proven on "
        "a CPU only, by Triton's interpreter and the backend reference"
    )


def find_checkpoints(tables: Matrix, name: str, model: str | None = None) -> list[CheckpointRow]:
    """The checkpoints that a name stands for, of one model where given.

    The first that gives any: the id, the whole reference, the repository of a file, the last part
    of a path. UsageError with near names when nothing does.
    """
    if model is not None and model not in tables.models:
        raise UsageError(f"--model {model}: not in the tables; known: {', '.join(tables.models)}")
    known_name = name.rstrip("/")
    if not known_name:
        raise UsageError("--checkpoint: empty; see checkpoints.csv, or `quantmatrix matrix list`")
    last = PurePosixPath(known_name).name
    tests: Sequence[Callable[[CheckpointRow], bool]] = (
        lambda row: row.id == known_name,
        lambda row: row.reference == known_name,
        lambda row: row.reference.startswith(f"{known_name}/"),
        lambda row: PurePosixPath(row.reference).name == last,
    )
    rows = tables.checkpoints.values()
    named = next((found for test in tests if (found := [r for r in rows if test(r)])), [])
    fitting = [row for row in named if model in (None, row.model)]
    if fitting:
        return fitting
    if named:
        models = sorted({row.model for row in named})
        raise UsageError(f"--checkpoint {name} is of {', '.join(models)}, not of {model}")
    known = [known_name for row in rows for known_name in (row.id, row.reference)]
    near = difflib.get_close_matches(known_name, known, SUGGESTIONS, 0.4)
    hint = f"; did you mean {', '.join(near)}?" if near else "."
    raise UsageError(
        f"--checkpoint {name}: not in checkpoints.csv{hint} "
        "A checkpoint of your own: `quantmatrix inspect`, then `quantmatrix plan`"
    )


def find_hardware(tables: Matrix, name: str) -> tuple[str, ...]:
    """The hardware ids of an id, a group or `auto` (this machine); UsageError for other names."""
    if name == AUTO:
        return (resolve(name, tables.hardware),)
    if name in tables.hardware:
        return (name,)
    if name in tables.groups:
        return tables.groups[name]
    known = ", ".join([*tables.hardware, *tables.groups])
    raise UsageError(f"--hardware {name}: not in hardware.csv; known ids and groups: {known}")
