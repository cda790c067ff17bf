"""Benchmarks in the report: bars' data in the page, a table per family, orphans, the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from benched import DEVICE, bench_cell
from observed import PROVEN, find, observe_run
from tables import CASES, write_tables
from test_page import read_data

from quantmatrix.proof import bench_results
from quantmatrix.proof.code_digest import own_code
from quantmatrix.proof.freshness import Now
from quantmatrix.report import render as report
from quantmatrix.tables import read
from quantmatrix.tables.rows import Matrix

PLACE = "benchmarks/cpu/fp8-flux-1+decode.json"


@pytest.fixture
def tables(tmp_path: Path) -> Matrix:
    return read.read(write_tables(tmp_path / "matrix"))


def render(tables: Matrix, *results: dict[str, Any]) -> dict[str, bytes]:
    evidence = {PROVEN: observe_run(tables, find(tables, PROVEN))}
    found = {result["what"]: result for result in results}
    return report.render(tables, evidence, found, Now(code=own_code()))


def test_the_page_knows_a_cells_benchmark(tables: Matrix) -> None:
    data = read_data(render(tables, bench_cell(tables, PROVEN))["index.html"])
    [(place, said)] = data["benchmarks"].items()
    assert tables.cells[int(place)].id == PROVEN
    assert said["device"] == DEVICE
    assert said["file"] == PLACE
    assert said["old"] == ""
    step = next(timing for timing in said["timings"] if timing[0] == "transformer step")
    assert step[1:3] == [10.0, 8.0]
    assert step[3] == pytest.approx(0.8, rel=1e-4)
    assert step[-1] == "faster"
    assert ["transformer weights", 2**25, 2**24] in said["memory"]
    assert ["transformer step memory", 2**20, 2**20] in said["memory"]


def test_without_benchmarks_nothing_is_shown(tables: Matrix) -> None:
    pages = render(tables)
    assert read_data(pages["index.html"])["benchmarks"] == {}
    assert b"beside BF16" not in pages["families/fp8.md"]


def test_a_result_of_no_cell_is_not_rendered(tables: Matrix) -> None:
    stray = {**bench_cell(tables, PROVEN), "what": "gone@cpu"}
    assert render(tables, stray) == render(tables)


def test_the_family_page_has_a_line_per_component(tables: Matrix) -> None:
    text = render(tables, bench_cell(tables, PROVEN))["families/fp8.md"].decode()
    assert "## Speed and memory compared with BF16" in text
    line = next(line for line in text.splitlines() if PLACE in line)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == [
        f"[{PROVEN}](../{PLACE})", "tiny", DEVICE, "transformer", "0.800 (0.792 to 0.808)", "1.4%", "faster",
        "1.500 (1.485 to 1.515)", "0.500", "0.515", "2026-11-26",
    ]  # fmt: skip


def test_what_changed_since_is_said(tables: Matrix, tmp_path: Path) -> None:
    result = bench_cell(tables, PROVEN)
    cases = [{**CASES[0], "flags": "--seed 7"}, *CASES[1:]]
    changed = read.read(write_tables(tmp_path / "changed", cases))
    pages = render(changed, result)
    [said] = read_data(pages["index.html"])["benchmarks"].values()
    assert said["old"] == "the row changed since"
    assert "2026-11-26; the row changed since" in pages["families/fp8.md"].decode()
    result["cell"] |= {"shared_digest": "sha256:0"}
    [said] = read_data(render(changed, result)["index.html"])["benchmarks"].values()
    assert said["old"] == "the row and the code changed since"


def test_equal_input_equal_bytes(tables: Matrix, tmp_path: Path) -> None:
    results = [bench_cell(tables, name) for name in (PROVEN, "fp8-flux-2@cpu")]
    first = render(tables, *results)
    for result in results:
        bench_results.write_cell(result, tmp_path / bench_results.BENCHMARKS)
    again = bench_results.read_reports(tmp_path)
    assert first == render(tables, *reversed(again.values()))


def test_written_checked_and_orphaned(
    tables: Matrix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read, "tables_folder", lambda: tmp_path / "matrix")
    report.write(tmp_path)
    assert report.check(tmp_path) == []
    path = bench_results.write_cell(bench_cell(tables, PROVEN), tmp_path / "benchmarks")
    drift = report.check(tmp_path)
    assert [line.partition(":")[0] for line in drift] == [
        str(tmp_path / "index.html"),
        str(tmp_path / "families/fp8.md"),
    ]
    report.write(tmp_path)
    assert report.check(tmp_path) == []
    gone = bench_results.write_cell({**bench_cell(tables, PROVEN), "what": "gone@cpu"},
                                    tmp_path / "benchmarks")  # fmt: skip
    assert report.check(tmp_path) == [f"{gone}: no cell gone@cpu in the tables; delete it"]
    gone.unlink()
    path.write_text(path.read_text().replace('"ratio": 0.8', '"ratio": 0.1'))
    report.write(tmp_path)
    with pytest.raises(bench_results.BenchmarkError, match="FP8 decode: its samples give"):
        report.check(tmp_path)
