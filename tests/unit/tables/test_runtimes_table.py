"""The tables of runtimes and of what is said of them: cells, and every problem with its line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from quantmatrix.tables import read, source
from quantmatrix.tables.rows import MatrixError

MATRIX = read.tables_folder()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(MATRIX, tmp_path / "matrix")


def list_problems(folder: Path) -> list[str]:
    try:
        read.read(folder)
    except MatrixError as error:
        return list(error.problems)
    return []


def test_our_own_tables_have_a_row_for_every_adapter(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "runtimes.csv"
    path.write_text(path.read_text().replace("\nxdit,", "\nxdot,"))
    assert not any("no row for xdit" in line for line in list_problems(folder))
    monkeypatch.setattr(source, "own_folder", lambda: folder)
    assert any("no row for xdit, the module peers/xdit.py" in p for p in list_problems(folder))


def test_cells_are_of_checkpoint_hardware_and_runtime() -> None:
    tables = read.read()
    cells = [cell.id for cell in tables.runtime_cells]
    assert len(cells) == len(set(cells))
    assert "fp8-guide@cpu~diffusers" in cells
    assert "fp8-guide@h200~sglang" in cells
    assert "fp8-guide@cpu~sglang" not in cells
    assert not [name for name in cells if name.endswith("~quantmatrix")]
    assert not {cell.id for cell in tables.cells} & set(cells)


def test_tables_of_earlier_revisions_have_none(folder: Path) -> None:
    (folder / "runtimes.csv").unlink()
    assert list_problems(folder)[0].startswith("matrix/runtimes.csv: no such file")
    (folder / "statements.csv").unlink()
    tables = read.read(folder)
    assert (dict(tables.runtimes), list(tables.runtime_cells)) == ({}, [])


@pytest.mark.parametrize(
    ("table", "old", "new", "problem"),
    [
        ("runtimes", "\nxdit,", "\nxdot,", 'id: "xdot" is not one of'),
        ("runtimes", ",program,command xdit", ",magic,command xdit", 'kind: "magic"'),
        ("runtimes", ",program,command xdit", ",own,command xdit", "only quantmatrix is our own"),
        ("runtimes", ",command xdit,,cuda mi300x", ",,,cuda mi300x", "found: blank"),
        ("runtimes", ",command xdit,,cuda mi300x", ",command xdit,,cuda h200", "named twice"),
        ("runtimes", ",command xdit,,cuda mi300x", ",command xdit,,moon", '"moon" is not one of'),
        ("runtimes", "https://github.com/xdit-project/xDiT", "", "home: blank"),
        ("statements", "diffusers-bfl,diffusers,", "diffusers-bfl,none,", 'runtime: "none"'),
        (
            "statements",
            "modelopt-nvfp4,flux-2,raw,",
            "modelopt-nvfp4,flux-9,raw,",
            'models: "flux-9"',
        ),
        (
            "statements",
            "modelopt-nvfp4,flux-2,raw,",
            "modelopt-nvfp4,flux-2,rare,",
            'forms: "rare"',
        ),
        (
            "statements",
            "raw,works,0.42.1,2026-11-29",
            "raw,shines,0.42.1,2026-11-29",
            'says: "shines"',
        ),
        (
            "statements",
            "raw,works,0.42.1,2026-11-29",
            "raw,works,0.42.1,yesterday",
            'date: "yesterday"',
        ),
    ],
)
def test_problems_name_their_line(
    table: str, old: str, new: str, problem: str, folder: Path
) -> None:
    path = folder / f"{table}.csv"
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    found = list_problems(folder)
    assert any(problem in line and line.startswith(f"matrix/{table}.csv") for line in found), found
