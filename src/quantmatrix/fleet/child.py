"""The pytest plugin of a group's process: it tells each step, and ends when its parent is gone.

    python -m pytest -p quantmatrix.fleet.child --fleet-steps FILE --fleet-leash FD

A line is added to the file at every turn: `start CELL`, `end CELL`, and `finish` at the end, without
which the process did not come to it. The leash is the reading end of a pipe that the parent holds: when
the parent is killed, by Ray or by the system, nobody would stop this process, and the next one would
find its device taken. So it stops itself, with all that it started.
"""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from quantmatrix.harness.outcomes import name_cell


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the two options."""
    group = parser.getgroup("quantmatrix-fleet")
    group.addoption("--fleet-steps", metavar="FILE", help="add a line there at every step")
    group.addoption("--fleet-leash", type=int, metavar="FD", help="end when this pipe does")


def pytest_configure(config: pytest.Config) -> None:
    """Begin to watch the parent, and to write steps."""
    leash = config.getoption("fleet_leash")
    if leash is not None:
        threading.Thread(target=follow, args=[leash], daemon=True).start()
    steps = config.getoption("fleet_steps")
    if steps is not None:
        config.pluginmanager.register(Steps(Path(steps)), "quantmatrix-fleet-steps")


def follow(leash: int) -> None:
    """Wait until nobody holds the other end of a pipe; then end this process and its children."""
    while os.read(leash, 1):
        pass
    os.killpg(os.getpgid(0), signal.SIGKILL)


class Steps:
    """Writes what happens, a line at once, so that it is there whatever comes next."""

    def __init__(self, path: Path) -> None:
        """`path` is a file of lines."""
        self.path = path

    def write(self, line: str) -> None:
        """Add a line."""
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(f"{line}\n")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """A check begins."""
        self.write(f"start {name_cell(nodeid)}")

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """A check is done, whatever its outcome."""
        self.write(f"end {name_cell(nodeid)}")

    @pytest.hookimpl(trylast=True)
    def pytest_unconfigure(self, config: pytest.Config) -> None:
        """Nothing is left to do: the JUnit file is written."""
        self.write("finish")
