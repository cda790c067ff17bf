"""Ten thousand cells whose checks do nothing, as a thousand tasks of Ray on this machine.

The driver judges, merges and writes every record and JUnit file as it always does. Three times are measured, each
over all cells, from the first task handed over to the last record written:

| key    | what it is | held to 3 ms |
| ------ | ---------- | ------------ |
| `cpu`  | CPU time of the driver's process, all threads, Ray's included | yes |
| `own`  | time on the clock in which the driver does not wait for an answer: its own work and the disk's | yes |
| `wall` | time on the clock, in which the tasks make their records on the same processor | no |

Its memory at the end is held against that after the first fifth, when Ray's threads have all they need.
Python's own blocks must not grow with the cells at all; the rest is Ray's, which keeps some bytes of every task.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "unit"))
CELLS = 10_000
GROUP = 10
MILLISECONDS = 3.0
"""Of the driver's time, a cell, by either clock."""
GROWTH = 6 * 2**20
"""Bytes by which the process may grow over four fifths of the cells, Ray's included."""
BLOCKS = 0.1
"""Blocks of Python's memory by which the driver may grow, a cell; one verdict of each would be two."""
PROGRAM = """
import ctypes, json, resource, sys, time
from pathlib import Path

import fleet_nothing
from quantmatrix.fleet import bundle, cluster
from quantmatrix.fleet.driver import Driver, Outcome
from quantmatrix.fleet.engine import RayEngine
from quantmatrix.fleet.groups import make_groups
from quantmatrix.fleet.intake import Intake
from quantmatrix.fleet.progress import Progress
from quantmatrix.proof.freshness import Now
from quantmatrix.tables import read

def memory():
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps for later is no growth
    fields = Path("/proc/self/statm").read_text().split()
    return (int(fields[1]) - int(fields[2])) * resource.getpagesize()  # without what is shared

root = Path("project")
tables = read.read(root / "matrix")
with RayEngine("local", bundle.pack(root / "matrix", [root / "test_suites.py"]), fleet_nothing.work) as engine:
    nodes = engine.list_nodes()
    sites = {"cpu": cluster.Site(tables.hardware["cpu"], nodes)}
    outcome = Outcome({})
    progress = Progress(Path("evidence.fleet"), {})
    driver = Driver(engine, Intake(tables, Now()), Path("evidence"), progress, outcome, limit=900)
    groups = make_groups(tables.cells, {})
    done, sizes = 0, {}
    def say(cells):
        global done
        done += cells
        if cells:
            sizes[done] = memory(), sys.getallocatedblocks()
    waited, wait = 0.0, engine.wait
    def timed_wait(seconds):
        global waited
        begun = time.perf_counter()
        try:
            return wait(seconds)
        finally:
            waited += time.perf_counter() - begun
    engine.wait = timed_wait
    wall, start = time.perf_counter(), time.process_time()
    driver.plan(groups, sites)
    driver.run(say)
    spent, wall = time.process_time() - start, time.perf_counter() - wall
code = outcome.compare(tables.cells, ()).code
fifth = min(size for size in sizes if size >= len(tables.cells) // 5)
growth, blocks = (after - before for before, after in zip(sizes[fifth], sizes[done]))
print(json.dumps({"code": code, "cells": done, "cpu": spent, "wall": wall, "own": wall - waited,
                  "groups": len(groups), "growth": growth, "blocks": blocks, "memory": sizes[done][0]}))
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Tables of ten thousand cells, ten of each checkpoint."""
    from tables import CASES, CHECKPOINTS, write_tables

    case = {**CASES[0], "hardware": "cpu", "backend": "", "checks": "load"}
    rows = [
        {**case, "id": f"row-{n}", "checkpoint": f"c{n // GROUP}", "flags": f"--seed {n}"}
        for n in range(CELLS)
    ]
    checkpoints = [
        {**CHECKPOINTS[0], "id": f"c{n}", "reference": f"some/c{n}"} for n in range(CELLS // GROUP)
    ]
    write_tables(tmp_path / "project" / "matrix", rows, checkpoints)
    (tmp_path / "project" / "test_suites.py").touch()
    return tmp_path


def test_ten_thousand_cells_cost_the_driver_little(benchmark: Any, project: Path) -> None:
    pytest.importorskip("ray")
    found: dict[str, Any] = {}

    def run() -> None:
        paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            cwd=project,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        found.update(json.loads(done.stdout))

    benchmark.pedantic(run, rounds=1)
    each = {clock: round(1000 * found[clock] / CELLS, 2) for clock in ("cpu", "own", "wall")}
    benchmark.extra_info.update(found, milliseconds_a_cell=each)
    assert (found["code"], found["cells"], found["groups"]) == (0, CELLS, CELLS // GROUP)
    assert len(list((project / "evidence" / "cpu").glob("*.json"))) == CELLS
    assert max(each["cpu"], each["own"]) <= MILLISECONDS, found
    assert found["blocks"] <= BLOCKS * CELLS, found
    assert found["growth"] <= GROWTH, found
