"""Benchmarks run without workers; a result that measured nothing, or not every row, is an error.

`test_rows.py` runs over the cells that the harness selects (`--hardware`, `--family`, `--rows` ...,
by default those of the cpu), thinned by `quantmatrix.measure.bench.rows`, and keeps one result per cell in
`--bench-dir`.
"""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from quantmatrix.measure.bench.rows import LOCAL, choose_cells
from quantmatrix.proof import bench_results

HARNESS = "quantmatrix-harness"
PLANNED = pytest.StashKey[list[str]]()
MEASURED = pytest.StashKey[dict[str, dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("quantmatrix")
    text = "keep the results of test_rows.py there (reports/benchmarks are the committed ones)"
    group.addoption("--bench-dir", metavar="DIR", help=text)
    text = "rounds of each comparison of test_rows.py (default 12)"
    group.addoption("--bench-repeats", type=int, default=12, metavar="N", help=text)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[PLANNED], config.stash[MEASURED] = [], {}
    if getattr(config.option, "numprocesses", None):
        raise pytest.UsageError("benchmarks measure nothing under xdist: run them without -n")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "row" not in metafunc.fixturenames:
        return
    harness: Any = metafunc.config.pluginmanager.get_plugin(HARNESS)
    cells = harness.cells
    if not harness.wanted["hardware"]:
        cells = [cell for cell in cells if cell.hardware == LOCAL]
    chosen = choose_cells(cells)
    if not chosen:
        raise pytest.UsageError("no cell of this selection can be benchmarked")
    metafunc.parametrize("row", chosen, ids=[cell.id for cell in chosen])


def pytest_collection_finish(session: pytest.Session) -> None:
    rows = (getattr(item, "callspec", None) for item in session.items)
    session.config.stash[PLANNED] += [
        spec.params["row"].id for spec in rows if spec and "row" in spec.params
    ]


@pytest.fixture
def keep_result(request: pytest.FixtureRequest) -> Any:
    """What takes the result of a cell: in memory, and in its file as soon as it is there."""
    asked = request.config.getoption("bench_dir")

    def keep(result: dict[str, Any]) -> None:
        bench_results.check_file(
            {"schema": 1, "planned": [result["what"]], "results": [result]}, result["what"]
        )
        request.config.stash[MEASURED][result["what"]] = result
        if asked:
            bench_results.write_cell(result, Path(asked).absolute())

    return keep


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> Generator[None, None, None]:
    """Judge last: the harness, too, sets the exit code here, and knows only its own cells."""
    yield
    benchmarks = getattr(session.config, "_benchmarksession", None)
    measured = [b for b in benchmarks.benchmarks if b.stats] if benchmarks else []
    ran = exitstatus == 0 and session.testscollected and not session.config.option.collectonly
    problems = [] if measured else ["no benchmark measured anything"]
    planned, rows = session.config.stash[PLANNED], session.config.stash[MEASURED]
    problems += bench_results.list_missing(planned, rows, "benchmarks")
    if ran and problems:
        session.exitstatus = pytest.ExitCode.INTERNAL_ERROR
        print("\n" + "\n".join(problems))
