"""Ten thousand cells whose checks do nothing, as a thousand tasks of Ray on this machine.

The bar is on the CPU time of the driver, all its threads, Ray's included, from the first task handed
over to the last record written: it judges, merges and writes every record and JUnit file as it always
does. Its memory at the end is held against that after the first tenth.
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
"""Of the driver's time, a cell."""
GROWTH = 32 * 2**20
"""Bytes by which the driver may grow over nine tenths of the cells."""
PROGRAM = """
import json, resource, sys, time
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
        sizes[done] = memory()
    wall, start = time.perf_counter(), time.process_time()
    driver.plan(groups, sites)
    driver.run(say)
    spent, wall = time.process_time() - start, time.perf_counter() - wall
code = outcome.compare(tables.cells, ()).code
tenth = min(size for size in sizes if size >= len(tables.cells) // 10)
print(json.dumps({"code": code, "cells": done, "cpu": spent, "wall": wall, "groups": len(groups),
                  "growth": sizes[done] - sizes[tenth], "memory": sizes[done]}))
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
    benchmark.extra_info.update(found, milliseconds=round(1000 * found["cpu"] / CELLS, 2))
    assert (found["code"], found["cells"], found["groups"]) == (0, CELLS, CELLS // GROUP)
    assert len(list((project / "evidence" / "cpu").glob("*.json"))) == CELLS
    assert 1000 * found["cpu"] / CELLS <= MILLISECONDS, found
    assert found["growth"] <= GROWTH, found
