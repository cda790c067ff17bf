"""Benchmarks run without workers; a result that measured nothing is an error."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    if getattr(config.option, "numprocesses", None):
        raise pytest.UsageError("benchmarks measure nothing under xdist: run them without -n")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    benchmarks = getattr(session.config, "_benchmarksession", None)
    measured = [b for b in benchmarks.benchmarks if b.stats] if benchmarks else []
    ran = exitstatus == 0 and session.testscollected and not session.config.option.collectonly
    if ran and not measured:
        session.exitstatus = pytest.ExitCode.INTERNAL_ERROR
        print("\nno benchmark measured anything")
