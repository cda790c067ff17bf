"""Forecast: what a run is about to do and how long that takes, and how far it is, in a line a minute.

    412 checks of 120 cells: about 4 min with 2 workers, as long as their last records took
    96 of 412 checks after 1 min, about 3 min left

The seconds of a cell are those of its record, spread over its checks; they only say what share of the
whole a check is once the run has a pace of its own.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from quantmatrix.errors import QuantmatrixError
from quantmatrix.harness.outcomes import name_cell
from quantmatrix.harness.shards import estimate_all

if TYPE_CHECKING:
    from quantmatrix.proof.record import Evidence
    from quantmatrix.tables.rows import Cell

PERIOD = 60.0
"""Seconds between two lines."""
ENOUGH = 0.05
"""Share of a run whose pace tells of the rest: the first check imports torch."""
PLANNED_SECONDS = 0.3
"""Seconds of a cell that is planned, or whose kernels are built."""
FEW = 20
"""Checks of which nobody needs a forecast."""


class Forecast:
    """Hooks of the process that reports."""

    def __init__(
        self,
        cells: Callable[[], Mapping[str, Cell]],
        evidence: Path,
        say: Callable[[str], None],
        workers: int = 1,
        only_planned: Callable[[Cell], bool] = lambda cell: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`cells` are those that may be tested, by id; `evidence` holds their last records.

        `only_planned` tells cells of which nothing is run: their records took another machine's time.
        """
        self.cells = cells
        self.evidence = evidence
        self.say = say
        self.workers = max(1, workers)
        self.only_planned = only_planned
        self.clock = clock
        self.seconds: dict[str, float] = {}
        """Of every check that is to come, by test id."""
        self.count = 0
        self.whole = 0.0
        self.began = self.shown = 0.0

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Say what is to be run here."""
        if not session.config.option.collectonly:
            self.begin(item.nodeid for item in session.items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        """Say what is to be run by workers; each of them collects all of it."""
        if not self.began:
            self.begin(ids)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a check that is done."""
        if report.when == "teardown":
            self.take(report.nodeid)

    def begin(self, tests: Iterable[str]) -> None:
        """Estimate the checks among these tests."""
        cells = self.cells()
        found = {test: name_cell(test) for test in tests if name_cell(test) in cells}
        self.began = self.shown = self.clock()
        if len(found) < FEW:
            return
        checks = Counter(found.values())
        run = [cells[name] for name in checks if not self.only_planned(cells[name])]
        known = dict.fromkeys(checks, PLANNED_SECONDS) | estimate_cells(run, self.evidence)
        self.seconds = {test: known[name] / checks[name] for test, name in found.items()}
        self.count, self.whole = len(found), sum(self.seconds.values())
        pace = f" with {self.workers} workers" if self.workers > 1 else ""
        self.say(
            f"{self.count:,} checks of {len(checks):,} cells: {tell_time(self.whole / self.workers)}"
            f"{pace}, as long as their last records took"
        )

    def take(self, test: str) -> None:
        """Note that a check is done; say how far the run is when a minute has gone by."""
        if self.seconds.pop(test, None) is None or not self.seconds:
            return
        now, left = self.clock(), sum(self.seconds.values())
        if now - self.shown < PERIOD or left > self.whole * (1 - ENOUGH):
            return
        self.shown = now
        elapsed = now - self.began
        self.say(
            f"{self.count - len(self.seconds):,} of {self.count:,} checks after "
            f"{round(elapsed / 60)} min, {tell_time(elapsed * left / (self.whole - left))} left"
        )


def estimate_cells(cells: Iterable[Cell], evidence: Path) -> dict[str, float]:
    """Seconds of each cell, by id, from the records that can be read; each hardware has its own median."""
    from quantmatrix.proof import store
    from quantmatrix.proof.record import path_of

    by_hardware: dict[str, list[Cell]] = {}
    for cell in cells:
        by_hardware.setdefault(cell.hardware, []).append(cell)
    seconds: dict[str, float] = {}
    for some in by_hardware.values():
        records: dict[str, Evidence] = {}
        for cell in some:
            with suppress(QuantmatrixError, OSError):
                records[cell.id] = store.read(evidence / path_of(cell.id))
        seconds |= estimate_all(some, records)
    return seconds


def tell_time(seconds: float) -> str:
    """A number of seconds in words: `less than a minute`, `about 4 min`."""
    return "less than a minute" if seconds < 60 else f"about {round(seconds / 60)} min"


def count_workers(config: Any) -> int:
    """The workers that xdist starts; 1 without it."""
    return len(getattr(config.option, "tx", None) or ()) or 1
