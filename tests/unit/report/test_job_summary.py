"""The summary of a CI step: changed cells first, whole or counted, never above the limit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import shards

from quantmatrix.cli import main
from quantmatrix.exit_codes import NOTHING_COLLECTED
from quantmatrix.proof import store
from quantmatrix.proof.freshness import sign
from quantmatrix.proof.record import CheckResult, Evidence, describe_cell
from quantmatrix.report import job_summary
from quantmatrix.report.job_summary import LIMIT, Shown
from quantmatrix.tables import read
from quantmatrix.tables.rows import Cell, Matrix

MANY = [Shown(f"row-{i}@cpu", "unproven", "failing", "x" * 200, i < 9) for i in range(9000)]


@pytest.fixture
def tables(tmp_path: Path) -> Matrix:
    """The tables of a project."""
    return shards.make_project(tmp_path / "project")


@pytest.fixture
def command(tables: Matrix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The command line, on the project's tables, outside of any CI."""
    monkeypatch.setattr(read, "tables_folder", lambda: tmp_path / "project" / "matrix")
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    return lambda *words: main.main([str(word) for word in words])


def make(cell: Cell, tables: Matrix, verdict: str = "pass", digest: str = "a") -> Evidence:
    result = CheckResult(verdict, message="too far | away" if verdict == "fail" else "")
    described = describe_cell(cell, tables)
    record = Evidence(described, dict.fromkeys(cell.checks, result), latents_digest=digest)
    return sign(record, tables.hardware[cell.hardware])


@pytest.fixture
def folders(tables: Matrix, tmp_path: Path) -> tuple[Path, Path]:
    """Earlier evidence, and newer with a failing, a moved, a new and eight equal cells."""
    earlier, newer = tmp_path / "earlier", tmp_path / "newer"
    for index, cell in enumerate(tables.cells[:11]):
        if index != 9:
            store.write(make(cell, tables), earlier)
        verdict, digest = ("fail" if index == 7 else "pass"), ("b" if index == 8 else "a")
        store.write(make(cell, tables, verdict, digest), newer)
    return earlier, newer


def test_changed_cells_come_first(
    folders: tuple[Path, Path],
    tables: Matrix,
    command: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command("summary", folders[1], "--since", folders[0]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "## quantmatrix: 11 cells, 3 changed"
    assert "| proven · stand-in | 10 |" in lines
    rows = [line for line in lines if line.startswith("| `")]
    ids = [cell.id for cell in tables.cells[:11]]
    changed = [ids[7], ids[8], ids[9]]
    assert [row.split("`")[1] for row in rows] == [*changed, *ids[:7], ids[10]]
    assert rows[
        0
    ] == f"| `{ids[7]}` | proven · stand-in | failing · stand-in | load: too far \\| away; " + (
        "latents: too far \\| away |"
    )
    assert "other latents than before" in rows[1]
    assert "| unproven | proven · stand-in |" in rows[2]


def test_it_is_appended_to_the_file_of_the_step(
    folders: tuple[Path, Path],
    command: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    step = tmp_path / "step.md"
    step.write_text("# before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(step))
    assert command("summary", folders[1], "--since", folders[0], "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["changed"] for one in found["cells"]] == [True] * 3 + [False] * 8
    text = step.read_text()
    assert text.startswith("# before\n## quantmatrix: 11 cells")
    other = tmp_path / "other.md"
    command("summary", folders[1], "--since", folders[0], "--output-path", other)
    assert step.read_text() == text
    assert text.endswith(other.read_text())


def test_a_long_table_is_cut_and_counted() -> None:
    text = job_summary.write_summary(MANY)
    assert len(text.encode()) <= LIMIT < 1024 * 1024
    rows = text.count("| `row-")
    assert len(text.encode()) > LIMIT - 1000
    assert text.endswith(f"and {9000 - rows} more cells: see the evidence of this job\n")
    assert [f"`row-{i}@cpu`" in text for i in range(9)] == [True] * 9
    assert "more cells" not in job_summary.write_summary(MANY[:100])


def test_what_the_file_holds_already_counts(tmp_path: Path) -> None:
    step = tmp_path / "step.md"
    step.write_bytes(b"x" * (LIMIT - 5000))
    job_summary.append(step, MANY, [])
    assert LIMIT - 1000 < step.stat().st_size <= LIMIT
    step.write_bytes(b"x" * (LIMIT - 100))
    with pytest.raises(job_summary.UsageError, match="a summary does not fit"):
        job_summary.append(step, MANY, [])


def test_a_job_that_showed_nothing_says_so(
    folders: tuple[Path, Path],
    command: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    assert command("summary", tmp_path / "empty", "--since", folders[0]) == NOTHING_COLLECTED
    assert "- nothing collected" in capsys.readouterr().out
    assert command("summary", tmp_path / "none") == 2
    assert command("summary", folders[1], "--since", tmp_path / "none") == 2


def test_a_damaged_record_is_named(
    folders: tuple[Path, Path], command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    path = next(folders[1].rglob("*.json"))
    path.write_text("{")
    assert command("summary", folders[1], "--since", folders[0]) == 1
    assert f"- damaged: {path}: not JSON" in capsys.readouterr().out


def test_a_row_that_changed_is_not_compared_as_the_same(
    tables: Matrix, folders: tuple[Path, Path]
) -> None:
    cell = tables.cells[0]
    old = store.read_folder(folders[0])
    stale = {**old[cell.id].cell, "row_digest": "sha256:other"}
    before = {**old, cell.id: replace(old[cell.id], cell=stale)}
    shown = job_summary.list_cells(tables, before, old)
    assert (shown[0].cell, shown[0].before, shown[0].now) == (
        cell.id,
        "stale · stand-in",
        "proven · stand-in",
    )
