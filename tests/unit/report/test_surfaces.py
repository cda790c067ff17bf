"""Every surface says the same of every cell, whatever is installed and whatever day it is."""

from __future__ import annotations

import csv
import importlib.metadata
import io
import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from observed import observe
from tables import write_tables
from test_page import read_data

import quantmatrix
from quantmatrix.cli.main import main
from quantmatrix.proof import code_digest, store
from quantmatrix.proof.agreement import BY_STATE
from quantmatrix.proof.code_digest import Code
from quantmatrix.tables import read as matrix
from quantmatrix.tables.rows import Matrix

PACKAGE = Path(quantmatrix.__file__).parent


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Matrix:
    monkeypatch.setattr(matrix, "tables_folder", lambda: tmp_path / "matrix")
    return matrix.read(write_tables(tmp_path / "matrix"))


@pytest.fixture
def reports(tables: Matrix, tmp_path: Path) -> Path:
    """Evidence of every claim: what passed, one failure, one of other code, one of another row."""
    folder = tmp_path / "reports"
    claimed = [cell for cell in tables.cells if cell.claim != "planned"]
    for number, cell in enumerate(claimed):
        record = observe(tables, cell.id, fails=cell.checks[0] if number == 1 else "")
        if number == 2:
            record = replace(record, cell={**record.cell, "shared_digest": "sha256:0"})
        if number == 3:
            record = replace(record, cell={**record.cell, "row_digest": "sha256:0"})
        store.write(record, folder / "evidence")
    return folder


@pytest.fixture
def ask(reports: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """What a command answers."""

    def run(*words: str) -> Any:
        capsys.readouterr()
        assert main([*words, "--reports", str(reports), "--json"]) in (0, 1)
        return json.loads(capsys.readouterr().out)

    return run


def read_list(ask: Callable[..., Any]) -> dict[str, str]:
    return {row["id"]: row["state"] for row in ask("matrix", "list")["rows"]}


@pytest.fixture
def read_surfaces(reports: Path, ask: Callable[..., Any]) -> Callable[[], Any]:
    """The state of every cell as each surface shows it, by the surface's name."""

    def read() -> dict[str, dict[str, str]]:
        listed = read_list(ask)
        ask("report")
        lines = csv.DictReader(io.StringIO((reports / "support-matrix.csv").read_text()))
        page = read_data((reports / "index.html").read_bytes())
        states = [page["states"][cell[3]] for cell in page["cells"]]
        said = {}
        for checkpoint, hardware in {(c.checkpoint, c.hardware) for c in matrix.read().cells}:
            found = ask("explain", "--checkpoint", checkpoint, "--hardware", hardware)
            said |= {one["cell"]: one["state"] for one in found["cells"] if one["cell"]}
        return {
            "matrix list": listed,
            "csv": {line["id"]: line["state"] for line in lines},
            "page": dict(zip(listed, states, strict=True)),
            "explain": said,
            "agreement": check_lives(ask("agreement"), listed),
        }

    return read


def check_lives(found: dict[str, Any], states: dict[str, str]) -> dict[str, str]:
    """The states that agreement's lives and counts stand for: those of a list, where they fit."""
    lives = {task["cell"]: task["life"] for task in found["tasks"]}
    claimed = {cell: state for cell, state in states.items() if state != "planned"}
    assert {cell: lives.get(cell, "fresh") for cell in claimed} == {
        cell: BY_STATE[state] for cell, state in claimed.items()
    }
    counts = Counter(BY_STATE[state] for state in claimed.values())
    assert {name: n for name, n in found["overall"].items() if n and name in counts} == counts
    return states


def test_all_surfaces_agree(read_surfaces: Callable[[], Any]) -> None:
    found = read_surfaces()
    first = found["matrix list"]
    assert set(first.values()) == {"proven", "refused", "failing", "stale", "planned"}
    for name, states in found.items():
        assert states == first, name


def test_other_packages_here_and_another_day_change_nothing(
    read_surfaces: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = read_surfaces()
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "99.0")
    monkeypatch.setattr("quantmatrix.cli.agreement.read_today", lambda text: date(2031, 1, 1))
    assert read_surfaces() == before


@pytest.mark.parametrize(
    ("file", "old", "new", "stale"),
    [
        (
            "runtime/generate.py",
            "manual_seed(seed)",
            "manual_seed(seed + 1)",
            {"proven", "failing"},
        ),
        (
            "kernels/number_formats.py",
            "E4M3_MAX = 448.0",
            "E4M3_MAX = 240.0",
            {"proven", "failing"},
        ),
        ("runtime/plan/decide.py", '"""Planning:', '"""Otherwise:', set()),
    ],
)
def test_changed_code_shows_on_every_surface_alike(
    read_surfaces: Callable[[], Any],
    ask: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    old: str,
    new: str,
    stale: set[str],
) -> None:
    before = read_list(ask)  # every surface is asked about unchanged code above
    copy = shutil.copytree(PACKAGE, tmp_path / "code", ignore=shutil.ignore_patterns("__pycache__"))
    text = (copy / file).read_text()
    assert old in text
    (copy / file).write_text(text.replace(old, new))
    changed = Code(copy)
    monkeypatch.setattr(code_digest, "own_code", lambda: changed)
    after = read_surfaces()
    wanted = {cell: "stale" if state in stale else state for cell, state in before.items()}
    for name, states in after.items():
        assert states == wanted, name
