"""Changes of the matrix between two revisions of a repository made for the test."""

from __future__ import annotations

import csv
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from observed import PROVEN, observe
from tables import CASES, CHECKPOINTS, write_tables

from quantmatrix.cli.main import main
from quantmatrix.errors import QuantmatrixError, UsageError
from quantmatrix.proof import store as records
from quantmatrix.report.changes import Changes, compare_revisions, write_markdown
from quantmatrix.tables import read

Commit = Callable[[], str]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    write_tables(tmp_path / "matrix")
    return tmp_path


@pytest.fixture
def commit(root: Path) -> Commit:
    def run() -> str:
        git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
        done = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True)
        return done.stdout.decode().strip()

    return run


def compare(root: Path, before: str, after: str = "HEAD") -> Changes:
    return compare_revisions(f"{before}..{after}", root)


def test_nothing_changed(root: Path, commit: Commit) -> None:
    first = commit()
    (root / "other.txt").write_text("x")
    found = compare(root, first, commit())
    assert found == Changes({}, {}, ())
    assert write_markdown(found, "A..B") == "## Matrix A..B: 0 gained, 0 lost, 0 changed"


def test_an_earlier_revision_lacks_a_column_that_came_later(root: Path, commit: Commit) -> None:
    """`devices` of hardware.csv: a review across its arrival is read, and no cell has changed."""
    path = root / "matrix" / "hardware.csv"
    with path.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    whole = path.read_text()
    names = [name for name in rows[0] if name != "devices"]
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, names, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    first = commit()
    path.write_text(whole)
    assert compare(root, first, commit()) == Changes({}, {}, ())
    path.write_text(whole.replace(",memory_gib,", ",memory,"))
    with pytest.raises(QuantmatrixError, match="expected the columns"):
        compare(root, first, commit())


def test_gained_lost_and_changed(root: Path, commit: Commit) -> None:
    first = commit()
    cases = [
        {**CASES[0], "backend": "reference", "flags": "--seed 7"},
        {**CASES[1], "claim": "expected", "checks": "load"},
        *CASES[2:],
        {**CASES[1], "id": "new", "flags": "--seed 3"},
    ]
    write_tables(root / "matrix", cases)
    found = compare(root, first, commit())
    lost = {
        f"fp8-flux-1@{place}+{name}"
        for place in ("cpu", "h100")
        for name in ("reference", "decode")
    }
    assert set(found.lost) == lost  # one backend needs no name in the id
    assert set(found.gained) == {"fp8-flux-1@cpu", "fp8-flux-1@h100", "new@cpu"}
    [changed] = found.changed
    assert changed.cell == "fp8-flux-2@cpu"
    assert changed.columns == {
        "claim": ("validated", "expected"),
        "checks": (["load", "generate"], ["load"]),
    }
    text = write_markdown(found, "A..B")
    assert text.startswith("## Matrix A..B: 3 gained, 4 lost, 1 changed")
    assert "| `new@cpu` | validated | unproven |" in text
    assert "| `fp8-flux-2@cpu` | checks | load generate | load |" in text
    back = compare(root, "HEAD", first)
    assert (set(back.gained), set(back.lost)) == (set(found.lost), set(found.gained))


def test_states_come_from_the_evidence_of_each_revision(root: Path, commit: Commit) -> None:
    first = commit()
    tables = read.read(root / "matrix")
    records.write(observe(tables, PROVEN), root / "reports" / "evidence")
    second = commit()
    [changed] = compare(root, first, second).changed
    assert changed.cell == PROVEN
    assert changed.columns == {"state": ("unproven", "proven"), "scope": ("", "stand-in")}
    rows = [{**CHECKPOINTS[0], "revision": "0" * 40}, *CHECKPOINTS[1:]]
    write_tables(root / "matrix", checkpoints=rows)
    third = compare(root, second, commit()).changed
    columns = {change.cell: change.columns for change in third}
    assert columns[PROVEN] == {"checkpoint row": ("", "changed"), "state": ("proven", "stale")}
    assert set(columns["fp8-flux-1@h100+decode"]) == {"checkpoint row"}
    assert not any(name.startswith("fp8-flux-2") for name in columns)


def test_the_working_tree_takes_no_part(root: Path, commit: Commit) -> None:
    first = commit()
    write_tables(root / "matrix", CASES[:2])
    assert compare(root, first) == Changes({}, {}, ())
    assert compare_revisions(f"{first}..", root) == Changes({}, {}, ())


@pytest.mark.parametrize("span", ["HEAD", "..HEAD", "", "HEAD...HEAD"])
def test_two_revisions_are_needed(root: Path, span: str) -> None:
    with pytest.raises(UsageError, match=r"expected two revisions, A\.\.B"):
        compare_revisions(span, root)


def test_revisions_that_cannot_be_read(root: Path, commit: Commit) -> None:
    first = commit()
    with pytest.raises(UsageError, match="nothing: no such revision"):
        compare(root, first, "nothing")
    with pytest.raises(UsageError, match="--all: no such revision"):
        compare(root, "--all", first)
    (root / "matrix" / "cases.csv").write_text("x\n")
    broken = commit()
    with pytest.raises(QuantmatrixError, match=rf"revision {broken} cannot be read: matrix/cases"):
        compare(root, first, broken)
    for path in (root / "matrix").iterdir():
        path.unlink()
    with pytest.raises(UsageError, match="has no matrix/"):
        compare(root, first, commit())


def test_command(
    root: Path, commit: Commit, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(read, "tables_folder", lambda: root / "matrix")
    first = commit()
    write_tables(root / "matrix", CASES[1:])
    commit()
    assert main(["matrix", "diff", f"{first}..HEAD"]) == 0
    assert "### Lost" in capsys.readouterr().out
    assert main(["matrix", "diff", f"{first}..HEAD", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["lost"]) == 4
    assert found["lost"][PROVEN]["state"] == "unproven"
    assert main(["matrix", "diff", "HEAD", "--json"]) == 2
