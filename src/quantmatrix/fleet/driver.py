"""Driver: hands groups to the cluster, takes what comes back, and writes it, whole or not at all.

Of each hardware so many groups are handed over that Ray always has some to place, the longest first;
the rest stays here, so that memory does not grow with the number of cells. What is written is what a run
goes on from: the driver may be killed at any moment and started again.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantmatrix.exit_codes import ENVIRONMENT_UNUSABLE, MEANINGS, NOT_EXECUTED
from quantmatrix.files import write_several
from quantmatrix.fleet.answers import AnswerError, Note, read
from quantmatrix.fleet.cluster import Demand, Site
from quantmatrix.fleet.engine import Engine, Failure
from quantmatrix.fleet.groups import Group
from quantmatrix.fleet.intake import Intake, Taken
from quantmatrix.fleet.progress import Progress
from quantmatrix.harness import completeness
from quantmatrix.harness.completeness import Comparison, Verdicts
from quantmatrix.proof import merge, scopes

if TYPE_CHECKING:
    from quantmatrix.proof.record import Evidence
    from quantmatrix.tables.rows import Cell

WINDOW = 100
"""Groups of one hardware that Ray has at most; it places them, the others wait here."""
TURN = 1.0
"""Seconds that the driver waits for an answer before it looks around."""
LOOK = 5.0
"""Seconds between two looks at the nodes."""
PATIENCE = 60.0
"""Seconds without any node of a hardware after which its groups are given up."""


@dataclass
class Outcome:
    """What came of a run."""

    verdicts: Verdicts
    reasons: dict[str, str] = field(default_factory=dict)
    """Why cells were not executed, or what else is wrong with them."""
    written: int = 0
    """Records."""
    code: int = 0
    """The largest exit code that a node reported."""
    known: dict[tuple[tuple[str, str], ...], dict[str, str]] = field(default_factory=dict)
    """One dictionary for all cells with the same verdicts, so that memory stays flat."""

    def expect(self, cells: Iterable[str]) -> None:
        """Make room for the verdicts of cells."""
        for cell in cells:
            self.add(cell, {})

    def add(self, cell: str, verdicts: Mapping[str, str]) -> None:
        """Take verdicts of a cell, beside those that it has."""
        both = {**self.verdicts.get(cell, {}), **verdicts}
        self.verdicts[cell] = self.known.setdefault(tuple(both.items()), both)

    def compare(self, planned: Iterable[Cell], only: Sequence[str]) -> Comparison:
        """Planned and executed checks; cells that nothing could run are missing, and not nothing."""
        found = completeness.compare(planned, self.verdicts, only)
        return Comparison(
            found.planned, found.missing, found.failed, found.unplanned, nothing=False
        )


def exit_code(outcome: Outcome, compared: Comparison) -> int:
    """The exit code of a run: the largest of all."""
    return max(outcome.code, compared.code)


class Driver:
    """One run."""

    def __init__(
        self,
        engine: Engine,
        intake: Intake,
        evidence: Path,
        progress: Progress,
        outcome: Outcome,
        *,
        limit: int,
    ) -> None:
        """`evidence` takes the records; `limit` is seconds that one check may take."""
        self.engine, self.intake = engine, intake
        self.evidence, self.progress, self.outcome = evidence, progress, outcome
        self.limit = limit
        self.waiting: dict[str, deque[Group]] = {}
        self.handed: dict[str, dict[str, Group]] = {}
        """Groups that Ray has, by hardware and name."""
        self.demands: dict[str, Demand] = {}
        self.gone: dict[str, float] = {}
        """Since when a hardware has no node."""
        self.looked = time.monotonic()

    def plan(self, groups: Iterable[Group], sites: dict[str, Site]) -> None:
        """Take the groups that some node can run; of the others, say why not."""
        self.sites = sites
        for hardware, site in sites.items():
            self.progress.lane(hardware).nodes = len(site.nodes)
        for group in groups:
            self.progress.expect([group])
            self.outcome.expect(group.cells)
            if group.hardware not in sites:
                self.lose(group, f"no node of the cluster is {group.hardware}")
                continue
            here = sites[group.hardware]
            demand = here.demand(needs_device=group.needs_device)
            if why := here.explain_lack(demand):
                self.lose(group, why)
                continue
            self.demands[group.name] = demand
            self.waiting.setdefault(group.hardware, deque()).append(group)

    def run(self, say: Callable[[int], None] = lambda cells: None) -> None:
        """Until every group is done or given up; `say` takes the number of cells each time."""
        while any(self.waiting.values()) or any(self.handed.values()):
            self.hand_over()
            if answers := self.engine.wait(TURN):
                say(self.take(answers))
            for data in self.engine.read_notes():
                self.take_note(data)
            self.progress.write()
            if time.monotonic() - self.looked > LOOK:
                self.looked = time.monotonic()
                say(self.look())

    def hand_over(self) -> None:
        """Give Ray groups of every hardware that it has few of."""
        for hardware, waiting in self.waiting.items():
            handed = self.handed.setdefault(hardware, {})
            while waiting and len(handed) < WINDOW:
                group = waiting.popleft()
                order = group.order(self.intake.only, self.limit, full_size=self.intake.full_size)
                handed[group.name] = group
                self.engine.submit(group.name, order, self.demands.pop(group.name))

    def take(self, answers: Iterable[tuple[str, bytes | Failure]]) -> int:
        """Keep what came of some groups, with one journey of the disk; the number of their cells."""
        found = [self.read_answer(name, answer) for name, answer in answers]
        self.keep([taken for _, taken in found])
        junit = {
            f"{group.name.replace('/', '--')}{f'-{number}' if number > 1 else ''}.xml": data
            for group, taken in found
            for number, data in enumerate(taken.junit, 1)
        }
        write_several(self.progress.path.parent / "junit", junit)
        for group, taken in found:
            self.close(group, taken)
        return sum(len(group.cells) for group, _ in found)

    def read_answer(self, name: str, answer: bytes | Failure) -> tuple[Group, Taken]:
        """A group that is done, and what of its answer may be kept."""
        group = next(held.pop(name) for held in self.handed.values() if name in held)
        if isinstance(answer, Failure):
            return group, blame(group, answer.why)
        return group, self.intake.take(answer, group.cells)

    def keep(self, several: Iterable[Taken]) -> None:
        """Merge the records into the folder; one that contradicts what lies there is not kept."""
        joined: list[Evidence] = []
        for taken in several:
            for record in taken.records:
                try:
                    joined.append(merge.join_kept(record, self.evidence))
                except merge.MergeError as error:
                    taken.blame([record.cell["id"]], f"not kept: {error}")
        if not joined:
            return
        self.outcome.written += len(merge.write(joined, self.evidence))
        keyed = {scopes.key_of(record): record for record in joined}
        cells = {record.cell["id"]: self.intake.cells[record.cell["id"]] for record in joined}
        for cell, verdicts in completeness.read_verdicts(keyed, cells).items():
            self.outcome.add(cells[cell].id, verdicts)

    def close(self, group: Group, taken: Taken) -> None:
        """Count the cells of a group."""
        self.outcome.reasons.update(taken.reasons)
        self.outcome.code = max(self.outcome.code, taken.code)
        counts: Counter[str] = Counter()
        for cell in group.cells:
            found = self.outcome.verdicts.get(cell, {})
            wanted = [
                check
                for check in self.intake.cells[cell].checks
                if completeness.fits(check, self.intake.only)
            ]
            state = "failed" if "fail" in found.values() else "done"
            counts[state if all(check in found for check in wanted) else "not_executed"] += 1
        self.progress.close(group.name, taken.seconds, counts)

    def lose(self, group: Group, why: str) -> int:
        """Give a group up; the number of its cells."""
        self.close(group, blame(group, why))
        return len(group.cells)

    def take_note(self, data: bytes) -> None:
        """Keep how far a group is; what is no note is dropped."""
        try:
            self.progress.take_note(read(data, Note))
        except AnswerError:
            return

    def look(self) -> int:
        """Give up the groups of hardware that has had no node for a while; the number of cells."""
        alive = self.engine.list_nodes()
        ids = {node.id for node in alive}
        lost = 0
        for hardware, site in self.sites.items():
            here = [node for node in alive if hardware in node.named] if site.by_name else []
            count = len(here) or sum(node.id in ids for node in site.nodes)
            self.progress.lane(hardware).nodes = count
            if count:
                self.gone.pop(hardware, None)
            elif time.monotonic() - self.gone.setdefault(hardware, time.monotonic()) > PATIENCE:
                lost += self.give_up(hardware, f"every node of {hardware} died")
        return lost

    def give_up(self, hardware: str, why: str) -> int:
        """Lose all groups of a hardware; the number of their cells."""
        handed, waiting = self.handed.pop(hardware, {}), self.waiting.pop(hardware, deque())
        for name in handed:
            self.engine.cancel(name)
        return sum(self.lose(group, why) for group in [*handed.values(), *waiting])


def blame(group: Group, why: str) -> Taken:
    """What is kept of a group without an answer: the reason, for each of its cells."""
    taken = Taken("")
    taken.blame(group.cells, why)
    return taken


def describe(outcome: Outcome, compared: Comparison, unused: dict[str, str]) -> list[str]:
    """What is wrong, for people: nodes, then cells, those with one reason on one line."""
    lines = [f"not used: {node}: {why}" for node, why in unused.items()]
    by_reason: dict[str, list[str]] = {}
    for cell in compared.missing:
        by_reason.setdefault(outcome.reasons.get(cell, "its record lacks a check"), []).append(cell)
    for why, cells in by_reason.items():
        more = f" and {len(cells) - 1} more" if len(cells) > 1 else ""
        lines.append(f"{MEANINGS[NOT_EXECUTED]}: {cells[0]}{more}: {why}")
    for cell, why in outcome.reasons.items():
        if cell not in compared.missing:
            lines.append(f"{cell}: {why}")
    for cell, checks in compared.failed.items():
        lines.append(f"failed: {cell} ({', '.join(checks)})")
    if outcome.code == ENVIRONMENT_UNUSABLE:
        lines.append(f"{MEANINGS[ENVIRONMENT_UNUSABLE]} on some node")
    return lines


def to_json(outcome: Outcome, compared: Comparison, unused: dict[str, str]) -> dict[str, Any]:
    """The same as plain data."""
    code = exit_code(outcome, compared)
    return {
        **compared.to_json(),
        "ok": code == 0,
        "exit_code": code,
        "written": outcome.written,
        "reasons": outcome.reasons,
        "unused_nodes": unused,
    }
