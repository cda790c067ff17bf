"""A pytest plugin that records which lines every test executes, and how long it takes.

`pytest -p watch_tests`, with the folder to write to in `QUANTMATRIX_SEEN`: one coverage file per
process, whose contexts are the ids of the tests, and `seconds.json`. Processes that a test starts are
recorded as the test's own, unless it gives them an environment without these variables, and so are
forks of a test, which end by `os._exit`.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import coverage
import pytest

FOLDER = Path(os.environ["QUANTMATRIX_SEEN"])
CHILDREN = f"""[run]
data_file = {FOLDER / "coverage"}
parallel = true
source_pkgs = quantmatrix
context = ${{QUANTMATRIX_TEST}}
sigterm = true
"""
recorder = coverage.Coverage(
    data_file=str(FOLDER / "coverage"),
    data_suffix=True,
    source_pkgs=["quantmatrix"],
    config_file=False,
)
recorder.start()
end_process = os._exit


def end_fork(status: int) -> NoReturn:
    """Keep what a fork of a test has executed, under the test's id, and end it."""
    recorder.stop()
    recorder.save()
    end_process(status)


def watch_fork() -> None:
    """In a fork: its end is the last moment at which anything can be kept."""
    os._exit = end_fork  # type: ignore[assignment]


os.register_at_fork(after_in_child=watch_fork)
seconds: Counter[str] = Counter()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Put what a test executes, fixtures included, under its id, and what its children execute."""
    settings = FOLDER / f"children-{os.getpid()}.ini"
    if not settings.is_file():
        settings.write_text(CHILDREN)
    os.environ["COVERAGE_PROCESS_START"] = str(settings)  # coverage begins where it is imported
    os.environ["QUANTMATRIX_TEST"] = item.nodeid
    recorder.switch_context(item.nodeid)
    try:
        return (yield)
    finally:
        recorder.switch_context("")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add up set-up, call and tear-down."""
    seconds[report.nodeid] += report.duration


def pytest_sessionfinish(session: Any) -> None:
    """Keep what was recorded; with workers only their parent knows all durations."""
    recorder.stop()
    recorder.save()
    if not hasattr(session.config, "workerinput"):
        (FOLDER / "seconds.json").write_text(json.dumps(seconds))
