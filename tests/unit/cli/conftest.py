"""Fixtures of tests of commands: they run in this process, and others do their work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tables import write_tables

from quantmatrix.cli.main import main

Run = Callable[..., tuple[int, str, str]]
Replace = Callable[..., list[Any]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command: its exit code, and what it printed."""

    def act(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(words)
        return code, *capsys.readouterr()

    return act


@pytest.fixture
def replace(monkeypatch: pytest.MonkeyPatch) -> Replace:
    """Replace a function by one that gives a result; the list has what it was called with."""

    def act(name: str, result: Any) -> list[Any]:
        calls: list[Any] = []

        def work(*given: Any, **named: Any) -> Any:
            calls.append((*given, named))
            return result

        monkeypatch.setattr(f"quantmatrix.{name}", work)
        return calls

    return act


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Small tables, and a folder of reports without a record beside them."""
    (tmp_path / "reports" / "evidence").mkdir(parents=True)
    return write_tables(tmp_path / "matrix")
