"""Outcomes: which tests of cells were to run, which gave a verdict, and the exit code of it all.

Without workers the session counts its own items; with workers their controller counts what they
collected and what they reported, so that a worker that dies leaves a row that was not executed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest

from quantmatrix.errors import MachineError
from quantmatrix.exit_codes import (
    CLAIM_VIOLATED,
    ENVIRONMENT_UNUSABLE,
    MEANINGS,
    NOT_EXECUTED,
    NOTHING_COLLECTED,
    blames_environment,
)

TIMEOUT = "from pytest-timeout"
"""What a test says that was stopped at its time limit: it has no verdict."""
UNJUDGED = "unjudged"
"""Property of a report whose check measured something that no limit is known for."""
PROBLEM = "problem"
"""Property of a report that names one of `MEANINGS`."""
SLACK = 1e-6
"""Share by which a limit may differ from its recorded, rounded self."""
SHOWN = 20
"""Cells that the closing lines name."""


class Outcomes:
    """What became of every test of a cell, by test id; a plugin of the process that reports."""

    def __init__(self, is_cell: Callable[[str], bool]) -> None:
        """`is_cell` tells whether the text in the brackets of a test id is a cell's id."""
        self.is_cell = is_cell
        self.planned: set[str] = set()
        self.done: set[str] = set()
        self.unjudged: set[str] = set()
        """Tests whose check was measured, and not judged."""
        self.problems: dict[str, int] = {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Count what is to be executed here."""
        self.plan(item.nodeid for item in session.items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        """Count what is to be executed by workers; each of them collects all of it."""
        self.plan(ids)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count what was executed, here or by a worker."""
        self.take(report)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Give the session the exit code of what happened to its cells."""
        if not session.config.option.collectonly:
            session.exitstatus = self.decide(exitstatus)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say which cells have which problem."""
        if not terminalreporter.config.option.collectonly:
            for line in self.describe():
                terminalreporter.write_line(line)

    def plan(self, tests: Iterable[str]) -> None:
        """Expect verdicts of these tests; those of other functions are left out."""
        self.planned.update(test for test in tests if self.is_cell(name_cell(test)))

    def take(self, report: pytest.TestReport) -> None:
        """Count a report; a crash of its process is a failure without a verdict."""
        if not self.is_cell(name_cell(report.nodeid)):
            return
        properties = dict(report.user_properties)
        if "cell" not in properties and report.when in ("setup", "call", "teardown"):
            self.planned.discard(report.nodeid)  # another test that has a cell's id as parameter
        elif "cell" not in properties:  # its process died
            self.problems[report.nodeid] = NOT_EXECUTED
        elif report.failed:
            found = next(
                (c for c, name in MEANINGS.items() if name == properties.get(PROBLEM)), None
            )
            code = found or CLAIM_VIOLATED
            self.problems[report.nodeid] = max(code, self.problems.get(report.nodeid, 0))
        elif report.skipped and properties.get(UNJUDGED):
            self.unjudged.add(report.nodeid)
            self.done.add(report.nodeid)
        elif report.skipped:
            self.problems[report.nodeid] = NOT_EXECUTED
        elif report.when == "call":
            self.done.add(report.nodeid)

    def list_problems(self) -> dict[int, list[str]]:
        """Tests of each exit code, the largest code first."""
        found = dict.fromkeys(self.planned - self.done, NOT_EXECUTED) | self.problems
        by_code: dict[int, list[str]] = {}
        for test in sorted(found):
            by_code.setdefault(found[test], []).append(test)
        return dict(sorted(by_code.items(), reverse=True))

    def decide(self, exitstatus: int) -> int:
        """The exit code of a session that pytest would end with `exitstatus`.

        Interruptions, internal errors and wrong usage keep pytest's codes.
        """
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
            return NOTHING_COLLECTED
        if exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            return exitstatus
        return max([exitstatus, *self.list_problems()])

    def describe(self) -> list[str]:
        """One line per kind of problem, naming cells; before them a line on those without a limit."""
        lines = []
        if self.unjudged:
            names = list(dict.fromkeys(name_cell(test) for test in sorted(self.unjudged)))
            lines.append(f"unjudged, for want of a limit: {show_some(names)}")
        for code, tests in self.list_problems().items():
            names = list(dict.fromkeys(name_cell(test) for test in tests))
            lines.append(f"{MEANINGS[code]} (exit code {code}): {show_some(names)}")
        return lines


def show_some(names: list[str]) -> str:
    """The first names, and how many there are beside them."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"


def name_cell(test: str) -> str:
    """The cell in the brackets of a test id, or nothing."""
    return test.partition("[")[2].removesuffix("]")


def mark_problem(item: pytest.Item, report: pytest.TestReport, code: int) -> None:
    """Name the problem of a test in its report, and in the JUnit file."""
    problem = (PROBLEM, MEANINGS[code])
    report.user_properties.append(problem)
    item.user_properties.append(problem)


def mark_unjudged(item: pytest.Item, report: pytest.TestReport, why: str) -> None:
    """Show a check without a limit as skipped, and name it in its report and in the JUnit file."""
    report.outcome = "skipped"
    report.longrepr = (str(item.path), 0, f"unjudged: {why}")
    for properties in (report.user_properties, item.user_properties):
        properties.append((UNJUDGED, True))


def expect_failure(item: pytest.Item, report: pytest.TestReport) -> None:
    """Turn the outcome of a check that is claimed to fail around; what is recorded stays."""
    if report.failed:
        report.outcome, report.longrepr = "passed", None
    else:
        report.outcome = "failed"
        report.longrepr = f"{item.name}: claimed to fail, but it passes: change the claim"


def classify(error: BaseException) -> int | None:
    """Exit code of an error that says nothing about the claim, or None."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, pytest.fail.Exception) and TIMEOUT in str(cause):
            return NOT_EXECUTED
        if isinstance(cause, MachineError):
            return ENVIRONMENT_UNUSABLE
        cause = cause.__cause__
    return ENVIRONMENT_UNUSABLE if blames_environment(error) else None


def find_loosened(older: Mapping[str, Any], newer: Mapping[str, Any]) -> list[str]:
    """Limits of a check that are wider than they were, or gone, as text."""
    lines = []
    for name, old in older.items():
        if not isinstance(old, Mapping) or not old.keys() & {"at_least", "at_most"}:
            continue
        new = newer.get(name)
        for bound, sign in (("at_least", 1), ("at_most", -1)):
            if bound not in old:
                continue
            now = new.get(bound) if isinstance(new, Mapping) else None
            if now is None or sign * (old[bound] - now) > SLACK * abs(old[bound]):
                lines.append(
                    f"{name}: {bound} {old[bound]:g} became {now if now is None else f'{now:g}'}"
                )
    return lines
