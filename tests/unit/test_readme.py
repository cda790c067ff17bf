"""Every command of the README's everyday tasks is run, word for word."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from quantmatrix.cli.main import main

README = Path(__file__).parents[2] / "README.md"


def everyday_commands() -> list[str]:
    return re.findall(r"^quantmatrix .*$", README.read_text(), flags=re.MULTILINE)


def test_there_are_five_everyday_tasks() -> None:
    assert len(everyday_commands()) >= 5


NAMES = [f"{n}-{command.split()[1]}" for n, command in enumerate(everyday_commands(), 1)]


@pytest.mark.parametrize("command", everyday_commands(), ids=NAMES)
def test_command_runs(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command, comments=True)[1:]
    reports = ["--reports", str(README.parent / "reports")] if words[0] == "matrix" else []
    assert main([*words, *reports]) == 0
    assert capsys.readouterr().out.strip()
