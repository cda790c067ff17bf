"""Intake: what a node sent, judged as packets are before any of it is kept.

Nothing of it is believed that can be looked up here: a record must be valid, of a cell that the node was
asked to run, of the row as it stands in the driver's tables, of the driver's code, and its checks those
that were asked for; a pass must keep to the limits here. Its path follows from what it is about.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from quantmatrix.exit_codes import MEANINGS, NOT_EXECUTED
from quantmatrix.fleet.answers import AnswerError, GroupAnswer, read
from quantmatrix.harness.completeness import fits
from quantmatrix.harness.outcomes import name_cell
from quantmatrix.proof import record as records
from quantmatrix.proof import scopes, store
from quantmatrix.proof.record import Evidence, EvidenceError
from quantmatrix.proof.states import explain_state
from quantmatrix.quoting import quote

if TYPE_CHECKING:
    from quantmatrix.proof.freshness import Now
    from quantmatrix.tables.rows import Cell, Matrix


@dataclass
class Taken:
    """What of an answer may be kept."""

    node: str
    records: list[Evidence] = field(default_factory=list)
    junit: list[bytes] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    """Why cells have no verdict, or why what was sent of them is not kept."""
    code: int = 0
    """The largest exit code of the problems."""
    seconds: float = 0.0

    def blame(self, cells: Iterable[str], why: str, code: int = NOT_EXECUTED) -> None:
        """Give cells a reason."""
        self.reasons.update(dict.fromkeys(cells, why))
        self.code = max(self.code, code)


class Intake:
    """Judges answers by tables, code and limits as they are here."""

    def __init__(
        self, tables: Matrix, now: Now, only: Iterable[str] = (), *, full_size: bool = False
    ) -> None:
        """`only` are the checks that were asked for."""
        self.tables, self.now, self.only = tables, now, tuple(only)
        self.full_size = full_size
        self.cells: Mapping[str, Cell] = {cell.id: cell for cell in tables.cells}

    def take(self, data: bytes, cells: Iterable[str]) -> Taken:
        """What may be kept of the answer to an order about some cells."""
        asked = set(cells)
        try:
            answer = read(data, GroupAnswer)
        except AnswerError as error:
            taken = Taken("")
            taken.blame(asked, f"its node sent no answer: {error}")
            return taken
        taken = Taken(quote(answer.node, 100), seconds=max(0.0, answer.seconds))
        for problem in answer.problems:
            code = problem.code if problem.code in MEANINGS else NOT_EXECUTED
            taken.blame(asked.intersection(problem.cells), quote(problem.why, 1000), code)
        seen: set[str] = set()
        for text in answer.records:
            self.take_record(text, asked, seen, taken)
        for text in answer.junit:
            if why := explain_junit(text.encode(), asked):
                taken.blame(asked, f"{taken.node} sent a JUnit file that is not kept: {why}")
            else:
                taken.junit.append(text.encode())
        return taken

    def take_record(self, text: str, asked: set[str], seen: set[str], taken: Taken) -> None:
        """Keep a record, or say of its cell why not."""
        try:
            record = store.decode(text.encode(), f"a record of {taken.node}")
        except EvidenceError as error:
            taken.blame(asked, str(error))
            return
        cell_id, key = str(record.cell["id"]), scopes.key_of(record)
        if cell_id not in asked or key in seen:
            why = "sent twice" if key in seen else f"of {quote(cell_id)}, which was not asked for"
            taken.blame(asked, f"a record of {taken.node} is {why}")
        elif why := self.judge(record, self.cells[cell_id]):
            taken.blame([cell_id], f"the record of {taken.node} is not kept: {why}")
        else:
            seen.add(key)
            taken.records.append(record)

    def judge(self, record: Evidence, cell: Cell) -> str:
        """Why a record of a cell is not kept; empty when it is."""
        foreign = [
            name for name in record.checks if name not in cell.checks or not fits(name, self.only)
        ]
        if foreign:
            return f"checks that were not asked for: {', '.join(map(quote, foreign))}"
        scope = scopes.read_scope(record)
        if scope == scopes.PUBLISHED and not self.full_size:
            return "it says that published weights ran, and stand-ins were asked for"
        if not record.machine:
            return "it does not name the machine"
        described = records.describe_cell(cell, self.tables)
        recorded = {name: record.cell.get(name) for name in described}
        if recorded != described:
            names = [name for name in described if recorded[name] != described[name]]
            return f"its {', '.join(names)} are not those of the row here"
        state, why = explain_state(cell, record, self.tables, self.now)
        if state == "stale":
            return f"stale: {why}"
        exceeded = self.now.list_exceeded(record) if self.now.list_exceeded else []
        return "; ".join(exceeded)


def explain_junit(data: bytes, cells: set[str]) -> str | None:
    """Why a JUnit text is not kept, or None: it must be one, without a DTD, and about these cells."""
    if b"<!DOCTYPE" in data or b"<!ENTITY" in data:
        return "it declares a document type"
    try:
        root = ElementTree.fromstring(data)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        return quote(str(error))
    named: Callable[[str], str] = name_cell
    found = {named(case.get("name", "")) for case in root.iter("testcase")} - {""}
    if others := sorted(found - cells):
        return f"it is about {quote(others[0])}, which was not asked for"
    return None
