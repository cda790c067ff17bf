"""Rows that are benchmarked: chosen by rule, run without workers, every one of them or an error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from quantmatrix.errors import UsageError
from quantmatrix.exit_codes import NOTHING_COLLECTED
from quantmatrix.measure.bench.rows import CLAIMED, choose_cells, find_cells, why_not
from quantmatrix.proof import bench_results
from quantmatrix.tables import read

ROOT = Path(__file__).parents[4]
TABLES = read.read()
ROW = "modelopt-fp8-wan-2-2@cpu+decode"


def test_a_cpu_has_one_cell_per_family_model_and_backend() -> None:
    cells = TABLES.select(hardware=["cpu"])
    chosen = choose_cells(cells)
    kinds = [(cell.family, cell.model, cell.backend) for cell in chosen]
    assert len(set(kinds)) == len(kinds)
    named = {
        (cell.family, cell.model, cell.backend)
        for cell in cells
        if cell.claim in CLAIMED and cell.backend
    }
    assert {kind for kind in kinds if kind[2]} == named
    blank = {kind[:2] for kind in kinds if not kind[2]}
    assert not blank & {kind[:2] for kind in named}
    assert {family for family, _, _ in kinds} == set(TABLES.families)
    assert all(not why_not(cell) for cell in chosen)
    assert chosen == sorted(chosen, key=TABLES.cells.index)


def test_an_accelerator_has_every_cell_that_runs() -> None:
    cells = TABLES.select(hardware=["h200"])
    chosen = choose_cells(cells)
    left = [cell for cell in cells if cell not in chosen]
    assert chosen
    assert all(why_not(cell) for cell in left)
    assert any("--dit-layerwise-offload" in why_not(cell) for cell in left)


def test_cells_by_name() -> None:
    assert [cell.id for cell in find_cells(TABLES, [ROW, ROW])] == [ROW]
    with pytest.raises(UsageError, match="--row nothing: no such cell"):
        find_cells(TABLES, ["nothing"])
    refused = next(cell for cell in TABLES.cells if cell.claim == "refused")
    with pytest.raises(UsageError, match="claimed to be refused"):
        find_cells(TABLES, [refused.id])
    offloaded = next(cell for cell in TABLES.cells if "--dit-cpu-offload" in cell.flags)
    with pytest.raises(UsageError, match="would time the transfers"):
        find_cells(TABLES, [offloaded.id])


def run_benchmarks(*words: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    command = [sys.executable, "-m", "pytest", "benchmarks/test_rows.py", "-q"]
    return subprocess.run(
        [*command, "-p", "no:cacheprovider", "--benchmark-only", *words],
        capture_output=True, text=True, cwd=ROOT, env=clean, check=False,
    )  # fmt: skip


def test_the_benchmark_of_a_row(tmp_path: Path) -> None:
    rows = tmp_path / "rows.txt"
    rows.write_text(ROW + "\n")
    file = tmp_path / "bench.json"
    done = run_benchmarks(
        "-p", "no:xdist", "--rows", str(rows), "--bench-repeats", "6", f"--benchmark-json={file}",
        f"--bench-dir={tmp_path / 'kept'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    [result] = bench_results.read(tmp_path / "kept" / "cpu" / "modelopt-fp8-wan-2-2+decode.json")
    assert result["what"] == result["cell"]["id"] == ROW
    part = result["components"]["transformer"]
    layers = sum(layer["count"] for layer in part["layers"])
    assert result["backends"]["transformer"] == {"decode": layers}
    said = bench_results.read_pytest(file, [ROW])[ROW]
    assert said["device"] == result["device"]
    assert said["transformer step"]["verdict"] == part["step"]["verdict"]
    assert said["transformer memory"] == part["memory"]
    [entry] = json.loads(file.read_text())["benchmarks"]
    assert entry["stats"]["rounds"] == 5


def test_the_benchmarks_refuse_workers_and_empty_selections() -> None:
    done = run_benchmarks("-n", "1")
    assert done.returncode == 4
    assert "benchmarks measure nothing under xdist" in done.stdout + done.stderr
    done = run_benchmarks("-p", "no:xdist", "--hardware", "cpu", "--check", "refuse", "--co")
    assert done.returncode == NOTHING_COLLECTED


def test_a_row_that_kept_nothing_is_an_error(tmp_path: Path) -> None:
    """The real conftest beside a benchmark that passes and forgets to keep its result."""
    (tmp_path / "pyproject.toml").write_text(
        f"[tool.pytest.ini_options]\nquantmatrix_tables = {str(ROOT / 'matrix')!r}\n"
    )
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    (folder / "conftest.py").write_text((ROOT / "benchmarks" / "conftest.py").read_text())
    keeps = "keep_result(make_result(row.id))"
    for body, code in (("pass", 3), (keeps, 0)):
        (folder / "test_rows.py").write_text(
            f"import sys\nsys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
            "from benched import make_result\n"
            "def test_row(row, benchmark, keep_result):\n"
            f"    benchmark(lambda: 1)\n    {body}\n"
        )
        clean = {name: value for name, value in os.environ.items() if "XDIST" not in name}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "benchmarks", "-q", "-p", "no:cacheprovider",
             "-p", "no:xdist", "--benchmark-max-time=0.01", "--benchmark-min-rounds=1",
             "--hardware", "cpu", "--family", "msmodelslim", "--backend", "int8"],
            capture_output=True, text=True, cwd=tmp_path, env=clean, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        assert ("partial: msmodelslim-w8a8@cpu+int8" in done.stdout) == bool(code)
