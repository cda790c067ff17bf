"""Runs killed at random moments: no finished cell is lost, no file is torn, the next run resumes.

`QUANTMATRIX_KILLS=50 pytest tests/unit/harness/test_killed_runs.py` kills as often as one likes.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from observed import make_large, observe_run
from tables import CASES, write_tables

from quantmatrix.proof import record as records
from quantmatrix.proof import store
from quantmatrix.tables import read

KILLS = int(os.environ.get("QUANTMATRIX_KILLS", "5"))
SCRIPT = Path(__file__).parents[1] / "fake_run.py"


def start(tables: Path, evidence: Path) -> subprocess.Popen[str]:
    command = [sys.executable, str(SCRIPT), str(tables), str(evidence)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=SCRIPT.parent)


def wait_for_some(run: subprocess.Popen[str], lines: int) -> list[str]:
    """Up to this many lines of a run's output; fewer when it ends before."""
    assert run.stdout is not None
    return [line for _ in range(lines) if (line := run.stdout.readline().strip())]


def kill(run: subprocess.Popen[str]) -> list[str]:
    """Kill it with a signal that it cannot see; what it had said until then."""
    run.send_signal(signal.SIGKILL)
    said, _ = run.communicate()
    return said.split("\n")[:-1]  # a line that is cut off is no promise


def test_killed_runs_resume(tmp_path: Path) -> None:
    tables_folder, evidence = tmp_path / "matrix", tmp_path / "evidence"
    evidence.mkdir()
    tables, _ = make_large(tables_folder, rows=6 * KILLS)
    chance = random.Random(20261124)
    promised: set[str] = set()
    torn = 0
    for _ in range(KILLS):
        run = start(tables_folder, evidence)
        assert wait_for_some(run, 1) == ["ready"]
        said = wait_for_some(run, chance.randrange(1, 30))
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.wait(timeout=chance.random() * 0.005)
        said += kill(run)
        again = promised & set(said)
        assert not again, f"finished before, and run again: {sorted(again)}"
        promised |= set(said)
        found = store.read_folder(evidence)  # raises when a file is torn or damaged
        assert promised <= set(found)
        assert len(set(found) - promised) <= KILLS  # written, but killed before it could say so
        torn += len(list(evidence.glob("*/.*.tmp")))
    assert 0 < len(promised) < len(tables.cells)
    whole = start(tables_folder, evidence)
    said_at_last, _ = whole.communicate(timeout=120)
    assert whole.returncode == 0
    rest = set(said_at_last.split()) - {"ready", "finished"}
    assert not rest & promised
    found = store.read_folder(evidence)
    assert set(found) == {cell.id for cell in tables.cells}
    for cell in tables.cells:
        assert found[cell.id].checks == observe_run(tables, cell, steps=200).checks
    assert list(evidence.glob("*/.*.tmp")) == []
    print(f"{KILLS} kills, {torn} half-written files left aside, {len(promised)} cells kept")


def test_only_old_leftovers_are_removed(tmp_path: Path) -> None:
    """A worker beside this one may be writing at this moment."""
    tables = read.read(write_tables(tmp_path / "matrix", CASES[:1]))
    path = store.write(observe_run(tables, tables.cells[0]), tmp_path / "evidence")
    old, young = (path.with_name(f".{name}.x.tmp") for name in ("old", "young"))
    for leftover in (old, young):
        leftover.write_bytes(b'{"schema')
    os.utime(old, (0, 0))
    assert len(store.read_folder(tmp_path / "evidence")) == 1  # neither is taken for a record
    store.remove_leftovers(tmp_path / "evidence")
    assert sorted(path.parent.iterdir()) == sorted([path, young])


def test_a_torn_file_would_be_found(tmp_path: Path) -> None:
    """What the first test relies on: a file that is cut off anywhere cannot be read."""
    tables = read.read(write_tables(tmp_path / "matrix", CASES[:1]))
    path = store.write(observe_run(tables, tables.cells[0]), tmp_path / "evidence")
    data = path.read_bytes()
    for length in (0, 1, len(data) // 2, len(data) - 2):
        path.write_bytes(data[:length])
        with pytest.raises(records.EvidenceError, match="not JSON"):
            store.read_folder(tmp_path / "evidence")
